"""A decoder layer as one C++ call equals the layer of separate operations, and writes the same cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.specs import arch
from jax_models.decoder import Layer
from jax_models.fused import FusedLayer
from pallas_kernels import cpu_layer, dispatch

PAGE, LAYER, LAYERS = 16, 1, 2


@dataclass(frozen=True)
class Case:
    """A layer's spec and width, and the rotary dims of its rope (0 = no rope)."""

    spec: arch.LayerSpec
    width: int = 48
    rotary: int = 32


LLAMA = Case(
    arch.LayerSpec(
        mixer=arch.Attention(num_heads=4, num_kv_heads=2, head_size=32, scale=32**-0.5, rope=None),
        ffn=arch.GatedFfn(size=88),
        norms=arch.Norms(eps=1e-5),
    )
)


def varied(case: Case, mixer: dict[str, object], ffn: dict[str, object], norms: dict[str, object]) -> Case:
    spec = case.spec
    changed = arch.LayerSpec(
        mixer=replace(spec.mixer, **mixer), ffn=replace(spec.ffn, **ffn), norms=replace(spec.norms, **norms)
    )
    return replace(case, spec=changed)


CASES = {
    "llama": LLAMA,
    "qwen2": varied(LLAMA, {"qkv_bias": True, "out_bias": True}, {"bias": True, "activation": "gelu"}, {}),
    "qwen3": varied(LLAMA, {"qk_norm": True}, {}, {"eps": 1e-6}),
    "gemma2": varied(
        LLAMA, {"logit_cap": 5.0, "window": 20}, {"activation": "gelu_tanh"}, {"offset": 1.0, "sandwich": True}
    ),
    "no rope": replace(LLAMA, rotary=0),
    "part of a head turns": replace(LLAMA, rotary=16),
    "large enough for helpers": replace(varied(LLAMA, {}, {"size": 1000}, {}), width=200),
}
STEPS = {  # (tokens in the cache, new tokens) of each row, padding tokens
    "one": ([(37, 1)], 0),
    "three": ([(0, 1), (70, 1), (15, 1)], 1),
    "eight": ([(5 * i, 1) for i in range(8)], 0),
    "sixteen": ([(3 * i, 1) for i in range(15)], 1),
    "ragged": ([(4, 1), (30, 7), (0, 3)], 2),
    "none": ([], 1),
}


def make_params(case: Case, dtype: str) -> dict[str, jax.Array]:
    rng = np.random.default_rng(7)
    mixer, ffn, width = case.spec.mixer, case.spec.ffn.size, case.width
    all_heads, heads = (mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_size, mixer.num_heads * mixer.head_size
    shapes = {
        "qkv": (all_heads, width),
        "o": (width, heads),
        "gate_up": (2 * ffn, width),
        "down": (width, ffn),
        "attn_norm": (width,),
        "ffn_norm": (width,),
    }
    if mixer.qkv_bias:
        shapes |= {"qkv_bias": (all_heads,), "o_bias": (width,), "gate_up_bias": (2 * ffn,), "down_bias": (width,)}
    if mixer.qk_norm:
        shapes |= {"q_norm": (mixer.head_size,), "k_norm": (mixer.head_size,)}
    if case.spec.norms.sandwich:
        shapes |= {"post_attn_norm": (width,), "post_ffn_norm": (width,)}
    return {
        name: jnp.asarray(rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.5), dtype)
        for name, shape in shapes.items()
    }


