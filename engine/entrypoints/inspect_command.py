"""The body of `twinfer inspect CHECKPOINT`: what the engine sees in a checkpoint, as text.

Layers as runs, parameters with their shapes and shards, files, cache groups and bytes: a newcomer can read Qwen3 here
without a qwen3.py. Only headers are read; a folder with config.json alone shows all but the files. Called by the CLI.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.specs.arch import ArchSpec, Attention, LayerSpec, RopeSpec
from engine.specs.cache import GroupSpec, cache_groups
from engine.specs.checkpoint import FOREIGN_FORMATS, assign, find_shards, read_config
from engine.specs.families import parse_config
from engine.specs.generation import generation_defaults, stop_ids
from engine.specs.manifest import is_orbax, read_manifest
from engine.specs.parallel import check_parallel, shard_shape
from engine.specs.weights import ParamSpec, num_parameters, param_table


def run(path: Path, tensor_parallel_size: int = 1) -> str:
    """The report on the checkpoint folder `path`. Raises CheckpointError and ConfigError as loading would."""
    arch = parse_config(read_config(path))
    check_parallel(arch, tensor_parallel_size)
    sections = [
        summary(path, arch),
        ["layers", *layer_lines(arch)],
        [
            f"parameters (rank 0 of --tensor-parallel-size {tensor_parallel_size})",
            *param_lines(arch, tensor_parallel_size),
        ],
        ["cache groups", *group_lines(arch, tensor_parallel_size)],
        ["files", *file_lines(path, arch)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def summary(path: Path, arch: ArchSpec) -> list[str]:
    count = num_parameters(arch)
    num_bytes = sum(param.num_bytes(arch) for param in param_table(arch))
    dtype = arch.checkpoint_dtype
    head = "tied to the embedding" if arch.tied_embeddings else "its own"
    lines = [
        str(path),
        f"  {arch.family}: {len(arch.layers)} layers, {count:,} parameters, "
        f"{size_text(num_bytes)} in {dtype}" + (f" and {arch.quant.method}" if arch.quant is not None else ""),
        f"  width {arch.hidden_size}, vocabulary {arch.vocab_size}, head {head}, "
        f"up to {arch.max_position} tokens, stop ids {list(stop_ids(path, arch))}",
    ]
    if arch.quant is not None:
        kinds = dict.fromkeys(param.quant.text for param in param_table(arch) if param.quant is not None)
        lines += [f"  weights: {kind}" for kind in kinds]
    extras = []
    if arch.embedding_scale != 1:
        extras.append(f"embedding times {arch.embedding_scale:.6g}")
    if arch.logit_cap is not None:
        extras.append(f"logits capped at {arch.logit_cap:g}")
    if extras:
        lines.append("  " + ", ".join(extras))
    defaults = generation_defaults(path)
    if defaults:
        lines.append("  sampling defaults: " + ", ".join(f"{name} {value:g}" for name, value in defaults.items()))
    return lines


def layer_lines(arch: ArchSpec) -> list[str]:
    """One block a run; a run of several layers at a time shows each of them once."""
    lines = []
    for first, period, repeats in arch.runs:
        last = first + len(period) * repeats - 1
        where = f"{first}" if first == last else f"{first}-{last}"
        note = "" if repeats == 1 else f" (x{repeats})" if len(period) == 1 else f" ({len(period)} in turn, x{repeats})"
        lines.append(f"  {where}{note}")
        for nth, (layer, times) in enumerate(grouped(period)):
            lead = "" if len(period) == 1 else f"{nth + 1}. " if times == 1 else f"{nth + 1}. (x{times}) "
            lines += [f"    {lead}{attention_text(layer.mixer)}", f"    {' ' * len(lead)}{ffn_text(layer)}"]
    return lines


def grouped(period: Sequence[LayerSpec]) -> list[tuple[LayerSpec, int]]:
    """Equal neighbours counted."""
    out: list[tuple[LayerSpec, int]] = []
    for layer in period:
        if out and out[-1][0] == layer:
            out[-1] = (layer, out[-1][1] + 1)
        else:
            out.append((layer, 1))
    return out


def attention_text(mixer: Attention) -> str:
    parts = [f"attention: {mixer.num_heads} heads, {plural(mixer.num_kv_heads, 'KV head')} of {mixer.head_size}"]
    parts.append("sees everything before" if mixer.window is None else f"sees the last {mixer.window} tokens")
    if mixer.scale != mixer.head_size**-0.5:
        parts.append(f"scale {mixer.scale:.4g}")
    if mixer.qk_norm:
        parts.append("norms on q and k")
    if mixer.logit_cap is not None:
        parts.append(f"logits capped at {mixer.logit_cap:g}")
    biases = [name for name, used in (("q, k, v", mixer.qkv_bias), ("o", mixer.out_bias)) if used]
    if biases:
        parts.append("biases on " + " and ".join(biases))
    parts.append("no rope" if mixer.rope is None else rope_text(mixer.rope, mixer.head_size))
    return ", ".join(parts)


def rope_text(rope: RopeSpec, head_size: int) -> str:
    text = f"rope {rope.kind} base {rope.theta:g}"
    if rope.factor != 1:
        text += f" factor {rope.factor:g}"
    if rope.original_max_position is not None and rope.kind != "default":
        text += f" from {rope.original_max_position} tokens"
    return text + (f" on {rope.rotary_size} of {head_size} dims" if rope.rotary_size != head_size else "")


def ffn_text(layer: LayerSpec) -> str:
    ffn, norms = layer.ffn, layer.norms
    text = f"ffn: gated {ffn.activation}, {ffn.size} wide" + (", biases" if ffn.bias else "")
    where = "before and after each" if norms.sandwich else "before each"
    weight = " (weight + 1)" if norms.offset else ""
    return f"{text}; RMS norm{weight} {where}, eps {norms.eps:g}"


def param_lines(arch: ArchSpec, ranks: int) -> list[str]:
    """Parameters of all layers together, those of one name and shape in one line."""
    counts: dict[tuple[str, tuple[int, ...]], tuple[ParamSpec, int]] = {}
    for param in param_table(arch):
        name = param.name if not param.name.startswith("layers.") else "layers.*." + param.name.split(".", 2)[2]
        first, times = counts.get((name, param.shape), (param, 0))
        counts[name, param.shape] = (first, times + 1)
    rows = [("name", "layers", "shape", "axes", "bytes", "on rank 0", "bytes")]
    totals = [0, 0]
    for (name, shape), (param, times) in counts.items():
        mine = shard_shape(param, ranks, 0)
        whole_bytes = param.num_bytes(arch) * times
        mine_bytes = whole_bytes * count_of(mine) // max(1, param.num_elements)
        totals = [totals[0] + whole_bytes, totals[1] + mine_bytes]
        layers = str(times) if name.startswith("layers.") else ""
        axes = " ".join(axis or "-" for axis in param.axes)
        rows.append(
            (name, layers, shape_text(shape), axes, size_text(whole_bytes), shape_text(mine), size_text(mine_bytes))
        )
    rows.append(("all", "", "", "", size_text(totals[0]), "", size_text(totals[1])))
    return table(rows)


def group_lines(arch: ArchSpec, ranks: int) -> list[str]:
    """What a cached token costs in each group, in the checkpoint's dtype and on one rank."""
    dtype = arch.checkpoint_dtype
    lines = []
    for nth, group in enumerate(cache_groups(arch)):
        num_bytes = group.bytes_per_token(dtype, ranks)
        lines.append(
            f"  {nth}: {group_text(group)}, layers {ranges(group.layers)}: "
            f"{num_bytes:,} bytes a token in {dtype}, {held(group, arch, num_bytes)}"
        )
    return lines


