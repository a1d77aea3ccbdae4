"""A decode step in one launch: against the five launches and float32 on a GPU; what is told of it without one."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bench.kernels_persistent import SMALL, Case, decoder_of, exact, five_launches  # noqa: E402
from cuda_kernels import attention_decode, cuda_module  # noqa: E402
from cuda_kernels.persistent import SHARED_BYTES, SOURCE, Arguments, Shape  # noqa: E402

SHAPE = Shape(layers=2, **SMALL)
ON_GPU = torch.cuda.is_available() and cuda_module.runs_on(torch.device("cuda", 0))


def test_shapes_that_fit() -> None:
    assert SHAPE.fits()
    assert not replace(SHAPE, width=1000).fits()
    assert not replace(SHAPE, heads=12).fits()
    assert not replace(SHAPE, head_size=96).fits()
    assert not replace(SHAPE, ffn=12288).fits()  # its rows leave no room for a ring
    assert not replace(SHAPE, vocab=50257).fits()


@pytest.mark.parametrize("layers", [2, 28, 48])
def test_shared_memory_holds_ring_and_rows(layers: int) -> None:
    shape = replace(SHAPE, layers=layers)
    assert shape.shared_bytes() <= SHARED_BYTES
    assert shape.defines()["SLOTS"] >= 4


def test_argument_is_laid_out_as_the_source_has_it() -> None:
    fields = [name for name, _ in Arguments._fields_]
    text = SOURCE.read_text()
    declared = text[text.index("struct Args {") : text.index("};", text.index("struct Args {"))]
    names = [word.strip(" *") for line in declared.splitlines()[1:] for word in declaration(line)]
    assert names == fields
    assert ctypes.sizeof(Arguments) == 8 * 17 + 4 * 7 + 4  # padded to 8


def declaration(line: str) -> list[str]:
    code = line.split("//")[0].strip().rstrip(";")
    first, *rest = code.split(",")
    return [first.split()[-1], *rest]


@pytest.mark.skipif(cuda_module.nvrtc_library() is None, reason="needs torch's NVRTC")
def test_compiles() -> None:
    assert cuda_module.compile_source(SOURCE.read_text(), SHAPE.defines(), (9, 0))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize(
    "lengths",
    [[1], [200], [513], [1, 5, 64, 65, 130], [30, 3000, 1, 700], [200 + 7 * row for row in range(8)]],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths)}",
)
def test_as_right_as_five_launches(lengths: list[int]) -> None:
    with torch.inference_mode():
        case = Case(SHAPE, lengths)
        wanted = exact(case)
        workspace = attention_decode.make_workspace(
            len(lengths), SHAPE.heads, SHAPE.head_size, torch.device(case.device)
        )
        five, before = five_launches(case, workspace), case.cache.clone()
        decoder, logits = decoder_of(case), torch.empty_like(wanted)
        for _ in range(2):  # the second finds the counters as the first left them
            x = case.x.clone()
            decoder.run(x, (case.cos, case.sin), case.page_table, case.slots, case.row_lengths, logits)
        assert (logits - wanted).abs().mean() <= 1.2 * (five - wanted).abs().mean() + 1e-3
        assert (logits - wanted).abs().max() <= 1.5 * (five - wanted).abs().max() + 1e-2
        torch.testing.assert_close(case.cache, before, rtol=0.05, atol=0.1)
