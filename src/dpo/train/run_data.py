"""A run's training rows as tokens, read as training would with the model's configuration alone.

Where a run trains on samples there are none yet: every response is taken to be as long as the
settings allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dpo.config import PreferenceConfig, RewardConfig, SFTConfig, TrainingConfig
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

Trained = SFTConfig | PreferenceConfig | RewardConfig | OnlineConfig | PPOConfig

MOST_ROWS = 4096
"""Training rows that are looked at (a seeded choice)."""


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
    if isinstance(config, SFTConfig):
        return _demonstrations(config, trust_remote_code)
    if isinstance(config, PreferenceConfig):
        return _preferences(config, trust_remote_code)
    if isinstance(config, RewardConfig):
        return _rated(config, trust_remote_code)
    return _samples(config, trust_remote_code)


def _demonstrations(config: SFTConfig, trust_remote_code: bool) -> RunData:
    data = load_demonstrations(config.data, response=config.response)
    fresh = config.model.fresh is not None
    texts = [f"{as_text(row.prompt)}\n{row.response}" for row in data.train] if fresh else []
    encoder, _ = encoder_without_model(config, data, texts, trust_remote_code=trust_remote_code)
    encoded = encode_demonstrations(
        encoder, _some(data, config), train_on_prompt=config.train_on_prompt, what="training rows"
    )
    return _of_rows(config, [(s,) for s in encoded], data, encoder)


def _preferences(config: PreferenceConfig, trust_remote_code: bool) -> RunData:
    objective = make_objective(config.loss)
    data = load_rows_for(objective.kind, config.data)
    encoder, _ = encoder_without_model(config, data, [], trust_remote_code=trust_remote_code)
    rows = _encoded(objective.kind, encoder, data, config)
    remarks = []
    if {without_side(name) for name in objective.wants} & ALONG:
        remarks.append(
            f"The loss {config.loss.name} reads more of the model than log-probabilities of "
            "responses; what that takes is not in the estimate."
        )
    if config.moving_reference is not None:
        remarks.append("The moving reference runs at every step; its time is not in the estimate.")
    whole = objective.whole_batch
    return _of_rows(config, rows, data, encoder, whole_batch=whole, remarks=tuple(remarks))


def _rated(config: RewardConfig, trust_remote_code: bool) -> RunData:
    kind = KIND_OF[config.loss]
    data = load_rows_for(kind, config.data)
    texts = [text for row in data.train for text in texts_of(row)] if config.model.fresh else []
    encoder, _ = encoder_without_model(config, data, texts, trust_remote_code=trust_remote_code)
    rows = [tuple(with_end(row)) for row in _encoded(kind, encoder, data, config)]
    return _of_rows(config, rows, data, encoder)


def _samples(config: OnlineConfig | PPOConfig, trust_remote_code: bool) -> RunData:
    """Rows of the training prompts with responses of the greatest length."""
    data = load_prompts(config.data)
    encoder, positions = encoder_without_model(
        config, data, [], trust_remote_code=trust_remote_code
    )
    prompts = list(dict.fromkeys(row.prompt for row in data.train))
    few = [prompts[i] for i in seeded_choice(len(prompts), MOST_ROWS, seed=config.seed)]
    longest = config.sampling.max_new_tokens
    ids = encode_prompts(encoder, few, max_new_tokens=longest, positions=positions)
    if isinstance(config, PPOConfig):
        num_rows, responses = config.responses_per_round, 1
    else:
        num_rows = rows_per_round(config, len(prompts))
        responses = config.samples_per_prompt if config.loss.kind == "list" else 2
    drawn = (config.prompts_per_round or len(prompts)) * config.samples_per_prompt
    rows = [
        tuple(TokenSequence((*prompt, *[k] * longest), len(prompt)) for k in range(responses))
        for prompt in ids
    ]
    each = config.epochs_per_round * steps_per_epoch(num_rows, config.batch.size)
    return RunData(
        rows=[rows[i % len(rows)] for i in range(min(num_rows, MOST_ROWS))],
        num_rows=num_rows,
        num_steps=config.rounds * each,
        tokenizer=encoder.tokenizer,
        what="rows a round, of sampled responses",
        remarks=(f"Every response is taken to have {longest} tokens, the most there can be.",),
        sampling=Sampling(
            responses=drawn,
            at_once=min(drawn, config.sampling.batch_size),
            prompt=fmean(map(len, ids)),
            tokens=longest,
        ),
        num_rounds=config.rounds,
    )


# -- what they share -----------------------------------------------------------------------------


def _some(data: SplitData[Any], config: TrainingConfig) -> list[Any]:
    return [data.train[i] for i in seeded_choice(len(data.train), MOST_ROWS, seed=config.seed)]


def _encoded(
    kind: str, encoder: Encoder, data: SplitData[Any], config: TrainingConfig
) -> list[tuple[TokenSequence, ...]]:
    members = KINDS[kind].encode(
        encoder, _some(data, config), max_dropped=config.data.max_dropped, what="training rows"
    )
    return [tuple(row.sequences) for row in members]


def _of_rows(
    config: TrainingConfig,
    rows: Sequence[tuple[TokenSequence, ...]],
    data: SplitData[Any],
    encoder: Encoder,
    **more: Any,
) -> RunData:
    looked_at = min(len(data.train), MOST_ROWS)
    num_rows = round(len(data.train) * len(rows) / looked_at)  # others are dropped
    steps = total_steps(config, num_rows)
    return RunData(list(rows), num_rows, steps, encoder.tokenizer, **more)
