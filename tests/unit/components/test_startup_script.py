"""The VM's startup script, run by a real shell against a metadata server and a registry in this process."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.providers.signature import generate_key
from tests.unit.components.startup_vm import AGENT, BLOB_PATH, DIGEST, KEY, SIGNATURE_PATH, SUM, Vm, new_vm


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    """A VM that was never booted."""
    with new_vm(tmp_path) as vm:
        yield vm


def test_a_boot_installs_the_agent_configures_it_and_starts_it(vm: Vm) -> None:
    boot = vm.boot()
    assert boot.returncode == 0, boot.stderr
    assert vm.agent() == AGENT
    configuration = vm.configuration()
    assert configuration["KRUSTLET_PROVIDER_ID"] == "gce://p/europe-west1-b/vm-1"
    assert configuration["KRUSTLET_HOSTNAME"] == "vm-1.c.p.internal"
    assert configuration["KRUSTLET_EXTERNAL_IP"] == "203.0.113.7"
    assert configuration["MAX_PODS"] == "7"
    assert configuration["NODE_LABELS"].split(",") == [
        "a=b",
        "topology.kubernetes.io/zone=europe-west1-b",
        "topology.kubernetes.io/region=europe-west1",
        "node.kubernetes.io/instance-type=e2-small",
    ]
    assert configuration["KRUSTLET_TRUSTED_REGISTRIES"] == vm.host
    assert (vm.root / "etc/krustlet/verification.pem").read_text() == KEY.public_key
    assert vm.systemctl() == [
        "daemon-reload",
        "daemon-reload",
        "enable krustlet",
        "restart krustlet",
        "start krustlet-metadata",
    ]


def test_a_second_boot_takes_the_agent_that_is_there_and_what_is_new_in_the_metadata(vm: Vm) -> None:
    assert vm.boot().returncode == 0
    vm.registry.clear()
    vm.metadata["instance/attributes/krustlet-max-pods"] = "8"
    boot = vm.boot()
    assert boot.returncode == 0, boot.stderr
    assert vm.configuration()["MAX_PODS"] == "8"
    assert vm.systemctl()[-2] == "restart krustlet"


def test_a_second_boot_with_nothing_new_leaves_an_agent_alone_that_runs(vm: Vm) -> None:
    assert vm.boot().returncode == 0
    assert vm.boot().returncode == 0
    assert vm.systemctl()[-2] == "start krustlet"


def test_another_key_is_given_to_the_agent_that_runs(vm: Vm) -> None:
    assert vm.boot().returncode == 0
    vm.metadata["instance/attributes/krustlet-verification-key"] = "ANOTHER"
    assert vm.boot().returncode == 0
    assert (vm.root / "etc/krustlet/verification.pem").read_text() == "ANOTHER\n"
    assert vm.systemctl()[-2] == "start krustlet"


@pytest.mark.parametrize(
    "missing",
    [
        "instance/attributes/krustlet-app-port",
        "instance/attributes/krustlet-verification-key",
        "instance/hostname",
    ],
)
def test_a_value_that_the_metadata_server_does_not_give_is_named_and_nothing_is_started(
    vm: Vm, missing: str
) -> None:
    del vm.metadata[missing]
    boot = vm.boot()
    assert boot.returncode != 0
    assert f"the metadata server does not give {missing}" in boot.stderr
    assert not vm.was_started()


def test_a_vm_without_an_address_outside_has_none(vm: Vm) -> None:
    del vm.metadata["instance/network-interfaces/0/access-configs/0/external-ip"]
    boot = vm.boot()
    assert boot.returncode == 0, boot.stderr
    assert "KRUSTLET_EXTERNAL_IP" not in vm.configuration()


def test_a_vm_without_a_range_for_pods_has_none_whatever_ranges_it_has(vm: Vm) -> None:
    vm.metadata["instance/network-interfaces/0/ip-aliases/0"] = "10.70.0.0/22"
    assert vm.boot().returncode == 0
    assert "KRUSTLET_POD_CIDR" not in vm.configuration()


def test_the_range_that_the_vm_has_for_pods_is_waited_for_and_is_the_agent_s(vm: Vm) -> None:
    vm.metadata["instance/attributes/krustlet-pod-range"] = "/22"
    boot = vm.boot(WAIT_SECONDS="0")
    assert boot.returncode != 0
    assert "gave up on the VM's alias range" in boot.stderr
    assert not vm.was_started()
    vm.metadata["instance/network-interfaces/0/ip-aliases/0"] = "10.70.0.0/24"
    boot = vm.boot(WAIT_SECONDS="0")
    assert "the VM has no alias range of the size /22" in boot.stderr
    vm.metadata["instance/network-interfaces/0/ip-aliases/0"] = "10.70.0.0/22"
    assert vm.boot().returncode == 0
    assert vm.configuration()["KRUSTLET_POD_CIDR"] == "10.70.0.0/22"


def test_an_agent_that_is_not_the_one_meant_is_not_installed(vm: Vm) -> None:
    vm.registry[BLOB_PATH] = b"another"
    boot = vm.boot(WAIT_SECONDS="0")
    assert boot.returncode != 0
    assert f"what the registry gives is not sha256:{SUM}" in boot.stderr
    assert vm.agent() is None
    assert not vm.was_started()


OTHER = generate_key()


def _altered(vm: Vm) -> None:
    vm.sign((KEY, DIGEST))
    manifest = json.loads(vm.registry[SIGNATURE_PATH])
    (annotations,) = (layer["annotations"] for layer in manifest["layers"])
    signature = bytearray(base64.b64decode(annotations["dev.cosignproject.cosign/signature"]))
    signature[-1] ^= 1
    annotations["dev.cosignproject.cosign/signature"] = base64.b64encode(signature).decode()
    vm.registry[SIGNATURE_PATH] = json.dumps(manifest).encode()


@pytest.mark.parametrize(
    "attack",
    [
        lambda vm: vm.registry.pop(SIGNATURE_PATH),
        lambda vm: vm.sign(),
        lambda vm: vm.sign((OTHER, DIGEST)),
        lambda vm: vm.sign((KEY, f"sha256:{SUM}"), (OTHER, DIGEST)),
        _altered,
        lambda vm: vm.registry.update({SIGNATURE_PATH: b"{}"}),
        lambda vm: vm.registry.update({SIGNATURE_PATH: b"\0" * 100}),
    ],
    ids=["none", "no layer", "another key", "another image", "altered", "no manifest", "garbage"],
)
def test_an_agent_that_the_key_did_not_sign_is_not_installed(vm: Vm, attack: Callable[[Vm], object]) -> None:
    attack(vm)
    boot = vm.boot(WAIT_SECONDS="0")
    assert boot.returncode != 0
    assert "krustlet: gave up on the agent's signature" in boot.stderr
    assert vm.agent() is None
    assert not vm.was_started()


@pytest.mark.parametrize("others", [1, 7])
def test_a_good_signature_counts_whatever_stands_beside_it(vm: Vm, others: int) -> None:
    vm.sign(*[(OTHER, DIGEST)] * others, (KEY, DIGEST))
    boot = vm.boot(WAIT_SECONDS="0")
    assert boot.returncode == 0, boot.stderr
    assert vm.agent() == AGENT


@pytest.mark.parametrize(("port", "capability"), [("80", "CAP_NET_BIND_SERVICE"), ("8080", "")])
def test_only_an_app_on_a_privileged_port_gets_the_capability_for_it(
    vm: Vm, port: str, capability: str
) -> None:
    vm.metadata["instance/attributes/krustlet-app-port"] = port
    assert vm.boot().returncode == 0
    unit = (vm.root / "units/krustlet.service").read_text().splitlines()
    assert f"AmbientCapabilities={capability}" in unit
    assert f"CapabilityBoundingSet={capability}" in unit
