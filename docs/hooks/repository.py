"""Files outside `docs/` that its pages link to: where they stand in the site.

A module of `src/dpo` is its page of the API reference. Any other file is copied into `repository/`:
Markdown and images as they are, texts as a page that shows them. A folder is its README, or a list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(
    r"(?P<text>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)
FENCE = re.compile(r"(^ *```.*?^ *```\s*?$)", flags=re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".csv": "text", ".typ": "text"}
"""Files that are shown as a page."""
SHOWN_CHARACTERS = 200_000


def files_linked_from(files: Files) -> dict[str, Path]:
    """Files of the repository that pages link to, and those that these link to, by place here."""
    waiting = [(p.src_uri, p.content_string) for p in files.documentation_pages()]
    found: dict[str, Path] = {}
    while waiting:
        page, text = waiting.pop()
        for target in _targets(text, page):
            place, source = place_of(target), ROOT / target
            if place in found or place.startswith("api/") or _in_docs(target):
                continue
            if (source / "README.md").is_file():
                source /= "README.md"
            if source.exists():
                found[place] = source
                if source.suffix == ".md":
                    waiting.append((place, shown(source)))
    return found


def rewritten(text: str, page: str) -> str:
    """A page's text with its links out of `docs/` changed to places in the site."""

    def link(match: re.Match[str]) -> str:
        target = _target(match["path"], page)
        if target is None or (_in_docs(target) and _in_docs(source_of(page))):
            return match[0]
        anchor = match["anchor"] or _api_anchor(match["text"], target)
        place = os.path.relpath(place_of(target), PurePosixPath(page).parent)
        return f"{match['text']}({place}{anchor})"

    parts = FENCE.split(text)
    return "".join(part if FENCE.match(part) else LINK.sub(link, part) for part in parts)


def place_of(target: str) -> str:
    """Where a file of the repository, by its path in it, stands in the site.

    >>> place_of("src/dpo/core/losses.py"), place_of("docs/faq.md")
    ('api/core/losses.md', 'faq.md')
    >>> place_of("studies/exact.yaml"), place_of("report/report.pdf")
    ('repository/studies/exact.yaml.md', 'repository/report/report.pdf')
    >>> place_of("studies"), place_of("benchmarks")
    ('repository/studies/index.md', 'repository/benchmarks/README.md')
    """
    path = PurePosixPath(target)
    if target.startswith("src/dpo") and path.suffix in (".py", ""):
        return api_page(module_name(path))
    if _in_docs(target):
        return str(path.relative_to("docs"))
    if (ROOT / target).is_dir():
        readme = (ROOT / target / "README.md").is_file()
        return f"repository/{target}/{'README' if readme else 'index'}.md"
    return f"repository/{target}" + (".md" if path.suffix in LANGUAGES else "")


def source_of(page: str) -> str:
    """The path in the repository of a page of the site."""
    inside = page.startswith("repository/")
    return page.removeprefix("repository/") if inside else f"docs/{page}"


def module_name(path: PurePosixPath | Path) -> str:
    """`dpo.theory` of `src/dpo/theory/__init__.py`."""
    parts = path.with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def api_page(module: str) -> str:
    """The page of a module; that of a package is named for it, beside its folder."""
    return f"api/{'/'.join(module.split('.')[1:]) or 'dpo'}.md"


def shown(source: Path) -> str:
    """A Markdown file as it is; a folder or another text as a page, cut where it is too long."""
    if source.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in source.iterdir() if p.name[0] not in "._")
        return f"# {source.name}\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return text
    cut = f"\n\nThe first {SHOWN_CHARACTERS:,} characters." if len(text) > SHOWN_CHARACTERS else ""
    fence = f"````{LANGUAGES[source.suffix]}\n{text[:SHOWN_CHARACTERS].rstrip()}\n````"
    return f"# {source.name}\n\n{fence}{cut}\n"


def _in_docs(target: str) -> bool:
    return target.startswith("docs/")


def _targets(text: str, page: str) -> Iterator[str]:
    """The paths in the repository that a page's links lead to."""
    for part in FENCE.split(text):
        if not FENCE.match(part):
            found = (_target(match["path"], page) for match in LINK.finditer(part))
            yield from (target for target in found if target is not None)


def _target(link: str, page: str) -> str | None:
    """The path in the repository that a page's link leads to; none for an address."""
    if ":" in link or link.startswith("/"):
        return None
    target = os.path.normpath(PurePosixPath(source_of(page)).parent / link)
    return None if target.startswith("..") else target


def _api_anchor(text: str, target: str) -> str:
    """The anchor of the function that a link's text names, if it leads to a module."""
    named = re.fullmatch(r"\[`([A-Za-z_][\w.]*)`\]", text)
    if named is None or not place_of(target).startswith("api/") or not target.endswith(".py"):
        return ""
    module = module_name(PurePosixPath(target))
    return "" if named[1] == module else f"#{module}.{named[1]}"
