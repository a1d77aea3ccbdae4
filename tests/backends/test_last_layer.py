"""The last layer of a long step over its sampled tokens alone, on a CPU without triton; tests/kernels has the rest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.torch.eager import EagerSteps  # noqa: E402
from backends.torch.runner import Runner  # noqa: E402
from engine.specs.arch import ArchSpec  # noqa: E402
from engine.step import PromptLogprobs  # noqa: E402
from tests.backends.driver import PAGE, Driver  # noqa: E402
from tests.backends.last_layer import ARCHS, STEPS, check_same, served  # noqa: E402
from torch_models import last_layer  # noqa: E402
from torch_models.decoder import Decoder  # noqa: E402


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sampled rows of each step that cuts its last layer."""
    monkeypatch.setattr(EagerSteps, "least_tokens", 6)
    found = []
    plain: Callable[..., torch.Tensor] = last_layer.behind

    def counted(decoder: Decoder, x: torch.Tensor, *rest: object) -> torch.Tensor:
        found.append(len(x))
        return plain(decoder, x, *rest)

    monkeypatch.setattr(last_layer, "behind", counted)
    return found


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_as_the_whole_layer(arch: ArchSpec, behind: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cut = served(arch, "cpu")
    assert behind == [rows for _, rows in STEPS if rows]
    monkeypatch.setattr(EagerSteps, "least_tokens", None)
    check_same(cut, served(arch, "cpu"), slice(PAGE, None))
    assert len(behind) == 2


def test_what_takes_every_token(behind: list[int]) -> None:
    """Scores of prompt tokens, short steps, steps that are sampled from everywhere."""
    driver = Driver(Runner(), seed=5)
    seqs = [driver.new(driver.prompt(length)) for length in (20, 5, 3, 3, 3)]
    ids = np.arange(3, dtype=np.int32)
    driver.step([(seqs[0], 10)], prompt_logprobs=PromptLogprobs(token_idx=ids, targets=ids, num_top=0))
    driver.step([(seqs[1], 5)])
    driver.step([*((driver.new(driver.prompt(1)), 1) for _ in range(3)), (seqs[2], 3)])
    driver.step([(seqs[3], 3), (seqs[4], 3)])
    assert behind == [2]
