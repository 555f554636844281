"""The tutorials are run as they stand, in order, on a small random model called gpt2-medium.

Of a page the `bash` and the `python` blocks are run. What `dpo` is told besides, to be done in
seconds, is in `SMALL`. A `text` block is what the block before it prints; a comment
`# exits with N` is the exit code that a command must have.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from train.small_runs import FRESH, dpo, scratch

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
NEEDS = {
    "your-data": [],
    "sft-then-dpo": [],
    "rankings": ["sft-then-dpo"],
    "report-page": ["sft-then-dpo"],
    "dpo-against-ppo": ["sft-then-dpo"],
    "from-trl": ["sft-then-dpo"],
}
"""The tutorials, each with those whose runs it goes on with."""

_SHORT = ["evaluation.num_samples=2", "evaluation.max_new_tokens=8", "data.max_length=64"]
_ROUNDS = [
    *("sampling.max_new_tokens=8", "evaluation.num_samples=0", "evaluation.max_rows=4"),
    *("evaluation.max_new_tokens=8", "prompts_per_round=8", "batch.size=8", "rounds=1"),
]
SMALL = {
    "data synthetic": ["--rows", "64"],
    "sft": _SHORT,
    "train": [*_SHORT, "evaluation.kl_prompts=2", "evaluation.max_rows=8"],
    "reward": ["evaluation.max_rows=16"],
    "ppo": [*_ROUNDS, "epochs_per_round=1"],
    "online": [*_ROUNDS, "samples_per_prompt=2"],
    "evaluate": [
        *("temperatures=[1.0]", "max_prompts=6", "max_new_tokens=8", "sentence_model=offline"),
    ],
}
"""Words that are added to a command, so that it takes seconds."""


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of every fenced block of a tutorial."""
    text = (TUTORIALS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[str]:
    """The commands of a shell block; a here-document belongs to its command."""
    lines = iter(block.splitlines())
    for line in lines:
        command = line
        while command.endswith("\\"):
            command = command.removesuffix("\\") + next(lines)
        if here := re.search(r"<<'(\w+)'", line):
            for inner in lines:
                command += f"\n{inner}"
                if inner == here[1]:
                    break
        if command.strip():
            yield command


def run_command(command: str) -> str:
    """Run a shell command here, `dpo` in this process; what it printed."""
    if not command.startswith("dpo "):
        done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, check=True)
        return done.stdout
    words = shlex.split(command, comments=True)[1:]
    short = next((words_ for name, words_ in SMALL.items() if _begins(words, name)), [])
    said = dpo(*words, *short)
    expected = re.search(r"# exits with (\d+)", command)
    assert said.code == (int(expected[1]) if expected else 0), f"{command}\n{said.all}"
    return said.all


def _begins(words: list[str], name: str) -> bool:
    return words[: len(name.split())] == name.split()


@cache
def workplace() -> Path:
    """The folder that all tutorials work in, with the model."""
    from dpo.data.synthetic import preferences
    from dpo.models.fresh import fresh_gpt2, train_tokenizer

    folder = scratch() / "tutorials"
    rows = preferences(num_rows=64, seed=0)
    tokenizer = train_tokenizer(
        [text for row in rows for text in (row.prompt, row.chosen)], vocab_size=FRESH["vocab_size"]
    )
    sizes = {name: FRESH[name] for name in ("width", "layers", "heads", "positions")}
    model = fresh_gpt2(**sizes, tokenizer=tokenizer, seed=0)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "gpt2-medium")
    return folder


@cache
def followed(page: str) -> None:
    """Run a tutorial, after those that it goes on with."""
    for needed in NEEDS[page]:
        followed(needed)
    printed = ""
    for language, text in blocks(page):
        if language == "bash":
            printed = " ".join(" ".join(map(run_command, commands(text))).split())
        elif language == "python" and page != "from-trl":  # there it is TRL's, read below
            exec(compile(text, f"{page}.md", "exec"), {})
        elif language == "text" and not text.startswith("dpo "):
            assert " ".join(text.split()) in printed


@pytest.mark.parametrize("page", NEEDS)
def test_a_tutorial_runs_as_it_stands(page, monkeypatch):
    monkeypatch.chdir(workplace())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    followed(page)


def test_the_sections_that_a_tutorial_reads_are_those_of_the_page(monkeypatch):
    test_a_tutorial_runs_as_it_stands("report-page", monkeypatch)
    page = (workplace() / "runs" / "dpo" / "index.html").read_text(encoding="utf-8")
    read = re.findall(r"^## (.*)$", (TUTORIALS / "report-page.md").read_text(), re.MULTILINE)
    sections = [title for title in read if "side by side" not in title and "page of" not in title]
    assert len(sections) == 6
    assert set(sections) - {"Verdict"} <= set(re.findall(r"<h2>([^<]+)", page))


def test_every_tutorial_is_run_or_is_the_list_of_them():
    assert {file.stem for file in TUTORIALS.glob("*.md")} == {*NEEDS, "index"}


def test_every_row_that_the_data_tutorial_shows_is_read_and_every_shape_is_shown(tmp_path):
    from dpo.data.shapes import SHAPES
    from dpo.data.sources import load_rows

    lines = next(text for language, text in blocks("your-data") if language == "json").splitlines()
    shapes = set()
    for number, line in enumerate(lines):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(line + "\n", encoding="utf-8")
        loaded = load_rows(file)
        shapes.add(loaded.shape.split(",")[0])
        assert not loaded.ignored_columns
        assert json.loads(line)
    alike = {"prompt/completion"}  # named in the table beside prompt/response
    assert shapes == {shape.name for shape in SHAPES} - alike
