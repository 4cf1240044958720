"""localcloud with its real parts, through the clients that people use: gcloud, Google's Python client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from google.oauth2.credentials import Credentials
from googleapiclient import discovery
from googleapiclient.errors import HttpError

from localcloud.backends.processes import marked, start_time
from tests.integration.conftest import Localcloud, make_localcloud
from tests.waiting import remove, until

PROJECT, REGION, ZONE = "localcloud-dev", "europe-west1", "europe-west1-b"
COMPUTE = f"/compute/v1/projects/{PROJECT}"
INSTANCES = f"{COMPUTE}/zones/{ZONE}/instances"
REPOSITORIES = f"/artifactregistry/v1/projects/{PROJECT}/locations/{REGION}/repositories"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Localcloud]:
    """A localcloud of the test's own, not started."""
    cloud = make_localcloud(tmp_path)
    yield cloud
    cloud.command("reset")
    assert marked(f"{cloud.home}#") == []


def _instance(name: str, script: str = "") -> dict[str, Any]:
    image = "projects/debian-cloud/global/images/family/debian-12"
    return {
        "name": name,
        "machineType": f"zones/{ZONE}/machineTypes/e2-small",
        "disks": [{"boot": True, "autoDelete": True, "initializeParams": {"sourceImage": image}}],
        "networkInterfaces": [{"network": "global/networks/default", "accessConfigs": [{}]}],
        "metadata": {"items": [{"key": "startup-script", "value": script}]},
    }


# The command line.


def test_start_is_safe_to_run_twice_at_once_and_stop_leaves_nothing(fresh: Localcloud) -> None:
    assert fresh.command("status", check=False).returncode == 3
    assert "run: python -m localcloud start" in fresh.command("env", check=False).stderr
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda _: fresh.command("start"), range(3)))
    assert len({answer.stdout for answer in answers}) == 1
    report = fresh.status()
    assert report["running"] is True
    assert [item["state"] for item in report["programs"] if item["name"] == "api"] == ["RUNNING"]
    assert marked(f"{fresh.home}#")
    pid = next(item["pid"] for item in report["programs"] if item["name"] == "api")
    fresh.command("start")
    assert next(item["pid"] for item in fresh.status()["programs"] if item["name"] == "api") == pid
    url, token = fresh.url, fresh.token
    fresh.command("stop")
    assert marked(f"{fresh.home}#") == []
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/healthz", timeout=5)
    fresh.command("start")
    assert (fresh.url, fresh.token) == (url, token)
    fresh.command("reset")
    assert not fresh.home.exists()


def test_state_directory_is_its_owners_alone(fresh: Localcloud) -> None:
    fresh.command("start")
    # These two make the signing keys.
    assert fresh.request("GET", "/v2/token").ok
    assert fresh.request("GET", INSTANCES, headers={"Authorization": "Bearer ya29.lc-x.y"}).status_code == 401
    for name in (
        "",
        "config.json",
        "store.db",
        "keys",
        "keys/secret.key",
        "keys/registry.pem",
        "supervisor",
        "logs",
    ):
        assert (fresh.home / name).stat().st_mode & 0o077 == 0, name


def test_taken_port_is_given_up_only_if_nothing_depends_on_it(fresh: Localcloud) -> None:
    fresh.command("start")
    port = int(fresh.url.rpartition(":")[2])
    fresh.command("stop")
    with socket.create_server(("127.0.0.1", port)):
        answer = fresh.command("start")
        assert f"port {port} is taken" in answer.stdout
    fresh.done(fresh.request("POST", INSTANCES, _instance("vm")).json())
    port = int(fresh.url.rpartition(":")[2])
    fresh.command("stop")
    with socket.create_server(("127.0.0.1", port)):
        answer = fresh.command("start", check=False)
        assert answer.returncode == 1
        assert answer.stderr.startswith(f"localcloud: port {port} is taken")
        assert "python -m localcloud reset" in answer.stderr
        if Path("/proc/net/tcp").exists():
            assert f"(process {os.getpid()})" in answer.stderr
    fresh.command("start")
    assert fresh.request("GET", f"{INSTANCES}/vm").json()["status"] == "RUNNING"


def test_reset_never_deletes_what_is_not_localclouds(fresh: Localcloud) -> None:
    fresh.home.mkdir()
    (fresh.home / "thesis.txt").write_text("years of work")
    answer = fresh.command("reset", check=False)
    assert answer.returncode == 1
    assert (fresh.home / "thesis.txt").exists()
    (fresh.home / "thesis.txt").unlink()


