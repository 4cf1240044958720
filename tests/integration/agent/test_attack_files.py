"""What a hostile pod tries with its files: to leave its volumes, and to fill the disk. A sentence a test."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import wasmtime

from tests.integration.agent.harness import Agent, Manifest, Pod, Workspace, command, layout, literal, served
from tests.waiting import until

SHARED = [{"name": "shared", "emptyDir": {}}]
# Whatever of these a guest sees, it has seen the agent's own files.
OURS = ("pki", "precompiled", "lock", "config", "pods", "images")


def _swapped(space: Workspace, thief: Manifest, volume: Manifest, *, read_only: bool = False) -> Pod:
    """A pod whose container "web" has the directory `s` of a volume at /s, and "thief" the whole of it at /v.

    The thief waits for the file `go` in `s`, which is written by the host or by "web" once that serves.
    """
    web = served(
        space.http_image,
        space.port(),
        volumeMounts=[{"name": "shared", "mountPath": "/s", "subPath": "s", "readOnly": read_only}],
    )
    whole = [{"name": "shared", "mountPath": "/v"}]
    return space.pod(web, thief | {"volumeMounts": whole}, volumes=[{"name": "shared", **volume}])


def _sees_only(pod: Pod, path: str, *names: str) -> None:
    """Twenty requests, each an instance of its own, see these files and nothing of the node's."""
    for _ in range(20):
        listed = pod.get("/ls", path=path)
        assert listed.status_code == 200, listed.text
        assert listed.text.split() == sorted(names)
    for stolen in ("pki/client.pem", "precompiled/key", "../pki/client.pem", "config/kubeconfig"):
        assert pod.get("/read", path=f"{path}/{stolen}").status_code in (403, 404), stolen


SWAPS = {
    "renamed and replaced": "rename /v/s /v/t then symlink ../../../.. /v/s",
    "by another directory": "rename /v/s /v/t then mkdir /v/s then write /v/s/pki x",
    "moved deeper": "mkdir /v/d then rename /v/s /v/d/s then symlink ../../../.. /v/s",
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS.keys())
def test_a_mount_stays_what_it_was_when_its_name_is_made_a_link_out(space: Workspace, swap: str) -> None:
    words = f"await /v/s/go then {swap} then write /v/done x then sleep 600000".split()
    pod = _swapped(space, command(space.cli_image, *words, name="thief"), {"emptyDir": {}})
    pod.wait_ready()
    assert pod.get("/write", path="/s/go", text="now").ok
    root = space.agent.data_dir / "pods" / pod.uid / "volumes" / "shared"
    until((root / "done").exists, "the swap", timeout=20)
    _sees_only(pod, "/s", "go")
    assert pod.get("/write", path="/s/more", text="x").ok
    assert not (space.agent.data_dir / "more").exists()


def test_a_core_module_that_swaps_a_sub_path_shows_nothing_of_the_node(space: Workspace) -> None:
    thief = command(space.registry.guest("subpath-swap"), name="thief")
    pod = _swapped(space, thief, {"emptyDir": {}})
    pod.wait_ready()
    assert pod.get("/write", path="/s/go", text="now").ok
    root = space.agent.data_dir / "pods" / pod.uid / "volumes" / "shared"
    until((root / "s").is_symlink, "the swap", timeout=20)
    _sees_only(pod, "/s", "go")


def test_what_is_put_in_the_place_of_a_mount_holds_the_containers_next_start(space: Workspace) -> None:
    words = [
        "await",
        "/v/s/go",
        "then",
        "rename",
        "/v/s",
        "/v/t",
        "then",
        "symlink",
        "../../../..",
        "/v/s",
        "then",
        "sleep",
        "600000",
    ]
    thief = command(
        space.cli_image, *words, name="thief", volumeMounts=[{"name": "shared", "mountPath": "/v"}]
    )
    victim = command(
        space.cli_image,
        *["write", "/s/go", "x", "then", "sleep", "300", "then", "ls", "/s", "then", "exit", "1"],
        name="victim",
        volumeMounts=[{"name": "shared", "mountPath": "/s", "subPath": "s"}],
    )
    pod = space.pod(victim, thief, volumes=SHARED)
    message = pod.wait_waiting("CreateContainerConfigError", "victim")
    assert "leads out of the volume" in message
    assert not set(pod.logs("victim", previous=True).split()) & set(OURS)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_host_path_is_held_as_an_empty_dir_is(space: Workspace, agent: Agent, read_only: bool) -> None:
    root = agent.host_directory / space.unique("volume")
    (root / "s").mkdir(parents=True)
    (agent.host_directory / "outside").write_text("secret of the host")
    words = "await /v/s/go then rename /v/s /v/t then symlink .. /v/s then write /v/done x then sleep 600000"
    thief = command(space.cli_image, *words.split(), name="thief")
    pod = _swapped(space, thief, {"hostPath": {"path": str(root)}}, read_only=read_only)
    pod.wait_ready()
    (root / "s" / "go").write_text("now")
    until((root / "done").exists, "the swap", timeout=20)
    _sees_only(pod, "/s", "go")
    assert "secret" not in pod.get("/read", path="/s/outside").text


