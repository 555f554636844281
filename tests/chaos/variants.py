"""What is killed: small runs that, between them, use all that a resumed run must put back.

A new trainer gets a function here and its lines in `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo.config import RewardConfig
from dpo.config_files import validate
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train.jobs import train_preference, train_sft
from dpo.train.online import train_online
from dpo.train.ppo import train_ppo
from dpo.train.reward import train_reward
from train.small_runs import COMMON, DATA, dpo_config, merged, sft_config, sft_run

Variant = Callable[[Path], object]
"""Trains in a run directory, or goes on there."""

LENGTH = {"max_steps": 24, "evaluation.every": 9, "save_every": 3}
PASSES = {"batch.max_tokens": 100}
"""Some five forward and backward passes to a step."""
EVERY_STEP = {"save_every": 1}


def _sft(changes: dict[str, Any]) -> Variant:
    return lambda folder: train_sft(sft_config(folder, LENGTH | changes))


def _preference(changes: dict[str, Any]) -> Variant:
    return lambda folder: train_preference(dpo_config(folder, LENGTH | changes))


def _reward(changes: dict[str, Any]) -> Variant:
    start = COMMON | {"evaluation": {"max_rows": 16}, "optimizer": {"learning_rate": 0.003}}

    def train(folder: Path) -> Path:
        own = start | {"model": {"path": str(sft_run())}, "out": str(folder)}
        return train_reward(validate(RewardConfig, merged(own, LENGTH | changes)))

    return train


SAMPLED = {
    "data": DATA,
    "reward": {"function": "synthetic"},
    "rounds": 5,
    "prompts_per_round": 6,
    "samples_per_prompt": 3,
    "sampling": {"max_new_tokens": 8},
    "batch": {"size": 4},
    "optimizer": {"learning_rate": 0.003},
    "save_every": 3,
    "evaluation": {"every": 9, "max_rows": 8, "num_samples": 2, "max_new_tokens": 8},
}
"""Rounds of a few steps on samples of the policy."""


def _online(changes: dict[str, Any]) -> Variant:
    def train(folder: Path) -> Path:
        own = SAMPLED | {"model": {"path": str(sft_run())}, "out": str(folder)}
        return train_online(
            validate(OnlineConfig, merged(own, {"prompts_per_round": 12} | changes))
        )

    return train


def _ppo(changes: dict[str, Any]) -> Variant:
    def train(folder: Path) -> Path:
        own = SAMPLED | {"model": {"path": str(sft_run())}, "out": str(folder)}
        return train_ppo(validate(PPOConfig, merged(own, {"epochs_per_round": 1} | changes)))

    return train


VARIANTS: dict[str, Variant] = {
    "sft": _sft(EVERY_STEP),
    "sft, dropout, accumulating": _sft({"dropout": True, **PASSES}),
    "dpo": _preference(EVERY_STEP),
    "dpo, dropout": _preference({"dropout": True}),
    "dpo, bf16": _preference({"precision": "bf16"}),
    "dpo, accumulating": _preference(EVERY_STEP | PASSES),
    "dpo, moving reference": _preference({"moving_reference": {"mix": 0.5, "every": 3}}),
    "bco, running shift": _preference({"loss": {"name": "bco"}}),
    "beta-dpo, running means": _preference({"loss": {"name": "beta_dpo"}, **EVERY_STEP}),
    "reward model, accumulating": _reward(EVERY_STEP | PASSES),
    "online dpo": _online(EVERY_STEP),
    "online dpo, reset reference": _online({"reset_reference_each_round": True}),
    "ppo, adaptive KL": _ppo({"kl": {"target": 0.5}}),
    "ppo, shared critic, accumulating": _ppo({"critic": "shared", **EVERY_STEP, **PASSES}),
}
