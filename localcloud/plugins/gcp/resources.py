"""What the tables cannot say: how each type is created, read, updated and deleted through Google's REST.

`Resource` does what most types need; a subclass says where its type differs. The calls are those of the
official plugin.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localcloud.plugins.gcp.fields import Field, Json, Type, Update, from_rest, to_rest
from localcloud.plugins.gcp.rest import Google, GoogleError
from localcloud.plugins.gcp.tables import ResourceType
from localcloud.plugins.protocol import Failure, ProviderError
from localcloud.plugins.values import Path, Properties, Value

ATTRIBUTION = {"goog-pulumi-provisioned": "true"}
_EMPTY: dict[Type, Value] = {
    Type.STRING: "",
    Type.BOOL: False,
    Type.STRINGS: [],
    Type.OBJECTS: [],
    Type.MAP: {},
}


@dataclass(frozen=True)
class Change:
    """An update in work: the id, inputs before and after, the names of those that changed, what is live."""

    item: str
    old: Properties
    new: Properties
    names: frozenset[str]
    live: Json
    deadline: float
    managed: frozenset[str] = frozenset()
    """The labels that are the program's or the provider's; those that others gave stay."""


class Resource:
    """A type as most are: POST to the collection, GET, PATCH with a mask, DELETE; all but GET operations."""

    def __init__(self, spec: ResourceType, google: Google) -> None:
        self.spec = spec
        self.google = google

    def check(self, inputs: Properties) -> list[Failure]:  # noqa: ARG002
        """Rules over several inputs."""
        return []

    def item(self, known: Mapping[str, Value]) -> str:
        """The resource's path, which is its Pulumi id."""
        return self.spec.item.format_map(known)

    def full(self, given: str, scope: Mapping[str, Value]) -> str:
        """The id that an import gives in one of the official plugin's forms: the path, a link, or the names
        alone, of which the first may be left out where the provider's configuration has them.
        """
        if "projects/" in given:
            return given[given.index("projects/") :]
        names = re.findall(r"{(\w+)}", self.spec.item)
        parts = given.split("/")
        missing = len(names) - len(parts)
        if missing < 0 or not all(parts):
            raise ProviderError(f"{given!r} is no id of a {self.spec.token}; it takes {self.spec.item}")
        known = {
            **{name: scope.get(name, "") for name in names},
            **dict(zip(names[missing:], parts, strict=True)),
        }
        if not all(known.values()):
            raise ProviderError(f"{given!r} does not say which of all; give {self.spec.item}")
        return self.spec.item.format_map(known)

    def replaces(self, path: Path, before: Properties, after: Properties) -> bool:  # noqa: ARG002
        """Whether a change there needs a new resource: the innermost declaration on the way decides.

        A subclass says where the official plugin looks at the values too.
        """
        declared = declarations(self.spec.fields, path)
        return not declared or declared[-1].update is Update.REPLACE

    def plan(self, change: Change) -> None:
        """Raises `ProviderError` where an update would be refused, so that a preview says so."""

    exclusive = True
    """Whether a creation fails where there is one already."""

    def create(self, inputs: Properties, known: Properties, deadline: float) -> None:
        """Begins the resource; one request, after which there is something to keep in the state."""
        query = {parameter: known[name] for parameter, name in self.spec.create_query}
        self._operate(
            "POST", self.spec.collection.format_map(known), deadline, self.body(inputs, known), query
        )

    def finish(self, inputs: Properties, item: str, deadline: float) -> None:
        """What a creation needs beside its request; done again after it broke off, it does no harm."""

    def settle(self, item: str, deadline: float) -> None:
        """Waits for what is going on with the resource, whoever began it."""
        for operation in self.google.running(self.spec.service, item):
            self.google.follow(self.spec.service, operation, item, deadline)

    def discard(self, item: str, deadline: float) -> None:
        """Takes away what a failed operation left, which would be in the way of the next one."""
        self._operate("DELETE", item, deadline)

    def as_asked(self, live: Json, inputs: Properties, known: Properties) -> bool:
        """Whether what is there has what was asked for."""
        outputs = self.outputs(live, known)
        return all(_agrees(v, outputs.get(k)) for k, v in inputs.items() if k in outputs)

    def body(self, inputs: Properties, known: Properties) -> Json:  # noqa: ARG002
        """What is sent to create it."""
        body = to_rest(self.spec.fields, inputs)
        if self._labels:
            body[self._labels] = self.labels(inputs)
        return body

    def labels(self, inputs: Properties) -> dict[str, Value]:
        """The labels that it is to have: the provider's, its own, the plugin's mark; none for most types."""
        own = inputs.get(self._labels) or {}
        if not self._labels or not isinstance(own, dict):  # none, or not known yet
            return {}
        return {**self.google.labels, **own, **ATTRIBUTION}

    def read(self, item: str) -> Json | None:
        """The live resource."""
        return self.google.get(self.spec.service, item)

    def outputs(self, live: Json, known: Properties) -> Properties:
        """The state of a live resource. `known`: inputs or state, with project, region, zone, location."""
        outputs = from_rest(self.spec.fields, live, known)
        if self._labels:
            labels = live.get(self._labels) or {}
            given, wanted = known.get(self._labels) or {}, self.labels(known)
            managed = {**wanted, **(known.get("pulumiLabels") or {})}
            own = {k: v for k, v in labels.items() if k in given or k not in wanted}
            outputs |= {
                "effectiveLabels": labels,
                "pulumiLabels": {k: v for k, v in labels.items() if k in managed},
            }
            outputs.pop(self._labels, None)
            if own:
                outputs[self._labels] = own
        return outputs

    def update(self, change: Change) -> None:
        """Brings the changed inputs to Google."""
        patched = [f for f in self.spec.fields if f.name in change.names and f.update is Update.PATCH]
        mask = {f.path[0] for f in patched}
        body = self._patch(patched, change.new)
        if mask:
            self._operate("PATCH", change.item, change.deadline, body, {"updateMask": ",".join(sorted(mask))})

    def delete(self, item: str, state: Properties, deadline: float) -> None:  # noqa: ARG002
        """Deletes; one that is gone already is fine."""
        try:
            self._operate("DELETE", item, deadline)
        except GoogleError as error:
            if error.status != 404:
                raise

    @property
    def _labels(self) -> str:
        """The property with its labels, "" for a type that has none."""
        return next((f.name for f in self.spec.fields if f.name in ("labels", "resourceLabels")), "")

    def _relabelled(self, change: Change) -> Json | None:
        """All labels as they are to be after a change of them, None after another."""
        if not change.names & {self._labels, "pulumiLabels"}:
            return None
        there = change.live.get(self._labels) or {}
        return {**{k: v for k, v in there.items() if k not in change.managed}, **self.labels(change.new)}

    def _patch(self, fields: list[Field], new: Properties) -> Json:
        """The changed fields; one that was taken out is sent empty."""
        filled = {
            f.name: new.get(f.name, f.default if f.default is not None else _EMPTY.get(f.type))
            for f in fields
        }
        return to_rest(tuple(fields), filled)

    def _operate(
        self, method: str, path: str, deadline: float, body: Json | None = None, query: Any = None
    ) -> Json:
        return self.google.operate(self.spec.service, method, path, deadline, body, query)


