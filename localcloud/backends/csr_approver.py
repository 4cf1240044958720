"""GKE's gcp-controller-manager in small: decides about nodes' serving certificates as Google does.

kube-controller-manager signs `kubernetes.io/kubelet-serving` but approves nothing of it: who may serve under
which name is for the cloud to say. A node's request for itself is approved if it asks for addresses of the
instance of its name, for at least one, and for no other DNS names than Google gives to that instance; with
anything else among them it is denied, without a message. A request of another kind is left as it is, for a
person to judge: so are those for client certificates. Source: cloud-provider-gcp,
cmd/gcp-controller-manager/node_csr_approver.go.

    python -m localcloud.backends.csr_approver CLUSTER PROJECT
"""

from __future__ import annotations

import base64
import ipaddress
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from localcloud.backends import pki
from localcloud.backends.kubeapi import KubeApi, KubeError
from localcloud.home import LOOPBACK, Home
from localcloud.store import Store

SIGNER = "kubernetes.io/kubelet-serving"
APPROVED = "Auto approving kubelet server certificate after SubjectAccessReview."
_USAGES = frozenset({"digital signature", "key encipherment", "server auth"})
_CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_SELECTOR = f"spec.signerName={SIGNER}"
_WATCH_SECONDS = 60
# What is damaged, or has what the parser does not know: any node may send it, and none may stop us with it.
_UNREADABLE = (
    KeyError,
    TypeError,
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Machine:
    """What an instance may be called and where it is."""

    names: frozenset[str]
    addresses: frozenset[str]


@dataclass(frozen=True)
class Decision:
    """`kind` is the condition to set, Approved or Denied, or "" to leave the request alone."""

    kind: str
    why: str


def machine_of(instance: dict[str, Any], zone: str, project: str) -> Machine:
    """Names and addresses of a Compute Engine instance."""
    addresses = set()
    for interface in instance.get("networkInterfaces", []):
        addresses |= {interface.get("networkIP", ""), interface.get("ipv6Address", "")}
        addresses |= {config.get("natIP", "") for config in interface.get("accessConfigs", [])}
        addresses |= {config.get("externalIpv6", "") for config in interface.get("ipv6AccessConfigs", [])}
    name, domain = instance["name"], f"c.{'.'.join(reversed(project.split(':')))}.internal"
    names = {name, f"{name}.{domain}", f"{name}.{zone}.{domain}"}
    return Machine(frozenset(names), frozenset(addresses - {""}))


def decide(spec: dict[str, Any], machine: Machine | None) -> Decision:
    """What becomes of a request's spec; `machine` is None where no instance has the node's name."""
    user = spec.get("username", "")
    try:
        request = x509.load_pem_x509_csr(base64.b64decode(spec["request"], validate=True))
        request.public_key()
        other = _is_another_kind(spec, request)
        if other:
            return Decision("", other)
        if machine is None:
            return Decision("Denied", f"{user} has no instance")
        lie = _names_objection(request, machine)
    except _UNREADABLE:
        return Decision("", "the request cannot be read")
    return Decision("Denied", lie) if lie else Decision("Approved", "")


def _is_another_kind(spec: dict[str, Any], request: x509.CertificateSigningRequest) -> str:
    """Why a request is not a node's for its own serving certificate; empty if it is."""
    user = spec.get("username", "")
    usages = set(spec.get("usages", []))
    if spec.get("signerName") != SIGNER or not user.startswith("system:node:"):
        return "it is not a node's request for a serving certificate"
    # Whom the cluster's roles allow `selfnodeclient`.
    if "system:nodes" not in spec.get("groups", []):
        return f"{user} is not in the group system:nodes"
    if not {"digital signature", "server auth"} <= usages <= _USAGES:
        return f"it asks for the usages {sorted(usages)}"
    organizations = [item.value for item in request.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    common_names = [item.value for item in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if organizations != ["system:nodes"] or common_names[-1:] != [user]:
        return f"the subject is {request.subject.rfc4514_string()}"
    if any(isinstance(name, x509.RFC822Name | x509.UniformResourceIdentifier) for name in _names(request)):
        return "it asks for more than DNS names and addresses"
    return ""


def _names(request: x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    try:
        return list(request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _names_objection(request: x509.CertificateSigningRequest, machine: Machine) -> str:
    addresses = [name.value for name in _names(request) if isinstance(name, x509.IPAddress)]
    if not addresses:
        return "it has no address"
    for name in _names(request):
        if isinstance(name, x509.DNSName) and name.value not in machine.names:
            return f"{name.value} is not the instance's"
    own = {ipaddress.ip_address(address) for address in machine.addresses}
    return next((f"{address} is not the instance's" for address in addresses if address not in own), "")


class Approver:
    """Looks at the pending requests of one cluster."""

    def __init__(self, api: KubeApi, store: Store, project: str) -> None:
        self._api = api
        self._store = store
        self._project = project
        self._left: set[str] = set()

    def run_once(self) -> str:
        """Judge every pending request; returns the resource version to watch from.

        Raises:
            KubeError: the API server does not answer.
        """
        listing = self._api.request("GET", f"{_CSRS}?fieldSelector={_SELECTOR}")
        for item in listing["items"]:
            if not item.get("status", {}).get("conditions"):
                self._judge(item)
        return str(listing["metadata"]["resourceVersion"])

    def wait(self, version: str) -> None:
        """Return at the next request, or after a minute."""
        for event in self._api.watch(_CSRS, version, _WATCH_SECONDS, _SELECTOR):
            if event["type"] in ("ADDED", "ERROR"):
                return

    def _judge(self, item: dict[str, Any]) -> None:
        name, spec = item["metadata"]["name"], item["spec"]
        node = spec.get("username", "").removeprefix("system:node:")
        decision = decide(spec, self._machine(node))
        if not decision.kind:
            if name not in self._left:
                self._left.add(name)
                _log("left pending", request=name, node=node, reason=decision.why)
            return
        item.setdefault("status", {})["conditions"] = [
            {
                "type": decision.kind,
                "status": "True",
                "reason": f"Auto{decision.kind}",
                # Google says nothing more to a denial than its log does.
                "message": APPROVED if decision.kind == "Approved" else "",
            }
        ]
        try:
            self._api.request("PUT", f"{_CSRS}/{name}/approval", item)
        except KubeError as error:
            if error.status not in (404, 409):  # deleted or approved meanwhile
                raise
        else:
            _log(decision.kind.lower(), request=name, node=node, reason=decision.why)

    def _machine(self, node: str) -> Machine | None:
        prefix = f"projects/{self._project}/"
        for record in self._store.list("compute.instances", prefix):
            if record.name == node:
                zone = record.key.removeprefix(f"{prefix}zones/").partition("/")[0]
                return machine_of(record.body, zone, self._project)
        return None


def main() -> None:
    cluster, project = sys.argv[1:3]
    home = Home.locate()
    directory = home.cluster(cluster)
    port = json.loads((directory / "ports.json").read_text())["apiserver"]
    api = KubeApi(f"{LOOPBACK}:{port}", directory / "pki", pki.CSR_APPROVER)
    approver = Approver(api, Store(home.store_path, read_only=True), project)
    pause = 1
    while True:
        try:
            approver.wait(approver.run_once())
            pause = 1
        except KubeError as error:
            _log("waiting for the API server", error=str(error), seconds=pause)
            time.sleep(pause)
            pause = min(30, pause * 2)


def _log(message: str, **fields: object) -> None:
    print(json.dumps({"message": message, **fields}), file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
