"""From a ModelQuant to tensors: names, shapes, bytes, shards, and damage in quantised checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import CheckpointError, ConfigError
from engine.specs.checkpoint import stream_params
from engine.specs.families import parse_config
from engine.specs.families.quantization import at_load
from engine.specs.parallel import shard_shape, shard_slices
from engine.specs.quant import ModelQuant, Pattern, WeightQuant
from engine.specs.safetensors import STORED, first_non_finite
from engine.specs.weights import RawTensor, dummy_params, num_parameters, param_table, to_e4m3
from tests.engine.specs.damage import FILE, Tensor, pack
from tests.engine.specs.quant_forms import ALL, AWQ, BLOCK, GPTQ, INT4, INT8, STATIC, compressed, config

Q = "model.layers.1.self_attn.q_proj"


def names_of(quant: dict[str, Any], weight: str) -> dict[str, tuple[tuple[int, ...], str | None]]:
    table = param_table(parse_config(config(quant)))
    return {p.sources[0].name.rpartition(".")[2]: (p.shape, p.dtype) for p in table if p.weight == weight}


def test_tensors_of_each_form() -> None:
    """down is [64, 192]: six groups of 32, one and a half blocks."""
    down = "layers.1.down"
    assert names_of(AWQ, down) == {
        "qweight": ((192, 8), "int32"),
        "qzeros": ((6, 8), "int32"),
        "scales": ((6, 64), "float"),
    }
    assert names_of(GPTQ, down) == {
        "qweight": ((24, 64), "int32"),
        "qzeros": ((6, 8), "int32"),
        "scales": ((6, 64), "float"),
        "g_idx": ((192,), "int32"),
    }
    assert names_of(BLOCK, down) == {"weight": ((64, 192), "float8_e4m3"), "weight_scale": ((1, 2), "float")}
    assert names_of(STATIC, down) == {
        "weight": ((64, 192), "float8_e4m3"),
        "weight_scale": ((1,), "float"),
        "input_scale": ((1,), "float"),
    }
    assert names_of(compressed(INT4), down) == {
        "weight_packed": ((64, 24), "int32"),
        "weight_scale": ((64, 6), "float"),
        "weight_zero_point": ((8, 6), "int32"),
    }
    assert names_of(compressed(INT8), down) == {"weight": ((64, 192), "int8"), "weight_scale": ((64, 1), "float")}


@pytest.mark.parametrize("name", ALL)
def test_counts(name: str) -> None:
    """As many parameters as the plain model, in as many bytes as the numbers take."""
    plain, kept = parse_config(config(None)), parse_config(config(ALL[name]))
    assert num_parameters(kept) == num_parameters(plain)
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192)
    rest = num_parameters(plain) - linear
    num_bytes = sum(param.num_bytes(kept) for param in param_table(kept)) - 4 * rest
    share = num_bytes / linear
    assert (
        {"awq": 0.5, "gptq": 0.5, "int4": 0.5}.get(name, 1)
        < share
        < {"awq": 0.7, "gptq": 0.75, "int4": 0.7}.get(name, 1.1)
    )


def test_what_is_left_plain() -> None:
    assert {p.field for p in param_table(parse_config(config(AWQ))) if p.name in ("embed", "head", "final_norm")} == {
        ""
    }
    some = parse_config(config({**AWQ, "modules_to_not_convert": ["self_attn", "layers.1.mlp.down_proj"]}))
    plain = {p.name for p in param_table(some) if p.quant is None and len(p.shape) == 2}
    assert plain == {"embed", "head", "layers.1.down"} | {f"layers.{i}.{part}" for i in (0, 1) for part in "qkvo"}
    named = compressed(INT8, ignore=["re:.*mlp.*", Q, "lm_head"])
    kept = {p.weight for p in param_table(parse_config(config(named))) if p.quant is not None}
    assert kept == {f"layers.{i}.{part}" for i in (0, 1) for part in "qkvo"} - {"layers.1.q"}
    head = parse_config(config(compressed(INT8, ignore=[])))
    assert {p.field for p in param_table(head) if p.weight == "head"} == {"data", "scale"}


def test_rules_by_name_come_before_those_by_class() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": INT8},
        "b": {"targets": ["re:.*down_proj"], "weights": INT4, "format": "pack-quantized"},
    }
    mixed = parse_config(config(compressed(INT8, config_groups=groups, format="mixed-precision")))
    schemes = {p.weight: p.quant.scheme for p in param_table(mixed) if p.quant is not None}
    assert schemes["layers.0.down"] == "w4" and schemes["layers.0.up"] == "int8"


def test_at_load_reads_plain_weights() -> None:
    plain = parse_config(config(None))
    quant = at_load("fp8")
    assert quant.of(["lm_head"]) is None
    found = quant.of([Q])
    assert found is not None and found.at_load and (found.per, found.act) == ("channel", "token")
    assert plain.quant is None


def test_patterns() -> None:
    path = Pattern(kind="path", text="mlp.gate")
    assert path.matches(("model.layers.0.mlp.gate",)) and not path.matches(("model.layers.0.mlp.gate_proj",))
    assert Pattern(kind="exact", text="lm_head").matches(("lm_head",))
    assert not Pattern(kind="exact", text="layers.0").matches(("layers.0.q",))
    rules = ModelQuant(
        method="x", rules=(((path,), WeightQuant(scheme="fp8", layout="plain", per="tensor", act="none")),)
    )
    assert rules.of(["a.mlp.gate"]) is not None and rules.of(["a.mlp.up"]) is None


# --- checkpoints ---


class Kept:
    """A quantised checkpoint about to be written: dummy tensors under their names."""

    def __init__(self, folder: Path, quant: dict[str, Any], **changes: Any) -> None:
        self.folder, self.config = folder, config(quant, **changes)
        self.arch = parse_config(self.config)
        spell = {dtype: name for name, (dtype, _) in STORED.items()}
        self.tensors = {}
        for param, raw in dummy_params(self.arch, 0):
            name = param.sources[0].name
            if quant["quant_method"] == "fp8" and quant.get("weight_block_size"):
                name = name.replace("weight_scale", "weight_scale_inv")
            self.tensors[name] = Tensor(spell[raw.dtype], list(param.shape), raw.data.tobytes())

    def set(self, name: str, values: np.ndarray[Any, Any], dtype: str) -> None:
        self.tensors[name] = Tensor(dtype, list(values.shape), values.tobytes())

    def stream(self) -> dict[str, RawTensor]:
        (self.folder / FILE).write_bytes(pack(self.tensors))
        return {param.name: tensor for param, tensor in stream_params(self.folder, self.arch)}


@pytest.mark.parametrize("name", ALL)
def test_undamaged(name: str, tmp_path: Path) -> None:
    kept = Kept(tmp_path, ALL[name])
    found = kept.stream()
    assert {key: raw.data.shape for key, raw in found.items()} == {p.name: p.shape for p in param_table(kept.arch)}
    for param, raw in dummy_params(kept.arch, 0):
        np.testing.assert_array_equal(found[param.name].data, raw.data)


def swap(name: str, values: Any, dtype: str) -> Callable[[Kept], None]:
    return lambda kept: kept.set(name, np.asarray(values), dtype)


def drop(name: str) -> Callable[[Kept], None]:
    return lambda kept: kept.tensors.pop(name) and None


ONES = np.ones
DAMAGE: dict[str, tuple[str, Callable[[Kept], None], str]] = {
    "scale missing": ("int8", drop(f"{Q}.weight_scale"), f"{Q}.weight_scale: missing .*int8 per channel"),
    "zeros missing": ("awq", drop(f"{Q}.qzeros"), f"{Q}.qzeros: missing"),
    "order missing": ("gptq", drop(f"{Q}.g_idx"), f"{Q}.g_idx: missing"),
    "act scale missing": ("static", drop(f"{Q}.input_scale"), f"{Q}.input_scale: missing"),
    "scale shape": (
        "int8",
        swap(f"{Q}.weight_scale", ONES((32, 1), "f4"), "F32"),
        rf"{Q}.weight_scale: shape \[32, 1\], config.json means \[64, 1\]",
    ),
    "group size": (
        "awq",
        swap(f"{Q}.scales", ONES((1, 64), "f2"), "F16"),
        rf"{Q}.scales: shape \[1, 64\], config.json means \[2, 64\]",
    ),
    "plain where quantised is meant": (
        "int8",
        swap(f"{Q}.weight", ONES((64, 64), "f4"), "F32"),
        f"{Q}.weight: dtype F32 is not supported; expected I8",
    ),
    "quantised where plain is meant": (
        "int8",
        swap("lm_head.weight", ONES((24, 64), "i1"), "I8"),
        "lm_head.weight: dtype I8",
    ),
    "integer scale": ("block", swap(f"{Q}.weight_scale_inv", ONES((1, 1), "i4"), "I32"), "weight_scale_inv: dtype I32"),
    "scale is nan": (
        "int8",
        swap(f"{Q}.weight_scale", np.full((64, 1), np.nan, "f4"), "F32"),
        f"{Q}.weight_scale: NaN or infinity at element 0",
    ),
    "fp8 is nan": ("block", swap(f"{Q}.weight", np.full((64, 64), 0xFF, "u1"), "F8_E4M3"), f"{Q}.weight: NaN"),
    "group of no input": (
        "gptq",
        swap(f"{Q}.g_idx", np.full(64, 2, "i4"), "I32"),
        f"{Q}.g_idx: groups 2 to 2, expected 0 to 1",
    ),
    "uneven groups": (
        "gptq",
        swap(f"{Q}.g_idx", np.r_[np.zeros(33), np.ones(31)].astype("i4"), "I32"),
        f"{Q}.g_idx: group 0 has 33 inputs, group_size is 32",
    ),
    "another shape inside": (
        "int4",
        swap(f"{Q}.weight_shape", np.array([64, 60]), "I64"),
        rf"{Q}.weight_shape: \[64, 60\], config.json means \[64, 64\]",
    ),
    "a bias that nobody adds": (
        "gptq",
        swap(f"{Q}.bias", np.full(64, 0.5, "f2"), "F16"),
        f"{Q}.bias: must be 0 everywhere",
    ),
    "zeros of symmetric weights": (
        "int8",
        swap(f"{Q}.weight_zero_point", ONES((64, 1), "i1"), "I8"),
        f"{Q}.weight_zero_point: must be 0",
    ),
    "both spellings": (
        "block",
        swap(f"{Q}.weight_scale", ONES((1, 1), "f4"), "F32"),
        f"{Q}.weight_scale_inv: not a parameter",
    ),
    "a tensor too many": ("awq", swap(f"{Q}.g_idx", np.zeros(64, "i4"), "I32"), f"{Q}.g_idx: not a parameter"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, damage, message = DAMAGE[case]
    kept = Kept(tmp_path, ALL[name])
    damage(kept)
    with pytest.raises(CheckpointError) as caught:
        kept.stream()
    assert re.search(message, str(caught.value)), str(caught.value)
    assert FILE in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name,extra",
    [
        ("int4", swap(f"{Q}.weight_shape", np.array([64, 64]), "I64")),
        ("gptq", swap(f"{Q}.bias", np.array([0.0, -0.0] * 32, "f2"), "F16")),
        ("int8", swap(f"{Q}.weight_zero_point", np.zeros((64, 1), "i1"), "I8")),
        ("int8", swap(f"{Q}.weight_scale", ONES(64, "f4"), "F32")),
        ("static", swap(f"{Q}.weight_scale", np.float32(0.5), "F32")),
        ("block", swap(f"{Q}.weight_scale_inv", np.full((1, 1), 0x3F80, "u2"), "BF16")),
    ],
)
def test_harmless_variants(name: str, extra: Callable[[Kept], None], tmp_path: Path) -> None:
    kept = Kept(tmp_path, ALL[name])
    extra(kept)
    assert kept.stream().keys() == {param.name for param in param_table(kept.arch)}


def test_gptq_without_an_order(tmp_path: Path) -> None:
    """g_idx may be left out where desc_act is false: inputs are in groups as they come."""
    kept = Kept(tmp_path, {**GPTQ, "desc_act": False})
    del kept.tensors[f"{Q}.g_idx"]
    assert kept.stream()["layers.1.q.order"].data.tolist() == [i // 32 for i in range(64)]


def test_fused_on_disk(tmp_path: Path) -> None:
    """Parts of qkv_proj are rows of scales and packed columns of AWQ; a scale of all is everyone's."""
    phi = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
    for quant in (AWQ, STATIC):
        arch = parse_config(config(quant, **phi))
        whole = {}
        for param in param_table(arch):
            source = param.sources[0]
            shape = list(param.shape)
            if source.rows is not None:
                shape[source.axis] = source.rows
            dtype = {"int32": ("I32", "i4"), "float8_e4m3": ("F8_E4M3", "u1")}.get(str(param.dtype), ("F32", "f4"))
            count = int(np.prod(shape))
            whole[source.name] = Tensor(dtype[0], shape, (np.arange(count) % 100).astype(dtype[1]).tobytes())
        (tmp_path / FILE).write_bytes(pack(whole))
        found = {param.name: raw.data for param, raw in stream_params(tmp_path, arch)}
        if quant is AWQ:
            fused = (np.arange(64 * 16) % 100).reshape(64, 16)  # 8 columns of q, 4 of k, 4 of v
            np.testing.assert_array_equal(found["layers.0.k.data"], fused[:, 8:12])
            np.testing.assert_array_equal(found["layers.0.q.data"], fused[:, :8])
        else:
            assert found["layers.0.q.act_scale"] == found["layers.0.v.act_scale"] == 0
            np.testing.assert_array_equal(found["layers.0.v.data"].ravel(), np.arange(96 * 64, 128 * 64) % 100)


