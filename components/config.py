"""The stack's configuration: read once, typed, and checked before any resource exists.

Types, defaults and descriptions of the keys are in Pulumi.yaml; the rules that a value must keep are here.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pulumi
from pulumi.runtime.config import CONFIG, get_config_env

from components.providers.kms import KmsError, is_reference, version_name
from components.providers.signature import SignatureError, read_key

# Registries that answer to Container Registry's old names, and the location that each must have. Source:
# Artifact Registry's documentation, "Transition from Container Registry".
GCR_LOCATIONS = {"gcr.io": "us", "us.gcr.io": "us", "eu.gcr.io": "europe", "asia.gcr.io": "asia"}
# How a VM proves who it is when it joins: as its own service account, or with a bootstrap token.
BY_IDENTITY, BY_TOKEN = "identity", "token"
RELEASE_CHANNELS = ("RAPID", "REGULAR", "STABLE", "EXTENDED")

# Registry and Kubernetes API are reached with the application default credentials; so then is all the rest.
_LOGIN = "gcloud auth application-default login"
_KEY_FILE = "set GOOGLE_APPLICATION_CREDENTIALS to the key's file, which every part reads"
_CREDENTIALS = {
    "credentials": _KEY_FILE,
    "accessToken": f"run `{_LOGIN}`, whose credentials every part takes",
    "impersonateServiceAccount": f"run `{_LOGIN} --impersonate-service-account=ACCOUNT`",
}

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# Namespaces that are Kubernetes' or GKE's own. Source: Kubernetes' documentation, "Namespaces".
_NOT_OURS = re.compile(r"default|(kube|gke|gmp)-.*")
_CLUSTER_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_LOCATION = re.compile(r"[a-z]+(-[a-z]+[0-9]+)?")
_REGION = re.compile(r"[a-z]+-[a-z]+[0-9]+")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]")
_MEMORY = re.compile(r"[1-9][0-9]*(Ki|Mi|Gi|k|M|G)?")
_CPU = re.compile(r"[1-9][0-9]*m|[1-9][0-9]*(\.[0-9]+)?|0\.[0-9]*[1-9][0-9]*")
_TIME_OF_DAY = re.compile(r"|([01][0-9]|2[0-3]):[0-5][0-9]")
_RUST_TARGET = re.compile(r"|[a-z0-9_.]+(-[a-z0-9_.]+){1,3}")
_WORD = re.compile(r"[A-Za-z0-9._/-]+")
NAME_RULE = (
    "a lower-case letter, then up to 62 lower-case letters, digits and hyphens, not ending in a hyphen"
)


class ConfigError(pulumi.RunError):
    """A value cannot be used; the CLI shows the message, which is one line, and no traceback."""

    def __init__(self, key: str, given: object, allowed: str) -> None:
        super().__init__(f"configuration {key}: {given!r} was given; allowed: {allowed}")


@dataclass(frozen=True)
class GoogleConfig:
    """Where on Google Cloud the stack lives, and whether it enables the APIs that it needs."""

    project: str
    region: str
    zone: str
    enable_services: bool


@dataclass(frozen=True)
class RegistryConfig:
    """The Artifact Registry repository."""

    name: str
    location: str


@dataclass(frozen=True)
class NetworkConfig:
    """The stack's own network: CIDRs of machines, pods and services, and who may reach the app.

    Without `external_ip` its machines have addresses of the network alone.
    `wasm_pods` are the addresses of the WebAssembly pods; it is empty where those have none of their own.
    """

    machines: str
    pods: str
    services: str
    wasm_pods: str
    sources: tuple[str, ...]
    external_ip: bool


@dataclass(frozen=True)
class ClusterConfig:
    """The GKE cluster and its small pool for the cluster's own pods."""

    name: str
    release_channel: str
    machine_type: str
    nodes: int
    deletion_protection: bool
    authorized_networks: tuple[str, ...]
    maintenance_window: str


@dataclass(frozen=True)
class NodeConfig:
    """The VM that runs Krustlet.

    `pod_range` is how much of the WebAssembly pods' addresses it gets, a mask as in /22; empty for none.
    """

    name: str
    machine_type: str
    boot_image: str
    disk_size_gb: int
    max_pods: int
    pod_range: str
    agent_crate: str
    agent_target: str
    bootstrap: str


