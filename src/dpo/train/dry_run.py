"""What a training command would do, found out without weights: rows, tokens and steps.

The rows go the way that training sends them, so what training would refuse of them is refused here.
Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from dpo.config import PreferenceConfig, RewardConfig, RunConfig, SFTConfig, TrainingConfig
from dpo.data.order import batch_rows, split_by_tokens, steps_per_epoch
from dpo.data.pack import packed_tokens
from dpo.data.rows import Prompt
from dpo.data.tokenize import EncodedRow, Encoder, TokenSequence
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train.loop import total_steps, warn_of_warmup
from dpo.train.objective import check_scores, make_objective
from dpo.train.prepare import SplitData, encode_prompts, load_prompts
from dpo.train.reward import check_margins
from dpo.train.run import foreign_files, read_manifest
from dpo.train.run_data import (
    GivenRows,
    OnGivenRows,
    RunData,
    Trained,
    as_run_data,
    as_sampled_data,
    given_rows,
    looked_at,
)
from dpo.train.session import (
    choose_held_out,
    distinct_prompts,
    encoder_without_model,
)

Config = TypeVar("Config", bound=RunConfig)

COMMANDS: dict[type[RunConfig], str] = {
    SFTConfig: "sft",
    PreferenceConfig: "train",
    RewardConfig: "reward",
    OnlineConfig: "online",
    PPOConfig: "ppo",
}


@dataclass(frozen=True, slots=True)
class Side:
    """The training rows, or the held-out rows that are used while training."""

    rows: int
    dropped: int
    prompts_cut: int
    """Prompts that lose their beginning."""
    responses_cut: int
    """Responses that lose their end."""
    tokens: int
    """What goes through the model in one pass over the rows that are kept."""
    scored_tokens: int
    """Those of them that the loss is about; 0 for a reward model, which scores responses."""

    @property
    def kept(self) -> int:
        return self.rows - self.dropped


@dataclass(frozen=True, slots=True)
class Steps:
    """The optimizer steps of a run; of samples, which have no length yet, the most there can be."""

    total: int
    each_pass: int
    """Steps in one pass over the rows, or in one round."""
    rows: int
    """Rows of a full batch."""
    mean_tokens: float | None
    most_tokens: int
    mean_passes: float | None
    """How many times a step runs the model, forward and backward."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a training command would do."""

    command: str
    folder: str
    state: str
    """Of that folder: new, unfinished, finished, or not a run."""
    template: str
    max_length: int
    train: Side
    held_out: Side
    steps: Steps
    data: RunData
    """For an estimate of memory and time."""
    samples: int = 0
    """Responses that are drawn of the policy for training."""
    reference_tokens: int = 0
    """What goes through the reference once, before training, where it stays as it is."""


def dry_run(config: RunConfig, *, trust_remote_code: bool = False) -> DryRun:
    """What training with this configuration would do.

    Raises:
        InputError: as training would, for data, tokenizer and template.
    """
    config = _in_memory(config)
    if isinstance(config, SFTConfig | PreferenceConfig | RewardConfig):
        return _on_given_rows(config, trust_remote_code)
    assert isinstance(config, OnlineConfig | PPOConfig)
    return _on_samples(config, trust_remote_code)


def _in_memory(config: Config) -> Config:
    """The same run without a store of rows, which would be written."""
    data = config.data.model_copy(update={"store": "memory", "cache": None})
    return config.model_copy(update={"data": data})


# -- the commands --------------------------------------------------------------------------------


def _on_given_rows(config: OnGivenRows, trust_remote_code: bool) -> DryRun:
    given = given_rows(config)
    data = given.data
    _check(config, [*data.train, *data.test])
    encoder, _ = _open_encoder(config, data, given.texts, trust_remote_code)
    train, kept = _side(encoder, data.train, given, "training rows")
    held_out, _ = _side(encoder, choose_held_out(data.test, config), given, "held-out rows")
    tokens = train.tokens + held_out.tokens if _scores_reference(config) else 0
    if isinstance(config, RewardConfig):
        train, held_out = (replace(side, scored_tokens=0) for side in (train, held_out))
    run = as_run_data(config, looked_at(kept, config), len(kept), encoder.tokenizer)
    steps = _steps(config, kept, whole_batch=run.whole_batch)
    return _dry_run(config, encoder, train, held_out, steps, run, reference_tokens=tokens)


def _check(config: OnGivenRows, rows: Sequence[Any]) -> None:
    """Refuse rows that lack what the loss asks for."""
    if isinstance(config, PreferenceConfig):
        check_scores(make_objective(config.loss), rows)
    if isinstance(config, RewardConfig) and config.margin is not None:
        check_margins(rows)


def _scores_reference(config: OnGivenRows) -> bool:
    """Whether the reference's log-probabilities are computed once, before training."""
    if not isinstance(config, PreferenceConfig) or config.moving_reference is not None:
        return False
    return make_objective(config.loss).needs_reference


