"""The report of a preview: golden files of recorded events, its size, and that no secret is ever in it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.lib import built, commands, comment, drift, paths, plan, preview
from scripts.lib.plan import Report, Step

DATA = Path(__file__).with_name("data")
MARKED = {"4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270"}


def recorded(name: str) -> list[plan.Event]:
    """What pulumi printed on a running stack, without what is the same and without outputs."""
    return plan.parse((DATA / f"{name}.jsonl").read_text())


def reported() -> Report:
    """The preview of another name of the node, less memory for the app and a larger disk."""
    events = recorded("preview-node")
    report = plan.read("local", events, configuration=[("nodeName", "krustlet-1", "krustlet-2")])
    report.base, report.head, report.cost = "0123456789ab", "ba9876543210", plan.cost(events)
    report.drift = plan.drift(recorded("refresh-drift"))
    return report


def broken() -> Report:
    """The preview of an agent's port for everybody, an image by its tag and a token in a VM's metadata."""
    return plan.read("local", recorded("preview-policy"))


@pytest.mark.parametrize(("name", "of"), [("preview-node", reported), ("preview-policy", broken)])
@pytest.mark.parametrize("kind", ["md", "html", "json"])
def test_the_report_of_recorded_events_is_the_golden_one(
    name: str, of: Callable[[], Report], kind: str
) -> None:
    report = of()
    made = {
        "md": comment.markdown(report),
        "html": comment.page(report),
        "json": json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n",
    }[kind]
    golden = DATA / f"{name}.{kind}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(made)
    assert made == golden.read_text(), "look at the difference; UPDATE_GOLDEN=1 writes the file"


def test_what_is_replaced_is_loud_says_why_and_for_how_long() -> None:
    lines = comment.markdown(reported()).splitlines()
    assert "base `0123456789ab`, head `ba9876543210`" in lines
    assert "**12 replaced**, 22 unchanged" in lines
    vm = next(line for line in lines if "`node-vm`" in line)
    assert vm.startswith("- **REPLACED** ")
    assert "because of `bootDisk`" in vm
    assert vm.endswith("the app is away for a new VM's boot")


def test_what_breaks_a_policy_is_said_and_what_looks_like_a_credential_is_not() -> None:
    report = broken()
    text = comment.markdown(report)
    assert report.failed
    for policy in ("no-agent-port-to-the-world", "no-secret-in-metadata", "images-by-digest"):
        assert f"| **mandatory** | `{policy}` |" in text
    assert "abcdef.0123456789abcdef" not in text + comment.page(report) + json.dumps(
        dataclasses.asdict(report)
    )
    assert "+   metadata.note: [looks like a credential]" in text


@pytest.mark.parametrize(
    ("ops", "kind"),
    [
        (["create-replacement", "replace", "delete-replaced"], "replaced"),
        (["delete-replaced", "replace", "create-replacement"], "replaced"),
        (["delete-replaced"], "deleted"),
        (["delete"], "deleted"),
    ],
)
def test_what_ends_with_what_it_stood_on_and_is_not_made_anew_is_deleted(ops: list[str], kind: str) -> None:
    told = [{"urn": "urn:pulumi:local::p::t::it", "type": "t", "op": op} for op in ops]
    seen = [{"resourcePreEvent": {"metadata": metadata}} for metadata in told]
    (step,) = plan.read("local", seen).steps
    assert (step.name, step.kind) == ("it", kind)


def _step(name: str, kind: str, *diff: str) -> Step:
    return Step(name, "t", kind, diff=list(diff))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], "none"),
        ([_step("node-app-firewall", "updated")], "none"),
        ([_step("workload-pod", "replaced"), _step("workload-smoke-test", "replaced")], "the port takes"),
        (
            [_step(name, "updated") for name in ("node-vm", "node-registration")]
            + [_step("workload-smoke-test", "replaced")],
            "the agent's restart",
        ),
        (
            [
                _step("node-vm", "updated", "- machineType: e2-small", "+ machineType: e2-medium"),
                _step("node-registration", "updated"),
                _step("workload-smoke-test", "replaced"),
            ],
            "the VM's boot",
        ),
        ([_step("workload-pod", "deleted")], "for good"),
        ([_step("workload-second-pod", "deleted")], "for good"),
        ([_step("workload-second-pod", "replaced")], "the port takes"),
        ([_step("workload-pod", "deleted"), _step("workload-deployment", "created")], "none"),
        ([_step("workload-deployment", "updated"), _step("workload-prepare", "replaced")], "none"),
        ([_step("cluster-nat", "deleted"), _step("node-address", "deleted")], "none"),
    ],
)
def test_the_downtime_is_that_of_the_table_of_changes(steps: list[Step], expected: str) -> None:
    assert expected in plan.downtime(steps, set())


# A secret has a letter that nothing of ours has, so that to find it is to have leaked it.
SECRETS = st.text(st.sampled_from("ßþ\"\\\n` |<&'é"), min_size=6, max_size=40).filter(
    lambda text: len(text.strip()) >= 6 and not {"ß", "þ"}.isdisjoint(text)
)
SHAPES = st.recursive(
    SECRETS,
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.just("k"), inner, min_size=1),
)


@settings(deadline=None, max_examples=60)
@given(secret=SHAPES, how=st.sampled_from(["value", "plaintext", "ciphertext"]), place=st.integers(0, 4))
def test_no_secret_of_any_shape_is_ever_shown(secret: Any, how: str, place: int) -> None:
    held = json.dumps(secret) if how == "plaintext" else secret
    texts = [text for text in plan.leaves(secret) if len(text.strip()) >= 6]
    leaked = f"before {texts[0]} after"
    inputs: dict[str, Any] = {"marked": {**MARKED, how: held}, "list": [{"deep": {**MARKED, how: held}}]}
    metadata: dict[str, Any] = {
        "op": "update",
        "urn": "u::p::t::name",
        "type": "t",
        "new": {"inputs": inputs},
    }
    metadata["old"] = {"inputs": {"marked": "other"}}
    if place == 0:
        inputs["plain"] = texts[0]
    elif place == 1:
        inputs[texts[0]] = "as a key"
    elif place == 2:
        metadata |= {"op": "replace", "keys": [texts[0]], "urn": f"u::p::t::{texts[0]}"}
    events: list[plan.Event] = [
        {"resourcePreEvent": {"metadata": metadata}},
        {"resOutputsEvent": {"metadata": {**metadata, "detailedDiff": {"marked": {}, texts[0]: {}}}}},
        {"diagnosticEvent": {"severity": "error", "message": leaked}},
        {"policyEvent": {"policyName": "p", "enforcementLevel": "mandatory", "message": leaked}},
    ]
    if place == 3:
        events.append({"errorEvent": {"error": json.dumps(leaked)}})
    report = plan.read("local", events, configuration=[("key", texts[0], leaked)])
    report.drift = plan.drift([*events])
    shown = [comment.markdown(report), comment.page(report), json.dumps(dataclasses.asdict(report))]
    shown.append(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
    for text in texts:
        for spelling in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]):
            assert not [page for page in shown if spelling in page]
    assert plan.SECRET in shown[0]


def test_a_secret_of_the_stack_is_taken_out_though_the_engine_does_not_mark_it() -> None:
    events = [{"diagnosticEvent": {"severity": "warning", "message": "token abcdef.0123456789abcdef is old"}}]
    report = plan.read("local", events, known_secrets=["abcdef.0123456789abcdef"])
    assert report.messages == ["warning: token [secret] is old"]


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(st.text(min_size=1, max_size=60), max_size=8),
    lines=st.integers(0, 700),
    width=st.integers(0, 400),
    messages=st.lists(st.text(max_size=3000), max_size=4),
)
def test_a_comment_is_never_larger_than_github_takes_and_says_when_it_is_cut(
    names: list[str], lines: int, width: int, messages: list[str]
) -> None:
    steps = [Step(name, "t", "replaced", ["a|b"], "x", ["+ p: " + "y" * width] * lines) for name in names]
    text = comment.markdown(Report("local", steps=steps, messages=messages))
    assert len(text) <= comment.LIMIT
    assert text.startswith(comment.MARKER)
    whole = sum(map(len, comment._diff(Report("local", steps=steps))))
    if whole > comment.LIMIT:
        assert "… cut here: " in text
    assert text.count("<details>") == text.count("</details>")


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("`|\n <!->#ab"), max_size=40))
def test_what_a_name_has_in_it_ends_neither_its_code_span_nor_its_cell(text: str) -> None:
    span = comment.code(text)
    assert "\n" not in span
    assert not re.search(r"(?<!\\)\|", span)
    fence = re.match(r"`+", span)
    assert fence
    assert not re.search(rf"(?<!`){fence[0]}(?!`)", span[len(fence[0]) : -len(fence[0])])


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.seen.add(tag)


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("<>&\"'`*|scriptimg/=#\n "), max_size=60))
def test_nothing_that_is_reported_is_html_of_its_own(text: str) -> None:
    nasty = f"<script>{text}</script><img onerror=x>"
    report = Report("local", steps=[Step(nasty, nasty, "replaced", [nasty], nasty, [f"+ {nasty}"])])
    report.messages, report.configuration = [nasty], [(nasty, nasty, nasty)]
    tags = _Tags()
    tags.feed(comment.page(report))
    assert not tags.seen & {"script", "img"}


def test_drift_names_what_is_gone_and_what_is_another() -> None:
    found = {step.name: step for step in plan.drift(recorded("refresh-drift"))}
    assert found["workload-pod"].kind == "deleted"
    assert found["node-app-firewall"].diff == [
        "- sourceRanges[0]: 0.0.0.0/0",
        "+ sourceRanges[0]: 10.0.0.0/8",
    ]
    assert len(found) == 2


def test_settings_are_compared_with_their_defaults_and_secrets_only_by_their_ciphertext() -> None:
    project = "name: p\nconfig:\n  a: {type: integer, default: 1}\n  b: {type: array, default: [x]}\n"
    before = preview.settings(project, "config:\n  p:s: {secure: v1:one}\n")
    after = preview.settings(project, "config:\n  p:s: {secure: v1:two}\n  p:a: 2\n  gcp:zone: z\n")
    assert before["a"] == "1"
    assert after == {"a": "2", "b": '["x"]', "gcp:zone": "z", "s": after["s"]}
    assert before["s"] != after["s"]
    assert all(values["s"].startswith("[secret]") for values in (before, after))


def test_settings_of_a_base_are_those_of_its_commit() -> None:
    if not (paths.REPOSITORY / ".git").exists():
        pytest.skip("a source archive")
    assert preview.changed_settings("HEAD", "no-such-stack") == []


def test_another_stack_than_ours_is_asked_for_with_the_environment_of_google() -> None:
    assert commands._stack([]) == "local"
    assert commands._stack(["--base", "x", "--stack", "dev"]) == "dev"
    assert commands._stack(["--stack=dev", "--json"]) == "dev"


@pytest.mark.parametrize(
    ("name", "ended", "status"), [("refresh-drift", 0, 2), ("preview-node", 0, 0), ("refresh-drift", 255, 1)]
)
def test_a_cron_job_is_told_by_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, ended: int, status: int
) -> None:
    monkeypatch.setattr("sys.argv", ["drift", "--json"])
    monkeypatch.setattr(drift, "known_secrets", lambda _stack: ["krustlet-1-app"])
    monkeypatch.setattr(drift, "events", lambda _command: (recorded(name), ended, "krustlet-1-app is locked"))
    assert drift.main() == status
    said = capsys.readouterr()
    assert "krustlet-1-app" not in said.out + said.err
    assert ("[secret] is locked" in said.err) == (status == 1)
    if status != 1:
        assert bool(json.loads(said.out)) == (status == 2)


def _told(name: str, type_: str, old: dict[str, Any] | None, new: dict[str, Any], op: str) -> plan.Event:
    metadata: dict[str, Any] = {"urn": f"u::p::t::{name}", "type": type_, "op": op, "new": {"inputs": new}}
    return {"resourcePreEvent": {"metadata": metadata | ({"old": {"inputs": old}} if old else {})}}


ORIGIN = {"source": "1", "lock file": "1", "toolchain": "rustc 1", "profile": "release", "configuration": "1"}
HTTP = ["wasi:http/types@0.2.0"]
OLD = {
    "sha256": "1",
    "size": 1000,
    "imports": HTTP,
    "exports": ["wasi:http/incoming-handler@0.2.0"],
    "origin": ORIGIN,
}


@settings(deadline=None, max_examples=60)
@given(parts=st.sets(st.sampled_from(sorted(ORIGIN))), first=st.booleans())
def test_an_app_that_changes_has_a_table_of_what_it_is_and_reaches_and_of_what_changed(
    parts: set[str], first: bool
) -> None:
    imports = [*HTTP, "wasi:sockets/tcp@0.2.0", "wasi:io/poll@0.2.0", "acme:missile/launch"]
    new = {**OLD, "sha256": "2", "size": 2000, "imports": imports}
    new["origin"] = ORIGIN | dict.fromkeys(parts, "another")
    events = [
        _told("app-build", built.BUILD, None if first else OLD, new, "create" if first else "update"),
        _told("app-push", "t", None if first else {"digest": "sha256:a"}, {"digest": "sha256:b"}, "replace"),
    ]
    report = plan.read("local", events)
    (app,) = report.built
    rows = {row: (before, after) for row, before, after in app.rows}
    before = built.NOTHING
    assert rows["digest"] == (before if first else "sha256:a", "sha256:b")
    assert rows["bytes"] == (before if first else "1,000", "2,000")
    assert rows["capabilities"] == (before if first else "none", "acme:missile/launch, sockets")
    assert rows["imports"][1] == ", ".join(imports)
    assert set(app.because) == (set() if first else parts)
    text = comment.markdown(report)
    assert "#### Built: `app`" in text
    assert all(f"**{part}**" in text for part in app.because)
    assert "acme:missile/launch" in comment.page(report)


def test_an_app_that_stays_as_it_is_has_no_table() -> None:
    events = [_told("app-build", built.BUILD, OLD, {**OLD, "origin": {}}, op) for op in ("same", "update")]
    assert plan.read("local", events).built == []
