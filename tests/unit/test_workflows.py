"""Workflows: what they may do, and their own steps, run here with a `gh` that only notes what it is asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

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
        assert not (runs_code and "write" in granted.values())
        assert not (runs_code and "workflow_run" in events)
        if runs_code:
            assert step["with"]["persist-credentials"] is False


def _comment(
    tmp_path: Path, *, body: str | None, number: str = "7", head: str = HEAD, comments: str = ""
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
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    result = subprocess.run(
        command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, check=False
    )
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
