"""What the stand-ins replace and what they update in place, against what the official plugins do: every
property of every type in `official_plan.txt`.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localcloud.plugins import values
from localcloud.plugins.gcp.fields import Field, Type, Update
from localcloud.plugins.gcp.provider import GcpProvider
from localcloud.plugins.gcp.served import CLASSES
from localcloud.plugins.gcp.tables import TYPES
from localcloud.plugins.kubernetes.provider import KubernetesProvider
from localcloud.plugins.protocol import ProviderError, Resource
from localcloud.plugins.values import UNKNOWN, Properties, Secret

Plan = dict[tuple[str, ...], bool]
"""Whether a change of the property at a path replaces."""


def parsed(text: str) -> Plan:
    """A paragraph of the file."""
    plan: Plan = {}
    place: list[str] = []
    depths: list[int] = []
    last = ""
    for mark, name, brace in re.findall(r"([+~]?)([\w.*]+)|([{}])", text):
        if brace == "{":
            place += last.split(".")
            depths.append(len(last.split(".")))
        elif brace:
            del place[-depths.pop() :]
        else:
            last = name
            if mark:
                plan[*place, *name.split(".")] = mark == "+"
    return plan


def _read() -> dict[str, Plan]:
    text = Path(__file__).with_name("official_plan.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    paragraphs = [p.strip().partition("\n") for p in "\n".join(lines).split("\n\n") if p.strip()]
    return {head.strip(): parsed(body) for head, _, body in paragraphs}


OFFICIAL = _read()
GOOGLE = {token: plan for token, plan in OFFICIAL.items() if token.startswith("gcp:")}
KUBERNETES = {token: plan for token, plan in OFFICIAL.items() if token.startswith("kubernetes:")}

# Where the plugin looks at the values, whatever its schema says: path, before, after, whether it replaces.
BY_VALUE = [
    ("gcp:compute/instance:Instance", ("metadataStartupScript",), "a", "b", True),
    ("gcp:compute/instance:Instance", ("bootDisk", "initializeParams", "size"), 10, 20, False),
    ("gcp:compute/instance:Instance", ("bootDisk", "initializeParams", "size"), 20, 10, True),
    ("gcp:compute/instance:Instance", ("networkInterfaces", 0, "networkIp"), "10.0.0.2", "10.0.0.3", True),
    ("gcp:compute/disk:Disk", ("size",), 10, 20, False),
    ("gcp:compute/disk:Disk", ("size",), 20, 10, True),
    ("gcp:compute/subnetwork:Subnetwork", ("ipCidrRange",), "10.0.0.0/20", "10.0.0.0/16", False),
    ("gcp:compute/subnetwork:Subnetwork", ("ipCidrRange",), "10.0.0.0/16", "10.0.0.0/20", True),
    ("gcp:compute/subnetwork:Subnetwork", ("ipCidrRange",), "10.0.0.0/16", "10.4.0.0/16", True),
    ("gcp:compute/subnetwork:Subnetwork", ("ipCidrRange",), "10.0.0.0/16", "fd00::/48", True),
]
_DECIDED_BY_VALUE = {
    (token, tuple(p for p in path if not isinstance(p, int))) for token, path, *_ in BY_VALUE
}


def upstream(name: str, among: Plan, place: tuple[str, ...]) -> str:
    """Upstream's name of a property: snake case, and the singular where it is a block of a list."""
    snake = re.sub(r"(?<=[a-z0-9])([A-Z])", lambda found: f"_{found[1].lower()}", name)
    singular = re.sub(r"ies$", "y", snake) if snake.endswith("ies") else snake.removesuffix("s")
    known = {path[len(place)] for path in among if path[: len(place)] == place and len(path) > len(place)}
    return next((n for n in (snake, singular, snake.removesuffix("es")) if n in known), snake)


def served(
    fields: tuple[Field, ...], plan: Plan, ours: values.Path = (), theirs: tuple[str, ...] = ()
) -> Iterator[tuple[Field, values.Path, tuple[str, ...]]]:
    """Every input of a table with its path here and upstream."""
    for declared in fields:
        if declared.output:
            continue
        path, name = (*ours, declared.name), upstream(declared.name, plan, theirs)
        yield declared, path, (*theirs, name)
        inner: values.Path = (*path, 0) if declared.type is Type.OBJECTS else path
        yield from served(declared.fields, plan, inner, (*theirs, name))


CASES = [
    (token, declared, path, theirs)
    for token, spec in TYPES.items()
    for declared, path, theirs in served(spec.fields, GOOGLE[token])
]


