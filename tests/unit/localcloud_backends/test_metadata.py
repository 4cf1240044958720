"""The metadata server's paths, forms and rules."""

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt

from localcloud.backends.metadata import Answer, Metadata, MetadataServer, answer
from localcloud.home import Config, Home
from localcloud.identity import certificates
from localcloud.specs import InstanceSpec
from localcloud.store import Record, Store, instance_key
from localcloud.tokens import read_access_token

GOOGLE = {"Metadata-Flavor": "Google"}
V1 = "/computeMetadata/v1"
SPEC = InstanceSpec(
    "vm-1",
    "proj",
    "europe-west1-b",
    "4711",
    "127.0.0.1",
    "vm-1.c.proj.internal",
    "sa@proj.iam.gserviceaccount.com",
    ("https://www.googleapis.com/auth/cloud-platform", "https://www.googleapis.com/auth/userinfo.email"),
    {"at-start": "1"},
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.save(Config(port=1, token="t"))
    return home


@pytest.fixture
def store(home: Home) -> Store:
    store = Store(home.store_path)
    write_attributes(store, {"a-key": "value", "b": "two\nlines"})
    return store


def write_attributes(store: Store, attributes: dict[str, str]) -> None:
    items = [{"key": key, "value": value} for key, value in attributes.items()]
    body = {"name": "vm-1", "metadata": {"items": items}, "tags": {"items": ["web", "wasm"]}}
    store.put(Record(instance_key(SPEC.project, SPEC.zone, SPEC.name), "compute.instances", body))


@pytest.fixture
def metadata(home: Home, store: Store) -> Metadata:
    del store  # it has to be there
    return Metadata(home, SPEC)


def get(metadata: Metadata, path: str, **query: str) -> Answer:
    return answer(metadata.tree(), f"{V1}/{path}", {key: [value] for key, value in query.items()})


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("instance/name", "vm-1"),
        ("instance/hostname", "vm-1.c.proj.internal"),
        ("instance/id", "4711"),
        ("instance/attributes/a-key", "value"),
        ("instance/attributes/b", "two\nlines"),
        ("instance/network-interfaces/0/ip", "127.0.0.1"),
        ("instance/network-interfaces/0/access-configs/0/external-ip", "127.0.0.1"),
        ("instance/service-accounts/default/email", SPEC.service_account_email),
        ("instance/service-accounts/default/scopes", "".join(f"{scope}\n" for scope in SPEC.scopes)),
        (f"instance/service-accounts/{SPEC.service_account_email}/aliases", "default\n"),
        ("instance/tags", '["web", "wasm"]'),
        ("project/project-id", "proj"),
    ],
)
def test_a_value_is_plain_text(metadata: Metadata, path: str, text: str) -> None:
    assert get(metadata, path) == Answer(200, text)


def test_the_zone_is_a_path_with_the_projects_number(metadata: Metadata) -> None:
    kind, number, _, zone = get(metadata, "instance/zone").body.split("/")
    assert (kind, zone) == ("projects", "europe-west1-b")
    assert number == get(metadata, "project/numeric-project-id").body


def test_a_directory_lists_its_entries_and_marks_directories(metadata: Metadata) -> None:
    assert get(metadata, "").body == "instance/\nproject/\nuniverse/\n"
    assert get(metadata, "instance/attributes/").body == "a-key\nb\n"
    assert get(metadata, "instance/network-interfaces/").body == "0/\n"
    assert "token\n" in get(metadata, "instance/service-accounts/default/").body


