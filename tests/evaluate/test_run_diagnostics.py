"""What a diagnosis says of runs whose truth was planted, and that it keeps quiet of the others."""

import csv
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from dpo.core.diagnostics import displacement
from dpo.errors import InputError
from dpo.evaluate.diagnostics import DIAGNOSTICS, diagnose, write_diagnosis
from dpo.evaluate.pair_diagnostics import displacement_level
from dpo.evaluate.readings import Reading, differ, join
from dpo.train.held_out import HELD_OUT, HeldOutPair
from train.small_runs import sft_run

BETA = 0.5
SIDES = ("chosen", "rejected")
N = 200


def pair(row, **changes):
    values = {
        "row": row,
        "source": f"prefs.jsonl:{row + 1}",
        "subset": "",
        "prompt": row,
        "prompt_tokens": 10,
        "chosen_tokens": 20,
        "rejected_tokens": 20,
        "overlap": 0.5,
        "chosen_logp": -20.0,
        "rejected_logp": -20.0,
        "reference_chosen_logp": -20.0,
        "reference_rejected_logp": -20.0,
        "start_chosen_logp": -20.0,
        "start_rejected_logp": -20.0,
    }
    return HeldOutPair(**values | changes)


def run_of(folder, pairs, metrics=({"step": 0, "eval/loss": 0.7},)):
    """A run's folder with these pairs and metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    if pairs:
        with (folder / HELD_OUT).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(asdict(pairs[0])))
            writer.writeheader()
            writer.writerows(asdict(p) for p in pairs)
    config = {"command": "train", "loss": {"name": "dpo", "beta": BETA}}
    (folder / "config.json").write_text(json.dumps(config))
    text = "".join(json.dumps(row) + "\n" for row in metrics)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def trained(rng, chosen_change, rejected_change, **columns):
    """Pairs whose log-probabilities changed by these means, spread 1."""
    return [
        pair(
            i,
            chosen_logp=-20 + chosen_change + rng.normal(),
            rejected_logp=-20 + rejected_change + rng.normal(),
            **{name: values[i] for name, values in columns.items()},
        )
        for i in range(N)
    ]


def reading(diagnosis, title):
    return next(r for r in diagnosis.readings if r.title == title)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- displacement ----------------------------------------------------------------------------------

LIKELIHOOD = "Likelihood of the chosen responses"


def test_a_planted_displacement_is_warned_of_with_what_to_do(tmp_path, rng):
    found = diagnose(run_of(tmp_path, trained(rng, -2.0, -5.0)))
    said = reading(found, LIKELIHOOD)
    assert said.level == "warning"
    assert "not a bug by itself" in said.sentence
    assert "nll" in said.what_to_do
    assert "loss.beta" in said.what_to_do
    numbers = found.numbers["displacement"]
    assert numbers["chosen_fell"] > 0.9
    assert numbers["chosen_mean"] == pytest.approx(-2, abs=0.3)
    assert numbers["rejected_mean"] == pytest.approx(-5, abs=0.3)


def test_without_one_nothing_is_warned_of(tmp_path, rng):
    found = diagnose(run_of(tmp_path, trained(rng, 2.0, -5.0)))
    assert reading(found, LIKELIHOOD) == Reading(
        "ok", LIKELIHOOD, reading(found, LIKELIHOOD).sentence, what_to_do=""
    )


def test_noise_around_0_is_warned_of_as_rarely_as_intervals_of_95_percent_allow():
    """The chosen falls in half of the pairs: an interval lies wholly on one side in 2.5%."""
    rng = np.random.default_rng(0)
    changes = rng.normal(size=(500, N))
    alarms = [displacement_level(displacement(own, own, range(N))) == "warning" for own in changes]
    assert 0.01 < np.mean(alarms) < 0.06


def test_falls_that_outweigh_the_rises_are_warned_of_where_the_share_alone_is_not_sure(tmp_path):
    pairs = [pair(i, chosen_logp=-20 + (0.1 if i < 45 else -5.0)) for i in range(100)]
    found = diagnose(run_of(tmp_path, pairs))
    assert found.numbers["displacement"]["chosen_fell_interval"][0] < 0.5
    assert reading(found, LIKELIHOOD).level == "warning"


def test_more_than_half_but_not_beyond_chance_is_a_note(tmp_path):
    pairs = [pair(i, chosen_logp=-20 + (0.5 if i < 9 else -0.5)) for i in range(20)]
    assert reading(diagnose(run_of(tmp_path, pairs)), LIKELIHOOD).level == "note"


def test_pairs_that_are_alike_are_blamed_where_they_fall_further(tmp_path, rng):
    overlap = rng.random(N)
    pairs = [pair(i, chosen_logp=-21 - 5 * overlap[i], overlap=overlap[i]) for i in range(N)]
    alike = reading(diagnose(run_of(tmp_path / "alike", pairs)), LIKELIHOOD)
    assert "more alike" in alike.what_to_do
    pairs = [replace(p, overlap=float(o)) for p, o in zip(pairs, rng.random(N), strict=True)]
    other = reading(diagnose(run_of(tmp_path / "other", pairs)), LIKELIHOOD)
    assert other.level == "warning"
    assert "more alike" not in other.what_to_do


def test_where_neither_start_nor_reference_is_known_nothing_is_said_of_it(tmp_path):
    names = [f"{whose}_{side}_logp" for whose in ("start", "reference") for side in SIDES]
    unknown = dict.fromkeys(names)
    found = diagnose(run_of(tmp_path, [pair(i, **unknown) for i in range(4)]))
    assert "displacement" not in found.numbers
    assert "accuracy" in found.numbers


def test_the_way_there_is_read_from_the_metrics(tmp_path, rng):
    metrics = [
        {
            "step": s,
            "eval/loss": 1,
            "eval/logps/chosen": -20.0 - s,
            "eval/logps/rejected": -30 - 2 * s,
        }
        for s in (0, 5, 9)
    ]
    found = diagnose(run_of(tmp_path, trained(rng, -9, -18), metrics))
    assert found.numbers["displacement"]["over_training"] == [
        {"step": 0, "chosen": 0, "rejected": 0},
        {"step": 5, "chosen": -5, "rejected": -10},
        {"step": 9, "chosen": -9, "rejected": -18},
    ]


# -- accuracy and subsets --------------------------------------------------------------------------


def labelled(rights, **columns):
    """Pairs with a margin of beta * 2 nats, ordered rightly or not."""
    return [
        pair(
            i,
            chosen_logp=-20 + (1.0 if right else -1.0),
            rejected_logp=-20 - (1.0 if right else -1.0),
            **{name: values[i] for name, values in columns.items()},
        )
        for i, right in enumerate(rights)
    ]


@pytest.mark.parametrize(("rate", "level"), [(0.5, "note"), (0.7, "ok"), (0.3, "warning")], ids=str)
def test_accuracy_is_held_against_a_coin(tmp_path, rate, level):
    rights = np.arange(N) < rate * N
    found = diagnose(run_of(tmp_path, labelled(rights)))
    assert found.numbers["accuracy"]["accuracy"] == rate
    assert reading(found, "Reward accuracy").level == level


def test_a_tie_is_no_hit_and_is_said(tmp_path):
    found = diagnose(
        run_of(tmp_path, [*labelled([True] * 3), pair(3), pair(4, chosen_logp=-20.00005)])
    )
    assert found.numbers["accuracy"]["accuracy"] == pytest.approx(3 / 5)
    assert found.numbers["accuracy"]["ties"] == pytest.approx(2 / 5)


def test_a_subset_that_is_worse_is_named_with_its_corrected_p(tmp_path, rng):
    subset = [f"part-{i % 3}" for i in range(N)]
    rights = rng.random(N) < np.where(np.array(subset) == "part-1", 0.45, 0.9)
    found = diagnose(run_of(tmp_path / "planted", labelled(rights, subset=subset)))
    said = reading(found, "Accuracy by subset")
    assert said.level == "warning"
    assert "part-1" in said.sentence
    assert found.numbers["subsets"]["by"] == "subset"
    even = labelled(np.arange(N) % 10 < 8, subset=subset)
    assert reading(diagnose(run_of(tmp_path / "even", even)), "Accuracy by subset").level == "ok"


def test_without_a_column_the_subsets_are_quarters_by_the_length_of_the_prompt(tmp_path):
    lengths = list(range(8, 8 + N))
    rights = [length >= 58 for length in lengths]  # all wrong in the shortest quarter
    found = diagnose(run_of(tmp_path, labelled(rights, prompt_tokens=lengths)))
    assert found.numbers["subsets"]["by"] == "length of the prompt"
    subsets = found.numbers["subsets"]["subsets"]
    assert (subsets[0]["subset"], subsets[0]["n"]) == ("008 to 057 prompt tokens", 50)
    assert [s["accuracy"] for s in subsets] == [0, 1, 1, 1]


def test_many_subsets_are_put_together(tmp_path):
    names = [f"s{i % 40}" if i % 2 else "large" for i in range(N)]
    found = diagnose(run_of(tmp_path, labelled([True] * N, subset=names)))
    subsets = {s["subset"]: s["n"] for s in found.numbers["subsets"]["subsets"]}
    assert len(subsets) == 20
    assert subsets["others"] == 10
    assert sum(subsets.values()) == N


# -- length ----------------------------------------------------------------------------------------


def by_length(rng, label_follows, policy_follows):
    """Labels and policy that each prefer the longer response at a rate of their own."""
    pairs = []
    for i in range(N):
        gap = int(rng.integers(1, 30)) * (1 if rng.random() < label_follows else -1)
        margin = abs(gap) / 10 * (1 if rng.random() < policy_follows else -1) * np.sign(gap)
        lengths = {"chosen_tokens": 50 + gap, "rejected_tokens": 50}
        pairs.append(pair(i, chosen_logp=-20 + margin, **lengths))
    return pairs


def test_a_policy_that_goes_by_length_more_than_the_labels_is_warned_of(tmp_path, rng):
    found = diagnose(run_of(tmp_path, by_length(rng, 0.5, 0.9)))
    assert reading(found, "Length").level == "warning"
    numbers = found.numbers["length"]
    assert numbers["longer_is_chosen"] == pytest.approx(0.5, abs=0.1)
    assert numbers["policy_prefers_longer"] == pytest.approx(0.9, abs=0.06)
    assert numbers["spearman_interval"][0] > 0.5


def test_a_policy_that_does_not_is_not(tmp_path, rng):
    found = diagnose(run_of(tmp_path, by_length(rng, 0.5, 0.5)))
    assert reading(found, "Length").level == "ok"
    low, high = found.numbers["length"]["spearman_interval"]
    assert low < 0 < high


def test_an_accuracy_that_the_length_alone_would_give_is_said(tmp_path, rng):
    said = reading(diagnose(run_of(tmp_path, by_length(rng, 0.8, 0.8))), "Length")
    assert said.level == "note"
    assert "no evidence" in said.sentence


# -- calibration -----------------------------------------------------------------------------------


def calibrated(rng, temperature):
    """Margins that are `temperature` times the labels' own log-odds."""
    odds = 2 * rng.normal(size=N)
    odds = np.where(rng.random(N) < 1 / (1 + np.exp(-odds)), odds, -odds)
    return [pair(i, chosen_logp=-20 + temperature * m / BETA) for i, m in enumerate(odds)]


