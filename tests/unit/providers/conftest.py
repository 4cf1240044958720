"""A localcloud's API, as what is signed by a key in Cloud KMS asks it."""

from tests.unit.localcloud_api.conftest import backends, home, server

__all__ = ["backends", "home", "server"]
