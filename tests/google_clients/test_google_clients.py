"""Google's own Python clients, the newer ones, over HTTP."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import google_crc32c
import proto
import pytest
import requests
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import BadRequest
from google.cloud import (
    artifactregistry_v1,
    artifactregistry_v1beta2,
    container_v1,
    container_v1beta1,
    kms_v1,
)
from google.oauth2.credentials import Credentials
from google.protobuf.field_mask_pb2 import FieldMask
from googleapiclient import discovery as old_client
from googleapiclient.errors import HttpError

from localcloud.api import enums
from localcloud.api.discovery import document
from tests.unit.localcloud_api.client import COMPUTE, LOCATION, REGION, TOKEN, Client, instance
from tests.waiting import until

ZONAL = "projects/localcloud-dev/locations/europe-west1-b"


def _options(server: str, service: str) -> dict[str, Any]:
    credentials = Credentials(token=TOKEN)  # type: ignore[no-untyped-call]
    options = ClientOptions(api_endpoint=f"{server}/{service}")
    return {"transport": "rest", "client_options": options, "credentials": credentials}


@pytest.mark.parametrize("version", [artifactregistry_v1, artifactregistry_v1beta2])
def test_artifact_registrys_client_manages_a_repository(server: str, version: Any) -> None:
    client = version.ArtifactRegistryClient(**_options(server, "artifactregistry"))
    repository = version.Repository(
        format_=version.Repository.Format.DOCKER, labels={"a": "b"}, description="d"
    )
    created = client.create_repository(parent=LOCATION, repository_id="app", repository=repository).result(60)
    assert created.format_ == version.Repository.Format.DOCKER
    assert [item.name for item in client.list_repositories(parent=LOCATION)] == [created.name]
    change = version.Repository(name=created.name, description="new")
    client.update_repository(repository=change, update_mask=FieldMask(paths=["description"]))
    got = client.get_repository(name=created.name)
    assert (got.description, dict(got.labels)) == ("new", {"a": "b"})
    client.delete_repository(name=created.name).result(60)
    assert not list(client.list_repositories(parent=LOCATION))


def test_kubernetes_engines_client_manages_a_cluster_and_its_pools(server: str) -> None:
    version = container_v1  # the only one that speaks REST
    client = version.ClusterManagerClient(**_options(server, "container"))
    channel = version.ReleaseChannel(channel=version.ReleaseChannel.Channel.STABLE)
    cluster = version.Cluster(name="c1", initial_node_count=1, release_channel=channel)
    operation = client.create_cluster(parent=ZONAL, cluster=cluster)
    assert operation.operation_type == version.Operation.Type.CREATE_CLUSTER

    def state() -> Any:
        return client.get_cluster(name=f"{ZONAL}/clusters/c1")

    until(lambda: state().status == version.Cluster.Status.RUNNING, "the cluster to run")
    assert state().release_channel.channel == version.ReleaseChannel.Channel.STABLE
    pool = f"{ZONAL}/clusters/c1/nodePools/default-pool"
    request = version.SetNodePoolSizeRequest(name=pool, node_count=2)
    operation = client.set_node_pool_size(request=request)
    assert operation.operation_type == version.Operation.Type.SET_NODE_POOL_SIZE
    until(lambda: state().current_node_count == 2, "the pool to grow")
    strategy = version.NodePoolUpdateStrategy.BLUE_GREEN
    change = version.UpdateNodePoolRequest(
        name=pool, upgrade_settings=version.NodePool.UpgradeSettings(strategy=strategy)
    )
    client.update_node_pool(request=change)
    until(
        lambda: client.get_node_pool(name=pool).upgrade_settings.strategy == strategy,
        "the strategy to change",
    )


def test_cloud_kms_client_makes_a_key_signs_with_it_and_is_told_that_it_is_disabled(server: str) -> None:
    client = kms_v1.KeyManagementServiceClient(**_options(server, "cloudkms"))
    ring = client.create_key_ring(parent=LOCATION, key_ring_id="signing", key_ring=kms_v1.KeyRing())
    algorithm = kms_v1.CryptoKeyVersion.CryptoKeyVersionAlgorithm.EC_SIGN_P256_SHA256
    key = client.create_crypto_key(
        parent=ring.name,
        crypto_key_id="app",
        crypto_key=kms_v1.CryptoKey(
            purpose=kms_v1.CryptoKey.CryptoKeyPurpose.ASYMMETRIC_SIGN,
            version_template=kms_v1.CryptoKeyVersionTemplate(algorithm=algorithm),
        ),
    )
    assert key.purpose == kms_v1.CryptoKey.CryptoKeyPurpose.ASYMMETRIC_SIGN
    (version,) = client.list_crypto_key_versions(parent=key.name)
    public = client.get_public_key(name=version.name)
    assert (public.algorithm, public.pem_crc32c) == (algorithm, google_crc32c.value(public.pem.encode()))
    digest = hashlib.sha256(b"message").digest()
    request = kms_v1.AsymmetricSignRequest(
        name=version.name, digest=kms_v1.Digest(sha256=digest), digest_crc32c=google_crc32c.value(digest)
    )
    signed = client.asymmetric_sign(request=request)
    assert signed.verified_digest_crc32c
    assert (signed.name, signed.signature_crc32c) == (version.name, google_crc32c.value(signed.signature))
    verifier = serialization.load_pem_public_key(public.pem.encode())
    assert isinstance(verifier, ec.EllipticCurvePublicKey)
    verifier.verify(signed.signature, b"message", ec.ECDSA(hashes.SHA256()))
    state = kms_v1.CryptoKeyVersion.CryptoKeyVersionState.DISABLED
    change = kms_v1.CryptoKeyVersion(name=version.name, state=state)
    client.update_crypto_key_version(crypto_key_version=change, update_mask=FieldMask(paths=["state"]))
    with pytest.raises(BadRequest, match="current state is: DISABLED"):
        client.asymmetric_sign(request=request)


def _messages(module: Any) -> Iterator[Any]:
    """Every message of a client's package, by its descriptor."""
    for name in dir(module.types):
        kind = getattr(module.types, name)
        if isinstance(kind, proto.message.MessageMeta):
            waiting = [kind.pb().DESCRIPTOR]
            while waiting:
                descriptor = waiting.pop()
                yield descriptor
                waiting += descriptor.nested_types