@dataclass(frozen=True)
class AppConfig:
    """The WebAssembly app and its pod."""

    crate: str
    name: str
    port: int
    namespace: str
    memory_limit: str
    cpu_limit: str


@dataclass(frozen=True)
class StackConfig:
    """Everything that a stack is configured with.

    `signing_key` is None where one is to be generated, and where `kms_key` names one (`gcpkms://…`).
    """

    google: GoogleConfig
    registry: RegistryConfig
    network: NetworkConfig
    cluster: ClusterConfig
    node: NodeConfig
    app: AppConfig
    signing_key: pulumi.Output[str] | None
    signing_key_password: pulumi.Output[str] | None
    kms_key: str | None


class _Reader:
    """Reads keys of one namespace and names them in errors as `pulumi config set` does."""

    def __init__(self, config: pulumi.Config, prefix: str = "") -> None:
        self._config = config
        self._prefix = prefix
        self._read = set[str]()

    def check_names(self) -> None:
        """Refuse a key that nobody has read: its value would be lost without a word."""
        prefix = f"{self._config.name}:"
        given = {*CONFIG.get(), *get_config_env()}
        for key in sorted(key.removeprefix(prefix) for key in given if key.startswith(prefix)):
            if key not in self._read:
                # By the letters alone, so that memorylimit is memoryLimit.
                spelled = {known.lower(): known for known in self._read}
                near = difflib.get_close_matches(key.lower(), spelled, n=1)
                hint = f"did you mean {spelled[near[0]]}? " if near else ""
                raise pulumi.RunError(
                    f"configuration {key}: there is no such key; {hint}`pulumi config rm {key}` removes it"
                )

    def _given(self, key: str, get: Callable[[str], Any], allowed: str) -> Any:
        self._read.add(key)
        try:
            value = get(key)
        except (pulumi.ConfigTypeError, ValueError):
            raise self.error(key, self._config.get(key), allowed) from None
        if value is None:
            raise self.error(key, None, allowed)
        return value

    def error(self, key: str, given: object, allowed: str) -> ConfigError:
        return ConfigError(f"{self._prefix}{key}", given, allowed)

    def text(self, key: str, pattern: re.Pattern[str], allowed: str) -> str:
        value = cast(str, self._given(key, self._config.get, allowed))
        if not pattern.fullmatch(value):
            raise self.error(key, value, allowed)
        return value

    def one_of(self, key: str, values: tuple[str, ...]) -> str:
        allowed = ", ".join(values)
        value = cast(str, self._given(key, self._config.get, allowed))
        if value not in values:
            raise self.error(key, value, allowed)
        return value

    def integer(self, key: str, least: int, most: int) -> int:
        allowed = f"a whole number from {least} to {most}"
        value = cast(int, self._given(key, self._config.get_int, allowed))
        if not least <= value <= most:
            raise self.error(key, value, allowed)
        return value

    def boolean(self, key: str) -> bool:
        return cast(bool, self._given(key, self._config.get_bool, "true or false"))

    def network(self, key: str, longest: int) -> str:
        allowed = f"a private IPv4 network, as in 10.0.0.0/16, with a prefix of at most {longest} bits"
        value = cast(str, self._given(key, self._config.get, allowed))
        try:
            network = ipaddress.IPv4Network(value)
        except ValueError:
            raise self.error(key, value, allowed) from None
        if not network.is_private or network.prefixlen > longest:
            raise self.error(key, value, allowed)
        # Google takes neither for a network, and Kubernetes neither for an endpoint of a Service.
        if network.is_loopback or network.is_link_local:
            raise self.error(key, value, f"{allowed}, and neither loopback nor link-local")
        return value

    def networks(self, key: str) -> tuple[str, ...]:
        # A firewall rule of Google's takes the one or the other.
        allowed = "a list of networks in CIDR form, at least one, all of IPv4 or all of IPv6"
        values = self._given(key, self._config.get_object, allowed)
        if not isinstance(values, list) or not values:
            raise self.error(key, values, allowed)
        versions = set()
        for value in values:
            try:
                # A number would be taken for an address.
                versions.add(ipaddress.ip_network(str(value)).version)
            except ValueError:
                raise self.error(key, value, allowed) from None
        if len(versions) > 1:
            raise self.error(key, values, allowed)
        return tuple(values)

    def cidrs(self, key: str) -> tuple[str, ...]:
        allowed = "a list of IPv4 networks in CIDR form, or an empty one"
        values = self._given(key, self._config.get_object, allowed)
        if not isinstance(values, list):
            raise self.error(key, values, allowed)
        for value in values:
            try:
                ipaddress.IPv4Network(str(value))  # a number would be taken for an address
            except ValueError:
                raise self.error(key, value, allowed) from None
        return tuple(values)

    def crate(self, key: str) -> str:
        allowed = "a directory with a Cargo.toml, relative to Pulumi.yaml"
        value = cast(str, self._given(key, self._config.get, allowed))
        if not (Path(value) / "Cargo.toml").is_file():
            raise self.error(key, value, allowed)
        return value

    def refuse(self, key: str, allowed: str) -> None:
        """Take no value, which may be a secret, for a key."""
        if self._config.get(key):
            raise self.error(key, "[a value]", allowed)

    def secret(self, key: str) -> pulumi.Output[str] | None:
        self._read.add(key)
        return self._config.get_secret(key) if self._config.get(key) else None

    def kms_key(self, key: str) -> str | None:
        """Give the reference of a key in Cloud KMS, where that is the key."""
        reference = self._config.get(key) or ""
        if not is_reference(reference):
            return None
        try:
            version_name(reference)
        except KmsError as error:
            raise self.error(key, reference, str(error)) from None
        return reference

    def check_signing_key(self, key: str, password: str) -> None:
        """Read the key, and show nothing of it or of what went wrong inside it."""
        pem = self._config.get(key)
        if not pem:
            return
        try:
            read_key(pem, self._config.get(password) or "")
        except SignatureError as error:
            raise self.error(key, "[secret]", str(error)) from None


