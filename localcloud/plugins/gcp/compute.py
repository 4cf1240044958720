"""Compute Engine's types: networks and what is in them, disks, VMs."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import replace

from localcloud.plugins.gcp.fields import Json, Update, from_rest, to_rest
from localcloud.plugins.gcp.resources import Change, Resource, at, shrinks
from localcloud.plugins.protocol import Failure, ProviderError
from localcloud.plugins.values import UNKNOWN, Path, Properties, Value

STARTUP_SCRIPT = "startup-script"
_SCOPES = "https://www.googleapis.com/auth/"
_STOPPING = {
    *("machineType", "minCpuPlatform", "serviceAccount", "shieldedInstanceConfig"),
}
"""What Google changes of a stopped VM only."""
_MOVES = ("network", "subnetwork", "networkIp", "stackType")
"""What makes a network interface another one; a stopped VM's can be changed."""


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
        labels = self._relabelled(change)
        if labels is not None:
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

    def image(self, name: str, project: str) -> str:
        """`PROJECT/NAME` or `NAME`, an image or a family, as a path; a path or URL stays what it is."""
        if name.count("/") > 1:
            return name
        owner, _, short = name.rpartition("/")
        images = f"projects/{owner or project}/global/images"
        for path in (f"{images}/{short}", f"{images}/family/{short}"):
            if self.google.get(self.spec.service, path) is not None:
                return path
        raise ProviderError(f"image: there is no image and no image family {name!r}")


class Subnetwork(ComputeResource):
    """Access to Google's APIs and a larger range have calls of their own."""

    def replaces(self, path: Path, before: Properties, after: Properties) -> bool:
        if path == ("ipCidrRange",):
            return not _widens(before.get("ipCidrRange"), after.get("ipCidrRange"))
        return super().replaces(path, before, after)

    def update(self, change: Change) -> None:
        if "ipCidrRange" in change.names:
            body = {"ipCidrRange": change.new["ipCidrRange"]}
            self._operate("POST", f"{change.item}/expandIpCidrRange", change.deadline, body)
        if "privateIpGoogleAccess" in change.names:
            body = {"privateIpGoogleAccess": bool(change.new.get("privateIpGoogleAccess"))}
            path = f"{change.item}/setPrivateIpGoogleAccess"
            self._operate("POST", path, change.deadline, body)
        live = self.read(change.item) or change.live  # the fingerprint moved
        super().update(replace(change, live=live))


def _widens(old: Value, new: Value) -> bool:
    """Whether a range is larger and contains the old one, which is all that Google can change about it."""
    try:
        before, after = ipaddress.ip_network(old), ipaddress.ip_network(new)
        return bool(before.subnet_of(after))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # not known, no range, or of another version of IP
        return False


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


class RouterNat(Resource):
    """A gateway in its router, which is read, changed and written as a whole."""

    def item(self, known: Mapping[str, Value]) -> str:
        return super().item({**known, "router": str(known["router"]).rsplit("/", 1)[-1]})

    def full(self, given: str, scope: Mapping[str, Value]) -> str:
        """Google's words may stand between the names."""
        found = re.fullmatch(r"projects/([^/]+)/regions/([^/]+)/routers/([^/]+)/([^/]+)", given)
        return super().full("/".join(found.groups()) if found else given, scope)

    def create(self, inputs: Properties, known: Properties, deadline: float) -> None:
        self._write(self.item(known), self.body(inputs, known), deadline)

    def read(self, item: str) -> Json | None:
        name = item.rsplit("/", 1)[-1]
        return next((nat for nat in self._router(item).get("nats") or [] if nat["name"] == name), None)

    def outputs(self, live: Json, known: Properties) -> Properties:
        return super().outputs(live, known) | {"router": known["router"]}

    def settle(self, item: str, deadline: float) -> None:
        for operation in self.google.running(self.spec.service, _router_path(item)):
            self.google.follow(self.spec.service, operation, _router_path(item), deadline)

    def discard(self, item: str, deadline: float) -> None:
        self.delete(item, {}, deadline)

    def update(self, change: Change) -> None:
        fields = [f for f in self.spec.fields if f.name in change.names and f.update is Update.PATCH]
        if fields:
            self._write(change.item, {**change.live, **self._patch(fields, change.new)}, change.deadline)

    def delete(self, item: str, state: Properties, deadline: float) -> None:  # noqa: ARG002
        if self.read(item) is not None:
            self._write(item, None, deadline)

    def _router(self, item: str) -> Json:
        return self.google.get(self.spec.service, _router_path(item)) or {}

    def _write(self, item: str, nat: Json | None, deadline: float) -> None:
        """Puts the gateway into its router, beside the others, or takes it out."""
        name = item.rsplit("/", 1)[-1]
        others = [there for there in self._router(item).get("nats") or [] if there["name"] != name]
        body = {"nats": [*others, *([nat] if nat else [])]}
        self._operate("PATCH", _router_path(item), deadline, body)


