"""Resource Manager v1 and v3, as far as clients ask it: the one project that there is."""

from __future__ import annotations

from localcloud.api.iam import find_account
from localcloud.api.listing import listing
from localcloud.api.policy import PROJECT, REPOSITORY_ROLES, get_policy, project_key, set_policy
from localcloud.api.service import TABLE, Call, fingerprint
from localcloud.specs import PROJECT_NUMBER
from localcloud.store import Json, Record

_CREATED = "2026-09-16T00:00:00.000Z"


def _project(call: Call) -> Json:
    name = call.services.config.project
    if call.method.document.version == "v1":
        return {
            "projectNumber": PROJECT_NUMBER,
            "projectId": name,
            "lifecycleState": "ACTIVE",
            "name": name,
            "createTime": _CREATED,
        }
    return {
        "name": f"projects/{PROJECT_NUMBER}",
        "projectId": name,
        "state": "ACTIVE",
        "displayName": name,
        "createTime": _CREATED,
        "updateTime": _CREATED,
        "etag": fingerprint(name),
    }


@TABLE.serves("cloudresourcemanager.projects.get")
def _get(call: Call) -> Json:
    return _project(call)


@TABLE.serves("cloudresourcemanager.projects.list")
def _list(call: Call) -> Json:
    """Version 3 lists what is directly below a folder or an organization, and there is none."""
    below = call.method.document.version != "v1"
    return listing(call, "projects", [] if below else [_project(call)], key="projectId")


@TABLE.serves("cloudresourcemanager.projects.search")
def _search(call: Call) -> Json:
    return listing(call, "projects", [_project(call)], key="name", expression=call.query.get("query"))


@TABLE.serves("cloudresourcemanager.projects.getAncestry")
def _ancestry(call: Call) -> Json:
    return {"ancestor": [{"resourceId": {"type": "project", "id": call.services.config.project}}]}


# What may be granted on a whole project here, beside the roles that repositories know.
_ROLES = {
    *REPOSITORY_ROLES,
    "roles/container.defaultNodeServiceAccount",
    "roles/container.nodeServiceAccount",
}


def _granted(call: Call) -> Record:
    """The project's policy: whose it was at first is the developer's."""
    key = project_key(call.services.config.project)
    owner = {"role": "roles/owner", "members": [f"user:{call.services.config.user}"]}
    policy = {"version": 1, "bindings": [owner]}
    return call.store.get(key) or Record(key, PROJECT, {}, {"seed": True, "policy": policy})


@TABLE.serves("cloudresourcemanager.projects.getIamPolicy")
def _policy(call: Call) -> Json:
    return get_policy(_granted(call))


@TABLE.serves("cloudresourcemanager.projects.setIamPolicy")
def _set_policy(call: Call) -> Json:
    return set_policy(
        call, _granted(call), _ROLES, lambda email: find_account(call.store, "-", email) is not None
    )


@TABLE.serves("cloudresourcemanager.projects.testIamPermissions")
def _test(call: Call) -> Json:
    asked = call.body.get("permissions", [])
    return {"permissions": asked} if asked and call.principal.is_developer else {}
