"""Head-to-head tables, the agreement of judges, and the configuration that asks for them."""

import csv
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from scripted_server import completion, serving
from sklearn.metrics import cohen_kappa_score

from dpo.config_files import read_config
from dpo.core.stats import clustered_wilson_interval, mcnemar_exact, wilson_interval
from dpo.errors import InputError, StorageError
from dpo.evaluate.agreement import VERDICTS, agreement_table, cohens_kappa, kappa_interval
from dpo.evaluate.head_to_head import head_to_head_table, hold_duels
from dpo.evaluate.matchups import JudgedMatchup, Matchup, Place
from dpo.evaluate.records import prompts_won
from dpo.evaluation_config import EvaluateConfig
from train.small_runs import dpo, evaluate_config, sft_run, words_of

LETTERS = {"w": "win", "l": "loss", "t": "tie"}


def said(verdicts, *, judge="j", a="x", b="y", family="models", temperature=1.0, samples=1):
    """One verdict a letter; with several samples the letters of a prompt follow each other."""
    return [
        JudgedMatchup(
            judge=judge,
            family=family,
            a=a,
            b=b,
            temperature=temperature,
            prompt_index=i // samples,
            sample=i % samples,
            verdict=LETTERS[letter],
        )
        for i, letter in enumerate(verdicts)
    ]


# -- the table ------------------------------------------------------------------------------------


def test_a_row_by_hand():
    (row,) = head_to_head_table(said("wwwlttw"))
    assert (row.n, row.num_prompts, row.wins, row.losses, row.ties) == (7, 7, 4, 1, 2)
    assert row.win_rate == 0.8
    assert (row.low, row.high) == wilson_interval(4, 5)
    assert (row.prompts_won, row.prompts_lost) == (4, 1)
    assert row.sign_p == row.sign_p_holm == mcnemar_exact(4, 1) == 0.375


def test_samples_of_a_prompt_are_a_cluster_and_one_vote():
    (row,) = head_to_head_table(said("wwl" + "lll" + "wtt" + "wlt" + "ttt", samples=3))
    assert (row.n, row.num_prompts, row.wins, row.losses, row.ties) == (15, 5, 4, 5, 6)
    wins = [1, 1, 0, 0, 0, 0, 1, 1, 0]
    assert (row.low, row.high) == clustered_wilson_interval(wins, [0] * 3 + [1] * 3 + [2, 3, 3])
    assert (row.prompts_won, row.prompts_lost) == (2, 1)  # one is even, one undecided


def test_one_prompt_has_one_vote_whoever_asks():
    won = [True, True, False, True, False, False]
    assert prompts_won(won, ["a", "a", "a", "b", "b", "c"]) == (1, 1)  # b is even
    assert prompts_won([], []) == (0, 0)


def test_nothing_but_ties_has_no_win_rate_and_no_evidence():
    (row,) = head_to_head_table(said("ttt"))
    assert (row.win_rate, row.low, row.high, row.sign_p) == (None, 0.0, 1.0, 1.0)


def test_the_other_side_sees_the_mirror():
    mirror = {"win": "loss", "loss": "win", "tie": "tie"}
    verdicts = said("wwwlttwlw", samples=3)
    (row,) = head_to_head_table(verdicts)
    (other,) = head_to_head_table([replace(v, verdict=mirror[v.verdict]) for v in verdicts])
    assert (other.wins, other.losses, other.ties) == (row.losses, row.wins, row.ties)
    assert (other.low, other.high) == pytest.approx((1 - row.high, 1 - row.low))
    assert other.sign_p == row.sign_p


def test_holm_covers_a_judges_comparisons_of_one_kind():
    verdicts = [
        *said("w" * 8, b="1"),
        *said("w" * 6 + "l", b="2"),
        *said("w" * 8, family="chosen"),
        *said("w" * 8, judge="k"),
    ]
    rows = head_to_head_table(verdicts)
    p, q = 2 / 2**8, mcnemar_exact(6, 1)
    assert [row.sign_p for row in rows] == [p, q, p, p]
    assert [row.sign_p_holm for row in rows] == [2 * p, q, p, p]


