"""`dpo plan` as a user sees it."""

import json

from dpo.core.machines import GPUS
from dpo.plan_config import MachineConfig
from dpo.report.plan import machine_of
from train.small_runs import dpo, sft_run

BY_HAND = (
    "machine.memory_gib=2",
    "machine.fp32_tflops=1",
    "machine.bf16_tflops=2",
    "machine.memory_gb_per_second=100",
)


def plan(*words):
    return dpo("plan", f"model={sft_run()}", "data.synthetic.num_rows=96", "batch.size=8", *words)


def test_a_run_that_fits_is_said_to():
    said = plan("machine=H100")
    assert said.code == 0, said.all
    assert "H100: 80 GiB, 15% left free" in said.out
    assert "Fits as given." in said.out
    assert "gradient_checkpointing=true" in said.out
    assert "adapter=lora" in said.out


def test_one_that_does_not_fit_gets_settings_or_is_told_that_there_are_none():
    tight = plan(*BY_HAND, "machine.memory_gib=0.85")  # 0.7 of it are libraries
    assert tight.code == 0, tight.all
    none = plan(*BY_HAND, "machine.memory_gib=0.1")
    assert "None of these fits" in none.out
    assert " no " in none.out


def test_sft_is_planned_for_a_fresh_model_and_several_devices():
    words = ("model.fresh.width=32", "data.synthetic.num_rows=96", "machine.devices=2")
    said = dpo("plan", "sft", *words, *BY_HAND)
    assert said.code == 0, said.all
    assert "2 x the machine given" in said.out
    assert "distributed.kind=fsdp" in said.out


def test_what_is_offloaded_is_said_to_be_in_main_memory():
    eight = ("machine=H100", "machine.devices=8", "distributed.kind=fsdp")
    plain, offloaded = plan(*eight), plan(*eight, "distributed.cpu_offload=true")
    assert offloaded.code == 0, offloaded.all
    assert "Main memory holds" in offloaded.out
    assert "Main memory holds" not in plain.out
    assert "distributed.cpu_offload=true" in plain.out
    assert "optimizer.in_backward" not in plain.out  # for one process
    settings = offloaded.out.split("as given")[1].split("adapter=lora")[0]
    assert settings.count("gradient_checkpointing=true") == 3  # alone, in small passes, in bfloat16
    refused = plan(*BY_HAND, "distributed.kind=fsdp", "distributed.cpu_offload=true")
    assert refused.code == 0, refused.all  # a machine by hand is a GPU
    here = plan("distributed.kind=fsdp", "distributed.cpu_offload=true")
    assert here.code == 2
    assert "distributed.cpu_offload: is for GPUs" in here.err


def test_a_run_on_samples_is_planned_with_its_sampling(tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def score(prompts, responses):\n    return [0.0 for _ in responses]")
    words = (f"model={sft_run()}", "data.synthetic.num_rows=96", f"reward.function={judge}:score")
    said = dpo("plan", "ppo", *words, "sampling.max_new_tokens=8", *BY_HAND)
    assert said.code == 0, said.all
    assert "to draw and score 128 responses" in said.out
    assert "Every response is taken to have 8 tokens" in said.out
    assert "distributed.kind=fsdp" not in said.out
    assert "optimizer.in_backward" not in said.out  # PPO refuses it


def test_what_it_cannot_plan_is_one_sentence():
    assert plan("machine=H1000").code == 2
    assert "A100-40" in plan("machine=H1000").err
    assert plan("machine.devices=0").code == 2
    assert dpo("plan", "model.fresh.width=32").code == 2  # as dpo train
    assert dpo("plan", "model=./nothing").code == 2
    said = dpo("plan", "evaluate", "model=x")
    assert (
        said.err == "dpo plan: it estimates dpo sft, train, reward, online, ppo, not dpo evaluate."
    )


def test_a_machines_numbers_may_be_overridden():
    gpu = machine_of(MachineConfig(gpu="A100-80", utilisation=0.3))
    assert (gpu.bf16_tflops, gpu.utilisation) == (GPUS["A100-80"].bf16_tflops, 0.3)


def test_nothing_is_written(tmp_path, monkeypatch):
    sft_run()
    monkeypatch.chdir(tmp_path)
    assert plan("machine=L4").code == 0
    assert list(tmp_path.iterdir()) == []
    assert json.loads((sft_run() / "manifest.json").read_text())["status"] == "finished"
