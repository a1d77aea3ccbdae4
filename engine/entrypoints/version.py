"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version


def version() -> str:
    try:
        return distribution_version("twinfer")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+source"
