"""`kubernetes:GROUP/VERSION:Kind`: any object, by server-side apply, with the waits of the official plugin.

Rules of pulumi-kubernetes v4: names that the program leaves out are made up and kept; a preview is a dry run
on the server where that is possible; an object that exists but does not get ready stays in the state as not
initialized.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from localcloud.plugins.kubernetes import ready, rules
from localcloud.plugins.kubernetes.cluster import (
    ApiError,
    Cluster,
    Kind,
    Object,
    Settings,
    Unreachable,
    active_cluster,
    read_kubeconfig,
)
from localcloud.plugins.patience import Patience, TransientError
from localcloud.plugins.protocol import (
    CancelledError,
    Checked,
    Diff,
    Failure,
    GoneError,
    InitFailedError,
    Provider,
    ProviderError,
    ReadResult,
    Resource,
    config_value,
    kept,
)
from localcloud.plugins.values import (
    UNKNOWN,
    Properties,
    Secret,
    Value,
    compare,
    drift,
    has_unknown,
    keep_secrets,
    plain,
)

_AUTONAMED = "pulumi.com/autonamed"
_SKIP_AWAIT = "pulumi.com/skipAwait"
_TIMEOUT = "pulumi.com/timeoutSeconds"
_MANAGER = "pulumi-kubernetes-"
_PATCH_FORCE = "pulumi.com/patchForce"
_PROPAGATION = "pulumi.com/deletionPropagationPolicy"
_DELETE_SECONDS = 600
_RETRY_SECONDS = 30  # for what follows a new namespace within moments: itself, its default service account
_IF_GONE = "if the cluster is gone for good, PULUMI_K8S_DELETE_UNREACHABLE=true drops what was on it"
_OPTIONS = {
    "deleteUnreachable": "PULUMI_K8S_DELETE_UNREACHABLE",
    "skipUpdateUnreachable": "PULUMI_K8S_SKIP_UPDATE_UNREACHABLE",
    "enableConfigMapMutable": "PULUMI_K8S_ENABLE_CONFIGMAP_MUTABLE",
    "enableSecretMutable": "PULUMI_K8S_ENABLE_SECRET_MUTABLE",
    "enablePatchForce": "PULUMI_K8S_ENABLE_PATCH_FORCE",
    "upsertExistingObjects": "PULUMI_K8S_UPSERT_EXISTING_OBJECTS",
}
_SETTINGS = ("kubeconfig", "context", "cluster", "namespace")
_HARMLESS = (
    "clusterIdentifier",
    "suppressDeprecationWarnings",
    "suppressHelmHookWarnings",
    "kubeClientSettings",
    "helmReleaseSettings",
    "version",
)
_NOT_SERVED = ("renderYamlToDirectory", "alwaysRender", "enableServerSideApply")
_KNOWN_SETTINGS = {*_SETTINGS, *_OPTIONS, *_HARMLESS, *_NOT_SERVED}
_SERVER_FIELDS = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "uid", "selfLink")


class KubernetesProvider(Provider):
    """The plugin 'kubernetes'."""

    name = "kubernetes"
    version = "4.34.2"

    def __init__(self) -> None:
        super().__init__()
        self._cluster = Cluster(Settings(), Patience(self.cancelled, self.status))
        self._options: dict[str, bool] = {}

    def check_config(self, inputs: Properties) -> Checked:
        """Refuses settings that do not exist, and those that the stand-in would have to ignore."""
        failures = []
        for name, value in plain(inputs).items():
            if name in ("renderYamlToDirectory", "alwaysRender") and config_value(value):
                failures.append(Failure((name,), "not served by the stand-in; the official plugin has it"))
            elif name == "enableServerSideApply" and config_value(value) is False:
                failures.append(Failure((name,), "the stand-in has server-side apply only"))
            elif name in _OPTIONS and value is not UNKNOWN and not isinstance(config_value(value), bool):
                failures.append(Failure((name,), f"expected a boolean, got {value!r}"))
            elif name not in _KNOWN_SETTINGS:
                failures.append(Failure((name,), "the kubernetes provider has no such setting"))
        return Checked(inputs, failures)

    def diff_config(self, old: Properties, new: Properties) -> Diff:
        """What leads to another cluster replaces all that is on it; anything else is an update.

        The official plugin's rules: what is not known may be another cluster; where both sides have a
        `clusterIdentifier`, it decides; a kubeconfig or context that cannot be read decides nothing.
        """
        changes = compare(old, new)
        before, after = plain(old), plain(new)
        where = [("kubeconfig",), ("context",), ("cluster",)]
        unknown = [path for path in where if after.get(path[0]) is UNKNOWN]
        if unknown:
            return Diff(changes, frozenset(unknown))
        identifiers = [side.get("clusterIdentifier") for side in (before, after)]
        if all(identifiers):
            moved = UNKNOWN in identifiers or identifiers[0] != identifiers[1]
        else:
            clusters = [_cluster_of(side) for side in (before, after)]
            moved = None not in clusters and clusters[0] != clusters[1]
        names = {*where, ("clusterIdentifier",)} if all(identifiers) else set(where)
        return Diff(changes, frozenset(changes) & names if moved else frozenset())

    def configure(self, config: Properties) -> None:
        """Keeps the settings; the connection is made at the first use."""
        given: dict[str, Any] = {name: config.get(name) or None for name in _SETTINGS}
        if isinstance(given["kubeconfig"], dict):  # JSON contents, decoded on the way
            given["kubeconfig"] = json.dumps(given["kubeconfig"])
        self._cluster = Cluster(Settings(**given), Patience(self.cancelled, self.status))
        self._options = {
            name: bool(config.get(name, os.environ.get(variable, "").lower() in ("1", "true")))
            for name, variable in _OPTIONS.items()
        }

    def check(self, resource: Resource, old: Properties, new: Properties, seed: bytes) -> Checked:
        """Fills in apiVersion, kind, name and namespace; refuses what cannot be an object of this type."""
        kind = self._kind(resource.type)
        if old and self._options.get("skipUpdateUnreachable") and self._unreachable():
            self.log(resource.urn, "the cluster is unreachable; left as it was (skipUpdateUnreachable)")
            return Checked(old)
        inputs = {"apiVersion": kind.api_version, "kind": kind.kind, **new}
        failures = [
            Failure((name,), f"expected {wanted!r}, got {plain(inputs[name])!r}")
            for name, wanted in (("apiVersion", kind.api_version), ("kind", kind.kind))
            if plain(inputs[name]) not in (wanted, UNKNOWN)
        ]
        metadata = inputs.get("metadata", {})
        if plain(metadata) is UNKNOWN:
            return Checked(inputs, failures)
        if not isinstance(plain(metadata), dict):
            return Checked(
                inputs, [*failures, Failure(("metadata",), f"expected an object, got {metadata!r}")]
            )
        failures += _metadata_failures(plain(metadata))
        if not failures:
            inputs["metadata"] = self._named(kind, resource, old, metadata, seed)
        return Checked(inputs, failures)

    def _named(self, kind: Kind, resource: Resource, old: Properties, metadata: Value, seed: bytes) -> Value:
        """The metadata with a name and, where the type has one, a namespace."""
        if isinstance(metadata, Secret):
            return Secret(self._named(kind, resource, old, metadata.value, seed))
        named = dict(metadata)
        if not named.get("name") and not named.get("generateName"):
            annotations = plain(named.get("annotations") or {})
            if annotations is not UNKNOWN:
                before = plain(old).get("metadata") or {}
                kept = before.get("name") if _autonamed(before) else None
                named["name"] = kept or f"{resource.name.lower()}-{seed.hex()[:8] or os.urandom(4).hex()}"
                named["annotations"] = {**(named.get("annotations") or {}), _AUTONAMED: "true"}
        if not named.get("namespace"):
            try:
                if self._cluster.namespaced(kind):
                    named["namespace"] = self._cluster.default_namespace
            except (Unreachable, ApiError):
                # A cluster that is away must not look like a move to another namespace. Where there is none
                # yet, it is decided at the apply, when the cluster must be there.
                before = (plain(old).get("metadata") or {}).get("namespace")
                named |= {"namespace": before} if before else {}
        return named

    def _unreachable(self) -> bool:
        try:
            self._cluster.check()
        except Unreachable:
            return True
        return False

    def diff(self, resource: Resource, state: Properties, old: Properties, new: Properties) -> Diff:
        """Compares what the program wants with what it wanted; a refresh puts drift into the latter."""
        kind = self._kind(resource.type)
        before, after = plain(old) or _inputs_of(plain(state)), plain(new)
        mutable = self._options.get(f"enable{kind.kind}Mutable", False) and not after.get("immutable")
        changes = compare(before, after)
        replace = rules.replacing(kind, changes, mutable_data=mutable)
        metadata, was = after.get("metadata"), before.get("metadata") or {}
        same_name = (
            isinstance(metadata, dict)
            and not _autonamed(metadata)
            and metadata.get("name") == was.get("name")
            and metadata.get("namespace") == was.get("namespace")
        )
        return Diff(changes, replace, bool(replace) and same_name)

    def create(self, resource: Resource, inputs: Properties, *, preview: bool) -> tuple[str, Properties]:
        """Applies the object and waits until it is up."""
        kind, manifest = self._kind(resource.type), plain(inputs)
        if preview:
            return "", self._preview(kind, inputs, lambda: self._try_create(kind, manifest, resource))
        self._refuse_existing(kind, manifest)
        deadline = time.monotonic() + self._seconds(resource, manifest, ready.default_timeout_seconds(kind))
        try:
            live = self._apply_soon(kind, manifest, resource)
        except (ApiError, Unreachable) as error:
            if self._may_be_there(kind, manifest, resource, error):
                reason = f"{_label(kind, manifest)} may have been created; the answer did not come: {error}"
                raise InitFailedError(_id(manifest), inputs, [reason], inputs) from error
            raise ProviderError(
                f"{_label(kind, manifest)} was not created by the API server: {error}"
            ) from error
        with kept(_id(live), _state(live, inputs), inputs):
            return _id(live), self._wait(kind, resource, inputs, live, deadline)

    def _may_be_there(self, kind: Kind, manifest: Object, resource: Resource, error: ProviderError) -> bool:
        """Whether a creation that failed did its work all the same: our mark is on the object, or nobody can
        tell.
        """
        if not (isinstance(error, TransientError) and error.maybe_done):
            return False
        metadata = manifest["metadata"]
        try:
            live = self._cluster.get(kind, metadata.get("namespace"), metadata["name"])
        except (ApiError, Unreachable):
            return True
        managers = [
            entry.get("manager") for entry in ((live or {}).get("metadata") or {}).get("managedFields", [])
        ]
        return _manager(resource) in managers

    def read(self, resource: Resource, state: Properties, inputs: Properties) -> ReadResult:
        """Reads the object; one that is not up (a pod) is reported as not initialized."""
        kind = self._kind(resource.type)
        namespace, _, name = resource.resource_id.rpartition("/")
        try:
            live = self._cluster.get(kind, namespace or None, name)
        except Unreachable as error:
            if self._options.get("deleteUnreachable"):
                self.log(resource.urn, f"{error}; taken out of the state (deleteUnreachable)", warning=True)
                return ReadResult()
            if self._options.get("skipUpdateUnreachable"):
                self.log(resource.urn, f"{error}; left as it was (skipUpdateUnreachable)", warning=True)
                return ReadResult(resource.resource_id, state, inputs)
            raise ProviderError(f"{error}; {_IF_GONE}") from error
        except ApiError as error:
            if error.reason == "NoMatch":
                return ReadResult()
            raise
        if live is None:
            return ReadResult()
        current = drift(inputs, plain(state), live) if inputs else _inputs_of(live)
        outputs = _state(live, inputs)
        seen = ready.verdict(kind, live)
        if kind == Kind("v1", "Pod") and not seen.ready and not _annotated(live, _SKIP_AWAIT):
            raise InitFailedError(
                resource.resource_id, outputs, [f"{_label(kind, live)}: {_joined(seen)}"], current
            )
        return ReadResult(resource.resource_id, outputs, current)

    def update(
        self,
        resource: Resource,
        state: Properties,  # noqa: ARG002
        old: Properties,  # noqa: ARG002
        new: Properties,
        *,
        preview: bool,
    ) -> Properties:
        """Applies the object anew and waits until it is up."""
        kind, manifest = self._kind(resource.type), plain(new)
        if preview:
            return self._preview(kind, new, lambda: self._apply_anew(kind, manifest, resource, dry_run=True))
        deadline = time.monotonic() + self._seconds(resource, manifest, ready.default_timeout_seconds(kind))
        try:
            live = self._apply_anew(kind, manifest, resource, dry_run=False)
        except ApiError as error:
            raise ProviderError(f"{_label(kind, manifest)} was not updated: {_explained(error)}") from error
        with kept(resource.resource_id, _state(live, new), new):
            return self._wait(kind, resource, new, live, deadline)

    def delete(self, resource: Resource, state: Properties, inputs: Properties) -> None:  # noqa: ARG002
        """Deletes the object and waits until it is gone."""
        kind = self._kind(resource.type)
        namespace, _, name = resource.resource_id.rpartition("/")
        live = plain(state)
        propagation = _annotated(live, _PROPAGATION) or "foreground"
        try:
            self._cluster.delete(kind, namespace or None, name, propagation.capitalize())
            if not _annotated(live, _SKIP_AWAIT):
                seconds = self._seconds(resource, live, _DELETE_SECONDS)
                self._wait_gone(kind, resource, namespace or None, name, time.monotonic() + seconds)
        except Unreachable as error:
            if not self._options.get("deleteUnreachable"):
                raise ProviderError(f"{error}; {_IF_GONE}") from error
            self.log(resource.urn, f"{error}; taken out of the state (deleteUnreachable)", warning=True)
        except ApiError as error:
            if error.status != 404:
                raise ProviderError(f"{_label(kind, live)} was not deleted: {error}") from error

    def _kind(self, token: str) -> Kind:
        _, group_version, kind = token.split(":")
        group, _, version = group_version.partition("/")
        served = bool(version) and "." not in version and not kind.endswith(("Patch", "List"))
        if not served or group.split(".")[0] in ("helm", "kustomize", "yaml"):
            self.refuse_type(token, ["every single object, kubernetes:GROUP/VERSION:Kind"])
        return Kind(version if group == "core" else group_version, kind)

    def _preview(self, kind: Kind, inputs: Properties, attempt: Callable[[], Object | None]) -> Properties:
        """What the server would make of it, or the inputs where it cannot be asked (yet)."""
        if has_unknown(inputs):
            return inputs
        try:
            live = attempt()
        except Unreachable:
            return inputs
        except ApiError as error:
            if error.status in (403, 404):  # no right to try, or it waits for a namespace or type of this run
                return inputs
            raise ProviderError(
                f"{_label(kind, plain(inputs))} would be refused: {_explained(error)}"
            ) from error
        if live is None:
            return inputs
        live.pop("status", None)
        for name in ("uid", "resourceVersion", "creationTimestamp"):
            live["metadata"].pop(name, None)
        return _state(live, inputs)

    def _try_create(self, kind: Kind, manifest: Object, resource: Resource) -> Object | None:
        """A dry run of a creation; None where all that can be said is that the server finds it valid.

        The engine does not say that a creation is half of a replacement. So an object of that name that lives
        is taken for the one that will be gone by then: an apply would only compare the new object with it.
        """
        metadata = manifest["metadata"]
        there = self._cluster.get(kind, metadata.get("namespace"), metadata["name"]) is not None
        if not there:
            return self._apply(kind, manifest, resource, dry_run=True)
        try:
            return self._cluster.try_create(kind, manifest)
        except ApiError as error:
            # the server looks for the name after it has validated everything else
            if error.reason == "AlreadyExists" or "already allocated" in str(error):
                return None
            raise

    def _refuse_existing(self, kind: Kind, manifest: Object) -> None:
        """As the official plugin: an object that is there already is somebody else's."""
        if self._options.get("upsertExistingObjects"):
            return
        metadata = manifest["metadata"]
        if self._cluster.get(kind, metadata.get("namespace"), metadata["name"]) is not None:
            raise ProviderError(
                f"{_label(kind, manifest)} already exists; `pulumi import` takes it over "
                "(or upsertExistingObjects / PULUMI_K8S_UPSERT_EXISTING_OBJECTS)"
            )

    def _apply(
        self, kind: Kind, manifest: Object, resource: Resource, *, dry_run: bool, manager: str = ""
    ) -> Object:
        force = self._options.get("enablePatchForce", False) or _annotated(manifest, _PATCH_FORCE) == "true"
        manager = manager or _manager(resource)
        return self._cluster.apply(kind, manifest, manager, force=force, dry_run=dry_run)

    def _apply_anew(self, kind: Kind, manifest: Object, resource: Resource, *, dry_run: bool) -> Object:
        """Applies as whoever applied it before, because another name of the resource (an alias) is no other
        owner of its fields; and with what is there in place of what the user has ignored.
        """
        metadata = manifest["metadata"]
        live = self._cluster.get(kind, metadata.get("namespace"), metadata["name"]) or {}
        for path in resource.ignored:
            _keep(manifest, live, path.split("."))
        applied = [
            str(entry["manager"])
            for entry in (live.get("metadata") or {}).get("managedFields", [])
            if entry.get("operation") == "Apply" and str(entry.get("manager")).startswith(_MANAGER)
        ]
        manager = applied[0] if len(applied) == 1 else _manager(resource)
        return self._apply(kind, manifest, resource, dry_run=dry_run, manager=manager)

    def _apply_soon(self, kind: Kind, manifest: Object, resource: Resource) -> Object:
        """Applies, trying again for a while what only needs a moment after a new namespace."""
        deadline = time.monotonic() + _RETRY_SECONDS
        pause = 0.1
        while True:
            try:
                return self._apply(kind, manifest, resource, dry_run=False)
            except ApiError as error:
                soon = "serviceaccount" in str(error) or (error.status == 404 and "namespaces" in str(error))
                if not soon or time.monotonic() > deadline or self.cancelled.wait(pause):
                    raise
                pause = min(pause * 2, 2)

    def _wait(
        self, kind: Kind, resource: Resource, inputs: Properties, live: Object, deadline: float
    ) -> Properties:
        """Waits until the object is up; returns its state, or raises `InitFailedError` with the reasons."""
        if _annotated(live, _SKIP_AWAIT) == "true" or ready.verdict(kind, live).ready:
            return _state(live, inputs)
        metadata, began = live["metadata"], time.monotonic()
        seen, waiting = ready.verdict(kind, live), ready.Waiting(_label(kind, live))
        for current in self._states(kind, metadata.get("namespace"), metadata["name"], deadline):
            if current is None:
                raise GoneError(f"{_label(kind, live)} was deleted by somebody else before it was ready")
            live = {"apiVersion": kind.api_version, "kind": kind.kind, **current}
            seen = ready.verdict(kind, live)
            if seen.ready:
                return _state(live, inputs)
            reasons, events = self._details(live, seen)
            status = waiting.status(reasons, events, time.monotonic() - began)
            if status:
                self.log(resource.urn, status, status=True)
            for line in waiting.warnings(events):
                self.log(resource.urn, f"{_label(kind, live)}: {line}", warning=True)
            if seen.hopeless:
                break
            if time.monotonic() > deadline or self.cancelled.is_set():
                break
        how = "was interrupted" if self.cancelled.is_set() else "failed" if seen.hopeless else "timed out"
        reasons, events = self._details(live, seen)
        reason = f"{_label(kind, live)} was created, but waiting for it {how}: {'; '.join(reasons)}"
        lines = ready.event_lines(events)
        raise InitFailedError(_id(live), _state(live, inputs), [reason, *lines], inputs)

    def _states(
        self, kind: Kind, namespace: str | None, name: str, deadline: float
    ) -> Iterator[Object | None]:
        """An object's states, however often the API server goes away until the deadline."""
        while True:
            try:
                yield from self._cluster.states(kind, namespace, name)
            except TransientError:
                if time.monotonic() > deadline or self.cancelled.is_set():
                    raise
            else:
                return

    def _details(self, live: Object, seen: ready.Verdict) -> tuple[tuple[str, ...], list[Object]]:
        """Why an object is not up, with what its pods say, and the events; as far as the server tells."""
        namespace, selector = live["metadata"].get("namespace"), ready.selector(live)
        try:
            pods = self._cluster.pods(namespace, selector) if selector else []
            events = [event for each in (live, *pods[:3]) for event in self._cluster.events(each)]
            waiting = [pod for pod in (live, *pods) if ready.is_unschedulable(pod)]
            nodes = self._cluster.nodes() if waiting else []
        except (Unreachable, ApiError):
            return seen.reasons, []
        return (*seen.reasons, *ready.pod_reasons(pods), *ready.node_reasons(waiting, nodes)), events

    def _wait_gone(
        self, kind: Kind, resource: Resource, namespace: str | None, name: str, deadline: float
    ) -> None:
        uid = None
        for current in self._states(kind, namespace, name, deadline):
            if current is None or current["metadata"]["uid"] != (uid := uid or current["metadata"]["uid"]):
                return
            if self.cancelled.is_set():
                raise CancelledError(f"the wait for the deletion of {name} was interrupted")
            finalizers = ", ".join(current["metadata"].get("finalizers") or [])
            held = f" (finalizers: {finalizers})" if finalizers else ""
            if time.monotonic() > deadline:
                raise ProviderError(f"{kind.kind} {resource.resource_id} was not gone in time{held}")
            self.log(resource.urn, f"waiting for the deletion to finish{held}", status=True)

    def _seconds(self, resource: Resource, manifest: Object, default: float) -> float:
        annotated = _annotated(manifest, _TIMEOUT)
        return resource.timeout or (float(annotated) if annotated else default)


