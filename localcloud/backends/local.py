"""The real backends, bound to one home and its supervisor."""

from __future__ import annotations

from localcloud.backends import cluster, instance, registry, routes
from localcloud.backends.supervisor import Supervisor
from localcloud.home import Home
from localcloud.specs import Cluster, ClusterSpec, InstanceSpec, Part
from localcloud.store import Json


class LocalBackends:
    """Implements `localcloud.api.service.Backends` with processes on this machine."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._supervisor = Supervisor(home)

    def ensure_registry(self) -> str:
        return registry.ensure_registry(self._home, self._supervisor)

    def delete_repository(self, prefix: str) -> None:
        registry.delete_repository(self._home, prefix)

    def list_manifests(self, prefix: str) -> list[Json]:
        return registry.list_manifests(self._home, prefix)

    def create_cluster(self, spec: ClusterSpec) -> Cluster:
        return cluster.create_cluster(self._home, self._supervisor, spec)

    def delete_cluster(self, name: str) -> None:
        cluster.delete_cluster(self._home, self._supervisor, name)

    def suspend_cluster(self, name: str) -> None:
        cluster.suspend_cluster(self._supervisor, name)

    def cluster_version(self) -> str:
        return cluster.cluster_version()

    def start_instance(self, spec: InstanceSpec) -> None:
        routes.hold(self._home, spec.name, spec.alias_ranges)
        instance.start_instance(self._home, self._supervisor, spec)

    def stop_instance(self, spec: InstanceSpec) -> None:
        instance.stop_instance(self._home, self._supervisor, spec.name)
        routes.release(self._home, spec.alias_ranges)

    def delete_instance(self, spec: InstanceSpec) -> None:
        instance.delete_instance(self._home, self._supervisor, spec.name)
        routes.release(self._home, spec.alias_ranges)

    def change_alias_ranges(self, spec: InstanceSpec, ranges: tuple[str, ...]) -> None:
        routes.hold(self._home, spec.name, ranges)
        routes.release(self._home, [old for old in spec.alias_ranges if old not in ranges])

    def serial_output(self, spec: InstanceSpec) -> str:
        return instance.serial_output(self._home, spec.name)

    def parts(self) -> list[Part]:
        return [Part(item.name, item.state, item.pid) for item in self._supervisor.programs()]

    def allocate_address(self, taken: set[str]) -> str:
        return instance.allocate_address(self._home, taken)
