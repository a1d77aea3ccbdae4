"""jax_models and torch_models: file by file the same classes, functions and arguments, in the same order."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_layers import sources, tree

# Names that only one twin has, with the reason; the rest must be equal, in order, with equal argument names.
TWINS = ("decoder", "attention", "ffn", "linear", "layers", "recurrent", "towers")
ONE_SIDED: dict[str, str] = {
    "jax_models/linear.py:weight_of": "torch's weights come as what dispatch takes; jax's tree holds arrays alone",
    "jax_models/linear.py:linear_sum": "torch has one device a process, and no ranks yet",
    "torch_models/linear.py:linear_f32": "jax takes it from pallas_kernels.dispatch: on a CPU it is a kernel",
}


def surface(path: str) -> list[tuple[str, tuple[str, ...]]]:
    """Classes and functions of a module in order, methods under their class, each with its argument names."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, arguments_of(node)))
        elif isinstance(node, ast.ClassDef):
            found.append((node.name, ()))
            found += [(f"{node.name}.{m.name}", arguments_of(m)) for m in node.body if isinstance(m, ast.FunctionDef)]
    return [(name, args) for name, args in found if f"{path}:{name}" not in ONE_SIDED]


def arguments_of(function: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(a.arg for a in function.args.posonlyargs + function.args.args + function.args.kwonlyargs)


# Files of the twin folders that are no twin -> why.
UNPAIRED = {
    "torch_models/fused.py": "the twins' own layer in a GPU's fused launches",
    "torch_models/fused_products.py": "its products",
    "torch_models/invariant.py": "the same with one order of sums for every row, by kernels of its own",
    "torch_models/last_layer.py": "what long steps save; jax has no such step yet",
    "torch_models/persistent.py": "a whole decode step of a small model in one GPU launch",
    "jax_models/scanned.py": "a TPU's scan over stacked weights",
    "jax_models/turned.py": "a GPU's one launch for norms of heads, rope and the write",
    "jax_models/fused.py": "the same for a few tokens on a CPU: a layer is one C++ call",
}

SPELLINGS = {"__call__": "forward"}  # flax.nnx calls a module, torch.nn asks for forward


@pytest.mark.parametrize("name", TWINS)
def test_twins(name: str) -> None:
    """jax_models/x.py and torch_models/x.py: the same names in the same order with the same arguments."""
    left, right = f"jax_models/{name}.py", f"torch_models/{name}.py"
    present = [path for path in (left, right) if path in sources()]
    if not present:
        assert name in ("recurrent", "towers"), f"neither {left} nor {right} exists"
        return
    assert present == [left, right], f"{present[0]} has no twin"

    def spelled(path: str) -> list[tuple[str, tuple[str, ...]]]:
        return [(".".join(SPELLINGS.get(p, p) for p in name.split(".")), args) for name, args in surface(path)]

    assert spelled(left) == spelled(right)


def test_twin_folders_hold_nothing_else() -> None:
    for folder in ("jax_models", "torch_models"):
        names = {Path(path).stem for path in sources() if path.startswith(folder + "/")} - {"__init__"}
        names -= {Path(path).stem for path in UNPAIRED if path.startswith(folder + "/")}
        assert names <= set(TWINS), f"{folder}: {sorted(names - set(TWINS))}"
    assert set(UNPAIRED) <= set(sources())


def test_every_exception_is_needed() -> None:
    for entry in ONE_SIDED:
        path, name = entry.split(":")
        assert any(isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name for n in tree(path).body), entry
