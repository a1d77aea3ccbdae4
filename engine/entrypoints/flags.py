"""Command-line flags from the config dataclasses: one flag a field, grouped by subject, and the same names from YAML.

`add_flags` adds them to a parser, `read_values` merges command line over YAML over defaults, `build` makes the configs.
Imports nothing heavy: `--help` must answer at once. Flag names are the field names with dashes, which are vLLM's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from engine.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, ScheduleConfig
from engine.entrypoints.flag_texts import ALIASES, ANY_CASE, AUTO_NUMBERS, CHOICES, HELP, HUMAN_NUMBERS, UNSUPPORTED
from engine.entrypoints.settings import ServerSettings
from engine.errors import StartupError

PARTS = {"model", "cache", "schedule", "parallel"}  # fields of EngineConfig that are dataclasses themselves
NOT_FLAGS = {"max_body_bytes", "head_timeout", "body_timeout"}
SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}

C = TypeVar("C")


class UsageError(StartupError):
    """The command line cannot be used as given; exit status 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One field as a flag. `kind` is int, float, str, bool or list (of str)."""

    name: str
    group: str
    kind: type
    default: Any

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def from_text(self, text: str) -> Any:
        """A command-line word as a value. Raises UsageError."""
        if self.kind is str or self.kind is list:
            return self.check_choice(text)
        if text == "auto" and self.name in AUTO_NUMBERS:
            return AUTO_NUMBERS[self.name]
        try:
            if self.kind is int:
                return human_int(text) if self.name in HUMAN_NUMBERS else int(text)
            return float(text)
        except ValueError:
            noun = "an integer" if self.kind is int else "a number"
            if self.name in HUMAN_NUMBERS:
                noun += " such as 4096, 4k (4000) or 4K (4096)" + (" or auto" if self.name in AUTO_NUMBERS else "")
            raise UsageError(f"{self.option}: {text!r} is not accepted; expected {noun}") from None

    def from_yaml(self, value: Any) -> Any:
        """A YAML value as a value. Raises UsageError."""
        if self.kind is list:
            items = value if isinstance(value, list) else [value]
            if all(isinstance(item, str) for item in items):
                return items
        elif self.kind is bool:
            if isinstance(value, bool):
                return value
        elif isinstance(value, str):
            return self.from_text(value)
        elif type(value) is int and self.kind in (int, float):
            return self.kind(value)
        elif type(value) is float and self.kind is float:
            return value
        noun = {bool: "true or false", list: "a list of strings", str: "a string", int: "an integer"}
        expected = noun.get(self.kind, "a number")
        raise UsageError(f"{self.name}: {value!r} is not accepted in the config file; expected {expected}")

    def check_choice(self, text: str) -> str:
        choices = CHOICES.get(self.name)
        if self.name in ANY_CASE:
            text = next((known for known in choices or () if known.upper() == text.upper()), text)
        if choices and text not in choices:
            raise UsageError(
                f"{self.option}: {text!r} is not accepted; one of {', '.join(choices)}{nearest(text, choices)}"
            )
        return text


def human_int(text: str) -> int:
    """4096, 4k = 4000, 4K = 4096, 1.5G. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG])", text)
    return int(float(match[1]) * SUFFIXES[match[2]]) if match else int(text)