def _cluster_of(config: Properties) -> Object | None:
    """The cluster that a provider's configuration leads to: its entry, None where that cannot be told."""
    if not config.get("kubeconfig"):
        return None
    given = config["kubeconfig"]
    try:
        document, _ = read_kubeconfig(given if isinstance(given, str) else json.dumps(given))
    except ProviderError:
        return None
    return active_cluster(document or {}, config.get("context"), config.get("cluster"))


def _metadata_failures(metadata: Mapping[str, Value]) -> list[Failure]:
    failures = []
    for name in ("name", "namespace", "generateName"):
        if metadata.get(name) is not None and not isinstance(metadata[name], str | type(UNKNOWN)):
            failures.append(Failure(("metadata", name), f"expected a string, got {metadata[name]!r}"))
    for name in ("labels", "annotations"):
        entries = metadata.get(name) or {}
        if entries is not UNKNOWN and not isinstance(entries, dict):
            failures.append(Failure(("metadata", name), f"expected a map of strings, got {entries!r}"))
            continue
        failures += [
            Failure(("metadata", name, key), f"expected a string, got {value!r}")
            for key, value in (entries.items() if isinstance(entries, dict) else ())
            if not isinstance(value, str | type(UNKNOWN))
        ]
    if metadata.get("generateName"):
        failures.append(
            Failure(("metadata", "generateName"), "not served by the stand-in; leave the name out instead")
        )
    return failures


