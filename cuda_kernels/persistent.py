"""All layers and the head of a decode step of a small model in one launch: what the CUDA source needs around it.

Where a model's weights are read in less time than five launches a layer take to follow each other, one resident grid
that streams weights all the while is ahead. The source is csrc/persistent_decode.cu, compiled for one shape
by cuda_module.py; torch_models/persistent.py fills in the weights. Same results as the launches of
torch_models/fused.py, but for the order of sums. Up to 8 rows. Needs a GPU of sm_90 and torch's NVRTC.
Letters: T rows · D width · N query heads · K KV heads · H head size · F ffn width · V vocabulary · L layers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels import compiles, cuda_module

SOURCE = cuda_module.CSRC / "persistent_decode.cu"
SLICE = 1024  # inner values of a ring slot: widths must be multiples
WARPS = 8  # that compute
CHUNK = 16  # keys that a warp takes at once
SLOT_BYTES = 8 * (SLICE * 2 + 64)
SHARED_BYTES = 227 * 1024
STATIC_BYTES = 2048  # barriers and shares, besides the table of layers
LAYER_WORDS = 10
FEWEST_SLOTS = 4
MOST_ROWS = 8  # one tile of the products
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's numbers, which the kernel is compiled for."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    qk_norm: bool
    page: int  # tokens of one

    def fits(self) -> bool:
        """Whether the kernel can be compiled for it."""
        sliced = all(size % SLICE == 0 for size in (self.width, self.heads * self.head_size, self.ffn))
        grouped = self.heads % self.kv_heads == 0 and self.heads // self.kv_heads <= 8
        return (
            sliced and grouped and self.head_size in (64, 128) and self.vocab % 2 == 0 and self.slots() >= FEWEST_SLOTS
        )

    def fixed_bytes(self) -> int:
        """Shared memory besides the ring."""
        group = self.heads // self.kv_heads
        sums = 2 * WARPS * 160 * 4
        attention = 8 * (self.head_size * 2 + 64) + 4 * self.head_size
        attention += WARPS * group * 4 * (CHUNK + self.head_size + 2)
        longest = max(self.width, self.heads * self.head_size, self.ffn)
        return MOST_ROWS * (longest * 2 + 64) + max(sums, attention)

    def slots(self) -> int:
        """Slots of the ring."""
        static = STATIC_BYTES + self.layers * LAYER_WORDS * 8
        return (SHARED_BYTES - static - self.fixed_bytes()) // SLOT_BYTES

    def shared_bytes(self) -> int:
        """Of a block, asked for at the launch."""
        return self.slots() * SLOT_BYTES + self.fixed_bytes()

    def defines(self) -> dict[str, int]:
        return {
            "D": self.width, "NH": self.heads, "KVH": self.kv_heads, "H": self.head_size, "F": self.ffn,
            "V": self.vocab, "QK_NORM": int(self.qk_norm), "SLOTS": self.slots(), "LAYERS": self.layers,
            "PAGE": self.page,
        }  # fmt: skip

    def exchanged(self) -> tuple[int, ...]:
        """Widths of what blocks hand on: qkv, attention's output, gated values, x behind o, x behind down."""
        heads = self.heads * self.head_size
        return heads + 2 * self.kv_heads * self.head_size, heads, self.ffn, self.width, self.width

    def scratch_bytes(self, rows: int, multiprocessors: int) -> int:
        """What PersistentDecode allocates for steps of up to so many rows, about."""
        items = rows + 2 * multiprocessors
        return 4 * rows * sum(self.exchanged()) + 4 * items * self.heads * (self.head_size + 2) + 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """A layer's parameters and its part of the cache."""

    attn_norm: Tensor  # f32 [D]
    q_norm: Tensor | None  # f32 [H]
    k_norm: Tensor | None
    ffn_norm: Tensor  # f32 [D]
    qkv: Tensor  # [(N + 2K) * H, D]
    o: Tensor  # [D, N * H]
    gate_up: Tensor  # [2F, D]
    down: Tensor  # [D, F]
    keys: Tensor  # [P, K, page, H]
    values: Tensor

    def addresses(self) -> list[int]:
        norms = (self.attn_norm, self.q_norm, self.k_norm, self.ffn_norm)
        held = (*norms, self.qkv, self.o, self.gate_up, self.down, self.keys, self.values)
        if not all(tensor is None or tensor.is_contiguous() for tensor in held):
            raise ValueError("weights and pages must be contiguous")
        return [0 if tensor is None else tensor.data_ptr() for tensor in held]


