"""The VM's startup script where metadata server, registry and network fail, and where the power is cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.unit.components.startup_vm import AGENT, FAULTS, Vm, new_vm

PLACES = ("metadata", "account", "challenge", "token", "signature", "payload", "manifest", "blob")
# With these an attempt may go well, as far as anybody can tell: what has no digest is taken as it is, and
# what is asked for from its beginning has no rest.
UNNOTICED = {"whole", "other range", "cut off"}
# What the metadata server says that there is not is not waited for.
FINAL = {"metadata": {"404", "other bytes"}}


def faults_of(place: str) -> list[str]:
    """The ways in which a place may fail and be all right later, in an order of its own."""
    unnoticed = set() if place in ("manifest", "blob") else UNNOTICED
    faults = [fault for fault in FAULTS if fault not in unnoticed | FINAL.get(place, set())]
    random.Random(place).shuffle(faults)  # noqa: S311
    return faults


@pytest.mark.parametrize("place", PLACES)
def test_a_boot_gets_over_all_that_may_go_wrong(tmp_path: Path, place: str) -> None:
    with new_vm(tmp_path) as vm:
        vm.faults[place] = faults_of(place)
        boot = vm.boot()
        assert boot.returncode == 0, boot.stderr
        assert vm.faults[place] == []
        assert vm.agent() == AGENT
        assert vm.configuration()["MAX_PODS"] == "7"
        assert vm.was_started()


def test_each_time_it_is_said_what_is_waited_for_and_why(tmp_path: Path) -> None:
    faults = [fault for fault in FAULTS if fault not in UNNOTICED]
    with new_vm(tmp_path) as vm:
        vm.faults["blob"] = list(faults)
        boot = vm.boot()
    start = "krustlet: waiting for the agent: "
    said = [line.removeprefix(start) for line in boot.stderr.splitlines() if line.startswith(start)]
    assert len(said) == len(faults), boot.stderr
    for fault, why in zip(faults, said, strict=True):
        assert why, fault
        assert not fault.isdigit() or fault in why
        assert ("a role that was just given takes some minutes" in why) == (fault in ("401", "403"))


@pytest.mark.parametrize(
    "place", ["challenge", "account", "token", "signature", "payload", "manifest", "blob"]
)
def test_what_does_not_come_in_time_ends_the_script_by_name_and_the_next_run_is_under_way(
    tmp_path: Path, place: str
) -> None:
    with new_vm(tmp_path) as vm:
        vm.faults[place] = ["503"] * 100
        boot = vm.boot(WAIT_SECONDS="0")
        assert boot.returncode != 0
        last = boot.stderr.splitlines()[-1]
        assert last.startswith("krustlet: gave up on the agent"), boot.stderr
        assert not vm.was_started()
        assert vm.systemctl()[-1] == "start krustlet-metadata"


def test_a_download_goes_on_where_it_broke_off_even_after_a_reboot(tmp_path: Path) -> None:
    with new_vm(tmp_path) as vm:
        vm.faults["blob"] = ["partial"]
        assert vm.boot(WAIT_SECONDS="0").returncode != 0
        half = (vm.root / "usr/bin/krustlet.new").stat().st_size
        assert half == len(AGENT) // 2
        vm.command(
            "curl", f'echo "$@" >>{vm.root}/curl; exec /usr/bin/curl --verbose "$@" 2>>{vm.root}/heard'
        )
        assert vm.boot().returncode == 0
        ranges = [line for line in (vm.root / "heard").read_text().splitlines() if "Range: bytes" in line]
        assert any(f"bytes={half}-" in line for line in ranges)
        assert vm.agent() == AGENT


def test_no_secret_is_on_a_command_line(tmp_path: Path) -> None:
    with new_vm(tmp_path) as vm:
        vm.command("curl", f'echo "$@" >>{vm.root}/curl; exec /usr/bin/curl "$@"')
        assert vm.boot().returncode == 0
        arguments = (vm.root / "curl").read_text()
    assert "/blobs/" in arguments
    assert "PULL" not in arguments
    assert "oauth2accesstoken" not in arguments


def boot_until(vm: Vm, step: int) -> bool:
    """Boot, and cut the power at a step: what was not synced is lost. Gives whether it was cut.

    A step is a command that writes or moves; what `sync` was told is what stays of a file's bytes.
    """
    steps, synced = vm.root / "steps", vm.root / "synced"
    steps.write_text("")
    for name in ("mv", "chmod", "sync", "mkdir"):
        vm.command(
            name,
            f"""echo x >>{steps}
[ "$(wc -l <{steps})" -le {step} ] || {{ kill -9 $PPID; exit 1; }}
/bin/{name} "$@" || exit
[ {name} != sync ] || [ -d "$1" ] || stat --format %i "$1" >>{synced}""",
        )
    boot = vm.boot()
    for name in ("mv", "chmod", "sync", "mkdir"):
        (vm.root / "bin" / name).unlink()
    kept = synced.read_text().split() if synced.exists() else []
    for place in ("usr", "etc", "units"):
        for path in (vm.root / place).rglob("*"):
            if path.is_file() and str(path.stat().st_ino) not in kept:
                path.write_bytes(b"")
    return boot.returncode != 0


def test_a_power_cut_at_any_step_is_healed_by_the_next_boot_which_fetches_no_agent_that_is_there(
    tmp_path: Path,
) -> None:
    cut = fetched = step = 0
    while True:
        (root := tmp_path / str(step)).mkdir()
        with new_vm(root) as vm:
            was_cut = boot_until(vm, step)
            was_there = vm.agent() == AGENT
            assert vm.agent() in (None, AGENT)
            del vm.served[:]
            boot = vm.boot()
            assert boot.returncode == 0, boot.stderr
            assert vm.agent() == AGENT
            assert ("blob" in vm.served) != was_there
            assert vm.configuration()["MAX_PODS"] == "7"
            assert "ExecStart" in (vm.root / "units/krustlet.service").read_text()
        if not was_cut:
            break
        cut, fetched, step = cut + 1, fetched + (not was_there), step + 3
    assert cut > fetched > 0
