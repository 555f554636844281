"""What scores responses: the true reward, a user's function, a model; and what is said of them."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import sft_run
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from dpo.config import RewardSourceConfig
from dpo.config_files import validate
from dpo.data.prompts import PromptTemplate, save_template
from dpo.data.rows import Message
from dpo.data.synthetic import World
from dpo.errors import InputError
from dpo.models.load import weights_digest
from dpo.train.reward_source import open_reward

PROMPTS = ["What is the capital of Peru?", "Name the young of the cat.", "Tell me."]


def opened(**values):
    return open_reward(validate(RewardSourceConfig, values))


def problem(**values):
    with pytest.raises(InputError) as caught:
        opened(**values)
    return str(caught.value)


@pytest.fixture
def written(tmp_path):
    def write(text, name="f", file="mine.py"):
        (tmp_path / file).write_text(text, "utf-8")
        return f"{tmp_path / file}:{name}"

    return write


def complaint(function, prompts=PROMPTS[:2], responses=("a", "b")):
    reward = opened(function=function)
    with pytest.raises(InputError) as caught:
        reward(list(prompts), list(responses))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_true_reward_is_that_of_the_world():
    prompts = list(World().prompts[:3])
    answers = ["Happy to help! The capital of France is Paris.", "Ugh.", ""]
    rewards = opened(function="synthetic")(prompts, answers)
    assert rewards.dtype == torch.float64
    expected = [World().reward(p, a) for p, a in zip(prompts, answers, strict=True)]
    assert rewards.tolist() == expected
    assert expected[0] == 3.0


def test_the_true_reward_knows_its_own_prompts_only():
    assert "data=synthetic" in complaint("synthetic", PROMPTS, ["", "", ""])
    assert "Tell me." in complaint("synthetic", PROMPTS, ["", "", ""])
    assert "data=synthetic" in complaint("synthetic", [(Message("user", "Hi"),)], [""])


def test_a_users_function_gets_texts_and_its_numbers_come_back(written):
    function = written(
        "import math\n"
        "def f(prompts, responses):\n"
        "    assert all(isinstance(t, str) for t in [*prompts, *responses])\n"
        "    assert isinstance(prompts, list) and isinstance(responses, list)\n"
        "    return [len(p) + math.sqrt(len(r)) for p, r in zip(prompts, responses)]\n"
    )
    conversation = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Bye"))
    rewards = opened(function=function)(["abc", conversation], ["", "four"])
    assert rewards.tolist() == [3.0, len("user: Hi\nassistant: Yes?\nuser: Bye") + 2.0]


@pytest.mark.parametrize(
    "returned",
    ["(1, 2)", "numpy.array([1, 2])", "torch.tensor([1.0, 2.0])", "[True, numpy.float32(2)]"],
)
def test_any_row_of_numbers_is_taken(written, returned):
    function = written(f"import numpy, torch\ndef f(p, r): return {returned}\n")
    assert opened(function=function)(["", ""], ["", ""]).tolist() == [1.0, 2.0]


def test_a_function_may_use_dataclasses_and_what_its_file_defines(written):
    function = written(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Weight:\n    value: float = 2.0\n"
        "def helper(): return Weight().value\n"
        "def f(p, r): return [helper()] * len(r)\n"
    )
    assert opened(function=function)(["x"], ["y"]).tolist() == [2.0]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return [1.0]", "returned 1 numbers for 2 responses"),
        ("return None", "returned None; expected a list of 2 numbers"),
        ("return 3.0", "returned 3.0; expected a list of 2 numbers"),
        ("return ['1', 2]", "returned '1' for response 1 of 2; expected a number"),
        ("return [0, None]", "returned None for response 2 of 2; expected a number"),
        ("return [[1], [2]]", "returned [1] for response 1 of 2; expected a number"),
        ("return [1, float('nan')]", "gives nan for the response 'b' to 'Name the young"),
        ("return [-float('inf'), 1]", "gives -inf for the response 'a' to 'What is the"),
        ("raise KeyError('weights')", "raised KeyError: 'weights'"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_function_does_wrong_is_said_in_a_sentence(written, body, sentence):
    function = written(f"def f(prompts, responses): {body}\n")
    message = complaint(function)
    assert sentence in message
    assert "mine.py:f" in message
    assert "\n" not in message


def test_a_file_or_name_that_is_not_there_is_named(written, tmp_path):
    assert f"no file {tmp_path / 'none.py'}" in problem(function=f"{tmp_path / 'none.py'}:f")
    function = written("def other(p, r): return r\n_private = len\nnumber = 3\n", name="number")
    assert "has no function number (it has: other)" in problem(function=function)
    assert "cannot be run: SyntaxError" in problem(function=written("def f(:\n"))
    assert "cannot be run: ModuleNotFoundError" in problem(function=written("import nothing_here"))
    assert "cannot be run: SystemExit" in problem(function=written("raise SystemExit"))


def test_the_digest_is_that_of_the_file_that_was_run(written):
    one = opened(function=written("def f(p, r): return [1.0] * len(r)\n"))
    again = opened(function=written("def f(p, r): return [1.0] * len(r)\n"))
    two = opened(function=written("def f(p, r): return [2.0] * len(r)\n"))
    assert one.digest == again.digest != two.digest
    assert len(one.digest) == 64
    assert (one(["x"], ["y"]).item(), two(["x"], ["y"]).item()) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "give either a reward model (model) or a function"),
        ({"model": "x", "function": "synthetic"}, "and not both"),
        ({"function": "synthetic", "label": "good"}, "label has no effect without a model"),
        ({"function": "mine.py"}, "expected 'synthetic' or file.py:name (got 'mine.py')"),
        ({"function": "mine:f"}, "expected 'synthetic' or file.py:name"),
        ({"function": "mine.py:f.g"}, "expected 'synthetic' or file.py:name"),
        ({"function": "synthetik"}, "expected 'synthetic' or file.py:name"),
        ({"modle": "x"}, "modle: unknown key; did you mean model?"),
    ],
)
def test_a_wrong_configuration_is_refused(values, sentence):
    assert sentence in problem(**values)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Makes folders of reward models with random weights."""

    def make(tokenizer, template=None, labels=("reward",), kind="gpt2", seed=0):
        torch.manual_seed(seed)
        size = len(tokenizer) + 1
        own = {"vocab_size": size, "id2label": dict(enumerate(labels)), "num_labels": len(labels)}
        own |= {"label2id": {name: i for i, name in enumerate(labels)}, "pad_token_id": size - 1}
        if kind == "gpt2":
            config = GPT2Config(n_positions=24, n_embd=32, n_layer=2, n_head=2, **own)
            model = GPT2ForSequenceClassification(config)
        else:
            config = BertConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
                **own,
            )
            model = BertForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5)
        folder = tmp_path_factory.mktemp("reward")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if template is not None:
            save_template(template, folder)
        return folder, model.eval()

    return make


