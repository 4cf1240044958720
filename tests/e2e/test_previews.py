"""What a reviewer of a change is shown by a running stack, and what a plan binds."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.conftest import Stack, clone


def test_another_clone_of_the_same_commit_sees_no_change_and_no_warning(stack: Stack, tmp_path: Path) -> None:
    other = clone(tmp_path / "other")
    where = ("--stack", "local", "--non-interactive", "--cwd", str(other.directory))
    answer = stack.run("pulumi", "preview", "--diff", "--expect-no-changes", *where)
    said = answer.stdout + answer.stderr
    assert "warning" not in said, said
    state = json.loads(stack.run("pulumi", "stack", "export").stdout)
    for resource in state["deployment"]["resources"]:
        kept = json.dumps([resource.get("inputs"), resource.get("outputs")])
        assert str(stack.directory) not in kept
        assert "docker-manifest-digest" not in kept


def test_a_plan_that_does_not_fit_any_more_is_refused_and_nothing_is_done(
    stack: Stack, tmp_path: Path
) -> None:
    plan, report = tmp_path / "plan.json", tmp_path / "report"
    said = stack.run("./scripts/preview", "--save-plan", str(plan), "--output", str(report))
    assert "**nothing changes**" in said.stdout
    assert "None: everything is as the state has it." in said.stdout
    assert "All are kept." in said.stdout
    settings = stack.directory / "Pulumi.local.yaml"
    before, version = settings.read_text(), stack.run("pulumi", "stack", "history", "--json").stdout
    try:
        stack.run("pulumi", "config", "set", "memoryLimit", "48Mi", "--stack", "local")
        refused = stack.run("./scripts/up", "--plan", str(plan), check=False)
    finally:
        settings.write_text(before)
    assert refused.returncode == 1
    assert "violates plan" in refused.stdout + refused.stderr
    assert stack.run("pulumi", "stack", "history", "--json").stdout == version
