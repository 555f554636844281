"""The pages beside the report say what its sources say: numbers, names, checks, functions, results.

A page is parsed into its `###` sections, a chapter's Typst source into its numbered statements; the
numbers follow the rule of `report/template.typ`: one counter for all environments of a chapter.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo.theory import checks

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "theory").glob("[0-9]*.md"))
README = ROOT / "docs" / "theory" / "README.md"
CHAPTERS = sorted((ROOT / "report" / "chapters").glob("*.typ"))
RESULTS = json.loads((ROOT / "report" / "results" / "theory.json").read_text(encoding="utf-8"))
TEMPLATE = (ROOT / "report" / "template.typ").read_text(encoding="utf-8")
KINDS = dict(re.findall(r'^#let (\w+) = named\("([\w ]+)"', TEMPLATE, flags=re.MULTILINE))
"""From the name of an environment to the word that the PDF prints."""

STATEMENT = re.compile(
    rf"^#(?P<kind>{'|'.join(KINDS)})(?:\((?P<options>[^\n]*)\))?\[\n(?P<body>.*?)^\]",
    flags=re.MULTILINE | re.DOTALL,
)
PROOF = re.compile(r"^#proof(?:\([^\n]*\))?\[(?:[^\n]*\]$|.*?^\])", flags=re.MULTILINE | re.DOTALL)
EQUATION = re.compile(r"\$ <eq:[\w-]+>")
CHECK_LINK = re.compile(r"\[`([A-Z]\d\d-[\w-]+)`\]\(([^)]+)\)")
CODE_LINK = re.compile(r"\[`([\w.]+)`\]\(([^)]+\.py)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@dataclass(frozen=True)
class Statement:
    """A theorem, example, ... as the PDF prints it."""

    title: str
    checks: list[str]
    equations: list[str]


def chapter_of(page: Path) -> tuple[int, str]:
    """The number of a page's chapter, by the order in which the report includes it; its source."""
    file = ROOT / "report" / "chapters" / f"{page.stem}.typ"
    return 1 + CHAPTERS.index(file), file.read_text(encoding="utf-8")


def printed(name: str) -> str:
    """A statement's name without its citations, its symbols as plain letters."""
    name = re.sub(r" @\w+", "", name)
    return re.sub(r"\$(\w+)\$", lambda symbol: {"beta": "β"}.get(symbol[1], symbol[1]), name)


def equations_of(page: Path) -> dict[int, str]:
    """The numbers of a chapter's equations, by position: only labelled ones are counted."""
    chapter, source = chapter_of(page)
    found = enumerate(EQUATION.finditer(source), start=1)
    return {match.start(): f"{chapter}.{number}" for number, match in found}


def statements_of(page: Path) -> list[Statement]:
    """The numbered statements of a page's chapter, in order."""
    chapter, source = chapter_of(page)
    equations = equations_of(page)
    found = []
    for number, match in enumerate(STATEMENT.finditer(source), start=1):
        options = match["options"] or ""
        name = re.search(r"name: \[(.*)\]", options)
        noted = re.findall(r"checks: \(([^)]*)\)", options)
        noted += re.findall(r"#checked\(([^)]*)\)", match["body"])
        found.append(
            Statement(
                title=f"{KINDS[match['kind']]} {chapter}.{number}"
                + (f" ({printed(name[1])})" if name else ""),
                checks=re.findall(r'"([A-Z]\d\d)"', " ".join(noted)),
                equations=[
                    equation
                    for place, equation in equations.items()
                    if match.start() < place < match.end()
                ],
            )
        )
    return found


def sections_of(page: Path) -> dict[str, str]:
    """The text under each `###` heading, up to the next heading."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^### ([^\n]*)\n(.*?)(?=^##|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return dict(found)


def tags(text: str) -> list[str]:
    """The numbers of the equations in a page's text."""
    return re.findall(r"\\tag\{([\d.]+)\}", text)


def ids(text: str) -> list[str]:
    """The checks that a page's text links."""
    return [check for check, _ in CHECK_LINK.findall(text)]


def numbers(found: list[str]) -> list[str]:
    """`P03` of `P03-bt-is-k2`."""
    return [check.split("-")[0] for check in found]


