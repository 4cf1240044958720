"""Decides about certificate requests of a node, field by field, against the VM that Pulumi created.

Sources: Kubernetes' "TLS bootstrapping" and "Certificate Signing Requests" (what a signer asks of a request).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

# How the API server names the bearer of a bootstrap token: with its id at the end.
BOOTSTRAP_USER = "system:bootstrap:"
BOOTSTRAP_GROUP = "system:bootstrappers:krustlet"
CLIENT_SIGNER = "kubernetes.io/kube-apiserver-client-kubelet"
SERVING_SIGNER = "kubernetes.io/kubelet-serving"
NODES_GROUP = "system:nodes"
CLIENT_USAGES = (
    {"digital signature", "client auth"},
    {"digital signature", "key encipherment", "client auth"},
)
SERVING_USAGES = (
    {"digital signature", "server auth"},
    {"digital signature", "key encipherment", "server auth"},
)
# What the parser raises for a request that is damaged or has what it does not know. The API server takes
# requests from many, and parses them more loosely.
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Machine:
    """The VM that may join: its name, which is the node's, the DNS names and the addresses that it has.

    `configuration` is the one that its agent must run with, and `verification_keys` names the keys by which
    it must judge; "" for any.
    """

    name: str
    hostnames: frozenset[str]
    addresses: frozenset[str]
    configuration: str = ""
    verification_keys: str = ""


@dataclass(frozen=True)
class Verdict:
    """What to do with a certificate request: `approve`, or not, with the reason."""

    approve: bool
    reason: str


@dataclass(frozen=True)
class Request:
    """The fields of a CertificateSigningRequest that decide."""

    signer: str
    usages: frozenset[str]
    username: str
    groups: frozenset[str]
    pem: bytes
    expiration_seconds: int | None = None


def judge(request: Request, vm: Machine, asker: str) -> Verdict | None:
    """Decide about a certificate request; None when it is another node's or has another signer.

    A request is this machine's affair when it comes from `asker`, or from the node itself, or when it asks
    for this node's name. `asker` is who may ask for the first certificate: `system:bootstrap:TOKEN-ID`, or
    the address of the VM's own service account.
    """
    if request.signer not in (CLIENT_SIGNER, SERVING_SIGNER):
        return None
    node = f"system:node:{vm.name}"
    try:
        csr = x509.load_pem_x509_csr(request.pem)
        names = [str(item.value) for item in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except UNREADABLE:
        return Verdict(False, "it is no PKCS#10 request") if request.username in (asker, node) else None
    if request.username not in (asker, node) and node not in names:
        return None
    try:
        lie = _lie(request, csr, vm, asker)
    except UNREADABLE as error:
        lie = f"it cannot be read: {error}"
    return Verdict(False, lie) if lie else Verdict(True, f"it is {vm.name}'s, as created")


def is_from(request: Request, vm: Machine, asker: str) -> bool:
    """Say whether a request comes from this machine or from its node, and not only names it."""
    return request.username in (asker, f"system:node:{vm.name}")


def _lie(request: Request, csr: x509.CertificateSigningRequest, vm: Machine, asker: str) -> str:
    """Give the first thing in a request that is not as it must be, "" when there is none."""
    node = f"system:node:{vm.name}"
    subject = sorted((item.oid.dotted_string, str(item.value)) for item in csr.subject)
    wanted = sorted(
        [
            (NameOID.COMMON_NAME.dotted_string, node),
            (NameOID.ORGANIZATION_NAME.dotted_string, NODES_GROUP),
        ]
    )
    if subject != wanted:
        return f"its subject is {csr.subject.rfc4514_string()}, not CN={node},O={NODES_GROUP}"
    if not csr.is_signature_valid:
        return "its signature is wrong"
    key = csr.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) and not (
        isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048
    ):
        return "its key is neither ECDSA nor RSA of 2048 bits or more"
    unknown = [item.oid.dotted_string for item in csr.extensions if not _allowed_extension(item)]
    if unknown:
        return f"it asks for the extension {unknown[0]}"
    if request.signer == CLIENT_SIGNER:
        return _client_lie(request, csr, vm, asker)
    return _serving_lie(request, csr, vm)


def _allowed_extension(extension: x509.Extension[Any]) -> bool:
    value = extension.value
    if isinstance(value, x509.BasicConstraints):
        return not value.ca
    return isinstance(value, x509.SubjectAlternativeName | x509.KeyUsage | x509.ExtendedKeyUsage)


def _alternative_names(csr: x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    try:
        return list(csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _client_lie(request: Request, csr: x509.CertificateSigningRequest, vm: Machine, asker: str) -> str:
    is_token = asker.startswith(BOOTSTRAP_USER)
    first = request.username == asker and (not is_token or BOOTSTRAP_GROUP in request.groups)
    renewal = request.username == f"system:node:{vm.name}" and NODES_GROUP in request.groups
    if not first and not renewal:
        return f"{request.username} may not ask for this node's client certificate"
    if request.usages not in CLIENT_USAGES:
        return f"its usages are {', '.join(sorted(request.usages))}, not those of a client certificate"
    if _alternative_names(csr):
        return "a client certificate has no alternative names"
    return ""


def _serving_lie(request: Request, csr: x509.CertificateSigningRequest, vm: Machine) -> str:
    if request.username != f"system:node:{vm.name}" or NODES_GROUP not in request.groups:
        return f"{request.username} may not ask for this node's serving certificate"
    if request.usages not in SERVING_USAGES:
        return f"its usages are {', '.join(sorted(request.usages))}, not those of a serving certificate"
    names = _alternative_names(csr)
    addresses = {ipaddress.ip_address(address) for address in vm.addresses}
    for name in names:
        if isinstance(name, x509.DNSName) and name.value in vm.hostnames:
            continue
        if isinstance(name, x509.IPAddress) and name.value in addresses:
            continue
        return f"its alternative name {name.value} is not the VM's"
    # As Google's own approver, which denies such a request.
    if not any(isinstance(name, x509.IPAddress) for name in names):
        return "it has no address among its alternative names"
    return ""
