"""Settles what a killed pulumi left unfinished, so that the next run carries on.

A creation that was interrupted may have happened: Google or Kubernetes then answer a second one with "already
exists". Those resources are taken into the state under the id that they would have, and the refresh drops the ones
that turn out not to be there. The other kinds can simply be created again.
"""

import json
import subprocess
import sys
from typing import Any

from localcloud.plugins.gcp.tables import REPOSITORY_IAM_MEMBER, TYPES


def identity(kind: str, inputs: dict[str, Any]) -> str | None:
    """The id that a resource of this type and these inputs has; None where creating it again does no harm."""
    if kind.startswith("kubernetes:"):
        metadata = inputs.get("metadata", {})
        return "/".join(filter(None, (metadata.get("namespace"), metadata.get("name")))) or None
    if kind not in TYPES or kind == REPOSITORY_IAM_MEMBER.token:
        return None
    email = f"{inputs.get('accountId')}@{inputs.get('project')}.iam.gserviceaccount.com"
    return TYPES[kind].item.format_map({"email": email, **inputs})


def refresh_arguments(deployment: dict[str, Any]) -> list[str]:
    """What `pulumi refresh` needs to be told about the creations that were interrupted."""
    arguments = ["--clear-pending-creates"]
    for operation in deployment.get("pending_operations") or []:
        resource = operation["resource"]
        known = identity(resource["type"], resource.get("inputs", {}))
        if operation["type"] == "creating" and known is not None:
            for word in (resource["urn"], known):
                arguments += ["--import-pending-creates", word]
    return arguments


def main(stack: str) -> int:
    """Settles the stack, if there is something to settle; gives the exit status."""
    export = ["pulumi", "stack", "export", "--stack", stack]
    deployment = json.loads(subprocess.run(export, capture_output=True, check=True).stdout)["deployment"]
    if not deployment.get("pending_operations"):
        return 0
    command = ["pulumi", "refresh", "--yes", "--stack", stack, "--color", "never"]
    return subprocess.run([*command, *refresh_arguments(deployment)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