@pytest.mark.parametrize(("temperature", "word"), [(4.0, "surer"), (0.2, "less sure"), (1.0, None)])
def test_calibration_names_the_temperature_that_was_planted(tmp_path, rng, temperature, word):
    found = diagnose(run_of(tmp_path, calibrated(rng, temperature)))
    low, high = found.numbers["calibration"]["temperature_interval"]
    assert low < temperature < high
    said = reading(found, "Calibration")
    assert said.level == ("ok" if word is None else "note")
    assert word is None or word in said.sentence


def test_no_error_to_calibrate_by_is_no_finding(tmp_path):
    found = diagnose(run_of(tmp_path, labelled([True] * 10)))
    assert found.numbers["calibration"]["temperature"] == 0
    assert reading(found, "Calibration").level == "ok"


# -- the policy's own samples ----------------------------------------------------------------------


def measured(**ends):
    """First and last evaluation: `name=(start, end)`."""
    rows = []
    for place, step in ((0, 0), (1, 9)):
        rows.append({"step": step, "eval/loss": 0.5})
        for name, values in ends.items():
            rows[-1][f"eval/{name}"] = values[place]
            rows[-1][f"eval/{name}_stderr"] = 0.01
    return rows


@pytest.mark.parametrize(
    ("name", "quiet", "loud", "title", "level"),
    [
        ("kl", (0, 2.0), (0, 30.0), "Distance from the reference", "note"),
        ("entropy", (2.0, 1.5), (2.0, 0.5), "Diversity", "warning"),
        ("sample_tokens", (20, 21), (20, 40), "Length of generations", "note"),
        ("sample_tokens", (20, 18), (20, 5), "Length of generations", "note"),
        ("repeated_4grams", (0.1, 0.12), (0.1, 0.4), "Repetition", "warning"),
        ("truncated", (0.1, 0.1), (0.1, 0.5), "Cut generations", "warning"),
        ("truncated", (0.0, 0.15), (0.5, 0.5), "Cut generations", "note"),
        ("empty", (0.0, 0.0), (0.0, 0.2), "Empty generations", "warning"),
    ],
)
def test_what_the_samples_show_is_said(tmp_path, name, quiet, loud, title, level):
    of_quiet = diagnose(run_of(tmp_path / "quiet", [], measured(**{name: quiet})))
    of_loud = diagnose(run_of(tmp_path / "loud", [], measured(**{name: loud})))
    assert {r.level for r in of_quiet.readings} <= {"ok"}
    assert reading(of_loud, title).level == level
    assert of_loud.numbers["on_policy"][name]["end"] == loud[1]


