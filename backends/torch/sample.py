"""The sampler, on the device: processors, temperature, min-p, top-k, top-p and Philox noise, without sorting.

Called by the runner with the logits of the rows that sample. The order of operations is that of docs/contract.md
(section Sampling), the same as in backends/jax/sample.py. A part that no row of the step uses is skipped.
Letters: B sampling rows · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backends.torch.tables import IN_PROMPT, Tables
from engine.opened import Use

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
SAMPLING_STREAM = 0
shifted = torch.bitwise_right_shift  # what >> does but in torch-xla, where that divides, and rounds to 0
WORD = 0xFFFFFFFF
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def pick(logits: Tensor, slots: Tensor, mask: Tensor | None, tables: Tables, uses: Use) -> Tensor:
    """Token ids i64 [B]. logits: f32 [B, V]; slots: i64 [B]; mask: bool [B, V]."""
    x = processed(logits, slots, mask, tables, uses)
    return argmax(draw(x, slots, tables, uses) if Use.RANDOM in uses else x)


def processed(logits: Tensor, slots: Tensor, mask: Tensor | None, tables: Tables, uses: Use) -> Tensor:
    """The logits behind mask, allowed ids, bad words, min_tokens, biases, penalties: f32 [B, V]. Arguments of pick."""
    x = logits
    if Use.MASK in uses and mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    if Use.ALLOWED in uses and tables.allowed is not None:
        x = x.masked_fill(~tables.allowed[slots], -torch.inf)
    if Use.BAD_WORDS in uses:
        x = ban_words(x, slots, tables)
    if Use.MIN_TOKENS in uses:
        early = tables.num_outputs[slots] < tables.min_tokens[slots]
        x = drop(x, torch.where(early[:, None], tables.stop_ids[slots], -1))
    if Use.BIAS in uses and tables.bias is not None:
        x = x + tables.bias[slots]
    if Use.PENALTIES in uses and tables.counts is not None:
        x = penalise(x, tables.counts[slots], slots, tables)
    return x


def draw(x: Tensor, slots: Tensor, tables: Tables, uses: Use) -> Tensor:
    """Temperature, filters and noise; rows of temperature 0 stay as they are."""
    temperature = tables.temperature[slots][:, None]
    warm = x / torch.where(temperature > 0, temperature, 1.0)
    if Use.MIN_P in uses:
        warm = keep_likely(warm, tables.min_p[slots])
    if Use.TOP_K in uses:
        warm = keep_top_k(warm, tables.top_k[slots])
    if Use.TOP_P in uses:
        warm = keep_top_p(warm, tables.top_p[slots])
    noise = gumbel(tables.seed[slots], tables.num_outputs[slots], x.shape[1])
    return torch.where(temperature > 0, warm + noise, x)


def argmax(x: Tensor) -> Tensor:
    """The first index of the largest value, i64 [B]. x: f32 [B, V]; NaN counts as nothing."""
    return torch.where(x.isnan(), -torch.inf, x).argmax(dim=1)  # torch-xla's nan_to_num takes no infinities


def ban_words(x: Tensor, slots: Tensor, tables: Tables) -> Tensor:
    """Drop the last id of each bad word whose first ids were just generated."""
    if tables.bad_prefix is None or tables.bad_last is None or tables.tail is None:
        return x
    prefix, last = tables.bad_prefix[slots], tables.bad_last[slots]  # [B, words, len - 1], [B, words]
    matches = ((prefix == -1) | (prefix == tables.tail[slots][:, None, :])).all(dim=2) & (last >= 0)
    return drop(x, torch.where(matches, last, -1))


def drop(x: Tensor, ids: Tensor) -> Tensor:
    """Drop the named ids. ids: i64 [B, n], -1 = none."""
    wide = torch.cat([x, x[:, :1]], dim=1)  # a column to take what names nothing
    wide.scatter_(1, torch.where(ids >= 0, ids, x.shape[1]), -torch.inf)
    return wide[:, :-1]


def penalise(x: Tensor, counts: Tensor, slots: Tensor, tables: Tables) -> Tensor:
    """Repetition over prompt and output ids, then frequency and presence over output ids. counts: i32 [B, V]."""
    outputs = (counts & (IN_PROMPT - 1)).float()
    factor = tables.repetition_penalty[slots][:, None]
    x = torch.where(counts != 0, torch.where(x > 0, x / factor, x * factor), x)
    x = x - tables.frequency_penalty[slots][:, None] * outputs
    return x - tables.presence_penalty[slots][:, None] * (outputs > 0)


def keep_likely(x: Tensor, min_p: Tensor) -> Tensor:
    """Drop ids whose probability is under min_p times the largest. min_p: f32 [B], 0 = off."""
    floor = x.amax(dim=1) + min_p.log()  # log 0 = -inf keeps all
    return x.masked_fill(x < floor[:, None], -torch.inf)


def keep_top_k(x: Tensor, top_k: Tensor) -> Tensor:
    """Keep the top_k largest, ties at the threshold included. top_k: i64 [B], 0 = off."""
    keys, vocab = sortable(x), x.shape[1]
    wanted = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    threshold = bisect(lambda t: (keys >= t[:, None]).sum(dim=1) >= wanted, x)
    return x.masked_fill(keys < threshold[:, None], -torch.inf)


def keep_top_p(x: Tensor, top_p: Tensor) -> Tensor:
    """Keep the smallest set of likeliest ids whose sum reaches top_p, ties included. top_p: f32 [B], 1 = off."""
    keys = sortable(x)
    weights = (x - x.amax(dim=1, keepdim=True)).exp()
    wanted = top_p * weights.sum(dim=1)
    threshold = bisect(lambda t: torch.where(keys >= t[:, None], weights, 0.0).sum(dim=1) >= wanted, x)
    return torch.where(top_p[:, None] < 1, x.masked_fill(keys < threshold[:, None], -torch.inf), x)


def sortable(x: Tensor) -> Tensor:
    """int32 keys in the order of the floats."""
    bits = (x + 0.0).view(torch.int32)  # -0 and 0 are equal
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def bisect(enough: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The largest int32 threshold a row for which `enough` holds; it holds for the smallest int32. -> i32 [B]."""
    low = torch.full((x.shape[0],), INT32_MIN, dtype=torch.int64, device=x.device)
    high = torch.full_like(low, INT32_MAX)
    for _ in range(32):
        middle = shifted(low + high + 1, 1)  # the upper middle
        ok = enough(middle.int())
        low, high = torch.where(ok, middle, low), torch.where(ok, high, middle - 1)
    return low.int()


