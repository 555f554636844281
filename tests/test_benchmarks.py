"""The benchmark compares like with like: the same losses, the same batches, a floor that is one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"layers": 2, "width": 64, "vocab": 500, "max_length": 96, "batch": 2, "steps": 2}


@pytest.fixture
def module(monkeypatch):
    """Imports a module of benchmarks/, whose files find each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(module, monkeypatch):
    """Runs a tiny scenario in this process, without the processes that measure memory."""
    needs_trl()
    monkeypatch.setenv("TQDM_DISABLE", "1")  # set by the run, so that it is taken back
    runner = module("run")
    memory = {"before_bytes": 0, "peak_bytes": 0, "seconds": []}
    monkeypatch.setattr(runner, "measure", lambda name, scenario: memory)

    def tiny(task, **options):
        scenario = module("scenario").Scenario(task, **TINY, **options)
        return runner.run(scenario, command="")

    return tiny


def needs_trl():
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = None
    if found != "1.16.0":
        pytest.skip("trl 1.16.0 is not installed (the extra `bench`)")


def python(script, *words):
    command = [sys.executable, str(BENCHMARKS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("task", ["dpo", "sft"])
def test_ours_and_both_settings_of_trl_give_the_same_losses(task, run):
    contestants = run(task, learning_rate=3e-3)["contestants"]
    assert list(contestants) == ["ours", "trl-best", "trl-default"]
    ours = torch.tensor(contestants["ours"]["losses"])
    assert ours.shape == (3,)
    moved = (ours[1:] - ours[0]).abs()
    assert moved.min() > 1e-3  # the updates matter, so agreement says something of them too
    for contestant in contestants.values():
        torch.testing.assert_close(torch.tensor(contestant["losses"]), ours, rtol=0, atol=2e-5)
        assert min(contestant["seconds"]) > 0


def test_losses_that_differ_in_float32_do_not_pass(module):
    results = module("results")
    result = {
        "scenario": {"precision": "fp32"},
        "contestants": {"ours": {"losses": [0.5, 0.4]}, "trl-best": {"losses": [0.5, 0.40003]}},
    }
    assert not results.losses_agree(result)
    assert results.losses_agree({**result, "scenario": {"precision": "bf16"}})


def test_both_sides_of_generation_give_the_same_greedy_responses(run):
    result = run("generate", samples=2, max_new_tokens=8)
    assert result["greedy_agreement"] == 1
    for contestant in result["contestants"].values():
        tokens = torch.tensor(contestant["tokens"])
        assert ((tokens >= 4) & (tokens <= 4 * 8)).all()  # 2 prompts, 2 samples of 1 to 8 tokens


@pytest.mark.slow
def test_the_command_records_a_result_and_the_report_shows_it(tmp_path):
    needs_trl()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    done = python("compare.py", "dpo", *options, "--out", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results" / "dpo-random-fp32.json").read_text()
    assert str(tmp_path) not in text
    for contestant in json.loads(text)["contestants"].values():
        assert contestant["memory"]["peak_bytes"] > contestant["memory"]["before_bytes"] > 0
    written = (BENCHMARKS / "README.md").read_text()
    readme = tmp_path / "README.md"
    readme.write_text(written)
    done = python("report.py", "--results", str(tmp_path / "results"), "--readme", str(readme))
    assert done.returncode == 0, done.stderr
    assert "### DPO step, random, fp32" in readme.read_text()
    assert readme.read_text().endswith(written.partition("<!-- end")[2])
    assert (tmp_path / "figures" / "steps.svg").is_file()


def test_an_option_without_effect_is_refused():
    done = python("compare.py", "sft", "--beta", "0.5")
    assert done.returncode == 2
    assert "--beta" in done.stderr


def test_a_missing_or_other_trl_is_named_with_what_to_install(module, monkeypatch):
    trl_side = module("trl_side")
    monkeypatch.setattr(trl_side, "version", lambda name: "1.15.0")
    assert "1.15.0 is installed: pip install" in trl_side.missing()


def test_the_floor_counts_a_prompt_once_and_no_last_token(module):
    floor = module("floor")
    tree = floor.PrefixTree(prompt=5, responses=(3, 1))
    assert tree.unique_tokens == 5 + 2 + 0
    assert tree.scored_tokens == 4
    assert tree.attended == (1 + 2 + 3 + 4 + 5) + (6 + 7)
    products = floor.Products.of([tree], layers=2, width=10, vocab=100)
    assert products.trunk == 3 * 2 * (12 * 10 * 10) * 7  # qkv 3, out 1, MLP 4 + 4, times width^2
    assert products.attention == 3 * 2 * (10 + 10) * 28  # q k^T and p v
    assert products.head == 3 * 10 * 100 * 4


def test_a_workload_of_chosen_steps_repeats_their_batches(module):
    scenario = module("scenario").Scenario("dpo", batch=2, steps=4, vocab=50)
    workload = module("workload").make_workload(scenario)
    assert workload.num_steps == 5
    assert workload.of_steps([3, 0]).batches() == [workload.batch(3), workload.batch(0)]


def test_tokens_are_counted_up_to_the_one_that_ends_a_response(module):
    generation = module("generation")
    new = torch.tensor([[5, 9, 9, 9], [5, 5, 5, 5], [8, 1, 1, 1]])
    assert generation.count_tokens(new, torch.tensor([8, 9])) == 2 + 4 + 1


def test_only_one_loop_runs_and_the_first_to_step_rotates(module):
    stepwise = module("stepwise")
    trace = []

    def loop(name):
        def run(pause):
            for number in range(3):
                trace.append(f"{name}{number}")
                pause(float(number))

        return run

    loops = {name: stepwise.Stepwise(loop(name), threads=1) for name in "ab"}
    steps = stepwise.interleave(loops, 3)
    assert trace == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert [step.result for step in steps["a"]] == [0.0, 1.0, 2.0]


def test_a_loop_that_fails_fails_its_step(module):
    def loop(pause):
        pause(0.0)
        raise ValueError("no more")

    contestant = module("stepwise").Stepwise(loop, threads=1)
    contestant.step()
    with pytest.raises(RuntimeError, match="ended before this step") as caught:
        contestant.step()
    assert isinstance(caught.value.__cause__, ValueError)


def test_pairs_in_a_store_are_measured_on_the_same_work_as_pairs_in_memory(module, tmp_path):
    benchmark = module("data_memory")
    source = tmp_path / "shards"
    source.mkdir()
    benchmark.write_shards(source, 300)
    results = [
        {"num_pairs": 300, "store": kept} | benchmark.measure(source, kept, tmp_path / "cache")
        for kept in ("memory", "arrow")
    ]
    assert len({(r["num_training_pairs"], r["num_tokens"]) for r in results}) == 1
    assert 250 < results[0]["num_training_pairs"] < 300
    for result in results:
        assert result["peak"]["own_bytes"] >= result["before"]["own_bytes"] > 2**20
    shown = benchmark.table(results).splitlines()
    assert [line.split(" | ")[:2] for line in shown[2:]] == [
        ["| 300", "memory"],
        ["| 300", "arrow"],
    ]


def test_the_recorded_memory_of_pairs_is_what_the_readme_shows(module):
    recorded = json.loads((BENCHMARKS / "results" / "data" / "memory.json").read_text())
    table = module("data_memory").table(recorded["results"])
    assert table in (BENCHMARKS / "README.md").read_text()