def load() -> StackConfig:
    """Read and check the configuration. Raises ConfigError for the first value that cannot be used."""
    keys = _Reader(pulumi.Config())
    max_pods = keys.integer("maxPods", 1, 10000)
    network = _network(keys, max_pods)
    kms_key = keys.kms_key("signingKey")
    if kms_key is None:
        keys.check_signing_key("signingKey", "signingKeyPassword")
    signing_key, signing_key_password = keys.secret("signingKey"), keys.secret("signingKeyPassword")
    config = StackConfig(
        google=_google(_Reader(pulumi.Config("gcp"), "gcp:"), keys.boolean("enableServices")),
        registry=_registry(keys),
        network=network,
        cluster=ClusterConfig(
            name=keys.text("clusterName", _CLUSTER_NAME, NAME_RULE.replace("62", "39")),
            release_channel=keys.one_of("releaseChannel", RELEASE_CHANNELS),
            machine_type=keys.text("clusterMachineType", _WORD, "a machine type, as in e2-small"),
            nodes=keys.integer("clusterNodes", 1, 100),
            deletion_protection=keys.boolean("deletionProtection"),
            authorized_networks=keys.cidrs("authorizedNetworks"),
            maintenance_window=keys.text(
                "maintenanceWindow", _TIME_OF_DAY, "a time of day in GMT, as in 03:00, or nothing"
            ),
        ),
        node=NodeConfig(
            name=keys.text("nodeName", _DNS_LABEL, NAME_RULE),
            machine_type=keys.text("machineType", _WORD, "a machine type, as in e2-small"),
            boot_image=keys.text("bootImage", _WORD, "an image or family, as in debian-cloud/debian-12"),
            disk_size_gb=keys.integer("diskSizeGb", 10, 65536),
            max_pods=max_pods,
            pod_range=f"/{_pod_prefix(max_pods)}" if network.wasm_pods else "",
            agent_crate=keys.crate("agentCrate"),
            agent_target=keys.text(
                "agentTarget", _RUST_TARGET, "a Rust target, or nothing for this machine's"
            ),
            bootstrap=keys.one_of("bootstrap", (BY_IDENTITY, BY_TOKEN)),
        ),
        app=AppConfig(
            crate=keys.crate("appCrate"),
            name=keys.text("appName", _DNS_LABEL, NAME_RULE),
            port=_app_port(keys),
            namespace=_namespace(keys),
            memory_limit=keys.text("memoryLimit", _MEMORY, "an amount of bytes, as in 64Mi"),
            cpu_limit=keys.text("cpuLimit", _CPU, "an amount of CPUs, as in 500m or 1"),
        ),
        signing_key=None if kms_key else signing_key,
        signing_key_password=None if kms_key else signing_key_password,
        kms_key=kms_key,
    )
    keys.check_names()
    return config


