"""Google's error body, and the errors that handlers raise, in Google's own wording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from localcloud.specs import BackendError
from localcloud.store import Json

_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    412: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
}
_REASON = {
    400: "badRequest",
    401: "authError",
    403: "forbidden",
    404: "notFound",
    409: "alreadyExists",
    412: "conditionNotMet",
    500: "backendError",
    501: "notImplemented",
    503: "backendError",
}


@dataclass
class ApiError(Exception):
    """An answer that is not 2xx: its HTTP status, and Google's old (`reason`) and new (`status`) name."""

    code: int
    message: str
    reason: str = ""
    status: str = ""
    details: tuple[Json, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.reason = self.reason or _REASON.get(self.code, "backendError")
        self.status = self.status or _STATUS.get(self.code, "UNKNOWN")

    def body(self) -> Json:
        entry: dict[str, Any] = {"message": self.message, "domain": "global", "reason": self.reason}
        if self.code == 401:
            entry |= {"location": "Authorization", "locationType": "header"}
        error: dict[str, Any] = {
            "code": self.code,
            "message": self.message,
            "errors": [entry],
            "status": self.status,
        }
        if self.details:
            error["details"] = list(self.details)
        return {"error": error}


def reason(error: Exception) -> str:
    """What went wrong, for the user: also of what no backend foresaw, as a full disk or a damaged file."""
    if isinstance(error, (ApiError, BackendError)):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def not_found(key: str) -> ApiError:
    """Compute Engine's 404."""
    return ApiError(404, f"The resource '{key}' was not found")


def already_exists(key: str) -> ApiError:
    """Compute Engine's 409."""
    return ApiError(409, f"The resource '{key}' already exists")


def invalid_value(field: str, value: object, why: str) -> ApiError:
    """Compute Engine's 400 for one field. `why` is a sentence with its full stop where Google has one."""
    return ApiError(400, f"Invalid value for field '{field}': '{value}'. {why}", reason="invalid")


def in_use(key: str, user: str) -> ApiError:
    """Compute Engine's 400 for the deletion of something that something else needs."""
    return ApiError(
        400,
        f"The {_singular(key)} resource '{key}' is already being used by '{user}'",
        reason="resourceInUseByAnotherResource",
    )


def not_ready(key: str) -> ApiError:
    return ApiError(400, f"The resource '{key}' is not ready", reason="resourceNotReady")


def _singular(key: str) -> str:
    collection = key.split("/")[-2]
    return "address" if collection == "addresses" else collection.removesuffix("s")
