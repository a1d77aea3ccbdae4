"""How a program that is being traced is split over devices, and the collectives that products need then.

Entered by backends/jax/forward.py around a rank's program; asked by jax_models and dispatch.py.
Letters: T tokens · D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax.numpy as jnp
from jax import Array, lax

RANKS: ContextVar[str | None] = ContextVar("RANKS", default=None)
"""The mesh axis of the program that is being traced, None: one device has all."""
TOKENS_SPLIT: ContextVar[bool] = ContextVar("tokens_split", default=False)
"""Whether each rank has its own part of the tokens between products."""


@contextmanager
def split_over(axis: str, tokens: bool = False) -> Iterator[None]:
    """While a program is traced inside: it is one rank's, and the ranks are the mesh axis `axis`.

    tokens: between the products of a layer each rank has an equal part of the step's tokens, in order of ranks.
    """
    own, split = RANKS.set(axis), TOKENS_SPLIT.set(tokens)
    try:
        yield
    finally:
        RANKS.reset(own)
        TOKENS_SPLIT.reset(split)


def axis() -> str | None:
    """The mesh axis of the ranks, None: one device has all."""
    return RANKS.get()


def is_split() -> bool:
    return RANKS.get() is not None


def sum_ranks(x: Array, dtype: jnp.dtype) -> Array:
    """The sum over all ranks, [T, D]; this rank's tokens of it, in `dtype`, where tokens are split."""
    if TOKENS_SPLIT.get():
        # libtpu lets whole sums travel in bfloat16 by itself, scattered ones not always
        return lax.psum_scatter(x.astype(dtype), RANKS.get(), scatter_dimension=0, tiled=True)
    return lax.psum(x, RANKS.get())


def all_tokens(x: Array) -> Array:
    """The whole step's tokens [T, D], where each rank has its own; else x as it is."""
    if not TOKENS_SPLIT.get():
        return x
    return lax.all_gather(x, RANKS.get(), axis=0, tiled=True)