def _router_path(item: str) -> str:
    project, region, router, _ = item.split("/")
    return f"projects/{project}/regions/{region}/routers/{router}"


class Disk(ComputeResource):
    """A disk: its image is looked up first; it grows in place, attached or not, and never shrinks."""

    def replaces(self, path: Path, before: Properties, after: Properties) -> bool:
        return (
            shrinks(("size",), before, after) if path == ("size",) else super().replaces(path, before, after)
        )

    def body(self, inputs: Properties, known: Properties) -> Json:
        body = super().body(inputs, known)
        kind = str(inputs.get("type") or "pd-standard").rsplit("/", 1)[-1]
        body["type"] = f"projects/{known['project']}/zones/{known['zone']}/diskTypes/{kind}"
        if inputs.get("image"):
            body["sourceImage"] = self.image(inputs["image"], known["project"])
        return body

    def outputs(self, live: Json, known: Properties) -> Properties:
        outputs = super().outputs(live, known)
        outputs["type"] = str(live.get("type", "")).rsplit("/", 1)[-1]
        image = live.get("sourceImage") or known.get("image")
        return outputs | ({"image": image} if image else {})

    def update(self, change: Change) -> None:
        if "size" in change.names:
            body = {"sizeGb": str(change.new["size"])}
            self._operate("POST", f"{change.item}/resize", change.deadline, body)
        super().update(change)


