"""What the tables cannot say: how each type is created, read, updated and deleted through Google's REST.

`Resource` does what most types need; a subclass says where its type differs. The calls are those of the
official plugin.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from localcloud.plugins.gcp import tables
from localcloud.plugins.gcp.fields import Field, Json, Type, Update, from_rest, to_rest
from localcloud.plugins.gcp.rest import FailedOperationError, Google, GoogleError
from localcloud.plugins.gcp.tables import ResourceType
from localcloud.plugins.protocol import Failure, ProviderError
from localcloud.plugins.values import UNKNOWN, Properties, Value

ATTRIBUTION = {"goog-pulumi-provisioned": "true"}
STARTUP_SCRIPT = "startup-script"
_SCOPES = "https://www.googleapis.com/auth/"
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

    def create(self, inputs: Properties, known: Properties, deadline: float) -> str:
        """Creates; returns the id."""
        query = {parameter: known[name] for parameter, name in self.spec.create_query}
        self._operate(
            "POST", self.spec.collection.format_map(known), deadline, self.body(inputs, known), query
        )
        return self.item(known)

    def body(self, inputs: Properties, known: Properties) -> Json:  # noqa: ARG002
        """What is sent to create it."""
        body = to_rest(self.spec.fields, inputs)
        if self._labelled:
            body["labels"] = {**(inputs.get("labels") or {}), **ATTRIBUTION}
        return body

    def read(self, item: str) -> Json | None:
        """The live resource."""
        return self.google.get(self.spec.service, item)

    def outputs(self, live: Json, known: Properties) -> Properties:
        """The state of a live resource. `known`: inputs or state, with project, region, zone, location."""
        outputs = from_rest(self.spec.fields, live, known)
        if self._labelled:
            labels = live.get("labels") or {}
            own = {k: v for k, v in labels.items() if k not in ATTRIBUTION}
            outputs |= {"effectiveLabels": labels, "pulumiLabels": labels}
            outputs.pop("labels", None)
            if own:
                outputs["labels"] = own
        return outputs

    def update(self, change: Change) -> None:
        """Brings the changed inputs to Google."""
        patched = [f for f in self.spec.fields if f.name in change.names and f.update is Update.PATCH]
        mask = {f.path[0] for f in patched}
        body = self._patch(patched, change.new)
        if self._labelled and "labels" in change.names:
            body["labels"] = {**(change.new.get("labels") or {}), **ATTRIBUTION}
            mask.add("labels")
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
    def _labelled(self) -> bool:
        return any(f.name == "labels" for f in self.spec.fields)

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
        if "labels" in change.names:
            body["labels"] = {**(change.new.get("labels") or {}), **ATTRIBUTION}
            mask.add("labels")
        if mask:
            query = {"updateMask": ",".join(sorted(mask))}
            self.google.call(self.spec.service, "PATCH", change.item, body, query)


class RepositoryIamMember(Resource):
    """One member of one role in a repository's policy, changed by read, modify, write with its etag."""

    _TRIES = 10

    def item(self, known: Mapping[str, Value]) -> str:
        return f"{self._repository(known)}/{known['role']}/{known['member']}"

    def _repository(self, known: Mapping[str, Value]) -> str:
        name = str(known["repository"]).rsplit("/", 1)[-1]
        return f"projects/{known['project']}/locations/{known['location']}/repositories/{name}"

    def create(self, inputs: Properties, known: Properties, deadline: float) -> str:  # noqa: ARG002
        self._modify(self._repository(known), known["role"], known["member"], present=True)
        return self.item(known)

    def read(self, item: str) -> Json | None:
        repository, role, member = _split_member(item)
        try:
            policy = self._policy(repository)
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
        repository, role, member = _split_member(item)
        try:
            self._modify(repository, role, member, present=False)
        except GoogleError as error:
            if error.status != 404:
                raise

    def _policy(self, repository: str) -> Json:
        query = {"options.requestedPolicyVersion": "3"}
        return self.google.call(self.spec.service, "GET", f"{repository}:getIamPolicy", query=query)

    def _modify(self, repository: str, role: str, member: str, *, present: bool) -> None:
        for attempt in range(self._TRIES):
            policy = self._policy(repository)
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
                self.google.call(self.spec.service, "POST", f"{repository}:setIamPolicy", {"policy": policy})
            except GoogleError as error:
                if error.status != 409 or attempt == self._TRIES - 1:
                    raise  # 409: somebody else changed the policy meanwhile
                self.google.cancelled.wait(0.05 * (attempt + 1))
            else:
                return


