"""What every training job does before and after `fit`: open the models, claim the run directory,
write models and samples.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dpo import atomic
from dpo.config import ModelConfig, RunConfig
from dpo.data.audit import audit
from dpo.data.prompts import PromptTemplate, as_text, load_template
from dpo.data.rows import (
    DemonstrationRow,
    PreferenceRow,
    PromptRow,
    RankedRow,
    Row,
    UnpairedRow,
)
from dpo.data.split import Digests, prompt_digests
from dpo.data.tokenize import Encoder
from dpo.errors import InputError
from dpo.models.adapters import (
    WHOLE,
    AdapterSettings,
    Holder,
    model_below,
    open_model,
    typed,
)
from dpo.models.export import model_card, save_pretrained
from dpo.models.fresh import fresh_gpt2, train_tokenizer
from dpo.models.generate import generate
from dpo.models.load import (
    ModelSource,
    check_fit,
    find_model,
    find_tokenizer,
    load_tokenizer,
    max_positions,
    pick_device,
    positions_of,
    tokenizer_digest,
    weights_digest,
)
from dpo.models.parts import is_sharded
from dpo.train import ranks
from dpo.train.prepare import (
    SplitData,
    choose_template,
    encode_prompts,
    make_encoder,
    seeded_choice,
)
from dpo.train.publish import check_login, publish
from dpo.train.run import TRAIN_PROMPTS, Run, open_run, train_prompts
from dpo.train.stopping import stop_here

DATA_AUDIT = "data.json"
"""In a run's folder: what its rows hold, by `data.audit`."""

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


def open_policy(
    config: ModelConfig,
    texts: Sequence[str],
    seed: int,
    trust_remote_code: bool,
    *,
    key: str = "model",
    adapter: AdapterSettings | None = None,
    pure_bf16: bool = False,
    held: Holder = WHOLE,
) -> Policy:
    """Load a model, or make a fresh one with a tokenizer learnt from the texts.

    Args:
        key: what the user calls it, for messages.
        adapter: of a model that is loaded; without one, an adapter that is found is merged.
        pure_bf16: its weights are bfloat16.
        held: whole, or a part of it on every rank.

    Raises:
        InputError: there is no such model, or the tokenizer does not fit it.
    """
    if config.fresh is not None:
        shape = config.fresh.model_dump(exclude={"vocab_size"})
        tokenizer = train_tokenizer(texts, vocab_size=config.fresh.vocab_size)
        make = partial(fresh_gpt2, **shape, tokenizer=tokenizer, seed=seed)
        model = typed(held.make(make), pure_bf16, held)
        return Policy(_on_device(model), tokenizer, None, "fresh GPT-2")
    assert config.path is not None
    source = find_model(
        config.path, revision=config.revision, trust_remote_code=trust_remote_code, key=key
    )
    tokenizer = tokenizer_for(config, source)
    model = open_model(source, adapter=adapter, seed=seed, pure_bf16=pure_bf16, held=held)
    check_fit(model, tokenizer, name=config.path)
    template = load_template(Path(source.path)) if source.local else None
    return Policy(_on_device(model), tokenizer, template, config.path)


def _on_device(model: nn.Module) -> nn.Module:
    """The model where it computes; one in parts or quantised is where it was made."""
    if is_sharded(model) or getattr(model, "is_quantized", False):
        return model
    return model.to(pick_device())


def tokenizer_for(config: ModelConfig, source: ModelSource) -> Any:
    """The tokenizer that is named, or else the model's own.

    Raises:
        InputError: there is none.
    """
    if config.tokenizer is None:
        return load_tokenizer(source)
    trusted = source.trust_remote_code
    return load_tokenizer(find_tokenizer(config.tokenizer, trust_remote_code=trusted))


def open_reference(
    named: ModelConfig | None,
    policy: ModelConfig,
    seed: int,
    trust_remote_code: bool,
    *,
    pure_bf16: bool = False,
    held: Holder = WHOLE,
) -> Policy:
    """The model named as the reference, or else the one that the policy starts from, read apart
    from it: training cannot touch it.

    Raises:
        InputError: as `open_policy`, under the key that the user gave.
    """
    opened, key = (policy, "model") if named is None else (named, "reference")
    return open_policy(opened, [], seed, trust_remote_code, key=key, pure_bf16=pure_bf16, held=held)


def make_run_encoder(config: RunConfig, policy: Policy, data: SplitData[Any]) -> Encoder:
    """The encoder of the run, with its one template."""
    positions = max_positions(policy.model)
    return encoder_for(config, policy.tokenizer, policy.template, positions, data)


def encoder_for(
    config: RunConfig,
    tokenizer: Any,
    own: PromptTemplate | None,
    positions: int,
    data: SplitData[Any],
) -> Encoder:
    """The same from the parts of a policy: its tokenizer, the template that it was trained with and
    the positions that it has.
    """
    template = choose_template(
        config.data.template, own, shape=data.shape, conversational=data.conversational
    )
    return make_encoder(tokenizer, template, max_length=config.data.max_length, positions=positions)


def prompts_seen(config: RunConfig, data: SplitData[Any]) -> Digests:
    """Digests of the prompts of this run and of the runs that its model comes from."""
    before = train_prompts(Path(config.model.path).expanduser()) if config.model.path else None
    own = prompt_digests(row.prompt for row in data.train)
    return own if before is None else np.union1d(before, own)


