"""Ranges of addresses in a network: what they must look like, which are free, and who uses one.

Subnetworks have a primary range and named secondary ones; clusters take theirs from the secondary ones, or
get some that no subnetwork names. All ranges of a network are disjoint.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from ipaddress import IPv4Network

from localcloud.api.compute.common import NAME
from localcloud.api.errors import ApiError, in_use, invalid_value
from localcloud.api.service import fingerprint
from localcloud.store import Json, Record, Store

SUBNETWORK = "compute.subnetworks"
_PROHIBITED = tuple(
    map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"))
)
"""https://cloud.google.com/vpc/docs/subnets#prohibited-ipv4-subnet-ranges"""

CHANGING = "aliasIpRanges"
"""Of an instance's record: the alias ranges that it is about to get."""

_LONGEST_PREFIX = 29
_PRIVATE = IPv4Network("10.0.0.0/8")
_FIRST_CHOICE = IPv4Network("10.8.0.0/14")
"""Where Google's own choice starts: the ranges of most examples are below it."""


def parse(text: str, field: str) -> IPv4Network:
    """
    Raises:
        ApiError: 400, it is no range.
    """
    try:
        return IPv4Network(text)
    except ValueError as error:
        raise invalid_value(
            field, text, "Must be a CIDR address range that is valid and has no host bits set."
        ) from error


def secondary(body: Json) -> dict[str, str]:
    """A subnetwork's secondary ranges: CIDR by name."""
    return {item["rangeName"]: item["ipCidrRange"] for item in body.get("secondaryIpRanges", [])}


def expands(old: IPv4Network, new: IPv4Network) -> bool:
    """Whether a range has all addresses of another one, and more."""
    return old != new and old.subnet_of(new)


def check(store: Store, record: Record) -> None:
    """Check the ranges of a subnetwork, by themselves and against all others of its network.

    Raises:
        ApiError: 400, one is malformed, or overlaps another.
    """
    own = [parse(record.body.get("ipCidrRange", ""), "resource.ipCidrRange")]
    if own[0].prefixlen > _LONGEST_PREFIX:
        raise invalid_value(
            "resource.ipCidrRange", own[0], "Invalid IP CIDR range. The mask must be /29 or less."
        )
    names: set[str] = set()
    _check_permitted(own[0], "resource.ipCidrRange")
    for index, item in enumerate(record.body.get("secondaryIpRanges", [])):
        field = f"resource.secondaryIpRanges[{index}]"
        if not item.get("rangeName"):
            raise ApiError(400, f"Required field '{field}.rangeName' not specified", reason="required")
        if not re.fullmatch(NAME, item["rangeName"]):
            raise invalid_value(f"{field}.rangeName", item["rangeName"], f"Must be a match of regex '{NAME}'")
        if item["rangeName"] in names:
            raise invalid_value(f"{field}.rangeName", item["rangeName"], "The name must be unique.")
        names.add(item["rangeName"])
        cidr = parse(item.get("ipCidrRange", ""), f"{field}.ipCidrRange")
        _check_permitted(cidr, f"{field}.ipCidrRange")
        if any(cidr.overlaps(other) for other in own):
            raise _conflict(cidr, record)
        own.append(cidr)
    for other, owner in _taken(store, record.body["network"], record.key):
        for cidr in own:
            if cidr.overlaps(other):
                raise _conflict(cidr, owner)


def _check_permitted(cidr: IPv4Network, field: str) -> None:
    for prohibited in _PROHIBITED:
        if cidr.overlaps(prohibited):
            raise invalid_value(field, cidr, f"It overlaps with the prohibited range {prohibited}.")


def check_change(store: Store, record: Record, before: Json) -> None:
    """
    Raises:
        ApiError: 400, a secondary range that somebody uses was removed, renamed or moved; or as `check`.
    """
    after = secondary(record.body) if _is_well_formed(record.body) else {}
    for name, cidr in secondary(before).items():
        if after.get(name) != cidr:
            for user in _users(store, record, name):
                raise in_use(record.key, user)
    check(store, record)


def _is_well_formed(body: Json) -> bool:
    return all(
        item.get("rangeName") and item.get("ipCidrRange") for item in body.get("secondaryIpRanges", [])
    )


def choose(store: Store, network: str, wanted: str, prefix: int, others: list[IPv4Network]) -> str:
    """A range for a cluster in a network (its link), beside `others`: the one that is wanted, or the first
    free one; `wanted` may be a mask alone (`/20`).

    Raises:
        ApiError: 400, it is malformed or not free.
    """
    taken = [*others, *(cidr for cidr, _ in _taken(store, network, ""))]
    if wanted and not re.fullmatch(r"/\d{1,2}", wanted):
        cidr = parse(wanted, "cluster.ip_allocation_policy")
        if any(cidr.overlaps(other) for other in taken):
            raise ApiError(400, f'The range "{wanted}" conflicts with an existing range of the network.')
        return wanted
    prefix = int(wanted[1:]) if wanted else prefix
    if not _PRIVATE.prefixlen < prefix <= _LONGEST_PREFIX:
        raise invalid_value("cluster.ip_allocation_policy", wanted, "Must be a mask between /9 and /29.")
    for cidr in _PRIVATE.subnets(new_prefix=prefix):
        is_early = cidr.broadcast_address < _FIRST_CHOICE.network_address
        if not is_early and not any(cidr.overlaps(other) for other in taken):
            return str(cidr)
    raise ApiError(400, f"The network has no free range of the size /{prefix}.")


def aliases(interface: Json) -> list[Json]:
    """An interface's alias ranges."""
    found: list[Json] = interface.get("aliasIpRanges", [])
    return found