def test_alias_ranges_are_numbered_and_those_that_the_instance_has_now(
    store: Store, metadata: Metadata
) -> None:
    place = "instance/network-interfaces/0/"
    assert get(metadata, f"{place}ip-aliases/").body == ""
    assert get(metadata, f"{place}ip-aliases/0").status == 404
    assert json.loads(get(metadata, place, recursive="true").body)["ipAliases"] == []
    record = store.get(instance_key(SPEC.project, SPEC.zone, SPEC.name))
    assert record is not None
    ranges = [{"ipCidrRange": "10.4.0.0/24", "subnetworkRangeName": "pods"}, {"ipCidrRange": "10.1.0.8/32"}]
    record.body["networkInterfaces"] = [{"aliasIpRanges": ranges}]
    store.put(record)
    assert "ip-aliases/" in get(metadata, place).body.splitlines()
    assert get(metadata, f"{place}ip-aliases/").body == "0\n1\n"
    assert get(metadata, f"{place}ip-aliases").status == 301
    assert get(metadata, f"{place}ip-aliases/1") == Answer(200, "10.1.0.8/32")
    found = json.loads(get(metadata, place, recursive="true").body)
    assert found["ipAliases"] == ["10.4.0.0/24", "10.1.0.8/32"]
    assert found["forwardedIps"] == []
    assert "ip-aliases/0 10.4.0.0/24\n" in get(metadata, place, recursive="true", alt="text").body


def test_a_directory_without_its_slash_is_redirected(metadata: Metadata) -> None:
    reply = get(metadata, "instance/attributes")
    assert (reply.status, reply.location) == (301, f"{V1}/instance/attributes/")


def test_a_recursive_answer_is_json_in_camel_case_and_holds_no_token(metadata: Metadata) -> None:
    reply = get(metadata, "", recursive="true")
    found = json.loads(reply.body)
    assert reply.content_type == "application/json"
    assert found["instance"]["attributes"] == {"a-key": "value", "b": "two\nlines"}
    assert found["instance"]["networkInterfaces"][0]["accessConfigs"][0]["externalIp"] == "127.0.0.1"
    assert found["instance"]["serviceAccounts"]["default"] == {
        "aliases": ["default"],
        "email": SPEC.service_account_email,
        "scopes": list(SPEC.scopes),
    }
    assert found["project"]["projectId"] == "proj"


def test_a_recursive_answer_can_be_text(metadata: Metadata) -> None:
    assert get(metadata, "instance/tags", alt="json").body == '["web", "wasm"]'
    assert "access-configs/0/external-ip 127.0.0.1\n" in (
        get(metadata, "instance/network-interfaces/0/", recursive="true", alt="text").body
    )


@pytest.mark.parametrize(
    "path", ["nope", "instance/attributes/nope", "instance/name/more", "instance/disks/7/"]
)
def test_what_is_not_there_is_404(metadata: Metadata, path: str) -> None:
    assert get(metadata, path).status == 404


def test_the_token_is_the_service_accounts_and_is_kept(metadata: Metadata, home: Home) -> None:
    first, second = (get(metadata, "instance/service-accounts/default/token") for _ in range(2))
    found = json.loads(first.body)
    token = read_access_token(home, found["access_token"])
    assert token is not None
    assert (token.email, token.scopes) == (SPEC.service_account_email, SPEC.scopes)
    assert found["token_type"] == "Bearer"
    assert 0 < found["expires_in"] <= 3600
    assert json.loads(second.body)["access_token"] == found["access_token"]


def test_an_instance_without_an_account_has_none(home: Home, store: Store) -> None:
    del store
    bare = Metadata(home, InstanceSpec("vm-1", "proj", "europe-west1-b", "1", "127.0.0.1", "h"))
    assert get(bare, "instance/service-accounts/").body == ""
    assert get(bare, "instance/service-accounts/default/token").status == 404


def test_without_a_record_the_attributes_are_those_of_the_start(home: Home) -> None:
    assert get(Metadata(home, SPEC), "instance/attributes/at-start").body == "1"


