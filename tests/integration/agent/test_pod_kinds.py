"""Pod contract, kinds of module: what is served, what runs to completion, several containers."""

from __future__ import annotations

import json

from tests.integration.agent.harness import Cluster, Manifest, Workspace, command, condition, served
from tests.waiting import until


def test_a_component_that_handles_http_is_served_on_its_container_port(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    answer = pod.get("/echo", a="b")
    assert answer.status_code == 200
    assert answer.headers["x-request-path"] == "/echo?a=b"
    seen = pod.read()
    assert seen.status.phase == "Running"
    assert seen.status.pod_ip == seen.status.host_ip == space.agent.address
    assert seen.status.container_statuses[0].image_id == space.http_image
    assert seen.status.container_statuses[0].container_id.startswith("wasmtime://")


def test_each_request_gets_an_instance_of_its_own(space: Workspace) -> None:
    pod = space.serve().wait_ready()
    assert {pod.get("/count").text for _ in range(5)} == {"1"}


def test_a_command_runs_to_completion_with_its_arguments_and_its_standard_input_closed(
    space: Workspace,
) -> None:
    pod = space.run("print", "hello", "world", "then", "args", "then", "stdin")
    status = pod.wait_phase("Succeeded")
    lines = pod.logs().splitlines()
    assert lines[0] == "hello world"
    assert json.loads(lines[1]) == ["main", "print", "hello", "world", "then", "args", "then", "stdin"]
    assert lines[2] == "end of input after 0 bytes"
    end = status.container_statuses[0].state.terminated
    assert (end.exit_code, end.reason) == (0, "Completed")
    assert end.started_at <= end.finished_at
    assert condition(pod.read(), "Ready") == "False"


def test_the_exit_code_of_a_command_is_kept(space: Workspace) -> None:
    pod = space.run("print", "about to fail", "then", "exit", "7")
    end = pod.wait_phase("Failed").container_statuses[0].state.terminated
    assert (end.exit_code, end.reason) == (7, "Error")
    assert pod.logs() == "about to fail\n"


def test_a_command_that_returns_an_error_exits_with_one(space: Workspace) -> None:
    assert space.run("fail").wait_terminated().exit_code == 1


def test_the_end_of_the_log_is_the_message_of_a_failed_command_that_asks_for_it(space: Workspace) -> None:
    policy: Manifest = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    failed = space.run("print", "why it failed", "then", "exit", "1", **policy)
    succeeded = space.run("print", "of no interest", **policy)
    assert succeeded.wait_terminated().message is None
    assert failed.wait_terminated().message == "why it failed\n"


def test_a_trap_is_an_error_that_is_named(space: Workspace) -> None:
    end = space.run("trap").wait_terminated()
    assert end.reason == "Error"
    assert end.exit_code != 0
    assert "unreachable" in end.message


def test_a_preview1_core_module_runs_to_completion(space: Workspace) -> None:
    image = space.registry.guest("preview1")
    done = space.run("print", "from preview1", image=image)
    failed = space.run("exit", "42", image=image)
    done.wait_phase("Succeeded")
    assert done.logs() == "from preview1\n"
    end = failed.wait_phase("Failed").container_statuses[0].state.terminated
    assert (end.exit_code, end.reason) == (42, "Error")


def test_the_second_pod_on_a_port_is_told_who_has_it_and_gets_it_when_it_is_free(space: Workspace) -> None:
    first = space.serve().wait_ready()
    second = space.serve(port=first.port, env=[{"name": "WHO", "value": "second"}])
    message = second.wait_waiting("PortInUse")
    assert str(first.port) in message
    assert f"{space.namespace}/{first.name}" in message
    second.wait_event("Failed", "PortInUse")
    assert first.get("/env").json().get("WHO") is None
    assert first.status().restart_count == 0
    first.delete(grace=1)
    second.wait_ready()
    assert second.get("/env").json()["WHO"] == "second"


def test_a_port_that_another_process_has_is_told_the_same_way(space: Workspace) -> None:
    pod = space.serve(port=space.agent.port)
    assert str(space.agent.port) in pod.wait_waiting("PortInUse")


def test_the_containers_of_a_pod_run_side_by_side(space: Workspace) -> None:
    ports = space.port(), space.port()
    pod = space.pod(
        served(space.http_image, ports[0], "one", env=[{"name": "WHO", "value": "one"}]),
        served(space.http_image, ports[1], "two", env=[{"name": "WHO", "value": "two"}]),
        command(space.cli_image, "print", "beside", "then", "sleep", "60000", name="three"),
    )
    pod.wait_ready()
    assert pod.get("/env").json()["WHO"] == "one"
    pod.port = ports[1]
    assert pod.get("/env").json()["WHO"] == "two"
    assert pod.logs("three") == "beside\n"


def test_a_pod_has_not_succeeded_while_a_container_still_runs(space: Workspace) -> None:
    pod = space.pod(
        command(space.cli_image, "print", "quick", name="quick"),
        command(space.cli_image, "sleep", "2500", name="slow"),
        restart="Never",
    )
    pod.wait_terminated("quick")
    seen = pod.read()
    assert seen.status.phase == "Running"
    assert condition(seen, "Ready") == "False"
    pod.wait_phase("Succeeded")


def test_one_container_that_fails_fails_the_pod_once_all_have_ended(space: Workspace) -> None:
    pod = space.pod(
        command(space.cli_image, "exit", "3", name="bad"),
        command(space.cli_image, "sleep", "500", name="good"),
        restart="Never",
    )
    status = pod.wait_phase("Failed")
    assert {item.name: item.state.terminated.exit_code for item in status.container_statuses} == {
        "bad": 3,
        "good": 0,
    }


def test_init_containers_run_one_after_the_other_before_the_others_begin(space: Workspace) -> None:
    mount = [{"name": "shared", "mountPath": "/shared"}]
    first = command(space.cli_image, "sleep", "600", "then", "write", "/shared/a", "one", name="first")
    second = command(space.cli_image, "cat", "/shared/a", "then", "write", "/shared/b", "two", name="second")
    pod = space.pod(
        served(space.http_image, space.port(), volumeMounts=mount),
        init=[{**first, "volumeMounts": mount}, {**second, "volumeMounts": mount}],
        volumes=[{"name": "shared", "emptyDir": {}}],
    )
    pod.wait(lambda seen: seen.status.init_container_statuses, "the init containers' status")
    seen = pod.read()
    assert seen.status.phase == "Pending"
    assert condition(seen, "Initialized") == "False"
    assert seen.status.container_statuses[0].state.waiting.reason == "PodInitializing"
    pod.wait_ready()
    ends = [pod.status(name).state.terminated for name in ("first", "second")]
    assert [(end.exit_code, end.reason) for end in ends] == [(0, "Completed")] * 2
    assert ends[0].finished_at <= ends[1].started_at
    assert condition(pod.read(), "Initialized") == "True"
    assert pod.get("/read", path="/shared/b").text == "two"
    assert pod.logs("second") == "one\n"


def test_an_init_container_that_fails_for_good_fails_the_pod_and_nothing_else_runs(space: Workspace) -> None:
    pod = space.pod(
        command(space.cli_image, "print", "never said"),
        init=[
            command(space.cli_image, "exit", "5", name="bad"),
            command(space.cli_image, "print", "never said", name="next"),
        ],
        restart="Never",
    )
    status = pod.wait_phase("Failed")
    ends = {item.name: item for item in [*status.init_container_statuses, *status.container_statuses]}
    assert ends["bad"].state.terminated.exit_code == 5
    for name in ("next", "main"):
        assert ends[name].state.terminated is None
        assert ends[name].state.waiting.reason == "PodInitializing"
    assert condition(pod.read(), "Initialized") == "False"


def test_an_init_container_that_fails_is_tried_again_where_the_policy_is_always(space: Workspace) -> None:
    config = space.unique("late")
    mount = [{"name": "gate", "mountPath": "/gate"}]
    init = command(space.cli_image, "cat", "/gate/open", name="gate")
    pod = space.pod(
        served(space.http_image, space.port()),
        init=[{**init, "volumeMounts": mount}],
        volumes=[{"name": "gate", "configMap": {"name": config, "optional": True}}],
    )
    pod.wait(
        lambda seen: seen.status.init_container_statuses[0].restart_count >= 1,
        "the init container to be retried",
    )
    seen = pod.read()
    assert seen.status.phase == "Pending"
    assert seen.status.container_statuses[0].state.waiting.reason == "PodInitializing"


def test_a_sidecar_starts_first_and_does_not_keep_the_pod_from_completing(space: Workspace) -> None:
    port = space.port()
    pod = space.pod(
        command(space.cli_image, "sleep", "800", "then", "print", "done"),
        init=[{**served(space.http_image, port, "sidecar"), "restartPolicy": "Always"}],
        restart="Never",
    )
    pod.port = port
    assert until(lambda: pod.get("/version").text, "the sidecar to serve") == "1"
    pod.wait_phase("Succeeded")
    assert pod.logs("main") == "done\n"


def test_a_component_that_serves_without_a_port_is_told_so(space: Workspace) -> None:
    pod = space.pod({"name": "web", "image": space.http_image})
    assert "containerPort" in pod.wait_waiting("CreateContainerError")


def test_a_container_that_kubectl_debug_adds_is_refused_and_the_pod_goes_on(
    space: Workspace, cluster: Cluster
) -> None:
    pod = space.serve().wait_ready()
    debug = ["debug", f"--namespace={pod.namespace}", pod.name, "--image=busybox", "--container=shell"]
    cluster.kubectl(*debug)
    assert "no shell" in pod.wait_event("EphemeralContainerNotRun", "shell")
    shown = until(lambda: pod.read().status.ephemeral_container_statuses, "its status")
    ended = shown[0].state.terminated
    assert (shown[0].name, ended.reason, ended.exit_code) == ("shell", "ContainerCannotRun", 128)
    assert (pod.get("/version").text, pod.status().restart_count) == ("1", 0)