def encoder_without_model(
    config: RunConfig,
    data: SplitData[Any],
    texts: Sequence[str],
    *,
    trust_remote_code: bool = False,
) -> tuple[Encoder, int]:
    """The run's encoder and its model's positions, from configuration and tokenizer alone.

    Args:
        texts: what a fresh model's tokenizer is learnt from.

    Raises:
        InputError: as training would, for tokenizer and template.
    """
    model = config.model
    if model.fresh is not None:
        tokenizer = train_tokenizer(texts, vocab_size=model.fresh.vocab_size)
        template, positions = None, model.fresh.positions
    else:
        assert model.path is not None
        source = find_model(
            model.path, revision=model.revision, trust_remote_code=trust_remote_code
        )
        tokenizer = tokenizer_for(model, source)
        template = load_template(Path(source.path)) if source.local else None
        positions = positions_of(model_below(source))
    return encoder_for(config, tokenizer, template, positions, data), positions


@contextmanager
def opened_run(
    config: RunConfig,
    data: SplitData[Any],
    policy: Policy,
    encoder: Encoder,
    *,
    command: str,
    **digests: str,
) -> Iterator[Run]:
    """The run directory, locked, with everything that decides its result written down."""
    identity = {
        "command": command,
        **config.identity,
        "resolved": {
            "template": {"name": encoder.template.name, "text": encoder.template.text},
            "max_length": encoder.max_length,
            "data_sha256": data.sha256,
            "tokenizer_sha256": tokenizer_digest(policy.tokenizer),
            "model_sha256": weights_digest(policy.model),
            **digests,
        },
    }
    ranks.check_same("The run (configuration, data, tokenizer or weights)", identity)
    with ranks.together():
        run = open_run(Path(config.out), identity)
    if not run.folder.is_dir():
        raise InputError(f"out: {run.folder} must be on a disk that all hosts share.")
    if run.finished:
        log.info("%s is finished; nothing to do.", run.folder)
    try:
        with stop_here():
            with ranks.together():
                _open_places(config, run)
            _leave_audit(run, data)
            yield run
        if config.push_to_hub is not None and run.writes:
            publish(config.push_to_hub, run.folder)
    except InputError:
        _withdraw(run)
        raise
    finally:
        run.close()


def _open_places(config: RunConfig, run: Run) -> None:
    """Whoever is to hear of the run must be there before the first step."""
    if run.finished or not run.writes:
        return
    if config.push_to_hub is not None:
        check_login(config.push_to_hub)
    run.report_to(config.report_to, config.identity)


def _leave_audit(run: Run, data: SplitData[Any]) -> None:
    """Count what the rows hold, once, for whoever looks at the run."""
    file = run.folder / DATA_AUDIT
    if run.writes and not run.finished and not file.exists():
        found = audit(data.train, test_rows=data.test)
        atomic.write_json(file, {"num_test_rows": len(data.test), **asdict(found)})
        if found.num_repeated_prompts > found.num_responses / 2:
            log.warning(
                "%d of %d responses begin with their prompt, so the model reads it twice; leave it "
                "out of them.",
                found.num_repeated_prompts,
                found.num_responses,
            )


def _withdraw(run: Run) -> None:
    """Where a mistake of the user is found before the first step, the folder is free for the mended
    command.
    """
    if run.writes and not run.metrics_file.exists() and not run.checkpoints.exists():
        for name in ("config.json", "manifest.json", TRAIN_PROMPTS, DATA_AUDIT):
            (run.folder / name).unlink(missing_ok=True)


def run_card(config: RunConfig, policy: Policy, encoder: Encoder, method: str, **more: str) -> str:
    """The README of the run's model folders; `more` as in `model_card`."""
    settings = json.dumps(config.identity, indent=2)
    data = config.data.path if isinstance(config.data.path, str) else ", ".join(config.data.path)
    return model_card(
        title=Path(config.out).name,
        base=Path(policy.name).name if Path(policy.name).is_absolute() else policy.name,
        data=Path(data).name if Path(data).is_absolute() else data,
        template=encoder.template,
        method=method,
        settings=settings,
        **more,
    )


def model_saver(
    config: RunConfig, policy: Policy, encoder: Encoder, method: str
) -> Callable[[nn.Module, Path], None]:
    """How the run writes its model folders."""
    card = run_card(config, policy, encoder, method)

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


def choose_held_out(rows: Sequence[Any], config: RunConfig) -> list[Any]:
    """The held-out rows that are used while training."""
    return [rows[i] for i in seeded_choice(len(rows), config.evaluation.max_rows, seed=config.seed)]


def distinct_prompts(rows: Sequence[Any], most: int, seed: int) -> list[Any]:
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
        case PromptRow():
            return {}


def write_samples(
    policy: Policy,
    encoder: Encoder,
    held_out: Sequence[Any],
    config: RunConfig,
    run: Run,
) -> None:
    """Generations on held-out prompts, beside what the data has, in `samples/final.jsonl`."""
    settings = config.evaluation
    if settings.num_samples == 0:
        return
    first: dict[Any, Any] = {row.prompt: row for row in reversed(held_out)}
    prompts = distinct_prompts(held_out, settings.num_samples, config.seed)
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
    if not run.writes:
        return
    (run.folder / "samples").mkdir(exist_ok=True)
    atomic.write_text(run.folder / "samples" / "final.jsonl", "\n".join(lines) + "\n")
