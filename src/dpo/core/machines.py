"""What machines can do, as their makers say it: memory, products, bandwidth, links."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Machine:
    """One device: a GPU, or a computer that trains on its CPU."""

    name: str
    memory_gib: float
    fp32_tflops: float
    """10^12 operations a second in float32 matrix products; a multiply-add is two."""
    bf16_tflops: float
    """The same in bfloat16, without sparsity."""
    memory_gb_per_second: float
    """10^9 bytes a second between the device and its memory."""
    utilisation: float
    """Share of these operations that training reaches."""
    gpu: bool = True


UTILISATION = 0.4
"""Of a GPU. Grattafiori et al. 2024 (Llama 3, arXiv:2407.21783, section 3.3) say 38 to 43% of the
bfloat16 peak for pretraining on H100s. An assumption here: nothing was measured on a GPU.
"""

GPUS = {
    gpu.name: gpu
    for gpu in (
        Machine("A100-40", 40, 19.5, 312, 1555, UTILISATION),
        Machine("A100-80", 80, 19.5, 312, 2039, UTILISATION),
        Machine("H100", 80, 67, 989, 3350, UTILISATION),
        Machine("H200", 139, 67, 989, 4800, UTILISATION),
        Machine("L4", 24, 30.3, 121, 300, UTILISATION),
        Machine("L40S", 48, 91.6, 362, 864, UTILISATION),
        Machine("RTX-4090", 24, 82.6, 165, 1008, UTILISATION),
    )
}
"""NVIDIA's data sheets (SXM forms of A100, H100 and H200), written down from memory: check them.
float32 is that of the ordinary units: PyTorch does not round to TF32 unless told to.
"""
