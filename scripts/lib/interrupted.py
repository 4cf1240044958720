"""Settles what a killed pulumi left unfinished, so that the next run carries on.

A creation that was interrupted may have happened: Google or Kubernetes then answer a second one with "already
exists". Those resources are taken into the state under the id that they would have, and the refresh drops the
ones that turn out not to be there. The other kinds can simply be created again.
"""

import json
import subprocess
import sys
from typing import Any

from localcloud.plugins.gcp import served
from localcloud.plugins.gcp.tables import REPOSITORY_IAM_MEMBER


def identity(kind: str, inputs: dict[str, Any]) -> str | None:
    """The id that a resource of this type and these inputs has; None where creating it again does no harm."""
    if kind.startswith("kubernetes:"):
        metadata = inputs.get("metadata", {})
        return "/".join(filter(None, (metadata.get("namespace"), metadata.get("name")))) or None
    return None if kind == REPOSITORY_IAM_MEMBER.token else served.identity(kind, inputs)


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


def main(stack: str) -> int:
    """Settles the stack, if there is something to settle; gives the exit status."""
    pulumi = ["pulumi", "stack", "--stack", stack]
    state = json.loads(subprocess.run([*pulumi, "export"], capture_output=True, check=True).stdout)
    if not state["deployment"].get("pending_operations"):
        return 0
    settle(state["deployment"])
    # `pulumi refresh --import-pending-creates` is meant for this, but drops what it is told to import.
    subprocess.run([*pulumi, "import"], input=json.dumps(state).encode(), check=True)
    refresh = ["pulumi", "refresh", "--yes", "--stack", stack, "--color", "never"]
    return subprocess.run(refresh, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
