"""KubernetesCluster: a network of its own, a zonal GKE cluster in it, the way to talk to it, a namespace."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_gcp as gcp
import pulumi_kubernetes as kubernetes

from components.config import ClusterConfig, NetworkConfig
from components.project import ProjectServices

AUTH_PLUGIN = "gke-gcloud-auth-plugin"
# Google's plugin gives a token of whoever calls it: nothing secret is in the kubeconfig itself. The token
# is of the credentials that the gcp plugin and the pushes take, and not of gcloud's own login.
EXEC_CREDENTIALS = {
    "exec": {
        "apiVersion": "client.authentication.k8s.io/v1beta1",
        "command": AUTH_PLUGIN,
        "args": ["--use_application_default_credentials"],
        "installHint": f"gcloud components install {AUTH_PLUGIN}",
        "interactiveMode": "Never",
        "provideClusterInfo": True,
    }
}
PODS_RANGE = "pods"
SERVICES_RANGE = "services"
WASM_PODS_RANGE = "wasm-pods"
SYSTEM_POOL = "system"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# What a node does for Google: its logs, its figures. https://cloud.google.com/kubernetes-engine/docs/how-to/hardening-your-cluster
NODE_ROLE = "roles/container.defaultNodeServiceAccount"


@dataclass(frozen=True)
class KubernetesClusterArgs:
    """Where the cluster is and what it is made of."""

    project: str
    region: str
    zone: str
    cluster: ClusterConfig
    network: NetworkConfig
    namespace: str
    services: ProjectServices


def kubeconfig(name: str, endpoint: str, certificate: str, credentials: dict[str, Any]) -> str:
    """Give a kubeconfig (JSON, which is YAML too) for one cluster and one user.

    `endpoint` is HOST or HOST:PORT, `certificate` the cluster's CA, PEM in base64, `credentials` what stands
    under `user`.
    """
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": name,
                    "cluster": {
                        "server": f"https://{endpoint}",
                        "certificate-authority-data": certificate,
                    },
                }
            ],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
            "users": [{"name": name, "user": credentials}],
        }
    )


def _authorized(
    networks: tuple[str, ...],
) -> gcp.container.ClusterMasterAuthorizedNetworksConfigArgsDict | None:
    """Give who may reach the API server, None for everybody.

    The VM is none of the cluster's own nodes: it comes from an address of Google's.
    """
    if not networks:
        return None
    return {
        "cidr_blocks": [{"cidr_block": network, "display_name": "configured"} for network in networks],
        "gcp_public_cidrs_access_enabled": True,
    }


def _maintenance(start: str) -> gcp.container.ClusterMaintenancePolicyArgsDict | None:
    """Give when Google may upgrade the cluster, None for whenever it likes."""
    return {"daily_maintenance_window": {"start_time": start}} if start else None


def _secondary_ranges(
    network: NetworkConfig,
) -> list[gcp.compute.SubnetworkSecondaryIpRangeArgsDict]:
    """Give the subnetwork's ranges beside its machines'."""
    ranges = {PODS_RANGE: network.pods, SERVICES_RANGE: network.services}
    if network.wasm_pods:
        ranges[WASM_PODS_RANGE] = network.wasm_pods
    return [{"range_name": name, "ip_cidr_range": cidr} for name, cidr in ranges.items()]


def _lasting_ranges(network: NetworkConfig) -> list[str]:
    """Give what of the ranges cannot change while cluster and VMs use it: all but that one is added."""
    if not network.wasm_pods:
        return ["secondaryIpRanges"]
    return ["secondaryIpRanges[0]", "secondaryIpRanges[1]", "secondaryIpRanges[2].ipCidrRange"]


def _pod_security(host_port: bool) -> dict[str, str]:
    """Give the labels of the namespace: a component needs none of what the strictest of Kubernetes' standards
    forbids. A port of the node's, though, all but the loosest forbid, and then the strictest is noted only.
    """
    standard = "pod-security.kubernetes.io"
    if host_port:
        return {f"{standard}/enforce": "privileged", f"{standard}/audit": "restricted"}
    return {f"{standard}/enforce": "restricted"}


class KubernetesCluster(pulumi.ComponentResource):
    """A GKE cluster in a network of its own."""

    name: pulumi.Output[str]
    endpoint: pulumi.Output[str]
    """HOST or HOST:PORT of the API server."""
    certificate: pulumi.Output[str]
    """The cluster's CA, PEM in base64."""
    kubeconfig: pulumi.Output[str]
    """How to reach the cluster as the user (JSON); a secret."""
    network: pulumi.Output[str]
    subnetwork: pulumi.Output[str]
    way_out: list[pulumi.Resource]
    """What a machine without an external address needs to reach others."""
    control_plane_ranges: list[str]
    """Where the control plane's requests to a node come from."""
    provider: kubernetes.Provider
    namespace: pulumi.Output[str]
    """Where the apps are."""
    lifetime: pulumi.Resource
    """What all in the cluster ends with (`deleted_with`): nobody is asked who may be gone already."""

    def __init__(
        self, name: str, args: KubernetesClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("awesome-wasm:cluster:KubernetesCluster", name, None, opts)
        child = pulumi.ResourceOptions(parent=self, depends_on=args.services.enabled)
        network = gcp.compute.Network(
            f"{name}-network",
            project=args.project,
            name=f"{args.cluster.name}-network",
            auto_create_subnetworks=False,
            opts=child,
        )
        subnetwork = gcp.compute.Subnetwork(
            f"{name}-subnetwork",
            project=args.project,
            region=args.region,
            name=f"{args.cluster.name}-subnetwork",
            network=network.id,
            ip_cidr_range=args.network.machines,
            secondary_ip_ranges=_secondary_ranges(args.network),
            private_ip_google_access=True,
            opts=pulumi.ResourceOptions(
                parent=self,
                # Google changes no secondary range that is in use, and moves no cluster to another; and the
                # name is one subnetwork's.
                replace_on_changes=_lasting_ranges(args.network),
                delete_before_replace=True,
                # A cluster in another zone begins here: where the cluster is the first to be replaced, pulumi
                # lets go of its provider before it deletes by it what is there.
                replacement_trigger=[args.zone],
            ),
        )
        cluster = gcp.container.Cluster(
            f"{name}-cluster",
            project=args.project,
            location=args.zone,
            name=args.cluster.name,
            network=network.id,
            subnetwork=subnetwork.id,
            networking_mode="VPC_NATIVE",
            ip_allocation_policy={
                "cluster_secondary_range_name": PODS_RANGE,
                "services_secondary_range_name": SERVICES_RANGE,
            },
            release_channel={"channel": args.cluster.release_channel},
            master_authorized_networks_config=_authorized(args.cluster.authorized_networks),
            maintenance_policy=_maintenance(args.cluster.maintenance_window),
            # Google makes no cluster without a pool, and what is said of that one cannot be changed later.
            initial_node_count=1,
            remove_default_node_pool=True,
            deletion_protection=args.cluster.deletion_protection,
            # Once its pool is gone it says nothing any more, as in the state of an earlier version.
            opts=pulumi.ResourceOptions(parent=self, ignore_changes=["initialNodeCount", "nodeConfig"]),
        )
        # An account's name is one account's, and the end of a former grant would be the end of the next one.
        one_at_a_time = pulumi.ResourceOptions(delete_before_replace=True)
        account = gcp.serviceaccount.Account(
            f"{name}-account",
            project=args.project,
            account_id=f"{args.cluster.name[:24]}-nodes".ljust(6, "x"),
            display_name=f"The Linux nodes of {args.cluster.name}",
            opts=pulumi.ResourceOptions.merge(child, one_at_a_time),
        )
        role = gcp.projects.IAMMember(
            f"{name}-node-role",
            project=args.project,
            role=NODE_ROLE,
            member=pulumi.Output.concat("serviceAccount:", account.email),
            opts=pulumi.ResourceOptions.merge(pulumi.ResourceOptions(parent=self), one_at_a_time),
        )
        # Google's own pods (DNS, the way from the control plane to the nodes) need Linux; ours does not
        # run there.
        gcp.container.NodePool(
            f"{name}-pool",
            project=args.project,
            location=args.zone,
            cluster=cluster.name,
            name=SYSTEM_POOL,
            node_count=args.cluster.nodes,
            network_config={"enable_private_nodes": not args.network.external_ip},
            node_config={
                "machine_type": args.cluster.machine_type,
                # What they may do is the account's roles' affair, and not the default account's, an editor.
                "service_account": account.email,
                "oauth_scopes": [SCOPE],
                "shielded_instance_config": {
                    "enable_secure_boot": True,
                    "enable_integrity_monitoring": True,
                },
            },
            opts=pulumi.ResourceOptions(parent=self, deleted_with=cluster, depends_on=[role]),
        )
        if not args.cluster.authorized_networks:
            pulumi.log.info("open to the world: the API server (authorizedNetworks limits it)", cluster)
        self.way_out = [] if args.network.external_ip else [self._nat(name, args, network)]
        self.lifetime = cluster
        self.name = cluster.name
        self.endpoint = cluster.endpoint
        self.certificate = cluster.master_auth.cluster_ca_certificate
        self.kubeconfig = pulumi.Output.secret(
            pulumi.Output.all(cluster.name, self.endpoint, self.certificate).apply(
                lambda parts: kubeconfig(parts[0], parts[1], parts[2], EXEC_CREDENTIALS)
            )
        )
        self.network = network.id
        self.subnetwork = subnetwork.id
        # GKE's control plane reaches nodes through agents that run as pods on the cluster's own nodes.
        self.control_plane_ranges = [args.network.machines, args.network.pods]
        # A kubeconfig that a preview does not know would have all that is in the cluster made anew; what the
        # cluster alone has tells whether it is another.
        self.provider = kubernetes.Provider(
            f"{name}-provider",
            kubeconfig=self.kubeconfig,
            cluster_identifier=self.certificate.apply(
                lambda certificate: hashlib.sha256(certificate.encode()).hexdigest()
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        namespace = kubernetes.core.v1.Namespace(
            f"{name}-namespace",
            metadata={"name": args.namespace, "labels": _pod_security(bool(args.network.wasm_pods))},
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=self.provider,
                deleted_with=cluster,
                # Once it was the only app's own.
                aliases=[
                    pulumi.Alias(
                        name="workload-namespace",
                        parent=pulumi.create_urn("workload", "awesome-wasm:workload:WasmPod"),
                    )
                ],
            ),
        )
        self.namespace = namespace.metadata.name
        self.register_outputs(
            {
                "name": self.name,
                "endpoint": self.endpoint,
                "kubeconfig": self.kubeconfig,
                "network": self.network,
            }
        )

    def _nat(
        self, name: str, args: KubernetesClusterArgs, network: gcp.compute.Network
    ) -> gcp.compute.RouterNat:
        """Make a way out for what has no external address: to the API server, and to images elsewhere."""
        router = gcp.compute.Router(
            f"{name}-router",
            project=args.project,
            region=args.region,
            name=f"{args.cluster.name}-router",
            network=network.id,
            opts=pulumi.ResourceOptions(parent=self),
        )
        return gcp.compute.RouterNat(
            f"{name}-nat",
            project=args.project,
            region=args.region,
            router=router.name,
            name=f"{args.cluster.name}-nat",
            nat_ip_allocate_option="AUTO_ONLY",
            source_subnetwork_ip_ranges_to_nat="ALL_SUBNETWORKS_ALL_IP_RANGES",
            opts=pulumi.ResourceOptions(parent=self, deleted_with=router),
        )
