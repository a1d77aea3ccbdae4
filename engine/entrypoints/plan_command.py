"""Arguments of `twinfer plan`, and its two forms: text (plan_text.py) and --json. No framework is imported."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from engine.capacity.plan import Ask, make_plan
from engine.capacity.remedies import remedies
from engine.config import EngineConfig
from engine.entrypoints.flags import UsageError, add_flags, build_engine_config, engine_flags, human_int, read_values
from engine.entrypoints.plan_text import as_dict, as_text
from engine.errors import TwinferError
from engine.specs.checkpoint import read_config
from engine.specs.chips import parse_slice
from engine.specs.families import parse_config

FLAGS = {
    "revision", "hf_token", "download_dir", "dtype", "quantization", "max_model_len", "block_size",
    "gpu_memory_utilization", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", "async_scheduling",
    "tensor_parallel_size", "data_parallel_size",
}  # fmt: skip
"""Of the engine's options those that change what fits; the names and defaults are those of serve."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json, or ORG/NAME on the hub ('' = toy)")
    parser.add_argument(
        "--tpu", metavar="CHIP[:AxB]", help="v5e, v6e, v5p or tpu7x, and a topology: v6e:2x4, v5p:2x2x1"
    )
    parser.add_argument("--gpu", metavar="CHIP[:N]", help="h100, h200, a100-80g or l4, and how many: h200:4")
    parser.add_argument(
        "--context",
        type=context_tokens,
        metavar="N",
        help="tokens of each request for the largest batch and the floors [--max-model-len, or 4096]",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    flags = [flag for flag in engine_flags() if flag.name in FLAGS]
    # without --tensor-parallel-size it is all devices, not 1
    add_flags(parser, [replace(flag, default=None) if flag.group == "parallel" else flag for flag in flags])
    parser.epilog = (
        "Exit status: 0 it fits, 1 it does not, 2 it cannot be planned (an option, or config.json).\n"
        "Without --tensor-parallel-size every layer is split over all devices of the slice (a TPU7x chip has two),\n"
        "divided by --data-parallel-size. Figures are those of data sheets: nothing is measured or compiled."
    )


def context_tokens(text: str) -> int:
    try:
        return human_int(text)
    except ValueError:
        raise UsageError(f"--context: {text!r} is not accepted; expected an integer such as 4096, 4k or 4K") from None


def read_ask(args: argparse.Namespace, config: EngineConfig) -> Ask:
    """Raises UsageError unless one of --tpu and --gpu says on what; ConfigError for one that there is not."""
    if (args.tpu is None) == (args.gpu is None):
        raise UsageError("give one of --tpu (such as v6e:2x4) and --gpu (such as h200)")
    chips = parse_slice("tpu", args.tpu) if args.tpu is not None else parse_slice("gpu", args.gpu)
    return Ask(
        slice=chips,
        config=config,
        ranks=getattr(args, "tensor_parallel_size", None),
        copies=getattr(args, "data_parallel_size", None),
        context=args.context,
    )


def run(args: argparse.Namespace) -> int:
    from engine.frontend.hub import resolve_model  # brings the hub's client, which --help does without

    try:
        values = read_values(args, engine_flags())
        config = build_engine_config(values)
        ask = read_ask(args, config)
        model = config.model
        path = resolve_model(args.model, model.revision, model.hf_token, model.download_dir, weights=False)
        arch = parse_config(read_config(path))
        plan = make_plan(arch, ask)
        changes = [] if plan.fits else remedies(arch, plan)
    except TwinferError as error:
        raise UsageError(str(error)) from error  # 1 says that it does not fit, and nothing else
    if args.json:
        print(json.dumps(as_dict(str(path), plan, changes), indent=2))
    else:
        print(as_text(str(path), plan, changes), end="")
    return 0 if plan.fits else 1