def _split_member(item: str) -> tuple[str, str, str]:
    parts = item.split("/")
    repository = "/".join(parts[:6])
    role, _, member = "/".join(parts[6:]).rpartition("/")
    return repository, role, member


class Account(Resource):
    """A service account: plain answers, no operations, its e-mail address in the id."""

    def create(self, inputs: Properties, known: Properties, deadline: float) -> str:  # noqa: ARG002
        account = {k: inputs[k] for k in ("displayName", "description") if inputs.get(k)}
        body = {"accountId": inputs["accountId"], "serviceAccount": account}
        path = self.spec.collection.format_map(known)
        item = str(self.google.call(self.spec.service, "POST", path, body)["name"])
        if inputs.get("disabled"):
            self.google.call(self.spec.service, "POST", f"{item}:disable", {})
        return item

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


class ComputeResource(Resource):
    """Compute's PATCH has no mask: what is in the body changes. Labels have a call of their own."""

    def body(self, inputs: Properties, known: Properties) -> Json:
        body = super().body(inputs, known)
        for name in ("network", "subnetwork"):
            if name in body:
                body[name] = self._link(name, body[name], known)
        return body

    def update(self, change: Change) -> None:
        patched = [f for f in self.spec.fields if f.name in change.names and f.update is Update.PATCH]
        if patched:
            body = self._patch(patched, change.new)
            if "fingerprint" in change.live:
                body["fingerprint"] = change.live["fingerprint"]
            self._operate("PATCH", change.item, change.deadline, body)
        if self._labelled and "labels" in change.names:
            labels = {**(change.new.get("labels") or {}), **ATTRIBUTION}
            body = {"labels": labels, "labelFingerprint": change.live.get("labelFingerprint")}
            self._operate("POST", f"{change.item}/setLabels", change.deadline, body)

    def _link(self, kind: str, value: str, known: Mapping[str, Value]) -> str:
        """A network or subnetwork by URL, path or bare name, as a path."""
        if "/" in value:
            return value[value.index("projects/") :] if "projects/" in value else value
        if kind == "network":
            return f"projects/{known['project']}/global/networks/{value}"
        region = known.get("region") or str(known["zone"]).rsplit("-", 1)[0]
        return f"projects/{known['project']}/regions/{region}/subnetworks/{value}"


class Subnetwork(ComputeResource):
    """Access to Google's APIs has a call of its own."""

    def update(self, change: Change) -> None:
        if "privateIpGoogleAccess" in change.names:
            body = {"privateIpGoogleAccess": bool(change.new.get("privateIpGoogleAccess"))}
            path = f"{change.item}/setPrivateIpGoogleAccess"
            self._operate("POST", path, change.deadline, body)
            live = self.read(change.item) or change.live  # the fingerprint moved
            change = Change(change.item, change.old, change.new, change.names, live, change.deadline)
        super().update(change)


class Firewall(ComputeResource):
    """A rule allows or denies, never both; one for incoming traffic names its sources."""

    def check(self, inputs: Properties) -> list[Failure]:
        failures = []
        if bool(inputs.get("allows")) == bool(inputs.get("denies")):
            failures.append(Failure((), "exactly one of allows, denies must be specified"))
        sources = ("sourceRanges", "sourceTags", "sourceServiceAccounts")
        if inputs.get("direction", "INGRESS") == "INGRESS" and not any(inputs.get(s) for s in sources):
            failures.append(
                Failure((), f"one of {', '.join(sources)} must be specified for direction INGRESS")
            )
        return failures


