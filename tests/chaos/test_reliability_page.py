"""What docs/reliability.md says is there: the tests that it names, the record that it shows; and
the tests that docs/distributed.md names.
"""

import json
import re
from pathlib import Path

import pytest

from chaos.harness import PHASES
from chaos.variants import VARIANTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
RECORD = json.loads(
    (ROOT / "tests" / "chaos" / "results" / "chaos.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(("page", "at_least"), [("reliability", 20), ("distributed", 12)])
def test_every_test_that_the_page_names_exists(page, at_least):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    files = set(re.findall(r"`(tests/\S+\.py)`", text))
    assert not {file for file in files if not (ROOT / file).is_file()}
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > at_least
    assert not {name for name in named if f"def {name}(" not in code}


def test_the_record_is_of_all_variants_and_every_run_ended_equal():
    trials = RECORD["trials"]
    assert {trial["variant"] for trial in trials} == VARIANTS.keys()
    assert RECORD["unequal_runs"] == 0 == sum(bool(trial["differences"]) for trial in trials)
    kills = [kill for trial in trials for kill in trial["kills"]]
    by_time = [kill for kill in kills if kill["moment"].endswith(" s")]
    assert len(by_time) >= 100
    for phase in PHASES:
        assert RECORD["landed"][phase] == sum(kill["phase"] == phase for kill in kills)
    assert min(RECORD["landed"][p] for p in ("reference", "accumulation", "writing")) >= 5


def test_the_page_shows_the_record():
    landed = RECORD["landed"]
    numbers = [RECORD["runs"], RECORD["kills"], *(landed[phase] for phase in PHASES)]
    row = [*numbers, landed["writing"], RECORD["unequal_runs"]]
    assert f"| all | {' | '.join(map(str, row))} |" in PAGE
