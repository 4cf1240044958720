"""A Rust crate becomes a WebAssembly pod that answers: build, sign, push, join, run.

Wiring and exports only.
"""

from __future__ import annotations

import pulumi

from components import config
from components.artifact import AgentArtifact, AgentArtifactArgs, WasmArtifact, WasmArtifactArgs
from components.cluster import KubernetesCluster, KubernetesClusterArgs
from components.node import KrustletNode, KrustletNodeArgs
from components.project import ProjectServices, ProjectServicesArgs
from components.registry import ContainerRegistry, ContainerRegistryArgs
from components.workload import WasmPod, WasmPodArgs

settings = config.load()
google, app = settings.google, settings.app

services = ProjectServices(
    "services",
    ProjectServicesArgs(google.project, google.enable_services, kms=settings.kms_key is not None),
)
registry = ContainerRegistry(
    "registry",
    ContainerRegistryArgs(google.project, settings.registry.name, settings.registry.location, services),
)
artifact = WasmArtifact(
    "app",
    WasmArtifactArgs(
        app.crate,
        pulumi.Output.concat(registry.url, "/", app.name),
        registry.lifetime,
        settings.signing_key,
        settings.signing_key_password,
        settings.kms_key,
    ),
    # Once it was called as the app is, whose name may change.
    pulumi.ResourceOptions(aliases=[pulumi.Alias(name=app.name)]),
)
agent = AgentArtifact(
    "agent",
    AgentArtifactArgs(
        settings.node.agent_crate,
        pulumi.Output.concat(registry.url, "/krustlet"),
        registry.lifetime,
        artifact.key,
        settings.node.agent_target,
    ),
)
cluster = KubernetesCluster(
    "cluster",
    KubernetesClusterArgs(
        google.project, google.region, google.zone, settings.cluster, settings.network, services
    ),
)
node = KrustletNode(
    "node",
    KrustletNodeArgs(
        google.project,
        google.region,
        google.zone,
        settings.node,
        app.port,
        settings.network,
        cluster,
        registry,
        agent,
        artifact,
        services,
    ),
)
workload = WasmPod(
    "workload",
    WasmPodArgs(app, artifact, node),
    pulumi.ResourceOptions(providers=[cluster.provider]),
)

pulumi.export("url", workload.url)
pulumi.export("image", artifact.image)
pulumi.export("public_key", artifact.public_key)
pulumi.export("registry", registry.url)
pulumi.export("cluster", cluster.name)
pulumi.export("kubeconfig", cluster.kubeconfig)
pulumi.export("node", node.name)
pulumi.export("namespace", workload.namespace)
pulumi.export("pod", workload.pod)
pulumi.export("wasm_bytes", artifact.size)
pulumi.export("agent_image", agent.image)
