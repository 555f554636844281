"""This project's side: the steps that `dpo train` and `dpo sft` make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scenario import Scenario
from stepwise import Pause
from torch import nn
from workload import Workload

from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import validate
from dpo.train.encoded import sequences_of
from dpo.train.loop import training_step
from dpo.train.preference import PreferenceMethod
from dpo.train.reference import score_all
from dpo.train.schedule import adamw
from dpo.train.sft import SupervisedMethod

SETTINGS = {
    "dpo": "batch.max_tokens={max_tokens}, reference log-probabilities cached before training",
    "sft": "batch.max_tokens={max_tokens}",
}


def training_loop(
    scenario: Scenario, workload: Workload, model: nn.Module
) -> Callable[[Pause], None]:
    """Our loop over the workload's steps. What `dpo train` does once, before training, is done
    here.
    """
    config = _config(scenario, workload)
    method = _method(scenario, workload, model, config)

    def loop(pause: Pause) -> None:
        settings = config.optimizer
        optimizer = adamw(
            model,
            beta1=settings.beta1,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        for step in range(workload.num_steps):
            metrics = training_step(method, model, optimizer, config, step=step)
            pause(metrics["loss"])

    return loop


def _config(scenario: Scenario, workload: Workload) -> Any:
    values: dict[str, Any] = {
        "model": "random",
        "out": "nowhere",
        "seed": workload.seed,
        "max_steps": workload.num_steps,
        "batch": {"size": workload.batch_size, "max_tokens": scenario.max_tokens},
        "optimizer": {
            "learning_rate": scenario.learning_rate,
            "schedule": "constant",
            "warmup": 0.0,
        },
        "precision": scenario.precision,
    }
    if scenario.task == "sft":
        return validate(SFTConfig, values)
    return validate(PreferenceConfig, {**values, "loss": {"beta": scenario.beta}})


def _method(scenario: Scenario, workload: Workload, model: nn.Module, config: Any) -> Any:
    common: dict[str, Any] = {
        "test": [],
        "precision": scenario.precision,
        "max_tokens": scenario.max_tokens,
        "save": lambda policy, folder: None,
    }
    if scenario.task == "sft":
        chosen = [pair.chosen for pair in workload.pairs]
        return SupervisedMethod(
            train=chosen, sources=[pair.source for pair in workload.pairs], **common
        )
    reference = score_all(
        model,
        sequences_of(workload.pairs),
        precision=scenario.precision,
        max_tokens=scenario.max_tokens,
    )
    return PreferenceMethod(
        train=workload.pairs,
        train_reference=reference,
        test_reference=reference[:0],
        loss_config=config.loss,
        on_policy=None,
        **common,
    )
