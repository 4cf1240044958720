"""Networks, subnetworks, firewalls and addresses: records, with Google's rules about each other."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from localcloud.api.compute import ranges
from localcloud.api.compute.catalog import ZONES
from localcloud.api.compute.common import begin, key_of, link, new_body, require, resolve
from localcloud.api.compute.resources import Collection, refingerprint, serve
from localcloud.api.errors import ApiError, invalid_value
from localcloud.api.service import TABLE, Call, fingerprint
from localcloud.store import Json, Record, Store

NETWORK, SUBNETWORK = "compute.networks", ranges.SUBNETWORK
FIREWALL, ADDRESS, ROUTER = "compute.firewalls", "compute.addresses", "compute.routers"
_AUTO_RANGES = ipaddress.ip_network("10.128.0.0/9").subnets(new_prefix=20)
_AUTO = dict(zip(ZONES, (str(next(_AUTO_RANGES)) for _ in ZONES), strict=True))
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_PROTOCOLS = {"tcp", "udp", "icmp", "esp", "ah", "sctp", "ipip", "all"}


def find_network(call: Call, reference: str) -> Record:
    """
    Raises:
        ApiError: 404, no such network.
    """
    return require(call.store, resolve(call, reference, f"projects/{call.project}/global/networks"))


def find_subnetwork(call: Call, reference: str, region: str) -> Record:
    """
    Raises:
        ApiError: 404, no such subnetwork; 400, it is in another region.
    """
    within = f"projects/{call.project}/regions/{region}/subnetworks"
    key = resolve(call, reference, within)
    if not key.startswith(f"{within}/"):
        raise invalid_value(
            "resource.networkInterfaces[0].subnetwork",
            reference,
            f"The subnetwork must be in the region '{region}'.",
        )
    return require(call.store, key)


def subnetwork_of(store: Store, network: Record, region: str) -> Record | None:
    """A network's first subnetwork in a region."""
    project = network.key.split("/")[1]
    for record in store.list(SUBNETWORK, f"projects/{project}/regions/{region}/"):
        if record.body["network"] == network.body["selfLink"]:
            return record
    return None


def _prepare_network(call: Call, record: Record) -> None:
    body = record.body
    if "IPv4Range" in body:
        raise invalid_value("resource.IPv4Range", body["IPv4Range"], "Legacy networks cannot be created.")
    body.setdefault("autoCreateSubnetworks", False)
    body.setdefault("routingConfig", {}).setdefault("routingMode", "REGIONAL")
    body.setdefault("mtu", 1460)
    body.setdefault("networkFirewallPolicyEnforcementOrder", "AFTER_CLASSIC_FIREWALL")
    body["selfLinkWithId"] = link(record.key.rpartition("/")[0] + f"/{body['id']}")
    if body["autoCreateSubnetworks"]:
        add_auto_subnetworks(call.store, record)


def add_auto_subnetworks(store: Store, network: Record) -> None:
    """Give an auto mode network its subnetwork in every region."""
    project = network.key.split("/")[1]
    for region, cidr in _AUTO.items():
        key = f"projects/{project}/regions/{region}/subnetworks/{network.name}"
        body = new_body(key, "compute#subnetwork") | {
            "network": network.body["selfLink"],
            "ipCidrRange": cidr,
        }
        _fill_subnetwork(body)
        store.put(Record(key, SUBNETWORK, body, {"auto": True} | network.private))


def _view_network(store: Store, record: Record) -> Json:
    project = record.key.split("/")[1]
    links = [
        subnetwork.body["selfLink"]
        for subnetwork in store.list(SUBNETWORK, f"projects/{project}/")
        if subnetwork.body["network"] == record.body["selfLink"]
    ]
    return record.body | ({"subnetworks": links} if links else {})


def _network_users(store: Store, record: Record) -> Iterator[str]:
    project, own = record.key.split("/")[1], record.body["selfLink"]
    yield from _interfaces(store, project, "network", own)
    for firewall in store.list(FIREWALL, f"projects/{project}/"):
        if firewall.body["network"] == own:
            yield firewall.key
    for router in store.list(ROUTER, f"projects/{project}/"):
        if router.body["network"] == own:
            yield router.key
    for subnetwork in store.list(SUBNETWORK, f"projects/{project}/"):
        if subnetwork.body["network"] == own and not subnetwork.private.get("auto"):
            yield subnetwork.key
    yield from _clusters(store, project, "network", record)


def _forget_network(store: Store, record: Record) -> None:
    for subnetwork in store.list(SUBNETWORK, f"projects/{record.key.split('/')[1]}/"):
        if subnetwork.body["network"] == record.body["selfLink"]:
            store.delete(subnetwork.key)


def _interfaces(store: Store, project: str, field: str, value: str) -> Iterator[str]:
    for instance in store.list("compute.instances", f"projects/{project}/"):
        if any(interface.get(field) == value for interface in instance.body["networkInterfaces"]):
            yield instance.key


def _clusters(store: Store, project: str, field: str, record: Record) -> Iterator[str]:
    for cluster in store.list("container.clusters", f"projects/{project}/"):
        if cluster.body["networkConfig"].get(field) == record.key:
            yield cluster.key


