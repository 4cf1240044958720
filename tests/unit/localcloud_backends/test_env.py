"""What `python -m localcloud env` puts on PATH: a stand-in where the official plugin is not there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import struct
import sys
from importlib import metadata
from pathlib import Path

import pytest

import localcloud
from localcloud.environment import STAND_INS, exports, users_pulumi_home, variables
from localcloud.home import Config, Home
from localcloud.plugins import official
from localcloud.plugins.command.provider import CommandProvider
from localcloud.plugins.gcp.provider import GcpProvider
from localcloud.plugins.kubernetes.provider import KubernetesProvider

CONFIG = Config(port=1234, token="it's secret")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A machine without any plugin."""
    monkeypatch.setenv("PULUMI_HOME", str(tmp_path / "pulumi"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv(official.WHATEVER_VERSION, raising=False)
    return Home(tmp_path / "home")


def found(home: Home) -> dict[str, Path]:
    """The plugins that pulumi finds, by the rule it goes by with PULUMI_IGNORE_AMBIENT_PLUGINS."""
    exports(home, CONFIG)
    values = variables(home, CONFIG)
    assert values["PULUMI_IGNORE_AMBIENT_PLUGINS"] == "true"
    places = {
        name: Path(values["PULUMI_HOME"], "plugins", f"resource-{name}-v{official.asked_for(name)}")
        for name in STAND_INS
    }
    assert not any(place.is_symlink() for place in places.values()), "pulumi skips a link to a directory"
    return {name: (place / f"pulumi-resource-{name}").resolve(strict=True) for name, place in places.items()}


def stand_ins(home: Home) -> set[str]:
    """The plugins that are ours."""
    own = Path(localcloud.__file__).parent
    return {name for name, path in found(home).items() if path.is_relative_to(own)}


def test_every_plugin_that_is_missing_has_a_stand_in(home: Home) -> None:
    assert stand_ins(home) == set(STAND_INS)
    assert variables(home, CONFIG)["PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION"] == "true"


def plugin(directory: Path, name: str, content: bytes = b"#!/bin/sh\n") -> Path:
    """A plugin's executable in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"pulumi-resource-{name}"
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def installed(tmp_path: Path, name: str, version: str) -> Path:
    """Where pulumi installs a plugin."""
    return tmp_path / "pulumi/plugins" / f"resource-{name}-v{version}"


def speaking(version: str, name: str) -> bytes:
    """A plugin that says that it is of a version."""
    package = Path(localcloud.__file__).parents[1]
    lines = [
        f"#!{sys.executable}",
        "import sys",
        f"sys.path.insert(0, {str(package)!r})",
        "from localcloud.plugins.command.provider import CommandProvider",
        "from localcloud.plugins.protocol import serve",
        f"CommandProvider.name, CommandProvider.version = {name!r}, {version!r}",
        "serve(CommandProvider())",
    ]
    return "\n".join(lines).encode()


def elf(machine: int) -> bytes:
    """The head of a little-endian ELF program."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, machine) + bytes(44)


def test_the_installed_sdks_say_which_version_they_ask_for() -> None:
    for name, provider in (
        ("gcp", GcpProvider),
        ("kubernetes", KubernetesProvider),
        ("command", CommandProvider),
    ):
        assert official.asked_for(name) == metadata.version(f"pulumi-{name}") == provider.version
    assert official.asked_for("nothing") == ""


@pytest.mark.parametrize("name", STAND_INS)
def test_the_official_plugin_of_the_version_that_is_asked_for_is_used(
    home: Home, tmp_path: Path, name: str
) -> None:
    plugin(installed(tmp_path, name, official.asked_for(name)), name)
    assert stand_ins(home) == set(STAND_INS) - {name}


def test_with_all_of_them_pulumi_may_look_for_plugins_by_itself(home: Home, tmp_path: Path) -> None:
    for name in STAND_INS:
        plugin(installed(tmp_path, name, official.asked_for(name)), name)
    assert "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION" not in variables(home, CONFIG)


@pytest.mark.parametrize("version", ["7.0.0", "10.2.1", "10.2", "10.2.0-alpha.1", "10.2.0.partial", "99.0.0"])
def test_one_of_another_version_changes_nothing(home: Home, tmp_path: Path, version: str) -> None:
    plugin(installed(tmp_path, "gcp", version), "gcp")
    assert stand_ins(home) == set(STAND_INS)


@pytest.mark.parametrize(
    "content", [b"", b"<html>", elf(0), elf(40), b"MZ\x90\x00", b"\xce\xfa\xed\xfe" + bytes(40)]
)
def test_what_does_not_run_here_is_no_plugin(home: Home, tmp_path: Path, content: bytes) -> None:
    plugin(installed(tmp_path, "gcp", official.asked_for("gcp")), "gcp", content)
    assert stand_ins(home) == set(STAND_INS)


def test_a_download_that_is_not_through_is_no_plugin(home: Home, tmp_path: Path) -> None:
    place = installed(tmp_path, "gcp", official.asked_for("gcp"))
    place.mkdir(parents=True)
    assert stand_ins(home) == set(STAND_INS)
    plugin(place, "gcp").chmod(0o644)
    assert stand_ins(home) == set(STAND_INS)
    plugin(place, "gcp")
    place.with_name(f"{place.name}.lock").touch()  # which stays when it is through
    assert stand_ins(home) == set(STAND_INS) - {"gcp"}
    place.with_name(f"{place.name}.partial").touch()
    assert stand_ins(home) == set(STAND_INS)


def test_a_program_of_this_machine_is_one(home: Home, tmp_path: Path) -> None:
    place = installed(tmp_path, "gcp", official.asked_for("gcp"))
    plugin(place, "gcp", Path(sys.executable).resolve().read_bytes())
    assert stand_ins(home) == set(STAND_INS) - {"gcp"}


def test_one_on_path_is_asked_for_its_version(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
    plugin(tmp_path, "gcp", speaking("7.0.0", "gcp"))
    plugin(tmp_path, "command", speaking(f"v{official.asked_for('command')}", "command"))
    assert stand_ins(home) == {"gcp", "kubernetes"}
    place = installed(tmp_path, "gcp", official.asked_for("gcp"))
    plugin(place, "gcp")
    assert found(home)["gcp"] == place / "pulumi-resource-gcp"


def test_a_plugin_that_comes_or_goes_is_taken_or_left_at_the_next_env(home: Home, tmp_path: Path) -> None:
    assert stand_ins(home) == set(STAND_INS)
    right = plugin(installed(tmp_path, "gcp", official.asked_for("gcp")), "gcp")
    assert found(home)["gcp"] == right
    right.unlink()
    assert stand_ins(home) == set(STAND_INS)


def test_the_stand_in_for_an_sdk_of_another_version_stays_for_the_stacks_that_it_made(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(official, "asked_for", lambda _name: "1.2.3")
        exports(home, CONFIG)
    exports(home, CONFIG)
    plugins = Path(variables(home, CONFIG)["PULUMI_HOME"], "plugins")
    assert (plugins / "resource-gcp-v1.2.3/pulumi-resource-gcp").is_file()


def test_the_stand_in_of_another_checkout_is_no_official_plugin(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "other/localcloud/plugins/gcp"
    plugin(place, "gcp", speaking(official.asked_for("gcp"), "gcp"))
    monkeypatch.setenv("PATH", f"{place}:/usr/bin")
    assert stand_ins(home) == set(STAND_INS)


def test_an_environment_of_another_checkout_gives_its_plugins_to_none(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Home(tmp_path / "other")
    exports(other, CONFIG)
    users = os.environ["PULUMI_HOME"]
    for name, value in variables(other, CONFIG).items():
        monkeypatch.setenv(name, value)
    assert users_pulumi_home() == users
    assert stand_ins(home) == set(STAND_INS)
    # also where only a part of that environment has reached us
    monkeypatch.delenv("LOCALCLOUD_HOME")
    assert stand_ins(home) == set(STAND_INS)


def test_whatever_version_is_there_is_used_where_the_user_says_so(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(installed(tmp_path, "gcp", "9.35.0"), "gcp")
    plugin(tmp_path, "command")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
    monkeypatch.setenv(official.WHATEVER_VERSION, "gcp,command")
    assert stand_ins(home) == {"kubernetes"}


def test_a_second_env_gives_what_the_first_one_gave(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    first = variables(home, CONFIG)
    assert first["PULUMI_CREDENTIALS_PATH"] == os.environ["PULUMI_HOME"]
    for name, value in first.items():
        monkeypatch.setenv(name, value)
    assert variables(home, CONFIG) == first


def test_a_value_reaches_the_shell_as_it_is(home: Home) -> None:
    assert "export GOOGLE_OAUTH_ACCESS_TOKEN='it'\"'\"'s secret'\n" in exports(home, CONFIG)


def test_no_product_that_the_sdk_knows_is_left_to_a_real_host(home: Home) -> None:
    """Every setting of an endpoint that the SDK has is set, and is what the plugin takes for one."""
    values = variables(home, CONFIG)
    module = importlib.util.find_spec("pulumi_gcp.config.vars")
    assert module is not None
    assert module.origin is not None
    tree = ast.parse(Path(module.origin).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    settings = {name for name in names if name.endswith("_custom_endpoint")}
    assert len(settings) > 150
    for setting in settings:
        url = values[f"GOOGLE_{setting.upper()}"]
        assert re.fullmatch(r"http://127\.0\.0\.1:1234/.*[^/]+/", url), url
    assert values["GOOGLE_IAM_BETA_CUSTOM_ENDPOINT"] == "http://127.0.0.1:1234/iam/v1/"
    assert values["GOOGLE_COMPUTE_CUSTOM_ENDPOINT"] == "http://127.0.0.1:1234/compute/beta/"
    for api in ("CLOUDRESOURCEMANAGER", "STORAGE", "PUBSUB", "LOGGING", "IAMCREDENTIALS", "COMPUTE"):
        assert values[f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{api}"].startswith("http://127.0.0.1:1234/")
