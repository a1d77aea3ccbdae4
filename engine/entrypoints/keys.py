"""The API key from the environment, so that it need not stand in a command line that every user can read."""

from __future__ import annotations

import os


def key_from_environment() -> str | None:
    return os.environ.get("TWINFER_API_KEY") or None
