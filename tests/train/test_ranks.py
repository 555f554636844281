"""Several ranks train what one process does; killed, stopped or silent, all end, and it goes on."""

import errno
import os
import signal
from functools import cache, partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.config import DistributedConfig, RewardConfig
from dpo.config_files import validate
from dpo.data.tokenize import TokenSequence
from dpo.errors import InputError, RankLost, Stopped
from dpo.models import parts
from dpo.models.adapters import WHOLE
from dpo.models.load import find_model, load_model
from dpo.models.scoring import response_logps
from dpo.train import ranks, reference, sharding
from dpo.train.in_parts import InParts
from dpo.train.reward import train_reward
from dpo.train.run import read_manifest
from dpo.train.schedule import adamw
from tiny_models import make
from train.several_ranks import (
    check_equal,
    numbers_of,
    on_ranks,
    signal_at,
    start,
    train,
    wait,
)
from train.small_runs import (
    DATA,
    dpo,
    dpo_config,
    merged,
    metrics_of,
    outcome,
    scratch,
    sft_config,
    sft_run,
)

COMMON = {
    "max_steps": 20,
    "save_every": 10,
    "evaluation.every": 10,
    "batch.max_tokens": 60,  # several passes, and not as many on both ranks
    "optimizer.epsilon": 1e-4,  # else AdamW makes steps of the rounding of gradients that are 0
}
MAKE = {"sft": sft_config, "dpo": dpo_config}
FSDP = {"kind": "fsdp"}
SHORT = {"max_steps": 4, "save_every": 2}


def config_of(method, kind, folder, changes=None):
    return MAKE[method](folder, COMMON | {"distributed.kind": kind} | (changes or {}))


@cache
def alone(method):
    sft_run()
    folder = scratch() / f"alone {method}"
    train(config_of(method, "ddp", folder))
    return folder


@cache
def together(method, kind):
    """A finished run of two ranks, undisturbed."""
    sft_run()
    folder = scratch() / f"two ranks {method} {kind}"
    config = config_of(method, kind, folder)
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_ranks_train_what_one_process_does(method, kind):
    one, two = alone(method), together(method, kind)
    steps = [row for row in metrics_of(one) if "loss" in row]
    assert max(row["num_passes"] for row in steps) > 2  # and two ranks make fewer
    assert sum(row["num_passes"] for row in metrics_of(two) if "loss" in row) < sum(
        row["num_passes"] for row in steps
    )
    check_equal(two, one)
    expected = load_file(one / "model" / "model.safetensors")
    found = load_file(two / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, atol=1e-5, rtol=0)
    assert read_manifest(two)["num_ranks"] == 2
    files = {f.relative_to(one) for f in one.rglob("*") if "events" not in f.name}
    shards = {f.relative_to(two) for f in two.rglob("*") if "events" not in f.name}
    if kind == "ddp":
        assert shards == files
    else:
        assert all("checkpoints" in f.parts for f in shards ^ files)


def test_two_sharded_ranks_train_with_rmsprop_what_one_process_does(tmp_path):
    changes = {"max_steps": 6, "optimizer.name": "rmsprop", "optimizer.learning_rate": 1e-3}
    sft_run()
    train(config_of("dpo", "ddp", tmp_path / "one", changes))
    config = config_of("dpo", "fsdp", tmp_path / "two", changes)
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    check_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(("method", "kind", "victim"), [("dpo", "ddp", 1), ("sft", "fsdp", 0)])
def test_one_rank_killed_ends_all_and_the_next_launch_ends_as_if_nothing_had_been(
    method, kind, victim, tmp_path
):
    expected, folder = outcome(together(method, kind)), tmp_path / "run"
    config = config_of(method, kind, folder)

    def killed(rank):
        if rank == victim:
            signal_at(13, signal.SIGKILL)
        train(config)

    codes = wait(start(2, killed, said=tmp_path), seconds=60)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == RankLost.exit_code == 6
    said = (tmp_path / f"rank-{1 - victim}.txt").read_text()
    assert f"Rank {1 - victim}: another process of the run ended" in said
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-00000010"]
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    assert outcome(folder) == expected


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_which_is_saved(kind, tmp_path):
    expected, folder = outcome(together("sft", kind)), tmp_path / "run"
    config = config_of("sft", kind, folder)

    def stopped(rank):
        if rank == 1:
            signal_at(3, signal.SIGTERM)
        train(config)

    assert on_ranks(2, stopped) == [Stopped.exit_code] * 2 == [75, 75]
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert [row["step"] for row in metrics_of(folder) if "loss" in row] == [1, 2, 3]
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    assert outcome(folder) == expected


