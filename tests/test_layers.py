"""The house rules that a program can check: layers, cycles, forbidden imports, sizes, names, unsafe calls.

Everything is read with `ast`, imports inside functions included. An exception is a line in one of the tables here, with
its reason; an entry that no longer applies fails too, so the tables cannot rot.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "backends", "jax_models", "torch_models", "pallas_kernels", "cuda_kernels")
FRAMEWORKS = {"jax", "jaxlib", "flax", "torch", "torch_xla", "triton"}

# Layers of engine/, low to high; a module imports its own line and the lines above it.
# `request` reads the array types of `step`: data in one direction only, both are leaves without policy.
LAYERS = (
    {"env", "config", "params", "errors"},
    {"specs"},
    {"step"},
    {"request"},
    {"runner", "opened"},
    {"plan_rules", "buckets"},
    {"resolve", "features", "metrics"},
    {"memory"},
    {"capacity"},
    {"kv"},
    {"scheduler"},
    {"executor"},
    {"core"},
    {"parsers"},
    {"frontend"},
    {"entrypoints"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Rooms that need the standard library and numpy alone.
BARE = ("engine/specs", "engine/kv", "engine/scheduler", "engine/params.py", "engine/request.py", "engine/step.py",
        "engine/errors.py", "engine/runner.py", "engine/config.py")  # fmt: skip

# What a package outside engine/ may import of this repository.
MAY_IMPORT = {
    "backends/fake": ("engine", "backends.fake"),
    "backends/jax": ("engine", "backends.jax", "jax_models", "pallas_kernels"),
    "backends/torch": ("engine", "backends.torch", "torch_models", "cuda_kernels"),
    "jax_models": ("engine.specs", "jax_models", "pallas_kernels"),
    "torch_models": ("engine.specs", "torch_models", "cuda_kernels"),
    "pallas_kernels": ("pallas_kernels",),
    "cuda_kernels": ("cuda_kernels",),
}
MAY_IMPORT_ALSO = {"backends/torch/xla.py": ("pallas_kernels",)}
FRAMEWORKS_ALSO = {"backends/torch/xla.py": {"jax"}}  # lowers the kernels that it may import
FRAMEWORKS_OF = {
    "backends/fake": set(),
    "backends/jax": {"jax", "jaxlib", "flax"},
    "backends/torch": {"torch", "torch_xla", "triton"},
    "jax_models": {"jax", "flax"},
    "torch_models": {"torch"},
    "pallas_kernels": {"jax", "jaxlib"},
    "cuda_kernels": {"torch", "triton"},
}

MAX_LINES, MAX_KERNEL_LINES, MAX_FUNCTION, MAX_KERNEL_BODY = 500, 800, 60, 200
MAX_COMPLEXITY, MAX_PARAMETERS, MAX_IMPORTS = 15, 7, 15
KERNELS = ("pallas_kernels", "cuda_kernels")
# Routes and the CLI may have more parameters and imports; kernel wrappers and attention functions more parameters.
ROUTES = ("engine/entrypoints/",)

# (rule, where) -> why
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("imports", "backends/jax/runner.py"): "joins the rooms of backends/jax to the contract",
    ("imports", "backends/torch/runner.py"): "joins the rooms of backends/torch to the contract",
    ("imports", "backends/torch/gpu.py"): "joins graphs, fused model and kernels to the steps of a GPU",
    ("imports", "backends/jax/programs.py"): "makes programs of what tables, sampler, forward pass and caches define",
    ("imports", "backends/torch/xla_steps.py"): "joins batch, tables, sampler and kernels to padded programs",
    ("imports", "pallas_kernels/dispatch.py"): "the one place that knows every kernel of the jax side",
    ("imports", "cuda_kernels/compile_jobs.py"): "a table of all files with kernels of triton",
    ("imports", "backends/torch/graphs.py"): "joins the fused model, its kernels and their capture",
    ("imports", "backends/torch/memory.py"): "counts the bytes of every room of backends/torch, with their own sizes",
    ("imports", "engine/core/start.py"): "the composition root: knows every room once, in the order of a start",
}

VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper", "mixin", "mixins"}
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {
    ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("torch", "load"), ("np", "load"),
    ("numpy", "load"), ("os", "system"), ("socket", "recv_pyobj"),
}  # fmt: skip
UNSAFE_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "allow_pickle", "trust_remote_code_load"}
# Dynamic imports: (prefix of the names, why). Their targets stand as constants in the file and count as imports of it,
# but for those of load_runner, which is how the engine reaches a backend without knowing it.
DYNAMIC_IMPORTS = {
    "engine/runner.py": ("", "load_runner: the backends by name"),
    "engine/entrypoints/cli.py": ("engine.entrypoints.", "one command's module is loaded, so that --help is quick"),
    "twinfer.py": ("", "the public names are loaded when they are asked for"),
}


@cache
def sources() -> tuple[str, ...]:
    """Every Python file of the product, by its path from the root."""
    files = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")] + [ROOT / "twinfer.py"]
    return tuple(sorted(str(p.relative_to(ROOT)) for p in files if p.exists()))


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), path)


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def modules() -> dict[str, str]:
    return {module_name(path): path for path in sources()}


@cache
def imports(path: str) -> tuple[tuple[str, int], ...]:
    """(module, line) of every import at any depth; `from package import module` gives the module."""
    found: list[tuple[str, int]] = []
    package = module_name(path).split(".") if path.endswith("__init__.py") else module_name(path).split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((inner if inner in modules() else base, node.lineno))
    return tuple(found + dynamic_imports(path))


def dynamic_imports(path: str) -> list[tuple[str, int]]:
    """Modules that a file may import by name: its string constants that name one."""
    if path not in DYNAMIC_IMPORTS or path == "engine/runner.py":
        return []
    prefix, _ = DYNAMIC_IMPORTS[path]
    constants = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [(prefix + n.value, n.lineno) for n in constants if prefix + n.value in modules()]


def room(module: str) -> str | None:
    """The layer of an engine module: engine.kv.manager -> kv."""
    parts = module.split(".")
    return parts[1] if parts[0] == "engine" and len(parts) > 1 else None


def place(path: str) -> str:
    """The key of MAY_IMPORT that owns a file outside engine/."""
    parts = path.split("/")
    if parts[0] != "backends":
        return parts[0]
    return "/".join(parts[:2]) if len(parts) > 2 else "backends/fake"


def excused(rule: str, where: str, problem: str, problems: list[str]) -> None:
    if (rule, where) in EXCEPTIONS:
        USED.add((rule, where))
    else:
        problems.append(problem)


USED: set[tuple[str, str]] = set()


def test_there_is_something_to_check() -> None:
    """Every package is seen: a typo in a path must not turn the checks off."""
    for package in PACKAGES:
        assert any(path.startswith(package + "/") for path in sources()), package
    assert "engine/step.py" in sources() and "twinfer.py" in sources()


def test_every_engine_room_has_a_layer() -> None:
    rooms = {room(module) for module in modules()} - {None}
    assert rooms <= set(LEVEL), f"no layer for {sorted(rooms - set(LEVEL))}"


def test_layers() -> None:
    problems = []
    for path in sources():
        own = room(module_name(path))
        if own is None:
            continue
        for name, line in imports(path):
            other = room(name)
            if other is not None and LEVEL[other] > LEVEL[own]:
                excused("layer", path, f"{path}:{line}: {own} imports {name}, which is higher", problems)
    assert not problems, "\n".join(problems)


def test_no_cycles() -> None:
    """No import cycle at any depth, functions included."""
    graph = {
        module: {name for name, _ in imports(path) if name in modules() and name != module}
        for module, path in modules().items()
    }
    state: dict[str, int] = {}
    trail: list[str] = []
    cycles: list[str] = []

    def visit(module: str) -> None:
        state[module] = 1
        trail.append(module)
        for name in sorted(graph[module]):
            if state.get(name) == 1:
                cycles.append(" -> ".join([*trail[trail.index(name) :], name]))
            elif name not in state:
                visit(name)
        trail.pop()
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            visit(module)
    assert not cycles, "\n".join(cycles)


def test_engine_has_no_framework_and_bare_rooms_have_numpy_alone() -> None:
    problems = []
    for path in sources():
        if not path.startswith("engine/"):
            continue
        bare = path.startswith(BARE)
        for name, line in imports(path):
            top = name.split(".")[0]
            if top in FRAMEWORKS or top in PACKAGES[1:]:
                problems.append(f"{path}:{line}: engine imports {name}")
            elif bare and top not in sys.stdlib_module_names and top not in ("numpy", "engine"):
                excused(
                    "bare", path, f"{path}:{line}: needs the standard library and numpy alone, imports {name}", problems
                )
    assert not problems, "\n".join(problems)


def test_packages_import_what_they_may() -> None:
    problems = []
    for path in sources():
        if path.startswith("engine/") or path == "twinfer.py" or path == "backends/__init__.py":
            continue
        where = place(path)
        allowed = MAY_IMPORT[where] + MAY_IMPORT_ALSO.get(path, ())
        for name, line in imports(path):
            top = name.split(".")[0]
            if top in PACKAGES and not name.startswith(allowed):
                problems.append(f"{path}:{line}: {where} imports {name}")
            if top in FRAMEWORKS - FRAMEWORKS_OF[where] - FRAMEWORKS_ALSO.get(path, set()):
                problems.append(f"{path}:{line}: {where} imports {name}")
    assert not problems, "\n".join(problems)


def functions(path: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its dotted name."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}{child.name}", child
                yield from walk(child, f"{name}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{name}{child.name}.")
            else:
                yield from walk(child, name)

    yield from walk(tree(path), "")


BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.match_case)


def complexity(function: ast.AST) -> int:
    """1 + branches (McCabe), a boolean operator counts once for each further operand; inner functions are their own."""
    total = 1
    stack = list(ast.iter_child_nodes(function))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        total += isinstance(node, BRANCHES)
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            total += len(node.ifs)
        stack += ast.iter_child_nodes(node)
    return total


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its decorators."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return len([a for a in every if a.arg not in ("self", "cls")])


def test_sizes_of_files() -> None:
    problems = []
    tests = [str(p.relative_to(ROOT)) for folder in ("tests", "bench") for p in (ROOT / folder).rglob("*.py")]
    for path in tests:
        lines = len((ROOT / path).read_text().splitlines())
        if lines > MAX_LINES:
            excused("lines", path, f"{path}: {lines} lines, at most {MAX_LINES}", problems)
        if set(Path(path).stem.split("_")) & VAGUE_NAMES:
            problems.append(f"{path}: its name says nothing")
    for path in sources():
        lines = len((ROOT / path).read_text().splitlines())
        most = MAX_KERNEL_LINES if path.startswith(KERNELS) else MAX_LINES
        if lines > most:
            excused("lines", path, f"{path}: {lines} lines, at most {most}", problems)
        top = {name for name, _ in imports(path) if name != "__future__"} - {name for name, _ in dynamic_imports(path)}
        if len(top) > MAX_IMPORTS and not path.startswith(ROUTES):
            excused("imports", path, f"{path}: {len(top)} imports, at most {MAX_IMPORTS}", problems)
    assert not problems, "\n".join(problems)


def test_sizes_of_functions() -> None:
    problems = []
    for path in sources():
        kernel = path.startswith(KERNELS)
        many = kernel or path.startswith(ROUTES) or path.endswith("/attention.py")
        for name, function in functions(path):
            where = f"{path}:{name}"
            most = MAX_KERNEL_BODY if kernel else MAX_FUNCTION
            if length(function) > most:
                excused("function", where, f"{where}: {length(function)} lines, at most {most}", problems)
            if (found := complexity(function)) > MAX_COMPLEXITY:
                excused("complexity", where, f"{where}: complexity {found}, at most {MAX_COMPLEXITY}", problems)
            if (found := parameters(function)) > MAX_PARAMETERS and not many:
                excused("parameters", where, f"{where}: {found} parameters, at most {MAX_PARAMETERS}", problems)
    assert not problems, "\n".join(problems)


def test_headers_and_names() -> None:
    """Each file opens by saying what it owns; no drawer for odds and ends."""
    problems = []
    for path in sources():
        parts = path.removesuffix(".py").split("/")
        words = {word for part in parts for word in part.split("_")}
        if words & VAGUE_NAMES:
            problems.append(f"{path}: {sorted(words & VAGUE_NAMES)} says nothing")
        body = tree(path).body
        if body and not ast.get_docstring(tree(path)):
            problems.append(f"{path}: no header")
    assert not problems, "\n".join(problems)


def test_everything_is_annotated() -> None:
    problems = []
    for path in sources():
        for name, function in functions(path):
            arguments = function.args
            every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
            every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
            bare = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
            kernel_body = path.startswith(KERNELS) and (is_kernel(function) or "_kernel." in name)
            if bare and not kernel_body:
                excused("annotation", f"{path}:{name}", f"{path}:{name}: {', '.join(bare)} not annotated", problems)
            if function.returns is None and not kernel_body and not isinstance_of_property_setter(function):
                excused("annotation", f"{path}:{name}", f"{path}:{name}: no return annotation", problems)
    assert not problems, "\n".join(problems)


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton and Pallas bodies take references, which have no useful type."""
    return function.name.endswith("_kernel") or any("jit" in ast.unparse(d) for d in function.decorator_list)


