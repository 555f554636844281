"""What one benchmark measures: everything that decides its numbers, and its name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TASKS = ("dpo", "sft", "generate")
DATA = ("hh", "instruction", "random")
PRECISIONS = ("fp32", "bf16")
OURS = "ours"
"""The contestant that the others are compared with."""
WARMUP_STEPS = 1
RESULTS = Path(__file__).parent / "results"
"""What is recorded, and what report.py reads."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One task on one data set at one precision. The same scenario gives the same batches."""

    task: str
    data: str = "random"
    precision: str = "fp32"
    batch: int = 4
    """Pairs (demonstrations for SFT) of a step; prompts of a generation round."""
    steps: int = 20
    """Timed steps or rounds, after the one that warms up."""
    threads: int = 1
    layers: int = 6
    width: int = 768
    vocab: int = 50_257
    positions: int = 1024
    max_length: int = 512
    learning_rate: float = 1e-5
    beta: float = 0.1
    max_tokens: int = 4096
    """Tokens of one of our forward and backward passes (`batch.max_tokens`)."""
    samples: int = 8
    """Responses generated for each prompt."""
    max_new_tokens: int = 64
    generation_batch: int = 32
    """Sequences generated at once."""
    stop_share: float = 0.02
    """Share of the vocabulary that ends a response: random weights hardly ever give one token."""
    seed: int = 0
    data_folder: str | None = None
    """Where the data sets are; no part of the result, so it is not recorded."""

    @property
    def name(self) -> str:
        """The name of its result, e.g. `dpo-hh-fp32`."""
        return f"{self.task}-{self.data}-{self.precision}"

    @property
    def heads(self) -> int:
        """Attention heads of 64 channels, as in GPT-2."""
        return max(1, self.width // 64)

    def record(self) -> dict[str, Any]:
        """What is written of it: everything but the place of the data on this machine."""
        return {name: value for name, value in asdict(self).items() if name != "data_folder"}

    def file(self, *parts: str) -> Path:
        """A file or folder of the data folder.

        Raises:
            SystemExit: no data folder was given, or it does not hold that.
        """
        if self.data_folder is None:
            raise SystemExit(
                f"--data {self.data} needs --data-folder: the folder that holds {parts[-1]}. "
                "Without data, take --data random."
            )
        path = Path(self.data_folder).joinpath(*parts)
        if not path.exists():
            raise SystemExit(f"--data-folder {self.data_folder}: {parts[-1]} is not there.")
        return path