def test_a_silent_rank_is_lost_after_the_timeout_and_the_others_end_with_a_sentence(tmp_path):
    config = config_of("sft", "ddp", tmp_path / "run", {"distributed.timeout_seconds": 3})

    def hung(rank):
        if rank == 1:
            signal_at(3, signal.SIGSTOP)
        train(config)

    processes = start(2, hung, said=tmp_path)
    try:
        assert wait(processes[:1], seconds=30) == [RankLost.exit_code]
    finally:
        os.kill(processes[1], signal.SIGKILL)
        os.waitpid(processes[1], 0)
    said = (tmp_path / "rank-0.txt").read_text()
    assert "did not answer for 3 seconds (distributed.timeout_seconds)" in said


def test_what_one_rank_refuses_all_refuse(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()

    def foreign(rank):
        train(config_of("sft", "ddp", tmp_path / "taken"))

    assert on_ranks(2, foreign, said=tmp_path) == [2, 2]
    assert "is not empty and holds no run" in (tmp_path / "rank-1.txt").read_text()

    def other_seed(rank):
        train(config_of("sft", "ddp", tmp_path / "run", {"seed": rank}))

    assert on_ranks(2, other_seed, said=tmp_path) == [2, 2]
    assert "of process 1 differs from that of process 0" in (tmp_path / "rank-0.txt").read_text()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("loss", ["kto", "bco_pair", "beta_dpo", "aot"])
def test_losses_whose_rows_act_on_one_another_are_those_of_the_whole_batch(loss, kind, tmp_path):
    changes = {"loss": {"name": loss}, "max_steps": 3, "data.synthetic.num_rows": 13}
    changes |= {"batch.size": 5, "evaluation.max_rows": 4}
    sft_run()
    train(config_of("dpo", "ddp", tmp_path / "one", changes))
    config = config_of("dpo", kind, tmp_path / "two", changes)
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    check_equal(tmp_path / "two", tmp_path / "one")


def test_a_short_batch_leaves_a_rank_without_rows(tmp_path):
    changes = {"data.synthetic.num_rows": 4, "data.test_fraction": 0.5, "batch.size": 1}
    changes |= {"max_steps": 3, "evaluation.every": 3}
    for kind in ("ddp", "fsdp"):
        config = config_of("sft", kind, tmp_path / kind, changes)
        assert on_ranks(2, lambda rank, config=config: train(config)) == [0, 0]
    train(config_of("sft", "ddp", tmp_path / "one", changes))
    for kind in ("ddp", "fsdp"):
        check_equal(tmp_path / kind, tmp_path / "one")


@pytest.mark.parametrize(
    ("kind", "adapter"), [("ddp", None), ("fsdp", None), ("fsdp", {"kind": "dora", "rank": 2})]
)
def test_a_reward_model_trains_as_in_one_process(kind, adapter, tmp_path):
    sft_run()

    def reward_config(folder, kind):
        changes = COMMON | {"max_steps": 4, "model": {"path": str(sft_run())}, "out": str(folder)}
        changes |= {"evaluation": {"every": 4, "max_rows": 16}, "distributed.kind": kind}
        changes |= {"adapter": adapter}
        return validate(RewardConfig, merged({"data": DATA, "batch": {"size": 8}}, changes))

    def train_alone_or_together(folder, kind="ddp", stop=False):
        if stop:
            signal_at(2, signal.SIGTERM)
        config = reward_config(folder, kind)
        with ranks.joined(config.distributed):
            train_reward(config)

    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    train_alone_or_together(one)
    assert on_ranks(2, lambda rank: train_alone_or_together(two, kind)) == [0, 0]
    check_equal(two, one)
    expected, found = (load_file(f / "model" / "model.safetensors") for f in (one, two))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, atol=1e-5, rtol=0)
    assert on_ranks(2, lambda rank: train_alone_or_together(again, kind, stop=True)) == [75, 75]
    assert on_ranks(2, lambda rank: train_alone_or_together(again, kind)) == [0, 0]
    assert outcome(again) == outcome(two)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_reference_log_probabilities_are_shared_out_and_are_the_same_bits(
    kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(reference, "CHUNK", 3)
    sequences = [TokenSequence(tuple(range(2, 9 + i % 5)), 1 + i % 3) for i in range(17)]

    def scored(rank, kind=kind):
        os.environ["DPO_CACHE"] = str(tmp_path / f"cache-{rank}")
        calls = []

        def counted(*arguments, **options):
            calls.append(len(arguments[1]))
            return response_logps(*arguments, **options)

        monkeypatch.setattr(reference, "response_logps", counted)
        config = validate(DistributedConfig, {"kind": kind})
        held = InParts() if kind == "fsdp" else WHOLE
        with ranks.joined(config):
            model = held.make(lambda: make("gpt2", 300))
            for cached in (False, True):
                values, known = reference.reference_logps(
                    model, sequences, precision="fp32", max_tokens=16
                )
                assert known is cached
            save_file({"values": values, "calls": torch.tensor(calls)}, tmp_path / f"{rank}")

    scored(0, "ddp")
    alone = load_file(tmp_path / "0")
    (tmp_path / "cache-0").rename(tmp_path / "cache of one")
    assert on_ranks(2, scored) == [0, 0]
    both = [load_file(tmp_path / f"{rank}") for rank in range(2)]
    assert all(torch.equal(found["values"], alone["values"]) for found in both)
    of_chunks = [[n for n in found["calls"].tolist() if n > 1] for found in both]
    assert of_chunks == [[3, 3, 3], [3, 3, 2]]  # with parts, passes of one sequence keep step
    assert not (tmp_path / "cache-1").exists()  # the first one keeps them
    kept = [[f.name for f in (tmp_path / n).rglob("*.*")] for n in ("cache of one", "cache-0")]
    assert kept[0] == kept[1]  # by the same key


def newest_checkpoint(folder):
    return max((folder / "checkpoints").glob("step-*"))


def restored(rank, folder, file, *, in_parts):
    """Read a checkpoint into a fresh model and write what was read, in one piece."""
    source = find_model(str(folder))
    settings = validate(DistributedConfig, FSDP if in_parts else {})
    with ranks.joined(settings):
        model = InParts().load(source) if in_parts else load_model(source)
        optimizer = adamw(model, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        sharding.read_shards(newest_checkpoint(folder), model, optimizer)
        found = {
            f"{name}/{entry}": parts.whole(value).contiguous()
            for name, parameter in model.named_parameters()
            for entry, value in ({"": parameter.detach()} | optimizer.state[parameter]).items()
        }
        if rank == 0:
            save_file(found, file)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_in_parts_is_read_exactly_by_any_number_of_ranks(kind, tmp_path):
    folder = together("sft", kind)  # with ddp it is whole, and is read in parts
    restored(0, folder, tmp_path / "alone", in_parts=False)
    expected = load_file(tmp_path / "alone")
    model = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(expected[f"{name}/"], weights) for name, weights in model.items())
    assert expected["transformer.wte.weight/step"] == 20
    assert expected["transformer.wte.weight/exp_avg_sq"].any()
    for size in (1, 2, 3):
        file = tmp_path / f"{size}"
        work = partial(restored, folder=folder, file=file, in_parts=True)
        assert on_ranks(size, work) == [0] * size
        found = load_file(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_goes_on_with_another_number_of_ranks_and_another_kind(tmp_path):
    folder = tmp_path / "run"

    def stopped(rank, step, kind):
        if rank == 0:
            signal_at(step, signal.SIGTERM)
        train(config_of("sft", kind, folder))

    assert on_ranks(2, partial(stopped, step=3, kind="fsdp")) == [75, 75]
    assert on_ranks(3, partial(stopped, step=7, kind="fsdp")) == [75] * 3
    assert on_ranks(2, partial(stopped, step=11, kind="ddp")) == [75, 75]
    assert on_ranks(1, partial(stopped, step=15, kind="fsdp")) == [75]
    train(config_of("sft", "ddp", folder))
    check_equal(folder, alone("sft"))


@pytest.mark.parametrize("adapter", [None, {"kind": "dora", "rank": 2}], ids=str)
def test_recomputation_and_bf16_work_in_parts(adapter, tmp_path):
    changes = {"max_steps": 3, "gradient_checkpointing": True, "precision": "bf16"}
    changes |= {"adapter": adapter}
    for name, kind, size in (("one", "ddp", 1), ("two", "fsdp", 2)):
        config = config_of("dpo", kind, tmp_path / name, changes)
        assert on_ranks(size, lambda rank, config=config: train(config)) == [0] * size
    one, two = numbers_of(tmp_path / "one"), numbers_of(tmp_path / "two")
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)


VARIANTS = {
    "dora": {"adapter": {"kind": "dora", "rank": 2}},
    "pure_bf16": {"precision": "pure_bf16"},
    "both": {"adapter": {"kind": "lora", "rank": 2}, "precision": "pure_bf16"},
    "moving_reference": {"moving_reference": {"mix": 0.5, "every": 2}},
}


@cache
def one_process(variant):
    """In a child: products in bfloat16 leave threads."""
    sft_run()
    config = config_of("dpo", "ddp", scratch() / f"one {variant}", VARIANTS[variant] | SHORT)
    assert on_ranks(1, lambda rank: train(config)) == [0]
    return scratch() / f"one {variant}"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_bfloat16_weights_and_moving_references_train_as_in_one_process(
    variant, kind, tmp_path
):
    changes = VARIANTS[variant] | SHORT
    one_process(variant)
    config = config_of("dpo", kind, tmp_path / "two", changes)
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    one, two = numbers_of(one_process(variant)), numbers_of(tmp_path / "two")
    # Weights of eight bits round a step's update to a share of 2^-9, in another place on each CPU.
    close = {"rel": 5e-2, "abs": 1e-3} if "precision" in changes else {"rel": 1e-5, "abs": 1e-5}
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, **close)
    exported = [
        sorted(f.name for f in (p / "model").iterdir())
        for p in (one_process(variant), tmp_path / "two")
    ]
    assert exported[0] == exported[1]


