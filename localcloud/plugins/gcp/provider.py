"""The stand-in for the plugin 'gcp': a resource becomes the REST calls that the official plugin makes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace

from localcloud.plugins.gcp import fields, resources
from localcloud.plugins.gcp.fields import Form, Json, Type
from localcloud.plugins.gcp.resources import Change, at, deadline_in, declarations
from localcloud.plugins.gcp.rest import (
    ENDPOINT_RULE,
    SERVICES,
    FailedOperationError,
    Google,
    GoogleError,
    StillRunningError,
)
from localcloud.plugins.gcp.served import CLASSES
from localcloud.plugins.gcp.tables import TYPES, ResourceType
from localcloud.plugins.patience import TransientError
from localcloud.plugins.protocol import (
    Checked,
    Diff,
    Failure,
    GoneError,
    InitFailedError,
    Provider,
    ProviderError,
    ReadResult,
    Resource,
    kept,
)
from localcloud.plugins.values import (
    UNKNOWN,
    Path,
    Properties,
    Secret,
    Value,
    compare,
    drift,
    has_unknown,
    plain,
    with_secrets_of,
)
from localcloud.plugins.values import Change as ValueChange

CLIENT_CONFIG = "gcp:organizations/getClientConfig:getClientConfig"
ZONES = "gcp:compute/getZones:getZones"
# The official plugin's own note of which inputs it made up, kept so that a state can move between the two.
_DEFAULTS = "__defaults"
# Ours, in the state of what was begun and not seen to its end.
_UNFINISHED = "__unfinished"
_TRIES = 3
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
    *("credentials", "externalCredentials", "impersonateServiceAccount", "universeDomain"),
    *("impersonateServiceAccountDelegates", "addPulumiAttributionLabel"),
    "pulumiAttributionLabelAdditionStrategy",
}


class UnfinishedError(ProviderError):
    """What failed left something behind."""


@contextlib.contextmanager
def _kept_unless_refused(item: str, state: Properties, inputs: Properties) -> Iterator[None]:
    """For the request that creates: what may be there stays in the state, what was refused does not."""
    try:
        yield
    except (StillRunningError, UnfinishedError) as error:
        raise InitFailedError(item, state, [str(error)], inputs) from error
    except TransientError as error:
        if not error.maybe_done:
            raise
        reason = f"it may have been created; the answer did not come: {error}"
        raise InitFailedError(item, state, [reason], inputs) from error


class GcpProvider(Provider):
    """The plugin 'gcp'."""

    name = "gcp"
    version = "10.2.0"

    def __init__(self) -> None:
        super().__init__()
        self._google = Google({}, None, self.cancelled, self.status)
        self._settings: Properties = {}

    def check_config(self, inputs: Properties) -> Checked:
        """Refuses settings that do not exist, that are not served, and endpoints of the wrong form."""
        failures = []
        for name, value in plain(inputs).items():
            if name.endswith("CustomEndpoint"):
                if value is not UNKNOWN and not ENDPOINT_RULE.match(str(value)):
                    rule = "must be a URL that ends with its version and a slash (…/compute/beta/)"
                    failures.append(Failure((name,), f"{value!r} {rule}"))
            elif name == "defaultLabels":
                if value is not UNKNOWN and _default_labels(value) is None:
                    failures.append(Failure((name,), f"{value!r} is no map of strings"))
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
        self._google.labels = _default_labels(config.get("defaultLabels")) or {}
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
        labels = served.labels(after)
        if labels and labels != has.get("pulumiLabels", labels) and not has_unknown(labels):
            # What the provider gives everything is in no resource's inputs.
            changes.setdefault(("pulumiLabels",), ValueChange.UPDATE)
        replaced = frozenset(path for path in changes if served.replaces(path, before, after))
        # As in the official plugin: a name of the program's own counts as in the way of the next one, also
        # where it is another, and where the plugin would make none up nothing is in the way.
        named = bool(served.spec.name) and "name" not in after.get(_DEFAULTS, [])
        return Diff(changes, replaced, bool(replaced) and named)

    def create(self, resource: Resource, inputs: Properties, *, preview: bool) -> tuple[str, Properties]:
        """Creates, waits for the operation, reads the result."""
        served = self._served(resource)
        given = {k: v for k, v in plain(inputs).items() if k != _DEFAULTS}
        known = {**given, **self._scope(served.spec, given)}
        if preview:
            return "", with_secrets_of(fields.computed(served.spec.fields, known), inputs)
        item = served.item(known)
        deadline = deadline_in(resource.timeout or served.spec.minutes[0] * 60)
        unfinished = with_secrets_of({**known, _UNFINISHED: True}, inputs)
        with self._explained(f"creating {_label(served.spec, known)}"):
            if served.exclusive and served.read(item) is not None:
                raise ProviderError("it already exists; `pulumi import` takes it over")
            with _kept_unless_refused(item, unfinished, inputs):
                self._begin(served, item, given, known, deadline)
        with kept(item, unfinished, inputs):
            return item, self._finish(served, item, inputs, known, deadline)

    def _begin(
        self, served: resources.Resource, item: str, given: Properties, known: Properties, deadline: float
    ) -> None:
        """Creates, and finds out what became of it where no answer tells.

        There was nothing a moment ago: what is there after a request of ours, as we asked for it, is ours.
        """
        began, pause, lost = time.monotonic(), 0.1, False
        while True:
            try:
                return served.create(given, known, deadline)
            except FailedOperationError as failed:
                with contextlib.suppress(ProviderError):
                    served.discard(item, deadline)
                if self._there(served, item, failed) is not None:
                    raise UnfinishedError(str(failed)) from failed
                raise
            except ProviderError as error:
                lost = lost or (isinstance(error, TransientError) and error.maybe_done)
                refused = isinstance(error, GoogleError) and not isinstance(error, TransientError)
                if not lost or (isinstance(error, GoogleError) and refused and error.status != 409):
                    raise
                live = self._there(served, item, error)
                if live is not None and not served.as_asked(live, given, known):
                    raise ProviderError(f"{error}; somebody else created another one meanwhile") from error
                if live is not None:
                    return served.settle(item, deadline)
                pause = max(pause, getattr(error, "retry_after", 0.0))
                late = time.monotonic() + pause > began + self._google.patience.seconds
                if late or self.cancelled.wait(pause):
                    raise ProviderError(f"{error}; there is none") from error
                pause = min(pause * 2, 2)

    @staticmethod
    def _there(served: resources.Resource, item: str, after: ProviderError) -> Json | None:
        """What there is after a request whose end is not known; `UnfinishedError` if nobody can tell."""
        try:
            return served.read(item)
        except ProviderError as error:
            raise UnfinishedError(f"{after}; {error}") from error

    @staticmethod
    def _finish(
        served: resources.Resource, item: str, inputs: Properties, known: Properties, deadline: float
    ) -> Properties:
        served.finish(plain(inputs), item, deadline)
        live = served.read(item)
        if live is None:
            raise GoneError(f"{_label(served.spec, known)} was gone right after its creation")
        return with_secrets_of(served.outputs(live, known), inputs)

    @staticmethod
    @contextlib.contextmanager
    def _explained(what: str) -> Iterator[None]:
        """Says in an error what was being done."""
        try:
            yield
        except StillRunningError:
            raise
        except ProviderError as error:
            raise ProviderError(f"{what}: {error}") from error

    def read(self, resource: Resource, state: Properties, inputs: Properties) -> ReadResult:
        """Reads what is there."""
        served = self._served(resource)
        item = (
            resource.resource_id if state else served.full(resource.resource_id, self._scope(served.spec, {}))
        )
        live = served.read(item)
        if live is None:
            return ReadResult()
        recorded = plain(state)
        known = {**_from_item(served.spec, item), **plain(inputs), **recorded}
        outputs = served.outputs(live, known)
        if not inputs:
            current = fields.inputs_of(served.spec.fields, outputs)
        else:
            notes = {_DEFAULTS: inputs[_DEFAULTS]} if _DEFAULTS in inputs else {}
            own = {k: v for k, v in inputs.items() if k != _DEFAULTS}
            current = {**drift(own, recorded, outputs), **notes}
        known_outputs = with_secrets_of(outputs, {**state, **inputs})
        if inputs and (_UNFINISHED in state or not state):
            # Begun, by us or by a pulumi that was killed, and not seen to its end.
            unfinished = {**known_outputs, _UNFINISHED: True}
            raise InitFailedError(item, unfinished, [f"{item} is not finished; `pulumi up` goes on"], current)
        return ReadResult(item, known_outputs, current)

    def update(
        self, resource: Resource, state: Properties, old: Properties, new: Properties, *, preview: bool
    ) -> Properties:
        """Brings the changed inputs to Google and reads the result."""
        served = self._served(resource)
        given = {k: v for k, v in plain(new).items() if k != _DEFAULTS}
        known = {**given, **self._scope(served.spec, given)}
        names = frozenset(str(path[0]) for path in self.diff(resource, state, old, new).changes)
        managed = frozenset(plain(state).get("pulumiLabels") or {})
        change = Change(resource.resource_id, plain(old), given, names, plain(state), 0, managed)
        if preview:
            if not has_unknown(given):
                served.plan(change)
            kept = {k: v for k, v in plain(state).items() if k not in names}
            return with_secrets_of({**kept, **{k: v for k, v in given.items() if k in names}}, new)
        deadline = deadline_in(resource.timeout or served.spec.minutes[1] * 60)
        item, unfinished = resource.resource_id, _UNFINISHED in state
        if unfinished:
            served.settle(item, deadline)
        live = served.read(item)
        if unfinished and live is not None and live.get("status") == "ERROR":
            served.discard(item, deadline)
            live = None
        if live is None:
            if unfinished:  # it never came to be
                return self.create(resource, new, preview=False)[1]
            raise ProviderError(
                f"{_label(served.spec, known)} is gone; `pulumi refresh` takes it out of the state"
            )
        with self._explained(f"updating {_label(served.spec, known)}"):
            if unfinished:
                served.finish(given, item, deadline)
            self._change(served, replace(change, deadline=deadline))
            outputs = served.outputs(served.read(item) or {}, known)
        return with_secrets_of(outputs, new)

    @staticmethod
    def _change(served: resources.Resource, change: Change) -> None:
        """Brings changes to Google, once more from what is live where an answer was lost."""
        for attempt in range(_TRIES):
            if attempt:
                served.settle(change.item, change.deadline)
            live = served.read(change.item)
            if live is None:
                raise ProviderError("it is gone")
            try:
                served.update(replace(change, live=live))
            except (TransientError, GoogleError) as error:
                lost = isinstance(error, TransientError) and error.maybe_done
                moved = isinstance(error, GoogleError) and error.status == 412  # its fingerprint
                if not (lost or moved) or attempt + 1 == _TRIES:
                    raise
            else:
                return

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
        with self._explained(f"deleting {resource.resource_id}"):
            try:
                served.delete(resource.resource_id, plain(state), deadline)
            except GoogleError as error:
                if error.status not in (400, 409):
                    raise
                # A deletion whose answer was lost, or one that somebody else began, may be under way.
                served.settle(resource.resource_id, deadline)
                if served.read(resource.resource_id) is not None:
                    raise

    def invoke(self, token: str, args: Properties) -> Properties:
        """`getClientConfig`: who and where the provider is; `getZones`: which zones a region has."""
        if token == ZONES:
            return self._zones(args)
        if token != CLIENT_CONFIG:
            return super().invoke(token, args)
        access = self._google.token or os.environ.get("GOOGLE_OAUTH_ACCESS_TOKEN") or ""
        where = {name: self._settings.get(name) or "" for name in _ENVIRONMENT}
        path = f"projects/{where['project']}/regions/{where['region']}/zones/{where['zone']}"
        return {**where, "id": path, "accessToken": Secret(access), "defaultLabels": {**self._google.labels}}

    def _zones(self, args: Properties) -> Properties:
        place = {name: args.get(name) or self._settings.get(name) or "" for name in ("project", "region")}
        wanted = f"(region eq '.*/regions/{place['region']}')"
        if args.get("status"):
            wanted += f" (status eq {args['status']})"
        path = f"projects/{place['project']}/zones"
        listed = self._google.call("compute", "GET", path, query={"filter": wanted})
        names = sorted(str(zone["name"]) for zone in listed.get("items") or [])
        return {
            **args,
            **place,
            "id": f"projects/{place['project']}/regions/{place['region']}",
            "names": names,
        }

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


def _default_labels(value: Value) -> dict[str, str] | None:
    """The labels in a setting, which may be JSON in a string; None where it is no map of strings."""
    if value is None:
        return {}
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict) or not all(isinstance(label, str) for label in value.values()):
        return None
    return {str(name): str(label) for name, label in value.items()}


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
    if not declared:
        return False
    last, wanted, actual = declared[-1], at(after, path), at(state, path)
    if wanted is None:
        meant = False if last.default is None and last.type is Type.BOOL else last.default
        return last.decided or (last.type is not Type.MAP and meant is not None and actual == meant)
    if isinstance(wanted, str) and isinstance(actual, str) and last.form is not Form.ANY:
        return fields.same(last.form, wanted, actual)
    return (
        not has_unknown(wanted)
        and wanted == actual
        and len(path) == 1
        and path[0] not in ("metadata", "labels")
    )
