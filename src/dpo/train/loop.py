"""The only training loop: accumulate, check, clip, step, log, evaluate, save, stop when asked."""

from __future__ import annotations

import heapq
import logging
import math
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo.atomic import replace_folder
from dpo.config import RunConfig, TrainingConfig
from dpo.data.order import batch_rows, split_among, split_by_tokens, steps_per_epoch
from dpo.errors import DivergedError, InputError, Stopped
from dpo.models import parts
from dpo.models.adapters import carry_base, parameter_counts, train_adapters
from dpo.models.recompute import recompute_without_dropout
from dpo.progress import counting
from dpo.train import checkpoint, ranks
from dpo.train.background import CheckpointWriter
from dpo.train.optimizers import (
    BITSANDBYTES,
    denormals_as_zero,
    make_optimizer,
    stepping_in_backward,
)
from dpo.train.run import Run
from dpo.train.schedule import learning_rate, warmup_steps
from dpo.train.stopping import GO_ON, stop_after_step

log = logging.getLogger("dpo")

SHOWN = (
    "eval/loss",
    "eval/perplexity",
    "eval/rewards/accuracy",
    "eval/reward",
    "eval/reward_stderr",
    "eval/kl",
    "eval/kl_stderr",
)
"""The held-out metrics that are worth a line in the log; all are in metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What a method computes on some rows: sums, so that micro-batches add up to the batch."""

    loss: Tensor
    """Sum of the loss over rows (or tokens), with its graph."""
    sums: dict[str, float]
    """Sums of what is logged, over the same."""


class Method(Protocol):
    """What the loop needs to know of a training method."""

    def num_steps(self, config: RunConfig) -> int:
        """Optimizer steps of the whole run."""
        ...

    def steps_per_pass(self, config: RunConfig) -> int:
        """Optimizer steps from one "epoch" to the next, in the configuration's word."""
        ...

    def rows(self, policy: nn.Module, step: int, config: RunConfig) -> list[int]:
        """The rows of optimizer step `step`, counted from 0. Called before every step, in order,
        so that a method whose rows are samples of the policy can draw them here.
        """
        ...

    def num_tokens(self, row: int) -> int:
        """Tokens that a row sends through the policy."""
        ...

    def weight(self, rows: Sequence[int]) -> int:
        """What the summed loss of a batch is divided by: its pairs, or its scored tokens."""
        ...

    def loss(self, policy: nn.Module, rows: Sequence[int]) -> BatchResult:
        """The summed loss of some rows."""
        ...

    def evaluate(self, policy: nn.Module) -> dict[str, float]:
        """Held-out metrics; "eval/loss" decides which model is the best."""
        ...

    def describe(self, row: int) -> str:
        """Where a row came from."""
        ...

    def save_model(self, policy: nn.Module, folder: Path) -> None:
        """Write the policy in Hugging Face format, with all that is needed to use it."""
        ...

    @property
    def whole_batch(self) -> bool:
        """Whether the rows of a batch act on one another, so that it cannot be split."""
        ...

    def after_step(self, policy: nn.Module, step: int) -> None:
        """Called after optimizer step `step`, counted from 1."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON that a checkpoint must hold, beside weights and optimizer, to go on exactly."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that it must hold as well."""
        ...

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put such a state back."""
        ...

    def companion(self) -> nn.Module | None:
        """Another model that training changes, and that a checkpoint must hold."""
        ...


class PlainMethod:
    """A method that goes through given rows in their seeded order, and carries nothing from step
    to step.
    """

    @property
    def num_rows(self) -> int:
        """How many training rows there are."""
        raise NotImplementedError

    def num_tokens(self, row: int) -> int:
        """Tokens that a row sends through the policy."""
        raise NotImplementedError

    def largest_batch(self, size: int) -> int:
        """Tokens of a batch of the longest rows: the most that one can have."""
        return sum(heapq.nlargest(size, map(self.num_tokens, range(self.num_rows))))

    def num_steps(self, config: RunConfig) -> int:
        assert isinstance(config, TrainingConfig)
        return total_steps(config, self.num_rows)

    def steps_per_pass(self, config: RunConfig) -> int:
        return steps_per_epoch(self.num_rows, config.batch.size)

    def rows(self, policy: nn.Module, step: int, config: RunConfig) -> list[int]:
        return batch_rows(
            step, num_rows=self.num_rows, batch_size=config.batch.size, seed=config.seed
        )

    @property
    def whole_batch(self) -> bool:
        return False

    def after_step(self, policy: nn.Module, step: int) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        pass

    def companion(self) -> nn.Module | None:
        return None


@dataclass
class Progression:
    """How far a run is: what a checkpoint holds beside weights and optimizer."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    seconds: float = 0.0

    def as_state(self) -> dict[str, Any]:
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {
            "step": self.step,
            "best_step": self.best_step,
            "best_loss": best,
            "seconds": self.seconds,
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> Progression:
        best = state["best_loss"]
        return Progression(
            int(state["step"]),
            int(state["best_step"]),
            math.inf if best is None else float(best),
            float(state["seconds"]),
        )


class NonFiniteStep(DivergedError):
    """A step whose update was not made, with the numbers that stopped it."""

    def __init__(self, message: str, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.metrics = metrics


def total_steps(config: TrainingConfig, num_rows: int) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * steps_per_epoch(num_rows, config.batch.size)))


