"""The one table of environment variables. Behaviour is set by flags; these are for secrets, places and logs.

Standard library only. `collect-env` prints the table; `docs/cli.md` lists it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    meaning: str
    secret: bool = False


VARIABLES = (
    Variable(
        "TWINFER_API_KEY", "the key that clients must send; also used by chat, complete and bench serve", secret=True
    ),
    Variable("TWINFER_CACHE_DIR", "where compiled programs are kept; empty = keep none; default ~/.cache/twinfer"),
    Variable("HF_TOKEN", "token for gated repositories on the Hugging Face hub", secret=True),
    Variable("HF_HOME", "where huggingface_hub keeps downloads"),
    Variable("HF_HUB_OFFLINE", "1 = never ask the hub"),
    Variable("HF_ENDPOINT", "another hub"),
    Variable("JAX_PLATFORMS", "which platform jax takes: cpu, cuda or tpu"),
    Variable("PJRT_DEVICE", "what --device xla runs on: CPU or TPU; by default what torch-xla finds"),
    Variable("CUDA_VISIBLE_DEVICES", "which GPUs are seen"),
)


def read(name: str, get: Callable[[str], str | None] = os.environ.get) -> str | None:
    """The value of a variable of the table. Raises KeyError for a name that is not in it."""
    if name not in {variable.name for variable in VARIABLES}:
        raise KeyError(f"{name} is not in the table of environment variables")
    return get(name)


def cache_dir() -> Path | None:
    """Where compiled programs are kept, None when nothing is to be kept. Not created here."""
    given = read("TWINFER_CACHE_DIR")
    if given is not None:
        return Path(given).expanduser() if given else None
    home = Path("~").expanduser()
    return home / ".cache" / "twinfer" if home.is_dir() else None
