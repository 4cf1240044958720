"""What a preview says, read from the engine's events: nothing here knows Markdown; no secret leaves it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from policy.rules import CREDENTIAL
from scripts.lib import built
from scripts.lib.changes import AGENT, ALL, BOOT, CHANGES, NONE, POD, VM, Change

Event = dict[str, Any]
SECRET = "[secret]"  # noqa: S105 - what stands in its place
_SIGNATURE = "4dabf18193072939515e22adb298388d"
_SECRET_SIGNATURE = "1b47061264138c4ac30d75fd1eb44270"  # noqa: S105 - Pulumi's mark, public
_UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
# Shorter ones are words that a text has anyway; in their own place they are not shown either. Of a document
# (a kubeconfig, a PEM) what is long is secret: the rest are names that stand elsewhere too.
_SHORTEST = 6
_SHORTEST_PART = 20
_ENDED = ("delete", "delete-replaced", "discard", "discard-replaced")
_OPS = {"create": "created", "import": "created", "update": "updated", "replace": "replaced"}
_OPS |= dict.fromkeys(_ENDED, "deleted")
KINDS = ("created", "updated", "replaced", "deleted")
# Without one of these there is no app.
_NEEDED = ("cluster-namespace", "node-vm", "node-registration", "cluster-cluster")
# The pod of a stack's only app, or of one among several.
_POD = re.compile(r"(workload-(?:.+-)?)pod")
_DOWNTIMES = (NONE, POD, AGENT, BOOT, VM, ALL)


@dataclass
class Step:
    """One resource that changes. `because` are the properties that ask for its replacement."""

    name: str
    type: str
    kind: str
    because: list[str] = field(default_factory=list)
    downtime: str = ""
    diff: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything that a reader of a pull request is told."""

    stack: str
    base: str = ""
    head: str = ""
    steps: list[Step] = field(default_factory=list)
    unchanged: int = 0
    downtime: str = NONE
    built: list[built.Change] = field(default_factory=list)
    configuration: list[tuple[str, str, str]] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)
    violations: list[dict[str, str]] = field(default_factory=list)
    drift: list[Step] | None = None
    cost: tuple[float, float] | None = None
    messages: list[str] = field(default_factory=list)
    failed: bool = False


