"""Every shape in a signature of the package is checked while the tests run.

As jaxtyping's own import hook does it, but for the functions and dataclasses alone that speak of shapes:
checking every call of every function would take the tests half as long again, and plain types are pyright's.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

PACKAGE = Path(__file__).parent.parent / "persona_probe"
HERE = ast.parse(f"__import__({__name__!r}, fromlist=['checked']).checked", mode="eval").body

Node = TypeVar("Node", ast.FunctionDef, ast.AsyncFunctionDef)

# an int is welcome where a float is annotated (PEP 484's numeric tower)
_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, made ready at the first call: of the functions that a test imports, most are never called."""
    made: Callable[..., Any] | None = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if made is None:
            made = _strict(function)
        return made(*args, **kwargs)

    return check


def checked(thing: Any) -> Any:
    """A function or dataclass whose shapes are checked."""
    return jaxtyped(thing, typechecker=_when_called)


def check_shapes() -> None:
    """From now on. What was imported before is not checked."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("persona_probe."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin and "from jaxtyping import" in Path(spec.origin).read_text():
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """From the source, and kept nowhere: the byte code beside it is that of the unchecked module."""
        tree = _Checked().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Checked(ast.NodeTransformer):
    """Decorates whatever has a shape in its annotations."""

    def __init__(self) -> None:
        self._shapes: set[str] = set()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.module == "jaxtyping":
            self._shapes |= {name.asname or name.name for name in node.names}
        return node

    def visit_FunctionDef(self, node: Node) -> Node:
        parts = node.args
        every = [*parts.posonlyargs, *parts.args, *parts.kwonlyargs, parts.vararg, parts.kwarg]
        if self._of_shapes(node.returns, *(one.annotation for one in every if one is not None)):
            node.decorator_list.append(HERE)
        self.generic_visit(node)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        fields = [one.annotation for one in node.body if isinstance(one, ast.AnnAssign)]
        if self._of_shapes(*fields) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            node.decorator_list.insert(0, HERE)
        self.generic_visit(node)
        return node

    def _of_shapes(self, *annotations: ast.expr | None) -> bool:
        return any(
            isinstance(part, ast.Name) and part.id in self._shapes
            for annotation in annotations
            if annotation is not None
            for part in ast.walk(annotation)
        )
