"""The order of the floors: a module imports only what lies below it, within a floor one way only.

Read off the source, so that an import inside a function or under TYPE_CHECKING counts as well.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "persona_probe"

# Bottom to top. A floor imports those before it; those that share a line do not import each other.
FLOORS: list[set[str]] = [
    {"errors"},
    {"artifact"},
    {"figures", "execution"},
    {"hooks"},
    {"model"},
    {"activations"},
    {"sae"},
    {"steering", "diffing"},
    {"evaluation"},
    {"screening", "interpretation", "training", "server"},
    {"organism", "report"},
    {"auditing"},
    {"cli", "inspect_entry"},
]
# Knows only part of what lies below it: tables and plots, never models.
ONLY: dict[str, set[str]] = {
    "figures": {"errors"},
    "report": {"errors", "artifact", "figures"},
}
# Loaded by `persona-probe --help`, so what they import at the top must be light.
LIGHT = {"errors", "artifact", "figures", "cli", "__init__"}
LIGHT_THIRD_PARTY = {"typer", "rich"}
STDLIB = set(sys.stdlib_module_names)

VERBS = set(
    "load_model load_sae train_sae capture diff timeline screen calibrate interpret steer "
    "evaluate finetune realign flag audit serve".split()
)
CATCH_ALL = {"util", "utils", "helper", "helpers", "common", "misc"}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    """`persona_probe/model/pair.py` -> `model.pair`; a package is named by its folder."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(file): file for file in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names that `tree` imports: `a.b` for both `import a.b` and `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.AST) -> set[str]:
    """What `tree` imports of this package, without the package's name before it."""
    start = "persona_probe."
    return {name.removeprefix(start) for name in imported(tree) if name.startswith(start)}


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_of(name: str) -> str:
    """The module that `name`, a module or something in one, comes from."""
    return name if name in MODULES else name.rpartition(".")[0]


def floor_of(module: str) -> str:
    return module.split(".")[0]


def allowed(floor: str) -> set[str]:
    """The floors that `floor` may import."""
    if floor in ONLY:
        return ONLY[floor]
    level = next(i for i, names in enumerate(FLOORS) if floor in names)
    return set[str]().union(*FLOORS[:level])


def wrong_imports(floor: str, names: set[str]) -> set[str]:
    """Those of `names` that a module of `floor` must not import."""
    return {name for name in names if floor_of(name) not in allowed(floor) | {floor}}


def test_every_floor_has_its_place() -> None:
    present = {floor_of(name) for name in MODULES} - {"__init__"}
    known = set[str]().union(*FLOORS)
    assert present <= known, f"give {present - known} a place in FLOORS"
    assert sum(map(len, FLOORS)) == len(known), "a floor has two places"


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__init__"}))
def test_imports_only_go_down(name: str) -> None:
    assert wrong_imports(floor_of(name), ours(parsed(MODULES[name]))) == set()


def test_an_import_that_goes_up_or_across_is_seen() -> None:
    source = "import persona_probe.model.pair\ndef f():\n    from persona_probe.steering import io"
    names = ours(ast.parse(source))
    assert wrong_imports("diffing", names) == {"steering.io"}
    assert wrong_imports("hooks", names) == {"steering.io", "model.pair"}
    assert wrong_imports("cli", names) == set()


def test_within_a_floor_one_direction_only() -> None:
    """No two files import each other, however long the way round: else graphlib names the ring."""
    graph = {
        name: {module_of(other) for other in ours(parsed(file))} - {name}
        for name, file in MODULES.items()
        if name != "__init__"  # its imports are lazy, or for type checkers only
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(graph), "something is imported that is not there"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if floor_of(n) in LIGHT))
def test_what_help_loads_is_light(name: str) -> None:
    body = parsed(MODULES[name]).body
    top = ast.Module([n for n in body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    third_party = {dotted.split(".")[0] for dotted in imported(top)} - STDLIB - {"persona_probe"}
    assert third_party <= (LIGHT_THIRD_PARTY if floor_of(name) == "cli" else set())
    assert {floor_of(dotted) for dotted in ours(top)} <= LIGHT


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_a_file_holds_one_idea(file: Path) -> None:
    assert file.stem not in CATCH_ALL, "name the file by what it holds"
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, "split it"


def test_no_module_at_the_root_is_named_like_a_verb() -> None:
    """Importing it would put the module where the function of that name should be."""
    roots = {entry.stem for entry in PACKAGE.iterdir() if entry.suffix == ".py" or entry.is_dir()}
    assert roots & VERBS == set()
