"""The whole stack, seen from outside with clients that we did not write."""

import base64
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.e2e.conftest import Stack, private_keys
from tests.waiting import until


def _token(stack: Stack, repository: str, registry: str) -> str:
    """A pull token for one repository, by the registry's own challenge."""
    answer = requests.get(f"http://{registry}/v2/", timeout=10)
    challenge = dict(re.findall(r'(\w+)="([^"]*)"', answer.headers["WWW-Authenticate"]))
    granted = requests.get(
        challenge["realm"],
        params={"service": challenge["service"], "scope": f"repository:{repository}:pull"},
        auth=("oauth2accesstoken", stack.env["GOOGLE_OAUTH_ACCESS_TOKEN"]),
        timeout=10,
    )
    granted.raise_for_status()
    return str(granted.json()["token"])


def test_the_pod_answers_with_the_right_number(stack: Stack) -> None:
    answer = stack.run("curl", "--fail", "--silent", f"{stack.outputs()['url']}/primorial/30").stdout
    assert json.loads(answer)["primorial"] == "6469693230"


def test_verify_finds_nothing_wrong_and_says_so_to_machines(stack: Stack) -> None:
    report = json.loads(stack.run("./scripts/verify", "--json").stdout)
    assert report["passed"] is True
    assert len(report["checks"]) >= 5


def test_the_registry_serves_a_wasm_artifact_under_the_digest_of_the_pod(stack: Stack) -> None:
    image = stack.outputs()["image"]
    registry, _, rest = image.partition("/")
    repository, _, digest = rest.partition("@")
    manifest = requests.get(
        f"http://{registry}/v2/{repository}/manifests/{digest}",
        headers={
            "Accept": "application/vnd.oci.image.manifest.v1+json",
            "Authorization": f"Bearer {_token(stack, repository, registry)}",
        },
        timeout=10,
    ).json()
    assert manifest["config"]["mediaType"] == "application/vnd.wasm.config.v0+json"
    assert [layer["mediaType"] for layer in manifest["layers"]] == ["application/wasm"]


def test_the_registry_gives_nothing_to_the_anonymous(stack: Stack) -> None:
    registry, _, rest = stack.outputs()["image"].partition("/")
    repository, _, digest = rest.partition("@")
    answer = requests.get(f"http://{registry}/v2/{repository}/manifests/{digest}", timeout=10)
    assert answer.status_code == 401


@pytest.mark.parametrize("output", ["image", "agent_image"])
@pytest.mark.parametrize("program", ["cosign", "cosign3"])
def test_cosign_finds_the_signature_and_what_is_attested_valid(
    program: str, output: str, stack: Stack, tmp_path: Path, peers: dict[str, str]
) -> None:
    key, root = tmp_path / "cosign.pub", tmp_path / "trusted_root.json"
    key.write_text(stack.outputs()["public_key"])
    # cosign 2 would ask the internet for one.
    root.write_text('{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}')
    env = {**stack.env, **peers}
    image = stack.outputs()[output]
    flags = ["--insecure-ignore-tlog=true", "--private-infrastructure=true", f"--trusted-root={root}"]
    cosign = Stack(stack.directory, env)
    cosign.run(program, "verify", *flags, "--key", str(key), image)
    for kind in ("slsaprovenance1", "cyclonedx"):
        flags += ["--type", kind]
        shown = cosign.run(program, "verify-attestation", *flags, "--key", str(key), image).stdout
    assert json.loads(shown.splitlines()[-1])["payloadType"] == "application/vnd.in-toto+json"


def test_kubectl_sees_the_node_and_the_pod_on_it(stack: Stack) -> None:
    outputs = stack.outputs()
    node = stack.kubectl_json("get", "node", outputs["node"])
    assert node["metadata"]["labels"]["kubernetes.io/arch"] == "wasm32-wasi"
    assert any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"]["conditions"])
    pod = stack.kubectl_json("get", "pod", outputs["pod"], "--namespace", outputs["namespace"])
    assert pod["spec"]["nodeName"] == outputs["node"]
    assert pod["status"]["containerStatuses"][0]["imageID"].endswith(outputs["image"].partition("@")[2])