class Instance(ComputeResource):
    """A VM: its image is looked up first; nearly everything that can change has a call of its own, some of
    them of a stopped VM only.
    """

    def check(self, inputs: Properties) -> list[Failure]:
        metadata = inputs.get("metadata") or {}
        if inputs.get("metadataStartupScript") and metadata is not UNKNOWN and STARTUP_SCRIPT in metadata:
            reason = f"the script is in metadata[{STARTUP_SCRIPT!r}] too; give it once"
            return [Failure(("metadataStartupScript",), reason)]
        return []

    def replaces(self, path: Path, before: Properties, after: Properties) -> bool:
        if path == ("metadataStartupScript",):
            # Only the switch to or from the key in the metadata, with the same script, leaves the VM.
            return bool(_script(before) != _script(after))
        if path == ("bootDisk", "initializeParams", "size"):
            return shrinks(path, before, after)
        if len(path) == 3 and path[2] == "networkIp":
            interfaces = (at(before, path[:2]) or {}, at(after, path[:2]) or {})
            return len({(i.get("network"), i.get("subnetwork")) for i in interfaces}) == 1  # else it moves
        return super().replaces(path, before, after)

    def plan(self, change: Change) -> None:
        stopping = self._stopping(change)
        if stopping and not change.new.get("allowStoppingForUpdate"):
            raise ProviderError(
                f"changing {', '.join(stopping)} needs a stopped instance: set allowStoppingForUpdate"
            )

    def _stopping(self, change: Change) -> list[str]:
        moved = ["networkInterfaces"] if self._moved(change) else []
        return sorted(change.names & _STOPPING) + moved

    @staticmethod
    def _moved(change: Change) -> list[int]:
        """The interfaces that go to another network, subnetwork or address."""
        pairs = zip(
            change.old.get("networkInterfaces") or [], change.new.get("networkInterfaces") or [], strict=False
        )
        return [i for i, (old, new) in enumerate(pairs) if any(old.get(m) != new.get(m) for m in _MOVES)]

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
            scopes = [_scope(s) for s in account["scopes"]]
            body["serviceAccounts"] = [{"email": account.get("email", "default"), "scopes": scopes}]
        return body

    def _boot_disk(self, disk: Properties, known: Properties) -> Json:
        body = to_rest(self.spec.field("bootDisk").fields, disk) | {"boot": True}
        parameters = body.get("initializeParams", {})
        if "sourceImage" in parameters:
            parameters["sourceImage"] = self.image(parameters["sourceImage"], known["project"])
        if "diskType" in parameters and "/" not in parameters["diskType"]:
            parameters["diskType"] = f"zones/{known['zone']}/diskTypes/{parameters['diskType']}"
        return body

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
        self.plan(change)
        super().update(change)
        for name, call in (
            ("metadata", self._set_metadata),
            ("metadataStartupScript", self._set_metadata),
            ("tags", self._set_tags),
            ("deletionProtection", self._set_deletion_protection),
            ("scheduling", self._set_scheduling),
            ("bootDisk", self._change_boot_disk),
            ("networkInterfaces", self._change_aliases),
            ("networkInterfaces", self._change_addresses),
        ):
            if name in change.names:
                call(change)
        if change.names & {"description", "canIpForward"}:
            self._put(change, {name: change.new.get(name) for name in ("description", "canIpForward")})
        if self._stopping(change):
            self._change_stopped(change)

    def _post(self, change: Change, verb: str, body: Json | None = None, **query: str) -> None:
        self._operate("POST", f"{change.item}/{verb}", change.deadline, body, query)

    def _put(self, change: Change, fields: Json) -> None:
        """An update as a whole: what a call of its own cannot change."""
        live = self.read(change.item) or change.live
        body = {**live, **{k: v for k, v in fields.items() if v is not None}}
        self._operate("PUT", change.item, change.deadline, body)

    def _set_metadata(self, change: Change) -> None:
        live = self.read(change.item) or change.live
        items = _metadata_items(change.new)
        self._post(
            change, "setMetadata", {"items": items, "fingerprint": live["metadata"].get("fingerprint")}
        )

    def _set_tags(self, change: Change) -> None:
        fingerprint = (change.live.get("tags") or {}).get("fingerprint")
        self._post(change, "setTags", {"items": change.new.get("tags") or [], "fingerprint": fingerprint})

    def _set_deletion_protection(self, change: Change) -> None:
        wanted = str(bool(change.new.get("deletionProtection"))).lower()
        self._post(change, "setDeletionProtection", deletionProtection=wanted)

    def _set_scheduling(self, change: Change) -> None:
        fields = self.spec.field("scheduling").fields
        self._post(change, "setScheduling", to_rest(fields, change.new.get("scheduling") or {}))

    def _change_boot_disk(self, change: Change) -> None:
        disk: Json = next((d for d in change.live.get("disks") or [] if d.get("boot")), {})
        new, source = change.new["bootDisk"], str(disk.get("source", ""))
        if new.get("autoDelete", True) != disk.get("autoDelete", False):
            auto = str(new.get("autoDelete", True)).lower()
            self._post(change, "setDiskAutoDelete", autoDelete=auto, deviceName=str(disk["deviceName"]))
        path = source[source.index("projects/") :]
        details, wanted = self.google.get("compute", path) or {}, new.get("initializeParams") or {}
        if wanted.get("size") and str(wanted["size"]) != str(details.get("sizeGb")):
            self._operate("POST", f"{path}/resize", change.deadline, {"sizeGb": str(wanted["size"])})
        labels = wanted.get("labels") or {}
        if labels != ((change.old["bootDisk"].get("initializeParams") or {}).get("labels") or {}):
            body = {"labels": labels, "labelFingerprint": details.get("labelFingerprint")}
            self._operate("POST", f"{path}/setLabels", change.deadline, body)

    def _change_aliases(self, change: Change) -> None:
        """Gives the interfaces their alias ranges, where those changed."""
        for old, new, live in zip(
            change.old["networkInterfaces"],
            change.new["networkInterfaces"],
            change.live["networkInterfaces"],
            strict=False,
        ):
            wanted = new.get("aliasIpRanges") or []
            if (old.get("aliasIpRanges") or []) != wanted:
                body = {"aliasIpRanges": wanted, "fingerprint": live.get("fingerprint")}
                query = {"networkInterface": str(live.get("name", "nic0"))}
                path = f"{change.item}/updateNetworkInterface"
                self._operate("PATCH", path, change.deadline, body, query)

    def _change_addresses(self, change: Change) -> None:
        """Takes the external addresses that changed from their interfaces, and gives the new ones."""
        fields = next(
            f for f in self.spec.field("networkInterfaces").fields if f.name == "accessConfigs"
        ).fields
        for old, new, live in zip(
            change.old["networkInterfaces"],
            change.new["networkInterfaces"],
            change.live["networkInterfaces"],
            strict=False,
        ):
            wanted = new.get("accessConfigs") or []
            if (old.get("accessConfigs") or []) == wanted:
                continue
            interface = str(live.get("name", "nic0"))
            for there in live.get("accessConfigs") or []:
                name = str(there.get("name", "external-nat"))
                self._post(change, "deleteAccessConfig", accessConfig=name, networkInterface=interface)
            for config in wanted:
                body = {"type": "ONE_TO_ONE_NAT", "name": "external-nat", **to_rest(fields, config)}
                self._post(change, "addAccessConfig", body, networkInterface=interface)

    def _change_stopped(self, change: Change) -> None:
        """Stops the VM, changes what only a stopped one lets change, and starts it if it ran."""
        new, names = change.new, change.names
        runs = change.live.get("status") != "TERMINATED"
        if runs:
            self._post(change, "stop")
        if "machineType" in names:
            kind = new["machineType"].rsplit("/", 1)[-1]
            zone = change.item.split("/")[3]
            self._post(change, "setMachineType", {"machineType": f"zones/{zone}/machineTypes/{kind}"})
        if "minCpuPlatform" in names:
            self._post(change, "setMinCpuPlatform", {"minCpuPlatform": new.get("minCpuPlatform")})
        if "serviceAccount" in names:
            account = new.get("serviceAccount") or {}
            scopes = [_scope(s) for s in account.get("scopes") or []]
            self._post(change, "setServiceAccount", {"email": account.get("email"), "scopes": scopes})
        if "shieldedInstanceConfig" in names:
            fields = self.spec.field("shieldedInstanceConfig").fields
            body = to_rest(fields, new.get("shieldedInstanceConfig") or {})
            self._operate("PATCH", f"{change.item}/updateShieldedInstanceConfig", change.deadline, body)
        for i in self._moved(change):
            self._move(change, i)
        if runs:
            self._post(change, "start")

    def _move(self, change: Change, i: int) -> None:
        new, live = change.new["networkInterfaces"][i], change.live["networkInterfaces"][i]
        zone = {"project": change.item.split("/")[1], "zone": change.item.split("/")[3]}
        body = {
            name: self._link(name, new[name], zone) for name in ("network", "subnetwork") if new.get(name)
        }
        body |= {
            rest: new[name]
            for name, rest in (("networkIp", "networkIP"), ("stackType",) * 2)
            if new.get(name)
        }
        body["fingerprint"] = live.get("fingerprint")
        path, query = f"{change.item}/updateNetworkInterface", {"networkInterface": live.get("name", "nic0")}
        self._operate("PATCH", path, change.deadline, body, query)


def _scope(name: str) -> str:
    return name if name.startswith("https://") else _SCOPES + name


def _script(inputs: Properties) -> Value:
    """The startup script, whichever of its two places it is in."""
    metadata = inputs.get("metadata")
    apart = metadata.get(STARTUP_SCRIPT) if isinstance(metadata, dict) else None
    return inputs.get("metadataStartupScript") or apart


def _metadata_items(inputs: Properties) -> list[Json]:
    metadata = dict(inputs.get("metadata") or {})
    if inputs.get("metadataStartupScript"):
        metadata[STARTUP_SCRIPT] = inputs["metadataStartupScript"]
    return [{"key": k, "value": v} for k, v in sorted(metadata.items())]
