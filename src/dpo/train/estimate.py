"""What a run would need: memory and time of its steps, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo.config import ModelConfig, PreferenceConfig, RewardConfig, SFTConfig
from dpo.core import cost
from dpo.core.cost import (
    DecodingSpeed,
    ModelSize,
    Operations,
    PassSize,
    Sampling,
    StepPeak,
    StepSettings,
)
from dpo.core.machines import GIB, UTILISATION, Machine
from dpo.errors import InputError
from dpo.models.counts import (
    Architecture,
    classifier_parameters,
    fresh_architecture,
    measure_model,
    measure_pass,
    read_architecture,
)
from dpo.models.load import find_model
from dpo.models.plan import scoring_plan
from dpo.models.text_classifier import load_classifier
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train.adapters import settings_of
from dpo.train.objective import make_objective
from dpo.train.preference import asks_reference
from dpo.train.run_data import RunData, Trained
from dpo.train.this_machine import this_machine
from dpo.train.workload import Workload, count_workload

DECODING = {
    False: DecodingSpeed(products=0.35, memory=0.18, layer_seconds=4e-4),
    True: DecodingSpeed(products=UTILISATION, memory=1.0, layer_seconds=4e-4),
}
"""Of the sampler: on a CPU as measured (docs/memory.md); on a GPU an assumption."""

PROCESS_BYTES = {False: 0.5 * GIB, True: 0.7 * GIB}
"""Python with its libraries (0.4 GiB once imported, as measured) and what kernels keep; on a GPU a
CUDA context, as assumed.
"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs on one device, in bytes and seconds."""

    model: ModelSize
    workload: Workload
    packed: bool
    peak: StepPeak
    """Of a step, beside the weights."""
    weights: float
    reference: float
    reward: float
    """The reward model's weights, where one scores samples."""
    sampling: float
    """What drawing samples holds, beside weights and optimizer state, between steps."""
    process: float
    offloaded: float
    """What a process holds in main memory instead of on its GPU (`distributed.cpu_offload`)."""
    checkpoint: float
    """A copy of what a checkpoint holds, in main memory, while it is written."""
    operations: Operations
    """Of a step, on one device."""
    seconds: float
    """Of a step."""
    round_seconds: float
    """To draw and score the samples of a round; 0 where nothing is sampled."""
    gpu: bool

    @property
    def held(self) -> float:
        """What the fullest moment holds beside models and libraries: of a step, or of sampling."""
        sampled = self.peak.optimizer + self.sampling if self.sampling else 0.0
        return max(self.peak.total, sampled)

    @property
    def device_bytes(self) -> float:
        """The most that the device holds."""
        found = self.weights + self.reference + self.reward + self.held + self.process
        return found if self.gpu else found + self.checkpoint


# -- the run -------------------------------------------------------------------------------------


def _source(model: ModelConfig, trust_remote_code: bool, *, key: str = "model") -> Any:
    assert model.path is not None
    return find_model(
        model.path, revision=model.revision, trust_remote_code=trust_remote_code, key=key
    )


def architecture_of(
    config: Trained, tokenizer: Any, *, trust_remote_code: bool = False
) -> Architecture:
    """How the run's policy is built."""
    pure_bf16 = config.precision == "pure_bf16"
    if config.model.fresh is not None:
        shape = config.model.fresh.model_dump(exclude={"vocab_size"})
        return fresh_architecture(**shape, vocab_size=len(tokenizer), pure_bf16=pure_bf16)
    adapter = None if config.adapter is None else settings_of(config.adapter)
    source = _source(config.model, trust_remote_code)
    return read_architecture(source, adapter=adapter, pure_bf16=pure_bf16)


# -- the estimate --------------------------------------------------------------------------------


