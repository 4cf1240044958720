"""Who calls, and whether they may.

The developer owns the project. A service account may do what the policies of the project and of single
repositories grant it with the roles for repositories, and nothing else.
"""

from __future__ import annotations

from localcloud.api.errors import ApiError
from localcloud.api.iam import find_account
from localcloud.api.policy import granted
from localcloud.api.service import Call, Principal, Services
from localcloud.tokens import is_developer_token, read_access_token

_INVALID = (
    "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other "
    "valid authentication credential. See https://developers.google.com/identity/sign-in/web/devconsole-project."
)
_MISSING = _INVALID.replace(
    "Request had invalid authentication credentials.",
    "Request is missing required authentication credential.",
)


def identify(services: Services, token: str) -> Principal | None:
    """The holder of an access token; None if the token is not ours, is old, or its account is gone."""
    if is_developer_token(services.home, token):
        return Principal(services.config.user, is_developer=True)
    minted = read_access_token(services.home, token)
    if minted is None:
        return None
    account = find_account(services.store, "-", minted.email)
    if account is None or account.body.get("disabled"):
        return None
    return Principal(minted.email, is_developer=False)


def authenticate(services: Services, authorization: str, parameter: str) -> Principal:
    """The caller, by the header `Authorization: Bearer TOKEN` or the parameter `access_token`.

    Raises:
        ApiError: 401.
    """
    scheme, _, token = authorization.partition(" ")
    token = token.strip() if scheme.lower() == "bearer" else parameter
    principal = identify(services, token) if token else None
    if principal is None:
        reason = "ACCESS_TOKEN_TYPE_UNSUPPORTED" if token else "CREDENTIALS_MISSING"
        detail = {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": reason,
            "domain": "googleapis.com",
        }
        raise ApiError(401, _INVALID if token else _MISSING, reason="required", details=(detail,))
    return principal


def authorize(call: Call) -> None:
    """
    Raises:
        ApiError: 403, the caller lacks the method's permission.
    """
    if call.principal.is_developer or call.method.id.endswith(".testIamPermissions"):
        return
    service, *middle, verb = call.method.id.split(".")
    collection = middle[-1] if middle else ""
    permission = (
        f"{service}.{collection.lower() if collection == 'dockerImages' else collection}.{_verb(verb)}"
    )
    resource = "/".join(f"{_plural(name)}/{value}" for name, value in call.path.items())
    if service == "artifactregistry" and "repository" in call.path:
        key = "projects/{project}/locations/{location}/repositories/{repository}".format_map(call.path)
        record = call.store.get(key)
        if record is not None and permission in granted(call.store, record, call.principal.member):
            return
        raise ApiError(
            403,
            f"Permission '{permission}' denied on resource '//artifactregistry.googleapis.com/{key}' "
            "(or it may not exist).",
        )
    raise ApiError(403, f"Required '{permission}' permission for '{resource}'")


def _verb(name: str) -> str:
    return {
        "insert": "create",
        "patch": "update",
        "aggregatedList": "list",
        "asymmetricSign": "useToSign",
        "getPublicKey": "viewPublicKey",
    }.get(name, name)


def _plural(name: str) -> str:
    if name.endswith("y") and not name.endswith("ey"):
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith("s") else f"{name}s"