def fit(method: Method, policy: nn.Module, config: RunConfig, run: Run) -> None:
    """Train the policy, from the newest checkpoint where there is one, and write `model/`.

    Equal to one uninterrupted run bit for bit, wherever it was stopped: a step depends on the
    weights, the optimizer and its own number, and on nothing else.

    Of several ranks each computes its share of every batch and holds the whole policy, or a part of
    it (`distributed`); the first one writes.

    Raises:
        InputError: a setting is not for several processes.
        DivergedError: a loss, a gradient or an updated weight is not finite; what is not is logged
            as it is and never saved.
        Stopped: SIGTERM or SIGINT came; the state is saved.
        CheckpointError: there are checkpoints and none can be trusted.
        StorageError: a checkpoint cannot be written; the older ones stay.
    """
    if config.optimizer.in_backward:
        check_one_pass(method, config)
    _check_distributed(config)
    optimizer = make_optimizer(policy, config.optimizer)
    progression = _resume(method, policy, optimizer, run)
    total = method.num_steps(config)
    warn_of_warmup(config, total)
    every = method.steps_per_pass(config)
    evaluate_every = every if config.evaluation.every == "epoch" else config.evaluation.every
    save_every = every if config.save_every == "epoch" else config.save_every

    detail = "loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
    with (
        stop_after_step() as stop,
        CheckpointWriter(run) as writer,
        counting("Training", total, done=progression.step, detail=detail) as advance,
    ):
        if progression.step == 0:
            _evaluate(method, policy, progression, run, every)
        while progression.step < total:
            writer.poll()
            started = time.perf_counter()
            try:
                metrics = training_step(method, policy, optimizer, config, step=progression.step)
            except NonFiniteStep as error:
                run.log({"step": progression.step + 1, **error.metrics})
                raise
            progression.step += 1
            method.after_step(policy, progression.step)
            seconds = time.perf_counter() - started
            progression.seconds += seconds
            row = _with_rates(metrics, progression, seconds, every)
            run.log(row)
            advance(1, **row)
            last = progression.step == total
            if last or progression.step % evaluate_every == 0:
                _evaluate(method, policy, progression, run, every)
            # Asked once: what is not saved is not called so.
            stopping = ranks.any_of(stop.signal is not None)
            if last or stopping or progression.step % save_every == 0:
                _save(method, policy, optimizer, progression, writer)
            if stopping and not last:
                with ranks.together():
                    writer.finish()
                raise Stopped(
                    f"Stopped at step {progression.step} of {total}; the state is saved. {GO_ON}"
                )
    _write_model(method, policy, run, "model")
    run.update_manifest(
        steps=total,
        seconds_training=round(progression.seconds, 3),
        best_step=progression.best_step,
        best_loss=progression.best_loss,
        **parameter_counts(policy),
    )


def warn_of_warmup(config: RunConfig, total_steps: int) -> None:
    """Say it where the rate never reaches its peak."""
    warming = warmup_steps(config.optimizer.warmup, total_steps)
    if warming > total_steps:
        log.warning(
            "optimizer.warmup: %d steps are more than the run's %d, so the learning rate ends at "
            "%.3g of its peak.",
            warming,
            total_steps,
            total_steps / warming,
        )


def check_one_pass(method: Method, config: RunConfig) -> None:
    """Refuse updates in the backward pass where the gradients of a batch may need several.

    Raises:
        InputError: the longest rows would not go through the model at once.
    """
    if method.whole_batch:
        return
    assert isinstance(method, PlainMethod)
    most = method.largest_batch(config.batch.size)
    if most > config.batch.max_tokens:
        raise InputError(
            f"optimizer.in_backward: {config.batch.size} rows can have {most} tokens, more than "
            f"batch.max_tokens={config.batch.max_tokens}, so that gradients would have to wait for "
            "each other; raise it or take smaller batches."
        )


