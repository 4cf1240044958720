"""Google's credentials, as every part of the program takes them; looked up when a request is made."""

from __future__ import annotations

import os
from typing import Any

from components.providers import Lazy, ProviderError

GIVEN = "GOOGLE_OAUTH_ACCESS_TOKEN"
SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]

# Where a token is given they are not needed, and are long to import.
_AUTH, _ERRORS = Lazy("google.auth"), Lazy("google.auth.exceptions")
_TRANSPORT = Lazy("google.auth.transport.requests")


class CredentialsError(ProviderError):
    """There are no credentials, or they are not good any more."""


def access_token() -> str:
    """Get a Google access token: GOOGLE_OAUTH_ACCESS_TOKEN, else the application default credentials."""
    return os.environ.get(GIVEN) or str(_application_default().token)


def authorization() -> dict[str, str]:
    """Give the headers of a request to Google: the token, and the quota project that credentials may name."""
    if given := os.environ.get(GIVEN):
        return {"Authorization": f"Bearer {given}"}
    headers: dict[str, str] = {}
    _application_default().apply(headers)
    return headers


def _application_default() -> Any:
    try:
        credentials, _ = _AUTH.default(scopes=SCOPES)
        credentials.refresh(_TRANSPORT.Request())
    except _ERRORS.GoogleAuthError as error:
        first_line = str(error).splitlines()[0]
        raise CredentialsError(
            f"there are no Google credentials ({first_line}): "
            f"run `gcloud auth application-default login` or set {GIVEN}"
        ) from None
    return credentials
