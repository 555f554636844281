"""The training commands, from a configuration to a finished run directory."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.config import DataConfig, PreferenceConfig, SFTConfig
from dpo.data.prompts import as_text
from dpo.data.stored_pairs import Joined
from dpo.data.tokenize import Encoder
from dpo.errors import InputError
from dpo.models.load import weights_digest
from dpo.models.recompute import enable_recomputation
from dpo.progress import counting
from dpo.train.adapters import open_reference_of, open_trained
from dpo.train.encoded import KINDS
from dpo.train.held_out import HeldOutFile, write_displaced
from dpo.train.loop import fit
from dpo.train.objective import Objective, check_scores, make_objective
from dpo.train.on_policy import OnPolicyEvaluation, evaluation_on_policy
from dpo.train.preference import PreferenceMethod, asks_reference
from dpo.train.prepare import (
    SplitData,
    load_demonstrations,
    load_judgements,
    load_preferences,
    load_rankings,
)
from dpo.train.reference import reference_logps
from dpo.train.reward_source import RewardFunction, open_reward
from dpo.train.run import save_train_prompts
from dpo.train.session import (
    Policy,
    choose_held_out,
    distinct_prompts,
    make_run_encoder,
    model_saver,
    opened_run,
    prompts_seen,
    write_samples,
)
from dpo.train.sft import SupervisedMethod, encode_demonstrations

log = logging.getLogger("dpo")


def train_sft(config: SFTConfig, *, trust_remote_code: bool = False) -> Path:
    """Supervised fine-tuning; returns the run directory, finished.

    Raises:
        InputError, DivergedError, CheckpointError, StorageError, Stopped: as their classes say.
    """
    data = load_demonstrations(config.data, response=config.response)
    texts = [f"{as_text(row.prompt)}\n{row.response}" for row in data.train]
    policy = open_trained(config, texts, trust_remote_code)
    if config.gradient_checkpointing:
        enable_recomputation(policy.model)
    encoder = make_run_encoder(config, policy, data)
    with opened_run(config, data, policy, encoder, command="sft") as run:
        if run.finished:
            return run.folder
        held_out = choose_held_out(data.test, config)
        method = SupervisedMethod(
            train=encode_demonstrations(
                encoder, data.train, train_on_prompt=config.train_on_prompt, what="training rows"
            ),
            test=encode_demonstrations(
                encoder, held_out, train_on_prompt=config.train_on_prompt, what="held-out rows"
            ),
            sources=[row.source for row in data.train],
            precision=config.precision,
            max_tokens=config.batch.max_tokens,
            max_logit_bytes=config.batch.max_logit_mib << 20,
            save=model_saver(config, policy, encoder, "Supervised fine-tuning on response tokens."),
        )
        if run.writes:
            save_train_prompts(run.folder, prompts_seen(config, data))
        fit(method, policy.model, config, run)
        write_samples(policy, encoder, held_out, config, run)
        run.update_manifest(status="finished")
    return run.folder


def train_preference(config: PreferenceConfig, *, trust_remote_code: bool = False) -> Path:
    """Any loss of the family, with a frozen, a moving or no reference; returns the run directory,
    finished.

    Raises:
        InputError, DivergedError, CheckpointError, StorageError, Stopped: as their classes say.
    """
    objective = make_objective(config.loss)
    data = load_rows_for(objective.kind, config.data)
    check_scores(objective, itertools.chain(data.train, data.test))
    policy = open_trained(config, [], trust_remote_code)
    if config.gradient_checkpointing:
        enable_recomputation(policy.model)
    encoder = make_run_encoder(config, policy, data)
    reference, digests = None, {}
    if config.opens_reference:
        reference = open_reference_of(config, config.reference, policy, trust_remote_code)
        check_same_tokens(policy, reference)
        digests = {"reference_sha256": weights_digest(reference.model)}
    reward = None
    if config.evaluation.reward is not None:
        reward = open_reward(config.evaluation.reward, trust_remote_code=trust_remote_code)
        digests["evaluation_reward_sha256"] = reward.digest
    with opened_run(config, data, policy, encoder, command="train", **digests) as run:
        if run.finished:
            return run.folder
        method = _preference_method(config, objective, data, policy, reference, encoder, reward)
        reference = None  # it is let go where nothing asks it again
        gc.collect()  # a model in parts holds itself in circles
        _warn_of_whole_batches(method, config)
        _warn_of_a_still_reference(method, config)
        method.keep_held_out = HeldOutFile(run).write
        if run.writes:
            save_train_prompts(run.folder, prompts_seen(config, data))
        fit(method, policy.model, config, run)
        if run.writes:
            write_displaced(run.folder, encoder, method.test, method.kind.sequences(method.test))
        write_samples(policy, encoder, choose_held_out(data.test, config), config, run)
        run.update_manifest(status="finished")
    return run.folder


def load_rows_for(kind: str, data: DataConfig) -> SplitData[Any]:
    """Pairs, rankings or judged responses, whichever the loss takes.

    Raises:
        InputError: the source cannot be read, or its rows are of another kind.
    """
    if kind == "pair":
        return load_preferences(data)
    return load_rankings(data) if kind == "list" else load_judgements(data)


def _preference_method(
    config: PreferenceConfig,
    objective: Objective,
    data: SplitData[Any],
    policy: Policy,
    reference: Policy | None,
    encoder: Encoder,
    reward: RewardFunction | None,
) -> PreferenceMethod:
    """Encode both sides and score them under the reference, once, where the loss takes one that
    stays.
    """
    held_out = choose_held_out(data.test, config)
    kind, most = KINDS[objective.kind], config.data.max_dropped
    train = kind.encode(encoder, data.train, max_dropped=most, what="training rows")
    test = kind.encode(encoder, held_out, max_dropped=most, what="held-out rows")
    train_logps = test_logps = None
    asked_again = config.moving_reference is not None or asks_reference(objective.wants)
    in_loss = reference if objective.needs_reference else None
    if in_loss is not None and config.moving_reference is None:
        of_train = kind.sequences(train)
        sequences = Joined(of_train, kind.sequences(test))
        with counting("Reference log-probabilities", len(sequences)) as advance:
            logps, cached = reference_logps(
                in_loss.model,
                sequences,
                precision=config.precision,
                max_tokens=config.batch.max_tokens,
                progress=advance,
            )
        log.info("Reference log-probabilities: %s.", "from the cache" if cached else "computed")
        train_logps, test_logps = logps[: len(of_train)], logps[len(of_train) :]
    return PreferenceMethod(
        train=train,
        test=test,
        train_reference=train_logps,
        test_reference=test_logps,
        loss_config=config.loss,
        precision=config.precision,
        max_tokens=config.batch.max_tokens,
        max_logit_bytes=config.batch.max_logit_mib << 20,
        on_policy=_on_policy(config, policy, reference, encoder, held_out, reward),
        save=model_saver(config, policy, encoder, LOSS_TITLES.format(config.loss.name)),
        reference=in_loss.model if in_loss is not None and asked_again else None,
        vocab_size=policy.model.get_output_embeddings().weight.shape[0],  # type: ignore[operator]
        moving=config.moving_reference,
    )


LOSS_TITLES = "Preference optimisation with the loss `{}`."


def _warn_of_whole_batches(method: PreferenceMethod, config: PreferenceConfig) -> None:
    """A batch that cannot be split may need more memory than the token budget says."""
    if not method.whole_batch:
        return
    most = method.largest_batch(config.batch.size)
    if most > config.batch.max_tokens:
        log.warning(
            "The loss %s compares the rows of a batch, so a batch is not split: up to %d tokens "
            "go through the model at once although batch.max_tokens is %d.",
            config.loss.name,
            most,
            config.batch.max_tokens,
        )


def _warn_of_a_still_reference(method: PreferenceMethod, config: PreferenceConfig) -> None:
    """A reference that was asked to move and never will."""
    moving, steps = config.moving_reference, method.num_steps(config)
    if moving is not None and moving.every > steps:
        log.warning(
            "moving_reference.every: %d steps are more than the run's %d, so the reference stays.",
            moving.every,
            steps,
        )


def check_same_tokens(policy: Policy, reference: Policy) -> None:
    """Policy and reference must mean the same by an id."""
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise InputError(
            f"reference: {reference.name} has another tokenizer than {policy.name}; "
            "their log-probabilities cannot be compared."
        )


def _on_policy(
    config: PreferenceConfig,
    policy: Policy,
    reference: Policy | None,
    encoder: Encoder,
    held_out: Sequence[Any],
    reward: RewardFunction | None,
) -> OnPolicyEvaluation | None:
    """What is sampled of the policy while it trains, or None where there is nothing to measure."""
    settings = config.evaluation
    if (reference is None and reward is None) or settings.kl_prompts == 0:
        return None
    return evaluation_on_policy(
        config,
        policy.model,
        encoder,
        distinct_prompts(held_out, settings.kl_prompts, config.seed),
        reference=None if reference is None else reference.model,
        reward=reward,
        samples_per_prompt=settings.kl_samples,
    )
