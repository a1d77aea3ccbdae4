"""Bytes of one device by purpose, KV pages left out, from config.json and a chip's data sheet alone.

Weights are exact: those of the ParamSpec table as a rank holds them. The rest is estimated. On a TPU it is what
backends/jax itself takes off before it makes pages (ProgramSet.workspace_bytes); on a GPU the largest terms of
backends/torch/memory.py, whose plan at start-up has the last word. Tests hold the three together. Used by plan.py.
Letters: T tokens of a step · S rows · D width · F ffn width · N query heads · K KV heads · H head size · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from engine.runner import Capability, DeviceInfo, RunnerConfig
from engine.specs.arch import ArchSpec, LayerSpec
from engine.specs.cache import INT8_PAGES, cache_groups
from engine.specs.chips import Chip
from engine.specs.parallel import shard_shape
from engine.specs.quant import BLOCK, stored_sizes
from engine.specs.weights import DTYPE_BYTES, param_table

MIB = 1 << 20
CONTEXT_BYTES = 523 * MIB  # of a process on a GPU before anything is planned, measured on an H200
QUANTIZATION = ("fp8", "compressed-tensors", "awq", "gptq")
KV_FORMS = ("fp8_e4m3", INT8_PAGES)
BACKENDS = {"tpu": "jax", "gpu": "torch"}

# backends/jax/programs.py
JAX_SCORE_BYTES = 64 * MIB
JAX_SAMPLED = 64  # rows that are sampled together
JAX_ROW_BYTES = 24_000  # page table and sampling columns of a row, without those of V entries
# backends/torch/{eager,gpu_sample,memory}.py
TORCH_SCORE_BYTES, PIECE_BYTES, SAMPLER_COPIES, LIBRARY_BYTES = 256 * MIB, 64 * MIB, 8, 384 * MIB
SMALL_BYTES, BLOCK_BYTES = MIB, 2 * MIB  # torch's allocator: larger tensors take whole blocks
TORCH_ROW_BYTES = 33_000  # candidates of a row
FEW_ROWS = 128  # of products that do not add in place
MOST_PIECES = 132 * 3 * 2  # beyond one a row: of two waves of three programs on each multiprocessor of an H200
MIXED_TOKENS = 1024  # most tokens of a captured step with prompts
SCRATCH_BYTES = 128 * MIB  # partial sums, lists of attention's work, rounding of the allocator


def device_info(chip: Chip) -> DeviceInfo:
    """What the backend of that chip says of a device with nothing on it."""
    if chip.kind == "tpu":
        return DeviceInfo(
            kind="tpu",
            name=chip.product,
            memory_bytes=chip.memory_bytes,
            free_bytes=chip.memory_bytes,
            capabilities=frozenset(
                {
                    Capability.LATE_MASK,
                    Capability.MULTI_STEP,
                    Capability.PROMPT_LOGPROBS,
                    Capability.EXECUTABLES,
                    Capability.REPLICAS,
                }
            ),
            page_tokens=128,
            default_dtype="bfloat16",
            kv_dtypes=KV_FORMS,
            quantization=QUANTIZATION,
            weight_forms=("fp8", "int8", "w4"),
        )
    return DeviceInfo(
        kind="gpu",
        name=chip.product,
        memory_bytes=chip.memory_bytes,
        free_bytes=chip.memory_bytes - CONTEXT_BYTES,
        capabilities=frozenset({Capability.LATE_MASK, Capability.PROMPT_LOGPROBS, Capability.BATCH_INVARIANT}),
        default_dtype="bfloat16",
        supported_dtypes=("float32", "bfloat16", "float16"),
        kv_dtypes=("fp8_e4m3",) if "fp8" in chip.flops else (),
        attention_backends=("TRITON_ATTN",),
        quantization=QUANTIZATION,
        bucket_style="exact",
    )


def weight_sizes(arch: ArchSpec, ranks: int, dtype: str, kind: str) -> dict[str, int]:
    """Bytes of each weight on rank 0, see weight_tensors."""
    return {name: sum(sizes) for name, sizes in weight_tensors(arch, ranks, dtype, kind).items()}


def weight_tensors(arch: ArchSpec, ranks: int, dtype: str, kind: str) -> dict[str, list[int]]:
    """Bytes of the tensors of each weight on rank 0, which holds no fewer than others. Raises ConfigError at bad cuts.

    KV heads of which there are fewer than ranks, norms and biases of outputs are whole; rows of the vocabulary are
    rounded up.
    """
    item = DTYPE_BYTES[dtype]
    quants = {}
    for param in param_table(arch):
        shard_shape(param, ranks, 0)  # groups of inputs may not be cut
        if param.quant is not None:
            quants[param.weight] = param.quant
    sizes = {}
    for param in param_table(replace(arch, quant=None)):
        shape = shard_shape(param, ranks, 0)
        quant = quants.get(param.name)
        if quant is None:
            norm = kind == "gpu" and param.name.endswith("norm")  # kept in f32
            sizes[param.name] = [prod(shape) * (4 if norm else item)]
            continue
        if kind == "tpu" and quant.form == "w4":  # see backends/jax/quant_weights.py: nibble_params
            tables = [4 * prod(shape) // BLOCK] * (1 if quant.symmetric else 2)
            sizes[param.name] = [prod(shape) // 2, *tables]
            continue
        if quant.act_order:  # any input may be of any group, so a rank has them all
            quant = replace(quant, group=(quant.group or param.shape[1]) * shape[1] // param.shape[1])
        sizes[param.name] = stored_sizes(quant, shape[0], shape[1], item)
    return sizes


def parts(config: RunnerConfig, tensors: Iterable[list[int]], kind: str) -> dict[str, int]:
    """Bytes by purpose. config: of a rank (specs/parallel.rank_arch); tensors: their sizes, a list a weight."""
    weights = [size for sizes in tensors for size in sizes]
    rest = tpu_parts(config) if kind == "tpu" else gpu_parts(config)
    if kind == "gpu":
        rest["reserve"] += sum(-size % BLOCK_BYTES for size in weights if size > SMALL_BYTES)
    return {"weights": sum(weights), **rest}


def tpu_parts(config: RunnerConfig) -> dict[str, int]:
    """ProgramSet.workspace_bytes, part by part: an upper estimate."""
    arch, rows, tokens = config.arch, max(config.row_buckets), max(config.token_buckets)
    widest = max(
        8 * arch.hidden_size
        + 6 * layer.ffn.size
        + 4 * (layer.mixer.num_heads + 2 * layer.mixer.num_kv_heads) * layer.mixer.head_size
        for layer in arch.layers
    )
    slots, vocab = config.max_slots + 1, arch.vocab_size
    return {
        "activations": 4 * tokens * widest,
        "logits_and_sampling": (8 * rows + 24 * min(rows, JAX_SAMPLED)) * vocab + JAX_SCORE_BYTES,
        "tables": slots * (4 * vocab + vocab // 8 + JAX_ROW_BYTES),
        "reserve": 0,
    }


def gpu_parts(config: RunnerConfig) -> dict[str, int]:
    """The largest terms of backends/torch/memory.plan, for the kernels that --attention-backend auto takes.

    activations: of the largest step, and of the captured ones. logits_and_sampling: logits of two steps and of the
    captured ones, what sampling and scoring need beyond the activations, and what requests may ask for (penalties,
    biases, late masks). tables: page tables, stop ids.
    """
    arch, item = config.arch, DTYPE_BYTES[config.dtype]
    tokens, vocab, width = config.max_batched_tokens, arch.vocab_size, arch.hidden_size
    rows, slots = min(config.max_slots, tokens), config.max_slots + 1
    logits = 4 * rows * vocab
    in_layers = layers_bytes(config, tokens) + product_bytes(arch, item, tokens)
    sampler, ends = rows * (vocab // 4 + vocab // 100 + TORCH_ROW_BYTES), rows * (vocab // 85 + 12)  # kept of tiles
    at_logits = (tokens + 2 * rows) * width * item + logits + sampler
    scored = min(TORCH_SCORE_BYTES, 4 * tokens * vocab)
    at_scores = tokens * width * item + logits + scored + scored // 16
    captured = min(tokens, max(rows, MIXED_TOKENS))
    graphs = layers_bytes(config, captured) + product_bytes(arch, item, captured) + (captured + rows) * width * item
    before = (config.max_in_flight - 1) * logits
    more = max(0, at_logits - in_layers, at_scores - in_layers)
    pages = sum(-(-config.max_model_len // page) for page in config.page_tokens)
    return {
        "activations": in_layers + graphs + 2 * partial_bytes(arch, rows) + SCRATCH_BYTES,
        "logits_and_sampling": before + logits + ends + more + on_demand_bytes(config),
        "tables": slots * (4 * pages + 8 * config.sampler_limits.max_stop_ids + 72),
        "reserve": LIBRARY_BYTES,
    }


def on_demand_bytes(config: RunnerConfig) -> int:
    """Biases, allowed ids, counts and bad words of requests that have them; a sampler's copies; late masks."""
    vocab, slots, limits = config.arch.vocab_size, config.max_slots + 1, config.sampler_limits
    rows = min(config.max_slots, config.max_batched_tokens)
    tables = 9 * slots * vocab + 8 * slots * limits.max_bad_words * limits.max_bad_word_len
    return tables + SAMPLER_COPIES * min(PIECE_BYTES, 4 * rows * vocab) + config.max_in_flight * rows * vocab


