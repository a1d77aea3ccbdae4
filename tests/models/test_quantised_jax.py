"""Quantised checkpoints through the whole engine on the jax backend: the judges of test_quantised.py, transformers on
the weights that the field's own library reads, and module by module where activations are rounded.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from backends.jax import quant_weights, stacks
from backends.jax.runner import Runner
from backends.jax.split import Split
from backends.jax.weights import load_params
from engine.core.start import start_core
from engine.errors import ConfigError
from engine.specs.checkpoint import read_config, stream_params
from engine.specs.families import parse_config
from engine.specs.families.quantization import at_load
from jax_models.linear import linear, weight_of
from pallas_kernels import dispatch
from tests.backends.driver import Driver
from tests.backends.split_runs import quantised
from tests.checkpoints import write_checkpoint
from tests.models.numerics import BOUND, Case, Sizes, check_report, engine_config, run_folder
from tests.models.test_quantised import (
    AWQ,
    CALM,
    FIXED,
    FP8,
    FP8_BLOCK,
    FP8_TENSOR,
    GPTQ,
    INT4,
    INT4_ROWS,
    INT4_ZEROS,
    INT8,
    MEAN,
    PER_TOKEN,
    ROUNDED,
    SMALL,
    rounded_by_row,
)  # fmt: skip
from tests.quantised import SIZES, awq_tensors, gptq_tensors, plain_twin, write_compressed, write_packed

LLAMA = Case(name="llama", family="llama", pages=30)


@pytest.mark.parametrize(
    "name,weights,changes",
    [
        ("int4-zeros", INT4_ZEROS, {}),
        ("int4-phi3", INT4, {"family": "phi3"}),
        ("fp8", FP8, {}),
        ("fp8-block", FP8_BLOCK, {}),
        ("int8-head", INT8, {"ignore": ()}),
        ("int4-some", INT4, {"ignore": ("lm_head", "re:.*down_proj", "model.layers.1.self_attn.k_proj")}),
    ],
)
def test_weights_alone(name: str, weights: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_compressed(tmp_path / name, weights, **changes)
    case = replace(LLAMA, family=changes.get("family", "llama"), pages=11 if "family" in changes else 30)
    check_report(run_folder("jax", case, folder, SMALL, reference=plain_twin(folder)))


@pytest.mark.parametrize(
    "config,tensors_of",
    [
        (AWQ, awq_tensors),
        (GPTQ, partial(gptq_tensors, act_order=False)),
        ({**GPTQ, "desc_act": True}, partial(gptq_tensors, act_order=True)),
    ],
)
def test_awq_and_gptq(config: dict[str, Any], tensors_of: Any, tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "packed", config, tensors_of)
    check_report(run_folder("jax", LLAMA, folder, SMALL, plain_twin(folder)))


@pytest.mark.parametrize("name,weights,activations", ROUNDED)
def test_modules_with_rounded_activations(
    name: str, weights: dict[str, Any], activations: dict[str, Any], tmp_path: Path
) -> None:
    """As the same test of the torch backend, on the CPU's arrays and on those that a TPU is given."""
    folder = write_compressed(tmp_path / name, weights, activations, **CALM)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(3)
    kept = [our_params(folder, platform) for platform in ("cpu", "tpu")[: 1 + (name != "fp8-block")]]
    with torch.inference_mode():
        theirs(torch.zeros(1, 1, dtype=torch.long))  # unpacks
        for index, layer in enumerate(theirs.model.layers):
            attention, ffn = layer.self_attn, layer.mlp
            for part, modules in (
                ("qkv", (attention.q_proj, attention.k_proj, attention.v_proj)),
                ("o", (attention.o_proj,)),
                ("gate_up", (ffn.gate_proj, ffn.up_proj)),
                ("down", (ffn.down_proj,)),
            ):
                x = torch.randn(9, modules[0].in_features, generator=generator) * 1.5
                by_row = name == "int8-token"  # the library divides by 127.5
                parts = [rounded_by_row(x, 127) @ m.weight.T if by_row else m(x[None])[0] for m in modules]
                for params in kept:
                    ours = linear(jnp.asarray(x.numpy()), weight_of(params[index], part))
                    np.testing.assert_allclose(ours, torch.cat(parts, 1).numpy(), atol=1e-4, rtol=1e-5)


class AsTpu(Split):
    """This host's device, with what a TPU is given: codes as they are. Layers are not stacked."""

    def __init__(self) -> None:
        super().__init__(jax.devices("cpu")[:1])
        self.platform = "tpu"


def our_params(folder: Path, platform: str = "cpu") -> list[dict[str, jax.Array]]:
    """Of each layer."""
    arch = parse_config(read_config(folder))
    split = AsTpu() if platform == "tpu" else Split(jax.devices("cpu")[:1])
    params = load_params(arch, stream_params(folder, arch), "float32", split)
    if platform == "cpu":
        return list(params["layers"])
    (stack,) = params["stacks"]
    assert stack["down"].dtype in (jnp.int8, jnp.float8_e4m3fn)
    return [{part: array[index] for part, array in stack.items()} for index in range(len(arch.layers))]


