"""Checks a running stack from outside: node, pods, artifacts, signatures, answers; by its outputs alone.

What the app should answer is computed here, the manifest is asked for with a plain HTTP client, and the
signature is checked with a general cryptography library: none of the program's own code is used.
"""

import argparse
import base64
import hashlib
import ipaddress
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes
import requests
import urllib3.exceptions
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 15
POLL_SECONDS = 1.0
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
SIGNATURE_ANNOTATION = "dev.cosignproject.cosign/signature"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
ATTESTED = {"https://slsa.dev/provenance/v1", "https://cyclonedx.org/bom"}
SIGNED = "https://sigstore.dev/cosign/sign/v1"
OUTPUTS = ("urls", "image", "images", "public_key", "kubeconfig", "nodes", "namespace", "wasm_bytes")
PRIMORIALS = (1, 2, 30, 97, 1000)
FACTORED = (1, 2, 360, 6469693230, 2**61 - 1, 18446744073709551557, 2**64 - 1)
REFUSED = (
    "/primorial/abc",
    "/primorial/-1",
    "/primorial/99999999999999999999",
    "/factor/0x10",
    "/factor/-5",
    "/factor/18446744073709551616",
)


class VerifyError(Exception):
    """What was found where something else should be."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    What was looked at, whether it is as it should be, what was seen, seconds taken.
    """

    name: str
    passed: bool
    detail: str
    seconds: float


def expect(condition: bool, message: str) -> None:
    """Raise VerifyError with the message unless the condition holds."""
    if not condition:
        raise VerifyError(message)


def primes_up_to(n: int) -> list[int]:
    """List the primes up to and including n, by trial division."""
    found: list[int] = []
    for candidate in range(2, n + 1):
        if all(candidate % prime for prime in found if prime * prime <= candidate):
            found.append(candidate)
    return found


def primorial(n: int) -> int:
    """Multiply the primes up to n; the empty product is 1."""
    product = 1
    for prime in primes_up_to(n):
        product *= prime
    return product


def is_prime(n: int) -> bool:
    """Say whether n is prime: Miller-Rabin with bases that are proven to decide up to 2**64."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2 or n in bases:
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        power = pow(base, odd, n)
        if power in (1, n - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % n
            if power == n - 1:
                break
        else:
            return False
    return True


class Registry:
    """A plain client for one image, REPOSITORY@DIGEST."""

    def __init__(self, image: str) -> None:
        repository, _, self.digest = image.partition("@")
        self.host, _, self.name = repository.partition("/")
        self._session = requests.Session()
        self._authenticate()

    @property
    def base(self) -> str:
        """Give the URL of the repository; a registry on this machine speaks plain http."""
        host = self.host.rsplit(":", 1)[0].strip("[]")
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = host == "localhost"
        return f"{'http' if local else 'https'}://{self.host}/v2/{self.name}"

    def _authenticate(self) -> None:
        answer = self._session.get(f"{self.base}/manifests/{self.digest}", timeout=TIMEOUT)
        challenge = answer.headers.get("WWW-Authenticate", "")
        if answer.status_code != 401 or not challenge.lower().startswith("bearer "):
            return
        asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        realm = asked.pop("realm")
        token = requests.get(realm, params=asked, auth=("oauth2accesstoken", access_token()), timeout=TIMEOUT)
        expect(token.ok, f"the registry gives no token: {token.status_code} {token.text[:200]}")
        body = token.json()
        self._session.headers["Authorization"] = f"Bearer {body.get('token') or body['access_token']}"

    def manifest(self, reference: str) -> bytes:
        """Read a manifest's bytes."""
        return self._read(f"manifests/{reference}", MANIFEST)

    def referrers(self) -> list[dict[str, Any]]:
        """List what refers to the image: by the registry, else by the index at its tag."""
        accept = {"Accept": INDEX}
        answer = self._session.get(f"{self.base}/referrers/{self.digest}", headers=accept, timeout=TIMEOUT)
        listed = answer.ok and answer.headers.get("Content-Type", "").startswith(INDEX)
        body = answer.content if listed else self._read(f"manifests/{self.digest.replace(':', '-')}", INDEX)
        found: list[dict[str, Any]] = json.loads(body)["manifests"]
        return found

    def blob(self, digest: str) -> bytes:
        """Read a blob and check its digest."""
        content = self._read(f"blobs/{digest}", "*/*")
        expect(sha256(content) == digest, f"the blob {digest} has the sum {sha256(content)}")
        return content

    def _read(self, path: str, accept: str) -> bytes:
        answer = self._session.get(f"{self.base}/{path}", headers={"Accept": accept}, timeout=TIMEOUT)
        expect(answer.ok, f"GET {answer.url}: {answer.status_code} {answer.text[:200]}")
        return answer.content


