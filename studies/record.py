"""Run the studies that the report reads, and keep what they leave in studies/results.

    python studies/record.py                    all of them, one after the other
    python studies/record.py exact losses       these
    python studies/record.py --report           those whose numbers the report prints
    python studies/record.py --data FOLDER      those on real rows as well, from the files in FOLDER
    python studies/record.py --quick            small forms of all, in minutes, into runs/quick

A study that was stopped goes on where it was; one that is finished is only recorded. Rows of real
data are never recorded: tables and figures are, and a page that shows none of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Recorded:
    """One study: how it is run, and how in minutes."""

    words: tuple[str, ...]
    quick: tuple[str, ...]
    data: str | None = None
    """The file of real rows that it needs, by its name in the folder that --data names."""
    shows_rows: bool = False
    """Whether its page does, and so is not kept."""


FIVE_SEEDS = "seeds=[6, 7, 8, 9, 10]"
TINY_SFT = ("sft_steps=60",)
QUICK_RUN = (
    "seeds=[0]",
    "sft.epochs=0.3",
    "dpo.epochs=0.3",
    "grid.loss.beta=[0.3]",
    "reward_model.epochs=0.3",
    "rivals.unlikelihood.epochs=0.3",
    "rivals.ppo_rm.rounds=1",
    "rivals.best_of_n.n=4",
    "evaluation.max_prompts=20",
    "evaluation.temperatures=[1.0]",
)

STUDIES = {
    "exact": Recorded(("exact", "studies/exact.yaml", FIVE_SEEDS), ("--quick",)),
    "frontier": Recorded(("frontier", "studies/frontier.yaml"), ("quick=true",)),
    "losses": Recorded(
        ("losses", "studies/losses.yaml"),
        ("seeds=[0]", "steps=10", "names=[dpo, ipo, plackett_luce, kto]", *TINY_SFT),
    ),
    "instruction-small": Recorded(
        ("run", "studies/instruction-small.yaml"),
        QUICK_RUN,
        data="instruction-preferences.json",
        shows_rows=True,
    ),
    "hh-small": Recorded(
        ("run", "studies/hh-small.yaml"),
        QUICK_RUN,
        data="hh-harmless-sample.jsonl",
        shows_rows=True,
    ),
    "sentiment-small": Recorded(
        ("sentiment", "studies/sentiment-small.yaml"),
        ("quick=true",),
        data="movie-reviews.jsonl.gz",
    ),
}


REPORT = ("exact", "frontier", "sentiment-small", "instruction-small", "hh-small")
"""Those that the report prints."""


def run(name: str, study: Recorded, *, out: Path, data: Path | None, quick: bool) -> None:
    """Run a study as a user would, from the project's folder."""
    words = [sys.executable, "-m", "dpo.cli", "experiment", *study.words, f"out={out}"]
    if study.data is not None and data is not None:
        words.append(f"data.path={data / study.data}")
    print(f"{name}: dpo {' '.join(words[3:])}", flush=True)
    started = time.monotonic()
    subprocess.run([*words, *(study.quick if quick else ())], cwd=HERE.parent, check=True)
    print(f"{name}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def record(name: str, study: Recorded, out: Path) -> None:
    """Copy table, figures, page and manifest of a finished study; no path of this machine stays."""
    folder, target = HERE.parent / out, RESULTS / name
    shutil.rmtree(target, ignore_errors=True)
    (target / "figures").mkdir(parents=True)
    pages = [] if study.shows_rows else ["README.md"]
    tables = [
        *folder.glob("*.csv"),
        folder / "tables.json",
        *folder.glob("evaluation/win_rates.csv"),
    ]
    for file in [*tables, *(folder / page for page in pages)]:
        shutil.copy(file, target / file.name)
    for pattern in ("*.svg", "*.csv"):
        for file in (folder / "figures").glob(pattern):
            shutil.copy(file, target / "figures" / file.name)
    manifest = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    text = json.dumps(_without_paths(manifest, out, name), indent=2, ensure_ascii=False)
    (target / "study.json").write_text(text + "\n", encoding="utf-8")


def _without_paths(value: Any, out: Path, name: str) -> Any:
    """The same with paths as they would be in anybody's checkout."""
    if isinstance(value, dict):
        return {key: _without_paths(inner, out, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner, out, name) for inner in value]
    if isinstance(value, str) and value.startswith(str(out)):
        return value.replace(str(out), f"runs/{name}", 1)
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    return value


def main() -> int:
    """Run and record; a study that fails stops the rest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--data", type=Path, help="folder with the files of real rows")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the studies run")
    parser.add_argument("--quick", action="store_true", help="small forms, not recorded")
    parser.add_argument("--report", action="store_true", help="those that the report prints")
    arguments = parser.parse_args()
    if arguments.report:
        arguments.names = [*dict.fromkeys([*arguments.names, *REPORT])]
    unknown = [name for name in arguments.names if name not in STUDIES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected names of {', '.join(STUDIES)}")
    root = arguments.out / "quick" if arguments.quick else arguments.out
    data = None if arguments.data is None else arguments.data.resolve()
    started = time.monotonic()
    for name in arguments.names or STUDIES:
        study = STUDIES[name]
        if study.data is not None and data is None:
            print(f"{name}: left out; it needs --data FOLDER with {study.data}.")
            continue
        try:
            run(name, study, out=root / name, data=data, quick=arguments.quick)
        except subprocess.CalledProcessError as error:
            print(f"{name}: stopped with exit code {error.returncode}.", file=sys.stderr)
            return error.returncode
        if not arguments.quick:
            record(name, study, root / name)
            print(f"{name}: recorded in studies/results/{name}")
    print(f"In all: {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
