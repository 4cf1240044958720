"""The stack's configuration: read once, typed, and checked before any resource exists.

Types, defaults and descriptions of the keys are in Pulumi.yaml; the rules that a value must keep are here.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass, replace

import pulumi
from pulumi.runtime.config import CONFIG, get_config_env, is_config_secret

from components.reader import NAME_RULE, Reader

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
# An account's id has 30 characters, of which `-node` and a number of the node's take their part.
_LONGEST_SHARED_NAME = 22
# What an app has where it does not say otherwise; the first one needs no name and no crate either.
_APP = {"port": 8080, "memoryLimit": "64Mi", "cpuLimit": "500m", "environment": {}, "allowedHosts": []}
_FIRST_APP = {"name": "primorial", "crate": "wasm_app", **_APP}
_AUTOSCALING = {"minReplicas": 1, "cpu": 80}
# Keys of the time when there was one app, and the field of it that each is now.
_FORMER = {
    "appName": "name",
    "appCrate": "crate",
    "appPort": "port",
    "memoryLimit": "memoryLimit",
    "cpuLimit": "cpuLimit",
}


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
    """A VM that runs Krustlet.

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
class AutoscalingConfig:
    """How many pods an app has; `cpu` is how much of its limit each of them is to use, percent."""

    min_replicas: int
    max_replicas: int
    cpu: int


@dataclass(frozen=True)
class AppConfig:
    """A WebAssembly app. `replicas` is None of a single pod, which is on its port at the node's address."""

    name: str
    crate: str
    port: int
    memory_limit: str
    cpu_limit: str
    environment: dict[str, str]
    allowed_hosts: tuple[str, ...]
    replicas: int | None
    autoscaling: AutoscalingConfig | None


@dataclass(frozen=True)
class StackConfig:
    """Everything that a stack is configured with.

    `signing_key` is None where one is to be generated, and where `kms_key` names one (`gcpkms://…`).
    """

    google: GoogleConfig
    registry: RegistryConfig
    network: NetworkConfig
    cluster: ClusterConfig
    nodes: tuple[NodeConfig, ...]
    namespace: str
    apps: tuple[AppConfig, ...]
    signing_key: pulumi.Output[str] | None
    signing_key_password: pulumi.Output[str] | None
    kms_key: str | None


def load() -> StackConfig:
    """Read and check the configuration. Raises ConfigError for the first value that cannot be used."""
    config = pulumi.Config()
    keys = Reader(config)
    _refuse_former(config)
    max_pods, count = keys.integer("maxPods", 1, 10000), keys.integer("nodes", 1, MOST_NODES)
    network = _network(keys, max_pods, count)
    kms_key = keys.kms_key("signingKey")
    if kms_key is None:
        keys.check_signing_key("signingKey", "signingKeyPassword")
    signing_key, signing_key_password = keys.secret("signingKey"), keys.secret("signingKeyPassword")
    loaded = StackConfig(
        google=_google(Reader(pulumi.Config("gcp"), "gcp:"), keys.boolean("enableServices")),
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
        nodes=_nodes(keys, network, max_pods, count),
        namespace=_namespace(keys),
        apps=read_apps(keys, network),
        signing_key=None if kms_key else signing_key,
        signing_key_password=None if kms_key else signing_key_password,
        kms_key=kms_key,
    )
    given = (name.partition(":") for name in {*CONFIG.get(), *get_config_env()})
    keys.check_names(key for namespace, _, key in given if namespace == config.name)
    return loaded


def _refuse_former(config: pulumi.Config) -> None:
    """Say what takes the place of a key that is no longer one."""
    for key, field in _FORMER.items():
        if (value := config.get(key)) is not None:
            instead = f"pulumi config set --path 'apps[0].{field}' {' '.join(shlex.quote(value).split())}"
            raise pulumi.RunError(
                f"configuration {key}: it is apps[0].{field} now; `{instead}`, then `pulumi config rm {key}`"
            )


