"""IAM policies of the project and of single resources: reading, writing with etags, and what they grant."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from localcloud.api.errors import ApiError
from localcloud.api.service import Call, fingerprint
from localcloud.store import Json, Record, Store

_READ = {
    "artifactregistry.repositories.get",
    "artifactregistry.repositories.list",
    "artifactregistry.repositories.downloadArtifacts",
    "artifactregistry.dockerimages.get",
    "artifactregistry.dockerimages.list",
    *(
        f"artifactregistry.{collection}.{verb}"
        for collection in ("packages", "versions", "tags", "files")
        for verb in ("get", "list")
    ),
}
_WRITE = _READ | {"artifactregistry.repositories.uploadArtifacts"}
_ADMIN = _WRITE | {
    "artifactregistry.repositories.deleteArtifacts",
    "artifactregistry.repositories.getIamPolicy",
    "artifactregistry.repositories.setIamPolicy",
    "artifactregistry.repositories.update",
    "artifactregistry.repositories.delete",
}
REPOSITORY_ROLES: dict[str, set[str]] = {
    "roles/artifactregistry.reader": _READ,
    "roles/artifactregistry.writer": _WRITE,
    "roles/artifactregistry.repoAdmin": _WRITE | {"artifactregistry.repositories.deleteArtifacts"},
    "roles/artifactregistry.admin": _ADMIN,
    "roles/viewer": _READ,
    "roles/editor": _WRITE,
    "roles/owner": _ADMIN,
}
PROJECT = "cloudresourcemanager.projects"
_WITH_POLICIES = ("artifactregistry.repositories", "iam.serviceAccounts", PROJECT)
_MEMBER = re.compile(
    r"deleted:serviceAccount:[^@\s:]+@[^@\s:?]+\?uid=\d+|allUsers|allAuthenticatedUsers|(user|serviceAccount|group):[^@\s:]+@[^@\s:]+|domain:[^@\s:]+\.[^@\s:]+"
    r"|principal(Set)?://\S+|project(Owner|Editor|Viewer):\S+"
)


def project_key(project: str) -> str:
    """Give the key of the record with a project's policy."""
    return f"projects/{project}/policy"


def get_policy(record: Record) -> Json:
    """A resource's policy with its etag; one that was never set has no bindings."""
    policy: Json = record.private.get("policy", {"version": 1})
    return policy | {"etag": fingerprint(policy)}


def set_policy(
    call: Call, record: Record, roles: Collection[str], account_exists: Callable[[str], bool]
) -> Json:
    """Replace a resource's policy.

    Raises:
        ApiError: 400, a role, member or account that Google would refuse; 409, the etag is an old one.
    """
    policy = call.body.get("policy", {})
    if policy.get("etag") and policy["etag"] != get_policy(record)["etag"]:
        raise ApiError(
            409,
            "There were concurrent policy changes. Please retry the whole read-modify-write with exponential "
            "backoff.",
            status="ABORTED",
        )
    merged: dict[str, list[str]] = {}
    for binding in policy.get("bindings", []):
        role = binding.get("role", "")
        if role not in roles:
            raise ApiError(400, f"Role {role} is not supported for this resource.")
        if "condition" in binding:
            raise ApiError(501, "localcloud serves IAM bindings without conditions only")
        members = merged.setdefault(role, [])
        for member in binding.get("members", []):
            _check_member(member, account_exists)
            if member not in members:
                members.append(member)
    kept: Json = {"version": 1}
    bindings = [
        {"role": role, "members": sorted(members)} for role, members in sorted(merged.items()) if members
    ]
    if bindings:
        kept["bindings"] = bindings
    record.private["policy"] = kept
    call.store.put(record)
    return get_policy(record)


def forget_member(store: Store, member: str, unique: str) -> None:
    """Show in every policy that a member was deleted, as Google does: `deleted:serviceAccount:…?uid=…`."""
    for kind in _WITH_POLICIES:
        for record in store.list(kind):
            bindings = record.private.get("policy", {}).get("bindings", [])
            if any(member in binding["members"] for binding in bindings):
                gone = f"deleted:{member}?uid={unique}"
                for binding in bindings:
                    members = {gone if item == member else item for item in binding["members"]}
                    binding["members"] = sorted(members)
                store.put(record)


def _check_member(member: str, account_exists: Callable[[str], bool]) -> None:
    if not _MEMBER.fullmatch(member):
        raise ApiError(400, f'Invalid member: {member}. Policy members must be of the form "<type>:<value>".')
    kind, _, email = member.partition(":")
    if kind == "serviceAccount" and not account_exists(email):
        raise ApiError(400, f"Service account {email} does not exist.")


def granted(store: Store, record: Record, member: str | None) -> set[str]:
    """What a resource's policy and its project's allow a member to do (None: an anonymous caller)."""
    names = {"allUsers"} if member is None else {"allUsers", "allAuthenticatedUsers", member}
    permissions: set[str] = set()
    for place in (record, store.get(project_key(record.key.split("/")[1]))):
        for binding in place.private.get("policy", {}).get("bindings", []) if place else []:
            if names & set(binding["members"]):
                permissions |= REPOSITORY_ROLES.get(binding["role"], set())
    return permissions


def test_permissions(call: Call, record: Record) -> Json:
    asked = call.body.get("permissions", [])
    if call.principal.is_developer:
        return {"permissions": asked}
    held = granted(call.store, record, call.principal.member)
    return {"permissions": [permission for permission in asked if permission in held]}
