"""The pages of the losses: what is committed is what the program would write; figures are right."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from dpo.core.family import LOSSES, options
from dpo.loss_config import LOSS_CONFIGS
from dpo.report.loss_figures import VARIANTS, caption, curves, svg
from dpo.report.loss_pages import allowed, explanation, needs, option_rows, page, pages

DOCS = Path(__file__).parents[2] / "docs" / "losses"


def curve(name, index=0):
    return curves(LOSSES[name])[index]


def at(curve, x, values):
    return float(np.interp(x, curve.x, values))


@pytest.mark.parametrize("name", pages())
def test_committed_pages_are_what_the_program_writes(name):
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == pages()[name], "run: dpo losses --write docs/losses"


def test_every_loss_has_a_page_a_figure_and_a_place_in_the_list_and_nothing_else_is_there():
    named = {f"{name}.md" for name in LOSSES} | {"README.md", "mix.md"}
    assert {file.name for file in DOCS.glob("*.md")} == named
    assert {file.stem for file in (DOCS / "figures").iterdir()} == set(LOSSES)
    links = re.findall(r"^\| \[(\w+)\]\(\1\.md\) ", pages()["README.md"], flags=re.MULTILINE)
    assert links == list(LOSSES)


@pytest.mark.parametrize("file", sorted((DOCS / "figures").glob("*.svg")), ids=lambda f: f.stem)
def test_committed_figures_are_small_and_have_no_date(file):
    text = file.read_text(encoding="utf-8")
    assert len(text) < 50_000
    assert "dc:date" not in text
    assert "Matplotlib" not in text


def test_a_figure_is_drawn_the_same_twice():
    assert svg("f_dpo") == svg("f_dpo")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=lambda loss: loss.name)
def test_a_page_has_formula_source_every_option_and_no_code_of_the_docstring(loss):
    text = page(loss)
    assert f"`{loss.formula}`" in text
    assert loss.source in text
    assert caption(loss) in text
    for option in set(options(loss)) - {"vocab_size"}:
        assert f"| `loss.{option}` |" in text
    assert ">>>" not in text
    assert "Args:" not in text
    assert text.count("```") % 2 == 0


def test_an_explanation_keeps_equations_and_joins_the_lines_of_a_paragraph():
    blocks = explanation(LOSSES["plackett_luce"]).split("\n\n")
    fenced = [block for block in blocks if block.startswith("```")]
    assert len(fenced) == 2
    assert "\n= -log sum_" in fenced[1]
    assert not any("\n" in block for block in blocks if not block.startswith("```"))


def test_bars_in_tables_are_escaped_so_that_cells_stay_cells():
    for text in pages().values():
        rows = [line for line in text.splitlines() if line.startswith("| ")]
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert widths <= {5}


def test_options_are_listed_with_default_values_and_meaning():
    rows = {row[0]: row[1:] for row in option_rows(LOSS_CONFIGS["beta_dpo"])}
    assert list(rows) == ["beta", "margin_scale", "keep", "running.momentum"]
    assert rows["keep"][:2] == ("0.8", "> 0, ≤ 1")
    assert rows["running.momentum"][:2] == ("0.9", "≥ 0, < 1")
    (_, _, top, _) = option_rows(LOSS_CONFIGS["plackett_luce"])[1]
    assert top == "≥ 1"
    assert allowed(LOSS_CONFIGS["rpo"].model_fields["divergence"]).startswith("backward_kl, ")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dpo", "Reference model: yes."),
        ("simpo", "Reference model: none is loaded."),
        ("odpo", "Data: a chosen and a rejected response of one prompt; every response has a"),
        ("lipo_lambda", "every response has a score."),
        ("kto", "through the reference point alone"),
        ("bco", "through running means alone"),
        ("alpha_dpo", "through running means alone"),
        ("aot", "depends on the whole batch of its step"),
        ("ipo", "depends on that row alone"),
        ("wpo", "Next-token distributions"),
    ],
)
def test_what_a_loss_needs_is_said(name, says):
    assert says in "\n".join(needs(LOSSES[name]))


# -- the curves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES.values(), ids=lambda loss: loss.name)
def test_curves_are_finite_and_the_pull_is_the_slope_of_the_loss(loss):
    """Along the margin the chosen response moves by half of it and the rejected one against it.

    Except where weights without gradient move too, or the other way round: gradients that do not
    show in x.
    """
    for curve in curves(loss):
        pulls = list(curve.pulls.values())
        assert np.isfinite(curve.loss).all()
        assert all(np.isfinite(pull).all() for pull in pulls)
        if loss.name in {"beta_dpo", "alpha_dpo", "lipo_lambda"}:
            continue
        slope = -(pulls[0] - pulls[1]) / 2 if loss.kind == "pair" else -pulls[0]
        step = curve.x[1] - curve.x[0]
        predicted = np.cumsum((slope[1:] + slope[:-1]) / 2) * step
        scale = np.ptp(curve.loss)
        assert np.abs(curve.loss[1:] - curve.loss[0] - predicted).max() < 0.02 * scale


def test_dpo_at_the_reference_costs_log_two_and_pulls_with_half_of_beta():
    drawn = curve("dpo")
    assert at(drawn, 0, drawn.loss) == pytest.approx(math.log(2))
    assert at(drawn, 0, drawn.pulls["chosen"]) == pytest.approx(0.05)
    assert at(drawn, 0, drawn.pulls["rejected"]) == pytest.approx(-0.05)


def test_ipo_stops_pulling_at_its_target():
    drawn = curve("ipo")
    assert at(drawn, 5.0, drawn.pulls["chosen"]) == pytest.approx(0, abs=1e-9)
    assert at(drawn, 5.0, drawn.loss) == pytest.approx(0, abs=0.2)


def test_smoothed_dpo_pushes_back_beyond_its_own_margin():
    """logit(1 - 0.1) / beta = 22 nats."""
    pull = curve("dpo", 1)
    assert at(pull, 20, pull.pulls["chosen"]) > 0 > at(pull, 24, pull.pulls["chosen"])


def test_divergences_of_f_dpo_cost_the_same_at_the_reference_alone():
    drawn = curves(LOSSES["f_dpo"])
    assert [at(c, 0, c.loss) for c in drawn] == pytest.approx([math.log(2)] * 4)
    assert len({round(at(c, -3, c.loss), 4) for c in drawn}) == 4


def test_lists_and_judged_responses_pull_in_their_own_directions():
    best, _, worst = curves(LOSSES["plackett_luce"])
    assert (best.pulls[""] > 0).all()
    assert (worst.pulls[""] < 0).all()
    up, down = curves(LOSSES["kto"])
    assert (up.pulls[""] > 0).all()
    assert (down.pulls[""] < 0).all()


def test_variants_are_of_known_losses_and_differ():
    assert set(VARIANTS) <= set(LOSSES)
    for name in VARIANTS:
        first, *others = curves(LOSSES[name])
        assert all(not np.allclose(first.loss, other.loss) for other in others), name
