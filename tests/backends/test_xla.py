"""torch-xla on PJRT's CPU beside the conformance suite: its answers, compiles, losses, refusals, a TPU's lowering."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.errors import ConfigError, InternalError, StepFailed
from engine.resolve import resolve
from engine.specs.arch import ArchSpec
from engine.step import PageCopies, PromptLogprobs
from tests.backends.driver import Driver, llama

pytest.importorskip("torch_xla", reason="needs torch 2.9 and torch-xla 2.9: make test-torch-xla")

import torch
import torch_xla
from torch_xla.debug import metrics

from backends.torch import xla
from backends.torch.runner import Runner
from pallas_kernels import dispatch


def gemma() -> ArchSpec:
    """Everything that a llama has not: sandwich norms with an offset, query-key norms, caps, biases, a scaled table."""
    plain = llama(windows=(20, None))
    norms = replace(plain.layers[0].norms, sandwich=True, offset=1.0)
    layers = tuple(
        replace(
            layer,
            norms=norms,
            mixer=replace(layer.mixer, qk_norm=True, qkv_bias=True, out_bias=True, logit_cap=5.0),
            ffn=replace(layer.ffn, activation="gelu_tanh"),
        )
        for layer in plain.layers
    )
    return replace(plain, layers=layers, final_norm=norms, embedding_scale=8.0, logit_cap=3.0)


@pytest.mark.parametrize(
    ("arch", "dtype", "tolerance"),
    [(llama(), "float32", 1e-4), (gemma(), "float32", 1e-4), (llama(), "bfloat16", 0.1)],
    ids=["llama", "gemma", "bfloat16"],
)
def test_answers_of_torch_on_the_cpu(arch: ArchSpec, dtype: str, tolerance: float) -> None:
    answers = []
    for device in ("cpu", "xla"):
        options = {"token_buckets": (8, 64), "row_buckets": (4,), "max_slots": 4}
        d = Driver(Runner(), arch, seed=5, device=device, dtype=dtype, kv_dtype=dtype, **options)
        seqs = [
            d.new(d.prompt(50), num_logprobs=3),
            d.new(d.prompt(7), num_logprobs=3, temperature=1.0, seed=2**40 + 1, top_p=0.9, repetition=1.2),
            d.new(d.prompt(20), num_logprobs=3, temperature=0.7, top_k=20, min_p=0.05, bias={4: 2.0}, seed=8),
        ]
        d.generate(seqs, 1 if dtype == "bfloat16" else 12, chunk=20)  # rounding parts the ways of tokens
        answers.append([(s.outputs, s.logprobs) for s in seqs])
        d.runner.shutdown()
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(*answers, strict=True):
        assert tokens == other_tokens or dtype == "bfloat16"
        np.testing.assert_allclose(logprobs, other_logprobs, atol=tolerance)


@pytest.fixture(scope="module")
def d() -> Driver:
    return Driver(Runner(), seed=4, device="xla")


def every_kind(d: Driver) -> None:
    """A step of each kind that a plan can ask for."""
    everything = {
        "temperature": 1.0, "top_p": 0.9, "min_p": 0.1, "top_k": 5, "seed": 3, "presence": 0.5, "frequency": 0.1,
        "repetition": 1.2, "min_tokens": 3, "stop_ids": (4,), "num_logprobs": 20, "bias": {7: 1.0},
        "allowed": tuple(range(90)), "bad_words": ((4, 5), (6,)),
    }  # fmt: skip
    for prompt in (3, 20, 61):
        a, b = d.new(d.prompt(prompt), **everything), d.new(d.prompt(2))
        d.generate([a, b], 3)
        whole = d.new(d.prompt(5))
        scored = PromptLogprobs(token_idx=np.arange(4, dtype=np.int32), targets=np.arange(4, dtype=np.int32), num_top=2)
        d.step([(whole, 5)], prompt_logprobs=scored)
        late = d.submit(d.plan([(b, 1)], late_mask=True))
        d.runner.provide_mask(late, np.zeros(1, np.int32), np.full((1, 7), 1, np.uint32))
        d.collect(late)
        source, target = whole.pages[0][0], d.take_page(0)
        parts = (np.array([x], np.int32) for x in (0, source, target, 3))
        d.step([(b, 1)], copies=PageCopies(**dict(zip(("pool", "source", "target", "tokens"), parts, strict=True))))
        d.clean_up()
    rows = [(d.new(d.prompt(1)), 1) for _ in range(d.config.max_slots)]
    d.step(rows)
    d.clean_up()


def test_nothing_compiles_after_warm_up_and_nothing_runs_on_the_host(d: Driver) -> None:
    before = d.runner.num_compiles()
    assert before == metrics.metric_data("CompileTime")[0] > 10
    every_kind(d)
    assert d.runner.num_compiles() == before
    assert not [name for name in metrics.counter_names() if name.startswith("aten::")]


def test_the_cache_is_written_where_it_lies(d: Driver) -> None:
    """Pools and wide tables are given to a step's program and come back in the same memory."""
    work, at = d.runner._work, torch_xla._XLAC._unsafe_buffer_pointer
    held = [*work._loaded.caches, work._tables.counts, work._tables.allowed, work._tables.pages[0]]
    before = [at(tensor) for tensor in held]
    d.generate([d.new(d.prompt(9), temperature=1.0)], 3)
    d.clean_up()
    assert [at(tensor) for tensor in held] == before


