"""engine/capacity: bytes by hand, published models on published chips, floors by hand, and what always holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.shapes import GEMMA_27B, LLAMA_8B, LLAMA_70B, TINY
from engine.capacity.floors import Model, decode_floor, prefill_floor, seen_pairs
from engine.capacity.parts import device_info, weight_sizes
from engine.capacity.plan import Ask, Plan, make_plan
from engine.capacity.remedies import remedies
from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.errors import ConfigError
from engine.resolve import GIB, kv_bytes_of, plan_cache
from engine.specs.arch import ArchSpec
from engine.specs.chips import CHIPS, Slice, parse_slice
from engine.specs.families import parse_config
from engine.specs.parallel import rank_arch, shard_shape
from engine.specs.weights import param_table
from tests.engine.specs.quant_forms import ALL
from tests.engine.specs.test_families import PUBLISHED


def asked(text: str, **values: Any) -> Ask:
    """values: of Ask, ModelConfig, CacheConfig or ScheduleConfig."""
    kind = "gpu" if text.partition(":")[0] in [chip.name for chip in CHIPS if chip.kind == "gpu"] else "tpu"

    def of(config: type) -> Any:
        return config(**{name: values.pop(name) for name in list(values) if name in config.__dataclass_fields__})

    config = EngineConfig(model=of(ModelConfig), cache=of(CacheConfig), schedule=of(ScheduleConfig))
    return Ask(slice=parse_slice(kind, text), config=config, **values)  # type: ignore[arg-type]


def planned(config: dict[str, Any], text: str, **values: Any) -> Plan:
    return make_plan(parse_config(config), asked(text, **values))


def changes(config: dict[str, Any], plan: Plan) -> dict[str, bool]:
    return {remedy.change: remedy.served for remedy in remedies(parse_config(config), plan)}


# 199 x 64 embedding, 64 final norm; a layer: 2 x 64 norms, q and o 64 x 64, k and v 32 x 64, three of 96 x 64
@pytest.mark.parametrize(
    ("ranks", "numbers"),
    [
        (1, 199 * 64 + 64 + 2 * (128 + 2 * 4096 + 2 * 2048 + 3 * 6144)),
        (2, 100 * 64 + 64 + 2 * (128 + 2 * 2048 + 2 * 1024 + 3 * 3072)),  # 199 rows of the vocabulary are 100 and 99
        (4, 50 * 64 + 64 + 2 * (128 + 2 * 1024 + 2 * 1024 + 3 * 1536)),  # 2 KV heads: each is held twice
    ],
)
def test_weights_by_hand(ranks: int, numbers: int) -> None:
    arch = parse_config(TINY)
    assert sum(weight_sizes(arch, ranks, "bfloat16", "tpu").values()) == 2 * numbers
    assert sum(weight_sizes(arch, ranks, "bfloat16", "gpu").values()) == 2 * numbers + 2 * 5 * 64  # norms in f32
    assert sum(weight_sizes(arch, ranks, "float32", "tpu").values()) == 4 * numbers
    plan = planned(TINY, "v5e:2x2", ranks=ranks)
    assert plan.parts["weights"] == 2 * numbers
    assert plan.resolved.kv_bytes_per_token == 2 * 2 * max(1, 2 // ranks) * 16 * 2


def test_weights_in_few_bits_by_hand() -> None:
    """A byte a number and a scale of 4 bytes a row; embedding and norms stay."""
    plan = planned(TINY, "h200:2", ranks=2, quantization="fp8")
    layer = 2048 * 2 + 1024 * 2 + 3072 * 3 + 4 * (32 + 16 + 16 + 64 + 48 + 48 + 64)
    assert plan.parts["weights"] == 2 * 100 * 64 + 4 * 5 * 64 + 2 * layer


@pytest.mark.parametrize("name", sorted(ALL))
def test_quantised_weights_shrink_with_ranks(name: str) -> None:
    """Halves of a weight in few bits take half, but for scales of whole rows; act order keeps every group."""
    arch = parse_config(PUBLISHED["Llama-3.2-1B"] | {"quantization_config": ALL[name]})
    whole = weight_sizes(arch, 1, "bfloat16", "gpu")
    half = weight_sizes(arch, 2, "bfloat16", "gpu")
    plain = weight_sizes(replace(arch, quant=None), 1, "bfloat16", "gpu")
    assert sum(whole.values()) < 0.75 * sum(plain.values())
    rows, inputs = 2048, {"q": 2048, "o": 2048, "gate": 2048, "down": 8192}
    for part, columns in inputs.items():
        more = 2 * half[f"layers.0.{part}"] - whole[f"layers.0.{part}"]
        kept = {"gptq": rows * columns // 32 * 3, "block": 0, "awq": 0, "int4": 0}.get(name, 4 * rows)  # with each rank
        if part in ("q", "gate"):
            kept = 4 * columns if name == "gptq" else 0  # the order of all inputs
        assert more == kept + 4 * (name == "static"), part


@given(
    ranks=st.sampled_from([1, 2, 4, 8, 16]),
    kv_heads=st.sampled_from([1, 2, 4, 8, 16]),
    vocab=st.integers(16, 400),
    tied=st.booleans(),
)
def test_a_rank_of_the_architecture_has_the_shards_of_the_table(
    ranks: int, kv_heads: int, vocab: int, tied: bool
) -> None:
    config = {"num_attention_heads": 16, "num_key_value_heads": kv_heads, "vocab_size": vocab}
    arch = parse_config(TINY | config | {"tie_word_embeddings": tied})
    mine = {param.name: param.shape for param in param_table(rank_arch(arch, ranks))}
    assert mine == {param.name: shard_shape(param, ranks, 0) for param in param_table(arch)}


def test_llama_8b_fits_one_v6e() -> None:
    plan = planned(LLAMA_8B, "v6e")
    assert plan.fits and plan.ranks == 1 and not plan.refused
    assert plan.parts["weights"] == 2 * 8_030_261_248
    assert plan.resolved.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert plan.resolved.runner.page_tokens == (128,)
    assert 12.06 * GIB < plan.kv_cache_bytes < 12.07 * GIB
    assert plan.largest_context == plan.max_model_len == 98688
    assert plan.largest_batch == 98688 // 4096 and plan.context == 4096
    assert any("the model length is 98688" in note for note in plan.notes)


def test_llama_8b_does_not_fit_one_v5e() -> None:
    plan = planned(LLAMA_8B, "v5e")
    assert not plan.fits and not plan.floors and not plan.largest_batch
    assert plan.needed_bytes > plan.usable_bytes > 14 * GIB
    found = changes(LLAMA_8B, plan)
    assert found == {
        "--tpu v5e:2x2": True,
        "--tpu v6e": True,
        "--tpu v5p": True,
        "--tpu tpu7x": True,
        "--quantization fp8": True,
    }
    rounded = planned(LLAMA_8B, "v5e", quantization="fp8")
    assert rounded.fits and not rounded.refused


def test_forms_that_a_tpu_does_not_multiply_are_refused() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    packed = planned(LLAMA_8B | {"quantization_config": awq}, "v5e")
    assert packed.fits and "weights of 4 bits per group of 64 are not supported by this backend" in packed.refused[0]
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert "fp8 per block" in planned(LLAMA_8B | {"quantization_config": blocks}, "v5e").refused[0]
    whole = planned(LLAMA_8B | {"quantization_config": awq | {"group_size": 128}}, "v5e")
    assert whole.fits and not whole.refused


def test_llama_70b_on_eight_v6e() -> None:
    plan = planned(LLAMA_70B, "v6e:2x4")
    assert plan.fits and plan.ranks == 8
    assert plan.largest_context == 131072
    assert plan.resolved.kv_bytes_per_token == 2 * 80 * 1 * 128 * 2  # one of 8 KV heads
    assert 16.4 * GIB < plan.parts["weights"] < 16.5 * GIB
    assert not plan.refused
    assert not planned(LLAMA_70B, "v6e:2x2").fits
    assert next(iter(changes(LLAMA_70B, planned(LLAMA_70B, "v6e")))) == "--tpu v6e:2x4"


def test_gemma_27b_on_four_v6e() -> None:
    """Pages of windows and of whole sequences are divided for requests of the model length."""
    plan = planned(GEMMA_27B, "v6e:2x2")
    assert plan.fits and plan.ranks == 4 and plan.largest_context == 131072
    shorter = planned(GEMMA_27B, "v6e:2x2", max_model_len=4096)
    assert shorter.largest_batch > 5 * plan.largest_batch and shorter.context == 4096
    assert any(f"the largest batch is {shorter.largest_batch}" in note for note in plan.notes)
    assert shorter.largest_context == 131072


def test_qwen3_on_one_v5e() -> None:
    plan = planned(PUBLISHED["Qwen3-0.6B"], "v5e")
    assert plan.fits and plan.parts["weights"] == 2 * 596_049_920 and plan.largest_context > 100_000


def test_an_h200_as_it_was_measured() -> None:
    """docs/memory.md: 128.10 GiB planned, of them 4 to 5 neither weights nor KV; its weights are read in 3.13 ms."""
    plan = planned(LLAMA_8B, "h200")
    assert plan.usable_bytes / GIB == pytest.approx(128.10, abs=0.01)
    assert 4 < (plan.needed_bytes - plan.parts["weights"]) / GIB < 5
    assert plan.floors[0].weights_s == pytest.approx(3.13e-3, rel=2e-3)


def test_floors_by_hand() -> None:
    arch = parse_config(TINY)
    chip = parse_slice("tpu", "v5e:2x2")
    model = Model(arch=arch, ranks=1, slice=chip, sizes=weight_sizes(arch, 1, "bfloat16", "tpu"), dtype="bfloat16",
                  kv_dtype="bfloat16")  # fmt: skip
    step = decode_floor(model, 2, 10)
    matrices = 2 * (2 * 4096 + 2 * 2048 + 3 * 6144) + 199 * 64  # of two layers, and the embedding as the head
    assert step.weights_bytes == sum(model.sizes.values())
    assert step.kv_bytes == 2 * 10 * (2 * 2 * 2 * 16 * 2)
    assert step.flops == 2 * 2 * matrices + 2 * 2 * 10 * 4 * 4 * 16
    assert step.weights_s == step.weights_bytes / 0.819e12 and step.kv_s == step.kv_bytes / 0.819e12
    assert step.products_s == 2 * 2 * matrices / 197e12
    assert step.floor_s == max(step.weights_s, step.products_s) + max(step.kv_s, step.attention_s)
    assert step.tokens_per_s == 2 / step.floor_s
    assert (step.collective_bytes, step.collective_s) == (0, 0.0)
    halves = replace(model, ranks=2, sizes=weight_sizes(arch, 2, "bfloat16", "tpu"))
    step = decode_floor(halves, 2, 10)
    assert step.collective_bytes == 2 * 1 * (2 * 2 + 1) * 2 * 64 * 2 // 2
    assert step.collective_s == step.collective_bytes / 0.2e12
    assert step.kv_bytes == 2 * 10 * (2 * 2 * 1 * 16 * 2)


def test_pages_of_int8_by_hand() -> None:
    """130 bytes for a head of 128: as many more tokens; refused on a GPU, in serve's words."""
    wide, plan = (planned(LLAMA_8B, "v6e", kv_cache_dtype=name) for name in ("auto", "int8_per_token_head"))
    assert plan.fits and not plan.refused
    assert plan.resolved.kv_bytes_per_token == 2 * 32 * 8 * 130
    assert plan.needed_bytes == wide.needed_bytes
    assert plan.kv_tokens / wide.kv_tokens == pytest.approx(256 / 130, rel=5e-3)
    assert plan.floors[0].kv_bytes == plan.context * 2 * 32 * 8 * 130
    (said,) = planned(LLAMA_8B, "h200", kv_cache_dtype="int8_per_token_head").refused
    assert "--kv-cache-dtype: 'int8_per_token_head' is not supported on" in said and "--backend jax" in said


