"""How Kubernetes Engine describes a new cluster: what the user gave, and Google's defaults for the rest."""

from __future__ import annotations

import secrets

from localcloud.api.compute.catalog import ZONES, region_of, zones
from localcloud.api.compute.networks import find_network, find_subnetwork, subnetwork_of
from localcloud.api.container.common import LINK, gke_version, location_of, stamped
from localcloud.api.container.node_pools import DEFAULT_POOL, count, described
from localcloud.api.errors import ApiError
from localcloud.api.service import Call, fingerprint, now
from localcloud.store import Json


def filled(call: Call, cluster: Json, key: str) -> Json:
    """The cluster as Google would show it right after the request."""
    location, version = location_of(call), gke_version(call.services.backends.cluster_version())
    zonal = location in zones()
    region = region_of(location) if zonal else location
    network = find_network(call, cluster.get("network", "default"))
    given = cluster.get("subnetwork")
    subnetwork = find_subnetwork(call, given, region) if given else subnetwork_of(call.store, network, region)
    if subnetwork is None:
        raise ApiError(
            400, f'Network "{network.name}" has no subnetwork in region "{region}"; specify a subnetwork.'
        )
    nodes = [location] if zonal else [f"{region}-{letter}" for letter in ZONES[region]]
    body = cluster | {
        "id": secrets.token_hex(32),
        "network": network.name,
        "subnetwork": subnetwork.name,
        "selfLink": LINK + (key.replace("/locations/", "/zones/") if zonal else key),
        "location": location,
        "zone": location,
        "locations": cluster.get("locations") or nodes,
        "status": "PROVISIONING",
        "initialClusterVersion": version,
        "currentMasterVersion": version,
        "currentNodeVersion": version,
        "createTime": now(),
        "labelFingerprint": fingerprint(cluster.get("resourceLabels", {})),
        "networkConfig": cluster.get("networkConfig", {})
        | {"network": network.key, "subnetwork": subnetwork.key},
    }
    body["nodePools"] = [described(call, pool, body, key) for pool in _pools(cluster)]
    defaults: Json = {
        "loggingService": "none",
        "monitoringService": "none",
        "clusterIpv4Cidr": "10.8.0.0/14",
        "servicesIpv4Cidr": "10.12.0.0/20",
        "addonsConfig": {},
        "legacyAbac": {},
        "masterAuthorizedNetworksConfig": {},
        "networkPolicy": {},
        "ipAllocationPolicy": {},
        "databaseEncryption": {"state": "DECRYPTED"},
        "shieldedNodes": {"enabled": True},
        "releaseChannel": {"channel": "REGULAR"},
        "defaultMaxPodsConstraint": {"maxPodsPerNode": "110"},
        "verticalPodAutoscaling": {},
        "autoscaling": {"autoscalingProfile": "BALANCED"},
        "autopilot": {},
    }
    body |= {field: value for field, value in defaults.items() if field not in body}
    count(body)
    return stamped(body)


def _pools(cluster: Json) -> list[Json]:
    """The pools that were asked for; a size and a configuration alone ask for one."""
    if cluster.get("autopilot", {}).get("enabled"):
        return []
    given: list[Json] = cluster.get("nodePools", [])
    return given or [
        {
            "name": DEFAULT_POOL,
            "initialNodeCount": cluster["initialNodeCount"],
            "config": cluster.get("nodeConfig", {}),
        }
    ]
