"""What a killed pulumi left unfinished is taken up under the right id."""

from typing import Any

import pytest

from scripts.lib.interrupted import identity, refresh_arguments

PLACE = {"project": "p", "zone": "z", "location": "l", "region": "r"}


@pytest.mark.parametrize(
    ("kind", "inputs", "known"),
    [
        ("gcp:compute/instance:Instance", {"name": "vm"}, "projects/p/zones/z/instances/vm"),
        ("gcp:container/cluster:Cluster", {"name": "c"}, "projects/p/locations/l/clusters/c"),
        (
            "gcp:serviceaccount/account:Account",
            {"accountId": "a"},
            "projects/p/serviceAccounts/a@p.iam.gserviceaccount.com",
        ),
        ("kubernetes:core/v1:Pod", {"metadata": {"name": "pod", "namespace": "wasm"}}, "wasm/pod"),
        ("kubernetes:core/v1:Namespace", {"metadata": {"name": "wasm"}}, "wasm"),
        ("pulumi-python:dynamic/oci:Artifact", {"repository": "r"}, None),
    ],
)
def test_a_resource_has_the_id_that_its_provider_gives_it(
    kind: str, inputs: dict[str, Any], known: str | None
) -> None:
    assert identity(kind, {**PLACE, **inputs}) == known


def test_only_interrupted_creations_are_imported() -> None:
    operations = [
        {
            "type": kind,
            "resource": {"urn": f"urn-{kind}", "type": "kubernetes:core/v1:Namespace", "inputs": inputs},
        }
        for kind, inputs in (
            ("creating", {"metadata": {"name": "n"}}),
            ("deleting", {"metadata": {"name": "d"}}),
        )
    ]
    imports = ["--import-pending-creates", "urn-creating", "--import-pending-creates", "n"]
    assert refresh_arguments({"pending_operations": operations}) == ["--clear-pending-creates", *imports]
