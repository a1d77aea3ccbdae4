"""Bytes of HBM that a decode step moves, by the compiled program, against what it must: python -m bench.tpu_bytes

    python -m bench.tpu_bytes [MODEL:ROWS ...] [--length 2048] [--top 12] [--write]

The step's forward program is compiled for a TPU with no TPU (as in bench/tpu.py) and its bytes are counted by
bench/hlo_bytes.py; the copies that the decode kernel starts itself come from its jaxpr: the sizes of the copies inside
its loop, times the pages and rows of a step whose rows all have --length tokens. The prefill kernel has no work in
such a step, and rows of the bucket that are padding have none. Must: all weights once but the embedding table, of it a
row a token; keys and values of all rows once, the new ones written; logits written. Nothing runs. Needs libtpu (pip
install 'twinfer[tpu]').
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from backends.jax.compile import Programs
from bench.hlo_bytes import Op, count, hbm_bytes
from bench.tpu import CASES as SLICES
from bench.tpu import PAGE, prepared
from pallas_kernels.tpu_decode import LANES, Blocks, decode_attention

CASES = ("Llama-3.1-8B:64", "Llama-3.1-8B:256", "Qwen3-0.6B:64", "Qwen3-0.6B:256")
MARKS = ("<!-- bench.tpu_bytes -->", "<!-- /bench.tpu_bytes -->")


@dataclass(frozen=True, slots=True)
class Attention:
    """What the decode kernel's own copies take in one layer."""

    page: int  # bytes fetched for a page
    row: int  # bytes written back for a row


def copies_of(rows: int, heads: int, kv_heads: int, size: int) -> Attention:
    """From the kernel's jaxpr: inside its loop stand one fetch of a page and one write of a tile of tokens."""
    width = kv_heads * size

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    ints = partial(shape, dtype=jnp.int32)
    blocks = Blocks(count=ints(1), rows=ints(8), pages=ints(8), starts=ints(8))
    cache = shape(1, 2, 2, LANES, width)
    args = (shape(rows, heads, size), shape(rows, width), shape(rows, width), cache, ints(1), blocks, ints(rows))
    made = jax.make_jaxpr(partial(decode_attention, scale=1.0))(*args)
    fetched, written = Counter[int](), Counter[int]()
    for eqn, in_loop in equations(made.jaxpr, False):
        if eqn.primitive.name == "dma_start" and in_loop:
            source, *_ = jax.tree_util.tree_unflatten(eqn.params["tree"], eqn.invars)
            sizes = source.transforms[-1].get_indexer_shape()
            moved = math.prod(sizes) * source.ref.aval.dtype.itemsize
            (fetched if source.ref.aval.shape == cache.shape else written)[moved] += 1
    if [*fetched.values(), *written.values()] != [1, 1]:
        raise ValueError(f"copies in the loop: {fetched}, {written}; one page and one tile are known")
    (page,), (row,) = fetched, written
    return Attention(page=page, row=row)


def equations(jaxpr: Any, in_loop: bool) -> Any:
    """(equation, whether it stands in a loop), those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn, in_loop
        deeper = in_loop or eqn.primitive.name in ("while", "scan")
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner, deeper)


@dataclass(frozen=True, slots=True)
class Found:
    """Bytes of a step."""

    moved: Counter[str]  # by instruction
    ideal: dict[str, int]

    @property
    def ratio(self) -> float:
        return sum(self.moved.values()) / sum(self.ideal.values())


def measure(name: str, rows: int, length: int) -> Found:
    """Of a model of bench/tpu.py's on one device. length: keys that a row sees, the new one included."""
    builder, resolved, layout, _, made = prepared(name)
    arch = resolved.runner.arch
    bucket = min(tokens for tokens in resolved.runner.token_buckets if tokens >= rows)
    program = next(each for each in made.programs() if each.name == ("forward", bucket))
    mixer = arch.layers[0].mixer
    copies = copies_of(rows, mixer.num_heads, mixer.num_kv_heads, mixer.head_size)
    pages = rows * -(-length // layout.groups[0].page_tokens)

    def kernel(op: Op, shapes: list[str]) -> int:
        if op.name.startswith("prefill_attention"):
            return 0
        if not op.name.startswith("decode_attention"):
            raise ValueError(f"{op.name}: a kernel whose copies nobody has counted")
        caches = 2 * max(map(hbm_bytes, shapes))  # in and out: what is moved of it is what follows
        whole = sum(map(hbm_bytes, shapes)) + hbm_bytes(op.shape) - caches
        return whole + pages * copies.page + rows * copies.row

    token = 2 * 2 * mixer.num_kv_heads * mixer.head_size * len(arch.layers)
    table = arch.vocab_size * arch.hidden_size * 2
    ideal = {
        "weights": builder.weight_bytes() - (0 if arch.tied_embeddings else table),
        "rows of the embedding": rows * arch.hidden_size * 2,
        "keys and values read": rows * length * token,
        "keys and values written": rows * token,
        "logits": rows * arch.vocab_size * 4,
    }
    return Found(count(Programs(builder.split).build(program).as_text(), kernel), ideal)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="MODEL:ROWS")
    parser.add_argument("--length", type=int, default=2048, help="keys of a row")
    parser.add_argument("--top", type=int, default=0, help="print so many of the dearest instructions")
    parser.add_argument("--write", action="store_true", help="put the table into docs/tpu.md")
    args = parser.parse_args()
    lines = ["| model | on | rows | moved, GB | must, GB | moved ÷ must |", "|---|---|---|---|---|---|"]
    for case in args.cases:
        name, rows = case.split(":")
        found = measure(name, int(rows), args.length)
        moved, ideal = sum(found.moved.values()) / 1e9, sum(found.ideal.values()) / 1e9
        lines.append(f"| {name} | {SLICES[name][1]} | {rows} | {moved:.2f} | {ideal:.2f} | {found.ratio:.3f} |")
        print(lines[-1], flush=True)
        for instruction, size in found.moved.most_common(args.top):
            print(f"    {size / 1e6:12.1f} MB  {instruction}")
    print("\n".join(lines))
    if args.write:
        page = PAGE.read_text()
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
