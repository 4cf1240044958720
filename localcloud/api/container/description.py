"""How Kubernetes Engine describes a new cluster: what the user gave, and Google's defaults for the rest."""

from __future__ import annotations

import re
import secrets
from ipaddress import IPv4Network

from localcloud.api.compute import ranges
from localcloud.api.compute.catalog import ZONES, region_of, zones
from localcloud.api.compute.networks import find_network, find_subnetwork, subnetwork_of
from localcloud.api.container.common import LINK, gke_version, location_of, stamped
from localcloud.api.container.node_pools import DEFAULT_POOL, count, described
from localcloud.api.errors import ApiError
from localcloud.api.service import Call, fingerprint, now
from localcloud.store import Json, Record


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
    body["maintenancePolicy"] = maintained(cluster.get("maintenancePolicy") or {})
    body |= _ranges(call, cluster, network, subnetwork)
    body["nodePools"] = [described(call, pool, body, key) for pool in _pools(cluster)]
    defaults: Json = {
        "loggingService": "none",
        "monitoringService": "none",
        "addonsConfig": {},
        "legacyAbac": {},
        "masterAuthorizedNetworksConfig": {},
        "networkPolicy": {},
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


def maintained(policy: Json) -> Json:
    """When a cluster may be upgraded, as Google shows it: a daily window has four hours from its start, GMT.

    Raises:
        ApiError: 400, the start is no time of day.
    """
    shown = {field: value for field, value in policy.items() if field != "resourceVersion"}
    daily = (shown.get("window") or {}).get("dailyMaintenanceWindow")
    if daily is not None:
        if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", str(daily.get("startTime", ""))):
            raise ApiError(400, "The daily maintenance window's startTime must be HH:MM, in GMT.")
        shown["window"] = {"dailyMaintenanceWindow": {**daily, "duration": "PT4H0M0S"}}
    return shown | {"resourceVersion": fingerprint(shown)}


def _ranges(call: Call, cluster: Json, network: Record, subnetwork: Record) -> Json:
    """The ranges of a cluster's pods and services: secondary ones of its subnetwork, or ranges of its own.

    Raises:
        ApiError: 400, a range is not there or not free.
    """
    policy: Json = dict(cluster.get("ipAllocationPolicy", {}))
    there = ranges.secondary(subnetwork.body)
    names: dict[str, str] = {
        name: policy.get(f"{name}SecondaryRangeName", "") for name in ("cluster", "services")
    }
    for what, name in zip(("Pod", "Services"), names.values(), strict=True):
        if name and name not in there:
            raise ApiError(
                400, f'{what} secondary range "{name}" does not exist in subnetwork "{subnetwork.name}".'
            )
    if names["cluster"] and names["cluster"] == names["services"]:
        raise ApiError(
            400,
            f"Pod secondary range name ({names['cluster']}) should not be the same as service secondary "
            "range name.",
        )
    found = {}
    for name, prefix in (("cluster", 14), ("services", 20)):
        wanted = policy.get(f"{name}Ipv4CidrBlock") or cluster.get(f"{name}Ipv4Cidr", "")
        if names[name]:
            found[name] = there[names[name]]
        else:
            # One is chosen in sight of the other.
            taken = [IPv4Network(text) for text in found.values()]
            found[name] = ranges.choose(call.store, network.body["selfLink"], wanted, prefix, taken)
    for name, cidr in found.items():
        policy |= {f"{name}Ipv4Cidr": cidr, f"{name}Ipv4CidrBlock": cidr}
    return {
        "clusterIpv4Cidr": found["cluster"],
        "servicesIpv4Cidr": found["services"],
        "ipAllocationPolicy": policy,
    }


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
