"""Where the runner's weights come from: dummies, safetensors, or an Orbax checkpoint of `twinfer convert`.

load_format "auto" takes Orbax where the folder has our manifest. Orbax is an extra of the package: it is imported only
when it is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backends.jax.split import Split
from backends.jax.weights import load_params
from engine.errors import ConfigError, check
from engine.runner import Progress, RunnerConfig
from engine.specs.checkpoint import stream_params
from engine.specs.manifest import is_orbax
from engine.specs.weights import dummy_params


def load_weights(
    config: RunnerConfig, checkpoint: Path | None, split: Split, progress: Progress | None
) -> dict[str, Any]:
    """The parameters on the device, in the tree that jax_models.decoder.Params describes. Raises CheckpointError."""
    if config.load_format == "dummy":
        return load_params(config.arch, dummy_params(config.arch, config.seed), config.dtype, split)
    check(checkpoint is not None, "load needs a checkpoint unless the weights are dummies")
    folder = Path(str(checkpoint))
    if config.load_format != "orbax" and not (config.load_format == "auto" and is_orbax(folder)):
        return load_params(config.arch, stream_params(folder, config.arch, progress), config.dtype, split)
    try:
        from backends.jax import restore
    except ImportError as error:
        raise ConfigError(f"--load-format: orbax: {error}; install it with pip install 'twinfer[orbax]'") from error
    return restore.load(folder, config.arch, config.dtype, split, progress)
