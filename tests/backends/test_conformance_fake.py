"""The conformance suite on the fake runner, which also checks that the suite's own plans keep the contract."""

from __future__ import annotations

from backends.fake import Runner
from engine.runner import ModelRunner
from tests.backends.conformance import Conformance


class TestFake(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Runner()
