"""The methods that studies compare: which command trains each, what makes it this method, and how
a study lets their settings be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from dpo.config import PreferenceConfig, RunConfig
from dpo.config_files import flat
from dpo.errors import InputError
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.report.exact_study import (
    DPO,
    IPO,
    ONLINE_DPO,
    PPO_RM,
    PPO_TRUE,
    PREFERRED_FT,
    UNLIKELIHOOD,
)

REWARD_MODEL = "reward_model"


@dataclass(frozen=True)
class MethodKind:
    """A method of the studies: which command trains it, and which key is its strength."""

    title: str
    schema: type[RunConfig]
    strength: str
    settings: Mapping[str, Any]
    """What makes it this method."""

    @property
    def by_reward_model(self) -> bool:
        return self.settings.get("reward") == REWARD_MODEL


METHOD_KINDS: dict[str, MethodKind] = {
    "dpo": MethodKind(DPO, PreferenceConfig, "loss.beta", {"loss.name": "dpo"}),
    "ipo": MethodKind(IPO, PreferenceConfig, "loss.beta", {"loss.name": "ipo"}),
    "preferred_ft": MethodKind(
        PREFERRED_FT, PreferenceConfig, "optimizer.learning_rate", {"loss.name": "nll"}
    ),
    "unlikelihood": MethodKind(
        UNLIKELIHOOD, PreferenceConfig, "loss.alpha", {"loss.name": "unlikelihood"}
    ),
    "ppo_rm": MethodKind(PPO_RM, PPOConfig, "kl.coefficient", {"reward": REWARD_MODEL}),
    "ppo_true": MethodKind(PPO_TRUE, PPOConfig, "kl.coefficient", {"reward.function": "synthetic"}),
    "online": MethodKind(
        ONLINE_DPO, OnlineConfig, "loss.beta", {"loss.name": "dpo", "reward": REWARD_MODEL}
    ),
}


def dotted(values: Any) -> Any:
    """Nested sections as dotted keys, so that `grid.loss.beta=[1]` replaces the key `loss.beta`.

    >>> dotted({"loss.beta": [0.3], "loss": {"beta": [1]}})
    {'loss.beta': [1]}
    """
    return dict(flat(values)) if isinstance(values, dict) else values


def dotted_for_each(values: Any) -> Any:
    """Each method's settings as dotted keys, whether they were written nested or not."""
    if not isinstance(values, dict):
        return values
    return {name: dotted(settings) for name, settings in values.items()}


Dotted = Annotated[dict[str, Any], BeforeValidator(dotted)]
"""Settings of a command."""


def refuse_own(settings: Iterable[str], own: Sequence[str], *, where: str) -> None:
    """Refuse keys, dotted ones or sections, that the study decides itself.

    Raises:
        InputError: the first of them.
    """
    for key in settings:
        if any(key == each or key.startswith(f"{each}.") for each in own):
            raise InputError(f"{where}.{key}: the study sets this itself; remove it.")
