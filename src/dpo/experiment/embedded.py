"""What every experiment on the embedded language starts with: a small GPT-2, taught to answer by
SFT, and samples of its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.atomic import replace_folder
from dpo.config import SFTConfig
from dpo.config_files import validate
from dpo.data.prompts import resolve_template
from dpo.data.synthetic import demonstrations
from dpo.data.tokenize import Encoder
from dpo.models.divergence import KLEstimate, on_policy_kl
from dpo.models.export import model_card, save_pretrained
from dpo.models.fresh import fresh_gpt2, train_tokenizer
from dpo.models.generate import generate
from dpo.models.load import find_model, load_model, load_tokenizer, pick_device
from dpo.train.jobs import train_sft

TEMPLATE = "question"
TEST_FRACTION = 0.25
MAX_NEW_TOKENS = 48
MAX_LENGTH = 96
NUM_DEMONSTRATIONS = 2000


def make_base(folder: Path, seed: int, *, num_facts: int = 80, method: str = "Untrained.") -> Path:
    """A fresh GPT-2 of 242k parameters, with a tokenizer learnt from the demonstrations.

    Args:
        method: what its model card says of how it was made.
    """
    if (folder / "config.json").exists():
        return folder
    rows = demonstrations(num_rows=NUM_DEMONSTRATIONS, seed=seed, num_facts=num_facts)
    tokenizer = train_tokenizer((f"{r.prompt}\n{r.response}" for r in rows), vocab_size=512)
    model = fresh_gpt2(width=96, layers=2, heads=2, positions=128, tokenizer=tokenizer, seed=seed)
    template = resolve_template(TEMPLATE)
    card = model_card(
        title="base",
        base="random weights",
        data="none",
        template=template,
        method=method,
        settings="{}",
    )
    stop_ids = Encoder(tokenizer, template, MAX_LENGTH).stop_ids
    with replace_folder(folder) as new:
        save_pretrained(model, tokenizer, template, new, card=card, stop_ids=stop_ids)
    return folder


def run_settings(out: Path, model: Path, seed: int, steps: int) -> dict[str, Any]:
    """The settings that all training runs on the embedded language share."""
    return {
        "model": str(model),
        "out": str(out),
        "seed": seed,
        "max_steps": max(steps, 2),
        "batch": {"size": 64, "max_tokens": 16_384},
    }


def data_settings(path: str, **more: Any) -> dict[str, Any]:
    """A data section whose split depends on the question alone, so that all runs share it."""
    return {
        "path": path,
        "test_fraction": TEST_FRACTION,
        "max_length": MAX_LENGTH,
        "max_dropped": 1.0,
        **more,
    }


def train_demonstrator(
    folder: Path, base: Path, seed: int, *, steps: int, num_facts: int = 80
) -> Path:
    """SFT on the demonstrations of the training questions."""
    made = {"num_rows": NUM_DEMONSTRATIONS, "seed": seed, "num_facts": num_facts}
    values = run_settings(folder, base, seed, steps) | {
        "data": data_settings("synthetic", synthetic=made),
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
        "evaluation": {"max_new_tokens": MAX_NEW_TOKENS},
    }
    return train_sft(validate(SFTConfig, values))


def open_model(folder: Path) -> tuple[Encoder, Any]:
    """A trained model and the encoder of its prompts."""
    source = find_model(str(folder))
    model = load_model(source).to(pick_device())
    return Encoder(load_tokenizer(source), resolve_template(TEMPLATE), MAX_LENGTH), model


def sample_answers(
    folder: Path, prompts: Sequence[str], *, num_per_prompt: int, seed: int
) -> list[list[str]]:
    """A model's answers at temperature 1, `num_per_prompt` to each question."""
    encoder, model = open_model(folder)
    places = [(i, s) for i in range(len(prompts)) for s in range(num_per_prompt)]
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    responses = generate(
        model,
        [ids[i] for i, _ in places],
        keys=[f"pairs/{i}/{s}" for i, s in places],
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=encoder.stop_ids,
        seed=seed,
        batch_size=256,
    )
    texts = [encoder.decode(response.ids) for response in responses]
    return [texts[i : i + num_per_prompt] for i in range(0, len(texts), num_per_prompt)]


def kl_to_sft(
    folder: Path, sft: Path, prompts: Sequence[str], *, seed: int, samples_per_prompt: int
) -> KLEstimate:
    """KL(model || SFT) on these questions, responses sampled from the model."""
    encoder, model = open_model(folder)
    _, reference = open_model(sft)
    return on_policy_kl(
        model,
        reference,
        [encoder.prompt_ids(prompt) for prompt in prompts],
        stop_ids=encoder.stop_ids,
        max_new_tokens=MAX_NEW_TOKENS,
        samples_per_prompt=samples_per_prompt,
        seed=seed,
    )
