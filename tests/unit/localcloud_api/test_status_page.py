"""The page for the browser: whom it opens for, what it shows, and that nothing in it is taken for HTML."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from localcloud.api import status_page
from localcloud.api.server import application
from localcloud.home import Home
from tests.unit.localcloud_api.client import TOKEN, ZONE, Client, instance


@pytest.fixture
def browser(client: Client) -> TestClient:
    return TestClient(application(client.api), base_url="http://127.0.0.1:1234")


def page_of(browser: TestClient, home: Home) -> str:
    answer = browser.get(status_page.PATH, params={"key": status_page.key(home.require_config())})
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    text: str = answer.text
    return text


def test_it_opens_for_its_key_under_its_own_name_alone(browser: TestClient, home: Home) -> None:
    key = status_page.key(home.require_config())
    assert key not in TOKEN
    assert TOKEN not in status_page.url(home.require_config())
    for given in ({}, {"key": ""}, {"key": TOKEN}, {"key": key[:-1]}, {"key": "é"}):
        assert browser.get(status_page.PATH, params=given).status_code == 403
    rebound = {"host": "evil.example:1234"}
    assert browser.get(status_page.PATH, params={"key": key}, headers=rebound).status_code == 403
    assert browser.post(status_page.PATH, params={"key": key}).status_code != 200
    # The key is for this page: it is no access token.
    assert browser.get(f"/{ZONE}/instances", headers={"Authorization": f"Bearer {key}"}).status_code == 401


def test_it_shows_parts_resources_operations_and_requests(
    browser: TestClient, client: Client, home: Home
) -> None:
    client.create(f"{ZONE}/instances", instance())
    client.error(404, "GET", f"{ZONE}/instances/none")
    client.backends.fail.add("start_instance")
    client.ok("POST", f"{ZONE}/instances", instance("bad"))
    client.api.services.operations.settle(30)
    page = page_of(browser, home)
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert "<td>api</td><td>RUNNING</td><td>1</td>" in rows
    assert "<td>instance</td><td>vm</td><td>RUNNING</td>" in rows
    assert any("insert" in row and "failed: " in row and "on purpose" in row for row in rows)
    assert any("/instances/none</td><td>404</td>" in row for row in rows)
    assert "Console of vm" in page


def test_nothing_that_others_wrote_is_taken_for_html(browser: TestClient, client: Client, home: Home) -> None:
    client.create(f"{ZONE}/instances", instance())
    client.error(404, "GET", f"{ZONE}/instances/<script>alert(1)</script>")
    client.backends.console = "<img src=x onerror=alert(1)> & more"
    page = page_of(browser, home)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; more" in page
    assert TOKEN not in page
