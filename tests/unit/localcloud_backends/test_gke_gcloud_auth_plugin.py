"""The credential plugin that kubectl runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[3] / "localcloud/bin/gke-gcloud-auth-plugin"
V1 = "client.authentication.k8s.io/v1"


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", str(PLUGIN)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("variable", ["GOOGLE_OAUTH_ACCESS_TOKEN", "CLOUDSDK_AUTH_ACCESS_TOKEN"])
def test_the_token_is_printed_as_an_exec_credential(variable: str) -> None:
    credential = json.loads(run(**{variable: "secret"}).stdout)
    assert credential["kind"] == "ExecCredential"
    assert credential["apiVersion"] == f"{V1}beta1"
    assert credential["status"] == {"token": "secret"}


def test_the_clients_version_is_answered() -> None:
    info = json.dumps({"apiVersion": V1, "kind": "ExecCredential", "spec": {"interactive": False}})
    answer = run(GOOGLE_OAUTH_ACCESS_TOKEN="secret", KUBERNETES_EXEC_INFO=info)
    assert json.loads(answer.stdout)["apiVersion"] == V1


@pytest.mark.parametrize("info", ["", "no json", "[]", '{"apiVersion": "client.authentication.k8s.io/v9"}'])
def test_what_it_cannot_do_is_an_error_and_no_credential(info: str) -> None:
    environment = {"GOOGLE_OAUTH_ACCESS_TOKEN": "secret", "KUBERNETES_EXEC_INFO": info} if info else {}
    answer = run(**environment)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.startswith("gke-gcloud-auth-plugin: ")
