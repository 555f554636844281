"""Several processes that train one model: who is there, sums over all, what only the first does.

A launcher (torchrun, accelerate, SLURM's srun) starts the same command several times; each process
is a *rank*. Every rank holds the same rows and takes the same decisions; it computes its share of a
batch, and sums make it whole. A process that was started alone is the first of one, for which
everything here is the identity.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo.config import DistributedConfig
from dpo.errors import (
    CheckpointError,
    DivergedError,
    DPOError,
    InputError,
    RankLost,
    Stopped,
    StorageError,
)

log = logging.getLogger("dpo")

T = TypeVar("T")

FAILURES: dict[str, type[DPOError]] = {
    error.__name__: error
    for error in (InputError, DivergedError, CheckpointError, StorageError, Stopped)
}
"""What one rank can tell the others that it failed with."""


def size() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the rank that writes: the run directory, checkpoints, logs, samples."""
    return rank() == 0


@contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Inside, the processes that the launcher started are ranks of one group; without a launcher
    there is none.

    Raises:
        RankLost: another rank ended, or was silent for `config.timeout_seconds`.
    """
    launched = int(os.environ.get("WORLD_SIZE", "0"))
    if launched == 0 or (launched == 1 and config.kind == "ddp"):
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_seconds))
        if not is_first():
            log.setLevel(logging.ERROR)  # what all say, the first says
        log.info("%d processes train together (%s).", size(), config.kind)
        yield
        with together():  # nobody leaves while another still needs an answer
            pass
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise RankLost(
            f"Rank {os.environ['RANK']}: another process of the run ended, or did not answer for "
            f"{config.timeout_seconds:g} seconds (distributed.timeout_seconds); its own message "
            "says why. The same command goes on from the last checkpoint."
        ) from error
    finally:
        if dist.is_initialized():
            with suppress(RuntimeError):  # of a lost rank: what is raised already says so
                dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error comes of the connection to another rank: gloo's are of no class of their
    own.
    """
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def gather(value: Any) -> list[Any]:
    """A value of every rank, by rank. Values are JSON: nothing that another sends is unpickled."""
    if size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = int(max(lengths).item())
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size())]
    dist.all_gather(texts, nn.functional.pad(own, (0, longest - len(own))))
    pairs = zip(texts, lengths, strict=True)
    return [json.loads(text[: int(length)].numpy().tobytes()) for text, length in pairs]


def of_first(value: Any) -> Any:
    """The first rank's value, on every rank."""
    return gather(value)[0]


def any_of(flag: bool) -> bool:
    """Whether it is so on at least one rank."""
    return any(gather(flag))


def total(values: Mapping[str, float]) -> dict[str, float]:
    """The sum over ranks of each named value; a rank that has none of them adds nothing."""
    sums: dict[str, float] = {}
    for of_rank in gather(dict(values)):
        for name, value in of_rank.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def sum_in_place(values: Tensor) -> None:
    """The sum over ranks of a tensor on the CPU."""
    if size() > 1:
        dist.all_reduce(values)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients.

    A parameter that no rank's rows touched has none, as in one process: a gradient of zeros would
    move AdamW's averages.
    """
    if size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    touched = gather([p.grad is not None for p in trained])
    sums = []
    for parameter, by_rank in zip(trained, zip(*touched, strict=True), strict=True):
        if any(by_rank):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sums.append(dist.all_reduce(parameter.grad, async_op=True))
    for under_way in sums:
        under_way.wait()


def shared_out(work: Callable[[Sequence[T]], list[Any]], items: Sequence[T]) -> list[Any]:
    """`work(items)`, a result for each item, where every rank works on its share: one item in
    `size()`, none where there are fewer. All have all results, which are JSON, in the items' order.

    Raises:
        DPOError: the work failed, here or on another rank.
    """
    if size() == 1:
        return work(items)
    with together():
        own = work(items[rank() :: size()])
    by_rank = gather(own)
    return [by_rank[i % size()][i // size()] for i in range(len(items))]


@contextmanager
def together() -> Iterator[None]:
    """What one rank does here, no other gets past before it is done; and if it fails, all do.

    Raises:
        DPOError: the own failure, or the first rank's that failed.
    """
    own: DPOError | None = None
    try:
        yield
    except DPOError as error:
        own = error
    failures = gather(None if own is None else [type(own).__name__, str(own)])
    if own is not None:
        raise own
    for failure in failures:
        if failure is not None:
            name, message = failure
            raise FAILURES.get(name, RankLost)(message)


def check_same(what: str, value: Any) -> None:
    """All ranks must have read the same.

    Raises:
        InputError: one has not.
    """
    values = gather(value)
    for other, of_rank in enumerate(values):
        if of_rank != values[0]:
            raise InputError(
                f"{what} of process {other} differs from that of process 0; every host must have "
                "the same files, libraries and command."
            )
