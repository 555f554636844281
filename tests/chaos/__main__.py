"""Kill training runs by SIGKILL at random moments; resumed, they must end bit for bit as others.

    make chaos                                     # 100 kills by time, 40 at renames, all variants
    make chaos CHAOS="--kills 500 --seed 7"
    make chaos CHAOS="--variants sft 'dpo, bf16'"

Weights, optimizer, moving reference, loss state, best model, samples and every logged number of a
run that was killed are compared with those of one that was not. Exit code 1 if anything differs;
then what differs is named and the run is left to be looked at. The same seed draws the same
moments, but what they hit depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# One thread: a forked child must not wait for the threads of a pool that it does not have.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from chaos.harness import PHASES, Chaos, Trial
from chaos.variants import VARIANTS
from dpo.atomic import write_json
from dpo.progress import counting
from dpo.train.run import environment

RECORD = Path(__file__).parent / "results" / "chaos.json"


def main() -> None:
    options = _options()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="dpo-chaos-"))
    chaos, trials = Chaos(folder, options.seed), []
    for kind, kills in (("time", options.kills), ("rename", options.rename_kills)):
        with counting(f"Kills by {kind}", kills, detail="{variant}") as advance:
            trials += _trials(chaos, options.variants, kind == "time", kills, advance)
    Console(width=None if sys.stdout.isatty() else 160).print(_table(trials))
    record = {
        "seed": options.seed,
        "kills": sum(len(trial.kills) for trial in trials),
        "runs": len(trials),
        "unequal_runs": sum(bool(trial.differences) for trial in trials),
        "landed": _landed(trials),
        "seconds": round(time.monotonic() - started, 1),
        "undisturbed_seconds": {
            v: round(chaos.undisturbed(v).seconds, 3) for v in options.variants
        },
        "environment": environment(),
        "trials": [asdict(trial) for trial in trials],
    }
    write_json(options.out, record)
    unequal = [trial for trial in trials if trial.differences]
    for trial in unequal:
        print(f"{trial.variant}: {', '.join(trial.differences)} ({folder})", file=sys.stderr)
    if unequal:
        raise SystemExit(1)
    folder.rmdir()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="at random times (default: 100)")
    parser.add_argument(
        "--rename-kills", type=int, default=40, help="at random renames of files (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the moments (default: 0)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"of: {'; '.join(VARIANTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RECORD, help="the record, JSON")
    return parser.parse_args()


def _trials(
    chaos: Chaos, variants: Sequence[str], by_time: bool, kills: int, advance: Callable[..., None]
) -> list[Trial]:
    """Trials of each variant until its share of the kills is made."""
    trials: list[Trial] = []
    for number, variant in enumerate(variants):
        left = kills // len(variants) + (number < kills % len(variants))
        while left > 0:
            trials.append(chaos.trial(variant, by_time=by_time, most_kills=left))
            made = len(trials[-1].kills)
            left -= made
            advance(made, variant=variant)
    return trials


def _landed(trials: Sequence[Trial]) -> dict[str, int]:
    """How many kills hit what; a checkpoint may be written beside any of the phases."""
    kills = [kill for trial in trials for kill in trial.kills]
    phases = Counter(kill.phase for kill in kills)
    writing = sum(kill.writing for kill in kills)
    return {**{phase: phases[phase] for phase in PHASES}, "writing": writing}


def _table(trials: Sequence[Trial]) -> Table:
    names = list(dict.fromkeys(trial.variant for trial in trials))
    table = Table(title="Killed and resumed, by what the kills hit", box=MARKDOWN)
    table.add_column("variant", no_wrap=True)
    columns = ["runs", "kills", *PHASES, "writing", "unequal"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name in [*names, "all"]:
        members = [trial for trial in trials if name in ("all", trial.variant)]
        counts: dict[str, Any] = {
            "runs": len(members),
            "kills": sum(len(trial.kills) for trial in members),
            **_landed(members),
            "unequal": sum(bool(trial.differences) for trial in members),
        }
        table.add_row(name, *(str(counts[column]) for column in columns))
    return table


if __name__ == "__main__":
    main()