def _namespace(keys: _Reader) -> str:
    name = keys.text("namespace", _DNS_LABEL, NAME_RULE)
    if _NOT_OURS.fullmatch(name):
        raise keys.error(
            "namespace", name, "a namespace for this app alone, which is created and deleted with the stack"
        )
    return name


def _google(keys: _Reader, enable_services: bool) -> GoogleConfig:
    for key, instead in _CREDENTIALS.items():
        keys.refuse(key, f"nothing, because it would reach the gcp plugin alone; {instead}")
    project = keys.text("project", _PROJECT, "the id of a Google Cloud project")
    region = keys.text("region", _REGION, "a region, as in europe-west1")
    zone = keys.text("zone", _ZONE, "a zone of the region, as in europe-west1-b")
    if not zone.startswith(f"{region}-"):
        raise keys.error("zone", zone, f"a zone of the region {region}, as in {region}-b")
    return GoogleConfig(project, region, zone, enable_services)


def _registry(keys: _Reader) -> RegistryConfig:
    name = keys.one_of("registryName", tuple(GCR_LOCATIONS)) if _is_gcr(keys) else _registry_name(keys)
    location = keys.text("registryLocation", _LOCATION, "a region or us, europe, asia")
    if name in GCR_LOCATIONS and location != GCR_LOCATIONS[name]:
        raise keys.error(
            "registryLocation", location, f"{GCR_LOCATIONS[name]}, the only one where {name} can be"
        )
    return RegistryConfig(name, location)


def _is_gcr(keys: _Reader) -> bool:
    return keys.text("registryName", re.compile(".*"), "a name").endswith("gcr.io")


def _registry_name(keys: _Reader) -> str:
    return keys.text("registryName", _DNS_LABEL, f"{NAME_RULE}; or {', '.join(GCR_LOCATIONS)}")


def _pod_prefix(max_pods: int) -> int:
    """Give the prefix of a node's range: twice as many addresses as pods, so that one that has just become
    free can rest, and no less than a /24. Source: GKE's documentation, "Flexible Pod CIDR".
    """
    return min(24, 32 - (2 * max_pods - 1).bit_length())


def _network(keys: _Reader, max_pods: int) -> NetworkConfig:
    named = {
        "networkCidr": keys.network("networkCidr", 29),
        "podCidr": keys.network("podCidr", 24),
        "serviceCidr": keys.network("serviceCidr", 27),
    }
    wasm_pods = keys.text("wasmPodCidr", re.compile(".*"), "a private IPv4 network, or nothing")
    if wasm_pods:
        # What the VM gets of it has to fit.
        named["wasmPodCidr"] = keys.network("wasmPodCidr", _pod_prefix(max_pods))
    seen: list[tuple[str, str]] = []
    for key, value in named.items():
        for other, taken in seen:
            if ipaddress.IPv4Network(value).overlaps(ipaddress.IPv4Network(taken)):
                raise keys.error(key, value, f"a network apart from {other}, which is {taken}")
        seen.append((key, value))
    return NetworkConfig(
        named["networkCidr"],
        named["podCidr"],
        named["serviceCidr"],
        wasm_pods,
        keys.networks("sourceRanges"),
        keys.boolean("externalIp"),
    )


def _app_port(keys: _Reader) -> int:
    port = keys.integer("appPort", 1, 65535)
    if port == AGENT_PORT:
        raise keys.error("appPort", port, f"any port but {AGENT_PORT}, which is the node agent's own")
    return port


# The kubelet's port, where the API server looks for logs.
AGENT_PORT = 10250