def sha256(content: bytes) -> str:
    """Give an OCI digest."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def access_token() -> str:
    """Get the user's Google access token: from the environment, else from gcloud."""
    if given := os.environ.get("GOOGLE_OAUTH_ACCESS_TOKEN"):
        return given
    command = ["gcloud", "auth", "print-access-token"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    expect(answer.returncode == 0, "there is no access token: set GOOGLE_OAUTH_ACCESS_TOKEN")
    return answer.stdout.strip()


class Stack:
    """A stack by its outputs, and the checks of it; each gives what it saw or raises VerifyError."""

    def __init__(self, outputs: dict[str, Any]) -> None:
        missing = [name for name in OUTPUTS if not outputs.get(name)]
        expect(not missing, f"the stack has no output {', '.join(missing)}: is it up?")
        self._outputs = outputs
        given = outputs["kubeconfig"]
        loaded = json.loads(given) if isinstance(given, str) else given
        try:
            self._api = kubernetes.config.new_client_from_config_dict(loaded, persist_config=False)
        except kubernetes.config.ConfigException as error:
            raise VerifyError(f"the output kubeconfig: {error}") from None

    def checks(self) -> dict[str, Callable[[], str]]:
        """Give the checks by name, in the order that makes the first failure the telling one."""
        nodes, names = self._outputs["nodes"], list(self._outputs["urls"])
        found: dict[str, Callable[[], str]] = {
            f"{node['name'] if len(nodes) > 1 else 'node'} is Ready, wasm32-wasi": partial(self.node, node)
            for node in nodes
        }
        for name in names:
            checks = App(name, self._outputs, self._api).checks()
            found |= {f"{name}: {what}" if len(names) > 1 else what: do for what, do in checks.items()}
        return found

    def node(self, wanted: dict[str, str]) -> str:
        """Check a Node's condition, labels, zone and taints, and that it takes pods."""
        node: Any = kubernetes.client.CoreV1Api(self._api).read_node(wanted["name"])
        expect(not node.spec.unschedulable, "it is cordoned")
        ready = {item.type: item.status for item in node.status.conditions or []}.get("Ready")
        expect(ready == "True", f"Ready is {ready}")
        architecture = (node.metadata.labels or {}).get("kubernetes.io/arch")
        expect(architecture == "wasm32-wasi", f"kubernetes.io/arch is {architecture}")
        zone = node.metadata.labels.get("topology.kubernetes.io/zone")
        expect(zone == wanted["zone"], f"its zone is {zone}, not {wanted['zone']}")
        taints = {(taint.key, taint.value, taint.effect) for taint in node.spec.taints or []}
        for effect in ("NoSchedule", "NoExecute"):
            taint = ("kubernetes.io/arch", "wasm32-wasi", effect)
            expect(taint in taints, f"the taint kubernetes.io/arch=wasm32-wasi:{effect} is missing")
        return f"{node.metadata.name}, {zone}, {node.status.node_info.container_runtime_version}"


def through_the_api(
    api: kubernetes.client.ApiClient, namespace: str, url: str
) -> tuple[str, requests.Session]:
    """Give where the API server passes requests on to a Service, and a client that may ask there."""
    configuration, parts = api.configuration, urlsplit(url)
    session = requests.Session()
    # What the environment says of proxies and of authorities is not about this server.
    session.trust_env = False
    session.verify = configuration.ssl_ca_cert or True
    if configuration.cert_file:
        session.cert = (configuration.cert_file, configuration.key_file)
    for credential in configuration.auth_settings().values():
        session.headers[credential["key"]] = credential["value"]
    service = f"{(parts.hostname or '').partition('.')[0]}:{parts.port}"
    return f"{configuration.host}/api/v1/namespaces/{namespace}/services/{service}/proxy", session


class App:
    """An app of a stack's, and one check a method; one within the cluster is asked through the API server."""

    def __init__(self, name: str, outputs: dict[str, Any], api: kubernetes.client.ApiClient) -> None:
        self._name, self._outputs, self._api = name, outputs, api
        self._url, self._session = str(outputs["urls"][name]).rstrip("/"), requests.Session()
        self._image = str(outputs["images"][name])
        self._registry: Registry | None = None
        self._is_replicated = (urlsplit(self._url).hostname or "").endswith(".svc")
        if self._is_replicated:
            self._base, self._session = through_the_api(api, str(outputs["namespace"]), self._url)
        else:
            self._base = self._url

    def checks(self) -> dict[str, Callable[[], str]]:
        """Give the checks by name, in the order that makes the first failure the telling one."""
        return {
            **(
                {"pods are Ready with the pushed digest": self.replicas}
                if self._is_replicated
                else {"pod is Ready with the pushed digest": self.pod}
            ),
            "manifest is what its digest says": self.manifest,
            "signature is valid for the public key": self.signature,
            "attestations are valid for the public key": self.attestations,
            "bundles are valid for the public key": self.bundles,
            "primorials are right": self.primorials,
            "factors are right": self.factors,
            "bad input is refused": self.bad_input,
            "pages answer": self.pages,
        }

    @property
    def registry(self) -> Registry:
        """Give the registry's client, made late so that one that is away fails one check."""
        if self._registry is None:
            self._registry = Registry(self._image)
        return self._registry

    def pod(self) -> str:
        """Check that the pod is Ready, on the first node, and runs exactly the image that was pushed."""
        core = kubernetes.client.CoreV1Api(self._api)
        nodes = [self._outputs["nodes"][0]["name"]]
        return self._is_ready(core.read_namespaced_pod(self._name, self._outputs["namespace"]), nodes)

    def replicas(self) -> str:
        """Check that all replicas are up to date and available, and each pod as the one pod of an app."""
        where = (self._name, self._outputs["namespace"])
        deployment: Any = kubernetes.client.AppsV1Api(self._api).read_namespaced_deployment(*where)
        wanted, status = deployment.spec.replicas, deployment.status
        seen = (status.replicas, status.updated_replicas, status.available_replicas)
        expect(seen == (wanted,) * 3, f"of {wanted} there, up to date and available are {seen}")
        selector = ",".join(f"{key}={value}" for key, value in deployment.spec.selector.match_labels.items())
        pods: list[Any] = (
            kubernetes.client.CoreV1Api(self._api)
            .list_namespaced_pod(where[1], label_selector=selector)
            .items
        )
        nodes = [node["name"] for node in self._outputs["nodes"]]
        live = [pod for pod in pods if pod.metadata.deletion_timestamp is None]
        found = [self._is_ready(pod, nodes) for pod in live]
        expect(len(found) == wanted, f"it has {len(found)} pods, not {wanted}")
        on = len({pod.spec.node_name for pod in live})
        spread = f" on {on} of {len(nodes)} nodes" if len(nodes) > 1 else ""
        return f"{wanted} of {where[1]}/{where[0]}{spread}, {found[0].rpartition(' ')[2]}"

    def _is_ready(self, pod: Any, nodes: list[str]) -> str:
        ready = {item.type: item.status for item in pod.status.conditions or []}.get("Ready")
        expect(ready == "True", f"Ready is {ready}, phase {pod.status.phase}")
        expect(pod.spec.node_name in nodes, f"it runs on {pod.spec.node_name}")
        statuses = pod.status.container_statuses or []
        expect(len(statuses) == 1, f"it has {len(statuses)} containers")
        digest = self._image.partition("@")[2]
        running = statuses[0].image_id or ""
        expect(running.endswith(digest), f"it runs {running}, not {digest}")
        return f"{pod.metadata.namespace}/{pod.metadata.name}, {digest[:19]}…"

    def manifest(self) -> str:
        """Check the artifact: digest, media types, one layer, and that the config names it."""
        raw = self.registry.manifest(self.registry.digest)
        expect(sha256(raw) == self.registry.digest, f"its sum is {sha256(raw)}")
        manifest = json.loads(raw)
        config_type = manifest["config"]["mediaType"]
        expect(config_type == "application/vnd.wasm.config.v0+json", f"its config is a {config_type}")
        layers = manifest["layers"]
        expect([layer["mediaType"] for layer in layers] == ["application/wasm"], f"its layers are {layers}")
        config = json.loads(self.registry.blob(manifest["config"]["digest"]))
        expect((config["architecture"], config["os"]) == ("wasm", "wasip2"), f"its config is {config}")
        expect(config["layerDigests"] == [layers[0]["digest"]], f"its config names {config['layerDigests']}")
        wasm = self.registry.blob(layers[0]["digest"])
        expect(wasm.startswith(b"\0asm\x0d\0\x01\0"), "its layer is no WebAssembly component")
        if self._image == self._outputs["image"]:
            expect(len(wasm) == int(self._outputs["wasm_bytes"]), f"it has {len(wasm)} bytes")
        return f"{self._image}, {len(wasm)} bytes"

    def _key(self) -> ec.EllipticCurvePublicKey:
        key = serialization.load_pem_public_key(str(self._outputs["public_key"]).encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise VerifyError("the public key is no ECDSA key")
        return key

    def signature(self) -> str:
        """Check the signature as `cosign verify --key` does."""
        key = self._key()
        tag = self.registry.digest.replace(":", "-") + ".sig"
        for layer in json.loads(self.registry.manifest(tag))["layers"]:
            payload = self.registry.blob(layer["digest"])
            signature = base64.b64decode(layer.get("annotations", {}).get(SIGNATURE_ANNOTATION, ""))
            try:
                key.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
            except InvalidSignature:
                continue
            signed = json.loads(payload)["critical"]["image"]["docker-manifest-digest"]
            expect(signed == self.registry.digest, f"{signed} is signed")
            return f"at the tag {tag[:19]}….sig"
        raise VerifyError("no signature fits the public key")

    def attestations(self) -> str:
        """Check the attestations at the tag as `cosign verify-attestation --key` of cosign 2 does."""
        tag = self.registry.digest.replace(":", "-") + ".att"
        layers = json.loads(self.registry.manifest(tag))["layers"]
        found = {self._attested(json.loads(self.registry.blob(layer["digest"]))) for layer in layers}
        expect(found >= ATTESTED, f"what is attested is {sorted(found)}")
        return ", ".join(sorted(found))

    def bundles(self) -> str:
        """Check the Sigstore bundles that refer to the image as cosign 3 does; others' are not looked at."""
        found = set()
        for listed in self.registry.referrers():
            manifest = json.loads(self.registry.manifest(listed["digest"]))
            if manifest.get("artifactType") != BUNDLE:
                continue
            subject = manifest["subject"]["digest"]
            expect(subject == self.registry.digest, f"{listed['digest']} refers to {subject}")
            bundle = json.loads(self.registry.blob(manifest["layers"][0]["digest"]))
            found.add(self._attested(bundle["dsseEnvelope"]))
        expect(found >= {SIGNED, *ATTESTED}, f"what is signed is {sorted(found)}")
        return ", ".join(sorted(found))

    def _attested(self, envelope: dict[str, Any]) -> str:
        """Check a DSSE envelope and its subject; give the predicate's type, "" of one by another key."""
        kind, body = str(envelope["payloadType"]), base64.b64decode(envelope["payload"])
        signature = base64.b64decode(envelope["signatures"][0]["sig"])
        message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(body), body)
        try:
            self._key().verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return ""
        statement = json.loads(body)
        subjects = [f"sha256:{subject['digest']['sha256']}" for subject in statement["subject"]]
        expect(subjects == [self.registry.digest], f"a statement is about {subjects}")
        return str(statement["predicateType"])

    def _get(self, path: str) -> requests.Response:
        return self._session.get(f"{self._base}{path}", timeout=TIMEOUT, allow_redirects=False)

    def primorials(self) -> str:
        """Compare n#, its digits and its primes with what is computed here."""
        for n in PRIMORIALS:
            answer = self._get(f"/primorial/{n}")
            expect(answer.status_code == 200, f"/primorial/{n}: {answer.status_code}")
            product = str(primorial(n))
            wanted = {"n": n, "primorial": product, "digits": len(product), "primes": primes_up_to(n)}
            expect(answer.json() == wanted, f"/primorial/{n} is not {product[:40]}: {answer.text[:100]}")
        return f"n = {', '.join(map(str, PRIMORIALS))}"

    def factors(self) -> str:
        """Check factorizations: primes with exponents whose product is the number."""
        for n in FACTORED:
            answer = self._get(f"/factor/{n}")
            expect(answer.status_code == 200, f"/factor/{n}: {answer.status_code}")
            pairs = factors_in(answer.json())
            product = 1
            for prime, exponent in pairs:
                expect(is_prime(prime), f"/factor/{n}: {prime} is no prime")
                product *= prime**exponent
            expect(product == n, f"/factor/{n}: the product of {pairs} is {product}")
        return f"n = {', '.join(map(str, FACTORED))}"

    def bad_input(self) -> str:
        """Check what is no number, too large, unknown or of the wrong method: a 4xx with a JSON error."""
        for path in REFUSED:
            _expect_error(self._get(path), path, 400)
        _expect_error(self._get("/no/such/path"), "/no/such/path", 404)
        posted = self._session.post(f"{self._base}/primorial/30", data="x", timeout=TIMEOUT)
        _expect_error(posted, "POST /primorial/30", 405)
        return f"{len(REFUSED) + 2} requests"

    def pages(self) -> str:
        """Check the page for people and the one for probes."""
        page = self._get("/")
        expect(page.ok and "<form" in page.text, f"/ is no page with a form: {page.status_code}")
        expect(self._get("/healthz").ok, "/healthz does not answer")
        return self._url


def factors_in(document: Any) -> list[tuple[int, int]]:
    """Read the (prime, exponent) pairs of an answer of /factor/N; a large prime is a string."""
    return [(int(item["prime"]), int(item["exponent"])) for item in document["factors"]]


def _expect_error(answer: requests.Response, what: str, status: int) -> None:
    expect(answer.status_code == status, f"{what}: {answer.status_code}, not {status}")
    code = answer.json()["error"]["code"]
    expect(code == status, f"{what}: the error in the body is {code}")


def stack_outputs(stack: str | None) -> dict[str, Any]:
    """Ask pulumi for the outputs. Raises VerifyError."""
    command = ["pulumi", "stack", "output", "--json", "--show-secrets"]
    if stack:
        command += ["--stack", stack]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    except FileNotFoundError:
        raise VerifyError('pulumi is not on PATH: eval "$(./scripts/env)"') from None
    expect(answer.returncode == 0, f"pulumi stack output: {answer.stderr.strip()}")
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def run(checks: dict[str, Callable[[], str]]) -> list[Check]:
    """Make every check; one that fails does not keep the others from being made."""
    results = []
    for name, check in checks.items():
        start = time.monotonic()
        try:
            passed, detail = True, check()
        except VerifyError as error:
            passed, detail = False, str(error)
        except kubernetes.client.ApiException as error:
            passed, detail = False, f"the API server answers {error.status} {error.reason}"
        except urllib3.exceptions.HTTPError as error:
            passed, detail = False, f"the API server cannot be reached: {error}"
        except (requests.RequestException, KeyError, TypeError, ValueError, OSError) as error:
            passed, detail = False, f"{type(error).__name__}: {error}"
        results.append(Check(name, passed, " ".join(detail.split()), round(time.monotonic() - start, 3)))
    return results


def run_until_right(outputs: dict[str, Any], seconds: float) -> list[Check]:
    """Make the checks until they all pass or the time is over; give the last results."""
    end = time.monotonic() + seconds
    while True:
        results = run(Stack(outputs).checks())
        if all(result.passed for result in results) or time.monotonic() >= end:
            return results
        time.sleep(POLL_SECONDS)


def table(results: list[Check]) -> str:
    """Lay the results out for people."""
    width = max(len(result.name) for result in results)
    lines = []
    for result in results:
        word = "ok  " if result.passed else "FAIL"
        lines.append(f"{word}  {result.name:<{width}}  {result.seconds:6.2f} s  {result.detail}")
    return "\n".join(lines)


def main() -> int:
    """Checks a running stack from outside, by its outputs alone. Exit status.

    0 all is right, 1 something is not.
    """
    parser = argparse.ArgumentParser(prog="./scripts/verify", description=main.__doc__)
    parser.add_argument("--stack", help="the stack to check; default: the selected one")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--wait",
        type=float,
        default=0,
        metavar="SECONDS",
        help="how long to check again while something is not right; default: once",
    )
    arguments = parser.parse_args()
    try:
        results = run_until_right(stack_outputs(arguments.stack), arguments.wait)
    except VerifyError as error:
        results = [Check("stack outputs", False, str(error), 0.0)]
    passed = all(result.passed for result in results)
    if arguments.json:
        print(json.dumps({"passed": passed, "checks": [asdict(result) for result in results]}, indent=2))
    else:
        print(table(results))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
