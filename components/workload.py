"""WasmPod and WasmDeployment: an app as one pod, or as many behind a Service."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import pulumi
import pulumi_command as command
import pulumi_kubernetes as kubernetes
from pulumi_kubernetes.apps import v1 as apps
from pulumi_kubernetes.autoscaling import v2 as scaling
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta import v1 as meta

from components.artifact import WasmArtifact
from components.config import AppConfig, AutoscalingConfig
from components.node import NUMBER_LABEL, KrustletNode

ARCHITECTURE = "wasm32-wasi"
PREPARE_ONLY = "krustlet.dev/prepare-only"
ALLOWED_HOSTS = "krustlet.dev/allowed-hosts"
APP_LABEL = "app.kubernetes.io/name"
# A component's instance starts in well under a millisecond, so that what is waited for is the network.
SMOKE_TEST = """\
curl --fail --silent --show-error --max-time 10 --retry 20 --retry-delay 1 --retry-all-errors \\
  --retry-max-time 60 "$URL/healthz" &&
curl --fail --silent --show-error --max-time 10 "$URL/primorial/30" | grep 6469693230
"""


@dataclass(frozen=True)
class WorkloadArgs:
    """What runs, where: a single pod on the first of the nodes, replicas on all of them."""

    app: AppConfig
    artifact: WasmArtifact
    nodes: tuple[KrustletNode, ...]


class WasmPod(pulumi.ComponentResource):
    """An app as one pod, served on its port at the node's address."""

    pulumi_type = "awesome-wasm:workload:WasmPod"
    name: pulumi.Output[str]
    url: pulumi.Output[str]
    """http://ADDRESS:PORT, known once it has answered; within a network, once the pod is Ready."""

    def __init__(self, name: str, args: WorkloadArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__(self.pulumi_type, name, None, opts)
        prepared = _prepared(name, args, self, WasmDeployment.pulumi_type)
        metadata: meta.ObjectMetaArgsDict = {
            "name": args.app.name,
            "namespace": args.nodes[0].cluster.namespace,
            "labels": {APP_LABEL: args.app.name},
            **_annotations(args.app),
        }
        pod = kubernetes.core.v1.Pod(
            f"{name}-pod",
            metadata=metadata,
            spec={
                **_place(args.nodes),
                **_spec(args.app, args.artifact.image, host_port=args.nodes[0].pods_have_addresses),
            },
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[args.nodes[0].registration, args.artifact.signed, prepared],
                delete_before_replace=True,
                deleted_with=args.nodes[0].cluster.lifetime,
                # A pod ends with its node; the next VM of that name gets a new one.
                replace_with=[args.nodes[0].registration],
                # The agent reads them when the pod begins.
                replace_on_changes=["metadata.annotations"],
                ignore_changes=_kept_place(args.nodes),
            ),
        )
        url = pulumi.Output.format("http://{0}:{1}", args.nodes[0].address, args.app.port)
        # A preview of another pod has metadata without a uid, which would pass for None; it has no status.
        uid = pulumi.Output.all(pod.metadata.uid, pod.status).apply(lambda made: made[0])
        answered = uid
        if args.nodes[0].is_reachable:
            answered = self._smoke_test(name, args, url, uid, pod)
        self.name = pod.metadata.name
        self.url = pulumi.Output.all(url, answered).apply(lambda parts: str(parts[0]))
        self.register_outputs({"name": self.name, "url": self.url})

    def _smoke_test(
        self,
        name: str,
        args: WorkloadArgs,
        url: pulumi.Output[str],
        uid: pulumi.Output[str],
        pod: kubernetes.core.v1.Pod,
    ) -> pulumi.Output[str]:
        """Ask the app from where Pulumi runs; give what it said."""
        smoke_test = command.local.Command(
            f"{name}-smoke-test",
            create=SMOKE_TEST,
            environment={"URL": url},
            # Whatever may have ended the pod or moved it: up is up when the app answers again.
            triggers=[
                args.artifact.image,
                url,
                uid,
                args.nodes[0].registration.uid,
                args.nodes[0].registration.instance,
                args.nodes[0].registration.configuration,
                args.nodes[0].registration.verification_keys,
            ],
            opts=pulumi.ResourceOptions(parent=self, depends_on=[pod], delete_before_replace=True),
        )
        return smoke_test.stdout