@pytest.mark.parametrize(
    "module", [container_v1, container_v1beta1, artifactregistry_v1, artifactregistry_v1beta2, kms_v1]
)
def test_numbers_of_enums_are_those_of_googles_protocol_buffers(module: Any) -> None:
    _, _, package = module.__name__.rpartition(".")
    name, _, version = package.partition("_")
    name = {"kms": "cloudkms"}.get(name, name)
    known = {descriptor.name: descriptor for descriptor in _messages(module)}
    compared = 0
    for schema, content in document(name, version).schemas.items():
        descriptor = known.get(schema.removeprefix("GoogleDevtoolsArtifactregistryV1"))
        for field, described in content.get("properties", {}).items():
            values = described if "enum" in described else described.get("items", {})
            found = [item for item in descriptor.fields if item.json_name == field] if descriptor else []
            if "enum" not in values or not found or found[0].enum_type is None:
                continue
            for value in found[0].enum_type.values:
                if value.name in values["enum"]:
                    assert enums.number(values, value.name) == value.number, (schema, field, value.name)
                    assert enums.name(values, value.number) == value.name
                    compared += 1
    assert compared > 20


def test_answers_have_numbers_where_the_client_asks_for_them(client: Client) -> None:
    path = f"/artifactregistry/v1/{LOCATION}/repositories"
    created = client.ok(
        "POST", path, {"format": 1}, query="repositoryId=app&%24alt=json%3Benum-encoding%3Dint"
    )
    client.done_registry(created)
    named = client.ok("GET", f"{path}/app")
    assert named["format"] == "DOCKER"
    status, numbered = client.send("GET", f"{path}/app", query="%24alt=json%3Benum-encoding%3Dint")
    assert (status, numbered["format"], numbered["mode"]) == (200, 1, 1)
    assert {key for key in named if named[key] != numbered[key]} == {
        "format",
        "mode",
        "vulnerabilityScanningConfig",
    }
    client.error(400, "GET", f"{path}/app", query="alt=json;enum-encoding=names")
    client.error(400, "GET", f"{path}/app", query="alt=xml")
    client.error(501, "GET", f"{path}/app", query="%24alt=proto")
    client.error(400, "POST", path, {"format": 99}, query="repositoryId=two")
    network = {"name": "n", "networkFirewallPolicyEnforcementOrder": 1}
    client.error(400, "POST", f"{COMPUTE}/global/networks", network)
    listed = client.ok("GET", f"{COMPUTE}/zones", query="alt=json;enum-encoding=int")
    assert listed["items"][0]["status"] == "UP"