def test_server_killed_in_the_middle_of_an_operation_ends_it_after_its_restart(fresh: Localcloud) -> None:
    fresh.command("start")
    operation = fresh.request("POST", INSTANCES, _instance("vm")).json()
    pid = next(item["pid"] for item in fresh.status()["programs"] if item["name"] == "api")
    os.kill(pid, signal.SIGKILL)
    until(lambda: fresh.request("GET", "/healthz").ok, "the server to be back")
    fresh.done(operation)
    assert fresh.request("GET", f"{INSTANCES}/vm").json()["status"] == "RUNNING"


def test_a_server_that_outlived_its_supervisor_is_started_anew_with_all_that_it_kept(
    fresh: Localcloud,
) -> None:
    fresh.command("start")
    fresh.done(fresh.request("POST", INSTANCES, _instance("vm")).json())
    before = {item["name"]: item["pid"] for item in fresh.status()["programs"]}
    os.kill(json.loads((fresh.home / "supervisor" / "supervisord.json").read_text())["pid"], signal.SIGKILL)
    until(lambda: not fresh.status()["running"], "the end of the supervisor to be noticed")
    assert fresh.request("GET", "/healthz").ok
    fresh.command("start")
    status = fresh.status()
    after = {item["name"]: item["pid"] for item in status["programs"]}
    assert status["running"]
    assert after["api"] != before["api"]
    assert after["vm-vm.metadata"] not in (0, before["vm-vm.metadata"])
    assert fresh.request("GET", f"{INSTANCES}/vm").json()["status"] == "RUNNING"


@pytest.mark.parametrize("command", ["start", "reset"])
def test_a_directory_deleted_under_a_localcloud_that_runs_leaves_no_process(
    fresh: Localcloud, command: str
) -> None:
    fresh.command("start")
    fresh.done(fresh.request("POST", INSTANCES, _instance("vm")).json())
    before = [item["pid"] for item in fresh.status()["programs"]]
    remove(fresh.home)
    fresh.command(command)
    assert not [pid for pid in before if start_time(pid) is not None]
    if command == "start":
        assert fresh.request("GET", f"{INSTANCES}/vm").status_code == 404
    else:
        assert not fresh.home.exists()


# Plain HTTP.


def test_error_bodies_are_googles(localcloud: Localcloud) -> None:
    answer = requests.get(f"{localcloud.url}{INSTANCES}", timeout=10)
    assert answer.status_code == 401
    assert answer.json()["error"]["status"] == "UNAUTHENTICATED"
    answer = localcloud.request("GET", f"{INSTANCES}/none")
    assert answer.headers["Content-Type"] == "application/json; charset=UTF-8"
    message = f"The resource 'projects/{PROJECT}/zones/{ZONE}/instances/none' was not found"
    assert answer.json() == {
        "error": {
            "code": 404,
            "message": message,
            "errors": [{"message": message, "domain": "global", "reason": "notFound"}],
            "status": "NOT_FOUND",
        }
    }
    answer = localcloud.request("POST", INSTANCES, _instance("vm") | {"colour": "red"})
    assert answer.status_code == 400
    assert "Unknown name \"colour\" at 'resource': Cannot find field." in answer.json()["error"]["message"]


@pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="the list of listening sockets is read from /proc"
)
def test_server_listens_on_loopback_only(localcloud: Localcloud) -> None:
    port = int(localcloud.url.rpartition(":")[2])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hosts = {
        row[1].split(":")[0] for row in listening if row[3] == "0A" and int(row[1].split(":")[1], 16) == port
    }
    assert hosts == {"0100007F"}


