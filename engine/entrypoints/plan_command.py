"""Arguments of `twinfer plan`; what it does is plan_run.py's."""

from __future__ import annotations

import argparse
from dataclasses import replace

from engine.entrypoints.flags import UsageError, add_flags, engine_flags, human_int
from engine.specs.chips import chips_of_kind

FLAGS = {
    "revision", "hf_token", "download_dir", "dtype", "quantization", "max_model_len", "block_size",
    "gpu_memory_utilization", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", "async_scheduling",
    "tensor_parallel_size", "data_parallel_size",
}  # fmt: skip
"""Of the engine's options those that change what fits; the names and defaults are those of serve."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json, or ORG/NAME on the hub ('' = toy)")
    parser.add_argument(
        "--tpu", metavar="CHIP[:AxB]", help=f"one of {names('tpu')}, and a topology, such as v6e:2x4 or v5p:2x2x1"
    )
    parser.add_argument("--gpu", metavar="CHIP[:N]", help=f"one of {names('gpu')}, and how many, such as h200:4")
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


def names(kind: str) -> str:
    return ", ".join(chip.name for chip in chips_of_kind(kind))


def context_tokens(text: str) -> int:
    try:
        return human_int(text)
    except ValueError:
        raise UsageError(f"--context: {text!r} is not accepted; expected an integer such as 4096, 4k or 4K") from None


def run(args: argparse.Namespace) -> int:
    from engine.entrypoints.plan_run import run as plan_and_print

    return plan_and_print(args)
