"""`twinfer COMMAND ...`: picks the command and turns every expected error into one line.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted. A command's module is imported only when it is asked
for, so that `--help` needs neither a framework nor a web server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from engine.entrypoints.flags import Parser, UsageError, nearest
from engine.errors import TwinferError

# command -> (module, what it does); a module has add_arguments(parser) and run(args) -> exit status
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("serve_command", "Serve a model over HTTP with OpenAI's routes."),
    "chat": ("chat_command", "Talk to a running server."),
    "complete": ("complete_command", "Continue text with a running server."),
    "inspect": (
        "inspect_checkpoint_command",
        "Show a checkpoint's layers, parameters, shards, cache groups and bytes.",
    ),
    "plan": ("plan_command", "Say whether a model fits a TPU slice or GPUs, with what room and which step floor."),
    "convert": ("convert_checkpoint_command", "Write a checkpoint in a form that loads straight into sharded arrays."),
    "compile": (
        "compile_ahead_command",
        "Compile a model's programs ahead, for serve --executables; no weights needed.",
    ),
    "bench latency": ("bench_latency_command", "Time of one batch, offline."),
    "bench throughput": ("bench_throughput_command", "Tokens per second of many prompts, offline."),
    "bench serve": ("bench_serve_command", "Latencies and throughput of a running server under load."),
    "collect-env": ("collect_env_command", "What a bug report needs to know about this machine; no secrets."),
}


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: twinfer COMMAND [options]",
            "",
            "One LLM serving engine, two backends: JAX and PyTorch.",
            "",
            "commands:",
            *lines,
            "",
            "`twinfer COMMAND --help` lists the options of a command, `--help=WORD` those about a word; --version.",
        ]
    )


def pick(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(command, its arguments). Raises UsageError naming the nearest command."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, list(argv[words:])
    if argv[0] == "bench":
        raise UsageError("bench: expected latency, throughput or serve")
    raise UsageError(f"unknown command {argv[0]!r}{nearest(argv[0], list(COMMANDS))}")


def dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help") or list(argv) in (["bench"], ["bench", "--help"]):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from engine.entrypoints.version import version

        print(version())
        return 0
    name, rest = pick(argv)
    module_name, text = COMMANDS[name]
    module = import_module(f"engine.entrypoints.{module_name}")
    parser = Parser(prog=f"twinfer {name}", description=text)
    module.add_arguments(parser)
    run: Callable[..., int | None] = module.run
    try:
        args = parser.parse_strictly(rest)
    except SystemExit:  # argparse's way out of --help
        return 0
    return run(args) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Prints errors as `twinfer: error: ...` on stderr."""
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return complain(error, 2)
    except TwinferError as error:
        return complain(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `twinfer ... | head`
        return 1
    except OSError as error:
        return complain(error, 1)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        kind = type(error).__name__
        return complain(RuntimeError(f"{kind}: {error} (a bug; `python -X dev -m twinfer ...` shows where)"), 1)


def complain(error: Exception, status: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"twinfer: error: {text}", file=sys.stderr)
    return status
