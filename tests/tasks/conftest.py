"""Shares the empty store of the tracking tests."""

from tests.tracking.conftest import empty_store

__all__ = ["empty_store"]