@pytest.fixture
def server(metadata: Metadata) -> Iterator[MetadataServer]:
    with MetadataServer(("127.0.0.1", 0), metadata, lambda _: True) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(
    server: MetadataServer, path: str, headers: dict[str, str], method: str = "GET"
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    try:
        connection.request(method, path, headers=headers)
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read().decode()
    finally:
        connection.close()


def test_every_answer_carries_the_header_that_a_request_must_carry(server: MetadataServer) -> None:
    for path, headers, status in (
        (f"{V1}/instance/name", GOOGLE, 200),
        (f"{V1}/instance/name", {}, 403),
        (f"{V1}/instance/name", {"Metadata-Flavor": "google"}, 403),
        (f"{V1}/instance/name", GOOGLE | {"X-Forwarded-For": "10.0.0.1"}, 403),
        (f"{V1}/nope", GOOGLE, 404),
        ("/", {}, 200),
    ):
        found, answered, _ = fetch(server, path, headers)
        assert (found, answered["Metadata-Flavor"]) == (status, "Google")
        assert answered["Server"] == "Metadata Server for VM"


def test_a_change_in_the_store_is_seen_at_the_next_request(server: MetadataServer, store: Store) -> None:
    write_attributes(store, {"a-key": "new"})
    assert fetch(server, f"{V1}/instance/attributes/a-key", GOOGLE)[2] == "new"


def test_a_request_can_wait_for_a_change(server: MetadataServer, store: Store) -> None:
    path = f"{V1}/instance/attributes/a-key"
    etag = fetch(server, path, GOOGLE)[1]["ETag"]
    timer = threading.Timer(0.3, write_attributes, (store, {"a-key": "changed"}))
    timer.start()
    began = time.monotonic()
    status, headers, body = fetch(
        server, f"{path}?wait_for_change=true&last_etag={etag}&timeout_sec=20", GOOGLE
    )
    timer.join()
    assert (status, body) == (200, "changed")
    assert headers["ETag"] != etag
    assert 0.2 < time.monotonic() - began < 10


def test_a_wait_ends_at_its_timeout_and_at_once_with_an_old_etag(server: MetadataServer) -> None:
    path = f"{V1}/instance/attributes/a-key"
    assert fetch(server, f"{path}?wait_for_change=true&timeout_sec=0", GOOGLE)[2] == "value"
    assert fetch(server, f"{path}?wait_for_change=true&last_etag=0", GOOGLE)[2] == "value"
    assert fetch(server, f"{path}?wait_for_change=true&timeout_sec=soon", GOOGLE)[0] == 400


def test_other_methods_are_refused(server: MetadataServer) -> None:
    assert fetch(server, f"{V1}/instance/name", GOOGLE, "POST")[0] >= 400


def test_a_path_that_is_none_is_refused(server: MetadataServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=30) as connection:
        connection.sendall(b"GET http://[ HTTP/1.0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("form", ["standard", "full"])
def test_an_identity_token_is_for_its_audience_and_checked_by_googles_library(
    metadata: Metadata, home: Home, form: str
) -> None:
    path = f"instance/service-accounts/{SPEC.service_account_email}/identity"
    reply = get(metadata, path, audience="https://example.com", format=form)
    assert reply.status == 200
    assert jwt.decode_header(reply.body)["alg"] == "RS256"  # type: ignore[no-untyped-call]
    (key,) = certificates(home)["keys"]
    numbers = [int.from_bytes(base64.urlsafe_b64decode(key[name] + "=="), "big") for name in ("e", "n")]
    public = rsa.RSAPublicNumbers(*numbers).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    claims = jwt.decode(reply.body, certs=pem, audience="https://example.com")  # type: ignore[no-untyped-call]
    assert (claims["iss"], claims["email"]) == ("https://accounts.google.com", SPEC.service_account_email)
    assert 3500 < claims["exp"] - time.time() <= 3600
    if form == "full":
        assert claims["google"]["compute_engine"]["instance_name"] == "vm-1"
    else:
        assert "google" not in claims


def test_an_identity_token_needs_an_audience_and_is_in_no_recursive_answer(metadata: Metadata) -> None:
    path = "instance/service-accounts/default/identity"
    assert get(metadata, path).status == 400
    assert "non-empty audience parameter required" in get(metadata, path).body
    assert get(metadata, path, audience="a", format="short").status == 400
    assert "identity" not in get(metadata, "", recursive="true").body
    assert "identity\n" in get(metadata, "instance/service-accounts/default/").body


def test_the_universe_is_googles(metadata: Metadata) -> None:
    assert get(metadata, "universe/universe-domain").body == "googleapis.com"
