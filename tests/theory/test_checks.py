import math

import pytest

from dpo.errors import InputError
from dpo.theory import Check, checks, run

ALL = checks()
# A threshold statement: doubling it must fail, a tenth more is within the sampling error.
COARSE = {"R07", "C04", "O04", "V16"}


@pytest.mark.parametrize("item", ALL, ids=lambda item: item.id)
def test_statement_holds(item: Check) -> None:
    found = item.function()
    assert 0 <= found.error <= item.tolerance
    assert all(math.isfinite(value) for value in found.values.values())


@pytest.mark.parametrize("item", ALL, ids=lambda item: item.id)
def test_a_doubled_constant_is_noticed(item: Check) -> None:
    assert not item.function(factor=2.0).error <= item.tolerance


@pytest.mark.parametrize(
    "item", [item for item in ALL if item.id.split("-")[0] not in COARSE], ids=lambda item: item.id
)
def test_a_constant_off_by_a_tenth_is_noticed(item: Check) -> None:
    assert not item.function(factor=1.1).error <= item.tolerance


@pytest.mark.parametrize("item", ALL[:5], ids=lambda item: item.id)
def test_checks_are_deterministic(item: Check) -> None:
    assert item.function() == item.function()


def test_there_is_a_statement_for_each_claim_of_the_report() -> None:
    assert len(ALL) >= 80
    assert all(item.statement.endswith(".") and len(item.statement) < 160 for item in ALL)
    assert {item.chapter for item in ALL} == {
        "preferences",
        "rlhf",
        "optimum",
        "equivalence",
        "comparison",
        "variants",
    }


def test_names_select_by_id_number_and_chapter() -> None:
    assert [c.id for c in checks(["P03"])] == ["P03-bt-is-k2"]
    assert [c.id for c in checks(["O08-dpo-at-reference", "P03"])] == [
        "P03-bt-is-k2",
        "O08-dpo-at-reference",
    ]
    assert len(checks(["optimum"])) == 17


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no theory check is called 'X99'.*P01-pl-normalised"):
        run(["X99"])
