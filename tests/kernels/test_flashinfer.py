"""Long steps by FlashInfer against our own attention, through the whole runner.

Without a GPU a stand-in computes what was planned in plain torch; with one and the package installed, the package does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import DEVICE  # before triton

pytest.importorskip("triton")

from backends.torch import memory
from backends.torch.gpu import GpuSteps
from backends.torch.runner import Runner
from cuda_kernels import flashinfer_attention
from cuda_kernels.flashinfer_attention import PLAN_BYTES, WORKSPACE_BYTES, FlashInfer, PagedRows
from engine.errors import ConfigError
from engine.specs.arch import ArchSpec
from tests.backends.driver import Driver, Seq, llama

REAL = DEVICE.type == "cuda" and find_spec("flashinfer") is not None
OURS = "auto"


@dataclass
class Planned:
    starts: list[int]
    page_starts: list[int]
    indices: Tensor
    last: list[int]
    page: int
    scale: float
    window_left: int
    cap: float | None


class Wrapper:
    """What the package documents of its wrapper, row by row in float32."""

    made: ClassVar[list[Wrapper]] = []

    def __init__(self, space: Tensor, layout: str, backend: str) -> None:
        assert (space.numel(), layout, backend) == (WORKSPACE_BYTES, "HND", "fa2")
        self.plans: list[Planned] = []
        Wrapper.made.append(self)

    def plan(
        self, starts: Tensor, page_starts: Tensor, indices: Tensor, last: Tensor, heads: int, kv_heads: int, size: int,
        page: int, *, causal: bool, sm_scale: float, window_left: int, logits_soft_cap: float | None,
        q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal and q_data_type == kv_data_type and heads % kv_heads == 0
        assert [x.dtype for x in (starts, page_starts, indices, last)] == [torch.int32] * 4
        parts = (starts.tolist(), page_starts.tolist(), indices.clone(), last.tolist())
        self.plans.append(Planned(*parts, page, sm_scale, window_left, logits_soft_cap))

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        p, out = self.plans[-1], torch.zeros_like(q)
        for row, (first, end) in enumerate(zip(p.starts, p.starts[1:], strict=False)):
            held = p.indices[p.page_starts[row] : p.page_starts[row + 1]].long()
            keys = (len(held) - 1) * p.page + p.last[row]
            k, v = (part[held].transpose(1, 2).flatten(0, 1)[:keys].float() for part in pages)
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = torch.einsum("qnh,knh->nqk", q[first:end].float(), k) * p.scale
            if p.cap:
                scores = p.cap * torch.tanh(scores / p.cap)
            at = torch.arange(keys - (end - first), keys)[:, None]
            seen = torch.arange(keys)[None] <= at
            if p.window_left >= 0:
                seen &= torch.arange(keys)[None] >= at - p.window_left
            scores = scores.masked_fill(~seen, float("-inf"))
            out[first:end] = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).to(q.dtype)
        return out


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer, or the stand-in; every prompt step is a long one."""
    if DEVICE.type == "cuda" and not REAL:
        pytest.skip("flashinfer is not installed")
    monkeypatch.setattr(GpuSteps, "make_mixed", lambda *_: None)
    if not REAL:
        Wrapper.made = []
        module = ModuleType("flashinfer.prefill")
        module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
        monkeypatch.setitem(sys.modules, "flashinfer.prefill", module)


def capped() -> ArchSpec:
    spec = llama(windows=(None, 20))
    return replace(spec, layers=tuple(
        replace(layer, mixer=replace(layer.mixer, logit_cap=5.0)) for layer in spec.layers
    ))  # fmt: skip


def served(arch: ArchSpec, attention: str, **config: object) -> list[Seq]:
    """Prompts in chunks beside decoding rows; then four tokens of each."""
    driver = Driver(Runner(), arch, seed=5, device=DEVICE.type, attention_backend=attention, **config)
    seqs = [driver.new(driver.prompt(length), num_logprobs=0) for length in (40, 30, 9)]
    driver.step([(seqs[0], 25)])
    driver.step([(seqs[0], 8), (seqs[2], 9)])
    driver.step([(seqs[2], 1), (seqs[0], 7), (seqs[1], 30)])
    for _ in range(3):
        driver.step([(seq, 1) for seq in seqs])
    driver.runner.shutdown()
    return seqs


