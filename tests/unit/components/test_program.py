"""The whole program under Pulumi's mocks: names, parents, dependencies, and what is a secret."""

from __future__ import annotations

import contextlib
import hashlib
import json
import runpy
from collections.abc import Callable, Iterator
from typing import Any

import pulumi
import pytest

from components import node
from policy.rules import CREDENTIAL
from tests.unit.conftest import PUBLIC_KEY, REPOSITORY, Monitor, Run

KEYS = {"private_key", "token", "kubeconfig", "given", "password"}


Program = Callable[..., Monitor]
SECOND = {"name": "second", "crate": "wasm_app"}


def first(second: dict[str, Any] | None = None, **fields: object) -> str:
    """Give the configuration of the default app with other fields, and of a second one behind it."""
    return json.dumps([fields, *([{**SECOND, **second}] if second else [])])


@pytest.fixture(scope="module")
def program_with(run: Run, defaults: dict[str, str]) -> Iterator[Program]:
    """Run __main__.py with the default configuration and what is given instead."""

    def runner(**given: str) -> Monitor:
        def main() -> None:
            settings = {f"awesome-wasm:{key}": value for key, value in given.items()}
            pulumi.runtime.set_all_config(defaults | settings)
            runpy.run_path(str(REPOSITORY / "__main__.py"), run_name="__main__")

        return run(main)

    with contextlib.chdir(REPOSITORY):
        yield runner


# A run takes a third of a second, and the tests only look at what it registered.
@pytest.fixture(scope="module")
def program(program_with: Program) -> Monitor:
    """Run __main__.py once with the default configuration."""
    return program_with()


def test_every_component_is_a_child_of_the_stack_and_every_resource_of_a_component(program: Monitor) -> None:
    components = {
        "services": "awesome-wasm:project:ProjectServices",
        "registry": "awesome-wasm:registry:ContainerRegistry",
        "cluster": "awesome-wasm:cluster:KubernetesCluster",
        "node": "awesome-wasm:node:KrustletNode",
        "app": "awesome-wasm:artifact:WasmArtifact",
        "agent": "awesome-wasm:artifact:AgentArtifact",
        "workload": "awesome-wasm:workload:WasmPod",
    }
    for name, kind in components.items():
        assert program.registered[name].type == kind
    for resource in program.registered.values():
        if resource.name in (*components, "signing-key") or resource.type == "pulumi:pulumi:Stack":
            continue
        assert resource.parent in components, resource.name
        assert resource.name.startswith(f"{resource.parent}-"), resource.name


def test_the_names_of_the_resources_are_these(program: Monitor) -> None:
    names = {
        name
        for name, item in program.registered.items()
        if not item.type.startswith(("awesome-wasm:", "pulumi:pulumi"))
    }
    assert names == {
        "services-cloudresourcemanager",
        "services-compute",
        "services-container",
        "services-artifactregistry",
        "services-iam",
        "registry-repository",
        "registry-node-reader",
        "app-build",
        "signing-key",
        "app-push",
        "app-signature",
        "app-signature-push",
        "app-attestation",
        "agent-build",
        "agent-push",
        "agent-signature",
        "agent-signature-push",
        "agent-attestation",
        "cluster-network",
        "cluster-subnetwork",
        "cluster-cluster",
        "cluster-account",
        "cluster-node-role",
        "cluster-pool",
        "cluster-provider",
        "node-account",
        "node-app-firewall",
        "node-agent-firewall",
        "node-address",
        "node-token",
        "node-bootstrap",
        "node-disk",
        "node-vm",
        "node-registration",
        "cluster-namespace",
        "workload-prepare",
        "workload-pod",
        "workload-smoke-test",
    }


@pytest.mark.parametrize(
    "name",
    [
        *("app-signature", "app-attestation", "agent-signature", "agent-attestation"),
        *("node-token", "node-registration"),
    ],
)
def test_every_key_token_and_kubeconfig_among_the_inputs_is_a_secret(program: Monitor, name: str) -> None:
    resource = program.registered[name]
    held = KEYS & resource.inputs.keys()
    assert held
    for key in held:
        assert resource.is_secret(key), f"{name}.{key}"


def test_generated_keys_and_tokens_are_secret_outputs(program: Monitor) -> None:
    assert "private_key" in program.registered["signing-key"].secret_outputs
    assert "token" in program.registered["node-token"].secret_outputs


