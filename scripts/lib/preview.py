"""./scripts/preview: what a change would do to a stack, for whoever reviews it: Markdown, JSON and HTML."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from scripts.lib import comment, paths, plan, venv

PROJECT = paths.REPOSITORY / "Pulumi.yaml"
POLICIES = paths.REPOSITORY / "policy" / "__main__.py"


def _git(*arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments], cwd=paths.REPOSITORY, capture_output=True, text=True, check=False
    )
    return answer.stdout if answer.returncode == 0 else ""


def settings(project: str, stack: str) -> dict[str, str]:
    """Every setting by its key, as text: the schema's defaults, and what the stack's file says instead.

    A secret is `[secret]` with the start of its ciphertext's sum: another one is seen, and not read.
    """
    schema = yaml.safe_load(project) or {}
    name = str(schema.get("name", ""))
    found: dict[str, Any] = {
        key: value.get("default") if isinstance(value, dict) else value
        for key, value in (schema.get("config") or {}).items()
    }
    given = (yaml.safe_load(stack) or {}).get("config") or {}
    found |= {key.removeprefix(f"{name}:"): value for key, value in given.items()}
    return {key: _shown(value) for key, value in found.items()}


def _shown(value: Any) -> str:
    if _has_secret(value):
        ciphertext = json.dumps(value, sort_keys=True).encode()
        return f"{plan.SECRET} #{hashlib.sha256(ciphertext).hexdigest()[:4]}"
    return value if isinstance(value, str) else json.dumps(value)


def _has_secret(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) == {"secure"} or any(_has_secret(item) for item in value.values())
    return isinstance(value, list) and any(_has_secret(item) for item in value)


def changed_settings(base: str, stack: str) -> list[tuple[str, str, str]]:
    """The settings that differ between a commit and the working tree: key, before, after."""
    file = f"Pulumi.{stack}.yaml"
    before = settings(_git("show", f"{base}:Pulumi.yaml"), _git("show", f"{base}:{file}"))
    path = paths.REPOSITORY / file
    after = settings(PROJECT.read_text(), path.read_text() if path.exists() else "")
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [(key, before.get(key, "(none)"), after.get(key, "(none)")) for key in keys]


def known_secrets(stack: str) -> list[str]:
    """The secrets of the stack's configuration and outputs, in clear, to be taken out of everything shown."""
    found: list[str] = []
    for command in (["config", "--json"], ["stack", "output", "--json"]):
        texts = []
        for show in ([], ["--show-secrets"]):
            answer = subprocess.run(
                ["pulumi", *command, *show, "--stack", stack],
                cwd=paths.REPOSITORY,
                capture_output=True,
                text=True,
                check=False,
            )
            texts.append(json.loads(answer.stdout) if answer.returncode == 0 else {})
        hidden, shown = texts
        for key, value in shown.items():
            if hidden.get(key) != value:
                found += plan.leaves(value.get("value", value) if isinstance(value, dict) else value)
    return found


def events(command: list[str]) -> tuple[list[plan.Event], int, str]:
    """Run pulumi; give its events, its exit status and what it said on standard error."""
    environment = {**os.environ, "PULUMI_ENABLE_STREAMING_JSON_PREVIEW": "true"}
    if "--policy-pack" in command:
        with contextlib.redirect_stdout(sys.stderr):
            places = [str(venv.policies()), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    if "--save-plan" in command:
        environment["PULUMI_EXPERIMENTAL"] = "true"
    answer = subprocess.run(
        ["pulumi", *command, "--json", "--non-interactive"],
        cwd=paths.REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return plan.parse(answer.stdout), answer.returncode, answer.stderr.strip()


def make(stack: str, base: str, options: argparse.Namespace) -> plan.Report:
    """Ask pulumi, and make the report."""
    command = ["preview", "--stack", stack]
    if options.policies:
        command += ["--policy-pack", str(POLICIES)]
    if options.save_plan:
        command += ["--save-plan", str(Path(options.save_plan).absolute())]
    secrets = known_secrets(stack)
    seen, status, said = events(command)
    report = plan.read(stack, seen, configuration=changed_settings(base, stack), known_secrets=secrets)
    report.base = _git("rev-parse", "--short=12", base).strip()
    report.head = _git("rev-parse", "--short=12", "HEAD").strip()
    if _git("status", "--porcelain"):
        report.head += "+changes"
    report.cost = plan.cost(seen)
    report.failed |= status != 0
    if status != 0 and said and not report.messages:
        report.messages.append(f"error: {plan.Redactor(secrets).text(said)}")
    if options.drift:
        refreshed, status, _ = events(["refresh", "--preview-only", "--stack", stack])
        report.drift = plan.drift(refreshed, secrets) if status == 0 else None
    return report


def main() -> int:
    """Write preview.md, .json and .html, and print the Markdown; fails where the preview does."""
    parser = argparse.ArgumentParser(prog="./scripts/preview", description=__doc__)
    parser.add_argument("--stack", default="local", help="unless given, local")
    parser.add_argument("--base", default="HEAD", metavar="REF", help="what settings are compared with")
    parser.add_argument("--output", default=".preview", metavar="DIR", help="where the files are written")
    parser.add_argument("--save-plan", metavar="FILE", help="an update plan, for ./scripts/up --plan FILE")
    parser.add_argument("--no-drift", dest="drift", action="store_false", help="ask nothing of what runs")
    parser.add_argument("--no-policies", dest="policies", action="store_false", help="leave policy/ out")
    options = parser.parse_args()
    if not _git("rev-parse", "--verify", "--quiet", f"{options.base}^{{commit}}"):
        parser.error(f"--base: {options.base} is no commit of this repository")
    report = make(options.stack, options.base, options)
    directory = Path(options.output)
    directory.mkdir(parents=True, exist_ok=True)
    text = comment.markdown(report)
    (directory / "preview.md").write_text(text, encoding="utf-8")
    document = json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False)
    (directory / "preview.json").write_text(document + "\n", encoding="utf-8")
    (directory / "preview.html").write_text(comment.page(report), encoding="utf-8")
    print(text)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