def test_shards() -> None:
    """Ranks cut packed axes and groups where the weight is cut; where they cannot, the parameter is named."""
    table = {param.name: param for param in param_table(parse_config(config(GPTQ)))}
    assert shard_slices(table["layers.0.q.data"], 2, 1) == (slice(0, 8), slice(32, 64))
    assert shard_slices(table["layers.0.q.zeros"], 2, 1) == (slice(0, 2), slice(4, 8))
    assert shard_slices(table["layers.0.o.data"], 2, 1) == (slice(4, 8), slice(0, 64))
    assert shard_slices(table["layers.0.o.order"], 2, 1) == (slice(32, 64),)
    assert shard_shape(table["layers.0.o.scale"], 2, 1) == (2, 64)  # with act order, groups are anywhere
    awq = {param.name: param for param in param_table(parse_config(config(AWQ)))}
    assert shard_slices(awq["layers.0.o.scale"], 2, 1) == (slice(1, 2), slice(0, 64))
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size: 4 cuts layers.0.o.scale inside 32"):
        shard_slices(awq["layers.0.o.scale"], 4, 1)
    block = {param.name: param for param in param_table(parse_config(config(BLOCK)))}
    with pytest.raises(ConfigError, match=r"cuts layers\.0\.up\.scale inside 128"):
        shard_slices(block["layers.0.up.scale"], 2, 0)
    int8 = {param.name: param for param in param_table(parse_config(config(ALL["int8"])))}
    assert shard_slices(int8["layers.0.q.scale"], 2, 1) == (slice(32, 64), slice(0, 1))
    assert shard_slices(int8["layers.0.down.scale"], 2, 1) == (slice(0, 64), slice(0, 1))


def test_e4m3_rounding() -> None:
    torch = pytest.importorskip("torch")
    values = np.concatenate((np.random.default_rng(0).standard_normal(1000) * 60, [0, 448, -448, 1e-9, 3000]))
    values = values.astype(np.float32)
    bits = to_e4m3(values)
    expected = torch.tensor(values).clamp(-448, 448).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(torch.tensor(bits).view(torch.float8_e4m3fn).float(), expected.float())
    assert first_non_finite(RawTensor("float8_e4m3", bits)) is None
    bits[7] = 0x7F
    assert first_non_finite(RawTensor("float8_e4m3", bits)) == 7


def test_inspect_shows_the_form(tmp_path: Path) -> None:
    from engine.entrypoints.inspect_command import run

    kept = Kept(tmp_path, AWQ)
    (tmp_path / "config.json").write_text(json.dumps(kept.config))
    kept.stream()
    report = run(tmp_path)
    assert "and awq" in report and "weights: 4 bits per group of 32" in report
    assert re.search(r"layers\.\*\.down\.data +2 +\[192, 8\] +ffn embed +12 KiB", report)
