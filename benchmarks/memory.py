"""Peak memory of one contestant, measured in a process of its own.

    python benchmarks/memory.py CONTESTANT SCENARIO-AS-JSON

`compare.py` runs it and reads the one line of JSON that it prints.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from contestants import make_loop
from scenario import Scenario
from stepwise import Stepwise, use_one_arena
from workload import Workload, make_model, make_workload

MEASURED_STEPS = 2


def measure(name: str, scenario: Scenario) -> dict[str, Any]:
    """Run one contestant in a new process: bytes resident before training and at the peak.

    Raises:
        SystemExit: the process failed; its last words are passed on.
    """
    values = scenario.record() | {"data_folder": scenario.data_folder}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), name, json.dumps(values)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"Measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def longest_steps(scenario: Scenario, workload: Workload) -> list[int]:
    """The step with most tokens when padded, the one with most tokens, and the first: whichever
    layout a contestant has, its largest batch is among them.
    """

    def lengths(step: int) -> list[int]:
        pairs = workload.batch(step)
        chosen = [len(pair.chosen) for pair in pairs]
        return chosen if scenario.task == "sft" else chosen + [len(p.rejected) for p in pairs]

    steps = range(workload.num_steps)
    padded = max(steps, key=lambda step: max(lengths(step)) * len(lengths(step)))
    packed = max(steps, key=lambda step: sum(lengths(step)))
    others = [step for step in steps if step not in (padded, packed)]
    return list(dict.fromkeys([padded, packed, *others]))[:MEASURED_STEPS]


def run(name: str, scenario: Scenario) -> dict[str, Any]:
    """Bytes resident with all models loaded, right before the first step, and at the peak."""
    use_one_arena()
    torch.set_num_threads(scenario.threads)
    workload = make_workload(scenario)
    if scenario.task != "generate":
        workload = workload.of_steps(longest_steps(scenario, workload))
    loop = make_loop(name, scenario, workload, make_model(scenario))
    before = resident_bytes()
    contestant = Stepwise(loop, threads=scenario.threads)
    steps = [contestant.step() for _ in range(MEASURED_STEPS)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "before_bytes": before,
        "peak_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "seconds": [step.seconds for step in steps],
    }


def resident_bytes() -> int:
    """Memory of this process that is resident now; where that cannot be read, its peak so far."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Scenario(**json.loads(sys.argv[2])))))
