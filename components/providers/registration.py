"""Lets one VM join the cluster as a node, by Kubernetes' TLS bootstrap.

The VM asks for its certificates as its own service account, or with a bootstrap token that lives for minutes.
A request that is true is approved, one that lies is denied (certificates.py). Then the node must become
Ready, and a token is deleted, on every way out.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import string
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pulumi
from pulumi.dynamic import (
    CheckFailure,
    CheckResult,
    CreateResult,
    DiffResult,
    ReadResult,
    ResourceProvider,
    UpdateResult,
)

from components.providers import Lazy, ProviderError, changed, gone, is_unknown, operation
from components.providers.certificates import (
    BOOTSTRAP_GROUP,
    BOOTSTRAP_USER,
    CLIENT_SIGNER,
    Machine,
    Request,
    Verdict,
    is_from,
    judge,
)

if TYPE_CHECKING:
    import kubernetes
    import urllib3
else:
    kubernetes, urllib3 = Lazy("kubernetes"), Lazy("urllib3")

# The VM has to boot, fetch the agent and start it within this time; the token ends on its own a little later.
TIMEOUT = timedelta(minutes=10)
TOKEN_LIFE = TIMEOUT + timedelta(minutes=5)
POLL_SECONDS = 0.5
# An agent renews its node's lease every ten seconds.
LEASE_RENEWAL = timedelta(seconds=15)
# A pod that its node has not reported as ended this long after its grace period is on a node that cannot.
GRACE_MARGIN = timedelta(seconds=15)
ROLE_LABEL = "node-role.kubernetes.io/wasm"
WASM_LABELS = {"kubernetes.io/arch": "wasm32-wasi", "kubernetes.io/os": "wasi"}
# The agent gives it to its Node when it starts: which of the VM's configurations it runs with.
CONFIGURATION_LABEL = "krustlet.dev/configuration"
# The agent says by which keys it judges modules from now on: it takes others while it runs.
KEYS_LABEL = "krustlet.dev/verification-keys"
# The Kubernetes plugin's own switch, for a cluster that is gone for good.
DELETE_UNREACHABLE = "PULUMI_K8S_DELETE_UNREACHABLE"
# The reason of our own denials.
DENIED = "PulumiDenied"
TOKEN = re.compile(r"[a-z0-9]{6}\.[a-z0-9]{16}")


class RegistrationError(ProviderError):
    """The node did not join; the message has the last known condition."""


class DeniedError(RegistrationError):
    """Somebody else, as the cloud, denied what the node needs."""


class UnreachableError(RegistrationError):
    """Nobody answers where the API server should be."""


def generate_token() -> str:
    """Make a bootstrap token, ID.SECRET."""
    letters = string.ascii_lowercase + string.digits
    pick = [secrets.choice(letters) for _ in range(22)]
    return f"{''.join(pick[:6])}.{''.join(pick[6:])}"


def machine(props: dict[str, Any]) -> Machine:
    """Read the machine from a resource's inputs."""
    return Machine(
        props["node"],
        frozenset([props["node"], *props["hostnames"]]),
        frozenset(address for address in props["addresses"] if address),
        props.get("configuration") or "",
        props.get("verification_keys") or "",
    )


