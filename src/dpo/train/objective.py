"""A configured loss as the trainer calls it: which tensors it wants, and one function of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo.core import family, losses
from dpo.core.family import LOSSES, Loss
from dpo.core.unpaired import update_reward_shift
from dpo.errors import InputError
from dpo.loss_config import (
    AlphaDPOLossConfig,
    BetaDPOLossConfig,
    LossConfig,
    MixLossConfig,
    SingleLossConfig,
)
from dpo.train.encoded import TIE_NATS

WHOLE_BATCH = frozenset({"aot", "aot_unpaired", "beta_dpo", "alpha_dpo", "bco", "bco_pair", "kto"})
"""Losses in which the rows of a batch act on one another, so that a batch cannot be split."""


@dataclass
class Term:
    """One loss of a mixture, with its options and the running values that it carries."""

    loss: Loss
    options: dict[str, Any]
    weight: float
    momentum: float = 0.9
    keep: float = 1.0
    """Share of a training batch that is kept, outliers dropped (beta-DPO)."""
    running: dict[str, float] = field(default_factory=dict)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The loss of each row."""
        given = [
            _scalar(self.running.get(name, RUNNING[name]), tensors)
            if name in RUNNING
            else tensors[name]
            for name in family.tensors(self.loss)
        ]
        return self.loss.function(*given, **self.options)

    def training_loss(self, tensors: Mapping[str, Tensor], seed: int) -> Tensor:
        """The summed loss of a batch, after taking it into the running values. Where outliers are
        dropped, the rows that stay stand for them.
        """
        self.update(tensors)
        if self.keep == 1.0:
            return self(tensors).sum()
        margins = losses.margin(*(tensors[name] for name in family.tensors(self.loss)[:4]))
        kept = losses.beta_dpo_selection(
            margins,
            *(_scalar(self.running.get(name, RUNNING[name]), tensors) for name in MARGINS),
            keep=self.keep,
            generator=torch.Generator(margins.device).manual_seed(seed),
        )
        return self({name: value[kept] for name, value in tensors.items()}).mean() * len(margins)

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a batch into the running values, as the papers do it: before its loss is computed.

        Raises:
            KeyError: a tensor is missing.
        """
        wanted = family.tensors(self.loss)
        if "reward_shift" in wanted:
            self._update_shift(tensors)
        if "running_margin" in wanted:
            self._update_margin(tensors, per_token="chosen_lengths" in wanted)

    def _update_shift(self, tensors: Mapping[str, Tensor]) -> None:
        """BCO: the mean of all rewards seen."""
        if self.loss.kind == "pair":
            sides = ("chosen", "rejected")
            policy = torch.cat([tensors[f"policy_{side}_logps"] for side in sides])
            reference = torch.cat([tensors[f"reference_{side}_logps"] for side in sides])
        else:
            policy, reference = tensors["policy_logps"], tensors["reference_logps"]
        shift, seen = (
            _scalar(self.running.get(name, 0.0), tensors) for name in ("reward_shift", "num_seen")
        )
        shift, seen = update_reward_shift(shift, seen, policy, reference, beta=self.options["beta"])
        self.running |= {"reward_shift": shift.item(), "num_seen": seen.item()}

    def _update_margin(self, tensors: Mapping[str, Tensor], *, per_token: bool) -> None:
        """beta-DPO and alpha-DPO: moving averages of the margins' mean and standard deviation."""
        names = family.tensors(self.loss)[: 6 if per_token else 4]  # lengths come after the four
        of_batch = losses.average_margin if per_token else losses.margin
        margins: Tensor = of_batch(**{name: tensors[name] for name in names})
        margins = margins.detach().double()
        spread = margins.std(correction=0)
        if spread <= TIE_NATS:  # policy and reference are still equal: nothing to standardise by
            return
        for name, value in zip(MARGINS, (margins.mean(), spread), strict=True):
            before = _scalar(self.running.get(name, value.item()), tensors)
            after = losses.moving_average(before, value, momentum=self.momentum)
            self.running[name] = after.item()