def test_the_root_of_a_volume_may_be_renamed_and_replaced(space: Workspace, agent: Agent) -> None:
    root = agent.host_directory / space.unique("volume")
    root.mkdir()
    (root / "ours").write_text("x")
    pod = space.serve(
        volumeMounts=[{"name": "data", "mountPath": "/data"}],
        pod={"volumes": [{"name": "data", "hostPath": {"path": str(root)}}]},
    ).wait_ready()
    assert pod.get("/read", path="/data/ours").ok
    root.rename(root.with_name(f"{root.name}-moved"))
    root.symlink_to(agent.data_dir)
    _sees_only(pod, "/data", "ours")


def test_a_pod_that_may_change_a_directory_cannot_turn_another_pods_volume_in_it(
    space: Workspace, agent: Agent
) -> None:
    root = agent.host_directory / space.unique("volume")
    (root / "inner").mkdir(parents=True)
    volume = {"name": "data", "hostPath": {"path": str(root)}}
    mounts = [{"name": "data", "mountPath": "/v"}]
    words = ["rename", "/v/inner", "/v/kept", "then", "symlink", "../../data", "/v/inner"]
    space.run(*words, volumeMounts=mounts, pod={"volumes": [volume]}).wait_phase("Succeeded")
    assert (root / "inner").resolve() == agent.data_dir.resolve()
    for path in (root / "inner", root / "inner" / "pki"):
        pod = space.serve(
            volumeMounts=[{"name": "data", "mountPath": "/data"}],
            pod={"volumes": [{"name": "data", "hostPath": {"path": str(path)}}]},
        )
        assert "leads out of" in pod.wait_waiting("CreateContainerConfigError")


def test_the_agents_own_directory_is_no_host_path_whatever_is_allowed(space: Workspace, agent: Agent) -> None:
    link = agent.host_directory / space.unique("link")
    link.symlink_to(agent.data_dir)
    for path in (agent.data_dir, agent.directory, link, link / "pki"):
        pod = space.serve(
            volumeMounts=[{"name": "data", "mountPath": "/data"}],
            pod={"volumes": [{"name": "data", "hostPath": {"path": str(path)}}]},
        )
        pod.wait_waiting("CreateContainerConfigError")


LINKS = {
    "up": "../../../..",
    "nested": "../../../../..",
    "of a link": "up",
}


# A core module that opens a file of its first directory, or sets its times; its exit code is WASI's answer.
OPENS = """(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_filestat_set_times"
    (func $times (param i32 i32 i32 i32 i64 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 16) "{path}")
  (func (export "_start") (call $exit {call})))"""
OPEN = (
    "(call $open (i32.const 3) (i32.const 1) (i32.const 16) (i32.const {length})"
    " (i32.const 0) (i64.const {rights}) (i64.const 0) (i32.const 0) (i32.const 8))"
)
SET_TIMES = (
    "(call $times (i32.const 3) (i32.const 1) (i32.const 16) (i32.const {length})"
    " (i64.const 0) (i64.const 0) (i32.const 10))"
)


def test_what_is_neither_file_nor_directory_is_refused_at_once_and_holds_nothing_of_the_nodes(
    space: Workspace, agent: Agent
) -> None:
    root = agent.host_directory / space.unique("special")
    root.mkdir()
    os.mkfifo(root / "fifo")
    (root / "file").write_text("x")
    (root / "link").symlink_to("fifo")
    volume = {"volumes": [{"name": "v", "hostPath": {"path": str(root)}}]}
    mounted: Manifest = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        pod = space.serve(pod=volume, **mounted).wait_ready()
        names = ["fifo", "link", "socket"]
        asked = [("/write" if number % 2 else "/read", f"/v/{names[number % 3]}") for number in range(60)]
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = pool.map(lambda way: pod.get(way[0], path=way[1], text="x").status_code, asked)
            assert not set(answers) & {200, 503, 504}
        assert pod.get("/read", path="/v/file").text == "x"
    cases = [(OPEN, "file", 0), (SET_TIMES, "file", 0)]
    cases += [(call, name, 63) for call in (OPEN, SET_TIMES) for name in ("fifo", "link")]
    runs = []
    for call, path, code in cases:
        # Rights to read and to write.
        text = OPENS.replace("{call}", call).format(path=path, length=len(path), rights=2 | 64)
        image = space.registry.push("opens", layout(bytes(wasmtime.wat2wasm(text))), space.unique("opens"))
        runs.append((space.run(image=image, pod=volume, **mounted), code))
    assert [run.wait_terminated().exit_code for run, _ in runs] == [code for _, code in runs]


