"""KrustletNode: a VM that runs Krustlet and has joined the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pulumi
import pulumi_gcp as gcp
import pulumi_kubernetes as kubernetes

from components.artifact import AgentArtifact
from components.cluster import KubernetesCluster, kubeconfig
from components.config import AGENT_PORT, NodeConfig
from components.providers.registration import BOOTSTRAP_GROUP, BootstrapToken, NodeRegistration
from components.registry import ContainerRegistry

STARTUP_SCRIPT = Path(__file__).with_name("startup.sh")
# What the registry and the metadata server ask for; what the account may do is the IAM policy's affair.
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# Below it the service needs a capability, which the startup script gives to its unit.
FIRST_UNPRIVILEGED_PORT = 1024


@dataclass(frozen=True)
class KrustletNodeArgs:
    """The VM, the cluster that it joins, the agent that it runs and whose signatures it trusts (PEM)."""

    project: str
    region: str
    zone: str
    node: NodeConfig
    app_port: int
    app_sources: tuple[str, ...]
    cluster: KubernetesCluster
    registry: ContainerRegistry
    agent: AgentArtifact
    verification_key: pulumi.Input[str]


def bootstrap_kubeconfig(endpoint: str, certificate: str, token: str) -> str:
    """Give the kubeconfig with which an agent asks for its certificates."""
    return kubeconfig("bootstrap", endpoint, certificate, {"token": token})


def hostnames(name: str, project: str, zone: str) -> list[str]:
    """Give the DNS names that Google gives to a VM: zonal and global."""
    domain = f"c.{'.'.join(reversed(project.split(':')))}.internal"
    return [f"{name}.{domain}", f"{name}.{zone}.{domain}"]


class KrustletNode(pulumi.ComponentResource):
    """A VM in the cluster's network that runs WebAssembly pods."""

    name: pulumi.Output[str]
    """The node's name, which is the VM's; known once it is Ready."""
    address: pulumi.Output[str]
    """The reserved address, where the pods' ports are; it survives the VM."""
    registration: NodeRegistration

    def __init__(self, name: str, args: KrustletNodeArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("awesome-wasm:node:KrustletNode", name, None, opts)
        self._name = name
        self._args = args
        child = pulumi.ResourceOptions(parent=self)
        account = gcp.serviceaccount.Account(
            f"{name}-account",
            project=args.project,
            account_id=f"{args.node.name[:25]}-node".ljust(6, "x"),
            display_name=f"The VM {args.node.name}",
            opts=child,
        )
        pull = args.registry.allow_pull(name, account.email)
        firewalls = self._firewalls(account)
        address = gcp.compute.Address(
            f"{name}-address",
            project=args.project,
            region=args.region,
            name=f"{args.node.name[:55]}-address",
            opts=child,
        )
        token = BootstrapToken(f"{name}-token", args.node.name, args.cluster.kubeconfig, opts=child)
        binding = self._allow_certificate_requests()
        instance = self._instance(account, address, token, [pull, binding, *firewalls])
        self.registration = self._registration(instance, address, token)
        self.name = self.registration.node
        self.address = address.address
        self.register_outputs({"name": self.name, "address": self.address})

    def _firewalls(self, account: gcp.serviceaccount.Account) -> list[pulumi.Resource]:
        """Open the app's port to whom the configuration names, and the agent's to the control plane alone."""
        opened = {
            "app": (self._args.app_port, list(self._args.app_sources)),
            "agent": (AGENT_PORT, self._args.cluster.control_plane_ranges),
        }
        return [
            gcp.compute.Firewall(
                f"{self._name}-{what}-firewall",
                project=self._args.project,
                name=f"{self._args.node.name[:50]}-{what}",
                network=self._args.cluster.network,
                direction="INGRESS",
                allows=[{"protocol": "tcp", "ports": [str(port)]}],
                source_ranges=sources,
                target_service_accounts=[account.email],
                opts=pulumi.ResourceOptions(parent=self),
            )
            for what, (port, sources) in opened.items()
        ]

    def _allow_certificate_requests(self) -> pulumi.Resource:
        """Let the bearer of a bootstrap token ask for a client certificate, and nothing else."""
        return kubernetes.rbac.v1.ClusterRoleBinding(
            f"{self._name}-bootstrap",
            metadata={"name": "krustlet-bootstrap"},
            role_ref={
                "api_group": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "system:node-bootstrapper",
            },
            subjects=[{"api_group": "rbac.authorization.k8s.io", "kind": "Group", "name": BOOTSTRAP_GROUP}],
            opts=pulumi.ResourceOptions(parent=self, provider=self._args.cluster.provider),
        )

    def _instance(
        self,
        account: gcp.serviceaccount.Account,
        address: gcp.compute.Address,
        token: BootstrapToken,
        needs: list[pulumi.Resource],
    ) -> gcp.compute.Instance:
        args = self._args
        bootstrap: pulumi.Output[str] = pulumi.Output.all(
            args.cluster.endpoint, args.cluster.certificate, token.token
        ).apply(lambda parts: bootstrap_kubeconfig(*parts))
        secret_bootstrap: pulumi.Output[str] = pulumi.Output.secret(bootstrap)
        return gcp.compute.Instance(
            f"{self._name}-vm",
            project=args.project,
            zone=args.zone,
            name=args.node.name,
            machine_type=args.node.machine_type,
            boot_disk={
                "initialize_params": {"image": args.node.boot_image, "size": args.node.disk_size_gb},
            },
            network_interfaces=[
                {"subnetwork": args.cluster.subnetwork, "access_configs": [{"nat_ip": address.address}]}
            ],
            service_account={"email": account.email, "scopes": [SCOPE]},
            shielded_instance_config={
                "enable_secure_boot": True,
                "enable_vtpm": True,
                "enable_integrity_monitoring": True,
            },
            metadata={
                "krustlet-image": args.agent.image,
                "krustlet-sha256": args.agent.sha256,
                "krustlet-bootstrap-kubeconfig": secret_bootstrap,
                "krustlet-verification-key": args.verification_key,
                "krustlet-node-labels": "krustlet.dev/runtime=wasmtime",
                "krustlet-max-pods": str(args.node.max_pods),
                "krustlet-app-port": str(args.app_port),
            },
            metadata_startup_script=STARTUP_SCRIPT.read_text(),
            allow_stopping_for_update=True,
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=needs,
                # Name and address can be one VM's at a time.
                delete_before_replace=True,
                # What the startup script reads once, at boot: in a running VM a change of it would reach the
                # metadata and not the agent, which would refuse what another key signed.
                replacement_trigger=[
                    args.agent.image,
                    args.verification_key,
                    args.node.max_pods,
                    args.app_port < FIRST_UNPRIVILEGED_PORT,
                ],
            ),
        )

    def _registration(
        self, instance: gcp.compute.Instance, address: gcp.compute.Address, token: BootstrapToken
    ) -> NodeRegistration:
        args = self._args
        return NodeRegistration(
            f"{self._name}-registration",
            node=args.node.name,
            instance=instance.instance_id,
            created=instance.creation_timestamp,
            hostnames=hostnames(args.node.name, args.project, args.zone),
            addresses=[instance.network_interfaces[0].network_ip, address.address],
            token=token.token,
            kubeconfig=args.cluster.kubeconfig,
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[instance],
                delete_before_replace=True,
                replace_with=[instance],
            ),
        )
