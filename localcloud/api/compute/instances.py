"""Instances: the requests. What they set going is in `machines.py`."""

from __future__ import annotations

import re

from localcloud.api.compute import ranges
from localcloud.api.compute.catalog import check_zone, machine_type, region_of, zones
from localcloud.api.compute.common import (
    aggregated,
    begin,
    check_labels,
    check_new,
    key_of,
    link,
    listed,
    new_body,
    require,
    resolve,
    set_labels,
)
from localcloud.api.compute.disks import attach_boot_disk
from localcloud.api.compute.machines import INSTANCE, instance_spec
from localcloud.api.compute.networks import (
    ADDRESS,
    find_network,
    find_subnetwork,
    subnetwork_of,
    taken_addresses,
)
from localcloud.api.errors import ApiError, invalid_value, not_found, not_ready
from localcloud.api.iam import default_service_account, find_account
from localcloud.api.service import TABLE, Call, fingerprint
from localcloud.store import Json, Record, instance_key

_METADATA_KEY = re.compile(r"[-_a-zA-Z0-9]{1,128}")
_METADATA_VALUE_CHARACTERS = 262_144
_METADATA_TOTAL_CHARACTERS = 524_288
_HOSTNAME = re.compile(r"(?=.{1,253}$)[a-z]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)+")
_TAG = re.compile(r"[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?")


def _key(call: Call) -> str:
    # Google's documents call it `resource` in one place.
    name = call.path.get("instance") or call.path["resource"]
    return instance_key(call.project, check_zone(call), name)


def _find(call: Call) -> Record:
    """
    Raises:
        ApiError: 404, no such instance; 400, it is being deleted.
    """
    record = require(call.store, _key(call))
    if record.private.get("deleting"):
        raise not_ready(record.key)
    return record


@TABLE.serves("compute.instances.insert")
def _insert(call: Call) -> Json:
    if "sourceInstanceTemplate" in call.query or "sourceMachineImage" in call.query:
        raise ApiError(501, "localcloud creates instances from their description only")
    zone = check_zone(call)
    key = check_new(call, f"projects/{call.project}/zones/{zone}/instances")
    for other in call.store.list(INSTANCE, f"projects/{call.project}/"):
        if other.name == call.body["name"]:
            raise ApiError(
                409, f"The resource '{other.key}' already exists: localcloud runs one instance of a name"
            )
    body = {"description": "", **call.body, **new_body(key, "compute#instance")}
    record = Record(key, INSTANCE, body)
    _fill_machine(call, record)
    _fill_metadata(body)
    _fill_tags(body)
    check_labels(body.get("labels", {}), "resource.labels")
    body["labelFingerprint"] = fingerprint(body.get("labels", {}))
    _fill_service_accounts(call, body)
    _fill_network(call, record)
    attach_boot_disk(call, record)
    body["fingerprint"] = fingerprint([body["id"], body["name"]])
    body["status"] = "PROVISIONING"
    call.store.put(record)
    return begin(call, "insert", record, "compute.instances.create")


def _machine_type(call: Call) -> str:
    """The link to the machine type that the body names.

    Raises:
        ApiError: 400, there is none of that name in the zone.
    """
    zone, given = check_zone(call), call.body.get("machineType", "")
    within = f"projects/{call.project}/zones/{zone}/machineTypes"
    key = resolve(call, given, within)
    if not given or not key.startswith(f"{within}/"):
        raise invalid_value("resource.machineType", given, "The URL is malformed or of another zone.")
    name = key.rpartition("/")[2]
    if machine_type(call.project, zone, name) is None:
        raise invalid_value(
            "resource.machineType",
            link(key),
            f"Machine type with name '{name}' does not exist in zone '{zone}'.",
        )
    return link(key)


