"""KrustletNode: a VM that runs Krustlet and has joined the cluster; and how several are spread."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pulumi
import pulumi_gcp as gcp
import pulumi_kubernetes as kubernetes

from components.artifact import AgentArtifact, WasmArtifact
from components.cluster import WASM_PODS_RANGE, KubernetesCluster, kubeconfig
from components.config import AGENT_PORT, BY_IDENTITY, BY_TOKEN, AppConfig, NetworkConfig, NodeConfig
from components.project import ProjectServices
from components.providers.certificates import BOOTSTRAP_GROUP
from components.providers.registration import CONFIGURATION_LABEL, BootstrapToken, NodeRegistration
from components.providers.signature import SigningKey
from components.registry import ContainerRegistry

INTERNAL = "INTERNAL"
STARTUP_SCRIPT = Path(__file__).with_name("startup.sh")
IDENTITY_SCRIPT = Path(__file__).with_name("identity.sh")
# What the registry asks for, and what tells the API server the account's address. What the account may do is
# the IAM policy's affair. https://cloud.google.com/kubernetes-engine/docs/how-to/role-based-access-control
SCOPES = [
    "https://www.googleapis.com/auth/cloud-platform",
    "https://www.googleapis.com/auth/userinfo.email",
]
# Below it the service needs a capability, which the startup script gives to its unit.
FIRST_UNPRIVILEGED_PORT = 1024
# Which of several nodes it is; the first, which was alone before, has none.
NUMBER_LABEL = "krustlet.dev/number"


@dataclass(frozen=True)
class KrustletNodeArgs:
    """The VM, the cluster that it joins, the agent that it runs, the apps, and the key that it trusts.

    `before` is the node that is Ready before this one is made, changed or replaced: one VM at a time.
    """

    project: str
    region: str
    zone: pulumi.Input[str]
    node: NodeConfig
    apps: tuple[AppConfig, ...]
    network: NetworkConfig
    cluster: KubernetesCluster
    registry: ContainerRegistry
    agent: AgentArtifact
    artifacts: tuple[WasmArtifact, ...]
    signing_key: SigningKey
    services: ProjectServices
    before: KrustletNode | None = None
    number: int = 1


def bootstrap_kubeconfig(endpoint: str, certificate: str, token: str = "") -> str:
    """Give the kubeconfig with which an agent asks for its certificates: as its VM, or with a token."""
    execution = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "/bin/sh",
        "args": ["-c", IDENTITY_SCRIPT.read_text()],
        "interactiveMode": "Never",
    }
    return kubeconfig("bootstrap", endpoint, certificate, {"token": token} if token else {"exec": execution})


def configuration(
    agent: str,
    machine_type: str,
    max_pods: int,
    port: int,
    *,
    bootstrap: str = BY_IDENTITY,
    pod_range: str = "",
) -> str:
    """Give a short name for all that a VM may be told anew and its agent is restarted for.

    The VM gives it to its Node as a label, so that everybody sees which configuration the agent runs with.
    """
    told = [agent, machine_type, str(max_pods), str(port < FIRST_UNPRIVILEGED_PORT), bootstrap]
    told += [pod_range] if pod_range else []
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:12]


def fingerprint(public_key: str) -> str:
    """Name a public key (PEM) as the agent does: the first half of the SHA-256 sum of its SPKI, in hex."""
    lines = [line.strip() for line in public_key.splitlines() if not line.startswith("-----")]
    return hashlib.sha256(base64.b64decode("".join(lines))).hexdigest()[:32]


def hostnames(name: str, project: str, zone: str) -> list[str]:
    """Give the DNS names that Google gives to a VM: zonal and global."""
    domain = f"c.{'.'.join(reversed(project.split(':')))}.internal"
    return [f"{name}.{domain}", f"{name}.{zone}.{domain}"]


class KrustletNode(pulumi.ComponentResource):
    """A VM in the cluster's network that runs WebAssembly pods."""

    name: pulumi.Output[str]
    """The node's name, which is the VM's; known once it is Ready."""
    zone: pulumi.Output[str]
    address: pulumi.Output[str]
    """The reserved address, where the pods' ports are, the world's or the network's; it survives the VM."""
    is_reachable: bool
    """Whether the address is the world's, so that Pulumi can ask there from wherever it runs."""
    registration: NodeRegistration
    cluster: KubernetesCluster
    """What it has joined."""
    pods_have_addresses: bool
    """Whether each pod has an address of its own; a containerPort is a port of the node's otherwise."""

    def __init__(self, name: str, args: KrustletNodeArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("awesome-wasm:node:KrustletNode", name, None, opts)
        self._name = name
        self._args = args
        self.cluster = args.cluster
        self.is_reachable = args.network.external_ip
        self.pods_have_addresses = bool(args.node.pod_range)
        # Where zone or region changes, what is made anew with its name begins with the cluster: two that
        # delete before they create at once would each end what the other one still needs.
        # In order, so that the order of the apps says nothing.
        # A single pod is on the first node, whose address its URL has.
        self._node_ports = sorted(app.port for app in args.apps if app.replicas is None and not args.before)
        self._lowest_port = min(app.port for app in args.apps)
        self._after_cluster = [*args.services.enabled, args.cluster.lifetime]
        # One that is deleted before it is made anew takes with it what needs it, the VM above all.
        self._turn = [args.before.registration] if args.before else []
        self._after_cluster += self._turn
        account = gcp.serviceaccount.Account(
            f"{name}-account",
            project=args.project,
            account_id=f"{args.node.name[:25]}-node".ljust(6, "x"),
            display_name=f"The VM {args.node.name}",
            opts=pulumi.ResourceOptions(
                parent=self, depends_on=[*args.services.enabled, *self._turn], delete_before_replace=True
            ),
        )
        pull = args.registry.allow_pull(name, account.email)
        firewalls = self._firewalls(account)
        address = self._address()
        token = BootstrapToken(
            f"{name}-token",
            args.node.name,
            args.cluster.kubeconfig,
            opts=pulumi.ResourceOptions(
                parent=self, deleted_with=args.cluster.lifetime, depends_on=self._turn
            ),
        )
        binding = self._allow_certificate_requests(account)
        self._configuration = args.agent.sha256.apply(
            lambda agent: configuration(
                agent,
                args.node.machine_type,
                args.node.max_pods,
                self._lowest_port,
                bootstrap=args.node.bootstrap,
                pod_range=args.node.pod_range,
            )
        )
        # An agent that gets another key finds what is signed with it.
        signed = [artifact.signed for artifact in args.artifacts]
        needs = [args.agent.signed, *signed, pull, binding, token, *firewalls]
        needs += args.cluster.way_out
        needs += self._turn
        if args.node.pod_range and not args.before:
            needs += [self._allow_services(), self._allow_policies()]
        instance = self._instance(account, address, token, needs)
        self.registration = self._registration(instance, address, account, token)
        self.name = self.registration.node
        self.zone = instance.zone
        self.address = address.address
        self.register_outputs({"name": self.name, "address": self.address})

    def _firewalls(self, account: gcp.serviceaccount.Account) -> list[pulumi.Resource]:
        """Open the apps' ports to whom the configuration names, and the agent's to the control plane alone.

        Pods that have addresses of their own are open to the cluster's, as one another's are on any node.
        """
        sources = [*self._args.network.sources]
        world = [source for source in sources if ipaddress.ip_network(source).prefixlen == 0]
        ports = [str(port) for port in self._node_ports]
        if world and ports and self._args.network.external_ip:
            what = f"the app's port {ports[0]}" if len(ports) == 1 else f"the apps' ports {', '.join(ports)}"
            pulumi.log.info(f"open to the world: {what} (sourceRanges limits it)", self)
        cluster = self._args.cluster.control_plane_ranges
        found = [self._firewall("agent", account, [str(AGENT_PORT)], cluster)]
        if ports:
            found.append(self._firewall("app", account, ports, sources))
        if self._args.node.pod_range:
            pods = [self._args.network.wasm_pods]
            found.append(self._firewall("pods", account, [], cluster, pods))
        return found

    def _firewall(
        self,
        what: str,
        account: gcp.serviceaccount.Account,
        ports: list[str],
        sources: list[str],
        destinations: list[str] | None = None,
    ) -> pulumi.Resource:
        """Open TCP ports of the VM, all if none is named, at all its addresses or at `destinations` alone."""
        return gcp.compute.Firewall(
            f"{self._name}-{what}-firewall",
            project=self._args.project,
            name=f"{self._args.node.name[:50]}-{what}",
            network=self._args.cluster.network,
            direction="INGRESS",
            allows=[{"protocol": "tcp", "ports": ports} if ports else {"protocol": "tcp"}],
            source_ranges=sources,
            destination_ranges=destinations,
            target_service_accounts=[account.email],
            opts=pulumi.ResourceOptions(
                parent=self,
                # The plugin would change it in place, which Google refuses; and its name is one rule's.
                replace_on_changes=["network"],
                delete_before_replace=True,
            ),
        )

    def _allow_certificate_requests(self, account: gcp.serviceaccount.Account) -> pulumi.Resource:
        """Let the VM's account, or the bearer of a bootstrap token, ask for a client certificate: no more."""
        subject: dict[str, pulumi.Input[str]] = {"kind": "User", "name": account.email}
        if self._args.node.bootstrap == BY_TOKEN:
            subject = {"kind": "Group", "name": BOOTSTRAP_GROUP}
        return self._bind("bootstrap", "system:node-bootstrapper", subject)

    def _allow_services(self) -> pulumi.Resource:
        """Let nodes read where Services lead, as their guests call them by name."""
        return self._bind("proxier", "system:node-proxier", {"kind": "Group", "name": "system:nodes"})

    def _allow_policies(self) -> pulumi.Resource:
        """Let nodes read what says who may connect to their pods, and who that is: pods and namespaces."""
        watch = ["list", "watch"]
        role = kubernetes.rbac.v1.ClusterRole(
            f"{self._name}-network-policies-role",
            metadata={"name": "krustlet-network-policies"},
            rules=[
                {"api_groups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": watch},
                {"api_groups": [""], "resources": ["pods", "namespaces"], "verbs": watch},
            ],
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=self._args.cluster.provider,
                deleted_with=self._args.cluster.lifetime,
            ),
        )
        nodes: dict[str, pulumi.Input[str]] = {"kind": "Group", "name": "system:nodes"}
        return self._bind("network-policies", "krustlet-network-policies", nodes, [role])

    def _bind(
        self,
        what: str,
        role: str,
        subject: dict[str, pulumi.Input[str]],
        needs: Sequence[pulumi.Resource] = (),
    ) -> pulumi.Resource:
        """Give a cluster role to somebody."""
        # The first node's was there before there were others.
        ending = f"-{self._args.node.name}" if self._args.before else ""
        return kubernetes.rbac.v1.ClusterRoleBinding(
            f"{self._name}-{what}",
            metadata={"name": f"krustlet-{what}{ending}"},
            role_ref={"api_group": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            subjects=[kubernetes.rbac.v1.SubjectArgs(api_group="rbac.authorization.k8s.io", **subject)],
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[*needs],
                provider=self._args.cluster.provider,
                deleted_with=self._args.cluster.lifetime,
            ),
        )

    def _address(self) -> gcp.compute.Address:
        """Reserve where the pods' ports are: for the world, or within the network."""
        args = self._args
        internal: dict[str, Any] = {
            "address_type": INTERNAL,
            "purpose": "GCE_ENDPOINT",
            "subnetwork": args.cluster.subnetwork,
        }
        kind = "address" if args.network.external_ip else "internal-address"
        return gcp.compute.Address(
            f"{self._name}-{kind}",
            project=args.project,
            region=args.region,
            name=f"{args.node.name[: 62 - len(kind)]}-{kind}",
            opts=pulumi.ResourceOptions(parent=self, depends_on=self._after_cluster),
            **({} if args.network.external_ip else internal),
        )

    def _interface(self, address: gcp.compute.Address) -> gcp.compute.InstanceNetworkInterfaceArgsDict:
        """The VM's one interface, with a range for its pods where they have addresses of their own."""
        interface: gcp.compute.InstanceNetworkInterfaceArgsDict = {
            "subnetwork": self._args.cluster.subnetwork
        }
        if self._args.network.external_ip:
            interface["access_configs"] = [{"nat_ip": address.address}]
        else:
            interface["network_ip"] = address.address
        if self._args.node.pod_range:
            interface["alias_ip_ranges"] = [
                {"ip_cidr_range": self._args.node.pod_range, "subnetwork_range_name": WASM_PODS_RANGE}
            ]
        return interface

    def _disk(self, address: gcp.compute.Address) -> gcp.compute.Disk:
        """The VM's disk, a resource of its own because only so it can grow in place."""
        return gcp.compute.Disk(
            f"{self._name}-disk",
            project=self._args.project,
            zone=self._args.zone,
            name=f"{self._args.node.name[:58]}-disk",
            image=self._args.node.boot_image,
            size=self._args.node.disk_size_gb,
            opts=pulumi.ResourceOptions(
                parent=self,
                # With another name both are made anew, and each ends what needs it before it ends itself: one
                # after the other, or the second one would find the VM still there.
                depends_on=[*self._after_cluster, address],
                delete_before_replace=True,
                # It has the agent's certificates, which are good for one cluster.
                replacement_trigger=[self._args.cluster.certificate],
            ),
        )

    def _instance(
        self,
        account: gcp.serviceaccount.Account,
        address: gcp.compute.Address,
        token: BootstrapToken,
        needs: list[pulumi.Resource],
    ) -> gcp.compute.Instance:
        args = self._args
        told: list[pulumi.Input[str]] = [args.cluster.endpoint, args.cluster.certificate]
        if args.node.bootstrap == BY_TOKEN:
            told.append(pulumi.Output.secret(token.token))
        bootstrap: pulumi.Output[str] = pulumi.Output.all(*told).apply(
            lambda parts: bootstrap_kubeconfig(*parts)
        )
        # Its alias range comes after its metadata: the startup script waits for one of this size.
        pods = {"krustlet-pod-range": args.node.pod_range} if args.node.pod_range else {}
        labels = f"{NUMBER_LABEL}={args.number}," if args.before else ""
        return gcp.compute.Instance(
            f"{self._name}-vm",
            project=args.project,
            zone=args.zone,
            name=args.node.name,
            machine_type=args.node.machine_type,
            boot_disk={"source": self._disk(address).self_link, "auto_delete": False},
            network_interfaces=[self._interface(address)],
            service_account={"email": account.email, "scopes": SCOPES},
            shielded_instance_config={
                "enable_secure_boot": True,
                "enable_vtpm": True,
                "enable_integrity_monitoring": True,
            },
            metadata={
                "krustlet-image": args.agent.image,
                "krustlet-sha256": args.agent.sha256,
                "krustlet-bootstrap-kubeconfig": bootstrap,
                "krustlet-verification-key": args.signing_key.public_key,
                "krustlet-node-labels": pulumi.Output.concat(
                    f"{labels}krustlet.dev/runtime=wasmtime,{CONFIGURATION_LABEL}=", self._configuration
                ),
                "krustlet-max-pods": str(args.node.max_pods),
                "krustlet-app-port": str(self._lowest_port),
                **pods,
                "startup-script": STARTUP_SCRIPT.read_text(),
            },
            allow_stopping_for_update=True,
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=needs,
                # Name and address can be one VM's at a time.
                delete_before_replace=True,
                # What its metadata say of the agent a running VM takes over by itself (startup.sh); it does
                # not join another cluster. One of the network's addresses is a VM's for its life.
                replacement_trigger=[
                    args.cluster.certificate,
                    *([] if args.network.external_ip else [INTERNAL]),
                ],
            ),
        )

    def _registration(
        self,
        instance: gcp.compute.Instance,
        address: gcp.compute.Address,
        account: gcp.serviceaccount.Account,
        token: BootstrapToken,
    ) -> NodeRegistration:
        args = self._args
        return NodeRegistration(
            f"{self._name}-registration",
            node=args.node.name,
            instance=instance.instance_id,
            created=instance.creation_timestamp,
            hostnames=pulumi.Output.from_input(args.zone).apply(
                lambda zone: hostnames(args.node.name, args.project, zone)
            ),
            addresses=[instance.network_interfaces[0].network_ip, address.address],
            configuration=self._configuration,
            verification_keys=args.signing_key.public_key.apply(fingerprint),
            token=token.token,
            account="" if args.node.bootstrap == BY_TOKEN else account.email,
            kubeconfig=args.cluster.kubeconfig,
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[instance],
                deleted_with=args.cluster.lifetime,
                delete_before_replace=True,
                replace_with=[instance],
            ),
        )