def parse(text: str) -> list[Event]:
    """Read the events that pulumi prints, one a line; anything else between them is no event."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def leaves(value: object) -> Iterable[str]:
    """Every text in a value, and what is long in JSON that is written in a text."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, str):
        yield value
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return
        yield from (part for part in leaves(inner) if part != value and len(part) >= _SHORTEST_PART)
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _decoded(value: object) -> object:
    """What a secret's `plaintext` stands for, which is JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None


def secrets_in(value: object) -> set[str]:
    """Give the text of every secret, and of every part of one, wherever in events or states it is."""
    found: set[str] = set()
    if isinstance(value, dict):
        if value.get(_SIGNATURE) == _SECRET_SIGNATURE:
            for key, item in value.items():
                if key != _SIGNATURE:
                    found.update(leaves(item), leaves(_decoded(item)))
            found.discard(SECRET)
        else:
            for item in value.values():
                found |= secrets_in(item)
    elif isinstance(value, list):
        for item in value:
            found |= secrets_in(item)
    return found


class Redactor:
    """Takes secrets out: where they are marked, and the same text wherever else it is."""

    def __init__(self, known: Iterable[str]) -> None:
        spellings: set[str] = set()
        for text in known:
            if len(text.strip()) >= _SHORTEST:
                # as it is, as JSON writes it, and line by line, as a log shows it
                escaped = json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]
                lines = (line.strip() for line in text.splitlines())
                spellings |= {
                    text,
                    text.strip(),
                    *escaped,
                    *(line for line in lines if len(line) >= _SHORTEST_PART),
                }
        longest_first = sorted(spellings, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def text(self, text: str) -> str:
        """A text without any secret."""
        return self._pattern.sub(SECRET, text) if self._pattern else text

    def value(self, value: Any) -> Any:
        """A value without any secret; what is marked as one becomes `[secret]` as a whole."""
        if isinstance(value, dict):
            if value.get(_SIGNATURE) == _SECRET_SIGNATURE:
                return SECRET
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return self.text(value) if isinstance(value, str) else value


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """The leaves of a value by their paths, as text."""
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            if key != "__provider":  # a provider's code by reference
                found |= _flat(item, f"{path}.{key}" if path else str(key))
        return found
    if isinstance(value, list) and value:
        return {k: v for n, item in enumerate(value) for k, v in _flat(item, f"{path}[{n}]").items()}
    if value == _UNKNOWN:
        return {path: "[unknown]"}
    return {path: value if isinstance(value, str) else json.dumps(value)}


def _without_credential(line: str) -> str:
    """A line of `PATH: VALUE`; what somebody forgot to mark as a secret is shown to nobody either."""
    return f"{line.split(': ', 1)[0]}: [looks like a credential]" if CREDENTIAL.search(line) else line


def difference(old: Any, new: Any) -> list[str]:
    """Lines of a diff between two sets of inputs."""
    before, after = _flat(old or {}), _flat(new or {})
    lines = []
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            lines += [f"- {path}: {line}" for line in before.get(path, "").splitlines() if path in before]
            lines += [f"+ {path}: {line}" for line in after.get(path, "").splitlines() if path in after]
    return [_without_credential(line) for line in lines]


def _name(urn: str) -> str:
    return urn.split("::", 3)[-1]


def _steps(events: Iterable[Event]) -> tuple[list[Step], int]:
    """Every resource once: a replacement has up to three steps in the engine."""
    steps: dict[str, Step] = {}
    unchanged, there = set(), set()
    for event in events:
        metadata = (event.get("resourcePreEvent") or {}).get("metadata")
        if not metadata:
            continue
        urn, op = metadata["urn"], metadata["op"]
        if op in ("same", "read", "refresh"):
            unchanged.add(urn)
            continue
        kind = "replaced" if "replac" in op else _OPS.get(op, "updated")
        step = steps.setdefault(urn, Step(_name(urn), metadata["type"], kind))
        if kind == "replaced":
            step.kind = kind
        if op not in _ENDED:
            there.add(urn)
        step.because = sorted({*step.because, *(metadata.get("keys") or [])})
        old, new = ((metadata.get(which) or {}).get("inputs") for which in ("old", "new"))
        if op not in _ENDED or kind == "deleted":
            step.diff = difference(old, new)
    for urn in steps.keys() - there:
        steps[urn].kind = "deleted"  # with what it stood on, as one that is to be made anew, and is not
    return [step for step in steps.values() if step.type != "pulumi:pulumi:Stack"], len(
        unchanged - set(steps)
    )


def _changing(events: Iterable[Event]) -> dict[str, Event]:
    """What the engine tells of each resource that changes and is there afterwards, by its name."""
    told = ((event.get("resourcePreEvent") or {}).get("metadata") for event in events)
    return {
        _name(metadata["urn"]): metadata
        for metadata in told
        if metadata and metadata.get("new") and metadata["op"] not in (*_ENDED, "same", "read", "refresh")
    }


def _applies(change: Change, plan: Mapping[str, str], changed: set[str], steps: list[Step]) -> bool:
    if not change.plan or not change.plan.items() <= plan.items():
        return False
    if change.key == "machineType":  # plans what any other configuration of the VM plans
        machine = [line for step in steps if step.name == "node-vm" for line in step.diff]
        return change.key in changed or any(line[2:].startswith("machineType:") for line in machine)
    return True


def _is_needed(name: str, plan: Mapping[str, str]) -> bool:
    """Whether there is no app without it; a pod may give way to a Deployment."""
    pod = _POD.fullmatch(name)
    return name in _NEEDED or (pod is not None and plan.get(f"{pod[1]}deployment") != "create")


def downtime(steps: list[Step], changed: set[str]) -> str:
    """How long the app is away, by the table of docs/changes.md: the longest of what is planned."""
    verbs = {"updated": "update", "replaced": "replace", "created": "create", "deleted": "delete"}
    plan = {step.name: verbs[step.kind] for step in steps if step.kind in verbs}
    found = [change.downtime for change in CHANGES if _applies(change, plan, changed, steps)]
    if any(step.kind == "deleted" and _is_needed(step.name, plan) for step in steps):
        return "for good: what it runs on is deleted"
    longest = max(map(_DOWNTIMES.index, found), default=0)
    if any(kind == "replace" and _POD.fullmatch(name) for name, kind in plan.items()):
        longest = max(longest, _DOWNTIMES.index(POD))
    return _DOWNTIMES[longest]


def messages(events: Iterable[Event]) -> list[str]:
    """Warnings and errors, each once. What plugins say while they end, after all was seen, is none of it."""
    found = []
    for event in events:
        if event.get("summaryEvent"):
            break
        diagnostic = event.get("diagnosticEvent") or {}
        if diagnostic.get("severity") in ("warning", "error", "info#err"):
            text = re.sub(r"<\{%.*?%\}>", "", diagnostic["message"]).strip()
            at = _name(diagnostic["urn"]) if diagnostic.get("urn") else ""
            found.append(f"{diagnostic['severity']}: {at + ': ' if at else ''}{text}")
        if event.get("errorEvent"):
            found.append(f"error: {event['errorEvent'].get('error', '')}")
    return list(dict.fromkeys(found))


def drift(events: Iterable[Event], known: Iterable[str] = ()) -> list[Step]:
    """What a refresh would change in the state: each resource that is not as the state has it."""
    events = list(events)
    redactor = Redactor({*secrets_in(events), *known})
    found = []
    for event in events:
        metadata = (event.get("resOutputsEvent") or {}).get("metadata")
        if not metadata or metadata["op"] == "same" or metadata["type"] == "pulumi:pulumi:Stack":
            continue
        metadata = redactor.value(metadata)
        old, new = metadata.get("old") or {}, metadata.get("new")
        if not new or metadata["op"] in _ENDED:
            found.append(Step(_name(metadata["urn"]), metadata["type"], "deleted"))
            continue
        changed = sorted(path.split(".")[0].split("[")[0] for path in metadata.get("detailedDiff") or {})
        lines = [
            line
            for line in difference(old.get("outputs"), new.get("outputs"))
            if not changed or re.split(r"[.:\[]", line[2:], maxsplit=1)[0] in changed
        ]
        if metadata["op"] == "update" or metadata.get("detailedDiff"):
            found.append(Step(_name(metadata["urn"]), metadata["type"], "updated", diff=lines))
    return found


def read(
    stack: str,
    events: Iterable[Event],
    *,
    configuration: Iterable[tuple[str, str, str]] = (),
    known_secrets: Iterable[str] = (),
) -> Report:
    """Make the report of a preview's events. `known_secrets` are taken out as well, wherever they are."""
    raw = list(events)
    redactor = Redactor({*secrets_in(raw), *known_secrets})
    clean: list[Event] = redactor.value(raw)
    report = Report(stack)
    report.configuration = [(key, redactor.text(old), redactor.text(new)) for key, old, new in configuration]
    report.steps, report.unchanged = _steps(clean)
    report.built = built.read(_changing(clean))
    changed = {key for key, _, _ in report.configuration}
    report.downtime = downtime(report.steps, changed)
    for step in report.steps:
        if step.kind in ("replaced", "deleted"):
            alone = downtime([step], changed) if step.kind == "deleted" else _downtime_of(step, report)
            step.downtime = alone
    report.messages = messages(clean)
    for event in clean:
        if policy := event.get("policyEvent"):
            where = _name(policy["resourceUrn"]) if policy.get("resourceUrn") else stack
            message = re.sub(r"<\{%.*?%\}>", "", policy["message"]).strip()
            report.violations.append(
                {
                    "policy": policy["policyName"],
                    "level": policy["enforcementLevel"],
                    "resource": where,
                    "message": message,
                }
            )
        if summary := event.get("summaryEvent"):
            packs = summary.get("PolicyPacks") or {}
            # a pack's name is followed by where it lies on this machine
            report.policies = [f"{name.split('|')[0]} {version}" for name, version in sorted(packs.items())]
    report.failed = any(message.startswith("error") for message in report.messages)
    report.failed |= any(violation["level"] == "mandatory" for violation in report.violations)
    return report


