"""ProjectServices: the APIs of Google's that the stack uses, enabled."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_gcp as gcp

# The first one changes the project's policy, which names the accounts of the machines.
SERVICES = ("cloudresourcemanager", "compute", "container", "artifactregistry", "iam")
KMS = "cloudkms"


@dataclass(frozen=True)
class ProjectServicesArgs:
    """`manage` is false where somebody else sees to what the project may use; `kms` is whether it signs."""

    project: str
    manage: bool
    kms: bool = False


class ProjectServices(pulumi.ComponentResource):
    """What has to be enabled before anything else is made, and stays so: others may use it too."""

    enabled: list[pulumi.Resource]
    """What all that is made by these APIs waits for."""

    def __init__(
        self, name: str, args: ProjectServicesArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("awesome-wasm:project:ProjectServices", name, None, opts)
        services = [*SERVICES, *([KMS] if args.kms else [])]
        self.enabled = [
            gcp.projects.Service(
                f"{name}-{service}",
                project=args.project,
                service=f"{service}.googleapis.com",
                disable_on_destroy=False,
                opts=pulumi.ResourceOptions(parent=self),
            )
            for service in (services if args.manage else ())
        ]
        self.register_outputs({})