def _fill_machine(call: Call, record: Record) -> None:
    body = record.body
    body["machineType"] = _machine_type(call)
    if "hostname" in body and not _HOSTNAME.fullmatch(body["hostname"]):
        raise invalid_value(
            "resource.hostname", body["hostname"], "Must be a fully qualified, RFC1035 compliant domain name."
        )
    defaults: Json = {
        "canIpForward": False,
        "deletionProtection": False,
        "startRestricted": False,
        "cpuPlatform": "Unknown CPU Platform",
        "shieldedInstanceConfig": {
            "enableSecureBoot": False,
            "enableVtpm": True,
            "enableIntegrityMonitoring": True,
        },
        "shieldedInstanceIntegrityPolicy": {"updateAutoLearnPolicy": True},
        "confidentialInstanceConfig": {"enableConfidentialCompute": False},
    }
    body |= {field: value for field, value in defaults.items() if field not in body}
    preemptible = body.get("scheduling", {}).get("preemptible", False)
    body["scheduling"] = {
        "onHostMaintenance": "TERMINATE" if preemptible else "MIGRATE",
        "automaticRestart": not preemptible,
        "preemptible": False,
        "provisioningModel": "STANDARD",
    } | body.get("scheduling", {})


def _fill_metadata(body: Json) -> None:
    """Check the metadata and give it its fingerprint."""
    metadata = body.setdefault("metadata", {})
    items = metadata.get("items", [])
    seen: set[str] = set()
    total = 0
    for index, item in enumerate(items):
        field = f"resource.metadata.items[{index}]"
        key, value = item.get("key", ""), item.get("value", "")
        if not _METADATA_KEY.fullmatch(key):
            raise invalid_value(f"{field}.key", key, "Must be a match of regex '[a-zA-Z0-9-_]{1,128}'")
        if key in seen:
            raise invalid_value(f"{field}.key", key, f"Metadata has duplicate key: {key}")
        if len(value) > _METADATA_VALUE_CHARACTERS:
            raise ApiError(
                413,
                f"Value for field '{field}.value' is too large: maximum size {_METADATA_VALUE_CHARACTERS} "
                f"character(s); actual size {len(value)}.",
                reason="fieldSizeTooLarge",
            )
        seen.add(key)
        total += len(key) + len(value)
    if total > _METADATA_TOTAL_CHARACTERS:
        raise invalid_value("resource.metadata", "", "Metadata is too large: at most 512 KB in all.")
    body["metadata"] = {"kind": "compute#metadata", "fingerprint": fingerprint(items)}
    if items:
        body["metadata"]["items"] = items


def _fill_tags(body: Json) -> None:
    items = body.get("tags", {}).get("items", [])
    for index, tag in enumerate(items):
        if not _TAG.fullmatch(tag):
            raise invalid_value(
                f"resource.tags.items[{index}]", tag, f"Must be a match of regex '{_TAG.pattern}'"
            )
    body["tags"] = {"fingerprint": fingerprint(items)} | ({"items": items} if items else {})


def _fill_service_accounts(call: Call, body: Json) -> None:
    accounts = body.get("serviceAccounts", [])
    if len(accounts) > 1:
        raise invalid_value("resource.serviceAccounts", "", "At most one service account may be given.")
    for account in accounts:
        email = account.get("email", "default")
        account["email"] = default_service_account() if email == "default" else email
        if find_account(call.store, call.project, account["email"]) is None:
            raise ApiError(404, f"The resource '{account['email']}' of type 'serviceAccount' was not found.")