def give(interface: Json, wanted: list[Json]) -> None:
    """Put alias ranges that were allocated on an interface, which gets another fingerprint."""
    interface.pop("aliasIpRanges", None)
    if wanted:
        interface["aliasIpRanges"] = wanted
    interface.pop("fingerprint", None)
    interface["fingerprint"] = fingerprint(interface)


def allocate_aliases(
    store: Store, subnetwork: Record, wanted: list[Json], field: str, but: str = ""
) -> list[Json]:
    """Alias ranges of a subnetwork as an instance asks for them in `field`, each with its range: the one that
    it names, or for a mask (`/24`) a free one. What the instance `but` has is free; what one of another
    network has is not, because all networks are on one machine here.

    Raises:
        ApiError: 400, a range is malformed, outside of the subnetwork's range, or another instance's.
    """
    taken = [
        IPv4Network(alias["ipCidrRange"])
        for instance in store.list("compute.instances")
        if instance.key != but
        for alias in _held(instance)
    ]
    allocated: list[Json] = []
    for index, alias in enumerate(wanted):
        where = f"{field}[{index}]"
        name, text = alias.get("subnetworkRangeName", ""), alias.get("ipCidrRange", "")
        within = secondary(subnetwork.body).get(name) if name else subnetwork.body["ipCidrRange"]
        if within is None:
            raise invalid_value(f"{where}.subnetworkRangeName", name, "The subnetwork has no such range.")
        reserved = [] if name else _reserved(IPv4Network(within))
        chosen = _alias(IPv4Network(within), text, [*taken, *reserved], f"{where}.ipCidrRange")
        allocated.append({**alias, "ipCidrRange": str(chosen)})
        taken.append(chosen)
    return allocated


def _held(instance: Record) -> list[Json]:
    """An instance's alias ranges, with those that it is about to get."""
    changing: list[Json] = instance.private.get(CHANGING, [])
    return [*aliases(instance.body["networkInterfaces"][0]), *changing]


def _reserved(primary: IPv4Network) -> list[IPv4Network]:
    """The four addresses of a primary range that are nobody's.

    https://cloud.google.com/vpc/docs/subnets#unusable-ip-addresses-in-every-subnet
    """
    return [IPv4Network(primary[index]) for index in (0, 1, -2, -1)]


def _alias(within: IPv4Network, wanted: str, taken: list[IPv4Network], field: str) -> IPv4Network:
    if not re.fullmatch(r"/\d{1,2}", wanted):
        chosen = parse(wanted, field)
        if not chosen.subnet_of(within):
            raise invalid_value(field, wanted, f"It is outside of the subnetwork's range {within}.")
        if any(chosen.overlaps(other) for other in taken):
            raise ApiError(
                400, f"IP CIDR range '{chosen}' is already being used.", reason="ipInUseByAnotherResource"
            )
        return chosen
    prefix = int(wanted[1:])
    if not within.prefixlen <= prefix <= within.max_prefixlen:
        raise invalid_value(field, wanted, f"The mask does not fit into the subnetwork's range {within}.")
    for cidr in within.subnets(new_prefix=prefix):
        if not any(cidr.overlaps(other) for other in taken):
            return cidr
    raise ApiError(400, f"IP space of '{within}' is exhausted.", reason="ipSpaceExhausted")


def _conflict(cidr: IPv4Network, owner: Record) -> ApiError:
    parts = owner.key.split("/")
    what = (
        f"subnetwork '{owner.name}' in region" if owner.kind == SUBNETWORK else f"cluster '{owner.name}' in"
    )
    return ApiError(
        400, f"Invalid IPCidrRange: {cidr} conflicts with existing {what} '{parts[3]}'.", reason="invalid"
    )


def _taken(store: Store, network: str, but: str) -> Iterator[tuple[IPv4Network, Record]]:
    """The ranges in a network with who has them, but for those of one subnetwork."""
    for record in store.list(SUBNETWORK):
        if record.body["network"] == network and record.key != but:
            yield ipaddress.IPv4Network(record.body["ipCidrRange"]), record
            for text in secondary(record.body).values():
                yield IPv4Network(text), record
    for record in store.list("container.clusters"):
        if network.endswith(f"/{record.body['networkConfig']['network']}"):
            policy = record.body["ipAllocationPolicy"]
            for name, field in (("cluster", "clusterIpv4Cidr"), ("services", "servicesIpv4Cidr")):
                if not policy.get(f"{name}SecondaryRangeName"):
                    yield IPv4Network(record.body[field]), record


def _users(store: Store, subnetwork: Record, name: str) -> Iterator[str]:
    """The keys of what uses a secondary range."""
    for cluster in store.list("container.clusters"):
        if cluster.body["networkConfig"]["subnetwork"] == subnetwork.key and name in _ranges_of(cluster.body):
            yield cluster.key
    for instance in store.list("compute.instances"):
        own = instance.body["networkInterfaces"][0]["subnetwork"] == subnetwork.body["selfLink"]
        if own and name in {alias.get("subnetworkRangeName") for alias in _held(instance)}:
            yield instance.key


def _ranges_of(cluster: Json) -> set[str]:
    """The names of the secondary ranges that a cluster and its node pools use."""
    policy = cluster["ipAllocationPolicy"]
    names = {policy.get("clusterSecondaryRangeName"), policy.get("servicesSecondaryRangeName")}
    names |= set(policy.get("additionalPodRangesConfig", {}).get("podRangeNames", []))
    names |= {pool.get("networkConfig", {}).get("podRange") for pool in cluster["nodePools"]}
    return {name for name in names if name}
