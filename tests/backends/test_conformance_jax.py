"""The conformance suite on the JAX runner."""

from __future__ import annotations

from backends.jax.runner import Runner
from engine.runner import ModelRunner
from tests.backends.conformance import Conformance


class TestJax(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Runner()