def _prepare_subnetwork(call: Call, record: Record) -> None:
    body = record.body
    if "network" not in body:
        raise invalid_value("resource.network", "", "The network must be specified.")
    network = find_network(call, body["network"])
    body["network"] = network.body["selfLink"]
    ranges.check(call.store, record)
    _fill_subnetwork(body)


def _fill_subnetwork(body: Json) -> None:
    cidr = ipaddress.ip_network(body["ipCidrRange"])
    body["gatewayAddress"] = str(cidr.network_address + 1)
    defaults = {
        "privateIpGoogleAccess": False,
        "privateIpv6GoogleAccess": "DISABLE_GOOGLE_ACCESS",
        "purpose": "PRIVATE",
        "stackType": "IPV4_ONLY",
        "allowSubnetCidrRoutesOverlap": False,
    }
    body |= {key: value for key, value in defaults.items() if key not in body}
    body["fingerprint"] = fingerprint(body)


def _change_subnetwork(call: Call, record: Record, before: Json) -> None:
    if "secondaryIpRanges" in call.body:
        if "fingerprint" not in call.body:
            raise ApiError(412, "Supplied fingerprint does not match current subnetwork fingerprint.")
        ranges.check_change(call.store, record, before)


def _subnetwork_users(store: Store, record: Record) -> Iterator[str]:
    project = record.key.split("/")[1]
    yield from _interfaces(store, project, "subnetwork", record.body["selfLink"])
    for address in store.list(ADDRESS, f"projects/{project}/"):
        if address.body.get("subnetwork") == record.body["selfLink"]:
            yield address.key
    for router in store.list(ROUTER, f"projects/{project}/"):
        listed = [s["name"] for nat in router.body.get("nats", []) for s in nat.get("subnetworks", [])]
        if record.body["selfLink"] in listed:
            yield router.key
    yield from _clusters(store, project, "subnetwork", record)


def _any_range(text: str, field: str) -> None:
    """A range of IPv4 or IPv6, or one address."""
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise invalid_value(
            field, text, "Must be a CIDR address range that is valid and has no host bits set."
        ) from error


def _prepare_firewall(call: Call, record: Record) -> None:
    body = record.body
    body["network"] = find_network(call, body.get("network", "global/networks/default")).body["selfLink"]
    body.setdefault("direction", "INGRESS")
    body.setdefault("priority", 1000)
    body.setdefault("disabled", False)
    body.setdefault("logConfig", {"enable": False})
    sources = ("sourceRanges", "sourceTags", "sourceServiceAccounts")
    if body["direction"] == "INGRESS" and not any(body.get(field) for field in sources):
        body["sourceRanges"] = ["0.0.0.0/0"]
    if body["direction"] == "EGRESS":
        body.setdefault("destinationRanges", ["0.0.0.0/0"])


def _check_firewall(body: Json) -> None:
    rules = [(field, rule) for field in ("allowed", "denied") for rule in body.get(field, [])]
    if bool(body.get("allowed")) == bool(body.get("denied")):
        raise invalid_value("resource.allowed", "", "Exactly one of allowed and denied must be specified.")
    if not 0 <= body["priority"] <= 65535:
        raise invalid_value("resource.priority", body["priority"], "Must be between 0 and 65535.")
    for field, rule in rules:
        protocol = rule.get("IPProtocol", "")
        if protocol not in _PROTOCOLS and not (protocol.isdecimal() and int(protocol) <= 255):
            raise invalid_value(
                f"resource.{field}[0].IPProtocol", protocol, "Invalid IP protocol specification."
            )
        for port in rule.get("ports", []):
            match = _PORTS.fullmatch(port)
            if (
                match is None
                or int(match[1]) > int(match[2] or match[1])
                or int(match[2] or match[1]) > 65535
            ):
                raise invalid_value(f"resource.{field}[0].ports[0]", port, "Invalid port or port range.")
    for field in ("sourceRanges", "destinationRanges"):
        for index, cidr in enumerate(body.get(field, [])):
            _any_range(cidr, f"resource.{field}[{index}]")


def _no_users(_store: Store, _record: Record) -> Iterator[str]:
    yield from ()


def taken_addresses(store: Store) -> set[str]:
    """Every address that is reserved, or that an instance has."""
    taken = {record.body["address"] for record in store.list(ADDRESS)}
    return taken | {record.private["ip"] for record in store.list("compute.instances")}


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_loopback
    except ValueError:
        return False