def sample(declared: Field, other: bool) -> Any:  # noqa: PLR0911 - one a type
    """A value of a property, or another one."""
    if declared.enum:
        return declared.enum[-1] if other else declared.enum[0]
    match declared.type:
        case Type.STRING:
            return "b" if other else "a"
        case Type.INT | Type.INT64:
            return 20 if other else 10
        case Type.BOOL:
            return other
        case Type.MAP:
            return {"k": "b" if other else "a"}
        case Type.STRINGS:
            return ["b" if other else "a"]
        case Type.OBJECT:
            return {f.name: sample(f, other) for f in declared.fields if not f.output}
        case Type.OBJECTS:
            return [{f.name: sample(f, other) for f in declared.fields if not f.output}]


def nested(path: values.Path, value: Any) -> Any:
    """A tree with one value in it."""
    for part in reversed(path):
        value = [value] if isinstance(part, int) else {part: value}
    return value


@functools.cache
def provider() -> GcpProvider:
    made = GcpProvider()
    made.configure({"project": "p", "region": "r", "zone": "z"})
    return made


def replaced(token: str, before: Properties, after: Properties) -> set[values.Path]:
    resource = Resource(f"urn:pulumi:dev::p::{token}::it", "id")
    diff = provider().diff(resource, {}, before, after)
    assert diff.changes, (before, after)
    return set(diff.replace)


def test_every_type_that_is_served_is_an_official_one() -> None:
    assert set(CLASSES) == set(TYPES)
    assert set(TYPES) <= set(GOOGLE)


@pytest.mark.parametrize(
    ("token", "declared", "path", "theirs"),
    CASES,
    ids=[f"{token.rsplit(':', 1)[-1]}.{values.path_text(path)}" for token, _, path, _ in CASES],
)
def test_a_property_replaces_where_it_does_with_the_official_plugin(
    token: str, declared: Field, path: values.Path, theirs: tuple[str, ...]
) -> None:
    assert theirs in GOOGLE[token], f"the official plugin has no {theirs}"
    if (token, tuple(p for p in path if not isinstance(p, int))) in _DECIDED_BY_VALUE:
        return
    wanted = GOOGLE[token][theirs]
    if declared.fields:  # a block, whose own decision is what its coming and going needs
        before, after = {}, nested(path, sample(declared, True))
        if path != (declared.name,):
            before = nested(path[:-1], {"": ""})
            after = nested(path[:-1], {"": "", declared.name: sample(declared, True)})
        assert bool(replaced(token, before, after)) == wanted
        assert bool(replaced(token, after, before)) == wanted
        return
    for after in (sample(declared, True), UNKNOWN, Secret(sample(declared, True))):
        before = nested(path, sample(declared, False))
        assert bool(replaced(token, before, nested(path, after))) == wanted, after


@pytest.mark.parametrize(("token", "path", "before", "after", "replaces"), BY_VALUE)
def test_a_property_of_which_the_plugin_looks_at_the_values(
    token: str, path: values.Path, before: Any, after: Any, replaces: bool
) -> None:
    assert bool(replaced(token, nested(path, before), nested(path, after))) == replaces


def test_the_switch_of_the_startup_script_to_the_metadata_leaves_the_vm() -> None:
    apart, inside = {"metadataStartupScript": "s"}, {"metadata": {"startup-script": "s"}}
    token = "gcp:compute/instance:Instance"
    assert not replaced(token, apart, inside)
    assert not replaced(token, inside, apart)
    assert replaced(token, apart, {"metadata": {"startup-script": "t"}})


@pytest.mark.parametrize("token", GOOGLE)
def test_what_is_not_served_is_refused_by_name(token: str) -> None:
    resource = Resource(f"urn:pulumi:dev::p::{token}::it")
    if token not in TYPES:
        with pytest.raises(ProviderError, match=f"{token} is not served"):
            provider().check(resource, {}, {}, b"1")
        return
    here = {theirs: (ours, declared) for declared, ours, theirs in served(TYPES[token].fields, GOOGLE[token])}
    for path in GOOGLE[token]:
        block = path[:-1]
        if path in here or (block and block not in here):
            continue  # served, or below what is refused
        ours: values.Path = ()
        if block:
            ours, declared = here[block]
            ours = (*ours, 0) if declared.type is Type.OBJECTS else ours
        ours = (*ours, re.sub(r"_([a-z0-9])", lambda found: found[1].upper(), path[-1]))
        failures = provider().check(resource, {}, nested(ours, "x"), b"1").failures
        assert [f for f in failures if f.path == ours and "not served" in f.reason], ours


