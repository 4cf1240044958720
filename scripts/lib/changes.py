"""What a change of each configuration key does to a running stack; docs/changes.md is made of it.

`python -m scripts.lib.changes` writes the document; tests/e2e/test_changes.py holds every row to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "changes.md"

NONE = "none"
POD = "the time that the port takes from the old pod to the new one"
AGENT = "the agent's restart"
BOOT = "the VM's boot"
VM = "a new VM's boot"
ALL = "until the new one is up"
KMS = "gcpkms://…"


@dataclass(frozen=True)
class Change:
    """Another value of a key: what is planned for which resource (by its name), and how long the app is away.

    `note` says what a plan cannot. `also` are keys that have to change with it.
    """

    key: str
    value: str
    plan: dict[str, str]
    downtime: str = NONE
    note: str = ""
    also: tuple[tuple[str, str], ...] = ()


# What the table says beside a name.
ENDINGS = {"update": "", "replace": "", "create": " (new)", "delete": " (deleted)"}


def update(*names: str) -> dict[str, str]:
    """Plan updates in place."""
    return dict.fromkeys(names, "update")


def replace(*names: str) -> dict[str, str]:
    """Plan replacements."""
    return dict.fromkeys(names, "replace")


def create(*names: str) -> dict[str, str]:
    """Plan creations."""
    return dict.fromkeys(names, "create")


def delete(*names: str) -> dict[str, str]:
    """Plan deletions."""
    return dict.fromkeys(names, "delete")


SMOKE = replace("workload-smoke-test")
RESTARTED = replace("workload-pod") | SMOKE
# With another image, node or namespace: pulled and compiled before the pod that runs ends.
MOVED = replace("workload-prepare") | RESTARTED
RECONFIGURED = update("node-vm", "node-registration") | SMOKE
IMAGE = replace("app-push", "app-signature", "app-signature-push", "app-attestation")
AGENT_IMAGE = replace("agent-push", "agent-signature", "agent-signature-push", "agent-attestation")
REGISTRY = replace("registry-repository", "registry-node-reader") | AGENT_IMAGE | IMAGE | MOVED
REGISTRY |= update("node-vm")
SIGNED = replace("signing-key", "app-signature", "agent-signature")
SIGNED |= update("app-signature-push", "app-attestation", "agent-signature-push", "agent-attestation")
JOINED = replace("node-vm", "node-registration") | MOVED
# What is on a cluster, and the VM that is in its network.
CLUSTER = (
    replace("cluster-cluster", "cluster-pool", "cluster-provider", "node-token", "node-bootstrap")
    | replace("node-disk", "cluster-namespace")
    | JOINED
)

# With addresses for pods.
RANGED = update("cluster-subnetwork", "cluster-namespace", "node-vm", "node-registration")
RANGED |= create("node-pods-firewall", "node-proxier", "node-network-policies", "node-network-policies-role")
# In place of the pod.
REPLICATED = create("workload-deployment", "workload-service", "workload-disruption-budget")
REPLICATED |= delete("workload-pod", "workload-smoke-test", "node-app-firewall")

SERVICES = (
    *("services-cloudresourcemanager", "services-compute", "services-container"),
    *("services-artifactregistry", "services-iam"),
)

CHANGES = (
    Change("enableServices", "false", delete(*SERVICES), note="the APIs stay enabled"),
    Change("apps[0].crate", "wasm_app", {}, note="another crate is another image"),
    Change("apps[0].name", "another", IMAGE | MOVED, POD),
    Change(
        "apps[0].port",
        "8081",
        update("node-app-firewall", "node-vm") | RESTARTED,
        POD,
        note="the URL is another",
    ),
    Change(
        "apps[0].port",
        "80",
        update("node-app-firewall", "node-vm", "node-registration") | RESTARTED,
        AGENT,
        note="below 1024 the agent gets the capability for it",
    ),
    Change("namespace", "another", replace("cluster-namespace") | MOVED, POD),
    Change("apps[0].memoryLimit", "32Mi", RESTARTED, POD),
    Change("apps[0].cpuLimit", "250m", RESTARTED, POD),
    Change("apps[0].environment", '{"LEVEL": "3"}', RESTARTED, POD),
    Change("apps[0].allowedHosts", '["api.example.com"]', RESTARTED, POD),
    Change(
        "apps[0].replicas",
        "3",
        RANGED | REPLICATED,
        AGENT,
        note="another number later is an update of `workload-deployment` alone; the URL is another",
        also=(("wasmPodCidr", "10.70.0.0/16"),),
    ),
    Change(
        "apps[0].autoscaling",
        '{"maxReplicas": "3"}',
        RANGED | REPLICATED | create("workload-autoscaler"),
        AGENT,
        note="as replicas",
        also=(("wasmPodCidr", "10.70.0.0/16"),),
    ),
    Change(
        "apps",
        '[{"name": "primorial"}, {"name": "second", "crate": "wasm_app", "port": "8090"}]',
        create(*(f"app-second-{part}" for part in ("build", "push", "signature")))
        | create("app-second-signature-push", "app-second-attestation")
        | create(*(f"workload-second-{part}" for part in ("prepare", "pod", "smoke-test")))
        | update("node-app-firewall"),
        note="taken out again, it is deleted, and the first stays as it is",
    ),
    Change("sourceRanges", '["127.0.0.0/8"]', update("node-app-firewall")),
    Change("agentCrate", "krustlet", {}, note="another agent is an update of the VM, as maxPods"),
    Change("agentTarget", "HOST", {}, note="this machine's own, said by name"),
    Change("bootstrap", "token", update("node-bootstrap") | RECONFIGURED, AGENT),
    Change(
        "nodes",
        "2",
        create(*(f"node-2-{part}" for part in ("account", "agent-firewall", "address", "token", "bootstrap")))
        | create("registry-node-2-reader", "node-2-disk", "node-2-vm", "node-2-registration")
        | MOVED,
        POD,
        note="the pod says then that it is on the first; taken back, it stays, and the last VM goes",
    ),
    Change(
        "nodeName",
        "krustlet-2",
        replace("node-account", "registry-node-reader", "node-app-firewall", "node-agent-firewall")
        | replace("node-address", "node-disk", "node-token")
        | update("node-bootstrap")
        | JOINED,
        VM,
        note="the URL is another",
    ),
    Change("machineType", "e2-medium", RECONFIGURED, BOOT),
    Change("bootImage", "debian-cloud/debian-13", replace("node-disk") | JOINED, VM),
    Change("diskSizeGb", "20", update("node-disk"), note="the system takes the room at its next boot"),
    Change("maxPods", "50", RECONFIGURED, AGENT),
    Change(
        "externalIp",
        "false",
        create("cluster-router", "cluster-nat", "node-internal-address")
        | update("cluster-pool")
        | JOINED
        | delete("node-address", "workload-smoke-test"),
        VM,
        note="the URL is another, of the network alone",
    ),
    Change(
        "clusterName",
        "another",
        replace("cluster-network", "cluster-subnetwork", "cluster-account", "cluster-node-role")
        | replace("node-app-firewall", "node-agent-firewall")
        | CLUSTER,
        ALL,
    ),
    Change("releaseChannel", "RAPID", update("cluster-cluster")),
    Change("clusterMachineType", "e2-standard-2", update("cluster-pool")),
    Change("clusterNodes", "2", update("cluster-pool")),
    Change("deletionProtection", "true", update("cluster-cluster"), note="the next destroy is refused"),
    Change("authorizedNetworks", '["127.0.0.0/8"]', update("cluster-cluster")),
    Change("maintenanceWindow", "03:00", update("cluster-cluster")),
    Change(
        "networkCidr",
        "10.40.0.0/20",
        replace("cluster-subnetwork") | CLUSTER | update("node-agent-firewall"),
        ALL,
    ),
    Change(
        "podCidr",
        "10.50.0.0/16",
        replace("cluster-subnetwork") | CLUSTER | update("node-agent-firewall"),
        ALL,
        note="Google changes no range that a cluster uses",
    ),
    Change("serviceCidr", "10.60.0.0/20", replace("cluster-subnetwork") | CLUSTER, ALL, note="as podCidr"),
    Change(
        "wasmPodCidr",
        "10.70.0.0/16",
        RANGED | RESTARTED,
        AGENT,
        note="another one after that, or none, is as podCidr",
    ),
    Change("registryName", "another", REGISTRY, POD, note="the VM stays, and the agent as well"),
    Change("registryLocation", "us-east1", REGISTRY, POD, note="as registryName"),
    Change(
        "signingKey",
        "KEY",
        SIGNED | RECONFIGURED,
        note="the agent takes the new key while it runs, and starts nothing by the old one any more",
    ),
    Change(
        "signingKey",
        KMS,
        SIGNED | create("services-cloudkms") | RECONFIGURED,
        note="as KEY; no private key is in the state then",
    ),
    Change("signingKeyPassword", "unused", {}),
    Change(
        "gcp:defaultLabels",
        '{"team": "infra"}',
        update("registry-repository", "cluster-cluster", "node-address", "node-disk", "node-vm"),
    ),
    Change("gcp:zone", "europe-west1-c", replace("cluster-subnetwork") | CLUSTER, ALL),
    Change(
        "gcp:region",
        "us-east1",
        replace("cluster-subnetwork", "node-address") | CLUSTER,
        ALL,
        note="the URL is another",
        also=(("gcp:zone", "us-east1-b"),),
    ),
    Change(
        "gcp:project",
        "another-project",
        REGISTRY
        | CLUSTER
        | replace("cluster-network", "cluster-subnetwork", "node-account", "node-address")
        | replace("node-app-firewall", "node-agent-firewall", "cluster-account", "cluster-node-role")
        | replace(*SERVICES),
        ALL,
        note="all of it is made in the other project",
    ),
)


def rendered() -> str:
    """Write the document."""
    lines = [
        "# What a change of a setting does",
        "",
        "Resources have their names in the program; what is not named stays as it is. The table is made of",
        "scripts/lib/changes.py: `python -m scripts.lib.changes` writes it. A preview compiles what changed",
        "in the app and in the agent, and so knows whether other bytes come out: a comment changes nothing.",
        "",
        "| setting | to | updated in place | made anew | the app is away for |",
        "| --- | --- | --- | --- | --- |",
    ]
    for change in CHANGES:
        updated, replaced = (
            ", ".join(
                f"`{name}`{ENDINGS[op]}"
                for name, op in sorted(change.plan.items())
                if (op == "update") is kept
            )
            or "nothing"
            for kept in (True, False)
        )
        away = f"{change.downtime}; {change.note}" if change.note else change.downtime
        lines.append(f"| `{change.key}` | `{change.value}` | {updated} | {replaced} | {away} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered())