def make_work(rows: list[tuple[int, int]], padding: int) -> tuple[dispatch.Work, int, int]:
    """(work, tokens, pages) over scattered pages; one padding row."""
    rng = np.random.default_rng(len(rows))
    tokens, count = sum(new for _, new in rows) + padding, len(rows) + 1
    columns = max([-(-(old + new) // PAGE) for old, new in rows], default=1)
    pages = count * columns + 1
    arrays = {name: np.zeros(count, np.int32) for name in ("query_starts", "num_new", "num_computed", "decode_order")}
    arrays |= {name: np.zeros(tokens, np.int32) for name in ("write_page", "write_offset")}
    arrays["page_table"] = (rng.permutation(pages - 1) + 1).reshape(count, columns).astype(np.int32)
    at = 0
    for i, (old, new) in enumerate(rows):
        arrays["query_starts"][i], arrays["num_new"][i], arrays["num_computed"][i] = at, new, old
        positions = np.arange(old, old + new)
        arrays["write_page"][at : at + new] = arrays["page_table"][i][positions // PAGE]
        arrays["write_offset"][at : at + new] = positions % PAGE
        at += new
    none = np.zeros(1, np.int32)
    arrays |= {"tile_rows": none, "tile_starts": none, "num_tiles": np.int32(0), "num_rows": np.int32(len(rows))}
    work = dispatch.Work(kernel="cpu", page_tokens=PAGE, **{k: jnp.asarray(v) for k, v in arrays.items()})
    return work, tokens, pages


def keep_codes(params: dict[str, jax.Array], names: tuple[str, ...], form: str) -> dict[str, jax.Array]:
    """The same with some weights as int8. form: "scale", "int8", or "fixed": "int8" with fixed scales of inputs."""
    kept = dict(params)
    for name in names:
        weight = np.asarray(params[name], np.float32)
        scale = np.abs(weight).max(1) / 127
        kept[name] = jnp.asarray(np.round(weight / scale[:, None]), jnp.int8)
        kept[name + ("_scale" if form == "scale" else "_int8")] = jnp.asarray(scale)
        if form == "fixed":
            kept[name + "_act_scale"] = jnp.full((1,), 0.01, jnp.float32)  # some inputs saturate
    return kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_equals_separate_operations(name: str, step: str, dtype: str) -> None:
    compare(CASES[name], step, dtype, make_params(CASES[name], dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", ["one", "eight", "sixteen", "ragged"])
@pytest.mark.parametrize("form", ["scale", "int8", "fixed"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "large enough for helpers"])
def test_codes(name: str, form: str, step: str, dtype: str) -> None:
    case = CASES[name]
    names = ("qkv", "gate_up", "down") if name == "llama" else ("qkv", "o", "gate_up", "down")  # or one is plain
    compare(case, step, dtype, keep_codes(make_params(case, dtype), names, form))


def compare(case: Case, step: str, dtype: str, params: dict[str, jax.Array]) -> None:
    mixer = case.spec.mixer
    if not dispatch.has_whole_layers(dispatch.choose_kernel("cpu", mixer.head_size), 1, mixer.head_size, dtype):
        pytest.fail("the prebuilt library does not load on this machine")
    work, tokens, pages = make_work(*STEPS[step])
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.standard_normal((tokens, case.width)), dtype)
    shape = dispatch.cache_shape("cpu", LAYERS, pages, PAGE, mixer.num_kv_heads, mixer.head_size)
    cache = jnp.asarray(rng.standard_normal(shape), dtype)
    if dtype == "bfloat16":
        cache = jax.lax.bitcast_convert_type(cache, jnp.uint16)
    angles = jnp.asarray(rng.uniform(0, 6, (tokens, case.rotary // 2)), jnp.float32)
    turn = (jnp.cos(angles), jnp.sin(angles)) if case.rotary else (None, None)

    def run(kind: type[Layer]) -> tuple[np.ndarray, np.ndarray]:
        layer = jax.jit(lambda x, cache: kind(case.spec, params)(x, *turn, cache, LAYER, work))
        out, changed = layer(x, cache)
        if dtype == "bfloat16":
            changed = jax.lax.bitcast_convert_type(changed, jnp.bfloat16)
        return np.asarray(out, np.float32), np.asarray(changed, np.float32)

    (wanted, wanted_cache), (got, got_cache) = run(Layer), run(FusedLayer)
    # bfloat16: a sum in another order may round the other way, a step of 2^-8 of values up to about 8
    bound = 2e-5 if dtype == "float32" else 8e-2
    np.testing.assert_allclose(got, wanted, atol=bound, rtol=0)
    np.testing.assert_allclose(got_cache[:, 1:], wanted_cache[:, 1:], atol=bound, rtol=0)
    others = np.arange(LAYERS) != LAYER
    np.testing.assert_array_equal(got_cache[others], wanted_cache[others])


def test_says_what_it_does_not_take() -> None:
    assert not cpu_layer.available(cpu_layer.MAX_TOKENS + 1, 64, "float32")
    assert not cpu_layer.available(1, 60, "float32")
    assert not cpu_layer.available(1, 64, "float16")
    assert not dispatch.has_whole_layers("plain", 1, 64, "float32")
    work, tokens, pages = make_work([(1, 1)], 0)
    parts = make_params(LLAMA, "float32")
    cache = jnp.zeros(dispatch.cache_shape("cpu", LAYERS, pages, PAGE, 2, 32))
    options = {"num_heads": 4, "activation": "silu", "eps": 1e-5, "offset": 0.0, "scale": 1.0}
    options |= {"window": None, "logit_cap": None}
    x = jnp.zeros((tokens, LLAMA.width))
    with pytest.raises(ValueError, match="has no \\['router'\\]"):
        dispatch.decoder_layer(x, parts | {"router": x}, None, None, cache, 0, work, **options)
    with pytest.raises(ValueError, match="do not belong together"):
        dispatch.decoder_layer(x[:, :40], parts, None, None, cache, 0, work, **options)
