"""Cloud Routers with their NAT gateways: what Google fills in and refuses, what they keep from deletion."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.localcloud_api.client import COMPUTE, REGION, Client

ROUTERS, SUBNETWORK = f"{REGION}/routers", f"{REGION}/subnetworks/sub"
ALL = "ALL_SUBNETWORKS_ALL_IP_RANGES"
LISTED = "LIST_OF_SUBNETWORKS"


@pytest.fixture(autouse=True)
def _router(client: Client) -> None:
    client.create(f"{COMPUTE}/global/networks", {"name": "net", "autoCreateSubnetworks": False})
    subnetwork = {"name": "sub", "network": "global/networks/net", "ipCidrRange": "10.1.0.0/24"}
    client.create(f"{REGION}/subnetworks", subnetwork)
    client.create(ROUTERS, {"name": "r", "network": "global/networks/net"})


def nats(client: Client, *given: dict[str, Any]) -> Any:
    client.done(client.ok("PATCH", f"{ROUTERS}/r", {"nats": list(given)}))
    return client.ok("GET", f"{ROUTERS}/r")["nats"]


def nat(**more: Any) -> dict[str, Any]:
    return {"name": "nat", "sourceSubnetworkIpRangesToNat": ALL, **more}


def test_a_gateway_lives_in_its_router(client: Client) -> None:
    (made,) = nats(client, nat())
    assert (made["natIpAllocateOption"], made["type"]) == ("AUTO_ONLY", "PUBLIC")
    listed = [{"name": "sub", "sourceIpRangesToNat": ["ALL_IP_RANGES"]}]
    first, second = nats(
        client, nat(), nat(name="two", sourceSubnetworkIpRangesToNat=LISTED, subnetworks=listed)
    )
    assert first == made
    assert second["subnetworks"][0]["name"].endswith("/regions/europe-west1/subnetworks/sub")
    assert [router["name"] for router in client.ok("GET", ROUTERS)["items"]] == ["r"]


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ([nat(), nat()], 400, "name of its own"),
        ([nat(name="")], 400, "name of its own"),
        ([{"name": "nat"}], 400, "must be specified"),
        ([nat(sourceSubnetworkIpRangesToNat="NONE")], 400, "NONE"),
        ([nat(sourceSubnetworkIpRangesToNat=LISTED)], 400, LISTED),
        ([nat(subnetworks=[{"name": "sub"}])], 400, LISTED),
        ([nat(sourceSubnetworkIpRangesToNat=LISTED, subnetworks=[{"name": "no"}])], 404, "no"),
        ([nat(natIpAllocateOption="MANUAL_ONLY")], 400, "MANUAL_ONLY"),
        ([nat(natIps=["a"])], 400, "MANUAL_ONLY"),
        ([nat(natIpAllocateOption="MANUAL_ONLY", natIps=["no"])], 404, "no"),
    ],
)
def test_a_wrong_gateway_is_refused_and_changes_nothing(
    client: Client, given: list[Any], status: int, words: str
) -> None:
    before = client.ok("GET", f"{ROUTERS}/r")
    assert words in client.error(status, "PATCH", f"{ROUTERS}/r", {"nats": given})
    assert client.ok("GET", f"{ROUTERS}/r") == before


def test_what_a_router_uses_is_not_deleted(client: Client) -> None:
    listed = [{"name": "sub", "sourceIpRangesToNat": ["ALL_IP_RANGES"]}]
    nats(client, nat(sourceSubnetworkIpRangesToNat=LISTED, subnetworks=listed))
    for path in (SUBNETWORK, f"{COMPUTE}/global/networks/net"):
        assert "routers/r" in client.error(400, "DELETE", path)
    client.done(client.ok("DELETE", f"{ROUTERS}/r"))
    for path in (SUBNETWORK, f"{COMPUTE}/global/networks/net"):
        client.done(client.ok("DELETE", path))


def test_a_router_stays_in_its_network(client: Client) -> None:
    assert "network" in client.error(400, "PATCH", f"{ROUTERS}/r", {"network": "global/networks/default"})
    assert "no" in client.error(404, "POST", ROUTERS, {"name": "s", "network": "global/networks/no"})
