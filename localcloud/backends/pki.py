"""The keys and certificates of one control plane, as `kubeadm` lays them out.

Made once, below clusters/NAME/pki; every file is readable by its owner alone.
"""

from __future__ import annotations

import ipaddress
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from localcloud.home import write_private

_YEARS = timedelta(days=3650)
# Clocks of a host and its guests may differ a little.
_SKEW = timedelta(minutes=5)

ADMIN = "admin"
CONTROLLER_MANAGER = "controller-manager"
SCHEDULER = "scheduler"
CSR_APPROVER = "csr-approver"
CSR_APPROVER_USER = "system:gcp-controller-manager"
KUBELET_CLIENT_USER = "kube-apiserver-kubelet-client"


@dataclass(frozen=True)
class _Leaf:
    """A certificate to issue; `names` are its SANs, for a server."""

    file: str
    authority: str
    common_name: str
    organization: str = ""
    names: tuple[str, ...] = ()
    client: bool = True


@dataclass(frozen=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def ensure_pki(directory: Path, host: str, service_ip: str) -> None:
    """Make what is not there. All of it appears at once: a killed run leaves no half set behind."""
    if directory.exists():
        return
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    temporary.mkdir(mode=0o700)
    try:
        authorities = {name: _authority(temporary, name) for name in ("ca", "front-proxy-ca", "etcd-ca")}
        for leaf in _leaves(host, service_ip):
            _issue(temporary, authorities[leaf.authority], leaf)
        # RSA as on GKE: its service account tokens are RS256.
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        write_private(temporary / "service-account.key", _private_pem(key))
        write_private(
            temporary / "service-account.pub",
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
        )
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _leaves(host: str, service_ip: str) -> Sequence[_Leaf]:
    kubernetes = (
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    )
    return (
        _Leaf(
            "apiserver",
            "ca",
            "kube-apiserver",
            "",
            (*kubernetes, "localhost", host, service_ip),
            client=False,
        ),
        _Leaf("apiserver-kubelet-client", "ca", KUBELET_CLIENT_USER),
        _Leaf("front-proxy-client", "front-proxy-ca", "front-proxy-client"),
        _Leaf("etcd", "etcd-ca", "etcd", "", ("localhost", host)),
        _Leaf("apiserver-etcd-client", "etcd-ca", "kube-apiserver-etcd-client"),
        _Leaf(ADMIN, "ca", "kubernetes-admin", "system:masters"),
        _Leaf(CONTROLLER_MANAGER, "ca", "system:kube-controller-manager"),
        _Leaf(SCHEDULER, "ca", "system:kube-scheduler"),
        _Leaf(CSR_APPROVER, "ca", CSR_APPROVER_USER),
    )


def _authority(directory: Path, name: str) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"localcloud {name}")
    certificate = (
        _builder(subject, subject, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(directory, name, certificate, key)
    return _Authority(certificate, key)


def _issue(directory: Path, authority: _Authority, leaf: _Leaf) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH] if leaf.client else []
    if leaf.names:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    issuer_key = authority.key.public_key()
    builder = (
        _builder(_name(leaf.common_name, leaf.organization), authority.certificate.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )
    if leaf.names:
        names = x509.SubjectAlternativeName([_general_name(name) for name in leaf.names])
        builder = builder.add_extension(names, critical=False)
    _write(directory, leaf.file, builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _YEARS)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str, organization: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(
    directory: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> None:
    write_private(directory / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM))
    write_private(directory / f"{name}.key", _private_pem(key))


def _private_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