def test_times_are_set_of_nothing_outside_of_a_mount_and_of_nothing_that_may_only_be_read(
    space: Workspace, agent: Agent
) -> None:
    root = agent.host_directory / space.unique("times")
    inside, outside = root / "inside", root / "outside"
    for directory in (inside, outside):
        directory.mkdir(parents=True)
        (directory / "file").write_text("x")
    links = {"in": "file", "out": "../outside/file", "up": "..", "absolute": str(outside / "file")}
    for name, target in links.items():
        (inside / name).symlink_to(target)
    old = 1_000_000_000
    seen = [root, inside, outside, inside / "file", outside / "file", *(inside / name for name in links)]

    def set_back() -> None:
        for path in seen:
            os.utime(path, (old, old), follow_symlinks=False)

    def touched() -> list[str]:
        return [str(path.relative_to(root)) for path in seen if path.lstat().st_mtime != old]

    mounts = [{"name": "v", "mountPath": "/v"}, {"name": "v", "mountPath": "/ro", "readOnly": True}]
    volume = {"volumes": [{"name": "v", "hostPath": {"path": str(inside)}}]}
    pod = space.serve(volumeMounts=mounts, pod=volume).wait_ready()
    ways = ("follow", "link", "open")
    leading_out = ["out", "up", "absolute", "../outside/file", "up/outside/file", "..", str(outside / "file")]
    for way in ways:
        for mount in ("/v", "/ro"):
            for path in leading_out:
                if way == "link" and path in links and mount == "/v":
                    continue
                set_back()
                answer = pod.get("/touch", path=f"{mount}/{path}", way=way)
                assert answer.status_code in (403, 404), f"{way} {mount}/{path}: {answer.status_code}"
                assert touched() == [], f"{way} {mount}/{path}"
        for path in ("/ro/file", "/ro/in", "/ro", "/ro/.", "/ro/none"):
            set_back()
            assert pod.get("/touch", path=path, way=way).status_code in (403, 404), f"{way} {path}"
            assert touched() == [], f"{way} {path}"
    # What may be: a file and the mount itself, and each link as the link that it is.
    for way, path, which in [
        ("follow", "file", "file"),
        ("follow", "in", "file"),
        ("link", "file", "file"),
        *(("link", name, name) for name in links),
    ]:
        set_back()
        assert pod.get("/touch", path=f"/v/{path}", way=way).ok, f"{way} {path}"
        assert touched() == [f"inside/{which}"], f"{way} {path}"
    runs = []
    set_back()
    for path in leading_out:
        # By a core module, which follows links.
        text = OPENS.replace("{call}", SET_TIMES).format(path=path, length=len(path))
        image = space.registry.push("opens", layout(bytes(wasmtime.wat2wasm(text))), space.unique("opens"))
        runs.append(space.run(image=image, pod=volume, volumeMounts=mounts))
    assert 0 not in [run.wait_terminated().exit_code for run in runs]
    assert touched() == []


def test_links_made_between_two_requests_lead_nowhere(space: Workspace) -> None:
    making = " then ".join(f"symlink {target} /v/d/{number}" for number, target in enumerate(LINKS.values()))
    words = f"mkdir /v/d then {making} then write /v/done x then sleep 600000".split()
    whole = [{"name": "shared", "mountPath": "/v"}]
    pod = space.pod(
        served(space.http_image, space.port(), volumeMounts=whole),
        command(space.cli_image, *words, name="thief", volumeMounts=whole),
        volumes=SHARED,
    ).wait_ready()
    until(lambda: pod.get("/read", path="/v/done").ok, "the links", timeout=20)
    for number in range(len(LINKS)):
        assert pod.get("/ls", path=f"/v/d/{number}").status_code in (403, 404)
        assert pod.get("/read", path=f"/v/d/{number}/pki/client.pem").status_code in (403, 404)


