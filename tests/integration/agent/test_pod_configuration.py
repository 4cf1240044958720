"""Pod contract, configuration: environment, arguments and volumes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import requests

from tests.integration.agent.harness import Agent, Manifest, Pod, Workspace, command, literal
from tests.waiting import until


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _resource(name: str, resource: str, **more: str) -> Manifest:
    return {"name": name, "valueFrom": {"resourceFieldRef": {"resource": resource, **more}}}


def _key(name: str, kind: str, source: str, key: str, **more: bool) -> Manifest:
    return {"name": name, "valueFrom": {f"{kind}KeyRef": {"name": source, "key": key, **more}}}


def _mounted(space: Workspace, source: Manifest, **mount: object) -> Pod:
    """A pod that serves, with one volume at /data."""
    return space.serve(
        volumeMounts=[{"name": "data", "mountPath": "/data", **mount}],
        pod={"volumes": [{"name": "data", **source}]},
    )


def _read(pod: Pod, path: str) -> str:
    answer = pod.get("/read", path=path)
    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
    return answer.text


# Environment and arguments.


def test_literal_variables_reach_the_guest_and_no_others(space: Workspace) -> None:
    pod = space.serve(
        env=[literal("A", "1"), literal("EMPTY", ""), literal("A_B", "with = and ü")]
    ).wait_ready()
    assert pod.get("/env").json() == {"A": "1", "EMPTY": "", "A_B": "with = and ü"}


def test_keys_of_config_maps_and_secrets_become_variables(space: Workspace) -> None:
    config, secret = space.config_map({"color": "blue"}), space.secret({"password": "s3cret"})
    pod = space.serve(
        env=[_key("COLOR", "configMap", config, "color"), _key("PASSWORD", "secret", secret, "password")]
    ).wait_ready()
    assert pod.get("/env").json() == {"COLOR": "blue", "PASSWORD": "s3cret"}


def test_whole_config_maps_and_secrets_become_variables_and_env_wins_over_them(space: Workspace) -> None:
    config = space.config_map({"A": "config", "B": "config", "C": "config"})
    secret = space.secret({"B": "secret", "D": "secret"})
    pod = space.serve(
        envFrom=[{"configMapRef": {"name": config}}, {"prefix": "S_", "secretRef": {"name": secret}}],
        env=[literal("C", "env")],
    ).wait_ready()
    assert pod.get("/env").json() == {
        "A": "config",
        "B": "config",
        "C": "env",
        "S_B": "secret",
        "S_D": "secret",
    }


def test_fields_of_the_pod_and_its_resources_become_variables(space: Workspace) -> None:
    pod = space.serve(
        env=[
            _field("NAME", "metadata.name"),
            _field("NAMESPACE", "metadata.namespace"),
            _field("UID", "metadata.uid"),
            _field("LABEL", "metadata.labels['color']"),
            _field("NODE", "spec.nodeName"),
            _field("ACCOUNT", "spec.serviceAccountName"),
            _field("HOST_IP", "status.hostIP"),
            _field("POD_IP", "status.podIP"),
            _field("HOST_IPS", "status.hostIPs"),
            _resource("CPU", "limits.cpu", divisor="1m"),
            _resource("MEMORY", "limits.memory", divisor="1Mi"),
            _resource("CPU_REQUEST", "requests.cpu", divisor="1m"),
            _resource("MEMORY_REQUEST", "requests.memory"),
        ],
        resources={
            "limits": {"cpu": "500m", "memory": "64Mi"},
            "requests": {"cpu": "250m", "memory": "32Mi"},
        },
        pod={"labels": {"color": "green"}},
    ).wait_ready()
    assert pod.get("/env").json() == {
        "NAME": pod.name,
        "NAMESPACE": space.namespace,
        "UID": pod.uid,
        "LABEL": "green",
        "NODE": space.agent.name,
        "ACCOUNT": "default",
        "HOST_IP": space.agent.address,
        "POD_IP": space.agent.address,
        "HOST_IPS": space.agent.address,
        "CPU": "500",
        "MEMORY": "64",
        "CPU_REQUEST": "250",
        "MEMORY_REQUEST": str(32 * 1024 * 1024),
    }


def test_limits_that_are_not_set_default_to_what_the_node_has(space: Workspace) -> None:
    pod = space.serve(env=[_resource("CPU", "limits.cpu"), _resource("MEMORY", "limits.memory")]).wait_ready()
    allocatable = space.agent.node().status.allocatable
    found = pod.get("/env").json()
    assert found["CPU"] == allocatable["cpu"]
    scale = 1024 if allocatable["memory"].endswith("Ki") else 1
    assert int(found["MEMORY"]) == int(allocatable["memory"].removesuffix("Ki")) * scale


def test_references_are_expanded_in_variables_and_arguments(space: Workspace) -> None:
    pod = space.run(
        "env",
        "then",
        "print",
        "$(FOO)",
        "$$(FOO)",
        "$(NONE)",
        env=[literal("FOO", "foo"), literal("BAR", "$(FOO);;$(LATER)"), literal("LATER", "x")],
    )
    pod.wait_phase("Succeeded")
    variables, line = pod.logs().splitlines()
    assert json.loads(variables) == {"FOO": "foo", "BAR": "foo;;$(LATER)", "LATER": "x"}
    assert line == "foo $(FOO) $(NONE)"


def test_command_comes_before_args_with_its_references_expanded(space: Workspace) -> None:
    pod = space.run("then", "args", command=["print", "$(WORD)"], env=[literal("WORD", "hi")])
    pod.wait_phase("Succeeded")
    line, arguments = pod.logs().splitlines()
    assert line == "hi"
    assert json.loads(arguments) == ["main", "print", "hi", "then", "args"]


@pytest.mark.parametrize("kind", ["configMap", "secret"])
def test_a_missing_mandatory_source_holds_the_pod_with_a_reason_until_it_appears(
    space: Workspace, kind: str
) -> None:
    name = space.unique("late")
    pod = space.serve(env=[_key("A", kind, name, "a")])
    message = pod.wait_waiting("CreateContainerConfigError")
    assert name in message
    assert pod.read().status.phase == "Pending"
    pod.wait_event("Failed", name)
    (space.config_map if kind == "configMap" else space.secret)({"a": "there"}, name)
    pod.wait_ready()
    assert pod.get("/env").json() == {"A": "there"}
    assert pod.status().restart_count == 0


def test_a_missing_key_holds_the_pod_and_is_named(space: Workspace) -> None:
    config = space.config_map({"a": "1"})
    pod = space.serve(env=[_key("A", "configMap", config, "other")])
    message = pod.wait_waiting("CreateContainerConfigError")
    assert "other" in message
    assert config in message


def test_missing_optional_sources_hold_nothing(space: Workspace) -> None:
    pod = space.serve(
        env=[
            _key("A", "configMap", "no-such", "a", optional=True),
            _key("B", "secret", "no-such", "b", optional=True),
        ],
        envFrom=[
            {"configMapRef": {"name": "no-such", "optional": True}},
            {"secretRef": {"name": "no-such", "optional": True}},
        ],
        volumeMounts=[{"name": "config", "mountPath": "/config"}, {"name": "secret", "mountPath": "/secret"}],
        pod={
            "volumes": [
                {"name": "config", "configMap": {"name": "no-such", "optional": True}},
                {"name": "secret", "secret": {"secretName": "no-such", "optional": True}},
            ]
        },
    ).wait_ready()
    assert pod.get("/env").json() == {}
    assert pod.get("/read", path="/config/a").status_code == 404


# Volumes.


def test_a_config_map_is_a_directory_of_files_that_cannot_be_written(space: Workspace) -> None:
    pod = _mounted(space, {"configMap": {"name": space.config_map({"a": "one", "b": "two"})}}).wait_ready()
    assert (_read(pod, "/data/a"), _read(pod, "/data/b")) == ("one", "two")
    for path in ("/data/a", "/data/new"):
        assert pod.get("/write", path=path, text="x").status_code == 403
    assert pod.get("/remove", path="/data/a").status_code == 403
    assert _read(pod, "/data/a") == "one"


def test_a_secret_is_a_directory_of_files_that_cannot_be_written(space: Workspace) -> None:
    pod = _mounted(space, {"secret": {"secretName": space.secret({"key": "s3cret"})}}).wait_ready()
    assert _read(pod, "/data/key") == "s3cret"
    assert pod.get("/write", path="/data/key", text="x").status_code == 403


def test_a_secret_of_the_same_name_in_another_namespace_is_another_secret(space: Workspace) -> None:
    name = space.secret({"key": "ours"})
    foreign = {"metadata": {"name": name}, "stringData": {"key": "theirs"}}
    space.core.create_namespaced_secret("default", foreign)
    try:
        pod = _mounted(space, {"secret": {"secretName": name}}).wait_ready()
        assert _read(pod, "/data/key") == "ours"
    finally:
        space.core.delete_namespaced_secret(name, "default")


def test_items_choose_keys_and_give_them_paths(space: Workspace) -> None:
    config = space.config_map({"a": "one", "b": "two"})
    source = {"configMap": {"name": config, "items": [{"key": "b", "path": "deep/er/b.txt"}]}}
    pod = _mounted(space, source).wait_ready()
    assert _read(pod, "/data/deep/er/b.txt") == "two"
    assert pod.get("/read", path="/data/a").status_code == 404


def test_binary_data_arrives_byte_for_byte(space: Workspace) -> None:
    content = bytes(range(256))
    name = space.config_map({"text": "x"})
    encoded = base64.b64encode(content).decode()
    space.core.patch_namespaced_config_map(name, space.namespace, {"binaryData": {"raw": encoded}})
    pod = _mounted(space, {"configMap": {"name": name}}).wait_ready()
    assert pod.get("/read", path="/data/raw").content == content


def test_one_volume_may_be_mounted_twice_and_one_source_by_two_volumes(space: Workspace) -> None:
    config = space.config_map({"a": "one"})
    pod = space.serve(
        volumeMounts=[
            {"name": "x", "mountPath": "/x"},
            {"name": "x", "mountPath": "/deep/x"},
            {"name": "y", "mountPath": "/y"},
        ],
        pod={"volumes": [{"name": name, "configMap": {"name": config}} for name in ("x", "y")]},
    ).wait_ready()
    assert {_read(pod, f"{path}/a") for path in ("/x", "/deep/x", "/y")} == {"one"}


def test_a_sub_path_mounts_one_file(space: Workspace) -> None:
    config = space.config_map({"app.conf": "setting", "other": "x"})
    pod = _mounted(
        space, {"configMap": {"name": config}}, mountPath="/etc/app.conf", subPath="app.conf"
    ).wait_ready()
    assert _read(pod, "/etc/app.conf") == "setting"
    assert pod.get("/read", path="/etc/other").status_code == 404


def test_a_single_file_is_seen_in_the_directory_of_another_volume(space: Workspace) -> None:
    config = space.config_map({"app.conf": "setting"})
    pod = space.serve(
        volumeMounts=[
            {"name": "work", "mountPath": "/work"},
            {"name": "config", "mountPath": "/work/app.conf", "subPath": "app.conf"},
            {"name": "config", "mountPath": "/work/deep/er.conf", "subPath": "app.conf"},
        ],
        pod={
            "volumes": [
                {"name": "work", "emptyDir": {}},
                {"name": "config", "configMap": {"name": config}},
            ]
        },
    ).wait_ready()
    assert pod.get("/write", path="/work/own", text="x").ok
    assert _read(pod, "/work/app.conf") == _read(pod, "/work/deep/er.conf") == "setting"
    assert pod.get("/ls", path="/work").text.split() == ["app.conf", "deep", "own"]


def test_an_optional_source_that_is_missing_leaves_an_empty_directory_for_its_sub_path(
    space: Workspace,
) -> None:
    source = {"configMap": {"name": "no-such", "optional": True}}
    pod = _mounted(space, source, mountPath="/etc/app.conf", subPath="app.conf").wait_ready()
    assert pod.get("/ls", path="/etc/app.conf").text == ""


def test_a_sub_path_may_name_variables(space: Workspace) -> None:
    def mounted(expression: str) -> Pod:
        return space.serve(
            env=[_field("NAME", "metadata.name"), literal("OUT", "../..")],
            volumeMounts=[
                {"name": "data", "mountPath": "/all"},
                {"name": "data", "mountPath": "/own", "subPathExpr": expression},
            ],
            pod={"volumes": [{"name": "data", "emptyDir": {}}]},
        )

    pod = mounted("logs/$(NAME)").wait_ready()
    assert pod.get("/write", path="/own/file", text="x").ok
    assert _read(pod, f"/all/logs/{pod.name}/file") == "x"
    assert "inside the volume" in mounted("$(OUT)").wait_waiting("CreateContainerConfigError")
    assert "NONE" in mounted("$(NONE)").wait_waiting("CreateContainerConfigError")


def test_a_working_directory_is_where_relative_paths_begin(space: Workspace) -> None:
    config = space.config_map({"greeting": "hello"})
    words = ["write", "note", "x", "then", "ls", "/work/deep", "then", "cat", "../greeting"]
    pod = space.run(
        *words,
        workingDir="/work/deep",
        volumeMounts=[
            {"name": "work", "mountPath": "/work"},
            {"name": "config", "mountPath": "/work/greeting", "subPath": "greeting"},
        ],
        pod={
            "volumes": [
                {"name": "work", "emptyDir": {}},
                {"name": "config", "configMap": {"name": config}},
            ]
        },
    )
    # A guest does not leave the directory that it begins in but by an absolute path.
    pod.wait_phase("Failed")
    assert pod.logs().splitlines()[0] == "note"
    reading: Manifest = {"volumeMounts": [{"name": "data", "mountPath": "/data"}], "workingDir": "/data"}
    pod = space.run(
        *["cat", "greeting"],
        pod={"volumes": [{"name": "data", "configMap": {"name": config}}]},
        **reading,
    )
    pod.wait_phase("Succeeded")
    assert pod.logs().strip() == "hello"


def test_fields_of_the_pod_are_files(space: Workspace) -> None:
    items = [
        {"path": "name", "fieldRef": {"fieldPath": "metadata.name"}},
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {
            "path": "memory",
            "resourceFieldRef": {"containerName": "web", "resource": "limits.memory", "divisor": "1Mi"},
        },
    ]
    pod = space.serve(
        volumeMounts=[{"name": "data", "mountPath": "/data"}],
        resources={"limits": {"memory": "48Mi"}},
        pod={"volumes": [{"name": "data", "downwardAPI": {"items": items}}], "labels": {"a": "1", "b": "2"}},
    ).wait_ready()
    assert _read(pod, "/data/name") == pod.name
    assert _read(pod, "/data/labels").splitlines() == ['a="1"', 'b="2"']
    assert _read(pod, "/data/memory") == "48"


def test_a_projected_volume_joins_its_sources_in_one_directory(space: Workspace) -> None:
    sources = [
        {"configMap": {"name": space.config_map({"config": "c"})}},
        {
            "secret": {
                "name": space.secret({"secret": "s"}),
                "items": [{"key": "secret", "path": "deep/secret"}],
            }
        },
        {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600, "audience": "vault"}},
    ]
    pod = _mounted(space, {"projected": {"sources": sources}}).wait_ready()
    assert _read(pod, "/data/config") == "c"
    assert _read(pod, "/data/deep/secret") == "s"
    assert _read(pod, "/data/name") == pod.name
    payload = _read(pod, "/data/token").split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert claims["aud"] == ["vault"]
    assert claims["kubernetes.io"]["pod"]["uid"] == pod.uid
    assert pod.get("/write", path="/data/config", text="x").status_code == 403


def test_the_service_account_token_that_every_pod_gets_lets_it_in_as_that_account(space: Workspace) -> None:
    pod = space.serve(pod={"automountServiceAccountToken": True}).wait_ready()
    directory = "/var/run/secrets/kubernetes.io/serviceaccount"
    assert _read(pod, f"{directory}/namespace") == space.namespace
    assert "BEGIN CERTIFICATE" in _read(pod, f"{directory}/ca.crt")
    authority = space.agent.directory / f"{pod.name}.crt"
    authority.write_text(_read(pod, f"{directory}/ca.crt"))
    answer = requests.post(
        f"{space.cluster.server}/apis/authentication.k8s.io/v1/selfsubjectreviews",
        headers={"Authorization": f"Bearer {_read(pod, f'{directory}/token')}"},
        json={"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"},
        verify=str(authority),
        timeout=10,
    )
    assert (
        answer.json()["status"]["userInfo"]["username"] == f"system:serviceaccount:{space.namespace}:default"
    )


def test_containers_share_an_empty_dir_that_one_of_them_may_only_read(space: Workspace) -> None:
    port = space.port()
    pod = space.pod(
        {
            "name": "reader",
            "image": space.http_image,
            "ports": [{"containerPort": port}],
            "volumeMounts": [{"name": "shared", "mountPath": "/in", "readOnly": True}],
        },
        command(
            space.cli_image,
            *("write", "/out/file", "shared", "then", "sleep", "60000"),
            volumeMounts=[{"name": "shared", "mountPath": "/out"}],
        ),
        volumes=[{"name": "shared", "emptyDir": {}}],
    ).wait_ready()
    assert until(lambda: pod.get("/read", path="/in/file").text == "shared", "the file", timeout=10)
    assert pod.get("/write", path="/in/file", text="x").status_code == 403


@pytest.mark.parametrize("medium", ["", "Memory"])
def test_an_empty_dir_begins_empty_survives_a_restart_and_ends_with_its_pod(
    space: Workspace, medium: str
) -> None:
    mounts = [{"name": "data", "mountPath": "/data"}]
    pod = space.run(
        *("ls", "/data", "then", "write", "/data/mark", "kept", "then", "exit", "1"),
        volumeMounts=mounts,
        pod={"volumes": [{"name": "data", "emptyDir": {"medium": medium}}], "restart": "Always"},
    )
    pod.wait_waiting("CrashLoopBackOff")
    logs = space.agent.data_dir / "logs" / f"{space.namespace}_{pod.name}_{pod.uid}" / "main"
    assert "mark" not in (logs / "0.log").read_text()
    assert "mark" in (logs / "1.log").read_text()
    kept = space.agent.data_dir / "pods" / pod.uid
    assert kept.exists()
    pod.delete(grace=0)
    until(lambda: not kept.exists(), "the pod's files to be removed", timeout=20)


def test_a_host_path_is_mounted_only_where_the_node_allows_it(space: Workspace, agent: Agent) -> None:
    allowed = agent.host_directory / space.unique("volume")
    allowed.mkdir()
    (allowed / "greeting").write_text("from the host")
    pod = _mounted(space, {"hostPath": {"path": str(allowed)}}).wait_ready()
    assert _read(pod, "/data/greeting") == "from the host"
    assert pod.get("/write", path="/data/answer", text="from the guest").ok
    assert (allowed / "answer").read_text() == "from the guest"
    for path in ("/etc", str(agent.data_dir), f"{agent.host_directory}-more"):
        denied = _mounted(space, {"hostPath": {"path": path}})
        assert "not allowed" in denied.wait_waiting("CreateContainerConfigError")
        denied.wait_event("FailedMount", "not allowed")


def test_a_host_path_that_is_mounted_read_only_cannot_be_written(space: Workspace, agent: Agent) -> None:
    allowed = agent.host_directory / space.unique("volume")
    allowed.mkdir()
    (allowed / "greeting").write_text("x")
    pod = _mounted(space, {"hostPath": {"path": str(allowed)}}, readOnly=True).wait_ready()
    assert _read(pod, "/data/greeting") == "x"
    assert pod.get("/write", path="/data/answer", text="x").status_code == 403
    assert pod.get("/remove", path="/data/greeting").status_code == 403
    assert [path.name for path in allowed.iterdir()] == ["greeting"]


def test_a_link_does_not_lead_out_of_a_volume(space: Workspace, agent: Agent) -> None:
    allowed = agent.host_directory / space.unique("volume")
    allowed.mkdir()
    (agent.host_directory / "outside").write_text("secret of the host")
    (allowed / "link").symlink_to(agent.host_directory / "outside")
    pod = _mounted(space, {"hostPath": {"path": str(allowed)}}).wait_ready()
    assert "secret" not in pod.get("/read", path="/data/link").text
    assert "secret" not in pod.get("/read", path="/data/../outside").text
    outside = _mounted(space, {"hostPath": {"path": str(allowed / "link")}})
    outside.wait_waiting("CreateContainerConfigError")


def test_a_missing_volume_source_holds_the_pod_until_it_appears(space: Workspace) -> None:
    name = space.unique("late")
    pod = _mounted(space, {"configMap": {"name": name}})
    assert name in pod.wait_waiting("CreateContainerConfigError")
    pod.wait_event("FailedMount", name)
    space.config_map({"a": "there"}, name)
    pod.wait_ready()
    assert _read(pod, "/data/a") == "there"


# What changes while a pod runs. The files follow within about a minute, so all of it is waited for at once,
# while the other tests run.


@pytest.fixture(scope="module", autouse=True)
def _begin(request: pytest.FixtureRequest) -> None:
    """Makes the changes before the first test of this module, if their outcome will be asked for."""
    if any("changing" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("changing")


@pytest.fixture(scope="module")
def changing(
    request: pytest.FixtureRequest, agent: Agent, namespace: str
) -> Iterator[dict[str, Future[dict[str, str]]]]:
    """A pod whose sources were changed; what its files said afterwards."""
    space = Workspace(
        request.getfixturevalue("cluster"), request.getfixturevalue("registry"), agent, namespace
    )
    config, secret, late = space.config_map({"a": "old"}), space.secret({"a": "old"}), space.unique("late")
    annotations = [{"path": "a", "fieldRef": {"fieldPath": "metadata.annotations['a']"}}]
    sources: dict[str, Manifest] = {
        "config": {"configMap": {"name": config}},
        "secret": {"secret": {"secretName": secret}},
        "late": {"configMap": {"name": late, "optional": True}},
        "late-secret": {"secret": {"secretName": late, "optional": True}},
        "projected": {"projected": {"sources": [{"configMap": {"name": config}}]}},
        "annotations": {"downwardAPI": {"items": annotations}},
        "labels": {"downwardAPI": {"items": [{"path": "a", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    }
    pod = space.serve(
        volumeMounts=[{"name": name, "mountPath": f"/{name}"} for name in sources],
        pod={
            "volumes": [{"name": name, **source} for name, source in sources.items()],
            "labels": {"a": "old"},
            "annotations": {"a": "old"},
        },
    ).wait_ready()
    assert _read(pod, "/config/a") == _read(pod, "/secret/a") == "old"
    assert _read(pod, "/labels/a") == 'a="old"'
    space.core.patch_namespaced_config_map(config, namespace, {"data": {"a": "new"}})
    space.core.patch_namespaced_secret(secret, namespace, {"stringData": {"a": "new"}})
    space.config_map({"a": "new"}, late)
    space.secret({"a": "new"}, late)
    pod.patch({"metadata": {"labels": {"a": "new"}, "annotations": {"a": "new"}}})

    def watch(name: str) -> dict[str, str]:
        def changed() -> dict[str, str] | None:
            found = pod.get("/read", path=f"/{name}/a").text
            return {"text": found, "restarts": str(pod.status().restart_count)} if "new" in found else None

        return until(changed, f"/{name}/a to change", timeout=100, every=1)

    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(watch, name) for name in sources}
    space.close()


@pytest.mark.parametrize(
    "name", ["config", "secret", "late", "late-secret", "projected", "labels", "annotations"]
)
def test_what_changes_reaches_the_files_of_a_running_pod(
    changing: dict[str, Future[dict[str, str]]], name: str
) -> None:
    expected = 'a="new"' if name == "labels" else "new"
    assert changing[name].result() == {"text": expected, "restarts": "0"}
