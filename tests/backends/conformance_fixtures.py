"""Fixtures and yardsticks of the conformance suite: runners that most tests share, and one sequence computed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from engine.runner import Capability, ModelRunner
from tests.backends.driver import Driver, Seq, llama

OUTPUTS = 6
PROMPTS = (37, 5, 20, 1, 33)
TOLERANCE = 2e-4  # of a logprob in float32, between two orders of summation


class Fixtures:
    """Inherit and define make_runner."""

    @classmethod
    def make_runner(cls) -> ModelRunner:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls) -> Iterator[Driver]:
        driver = Driver(cls.make_runner(), seed=1)
        yield driver
        driver.runner.shutdown()

    @pytest.fixture(scope="class")
    @classmethod
    def second(cls) -> Iterator[Driver]:
        """A runner that no test but the comparisons with a fresh one uses."""
        driver = Driver(cls.make_runner(), seed=2)
        yield driver
        driver.runner.shutdown()

    @pytest.fixture(scope="class")
    @classmethod
    def shared_windowed(cls) -> Iterator[Driver]:
        driver = Driver(cls.make_runner(), llama(windows=(20, None)), seed=3)
        yield driver
        driver.runner.shutdown()

    @pytest.fixture
    def d(self, shared: Driver) -> Iterator[Driver]:
        yield shared
        shared.clean_up()

    @pytest.fixture
    def fresh(self, second: Driver) -> Iterator[Driver]:
        yield second
        second.clean_up()

    @pytest.fixture
    def windowed(self, shared_windowed: Driver) -> Iterator[Driver]:
        yield shared_windowed
        shared_windowed.clean_up()

    def need(self, d: Driver, capability: Capability) -> None:
        if capability not in d.device.capabilities:
            pytest.skip(f"{capability.value} is not announced")

    def alone(self, d: Driver, prompt: Sequence[int], num_outputs: int = OUTPUTS, **sampling: object) -> Seq:
        """The yardstick: one-shot prefill, nobody else there."""
        seq = d.new(prompt, num_logprobs=0, **sampling)
        d.generate([seq], num_outputs, chunk=64)
        d.close(seq)
        return seq

    def same(self, got: Seq, wanted: Seq) -> None:
        assert got.outputs == wanted.outputs
        np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=TOLERANCE)
