"""docs/evaluation.md says what the code prints, and names files that are there."""

import doctest
import re
from pathlib import Path

from train.small_runs import evaluation

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_worked_example_prints_what_the_page_says():
    failed, attempted = doctest.testfile(str(PAGE), module_relative=False)
    assert failed == 0
    assert attempted >= 8


def test_the_files_of_the_page_are_those_of_an_evaluation():
    table = PAGE.read_text(encoding="utf-8").partition("## The files")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+\.\w+|[a-z_]+/)`", table))
    folder = evaluation()
    there = {f.name + "/" * f.is_dir() for f in folder.iterdir() if not f.name.startswith(".")}
    assert named - {"true_rewards.csv"} <= there
    assert {"win_rates.csv", "scored.jsonl", "generations/", "embeddings/"} <= named
