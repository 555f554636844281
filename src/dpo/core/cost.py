"""What a training step costs: bytes held and operations done, from shapes alone.

Bytes of N parameters, of which T are trained:

    weights    4 N   (2 N in bfloat16, about N/2 in 4 bits)
    gradients  4 T   (2 T in bfloat16)
    optimizer  8 T   (12 T with float32 masters, about 2 T in 8 bits)

Activations and logits come and go within a step. `step_peak` follows a step through its moments:
the head at the end of the forward pass, the backward pass from the last layer to the first, the
update; the fullest one counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes held for one parameter."""

    weight: float
    gradient: float
    state: float
    """Of the optimizer, from the first update on."""


BLOCKWISE = 2 + 2 * 4 / 256
"""Two moments in 8 bits, with a float32 scale for 256 numbers of each (Dettmers et al. 2022,
arXiv:2110.02861).
"""

QUANTISED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Bytes of a quantised weight: NF4 with 64 numbers a block, their scales in 8 bits (Dettmers et al.
2023, arXiv:2305.14314); LLM.int8 beside its row scales.
"""


def stored(*, precision: str, optimizer: str = "adamw") -> Stored:
    """What a trained parameter takes under `precision` and `optimizer.name`.

    >>> stored(precision="fp32")
    Stored(weight=4, gradient=4, state=8)
    >>> stored(precision="pure_bf16")  # moments and master
    Stored(weight=2, gradient=2, state=12)
    """
    if precision == "pure_bf16":
        return Stored(2, 2, 12)
    return Stored(4, 4, BLOCKWISE if optimizer.endswith("8bit") else 8)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts of a causal language model."""

    parameters: int
    trained: int
    layers: int
    layer_parameters: int
    """Of one layer, its adapters included."""
    layer_trained: int
    layer_products: int
    """Weights of one layer's matrices: multiply-adds of a token."""
    attention_width: int
    """Heads times their width."""
    width: int
    vocab: int
    tied: bool
    """Whether the head is the embedding."""
    head_trained: bool
    largest: int
    """Numbers in the largest trained parameter."""
    embedding_trained: int
    """Numbers of the embedding, where it is trained."""

    @property
    def head(self) -> int:
        return self.vocab * self.width

    @property
    def rest_trained(self) -> int:
        """Trained numbers outside the layers: embeddings, last norm, head."""
        return self.trained - self.layers * self.layer_trained


def with_reward_head(model: ModelSize) -> ModelSize:
    """The trunk under a head of one row (`dpo.models.reward`), which is trained."""
    head, trained = _own_head(model)
    return replace(
        model,
        parameters=model.parameters - head + model.width,
        trained=model.trained - trained + model.width,
        vocab=1,
        tied=False,
        head_trained=True,
    )


def with_critic(model: ModelSize, *, own_trunk: bool) -> ModelSize:
    """Policy and value function (`dpo.models.actor_critic`): a head of one row and a bias, and a
    second trunk if it has its own.
    """
    head, trained = _own_head(model)
    more = 1 if own_trunk else 0
    return replace(
        model,
        parameters=model.parameters + more * (model.parameters - head) + model.width + 1,
        trained=model.trained + more * (model.trained - trained) + model.width + 1,
        layers=(1 + more) * model.layers,
    )


def _own_head(model: ModelSize) -> tuple[int, int]:
    """Numbers of the head, and of the trained head, that are not the embedding's."""
    head = 0 if model.tied else model.head
    return head, head if model.head_trained else 0


@dataclass(frozen=True, slots=True)
class PassSize:
    """What goes through the model at once, and what a forward pass keeps of it for the backward
    pass, in bytes.
    """

    tokens: int
    predicted: int
    """Positions at which the head is asked."""
    layer_kept: int
    """Of one layer, where nothing is recomputed."""
    layer_copies: int
    """Of that, bfloat16 copies of float32 weights (`precision=bf16`)."""
    outside_kept: int
    """Outside the layers."""
    layer_passing: int
    """The most that the backward pass of a layer adds to what it has not yet let go, its gradients
    included.
    """


