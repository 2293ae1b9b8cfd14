"""What is public: the names of each `__all__`, each with a docstring, and nothing else; experiments use no other."""

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import laqjax
from tests.support import MODULES, ROOT


@pytest.mark.parametrize("name", ["laqjax", *MODULES])
def test_public_names_are_listed_and_explained(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"
    tree = ast.parse(Path(str(module.__file__)).read_text())
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [own for own in defined if not own.startswith("_") and own not in module.__all__] == []


def public_uses(tree: ast.AST) -> list[str]:
    """Return the dotted names of the library that a file imports or reads from an imported module."""
    bound: dict[str, str] = {}
    used = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "laqjax":
                    bound[alias.asname or "laqjax"] = alias.name if alias.asname else "laqjax"
                    used.append(alias.name)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "laqjax":
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                used.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts, value = [value.attr, *parts], value.value
            if isinstance(value, ast.Name) and value.id in bound:
                used.append(".".join([bound[value.id], *parts]))
    return used


def private_part(dotted: str) -> str | None:
    """Return the part of a dotted name at which it leaves what is public, or None."""
    value, path = laqjax, "laqjax"
    for part in dotted.split(".")[1:]:
        submodule = f"{path}.{part}"
        if not isinstance(value, ModuleType):
            return None  # attributes of a class or an instance
        if part not in value.__all__ and submodule not in MODULES and not part.startswith("__"):
            return submodule
        value, path = (
            getattr(importlib.import_module(path), part, None) or importlib.import_module(submodule),
            submodule,
        )
    return None


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda path: path.stem)
def test_experiments_use_public_names_only(path: Path) -> None:
    assert [use for use in public_uses(ast.parse(path.read_text())) if private_part(use)] == []


def test_private_names_are_seen() -> None:
    tree = ast.parse(
        "import laqjax\nfrom laqjax._core import round\nfrom laqjax import rules as r\nr.NO_LIMIT\nlaqjax.run\nr.Always"
    )
    assert [use for use in public_uses(tree) if private_part(use)] == ["laqjax._core.round", "laqjax.rules.NO_LIMIT"]
