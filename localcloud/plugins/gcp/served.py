"""Which class serves which type."""

from __future__ import annotations

from collections.abc import Mapping

from localcloud.plugins.gcp import compute, container, resources, tables
from localcloud.plugins.gcp.rest import Google
from localcloud.plugins.values import Value

CLASSES: dict[str, type[resources.Resource]] = {
    tables.REPOSITORY.token: resources.Repository,
    tables.REPOSITORY_IAM_MEMBER.token: resources.RepositoryIamMember,
    tables.PROJECT_IAM_MEMBER.token: resources.ProjectIamMember,
    tables.SERVICE.token: resources.Service,
    tables.ACCOUNT.token: resources.Account,
    tables.NETWORK.token: compute.ComputeResource,
    tables.SUBNETWORK.token: compute.Subnetwork,
    tables.FIREWALL.token: compute.Firewall,
    tables.ADDRESS.token: compute.ComputeResource,
    tables.ROUTER.token: compute.ComputeResource,
    tables.ROUTER_NAT.token: compute.RouterNat,
    tables.DISK.token: compute.Disk,
    tables.INSTANCE.token: compute.Instance,
    tables.CLUSTER.token: container.Cluster,
    tables.NODE_POOL.token: container.NodePool,
}


def identity(token: str, inputs: Mapping[str, Value]) -> str | None:
    """The id that a resource of these inputs has, or would have; None where they do not say it."""
    try:
        return CLASSES[token](tables.TYPES[token], Google()).item(inputs)
    except KeyError:
        return None
