"""What is refused, as plain functions: a resource's type, its properties and its stack give the violations.

Properties are as the engine has them; what a preview does not know yet is UNKNOWN, judged at the update.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
AGENT_PORT = 10250
GRANTED_HOSTS: frozenset[str] = frozenset()
"""What pods may ask for in `krustlet.dev/allowed-hosts`."""
GRANTED_CAPABILITIES: frozenset[str] = frozenset()
"""What a container may add of Linux's capabilities."""

INSTANCE = "gcp:compute/instance:Instance"
FIREWALL = "gcp:compute/firewall:Firewall"
CLUSTER = "gcp:container/cluster:Cluster"
_DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
_PRODUCTION = re.compile(r"(^|[-_.])prod(uction)?([-_.\d]|$)", re.IGNORECASE)
# A private key, a bootstrap token, and what a kubeconfig or a service account's file calls its secrets.
CREDENTIAL = re.compile(
    r"PRIVATE KEY-----|\b[a-z0-9]{6}\.[a-z0-9]{16}\b|\bya29\.|\beyJ[\w-]+\.eyJ"
    r"|[\"']?(token|password|client-key-data|private_key|secret)[\"']?\s*[:=]\s*[\"']?[\w/][\w+/.=-]{5,}",
    re.IGNORECASE,
)
# Larger than any network of one's own: 10.0.0.0/8 is the largest private one.
_WORLD_BITS = {4: 8, 6: 16}


@dataclass(frozen=True)
class Resource:
    """What is judged. `secrets` are the keys of an instance's metadata whose values the state encrypts."""

    type: str
    props: Mapping[str, Any]
    stack: str
    secrets: Collection[str] = ()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def pods(props: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every pod in a resource, a template's too, however deep: metadata and spec."""
    if isinstance(props, dict):
        spec = _map(props.get("spec"))
        if "containers" in spec:
            yield _map(props.get("metadata")), spec
        for value in props.values():
            yield from pods(value)
    elif isinstance(props, list):
        for value in props:
            yield from pods(value)


def containers(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every container of a pod."""
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        yield from (_map(container) for container in _list(spec.get(kind)))


def _pods(resource: Resource) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    if resource.type.startswith("kubernetes:"):
        yield from pods(dict(resource.props))


def images_by_digest(resource: Resource) -> Iterator[str]:
    """A tag may point elsewhere tomorrow."""
    found = [str(c.get("image", "")) for _, spec in _pods(resource) for c in containers(spec)]
    if resource.type == INSTANCE:
        metadata = _map(resource.props.get("metadata"))
        found += [str(value) for key, value in metadata.items() if key.endswith("-image")]
    for image in found:
        if image != UNKNOWN and not _DIGEST.fullmatch(image):
            yield f"the image {image or '(none)'} is not named by its digest (NAME@sha256:…)"


def _is_world(network: str) -> bool:
    try:
        parsed = ipaddress.ip_network(network, strict=False)
    except ValueError:
        return network != UNKNOWN
    return parsed.prefixlen < _WORLD_BITS[parsed.version]


def _covers(allow: Mapping[str, Any], port: int) -> bool:
    if str(allow.get("protocol", "")).lower() not in ("tcp", "6", "all"):
        return False
    ports = _list(allow.get("ports"))
    for entry in ports:
        first, _, last = str(entry).partition("-")
        if first.isdigit() and int(first) <= port <= int(last or first):
            return True
    return not ports


def no_agent_port_to_the_world(resource: Resource) -> Iterator[str]:
    """The node agent's API is the control plane's alone."""
    props = resource.props
    if resource.type != FIREWALL or props.get("disabled") is True:
        return
    if str(props.get("direction") or "INGRESS").upper() != "INGRESS":
        return
    if not any(_covers(_map(allow), AGENT_PORT) for allow in _list(props.get("allows"))):
        return
    ranges = [str(item) for item in _list(props.get("sourceRanges"))]
    limited = props.get("sourceTags") or props.get("sourceServiceAccounts")
    if props.get("sourceRanges") == UNKNOWN:
        return
    world = [network for network in ranges if _is_world(network)]
    if world or (not ranges and not limited):
        yield f"the agent's port {AGENT_PORT} is open to {', '.join(world) or 'everybody'}"


def no_secret_in_metadata(resource: Resource) -> Iterator[str]:
    """Metadata are shown by every console, and to whoever may read the VM; in the state they are in clear."""
    if resource.type != INSTANCE:
        return
    script = {"metadataStartupScript": resource.props.get("metadataStartupScript")}
    for key, value in (script | _map(resource.props.get("metadata"))).items():
        if key not in resource.secrets and isinstance(value, str) and CREDENTIAL.search(value):
            yield f"the metadata {key} hold what looks like a credential and are no secret"


def deletion_protection_in_production(resource: Resource) -> Iterator[str]:
    """Stacks named prod keep their clusters."""
    if resource.type == CLUSTER and _PRODUCTION.search(resource.stack):
        protected = resource.props.get("deletionProtection")
        if protected is False or str(protected).lower() == "false":
            yield "deletionProtection is off in a stack of production"


def granted_capabilities(resource: Resource) -> Iterator[str]:
    """A pod gets what is granted here, and nothing of its node."""
    for metadata, spec in _pods(resource):
        asked = str(_map(metadata.get("annotations")).get("krustlet.dev/allowed-hosts", ""))
        hosts = {host.strip() for host in asked.split(",") if host.strip() and asked != UNKNOWN}
        if hosts - GRANTED_HOSTS:
            yield f"requests to {', '.join(sorted(hosts - GRANTED_HOSTS))} are not granted"
        for shared in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(shared) is True:
                yield f"{shared} is not granted"
        for volume in _list(spec.get("volumes")):
            if "hostPath" in _map(volume):
                yield f"the volume {_map(volume).get('name')} is a directory of the node's"
        for container in containers(spec):
            context = _map(container.get("securityContext"))
            name = container.get("name")
            added = {str(item) for item in _list(_map(context.get("capabilities")).get("add"))}
            if added - GRANTED_CAPABILITIES:
                yield f"{name}: {', '.join(sorted(added - GRANTED_CAPABILITIES))} are not granted"
            for key in ("privileged", "allowPrivilegeEscalation"):
                if context.get(key) is True:
                    yield f"{name}: {key} is not granted"


def limits_set(resource: Resource) -> Iterator[str]:
    """What may grow without a bound takes its node along. A container that is only prepared never runs."""
    for metadata, spec in _pods(resource):
        if _map(metadata.get("annotations")).get("krustlet.dev/prepare-only") == "true":
            continue
        for container in containers(spec):
            limits = _map(_map(container.get("resources")).get("limits"))
            missing = [what for what in ("cpu", "memory") if not limits.get(what)]
            if missing:
                yield f"{container.get('name')}: no limit of {' and '.join(missing)}"


Rule = Callable[[Resource], Iterator[str]]
RULES: dict[str, Rule] = {
    "images-by-digest": images_by_digest,
    "no-agent-port-to-the-world": no_agent_port_to_the_world,
    "no-secret-in-metadata": no_secret_in_metadata,
    "deletion-protection-in-production": deletion_protection_in_production,
    "granted-capabilities": granted_capabilities,
    "limits-set": limits_set,
}