class Repository(Resource):
    """Answers are plain resources for PATCH, and the name is the id."""

    def outputs(self, live: Json, known: Properties) -> Properties:
        return super().outputs(live, known) | {"name": live["name"].rsplit("/", 1)[-1]}

    def update(self, change: Change) -> None:
        fields = [f for f in self.spec.fields if f.name in change.names and f.update is Update.PATCH]
        body, mask = self._patch(fields, change.new), {f.path[0] for f in fields}
        labels = self._relabelled(change)
        if labels is not None:
            body["labels"] = labels
            mask.add("labels")
        if mask:
            query = {"updateMask": ",".join(sorted(mask))}
            self.google.call(self.spec.service, "PATCH", change.item, body, query)


class IamMember(Resource):
    """One member of one role in a policy, changed by read, modify, write with its etag."""

    _TRIES = 10
    exclusive = False

    def holder(self, known: Mapping[str, Value]) -> str:
        """The path of what has the policy, which the id begins with."""
        raise NotImplementedError

    def policy(self, holder: str) -> Json:
        """The policy as it is."""
        raise NotImplementedError

    def set_policy(self, holder: str, policy: Json) -> None:
        """Puts another in its place."""
        self.google.call(self.spec.service, "POST", f"{holder}:setIamPolicy", {"policy": policy})

    def item(self, known: Mapping[str, Value]) -> str:
        return f"{self.holder(known)}/{known['role']}/{known['member']}"

    def create(self, inputs: Properties, known: Properties, deadline: float) -> None:  # noqa: ARG002
        self._modify(self.holder(known), known["role"], known["member"], present=True)

    def read(self, item: str) -> Json | None:
        holder, role, member = _split_member(item)
        try:
            policy = self.policy(holder)
        except GoogleError as error:
            if error.status == 404:
                return None
            raise
        granted = any(
            b["role"] == role and member in b.get("members", []) for b in policy.get("bindings", [])
        )
        return {"etag": policy.get("etag"), "role": role, "member": member} if granted else None

    def outputs(self, live: Json, known: Properties) -> Properties:
        return {**{f.name: known[f.name] for f in self.spec.fields if f.name in known}, **live}

    def update(self, change: Change) -> None:
        """Nothing in it can change."""

    def delete(self, item: str, state: Properties, deadline: float) -> None:  # noqa: ARG002
        holder, role, member = _split_member(item)
        try:
            self._modify(holder, role, member, present=False)
        except GoogleError as error:
            if error.status != 404:
                raise

    def _modify(self, holder: str, role: str, member: str, *, present: bool) -> None:
        for attempt in range(self._TRIES):
            policy = self.policy(holder)
            bindings = policy.setdefault("bindings", [])
            binding = next((b for b in bindings if b["role"] == role and "condition" not in b), None)
            if binding is None:
                binding = {"role": role, "members": []}
                bindings.append(binding)
            members = {m for m in binding.get("members", []) if m != member} | (
                {member} if present else set()
            )
            binding["members"] = sorted(members)
            policy["bindings"] = [b for b in bindings if b.get("members")]
            try:
                self.set_policy(holder, policy)
            except GoogleError as error:
                if error.status != 409 or attempt == self._TRIES - 1:
                    raise  # 409: somebody else changed the policy meanwhile
                self.google.cancelled.wait(0.05 * (attempt + 1))
            else:
                return


