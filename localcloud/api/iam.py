"""Identity and Access Management v1: service accounts."""

from __future__ import annotations

import re
import secrets

from localcloud.api.errors import ApiError
from localcloud.api.listing import listing
from localcloud.api.policy import forget_member, get_policy, set_policy, test_permissions
from localcloud.api.service import TABLE, Call, fingerprint
from localcloud.specs import PROJECT_NUMBER
from localcloud.store import Json, Record, Store

ACCOUNT = "iam.serviceAccounts"
_ACCOUNT_ID = re.compile(r"[a-z](?:[-a-z0-9]{4,28}[a-z0-9])")
_ROLES = {
    "roles/iam.serviceAccountUser",
    "roles/iam.serviceAccountTokenCreator",
    "roles/iam.workloadIdentityUser",
}


def default_service_account() -> str:
    """The account that Google gives every project for its instances."""
    return f"{PROJECT_NUMBER}-compute@developer.gserviceaccount.com"


def find_account(store: Store, project: str, name: str) -> Record | None:
    """An account by its address or its unique id; `project` may be `-`."""
    for record in store.list(ACCOUNT, "" if project == "-" else f"projects/{project}/"):
        if name in (record.body["email"], record.body["uniqueId"]):
            return record
    return None


def _require(call: Call) -> Record:
    record = find_account(call.store, call.project, call.path["serviceAccount"])
    if record is None:
        raise ApiError(404, f"Unknown service account: {call.path['serviceAccount']}")
    return record


def _key(project: str, email: str) -> str:
    return f"projects/{project}/serviceAccounts/{email}"


def _new(project: str, email: str, fields: Json) -> Record:
    key = _key(project, email)
    unique = str(secrets.randbelow(9 * 10**20) + 10**20)
    body = {"name": key, "projectId": project, "uniqueId": unique, "email": email, "oauth2ClientId": unique}
    body |= {field: fields[field] for field in ("displayName", "description") if field in fields}
    return Record(key, ACCOUNT, _stamped(body))


def _stamped(body: Json) -> Json:
    return body | {"etag": fingerprint({key: value for key, value in body.items() if key != "etag"})}


@TABLE.serves("iam.projects.serviceAccounts.create")
def _create(call: Call) -> Json:
    account_id = call.body.get("accountId", "")
    if not _ACCOUNT_ID.fullmatch(account_id):
        raise ApiError(
            400,
            f"Invalid service account id '{account_id}'. It must be 6-30 characters long, and match the "
            f"regular expression '[a-z]([-a-z0-9]*[a-z0-9])'.",
        )
    email = f"{account_id}@{call.project}.iam.gserviceaccount.com"
    if call.store.get(_key(call.project, email)) is not None:
        raise ApiError(
            409, f"Service account {account_id} already exists within project projects/{call.project}."
        )
    fields = call.body.get("serviceAccount", {})
    if len(fields.get("displayName", "").encode()) > 100 or len(fields.get("description", "").encode()) > 256:
        raise ApiError(400, "The display name is limited to 100 bytes, the description to 256 bytes.")
    return call.store.put(_new(call.project, email, fields)).body


@TABLE.serves("iam.projects.serviceAccounts.get")
def _get(call: Call) -> Json:
    return _require(call).body


@TABLE.serves("iam.projects.serviceAccounts.list")
def _list(call: Call) -> Json:
    items = [record.body for record in call.store.list(ACCOUNT, f"projects/{call.project}/")]
    return listing(call, "accounts", items, default=20)


@TABLE.serves("iam.projects.serviceAccounts.patch")
def _patch(call: Call) -> Json:
    fields = call.body.get("serviceAccount", {})
    paths = (
        call.body.get("updateMask", "displayName,description")
        .replace("display_name", "displayName")
        .split(",")
    )
    if not set(paths) <= {"displayName", "description"}:
        raise ApiError(
            400, "Only the fields display_name and description of a service account can be updated."
        )
    return _update(call, fields, paths)


@TABLE.serves("iam.projects.serviceAccounts.update")
def _replace(call: Call) -> Json:
    return _update(call, call.body, ["displayName", "description"])


def _update(call: Call, fields: Json, paths: list[str]) -> Json:
    record = _require(call)
    if fields.get("etag", record.body["etag"]) != record.body["etag"]:
        raise ApiError(409, "The etag given does not match that of the service account.", status="ABORTED")
    record.body |= {path: fields.get(path, "") for path in paths}
    record.body = _stamped({key: value for key, value in record.body.items() if value != ""})
    return call.store.put(record).body


@TABLE.serves("iam.projects.serviceAccounts.delete")
def _delete(call: Call) -> Json:
    """Delete an account. What it was granted stays its own: one of the same name is another account."""
    record = _require(call)
    call.store.delete(record.key)
    forget_member(call.store, f"serviceAccount:{record.body['email']}", record.body["uniqueId"])
    return {}


@TABLE.serves("iam.projects.serviceAccounts.enable")
def _enable(call: Call) -> Json:
    record = _require(call)
    record.body.pop("disabled", None)
    call.store.put(record)
    return {}


@TABLE.serves("iam.projects.serviceAccounts.disable")
def _disable(call: Call) -> Json:
    record = _require(call)
    record.body["disabled"] = True
    call.store.put(record)
    return {}


@TABLE.serves("iam.projects.serviceAccounts.getIamPolicy")
def _get_policy(call: Call) -> Json:
    return get_policy(_require(call))


@TABLE.serves("iam.projects.serviceAccounts.setIamPolicy")
def _set_policy(call: Call) -> Json:
    return set_policy(
        call, _require(call), _ROLES, lambda email: find_account(call.store, "-", email) is not None
    )


@TABLE.serves("iam.projects.serviceAccounts.testIamPermissions")
def _test_permissions(call: Call) -> Json:
    return test_permissions(call, _require(call))


def seed(store: Store, project: str) -> None:
    """The default account of a new project."""
    email = default_service_account()
    if store.get(f"projects/{project}/seeded") is None:
        account = _new(project, email, {"displayName": "Compute Engine default service account"})
        account.private["seed"] = True
        store.put(account)
