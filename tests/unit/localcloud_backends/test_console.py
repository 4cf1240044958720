"""How an instance's serial console is written."""

import io
import json
import re
from pathlib import Path

import pytest

from localcloud.backends.console import Console, serve


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "serial-port-1.log"
    definition = {"console": str(path), "host": "vm-1", "identifier": "web"}
    (tmp_path / "vm-vm-1.web.json").write_text(json.dumps(definition))
    (tmp_path / "api.json").write_text(json.dumps(definition | {"console": ""}))
    return path


def test_lines_are_put_together_and_carry_host_program_and_pid(target: Path) -> None:
    console = Console(target.parent)
    console.log("vm-vm-1.web", "7", b"one\ntw")
    console.log("vm-vm-1.web", "7", b"o\r\nrest")
    console.ended("vm-vm-1.web", "7")
    lines = target.read_text().splitlines()
    assert [line.partition("]: ")[2] for line in lines] == ["one", "two", "rest"]
    assert all(re.match(r"\w{3} [ \d]\d \d\d:\d\d:\d\d vm-1 web\[7\]: ", line) for line in lines)


def test_a_program_without_a_console_or_without_a_definition_is_left_out(target: Path) -> None:
    console = Console(target.parent)
    console.log("api", "1", b"x\n")
    console.log("unknown", "1", b"x\n")
    assert not target.exists()


def test_a_long_file_keeps_its_newer_lines(target: Path) -> None:
    console = Console(target.parent)
    for number in range(300):
        console.log("vm-vm-1.web", "7", b"%d " % number + b"x" * 8000 + b"\n")
    assert target.stat().st_size < 2 * 1024 * 1024
    lines = target.read_text().splitlines()
    assert lines[-1].partition("]: ")[2].startswith("299 ")
    assert all(" vm-1 web[7]: " in line for line in lines)


def test_the_listener_speaks_supervisords_protocol(target: Path) -> None:
    def event(name: str, payload: bytes) -> bytes:
        return (
            f"ver:3.0 server:x serial:1 pool:x poolserial:1 eventname:{name} len:{len(payload)}\n".encode()
            + payload
        )

    about = b"processname:vm-vm-1.web groupname:vm-vm-1.web "
    events = event("PROCESS_LOG_STDOUT", about + b"pid:7 channel:stdout\nhello")
    events += event("PROCESS_STATE_EXITED", about + b"from_state:RUNNING expected:0 pid:7")
    replies = io.BytesIO()
    serve(Console(target.parent), io.BytesIO(events), replies)
    assert replies.getvalue() == b"READY\n" + b"RESULT 2\nOKREADY\n" * 2
    assert target.read_text().endswith(" vm-1 web[7]: hello\n")
