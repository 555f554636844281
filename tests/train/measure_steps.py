"""Train a few steps and say how much memory they took, beside what was there before; a program of
its own, so that nothing else has left its traces in the heap.

    python measure_steps.py FOLDER METHOD CONFIG

Prints JSON: `held`, resident bytes before the first step; `taken`, the most that the steps added;
`seconds` of the last steps.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import time
from pathlib import Path

from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import validate
from dpo.train import loop
from dpo.train.jobs import train_preference, train_sft


def kibibytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", status, flags=re.MULTILINE)
    assert found is not None
    return int(found.group(1))


class Watched:
    """The loop's step, watched."""

    def __init__(self) -> None:
        self.step = loop.training_step
        self.held = 0
        self.peak = 0
        self.seconds: list[float] = []

    def __call__(self, *args, **options):
        if not self.held:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            self.held = kibibytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        started = time.perf_counter()
        found = self.step(*args, **options)
        self.seconds.append(time.perf_counter() - started)
        self.peak = max(self.peak, kibibytes("VmHWM"))
        return found


def main() -> None:
    method, values = sys.argv[1], json.loads(sys.argv[2])
    watched = Watched()
    loop.training_step = watched
    if method == "sft":
        train_sft(validate(SFTConfig, values))
    else:
        train_preference(validate(PreferenceConfig, values))
    taken = (watched.peak - watched.held) << 10
    seconds = min(watched.seconds[1:])
    print(json.dumps({"held": watched.held << 10, "taken": taken, "seconds": seconds}))


if __name__ == "__main__":
    main()
