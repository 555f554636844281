"""Running a model on a batch: the hidden states that its head sees where a token is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpo.core.logps import at_least_float32
from dpo.data.pack import Batch
from dpo.models.attention import packed_attention_of
from dpo.models.parts import device_of


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The forward pass in float32, or with its matrix products in bfloat16 (weights stay
    float32).
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def head_replaced(model: nn.Module, replacement: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the model calls `replacement(hidden)` in place of its output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    replaced = vars(head).get("forward")  # accelerate replaces it, say
    head.forward = replacement
    try:
        yield
    finally:
        del head.forward
        if replaced is not None:
            head.forward = replaced


def float32_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's head as it is now, working in at least float32 whatever is around it; a head of
    another kind than a matrix, with weights in bfloat16, in those.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    forward, weight = head.forward, getattr(head, "weight", None)
    rounded = weight is not None and weight.dtype == torch.bfloat16

    def logits_of(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            if rounded and type(head) is nn.Linear:
                return nn.functional.linear(at_least_float32(hidden), *float32_weights(head))
            logits: Tensor = forward(hidden if rounded else at_least_float32(hidden))
            return at_least_float32(logits)

    return logits_of


def float32_weights(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """A head's matrix and bias in at least float32."""
    return at_least_float32(head.weight), None if head.bias is None else at_least_float32(head.bias)


def _run(model: nn.Module, batch: Batch, precision: str) -> Any:
    """What the model gives: logits with a head, hidden states without."""
    device = device_of(model)
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(batch.ids).to(device)}
    attention: AbstractContextManager[None] = nullcontext()
    if batch.trees is not None:
        assert batch.positions is not None
        inputs["position_ids"] = torch.from_numpy(batch.positions).to(device)
        attention = packed_attention_of(model, batch.trees)
    with precision_context(precision, device), attention:
        return model(**inputs, use_cache=False)


@contextmanager
def _sparse_embedding_gradient(model: nn.Module) -> Iterator[None]:
    """Inside, an embedding that shares the head's matrix gives a sparse gradient.

    The head's gradient of that matrix is dense; what is added to it are the few rows that were
    looked up, where a dense gradient would be another matrix, of zeros mostly.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    tied = isinstance(embedding, nn.Embedding) and embedding.weight is head.weight
    before = getattr(embedding, "sparse", False)
    if tied:
        embedding.sparse = True
    try:
        yield
    finally:
        if tied:
            embedding.sparse = before


def head_inputs(model: nn.Module, batch: Batch, *, precision: str = "fp32") -> Tensor:
    """What the output head would be given at the batch's scored positions, (N, D), in at least
    float32.

    The head itself is not run. Taking its inputs leaves whatever the model does before it (a last
    norm, a scaling) in place, for every architecture.
    """
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(at_least_float32(hidden[_index(batch.row), _index(batch.column)]))
        return hidden.new_zeros(1, 1, 1)  # the logits of nothing

    with head_replaced(model, keep), _sparse_embedding_gradient(model):
        _run(model, batch, precision)
    return found[0]


def selected_logits(model: nn.Module, batch: Batch, *, precision: str = "fp32") -> Tensor:
    """The model's logits at the batch's scored positions, (N, V), in at least float32.

    The head works in float32 whatever the precision of the trunk, and what the model does after
    it (scaling, soft cap) stays in place.
    """
    head = float32_head(model)

    def selected(hidden: Tensor) -> Tensor:
        return head(hidden[_index(batch.row), _index(batch.column)]).unsqueeze(0)

    with head_replaced(model, selected):
        return at_least_float32(_run(model, batch, precision).logits.squeeze(0))


def trunk_outputs(trunk: nn.Module, batch: Batch, *, precision: str = "fp32") -> Tensor:
    """The last hidden states of a model without a head at the batch's scored positions, (N, D), in
    at least float32.
    """
    hidden: Tensor = _run(trunk, batch, precision).last_hidden_state
    return at_least_float32(hidden[_index(batch.row), _index(batch.column)])


def token_states(trunk: nn.Module, batch: Batch, *, precision: str = "fp32") -> Tensor:
    """The last hidden state of a model without a head before each scored token, (M, D)."""
    return trunk_outputs(trunk, batch, precision=precision)[_index(batch.source)]


def _index(values: Any) -> Tensor:
    return torch.from_numpy(values)