def isinstance_of_property_setter(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(d).endswith(".setter") for d in function.decorator_list)


def test_no_unsafe_deserialisation() -> None:
    """R4, the static half: no pickle and its kin, no eval, exec, yaml.load; dynamic imports only where listed."""
    problems = []
    for path in sources():
        for name, line in imports(path):
            if name.split(".")[0] in UNSAFE_MODULES:
                problems.append(f"{path}:{line}: imports {name}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                problems += [f"{path}:{node.lineno}: {what}" for what in unsafe_call(node, path)]
            if isinstance(node, ast.Attribute) and node.attr in UNSAFE_ATTRIBUTES:
                problems.append(f"{path}:{node.lineno}: {node.attr}")
    assert not problems, "\n".join(problems)


def unsafe_call(node: ast.Call, path: str) -> list[str]:
    function = node.func
    found = []
    if isinstance(function, ast.Name) and function.id in UNSAFE_CALLS:
        found.append(f"{function.id}()")
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        pair = (function.value.id, function.attr)
        if pair in UNSAFE_METHODS:
            found.append(".".join(pair))
    if any(k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
           for k in node.keywords):  # fmt: skip
        found.append("allow_pickle")
    if any(k.arg == "shell" and isinstance(k.value, ast.Constant) and k.value.value for k in node.keywords):
        found.append("shell=True")
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called in ("import_module", "spec_from_file_location") and path not in DYNAMIC_IMPORTS:
        found.append(f"{called}: a dynamic import")
    return found


def test_no_assert_in_the_product() -> None:
    """R8: a check that must hold survives `python -O`."""
    problems = [
        f"{path}:{node.lineno}: assert"
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert)
    ]
    assert not problems, "\n".join(problems)


def test_exceptions_still_apply() -> None:
    """Runs the sized rules again and fails for an exception that nothing needs any more."""
    USED.clear()
    for rule in (test_layers, test_engine_has_no_framework_and_bare_rooms_have_numpy_alone, test_sizes_of_files,
                 test_sizes_of_functions, test_everything_is_annotated):  # fmt: skip
        try:
            rule()
        except AssertionError:
            continue
    stale = [f"{where} ({rule})" for rule, where in EXCEPTIONS if (rule, where) not in USED]
    assert not stale, f"exceptions that nothing needs: {stale}"
