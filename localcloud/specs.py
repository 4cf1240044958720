"""What the API asks of the backends, and what it gets back.

These types are the vocabulary between `localcloud/api` (Google's REST) and `localcloud/backends` (processes).
Two backends besides read what the API has stored, and write nothing there: an instance's metadata server,
which shows a change at once, and the approver of nodes' certificates, which asks what a node's instance is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PROJECT_NUMBER = "481516234200"


class BackendError(Exception):
    """A backend could not do its work. The message is for the user: what failed, on what, what to do next."""


@dataclass(frozen=True)
class InstanceSpec:
    """A virtual machine to run.

    `id` is Google's numeric id as a decimal string, `ip` the loopback address that belongs to the instance,
    `hostname` its full name (`NAME.c.PROJECT.internal`), `service_account_email` is empty if it has none,
    `metadata` the attributes at the time of the call (the metadata server reads live ones from the store),
    `alias_ranges` what its interface has beside its address (CIDR).
    """

    name: str
    project: str
    zone: str
    id: str
    ip: str
    hostname: str
    service_account_email: str = ""
    scopes: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    machine_type: str = "e2-small"
    alias_ranges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A process that is kept running: `state` is the supervisor's name for it, `pid` 0 unless it is there."""

    name: str
    state: str
    pid: int


@dataclass(frozen=True)
class ClusterSpec:
    """A Kubernetes control plane to run. `webhook_url` answers the API server's TokenReviews."""

    name: str
    project: str
    location: str
    webhook_url: str


@dataclass(frozen=True)
class Cluster:
    """A running control plane: `endpoint` is HOST:PORT, the CA is PEM text, `version` like `1.37.2`."""

    endpoint: str
    ca_certificate_pem: str
    version: str
