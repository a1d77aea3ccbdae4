"""The conformance suite on the torch runner through torch-xla: `make test-torch-xla`, on PJRT's CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.runner import ModelRunner
from tests.backends import driver
from tests.backends.conformance import Conformance

pytest.importorskip("torch_xla", reason="needs torch 2.9 and torch-xla 2.9: make test-torch-xla")

from backends.torch.runner import Runner


@pytest.fixture(scope="class", autouse=True)
def on_xla() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "DEVICE", "xla")
        yield


class TestXla(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Runner()