def _fill_network(call: Call, record: Record) -> None:
    """Check the interface, give it the instance's loopback address, and mark a reserved one as used."""
    interfaces = record.body.get("networkInterfaces", [])
    if len(interfaces) != 1:
        raise invalid_value(
            "resource.networkInterfaces",
            "",
            "localcloud serves instances with exactly one network interface.",
        )
    interface, region = interfaces[0], region_of(check_zone(call))
    _fill_subnetwork(call, interface, region)
    access = interface.get("accessConfigs", [])
    if len(access) > 1:
        raise invalid_value("resource.networkInterfaces[0].accessConfigs", "", "At most one may be given.")
    wanted = [text for text in (interface.get("networkIP"), *(item.get("natIP") for item in access)) if text]
    reserved = [_reserved(call, text, region) for text in wanted]
    if len({address.body["address"] for address in reserved}) > 1:
        raise invalid_value(
            "resource.networkInterfaces[0].networkIP", wanted[0], "localcloud's instances have one address."
        )
    for address in reserved:
        address.body |= {"status": "IN_USE", "users": [link(record.key)]}
        call.store.put(address)
    own = reserved[0].body["address"] if reserved else ""
    own = own or call.services.backends.allocate_address(taken_addresses(call.store))
    record.private["ip"] = own
    interface |= {
        "kind": "compute#networkInterface",
        "name": "nic0",
        "networkIP": own,
        "stackType": "IPV4_ONLY",
    }
    for item in access:
        defaults = {"type": "ONE_TO_ONE_NAT", "name": "External NAT", "networkTier": "PREMIUM"}
        item.update(defaults | item | {"kind": "compute#accessConfig", "natIP": own})
    ranges.give(interface, ranges.aliases(interface))


def _fill_subnetwork(call: Call, interface: Json, region: str) -> None:
    if "subnetwork" in interface:
        subnetwork = find_subnetwork(call, interface["subnetwork"], region)
        network = require(call.store, key_of(subnetwork.body["network"]))
        if "network" in interface and find_network(call, interface["network"]).key != network.key:
            raise invalid_value(
                "resource.networkInterfaces[0].subnetwork",
                interface["subnetwork"],
                f"The subnetwork does not belong to the network '{interface['network']}'.",
            )
    else:
        network = find_network(call, interface.get("network", "global/networks/default"))
        found = subnetwork_of(call.store, network, region)
        if found is None:
            raise invalid_value(
                "resource.networkInterfaces[0]",
                network.name,
                f"Subnetwork should be specified: the network has none in the region '{region}'.",
            )
        subnetwork = found
    interface["network"] = network.body["selfLink"]
    interface["subnetwork"] = subnetwork.body["selfLink"]
    wanted = ranges.aliases(interface)
    field = "resource.networkInterfaces[0].aliasIpRanges"
    interface["aliasIpRanges"] = ranges.allocate_aliases(call.store, subnetwork, wanted, field)


def _reserved(call: Call, address: str, region: str) -> Record:
    """The reservation of an address.

    Raises:
        ApiError: 400, nobody reserved it, or another resource uses it.
    """
    for record in call.store.list(ADDRESS, f"projects/{call.project}/regions/{region}/"):
        if record.body["address"] == address or resolve(call, address, "").endswith(record.key):
            if record.body["status"] == "IN_USE":
                raise ApiError(
                    400,
                    f"Specified IP address is in-use: {record.body['address']}.",
                    reason="ipInUseByAnotherResource",
                )
            return record
    raise invalid_value(
        "resource.networkInterfaces[0].accessConfigs[0].natIP",
        address,
        f"The specified external IP address '{address}' was not found in region '{region}'.",
    )


@TABLE.serves("compute.instances.get")
def _get(call: Call) -> Json:
    return require(call.store, _key(call)).body


@TABLE.serves("compute.instances.list")
def _list(call: Call) -> Json:
    path = f"projects/{call.project}/zones/{check_zone(call)}/instances"
    items = [record.body for record in call.store.list(INSTANCE, f"{path}/")]
    return listed(call, items, "compute#instanceList", path)


@TABLE.serves("compute.instances.aggregatedList")
def _aggregated(call: Call) -> Json:
    items = [record.body for record in call.store.list(INSTANCE, f"projects/{call.project}/")]
    scopes = [f"zones/{zone}" for zone in zones()]
    return aggregated(call, items, "compute#instanceAggregatedList", "instances", scopes)


