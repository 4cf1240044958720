"""The one HTTP server: Google's REST, batches of it, the registry's tokens and the clusters' webhook."""

from __future__ import annotations

import contextlib
import email.parser
import email.policy
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import cast
from urllib.parse import parse_qsl, unquote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from localcloud import identity, sources
from localcloud.api import (
    artifactregistry,
    artifacts,
    cloudkms,
    discovery,
    enums,
    faults,
    iam,
    registry_tokens,
    resourcemanager,
    serviceusage,
    status_page,
    token_review,
)
from localcloud.api.auth import authenticate, authorize
from localcloud.api.compute import catalog, instance_groups, instances, machines, networks, routers
from localcloud.api.compute import common as compute
from localcloud.api.compute import operations as compute_operations
from localcloud.api.container import clusters, control_planes
from localcloud.api.container import common as container
from localcloud.api.container import operations as container_operations
from localcloud.api.errors import ApiError
from localcloud.api.faults import ControlPlanes, FaultyBackends, RequestFaults, operation_fails
from localcloud.api.masks import partial
from localcloud.api.message import LARGEST_BODY, Message, read, too_large
from localcloud.api.operations import Operations
from localcloud.api.service import TABLE, Backends, Call, Services
from localcloud.api.status_page import Seen, Status
from localcloud.api.validation import NUMERIC_ENUMS, check_body, check_path, check_query
from localcloud.api.versions import shown
from localcloud.home import Home
from localcloud.specs import PROJECT_NUMBER, BackendError
from localcloud.store import Json, Store
from localcloud.tokens import webhook_secret

logger = logging.getLogger("localcloud.api")

_VERBS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
_REQUESTS_SHOWN = 50
_SERVED_MODULES = (
    artifacts,
    cloudkms,
    compute_operations,
    instance_groups,
    routers,
    instances,
    clusters,
    resourcemanager,
    serviceusage,
)
"""Imported for what they put into the table."""


@dataclass(frozen=True)
class Reply:
    """What a request gets; nothing at all if it is lost."""

    status: int
    body: Json
    headers: tuple[tuple[str, str], ...] = ()
    is_lost: bool = False


class Api:
    """Answers requests. Every function here may be called from many threads."""

    def __init__(self, home: Home, backends: Backends) -> None:
        config = home.require_config()
        store = Store(home.store_path)
        self._seen: deque[Seen] = deque(maxlen=_REQUESTS_SHOWN)
        self._kinds = kinds = {
            compute.OPERATION: compute.finish,
            container.OPERATION: container_operations.finish,
            artifactregistry.OPERATION: artifactregistry.finish,
        }
        operations = Operations(store, self._work, kinds)
        faulty = cast("Backends", FaultyBackends(backends, store))
        self.services = Services(home, config, store, faulty, operations)
        self.control_planes = ControlPlanes(
            backends.suspend_cluster, lambda: control_planes.reconcile(self.services)
        )

    def _work(self, task: str, arguments: Json) -> Json | None:
        return TABLE.tasks[task](self.services, arguments)

    def restore(self) -> None:
        """Take up what an earlier process left, and bring the backends to what the store says."""
        services = self.services
        with services.store.transaction():
            iam.seed(services.store, services.config.project)
            networks.seed(services.store, services.config.project)
        services.operations.resume()
        for fault in faults.faults(services.store):
            # What follows brings every control plane back.
            if fault["kind"] == "no-control-plane":
                faults.clear(services.store, fault["name"])
        artifactregistry.reconcile(services)
        control_planes.reconcile(services)
        machines.reconcile(services)

    def answer(self, message: Message) -> tuple[int, Json]:
        """The status and the body that answer a request; errors too."""
        reply = self.reply(message)
        return reply.status, reply.body

    def reply(self, message: Message) -> Reply:
        """The whole answer to a request."""
        started = time.monotonic()
        name = f"{message.verb} {message.path}"
        headers: tuple[tuple[str, str], ...] = ()
        is_lost = False
        try:
            status, (body, is_lost) = 200, self._answer(message)
        except ApiError as error:
            status, body, headers = error.code, error.body(), error.headers
            logger.info("%s: %s", name, error.message)
        except BackendError as error:
            status, body = 503, ApiError(503, str(error)).body()
            logger.warning("%s: %s", name, error)
        except Exception as error:
            logger.exception("%s failed", name)
            status, body = 500, ApiError(500, f"Internal error encountered: {type(error).__name__}").body()
        lost = " (the answer is lost)" if is_lost else ""
        took = (time.monotonic() - started) * 1000
        logger.info("%s %d %.0f ms%s", name, status, took, lost)
        self._seen.append(Seen(time.time(), message.verb, message.path, status, took))
        return Reply(status, body, headers, is_lost)

    def status(self) -> Status:
        """What the status page shows."""
        services = self.services
        operations = [record for kind in self._kinds for record in services.store.list(kind)]
        machine_specs = [machines.instance_spec(record) for record in services.store.list(machines.INSTANCE)]
        return Status(
            services.config,
            services.backends.parts(),
            status_page.resources(services.store),
            status_page.latest(operations),
            tuple(self._seen),
            {spec.name: services.backends.serial_output(spec) for spec in machine_specs},
        )

    def _answer(self, message: Message) -> tuple[Json, bool]:
        """The body of an answer, and whether it is lost on its way."""
        message = read(message)
        query = parse_qsl(message.query, keep_blank_values=True)
        given = dict(query)
        principal = authenticate(
            self.services, message.headers.get("authorization", ""), given.get("access_token", "")
        )
        method, raw = discovery.match(message.verb, message.path)
        values = {name: unquote(value) for name, value in raw.items()}
        check_path(method, values)
        checked = check_query(method, query)
        path = {_short(name): value for name, value in values.items()}
        call = Call(method, path, checked, check_body(method, message.body), principal, self.services)
        self._check_project(call)
        authorize(call)
        fault = RequestFaults(self.services.store, method.id, time.sleep)
        operation_fails.set(fault.operation_fails)
        if message.verb == "GET" or method.id.endswith(".wait"):
            body = TABLE.answer(call)
        else:
            # A change sees and leaves a consistent store; its operation starts when it is kept.
            with self.services.store.transaction():
                body = compute.repeated(call) or TABLE.answer(call)
        body = self._rendered(call, body)
        mask = checked.get("fields") or message.headers.get("x-goog-fieldmask", "")
        body = partial(method, body, mask) if mask else body
        if checked.get(NUMERIC_ENUMS) and method.response and enums.are_numbered(method.service):
            body = enums.as_numbers(method.document.schemas, {"$ref": method.response}, body)
        return body, fault.answer_is_lost

    def _check_project(self, call: Call) -> None:
        """There is one project, known by its id and by its number."""
        project = call.path.get("project")
        known = self.services.config.project
        if project == PROJECT_NUMBER:
            call.path["project"] = known
        elif (
            project in (None, known)
            or (project == "-" and call.method.service == "iam")
            or (project in catalog.PUBLIC_PROJECTS and call.method.id.startswith("compute.image"))
        ):
            return
        elif call.method.service == "compute":
            raise ApiError(404, f"The resource 'projects/{project}' was not found")
        else:
            raise ApiError(403, f"Permission denied on resource project {project}.")

    @staticmethod
    def _rendered(call: Call, body: Json) -> Json:
        document = call.method.document
        render = {"compute": compute.rendered, "container": container.rendered}.get(document.name)
        rendered: Json = body if render is None else render(body, document.version)
        return shown(call.method, rendered)