def test_instance_runs_its_startup_script_and_is_really_gone_when_deleted(localcloud: Localcloud) -> None:
    script = (
        "#!/bin/sh\n"
        'url="http://$GCE_METADATA_HOST/computeMetadata/v1"\n'
        'echo "I am $(curl -s -H Metadata-Flavor:Google $url/instance/name)"\n'
        "echo token=$(curl -s -H Metadata-Flavor:Google $url/instance/service-accounts/default/token)\n"
    )
    account = {"email": "default", "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
    localcloud.trust(script)
    body = _instance("worker", script) | {"serviceAccounts": [account]}
    localcloud.done(localcloud.request("POST", INSTANCES, body).json())

    def serial() -> str:
        contents: str = localcloud.request("GET", f"{INSTANCES}/worker/serialPort").json()["contents"]
        return contents

    until(lambda: "Finished running startup scripts" in serial(), "the startup script to end")
    assert "I am worker" in serial()
    # The token of the metadata server is one that the API knows, and that may do nothing.
    token = serial().partition('"access_token":')[2].split('"')[1]
    answer = localcloud.request("GET", INSTANCES, headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 403
    assert localcloud.request("POST", INSTANCES, body).status_code == 409
    localcloud.done(localcloud.request("DELETE", f"{INSTANCES}/worker").json())
    assert localcloud.request("GET", f"{INSTANCES}/worker").status_code == 404
    assert marked(f"{localcloud.home}#instances/worker") == []


# The registry.


def _registry_token(answer: requests.Response, token: str) -> requests.Response:
    """Follow a registry's challenge to the token endpoint, as an OCI client does."""
    challenge = answer.headers["WWW-Authenticate"].removeprefix("Bearer ")
    fields = dict(part.split("=", 1) for part in challenge.replace('",', '"\n').split("\n"))
    fields = {key: value.strip('"') for key, value in fields.items()}
    query = {"service": fields["service"], "scope": fields["scope"]}
    return requests.get(fields["realm"], params=query, auth=("oauth2accesstoken", token), timeout=10)


def _push(registry: str, image: str, token: str) -> requests.Response:
    """Push a small artifact; gives the answer to the manifest, or the first refusal."""
    base = f"http://{registry}/v2/{image}"
    granted = _registry_token(requests.post(f"{base}/blobs/uploads/", timeout=10), token)
    if not granted.ok:
        return granted
    headers = {"Authorization": f"Bearer {granted.json()['token']}"}
    blob = b"{}"
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    place = requests.post(f"{base}/blobs/uploads/", headers=headers, timeout=10)
    if not place.ok:
        return place
    location = place.headers["Location"]
    upload = requests.put(location, params={"digest": digest}, data=blob, headers=headers, timeout=10)
    assert upload.status_code == 201, upload.text
    descriptor = {"mediaType": EMPTY, "digest": digest, "size": len(blob)}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor, "layers": [descriptor]}
    return requests.put(
        f"{base}/manifests/v1", json=manifest, headers=headers | {"Content-Type": MANIFEST}, timeout=10
    )


def test_push_goes_to_a_repository_that_was_created_and_to_no_other(localcloud: Localcloud) -> None:
    operation = localcloud.request(
        "POST", REPOSITORIES, {"format": "DOCKER"}, params={"repositoryId": "pushed"}
    )
    path = f"/artifactregistry/v1/{operation.json()['name']}"
    until(lambda: localcloud.request("GET", path).json().get("done"), "the repository to be made")
    uri = localcloud.request("GET", f"{REPOSITORIES}/pushed").json()["registryUri"]
    registry, _, prefix = uri.partition("/")
    pushed = _push(registry, f"{prefix}/app", localcloud.token)
    assert pushed.status_code == 201, pushed.text
    image = localcloud.request("GET", f"{REPOSITORIES}/pushed/dockerImages").json()["dockerImages"][0]
    assert image["tags"] == ["v1"]
    assert image["uri"] == f"{uri}/app@{pushed.headers['Docker-Content-Digest']}"

    denied = _push(registry, f"{PROJECT}/never-made/app", localcloud.token)
    assert denied.status_code == 403
    assert "(or it may not exist)" in denied.json()["errors"][0]["message"]
    assert _push(registry, f"{prefix}/app", "nonsense").status_code == 401
    localcloud.request("DELETE", f"{REPOSITORIES}/pushed")
    until(lambda: localcloud.request("GET", f"{REPOSITORIES}/pushed").status_code == 404, "the deletion")
    assert _push(registry, f"{prefix}/app", localcloud.token).status_code == 403


# Google's Python client.


def _service(cloud: Localcloud, name: str, version: str, path: str) -> Any:
    """A client as its users build it, with another endpoint."""
    options = {"api_endpoint": f"{cloud.url}{path}"}
    return discovery.build(
        name,
        version,
        credentials=Credentials(token=cloud.token),  # type: ignore[no-untyped-call]
        client_options=options,
        static_discovery=True,
    )


@pytest.mark.parametrize("version", ["v1", "beta"])
def test_python_client_creates_lists_and_deletes_compute_resources(
    localcloud: Localcloud, version: str
) -> None:
    compute = _service(localcloud, "compute", version, f"/compute/{version}/")
    name = f"py-{version}"

    def finish(operation: dict[str, Any]) -> None:
        """Wait for an operation in the scope that it names."""
        for scope, collection in (("zone", compute.zoneOperations()), ("region", compute.regionOperations())):
            if scope in operation:
                place = {scope: operation[scope].rpartition("/")[2]}
                done = collection.wait(project=PROJECT, operation=operation["name"], **place).execute()
                break
        else:
            done = compute.globalOperations().wait(project=PROJECT, operation=operation["name"]).execute()
        assert done["status"] == "DONE"
        assert "error" not in done

    network = {"name": name, "autoCreateSubnetworks": False}
    finish(compute.networks().insert(project=PROJECT, body=network).execute())
    link = compute.networks().get(project=PROJECT, network=name).execute()["selfLink"]
    subnetwork = {"name": name, "network": link, "ipCidrRange": "10.3.0.0/24"}
    finish(compute.subnetworks().insert(project=PROJECT, region=REGION, body=subnetwork).execute())
    firewall = {"name": name, "network": link, "allowed": [{"IPProtocol": "tcp", "ports": ["80"]}]}
    finish(compute.firewalls().insert(project=PROJECT, body=firewall).execute())
    finish(compute.addresses().insert(project=PROJECT, region=REGION, body={"name": name}).execute())
    body = _instance(name) | {"networkInterfaces": [{"subnetwork": f"regions/{REGION}/subnetworks/{name}"}]}
    finish(compute.instances().insert(project=PROJECT, zone=ZONE, body=body).execute())
    listed = compute.instances().list(project=PROJECT, zone=ZONE, filter=f"name={name}").execute()
    assert [item["name"] for item in listed["items"]] == [name]
    with pytest.raises(HttpError) as caught:
        compute.networks().delete(project=PROJECT, network=name).execute()
    assert caught.value.error_details[0]["reason"] == "resourceInUseByAnotherResource"
    finish(compute.instances().delete(project=PROJECT, zone=ZONE, instance=name).execute())
    finish(compute.addresses().delete(project=PROJECT, region=REGION, address=name).execute())
    finish(compute.firewalls().delete(project=PROJECT, firewall=name).execute())
    finish(compute.subnetworks().delete(project=PROJECT, region=REGION, subnetwork=name).execute())
    finish(compute.networks().delete(project=PROJECT, network=name).execute())


def test_python_clients_batch_is_answered(localcloud: Localcloud) -> None:
    compute = _service(localcloud, "compute", "v1", "/compute/v1/")
    seen: list[tuple[str, int]] = []

    def remember(_request: str, answer: Any, error: Any) -> None:
        seen.append((answer["name"], 200) if error is None else ("", error.resp.status))

    batch = compute.new_batch_http_request(callback=remember)
    batch._batch_uri = f"{localcloud.url}/batch/compute/v1"  # the client does not derive it from its endpoint
    batch.add(compute.networks().get(project=PROJECT, network="default"))
    batch.add(compute.networks().get(project=PROJECT, network="none"))
    batch.execute()
    assert seen == [("default", 200), ("", 404)]


def test_python_client_manages_repositories_and_accounts(localcloud: Localcloud) -> None:
    accounts = _service(localcloud, "iam", "v1", "/iam/").projects().serviceAccounts()
    account = accounts.create(name=f"projects/{PROJECT}", body={"accountId": "py-robot"}).execute()
    client = _service(localcloud, "artifactregistry", "v1", "/artifactregistry/").projects().locations()
    repositories, parent = client.repositories(), f"projects/{PROJECT}/locations/{REGION}"
    create = repositories.create(parent=parent, repositoryId="py", body={"format": "DOCKER"})
    operation = create.execute()["name"]
    until(lambda: client.operations().get(name=operation).execute().get("done"), "the repository to be made")
    name = f"{parent}/repositories/py"
    policy = repositories.getIamPolicy(resource=name).execute()
    member = f"serviceAccount:{account['email']}"
    policy["bindings"] = [{"role": "roles/artifactregistry.reader", "members": [member]}]
    kept = repositories.setIamPolicy(resource=name, body={"policy": policy}).execute()
    assert kept["bindings"] == policy["bindings"]
    listed = repositories.list(parent=parent).execute()["repositories"]
    assert name in [repository["name"] for repository in listed]
    repositories.delete(name=name).execute()
    assert accounts.delete(name=account["name"]).execute() == {}


# A cluster.


def _cluster(cloud: Localcloud, name: str) -> dict[str, Any]:
    """Make a cluster through Google's Python client, and give what it is."""
    clusters = _service(cloud, "container", "v1", "/container/").projects().locations().clusters()
    parent = f"projects/{PROJECT}/locations/{ZONE}"
    clusters.create(parent=parent, body={"cluster": {"name": name, "initialNodeCount": 1}}).execute()

    def running() -> dict[str, Any] | None:
        body: dict[str, Any] = clusters.get(name=f"{parent}/clusters/{name}").execute()
        assert body["status"] in ("PROVISIONING", "RUNNING"), body.get("statusMessage")
        return body if body["status"] == "RUNNING" else None

    return until(running, "the cluster to run", timeout=120)


def test_cluster_takes_google_access_tokens_and_is_back_after_a_restart(
    fresh: Localcloud, tmp_path: Path
) -> None:
    fresh.command("start")
    body = _cluster(fresh, "c1")
    authority = tmp_path / "ca.crt"
    authority.write_bytes(base64.b64decode(body["masterAuth"]["clusterCaCertificate"]))

    def kubectl(token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        server = [f"--server=https://{body['endpoint']}", f"--certificate-authority={authority}"]
        command = ["kubectl", "--kubeconfig=/dev/null", *server, f"--token={token}", *arguments]
        return subprocess.run(
            command, env=fresh.outer, capture_output=True, text=True, check=False, timeout=60
        )

    user = kubectl(fresh.token, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}")
    assert user.stdout == f"developer@{PROJECT}.iam", user.stderr
    assert kubectl(fresh.token, "auth", "can-i", "*", "*").stdout.strip() == "yes"
    assert kubectl("nonsense", "get", "namespaces").returncode != 0
    kubectl(fresh.token, "create", "namespace", "kept")
    fresh.command("stop")
    assert marked(f"{fresh.home}#") == []
    fresh.command("start")
    assert "kept" in kubectl(fresh.token, "get", "namespaces").stdout
    path = f"/container/v1/projects/{PROJECT}/locations/{ZONE}/clusters/c1"
    assert fresh.request("GET", path).json()["endpoint"] == body["endpoint"]
    assert fresh.request("DELETE", path).json()["operationType"] == "DELETE_CLUSTER"
    until(lambda: fresh.request("GET", path).status_code == 404, "the cluster to be gone", timeout=90)
    assert marked(f"{fresh.home}#clusters") == []


# gcloud.


Gcloud = Callable[..., Any]


@pytest.fixture(scope="session")
def gcloud(localcloud: Localcloud, tmp_path_factory: pytest.TempPathFactory) -> Gcloud:
    """Runs gcloud against localcloud; gives its JSON, or with `fails` its error text."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    directory = tmp_path_factory.mktemp("gcloud")
    environment = localcloud.environment | {
        "CLOUDSDK_CONFIG": str(directory),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        "KUBECONFIG": str(directory / "kubeconfig"),
    }

    def run(*arguments: str, fails: bool = False) -> Any:
        answer = subprocess.run(
            ["gcloud", *arguments, "--format=json"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert (answer.returncode != 0) == fails, f"gcloud {' '.join(arguments)}\n{answer.stderr}"
        return answer.stderr if fails else json.loads(answer.stdout or "null")

    return run


def test_gcloud_manages_networks_firewalls_addresses_and_instances(gcloud: Gcloud) -> None:
    zone, region = f"--zone={ZONE}", f"--region={REGION}"
    gcloud("compute", "networks", "create", "g-net", "--subnet-mode=custom")
    gcloud(
        "compute", "networks", "subnets", "create", "g-sub", "--network=g-net", region, "--range=10.4.0.0/24"
    )
    gcloud("compute", "firewall-rules", "create", "g-fw", "--network=g-net", "--allow=tcp:80")
    gcloud("compute", "firewall-rules", "update", "g-fw", "--allow=tcp:81", "--priority=7")
    rule = gcloud("compute", "firewall-rules", "describe", "g-fw")
    assert (rule["priority"], rule["allowed"][0]["ports"]) == (7, ["81"])
    gcloud("compute", "addresses", "create", "g-ip", region)
    gcloud(
        *("compute", "instances", "create", "g-vm", zone, "--machine-type=e2-small", "--network=g-net"),
        *("--subnet=g-sub", "--address=g-ip", "--metadata=k=v"),
    )
    address = gcloud("compute", "addresses", "describe", "g-ip", region)
    machine = gcloud("compute", "instances", "describe", "g-vm", zone)
    assert (machine["status"], address["status"]) == ("RUNNING", "IN_USE")
    assert machine["networkInterfaces"][0]["accessConfigs"][0]["natIP"] == address["address"]
    assert "g-vm" in [item["name"] for item in gcloud("compute", "instances", "list")]
    assert "g-ip" in [item["name"] for item in gcloud("compute", "addresses", "list")]
    gcloud("compute", "instances", "add-metadata", "g-vm", zone, "--metadata=a=b")
    gcloud("compute", "instances", "add-tags", "g-vm", zone, "--tags=web")
    gcloud("compute", "instances", "add-labels", "g-vm", zone, "--labels=x=y")
    machine = gcloud("compute", "instances", "describe", "g-vm", zone)
    assert {item["key"]: item["value"] for item in machine["metadata"]["items"]} == {"k": "v", "a": "b"}
    assert (machine["tags"]["items"], machine["labels"]) == (["web"], {"x": "y"})
    gcloud("compute", "instances", "stop", "g-vm", zone)
    gcloud("compute", "instances", "set-machine-type", "g-vm", zone, "--machine-type=e2-medium")
    gcloud("compute", "instances", "start", "g-vm", zone)
    gcloud("compute", "instances", "update", "g-vm", zone, "--deletion-protection")
    machine = gcloud("compute", "instances", "describe", "g-vm", zone)
    assert machine["machineType"].endswith("/machineTypes/e2-medium")
    assert "protected against deletion" in gcloud("compute", "instances", "delete", "g-vm", zone, fails=True)
    gcloud("compute", "instances", "update", "g-vm", zone, "--no-deletion-protection")
    assert "already being used" in gcloud("compute", "networks", "delete", "g-net", fails=True)
    gcloud("compute", "instances", "delete", "g-vm", zone)
    gcloud("compute", "addresses", "delete", "g-ip", region)
    gcloud("compute", "firewall-rules", "delete", "g-fw")
    gcloud("compute", "networks", "subnets", "delete", "g-sub", region)
    gcloud("compute", "networks", "delete", "g-net")
    assert "was not found" in gcloud("compute", "networks", "describe", "g-net", fails=True)


def test_gcloud_manages_repositories_and_service_accounts(gcloud: Gcloud) -> None:
    location, email = f"--location={REGION}", f"g-robot@{PROJECT}.iam.gserviceaccount.com"
    gcloud("artifacts", "repositories", "create", "g-repo", "--repository-format=docker", location)
    gcloud("iam", "service-accounts", "create", "g-robot", "--display-name=Robot")
    assert gcloud("iam", "service-accounts", "describe", email)["displayName"] == "Robot"
    policy = gcloud(
        *("artifacts", "repositories", "add-iam-policy-binding", "g-repo", location),
        *(f"--member=serviceAccount:{email}", "--role=roles/artifactregistry.reader"),
    )
    assert policy["bindings"][0]["members"] == [f"serviceAccount:{email}"]
    assert "g-repo" in str(gcloud("artifacts", "repositories", "list", location))
    assert gcloud("artifacts", "packages", "list", "--repository=g-repo", location) == []
    assert [item["projectId"] for item in gcloud("projects", "list")] == [PROJECT]
    gcloud("artifacts", "repositories", "delete", "g-repo", location)
    gcloud("iam", "service-accounts", "delete", email)
    assert "NOT_FOUND" in gcloud("iam", "service-accounts", "describe", email, fails=True)


def test_gcloud_manages_clusters(gcloud: Gcloud) -> None:
    location = f"--location={ZONE}"
    gcloud("container", "clusters", "create", "g-c", location, "--num-nodes=1")
    listed = {item["name"]: item["status"] for item in gcloud("container", "clusters", "list")}
    assert listed["g-c"] == "RUNNING"
    gcloud("container", "clusters", "update", "g-c", location, "--update-labels=a=b")
    body = gcloud("container", "clusters", "describe", "g-c", location)
    assert body["resourceLabels"] == {"a": "b"}
    gcloud("container", "clusters", "resize", "g-c", location, "--num-nodes=2")
    assert gcloud("container", "clusters", "describe", "g-c", location)["currentNodeCount"] == 2
    gcloud("container", "clusters", "delete", "g-c", location)
    assert "Not found" in gcloud("container", "clusters", "describe", "g-c", location, fails=True)
