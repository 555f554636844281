"""What this computer, or its first GPU, can do: memory as found, speeds measured in a second."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from dpo.core.machines import GIB, Machine

CPU_UTILISATION, GPU_UTILISATION = 0.7, 0.55
"""Share of the measured speed of large matrix products that a step reaches: on a CPU in float32 as
benchmarks/README.md has it (67 to 71%; in bfloat16 38%); on a GPU an assumption.
"""


def this_machine() -> Machine:
    """The first GPU, or this computer and its CPU: its memory, and speeds measured in a second."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    side = 8192 if gpu else 1024
    return Machine(
        torch.cuda.get_device_name(0)
        if gpu
        else f"this computer, {torch.get_num_threads()} threads",
        memory / GIB,
        _tflops(side, torch.float32, device),
        _tflops(side, torch.bfloat16, device),
        _gb_per_second(device),
        GPU_UTILISATION if gpu else CPU_UTILISATION,
        gpu,
    )


def _tflops(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """10^12 operations a second in a square product, the fastest of a few."""
    a = torch.randn(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _fastest(lambda: a @ a, device) / 1e12


def _gb_per_second(device: torch.device) -> float:
    """10^9 bytes a second that a sum in place reads and writes."""
    a, b = (torch.zeros(1 << 25, device=device) for _ in range(2))
    return 3 * a.nbytes / _fastest(lambda: a.add_(b), device) / 1e9


def _fastest(work: Any, device: torch.device, *, at_least: float = 0.25) -> float:
    """Seconds of the fastest repetition, after one that warms up."""
    work()
    found: list[float] = []
    while sum(found) < at_least or len(found) < 3:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)
