"""Training in parts on many GPUs, on paper: bytes held, bytes sent, seconds (docs/scaling.md).

FSDP2 cuts every parameter along its first dimension into as many parts as there are ranks
(`dpo.train.sharding`). A rank holds its part of weights, gradients and optimizer state. A pass
gathers every block twice, before its forward and before its backward, and what is outside the
blocks once; gradients are summed and scattered once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo.core import cost
from dpo.core.cost import ModelSize, Operations, PassSize, StepCounts, StepPeak, StepSettings
from dpo.core.machines import Machine

Shape = Sequence[int]
"""Of a parameter."""

FLOAT32 = 4


def rows_of_rank(rows: int, *, ranks: int, rank: int) -> int:
    """First dimension of a parameter's part on a rank: as equal as whole rows allow, the last ranks
    may have fewer or none.

    >>> [rows_of_rank(5, ranks=4, rank=rank) for rank in range(4)]
    [2, 2, 1, 0]
    """
    each = -(-rows // ranks)
    return max(0, min(each, rows - rank * each))


def numbers_of_rank(shapes: Sequence[Shape], *, ranks: int, rank: int) -> int:
    """How many numbers of a model a rank holds."""
    return sum(
        rows_of_rank(shape[0], ranks=ranks, rank=rank) * math.prod(shape[1:]) for shape in shapes
    )


def padded(shapes: Sequence[Shape], *, ranks: int) -> int:
    """Numbers of parameters whose parts are filled up to equal size, as they are sent."""
    return sum(-(-shape[0] // ranks) * ranks * math.prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that come together in a pass; a rank sends `(ranks - 1) / ranks` of them."""

    gathered: int
    scattered: int


def sent_in_pass(
    blocks: Sequence[Sequence[Shape]], outside: Sequence[Shape], *, ranks: int
) -> Sent:
    """What a forward and a backward pass of a model in parts gather and scatter, in float32.

    Args:
        blocks: shapes of the parameters of each block; outside: of those in none.
    """
    of_blocks = sum(padded(shapes, ranks=ranks) for shapes in blocks)
    rest = padded(outside, ranks=ranks)
    return Sent(FLOAT32 * (2 * of_blocks + rest), FLOAT32 * (of_blocks + rest))


def gathered_at_once(model: ModelSize, *, each: float = FLOAT32) -> float:
    """Bytes beside the rank's own part while it is in a block: what is outside the blocks, the
    block, the next one on its way, and the block's gradient before it is scattered.
    """
    outside = model.parameters - model.layers * model.layer_parameters
    return (outside + 3 * model.layer_parameters) * each


# -- shapes of known policies --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Llama:
    """The shape of a Llama model."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def size(self) -> ModelSize:
        """Its counts: `2 D^2 (1 + G/H) + 3 D F` weights in the matrices of a layer and two norms,
        an embedding and a head of `V D` each, and a last norm.
        """
        keys = self.width * self.kv_heads // self.heads
        products = 2 * self.width * (self.width + keys) + 3 * self.width * self.inner
        layer = products + 2 * self.width
        parameters = self.layers * layer + 2 * self.vocab * self.width + self.width
        return ModelSize(
            parameters=parameters,
            trained=parameters,
            layers=self.layers,
            layer_parameters=layer,
            layer_trained=layer,
            layer_products=products,
            attention_width=self.width,
            width=self.width,
            vocab=self.vocab,
            tied=False,
            head_trained=True,
            largest=max(self.vocab * self.width, self.width * self.inner),
            embedding_trained=self.vocab * self.width,
        )


POLICIES = {
    "7B": Llama(32, 4096, 11008, 32, 32, 32000),
    "70B": Llama(80, 8192, 28672, 64, 8, 128256),
    "405B": Llama(126, 16384, 53248, 128, 8, 128256),
}
"""Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288), Llama 3 70B and 405B (arXiv:2407.21783)."""


# -- a step --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal GPUs in nodes."""

    gpu: Machine
    gpus_per_node: int
    node_gb_per_second: float
    """10^9 bytes a second that a GPU sends to others of its node, while it receives as many."""
    network_gb_per_second: float
    """The same between nodes, for each GPU."""

    def link(self, ranks: int) -> float:
        """The slowest link of a ring through all ranks."""
        return (
            self.node_gb_per_second if ranks <= self.gpus_per_node else self.network_gb_per_second
        )


@dataclass(frozen=True, slots=True)
class Pairs:
    """A batch of preference pairs, all alike, packed: the prompt once."""

    count: int
    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        """Of a pair: the last token of a response is never an input."""
        return self.prompt + 2 * (self.response - 1)

    @property
    def counts(self) -> StepCounts:
        """Of the batch."""
        whole = self.prompt + self.response - 1
        attended = whole * (whole + 1) - self.prompt * (self.prompt + 1) // 2
        predicted = 2 * self.response - 1  # both first tokens are predicted from one place
        return StepCounts(self.count * self.tokens, self.count * attended, self.count * predicted)


@dataclass(frozen=True, slots=True)
class Projection:
    """A step on a cluster, on each of its GPUs: bytes and seconds."""

    ranks: int
    passes: int
    parts: float
    """Its part of weights, and of the optimizer's state."""
    gathered: float
    peak: StepPeak
    sent: float
    computing: float
    sending: float

    @property
    def memory(self) -> float:
        """The most that a GPU holds, without the CUDA context and without a reference."""
        return self.parts + self.gathered + self.peak.total - self.peak.optimizer

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: where sending hides behind computing, and where it does not at all."""
        return max(self.computing, self.sending), self.computing + self.sending


def project(
    model: ModelSize,
    size: PassSize,
    batch: Pairs,
    cluster: Cluster,
    *,
    ranks: int,
    max_logit_bytes: int,
) -> Projection:
    """A step with float32 weights in parts, bfloat16 products and recomputed activations.

    Args:
        size: what a pass holds; a rank makes as many passes as its pairs need.
    """
    pairs_of_rank = -(-batch.count // ranks)
    pairs_of_pass = max(1, size.tokens // batch.tokens)
    passes = -(-pairs_of_rank // pairs_of_pass)
    settings = StepSettings(
        precision="bf16",
        checkpointing=True,
        in_backward=False,
        passes=passes,
        max_logit_bytes=max_logit_bytes,
    )
    whole_logits = FLOAT32 * size.predicted * model.vocab
    work = cost.operations(
        model, batch.counts, checkpointing=True, head_in_parts=whole_logits > max_logit_bytes
    )
    peak = cost.step_peak(cost.shared_out(model, ranks), size, settings)
    blocks = model.layers * model.layer_parameters
    together = FLOAT32 * (3 * blocks + 2 * (model.parameters - blocks)) * passes
    sent = together * (ranks - 1) / ranks
    per = settings.per_trained
    return Projection(
        ranks=ranks,
        passes=passes,
        parts=model.parameters * per.weight / ranks + peak.optimizer,
        gathered=gathered_at_once(model),
        peak=peak,
        sent=sent,
        computing=cost.seconds(
            Operations(work.trunk / ranks, work.head / ranks),
            trunk_tflops=cluster.gpu.bf16_tflops,
            head_tflops=cluster.gpu.fp32_tflops,
            utilisation=cluster.gpu.utilisation,
            update_bytes=cost.update_bytes(model, per) / ranks,
            gb_per_second=cluster.gpu.memory_gb_per_second,
        ),
        sending=sent / (cluster.link(ranks) * 1e9),
    )
