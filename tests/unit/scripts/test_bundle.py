"""A release bundle is taken whole or refused in one line, and nothing of one that is refused is used."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from components.providers import cache, cargo, inputs, signature
from scripts.lib import bundle, paths, toolchain
from scripts.lib.bundle import BundleError, Manifest, Packed

KEY, FOREIGN = signature.generate_key(), signature.generate_key()
TOOL = toolchain.Tool("registry", ("registry", "second"))
RECORDS = "a" * 64


class Machine:
    """A cache, and a checkout with one crate, on one machine."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.crate = root / "cache", root / "krustlet"
        self.cache.mkdir(parents=True)
        self.crate.mkdir()
        (self.crate / "main.rs").write_text("fn main() {}")
        self._monkeypatch = monkeypatch

    def use(self) -> Machine:
        """Have what is called next run on it."""
        patch = self._monkeypatch.setattr
        patch(paths, "CACHE", self.cache)
        patch(cache, "cache_directory", lambda: self.cache)
        patch(toolchain, "_go_version", lambda: "go1.26.1")
        patch(toolchain, "needed", lambda **_: [TOOL])
        patch(toolchain, "all_tools", lambda **_: [TOOL])
        patch(bundle, "CRATES", {"krustlet": ""})
        patch(cargo, "job_for", lambda *_: self.job())
        return self

    def job(self) -> Any:
        """What cargo would be asked for."""
        records = self.cache / "inputs" / RECORDS

        def recorded() -> tuple[Path, cargo.Built] | None:
            for path in records.glob("*.json"):
                found = inputs.read(path)
                assert found
                file = cache.place(found[1]["sha256"], found[1]["name"])
                if inputs.unchanged(found[0], self.crate, {}, inputs.digest) and file.is_file():
                    return path, cargo.measure(file)
            return None

        return SimpleNamespace(
            records=records,
            crate=self.crate,
            environment={},
            recorded=recorded,
            kept=lambda: (recorded() or (None, None))[1],
        )

    def build(self) -> None:
        """Build all."""
        directory = toolchain.directory(TOOL)
        directory.mkdir(parents=True)
        for program in TOOL.programs:
            (directory / program).write_text(f"program {program}")
        agent = self.cache / "builds" / hashlib.sha256(b"agent").hexdigest() / "krustlet"
        agent.parent.mkdir(parents=True)
        agent.write_bytes(b"agent")
        read = inputs.Inputs({"main.rs": inputs.digest(self.crate / "main.rs")}, {}, None)
        built = {"name": "krustlet", "sha256": agent.parent.name}
        inputs.write(read, self.cache / "inputs" / RECORDS / f"{'b' * 64}.json", built)

    def files(self) -> dict[str, bytes]:
        """What is in the cache."""
        return {
            str(path.relative_to(self.cache)): path.read_bytes()
            for path in self.cache.rglob("*")
            if path.is_file() and path.suffix != ".lock"
        }


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine where all is built."""
    machine = Machine(tmp_path / "maker", monkeypatch).use()
    machine.build()
    return machine


@pytest.fixture
def made(maker: Machine, tmp_path: Path) -> Path:
    """Its bundle."""
    assert maker.files()
    path = tmp_path / "made.bundle"
    bundle.pack(*bundle._contents(tests=False), KEY, path)
    return path


@pytest.fixture
def taker(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with an empty cache that trusts the key of the bundle."""
    assert made.is_file()
    monkeypatch.setenv(bundle.KEY_VARIABLE, KEY.public_key)
    return Machine(tmp_path / "taker", monkeypatch).use()


def refused(source: Path | str, taker: Machine) -> str:
    """Have a bundle refused; gives the reason, which is one line."""
    with pytest.raises(BundleError) as caught:
        bundle.take(str(source))
    assert taker.files() == {}, "something of it was taken"
    assert list(taker.cache.iterdir()) == [], "something of it is left"
    reason = str(caught.value)
    assert reason
    assert "\n" not in reason
    return reason


