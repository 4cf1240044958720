"""Compute Engine: defaults, rules between resources, fingerprints, lists."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.localcloud_api.client import ACCOUNTS, COMPUTE, REGION, ZONE, Client, instance

NETWORKS, FIREWALLS = f"{COMPUTE}/global/networks", f"{COMPUTE}/global/firewalls"
URL = "https://www.googleapis.com/compute/v1/projects/localcloud-dev"


@pytest.fixture
def network(client: Client) -> str:
    """A custom network `net` with a subnetwork `sub`; gives the network's path."""
    client.create(NETWORKS, {"name": "net", "autoCreateSubnetworks": False})
    subnetwork = {"name": "sub", "network": "global/networks/net", "ipCidrRange": "10.1.0.0/24"}
    client.create(f"{REGION}/subnetworks", subnetwork)
    return f"{NETWORKS}/net"


def test_new_project_has_the_default_network(client: Client) -> None:
    body = client.ok("GET", f"{NETWORKS}/default")
    assert body["autoCreateSubnetworks"] is True
    assert f"{URL}/regions/europe-west1/subnetworks/default" in body["subnetworks"]


def test_instance_gets_the_fields_that_google_fills(client: Client) -> None:
    operation = client.ok("POST", f"{ZONE}/instances", instance(labels={"a": "b"}))
    assert (operation["status"], operation["operationType"]) == ("RUNNING", "insert")
    assert operation["targetLink"] == f"{URL}/zones/europe-west1-b/instances/vm"
    assert client.done(operation)["status"] == "DONE"
    body = client.ok("GET", f"{ZONE}/instances/vm")
    interface = body["networkInterfaces"][0]
    assert body["status"] == "RUNNING"
    assert body["selfLink"] == operation["targetLink"]
    assert body["machineType"] == f"{URL}/zones/europe-west1-b/machineTypes/e2-small"
    assert interface["network"] == f"{URL}/global/networks/default"
    assert interface["subnetwork"] == f"{URL}/regions/europe-west1/subnetworks/default"
    assert interface["networkIP"] == interface["accessConfigs"][0]["natIP"] == "127.9.0.1"
    assert body["disks"][0]["source"] == f"{URL}/zones/europe-west1-b/disks/vm"
    for field in ("id", "creationTimestamp", "fingerprint", "labelFingerprint"):
        assert body[field]
    disk = client.ok("GET", f"{ZONE}/disks/vm")
    assert disk["users"] == [body["selfLink"]]
    beta = client.ok("GET", f"{ZONE}/instances/vm".replace("/v1/", "/beta/"))
    assert beta["selfLink"] == body["selfLink"].replace("/v1/", "/beta/")


def test_users_text_is_never_rewritten(client: Client) -> None:
    text = "https://www.googleapis.com/compute/v1/projects/x"
    client.create(
        f"{ZONE}/instances", instance(metadata={"items": [{"key": "a", "value": text}]}, description=text)
    )
    body = client.ok("GET", f"{ZONE}/instances/vm")
    assert (body["metadata"]["items"][0]["value"], body["description"]) == (text, text)


def test_existing_name_is_a_409(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance())
    message = client.error(409, "POST", f"{ZONE}/instances", instance())
    assert (
        message == "The resource 'projects/localcloud-dev/zones/europe-west1-b/instances/vm' already exists"
    )


@pytest.mark.parametrize("name", ["", "Big", "-a", "a-", "a" * 64, "a_b"])
def test_name_must_be_googles(client: Client, name: str) -> None:
    message = client.error(400, "POST", f"{ZONE}/instances", instance(name))
    assert message.startswith(f"Invalid value for field 'resource.name': '{name}'. Must be a match of regex")


