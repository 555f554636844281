"""`dpo evaluate backend=vllm` and studies that ask for it, with a stand-in for vLLM itself."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.config_files import validate
from dpo.errors import InputError
from dpo.evaluate import jobs
from dpo.evaluate.jobs import evaluate, generate_with, held_out_rows
from dpo.experiment.study_config import StudyConfig, plan
from dpo.train.prepare import load_preferences
from evaluate.test_jobs import Judge
from experiment.tiny_study import TINY
from models import vllm_stand_in
from train.small_runs import evaluate_config, sft_run


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in)
    monkeypatch.setattr(vllm_stand_in.LLM, "started", 0)
    monkeypatch.setattr(jobs, "load_sentence_model", lambda name: Judge())
    return vllm_stand_in


def config(out, **changes):
    quick = {"temperatures": [0.0], "max_prompts": 5, "max_new_tokens": 6, "backend": "vllm"}
    return evaluate_config(out, quick | {"models": {"m": str(sft_run())}} | changes)


def told(records):
    return [(r.prompt_index, r.generated, r.num_tokens, r.truncated) for r in records]


def test_greedy_responses_are_those_of_transformers_with_the_models_own_template(vllm, tmp_path):
    folder = shutil.copytree(sft_run() / "model", tmp_path / "sharp")  # else all answers are alike
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    random = {name: torch.randn_like(w) if w.dim() >= 2 else w for name, w in weights.items()}
    save_file(random, folder / "model.safetensors", metadata={"format": "pt"})
    models = {"m": str(folder)}
    ours = evaluate(config(tmp_path / "ours", models=models, backend="transformers"))
    theirs = evaluate(config(tmp_path / "theirs", models=models))
    assert vllm.LLM.started == 1
    assert told(theirs.scored) == told(ours.scored)
    assert len({record.generated for record in theirs.scored if record.kind == "model"}) > 1


def test_nothing_is_sampled_twice_nor_answered_from_the_other_backend(vllm, tmp_path):
    first = evaluate(config(tmp_path, temperatures=[1.0]))
    assert vllm.LLM.started == 1
    assert evaluate(config(tmp_path, temperatures=[1.0])).scored == first.scored
    assert vllm.LLM.started == 1
    evaluate(config(tmp_path, temperatures=[1.0], backend="transformers"))
    assert len(list((tmp_path / "generations").iterdir())) == 2
    meta = json.loads((tmp_path / "win_rates.json").read_text())["meta"]
    assert meta["backend"] == "transformers"


def test_each_model_has_the_gpu_for_itself(vllm, tmp_path, monkeypatch):
    alone = []
    start = vllm.LLM.__init__

    def counting(engine, *args, **options):
        alone.append(len(vllm.LLM.alive))
        start(engine, *args, **options)

    monkeypatch.setattr(vllm.LLM, "__init__", counting)
    models = {"a": str(sft_run()), "b": str(sft_run() / "best")}
    evaluate(config(tmp_path, models=models))
    assert alone == [0, 0]
    assert not vllm.LLM.alive


def test_samples_for_best_of_n_differ_and_do_not_depend_on_the_batch(vllm, tmp_path):
    def drawn(batch_size, out):
        several = config(out, temperatures=[1.0], samples_per_prompt=4, batch_size=batch_size)
        data = load_preferences(several.data)
        rows = held_out_rows(data, several.max_prompts, several.seed)
        return told(generate_with("m", str(sft_run()), data, rows, several, lambda done: None))

    found = drawn(32, tmp_path / "32")
    assert len(found) == 20
    assert len(set(found)) > 15
    assert drawn(1, tmp_path / "1") == found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperatures": [1.0, 0.001]}, "vLLM takes the temperature 0 and those from 0.01"),
        ({"models": {"m": "ADAPTER"}}, "it is an adapter"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_data_or_judge_are_read(
    vllm, tmp_path, monkeypatch, changes, says
):
    monkeypatch.setattr(jobs, "load_preferences", None)  # calling it would fail
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    if "models" in changes:
        changes = {"models": {"m": str(tmp_path / "adapter")}}
    with pytest.raises(InputError, match=says):
        evaluate(config(tmp_path / "out", **changes))


def test_another_models_tokenizer_is_refused(vllm, tmp_path):
    model = shutil.copytree(sft_run() / "model", tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"vocab_size": 9}))
    with pytest.raises(InputError, match="they do not belong together"):
        evaluate(config(tmp_path / "out", models={"m": str(model)}))


def study(**changes):
    evaluation = {"backend": "vllm", "max_new_tokens": 8}
    return validate(StudyConfig, TINY | {"out": "x", "evaluation": evaluation} | changes)


def test_a_study_asks_for_vllm_before_it_trains(vllm, monkeypatch):
    assert plan(study()).evaluation.backend == "vllm"
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vllm cannot be imported"):
        plan(study())


def test_a_study_whose_runs_leave_adapters_is_refused_before_it_trains(vllm):
    with pytest.raises(InputError, match=r"evaluation.backend: DPO beta .* leaves an adapter"):
        plan(study(dpo={"adapter": "lora"}))
