"""Signatures and provenance in both of cosign's formats: whose count, and what a pod is told of others."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from components.node import fingerprint
from components.providers import artifacts, oci, referrers, signature
from components.providers.client import Client
from tests.integration.agent.harness import Agent, Pod, Workspace, artifact
from tests.load import load
from tests.waiting import until

PROVENANCE = "https://slsa.dev/provenance/v1"
BUILDER = "https://builders.example/shop/up.yml@refs/heads/main"
OFFLINE = ("--yes", "--use-signing-config=false", "--tlog-upload=false")
# What is given to the registry in place of a signature.
Attack = Callable[["Image"], None]


@dataclass
class Image:
    """An image that no node has and nobody signed yet, and who may sign it."""

    space: Workspace
    name: str
    key: str

    @property
    def repository(self) -> str:
        return self.name.partition("@")[0]

    @property
    def digest(self) -> str:
        return self.name.partition("@")[2]

    @property
    def client(self) -> Client:
        return Client(self.repository)

    def signed(self, digest: str = "", key: str = "") -> signature.Signed:
        """A signature over this image, or another digest, by the trusted key or another one."""
        return signature.sign(key or self.key, self.repository, digest or self.digest)

    def sign_at_tag(self, signed: signature.Signed) -> None:
        """As cosign 2 does it."""
        oci.push_signature(self.repository, self.digest, signed.payload, signed.signature)

    def bundle(self, digest: str = "", key: str = "") -> str:
        """A bundle over this image, or another digest, by the trusted key or another one."""
        return signature.bundle(
            signature.statement(digest or self.digest), self.signed(digest, key).bundle_signature
        )

    def sign_by_bundle(self, bundle: str) -> None:
        """As cosign 3 does it."""
        oci.push_bundle(self.repository, self.digest, bundle)

    def attest(self, builder: str, *, at: str = "both", digest: str = "", key: str = "") -> None:
        """Say at the tag of cosign 2, by a bundle or in both ways who built this image, or another one."""
        predicate = artifacts.canonical({"buildDefinition": {}, "runDetails": {"builder": {"id": builder}}})
        body = signature.statement(digest or self.digest, PROVENANCE, predicate)
        signed = signature.sign_statement(key or self.key, body)
        if at != "bundle":
            envelope = artifacts.canonical(signature.envelope(body, signed))
            oci.push_attestations(self.repository, self.digest, {PROVENANCE: envelope})
        if at != "tag":
            oci.push_bundle(self.repository, self.digest, signature.bundle(body, signed), PROVENANCE)

    def refer(self, subject: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> str:
        """Push a good bundle in an altered manifest that refers to `subject`, unlisted; give its digest."""
        described = referrers.subject_descriptor(self.client, subject)
        good = artifacts.bundle_artifact(self.bundle(), described)
        manifest = json.loads(good.manifest.content)
        change(manifest)
        content = artifacts.Blob(artifacts.MANIFEST, artifacts.canonical(manifest))
        return self.client.push_artifact(artifacts.Artifact(content, good.blobs), content.digest)

    def list_referrer(self, digest: str, **described: Any) -> None:
        """Write the list of referrers by hand, with whatever it says of this one."""
        entry = {"mediaType": artifacts.MANIFEST, "digest": digest, "size": 7, **described}
        index = {"schemaVersion": 2, "mediaType": referrers.INDEX, "manifests": [entry]}
        tag, content = self.digest.replace(":", "-"), artifacts.canonical(index)
        self.client.expect(self.client.manifest_request(tag, "PUT", content, media_type=referrers.INDEX), 201)


@pytest.fixture
def image(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Image]:
    """Makes unsigned images, or ones that the trusted key signed."""
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", space.cluster.cloud.token)

    def make(*, signed: bool = False) -> Image:
        module = artifact("http-guest", variant=space.unique("v"))
        name = space.registry.push("signed", module, space.unique("tag"), key=None)
        made = Image(space, name, space.registry.key.private_key)
        if signed:
            made.sign_at_tag(made.signed())
        return made

    return make


@pytest.fixture
def cosign(space: Workspace, tmp_path: Path) -> Callable[..., None]:
    """Runs a program where `cosign.key` is the trusted key and the registry is logged in to."""
    for program in ("cosign", "cosign3"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is not on PATH; see scripts/toolchain")
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(space.registry.docker_config)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "DOCKER_CONFIG": str(tmp_path / "docker"),
        "COSIGN_PASSWORD": "",
    }

    def run(*command: str) -> None:
        answer = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr

    (tmp_path / "key.pem").write_text(space.registry.key.private_key)
    run("cosign", "import-key-pair", "--key", "key.pem", "--output-key-prefix", "cosign")
    return run


def test_what_each_version_of_cosign_and_the_program_signed_runs(
    space: Workspace, image: Callable[[], Image], cosign: Callable[..., None]
) -> None:
    by_cosign2, by_cosign3, at_tag, by_bundle, misdescribed = (image() for _ in range(5))
    cosign("cosign", "sign", "--key", "cosign.key", *OFFLINE, by_cosign2.name)
    cosign("cosign3", "sign", "--key", "cosign.key", *OFFLINE, by_cosign3.name)
    at_tag.sign_at_tag(at_tag.signed())
    by_bundle.sign_by_bundle(by_bundle.bundle())
    # What the list says of a referrer decides nothing.
    misdescribed.list_referrer(misdescribed.refer(misdescribed.digest), artifactType="text/plain")
    signed = (by_cosign2, by_cosign3, at_tag, by_bundle, misdescribed)
    for pod in [space.serve(image=made.name) for made in signed]:
        pod.wait_ready()


def _another(image: Image) -> str:
    """The digest of another image in the same repository."""
    repository = f"{image.space.registry.uri}/signed"
    assert repository == image.repository
    other = artifact("http-guest", variant=image.space.unique("other"))
    return image.client.push_artifact(other, image.space.unique("tag"))


def _with_layer_type(image: Image) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["mediaType"] = "application/json"

    image.list_referrer(image.refer(image.digest, change), artifactType=artifacts.BUNDLE)


def _with_artifact_type(image: Image) -> None:
    made = image.refer(image.digest, lambda manifest: manifest.update(artifactType="text/plain"))
    image.list_referrer(made, artifactType=artifacts.BUNDLE)


def _without_subject(image: Image) -> None:
    made = image.refer(image.digest, lambda manifest: manifest.pop("subject"))
    image.list_referrer(made, artifactType=artifacts.BUNDLE)


def _cut_signature(image: Image) -> None:
    signed = image.signed()
    image.sign_at_tag(signature.Signed(signed.payload, signed.signature[:40], ""))


def _cut_bundle(image: Image) -> None:
    image.sign_by_bundle(image.bundle()[:200])


def _removed(image: Image) -> None:
    inputs = {"repository": image.repository, "digest": image.digest, **image.signed().outputs()}
    made = oci.OciSignatureProvider().create(inputs).outs
    assert made
    # As the next run's process, which knows of none that is needed.
    with mock.patch.object(oci, "NEEDED", oci.Needed()):
        oci.OciSignatureProvider().delete("id", made)


ATTACKS: dict[str, tuple[str, Attack]] = {
    "removed": ("it is not signed", _removed),
    "cut at the tag": ("signature at tag sha256-.* is malformed", _cut_signature),
    "cut bundle": ("bundle sha256:.* is malformed", _cut_bundle),
    "other key at the tag": (
        "signature at tag sha256-.* was made by no key",
        lambda image: image.sign_at_tag(image.signed(key=signature.generate_key().private_key)),
    ),
    "other key's bundle": (
        "bundle sha256:.* was made by no key",
        lambda image: image.sign_by_bundle(image.bundle(key=signature.generate_key().private_key)),
    ),
    "other artifact's at the tag": (
        "signature at tag sha256-.* is for another manifest, sha256:",
        lambda image: image.sign_at_tag(image.signed(_another(image))),
    ),
    "bundle with another digest": (
        "bundle sha256:.* is for another manifest, sha256:",
        lambda image: image.sign_by_bundle(image.bundle(_another(image))),
    ),
    "bundle with another layer type": ('has layer type "application/json", expected', _with_layer_type),
    "bundle with another artifact type": ('has artifact type "text/plain", expected', _with_artifact_type),
    "bundle without a subject": ("refers to no manifest", _without_subject),
    "lying list": (
        "refers to another manifest, .sha256:",
        lambda image: image.list_referrer(image.refer(_another(image)), artifactType=artifacts.BUNDLE),
    ),
}


def test_each_attack_has_its_reason_and_the_command_in_it_makes_the_image_run(
    space: Workspace, image: Callable[[], Image], cosign: Callable[..., None]
) -> None:
    refused: list[tuple[Image, str, Pod]] = []
    for reason, attack in ATTACKS.values():
        made = image()
        attack(made)
        refused.append((made, reason, space.serve(image=made.name)))
    for number, (made, reason, pod) in enumerate(refused):
        message = pod.wait_waiting("SignatureValidationFailed")
        assert re.search(reason, message), message
        advice = re.search("`(cosign sign .*)`", message)
        assert advice, message
        assert made.name in advice[1]
        program, *arguments = shlex.split(advice[1])
        cosign((program, "cosign3")[number % 2], *arguments)
        pod.delete()
    for pod in [space.serve(image=made.name) for made, _, _ in refused]:
        pod.wait_ready()


def test_a_signature_does_not_move_with_the_tag(space: Workspace, image: Callable[[], Image]) -> None:
    signed, unsigned = image(), image()
    signed.sign_by_bundle(signed.bundle())
    signed.sign_at_tag(signed.signed())
    tag = space.unique("moved")
    content = signed.client.manifest_request(unsigned.digest, "GET").content
    signed.client.expect(signed.client.manifest_request(tag, "PUT", content), 201)
    message = space.serve(image=f"{signed.repository}:{tag}").wait_waiting("SignatureValidationFailed")
    assert f"it is not signed: manifest {unsigned.digest} has no tag" in message


def test_other_keys_are_taken_while_the_node_runs_and_no_request_fails_meanwhile(
    make_agent: Callable[..., Agent],
    make_workspace: Callable[[Agent], Workspace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = make_agent("rotated")
    agent.start()
    space = make_workspace(agent)
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", space.cluster.cloud.token)
    keys, run = agent.directory / "cosign.pub", agent.pid
    next_ = signature.generate_key()

    def put(text: str, in_force: str) -> None:
        # As the startup script does it: a file is there as a whole.
        new = keys.with_suffix(".new")
        new.write_text(text)
        new.replace(keys)
        label = "krustlet.dev/verification-keys"
        until(lambda: agent.node().metadata.labels[label] == fingerprint(in_force), "the node to say so")

    before = space.serve().wait_ready()
    with load(f"{before.url}/version") as seen:
        until(lambda: seen.answers["1"] > 50, "requests to be answered")
        put(next_.public_key, in_force=next_.public_key)
        # Also what is on the node already; and what the new key has signed, as the old one had.
        refused = space.serve()
        refused.wait_waiting("SignatureValidationFailed")
        repository, _, digest = space.http_image.partition("@")
        made = signature.sign(next_.private_key, repository, digest)
        oci.push_bundle(
            repository, digest, signature.bundle(signature.statement(digest), made.bundle_signature)
        )
        space.serve().wait_ready()
        refused.wait_ready(timeout=60)
        put("no key", in_force=next_.public_key)
        until(lambda: "the keys of before stay in force" in agent.log, "the complaint")
        space.serve().wait_ready()
        answered = seen.answers["1"]
        until(lambda: seen.answers["1"] > answered + 50, "more answers")
    assert seen.failures == []
    assert agent.pid == run
    assert before.status().restart_count == 0


@pytest.fixture
def strict(
    namespace: str, make_agent: Callable[..., Agent], make_workspace: Callable[[Agent], Workspace]
) -> Workspace:
    """A node that runs in the tests' namespace what one builder built."""
    agent = make_agent("strict", f"--require-provenance={namespace}=https://builders.example/shop/*")
    agent.start()
    return make_workspace(agent)


