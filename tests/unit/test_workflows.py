"""Workflows: what they may do, and their own steps, run here with a `gh` that only notes what it is asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.auth import identity_pool

from scripts.lib.comment import LIMIT, MARKER
from tests.unit.conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
HEAD = "a" * 40
GH = """#!/bin/sh
printf '%s\\n' "$*" >>"$GH_LOG"
case "$*" in
"run download"*) [ -d "$GH_ARTIFACT" ] && cp -r "$GH_ARTIFACT" preview ;;
*pulls/*) printf '%s\\n' "$GH_HEAD" ;;
*--paginate*) printf '%s' "$GH_COMMENTS" ;;
*body=@*) cat body.md >"$GH_LOG.body" ;;
esac
"""


def _steps(path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each step with its job."""
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [(job, step) for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_an_action_is_one_commit_and_says_its_version(path: Path) -> None:
    """A tag is moved by whoever can write to the action's repository."""
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert [
        line for line in lines if not re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)
    ] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_somebody_else_wrote_reaches_no_shell_as_code(path: Path) -> None:
    for _, step in _steps(path):
        if "run" in step:
            assert "${{" not in step["run"], "an expression is put into the script before a shell reads it"
            subprocess.run(["bash", "-n"], input=step["run"], text=True, check=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_who_runs_the_code_of_a_pull_request_may_write_nothing(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    events = workflow[True]  # YAML 1.1 takes `on` for a boolean
    assert "pull_request_target" not in events
    for job, step in _steps(path):
        granted = {**workflow["permissions"], **job.get("permissions", {})}
        runs_code = str(step.get("uses", "")).startswith("actions/checkout")
        # A token of the run's own writes nothing here; it is for Google, and for no fork.
        writable = {what for what, access in granted.items() if access == "write"}
        if writable == {"id-token"}:
            assert "head.repo.full_name == github.repository" in job["if"]
            writable.clear()
        assert not (runs_code and writable)
        assert not (runs_code and "workflow_run" in events)
        if runs_code:
            assert step["with"]["persist-credentials"] is False


def _step(path: Path, name: str) -> str:
    """The script of a step by its name."""
    (script,) = [str(step["run"]) for _, step in _steps(path) if step.get("name") == name]
    return script


def _run(script: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub's runner does."""
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("up", [0, 1])
def test_a_review_stack_s_checks_and_figures_are_in_the_comment(tmp_path: Path, up: int) -> None:
    scripts, preview = tmp_path / "scripts", tmp_path / ".preview"
    for directory in (scripts, preview):
        directory.mkdir()
    for name, status in (("up", up), ("verify", 0), ("bench", 0)):
        (scripts / name).write_text(f"#!/bin/sh\necho the word of {name} $*\nexit {status}\n")
        (scripts / name).chmod(0o755)
    script = _step(REPOSITORY / ".github/workflows/preview.yml", "review stack")
    result = _run(script, tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "summary"))
    assert result.returncode == up
    review = (preview / "review.md").read_text()
    assert (tmp_path / "summary").read_text() == review
    assert ("the word of verify" in review) == ("the word of bench start" in review) == (up == 0)
    assert ("the word of up" in review) == (up == 1)
    (tmp_path / "comment").mkdir()
    body = f"{MARKER}\n" + "ß" * LIMIT
    status, _, given = _comment(tmp_path / "comment", body=body, review=review)
    assert (status, len(given)) == (0, LIMIT)
    assert given.endswith(review)


def test_the_credentials_of_a_run_are_such_as_google_s_library_takes(tmp_path: Path) -> None:
    script = _step(REPOSITORY / ".github/workflows/preview.yml", "credentials")
    result = _run(
        script,
        tmp_path,
        PROVIDER="projects/1/locations/global/workloadIdentityPools/github/providers/github",
        ACCOUNT="previews@p.iam.gserviceaccount.com",
        ACTIONS_ID_TOKEN_REQUEST_URL="https://token.example/?api-version=2.0",
        ACTIONS_ID_TOKEN_REQUEST_TOKEN="for-this-run",
        RUNNER_TEMP=str(tmp_path),
        GITHUB_ENV=str(tmp_path / "env"),
    )
    assert result.returncode == 0, result.stderr
    file = Path((tmp_path / "env").read_text().strip().removeprefix("GOOGLE_APPLICATION_CREDENTIALS="))
    assert file.stat().st_mode & 0o077 == 0
    credentials = identity_pool.Credentials.from_file(str(file))  # type: ignore[no-untyped-call]
    assert credentials.service_account_email == "previews@p.iam.gserviceaccount.com"
    source = json.loads(file.read_text())["credential_source"]
    assert source["url"].startswith("https://token.example/?api-version=2.0&audience=https%3A%2F%2Fiam.")
    assert "for-this-run" not in result.stdout + result.stderr


def _comment(
    tmp_path: Path,
    *,
    body: str | None,
    number: str = "7",
    head: str = HEAD,
    comments: str = "",
    review: str = "",
) -> Any:
    """Run the step that comments; give its result, what gh was asked, and the body that it was given."""
    (script,) = [
        s["run"] for _, s in _steps(REPOSITORY / ".github/workflows/preview-comment.yml") if "run" in s
    ]
    tools, artifact, log = tmp_path / "bin", tmp_path / "artifact", tmp_path / "log"
    tools.mkdir()
    (tools / "gh").write_text(GH)
    (tools / "gh").chmod(0o755)
    if body is not None:
        artifact.mkdir()
        (artifact / "preview.md").write_text(body)
        (artifact / "number").write_text(number)
        if review:
            (artifact / "review.md").write_text(review)
    environment = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_REPOSITORY": "o/r",
        "RUN": "1",
        "HEAD": HEAD,
        "GH_LOG": str(log),
        "GH_ARTIFACT": str(artifact),
        "GH_HEAD": head,
        "GH_COMMENTS": comments,
    }
    (tmp_path / "work").mkdir()
    result = _run(script, tmp_path / "work", **environment)
    given = Path(f"{log}.body")
    return result.returncode, log.read_text(), given.read_text() if given.exists() else None


def test_the_first_comment_is_made_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    body = f"{MARKER}\n### Preview $(touch hacked) `touch hacked` @somebody\n"
    for name, comments, asked in (
        ("first", "", "POST repos/o/r/issues/7/"),
        ("next", "41\n42\n", "PATCH repos/o/r/issues/comments/41"),
    ):
        (tmp_path / name).mkdir()
        status, log, given = _comment(tmp_path / name, body=body, comments=comments)
        assert status == 0
        assert asked in log
        assert given == body
    assert not list(tmp_path.rglob("hacked"))


def test_a_comment_is_cut_to_what_github_takes(tmp_path: Path) -> None:
    status, _, given = _comment(tmp_path, body=f"{MARKER}\n" + "ß" * LIMIT)
    assert status == 0
    assert given is not None
    assert len(given) == LIMIT


@pytest.mark.parametrize("number", ["", "7; touch hacked", "../8", "-1", "7\n8", "$(id)"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, number: str) -> None:
    status, log, given = _comment(tmp_path, body=MARKER, number=number)
    assert status != 0
    assert given is None
    assert "pulls/" not in log
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize("changes", [{"head": "b" * 40}, {"body": None}])
def test_a_preview_that_is_not_of_this_head_or_is_not_there_writes_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    status, _, given = _comment(tmp_path, **{"body": f"{MARKER}\n", **changes})
    assert status == 0
    assert given is None


def test_what_is_no_preview_is_no_comment(tmp_path: Path) -> None:
    status, _, given = _comment(tmp_path, body="something else")
    assert status != 0
    assert given is None
