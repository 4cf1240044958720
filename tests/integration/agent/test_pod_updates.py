"""Pod contract, in-place update: a changed image takes over with no failed request, or says why it cannot."""

from __future__ import annotations

import threading

import requests

from tests.integration.agent.harness import Workspace, artifact, condition, http_probe
from tests.load import load
from tests.waiting import until


def test_a_changed_image_takes_over_under_load_with_no_failed_request(space: Workspace) -> None:
    port = space.port()
    pod = space.serve(
        port=port,
        readinessProbe=http_probe(port),
        livenessProbe=http_probe(port),
        env=[{"name": "A", "value": "1"}],
    ).wait_ready()
    with load(f"{pod.url}/version") as seen:
        until(lambda: seen.answers["1"] > 50, "requests to be answered")
        pod.set_image(space.registry.guest("http-guest", "2"))
        pod.wait(lambda _: seen.answers["2"] > 50, "the new module to answer")
        old = seen.answers["1"]
        until(lambda: seen.answers["2"] > 200, "more answers")
        # Every request that began after the exchange went to the new one.
        assert seen.answers["1"] <= old + 4
    assert seen.failures == []
    status = pod.status()
    assert status.image_id == space.registry.guest("http-guest", "2")
    assert status.image == status.image_id
    assert status.restart_count == 0
    assert pod.get("/env").json() == {"A": "1"}
    pod.wait_event("ImageUpdated", status.image_id)


def test_a_request_in_flight_ends_with_the_module_that_it_began_with(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    lines: list[str] = []

    def stream() -> None:
        with requests.get(f"{pod.url}/stream?chunks=30&ms=100", stream=True, timeout=20) as answer:
            lines.extend(line.decode() for line in answer.iter_lines())

    reader = threading.Thread(target=stream)
    reader.start()
    pod.set_image(space.registry.guest("http-guest", "2"))
    until(lambda: pod.get("/version").text == "2", "the new module to answer", timeout=20)
    reader.join()
    assert lines == [str(number) for number in range(30)]


def test_a_new_module_that_cannot_be_loaded_leaves_the_old_one_serving_and_says_so(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    with load(f"{pod.url}/version", clients=2) as seen:
        pod.set_image(space.registry.guest("garbage"))
        message = pod.wait_event("FailedImageUpdate", "InvalidImage")
        pod.wait(lambda pod: condition(pod, "krustlet.dev/ImageCurrent") == "False", "the condition")
        assert "old image serves on" in message
        before = seen.answers["1"]
        until(lambda: seen.answers["1"] > before + 50, "the old module to answer")
    assert seen.failures == []
    found = pod.read()
    assert condition(found, "Ready") == "True"
    assert found.status.container_statuses[0].image_id == space.http_image
    assert found.status.container_statuses[0].restart_count == 0
    pod.set_image(space.registry.guest("http-guest", "2"))
    until(lambda: pod.get("/version").text == "2", "a better module to take over", timeout=20)
    pod.wait(lambda pod: condition(pod, "krustlet.dev/ImageCurrent") == "True", "the condition to be lifted")


def test_an_unsigned_module_never_takes_over(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    unsigned = space.registry.push(
        "unsigned-update", artifact("http-guest", "2", space.unique("v")), key=None
    )
    pod.set_image(unsigned)
    pod.wait_event("FailedImageUpdate", "SignatureValidationFailed")
    assert pod.get("/version").text == "1"


def test_a_module_that_does_not_serve_cannot_take_the_place_of_one_that_does(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    pod.set_image(space.cli_image)
    pod.wait_event("FailedImageUpdate", "runs to completion")
    assert pod.get("/version").text == "1"


def test_a_change_that_is_taken_back_leaves_everything_as_it_was(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    pod.set_image(f"{space.registry.uri}/http-guest:none")
    pod.wait_event("FailedImageUpdate", "ErrImagePull")
    pod.set_image(space.http_image)
    pod.wait(lambda pod: condition(pod, "krustlet.dev/ImageCurrent") == "True", "the condition to be lifted")
    assert pod.get("/version").text == "1"
    assert pod.status().restart_count == 0


def test_a_command_with_a_new_image_is_started_again_with_it(space: Workspace) -> None:
    pod = space.run(
        "version",
        "then",
        "sleep",
        "60000",
        pod={"restart": "Always", "terminationGracePeriodSeconds": 1},
    )
    pod.wait_phase("Running")
    pod.set_image(space.registry.guest("cli-guest", "2"), "main")
    pod.wait(lambda seen: seen.status.container_statuses[0].restart_count == 1, "the new start")
    until(lambda: pod.logs() == "2\n", "the new module to run")
    assert pod.status().last_state.terminated.exit_code == 137
