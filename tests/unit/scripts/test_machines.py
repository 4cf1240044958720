"""Nothing that a user has on the machine breaks a command: paths, variables, terminals, shells, ports."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localcloud import __main__ as localcloud
from localcloud import sources
from localcloud.backends import ports
from localcloud.backends.processes import marked, wait_until
from localcloud.home import Home
from scripts.lib import environment, paths, prerequisites, pulumi, steps, toolchain
from scripts.lib.steps import StepError

MEANING = set(":#%?\"$\\'`;&|*[]{}<>()!\n\t")
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(name=NAMES.filter(lambda name: name.strip(".") and len(name.encode()) < 200))
def test_a_checkout_of_any_name_has_a_name_that_no_list_or_url_can_mistake(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    root = tmp_path_factory.mktemp("machine")
    checkout = root / name
    checkout.mkdir()
    plain = sources.plain(checkout, root / "cache")
    assert plain.samefile(checkout)
    assert not MEANING & set(str(plain))
    assert sources.plain(checkout, root / "cache") == plain


def test_where_no_link_can_be_made_the_path_is_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert sources.plain(tmp_path / "a:b", tmp_path / "file") == tmp_path / "a:b"


FOREIGN = {
    "PYTHONPATH": "/theirs",
    "PYTHONHOME": "/theirs",
    "PYTHONSTARTUP": "/theirs",
    "PYTHONSAFEPATH": "1",
    "PYTHONWARNINGS": "error",
    "PYTHONIOENCODING": "ascii",
    "PULUMI_CONFIG_PASSPHRASE": "theirs",
    "PULUMI_STACK": "theirs",
    "PULUMI_BACKEND_URL": "https://theirs.example",
    "PULUMI_PYTHON_CMD": "/theirs",
    "PULUMI_OPTION_STACK": "theirs",
    "GOOGLE_CREDENTIALS": "theirs",
    "GOOGLE_PROJECT": "theirs",
    "CLOUDSDK_CORE_PROJECT": "theirs",
    "KUBECONFIG": "/theirs",
    "VIRTUAL_ENV": "/theirs",
    "GIT_DIR": "/theirs",
    "TMPDIR": "/not-there",
}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where all is built."""
    monkeypatch.setattr(paths, "PASSPHRASE", tmp_path / "passphrase")
    monkeypatch.setattr(toolchain, "directories", lambda **_: [])


@pytest.mark.usefixtures("built")
def test_what_the_user_set_for_other_work_reaches_no_program_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    found = environment.before_localcloud()
    assert {name for name, value in FOREIGN.items() if found.get(name) == value} == set()


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("users", ["", "example.com", "*", "localhost, 10.0.0.0/8"])
def test_loopback_goes_to_no_proxy_and_what_the_user_excepts_stays_excepted(
    monkeypatch: pytest.MonkeyPatch, users: str
) -> None:
    monkeypatch.setenv("NO_PROXY", users)
    monkeypatch.setenv("no_proxy", "lower.example")
    monkeypatch.setenv("no_grpc_proxy", "grpc.example")
    found = environment.before_localcloud()
    for name in ("NO_PROXY", "no_proxy", "no_grpc_proxy"):
        entries = found[name].split(",")
        wanted = {*filter(None, users.replace(" ", "").split(",")), "lower.example", "grpc.example"}
        wanted |= {"127.0.0.1", "localhost"}
        assert wanted | {f"{Home(paths.LOCALCLOUD_HOME).network}.2"} <= set(entries)
        assert len(entries) == len(set(entries))
        monkeypatch.setenv(name, found[name])
    assert environment.before_localcloud()["NO_PROXY"] == found["NO_PROXY"], "a second time changes nothing"


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "zsh", "fish", "busybox"])
def test_every_shell_takes_the_environment(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    before = {"PATH": os.environ["PATH"], "GONE": "1", "ALSO_GONE": "1", "KEPT": "1"}
    value = "a b'\"$HOME`#%é*"
    lines = environment.exports({"PATH": before["PATH"], "KEPT": "1", "NEW": value}, before)
    ask = f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    strict = "" if shell == "fish" else "set -eu\n"
    script = [*(("busybox", "sh") if shell == "busybox" else (shell,)), "-c", f"{strict}{lines}\n{ask}"]
    answer = subprocess.run(script, env=before, capture_output=True, text=True, check=True)
    assert answer.stderr == ""
    found = json.loads(answer.stdout)
    assert (found["NEW"], found["KEPT"]) == (value, "1")
    assert not {"GONE", "ALSO_GONE"} & found.keys()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8", "", "no-such-thing"])
@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "xx_YY.ISO-8859-1"])
def test_every_terminal_is_told_how_a_step_went(encoding: str, locale: str) -> None:
    code = "from scripts.lib import terminal; terminal.set_up(); print('✓ done… é 漢')"
    answer = subprocess.run(
        [
            sys.executable,
            "-I",
            "-X",
            "utf8",
            "-c",
            f"import sys; sys.path.insert(0, {str(paths.REPOSITORY)!r}); {code}",
        ],
        env={"PYTHONIOENCODING": encoding, "LC_ALL": locale},
        capture_output=True,
        check=True,
    )
    shown = answer.stdout.decode(
        "ascii" if encoding == "ascii" else "latin-1" if "1" in encoding else "utf-8", "replace"
    )
    assert "done" in shown
    if encoding == "ascii":
        assert shown.startswith("ok done...")


