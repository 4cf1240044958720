"""Cloud Routers and the Cloud NAT gateways in them: records; the way out is this machine's own network."""

from __future__ import annotations

from collections.abc import Iterator

from localcloud.api.compute.common import require, resolve
from localcloud.api.compute.networks import find_network, find_subnetwork
from localcloud.api.compute.resources import Collection, serve
from localcloud.api.errors import invalid_value
from localcloud.api.service import Call
from localcloud.store import Json, Record, Store

_LISTED = "LIST_OF_SUBNETWORKS"


def _prepare(call: Call, record: Record) -> None:
    body = record.body
    if "network" not in body:
        raise invalid_value("resource.network", "", "The network must be specified.")
    body["network"] = find_network(call, body["network"]).body["selfLink"]
    body.setdefault("encryptedInterconnectRouter", False)
    _complete(call, record, {})


def _complete(call: Call, record: Record, _before: Json) -> None:
    """Check the gateways, and fill in what Google would."""
    region = record.key.split("/")[3]
    names: set[str] = set()
    for number, nat in enumerate(record.body.get("nats", [])):
        field = f"resource.nats[{number}]"
        name = nat.get("name", "")
        if not name or name in names:
            raise invalid_value(f"{field}.name", name, "Each NAT gateway of a router has a name of its own.")
        names.add(name)
        if "sourceSubnetworkIpRangesToNat" not in nat:
            raise invalid_value(f"{field}.sourceSubnetworkIpRangesToNat", "", "It must be specified.")
        if (nat["sourceSubnetworkIpRangesToNat"] == _LISTED) != bool(nat.get("subnetworks")):
            raise invalid_value(
                f"{field}.subnetworks", "", f"They are given with {_LISTED}, and with nothing else."
            )
        nat.setdefault("natIpAllocateOption", "AUTO_ONLY")
        if (nat["natIpAllocateOption"] == "MANUAL_ONLY") != bool(nat.get("natIps")):
            raise invalid_value(
                f"{field}.natIps", "", "They are given with MANUAL_ONLY, and with nothing else."
            )
        for subnetwork in nat.get("subnetworks", []):
            found = find_subnetwork(call, subnetwork.get("name", ""), region)
            subnetwork["name"] = found.body["selfLink"]
        if nat.get("natIps"):
            addresses = f"projects/{call.project}/regions/{region}/addresses"
            found_ips = [require(call.store, resolve(call, ip, addresses)) for ip in nat["natIps"]]
            nat["natIps"] = [address.body["selfLink"] for address in found_ips]
        nat.setdefault("type", "PUBLIC")
        nat.setdefault("endpointTypes", ["ENDPOINT_TYPE_VM"])
        nat.setdefault("enableEndpointIndependentMapping", False)


def _no_users(_store: Store, _record: Record) -> Iterator[str]:
    yield from ()


ROUTERS = Collection(
    "routers",
    "compute#router",
    True,
    _prepare,
    _no_users,
    frozenset({"nats", "bgp", "description"}),
    changed=_complete,
)
serve(ROUTERS)