# What the app waits for; the rest of what is replaced is made beside it.
_SERVING = ("node-vm", "node-registration", "node-disk", "cluster-")


def _downtime_of(step: Step, report: Report) -> str:
    return report.downtime if step.name.startswith(_SERVING) or _POD.fullmatch(step.name) else NONE


PRICED_ON = "January 2025"
PRICED_FOR = "us-central1"
HOURS = 730
# US dollars, Google Cloud's list prices: an hour of a machine type, and what else the stack is charged for.
MACHINES = {
    "e2-micro": 0.008376,
    "e2-small": 0.016751,
    "e2-medium": 0.033503,
    "e2-standard-2": 0.067006,
    "e2-standard-4": 0.134012,
    "e2-standard-8": 0.268025,
}
CLUSTER_HOUR = 0.10
ADDRESS_HOUR = 0.005
# For each VM behind it; it has an address as well.
NAT_HOUR = 0.0014
DISK_GB_MONTH = 0.04
POOL_DISK_GB = 100


def monthly(type_: str, inputs: Mapping[str, Any]) -> float:  # noqa: PLR0911 - one a type
    """What a resource costs in a month by the list, US dollars; 0 for what has no price of its own."""

    def number(value: object, default: float) -> float:
        try:
            return float(str(value))
        except ValueError:
            return default

    match type_:
        case "gcp:compute/instance:Instance":
            return MACHINES.get(str(inputs.get("machineType")), 0) * HOURS
        case "gcp:container/nodePool:NodePool":
            machine = MACHINES.get(str((inputs.get("nodeConfig") or {}).get("machineType")), 0)
            return number(inputs.get("nodeCount"), 1) * (machine * HOURS + POOL_DISK_GB * DISK_GB_MONTH)
        case "gcp:container/cluster:Cluster":
            return CLUSTER_HOUR * HOURS
        case "gcp:compute/address:Address":
            return ADDRESS_HOUR * HOURS if inputs.get("addressType", "EXTERNAL") == "EXTERNAL" else 0
        case "gcp:compute/routerNat:RouterNat":
            return (NAT_HOUR + ADDRESS_HOUR) * HOURS
        case "gcp:compute/disk:Disk":
            return number(inputs.get("size"), 10) * DISK_GB_MONTH
    return 0


def cost(events: Iterable[Event]) -> tuple[float, float]:
    """What the stack costs in a month before and after, by the list."""
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for event in events:
        metadata = (event.get("resourcePreEvent") or {}).get("metadata")
        if not metadata:
            continue
        urn, type_, op = metadata["urn"], metadata["type"], metadata["op"]
        if old := metadata.get("old"):
            before[urn] = monthly(type_, old.get("inputs") or {})
        if (new := metadata.get("new")) and op not in _ENDED:
            after[urn] = monthly(type_, new.get("inputs") or {})
    return round(sum(before.values()), 2), round(sum(after.values()), 2)