def _state(live: Object, inputs: Properties) -> Properties:
    """The live object as outputs, without the bookkeeping of field managers, secret where the inputs are."""
    metadata = {k: v for k, v in live["metadata"].items() if k != "managedFields"}
    outputs: Properties = {
        k: keep_secrets(v, inputs.get(k)) for k, v in (live | {"metadata": metadata}).items()
    }
    if live.get("kind") == "Secret":
        outputs |= {k: Secret(plain(outputs[k])) for k in ("data", "stringData") if k in outputs}
    return outputs


def _inputs_of(live: Object) -> Properties:
    """The inputs that would make a live object: for an import."""
    metadata = {k: v for k, v in live.get("metadata", {}).items() if k not in _SERVER_FIELDS}
    return {k: v for k, v in live.items() if k != "status"} | {"metadata": metadata}


def _keep(manifest: Object, live: Object, path: list[str]) -> None:
    """Put what is at a path of the live object into the manifest, where that has something there."""
    *parents, last = path
    for name in parents:
        manifest, live = manifest.get(name) or {}, live.get(name) or {}
    if last in manifest and last in live:
        manifest[last] = live[last]


def _manager(resource: Resource) -> str:
    """The field manager of a resource, by which its object can be told from anybody else's."""
    return f"{_MANAGER}{hashlib.sha256(resource.urn.encode()).hexdigest()[:8]}"


def _annotated(manifest: Object, annotation: str) -> str:
    return str(((manifest.get("metadata") or {}).get("annotations") or {}).get(annotation, ""))


def _autonamed(metadata: Mapping[str, Value]) -> bool:
    annotations = metadata.get("annotations")
    return isinstance(annotations, dict) and annotations.get(_AUTONAMED) == "true"


def _id(live: Object) -> str:
    metadata = live["metadata"]
    return (
        f"{metadata['namespace']}/{metadata['name']}" if metadata.get("namespace") else str(metadata["name"])
    )


def _label(kind: Kind, manifest: Object) -> str:
    return f"{kind.kind} {_id(manifest)}" if (manifest.get("metadata") or {}).get("name") else kind.kind


def _joined(seen: ready.Verdict) -> str:
    return "; ".join(seen.reasons)


def _explained(error: ApiError) -> str:
    if error.status == 409:
        return f'{error}; the annotation {_PATCH_FORCE}: "true" takes the fields over'
    return str(error)