class Cluster:
    """What registration does in a cluster; `kubeconfig` is its text (JSON or YAML)."""

    def __init__(self, kubeconfig: str) -> None:
        loaded = json.loads(kubeconfig)
        api = kubernetes.config.new_client_from_config_dict(loaded, persist_config=False)
        self.core = kubernetes.client.CoreV1Api(api)
        self.certificates = kubernetes.client.CertificatesV1Api(api)
        self.leases = kubernetes.client.CoordinationV1Api(api)

    def put_token(self, token: str, description: str) -> None:
        """Make the bootstrap token known to the cluster, for minutes.

        Again with a new end when it is there.
        """
        token_id, secret = token.split(".")
        name = f"bootstrap-token-{token_id}"
        body = kubernetes.client.V1Secret(
            metadata=kubernetes.client.V1ObjectMeta(name=name, namespace="kube-system"),
            type="bootstrap.kubernetes.io/token",
            string_data={
                "description": description,
                "token-id": token_id,
                "token-secret": secret,
                "expiration": (datetime.now(UTC) + TOKEN_LIFE).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "usage-bootstrap-authentication": "true",
                "auth-extra-groups": BOOTSTRAP_GROUP,
            },
        )
        try:
            self.core.create_namespaced_secret("kube-system", body)
        except kubernetes.client.ApiException as error:
            if error.status != 409:
                raise
            self.core.replace_namespaced_secret(name, "kube-system", body)

    def delete_token(self, token: str) -> None:
        """Forget the token; one that is gone already is fine."""
        name = f"bootstrap-token-{token.partition('.')[0]}"
        with _gone_is_fine():
            self.core.delete_namespaced_secret(name, "kube-system")

    def requests(self) -> Iterator[tuple[Any, Request]]:
        """Give the certificate requests that nobody decided about."""
        for item in self.certificates.list_certificate_signing_request().items:
            conditions = item.status.conditions if item.status else None
            decided = {condition.type for condition in conditions or []}
            if decided & {"Approved", "Denied", "Failed"}:
                continue
            yield item, _request(item)

    def denials(self) -> Iterator[tuple[Any, Request, str]]:
        """Give the certificate requests that others denied or could not sign, each with why."""
        for item in self.certificates.list_certificate_signing_request().items:
            for found in (item.status.conditions if item.status else None) or []:
                if found.type in ("Denied", "Failed") and found.reason != DENIED:
                    said = ": ".join(text for text in (found.reason, found.message) if text)
                    yield item, _request(item), f"{found.type} ({said or 'no reason given'})"

    def decide(self, item: Any, verdict: Verdict) -> None:
        """Approve or deny a request; one that somebody else decided about in the meantime stays as it is."""
        kind = "Approved" if verdict.approve else "Denied"
        condition = {
            "type": kind,
            "status": "True",
            "reason": "PulumiApproved" if verdict.approve else DENIED,
            "message": verdict.reason,
        }
        item.status.conditions = [*(item.status.conditions or []), condition]
        try:
            self.certificates.replace_certificate_signing_request_approval(item.metadata.name, item)
        except kubernetes.client.ApiException as error:
            if error.status not in (404, 409):
                raise

    def node(self, name: str) -> Any | None:
        """Read a Node, None when there is none."""
        with _gone_is_fine():
            return self.core.read_node(name)
        return None

    def runs(self, name: str) -> bool:
        """Say whether somebody renews a node's lease; whose clock is another's is waited for."""
        before, deadline = self.renewed(name), time.monotonic() + LEASE_RENEWAL.total_seconds()
        if before is not None and datetime.now(UTC) - before < LEASE_RENEWAL:
            return True
        while (now := self.renewed(name)) == before and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return now != before

    def renewed(self, name: str) -> datetime | None:
        """Say when the node last renewed its lease."""
        with _gone_is_fine():
            lease = self.leases.read_namespaced_lease(name, "kube-node-lease")
            return lease.spec.renew_time if lease.spec else None
        return None

    def name_role(self, name: str) -> None:
        """Give a node its role, which it may not give itself (NodeRestriction)."""
        with _gone_is_fine():
            self.core.patch_node(name, {"metadata": {"labels": {ROLE_LABEL: ""}}})

    def drain(self, name: str, timeout: timedelta = TIMEOUT) -> None:
        """Let the node take no more pods and end those that it has, as `kubectl drain` does.

        Where other nodes take them, they end as their disruption budgets let them; where this is the only
        node of all, they end with it. Nobody ends the pods of a node whose VM is gone: they would be
        Terminating for ever. Raises RegistrationError, and lets the node take pods again, if none of the
        others is Ready, and with the pods that are still there after a time `timeout` in which none went.
        """
        evict = self._others_take_over(name)
        with _gone_is_fine():
            self.core.patch_node(name, {"spec": {"unschedulable": True}})
        end, fewest = datetime.now(UTC) + timeout, sys.maxsize
        while pods := list(self._pods_on(name)):
            now = datetime.now(UTC)
            if len(pods) < fewest:
                end, fewest = now + timeout, len(pods)
            if now > end:
                there = ", ".join(f"{pod.metadata.namespace}/{pod.metadata.name}" for pod in pods)
                with _gone_is_fine():
                    self.core.patch_node(name, {"spec": {"unschedulable": False}})
                raise RegistrationError(f"node {name} still has pods after {timeout.seconds} s: {there}")
            for pod in pods:
                until = pod.metadata.deletion_timestamp
                if until is None and evict:
                    self._evict(pod.metadata.name, pod.metadata.namespace)
                elif until is None or now > until + GRACE_MARGIN:
                    with _gone_is_fine():
                        self.core.delete_namespaced_pod(
                            pod.metadata.name,
                            pod.metadata.namespace,
                            grace_period_seconds=None if until is None else 0,
                        )
            time.sleep(POLL_SECONDS)

    def _others_take_over(self, name: str) -> bool:
        """Say whether other nodes take a node's pods. Raises RegistrationError where none of them can."""
        selector = ",".join(f"{key}={value}" for key, value in WASM_LABELS.items())
        listed: list[Any] = self.core.list_node(label_selector=selector).items
        nodes = {node.metadata.name: node for node in listed}
        own = nodes.pop(name, None)
        if own is None or not nodes or not _is_ready(own):
            return False
        if any(_is_ready(node) and not node.spec.unschedulable for node in nodes.values()):
            return True
        raise RegistrationError(
            f"node {name} is the last one that takes pods, and is not taken away under what runs on it: "
            f"{', '.join(sorted(nodes))} must be Ready first"
        )

    def _evict(self, name: str, namespace: str) -> None:
        """End a pod, unless its disruption budget has it wait until another one is Ready."""
        body = kubernetes.client.V1Eviction(
            metadata=kubernetes.client.V1ObjectMeta(name=name, namespace=namespace)
        )
        try:
            with _gone_is_fine():
                self.core.create_namespaced_pod_eviction(name, namespace, body)
        except kubernetes.client.ApiException as error:
            if error.status != 429:
                raise

    def _pods_on(self, name: str) -> Iterator[Any]:
        """Give the node's pods, without those that a DaemonSet would only make again."""
        pods: list[Any] = self.core.list_pod_for_all_namespaces(field_selector=f"spec.nodeName={name}").items
        for pod in pods:
            if not any(owner.kind == "DaemonSet" for owner in pod.metadata.owner_references or []):
                yield pod

    def delete_node(self, name: str) -> None:
        """Remove a Node; one that is gone already is fine."""
        with _gone_is_fine():
            self.core.delete_node(name)


