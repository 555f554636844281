"""What is measured of a policy's own samples while it trains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import dpo, dpo_config, sft_run, words_of

from dpo.data.prompts import load_template
from dpo.data.synthetic import World
from dpo.data.tokenize import Encoder
from dpo.errors import InputError
from dpo.models.divergence import mean_over_prompts, on_policy_kl, sample_on_policy
from dpo.models.load import find_model, load_model, load_tokenizer
from dpo.train.on_policy import OnPolicyEvaluation
from dpo.train.reward_source import RewardFunction
from dpo.train.run import read_metrics

PROMPTS = World().prompts[:4]


def evaluation(reference: object, reward: RewardFunction | None, samples: int = 3) -> tuple:
    """The SFT model with an evaluation of its samples for four prompts."""
    source = find_model(str(sft_run()))
    template = load_template(Path(source.path))
    assert template is not None
    encoder = Encoder(load_tokenizer(source), template, 96)
    made = OnPolicyEvaluation(
        prompts=PROMPTS,
        ids=[encoder.prompt_ids(prompt) for prompt in PROMPTS],
        encoder=encoder,
        reference=reference,
        reward=reward,
        samples_per_prompt=samples,
        max_new_tokens=8,
        max_tokens=1000,
        precision="fp32",
        seed=5,
    )
    return load_model(source), encoder, made


def length_reward() -> RewardFunction:
    """The number of characters, so that it can be told apart from anything else."""

    def score(prompts, responses):
        assert [*prompts] == [p for p in PROMPTS for _ in range(len(prompts) // len(PROMPTS))]
        return torch.tensor([float(len(r)) for r in responses], dtype=torch.float64)

    return RewardFunction("length", "length", score)


def test_mean_over_prompts_by_hand() -> None:
    mean, stderr = mean_over_prompts(np.array([0.0, 2.0, 4.0, 6.0]), num_prompts=2)
    assert mean == 3
    assert stderr == pytest.approx(math.sqrt(((1 - 3) ** 2 + (5 - 3) ** 2) / 1) / math.sqrt(2))


def test_reward_and_kl_are_of_the_same_samples_and_the_same_as_measured_alone() -> None:
    reference = load_model(find_model(str(sft_run())))
    for parameter in reference.parameters():
        parameter.data.mul_(1.02)
    policy, encoder, both = evaluation(reference, length_reward())
    found = both(policy)
    kl = on_policy_kl(
        policy,
        reference,
        both.ids,
        stop_ids=encoder.stop_ids,
        max_new_tokens=8,
        samples_per_prompt=3,
        seed=5,
    )
    assert found["eval/kl"] == kl.mean > 0
    assert found["eval/kl_stderr"] == kl.stderr
    assert found["eval/entropy"] == kl.entropy > 0
    assert found["eval/entropy_stderr"] == kl.entropy_stderr
    assert found["eval/sample_tokens"] == kl.tokens
    assert found["eval/truncated"] == kl.truncated
    _, _, reward_alone = evaluation(None, length_reward())
    alone = reward_alone(policy)
    assert "eval/kl" not in alone
    of_reference = {k for k in found if k.startswith(("eval/kl", "eval/entropy"))}
    assert {k: v for k, v in found.items() if k not in of_reference} == alone
    assert found["eval/reward"] == both(policy)["eval/reward"]  # the same random numbers


def test_what_the_samples_are_like_is_counted_over_their_tokens() -> None:
    """Against the samples drawn again with the same random numbers."""
    policy, encoder, measure = evaluation(None, length_reward())
    samples = sample_on_policy(
        policy,
        measure.ids,
        stop_ids=encoder.stop_ids,
        max_new_tokens=8,
        samples_per_prompt=3,
        seed=5,
    )
    found = measure(policy)
    lengths = np.array([len(s.drawn) for s in samples]).reshape(4, 3).mean(1)
    assert found["eval/sample_tokens_stderr"] == pytest.approx(lengths.std(ddof=1) / 2)
    pairs = [p for s in samples for p in zip(s.ids, s.ids[1:], strict=False)]
    assert found["eval/distinct_2grams"] == len(set(pairs)) / len(pairs)
    repeats = []
    for sample in samples:
        grams = [sample.ids[i : i + 4] for i in range(len(sample.ids) - 3)]
        repeats.append(1 - len(set(grams)) / len(grams) if grams else 0)
    assert found["eval/repeated_4grams"] == pytest.approx(np.mean(repeats))
    texts = [encoder.decode(s.ids) for s in samples]
    assert found["eval/empty"] == sum(not text.strip() for text in texts) / 12


def test_a_training_run_logs_the_reward_that_its_samples_have(tmp_path: Path) -> None:
    asked = {"max_steps": 2, "evaluation.reward": {"function": "synthetic"}}
    assert dpo("train", *words_of(dpo_config(tmp_path / "run", asked))).code == 0
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/loss" in row]
    assert all(-4 <= row["eval/reward"] <= 3 for row in rows)
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-6)


def test_a_reward_without_samples_has_no_effect_and_is_refused(tmp_path: Path) -> None:
    asked = {"evaluation.reward": {"function": "synthetic"}, "evaluation.kl_prompts": 0}
    with pytest.raises(InputError, match="reward has no effect when kl_prompts is 0"):
        dpo_config(tmp_path / "run", asked)
