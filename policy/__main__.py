#!/usr/bin/env -S python3 -u
"""The policy pack, run by ./scripts/preview, or: `pulumi preview --policy-pack policy/__main__.py`.

As a program: a directory is run by newer language hosts only than the one that is built from source.
Unbuffered: the port that the engine waits for is written and not flushed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pulumi_policy import (
    EnforcementLevel,
    PolicyPack,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
)
from pulumi_policy.secret import Secret
from rules import RULES, Resource, Rule

_secrets: dict[str, set[str]] = {}
"""Which metadata of a VM are secret, by its URN. Only a remediation is told, which the engine asks first."""


def _plain(value: Any) -> Any:
    """A value without the proxies around each part of it, in which what is not known yet is an exception."""
    if isinstance(value, Mapping):
        items = value if isinstance(value, dict) else value["__target"]
        return {key: _plain(item) for key, item in items.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = value if isinstance(value, list) else value["__target"]
        return [_plain(item) for item in items]
    return value


def _note_secrets(args: Any) -> None:
    metadata = _plain(args.props).get("metadata")
    if isinstance(metadata, Secret):
        _secrets[args.urn] = set(_plain(metadata.value))
    elif isinstance(metadata, dict):
        _secrets[args.urn] = {key for key, value in metadata.items() if isinstance(value, Secret)}


def _policy(name: str, rule: Rule) -> ResourceValidationPolicy:
    def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
        stack = args.urn.split(":", 3)[2]
        secrets = _secrets.get(args.urn, ())
        for violation in rule(Resource(args.resource_type, _plain(args.props), stack, secrets)):
            report(violation)

    return ResourceValidationPolicy(
        name=name,
        description=(rule.__doc__ or name).strip(),
        validate=validate,
        remediate=_note_secrets if name == "no-secret-in-metadata" else None,
        enforcement_level=EnforcementLevel.REMEDIATE
        if name == "no-secret-in-metadata"
        else EnforcementLevel.MANDATORY,
    )


PolicyPack("awesome-wasm", policies=[_policy(name, rule) for name, rule in RULES.items()])
