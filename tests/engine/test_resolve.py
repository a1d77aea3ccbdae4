"""engine/resolve.py: defaults, page counts and refusals, all pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.buckets import powers_to
from engine.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, ScheduleConfig
from engine.errors import ConfigError
from engine.resolve import GIB, kv_bytes_of, plan_cache, resolve
from engine.runner import Capability, DeviceInfo
from engine.specs.arch import ArchSpec, Attention, GatedFfn, LayerSpec, Norms, RopeSpec
from engine.specs.cache import INT8_PAGES

CPU = DeviceInfo(kind="cpu", name="cpu", memory_bytes=8 * GIB, free_bytes=8 * GIB, capabilities=frozenset())


def arch(windows: tuple[int | None, ...] = (None, None), max_position: int = 2048) -> ArchSpec:
    norms = Norms(eps=1e-6)
    layers = tuple(
        LayerSpec(
            mixer=Attention(
                num_heads=4,
                num_kv_heads=2,
                head_size=64,
                scale=0.125,
                rope=RopeSpec(rotary_size=64, max_position=max_position),
                window=window,
            ),
            ffn=GatedFfn(size=512),
            norms=norms,
        )
        for window in windows
    )
    return ArchSpec(
        family="llama",
        hidden_size=256,
        vocab_size=1024,
        layers=layers,
        tied_embeddings=True,
        max_position=max_position,
        final_norm=norms,
        checkpoint_dtype="bfloat16",
    )


def test_defaults_work_with_no_tuning() -> None:
    resolved = resolve(EngineConfig(), arch(), CPU)
    assert resolved.runner.dtype == "float32"
    assert resolved.max_model_len == 2048
    assert resolved.max_num_batched_tokens >= resolved.max_num_seqs
    assert resolved.runner.row_buckets[-1] == resolved.max_num_seqs
    assert resolved.runner.token_buckets[-1] == resolved.max_num_batched_tokens


def test_exact_devices_have_no_buckets() -> None:
    resolved = resolve(EngineConfig(), arch(), replace(CPU, bucket_style="exact"))
    assert resolved.runner.row_buckets == resolved.runner.token_buckets == ()


def turns_of(config: EngineConfig, device: DeviceInfo, layers: int = 2) -> tuple[int, int]:
    model = arch()
    runner = resolve(config, replace(model, layers=model.layers[:1] * layers), device).runner
    return runner.max_num_steps, runner.max_turn_rows


def test_several_turns_where_they_are_short() -> None:
    """On a CPU of few rows, on a TPU of all; not where the runner takes one, nor by itself on a GPU."""
    able = replace(CPU, capabilities=frozenset({Capability.MULTI_STEP}))
    assert turns_of(EngineConfig(), able) == (8, 4)
    assert turns_of(EngineConfig(schedule=ScheduleConfig(max_num_seqs=2)), able) == (8, 2)
    assert turns_of(EngineConfig(), able, layers=400)[0] == 1
    assert turns_of(EngineConfig(), CPU)[0] == 1
    assert turns_of(EngineConfig(), replace(able, kind="tpu")) == (8, 256)
    assert turns_of(EngineConfig(), replace(able, kind="gpu"))[0] == 1
    given = EngineConfig(schedule=ScheduleConfig(num_scheduler_steps=16))
    assert turns_of(given, replace(able, kind="gpu")) == (16, 256)
    assert turns_of(EngineConfig(schedule=ScheduleConfig(num_scheduler_steps=1)), able)[0] == 1


@pytest.mark.parametrize(
    ("given", "said"), [(0, "expected 1 .. 64"), (65, "expected 1 .. 64"), (8, "use --backend jax")]
)
def test_numbers_of_turns_that_are_refused(given: int, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--num-scheduler-steps: {given} .*{said}"):
        resolve(EngineConfig(schedule=ScheduleConfig(num_scheduler_steps=given)), arch(), CPU)


@pytest.mark.parametrize(("first", "last", "expected"), [(1, 8, (1, 2, 4, 8)), (1, 6, (1, 2, 4, 6)), (64, 32, (32,))])
def test_powers(first: int, last: int, expected: tuple[int, ...]) -> None:
    assert powers_to(first, last) == expected


def test_pages_fill_the_budget_and_no_more() -> None:
    config = EngineConfig()
    resolved = resolve(config, arch(), CPU)
    budget = 64 << 20
    layout, length, notes = plan_cache(config, resolved, budget)
    used = sum(p.num_pages * p.page_bytes for p in layout.pools)
    assert 0.9 * budget < used <= budget
    assert length == 2048 and notes == ()


def test_equal_groups_share_a_pool_and_others_do_not() -> None:
    config = EngineConfig()
    equal, _, _ = plan_cache(config, resolve(config, arch((None, 128)), CPU), 64 << 20)
    assert [g.pool for g in equal.groups] == [0, 0] and len(equal.pools) == 1
    unequal, _, _ = plan_cache(config, resolve(config, arch((128, 128, None)), CPU), 64 << 20)
    assert len(unequal.pools) == 2
    assert sum(p.num_pages * p.page_bytes for p in unequal.pools) <= 64 << 20


def test_executables_fix_the_pages() -> None:
    config, device = EngineConfig(executables="b"), replace(CPU, capabilities=frozenset({Capability.EXECUTABLES}))
    resolved = resolve(config, arch((128, 128, None)), device)
    assert resolved.runner.executables == "b" and resolve(EngineConfig(), arch(), CPU).runner.executables == ""
    layout, length, notes = plan_cache(config, resolved, 64 << 20, (50, 40))
    assert [pool.num_pages for pool in layout.pools] == [50, 40] and (length, notes) == (2048, ())
    asked = sum(pool.num_pages * pool.page_bytes for pool in layout.pools)
    assert plan_cache(config, resolved, asked, (50, 40))[0] == layout
    with pytest.raises(
        ConfigError, match=r"--executables: b was built for 49 \+ 39 KV pages, .* and .* GiB are left; "
    ):
        plan_cache(config, resolved, asked - 1, (50, 40))
    _, length, notes = plan_cache(config, resolved, 64 << 20, (50, 11))
    assert length == 10 * 64
    assert notes == ("the KV pages of b hold 640 tokens, --max-model-len is 2048; the model length is 640",)
    given = replace(config, model=ModelConfig(max_model_len=2048))
    with pytest.raises(
        ConfigError, match=r"the KV pages of b hold 640 tokens.*; lower --max-model-len to 640, or build"
    ):
        plan_cache(given, resolve(given, arch((128, 128, None)), device), 64 << 20, (50, 11))


def test_executables_are_refused_by_name_where_they_cannot_be_used() -> None:
    device = replace(CPU, capabilities=frozenset({Capability.EXECUTABLES}))
    with pytest.raises(ConfigError, match="--executables: not supported by this backend on cpu; use --backend jax"):
        resolve(EngineConfig(executables="b"), arch(), CPU)
    with pytest.raises(ConfigError, match="--executables: '' is not accepted; expected the folder"):
        resolve(EngineConfig(executables=""), arch(), device)
    for cache in (CacheConfig(num_gpu_blocks_override=5), CacheConfig(kv_cache_memory_bytes=5)):
        with pytest.raises(ConfigError, match="5 does not work with --executables, which fix the KV pages"):
            resolve(EngineConfig(executables="b", cache=cache), arch(), device)


def test_a_short_budget_shrinks_the_length_only_when_none_was_given() -> None:
    config = EngineConfig()
    resolved = resolve(config, arch(), CPU)
    layout, length, notes = plan_cache(config, resolved, 2 << 20)
    assert 0 < length < 2048 and "--max-model-len" in notes[0]
    assert (layout.pools[0].num_pages - 1) * layout.groups[0].page_tokens >= length
    given = replace(config, model=ModelConfig(max_model_len=2048))
    with pytest.raises(ConfigError, match="lower --max-model-len"):
        plan_cache(given, resolve(given, arch(), CPU), 2 << 20)


@pytest.mark.parametrize("windows", [(None, None), (128, None), (128, 128, None)])
def test_the_length_that_auto_finds_is_the_longest(windows: tuple[int | None, ...]) -> None:
    model = arch(windows, max_position=16384)
    config = EngineConfig(model=ModelConfig(max_model_len=-1), schedule=ScheduleConfig(max_num_batched_tokens=64))
    resolved = resolve(config, model, CPU)
    assert resolved.max_model_len == 16384
    for budget in (1 << 20, 3 << 20, 5 << 20):
        _, length, notes = plan_cache(config, resolved, budget)
        assert length < 16384 and f"the model length is {length}" in notes[0]
        page = resolved.runner.page_tokens[0]
        assert kv_bytes_of(resolved, length) <= budget < kv_bytes_of(resolved, length + page)
        given = replace(config, model=ModelConfig(max_model_len=length))
        assert plan_cache(given, resolve(given, model, CPU), budget)[1:] == (length, ())
        more = replace(config, model=ModelConfig(max_model_len=length + page))
        with pytest.raises(ConfigError, match=f"lower --max-model-len to {length}, or raise"):
            plan_cache(more, resolve(more, model, CPU), budget)
    _, length, notes = plan_cache(config, resolved, 1 << 30)
    assert (length, notes) == (16384, ())


def test_pages_of_eight_bits_are_half_as_large() -> None:
    gpu = replace(CPU, kv_dtypes=("fp8_e4m3",), supported_dtypes=("float32", "bfloat16"), default_dtype="bfloat16")
    wide = resolve(EngineConfig(), arch(), gpu)
    for name in ("fp8", "fp8_e4m3"):
        config = EngineConfig(cache=CacheConfig(kv_cache_dtype=name))
        small = resolve(config, arch(), gpu)
        assert small.runner.kv_dtype == "fp8_e4m3" and small.runner.dtype == "bfloat16"
        assert 2 * small.kv_bytes_per_token == wide.kv_bytes_per_token
        pages, _, _ = plan_cache(config, small, 4 << 20)
        other, _, _ = plan_cache(EngineConfig(), wide, 4 << 20)
        assert pages.kv_dtype == "fp8_e4m3" and pages.pools[0].num_pages >= 2 * other.pools[0].num_pages - 2
    with pytest.raises(ConfigError, match="--kv-cache-dtype: 'fp8_e4m3' is not supported on cpu; one of auto, float32"):
        resolve(EngineConfig(cache=CacheConfig(kv_cache_dtype="fp8")), arch(), CPU)


def test_pages_of_int8_are_counted_with_their_scales() -> None:
    """Two bytes for the keys and two for the values of a head of a token."""
    able = replace(CPU, kv_dtypes=("fp8_e4m3", INT8_PAGES))
    config = EngineConfig(cache=CacheConfig(kv_cache_dtype="int8_per_token_head"))
    mixer = arch().layers[0].mixer
    resolved = resolve(config, arch(), able)
    assert resolved.runner.kv_dtype == INT8_PAGES
    token = 2 * len(arch().layers) * mixer.num_kv_heads * (mixer.head_size + 2)
    assert resolved.kv_bytes_per_token == token
    pages, _, _ = plan_cache(config, resolved, 4 << 20)
    assert [pool.page_bytes for pool in pages.pools] == [token * resolved.runner.page_tokens[0]]
    with pytest.raises(ConfigError, match=r"'int8_per_token_head' is not supported on cpu; .*; pages .* --backend jax"):
        resolve(config, arch(), CPU)


def test_attention_backends() -> None:
    """What a device has not, and what FlashInfer has not, is refused by name."""
    gpu = replace(
        CPU, attention_backends=("TRITON_ATTN", "FLASHINFER"), supported_dtypes=("float32", "bfloat16"),
        default_dtype="bfloat16", kv_dtypes=("fp8_e4m3",), capabilities=frozenset({Capability.BATCH_INVARIANT}),
    )  # fmt: skip
    flash, fit = EngineConfig(attention_backend="flashinfer"), arch()
    odd = replace(fit, layers=(replace(fit.layers[0], mixer=replace(fit.layers[0].mixer, head_size=96)),))
    assert resolve(EngineConfig(), arch(), CPU).runner.attention_backend == "auto"
    assert resolve(flash, fit, gpu).runner.attention_backend == "FLASHINFER"
    assert resolve(EngineConfig(attention_backend="TRITON_ATTN"), arch(), gpu).runner.attention_backend == "TRITON_ATTN"
    with pytest.raises(
        ConfigError, match=r"--attention-backend: 'flashinfer' is not available on cpu; one of auto\. .*pip"
    ):
        resolve(flash, fit, CPU)
    with pytest.raises(ConfigError, match="'FLASH_ATTN' is not available on cpu; one of auto, TRITON_ATTN, FLASHINFER"):
        resolve(EngineConfig(attention_backend="FLASH_ATTN"), fit, gpu)
    for config, model, what in (
        (replace(flash, batch_invariant=True), fit, "--batch-invariant"),
        (replace(flash, model=ModelConfig(dtype="float32")), fit, "--dtype float32"),
        (replace(flash, cache=CacheConfig(kv_cache_dtype="fp8")), fit, "--kv-cache-dtype fp8_e4m3"),
        (flash, odd, r"heads of \[96\] values"),
    ):
        with pytest.raises(ConfigError, match=f"--attention-backend: 'flashinfer' does not work with {what}"):
            resolve(config, model, gpu)


def test_batch_invariant_needs_a_backend_that_can() -> None:
    config = EngineConfig(batch_invariant=True)
    with pytest.raises(ConfigError, match=r"--batch-invariant: not supported .*--backend torch"):
        resolve(config, arch(), CPU)
    able = replace(CPU, capabilities=frozenset({Capability.BATCH_INVARIANT}))
    assert resolve(config, arch(), able).runner.batch_invariant
    assert not resolve(EngineConfig(), arch(), able).runner.batch_invariant
    with pytest.raises(ConfigError, match=r"--max-logprobs: 100 .* at most 64"):
        resolve(replace(config, model=ModelConfig(max_logprobs=100)), arch(), able)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (EngineConfig(model=ModelConfig(dtype="int4")), "--dtype"),
        (EngineConfig(model=ModelConfig(max_model_len=0)), "--max-model-len"),
        (EngineConfig(model=ModelConfig(max_model_len=4096)), "--max-model-len"),
        (EngineConfig(model=ModelConfig(trust_remote_code=True)), "--trust-remote-code"),
        (EngineConfig(cache=CacheConfig(block_size=10)), "--block-size"),
        (EngineConfig(cache=CacheConfig(gpu_memory_utilization=1.5)), "--gpu-memory-utilization"),
        (EngineConfig(cache=CacheConfig(kv_cache_dtype="fp3")), "--kv-cache-dtype"),
        (EngineConfig(cache=CacheConfig(kv_cache_dtype="float16")), "--kv-cache-dtype"),
        (EngineConfig(schedule=ScheduleConfig(max_num_seqs=0)), "--max-num-seqs"),
        (EngineConfig(schedule=ScheduleConfig(max_num_seqs=64, max_num_batched_tokens=8)), "--max-num-batched-tokens"),
        (EngineConfig(schedule=ScheduleConfig(scheduling_policy="lifo")), "--scheduling-policy"),
        (EngineConfig(parallel=ParallelConfig(tensor_parallel_size=2)), "--tensor-parallel-size"),
    ],
)
def test_refusals_name_the_flag(config: EngineConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        resolve(config, arch(), CPU)
