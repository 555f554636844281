"""Reward models: Bradley-Terry on pairs, Plackett-Luce on rankings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo import atomic
from dpo.config import RewardConfig
from dpo.core.reward_losses import ordered_margins, pair_loss, ranking_loss
from dpo.core.stats import pair_calibration
from dpo.data.pack import packed_tokens
from dpo.data.prompts import as_text
from dpo.data.rows import PreferenceRow, RankedRow
from dpo.data.tokenize import Encoder
from dpo.errors import InputError
from dpo.models.parts import is_sharded, recut, settle
from dpo.models.recompute import enable_recomputation
from dpo.models.reward import (
    USAGE,
    from_causal,
    give_padding,
    is_packed,
    save_reward_model,
    sequence_scores,
    with_end,
)
from dpo.train.adapters import open_trained
from dpo.train.encoded import KINDS, EncodedPair, EncodedRanking, Kind
from dpo.train.jobs import load_rows_for
from dpo.train.loop import BatchResult, PlainMethod, fit
from dpo.train.run import Run, save_train_prompts
from dpo.train.session import (
    Policy,
    choose_held_out,
    make_run_encoder,
    opened_run,
    prompts_seen,
    run_card,
)
from dpo.train.sharding import tokens_at_once

SCORED = "held_out.jsonl"
"""In `samples/`: the held-out rows with their rewards."""

KIND_OF = {"bradley_terry": "pair", "plackett_luce": "list"}
"""The rows that a loss takes, as the preference losses call them."""

LOGGED = {"logps/best_change": "rewards/best", "logps/others_change": "rewards/others"}
"""What the metrics of rankings call log-ratios are rewards here."""


@dataclass
class RewardMethod(PlainMethod):
    """A Bradley-Terry or Plackett-Luce loss on the rewards of encoded rows."""

    train: Sequence[Any]
    test: Sequence[Any]
    loss_name: str
    margin: bool
    """Whether the data's scores ask for a margin."""
    centre: float
    precision: str
    max_tokens: int
    save: Callable[[nn.Module, Path], None]

    @property
    def kind(self) -> Kind:
        return KINDS[KIND_OF[self.loss_name]]

    @property
    def num_rows(self) -> int:
        return len(self.train)

    def num_tokens(self, row: int) -> int:
        return packed_tokens(with_end(self.train[row].sequences))

    def weight(self, rows: Sequence[int]) -> int:
        """Rows: every pair or ranking counts the same, whatever its lengths."""
        return len(rows)

    def loss(self, policy: nn.Module, rows: Sequence[int]) -> BatchResult:
        members = [self.train[row] for row in rows]
        rewards = self._rewards(policy, members)
        with torch.no_grad():
            metrics = self._metrics(members, rewards)
        sums = {name: value.sum().item() for name, value in metrics.items()}
        return BatchResult(self._losses(members, rewards).sum(), sums)

    def evaluate(self, policy: nn.Module) -> dict[str, float]:
        """Held-out loss, rewards, accuracy with its ties, and calibration."""
        rewards = self._rewards(policy, self.test)
        values = {"loss": self._losses(self.test, rewards)} | self._metrics(self.test, rewards)
        found = {f"eval/{name}": value.mean().item() for name, value in values.items()}
        if rewards.isfinite().all():  # else the loop stops by the loss
            calibration = pair_calibration(self._margins(rewards))
            found |= {"eval/calibration_error": calibration.error, "eval/brier": calibration.brier}
        return found

    def scored(self, policy: nn.Module) -> list[tuple[Any, list[float]]]:
        """Every held-out row with the rewards of its responses, in the data's order."""
        policy.eval()
        with torch.no_grad():
            return list(zip(self.test, self._by_row(self._rewards(policy, self.test)), strict=True))

    def _rewards(self, policy: nn.Module, rows: Sequence[Any]) -> Tensor:
        """The reward of every sequence, in the order of `Kind.sequences(rows)`."""
        return sequence_scores(
            policy,
            self.kind.sequences(rows),
            precision=self.precision,
            max_tokens=tokens_at_once(policy, self.max_tokens),
        )

    def _losses(self, rows: Sequence[Any], rewards: Tensor) -> Tensor:
        """The loss of each row, (B,)."""
        facts = self.kind.facts(rows, rewards.device)
        if self.loss_name == "bradley_terry":
            margins = facts["chosen_scores"] - facts["rejected_scores"] if self.margin else None
            return pair_loss(*rewards.chunk(2), margins=margins, centre=self.centre)
        padded = self.kind.tensors(rows, "policy", rewards)["policy_logps"]
        return ranking_loss(padded, facts["mask"], facts["ranks"], centre=self.centre)

    def _metrics(self, rows: Sequence[Any], rewards: Tensor) -> dict[str, Tensor]:
        """What is logged of each row, (B,): the metrics of implicit rewards, on explicit ones."""
        kind = self.kind
        tensors = kind.tensors(rows, "policy", rewards) | kind.facts(rows, rewards.device)
        tensors |= kind.tensors(rows, "reference", torch.zeros_like(rewards))
        found = kind.metrics(tensors, 1.0)
        named = {LOGGED.get(name, name): value for name, value in found.items()}
        means = [torch.stack(of_row).mean() for of_row in self._split(rows, rewards)]
        kept = {name: value for name, value in named.items() if name.startswith("rewards/")}
        return {**kept, "rewards/mean": torch.stack(means)}

    def _split(self, rows: Sequence[Any], rewards: Tensor) -> list[list[Tensor]]:
        """Each row's own rewards."""
        if self.loss_name == "bradley_terry":
            return [list(pair) for pair in zip(*rewards.chunk(2), strict=True)]
        return [list(own) for own in rewards.split([len(row.sequences) for row in rows])]

    def _by_row(self, rewards: Tensor) -> list[list[float]]:
        return [[r.item() for r in own] for own in self._split(self.test, rewards)]

    def _margins(self, rewards: Tensor) -> list[float]:
        """Of every two held-out responses of which one is preferred."""
        of_rows = zip(self.test, self._by_row(rewards), strict=True)
        return [margin for row, own in of_rows for margin in ordered_margins(own, ranks_of(row))]

    def describe(self, row: int) -> str:
        return str(self.train[row].source)

    def save_model(self, policy: nn.Module, folder: Path) -> None:
        self.save(policy, folder)