class Instance(ComputeResource):
    """A VM: its image is looked up first; metadata, tags, labels and machine type have calls of their own."""

    def check(self, inputs: Properties) -> list[Failure]:
        metadata = inputs.get("metadata") or {}
        if inputs.get("metadataStartupScript") and metadata is not UNKNOWN and STARTUP_SCRIPT in metadata:
            reason = f"the script is in metadata[{STARTUP_SCRIPT!r}] too; give it once"
            return [Failure(("metadataStartupScript",), reason)]
        return []

    def body(self, inputs: Properties, known: Properties) -> Json:
        body = super().body(inputs, known)
        zone = f"zones/{known['zone']}"
        body |= {
            "machineType": f"{zone}/machineTypes/{inputs['machineType'].rsplit('/', 1)[-1]}",
            "disks": [self._boot_disk(inputs["bootDisk"], known)],
            "metadata": {"items": _metadata_items(inputs)},
        }
        for interface in body["networkInterfaces"]:
            for name in ("network", "subnetwork"):
                if name in interface:
                    interface[name] = self._link(name, interface[name], known)
            for access in interface.get("accessConfigs") or []:
                access.setdefault("type", "ONE_TO_ONE_NAT")
        if inputs.get("tags"):
            body["tags"] = {"items": inputs["tags"]}
        if inputs.get("serviceAccount"):
            account = inputs["serviceAccount"]
            scopes = [s if s.startswith("https://") else _SCOPES + s for s in account["scopes"]]
            body["serviceAccounts"] = [{"email": account.get("email", "default"), "scopes": scopes}]
        return body

    def _boot_disk(self, disk: Properties, known: Properties) -> Json:
        body = to_rest(self.spec.field("bootDisk").fields, disk) | {"boot": True}
        parameters = body.get("initializeParams", {})
        if "sourceImage" in parameters:
            parameters["sourceImage"] = self._image(parameters["sourceImage"], known["project"])
        if "diskType" in parameters and "/" not in parameters["diskType"]:
            parameters["diskType"] = f"zones/{known['zone']}/diskTypes/{parameters['diskType']}"
        return body

    def _image(self, name: str, project: str) -> str:
        """`PROJECT/NAME` or `NAME`, an image or a family, as a path; a path or URL stays what it is."""
        if name.count("/") > 1:
            return name
        owner, _, short = name.rpartition("/")
        images = f"projects/{owner or project}/global/images"
        for path in (f"{images}/{short}", f"{images}/family/{short}"):
            if self.google.get(self.spec.service, path) is not None:
                return path
        raise ProviderError(
            f"bootDisk.initializeParams.image: there is no image and no image family {name!r}"
        )

    def outputs(self, live: Json, known: Properties) -> Properties:
        outputs = super().outputs(live, known)
        items = {i["key"]: i.get("value", "") for i in (live.get("metadata") or {}).get("items") or []}
        if "metadataStartupScript" in known:
            outputs["metadataStartupScript"] = items.pop(STARTUP_SCRIPT, None)
        outputs |= {
            "machineType": live["machineType"].rsplit("/", 1)[-1],
            "metadata": items,
            "tags": (live.get("tags") or {}).get("items") or [],
            "bootDisk": self._boot_disk_outputs(live, known),
        }
        accounts = live.get("serviceAccounts") or []
        if accounts:
            outputs["serviceAccount"] = from_rest(self.spec.field("serviceAccount").fields, accounts[0], {})
        return outputs

    def _boot_disk_outputs(self, live: Json, known: Properties) -> Properties:
        disk: Json = next((d for d in live.get("disks") or [] if d.get("boot")), {})
        given = known.get("bootDisk") or {}
        fields = tuple(f for f in self.spec.field("bootDisk").fields if f.name != "initializeParams")
        outputs = from_rest(fields, disk, given)
        parameters = dict(given.get("initializeParams") or {})
        source = str(disk.get("source", ""))
        details = (
            self.google.get("compute", source[source.index("projects/") :]) if "projects/" in source else None
        )
        if details:
            parameters |= {
                "image": details.get("sourceImage", parameters.get("image")),
                "size": int(details.get("sizeGb", 0)),
                "type": str(details.get("type", "")).rsplit("/", 1)[-1],
            }
        return outputs | {"initializeParams": {k: v for k, v in parameters.items() if v not in (None, "", 0)}}

    def update(self, change: Change) -> None:
        super().update(change)
        item, new, names, deadline = change.item, change.new, change.names, change.deadline
        if "metadata" in names:
            fingerprint = change.live["metadata"].get("fingerprint")
            body = {"items": _metadata_items(new), "fingerprint": fingerprint}
            self._operate("POST", f"{item}/setMetadata", deadline, body)
        if "tags" in names:
            fingerprint = (change.live.get("tags") or {}).get("fingerprint")
            body = {"items": new.get("tags") or [], "fingerprint": fingerprint}
            self._operate("POST", f"{item}/setTags", deadline, body)
        if "deletionProtection" in names:
            query = {"deletionProtection": str(bool(new.get("deletionProtection"))).lower()}
            self._operate("POST", f"{item}/setDeletionProtection", deadline, query=query)
        if "machineType" in names:
            if not new.get("allowStoppingForUpdate"):
                raise ProviderError(
                    "changing machineType needs a stopped instance: set allowStoppingForUpdate"
                )
            kind = new["machineType"].rsplit("/", 1)[-1]
            zone = item.split("/")[3]
            self._operate("POST", f"{item}/stop", deadline)
            body = {"machineType": f"zones/{zone}/machineTypes/{kind}"}
            self._operate("POST", f"{item}/setMachineType", deadline, body)
            self._operate("POST", f"{item}/start", deadline)