def defined(file: Path) -> set[str]:
    """Functions and classes of a module, and `Class.method`."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def test_the_source_is_read_as_it_is_printed() -> None:
    first = statements_of(PAGES[0])
    assert first[0] == Statement("Proposition 1.1 (marginals)", ["P01", "P02", "P04"], [])
    assert first[1] == Statement("Corollary 1.2 (Bradley-Terry)", ["P03"], ["1.2"])
    assert 'counter(figure.where(kind: "theorem")).update(0)' in TEMPLATE


@each_page
def test_a_page_has_every_statement_of_its_chapter_in_order(page: Path) -> None:
    numbered = re.compile(rf"({'|'.join(KINDS.values())}) \d")
    titles = [title for title in sections_of(page) if numbered.match(title)]
    assert titles == [statement.title for statement in statements_of(page)]


@each_page
def test_a_statement_has_its_checks_and_its_numbered_equations(page: Path) -> None:
    sections = sections_of(page)
    for statement in statements_of(page):
        text = sections[statement.title]
        assert numbers(ids(text)) == statement.checks, statement.title
        assert tags(text) == statement.equations, statement.title


@each_page
def test_numbered_equations_are_those_of_the_chapter_outside_proofs(page: Path) -> None:
    _, source = chapter_of(page)
    proofs = [match.span() for match in PROOF.finditer(source)]
    outside = [
        equation
        for place, equation in equations_of(page).items()
        if not any(start < place < end for start, end in proofs)
    ]
    assert tags(page.read_text(encoding="utf-8")) == outside
    for title, text in sections_of(page).items():
        if number := re.match(r"Equation \(([\d.]+)\)", title):
            assert tags(text) == [number[1]]


@each_page
def test_a_page_has_the_checks_of_its_chapter_and_the_command_that_runs_them(page: Path) -> None:
    text, (_, source) = page.read_text(encoding="utf-8"), chapter_of(page)
    noted = re.findall(r"check(?:s: |ed)\(([^)]*)\)", source)
    assert set(numbers(ids(text))) == set(re.findall(r'"([A-Z]\d\d)"', " ".join(noted)))
    command = re.search(r"```bash\ndpo theory (.*)\n```", text)
    if not ids(text):  # the experiments
        assert command is None
        return
    assert command is not None
    assert {check.id for check in checks(command[1].split())} == set(ids(text))
    for title, section in sections_of(page).items():
        if ids(section):
            assert re.findall(r"`dpo theory ([^`]*)`", section) == [
                " ".join(numbers(ids(section)))
            ], title


def test_every_check_is_on_one_page_and_every_id_is_a_check() -> None:
    found = Counter(name for page in PAGES for name in ids(page.read_text(encoding="utf-8")))
    assert found == Counter(RESULTS["checks"].keys())
    assert set(found) == {check.id for check in checks()}
    for page in [*PAGES, README]:
        short = set(re.findall(r"\b[A-Z]\d\d\b", page.read_text(encoding="utf-8")))
        assert short <= set(numbers(list(found))), page.name


@each_page
def test_a_check_is_in_the_file_that_its_link_leads_to(page: Path) -> None:
    modules = {check.id: check.chapter for check in checks()}
    for name, target in CHECK_LINK.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve()
        assert file == ROOT / "src" / "dpo" / "theory" / f"{modules[name]}.py", name
        assert f'"{name}"' in file.read_text(encoding="utf-8")


@each_page
def test_a_function_is_in_the_file_that_its_link_leads_to(page: Path) -> None:
    links = CODE_LINK.findall(page.read_text(encoding="utf-8"))
    assert links
    for name, target in links:
        assert name in defined((page.parent / target).resolve()), f"{name} in {target}"


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_statements_that_pages_refer_to_exist() -> None:
    known = {s.title.split(" (")[0] for page in PAGES for s in statements_of(page)}
    for page in [*PAGES, README]:
        pattern = rf"\b((?:{'|'.join(KINDS.values())}) \d\.\d+)"
        assert set(re.findall(pattern, page.read_text(encoding="utf-8"))) <= known, page.name


@each_page
def test_an_example_prints_what_the_page_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == text.count("```python") == 1
    for code, result in examples:
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(code, page.name, "exec"), {})
        assert output.getvalue() == result


def test_the_map_has_every_page_with_its_checks() -> None:
    rows = re.findall(
        r"^\| \[[^\]]*\]\(([^)]*)\) \|[^|]*\| ([^|]*) \|$",
        README.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert [name for name, _ in rows] == [page.name for page in PAGES]
    for (_, ranges), page in zip(rows, PAGES, strict=True):
        listed = []
        for letter, low, high in re.findall(r"([A-Z])(\d\d) to [A-Z](\d\d)", ranges):
            listed += [f"{letter}{number:02d}" for number in range(int(low), int(high) + 1)]
        assert sorted(listed) == sorted(numbers(ids(page.read_text(encoding="utf-8"))))


def test_commands_of_the_map_name_checks_that_exist() -> None:
    commands = re.findall(
        r"^dpo theory([^#\n]*)", README.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(commands) >= 4
    for words in commands:
        assert checks(words.split() or None)


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_formulas_are_whole_and_use_nothing_that_github_refuses(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    formulas = re.findall(r"^```math\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(formulas) == text.count("```math")
    for formula in formulas:
        assert not re.search(r"\\(operatorname|mbox|phantom)|\n\n", formula), formula
        depths = [0]
        for brace in re.findall(r"(?<!\\)[{}]", formula):
            depths.append(depths[-1] + (1 if brace == "{" else -1))
        assert min(depths) == depths[-1] == 0, formula
        assert re.findall(r"\\begin\{(\w+)", formula) == re.findall(r"\\end\{(\w+)", formula)
