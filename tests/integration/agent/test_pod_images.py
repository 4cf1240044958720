"""Pod contract, images: names, pull policies and secrets, signatures, wrong types."""

from __future__ import annotations

import json

import pytest

from components.providers import artifacts, oci, signature
from tests.guests import build as guests
from tests.integration.agent.harness import Registry, Workspace, artifact, custom_section, layout


def _never_seen(space: Workspace) -> artifacts.Artifact:
    """The HTTP guest as a module that no node has: a signature counts for a digest, wherever it lies."""
    return artifact("http-guest", variant=space.unique("v"))


def _unique(space: Workspace) -> str:
    """The signed image of a module that no node has."""
    return space.registry.guest("http-guest", variant=space.unique("v"))


def test_an_image_is_named_by_digest_or_by_tag(space: Workspace) -> None:
    by_digest = _unique(space)
    tag = space.unique("tag")
    repository = by_digest.partition("@")[0]
    digest = space.registry.push("http-guest", _never_seen(space), tag)
    first = space.serve(image=by_digest).wait_ready()
    second = space.serve(image=f"{repository}:{tag}").wait_ready()
    assert first.status().image_id == by_digest
    assert second.status().image == f"{repository}:{tag}"
    assert second.status().image_id == digest
    assert "Pulled and verified" in first.wait_event("Pulled")


def test_always_asks_the_registry_what_the_tag_is_and_if_not_present_does_not(space: Workspace) -> None:
    tag = space.unique("moving")
    repository = f"{space.registry.uri}/http-guest"
    old = space.registry.push("http-guest", _never_seen(space), tag)
    image = f"{repository}:{tag}"
    assert space.serve(image=image).wait_ready().status().image_id == old
    new = space.registry.push("http-guest", _never_seen(space), tag)
    assert space.serve(image=image, imagePullPolicy="IfNotPresent").wait_ready().status().image_id == old
    assert space.serve(image=image, imagePullPolicy="Always").wait_ready().status().image_id == new


def test_never_runs_only_what_the_node_has(space: Workspace) -> None:
    image = _unique(space)
    pod = space.serve(image=image, imagePullPolicy="Never")
    assert image in pod.wait_waiting("ErrImageNeverPull")
    space.serve(image=image).wait_ready()
    space.serve(image=image, imagePullPolicy="Never").wait_ready()


def test_a_pod_may_prepare_an_image_for_the_next_one_beside_the_one_that_runs(space: Workspace) -> None:
    running = space.serve().wait_ready()
    image, port = _unique(space), running.port
    prepared = {"annotations": {"krustlet.dev/prepare-only": "true"}, "restart": "Never"}
    first = space.serve(image=image, port=port, pod=prepared)
    end = first.wait_phase("Succeeded").container_statuses[0]
    assert (end.state.terminated.exit_code, end.image_id) == (0, image)
    assert running.get("/version").ok
    space.serve(image=image, imagePullPolicy="Never").wait_ready()


def test_a_pod_that_only_prepares_is_told_what_is_wrong_with_its_image(space: Workspace) -> None:
    unsigned = space.registry.push("http-guest", _never_seen(space), key=None)
    prepared = {"annotations": {"krustlet.dev/prepare-only": "true"}, "restart": "Never"}
    assert "signed" in space.serve(image=unsigned, pod=prepared).wait_waiting("SignatureValidationFailed")


def test_a_private_image_needs_a_pull_secret_of_the_pods_own_or_of_its_account(space: Workspace) -> None:
    image = _unique(space)
    stranger = space.serve(image=image, pod={"serviceAccountName": "stranger"})
    message = stranger.wait_waiting("ErrImagePull")
    assert image in message
    secret = space.pull_secret()
    owner = space.serve(
        image=image, pod={"serviceAccountName": "stranger", "imagePullSecrets": [{"name": secret}]}
    )
    owner.wait_ready()
    assert owner.get("/version").ok


def test_a_pull_secret_that_is_missing_is_told_and_the_pull_tried_without_it(space: Workspace) -> None:
    pod = space.serve(
        image=_unique(space),
        pod={"serviceAccountName": "stranger", "imagePullSecrets": [{"name": "no-such"}]},
    )
    pod.wait_event("FailedToRetrieveImagePullSecret", "no-such")
    pod.wait_waiting("ErrImagePull")


def test_an_image_that_is_not_there_is_an_error_first_and_then_backed_off(space: Workspace) -> None:
    image = f"{space.registry.uri}/http-guest:no-such-tag"
    pod = space.serve(image=image)
    assert image in pod.wait_waiting("ErrImagePull")
    assert pod.read().status.phase == "Pending"
    assert image in pod.wait_waiting("ImagePullBackOff", timeout=15)
    pod.wait_event("Failed", "ErrImagePull")
    pod.wait_event("BackOff", "Back-off pulling image")


def test_a_pod_whose_image_appears_later_starts(space: Workspace) -> None:
    tag = space.unique("late")
    pod = space.serve(image=f"{space.registry.uri}/http-guest:{tag}")
    pod.wait_waiting("ErrImagePull")
    space.registry.push("http-guest", artifact("http-guest"), tag)
    pod.wait_ready(timeout=40)