def estimate(
    config: Trained,
    data: RunData,
    machine: Machine,
    *,
    devices: int = 1,
    trust_remote_code: bool = False,
) -> Estimate:
    """What the run needs on each of the machine's devices.

    Raises:
        InputError: the model cannot be counted, or `optimizer.in_backward` does not go with its
            batches.
    """
    _check(config, machine, devices)
    architecture = architecture_of(config, data.tokenizer, trust_remote_code=trust_remote_code)
    built = architecture.build()
    policy, packed = measure_model(built), scoring_plan(built).packed
    model = _trained_model(config, policy)
    workload = _workload(config, data, model, packed=packed, devices=devices)
    size = measure_pass(architecture, workload.heaviest, precision=config.precision)
    if model.layers > policy.layers:  # a critic's trunk keeps what the policy's does
        size = replace(size, outside_kept=2 * size.outside_kept)
    run = _Run(
        config=config,
        policy=policy,
        model=model,
        reward=_reward_parameters(config, trust_remote_code),
        settings=_settings(config, workload),
        machine=machine,
        devices=devices,
        sampling=data.sampling,
    )
    return Estimate(
        model=model,
        workload=workload,
        packed=packed,
        process=PROCESS_BYTES[machine.gpu],
        gpu=machine.gpu,
        **_memory(run, size, _reference_bytes(config, policy, trust_remote_code)),
        **_times(run, workload, head_in_parts=_logits_in_parts(run, size)),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What memory and time follow from."""

    config: Trained
    policy: ModelSize
    model: ModelSize
    """All that is trained: the policy, with a critic or under another head."""
    reward: int
    """Numbers of the reward model."""
    settings: StepSettings
    machine: Machine
    devices: int
    sampling: Sampling | None

    @property
    def shares(self) -> int:
        """How many processes hold a part of each tensor."""
        return self.devices if self.config.distributed.kind == "fsdp" else 1


def _check(config: Trained, machine: Machine, devices: int) -> None:
    if config.optimizer.in_backward and devices > 1:
        raise InputError("optimizer.in_backward: it is for one process.")
    if config.distributed.cpu_offload and not machine.gpu:
        raise InputError("distributed.cpu_offload: is for GPUs; the machine is none. Leave it out.")


def _workload(
    config: Trained, data: RunData, model: ModelSize, *, packed: bool, devices: int
) -> Workload:
    tensors = model.layers + 17 if config.gradient_checkpointing else 17 * model.layers
    per_token = tensors * model.width  # numbers, as of GPT-2, whose layers keep 17 D of a token
    found = count_workload(
        data.rows,
        config,
        packed=packed,
        whole_batch=data.whole_batch,
        devices=devices,
        weigh=lambda tokens, predicted: per_token * tokens + model.vocab * predicted,
    )
    if config.optimizer.in_backward and found.most_passes > 1:
        raise InputError(
            "optimizer.in_backward: needs batches that go through the model in one pass; raise "
            "batch.max_tokens or take smaller batches."
        )
    return found


def _settings(config: Trained, workload: Workload) -> StepSettings:
    return StepSettings(
        precision=config.precision,
        checkpointing=config.gradient_checkpointing,
        in_backward=config.optimizer.in_backward,
        passes=workload.most_passes,
        max_logit_bytes=config.batch.max_logit_mib << 20,
        optimizer=config.optimizer.name,
        adapter=config.adapter is not None,
    )


def _memory(run: _Run, size: PassSize, reference: float) -> dict[str, Any]:
    """The parts of an estimate that are bytes."""
    config, model, per, shares = run.config, run.model, run.settings.per_trained, run.shares
    peak = cost.step_peak(cost.shared_out(model, shares), size, run.settings)
    own = _model_bytes(model, config) / shares
    offloaded = 0.0
    if config.distributed.cpu_offload:
        offloaded = own + (model.trained * (per.gradient + per.state) + reference) / shares
        peak, own, reference = cost.with_offload(peak, model, per), 0.0, 0.0
    return {
        "peak": peak,
        "weights": own + _gathered_bytes(model, config, shares),
        "reference": reference / shares,
        "reward": 4.0 * run.reward,
        "sampling": cost.sampling_bytes(run.policy, run.sampling) if run.sampling else 0.0,
        "offloaded": offloaded,
        "checkpoint": model.trained * (per.weight + per.state) / shares,
    }


def _logits_in_parts(run: _Run, size: PassSize) -> bool:
    return 4 * size.predicted * run.model.vocab > run.settings.max_logit_bytes


def _times(run: _Run, workload: Workload, *, head_in_parts: bool) -> dict[str, Any]:
    """The parts of an estimate that are operations and seconds."""
    checkpointing, per = run.settings.checkpointing, run.settings.per_trained
    work = cost.operations(
        run.model, workload.mean, checkpointing=checkpointing, head_in_parts=head_in_parts
    )
    own = Operations(work.trunk / run.devices, work.head / run.devices)
    update = cost.update_bytes(run.model, per) / run.shares
    drawn = run.sampling
    return {
        "operations": own,
        "seconds": _seconds(run, own, update),
        "round_seconds": 0.0 if drawn is None else _round_seconds(run, drawn) / run.devices,
    }


def _seconds(run: _Run, work: Operations, update_bytes: float = 0.0) -> float:
    machine, float32 = run.machine, run.config.precision == "fp32"
    return cost.seconds(
        work,
        trunk_tflops=machine.fp32_tflops if float32 else machine.bf16_tflops,
        head_tflops=machine.fp32_tflops,
        utilisation=machine.utilisation,
        update_bytes=update_bytes,
        gb_per_second=machine.memory_gb_per_second,
    )


def _trained_model(config: Trained, policy: ModelSize) -> ModelSize:
    """What is trained of a language model: all of it, its trunk under a head, or with a critic."""
    if isinstance(config, RewardConfig):
        return cost.with_reward_head(policy)
    if isinstance(config, PPOConfig):
        return cost.with_critic(policy, own_trunk=config.critic != "shared")
    return policy


def _round_seconds(run: _Run, drawn: Sampling) -> float:
    """To draw the samples of a round, and to score them: under the reference, the reward model, and
    for PPO the policy and its critic. A reward model is taken for one of the policy's shape.
    """
    policy, machine = run.policy, run.machine
    drawing = cost.sampling_seconds(
        policy,
        drawn,
        DECODING[machine.gpu],
        tflops=machine.fp32_tflops,
        gb_per_second=machine.memory_gb_per_second,
    )
    once = cost.forward_operations(policy, drawn.counts)
    passes = [once, Operations(once.trunk * run.reward / policy.parameters, 0.0)]
    if isinstance(run.config, PPOConfig):
        passes.append(cost.forward_operations(run.model, drawn.counts))
    work = Operations(sum(p.trunk for p in passes), sum(p.head for p in passes))
    return drawing + _seconds(run, work)


def _reward_parameters(config: Trained, trust_remote_code: bool) -> int:
    """How many numbers the reward model has; 0 where a function or a linear classifier scores."""
    if not isinstance(config, OnlineConfig | PPOConfig) or config.reward.model is None:
        return 0
    name = config.reward.model
    if load_classifier(Path(name).expanduser()) is not None:
        return 0
    source = find_model(name, trust_remote_code=trust_remote_code, key="reward.model")
    return classifier_parameters(source)


def _model_bytes(model: ModelSize, config: Trained) -> float:
    """The policy's weights."""
    each = _bytes_of_weight(config)
    if config.adapter is None:
        return model.parameters * each
    quantised = model.layers * model.layer_products if config.adapter.quantize else 0
    bits = cost.QUANTISED[config.adapter.quantize] if config.adapter.quantize else 0.0
    frozen = model.parameters - model.trained
    return (frozen - quantised) * each + quantised * bits + model.trained * 4.0


def _gathered_bytes(model: ModelSize, config: Trained, shares: int) -> float:
    """What a process gathers at a time of a model in parts: all that is outside the layers, two
    layers and one layer's gradient.
    """
    if shares == 1:
        return 0.0
    outside = model.parameters - model.layers * model.layer_parameters
    return (outside + 3 * model.layer_parameters) * _bytes_of_weight(config)


def _bytes_of_weight(config: Trained) -> float:
    return 2.0 if config.precision == "pure_bf16" else 4.0


def _reference_bytes(config: Trained, model: ModelSize, trust_remote_code: bool) -> float:
    """The reference's own weights: none where it is the policy's model with its adapter off, or is
    let go before the first step.
    """
    if isinstance(config, SFTConfig | RewardConfig):
        return 0.0
    if isinstance(config, PreferenceConfig) and not _keeps_reference(config):
        return 0.0
    each = _bytes_of_weight(config)
    if config.reference is None:
        return 0.0 if config.adapter is not None else model.parameters * each
    source = _source(config.reference, trust_remote_code, key="reference")
    built = read_architecture(source, adapter=None, pure_bf16=False).build()
    return sum(p.numel() for p in built.parameters()) * each


def _keeps_reference(config: PreferenceConfig) -> bool:
    """Whether something asks the reference once training has begun."""
    moves = config.moving_reference is not None
    asked = config.evaluation.kl_prompts > 0 or asks_reference(make_objective(config.loss).wants)
    return config.opens_reference and (moves or asked)


# -- in words ------------------------------------------------------------------------------------


def describe_run(config: Trained, data: RunData, *, trust_remote_code: bool = False) -> list[str]:
    """What a run of this configuration would need on this machine: model, memory and time, a
    sentence each.

    Raises:
        InputError: as training would.
    """
    found = estimate(config, data, this_machine(), trust_remote_code=trust_remote_code)
    return needs_in_words(data, found)


def steps_in_words(config: Trained, data: RunData, found: Estimate) -> str:
    """What goes through the model, and how often."""
    work = found.workload
    layout = "packed" if found.packed else "on padded rows"
    passes = "one pass" if work.most_passes == 1 else f"up to {work.most_passes} passes"
    return (
        f"{data.num_rows:,} {data.what}; {data.num_steps:,} steps of {config.batch.size} rows, "
        f"{work.mean.tokens:,.0f} tokens a step, {layout}, in {passes}."
    )


def needs_in_words(data: RunData, found: Estimate) -> list[str]:
    """Model, memory and time of an estimate, a sentence each."""
    model = found.model
    trained = "" if model.trained == model.parameters else f", of which {model.trained:,} trained"
    at_peak = {
        "weights": found.weights,
        "reference": found.reference,
        "reward model": found.reward,
        "optimizer": found.peak.optimizer,
        "gradients": found.peak.gradients,
        "activations": found.peak.activations,
        "head and logits": found.peak.head,
        "libraries": found.process,
    }
    moment = found.peak.moment
    if found.held > found.peak.total:
        moment = "sampling"
        at_peak |= {"gradients": 0.0, "activations": 0.0, "head and logits": 0.0}
        at_peak["keys, values and logits of samples"] = found.sampling
    if not found.gpu:
        at_peak["copy for a checkpoint"] = found.checkpoint
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in at_peak.items() if size)
    whole = found.seconds * data.num_steps + found.round_seconds * data.num_rounds
    drawing = ""
    if data.sampling is not None:
        drawing = (
            f", {found.round_seconds:.3g} seconds a round to draw and score "
            f"{data.sampling.responses:,} responses"
        )
    return [
        f"{model.parameters:,} parameters{trained}.",
        f"Memory at most {in_words(found.device_bytes)} ({parts}); fullest: {moment}.",
        f"About {found.seconds:.3g} seconds a step{drawing}, {time_in_words(whole)} in all.",
        *_offloaded_in_words(found),
        *data.remarks,
    ]


def _offloaded_in_words(found: Estimate) -> list[str]:
    if not found.offloaded:
        return []
    return [
        f"Main memory holds {in_words(found.offloaded)} a process (weights, gradients, optimizer); "
        "the time of an update there, and of what goes to and fro, is not in the estimate."
    ]


def time_in_words(seconds: float) -> str:
    """Seconds in a unit of which there are few.

    >>> time_in_words(0.012), time_in_words(150), time_in_words(1e5)
    ('0.012 seconds', '2.5 minutes', '28 hours')
    """
    for unit, size in (("seconds", 1), ("minutes", 60), ("hours", 3600), ("days", 86400)):
        if seconds < 60 * size or unit == "days":
            break
    return f"{seconds / size:.2g} {unit}"


def in_words(size: float) -> str:
    """Bytes in MiB or GiB.

    >>> in_words(3 << 30), in_words(50 << 20), in_words(5 << 18)
    ('3.00 GiB', '50 MiB', '1.2 MiB')
    """
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    mebibytes = size / (1 << 20)
    return f"{mebibytes:.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.2g} MiB"