def _on_samples(config: OnlineConfig | PPOConfig, trust_remote_code: bool) -> DryRun:
    data = load_prompts(config.data)
    encoder, positions = _open_encoder(config, data, [], trust_remote_code)

    def side(prompts: Sequence[Prompt], longest: int) -> tuple[Side, list[list[int]]]:
        ids = encode_prompts(encoder, prompts, max_new_tokens=longest, positions=positions)
        cut = sum(len(encoder.prompt_ids(prompt)) > positions - longest for prompt in prompts)
        return Side(len(prompts), 0, cut, 0, sum(map(len, ids)), 0), ids

    prompts = list(dict.fromkeys(row.prompt for row in data.train))
    train, ids = side(prompts, config.sampling.max_new_tokens)
    tested = distinct_prompts(data.test, config.evaluation.max_rows, config.seed)
    held_out, _ = side(tested, config.evaluation.max_new_tokens)
    run = as_sampled_data(config, looked_at(ids, config), len(prompts), encoder.tokenizer)
    assert run.sampling is not None
    most = max(map(len, ids)) + len(run.rows[0]) * config.sampling.max_new_tokens
    size = min(config.batch.size, run.num_rows)
    steps = Steps(run.num_steps, run.num_steps // run.num_rounds, size, None, size * most, None)
    return _dry_run(
        config,
        encoder,
        train,
        held_out,
        steps,
        run,
        samples=run.num_rounds * run.sampling.responses,
    )


# -- what they share -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched(Encoder):
    """An encoder that remembers what it gave."""

    given: list[EncodedRow] = field(default_factory=list)

    def encode(self, prompt: Prompt, responses: Sequence[str]) -> EncodedRow:
        row = super().encode(prompt, responses)
        self.given.append(row)
        return row


def _open_encoder(
    config: RunConfig, data: SplitData[Any], texts: Sequence[str], trust_remote_code: bool
) -> tuple[_Watched, int]:
    """The run's encoder, watched, and the model's positions."""
    encoder, positions = encoder_without_model(
        config, data, texts, trust_remote_code=trust_remote_code
    )
    return _Watched(encoder.tokenizer, encoder.template, encoder.max_length), positions


def _side(
    encoder: _Watched, rows: Sequence[Any], given: GivenRows, what: str
) -> tuple[Side, list[list[TokenSequence]]]:
    """The counts of some rows, and the sequences of each that is kept."""
    encoder.given.clear()
    kept = given.encode(encoder, rows, what)
    side = Side(
        rows=len(rows),
        dropped=len(rows) - len(kept),
        prompts_cut=sum(row.prompt_truncated for row in encoder.given),
        responses_cut=sum(row.responses_truncated for row in encoder.given),
        tokens=sum(map(packed_tokens, kept)),
        scored_tokens=sum(s.num_scored for sequences in kept for s in sequences),
    )
    return side, kept


def _steps(
    config: TrainingConfig, rows: Sequence[list[TokenSequence]], *, whole_batch: bool = False
) -> Steps:
    """The steps over these rows; tokens are those of the first pass."""
    costs = list(map(packed_tokens, rows))
    total = total_steps(config, len(costs))
    size, most = config.batch.size, config.batch.max_tokens
    each = steps_per_epoch(len(costs), size)
    batches = [
        [costs[row] for row in batch]
        for batch in (
            batch_rows(step, num_rows=len(costs), batch_size=size, seed=config.seed)
            for step in range(min(total, each))
        )
    ]
    passes = [1 if whole_batch else len(split_by_tokens(b, max_tokens=most)) for b in batches]
    return Steps(
        total=total,
        each_pass=each,
        rows=min(size, len(costs)),
        mean_tokens=fmean(map(sum, batches)),
        most_tokens=max(map(sum, batches)),
        mean_passes=fmean(passes),
    )


def _dry_run(
    config: Trained,
    encoder: Encoder,
    train: Side,
    held_out: Side,
    steps: Steps,
    data: RunData,
    *,
    samples: int = 0,
    reference_tokens: int = 0,
) -> DryRun:
    warn_of_warmup(config, steps.total)
    return DryRun(
        command=COMMANDS[type(config)],
        folder=config.out,
        state=_state(Path(config.out)),
        template=str(encoder.template),
        max_length=encoder.max_length,
        train=train,
        held_out=held_out,
        steps=steps,
        data=data,
        samples=samples,
        reference_tokens=reference_tokens,
    )


def _state(folder: Path) -> str:
    """What the run directory is before the run: training goes on in one of its own only."""
    if not folder.is_dir() or not foreign_files(folder):
        return "new"
    status = read_manifest(folder).get("status")
    return {"started": "unfinished", "finished": "finished"}.get(str(status), "not a run")
