"""What a run leaves for the eye."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dpo.report.data_check import check_data, print_check
from dpo.report.runs import finish_run, run_table
from dpo.report.settings import settings_of
from dpo.train.run import read_metrics
from train.small_runs import dpo_run, sft_run


def shown(renderable):
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def held_out(step, loss, **more):
    return {"step": step, "eval/loss": loss, **more}


def test_the_table_shows_start_best_and_end(tmp_path):
    (tmp_path / "manifest.json").write_text('{"best_step": 4}')
    metrics = [held_out(0, 0.6931), {"step": 1, "loss": 9}, held_out(4, 0.5), held_out(8, 0.7)]
    text = shown(run_table(tmp_path, metrics))
    header = next(line for line in text.splitlines() if "step" in line)
    row = next(line for line in text.splitlines() if "held-out loss" in line)
    assert [c in header for c in ("start (step 0)", "best (step 4)", "end (step 8)")] == [True] * 3
    assert row.replace("│", " ").split()[-3:] == ["0.6931", "0.5", "0.7"]


def test_numbers_that_are_not_finite_are_shown_as_they_are(tmp_path):
    text = shown(run_table(tmp_path, [held_out(0, 5.0, **{"eval/perplexity": "inf"})]))
    assert "inf" in text


@pytest.mark.parametrize("name", ["[red]x", "runs[/b]", "[link=file:x]y[/link]", "a[b]c"])
def test_a_folder_is_a_name_and_never_markup(tmp_path, name):
    assert name in shown(run_table(Path(name), [held_out(0, 1.0)]))


def test_a_finished_dpo_run_is_drawn_and_summarised(capsys):
    finish_run(dpo_run())
    out = " ".join(capsys.readouterr().out.split())
    for name in ("reward accuracy", "ties", "reward margin", "KL(policy || reference)"):
        assert name in out
    assert (dpo_run() / "figures" / "training.svg").stat().st_size > 1000


def test_sft_shows_perplexity_and_nothing_of_preferences():
    text = shown(run_table(sft_run(), read_metrics(sft_run())))
    assert "perplexity" in text
    assert "margin" not in text


def finished(tmp_path, change, margin):
    row = {"step": 0, "eval/loss": 0.6, "eval/rewards/margin": 0.0, "eval/logps/chosen_change": 0.0}
    last = row | {"step": 2, "eval/rewards/margin": margin, "eval/logps/chosen_change": change}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(last) + "\n")
    finish_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "margin", "explained"), [(-5.0, 1.0, True), (5.0, 1.0, False), (-5.0, -1.0, False)]
)
def test_a_falling_likelihood_of_chosen_responses_is_explained_where_it_happened(
    tmp_path, capsys, change, margin, explained
):
    finished(tmp_path, change, margin)
    out = " ".join(capsys.readouterr().out.split())
    assert ("The chosen responses became less likely while the margin grew" in out) is explained


def test_every_setting_has_a_meaning_or_is_plain_from_its_name():
    from dpo.config import PreferenceConfig, SFTConfig
    from dpo.config_files import known_keys
    from dpo.evaluation_config import EvaluateConfig

    for schema in (SFTConfig, PreferenceConfig, EvaluateConfig):
        rows = settings_of(schema)
        assert [key for key, _, _ in rows] == known_keys(schema)
        assert all(default != "PydanticUndefined" for _, default, _ in rows)
        assert ("out", "required") in [(key, default) for key, default, _ in rows]


EVIL = "\x1b[31mred\x1b[0m \x1b]0;title\x07 [bold]markup[/bold] [/] \x9b2J \r over"


@pytest.mark.parametrize("tokenizer", [False, True])
def test_control_sequences_and_markup_in_data_are_printed_harmlessly(tmp_path, capsys, tokenizer):
    data = tmp_path / "evil.jsonl"
    row = {"prompt": EVIL, "chosen": f"{EVIL} a", "rejected": f"{EVIL} b"}
    data.write_text(json.dumps(row) + "\n")
    check = check_data(
        [str(data)],
        tokenizer=str(sft_run()) if tokenizer else None,
        template=None,
        max_length=512,
        test=None,
        split=None,
        columns={},
    )
    print_check(check, num_shown=3)
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\x9b", "\r"}
    if tokenizer:
        assert "[bold]markup[/bold] [/]" in out.replace("|", "").replace("\n", "")
