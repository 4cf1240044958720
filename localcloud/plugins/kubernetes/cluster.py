"""A Kubernetes cluster as the provider needs it: objects by type and name, over the official client's
connection.

The official client does the kubeconfig (certificates, tokens, exec plugins) and HTTP; objects stay plain
dicts. It is imported at the first use, because it takes longer to import than everything else here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from localcloud.plugins.patience import Patience, TransientError, retry_after
from localcloud.plugins.protocol import ProviderError

Object = dict[str, Any]
_TIMEOUT_SECONDS = (10, 60)  # connect, read
_WATCH_SECONDS = 3  # a watch is opened anew this often, so that an interrupt and a timeout are seen in time


class Unreachable(ProviderError):  # noqa: N818
    """The API server cannot be reached or does not let us in."""


class AwayError(Unreachable, TransientError):
    """The API server is not there, or went away before it answered."""


class ApiError(ProviderError):
    """The API server's refusal: its own message, HTTP status and reason (`NotFound`, `Conflict`, …)."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class OverloadedError(ApiError, TransientError):
    """The API server answers that it cannot, just now: 429 and 5xx."""

    answered = True


@dataclass(frozen=True)
class Kind:
    """A type of object; `api_version` as in a manifest (`v1`, `apps/v1`)."""

    api_version: str
    kind: str

    def __str__(self) -> str:
        return f"{self.api_version}/{self.kind}"


@dataclass(frozen=True)
class Settings:
    """Which cluster, as whom. `kubeconfig` is a file's contents or its path; None: where kubectl looks."""

    kubeconfig: str | None = None
    context: str | None = None
    cluster: str | None = None
    namespace: str | None = None