@TABLE.serves("compute.instances.delete")
def _delete(call: Call) -> Json:
    record = _find(call)
    if record.body["deletionProtection"]:
        raise ApiError(
            400,
            f"Invalid resource usage: 'Resource cannot be deleted if it's protected against deletion. "
            f"Resource '{record.key}' has deletionProtection set to true.'.",
            reason="invalidResourceUsage",
        )
    record.private["deleting"] = True
    record.body["status"] = "STOPPING"
    call.store.put(record)
    return begin(call, "delete", record, "compute.instances.delete")


@TABLE.serves("compute.instances.start")
def _start(call: Call) -> Json:
    record = _find(call)
    if record.body["status"] == "TERMINATED":
        record.body["status"] = "PROVISIONING"
        call.store.put(record)
    return begin(call, "start", record, "compute.instances.start")


@TABLE.serves("compute.instances.stop")
def _stop(call: Call) -> Json:
    record = _find(call)
    if record.body["status"] != "TERMINATED":
        record.body["status"] = "STOPPING"
        call.store.put(record)
    return begin(call, "stop", record, "compute.instances.stop")


@TABLE.serves("compute.instances.reset")
def _reset(call: Call) -> Json:
    record = _find(call)
    if record.body["status"] != "RUNNING":
        raise not_ready(record.key)
    return begin(call, "reset", record, "compute.instances.reset")


def _stopped(call: Call, what: str) -> Record:
    """
    Raises:
        ApiError: 400, the instance must be stopped for a change of this.
    """
    record = _find(call)
    if record.body["status"] != "TERMINATED":
        raise ApiError(
            400,
            f"Invalid resource usage: 'The {what} of {record.key} can be changed while it is stopped "
            f"(TERMINATED) only; it is {record.body['status']}.'.",
            reason="invalidResourceUsage",
        )
    return record


@TABLE.serves("compute.instances.setMachineType")
def _set_machine_type(call: Call) -> Json:
    record = _stopped(call, "machine type")
    record.body["machineType"] = _machine_type(call)
    call.store.put(record)
    return begin(call, "setMachineType", record)


@TABLE.serves("compute.instances.setServiceAccount")
def _set_service_account(call: Call) -> Json:
    record = _stopped(call, "service account")
    account = {field: call.body[field] for field in ("email", "scopes") if field in call.body}
    record.body["serviceAccounts"] = [account] if account.get("email") else []
    _fill_service_accounts(call, record.body)
    if not record.body["serviceAccounts"]:
        del record.body["serviceAccounts"]
    call.store.put(record)
    return begin(call, "setServiceAccount", record)


@TABLE.serves("compute.instances.setMinCpuPlatform")
def _set_min_cpu_platform(call: Call) -> Json:
    record = _stopped(call, "minimum CPU platform")
    record.body["minCpuPlatform"] = call.body.get("minCpuPlatform", "")
    call.store.put(record)
    return begin(call, "setMinCpuPlatform", record)


@TABLE.serves("compute.instances.updateShieldedInstanceConfig")
def _update_shielded(call: Call) -> Json:
    record = _stopped(call, "shielded VM configuration")
    record.body["shieldedInstanceConfig"] |= call.body
    call.store.put(record)
    return begin(call, "updateShieldedInstanceConfig", record)


@TABLE.serves("compute.instances.setScheduling")
def _set_scheduling(call: Call) -> Json:
    record = _find(call)
    record.body["scheduling"] |= call.body
    call.store.put(record)
    return begin(call, "setScheduling", record)


@TABLE.serves("compute.instances.setDiskAutoDelete")
def _set_disk_auto_delete(call: Call) -> Json:
    record = _find(call)
    found = [disk for disk in record.body["disks"] if disk["deviceName"] == call.query.get("deviceName")]
    if not found:
        raise invalid_value("deviceName", call.query.get("deviceName", ""), "No such disk is attached.")
    found[0]["autoDelete"] = call.query.get("autoDelete", False)
    call.store.put(record)
    return begin(call, "setDiskAutoDelete", record)


