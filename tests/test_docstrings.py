"""Docstrings: first line, order of sections, and the sections that public objects must have."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import statefeed as sf

ORDER = ("Args", "Attributes", "Returns", "Yields", "Gradient", "Raises", "Warns", "Cost", "Example")
SECTION = re.compile(rf"^ *({'|'.join(ORDER)}):(?: |$)", re.MULTILINE)
PACKAGE = Path(sf.__file__).parent

# Results of functions: plain dataclasses, whose example is that of the function.
RESULTS = {"Agreement", "Alignment", "Explanation", "Lags", "SwapReport"}


def sections(doc: str) -> list[str]:
    return SECTION.findall(doc)


def problems(doc: str | None) -> list[str]:
    """What is wrong with a docstring, whatever it documents."""
    if not doc:
        return ["no docstring"]
    lines = inspect.cleandoc(doc).splitlines()
    found = []
    if not lines[0].endswith((".", ":")):
        found.append(f"the first line is not a sentence: {lines[0]!r}")
    if len(lines) > 1 and lines[1]:
        found.append("no blank line after the first line")
    names = sections(doc)
    if names != sorted(names, key=ORDER.index) or len(set(names)) < len(names):
        found.append(f"the sections are {', '.join(names)}; the order is {', '.join(ORDER)}")
    return found


def documented() -> Iterator[tuple[str, str]]:
    """Every docstring of the package, by file and name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Module)) and (doc := ast.get_docstring(node)):
                yield f"{path.relative_to(PACKAGE.parent)}: {getattr(node, 'name', 'module')}", doc


def own_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class of the package defines."""
    for name, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function) and (not name.startswith("_") or name == "__call__"):
            yield name, value if isinstance(value, property) else inspect.unwrap(function)


def inherited_doc(kind: type, name: str) -> str | None:
    """The docstring of a method, or of the method that it overrides."""
    return next((doc for base in kind.__mro__ if (doc := getattr(vars(base).get(name), "__doc__", None))), None)


def required(name: str, value: Any) -> set[str]:
    """The sections that a public class or function of ``statefeed`` must have."""
    if name in RESULTS:
        return {"Attributes"}
    needed = {"Example"}
    if name != "FeedbackLayer":  # a base class without a constructor of its own
        needed |= {"Args", "Cost", "Raises"} - ({"Args", "Raises"} if name == "restore" else set())
    if inspect.isfunction(value):
        needed |= {"Args", "Returns"}
    if not inspect.isclass(value) or issubclass(value, nn.Module) or value in (sf.Feedback, sf.Monitor):
        needed.add("Gradient")
    return needed


@pytest.mark.parametrize("name", sf.__all__)
def test_every_public_object_has_its_sections(name: str) -> None:
    value = getattr(sf, name)
    assert not problems(value.__doc__), name
    missing = required(name, value) - set(sections(value.__doc__))
    assert not missing, f"{name} has no section {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", [name for name in sf.__all__ if inspect.isclass(getattr(sf, name))])
def test_every_public_method_has_a_docstring_with_its_arguments(name: str) -> None:
    kind = getattr(sf, name)
    for method, value in own_methods(kind):
        doc = inherited_doc(kind, method)
        where = f"{name}.{method}"
        assert doc, where
        assert not problems(doc), where
        if isinstance(value, property):
            continue
        signature = inspect.signature(value)
        if len(signature.parameters) > 1 and method not in vars(nn.Module):
            assert "Args" in sections(doc), where
            if signature.return_annotation not in (None, "None"):
                assert "Returns" in sections(doc), where


def test_every_docstring_of_the_package_has_its_sections_in_order() -> None:
    found = [f"{where}: {problem}" for where, doc in documented() for problem in problems(doc)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "doc",
    [
        "",
        "no sentence",
        "A fact.\nMore without a blank line.",
        "A fact.\n\nReturns:\n    x.\n\nArgs:\n    x: y.",
        "A fact.\n\nCost: none.\n\nGradient: none.",
        "A fact.\n\nExample:\n    >>> 1\n    1\n\nRaises:\n    ValueError: never.",
        "A fact.\n\nCost: none.\n\nCost: none.",
    ],
)
def test_a_planted_error_is_found(doc: str) -> None:
    assert problems(doc)


def test_a_layer_without_a_gradient_section_is_found() -> None:
    class Layer(nn.Module):
        """A layer.

        Args:
            x: input.
        """

    assert {"Gradient", "Example", "Cost"} <= required("Layer", Layer) - set(sections(str(Layer.__doc__)))