def _short(name: str) -> str:
    """`projectsId`, `projectId` and `project` are one thing: `project`."""
    stem = name.removesuffix("Id")
    if stem in (name, "project"):
        return stem
    if stem.endswith("ies"):
        return f"{stem[:-3]}y"
    return stem.removesuffix("s")


def application(api: Api) -> Starlette:
    """The ASGI application."""
    build = sources.build()

    async def healthz(_request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "home": str(api.services.home.root),
                "pending": api.services.operations.pending,
                "build": build,
            }
        )

    async def certs(_request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(identity.certificates, api.services.home))

    async def status(request: Request) -> Response:
        given = request.query_params.get("key", "")
        # The name of the host too, so that no page of another site gets at it under a name of its own.
        if request.url.hostname not in ("127.0.0.1", "localhost") or not secrets.compare_digest(
            given.encode(), status_page.key(api.services.config).encode()
        ):
            text = "python -m localcloud status prints the address of this page\n"
            return Response(text, 403, status_page.HEADERS, media_type="text/plain")
        page = await run_in_threadpool(lambda: status_page.render(api.status()))
        return Response(page, 200, status_page.HEADERS, media_type="text/html")

    async def registry_token(request: Request) -> Response:
        form: Json = dict(parse_qsl((await _body(request)).decode(errors="replace")))
        scopes = [*request.query_params.getlist("scope"), *([form["scope"]] if "scope" in form else [])]
        service = request.query_params.get("service") or form.get("service", "")

        def work() -> Json:
            caller = registry_tokens.caller(api.services, request.headers.get("authorization", ""), form)
            return registry_tokens.grant(api.services, caller, service, scopes)

        try:
            return JSONResponse(await run_in_threadpool(work))
        except registry_tokens.RegistryError as error:
            logger.info("/v2/token %s: %s", " ".join(scopes), error)
            return JSONResponse(error.body, error.status)

    async def token_webhook(request: Request) -> Response:
        expected = webhook_secret(api.services.home)
        if not secrets.compare_digest(request.path_params["secret"].encode(), expected.encode()):
            return _json(404, ApiError(404, "Not found").body())
        try:
            content = json.loads(await _body(request))
            return JSONResponse(await run_in_threadpool(token_review.review, api.services, content))
        except (ValueError, AttributeError):
            return _json(400, ApiError(400, "expected a TokenReview").body())
        except ApiError as error:
            return _json(error.code, error.body())

    async def batch(request: Request) -> Response:
        message = Message("POST", "", "", await _body(request), dict(request.headers))
        try:
            content = read(message).body
        except ApiError as error:
            return _json(error.code, error.body())
        return await run_in_threadpool(_batch, api, request.headers, content)

    async def all_faults(request: Request) -> Response:
        content = await _body(request)

        def work() -> Json:
            authorization = request.headers.get("authorization", "")
            if not authenticate(api.services, authorization, "").is_developer:
                raise ApiError(403, "Only the developer may make faults.")
            return _faults(api, request.method, request.path_params.get("name", ""), content)

        try:
            return JSONResponse(await run_in_threadpool(work))
        except ApiError as error:
            return _json(error.code, error.body())

    async def rest(request: Request) -> Response:
        try:
            message = Message(
                request.method,
                request.scope["raw_path"].decode("ascii").partition("?")[0],
                request.scope["query_string"].decode("ascii"),
                await _body(request),
                dict(request.headers),
            )
        except ApiError as error:
            return _json(error.code, error.body())
        reply = await run_in_threadpool(api.reply, message)
        if reply.is_lost:
            await _cut(request)
        return _json(reply.status, reply.body, reply.headers)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await run_in_threadpool(api.restore)
        yield
        api.services.operations.close()

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route(status_page.PATH, status),
            Route("/v2/token", registry_token, methods=["GET", "POST"]),
            Route("/kubernetes/tokenreview/{secret}", token_webhook, methods=["POST"]),
            Route("/oauth2/v3/certs", certs),
            Route("/localcloud/faults", all_faults, methods=["GET", "POST", "DELETE"]),
            Route("/localcloud/faults/{name}", all_faults, methods=["DELETE"]),
            Route("/batch", batch, methods=["POST"]),
            Route("/batch/{rest:path}", batch, methods=["POST"]),
            Route("/{rest:path}", rest, methods=_VERBS),
        ],
        lifespan=lifespan,
    )


