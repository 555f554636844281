"""PPO and online DPO on several ranks: the same samples, steps and weights as in one process."""

import os
import signal
from functools import cache, partial

import pytest
import torch
from safetensors.torch import load_file

from dpo.config import DistributedConfig, RewardConfig
from dpo.config_files import validate
from dpo.errors import InputError, RankLost
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train import ranks, samples
from dpo.train.reward import train_reward
from train.several_ranks import check_equal, on_ranks, signal_at, start, train, wait
from train.small_runs import DATA, dpo, merged, metrics_of, outcome, scratch, sft_run, words_of

LIKES_LENGTH = "def f(prompts, responses): return [float(len(r)) for r in responses]\n"
COMMON = {
    "data": DATA,
    "rounds": 3,
    "prompts_per_round": 7,  # two ranks have four and three of them
    "samples_per_prompt": 3,
    "epochs_per_round": 2,
    "sampling": {"max_new_tokens": 8},
    "batch": {"size": 4, "max_tokens": 60},
    "save_every": 3,
    # Without an epsilon AdamW makes steps of the rounding of gradients that are 0.
    "optimizer": {"learning_rate": 0.003, "epsilon": 1e-4},
    "evaluation": {"max_rows": 5, "samples_per_prompt": 2, "num_samples": 2, "max_new_tokens": 8},
}
VARIANTS = {
    "online": (OnlineConfig, {"loss": {"beta": 0.5}}),
    "online, iterative, losses of the whole batch": (
        OnlineConfig,
        {"loss": {"name": "bco_pair"}, "reset_reference_each_round": True},
    ),
    "online, an adapter": (OnlineConfig, {"adapter": {"kind": "lora", "rank": 2}}),
    "ppo, its critic apart, adapting": (
        PPOConfig,
        {"kl": {"coefficient": 0.1, "target": 0.05, "gain": 0.5}},
    ),
    "ppo, its critic shared": (PPOConfig, {"critic": "shared", "kl": {"estimator": "k3"}}),
    "ppo, a reward model, its trunk the critic's": (PPOConfig, {"critic": "reward_model"}),
}


@cache
def reward_run():
    """A reward model from the same SFT model."""
    values = {
        "model": {"path": str(sft_run())},
        "data": DATA,
        "out": str(scratch() / "reward of ranks"),
        "max_steps": 4,
        "optimizer": {"learning_rate": 0.01},  # else all rewards are about equal
        "batch": {"size": 8},
        "evaluation": {"max_rows": 8},
    }
    return train_reward(validate(RewardConfig, values))


def config_of(variant, folder, changes=None):
    schema, settings = VARIANTS[variant]
    if settings.get("critic") == "reward_model":
        reward = {"model": str(reward_run())}
    else:
        file = scratch() / "likes_length_on_ranks.py"
        file.write_text(LIKES_LENGTH, "utf-8")
        reward = {"function": f"{file}:f"}
    start = {"model": {"path": str(sft_run())}, "out": str(folder), "reward": reward}
    return validate(schema, merged(COMMON | start, settings | (changes or {})))


@cache
def alone(variant):
    folder = scratch() / f"alone {variant}"
    train(config_of(variant, folder))
    return folder


@cache
def together(variant):
    """A finished run of two ranks, undisturbed."""
    folder = scratch() / f"two ranks {variant}"
    config = config_of(variant, folder)
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    return folder


def check_same_rounds(found, expected):
    """The same responses with the same rewards, to the byte."""
    rounds = sorted((expected / "samples").glob("round-*.jsonl"))
    assert [f.name for f in rounds] == [f.name for f in sorted((found / "samples").glob("round-*"))]
    for file in rounds:
        assert (found / "samples" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_sample_and_train_what_one_process_does(variant):
    one, two = alone(variant), together(variant)
    if "reward model" not in variant:  # whose scores are rounded in another batch
        check_same_rounds(two, one)
    check_equal(two, one)
    name = "adapter_model.safetensors" if "adapter" in variant else "model.safetensors"
    expected, found = (load_file(folder / "model" / name) for folder in (one, two))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, atol=1e-5, rtol=0)
    files = {f.relative_to(one) for f in one.rglob("*") if "events" not in f.name}
    assert {f.relative_to(two) for f in two.rglob("*") if "events" not in f.name} == files
    steps = [[row for row in metrics_of(folder) if "loss" in row] for folder in (one, two)]
    assert len({round(row["samples/reward"], 6) for row in steps[0]}) == 3  # of as many rounds
    if "whole batch" not in variant:
        of_one, of_two = (sum(row["num_passes"] for row in rows) for rows in steps)
        assert of_two < of_one
    if "adapting" in variant:
        assert len({round(row["ppo/kl_coefficient"], 6) for row in steps[1]}) == 3