def test_a_change_within_its_error_is_no_change(tmp_path):
    rows = measured(entropy=(2.0, 0.5))
    for row in rows:
        row["eval/entropy_stderr"] = 0.9
    assert diagnose(run_of(tmp_path, [], rows)).readings[0].level == "ok"


def test_numbers_that_are_not_finite_do_not_stop_it(tmp_path):
    """One prompt has no standard error, and it is logged as text."""
    rows = measured(kl=(0.0, 1.0), entropy=(2.0, 0.5))
    rows[1]["eval/kl_stderr"] = "nan"
    rows[1]["eval/entropy_stderr"] = "nan"
    found = diagnose(
        run_of(tmp_path, [*labelled([True, False]), pair(2, chosen_logp=math.nan)], rows)
    )
    assert found.numbers["accuracy"]["num_pairs"] == 2
    write_diagnosis(found, tmp_path)
    json.loads((tmp_path / DIAGNOSTICS).read_text(), parse_constant=pytest.fail)


# -- the file --------------------------------------------------------------------------------------


def test_the_file_holds_numbers_and_readings(tmp_path, rng):
    found = diagnose(run_of(tmp_path, trained(rng, -2.0, -5.0)))
    write_diagnosis(found, tmp_path)
    content = json.loads((tmp_path / DIAGNOSTICS).read_text())
    assert content["kind"] == "run"
    assert len(content["numbers"]["displacement"]["chosen_interval"]) == 2
    assert all(
        r.keys() == {"level", "title", "sentence", "what_to_do"} for r in content["readings"]
    )
    assert [r.level for r in found.remarkable] == sorted(
        [r.level for r in found.readings if r.level != "ok"], reverse=True
    )
    before = (tmp_path / DIAGNOSTICS).stat().st_mtime_ns
    write_diagnosis(diagnose(tmp_path), tmp_path)
    assert (tmp_path / DIAGNOSTICS).stat().st_mtime_ns == before  # the same: left alone


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing to diagnose"):
        diagnose(tmp_path)
    with pytest.raises(InputError, match="nothing to diagnose"):
        diagnose(tmp_path / "missing")


def test_a_run_of_sft_has_nothing_to_diagnose():
    with pytest.raises(InputError, match=r"nothing to diagnose; expected .* of dpo train"):
        diagnose(sft_run())


def test_a_run_without_its_configuration_is_refused_by_name(tmp_path):
    run_of(tmp_path, labelled([True, False]))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        diagnose(tmp_path)


def test_one_pair_is_enough_to_say_that_nothing_is_known(tmp_path):
    found = diagnose(run_of(tmp_path, labelled([True])))
    assert found.numbers["accuracy"]["interval"] == pytest.approx((0.2, 1.0), abs=0.01)
    assert {r.level for r in found.readings} <= {"ok", "note"}


def test_differ_and_join():
    assert differ((0.0, 0.1), (0.5, 0.1))
    assert not differ((0.0, 0.2), (0.5, 0.2))
    assert join(["a", "b"]) == "a, b"
    assert join(list("abcdefg"), most=3) == "a, b, c and 4 more"
