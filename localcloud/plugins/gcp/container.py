"""Kubernetes Engine's types: clusters and their node pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from localcloud.plugins.gcp.fields import Field, Json, Update, to_rest
from localcloud.plugins.gcp.resources import Change, Resource
from localcloud.plugins.protocol import Failure, ProviderError
from localcloud.plugins.values import Properties, Value


class Cluster(Resource):
    """A GKE cluster: wrapped in the request, updated by `desired…` fields, protected from deletion by the
    plugin.
    """

    _DESIRED: ClassVar[dict[str, str]] = {
        "loggingService": "desiredLoggingService",
        "monitoringService": "desiredMonitoringService",
        "nodeLocations": "desiredLocations",
        "releaseChannel": "desiredReleaseChannel",
        "workloadIdentityConfig": "desiredWorkloadIdentityConfig",
        "minMasterVersion": "desiredMasterVersion",
    }

    def create(self, inputs: Properties, known: Properties, deadline: float) -> None:
        path = self.spec.collection.format_map(known)
        body = {"parent": path.removesuffix("/clusters"), "cluster": self.body(inputs, known)}
        self._operate("POST", path, deadline, body)

    def finish(self, inputs: Properties, item: str, deadline: float) -> None:
        pool = f"{item}/nodePools/default-pool"
        if inputs.get("removeDefaultNodePool") and self.google.get(self.spec.service, pool) is not None:
            self._operate("DELETE", pool, deadline)

    def body(self, inputs: Properties, known: Properties) -> Json:
        body = super().body(inputs, known)
        if inputs.get("minMasterVersion"):
            body["initialClusterVersion"] = inputs["minMasterVersion"]
        if "masterAuthorizedNetworksConfig" in body:
            body["masterAuthorizedNetworksConfig"]["enabled"] = True
        policy = body.setdefault("ipAllocationPolicy", {})
        native = inputs.get("networkingMode", "VPC_NATIVE") == "VPC_NATIVE"
        policy["useIpAliases" if native else "useRoutes"] = True
        return body

    def outputs(self, live: Json, known: Properties) -> Properties:
        native = (live.get("ipAllocationPolicy") or {}).get("useIpAliases")
        outputs = super().outputs(live, known)
        if not (live.get("masterAuthorizedNetworksConfig") or {}).get("enabled"):
            outputs.pop("masterAuthorizedNetworksConfig", None)
        if not (live.get("maintenancePolicy") or {}).get("window"):
            outputs.pop("maintenancePolicy", None)
        return outputs | {"networkingMode": "VPC_NATIVE" if native else "ROUTES"}

    def update(self, change: Change) -> None:
        for name in sorted(change.names & set(self._DESIRED)):
            field = self.spec.field(name)
            value = change.new.get(name)
            if isinstance(value, dict):
                value = to_rest(field.fields, value)
            body: Json = {"update": {self._DESIRED[name]: value}}
            self._operate("PUT", change.item, change.deadline, body)
        if "masterAuthorizedNetworksConfig" in change.names:
            given = change.new.get("masterAuthorizedNetworksConfig")
            fields = self.spec.field("masterAuthorizedNetworksConfig").fields
            wanted = {"enabled": True, **to_rest(fields, given)} if given else {"enabled": False}
            body = {"update": {"desiredMasterAuthorizedNetworksConfig": wanted}}
            self._operate("PUT", change.item, change.deadline, body)
        if "maintenancePolicy" in change.names:
            given = change.new.get("maintenancePolicy") or {}
            policy = to_rest(self.spec.field("maintenancePolicy").fields, given)
            version = (change.live.get("maintenancePolicy") or {}).get("resourceVersion")
            body = {"maintenancePolicy": {**policy, "resourceVersion": version}}
            self._operate("POST", f"{change.item}:setMaintenancePolicy", change.deadline, body)
        if "ipAllocationPolicy" in change.names:
            stack = (change.new.get("ipAllocationPolicy") or {}).get("stackType")
            self._operate("PUT", change.item, change.deadline, {"update": {"desiredStackType": stack}})
        if "nodeConfig" in change.names:
            change_nodes(self, f"{change.item}/nodePools/default-pool", change, self.spec.field("nodeConfig"))
        labels = self._relabelled(change)
        if labels is not None:
            body = {"resourceLabels": labels, "labelFingerprint": change.live.get("labelFingerprint")}
            self._operate("POST", f"{change.item}:setResourceLabels", change.deadline, body)

    def delete(self, item: str, state: Properties, deadline: float) -> None:
        if state.get("deletionProtection", True):
            name = item.rsplit("/", 1)[-1]
            raise ProviderError(
                f"cannot destroy cluster {name} without setting deletionProtection to false and running "
                "`pulumi up` first"
            )
        super().delete(item, state, deadline)


class NodePool(Resource):
    """Machines of a cluster; they are created with it and resized in place."""

    def check(self, inputs: Properties) -> list[Failure]:
        if inputs.get("nodeCount") is not None and inputs.get("initialNodeCount") is not None:
            return [Failure(("nodeCount",), "conflicts with initialNodeCount; give one of them")]
        return []

    def item(self, known: Mapping[str, Value]) -> str:
        return self.spec.item.format_map(_with_cluster(known))

    def create(self, inputs: Properties, known: Properties, deadline: float) -> None:
        path = self.spec.collection.format_map(_with_cluster(known))
        body = {"parent": path.removesuffix("/nodePools"), "nodePool": self.body(inputs, known)}
        self._operate("POST", path, deadline, body)

    def body(self, inputs: Properties, known: Properties) -> Json:
        body = super().body(inputs, known)
        count = inputs.get("nodeCount", inputs.get("initialNodeCount"))
        body["initialNodeCount"] = (
            (inputs.get("autoscaling") or {}).get("minNodeCount", 0) if count is None else count
        )
        if inputs.get("autoscaling"):
            body["autoscaling"]["enabled"] = True
        if inputs.get("maxPodsPerNode"):
            body["maxPodsConstraint"] = {"maxPodsPerNode": str(inputs["maxPodsPerNode"])}
        return body

    def outputs(self, live: Json, known: Properties) -> Properties:
        outputs = super().outputs(live, known)
        outputs["cluster"] = known["cluster"]
        outputs["nodeCount"] = self._size(live, known)
        outputs["managedInstanceGroupUrls"] = live.get("instanceGroupUrls") or []
        most = (live.get("maxPodsConstraint") or {}).get("maxPodsPerNode")
        if most:
            outputs["maxPodsPerNode"] = int(most)
        if not (live.get("autoscaling") or {}).get("enabled"):
            outputs.pop("autoscaling", None)
        return outputs

    def _size(self, live: Json, known: Properties) -> int:
        """The machines in each zone: what their groups are to have, as the official plugin asks."""
        if known.get("ignoreNodeCountChanges") and isinstance(known.get("nodeCount"), int):
            return int(known["nodeCount"])
        urls = [str(u) for u in live.get("instanceGroupUrls") or []]
        groups = [self.google.get("compute", u[u.index("projects/") :]) for u in urls]
        sizes = [int(g.get("targetSize", 0)) for g in groups if g is not None]
        return sum(sizes) // len(sizes) if sizes else int(live.get("initialNodeCount", 0))

    def update(self, change: Change) -> None:
        item, new, names = change.item, change.new, change.names
        if "autoscaling" in names:
            fields = self.spec.field("autoscaling").fields
            wanted = new.get("autoscaling")
            scaling = {"enabled": True, **to_rest(fields, wanted)} if wanted else {"enabled": False}
            update = {"desiredNodePoolId": item.rsplit("/", 1)[-1], "desiredNodePoolAutoscaling": scaling}
            self._operate("PUT", item.split("/nodePools/")[0], change.deadline, {"update": update})
        if "nodeCount" in names and new.get("nodeCount") is not None:
            self._operate("POST", f"{item}:setSize", change.deadline, {"nodeCount": new["nodeCount"]})
        if "management" in names:
            management = to_rest(self.spec.field("management").fields, new.get("management") or {})
            self._operate("POST", f"{item}:setManagement", change.deadline, {"management": management})
        if "nodeLocations" in names:
            self._operate("PUT", item, change.deadline, {"locations": new.get("nodeLocations") or []})
        if "upgradeSettings" in names:
            settings = to_rest(self.spec.field("upgradeSettings").fields, new.get("upgradeSettings") or {})
            self._operate("PUT", item, change.deadline, {"upgradeSettings": settings})
        if "networkConfig" in names:
            network = to_rest(self.spec.field("networkConfig").fields, new.get("networkConfig") or {})
            self._operate("PUT", item, change.deadline, {"nodeNetworkConfig": network})
        if "version" in names and new.get("version"):
            self._operate("PUT", item, change.deadline, {"nodeVersion": new["version"]})
        if "nodeConfig" in names:
            change_nodes(self, item, change, self.spec.field("nodeConfig"))


_WRAPPED = {"labels": "labels", "taints": "taints", "tags": "tags", "resourceLabels": "labels"}
"""What stands in a message of its own, so that an empty one can be told from none."""


def change_nodes(resource: Resource, pool: str, change: Change, field: Field) -> None:
    """Brings what changed of the machines' configuration to their pool."""
    old, new = (side.get(field.name) or {} for side in (change.old, change.new))
    for declared in field.fields:
        name = declared.name
        if old.get(name) == new.get(name) or declared.update is Update.REPLACE:
            continue
        value: Value = to_rest((declared,), new).get(name)
        if name in _WRAPPED:
            value = {_WRAPPED[name]: value} if value else {}
        resource.google.operate(resource.spec.service, "PUT", pool, change.deadline, {name: value})


def _with_cluster(known: Mapping[str, Value]) -> dict[str, Value]:
    """What is known, with the cluster's name; where it is given by its path, its place is the pool's."""
    parts = str(known["cluster"]).split("/")
    found = dict(zip(parts[::2], parts[1::2], strict=False))
    place = {"project": found.get("projects"), "location": found.get("locations") or found.get("zones")}
    return {**known, **{k: v for k, v in place.items() if v}, "cluster": parts[-1]}