def _metadata_items(inputs: Properties) -> list[Json]:
    metadata = dict(inputs.get("metadata") or {})
    if inputs.get("metadataStartupScript"):
        metadata[STARTUP_SCRIPT] = inputs["metadataStartupScript"]
    return [{"key": k, "value": v} for k, v in sorted(metadata.items())]


class Cluster(Resource):
    """A GKE cluster: wrapped in the request, updated by `desired…` fields, protected from deletion by the
    plugin.
    """

    _DESIRED: ClassVar[dict[str, str]] = {
        "loggingService": "desiredLoggingService",
        "monitoringService": "desiredMonitoringService",
        "nodeLocations": "desiredLocations",
        "releaseChannel": "desiredReleaseChannel",
        "workloadIdentityConfig": "desiredWorkloadIdentityConfig",
        "minMasterVersion": "desiredMasterVersion",
    }

    def create(self, inputs: Properties, known: Properties, deadline: float) -> str:
        path = self.spec.collection.format_map(known)
        body = {"parent": path.removesuffix("/clusters"), "cluster": self.body(inputs, known)}
        item = self.item(known)
        try:
            self._operate("POST", path, deadline, body)
        except FailedOperationError:
            # What Google could not finish stays in the state ERROR and in the way of the next try.
            with suppress(ProviderError):
                self._operate("DELETE", item, deadline)
            raise
        if inputs.get("removeDefaultNodePool"):
            self._operate("DELETE", f"{item}/nodePools/default-pool", deadline)
        return item

    def body(self, inputs: Properties, known: Properties) -> Json:
        body = super().body(inputs, known)
        if inputs.get("minMasterVersion"):
            body["initialClusterVersion"] = inputs["minMasterVersion"]
        policy = body.setdefault("ipAllocationPolicy", {})
        native = inputs.get("networkingMode", "VPC_NATIVE") == "VPC_NATIVE"
        policy["useIpAliases" if native else "useRoutes"] = True
        return body

    def outputs(self, live: Json, known: Properties) -> Properties:
        native = (live.get("ipAllocationPolicy") or {}).get("useIpAliases")
        labels = live.get("resourceLabels") or {}
        return super().outputs(live, known) | {
            "networkingMode": "VPC_NATIVE" if native else "ROUTES",
            "effectiveLabels": labels,
            "pulumiLabels": labels,
        }

    def update(self, change: Change) -> None:
        for name in sorted(change.names & set(self._DESIRED)):
            field = self.spec.field(name)
            value = change.new.get(name)
            if isinstance(value, dict):
                value = to_rest(field.fields, value)
            body: Json = {"update": {self._DESIRED[name]: value}}
            self._operate("PUT", change.item, change.deadline, body)
        if "resourceLabels" in change.names:
            labels = change.new.get("resourceLabels") or {}
            body = {"resourceLabels": labels, "labelFingerprint": change.live.get("labelFingerprint")}
            self._operate("POST", f"{change.item}:setResourceLabels", change.deadline, body)

    def delete(self, item: str, state: Properties, deadline: float) -> None:
        if state.get("deletionProtection", True):
            name = item.rsplit("/", 1)[-1]
            raise ProviderError(
                f"cannot destroy cluster {name} without setting deletionProtection to false and running "
                "`pulumi up` first"
            )
        super().delete(item, state, deadline)


CLASSES: dict[str, type[Resource]] = {
    tables.REPOSITORY.token: Repository,
    tables.REPOSITORY_IAM_MEMBER.token: RepositoryIamMember,
    tables.ACCOUNT.token: Account,
    tables.NETWORK.token: ComputeResource,
    tables.SUBNETWORK.token: Subnetwork,
    tables.FIREWALL.token: Firewall,
    tables.ADDRESS.token: ComputeResource,
    tables.INSTANCE.token: Instance,
    tables.CLUSTER.token: Cluster,
}


def deadline_in(seconds: float) -> float:
    """A point on the monotonic clock."""
    return time.monotonic() + seconds