class Cluster:
    """A connection, made at the first request."""

    def __init__(self, settings: Settings, patience: Patience | None = None) -> None:
        self._settings = settings
        self._patience = patience or Patience(threading.Event())
        self._client: Any = None
        self._namespace = "default"
        self._kinds: dict[Kind, tuple[str, bool]] = {}
        self._lock = threading.Lock()

    @property
    def default_namespace(self) -> str:
        """The provider's, else the context's, else `default`."""
        self._connect()
        return self._namespace

    def check(self) -> None:
        """Raises `Unreachable` where the API server does not answer."""
        self._request("GET", "/version")

    def namespaced(self, kind: Kind) -> bool:
        """Whether objects of this type live in a namespace. Raises `ApiError` 404 for a type the server has
        not.
        """
        return self._resource(kind)[1]

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        """The object, or None."""
        try:
            found: Object = self._request("GET", self._path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found

    def apply(self, kind: Kind, manifest: Object, manager: str, *, force: bool, dry_run: bool) -> Object:
        """Server-side apply; returns the object."""
        metadata = manifest["metadata"]
        query = {"fieldManager": manager, "force": str(force).lower()} | (
            {"dryRun": "All"} if dry_run else {}
        )
        path = self._path(kind, metadata.get("namespace"), metadata["name"])
        applied: Object = self._request("PATCH", path, query, manifest, "application/apply-patch+yaml")
        return applied

    def try_create(self, kind: Kind, manifest: Object) -> Object:
        """A dry run of a POST: unlike an apply, it never compares with an object that is there."""
        path = self._path(kind, manifest["metadata"].get("namespace"), None)
        query = {"dryRun": "All", "fieldValidation": "Strict"}
        created: Object = self._request("POST", path, query, manifest)
        return created

    def delete(self, kind: Kind, namespace: str | None, name: str, propagation: str) -> None:
        """Asks for the deletion; the object may stay until its finalizers have run."""
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        self._request("DELETE", self._path(kind, namespace, name), body=options)

    def events(self, live: Object) -> list[Object]:
        """The object's events, oldest first."""
        metadata = live["metadata"]
        path = self._path(Kind("v1", "Event"), metadata.get("namespace") or "default", None)
        query = {"fieldSelector": f"involvedObject.uid={metadata['uid']}"}
        items = self._request("GET", path, query).get("items", [])
        return sorted(items, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""))

    def pods(self, namespace: str | None, selector: str) -> list[Object]:
        """The pods with these labels."""
        path = self._path(Kind("v1", "Pod"), namespace, None)
        pods: list[Object] = self._request("GET", path, {"labelSelector": selector}).get("items", [])
        return pods

    def nodes(self) -> list[Object]:
        """Every node."""
        nodes: list[Object] = self._request("GET", self._path(Kind("v1", "Node"), None, None)).get(
            "items", []
        )
        return nodes

    def states(self, kind: Kind, namespace: str | None, name: str) -> Iterator[Object | None]:
        """The object now and after each change, None when it is not there; a state at least every few
        seconds. A watch that breaks is taken up again.
        """
        path, selector = self._path(kind, namespace, None), {"fieldSelector": f"metadata.name={name}"}
        while True:
            listed = self._request("GET", path, selector)
            yield listed["items"][0] | _type_of(kind) if listed.get("items") else None
            version = listed["metadata"]["resourceVersion"]
            query = selector | {
                "watch": "1",
                "resourceVersion": version,
                "timeoutSeconds": str(_WATCH_SECONDS),
            }
            try:
                with contextlib.closing(self._stream(path, query)) as events:
                    for event in events:
                        if event["type"] == "DELETED":
                            yield None
                        elif event["type"] in ("ADDED", "MODIFIED"):
                            yield event["object"]
                        else:
                            break  # ERROR (the version is too old) and the like: list again
            except TransientError:
                continue  # the list tries for a while
            except ApiError as error:
                if error.status != 410:  # the version is too old
                    raise

    def _stream(self, path: str, query: dict[str, str]) -> Generator[Any, None, None]:
        response = self._call("GET", path, query).response
        try:
            rest = b""
            for chunk in response.stream(amt=None, decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines if line.strip())
        except Exception as error:
            raise AwayError(f"the watch on {path} broke: {_first_line(error)}") from error
        finally:
            response.close()

    def _path(self, kind: Kind, namespace: str | None, name: str | None) -> str:
        plural, namespaced = self._resource(kind)
        parts = ["api" if "/" not in kind.api_version else "apis", *kind.api_version.split("/")]
        if namespaced:
            parts += ["namespaces", namespace or self.default_namespace]
        parts += [plural] if name is None else [plural, name]
        return "/" + "/".join(quote(part, safe="") for part in parts)

    def _resource(self, kind: Kind) -> tuple[str, bool]:
        """The plural name and whether it is namespaced, from the server's own discovery."""
        if kind not in self._kinds:
            root = "api" if "/" not in kind.api_version else "apis"
            missing = (
                f"the API server has no {kind}; a custom resource needs its CustomResourceDefinition first"
            )
            try:
                listed = self._request("GET", f"/{root}/{kind.api_version}")
            except ApiError as error:
                raise (ApiError(404, "NoMatch", missing) if error.status == 404 else error) from error
            for resource in listed["resources"]:
                if "/" not in resource["name"]:
                    key = Kind(kind.api_version, resource["kind"])
                    self._kinds[key] = (resource["name"], bool(resource["namespaced"]))
            if kind not in self._kinds:
                raise ApiError(404, "NoMatch", missing)
        return self._kinds[kind]

    def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Any:
        """A request and its answer. All that are made here can be made again."""

        def attempt() -> Any:
            return json.loads(_body(self._call(method, path, query, body, content_type)) or b"{}")

        return self._patience.through(attempt)

    def _call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Any:
        # First: what several threads import at once Python may hand out half made.
        client = self._connect()
        from kubernetes.client.exceptions import ApiException  # noqa: PLC0415
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError  # noqa: PLC0415

        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            request = client.param_serialize(
                method,
                f"{path}?{urlencode(query)}" if query else path,
                header_params=headers,
                auth_settings=["BearerToken"],
            )
            response = client.call_api(
                method, request[1], request[2], body, _request_timeout=_TIMEOUT_SECONDS
            )
        except (ApiException, HTTPError, OSError) as error:
            host = client.configuration.host
            away = AwayError(f"the Kubernetes cluster at {host} is unreachable: {_first_line(error)}")
            cause = getattr(error, "reason", error)
            away.maybe_done = not isinstance(cause, NewConnectionError | ConnectTimeoutError)
            raise away from error
        if not 200 <= response.status <= 299:
            pause = retry_after(response.getheader("Retry-After"))
            raise _api_error(response.status, _body(response), client.configuration.host, pause)
        return response

    def _connect(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._load()
            return self._client

    def _load(self) -> Any:
        """A client from the kubeconfig, else from the pod that this runs in."""
        from kubernetes import config  # noqa: PLC0415
        from kubernetes.client import ApiClient, Configuration  # noqa: PLC0415

        document, directory = read_kubeconfig(self._settings.kubeconfig)
        configuration = Configuration()
        configuration.retries = 0
        if document is None:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException as error:
                raise Unreachable(
                    "no kubeconfig: set kubernetes:kubeconfig or KUBECONFIG, or write ~/.kube/config"
                ) from error
            return ApiClient(configuration)
        context = self._pick_context(document)
        self._namespace = self._settings.namespace or context.get("namespace") or "default"
        _need_exec_plugin(document, context)
        with _captured_errors() as errors, contextlib.chdir(directory):
            try:
                config.load_kube_config_from_dict(
                    document, client_configuration=configuration, persist_config=False
                )
            except (config.ConfigException, KeyError, TypeError, ValueError) as error:
                raise Unreachable(f"kubeconfig: {_first_line(error)}") from error
        if errors:
            raise Unreachable(f"kubeconfig: {errors[0]}")
        return ApiClient(configuration)

    def _pick_context(self, document: Object) -> Object:
        """The context in use, with the settings' cluster put into the document."""
        if self._settings.context:
            document["current-context"] = self._settings.context
        context = active_context(document)
        if context is None:
            raise Unreachable(f"kubeconfig: there is no context {document.get('current-context')!r}")
        if self._settings.cluster:
            context["cluster"] = self._settings.cluster
        return context


def read_kubeconfig(kubeconfig: str | None) -> tuple[Object | None, Path]:
    """A kubeconfig given as contents, as a path or not at all; with the directory that its paths are relative
    to.
    """
    import yaml  # noqa: PLC0415

    source = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    directory = Path.cwd()
    text = source
    if "\n" not in source and not source.lstrip().startswith("{"):
        path = Path(source).expanduser()
        if not path.is_file():
            if kubeconfig:
                raise Unreachable(f"kubeconfig: {source!r} is neither a file nor the contents of one")
            return None, directory
        text, directory = path.read_text(), path.parent
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Unreachable(f"kubeconfig: not YAML: {_first_line(error)}") from error
    if not isinstance(document, dict) or not isinstance(document.get("clusters"), list):
        raise Unreachable("kubeconfig: it lists no clusters")
    return document, directory


def active_context(document: Object) -> Object | None:
    """The current context of a kubeconfig."""
    return _named(document.get("contexts"), document.get("current-context"), "context")


def active_cluster(document: Object, context: str | None = None, cluster: str | None = None) -> Object | None:
    """The cluster that a kubeconfig leads to, by another context or cluster where they are given."""
    name = context or document.get("current-context")
    found = _named(document.get("contexts"), name, "context")
    wanted = cluster or (found.get("cluster") if found else None)
    return _named(document.get("clusters"), wanted, "cluster")


def _named(items: Any, name: Any, key: str) -> Object | None:
    return next((item.get(key) for item in items or [] if item.get("name") == name), None)


def _need_exec_plugin(document: Object, context: Object) -> None:
    """Names a missing credential plugin, which the client would only report as a missing file."""
    user = _named(document.get("users"), context.get("user"), "user") or {}
    command = (user.get("exec") or {}).get("command")
    if command and shutil.which(command) is None:
        hint = user["exec"].get("installHint") or "install it or put it on PATH"
        raise Unreachable(f"kubeconfig: the credential plugin {command} is not there; {_first_line(hint)}")


@contextlib.contextmanager
def _captured_errors() -> Iterator[list[str]]:
    """What the official client only logs (a failed credential plugin), as a list."""
    errors: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    handler = Collect(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield errors
    finally:
        logging.getLogger().removeHandler(handler)


def _body(response: Any) -> bytes:
    """The whole answer. Raises `AwayError` when it breaks off, after the server did what it was asked to."""
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    try:
        response.read()
    except (HTTPError, OSError) as error:
        away = AwayError(f"the API server's answer broke off: {_first_line(error)}")
        away.maybe_done = True
        raise away from error
    return bytes(response.data)


def _api_error(status: int, data: bytes, host: str, pause: float) -> ProviderError:
    try:
        answer = json.loads(data)
    except ValueError:
        answer = {"message": data.decode(errors="replace").strip()}
    message = answer.get("message") or f"HTTP {status}"
    if status == 401:
        return Unreachable(f"the Kubernetes cluster at {host} does not accept the credentials: {message}")
    if status == 429 or status >= 500:
        overloaded = OverloadedError(status, answer.get("reason") or "", message)
        overloaded.maybe_done, overloaded.retry_after = status != 429, pause
        return overloaded
    return ApiError(status, answer.get("reason") or "", message)


def _type_of(kind: Kind) -> Object:
    return {"apiVersion": kind.api_version, "kind": kind.kind}


def _first_line(error: object) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]
