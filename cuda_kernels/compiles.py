"""How many kernels this process has compiled or loaded: the counter behind "nothing compiles after ready"."""

from __future__ import annotations

from typing import Any

from triton import knobs

_names: list[str] = []


def count() -> int:
    """Variants so far. Counting triton's begins with the first call of `begin`."""
    return len(_names)


def names() -> tuple[str, ...]:
    """The kernels of the variants so far, in order, with their constants."""
    return tuple(_names)


def add(name: str) -> None:
    """A kernel that triton has no part in."""
    _names.append(name)


def begin() -> None:
    """Count triton's from here on, besides whoever listens already. Called once a runner; again changes nothing."""
    if getattr(knobs.runtime.jit_post_compile_hook, "counts", False):
        return
    former = knobs.runtime.jit_post_compile_hook

    def hook(*args: Any, **options: Any) -> Any:
        _names.append(str(options.get("repr", "?")))
        return None if former is None else former(*args, **options)

    hook.counts = True  # type: ignore[attr-defined]
    knobs.runtime.jit_post_compile_hook = hook
