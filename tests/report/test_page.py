"""The page of a folder: what it says, what it holds, and that no text gets out of its place."""

import base64
import hashlib
import json
import logging
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dpo.config_files import read_config
from dpo.core.stats import clustered_wilson_interval
from dpo.data.files import page_text
from dpo.errors import InputError
from dpo.evaluate.arena.judgements import Judgement, JudgementFile
from dpo.evaluate.head_to_head import HeadToHead, head_to_head_table
from dpo.evaluate.matchups import JudgedMatchup
from dpo.evaluate.tables import csv_text
from dpo.experiment.exact_config import ExactStudyConfig
from dpo.experiment.frontier_config import FrontierConfig
from dpo.experiment.losses import LossStudyConfig
from dpo.experiment.sentiment_config import SentimentConfig
from dpo.experiment.study import StudyConfig
from dpo.report.page import compare, write
from dpo.report.page.blocks import Figure, Page, Prose, Section, Table
from dpo.report.page.evaluation_page import result_tables
from dpo.report.page.folders import (
    EvaluationFolder,
    Margin,
    RunFolder,
    StudyFolder,
    gather,
    held_out_margins,
)
from dpo.report.page.layout import page_of
from dpo.report.page.parts import diagnostics_blocks
from dpo.report.page.render import render
from dpo.report.page.reproduce import command_line, settings_of, settings_of_evaluation
from dpo.report.page.samples import MAX_TEXT, Response, Sample, Samples, of_evaluation, of_run
from dpo.report.page.verdict import evaluation_verdict, run_verdict, study_verdict
from dpo.report.page.words import decimal
from dpo.schemas import SCHEMAS
from dpo.train.run import read_manifest
from train.small_runs import dpo, dpo_config, dpo_run, evaluation, sft_run, words_of

ROOT = Path(__file__).parents[2]
NASTY = "</script><script>alert(1)</script>\u2028\u202e<!--&amp;\x1b[31m\ud800"
"""Ends a script, opens another, breaks a line of JavaScript, reorders, comments, colours."""


