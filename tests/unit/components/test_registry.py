"""The spelling of image names."""

from components.registry import image_prefix


def test_a_repository_named_gcr_io_keeps_the_old_spelling_on_google() -> None:
    assert image_prefix("us-docker.pkg.dev/p/gcr.io", "p", "gcr.io") == "gcr.io/p"
    assert image_prefix("us-docker.pkg.dev/d.com/p/gcr.io", "d.com:p", "gcr.io") == "gcr.io/d.com/p"


def test_any_other_repository_is_spelled_as_the_registry_says() -> None:
    uri = "europe-west1-docker.pkg.dev/p/apps"
    assert image_prefix(uri, "p", "apps") == uri
    assert image_prefix("127.0.0.1:5000/p/gcr.io", "p", "gcr.io") == "127.0.0.1:5000/p/gcr.io"
