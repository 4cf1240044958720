"""The gcp stand-in: its tables against Google's own schemas, its checks and diffs, and the calls that it
makes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import googleapiclient
import pytest

from localcloud.plugins.gcp import tables
from localcloud.plugins.gcp.fields import Field, Form, same
from localcloud.plugins.gcp.provider import GcpProvider
from localcloud.plugins.gcp.resources import deadline_in
from localcloud.plugins.gcp.rest import Google, GoogleError, StillRunningError
from localcloud.plugins.gcp.tables import ResourceType
from localcloud.plugins.protocol import ProviderError, Resource
from localcloud.plugins.values import UNKNOWN, Properties, Secret

DOCUMENTS = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
SCHEMAS = {
    tables.REPOSITORY: ("artifactregistry.v1", "Repository"),
    tables.ACCOUNT: ("iam.v1", "ServiceAccount"),
    tables.NETWORK: ("compute.beta", "Network"),
    tables.SUBNETWORK: ("compute.beta", "Subnetwork"),
    tables.FIREWALL: ("compute.beta", "Firewall"),
    tables.ADDRESS: ("compute.beta", "Address"),
    tables.ROUTER: ("compute.beta", "Router"),
    tables.ROUTER_NAT: ("compute.beta", "RouterNat"),
    tables.INSTANCE: ("compute.beta", "Instance"),
    tables.DISK: ("compute.beta", "Disk"),
    tables.CLUSTER: ("container.v1beta1", "Cluster"),
    tables.NODE_POOL: ("container.v1beta1", "NodePool"),
}
JSON_TYPES = {
    "a string": "string",
    "an integer": "integer",
    "a whole number": "string",
    "a boolean": "boolean",
    "a map of strings": "object",
    "a list of strings": "array",
}


class Recorder:
    """Google as far as a test needs it: answers by path, and what was asked."""

    def __init__(self, *, creates: str = "", **answers: Any) -> None:
        self.creates = creates  # what is there only after the first request
        self.answers = answers
        self.calls: list[tuple[str, str, Any]] = []
        self.queries: list[Any] = []
        self.cancelled = GcpProvider().cancelled
        self.labels: Mapping[str, str] = {}

    def get(self, service: str, path: str, query: Any = None) -> Any:  # noqa: ARG002
        if self.creates and path.endswith(self.creates) and not self.calls:
            return None
        found = [v for k, v in self.answers.items() if path.endswith(k.replace("__", "/"))]
        return found[0] if found else None

    def call(self, service: str, method: str, path: str, body: Any = None, query: Any = None) -> Any:  # noqa: ARG002
        self.calls.append((method, path, body))
        self.queries.append(query)
        answer = self.answers.get(method, {})
        if isinstance(answer, Exception):
            raise answer
        return answer

    def operate(  # noqa: PLR0917
        self,
        service: str,
        method: str,
        path: str,
        deadline: float,  # noqa: ARG002
        body: Any = None,
        query: Any = None,
    ) -> Any:
        return self.call(service, method, path, body, query)


def provider(google: Recorder | None = None) -> GcpProvider:
    made = GcpProvider()
    made.configure({"project": "p", "region": "europe-west1", "zone": "europe-west1-b"})
    if google:
        made._google = google  # type: ignore[assignment]
    return made


def resource(spec: ResourceType, resource_id: str = "") -> Resource:
    return Resource(f"urn:pulumi:dev::p::{spec.token}::it", resource_id)


def problems(spec: ResourceType, inputs: Properties) -> dict[str, str]:
    failures = provider().check(resource(spec), {}, inputs, b"1234").failures
    return {".".join(map(str, f.path)): f.reason for f in failures}


INSTANCE: Properties = {
    "name": "vm",
    "machineType": "e2-small",
    "bootDisk": {"initializeParams": {"image": "debian-cloud/debian-12", "size": 10}},
    "networkInterfaces": [{"subnetwork": "sub", "accessConfigs": [{"natIp": "1.2.3.4"}]}],
    "metadata": {"k": "v"},
    "metadataStartupScript": "#!/bin/sh",
    "tags": ["t"],
    "serviceAccount": {"email": "e", "scopes": ["cloud-platform"]},
}
LIVE: Properties = {
    "id": "42",
    "name": "vm",
    "machineType": "https://x/projects/p/zones/europe-west1-b/machineTypes/e2-small",
    "metadata": {
        "fingerprint": "f1",
        "items": [{"key": "k", "value": "v"}, {"key": "startup-script", "value": "#!/bin/sh"}],
    },
    "tags": {"items": ["t"], "fingerprint": "f2"},
    "disks": [{"boot": True, "autoDelete": True, "deviceName": "d", "mode": "READ_WRITE"}],
    "networkInterfaces": [{"networkIP": "10.0.0.2", "accessConfigs": [{"natIP": "1.2.3.4"}]}],
    "labels": {"goog-pulumi-provisioned": "true"},
}


@pytest.mark.parametrize("spec", SCHEMAS, ids=lambda s: s.token.rsplit(":", 1)[-1])
def test_every_field_is_in_googles_schema_with_its_type(spec: ResourceType) -> None:
    document, root = SCHEMAS[spec]
    schemas = json.loads((DOCUMENTS / f"{document}.json").read_text())["schemas"]
    disk = {"bootDisk": "AttachedDisk", "serviceAccount": "ServiceAccount"}
    check_fields(spec.fields, schemas[root], schemas, disk if spec is tables.INSTANCE else {})


def check_fields(fields: tuple[Field, ...], schema: Any, schemas: Any, apart: dict[str, str]) -> None:
    for declared in fields:
        place = schema
        for part in declared.path:
            assert part in place["properties"], f"{schema['id']} has no {part} ({declared.name})"
            place = place["properties"][part]
            place = schemas[place["$ref"]] if "$ref" in place else place
        if declared.name in apart:
            place = schemas[apart[declared.name]]
        elif not declared.path:
            continue
        if declared.fields:
            items = place.get("items", {})
            inner = schemas[items["$ref"]] if "$ref" in items else items or place
            check_fields(declared.fields, {"id": declared.name, **inner}, schemas, {})
        elif not declared.output:
            assert place["type"] == JSON_TYPES[declared.type.value], declared.name


def test_wrong_inputs_are_refused_by_place() -> None:
    assert problems(tables.INSTANCE, INSTANCE) == {}
    wrong = {
        **INSTANCE,
        "machineTyp": "x",
        "bootDisk": {"mode": "RW", "initializeParams": {"size": "ten"}},
        "networkInterfaces": [{"netwrk": "n"}],
        "metadata": {"a": 1},
    }
    assert set(problems(tables.INSTANCE, wrong)) == {
        "machineTyp",
        "bootDisk.mode",
        "bootDisk.initializeParams.size",
        "networkInterfaces.0.netwrk",
        "metadata",
    }
    assert "missing required property" in problems(tables.REPOSITORY, {"format": "DOCKER"})["repositoryId"]


def test_rules_over_several_inputs() -> None:
    rule = {"network": "n", "allows": [{"protocol": "tcp"}]}
    assert "sourceRanges" in problems(tables.FIREWALL, rule)[""]
    assert problems(tables.FIREWALL, {**rule, "sourceRanges": UNKNOWN}) == {}
    both = {**INSTANCE, "metadata": {"startup-script": "x"}}
    assert "give it once" in problems(tables.INSTANCE, both)["metadataStartupScript"]


def test_a_missing_project_says_where_to_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_PROJECT", "GOOGLE_CLOUD_PROJECT", "GCLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    made = GcpProvider()
    made.configure({})
    failures = made.check(resource(tables.NETWORK), {}, {"name": "n"}, b"1").failures
    assert [(f.path, f.reason) for f in failures] == [
        (("project",), "missing; set it on the resource, or gcp:project")
    ]


def test_a_name_is_made_up_once_and_kept() -> None:
    first = provider().check(resource(tables.NETWORK), {}, {}, bytes.fromhex("0123456789")).inputs
    assert first == {"name": "it-0123456", "__defaults": ["name"]}
    assert provider().check(resource(tables.NETWORK), first, {}, b"other").inputs == first


def test_an_endpoint_must_end_with_its_version() -> None:
    made = provider()
    assert made.check_config({"computeCustomEndpoint": "http://127.0.0.1:1/compute/beta/"}).failures == []
    failures = made.check_config({"computeCustomEndpoint": "http://127.0.0.1", "projct": "p"}).failures
    assert [f.path for f in failures] == [("computeCustomEndpoint",), ("projct",)]


def test_a_type_that_is_not_served_is_refused_by_name() -> None:
    token = "gcp:storage/bucket:Bucket"
    with pytest.raises(
        ProviderError, match=rf"{token} is not served .*gcp:compute/network:Network.*official plugin"
    ):
        provider().check(Resource(f"urn:pulumi:dev::p::{token}::it"), {}, {}, b"1")


@pytest.mark.parametrize(
    ("change", "replaces"),
    [
        ({"metadata": {"k": "w"}}, False),
        ({"tags": []}, False),
        ({"metadataStartupScript": "other"}, True),
        ({"bootDisk": {"initializeParams": {"image": "x", "size": 10}}}, True),
    ],
)
def test_what_replaces_an_instance(change: Properties, replaces: bool) -> None:
    diff = provider().diff(resource(tables.INSTANCE), {}, INSTANCE, {**INSTANCE, **change})
    assert diff.changes
    assert bool(diff.replace) == replaces == diff.delete_before_replace


@pytest.mark.parametrize(
    ("spec", "old", "new", "first"),
    [
        (tables.NETWORK, {"name": "n", "description": "a"}, {"name": "n", "description": "b"}, True),
        (tables.NETWORK, {"name": "n"}, {"name": "m"}, True),
        (tables.NETWORK, {"name": "n-1", "__defaults": ["name"]}, {"name": "m"}, True),
        (
            tables.NETWORK,
            {"name": "n-1", "description": "a", "__defaults": ["name"]},
            {"name": "n-1", "description": "b", "__defaults": ["name"]},
            False,
        ),
        (tables.REPOSITORY, {"repositoryId": "r"}, {"repositoryId": "s"}, False),
        (tables.ACCOUNT, {"accountId": "a"}, {"accountId": "b"}, False),
        (tables.REPOSITORY_IAM_MEMBER, {"member": "user:a"}, {"member": "user:b"}, False),
        (tables.PROJECT_IAM_MEMBER, {"role": "roles/a"}, {"role": "roles/b"}, False),
    ],
)
def test_only_what_the_plugin_could_have_named_and_did_not_is_deleted_first(
    spec: ResourceType, old: Properties, new: Properties, first: bool
) -> None:
    """`nameRequiresDeleteBeforeReplace` of pulumi-terraform-bridge."""
    diff = provider().diff(resource(spec), {}, old, new)
    assert diff.replace
    assert diff.delete_before_replace == first


def test_saying_what_is_there_anyway_is_no_change() -> None:
    old, state = {"name": "n"}, {"name": "n", "autoCreateSubnetworks": True, "mtu": 1460}
    spelled = {**old, "autoCreateSubnetworks": True, "mtu": 1460}
    assert provider().diff(resource(tables.NETWORK), state, old, spelled).changes == {}
    assert provider().diff(resource(tables.NETWORK), state, spelled, old).changes != {}


def test_an_instance_is_what_google_wants() -> None:
    google = Recorder(creates="instances/vm", instances__vm=LIVE)
    google.answers["global__images__family__debian-12"] = {"name": "debian-12-v1"}
    item, state = provider(google).create(
        resource(tables.INSTANCE), {**INSTANCE, "metadata": Secret({"k": "v"})}, preview=False
    )
    (method, path, body), *rest = google.calls
    assert (method, path, rest) == ("POST", "projects/p/zones/europe-west1-b/instances", [])
    assert body["machineType"] == "zones/europe-west1-b/machineTypes/e2-small"
    assert body["disks"][0]["initializeParams"] == {
        "sourceImage": "projects/debian-cloud/global/images/family/debian-12",
        "diskSizeGb": "10",
    }
    assert body["networkInterfaces"] == [
        {
            "subnetwork": "projects/p/regions/europe-west1/subnetworks/sub",
            "accessConfigs": [{"natIP": "1.2.3.4", "type": "ONE_TO_ONE_NAT"}],
        }
    ]
    assert [i["key"] for i in body["metadata"]["items"]] == ["k", "startup-script"]
    assert body["serviceAccounts"][0]["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]
    assert body["labels"] == {"goog-pulumi-provisioned": "true"}
    assert item == "projects/p/zones/europe-west1-b/instances/vm"
    assert state["networkInterfaces"][0]["accessConfigs"] == [{"natIp": "1.2.3.4"}]
    assert (state["instanceId"], state["metadata"]) == ("42", Secret({"k": "v"}))


def test_an_image_that_is_nowhere_is_named() -> None:
    with pytest.raises(ProviderError, match="no image and no image family 'debian-cloud/debian-12'"):
        provider(Recorder()).create(resource(tables.INSTANCE), INSTANCE, preview=False)


def test_metadata_changes_in_place_with_the_fingerprint() -> None:
    google = Recorder(instances__vm=LIVE)
    item = "projects/p/zones/europe-west1-b/instances/vm"
    new = {**INSTANCE, "metadata": {"k": "w"}}
    provider(google).update(resource(tables.INSTANCE, item), {}, INSTANCE, new, preview=False)
    items = [{"key": "k", "value": "w"}, {"key": "startup-script", "value": "#!/bin/sh"}]
    assert google.calls == [("POST", f"{item}/setMetadata", {"items": items, "fingerprint": "f1"})]


def test_a_preview_knows_what_it_can_and_asks_nobody() -> None:
    google = Recorder()
    _, state = provider(google).create(resource(tables.ADDRESS), {"name": "a"}, preview=True)
    assert (state["name"], state["region"], state["address"]) == ("a", "europe-west1", UNKNOWN)
    assert google.calls == []


def test_a_repository_is_patched_with_a_mask() -> None:
    google = Recorder(
        repositories__r={"name": "projects/p/locations/l/repositories/r", "registryUri": "h/p/r"}
    )
    item = "projects/p/locations/europe-west1/repositories/r"
    old = {"repositoryId": "r", "format": "DOCKER", "description": "d", "labels": {"a": "b"}}
    new = {"repositoryId": "r", "format": "DOCKER", "labels": {"a": "c"}}
    state = provider(google).update(resource(tables.REPOSITORY, item), {}, old, new, preview=False)
    labels = {"a": "c", "goog-pulumi-provisioned": "true"}
    assert google.calls == [("PATCH", item, {"description": "", "labels": labels})]
    assert google.queries == [{"updateMask": "description,labels"}]
    assert (state["registryUri"], state["name"]) == ("h/p/r", "r")


def test_a_member_is_added_to_the_policy_that_is_there() -> None:
    other = {"role": "roles/x", "members": ["user:a"]}
    google = Recorder(GET={"etag": "e", "bindings": [other]})
    inputs = {"repository": "r", "role": "roles/artifactregistry.reader", "member": "serviceAccount:s"}
    item, _ = provider(google).create(resource(tables.REPOSITORY_IAM_MEMBER), inputs, preview=False)
    repository = "projects/p/locations/europe-west1/repositories/r"
    assert item == f"{repository}/roles/artifactregistry.reader/serviceAccount:s"
    (_, _, body) = next(c for c in google.calls if c[0] == "POST")
    assert body["policy"]["etag"] == "e"
    assert body["policy"]["bindings"] == [
        other,
        {"role": "roles/artifactregistry.reader", "members": ["serviceAccount:s"]},
    ]


def test_a_member_of_a_project_is_added_and_taken_away_beside_the_others() -> None:
    other = {"role": "roles/x", "members": ["user:a"]}
    own = {"role": "projects/p/roles/mine", "members": ["serviceAccount:s", "user:a"]}
    google = Recorder(POST={"etag": "e", "bindings": [other, own]})
    spec = resource(tables.PROJECT_IAM_MEMBER)
    inputs = {"project": "p", "role": "projects/p/roles/mine", "member": "serviceAccount:s"}
    item, _ = provider(google).create(spec, inputs, preview=False)
    assert item == "p/projects/p/roles/mine/serviceAccount:s"
    provider(google).delete(resource(tables.PROJECT_IAM_MEMBER, item), {}, {})
    written = [body["policy"] for _, path, body in google.calls if path == "projects/p:setIamPolicy"]
    assert [policy["etag"] for policy in written] == ["e", "e"]
    assert written[-1]["bindings"] == [other, {**own, "members": ["user:a"]}]


@pytest.mark.parametrize("state", ["ENABLED", "DISABLED"])
def test_a_service_is_enabled_where_it_is_not_and_never_disabled(state: str) -> None:
    google = Recorder(services__compute={"state": state})
    item, made = "p/compute", {"project": "p", "service": "compute", "disableOnDestroy": False}
    served = provider(google)._served(resource(tables.SERVICE))
    served.create(made, made, 0)
    served.delete(item, made, 0)
    wanted: list[Any] = [] if state == "ENABLED" else [("POST", "projects/p/services/compute:enable", {})]
    assert google.calls == wanted
    assert (served.read(item) is not None) is (state == "ENABLED")


@pytest.mark.parametrize(
    ("before", "after", "sent"),
    [
        (
            None,
            [{"cidrBlock": "192.0.2.0/24"}],
            {"enabled": True, "cidrBlocks": [{"cidrBlock": "192.0.2.0/24"}]},
        ),
        ([{"cidrBlock": "192.0.2.0/24"}], [], {"enabled": True, "cidrBlocks": []}),
        ([{"cidrBlock": "192.0.2.0/24"}], None, {"enabled": False}),
    ],
)
def test_who_may_reach_a_cluster_is_changed_and_opened_again(before: Any, after: Any, sent: Any) -> None:
    key, item = "masterAuthorizedNetworksConfig", "projects/p/locations/z/clusters/c"
    google = Recorder(clusters__c={"name": "c", key: sent})
    old, new = ({"name": "c", **({key: {"cidrBlocks": v}} if v is not None else {})} for v in (before, after))
    state = provider(google).update(resource(tables.CLUSTER, item), {}, old, new, preview=False)
    assert google.calls == [("PUT", item, {"update": {f"desired{key[0].upper()}{key[1:]}": sent}})]
    assert (key in state) is sent["enabled"]


@pytest.mark.parametrize(("before", "after"), [(None, "03:00"), ("03:00", "04:30"), ("03:00", None)])
def test_when_a_cluster_may_be_upgraded_is_changed_and_left_to_google_again(
    before: str | None, after: str | None
) -> None:
    def given(start: str | None) -> Properties:
        window: Properties = {"dailyMaintenanceWindow": {"startTime": start}}
        return {"name": "c"} | ({"maintenancePolicy": window} if start else {})

    item = "projects/p/locations/z/clusters/c"
    wanted: dict[str, Any] = {"window": {"dailyMaintenanceWindow": {"startTime": after}}} if after else {}
    google = Recorder(clusters__c={"name": "c", "maintenancePolicy": {**wanted, "resourceVersion": "v"}})
    state = provider(google).update(
        resource(tables.CLUSTER, item), {}, given(before), given(after), preview=False
    )
    sent = {"maintenancePolicy": {**wanted, "resourceVersion": "v"}}
    assert google.calls == [("POST", f"{item}:setMaintenancePolicy", sent)]
    assert state.get("maintenancePolicy") == given(after).get("maintenancePolicy")


def test_a_protected_cluster_is_not_deleted() -> None:
    google = Recorder()
    item = "projects/p/locations/europe-west1-b/clusters/c"
    with pytest.raises(
        ProviderError, match="cannot destroy cluster c without setting deletionProtection to false"
    ):
        provider(google).delete(resource(tables.CLUSTER, item), {}, {})
    provider(google).delete(resource(tables.CLUSTER, item), {"deletionProtection": False}, {})
    assert google.calls == [("DELETE", item, None)]


POOL = "projects/p/locations/europe-west1-b/clusters/c/nodePools/linux"
POOL_INPUTS: Properties = {
    "name": "linux",
    "cluster": "projects/p/locations/europe-west1-b/clusters/c",
    "nodeCount": 1,
    "nodeConfig": {"machineType": "e2-small", "labels": {"a": "b"}},
}


def group(name: str) -> str:
    return f"https://www.googleapis.com/compute/v1/projects/p/zones/z/instanceGroupManagers/{name}"


def test_a_node_pool_is_made_in_its_cluster_and_counts_what_its_groups_are_to_have() -> None:
    live = {
        "name": "linux",
        "instanceGroupUrls": [group("one"), group("two")],
        "config": {"labels": {"a": "b"}},
    }
    google = Recorder(
        creates="nodePools/linux", nodePools__linux=live, one={"targetSize": 2}, two={"targetSize": 2}
    )
    item, state = provider(google).create(resource(tables.NODE_POOL), POOL_INPUTS, preview=False)
    config = {"machineType": "e2-small", "labels": {"a": "b"}}
    parent = POOL.removesuffix("/nodePools/linux")
    body = {"parent": parent, "nodePool": {"name": "linux", "initialNodeCount": 1, "config": config}}
    assert google.calls == [("POST", f"{parent}/nodePools", body)]
    assert (item, state["nodeCount"], state["cluster"]) == (POOL, 2, POOL_INPUTS["cluster"])
    both = {**POOL_INPUTS, "initialNodeCount": 1}
    assert "give one of them" in problems(tables.NODE_POOL, both)["nodeCount"]


@pytest.mark.parametrize(
    ("change", "method", "path", "body"),
    [
        ({"nodeCount": 3}, "POST", f"{POOL}:setSize", {"nodeCount": 3}),
        (
            {"networkConfig": {"enablePrivateNodes": True}},
            "PUT",
            POOL,
            {"nodeNetworkConfig": {"enablePrivateNodes": True}},
        ),
        (
            {"management": {"autoRepair": True, "autoUpgrade": False}},
            "POST",
            f"{POOL}:setManagement",
            {"management": {"autoRepair": True, "autoUpgrade": False}},
        ),
        (
            {"autoscaling": {"minNodeCount": 1, "maxNodeCount": 3}},
            "PUT",
            POOL.removesuffix("/nodePools/linux"),
            {
                "update": {
                    "desiredNodePoolId": "linux",
                    "desiredNodePoolAutoscaling": {"enabled": True, "minNodeCount": 1, "maxNodeCount": 3},
                }
            },
        ),
        (
            {"nodeConfig": {"machineType": "e2-small", "labels": {"a": "c"}}},
            "PUT",
            POOL,
            {"labels": {"labels": {"a": "c"}}},
        ),
        ({"nodeConfig": {"machineType": "e2-small"}}, "PUT", POOL, {"labels": {}}),
        (
            {"nodeConfig": {"machineType": "e2-medium", "labels": {"a": "b"}}},
            "PUT",
            POOL,
            {"machineType": "e2-medium"},
        ),
        ({"nodeLocations": ["z"]}, "PUT", POOL, {"locations": ["z"]}),
    ],
)
def test_a_node_pool_is_changed_in_place(change: Properties, method: str, path: str, body: Any) -> None:
    google = Recorder(nodePools__linux={"name": "linux", "initialNodeCount": 1})
    new = {**POOL_INPUTS, **change}
    provider(google).update(resource(tables.NODE_POOL, POOL), {}, POOL_INPUTS, new, preview=False)
    assert google.calls == [(method, path, body)]


DISKS = "projects/p/zones/europe-west1-b/disks"


def test_a_disk_grows_in_place_with_its_vm_and_without_one() -> None:
    google = Recorder(disks__d={"name": "d", "sizeGb": "10", "type": "x/pd-ssd", "users": ["vm"]})
    old, new = {"name": "d", "size": 10}, {"name": "d", "size": 20}
    provider(google).update(resource(tables.DISK, f"{DISKS}/d"), {}, old, new, preview=False)
    assert google.calls == [("POST", f"{DISKS}/d/resize", {"sizeGb": "20"})]

    boot = {"boot": True, "autoDelete": True, "deviceName": "d", "source": f"https://x/{DISKS}/vm"}
    google = Recorder(instances__vm={**LIVE, "disks": [boot]}, disks__vm={"sizeGb": "10", "labels": {}})
    larger = {**INSTANCE, "bootDisk": {"initializeParams": {"image": "debian-cloud/debian-12", "size": 20}}}
    item = "projects/p/zones/europe-west1-b/instances/vm"
    provider(google).update(resource(tables.INSTANCE, item), {}, INSTANCE, larger, preview=False)
    assert google.calls == [("POST", f"{DISKS}/vm/resize", {"sizeGb": "20"})]


def test_what_needs_a_stopped_vm_is_refused_by_the_preview_already() -> None:
    google = Recorder(instances__vm={**LIVE, "status": "RUNNING"})
    item = "projects/p/zones/europe-west1-b/instances/vm"
    new = {**INSTANCE, "shieldedInstanceConfig": {"enableSecureBoot": True}}
    with pytest.raises(ProviderError, match="changing shieldedInstanceConfig needs a stopped instance"):
        provider(google).update(resource(tables.INSTANCE, item), {}, INSTANCE, new, preview=True)
    assert google.calls == []
    new["allowStoppingForUpdate"] = True
    provider(google).update(resource(tables.INSTANCE, item), {}, INSTANCE, new, preview=False)
    verbs = [path.rsplit("/", 1)[-1] for _, path, _ in google.calls]
    assert verbs == ["stop", "updateShieldedInstanceConfig", "start"]


@pytest.mark.parametrize(("policy", "called"), [("DELETE", 1), ("ABANDON", 0)])
def test_a_deletion_policy_decides_what_a_deletion_does(policy: str, called: int) -> None:
    google = Recorder()
    state = {"name": "n", "deletionPolicy": policy}
    provider(google).delete(resource(tables.NETWORK, "projects/p/global/networks/n"), state, {})
    assert len(google.calls) == called
    with pytest.raises(ProviderError, match="deletionPolicy is PREVENT"):
        provider(google).delete(resource(tables.NETWORK, "n"), {"deletionPolicy": "PREVENT"}, {})


def test_a_resource_that_is_gone_is_noticed_and_deleting_it_is_fine() -> None:
    google = Recorder(DELETE=GoogleError(404, "not found"))
    item = "projects/p/global/networks/n"
    assert (
        provider(google).read(resource(tables.NETWORK, item), {"name": "n"}, {"name": "n"}).resource_id == ""
    )
    provider(google).delete(resource(tables.NETWORK, item), {}, {})


def test_a_refresh_sees_drift_but_not_another_spelling() -> None:
    live = {
        "name": "f",
        "network": "https://x/projects/p/global/networks/n",
        "priority": 1000,
        "allowed": [{"IPProtocol": "tcp"}],
    }
    google = Recorder(firewalls__f=live)
    item = "projects/p/global/firewalls/f"
    inputs = {"name": "f", "network": "n", "allows": [{"protocol": "tcp"}]}
    state = {**inputs, "network": live["network"]}
    assert provider(google).read(resource(tables.FIREWALL, item), state, inputs).inputs == inputs
    live["allowed"] = [{"IPProtocol": "udp"}]
    read = provider(google).read(resource(tables.FIREWALL, item), state, inputs)
    assert read.inputs == {**inputs, "allows": [{"protocol": "udp"}]}


def test_an_import_takes_project_and_place_from_the_id() -> None:
    google = Recorder(addresses__a={"name": "a", "address": "1.2.3.4", "addressType": "EXTERNAL"})
    read = provider(google).read(resource(tables.ADDRESS, "projects/q/regions/r/addresses/a"), {}, {})
    assert read.inputs == {
        "project": "q",
        "region": "r",
        "name": "a",
        "address": "1.2.3.4",
        "addressType": "EXTERNAL",
    }


def test_the_client_configuration_has_a_secret_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "t")
    result = provider().invoke("gcp:organizations/getClientConfig:getClientConfig", {})
    assert (result["project"], result["accessToken"]) == ("p", Secret("t"))
    with pytest.raises(ProviderError, match="getProject is not served"):
        provider().invoke("gcp:organizations/getProject:getProject", {})


def test_a_region_has_the_zones_that_google_says() -> None:
    google = Recorder(GET={"items": [{"name": "r-b"}, {"name": "r-a"}]})
    found = provider(google).invoke("gcp:compute/getZones:getZones", {"region": "r", "status": "UP"})
    assert (found["names"], found["id"]) == (["r-a", "r-b"], "projects/p/regions/r")
    assert google.calls == [("GET", "projects/p/zones", None)]
    assert google.queries == [{"filter": "(region eq '.*/regions/r') (status eq UP)"}]


RUNNING = {"name": "operation-1", "status": "RUNNING"}


class Answers(Google):
    """Google with prepared answers, one a request."""

    def __init__(self, *answers: Any) -> None:
        super().__init__({})
        self.answers = list(answers)
        self.calls: list[tuple[str, str]] = []

    def call(self, service: str, method: str, path: str, body: Any = None, query: Any = None) -> Any:  # noqa: ARG002
        self.calls.append((method, path))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_an_operation_is_waited_for_though_nobody_answers_for_a_while() -> None:
    away = ProviderError("cannot be reached")
    google = Answers(RUNNING, away, GoogleError(503, "overloaded"), RUNNING, {**RUNNING, "status": "DONE"})
    operation = google.operate("compute", "POST", "projects/p/zones/z/instances", deadline_in(30))
    assert operation["status"] == "DONE"
    assert google.calls[-1] == ("GET", "projects/p/zones/z/operations/operation-1")


def test_an_operation_that_cannot_be_asked_about_may_still_come_to_its_end() -> None:
    google = Answers(RUNNING, GoogleError(403, "no"))
    with pytest.raises(StillRunningError, match="cannot be followed; googleapi: Error 403: no"):
        google.operate("compute", "POST", "projects/p/zones/z/instances", deadline_in(30))


def test_a_cluster_that_could_not_be_made_is_not_left_in_the_way_of_the_next_one() -> None:
    failed = {"name": "operation-1", "status": "DONE", "error": {"code": 13, "message": "no etcd"}}
    gone = GoogleError(404, "Not found")
    google = Answers(gone, failed, {"name": "operation-2", "status": "DONE"}, gone)
    made = provider()
    made._google = google
    inputs: Properties = {"name": "c", "location": "europe-west1-b", "initialNodeCount": 1}
    with pytest.raises(ProviderError, match="creating Cluster c: googleapi: Error 13: no etcd"):
        made.create(resource(tables.CLUSTER), inputs, preview=False)
    assert google.calls[-2:] == [
        ("DELETE", "projects/p/locations/europe-west1-b/clusters/c"),
        ("GET", "projects/p/locations/europe-west1-b/clusters/c"),
    ]


@pytest.mark.parametrize(
    "answers", [[{"name": "c"}], [GoogleError(404, "Not found"), GoogleError(409, "Already exists")]]
)
def test_a_cluster_of_that_name_that_was_there_before_is_not_touched(answers: list[Any]) -> None:
    google = Answers(*answers)
    made = provider()
    made._google = google
    inputs: Properties = {"name": "c", "location": "europe-west1-b", "initialNodeCount": 1}
    with pytest.raises(ProviderError, match=r"[Aa]lready exists"):
        made.create(resource(tables.CLUSTER), inputs, preview=False)
    assert "DELETE" not in [method for method, _ in google.calls]


def test_an_operation_shows_its_name_status_and_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(float(t) for second in range(40) for t in (second, second))])
    monkeypatch.setattr("localcloud.plugins.gcp.rest.time.monotonic", lambda: next(clock))
    running = {"name": "operation-1", "operationType": "insert", "status": "RUNNING", "progress": 0}
    later = {**running, "progress": 40, "statusMessage": "Booting"}
    google = Answers(*[running] * 4, *[later] * 14, {**later, "status": "DONE"})
    shown: list[str] = []
    google.tell = shown.append
    monkeypatch.setattr(google.cancelled, "wait", lambda _: False)
    google.follow("compute", running, "projects/p/zones/z/instances/vm", 1000)
    assert shown == [
        "waiting for insert operation-1: RUNNING 0 %, for 1 s now",
        "waiting for insert operation-1: RUNNING 40 % (Booting), for 5 s now",
        "waiting for insert operation-1: RUNNING 40 % (Booting), for 15 s now",
    ]


MEMBER = "roles/artifactregistry.reader serviceAccount:a@p.iam.gserviceaccount.com"
IMPORTED = [
    (tables.NETWORK, "projects/p/global/networks/n", ["p/n", "n"]),
    (tables.FIREWALL, "projects/p/global/firewalls/n", ["p/n", "n"]),
    (
        tables.SUBNETWORK,
        "projects/p/regions/europe-west1/subnetworks/n",
        ["p/europe-west1/n", "europe-west1/n", "n"],
    ),
    (
        tables.ADDRESS,
        "projects/p/regions/europe-west1/addresses/n",
        ["p/europe-west1/n", "europe-west1/n", "n"],
    ),
    (
        tables.ROUTER,
        "projects/p/regions/europe-west1/routers/n",
        ["p/europe-west1/n", "europe-west1/n", "n"],
    ),
    (
        tables.ROUTER_NAT,
        "p/europe-west1/r/n",
        ["projects/p/regions/europe-west1/routers/r/n", "europe-west1/r/n", "r/n"],
    ),
    (tables.DISK, "projects/p/zones/europe-west1-b/disks/n", ["p/europe-west1-b/n", "europe-west1-b/n", "n"]),
    (tables.INSTANCE, "projects/p/zones/europe-west1-b/instances/n", ["p/europe-west1-b/n", "n"]),
    (tables.CLUSTER, "projects/p/locations/l/clusters/c", ["p/l/c", "l/c"]),
    (tables.NODE_POOL, "projects/p/locations/l/clusters/c/nodePools/n", ["p/l/c/n", "l/c/n"]),
    (tables.REPOSITORY, "projects/p/locations/europe-west1/repositories/r", ["p/europe-west1/r", "r"]),
    (
        tables.ACCOUNT,
        "projects/p/serviceAccounts/a@p.iam.gserviceaccount.com",
        ["p/a@p.iam.gserviceaccount.com"],
    ),
    (
        tables.REPOSITORY_IAM_MEMBER,
        f"projects/p/locations/europe-west1/repositories/r/{MEMBER.replace(' ', '/')}",
        [
            f"projects/p/locations/europe-west1/repositories/r {MEMBER}",
            f"p/europe-west1/r {MEMBER}",
            f"europe-west1/r {MEMBER}",
            f"r {MEMBER}",
        ],
    ),
    (tables.PROJECT_IAM_MEMBER, f"p/{MEMBER.replace(' ', '/')}", [f"p {MEMBER}"]),
    (tables.SERVICE, "p/compute.googleapis.com", ["compute.googleapis.com"]),
]


@pytest.mark.parametrize(("spec", "item", "shorter"), IMPORTED, ids=lambda v: getattr(v, "token", None))
def test_an_import_takes_every_form_of_an_id_that_the_official_plugin_takes(
    spec: ResourceType, item: str, shorter: list[str]
) -> None:
    made = provider(Recorder())
    served = made._served(resource(spec))
    scope = made._scope(spec, {})
    forms = [item, *shorter]
    if item.startswith("projects/") and spec.service == "compute":
        forms.append(f"https://www.googleapis.com/compute/v1/{item}")
    assert {served.full(form, scope) for form in forms} == {item}
    with pytest.raises(ProviderError, match="is no id of"):
        served.full("a/b/c/d/e/f/g", scope)


def test_every_type_that_is_served_can_be_imported() -> None:
    assert {spec.token for spec, _, _ in IMPORTED} == set(tables.TYPES)


LINK = "https://www.googleapis.com/compute/v1/projects/p"
IMAGE = f"{LINK.removesuffix('p')}debian-cloud/global/images/debian-12-bookworm-v20261101"


@pytest.mark.parametrize(
    ("form", "given", "answered", "equal"),
    [
        (Form.LINK, "n", f"{LINK}/global/networks/n", True),
        (Form.LINK, "projects/p/global/networks/n", f"{LINK}/global/networks/n", True),
        (Form.LINK, f"{LINK}/global/networks/n".replace("v1", "beta"), f"{LINK}/global/networks/n", True),
        (Form.LINK, "m", f"{LINK}/global/networks/n", False),
        (Form.LINK, "projects/q/global/networks/n", f"{LINK}/global/networks/n", False),
        (Form.IMAGE, "debian-cloud/debian-12", IMAGE, True),
        (Form.IMAGE, "debian-12", IMAGE, True),
        (Form.IMAGE, "projects/debian-cloud/global/images/family/debian-12", IMAGE, True),
        (Form.IMAGE, IMAGE, IMAGE, True),
        (Form.IMAGE, "debian-cloud/debian-1", IMAGE, False),
        (Form.IMAGE, "debian-cloud/debian-13", IMAGE, False),
        (Form.IMAGE, "other-cloud/debian-12", IMAGE, False),
    ],
)
def test_a_resource_is_the_same_in_each_way_to_name_it(
    form: Form, given: str, answered: str, equal: bool
) -> None:
    assert same(form, given, answered) == equal


def test_what_was_imported_needs_no_change_for_what_google_decided_or_writes_otherwise() -> None:
    disk = {
        "name": "vm",
        "sizeGb": "10",
        "type": f"{LINK}/zones/z/diskTypes/pd-standard",
        "sourceImage": IMAGE,
    }
    live = {
        **LIVE,
        "machineType": f"{LINK}/zones/europe-west1-b/machineTypes/e2-small",
        "disks": [{**LIVE["disks"][0], "source": f"{LINK}/zones/z/disks/vm"}],
        "networkInterfaces": [
            {
                "network": f"{LINK}/global/networks/n",
                "subnetwork": f"{LINK}/regions/europe-west1/subnetworks/sub",
                "networkIP": "10.0.0.2",
                "name": "nic0",
                "stackType": "IPV4_ONLY",
                "accessConfigs": [{"natIP": "1.2.3.4", "networkTier": "PREMIUM"}],
            }
        ],
    }
    made = provider(Recorder(instances__vm=live, disks__vm=disk))
    item = "projects/p/zones/europe-west1-b/instances/vm"
    imported = made.read(resource(tables.INSTANCE, item), {}, {})
    program = {
        "name": "vm",
        "machineType": "e2-small",
        "bootDisk": {"initializeParams": {"image": "debian-cloud/debian-12"}},
        "networkInterfaces": [{"subnetwork": "sub", "accessConfigs": [{}]}],
        "metadata": imported.inputs.get("metadata"),
        "tags": imported.inputs.get("tags"),
    }
    assert (
        made.diff(resource(tables.INSTANCE, item), imported.properties, imported.inputs, program).changes
        == {}
    )