async def _cut(request: Request) -> None:
    """Break the connection of a request in place of an answer to it."""
    # The web server has no call for it: what it gives requests to read from knows the connection.
    transport = getattr(getattr(request.receive, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _faults(api: Api, method: str, name: str, content: bytes) -> Json:
    """What the server's own address for faults does: list them, make one, or clear one or all."""
    services = api.services
    if method == "GET":
        return {"faults": faults.faults(services.store)}
    if method == "DELETE":
        ended = faults.clear(services.store, name)
        api.control_planes.end(ended)
        return {"cleared": [fault["name"] for fault in ended]}
    try:
        given = json.loads(content)
        if not isinstance(given, dict):
            raise TypeError("no JSON object")  # noqa: TRY301
    except (ValueError, TypeError) as error:
        raise ApiError(400, f"a fault is a JSON object: {error}") from error
    fault = faults.add(services.store, given)
    if fault["kind"] == "no-control-plane":
        clusters = [record.name for record in services.store.list(container.CLUSTER)]
        api.control_planes.begin(services.store, fault, clusters)
    return fault


def _json(status: int, body: Json, extra: tuple[tuple[str, str], ...] = ()) -> Response:
    headers = dict(extra)
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="https://accounts.google.com/"'
    content = json.dumps(body, indent=2, ensure_ascii=False).encode() + b"\n"
    return Response(content, status, headers, media_type="application/json; charset=UTF-8")


async def _body(request: Request) -> bytes:
    """
    Raises:
        ApiError: 413, it is larger than any request that Google would take.
    """
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST_BODY:
            raise too_large()
    return content


def _batch(api: Api, headers: object, content: bytes) -> Response:
    """Several requests in one `multipart/mixed`, as gcloud and the older client libraries send them."""
    outer = dict(headers)  # type: ignore[call-overload]
    head = f"Content-Type: {outer.get('content-type', '')}\r\n\r\n".encode()
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    parts = parser.parsebytes(head + content)
    if not parts.is_multipart():
        return _json(400, ApiError(400, "The batch request is not multipart/mixed.").body())
    boundary = f"batch_{secrets.token_hex(16)}"
    answers = []
    for part in parts.iter_parts():
        inner = part.get_payload(decode=True) or b""
        status, body = api.answer(_parsed(inner if isinstance(inner, bytes) else b"", outer))
        identifier = str(part.get("Content-ID", "")).strip().removeprefix("<")
        text = json.dumps(body)
        answers.append(
            f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{identifier}\r\n\r\n"
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\n"
            f"Content-Type: application/json; charset=UTF-8\r\n\r\n{text}\r\n"
        )
    answers.append(f"--{boundary}--\r\n")
    return Response("".join(answers).encode(), media_type=f"multipart/mixed; boundary={boundary}")


def _parsed(content: bytes, outer: dict[str, str]) -> Message:
    """One request of a batch; what its headers lack, the batch's own say."""
    line, _, rest = content.lstrip().partition(b"\n")
    parsed = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(rest)
    verb, target, *_ = [*line.decode("latin-1").split(), "", ""]
    path, _, query = target.partition("?")
    headers = {name.lower(): str(value) for name, value in parsed.items()}
    body = parsed.get_payload(decode=True)
    headers.setdefault("authorization", outer.get("authorization", ""))
    return Message(verb, path, query, body if isinstance(body, bytes) else b"", headers)
