"""What a systemd unit becomes, and what is refused."""

import json
import sys
from pathlib import Path

import pytest

from localcloud.backends import units
from localcloud.backends.rootfs import Rootfs
from localcloud.backends.supervisor import Program
from localcloud.backends.units import UnitError
from localcloud.home import Home
from localcloud.specs import InstanceSpec

SPEC = InstanceSpec("vm-1", "proj", "europe-west1-b", "1", "127.0.0.1", "vm-1.c.proj.internal")


@pytest.fixture
def rootfs(tmp_path: Path) -> Rootfs:
    found = Rootfs(Home(tmp_path), SPEC.name)
    found.units.mkdir(parents=True)
    found.save(SPEC)
    (found.root / "ports.json").write_text(json.dumps({"metadata": 8080}))
    return found


def read(rootfs: Rootfs, text: str, name: str = "web.service") -> Program:
    path = rootfs.units / name
    path.write_text(text)
    return units.program(units.parse(name, path), rootfs, SPEC, enabled=True)


def command(rootfs: Rootfs, line: str, extra: str = "") -> tuple[str, ...]:
    return read(rootfs, f"[Service]\n{extra}\nExecStart={sys.executable} {line}\n").command[1:]


def test_a_plain_daemon_runs_without_restart_and_ends_within_systemds_default_time(rootfs: Rootfs) -> None:
    program = read(rootfs, f"[Service]\nExecStart={sys.executable} -V\n")
    assert program.name == "vm-vm-1.web"
    assert program.command == (sys.executable, "-V")
    assert (program.restart, program.stop_signal, program.stop_seconds) == ("no", "TERM", 90)
    assert program.environment["GCE_METADATA_HOST"] == "127.0.0.1:8080"
    assert program.scope == "instances/vm-1"


def test_restart_signal_and_times_are_taken_over(rootfs: Rootfs) -> None:
    program = read(
        rootfs,
        f"[Service]\nExecStart={sys.executable}\nRestart=on-failure\nRestartSec=1min 500ms\n"
        "KillSignal=SIGINT\nTimeoutStopSec=30\nKillMode=mixed\nSyslogIdentifier=me\nUMask=0077\n",
    )
    assert (program.restart, program.restart_delay) == ("on-failure", 60.5)
    assert (program.stop_signal, program.stop_seconds, program.kill_mode) == ("INT", 30, "mixed")
    assert (program.identifier, program.umask) == ("me", 0o077)


def test_words_are_split_at_blanks_outside_quotes(rootfs: Rootfs) -> None:
    assert command(rootfs, r"""a "b c" 'd "e' f\sg "" x"y"z""") == ("a", "b c", 'd "e', "f g", "", "xyz")


def test_a_line_goes_on_after_a_backslash_and_over_comments(rootfs: Rootfs) -> None:
    assert command(rootfs, "a \\\n# no word\n  b") == ("a", "b")


def test_a_braced_variable_is_one_word_and_a_bare_one_as_many_as_it_has(rootfs: Rootfs) -> None:
    extra = 'Environment="WORDS=one two" X=3'
    assert command(rootfs, "${WORDS} $WORDS p${X}q $$X ${NONE} $NONE", extra) == (
        "one two",
        "one",
        "two",
        "p3q",
        "$X",
        "",
    )


def test_an_environment_file_overrides_environment_and_an_optional_one_may_be_missing(
    rootfs: Rootfs, tmp_path: Path
) -> None:
    (tmp_path / "env").write_text("# comment\nA=from file\nB='quoted value'\n")
    extra = f"Environment=A=x C=y\nEnvironmentFile={tmp_path}/env\nEnvironmentFile=-{tmp_path}/none"
    assert command(rootfs, "${A} ${B} ${C}", extra) == ("from file", "quoted value", "y")


def test_an_empty_assignment_clears_the_earlier_ones(rootfs: Rootfs) -> None:
    program = read(rootfs, f"[Service]\nExecStart=/nowhere\nExecStart=\nExecStart={sys.executable}\n")
    assert program.command == (sys.executable,)


