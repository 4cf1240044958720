"""When an object counts as up, as the official plugin sees it, and what to say while it does not.

Plain functions on live objects: no network here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from localcloud.plugins.kubernetes.cluster import Kind, Object

_EVENTS_SHOWN = 5
_PODS_SHOWN = 5
_NODES_SHOWN = 5
_PRESSURES = ("MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable")
_SIGN_OF_LIFE_SECONDS = 10


@dataclass(frozen=True)
class Verdict:
    """`ready`, or not yet with the reasons; `hopeless` if waiting on cannot help."""

    ready: bool
    reasons: tuple[str, ...] = ()
    hopeless: bool = False


def verdict(kind: Kind, live: Object) -> Verdict:
    """Whether the object is up. Types without a rule are up once they exist."""
    rule = _RULES.get(kind)
    return rule(live) if rule else Verdict(True)


def default_timeout_seconds(kind: Kind) -> float:
    """How long the official plugin waits without customTimeouts."""
    return 300 if kind == Kind("v1", "Namespace") else 600


def _pod(pod: Object) -> Verdict:
    status = pod.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    if status.get("phase") == "Succeeded":
        return Verdict(True)
    if all(
        conditions.get(name, {}).get("status") == "True" for name in ("PodScheduled", "Initialized", "Ready")
    ):
        return Verdict(True)
    reasons = _container_reasons(status)
    for name in ("PodScheduled", "Initialized", "Ready"):
        condition = conditions.get(name, {})
        if condition.get("status") != "True":
            said = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
            reasons.append(f"{name} is not true" + (f" ({said})" if said else ""))
            break
    failed = status.get("phase") == "Failed"
    if failed:
        said = ": ".join(filter(None, (status.get("reason"), status.get("message"))))
        reasons.insert(0, "the pod failed" + (f" ({said})" if said else ""))
        metadata = pod["metadata"]
        reasons.append(
            f"it stays so until `kubectl delete pod {metadata['name']} --namespace {metadata['namespace']}` "
            "and `pulumi up --refresh`"
        )
    return Verdict(False, tuple(reasons), hopeless=failed)


def _container_reasons(status: Object) -> list[str]:
    reasons = []
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        state, name = container.get("state") or {}, container.get("name")
        waiting, ended = state.get("waiting"), state.get("terminated")
        last = (container.get("lastState") or {}).get("terminated")
        if waiting and waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            reasons.append(f"container {name}: [{waiting['reason']}] {waiting.get('message') or ''}".rstrip())
        if ended and ended.get("exitCode"):
            reasons.append(f"container {name}: {_ended(ended)}")
        if last and not container.get("ready"):
            reasons.append(f"container {name} before that: {_ended(last)}")
    return reasons


def _ended(terminated: Object) -> str:
    said = f": {terminated['message']}" if terminated.get("message") else ""
    return f"[{terminated.get('reason') or 'Error'}] exit code {terminated.get('exitCode')}{said}"


def _namespace(namespace: Object) -> Verdict:
    phase = (namespace.get("status") or {}).get("phase")
    return Verdict(phase == "Active", (f"the phase is {phase}",))


def _rollout(wanted: Callable[[Object], int], counts: tuple[str, ...]) -> Callable[[Object], Verdict]:
    """A controller that must have seen this generation and reached its number of pods in every count."""

    def rule(live: Object) -> Verdict:
        status: dict[str, Any] = live.get("status") or {}
        if status.get("observedGeneration", 0) < live["metadata"].get("generation", 0):
            return Verdict(False, ("its controller has not seen this generation yet",))
        goal = wanted(live)
        short = [
            f"{name} is {status.get(name, 0)} of {goal}" for name in counts if status.get(name, 0) < goal
        ]
        bad = [
            f"{c['type']} is {c['status']}: {c.get('message', '')}"
            for c in status.get("conditions") or []
            if c["status"] != "True" and c["type"] in ("Available", "Progressing")
        ]
        return Verdict(not short, tuple(short + bad))

    return rule


def _job(job: Object) -> Verdict:
    conditions = {
        c["type"]: c for c in (job.get("status") or {}).get("conditions") or [] if c["status"] == "True"
    }
    if "Complete" in conditions:
        return Verdict(True)
    failed = conditions.get("Failed")
    if failed:
        return Verdict(
            False, (f"the job failed ({failed.get('reason')}: {failed.get('message')})",), hopeless=True
        )
    return Verdict(False, ("the job is not complete",))


def _replicas(live: Object) -> int:
    return int(live["spec"].get("replicas", 1))


_RULES: dict[Kind, Callable[[Object], Verdict]] = {
    Kind("v1", "Pod"): _pod,
    Kind("v1", "Namespace"): _namespace,
    Kind("apps/v1", "Deployment"): _rollout(_replicas, ("updatedReplicas", "availableReplicas")),
    Kind("apps/v1", "StatefulSet"): _rollout(_replicas, ("updatedReplicas", "readyReplicas")),
    Kind("apps/v1", "DaemonSet"): _rollout(
        lambda live: int((live.get("status") or {}).get("desiredNumberScheduled", 0)),
        ("updatedNumberScheduled", "numberAvailable"),
    ),
    Kind("batch/v1", "Job"): _job,
}


def selector(live: Object) -> str:
    """The label selector of the pods that an object makes; empty where it makes none."""
    spec = live.get("spec") or {}
    labels = (spec.get("selector") or {}).get("matchLabels") if "template" in spec else None
    return ",".join(f"{key}={value}" for key, value in (labels or {}).items())


def pod_reasons(pods: list[Object]) -> tuple[str, ...]:
    """Why the pods of an object are not up, as they say it."""
    seen = [(pod["metadata"]["name"], _pod(pod)) for pod in pods]
    lines = [f"pod {name}: {reason}" for name, found in seen if not found.ready for reason in found.reasons]
    return tuple(lines[:_PODS_SHOWN])


def is_unschedulable(pod: Object) -> bool:
    """Whether the scheduler has found no node for a pod."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(
        (c["type"], c["status"], c.get("reason")) == ("PodScheduled", "False", "Unschedulable")
        for c in conditions
    )


