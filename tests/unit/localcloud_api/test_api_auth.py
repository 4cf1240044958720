"""Who may call what: the API, the registry's tokens, the clusters' webhook."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from starlette.testclient import TestClient

from localcloud.api.server import application
from localcloud.home import Home
from localcloud.tokens import mint_access_token, registry_auth, webhook_url
from tests.unit.localcloud_api.client import ACCOUNTS, COMPUTE, REPOSITORIES, TOKEN, Client

ROBOT = "robot1@localcloud-dev.iam.gserviceaccount.com"


@pytest.fixture
def repository(client: Client) -> str:
    """A repository `app` that the service account ROBOT may read; gives its path."""
    client.ok("POST", ACCOUNTS, {"accountId": "robot1"})
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    bindings = [{"role": "roles/artifactregistry.reader", "members": [f"serviceAccount:{ROBOT}"]}]
    client.ok("POST", f"{REPOSITORIES}/app:setIamPolicy", {"policy": {"bindings": bindings}})
    return f"{REPOSITORIES}/app"


@pytest.fixture
def http(client: Client) -> TestClient:
    return TestClient(application(client.api))


def _claims(token: str, home: Home) -> dict[str, Any]:
    """A registry token's claims, once its signature is checked with the JWKS that the registry is given."""
    key = json.loads(registry_auth(home).jwks_path.read_text())["keys"][0]
    x, y = (int.from_bytes(_decode(key[name]), "big") for name in ("x", "y"))
    public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    signed, _, signature = token.rpartition(".")
    raw = _decode(signature)
    der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    public.verify(der, signed.encode(), ec.ECDSA(hashes.SHA256()))
    assert json.loads(_decode(signed.split(".")[0]))["kid"] == key["kid"]
    claims: dict[str, Any] = json.loads(_decode(signed.split(".")[1]))
    return claims


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _basic(token: str, user: str = "oauth2accesstoken") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()}


def test_request_without_or_with_a_wrong_token_is_401(client: Client, http: TestClient) -> None:
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Basic {TOKEN}"}):
        reply = http.get(f"{COMPUTE}/global/networks", headers=headers)
        assert reply.status_code == 401
        error = reply.json()["error"]
        assert error["status"] == "UNAUTHENTICATED"
        assert "Expected OAuth 2 access token" in error["message"]
        assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    assert client.send("GET", f"{COMPUTE}/global/networks")[0] == 200


def test_service_account_may_do_only_what_a_policy_grants(
    client: Client, repository: str, home: Home
) -> None:
    token = mint_access_token(home, ROBOT, []).value
    assert client.send("GET", repository, token=token)[0] == 200
    assert client.send("DELETE", repository, token=token)[0] == 403
    status, body = client.send("GET", f"{COMPUTE}/global/networks", token=token)
    assert status == 403
    assert (
        body["error"]["message"]
        == "Required 'compute.networks.list' permission for 'projects/localcloud-dev'"
    )
    asked = [f"artifactregistry.repositories.{name}" for name in ("downloadArtifacts", "uploadArtifacts")]
    status, body = client.send(
        "POST", f"{repository}:testIamPermissions", {"permissions": asked}, token=token
    )
    assert body == {"permissions": asked[:1]}


def test_token_ends_with_its_time_its_account_or_a_changed_byte(
    client: Client, repository: str, home: Home
) -> None:
    good = mint_access_token(home, ROBOT, []).value
    assert (
        client.send("GET", repository, token=mint_access_token(home, ROBOT, [], lifetime=-1).value)[0] == 401
    )
    for wrong in (good[:-4] + "AAAA", good[:-1] + "é", "ya29.lc-", "é"):
        assert client.send("GET", repository, token=wrong)[0] == 401
    client.ok("POST", f"{ACCOUNTS}/{ROBOT}:disable", {})
    assert client.send("GET", repository, token=good)[0] == 401
    client.ok("POST", f"{ACCOUNTS}/{ROBOT}:enable", {})
    assert client.send("GET", repository, token=good)[0] == 200
    client.ok("DELETE", f"{ACCOUNTS}/{ROBOT}")
    assert client.send("GET", repository, token=good)[0] == 401


@pytest.mark.usefixtures("repository")
def test_registry_token_carries_what_the_policy_grants(http: TestClient, home: Home) -> None:
    scope = "repository:localcloud-dev/app/web:pull,push"
    reply = http.get(
        "/v2/token", params={"service": "localcloud-registry", "scope": scope}, headers=_basic(TOKEN)
    )
    claims = _claims(reply.json()["token"], home)
    assert claims["access"] == [
        {"type": "repository", "name": "localcloud-dev/app/web", "actions": ["pull", "push"]}
    ]
    assert (claims["iss"], claims["aud"]) == ("localcloud", "localcloud-registry")
    robot = _basic(mint_access_token(home, ROBOT, []).value)
    claims = _claims(http.get("/v2/token", params={"scope": scope}, headers=robot).json()["token"], home)
    assert claims["access"][0]["actions"] == ["pull"]


