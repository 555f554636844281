"""Train three steps and say how much memory they took, beside what was there before; a program of
its own, so that nothing else has left its traces in the heap.

    python measure_steps.py METHOD CONFIG

Prints JSON, in bytes: `resident`, the most that the first two steps added to the process;
`tensors`, the most that tensors held in the third, beside what the first two left, by torch's own
account; `seconds` of the second.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import time
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from dpo.config import PreferenceConfig, RewardConfig, SFTConfig
from dpo.config_files import validate
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train import loop
from dpo.train.jobs import train_preference, train_sft
from dpo.train.online import train_online
from dpo.train.ppo import train_ppo
from dpo.train.reward import train_reward

JOBS = {
    "sft": (train_sft, SFTConfig),
    "dpo": (train_preference, PreferenceConfig),
    "reward": (train_reward, RewardConfig),
    "online": (train_online, OnlineConfig),
    "ppo": (train_ppo, PPOConfig),
}


def kibibytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", status, flags=re.MULTILINE)
    assert found is not None
    return int(found.group(1))


class Watched:
    """The loop's step, watched."""

    def __init__(self) -> None:
        self.step = loop.training_step
        self.before = self.peak = self.tensors = 0
        self.seconds: list[float] = []

    def __call__(self, *args, **options):
        if len(self.seconds) == 2:
            return self.profiled(*args, **options)
        if not self.seconds:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            self.before = kibibytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        started = time.perf_counter()
        found = self.step(*args, **options)
        self.seconds.append(time.perf_counter() - started)
        self.peak = max(self.peak, kibibytes("VmHWM"))
        return found

    def profiled(self, *args, **options):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            found = self.step(*args, **options)
        events = profiled.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.tensors = max(accumulate(change for _, change in changes))
        return found


def main() -> None:
    method, values = sys.argv[1], json.loads(sys.argv[2])
    watched = Watched()
    loop.training_step = watched
    job, schema = JOBS[method]
    job(validate(schema, values))
    found = {
        "resident": (watched.peak - watched.before) << 10,
        "tensors": watched.tensors,
        "seconds": watched.seconds[1],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
