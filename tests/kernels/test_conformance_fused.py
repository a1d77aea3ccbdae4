"""The conformance suite over the fused kernels and the bodies of the decode graphs, in triton's interpreter on a CPU.

On a GPU tests/backends/test_conformance_torch.py asks the same of the captured graphs (TWINFER_TEST_DEVICE=cuda).
"""

from __future__ import annotations

import pytest

from tests.kernels import interpreter

torch_runner = pytest.importorskip("backends.torch.runner", reason="the torch extra is not installed")
if interpreter.DEVICE.type != "cpu":
    pytest.skip("on a GPU tests/backends/test_conformance_torch.py asks the captured graphs", allow_module_level=True)

from engine.runner import ModelRunner  # noqa: E402
from tests.backends.conformance import Conformance  # noqa: E402
from tests.backends.driver import Driver  # noqa: E402


@pytest.mark.slow
class TestFused(Conformance):
    """The interpreter takes minutes for all of it."""

    @classmethod
    def make_runner(cls) -> ModelRunner:
        runner: ModelRunner = torch_runner.Runner()
        return runner


class TestFusedBriefly(Conformance):
    """A few of the suite's tests; the others are hidden."""

    make_runner = TestFused.make_runner

    def test_is_fused(self, d: Driver) -> None:
        assert type(d.runner._work).__name__ == "GpuSteps"


KEPT = {
    "test_is_fused",
    "test_order_and_depth",
    "test_rows_that_do_not_sample",
    "test_mixed_rows",
    "test_seeds",
    "test_up_to_the_model_length",
    "test_result_types",
}
for name in dir(Conformance):
    if name.startswith("test_") and name not in KEPT:
        setattr(TestFusedBriefly, name, None)
