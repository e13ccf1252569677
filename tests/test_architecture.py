"""The shape of the tree: who may import whom, and what no file may hold (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("drpo", "reward_models", "eval", "launch")  # each may import itself and those before it
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_ARGUMENTS = 8

# The layers of drpo, lowest first: a module imports from its own layer and from lower ones.
# A folder stands for its modules, except for those that are named.
LAYERS = (
    (
        "contents",
        "tensors",
        "config",
        "config_help",
        "config_kinds",
        "daemon_threads",
        "decimals",
        "yaml_words",
        "versions",
        "precision",
        "random_streams",
        "schedules",
        "microbatches",
        "run.lock",
        "run.stopped",
        "kl",
    ),
    (
        "jsonl",
        "losses",
        "preference_losses",
        "advantages",
        "rewards",
        "data",
        "rollout.trajectory",
        "rollout.own_rollouts",
        "rollout.prefix_search",
        "rollout.resets",
        "reward_functions",
        "servers",
    ),
    ("models", "engine", "fully_sharded", "run.metrics", "optim"),
    ("run",),
    ("rollout",),
    ("trainers", "object_inputs"),
    ("api",),
)

PURE = (
    "drpo.tensors",
    "drpo.decimals",
    "drpo.random_streams",
    "drpo.schedules",
    "drpo.microbatches",
    "drpo.losses",
    "drpo.preference_losses",
    "drpo.advantages",
    "drpo.kl",
    "drpo.rewards",
    "drpo.rollout.trajectory",
    "eval.statistics.intervals",
    "eval.statistics.win_rate",
    "eval.statistics.position_bias",
    "eval.statistics.length_control",
    "eval.statistics.agreement",
    "eval.statistics.bradley_terry",
    "eval.statistics.seeds",
    "eval.statistics.across_runs",
    "eval.statistics.frontier",
    "eval.statistics.sample_size",
    "eval.statistics.pair_accuracy",
    "eval.statistics.calibration",
    "eval.statistics.length_bias",
    "eval.statistics.best_of_n",
    "eval.statistics.score_summary",
    "launch.planning.sharding",
    "launch.planning.sizes",
    "reward_models.ensembles",
)
INFRASTRUCTURE = ("transformers", "accelerate", "deepspeed", "peft", "datasets", "omegaconf", "drpo.config")

# Tables that are filled after import. Each entry is a function of its key alone, so nothing depends on history.
CACHES = {
    "drpo.models.answers._ANSWERS",
    "launch.planning.models._ANSWERS",
    "drpo.run.lock._HELD",  # what belongs to the process itself
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = {module_name(path): path for path in FILES}
every_module = pytest.mark.parametrize("module", MODULES)


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes_of(node: ast.AST, type_checking: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if type_checking or not is_type_checking(child):
            yield child
            yield from nodes_of(child, type_checking)


def imports_of(module: str, type_checking: bool = True) -> set[str]:
    """Full names of what a module imports, inside functions too; `from drpo import data` is drpo.data."""
    names = set()
    for node in nodes_of(tree_of(module), type_checking):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import; write it in full"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in members}
    return names


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(module: str) -> int:
    """Index in LAYERS of the longest entry that covers a module of drpo."""
    entries = [(len(e), layer) for layer, es in enumerate(LAYERS) for e in es if inside(module, f"drpo.{e}")]
    assert entries, f"{module} is in no layer; say in LAYERS where it belongs"
    return max(entries)[1]


# --- imports ----------------------------------------------------------------------------------------------


def test_the_tree_is_found():
    assert {"drpo.tensors", "drpo.trainers.online", "reward_models.model", "launch.drpo"} <= MODULES.keys()


@every_module
def test_packages_import_downwards(module):
    own = PACKAGES.index(module.partition(".")[0])
    upwards = [
        name for name in imports_of(module) for package in PACKAGES[own + 1 :] if inside(name, package)
    ]
    assert not upwards, f"{module} imports {upwards}; the order is {' <- '.join(PACKAGES)}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("drpo.")])
def test_layers_of_drpo_import_downwards(module):
    if MODULES[module].name == "__init__.py":
        own = [name for name in imports_of(module) if inside(name, "drpo") and name != "drpo.contents"]
        assert not own, "importing a package should import nothing else"
        return
    own = layer_of(module)
    upwards = [name for name in imports_of(module) if inside(name, "drpo") and layer_of(name) > own]
    assert not upwards, f"{module} is in layer {own} ({', '.join(LAYERS[own])}) and imports {upwards}"


@pytest.mark.parametrize("module", [m for m in PURE if m in MODULES])
def test_maths_knows_no_infrastructure(module):
    known = [name for name in imports_of(module) if any(inside(name, i) for i in INFRASTRUCTURE)]
    assert not known


def test_only_the_engine_knows_accelerate_and_deepspeed():
    users = {
        module
        for module in MODULES
        if any(inside(name, i) for name in imports_of(module) for i in ("accelerate", "deepspeed"))
    }
    assert users == {"drpo.engine"}


def test_no_import_cycles():
    graph = {m: [i for i in imports_of(m, type_checking=False) if i in MODULES and i != m] for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@every_module
def test_eval_is_imported_by_its_modules(module):
    """`import eval` would hide the builtin."""
    assert "eval" not in imports_of(module)


# --- files ------------------------------------------------------------------------------------------------


@every_module
def test_a_file_is_named_for_its_idea(module):
    assert not {"utils", "util", "helpers", "common", "misc"} & set(module.split("."))


@every_module
def test_a_file_holds_one_idea(module):
    num_lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{module} has {num_lines} lines"


@every_module
def test_functions_are_short_and_take_few_arguments(module):
    functions = [
        n for n in ast.walk(tree_of(module)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for function in functions:
        text = function.body[0].lineno, function.body[0].end_lineno
        docstring = text[1] - text[0] + 1 if ast.get_docstring(function) else 0
        length = function.end_lineno - function.lineno + 1 - docstring
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        num_arguments = sum(argument.arg not in ("self", "cls") for argument in arguments)
        assert num_arguments <= MAX_ARGUMENTS, f"{function.name} has {num_arguments} arguments"


@every_module
def test_more_than_four_arguments_are_listed(module):
    """In an `Args:` list, or by the name of the function that has the same ones."""
    body = tree_of(module).body
    members = [*body, *(member for node in body if isinstance(node, ast.ClassDef) for member in node.body)]
    for function in members:
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.name.startswith("_"):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        docstring = ast.get_docstring(function) or ""
        if len(names) > 4 and "Arguments and errors are those of" not in docstring:
            listed = docstring.partition("Args:\n")[2]
            missing = [
                name for name in names if not re.search(rf"^[^:]*\b{name}\b[^:]*:", listed, re.MULTILINE)
            ]
            assert not missing, f"{function.name} does not list {', '.join(missing)}"


OF_NO_MODULE = ("tests", "tests/end_to_end", "tests/support")


def test_tests_mirror_the_tree():
    """A folder of tests is that of the modules that it tests."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")}
    lost = [
        f
        for f in folders
        if f.as_posix() not in OF_NO_MODULE and not (ROOT / f.relative_to("tests")).is_dir()
    ]
    assert not lost


