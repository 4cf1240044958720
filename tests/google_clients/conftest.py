"""Google's newer clients, in a process of their own: pulumi has other messages of the same names in it."""

from tests.unit.localcloud_api.conftest import backends, client, home, server

__all__ = ["backends", "client", "home", "server"]