@pytest.mark.parametrize(
    ("code", "fields", "message"),
    [
        (
            404,
            {"networkInterfaces": [{"network": "global/networks/none"}]},
            "global/networks/none' was not found",
        ),
        (404, {"networkInterfaces": [{"subnetwork": "none"}]}, "subnetworks/none' was not found"),
        (400, {"machineType": "zones/europe-west1-b/machineTypes/huge"}, "'huge' does not exist in zone"),
        (400, {"machineType": "zones/us-east1-b/machineTypes/e2-small"}, "resource.machineType"),
        (404, {"serviceAccounts": [{"email": "no@x.iam.gserviceaccount.com"}]}, "of type 'serviceAccount'"),
        (400, {"disks": []}, "No disks are specified."),
        (400, {"disks": [{"boot": True, "initializeParams": {"sourceImage": "x"}}]}, "cannot be found"),
        (400, {"networkInterfaces": []}, "exactly one network interface"),
        (400, {"labels": {"Bad": "x"}}, "Label keys must match"),
        (400, {"tags": {"items": ["Bad"]}}, "resource.tags.items[0]"),
        (400, {"metadata": {"items": [{"key": "a"}, {"key": "a"}]}}, "duplicate key"),
    ],
)
def test_instance_that_refers_to_nothing_or_breaks_a_rule_is_refused(
    client: Client, code: int, fields: dict[str, Any], message: str
) -> None:
    assert message in client.error(code, "POST", f"{ZONE}/instances", instance(**fields))
    assert "items" not in client.ok("GET", f"{ZONE}/instances")
    assert "items" not in client.ok("GET", f"{ZONE}/disks")


def test_deleted_instance_is_gone_with_its_disk(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance())
    operation = client.done(client.ok("DELETE", f"{ZONE}/instances/vm"))
    assert operation["status"] == "DONE"
    message = client.error(404, "GET", f"{ZONE}/instances/vm")
    assert message == "The resource 'projects/localcloud-dev/zones/europe-west1-b/instances/vm' was not found"
    client.error(404, "GET", f"{ZONE}/disks/vm")
    assert client.backends.calls == [("start_instance", "vm"), ("delete_instance", "vm")]


def test_instance_that_cannot_start_ends_in_the_operations_error_and_leaves_nothing(client: Client) -> None:
    client.backends.fail = {"start_instance"}
    operation = client.done(client.ok("POST", f"{ZONE}/instances", instance()))
    assert "failed on purpose" in operation["error"]["errors"][0]["message"]
    assert operation["httpErrorStatusCode"] == 503
    client.error(404, "GET", f"{ZONE}/instances/vm")
    client.error(404, "GET", f"{ZONE}/disks/vm")


def test_stop_start_and_reset_reach_the_machine(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance())
    for verb, status in (("stop", "TERMINATED"), ("start", "RUNNING"), ("reset", "RUNNING")):
        client.create(f"{ZONE}/instances/vm/{verb}", None)
        assert client.ok("GET", f"{ZONE}/instances/vm")["status"] == status
    names = [name for name, _ in client.backends.calls]
    assert names == ["start_instance", "stop_instance", "start_instance", "stop_instance", "start_instance"]


@pytest.mark.parametrize(
    ("verb", "current", "change", "field"),
    [
        (
            "setMetadata",
            lambda body: body["metadata"]["fingerprint"],
            {"items": [{"key": "k", "value": "v"}]},
            "metadata",
        ),
        ("setTags", lambda body: body["tags"]["fingerprint"], {"items": ["web"]}, "tags"),
        ("setLabels", lambda body: body["labelFingerprint"], {"labels": {"a": "b"}}, "labels"),
    ],
)
def test_change_needs_the_current_fingerprint(
    client: Client, verb: str, current: Any, change: dict[str, Any], field: str
) -> None:
    client.create(f"{ZONE}/instances", instance())
    name = "labelFingerprint" if verb == "setLabels" else "fingerprint"
    before = current(client.ok("GET", f"{ZONE}/instances/vm"))
    client.error(412, "POST", f"{ZONE}/instances/vm/{verb}", change)
    client.create(f"{ZONE}/instances/vm/{verb}", change | {name: before})
    body = client.ok("GET", f"{ZONE}/instances/vm")
    assert current(body) != before
    assert change.get("labels", change.get("items")) in (body[field], body[field].get("items"))
    message = client.error(412, "POST", f"{ZONE}/instances/vm/{verb}", change | {name: before})
    assert "fingerprint" in message


