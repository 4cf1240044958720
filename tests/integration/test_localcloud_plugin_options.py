"""Pulumi's resource options and commands with the stand-ins, under the real `pulumi`: what the engine asks of
a plugin for each of them.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import Localcloud
from tests.integration.pulumi_stack import Stack

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import pulumi
import pulumi_command as command
import pulumi_gcp as gcp

config, where = pulumi.Config(), pulumi.Config("gcp")
text, region = config.require("text"), where.require("region")


def network(name, description=None, **options):
    return gcp.compute.Network(
        name,
        name=f"options-{name}",
        auto_create_subnetworks=False,
        description=description,
        opts=pulumi.ResourceOptions(**options),
    )


network("ignored", text, ignore_changes=["description"])
network("protected", protect=config.require("protect") == "yes")
network("retained", retain_on_delete=True)
parent = gcp.artifactregistry.Repository(
    "parent",
    repository_id=f"parent-{text}",
    location=region,
    format="DOCKER",
    opts=pulumi.ResourceOptions(delete_before_replace=True),
)
gcp.artifactregistry.RepositoryIamMember(
    "child",
    location=region,
    repository=parent.name,
    role="roles/artifactregistry.reader",
    member="user:somebody@example.com",
    opts=pulumi.ResourceOptions(deleted_with=parent, delete_before_replace=True),
)
address = gcp.compute.Address(
    "address",
    name="options-address",
    region=region,
    labels={"l": text},
    opts=pulumi.ResourceOptions(replace_on_changes=["labels"], delete_before_replace=True),
)
gcp.artifactregistry.Repository(
    "hidden",
    repository_id="options",
    location=region,
    format="DOCKER",
    description=text,
    opts=pulumi.ResourceOptions(additional_secret_outputs=["registryUri"]),
)
gcp.compute.Disk(
    "disk", name="options-disk", zone=where.require("zone"), size=int(config.require("size")), type="pd-ssd"
)
command.local.Command(
    "echo", create="cat", stdin=pulumi.Output.secret(text), environment={"ADDRESS": address.address}
)
"""
NUMBER = 10  # resources, with the stack itself


@pytest.fixture(scope="module")
def stack(localcloud: Localcloud, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    for tool in ("pulumi", "pulumi-language-python"):
        if not shutil.which(tool):
            pytest.skip(f"not on PATH: {tool}; scripts/test puts it there")
    base = tmp_path_factory.mktemp("options")
    python = Path(sys.executable).parent
    environment = {
        **localcloud.environment,
        "PULUMI_BACKEND_URL": f"file://{base}",
        "PULUMI_CONFIG_PASSPHRASE": "x",
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PULUMI_EXPERIMENTAL": "true",
        "PYTHONPATH": str(ROOT),
    }
    environment["PATH"] = f"{python}{os.pathsep}{environment['PATH']}"
    directory = base / "project"
    directory.mkdir()
    (directory / "Pulumi.yaml").write_text(yaml.safe_dump({"name": "options", "runtime": "python"}))
    (directory / "__main__.py").write_text(PROGRAM)
    made = Stack(directory, environment)
    made.run("stack", "init")
    zone = {"gcp__region": "europe-west1", "gcp__zone": "europe-west1-b"}
    made.set(gcp__project="localcloud-dev", text="one", size="10", protect="yes", **zone)
    return made


def resources(stack: Stack) -> dict[str, Any]:
    """The state's resources by their name in the program."""
    state = json.loads(stack.run("stack", "export"))
    return {r["urn"].rsplit("::", 1)[-1]: r for r in state["deployment"].get("resources") or []}


# One stack, which each test takes as the one before it leaves it: an up takes longer than what is looked at.


def test_plans_targets_replacements_and_drift_are_what_pulumi_says_of_them(stack: Stack) -> None:
    said = stack.run("preview")
    assert "warning" not in said, said
    assert stack.up() == {"create": NUMBER}
    first = resources(stack)
    assert "4dabf18193072939515e22adb298388d" in first["hidden"]["outputs"]["registryUri"]
    assert "4dabf18193072939515e22adb298388d" in first["echo"]["outputs"]["stdout"]

    # An update plan is what the preview said, and is kept to.
    stack.set(text="two", size="20")
    said = stack.run("preview", "--save-plan", "plan.json")
    changes = {"update": 3, "replace": 3, "same": 4}  # disk, repository, command; address, parent, child
    for words in ("3 to update", "3 to replace"):
        assert words in said, said
    stack.run("up", "--yes", "--plan", "plan.json")
    assert stack.last() == changes
    second = resources(stack)
    assert second["ignored"]["inputs"]["description"] == "one"
    assert second["disk"]["outputs"]["diskId"] == first["disk"]["outputs"]["diskId"]
    assert second["parent"]["id"] != first["parent"]["id"]
    stack.set(size="30")
    refused = stack.run("up", "--yes", "--plan", "plan.json", fails=True)
    assert "violates plan" in refused, refused

    # Only what is aimed at changes; what is to be replaced is, though nothing changed.
    stack.set(text="three")
    stack.run("up", "--yes", "--skip-preview", "--target", first["disk"]["urn"])
    assert stack.last()["update"] == 1
    assert resources(stack)["hidden"]["inputs"]["description"] == "two"
    stack.set(text="two")
    stack.run("up", "--yes", "--skip-preview", "--replace", first["address"]["urn"])
    assert stack.last()["replace"] == 1
    stack.run("preview", "--expect-no-changes")

    # What somebody changed is seen, and brought back.
    path = f"{first['hidden']['id']}?updateMask=description"
    stack.google("ARTIFACT_REGISTRY", "PATCH", path, {"description": "drift"})
    stack.run("refresh", "--yes", "--skip-preview")
    assert resources(stack)["hidden"]["inputs"]["description"] == "drift"
    assert stack.up()["update"] == 1


def test_what_the_state_forgot_is_imported_by_short_ids_and_nothing_is_made_anew(stack: Stack) -> None:
    first = resources(stack)
    state = json.loads(stack.run("stack", "export"))
    forgotten = ("disk", "hidden", "ignored")
    state["deployment"]["resources"] = [
        r for r in state["deployment"]["resources"] if r["urn"].rsplit("::", 1)[-1] not in forgotten
    ]
    (stack.directory / "state.json").write_text(json.dumps(state))
    stack.run("stack", "import", "--file", "state.json")
    ids = {
        "disk": "europe-west1-b/options-disk",
        "hidden": "localcloud-dev/europe-west1/options",
        "ignored": "localcloud-dev/options-ignored",
    }
    wanted = [{"type": first[name]["type"], "name": name, "id": ids[name]} for name in forgotten]
    (stack.directory / "import.json").write_text(json.dumps({"resources": wanted}))
    arguments = ("--yes", "--skip-preview", "--generate-code=false", "--protect=false")
    stack.run("import", "--file", "import.json", *arguments)
    assert {name: resources(stack)[name]["id"] for name in forgotten} == {
        name: first[name]["id"] for name in forgotten
    }
    assert not {"replace", "create", "delete"} & set(stack.up())


def test_what_is_protected_stays_until_it_is_not_and_what_is_retained_for_good(stack: Stack) -> None:
    urn = resources(stack)["protected"]["urn"]
    assert "protected" in stack.run("destroy", "--yes", "--skip-preview", "--target", urn, fails=True)
    assert "protected" in resources(stack)
    stack.set(protect="no")
    stack.up()
    stack.run("destroy", "--yes", "--skip-preview")
    assert list(resources(stack)) == []
    stack.google("COMPUTE", "DELETE", "projects/localcloud-dev/global/networks/options-retained")
