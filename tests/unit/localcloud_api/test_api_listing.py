"""Filters, pages and field masks, over the space of what can be asked."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localcloud.api.compute.common import LINK
from localcloud.api.errors import ApiError
from localcloud.api.listing import matching, ordered_page, page
from localcloud.api.masks import merged, update
from tests.unit.localcloud_api.client import COMPUTE, LOCATION, REGION, REPOSITORIES, Client

Json = dict[str, Any]

# Filters.

FLAGS = [
    {name: "y" if bit else "n" for name, bit in zip("abc", bits, strict=True)}
    for bits in itertools.product([False, True], repeat=3)
]
TERMS = st.sampled_from("abc").map(lambda name: (f"{name} = y", lambda item: item[name] == "y"))


def _inside(text: str) -> str:
    return text if len(text) == len("a = y") else f"({text})"


def _negated(term: tuple[str, Any], word: str) -> tuple[str, Any]:
    return f"{word}{_inside(term[0])}", lambda item: not term[1](item)


def _joined(parts: list[tuple[str, Any]], word: str) -> tuple[str, Any]:
    every = any if word == " OR " else all
    return word.join(_inside(text) for text, _ in parts), lambda item: every(part(item) for _, part in parts)


EXPRESSIONS = st.recursive(
    TERMS,
    lambda inner: st.one_of(
        st.builds(_negated, inner, st.sampled_from(["NOT ", "-"])),
        st.builds(_joined, st.lists(inner, min_size=2, max_size=3), st.sampled_from([" OR ", " AND ", " "])),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS)
def test_a_filter_lets_pass_what_its_logic_says(expression: tuple[str, Any]) -> None:
    text, accepts = expression
    assert matching(FLAGS, text) == [item for item in FLAGS if accepts(item)], text


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([" OR ", " AND ", " "])), min_size=2, max_size=6
    )
)
def test_or_binds_tighter_than_and(parts: list[tuple[str, str]]) -> None:
    text = "".join(f"{name} = y{word}" for name, word in parts[:-1]) + f"{parts[-1][0]} = y"
    groups: list[list[str]] = [[parts[0][0]]]
    for (_, word), (name, _) in itertools.pairwise(parts):
        if word == " OR ":
            groups[-1].append(name)
        else:
            groups.append([name])
    expected = [item for item in FLAGS if all(any(item[name] == "y" for name in group) for group in groups)]
    assert matching(FLAGS, text) == expected, text


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("labels.owner:*", ["a"]),
        ("-labels.owner:*", ["b", "c"]),
        ("labels:owner", ["a"]),
        ("size > 5", ["b", "c"]),
        ("size >= -5 AND -size = 10", ["a", "c"]),
        ("-name = a -name = b", ["c"]),
        ('(name = "a") OR (name = "b") AND (size = 10)', ["b"]),
        ("name eq [ab]", ["a", "b"]),
        ("name ne [ab]", ["c"]),
        # As Google's plugin asks for a region's zones, by the endpoint that it was told.
        (r"(region eq http://127\.0\.0\.1:1/compute/beta/projects/p/regions/r) (on eq true)", ["a"]),
        ("region eq '.*/regions/r'", ["a"]),
        ("region eq https://www.googleapis.com/compute/v1/projects/p/regions/other", []),
        ("on = true", ["a"]),
        ("list.x = 2", ["c"]),
    ],
)
def test_filters_of_googles_documents(expression: str, names: list[str]) -> None:
    items: list[Json] = [
        {
            "name": "a",
            "labels": {"owner": "me"},
            "size": "5",
            "on": True,
            "region": f"{LINK}projects/p/regions/r",
        },
        {"name": "b", "size": "10", "on": False},
        {"name": "c", "size": "20", "list": [{"x": 1}, {"x": 2}]},
    ]
    assert [item["name"] for item in matching(items, expression)] == names


@pytest.mark.parametrize(
    "text", ["a", "a =", "= b", "(a = b", "a = b)", "a = b OR", "OR a = b", "-", "- = x", "a b c"]
)
def test_what_is_no_filter_is_refused(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        matching(FLAGS, text)
    assert caught.value.code == 400


# Pages.

NAMES = st.sets(st.text("abcdefgh", min_size=1, max_size=3), max_size=15)


@settings(max_examples=150, deadline=None)
@given(names=NAMES, gone=NAMES, come=NAMES, size=st.integers(1, 4), down=st.booleans())
def test_nothing_is_skipped_or_shown_twice_when_others_come_and_go(
    names: set[str], gone: set[str], come: set[str], size: int, down: bool
) -> None:
    there, seen, token = set(names), [], ""
    for turn in itertools.count():
        items = [{"name": name} for name in there]
        chosen, token = ordered_page(items, size, token, ["name"], down=down)
        seen += [item["name"] for item in chosen]
        if turn == 0:
            there = (there - gone) | come
        if not token:
            break
    assert len(seen) == len(set(seen))
    assert names - gone <= set(seen) <= names | come
    assert seen == sorted(seen, reverse=down)


def test_a_page_does_not_skip_when_something_is_deleted_between(client: Client) -> None:
    for number in range(5):
        client.create(f"{REGION}/addresses", {"name": f"ip{number}"})
    first = client.ok("GET", f"{REGION}/addresses", query="maxResults=2")
    client.done(client.ok("DELETE", f"{REGION}/addresses/ip0"))
    token = first["nextPageToken"]
    second = client.ok("GET", f"{REGION}/addresses", query=f"maxResults=2&pageToken={token}")
    assert [item["name"] for item in second["items"]] == ["ip2", "ip3"]
    client.error(400, "GET", REPOSITORIES, query="pageSize=-1")


@pytest.mark.parametrize("token", ["x", "bm8=", "WzFd", "W10=", "é"])
def test_a_token_that_no_page_gave_is_refused(token: str) -> None:
    with pytest.raises(ApiError):
        page([{"name": "a"}], 1, token, "name")


# What of an answer is wanted.


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("items/name,items/kind", {"items": [{"name": "default", "kind": "compute#network"}]}),
        ("items(name),items(kind)", {"items": [{"name": "default", "kind": "compute#network"}]}),
        ("items(routingConfig(routingMode))", {"items": [{"routingConfig": {"routingMode": "REGIONAL"}}]}),
        ("items/routingConfig(routingMode)", {"items": [{"routingConfig": {"routingMode": "REGIONAL"}}]}),
        (
            "items(routingConfig/*,name)",
            {"items": [{"routingConfig": {"routingMode": "REGIONAL"}, "name": "default"}]},
        ),
        ("kind,items(name),items/name", {"kind": "compute#networkList", "items": [{"name": "default"}]}),
        (" kind , items( name ) ", {"kind": "compute#networkList", "items": [{"name": "default"}]}),
    ],
)
def test_a_mask_selects_what_it_names(client: Client, mask: str, expected: Json) -> None:
    assert client.ok("GET", f"{COMPUTE}/global/networks", query=f"fields={mask}") == expected
    assert client.ok("GET", f"{COMPUTE}/global/networks", query=f"$fields={mask}") == expected


def test_the_wider_of_two_selections_holds(client: Client) -> None:
    whole = client.ok("GET", f"{COMPUTE}/global/networks")
    for mask in ("items,items/name", "items/name,items", "*"):
        assert (
            client.ok("GET", f"{COMPUTE}/global/networks", query=f"fields={mask}")["items"] == whole["items"]
        )


@pytest.mark.parametrize(
    "mask", ["items(name", "items)", "items//name", "", ",", "items(", "colour", "items/colour"]
)
def test_what_selects_nothing_is_refused(client: Client, mask: str) -> None:
    query = f"fields={mask}" if mask else "fields=,"
    client.error(400, "GET", f"{COMPUTE}/global/networks", query=query)


# What of a resource is changed.

LEAVES = st.one_of(st.booleans().filter(bool), st.integers(1, 9), st.text("xyz", min_size=1, max_size=2))
TREES = st.recursive(
    LEAVES, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1), max_leaves=10
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), TREES, min_size=1)


def _paths(value: Any, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree by their paths."""
    if not isinstance(value, dict):
        return {above: value}
    return {path: leaf for key, item in value.items() for path, leaf in _paths(item, (*above, key)).items()}