def group_text(group: GroupSpec) -> str:
    window = "" if group.window is None else f" of {group.window}"
    return f"{group.kind.value}{window}, {plural(group.num_kv_heads, 'KV head')} of {group.head_size}"


def held(group: GroupSpec, arch: ArchSpec, num_bytes: int) -> str:
    """The most that one sequence holds."""
    tokens = min(arch.max_position, group.window or arch.max_position)
    return f"at most {size_text(tokens * num_bytes)} a sequence"


def file_lines(path: Path, arch: ArchSpec) -> list[str]:
    """Each file with its tensors; every header is checked against the table on the way."""
    if is_orbax(path):
        rows = [("part", "parameters", "bytes", "dtypes")]
        for part in read_manifest(path, arch):
            dtypes = " ".join(sorted({dtype for _, dtype in part.params}))
            rows.append((part.folder, str(len(part.params)), size_text(sum(size for _, size in part.files)), dtypes))
        return table(rows)
    if not any(file.suffix in (".safetensors", *FOREIGN_FORMATS) for file in path.iterdir()):
        return ["  none (config.json alone)"]
    entries = find_shards(path)
    assign(path, arch, entries)
    rows = [("name", "tensors", "bytes", "dtypes")]
    for file in sorted({entry.file for entry in entries.values()}):
        inside = [entry for entry in entries.values() if entry.file == file]
        num_bytes = sum(entry.stop - entry.start for entry in inside)
        dtypes = " ".join(sorted({entry.dtype for entry in inside}))
        rows.append((file.name, str(len(inside)), size_text(num_bytes), dtypes))
    return table(rows)


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def count_of(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def shape_text(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def ranges(indexes: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for index in indexes:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def size_text(num_bytes: float) -> str:
    """Binary units, four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