def test_a_place_that_cannot_be_written_in_is_named_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(paths, "CACHE", tmp_path / "file" / "cache")
    with pytest.raises(
        StepError, match=r"cannot write in .*cache: Not a directory; set HOME or XDG_CACHE_HOME"
    ):
        prerequisites.check_places()


def test_a_cache_from_which_no_path_can_lead_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, name in (("CACHE", "a:b"), ("PASSPHRASE", "passphrase"), ("REPOSITORY", "checkout")):
        monkeypatch.setattr(paths, place, tmp_path / name)
    with pytest.raises(StepError, match="`:` ends an entry of PATH; set XDG_CACHE_HOME"):
        prerequisites.check_places()


def test_a_checkout_in_which_cargo_builds_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "caf\udce9"
    checkout.mkdir()
    (tmp_path / "link").symlink_to(checkout)
    for place, name in (("CACHE", "cache"), ("PASSPHRASE", "passphrase"), ("REPOSITORY", "link")):
        monkeypatch.setattr(paths, place, tmp_path / name)
    with pytest.raises(StepError, match=r"caf\\udce9, which is not UTF-8; move the checkout"):
        prerequisites.check_places()


def test_a_disk_on_which_the_node_would_take_no_pod_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for free, said in ((11, ""), (9, "a node takes no pods with less than 10%")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(total=100, free=free))
        prerequisites.warn_of_disk()
        printed = capsys.readouterr().out
        assert said in printed
        assert bool(printed) is bool(said)


def test_a_command_with_an_unusable_home_builds_nothing_and_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for command in ("up", "verify", "down", "env"):
        arguments = ["--google"] if command == "env" else []
        answer = subprocess.run(
            [paths.REPOSITORY / "scripts" / command, *arguments],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path / "file")},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert answer.returncode != 0
        assert answer.stderr.startswith("error: ")
        assert "Traceback" not in answer.stderr
        assert "build" not in answer.stdout


def _place(version: str) -> Path:
    return toolchain._place(toolchain.REGISTRY, version)


@pytest.mark.parametrize(
    ("built", "now", "same"),
    [
        ("go1.26.1", "go1.26.4", True),
        ("go1.26", "go1.26.1", True),
        ("go1.26.4", "go1.26.1", True),
        ("go1.26.1", "go1.27.1", False),
        ("go1.26.1", "go1.2", False),
        ("go1.26.1", "devel go1.26-abc", False),
    ],
)
def test_a_patch_release_of_go_rebuilds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str, now: str, same: bool
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    _place(built).mkdir(parents=True)
    monkeypatch.setattr(toolchain, "_go_version", lambda: now)
    assert (toolchain.directory(toolchain.REGISTRY) == _place(built)) is same