def test_serial_port_is_read_on_from_where_the_last_read_ended(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance())
    body = client.ok("GET", f"{ZONE}/instances/vm/serialPort")
    assert body["contents"] == "vm says héllo\n"
    rest = client.ok("GET", f"{ZONE}/instances/vm/serialPort", query=f"start={body['next']}")
    assert (rest["contents"], rest["next"]) == ("", body["next"])


def test_reserved_address_is_used_and_freed(client: Client) -> None:
    client.create(f"{REGION}/addresses", {"name": "ip"})
    address = client.ok("GET", f"{REGION}/addresses/ip")
    assert (address["status"], address["addressType"]) == ("RESERVED", "EXTERNAL")
    interface = {"network": "global/networks/default", "accessConfigs": [{"natIP": address["address"]}]}
    client.create(f"{ZONE}/instances", instance(networkInterfaces=[interface]))
    body = client.ok("GET", f"{ZONE}/instances/vm")
    assert body["networkInterfaces"][0]["networkIP"] == address["address"]
    assert client.ok("GET", f"{REGION}/addresses/ip")["users"] == [body["selfLink"]]
    assert "already being used by" in client.error(400, "DELETE", f"{REGION}/addresses/ip")
    other = instance("vm2", networkInterfaces=[interface])
    assert "in-use" in client.error(400, "POST", f"{ZONE}/instances", other)
    client.done(client.ok("DELETE", f"{ZONE}/instances/vm"))
    assert client.ok("GET", f"{REGION}/addresses/ip")["status"] == "RESERVED"
    client.done(client.ok("DELETE", f"{REGION}/addresses/ip"))
    client.error(404, "GET", f"{REGION}/addresses/ip")


def test_address_that_nobody_reserved_is_refused(client: Client) -> None:
    interface = {"network": "global/networks/default", "accessConfigs": [{"natIP": "127.9.0.77"}]}
    message = client.error(400, "POST", f"{ZONE}/instances", instance(networkInterfaces=[interface]))
    assert "'127.9.0.77' was not found in region 'europe-west1'" in message


def test_network_in_use_is_kept(client: Client, network: str) -> None:
    message = client.error(400, "DELETE", network)
    assert message == (
        "The network resource 'projects/localcloud-dev/global/networks/net' is already being used by "
        "'projects/localcloud-dev/regions/europe-west1/subnetworks/sub'"
    )
    status, body = client.send("DELETE", network)
    assert (status, body["error"]["errors"][0]["reason"]) == (400, "resourceInUseByAnotherResource")
    client.create(
        FIREWALLS, {"name": "fw", "network": "global/networks/net", "allowed": [{"IPProtocol": "tcp"}]}
    )
    client.done(client.ok("DELETE", f"{REGION}/subnetworks/sub"))
    assert "firewalls/fw" in client.error(400, "DELETE", network)
    client.done(client.ok("DELETE", f"{FIREWALLS}/fw"))
    client.done(client.ok("DELETE", network))
    client.error(404, "GET", network)


@pytest.mark.usefixtures("network")
def test_subnetwork_in_use_is_kept(client: Client) -> None:
    client.create(
        f"{ZONE}/instances",
        instance(networkInterfaces=[{"subnetwork": "regions/europe-west1/subnetworks/sub"}]),
    )
    assert "instances/vm" in client.error(400, "DELETE", f"{REGION}/subnetworks/sub")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("cidr", "message"),
    [
        ("10.1.0.0/16", "conflicts with existing subnetwork 'sub'"),
        ("10.2.0.1/24", "CIDR"),
        ("x", "CIDR"),
        ("", "CIDR"),
    ],
)
def test_subnetwork_range_is_checked(client: Client, cidr: str, message: str) -> None:
    body = {"name": "two", "network": "global/networks/net", "ipCidrRange": cidr}
    assert message in client.error(400, "POST", f"{REGION}/subnetworks", body)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"allowed": [{"IPProtocol": "nonsense"}]},
        {"allowed": [{"IPProtocol": "tcp", "ports": ["70000"]}]},
        {"allowed": [{"IPProtocol": "tcp"}], "denied": [{"IPProtocol": "tcp"}]},
        {"allowed": [{"IPProtocol": "tcp"}], "sourceRanges": ["10.0.0.1/8"]},
        {"allowed": [{"IPProtocol": "tcp"}], "priority": 70000},
    ],
)
def test_firewall_rules_are_checked(client: Client, fields: dict[str, Any]) -> None:
    client.error(400, "POST", FIREWALLS, {"name": "fw", **fields})


