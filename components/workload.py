"""WasmPod: a namespace and in it a pod that is a WebAssembly component, Ready and answering."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_command as command
import pulumi_kubernetes as kubernetes

from components.artifact import WasmArtifact
from components.config import AppConfig
from components.node import KrustletNode

ARCHITECTURE = "wasm32-wasi"
PREPARE_ONLY = "krustlet.dev/prepare-only"
# A component's instance starts in well under a millisecond, so that what is waited for is the network.
SMOKE_TEST = """\
curl --fail --silent --show-error --max-time 10 --retry 20 --retry-delay 1 --retry-all-errors \\
  --retry-max-time 60 "$URL/healthz" &&
curl --fail --silent --show-error --max-time 10 "$URL/primorial/30" | grep 6469693230
"""


@dataclass(frozen=True)
class WasmPodArgs:
    """What runs, where."""

    app: AppConfig
    artifact: WasmArtifact
    node: KrustletNode


class WasmPod(pulumi.ComponentResource):
    """The app's pod, served on its port at the node's address."""

    namespace: pulumi.Output[str]
    pod: pulumi.Output[str]
    url: pulumi.Output[str]
    """http://ADDRESS:PORT, known once it has answered; within a network, once the pod is Ready."""

    def __init__(self, name: str, args: WasmPodArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("awesome-wasm:workload:WasmPod", name, None, opts)
        lifetime = args.node.cluster.lifetime
        namespace = kubernetes.core.v1.Namespace(
            f"{name}-namespace",
            metadata={
                "name": args.app.namespace,
                "labels": _pod_security(args.node.pods_have_addresses),
            },
            opts=pulumi.ResourceOptions(parent=self, deleted_with=lifetime),
        )
        # Pulls, checks and compiles beside the pod that runs: with that done the next one serves once it
        # has the port. Pulumi names it, and so makes another before the former one goes.
        prepared = kubernetes.core.v1.Pod(
            f"{name}-prepare",
            metadata={
                "namespace": namespace.metadata.name,
                "annotations": {PREPARE_ONLY: "true"},
            },
            spec={
                **PLACEMENT,
                "restart_policy": "Never",
                "containers": [
                    {"name": "prepare", "image": args.artifact.image, "security_context": CONFINED}
                ],
            },
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[args.node.registration, args.artifact.signed],
                deleted_with=lifetime,
                replace_with=[args.node.registration],
            ),
        )
        pod = kubernetes.core.v1.Pod(
            f"{name}-pod",
            metadata={
                "name": args.app.name,
                "namespace": namespace.metadata.name,
                "labels": {"app.kubernetes.io/name": args.app.name},
            },
            spec=_spec(args.app, args.artifact.image, host_port=args.node.pods_have_addresses),
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[args.node.registration, args.artifact.signed, prepared],
                delete_before_replace=True,
                deleted_with=lifetime,
                # A pod ends with its node; the next VM of that name gets a new one.
                replace_with=[args.node.registration],
            ),
        )
        url = pulumi.Output.format("http://{0}:{1}", args.node.address, args.app.port)
        # A preview of another pod has metadata without a uid, which would pass for None; it has no status.
        uid = pulumi.Output.all(pod.metadata.uid, pod.status).apply(lambda made: made[0])
        answered = uid
        if args.node.is_reachable:
            answered = self._smoke_test(name, args, url, uid, pod)
        self.namespace = namespace.metadata.name
        self.pod = pod.metadata.name
        self.url = pulumi.Output.all(url, answered).apply(lambda parts: str(parts[0]))
        self.register_outputs({"namespace": self.namespace, "pod": self.pod, "url": self.url})

    def _smoke_test(
        self,
        name: str,
        args: WasmPodArgs,
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
                args.node.registration.uid,
                args.node.registration.configuration,
                args.node.registration.verification_keys,
            ],
            opts=pulumi.ResourceOptions(parent=self, depends_on=[pod], delete_before_replace=True),
        )
        return smoke_test.stdout


# On a node for WebAssembly, with nothing that the strictest of Kubernetes' standards forbids.
PLACEMENT: kubernetes.core.v1.PodSpecArgsDict = {
    "automount_service_account_token": False,
    "node_selector": {"kubernetes.io/arch": ARCHITECTURE},
    "tolerations": [
        {"key": "kubernetes.io/arch", "operator": "Equal", "value": ARCHITECTURE, "effect": effect}
        for effect in ("NoSchedule", "NoExecute")
    ],
    "security_context": {"run_as_non_root": True, "seccomp_profile": {"type": "RuntimeDefault"}},
    "containers": [],
}
CONFINED: kubernetes.core.v1.SecurityContextArgsDict = {
    "allow_privilege_escalation": False,
    "read_only_root_filesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _pod_security(host_port: bool) -> dict[str, str]:
    """Give the labels of the namespace: a component needs none of what the strictest of Kubernetes' standards
    forbids. A port of the node's, though, all but the loosest forbid, and then the strictest is noted only.
    """
    standard = "pod-security.kubernetes.io"
    if host_port:
        return {f"{standard}/enforce": "privileged", f"{standard}/audit": "restricted"}
    return {f"{standard}/enforce": "restricted"}


def _spec(app: AppConfig, image: pulumi.Input[str], *, host_port: bool) -> kubernetes.core.v1.PodSpecArgsDict:
    """Give the app's pod. With `host_port` it is served on the node's address beside its own."""
    port: kubernetes.core.v1.ContainerPortArgsDict = {
        "name": "http",
        "container_port": app.port,
        "protocol": "TCP",
    }
    if host_port:
        port["host_port"] = app.port
    health: kubernetes.core.v1.ProbeArgsDict = {"http_get": {"path": "/healthz", "port": app.port}}
    return {
        **PLACEMENT,
        "containers": [
            {
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
        ],
    }
