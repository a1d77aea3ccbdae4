"""The conformance suite on the JAX runner, and on its step for a GPU with interpreted kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends.jax import mesh, programs, stacks
from backends.jax.runner import Runner
from engine.runner import ModelRunner
from pallas_kernels import dispatch
from tests.backends.conformance import Conformance


class TestJax(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Runner()


class TestGpuStep(Conformance):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def as_on_a_gpu(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "choose_kernel", lambda platform, head_size: "gpu_interpreted")
            patch.setattr(programs, "HELD_ON", ("cpu",))
            patch.setattr(stacks, "stacks_norms", lambda platform: True)
            patch.setattr(mesh, "dispatches_apart", lambda platform: True)
            yield

    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Runner()
