"""What the runs of a study on given pairs have measured, and questions put to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo.evaluate.jobs import Evaluation
from dpo.report.frontier_study import Cost

SFT = "SFT"


@dataclass(frozen=True, slots=True)
class CellResult:
    """One run of a study: its held-out metrics over the epochs (nan where they do not apply), and
    what it took.
    """

    label: str
    seed: int
    folder: str
    epochs: list[float]
    loss: list[float]
    accuracy: list[float]
    """How often the reward, DPO's implicit one or a reward model's, prefers the chosen response."""
    chosen_change: list[float]
    kl: list[float]
    """To the SFT model of the seed, in nats a response, on the policy's own samples."""
    kl_stderr: list[float]
    models: list[str]
    """In memory while it is trained."""
    cost: Cost
    """Together with its reward model's, where it needs one."""


@dataclass(frozen=True, slots=True)
class BestOf:
    """Best-of-n, which trains nothing but a reward model."""

    label: str
    n: int
    kl_bound: float
    """`log n - (n - 1)/n`: the most that its KL to the SFT model can be, in nats."""
    models: list[str]
    """In memory while it answers."""
    costs: list[Cost]
    """Of each seed: the reward model's."""


@dataclass(frozen=True, slots=True)
class Study:
    """A finished study."""

    folder: Path
    results: list[CellResult]
    """Of the runs that leave a policy."""
    evaluation: Evaluation
    reward_models: list[CellResult] = field(default_factory=list)
    best_of: BestOf | None = None
    judged: dict[str, Any] = field(default_factory=dict)
    """The evaluation's own record: how it was made, win rates and paired tests."""
    memory_is_known: bool = False
    """Whether every run had a process of its own."""

    def labels(self) -> list[str]:
        """The trained methods, in order."""
        return list(dict.fromkeys(result.label for result in self.results))

    def of(self, label: str) -> list[CellResult]:
        """The runs of a method, one a seed."""
        return [result for result in self.results if result.label == label]