def test_nothing_that_replaces_is_declared_within_what_google_changes_in_place_unseen() -> None:
    """A PATCH sends a block as a whole; a property in it that replaces never reaches it."""
    for token, declared, path, _ in CASES:
        if declared.update is Update.PATCH and declared.fields:
            assert all(f.update is Update.PATCH for f in declared.fields if not f.output), (token, path)


# Kinds that have no paragraph of their own, and a field of each beside what every object has.
ANY_OTHER = {
    "core/v1:Namespace": "spec.finalizers",
    "core/v1:ServiceAccount": "automountServiceAccountToken",
    "apps/v1:ReplicaSet": "spec.replicas",
    "policy/v1:PodDisruptionBudget": "spec.minAvailable",
    "autoscaling/v2:HorizontalPodAutoscaler": "spec.maxReplicas",
    "networking.k8s.io/v1:NetworkPolicy": "spec.podSelector",
    "networking.k8s.io/v1:Ingress": "spec.ingressClassName",
    "rbac.authorization.k8s.io/v1:ClusterRole": "rules",
    "apiextensions.k8s.io/v1:CustomResourceDefinition": "spec.versions",
    "gateway.networking.k8s.io/v1:HTTPRoute": "spec.rules",
}
KUBERNETES_CASES = [
    (token.removeprefix("kubernetes:"), ".".join(path))
    for token, plan in KUBERNETES.items()
    if token != "kubernetes:*"
    for path in plan
] + [(token, ".".join(path)) for token in ANY_OTHER for path in KUBERNETES["kubernetes:*"]]
IN_PLACE = [
    *ANY_OTHER.items(),
    *((token.removeprefix("kubernetes:"), "metadata.labels") for token in KUBERNETES if "*" not in token),
    *(
        (token.removeprefix("kubernetes:"), "metadata.annotations")
        for token in KUBERNETES
        if "*" not in token
    ),
    ("core/v1:Pod", "spec.tolerations"),
    ("core/v1:Pod", "spec.activeDeadlineSeconds"),
    ("core/v1:Pod", "spec.containers.*.name"),
    ("apps/v1:Deployment", "spec.template.spec.containers.*.image"),
    ("apps/v1:Deployment", "spec.replicas"),
    ("apps/v1:DaemonSet", "spec.template"),
    ("core/v1:Service", "spec.ports.*.port"),
    ("core/v1:Service", "spec.type"),
    ("batch/v1:Job", "spec.suspend"),
    ("rbac.authorization.k8s.io/v1:ClusterRoleBinding", "subjects"),
    ("core/v1:ConfigMap", "immutable"),
    ("core/v1:Secret", "immutable"),
]


def replaces(token: str, path: str, **settings: Any) -> bool:
    """Whether a change of one property of an object does."""
    made = KubernetesProvider()
    made.configure(settings)
    parts: values.Path = tuple(0 if part == "*" else part for part in path.split("."))
    diff = made.diff(
        Resource(f"urn:pulumi:dev::p::kubernetes:{token}::it", "n/it"),
        {},
        nested(parts, "a"),
        nested(parts, "b"),
    )
    assert diff.changes == {parts: values.Change.UPDATE}
    return bool(diff.replace)


@pytest.mark.parametrize(("token", "path"), KUBERNETES_CASES)
def test_a_field_of_an_object_that_replaces_it(token: str, path: str) -> None:
    assert replaces(token, path)


@pytest.mark.parametrize(("token", "path"), IN_PLACE)
def test_a_field_of_an_object_that_is_changed_in_place(token: str, path: str) -> None:
    assert not replaces(token, path)


def test_annotations_that_are_not_known_yet_are_a_change_in_place() -> None:
    made = KubernetesProvider()
    made.configure({})
    resource = Resource("urn:pulumi:dev::p::kubernetes:core/v1:Pod::it", "n/it")
    old, new = ({"metadata": {"name": "it", "annotations": v}} for v in ({"k": "v"}, UNKNOWN))
    diff = made.diff(resource, {}, old, new)
    assert set(diff.changes) == {("metadata", "annotations")}
    assert not diff.replace


@pytest.mark.parametrize("kind", ["ConfigMap", "Secret"])
def test_data_is_changed_in_place_where_the_provider_says_that_it_can_be(kind: str) -> None:
    assert not replaces(f"core/v1:{kind}", "data", **{f"enable{kind}Mutable": True})
