"""The conformance suite on the JAX runner's step for a TPU: stacked weights, a scan, interpreted kernels.

With KV pages of float32 and of int8.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends.jax import stacks
from backends.jax.runner import Runner
from engine.runner import ModelRunner
from pallas_kernels import dispatch
from tests.backends import driver
from tests.backends.conformance import Conformance
from tests.backends.driver import Driver, llama
from tests.backends.int8_runner import Int8Runner


@pytest.fixture(scope="class", autouse=True)
def as_on_a_tpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose_kernel", lambda platform, head_size: "tpu_interpreted")
        patch.setattr(stacks, "stacks_layers", lambda platform: True)
        patch.setattr(driver, "PAGE", 128)
        yield


class TestTpu(Conformance):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Runner()

    # these ask for pages of 16 tokens; with pages of 128 the two below ask the same
    test_pages_behind_a_window_may_be_given_away = None
    test_shared_and_copied_pages = None
    test_many_rows_at_once = None


class TestTpuInt8(TestTpu):
    @classmethod
    def make_runner(cls) -> ModelRunner:
        return Int8Runner()


def make(runner: type[Runner] = Runner, **options: object) -> Driver:
    return Driver(runner(), max_model_len=384, **options)


def outputs(d: Driver, prompt: list[int], count: int) -> list[int]:
    seq = d.new(prompt)
    d.generate([seq], count)
    d.close(seq)
    return seq.outputs


@pytest.mark.parametrize("runner", [Runner, Int8Runner])
def test_shared_and_copied_pages_of_128(runner: type[Runner]) -> None:
    """A whole page by reference, and 16 and 32 tokens of the next by copy."""
    d = make(runner, seed=5)
    source = d.new(d.prompt(190))
    d.generate([source], 2)
    for shared in (128, 144, 160):
        prompt = [*source.tokens[:shared], 3, 5]
        seq = d.new(prompt)
        copies = d.share(seq, source, shared)
        assert (copies is None) == (shared == 128)
        d.step([(seq, 2)], **({} if copies is None else {"copies": copies}))
        d.generate([seq], 4)
        d.close(seq)
        assert seq.outputs == outputs(d, prompt, 4)


@pytest.mark.parametrize("runner", [Runner, Int8Runner])
def test_a_page_behind_a_window_may_be_given_away(runner: type[Runner]) -> None:
    d = make(runner, arch=llama(windows=(20, None)), seed=6)
    prompt = d.prompt(160)
    wanted = outputs(d, prompt, 8)
    seq = d.new(prompt)
    d.generate([seq], 3)
    group = next(i for i, g in enumerate(d.layout.groups) if g.spec.window is not None)
    seq.borrowed.add((group, seq.pages[group][0]))  # tokens [0, 128) of 162
    pool = d.layout.groups[group].pool
    others, d.free_pages[pool] = d.free_pages[pool], [seq.pages[group][0], d.free_pages[pool].pop()]
    stranger = d.new(d.prompt(40))
    d.step([(stranger, 40)])
    assert seq.pages[group][0] in {page for pages in stranger.pages for page in pages}
    d.free_pages[pool] = others
    d.generate([seq], 8)
    assert seq.outputs == wanted
