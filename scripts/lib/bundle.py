"""A release bundle: what one machine has built, in one signed file, so that a team builds once.

A bundle is two lines and an archive:

    the manifest    JSON: for which platform it is, size and SHA-256 of the archive and of each file in it
    its signature   ECDSA P-256 over the SHA-256 of the first line, DER in base64
    the archive     tar, gzip; each file by its place in the cache

The signature is checked before anything else is believed, the archive's sum before anything is unpacked, and
each file's before any is put into the cache. The cache's own keys, which are part of the places, decide what
fits a checkout: tools by their pins, recipe and compiler, builds by what cargo has read.
"""

import argparse
import base64
import contextlib
import gzip
import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from components.providers import ProviderError, cargo, compiler, inputs, signature
from scripts.lib import paths, toolchain
from scripts.lib.steps import StepError, lock

KIND = "awesome-wasm bundle 1"
KEY_VARIABLE = "AWESOME_WASM_BUNDLE_KEY"
OWN_KEY = paths.PASSPHRASE.with_name("bundle.key")
CRATES = {"krustlet": "", "wasm_app": compiler.WASM_TARGET}
"""The crates of the program, and what each is compiled for ("" is this machine)."""

_START = f'{{"kind":"{KIND}",'.encode()
_LONGEST_LINE = 4 * 2**20
_TIMEOUT_SECONDS = 60
_BLOCK = 2**20
_PLACE = re.compile(
    r"tools/[a-z0-9-]+-[0-9a-f]{12}/[a-z0-9-]+|builds/[0-9a-f]{64}/[A-Za-z0-9_-][\w.-]*", re.ASCII
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BundleError(Exception):
    """A bundle is not what it is to be. The message is for the user, in one line."""


def this_platform() -> str:
    """Whose programs run here, as `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


@dataclass(frozen=True)
class Packed:
    """A file of the archive, or the archive itself: its size in bytes and SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """A crate's build: the name of its record's directory and file, and what that says."""

    crate: str
    directory: str
    name: str
    content: dict[str, Any]

    @property
    def place(self) -> str:
        """Where in the cache the file lies that was built."""
        return f"builds/{self.content['built']['sha256']}/{self.content['built']['name']}"


@dataclass(frozen=True)
class Manifest:
    """What a bundle's first line says. `files` are by their places in the cache."""

    platform: str
    archive: Packed
    files: dict[str, Packed]
    records: list[Record]

    def line(self) -> bytes:
        """The line, without its end."""
        return json.dumps({"kind": KIND, **asdict(self)}, separators=(",", ":")).encode()

    @staticmethod
    def read(line: bytes) -> "Manifest":
        """
        Raises:
            BundleError: it says what no bundle does, such as a place outside of the cache.
        """
        try:
            found = json.loads(line)
            manifest = Manifest(
                found["platform"],
                Packed(**found["archive"]),
                {place: Packed(**packed) for place, packed in found["files"].items()},
                [Record(**record) for record in found["records"]],
            )
            names = [name for record in manifest.records for name in (record.directory, record.name)]
            is_good = (
                all(_is_packed(packed) for packed in (manifest.archive, *manifest.files.values()))
                and all(record.crate in CRATES for record in manifest.records)
                and all(_PLACE.fullmatch(place) for place in manifest.files)
                and all(_SHA256.fullmatch(name.removesuffix(".json")) for name in names)
                and all(record.place in manifest.files for record in manifest.records)
                and all(inputs.Inputs(**record.content["inputs"]) for record in manifest.records)
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            is_good = False
        if not is_good:
            raise BundleError("its manifest is none of this version of ./scripts/bundle")
        return manifest

    def tools(self) -> set[str]:
        """The directories of tools that are in it."""
        return {place.split("/")[1] for place in self.files if place.startswith("tools/")}


def _is_packed(packed: Packed) -> bool:
    return type(packed.size) is int and packed.size >= 0 and _SHA256.fullmatch(packed.sha256) is not None


# Making one


def own_key() -> str:
    """The private key (PEM) that this machine signs its bundles with: made once, for its user alone."""
    if not OWN_KEY.exists():
        OWN_KEY.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=OWN_KEY.parent) as scratch:  # 0600
            scratch.write(signature.generate_key().private_key)
            scratch.flush()
            # Of two at once, the second one takes the first one's.
            with contextlib.suppress(FileExistsError):
                os.link(scratch.name, OWN_KEY)
    return OWN_KEY.read_text(encoding="ascii")


def _contents(*, tests: bool) -> tuple[dict[str, Path], list[Record]]:
    """What there is to pack: files by their places in the cache, and the records of the builds."""
    files: dict[str, Path] = {}
    for tool in toolchain.all_tools(tests=tests):
        directory = toolchain.directory(tool)
        files |= {f"tools/{directory.name}/{program}": directory / program for program in tool.programs}
    records = []
    for crate, target in CRATES.items():
        found = cargo.job_for(paths.REPOSITORY / crate, target).recorded()
        if found is None:
            raise BundleError(f"{crate} cannot be told to be built of what is there now; run it again")
        path, built = found
        content = json.loads(path.read_text(encoding="utf-8"))
        records.append(Record(crate, path.parent.name, path.name, content))
        files[records[-1].place] = Path(built.path)
    return files, records


def pack(files: dict[str, Path], records: list[Record], key: signature.KeyPair, output: Path) -> None:
    """Writes a bundle of these files; the same files give the same archive."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        archive = Path(scratch) / "archive"
        packed = {}
        with (
            archive.open("wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for place, path in sorted(files.items()):
                member = tarfile.TarInfo(place)
                member.size, member.mode = path.stat().st_size, 0o755
                packed[place] = Packed(member.size, cargo.measure(path).sha256)
                with path.open("rb") as file:
                    tar.addfile(member, file)
        measured = cargo.measure(archive)
        line = Manifest(this_platform(), Packed(measured.size, measured.sha256), packed, records).line()
        whole = Path(scratch) / "bundle"
        with whole.open("wb") as file, archive.open("rb") as source:
            file.write(line + b"\n" + base64.b64encode(_sign(line, key)) + b"\n")
            shutil.copyfileobj(source, file, _BLOCK)
        whole.chmod(0o644)
        whole.replace(output)


def _sign(line: bytes, key: signature.KeyPair) -> bytes:
    private = serialization.load_pem_private_key(key.private_key.encode(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)  # noqa: S101 - read_key takes no other
    return private.sign(line, ec.ECDSA(hashes.SHA256()))


# Taking one


def trusted_key() -> ec.EllipticCurvePublicKey:
    """The key whose bundles are taken.

    Raises:
        BundleError: none is named, or what is named is none.
    """
    named = os.environ.get(KEY_VARIABLE, "")
    if not named:
        raise BundleError(
            f"what is in a bundle runs with your rights: set {KEY_VARIABLE} to the public key of who made "
            "it, a PEM file or its text"
        )
    try:
        pem = named if named.startswith("-----BEGIN") else Path(named).read_text(encoding="ascii")
        key = serialization.load_pem_public_key(pem.encode())
    except OSError as error:
        raise BundleError(f"{KEY_VARIABLE}: {named}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BundleError(f"{KEY_VARIABLE} is no public key of the kind ECDSA P-256, in PEM")
    return key


def opened(source: str) -> IO[bytes]:
    """Opens a bundle.

    Raises:
        BundleError: it is not there.
    """
    if "://" in source and not re.match(r"https?://", source):
        raise BundleError("it is to be a file, or a URL of http or https")
    try:
        if "://" not in source:
            return Path(source).open("rb")
        reply: IO[bytes] = urllib.request.urlopen(source, timeout=_TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        raise BundleError(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise BundleError(f"the server does not answer: {error.reason}") from error
    except (http.client.HTTPException, ValueError) as error:
        raise BundleError(f"what is there does not speak HTTP: {error}") from error
    except OSError as error:
        raise BundleError(error.strerror or str(error)) from error
    return reply


@contextlib.contextmanager
def _read() -> Iterator[None]:
    """Raises BundleError for a bundle, from a server or on a disk, that breaks off."""
    try:
        yield
    except http.client.IncompleteRead as error:
        raise BundleError("it is truncated: the server ended early") from error
    except (http.client.HTTPException, OSError) as error:
        raise BundleError(f"it cannot be read: {error}") from error


def signed_manifest(bundle: IO[bytes], key: ec.EllipticCurvePublicKey) -> Manifest:
    """Reads what stands before the archive.

    Raises:
        BundleError: it is no bundle, not signed, signed by another key, altered, or for another platform.
    """
    with _read():
        line = bundle.readline(_LONGEST_LINE)
        signed = bundle.readline(_LONGEST_LINE)
    if not line.startswith(_START):
        raise BundleError("it is empty" if not line else "it is no bundle that ./scripts/bundle made")
    if not line.endswith(b"\n"):
        raise BundleError("it is truncated: it ends within its manifest")
    line = line[:-1]
    if not signed.endswith(b"\n"):
        raise BundleError("it is truncated: it ends before its archive")
    if signed == b"\n":
        raise BundleError("it is not signed")
    try:
        value = base64.b64decode(signed[:-1], validate=True)
        key.verify(value, line, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        value = b""
    if not value or base64.b64encode(value) != signed[:-1]:
        raise BundleError(f"it is not signed by the key in {KEY_VARIABLE}, or was altered since")
    manifest = Manifest.read(line)
    if manifest.platform != this_platform():
        raise BundleError(f"it is for {manifest.platform}, and this machine is {this_platform()}")
    return manifest


def receive(bundle: IO[bytes], archive: Packed, target: IO[bytes]) -> None:
    """Copies the archive, which is all that is left of the bundle.

    Raises:
        BundleError: it is longer or shorter than was signed, or another one.
    """
    digest, left = hashlib.sha256(), archive.size
    while left:
        with _read():
            block = bundle.read(min(left, _BLOCK))
        if not block:
            break
        digest.update(block)
        target.write(block)
        left -= len(block)
    with _read():
        rest = bundle.read(1)
    if left:
        raise BundleError(f"it is truncated: {left} of its archive's {archive.size} bytes are missing")
    if rest:
        raise BundleError("it was altered: there is something after its archive")
    if digest.hexdigest() != archive.sha256:
        raise BundleError(
            "it was altered or is damaged: its archive's SHA-256 is not the one that was signed"
        )
    target.flush()


def unpack(archive: IO[bytes], files: dict[str, Packed], directory: Path) -> None:
    """Unpacks the archive into an empty directory: the files of the manifest, and nothing else.

    Raises:
        BundleError: the archive has something else in it, also a link or a directory, or less.
    """
    left = dict(files)
    try:
        with tarfile.open(fileobj=archive, mode="r|gz") as tar:
            for member in tar:
                packed = left.pop(member.name, None)
                content = tar.extractfile(member) if member.isreg() and packed else None
                if packed is None or content is None or member.size != packed.size:
                    raise BundleError(f"its archive has {member.name!r}, which its manifest does not have so")
                target = directory / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    shutil.copyfileobj(content, file, _BLOCK)
                target.chmod(0o755)
                if cargo.measure(target).sha256 != packed.sha256:
                    raise BundleError(f"its archive has another {member.name!r} than its manifest says")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BundleError(f"its archive cannot be unpacked: {error}") from error
    if left:
        raise BundleError(f"its archive lacks {min(left)!r}")


@dataclass(frozen=True)
class Wanted:
    """What this checkout lacks: tools with the names of the directories that would do, and crates' builds."""

    tools: list[tuple[toolchain.Tool, list[str]]]
    jobs: dict[str, cargo.Job]

    def fitting(self, manifest: Manifest) -> tuple[list[tuple[toolchain.Tool, str]], dict[str, Record]]:
        """What of a bundle is of use here: tools by their directories, records by their crates."""
        tools = []
        for tool, names in self.tools:
            programs = [[f"tools/{name}/{program}" for program in tool.programs] for name in names]
            whole = [
                name
                for name, wanted in zip(names, programs, strict=True)
                if manifest.files.keys() >= {*wanted}
            ]
            tools += [(tool, name) for name in whole[:1]]
        return tools, {record.crate: record for record in manifest.records if self._fits(record)}

    def _fits(self, record: Record) -> bool:
        job = self.jobs.get(record.crate)
        if job is None or job.records.name != record.directory:
            return False
        read = inputs.Inputs(**record.content["inputs"])
        return inputs.unchanged(read, job.crate, job.environment, inputs.digest)


def wanted() -> Wanted:
    """What this checkout lacks."""
    absent = [tool for tool in toolchain.needed(tests=False) if not toolchain.directory(tool).is_dir()]
    jobs = {crate: cargo.job_for(paths.REPOSITORY / crate, target) for crate, target in CRATES.items()}
    return Wanted(
        [(tool, [place.name for place in toolchain.places(tool)]) for tool in absent],
        {crate: job for crate, job in jobs.items() if job.kept() is None},
    )


def take(source: str) -> list[str]:
    """Puts what this checkout lacks, and a bundle has, into the cache; says what was taken and what not.

    Raises:
        BundleError: the bundle is refused, and nothing was taken from it.
    """
    key = trusted_key()
    lacking = wanted()
    if not lacking.tools and not lacking.jobs and "://" in source:
        return ["nothing is missing; it is not read"]
    with opened(source) as bundle, tempfile.TemporaryDirectory(dir=paths.CACHE, prefix=".bundle-") as place:
        manifest = signed_manifest(bundle, key)
        tools, records = lacking.fitting(manifest)
        needs = manifest.archive.size + sum(packed.size for packed in manifest.files.values())
        if (free := shutil.disk_usage(paths.CACHE).free) < needs:
            raise BundleError(f"it needs {needs >> 20} MiB in {paths.CACHE}, where {free >> 20} MiB are free")
        with (Path(place) / "archive").open("w+b") as archive:
            receive(bundle, manifest.archive, archive)
            archive.seek(0)
            made = Path(place) / "cache"
            made.mkdir()
            unpack(archive, manifest.files, made)
        for tool, name in tools:
            toolchain.install(tool, made / "tools" / name)
        for record in records.values():
            _install(record, made)
    taken = {*(tool.name for tool, _ in tools), *records}
    missing = [*(tool.name for tool, _ in lacking.tools), *lacking.jobs]
    lines = [f"{name} is taken from it" for name in missing if name in taken]
    return [*lines, *(_reason(name, manifest) for name in missing if name not in taken)]


def _reason(name: str, manifest: Manifest) -> str:
    """Why something that is missing is built all the same."""
    if any(record.crate == name for record in manifest.records):
        return f"{name} in it was made of other sources, or by another Rust or C library: it is built"
    if any(tool.rpartition("-")[0] == name for tool in manifest.tools()):
        return f"{name} in it is another version, or made by another Go: it is built"
    return f"{name} is not in it: it is built"


def _install(record: Record, made: Path) -> None:
    """Moves a build into the cache, and then writes the record that leads to it."""
    target = paths.CACHE / record.place
    target.parent.mkdir(parents=True, exist_ok=True)
    (made / record.place).replace(target)
    inputs.write_json(record.content, paths.CACHE / "inputs" / record.directory / record.name)


def _key(options: argparse.Namespace) -> signature.KeyPair:
    pem = options.key.read_text(encoding="utf-8") if options.key else own_key()
    try:
        return signature.read_key(pem, os.environ.get("COSIGN_PASSWORD", ""))
    except ProviderError as error:
        raise BundleError(f"{options.key or OWN_KEY}: it is to be {error}") from error


def _make(options: argparse.Namespace) -> None:
    key, output = _key(options), options.output.absolute()
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise BundleError(f"cannot write {output}")
    if options.check:
        return
    files, records = _contents(tests=options.tests)
    pack(files, records, key, output)
    made = cargo.measure(output)
    sys.stdout.write(
        f"{output}  {made.size / 2**20:.0f} MiB  sha256:{made.sha256}\n"
        f"signed with {options.key or OWN_KEY}; who takes it sets {KEY_VARIABLE} to the public key:\n"
        f"{key.public_key}"
    )


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="./scripts/bundle", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path(f"awesome-wasm-{this_platform()}.bundle"),
        help="where to write it (%(default)s)",
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="private key to sign with, ECDSA P-256 in PEM, cosign's form included (its password in "
        f"COSIGN_PASSWORD); without it the one of this machine, {OWN_KEY}",
    )
    parser.add_argument("--tests", action="store_true", help="with the tools of the tests")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--take", metavar="FILE|URL", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Makes a bundle, or takes one; gives the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.take is None:
            _make(options)
            return 0
        with lock(paths.CACHE / "bundle.lock"):
            sys.stdout.write("".join(f"{line}\n" for line in take(options.take)))
    except (BundleError, ProviderError, StepError) as error:
        sys.stderr.write(f"{options.take or 'bundle'}: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{error.filename}: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