def test_a_key_in_cloud_kms_is_named_and_no_private_key_is_anywhere(
    program: Monitor, program_with: Program
) -> None:
    reference = "gcpkms://projects/a-project/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"
    by_kms = program_with(signingKey=reference)
    assert by_kms.registered.keys() - program.registered.keys() == {"services-cloudkms"}
    for name in ("signing-key", "app-signature", "app-attestation", "agent-signature", "agent-attestation"):
        inputs = by_kms.registered[name].inputs
        assert inputs["kms_key"] == reference
        assert not {"private_key", "given"} & inputs.keys()
        assert "kms_key" not in program.registered[name].inputs
    assert "signing-key" in by_kms.registered["app-push"].dependencies, "what cannot be signed is not pushed"


def test_the_vm_joins_as_its_own_account_and_no_secret_is_in_its_metadata(program: Monitor) -> None:
    vm = program.registered["node-vm"]
    assert not vm.is_secret("metadata")
    metadata: dict[str, Any] = vm.plain("metadata")
    assert not [key for key, value in metadata.items() if pulumi.runtime.rpc.is_rpc_secret(value)]
    for value in metadata.values():
        assert not CREDENTIAL.search(value)
    user = json.loads(metadata["krustlet-bootstrap-kubeconfig"])["users"][0]["user"]
    assert user.keys() == {"exec"}
    account = program.registered["node-registration"].plain("account")
    assert vm.plain("serviceAccount")["email"] == account
    # Without it the API server would know the account by its number.
    assert "https://www.googleapis.com/auth/userinfo.email" in vm.plain("serviceAccount")["scopes"]
    subjects = program.registered["node-bootstrap"].plain("subjects")
    assert subjects == [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": account}]


def test_a_bootstrap_token_is_the_choice_for_other_clusters_and_a_secret(program_with: Program) -> None:
    program = program_with(bootstrap="token")
    vm = program.registered["node-vm"]
    kubeconfig = vm.plain("metadata")["krustlet-bootstrap-kubeconfig"]
    assert vm.is_secret("metadata") or pulumi.runtime.rpc.is_rpc_secret(kubeconfig)
    assert program.registered["node-registration"].plain("account") == ""
    [subject] = program.registered["node-bootstrap"].plain("subjects")
    assert (subject["kind"], subject["name"]) == ("Group", "system:bootstrappers:krustlet")


def test_the_kubeconfig_is_a_secret_output_and_holds_no_credentials(program: Monitor) -> None:
    kubeconfig = program.outputs["cluster"]["kubeconfig"]
    assert pulumi.runtime.rpc.is_rpc_secret(kubeconfig)
    text = pulumi.runtime.rpc.unwrap_rpc_secret(kubeconfig)
    execution = json.loads(text)["users"][0]["user"]["exec"]
    assert execution["command"] == "gke-gcloud-auth-plugin"
    assert execution["args"] == ["--use_application_default_credentials"]
    assert "token" not in text


def test_the_pod_waits_for_the_node_and_ends_with_it(program: Monitor) -> None:
    pod = program.registered["workload-pod"]
    assert "node-registration" in pod.dependencies
    assert pod.replace_with == ["node-registration"]
    assert pod.delete_before_replace
    assert program.registered["node-registration"].replace_with == ["node-vm"]


def test_an_image_is_prepared_beside_the_pod_that_runs(program: Monitor, program_with: Program) -> None:
    prepared, pod = program.registered["workload-prepare"], program.registered["workload-pod"]
    assert "name" not in prepared.plain("metadata"), "pulumi names it, and makes it before the old one goes"
    assert not prepared.delete_before_replace
    assert prepared.plain("metadata")["annotations"] == {"krustlet.dev/prepare-only": "true"}
    image = pod.plain("spec")["containers"][0]["image"]
    assert [item["image"] for item in prepared.plain("spec")["containers"]] == [image]
    assert {"app-signature-push", "node-registration"} <= set(prepared.dependencies)
    assert "workload-prepare" in pod.dependencies
    changed = program_with(apps=first(memoryLimit="32Mi", port=8081)).registered["workload-prepare"]
    assert changed.inputs == prepared.inputs, "only another image is prepared anew"


def test_an_agent_gets_another_key_when_what_is_signed_with_it_is_there(program: Monitor) -> None:
    assert "app-signature-push" in program.registered["node-vm"].dependencies


def test_the_pod_names_its_image_by_digest_and_waits_for_the_signature(program: Monitor) -> None:
    pod = program.registered["workload-pod"]
    image = pod.plain("spec")["containers"][0]["image"]
    assert image == "europe-west1-docker.pkg.dev/p/awesome-wasm/primorial@sha256:" + "12" * 32
    assert "app-signature-push" in pod.dependencies


def test_no_path_of_this_machine_is_in_any_input(program: Monitor) -> None:
    for name, resource in program.registered.items():
        assert str(REPOSITORY) not in json.dumps(resource.inputs), name
        assert "path" not in resource.inputs, name


@pytest.mark.parametrize("name", ["app", "agent"])
def test_what_is_attested_is_the_image_that_runs(program: Monitor, name: str) -> None:
    attestation, push = program.registered[f"{name}-attestation"], program.registered[f"{name}-push"]
    assert attestation.plain("repository") == push.plain("repository")
    assert attestation.plain("digest") == "sha256:" + "12" * 32
    assert attestation.plain("sha256") == push.plain("sha256")
    assert f"{name}-push" in attestation.dependencies, "a referrer needs its subject, and ends before it"


def test_the_vm_starts_after_it_may_pull_and_ask_for_certificates(program: Monitor) -> None:
    needs = program.registered["node-vm"].dependencies
    assert {"registry-node-reader", "node-bootstrap", "agent-signature-push", "node-token"} <= set(needs)


# What a VM and its disk are made of; another one of these is another VM.
LASTING = ("name", "zone", "project", "bootDisk", "networkInterfaces", "serviceAccount", "image")


def lasting(program: Monitor) -> list[Any]:
    """Give what decides whether VM and disk are replaced."""
    found = []
    for name in ("node-vm", "node-disk"):
        resource = program.registered[name]
        found.append(resource.replacement_trigger)
        found += [resource.plain(key) for key in LASTING if key in resource.inputs]
    return found


def told(program: Monitor) -> str:
    """Give the configuration that is waited for, as the VM is told it and its Node has to show it."""
    labels: str = program.registered["node-vm"].plain("metadata")["krustlet-node-labels"]
    configuration: str = program.registered["node-registration"].plain("configuration")
    assert labels == f"krustlet.dev/runtime=wasmtime,krustlet.dev/configuration={configuration}"
    return configuration


@pytest.mark.parametrize(
    ("key", "value", "reaches_the_agent"),
    [
        ("maxPods", "7", True),
        ("apps", '[{"port": 80}]', True),
        ("machineType", "e2-medium", True),
        ("apps", '[{"port": 8081}]', False),
        ("apps", '[{"name": "another"}]', False),
        ("apps", '[{}, {"name": "second", "crate": "wasm_app", "port": 80}]', True),
        ("registryName", "another", False),
        ("diskSizeGb", "20", False),
        ("clusterNodes", "2", False),
        ("sourceRanges", '["10.0.0.0/8"]', False),
    ],
)
def test_a_vm_stays_and_takes_over_what_its_agent_is_told(
    program: Monitor, program_with: Program, key: str, value: str, reaches_the_agent: bool
) -> None:
    changed = program_with(**{key: value})
    assert lasting(changed) == lasting(program)
    assert (told(changed) != told(program)) is reaches_the_agent


@pytest.mark.parametrize(("key", "value"), [("nodeName", "another"), ("bootImage", "debian-cloud/debian-13")])
def test_another_name_and_another_system_are_another_vm(
    program: Monitor, program_with: Program, key: str, value: str
) -> None:
    assert lasting(program_with(**{key: value})) != lasting(program)


def test_a_vm_without_an_external_address_has_one_of_the_network_and_a_way_out(
    program: Monitor, program_with: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "info", lambda message, *_: said.append(message))
    within = program_with(externalIp="false", nodeName="n" * 63)
    assert [line for line in said if "app's port" in line] == []
    (interface,) = within.registered["node-vm"].plain("networkInterfaces")
    address = within.registered["node-internal-address"]
    assert "accessConfigs" not in interface
    assert interface["networkIp"] == "203.0.113.7"
    assert (address.plain("addressType"), len(address.plain("name"))) == ("INTERNAL", 63)
    assert address.plain("subnetwork") == interface["subnetwork"]
    assert "cluster-nat" in within.registered["node-vm"].dependencies
    for given, private in ((program, False), (within, True)):
        network = given.registered["cluster-pool"].plain("networkConfig")
        assert network == {"enablePrivateNodes": private}
    # Nobody asks there from outside; the URL is said once the pod is Ready.
    assert "workload-smoke-test" not in within.registered
    assert within.outputs["workload"]["url"] == "http://203.0.113.7:8080"
    assert not {"cluster-nat", "cluster-router", "node-internal-address"} & program.registered.keys()
    assert (
        within.registered["node-vm"].replacement_trigger != program.registered["node-vm"].replacement_trigger
    )


def test_a_vm_and_its_disk_are_made_anew_with_another_cluster(program: Monitor) -> None:
    for name in ("node-vm", "node-disk"):
        assert program.registered[name].replacement_trigger == ["Q0E="]


def test_the_agent_s_configuration_is_told_by_its_sum_and_not_by_where_it_lies() -> None:
    one = node.configuration("sum", "e2-small", 5, 8080)
    assert one == node.configuration("sum", "e2-small", 5, 8081)
    others = [
        node.configuration("another", "e2-small", 5, 8080),
        node.configuration("sum", "e2-medium", 5, 8080),
        node.configuration("sum", "e2-small", 6, 8080),
        node.configuration("sum", "e2-small", 5, 80),
        node.configuration("sum", "e2-small", 5, 8080, bootstrap="token"),
        node.configuration("sum", "e2-small", 5, 8080, pod_range="/24"),
    ]
    assert len({one, *others}) == 7


def test_another_key_is_waited_for_by_the_name_that_openssl_has_for_it(
    program: Monitor,
) -> None:
    # openssl ec -pubin -outform DER | sha256sum
    assert node.fingerprint(PUBLIC_KEY) == "3a681522bfed75cd4c6044da7c28e1e4"
    told = program.registered["node-vm"].plain("metadata")["krustlet-verification-key"]
    registration = program.registered["node-registration"]
    assert registration.plain("verification_keys") == node.fingerprint(told)


def test_nothing_is_named_after_the_app_but_its_image_and_its_pod(
    program: Monitor, program_with: Program
) -> None:
    changed = program_with(apps=first(name="another"))
    before, after = (
        {name: item.inputs for name, item in found.registered.items() if item.type != "pulumi:pulumi:Stack"}
        for found in (program, changed)
    )
    assert after.keys() == before.keys()
    differ = {name for name, inputs in before.items() if inputs != after[name]}
    assert differ == {
        "app-push",
        "app-signature",
        "app-signature-push",
        "app-attestation",
        "workload-prepare",
        "workload-pod",
        "workload-smoke-test",
    }


@pytest.mark.parametrize("name", ["primorial", "agent", "app", "cluster"])
def test_the_artifact_of_an_earlier_version_is_taken_over(program_with: Program, name: str) -> None:
    artifact = program_with(apps=first(name=name)).registered["app"]
    assert artifact.type == "awesome-wasm:artifact:WasmArtifact"
    assert name in artifact.aliases


def test_what_is_in_the_cluster_ends_with_it(program: Monitor) -> None:
    ends = {name for name, item in program.registered.items() if item.deleted_with == "cluster-cluster"}
    in_it = {name for name, item in program.registered.items() if item.type.startswith("kubernetes:")}
    assert ends == in_it | {"cluster-pool", "node-token", "node-registration"}


def test_what_is_in_the_registry_ends_with_it(program: Monitor) -> None:
    ends = {name for name, item in program.registered.items() if item.deleted_with == "registry-repository"}
    own = {
        f"{image}-{what}" for image in ("app", "agent") for what in ("attestation", "push", "signature-push")
    }
    assert ends == {"registry-node-reader"} | own


def test_who_may_reach_the_api_server_is_said_or_everybody_may(
    program: Monitor, program_with: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "masterAuthorizedNetworksConfig" not in program.registered["cluster-cluster"].inputs
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "info", lambda message, *_: said.append(message))
    program_with()
    assert sorted(said) == [
        "open to the world: the API server (authorizedNetworks limits it)",
        "open to the world: the app's port 8080 (sourceRanges limits it)",
    ]
    said.clear()
    limited = program_with(authorizedNetworks='["192.0.2.0/24"]', sourceRanges='["192.0.2.0/24"]')
    assert said == []
    authorized = limited.registered["cluster-cluster"].plain("masterAuthorizedNetworksConfig")
    assert [block["cidrBlock"] for block in authorized["cidrBlocks"]] == ["192.0.2.0/24"]
    assert authorized["gcpPublicCidrsAccessEnabled"] is True, "or the VM could not join"


def test_the_linux_nodes_are_a_pool_of_their_own(program: Monitor, program_with: Program) -> None:
    cluster, pool = program.registered["cluster-cluster"], program.registered["cluster-pool"]
    assert cluster.plain("removeDefaultNodePool") is True
    assert pool.plain("nodeCount") == 1
    changed = program_with(clusterNodes="3", clusterMachineType="e2-standard-2")
    assert changed.registered["cluster-cluster"].inputs == cluster.inputs
    assert changed.registered["cluster-pool"].plain("nodeCount") == 3
    config = changed.registered["cluster-pool"].plain("nodeConfig")
    assert config == {**pool.plain("nodeConfig"), "machineType": "e2-standard-2"}


def test_the_linux_nodes_run_as_an_account_that_can_do_what_a_node_needs(program: Monitor) -> None:
    pool, role = program.registered["cluster-pool"], program.registered["cluster-node-role"]
    account = pool.plain("nodeConfig")["serviceAccount"]
    assert role.plain("member") == f"serviceAccount:{account}"
    assert role.plain("role") == "roles/container.defaultNodeServiceAccount"
    assert "cluster-node-role" in pool.dependencies


def test_a_cluster_is_told_by_its_authority_and_not_by_how_it_is_reached(program: Monitor) -> None:
    provider = program.registered["cluster-provider"]
    assert provider.plain("clusterIdentifier") == hashlib.sha256(b"Q0E=").hexdigest()


def test_what_needs_an_api_waits_until_it_is_enabled(program: Monitor, program_with: Program) -> None:
    services = {name for name in program.registered if name.startswith("services-")}
    for resource in program.registered.values():
        alone = resource.type.startswith("gcp:") and not any(
            dependency in program.registered and program.registered[dependency].type.startswith("gcp:")
            for dependency in resource.dependencies
            if dependency not in services
        )
        if alone and resource.name not in services:
            assert services <= set(resource.dependencies), resource.name
    for name in services:
        assert program.registered[name].plain("disableOnDestroy") is False
    assert not [n for n in program_with(enableServices="false").registered if n.startswith("services-")]


def test_the_longest_name_of_a_node_leaves_room_for_the_names_made_of_it(program_with: Program) -> None:
    monitor = program_with(nodeName="n" * 63)
    for name in ("node-address", "node-app-firewall", "node-agent-firewall"):
        assert len(monitor.registered[name].plain("name")) <= 63
    assert len(monitor.registered["node-account"].plain("accountId")) <= 30


def test_only_the_control_plane_reaches_the_agent_s_port(program: Monitor) -> None:
    firewall = program.registered["node-agent-firewall"]
    assert firewall.plain("sourceRanges") == ["10.10.0.0/20", "10.20.0.0/16"]
    assert firewall.plain("allows") == [{"protocol": "tcp", "ports": ["10250"]}]
    assert firewall.plain("targetServiceAccounts") == ["node@p.iam.gserviceaccount.com"]


def test_pods_get_addresses_of_their_own_by_one_key(program: Monitor, program_with: Program) -> None:
    ranged = program_with(wasmPodCidr="10.70.0.0/16", maxPods="500")
    assert ranged.registered.keys() - program.registered.keys() == {
        *("node-pods-firewall", "node-proxier"),
        *("node-network-policies", "node-network-policies-role"),
    }
    ranges = ranged.registered["cluster-subnetwork"].plain("secondaryIpRanges")
    assert ranges[2:] == [{"rangeName": "wasm-pods", "ipCidrRange": "10.70.0.0/16"}]
    assert ranges[:2] == program.registered["cluster-subnetwork"].plain("secondaryIpRanges")
    vm = ranged.registered["node-vm"]
    [interface] = vm.plain("networkInterfaces")
    assert interface["aliasIpRanges"] == [{"ipCidrRange": "/22", "subnetworkRangeName": "wasm-pods"}]
    assert vm.plain("metadata")["krustlet-pod-range"] == "/22"
    assert told(ranged) != told(program), "the agent is started anew"
    assert "node-proxier" in vm.dependencies
    binding = ranged.registered["node-proxier"]
    assert binding.plain("roleRef")["name"] == "system:node-proxier"
    assert [subject["name"] for subject in binding.plain("subjects")] == ["system:nodes"]
    assert "node-network-policies" in vm.dependencies
    binding = ranged.registered["node-network-policies"]
    role = ranged.registered["node-network-policies-role"]
    assert binding.plain("roleRef")["name"] == role.plain("metadata")["name"]
    assert [subject["name"] for subject in binding.plain("subjects")] == ["system:nodes"]
    assert {verb for rule in role.plain("rules") for verb in rule["verbs"]} == {"list", "watch"}
    assert [rule["resources"] for rule in role.plain("rules")] == [
        ["networkpolicies"],
        ["pods", "namespaces"],
    ]
    firewall = ranged.registered["node-pods-firewall"]
    assert firewall.plain("destinationRanges") == ["10.70.0.0/16"]
    assert firewall.plain("sourceRanges") == ["10.10.0.0/20", "10.20.0.0/16"]
    assert firewall.plain("allows") == [{"protocol": "tcp"}]
    assert "destinationRanges" not in ranged.registered["node-app-firewall"].inputs


def test_the_app_stays_at_the_node_s_address_where_pods_have_their_own(
    program: Monitor, program_with: Program
) -> None:
    ranged = program_with(wasmPodCidr="10.70.0.0/16")
    ports = [
        run.registered["workload-pod"].plain("spec")["containers"][0]["ports"] for run in (program, ranged)
    ]
    port = {"name": "http", "containerPort": 8080, "protocol": "TCP"}
    assert ports == [[port], [port | {"hostPort": 8080}]]
    assert ranged.outputs["workload"]["url"] == program.outputs["workload"]["url"]
    # All of Kubernetes' standards but the loosest forbid a port of the node's.
    standard = "pod-security.kubernetes.io"
    labels = [run.registered["cluster-namespace"].plain("metadata")["labels"] for run in (program, ranged)]
    assert labels == [
        {f"{standard}/enforce": "restricted"},
        {f"{standard}/enforce": "privileged", f"{standard}/audit": "restricted"},
    ]


def test_a_range_for_pods_is_added_in_place_and_one_that_is_used_is_another_network(
    program: Monitor, program_with: Program
) -> None:
    ranged = program_with(wasmPodCidr="10.70.0.0/16")
    assert program.registered["cluster-subnetwork"].replace_on_changes == ["secondaryIpRanges"]
    assert ranged.registered["cluster-subnetwork"].replace_on_changes == [
        "secondaryIpRanges[0]",
        "secondaryIpRanges[1]",
        "secondaryIpRanges[2].ipCidrRange",
    ]


def test_the_smoke_test_is_last_and_runs_again_for_another_digest_or_url(program: Monitor) -> None:
    smoke = program.registered["workload-smoke-test"]
    assert smoke.plain("triggers") == [
        "europe-west1-docker.pkg.dev/p/awesome-wasm/primorial@sha256:" + "12" * 32,
        "http://203.0.113.7:8080",
        "pod-uid",
        "node-uid",
        program.registered["node-registration"].plain("instance"),
        program.registered["node-registration"].plain("configuration"),
        program.registered["node-registration"].plain("verification_keys"),
    ]
    assert list(program.registered)[-1] == "workload-smoke-test"


def test_the_components_register_what_they_offer(program: Monitor) -> None:
    assert program.outputs["workload"]["url"] == "http://203.0.113.7:8080"
    assert program.outputs["node"] == {"name": "krustlet-1", "address": "203.0.113.7"}
    assert program.outputs["registry"] == {"url": "europe-west1-docker.pkg.dev/p/awesome-wasm"}
    assert set(program.outputs["app"]) == {"image", "size"}


def test_a_second_app_has_its_name_in_its_resources_and_shares_key_namespace_and_node(
    program: Monitor, program_with: Program
) -> None:
    two = program_with(apps=first(second={"port": 8090}))
    per_app = {name for name in program.registered if name.startswith(("app-", "workload-"))}
    assert two.registered.keys() - program.registered.keys() == {
        name.replace("-", f"-{app}-", 1) for app in ("primorial", "second") for name in per_app
    } | {f"{part}-{app}" for app in ("primorial", "second") for part in ("app", "workload")}
    assert {"signing-key", "cluster-namespace"} <= two.registered.keys()
    assert two.registered["node-app-firewall"].plain("allows") == [
        {"protocol": "tcp", "ports": ["8080", "8090"]}
    ]
    assert {"app-primorial-signature-push", "app-second-signature-push"} <= set(
        two.registered["node-vm"].dependencies
    )
    for app, port in (("primorial", 8080), ("second", 8090)):
        pod = two.registered[f"workload-{app}-pod"]
        assert pod.plain("metadata")["name"] == app
        [container] = pod.plain("spec")["containers"]
        assert container["ports"] == [{"name": "http", "containerPort": port, "protocol": "TCP"}]
        assert container["image"].startswith(f"europe-west1-docker.pkg.dev/p/awesome-wasm/{app}@")
    # What is said of the first is what was said of it alone.
    for name in per_app:
        alone, beside = program.registered[name], two.registered[name.replace("-", "-primorial-", 1)]
        assert alone.inputs == beside.inputs


def test_an_app_keeps_its_resources_when_another_comes_or_goes(program_with: Program) -> None:
    two = program_with(apps=first(second={"port": 8090})).registered
    assert two["app-primorial"].aliases == ["app"], "it was alone before the second one came"
    assert two["app-second"].aliases == []
    swapped = program_with(
        apps=json.dumps([{**SECOND, "port": 8090}, {"name": "primorial", "crate": "wasm_app"}])
    ).registered
    assert swapped.keys() == two.keys(), "where it stands says nothing"
    left = program_with(apps=json.dumps([{**SECOND, "port": 8090}])).registered
    assert "app-second" in left["app"].aliases
    assert "workload-second" in left["workload"].aliases


def test_what_was_the_only_app_s_own_is_taken_over(program: Monitor) -> None:
    assert program.registered["signing-key"].aliases == ["app-key", "primorial-key"]
    assert program.registered["cluster-namespace"].aliases == ["workload-namespace"]


def test_an_app_gets_its_environment_and_what_it_may_reach(program_with: Program) -> None:
    told = program_with(
        apps=first(environment={"B": "2", "A": 1}, allowedHosts=["a.example", "b.example:80"])
    )
    pod = told.registered["workload-pod"]
    [container] = pod.plain("spec")["containers"]
    assert container["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    assert pod.plain("metadata")["annotations"] == {"krustlet.dev/allowed-hosts": "a.example,b.example:80"}
    assert pod.replace_on_changes == ["metadata.annotations"], "the agent reads them when the pod begins"


RANGE = {"wasmPodCidr": "10.70.0.0/16"}


def test_replicas_are_a_deployment_that_rolls_behind_a_service(
    program: Monitor, program_with: Program
) -> None:
    replicated = program_with(apps=first(replicas=3), **RANGE)
    kinds = {
        name: item.type.split(":")[-1]
        for name, item in replicated.registered.items()
        if name.startswith("workload-")
    }
    assert kinds == {
        "workload-prepare": "Pod",
        "workload-deployment": "Deployment",
        "workload-service": "Service",
        "workload-disruption-budget": "PodDisruptionBudget",
    }
    spec = replicated.registered["workload-deployment"].plain("spec")
    labels = {"app.kubernetes.io/name": "primorial"}
    assert (spec["replicas"], spec["selector"]) == (3, {"matchLabels": labels})
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": "25%"}
    template = spec["template"]
    assert template["metadata"]["labels"] == labels
    [spread] = template["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["maxSkew"]) == ("kubernetes.io/hostname", 1)
    # As the pod, but for the port of the node's.
    pod = {key: value for key, value in template["spec"].items() if key != "topologySpreadConstraints"}
    assert pod == program.registered["workload-pod"].plain("spec")
    service = replicated.registered["workload-service"].plain("spec")
    assert (service["selector"], service["ports"]) == (
        labels,
        [{"name": "http", "port": 8080, "targetPort": "http"}],
    )
    budget = replicated.registered["workload-disruption-budget"].plain("spec")
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    assert replicated.outputs["workload"]["url"] == "http://primorial.wasm.svc:8080"
    assert {"workload-prepare", "node-registration", "app-signature-push"} <= set(
        replicated.registered["workload-deployment"].dependencies
    )
    # No port of the node's is open, and above all not every one.
    assert "node-app-firewall" not in replicated.registered
    assert "node-app-firewall" in program.registered


def test_how_many_pods_there_are_is_the_autoscaler_s_affair_where_there_is_one(program_with: Program) -> None:
    limits = {"minReplicas": 2, "maxReplicas": 10, "cpu": 60}
    scaled = program_with(apps=first(autoscaling=limits, cpuLimit="1.5"), **RANGE).registered
    spec = scaled["workload-autoscaler"].plain("spec")
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 10)
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "primorial"}
    [metric] = spec["metrics"]
    assert metric["resource"] == {"name": "cpu", "target": {"type": "AverageValue", "averageValue": "900m"}}
    fixed = program_with(apps=first(replicas=2), **RANGE).registered
    assert "workload-autoscaler" not in fixed
    assert scaled["workload-deployment"].ignore_changes == ["spec.replicas"]
    assert fixed["workload-deployment"].ignore_changes == []
    # What it decided is taken back when it goes.
    forced = [
        item["workload-deployment"].plain("metadata")["annotations"].get("pulumi.com/patchForce")
        for item in (scaled, fixed)
    ]
    assert forced == [None, "true"]


def test_one_node_is_as_it_was_and_a_second_one_moves_nothing_of_it(
    program: Monitor, program_with: Program
) -> None:
    two = program_with(nodes="2")
    own = ("account", "agent-firewall", "address", "token", "bootstrap", "disk", "vm", "registration")
    added = two.registered.keys() - program.registered.keys()
    assert added == {"node-2", "registry-node-2-reader", *(f"node-2-{part}" for part in own)}
    differ = {
        name
        for name, item in program.registered.items()
        if item.type != "pulumi:pulumi:Stack" and item.inputs != two.registered[name].inputs
    }
    assert differ == {"workload-prepare", "workload-pod"}, "which say now that they are on the first"
    for name in differ:
        before, after = (found.registered[name] for found in (program, two))
        place = after.plain("spec").pop("affinity")["nodeAffinity"]
        [term] = place["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert term == {"matchExpressions": [{"key": "krustlet.dev/number", "operator": "DoesNotExist"}]}
        assert after.inputs == before.inputs
        # Alone again, it stays: while it was made anew the others would still be there.
        assert (before.ignore_changes, after.ignore_changes) == (["spec.affinity"], [])
    labels = two.registered["node-2-vm"].plain("metadata")["krustlet-node-labels"]
    assert (
        labels
        == f"krustlet.dev/number=2,{program.registered['node-vm'].plain('metadata')['krustlet-node-labels']}"
    )
    names = [two.registered[f"node-2-{part}"].plain("name") for part in ("vm", "disk", "address")]
    assert names == ["krustlet-2", "krustlet-2-disk", "krustlet-2-address"]
    bindings = [two.registered[f"{node}-bootstrap"].plain("metadata")["name"] for node in ("node", "node-2")]
    assert bindings == ["krustlet-bootstrap", "krustlet-bootstrap-krustlet-2"]


def test_nodes_are_in_turn_in_the_region_s_zones(program_with: Program) -> None:
    given = {"nodes": "4"}
    four = program_with(**given).registered
    parts = ("vm", "disk")
    for number, letter in enumerate("bcdb", start=1):
        name = "node" if number == 1 else f"node-{number}"
        zone = f"europe-west1-{letter}"
        assert [four[f"{name}-{part}"].plain("zone") for part in parts] == [zone] * 2
        assert f"krustlet-{number}.{zone}.c.localcloud-dev.internal" in four[f"{name}-registration"].plain(
            "hostnames"
        )


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_another_node_moves_none(count: int) -> None:
    zones = ["r-a", "r-b", "r-d"]
    placed = node.spread("r-b", zones, count)
    assert node.spread("r-b", zones, count + 1)[:count] == placed
    assert placed[:4] == ["r-b", "r-d", "r-a", "r-b"][:count]
    assert node.spread("r-b", [], count) == ["r-b"] * count


def test_a_vm_is_touched_when_the_one_before_it_is_ready_and_made_anew_with_no_other(
    program_with: Program,
) -> None:
    three = program_with(nodes="3", **RANGE).registered
    for before, after in (("node", "node-2"), ("node-2", "node-3")):
        assert f"{before}-registration" in three[f"{after}-vm"].dependencies
        # What a value comes from would replace it: none is the other node's.
        for part in ("account", "disk", "vm", "registration"):
            resource = three[f"{after}-{part}"]
            found = {name for names in resource.property_dependencies.values() for name in names}
            assert not [
                name
                for name in found
                if name.startswith(("node-", "cluster-")) and not name.startswith((f"{after}-", "cluster-"))
            ]
            assert not [name for name in resource.replace_with if not name.startswith(f"{after}-")]
    assert [name for name in three if name.endswith("proxier")] == ["node-proxier"]
    ranges = [
        three[f"{name}-vm"].plain("networkInterfaces")[0]["aliasIpRanges"] for name in ("node", "node-3")
    ]
    assert ranges[0] == ranges[1]


def test_replicas_are_spread_over_nodes_and_zones_and_wait_for_all_nodes(program_with: Program) -> None:
    three = program_with(nodes="3", apps=first(second={"replicas": 3}), **RANGE).registered
    deployment = three["workload-second-deployment"]
    template = deployment.plain("spec")["template"]["spec"]
    keys = [item["topologyKey"] for item in template["topologySpreadConstraints"]]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert template["nodeSelector"] == {"kubernetes.io/arch": "wasm32-wasi"}
    registrations = {"node-registration", "node-2-registration", "node-3-registration"}
    assert registrations <= set(deployment.dependencies)
    # The engine deletes before a node what has a value of it, where it cannot tell that the value stays.
    used = {name for names in deployment.property_dependencies.values() for name in names}
    assert not registrations & used
    # A single pod's port is open at the first node's address alone.
    assert [name for name in three if name.endswith("app-firewall")] == ["node-app-firewall"]
