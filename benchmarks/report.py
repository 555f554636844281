"""Turn the recorded results into README.md's tables and the figure.

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import floor_shares, read_all
from scenario import RESULTS
from show import HEADERS, LABELS, checks, rows, speed, taken_by_steps, unit

from dpo.report.style import COLOURS, caption, new_figure, paper_style

HERE = Path(__file__).parent
START, END = "<!-- results: written by report.py -->", "<!-- end of results -->"
TITLES = {"dpo": "DPO step", "sft": "SFT step", "generate": "Generation"}
FIGURE = "figures/steps.svg"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="file to update")
    arguments = parser.parse_args()
    results = read_all(arguments.results)
    if not results:
        raise SystemExit(f"{arguments.results} holds no results; `make bench` records them.")
    training = [result for result in results if result["scenario"]["task"] != "generate"]
    write_section(arguments.readme, section(results, with_figure=bool(training)))
    if training:
        draw(training, arguments.readme.parent / FIGURE)


def write_section(readme: Path, text: str) -> None:
    """Put the text between the two marks of README.md.

    Raises:
        SystemExit: the marks are not there.
    """
    whole = readme.read_text(encoding="utf-8")
    before, start, rest = whole.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{readme}: the lines {START} and {END} are missing.")
    readme.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def section(results: Sequence[dict[str, Any]], *, with_figure: bool) -> str:
    """The summary, every scenario's table, and the figure, as Markdown."""
    parts = [summary(results)]
    if with_figure:
        parts.append(f"![Seconds per step and memory of every contestant]({FIGURE})")
    return "\n\n".join([*parts, *(scenario_text(result) for result in results)])


def summary(results: Sequence[dict[str, Any]]) -> str:
    """One row a scenario: how many times faster ours is than each other."""
    lines = [_row(("", "ours: times as fast, median (range)", "arithmetic floor / ours"))]
    lines.append(_row(["---"] * 3))
    for result in results:
        cells = rows(result)
        ratios = [f"{row[0]}: {row[2]}" for row in cells if row[2]]
        floor = f"{floor_shares(result).median:.0%}" if "floor" in result else ""
        lines.append(_row((_title(result), "<br>".join(ratios), floor)))
    return "\n".join(lines)


def scenario_text(result: dict[str, Any]) -> str:
    """A scenario's table, checks, and what it ran on."""
    workload, hardware, scenario = result["workload"], result["hardware"], result["scenario"]
    table = [_row([header.format(unit=unit(result)) for header in HEADERS])]
    table += [_row(["---"] * len(HEADERS)), *(_row(row) for row in rows(result))]
    settings = [
        f"- {LABELS[name]}: {contestant['settings']}."
        for name, contestant in result["contestants"].items()
    ]
    sizes = (
        f"{scenario['steps']} steps of {scenario['batch']} from {workload['data']}: median prompt "
        f"{workload['median_prompt_tokens']:g} tokens, response "
        f"{workload['median_response_tokens']:g}; a step has "
        f"{workload['median_padded_tokens_per_step']:g} tokens padded, "
        f"{workload['median_unique_tokens_per_step']:g} unique, "
        f"{workload['median_scored_tokens_per_step']:g} scored."
    )
    versions = hardware["versions"]
    machine = (
        f"{hardware['cpu']}, {hardware['num_threads']} of {hardware['cpu_count']} threads, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, TRL {hardware['trl']}, "
        f"{hardware['created'][:10]}. `{result['command']}`"
    )
    parts = [f"### {_title(result)}", "\n".join(table), " ".join(checks(result))]
    return "\n\n".join([*parts, sizes, "\n".join(settings), machine])


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Bars of the median step (with its range) and of the memory that the steps take."""
    names = list(results[0]["contestants"])
    height = 0.8 / len(names)
    with paper_style():
        figure = new_figure(6.4, 0.9 + 0.55 * len(results))
        seconds, memory = figure.subplots(1, 2, sharey=True)
        for index, name in enumerate(names):
            places = [row + (index - (len(names) - 1) / 2) * height for row in range(len(results))]
            spreads = [speed(result, name) for result in results]
            seconds.barh(
                places,
                [spread.median for spread in spreads],
                height,
                xerr=(
                    [spread.median - spread.least for spread in spreads],
                    [spread.most - spread.median for spread in spreads],
                ),
                color=COLOURS[index],
                error_kw={"elinewidth": 0.7},
                label=LABELS[name],
            )
            taken = [taken_by_steps(result["contestants"][name]) / 2**30 for result in results]
            memory.barh(places, taken, height, color=COLOURS[index])
        seconds.set_yticks(range(len(results)), [_title(result) for result in results])
        seconds.invert_yaxis()
        seconds.set_xlabel("seconds per step")
        memory.set_xlabel("memory taken by the steps, GiB")
        figure.legend(loc="outside upper center", ncols=len(names))
        caption(figure, "Bars: medians; whiskers: smallest and largest step.")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})


def _title(result: dict[str, Any]) -> str:
    scenario = result["scenario"]
    return f"{TITLES[scenario['task']]}, {scenario['data']}, {scenario['precision']}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
