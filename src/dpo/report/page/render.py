"""A page as one HTML file that loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpo import __version__
from dpo.data.files import page_text
from dpo.report.page.blocks import Page

TEMPLATES = Path(__file__).parents[1] / "templates"


def render(page: Page) -> str:
    """The HTML of a page.

    Everything that is not the template's own is escaped, and its control characters are written
    out. The policy in the head lets no text of a model do anything, should it get through: no
    address is loaded, and only the script with that digest runs.
    """
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("page.html")
        .render(
            page=page,
            style=style,
            script=script,
            policy=content_policy(script),
            version=__version__,
        )
    )


def content_policy(script: str) -> str:
    """The Content-Security-Policy of a page whose only script is this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_written_out,
    )


def _written_out(value: object) -> object:
    """Text that stands in no template, its control characters written out; escaping follows."""
    is_markup = hasattr(value, "__html__")  # marked as safe in the template
    return page_text(value) if isinstance(value, str) and not is_markup else value