@pytest.mark.usefixtures("repository")
def test_registry_token_is_denied_where_nothing_is_granted(http: TestClient, home: Home) -> None:
    robot = _basic(mint_access_token(home, ROBOT, []).value)
    for scope, headers in (
        ("repository:localcloud-dev/other/web:pull,push", _basic(TOKEN)),
        ("repository:other/app/web:pull", _basic(TOKEN)),
        ("repository:localcloud-dev/app/web:push", robot),
        ("repository:localcloud-dev/apple/web:pull", robot),
    ):
        reply = http.get("/v2/token", params={"scope": scope}, headers=headers)
        assert reply.status_code == 403
        assert reply.json()["errors"][0]["code"] == "DENIED"
        assert "(or it may not exist)" in reply.json()["errors"][0]["message"]
    assert http.get("/v2/token", params={"scope": "repository:localcloud-dev/app/x:pull"}).status_code == 401
    assert http.get("/v2/token", headers=_basic("nonsense")).status_code == 401
    assert http.get("/v2/token", headers=_basic(TOKEN, user="me")).status_code == 401


@pytest.mark.usefixtures("repository")
def test_several_scopes_are_granted_one_by_one_and_the_oauth2_form_works_too(
    http: TestClient, home: Home
) -> None:
    scopes = ["repository:localcloud-dev/app/a:pull", "repository:localcloud-dev/none/b:pull"]
    form = {
        "grant_type": "password",
        "username": "oauth2accesstoken",
        "password": TOKEN,
        "scope": " ".join(scopes),
    }
    reply = http.post("/v2/token", data=form | {"service": "localcloud-registry"})
    names = [item["name"] for item in _claims(reply.json()["access_token"], home)["access"]]
    assert names == ["localcloud-dev/app/a"]


def test_everyone_may_pull_from_a_public_repository(
    client: Client, repository: str, http: TestClient
) -> None:
    bindings = [{"role": "roles/artifactregistry.reader", "members": ["allUsers"]}]
    client.ok("POST", f"{repository}:setIamPolicy", {"policy": {"bindings": bindings}})
    assert http.get("/v2/token", params={"scope": "repository:localcloud-dev/app/x:pull"}).status_code == 200


@pytest.mark.usefixtures("repository")
def test_webhook_knows_the_developer_and_service_accounts_and_nobody_else(
    http: TestClient, home: Home
) -> None:
    path = webhook_url(home).removeprefix("http://127.0.0.1:1234")

    def review(token: str) -> dict[str, Any]:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        status: dict[str, Any] = http.post(path, json=body).json()["status"]
        return status

    assert review(TOKEN)["user"]["username"] == "developer@localcloud-dev.iam"
    email = "https://www.googleapis.com/auth/userinfo.email"
    robot = review(mint_access_token(home, ROBOT, [email]).value)["user"]
    assert robot["username"] == ROBOT
    unnamed = review(mint_access_token(home, ROBOT, ["https://www.googleapis.com/auth/cloud-platform"]).value)
    assert unnamed["user"] == {"username": robot["uid"], "uid": robot["uid"]}, "as on GKE: a number"
    assert review("nonsense") == {"authenticated": False}
    assert review("") == {"authenticated": False}
    assert http.post(f"/kubernetes/tokenreview/{'0' * 64}", json={}).status_code == 404
    assert http.post(path, json={"kind": "Pod"}).status_code == 400


def test_batch_answers_each_part_by_its_own(http: TestClient) -> None:
    parts = "".join(
        f"--b\r\nContent-Type: application/http\r\nContent-ID: <{index}>\r\n\r\n"
        f"GET {path} HTTP/1.1\r\n\r\n\r\n"
        for index, path in enumerate(
            [f"{COMPUTE}/global/networks/default", f"{COMPUTE}/global/networks/none"]
        )
    )
    headers = {"Content-Type": "multipart/mixed; boundary=b", "Authorization": f"Bearer {TOKEN}"}
    reply = http.post("/batch/compute/v1", content=f"{parts}--b--\r\n", headers=headers)
    assert reply.headers["Content-Type"].startswith("multipart/mixed; boundary=")
    assert "<response-0>" in reply.text
    assert "HTTP/1.1 200 OK" in reply.text
    assert "HTTP/1.1 404" in reply.text


def test_a_project_s_policy_grants_for_all_its_repositories_until_it_is_taken_back(
    client: Client, home: Home
) -> None:
    project = "/cloudresourcemanager/v1/projects/localcloud-dev"
    client.ok("POST", ACCOUNTS, {"accountId": "robot1"})
    client.done_registry(client.ok("POST", REPOSITORIES, {"format": "DOCKER"}, query="repositoryId=app"))
    before = client.ok("POST", f"{project}:getIamPolicy", {})
    robot = mint_access_token(home, ROBOT, []).value
    for role, status in (
        ("roles/container.defaultNodeServiceAccount", 403),
        ("roles/artifactregistry.reader", 200),
    ):
        bindings = [*before["bindings"], {"role": role, "members": [f"serviceAccount:{ROBOT}"]}]
        client.ok("POST", f"{project}:setIamPolicy", {"policy": {"bindings": bindings}})
        assert client.send("GET", f"{REPOSITORIES}/app", token=robot)[0] == status
        assert client.send("POST", f"{project}:setIamPolicy", b"{}", token=robot)[0] == 403
    client.ok("POST", f"{project}:setIamPolicy", {"policy": {"bindings": before["bindings"]}})
    assert client.send("GET", f"{REPOSITORIES}/app", token=robot)[0] == 403
    assert client.ok("POST", f"{project}:getIamPolicy", {}) == before
