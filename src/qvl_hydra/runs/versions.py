"""Versions of installed packages, for the records of runs and exports."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package; one that is not installed is left out."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_sha() -> str:
    """Hash over this package's own source, which a checkout changes without a new version."""
    digest, package = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