def test_a_lost_step_takes_the_cache_with_it_and_the_engine_goes_on(d: Driver) -> None:
    prompt = d.prompt(9)
    wanted, seq = d.new(prompt), d.new(prompt)
    d.generate([wanted], 4)
    handle = d.submit(d.plan([(seq, 9)]))
    handle.error = RuntimeError("device lost")  # what torch-xla raises where a program failed
    with pytest.raises(StepFailed) as failed:
        d.collect(handle)
    assert failed.value.cache_lost and "device lost" in str(failed.value)
    assert not any(cache.cpu().any() for cache in d.runner._work._loaded.caches)
    with pytest.raises(InternalError):
        d.submit(d.plan([(wanted, 1)]))
    d.clean_up()
    again = d.new(prompt)
    d.generate([again], 4)
    assert again.outputs == wanted.outputs
    d.clean_up()


def test_a_tpu_gets_the_pallas_kernels() -> None:
    """Lowered for a TPU, not run: a prefill and a decode kernel, each writing the cache in place."""
    tokens, rows, heads, size, pages = 64, 12, 2, 64, 9
    tiles = dispatch.max_tiles(tokens, rows)
    sizes = {
        "page_table": (rows, pages), "num_rows": (), "num_tiles": (), "tile_rows": (tiles,), "tile_starts": (tiles,),
        "write_page": (tokens,), "write_offset": (tokens,),
    }  # fmt: skip
    ints = [torch.zeros(sizes.get(name, (rows,)), dtype=torch.int32) for name in xla.ROWS]
    q, k = (torch.zeros(tokens, n, size, dtype=torch.bfloat16) for n in (2 * heads, heads))
    cache = torch.zeros(dispatch.cache_shape("tpu", 2, 5, 128, heads, size), dtype=torch.bfloat16)
    limits = {"scale": 0.1, "window": 40, "logit_cap": None}
    lowered = xla.Bridge("tpu", "bfloat16").lowered(
        xla.attend, (q, k, k, cache, torch.zeros(1, dtype=torch.int32), *ints), kernel="tpu", page_tokens=128, **limits
    )
    calls = [line for line in lowered.compiler_ir("hlo").as_hlo_text().splitlines() if "tpu_custom_call" in line]
    assert len(calls) == 2 and all("output_to_operand_aliasing" in line for line in calls)


def test_pages_that_a_tpu_does_not_take(d: Driver) -> None:
    with pytest.raises(ConfigError, match=r"--block-size: pages of 16 tokens.*128"):
        xla.make_caches(d.layout, ["tpu"], torch.device("cpu"))


def test_what_it_cannot_do_is_refused_by_name() -> None:
    info = Runner().describe("xla")
    assert info.bucket_style == "pow2" and info.kind == "cpu" and "torch-xla" in info.name
    model = ModelConfig(max_model_len=128)
    for options, flag in (
        ({"cache": CacheConfig(kv_cache_dtype="fp8")}, "--kv-cache-dtype"),
        ({"model": replace(model, quantization="fp8")}, "--quantization"),
        ({"model": replace(model, dtype="float16")}, "--dtype"),
        ({"attention_backend": "FLASHINFER"}, "--attention-backend"),
        ({"batch_invariant": True}, "--batch-invariant"),
    ):
        with pytest.raises(ConfigError, match=flag):
            resolve(EngineConfig(**({"model": model} | options)), llama(), info)
