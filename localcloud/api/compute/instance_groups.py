"""The managed instance groups behind Kubernetes Engine's node pools: clients read the pools' sizes there."""

from __future__ import annotations

from localcloud.api.compute.catalog import check_zone, zones
from localcloud.api.compute.common import aggregated, link, listed
from localcloud.api.container.node_pools import groups
from localcloud.api.errors import not_found
from localcloud.api.service import TABLE, Call, stable_id
from localcloud.store import Json


def _described(call: Call, group: Json) -> Json:
    zone = f"projects/{call.project}/zones/{group['zone']}"
    key = f"{zone}/instanceGroupManagers/{group['name']}"
    return {
        "kind": "compute#instanceGroupManager",
        "id": stable_id(key),
        "name": group["name"],
        "zone": link(zone),
        "baseInstanceName": group["name"].removesuffix("-grp"),
        "instanceGroup": link(f"{zone}/instanceGroups/{group['name']}"),
        "targetSize": group["size"],
        "status": {"isStable": True},
        "selfLink": link(key),
    }


def _items(call: Call, zone: str = "") -> list[Json]:
    found = groups(call.store, call.project)
    return [_described(call, group) for group in found if zone in ("", group["zone"])]


@TABLE.serves("compute.instanceGroupManagers.get")
def _get(call: Call) -> Json:
    zone, name = check_zone(call), call.path["instanceGroupManager"]
    for item in _items(call, zone):
        if item["name"] == name:
            return item
    raise not_found(f"projects/{call.project}/zones/{zone}/instanceGroupManagers/{name}")


@TABLE.serves("compute.instanceGroupManagers.list")
def _list(call: Call) -> Json:
    zone = check_zone(call)
    path = f"projects/{call.project}/zones/{zone}/instanceGroupManagers"
    return listed(call, _items(call, zone), "compute#instanceGroupManagerList", path)


@TABLE.serves("compute.instanceGroupManagers.aggregatedList")
def _aggregated(call: Call) -> Json:
    scopes = [f"zones/{zone}" for zone in zones()]
    kind = "compute#instanceGroupManagerAggregatedList"
    return aggregated(call, _items(call), kind, "instanceGroupManagers", scopes)