class WasmDeployment(pulumi.ComponentResource):
    """An app as pods that are made again, moved and replaced one after the other, behind a Service."""

    pulumi_type = "awesome-wasm:workload:WasmDeployment"
    name: pulumi.Output[str]
    url: pulumi.Output[str]
    """http://NAME.NAMESPACE.svc:PORT, within the cluster, known once all pods are Ready."""

    def __init__(self, name: str, args: WorkloadArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__(self.pulumi_type, name, None, opts)
        app, lifetime = args.app, args.nodes[0].cluster.lifetime
        metadata: meta.ObjectMetaArgsDict = {
            "name": app.name,
            "namespace": args.nodes[0].cluster.namespace,
            "labels": {APP_LABEL: app.name},
        }
        prepared = _prepared(name, args, self, WasmPod.pulumi_type)
        annotations: dict[str, pulumi.Input[str]] = {}
        if len(args.nodes) == 1:
            # Where another node took its place: up is up when its pods are there again. With several, they
            # were there before the node went; and for the engine a value of a node's would have the
            # Deployment go before the node does.
            annotations["krustlet.dev/node"] = args.nodes[0].registration.uid
        if not app.autoscaling:
            # Where there was an autoscaler the number is what it said last.
            annotations["pulumi.com/patchForce"] = "true"
        deployment = kubernetes.apps.v1.Deployment(
            f"{name}-deployment",
            metadata={**metadata, "annotations": annotations},
            spec=_deployment(app, args.artifact.image, SPREAD if len(args.nodes) > 1 else SPREAD[:1]),
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[
                    *(node.registration for node in args.nodes),
                    args.artifact.signed,
                    prepared,
                ],
                deleted_with=lifetime,
                # They are the autoscaler's affair then.
                ignore_changes=["spec.replicas"] if app.autoscaling else None,
            ),
        )
        within = pulumi.ResourceOptions(parent=self, deleted_with=lifetime, depends_on=[deployment])
        port: core.ServicePortArgsDict = {"name": "http", "port": app.port, "target_port": "http"}
        service = kubernetes.core.v1.Service(
            f"{name}-service",
            metadata=metadata,
            spec={"selector": {APP_LABEL: app.name}, "ports": [port]},
            opts=within,
        )
        kubernetes.policy.v1.PodDisruptionBudget(
            f"{name}-disruption-budget",
            metadata=metadata,
            spec={"max_unavailable": 1, "selector": _selector(app)},
            opts=within,
        )
        if app.autoscaling:
            kubernetes.autoscaling.v2.HorizontalPodAutoscaler(
                f"{name}-autoscaler",
                metadata=metadata,
                spec=_autoscaler(app, app.autoscaling),
                opts=within,
            )
        self.name = deployment.metadata.name
        self.url = pulumi.Output.format(
            "http://{0}.{1}.svc:{2}", service.metadata.name, service.metadata.namespace, app.port
        )
        self.register_outputs({"name": self.name, "url": self.url})


# On a node for WebAssembly, with nothing that the strictest of Kubernetes' standards forbids.
PLACEMENT: core.PodSpecArgsDict = {
    "automount_service_account_token": False,
    "node_selector": {"kubernetes.io/arch": ARCHITECTURE},
    "tolerations": [
        {"key": "kubernetes.io/arch", "operator": "Equal", "value": ARCHITECTURE, "effect": effect}
        for effect in ("NoSchedule", "NoExecute")
    ],
    "security_context": {"run_as_non_root": True, "seccomp_profile": {"type": "RuntimeDefault"}},
    "containers": [],
}
# What the pods of a Deployment are spread over; on a single node there is nothing to be said of zones.
SPREAD = ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
CONFINED: core.SecurityContextArgsDict = {
    "allow_privilege_escalation": False,
    "read_only_root_filesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _prepared(
    name: str, args: WorkloadArgs, parent: pulumi.Resource, other_type: str
) -> kubernetes.core.v1.Pod:
    """Pull, check and compile beside what runs: with that done the next one serves once it has the port.

    Pulumi names it, and so makes another before the former one goes. `other_type` is the component that the
    app was in before it got replicas, or has lost them.
    """
    return kubernetes.core.v1.Pod(
        f"{name}-prepare",
        metadata={"namespace": args.nodes[0].cluster.namespace, "annotations": {PREPARE_ONLY: "true"}},
        spec={
            **PLACEMENT,
            **_place(args.nodes),
            "restart_policy": "Never",
            "containers": [{"name": "prepare", "image": args.artifact.image, "security_context": CONFINED}],
        },
        opts=pulumi.ResourceOptions(
            parent=parent,
            depends_on=[args.nodes[0].registration, args.artifact.signed],
            deleted_with=args.nodes[0].cluster.lifetime,
            replace_with=[args.nodes[0].registration],
            ignore_changes=_kept_place(args.nodes),
            aliases=[pulumi.Alias(parent=pulumi.create_urn(name, other_type))],
        ),
    )