def test_prefill_floor_by_hand() -> None:
    """10 tokens of prompts of at most 4: 4, 4 and 2, each row of which the head sees once."""
    arch = replace(parse_config(TINY), tied_embeddings=False)
    chip = parse_slice("gpu", "l4")
    model = Model(arch=arch, ranks=1, slice=chip, sizes=weight_sizes(arch, 1, "bfloat16", "gpu"), dtype="bfloat16",
                  kv_dtype="fp8_e4m3")  # fmt: skip
    step = prefill_floor(model, 10, 4)
    assert (step.batch, step.tokens, step.context) == (3, 10, 4)
    matrices, head = 2 * (2 * 4096 + 2 * 2048 + 3 * 6144), 199 * 64
    pairs = (1 + 2 + 3 + 4) * 2 + 1 + 2
    assert step.flops == 2 * (10 * matrices + 3 * head) + 2 * 4 * 4 * 16 * pairs
    assert step.kv_bytes == 10 * (2 * 2 * 2 * 16 * 1)
    looked_up = 10 * 64 * 2  # rows of an embedding that is not the head
    assert step.weights_bytes == sum(model.sizes.values()) - 2 * head + looked_up


@pytest.mark.parametrize(
    ("text", "units"), [("h200", "fp8"), ("l4", "fp8"), ("a100-80g", "bfloat16"), ("v5e", "bfloat16")]
)
def test_eight_bits_are_counted_where_the_chip_has_them(text: str, units: str) -> None:
    """Products of a full step of a prompt; a head that stays plain has one row of 2048."""
    half, full = planned(LLAMA_8B, text, quantization="fp8"), planned(LLAMA_8B, "h100")
    chip = half.ask.slice.chip
    model = Model(
        arch=half.arch, ranks=1, slice=half.ask.slice, sizes={"embed": 0}, dtype="bfloat16", kv_dtype="bfloat16"
    )
    plain = replace(model, arch=full.arch)
    seconds = [prefill_floor(each, 2048, 2048).products_s for each in (model, plain)]
    assert seconds[0] / seconds[1] == pytest.approx(chip.flops["bfloat16"] / chip.flops[units], rel=1e-3)