def _is_ready(node: Any) -> bool:
    return any(item.type == "Ready" and item.status == "True" for item in node.status.conditions or [])


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except kubernetes.client.ApiException as error:
        if error.status != 404:
            raise


def _request(item: Any) -> Request:
    spec = item.spec
    return Request(
        spec.signer_name,
        frozenset(spec.usages or []),
        spec.username or "",
        frozenset(spec.groups or []),
        base64.b64decode(spec.request),
        spec.expiration_seconds,
    )


@contextmanager
def _api_errors(what: str) -> Iterator[None]:
    """Say in one line what the API server did not do."""
    try:
        yield
    except kubernetes.client.ApiException as error:
        raise RegistrationError(f"{what}: the API server answers {error.status} {_message(error)}") from None
    except (urllib3.exceptions.HTTPError, kubernetes.config.ConfigException) as error:
        raise UnreachableError(f"{what}: the API server cannot be reached: {error}") from None


@contextmanager
def _unless_given_up() -> Iterator[None]:
    """Let a cluster that nobody can reach be, where the user has given it up; else it is an error."""
    try:
        yield
    except UnreachableError as error:
        if os.environ.get(DELETE_UNREACHABLE, "").lower() not in ("1", "true"):
            raise UnreachableError(
                f"{error}; if the cluster is gone for good, {DELETE_UNREACHABLE}=true forgets what was in it"
            ) from None


def cluster_of(kubeconfig: Any) -> Any:
    """Give what tells one cluster from another, its CA, from a kubeconfig (JSON).

    An address may change, and the way to prove who one is. What is no kubeconfig (yet) stands for itself.
    """
    if is_unknown(kubeconfig):
        return kubeconfig
    try:
        return json.loads(kubeconfig)["clusters"][0]["cluster"]["certificate-authority-data"]
    except (ValueError, KeyError, IndexError, TypeError):
        return kubeconfig


def _changed(olds: dict[str, Any], news: dict[str, Any], **keys: set[str]) -> DiffResult:
    """Compare as `changed` does; a kubeconfig of another cluster replaces, and any other is an update."""
    is_another = cluster_of(olds["kubeconfig"]) != cluster_of(news["kubeconfig"])
    moved = {"kubeconfig"} if is_another else set()
    return changed(olds, news, replace=keys["replace"] | moved, update=keys["update"] | {"kubeconfig"})


