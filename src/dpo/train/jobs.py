"""The training commands, from a configuration to a finished run directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dpo import atomic
from dpo.config import DataConfig, ModelConfig, PreferenceConfig, SFTConfig, TrainingConfig
from dpo.data.prompts import PromptTemplate, as_text, load_template
from dpo.data.rows import DemonstrationRow, PreferenceRow, RankedRow, Row, UnpairedRow
from dpo.data.split import prompt_digest
from dpo.data.tokenize import Encoder
from dpo.errors import InputError
from dpo.models.divergence import KLEstimate, on_policy_kl
from dpo.models.export import model_card, save_pretrained
from dpo.models.fresh import fresh_gpt2, train_tokenizer
from dpo.models.generate import generate
from dpo.models.load import (
    check_fit,
    find_model,
    find_tokenizer,
    load_model,
    load_tokenizer,
    max_positions,
    pick_device,
    weights_digest,
)
from dpo.models.recompute import enable_recomputation
from dpo.progress import counting
from dpo.train.encoded import KINDS
from dpo.train.loop import fit
from dpo.train.objective import Objective, check_scores, make_objective
from dpo.train.preference import PreferenceMethod
from dpo.train.prepare import (
    SplitData,
    choose_template,
    encode_prompts,
    load_demonstrations,
    load_judgements,
    load_preferences,
    load_rankings,
    make_encoder,
    seeded_choice,
)
from dpo.train.reference import reference_logps
from dpo.train.run import Run, load_train_prompts, open_run, save_train_prompts
from dpo.train.sft import SupervisedMethod, encode_demonstrations

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Policy:
    """The model that training starts from, with its tokenizer and the template it was trained
    with.
    """

    model: nn.Module
    tokenizer: Any
    template: PromptTemplate | None
    name: str


def train_sft(config: SFTConfig, *, trust_remote_code: bool = False) -> Path:
    """Supervised fine-tuning; returns the run directory, finished.

    Raises:
        InputError, DivergedError, CheckpointError, StorageError, Stopped: as their classes say.
    """
    data = load_demonstrations(config.data, response=config.response)
    texts = [f"{as_text(row.prompt)}\n{row.response}" for row in data.train]
    policy = open_policy(config.model, texts, config.seed, trust_remote_code)
    if config.gradient_checkpointing:
        enable_recomputation(policy.model)
    encoder = make_run_encoder(config, policy, data)
    with _opened(config, data, policy, encoder) as run:
        if run.finished:
            return run.folder
        held_out = _choose(data.test, config)
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
            save=_saver(config, policy, encoder, "Supervised fine-tuning on response tokens."),
        )
        save_train_prompts(run.folder, _prompts_seen(config, data))
        fit(method, policy.model, config, run)
        _sample(policy, encoder, held_out, config, run)
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
    check_scores(objective, [*data.train, *data.test])
    policy = open_policy(config.model, [], config.seed, trust_remote_code)
    if config.gradient_checkpointing:
        enable_recomputation(policy.model)
    encoder = make_run_encoder(config, policy, data)
    reference, digests = None, {}
    if objective.needs_reference:
        # It is read apart from the policy: training cannot touch it.
        named = config.reference or config.model
        reference = open_policy(named, [], config.seed, trust_remote_code)
        _check_same_tokens(policy, reference)
        digests = {"reference_sha256": weights_digest(reference.model)}
    with _opened(config, data, policy, encoder, **digests) as run:
        if run.finished:
            return run.folder
        method = _preference_method(config, objective, data, policy, reference, encoder)
        _warn_of_whole_batches(method, config)
        save_train_prompts(run.folder, _prompts_seen(config, data))
        fit(method, policy.model, config, run)
        _sample(policy, encoder, _choose(data.test, config), config, run)
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
) -> PreferenceMethod:
    """Encode both sides and score them under the reference, once, unless it moves."""
    held_out = _choose(data.test, config)
    kind, most = KINDS[objective.kind], config.data.max_dropped
    train = kind.encode(encoder, data.train, max_dropped=most, what="training rows")
    test = kind.encode(encoder, held_out, max_dropped=most, what="held-out rows")
    train_logps = test_logps = None
    if reference is not None and config.moving_reference is None:
        of_train = kind.sequences(train)
        sequences = [*of_train, *kind.sequences(test)]
        with counting("Reference log-probabilities", len(sequences)) as advance:
            logps, cached = reference_logps(
                reference.model,
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
        kl=None if reference is None else _kl(config, reference, encoder, held_out, policy),
        save=_saver(config, policy, encoder, LOSS_TITLES.format(config.loss.name)),
        reference=None if reference is None else reference.model,
        vocab_size=policy.model.get_output_embeddings().weight.shape[0],  # type: ignore[operator]
        moving=config.moving_reference,
    )


LOSS_TITLES = "Preference optimisation with the loss `{}`."


def _warn_of_whole_batches(method: PreferenceMethod, config: PreferenceConfig) -> None:
    """A batch that cannot be split may need more memory than the token budget says."""
    if not method.whole_batch:
        return
    costs = sorted((method.num_tokens(row) for row in range(method.num_rows)), reverse=True)
    most = sum(costs[: config.batch.size])
    if most > config.batch.max_tokens:
        log.warning(
            "The loss %s compares the rows of a batch, so a batch is not split: up to %d tokens "
            "go through the model at once although batch.max_tokens is %d.",
            config.loss.name,
            most,
            config.batch.max_tokens,
        )


def open_policy(
    config: ModelConfig, texts: Sequence[str], seed: int, trust_remote_code: bool
) -> Policy:
    """Load a model, or make a fresh one with a tokenizer learnt from the texts.

    Raises:
        InputError: there is no such model, or the tokenizer does not fit it.
    """
    if config.fresh is not None:
        shape = config.fresh.model_dump(exclude={"vocab_size"})
        tokenizer = train_tokenizer(texts, vocab_size=config.fresh.vocab_size)
        model = fresh_gpt2(**shape, tokenizer=tokenizer, seed=seed)
        return Policy(model.to(pick_device()), tokenizer, None, "fresh GPT-2")
    assert config.path is not None
    source = find_model(config.path, revision=config.revision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(
        source
        if config.tokenizer is None
        else find_tokenizer(config.tokenizer, trust_remote_code=trust_remote_code)
    )
    model = load_model(source)
    check_fit(model, tokenizer, name=config.path)
    template = load_template(Path(source.path)) if source.local else None
    return Policy(model.to(pick_device()), tokenizer, template, config.path)


def make_run_encoder(config: TrainingConfig, policy: Policy, data: SplitData[Any]) -> Encoder:
    """The encoder of the run, with its one template."""
    template = choose_template(
        config.data.template,
        policy.template,
        shape=data.shape,
        conversational=data.conversational,
    )
    return make_encoder(
        policy.tokenizer,
        template,
        max_length=config.data.max_length,
        positions=max_positions(policy.model),
    )


def _check_same_tokens(policy: Policy, reference: Policy) -> None:
    """Policy and reference must mean the same by an id."""
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise InputError(
            f"reference: {reference.name} has another tokenizer than {policy.name}; "
            "their log-probabilities cannot be compared."
        )


def _prompts_seen(config: TrainingConfig, data: SplitData[Any]) -> set[int]:
    """Digests of the prompts of this run and of the runs that its model comes from."""
    before = load_train_prompts(Path(config.model.path).expanduser()) if config.model.path else None
    return (before or set()) | {prompt_digest(row.prompt) for row in data.train}


@contextmanager
def _opened(
    config: TrainingConfig,
    data: SplitData[Any],
    policy: Policy,
    encoder: Encoder,
    **digests: str,
) -> Iterator[Run]:
    """The run directory, locked, with everything that decides its result written down."""
    identity = {
        "command": "sft" if isinstance(config, SFTConfig) else "train",
        **config.model_dump(mode="json", exclude={"out"}),
        "resolved": {
            "template": {"name": encoder.template.name, "text": encoder.template.text},
            "max_length": encoder.max_length,
            "data_sha256": data.sha256,
            "model_sha256": weights_digest(policy.model),
            **digests,
        },
    }
    run = open_run(Path(config.out), identity)
    if run.finished:
        log.info("%s is finished; nothing to do.", run.folder)
    try:
        yield run
    finally:
        run.close()


def _saver(
    config: TrainingConfig, policy: Policy, encoder: Encoder, method: str
) -> Callable[[nn.Module, Path], None]:
    """How the run writes its model folders."""
    settings = json.dumps(config.model_dump(mode="json", exclude={"out"}), indent=2)
    data = config.data.path if isinstance(config.data.path, str) else ", ".join(config.data.path)
    card = model_card(
        title=Path(config.out).name,
        base=Path(policy.name).name if Path(policy.name).is_absolute() else policy.name,
        data=Path(data).name if Path(data).is_absolute() else data,
        template=encoder.template,
        method=method,
        settings=settings,
    )

    def save(model: nn.Module, folder: Path) -> None:
        save_pretrained(
            model,
            policy.tokenizer,
            encoder.template,
            folder,
            card=card,
            stop_ids=encoder.stop_ids,
        )

    return save


def _kl(
    config: PreferenceConfig,
    reference: Policy,
    encoder: Encoder,
    held_out: Sequence[Any],
    policy: Policy,
) -> Callable[[nn.Module], KLEstimate] | None:
    """On-policy KL on some held-out prompts, or None where the configuration asks for none."""
    settings = config.evaluation
    if settings.kl_prompts == 0:
        return None
    prompts = _distinct_prompts(held_out, settings.kl_prompts, config.seed)
    ids = encode_prompts(
        encoder,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        positions=max_positions(policy.model),
    )

    def estimate(model: nn.Module) -> KLEstimate:
        return on_policy_kl(
            model,
            reference.model,
            ids,
            stop_ids=encoder.stop_ids,
            max_new_tokens=settings.max_new_tokens,
            samples_per_prompt=settings.kl_samples,
            seed=config.seed,
            max_tokens=config.batch.max_tokens,
            precision=config.precision,
        )

    return estimate


def _choose(rows: Sequence[Any], config: TrainingConfig) -> list[Any]:
    """The held-out rows that are used while training."""
    return [rows[i] for i in seeded_choice(len(rows), config.evaluation.max_rows, seed=config.seed)]


def _distinct_prompts(rows: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most `most` different prompts of the rows."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    return [prompts[i] for i in seeded_choice(len(prompts), most, seed=seed)]


def _given(row: Row) -> dict[str, Any]:
    """What the data has for a prompt."""
    match row:
        case PreferenceRow():
            return {"chosen": row.chosen, "rejected": row.rejected}
        case RankedRow():
            return {"responses": row.responses}
        case UnpairedRow():
            return {"completion": row.completion, "label": row.label}
        case DemonstrationRow():
            return {"response": row.response}


def _sample(
    policy: Policy,
    encoder: Encoder,
    held_out: Sequence[Any],
    config: TrainingConfig,
    run: Run,
) -> None:
    """Generations on held-out prompts, beside what the data has, in `samples/final.jsonl`."""
    settings = config.evaluation
    if settings.num_samples == 0:
        return
    first: dict[Any, Any] = {row.prompt: row for row in reversed(held_out)}
    prompts = _distinct_prompts(held_out, settings.num_samples, config.seed)
    responses = generate(
        policy.model,
        encode_prompts(
            encoder,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            positions=max_positions(policy.model),
        ),
        keys=[f"sample/{i}" for i in range(len(prompts))],
        temperature=settings.sample_temperature,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=encoder.stop_ids,
        seed=config.seed,
        precision=config.precision,
    )
    lines = []
    for prompt, response in zip(prompts, responses, strict=True):
        row = first[prompt]
        given = _given(row)
        line = {
            "prompt": as_text(prompt),
            "generated": encoder.decode(response.ids),
            "truncated": response.truncated,
            **given,
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    (run.folder / "samples").mkdir(exist_ok=True)
    atomic.write_text(run.folder / "samples" / "final.jsonl", "\n".join(lines) + "\n")
