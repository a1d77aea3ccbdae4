"""The least time that a step can take: bytes over bandwidth and operations over peak, from a chip's data sheet.

A floor, not a prediction: launches, padding, waiting and collectives come on top, and no step reads all of the
bandwidth. Of one rank: max(weights / bandwidth, products / peak) + max(KV / bandwidth, attention / peak). Used by
plan.py. Letters: B rows · T tokens · N query heads · H head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from engine.specs.arch import ArchSpec
from engine.specs.cache import cache_groups
from engine.specs.chips import Chip, Slice
from engine.specs.parallel import rank_arch, shard_shape
from engine.specs.quant import WeightQuant
from engine.specs.weights import DTYPE_BYTES, param_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """One step of one copy of the model. Seconds are of a rank; collectives are not in `floor_s`.

    context: tokens of each row whose keys and values are read. collective_bytes: what a chip has to send in the step's
    all-reduces; collective_s: that over its links, None where their bandwidth is not published.
    """

    step: str  # "decode" | "prefill"
    batch: int
    tokens: int
    context: int
    weights_s: float
    products_s: float
    kv_s: float
    attention_s: float
    collective_bytes: int
    collective_s: float | None
    weights_bytes: int
    kv_bytes: int
    flops: int

    @property
    def floor_s(self) -> float:
        return max(self.weights_s, self.products_s) + max(self.kv_s, self.attention_s)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.floor_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model on one rank of a slice. arch: the whole one; sizes: bytes of each weight of a rank."""

    arch: ArchSpec
    ranks: int
    slice: Slice
    sizes: Mapping[str, int]
    dtype: str
    kv_dtype: str


def decode_floor(model: Model, batch: int, context: int) -> Floor:
    """`batch` rows of one new token each, with so many tokens of each in the cache, the new one among them."""
    return floor(model, "decode", [(1, context)] * batch)


def prefill_floor(model: Model, tokens: int, length: int) -> Floor:
    """A full step of whole prompts of at most `length` tokens, from their beginning."""
    lengths = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
    return floor(model, "prefill", [(count, count) for count in lengths])


def floor(model: Model, step: str, rows: Sequence[tuple[int, int]]) -> Floor:
    """rows: (new tokens, tokens in the cache with them); each row samples once."""
    chip, rank = model.slice.chip, rank_arch(model.arch, model.ranks)
    tokens, batch = sum(new for new, _ in rows), len(rows)
    weights = read_bytes(model, tokens)
    products = product_flops(model, tokens, batch)
    kv, attention = kv_bytes(rank, rows, model.kv_dtype), attention_flops(rank, rows)
    sent, sent_s = collectives(model, tokens)
    return Floor(
        step=step,
        batch=batch,
        tokens=tokens,
        context=max(seen for _, seen in rows),
        weights_s=weights / chip.bandwidth,
        products_s=sum(flops / chip.flops[kind] for kind, flops in products.items()),
        kv_s=kv / chip.bandwidth,
        attention_s=attention / chip.flops["bfloat16"],
        collective_bytes=sent,
        collective_s=sent_s,
        weights_bytes=weights,
        kv_bytes=kv,
        flops=sum(products.values()) + attention,
    )


def read_bytes(model: Model, tokens: int) -> int:
    """Of weights: all, but of an embedding that is no head only the rows of the step's tokens."""
    total = sum(model.sizes.values())
    if model.arch.tied_embeddings:
        return total
    embed = model.sizes["embed"]
    return total - embed + min(embed, tokens * model.arch.hidden_size * DTYPE_BYTES[model.dtype])


def product_flops(model: Model, tokens: int, batch: int) -> dict[str, int]:
    """Operations of the products with weights, by the type of their factors. The head has the sampled rows alone."""
    quants = {param.weight: param.quant for param in param_table(model.arch) if param.quant is not None}
    head = "embed" if model.arch.tied_embeddings else "head"
    found: dict[str, int] = {}
    for param in param_table(replace(model.arch, quant=None)):
        if len(param.shape) != 2 or (param.name == "embed" and head != "embed"):
            continue
        kind = factor_type(quants.get(param.name), model.slice.chip)
        rows = batch if param.name == head else tokens
        found[kind] = found.get(kind, 0) + 2 * rows * prod(shard_shape(param, model.ranks, 0))
    return found


def factor_type(quant: WeightQuant | None, chip: Chip) -> str:
    """8 bits where weights and activations both are, and the chip has units for it; else bfloat16, even for float32."""
    if quant is None or quant.act == "none" or quant.scheme not in chip.flops:
        return "bfloat16"
    return quant.scheme


def kv_bytes(rank: ArchSpec, rows: Sequence[tuple[int, int]], kv_dtype: str) -> int:
    """Keys and values that the rows see, each once."""
    return sum(
        group.bytes_per_token(kv_dtype) * sum(min(seen, (group.window or seen) + new - 1) for new, seen in rows)
        for group in cache_groups(rank)
    )


def attention_flops(rank: ArchSpec, rows: Sequence[tuple[int, int]]) -> int:
    """Scores and weighted sums, causal: 4 N H for each pair of a token and one that it sees."""
    pairs: dict[int | None, int] = {}
    total = 0
    for layer in rank.layers:
        window = layer.mixer.window
        if window not in pairs:
            pairs[window] = sum(seen_pairs(new, seen, window) for new, seen in rows)
        total += 4 * layer.mixer.num_heads * layer.mixer.head_size * pairs[window]
    return total


def seen_pairs(new: int, seen: int, window: int | None) -> int:
    """Pairs of the last `new` of `seen` tokens with those that each sees, itself among them."""
    limit = seen if window is None else min(window, seen)
    full = min(new, max(0, seen - limit))  # tokens that see a whole window
    # the others see all before them: the first of them seen - new + 1, or whatever comes before the limit
    rest = new - full
    first = seen - new + 1
    return full * limit + rest * (2 * first + rest - 1) // 2


def collectives(model: Model, tokens: int) -> tuple[int, float | None]:
    """(bytes that a chip sends, seconds over its links) of two all-reduces a layer and one of the embedding.

    Each moves 2 (n - 1) / n of the activations between n chips; devices of one chip share its links. Logits are left
    out: a sampler need not gather them.
    """
    chip, arch = model.slice.chip, model.arch
    chips = -(-model.ranks // chip.devices)
    if model.ranks == 1:
        return 0, 0.0
    payload = (2 * len(arch.layers) + 1) * tokens * arch.hidden_size * DTYPE_BYTES[model.dtype]
    if chips == 1:
        return 0, None  # inside a chip, at a rate that is not published
    sent = 2 * (chips - 1) * payload // chips
    return sent, sent / chip.link if chip.link else None