class RepositoryIamMember(IamMember):
    """One member of one role in a repository's policy."""

    def full(self, given: str, scope: Mapping[str, Value]) -> str:
        """Repository, role and member, with spaces between, as the official plugin takes them."""
        if " " not in given:
            return super().full(given, scope)
        repository, role, member = given.split(" ", 2)
        path = repository if repository.startswith("projects/") else None
        if path is None:
            parts = repository.split("/")
            place = {
                **scope,
                **dict(zip(("project", "location")[3 - len(parts) :], parts[:-1], strict=False)),
            }
            path = self.holder({**place, "repository": parts[-1]})
        return f"{path}/{role}/{member}"

    def holder(self, known: Mapping[str, Value]) -> str:
        name = str(known["repository"]).rsplit("/", 1)[-1]
        return f"projects/{known['project']}/locations/{known['location']}/repositories/{name}"

    def policy(self, holder: str) -> Json:
        query = {"options.requestedPolicyVersion": "3"}
        return self.google.call(self.spec.service, "GET", f"{holder}:getIamPolicy", query=query)


class ProjectIamMember(IamMember):
    """One member of one role in a project's policy."""

    def full(self, given: str, scope: Mapping[str, Value]) -> str:  # noqa: ARG002
        """Project, role and member, with spaces between or slashes."""
        return "/".join(_split_member(given.replace(" ", "/")))

    def holder(self, known: Mapping[str, Value]) -> str:
        return str(known["project"]).removeprefix("projects/")

    def policy(self, holder: str) -> Json:
        body = {"options": {"requestedPolicyVersion": 3}}
        return self.google.call(self.spec.service, "POST", f"projects/{holder}:getIamPolicy", body)

    def set_policy(self, holder: str, policy: Json) -> None:
        super().set_policy(f"projects/{holder}", policy)


def _split_member(item: str) -> tuple[str, str, str]:
    """What has the policy, the role (`roles/NAME`, or one of one's own below a project), the member."""
    found = re.fullmatch(r"(.+?)/((?:(?:projects|organizations)/[^/]+/)?roles/[^/]+)/(.+)", item)
    if found is None:
        raise ProviderError(f"{item!r} is no id of a member of a policy; it takes HOLDER/ROLE/MEMBER")
    return found[1], found[2], found[3]


