"""The numbers of a recorded benchmark, and what is said of them."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scenario import OURS, WARMUP_STEPS
from stepwise import Step

from dpo.atomic import write_json
from dpo.train.run import environment

LOSS_TOLERANCE = 2e-5
"""In nats: float32 losses of the same batch after the same updates differ by less."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some numbers and the smallest and largest of them."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def text(self, form: str = ".2f", unit: str = "") -> str:
        """`1.52 (1.40 to 1.71)`."""
        return f"{self.median:{form}}{unit} ({self.least:{form}} to {self.most:{form}})"


def timings(steps: Sequence[Step], task: str) -> dict[str, Any]:
    """A contestant's steps as they are recorded; the warm-up is there but never summarised."""
    result = "tokens" if task == "generate" else "losses"
    return {
        "seconds": [step.seconds for step in steps],
        "cpu_seconds": [step.cpu_seconds for step in steps],
        result: [step.result for step in steps],
        "num_warmup": WARMUP_STEPS,
    }


def seconds_of(contestant: dict[str, Any]) -> list[float]:
    """Seconds of each timed step."""
    timed: list[float] = contestant["seconds"][contestant["num_warmup"] :]
    return timed


def processor_share(result: dict[str, Any]) -> float:
    """Processor time per second and thread over all timed steps: near 1 on a quiet machine."""
    contestants = result["contestants"].values()
    cpu = sum(sum(c["cpu_seconds"][c["num_warmup"] :]) for c in contestants)
    wall = sum(sum(seconds_of(c)) for c in contestants)
    return cpu / (wall * result["scenario"]["threads"])


def tokens_per_second(contestant: dict[str, Any]) -> list[float]:
    """Of each timed round of a generation."""
    tokens = contestant["tokens"][contestant["num_warmup"] :]
    return [n / s for n, s in zip(tokens, seconds_of(contestant), strict=True)]


def speed_ratio(ours: dict[str, Any], other: dict[str, Any]) -> Spread:
    """How many times faster ours is, step by step: the same batch, seconds apart."""
    if "tokens" in ours:
        pairs = zip(tokens_per_second(ours), tokens_per_second(other), strict=True)
        return Spread.of([mine / theirs for mine, theirs in pairs])
    pairs = zip(seconds_of(ours), seconds_of(other), strict=True)
    return Spread.of([theirs / mine for mine, theirs in pairs])


def largest_loss_difference(result: dict[str, Any]) -> float | None:
    """Over all steps, warm-up included, and all contestants; None for a generation."""
    contestants = result["contestants"]
    ours = contestants[OURS].get("losses")
    if ours is None:
        return None
    return max(
        abs(mine - theirs)
        for other in contestants.values()
        for mine, theirs in zip(ours, other["losses"], strict=True)
    )


def losses_agree(result: dict[str, Any]) -> bool:
    """Whether float32 losses agree within the tolerance; bfloat16 rounds too coarsely to ask."""
    difference = largest_loss_difference(result)
    in_float32 = result["scenario"]["precision"] == "fp32"
    return difference is None or not in_float32 or difference <= LOSS_TOLERANCE


def floor_shares(result: dict[str, Any]) -> Spread:
    """Of each timed step, the arithmetic floor divided by what our step took."""
    ours = result["contestants"][OURS]
    floors = result["floor"]["seconds"][ours["num_warmup"] :]
    pairs = zip(floors, seconds_of(ours), strict=True)
    return Spread.of([floor / seconds for floor, seconds in pairs])


def hardware() -> dict[str, Any]:
    """Versions, threads and the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return environment() | {"cpu": name or platform.processor(), "trl": version("trl")}


def write(result: dict[str, Any], folder: Path) -> Path:
    """One file a scenario, named after it; a newer run takes the older one's place."""
    file = folder / f"{result['name']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    return file


def read_all(folder: Path) -> list[dict[str, Any]]:
    """All recorded results, by task, data and precision (fp32 first)."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]

    def place(result: dict[str, Any]) -> tuple[int, str, bool]:
        scenario = result["scenario"]
        task = ["dpo", "sft", "generate"].index(scenario["task"])
        return task, scenario["data"], scenario["precision"] == "bf16"

    return sorted(results, key=place)