POINTERS = (
    "layers", "final_norm", "head", "x", "qkv", "mixed", "gated", "middle", "end", "logits", "page_table", "slots",
    "lengths", "cosines", "sines", "partials", "counters",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """The kernel's argument, as the source has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in ("rows", "table_stride")),
        *((name, ctypes.c_float) for name in ("eps", "offset", "head_eps", "head_offset", "factor")),
    ]


class PersistentDecode:
    """A model's kernel with its scratch. Steps of one stream only: they share the counters."""

    def __init__(
        self,
        shape: Shape,
        layers: Sequence[LayerTensors],
        final_norm: Tensor,
        head: Tensor,
        *,
        norms: tuple[float, float, float, float],  # eps, offset; of the last norm
        scale: float,  # of the scores
        rows: int,  # of the largest step
    ) -> None:
        device = head.device
        self.most_rows = min(rows, MOST_ROWS)
        self._kernel = kernel_for(shape, device)
        self.shape, self._layers, self._head, self._final_norm = shape, layers, head, final_norm
        self._norms, self._factor = norms, scale * LOG2_E
        self._table = torch.tensor([layer.addresses() for layer in layers], dtype=torch.int64, device=device)
        self.blocks = torch.cuda.get_device_properties(device).multi_processor_count
        # pairs of values with their tags, none of which is a step's yet
        self._exchanged = [
            torch.zeros(self.most_rows, width // 2, dtype=torch.int64, device=device) for width in shape.exchanged()
        ]
        values = (self.most_rows + 2 * self.blocks) * shape.heads * (shape.head_size + 2)
        self._partials = torch.empty(values, dtype=torch.float32, device=device)
        self._counters = torch.zeros(2 + self.most_rows * shape.kv_heads, dtype=torch.int32, device=device)

    def run(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        page_table: Tensor,
        slots: Tensor,
        lengths: Tensor,
        logits: Tensor,
    ) -> None:
        """A decode step from embedded rows to logits; keys and values go into the cache.

        x: bf16 [T, D], overwritten; turn: cos and sin, f32 [T, H / 2]; page_table: i32 [max_slots + 1, max_pages];
        slots, lengths: i32 [T], the step's own key counted; logits: f32 [T, V], written.
        """
        rows = x.shape[0]
        arrays = (x, *turn, slots, lengths, logits)
        if not 0 < rows <= self.most_rows or not all(array.is_contiguous() for array in arrays):
            raise ValueError(f"{rows} rows, or an array that is not contiguous")
        if x.shape[1] != self.shape.width or turn[0].shape[1] * 2 != self.shape.head_size:
            raise ValueError(f"x {tuple(x.shape)} and cos {tuple(turn[0].shape)} do not belong to {self.shape}")
        eps, offset, head_eps, head_offset = self._norms
        given = (
            self._table, self._final_norm, self._head, x, *self._exchanged, logits, page_table, slots, lengths, *turn,
            self._partials, self._counters,
        )  # fmt: skip
        argument = Arguments(
            *(tensor.data_ptr() for tensor in given), rows, page_table.stride(0),
            eps, offset, head_eps, head_offset, self._factor,
        )  # fmt: skip
        self._kernel.launch(self.blocks, argument)


@functools.cache
def kernel_for(shape: Shape, device: torch.device) -> cuda_module.Kernel:
    """The kernel, compiled and loaded at the first call."""
    compiles.add(f"persistent_decode {shape}")
    cubin = cuda_module.cubin_of(SOURCE.read_text(), shape.defines(), torch.cuda.get_device_capability(device))
    kernel = cuda_module.Kernel(cubin, "persistent_decode", shape.shared_bytes(), (WARPS + 1) * 32)
    if kernel.resident_blocks() < 1:
        raise cuda_module.CompileError("a multiprocessor does not hold a block of the kernel")
    return kernel