def ranks_of(row: EncodedPair | EncodedRanking) -> tuple[int, ...]:
    """0 for the best."""
    return (0, 1) if isinstance(row, EncodedPair) else row.ranks


def train_reward(config: RewardConfig, *, trust_remote_code: bool = False) -> Path:
    """Train a reward model; returns the run directory, finished.

    Raises:
        InputError, DivergedError, CheckpointError, StorageError, Stopped: as their classes say.
    """
    data = load_rows_for(KIND_OF[config.loss], config.data)
    if config.margin is not None:
        check_margins(itertools.chain(data.train, data.test))
    texts = [text for row in data.train for text in texts_of(row)] if config.model.fresh else []
    policy = open_trained(config, texts, trust_remote_code)
    encoder = make_run_encoder(config, policy, data)
    policy = replace(policy, model=_with_head(policy, encoder, config.seed))
    model = policy.model
    if config.gradient_checkpointing:
        enable_recomputation(model)
    with opened_run(config, data, policy, encoder, command="reward") as run:
        if run.finished:
            return run.folder
        kind, most = KINDS[KIND_OF[config.loss]], config.data.max_dropped
        held_out = choose_held_out(data.test, config)
        end = ", ".join(map(str, encoder.response_ids("")))
        card = run_card(
            config,
            policy,
            encoder,
            f"A reward model, trained with the loss `{config.loss}`.",
            task="text-classification",
            usage=USAGE.format(end=end),
        )
        method = RewardMethod(
            train=kind.encode(encoder, data.train, max_dropped=most, what="training rows"),
            test=kind.encode(encoder, held_out, max_dropped=most, what="held-out rows"),
            loss_name=config.loss,
            margin=config.margin is not None,
            centre=config.centre,
            precision=config.precision,
            max_tokens=config.batch.max_tokens,
            save=lambda trained, folder: save_reward_model(
                trained, policy.tokenizer, encoder.template, folder, card=card
            ),
        )
        if run.writes:
            save_train_prompts(run.folder, prompts_seen(config, data))
        fit(method, model, config, run)
        if run.writes or is_sharded(model):  # then all run it
            write_scored(method, model, encoder, run)
        run.update_manifest(status="finished")
    return run.folder


def _with_head(start: Policy, encoder: Encoder, seed: int) -> nn.Module:
    """The model that training starts from, with a reward for a head and padding of its own.

    Raises:
        InputError: it cannot become a reward model, or not one in parts.
    """

    tokenizer = start.tokenizer

    def headed(model: nn.Module) -> nn.Module:
        classifier = from_causal(model, seed=seed)
        give_padding(classifier, tokenizer, ends=encoder.stop_ids)
        return classifier

    if not is_sharded(start.model):
        return headed(start.model)
    model = recut(start.model, headed)
    if not is_packed(model):
        raise InputError(f"distributed.kind: {start.name} is run on padded rows; use ddp.")
    settle(model)
    return model


def texts_of(row: PreferenceRow | RankedRow) -> list[str]:
    """What a fresh tokenizer learns from."""
    responses = row.responses if isinstance(row, RankedRow) else (row.chosen, row.rejected)
    return [f"{as_text(row.prompt)}\n{response}" for response in responses]


def check_margins(rows: Iterable[PreferenceRow]) -> None:
    """Refuse pairs without scores, or whose scores contradict the preference.

    Raises:
        InputError: the first such pair.
    """
    for row in rows:
        where = f"{row.source}: " if row.source else ""
        if row.scores is None:
            raise InputError(
                f"{where}margin=scores takes scores; every pair needs chosen_score and "
                "rejected_score, or its ranking scores."
            )
        if row.scores[0] < row.scores[1]:
            raise InputError(
                f"{where}chosen_score {row.scores[0]:g} is below rejected_score "
                f"{row.scores[1]:g}; a margin cannot be negative."
            )


def write_scored(method: RewardMethod, model: nn.Module, encoder: Encoder, run: Run) -> None:
    """The held-out rows as the model read them, with the reward of each response, best first as
    the data have it.
    """
    lines = []
    for row, rewards in method.scored(model):
        prompt, *_ = [encoder.decode(s.ids[: s.prompt_length]) for s in row.sequences]
        line = {
            "source": row.source,
            "prompt": prompt,
            "responses": [encoder.decode(s.ids[s.prompt_length :]) for s in row.sequences],
            "ranks": ranks_of(row),
            "rewards": rewards,
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    if not run.writes:
        return
    (run.folder / "samples").mkdir(exist_ok=True)
    atomic.write_text(run.folder / "samples" / SCORED, "\n".join(lines) + "\n")
