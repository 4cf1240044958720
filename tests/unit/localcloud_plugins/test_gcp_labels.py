"""What `gcp:defaultLabels` gives everything that takes labels, as the official plugin does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from localcloud.plugins.gcp import tables
from localcloud.plugins.gcp.provider import GcpProvider
from localcloud.plugins.gcp.tables import ResourceType
from localcloud.plugins.protocol import Resource
from localcloud.plugins.values import Properties
from tests.unit.localcloud_plugins.test_gcp import Recorder

MARK = {"goog-pulumi-provisioned": "true"}
TEAM = {"team": "infra"}
ITEM = "projects/p/locations/l/repositories/r"
INPUTS: Properties = {"location": "l", "repositoryId": "r", "format": "DOCKER"}
LABELLED = [spec for spec in tables.TYPES.values() if any(f.name == "effectiveLabels" for f in spec.fields)]


def provider(google: Recorder, labels: Any) -> GcpProvider:
    made = GcpProvider()
    made.configure({"project": "p", "region": "r", "zone": "r-b", "defaultLabels": labels})
    google.labels = made._google.labels
    made._google = google  # type: ignore[assignment]
    return made


def resource(spec: ResourceType = tables.REPOSITORY, item: str = ITEM) -> Resource:
    return Resource(f"urn:pulumi:dev::p::{spec.token}::it", item)


def live(**labels: str) -> Recorder:
    return Recorder(repositories__r={"name": ITEM, "format": "DOCKER", "labels": labels})


def test_what_is_labelled_is_what_the_official_plugin_labels() -> None:
    names = {spec.token.rsplit(":", 1)[-1] for spec in LABELLED}
    assert names == {"Repository", "Address", "Disk", "Instance", "Cluster"}


@pytest.mark.parametrize("labels", [TEAM, json.dumps(TEAM)], ids=["a map", "JSON, as pulumi gives it"])
def test_a_resource_gets_them_beside_its_own_which_win(labels: Any) -> None:
    google = Recorder(creates="repositories/r", repositories__r={"name": ITEM, "labels": {}})
    given = {**INPUTS, "labels": {"own": "1"}}
    provider(google, labels).create(resource(), given, preview=False)
    assert google.calls[0][2]["labels"] == {**TEAM, "own": "1", **MARK}
    google.calls.clear()
    provider(google, labels).create(resource(), {**INPUTS, "labels": {"team": "web"}}, preview=False)
    assert google.calls[0][2]["labels"] == {"team": "web", **MARK}


def test_they_are_no_drift_of_its_own() -> None:
    google = live(**TEAM, **MARK)
    made = provider(google, TEAM)
    state = {**INPUTS, "pulumiLabels": {**TEAM, **MARK}}
    read = made.read(resource(), state, INPUTS)
    assert "labels" not in read.properties
    assert read.properties["pulumiLabels"] == {**TEAM, **MARK}
    assert read.inputs == INPUTS
    assert not made.diff(resource(), read.properties, INPUTS, INPUTS).changes


@pytest.mark.parametrize("spec", LABELLED, ids=lambda spec: spec.token.rsplit(":", 1)[-1])
@pytest.mark.parametrize("before", [MARK, {**TEAM, **MARK}, {"team": "web", "old": "1", **MARK}], ids=str)
def test_another_default_is_an_update_of_everything_that_has_labels(
    spec: ResourceType, before: Properties
) -> None:
    diff = provider(Recorder(), TEAM).diff(resource(spec), {"pulumiLabels": before}, {}, {})
    assert bool(diff.changes) == (before != {**TEAM, **MARK})
    assert not diff.replace


def test_one_that_is_taken_back_goes_also_after_a_refresh_and_others_stay() -> None:
    google = live(**TEAM, **MARK, billing="by hand")
    made = provider(google, {})
    state = made.read(resource(), {**INPUTS, "pulumiLabels": {**TEAM, **MARK}}, INPUTS).properties
    assert made.diff(resource(), state, INPUTS, INPUTS).changes
    made.update(resource(), state, INPUTS, INPUTS, preview=False)
    assert google.calls == [("PATCH", ITEM, {"labels": {**MARK, "billing": "by hand"}})]


@pytest.mark.parametrize("labels", ["team", "[1]", {"team": 1}, '{"a": {}}'])
def test_what_is_no_map_of_strings_is_refused_by_name(labels: Any) -> None:
    failures = GcpProvider().check_config({"defaultLabels": labels}).failures
    assert [f.path for f in failures] == [("defaultLabels",)]
    assert "no map of strings" in failures[0].reason


@pytest.mark.parametrize("settings", [{"defaultLabels": json.dumps(TEAM)}, {"zone": "r-c"}, {"project": "q"}])
def test_another_setting_is_told_to_the_engine_which_configures_the_plugin_by_it(
    settings: Properties,
) -> None:
    """Where a diff of the configuration is empty, pulumi configures a plugin with what it knew before."""
    old: Properties = {"project": "p", "zone": "r-b"}
    diff = GcpProvider().diff_config(old, {**old, **settings})
    assert diff.changes
    assert not diff.replace
    assert not GcpProvider().diff_config(old, dict(old)).changes
