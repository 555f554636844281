"""Memory that pairs take before and while they are trained on, in memory and in a store.

    python benchmarks/data_memory.py --pairs 10000 100000 --out FILE.json
    python benchmarks/data_memory.py --show FILE.json

Each measurement is a process of its own that does what `dpo train` does to its data, but for what a
model computes: read and check sharded Parquet, split, audit, digest the prompts, tokenise, order
all sequences for the reference, hold two reference log-probabilities a pair, and go through one
epoch, batch by batch. Pairs are short and made up; a token is a word, so that the time is not the
tokenizer's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NUM_SHARDS = 10
BATCH = 64
STORES = ("memory", "arrow")
SIZES = (10_000, 100_000, 1_000_000)


def write_shards(folder: Path, num_pairs: int) -> None:
    """That many pairs of different prompts, in Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number in range(NUM_SHARDS):
        terms = [(i, i % 97, i % 89) for i in range(number, num_pairs, NUM_SHARDS)]
        columns = {
            "prompt": [
                f"Question {i % 9973} {i // 9973} : what are {a} and {b} taken together ?"
                for i, a, b in terms
            ],
            "chosen": [f"Together they are {a + b} ." for _, a, b in terms],
            "rejected": [f"I think that {a} is {a - b} more than {b} ." for _, a, b in terms],
        }
        name = f"part-{number:05}-of-{NUM_SHARDS:05}.parquet"
        pq.write_table(pa.table(columns), folder / name, row_group_size=10_000)


class Words:
    """A tokenizer whose tokens are words, with an id for each that it has seen."""

    eos_token_id, bos_token_id, chat_template = 0, None, None

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self.added_tokens_decoder: dict[int, Any] = {}
        self.special_tokens_map: dict[str, str] = {}
        self.all_special_tokens: list[str] = []

    def __call__(self, text: str, **_: Any) -> Any:
        ids = self._ids
        found = [ids.setdefault(word, len(ids) + 1) for word in text.split()]
        return SimpleNamespace(input_ids=found)

    def get_vocab(self) -> dict[str, int]:
        return {}


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The most that this process has of its own (anonymous) memory inside, in bytes."""
    found = {"own_bytes": 0}
    done = threading.Event()

    def watch() -> None:
        while True:
            found["own_bytes"] = max(found["own_bytes"], own_bytes())
            if done.wait(0.05):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def own_bytes() -> int:
    """Resident memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon; this benchmark needs Linux.")


def measure(source: Path, store: str, cache: Path) -> dict[str, Any]:
    """Do to the data what training does, and say what it took."""
    import torch

    from dpo.config import DataConfig
    from dpo.config_files import validate
    from dpo.data.audit import audit
    from dpo.data.order import batch_rows, steps_per_epoch
    from dpo.data.prompts import resolve_template
    from dpo.data.split import prompt_digests
    from dpo.data.tokenize import Encoder
    from dpo.train.encoded import encode_pairs, num_tokens, sequences_of
    from dpo.train.prepare import load_preferences
    from dpo.train.reference import longest_prompt_first

    values = {"path": str(source), "test_fraction": 0.01, "store": store}
    config = validate(DataConfig, values | ({"cache": str(cache)} if store == "arrow" else {}))
    before = {"own_bytes": own_bytes(), "resident_bytes": _peak_resident()}
    seconds: dict[str, float] = {}
    clock = time.process_time()

    def passed(part: str) -> None:
        nonlocal clock
        now = time.process_time()
        seconds[part], clock = round(now - clock, 2), now

    with watched() as peak:
        data = load_preferences(config)
        passed("read and split")
        counts = audit(data.train, test_rows=data.test)
        num_prompts = len(prompt_digests(row.prompt for row in data.train))
        passed("audit")
        encoder = Encoder(Words(), resolve_template("plain"), 512)
        pairs = encode_pairs(encoder, data.train, max_dropped=0.01, what="training rows")
        passed("tokenise")
        sequences = sequences_of(pairs)
        num_ordered = len(longest_prompt_first(sequences))
        reference = torch.full((len(sequences),), float("nan"), dtype=torch.float64)
        passed("order for the reference")
        tokens = 0
        for step in range(steps_per_epoch(len(pairs), BATCH)):
            rows = batch_rows(step, num_rows=len(pairs), batch_size=BATCH, seed=0)
            tokens += sum(num_tokens(pairs[row]) for row in rows)
            reference[rows] = 0.0
        passed("one epoch")
    assert counts.num_rows == num_prompts == len(pairs) == num_ordered // 2
    return {
        "num_training_pairs": len(pairs),
        "num_tokens": tokens,
        "before": before,
        "peak": {**peak, "resident_bytes": _peak_resident()},
        "store_bytes": sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()),
        "processor_seconds": seconds,
    }


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_apart(source: Path, store: str) -> dict[str, Any]:
    """`measure` in a process of its own.

    Raises:
        SystemExit: it failed; its last words are passed on.
    """
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(source), store, cache],
            capture_output=True,
            text=True,
            env=os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise SystemExit(f"Measuring {store} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(sizes: list[int], stores: list[str], file: Path) -> None:
    """Measure every size in every store, and keep each result as soon as it is there."""
    known = json.loads(file.read_text()) if file.exists() else {"results": []}
    done = {(result["num_pairs"], result["store"]) for result in known["results"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    for num_pairs in sizes:
        with tempfile.TemporaryDirectory() as folder:
            todo = [store for store in stores if (num_pairs, store) not in done]
            if todo:
                write_shards(Path(folder), num_pairs)
            for store in todo:
                result = {"num_pairs": num_pairs, "store": store}
                result |= measured_apart(Path(folder), store)
                known["results"].append(result)
                file.write_text(json.dumps(known, indent=2) + "\n")
                print(table([result]).splitlines()[-1], flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| pairs | `data.store` | own memory, peak | of it by the data | resident, peak | disk |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in sorted(results, key=lambda r: (r["store"] != "memory", r["num_pairs"])):
        before, peak = result["before"], result["peak"]
        cells = [
            f"{result['num_pairs']:,}",
            result["store"],
            _mib(peak["own_bytes"]),
            _mib(peak["own_bytes"] - before["own_bytes"]),
            _mib(peak["resident_bytes"]),
            _mib(result["store_bytes"]) if result["store"] == "arrow" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--stores", choices=STORES, nargs="+", default=list(STORES))
    parser.add_argument("--out", type=Path, default=Path("data-memory.json"))
    parser.add_argument("--show", type=Path, help="print the table of a file of results")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(table(json.loads(arguments.show.read_text())["results"]))
    elif arguments.measure is not None:
        source, store, cache = arguments.measure
        print(json.dumps(measure(Path(source), store, Path(cache))))
    else:
        run(arguments.pairs, arguments.stores, arguments.out)


if __name__ == "__main__":
    main()