def _message(error: kubernetes.client.ApiException) -> str:
    try:
        return str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def not_ready(
    node: Any | None,
    renewed: datetime | None,
    since: datetime | None,
    configuration: str = "",
    verification_keys: str = "",
) -> str:
    """Say why a node is not the Ready wasm node that is waited for, "" when it is.

    `since` is when the VM was created: a Ready condition of a former VM of the same name lives on for a
    while, so that the lease must have been renewed after it.
    """
    if node is None:
        return "there is no Node of its name yet"
    labels = node.metadata.labels or {}
    wanted = {**WASM_LABELS, CONFIGURATION_LABEL: configuration, KEYS_LABEL: verification_keys}
    for key, value in wanted.items():
        if value and labels.get(key) != value:
            return f"its label {key} is {labels.get(key)}, not {value}"
    ready = next((item for item in node.status.conditions or [] if item.type == "Ready"), None)
    if ready is None:
        return "it has no Ready condition yet"
    if ready.status != "True":
        return f"its condition is Ready={ready.status} ({ready.reason}: {ready.message})"
    if since is not None and (renewed is None or renewed < since):
        return "its lease was not renewed since the VM was created"
    return ""


def _asker(account: str, token: str) -> str:
    """Say as whom a VM asks for its first certificate: its service account, else the token's bearer."""
    return account or BOOTSTRAP_USER + token.partition(".")[0]


def join(
    cluster: Cluster,
    vm: Machine,
    token: str,
    since: datetime | None,
    *,
    account: str = "",
    timeout: timedelta = TIMEOUT,
    log: Callable[[str], None] = lambda _line: None,
) -> Any:
    """Let the machine in and wait until it is Ready; give its Node.

    It asks as its service account, given by its address, else with the token. Raises RegistrationError after
    `timeout`, with the last known condition. The token is gone afterwards, unless the API server is away at
    the end too: then it ends on its own.
    """
    asker = _asker(account, token)
    if account:
        return _ready_node(cluster, vm, asker, since, timeout=timeout, log=log)
    with _api_errors("the bootstrap token cannot be made"):
        cluster.put_token(token, f"Lets the VM {vm.name} join")
    try:
        node = _ready_node(cluster, vm, asker, since, timeout=timeout, log=log)
    except BaseException:
        # Why the node did not join matters more than what becomes of the token.
        with suppress(RegistrationError):
            _forget(cluster, token)
        raise
    _forget(cluster, token)
    return node


def _forget(cluster: Cluster, token: str) -> None:
    with _api_errors("the bootstrap token cannot be deleted"):
        cluster.delete_token(token)


def _ready_node(
    cluster: Cluster,
    vm: Machine,
    asker: str,
    since: datetime | None,
    *,
    timeout: timedelta,
    log: Callable[[str], None],
) -> Any:
    """Decide about the machine's requests until it is Ready; give its Node."""
    end = time.monotonic() + timeout.total_seconds()
    denied = ""
    trouble = "nothing was heard of it"
    # What an earlier attempt met is no news: the agent asks again.
    known: set[str] | None = None
    while time.monotonic() < end:
        try:
            with _api_errors(f"{vm.name} is waited for"):
                denied = _decide_all(cluster, vm, asker, log) or denied
                known = _no_new_denial(cluster, vm, asker, known)
                node = cluster.node(vm.name)
                renewed = cluster.renewed(vm.name)
                trouble = not_ready(node, renewed, since, vm.configuration, vm.verification_keys)
                if not trouble:
                    cluster.name_role(vm.name)
                    return node
        except DeniedError:
            raise
        except RegistrationError as error:
            # An API server that restarts is no reason to give up before the time is over.
            trouble = str(error)
        time.sleep(POLL_SECONDS)
    last = f"{trouble}; {denied}" if denied else trouble
    raise RegistrationError(
        f"{vm.name} is not Ready after {timeout.total_seconds():.0f} s: {last}. "
        "The VM's serial console has the log of its startup script"
    )


def _no_new_denial(cluster: Cluster, vm: Machine, asker: str, known: set[str] | None) -> set[str]:
    """Give the uids of the machine's requests that others denied.

    Raises DeniedError for one that is not `known`.
    """
    denials = {
        item.metadata.uid: f"the request {item.metadata.name} for {request.signer} is {why}"
        for item, request, why in cluster.denials()
        if is_from(request, vm, asker)
    }
    new = [said for uid, said in denials.items() if known is not None and uid not in known]
    if new:
        raise DeniedError(f"{vm.name} cannot join: {new[0]}; the cluster's own approver decided so")
    return set(denials)


