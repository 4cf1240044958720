"""Which requests for a serving certificate are approved, denied as Google denies them, and left alone."""

import base64
import ipaddress
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from localcloud.backends.csr_approver import SIGNER, Machine, decide, machine_of

ZONAL = "vm-1.europe-west1-b.c.proj.internal"
MACHINE = Machine(frozenset({"vm-1", "vm-1.c.proj.internal", ZONAL}), frozenset({"127.0.0.2"}))


def request(
    *,
    common_name: str = "system:node:vm-1",
    organization: str = "system:nodes",
    names: tuple[str, ...] = ("vm-1", "vm-1.c.proj.internal"),
    addresses: tuple[str, ...] = ("127.0.0.2",),
    unit: str = "",
    other: tuple[x509.GeneralName, ...] = (),
) -> str:
    """A PEM request in base64, as a CertificateSigningRequest carries it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    subject += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    subject += [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)] if unit else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    alternatives += other
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return base64.b64encode(pem).decode()


P256 = bytes.fromhex("2a8648ce3d030107")


def damaged(old: bytes, new: bytes) -> str:
    """A request with some bytes of its DER changed, in base64 as above."""
    der = base64.b64decode(b"".join(base64.b64decode(request()).splitlines()[1:-1]))
    assert old in der
    body = base64.encodebytes(der.replace(old, new, 1))
    pem = b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"
    return base64.b64encode(pem).decode()


def spec(**changes: Any) -> dict[str, Any]:
    return {
        "signerName": SIGNER,
        "username": "system:node:vm-1",
        "groups": ["system:nodes", "system:authenticated"],
        "usages": ["digital signature", "server auth"],
        "request": request(),
    } | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"request": request(names=(), addresses=("127.0.0.2",))},
        {"request": request(names=(ZONAL,))},
        {"request": request(unit="wasm")},
        {"usages": ["key encipherment", "digital signature", "server auth"]},
    ],
)
def test_what_is_only_the_instances_own_is_approved(changes: dict[str, Any]) -> None:
    assert decide(spec(**changes), MACHINE).kind == "Approved"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"request": request(names=("vm-2",))}, "vm-2"),
        ({"request": request(names=("vm-1.us-east1-b.c.proj.internal",))}, "us-east1-b"),
        ({"request": request(names=("vm-1", "vm-1.c.other.internal"))}, "other"),
        ({"request": request(addresses=("127.0.0.3",))}, "127.0.0.3"),
        ({"request": request(addresses=("127.0.0.2", "127.0.0.3"))}, "127.0.0.3"),
        ({"request": request(addresses=())}, "no address"),
        ({"request": request(names=(), addresses=())}, "no address"),
    ],
)
def test_what_is_not_the_instances_is_denied(changes: dict[str, Any], why: str) -> None:
    decision = decide(spec(**changes), MACHINE)
    assert decision.kind == "Denied"
    assert why in decision.why


def test_a_node_without_an_instance_is_denied() -> None:
    assert decide(spec(), None).kind == "Denied"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"signerName": "kubernetes.io/kube-apiserver-client-kubelet"}, "not a node's request"),
        ({"username": "developer"}, "not a node's request"),
        ({"groups": ["system:authenticated"]}, "system:nodes"),
        ({"usages": ["digital signature", "server auth", "client auth"]}, "usages"),
        ({"usages": ["digital signature"]}, "usages"),
        ({"request": "nonsense!"}, "cannot be read"),
        ({"request": base64.b64encode(b"no pem").decode()}, "cannot be read"),
        ({"request": damaged(P256, P256[:-1] + b"\x7f")}, "cannot be read"),
        ({"request": request(common_name="system:node:vm-2")}, "subject"),
        ({"request": request(organization="system:masters")}, "subject"),
        ({"request": request(organization="")}, "subject"),
        ({"request": request(other=(x509.UniformResourceIdentifier("https://x"),))}, "more than DNS names"),
        ({"request": request(other=(x509.RFC822Name("a@b.example"),))}, "more than DNS names"),
    ],
)
def test_a_request_of_another_kind_is_left_pending(changes: dict[str, Any], reason: str) -> None:
    decision = decide(spec(**changes), MACHINE)
    assert decision.kind == ""
    assert reason in decision.why


@pytest.mark.parametrize(("project", "domain"), [("proj", "proj"), ("example.com:proj", "proj.example.com")])
def test_an_instances_names_and_addresses_are_read_from_its_resource(project: str, domain: str) -> None:
    interface: dict[str, Any] = {"networkIP": "127.0.0.2", "accessConfigs": [{"natIP": "127.0.0.9"}, {}]}
    interface["ipv6Address"] = "fd00::1"
    body = {"name": "vm-1", "networkInterfaces": [interface]}
    names = {"vm-1", f"vm-1.c.{domain}.internal", f"vm-1.europe-west1-b.c.{domain}.internal"}
    machine = machine_of(body, "europe-west1-b", project)
    assert machine == Machine(frozenset(names), frozenset({"127.0.0.2", "127.0.0.9", "fd00::1"}))
