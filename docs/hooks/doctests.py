"""Docstrings as the API reference reads them: a doctest in the text becomes a block of code.

Equations are indented in the docstrings, and so are code blocks already.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*?(?=\n\n|\Z)", flags=re.MULTILINE | re.DOTALL)


class Doctests(griffe.Extension):
    """Fences the doctests of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    r"""A docstring with its doctests between fences.

    >>> fenced("Twice.\n\n>>> 2 * 2\n4")
    'Twice.\n\n```pycon\n>>> 2 * 2\n4\n```'
    """
    return DOCTEST.sub(lambda test: f"```pycon\n{test[0]}\n```", docstring)
