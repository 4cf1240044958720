"""What localcloud has, by the REST APIs that every client of Google's uses."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import requests

from tests.e2e.conftest import Stack
from tests.waiting import until


class Cloud:
    """The project of a stack; `env` is the environment that ./scripts/env gives."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env = env
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {env['GOOGLE_OAUTH_ACCESS_TOKEN']}"
        self._project = "localcloud-dev"

    def _get(self, service: str, path: str) -> dict[str, Any]:
        answer = self._session.get(f"{self._env[f'GOOGLE_{service}_CUSTOM_ENDPOINT']}{path}", timeout=60)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def _compute(self, kind: str) -> set[str]:
        listed = self._get("COMPUTE", f"projects/{self._project}/aggregated/{kind}").get("items", {})
        items = [item for place in listed.values() for item in place.get(kind, [])]
        return {_path(item["selfLink"]) for item in items if not _is_default(item)}

    def resources(self) -> set[str]:
        """The ids of all that a stack can have made."""
        project = f"projects/{self._project}"
        found = set[str]()
        for kind in ("instances", "disks", "addresses", "subnetworks", "routers"):
            found |= self._compute(kind)
        for kind in ("networks", "firewalls"):
            items = self._get("COMPUTE", f"{project}/global/{kind}").get("items", [])
            found |= {_path(item["selfLink"]) for item in items if not _is_default(item)}
        for cluster in self._get("CONTAINER", f"{project}/locations/-/clusters").get("clusters", []):
            name = f"{project}/locations/{cluster['location']}/clusters/{cluster['name']}"
            found |= {name, *(f"{name}/nodePools/{pool['name']}" for pool in cluster.get("nodePools", []))}
        for location in ("europe-west1", "us-east1"):
            listed = self._get("ARTIFACT_REGISTRY", f"{project}/locations/{location}/repositories")
            found |= {item["name"] for item in listed.get("repositories", [])}
        return found

    def in_state(self, stack: Stack) -> set[str]:
        """The ids of the same kinds that pulumi knows."""
        exported = json.loads(stack.run("pulumi", "stack", "export").stdout)
        ours = ("gcp:compute/", "gcp:container/", "gcp:artifactregistry/repository:")
        resources = exported["deployment"]["resources"]
        # A gateway is a part of its router.
        return {
            _path(item["id"])
            for item in resources
            if item["type"].startswith(ours) and "/routerNat:" not in item["type"]
        }

    def delete_instance(self, name: str) -> None:
        """Delete a VM as somebody would at the console, and wait until it is gone."""
        for place in self._compute("instances"):
            if place.endswith(f"/instances/{name}"):
                endpoint = self._env["GOOGLE_COMPUTE_CUSTOM_ENDPOINT"]
                self._session.delete(f"{endpoint}{place}", timeout=60).raise_for_status()
                until(partial(self._is_gone, place), "the VM to go", timeout=120)

    def _is_gone(self, instance: str) -> bool:
        return instance not in self._compute("instances")


def _is_default(item: dict[str, Any]) -> bool:
    """Whether it is the network that every project has, or is in it."""
    network: str = item["selfLink"] if "/networks/" in item["selfLink"] else item.get("network", "")
    return network.endswith("/networks/default")


def _path(link: str) -> str:
    """An id without host and version; a node pool's is spelled as Google's API has it."""
    path = "projects/" + link.partition("projects/")[2] if "projects/" in link else link
    parts = path.split("/")
    if len(parts) == 4 and parts[0] != "projects":
        # The official plugin's id of a node pool: PROJECT/LOCATION/CLUSTER/POOL.
        return "projects/{}/locations/{}/clusters/{}/nodePools/{}".format(*parts)
    return path
