"""What a run trains and what it is compared with, where it may train an adapter only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpo.config import AdapterConfig, ModelConfig, RunConfig
from dpo.models.adapters import WHOLE, AdapterSettings, Holder, PolicyAtStart
from dpo.models.load import find_model, holds_adapter
from dpo.train.in_parts import InParts
from dpo.train.session import Policy, open_policy, open_reference


def open_trained(config: RunConfig, texts: Sequence[str], trust_remote_code: bool) -> Policy:
    """The policy that a run trains: whole, or frozen with an adapter on it.

    Args:
        texts: what the tokenizer of a fresh model is learnt from.

    Raises:
        InputError: as `open_policy`, and where the adapter cannot be had.
    """
    adapter = None if config.adapter is None else settings_of(config.adapter)
    return open_policy(
        config.model,
        texts,
        config.seed,
        trust_remote_code,
        adapter=adapter,
        pure_bf16=config.precision == "pure_bf16",
        held=held_by(config),
    )


def open_reference_of(
    config: RunConfig, named: ModelConfig | None, policy: Policy, trust_remote_code: bool
) -> Policy:
    """The model named as the reference, or else the policy as it is now, before its first step.

    With an adapter the latter is the policy's own model (`PolicyAtStart`), else one read apart.
    """
    if named is not None or config.adapter is None:
        return open_reference(
            named,
            config.model,
            config.seed,
            trust_remote_code,
            pure_bf16=config.precision == "pure_bf16",
            held=held_by(config),
        )
    assert config.model.path is not None
    continued = holds_adapter(find_model(config.model.path, revision=config.model.revision))
    return replace(policy, model=PolicyAtStart(policy.model, continued=continued))


def held_by(config: RunConfig) -> Holder:
    """How every process of a run holds its models."""
    if config.distributed.kind == "fsdp":
        return InParts(offload=config.distributed.cpu_offload)
    return WHOLE


def settings_of(config: AdapterConfig) -> AdapterSettings:
    targets = config.target_modules
    return AdapterSettings(
        kind=config.kind,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=None if targets is None else tuple(targets),
        quantize=config.quantize,
    )
