"""Quantised checkpoints through the whole engine on the torch backend, against transformers on the weights that the
field's own library reads out of them.

Weights alone: every token is the reference's own, log-probabilities within numerics.BOUND. With rounded activations a
sum in another order may round one number to its neighbour, which the next layers spread: there whole modules are
compared (each output within 1e-4, none rounds apart), and the engine's mean log-probability (MEAN).
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.torch.weights import load_params
from cuda_kernels.dispatch import linear
from cuda_kernels.quant_reference import dequantised
from cuda_kernels.quant_weight import Parts, QuantWeight, Weight
from engine.core.start import start_core
from engine.errors import ConfigError
from engine.specs.checkpoint import read_config, stream_params
from engine.specs.families import parse_config
from engine.specs.families.quantization import at_load
from engine.specs.weights import dummy_blocks
from tests.checkpoints import write_checkpoint
from tests.models.numerics import Case, Sizes, check_report, engine_config, run_folder, serve_all
from tests.quantised import SIZES, awq_tensors, gptq_tensors, plain_twin, write_compressed, write_packed

INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT4_ZEROS = {**INT4, "symmetric": False}
INT4_ROWS: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FP8_TENSOR = {**FP8, "strategy": "tensor"}
FP8_BLOCK = {**FP8, "strategy": "block", "block_structure": [128, 128]}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
PER_TOKEN: dict[str, Any] = {"symmetric": True, "strategy": "token", "dynamic": True}
FIXED: dict[str, Any] = {"symmetric": True, "strategy": "tensor", "dynamic": False}

SMALL = Sizes(prompts=12, outputs=48, again=1)
PAGES = {"phi3": 11}
"""Of a family with windows; the others need more for one sequence."""


@pytest.mark.parametrize(
    "name,weights,changes",
    [
        ("int4", INT4, {}),
        ("int4-zeros", INT4_ZEROS, {}),
        ("int4-rows", INT4_ROWS, {}),
        ("int4-phi3", INT4_ZEROS, {"family": "phi3"}),
        ("fp8-phi3", FP8_TENSOR, {"family": "phi3"}),
        ("int4-gemma3", INT4, {"family": "gemma3"}),
        ("int4-qwen3", INT4, {"family": "qwen3"}),
        ("int4-qwen2", INT4, {"family": "qwen2"}),
        ("fp8", FP8, {}),
        ("fp8-block", FP8_BLOCK, {}),
        ("int8-head", INT8, {"ignore": ()}),
        ("int4-some", INT4, {"ignore": ("lm_head", "re:.*down_proj", "model.layers.1.self_attn.k_proj")}),
        ("int4-named", INT4, {"targets": ("re:.*self_attn.[qk]_proj$", "re:.*layers.2.mlp.*")}),
    ],
)
def test_weights_alone(name: str, weights: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_compressed(tmp_path / name, weights, **changes)
    family = changes.get("family", "llama")
    case = Case(name=name, family=family, pages=PAGES.get(family, 30))
    check_report(run_folder("torch", case, folder, SMALL, reference=plain_twin(folder)))


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
TRAITS: dict[str, tuple[dict[str, Any], Any]] = {
    "awq": (AWQ, awq_tensors),
    "gptq": (GPTQ, partial(gptq_tensors, act_order=False)),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, partial(gptq_tensors, act_order=True)),
}


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("name", TRAITS)
def test_awq_and_gptq(name: str, family: str, tmp_path: Path) -> None:
    """Fused on disk (phi3) and not; with act order each of q, k and v has its own order of the inputs."""
    config, tensors_of = TRAITS[name]
    folder = write_packed(tmp_path / name, config, tensors_of, family=family)
    report = run_folder(
        "torch", Case(name=name, family=family, pages=PAGES.get(family, 30)), folder, SMALL, plain_twin(folder)
    )
    check_report(report)


ROUNDED = [
    ("fp8-token", FP8, {**PER_TOKEN, "num_bits": 8, "type": "float"}),
    ("fp8-fixed", FP8_TENSOR, {**FIXED, "num_bits": 8, "type": "float"}),
    ("int8-fixed", INT8, {**FIXED, "num_bits": 8, "type": "int"}),
    (
        "fp8-block",
        FP8_BLOCK,
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": True},
    ),
    ("int8-token", INT8, {**PER_TOKEN, "num_bits": 8, "type": "int"}),
]


def compressed_config(weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """quantization_config of compressed-tensors for all linear modules."""
    form = "pack-quantized" if weights["num_bits"] == 4 else "int-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


CALM: dict[str, Any] = {"intermediate_size": 256, "initializer_range": 0.08}
"""Whole blocks, as the library wants, and layers that do not blow a rounding up."""


@pytest.mark.parametrize("name,weights,activations", ROUNDED)
def test_modules_with_rounded_activations(
    name: str, weights: dict[str, Any], activations: dict[str, Any], tmp_path: Path
) -> None:
    """Each linear module of the checkpoint, as transformers and compressed-tensors compute it, on the same inputs.

    The library divides a row's largest number by 127.5 for int8 and every server by 127; its scale is given there.
    """
    folder = write_compressed(tmp_path / name, weights, activations, **CALM)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    params = our_params(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        theirs(torch.zeros(1, 1, dtype=torch.long))  # unpacks
        for index, layer in enumerate(theirs.model.layers):
            attention, ffn, ours = layer.self_attn, layer.mlp, params["layers"][index]
            for modules, weight in (
                ((attention.q_proj, attention.k_proj, attention.v_proj), ours["qkv"]),
                ((attention.o_proj,), ours["o"]),
                ((ffn.gate_proj, ffn.up_proj), ours["gate_up"]),
                ((ffn.down_proj,), ours["down"]),
            ):
                x = torch.randn(9, weight.shape[1], generator=generator) * 1.5
                if name == "int8-token":
                    wanted = torch.cat([rounded_by_row(x, 127) @ module.weight.T for module in modules], 1)
                else:
                    wanted = torch.cat([module(x[None])[0] for module in modules], 1)
                torch.testing.assert_close(linear(x, weight), wanted, atol=1e-4, rtol=1e-5)


def our_params(folder: Path) -> dict[str, Any]:
    arch = parse_config(read_config(folder))
    return load_params(arch, stream_params(folder, arch), "float32", torch.device("cpu"))


def rounded_by_row(x: Tensor, limit: float) -> Tensor:
    """What int8 leaves of x, each row by its own scale. x: [T, I]."""
    scale = x.abs().amax(1, keepdim=True) / limit
    return (x / scale).round().clamp(-limit - 1, limit) * scale


MEAN = 0.02
"""Mean |difference| of a log-probability; over four times as much where activations are left as they are (tested)."""


@pytest.mark.parametrize("name,weights,activations", ROUNDED[:4])
def test_engine_with_rounded_activations(
    name: str, weights: dict[str, Any], activations: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_compressed(tmp_path / name, weights, activations, **CALM)
    report = run_folder("torch", Case(name=name, family="llama", pages=30), folder, SMALL)
    plain = run_folder("torch", Case(name=name, family="llama", pages=30), plain_twin(folder), SMALL, reference=folder)
    means = [each.total / each.compared for each in (report, plain)]
    print(name, means)
    assert means[0] <= MEAN and means[1] > 4 * means[0]


def as_fp8_method(folder: Path) -> Path:
    """Spell a checkpoint with 128 x 128 blocks as DeepSeek and transformers do."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("weight_scale", "weight_scale_inv"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fp8_blocks_as_transformers_reads_them(tmp_path: Path) -> None:
    """The weights of quant_method fp8 are those that transformers' own reader makes, and the plain twin's."""
    folder = as_fp8_method(write_compressed(tmp_path / "fp8", FP8_BLOCK, **CALM))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    twin = transformers.AutoModelForCausalLM.from_pretrained(plain_twin(folder))
    params = our_params(folder)
    for layer, same, ours in zip(theirs.model.layers, twin.model.layers, params["layers"], strict=True):
        down, gate_up = ours["down"], ours["gate_up"]
        assert down.act == "block"
        wanted = torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
        torch.testing.assert_close(all_rows(gate_up), wanted.float())
        torch.testing.assert_close(all_rows(down), layer.mlp.down_proj.weight.float())
        torch.testing.assert_close(all_rows(down), same.mlp.down_proj.weight)
        attention = layer.self_attn
        heads = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        torch.testing.assert_close(all_rows(ours["qkv"]), heads.float())


