"""Reads the quantization_config of a config.json into a ModelQuant, as the field's writers spell it.

Methods: fp8 (transformers, DeepSeek), compressed-tensors (llm-compressor), awq (AutoAWQ "gemm") and gptq (AutoGPTQ,
GPTQModel). What would change the numbers and is not known is refused by name; what only says how the weights were made
(damping, data sets, versions) is left alone: a form that is not as described here shows in the tensors, which are all
checked for name, shape and type.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from engine.specs.families.fields import Fields
from engine.specs.quant import BLOCK, Act, ModelQuant, Pattern, WeightQuant

HEAD = Pattern(kind="path", text="lm_head")
EVERY = (Pattern(kind="linear"),)
MAX_PATTERN = 200  # characters
MAX_REPEATS = 4  # stars and pluses of a pattern: names are short, so its time is bounded


def parse_quantization(config: Fields) -> ModelQuant | None:
    """None for plain checkpoints. Raises ConfigError naming the key, its value and what is accepted."""
    tables = [t for t in (config.table("quantization_config"), config.table("compression_config")) if t and t.values]
    text = config.table("text_config")
    inner = text.table("quantization_config") if text is not None else None
    tables += [inner] if inner is not None and inner.values else []
    if not tables:
        return None
    for other in tables[1:]:
        if other.values != tables[0].values:
            config.refuse("quantization_config", f"the same as {other.where}")
    table = tables[0]
    method = table.values.get("quant_method")
    if method is None and "config_groups" in table.values:
        method = "compressed-tensors"  # early versions did not write it
    if not isinstance(method, str) or method not in METHODS:
        table.refuse("quant_method", "one of " + ", ".join(METHODS))
    return METHODS[method](table)


def at_load(method: str) -> ModelQuant:
    """--quantization fp8 on a plain checkpoint: a scale a row, activations rounded per token, the head left alone."""
    quant = WeightQuant(scheme="fp8", layout="plain", per="channel", act="token", at_load=True)
    return ModelQuant(method=method, rules=((EVERY, quant),), ignored=(HEAD,))


def parse_fp8(table: Fields) -> ModelQuant:
    """A scale of the whole weight, or one of each block of 128 x 128 (then of 128 inputs of each token too)."""
    table.choice("fmt", {"e4m3": "e4m3", "float8_e4m3fn": "e4m3"}, "e4m3")
    table.neutral("scale_fmt", ("float",), "scales are plain numbers here")
    act = table.choice("activation_scheme", {"dynamic": "dynamic", "static": "static"}, "dynamic")
    block = table.values.get("weight_block_size")
    if block is not None and block != [BLOCK, BLOCK]:
        table.refuse("weight_block_size", f"[{BLOCK}, {BLOCK}] or null")
    if block is not None and act == "static":
        table.refuse("activation_scheme", "dynamic, as weight_block_size is given")
    acts: Act = "static" if act == "static" else "block" if block is not None else "token"
    quant = WeightQuant(scheme="fp8", layout="plain", per="tensor" if block is None else "block", act=acts)
    ignored = (HEAD, *paths(table, "modules_to_not_convert"), *paths(table, "ignored_layers"))
    return ModelQuant(method="fp8", rules=((EVERY, quant),), ignored=ignored)


def parse_awq(table: Fields) -> ModelQuant:
    bits(table, "w_bit" if table.has("w_bit") else "bits")
    group = group_size(table, "q_group_size" if table.has("q_group_size") else "group_size")
    version = table.values.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        table.refuse("version", "gemm (gemv and the others pack in other orders)")
    table.neutral("zero_point", (True,), "AWQ in the gemm layout stores zeros")
    quant = WeightQuant(scheme="w4", layout="awq", per="group", act="none", group=group, symmetric=False)
    return ModelQuant(method="awq", rules=((EVERY, quant),), ignored=(HEAD, *paths(table, "modules_to_not_convert")))


def parse_gptq(table: Fields) -> ModelQuant:
    bits(table, "bits")
    form = table.choice("checkpoint_format", {"gptq": "gptq", "gptq_v2": "gptq_v2"}, "gptq")
    pack = table.values.get("pack_dtype", "int32")
    if pack not in ("int32", "torch.int32"):
        table.refuse("pack_dtype", "int32")
    quant = WeightQuant(
        scheme="w4",
        layout="gptq",
        per="group",
        act="none",
        group=group_size(table, "group_size"),
        symmetric=table.boolean("sym", False),
        act_order=table.boolean("desc_act", False),
        zero_bias=1 if form == "gptq" else 0,
    )
    ignored = list(paths(table, "modules_to_not_convert"))
    if not table.boolean("lm_head", False):
        ignored.append(HEAD)
    dynamic = table.table("dynamic")
    for rule in () if dynamic is None else dynamic.values:
        if not rule.startswith("-:"):
            dynamic and dynamic.refuse(rule, "only rules that begin with -: (modules left plain)")
        ignored.append(regex(table, "dynamic", rule[2:]))
    return ModelQuant(method="gptq", rules=((gptq_targets(table), quant),), ignored=tuple(ignored))


def gptq_targets(table: Fields) -> tuple[Pattern, ...]:
    """All linear modules, or those of modules_in_block_to_quantize, a list of lists of names inside a layer."""
    name = "modules_in_block_to_quantize"
    given = table.values.get(name)
    if not given:
        return EVERY
    nested = isinstance(given, list) and all(isinstance(item, list) for item in given)
    flat = [part for item in given for part in item] if nested else given
    if not isinstance(flat, list) or not all(isinstance(part, str) and part for part in flat):
        table.refuse(name, "a list of module names, or of such lists")
    return tuple(Pattern(kind="path", text=part) for part in flat)


def bits(table: Fields, name: str) -> None:
    if table.integer(name, 4) != 4:
        table.refuse(name, "4")


def group_size(table: Fields, name: str) -> int:
    """Inputs that share a scale; 0 for -1, a row in one group."""
    size = table.integer(name, 128, minimum=-1)
    if size == 0:
        table.refuse(name, "-1 or a number > 0")
    return max(size, 0)


def parse_compressed(table: Fields) -> ModelQuant:
    """Config groups of llm-compressor: fp8 and int8 weights, with or without rounded activations, and 4-bit groups."""
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        inner = table.values.get(name)
        if inner and not (name == "sparsity_config" and isinstance(inner, dict) and inner.get("format") == "dense"):
            table.refuse(name, "null or {} (not supported)")
    status = table.values.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        table.refuse("quantization_status", "compressed or frozen")
    groups = table.table("config_groups")
    if groups is None or not groups.values:
        table.refuse("config_groups", "an object with at least one group")
    rules = []
    for name in groups.values:
        group = groups.table(name)
        if group is None:
            groups.refuse(name, "an object")
        rules.append((patterns(group, "targets"), compressed_weight(table, group)))
    rules.sort(key=lambda rule: any(pattern.kind == "linear" for pattern in rule[0]))  # names before classes
    return ModelQuant(method="compressed-tensors", rules=tuple(rules), ignored=patterns(table, "ignore"))


FORMATS = {
    "float-quantized": "plain",
    "int-quantized": "plain",
    "naive-quantized": "plain",
    "pack-quantized": "packed",
    "mixed-precision": "",
}


KINDS = {("float", 8): ("fp8", "plain"), ("int", 8): ("int8", "plain"), ("int", 4): ("w4", "packed")}


def compressed_weight(table: Fields, group: Fields) -> WeightQuant:
    weights = group.table("weights")
    if weights is None:
        group.refuse("weights", "an object")
    group.neutral("output_activations", (), "rounded outputs are not supported")
    kind, width = weights.choice("type", {"int": "int", "float": "float"}, "int"), weights.integer("num_bits", 8)
    if (kind, width) not in KINDS:
        weights.refuse("num_bits", "8, or 4 with type int" if kind == "int" else "8 (with type float)")
    scheme, layout = KINDS[kind, width]
    holder = group if group.has("format") else table
    if scheme == "int8" and holder.values.get("format") == "pack-quantized":
        layout = "packed"  # four to an int32
    check_format(holder, layout)
    if weights.values.get("dynamic") not in (None, False):
        weights.refuse("dynamic", "false")
    if scheme == "w4":
        return packed_weight(group, weights)
    if not weights.boolean("symmetric", True):
        weights.refuse("symmetric", "true, as num_bits is 8")
    strategy = weights.values.get("strategy") or "tensor"
    known = ("tensor", "channel", "block") if scheme == "fp8" else ("tensor", "channel")
    if strategy not in known:
        weights.refuse("strategy", "one of " + ", ".join(known))
    if strategy == "block" and weights.values.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        weights.refuse("block_structure", f"[{BLOCK}, {BLOCK}]")
    act = compressed_act(group, kind, strategy)
    return WeightQuant(scheme=scheme, layout=layout, per=strategy, act=act)  # type: ignore[arg-type]  # checked above


def check_format(holder: Fields, layout: str) -> None:
    """ "mixed-precision" leaves the format to the groups; one that names none has the usual one of its numbers."""
    form = holder.values.get("format")
    if form not in FORMATS or FORMATS[form] not in (layout, ""):
        holder.refuse("format", "pack-quantized" if layout == "packed" else "float-, int- or naive-quantized")


def packed_weight(group: Fields, weights: Fields) -> WeightQuant:
    group.neutral("input_activations", (), "activations stay as they are beside 4-bit weights")
    strategy = weights.values.get("strategy") or ("group" if weights.has("group_size") else "channel")
    if strategy not in ("group", "channel"):
        weights.refuse("strategy", "group or channel, as num_bits is 4")
    size = 0 if strategy == "channel" else weights.integer("group_size")
    order = weights.values.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic", True):
        weights.refuse("actorder", "null, weight or group")
    return WeightQuant(
        scheme="w4",
        layout="packed",
        per="group",
        act="none",
        group=size,
        symmetric=weights.boolean("symmetric", True),
        act_order=order in ("group", "dynamic", True),
    )


def compressed_act(group: Fields, kind: str, strategy: str) -> Act:
    """How activations are rounded beside 8-bit weights."""
    acts = group.table("input_activations")
    if acts is None or not acts.values:
        return "none"
    if acts.values.get("type", "int") != kind:
        acts.refuse("type", f"{kind}, as the weights have")
    if acts.integer("num_bits", 8) != 8:
        acts.refuse("num_bits", "8, as the weights have")
    if not acts.boolean("symmetric", True):
        acts.refuse("symmetric", "true")
    dynamic = acts.boolean("dynamic", False)
    how = acts.values.get("strategy") or ("token" if dynamic else "tensor")
    known: dict[tuple[object, bool], Act] = {("token", True): "token", ("tensor", False): "static"}
    if strategy == "block":
        known = {("group", True): "block"}
        if acts.values.get("group_size") != BLOCK:
            acts.refuse("group_size", f"{BLOCK}, as the weights have blocks")
    if (how, dynamic) not in known:
        good = " or ".join(f"{name} with dynamic {str(flag).lower()}" for name, flag in known)
        acts.refuse("strategy", good)
    return known[how, dynamic]


def patterns(table: Fields, name: str) -> tuple[Pattern, ...]:
    """Targets and exceptions of compressed-tensors: Linear, a module's name, or re: and a pattern for its beginning."""
    found = []
    for text in strings(table, name):
        if text == "Linear":
            found.append(Pattern(kind="linear"))
        elif text == "Embedding" and name == "targets":
            table.refuse(name, "Linear or names of linear modules")
        elif text.startswith("re:"):
            found.append(regex(table, name, text[3:]))
        else:
            found.append(Pattern(kind="exact", text=text))
    return tuple(found)


def paths(table: Fields, name: str) -> tuple[Pattern, ...]:
    return tuple(Pattern(kind="path", text=text.removesuffix(".weight")) for text in strings(table, name))


def strings(table: Fields, name: str) -> list[str]:
    given: Any = table.values.get(name)
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(text, str) and text for text in given):
        table.refuse(name, "a list of module names")
    return given


def regex(table: Fields, name: str, text: str) -> Pattern:
    """A pattern of the checkpoint's, refused where it could take long: nested repeats, or many."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        table.refuse(name, f"regular expressions that can be read ({text[:40]!r}: {error})")
    if len(text) > MAX_PATTERN or re.search(r"\)[*+?{]|\\\d", text) or len(re.findall(r"[*+{]", text)) > MAX_REPEATS:
        table.refuse(name, f"regular expressions with at most {MAX_REPEATS} repeats and none of a group")
    return Pattern(kind="regex", text=text)


METHODS: dict[str, Callable[[Fields], ModelQuant]] = {
    "fp8": parse_fp8,
    "compressed-tensors": parse_compressed,
    "awq": parse_awq,
    "gptq": parse_gptq,
}
