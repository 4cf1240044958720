"""scripts/verify: what it computes itself, and that one fault hides no other."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import NoReturn

import pytest
import requests
import urllib3.exceptions
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException

from scripts.lib import verify


def test_primorials_and_primes_are_those_of_the_books() -> None:
    # OEIS A034386 and A000040.
    assert [verify.primorial(n) for n in (0, 1, 2, 3, 4, 5, 7, 30)] == [1, 1, 2, 6, 6, 30, 210, 6469693230]
    assert [n for n in range(40) if verify.is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37]
    assert verify.is_prime(2**61 - 1)
    assert verify.is_prime(18446744073709551557)
    # Strong pseudoprimes to the first bases, and a Carmichael number.
    assert not any(map(verify.is_prime, (3215031751, 341550071728321, 561, 2**64 - 1)))


FAULTS = [
    verify.VerifyError("Ready is False"),
    ApiException(status=403, reason="Forbidden"),
    urllib3.exceptions.MaxRetryError(urllib3.HTTPConnectionPool("h"), "/api", OSError("refused")),
    requests.ConnectionError("refused"),
    requests.JSONDecodeError("no JSON", "", 0),
    KeyError("layers"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_check_that_fails_keeps_no_other_from_being_made(fault: Exception) -> None:
    def fail() -> NoReturn:
        raise fault

    first, second = verify.run({"first": fail, "second": lambda: "fine"})
    assert (first.passed, second.passed, second.detail) == (False, True, "fine")
    assert first.detail
    assert "FAIL  first " in verify.table([first, second])


@pytest.mark.parametrize(("seconds", "passed"), [(0, False), (30, True)])
def test_what_is_on_its_way_back_may_be_waited_for(
    monkeypatch: pytest.MonkeyPatch, seconds: float, passed: bool
) -> None:
    answers = iter([False, False, True])

    def check() -> str:
        verify.expect(next(answers), "not yet")
        return "fine"

    monkeypatch.setattr(verify, "Stack", lambda _: SimpleNamespace(checks=lambda: {"it": check}))
    monkeypatch.setattr(verify, "POLL_SECONDS", 0)
    (result,) = verify.run_until_right({}, seconds)
    assert result.passed is passed


def test_a_stack_that_is_not_up_is_said_to_be_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "stack_outputs", lambda _stack: {"url": "http://127.0.0.1:1"})
    monkeypatch.setattr("sys.argv", ["verify", "--json"])
    assert verify.main() == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert "is it up?" in report["checks"][0]["detail"]


def test_an_app_within_the_cluster_is_asked_through_the_api_server_as_the_user() -> None:
    configuration = Configuration(host="https://192.0.2.1:443")
    configuration.api_key, configuration.api_key_prefix = {"BearerToken": "T"}, {"BearerToken": "Bearer"}
    configuration.ssl_ca_cert = "/ca.pem"
    base, session = verify.through_the_api(ApiClient(configuration), "wasm", "http://second.wasm.svc:8090")
    assert base == "https://192.0.2.1:443/api/v1/namespaces/wasm/services/second:8090/proxy"
    assert session.headers["authorization"] == "Bearer T"
    assert (session.verify, session.trust_env) == ("/ca.pem", False)
