"""Bytes that the fused path takes of a GPU, by purpose, worked out from the configuration before anything is allocated.

Called by the runner. Each function follows one piece of code, named in its docstring: whoever changes what is alive at
once there changes it here. tests/kernels/test_memory.py holds the two together, and start-up logs plan and peak. Needs
triton, as that path does.
Letters: T tokens of a step · S rows · L sampling rows · D width · F ffn width · N query heads · H head size
· V vocabulary.
"""

from __future__ import annotations

from math import prod

from backends.torch.eager import SCORE_BYTES
from backends.torch.gpu_sample import PIECE_BYTES
from backends.torch.graphs import capture_sizes
from backends.torch.mixed_inputs import MixedInputs, mixed_sizes
from backends.torch.quant_weights import kept_sizes, product_bytes
from backends.torch.weights import storage, stored_name
from cuda_kernels import attention_items, invariant_attention, sampler, score, small_linear, split_sum
from cuda_kernels.candidates import SPAN
from cuda_kernels.flashinfer_attention import PLAN_BYTES, WORKSPACE_BYTES
from engine.runner import ON_DEMAND, RunnerConfig
from engine.specs.arch import ArchSpec, LayerSpec
from engine.specs.cache import cache_groups
from engine.specs.weights import DTYPE_BYTES
from torch_models.persistent import MOST_ROWS, shape_of

MIB = 1 << 20
SMALL, LARGE_STEP = MIB, 2 * MIB  # torch's allocator: larger blocks may keep up to a MiB that nobody asked for
LIBRARY_BYTES = 384 * MIB  # cuBLAS workspaces; 268 MiB of an H200's driver, for kernels and graphs of an 8B model
SAMPLER_COPIES = 8  # of a piece of the logits, alive at once with every processor on
ROUNDING_BYTES = 8 * MIB  # of the tensors that are alive at once
SPLIT_BYTES = 32 * MIB  # partial sums of products of few rows, or those of split_sum


def plan(config: RunnerConfig, multiprocessors: int) -> dict[str, int]:
    """Bytes by purpose, without KV pages."""
    rows = min(config.max_slots, config.max_batched_tokens)
    return {
        "weights": weight_bytes(config),
        "activations": step_bytes(config, multiprocessors),
        "graphs": graph_bytes(config, capture_sizes(rows)[-1], multiprocessors),
        "tables": table_bytes(config),
        ON_DEMAND: on_demand_bytes(config),
        "libraries": LIBRARY_BYTES,
    }


