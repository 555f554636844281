"""The configuration of each command that takes one, but of studies, whose are slow to load."""

from __future__ import annotations

from pydantic import BaseModel

from dpo.config import PreferenceConfig, RewardConfig, SFTConfig
from dpo.evaluation_config import EvaluateConfig
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.plan_config import PreferencePlanConfig

SCHEMAS: dict[str, type[BaseModel]] = {
    "sft": SFTConfig,
    "train": PreferenceConfig,
    "reward": RewardConfig,
    "online": OnlineConfig,
    "ppo": PPOConfig,
    "evaluate": EvaluateConfig,
    "plan": PreferencePlanConfig,
}
