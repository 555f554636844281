"""A language of 16 prompts and 4,096 responses, so small that every policy is a table.

A prompt is an instruction and a topic, a response is four of eight words: "praise the film: it is
not bad". Its reward is known (`reward`). The policy is an ordinary GPT-2, and the restriction to
these responses is the world's, not the model's: `word_logits` is the one place where all tokens but
the eight words that may follow are left out. So what is estimated elsewhere (KL, expected reward,
the optimum) is computed here.

Shapes: P = 16 prompts, Y = 4,096 responses, W = 8 words, T = 4 words a response, B a batch.
Prompts and responses are numbers: places in `PROMPTS`, and the word ids read as digits of base W.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import product

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from dpo.models.load import fuse_activations

WORDS = ("it", "is", "not", "very", "good", "great", "bad", "awful")
INSTRUCTIONS = ("praise", "criticise")
TOPICS = ("film", "meal", "book", "song", "hotel", "game", "city", "phone")
PROMPTS = tuple(product(INSTRUCTIONS, TOPICS))
LENGTH = 4
NUM_RESPONSES = len(WORDS) ** LENGTH

VOCABULARY = (*WORDS, *INSTRUCTIONS, *TOPICS)
"""A token's id is its place; the words come first, so that ids below W are words."""
WIDTH, LAYERS, HEADS = 64, 2, 4

PROMPT_TOKENS = torch.tensor([[VOCABULARY.index(token) for token in prompt] for prompt in PROMPTS])
RESPONSE_TOKENS = torch.cartesian_prod(*[torch.arange(len(WORDS))] * LENGTH)

VALUES = {"good": 0.5, "great": 1.0, "bad": -0.5, "awful": -1.0}
FACTORS = {"not": -1.0, "very": 1.5}
REPETITION = 0.5
"""What each word that was said before costs."""

NATURAL = {
    "": {"it"},
    "it": {"is"},
    "is": {*FACTORS, *VALUES},
    "not": {"very", *VALUES},
    "very": {*VALUES},
}
"""What naturally follows a word, or the beginning."""
FLUENCY, EAGERNESS = 1.5, 0.3
"""Of the demonstrator: log-odds of a natural transition, and of a unit of reward."""


# -- the reward ----------------------------------------------------------------------------------


def reward(instruction: str, words: tuple[str, ...]) -> float:
    """The sentiment of a response in the direction that was asked for, less its repetitions.

    A sentiment word adds its value (`VALUES`), multiplied by the factors (`FACTORS`) of all "not"
    and "very" directly before it; before another word, or at the end, these do nothing. "criticise"
    turns the sign of the sum. Each word that was said before costs `REPETITION`. The topic does not
    matter, which a model has to find out.

    >>> reward("praise", ("it", "is", "very", "good"))
    0.75
    >>> reward("criticise", ("it", "is", "very", "good"))
    -0.75
    """
    sentiment, factor = 0.0, 1.0
    for word in words:
        if word in FACTORS:
            factor *= FACTORS[word]
        else:
            sentiment += factor * VALUES.get(word, 0.0)
            factor = 1.0
    repetitions = len(words) - len(set(words))
    return (sentiment if instruction == "praise" else -sentiment) - REPETITION * repetitions


def reward_table() -> Tensor:
    """The reward of every response to every prompt, (P, Y), float64."""
    sentences = list(product(WORDS, repeat=LENGTH))
    of_instruction = {name: [reward(name, words) for words in sentences] for name in INSTRUCTIONS}
    rows = [of_instruction[instruction] for instruction, _ in PROMPTS]
    return torch.tensor(rows, dtype=torch.float64)


def demonstrator_log_policy(rewards: Tensor) -> Tensor:
    """Log-probabilities of who writes the demonstrations, (P, Y): fluent, and a little willing.

    `log p(y|x) = FLUENCY · (natural transitions in y) + EAGERNESS · r(x, y) + constant`.
    """
    natural = torch.tensor(
        [
            sum(
                word in NATURAL.get(before, ())
                for before, word in zip(("", *words), words, strict=False)
            )
            for words in product(WORDS, repeat=LENGTH)
        ],
        dtype=torch.float64,
    )
    return (FLUENCY * natural + EAGERNESS * rewards).log_softmax(dim=-1)


# -- the policy ----------------------------------------------------------------------------------