def spread(first: str, offered: Sequence[str], count: int) -> list[str]:
    """Give the zone of each of `count` nodes: the first one's, then each in turn of those that a region has.

    Where a node is says its number, so that another one moves none.
    """
    others = sorted(set(offered) - {first})
    after = [zone for zone in others if zone > first] + [zone for zone in others if zone < first]
    zones = [first, *after]
    return [zones[number % len(zones)] for number in range(count)]


def krustlet_nodes(args: KrustletNodeArgs, nodes: tuple[NodeConfig, ...]) -> tuple[KrustletNode, ...]:
    """Make the nodes, one after the other; the first one is in the zone of the arguments."""
    made = [KrustletNode("node", args)]
    if len(nodes) == 1:
        return tuple(made)
    # Those that are down too: none moves because of that.
    offered = gcp.compute.get_zones_output(
        project=args.project,
        region=args.region,
        opts=pulumi.InvokeOutputOptions(depends_on=args.services.enabled),
    )
    zones = pulumi.Output.all(args.zone, offered.names).apply(
        lambda found: spread(found[0], found[1], len(nodes))
    )
    for number, node in enumerate(nodes[1:], start=2):
        zone = zones[number - 1]
        made.append(
            KrustletNode(
                f"node-{number}", replace(args, node=node, zone=zone, before=made[-1], number=number)
            )
        )
    return tuple(made)
