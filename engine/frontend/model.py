"""What a front end needs of a model besides the engine core: its folder, tokenizer, template, eos ids and defaults.

`open_model` reads everything once, before or while the core starts. Raises StartupError in one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig, ModelConfig
from engine.core.messages import CoreReady
from engine.errors import ConfigError, InvalidValue
from engine.frontend.chat import ChatTemplate, read_template
from engine.frontend.hub import resolve_model
from engine.frontend.input import InputProcessor, ModelFacts
from engine.frontend.texts import Texts
from engine.frontend.tokenizer import Tokenizer, load_tokenizer
from engine.params import SamplingParams
from engine.specs.checkpoint import read_config
from engine.specs.families import parse_config
from engine.specs.generation import generation_defaults, stop_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    path: Path
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    eos_ids: tuple[int, ...]
    defaults: dict[str, int | float]  # SamplingParams fields that generation_config.json sets

    def default_sampling_params(self) -> SamplingParams:
        """What a request gets that names no parameters at all."""
        params = SamplingParams()
        for name, value in self.defaults.items():
            setattr(params, name, value)
        return params

    def text_side(self, ready: CoreReady) -> tuple[InputProcessor, Texts]:
        """What checks requests, and what only turns text into ids and back."""
        inputs = InputProcessor(ModelFacts.of(ready, self.eos_ids), self.tokenizer, self.template)
        return inputs, Texts(inputs)

    def new_tokenizer(self) -> Tokenizer:
        """One that is nobody else's. Raises InvalidValue."""
        if self.tokenizer is None:
            raise InvalidValue("tokenizer: there is none (skip_tokenizer_init)", param="tokenizer")
        return load_tokenizer(self.tokenizer.source)


def locate_model(config: EngineConfig) -> Path:
    """The folder of the checkpoint, fetched if need be."""
    model = config.model
    if model.trust_remote_code:
        raise ConfigError("--trust-remote-code: refused; twinfer never runs code of a checkpoint. Leave it out")
    return resolve_model(
        model.model, model.revision, model.hf_token, model.download_dir, weights=model.load_format != "dummy"
    )


def open_model(config: EngineConfig, path: Path) -> OpenedModel:
    """Read the front end's side of the model in `path`."""
    model = config.model
    arch = parse_config(read_config(path))
    tokenizer = None if model.skip_tokenizer_init else load_tokenizer(tokenizer_folder(model, path))
    eos = list(stop_ids(path, arch))
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        eos.append(tokenizer.eos_token_id)
    return OpenedModel(
        path=path,
        tokenizer=tokenizer,
        template=None if tokenizer is None else ChatTemplate(tokenizer, read_template(model.chat_template)),
        eos_ids=tuple(dict.fromkeys(i for i in eos if 0 <= i < arch.vocab_size)),
        defaults=sampling_defaults(model, path),
    )


def tokenizer_folder(model: ModelConfig, path: Path) -> Path:
    if model.tokenizer is None:
        return path
    return resolve_model(model.tokenizer, model.tokenizer_revision, model.hf_token, model.download_dir, weights=False)


def sampling_defaults(model: ModelConfig, path: Path) -> dict[str, int | float]:
    """--generation-config: auto = the checkpoint's file, vllm = none, else a folder."""
    if model.generation_config == "vllm":
        return {}
    folder = path if model.generation_config == "auto" else Path(model.generation_config)
    if not folder.is_dir():
        raise ConfigError(f"--generation-config: {model.generation_config!r} is not auto, vllm or a folder")
    return generation_defaults(folder)
