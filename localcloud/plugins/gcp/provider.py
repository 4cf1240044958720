"""The stand-in for the plugin 'gcp': a resource becomes the REST calls that the official plugin makes."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from localcloud.plugins.gcp import fields, resources
from localcloud.plugins.gcp.fields import Type, Update
from localcloud.plugins.gcp.resources import Change, at, deadline_in, declarations
from localcloud.plugins.gcp.rest import ENDPOINT_RULE, SERVICES, Google, GoogleError, StillRunningError
from localcloud.plugins.gcp.served import CLASSES
from localcloud.plugins.gcp.tables import TYPES, ResourceType
from localcloud.plugins.protocol import (
    Checked,
    Diff,
    Failure,
    InitFailedError,
    Provider,
    ProviderError,
    ReadResult,
    Resource,
)
from localcloud.plugins.values import (
    UNKNOWN,
    Path,
    Properties,
    Secret,
    compare,
    drift,
    has_unknown,
    plain,
    with_secrets_of,
)

CLIENT_CONFIG = "gcp:organizations/getClientConfig:getClientConfig"
# The official plugin's own note of which inputs it made up, kept so that a state can move between the two.
_DEFAULTS = "__defaults"
_LONGEST_NAME = 63
_ENVIRONMENT = {
    "project": ("GOOGLE_PROJECT", "GOOGLE_CLOUD_PROJECT", "GCLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT"),
    "region": ("GOOGLE_REGION", "GCLOUD_REGION", "CLOUDSDK_COMPUTE_REGION"),
    "zone": ("GOOGLE_ZONE", "GCLOUD_ZONE", "CLOUDSDK_COMPUTE_ZONE"),
}
_HARMLESS = {
    *("version", "accessToken", "disableGooglePartnerName", "googlePartnerName", "partnerName", "scopes"),
    *("disablePartnerName", "requestTimeout", "requestReason", "batching", "skipRegionValidation"),
    *("userProjectOverride", "billingProject", "pollInterval"),
}
_NOT_SERVED = {
    *("credentials", "externalCredentials", "impersonateServiceAccount", "universeDomain", "defaultLabels"),
    *("impersonateServiceAccountDelegates", "addPulumiAttributionLabel"),
    "pulumiAttributionLabelAdditionStrategy",
}


class GcpProvider(Provider):
    """The plugin 'gcp'."""

    name = "gcp"
    version = "10.2.0"

    def __init__(self) -> None:
        super().__init__()
        self._google = Google({}, None, self.cancelled)
        self._settings: Properties = {}

    def check_config(self, inputs: Properties) -> Checked:
        """Refuses settings that do not exist, that are not served, and endpoints of the wrong form."""
        failures = []
        for name, value in plain(inputs).items():
            if name.endswith("CustomEndpoint"):
                if value is not UNKNOWN and not ENDPOINT_RULE.match(str(value)):
                    rule = "must be a URL that ends with its version and a slash (…/compute/beta/)"
                    failures.append(Failure((name,), f"{value!r} {rule}"))
            elif name in _NOT_SERVED:
                reason = "not served by the stand-in, which takes an access token; the official plugin has it"
                failures.append(Failure((name,), reason))
            elif name not in _HARMLESS and name not in _ENVIRONMENT:
                failures.append(Failure((name,), "the gcp provider has no such setting"))
        return Checked(inputs, failures)

    def configure(self, config: Properties) -> None:
        """Takes project, region, zone, token and endpoints, from the configuration or the environment."""
        endpoints = {
            service: config.get(key) or os.environ.get(variable) or default
            for service, (key, variable, default) in SERVICES.items()
        }
        for service, url in endpoints.items():
            if not ENDPOINT_RULE.match(url):
                raise ProviderError(f"{SERVICES[service][1]}={url!r} must end with a version and a slash")
        self._google.endpoints = endpoints
        self._google.token = config.get("accessToken")
        self._settings = {
            name: config.get(name) or next((os.environ[v] for v in variables if os.environ.get(v)), None)
            for name, variables in _ENVIRONMENT.items()
        }

    def check(self, resource: Resource, old: Properties, new: Properties, seed: bytes) -> Checked:
        """Validates inputs and makes up a name where the program gives none."""
        served = self._served(resource)
        inputs, given = dict(new), plain(new)
        failures = list(fields.check(served.spec.fields, given)) or served.check(given)
        for name in self._missing(served.spec, given):
            failures.append(Failure((name,), f"missing; set it on the resource, or gcp:{name}"))
        if served.spec.name and not given.get("name"):
            before = plain(old)
            kept = before.get("name") if "name" in before.get(_DEFAULTS, []) else None
            inputs["name"] = kept or _made_up(resource.name, seed)
            inputs[_DEFAULTS] = ["name"]
        return Checked(inputs, failures)

    def diff(self, resource: Resource, state: Properties, old: Properties, new: Properties) -> Diff:
        """Compares inputs; one that only spells out what the resource has anyway is no change."""
        served = self._served(resource)
        before, after, has = plain(old), plain(new), plain(state)
        changes = {
            path: change
            for path, change in compare(before, after, empty_is_absent=True).items()
            if path[0] != _DEFAULTS and not _as_it_is(served.spec, path, after, has)
        }
        replaced = frozenset(path for path in changes if served.replaces(path, before, after))
        autonamed = "name" in after.get(_DEFAULTS, [])
        same_name = not served.spec.name or (after.get("name") == before.get("name") and not autonamed)
        return Diff(changes, replaced, bool(replaced) and same_name)

    def create(self, resource: Resource, inputs: Properties, *, preview: bool) -> tuple[str, Properties]:
        """Creates, waits for the operation, reads the result."""
        served = self._served(resource)
        given = {k: v for k, v in plain(inputs).items() if k != _DEFAULTS}
        known = {**given, **self._scope(served.spec, given)}
        if preview:
            return "", with_secrets_of(fields.computed(served.spec.fields, known), inputs)
        deadline = deadline_in(resource.timeout or served.spec.minutes[0] * 60)
        try:
            item = served.create(given, known, deadline)
        except StillRunningError as error:
            raise InitFailedError(
                served.item(known), with_secrets_of(known, inputs), [str(error)], inputs
            ) from error
        except GoogleError as error:
            raise ProviderError(f"creating {_label(served.spec, known)}: {error}") from error
        live = served.read(item)
        if live is None:
            raise ProviderError(
                f"creating {_label(served.spec, known)}: it was gone right after its creation"
            )
        return item, with_secrets_of(served.outputs(live, known), inputs)

    def read(self, resource: Resource, state: Properties, inputs: Properties) -> ReadResult:
        """Reads what is there."""
        served = self._served(resource)
        live = served.read(resource.resource_id)
        if live is None:
            return ReadResult()
        recorded = plain(state)
        known = {**_from_item(served.spec, resource.resource_id), **plain(inputs), **recorded}
        outputs = served.outputs(live, known)
        if not inputs:
            taken = {
                f.name: outputs[f.name]
                for f in served.spec.fields
                if not f.output and f.update is not Update.LOCAL and f.name in outputs
            }
            current = {k: v for k, v in taken.items() if v not in ([], {}, "", None)}
        else:
            notes = {_DEFAULTS: inputs[_DEFAULTS]} if _DEFAULTS in inputs else {}
            own = {k: v for k, v in inputs.items() if k != _DEFAULTS}
            current = {**drift(own, recorded, outputs), **notes}
        return ReadResult(resource.resource_id, with_secrets_of(outputs, {**state, **inputs}), current)

    def update(
        self, resource: Resource, state: Properties, old: Properties, new: Properties, *, preview: bool
    ) -> Properties:
        """Brings the changed inputs to Google and reads the result."""
        served = self._served(resource)
        given = {k: v for k, v in plain(new).items() if k != _DEFAULTS}
        known = {**given, **self._scope(served.spec, given)}
        names = frozenset(str(path[0]) for path in self.diff(resource, state, old, new).changes)
        change = Change(resource.resource_id, plain(old), given, names, plain(state), 0)
        if preview:
            if not has_unknown(given):
                served.plan(change)
            kept = {k: v for k, v in plain(state).items() if k not in names}
            return with_secrets_of({**kept, **{k: v for k, v in given.items() if k in names}}, new)
        live = served.read(resource.resource_id)
        if live is None:
            raise ProviderError(
                f"{_label(served.spec, known)} is gone; `pulumi refresh` takes it out of the state"
            )
        deadline = deadline_in(resource.timeout or served.spec.minutes[1] * 60)
        try:
            served.update(replace(change, live=live, deadline=deadline))
        except GoogleError as error:
            raise ProviderError(f"updating {_label(served.spec, known)}: {error}") from error
        outputs = served.outputs(served.read(resource.resource_id) or live, known)
        return with_secrets_of(outputs, new)

    def delete(self, resource: Resource, state: Properties, inputs: Properties) -> None:  # noqa: ARG002
        """Deletes and waits for the operation."""
        served = self._served(resource)
        policy = plain(state).get("deletionPolicy")
        if policy == "PREVENT":
            raise ProviderError(
                f"{resource.resource_id} is not deleted: its deletionPolicy is PREVENT; set another one and "
                "run `pulumi up` first"
            )
        if policy == "ABANDON":
            return
        deadline = deadline_in(resource.timeout or served.spec.minutes[2] * 60)
        try:
            served.delete(resource.resource_id, plain(state), deadline)
        except GoogleError as error:
            raise ProviderError(f"deleting {resource.resource_id}: {error}") from error

    def invoke(self, token: str, args: Properties) -> Properties:
        """`getClientConfig`: who and where the provider is."""
        if token != CLIENT_CONFIG:
            return super().invoke(token, args)
        access = self._google.token or os.environ.get("GOOGLE_OAUTH_ACCESS_TOKEN") or ""
        where = {name: self._settings.get(name) or "" for name in _ENVIRONMENT}
        path = f"projects/{where['project']}/regions/{where['region']}/zones/{where['zone']}"
        return {**where, "id": path, "accessToken": Secret(access), "defaultLabels": {}}

    def _served(self, resource: Resource) -> resources.Resource:
        if resource.type not in TYPES:
            self.refuse_type(resource.type, TYPES)
        return CLASSES[resource.type](TYPES[resource.type], self._google)

    def _scope(self, spec: ResourceType, given: Properties) -> Properties:
        """Project, region, zone and location: the resource's own, else the provider's."""
        settings = self._settings
        zone = given.get("zone") or settings.get("zone")
        region = (
            given.get("region")
            or settings.get("region")
            or (_region(zone) if isinstance(zone, str) else None)
        )
        location = given.get("location") or (
            zone if spec.service == "container" and not settings.get("region") else region
        )
        found = {
            "project": given.get("project") or settings.get("project"),
            "region": region,
            "zone": zone,
            "location": location,
        }
        wanted = {f.name for f in spec.fields}
        return {k: v for k, v in found.items() if k in wanted and v}

    def _missing(self, spec: ResourceType, given: Properties) -> list[str]:
        scope = self._scope(spec, given)
        names = ("project", "region", "zone", "location")
        return [n for n in names if any(f.name == n for f in spec.fields) and not scope.get(n)]


def _region(zone: str) -> str:
    return zone.rsplit("-", 1)[0]


def _made_up(name: str, seed: bytes) -> str:
    """`name-1a2b3c4`, as the official plugin makes up names."""
    suffix = seed.hex()[:7] or os.urandom(4).hex()[:7]
    return f"{name.lower()[: _LONGEST_NAME - 8]}-{suffix}"


def _label(spec: ResourceType, known: Properties) -> str:
    kind = spec.token.rsplit(":", 1)[-1]
    name = known.get(spec.name) if spec.name else known.get("repositoryId") or known.get("accountId")
    return f"{kind} {name or known.get('member')}"


def _from_item(spec: ResourceType, item: str) -> Properties:
    """The properties that are in an id: for an import."""
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(spec.item)) + "$"
    found = re.match(pattern, item)
    return found.groupdict() if found else {}


def _as_it_is(spec: ResourceType, path: Path, after: Properties, state: Properties) -> bool:
    """Whether a changed input says (or, left out, means) what the resource has already."""
    declared = declarations(spec.fields, path)
    wanted, actual = at(after, path), at(state, path)
    if wanted is None:
        last = declared[-1] if declared else None
        if last is None or len(path) > 1 or last.type is Type.MAP:
            return False
        return last.default is not None and actual == last.default
    return (
        not has_unknown(wanted)
        and wanted == actual
        and len(path) == 1
        and path[0] not in ("metadata", "labels")
    )
