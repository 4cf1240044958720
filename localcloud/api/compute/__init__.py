"""Compute Engine v1 and beta."""