def test_what_one_machine_has_built_another_one_has(maker: Machine, taker: Machine, made: Path) -> None:
    assert bundle.take(str(made)) == ["registry is taken from it", "krustlet is taken from it"]
    assert taker.files() == maker.files()
    assert all(os.access(path, os.X_OK) for path in taker.cache.glob("tools/*/*"))
    assert taker.job().kept() is not None
    assert bundle.take(str(made)) == []
    assert bundle.take("https://nobody.invalid/bundle") == ["nothing is missing; it is not read"]


def test_the_same_builds_give_the_same_archive(maker: Machine, tmp_path: Path) -> None:
    archives = []
    for name in ("one", "two"):
        maker.use()
        bundle.pack(*bundle._contents(tests=False), KEY, tmp_path / name)
        os.utime(toolchain.directory(TOOL) / "registry", (1, 1))
        archives.append((tmp_path / name).read_bytes().split(b"\n", 2)[2])
    assert archives[0] == archives[1]


def test_a_bundle_that_lacks_or_has_a_byte_more_or_less_anywhere_is_refused(
    taker: Machine, made: Path, tmp_path: Path
) -> None:
    whole = made.read_bytes()
    damaged = tmp_path / "damaged"
    damages: dict[str, Callable[[int], bytes]] = {
        "a bit is another": lambda i: whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :],
        "it ends early": lambda i: whole[:i],
        "a byte is missing": lambda i: whole[:i] + whole[i + 1 :],
        "a byte is doubled": lambda i: whole[: i + 1] + whole[i:],
        "a line is broken": lambda i: whole[:i] + b"\n" + whole[i:],
    }
    ends = [place for place in range(len(whole)) if b"\n" in whole[max(place - 2, 0) : place + 2]]
    for first, damage in enumerate(damages.values()):
        for place in (*range(first, len(whole), 37), *ends[:8], len(whole) - 1):
            damaged.write_bytes(damage(place))
            refused(damaged, taker)
    damaged.write_bytes(whole + b"\0")
    assert "something after" in refused(damaged, taker)


def test_the_fault_is_named(taker: Machine, made: Path, tmp_path: Path) -> None:
    line, signed, archive = made.read_bytes().split(b"\n", 2)
    foreign = base64.b64encode(bundle._sign(line, FOREIGN))
    faults = {
        "it is empty": b"",
        "it is no bundle": b"\x89PNG\r\n\x1a\n",
        "it is no bundle that": gzip.compress(made.read_bytes()),
        "within its manifest": line,
        "before its archive": line + b"\n" + signed,
        "it is not signed": line + b"\n\n" + archive,
        "not signed by the key in AWESOME_WASM_BUNDLE_KEY": b"\n".join((line, foreign, archive)),
        "bytes are missing": b"\n".join((line, signed, archive[:-1])),
        "SHA-256": b"\n".join((line, signed, archive[:-1] + bytes([archive[-1] ^ 1]))),
    }
    for reason, content in faults.items():
        (tmp_path / "bad").write_bytes(content)
        assert reason in refused(tmp_path / "bad", taker)
    assert refused(tmp_path / "absent", taker) == "No such file or directory"
    assert refused(tmp_path, taker) == "Is a directory"
    assert "http or https" in refused("ftp://nobody.invalid/x", taker)


