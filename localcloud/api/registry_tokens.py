"""The registry's token endpoint, `/v2/token`: what a caller may do with which image is decided here.

The protocol is the distribution project's token authentication specification, over the IAM policies of
Artifact Registry repositories. An image whose repository was never created gets nothing, as on Google.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from datetime import UTC, datetime

from localcloud.api.artifactregistry import repository_of
from localcloud.api.auth import identify
from localcloud.api.faults import due
from localcloud.api.policy import granted
from localcloud.api.service import Principal, Services
from localcloud.store import Json
from localcloud.tokens import (
    REGISTRY_SERVICE,
    REGISTRY_TOKEN_SECONDS,
    RegistryAccess,
    mint_registry_token,
)

USER = "oauth2accesstoken"
_SCOPE = re.compile(r"repository(?:\([^)]*\))?:(?P<name>[^\s:]+(?::\d+/[^\s:]+)?):(?P<actions>[a-z*,]+)")
_PERMISSIONS = {
    "pull": "artifactregistry.repositories.downloadArtifacts",
    "push": "artifactregistry.repositories.uploadArtifacts",
    "delete": "artifactregistry.repositories.deleteArtifacts",
}


class RegistryError(Exception):
    """An answer in the registry protocol's own form: an HTTP status, a code and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body: Json = {"errors": [{"code": code, "message": message}]}


def caller(services: Services, authorization: str, form: Json) -> Principal | None:
    """Who asks, by Basic (`oauth2accesstoken:TOKEN`), Bearer, or the form of an OAuth2 request; None: nobody.

    Raises:
        RegistryError: 401, credentials that are wrong.
    """
    scheme, _, value = authorization.partition(" ")
    user, token = USER, ""
    if scheme.lower() == "basic":
        try:
            user, _, token = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise RegistryError(401, "UNAUTHORIZED", "The Basic credentials are not base64.") from error
    elif scheme.lower() == "bearer":
        token = value.strip()
    elif form.get("grant_type") == "password":
        user, token = form.get("username", ""), form.get("password", "")
    elif form.get("grant_type") == "refresh_token":
        token = form.get("refresh_token", "")
    if not token:
        return None
    principal = identify(services, token) if user == USER else None
    if principal is None:
        raise RegistryError(
            401,
            "UNAUTHORIZED",
            f"The access token is not valid; the user must be {USER} and the password an access token.",
        )
    return principal


def grant(services: Services, principal: Principal | None, service: str, scopes: Sequence[str]) -> Json:
    """A token for what was asked as far as it is allowed.

    Raises:
        RegistryError: 400, a malformed request; 401 or 403, nothing of what was asked is allowed.
    """
    if service and service != REGISTRY_SERVICE:
        raise RegistryError(400, "UNSUPPORTED", f"This is the token endpoint of {REGISTRY_SERVICE}.")
    asked = [
        (match["name"], match["actions"].split(",")) for scope in scopes for match in _SCOPE.finditer(scope)
    ]
    access, refused = [], ""
    for name, actions in asked:
        allowed, missing = _allowed(services, principal, name, actions)
        if allowed:
            access.append(RegistryAccess(name, tuple(allowed)))
        refused = refused or missing
    if asked and not access:
        if principal is None:
            raise RegistryError(401, "UNAUTHORIZED", f"Unauthenticated request. {refused}")
        raise RegistryError(403, "DENIED", refused)
    token = mint_registry_token(services.home, principal.email if principal else "", access)
    issued = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {"token": token, "access_token": token, "expires_in": REGISTRY_TOKEN_SECONDS, "issued_at": issued}


def _allowed(
    services: Services, principal: Principal | None, name: str, actions: Sequence[str]
) -> tuple[list[str], str]:
    """The allowed ones of the actions on an image, and a message about the first that is not."""
    record = repository_of(services.store, name)
    wanted = list(_PERMISSIONS) if "*" in actions else [item for item in actions if item in _PERMISSIONS]
    if record is None:
        project, _, rest = name.partition("/")
        shown = f"projects/{project}/repositories/{rest.partition('/')[0]}"
        held: set[str] = set()
    else:
        shown = record.key
        is_owner = principal is not None and principal.is_developer
        member = principal.member if principal else None
        held = set(_PERMISSIONS.values()) if is_owner else granted(services.store, record, member)
    if (
        record is not None
        and set(wanted) != {"pull"}
        and due(services.store, ("read-only-registry",), record.name)
    ):
        held = {_PERMISSIONS["pull"]}
    allowed = [action for action in wanted if _PERMISSIONS[action] in held]
    missing = next((action for action in wanted if action not in allowed), "pull")
    return allowed, f'Permission "{_PERMISSIONS[missing]}" denied on resource "{shown}" (or it may not exist)'
