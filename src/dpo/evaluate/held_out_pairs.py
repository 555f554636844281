"""The held-out pairs of a run as columns: margins, changes of log-probability, lengths, subsets."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from dpo.errors import InputError
from dpo.loss_config import LossConfig
from dpo.train.encoded import TIE_NATS
from dpo.train.held_out import HeldOutPair, read_held_out
from dpo.train.objective import make_objective, reward_scale

Floats = NDArray[np.float64]

MAX_SUBSETS = 20
"""Where there are more, the smallest are put together."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs of a run as columns, (P,)."""

    pairs: list[HeldOutPair]
    scale: float
    """What a log-ratio is multiplied with to be a reward: beta."""

    @staticmethod
    def of_run(folder: Path) -> HeldOut:
        """The pairs whose numbers are all finite; none where the run has no such file."""
        pairs = [pair for pair in read_held_out(folder) if math.isfinite(_log_ratio_margin(pair))]
        return HeldOut(pairs, _scale(folder) if pairs else 1.0)

    @property
    def num(self) -> int:
        return len(self.pairs)

    @cached_property
    def prompts(self) -> list[int]:
        return [pair.prompt for pair in self.pairs]

    @cached_property
    def margins(self) -> Floats:
        """Difference of the implicit rewards `beta (log pi - log pi_ref)`, chosen minus rejected;
        `beta log pi` where the loss has no reference. A difference within rounding is 0.
        """
        found = np.array([_log_ratio_margin(pair) for pair in self.pairs])
        return np.where(np.abs(found) <= TIE_NATS, 0.0, self.scale * found)

    @cached_property
    def right(self) -> Floats:
        """1 where the chosen response has the higher implicit reward, else 0; a tie is no hit."""
        return (self.margins > 0).astype(np.float64)

    @cached_property
    def length_differences(self) -> Floats:
        """Tokens of the chosen minus tokens of the rejected response."""
        return np.array([float(p.chosen_tokens - p.rejected_tokens) for p in self.pairs])

    @cached_property
    def changes(self) -> tuple[Floats, Floats]:
        """Of the log-probabilities of chosen and rejected responses, in training; NaN where the
        start is not known.
        """
        chosen = np.array([pair.chosen_change for pair in self.pairs])
        return chosen, np.array([pair.rejected_change for pair in self.pairs])

    @cached_property
    def subsets(self) -> tuple[str, list[str]]:
        """What they go by, and the subset of each pair: the data's own, or else quarters by the
        prompts' length. Of more than `MAX_SUBSETS`, the smallest are "others".
        """
        own = [pair.subset or "(none)" for pair in self.pairs]
        counts = Counter(own)
        if len(counts) > 1:
            named = len(counts) if len(counts) <= MAX_SUBSETS else MAX_SUBSETS - 1
            large = {name for name, _ in counts.most_common(named)}
            return "subset", [name if name in large else "others" for name in own]
        lengths = np.array([pair.prompt_tokens for pair in self.pairs])
        edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="lower"))
        quarter = np.searchsorted(edges, lengths)
        width = len(str(lengths.max()))  # zeros in front, so that the names are in order
        names = {}
        for number in np.unique(quarter):
            inside = lengths[quarter == number]
            low, high = f"{inside.min():0{width}d}", f"{inside.max():0{width}d}"
            names[number] = f"{low} to {high} prompt tokens"
        return "length of the prompt", [names[number] for number in quarter]


def _log_ratio_margin(pair: HeldOutPair) -> float:
    """`log pi/pi_ref` of the chosen minus that of the rejected response, in nats."""
    chosen = pair.chosen_logp - (pair.reference_chosen_logp or 0.0)
    return chosen - (pair.rejected_logp - (pair.reference_rejected_logp or 0.0))


def _scale(folder: Path) -> float:
    """The factor of the run's rewards, from its configuration: beta, or 1 without one."""
    file = folder / "config.json"
    try:
        loss = json.loads(file.read_text(encoding="utf-8"))["loss"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected the configuration of a preference run.") from error
    config = TypeAdapter[Any](LossConfig).validate_python(loss)
    return reward_scale(make_objective(config))
