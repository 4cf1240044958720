"""ContainerRegistry: the Artifact Registry repository that app and agent are pushed to and pulled from."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_gcp as gcp

from components.config import GCR_LOCATIONS
from components.project import ProjectServices


@dataclass(frozen=True)
class ContainerRegistryArgs:
    """`name` is a repository id, or a Container Registry host name as `gcr.io`."""

    project: str
    name: str
    location: str
    services: ProjectServices


def image_prefix(registry_uri: str, project: str, name: str) -> str:
    """Give what an image's name starts with.

    Artifact Registry serves its repositories named `gcr.io` under that host too; there the old spelling is
    used, so that names which are in use stay as they are.
    """
    host = registry_uri.split("/", 1)[0]
    if name in GCR_LOCATIONS and host.endswith("-docker.pkg.dev"):
        return f"{name}/{project.replace(':', '/')}"
    return registry_uri


class ContainerRegistry(pulumi.ComponentResource):
    """A repository for OCI artifacts."""

    url: pulumi.Output[str]
    """What the name of an image in it starts with, without a slash at the end."""
    lifetime: pulumi.Resource
    """What all that is in it ends with (`deleted_with`)."""

    def __init__(
        self, name: str, args: ContainerRegistryArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("awesome-wasm:registry:ContainerRegistry", name, None, opts)
        self._name = name
        self.lifetime = self._repository = gcp.artifactregistry.Repository(
            f"{name}-repository",
            project=args.project,
            location=args.location,
            repository_id=args.name,
            format="DOCKER",
            description="WebAssembly components, their signatures and the node agent",
            opts=pulumi.ResourceOptions(parent=self, depends_on=args.services.enabled),
        )
        self.url = self._repository.registry_uri.apply(lambda uri: image_prefix(uri, args.project, args.name))
        self.register_outputs({"url": self.url})

    def allow_pull(self, who: str, email: pulumi.Input[str]) -> pulumi.Resource:
        """Let a service account pull; `who` becomes part of the grant's name."""
        return gcp.artifactregistry.RepositoryIamMember(
            f"{self._name}-{who}-reader",
            project=self._repository.project,
            location=self._repository.location,
            repository=self._repository.repository_id,
            role="roles/artifactregistry.reader",
            member=pulumi.Output.concat("serviceAccount:", email),
            # The end of a former grant would be the end of one that says the same.
            opts=pulumi.ResourceOptions(
                parent=self, deleted_with=self._repository, delete_before_replace=True
            ),
        )