RUNNING = {"reward_shift": 0.0, "running_margin": 0.0, "running_margin_std": 1.0}
"""Scalars that a loss carries from batch to batch, and what they are before the first; a checkpoint
holds them.
"""
MARGINS = ("running_margin", "running_margin_std")


@dataclass
class Objective:
    """A weighted sum of losses of one kind."""

    terms: list[Term]

    @property
    def kind(self) -> str:
        return self.terms[0].loss.kind

    @property
    def wants(self) -> frozenset[str]:
        """Names of the tensors of a batch that its losses take."""
        names = {name for term in self.terms for name in family.tensors(term.loss)}
        return frozenset(names - RUNNING.keys())

    @property
    def needs_reference(self) -> bool:
        return any(family.needs_reference(term.loss) for term in self.terms)

    @property
    def whole_batch(self) -> bool:
        """Whether a batch must go through the loss at once."""
        return any(term.loss.name in WHOLE_BATCH for term in self.terms)

    @property
    def needs_scores(self) -> bool:
        return bool(self.wants & {"chosen_scores", "rejected_scores", "scores"})

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The loss of each row, weighted and added."""
        return torch.stack([term.weight * term(tensors) for term in self.terms]).sum(0)

    def training_loss(self, tensors: Mapping[str, Tensor], *, seed: int) -> Tensor:
        """The summed loss of a training batch, which the running values take in first.

        Args:
            seed: decides which outliers are dropped, where a loss drops any.
        """
        sums = [term.weight * term.training_loss(tensors, seed) for term in self.terms]
        return torch.stack(sums).sum()

    def state(self) -> dict[str, float]:
        """Running values, by term and name: what a checkpoint must hold."""
        return {
            f"{number}.{name}": value
            for number, term in enumerate(self.terms)
            for name, value in term.running.items()
        }

    def restore(self, state: Mapping[str, float]) -> None:
        for key, value in state.items():
            number, _, name = key.partition(".")
            self.terms[int(number)].running[name] = value


def make_objective(config: LossConfig, *, vocab_size: int = 0) -> Objective:
    """The losses that a configuration names, ready to be called.

    Args:
        vocab_size: what the model's head gives, for losses that compare with a uniform choice.
    """
    if isinstance(config, MixLossConfig):
        return Objective([_term(part.loss, part.weight, vocab_size) for part in config.mix])
    return Objective([_term(config, 1.0, vocab_size)])


def _term(config: SingleLossConfig, weight: float, vocab_size: int) -> Term:
    loss = LOSSES[config.name]
    options = config.arguments()
    if "vocab_size" in family.options(loss):
        options["vocab_size"] = vocab_size
    if isinstance(config, BetaDPOLossConfig | AlphaDPOLossConfig):
        momentum = config.running.momentum
        keep = config.keep if isinstance(config, BetaDPOLossConfig) else 1.0
        return Term(loss, options, weight, momentum, keep)
    return Term(loss, options, weight)


def reward_scale(objective: Objective) -> float:
    """What a log-ratio is multiplied with to be logged as a reward: beta of the first loss that has
    one, else 1.
    """
    for term in objective.terms:
        if "beta" in term.options:
            return float(term.options["beta"])
    return 1.0


def check_scores(objective: Objective, rows: Iterable[Any]) -> None:
    """Refuse rows without scores where the loss takes them.

    Raises:
        InputError: the first such row.
    """
    if not objective.needs_scores:
        return
    for row in rows:
        if row.scores is None:
            where = f"{row.source}: " if row.source else ""
            raise InputError(
                f"{where}the loss {objective.terms[0].loss.name} takes scores; every row needs "
                "chosen_score and rejected_score, or scores beside its responses."
            )


def _scalar(value: float, tensors: Mapping[str, Tensor]) -> Tensor:
    """A running value beside the tensors of a batch."""
    device = next(iter(tensors.values())).device
    return torch.tensor(value, dtype=torch.float64, device=device)