# --- code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [m for m in MODULES if not inside(m, "launch")])
def test_library_code_does_not_print(module):
    calls = [n for n in ast.walk(tree_of(module)) if isinstance(n, ast.Call)]
    prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id in ("print", "pprint")]
    assert not prints, f"{module} prints in lines {prints}"


MUTATORS = {
    *("append", "extend", "insert", "remove", "pop", "popitem", "clear", "sort", "reverse"),
    *("add", "discard", "update", "setdefault", "appendleft"),
}


def global_names(tree: ast.Module) -> set[str]:
    targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in tree.body if isinstance(n, ast.AnnAssign)]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def changed_names(function: ast.AST) -> set[str]:
    """Names that a function rebinds with `global`, or whose object it changes by item, attribute or method."""
    names, local = set(), set()
    for node in ast.walk(function):
        match node:
            case ast.Global(names=rebound):
                names |= set(rebound)
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                local.add(name)
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method in MUTATORS:
                names.add(name)
    rebound = {name for n in ast.walk(function) if isinstance(n, ast.Global) for name in n.names}
    return (names - local) | rebound


@every_module
def test_nothing_global_is_changed_after_import(module):
    tree = tree_of(module)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    changed = {name for f in functions for name in changed_names(f)} & global_names(tree)
    assert {f"{module}.{name}" for name in changed} <= CACHES


def test_the_check_for_globals_sees_them():
    tree = ast.parse(
        "A = []\nB = {}\nC = 0\nD = set()\nE = [1]\n"
        "def f(x):\n    A.append(x)\n    B[x] = 1\n    D.add(x)\n    E = []\n    E.append(x)\n"
        "def g():\n    global C\n    C += 1\n"
    )
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert set().union(*map(changed_names, functions)) & global_names(tree) == {"A", "B", "C", "D"}