def read_apps(keys: Reader, network: NetworkConfig) -> tuple[AppConfig, ...]:
    """Read the apps. Names are one app's each, and so are ports at the node's address."""
    if is_config_secret(f"{pulumi.get_project()}:apps"):
        raise keys.error("apps", "[secret]", "plain values, because everybody sees them who sees the pods")
    values = keys.items("apps", "a list of apps, at least one")
    if not values:
        raise keys.error("apps", values, "at least one app")
    apps: list[AppConfig] = []
    for number, value in enumerate(values):
        prefix = f"apps[{number}]"
        fields = keys.fields(prefix, value, _APP if number else _FIRST_APP, "an object, as in {name: …}")
        app = _app(fields, network)
        fields.check_names(value)
        for other, earlier in enumerate(apps):
            if app.name == earlier.name:
                raise fields.error("name", app.name, f"a name apart from that of apps[{other}]")
            if app.port == earlier.port and app.replicas is None and earlier.replicas is None:
                raise fields.error(
                    "port", app.port, f"a port of the node's that apps[{other}] does not have, or replicas"
                )
        apps.append(app)
    return tuple(apps)


def _app(fields: Reader, network: NetworkConfig) -> AppConfig:
    name = fields.text("name", _DNS_LABEL, NAME_RULE)
    if name == AGENT_IMAGE:
        raise fields.error("name", name, "any but that, which is the name of the node agent's image")
    autoscaling = _autoscaling(fields)
    app = AppConfig(
        name=name,
        crate=fields.crate("crate"),
        port=fields.integer("port", 1, 65535),
        memory_limit=fields.text("memoryLimit", _MEMORY, "an amount of bytes, as in 64Mi"),
        cpu_limit=fields.text("cpuLimit", _CPU, "an amount of CPUs, as in 500m or 1"),
        environment=fields.environment("environment"),
        allowed_hosts=fields.hosts("allowedHosts"),
        replicas=_replicas(fields, autoscaling),
        autoscaling=autoscaling,
    )
    if app.replicas is not None and not network.wasm_pods:
        given = "autoscaling" if fields.optional("replicas") is None else "replicas"
        needed = "nothing without wasmPodCidr, by which each pod has an address of its own"
        raise fields.error(given, fields.optional(given), needed)
    if app.replicas is None and app.port == AGENT_PORT:
        raise fields.error("port", app.port, f"any port but {AGENT_PORT}, which is the node agent's own")
    return app


def _replicas(fields: Reader, autoscaling: AutoscalingConfig | None) -> int | None:
    """Give with how many pods an app begins, None where it is a single one that nobody makes again."""
    if fields.optional("replicas") is None:
        return autoscaling.min_replicas if autoscaling else None
    if autoscaling:
        return fields.integer("replicas", autoscaling.min_replicas, autoscaling.max_replicas)
    return fields.integer("replicas", 1, MOST_REPLICAS)


def _autoscaling(fields: Reader) -> AutoscalingConfig | None:
    value = fields.optional("autoscaling")
    if value is None:
        return None
    limits = fields.fields("autoscaling", value, _AUTOSCALING, "an object, as in {maxReplicas: 10}")
    least = limits.integer("minReplicas", 1, MOST_REPLICAS)
    found = AutoscalingConfig(
        least, limits.integer("maxReplicas", least, MOST_REPLICAS), limits.integer("cpu", 1, 100)
    )
    limits.check_names(value)
    return found


