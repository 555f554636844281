"""A run's training rows as tokens, read as training would with the model's configuration alone.

Where a run trains on samples there are none yet: every response is taken to be as long as the
settings allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

from dpo.config import PreferenceConfig, RewardConfig, RunConfig, SFTConfig
from dpo.core.cost import Sampling
from dpo.data.order import steps_per_epoch
from dpo.data.prompts import as_text
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.models.reward import with_end
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train.encoded import KINDS
from dpo.train.jobs import load_rows_for
from dpo.train.loop import total_steps
from dpo.train.objective import make_objective
from dpo.train.online import rows_per_round
from dpo.train.preference import ALONG, without_side
from dpo.train.prepare import (
    SplitData,
    encode_prompts,
    load_demonstrations,
    load_prompts,
    seeded_choice,
)
from dpo.train.reward import KIND_OF, texts_of
from dpo.train.session import encoder_without_model
from dpo.train.sft import encode_demonstrations

OnGivenRows = SFTConfig | PreferenceConfig | RewardConfig
Trained = OnGivenRows | OnlineConfig | PPOConfig

Row = TypeVar("Row")

MOST_ROWS = 4096
"""Training rows that are looked at (a seeded choice)."""


@dataclass(frozen=True, slots=True)
class GivenRows:
    """The rows that a command trains on, and how they become tokens."""

    data: SplitData[Any]
    texts: list[str]
    """What a fresh model's tokenizer is learnt from."""
    encode: Callable[[Encoder, Sequence[Any], str], list[list[TokenSequence]]]
    """The sequences of each row that is kept; the text says which rows these are."""


@dataclass(frozen=True, slots=True)
class RunData:
    """The rows of a run as tokens, as far as they are looked at."""

    rows: list[tuple[TokenSequence, ...]]
    num_rows: int
    """Of the run, or of one of its rounds."""
    num_steps: int
    tokenizer: Any
    what: str = "training rows"
    whole_batch: bool = False
    remarks: tuple[str, ...] = ()
    sampling: Sampling | None = None
    """Of a round, where a run samples what it trains on."""
    num_rounds: int = 0


def read_data(config: Trained, *, trust_remote_code: bool = False) -> RunData:
    """The rows of a run.

    Raises:
        InputError: as training would, for data, tokenizer and template.
    """
    if isinstance(config, OnlineConfig | PPOConfig):
        return _samples(config, trust_remote_code)
    given = given_rows(config)
    train = given.data.train
    encoder, _ = encoder_without_model(
        config, given.data, given.texts, trust_remote_code=trust_remote_code
    )
    few = looked_at(train, config)
    kept = given.encode(encoder, few, "training rows")
    num_rows = round(len(train) * len(kept) / len(few))
    return as_run_data(config, kept, num_rows, encoder.tokenizer)


def given_rows(config: OnGivenRows) -> GivenRows:
    """The rows that a command trains on, before they are tokens.

    Raises:
        InputError: as training would, for the data.
    """
    fresh = config.model.fresh is not None
    if isinstance(config, SFTConfig):
        demonstrations = load_demonstrations(config.data, response=config.response)
        texts = [f"{as_text(row.prompt)}\n{row.response}" for row in demonstrations.train]
        return GivenRows(demonstrations, texts if fresh else [], partial(_demonstrated, config))
    if isinstance(config, RewardConfig):
        kind = KIND_OF[config.loss]
    else:
        kind = make_objective(config.loss).kind  # a policy is never fresh
    data = load_rows_for(kind, config.data)
    texts = [text for row in data.train for text in texts_of(row)] if fresh else []
    return GivenRows(data, texts, partial(_compared, config, kind))


def _demonstrated(
    config: SFTConfig, encoder: Encoder, rows: Sequence[Any], what: str
) -> list[list[TokenSequence]]:
    sequences = encode_demonstrations(
        encoder, rows, train_on_prompt=config.train_on_prompt, what=what
    )
    return [[sequence] for sequence in sequences]


def _compared(
    config: PreferenceConfig | RewardConfig,
    kind: str,
    encoder: Encoder,
    rows: Sequence[Any],
    what: str,
) -> list[list[TokenSequence]]:
    members = KINDS[kind].encode(encoder, rows, max_dropped=config.data.max_dropped, what=what)
    found = [list(row.sequences) for row in members]
    return list(map(with_end, found)) if isinstance(config, RewardConfig) else found


def as_run_data(
    config: OnGivenRows,
    rows: Sequence[Sequence[TokenSequence]],
    num_rows: int,
    tokenizer: Any,
) -> RunData:
    """The same of some of a run's `num_rows` rows that are tokens already."""
    steps, remarks, whole_batch = total_steps(config, num_rows), [], False
    if isinstance(config, PreferenceConfig):
        objective = make_objective(config.loss)
        whole_batch = objective.whole_batch
        if {without_side(name) for name in objective.wants} & ALONG:
            remarks.append(
                f"The loss {config.loss.name} reads more of the model than log-probabilities of "
                "responses; what that takes is not in the estimate."
            )
        if config.moving_reference is not None:
            remarks.append(
                "The moving reference runs at every step; its time is not in the estimate."
            )
    return RunData(
        rows=[tuple(row) for row in rows],
        num_rows=num_rows,
        num_steps=steps,
        tokenizer=tokenizer,
        whole_batch=whole_batch,
        remarks=tuple(remarks),
    )


def as_sampled_data(
    config: OnlineConfig | PPOConfig,
    prompts: Sequence[Sequence[int]],
    num_prompts: int,
    tokenizer: Any,
) -> RunData:
    """The same of some of a run's `num_prompts` prompts as tokens, each with responses of the
    greatest length.
    """
    longest = config.sampling.max_new_tokens
    if isinstance(config, PPOConfig):
        num_rows, responses = config.responses_per_round, 1
    else:
        num_rows = rows_per_round(config, num_prompts)
        responses = config.samples_per_prompt if config.loss.kind == "list" else 2
    drawn = (config.prompts_per_round or num_prompts) * config.samples_per_prompt
    rows = [
        tuple(TokenSequence((*prompt, *[k] * longest), len(prompt)) for k in range(responses))
        for prompt in prompts
    ]
    each = config.epochs_per_round * steps_per_epoch(num_rows, config.batch.size)
    return RunData(
        rows=[rows[i % len(rows)] for i in range(min(num_rows, MOST_ROWS))],
        num_rows=num_rows,
        num_steps=config.rounds * each,
        tokenizer=tokenizer,
        what="rows a round, of sampled responses",
        remarks=(f"Every response is taken to have {longest} tokens, the most there can be.",),
        sampling=Sampling(
            responses=drawn,
            at_once=min(drawn, config.sampling.batch_size),
            prompt=fmean(map(len, prompts)),
            tokens=longest,
        ),
        num_rounds=config.rounds,
    )


def looked_at(rows: Sequence[Row], config: RunConfig) -> list[Row]:
    """As many of the rows as an estimate looks at."""
    return [rows[i] for i in seeded_choice(len(rows), MOST_ROWS, seed=config.seed)]


def _samples(config: OnlineConfig | PPOConfig, trust_remote_code: bool) -> RunData:
    data = load_prompts(config.data)
    encoder, positions = encoder_without_model(
        config, data, [], trust_remote_code=trust_remote_code
    )
    prompts = list(dict.fromkeys(row.prompt for row in data.train))
    ids = encode_prompts(
        encoder,
        looked_at(prompts, config),
        max_new_tokens=config.sampling.max_new_tokens,
        positions=positions,
    )
    return as_sampled_data(config, ids, len(prompts), encoder.tokenizer)
