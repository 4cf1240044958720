"""Ranges of addresses: which subnetworks and clusters have, which they may have, and when they may change."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localcloud.api.compute.ranges import expands
from tests.unit.localcloud_api.client import CLUSTERS, COMPUTE, REGION, ZONE, Client, instance

SUBNETWORKS = f"{REGION}/subnetworks"
SUB = f"{SUBNETWORKS}/sub"
Json = dict[str, Any]
RANGES = [
    {"rangeName": "pods", "ipCidrRange": "10.4.0.0/14"},
    {"rangeName": "services", "ipCidrRange": "10.8.0.0/20"},
]


@pytest.fixture(autouse=True)
def sub(client: Client) -> None:
    """A network `net` with a subnetwork `sub` that has ranges for pods and services."""
    client.create(f"{COMPUTE}/global/networks", {"name": "net", "autoCreateSubnetworks": False})
    client.create(SUBNETWORKS, _subnetwork("sub", "10.1.0.0/24", RANGES))


def _subnetwork(name: str, cidr: str, ranges: list[Json] | None = None) -> Json:
    body: Json = {"name": name, "network": "global/networks/net", "ipCidrRange": cidr}
    return body | ({"secondaryIpRanges": ranges} if ranges is not None else {})


def _cluster(**policy: Any) -> Json:
    policy = {"useIpAliases": True} | policy
    cluster = {"name": "c1", "initialNodeCount": 1, "network": "net", "subnetwork": "sub"}
    return {"cluster": cluster | {"ipAllocationPolicy": policy}}


NAMED = {"clusterSecondaryRangeName": "pods", "servicesSecondaryRangeName": "services"}


def _with_aliases(client: Client, name: str, *aliases: Json) -> tuple[int, Any]:
    """Make an instance; gives the status, and its alias ranges or the error."""
    interface = {"subnetwork": "regions/europe-west1/subnetworks/sub", "aliasIpRanges": list(aliases)}
    status, answer = client.send(
        "POST", f"{ZONE}/instances", instance(name) | {"networkInterfaces": [interface]}
    )
    if status != 200:
        return status, answer["error"]["message"]
    client.done(answer)
    body = client.ok("GET", f"{ZONE}/instances/{name}")
    return status, [alias["ipCidrRange"] for alias in body["networkInterfaces"][0]["aliasIpRanges"]]


def test_an_alias_range_that_is_a_mask_is_allocated(client: Client) -> None:
    mask, pods = {"ipCidrRange": "/24", "subnetworkRangeName": "pods"}, {"subnetworkRangeName": "pods"}
    assert _with_aliases(client, "vm-1", mask) == (200, ["10.4.0.0/24"])
    given = pods | {"ipCidrRange": "10.4.1.0/25"}
    assert _with_aliases(client, "vm-2", given, mask) == (200, ["10.4.1.0/25", "10.4.2.0/24"])
    single = pods | {"ipCidrRange": "/32"}
    assert _with_aliases(client, "vm-3", single) == (200, ["10.4.1.128/32"])
    assert _with_aliases(client, "vm-4", {"ipCidrRange": "/30"}) == (200, ["10.1.0.4/30"])


@pytest.mark.parametrize(
    ("alias", "said"),
    [
        ({"ipCidrRange": "/24", "subnetworkRangeName": "other"}, "no such range"),
        ({"ipCidrRange": "/13", "subnetworkRangeName": "pods"}, "does not fit"),
        ({"ipCidrRange": "/33", "subnetworkRangeName": "pods"}, "does not fit"),
        ({"ipCidrRange": "10.8.0.0/24", "subnetworkRangeName": "pods"}, "outside"),
        ({"ipCidrRange": "10.4.0.1/24", "subnetworkRangeName": "pods"}, "host bits"),
        ({"ipCidrRange": "10.4.0.128/25", "subnetworkRangeName": "pods"}, "already being used"),
        ({"subnetworkRangeName": "pods"}, "CIDR"),
    ],
)
def test_an_alias_range_that_cannot_be_is_refused(client: Client, alias: Json, said: str) -> None:
    assert _with_aliases(client, "vm-1", {"ipCidrRange": "/24", "subnetworkRangeName": "pods"})[0] == 200
    status, message = _with_aliases(client, "vm-2", alias)
    assert status == 400
    assert said in message


MASK = {"ipCidrRange": "/24", "subnetworkRangeName": "pods"}


def _interface(client: Client, name: str) -> Json:
    interface: Json = client.ok("GET", f"{ZONE}/instances/{name}")["networkInterfaces"][0]
    return interface


def _update(client: Client, name: str, body: Json, nic: str = "nic0") -> tuple[int, Json]:
    path = f"{ZONE}/instances/{name}/updateNetworkInterface"
    return client.send("PATCH", path, body, query=f"networkInterface={nic}")


def test_alias_ranges_are_changed_in_place(client: Client) -> None:
    _with_aliases(client, "vm-1", MASK)
    _with_aliases(client, "vm-2", MASK)
    before = _interface(client, "vm-1")
    more = [{**MASK, "ipCidrRange": "10.4.0.0/24"}, MASK]
    body = {"fingerprint": before["fingerprint"], "aliasIpRanges": more, "network": "global/networks/net"}
    client.done(_update(client, "vm-1", body)[1])
    after = _interface(client, "vm-1")
    assert [alias["ipCidrRange"] for alias in after["aliasIpRanges"]] == ["10.4.0.0/24", "10.4.2.0/24"]
    assert after["fingerprint"] != before["fingerprint"]
    none = {"fingerprint": after["fingerprint"], "aliasIpRanges": []}
    client.done(_update(client, "vm-1", none)[1])
    assert "aliasIpRanges" not in _interface(client, "vm-1")
    assert [on for call, on in client.backends.calls if call == "change_alias_ranges"] == [
        "vm-1 10.4.0.0/24 > 10.4.0.0/24,10.4.2.0/24",
        "vm-1 10.4.0.0/24,10.4.2.0/24 > ",
    ]
    assert _with_aliases(client, "vm-3", MASK) == (200, ["10.4.0.0/24"]), "what was given back is free"


@pytest.mark.parametrize(
    ("body", "nic", "code", "said"),
    [
        ({"fingerprint": "b2xk"}, "nic0", 412, "fingerprint"),
        ({"aliasIpRanges": []}, "nic0", 412, "fingerprint"),
        ({}, "nic1", 400, "nic1"),
        ({"networkIP": "127.9.0.9"}, "nic0", 501, "networkIP"),
        ({"aliasIpRanges": [{**MASK, "ipCidrRange": "10.4.1.0/24"}]}, "nic0", 400, "already being used"),
    ],
)
def test_a_change_of_an_interface_that_cannot_be_is_refused(
    client: Client, body: Json, nic: str, code: int, said: str
) -> None:
    _with_aliases(client, "vm-1", MASK)
    _with_aliases(client, "vm-2", MASK)
    before = _interface(client, "vm-1")
    known = {} if code == 412 else {"fingerprint": before["fingerprint"]}
    status, answer = _update(client, "vm-1", known | body, nic)
    assert (status, said in answer["error"]["message"]) == (code, True), answer
    assert _interface(client, "vm-1") == before


def test_where_a_machine_cannot_have_a_range_its_instance_keeps_what_it_has(client: Client) -> None:
    _with_aliases(client, "vm-1", MASK)
    before = _interface(client, "vm-1")
    client.backends.fail = {"change_alias_ranges"}
    body = {"fingerprint": before["fingerprint"], "aliasIpRanges": [MASK, MASK]}
    operation = client.done(_update(client, "vm-1", body)[1])
    assert "on purpose" in operation["error"]["errors"][0]["message"]
    assert _interface(client, "vm-1") == before
    assert _with_aliases(client, "vm-2", MASK) == (200, ["10.4.1.0/24"]), "nothing stays reserved"


def test_a_range_that_an_instance_is_about_to_get_is_no_others(client: Client) -> None:
    _with_aliases(client, "vm-1", MASK)
    client.backends.gate.clear()
    known = {"fingerprint": _interface(client, "vm-1")["fingerprint"]}
    status, operation = _update(client, "vm-1", known | {"aliasIpRanges": [MASK, MASK]})
    assert status == 200
    other = {**MASK, "ipCidrRange": "10.4.1.0/24"}
    assert "already being used" in str(_with_aliases(client, "vm-2", other)[1])
    assert _update(client, "vm-1", known | {"aliasIpRanges": []})[0] == 400, "one change at a time"
    client.backends.gate.set()
    assert "error" not in client.done(operation)


def test_instances_of_two_networks_are_on_one_machine_and_have_ranges_apart(client: Client) -> None:
    client.create(f"{COMPUTE}/global/networks", {"name": "two", "autoCreateSubnetworks": False})
    client.create(
        SUBNETWORKS, _subnetwork("other", "10.1.0.0/24", RANGES) | {"network": "global/networks/two"}
    )
    assert _with_aliases(client, "vm-1", MASK) == (200, ["10.4.0.0/24"])
    interface = {"subnetwork": "regions/europe-west1/subnetworks/other", "aliasIpRanges": [MASK]}
    client.create(f"{ZONE}/instances", instance("vm-2") | {"networkInterfaces": [interface]})
    assert _interface(client, "vm-2")["aliasIpRanges"][0]["ipCidrRange"] == "10.4.1.0/24"


def _patch(client: Client, ranges: list[Json]) -> tuple[int, Json]:
    fingerprint = client.ok("GET", SUB)["fingerprint"]
    return client.send("PATCH", SUB, {"secondaryIpRanges": ranges, "fingerprint": fingerprint})


def test_clusters_ranges_are_those_of_its_subnetwork(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, _cluster(**NAMED)))
    body = client.ok("GET", f"{CLUSTERS}/c1")
    assert (body["clusterIpv4Cidr"], body["servicesIpv4Cidr"]) == ("10.4.0.0/14", "10.8.0.0/20")
    policy = body["ipAllocationPolicy"]
    assert (policy["clusterIpv4CidrBlock"], policy["servicesIpv4CidrBlock"]) == ("10.4.0.0/14", "10.8.0.0/20")
    pool = body["nodePools"][0]["networkConfig"]
    assert (pool["podRange"], pool["podIpv4CidrBlock"]) == ("pods", "10.4.0.0/14")
    made = f"{CLUSTERS}/c1/nodePools/default-pool"
    client.done(client.ok("PUT", made, {"nodeNetworkConfig": {"enablePrivateNodes": True}}))
    assert client.ok("GET", made)["networkConfig"] == {**pool, "enablePrivateNodes": True}


def test_ranges_that_google_chooses_are_of_the_cluster_alone(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, _cluster()))
    two = _cluster()
    two["cluster"]["name"] = "c2"
    client.done(client.ok("POST", CLUSTERS, two))
    shown = [client.ok("GET", f"{CLUSTERS}/{name}") for name in ("c1", "c2")]
    ranges = [body[field] for body in shown for field in ("clusterIpv4Cidr", "servicesIpv4Cidr")]
    nets = [ipaddress.ip_network(text) for text in [*ranges, "10.1.0.0/24", "10.4.0.0/14", "10.8.0.0/20"]]
    for index, one in enumerate(nets):
        assert not any(one.overlaps(other) for other in nets[index + 1 :]), nets


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"clusterSecondaryRangeName": "none"}, '"none"'),
        ({"servicesSecondaryRangeName": "none"}, '"none"'),
        (
            {"clusterSecondaryRangeName": "pods", "servicesSecondaryRangeName": "pods"},
            "should not be the same",
        ),
        ({"clusterIpv4CidrBlock": "10.1.0.0/16"}, "conflicts"),
        ({"clusterIpv4CidrBlock": "nonsense"}, "nonsense"),
    ],
)
def test_cluster_with_ranges_that_are_not_there_is_refused(
    client: Client, policy: Json, message: str
) -> None:
    assert message in client.error(400, "POST", CLUSTERS, _cluster(**policy))
    assert client.ok("GET", CLUSTERS) == {}


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        RANGES[:1],
        RANGES[1:],
        [{"rangeName": "pods", "ipCidrRange": "10.16.0.0/14"}, RANGES[1]],
        [RANGES[0], {"rangeName": "services", "ipCidrRange": "10.8.0.0/21"}],
        [{"rangeName": "renamed", "ipCidrRange": "10.4.0.0/14"}, RANGES[1]],
    ],
)
def test_range_that_a_cluster_uses_is_not_changed(client: Client, ranges: list[Json]) -> None:
    client.done(client.ok("POST", CLUSTERS, _cluster(**NAMED)))
    before = client.ok("GET", SUB)
    status, body = _patch(client, ranges)
    assert (status, body["error"]["errors"][0]["reason"]) == (400, "resourceInUseByAnotherResource")
    assert "clusters/c1'" in body["error"]["message"]
    assert client.ok("GET", SUB) == before
    client.done(client.ok("DELETE", f"{CLUSTERS}/c1"))
    assert _patch(client, ranges)[0] == 200


def test_range_that_nobody_uses_is_added_and_removed_beside_one_that_is_used(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, _cluster(**NAMED)))
    more = [*RANGES, {"rangeName": "more", "ipCidrRange": "10.20.0.0/20"}]
    for ranges in (more, list(reversed(more)), RANGES):
        assert _patch(client, ranges)[0] == 200
        assert client.ok("GET", SUB)["secondaryIpRanges"] == ranges


def test_range_of_a_node_pool_is_used_too(client: Client) -> None:
    more = [*RANGES, {"rangeName": "more", "ipCidrRange": "10.20.0.0/20"}]
    assert _patch(client, more)[0] == 200
    client.done(client.ok("POST", CLUSTERS, _cluster(**NAMED)))
    pool = {"name": "more", "initialNodeCount": 1, "networkConfig": {"podRange": "more"}}
    client.done(client.ok("POST", f"{CLUSTERS}/c1/nodePools", {"nodePool": pool}))
    assert _patch(client, RANGES)[0] == 400
    client.done(client.ok("DELETE", f"{CLUSTERS}/c1/nodePools/more"))
    assert _patch(client, RANGES)[0] == 200


def test_range_that_an_instance_has_addresses_of_is_not_changed(client: Client) -> None:
    alias = {"ipCidrRange": "10.4.0.0/24", "subnetworkRangeName": "pods"}
    interface = {"subnetwork": "regions/europe-west1/subnetworks/sub", "aliasIpRanges": [alias]}
    client.create(f"{ZONE}/instances", instance(networkInterfaces=[interface]))
    status, body = _patch(client, RANGES[1:])
    assert (status, body["error"]["errors"][0]["reason"]) == (400, "resourceInUseByAnotherResource")
    assert _patch(client, RANGES[:1])[0] == 200


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("a", "10.1.0.0/28")], "conflicts"),
        ([("a", "10.9.0.0/16"), ("b", "10.9.1.0/24")], "conflicts"),
        ([("a", "10.9.0.0/24"), ("a", "10.9.1.0/24")], "rangeName"),
        ([("a", "10.9.0.1/24")], "ipCidrRange"),
        ([("a", None)], "ipCidrRange"),
        ([("Bad", "10.9.0.0/24")], "rangeName"),
        ([(None, "10.9.0.0/24")], "rangeName' not specified"),
        ([("a", "10.2.0.0/24")], "conflicts"),
        ([("a", "10.3.0.0/25")], "conflicts"),
        ([("a", "127.64.0.0/24")], "prohibited"),
    ],
)
def test_ranges_of_a_network_do_not_overlap(
    client: Client, named: list[tuple[str | None, str | None]], message: str
) -> None:
    ranges: list[Json] = [{"rangeName": name, "ipCidrRange": cidr} for name, cidr in named]
    other = [{"rangeName": "other", "ipCidrRange": "10.3.0.0/24"}]
    client.create(SUBNETWORKS, _subnetwork("other", "10.2.0.0/24", other))
    status, body = _patch(client, ranges)
    assert status == 400
    assert message in body["error"]["message"]
    client.done(client.ok("DELETE", SUB))
    created = _subnetwork("sub", "10.1.0.0/24", ranges)
    assert message in client.error(400, "POST", SUBNETWORKS, created)


def test_secondary_ranges_are_in_the_way_of_new_subnetworks(client: Client) -> None:
    assert "conflicts" in client.error(400, "POST", SUBNETWORKS, _subnetwork("two", "10.5.0.0/24"))


def test_patch_of_ranges_needs_the_current_fingerprint(client: Client) -> None:
    client.error(412, "PATCH", SUB, {"secondaryIpRanges": []})
    client.error(412, "PATCH", SUB, {"secondaryIpRanges": [], "fingerprint": "b2xk"})


def test_range_is_expanded_in_place(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, _cluster(**NAMED)))
    client.create(f"{SUB}/expandIpCidrRange", {"ipCidrRange": "10.1.0.0/20"})
    body = client.ok("GET", SUB)
    assert (body["ipCidrRange"], body["secondaryIpRanges"]) == ("10.1.0.0/20", RANGES)
    for text in ("10.1.0.0/20", "10.1.0.0/21", "10.64.0.0/12", "x", "10.0.0.0/8", "10.1.0.1/16"):
        client.error(400, "POST", f"{SUB}/expandIpCidrRange", {"ipCidrRange": text})
    assert client.ok("GET", SUB)["ipCidrRange"] == "10.1.0.0/20"
    assert client.ok("GET", SUB)["fingerprint"] != ""


CIDRS = st.builds(
    lambda address, bits: ipaddress.IPv4Network((address, bits), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(1, 29),
)


@settings(max_examples=200)
@given(old=CIDRS, new=CIDRS)
def test_a_range_expands_into_one_that_has_all_its_addresses_and_more(
    old: ipaddress.IPv4Network, new: ipaddress.IPv4Network
) -> None:
    inside = old[0] in new and old[-1] in new
    assert expands(old, new) == (inside and new.num_addresses > old.num_addresses)
    assert expands(old, old.supernet())


# What is in use stays, and what Google does not hold for in use goes.


def test_subnetwork_and_network_of_a_cluster_stay(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, _cluster(**NAMED)))
    for path in (SUB, f"{COMPUTE}/global/networks/net"):
        status, body = client.send("DELETE", path)
        assert (status, body["error"]["errors"][0]["reason"]) == (400, "resourceInUseByAnotherResource")
    client.done(client.ok("DELETE", f"{CLUSTERS}/c1"))
    client.done(client.ok("DELETE", SUB))
    client.done(client.ok("DELETE", f"{COMPUTE}/global/networks/net"))


def test_address_of_an_instance_stays(client: Client) -> None:
    client.create(f"{REGION}/addresses", {"name": "ip"})
    address = client.ok("GET", f"{REGION}/addresses/ip")["address"]
    interface = {"network": "global/networks/default", "accessConfigs": [{"natIP": address}]}
    client.create(f"{ZONE}/instances", instance(networkInterfaces=[interface]))
    status, body = client.send("DELETE", f"{REGION}/addresses/ip")
    assert (status, body["error"]["errors"][0]["reason"]) == (400, "resourceInUseByAnotherResource")
    client.done(client.ok("DELETE", f"{ZONE}/instances/vm"))
    client.done(client.ok("DELETE", f"{REGION}/addresses/ip"))