def test_a_hard_link_gives_no_right_that_the_mount_does_not_give(space: Workspace) -> None:
    config = space.config_map({"a": "kept"})
    mounts = [
        {"name": "config", "mountPath": "/config"},
        {"name": "shared", "mountPath": "/v"},
        {"name": "shared", "mountPath": "/ro", "readOnly": True},
    ]
    for words in (
        "link /config/a /v/a",
        "link /config/..data/a /v/a",
        "rename /config/a /v/a",
        "link /v/x /config/x",
        "rename /v/x /config/x",
        "write /v/x 1 then link /ro/x /v/y",
        "write /ro/x 1",
        "symlink /v /config/x",
    ):
        pod = space.run(
            *words.split(),
            volumeMounts=mounts,
            pod={"volumes": [*SHARED, {"name": "config", "configMap": {"name": config}}]},
        )
        pod.wait_phase("Failed")
        assert "not-permitted" in pod.logs() or "access" in pod.logs() or "read-only" in pod.logs(), (
            pod.logs()
        )


def test_the_files_of_a_pod_are_removed_and_not_what_its_links_lead_to(
    space: Workspace, agent: Agent
) -> None:
    outside = agent.host_directory / space.unique("outside")
    outside.mkdir()
    (outside / "file").write_text("kept")
    links = f"symlink ../../../../../host/{outside.name} /v/out then symlink none /v/none"
    pod = space.run(
        *f"{links} then mkdir /v/d then deep /v/d 3000".split(),
        volumeMounts=[{"name": "shared", "mountPath": "/v"}],
        pod={"volumes": SHARED},
    )
    pod.wait_phase("Succeeded")
    pod.delete(grace=0)
    until(lambda: not (agent.data_dir / "pods" / pod.uid).exists(), "the pod's files to go", timeout=60)
    assert (outside / "file").read_text() == "kept"
    assert agent.condition("Ready") == "True"


def test_variables_that_multiply_are_refused_and_named_and_cost_the_agent_nothing(
    space: Workspace, agent: Agent
) -> None:
    env = [literal("V0", "0123456789")]
    env += [literal(f"V{number}", f"$(V{number - 1})" * 10) for number in range(1, 10)]
    before = agent.resident_bytes()
    pod = space.serve(env=env)
    assert "V5" in pod.wait_waiting("CreateContainerConfigError")
    big = [literal("BIG", "x" * 100_000)]
    bodies: list[Manifest] = [{"args": ["$(BIG)"] * 20}, {"command": ["$(BIG)" * 20]}]
    for body in bodies:
        pod = space.run(env=big, **body)
        assert "argument" in pod.wait_waiting("CreateContainerConfigError")
    assert agent.resident_bytes() - before < 64 << 20


def test_the_variables_of_many_containers_are_the_memory_of_their_pod(space: Workspace, agent: Agent) -> None:
    env = [literal("V0", "0123456789")]
    env += [literal(f"V{number}", f"$(V{number - 1})" * 10) for number in range(1, 5)]
    env.append(literal("V5", "$(V4)" * 8))
    one = command(space.cli_image, "sleep", "60000", env=env)
    limit: Manifest = {"limits": {"memory": "32Mi"}}
    with agent.bounded(32):
        pod = space.pod(*({**one, "name": f"c{n}"} for n in range(150)), restart="Never", resources=limit)
        until(
            lambda: any(
                "no memory for the container's environment" in e.message for e in pod.events("Failed")
            ),
            "one of them to be refused",
        )


def test_one_key_for_many_paths_is_refused(space: Workspace, agent: Agent) -> None:
    config = space.config_map({"a": "x" * 900_000})
    items = [{"key": "a", "path": f"p{number}"} for number in range(500)]
    before = agent.resident_bytes()
    pod = space.serve(
        volumeMounts=[{"name": "data", "mountPath": "/data"}],
        pod={"volumes": [{"name": "data", "configMap": {"name": config, "items": items}}]},
    )
    assert "128 MiB" in pod.wait_waiting("CreateContainerConfigError")
    assert agent.resident_bytes() - before < 300 << 20


def test_a_neighbour_answers_all_the_while(space: Workspace) -> None:
    """What the other tests of this file do to the shared node leaves it serving."""
    pod = space.serve().wait_ready()
    assert requests.get(f"{pod.url}/healthz", timeout=10).ok
    assert Path(space.agent.data_dir / "pki").exists()