def test_firewall_is_patched_field_by_field(client: Client) -> None:
    client.create(FIREWALLS, {"name": "fw", "allowed": [{"IPProtocol": "tcp", "ports": ["80"]}]})
    body = client.ok("GET", f"{FIREWALLS}/fw")
    assert (body["direction"], body["priority"], body["sourceRanges"]) == ("INGRESS", 1000, ["0.0.0.0/0"])
    client.done(client.ok("PATCH", f"{FIREWALLS}/fw", {"sourceRanges": ["10.0.0.0/8"]}))
    changed = client.ok("GET", f"{FIREWALLS}/fw")
    assert changed == body | {"sourceRanges": ["10.0.0.0/8"]}
    assert "immutable" in client.error(400, "PATCH", f"{FIREWALLS}/fw", {"direction": "EGRESS"})


def test_lists_have_filters_and_pages(client: Client) -> None:
    for number in range(5):
        client.create(f"{REGION}/addresses", {"name": f"ip{number}", "labels": {"parity": str(number % 2)}})

    def names(query: str) -> list[str]:
        return [
            item["name"] for item in client.ok("GET", f"{REGION}/addresses", query=query).get("items", [])
        ]

    assert names("filter=name%20%3D%20ip3") == ["ip3"]
    assert names("filter=name%20eq%20ip[12]") == ["ip1", "ip2"]
    assert names("filter=labels.parity%3D1%20AND%20NOT%20name%3Dip3") == ["ip1"]
    assert names('filter=(name%3D"ip0")%20OR%20(name%3D"ip4")') == ["ip0", "ip4"]
    assert names("filter=name:ip*%20status!=RESERVED") == []
    client.error(400, "GET", f"{REGION}/addresses", query="filter=name%20%3D")
    client.error(400, "GET", f"{REGION}/addresses", query="pageToken=nonsense")
    seen, token = [], ""
    while True:
        body = client.ok("GET", f"{REGION}/addresses", query=f"maxResults=2&pageToken={token}")
        seen += [item["name"] for item in body["items"]]
        token = body.get("nextPageToken", "")
        if not token:
            break
    assert seen == [f"ip{number}" for number in range(5)]
    scopes = client.ok("GET", f"{COMPUTE}/aggregated/addresses")["items"]
    assert len(scopes["regions/europe-west1"]["addresses"]) == 5
    assert scopes["regions/us-east1"]["warning"]["code"] == "NO_RESULTS_ON_PAGE"


def test_repeated_request_id_gives_the_same_operation(client: Client) -> None:
    query = "requestId=5a8d0b1e-6f3f-4a55-8a3c-0a4b8f0a1b2c"
    first = client.ok("POST", NETWORKS, {"name": "n"}, query=query)
    assert client.ok("POST", NETWORKS, {"name": "n"}, query=query)["name"] == first["name"]
    client.error(409, "POST", NETWORKS, {"name": "n"})


def test_catalog_knows_images_types_and_places(client: Client) -> None:
    family = client.ok("GET", "/compute/v1/projects/debian-cloud/global/images/family/debian-12")
    assert client.ok("GET", f"/compute/v1/projects/debian-cloud/global/images/{family['name']}") == family
    client.error(404, "GET", "/compute/v1/projects/debian-cloud/global/images/debian-12")
    assert client.ok("GET", f"{ZONE}/machineTypes/e2-small")["memoryMb"] == 2048
    assert client.ok("GET", f"{ZONE}/machineTypes/e2-custom-4-8192")["guestCpus"] == 4
    client.error(404, "GET", f"{ZONE}/machineTypes/huge")
    assert client.ok("GET", ZONE)["region"] == f"{URL}/regions/europe-west1"
    client.error(404, "GET", f"{COMPUTE}/zones/mars-west1-a")
    assert "Unknown zone" in client.error(400, "GET", f"{COMPUTE}/zones/mars-west1-a/instances")


