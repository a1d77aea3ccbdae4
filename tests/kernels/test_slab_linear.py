"""Products whose weights wait in shared memory: against float64 on a GPU; layouts and the source without one."""

from __future__ import annotations

import ctypes

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from cuda_kernels import cuda_module, slab_linear, small_linear  # noqa: E402
from cuda_kernels.slab_linear import RESERVED_BYTES, SHARED_BYTES, SOURCE, Arguments, layout_of  # noqa: E402
from cuda_kernels.small_linear_plan import SLAB  # noqa: E402
from tests.kernels.test_persistent import declaration  # noqa: E402

ON_GPU = torch.cuda.is_available() and cuda_module.runs_on(torch.device("cuda", 0))
SMALL = {"qkv": (4096, 1024, 0, True), "o": (1024, 2048, 0, False), "gate_up": (3072, 1024, 1, True)}
SHAPES = [  # O, I, activation, norm, bias, residual; 768 leaves blocks without items of 16 rows, 896 is 7 x 128
    (4096, 1024, "", True, True, False),
    (6144, 1024, "silu", True, False, False),
    (6144, 1024, "gelu_tanh", True, True, False),
    (3072, 1536, "gelu", True, False, False),
    (1024, 2048, "", False, False, True),
    (1024, 3072, "", False, True, True),
    (896, 896, "", False, True, False),
    (768, 768, "", True, False, False),
]


@pytest.mark.parametrize("rows", [1, 16, 17, 32])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_layouts_cover_the_weight_and_fit(shape: tuple[int, int, int, bool], rows: int) -> None:
    outputs, inner, kind, _ = shape
    layout = layout_of(rows, *shape, 132)
    assert layout is not None
    assert layout.rows >= rows
    assert layout.inputs * layout.cluster == inner
    assert layout.outputs // (2 if kind else 1) * (layout.blocks // layout.cluster) == outputs
    of_one = SHARED_BYTES // (layout.shared_bytes() + RESERVED_BYTES)
    assert of_one * 132 * 0.9 >= layout.blocks >= 118


def test_what_has_no_layout() -> None:
    assert layout_of(33, *SMALL["o"], 132) is None
    assert layout_of(8, 6144, 4096, 0, True, 132) is None  # more than the chip holds
    assert layout_of(8, 4096, 1000, 0, False, 132) is None
    assert layout_of(8, 4096, 1152, 0, True, 132) is None  # a norm takes 256 inputs a block
    assert layout_of(8, 256, 256, 0, True, 132) is None  # too few blocks: other kernels are as fast


def test_argument_is_laid_out_as_the_source_has_it() -> None:
    text = SOURCE.read_text()
    declared = text[text.index("struct Args {") : text.index("};", text.index("struct Args {"))]
    names = [word.strip(" *") for line in declared.splitlines()[1:] for word in declaration(line)]
    assert names == [name for name, _ in Arguments._fields_]
    assert ctypes.sizeof(Arguments) == 8 * 6 + 4 * 5 + 4  # padded to 8


def test_launch_structures_are_the_drivers() -> None:
    assert ctypes.sizeof(cuda_module.Attribute) == 72
    assert ctypes.sizeof(cuda_module.LaunchConfig) == 56


@pytest.mark.skipif(cuda_module.nvrtc_library() is None, reason="needs torch's NVRTC")
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_compiles(shape: tuple[int, int, int, bool], rows: int) -> None:
    layout = layout_of(rows, *shape, 132)
    assert layout is not None
    assert cuda_module.compile_source(SOURCE.read_text(), layout.defines(), (9, 0))


def test_other_devices_and_dtypes_take_other_kernels() -> None:
    x, weight = torch.randn(4, 2048), torch.randn(1024, 2048)
    assert slab_linear.chosen(x.bfloat16(), weight.bfloat16(), "", False) is None or ON_GPU
    assert slab_linear.chosen(x, weight, "", False) is None
    with pytest.raises(ValueError, match="no layout of the slab kernel"):
        slab_linear.product(x, weight)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU of compute capability 9.0")
def test_against_float64() -> None:
    for shape in SHAPES:
        for rows in (1, 2, 16, 17, 32):
            check(*shape, rows)


def check(outputs: int, inner: int, activation: str, normed: bool, biased: bool, added: bool, rows: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inner, device="cuda"), torch.randn(outputs, inner, device="cuda") / inner**0.5
    bias, gain = torch.randn(outputs, device="cuda"), torch.rand(inner, device="cuda") + 0.5
    residual = torch.randn(rows, outputs, device="cuda")
    x, weight, bias, residual = (part.bfloat16() for part in (x, weight, bias, residual))
    norm = (gain, 1e-6, 0.25) if normed else None
    got = slab_linear.product(x, weight, bias if biased else None, residual if added else None, norm, activation)

    wanted = x.double()
    if normed:  # the gain is multiplied in front, rounded, 1 / rms behind
        square = wanted.square().mean(1, keepdim=True)
        wanted = (x.float() * (gain + 0.25)).bfloat16().double()
    wanted = wanted @ weight.double().t()
    if normed:
        wanted = wanted * torch.rsqrt(square + 1e-6)
    wanted = wanted + (bias.double() if biased else 0.0)
    if activation:
        gate, up = wanted.chunk(2, dim=1)
        functions = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
        tanh = torch.nn.functional.gelu(gate, approximate="tanh")
        wanted = (functions[activation](gate) if activation in functions else tanh) * up
    wanted = wanted + (residual.double() if added else 0.0)
    # half a step of bfloat16, and what float32 sums differ by
    torch.testing.assert_close(got.double(), wanted, atol=1e-3, rtol=2**-8)
    again = slab_linear.product(x, weight, bias if biased else None, residual if added else None, norm, activation)
    assert torch.equal(got, again)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU of compute capability 9.0")
def test_small_linear_takes_it() -> None:
    x = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    assert small_linear.choose(x, weight, norm=True) is SLAB
    assert small_linear.choose(x[:1], weight, norm=True) is not SLAB
