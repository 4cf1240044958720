"""A stack whose key is in Cloud KMS: who may be asked signs, and nobody has the key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from components.providers import kms
from tests.e2e.conftest import Stack, kms_of, private_keys
from tests.e2e.test_changes import preview, up
from tests.load import load

# What a changed app is, and what of it is signed.
IMAGE = {"app-build", "app-push", "app-signature", "app-signature-push", "app-attestation"}


def verify(stack: Stack, peers: dict[str, str], files: Path) -> None:
    """Checks the image's signature and attestations with both versions of cosign."""
    key, root = files / "cosign.pub", files / "trusted_root.json"
    key.write_text(stack.outputs()["public_key"])
    root.write_text('{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}')
    flags = ("--insecure-ignore-tlog", f"--trusted-root={root}", "--key", str(key))
    client = Stack(stack.directory, {**stack.env, **peers})
    for program in ("cosign", "cosign3"):
        client.run(program, "verify", *flags, stack.outputs()["image"])
        attestation = ("verify-attestation", "--type", "slsaprovenance1")
        client.run(program, *attestation, *flags, stack.outputs()["image"])


@pytest.fixture
def source(stack: Stack) -> Iterator[Path]:
    """A file of the app's, and everything as it was in the end."""
    path = stack.directory / "wasm_app" / "src" / "page.html"
    before = path.read_text()
    yield path
    path.write_text(before)
    stack.run("git", "checkout", "--quiet", "Pulumi.local.yaml")
    stack.run("pulumi", "up", "--yes", "--skip-preview")


def test_a_key_in_cloud_kms_takes_over_signs_what_changes_and_is_in_no_state(
    stack: Stack, peers: dict[str, str], tmp_path: Path, source: Path
) -> None:
    url, reference = stack.outputs()["url"], kms_of(stack).new_key()
    stack.run("pulumi", "config", "set", "signingKey", reference)
    plan = preview(stack)
    with load(f"{url}/healthz") as seen:
        assert up(stack) == plan
    assert seen.failures == []
    assert plan["signing-key"] == "replace"
    public_key = json.loads(kms_of(stack).ask("GET", f"{kms.version_name(reference)}/publicKey").text)["pem"]
    assert stack.outputs()["public_key"] == public_key
    assert private_keys(stack) == []
    stack.run("./scripts/verify", "--wait", "60")
    verify(stack, peers, tmp_path)

    # What is signed already is not signed again.
    stack.run("pulumi", "up", "--yes", "--expect-no-changes")
    stack.run("pulumi", "preview", "--expect-no-changes")

    source.write_text(source.read_text().replace("</body>", "<p>signed elsewhere</p></body>"))
    plan = preview(stack)
    assert plan.keys() >= IMAGE
    assert up(stack) == plan
    assert "signed elsewhere" in stack.get("/").text
    verify(stack, peers, tmp_path)


def test_a_disabled_version_is_one_error_and_nothing_is_half_made(
    stack: Stack, peers: dict[str, str], source: Path
) -> None:
    reference, before = kms_of(stack).new_key(), stack.outputs()
    stack.run("pulumi", "config", "set", "signingKey", reference)
    stack.run("pulumi", "up", "--yes", "--skip-preview")
    kms_of(stack).set_state(reference, "DISABLED")
    client = Stack(stack.directory, {**stack.env, **peers})
    repository = before["image"].partition("@")[0]
    pushed = client.run("crane", "ls", repository).stdout
    source.write_text(source.read_text().replace("</body>", "<p>never signed</p></body>"))
    refused = stack.run("pulumi", "up", "--yes", "--skip-preview", check=False)
    printed = refused.stdout + refused.stderr
    assert refused.returncode != 0
    assert "Traceback" not in printed
    problem = "has a problem: "
    said = {line.partition(problem)[2] for line in printed.splitlines() if "state is: DISABLED" in line}
    assert len(said) == 1, said
    assert "1 errored" in printed
    assert client.run("crane", "ls", repository).stdout == pushed
    assert "never signed" not in requests.get(before["url"], timeout=10).text
    kms_of(stack).set_state(reference, "ENABLED")
    stack.run("pulumi", "up", "--yes", "--skip-preview")
    assert "never signed" in stack.get("/").text
