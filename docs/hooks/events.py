"""What mkdocs calls while it builds the site: pages made from the code, navigation, links.

Made from the code are a page per command (`commands`), the configuration reference
(`configuration`), the API reference, and the files outside `docs/` that pages link to
(`repository`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import configuration
import repository
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, then say what the patterns of the navigation stand for."""
    for path, text in {**commands.pages(), **configuration.pages(), **api_pages()}.items():
        files.append(File.generated(config, path, content=text))
    named = sorted(page.src_uri for page in files.documentation_pages())
    for path, source in repository.files_linked_from(files).items():
        files.append(_copied(config, path, source))
    config.nav = expanded(config.nav, named)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links out of `docs/` to the pages that stand for those files here."""
    return repository.rewritten(markdown, page.file.src_uri)


def _copied(config: MkDocsConfig, path: str, source: Path) -> File:
    """A file of the repository as it is, or as a page that shows it."""
    level = InclusionLevel.NOT_IN_NAV
    if path.endswith(".md"):
        return File.generated(config, path, content=repository.shown(source), inclusion=level)
    return File.generated(config, path, abs_src_path=str(source), inclusion=level)


def api_pages() -> dict[str, str]:
    """A page per module of `src/dpo`, filled by mkdocstrings from docstrings."""
    modules = sorted((repository.ROOT / "src" / "dpo").rglob("*.py"))
    named = [(repository.module_name(m.relative_to(repository.ROOT)), m) for m in modules]
    found = {
        repository.api_page(name): f"# `{name}`\n\n::: {name}\n"
        for name, file in named
        if file.stem not in ("__init__", "__main__") or _says_something(file)
    }
    lines = [
        f"- [`{name}`]({repository.api_page(name).removeprefix('api/')}): {_first_sentence(file)}"
        for name, file in named
        if repository.api_page(name) in found
    ]
    head = "# API\n\nEvery module, with what its docstring says. Begin with `dpo.core.losses`.\n\n"
    return {"api/index.md": head + "\n".join(lines) + "\n", **found}


def _says_something(package: Path) -> bool:
    return package.stat().st_size > 0


def _first_sentence(module: Path) -> str:
    """The beginning of a module's docstring, up to its first blank line."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """The navigation with its patterns replaced by pages that it does not name.

    `folder/*` are the pages of a folder, `folder/**` those below it too, a section a folder, and
    `*` all that fit nowhere else.

    >>> expanded(["a.md", "b/*", {"More": ["*"]}], ["a.md", "b/x.md", "b/y.md", "c.md"])
    ['a.md', 'b/x.md', 'b/y.md', {'More': ['c.md']}]
    >>> expanded(["api/**"], ["api/core/x.md", "api/y.md"])
    ['api/y.md', {'core': ['api/core/x.md']}]
    """
    named = set(_entries(nav))
    patterns = {entry for entry in named if entry.endswith(("/*", "/**"))}
    unnamed = [page for page in pages if page not in named]

    def replaced(entries: list[Any]) -> Iterator[Any]:
        for entry in entries:
            if isinstance(entry, dict):
                for title, inner in entry.items():
                    yield {title: list(replaced(inner)) if isinstance(inner, list) else inner}
            elif entry == "*":
                yield from (p for p in unnamed if not any(_fits(p, q) for q in patterns))
            elif entry in patterns:
                folder = entry.rstrip("*").rstrip("/")
                yield from _tree([page for page in unnamed if _fits(page, entry)], folder)
            else:
                yield entry

    return list(replaced(nav))


def _fits(page: str, pattern: str) -> bool:
    folder = page.rpartition("/")[0]
    if pattern.endswith("/**"):
        return f"{folder}/".startswith(pattern.removesuffix("**"))
    return folder == pattern.removesuffix("/*")


def _tree(pages: list[str], folder: str) -> list[Any]:
    """The pages of a folder, then its folders as sections."""
    inside: dict[str, list[str]] = {}
    for page in pages:
        name, separator, _ = page.removeprefix(f"{folder}/").partition("/")
        inside.setdefault(name if separator else "", []).append(page)
    here = inside.pop("", [])
    return [*here, *({name: _tree(below, f"{folder}/{name}")} for name, below in inside.items())]


def _entries(nav: Any) -> Iterator[str]:
    """Every page and pattern that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for inner in nav.values() if isinstance(nav, dict) else nav:
            yield from _entries(inner)