def test_what_the_builder_built_runs_whoever_attested_it_and_also_when_that_is_on_the_node_alone(
    strict: Workspace, image: Callable[..., Image], cosign: Callable[..., None], tmp_path: Path
) -> None:
    by_cosign2, by_cosign3, at_tag, by_bundle = made = [image(signed=True) for _ in range(4)]
    predicate = tmp_path / "provenance.json"
    # What cosign itself asks for in provenance.
    definition = {"buildType": "https://builders.example/type", "externalParameters": {"a": "b"}}
    details = {"builder": {"id": BUILDER}}
    predicate.write_text(json.dumps({"buildDefinition": definition, "runDetails": details}))
    attest = ("attest", "--key", "cosign.key", *OFFLINE, "--type", "slsaprovenance1", "--predicate")
    cosign("cosign", *attest, str(predicate), by_cosign2.name)
    cosign("cosign3", *attest, str(predicate), by_cosign3.name)
    at_tag.attest(BUILDER, at="tag")
    by_bundle.attest(BUILDER, at="bundle")
    for pod in [strict.serve(image=one.name) for one in made]:
        pod.wait_ready()
    client, tag = at_tag.client, artifacts.attestation_tag(at_tag.digest)
    client.delete_artifact(client.manifest_digest(tag) or "", tag)
    strict.serve(image=at_tag.name).wait_ready()


