"""Requests are checked as Google's front end checks them, before any handler sees them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from localcloud.api.discovery import SERVED, Method, document
from localcloud.api.service import TABLE
from tests.unit.localcloud_api.client import CLUSTERS, COMPUTE, REPOSITORIES, ZONE, Client, instance


def test_unknown_field_is_refused_with_googles_wording_and_its_place(client: Client) -> None:
    body = instance()
    body["networkInterfaces"][0]["subnetwrk"] = "x"
    body["colour"] = "red"
    message = client.error(400, "POST", f"{ZONE}/instances", body)
    assert message.splitlines() == [
        "Invalid JSON payload received. Unknown name \"subnetwrk\" at 'resource.network_interfaces[0]': "
        "Cannot find field.",
        "Invalid JSON payload received. Unknown name \"colour\" at 'resource': Cannot find field.",
    ]


def test_unknown_field_at_the_root_of_a_request_message_has_no_place(client: Client) -> None:
    message = client.error(400, "POST", CLUSTERS, {"klaster": {}})
    assert message == 'Invalid JSON payload received. Unknown name "klaster": Cannot find field.'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"canIpForward": "maybe"}, "Invalid value at 'resource.can_ip_forward' (TYPE_BOOL), \"maybe\""),
        ({"name": 7}, "Invalid value at 'resource.name' (TYPE_STRING), 7"),
        (
            {"tags": ["a"]},
            "Invalid value at 'resource.tags' (type.googleapis.com/google.cloud.compute.v1.Tags)",
        ),
        (
            {"scheduling": {"minNodeCpus": 2**40}},
            "Invalid value at 'resource.scheduling.min_node_cpus' (TYPE_INT32)",
        ),
        ({"privateIpv6GoogleAccess": "YES"}, 'PrivateIpv6GoogleAccess), "YES"'),
        ({"description": ["x"]}, "Proto field is not repeating, cannot start list."),
    ],
)
def test_wrong_type_or_enum_is_refused(client: Client, fields: dict[str, Any], message: str) -> None:
    assert message in client.error(400, "POST", f"{ZONE}/instances", instance(**fields))


@pytest.mark.parametrize(
    "content",
    [
        b'{"name": ',
        b"[1]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"labels":' * 500 + b"{}" + b"}" * 500,
        b'{"canIpForward": NaN}',
        # Stored, half of a surrogate pair would make every later list a 500.
        b'{"description": "\\ud800"}',
    ],
)
def test_what_is_no_json_object_is_refused(client: Client, content: bytes) -> None:
    assert client.error(400, "POST", f"{ZONE}/instances", content).startswith(
        "Invalid JSON payload received."
    )


def test_brackets_in_a_text_are_no_levels(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance(description='"[{\\' * 200))


@pytest.mark.parametrize("number", [b"1e400", b"9" * 400, b"9" * 5000, b"1.5", b'"x"', b"true"])
def test_what_is_no_whole_number_is_refused(client: Client, number: bytes) -> None:
    body = b'{"name": "f", "allowed": [{"IPProtocol": "tcp"}], "priority": ' + number + b"}"
    client.error(400, "POST", f"{COMPUTE}/global/firewalls", body)


@pytest.mark.parametrize(
    "query",
    [
        "filter=name eq (",
        "filter=name eq *",
        "filter=" + "(" * 5000,
        "filter=" + "NOT " * 5000 + "a=b",
        "fields=" + "a(" * 5000,
        "pageToken=LTU=",  # -5
        "pageToken=é",
    ],
)
def test_a_question_that_cannot_be_understood_is_refused(client: Client, query: str) -> None:
    client.error(400, "GET", f"{ZONE}/instances", query=quote(query, safe="="))


def test_missing_body_is_refused(client: Client) -> None:
    assert client.error(400, "POST", f"{ZONE}/instances") == "Required field 'resource' not specified"


def test_unknown_query_parameter_is_refused(client: Client) -> None:
    message = client.error(400, "GET", f"{ZONE}/instances", query="colour=red")
    assert 'Unknown name "colour": Cannot bind query parameter.' in message


def test_query_parameter_of_a_wrong_type_is_refused(client: Client) -> None:
    assert "(TYPE_UINT32)" in client.error(400, "GET", f"{ZONE}/instances", query="maxResults=many")


def test_field_that_only_google_writes_is_ignored(client: Client) -> None:
    client.create(f"{ZONE}/instances", instance(status="TERMINATED", id="5"))
    body = client.ok("GET", f"{ZONE}/instances/vm")
    assert body["status"] == "RUNNING"
    assert body["id"] != "5"


def test_beta_field_is_known_to_beta_alone(client: Client) -> None:
    body = {"name": "f", "allowed": [{"IPProtocol": "tcp"}], "enableLogging": True}
    path = f"{COMPUTE}/global/firewalls"
    assert 'Unknown name "enableLogging"' in client.error(400, "POST", path, body)
    client.ok("POST", path.replace("/v1/", "/beta/"), body)


def test_method_that_is_not_served_is_named(client: Client) -> None:
    message = client.error(501, "GET", f"{COMPUTE}/global/backendServices")
    assert message == "localcloud does not serve the method compute.backendServices.list"


@pytest.mark.parametrize(
    "path", ["/compute/v1/projects", "/compute/v9/projects/x", "/x/y/z", "/storage", "/"]
)
def test_path_that_google_does_not_have_is_404(client: Client, path: str) -> None:
    client.error(404, "GET", path)


def test_path_parameter_must_match_its_pattern(client: Client) -> None:
    message = client.error(400, "GET", f"{ZONE}/instances/Bad_Name")
    assert message.startswith("Invalid value for field 'instance': 'Bad_Name'. Must be a match of regex")


def test_another_project_is_refused(client: Client) -> None:
    message = client.error(404, "GET", "/compute/v1/projects/other/global/networks")
    assert message == "The resource 'projects/other' was not found"
    message = client.error(403, "GET", REPOSITORIES.replace("localcloud-dev", "other"))
    assert message == "Permission denied on resource project other."


def test_fields_select_a_part_of_the_response(client: Client) -> None:
    body = client.ok(
        "GET", f"{COMPUTE}/global/networks", query="fields=items(name,routingConfig/routingMode),kind"
    )
    assert body == {
        "items": [{"name": "default", "routingConfig": {"routingMode": "REGIONAL"}}],
        "kind": "compute#networkList",
    }
    client.error(400, "GET", f"{COMPUTE}/global/networks", query="fields=items(name")


VALUES = {
    "project": "localcloud-dev",
    "projectsId": "localcloud-dev",
    "projectId": "localcloud-dev",
    "zone": "europe-west1-b",
    "region": "europe-west1",
    "locationsId": "europe-west1",
}


def _served() -> Iterator[tuple[Method, str]]:
    """Every method that has a handler, with the path of something that is not there."""
    for found in (document(name, version) for name, version in sorted(SERVED)):
        for method in found.methods:
            if method.id in TABLE.handlers:
                flat = re.sub(r"\{\+?(\w+)\}", lambda part: VALUES.get(part[1], "no-one"), method.flat_path)
                yield method, f"/{found.prefix}{flat}"


def test_every_method_that_is_served_has_an_answer_to_an_empty_request(client: Client) -> None:
    served = list(_served())
    assert len({method.id for method, _ in served}) == len(TABLE.handlers)
    for method, path in served:
        status, answer = client.send(method.http_method, path, b"{}" if method.request else None)
        assert status in (200, 400, 404, 412), (method.id, answer)


@pytest.mark.parametrize(
    "path", ["/storage/v1/b", "/pubsub/v1/projects/x/topics", "/iam/v2/policies", "/apphub/v1/x"]
)
def test_a_product_that_is_not_served_is_named(client: Client, path: str) -> None:
    _, product, version, *_ = path.split("/")
    assert client.error(501, "GET", path) == f"localcloud does not serve the API {product} {version}"


def test_resource_manager_knows_the_one_project(client: Client) -> None:
    listed = client.ok("GET", "/cloudresourcemanager/v1/projects", query="filter=lifecycleState:ACTIVE")
    assert [project["projectId"] for project in listed["projects"]] == ["localcloud-dev"]
    assert client.ok("GET", "/cloudresourcemanager/v1/projects", query="filter=projectId:other") == {}
    number = listed["projects"][0]["projectNumber"]
    for name in ("localcloud-dev", number):
        assert client.ok("GET", f"/cloudresourcemanager/v1/projects/{name}")["projectNumber"] == number
        assert client.ok("GET", f"/cloudresourcemanager/v3/projects/{name}")["name"] == f"projects/{number}"
    assert client.ok("GET", "/cloudresourcemanager/v3/projects:search")["projects"][0]["state"] == "ACTIVE"
    client.error(403, "GET", "/cloudresourcemanager/v1/projects/other")
    policy = client.ok("POST", "/cloudresourcemanager/v1/projects/localcloud-dev:getIamPolicy", {})
    assert policy["bindings"][0]["role"] == "roles/owner"


def test_service_usage_has_what_is_served_enabled_and_enables_nothing_else(client: Client) -> None:
    services = "/serviceusage/v1/projects/localcloud-dev/services"
    listed = client.ok("GET", services, query="filter=state:ENABLED")["services"]
    names = {service["config"]["name"] for service in listed}
    assert {"compute.googleapis.com", "container.googleapis.com", "iam.googleapis.com"} <= names
    assert client.ok("GET", services, query="filter=state:DISABLED") == {}
    for name in sorted(names):
        done = client.ok("POST", f"{services}/{name}:enable", {})
        assert done["done"]
        assert done["response"]["service"] == client.ok("GET", f"{services}/{name}")
    batch = client.ok("POST", f"{services}:batchEnable", {"serviceIds": sorted(names)})
    assert len(batch["response"]["services"]) == len(names)
    other = "bigquery.googleapis.com"
    assert client.ok("GET", f"{services}/{other}")["state"] == "DISABLED"
    assert other in client.error(501, "POST", f"{services}/{other}:enable", {})
    assert other in client.error(501, "POST", f"{services}:batchEnable", {"serviceIds": [other]})