def test_a_waiting_pod_is_helped_by_an_image_that_works(space: Workspace) -> None:
    pod = space.serve(image=f"{space.registry.uri}/http-guest:none")
    pod.wait_waiting("ErrImagePull")
    pod.set_image(space.http_image)
    pod.wait_ready(timeout=8)


def test_a_name_that_is_no_image_name_is_told(space: Workspace) -> None:
    pod = space.serve(image="NOT/An Image!")
    assert "NOT/An Image!" in pod.wait_waiting("InvalidImageName")


def test_an_unsigned_module_is_refused(space: Workspace) -> None:
    image = space.registry.push("unsigned", _never_seen(space), key=None)
    pod = space.serve(image=image)
    message = pod.wait_waiting("SignatureValidationFailed")
    assert image in message
    assert "sign" in message
    pod.wait_event("Failed", "SignatureValidationFailed")
    assert pod.status().image_id == ""


def test_a_module_that_another_key_signed_is_refused_and_the_key_is_spoken_of(space: Workspace) -> None:
    other = signature.generate_key().private_key
    image = space.registry.push("stranger", _never_seen(space), key=other)
    pod = space.serve(image=image)
    assert "key" in pod.wait_waiting("SignatureValidationFailed")


def test_a_signature_of_another_image_does_not_count(
    space: Workspace, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = registry.guest("http-guest").partition("@")[2]
    image = registry.push("borrowed", _never_seen(space), key=None)
    repository, _, digest = image.partition("@")
    made = signature.sign(registry.key.private_key, repository, signed)
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", space.cluster.cloud.token)
    oci.push_signature(repository, digest, made.payload, made.signature)
    space.serve(image=image).wait_waiting("SignatureValidationFailed")


def test_a_module_that_is_signed_after_it_was_refused_starts(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = space.registry.push("late-signed", _never_seen(space), key=None)
    pod = space.serve(image=image)
    pod.wait_waiting("SignatureValidationFailed")
    repository, _, digest = image.partition("@")
    made = signature.sign(space.registry.key.private_key, repository, digest)
    monkeypatch.setenv("GOOGLE_OAUTH_ACCESS_TOKEN", space.cluster.cloud.token)
    oci.push_signature(repository, digest, made.payload, made.signature)
    pod.wait_ready(timeout=40)


def test_a_container_image_is_refused_by_its_type(space: Workspace) -> None:
    content = guests.build("http-guest").read_bytes()
    wrong = layout(
        content, config_type=artifacts.IMAGE_CONFIG, layer_type="application/vnd.oci.image.layer.v1.tar+gzip"
    )
    pod = space.serve(image=space.registry.push("container", wrong))
    message = pod.wait_waiting("InvalidImage")
    assert artifacts.IMAGE_CONFIG in message
    assert "container image" in message
    pod.wait_event("Failed", "InvalidImage")


def test_the_agents_own_artifact_is_no_module(space: Workspace) -> None:
    pod = space.serve(image=space.registry.push("agent", artifacts.agent_artifact(b"\x7fELF")))
    assert artifacts.EMPTY_CONFIG in pod.wait_waiting("InvalidImage")


@pytest.mark.parametrize("guest", ["garbage", "truncated", "no-export", "no-start"])
def test_what_cannot_be_compiled_or_has_nothing_to_run_is_told(space: Workspace, guest: str) -> None:
    pod = space.serve(image=space.registry.guest(guest))
    message = pod.wait_waiting("InvalidImage")
    assert "module sha256:" in message
    pod.wait_event("Failed", "InvalidImage")


def test_a_config_that_names_another_layer_is_refused(space: Workspace) -> None:
    content = guests.build("http-guest").read_bytes()
    good = layout(content + custom_section("other", b"x"))
    layer = artifacts.Blob(artifacts.WASM_LAYER, content)
    manifest = json.loads(good.manifest.content)
    manifest["layers"] = [layer.descriptor()]
    mixed = artifacts.Artifact(
        artifacts.Blob(artifacts.MANIFEST, artifacts.canonical(manifest)), (good.blobs[0], layer)
    )
    pod = space.serve(image=space.registry.push("mixed", mixed))
    assert "layerDigests" in pod.wait_waiting("InvalidImage")


def test_a_refused_pod_does_not_hold_up_another_one(space: Workspace) -> None:
    refused = space.serve(image=space.registry.guest("garbage"))
    pod = space.serve()
    pod.wait_ready(timeout=10)
    refused.wait_waiting("InvalidImage")


def test_an_image_is_compiled_once_however_many_pods_start_with_it(space: Workspace) -> None:
    image = _unique(space)
    before = _compiled(space)
    pods = [space.serve(image=image) for _ in range(6)]
    for pod in pods:
        pod.wait_ready()
    assert _compiled(space) == before + 1


def _compiled(space: Workspace) -> float:
    return space.agent.metrics().get('krustlet_module_loads_total{source="compiled"}', 0)