def _nodes(keys: Reader, network: NetworkConfig, max_pods: int, count: int) -> tuple[NodeConfig, ...]:
    """Read the VMs, which are alike but for their names: a number at the end is the first one's or none's."""
    first = NodeConfig(
        name=keys.text("nodeName", _DNS_LABEL, NAME_RULE),
        machine_type=keys.text("machineType", _WORD, "a machine type, as in e2-small"),
        boot_image=keys.text("bootImage", _WORD, "an image or family, as in debian-cloud/debian-12"),
        disk_size_gb=keys.integer("diskSizeGb", 10, 65536),
        max_pods=max_pods,
        pod_range=f"/{_pod_prefix(max_pods)}" if network.wasm_pods else "",
        agent_crate=keys.crate("agentCrate"),
        agent_target=keys.text("agentTarget", _RUST_TARGET, "a Rust target, or nothing for this machine's"),
        bootstrap=keys.one_of("bootstrap", (BY_IDENTITY, BY_TOKEN)),
    )
    if count > 1 and len(first.name) > _LONGEST_SHARED_NAME:
        allowed = (
            f"at most {_LONGEST_SHARED_NAME} characters where nodes is {count}, for the numbers behind it"
        )
        raise keys.error("nodeName", first.name, allowed)
    stem = first.name.removesuffix("-1")
    return (first, *(replace(first, name=f"{stem}-{number}") for number in range(2, count + 1)))


def _namespace(keys: Reader) -> str:
    name = keys.text("namespace", _DNS_LABEL, NAME_RULE)
    if _NOT_OURS.fullmatch(name):
        raise keys.error(
            "namespace", name, "a namespace for this app alone, which is created and deleted with the stack"
        )
    return name


def _google(keys: Reader, enable_services: bool) -> GoogleConfig:
    for key, instead in _CREDENTIALS.items():
        keys.refuse(key, f"nothing, because it would reach the gcp plugin alone; {instead}")
    project = keys.text("project", _PROJECT, "the id of a Google Cloud project")
    region = keys.text("region", _REGION, "a region, as in europe-west1")
    zone = keys.text("zone", _ZONE, "a zone of the region, as in europe-west1-b")
    if not zone.startswith(f"{region}-"):
        raise keys.error("zone", zone, f"a zone of the region {region}, as in {region}-b")
    return GoogleConfig(project, region, zone, enable_services)


def _registry(keys: Reader) -> RegistryConfig:
    name = keys.one_of("registryName", tuple(GCR_LOCATIONS)) if _is_gcr(keys) else _registry_name(keys)
    location = keys.text("registryLocation", _LOCATION, "a region or us, europe, asia")
    if name in GCR_LOCATIONS and location != GCR_LOCATIONS[name]:
        raise keys.error(
            "registryLocation", location, f"{GCR_LOCATIONS[name]}, the only one where {name} can be"
        )
    return RegistryConfig(name, location)


def _is_gcr(keys: Reader) -> bool:
    return keys.text("registryName", re.compile(".*"), "a name").endswith("gcr.io")


def _registry_name(keys: Reader) -> str:
    return keys.text("registryName", _DNS_LABEL, f"{NAME_RULE}; or {', '.join(GCR_LOCATIONS)}")


def _pod_prefix(max_pods: int) -> int:
    """Give the prefix of a node's range: twice as many addresses as pods, so that one that has just become
    free can rest, and no less than a /24. Source: GKE's documentation, "Flexible Pod CIDR".
    """
    return min(24, 32 - (2 * max_pods - 1).bit_length())


def _network(keys: Reader, max_pods: int, nodes: int) -> NetworkConfig:
    named = {
        "networkCidr": keys.network("networkCidr", 29),
        "podCidr": keys.network("podCidr", 24),
        "serviceCidr": keys.network("serviceCidr", 27),
    }
    wasm_pods = keys.text("wasmPodCidr", re.compile(".*"), "a private IPv4 network, or nothing")
    if wasm_pods:
        # What the VMs get of it has to fit.
        each = _pod_prefix(max_pods)
        named["wasmPodCidr"] = keys.network("wasmPodCidr", each)
        room = each - (nodes - 1).bit_length()
        if ipaddress.IPv4Network(wasm_pods).prefixlen > room:
            needed = f"a prefix of at most {room} bits, which has a /{each} for each of {nodes} nodes"
            raise keys.error("wasmPodCidr", wasm_pods, needed)
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


# The kubelet's port, where the API server looks for logs.
AGENT_PORT = 10250
# What the agent's image is called in the stack's registry, beside the apps'.
AGENT_IMAGE = "krustlet"
MOST_REPLICAS = 10000
# They are made one after the other.
MOST_NODES = 20
