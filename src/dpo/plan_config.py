"""What `dpo plan` takes: the configuration of a training command, and a machine."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from dpo.config import PreferenceConfig, RewardConfig, SFTConfig
from dpo.core.machines import GPUS
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.sections import Count, Folder, Positive, Section, shorthand_for


class MachineConfig(Section):
    """Where a run is to go. Without a GPU's name: this machine, as it is found and measured."""

    gpu: str | None = Field(None, description=f"{', '.join(GPUS)}; none: this machine.")
    devices: Count = Field(1, description="How many, one process each.")
    memory_gib: Positive | None = Field(None, description="Memory of one, in GiB.")
    fp32_tflops: Positive | None = Field(
        None, description="Its 10^12 operations a second in float32 products."
    )
    bf16_tflops: Positive | None = Field(None, description="The same in bfloat16.")
    memory_gb_per_second: Positive | None = Field(
        None, description="10^9 bytes a second to and from its memory."
    )
    utilisation: float | None = Field(
        None, gt=0, le=1, description="Share of the products' speed that training reaches."
    )
    margin: float = Field(
        0.15, ge=0, lt=1, description="Share of the memory to leave free: estimates are off by it."
    )

    @field_validator("gpu")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in GPUS:
            raise ValueError(
                f"expected one of {', '.join(GPUS)}; of another, leave it out and give memory_gib, "
                f"fp32_tflops, bf16_tflops and memory_gb_per_second (got {name!r:.60})"
            )
        return name


Machine = Annotated[MachineConfig, BeforeValidator(shorthand_for("gpu"))]
NOWHERE = Field("runs/plan", description="As in the run's settings; nothing is written there.")


class Planned(Section):
    """What a plan takes beside the settings of the run."""

    out: Folder = NOWHERE
    machine: Machine = MachineConfig()


class SFTPlanConfig(Planned, SFTConfig):
    """A run of `dpo sft`, and a machine."""


class PreferencePlanConfig(Planned, PreferenceConfig):
    """A run of `dpo train`, and a machine."""


class RewardPlanConfig(Planned, RewardConfig):
    """A run of `dpo reward`, and a machine."""


class OnlinePlanConfig(Planned, OnlineConfig):
    """A run of `dpo online`, and a machine."""


class PPOPlanConfig(Planned, PPOConfig):
    """A run of `dpo ppo`, and a machine."""


PlanConfig = (
    SFTPlanConfig | PreferencePlanConfig | RewardPlanConfig | OnlinePlanConfig | PPOPlanConfig
)
PLANS: dict[str, type[PlanConfig]] = {
    "sft": SFTPlanConfig,
    "train": PreferencePlanConfig,
    "reward": RewardPlanConfig,
    "online": OnlinePlanConfig,
    "ppo": PPOPlanConfig,
}
"""By the command whose run is planned."""
