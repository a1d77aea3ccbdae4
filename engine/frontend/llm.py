"""LLM: the offline face. Prompts in, RequestOutputs in the same order out; arguments and results shaped as vLLM's.

The core runs in this process unless told otherwise. Every prompt is checked before the first one runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from engine.core.client import CoreClient, OnProgress, ProcessClient
from engine.core.in_process import InProcessClient
from engine.frontend.batch import (
    BatchRunner,
    Params,
    Prompts,
    final_only,
    list_params,
    list_priorities,
    list_prompts,
)
from engine.frontend.chat import RenderOptions
from engine.frontend.model import locate_model, open_model
from engine.frontend.options import engine_config
from engine.frontend.output import OutputProcessor
from engine.frontend.progress import StartupBar
from engine.frontend.results import RequestOutput
from engine.params import SamplingParams


class LLM:
    """A model that answers lists of prompts.

    model: a folder, a hub name ORG/NAME, or "" for the model that ships with the package. Other keywords are the fields
    of EngineConfig's parts, by vLLM's names. Raises StartupError.
    """

    def __init__(
        self,
        model: str | Path = "",
        tokenizer: str | Path | None = None,
        *,
        own_process: bool = False,
        client: CoreClient | None = None,
        show_progress: bool = True,
        **options: Any,
    ) -> None:
        """own_process: run the core in a process of its own. show_progress: a bar while weights load."""
        chosen = {"model": str(model), "tokenizer": None if tokenizer is None else str(tokenizer), **options}
        self.config = engine_config(chosen)
        path = locate_model(self.config)
        self.model = open_model(self.config, path)
        self._client: CoreClient = client or (ProcessClient() if own_process else InProcessClient())
        with StartupBar(show_progress) as bar:
            on_progress: OnProgress = bar.update
            self.ready = self._client.start(self.config, path, on_progress)
        self.inputs, _ = self.model.text_side(self.ready)
        self._batches = BatchRunner(self._client, OutputProcessor(self.model.tokenizer))

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt. Raises InvalidValue, NeverFits, Unsupported before anything runs."""
        listed = list_prompts(prompts)
        params = list_params(sampling_params, self.get_default_sampling_params, len(listed))
        ranks = list_priorities(priority, len(listed))
        prepared = [
            self.inputs.prepare(prompt, final_only(one), priority=rank)
            for prompt, one, rank in zip(listed, params, ranks, strict=True)
        ]
        return self._batches.run(prepared, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **options: Unpack[RenderOptions],
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them. Raises as `generate`."""
        chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        params = list_params(sampling_params, self.get_default_sampling_params, len(chats))
        prepared = [
            self.inputs.prepare_chat(
                chat,  # type: ignore[arg-type]  # a list of conversations by now
                final_only(one),
                **options,
            )
            for chat, one in zip(chats, params, strict=True)
        ]
        return self._batches.run(prepared, use_tqdm)

    def get_tokenizer(self) -> Any:
        """A transformers tokenizer of your own: changing it does not disturb the engine."""
        return self.model.new_tokenizer().hf

    def get_default_sampling_params(self) -> SamplingParams:
        """From the model's generation_config.json."""
        return self.model.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; running requests are not disturbed."""
        return self._batches.reset_prefix_cache()

    def shutdown(self) -> None:
        """Stop the core and free its memory. May be called twice."""
        self._client.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