def node_reasons(pods: list[Object], nodes: list[Object]) -> tuple[str, ...]:
    """What keeps pods off the nodes that they select: the scheduler counts taints and names none."""
    wanted = [pod["spec"] for pod in pods if is_unschedulable(pod)]
    lines = []
    for node in nodes:
        keys = {
            taint["key"]
            for spec in wanted
            if (spec.get("nodeSelector") or {}).items() <= (node["metadata"].get("labels") or {}).items()
            for taint in node["spec"].get("taints") or []
            if taint["effect"] != "PreferNoSchedule"
            and not any(_tolerates(toleration, taint) for toleration in spec.get("tolerations") or [])
        }
        if keys:
            said = "".join(f"; {line}" for line in _node_conditions(node))
            lines.append(f"node {node['metadata']['name']} has the taint {', '.join(sorted(keys))}{said}")
    return tuple(lines[:_NODES_SHOWN])


def _tolerates(toleration: Object, taint: Object) -> bool:
    """As Kubernetes' documentation, "Taints and Tolerations", has it."""
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")


def _node_conditions(node: Object) -> list[str]:
    """The conditions that taint a node, as it tells them."""
    conditions = (node.get("status") or {}).get("conditions") or []
    bad = {"Ready": ("False", "Unknown"), **dict.fromkeys(_PRESSURES, ("True",))}
    return [
        f"{c['type']} is {c['status']}: {c.get('message', '')}"
        for c in conditions
        if c["status"] in bad.get(c["type"], ())
    ]


class Waiting:
    """What to say while an object is waited for, and when: at once what is new, and now and then that it is
    still so. `label` names the object, times are in seconds since it began.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._text, self._at = "", 0.0
        self._warned: set[str] = set()

    def status(self, reasons: tuple[str, ...], events: list[Object], seconds: float) -> str | None:
        """The line for now; None where it would only repeat the last one."""
        last = event_lines(events)[-1:]
        text = "; ".join((*reasons, *(f"last event: {line}" for line in last)))
        if text == self._text and seconds - self._at < _SIGN_OF_LIFE_SECONDS:
            return None
        self._text, self._at = text, seconds
        return f"waiting for {self._label}, for {seconds:.0f} s now: {text}"

    def warnings(self, events: list[Object]) -> list[str]:
        """Warnings that were not given yet; unlike a status, they stay on the screen."""
        lines = event_lines([event for event in events if event.get("type") == "Warning"])
        new = [line for line in lines if line not in self._warned]
        self._warned |= set(new)
        return new


def event_lines(events: list[Object]) -> list[str]:
    """The last events, a line each, for an error; what was said again is said once."""
    lines = [
        f"{e.get('type', 'Normal')} {e.get('reason', '')}: {str(e.get('message', '')).strip()}"
        for e in events
    ]
    return list(dict.fromkeys(lines))[-_EVENTS_SHOWN:]
