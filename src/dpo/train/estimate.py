"""What a run would need: memory and time of its steps, before any weight is read."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from dpo.config import ModelConfig, PreferenceConfig, SFTConfig
from dpo.core import cost
from dpo.core.cost import ModelSize, Operations, StepPeak, StepSettings
from dpo.core.machines import GIB, Machine
from dpo.data.prompts import as_text
from dpo.data.tokenize import TokenSequence
from dpo.errors import InputError
from dpo.models.counts import (
    Architecture,
    fresh_architecture,
    measure_model,
    measure_pass,
    read_architecture,
)
from dpo.models.load import find_model
from dpo.models.plan import scoring_plan
from dpo.train.adapters import settings_of
from dpo.train.encoded import KINDS
from dpo.train.jobs import load_rows_for
from dpo.train.loop import total_steps
from dpo.train.objective import make_objective
from dpo.train.preference import ALONG, without_side
from dpo.train.prepare import SplitData, load_demonstrations, seeded_choice
from dpo.train.session import encoder_without_model
from dpo.train.sft import encode_demonstrations
from dpo.train.workload import Workload, count_workload

Trained = SFTConfig | PreferenceConfig

MOST_ROWS = 4096
"""Training rows that are looked at (a seeded choice)."""

PROCESS_BYTES = {False: 0.5 * GIB, True: 0.7 * GIB}
"""Python with its libraries (0.4 GiB once imported, as measured) and what kernels keep; on a GPU a
CUDA context, as assumed.
"""

CPU_UTILISATION, GPU_UTILISATION = 0.7, 0.55
"""Share of the measured speed of large matrix products that a step reaches: on a CPU in float32 as
benchmarks/README.md has it (67 to 71%; in bfloat16 38%); on a GPU an assumption.
"""


@dataclass(frozen=True, slots=True)
class RunData:
    """The rows of a run as tokens, as far as they are looked at."""

    rows: list[tuple[TokenSequence, ...]]
    num_rows: int
    tokenizer: Any
    whole_batch: bool
    remarks: tuple[str, ...]


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
    process: float
    checkpoint: float
    """A copy of what a checkpoint holds, in main memory, while it is written."""
    operations: Operations
    """Of a step, on one device."""
    seconds: float
    gpu: bool

    @property
    def device_bytes(self) -> float:
        """The most that the device holds."""
        held = self.weights + self.reference + self.peak.total + self.process
        return held if self.gpu else held + self.checkpoint


# -- the run -------------------------------------------------------------------------------------


def read_data(config: Trained, *, trust_remote_code: bool = False) -> RunData:
    """Read and tokenise a run's rows as training would, with the model's configuration alone.

    Raises:
        InputError: as training would.
    """
    if isinstance(config, SFTConfig):
        data: SplitData[Any] = load_demonstrations(config.data, response=config.response)
    else:
        objective = make_objective(config.loss)
        data = load_rows_for(objective.kind, config.data)
    fresh = config.model.fresh is not None  # then of demonstrations: a policy is not fresh
    texts = [f"{as_text(row.prompt)}\n{row.response}" for row in data.train] if fresh else []
    encoder, _ = encoder_without_model(config, data, texts, trust_remote_code=trust_remote_code)
    tokenizer = encoder.tokenizer
    few = [data.train[i] for i in seeded_choice(len(data.train), MOST_ROWS, seed=config.seed)]
    if isinstance(config, SFTConfig):
        encoded = encode_demonstrations(
            encoder, few, train_on_prompt=config.train_on_prompt, what="training rows"
        )
        return RunData([(s,) for s in encoded], len(data.train), tokenizer, False, ())
    members = KINDS[objective.kind].encode(
        encoder, few, max_dropped=config.data.max_dropped, what="training rows"
    )
    remarks = []
    if {without_side(name) for name in objective.wants} & ALONG:
        remarks.append(
            f"The loss {config.loss.name} reads more of the model than log-probabilities of "
            "responses; what that takes is not in the estimate."
        )
    if config.moving_reference is not None:
        remarks.append("The moving reference runs at every step; its time is not in the estimate.")
    rows = [tuple(row.sequences) for row in members]
    return RunData(rows, len(data.train), tokenizer, objective.whole_batch, tuple(remarks))


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
    architecture = architecture_of(config, data.tokenizer, trust_remote_code=trust_remote_code)
    built = architecture.build()
    model, packed = measure_model(built), scoring_plan(built).packed
    tensors = model.layers + 17 if config.gradient_checkpointing else 17 * model.layers
    per_token = tensors * model.width  # numbers, as of GPT-2, whose layers keep 17 D of a token
    workload = count_workload(
        data.rows,
        config,
        packed=packed,
        whole_batch=data.whole_batch,
        devices=devices,
        weigh=lambda tokens, predicted: per_token * tokens + model.vocab * predicted,
    )
    if config.optimizer.in_backward and workload.most_passes > 1:
        raise InputError(
            "optimizer.in_backward: needs batches that go through the model in one pass; raise "
            "batch.max_tokens or take smaller batches."
        )
    size = measure_pass(architecture, workload.heaviest, precision=config.precision)
    settings = StepSettings(
        precision=config.precision,
        checkpointing=config.gradient_checkpointing,
        in_backward=config.optimizer.in_backward,
        passes=workload.most_passes,
        max_logit_bytes=config.batch.max_logit_mib << 20,
        optimizer=config.optimizer.name,
        adapter=config.adapter is not None,
    )
    shares = devices if config.distributed.kind == "fsdp" else 1
    whole_logits = 4 * size.predicted * model.vocab
    work = cost.operations(
        model,
        workload.mean,
        checkpointing=settings.checkpointing,
        head_in_parts=whole_logits > settings.max_logit_bytes,
    )
    work = Operations(work.trunk / devices, work.head / devices)
    per = settings.per_trained
    return Estimate(
        model=model,
        workload=workload,
        packed=packed,
        peak=cost.step_peak(cost.shared_out(model, shares), size, settings),
        weights=_weight_bytes(model, config, shares),
        reference=_reference_bytes(config, model, trust_remote_code, shares),
        process=PROCESS_BYTES[machine.gpu],
        checkpoint=model.trained * (per.weight + per.state) / shares,
        operations=work,
        seconds=cost.seconds(
            work,
            trunk_tflops=machine.fp32_tflops if config.precision == "fp32" else machine.bf16_tflops,
            head_tflops=machine.fp32_tflops,
            utilisation=machine.utilisation,
            update_bytes=cost.update_bytes(model, per) / shares,
            gb_per_second=machine.memory_gb_per_second,
        ),
        gpu=machine.gpu,
    )


def _weight_bytes(model: ModelSize, config: Trained, shares: int) -> float:
    """The policy's weights; of one in parts, its own and what is gathered at a time: all that is
    outside the layers, two layers and one layer's gradient.
    """
    each = 2.0 if config.precision == "pure_bf16" else 4.0
    whole = model.parameters * each
    if config.adapter is not None:
        quantised = model.layers * model.layer_products if config.adapter.quantize else 0
        bits = cost.QUANTISED[config.adapter.quantize] if config.adapter.quantize else 0.0
        frozen = model.parameters - model.trained
        whole = (frozen - quantised) * each + quantised * bits + model.trained * 4.0
    if shares == 1:
        return whole
    outside = model.parameters - model.layers * model.layer_parameters
    return whole / shares + (outside + 3 * model.layer_parameters) * each


def _reference_bytes(
    config: Trained, model: ModelSize, trust_remote_code: bool, shares: int
) -> float:
    """The reference's own weights, or a process's part of them: none where it is the policy's model
    with its adapter off.
    """
    if isinstance(config, SFTConfig) or not config.opens_reference:
        return 0.0
    each = 2.0 if config.precision == "pure_bf16" else 4.0
    if config.reference is None:
        return 0.0 if config.adapter is not None else model.parameters * each / shares
    source = _source(config.reference, trust_remote_code, key="reference")
    built = read_architecture(source, adapter=None, pure_bf16=False).build()
    return sum(p.numel() for p in built.parameters()) * each / shares


# -- this machine --------------------------------------------------------------------------------


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


# -- in words ------------------------------------------------------------------------------------


def describe_run(config: Trained, *, trust_remote_code: bool = False) -> list[str]:
    """What a run of this configuration would be on this machine: data, model, steps, memory and
    time, a sentence each.

    Raises:
        InputError: as training would.
    """
    data = read_data(config, trust_remote_code=trust_remote_code)
    found = estimate(config, data, this_machine(), trust_remote_code=trust_remote_code)
    return describe(config, data, found)


def describe(config: Trained, data: RunData, found: Estimate) -> list[str]:
    """The same of an estimate."""
    model, work = found.model, found.workload
    trained = "" if model.trained == model.parameters else f", of which {model.trained:,} trained"
    layout = "packed" if found.packed else "on padded rows"
    passes = "one pass" if work.most_passes == 1 else f"up to {work.most_passes} passes"
    steps = total_steps(config, data.num_rows)
    at_peak = {
        "weights": found.weights,
        "reference": found.reference,
        "optimizer": found.peak.optimizer,
        "gradients": found.peak.gradients,
        "activations": found.peak.activations,
        "head and logits": found.peak.head,
        "libraries": found.process,
    }
    if not found.gpu:
        at_peak["copy for a checkpoint"] = found.checkpoint
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in at_peak.items() if size)
    return [
        f"{data.num_rows:,} training rows; {steps:,} steps of {config.batch.size} rows, "
        f"{work.mean.tokens:,.0f} tokens a step, {layout}, in {passes}.",
        f"{model.parameters:,} parameters{trained}.",
        f"Memory at most {in_words(found.device_bytes)} ({parts}); fullest: {found.peak.moment}.",
        f"About {found.seconds:.3g} seconds a step, {found.seconds * steps / 3600:.3g} hours of "
        "steps.",
        *data.remarks,
    ]


def in_words(size: float) -> str:
    """Bytes in MiB or GiB.

    >>> in_words(3 << 30), in_words(5 << 20)
    ('3.00 GiB', '5 MiB')
    """
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"
