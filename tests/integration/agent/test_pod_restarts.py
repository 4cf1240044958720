"""Pod contract, restarts: policies, back-off, counts and the last state."""

from __future__ import annotations

from tests.integration.agent.harness import Workspace, command


def test_never_leaves_what_ended(space: Workspace) -> None:
    pod = space.run("exit", "3", pod={"restart": "Never"})
    status = pod.wait_phase("Failed").container_statuses[0]
    assert status.restart_count == 0
    assert status.last_state.terminated is None


def test_on_failure_leaves_what_succeeded(space: Workspace) -> None:
    pod = space.run("print", "once", pod={"restart": "OnFailure"})
    assert pod.wait_phase("Succeeded").container_statuses[0].restart_count == 0
    assert pod.logs() == "once\n"


def test_on_failure_restarts_what_failed_until_it_succeeds(space: Workspace) -> None:
    # What the first run leaves in the volume lets the second one succeed.
    mount = [{"name": "kept", "mountPath": "/kept"}]
    bad = command(space.cli_image, "cat", "/kept/mark", volumeMounts=mount, name="bad")
    writer = command(space.cli_image, "write", "/kept/mark", "again", volumeMounts=mount, name="writer")
    pod = space.pod(
        {**bad, "args": ["sleep", "300", "then", *bad["args"]]},
        {**writer, "args": ["sleep", "900", "then", *writer["args"]]},
        volumes=[{"name": "kept", "emptyDir": {}}],
        restart="OnFailure",
    )
    status = pod.wait_phase("Succeeded", timeout=90)
    counts = {item.name: item.restart_count for item in status.container_statuses}
    assert counts["bad"] >= 1
    assert counts["writer"] == 0


def test_what_fails_again_waits_in_crash_loop_back_off_with_its_last_state_and_a_growing_count(
    space: Workspace,
) -> None:
    pod = space.run("print", "run", "then", "exit", "9", pod={"restart": "Always"})
    message = pod.wait_waiting("CrashLoopBackOff")
    assert "10s" in message
    status = pod.status()
    assert status.restart_count == 1
    last = status.last_state.terminated
    assert (last.exit_code, last.reason) == (9, "Error")
    assert pod.read().status.phase == "Running"
    pod.wait_event("BackOff", "restarting failed container")
    assert pod.logs(previous=True) == "run\n"
    # The first wait is over; the next one is twice as long.
    pod.wait(lambda seen: seen.status.container_statuses[0].restart_count == 2, "a second restart", 20)
    assert "20s" in pod.wait(
        lambda seen: (
            seen.status.container_statuses[0].state.waiting
            and seen.status.container_statuses[0].state.waiting.message
        ),
        "the second back-off",
    )


def test_always_restarts_what_completed(space: Workspace) -> None:
    pod = space.run("print", "run", pod={"restart": "Always"})
    pod.wait(lambda seen: seen.status.container_statuses[0].restart_count >= 1, "a restart")
    last = pod.status().last_state.terminated
    assert (last.exit_code, last.reason) == (0, "Completed")
    assert pod.wait_waiting("CrashLoopBackOff")


def test_a_pod_that_always_fails_can_be_deleted(space: Workspace) -> None:
    pod = space.run("exit", "1", pod={"restart": "Always"})
    pod.wait_waiting("CrashLoopBackOff")
    pod.delete()
    pod.wait_gone(timeout=10)
