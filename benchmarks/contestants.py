"""Who takes part in a scenario. "ours" is first; the others are compared with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import generation
import ours
import trl_side
from scenario import OURS, Scenario
from stepwise import Pause
from torch import nn
from workload import Workload

from dpo.models.load import fuse_activations

Loop = Callable[[Pause], None]


def names(task: str) -> list[str]:
    """The contestants of a task."""
    if task == "generate":
        return [OURS, "transformers"]
    return [OURS, "trl-best", "trl-default"]


def make_loop(name: str, scenario: Scenario, workload: Workload, model: nn.Module) -> Loop:
    """A contestant's loop, with all done that it does once before its first step."""
    if name == OURS:
        model = fuse_activations(model)  # as our loader does
    if scenario.task == "generate":
        make = generation.our_loop if name == OURS else generation.transformers_loop
        return make(scenario, workload, model)
    if name == OURS:
        return ours.training_loop(scenario, workload, model)
    return trl_side.training_loop(scenario, workload, model, best=name == "trl-best")


def settings(name: str, scenario: Scenario) -> str:
    """In words, what is particular to how a contestant was run."""
    values: dict[str, Any] = scenario.record()
    if scenario.task == "generate":
        return generation.SETTINGS[name].format(**values)
    if name == OURS:
        return ours.SETTINGS[scenario.task].format(**values)
    return trl_side.SETTINGS[scenario.task, name == "trl-best"]
