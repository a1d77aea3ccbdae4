"""Dummy weights, and the shards of every parameter at every tensor-parallel degree."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.specs.families import parse_config
from engine.specs.parallel import check_parallel, shard_shape, shard_slices
from engine.specs.weights import DTYPE_BYTES, ParamSpec, dummy_params, param_table, to_float32
from tests.checkpoints import FAMILIES, family_config
from tests.engine.specs.damage import CONFIG

ARCH = parse_config({**CONFIG, "vocab_size": 30, "num_attention_heads": 8, "num_key_value_heads": 2})
TABLE = {param.name: param for param in param_table(ARCH)}


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_fit_the_table(family: str) -> None:
    arch = parse_config({**family_config(family).to_dict(), "dtype": "bfloat16"})
    first = list(dummy_params(arch, 7))
    assert [param for param, _ in first] == list(param_table(arch))
    for (param, tensor), (_, again) in zip(first, dummy_params(arch, 7), strict=True):
        assert tensor.dtype == "bfloat16" and tensor.data.shape == param.shape
        assert np.array_equal(tensor.data, again.data)
        values = to_float32(tensor)
        assert np.isfinite(values).all()
        if param.init == "normal" and values.ndim == 2:
            assert values.std() == pytest.approx(param.shape[-1] ** -0.5, rel=0.2)
    other = {param.name: tensor.data for param, tensor in dummy_params(arch, 8)}
    assert not np.array_equal(other["embed"], first[0][1].data)


def test_dummy_weights_of_many_elements_do_not_repeat_by_row() -> None:
    arch = parse_config({**CONFIG, "vocab_size": 40_000, "hidden_size": 64, "num_hidden_layers": 1})
    embed = next(tensor for param, tensor in dummy_params(arch, 0) if param.name == "embed").data
    assert len(np.unique(embed, axis=0)) == 40_000


def test_byte_sizes() -> None:
    assert {name: np.dtype("uint16" if name == "bfloat16" else name).itemsize for name in DTYPE_BYTES} == DTYPE_BYTES


def shards(param: ParamSpec, ranks: int) -> np.ndarray:
    """How many ranks hold each element."""
    count = np.zeros(param.shape, np.int64)
    for rank in range(ranks):
        part = shard_slices(param, ranks, rank)
        count[part] += 1
        assert count[part].shape == shard_shape(param, ranks, rank)
    return count


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_cover_each_parameter(ranks: int) -> None:
    check_parallel(ARCH, ranks)
    for param in TABLE.values():
        kv = "kv_heads" in param.axes
        split = {"heads", "ffn", "vocab"} & set(param.axes)
        expected = max(1, ranks // 2) if kv else 1 if split else ranks
        assert (shards(param, ranks) == expected).all(), param.name


def test_kv_heads_are_replicated_to_neighbours() -> None:
    k = TABLE["layers.0.k"]  # two heads of 4 rows
    assert [shard_slices(k, 4, rank)[0] for rank in range(4)] == [slice(0, 4), slice(0, 4), slice(4, 8), slice(4, 8)]
    q = TABLE["layers.0.q"]  # eight heads: rank 1 holds heads 2 and 3, whose KV head is 0
    assert shard_slices(q, 4, 1)[0] == slice(8, 16)


def test_vocabulary_is_rounded_up() -> None:
    rows = [shard_slices(TABLE["embed"], 4, rank)[0] for rank in range(4)]
    assert rows == [slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 30)]


def test_whole_on_each_rank() -> None:
    assert shard_slices(TABLE["layers.0.attn_norm"], 4, 3) == (slice(0, 8),)
    assert shard_slices(TABLE["layers.0.o"], 4, 3) == (slice(0, 8), slice(24, 32))
    assert shard_slices(TABLE["layers.0.down"], 4, 3) == (slice(0, 8), slice(9, 12))


@pytest.mark.parametrize(("ranks", "message"), [(3, "8 attention heads"), (8, "12 ffn columns"), (0, "0 is not")])
def test_refused_degrees(ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size: .*{message}"):
        check_parallel(ARCH, ranks)


def test_refused_shards() -> None:
    with pytest.raises(ConfigError, match="does not divide the 8 heads units"):
        shard_slices(TABLE["layers.0.q"], 3, 0)
    with pytest.raises(ConfigError, match="tensor rank: 2"):
        shard_slices(TABLE["layers.0.q"], 2, 2)
    odd = parse_config({**CONFIG, "num_attention_heads": 12, "num_key_value_heads": 3})
    with pytest.raises(ConfigError, match="neither divides 3 KV heads"):
        check_parallel(odd, 4)
