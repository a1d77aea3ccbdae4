"""Any change to a checkpoint's files ends in a load or in a typed error of one line, never in anything else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.entrypoints.inspect_command import run as inspect
from engine.errors import CheckpointError, ConfigError
from engine.specs.checkpoint import INDEX_NAME
from engine.specs.families import parse_config
from tests.engine.specs.damage import CONFIG, FILE, Draft, load
from tests.engine.specs.test_families import PUBLISHED

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
ROPE_KEYS = [
    "rope_type",
    "type",
    "factor",
    "rope_theta",
    "short_factor",
    "original_max_position_embeddings",
    "truncate",
]
SIZES = st.integers(-2, 70) | st.sampled_from([2**31, 2**63, 2**64, 10**30])


def survives(folder: Path) -> bool:
    """Load it as a start-up would. True when it was accepted."""
    try:
        load(folder)
        inspect(folder)
    except (CheckpointError, ConfigError) as error:
        assert str(error).isprintable()
        return False
    return True


@QUICK
@given(data=st.data())
def test_bytes_of_any_file(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Draft(Path(name), num_shards=data.draw(st.sampled_from([1, 2]))).write()
        file = folder / data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir())))
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, min(len(content) - 1, 4000)))
            content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        file.write_bytes(bytes(content))
        survives(folder)


@QUICK
@given(name=st.sampled_from(sorted(PUBLISHED)), data=st.data())
def test_any_value_in_a_config(name: str, data: st.DataObject) -> None:
    config: dict[str, Any] = json.loads(json.dumps(PUBLISHED[name]))
    target = data.draw(st.sampled_from([config, config.get("text_config", config)]))
    rope = data.draw(st.sampled_from(["rope_scaling", "rope_parameters"]))
    key = data.draw(st.sampled_from([*sorted(target), "layer_types", "head_dim", rope]))
    target[key] = data.draw(JSON)
    if key == rope:
        target[key] = data.draw(st.dictionaries(st.sampled_from(ROPE_KEYS), JSON | st.just("yarn"), max_size=4))
    try:
        parse_config(config)
    except ConfigError as error:
        assert str(error).isprintable()


@QUICK
@given(
    changes=st.dictionaries(st.sampled_from([key for key in CONFIG if isinstance(CONFIG[key], int)]), SIZES, min_size=1)
)
def test_any_sizes(changes: dict[str, int]) -> None:
    """A config of other sizes never loads: either a field or a tensor gives it away."""
    free = {"max_position_embeddings", "bos_token_id", "eos_token_id", "rope_theta", "rms_norm_eps"}
    if all(CONFIG[key] == value or key in free for key, value in changes.items()):
        return
    with tempfile.TemporaryDirectory() as name:
        draft = Draft(Path(name))
        draft.config |= changes
        assert not survives(draft.write())


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX_NAME, FILE])
def test_a_folder_where_a_file_should_be(file: str, tmp_path: Path) -> None:
    folder = Draft(tmp_path).write()
    (folder / file).unlink(missing_ok=True)
    (folder / file).mkdir()
    assert not survives(folder)
