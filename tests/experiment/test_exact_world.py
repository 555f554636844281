"""The enumerable world: its reward by hand, its tables against the plain model, its samples."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from dpo.core.best_of_n import best_of_n_kl_bound, best_of_n_log_policy
from dpo.core.exact import World, kl
from dpo.experiment.exact_methods import draw_responses
from dpo.experiment.exact_world import (
    LENGTH,
    NUM_RESPONSES,
    PROMPT_TOKENS,
    PROMPTS,
    RESPONSE_TOKENS,
    VOCABULARY,
    WORDS,
    Scorer,
    demonstrator_log_policy,
    log_policy,
    new_policy,
    reward,
    reward_table,
    sample,
    token_logps,
)


@pytest.fixture(scope="module")
def policy():
    return new_policy(5)


@pytest.fixture(scope="module")
def table(policy):
    return log_policy(policy)


def number_of(sentence):
    words = tuple(sentence.split())
    return list(product(WORDS, repeat=LENGTH)).index(words)


@pytest.mark.parametrize(
    ("sentence", "praise", "criticise"),
    [
        ("it is very good", 0.75, -0.75),  # 1.5 · 0.5
        ("it is not bad", 0.5, -0.5),  # -1 · -0.5
        ("not very good it", -0.75, 0.75),  # -1 · 1.5 · 0.5
        ("very not it great", 1.0, -1.0),  # what stands before "it" is lost
        ("it is it not", -0.5, -0.5),  # no sentiment, "it" said twice
        ("not not awful bad", -2.0, 1.0),  # -1 · -1 · -1 - 0.5, one repetition
        ("great great great great", 2.5, -5.5),  # 4 less, or less 4, three repetitions
        ("very very very awful", -4.375, 2.375),  # 1.5³, two repetitions
    ],
)
def test_the_reward_of_sentences_by_hand(sentence, praise, criticise):
    words = tuple(sentence.split())
    assert reward("praise", words) == pytest.approx(praise)
    assert reward("criticise", words) == pytest.approx(criticise)
    for prompt in range(len(PROMPTS)):
        expected = praise if PROMPTS[prompt][0] == "praise" else criticise
        assert reward_table()[prompt, number_of(sentence)] == pytest.approx(expected)


def test_a_response_is_its_words_read_as_digits():
    number = number_of("it is not bad")
    assert [WORDS[i] for i in RESPONSE_TOKENS[number]] == ["it", "is", "not", "bad"]
    digits = [0, 1, 2, 6]
    assert number == sum(d * len(WORDS) ** (LENGTH - 1 - i) for i, d in enumerate(digits))
    assert len(RESPONSE_TOKENS) == NUM_RESPONSES == 4096
    assert [VOCABULARY[token] for token in PROMPT_TOKENS[9]] == ["criticise", "meal"]


def test_every_row_of_the_policy_sums_to_one(table):
    assert table.shape == (16, 4096)
    assert table.dtype == torch.float64
    torch.testing.assert_close(table.exp().sum(-1), torch.ones(16, dtype=torch.float64))


@torch.no_grad()
def test_the_table_is_the_plain_models_over_the_words_that_may_follow(policy, table):
    draw = torch.Generator().manual_seed(0)
    for prompt, response in zip(
        torch.randint(16, (6,), generator=draw),
        torch.randint(4096, (6,), generator=draw),
        strict=True,
    ):
        words = RESPONSE_TOKENS[response].tolist()
        total = 0.0
        for place in range(LENGTH):
            before = [*PROMPT_TOKENS[prompt].tolist(), *words[:place]]
            logits = policy(torch.tensor([before])).logits[0, -1].double()
            total += logits[words[place]] - torch.logsumexp(logits[: len(WORDS)], 0)
        assert table[prompt, response] == pytest.approx(float(total), abs=1e-5)


def test_log_probabilities_of_words_sum_to_the_tables_and_have_a_gradient(policy, table):
    prompts, responses = torch.tensor([0, 3, 15]), torch.tensor([0, 77, 4095])
    logps = token_logps(policy, prompts, responses)
    assert logps.shape == (3, LENGTH)
    expected = table[prompts, responses].float()
    torch.testing.assert_close(logps.sum(-1), expected, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(logps.sum(), policy.transformer.wte.weight)
    assert gradient[: len(WORDS)].abs().sum() > 0


def test_samples_follow_the_table(policy, table):
    prompts = torch.full((20_000,), 4)
    drawn = {
        "by the model": sample(policy, prompts, torch.Generator().manual_seed(1)),
        "from the table": draw_responses(table, prompts, torch.Generator().manual_seed(2)),
    }
    for responses in drawn.values():
        for place in range(LENGTH):
            found = torch.bincount(RESPONSE_TOKENS[responses][:, place], minlength=8) / 20_000
            of_word = RESPONSE_TOKENS[:, place]
            expected = torch.zeros(8, dtype=torch.float64).index_add(0, of_word, table[4].exp())
            assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / 20_000)


def test_the_table_of_scores_is_the_score_after_the_last_word(policy):
    scorer = Scorer(policy)
    assert scorer(torch.tensor([1]), torch.tensor([5])).abs().max() == 0  # from 0 everywhere
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    prompts, responses = torch.tensor([2, 11]), torch.tensor([1234, 9])
    numbers = scorer(prompts, responses)
    assert numbers.shape == (2, LENGTH + 1)
    found = scorer.table()[prompts, responses].float()
    torch.testing.assert_close(found, numbers[:, -1].detach(), atol=1e-5, rtol=0)


def test_a_score_after_a_prefix_does_not_know_what_follows(policy):
    scorer = Scorer(policy)
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    one, other = number_of("it is not bad"), number_of("it is very good")
    numbers = scorer(torch.tensor([0, 0]), torch.tensor([one, other])).detach()
    same = (numbers[0] - numbers[1]).abs() < 1e-6
    assert same.tolist() == [True, True, True, False, False]


def test_the_demonstrator_is_fluent_and_a_little_willing():
    rewards = reward_table()
    log_p = demonstrator_log_policy(rewards)
    world = World(torch.full((16,), 1 / 16, dtype=torch.float64), log_p, rewards)
    uniform = torch.full_like(log_p, -math.log(4096))
    assert world.expected_reward(log_p) > world.expected_reward(uniform) + 0.2
    assert (
        log_p.argmax(-1).tolist()
        == [number_of("it is very great")] * 8 + [number_of("it is very awful")] * 8
    )


@pytest.mark.parametrize("n", [2, 16])
def test_the_law_of_best_of_n_is_that_of_simulated_choices(table, n):
    """Of the world's own table, whose rewards have many ties."""
    rewards = reward_table()
    log_p = best_of_n_log_policy(table, rewards, n=n)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(16, dtype=torch.float64))
    draw = torch.Generator().manual_seed(3)
    drawn = draw_responses(table, torch.zeros(20_000 * n, dtype=torch.long), draw).view(-1, n)
    best = drawn.gather(1, rewards[0][drawn].argmax(1, keepdim=True)).squeeze(1)
    values = rewards[0].unique()
    found = torch.stack([(rewards[0][best] == value).double().mean() for value in values])
    expected = torch.stack([log_p[0].exp()[rewards[0] == value].sum() for value in values])
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    divergence = kl(log_p, table)
    assert (divergence <= best_of_n_kl_bound(n)).all()
    assert (divergence > 0.2 * best_of_n_kl_bound(n)).all()
