"""GPT-2 medium's exact configuration, with random weights: the real model will load and fit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import validate
from dpo.train.jobs import train_preference, train_sft
from dpo.train.run import read_metrics

work, tokenizer, data = map(Path, sys.argv[1:])
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
num_parameters = sum(p.numel() for p in model.parameters())
model.save_pretrained(work / "gpt2-medium")
GPT2Tokenizer.from_pretrained(tokenizer).save_pretrained(work / "gpt2-medium")
del model
common = {
    "data": str(data),
    "max_steps": 1,
    "batch": {"size": 2, "max_tokens": 2048},
    "evaluation": {"max_rows": 2, "num_samples": 1, "max_new_tokens": 8},
}
sft = train_sft(
    validate(SFTConfig, {**common, "model": str(work / "gpt2-medium"), "out": str(work / "sft")})
)
common["evaluation"]["kl_prompts"] = 1
dpo = train_preference(
    validate(PreferenceConfig, {**common, "model": str(sft), "out": str(work / "dpo")})
)
sample = json.loads((dpo / "samples" / "final.jsonl").read_text(encoding="utf-8"))
print(json.dumps({
    "num_parameters": num_parameters,
    "sft": read_metrics(sft),
    "dpo": read_metrics(dpo),
    "generated": sample["generated"],
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


@pytest.mark.slow
def test_gpt2_mediums_exact_configuration_goes_through_sft_dpo_and_generation(
    shared_data, tmp_path
):
    rows = json.loads((shared_data / "instruction-preferences.json").read_text(encoding="utf-8"))
    data = tmp_path / "few.json"
    data.write_text(json.dumps(rows[10:40]), encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, tmp_path, shared_data / "gpt2-tokenizer", data]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["num_parameters"] == 354_823_168
    before, *_, after = [row["eval/loss"] for row in found["sft"] if "eval/loss" in row]
    assert after != before
    first = next(row for row in found["dpo"] if "loss" in row)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert found["generated"]
    print(f"peak memory {found['peak_gib']:.1f} GiB")
    assert found["peak_gib"] < 16
