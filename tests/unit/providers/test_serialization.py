"""A provider goes into the state by reference, so that an edit inside it is no change of a resource."""

from __future__ import annotations

import base64
import importlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pulumi.dynamic import ResourceProvider
from pulumi.dynamic.dynamic import serialize_provider

from components.providers.attestation import OciAttestationProvider
from components.providers.cargo import CargoBuildProvider
from components.providers.oci import OciArtifactProvider, OciSignatureProvider
from components.providers.registration import BootstrapTokenProvider, NodeRegistrationProvider
from components.providers.signature import SignatureProvider, SigningKeyProvider
from tests.unit.conftest import REPOSITORY

PROVIDERS: list[type[ResourceProvider]] = [
    CargoBuildProvider,
    OciArtifactProvider,
    OciAttestationProvider,
    OciSignatureProvider,
    BootstrapTokenProvider,
    NodeRegistrationProvider,
    SignatureProvider,
    SigningKeyProvider,
]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_provider_is_stored_as_nothing_but_its_name(provider: type[ResourceProvider]) -> None:
    stored = base64.b64decode(serialize_provider(provider()))
    assert len(stored) < 200
    assert isinstance(pickle.loads(stored), provider)  # noqa: S301 - it was made a line above
    assert provider.serialize_as_secret_always is False
    assert vars(provider()) == {}
    assert importlib.import_module(provider.__module__)


def test_an_edit_of_a_provider_s_source_leaves_what_is_stored_as_it_was(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "components", tmp_path / "components")
    before = _stored(tmp_path)
    source = tmp_path / "components" / "providers" / "cargo.py"
    text = source.read_text()
    edited = text.replace(
        '"""Take what', '"""Said otherwise."""\n        # A new comment.\n        """Take what', 1
    )
    assert edited != text
    source.write_text(edited)
    assert _stored(tmp_path) == before


def _stored(directory: Path) -> str:
    program = (
        "from pulumi.dynamic.dynamic import serialize_provider\n"
        "from components.providers.cargo import CargoBuildProvider\n"
        "print(serialize_provider(CargoBuildProvider()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, check=True
    )
    return answer.stdout
