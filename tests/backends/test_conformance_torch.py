"""The conformance suite on the torch runner."""

from __future__ import annotations

import pytest

from engine.runner import ModelRunner
from tests.backends.conformance import Conformance

torch_runner = pytest.importorskip("backends.torch.runner", reason="the torch extra is not installed")


class TestTorch(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        runner: ModelRunner = torch_runner.Runner()
        return runner
