"""docs/scaling.md shows the table that the formulas give, of models as transformers builds them."""

from pathlib import Path

import pytest

from dpo.core.scaling import POLICIES
from dpo.report import scaling

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize("name", POLICIES)
def test_the_counts_of_a_policy_are_those_of_its_model(name):
    assert scaling.counted(POLICIES[name]) == POLICIES[name].size


def test_a_pass_of_the_page_is_whole_pairs():
    size = scaling.pass_of(POLICIES["7B"])
    assert size.tokens % scaling.BATCH.tokens == 0
    assert size.tokens <= scaling.MAX_TOKENS


def test_the_page_shows_the_table_as_it_is():
    text = PAGE.read_text(encoding="utf-8")
    assert scaling.with_table(text) == text
    assert scaling.table() in text
    for missing in ("No GPU", "not measured"):
        assert missing in text