def block(size: int) -> int:
    """What the allocator may take for a tensor of so many bytes."""
    step = 512 if size <= SMALL else LARGE_STEP
    return -(-size // step) * step


def weight_bytes(config: RunnerConfig) -> int:
    """weights.load_params: norm weights in f32, all else in the activations' type, or in few bits."""
    arch, item = config.arch, DTYPE_BYTES[config.dtype]
    quantised = kept_sizes(arch, stored_name, item)
    plain = {name: shape for name, _, shape in storage(arch).values() if name not in quantised}
    sizes = [prod(shape) * (4 if name.endswith("norm") else item) for name, shape in plain.items()]
    return sum(map(block, (*sizes, *(size for parts in quantised.values() for size in parts))))


def unpacked_bytes(config: RunnerConfig, tokens: int) -> int:
    """Products with weights in few bits: rounded inputs, or a weight as plain numbers."""
    return product_bytes(config, stored_name, DTYPE_BYTES[config.dtype], tokens)


def layer_bytes(layer: LayerSpec, width: int, tokens: int, item: int, invariant: bool) -> int:
    """torch_models/fused.run_layer, or invariant.run_layer: the most of its tensors that are alive at once."""
    mixer, inner = layer.mixer, layer.ffn.size
    heads = mixer.num_heads * mixer.head_size
    qkv = heads + 2 * mixer.num_kv_heads * mixer.head_size
    in_place = not (invariant or layer.norms.sandwich or tokens <= small_linear.MOST_ROWS)
    residual = width if in_place else 3 * width  # the model's and the layer's inputs stay with their callers
    at_qkv = width + width + qkv  # the norm's result and its product
    at_attention = width + qkv + 2 * heads  # queries and outputs
    at_ffn = residual + qkv + heads
    if invariant:  # gate and up are never apart
        at_ffn += width + inner
    else:
        at_ffn += 2 * inner + max(width, inner)
    return tokens * item * max(at_qkv, at_attention, at_ffn)


def layers_bytes(config: RunnerConfig, tokens: int) -> int:
    """FusedDecoder.run on so many tokens: turns, and one layer after another; what says where its tokens are."""
    arch, item = config.arch, DTYPE_BYTES[config.dtype]
    ropes = {layer.mixer.rope for layer in arch.layers if layer.mixer.rope is not None}
    turns = 4 * sum(rope.rotary_size for rope in ropes)  # cos and sin, f32
    indexes = 8 * (12 + 3 * len(cache_groups(arch)))  # packed inputs, ids and flags, places of each group
    largest = max(layer_bytes(layer, arch.hidden_size, tokens, item, config.batch_invariant) for layer in arch.layers)
    return largest + tokens * (turns + indexes)


def step_bytes(config: RunnerConfig, multiprocessors: int) -> int:
    """EagerSteps.forward and sample on the largest step, while the logits of the step before it are not read yet."""
    arch, item = config.arch, DTYPE_BYTES[config.dtype]
    tokens, vocab = config.max_batched_tokens, arch.vocab_size
    rows = min(config.max_slots, tokens)
    scratch = 0 if config.batch_invariant else len(kinds(arch)) * workspace_bytes(arch, rows, multiprocessors)
    logits = 4 * rows * vocab
    before = (config.max_in_flight - 1) * logits
    hidden = tokens * arch.hidden_size * item
    chosen = 2 * rows * arch.hidden_size * item  # rows of hidden states, and normed
    at_logits = hidden + chosen + logits + sampler_bytes(rows, vocab)
    scored = min(SCORE_BYTES, 4 * tokens * vocab)  # logits of prompt tokens
    ranked = scored // 16  # what score.py keeps of them
    if config.sampler_limits.max_logprobs > score.MOST_TOP:
        ranked = 3 * scored  # torch's own: exponentials, comparisons, the largest with their places
    at_scores = hidden + logits + scored + ranked
    in_layers = layers_bytes(config, tokens) + unpacked_bytes(config, tokens)
    if not config.batch_invariant:
        # the layer's input, what stands between its halves, and its output
        in_layers += 3 * split_sum.most_bytes(tokens, arch.hidden_size, multiprocessors)
        in_layers += 2 * item_bytes(arch, rows, multiprocessors)  # of rows of one token, and of the sampled ones
    return before + max(in_layers, at_logits, at_scores) + scratch + flashinfer_bytes(config) + ROUNDING_BYTES


def flashinfer_bytes(config: RunnerConfig) -> int:
    """cuda_kernels/flashinfer_attention.FlashInfer, with a wrapper of each kind of layer for each step in flight."""
    if config.attention_backend != "FLASHINFER":
        return 0
    mixers = [(n, config.arch.layers[i].mixer) for n, g in enumerate(cache_groups(config.arch)) for i in g.layers]
    planned = {(n, mixer.num_heads, mixer.scale, mixer.window, mixer.logit_cap) for n, mixer in mixers}
    return WORKSPACE_BYTES + (config.max_in_flight + 1) * len(planned) * PLAN_BYTES


def sampler_bytes(rows: int, vocab: int) -> int:
    """cuda_kernels/sampler.sample, without copies of the logits."""
    tiles = -(-vocab // sampler.TILE)
    peaks = tiles * (sampler.TILE // SPAN.value)
    return rows * (8 * (2 * peaks + 2 * sampler.ROOM) + 20 * tiles + 64)


def kinds(arch: ArchSpec) -> set[tuple[int, int]]:
    """(N, H) of the layers."""
    return {(layer.mixer.num_heads, layer.mixer.head_size) for layer in arch.layers}


def workspace_bytes(arch: ArchSpec, rows: int, multiprocessors: int) -> int:
    """attention_decode.make_workspace."""
    heads, size = max(n for n, _ in kinds(arch)), max(h for _, h in kinds(arch))
    items = rows + multiprocessors * attention_items.PROGRAMS_OF_SM * attention_items.MAX_WAVES
    return block(4 * items * heads * (size + 2)) + block(4 * rows * heads)


def item_bytes(arch: ArchSpec, rows: int, multiprocessors: int) -> int:
    """attention_items.make_items for each group."""
    items = rows + multiprocessors * attention_items.PROGRAMS_OF_SM * attention_items.MAX_WAVES
    return len(cache_groups(arch)) * block(4 * attention_items.RECORD.value * items)


def graph_bytes(config: RunnerConfig, rows: int, multiprocessors: int) -> int:
    """DecodeGraphs and MixedGraphs: their buffers, and the memory that all captured steps share."""
    arch, vocab = config.arch, config.arch.vocab_size
    buffers = block(4 * rows * vocab) + 4 * rows * (3 + 3 * len(cache_groups(arch)) + 4)
    if config.batch_invariant:
        scratch = 4 * max(
            invariant_attention.scratch_values(
                rows, layer.mixer.num_heads, layer.mixer.num_kv_heads, layer.mixer.head_size, config.max_model_len
            )
            for layer in arch.layers
        )
        buffers += block(scratch)
    else:
        buffers += workspace_bytes(arch, rows, multiprocessors)
        shape = shape_of(arch, config.page_tokens[0])
        buffers += 0 if shape is None else shape.scratch_bytes(MOST_ROWS, multiprocessors)
    ends = 12 * rows * -(-vocab // 1024)  # what greedy sampling keeps of each tile of the logits
    shared = shared_bytes(config, rows) + ends
    if not config.batch_invariant:
        shared = max(shared, shared_bytes(config, mixed_sizes(config.max_batched_tokens)[-1]))
        shared += item_bytes(arch, rows, multiprocessors)
        buffers += mixed_bytes(config, rows)
    return buffers + block(shared) + SPLIT_BYTES


def shared_bytes(config: RunnerConfig, tokens: int) -> int:
    """What a captured step of so many tokens has alive at once."""
    begun = tokens * (config.arch.hidden_size * DTYPE_BYTES[config.dtype] + 64)
    return layers_bytes(config, tokens) + unpacked_bytes(config, tokens) + begun


def mixed_bytes(config: RunnerConfig, rows: int) -> int:
    """The buffers of MixedGraphs. rows: the most that a step samples of."""
    arch, largest = config.arch, mixed_sizes(config.max_batched_tokens)[-1]
    inputs, rope = MixedInputs(config, largest, rows).length, arch.layers[-1].mixer.rope
    turns = 0 if rope is None else block(4 * rows * rope.rotary_size)
    few = block(rows * arch.hidden_size * DTYPE_BYTES[config.dtype])
    return block(4 * inputs) + block(2 * (largest + 1)) + few + turns


def table_bytes(config: RunnerConfig) -> int:
    """Tables, as they are made."""
    slots, limits = config.max_slots + 1, config.sampler_limits
    pages = sum(-(-config.max_model_len // page) for page in config.page_tokens)
    return block(4 * slots * pages) + block(8 * slots * limits.max_stop_ids) + slots * (8 + 6 * 4 + 3 * 8 + 16)


def on_demand_bytes(config: RunnerConfig) -> int:
    """What Tables adds for biases, allowed ids, counts and bad words; a sampler's copies; late masks."""
    slots, vocab, limits = config.max_slots + 1, config.arch.vocab_size, config.sampler_limits
    rows = min(config.max_slots, config.max_batched_tokens)
    wide = block(4 * slots * vocab) * 2 + block(slots * vocab)
    words = block(8 * slots * limits.max_bad_words * limits.max_bad_word_len)
    piece = min(PIECE_BYTES, 4 * rows * vocab)
    masks = config.max_in_flight * block(rows * vocab)
    return wide + words + SAMPLER_COPIES * block(piece) + masks
