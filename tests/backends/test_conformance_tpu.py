"""The conformance suite on the JAX runner's step for a TPU: stacked weights, a scan, the kernels in Pallas's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends.jax import weights
from backends.jax.runner import Runner
from engine.runner import ModelRunner
from pallas_kernels import dispatch
from tests.backends import driver
from tests.backends.conformance import Conformance


@pytest.fixture(scope="class", autouse=True)
def as_on_a_tpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose_kernel", lambda platform, head_size: "tpu_interpreted")
        patch.setattr(weights, "stacks_layers", lambda platform: True)
        patch.setattr(driver, "PAGE", 128)
        yield


class TestTpu(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Runner()
