"""Service Usage v1: which of Google's services may be used here: those that localcloud speaks, always."""

from __future__ import annotations

from localcloud.api.discovery import SERVED
from localcloud.api.errors import ApiError
from localcloud.api.listing import listing
from localcloud.api.service import TABLE, Call
from localcloud.specs import PROJECT_NUMBER
from localcloud.store import Json

_PROJECT = f"projects/{PROJECT_NUMBER}"
_SERVED = sorted({f"{service}.googleapis.com" for service, _ in SERVED})


def _shown(name: str) -> Json:
    return {
        "name": f"{_PROJECT}/services/{name}",
        "parent": _PROJECT,
        "config": {"name": name},
        "state": "ENABLED" if name in _SERVED else "DISABLED",
    }


def _enabled(names: list[str], response: Json) -> Json:
    """The operation that Google answers with where nothing is left to do."""
    for name in names:
        if not name.endswith(".googleapis.com"):
            raise ApiError(404, f"Not found or permission denied for service(s): {name}.")
        if name not in _SERVED:
            raise ApiError(501, f"localcloud does not serve {name}; it has {', '.join(_SERVED)}")
    return {"name": "operations/noop.DONE_OPERATION", "done": True, "response": response}


@TABLE.serves("serviceusage.services.get")
def _get(call: Call) -> Json:
    return _shown(call.path["service"])


@TABLE.serves("serviceusage.services.list")
def _list(call: Call) -> Json:
    return listing(call, "services", [_shown(name) for name in _SERVED], default=50)


@TABLE.serves("serviceusage.services.enable")
def _enable(call: Call) -> Json:
    name = call.path["service"]
    kind = "type.googleapis.com/google.api.serviceusage.v1.EnableServiceResponse"
    return _enabled([name], {"@type": kind, "service": _shown(name)})


@TABLE.serves("serviceusage.services.batchEnable")
def _batch_enable(call: Call) -> Json:
    names = call.body.get("serviceIds", [])
    kind = "type.googleapis.com/google.api.serviceusage.v1.BatchEnableServicesResponse"
    return _enabled(names, {"@type": kind, "services": [_shown(name) for name in names]})