def test_what_it_did_not_build_is_refused_with_the_reason_until_it_did(
    strict: Workspace, image: Callable[..., Image]
) -> None:
    other = signature.generate_key().private_key
    attacks: dict[str, Attack] = {
        "nothing says who built it: manifest sha256:": lambda _: None,
        'names the builder "urn:other"': lambda made: made.attest("urn:other"),
        "was made by no key that this node trusts": lambda made: made.attest(BUILDER, key=other),
        "is for another manifest": lambda made: made.attest(BUILDER, digest=_another(made)),
    }
    refused = []
    for reason, attack in attacks.items():
        made = image(signed=True)
        attack(made)
        refused.append((made, reason, strict.serve(image=made.name)))
    for made, reason, pod in refused:
        message = pod.wait_waiting("SignatureValidationFailed")
        assert reason in message, message
        assert "cosign attest" in message
        pod.delete()
        made.attest(BUILDER)
    for pod in [strict.serve(image=made.name) for made, _, _ in refused]:
        pod.wait_ready()


def test_a_node_asks_who_built_it_where_it_is_told_to_and_not_elsewhere(
    make_agent: Callable[..., Agent],
    make_workspace: Callable[[Agent], Workspace],
    image: Callable[..., Image],
    namespace: str,
) -> None:
    made = image(signed=True)
    made.attest(BUILDER)
    pods = []
    for name, required in {
        "elsewhere": "another-namespace=urn:none",
        "by-name": f"*=urn:none,{namespace}={BUILDER}",
        "everywhere": "*=urn:none",
    }.items():
        agent = make_agent(name, f"--require-provenance={required}")
        agent.start()
        pods.append(make_workspace(agent).serve(image=made.name))
    for pod in pods[:2]:
        pod.wait_ready()
    message = pods[2].wait_waiting("SignatureValidationFailed")
    assert f'names the builder "{BUILDER}", and the pod\'s namespace takes urn:none' in message