def _decide_all(cluster: Cluster, vm: Machine, asker: str, log: Callable[[str], None]) -> str:
    """Decide about each open request of this machine; give the last refusal, "" when there was none."""
    refused = ""
    for item, request in cluster.requests():
        verdict = judge(request, vm, asker)
        if verdict is None:
            continue
        cluster.decide(item, verdict)
        word = "approved" if verdict.approve else "denied"
        log(f"{item.metadata.name} ({request.signer}) is {word}: {verdict.reason}")
        if not verdict.approve:
            refused = f"the request {item.metadata.name} was denied: {verdict.reason}"
    return refused


def _waiting(cluster: Cluster, vm: Machine, asker: str) -> list[str]:
    """Give the names of the machine's requests that would be approved and that nobody else approves soon."""
    try:
        return sorted(
            item.metadata.name
            for item, request in cluster.requests()
            if request.signer == CLIENT_SIGNER and (verdict := judge(request, vm, asker)) and verdict.approve
        )
    except kubernetes.client.ApiException as error:
        if error.status != 403:
            raise
        # Whoever may only look at the cluster, as a preview in CI, approves none either.
        return []


class BootstrapTokenProvider(ResourceProvider):
    """CRUD of a node's claim to join.

    The token is a value in the state; the cluster knows it only while the node joins. This resource is there
    before the VM and outlives it, so that its delete is the one that finds no agent which would put the Node
    back.
    """

    serialize_as_secret_always = False

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Another node and another cluster have another token; how to reach the cluster may change."""
        return _changed(olds, news, replace={"node"}, update=set())

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Make the token."""
        return CreateResult(props["node"], {**props, "token": generate_token()})

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """Nothing outside of the state can change it."""
        return ReadResult(id_, props)

    @operation
    def update(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        """Keep the token."""
        return UpdateResult({**news, "token": olds["token"]})

    @operation
    def delete(self, _id: str, props: dict[str, Any]) -> None:
        """Remove what is left in the cluster.

        The token, and a Node that the agent put back before its VM ended.
        """
        with _unless_given_up(), _api_errors(f"what is left of the node {props['node']} cannot be removed"):
            cluster = Cluster(props["kubeconfig"])
            cluster.delete_token(props["token"])
            cluster.delete_node(props["node"])


class BootstrapToken(pulumi.dynamic.Resource, module="registration", name="BootstrapToken"):
    """A random bootstrap token, ID.SECRET; `token` is a secret."""

    token: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        node: pulumi.Input[str],
        kubeconfig: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Make a token for the node of this name in the cluster of this kubeconfig (JSON)."""
        super().__init__(
            BootstrapTokenProvider(),
            resource_name,
            {"node": node, "kubeconfig": pulumi.Output.secret(kubeconfig), "token": None},
            pulumi.ResourceOptions.merge(
                opts, pulumi.ResourceOptions(additional_secret_outputs=["token", "kubeconfig"])
            ),
        )


def _joined(props: dict[str, Any]) -> Any:
    created = props.get("created")
    with _api_errors("the cluster cannot be reached"):
        cluster = Cluster(props["kubeconfig"])
    since = datetime.fromisoformat(created) if created else None
    return join(cluster, machine(props), props["token"], since, account=props.get("account") or "")


class NodeRegistrationProvider(ResourceProvider):
    """CRUD of a node's membership."""

    serialize_as_secret_always = False

    @operation
    def check(self, _olds: dict[str, Any], news: dict[str, Any]) -> CheckResult:
        """Check the token's form."""
        token = news["token"]
        if not is_unknown(token) and not TOKEN.fullmatch(token):
            return CheckResult(
                news, [CheckFailure("token", "a bootstrap token is ID.SECRET, [a-z0-9]{6}.[a-z0-9]{16}")]
            )
        return CheckResult(news, [])

    @operation
    def diff(self, _id: str, olds: dict[str, Any], news: dict[str, Any]) -> DiffResult:
        """Another VM has to join anew, and so has a VM in another cluster.

        One in the place of a VM that was gone joins as the Node that is there and takes its pods, since
        nobody is there who would end them: a refresh has seen that, or the VM is there before this one is
        asked. Names and addresses count only while it joins; another configuration and other keys are waited
        for, and a request for a certificate that waits is decided about.
        """
        is_planned = is_unknown(news["instance"]) and bool(olds["instance"])
        ended = {"node", "instance"} if is_planned else {"node"}
        waited = {"instance", "configuration", "verification_keys"} - ended
        result = _changed(olds, news, replace=ended, update=waited)
        result.changes = result.changes or bool(olds.get("waiting_requests"))
        # The new Node has the old one's name.
        result.delete_before_replace = True
        return result

    @operation
    def create(self, props: dict[str, Any]) -> CreateResult:
        """Let the VM in."""
        return CreateResult(props["node"], {**props, "uid": _joined(props).metadata.uid})

    @operation
    def read(self, id_: str, props: dict[str, Any]) -> ReadResult:
        """Look for the Node; one that was deleted and came back has to be let in again.

        One that nobody runs any more has no `instance` until the next join.
        True requests of it that wait, as a renewal on GKE, whose approver decides about none, are drift in
        `waiting_requests`. An API server that is away is an error.
        """
        waiting, runs = None, True
        with _unless_given_up(), _api_errors(f"the Node {props['node']} cannot be read"):
            cluster = Cluster(props["kubeconfig"])
            node = cluster.node(props["node"])
            if node is not None and node.metadata.uid == props["uid"]:
                asker = _asker(props.get("account") or "", props["token"])
                waiting = _waiting(cluster, machine(props), asker)
                runs = bool(props["instance"]) and cluster.runs(props["node"])
        if waiting is None:
            return gone()
        known = {key: value for key, value in props.items() if key != "waiting_requests"}
        seen = {"waiting_requests": waiting} if waiting else {}
        return ReadResult(id_, known | seen | ({} if runs else {"instance": ""}))

    @operation
    def update(self, _id: str, _olds: dict[str, Any], news: dict[str, Any]) -> UpdateResult:
        """Wait until the VM's agent runs with the new configuration, and judges by the new keys.

        What it asks for meanwhile, or has asked for before, is decided about.
        """
        return UpdateResult({**news, "uid": _joined(news).metadata.uid})

    @operation
    def delete(self, _id: str, props: dict[str, Any]) -> None:
        """End the node's pods, while it is there to end them, and remove the Node."""
        with _unless_given_up(), _api_errors(f"the Node {props['node']} cannot be deleted"):
            cluster = Cluster(props["kubeconfig"])
            cluster.drain(props["node"])
            cluster.delete_node(props["node"])


class NodeRegistration(pulumi.dynamic.Resource, module="registration", name="NodeRegistration"):
    """A VM that joined and is Ready; `uid` is its Node's."""

    node: pulumi.Output[str]
    instance: pulumi.Output[str]
    uid: pulumi.Output[str]
    configuration: pulumi.Output[str]
    verification_keys: pulumi.Output[str]

    def __init__(
        self,
        resource_name: str,
        *,
        node: pulumi.Input[str],
        instance: pulumi.Input[str],
        created: pulumi.Input[str],
        hostnames: pulumi.Input[Sequence[str]],
        addresses: Sequence[pulumi.Input[str]],
        configuration: pulumi.Input[str],
        verification_keys: pulumi.Input[str],
        token: pulumi.Input[str],
        account: pulumi.Input[str],
        kubeconfig: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Wait for the VM `instance` (Google's numeric id), `created` then (RFC 3339), to join as `node`.

        `hostnames` and `addresses` are what its serving certificate may be for, besides `node` itself;
        `configuration` is what its agent must run with, `verification_keys` names the keys by which it must
        judge. It asks for its first certificate as `account`, or with the token where that is "".
        """
        super().__init__(
            NodeRegistrationProvider(),
            resource_name,
            {
                "node": node,
                "instance": instance,
                "created": created,
                "hostnames": hostnames,
                "addresses": addresses,
                "configuration": configuration,
                "verification_keys": verification_keys,
                "token": pulumi.Output.secret(token),
                "account": account,
                "kubeconfig": pulumi.Output.secret(kubeconfig),
                "uid": None,
            },
            pulumi.ResourceOptions.merge(
                opts, pulumi.ResourceOptions(additional_secret_outputs=["token", "kubeconfig"])
            ),
        )
