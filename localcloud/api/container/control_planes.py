"""The work behind clusters: what the operations do with control planes."""

from __future__ import annotations

import base64
import logging
from functools import partial

from localcloud.api.container.common import CLUSTER, gke_version
from localcloud.api.errors import reason
from localcloud.api.service import TABLE, Services
from localcloud.specs import ClusterSpec
from localcloud.store import Json, Record
from localcloud.tokens import webhook_url

logger = logging.getLogger("localcloud.clusters")


def _spec(services: Services, record: Record) -> ClusterSpec:
    project = record.key.split("/")[1]
    return ClusterSpec(record.name, project, record.body["location"], webhook_url(services.home))


@TABLE.task("container.clusters.create")
def _do_create(services: Services, arguments: Json) -> None:
    """Start the control plane. One that cannot be started stays, in the state ERROR, as on Google.

    Whatever the cause (a full disk, a damaged file): nothing stays in PROVISIONING, which cannot be deleted.
    """
    record = services.store.get(arguments["key"])
    if record is None:
        return
    try:
        cluster = services.backends.create_cluster(_spec(services, record))
    except Exception as error:
        _show(services, record.key, {"status": "ERROR", "statusMessage": reason(error)})
        raise
    _show(services, record.key, _running(cluster.endpoint, cluster.ca_certificate_pem, cluster.version))


def _running(endpoint: str, certificate: str, version: str) -> Json:
    return {
        "status": "RUNNING",
        "endpoint": endpoint,
        "masterAuth": {"clusterCaCertificate": base64.b64encode(certificate.encode()).decode()},
        "currentMasterVersion": gke_version(version),
    }


def _show(services: Services, key: str, fields: Json) -> None:
    with services.store.transaction():
        record = services.store.get(key)
        if record is not None:
            record.body |= fields
            if fields["status"] == "RUNNING":
                record.body.pop("statusMessage", None)
            services.store.put(record)


@TABLE.task("container.clusters.delete")
def _do_delete(services: Services, arguments: Json) -> None:
    """End the control plane first and forget it afterwards, so that a crash in between loses no work."""
    key = arguments["key"]
    try:
        services.backends.delete_cluster(key.rpartition("/")[2])
    except Exception as error:
        _show(services, key, {"status": "ERROR", "statusMessage": reason(error)})
        raise
    services.store.delete(key)


def reconcile(services: Services) -> None:
    """Make every control plane that should run do so; one that cannot is shown in the state ERROR."""
    for record in services.store.list(CLUSTER):
        services.operations.schedule(record.key, partial(_restore, services, record.key))


def _restore(services: Services, key: str) -> None:
    record = services.store.get(key)
    if record is not None and record.body["status"] in ("RUNNING", "ERROR"):
        try:
            _do_create(services, {"key": key})
        except Exception:  # the record says why: see _do_create
            logger.exception("cluster %s could not be started again", record.name)
