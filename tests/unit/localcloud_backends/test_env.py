"""What `python -m localcloud env` puts on PATH: a stand-in where the official plugin is not there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from pathlib import Path

import pytest

from localcloud.environment import STAND_INS, exports, variables
from localcloud.home import Config, Home

CONFIG = Config(port=1234, token="it's secret")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A machine without any plugin."""
    monkeypatch.setenv("PULUMI_HOME", str(tmp_path / "pulumi"))
    monkeypatch.setenv("PATH", "/usr/bin")
    return Home(tmp_path / "home")


def stand_ins(home: Home) -> set[str]:
    """The plugins that are ours."""
    entries = variables(home, CONFIG)["PATH"].split(os.pathsep)
    return {Path(entry).name for entry in entries} & set(STAND_INS)


def test_every_plugin_that_is_missing_has_a_stand_in(home: Home) -> None:
    assert stand_ins(home) == set(STAND_INS)
    assert variables(home, CONFIG)["PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION"] == "true"


def test_an_official_plugin_that_is_installed_or_on_path_is_used_instead(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pulumi/plugins/resource-kubernetes-v4.34.2").mkdir(parents=True)
    assert stand_ins(home) == {"gcp", "command"}
    for name in ("gcp", "command"):
        plugin = tmp_path / f"pulumi-resource-{name}"
        plugin.write_text("#!/bin/sh\n")
        plugin.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
    assert stand_ins(home) == set()
    assert "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION" not in variables(home, CONFIG)


def test_a_second_env_gives_what_the_first_one_gave(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    first = variables(home, CONFIG)
    for name, value in first.items():
        monkeypatch.setenv(name, value)
    assert variables(home, CONFIG) == first


def test_a_value_reaches_the_shell_as_it_is(home: Home) -> None:
    assert "export GOOGLE_OAUTH_ACCESS_TOKEN='it'\"'\"'s secret'\n" in exports(home, CONFIG)


def test_no_product_that_the_sdk_knows_is_left_to_a_real_host(home: Home) -> None:
    """Every setting of an endpoint that the SDK has is set, and is what the plugin takes for one."""
    found = variables(home, CONFIG)
    module = importlib.util.find_spec("pulumi_gcp.config.vars")
    assert module is not None
    assert module.origin is not None
    tree = ast.parse(Path(module.origin).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    settings = {name for name in names if name.endswith("_custom_endpoint")}
    assert len(settings) > 150
    for setting in settings:
        url = found[f"GOOGLE_{setting.upper()}"]
        assert re.fullmatch(r"http://127\.0\.0\.1:1234/.*[^/]+/", url), url
    assert found["GOOGLE_IAM_BETA_CUSTOM_ENDPOINT"] == "http://127.0.0.1:1234/iam/v1/"
    assert found["GOOGLE_COMPUTE_CUSTOM_ENDPOINT"] == "http://127.0.0.1:1234/compute/beta/"
    for api in ("CLOUDRESOURCEMANAGER", "STORAGE", "PUBSUB", "LOGGING", "IAMCREDENTIALS", "COMPUTE"):
        assert found[f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{api}"].startswith("http://127.0.0.1:1234/")