def new_policy(seed: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, a function of the seed."""
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=PROMPT_TOKENS.shape[1] + LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: GPT2LMHeadModel = GPT2LMHeadModel(config).eval()  # no dropout, in training neither
    fuse_activations(model)
    return model


def word_logits(model: GPT2LMHeadModel, states: Tensor) -> Tensor:
    """Logits of the words that may follow, (..., W), from final hidden states (..., WIDTH).

    A softmax over them is the policy: nothing but the world's words can be said.
    """
    logits: Tensor = model.lm_head(states)
    return logits[..., : len(WORDS)]


def token_logps(model: GPT2LMHeadModel, prompts: Tensor, responses: Tensor) -> Tensor:
    """Log-probability of each word of the responses, (B, T), in nats, with gradient."""
    words = RESPONSE_TOKENS[responses]
    states = _states_along(model.transformer, prompts, words[:, :-1])
    logps = word_logits(model, states).log_softmax(dim=-1)
    return logps.gather(-1, words.unsqueeze(-1)).squeeze(-1)


def _states_along(body: nn.Module, prompts: Tensor, words: Tensor) -> Tensor:
    """Final hidden states after the prompt and after each of the words, (B, 1 + words, WIDTH).

    Every prompt of the world is encoded once, however often it occurs in the batch.
    """
    cache = DynamicCache()
    encoded = body(PROMPT_TOKENS, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    cache.batch_select_indices(prompts)
    after = body(words, past_key_values=cache, use_cache=True).last_hidden_state
    return torch.cat([encoded[prompts].unsqueeze(1), after], dim=1)


@torch.no_grad()
def log_policy(model: GPT2LMHeadModel) -> Tensor:
    """The whole policy as a table, (P, Y), float64; every row's probabilities sum to one.

    The model in float32, its log-softmax and the sums over words in float64.
    """
    table = torch.zeros(len(PROMPTS), 1, dtype=torch.float64)
    for states in _last_states(model.transformer, PROMPT_TOKENS, LENGTH - 1):
        logps = word_logits(model, states).double().log_softmax(dim=-1)
        table = (table.reshape(-1, 1) + logps).reshape(len(PROMPTS), -1)
    return table


def _last_states(body: nn.Module, prompt_tokens: Tensor, depth: int) -> Iterator[Tensor]:
    """Final hidden states after every sequence of 0, 1, ..., `depth` words, (prompts · W^d, WIDTH).

    Rows are ordered by prompt, then as the responses are. What sequences share is computed once.
    """
    cache = DynamicCache()
    tokens = prompt_tokens
    for level in range(depth + 1):
        output = body(tokens, past_key_values=cache, use_cache=True)
        yield output.last_hidden_state[:, -1]
        if level < depth:
            cache.batch_repeat_interleave(len(WORDS))
            tokens = torch.arange(len(WORDS)).repeat(len(tokens)).unsqueeze(1)


@torch.no_grad()
def sample(model: GPT2LMHeadModel, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """A response to each prompt, drawn word by word, (B,)."""
    cache = DynamicCache()
    tokens = PROMPT_TOKENS[prompts]
    responses = torch.zeros_like(prompts)
    for _ in range(LENGTH):
        states = model.transformer(tokens, past_key_values=cache, use_cache=True).last_hidden_state
        probabilities = word_logits(model, states[:, -1]).softmax(dim=-1)
        tokens = torch.multinomial(probabilities, 1, generator=generator)
        responses = responses * len(WORDS) + tokens.squeeze(1)
    return responses


# -- a number instead of a word ------------------------------------------------------------------


class Scorer(nn.Module):
    """The body of a policy with one number at every position: a reward model, or a critic.

    It starts from the policy's weights, and from 0 everywhere.
    """

    def __init__(self, policy: GPT2LMHeadModel) -> None:
        super().__init__()
        self.body = deepcopy(policy.transformer)
        self.head = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """The number after the prompt, after its first word, ..., after the last, (B, T + 1)."""
        states = _states_along(self.body, prompts, RESPONSE_TOKENS[responses])
        numbers: Tensor = self.head(states).squeeze(-1)
        return numbers

    @torch.no_grad()
    def table(self) -> Tensor:
        """The number after the last word of every response to every prompt, (P, Y), float64."""
        rows = []
        for prompt in PROMPT_TOKENS.split(1):  # one at a time: the cache of all is large
            *_, states = _last_states(self.body, prompt, LENGTH)
            rows.append(self.head(states).squeeze(-1).double())
        return torch.stack(rows)
