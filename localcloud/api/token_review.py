"""The webhook by which a cluster's API server turns a Google access token into a user, as on GKE."""

from __future__ import annotations

from localcloud.api.auth import identify
from localcloud.api.errors import ApiError
from localcloud.api.iam import find_account
from localcloud.api.service import Services
from localcloud.store import Json
from localcloud.tokens import read_access_token

# Without it a token does not tell the address of its account, so that the user is a number.
# https://cloud.google.com/kubernetes-engine/docs/how-to/role-based-access-control
_EMAIL_SCOPE = "https://www.googleapis.com/auth/userinfo.email"
_VERSION = "authentication.k8s.io/v1"


def review(services: Services, request: Json) -> Json:
    """The answer to a TokenReview: the user is the account's address, its uid the account's unique id.

    Raises:
        ApiError: 400, not a TokenReview v1.
    """
    if request.get("kind") != "TokenReview" or request.get("apiVersion") != _VERSION:
        raise ApiError(400, f"expected a TokenReview of {_VERSION}")
    token = request.get("spec", {}).get("token", "")
    principal = identify(services, token) if isinstance(token, str) and token else None
    status: Json = {"authenticated": False}
    if principal is not None:
        account = find_account(services.store, "-", principal.email)
        uid = account.body["uniqueId"] if account else principal.email
        minted = read_access_token(services.home, token)
        is_named = minted is None or _EMAIL_SCOPE in minted.scopes
        status = {
            "authenticated": True,
            "user": {"username": principal.email if is_named else uid, "uid": uid},
        }
    return {"apiVersion": _VERSION, "kind": "TokenReview", "status": status}
