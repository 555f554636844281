"""Every recipe is understood, and takes one step on a tiny model of the architecture that it names,
with made-up rows in the shape of its data.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import dpo
from dpo.config_files import read_yaml, validate
from dpo.data import synthetic
from dpo.models.fresh import fresh_gpt2
from dpo.train.run import read_metrics

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
JOBS = {
    "sft": (dpo.SFTConfig, dpo.train_sft),
    "train": (dpo.PreferenceConfig, dpo.train_preference),
    "reward": (dpo.RewardConfig, dpo.train_reward),
    "online": (dpo.OnlineConfig, dpo.train_online),
    "ppo": (dpo.PPOConfig, dpo.train_ppo),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
GENERATION = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def gpt2(tokenizer):
    shape = {"width": 32, "layers": 2, "heads": 2, "positions": 1024}
    return fresh_gpt2(**shape, tokenizer=tokenizer, seed=0)


def neox(tokenizer):
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=len(tokenizer), intermediate_size=64, **SIZES)
    )


def gptj(tokenizer):
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 1024}
    return GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), **shape))


def llama(tokenizer, config=LlamaConfig, model=LlamaForCausalLM):
    shape = {"intermediate_size": 64, "num_key_value_heads": 1, **SIZES}
    return model(config(vocab_size=len(tokenizer), **shape))


def mistral(tokenizer):
    return llama(tokenizer, MistralConfig, MistralForCausalLM)


ARCHITECTURES = {
    "gpt2-medium": gpt2,
    "EleutherAI/pythia-2.8b": neox,
    "CarperAI/openai_summarize_tldr_sft": gptj,
    "alignment-handbook/zephyr-7b-sft-full": mistral,
    "meta-llama/Meta-Llama-3-8B-Instruct": llama,
}
CHATS = ("alignment-handbook/", "meta-llama/")


def instructions(prompt, chosen, rejected):
    return {"instruction": prompt, "input": "", "chosen": chosen, "rejected": rejected}


def dialogues(prompt, chosen, rejected):
    begin = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": begin + chosen, "rejected": begin + rejected}


def pairs(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def conversations(prompt, chosen, rejected):
    asked = {"role": "user", "content": prompt}
    answered = {
        name: [asked, {"role": "assistant", "content": text}]
        for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": prompt, **answered, "score_chosen": 8.0, "score_rejected": 5.5}


SHAPES = {
    "prefs.jsonl": pairs,
    "instruction-data-with-preference.json": instructions,
    "Anthropic/hh-rlhf": dialogues,
    "CarperAI/openai_summarize_comparisons": pairs,
    "HuggingFaceH4/ultrafeedback_binarized": conversations,
    "princeton-nlp/llama3-ultrafeedback": conversations,
}


def command_of(recipe):
    return re.search(r"^# +dpo (\w+) recipes/", recipe.read_text(), flags=re.MULTILINE).group(1)


@cache
def origins():
    """Run directory: the model that the recipe which makes it starts from."""
    return {read_yaml(file)["out"]: read_yaml(file)["model"] for file in RECIPES}


def architecture_of(model):
    while model in origins():
        model = origins()[model]
    return model


def save_model(name, tokenizer, folder):
    tokenizer = copy.deepcopy(tokenizer)
    if name.startswith(CHATS):
        tokenizer.chat_template = CHAT + GENERATION
    torch.manual_seed(0)
    ARCHITECTURES[name](tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_rows(source, file):
    made = synthetic.preferences(num_rows=24, seed=0)
    lines = [json.dumps(SHAPES[source](row.prompt, row.chosen, row.rejected)) for row in made]
    file.write_text("\n".join(lines), encoding="utf-8")


def shrunk(recipe, folder, tokenizer):
    """The recipe's values, with a model and data of our own and one step of few rows."""
    values = read_yaml(recipe)
    save_model(architecture_of(values["model"]), tokenizer, folder / "start")
    data = {k: v for k, v in values["data"].items() if k not in ("split", "test_fraction")}
    save_rows(data["path"], folder / "rows.jsonl")
    values["model"] = str(folder / "start")
    values["data"] = {**data, "path": str(folder / "rows.jsonl"), "test_fraction": 0.25}
    values["out"] = str(folder / "run")
    values["batch"] = {**values["batch"], "size": 8}
    values["save_every"] = 1
    values["evaluation"] = {"every": 1}
    if "reward" in values:
        (folder / "rewards.py").write_text(
            "def score(prompts, responses):\n    return [len(r) % 7 for r in responses]\n"
        )
        values |= {"reward": {"function": f"{folder / 'rewards.py'}:score"}, "rounds": 1}
        values |= {"prompts_per_round": 8, "sampling": {"max_new_tokens": 8}}
        values |= {"epochs_per_round": 1}
    else:
        del values["epochs"]
        values["max_steps"] = 1
    if command_of(recipe) != "reward":
        values["evaluation"] |= {"max_new_tokens": 4, "num_samples": 1}
    return values


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_takes_a_step_on_a_tiny_model_of_its_architecture(recipe, tmp_path, tokenizer):
    schema, job = JOBS[command_of(recipe)]
    folder = job(validate(schema, shrunk(recipe, tmp_path, tokenizer), where=recipe.name))
    steps = [row for row in read_metrics(folder) if "learning_rate" in row]
    assert [row["step"] for row in steps] == [1]
    assert steps[0]["gradient_norm"] > 0
    name = "adapter_model" if "adapter" in read_yaml(recipe) else "model"
    assert (folder / "model" / f"{name}.safetensors").is_file()


def test_recipes_that_belong_together_share_model_and_data():
    made = {read_yaml(file)["out"]: read_yaml(file) for file in RECIPES}
    for file in RECIPES:
        values = read_yaml(file)
        before = made.get(values["model"])
        if before is not None and before["out"] != "runs/sft":  # of one's own data
            assert values["data"] == before["data"]


def test_the_list_of_recipes_is_whole():
    text = (RECIPES[0].parent / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\(([\w-]+\.yaml)\)", text))
    assert named == {file.name for file in RECIPES}
    assert "../studies/sentiment.yaml" in text


def test_recipes_of_others_name_their_source_and_say_that_they_were_not_run():
    ours = {"sft", "dpo", "lora", "reward", "ppo", "online"}
    for file in RECIPES:
        text = file.read_text(encoding="utf-8")
        if file.stem not in ours:
            assert "Not run by us at full size" in text, file.name
            assert "# From " in text, file.name