def nearest(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def flags_of(config: type, group: str) -> list[Flag]:
    """The fields of a config dataclass that are flags."""
    hints = get_type_hints(config)
    found = []
    for field in fields(config):
        if (config is EngineConfig and field.name in PARTS) or field.name in NOT_FLAGS:
            continue
        hint = str(hints[field.name])
        kinds = {"bool": bool, "int": int, "float": float, "tuple": list}
        kind = next((k for word, k in kinds.items() if word in hint), str)
        found.append(Flag(name=field.name, group=group, kind=kind, default=field.default))
    return found


def engine_flags() -> list[Flag]:
    return [
        *flags_of(ModelConfig, "model"),
        *flags_of(CacheConfig, "cache"),
        *flags_of(ScheduleConfig, "schedule"),
        *flags_of(ParallelConfig, "parallel"),
        *flags_of(EngineConfig, "engine"),
    ]


def server_flags() -> list[Flag]:
    return flags_of(ServerSettings, "server")


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit status 2; unknown options name the nearest known one."""

    def __init__(self, *, prog: str, description: str, add_help: bool = True) -> None:
        super().__init__(
            prog=prog,
            description=description,
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def format_usage(self) -> str:
        return self._short_usage() + "\n"

    def format_help(self) -> str:
        self.usage = self._short_usage().removeprefix("usage: ")  # not a wall of every option
        return super().format_help()

    def _short_usage(self) -> str:
        words = [
            f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar)
            for action in self._positionals._group_actions
        ]
        return " ".join(["usage:", self.prog, *words, "[options]"])

    def help_about(self, word: str) -> str:
        """The options of a group called `word`, or those that have it in their names. Raises UsageError."""
        word = word.removeprefix("--").replace("_", "-").lower()
        formatter = self._get_formatter()
        found = False
        for group in self._action_groups:
            actions = [
                action
                for action in group._group_actions
                if group.title == word or any(word in option for option in action.option_strings)
            ]
            if actions:
                found = True
                formatter.start_section(group.title)
                formatter.add_arguments(actions)
                formatter.end_section()
        if not found:
            groups = [str(group.title) for group in self._action_groups]
            known = [*groups, *(option.lstrip("-") for option in self._option_string_actions)]
            raise UsageError(
                f"--help={word}: no such option or group{nearest(word, known)}; groups: {', '.join(groups)}"
            )
        return formatter.format_help()

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse everything. `--some_flag` and `--flag=true|false` are accepted as vLLM accepts them."""
        for word in argv:
            if word.startswith("--help="):
                print(self.help_about(word.partition("=")[2]), end="")
                raise SystemExit(0)
        args, rest = self.parse_known_args([self._normal(word) for word in argv])
        for word in rest:
            if word.startswith("-"):
                name = word.split("=")[0]
                remedy = UNSUPPORTED.get(name.removeprefix("--").removeprefix("no-"))
                if remedy is not None:
                    raise UsageError(f"{name}: not supported; {remedy}")
                raise UsageError(f"unknown option {name}{nearest(name, list(self._option_string_actions))}")
            raise UsageError(f"unexpected argument {word!r}")
        return args

    def _normal(self, word: str) -> str:
        if not word.startswith("--"):
            return word
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        action = self._option_string_actions.get(name)
        if equals and action is not None and action.nargs == 0:
            if value.lower() not in ("true", "false"):
                raise UsageError(f"{name}: {value!r} is not accepted; expected true or false")
            return name if value.lower() == "true" else "--no-" + name.removeprefix("--")
        return name + equals + value


def add_flags(parser: argparse.ArgumentParser, flags: Sequence[Flag]) -> None:
    """Every flag, in a help group of its subject. Only options that are given appear in the result."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags:
        group = groups.get(flag.group)
        if group is None:
            group = groups[flag.group] = parser.add_argument_group(flag.group)
        options = [flag.option, *ALIASES.get(flag.name, ())]
        text = HELP[flag.name].replace("%", "%%")
        if flag.default is not None and flag.default != () and flag.default != "":
            text += f" [{str(flag.default).lower() if flag.kind is bool else flag.default}]"
        if flag.kind is bool:
            group.add_argument(
                *options, dest=flag.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        choices = CHOICES.get(flag.name)
        metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(flag.kind, "TEXT")
        group.add_argument(
            *options,
            dest=flag.name,
            type=flag.from_text,
            nargs="+" if flag.kind is list else None,
            action="extend" if flag.kind is list else "store",
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=text,
        )


def read_yaml(path: str, flags: Sequence[Flag]) -> dict[str, Any]:
    """The values of a config file: a mapping with the flags' names, dashes or underscores. Raises UsageError."""
    import yaml  # only where a file is given

    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"--config: cannot read {path!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config: {path!r} is not YAML: {reason}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--config: {path!r} must hold a mapping of option names to values")
    by_name = {flag.name: flag for flag in flags}
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in by_name:
            known = [flag.option[2:] for flag in flags]
            raise UsageError(f"--config: {path!r} has an unknown option {key!r}{nearest(str(key), known)}")
        if value is not None:
            values[name] = by_name[name].from_yaml(value)
    return values


def read_values(args: argparse.Namespace, flags: Sequence[Flag]) -> dict[str, Any]:
    """Command line over YAML; what neither gives is absent."""
    names = {flag.name for flag in flags}
    config = getattr(args, "config", None)
    values = read_yaml(config, flags) if config is not None else {}
    values |= {name: value for name, value in vars(args).items() if name in names}
    if getattr(args, "model_positional", None) is not None:
        values["model"] = args.model_positional
    return values


def build(config: type[C], values: Mapping[str, Any]) -> C:
    """A config dataclass from the values that belong to it; lists become tuples."""
    names = {field.name for field in fields(config)}  # type: ignore[arg-type]
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names})


def build_engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """Raises UsageError for what is refused by name."""
    if values.get("trust_remote_code"):
        raise UsageError("--trust-remote-code: refused; twinfer never runs code of a checkpoint. Leave it out")
    own = {flag.name: values[flag.name] for flag in flags_of(EngineConfig, "engine") if flag.name in values}
    return EngineConfig(
        model=build(ModelConfig, values),
        cache=build(CacheConfig, values),
        schedule=build(ScheduleConfig, values),
        parallel=build(ParallelConfig, values),
        **own,
    )