@settings(max_examples=200, deadline=None)
@given(before=OBJECTS, given_=OBJECTS, data=st.data())
def test_an_update_changes_what_its_mask_names_and_nothing_else(
    before: Json, given_: Json, data: st.DataObject
) -> None:
    known = sorted(
        {path[:length] for path in (*_paths(before), *_paths(given_)) for length in range(1, len(path) + 1)}
    )
    path = data.draw(st.sampled_from(known))
    target = copy.deepcopy(before)
    try:
        update(target, given_, ".".join(path), set("abc"))
    except ApiError:
        # The path leads through a leaf.
        leaves = {**_paths(before), **_paths(given_)}
        assert any(path[: len(leaf)] == leaf and len(path) > len(leaf) for leaf in leaves)
        return
    old, new, asked = _paths(before), _paths(target), _paths(given_)
    for leaf, value in new.items():
        assert value == (asked if leaf[: len(path)] == path else old)[leaf]
    for leaf in old:
        assert leaf[: len(path)] == path or leaf in new
    for leaf in asked:
        assert leaf[: len(path)] != path or leaf in new


@settings(max_examples=200, deadline=None)
@given(before=OBJECTS, patch=OBJECTS)
def test_a_patch_without_a_mask_changes_what_it_has_at_any_depth(before: Json, patch: Json) -> None:
    old, asked, new = _paths(before), _paths(patch), _paths(merged(before, patch))
    for leaf, value in asked.items():
        assert new[leaf] == value
    for leaf, value in old.items():
        # What is not below or above anything that the patch says is as it was.
        if not any(leaf[: len(path)] == path or path[: len(leaf)] == leaf for path in asked):
            assert new[leaf] == value
    assert set(new) <= set(old) | set(asked)