def _place(nodes: tuple[KrustletNode, ...]) -> core.PodSpecArgsDict:
    """Give where a pod is that ends with the first of several nodes: on the one that has no number."""
    if len(nodes) == 1:
        return {"containers": []}
    unnumbered: core.NodeSelectorRequirementArgsDict = {"key": NUMBER_LABEL, "operator": "DoesNotExist"}
    required: core.NodeSelectorArgsDict = {"node_selector_terms": [{"match_expressions": [unnumbered]}]}
    affinity: core.NodeAffinityArgsDict = {"required_during_scheduling_ignored_during_execution": required}
    return {"affinity": {"node_affinity": affinity}, "containers": []}


def _kept_place(nodes: tuple[KrustletNode, ...]) -> list[str] | None:
    """Say what stays as it is when the first node is left alone: a new pod would find the others, which go
    last.
    """
    return ["spec.affinity"] if len(nodes) == 1 else None


def _annotations(app: AppConfig) -> meta.ObjectMetaArgsDict:
    """Give what a pod of the app's says of itself to its node."""
    return {"annotations": {ALLOWED_HOSTS: ",".join(app.allowed_hosts)}} if app.allowed_hosts else {}


def _spec(app: AppConfig, image: pulumi.Input[str], *, host_port: bool) -> core.PodSpecArgsDict:
    """Give the app's pod. With `host_port` it is served on the node's address beside its own."""
    port: core.ContainerPortArgsDict = {
        "name": "http",
        "container_port": app.port,
        "protocol": "TCP",
    }
    if host_port:
        port["host_port"] = app.port
    health: core.ProbeArgsDict = {"http_get": {"path": "/healthz", "port": app.port}}
    container: core.ContainerArgsDict = {
        "name": app.name,
        "image": image,
        "ports": [port],
        "resources": {
            "requests": {"memory": app.memory_limit, "cpu": "10m"},
            "limits": {"memory": app.memory_limit, "cpu": app.cpu_limit},
        },
        "readiness_probe": {**health, "period_seconds": 5},
        "liveness_probe": {**health, "period_seconds": 10, "failure_threshold": 3},
        "security_context": CONFINED,
    }
    if app.environment:
        container["env"] = [{"name": key, "value": value} for key, value in sorted(app.environment.items())]
    return {**PLACEMENT, "containers": [container]}


def _selector(app: AppConfig) -> meta.LabelSelectorArgsDict:
    """Give what an app's pods are found by."""
    return {"match_labels": {APP_LABEL: app.name}}


def _deployment(
    app: AppConfig, image: pulumi.Input[str], over: tuple[str, ...]
) -> apps.DeploymentSpecArgsDict:
    """Give pods spread over nodes and zones, of which a new one is Ready before an old one goes."""
    spread: list[core.TopologySpreadConstraintArgsDict] = [
        {
            "max_skew": 1,
            "topology_key": key,
            "when_unsatisfiable": "ScheduleAnyway",
            "label_selector": _selector(app),
            "match_label_keys": ["pod-template-hash"],
        }
        for key in over
    ]
    pod: core.PodSpecArgsDict = {
        **_spec(app, image, host_port=False),
        "topology_spread_constraints": spread,
    }
    rolling: apps.RollingUpdateDeploymentArgsDict = {"max_unavailable": 0, "max_surge": "25%"}
    labelled: meta.ObjectMetaArgsDict = {"labels": {APP_LABEL: app.name}, **_annotations(app)}
    return {
        "replicas": app.replicas,
        "selector": _selector(app),
        "strategy": {"type": "RollingUpdate", "rolling_update": rolling},
        "template": {"metadata": labelled, "spec": pod},
    }


def _autoscaler(
    app: AppConfig, autoscaling: AutoscalingConfig
) -> scaling.HorizontalPodAutoscalerSpecArgsDict:
    """Give what keeps the pods at a part of their limit; by their requests they would be busy at once."""
    limit = app.cpu_limit
    milli = int(limit[:-1]) if limit.endswith("m") else int(Decimal(limit) * 1000)
    target: scaling.MetricTargetArgsDict = {
        "type": "AverageValue",
        "average_value": f"{max(1, milli * autoscaling.cpu // 100)}m",
    }
    metric: scaling.MetricSpecArgsDict = {"type": "Resource", "resource": {"name": "cpu", "target": target}}
    return {
        "scale_target_ref": {"api_version": "apps/v1", "kind": "Deployment", "name": app.name},
        "min_replicas": autoscaling.min_replicas,
        "max_replicas": autoscaling.max_replicas,
        "metrics": [metric],
    }
