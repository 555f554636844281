"""`dpo plan`: whether a run fits a machine, how long its steps take, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from dpo.config_files import nested, validate
from dpo.core.machines import GIB, GPUS, UTILISATION, Machine
from dpo.errors import InputError
from dpo.plan_config import MachineConfig, PlanConfig
from dpo.report.tables import on_screen
from dpo.train.estimate import Estimate, estimate, in_words, needs_in_words, steps_in_words
from dpo.train.run_data import RunData, read_data
from dpo.train.this_machine import this_machine

RECOMPUTED: dict[str, Any] = {"gradient_checkpointing": True}
IN_BACKWARD: dict[str, Any] = {"optimizer.in_backward": True, "optimizer.max_grad_norm": None}
SMALL_PASSES: dict[str, Any] = {"batch.max_tokens": 1024, "batch.max_logit_mib": 128}
ROUNDED: dict[str, Any] = {"precision": "pure_bf16"}
LORA: dict[str, Any] = {"adapter": "lora"}
SHARDED: dict[str, Any] = {"distributed.kind": "fsdp"}
OFFLOADED: dict[str, Any] = SHARDED | {"distributed.cpu_offload": True}

CHANGES: tuple[dict[str, Any], ...] = (
    {},
    RECOMPUTED,
    RECOMPUTED | SMALL_PASSES,
    RECOMPUTED | IN_BACKWARD,
    SHARDED | RECOMPUTED | SMALL_PASSES,
    OFFLOADED | RECOMPUTED | SMALL_PASSES,
    ROUNDED | RECOMPUTED | SMALL_PASSES,
    ROUNDED | RECOMPUTED | IN_BACKWARD,
    LORA,
    LORA | RECOMPUTED | SMALL_PASSES,
    LORA | ROUNDED | RECOMPUTED | SMALL_PASSES,
    SHARDED | LORA | ROUNDED | RECOMPUTED | SMALL_PASSES,
)
"""What is tried, from what changes least to what changes most. The gradient is the same but for
rounding until the weights are rounded, and an adapter trains less than all.
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """Settings and what they would need."""

    changes: Mapping[str, Any]
    found: Estimate

    @property
    def words(self) -> str:
        """The settings as the command line takes them."""
        return " ".join(f"{key}={_word(value)}" for key, value in self.changes.items())


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def print_plan(config: PlanConfig, *, trust_remote_code: bool = False) -> None:
    """Print what the run needs, and a table of settings with memory, time and whether they fit.

    Raises:
        InputError: as training would.
    """
    machine = machine_of(config.machine)
    data = read_data(config, trust_remote_code=trust_remote_code)
    trials = list(_trials(config, data, machine, trust_remote_code=trust_remote_code))
    room = machine.memory_gib * GIB * (1 - config.machine.margin)
    console = Console()
    first = trials[0].found
    for line in (steps_in_words(config, data, first), *needs_in_words(data, first)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(on_screen(_title(config.machine, machine), table_of(trials, room)))
    console.print(advice(trials, room), markup=False, highlight=False, soft_wrap=True)


def machine_of(asked: MachineConfig) -> Machine:
    """The machine that is asked for; this one is measured unless all of it is given."""
    names = ("memory_gib", "fp32_tflops", "bf16_tflops", "memory_gb_per_second")
    given: dict[str, Any] = {name: getattr(asked, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if asked.utilisation is not None:
        given["utilisation"] = asked.utilisation
    if asked.gpu is not None:
        return replace(GPUS[asked.gpu], **given)
    if given.keys() >= set(names):
        return Machine(name="the machine given", **{"utilisation": UTILISATION} | given)
    return replace(this_machine(), **given)


def _trials(
    config: PlanConfig, data: RunData, machine: Machine, *, trust_remote_code: bool
) -> Iterator[Trial]:
    """The configuration as it is, and what goes with it of the changes."""
    devices = config.machine.devices
    values = config.model_dump(mode="json", exclude_unset=True)
    tried: list[dict[str, Any]] = []
    for changes in CHANGES:
        own = {key: value for key, value in changes.items() if _get(config, key) != value}
        if own in tried or (changes.keys() & SHARDED and devices == 1):
            continue
        tried.append(own)
        try:
            changed = validate(type(config), nested(values, own))
            found = estimate(
                changed, data, machine, devices=devices, trust_remote_code=trust_remote_code
            )
        except InputError:
            if not changes:
                raise
            continue  # these settings do not go with the others
        yield Trial(own, found)


def _get(config: Any, key: str) -> Any:
    """The value of a dotted key. An adapter of any kind is one."""
    for name in key.split("."):
        config = getattr(config, name)
    return "lora" if key == "adapter" and config is not None else config


def table_of(trials: list[Trial], room: float) -> list[list[str]]:
    """A line for each, head first: memory at most, what of it a step takes, seconds of a step."""
    lines = [["settings", "memory", "by a step", "seconds", "fits"]]
    for trial in trials:
        found = trial.found
        lines.append(
            [
                trial.words.replace(" ", "\n") or "as given",  # a line each: none is cut
                in_words(found.device_bytes),
                in_words(found.held),
                f"{found.seconds:.3g}",
                "yes" if found.device_bytes <= room else "no",
            ]
        )
    return lines


def _title(asked: MachineConfig, machine: Machine) -> str:
    several = f"{asked.devices} x " if asked.devices > 1 else ""
    return f"{several}{machine.name}: {machine.memory_gib:.0f} GiB, {asked.margin:.0%} left free"


def advice(trials: list[Trial], room: float) -> str:
    """The first settings that fit, in a sentence."""
    for trial in trials:
        if trial.found.device_bytes <= room:
            return f"Fits with: {trial.words}" if trial.changes else "Fits as given."
    least = min(trials, key=lambda trial: trial.found.device_bytes)
    return (
        f"None of these fits; the least is {in_words(least.found.device_bytes)} with: "
        f"{least.words or 'the settings as given'}. Take a smaller model, shorter rows "
        "(data.max_length), a larger device or more of them (machine.devices)."
    )