def test_a_patch_of_compute_engine_keeps_the_rest_of_a_nested_field(client: Client) -> None:
    path = f"{COMPUTE}/global/firewalls"
    log = {"enable": True, "metadata": "INCLUDE_ALL_METADATA"}
    client.create(path, {"name": "f", "allowed": [{"IPProtocol": "tcp"}], "logConfig": log})
    client.done(client.ok("PATCH", f"{path}/f", {"logConfig": {"enable": False}}))
    assert client.ok("GET", f"{path}/f")["logConfig"] == log | {"enable": False}
    client.done(client.ok("PATCH", f"{path}/f", {"allowed": [{"IPProtocol": "udp"}]}))
    assert client.ok("GET", f"{path}/f")["allowed"] == [{"IPProtocol": "udp"}]


def test_a_patch_keeps_the_rest_of_a_nested_field(client: Client) -> None:
    body = {"format": "DOCKER", "labels": {"a": "1", "b": "2"}, "description": "d"}
    client.done_registry(client.ok("POST", REPOSITORIES, body, query="repositoryId=app"))
    path = f"{REPOSITORIES}/app"

    def patch(mask: str, fields: Json) -> Json:
        return client.ok("PATCH", path, fields, query=f"updateMask={mask}")

    assert patch("docker_config.immutable_tags", {"dockerConfig": {"immutableTags": True}})[
        "dockerConfig"
    ] == {"immutableTags": True}
    assert patch("labels.a", {"labels": {"a": "9"}})["labels"] == {"a": "9", "b": "2"}
    assert patch("labels.`b`", {"labels": {}})["labels"] == {"a": "9"}
    assert patch("labels.a_b", {"labels": {"a_b": "3"}})["labels"] == {"a": "9", "a_b": "3"}
    policies = {"keep": {"id": "keep", "action": "KEEP", "mostRecentVersions": {"keepCount": 3}}}
    patch("cleanupPolicies", {"cleanupPolicies": policies})
    deeper = {"cleanupPolicies": {"keep": {"mostRecentVersions": {"keepCount": 5}}}}
    changed = patch("cleanupPolicies.keep.mostRecentVersions.keepCount", deeper)["cleanupPolicies"]["keep"]
    assert changed == {"id": "keep", "action": "KEEP", "mostRecentVersions": {"keepCount": 5}}
    everything = patch("*", {"description": "new"})
    assert everything["description"] == "new"
    assert {"labels", "dockerConfig", "cleanupPolicies"}.isdisjoint(everything)
    assert everything["name"] == f"{LOCATION}/repositories/app"
    client.error(400, "PATCH", path, {}, query="updateMask=description.x")
    client.error(400, "PATCH", path, {}, query="updateMask=description,name")
