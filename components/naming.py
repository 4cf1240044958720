"""What the parts of an app are called among the stack's resources."""

from __future__ import annotations

import pulumi

from components.config import AppConfig


def resource_name(part: str, app: AppConfig, apps: tuple[AppConfig, ...]) -> str:
    """Name a part of an app. Of a stack's only app it is the part's own name, whatever the app is called; of
    several it has the app's name too, and never its position, so that one that goes moves no other.
    """
    return part if len(apps) == 1 else f"{part}-{app.name}"


def former_names(part: str, app: AppConfig, apps: tuple[AppConfig, ...]) -> list[pulumi.Alias]:
    """Give what a part was called before a second app came, which stands behind the first, or went; and at
    first it was called as the app is.
    """
    if len(apps) == 1:
        return [pulumi.Alias(name=f"{part}-{app.name}"), pulumi.Alias(name=app.name)]
    return [pulumi.Alias(name=part)] if app is apps[0] else []


def former_keys(apps: tuple[AppConfig, ...]) -> list[pulumi.Alias]:
    """Give what the signing key was called when it was the only app's own."""
    artifact = "awesome-wasm:artifact:WasmArtifact"
    return [
        pulumi.Alias(name=f"{name}-key", parent=pulumi.create_urn(name, artifact))
        for name in ("app", apps[0].name)
    ]
