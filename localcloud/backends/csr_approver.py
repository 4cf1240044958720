"""GKE's gcp-controller-manager in small: approves a node's requests to renew its serving certificate.

kube-controller-manager signs `kubernetes.io/kubelet-serving` but approves nothing of it: who may serve under
which name is for the cloud to say. A request is approved if the node is Ready already (its first certificate
is for whoever made the instance to check), it asks for itself, and it asks only for names and addresses of
the instance of that name in localcloud's store. Any other request is left as it is, for a person to judge.

    python -m localcloud.backends.csr_approver CLUSTER PROJECT
"""

from __future__ import annotations

import base64
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


def machine_of(instance: dict[str, Any]) -> Machine:
    """Names and addresses of a Compute Engine instance."""
    addresses = set()
    for interface in instance.get("networkInterfaces", []):
        addresses.add(interface.get("networkIP", ""))
        addresses |= {config.get("natIP", "") for config in interface.get("accessConfigs", [])}
    names = {instance.get("name", ""), instance.get("hostname", "")}
    return Machine(frozenset(names - {""}), frozenset(addresses - {""}))


def objection(spec: dict[str, Any], machine: Machine) -> str:
    """Why a request's spec may not be approved for the machine; empty if it may."""
    user = spec.get("username", "")
    usages = set(spec.get("usages", []))
    if spec.get("signerName") != SIGNER or not user.startswith("system:node:"):
        return "it is not a node's request for a serving certificate"
    if "system:nodes" not in spec.get("groups", []):
        return f"{user} is not in the group system:nodes"
    if not {"digital signature", "server auth"} <= usages <= _USAGES:
        return f"it asks for the usages {sorted(usages)}"
    try:
        request = x509.load_pem_x509_csr(base64.b64decode(spec["request"], validate=True))
        return _subject_objection(request, user) or _names_objection(request, machine)
    except _UNREADABLE:
        return "the request cannot be read"


def _subject_objection(request: x509.CertificateSigningRequest, user: str) -> str:
    if not request.is_signature_valid:
        return "the request's signature is wrong"
    subject = sorted((attribute.oid.dotted_string, attribute.value) for attribute in request.subject)
    wanted = [
        (NameOID.COMMON_NAME.dotted_string, user),
        (NameOID.ORGANIZATION_NAME.dotted_string, "system:nodes"),
    ]
    return "" if subject == sorted(wanted) else f"the subject is {request.subject.rfc4514_string()}"


def _names_objection(request: x509.CertificateSigningRequest, machine: Machine) -> str:
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "it has no subject alternative names"
    for name in names:
        if isinstance(name, x509.DNSName) and name.value in machine.names:
            continue
        if isinstance(name, x509.IPAddress) and str(name.value) in machine.addresses:
            continue
        return f"{name.value} is not the instance's"
    return ""


class Approver:
    """Looks at the pending requests of one cluster."""

    def __init__(self, api: KubeApi, store: Store, project: str) -> None:
        self._api = api
        self._store = store
        self._project = project
        self._refused: set[str] = set()

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
        machine = self._machine(node)
        if machine is None or not self._is_ready(node):
            return
        reason = objection(spec, machine)
        if reason:
            if name not in self._refused:
                self._refused.add(name)
                _log("left pending", request=name, node=node, reason=reason)
            return
        item.setdefault("status", {})["conditions"] = [
            {
                "type": "Approved",
                "status": "True",
                "reason": "AutoApproved",
                "message": f"renewal for the instance {node}",
            }
        ]
        try:
            self._api.request("PUT", f"{_CSRS}/{name}/approval", item)
        except KubeError as error:
            if error.status not in (404, 409):  # deleted or approved meanwhile
                raise
        else:
            _log("approved", request=name, node=node)

    def _machine(self, node: str) -> Machine | None:
        prefix = f"projects/{self._project}/"
        for record in self._store.list("compute.instances", prefix):
            if record.name == node:
                return machine_of({"hostname": f"{node}.c.{self._project}.internal", **record.body})
        return None

    def _is_ready(self, node: str) -> bool:
        try:
            found = self._api.request("GET", f"/api/v1/nodes/{node}")
        except KubeError as error:
            if error.status == 404:
                return False
            raise
        conditions = found.get("status", {}).get("conditions", [])
        return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


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