@pytest.mark.parametrize("variant", ["online", "ppo, its critic apart, adapting"])
def test_ranks_without_a_prompt_keep_step(variant, tmp_path):
    changes = {"rounds": 2, "prompts_per_round": 2, "evaluation.max_rows": 2, "batch.size": 2}
    train(config_of(variant, tmp_path / "one", changes))
    config = config_of(variant, tmp_path / "three", changes)
    assert on_ranks(3, lambda rank: train(config)) == [0, 0, 0]
    check_same_rounds(tmp_path / "three", tmp_path / "one")
    check_equal(tmp_path / "three", tmp_path / "one")


def killed_while_sampling(number):
    """From now on, this process dies when it samples for the time with that number."""
    generate, seen = samples.generate, []

    def deadly(*arguments, **options):
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*arguments, **options)

    samples.generate = deadly


@pytest.mark.parametrize(
    ("variant", "fate"),
    [
        ("online", partial(signal_at, 5, signal.SIGKILL)),
        ("ppo, its critic apart, adapting", partial(signal_at, 17, signal.SIGKILL)),
        ("ppo, its critic shared", partial(killed_while_sampling, 2)),
    ],
    ids=["online, in round 2", "ppo, in round 2", "ppo, sampling round 2"],
)
def test_one_rank_killed_inside_a_round_costs_nothing_but_time(variant, fate, tmp_path):
    expected, folder = outcome(together(variant)), tmp_path / "run"
    config = config_of(variant, folder)

    def killed(rank):
        if rank == 1:
            fate()
        train(config)

    codes = wait(start(2, killed, said=tmp_path), seconds=60)
    assert codes == [RankLost.exit_code, -signal.SIGKILL]
    assert "another process of the run ended" in (tmp_path / "rank-0.txt").read_text()
    assert on_ranks(2, lambda rank: train(config)) == [0, 0]
    assert outcome(folder) == expected


@pytest.mark.parametrize("variant", ["online", "ppo, its critic apart, adapting"])
def test_a_run_goes_on_inside_a_round_with_another_number_of_ranks(variant, tmp_path):
    folder = tmp_path / "run"
    config = config_of(variant, folder)

    def stopped(rank, step):
        if rank == 0:
            signal_at(step, signal.SIGTERM)
        train(config)

    assert on_ranks(2, partial(stopped, step=1)) == [75, 75]
    assert on_ranks(3, partial(stopped, step=5)) == [75] * 3
    train(config)
    check_same_rounds(folder, alone(variant))
    check_equal(folder, alone(variant))


def test_a_reward_that_fails_on_one_rank_fails_on_all_in_its_words(tmp_path):
    file = tmp_path / "fails.py"
    file.write_text(
        "import os\n"
        "def f(prompts, responses):\n"
        "    if os.environ['RANK'] == '1': raise RuntimeError('no answer from the judge')\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    changes = {"reward": {"function": f"{file}:f"}}
    config = config_of("online", tmp_path / "run", changes)
    assert on_ranks(2, lambda rank: train(config), said=tmp_path) == [2, 2]
    for rank in range(2):
        said = (tmp_path / f"rank-{rank}.txt").read_text()
        assert "raised RuntimeError: no answer from the judge" in said


@pytest.mark.parametrize("command", ["online", "ppo"])
def test_under_a_launcher_the_first_process_alone_speaks(command, tmp_path):
    variant = "online" if command == "online" else "ppo, its critic shared"
    words = words_of(config_of(variant, tmp_path / "run", {"rounds": 1}))

    def spoken(rank):
        said = dpo(command, *words)
        (tmp_path / f"out-{rank}").write_text(said.out)
        assert said.code == 0, said.all

    assert on_ranks(2, spoken) == [0, 0]
    assert "Diagnostics: " in (tmp_path / "out-0").read_text()
    assert (tmp_path / "out-1").read_text() == ""
    assert (tmp_path / "run" / "index.html").is_file()


@pytest.mark.parametrize("schema", [OnlineConfig, PPOConfig])
def test_a_policy_in_parts_is_refused_in_a_sentence(schema):
    values = {"model": "runs/sft", "out": "runs/x", "reward": {"function": "synthetic"}}
    with pytest.raises(InputError, match=r"distributed.kind: fsdp .*; take ddp"):
        validate(schema, values | {"distributed": {"kind": "fsdp"}})


def test_work_is_shared_out_item_by_item_and_comes_back_in_order(tmp_path):
    settings = validate(DistributedConfig, {})

    def work(rank):
        seen = []

        def squares(own):
            seen.extend(own)
            return [x * x for x in own]

        def fails(own):
            if 1 in own:
                raise InputError("one of them is 1")
            return list(own)

        with ranks.joined(settings):
            for count in (0, 1, 3, 7):
                assert ranks.shared_out(squares, range(count)) == [x * x for x in range(count)]
            assert seen == [x for count in (0, 1, 3, 7) for x in range(rank, count, 3)]
            with pytest.raises(InputError, match="one of them is 1"):
                ranks.shared_out(fails, range(5))

    assert on_ranks(3, work) == [0, 0, 0]
