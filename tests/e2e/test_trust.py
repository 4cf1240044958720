"""What the node must refuse: a module that is altered, unsigned, or signed by somebody else."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.providers.signature import generate_key
from tests.e2e.conftest import Stack, private_keys
from tests.load import load
from tests.waiting import until

SIGN = ("--yes", "--tlog-upload=false", "--new-bundle-format=false", "--use-signing-config=false")


@dataclass
class Bench:
    """A stack with the registry's peers logged in, and room for the files of a test."""

    stack: Stack
    peers: Stack
    files: Path

    @property
    def repository(self) -> str:
        return str(self.stack.outputs()["registry"])

    def push(self, name: str, *, flavour: bytes) -> str:
        """Pushes a copy of the stack's module that differs by a custom section; gives it by digest."""
        image, module = self.stack.outputs()["image"], self.files / "module.wasm"
        repository = image.partition("@")[0]
        manifest = json.loads(self.peers.run("crane", "manifest", image).stdout)
        layer = f"{repository}@{manifest['layers'][0]['digest']}"
        self.peers.run("oras", "blob", "fetch", "--plain-http", "--output", str(module), layer)
        # A custom section: id 0, its size, the name's size and the name, and the content.
        section = b"\x04test" + flavour
        module.write_bytes(module.read_bytes() + bytes([0, len(section)]) + section)
        config = self.files / "config.json"
        made = json.loads(
            self.peers.run("crane", "blob", f"{repository}@{manifest['config']['digest']}").stdout
        )
        digest = self.peers.run("sha256sum", str(module)).stdout.split()[0]
        made["layerDigests"] = [f"sha256:{digest}"]
        config.write_text(json.dumps(made))
        reference = f"{self.repository}/{name}"
        pushed = self.peers.run(
            "oras",
            "push",
            "--plain-http",
            "--disable-path-validation",
            "--format",
            "json",
            "--config",
            f"{config}:{manifest['config']['mediaType']}",
            f"{reference}:latest",
            f"{module}:application/wasm",
        )
        return f"{reference}@{json.loads(pushed.stdout)['digest']}"

    def sign(self, image: str, key: Path) -> None:
        """Signs an image with cosign."""
        self.peers.env["COSIGN_PASSWORD"] = ""
        self.peers.run("cosign", "sign", *SIGN, "--allow-http-registry", "--key", str(key), image)

    def new_key(self) -> Path:
        """A key pair that the node does not know."""
        self.peers.env["COSIGN_PASSWORD"] = ""
        prefix = self.files / "stranger"
        self.peers.run("cosign", "generate-key-pair", "--output-key-prefix", str(prefix))
        return prefix.with_suffix(".key")

    def own_key(self) -> Path:
        """The stack's signing key, as cosign takes it."""
        plain = self.files / "own.pem"
        plain.write_text(private_keys(self.stack)[0])
        self.peers.env["COSIGN_PASSWORD"] = ""
        prefix = self.files / "own"
        self.peers.run("cosign", "import-key-pair", "--key", str(plain), "--output-key-prefix", str(prefix))
        return prefix.with_suffix(".key")


@pytest.fixture
def bench(stack: Stack, peers: dict[str, str], tmp_path: Path) -> Bench:
    return Bench(stack, Stack(tmp_path, {**stack.env, **peers}), tmp_path)


def run_image(stack: Stack, name: str, image: str) -> None:
    template = stack.kubectl_json("get", "pod", stack.outputs()["pod"], "-n", stack.outputs()["namespace"])
    container = template["spec"]["containers"][0]
    container["image"] = image
    container["ports"] = [{"containerPort": 18080}]
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        container.pop(probe, None)
    keep = {
        key: template["spec"][key]
        for key in ("tolerations", "nodeSelector", "securityContext")
        if key in template["spec"]
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": stack.outputs()["namespace"]},
        "spec": {"containers": [container], "automountServiceAccountToken": False, **keep},
    }
    stack.kubectl("apply", "--filename", "-", text=json.dumps(pod))


