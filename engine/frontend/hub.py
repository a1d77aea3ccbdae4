"""A model name becomes a folder: "" is the model that ships with the package, a path is itself, ORG/NAME is fetched.

Fetching is huggingface_hub's snapshot_download: its cache, token, HF_ENDPOINT, HF_HUB_OFFLINE and progress bars. The
revision is resolved to a commit once and every file is asked for by that commit; a pinned commit that is complete in
the cache needs no network. Only safetensors, JSON, chat templates and tokenizer tables are fetched, no pickles or code.
Every failure is a StartupError of one line: the cause, then the remedy.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.errors import ConfigError, StartupError

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "data" / "default_model"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TEXT_FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt")
WEIGHT_FILES = ("*.safetensors",)
# Folders hold other exports (onnx/, original/); consolidated files are the same weights under Mistral's own names.
UNWANTED = ("*/*.safetensors", "*/*.json", "consolidated*")


def resolve_model(
    name_or_path: str,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    *,
    offline: bool = False,
    weights: bool = True,
    endpoint: str | None = None,
) -> Path:
    """The local folder of a model. Raises StartupError (ConfigError for a name that cannot be one).

    download_dir: the cache folder, huggingface_hub's own when None. offline: use the cache alone; HF_HUB_OFFLINE=1 does
    the same. weights False leaves the *.safetensors out (a tokenizer's repository). endpoint: a hub other than
    HF_ENDPOINT's.
    """
    folder = local_folder(name_or_path)
    if folder is not None:
        if revision is not None:
            raise ConfigError(
                f"--revision: {revision!r} needs a hub name ORG/NAME; {folder} is a folder on this machine"
            )
        return folder
    if not REPO_ID.fullmatch(name_or_path) or ".." in name_or_path or "--" in name_or_path:
        raise ConfigError(f"--model: {name_or_path!r} is neither a folder here nor a hub name ORG/NAME")
    shown = name_or_path if revision is None else f"{name_or_path} at revision {revision}"
    try:
        found = snapshot_download(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=download_dir,
            local_files_only=offline,
            allow_patterns=[*TEXT_FILES, *(WEIGHT_FILES if weights else ())],
            ignore_patterns=list(UNWANTED),
            endpoint=endpoint,
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise StartupError(f"{shown}: {explain(error, offline)}") from error
    folder = Path(found)
    if weights and not any(folder.glob("*.safetensors")):
        raise StartupError(
            f"{shown}: the repository has no *.safetensors; "
            "convert its weights with save_pretrained of transformers and give that folder"
        )
    return folder


def local_folder(name_or_path: str) -> Path | None:
    """The folder that the name means on this machine, None for a hub name. Raises StartupError."""
    if not name_or_path:
        if not DEFAULT_MODEL.is_dir():
            raise StartupError(f"the default model is missing at {DEFAULT_MODEL}; install the package again")
        return DEFAULT_MODEL
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise StartupError(f"{path}: a file; give the folder with its config.json, tokenizer.json and *.safetensors")
    looks_local = name_or_path.startswith((".", "/", "~")) or "\\" in name_or_path or name_or_path.count("/") > 1
    if looks_local:
        raise StartupError(f"{path}: no such folder; give a folder with config.json, or a hub name ORG/NAME")
    return None


def explain(error: Exception, offline: bool) -> str:
    """One line for what huggingface_hub tells in several."""
    if isinstance(error, GatedRepoError):
        return "gated; accept its licence on the hub, then give a token (--hf-token or HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return "not found on the hub, or private; check the name, or give a token (--hf-token or HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; check --revision"
    if isinstance(error, HFValidationError):
        return "not a valid hub name; expected ORG/NAME"
    if isinstance(error, LocalEntryNotFoundError):
        if offline or "HF_HUB_OFFLINE" in str(error):
            return "not (completely) in the cache and offline; run once with network, or unset HF_HUB_OFFLINE"
        return "not (completely) in the cache and the hub cannot be reached; check the network or HF_ENDPOINT"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"download failed ({first}); check the network and the free disk space, then try again"
