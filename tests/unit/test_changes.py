"""docs/changes.md: every configuration key has its row, and the document is what the tests hold."""

from __future__ import annotations

import dataclasses
import re

import yaml

from components.config import AppConfig
from scripts.lib.changes import CHANGES, DOCUMENT, rendered
from tests.unit.conftest import REPOSITORY

# Not in the schema (see Pulumi.yaml), and what the gcp plugin is told.
ELSEWHERE = {"signingKey", "signingKeyPassword", "gcp:defaultLabels", "gcp:project", "gcp:region", "gcp:zone"}


def test_every_key_and_every_field_of_an_app_has_a_row() -> None:
    declared = yaml.safe_load((REPOSITORY / "Pulumi.yaml").read_text())["config"]
    names = [field.name for field in dataclasses.fields(AppConfig)]
    fields = {f"apps[0].{re.sub('_(.)', lambda found: found[1].upper(), name)}" for name in names}
    assert {change.key for change in CHANGES} == declared.keys() | ELSEWHERE | fields


def test_the_document_is_made_of_the_table() -> None:
    assert DOCUMENT.read_text() == rendered(), "python -m scripts.lib.changes writes it"