def shared_out(model: ModelSize, parts: int) -> ModelSize:
    """What one of several processes trains of a model in parts (`distributed.kind=fsdp`)."""
    return replace(
        model, trained=-(-model.trained // parts), layer_trained=-(-model.layer_trained // parts)
    )


def with_offload(peak: StepPeak, model: ModelSize, per: Stored) -> StepPeak:
    """The same moment where parts, gradients and optimizer are in main memory: on the device are
    the gradients of what is gathered, all that is outside the layers and one layer.
    """
    gathered = model.rest_trained + model.layer_trained
    return replace(peak, optimizer=0.0, gradients=gathered * per.gradient)


def logit_bytes(predicted: int, vocab: int, *, most: int) -> int:
    """Float32 logits that exist at once (`dpo.core.head`): all where `most` bytes hold them, else
    an equal part.

    >>> logit_bytes(100, 1000, most=10**6), logit_bytes(100, 1000, most=10**5)
    (400000, 100000)
    """
    whole = 4 * predicted * vocab
    parts = -(-whole // most)
    return whole if parts <= 1 else 4 * predicted * -(-vocab // parts)


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What decides when things are held."""

    precision: str
    checkpointing: bool
    in_backward: bool
    passes: int
    """Forward and backward passes of a step."""
    max_logit_bytes: int
    optimizer: str = "adamw"
    adapter: bool = False
    """Only an adapter is trained, in float32 whatever the weights are."""

    @property
    def per_trained(self) -> Stored:
        precision = "fp32" if self.adapter else self.precision
        return stored(precision=precision, optimizer=self.optimizer)


@dataclass(frozen=True, slots=True)
class StepPeak:
    """The fullest moment of a step beside the weights, in bytes, and what fills it."""

    moment: str
    optimizer: float
    gradients: float
    activations: float
    head: float
    """Logits, the head's inputs, its gradient and float32 copy."""

    @property
    def total(self) -> float:
        return self.optimizer + self.gradients + self.activations + self.head


def step_peak(model: ModelSize, size: PassSize, settings: StepSettings) -> StepPeak:
    """The fullest moment of a step after the first one, which made the optimizer's state."""
    per = settings.per_trained
    moments = (
        _at_head(model, size, settings, per),
        _in_layers(model, size, settings, per, last=True),
        _in_layers(model, size, settings, per, last=False),
        _at_update(model, settings, per),
    )
    return max(moments, key=lambda moment: moment.total)


def _accumulated(model: ModelSize, settings: StepSettings, per: Stored) -> float:
    """Gradients that earlier passes of the step left."""
    return model.trained * per.gradient if settings.passes > 1 else 0.0


def _kept(model: ModelSize, size: PassSize, settings: StepSettings, *, layers: int) -> float:
    """Activations of the first `layers` layers, and of what is outside them."""
    stream = 2 if settings.precision == "pure_bf16" else 4
    of_layer = size.tokens * model.width * stream if settings.checkpointing else size.layer_kept
    return size.outside_kept + layers * of_layer


def _head_gradient(model: ModelSize, per: Stored) -> float:
    return model.head * per.gradient if model.head_trained else 0.0


def _at_head(model: ModelSize, size: PassSize, settings: StepSettings, per: Stored) -> StepPeak:
    """Logits turned into their gradient, and that of the head's matrix made of it."""
    rounded = settings.precision == "pure_bf16"
    hidden = 2 * 4 * size.predicted * model.width  # and its gradient
    copies = model.head * 4 * (2 if model.head_trained else 1) if rounded else 0
    gradient = _head_gradient(model, per)
    logits = logit_bytes(size.predicted, model.vocab, most=settings.max_logit_bytes)
    return StepPeak(
        "head",
        model.trained * per.state,
        _accumulated(model, settings, per),
        _kept(model, size, settings, layers=model.layers),
        hidden + logits + gradient + copies,
    )


def _in_layers(
    model: ModelSize, size: PassSize, settings: StepSettings, per: Stored, *, last: bool
) -> StepPeak:
    """The backward pass in the last layer, the first that it comes to, or in the first one."""
    accumulated = _accumulated(model, settings, per)
    before = 0 if last or accumulated or settings.in_backward else model.layers - 1
    gradients = accumulated + before * model.layer_trained * per.gradient
    if model.tied or not (accumulated or settings.in_backward):
        gradients += _head_gradient(model, per)  # where it is the embedding, it waits for that one
    recomputed = size.layer_kept if settings.checkpointing else 0
    kept = _kept(model, size, settings, layers=model.layers if last else 1)
    return StepPeak(
        "last layer" if last else "first layer",
        model.trained * per.state,
        gradients,
        kept + recomputed + size.layer_passing,
        0.0,
    )


def _at_update(model: ModelSize, settings: StepSettings, per: Stored) -> StepPeak:
    """All gradients; where weights are bfloat16, one of them in float32 as well. A dense gradient
    of the embedding comes on top of the sum of the others.
    """
    gradients = 0.0 if settings.in_backward else model.trained * per.gradient
    one = model.largest * 4 if per.weight < 4 else 0
    embedding = model.embedding_trained * per.gradient
    return StepPeak("update", model.trained * per.state, gradients + max(one, embedding), 0, 0)


# -- operations ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What the passes of a step add up to."""

    tokens: float
    attended: float
    """Pairs of a token and one that it sees, itself included."""
    predicted: float


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations of a step in matrix products; a multiply-add is two."""

    trunk: float
    head: float
    """Always in float32."""


def operations(
    model: ModelSize, counts: StepCounts, *, checkpointing: bool, head_in_parts: bool
) -> Operations:
    """Forward `2 (P tokens + 2 A attended)` a layer, with P weights in its matrices and A the width
    of its attention, and `2 V D` a predicted position.

    The backward pass does the same for the gradient of the inputs, and once more for that of the
    weights, where they are trained. Recomputation is one more forward pass of the layers; a head in
    parts one of the head.
    """
    products, attention, head = _forward(model, counts)
    whole = model.layer_trained > model.layer_parameters / 2  # else adapters: their share is small
    again = 1 if checkpointing else 0
    trunk = products * (3 + again if whole else 2 + again) + attention * (3 + again)
    return Operations(trunk, head * (2 + model.head_trained + head_in_parts))


def forward_operations(model: ModelSize, counts: StepCounts) -> Operations:
    """Of a forward pass alone."""
    products, attention, head = _forward(model, counts)
    return Operations(products + attention, head)


def _forward(model: ModelSize, counts: StepCounts) -> tuple[float, float, float]:
    products = 2 * model.layers * model.layer_products * counts.tokens
    attention = 2 * model.layers * 2 * model.attention_width * counts.attended
    return products, attention, 2 * model.head * counts.predicted


def seconds(
    work: Operations,
    *,
    trunk_tflops: float,
    head_tflops: float,
    utilisation: float,
    update_bytes: float,
    gb_per_second: float,
) -> float:
    """Time of a step: products at the share of the peak that training reaches, and the update at
    the memory's speed.
    """
    products = (work.trunk / trunk_tflops + work.head / head_tflops) / (utilisation * 1e12)
    return products + update_bytes / (gb_per_second * 1e9)


def update_bytes(model: ModelSize, per: Stored) -> float:
    """Bytes that an update reads and writes: weights and state both, gradients once."""
    return model.trained * (2 * per.weight + 2 * per.state + per.gradient)


# -- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """Responses that are drawn with a cache of keys and values, all of one length."""

    responses: int
    at_once: int
    prompt: float
    """Tokens of a prompt."""
    tokens: int
    """Of a response."""

    @property
    def counts(self) -> StepCounts:
        """What scoring them adds up to, each with its own prompt."""
        length = self.prompt + self.tokens
        pairs = length * (length + 1) / 2
        return StepCounts(
            self.responses * length, self.responses * pairs, self.responses * self.tokens
        )


@dataclass(frozen=True, slots=True)
class DecodingSpeed:
    """What the sampler reaches of a machine."""

    products: float
    """Share of the speed of float32 matrix products."""
    memory: float
    """Share of the memory's speed, when weights are read for few rows."""
    layer_seconds: float
    """What beginning a layer takes however small it is: Python and kernels."""


def sampling_bytes(model: ModelSize, sampling: Sampling) -> float:
    """Float32 keys and values of the responses that are drawn at once, the new beside the old where
    the cache grows, and their logits with the softmax.
    """
    context = sampling.prompt + sampling.tokens
    cache = 2 * 2 * 4 * model.layers * model.attention_width * context
    return sampling.at_once * (cache + 3 * 4 * model.vocab)


def sampling_seconds(
    model: ModelSize,
    sampling: Sampling,
    speed: DecodingSpeed,
    *,
    tflops: float,
    gb_per_second: float,
) -> float:
    """Each token of a batch of responses: its products, the weights read once, the layers begun."""
    context = sampling.prompt + sampling.tokens / 2
    batches = -(-sampling.responses // sampling.at_once)
    at_once = sampling.responses / batches
    work = forward_operations(model, StepCounts(at_once, at_once * context, at_once))
    products = (work.trunk + work.head) / (speed.products * tflops * 1e12)
    reading = 4 * model.parameters / (speed.memory * gb_per_second * 1e9)
    token = products + reading + model.layers * speed.layer_seconds
    return batches * sampling.tokens * token
