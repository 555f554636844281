"""Reward models: a causal language model's trunk with a linear head on the last token.

    r(x, y) = w . h(x, y),   h the last hidden state at the last token of prompt and response

The head has no bias: preferences would not move it. The end token is a part of the response, so a
finished response is scored where it ends. The model is a sequence classifier of transformers with
one label, which reads its score at the last token that is not the padding: a rule that is only
right where padding is a token of its own. GPT-2 and others have none, and their usual stand-in is
the end token, with which transformers would look one token too far left; so `give_padding` adds one
where it is missing.

Other sequence classifiers are scored too, by their own rule.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from dpo.core.logps import at_least_float32
from dpo.data.order import group_by_length
from dpo.data.pack import Batch, pack, packed_groups, pad, padded_groups
from dpo.data.prompts import PromptTemplate, load_template, save_template
from dpo.data.tokenize import TokenSequence
from dpo.errors import InputError
from dpo.models.adapters import has_adapter, merged_copy
from dpo.models.forward import precision_context, token_states, trunk_outputs
from dpo.models.load import (
    check_fit,
    explain,
    find_model,
    fuse_activations,
    load_tokenizer,
    pick_device,
)
from dpo.models.parts import device_of
from dpo.models.plan import TOLERANCE, as_evaluated, trial_sequences, why_not_packed
from dpo.models.scoring import MAX_TOKENS

log = logging.getLogger("dpo")

PADDING = "<|pad|>"
"""The token that is added where a tokenizer has no padding of its own."""

Scale = Literal["logit", "log_prob", "log_odds"]


# -- from a language model to a reward model and to a folder -------------------------------------


def from_causal(model: nn.Module, *, seed: int) -> nn.Module:
    """The model's trunk under a new head; the two share it, so only one of them can be trained.

    The head's weights are drawn from N(0, 1/(d+1)), d the width: rewards of unit size at first,
    a function of the seed. Stiennon et al. 2020 (arXiv:2009.01325), appendix B.

    Raises:
        InputError: transformers has no classifier with a linear head for this architecture.
    """
    config: Any = model.config
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    try:
        with torch.device("meta"):  # nothing is allocated: the trunk is the model's own
            classifier: Any = AutoModelForSequenceClassification.from_config(config)
        if type(classifier.base_model) is not type(model.base_model):
            raise ValueError("its classifier has another trunk")
        width = classifier.score.in_features
        if classifier.score.bias is not None:
            raise ValueError("its head has a bias")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"model: {type(model).__name__} cannot become a reward model: transformers has no "
            "sequence classifier with a linear head for it."
        ) from error
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    classifier.config = config  # the object that the trunk's layers look at
    weight = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    place = embeddings.weight.device  # the meta device, where the model is yet to be cut
    place = torch.device("cpu") if place.type == "meta" else place
    classifier.score.to_empty(device=place).to(embeddings.weight.dtype)
    with torch.no_grad():
        classifier.score.weight.copy_(weight / (width + 1) ** 0.5)
    found: nn.Module = classifier.eval()
    return found


def give_padding(model: nn.Module, tokenizer: Any, *, ends: Collection[int]) -> None:
    """See that padding is a token that no sequence ends with, for model and tokenizer.

    A new one is given the embedding 0, which nothing ever looks at and training does not change.

    Args:
        ends: tokens that end a response.
    """
    taken = {*ends, tokenizer.bos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        tokenizer.add_special_tokens({"pad_token": PADDING})
    grown: Any = model
    rows = grown.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= rows:
        with torch.random.fork_rng(devices=[]):  # it draws rows, which are overwritten
            grown.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            grown.get_input_embeddings().weight[rows:] = 0.0
    tokenizer.padding_side = "right"
    config: Any = model.config
    config.get_text_config().pad_token_id = tokenizer.pad_token_id


USAGE = """The reward of a response to a prompt is read at its last token, the end token included:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")
prompt = tokenizer(prompt_text).input_ids
response = tokenizer(response_text, add_special_tokens=False).input_ids + [{end}]
reward = model(torch.tensor([prompt + response])).logits[0, 0]
```

Only differences between responses to one prompt mean something: `sigmoid` of a difference is the
probability that the one is preferred. Batches: pad with `tokenizer.pad_token`, on the right."""


def save_reward_model(
    model: nn.Module, tokenizer: Any, template: PromptTemplate, folder: Path, *, card: str
) -> None:
    """Write what `AutoModelForSequenceClassification` and TRL read, and the run's template.

    An adapter is merged: its base, a language model, has neither the head nor the padding.
    """
    whole = merged_copy(model) if has_adapter(model) else model
    whole.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    save_template(template, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def open_reward_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    key: str = "reward.model",
) -> tuple[nn.Module, Any, PromptTemplate | None]:
    """A sequence classifier in float32 and evaluation mode, its tokenizer, and the template that it
    was trained with where its folder says so.

    Args:
        name: run directory of `dpo reward`, model folder or hub id.
        key: what the user calls it, for messages.

    Raises:
        InputError: there is no such model, it has no head for classification, or its weights are
            not safetensors.
    """
    source = find_model(name, revision=revision, trust_remote_code=trust_remote_code, key=key)
    tokenizer = load_tokenizer(source)
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's name for it
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source.path,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **source.arguments(),
        )
    except Exception as error:
        raise explain(error, "model", source) from error
    if report["missing_keys"]:
        raise InputError(
            f"{key}: {name} is no reward model or classifier; it has no weights for "
            f"{', '.join(sorted(report['missing_keys'])[:3])}."
        )
    check_fit(model, tokenizer, name=name)
    template = load_template(Path(source.path)) if source.local else None
    return fuse_activations(model.eval()).to(pick_device()), tokenizer, template


# -- scores --------------------------------------------------------------------------------------


def sequence_scores(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    label: int | str | None = None,
    scale: Scale = "log_odds",
    precision: str = "fp32",
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """The score of each sequence, (S,), float64: a reward model's reward, r(x, y).

    It is what transformers' own forward gives for that sequence alone, whatever else is in the
    list. Sequences with the same prompt share its computation where the model's attention allows
    it. Gradients flow to the model.

    Of a classifier with several labels one is meant, on one of these scales (p its probability):

        logit       what the head gives
        log_prob    log p
        log_odds    log p - log (1 - p); of two labels, the difference of their logits

    With one label, and in a regression, the score is what the head gives.

    Args:
        model: a sequence classifier of transformers.
        sequences: prompt and response, the end token included.
        label: index or name.
        precision: "fp32" or "bf16" for the trunk; the head works in float32 either way.
        max_tokens: tokens that go through the model at once.

    Raises:
        InputError: there is no such label, or there are several and none is named.
    """
    number = find_label(model, label)
    reading = _reading_of(model)
    read = [_without_end_padding(sequence, model) for sequence in sequences]
    if reading is None:
        groups = _own_groups(model, read, max_tokens)
        parts = [_own_logits(model, [read[i] for i in group], precision) for group in groups]
    else:
        read = with_end(read)
        split = packed_groups if reading.packed else padded_groups
        groups = split(read, max_tokens=max_tokens)
        layout = pack if reading.packed else pad
        parts = [_logits(model, layout([read[i] for i in group]), precision) for group in groups]
    order = torch.tensor([i for group in groups for i in group], device=parts[0].device)
    logits = torch.cat(parts)[order.argsort()]
    return _on_scale(logits.double(), number, scale, model)


def find_label(model: nn.Module, label: int | str | None) -> int:
    """The index of a classifier's label.

    Raises:
        InputError: there is no such label, or there are several and none is named.
    """
    names: dict[int, str] = model.config.id2label  # type: ignore[union-attr, assignment]
    listed = ", ".join(names[i] for i in sorted(names))
    if label is None:
        if len(names) > 1:
            raise InputError(f"label: the classifier has several; name one of {listed}.")
        return 0
    found = [i for i, name in names.items() if label in (i, name, str(i))]
    if not found:
        raise InputError(f"label: {label!r} is none of the classifier's: {listed}.")
    return found[0]


def with_end(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The sequences with one more token to predict, so that their last token is an input: a batch
    drops what predicts nothing.
    """
    return [TokenSequence((*s.ids, 0), min(s.prompt_length, len(s))) for s in sequences]


@dataclass(frozen=True, slots=True)
class _Reading:
    """A classifier whose score is a head on the trunk's last hidden state, at one token."""

    packed: bool


_readings: WeakKeyDictionary[nn.Module, _Reading | None] = WeakKeyDictionary()


def _reading_of(model: nn.Module) -> _Reading | None:
    """How a classifier is scored; None: by its own forward. Found by a trial at the first call."""
    if model not in _readings:
        with as_evaluated(model):
            _readings[model] = _find_reading(model)
    return _readings[model]


def is_packed(model: nn.Module) -> bool:
    """Whether a classifier runs packed rows; the first call tries it out."""
    reading = _reading_of(model)
    return reading is not None and reading.packed


def _find_reading(model: Any) -> _Reading | None:
    name = type(model).__name__
    if not isinstance(getattr(model, "score", None), nn.Module):
        log.info("%s is scored by its own forward pass.", name)
        return None
    sequences = [_without_end_padding(s, model) for s in trial_sequences(model)]
    own = torch.cat([_own_logits(model, [s], "fp32") for s in sequences])
    found = _logits(model, pad(with_end(sequences)), "fp32")
    if not (found - own).abs().max() <= TOLERANCE * own.std().clamp(min=1e-6):
        log.info("%s is scored by its own forward pass: it reads more than its last token.", name)
        return None
    reason = why_not_packed(model.base_model, token_states)
    if reason is not None:
        log.info("%s is run on padded rows, without prefix sharing: %s.", name, reason)
    return _Reading(packed=reason is None)


def _logits(model: Any, batch: Batch, precision: str) -> Tensor:
    """The head's output at each sequence's last input, (S, labels), in at least float32."""
    last = np.append(np.flatnonzero(np.diff(batch.sequence)), len(batch.sequence) - 1)
    states = trunk_outputs(model.base_model, batch, precision=precision)
    states = states[torch.from_numpy(batch.source[last])]
    with torch.autocast(states.device.type, enabled=False):
        logits: Tensor = model.score(states)
        return logits


def _padding_of(model: nn.Module) -> int | None:
    config: Any = model.config
    padding: int | None = config.get_text_config().pad_token_id
    return padding


def _without_end_padding(sequence: TokenSequence, model: nn.Module) -> TokenSequence:
    """What is left of the last token that transformers does not take for padding."""
    padding, length = _padding_of(model), len(sequence)
    while length > 1 and sequence.ids[length - 1] == padding:
        length -= 1
    return TokenSequence(sequence.ids[:length], min(sequence.prompt_length, length))


def _own_groups(
    model: nn.Module, sequences: Sequence[TokenSequence], max_tokens: int
) -> list[list[int]]:
    """Sequences of like length; one at a time where the model has no padding."""
    if _padding_of(model) is None:
        return [[i] for i in range(len(sequences))]
    return group_by_length([len(s) for s in sequences], max_tokens=max_tokens)


def _own_logits(model: nn.Module, sequences: Sequence[TokenSequence], precision: str) -> Tensor:
    """The model's own forward on padded rows, (S, labels), in at least float32."""
    lengths = torch.tensor([len(s) for s in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, _padding_of(model) or 0)
    ids[mask] = torch.tensor([i for s in sequences for i in s.ids])
    device = device_of(model)
    with precision_context(precision, device):
        output = model(input_ids=ids.to(device), attention_mask=mask.long().to(device))
    return at_least_float32(output.logits)


def _on_scale(logits: Tensor, label: int, scale: Scale, model: nn.Module) -> Tensor:
    """One label's score, (S,), from the logits of all, (S, labels)."""
    own = logits[:, label]
    kind = model.config.problem_type  # type: ignore[union-attr]
    if logits.shape[1] == 1 or scale == "logit" or kind == "regression":
        return own
    if kind == "multi_label_classification":  # each label is a choice of its own
        return own if scale == "log_odds" else logsigmoid(own)
    if scale == "log_prob":
        return own - logits.logsumexp(-1)
    others = torch.arange(logits.shape[1], device=logits.device) != label
    return own - logits[:, others].logsumexp(-1)