def test_temperatures_are_rows_of_their_own_and_order_changes_nothing():
    verdicts = [v for t in (0.5, None) for j in "jk" for v in said("wltw", judge=j, temperature=t)]
    rows = head_to_head_table(verdicts)
    assert [(row.temperature, row.judge) for row in rows] == [
        (0.5, "j"), (0.5, "k"), (None, "j"), (None, "k")
    ]  # fmt: skip
    shuffled = random.Random(0).sample(verdicts, len(verdicts))
    assert {*head_to_head_table(shuffled)} == {*rows}


# -- agreement ------------------------------------------------------------------------------------


def two_judges(first, second, **options):
    return said(first, judge="j", **options) + said(second, judge="k", **options)


def drawn(n, seed, weights=(5, 3, 2)):
    """Verdicts of two judges who agree in part."""
    draw = random.Random(seed)
    first = draw.choices("wlt", weights, k=n)
    second = [c if draw.random() < 0.6 else draw.choice("wlt") for c in first]
    return "".join(first), "".join(second)


def test_kappa_by_hand():
    """Cohen's own kind of table: 35 of 50 agree, chance gives 25: (0.7 - 0.5) / 0.5."""
    first = "w" * 25 + "l" * 25
    second = "w" * 20 + "l" * 5 + "w" * 10 + "l" * 15
    (row,) = agreement_table(two_judges(first, second))
    assert row.kappa == row.decided_kappa == pytest.approx(0.4)
    assert (row.agreement, row.n, row.decided_n) == (0.7, 50, 50)
    assert (row.win_win, row.win_loss, row.loss_win, row.loss_loss) == (20, 5, 10, 15)
    assert row.low < 0.4 < row.high


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_scikit_learn(seed):
    first, second = drawn(120, seed)
    (row,) = agreement_table(two_judges(first, second))
    assert row.kappa == pytest.approx(cohen_kappa_score([*first], [*second]), abs=1e-12)
    decided = [(a, b) for a, b in zip(first, second, strict=True) if "t" not in (a, b)]
    assert row.decided_n == len(decided)
    assert row.decided_kappa == pytest.approx(cohen_kappa_score(*zip(*decided, strict=True)))
    assert row.decided_agreement == pytest.approx(np.mean([a == b for a, b in decided]))


def test_judges_that_say_the_same_agree_wholly_and_opposites_not_at_all():
    (same,) = agreement_table(two_judges("wltwl", "wltwl"))
    assert (same.agreement, same.kappa, same.low, same.high) == (1.0, 1.0, 1.0, 1.0)
    (opposite,) = agreement_table(two_judges("wlwl", "lwlw"))
    assert (opposite.agreement, opposite.kappa) == (0.0, -1.0)


def test_agreement_without_difference_says_nothing():
    (row,) = agreement_table(two_judges("www", "www"))
    assert (row.agreement, row.kappa, row.low) == (1.0, None, None)
    (row,) = agreement_table(two_judges("ttt", "wlt"))
    assert (row.decided_n, row.decided_agreement, row.decided_kappa) == (0, None, None)
    assert row.kappa == 0.0


def test_a_constant_judge_agrees_by_chance_only():
    first, _ = drawn(200, 3)
    (row,) = agreement_table(two_judges(first, "w" * 200))
    assert row.agreement == pytest.approx(first.count("w") / 200)
    assert (row.kappa, row.low, row.high) == (0.0, 0.0, 0.0)