def test_an_adapter_that_is_trained_further_is_compared_with_itself(tmp_path):
    sft_run()
    changes = {"model": {"path": str(sft_run())}, "adapter": {"kind": "lora", "rank": 2}}
    config = sft_config(tmp_path / "sft", COMMON | SHORT | changes)
    assert on_ranks(1, lambda rank: train(config)) == [0]
    changes = {"model": {"path": str(tmp_path / "sft")}, "adapter": {"kind": "lora"}} | SHORT
    changes |= {"evaluation.every": 2}
    for name, kind, size in (("one", "ddp", 1), ("two", "fsdp", 2)):
        config = config_of("dpo", kind, tmp_path / name, changes)
        assert on_ranks(size, lambda rank, config=config: train(config)) == [0] * size
    check_equal(tmp_path / "two", tmp_path / "one")
    kl = [row["eval/kl"] for row in metrics_of(tmp_path / "two") if "eval/kl" in row]
    assert kl[0] == 0 < kl[-1]
    files = [(tmp_path / n / "model" / "adapter_base.json").read_text() for n in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_in_parts_goes_on_bit_for_bit(variant, tmp_path):
    sft_run()
    config = config_of("dpo", "fsdp", tmp_path / "whole", VARIANTS[variant] | SHORT)
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    config = config_of("dpo", "fsdp", tmp_path / "stopped", VARIANTS[variant] | SHORT)

    def stopped(rank):
        signal_at(3, signal.SIGTERM)
        train(config)

    assert on_ranks(2, stopped) == [75, 75]
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_offloaded_parts_train_alike(tmp_path, monkeypatch):
    """All of it but a GPU: on a CPU, what is moved to main memory is there already."""
    monkeypatch.setattr(InParts, "_check", lambda held: None)  # it refuses a CPU
    sft_run()
    for name, offload in (("here", False), ("offloaded", True)):
        changes = SHORT | {"distributed.cpu_offload": offload}
        config = config_of("dpo", "fsdp", tmp_path / name, changes)
        assert on_ranks(2, lambda rank, config=config: train(config)) == [0, 0]
    assert outcome(tmp_path / "offloaded") == outcome(tmp_path / "here")


def test_what_several_processes_cannot_do_is_said(tmp_path):
    with pytest.raises(InputError, match="start it with torchrun"):
        train(config_of("sft", "fsdp", tmp_path / "run"))
    with pytest.raises(ValueError, match="cpu_offload: only a model in parts is offloaded"):
        config_of("sft", "ddp", tmp_path / "run", {"distributed.cpu_offload": True})
    sft_run()

    def offloaded(rank):
        with pytest.raises(InputError, match="there is no GPU here"):
            train(config_of("sft", "fsdp", tmp_path / "run", {"distributed.cpu_offload": True}))

    assert on_ranks(2, offloaded) == [0, 0]
    changes = {"optimizer": {"in_backward": True, "max_grad_norm": None}, "batch.max_tokens": 4096}

    def refused(rank):
        with pytest.raises(InputError, match=r"optimizer\.in_backward: it is for one process"):
            train(config_of("dpo", "fsdp", tmp_path / "run", changes))

    assert on_ranks(2, refused) == [0, 0]


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_other_architectures_are_cut_run_and_put_together_again(name, tmp_path):
    sequences = [TokenSequence(tuple(range(2, 9 + i % 5)), 1 + i % 3) for i in range(7)]
    settings = validate(DistributedConfig, FSDP)
    plain = make(name, 300)
    expected = response_logps(plain, sequences)
    expected.sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])

    def cut(rank):
        with ranks.joined(settings):
            model = InParts().make(lambda: make(name, 300))
            found = response_logps(model, sequences)
            (found.sum() / 2).backward()  # both ranks do: half of it each
            gradients = [parameter.grad for parameter in model.parameters()]
            torch.testing.assert_close(found, expected)
            total = parts.whole(torch.nn.utils.get_total_norm(gradients))
            torch.testing.assert_close(total, norm, rtol=1e-5, atol=0)
            whole = parts.whole_copy(model)
            if rank == 0:
                assert type(whole) is type(plain)
                for key, value in plain.state_dict().items():
                    assert torch.equal(whole.state_dict()[key], value)

    assert on_ranks(2, cut) == [0, 0]


def test_a_disk_that_fills_on_one_rank_costs_no_older_checkpoint(tmp_path):
    config = config_of("sft", "fsdp", tmp_path / "run")

    def filling(rank):
        write = sharding.HuggingFaceStorageWriter.write_data

        def write_data(writer, plan, planner):
            if rank == 1 and "step-00000020" in str(writer.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(writer, plan, planner)

        sharding.HuggingFaceStorageWriter.write_data = write_data
        train(config)

    assert on_ranks(2, filling, said=tmp_path) == [5, 5]
    assert "process 1: [Errno 28] No space left on device" in (tmp_path / "rank-0.txt").read_text()
    assert [f.name for f in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000010"]


def test_commands_for_one_process_refuse_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("evaluate", "plan"):
        said = dpo(command, "model=x", "out=y")
        assert said.code == 2
        assert f"dpo {command} is one process" in said.err
