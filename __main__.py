"""Rust crates become WebAssembly pods that answer: build, sign, push, join, run.

Wiring and exports only.
"""

from __future__ import annotations

import pulumi

from components import config
from components.artifact import (
    AgentArtifact,
    AgentArtifactArgs,
    WasmArtifact,
    WasmArtifactArgs,
)
from components.cluster import KubernetesCluster, KubernetesClusterArgs
from components.naming import former_keys, former_names, resource_name
from components.node import KrustletNodeArgs, krustlet_nodes
from components.project import ProjectServices, ProjectServicesArgs
from components.providers.signature import SigningKey
from components.registry import ContainerRegistry, ContainerRegistryArgs
from components.workload import WasmDeployment, WasmPod, WorkloadArgs

settings = config.load()
google, apps = settings.google, settings.apps

services = ProjectServices(
    "services",
    ProjectServicesArgs(google.project, google.enable_services, kms=settings.kms_key is not None),
)
registry = ContainerRegistry(
    "registry",
    ContainerRegistryArgs(google.project, settings.registry.name, settings.registry.location, services),
)
signing_key = SigningKey(
    "signing-key",
    settings.signing_key,
    settings.signing_key_password,
    settings.kms_key,
    # Once it was the only app's own.
    pulumi.ResourceOptions(aliases=former_keys(apps)),
)
artifacts = {
    app.name: WasmArtifact(
        resource_name("app", app, apps),
        WasmArtifactArgs(
            app.crate, pulumi.Output.concat(registry.url, "/", app.name), registry.lifetime, signing_key
        ),
        pulumi.ResourceOptions(aliases=former_names("app", app, apps)),
    )
    for app in apps
}
agent = AgentArtifact(
    "agent",
    AgentArtifactArgs(
        settings.nodes[0].agent_crate,
        pulumi.Output.concat(registry.url, f"/{config.AGENT_IMAGE}"),
        registry.lifetime,
        signing_key,
        settings.nodes[0].agent_target,
    ),
)
cluster = KubernetesCluster(
    "cluster",
    KubernetesClusterArgs(
        google.project,
        google.region,
        google.zone,
        settings.cluster,
        settings.network,
        settings.namespace,
        services,
    ),
)
nodes = krustlet_nodes(
    KrustletNodeArgs(
        google.project,
        google.region,
        google.zone,
        settings.nodes[0],
        apps,
        settings.network,
        cluster,
        registry,
        agent,
        tuple(artifacts.values()),
        signing_key,
        services,
    ),
    settings.nodes,
)
in_cluster = pulumi.ResourceOptions(providers=[cluster.provider])
workloads = {
    app.name: (WasmPod if app.replicas is None else WasmDeployment)(
        resource_name("workload", app, apps),
        WorkloadArgs(app, artifacts[app.name], nodes),
        pulumi.ResourceOptions.merge(
            in_cluster, pulumi.ResourceOptions(aliases=former_names("workload", app, apps))
        ),
    )
    for app in apps
}

# What is at the node's address, where there is one.
main = next((app.name for app in apps if app.replicas is None), apps[0].name)
pulumi.export("url", workloads[main].url)
pulumi.export("urls", {name: workload.url for name, workload in workloads.items()})
pulumi.export("image", artifacts[main].image)
pulumi.export("images", {name: artifact.image for name, artifact in artifacts.items()})
pulumi.export("public_key", signing_key.public_key)
pulumi.export("registry", registry.url)
pulumi.export("cluster", cluster.name)
pulumi.export("kubeconfig", cluster.kubeconfig)
pulumi.export("node", nodes[0].name)
pulumi.export("nodes", [{"name": node.name, "zone": node.zone, "address": node.address} for node in nodes])
pulumi.export("namespace", cluster.namespace)
pulumi.export("pod", workloads[main].name)
pulumi.export("wasm_bytes", artifacts[main].size)
pulumi.export("agent_image", agent.image)
