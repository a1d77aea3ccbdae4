"""The body of `twinfer plan`: from the arguments to a plan, printed. Needs no framework and opens no device."""

from __future__ import annotations

import argparse
import json

from engine.capacity.plan import Ask, make_plan
from engine.capacity.remedies import remedies
from engine.config import EngineConfig
from engine.entrypoints.flags import UsageError, build_engine_config, engine_flags, read_values
from engine.entrypoints.plan_text import as_dict, as_text
from engine.errors import TwinferError
from engine.frontend.hub import resolve_model
from engine.specs.checkpoint import read_config
from engine.specs.chips import parse_slice
from engine.specs.families import parse_config


def run(args: argparse.Namespace) -> int:
    """The exit status: 0 it fits, 1 it does not. Raises UsageError for whatever keeps it from being known."""
    try:
        config = build_engine_config(read_values(args, engine_flags()))
        ask = read_ask(args, config)
        model = config.model
        path = resolve_model(args.model, model.revision, model.hf_token, model.download_dir, weights=False)
        arch = parse_config(read_config(path))
        plan = make_plan(arch, ask)
        changes = [] if plan.fits else remedies(arch, plan)
    except TwinferError as error:
        raise UsageError(str(error)) from error
    if args.json:
        print(json.dumps(as_dict(str(path), plan, changes), indent=2))
    else:
        print(as_text(str(path), plan, changes), end="")
    return 0 if plan.fits else 1


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
