"""Kubernetes Engine, Artifact Registry and IAM."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.unit.localcloud_api.client import ACCOUNTS, CLUSTERS, COMPUTE, LOCATION, REPOSITORIES, Client


def _cluster(**fields: Any) -> dict[str, Any]:
    return {"cluster": {"name": "c1", "initialNodeCount": 1, **fields}}


def test_cluster_is_provisioning_and_then_running(client: Client) -> None:
    client.backends.gate.clear()
    operation = client.ok("POST", CLUSTERS, _cluster())
    assert (operation["status"], operation["operationType"]) == ("RUNNING", "CREATE_CLUSTER")
    body = client.ok("GET", f"{CLUSTERS}/c1")
    assert body["status"] == "PROVISIONING"
    assert "endpoint" not in body
    assert "incompatible operation" in client.error(400, "DELETE", f"{CLUSTERS}/c1")
    client.backends.gate.set()
    client.done(operation)
    body = client.ok("GET", f"{CLUSTERS}/c1")
    assert (body["status"], body["endpoint"]) == ("RUNNING", "127.0.0.1:6443")
    certificate = base64.b64decode(body["masterAuth"]["clusterCaCertificate"])
    assert certificate.startswith(b"-----BEGIN CERTIFICATE-----")
    assert body["networkConfig"]["network"] == "projects/localcloud-dev/global/networks/default"
    assert body["nodePools"][0]["name"] == "default-pool"
    assert body["currentMasterVersion"] == "1.37.2-gke.1000000"


def test_cluster_has_one_name_under_zones_locations_and_versions(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS.replace("/locations/", "/zones/"), _cluster()))
    body = client.ok("GET", f"{CLUSTERS}/c1")
    assert client.ok("GET", f"{CLUSTERS}/c1".replace("/locations/", "/zones/"))["id"] == body["id"]
    assert client.ok("GET", f"{CLUSTERS}/c1".replace("/v1/", "/v1beta1/"))["id"] == body["id"]
    everywhere = CLUSTERS.replace("europe-west1-b", "-")
    assert [item["name"] for item in client.ok("GET", everywhere)["clusters"]] == ["c1"]


@pytest.mark.parametrize(
    ("code", "fields", "message"),
    [
        (400, {"name": "Bad"}, 'Invalid value for field "cluster.name"'),
        (400, {"initialNodeCount": 0}, "initial_node_count must be greater than zero"),
        (400, {"initialClusterVersion": "1.12"}, 'No valid versions with the prefix "1.12" found'),
        (404, {"network": "none"}, "networks/none' was not found"),
        (400, {"nodePools": [{"name": "a"}]}, "can't be set when node_pools are specified"),
    ],
)
def test_cluster_that_google_refuses_is_refused(
    client: Client, code: int, fields: dict[str, Any], message: str
) -> None:
    assert message in client.error(code, "POST", CLUSTERS, _cluster(**fields))


def test_cluster_that_exists_or_does_not_is_named_as_google_does(client: Client) -> None:
    key = "projects/localcloud-dev/locations/europe-west1-b/clusters/c1"
    assert client.error(404, "GET", f"{CLUSTERS}/c1") == f"Not found: {key}."
    client.done(client.ok("POST", CLUSTERS, _cluster()))
    assert client.error(409, "POST", CLUSTERS, _cluster()) == f"Already exists: {key}."


def test_cluster_that_cannot_start_is_shown_in_error_and_can_be_deleted(client: Client) -> None:
    client.backends.fail = {"create_cluster"}
    operation = client.done(client.ok("POST", CLUSTERS, _cluster()))
    assert "failed on purpose" in operation["error"]["message"]
    body = client.ok("GET", f"{CLUSTERS}/c1")
    assert body["status"] == "ERROR"
    assert "failed on purpose" in body["statusMessage"]
    client.done(client.ok("DELETE", f"{CLUSTERS}/c1"))
    client.error(404, "GET", f"{CLUSTERS}/c1")
    assert client.backends.calls[-1] == ("delete_cluster", "c1")


def test_cluster_keeps_its_network(client: Client) -> None:
    client.done(client.ok("POST", f"{COMPUTE}/global/networks", {"name": "n", "autoCreateSubnetworks": True}))
    client.done(client.ok("POST", CLUSTERS, _cluster(network="n")))
    assert "clusters/c1" in client.error(400, "DELETE", f"{COMPUTE}/global/networks/n")


def test_a_clusters_maintenance_window_is_set_and_taken_back_and_a_stale_policy_is_refused(
    client: Client,
) -> None:
    def window(start: str) -> dict[str, Any]:
        return {"window": {"dailyMaintenanceWindow": {"startTime": start}}}

    assert "HH:MM" in client.error(400, "POST", CLUSTERS, _cluster(maintenancePolicy=window("3 am")))
    client.done(client.ok("POST", CLUSTERS, _cluster()))
    before = client.ok("GET", f"{CLUSTERS}/c1")["maintenancePolicy"]
    assert set(before) == {"resourceVersion"}
    for start in ("03:00", "23:59"):
        stale, before = before, client.ok("GET", f"{CLUSTERS}/c1")["maintenancePolicy"]
        policy = window(start) | {"resourceVersion": before["resourceVersion"]}
        body = {"maintenancePolicy": policy}
        client.done(client.ok("POST", f"{CLUSTERS}/c1:setMaintenancePolicy", body))
        shown = client.ok("GET", f"{CLUSTERS}/c1")["maintenancePolicy"]["window"]
        assert shown == {"dailyMaintenanceWindow": {"startTime": start, "duration": "PT4H0M0S"}}
    client.error(400, "POST", f"{CLUSTERS}/c1:setMaintenancePolicy", {"maintenancePolicy": stale})
    client.error(400, "POST", f"{CLUSTERS}/c1:setMaintenancePolicy", {"maintenancePolicy": window("24:00")})
    client.done(client.ok("POST", f"{CLUSTERS}/c1:setMaintenancePolicy", {"maintenancePolicy": {}}))
    assert "window" not in client.ok("GET", f"{CLUSTERS}/c1")["maintenancePolicy"]


def test_cluster_is_updated_by_desired_fields_and_by_labels(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, _cluster()))
    client.done(client.ok("PUT", f"{CLUSTERS}/c1", {"update": {"desiredLoggingService": "x.googleapis.com"}}))
    body = client.ok("GET", f"{CLUSTERS}/c1")
    assert body["loggingService"] == "x.googleapis.com"
    client.done(
        client.ok("PUT", f"{CLUSTERS}/c1", {"update": {"desiredDnsConfig": {"clusterDns": "CLOUD_DNS"}}})
    )
    network = client.ok("GET", f"{CLUSTERS}/c1")["networkConfig"]
    assert network["dnsConfig"] == {"clusterDns": "CLOUD_DNS"}
    assert network["network"].endswith("/networks/default")
    body = client.ok("GET", f"{CLUSTERS}/c1")
    stale = {"update": {"desiredLoggingService": "none", "etag": "old"}}
    client.error(409, "PUT", f"{CLUSTERS}/c1", stale)
    labels = {"resourceLabels": {"a": "b"}, "labelFingerprint": body["labelFingerprint"]}
    client.done(client.ok("POST", f"{CLUSTERS}/c1:setResourceLabels", labels))
    assert client.ok("GET", f"{CLUSTERS}/c1")["resourceLabels"] == {"a": "b"}
    assert "fingerprint" in client.error(400, "POST", f"{CLUSTERS}/c1:setResourceLabels", labels)


def test_node_pools_are_listed_and_deleted(client: Client) -> None:
    client.done(client.ok("POST", CLUSTERS, _cluster()))
    assert client.ok("GET", f"{CLUSTERS}/c1/nodePools/default-pool")["initialNodeCount"] == 1
    client.done(client.ok("DELETE", f"{CLUSTERS}/c1/nodePools/default-pool"))
    assert client.ok("GET", f"{CLUSTERS}/c1/nodePools") == {}
    client.error(404, "GET", f"{CLUSTERS}/c1/nodePools/default-pool")


def test_repository_is_made_by_an_operation_and_knows_its_registry(client: Client) -> None:
    body = {"format": "DOCKER", "labels": {"a": "b"}}
    operation = client.ok("POST", REPOSITORIES, body, query="repositoryId=app")
    assert operation["name"].startswith(f"{LOCATION}/operations/")
    response = client.done_registry(operation)["response"]
    assert response["@type"] == "type.googleapis.com/google.devtools.artifactregistry.v1.Repository"
    kept = client.ok("GET", f"{REPOSITORIES}/app")
    assert kept["registryUri"] == "127.0.0.1:5000/localcloud-dev/app"
    assert kept["name"] == response["name"] == f"{LOCATION}/repositories/app"
    assert (
        client.error(409, "POST", REPOSITORIES, body, query="repositoryId=app")
        == "the repository already exists"
    )
    assert client.ok("GET", f"{REPOSITORIES}/app".replace("/v1/", "/v1beta2/"))["name"] == kept["name"]
    client.done_registry(client.ok("DELETE", f"{REPOSITORIES}/app"))
    client.error(404, "GET", f"{REPOSITORIES}/app")
    assert client.backends.calls == [("ensure_registry", ""), ("delete_repository", "localcloud-dev/app")]


@pytest.mark.parametrize(
    ("code", "name", "fields"),
    [
        (400, "Bad", {"format": "DOCKER"}),
        (400, "", {"format": "DOCKER"}),
        (400, "app", {}),
        (501, "app", {"format": "MAVEN"}),
        (501, "app", {"format": "DOCKER", "mode": "REMOTE_REPOSITORY"}),
    ],
)
def test_repository_that_is_not_served_is_refused(
    client: Client, code: int, name: str, fields: dict[str, Any]
) -> None:
    client.error(code, "POST", REPOSITORIES, fields, query=f"repositoryId={name}")


def test_repository_named_gcr_io_is_taken(client: Client) -> None:
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=gcr.io"))
    assert client.ok("GET", f"{REPOSITORIES}/gcr.io")["registryUri"] == "127.0.0.1:5000/localcloud-dev/gcr.io"


def test_patch_changes_what_its_mask_names(client: Client) -> None:
    body = {"format": "DOCKER", "labels": {"a": "b"}, "description": "old"}
    client.done_registry(client.ok("POST", REPOSITORIES, body, query="repositoryId=app"))
    changed = client.ok(
        "PATCH", f"{REPOSITORIES}/app", {"description": "new"}, query="updateMask=description"
    )
    assert (changed["description"], changed["labels"]) == ("new", {"a": "b"})
    changed = client.ok("PATCH", f"{REPOSITORIES}/app", {}, query="updateMask=labels")
    assert "labels" not in changed
    client.error(400, "PATCH", f"{REPOSITORIES}/app", {"format": "DOCKER"}, query="updateMask=format")


def test_policy_needs_the_current_etag_and_existing_members(client: Client) -> None:
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    client.ok("POST", ACCOUNTS, {"accountId": "robot1"})
    path = f"{REPOSITORIES}/app"
    before = client.ok("GET", f"{path}:getIamPolicy")
    assert "bindings" not in before
    binding = {
        "role": "roles/artifactregistry.reader",
        "members": ["serviceAccount:robot1@localcloud-dev.iam.gserviceaccount.com"],
    }
    policy = {"policy": {"etag": before["etag"], "bindings": [binding, binding]}}
    after = client.ok("POST", f"{path}:setIamPolicy", policy)
    assert after["bindings"] == [binding]
    assert "concurrent policy changes" in client.error(409, "POST", f"{path}:setIamPolicy", policy)
    for role, member, message in (
        ("roles/nonsense", "allUsers", "is not supported for this resource"),
        (binding["role"], "serviceAccount:x@y.iam.gserviceaccount.com", "does not exist"),
        (binding["role"], "robot1", "Invalid member"),
    ):
        wrong = {"policy": {"bindings": [{"role": role, "members": [member]}]}}
        assert message in client.error(400, "POST", f"{path}:setIamPolicy", wrong)
    assert client.ok("GET", f"{path}:getIamPolicy") == after


def test_images_are_what_the_registry_has(client: Client) -> None:
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    manifest = {
        "name": "localcloud-dev/app/a/b",
        "digest": "sha256:" + "0" * 64,
        "tags": ["v1"],
        "size": 5,
        "blobs": [{"digest": "sha256:" + "0" * 64, "size": 5}],
        "media_type": "application/vnd.oci.image.manifest.v1+json",
        "uploaded": "2026-01-01T00:00:00Z",
    }
    client.backends.manifests = [manifest]
    image = client.ok("GET", f"{REPOSITORIES}/app/dockerImages")["dockerImages"][0]
    assert image["uri"] == f"127.0.0.1:5000/localcloud-dev/app/a/b@{manifest['digest']}"
    assert image["name"] == f"{LOCATION}/repositories/app/dockerImages/a%2Fb@{manifest['digest']}"
    assert client.ok("GET", f"/artifactregistry/v1/{image['name']}") == image


def test_service_account_lives_and_dies(client: Client) -> None:
    body = client.ok("POST", ACCOUNTS, {"accountId": "robot1", "serviceAccount": {"displayName": "Robot"}})
    email = "robot1@localcloud-dev.iam.gserviceaccount.com"
    assert body["email"] == email
    assert body["name"] == f"projects/localcloud-dev/serviceAccounts/{email}"
    message = client.error(409, "POST", ACCOUNTS, {"accountId": "robot1"})
    assert message == "Service account robot1 already exists within project projects/localcloud-dev."
    by_id = client.ok("GET", f"/iam/v1/projects/-/serviceAccounts/{body['uniqueId']}")
    assert by_id == body
    patch = {"serviceAccount": {"description": "d"}, "updateMask": "description"}
    changed = client.ok("PATCH", f"{ACCOUNTS}/{email}", patch)
    assert (changed["displayName"], changed["description"]) == ("Robot", "d")
    assert changed["etag"] != body["etag"]
    assert {item["email"] for item in client.ok("GET", ACCOUNTS)["accounts"]} > {email}
    assert client.ok("DELETE", f"{ACCOUNTS}/{email}") == {}
    assert client.error(404, "GET", f"{ACCOUNTS}/{email}") == f"Unknown service account: {email}"


def test_what_a_deleted_account_was_granted_is_not_the_next_ones(client: Client) -> None:
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    path, email = f"{REPOSITORIES}/app", "robot1@localcloud-dev.iam.gserviceaccount.com"
    account = client.ok("POST", ACCOUNTS, {"accountId": "robot1"})
    binding = {"role": "roles/artifactregistry.reader", "members": [f"serviceAccount:{email}"]}
    client.ok("POST", f"{path}:setIamPolicy", {"policy": {"bindings": [binding]}})
    client.ok("DELETE", f"{ACCOUNTS}/{email}")
    gone = f"deleted:serviceAccount:{email}?uid={account['uniqueId']}"
    shown = client.ok("GET", f"{path}:getIamPolicy")
    assert shown["bindings"][0]["members"] == [gone]
    # A policy that was read can be written again, as a client does that adds a member of its own.
    again = client.ok("POST", ACCOUNTS, {"accountId": "robot1"})
    assert again["uniqueId"] != account["uniqueId"]
    both = binding | {"members": [gone, f"serviceAccount:{email}"]}
    written = client.ok("POST", f"{path}:setIamPolicy", {"policy": shown | {"bindings": [both]}})
    assert written["bindings"][0]["members"] == sorted(both["members"])


@pytest.mark.parametrize("name", ["", "short", "Upper-case", "a" * 31, "ends-with-"])
def test_service_account_id_is_checked(client: Client, name: str) -> None:
    client.error(400, "POST", ACCOUNTS, {"accountId": name})
