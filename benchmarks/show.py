"""A result in words and in the terminal."""

from __future__ import annotations

from typing import Any

from results import (
    Spread,
    floor_shares,
    largest_loss_difference,
    processor_share,
    seconds_of,
    speed_ratio,
    tokens_per_second,
)
from rich.console import Console
from rich.table import Table
from scenario import OURS

LABELS = {
    OURS: "dpo (this project)",
    "trl-best": "TRL, best settings",
    "trl-default": "TRL, defaults",
    "transformers": "model.generate",
}
HEADERS = ("", "{unit}", "ours: times as fast", "peak memory", "taken by the steps")


def unit(result: dict[str, Any]) -> str:
    """What the speed of a scenario is given in."""
    return "tokens per second" if result["scenario"]["task"] == "generate" else "seconds per step"


def speed(result: dict[str, Any], name: str) -> Spread:
    """A contestant's speed in that unit."""
    contestant = result["contestants"][name]
    generates = result["scenario"]["task"] == "generate"
    return Spread.of((tokens_per_second if generates else seconds_of)(contestant))


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a contestant, under `HEADERS`: medians with ranges over the timed steps."""
    contestants = result["contestants"]
    form = ".0f" if result["scenario"]["task"] == "generate" else ".3f"
    return [
        (
            LABELS[name],
            speed(result, name).text(form),
            "" if name == OURS else speed_ratio(contestants[OURS], contestant).text(".2f", "x"),
            _gibibytes(contestant["memory"]["peak_bytes"]),
            _gibibytes(taken_by_steps(contestant)),
        )
        for name, contestant in contestants.items()
    ]


def taken_by_steps(contestant: dict[str, Any]) -> int:
    """Peak memory less what was resident with all models loaded, before the first step; bytes."""
    memory = contestant["memory"]
    return int(memory["peak_bytes"] - memory["before_bytes"])


def checks(result: dict[str, Any]) -> list[str]:
    """Whether both sides computed the same, how near ours is to what it cannot do without, and
    whether the machine was quiet.
    """
    lines = []
    difference = largest_loss_difference(result)
    if difference is not None:
        lines.append(f"Largest difference of a step's loss: {difference:.1e} nats.")
    if "floor" in result:
        seconds, shares = Spread.of(result["floor"]["seconds"]), floor_shares(result)
        lines.append(
            f"Arithmetic floor: {seconds.median:.3f} seconds a step, "
            f"{shares.median:.0%} ({shares.least:.0%} to {shares.most:.0%}) of ours."
        )
        rates = result["floor"]["multiply_adds_per_second"]
        if "bfloat16" in rates:
            ratio = rates["bfloat16"]["trunk"] / rates["float32"]["trunk"]
            lines.append(f"The trunk's products in bfloat16 run at {ratio:.2f} of float32's rate.")
    if "greedy_agreement" in result:
        lines.append(f"The same greedy responses: {result['greedy_agreement']:.0%} of prompts.")
    lines.append(f"Processor time per second and thread: {processor_share(result):.2f}.")
    return lines


def show(result: dict[str, Any]) -> None:
    """The table and its checks, in the terminal."""
    table = Table(title=f"{result['name']}: median (range)", title_justify="left")
    for header in HEADERS:
        table.add_column(header.format(unit=unit(result)), justify="right" if header else "left")
    for row in rows(result):
        table.add_row(row[0], *(cell.replace(" (", "\n(") for cell in row[1:]))
    console = Console()
    console.print(table)
    for line in checks(result):
        console.print(line, soft_wrap=True)


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
