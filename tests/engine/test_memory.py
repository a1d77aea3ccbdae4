"""engine/memory.py: what fits, what is refused, and with which remedy. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import CacheConfig, EngineConfig, ModelConfig, ScheduleConfig
from engine.errors import ConfigError
from engine.memory import check_pages, plan_memory, report
from engine.resolve import GIB, Resolved, kv_bytes_of, plan_cache, resolve
from engine.runner import ON_DEMAND, DeviceInfo, RunnerConfig
from tests.engine.test_resolve import arch

MIB = 1 << 20
GPU = DeviceInfo(
    kind="gpu", name="GPU", memory_bytes=8 * GIB, free_bytes=8 * GIB, capabilities=frozenset(), bucket_style="exact",
    default_dtype="bfloat16",
)  # fmt: skip


def parts_of(config: RunnerConfig) -> dict[str, int]:
    """A model of 3 GiB: a token of the largest step takes 0.5 MiB, a row 1 MiB."""
    return {
        "weights": 3 * GIB,
        "activations": config.max_batched_tokens * MIB // 2,
        ON_DEMAND: config.max_slots * MIB,
    }


def asked(*, share: float = 0.92, tokens: int = 2048, seqs: int = 256, length: int | None = None) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(max_model_len=length),
        cache=CacheConfig(gpu_memory_utilization=share),
        schedule=ScheduleConfig(max_num_batched_tokens=tokens, max_num_seqs=seqs),
    )


def resolved(config: EngineConfig) -> Resolved:
    return resolve(config, arch(), GPU)


def test_what_is_left_is_for_kv_pages() -> None:
    config = asked()
    plan = plan_memory(config, resolved(config), GPU, parts_of)
    assert plan is not None
    assert plan.needed == 3 * GIB + GIB + 256 * MIB
    assert plan.usable == int(0.92 * 8 * GIB)
    assert plan.kv_bytes == plan.usable - plan.needed


def test_a_backend_that_does_not_plan() -> None:
    config = asked()
    assert plan_memory(config, resolved(config), GPU, lambda _: {}) is None


def test_other_processes_count() -> None:
    """Their memory is not ours to give; the share is ours alone, as in vLLM."""
    config = asked(share=0.7)
    shared = replace(GPU, free_bytes=5 * GIB)
    plan = plan_memory(config, resolved(config), shared, parts_of)
    assert plan is not None
    assert plan.usable == int(0.7 * 8 * GIB) - GIB  # at most one GiB of what is in use is taken for ours
    full = replace(GPU, free_bytes=9 * GIB // 2)
    plan = plan_memory(asked(share=1.0), resolved(config), full, parts_of)
    assert plan is not None and plan.usable == 9 * GIB // 2 - 64 * MIB


@pytest.mark.parametrize(
    ("config", "remedies"),
    [
        (asked(tokens=16384), ["lower --max-num-batched-tokens to 8192"]),
        (asked(tokens=4096, seqs=4096), ["lower --max-num-seqs to 2048"]),
        (asked(share=0.5), ["raise --gpu-memory-utilization to 0.54", "lower --max-num-batched-tokens to 1024"]),
        (
            asked(share=0.45, tokens=8192, seqs=2048),
            ["lower --max-num-seqs to 256 and --max-num-batched-tokens to 256"],
        ),
    ],
    ids=["tokens", "seqs", "share", "both"],
)
def test_a_refusal_names_the_flag_and_a_value_that_fits(config: EngineConfig, remedies: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_memory(config, resolved(config), GPU, parts_of)
    text = str(caught.value)
    assert "\n" not in text and "weights 3.00 GiB" in text and "8.00 GiB are free" in text
    for remedy in remedies:
        assert remedy in text


def test_the_value_named_does_fit() -> None:
    for better in (asked(tokens=8192), asked(tokens=4096, seqs=2048), asked(share=0.54), asked(share=0.45, tokens=256)):
        try:
            plan_memory(better, resolved(better), GPU, parts_of)
        except ConfigError as error:
            pytest.fail(str(error))


def test_a_device_that_is_too_small() -> None:
    full = replace(GPU, free_bytes=2 * GIB)
    config = asked()
    with pytest.raises(ConfigError, match=r"use a device with more free memory \(6.00 GiB are in use\)"):
        plan_memory(config, resolved(config), full, parts_of)


def test_the_kv_of_a_given_length_is_part_of_what_must_fit() -> None:
    tight = replace(GPU, free_bytes=4 * GIB + 257 * MIB + 64 * MIB)
    free, given = asked(share=1.0), asked(share=1.0, length=2048)
    assert plan_memory(free, resolved(free), tight, parts_of) is not None
    assert kv_bytes_of(resolved(given), 2048) > MIB
    with pytest.raises(ConfigError, match="lower --max-model-len to 960, or lower --max-num-batched-tokens to 1024"):
        plan_memory(given, resolved(given), tight, parts_of)


@pytest.mark.parametrize(
    ("cache", "flag"),
    [
        (CacheConfig(kv_cache_memory_bytes=6 * GIB), "--kv-cache-memory-bytes"),
        (CacheConfig(num_gpu_blocks_override=200_000), "--num-gpu-blocks-override"),
    ],
)
def test_pages_that_a_flag_asks_for_must_fit(cache: CacheConfig, flag: str) -> None:
    config = replace(asked(seqs=2048), cache=cache)
    plan = plan_memory(config, resolved(config), GPU, parts_of)
    assert plan is not None
    layout, _, _ = plan_cache(config, resolved(config), plan.kv_bytes)
    with pytest.raises(ConfigError, match=f"{flag}: .*give at most") as caught:
        check_pages(config, plan, layout)
    most = int(str(caught.value).rsplit(" ", 1)[1])
    value = replace(cache, **{flag[2:].replace("-", "_"): most})
    layout, _, _ = plan_cache(replace(config, cache=value), resolved(config), plan.kv_bytes)
    check_pages(replace(config, cache=value), plan, layout)


def test_the_report_is_one_line_with_the_deviation() -> None:
    config = asked()
    plan = plan_memory(config, resolved(config), GPU, parts_of)
    assert plan is not None
    text = report(plan, 2 * GIB, 5 * GIB)  # planned 3 + 1 + 2
    assert "\n" not in text and "planned 6.00 GiB" in text and "held at most 5.00 GiB (+20.0 %)" in text
    assert "on demand 0.25 GiB" in text