class Elements(HTMLParser):
    """Which elements a page has, and what they name to be loaded."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "action", "srcset", "data")
        self.addresses += [value for name, value in attrs if name in names]


def run_folder(*held_out, command="train", margins=(), **manifest):
    """A run with those evaluations, the first at step 0 and the last at step 10."""
    rows = [
        {"step": step, **{f"eval/{name}": value for name, value in row.items()}}
        for step, row in zip((0, 10), held_out, strict=True)
    ]
    return RunFolder(
        folder=Path("runs/one"),
        command=command,
        config={"command": command},
        manifest={"status": "finished", "steps": 10, "best_step": 10, **manifest},
        metrics=rows,
        audit={},
        diagnostics={},
        margins=[
            Margin(pair=str(i), prompt=str(i), margin=margin) for i, margin in enumerate(margins)
        ],
        judgements=[],
    )


def says(sentences, words):
    return any(words in sentence for sentence in sentences)


# -- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (80, "80.0% [71.1%, 86.7%] of 100 held-out pairs, more often than chance"),
        (55, "which cannot be told apart from chance"),
        (20, "less often than chance"),
    ],
)
def test_accuracy_is_called_better_than_chance_only_where_its_interval_is(right, words):
    row = {"loss": 0.6, "rewards/accuracy": right / 100, "rewards/ties": 0.0}
    run = run_folder({"loss": 0.7}, row, margins=[1.0] * right + [-1.0] * (100 - right))
    assert says(run_verdict(run), words)


def test_pairs_of_one_prompt_do_not_narrow_the_interval():
    row = {"loss": 0.6, "rewards/accuracy": 0.8}
    alone = run_folder({"loss": 0.7}, row, margins=[1.0] * 80 + [-1.0] * 20)
    copies = [
        Margin(pair=f"{m.pair}/{k}", prompt=m.prompt, margin=m.margin)
        for m in alone.margins
        for k in range(10)
    ]
    tenfold = run_folder({"loss": 0.7}, row)
    tenfold.margins.extend(copies)
    ends = [re.search(r"\[.*?\]", run_verdict(run)[0]).group() for run in (alone, tenfold)]
    low, high = ([float(x) for x in re.findall(r"[\d.]+", end)] for end in ends)
    assert low == pytest.approx(high, abs=1.0)


def test_without_held_out_rows_there_is_no_interval_and_the_sentence_says_so():
    run = run_folder({"loss": 0.7}, {"loss": 0.6, "rewards/accuracy": 0.8})
    assert says(run_verdict(run), "so there is no interval")
    assert not says(run_verdict(run), "chance")


@pytest.mark.parametrize(
    ("after", "words"), [(1.3, "cannot be told apart"), (2.0, "higher than before training")]
)
def test_rewards_of_samples_differ_only_beyond_their_errors(after, words):
    first = {"loss": 0.7, "reward": 1.0, "reward_stderr": 0.2}
    run = run_folder(first, {**first, "reward": after}, command="ppo")
    assert says(run_verdict(run), words)


def test_a_best_model_before_the_last_step_is_named():
    rows = [{"loss": 0.5}, {"loss": 0.6}]
    run = run_folder(*rows, best_step=0)
    assert says(run_verdict(run), "it was lowest, 0.5, at step 0: best/ holds that model")
    assert not says(run_verdict(run_folder(*rows)), "best/")


def test_a_fall_of_the_chosen_responses_is_explained_where_it_happened():
    row = {"loss": 0.6, "rewards/margin": 1.0, "logps/chosen_change": -5.0}
    assert says(run_verdict(run_folder({"loss": 0.7}, row)), "rejected responses fell further")
    rising = {**row, "logps/chosen_change": 5.0}
    assert not says(run_verdict(run_folder({"loss": 0.7}, rising)), "rejected responses fell")


def test_a_run_that_goes_on_is_not_called_finished():
    run = run_folder({"loss": 0.7}, {"loss": 0.6}, status="started")
    assert run_verdict(run)[0].startswith("This run is not finished: it stands at step 10")


def rate(model, win_rate, *, kind="model", temperature=1.0):
    wins = round(100 * win_rate)
    return {
        "model": model,
        "kind": kind,
        "temperature": temperature,
        "num_prompts": 100,
        "n": 100,
        "wins": wins,
        "losses": 100 - wins,
        "ties": 0,
        "win_rate": win_rate,
        "confidence": 0.95,
        "low": win_rate - 0.1,
        "high": win_rate + 0.1,
        "mean_tokens": 9.0,
    }


def test(family, a, b, difference, p):
    return {
        "family": family,
        "model_a": a,
        "model_b": b,
        "temperature": 1.0,
        "num_prompts": 100,
        "difference": difference,
        "low": difference - 0.1,
        "high": difference + 0.1,
        "mcnemar_p_holm": p,
        "permutation_p_holm": p,
    }


test.__test__ = False


def evaluated(*tests, rewards=()):
    return EvaluationFolder(
        folder=Path("runs/evaluation"),
        meta={},
        win_rates=[
            rate("my sft", 0.5),
            rate("dpo", 0.62),
            rate("dpo", 0.9, temperature=0.1),
            rate("polite", 0.6, kind="null", temperature=None),
        ],
        tests=list(tests),
        rewards=list(rewards),
        head_to_head=[],
        agreement=[],
        judgements=[],
        diagnostics={},
    )


@pytest.mark.parametrize(
    ("difference", "p", "words"),
    [
        (0.02, 0.4, "(polite) gets 60.0%: the two cannot be told apart"),
        (0.3, 0.001, "the model is above it"),
        (-0.3, 0.0, "the model is below it"),
    ],
)
def test_a_win_rate_is_read_against_the_strongest_null(difference, p, words):
    [sentence] = evaluation_verdict(evaluated(test("null", "dpo", "polite", difference, p)))
    assert sentence.startswith("At temperature 1, dpo wins 62.0% [52.0%, 72.0%] of 100 decided")
    assert words in sentence


@pytest.mark.parametrize(
    ("first", "difference", "p", "words"),
    [
        ("dpo", 0.12, 0.01, "Against my sft on the same 100 prompts it is +12.0 points"),
        ("my sft", -0.12, 0.01, "it is +12.0 points [+2.0, +22.0] (p = 0.010): higher."),
        ("my sft", -0.12, 0.2, "cannot be told apart"),
    ],
)
def test_the_sft_model_is_the_rival_in_whichever_order_it_was_tested(first, difference, p, words):
    second = "my sft" if first == "dpo" else "dpo"
    verdict = evaluation_verdict(evaluated(test("models", first, second, difference, p)))
    assert says(verdict, words)


def test_true_rewards_are_apart_only_where_their_intervals_are():
    rows = [
        {"model": "a", "temperature": "1.0", "reward": "1.0", "low": "0.9", "high": "1.1"},
        {"model": "b", "temperature": "1.0", "reward": "1.5", "low": "1.4", "high": "1.6"},
    ]
    assert says(evaluation_verdict(evaluated(rewards=rows)), "above that of every other model")
    rows[0]["high"] = "1.45"
    assert says(evaluation_verdict(evaluated(rewards=rows)), "overlaps with that of a")


def test_an_evaluation_without_a_decided_response_has_no_win_rate():
    found = evaluated()
    found.win_rates.clear()
    assert evaluation_verdict(found) == ["No model's response was decided: there is no win rate."]


def test_the_recorded_study_of_losses_counts_what_its_tests_say():
    study = gather(ROOT / "studies" / "results" / "losses")
    assert isinstance(study, StudyFolder)
    assert study.command == "experiment losses"
    tested = [row for row in study.table if row["p_holm"]]
    higher = [r for r in tested if float(r["p_holm"]) < 0.05 and float(r["difference"]) > 0]
    [sentence] = study_verdict(study)
    assert f"Of {len(tested)} methods compared with DPO" in sentence
    assert f"{len(higher)} have a higher true reward" in sentence


def test_claims_are_counted_by_what_they_hold():
    head = ["claim", "measured as", "against PPO"]
    lines = [
        ["a", "b", f"1: {said}"] for said in ("**holds**", "**does not hold**", "open", "open")
    ]
    study = StudyFolder(
        folder=Path("runs/exact"),
        command="experiment exact",
        config={},
        manifest={},
        table=[],
        tables={"claims": [head, *lines]},
        evaluation=None,
        runs=[],
    )
    assert study_verdict(study) == [
        "Of the 4 ways in which DPO is compared against PPO, 1 speak for it, 1 speak against it, "
        "and 2 cannot be told."
    ]


# -- texts ---------------------------------------------------------------------------------------


def test_samples_in_the_page_are_data_whatever_they_say():
    answer = Response(name="dpo", text=NASTY, verdict="win")
    text = Samples([Sample(NASTY, [answer])], 1, "scored.jsonl").as_json()
    assert text.isascii()
    assert not set("<>&") & set(text)
    [sample] = json.loads(text)
    assert sample["prompt"] == page_text(NASTY)
    assert "</script><script>alert(1)</script>" in sample["responses"][0]["text"]


def test_what_a_page_shows_is_escaped_and_written_out():
    html = render(Page(NASTY, NASTY, [NASTY], [Section("a", NASTY, [Prose([NASTY])])]))
    assert html.count("&lt;/script&gt;&lt;script&gt;alert(1)") >= 5
    assert Elements(html).tags.count("script") == 1
    for character in ("\u2028", "\u202e", "\x1b", "\ud800"):
        assert character not in html
        assert ascii(character)[1:-1] in html
    html.encode("utf-8")


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded():
    html = render(Page("a", "b", [], []))
    script = re.search(r"<script>(.*?)</script>", html, flags=re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Security-Policy" content="([^"]*)"', html).group(1).replace("&#39;", "'")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["img-src"] == "data:"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), ("3.0", "3"), (True, "True"), ("nan", "nan"), (None, ""), ("x", "x")],
)
def test_numbers_are_short_and_words_stay(value, text):
    assert decimal(value) == text


# -- samples -------------------------------------------------------------------------------------


def scored(folder, num_prompts, length=10):
    lines = [
        {
            "model": "dpo",
            "kind": "model",
            "temperature": 1.0,
            "prompt_index": i,
            "sample": 0,
            "prompt": f"question {i}",
            "chosen": "yes",
            "rejected": "no",
            "generated": "x" * length,
            "num_tokens": 3,
            "truncated": False,
            "verdict": "win",
            "cos_chosen": 0.9,
            "cos_rejected": 0.1,
            "margin": 0.8,
        }
        for i in range(num_prompts)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "scored.jsonl").write_text(text)
    return folder


def test_a_large_evaluation_keeps_to_the_limits_and_says_what_is_left_out(tmp_path):
    found = of_evaluation(scored(tmp_path, 5_000))
    assert len(found.samples) == 2_000
    assert found.origin() == (
        "The page holds 2,000 of 5,000 prompts (at most 2,000 responses); all are in scored.jsonl."
    )
    assert len(found.as_json()) < 1_000_000


def test_a_small_evaluation_is_whole_and_its_nulls_are_no_samples(tmp_path):
    found = of_evaluation(scored(tmp_path, 3))
    assert (len(found.samples), found.origin()) == (3, "All of scored.jsonl.")
    assert of_evaluation(evaluation()).models == ["sft", "dpo"]


def test_a_very_long_text_ends_with_how_much_is_missing(tmp_path):
    [sample] = of_evaluation(scored(tmp_path, 1, length=MAX_TEXT + 7)).samples
    assert sample.responses[-1].text.endswith("… (7 more characters)")


def test_the_generations_of_a_run_stand_beside_the_answers_of_the_data():
    found = of_run(dpo_run(), "mine")
    assert {tuple(r.name for r in s.responses) for s in found.samples} == {
        ("chosen", "rejected", "mine")
    }


def test_scored_held_out_rows_say_which_were_judged_right(tmp_path):
    rows = [
        {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1], "rewards": [r, 0.0]}
        for r in (1.0, -1.0, 0.0)
    ]
    (tmp_path / "samples").mkdir()
    lines = "".join(json.dumps({"source": "f:1", **row}) + "\n" for row in rows)
    (tmp_path / "samples" / "held_out.jsonl").write_text(lines)
    found = of_run(tmp_path, "reward")
    assert [s.responses[0].verdict for s in found.samples] == ["right", "wrong", "tie"]
    assert [m.margin for m in held_out_margins(tmp_path)] == [1.0, -1.0, 0.0]


# -- pages ---------------------------------------------------------------------------------------


def test_every_command_has_left_its_page():
    for folder in (sft_run(), dpo_run(), evaluation()):
        html = (folder / "index.html").read_text(encoding="utf-8")
        found = Elements(html)
        assert found.tags.count("h1") == 1
        assert "What was run" in html
        assert "How to reproduce" in html
        outside = [a for a in found.addresses if not a.startswith(("data:", "#", "./"))]
        assert not outside


def test_report_gives_the_same_page_again(tmp_path):
    folder = shutil.copytree(dpo_run(), tmp_path / "dpo")
    before = (folder / "index.html").read_bytes().replace(str(dpo_run()).encode(), b"HERE")
    (folder / "index.html").unlink()
    said = dpo("report", folder)
    assert said.code == 0, said.all
    after = (folder / "index.html").read_bytes().replace(str(folder).encode(), b"HERE")
    assert after == before


def test_report_draws_what_is_not_drawn_yet(tmp_path):
    folder = shutil.copytree(dpo_run(), tmp_path / "dpo")
    shutil.rmtree(folder / "figures")
    assert dpo("report", folder).code == 0
    assert {f.suffix for f in (folder / "figures").iterdir()} == {".csv", ".png", ".svg"}
    assert "data:image/svg+xml;base64," in (folder / "index.html").read_text()


def test_the_curves_of_an_online_run_have_the_reward_of_its_samples(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "ppo", "seed": 0}')
    rows = [{"step": 0, "eval/loss": 0.0, "eval/reward": 1.5, "eval/reward_stderr": 0.1}]
    rows += [{"step": 1, "loss": 0.1, "samples/reward": 1.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write.write_page(tmp_path)
    drawn = (tmp_path / "figures" / "training.csv").read_text()
    assert "eval/reward,0.0,1.5" in drawn
    assert "samples/reward,1.0,1.25" in drawn


def test_a_run_knows_what_its_data_hold():
    counts = json.loads((dpo_run() / "data.json").read_text())
    assert counts["num_rows"] + counts["num_test_rows"] == 96
    assert counts["num_overlapping_prompts"] == 0
    page = page_of(gather(dpo_run()))
    [data] = [section for section in page.sections if section.id == "data"]
    assert ("Training rows", str(counts["num_rows"])) in data.blocks[0].pairs


def test_a_part_that_is_not_there_is_left_out(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "sft", "seed": 0}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 5.0}\n')
    sections = [section.id for section in page_of(gather(tmp_path)).sections]
    assert sections == ["run", "results", "configuration", "reproduce"]


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_folder_that_holds_nothing_of_ours_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    said = dpo("report", tmp_path / folder)
    assert said.code == 2
    assert folder in said.err


@pytest.mark.parametrize("name", ["exact", "frontier", "losses", "sentiment-small"])
def test_the_recorded_studies_have_pages(tmp_path, name):
    folder = shutil.copytree(ROOT / "studies" / "results" / name, tmp_path / name)
    write.write_page(folder)
    found = Elements((folder / "index.html").read_text(encoding="utf-8"))
    assert "table" in found.tags
    assert "img" in found.tags


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, caplog):
    def fail(folder):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(write, "write_page", fail)
    monkeypatch.setattr(logging.getLogger("dpo"), "propagate", True)
    with caplog.at_level("WARNING", "dpo"):
        write.leave_page(tmp_path)
    [record] = [record for record in caplog.records if record.name == "dpo"]
    assert record.levelname == "WARNING"
    assert "could not be written (first line second line)" in record.getMessage()


def test_a_finished_run_stays_finished_without_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.report.page.write.render", lambda page: 1 / 0)
    said = dpo("train", *words_of(dpo_config(tmp_path / "run")))
    assert said.code == 0, said.all
    assert read_manifest(tmp_path / "run")["status"] == "finished"
    assert not (tmp_path / "run" / "index.html").exists()


def test_warnings_stand_before_what_is_in_order():
    run = run_folder({"loss": 0.7}, {"loss": 0.6})
    for level in ("ok", "note", "warning"):
        reading = {"level": level, "title": level, "sentence": "Said.", "what_to_do": ""}
        run.diagnostics.setdefault("readings", []).append(reading)
    readings = diagnostics_blocks(Path("nowhere"), run.diagnostics)[0].readings
    assert [reading.level for reading in readings] == ["warning", "note", "ok"]


def test_other_judges_and_the_power_of_the_tests_are_shown():
    verdict = {"judge": "reward", "a": "dpo", "b": "chosen", "temperature": "1.0", "n": "40"}
    verdict |= {"win_rate": "0.25", "low": "0.1", "high": "0.4", "ties": "3", "sign_p_holm": "0.01"}
    found = evaluated(test("models", "dpo", "my sft", 0.1, 0.2))
    found.head_to_head.append(verdict)
    family = {"family": "models", "num_prompts": 77, "prompts_needed": 1004}
    family["smallest_difference"] = 0.178
    found.meta["power"] = {"difference": 0.05, "power": 0.8, "families": [family]}
    tables = {block.caption: block for block in result_tables(found)}
    assert tables["Head to head"].rows == [
        ["reward", "dpo against chosen", "1", "40", "25.0%", "[10.0%, 40.0%]", "3", "p = 0.010"]
    ]
    note = tables["Paired tests on the same prompts"].note
    assert "5 points shows with probability 80% on 1,004 prompts" in note
    assert "on these 77 one of 17.8 points does" in note


def test_head_to_head_is_drawn_from_the_table_where_it_is_not_drawn_yet(tmp_path):
    folder = shutil.copytree(evaluation(), tmp_path / "evaluation")
    said = [
        JudgedMatchup(
            judge=judge,
            family=family,
            a="dpo",
            b="sft",
            temperature=temperature,
            prompt_index=i,
            sample=0,
            verdict="tie" if judge == "k" else "loss" if i == 0 else "win",
        )
        for judge in "jk"
        for family, temperature in (("models", 0.5), ("nulls", None))
        for i in range(4)
    ]
    text = csv_text(HeadToHead, head_to_head_table(said))
    (folder / "head_to_head.csv").write_text(text, encoding="utf-8")
    write.write_page(folder)
    assert (folder / "figures" / "head_to_head.csv").read_text(encoding="utf-8") == text
    [results] = [part for part in page_of(gather(folder)).sections if part.id == "results"]
    figures = [block.csv for block in results.blocks if isinstance(block, Figure)]
    assert figures == ["figures/win_rate.csv", "figures/head_to_head.csv"]


def test_a_table_of_another_version_is_no_reason_to_have_no_page(tmp_path):
    folder = shutil.copytree(evaluation(), tmp_path / "evaluation")
    row = "judge,a,b,temperature,n,win_rate,low,high,ties,sign_p_holm\nj,dpo,sft,,2,0.5,0,1,0,1\n"
    (folder / "head_to_head.csv").write_text(row)
    write.write_page(folder)
    assert not (folder / "figures" / "head_to_head.csv").exists()
    assert "dpo against sft" in (folder / "index.html").read_text(encoding="utf-8")


def judge_some(folder, *annotators):
    """Each of them judged four pairs and found that the first one of the two won three."""
    file = JudgementFile(folder / "judgements.jsonl")
    for annotator in annotators:
        for number in range(4):
            file.append(
                Judgement(
                    pair=str(number),
                    prompt_digest=str(number),
                    a="dpo",
                    b="sft",
                    temperature=1.0,
                    sample=0,
                    left="a" if number < 2 else "b",
                    verdict="win" if number else "loss",
                    annotator=annotator,
                    seconds=2.0,
                    timestamp="2026-01-01T00:00:00Z",
                )
            )
    file.close()


def people_of(folder):
    [people] = [part for part in page_of(gather(folder)).sections if part.id == "people"]
    return people.blocks


@pytest.mark.parametrize("made", [evaluation, dpo_run], ids=["evaluation", "run"])
def test_what_people_judged_is_in_the_page_of_the_folder(tmp_path, made):
    folder = shutil.copytree(made(), tmp_path / "folder")
    judge_some(folder, "ann", "bob")
    pair, facts = people_of(folder)
    assert pair.paragraphs == ["dpo against sft"]
    said = dict(facts.pairs)
    low, high = clustered_wilson_interval([0, 1, 1, 1] * 2, [*range(4)] * 2)
    rate = f"75.0% [{100 * low:.1f}, {100 * high:.1f}], n = 8"
    assert said["Win rate of dpo against sft"] == rate
    assert said["Answer on the left won"].startswith("25.0% [")  # one of the four, twice
    assert said["ann and bob agree"].startswith("100.0% of 4 pairs; Cohen's kappa 1.00")
    html = write.write_page(folder).read_text(encoding="utf-8")
    assert "What people say" in html
    assert rate in html


def test_a_study_shows_what_people_judged_of_its_evaluation_and_of_its_runs(tmp_path):
    (tmp_path / "table.csv").write_text("method\ndpo\n")
    shutil.copytree(evaluation(), tmp_path / "evaluation")
    shutil.copytree(dpo_run(), tmp_path / "runs" / "dpo")
    assert not [part for part in page_of(gather(tmp_path)).sections if part.id == "people"]
    judge_some(tmp_path / "evaluation", "ann")
    judge_some(tmp_path / "runs" / "dpo", "bob")
    assert [block.kind for block in people_of(tmp_path)] == ["prose", "facts"] * 2


def test_a_study_shows_what_was_found_in_each_run_with_the_way_to_its_page(tmp_path):
    (tmp_path / "table.csv").write_text("method\ndpo\n")
    shutil.copytree(evaluation(), tmp_path / "evaluation")
    run = shutil.copytree(dpo_run(), tmp_path / "runs" / "dpo")
    shutil.copytree(sft_run(), tmp_path / "runs" / "sft")  # is not diagnosed
    readings = [{"level": level, "title": f"A {level}"} for level in ("note", "warning", "ok")]
    readings.append({"level": "warning", "title": "Another"})
    (run / "diagnostics.json").write_text(json.dumps({"readings": readings}))
    page = page_of(gather(tmp_path))
    [found] = [part for part in page.sections if part.id == "diagnostics"]
    [row] = found.blocks[0].rows
    assert (row[0].text, row[0].href) == ("runs/dpo", "./runs/dpo/index.html#diagnostics")
    assert row[1:] == ["A warning, Another", "A note"]
    figures = [block.csv for block in found.blocks if isinstance(block, Figure)]
    assert figures == ["evaluation/figures/length_controlled.csv"]
    assert [block.kind for block in found.blocks][1] == "readings"  # of the evaluation
    write.write_page(tmp_path)
    assert 'id="diagnostics"' in (run / "index.html").read_text(encoding="utf-8")


def test_a_column_of_numbers_is_set_to_the_right_and_one_of_words_is_not():
    rows = [["dpo", "0.5 [0.4, 0.6]", "p < 0.001"], ["sft", "", "-1"], ["x", "[0, 1]", "yes"]]
    assert Table(["a", "b", "c"], rows).alignments == ["text", "number", "text"]


# -- commands ------------------------------------------------------------------------------------


def words_again(command):
    """A command line as the shell takes it apart, without `dpo COMMAND` and the folder."""
    words = shlex.split(command.replace("\\\n", " "))
    return [word for word in words[2:] if not word.startswith("out=")]


@pytest.mark.parametrize("run", [sft_run, dpo_run])
def test_the_command_of_a_run_gives_its_configuration_again(run):
    config = json.loads((run() / "config.json").read_text())
    words = words_again(command_line(config["command"], config, run()))
    again = read_config(SCHEMAS[config["command"]], None, [*words, "out=x"])
    assert again.identity == settings_of(config)
    assert not [word for word in words if word.startswith("precision")]  # a default


def test_the_command_of_an_evaluation_gives_its_configuration_again():
    meta = json.loads((evaluation() / "win_rates.json").read_text())["meta"]
    words = words_again(command_line("evaluate", settings_of_evaluation(meta), evaluation()))
    again = read_config(SCHEMAS["evaluate"], None, [*words, "out=x"])
    dumped = again.model_dump(mode="json", exclude={"out", "sentence_model"})
    assert dumped == {key: meta[key] for key in dumped}
    assert again.sentence_model.path == "offline"


def test_names_with_dots_and_spaces_survive_the_command():
    config = {
        "models": {"DPO beta 0.3": "runs/a b"},
        "data": {"path": "p.jsonl", "columns": {"prompt": "q.x"}},
    }
    words = words_again(command_line("evaluate", config, Path("out")))
    again = read_config(SCHEMAS["evaluate"], None, [*words, "out=x"])
    assert again.models == {"DPO beta 0.3": "runs/a b"}
    assert again.data.columns == {"prompt": "q.x"}


STUDIES = {
    "exact": ExactStudyConfig,
    "frontier": FrontierConfig,
    "instruction": StudyConfig,
    "losses": LossStudyConfig,
    "sentiment": SentimentConfig,
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_a_file_that_its_command_takes_again(tmp_path, name):
    config = read_config(STUDIES[name], ROOT / "studies" / f"{name}.yaml", ["seeds=[0, 1]"])
    settings = config.model_dump(mode="json")
    (tmp_path / "study.json").write_text(json.dumps({"config": settings}))
    (tmp_path / "config.json").write_text(json.dumps({"command": f"experiment {name}"}))
    write.leave_page(tmp_path, config)
    again = read_config(STUDIES[name], tmp_path / "study.yaml")
    assert again.model_dump(mode="json") == settings
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"dpo experiment {name} {tmp_path / 'study.yaml'} out=another-folder" in html


# -- comparisons ---------------------------------------------------------------------------------


def other_run(tmp_path):
    """The same run with another beta and other held-out numbers."""
    folder = shutil.copytree(dpo_run(), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["loss"]["beta"] = 0.7
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_comparison_never_takes_the_place_of_a_runs_page(tmp_path):
    other = other_run(tmp_path)
    before = (other / "index.html").read_bytes()
    said = dpo("compare", dpo_run(), other, "--out", other)
    assert said.code == 2
    assert said.err == f"--out: {other} is a run, whose own page would be lost; name another."
    assert (other / "index.html").read_bytes() == before
    (tmp_path / "file").touch()
    said = dpo("compare", dpo_run(), other, "--out", tmp_path / "file")
    assert (said.code, "a part of the path is a file" in said.err) == (5, True), said.err


def test_runs_side_by_side_show_what_differs_and_only_that(tmp_path):
    out = tmp_path / "comparison"
    said = dpo("compare", dpo_run(), other_run(tmp_path), "--out", out)
    assert said.code == 0, said.all
    runs = compare.gather_runs([dpo_run(), tmp_path / "other"])
    assert [row[0] for row in compare.differences_table(runs).rows] == ["loss.beta"]
    assert compare.shared_samples(runs).models == ["dpo", "other"]
    html = (out / "index.html").read_text(encoding="utf-8")
    assert "loss.beta" in html
    assert (out / "figures" / "comparison.csv").is_file()


def with_margins(signs, data="same"):
    run = run_folder({"loss": 0.7}, {"loss": 0.6}, margins=signs)
    run.config["resolved"] = {"data_sha256": data}
    return run


def test_runs_on_the_same_pairs_are_tested_and_told_apart():
    runs = {"a": with_margins([1.0] * 20), "b": with_margins([-1.0] * 10 + [1.0] * 10)}
    [test] = compare.paired_accuracies(runs)
    assert (test.num_pairs, test.difference) == (20, 0.5)
    assert test.p == pytest.approx(2 * 0.5**10)
    assert says(compare.comparison_verdict(runs, [test]), "a ranks the chosen response first more")


def test_equal_runs_cannot_be_told_apart_and_other_data_is_not_tested():
    runs = {"a": with_margins([1.0] * 20), "b": with_margins([1.0] * 20)}
    tests = compare.paired_accuracies(runs)
    assert says(compare.comparison_verdict(runs, tests), "no two of the 2 runs can be told apart")
    elsewhere = {"a": with_margins([1.0]), "b": with_margins([1.0], data="another")}
    assert compare.paired_accuracies(elsewhere) == []
    assert says(compare.comparison_verdict(elsewhere, []), "nothing is tested")


def test_a_comparison_needs_two_different_runs(tmp_path):
    for runs in ([dpo_run()], [dpo_run(), dpo_run()]):
        assert dpo("compare", *runs, "--out", tmp_path).code == 2
    with pytest.raises(InputError, match="is no run"):
        compare.gather_runs([dpo_run(), evaluation()])
