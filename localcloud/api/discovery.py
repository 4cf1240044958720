"""Google's discovery documents: which methods exist, with which parameters and which body.

The documents come with the package google-api-python-client. They are large, so that each is read when its
first request comes, and kept. Below our root a service's methods are where Google has them below its host:
`/compute/v1/…` as on www.googleapis.com, `/SERVICE/VERSION/…` for services that have a host of their own.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from localcloud.api import enums
from localcloud.api.errors import ApiError
from localcloud.store import Json

SERVED = {
    ("compute", "v1"),
    ("compute", "beta"),
    ("container", "v1"),
    ("container", "v1beta1"),
    ("artifactregistry", "v1"),
    ("artifactregistry", "v1beta2"),
    ("iam", "v1"),
    ("cloudkms", "v1"),
    ("serviceusage", "v1"),
    ("cloudresourcemanager", "v1"),
    ("cloudresourcemanager", "v3"),
}


@dataclass(frozen=True)
class Method:
    """One method of a document. `id` like `compute.instances.insert`; all `parameters` by name."""

    id: str
    http_method: str
    flat_path: str
    parameters: dict[str, Json]
    request: str | None
    response: str | None
    document: Document = field(repr=False, compare=False)

    @property
    def service(self) -> str:
        return self.document.name


class Document:
    """One version of one service."""

    def __init__(self, content: Json) -> None:
        self.name: str = content["name"]
        self.version: str = content["version"]
        self.schemas: dict[str, Json] = content["schemas"]
        enums.annotate(self.schemas)
        self._globals: dict[str, Json] = content["parameters"]
        self.prefix: str = content["servicePath"] or f"{self.name}/"
        self.methods = list(self._methods(content["resources"]))
        self._tree = _Node()
        for method in self.methods:
            self._tree.add(_segments(f"/{self.prefix}{method.flat_path}"), method)

    def _methods(self, resources: Json) -> Iterator[Method]:
        for resource in resources.values():
            for entry in resource.get("methods", {}).values():
                yield Method(
                    id=entry["id"],
                    http_method=entry["httpMethod"],
                    flat_path=entry.get("flatPath", entry["path"]),
                    parameters=self._globals | entry.get("parameters", {}),
                    request=entry.get("request", {}).get("$ref"),
                    response=entry.get("response", {}).get("$ref"),
                    document=self,
                )
            yield from self._methods(resource.get("resources", {}))

    def match(self, http_method: str, path: str) -> tuple[Method, dict[str, str]] | None:
        """The method at a path, and the values of its path's parameters as the flat path names them."""
        return self._tree.find(_segments(path), http_method, [])


class _Node:
    """A tree of path segments: literal ones first, then a parameter."""

    def __init__(self) -> None:
        self.literals: dict[str, _Node] = {}
        self.parameter: _Node | None = None
        self.methods: dict[str, Method] = {}

    def add(self, segments: list[str], method: Method) -> None:
        node = self
        for segment in segments:
            if segment.startswith("{"):
                node.parameter = node.parameter or _Node()
                node = node.parameter
            else:
                node = node.literals.setdefault(segment, _Node())
        node.methods[method.http_method] = method

    def find(
        self, segments: list[str], http_method: str, values: list[str]
    ) -> tuple[Method, dict[str, str]] | None:
        if not segments:
            method = self.methods.get(http_method)
            return None if method is None else (method, dict(zip(_names(method), values, strict=True)))
        literal = self.literals.get(segments[0])
        found = literal.find(segments[1:], http_method, values) if literal else None
        if found is None and self.parameter is not None:
            found = self.parameter.find(segments[1:], http_method, [*values, segments[0]])
        return found


def _segments(path: str) -> list[str]:
    """A path's parts; a custom verb (`…/NAME:verb`) is a part of its own."""
    parts = path.strip("/").split("/")
    last, colon, verb = parts[-1].rpartition(":")
    return [*parts[:-1], last, f":{verb}"] if colon and verb.isalpha() else parts


def _names(method: Method) -> list[str]:
    return re.findall(r"\{\+?(\w+)\}", method.flat_path)


_VERSION = re.compile(r"(v\d+\w{0,12}|alpha|beta)")
_loading = threading.Lock()


def document(name: str, version: str) -> Document:
    """One served document, read when it is first asked for.

    Raises:
        ApiError: 404, a served service has no such version; 501, a service or version that is not served.
    """
    if (name, version) not in SERVED:
        is_served = any(name == served for served, _ in SERVED)
        if not _VERSION.fullmatch(version) or (is_served and not _path(name, version).exists()):
            raise ApiError(404, f"localcloud serves no API '{name}/{version}'")
        raise ApiError(501, f"localcloud does not serve the API {name} {version}")
    with _loading:  # two first requests read it once
        return _document(name, version)


@functools.cache
def _document(name: str, version: str) -> Document:
    return Document(_read(name, version))


def match(http_method: str, path: str) -> tuple[Method, dict[str, str]]:
    """The method that answers a request line, and the values of its path's parameters.

    Raises:
        ApiError: 404, as Google answers for a path that no method has.
    """
    name, _, rest = path.strip("/").partition("/")
    found = document(name, rest.partition("/")[0]).match(http_method, path)
    if found is None:
        raise ApiError(404, f"Method not found: {http_method} {path}")
    return found


def _path(name: str, version: str) -> Path:
    package = importlib.util.find_spec("googleapiclient")
    if package is None or package.origin is None:
        raise RuntimeError("the package google-api-python-client is not installed")
    return Path(package.origin).parent / "discovery_cache" / "documents" / f"{name}.{version}.json"


def _read(name: str, version: str) -> Json:
    content: Json = json.loads(_path(name, version).read_bytes())
    return content
