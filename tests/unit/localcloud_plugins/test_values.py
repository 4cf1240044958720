"""Pulumi's values as plain Python: the wire, comparing, secrets, drift."""

import pytest
from google.protobuf import json_format, struct_pb2  # type: ignore[import-untyped]

from localcloud.plugins.values import (
    SIGNATURE,
    UNKNOWN,
    Change,
    Path,
    Secret,
    compare,
    drift,
    from_struct,
    keep_secrets,
    matches,
    path_text,
    plain,
    to_struct,
)

SECRET = "1b47061264138c4ac30d75fd1eb44270"
UNKNOWN_ON_THE_WIRE = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"


def test_the_wire_gives_secrets_unknowns_and_whole_numbers() -> None:
    struct = struct_pb2.Struct()
    json_format.ParseDict(
        {
            "n": 3,
            "f": 1.5,
            "u": UNKNOWN_ON_THE_WIRE,
            "s": {SIGNATURE: SECRET, "value": {"a": [1]}},
            "gone": None,
        },
        struct,
    )
    assert from_struct(struct) == {"n": 3, "f": 1.5, "u": UNKNOWN, "s": Secret({"a": [1]})}


def test_a_value_survives_the_wire() -> None:
    value = {"a": Secret(["x", True]), "b": {"c": UNKNOWN, "d": [1, 2.5, None]}, "e": ""}
    assert from_struct(to_struct(value)) == value


def test_an_asset_stays_what_it_was() -> None:
    asset = {SIGNATURE: "c44067f5952c0a294b673a41bacd8c17", "hash": "1", "text": "t"}
    assert from_struct(to_struct({"a": asset})) == {"a": asset}


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1}, {"a": True}, {("a",): Change.UPDATE}),
        (
            {"a": {"b": [1, 2]}},
            {"a": {"b": [1, 3, 4]}},
            {("a", "b", 1): Change.UPDATE, ("a", "b", 2): Change.ADD},
        ),
        ({"a": {"b": 1}}, {}, {("a",): Change.DELETE}),
        ({"a": "x"}, {"a": UNKNOWN}, {("a",): Change.UPDATE}),
        ({"a": Secret("x")}, {"a": "x"}, {}),
        ({}, {"a": []}, {("a",): Change.ADD}),
    ],
)
def test_a_comparison_names_the_deepest_place(old: object, new: object, changes: dict[Path, Change]) -> None:
    assert compare(old, new) == changes


def test_an_empty_list_is_none_where_terraform_says_so() -> None:
    assert compare({}, {"a": [], "b": {}}, empty_is_absent=True) == {}


def test_paths_are_written_as_pulumi_writes_them() -> None:
    assert path_text(("spec", "containers", 0, "image")) == "spec.containers[0].image"
    assert path_text(("metadata", "annotations", "a.b/c")) == 'metadata.annotations["a.b/c"]'


def test_a_pattern_matches_at_below_and_above() -> None:
    pattern = "spec.containers.*.image"
    assert matches(("spec", "containers", 0, "image"), pattern)
    assert matches(("spec", "containers", 1), pattern)
    assert not matches(("spec", "containers", 0, "name"), pattern)


def test_secrets_are_kept_at_their_place() -> None:
    outputs = {"a": {"b": "x", "c": "y"}, "l": ["p", "q"]}
    kept = keep_secrets(outputs, {"a": {"b": Secret("x")}, "l": ["p", Secret("q")]})
    assert kept == {"a": {"b": Secret("x"), "c": "y"}, "l": ["p", Secret("q")]}
    assert plain(kept) == outputs


def test_a_server_that_spells_a_value_otherwise_is_no_drift() -> None:
    inputs = {"cpu": "1000m", "labels": {"a": "1"}, "net": Secret("short")}
    recorded = {"cpu": "1", "labels": {"a": "1", "server": "x"}, "net": "projects/p/short", "status": "new"}
    assert drift(inputs, recorded, {**recorded, "status": "old"}) == inputs


def test_a_value_changed_behind_our_back_is_drift() -> None:
    recorded = {"a": "1", "l": [1, 2]}
    assert drift({"a": "1", "l": [1, 2]}, recorded, {"a": "2", "l": [1]}) == {"a": "2", "l": [1]}
    assert drift({"a": "1"}, recorded, {}) == {}