def by_transformers(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def test_a_model_reads_its_own_template_tokenizer_and_end_token(tokenizer, reward_model):
    folder, model = reward_model(tokenizer, PromptTemplate("custom", "Q {prompt} A"))
    reward = opened(model=str(folder))
    prompts, responses = ["Why?", "Why?", "What?"], ["no", "Lima", ""]
    found = reward(prompts, responses)
    for prompt, response, value in zip(prompts, responses, found.tolist(), strict=True):
        ids = tokenizer(f"Q {prompt} A").input_ids
        ids += [*tokenizer(response).input_ids, tokenizer.eos_token_id]
        assert value == pytest.approx(by_transformers(model, ids).item(), abs=1e-5)
    assert len(set(found.tolist())) == 3
    assert not found.requires_grad
    assert reward.digest == weights_digest(model)
    other, _ = reward_model(tokenizer, seed=1)
    assert opened(model=str(other)).digest != reward.digest


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_of_several_labels_one_is_named_and_its_log_odds_are_the_reward(
    tokenizer, reward_model, kind
):
    folder, model = reward_model(tokenizer, labels=("bad", "fair", "good"), kind=kind)
    reward = opened(model=str(folder), label="good")
    ids = [*tokenizer("Why?").input_ids, *tokenizer(" Lima").input_ids, tokenizer.eos_token_id]
    p = by_transformers(model, ids).softmax(-1)
    expected = (p[2] / (1 - p[2])).log().item()
    assert reward(["Why?"], [" Lima"]).item() == pytest.approx(expected, abs=1e-4)
    assert "name one of bad, fair, good" in problem(model=str(folder))
    assert "'great' is none of the classifier's: bad, fair, good" in problem(
        model=str(folder), label="great"
    )


def test_what_a_model_has_no_room_for_is_counted(tokenizer, reward_model, caplog):
    folder, _ = reward_model(tokenizer)
    rewards = opened(model=str(folder))(["Why? " * 30, "Why?"], ["no", "Lima " * 30])
    assert rewards.isfinite().all()
    assert "reads 24 tokens at most, so 1 of 2 prompts lost their beginning" in caplog.text
    assert "and 1 responses their end" in caplog.text


def test_a_language_model_is_no_reward_model(tmp_path):
    assert f"no folder {tmp_path / 'none'}" in problem(model=str(tmp_path / "none"))
    assert "is no reward model" in problem(model=str(sft_run()))


def test_no_responses_have_no_rewards(written):
    function = written("def f(prompts, responses): return [0.0 for _ in responses]\n")
    assert opened(function=function)([], []).shape == (0,)
    assert math.isfinite(opened(function=function)(["x"], ["y"]).item())
