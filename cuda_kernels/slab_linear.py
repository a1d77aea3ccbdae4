"""Products of few rows with small weights: a block keeps its part of the weight in shared memory before the rows come.

Where a weight fits the shared memory of all multiprocessors, what a product takes beside the reading of its weight is
latency: this kernel asks for the whole weight while the kernel in front still runs, and adds the sums of blocks that
share the inner axis through a cluster's shared memory. The source is csrc/slab_linear.cu, compiled for one layout at a
time. Called by small_linear.py. Needs a GPU of sm_90 and torch's NVRTC; bfloat16.
Letters: T rows · I in · O out · F gated width.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels import compiles, cuda_module
from cuda_kernels.small_linear_kernels import ACTIVATIONS

SOURCE = cuda_module.CSRC / "slab_linear.cu"
ROWS = (16, 32)  # classes that the kernel is compiled for
MOST_ROWS = ROWS[-1]
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024  # of a multiprocessor; of each block besides its own
FILLED = 0.9  # of the multiprocessors: clusters leave some of those that share an uneven part of the chip empty
NORM_INPUTS = 256  # of a block, one warp a row
MOST_CLUSTER, MOST_OUTPUTS = 8, 128
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a product is cut up."""

    rows: int  # of the class
    inputs: int  # of a block: I / cluster
    outputs: int  # weight rows of a block, gate and up counted
    cluster: int  # blocks that share the inner axis
    blocks: int
    kind: int  # of activation; 0: not gated
    norm: bool

    @property
    def threads(self) -> int:
        return self.outputs * 2

    def shared_bytes(self) -> int:
        parts = 2 if self.kind else 1
        items = self.outputs // parts // 16 * (self.rows // 8)
        received = -(-items // self.cluster) * self.cluster * parts * 512 + self.norm * self.cluster * self.rows * 4
        return received + 16 + (self.outputs + self.rows) * (self.inputs * 2 + 16)

    def defines(self) -> dict[str, int]:
        return {
            "ROWS": self.rows, "KS": self.inputs, "OUTS": self.outputs, "CLUSTER": self.cluster, "KIND": self.kind,
            "NORM": int(self.norm),
        }  # fmt: skip


@functools.lru_cache(4096)
def layout_of(rows: int, outputs: int, inner: int, kind: int, norm: bool, multiprocessors: int) -> Layout | None:
    """The layout of the largest blocks of which enough run at once; None: the weight is too large, or of another shape.

    outputs: of the product, half of the weight's rows if gated. Large clusters come first: blocks then read less of x.
    """
    if not 0 < rows <= MOST_ROWS:
        return None
    row_class = next(size for size in ROWS if size >= rows)
    parts = 2 if kind else 1
    for cluster in range(MOST_CLUSTER, 0, -1):
        inputs = inner // cluster
        if inner % (16 * cluster) or (norm and inputs != NORM_INPUTS):
            continue
        for kept in range(MOST_OUTPUTS // parts, 0, -16):
            layout = Layout(
                rows=row_class, inputs=inputs, outputs=kept * parts, cluster=cluster,
                blocks=outputs // kept * cluster, kind=kind, norm=norm,
            )  # fmt: skip
            at_once = SHARED_BYTES // (layout.shared_bytes() + RESERVED_BYTES) * multiprocessors * FILLED
            if outputs % kept == 0 and FILLED * multiprocessors <= layout.blocks <= at_once:
                return layout
    return None


class Arguments(ctypes.Structure):
    """The kernel's argument, as the source has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "norm_weight", "weight", "bias", "residual", "out")),
        *((name, ctypes.c_int) for name in ("rows", "outs", "inner")),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
    ]


def chosen(x: Tensor, weight: Tensor, activation: str, norm: bool) -> Layout | None:
    """The layout of a product of x, [T, I], with a weight, [O, I], None where another kernel has to take it."""
    if x.dtype != torch.bfloat16 or not cuda_module.runs_on(x.device):
        return None
    outputs = weight.shape[0] // 2 if activation else weight.shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    layout = layout_of(x.shape[0], outputs, x.shape[1], ACTIVATIONS[activation], norm, processors)
    return layout if layout is not None and kernel_for(layout, x.device) is not None else None


@functools.cache
def kernel_for(layout: Layout, device: torch.device) -> cuda_module.Kernel | None:
    """The kernel, compiled and loaded at the first call; None, and a warning, where that fails."""
    compiles.add(f"slab_linear {layout}")
    try:
        cubin = cuda_module.cubin_of(SOURCE.read_text(), layout.defines(), torch.cuda.get_device_capability(device))
        return cuda_module.Kernel(cubin, "slab_linear", layout.shared_bytes(), layout.threads)
    except cuda_module.CompileError as error:
        LOGGER.warning("products of %s take another kernel: %s", layout, error)
        return None


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, float, float] | None = None,
    activation: str = "",
) -> Tensor:
    """residual + act(rms_norm(x) @ weight.T + bias) -> [T, O] or, gated, [T, F].

    x: bf16 [T, I]; weight: [O, I]; bias: [O]; residual: [T, O]; norm: weight f32 [I], eps, offset. All contiguous.
    """
    layout = chosen(x, weight, activation, norm is not None)
    kernel = None if layout is None else kernel_for(layout, x.device)
    if layout is None or kernel is None:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)}: no layout of the slab kernel")
    outputs = weight.shape[0] // (2 if activation else 1)
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    norm_weight, eps, offset = norm if norm is not None else (None, 0.0, 0.0)
    places = (None if part is None else part.data_ptr() for part in (x, norm_weight, weight, bias, residual, out))
    argument = Arguments(*places, x.shape[0], outputs, x.shape[1], eps, offset)
    kernel.launch_overlapped(layout.blocks, argument, layout.cluster)
    return out
