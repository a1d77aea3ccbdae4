"""InputProcessor: every kind of prompt; every limit that depends on the model, named in the error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import InvalidValue, NeverFits, RequestError, Unsupported
from engine.frontend.chat import ChatTemplate
from engine.frontend.input import InputProcessor, ModelFacts, domain_of
from engine.frontend.tokenizer import Tokenizer
from engine.params import SamplingParams

LENGTH = 32
FACTS = ModelFacts(max_model_len=LENGTH, vocab_size=4096, max_logprobs=20, eos_ids=(0, 2))


@pytest.fixture
def inputs(tokenizers: dict[str, Tokenizer]) -> InputProcessor:
    tokenizer = tokenizers["byte_level"]
    return InputProcessor(FACTS, tokenizer, ChatTemplate(tokenizer))


def test_every_kind_of_prompt(inputs: InputProcessor) -> None:
    ids = inputs.encode("The fox")
    for prompt in (
        "The fox",
        {"prompt": "The fox"},
        ids,
        tuple(ids),
        np.array(ids),
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "prompt": "shown"},
    ):
        request = inputs.prepare(prompt, SamplingParams())  # type: ignore[arg-type]
        assert request.prompt_token_ids == ids
    assert request.prompt == "shown"
    message = request.message(7)
    assert (message.key, np.frombuffer(message.prompt, "<i4").tolist()) == (7, ids)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        (5, "prompt"),
        (None, "prompt"),
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids"),
        ([1.0], "prompt_token_ids"),
        ([-1], "prompt_token_ids"),
        ([4096], "prompt_token_ids"),
        ([2**70], "prompt_token_ids"),
        ({"prompt": "x", "multi_modal_data": {}}, "prompt"),
        ({"prompt": "x", "cache_salt": 5}, "cache_salt"),
        ({"prompt": "x", "cache_salt": "x" * 129}, "cache_salt"),
        ("\ud800", "prompt"),
        ([1] * LENGTH, "prompt"),
    ],
)
def test_bad_prompts_name_the_field(inputs: InputProcessor, prompt: Any, param: str) -> None:
    with pytest.raises(RequestError) as raised:
        inputs.prepare(prompt, SamplingParams())
    assert raised.value.param == param


@pytest.mark.parametrize(
    "given",
    [
        {"stop_token_ids": [4096]},
        {"allowed_token_ids": [5, 4096]},
        {"logit_bias": {4096: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logprobs": 21},
        {"logprobs": -1},
        {"prompt_logprobs": 21},
        {"bad_words": ["zqxj" * 30]},
        {"truncate_prompt_tokens": LENGTH + 1},
    ],
)
def test_limits_of_the_model_name_the_field(inputs: InputProcessor, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as raised:
        inputs.prepare([5, 6], SamplingParams(**given))
    assert raised.value.param == next(iter(given))


def test_max_tokens_fits_the_model(inputs: InputProcessor) -> None:
    def limits(**given: Any) -> tuple[int | None, int]:
        params = inputs.prepare([5] * 30, SamplingParams(**given)).params
        return params.max_tokens, params.min_tokens

    assert limits(max_tokens=None) == (2, 0)
    assert limits(max_tokens=1) == (1, 0)
    assert limits(max_tokens=100, min_tokens=50) == (2, 2)
    with pytest.raises(NeverFits):
        inputs.prepare([5] * 32, SamplingParams())


def test_truncation_keeps_the_end(inputs: InputProcessor) -> None:
    ids = list(range(5, 105))

    def kept(keep: int, **given: Any) -> list[int]:
        return inputs.prepare(ids, SamplingParams(truncate_prompt_tokens=keep, **given)).prompt_token_ids

    assert kept(3) == ids[-3:]
    assert kept(-1, max_tokens=10) == ids[-22:]
    assert kept(-1, max_tokens=None) == ids[-31:]
    with pytest.raises(InvalidValue, match="no tokens"):
        kept(0)


def test_stop_ids(inputs: InputProcessor) -> None:
    request = inputs.prepare([5], SamplingParams(stop_token_ids=[7, 2]))
    assert (request.stop_ids, request.eos_ids) == ([0, 2, 7], [0, 2])
    request = inputs.prepare([5], SamplingParams(stop_token_ids=[7], ignore_eos=True))
    assert (request.stop_ids, request.eos_ids) == ([7], [])


def test_bad_words_with_and_without_a_space(inputs: InputProcessor, tokenizers: dict[str, Tokenizer]) -> None:
    encode = tokenizers["byte_level"].encode
    found = inputs.prepare([5], SamplingParams(bad_words=["mean", " mean"])).bad_word_ids
    assert found == [encode("mean", False), encode(" mean", False)]


def test_without_a_tokenizer_only_ids() -> None:
    inputs = InputProcessor(FACTS, None, None)
    request = inputs.prepare([5, 6], SamplingParams())
    assert not request.params.detokenize
    for prompt, params in (
        ("text", SamplingParams()),
        ([5], SamplingParams(stop=["x"])),
        ([5], SamplingParams(bad_words=["x"])),
    ):
        with pytest.raises(Unsupported, match="skip_tokenizer_init"):
            inputs.prepare(prompt, params)  # type: ignore[arg-type]
    with pytest.raises(Unsupported):
        inputs.prepare_chat([{"role": "user", "content": "x"}], SamplingParams())


def test_cache_domains_are_framed() -> None:
    pairs = [("", "a"), ("a", ""), ("a", "b"), ("ab", ""), ("", "ab"), ("b", "a")]
    assert len({domain_of(*pair) for pair in pairs}) == len(pairs)
    assert domain_of("", None) == domain_of("", "") == b""
    assert domain_of("t", None) == domain_of("t", "")


def test_the_users_params_are_not_changed(inputs: InputProcessor) -> None:
    params = SamplingParams(max_tokens=None)
    inputs.prepare([5], params)
    assert params == SamplingParams(max_tokens=None)