@pytest.mark.parametrize("name,weights,activations", ROUNDED[:4])  # the library has 127.5 for int8 a token
def test_engine_with_rounded_activations(
    name: str, weights: dict[str, Any], activations: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_compressed(tmp_path / name, weights, activations, **CALM)
    report = run_folder("jax", LLAMA, folder, SMALL)
    assert report.total / report.compared <= MEAN


def test_fp8_at_load(tmp_path: Path) -> None:
    plain = write_checkpoint("llama", tmp_path / "plain", **{**SIZES, **CALM})
    written = write_compressed(tmp_path / "written", FP8, {**PER_TOKEN, "num_bits": 8, "type": "float"}, **CALM)
    report = run_folder("jax", replace(LLAMA, quantization="fp8"), plain, SMALL, reference=written)
    assert report.total / report.compared <= MEAN
    arch = replace(parse_config(read_config(plain)), quant=at_load("fp8"))
    kept = load_params(arch, stream_params(plain, arch), "float32", Split(jax.devices("cpu")[:1]))
    for ours, theirs in zip(kept["layers"], our_params(written), strict=True):
        for part in ("qkv", "o", "gate_up", "down"):
            np.testing.assert_array_equal(ours[part], theirs[part])
            np.testing.assert_allclose(ours[part + "_e4m3"], theirs[part + "_e4m3"], rtol=1e-6)


def test_what_is_not_taken(tmp_path: Path) -> None:
    some = write_compressed(tmp_path / "some", INT8, ignore=("lm_head", "model.layers.1.self_attn.k_proj"))
    with pytest.raises(ConfigError, match=r"layers.1.q and layers.1.k are kept in different ways.*--backend torch"):
        start_core(engine_config("jax", LLAMA), some)
    fixed = write_compressed(tmp_path / "fixed", FP8_TENSOR, {**FIXED, "num_bits": 8, "type": "float"}, **CALM)
    change_scale(fixed, "model.layers.0.self_attn.k_proj.input_scale")
    with pytest.raises(ConfigError, match=r"layers.0.qkv_act_scale: .* differ.*--backend torch"):
        start_core(engine_config("jax", LLAMA), fixed)


def change_scale(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_scan_over_stacked_codes(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPU's step on stacks of codes and scales gives what layer by layer gives."""

    def outputs() -> list[list[int]]:
        d = Driver(Runner(), quantised(scheme), seed=3)
        seqs = [d.new(d.prompt(length)) for length in (37, 5, 20)]
        d.generate(seqs, 6)
        return [seq.outputs for seq in seqs]

    wanted = outputs()
    monkeypatch.setattr(dispatch, "choose_kernel", lambda platform, head_size: "plain")
    monkeypatch.setattr(stacks, "stacks_layers", lambda platform: True)
    assert outputs() == wanted


WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "name,write",
    [
        ("awq", lambda folder: write_packed(folder, {**AWQ, "group_size": 128}, awq_tensors, **WIDE)),
        (
            "gptq",
            lambda folder: write_packed(
                folder, {**GPTQ, "group_size": 128}, partial(gptq_tensors, act_order=False), **WIDE
            ),
        ),
        ("rows", lambda folder: write_compressed(folder, INT4_ROWS, **WIDE)),
        ("head", lambda folder: write_compressed(folder, INT4_ROWS, ignore=(), vocab_size=384, **WIDE)),
        ("zeros", lambda folder: write_compressed(folder, {**INT4_ZEROS, "group_size": 128}, **WIDE)),
    ],
)
def test_nibbles_as_a_tpu_keeps_them(name: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan over stacks of words, multiplied by the TPU's kernel in Pallas's interpreter, against plain weights."""
    form_of = quant_weights.form_of
    monkeypatch.setattr(quant_weights, "form_of", lambda quant, platform: form_of(quant, "tpu"))
    monkeypatch.setattr(dispatch, "choose_kernel", lambda platform, head_size: "plain")
    monkeypatch.setattr(stacks, "stacks_layers", lambda platform: True)
    folder = write(tmp_path / name)
    arch = parse_config(read_config(folder))
    (stack,) = load_params(arch, stream_params(folder, arch), "float32", Split(jax.devices("cpu")[:1]))["stacks"]
    assert stack["qkv"].shape == (2, 64, 256) and stack["qkv"].dtype == jnp.int32
    few = Sizes(prompts=4, outputs=8, again=1)
    report = run_folder("jax", LLAMA, folder, few, reference=plain_twin(folder))
    assert not report.wrong and report.difference <= BOUND


def test_nibbles_that_a_tpu_does_not_take(tmp_path: Path) -> None:
    folder = write_compressed(tmp_path / "narrow", INT4_ROWS)
    with pytest.raises(ConfigError, match=r"layers.0.k: \[64, 128\] in 4 bits is no whole blocks.*--backend torch"):
        our_params(folder, "tpu")


@pytest.mark.parametrize("act", ["none", "token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_on_a_cpu(act: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 weights stay codes of a byte, and one row, eight, sixteen and a prompt of 70 give the wide form's tokens."""
    spec = quantised("int8")
    assert spec.quant is not None
    ((patterns, quant),) = spec.quant.rules
    spec = replace(spec, quant=replace(spec.quant, rules=((patterns, replace(quant, act=act)),)))

    def run() -> tuple[list[list[int]], dict[str, Any]]:
        d = Driver(Runner(), spec, dtype=dtype, seed=3)
        found = []
        for lengths in ((37,), (20, 5, 70, 3, 17, 9, 2, 30)):
            seqs = [d.new(d.prompt(length)) for length in lengths]
            d.generate(seqs, 6)
            found += [seq.outputs for seq in seqs]
            for seq in seqs:
                d.close(seq)
        return found, d.runner._params

    tokens, params = run()
    with monkeypatch.context() as patch:
        patch.setattr(quant_weights, "keeps_codes", lambda platform, scheme: False)
        wide_tokens, wide = run()
    assert tokens == wide_tokens
    for layer, other in zip(params["layers"], wide["layers"], strict=True):
        for part in ("qkv", "o", "gate_up", "down"):
            assert layer[part].dtype == jnp.int8 and other[part].dtype == dtype
            assert layer[part].nbytes * other[part].dtype.itemsize == other[part].nbytes
            np.testing.assert_array_equal(np.asarray(layer[part], np.float32), np.asarray(other[part], np.float32))
