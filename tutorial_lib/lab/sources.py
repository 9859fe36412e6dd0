"""Source listings: library code in a lesson, read from its source, so that it cannot drift from the code that runs."""

from __future__ import annotations

import ast
import html
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_COLORS = {
    "keyword": "#8f62c7",
    "string": "#278561",
    "comment": "#767676",
    "number": "#b8651a",
    "def": "#3a7fc4",
    "builtin": "#2e7f9e",
}
"""Colours that are readable on light and dark pages. They are fixed, because JupyterLab removes its own theme's
variables from the committed outputs of a notebook that has not been run yet."""


@dataclass(frozen=True, slots=True)
class Source:
    """Source text with the dotted name of the object that it defines."""

    name: str
    text: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    def html(self) -> str:
        """Return the source as HTML with inline colours. Long lines scroll instead of breaking inside words."""
        from pygments.lexers.python import PythonLexer  # type: ignore[import-untyped]

        parts = []
        for token, text in PythonLexer().get_tokens(self.text):
            color = _color(token)
            escaped = html.escape(text)
            parts.append(f'<span style="color:{color}">{escaped}</span>' if color else escaped)
        pre = "line-height:1.35;overflow-x:auto;white-space:pre;word-break:normal"
        return (
            f"<div><small><code>{html.escape(self.name)}</code></small>"
            f'<pre style="{pre}"><code style="white-space:pre">{"".join(parts).rstrip()}</code></pre></div>'
        )

    def __str__(self) -> str:
        return f"# {self.name}\n{self.text}"


def show_source(obj: Any, *, only: str | Sequence[str] | None = None, docstrings: bool = True) -> Source:
    """Return the source of a function, class or module, which a notebook displays as a cell's last expression.

    Args:
        obj: the function, class or module.
        only: names defined in a class or module, shown in this order; a dotted name (``Trainer.save``) reaches
            into a class of a module.
        docstrings: keep docstrings; without them, a short function shows just its code.

    Raises:
        ValueError: ``only`` has an unknown name; the message lists the names that exist.
    """
    name = obj.__name__ if isinstance(obj, ModuleType) else f"{obj.__module__}.{obj.__qualname__}"
    members = [only] if isinstance(only, str) else only
    targets = [obj] if members is None else [_member(obj, name, member) for member in members]
    texts = [textwrap.dedent(inspect.getsource(target)).rstrip() for target in targets]
    if not docstrings:
        texts = [_without_docstrings(text) for text in texts]
    if members is not None and len(members) == 1:
        name = f"{name}.{members[0]}"
    return Source(name, "\n\n".join(texts) + "\n")


def _member(obj: Any, name: str, member: str) -> Callable[..., Any]:
    found = obj
    for part in member.split("."):
        # Get the attribute without binding it: a property or class method wraps the function that has the source.
        found = inspect.getattr_static(found, part, None)
    for inner in ("fget", "__func__", "__wrapped__"):
        found = getattr(found, inner, None) or found
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        names = [key for key, value in vars(obj).items() if callable(value) or isinstance(value, property)]
        raise ValueError(f"{name} defines no function or class {member!r}. It has: {', '.join(names)}.")
    return found


def _without_docstrings(text: str) -> str:
    """Remove the lines of docstrings, and keep every other line as written."""
    lines = text.splitlines()
    drop: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and len(node.body) > 1:
            first = node.body[0]
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_text and isinstance(first.value.value, str):  # type: ignore[attr-defined]
                end = first.end_lineno or first.lineno
                drop |= set(range(first.lineno, end + 1))
                if end < len(lines) and not lines[end].strip():
                    drop.add(end + 1)
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in drop)


def _color(token: Any) -> str | None:
    from pygments.token import (  # type: ignore[import-untyped]
        Comment,
        Keyword,
        Name,
        Number,
        Operator,
        String,
    )  # fmt: skip

    kinds = (
        (Comment, "comment"), (Keyword, "keyword"), (Operator.Word, "keyword"), (String, "string"), (Number, "number"),
        (Name.Function, "def"), (Name.Class, "def"), (Name.Builtin, "builtin"), (Name.Decorator, "keyword"),
    )  # fmt: skip
    for kind, name in kinds:
        if token in kind:
            return _COLORS[name]
    return None