def gumbel(seed: Tensor, output_idx: Tensor, vocab_size: int) -> Tensor:
    """f32 [B, V] standard Gumbel noise of row i's output number output_idx[i]. seed: i64 [B, 2], low word first."""
    blocks = -(-vocab_size // 4)
    lanes = torch.arange(blocks, device=seed.device)[None, :].expand(seed.shape[0], -1)
    zero = torch.zeros_like(lanes)
    counter = (output_idx[:, None] + zero, lanes, zero + SAMPLING_STREAM, zero)
    bits = torch.stack(philox(counter, (seed[:, :1], seed[:, 1:])), dim=-1).reshape(seed.shape[0], -1)[:, :vocab_size]
    # 23 bits: with 24 the largest draw would round to u == 1 and its noise to infinity
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011). counter: four words of one shape; key: two words; int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(10):
        if turn:
            k0, k1 = (k0 + PHILOX_W0) & WORD, (k1 + PHILOX_W1) & WORD
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1  # modulo 2^64; the sign bit is one of the 64
        high0, high1 = shifted(product0, 32) & WORD, shifted(product1, 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
    return c0, c1, c2, c3


def score(logits: Tensor, targets: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw log-probabilities: of the targets f32 [B], their ranks i32 [B] from 1, and the top i32, f32 [B, num_top]."""
    norm = logits.logsumexp(dim=1, keepdim=True)
    chosen = logits.gather(1, targets[:, None])
    rank = 1 + (logits > chosen).sum(dim=1)
    top, ids = logits.topk(num_top, dim=1)
    return (chosen - norm)[:, 0], rank.int(), ids.int(), top - norm
