"""The kubernetes stand-in's rules: checks, names, what replaces, what is ready, kubeconfigs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localcloud.plugins.kubernetes import ready
from localcloud.plugins.kubernetes.cluster import ApiError, Kind, Object, Unreachable, read_kubeconfig
from localcloud.plugins.kubernetes.provider import KubernetesProvider, _manager
from localcloud.plugins.protocol import InitFailedError, ProviderError, Resource
from localcloud.plugins.values import UNKNOWN, Properties, Secret

POD = Kind("v1", "Pod")
RESOURCE = Resource("urn:pulumi:dev::p::kubernetes:core/v1:Pod::web", "demo/web")
SEED = bytes.fromhex("0123456789abcdef")


class OneCluster:
    """A cluster in memory that knows one object; `next` are the states that it will go through."""

    default_namespace = "demo"

    def __init__(self) -> None:
        self.live: Object | None = None
        self.next: list[Object | None] = []
        self.refuses: ApiError | None = None
        self.applied: list[tuple[str, bool]] = []
        self.tried: list[Object] = []

    def namespaced(self, kind: Kind) -> bool:
        return kind.kind != "Namespace"

    def get(self, *_: object) -> Object | None:
        return self.live

    def apply(self, kind: Kind, manifest: Object, manager: str, *, force: bool, dry_run: bool) -> Object:  # noqa: ARG002
        if self.refuses:
            raise self.refuses
        self.applied.append((manager, dry_run))
        metadata = {**manifest["metadata"], "uid": "1", "managedFields": [{}]}
        return {**manifest, "metadata": metadata, "status": {"phase": "Pending"}}

    def try_create(self, kind: Kind, manifest: Object) -> Object:  # noqa: ARG002
        self.tried.append(manifest)
        raise self.refuses or ApiError(409, "AlreadyExists", 'pods "web" already exists')

    def states(self, *_: object) -> Any:
        yield from self.next

    def events(self, _: Object) -> list[Object]:
        return [{"type": "Warning", "reason": "Failed", "message": "no key signed it"}]


def provider(cluster: OneCluster | None = None) -> KubernetesProvider:
    made = KubernetesProvider()
    made.configure({})
    made._cluster = cluster or OneCluster()  # type: ignore[assignment]
    return made


def pod(**spec: Any) -> Properties:
    metadata = {"name": "web", "namespace": "demo"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": [{"name": "c", **spec}]},
    }


def is_ready(manifest: Object) -> Object:
    conditions = [{"type": t, "status": "True"} for t in ("PodScheduled", "Initialized", "Ready")]
    return {**manifest, "status": {"phase": "Running", "conditions": conditions}}


def test_a_name_is_made_up_once_and_kept() -> None:
    first = provider().check(RESOURCE, {}, {"spec": {}}, SEED).inputs
    assert first["metadata"] == {
        "name": "web-01234567",
        "namespace": "demo",
        "annotations": {"pulumi.com/autonamed": "true"},
    }
    assert provider().check(RESOURCE, first, {"spec": {}}, b"other").inputs == first


def test_wrong_metadata_is_refused_by_place() -> None:
    new = {"kind": "Job", "metadata": {"labels": {"a.b": 1}, "name": UNKNOWN}}
    failures = provider().check(RESOURCE, {}, new, SEED).failures
    assert [f.path for f in failures] == [("kind",), ("metadata", "labels", "a.b")]


@pytest.mark.parametrize(
    "token", ["core/v1:PodPatch", "core/v1:PodList", "helm.sh/v3:Release", "yaml:ConfigFile"]
)
def test_what_is_no_single_object_is_refused_by_name(token: str) -> None:
    with pytest.raises(ProviderError, match=f"kubernetes:{token} is not served"):
        provider().check(Resource(f"urn:pulumi:dev::p::kubernetes:{token}::x"), {}, {}, SEED)


@pytest.mark.parametrize(
    ("spec", "replaces"),
    [({"image": "b"}, True), ({"image": "a", "env": []}, True), ({"image": "a", "name": "c"}, False)],
)
def test_a_pod_is_replaced_as_the_official_plugin_does(spec: Properties, replaces: bool) -> None:
    diff = provider().diff(RESOURCE, {}, pod(image="a"), pod(**spec))
    assert bool(diff.replace) == replaces == diff.delete_before_replace


def test_labels_are_changed_in_place_and_an_autonamed_object_is_created_first() -> None:
    old = pod(image="a")
    old["metadata"]["annotations"] = {"pulumi.com/autonamed": "true"}
    new = {**pod(image="b"), "metadata": {**old["metadata"], "labels": {"a": "b"}}}
    diff = provider().diff(RESOURCE, {}, old, new)
    assert ("metadata", "labels") in diff.changes
    assert ("metadata", "labels") not in diff.replace
    assert diff.replace
    assert not diff.delete_before_replace


def test_create_waits_until_the_pod_is_ready() -> None:
    cluster = OneCluster()
    wanted = pod(image="a")
    cluster.next = [wanted, is_ready(wanted)]
    resource_id, state = provider(cluster).create(RESOURCE, wanted, preview=False)
    assert (resource_id, state["status"]["phase"]) == ("demo/web", "Running")
    assert "managedFields" not in state["metadata"]


def test_a_pod_that_does_not_get_ready_is_kept_with_its_reasons() -> None:
    cluster = OneCluster()
    waiting = {"state": {"waiting": {"reason": "InvalidImage", "message": "no wasm"}}, "name": "c"}
    cluster.next = [
        {
            **pod(image="a"),
            "metadata": {"name": "web", "namespace": "demo"},
            "status": {"containerStatuses": [waiting]},
        }
    ]
    with pytest.raises(InitFailedError) as caught:
        provider(cluster).create(Resource(RESOURCE.urn, timeout=0.001), pod(image="a"), preview=False)
    assert caught.value.resource_id == "demo/web"
    assert "container c: [InvalidImage] no wasm" in caught.value.reasons[0]
    assert caught.value.reasons[1] == "Warning Failed: no key signed it"


def test_an_object_that_is_there_is_not_taken_over() -> None:
    cluster = OneCluster()
    cluster.live = pod(image="a")
    with pytest.raises(ProviderError, match="Pod demo/web already exists"):
        provider(cluster).create(RESOURCE, pod(image="a"), preview=False)


def test_a_preview_is_a_dry_run_without_status() -> None:
    cluster = OneCluster()
    _, state = provider(cluster).create(RESOURCE, pod(image="a"), preview=True)
    assert [dry for _, dry in cluster.applied] == [True]
    assert "status" not in state
    assert "uid" not in state["metadata"]


def test_a_preview_of_a_replacement_is_of_a_new_object_and_not_of_a_change_to_the_living_one() -> None:
    cluster = OneCluster()
    cluster.live = is_ready(pod(image="a"))
    made = provider(cluster)
    assert made.create(RESOURCE, pod(image="b"), preview=True)[1] == pod(image="b")
    assert (cluster.applied, cluster.tried) == ([], [pod(image="b")])
    cluster.refuses = ApiError(
        422, "Invalid", "spec.ports[0].nodePort: 30080: provided port is already allocated"
    )
    assert made.create(RESOURCE, pod(image="b"), preview=True)[1] == pod(image="b")
    cluster.refuses = ApiError(422, "Invalid", "spec.containers[0].image: Required value")
    with pytest.raises(ProviderError, match=r"would be refused: spec\.containers"):
        made.create(RESOURCE, pod(), preview=True)


def test_a_preview_with_unknowns_asks_nobody() -> None:
    cluster = OneCluster()
    assert provider(cluster).create(RESOURCE, pod(image=UNKNOWN), preview=True)[1] == pod(image=UNKNOWN)
    assert cluster.applied == []


def test_a_preview_shows_what_the_server_refuses_but_waits_for_a_namespace() -> None:
    cluster = OneCluster()
    cluster.refuses = ApiError(404, "NotFound", 'namespaces "demo" not found')
    assert provider(cluster).create(RESOURCE, pod(image="a"), preview=True)[1] == pod(image="a")
    cluster.refuses = ApiError(422, "Invalid", "spec.containers[0].image: Required value")
    with pytest.raises(ProviderError, match=r"would be refused: spec\.containers"):
        provider(cluster).create(RESOURCE, pod(), preview=True)


def test_a_refresh_sees_a_changed_field_but_not_a_changed_status() -> None:
    cluster = OneCluster()
    inputs = pod(image="a")
    state = is_ready({**inputs, "metadata": {**inputs["metadata"], "resourceVersion": "1"}})
    cluster.live = is_ready({**inputs, "metadata": {**inputs["metadata"], "resourceVersion": "2"}})
    assert provider(cluster).read(RESOURCE, state, inputs).inputs == inputs
    cluster.live = is_ready(pod(image="z"))
    assert provider(cluster).read(RESOURCE, state, inputs).inputs == pod(image="z")
    cluster.live = None
    assert provider(cluster).read(RESOURCE, state, inputs).resource_id == ""


def test_an_import_takes_the_live_object_without_the_servers_fields() -> None:
    cluster = OneCluster()
    live = is_ready(pod(image="a"))
    live["metadata"] = {**live["metadata"], "uid": "1", "resourceVersion": "1"}
    cluster.live = live
    assert provider(cluster).read(RESOURCE, {}, {}).inputs == pod(image="a")


def test_the_data_of_a_secret_is_secret() -> None:
    cluster = OneCluster()
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s", "namespace": "demo"},
        "data": {"k": "dg=="},
    }
    resource = Resource("urn:pulumi:dev::p::kubernetes:core/v1:Secret::s")
    assert provider(cluster).create(resource, secret, preview=False)[1]["data"] == Secret({"k": "dg=="})


def test_a_failed_pod_is_not_waited_for() -> None:
    live: Object = {
        "metadata": {"name": "a", "namespace": "demo"},
        "status": {"phase": "Failed", "reason": "Evicted", "message": "m"},
    }
    seen = ready.verdict(POD, live)
    assert seen.hopeless
    assert seen.reasons[0] == "the pod failed (Evicted: m)"
    assert "kubectl delete pod a --namespace demo" in seen.reasons[-1]


def test_a_deployment_is_ready_when_its_new_pods_are_available() -> None:
    kind = Kind("apps/v1", "Deployment")
    live: Object = {
        "metadata": {"generation": 2},
        "spec": {"replicas": 2},
        "status": {"observedGeneration": 1},
    }
    assert not ready.verdict(kind, live).ready
    live["status"] = {"observedGeneration": 2, "updatedReplicas": 2, "availableReplicas": 1}
    assert ready.verdict(kind, live).reasons == ("availableReplicas is 1 of 2",)
    live["status"]["availableReplicas"] = 2
    assert ready.verdict(kind, live).ready


def kubeconfig(server: str) -> str:
    cluster = {"name": "c", "cluster": {"server": server}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    return json.dumps({"clusters": [cluster], "contexts": [context], "current-context": "x", "users": []})


def test_a_kubeconfig_is_contents_or_a_path(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(kubeconfig("https://a"))
    assert read_kubeconfig(str(path)) == (json.loads(kubeconfig("https://a")), tmp_path)
    assert read_kubeconfig(kubeconfig("https://a"))[0] == json.loads(kubeconfig("https://a"))
    with pytest.raises(Unreachable, match="neither a file nor the contents"):
        read_kubeconfig("/nowhere/config")


def two_contexts(**clusters: str) -> str:
    entries = [{"name": name, "cluster": {"server": server}} for name, server in clusters.items()]
    contexts = [{"name": f"to-{name}", "context": {"cluster": name}} for name in clusters]
    first = contexts[0]["name"]
    return json.dumps({"clusters": entries, "contexts": contexts, "current-context": first, "users": []})


A, B = kubeconfig("https://a"), kubeconfig("https://b")
TWO = two_contexts(one="https://a", other="https://b")


@pytest.mark.parametrize(
    ("old", "new", "replaces"),
    [
        ({"kubeconfig": A}, {"kubeconfig": A.replace('"users": []', '"users": [{"name": "u"}]')}, set()),
        ({"kubeconfig": A}, {"kubeconfig": B}, {"kubeconfig"}),
        ({"kubeconfig": A}, {"kubeconfig": UNKNOWN}, {"kubeconfig"}),
        ({"kubeconfig": A}, {"kubeconfig": "/nowhere/config"}, set()),
        ({}, {"kubeconfig": A}, set()),
        ({"kubeconfig": A}, {}, set()),
        ({"kubeconfig": TWO}, {"kubeconfig": TWO, "context": "to-one"}, set()),
        ({"kubeconfig": TWO}, {"kubeconfig": TWO, "context": "to-other"}, {"context"}),
        ({"kubeconfig": TWO}, {"kubeconfig": TWO, "context": "nowhere"}, set()),
        ({"kubeconfig": TWO}, {"kubeconfig": TWO, "context": UNKNOWN}, {"context"}),
        ({"kubeconfig": TWO}, {"kubeconfig": TWO, "cluster": "other"}, {"cluster"}),
        ({"kubeconfig": TWO}, {"kubeconfig": TWO, "cluster": "nowhere"}, set()),
        ({"kubeconfig": TWO}, {"kubeconfig": TWO, "cluster": UNKNOWN}, {"cluster"}),
        ({"kubeconfig": A}, {"kubeconfig": A, "clusterIdentifier": "x"}, set()),
        ({"kubeconfig": A, "clusterIdentifier": "x"}, {"kubeconfig": A}, set()),
        ({"kubeconfig": A, "clusterIdentifier": "x"}, {"kubeconfig": B, "clusterIdentifier": "x"}, set()),
        (
            {"kubeconfig": A, "clusterIdentifier": "x"},
            {"kubeconfig": B, "clusterIdentifier": "y"},
            {"kubeconfig", "clusterIdentifier"},
        ),
        ({"kubeconfig": A}, {"kubeconfig": A, "namespace": "n", "deleteUnreachable": True}, set()),
    ],
)
def test_only_another_cluster_replaces_the_provider(
    old: Properties, new: Properties, replaces: set[str]
) -> None:
    diff = provider().diff_config(old, new)
    assert diff.changes
    assert diff.replace == {(name,) for name in replaces}


def test_a_setting_that_would_be_ignored_is_refused() -> None:
    failures = (
        provider().check_config({"enableServerSideApply": "false", "kubecfg": "x", "namespace": "n"}).failures
    )
    assert [f.path for f in failures] == [("enableServerSideApply",), ("kubecfg",)]


def event(kind: str, reason: str, message: str) -> Object:
    return {"type": kind, "reason": reason, "message": message}


def test_what_is_waited_for_is_said_at_once_and_from_time_to_time() -> None:
    waiting = ready.Waiting("Pod demo/web")
    normal = [event("Normal", "Pulled", "pulled it")]
    assert waiting.status(("Ready is not true",), normal, 0.2) == (
        "waiting for Pod demo/web, for 0 s now: Ready is not true; last event: Normal Pulled: pulled it"
    )
    assert waiting.status(("Ready is not true",), normal, 3) is None
    in_use = [*normal, event("Warning", "PortInUse", "8080 is in use")]
    said = waiting.status(("container c: [PortInUse] 8080 is in use",), in_use, 4)
    assert said is not None
    assert said.endswith("last event: Warning PortInUse: 8080 is in use")
    assert waiting.status(("container c: [PortInUse] 8080 is in use",), in_use, 13) is None
    assert waiting.status(("container c: [PortInUse] 8080 is in use",), in_use, 15) is not None
    assert waiting.warnings(in_use) == ["Warning PortInUse: 8080 is in use"]
    assert waiting.warnings(in_use) == []


def test_a_wait_shows_its_reasons_and_warnings_in_pulumis_own_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, made = OneCluster(), None
    held = pod(image="a")
    held["status"] = {"containerStatuses": [{"name": "c", "state": {"waiting": {"reason": "PortInUse"}}}]}
    cluster.next = [held, is_ready(held)]
    made = provider(cluster)
    shown: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        made,
        "log",
        lambda _urn, text, *, warning=False, status=False: shown.append((text, status)),  # noqa: ARG005
    )
    made.create(RESOURCE, pod(image="a"), preview=False)
    assert shown == [
        (
            "waiting for Pod demo/web, for 0 s now: container c: [PortInUse]; PodScheduled is not true; "
            "last event: Warning Failed: no key signed it",
            True,
        ),
        ("Pod demo/web: Warning Failed: no key signed it", False),
    ]


def test_a_deployment_says_what_its_pods_say() -> None:
    live: Object = {"spec": {"selector": {"matchLabels": {"a": "b", "c": "d"}}, "template": {}}}
    assert ready.selector(live) == "a=b,c=d"
    assert ready.selector({"spec": {"selector": {"a": "b"}}}) == ""  # a Service's
    failing = {
        "metadata": {"name": "web-1"},
        "status": {"containerStatuses": [{"name": "c", "state": {"waiting": {"reason": "InvalidImage"}}}]},
    }
    assert ready.pod_reasons([failing, {**is_ready(pod(image="a")), "metadata": {"name": "web-2"}}]) == (
        "pod web-1: container c: [InvalidImage]",
        "pod web-1: PodScheduled is not true",
    )


@pytest.mark.parametrize(
    ("managers", "taken"),
    [
        ([{"manager": "pulumi-kubernetes-0a0a0a0a", "operation": "Apply"}], "pulumi-kubernetes-0a0a0a0a"),
        ([{"manager": "kubectl", "operation": "Apply"}], _manager(RESOURCE)),
        ([{"manager": "pulumi-kubernetes-0a0a0a0a", "operation": "Update"}], _manager(RESOURCE)),
    ],
)
def test_an_object_is_updated_by_who_applied_it_when_its_resource_had_another_name(
    managers: list[Object], taken: str
) -> None:
    cluster, new = OneCluster(), pod(image="a")
    cluster.live = {**new, "metadata": {**new["metadata"], "managedFields": managers}}
    cluster.next = [is_ready(new)]
    provider(cluster).update(RESOURCE, {}, new, new, preview=False)
    provider(cluster).update(RESOURCE, {}, new, new, preview=True)
    assert cluster.applied == [(taken, False), (taken, True)]


def test_what_is_ignored_stays_as_it_is_and_what_is_not_there_is_not_made_up() -> None:
    cluster = OneCluster()
    cluster.live = {"metadata": {"name": "web"}, "spec": {"replicas": 7, "paused": True}}
    new = {"metadata": {"name": "web", "namespace": "demo"}, "spec": {"replicas": 2}}
    ignoring = replace(RESOURCE, ignored=("spec.replicas", "spec.paused", "spec.strategy.type"))
    state = provider(cluster).update(ignoring, {}, new, new, preview=True)
    assert state["spec"] == {"replicas": 7}
    assert provider(cluster).update(RESOURCE, {}, new, new, preview=True)["spec"] == {"replicas": 2}


def test_a_pod_that_no_node_takes_says_which_taint_of_which_node_keeps_it_off() -> None:
    said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}
    waits: Object = {
        "spec": {
            "nodeSelector": {"kubernetes.io/arch": "wasm32-wasi"},
            "tolerations": [{"key": "kubernetes.io/arch", "operator": "Exists"}],
        },
        "status": {"conditions": [said]},
    }
    full = {"type": "DiskPressure", "status": "True", "message": "the disk is full"}
    well = {"type": "Ready", "status": "True", "message": "taking pods"}
    own = {"key": "kubernetes.io/arch", "value": "wasm32-wasi", "effect": "NoExecute"}
    pressed = {"key": "node.kubernetes.io/disk-pressure", "effect": "NoSchedule"}
    rather_not = {"key": "spot", "effect": "PreferNoSchedule"}

    def node(name: str, arch: str, *taints: Object) -> Object:
        metadata = {"name": name, "labels": {"kubernetes.io/arch": arch}}
        return {"metadata": metadata, "spec": {"taints": taints}, "status": {"conditions": [full, well]}}

    nodes = [
        node("linux-1", "amd64", pressed),
        node("krustlet-1", "wasm32-wasi", own, pressed, rather_not),
        node("krustlet-2", "wasm32-wasi", own, rather_not),
    ]
    assert ready.node_reasons([waits], nodes) == (
        "node krustlet-1 has the taint node.kubernetes.io/disk-pressure; "
        "DiskPressure is True: the disk is full",
    )
    scheduled = {**waits, "status": {"conditions": [{**said, "status": "True"}]}}
    assert ready.node_reasons([scheduled], nodes) == ()
