"""What streaming promises of a good checkpoint: each parameter once, right numbers, bounded memory, honest progress."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from engine.specs.checkpoint import INDEX_NAME, read_config, stream_params
from engine.specs.families import parse_config
from engine.specs.generation import generation_defaults, stop_ids
from engine.specs.weights import RawTensor, from_float32, param_table, to_float32
from tests.checkpoints import FAMILIES, make_model, write_checkpoint
from tests.engine.specs.damage import CONFIG, FILE, Draft, array, load

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def stream(folder: Path, **options: Any) -> dict[str, RawTensor]:
    arch = parse_config(read_config(folder))
    pairs = list(stream_params(folder, arch, **options))
    assert len({param.name for param, _ in pairs}) == len(pairs) == len(param_table(arch))
    return {param.name: tensor for param, tensor in pairs}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_in_the_file(family: str, dtype: str, tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path, dtype=dtype, num_hidden_layers=1, layer_types=None)
    stored = load_file(tmp_path / FILE)
    params = stream(tmp_path)
    assert sum(t.data.size for t in params.values()) == sum(t.numel() for t in stored.values())
    arch = parse_config(read_config(tmp_path))
    for param in param_table(arch):
        source = next(source for source in param.sources if source.name in stored)
        expected = stored[source.name][source.start : source.stop]
        assert params[param.name].dtype == dtype
        np.testing.assert_array_equal(to_float32(params[param.name]), expected.float().numpy())


def test_shards_by_transformers(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "many", max_shard_size="60KB")
    write_checkpoint("llama", tmp_path / "one")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3 and (tmp_path / "many" / INDEX_NAME).exists()
    many, one = stream(tmp_path / "many"), stream(tmp_path / "one")
    assert many.keys() == one.keys()
    assert all(np.array_equal(many[name].data, one[name].data) for name in one)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    write_checkpoint("phi3", tmp_path)
    seen: list[tuple[str, int, int]] = []
    stream(tmp_path, progress=lambda *report: seen.append(report))
    done = [report[1] for report in seen]
    assert {report[0] for report in seen} == {"weights"} and done == sorted(done)
    assert done[-1] == seen[-1][2] == sum(t.nbytes for t in load_file(tmp_path / FILE).values())


def test_memory_is_one_parameter(tmp_path: Path) -> None:
    """64 layers in one file of 13 MB; at no time is more than a few parameters held."""
    sizes = {"num_hidden_layers": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    draft = Draft(tmp_path, config={**CONFIG, **sizes, "vocab_size": 64, "head_dim": 8})
    arch = parse_config(draft.config)
    draft.tensors = {param.sources[0].name: array(np.zeros(param.shape)) for param in param_table(arch)}
    draft.write()
    del draft
    largest = max(param.num_elements * 4 for param in param_table(arch))
    file_bytes = (tmp_path / FILE).stat().st_size
    list(stream_params(tmp_path, arch))  # imports and caches settle
    tracemalloc.start()
    held = 0
    for _, tensor in stream_params(tmp_path, arch):
        held += tensor.data.nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    header_bytes = 64 * 9 * 1500  # python objects of the header and the table
    assert held > 6_000_000 and file_bytes > 6_000_000
    assert peak < 4 * largest + header_bytes < file_bytes / 4


def test_without_a_prefix(tmp_path: Path) -> None:
    """Some exports leave "model." out."""
    draft = Draft(tmp_path)
    draft.tensors = {name.removeprefix("model."): tensor for name, tensor in draft.tensors.items()}
    assert load(draft.write()) == 21


def test_old_buffers_are_ignored(tmp_path: Path) -> None:
    draft = Draft(tmp_path)
    draft.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = array(np.ones(2))
    assert load(draft.write()) == 21


def test_mixed_dtypes(tmp_path: Path) -> None:
    """float32 norms in a bfloat16 model are common; each tensor keeps its own dtype."""
    draft = Draft(tmp_path)
    draft.config["torch_dtype"] = "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    draft.tensors[name] = array(np.full((12, 8), 0x3F80), "BF16")
    params = stream(draft.write())
    assert params["layers.0.up"].dtype == "bfloat16" and params["final_norm"].dtype == "float32"
    assert (to_float32(params["layers.0.up"]) == 1.0).all()


def test_consolidated_copy_is_ignored(tmp_path: Path) -> None:
    folder = Draft(tmp_path).write()
    (folder / "consolidated.safetensors").write_bytes(b"the same weights under other names")
    assert load(folder) == 21


@pytest.mark.parametrize("kept", ["both", "embed", "head"])
def test_tied_head(tmp_path: Path, kept: str) -> None:
    """Either tensor or two equal ones: as transformers accepts them."""
    draft = Draft(tmp_path)
    draft.config["tie_word_embeddings"] = True
    draft.tensors[HEAD] = draft.tensors[EMBED]
    if kept != "both":
        del draft.tensors[HEAD if kept == "embed" else EMBED]
    params = stream(draft.write())
    assert len(params) == 20 and "head" not in params and params["embed"].data.shape == (24, 8)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_text_part_of_gemma3_with_vision(tmp_path: Path, prefix: str) -> None:
    write_checkpoint("gemma3", tmp_path)
    text = read_config(tmp_path)
    plain = stream(tmp_path)
    stored = load_file(tmp_path / FILE)
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in stored.items()}
    renamed["model.vision_tower.x" if prefix.startswith("model.") else "vision_tower.x"] = torch.ones(3)
    renamed["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(3)
    save_torch(renamed, tmp_path / FILE)
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps({**outer, "text_config": text, "eos_token_id": [2, 5]}))
    params = stream(tmp_path)
    assert params.keys() == plain.keys()
    assert all(np.array_equal(params[name].data, plain[name].data) for name in plain)
    assert stop_ids(tmp_path, parse_config(read_config(tmp_path))) == (2,)  # generation_config.json wins


def test_transformers_reads_what_we_accept(tmp_path: Path) -> None:
    """Our own byte-wise writer makes files that the official reader agrees with."""
    folder = Draft(tmp_path).write()
    stored = load_file(folder / FILE)
    assert stored[EMBED].shape == (24, 8) and len(stored) == 21
    assert transformers.AutoConfig.from_pretrained(folder).num_key_value_heads == 2


def test_official_writer_with_metadata(tmp_path: Path) -> None:
    folder = Draft(tmp_path).write()
    stored = {name: tensor.numpy() for name, tensor in load_file(folder / FILE).items()}
    save_file(stored, folder / FILE, metadata={"format": "pt"})
    assert load(folder) == 21


def test_scan_may_be_switched_off(tmp_path: Path) -> None:
    draft = Draft(tmp_path)
    draft.tensors["model.norm.weight"] = array(np.full(8, np.nan))
    assert np.isnan(stream(draft.write(), scan=False)["final_norm"].data).all()


def test_bfloat16_rounding() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    bits = from_float32(values, "bfloat16")
    expected = torch.tensor(values).to(torch.bfloat16)
    np.testing.assert_array_equal(bits, expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(to_float32(RawTensor("bfloat16", bits)), expected.float().numpy())


def test_generation_config(tmp_path: Path) -> None:
    draft = Draft(tmp_path)
    folder, arch = draft.write(), parse_config(draft.config)
    assert stop_ids(folder, arch) == (2, 3)
    assert generation_defaults(folder) == {"temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 20, "max_new_tokens": 9, "do_sample": True}))
    assert stop_ids(folder, arch) == (2,)
    assert generation_defaults(folder) == {"top_k": 20, "max_tokens": 9}
    (folder / "generation_config.json").unlink()
    assert stop_ids(folder, arch) == (2,) and generation_defaults(folder) == {}