def test_service_account_of_an_instance_is_kept_with_its_scopes(client: Client) -> None:
    client.ok("POST", ACCOUNTS, {"accountId": "robot1"})
    account = {
        "email": "robot1@localcloud-dev.iam.gserviceaccount.com",
        "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
    }
    client.create(f"{ZONE}/instances", instance(serviceAccounts=[account]))
    assert client.ok("GET", f"{ZONE}/instances/vm")["serviceAccounts"] == [account]


def test_machine_type_is_changed_while_the_instance_is_stopped_and_at_no_other_time(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance())
    body = {"machineType": "zones/europe-west1-b/machineTypes/e2-medium"}
    assert "TERMINATED" in client.error(400, "POST", f"{ZONE}/instances/vm/setMachineType", body)
    client.create(f"{ZONE}/instances/vm/stop", None)
    unknown = {"machineType": "zones/europe-west1-b/machineTypes/e2-gigantic"}
    assert "does not exist" in client.error(400, "POST", f"{ZONE}/instances/vm/setMachineType", unknown)
    client.create(f"{ZONE}/instances/vm/setMachineType", body)
    client.create(f"{ZONE}/instances/vm/start", None)
    changed = client.ok("GET", f"{ZONE}/instances/vm")
    assert changed["machineType"] == f"{URL}/zones/europe-west1-b/machineTypes/e2-medium"
    assert changed["status"] == "RUNNING"


@pytest.mark.parametrize(
    "fields",
    [
        {"hostname": "vm"},
        {"hostname": "vm.example\nKRUSTLET_PORT=1"},
        {
            "disks": [
                {
                    "boot": True,
                    "initializeParams": {"sourceImage": "debian-cloud/debian-12", "diskName": "../x"},
                }
            ]
        },
    ],
)
def test_a_name_that_google_would_refuse_is_refused(client: Client, fields: dict[str, Any]) -> None:
    assert "Invalid value for field" in client.error(400, "POST", f"{ZONE}/instances", instance(**fields))


@pytest.mark.parametrize("address", ["garbage", "10.0.0.1", "::1"])
def test_an_address_that_is_none_of_loopback_is_refused(client: Client, address: str) -> None:
    client.error(400, "POST", f"{REGION}/addresses", {"name": "ip", "address": address})


def test_firewall_takes_sources_of_ipv6(client: Client) -> None:
    rule = {"name": "six", "allowed": [{"IPProtocol": "tcp"}], "sourceRanges": ["::/0"]}
    client.create(FIREWALLS, rule)
    client.error(400, "POST", FIREWALLS, {**rule, "name": "bad", "sourceRanges": ["::1/0"]})


def test_a_protected_instance_is_not_deleted(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance())
    client.create(f"{ZONE}/instances/vm/setDeletionProtection", None, query="deletionProtection=true")
    assert "protected against deletion" in client.error(400, "DELETE", f"{ZONE}/instances/vm")
    client.create(f"{ZONE}/instances/vm/setDeletionProtection", None, query="deletionProtection=false")
    assert "error" not in client.done(client.ok("DELETE", f"{ZONE}/instances/vm"))


def test_a_patch_may_say_again_what_is_there_with_links_as_they_were_shown(client: Client) -> None:
    client.create(FIREWALLS, {"name": "fw", "allowed": [{"IPProtocol": "tcp", "ports": ["80"]}]})
    shown = client.ok("GET", f"{FIREWALLS}/fw")
    client.done(client.ok("PATCH", f"{FIREWALLS}/fw", {**shown, "priority": 7}))
    assert client.ok("GET", f"{FIREWALLS}/fw")["priority"] == 7
    elsewhere = {"network": shown["network"].replace("default", "other")}
    assert "immutable" in client.error(400, "PATCH", f"{FIREWALLS}/fw", elsewhere)