def _waiting_reason(stack: Stack, name: str) -> str:
    pod = stack.kubectl_json("get", "pod", name, "-n", stack.outputs()["namespace"])
    return str(pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"])


def _events(stack: Stack, name: str) -> str:
    chosen = ("--field-selector", f"involvedObject.name={name},type=Warning")
    found = stack.kubectl_json("get", "events", "-n", stack.outputs()["namespace"], *chosen)
    return "\n".join(f"{item['reason']}: {item['message']}" for item in found["items"])


@pytest.fixture
def pod(stack: Stack, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.replace("_", "-")[:50].strip("-").partition("[")[0]
    yield name
    stack.kubectl("delete", "pod", name, "-n", stack.outputs()["namespace"], "--ignore-not-found")


def test_an_unsigned_module_is_refused(bench: Bench, pod: str) -> None:
    run_image(bench.stack, pod, bench.push("unsigned", flavour=b"unsigned"))
    until(lambda: _waiting_reason(bench.stack, pod) == "SignatureValidationFailed", "the refusal")
    assert "it is not signed" in until(lambda: _events(bench.stack, pod), "an event that says so")


def test_a_module_signed_with_another_key_is_refused(bench: Bench, pod: str) -> None:
    image = bench.push("stranger", flavour=b"stranger")
    bench.sign(image, bench.new_key())
    run_image(bench.stack, pod, image)
    until(lambda: _waiting_reason(bench.stack, pod) == "SignatureValidationFailed", "the refusal")
    assert "key" in until(lambda: _events(bench.stack, pod), "an event that says so")


def test_a_module_signed_with_the_stacks_key_runs(bench: Bench, pod: str) -> None:
    image = bench.push("signed", flavour=b"signed")
    bench.sign(image, bench.own_key())
    run_image(bench.stack, pod, image)
    namespace = bench.stack.outputs()["namespace"]
    bench.stack.kubectl("wait", "--for=condition=Ready", f"pod/{pod}", "-n", namespace, "--timeout=60s")


def test_a_module_altered_in_the_registry_is_refused(bench: Bench, pod: str) -> None:
    image = bench.push("altered", flavour=b"altered")
    bench.sign(image, bench.own_key())
    manifest = json.loads(bench.peers.run("crane", "manifest", image).stdout)
    digest = manifest["layers"][0]["digest"].partition(":")[2]
    stored = bench.stack.directory / ".localcloud" / "registry"
    blob = next(path for path in stored.rglob("data") if path.parent.name == digest)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 0xFF
    blob.write_bytes(bytes(content))
    run_image(bench.stack, pod, image)
    events = until(lambda: _events(bench.stack, pod), "an event that says so")
    assert digest[:12] in events or "digest" in events
    assert _waiting_reason(bench.stack, pod) in (
        "ErrImagePull",
        "ImagePullBackOff",
        "SignatureValidationFailed",
    )


def test_another_key_takes_over_without_a_failed_request_and_the_first_starts_no_pod_any_more(
    bench: Bench, pod: str
) -> None:
    stack, before = bench.stack, bench.stack.outputs()
    revoked, image = bench.own_key(), bench.push("revoked", flavour=b"revoked")
    try:
        key = generate_key()
        stack.run("pulumi", "config", "set", "--secret", "signingKey", text=key.private_key)
        with load(f"{before['url']}/healthz") as seen:
            stack.run("pulumi", "up", "--yes")
        assert seen.failures == []
        assert seen.answers.total() > 100
        assert stack.outputs()["public_key"] == key.public_key
        assert stack.outputs()["image"] == before["image"]
        # The node looks at the signature when the pod starts.
        stack.run("./scripts/verify")
        bench.sign(image, revoked)
        run_image(stack, pod, image)
        until(lambda: _waiting_reason(stack, pod) == "SignatureValidationFailed", "the refusal")
        assert "key" in until(lambda: _events(stack, pod), "an event that says so")
    finally:
        stack.run("git", "checkout", "--quiet", "Pulumi.local.yaml")
        stack.run("pulumi", "up", "--yes")
    running = stack.kubectl_json("get", "pod", before["pod"], "-n", before["namespace"])["status"]
    assert running["containerStatuses"][0]["restartCount"] == 0
