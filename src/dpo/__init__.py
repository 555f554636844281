"""Direct Preference Optimization: to read, to run on your own preference data, and to trust.

Start reading at `dpo.core.losses`; the equation is there. The names below are loaded when they are
first asked for, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.config import PreferenceConfig as PreferenceConfig
    from dpo.config import RewardConfig as RewardConfig
    from dpo.config import SFTConfig as SFTConfig
    from dpo.config_files import read_config as read_config
    from dpo.core.listwise import plackett_luce as plackett_luce_loss
    from dpo.core.losses import dpo as dpo_loss
    from dpo.evaluate.jobs import evaluate as evaluate_models
    from dpo.evaluation_config import EvaluateConfig as EvaluateConfig
    from dpo.online_config import OnlineConfig as OnlineConfig
    from dpo.online_config import PPOConfig as PPOConfig
    from dpo.train.jobs import train_preference as train_preference
    from dpo.train.jobs import train_sft as train_sft
    from dpo.train.online import train_online as train_online
    from dpo.train.ppo import train_ppo as train_ppo
    from dpo.train.reward import train_reward as train_reward

__version__ = "0.1.0"

_PLACES = {
    "EvaluateConfig": "dpo.evaluation_config:EvaluateConfig",
    "OnlineConfig": "dpo.online_config:OnlineConfig",
    "PPOConfig": "dpo.online_config:PPOConfig",
    "PreferenceConfig": "dpo.config:PreferenceConfig",
    "RewardConfig": "dpo.config:RewardConfig",
    "SFTConfig": "dpo.config:SFTConfig",
    "dpo_loss": "dpo.core.losses:dpo",
    "evaluate_models": "dpo.evaluate.jobs:evaluate",
    "plackett_luce_loss": "dpo.core.listwise:plackett_luce",
    "read_config": "dpo.config_files:read_config",
    "train_online": "dpo.train.online:train_online",
    "train_ppo": "dpo.train.ppo:train_ppo",
    "train_preference": "dpo.train.jobs:train_preference",
    "train_reward": "dpo.train.reward:train_reward",
    "train_sft": "dpo.train.jobs:train_sft",
}
"""Public name: the module that defines it, and its name there."""

__all__ = [
    "EvaluateConfig",
    "OnlineConfig",
    "PPOConfig",
    "PreferenceConfig",
    "RewardConfig",
    "SFTConfig",
    "__version__",
    "dpo_loss",
    "evaluate_models",
    "plackett_luce_loss",
    "read_config",
    "train_online",
    "train_ppo",
    "train_preference",
    "train_reward",
    "train_sft",
]

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """Load a public name (PEP 562)."""
        if name not in _PLACES:
            raise AttributeError(f"module 'dpo' has no attribute {name!r}")
        module, _, inner = _PLACES[name].partition(":")
        value = globals()[name] = getattr(import_module(module), inner)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
