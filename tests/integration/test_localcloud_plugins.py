"""The stand-ins under a real `pulumi` and unchanged SDKs, against localcloud: one stack through its life."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.pulumi_stack import Stack
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json
import pulumi
import pulumi_command as command
import pulumi_gcp as gcp
import pulumi_kubernetes as kubernetes

config, where = pulumi.Config(), pulumi.Config("gcp")
region, zone = where.require("region"), where.require("zone")
repository = gcp.artifactregistry.Repository(
    "repository", location=region, repository_id="it", format="DOCKER", description=config.require("text")
)
account = gcp.serviceaccount.Account("account", account_id="it-node")
gcp.artifactregistry.RepositoryIamMember(
    "member",
    location=region,
    repository=repository.repository_id,
    role="roles/artifactregistry.reader",
    member=account.member,
)
network = gcp.compute.Network("network", auto_create_subnetworks=False)
subnetwork = gcp.compute.Subnetwork(
    "subnetwork",
    region=region,
    network=network.id,
    ip_cidr_range="10.0.0.0/20",
    secondary_ip_ranges=[
        {"range_name": "pods", "ip_cidr_range": "10.4.0.0/14"},
        {"range_name": "services", "ip_cidr_range": "10.8.0.0/20"},
    ],
)
gcp.compute.Firewall(
    "firewall",
    name="it",
    network=network.id,
    allows=[{"protocol": "tcp", "ports": ["8080"]}],
    source_ranges=["0.0.0.0/0"],
)
address = gcp.compute.Address("address", region=region)
instance = gcp.compute.Instance(
    "instance",
    zone=zone,
    name="it",
    machine_type=config.get("machine") or "e2-small",
    allow_stopping_for_update=True,
    boot_disk={"initialize_params": {"image": "debian-cloud/debian-12"}},
    network_interfaces=[{"subnetwork": subnetwork.id, "access_configs": [{"nat_ip": address.address}]}],
    metadata={"text": config.require("text"), "hidden": pulumi.Output.secret("hush")},
    metadata_startup_script=f"#!/bin/sh\\necho {config.require('script')}\\n",
    service_account={"email": account.email, "scopes": ["cloud-platform"]},
)
cluster = gcp.container.Cluster(
    "cluster",
    location=zone,
    name="it",
    network=network.id,
    subnetwork=subnetwork.id,
    ip_allocation_policy={
        "cluster_secondary_range_name": "pods",
        "services_secondary_range_name": "services",
    },
    initial_node_count=1,
    deletion_protection=False,
)


def kubeconfig(endpoint, certificate):
    user = {
        "apiVersion": "client.authentication.k8s.io/v1beta1",
        "command": "gke-gcloud-auth-plugin",
        "interactiveMode": "Never",
        "provideClusterInfo": True,
    }
    server = {"server": f"https://{endpoint}", "certificate-authority-data": certificate}
    return json.dumps({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": server}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
        "users": [{"name": "u", "user": {"exec": user}}],
    })


config_of_the_cluster = pulumi.Output.secret(
    pulumi.Output.all(cluster.endpoint, cluster.master_auth.cluster_ca_certificate).apply(
        lambda parts: kubeconfig(*parts)
    )
)
provider = kubernetes.Provider("provider", kubeconfig=config_of_the_cluster)
options = pulumi.ResourceOptions(provider=provider)
namespace = kubernetes.core.v1.Namespace("namespace", metadata={"name": "it"}, opts=options)
settings = kubernetes.core.v1.ConfigMap(
    "settings",
    metadata={"namespace": namespace.metadata.name},
    data={"text": config.require("text")},
    opts=options,
)
if config.get_bool("pod"):
    kubernetes.core.v1.Pod(
        "pod",
        metadata={"name": "pod", "namespace": namespace.metadata.name},
        spec={
            "scheduler_name": "nobody",  # the test plays scheduler and kubelet
            "containers": [
                {
                    "name": "c",
                    "image": "example.invalid/c:1",
                    "resources": {"limits": {"cpu": config.get("cpu") or "1000m"}},
                }
            ]
        },
        opts=pulumi.ResourceOptions(
            provider=provider, custom_timeouts=pulumi.CustomTimeouts(create="1s", update="30s")
        ),
    )
check = command.local.Command(
    "check",
    create="echo $TEXT",
    environment={"TEXT": config.require("text")},
    triggers=[instance.instance_id],
)
pulumi.export("registry", repository.registry_uri)
pulumi.export("address", instance.network_interfaces[0].access_configs[0].nat_ip)
pulumi.export("instance", instance.instance_id)
pulumi.export("settings", settings.metadata.name)
pulumi.export("kubeconfig", config_of_the_cluster)
pulumi.export("said", check.stdout)
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    missing = [
        t
        for t in ("pulumi", "pulumi-language-python", "etcd", "kube-apiserver", "registry")
        if not shutil.which(t)
    ]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)}; scripts/test puts them there")
    base = tmp_path_factory.mktemp("plugins")
    environment = {
        **os.environ,
        "LOCALCLOUD_HOME": str(base / "localcloud"),
        "PULUMI_HOME": str(base / "pulumi"),
        "PULUMI_BACKEND_URL": f"file://{base}",
        "PULUMI_CONFIG_PASSPHRASE": "x",
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PYTHONPATH": str(ROOT),
    }
    control = [sys.executable, "-m", "localcloud"]
    subprocess.run([*control, "start"], env=environment, check=True, cwd=ROOT)
    try:
        printed = subprocess.run(
            [*control, "env"], env=environment, check=True, cwd=ROOT, capture_output=True, text=True
        )
        lines = [line.removeprefix("export ").split("=", 1) for line in printed.stdout.splitlines()]
        environment |= {name: value.strip("'") for name, value in lines}
        python = Path(sys.executable).parent
        environment["PATH"] = f"{python}{os.pathsep}{environment['PATH']}"
        directory = base / "project"
        directory.mkdir()
        (directory / "Pulumi.yaml").write_text(yaml.safe_dump({"name": "it", "runtime": "python"}))
        (directory / "__main__.py").write_text(PROGRAM)
        made = Stack(directory, environment)
        made.run("stack", "init")
        made.set(gcp__project="localcloud-dev", gcp__region="europe-west1", gcp__zone="europe-west1-b")
        made.set(text="one", script="one")
        yield made
    finally:
        subprocess.run([*control, "reset"], env=environment, check=True, cwd=ROOT, input="", text=True)


def kubectl(stack: Stack, *arguments: str) -> None:
    path = stack.directory / "kubeconfig"
    path.write_text(stack.outputs()["kubeconfig"])
    subprocess.run(["kubectl", "--kubeconfig", path, *arguments], env=stack.environment, check=True)


def test_a_stack_goes_through_its_life(stack: Stack) -> None:
    preview = stack.run("preview")
    assert "14 to create" in preview, preview
    assert stack.up() == {"create": 14}
    outputs = stack.outputs()
    assert outputs["registry"].endswith("/localcloud-dev/it")
    assert outputs["address"].startswith("127.")
    assert outputs["said"] == "one"

    assert stack.up() == {"same": 14}
    stack.run("refresh", "--yes", "--skip-preview")
    assert set(stack.last()) == {"same"}
    stack.run("preview", "--expect-no-changes")

    stack.set(text="two")
    # the description, the metadata, the config map (immutable by default, so replaced) and the command
    assert stack.up() == {"same": 10, "update": 3, "replace": 1}
    assert stack.outputs()["instance"] == outputs["instance"]
    assert stack.outputs()["settings"] != outputs["settings"]
    assert stack.outputs()["said"] == "two"

    stack.set(machine="e2-medium")
    # stopped, changed, started: the same VM
    assert stack.up() == {"same": 13, "update": 1}
    assert stack.outputs()["instance"] == outputs["instance"]

    stack.set(script="two")
    # another startup script is another VM, which is the command's trigger
    assert stack.up() == {"same": 12, "replace": 2}
    assert stack.outputs()["instance"] != outputs["instance"]

    stack.google("COMPUTE", "DELETE", "projects/localcloud-dev/global/firewalls/it")
    until(
        lambda: "- 1 deleted" in stack.run("refresh", "--yes", "--skip-preview"),
        "the refresh to see that the firewall rule is gone",
        timeout=30,
    )
    assert stack.up() == {"same": 13, "create": 1}

    stack.set(pod="true")
    assert "waiting for it timed out" in stack.run("up", "--yes", "--skip-preview", fails=True)
    conditions = [{"type": t, "status": "True"} for t in ("PodScheduled", "Initialized", "Ready")]
    status = json.dumps({"status": {"phase": "Running", "conditions": conditions}})
    kubectl(stack, "patch", "pod", "pod", "-n", "it", "--subresource=status", "--type=merge", "-p", status)
    # the pod that was there but not ready is taken up, not made anew
    assert stack.up() == {"same": 14, "update": 1}
    assert stack.up() == {"same": 15}

    # what a pod cannot change is a new one, of which the living one's server has no complaint
    stack.set(cpu="500m")
    preview = stack.run("preview", "--diff")
    assert "1 to replace" in preview, preview
    assert "would be refused" not in preview
    stack.set(cpu="much")
    assert "would be refused" in stack.run("preview", fails=True)

    state = stack.run("stack", "export")
    assert "hush" not in state

    stack.run("destroy", "--yes", "--skip-preview")
    assert stack.last() == {"delete": 15}
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(stack.directory) not in listed
