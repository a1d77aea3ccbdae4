"""Gates on the programs of a TPU, compiled without one: few arguments, no copy of the cache or of the weights.

And memory as planned, and two all-reduces a layer.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import jax
import pytest

from backends.jax import mesh
from backends.jax.programs import ProgramSet
from backends.jax.split import Split
from backends.jax.weights import param_bytes, param_shapes
from backends.jax.workspace import workspace_bytes
from bench.shapes import INT8
from engine.runner import RunnerConfig, SamplerLimits
from engine.specs.cache import INT8_PAGES, cache_groups
from engine.specs.families import parse_config
from tests.backends.driver import layout

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
LIMITS = SamplerLimits(max_logprobs=5, max_logit_bias=16, max_stop_ids=8, max_bad_words=4, max_bad_word_len=4)
SMALL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": 4096, "num_attention_heads": 8,
    "num_hidden_layers": 6, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 4096, "attention_bias": False,
}  # fmt: skip


def made(
    slice_name: str, ranks: int, pages: int, kv_dtype: str = "bfloat16", **changes: Any
) -> tuple[ProgramSet, RunnerConfig, Any, Split]:
    arch, split = parse_config(SMALL | changes), mesh.absent_tpu(slice_name).split(ranks)
    config = RunnerConfig(
        arch=arch, dtype="bfloat16", kv_dtype=kv_dtype, max_slots=8, max_model_len=2048, page_tokens=(128,),
        token_buckets=(8, 256), row_buckets=(8,), load_format="dummy", sampler_limits=LIMITS, tensor_size=ranks,
        max_num_steps=4,
    )  # fmt: skip
    held = layout(cache_groups(arch), pages, 128, ranks)
    held = type(held)(groups=held.groups, pools=held.pools, kv_dtype=kv_dtype)
    params = param_shapes(arch, "bfloat16", split)
    return ProgramSet(config, held, params, split), config, params, split


def cache_bytes(pages: int, ranks: int, kv_dtype: str = "bfloat16") -> int:
    head = {"bfloat16": 128 * 2, "fp8_e4m3": 128, INT8_PAGES: 128 + 2}[kv_dtype]
    return 6 * pages * 2 * 128 * (4 // ranks) * head


@pytest.mark.parametrize(
    ("slice_name", "kv_dtype"),
    [("v6e", "bfloat16"), ("v6e", "fp8_e4m3"), ("v6e", INT8_PAGES), ("v5e", INT8_PAGES)],
)
def test_one_chip(slice_name: str, kv_dtype: str) -> None:
    """No scratch grows with the cache (1 % is let pass), which each takes over; none needs more than was planned."""
    few, config, params, split = made(slice_name, 1, 16, kv_dtype)
    many, *_ = made(slice_name, 1, 256, kv_dtype)
    more = cache_bytes(256, 1, kv_dtype) - cache_bytes(16, 1, kv_dtype)
    planned = workspace_bytes(config, params, split)
    for small, large in zip(few.programs(), many.programs(), strict=True):
        if small.name[0] not in ("forward", "sample", "turns", "copy"):
            continue
        assert len(jax.tree_util.tree_leaves(large.args)) < 50, large.name
        before, memory = few.build(small).memory_analysis(), many.build(large).memory_analysis()
        scratch = before.temp_size_in_bytes
        assert memory.temp_size_in_bytes < scratch + more / 100, large.name
        assert scratch < param_bytes(params) / 2 and scratch < planned, large.name
        if small.name[0] != "sample":
            assert memory.alias_size_in_bytes >= cache_bytes(256, 1, kv_dtype), large.name
            assert memory.argument_size_in_bytes - before.argument_size_in_bytes == more, large.name


@pytest.mark.parametrize(
    ("slice_name", "quant"),
    [
        ("v5e", {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}),
        ("v6e", {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}),
    ],
)
def test_weights_in_four_bits_are_read_where_they_lie(slice_name: str, quant: dict[str, Any]) -> None:
    """No scratch as large as a layer's largest weight, packed, which is a quarter of what it takes widened."""
    programs, _, params, _ = made(slice_name, 1, 16, quantization_config=quant, intermediate_size=16384)
    (stack,) = params["stacks"]
    assert stack["gate_up"].dtype == "int32" and stack["gate_up"].shape == (6, 2 * 16384 // 8, 512)
    for program in programs.programs():
        if program.name[0] == "forward":
            assert len(jax.tree_util.tree_leaves(program.args)) < 50
            scratch = programs.build(program).memory_analysis().temp_size_in_bytes
            assert scratch < stack["gate_up"].size * 4 // 6, program.name


@pytest.mark.parametrize(("slice_name", "quant"), [("v5e", INT8), ("v6e", {"quant_method": "fp8"})])
def test_weights_in_few_bits_are_read_where_they_lie(slice_name: str, quant: dict[str, Any]) -> None:
    """No scratch as large as what a layer's largest weight takes, as it lies or widened."""
    programs, _, params, _ = made(slice_name, 1, 16, quantization_config=quant, intermediate_size=8192)
    (stack,) = params["stacks"]
    assert stack["gate_up"].dtype.itemsize == 1
    for program in programs.programs():
        if program.name[0] == "forward":
            assert len(jax.tree_util.tree_leaves(program.args)) < 50
            scratch = programs.build(program).memory_analysis().temp_size_in_bytes
            assert scratch < stack["gate_up"].size // 6, program.name


@pytest.mark.parametrize(("slice_name", "ranks"), [("v6e:2x2", 2), ("v6e:2x2", 4), ("v5e:2x2", 4)])
def test_pages_of_int8_are_not_padded(slice_name: str, ranks: int) -> None:
    """What a page takes of a rank that has one or two heads of it, as the compiler lays it out, is what was planned."""
    sizes = []
    for pages in (16, 256):
        programs, *_ = made(slice_name, ranks, pages, INT8_PAGES)
        copy = next(program for program in programs.programs() if program.name == ("copy", 0))
        memory = programs.build(copy).memory_analysis()
        assert memory.alias_size_in_bytes == cache_bytes(pages, ranks, INT8_PAGES)
        sizes.append(memory.argument_size_in_bytes)
    (group,) = cache_groups(parse_config(SMALL))
    assert sizes[1] - sizes[0] == 240 * 128 * group.bytes_per_token(INT8_PAGES, ranks)


def test_two_all_reduces_a_layer_over_four_chips() -> None:
    """In the loop's body; outside, one for the embedding and three for the likeliest id."""
    programs, _, params, _ = made("v6e:2x2", 4, 64)
    assert param_bytes(params) < 0.3 * param_bytes(made("v6e", 1, 64)[2])
    program = next(program for program in programs.programs() if program.name == ("forward", 8))
    compiled = programs.build(program)
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes(64, 4)
    kinds = re.findall(
        r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text()
    )
    assert kinds == ["all-reduce"] * 6
