"""The C++ decode attention of the CPU equals plain torch: what comes out, and what lies in the pages afterwards."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_kernels import cpu_decode, cpu_library
from cuda_kernels import paged_attention as plain
from cuda_kernels.cpu_library import library
from cuda_kernels.dispatch import Work, decodes_in_one_call
from engine.specs import arch
from engine.specs.rope import frequencies
from torch_models.attention import Attention

PAGE, POOL, WIDTH = 8, 64, 32
needs_library = pytest.mark.skipif(library() is None, reason="no prebuilt library for this processor family")


def attention(dtype: torch.dtype, size: int, offset: float = 0.0, **spec: Any) -> Attention:
    made = arch.Attention(
        **{"num_heads": 6, "num_kv_heads": 2, "head_size": size, "scale": size**-0.5, "rope": None} | spec
    )
    generator = torch.Generator().manual_seed(size)
    params = {
        "qkv": torch.randn(10 * size, WIDTH, generator=generator).to(dtype),
        "o": torch.randn(WIDTH, 6 * size, generator=generator).to(dtype),
        "q_norm": torch.rand(size, generator=generator) + 0.5 - offset,
        "k_norm": torch.rand(size, generator=generator) + 0.5 - offset,
    }
    return Attention(made, arch.Norms(eps=1e-6, offset=offset), params)


def both(made: Attention, lengths: list[int], dtype: torch.dtype, poison: bool = False) -> tuple[Tensor, ...]:
    """(output, cache) of the C++ kernel, then of plain torch."""
    size, rows = made.spec.head_size, len(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    if poison:
        x[0] = torch.inf
    cache = torch.randn(1, 2, 2, POOL * PAGE, size, generator=generator).to(dtype)
    table = torch.randperm(POOL - 1, generator=generator)[: rows * 7].view(rows, 7).int() + 1
    index = torch.tensor(lengths) - 1
    write_at = table[torch.arange(rows), index // PAGE] * PAGE + index % PAGE
    starts, new, computed = list(range(rows)), [1] * rows, index.tolist()
    groups = plain.decode_groups(starts, new, computed, torch.device("cpu"))
    work = Work(
        page_tokens=PAGE, page_table=table, query_starts=starts, num_new=new, num_computed=computed, write_at=write_at,
        index=index, decodes=plain.gathers(groups, table, PAGE, made.spec.window, dtype),
    )  # fmt: skip
    turn: tuple[Tensor | None, Tensor | None] = (None, None)
    if made.spec.rope is not None:
        angles = index[:, None] * torch.from_numpy(frequencies(made.spec.rope, 64)[0])
        turn = torch.cos(angles).float(), torch.sin(angles).float()
    results: list[Tensor] = []
    for one_call in (True, False):
        own = cache.clone()
        results += [made.forward(x, *turn, own, 0, replace(work, one_call=one_call))[0].float(), own.float()]
    return tuple(results)


def rope(rotary_size: int) -> arch.RopeSpec:
    return arch.RopeSpec(rotary_size=rotary_size, max_position=64)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"rope": rope(16)},
        {"rope": rope(16), "qk_norm": True},
        {"rope": rope(8), "qk_norm": True, "offset": 1.0, "window": 9, "logit_cap": 3.0},
    ],
    ids=["plain", "rope", "norm", "all"],
)
@pytest.mark.parametrize("lengths", [[1], [50], [9, 56, 1, 8, 24]], ids=str)
def test_equals_plain_torch(dtype: torch.dtype, size: int, spec: dict[str, Any], lengths: list[int]) -> None:
    out, cache, wanted, wanted_cache = both(attention(dtype, size, **spec), lengths, dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    largest = wanted.abs().max()
    assert (out - wanted).abs().max() <= tolerance * largest
    assert torch.allclose(cache, wanted_cache, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)


@needs_library
def test_what_is_not_finite_is_stored_as_zero_and_stays_with_its_row() -> None:
    made = attention(torch.float32, 64)
    out, cache, wanted, wanted_cache = both(made, [9, 30], torch.float32, poison=True)
    assert cache.isfinite().all() and torch.allclose(cache, wanted_cache, atol=1e-4)
    assert not out[0].isfinite().any() and out[1].isfinite().all()
    assert torch.allclose(out[1], wanted[1], rtol=1e-4, atol=1e-4)


@needs_library
def test_runs_with_as_many_threads_as_torch_has() -> None:
    made = attention(torch.float32, 64)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(both(made, [50, 41, 56, 30, 33, 56, 50, 49], torch.float32)[0])  # 100 KB a tensor: in parallel
    torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_library
def test_refuses_what_it_would_misread() -> None:
    cache, count = torch.zeros(2, 2, POOL * PAGE, 16), torch.zeros(1, dtype=torch.int64)
    right = {"qkv": torch.zeros(1, 160), "page_table": torch.zeros(1, 7, dtype=torch.int32), "index": count}
    rest = {"num_heads": 6, "norm": None, "norm_eps": 1e-6, "write_at": count, "page_tokens": PAGE, "scale": 1.0}
    for name, value in (
        ("qkv", torch.zeros(1, 128)),
        ("qkv", torch.zeros(160, 1).t()[:, ::1].bfloat16()),
        ("page_table", torch.zeros(1, 7, dtype=torch.int64)),
        ("index", torch.zeros(2, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError):
            cpu_decode.decode_attention(
                cos=None, sin=None, cache=cache, window=None, logit_cap=None, **{**right, name: value}, **rest
            )


def test_is_chosen_on_a_cpu_alone() -> None:
    there = library() is not None
    cpu, wide = torch.device("cpu"), torch.float32
    assert decodes_in_one_call(cpu, wide, wide, 128) == there
    assert not decodes_in_one_call(torch.device("cuda"), wide, wide, 128)
    assert not decodes_in_one_call(cpu, wide, wide, 512)
    assert not decodes_in_one_call(cpu, wide, torch.bfloat16, 128)
    assert not decodes_in_one_call(cpu, torch.float16, torch.float16, 128)


@needs_library
def test_the_library_was_built_from_the_source() -> None:
    path = Path(cpu_decode.__file__).parent / "csrc" / "build_cpu.py"
    spec = importlib.util.spec_from_file_location("build_decode", path)
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert cpu_library.source_digest() == build.source_digest()