def _check_distributed(config: RunConfig) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        InputError: a setting.
    """
    if ranks.size() > 1 and config.optimizer.in_backward:
        raise InputError(
            "optimizer.in_backward: it is for one process; several must add their gradients up "
            "before a weight may move."
        )
    if config.distributed.kind == "fsdp" and config.optimizer.name in BITSANDBYTES:
        raise InputError("optimizer.name: it is for distributed.kind=ddp, not fsdp.")


def training_step(
    method: Method,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    *,
    step: int,
) -> dict[str, float]:
    """One optimizer step: the gradient of the batch's mean loss, in as many passes as memory asks
    for.

    Each pass adds `sum of its losses / weight of the whole batch`, so accumulation equals one
    large batch whatever the lengths, and the short last batch of an epoch is scaled by its own
    size. Several ranks split the batch, and the sum of their gradients is that of one.
    """
    rows = method.rows(policy, step, config)
    costs = [method.num_tokens(row) for row in rows]
    passes = _passes(method, costs, config)
    policy.train(config.dropout)
    if config.adapter is not None:
        train_adapters(policy)
    if config.gradient_checkpointing:
        recompute_without_dropout(policy)
    optimizer.zero_grad(set_to_none=True)
    rate = _set_learning_rate(optimizer, config, step, method.num_steps(config))
    in_backward = config.optimizer.in_backward
    with stepping_in_backward(optimizer) if in_backward else nullcontext() as stepped:
        totals = _backward(method, policy, rows, passes, config, step=step)
    loss = totals.pop("loss")
    if stepped is None:
        most = config.optimizer.max_grad_norm or math.inf
        clipped = torch.nn.utils.clip_grad_norm_(policy.parameters(), most)
        norm = parts.whole(clipped).item()
    else:
        norm = stepped.norm
    _check_finite(method, rows, step=step, loss=loss, gradient_norm=norm)
    if stepped is None:
        optimizer.step()
    return {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": rate,
        **totals,
        "num_rows": len(rows),
        "num_tokens": sum(costs),
        "num_passes": max(map(len, passes)),
    }


def _passes(method: Method, costs: list[int], config: RunConfig) -> list[list[list[int]]]:
    """For each rank the passes that it makes, each with the places of its rows in the batch."""
    if method.whole_batch:  # the method sees to it that ranks share the rows
        return [[list(range(len(costs)))]] * ranks.size()
    found = []
    for own in split_among(costs, parts=ranks.size()):
        groups = split_by_tokens([costs[i] for i in own], max_tokens=config.batch.max_tokens)
        found.append([[own[i] for i in members] for members in groups])
    return found


def _backward(
    method: Method,
    policy: nn.Module,
    rows: Sequence[int],
    passes: list[list[list[int]]],
    config: RunConfig,
    *,
    step: int,
) -> dict[str, float]:
    """Run this rank's passes and add all ranks' gradients up; loss and metrics of the batch."""
    weight = method.weight(rows)
    totals = {"loss": 0.0}
    for number, members in enumerate(passes[ranks.rank()]):
        if config.draws_dropout:
            _seed_dropout(config.seed, step, number)
        with denormals_as_zero():
            result = method.loss(policy, [rows[i] for i in members])
            (result.loss / weight).backward()
        for name, value in {"loss": result.loss.item(), **result.sums}.items():
            totals[name] = totals.get(name, 0.0) + value / weight
    if parts.is_sharded(policy):
        idle = [min(rows, key=method.num_tokens)]
        for _ in range(max(map(len, passes)) - len(passes[ranks.rank()])):
            (method.loss(policy, idle).loss * 0).backward()  # others run: keep step, add nothing
    else:
        ranks.sum_gradients(policy.parameters())
    return ranks.total(totals)


def _seed_dropout(seed: int, step: int, number: int) -> None:
    """Dropout masks are a function of seed, step, pass and rank: a resumed run draws the same."""
    torch.manual_seed(seed * 1_000_003 + step * 1_009 + number + (ranks.rank() << 40))


def _check_finite(
    method: Method, rows: Sequence[int], *, step: int, loss: float, gradient_norm: float
) -> None:
    """Stop before an update that would destroy the weights."""
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return
    sources = ", ".join(method.describe(row) for row in rows[:5])
    raise NonFiniteStep(
        f"Step {step + 1}: the loss is {loss} and the gradient norm {gradient_norm}; "
        f"the update was not made and the last checkpoint stays. Rows of the batch: {sources}"
        f"{', ...' if len(rows) > 5 else ''}. Try a smaller learning rate.",
        {"loss": loss, "gradient_norm": gradient_norm},
    )


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, config: RunConfig, step: int, total: int
) -> float:
    rate = learning_rate(
        step,
        total_steps=total,
        peak=config.optimizer.learning_rate,
        warmup=config.optimizer.warmup,
        schedule=config.optimizer.schedule,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _resume(
    method: Method, policy: nn.Module, optimizer: torch.optim.Optimizer, run: Run
) -> Progression:
    """Go on from the newest checkpoint that verifies, or start."""
    found = _newest(run)
    if found is None:
        run.forget_after(-1)
        return Progression()
    if found.code != run.origin.code:
        log.warning(
            "The checkpoint was written by other code (dpo or a library has changed since); the "
            "run goes on, but need not end bit for bit as it would have."
        )
    checkpoint.restore(found, policy, optimizer, companion=method.companion())
    method.restore(found.state.get("method", {}), checkpoint.method_tensors(found))
    run.forget_after(found.step)
    log.info("Going on from step %d (%s).", found.step, found.folder)
    return Progression.from_state(found.state)


def _newest(run: Run) -> checkpoint.Checkpoint | None:
    """The newest checkpoint that verifies: the first rank reads them all, the others believe it."""
    with ranks.together():
        found = checkpoint.newest(run.checkpoints, run.origin) if run.writes else None
    told = ranks.of_first(None if found is None else [found.folder.name, found.state, found.code])
    if told is None:
        return None
    name, state, code = told
    return checkpoint.Checkpoint(run.checkpoints / name, state, code)


def _save(
    method: Method,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    progression: Progression,
    writer: CheckpointWriter,
) -> None:
    """Copy the state as it is now, and let it be written while training goes on."""
    parts.settle(policy)
    with ranks.together():
        for name, parameter in policy.named_parameters():
            if not parts.local(parameter).isfinite().all():
                raise DivergedError(
                    f"Step {progression.step}: its update made {name} overflow; it is not saved "
                    "and the last checkpoint stays. Try a smaller learning rate."
                )
    state = progression.as_state() | {"method": method.state()}
    if parts.is_sharded(policy):
        writer.write_shards(policy, optimizer, state, companion=method.companion())
        return
    if not ranks.is_first():
        return
    writer.finish()  # before the copy is made: there are never two
    started = time.perf_counter()
    taken = checkpoint.snapshot(
        policy,
        optimizer,
        state,
        companion=method.companion(),
        tensors=method.tensors(),
    )
    writer.start(taken, copy_seconds=time.perf_counter() - started)


def _evaluate(
    method: Method, policy: nn.Module, progression: Progression, run: Run, steps_in_epoch: int
) -> None:
    """Measure on held-out rows, log, and keep the policy where it is the best so far."""
    policy.eval()
    started = time.perf_counter()
    with torch.no_grad():
        metrics = ranks.of_first(method.evaluate(policy))  # one answer, for all decide by it
    epoch = progression.step / steps_in_epoch
    seconds = round(time.perf_counter() - started, 3)
    run.log({"step": progression.step, "epoch": epoch, **metrics, "eval/seconds": seconds})
    shown = {name: metrics[name] for name in SHOWN if name in metrics}
    log.info(
        "Step %d, held out: %s.",
        progression.step,
        ", ".join(f"{name.rpartition('/')[2]} {value:.4g}" for name, value in shown.items()),
    )
    if not math.isfinite(metrics["eval/loss"]):
        advice = (
            "Try a smaller learning rate" if progression.step else "Look at the model's weights"
        )
        raise DivergedError(
            f"Step {progression.step}: the held-out loss is {metrics['eval/loss']}; the last "
            f"checkpoint stays. {advice}."
        )
    if metrics["eval/loss"] < progression.best_loss:
        progression.best_loss, progression.best_step = metrics["eval/loss"], progression.step
        _write_model(method, policy, run, "best")
    parts.settle(policy)


def _write_model(method: Method, policy: nn.Module, run: Run, name: str) -> None:
    """The policy as a Hugging Face folder, in one piece."""
    model = _whole(policy)
    if run.writes:
        assert model is not None
        with replace_folder(run.folder / name) as folder:
            method.save_model(model, folder)


def _whole(policy: nn.Module) -> nn.Module | None:
    """The policy in one piece; of one in parts a copy, on the first rank only."""
    if not parts.is_sharded(policy):
        return policy
    copy = parts.whole_copy(policy)
    return None if copy is None else carry_base(policy, copy)


def _with_rates(
    row: dict[str, float], progression: Progression, seconds: float, steps_in_epoch: int
) -> dict[str, float]:
    """A step's metrics with its place in the run, its speed and the memory of the fullest rank."""
    return {
        "step": progression.step,
        "epoch": progression.step / steps_in_epoch,
        **row,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(row["num_tokens"] / seconds, 1),
        "rows_per_second": round(row["num_rows"] / seconds, 2),
        "peak_memory_bytes": max(ranks.gather(peak_memory_bytes())),
    }


def peak_memory_bytes() -> int:
    """The most memory the process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
