"""What scores responses: a reward model, the true reward of the embedded data, or the user's own
Python function.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo.config import RewardSourceConfig
from dpo.data.prompts import as_text, resolve_template
from dpo.data.rows import Prompt
from dpo.data.synthetic import World
from dpo.data.tokenize import EncodedRow, Encoder
from dpo.errors import InputError
from dpo.models.load import max_positions, weights_digest
from dpo.models.reward import find_label, open_reward_model, sequence_scores
from dpo.models.text_classifier import TextClassifier, load_classifier

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class RewardFunction:
    """Rewards of responses to prompts, with what identifies where they come from."""

    name: str
    digest: str
    """Of the model's weights or the function's file: another reward is another run."""
    score: Callable[[Sequence[Prompt], Sequence[str]], Tensor]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """The reward of each response to the prompt beside it, (N,), float64, on the CPU.

        A response is scored as a finished one, without its end token.

        Raises:
            InputError: a reward is not finite, or there is none for a prompt.
        """
        assert len(prompts) == len(responses)
        if not responses:
            return torch.zeros(0, dtype=torch.float64)
        rewards = self.score(prompts, responses)
        for i in (~rewards.isfinite()).nonzero().flatten().tolist()[:1]:
            raise InputError(
                f"reward: {self.name} gives {rewards[i].item()} for the response "
                f"{responses[i]!r:.80} to {as_text(prompts[i])!r:.80}; expected a finite number."
            )
        return rewards


def open_reward(
    config: RewardSourceConfig,
    *,
    precision: str = "fp32",
    max_tokens: int = 16_384,
    trust_remote_code: bool = False,
) -> RewardFunction:
    """The reward that a configuration names.

    Args:
        precision, max_tokens: of a model's forward passes, as in scoring.

    Raises:
        InputError: there is no such model, file or function, or it cannot be loaded.
    """
    if config.function == "synthetic":
        return RewardFunction("synthetic", "synthetic", _true_rewards)
    if config.function is not None:
        return _users_function(config.function)
    assert config.model is not None
    classifier = load_classifier(Path(config.model).expanduser())
    if classifier is not None:
        return _classifier_rewards(classifier, config.model, config.label)
    return _model_rewards(config.model, config.label, precision, max_tokens, trust_remote_code)


# -- a model -------------------------------------------------------------------------------------


def _model_rewards(
    name: str, label: str | None, precision: str, max_tokens: int, trust_remote_code: bool
) -> RewardFunction:
    """A reward model or classifier. It reads prompt and response through its own tokenizer, under
    the template that it was trained with; where its folder does not say which, under its chat
    template, and without one the response follows the prompt as it stands.
    """
    model, tokenizer, template = open_reward_model(name, trust_remote_code=trust_remote_code)
    number = find_label(model, label)
    if template is None:
        template = resolve_template("chat" if tokenizer.chat_template else "plain")
    room = min(max_positions(model), tokenizer.model_max_length)
    encoder = Encoder(tokenizer, template, room)

    @torch.no_grad()
    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        rows = [encoder.encode(p, [r]) for p, r in zip(prompts, responses, strict=True)]
        _say_what_was_cut(rows, name, room)
        sequences = [row.sequences[0] for row in rows]
        return sequence_scores(
            model, sequences, label=number, precision=precision, max_tokens=max_tokens
        ).cpu()

    return RewardFunction(name, weights_digest(model), score)


def _say_what_was_cut(rows: Sequence[EncodedRow], name: str, room: int) -> None:
    prompts = sum(row.prompt_truncated for row in rows)
    responses = sum(row.responses_truncated for row in rows)
    if prompts or responses:
        log.warning(
            "reward: %s reads %d tokens at most, so %d of %d prompts lost their beginning and %d "
            "responses their end.",
            name,
            room,
            prompts,
            len(rows),
            responses,
        )


# -- a linear text classifier ---------------------------------------------------------------------


def _classifier_rewards(classifier: TextClassifier, name: str, label: str | None) -> RewardFunction:
    """Its log-odds of "positive" for the prompt with the response after it."""
    if label not in (None, "positive"):
        raise InputError(
            f"reward.label: {name} is a text classifier of positive and negative; got {label!r}."
        )

    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        texts = [as_text(p) + r for p, r in zip(prompts, responses, strict=True)]
        return classifier.log_odds(texts)

    return RewardFunction(name, classifier.digest, score)


# -- the embedded data ---------------------------------------------------------------------------


def _true_rewards(prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
    """The true reward of the embedded language, whose facts all have one."""
    world = World()
    for prompt in prompts:
        if prompt not in world.fact_of:
            raise InputError(
                f"reward.function: 'synthetic' knows the prompts of data=synthetic only, not "
                f"{as_text(prompt)!r:.80}."
            )
    rewards = [world.reward(str(p), r) for p, r in zip(prompts, responses, strict=True)]
    return torch.tensor(rewards, dtype=torch.float64)


# -- the user's function -------------------------------------------------------------------------


def _users_function(where: str) -> RewardFunction:
    """`file.py:name`, loaded by its path. The digest is that of the file, not of what it imports.

    Conversations are given as text, one turn a line.
    """
    path, _, name = where.rpartition(":")
    function, digest = _load_function(Path(path).expanduser(), name)

    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        try:
            values = function([as_text(prompt) for prompt in prompts], list(responses))
        except Exception as error:
            raise InputError(
                f"reward.function: {where} raised {type(error).__name__}: {error}"
            ) from error
        return _numbers(values, len(responses), where)

    return RewardFunction(where, digest, score)


def _load_function(file: Path, name: str) -> tuple[Callable[..., Any], str]:
    """The function and the SHA-256 of the source that was run to get it."""
    try:
        source = file.read_bytes()
    except OSError as error:
        raise InputError(f"reward.function: there is no file {file} to read.") from error
    digest = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"reward_{digest[:16]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        exec(compile(source, str(file), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"reward.function: {file} cannot be run: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        here = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise InputError(
            f"reward.function: {file} has no function {name} (it has: {', '.join(here) or 'none'})."
        )
    return function, digest


def _numbers(values: Any, count: int, where: str) -> Tensor:
    """What a user's function returned as a tensor (count,): a list of numbers, or an array."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise InputError(
            f"reward.function: {where} returned {values!r:.60}; expected a list of {count} numbers."
        )
    if len(values) != count:
        raise InputError(
            f"reward.function: {where} returned {len(values)} numbers for {count} responses."
        )
    for i, value in enumerate(values):
        if not isinstance(value, Real):
            raise InputError(
                f"reward.function: {where} returned {value!r:.60} for response {i + 1} of {count}; "
                "expected a number."
            )
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