@pytest.mark.skipif(REAL, reason="the package has no kernels of float32")
@pytest.mark.parametrize("arch", [llama(), llama(windows=(20, None)), capped()], ids=["plain", "window", "capped"])
def test_the_same_tokens_as_ours(arch: ArchSpec, package: None) -> None:
    found, wanted = served(arch, "FLASHINFER"), served(arch, OURS)
    for ours, theirs in zip(wanted, found, strict=True):
        assert ours.outputs == theirs.outputs
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
    assert sum(len(wrapper.plans) for wrapper in Wrapper.made) >= 3
    kinds = {(p.window_left, p.cap) for wrapper in Wrapper.made for p in wrapper.plans}
    assert kinds == {(-1 if x.mixer.window is None else x.mixer.window - 1, x.mixer.logit_cap) for x in arch.layers}


def test_rows_of_pages(package: None) -> None:
    """One call against plain attention: chunks, rows of one token, uneven last pages. bf16 where the package runs."""
    heads, kv_heads, size, page = 8, 2, 128, 64
    new, before = np.array([5, 130, 1, 70]), np.array([0, 70, 200, 58])
    dtype = torch.bfloat16 if REAL else torch.float32
    generator = torch.Generator(DEVICE).manual_seed(0)
    cache = torch.randn(2, 2, 20, kv_heads, page, size, generator=generator, device=DEVICE).to(dtype)
    table = torch.zeros(6, 5, dtype=torch.int32, device=DEVICE)
    table[1:5] = torch.randperm(19, generator=generator, device=DEVICE)[:16].view(4, 4).repeat(1, 2)[:, :5].int() + 1
    table[1:5, 4] = 0
    slots = torch.tensor([3, 1, 4, 2], device=DEVICE)
    q = torch.randn(int(new.sum()), heads, size, generator=generator, device=DEVICE).to(dtype)
    rows = PagedRows(
        FlashInfer(DEVICE, 2), 0, new, before, table, slots, lambda x: torch.from_numpy(x).to(DEVICE), page
    )
    found = rows.attend(q, cache, 1, scale=size**-0.5, window=None, logit_cap=None)
    first = 0
    for row, (count, keys) in enumerate(zip(new.tolist(), (new + before).tolist(), strict=True)):
        held = table[slots[row], : -(-keys // page)].long()
        k, v = (cache[1, i, held].transpose(1, 2).flatten(0, 1)[:keys].float() for i in (0, 1))
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        scores = torch.einsum("qnh,knh->nqk", q[first : first + count].float(), k) * size**-0.5
        late = torch.arange(keys, device=DEVICE)[None] > torch.arange(keys - count, keys, device=DEVICE)[:, None]
        wanted = torch.einsum("nqk,knh->qnh", scores.masked_fill(late, float("-inf")).softmax(-1), v)
        close = 2e-2 if REAL else 1e-5
        torch.testing.assert_close(found[first : first + count].float(), wanted, atol=close, rtol=close)
        first += count


def test_plans_outlive_the_steps_in_flight(package: None) -> None:
    """A wrapper's plan is not written over while its step may wait, and kinds do not share one."""
    owner, kind = FlashInfer(DEVICE, 3), flashinfer_attention.Kind(0, 8, 0.1, None, None)
    taken = []
    for _ in range(6):
        owner.begin()
        taken.append(owner.wrapper(kind))
        assert owner.wrapper(replace(kind, group=1)) is not taken[-1]
    assert len(set(map(id, taken))) == 3
    assert taken[:3] == taken[3:]


def test_a_package_that_does_not_import_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = ModuleType("flashinfer"), ModuleType("flashinfer.prefill")  # has no wrapper
    whole.__spec__ = ModuleSpec("flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer", whole)
    monkeypatch.setitem(sys.modules, "flashinfer.prefill", broken)
    with pytest.raises(
        ConfigError, match=r"--attention-backend: 'FLASHINFER' cannot be imported \(ImportError: .*leave"
    ):
        Driver(Runner(), llama(), device=DEVICE.type, attention_backend="FLASHINFER", warm=False)


def test_its_memory_is_planned(package: None) -> None:
    def config(attention: str, **changes: Any) -> Any:
        driver = Driver(
            Runner(), llama(windows=(20, None)), device=DEVICE.type, attention_backend=attention, warm=False
        )
        return driver.runner._config  # type: ignore[attr-defined]

    ours, theirs = config(OURS), config("FLASHINFER")
    assert memory.flashinfer_bytes(ours) == 0
    assert memory.flashinfer_bytes(theirs) == WORKSPACE_BYTES + (theirs.max_in_flight + 1) * 2 * PLAN_BYTES
    assert memory.step_bytes(theirs, 4) - memory.step_bytes(ours, 4) == memory.flashinfer_bytes(theirs)