def test_a_node_says_where_it_is_and_of_what_type_also_after_somebody_deleted_it(stack: Stack) -> None:
    node = stack.outputs()["node"]
    told = {
        "topology.kubernetes.io/zone": "europe-west1-b",
        "topology.kubernetes.io/region": "europe-west1",
        "node.kubernetes.io/instance-type": "e2-small",
    }

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = stack.kubectl_json("get", "node", node)["metadata"]
        return found

    before = shown()
    assert told.items() <= before["labels"].items()
    try:
        stack.kubectl("delete", "node", node)
        until(lambda: shown()["uid"] != before["uid"], "the node to be back")
        assert told.items() <= shown()["labels"].items()
    finally:
        stack.run("pulumi", "up", "--yes", "--refresh", "--skip-preview")


def test_kubectl_logs_goes_through_the_nodes_own_api(stack: Stack) -> None:
    outputs = stack.outputs()
    stack.kubectl("logs", outputs["pod"], "--namespace", outputs["namespace"])


def test_a_second_up_changes_nothing_and_a_refresh_shows_no_drift(stack: Stack) -> None:
    stack.run("pulumi", "preview", "--expect-no-changes")
    stack.run("pulumi", "refresh", "--yes", "--expect-no-changes")
    stack.run("pulumi", "up", "--yes", "--expect-no-changes")


