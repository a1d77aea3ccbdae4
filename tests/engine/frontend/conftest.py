"""Tokenizers and checkpoint folders, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.frontend.tokenizer import Tokenizer, load_tokenizer
from tests.engine.frontend.checkpoints import KINDS, make_folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}