def all_rows(weight: Weight) -> Tensor:
    """The weight that is meant, f32 [O, I]."""
    if isinstance(weight, Parts):
        return torch.cat([all_rows(part) for part in weight.parts])
    if isinstance(weight, QuantWeight):
        return dequantised(weight, torch.float32)
    if isinstance(weight, Tensor) or weight.scale is None:
        return weight if isinstance(weight, Tensor) else weight.data
    return weight.data * weight.scale[:, None]


def test_fp8_at_load(tmp_path: Path) -> None:
    """--quantization fp8 on a plain checkpoint serves what the library would have written for it."""
    plain = write_checkpoint("llama", tmp_path / "plain", **{**SIZES, **CALM})
    fp8 = {**PER_TOKEN, "num_bits": 8, "type": "float"}
    written = write_compressed(tmp_path / "written", FP8, fp8, **CALM)
    case = Case(name="at load", family="llama", pages=30, quantization="fp8")
    report = run_folder("torch", case, plain, SMALL, reference=written)
    assert report.total / report.compared <= MEAN
    arch = replace(parse_config(read_config(plain)), quant=at_load("fp8"))
    kept = load_params(arch, stream_params(plain, arch), "float32", torch.device("cpu"))
    read = our_params(written)
    for ours, theirs in zip(kept["layers"], read["layers"], strict=True):
        for part in ("qkv", "o", "gate_up", "down"):
            assert torch.equal(ours[part].data.float(), theirs[part].data.float())
            torch.testing.assert_close(ours[part].scale, theirs[part].scale)
    assert isinstance(kept["head"], Tensor) and kept["head"].dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "awq", "group_size": 32},
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        {"quant_method": "gptq", "bits": 4, "group_size": -1},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "activation_scheme": "static"},
        compressed_config(INT8, {**PER_TOKEN, "num_bits": 8, "type": "int"}),
        compressed_config(INT4_ZEROS),
        None,
    ],
)
def test_dummy_weights(changes: dict[str, Any] | None, tmp_path: Path) -> None:
    """Every form starts without a checkpoint, with weights as large as plain dummies, and answers."""
    folder = write_checkpoint("llama", tmp_path, **SIZES)
    config = json.loads((folder / "config.json").read_text())
    if changes is not None:
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": changes}))
    arch = parse_config(read_config(folder))
    if changes is None:
        arch = replace(arch, quant=at_load("fp8"))
    params = load_params(arch, dummy_blocks(arch, 1), "float32", torch.device("cpu"))
    for part, inputs in (("qkv", 128), ("o", 128), ("gate_up", 128), ("down", 192)):
        assert all_rows(params["layers"][1][part]).std() * inputs**0.5 == pytest.approx(1, abs=0.15)
    case = Case(name="dummy", family="llama", pages=30, quantization=None if changes else "fp8")
    settings = engine_config("torch", case)
    loop, _ = start_core(replace(settings, model=replace(settings.model, load_format="dummy")), folder)
    answers = serve_all(loop, case, Sizes(prompts=4, outputs=12, again=0))
    loop.shutdown()
    assert len({token for answer in answers.values() for token in answer.tokens}) > 4
    assert all(-12 < min(answer.chosen) <= max(answer.chosen) < 0 for answer in answers.values())


def test_flag_and_checkpoint_must_agree(tmp_path: Path) -> None:
    plain = write_checkpoint("llama", tmp_path / "plain")
    packed = write_packed(tmp_path / "awq", AWQ, awq_tensors)
    for folder, backend, flag, message in (
        (plain, "torch", "gptq", "--quantization: 'gptq' needs a checkpoint made so.*fp8"),
        (packed, "torch", "fp8", "--quantization: 'fp8', but config.json says awq"),
    ):
        settings = engine_config(backend, Case(name="", family="llama", quantization=flag))
        with pytest.raises(ConfigError, match=message):
            start_core(settings, folder)
    loop, facts = start_core(engine_config("torch", Case(name="", family="llama", quantization="awq")), packed)
    loop.shutdown()
    assert any("as large as plain" in note for note in facts.notes)