def test_a_build_has_nothing_of_the_users_other_work_with_go(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {
        "GOFLAGS": "-mod=vendor",
        "GOWORK": "/theirs",
        "GOOS": "plan9",
        "GOARCH": "386",
        "GOPATH": "relative",
    }
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOPROXY", "https://theirs.example")
    found = toolchain.go_environment()
    assert {name for name, value in theirs.items() if found.get(name) == value} == set()
    assert found["GOPROXY"] == "https://theirs.example"


def test_a_server_of_other_sources_python_or_tools_is_stale_and_one_of_these_is_not() -> None:
    now = sources.build()
    assert not localcloud._is_stale({"build": now})
    assert not localcloud._is_stale(None)
    assert localcloud._is_stale({}), "one from before it said so"
    for part in now:
        assert localcloud._is_stale({"build": {**now, part: "another"}})
    assert not localcloud._is_stale({"build": {**now, "a tool that is not on this PATH": "/usr/bin/it"}})


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc here")
@pytest.mark.parametrize("address", ["0.0.0.0", "::"])  # noqa: S104 - what is in the way there
def test_a_port_that_another_program_has_is_said_with_its_name(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as held:
        held.bind((address, 0))
        held.listen()
        port = held.getsockname()[1]
        assert ports.refusal(port).endswith(f"(process {os.getpid()})")
    assert ports.refusal(port) == ""


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("", False),
        ("{", False),
        ("[]", False),
        ('{"hostname": "HERE"}', False),
        ('{"hostname": "HERE", "pid": "x"}', False),
        ('{"hostname": "HERE", "pid": PID}', False),
        ('{"hostname": "elsewhere", "pid": 1}', True),
    ],
)
def test_a_lock_is_held_by_a_pulumi_that_lives_and_by_nothing_else(
    tmp_path: Path, text: str, held: bool
) -> None:
    lock = tmp_path / "lock.json"
    # The pid of one that is gone may be that of anything now; as here, of this Python.
    lock.write_text(text.replace("HERE", socket.gethostname()).replace("PID", str(os.getpid())))
    assert pulumi._is_held(lock) is held


def test_a_git_that_learns_nothing_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".git" / "config.lock").touch()
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    pulumi._keep_salt_out_of_git(os.environ)
    assert "lock" in capsys.readouterr().out


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
time.sleep(300)
"""


def test_a_second_interrupt_ends_at_once_all_that_a_step_started(tmp_path: Path) -> None:
    log = tmp_path / f"{hashlib.sha256(os.urandom(8)).hexdigest()}.log"
    code = (
        "import signal, sys; from pathlib import Path; from scripts.lib.steps import Log\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "Log(Path(sys.argv[1])).run([sys.executable, '-c', sys.argv[2]])"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(log), STUBBORN], cwd=paths.REPOSITORY, stderr=subprocess.DEVNULL
    )

    def started() -> int:
        return len(marked(steps.mark(log), steps.MARK))

    assert wait_until(lambda: started() == 2, 60)
    command.send_signal(signal.SIGINT)
    assert not wait_until(lambda: started() < 2, 0.5), "the first one is a request"
    command.send_signal(signal.SIGINT)
    command.wait(timeout=25)
    assert started() == 0


@pytest.mark.parametrize(
    ("cores", "gigabytes", "room"), [(2, 64, False), (None, 64, False), (4, 4, False), (4, 8, True)]
)
def test_two_compilers_run_at_once_where_they_have_cores_and_memory(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, gigabytes: int, room: bool
) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 2**30 // 4096}
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert prerequisites.has_room_for_two() is room