class Service(Resource):
    """An API that a project may use: enabled where it is not, and left so."""

    exclusive = False

    def check(self, inputs: Properties) -> list[Failure]:
        """Nothing here turns a service off."""
        if inputs.get("disableOnDestroy"):
            return [Failure(("disableOnDestroy",), "not served by the stand-in")]
        return []

    def full(self, given: str, scope: Mapping[str, Value]) -> str:
        project, _, service = given.rpartition("/")
        if project.count("/"):
            raise ProviderError(f"{given!r} is no id of a {self.spec.token}; it takes {self.spec.item}")
        return f"{project or scope['project']}/{service}"

    def create(self, inputs: Properties, known: Properties, deadline: float) -> None:  # noqa: ARG002
        path = _service_path(self.item(known))
        if self._state(path) != "ENABLED":
            self._operate("POST", f"{path}:enable", deadline, {})

    def read(self, item: str) -> Json | None:
        return {} if self._state(_service_path(item)) == "ENABLED" else None

    def outputs(self, live: Json, known: Properties) -> Properties:  # noqa: ARG002
        return {f.name: known.get(f.name, f.default) for f in self.spec.fields}

    def update(self, change: Change) -> None:
        """Nothing of it is Google's."""

    def delete(self, item: str, state: Properties, deadline: float) -> None:
        """What others may use stays enabled."""

    def _state(self, path: str) -> Value:
        return (self.google.get(self.spec.service, path) or {}).get("state")


def _service_path(item: str) -> str:
    project, _, service = item.partition("/")
    return f"projects/{project}/services/{service}"


class Account(Resource):
    """A service account: plain answers, no operations, its e-mail address in the id."""

    def item(self, known: Mapping[str, Value]) -> str:
        domain = ".".join(reversed(str(known["project"]).split(":")))
        return super().item({"email": f"{known['accountId']}@{domain}.iam.gserviceaccount.com", **known})

    def create(self, inputs: Properties, known: Properties, deadline: float) -> None:  # noqa: ARG002
        account = {k: inputs[k] for k in ("displayName", "description") if inputs.get(k)}
        body = {"accountId": inputs["accountId"], "serviceAccount": account}
        path = self.spec.collection.format_map(known)
        self.google.call(self.spec.service, "POST", path, body)

    def finish(self, inputs: Properties, item: str, deadline: float) -> None:  # noqa: ARG002
        if inputs.get("disabled"):
            self.google.call(self.spec.service, "POST", f"{item}:disable", {})

    def discard(self, item: str, deadline: float) -> None:
        self.delete(item, {}, deadline)

    def outputs(self, live: Json, known: Properties) -> Properties:
        email = live["email"]
        own = {
            "accountId": email.split("@")[0],
            "member": f"serviceAccount:{email}",
            "project": live["projectId"],
        }
        return super().outputs(live, known) | own

    def update(self, change: Change) -> None:
        names = sorted(change.names & {"displayName", "description"})
        if names:
            account = {name: change.new.get(name, "") for name in names}
            body = {"serviceAccount": account, "updateMask": ",".join(names)}
            self.google.call(self.spec.service, "PATCH", change.item, body)
        if "disabled" in change.names:
            verb = "disable" if change.new.get("disabled") else "enable"
            self.google.call(self.spec.service, "POST", f"{change.item}:{verb}", {})

    def delete(self, item: str, state: Properties, deadline: float) -> None:  # noqa: ARG002
        try:
            self.google.call(self.spec.service, "DELETE", item)
        except GoogleError as error:
            if error.status != 404:
                raise


def _agrees(wanted: Value, actual: Value) -> bool:
    """Whether an answer says what an input said; a resource may be given by its link, path or name."""
    if isinstance(wanted, dict) and isinstance(actual, dict):
        return all(_agrees(v, actual.get(k)) for k, v in wanted.items() if k in actual)
    if isinstance(wanted, list) and isinstance(actual, list):
        return len(wanted) == len(actual) and all(map(_agrees, wanted, actual))
    if isinstance(wanted, str) and isinstance(actual, str):
        return wanted == actual or wanted.rsplit("/", 1)[-1] == actual.rsplit("/", 1)[-1]
    return bool(wanted == actual)


def declarations(fields: tuple[Field, ...], path: Path) -> list[Field]:
    """The declarations along a path, outermost first."""
    found: list[Field] = []
    place = fields
    for part in path:
        if isinstance(part, int):
            continue
        declared = next((f for f in place if f.name == part), None)
        if declared is None:
            break
        found.append(declared)
        place = declared.fields
    return found


def at(tree: Value, path: Path) -> Value:
    """The value at a path, None where there is none."""
    for part in path:
        if isinstance(part, int):
            tree = tree[part] if isinstance(tree, list) and part < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def shrinks(path: Path, before: Properties, after: Properties) -> bool:
    """Whether a size gets smaller, which Google can do with no disk."""
    old, new = at(before, path), at(after, path)
    return isinstance(old, int) and isinstance(new, int) and new < old


def deadline_in(seconds: float) -> float:
    """A point on the monotonic clock."""
    return time.monotonic() + seconds