def partial_bytes(arch: ArchSpec, rows: int) -> int:
    """Of decode attention, whose pieces of a sequence are added up: a step's and the captured steps' have it each."""
    return 4 * (rows + MOST_PIECES) * max(layer.mixer.num_heads * (layer.mixer.head_size + 2) for layer in arch.layers)


def layers_bytes(config: RunnerConfig, tokens: int) -> int:
    """One layer after another: the most of its tensors that are alive at once, and what says where its tokens are."""
    arch, item = config.arch, DTYPE_BYTES[config.dtype]
    ropes = {layer.mixer.rope for layer in arch.layers if layer.mixer.rope is not None}
    indexes = 4 * sum(rope.rotary_size for rope in ropes) + 8 * (12 + 3 * len(cache_groups(arch)))
    values = max(layer_values(layer, arch.hidden_size, tokens > FEW_ROWS) for layer in arch.layers)
    return tokens * (item * values + indexes)


def layer_values(layer: LayerSpec, width: int, many: bool) -> int:
    """Of one token: residuals, q, k, v and outputs, beside the halves of the ffn or the attention's.

    many: of tokens; products of few do not add in place.
    """
    mixer, inner = layer.mixer, layer.ffn.size
    heads = mixer.num_heads * mixer.head_size
    qkv = heads + 2 * mixer.num_kv_heads * mixer.head_size
    residual = width if many and not layer.norms.sandwich else 3 * width
    return max(2 * width + qkv, width + qkv + 2 * heads, residual + qkv + heads + 2 * inner + max(width, inner))


def product_bytes(arch: ArchSpec, item: int, tokens: int) -> int:
    """Of a weight in few bits, beside inputs and result: rounded inputs, outputs of its parts, plain numbers of it."""
    if arch.quant is None:
        return 0
    quants = {param.weight: param.quant for param in param_table(arch) if param.quant is not None}
    most = 0
    for param in param_table(replace(arch, quant=None)):
        quant = quants.get(param.name)
        if quant is None:
            continue
        rows, inner = param.shape
        fused = rows * {"q": 3, "gate": 2, "up": 2}.get(param.name.rpartition(".")[2], 1)  # stored together
        apart = quant.act_order or quant.per == "block" or len(arch.quant.rules) > 1
        turned = quant.act == "none"  # into plain numbers
        most = max(most, tokens * (inner + apart * fused) * item + turned * fused * inner * item)
    return most
