"""Reads values of the configuration and checks them; what is wrong is one line."""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, cast

import pulumi

from components.providers.kms import KmsError, is_reference, version_name
from components.providers.signature import SignatureError, read_key

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# A host as the agent takes it: a name, `*.` before it for all below it, an address; with or without a port.
_HOST = re.compile(r"((\*\.)?[\w-]+(\.[\w-]+)*\.?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
NAME_RULE = (
    "a lower-case letter, then up to 62 lower-case letters, digits and hyphens, not ending in a hyphen"
)


class ConfigError(pulumi.RunError):
    """A value cannot be used; the CLI shows the message, which is one line, and no traceback."""

    def __init__(self, key: str, given: object, allowed: str) -> None:
        super().__init__(f"configuration {key}: {given!r} was given; allowed: {allowed}")


class _Source(Protocol):
    """Where values are, as pulumi.Config gives them."""

    def get(self, key: str) -> str | None: ...
    def get_int(self, key: str) -> int | None: ...
    def get_bool(self, key: str) -> bool | None: ...
    def get_object(self, key: str) -> Any: ...
    def get_secret(self, key: str) -> pulumi.Output[str] | None: ...


class _Fields:
    """The fields of an object within a value."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def get(self, key: str) -> str | None:
        value = self._fields.get(key)
        return value if value is None or isinstance(value, str) else json.dumps(value)

    def get_int(self, key: str) -> int | None:
        value = self.get(key)
        return None if value is None else int(value)

    def get_bool(self, key: str) -> bool | None:
        return self._fields.get(key)

    def get_object(self, key: str) -> Any:
        return self._fields.get(key)

    def get_secret(self, key: str) -> pulumi.Output[str] | None:
        return self._fields.get(key)


class Reader:
    """Reads keys of one namespace and names them in errors as `pulumi config set` does."""

    def __init__(self, config: _Source, prefix: str = "") -> None:
        self._config = config
        self._prefix = prefix
        self._read = set[str]()

    def check_names(self, given: Iterable[str]) -> None:
        """Refuse a key that nobody has read: its value would be lost without a word."""
        for key in sorted(set(given) - self._read):
            # By the letters alone, so that clustername is clusterName.
            spelled = {known.lower(): known for known in self._read}
            near = difflib.get_close_matches(key.lower(), spelled, n=1)
            hint = f"did you mean {spelled[near[0]]}? " if near else ""
            named = f"{self._prefix}{key}"
            remove = f"--path '{named}'" if "[" in named else named
            raise pulumi.RunError(
                f"configuration {named}: there is no such key; {hint}`pulumi config rm {remove}` removes it"
            )

    def fields(self, key: str, value: object, defaults: dict[str, Any], allowed: str) -> Reader:
        """Give a reader of an object within a value."""
        if not isinstance(value, dict):
            raise self.error(key, value, allowed)
        return Reader(_Fields({**defaults, **value}), f"{self._prefix}{key}.")

    def _given(self, key: str, get: Callable[[str], Any], allowed: str) -> Any:
        self._read.add(key)
        try:
            value = get(key)
        except (pulumi.ConfigTypeError, ValueError):
            raise self.error(key, self._config.get(key), allowed) from None
        if value is None:
            raise self.error(key, None, allowed)
        return value

    def error(self, key: str, given: object, allowed: str) -> ConfigError:
        return ConfigError(f"{self._prefix}{key}", given, allowed)

    def text(self, key: str, pattern: re.Pattern[str], allowed: str) -> str:
        value = cast(str, self._given(key, self._config.get, allowed))
        if not pattern.fullmatch(value):
            raise self.error(key, value, allowed)
        return value

    def one_of(self, key: str, values: tuple[str, ...]) -> str:
        allowed = ", ".join(values)
        value = cast(str, self._given(key, self._config.get, allowed))
        if value not in values:
            raise self.error(key, value, allowed)
        return value

    def integer(self, key: str, least: int, most: int) -> int:
        allowed = f"a whole number from {least} to {most}"
        value = cast(int, self._given(key, self._config.get_int, allowed))
        if not least <= value <= most:
            raise self.error(key, value, allowed)
        return value

    def boolean(self, key: str) -> bool:
        return cast(bool, self._given(key, self._config.get_bool, "true or false"))

    def network(self, key: str, longest: int) -> str:
        allowed = f"a private IPv4 network, as in 10.0.0.0/16, with a prefix of at most {longest} bits"
        value = cast(str, self._given(key, self._config.get, allowed))
        try:
            network = ipaddress.IPv4Network(value)
        except ValueError:
            raise self.error(key, value, allowed) from None
        if not network.is_private or network.prefixlen > longest:
            raise self.error(key, value, allowed)
        # Google takes neither for a network, and Kubernetes neither for an endpoint of a Service.
        if network.is_loopback or network.is_link_local:
            raise self.error(key, value, f"{allowed}, and neither loopback nor link-local")
        return value

    def items(self, key: str, allowed: str) -> list[Any]:
        values = self._given(key, self._config.get_object, allowed)
        if not isinstance(values, list):
            raise self.error(key, values, allowed)
        return values

    def optional(self, key: str) -> Any:
        """Give a value, None where there is none."""
        self._read.add(key)
        return self._config.get_object(key)

    def environment(self, key: str) -> dict[str, str]:
        allowed = "a map of variables' names to plain values"
        values = self._given(key, self._config.get_object, allowed)
        if not isinstance(values, dict):
            raise self.error(key, values, allowed)
        for name, value in values.items():
            if not isinstance(value, str | int | float) or "\0" in str(value):
                raise self.error(f"{key}.{name}", value, "a plain value")
            if not _VARIABLE.fullmatch(name):
                raise self.error(key, name, "a variable's name, as in LOG_LEVEL")
        return {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()
        }

    def hosts(self, key: str) -> tuple[str, ...]:
        allowed = "host or host:port, *.domain for all below it, as in api.example.com:8443"
        values = self.items(key, f"a list, each {allowed}")
        for number, value in enumerate(values):
            found = _HOST.fullmatch(value) if isinstance(value, str) else None
            if not found or not 0 < int((found[4] or ":1")[1:]) < 65536:
                raise self.error(f"{key}[{number}]", value, allowed)
        return tuple(values)

    def networks(self, key: str) -> tuple[str, ...]:
        # A firewall rule of Google's takes the one or the other.
        allowed = "a list of networks in CIDR form, at least one, all of IPv4 or all of IPv6"
        values = self.items(key, allowed)
        if not values:
            raise self.error(key, values, allowed)
        versions = set()
        for value in values:
            try:
                # A number would be taken for an address.
                versions.add(ipaddress.ip_network(str(value)).version)
            except ValueError:
                raise self.error(key, value, allowed) from None
        if len(versions) > 1:
            raise self.error(key, values, allowed)
        return tuple(values)

    def cidrs(self, key: str) -> tuple[str, ...]:
        allowed = "a list of IPv4 networks in CIDR form, or an empty one"
        values = self.items(key, allowed)
        for value in values:
            try:
                ipaddress.IPv4Network(str(value))  # a number would be taken for an address
            except ValueError:
                raise self.error(key, value, allowed) from None
        return tuple(values)

    def crate(self, key: str) -> str:
        allowed = "a directory with a Cargo.toml, relative to Pulumi.yaml"
        value = cast(str, self._given(key, self._config.get, allowed))
        if not (Path(value) / "Cargo.toml").is_file():
            raise self.error(key, value, allowed)
        return value

    def refuse(self, key: str, allowed: str) -> None:
        """Take no value, which may be a secret, for a key."""
        if self._config.get(key):
            raise self.error(key, "[a value]", allowed)

    def secret(self, key: str) -> pulumi.Output[str] | None:
        self._read.add(key)
        return self._config.get_secret(key) if self._config.get(key) else None

    def kms_key(self, key: str) -> str | None:
        """Give the reference of a key in Cloud KMS, where that is the key."""
        reference = self._config.get(key) or ""
        if not is_reference(reference):
            return None
        try:
            version_name(reference)
        except KmsError as error:
            raise self.error(key, reference, str(error)) from None
        return reference

    def check_signing_key(self, key: str, password: str) -> None:
        """Read the key, and show nothing of it or of what went wrong inside it."""
        pem = self._config.get(key)
        if not pem:
            return
        try:
            read_key(pem, self._config.get(password) or "")
        except SignatureError as error:
            raise self.error(key, "[secret]", str(error)) from None