@given(new=st.integers(1, 30), before=st.integers(0, 30), window=st.none() | st.integers(1, 40))
def test_pairs(new: int, before: int, window: int | None) -> None:
    seen = before + new
    counted = sum(min(place + 1, window or seen) for place in range(before, seen))
    assert seen_pairs(new, seen, window) == counted


@pytest.mark.parametrize(
    ("text", "values", "said"),
    [
        ("v5e:4x8", {}, "32 does not divide 4 .*give --tensor-parallel-size 4 --data-parallel-size 8"),
        ("v5e:2x2", {"ranks": 3}, "--tensor-parallel-size: 3 does not divide"),
        ("v5e:2x2", {"ranks": 0}, "--tensor-parallel-size: 0 is not accepted"),
        ("v5e:2x2", {"copies": 0}, "--data-parallel-size: 0 is not accepted"),
        ("v5e:2x2", {"ranks": 4, "copies": 2}, "4 x 2 copies .*the 4 devices of v5e:2x2"),
        ("v5e", {"copies": 2}, "1 x 2 copies .*the 1 devices of v5e"),
        ("v5e", {"context": 5000}, "--context: 5000 is not accepted; expected 1 .. 4096"),
        ("v5e", {"context": 200, "max_model_len": 128}, "--context: 200 is not accepted; expected 1 .. 128"),
        ("v5e", {"dtype": "float16"}, "--dtype: 'float16' is not supported on TPU v5e"),
        ("v5e", {"quantization": "awq"}, "needs a checkpoint made so"),
        ("v5e", {"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization: 1.5 is not accepted"),
        ("v5e", {"max_model_len": 9999}, "--max-model-len: 9999 is not accepted"),
        ("v5e", {"block_size": 100}, "--block-size: 100 is not accepted"),
    ],
)
def test_refusals(text: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        planned(TINY, text, **values)
    assert "\n" not in str(caught.value)


def test_copies_share_a_slice() -> None:
    plan = planned(TINY, "v5e:2x4", copies=4)
    assert (plan.ranks, plan.copies) == (2, 4)
    assert not plan.refused  # by jax; torch drives one device
    assert any("--data-parallel-size" in text for text in planned(TINY, "h200:8", copies=4).refused)
    assert planned(TINY, "v5e:2x4", ranks=1).copies == 1


def random_arch(kv_heads: int, layers: int, width: int, windows: int) -> ArchSpec:
    config = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "num_hidden_layers": layers,
              "hidden_size": width, "head_dim": 128, "intermediate_size": 4 * width, "vocab_size": 50_000}  # fmt: skip
    arch = parse_config(TINY | config)
    narrow = [replace(layer, mixer=replace(layer.mixer, window=1000)) for layer in arch.layers[:windows]]
    return replace(arch, layers=(*narrow, *arch.layers[windows:]))


@settings(max_examples=60, deadline=None)
@given(
    arch=st.builds(
        random_arch,
        kv_heads=st.sampled_from([1, 2, 8]),
        layers=st.sampled_from([1, 8, 40]),
        width=st.sampled_from([1024, 4096, 8192]),
        windows=st.sampled_from([0, 1, 6]),
    ),
    chips=st.sampled_from([Slice(chip=chip, topology=chip.topologies[n]) for chip in CHIPS for n in (0, 1)]),
    length=st.none() | st.integers(1, 4096),
    share=st.sampled_from([0.3, 0.92, 1.0]),
    seqs=st.none() | st.sampled_from([1, 7, 300]),
)
def test_what_fits_is_within_the_device(
    arch: ArchSpec, chips: Slice, length: int | None, share: float, seqs: int | None
) -> None:
    config = EngineConfig(
        model=ModelConfig(max_model_len=length),
        cache=CacheConfig(gpu_memory_utilization=share),
        schedule=ScheduleConfig(max_num_seqs=seqs),
    )
    plan = make_plan(arch, Ask(slice=chips, config=config))
    memory = chips.chip.memory_bytes
    assert plan.usable_bytes <= share * memory
    if not plan.fits:
        assert not plan.kv_cache_bytes
        return
    assert sum(plan.parts.values()) + plan.kv_cache_bytes + plan.free_bytes == plan.usable_bytes <= memory
    assert plan.free_bytes >= 0
    assert kv_bytes_of(plan.resolved, plan.max_model_len) <= plan.kv_cache_bytes
    assert 1 <= plan.largest_batch <= plan.resolved.max_num_seqs
    assert plan.context <= plan.max_model_len <= plan.largest_context <= arch.max_position
    layout = plan_cache(config, plan.resolved, plan.usable_bytes - plan.needed_bytes)[0]
    assert plan.kv_cache_bytes == sum(pool.num_pages * pool.page_bytes for pool in layout.pools)
    one, many, prompt = plan.floors
    assert one.floor_s <= many.floor_s and many.tokens_per_s >= one.tokens_per_s * 0.999
    assert prompt.tokens == plan.resolved.max_num_batched_tokens


def test_devices_have_what_is_left_after_their_context() -> None:
    for chip in CHIPS:
        info = device_info(chip)
        assert info.memory_bytes == chip.memory_bytes and info.kind == chip.kind
        assert (info.memory_bytes - info.free_bytes > 0) is (chip.kind == "gpu")
