"""A saved model is a Hugging Face folder like any other, and the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from dpo.data.prompts import load_template, resolve_template
from dpo.models.export import model_card, save_pretrained
from dpo.models.generate import generate
from dpo.models.load import find_model, fuse_activations, load_model, load_tokenizer, weights_digest
from tiny_models import ARCHITECTURES, make

TEMPLATE = resolve_template("question")


def save(model: nn.Module, tokenizer, folder: Path, **more: object) -> Path:
    save_pretrained(
        model,
        tokenizer,
        **{
            "template": TEMPLATE,
            "folder": folder,
            "card": "A card.",
            "stop_ids": [tokenizer.eos_token_id],
            **more,
        },
    )
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_transformers_load_the_same_logits_bitwise(name: str, tokenizer, tmp_path: Path) -> None:
    model = make(name, len(tokenizer))
    folder = save(model, tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = load_model(find_model(str(folder)))
    ids = torch.tensor([tokenizer("What is the capital of Peru?").input_ids])
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=0, atol=2e-5)
    assert torch.equal(ours(ids).logits, fuse_activations(model)(ids).logits)
    assert weights_digest(ours) == weights_digest(model)


def test_the_tokenizer_and_the_template_come_back(tokenizer, tmp_path: Path) -> None:
    folder = save(make("gpt2", len(tokenizer)), tokenizer, tmp_path)
    text = "What is ünusual?\n<|endoftext|> \t end"
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(find_model(str(folder)))):
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.eos_token_id == tokenizer.eos_token_id
    assert load_template(folder) == TEMPLATE
    assert (folder / "README.md").read_text("utf-8") == "A card."


def test_a_chat_template_comes_back(tokenizer, tmp_path: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(save(make("gpt2", 300), tokenizer, tmp_path / "a"))
    chatty.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    folder = save(make("gpt2", 300), chatty, tmp_path / "b", template=resolve_template("chat"))
    loaded = load_tokenizer(find_model(str(folder)))
    assert loaded.chat_template == chatty.chat_template
    assert load_template(folder) == resolve_template("chat")


def test_the_text_generation_pipeline_takes_the_folder(tokenizer, tmp_path: Path) -> None:
    """As the card says, and it decodes what our own generation does."""
    model = make("gpt2", len(tokenizer), scale=12.0)
    folder = save(model, tokenizer, tmp_path)
    run = pipeline("text-generation", model=str(folder))
    prompt = "Question: What is the capital of Peru?\nAnswer:\n"
    (found,) = run(
        prompt, max_new_tokens=8, max_length=None, do_sample=False, return_full_text=False
    )
    (expected,) = generate(
        model,
        [tokenizer(prompt).input_ids],
        keys=["0"],
        temperature=0,
        max_new_tokens=8,
        stop_ids=[tokenizer.eos_token_id],
        seed=0,
    )
    assert found["generated_text"] == tokenizer.decode(expected.ids)


def test_the_saved_generation_config_stops_at_the_runs_end_tokens(
    tokenizer, tmp_path: Path
) -> None:
    model = make("gpt2", len(tokenizer))
    model.generation_config.top_k = 3
    model.generation_config.repetition_penalty = 2.0
    own = model.generation_config
    folder = save(model, tokenizer, tmp_path, stop_ids=[0, 7])
    assert model.generation_config is own
    assert (own.top_k, own.repetition_penalty) == (3, 2.0)
    saved = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert saved.eos_token_id == [0, 7]
    assert saved.do_sample is True
    assert saved.repetition_penalty in (None, 1.0)
    assert saved.pad_token_id == 0


def test_the_whole_distribution_is_sampled_from_by_default(tokenizer, tmp_path: Path) -> None:
    """transformers' own default keeps the 50 likeliest tokens; the saved config must not."""
    model = make("gpt2", len(tokenizer))  # 300 tokens, none unlikely, no two alike
    folder = save(model, tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, 7]] * 1000)
    drawn = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)[:, -1]
    assert len(set(drawn.tolist())) > 150


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tied_embeddings_stay_tied_and_untied_ones_apart(
    name: str, tokenizer, tmp_path: Path
) -> None:
    model = make(name, len(tokenizer))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name in ("gpt2", "gemma2")), "both kinds are among them"
    folder = save(model, tokenizer, tmp_path)
    stored = load_file(folder / "model.safetensors")
    matrices = [v for v in stored.values() if v.shape == (len(tokenizer), 32)]
    assert len(matrices) == (1 if tied else 2)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(folder),
        load_model(find_model(str(folder))),
    ):
        inputs = loaded.get_input_embeddings().weight
        assert (loaded.get_output_embeddings().weight is inputs) is tied


def test_nothing_but_safetensors_and_text_is_written(tokenizer, tmp_path: Path) -> None:
    folder = save(make("llama", len(tokenizer)), tokenizer, tmp_path)
    suffixes = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".md", ".txt", ".jinja"}


def test_the_generation_config_is_restored_when_saving_fails(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("gpt2", len(tokenizer))
    own = model.generation_config

    def full(*args: object, **more: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        save(model, tokenizer, tmp_path)
    assert model.generation_config is own


def test_the_card_says_how_prompts_are_written() -> None:
    common = {"title": "T", "base": "b", "data": "d", "method": "m", "settings": "{}"}
    card = model_card(template=resolve_template("hh"), **common)
    assert "```text\n\n\nHuman: {prompt}\n\nAssistant:\n```" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "through the tokenizer's chat template" in model_card(
        template=resolve_template("chat"), **common
    )
