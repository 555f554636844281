"""Every command of the README runs as it stands, in order, in a folder like its reader's: rows of
their own, and a model called gpt2-medium, here a tiny one. Only how long things take is cut short.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo.cli import app
from dpo.data import synthetic
from dpo.data.sources import write_jsonl
from dpo.models.fresh import fresh_gpt2
from experiment.test_exact_study import TINY as EXACT
from experiment.test_frontier import TINY as FRONTIER
from experiment.test_loss_study import TINY as LOSSES
from experiment.test_sentiment import TINY as SENTIMENT
from experiment.test_sentiment import made_up_reviews

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
)
COMMANDS = [
    line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()
]
OURS = [line for line in COMMANDS if line.startswith("dpo ")]

TRAINING = [
    "epochs=0.1",
    "batch.size=4",
    "evaluation.num_samples=1",
    "evaluation.max_new_tokens=8",
]
ON_SAMPLES = [
    *("rounds=1", "prompts_per_round=4", "batch.size=4", "sampling.max_new_tokens=8"),
    "evaluation.max_new_tokens=8",
]
STUDY = {
    "seeds": [0],
    "processes": 1,
    "sft": {"epochs": 0.1, "evaluation": {"num_samples": 1, "max_new_tokens": 8}},
    "dpo": {"epochs": 0.1, "evaluation": {"kl_prompts": 2, "max_new_tokens": 8}},
    "grid": {"loss.beta": [0.3]},
    "evaluation": {"temperatures": [1.0], "max_prompts": 3, "max_new_tokens": 8},
}
SMALL_STUDY = {
    **STUDY,
    "reward_model": {"epochs": 0.1},
    "rivals": {
        "unlikelihood": {"epochs": 0.1},
        "ppo_rm": {"rounds": 1, "prompts_per_round": 4, "batch": {"size": 4}},
        "best_of_n": {"n": 2},
    },
}


def words_of(settings: dict, before: str = "") -> Iterator[str]:
    """Nested settings as key=value."""
    for key, value in settings.items():
        if isinstance(value, dict) and not any("." in inner for inner in value):
            yield from words_of(value, f"{before}{key}.")
        else:
            yield f"{before}{key}={json.dumps(value)}"


SHORTER = {
    "dpo sft": TRAINING,
    "dpo train": TRAINING,
    "dpo reward": ["epochs=0.1", "batch.size=4"],
    "dpo online": ON_SAMPLES,
    "dpo ppo": ON_SAMPLES,
    "dpo evaluate": ["temperatures=[1.0]", "max_prompts=4", "max_new_tokens=8"],
    "dpo experiment run studies/instruction.yaml": [*words_of(STUDY)],
    "dpo experiment run studies/instruction-small.yaml": [*words_of(SMALL_STUDY)],
    "dpo experiment exact": [*words_of({**EXACT, "seeds": [0]})],
    "dpo experiment frontier": [*words_of({**FRONTIER, "processes": 1})],
    "dpo experiment losses": [*words_of(LOSSES)],
    "dpo experiment sentiment": [
        *words_of({**SENTIMENT, "sft": {"epochs": 0.1}, "seeds": [0], "processes": 1})
    ],
}
"""What is added to a command that begins so, lest it take hours."""


def furnish(folder: Path, tokenizer) -> None:
    """Rows and a model under the names that the README gives them."""
    for name in ("studies", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    write_jsonl(synthetic.preferences(num_rows=60, seed=0), folder / "prefs.jsonl")
    rows = [
        {"instruction": row.prompt, "input": "", "chosen": row.chosen, "rejected": row.rejected}
        for row in synthetic.preferences(num_rows=60, seed=1)
    ]
    (folder / "instruction-data-with-preference.json").write_text(json.dumps(rows))
    with gzip.open(folder / "reviews.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in made_up_reviews(120))
    shape = {"width": 16, "layers": 1, "heads": 2, "positions": 1024}
    fresh_gpt2(**shape, tokenizer=tokenizer, seed=0).save_pretrained(folder / "gpt2-medium")
    tokenizer.save_pretrained(folder / "gpt2-medium")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """The reader's folder, as the current one."""
    folder = tmp_path_factory.mktemp("reader")
    furnish(folder, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def shortened(line: str) -> list[str]:
    """The words after `dpo`, and what makes the command short."""
    more = [words for begin, words in SHORTER.items() if line.startswith(begin)]
    return [*shlex.split(line)[1:], *(more[0] if more else ())]


@pytest.mark.parametrize("line", OURS)
def test_a_command_of_the_readme_runs(line, place):
    """One after the other: each finds what those before it left."""
    words = shortened(line)
    assert app(args=words, prog_name="dpo", standalone_mode=False) in (None, 0)
    for folder in (word.removeprefix("out=") for word in words if word.startswith("out=")):
        assert (place / folder / "index.html").is_file()


def test_what_is_not_run_here_is_a_target_that_make_knows():
    others = [line for line in COMMANDS if line not in OURS]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {line.split()[1] for line in others if line.startswith("make ")} <= {*targets}
    assert [line for line in others if not line.startswith("make ")] == [". .venv/bin/activate"]


def test_every_shortening_is_of_a_command_that_is_there():
    for begin in SHORTER:
        assert any(line.startswith(begin) for line in OURS), begin