def test_compute_engines_client_gives_an_instance_other_alias_ranges(server: str) -> None:
    compute = old_client.build(
        "compute",
        "v1",
        credentials=Credentials(token=TOKEN),  # type: ignore[no-untyped-call]
        client_options={"api_endpoint": f"{server}/compute/v1/"},
        static_discovery=True,
    )
    zone = {"project": "localcloud-dev", "zone": "europe-west1-b"}

    def done(operation: Any) -> None:
        ended = compute.zoneOperations().wait(operation=operation["name"], **zone).execute()
        assert "error" not in ended, ended

    def interface() -> Any:
        return compute.instances().get(instance="vm", **zone).execute()["networkInterfaces"][0]

    network = {"network": "global/networks/default", "aliasIpRanges": [{"ipCidrRange": "/28"}]}
    done(compute.instances().insert(body=instance(networkInterfaces=[network]), **zone).execute())
    given = interface()
    (one,) = given["aliasIpRanges"]
    assert one["ipCidrRange"].endswith("/28")
    body = {"aliasIpRanges": [one, {"ipCidrRange": "/32"}], "fingerprint": given["fingerprint"]}
    change = compute.instances().updateNetworkInterface(
        instance="vm", networkInterface=given["name"], body=body, **zone
    )
    done(change.execute())
    assert [alias["ipCidrRange"].partition("/")[2] for alias in interface()["aliasIpRanges"]] == ["28", "32"]
    with pytest.raises(HttpError, match="fingerprint"):
        change.execute()


# What older clients do to a request.


def _send(server: str, verb: str, path: str, content: bytes, **headers: str) -> requests.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(
        verb, server + path, data=content, headers={"Authorization": f"Bearer {TOKEN}"} | names, timeout=30
    )


def test_compressed_bodies_are_read(server: str) -> None:
    content = json.dumps({"name": "ip"}).encode()
    answer = _send(server, "POST", f"{REGION}/addresses", gzip.compress(content), Content_Encoding="gzip")
    assert answer.status_code == 200, answer.text
    for body, encoding in (
        (content, "gzip"),
        (gzip.compress(content)[:-9], "gzip"),
        (content, "br"),
    ):
        answer = _send(server, "POST", f"{REGION}/addresses", body, Content_Encoding=encoding)
        assert answer.status_code == 400, answer.text
    bomb = gzip.compress(b" " * 2**24)
    answer = _send(server, "POST", f"{REGION}/addresses", bomb, Content_Encoding="gzip")
    assert answer.status_code == 413, answer.text


def test_the_method_that_a_post_stands_for_is_taken(server: str) -> None:
    path = f"{COMPUTE}/global/networks"
    answer = _send(server, "POST", path, b'{"name": "never"}', X_HTTP_Method_Override="GET")
    assert [item["name"] for item in answer.json()["items"]] == ["default"]
    network = b'{"description": "x", "name": "never"}'
    assert _send(server, "POST", f"{path}/none", network, X_HTTP_Method_Override="PATCH").status_code == 404
    assert _send(server, "POST", f"{path}/none", b"", X_HTTP_Method_Override="DELETE").status_code == 404
    assert _send(server, "POST", path, network, X_HTTP_Method_Override="BREW").status_code == 400
    # Of another method's request it is no part.
    assert _send(server, "GET", path, b"", X_HTTP_Method_Override="DELETE").status_code == 200


def test_a_query_that_is_too_long_for_a_url_is_in_the_body(server: str) -> None:
    compute = old_client.build(
        "compute",
        "v1",
        credentials=Credentials(token=TOKEN),  # type: ignore[no-untyped-call]
        client_options={"api_endpoint": f"{server}/compute/v1/"},
        static_discovery=True,
    )
    expression = " OR ".join(f"(name = n{number})" for number in range(300)) + " OR (name = default)"
    listed = compute.networks().list(project="localcloud-dev", filter=expression).execute()
    assert [item["name"] for item in listed["items"]] == ["default"]


def test_a_mask_may_be_in_a_header(server: str) -> None:
    answer = _send(server, "GET", f"{COMPUTE}/global/networks", b"", X_Goog_FieldMask="items.name")
    assert answer.status_code == 400
    answer = _send(server, "GET", f"{COMPUTE}/global/networks", b"", X_Goog_FieldMask="items/name")
    assert answer.json() == {"items": [{"name": "default"}]}