def test_directories_are_made_and_named_in_the_environment(rootfs: Rootfs) -> None:
    extra = "StateDirectory=web web/sub\nStateDirectoryMode=0700\nLogsDirectory=web\nRuntimeDirectory=web"
    program = read(rootfs, f"[Service]\n{extra}\nExecStart={sys.executable} ${{STATE_DIRECTORY}}\n")
    state = rootfs.root / "var/lib/web"
    assert program.command[1] == f"{state}:{state}/sub"
    assert state.stat().st_mode & 0o777 == 0o700
    assert program.environment["LOGS_DIRECTORY"] == str(rootfs.root / "var/log/web")
    assert (rootfs.root / "run/web").is_dir()


def test_specifiers_stand_for_names_and_places_of_the_instance(rootfs: Rootfs) -> None:
    program = read(rootfs, f"[Service]\nExecStart={sys.executable} %n %N %p %i %H %S 100%%\n", "a@b.service")
    assert program.command[1:] == (
        "a@b.service",
        "a@b",
        "a",
        "b",
        "vm-1",
        str(rootfs.root / "var/lib"),
        "100%",
    )


def test_a_template_serves_its_instances(rootfs: Rootfs) -> None:
    (rootfs.units / "a@.service").write_text("")
    assert units.find(rootfs, "a@b.service") == rootfs.units / "a@.service"
    assert units.find(rootfs, "b.service") is None


def test_sandboxing_keys_are_accepted(rootfs: Rootfs) -> None:
    keys = (
        "ProtectSystem=strict\nNoNewPrivileges=yes\nCapabilityBoundingSet=\nUser=krustlet\nLimitNOFILE=65536"
    )
    assert read(
        rootfs,
        f"[Unit]\nDescription=x\nAfter=network-online.target\n[Service]\n{keys}\n"
        f"ExecStart={sys.executable}\n[Install]\nWantedBy=multi-user.target\n",
    ).command


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[Service]\nExecStrat=x\n", "ExecStrat"),
        ("[Unit]\nExecStart=x\n", "ExecStart"),
        ("[Timer]\nOnCalendar=daily\n", "Timer"),
        ("[Service]\nnonsense\n", "nonsense"),
        ("ExecStart=x\n", "ExecStart"),
        ("[Service]\nType=forking\nExecStart=x\n", "Type=forking"),
        ("[Service]\n", "ExecStart"),
        ("[Service]\nExecStart=/bin/sh\nExecStart=/bin/sh\n", "ExecStart"),
        ("[Service]\nExecStart=/nowhere/x\n", "/nowhere/x"),
        ("[Service]\nExecStart=/bin/sh 'x\n", "unbalanced"),
        ("[Service]\nExecStart=/bin/sh %z\n", "%z"),
        ("[Service]\nExecStart=/bin/sh\nRestart=on-watchdog\n", "Restart=on-watchdog"),
        ("[Service]\nExecStart=/bin/sh\nRestartSec=soon\n", "RestartSec=soon"),
        ("[Service]\nExecStart=/bin/sh\nKillSignal=SIGNOPE\n", "KillSignal=SIGNOPE"),
        ("[Service]\nExecStart=/bin/sh\nKillMode=none\n", "KillMode=none"),
        ("[Service]\nExecStart=/bin/sh\nStateDirectory=../x\n", "StateDirectory=../x"),
        ("[Service]\nExecStart=/bin/sh\nStateDirectory=/x\n", "StateDirectory=/x"),
        ("[Service]\nExecStart=/bin/sh\nEnvironmentFile=/nowhere/env\n", "/nowhere/env"),
        ("[Service]\nExecStart=/bin/sh\nWorkingDirectory=/nowhere\n", "WorkingDirectory=/nowhere"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(rootfs: Rootfs, text: str, names: str) -> None:
    with pytest.raises(UnitError, match=names):
        read(rootfs, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("1min 30s", 90),
        ("500ms", 0.5),
        ("2h", 7200),
        ("1.5s", 1.5),
        ("x", None),
        ("5 fortnights", None),
    ],
)
def test_time_spans(text: str, value: float | None) -> None:
    assert units.seconds(text) == value