def _renewal(node: str) -> str:
    """What a node asks for when its client certificate is to end, as the API server takes it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "system:nodes"),
            x509.NameAttribute(x509.NameOID.COMMON_NAME, f"system:node:{node}"),
        ]
    )
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    spec = {
        "request": base64.b64encode(request.public_bytes(serialization.Encoding.PEM)).decode(),
        "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
        "usages": ["digital signature", "client auth"],
    }
    kind = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}
    return json.dumps({**kind, "metadata": {"name": "a-renewal"}, "spec": spec})


@pytest.fixture
def unrenewed(stack: Stack) -> Iterator[None]:
    """Nobody in the cluster approves a renewal of a client certificate."""
    binding = ("clusterrolebinding", "gce:beta:kubelet-certificate-rotation")
    found = stack.kubectl_json("get", *binding)
    stack.kubectl("delete", *binding)
    yield
    del found["metadata"]["resourceVersion"], found["metadata"]["uid"]
    stack.kubectl("create", "-f", "-", text=json.dumps(found))


@pytest.mark.usefixtures("unrenewed")
def test_a_renewal_that_the_cloud_leaves_waiting_is_drift_and_the_next_up_approves_it(stack: Stack) -> None:
    node = stack.outputs()["node"]
    groups = ("--as-group=system:nodes", "--as-group=system:authenticated")
    stack.kubectl("create", "-f", "-", f"--as=system:node:{node}", *groups, text=_renewal(node))
    try:
        shown = json.loads(stack.run("pulumi", "preview", "--refresh", "--json").stdout)
        assert shown["changeSummary"]["update"] == 1
        status = stack.kubectl_json("get", "csr", "a-renewal")["status"]
        assert not status, "a preview decides about nothing"
        stack.run("pulumi", "up", "--yes", "--refresh", "--skip-preview")
        until(
            lambda: "certificate" in stack.kubectl_json("get", "csr", "a-renewal")["status"],
            "the renewal to be signed",
        )
        stack.run("pulumi", "preview", "--refresh", "--expect-no-changes")
    finally:
        stack.kubectl("delete", "csr", "a-renewal")


def test_a_comment_in_a_provider_shows_nothing_in_a_preview(stack: Stack) -> None:
    providers = sorted((stack.directory / "components" / "providers").glob("*.py"))
    before = {path: path.read_text() for path in providers}
    try:
        for path, text in before.items():
            path.write_text(text + "\n# A remark.\n")
        stack.run("pulumi", "preview", "--expect-no-changes")
    finally:
        for path, text in before.items():
            path.write_text(text)


def test_no_secret_is_in_the_clear_in_state_metadata_logs_messages_arguments_and_registry(
    stack: Stack,
) -> None:
    lines = {line for text in private_keys(stack) for line in text.splitlines()}
    keys = [line.encode() for line in lines if len(line) > 20 and not line.startswith("-----")]
    assert keys, "there is a key to look for"
    # Also in base64 at every offset, as registries' tools and Kubernetes wrap things.
    needles = {*keys, *(base64.b64encode(b" " * n + key)[4:-4] for key in keys for n in range(3))}
    shown = stack.run("pulumi", "preview", "--diff", "--show-sames")
    places = {"the preview": (shown.stdout + shown.stderr).encode()}
    for path in [*held_by(stack), *Path("/proc").glob("[0-9]*/cmdline")]:
        with contextlib.suppress(OSError):  # it went meanwhile
            if path.is_file():
                places[str(path)] = path.read_bytes()
    for part in ("store.db", "/stacks/", "/blobs/", ".log", "/cmdline"):
        assert any(part in name for name in places), part
    assert [name for name, content in places.items() if any(needle in content for needle in needles)] == []
    state = b"".join(content for name, content in places.items() if "/stacks/" in name)
    assert b"PRIVATE KEY" not in state
    assert stack.env["GOOGLE_OAUTH_ACCESS_TOKEN"].encode() not in state
    assert str(stack.directory).encode() not in state, "where it lies is no part of what it is"
    assert stack.run("git", "diff").stdout == "", "nothing of this machine is there to be committed"


def held_by(stack: Stack) -> Iterator[Path]:
    """Every file that a run has left: state, store, registry, logs, and what a VM has on its disks."""
    for directory in (".stacks", ".localcloud", ".logs"):
        yield from (stack.directory / directory).rglob("*")


@pytest.mark.parametrize(
    ("key", "value"),
    [("awesome-wasm:apps[0].port", "99999"), ("awesome-wasm:nodeName", "Not_A_Name")],
)
def test_a_wrong_setting_is_one_line_that_names_it(stack: Stack, key: str, value: str) -> None:
    try:
        # Which also writes it into the stack's file.
        answer = stack.run("pulumi", "preview", "--config-path", "--config", f"{key}={value}", check=False)
    finally:
        stack.run("git", "checkout", "--quiet", "Pulumi.local.yaml")
    printed = answer.stdout + answer.stderr
    assert answer.returncode != 0
    assert "Traceback" not in printed
    assert any(key.partition(":")[2] in line and value in line for line in printed.splitlines())


def test_a_changed_line_of_the_app_changes_the_artifact_and_the_pod_alone(stack: Stack) -> None:
    source = stack.directory / "wasm_app" / "src" / "page.html"
    before, outputs = source.read_text(), stack.outputs()
    old, node = outputs["image"], stack.kubectl_json("get", "node", outputs["node"])["metadata"]["uid"]
    try:
        source.write_text(before.replace("</body>", "<p>another line</p></body>"))
        preview = json.loads(stack.run("pulumi", "preview", "--json").stdout)
        changed = {
            step["urn"].rsplit("::", 2)[1].rsplit("$", 1)[-1]
            for step in preview["steps"]
            if step["op"] != "same"
        }
        stack.run("pulumi", "up", "--yes")
        new = stack.outputs()
        assert new["image"] != old
        assert "another line" in stack.get("/").text
        assert stack.kubectl_json("get", "node", outputs["node"])["metadata"]["uid"] == node
        assert changed, "the preview shows the change"
        assert not [name for name in changed if "gcp:" in name or "Node" in name or "Namespace" in name], (
            changed
        )
    finally:
        source.write_text(before)
        stack.run("pulumi", "up", "--yes")
    assert stack.outputs()["image"] == old, "the same source gives the same digest"


def test_verify_says_what_is_wrong_when_the_pod_is_gone(stack: Stack) -> None:
    outputs = stack.outputs()
    stack.kubectl("delete", "pod", outputs["pod"], "--namespace", outputs["namespace"])
    answer = stack.run("./scripts/verify", check=False)
    assert answer.returncode != 0
    assert outputs["pod"] in answer.stdout + answer.stderr
    stack.run("pulumi", "up", "--yes", "--refresh")
    until(lambda: stack.get("/healthz").status_code == 200, "the pod to answer again")
