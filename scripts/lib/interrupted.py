"""Settles what a pulumi that was killed or failed left unfinished, so that the next run carries on.

A creation that was interrupted may have happened: Google or Kubernetes then answer a second one with "already
exists". Those resources are taken into the state under the id that they would have, and the refresh drops the
ones that turn out not to be there. The other kinds can simply be created again.

An interrupted replacement leaves both halves: what lives, and what is still to be deleted, which pulumi
does last. When the settings have changed back in between, what is still to be deleted is what is to be made,
"already exists" again; it is taken up, and the other one goes in its place.
"""

import json
import subprocess
import sys
from typing import Any

from localcloud.plugins.gcp import served


def identity(kind: str, inputs: dict[str, Any]) -> str | None:
    """The id that a resource of this type and these inputs has; None where creating it again does no harm."""
    if kind.startswith("kubernetes:"):
        metadata = inputs.get("metadata", {})
        return "/".join(filter(None, (metadata.get("namespace"), metadata.get("name")))) or None
    made = served.CLASSES.get(kind)
    return served.identity(kind, inputs) if made is not None and made.exclusive else None


def settle(deployment: dict[str, Any]) -> None:
    """Turns interrupted creations into resources, and forgets the other unfinished operations."""
    resources = deployment.setdefault("resources", [])
    for operation in deployment.pop("pending_operations", None) or []:
        resource = operation["resource"]
        known = identity(resource["type"], resource.get("inputs", {}))
        if operation["type"] != "creating" or known is None:
            continue
        made = {"outputs": {}, **resource, "id": known}
        there = [i for i, other in enumerate(resources) if other["urn"] == resource["urn"]]
        deleted = [i for i in there if resources[i].get("pendingReplacement")]
        if deleted:  # the first half of its replacement was done; what depends on it comes after it
            resources[deleted[0]] = made
        elif not there:
            resources.append(made)
        elif all(resources[i].get("id") not in (None, known) for i in there):
            # The new half of a replacement, beside the old one: the next up makes another and deletes this.
            resources.append({**made, "delete": True})


def take_up(deployment: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    """Exchanges what lives for what is to be deleted, where a preview's steps would make the latter again.

    With it comes what is still to be deleted in it or through it: a cluster's pools, a provider's objects.
    Gives the URNs of what was taken up.
    """
    wanted = set()
    for step in steps:
        if step["op"] in ("create", "replace", "create-replacement"):
            made = step.get("newState", {})
            known = identity(made.get("type", ""), made.get("inputs", {}))
            if known is not None:
                wanted.add((step["urn"], known))
    taken: list[str] = []
    resources = deployment.get("resources", [])
    for resource in resources:
        urn = resource["urn"]
        if not resource.get("delete") or urn in taken:
            continue
        if (urn, resource.get("id")) in wanted or not _leans_on(resource).isdisjoint(taken):
            for other in resources:
                if other["urn"] == urn and not other.get("delete"):
                    other["delete"] = True
            del resource["delete"]
            taken.append(urn)
    return taken


def _leans_on(resource: dict[str, Any]) -> set[str]:
    """The URNs without which a resource is not there."""
    provider = resource.get("provider", "").rpartition("::")[0]
    return {*resource.get("dependencies", []), resource.get("deletedWith", ""), provider} - {""}


def main(stack: str, command: str) -> int:
    """Settles the stack before `command` (up or destroy), if there is something; gives the exit status."""
    pulumi = ["pulumi", "stack", "--stack", stack]

    def export() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            subprocess.run([*pulumi, "export"], capture_output=True, check=True).stdout
        )
        return found

    def put(state: dict[str, Any]) -> None:
        subprocess.run([*pulumi, "import"], input=json.dumps(state).encode(), check=True)

    state = export()
    if state["deployment"].get("pending_operations"):
        settle(state["deployment"])
        # `pulumi refresh --import-pending-creates` is meant for this, but drops what it is told to import.
        put(state)
        refresh = ["pulumi", "refresh", "--yes", "--stack", stack, "--color", "never"]
        if failed := subprocess.run(refresh, check=False).returncode:
            return failed
        state = export()
    if command == "up" and any(item.get("delete") for item in state["deployment"].get("resources", [])):
        plan = ["pulumi", "preview", "--json", "--stack", stack]
        previewed = subprocess.run(plan, capture_output=True, check=False)
        # What cannot be previewed cannot be brought up either, and the up says why.
        steps = json.loads(previewed.stdout).get("steps", []) if previewed.returncode == 0 else []
        if take_up(state["deployment"], steps):
            put(state)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except subprocess.CalledProcessError as failed:  # as where another pulumi has the stack's lock
        sys.exit(
            f"{' '.join(failed.cmd)}: {(failed.stderr or b'see above').decode(errors='replace').strip()}"
        )
