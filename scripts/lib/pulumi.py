"""Drives the pulumi CLI for the stack `local`."""

import http
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from localcloud.backends import ports
from scripts.lib import paths
from scripts.lib.environment import STACK
from scripts.lib.steps import Log, StepError, end_left, log_path

STEPS = ("pulumi up", "pulumi destroy")
CLUSTER = "gcp:container/cluster:Cluster"
POD = "kubernetes:core/v1:Pod"
DEFAULT_PORT = 8080  # as Pulumi.yaml has it
SETTINGS = paths.REPOSITORY / f"Pulumi.{STACK}.yaml"


def _drop_salt() -> None:
    """Takes the salt out that pulumi writes into the stack's file.

    It belongs to this machine's passphrase and is kept in the state too; in a committed file it would lock
    everybody else out.
    """
    text = SETTINGS.read_text(encoding="utf-8")
    clean = re.sub(r"^encryptionsalt:.*\n?", "", text, flags=re.MULTILINE)
    if clean != text:
        SETTINGS.write_text(clean, encoding="utf-8")


def _keep_salt_out_of_git(env: Mapping[str, str]) -> None:
    """Has git leave the salt out of what it compares and commits (see .gitattributes)."""
    if not (paths.REPOSITORY / ".git").exists():
        return
    setting = ["git", "config", "--local", "filter.no-salt.clean", "sed /^encryptionsalt:/d"]
    answer = subprocess.run(
        setting, cwd=paths.REPOSITORY, env=dict(env), capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        # A checkout of somebody else's, or a configuration that is locked: the stack works all the same.
        print(f"git does not learn to leave the salt of {SETTINGS.name} out: {answer.stderr.strip()}")


def end_orphans() -> None:
    """Ends what is at work on the stack for a command that is gone itself. For who holds the run's lock."""
    for name in STEPS:
        end_left(log_path(name))


def _clear_stale_lock(log: Log, env: Mapping[str, str]) -> None:
    """Removes the lock of a pulumi that was killed; one that is alive keeps its own."""
    for lock in paths.STACKS.glob(f".pulumi/locks/**/{STACK}/*.json"):
        if not _is_held(lock):
            log.run(["pulumi", "cancel", "--yes", "--stack", STACK], env=env)
            return


def _is_held(lock: Path) -> bool:
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        host, pid = holder["hostname"], int(holder["pid"])
    except FileNotFoundError:
        return True  # it was let go just now
    except (ValueError, KeyError, TypeError):
        return False  # killed while it wrote this
    return host != socket.gethostname() or _is_pulumi(pid)


def _is_pulumi(pid: int) -> bool:
    """Whether that process is a pulumi; another program may have got the pid of one that is gone."""
    command = ["ps", "-o", "stat=,comm=", "-p", str(pid)]
    stat, _, name = (
        subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().partition(" ")
    )
    return not stat.startswith("Z") and Path(name.strip()).name == "pulumi"


def _select(log: Log, env: Mapping[str, str]) -> None:
    paths.STACKS.mkdir(mode=0o700, exist_ok=True)
    log.run(["pulumi", "stack", "select", "--create", STACK], env=env)


def _settle(log: Log, env: Mapping[str, str], command: str) -> None:
    """Clears up after a pulumi that was killed or failed: its processes, its lock, and what it had begun."""
    end_orphans()
    _clear_stale_lock(log, env)
    log.run(["python", "-m", "scripts.lib.interrupted", STACK, command], env=env)


def _has_nothing() -> bool:
    """Whether the stack is one in which nothing was ever made or begun, and at which nobody is at work."""
    if any(paths.STACKS.glob(f".pulumi/locks/**/{STACK}/*.json")):
        return False
    states = [*paths.STACKS.glob(f".pulumi/stacks/**/{STACK}.json")]
    try:
        found = [json.loads(state.read_text(encoding="utf-8"))["checkpoint"] for state in states]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    made = [checkpoint.get("latest") or {} for checkpoint in found]
    return len(made) == 1 and not any(
        latest.get("resources") or latest.get("pending_operations") for latest in made
    )


def _resources(env: Mapping[str, str]) -> list[dict[str, Any]]:
    """What is in the state."""
    command = ["pulumi", "stack", "export", "--stack", STACK]
    exported = subprocess.run(command, cwd=paths.REPOSITORY, env=dict(env), capture_output=True, check=False)
    return json.loads(exported.stdout or "{}").get("deployment", {}).get("resources") or []


def _delete_failed_pods(log: Log, env: Mapping[str, str], resources: list[dict[str, Any]]) -> None:
    """Deletes the stack's pods that have failed for good, as one that was evicted: no update brings those
    back, and the refresh sees that they are gone.
    """
    pods = {resource["id"] for resource in resources if resource["type"] == POD and resource.get("id")}
    for namespace in sorted({pod.rpartition("/")[0] for pod in pods}):
        which = [f"--namespace={namespace}", "--field-selector=status.phase=Failed"]
        listed = subprocess.run(
            ["kubectl", "get", "pods", *which, "--output=name", "--request-timeout=10s"],
            env=dict(env),
            capture_output=True,
            text=True,
            check=False,
        )
        for name in listed.stdout.split():
            if f"{namespace}/{name.removeprefix('pod/')}" in pods:
                which = [f"--namespace={namespace}", "--ignore-not-found", "--timeout=60s"]
                log.run(["kubectl", "delete", name, *which], env=env)


def _has_lost_its_cluster(env: Mapping[str, str], resources: list[dict[str, Any]]) -> bool:
    """Whether the state has a cluster that Google says is not there: nobody can be asked what was in it."""
    endpoint = urlsplit(env["GOOGLE_CONTAINER_CUSTOM_ENDPOINT"])
    headers = {"Authorization": f"Bearer {env['GOOGLE_OAUTH_ACCESS_TOKEN']}"}
    for resource in resources:
        if resource["type"] != CLUSTER:
            continue
        google = http.client.HTTPConnection(endpoint.netloc, timeout=30)
        try:
            google.request("GET", f"{endpoint.path}{resource['id']}", headers=headers)
            return google.getresponse().status == http.HTTPStatus.NOT_FOUND
        except (OSError, http.client.HTTPException):
            return False
        finally:
            google.close()
    return False


def _check_port(env: Mapping[str, str]) -> None:
    """Raises StepError when another program keeps an app from its port on every address of this machine."""
    shown = subprocess.run(
        ["pulumi", "config", "--json", "--stack", STACK],
        cwd=paths.REPOSITORY,
        env=dict(env),
        capture_output=True,
        check=False,
    )
    settings = json.loads(shown.stdout) if shown.returncode == 0 and shown.stdout else {}
    apps = settings.get("awesome-wasm:apps", {}).get("objectValue") or [{}]
    for number, app in enumerate(apps):
        if not isinstance(app, dict) or "replicas" in app or "autoscaling" in app:
            continue
        port = str(app.get("port", DEFAULT_PORT))
        if not port.isdecimal():
            continue  # the program says what is wrong with it
        reason = ports.refusal(int(port))
        if reason:
            raise StepError(
                f"port {port}, where an app is to answer, {reason}; for another one:\n"
                f'  eval "$(./scripts/env)" && '
                f"pulumi config set --path 'apps[{number}].port' PORT --stack {STACK}"
            )


def up(log: Log, env: Mapping[str, str], plan: str | None = None) -> None:
    """Creates or updates the stack; what is gone from it is seen by a refresh, and made again.

    With a plan it does that and no more; where it does not fit any more, nothing is done: pulumi previews
    with it first.
    """
    _keep_salt_out_of_git(env)
    _drop_salt()
    try:
        _select(log, env)
        _check_port(env)
        if _has_nothing():
            # Nothing can be lost or found: a preview and a refresh would only run the program once more.
            end_orphans()
            how = ["--skip-preview"]
        else:
            _settle(log, env, "up")
            resources = _resources(env)
            if _has_lost_its_cluster(env, resources):
                env = {**env, "PULUMI_K8S_DELETE_UNREACHABLE": "true"}
            elif plan is None:
                _delete_failed_pods(log, env, resources)
            how = ["--refresh"]
        if plan is not None:
            # What a refresh finds is not planned.
            how, env = ["--plan", str(Path(plan).absolute())], {**env, "PULUMI_EXPERIMENTAL": "true"}
        log.run(["pulumi", "up", *how, "--yes", "--stack", STACK, "--color", "never"], env=env)
    finally:
        _drop_salt()


def destroy(log: Log, env: Mapping[str, str]) -> None:
    """Destroys the stack and forgets it."""
    _drop_salt()
    try:
        _select(log, env)
        _settle(log, env, "destroy")
        log.run(["pulumi", "destroy", "--yes", "--stack", STACK, "--color", "never"], env=env)
        log.run(["pulumi", "stack", "rm", "--yes", "--preserve-config", STACK], env=env)
    finally:
        _drop_salt()


def _known() -> set[str]:
    """The stacks that have a state here: the user's own, as `dev`, may be among them."""
    states = [
        *paths.STACKS.glob(".pulumi/stacks/**/*.json"),
        *paths.STACKS.glob(".pulumi/stacks/**/*.json.gz"),
    ]
    return {path.name.partition(".json")[0] for path in states}


def is_known() -> bool:
    """Whether there is a stack to destroy."""
    return STACK in _known()


def remove_files() -> set[str]:
    """Removes every file of the stack, and all of .stacks unless others live there; gives the others."""
    others = _known() - {STACK}
    if not others:
        shutil.rmtree(paths.STACKS, ignore_errors=True)
        return others
    for path in sorted(paths.STACKS.glob(".pulumi/**/*")):
        if path.name == STACK and path.is_dir():
            shutil.rmtree(path)
        elif path.name.startswith(f"{STACK}.json"):
            path.unlink()
    return others


def outputs(env: Mapping[str, str]) -> dict[str, Any]:
    """The stack's outputs, secrets included.

    Raises StepError when pulumi does not give them.
    """
    command = ["pulumi", "stack", "output", "--json", "--show-secrets", "--stack", STACK]
    answer = subprocess.run(
        command, cwd=paths.REPOSITORY, env=dict(env), capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        raise StepError(f"pulumi stack output: {answer.stderr.strip()}")
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def write_kubeconfig(stack_outputs: Mapping[str, Any], path: Path) -> None:
    """Writes the cluster's kubeconfig where KUBECONFIG points, readable by its user alone."""
    text = stack_outputs["kubeconfig"]
    content = text if isinstance(text, str) else json.dumps(text)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
