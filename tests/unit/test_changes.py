"""docs/changes.md: every configuration key has its row, and the document is what the tests hold."""

from __future__ import annotations

import yaml

from scripts.lib.changes import CHANGES, DOCUMENT, rendered
from tests.unit.conftest import REPOSITORY

# Not in the schema (see Pulumi.yaml), and what the gcp plugin is told.
ELSEWHERE = {"signingKey", "signingKeyPassword", "gcp:defaultLabels", "gcp:project", "gcp:region", "gcp:zone"}


def test_every_key_has_a_row() -> None:
    declared = yaml.safe_load((REPOSITORY / "Pulumi.yaml").read_text())["config"]
    assert {change.key for change in CHANGES} == declared.keys() | ELSEWHERE


def test_the_document_is_made_of_the_table() -> None:
    assert DOCUMENT.read_text() == rendered(), "python -m scripts.lib.changes writes it"
