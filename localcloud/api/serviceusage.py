"""Service Usage v1, as far as gcloud asks it: which of Google's services may be used here."""

from __future__ import annotations

from localcloud.api.discovery import SERVED
from localcloud.api.service import TABLE, Call
from localcloud.specs import PROJECT_NUMBER
from localcloud.store import Json


@TABLE.serves("serviceusage.services.get")
def _get(call: Call) -> Json:
    """A service that localcloud speaks is enabled, any other is not."""
    name = call.path["service"]
    known = any(name == f"{service}.googleapis.com" for service, _ in SERVED)
    project = f"projects/{PROJECT_NUMBER}"
    return {
        "name": f"{project}/services/{name}",
        "parent": project,
        "config": {"name": name},
        "state": "ENABLED" if known else "DISABLED",
    }