@TABLE.serves("compute.instances.setMetadata")
def _set_metadata(call: Call) -> Json:
    record = _find(call)
    _check_fingerprint(call, record.body["metadata"], "metadata")
    record.body["metadata"] = {"items": call.body.get("items", [])}
    _fill_metadata(record.body)
    call.store.put(record)
    return begin(call, "setMetadata", record)


@TABLE.serves("compute.instances.setTags")
def _set_tags(call: Call) -> Json:
    record = _find(call)
    _check_fingerprint(call, record.body["tags"], "tags")
    record.body["tags"] = {"items": call.body.get("items", [])}
    _fill_tags(record.body)
    call.store.put(record)
    return begin(call, "setTags", record)


def _check_fingerprint(call: Call, current: Json, what: str) -> None:
    if call.body.get("fingerprint") != current["fingerprint"]:
        raise ApiError(412, f"Supplied fingerprint does not match current {what} fingerprint.")


@TABLE.serves("compute.instances.updateNetworkInterface")
def _update_network_interface(call: Call) -> Json:
    """Alias ranges can be changed; what else the body says must be so already."""
    record = _find(call)
    name, interface = call.query.get("networkInterface", ""), record.body["networkInterfaces"][0]
    if name != interface["name"]:
        raise invalid_value("networkInterface", name, "The instance has no network interface of this name.")
    if ranges.CHANGING in record.private:
        raise not_ready(record.key)
    _check_fingerprint(call, interface, "network interface")
    for field, value in call.body.items():
        if field not in ("aliasIpRanges", "fingerprint") and not _is_same(call, interface, field, value):
            raise ApiError(501, f"localcloud changes alias ranges of a network interface, and no {field}")
    wanted = ranges.allocate_aliases(
        call.store,
        require(call.store, key_of(interface["subnetwork"])),
        call.body.get("aliasIpRanges", ranges.aliases(interface)),
        "resource.aliasIpRanges",
        but=record.key,
    )
    record.private[ranges.CHANGING] = wanted
    call.store.put(record)
    return begin(call, "updateNetworkInterface", record, "compute.instances.changeAliasRanges")


def _is_same(call: Call, interface: Json, field: str, value: object) -> bool:
    """Whether a field of an interface is what a body says; networks may be named in several ways."""
    if field == "network":
        return bool(find_network(call, str(value)).body["selfLink"] == interface[field])
    if field == "subnetwork":
        region = region_of(check_zone(call))
        return bool(find_subnetwork(call, str(value), region).body["selfLink"] == interface[field])
    return bool(interface.get(field) == value)


@TABLE.serves("compute.instances.setLabels")
def _set_labels(call: Call) -> Json:
    return set_labels(call, _find(call))


@TABLE.serves("compute.instances.setDeletionProtection")
def _set_protection(call: Call) -> Json:
    record = _find(call)
    record.body["deletionProtection"] = call.query.get("deletionProtection", True)
    call.store.put(record)
    return begin(call, "setDeletionProtection", record)


@TABLE.serves("compute.instances.getSerialPortOutput")
def _serial(call: Call) -> Json:
    record = require(call.store, _key(call))
    if call.query.get("port", 1) not in range(1, 5):
        raise invalid_value("port", call.query["port"], "Must be between 1 and 4.")
    text = (
        call.services.backends.serial_output(instance_spec(record)) if call.query.get("port", 1) == 1 else ""
    )
    content = text.encode()
    start = min(int(call.query.get("start", 0)), len(content))
    return {
        "kind": "compute#serialPortOutput",
        "contents": content[start:].decode(errors="replace"),
        "start": str(start),
        "next": str(len(content)),
        "selfLink": link(f"{record.key}/serialPort"),
    }


@TABLE.serves("compute.instances.getGuestAttributes")
def _guest_attributes(call: Call) -> Json:
    # As on Google when the guest has written nothing.
    raise not_found(f"{_find(call).key}/guestAttributes")
