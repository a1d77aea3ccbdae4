"""--device xla where torch-xla is not installed, and beside another backend: one line with the remedy."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from engine.core.start import choose_backend
from engine.errors import ConfigError
from engine.runner import load_runner


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch-xla is installed")
def test_without_torch_xla() -> None:
    pytest.importorskip("torch", reason="the torch extra is not installed")
    with pytest.raises(ConfigError, match=r"--device: 'xla' needs torch-xla.*'twinfer\[torch-xla\]'") as said:
        load_runner("torch").describe("xla")
    assert "\n" not in str(said.value)


def test_which_backend_it_is_of() -> None:
    assert choose_backend("auto", "xla").name == choose_backend("torch", "xla").name == "torch"
    with pytest.raises(ConfigError, match="--backend torch"):
        choose_backend("jax", "xla")