def _prepare_address(call: Call, record: Record) -> None:
    body = record.body
    body.setdefault("addressType", "EXTERNAL")
    body.setdefault("networkTier", "PREMIUM")
    body.setdefault("ipVersion", "IPV4")
    if body["ipVersion"] != "IPV4":
        raise ApiError(501, "localcloud serves IPv4 addresses only")
    region = record.key.split("/")[3]
    if body["addressType"] == "INTERNAL":
        del body["networkTier"]
        body.setdefault("purpose", "GCE_ENDPOINT")
        given = body.get("subnetwork")
        subnetwork = find_subnetwork(call, given or "default", region)
        body["subnetwork"] = subnetwork.body["selfLink"]
    elif "subnetwork" in body or "network" in body:
        raise invalid_value(
            "resource.subnetwork", body.get("subnetwork", ""), "An external address has none."
        )
    taken = taken_addresses(call.store)
    if body.get("address"):
        if not _is_loopback(body["address"]):
            raise invalid_value(
                "resource.address", body["address"], "localcloud has loopback addresses only."
            )
        if body["address"] in taken:
            raise ApiError(409, f"Specified IP address is already reserved: {body['address']}.")
    else:
        body["address"] = call.services.backends.allocate_address(taken)
    body["status"] = "RESERVED"


def _address_users(_store: Store, record: Record) -> Iterator[str]:
    for user in record.body.get("users", []):
        yield key_of(user)


NETWORKS = Collection(
    "networks",
    "compute#network",
    False,
    _prepare_network,
    _network_users,
    frozenset({"routingConfig", "mtu", "networkFirewallPolicyEnforcementOrder"}),
    view=_view_network,
    forget=_forget_network,
)
SUBNETWORKS = Collection(
    "subnetworks",
    "compute#subnetwork",
    True,
    _prepare_subnetwork,
    _subnetwork_users,
    frozenset({"secondaryIpRanges", "logConfig", "enableFlowLogs", "privateIpGoogleAccess", "description"}),
    changed=_change_subnetwork,
)
FIREWALLS = Collection(
    "firewalls",
    "compute#firewall",
    False,
    _prepare_firewall,
    _no_users,
    frozenset(
        {
            "allowed",
            "denied",
            "description",
            "destinationRanges",
            "disabled",
            "logConfig",
            "priority",
            "sourceRanges",
            "sourceServiceAccounts",
            "sourceTags",
            "targetServiceAccounts",
            "targetTags",
        }
    ),
    check=_check_firewall,
)
ADDRESSES = Collection("addresses", "compute#address", True, _prepare_address, _address_users, labelled=True)

for _collection in (NETWORKS, SUBNETWORKS, FIREWALLS, ADDRESSES):
    serve(_collection)


@TABLE.serves("compute.subnetworks.setPrivateIpGoogleAccess")
def _set_private_access(call: Call) -> Json:
    record = require(call.store, SUBNETWORKS.key(call))
    record.body["privateIpGoogleAccess"] = call.body.get("privateIpGoogleAccess", False)
    call.store.put(record)
    return begin(call, "setPrivateIpGoogleAccess", record)


@TABLE.serves("compute.subnetworks.expandIpCidrRange")
def _expand(call: Call) -> Json:
    record = require(call.store, SUBNETWORKS.key(call))
    text = call.body.get("ipCidrRange", "")
    old, new = ipaddress.IPv4Network(record.body["ipCidrRange"]), ranges.parse(text, "ipCidrRange")
    if not ranges.expands(old, new):
        raise invalid_value("ipCidrRange", text, f"The new range must contain the existing one, {old}.")
    record.body["ipCidrRange"] = text
    ranges.check(call.store, record)
    refingerprint(record.body)
    call.store.put(record)
    return begin(call, "expandIpCidrRange", record)


def seed(store: Store, project: str) -> None:
    """The network `default` that every project of Google's has at first, made once."""
    key = f"projects/{project}/global/networks/default"
    if store.get(f"projects/{project}/seeded") is not None:
        return
    network = Record(key, NETWORK, new_body(key, "compute#network"), {"seed": True})
    network.body |= {
        "description": "Default network for the project",
        "autoCreateSubnetworks": True,
        "routingConfig": {"routingMode": "REGIONAL"},
        "mtu": 1460,
        "networkFirewallPolicyEnforcementOrder": "AFTER_CLASSIC_FIREWALL",
    }
    store.put(network)
    add_auto_subnetworks(store, network)
    rules: list[tuple[str, list[Json], str]] = [
        ("default-allow-icmp", [{"IPProtocol": "icmp"}], "0.0.0.0/0"),
        ("default-allow-ssh", [{"IPProtocol": "tcp", "ports": ["22"]}], "0.0.0.0/0"),
        (
            "default-allow-internal",
            [
                {"IPProtocol": "tcp", "ports": ["0-65535"]},
                {"IPProtocol": "udp", "ports": ["0-65535"]},
                {"IPProtocol": "icmp"},
            ],
            "10.128.0.0/9",
        ),
    ]
    for name, allowed, source in rules:
        rule_key = f"projects/{project}/global/firewalls/{name}"
        body = new_body(rule_key, "compute#firewall") | {
            "description": "",
            "network": link(key),
            "direction": "INGRESS",
            "priority": 65534,
            "disabled": False,
            "logConfig": {"enable": False},
            "sourceRanges": [source],
            "allowed": allowed,
        }
        store.put(Record(rule_key, FIREWALL, body, {"seed": True}))
    store.put(Record(f"projects/{project}/seeded", "seeded", {}))