def test_samples_of_one_prompt_add_no_certainty():
    first, second = drawn(60, 1)
    thrice = [("".join(c * 3 for c in verdicts)) for verdicts in (first, second)]
    (once,) = agreement_table(two_judges(first, second))
    (again,) = agreement_table(two_judges(*thrice, samples=3))
    assert (again.n, again.num_prompts) == (180, 60)
    assert (again.kappa, again.low, again.high) == pytest.approx((once.kappa, once.low, once.high))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Two judges of 60% shared verdicts: 0.6 + 0.4/3 agree, so kappa tends to a known value."""
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.3, 0.2])
    joint = 0.6 * np.diag(p) + 0.4 * np.outer(p, np.full(3, 1 / 3))
    truth = float(cohens_kappa(joint))
    hits = 0
    for trial in range(200):
        cells = rng.choice(9, size=100, p=joint.flatten())
        counts = np.eye(9)[cells].reshape(-1, 3, 3)
        low, high = kappa_interval(counts, confidence=0.95, seed=trial, num_resamples=500)
        hits += low <= truth <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_only_what_both_judged_is_compared_and_kinds_are_kept_apart():
    verdicts = [
        *said("wlwl", judge="j"),
        *said("wl", judge="k"),
        *said("ll", judge="k", family="chosen"),
        *said("wl", judge="j", family="nulls"),
        *said("lw", judge="k", family="nulls"),
    ]
    rows = agreement_table(verdicts)
    assert [(row.judge_a, row.judge_b, row.family, row.n) for row in rows] == [
        ("j", "k", "models", 2),
        ("j", "k", "nulls", 2),
    ]


def test_order_changes_no_agreement():
    first, second = drawn(80, 2)
    verdicts = two_judges(first, second)
    (row,) = agreement_table(verdicts)
    shuffled = random.Random(0).sample(verdicts, len(verdicts))
    (again,) = agreement_table(sorted(shuffled, key=lambda v: v.judge))
    assert (again.kappa, again.agreement) == pytest.approx((row.kappa, row.agreement))
    assert (again.low, again.high) == pytest.approx((row.low, row.high), abs=0.05)
    (mirror,) = agreement_table(sorted(verdicts, key=lambda v: v.judge, reverse=True))
    assert (mirror.judge_a, mirror.kappa) == ("k", pytest.approx(row.kappa))
    assert (mirror.win_loss, mirror.tie_win) == (row.loss_win, row.win_tie)


def test_the_verdicts_of_the_counts_are_all_verdicts():
    assert VERDICTS == ("win", "loss", "tie")


# -- files ----------------------------------------------------------------------------------------


class Fixed:
    """Says the same of everything."""

    def __init__(self, name, verdict):
        self.name, self._verdict = name, verdict

    def compare(self, matchups):
        return [self._verdict] * len(matchups)

    def describe(self):
        return {"kind": "fixed"}


def matchups(n):
    return [
        Matchup(
            place=Place(family="labels", a="chosen", b="rejected", temperature=None,
                        prompt_index=i, sample=0),
            prompt="p", response_a="a", response_b="b", chosen="a", rejected="b",
        )
        for i in range(n)
    ]  # fmt: skip


def test_the_files_hold_every_verdict_and_the_tables(tmp_path):
    duels = hold_duels([Fixed("f", "win"), Fixed("g", "tie")], matchups(3), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "matchups.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "judge": "f", "family": "labels", "a": "chosen", "b": "rejected", "temperature": None,
        "prompt_index": 0, "sample": 0, "verdict": "win",
    }  # fmt: skip
    assert [line["verdict"] for line in lines] == ["win"] * 3 + ["tie"] * 3
    with (tmp_path / "head_to_head.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["judge"], float(first["low"])) == ("f", duels.table[0].low)
    assert (second["win_rate"], second["temperature"], second["ties"]) == ("", "", "3")
    with (tmp_path / "agreement.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["win_tie"], row["agreement"]) == ("3", "0.0")
    assert json.loads((tmp_path / "judges.json").read_text()) == {
        "f": {"kind": "fixed"}, "g": {"kind": "fixed"},
    }  # fmt: skip


def test_one_judge_agrees_with_nobody_and_a_disk_that_refuses_is_one_sentence(tmp_path):
    hold_duels([Fixed("f", "win")], matchups(1), tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"matchups.jsonl", "head_to_head.csv", "judges.json"}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "matchups.jsonl").mkdir()
    with pytest.raises(StorageError, match="in the way"):
        hold_duels([Fixed("f", "win")], matchups(1), tmp_path / "taken")


# -- the configuration ----------------------------------------------------------------------------


def settings(*words):
    return read_config(
        EvaluateConfig, None, ["models.a=runs/a", "models.b=runs/b", "out=x", *words]
    )


def test_by_default_nothing_is_compared_and_another_judge_compares_all():
    assert settings().judges == ["sentence_bert"]
    assert settings().compared == []
    every = ["chosen", "models", "nulls", "labels"]
    assert settings("judges=[true_reward]").compared == every
    assert settings("comparisons=[models]").compared == ["models"]
    config = settings("judges=[reward,sentence_bert]", "reward=runs/r", "reward.label=good")
    assert (config.reward.model, config.reward.label, config.compared) == ("runs/r", "good", every)


ENDPOINT = ("judges=[endpoint]", "endpoint.model=m")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["judges=[reward]"], "judges: reward needs its section, e.g. reward.model=..."),
        (["judges=[endpoint]"], "judges: endpoint needs its section, e.g. endpoint.model=..."),
        (["reward=runs/r"], "reward has no effect unless judges holds reward"),
        (["endpoint.model=m"], "endpoint has no effect unless judges holds endpoint"),
        (["judges=[true_reward]", "data=a.jsonl"], "true_reward is known where data is 'synth"),
        (["judges=[true_reward]", "comparisons=[]"], "judges: has no effect without comparisons"),
        (["judges=[true_reward,true_reward]"], "judges: expected different ones"),
        (["comparisons=[models,models]"], "comparisons: expected different ones"),
        (["judges=[]"], "judges: "),
        (["judges=[gpt]"], "judges.0: "),
        (["comparisons=[all]"], "comparisons.0: "),
        (["judges=[endpoint]", "endpoint.base_url=http://h/v1"], "endpoint.model: is required"),
        ([*ENDPOINT, "endpoint.base_url=ftp://h/v1"], "endpoint.base_url: expected http(s)://"),
        ([*ENDPOINT, "endpoint.base_url=localhost:8000"], "endpoint.base_url: expected http"),
        ([*ENDPOINT, "endpoint.base_url=http://h:port/v1"], "endpoint.base_url: expected http"),
        ([*ENDPOINT, "endpoint.base_url=https://h/v1?key=a"], "endpoint.base_url: expected http"),
        ([*ENDPOINT, "endpoint.base_url='http://[::1/v1'"], "endpoint.base_url: expected http"),
        ([*ENDPOINT, "endpoint.input_price=1"], "endpoint: give both input_price and output"),
        ([*ENDPOINT, "endpoint.template=Which?"], "expected a text with {prompt} and {first} and"),
        ([*ENDPOINT, "endpoint.max_attempts=0"], "endpoint.max_attempts: "),
        ([*ENDPOINT, "endpoint.api_key=x"], "endpoint.api_key: unknown key"),
        (
            [*ENDPOINT, "endpoint.key_variable=K", "endpoint.base_url=http://example.org/v1"],
            "endpoint: a key is sent over https only, or to this machine",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_in_a_sentence(words, sentence):
    with pytest.raises(InputError) as caught:
        settings(*words)
    assert sentence in str(caught.value)


def test_one_model_has_no_other_to_meet():
    with pytest.raises(InputError, match="models needs two models to compare"):
        read_config(EvaluateConfig, None, ["models.a=x", "out=y", "comparisons=[models]"])


@pytest.mark.parametrize(
    "word",
    [
        "endpoint.key_variable=sk-canary-123",
        "endpoint.base_url=https://user:sk-canary-123@host/v1",
        "endpoint.api_key=sk-canary-123",
    ],
)
def test_a_key_in_the_wrong_place_is_refused_without_showing_it(word):
    with pytest.raises(InputError) as caught:
        settings(*ENDPOINT, word)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://example.org/v1", "http://localhost:1/v1", "http://[::1]/"]
)
def test_a_key_may_go_to_this_machine_or_over_https(url):
    settings(*ENDPOINT, "endpoint.key_variable=K", f"endpoint.base_url={url}")


# -- the whole command ----------------------------------------------------------------------------

FILES = {"matchups.jsonl", "head_to_head.csv", "agreement.csv", "judges.json"}


def test_judges_compare_on_the_command_line(tmp_path):
    function = tmp_path / "length.py"
    function.write_text("def f(prompts, responses):\n    return [len(r) for r in responses]\n")
    out = tmp_path / "out"
    changes = {
        "judges": ["sentence_bert", "true_reward", "reward"],
        "reward": {"function": f"{function}:f"},
        "temperatures": [1.0],
        "max_prompts": 6,
    }
    done = dpo("evaluate", *words_of(evaluate_config(out, changes)))
    assert done.code == 0, done.all
    assert "Head to head" in done.out
    assert "Agreement of the judges" in done.out
    assert {file.name for file in out.iterdir()} >= FILES
    with (out / "head_to_head.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = [(row["family"], row["a"], row["b"]) for row in rows if row["judge"] == "true_reward"]
    assert kinds[:3] == [
        ("chosen", "sft", "chosen"), ("chosen", "dpo", "chosen"), ("models", "sft", "dpo")
    ]  # fmt: skip
    assert len(kinds) == 3 + 6 + 1
    assert {row["n"] for row in rows} == {"6"}
    (labels,) = [r for r in rows if (r["judge"], r["family"]) == ("sentence_bert", "labels")]
    assert (labels["wins"], labels["losses"]) == ("6", "0")  # by construction
    assert len((out / "matchups.jsonl").read_text().splitlines()) == 3 * 6 * 10
    drawn = (out / "figures" / "head_to_head.csv").read_text(encoding="utf-8")
    assert drawn == (out / "head_to_head.csv").read_text(encoding="utf-8")
    assert "figures/head_to_head.csv" in (out / "index.html").read_text(encoding="utf-8")


def test_an_endpoint_judges_on_the_command_line_and_the_key_is_nowhere(tmp_path):
    """`dpo` sets OPENAI_API_KEY to a canary, and checks that no output holds it."""
    out = tmp_path / "out"
    with serving(lambda asked: completion(f"[[A]] {asked.headers['Authorization']}")) as server:
        changes = {
            "models": {"m": str(sft_run())},
            "judges": ["endpoint"],
            "endpoint": {
                "model": "m", "base_url": server.base_url, "key_variable": "OPENAI_API_KEY"
            },
            "comparisons": ["chosen", "labels"],
            "temperatures": [1.0],
            "max_prompts": 4,
        }  # fmt: skip
        words = words_of(evaluate_config(out, changes))
        done = dpo("evaluate", *words)
        assert done.code == 0, done.all
        assert len(server.asked) == 2 * (4 + 4)
        again = dpo("evaluate", *words)
        assert len(server.asked) == 2 * (4 + 4)
    assert again.out == done.out
    assert "canary" in server.asked[0].headers["Authorization"]
    told = json.loads((out / "judges.json").read_text())["endpoint"]
    assert (told["pairs"]["always_first"], told["pairs"]["position_bias"]) == (8, 1.0)
    assert told["answers"]["from_cache"] == 16
    kept = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert b"canary" not in kept


def test_a_judge_that_cannot_be_had_is_refused_before_anything_is_generated(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    out = tmp_path / "out"
    endpoint = {"model": "m", "key_variable": "NO_SUCH_KEY"}
    changes = {"judges": ["endpoint"], "endpoint": endpoint}
    refused = dpo("evaluate", *words_of(evaluate_config(out, changes)))
    assert refused.code == 2
    assert "no environment variable of that name" in refused.err
    assert not (out / "generations").exists()
