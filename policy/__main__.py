#!/usr/bin/env python3
"""The policy pack, run by ./scripts/preview, or: `pulumi preview --policy-pack policy/__main__.py`.

As a program: a directory is run by newer language hosts only than the one that is built from source.
"""

from __future__ import annotations

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


def _note_secrets(args: Any) -> None:
    metadata = args.props["__target"].get("metadata")
    if isinstance(metadata, Secret):
        _secrets[args.urn] = set(metadata.value)
    elif isinstance(metadata, dict):
        _secrets[args.urn] = {key for key, value in metadata.items() if isinstance(value, Secret)}


def _policy(name: str, rule: Rule) -> ResourceValidationPolicy:
    def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
        stack = args.urn.split(":", 3)[2]
        # As they are: what is not known yet is an exception otherwise.
        props = args.props["__target"]
        for violation in rule(Resource(args.resource_type, props, stack, _secrets.get(args.urn, ()))):
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
