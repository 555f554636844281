"""How far a policy has moved from its reference, measured on the policy's own samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dpo.core.logps import sum_per_sequence, token_kl
from dpo.data.tokenize import TokenSequence
from dpo.models.generate import generate
from dpo.models.scoring import MAX_LOGIT_BYTES, score_groups, scored_logits


@dataclass(frozen=True, slots=True)
class KLEstimate:
    """`KL(policy || reference)` per response, in nats, averaged over prompts."""

    mean: float
    stderr: float
    num_prompts: int
    num_samples: int
    truncated: float
    """Share of the samples cut by the token limit; what comes after the cut is not counted."""
    tokens: float
    """Mean length of the samples, the end token included."""


def sequence_kl(
    policy: nn.Module,
    reference: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int = 16_384,
    precision: str = "fp32",
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`sum_t KL(policy(. | y_<t) || reference(. | y_<t))` along each response, (S,), in nats."""
    sums = np.zeros(len(sequences))
    vocabulary = policy.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    max_tokens = max(1, min(max_tokens, MAX_LOGIT_BYTES // (4 * vocabulary)))  # all logits exist
    for group in score_groups(policy, sequences, max_tokens=max_tokens):
        members = [sequences[i] for i in group]
        with torch.no_grad():
            logits, _, row = scored_logits(policy, members, precision=precision)
            reference_logits, _, _ = scored_logits(reference, members, precision=precision)
            kl = sum_per_sequence(token_kl(logits, reference_logits), row, len(members))
        sums[group] = kl.cpu().numpy()
    return sums


def on_policy_kl(
    policy: nn.Module,
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    samples_per_prompt: int = 1,
    seed: int = 0,
    max_tokens: int = 16_384,
    precision: str = "fp32",
) -> KLEstimate:
    """`KL(pi || pi_ref)` of whole responses at temperature 1, averaged over the prompts.

    By the chain rule the divergence is `E_{y ~ pi} sum_t KL(pi(. | y_<t) || pi_ref(. | y_<t))`. So
    the estimate samples responses from the policy and sums the *exact* divergence of the next-token
    distributions along each: the Rao-Blackwellised form of averaging `log pi(y)/pi_ref(y)`. It is
    unbiased, never negative, and its variance is never larger (Amini et al. 2025). The standard
    error is that of the mean over prompts. Responses are cut at `max_new_tokens`, so it is the
    divergence of the cut responses: a lower bound of the full one.

    Args:
        prompts: token ids of each prompt.
        stop_ids: tokens that end a response; the first that comes is scored.
    """
    pairs = [(i, s) for i in range(len(prompts)) for s in range(samples_per_prompt)]
    samples = generate(
        policy,
        [prompts[i] for i, _ in pairs],
        keys=[f"kl/{i}/{s}" for i, s in pairs],
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        seed=seed,
        precision=precision,
    )
    sequences = [
        TokenSequence(
            (*prompts[i], *sample.ids, *(() if sample.truncated else (stop_ids[0],))),
            len(prompts[i]),
        )
        for (i, _), sample in zip(pairs, samples, strict=True)
    ]
    kl = sequence_kl(policy, reference, sequences, max_tokens=max_tokens, precision=precision)
    per_prompt = kl.reshape(len(prompts), samples_per_prompt).mean(axis=1)
    spread = per_prompt.std(ddof=1) if len(prompts) > 1 else math.nan
    return KLEstimate(
        mean=float(per_prompt.mean()),
        stderr=float(spread / math.sqrt(len(prompts))),
        num_prompts=len(prompts),
        num_samples=len(samples),
        truncated=sum(sample.truncated for sample in samples) / len(samples),
        tokens=sum(s.num_scored for s in sequences) / len(sequences),
    )