@pytest.mark.parametrize("kind", ["", "absent", "text", "private", "rsa"])
def test_without_a_good_key_nothing_is_taken(
    taker: Machine, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    other = rsa.generate_private_key(65537, 2048).public_key()
    pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    contents = {"text": "no key", "private": KEY.private_key, "rsa": pem.decode()}
    if kind in contents:
        (tmp_path / kind).write_text(contents[kind])
    monkeypatch.setenv(bundle.KEY_VARIABLE, str(tmp_path / kind) if kind else "")
    assert bundle.KEY_VARIABLE in refused(made, taker)


def _signed(manifest: Manifest, archive: bytes) -> bytes:
    line = manifest.line()
    return b"\n".join((line, base64.b64encode(bundle._sign(line, KEY)), archive))


def _member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def _archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def _packed(content: bytes) -> Packed:
    return Packed(len(content), hashlib.sha256(content).hexdigest())


PLACE = f"tools/registry-{'0' * 12}/registry"
GOOD = _member(PLACE, b"good")
OUT = ("../outside", "/tmp/outside", "tools/../../outside", f"{PLACE}/../../../../outside", "tools/other", "")
ARCHIVES = {
    **{f"also {name!r}": [GOOD, _member(name, b"x")] for name in OUT},
    "link": [_member(PLACE, type=tarfile.SYMTYPE, linkname="/bin/sh")],
    "link and file": [_member("tools", type=tarfile.SYMTYPE, linkname="/tmp"), GOOD],
    "hard link": [_member(PLACE, type=tarfile.LNKTYPE, linkname="/bin/sh")],
    "directory": [_member(PLACE, type=tarfile.DIRTYPE)],
    "pipe": [_member(PLACE, type=tarfile.FIFOTYPE)],
    "device": [_member(PLACE, type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "twice": [GOOD, GOOD],
    "longer": [_member(PLACE, b"good and more")],
    "other": [_member(PLACE, b"evil")],
    "nothing": [],
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_signed_leads_out_of_its_place_no_more(
    taker: Machine, tmp_path: Path, name: str
) -> None:
    archive = _archive(*ARCHIVES[name])
    manifest = Manifest(bundle.this_platform(), _packed(archive), {PLACE: _packed(b"good")}, [])
    (tmp_path / "bad").write_bytes(_signed(manifest, archive))
    assert "its archive" in refused(tmp_path / "bad", taker)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("archive", [b"", b"no gzip", gzip.compress(b"no tar"), _archive(GOOD)[:40]])
def test_a_signed_archive_that_is_none_is_refused(taker: Machine, tmp_path: Path, archive: bytes) -> None:
    manifest = Manifest(bundle.this_platform(), _packed(archive), {PLACE: _packed(b"good")}, [])
    (tmp_path / "bad").write_bytes(_signed(manifest, archive))
    assert "its archive" in refused(tmp_path / "bad", taker)


def test_a_signed_manifest_with_another_place_or_form_is_refused(taker: Machine, tmp_path: Path) -> None:
    archive = _archive(GOOD)
    packed = asdict(_packed(b"good"))
    good = json.loads(Manifest(bundle.this_platform(), _packed(archive), {}, []).line())
    record = {"crate": "krustlet", "directory": RECORDS, "name": f"{RECORDS}.json", "content": {}}
    no_files: list[Any] = [None, [], {PLACE: None}, {PLACE: {"size": 1}}]
    forms: list[dict[str, Any]] = [
        *({"files": {name: packed}} for name in (*OUT, f"tools/registry-{'0' * 12}/..", "builds/x/y")),
        *({"files": value} for value in no_files),
        *({"archive": no_sum} for no_sum in (None, {}, {**packed, "size": -1}, {**packed, "size": True})),
        *({"records": [{**record, "directory": name}]} for name in ("..", "../..", "/tmp")),
        *({"records": no_records} for no_records in (None, [record], [None])),
    ]
    for form in forms:
        line = json.dumps({**good, **form}, separators=(",", ":")).encode()
        signed = base64.b64encode(bundle._sign(line, KEY))
        (tmp_path / "bad").write_bytes(b"\n".join((line, signed, archive)))
        assert "its manifest" in refused(tmp_path / "bad", taker)


def test_a_bundle_of_another_platform_is_refused(
    taker: Machine, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "this_platform", lambda: "plan9-mips")
    assert "and this machine is plan9-mips" in refused(made, taker)


def test_what_does_not_fit_is_named_and_the_rest_is_taken(
    taker: Machine, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (taker.crate / "main.rs").write_text("fn main() { changed() }")
    monkeypatch.setattr(toolchain, "_go_version", lambda: "go1.27.1")
    said = bundle.take(str(made))
    assert [line.partition(" ")[0] for line in said] == ["registry", "krustlet"]
    assert all(line.endswith(": it is built") for line in said)
    assert taker.files() == {}
    monkeypatch.setattr(toolchain, "_go_version", lambda: "go1.26.4")
    assert bundle.take(str(made))[0] == "registry is taken from it", "another patch release of the same Go"
    assert not (taker.cache / "builds").exists()


def test_a_tool_that_is_not_whole_is_built(taker: Machine, made: Path) -> None:
    line, _, archive = made.read_bytes().split(b"\n", 2)
    manifest = Manifest.read(line)
    second = next(place for place in manifest.files if place.endswith("/second"))
    files = {place: packed for place, packed in manifest.files.items() if place != second}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        kept = [
            (member, tar.extractfile(member).read())  # type: ignore[union-attr]
            for member in tar
            if member.name in files
        ]
    archive = _archive(*kept)
    made.write_bytes(_signed(replace(manifest, files=files, archive=_packed(archive)), archive))
    assert bundle.take(str(made))[-1].endswith("it is built")
    assert not (taker.cache / "tools").exists()


@contextlib.contextmanager
def serving(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server that gives one answer to all; gives its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/x.bundle"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "parts", "reason"),
    [
        (200, (1, 1), ""),
        (404, (1, 1), "404"),
        (503, (1, 1), "503"),
        (200, (1, 0.5), "truncated"),
        (200, (0.5, 0.5), "truncated"),
        (200, (1, 0), "empty"),
    ],
)
def test_a_bundle_comes_from_a_server(
    taker: Machine, made: Path, status: int, parts: tuple[float, float], reason: str
) -> None:
    """The server says that it sends one part of the bundle, and sends another one."""
    whole = made.read_bytes()
    told, sent = (int(len(whole) * part) for part in parts)

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(told))
        request.end_headers()
        request.wfile.write(whole[:sent])

    with serving(answer) as url:
        if reason:
            assert reason in refused(url, taker)
        else:
            assert len(bundle.take(url)) == 2
    if not reason:
        (taker.crate / "main.rs").write_text("changed")
        with pytest.raises(BundleError, match="does not answer"):
            bundle.take(url)


def test_two_at_once_take_it_once(taker: Machine, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    takes = [threading.Thread(target=bundle.main, args=(["--take", str(made)],)) for _ in range(4)]
    for thread in takes:
        thread.start()
    for thread in takes:
        thread.join()
    assert capsys.readouterr().out.count("is taken") == 2
    assert taker.job().kept() is not None


def test_a_machine_has_one_key_for_its_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "OWN_KEY", tmp_path / "config" / "bundle.key")
    key = bundle.own_key()
    assert bundle.own_key() == key
    assert bundle.OWN_KEY.stat().st_mode & 0o077 == 0
    assert signature.read_key(key).public_key.startswith("-----BEGIN PUBLIC KEY-----")


@pytest.mark.parametrize("source", ["absent", "README.md"])
def test_up_says_in_one_line_what_is_wrong_with_a_bundle_and_builds_nothing(source: str) -> None:
    answer = subprocess.run(
        [paths.REPOSITORY / "scripts" / "up"],
        cwd=paths.REPOSITORY,
        env={**os.environ, "AWESOME_WASM_BUNDLE": source, bundle.KEY_VARIABLE: KEY.public_key},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: AWESOME_WASM_BUNDLE: {paths.REPOSITORY / source}: ")
    assert answer.stderr.count("\n") == 1
    assert "✓ compile" not in answer.stdout
