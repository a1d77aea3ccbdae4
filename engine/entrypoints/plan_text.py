"""A plan of engine/capacity as text for people and as one dict for scripts (`--json`), with the same numbers.

The names in the dict are stable: docs/cli.md lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from engine.capacity.floors import Floor
from engine.capacity.parts import BACKENDS
from engine.capacity.plan import Plan
from engine.capacity.remedies import Remedy
from engine.entrypoints.inspect_command import plural, size_text, table
from engine.specs.weights import num_parameters

PART_TEXTS = {
    "weights": "weights",
    "activations": "activations",
    "logits_and_sampling": "logits and sampling",
    "tables": "page and sampler tables",
    "reserve": "libraries, rounding",
}
ESTIMATES = {"tpu": "an upper estimate", "gpu": "estimated; `twinfer serve` plans it at start"}


def as_dict(model: str, plan: Plan, changes: Sequence[Remedy]) -> dict[str, Any]:
    runner, chips = plan.resolved.runner, plan.ask.slice
    return {
        "model": model,
        "family": plan.arch.family,
        "num_parameters": num_parameters(plan.arch),
        "fits": plan.fits,
        "slice": chips.text,
        "chip": {
            "product": chips.chip.product,
            "memory_bytes": chips.chip.memory_bytes,
            "bandwidth_bytes_per_s": chips.chip.bandwidth,
            "flops_per_s": chips.chip.flops,
            "link_bytes_per_s": chips.chip.link,
            "sources": list(chips.chip.sources),
        },
        "num_chips": chips.num_chips,
        "num_devices": chips.num_devices,
        "backend": BACKENDS[chips.chip.kind],
        "tensor_parallel_size": plan.ranks,
        "data_parallel_size": plan.copies,
        "dtype": runner.dtype,
        "quantization": plan.arch.quant.method if plan.arch.quant is not None else None,
        "kv_cache_dtype": runner.kv_dtype,
        "block_size": runner.page_tokens[0],
        "max_num_seqs": plan.resolved.max_num_seqs,
        "max_num_batched_tokens": plan.resolved.max_num_batched_tokens,
        "max_model_len": plan.max_model_len or plan.resolved.max_model_len,
        "usable_bytes": plan.usable_bytes,
        "parts": dict(plan.parts),
        "needed_bytes": plan.needed_bytes,
        "least_kv_bytes": plan.least_kv_bytes,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "free_bytes": plan.free_bytes,
        "kv_bytes_per_token": plan.resolved.kv_bytes_per_token,
        "kv_tokens": plan.kv_tokens,
        "largest_context": plan.largest_context,
        "context": plan.context,
        "largest_batch": plan.largest_batch,
        "floors": [floor_dict(floor) for floor in plan.floors],
        "changes": [asdict(change) for change in changes],
        "refused_by_serve": list(plan.refused),
        "notes": list(plan.notes),
    }


def floor_dict(floor: Floor) -> dict[str, Any]:
    return {**asdict(floor), "floor_s": floor.floor_s, "tokens_per_s": floor.tokens_per_s}


def as_text(model: str, plan: Plan, changes: Sequence[Remedy]) -> str:
    sections = [head_lines(model, plan), ["bytes of one device", *part_lines(plan)]]
    if plan.fits:
        sections += [room_lines(plan), floor_lines(plan)]
    else:
        sections.append(change_lines(changes))
    remarks = [f"`twinfer serve` refuses this today: {text}" for text in plan.refused]
    remarks += [f"note: {text}" for text in plan.notes]
    if remarks:
        sections.append(remarks)
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def head_lines(model: str, plan: Plan) -> list[str]:
    chips, runner, quant = plan.ask.slice, plan.resolved.runner, plan.arch.quant
    verdict = "fits" if plan.fits else "does not fit"
    split = f"tensor parallel {plan.ranks}"
    if plan.copies > 1:
        split += f", {plan.copies} copies"
    idle = chips.num_devices - plan.ranks * plan.copies
    devices = f"{plural(chips.num_devices, 'device')} of {size_text(chips.chip.memory_bytes)}"
    kept = runner.dtype if quant is None else f"{quant.method} weights in {runner.dtype}"
    return [
        f"{verdict}: {model} on {chips.text}",
        f"  {plan.arch.family}, {num_parameters(plan.arch):,} parameters, {kept}, KV cache {runner.kv_dtype}",
        f"  {chips.chip.product}, {devices}, {f'{idle} idle, ' if idle else ''}{split}, "
        f"--backend {BACKENDS[chips.chip.kind]}",
    ]


def part_lines(plan: Plan) -> list[str]:
    share = plan.ask.config.cache.gpu_memory_utilization
    estimate = ESTIMATES[plan.ask.slice.chip.kind]
    rows = [
        (PART_TEXTS[name], size_text(size), "exact" if name == "weights" else estimate)
        for name, size in plan.parts.items()
        if size
    ]
    if plan.fits:
        pages = f"{plan.resolved.kv_bytes_per_token:,} bytes a token, pages of {plan.resolved.runner.page_tokens[0]}"
        rows.append(("KV cache", size_text(plan.kv_cache_bytes), pages))
        rows.append(("left over", size_text(plan.free_bytes), ""))
    else:
        length = plan.resolved.max_model_len
        what = f"a request of {length} tokens" if plan.resolved.max_model_len_given else "a page of each group"
        rows.append(("KV cache", size_text(plan.least_kv_bytes), f"at least, {what}"))
        over = plan.needed_bytes + plan.least_kv_bytes - plan.usable_bytes
        rows.append(("too much", size_text(over), ""))
    rows.append(("usable", size_text(plan.usable_bytes), f"--gpu-memory-utilization {share:g} of a device"))
    return table(rows)


def room_lines(plan: Plan) -> list[str]:
    each = " of each copy" if plan.copies > 1 else ""
    return [
        f"room{each}",
        f"  {plan.kv_tokens:,} tokens of KV cache; largest context of one request {plan.largest_context:,}",
        f"  largest batch at {plan.context:,} tokens each: {plan.largest_batch} "
        f"(--max-num-seqs {plan.resolved.max_num_seqs}, --max-model-len {plan.max_model_len})",
    ]


def floor_lines(plan: Plan) -> list[str]:
    """Times that no engine can go below on the chip's data sheet; equal rows once."""
    rows = [("step", "floor", "tokens/s", "weights", "products", "KV", "attention", "all-reduces")]
    for floor in dict.fromkeys(plan.floors):
        rows.append(
            (
                step_text(floor),
                time_text(floor.floor_s),
                f"at most {floor.tokens_per_s * plan.copies:,.0f}",
                time_text(floor.weights_s),
                time_text(floor.products_s),
                time_text(floor.kv_s),
                time_text(floor.attention_s),
                sent_text(floor),
            )
        )
    return ["floor of a step: peaks of the data sheet, nothing measured; all-reduces come on top", *table(rows)]


def step_text(floor: Floor) -> str:
    if floor.step == "decode":
        return f"decode, {floor.batch} x {floor.context:,}"
    return f"prefill, {floor.tokens:,} tokens"


def sent_text(floor: Floor) -> str:
    if not floor.collective_bytes and floor.collective_s is not None:
        return "none"
    if floor.collective_s is None:
        return f"{size_text(floor.collective_bytes)}, link unknown" if floor.collective_bytes else "inside a chip"
    return f"{time_text(floor.collective_s)} ({size_text(floor.collective_bytes)})"


def change_lines(changes: Sequence[Remedy]) -> list[str]:
    if not changes:
        return ["no single change would make it fit: take more chips of a larger kind, and fewer bits"]
    rows = [(change.change, "" if change.served else "`twinfer serve` refuses it today") for change in changes]
    return ["each of these alone would make it fit", *table(rows)]


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} us"
