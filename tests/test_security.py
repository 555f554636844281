"""Models, data and configurations come from strangers: nothing in them is run, and nothing leaves
its place.

What is printed is tested where it is printed (tests/report/test_runs.py, tests/data/test_audit.py),
YAML tags in tests/test_config.py.
"""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpo.evaluate.jobs import Evaluation
from dpo.evaluate.records import Generation
from dpo.evaluate.winrate import score_generations, win_rate_table
from dpo.report.study import page, side_by_side
from dpo.report.study_results import Study
from train.small_runs import (
    CANARY,
    dpo,
    dpo_config,
    dpo_run,
    evaluate_config,
    evaluation,
    sft_run,
    words_of,
)

PACKAGE = Path(__file__).parents[1] / "src" / "dpo"


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def made(tmp_path):
    """What a payload would make."""
    return tmp_path / "made-by-the-payload"


@pytest.fixture
def model(tmp_path):
    """A good model folder, to be tampered with."""
    return shutil.copytree(sft_run() / "model", tmp_path / "model")


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def commands_that_read(model: Path, out: Path) -> dict[str, list[object]]:
    """Every way in which a model folder gets into the program."""
    as_policy, as_reference = {"model.path": str(model)}, {"reference": str(model)}
    judged = {"models": {"a": str(sft_run())}, "sentence_model": str(model)}
    rewarded = ["online", f"model={sft_run()}", "rounds=1", f"out={out}"]
    return {
        "sft": ["sft", f"model={model}", "data.synthetic.num_rows=40", f"out={out}"],
        "train": ["train", *words_of(dpo_config(out, as_policy))],
        "reference": ["train", *words_of(dpo_config(out, as_reference))],
        "reward": ["reward", f"model={model}", "data.synthetic.num_rows=40", f"out={out}"],
        "evaluate": ["evaluate", *words_of(evaluate_config(out, {"models": {"a": str(model)}}))],
        "judge": ["evaluate", *words_of(evaluate_config(out, judged))],
        "online": [*rewarded, f"reward={model}"],
    }


WAYS = ("sft", "train", "reference", "reward", "evaluate", "judge", "online")


def test_every_way_is_tried(tmp_path):
    assert tuple(commands_that_read(tmp_path, tmp_path)) == WAYS


# -- weights and code that come with a model -------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_payload_in_pickled_weights_is_refused_and_never_run(model, made, tmp_path, way):
    payload = pickle.dumps(Payload(made))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(payload)
    said = dpo(*commands_that_read(model, tmp_path / "out")[way])
    assert said.code == 2
    assert not made.exists()
    pickle.loads(payload)
    assert made.exists()  # it would have worked


CODE = """
import os
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

os.makedirs({folder!r}, exist_ok=True)

class C(GPT2Config):
    model_type = "homemade"

class M(GPT2LMHeadModel):
    config_class = C

class T(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def homemade(model, made):
    """A model and a tokenizer of classes that its own folder defines."""
    (model / "homemade.py").write_text(CODE.format(folder=str(made)))
    classes = {"AutoConfig": "homemade.C", "AutoModelForCausalLM": "homemade.M"}
    edit(model / "config.json", model_type="homemade", auto_map=classes)
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="T",
        auto_map={"AutoTokenizer": ["homemade.T", None]},
    )
    return model


@pytest.mark.parametrize("way", WAYS)
def test_a_models_own_code_is_not_run_unasked(homemade, made, tmp_path, way):
    assert dpo(*commands_that_read(homemade, tmp_path / "out")[way]).code == 2
    assert not made.exists()


def test_a_tokenizers_own_code_is_not_run_by_looking_at_data(homemade, made, tmp_path):
    made_rows = tmp_path / "rows.jsonl"
    assert dpo("data", "synthetic", made_rows, "--rows", 4).code == 0
    dpo("data", "check", made_rows, "--tokenizer", homemade)
    assert not made.exists()


def test_a_models_own_code_is_run_by_the_flag_and_by_nothing_else(
    homemade, made, tmp_path, monkeypatch
):
    words = commands_that_read(homemade, tmp_path / "out")["train"]
    for word in ("trust_remote_code=true", "model.trust_remote_code=true"):
        assert "unknown key" in dpo(*words, word).err
    assert not made.exists()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    assert dpo(*words, "--trust-remote-code", "max_steps=1").code == 0
    assert made.exists()


def test_nothing_in_the_package_unpickles_or_runs_text():
    """But for the reward function, which is a file of the user's own that the user names."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    found |= {(file.name, name.name) for name in names}
                case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                    found.add((file.name, name))
                case ast.Attribute(value=ast.Name(id=module), attr=name):
                    found.add((file.name, f"{module}.{name}"))
    forbidden = {
        *("pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "eval", "exec"),
        *("torch.load", "np.load", "yaml.unsafe_load", "yaml.full_load", "os.system"),
    }
    assert {place for place in found if place[1] in forbidden} == {("reward_source.py", "exec")}
    assert (
        "config_files.py",
        "yaml.load",
    ) in found  # by its own safe loader (tests/test_config.py)


# -- chat templates --------------------------------------------------------------------------------

ESCAPES = (
    "{{ cycler.__init__.__globals__.os.mkdir(FOLDER) }}",
    "{{ lipsum.__globals__['os'].mkdir(FOLDER) }}",
    "{{ namespace.__init__.__globals__['__builtins__']['__import__']('os').mkdir(FOLDER) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{% import 'os' as os %}{{ os.mkdir(FOLDER) }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10000000) %}a{% endfor %}",
)


@pytest.fixture
def chat(tmp_path):
    file = tmp_path / "chat.jsonl"
    prompt = [{"role": "user", "content": "{{ 7 * 7 }} is?"}]
    file.write_text(json.dumps({"prompt": prompt, "chosen": "49.", "rejected": "7."}) + "\n")
    return file


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(model, made, chat, template):
    edit(model / "tokenizer_config.json", chat_template=template.replace("FOLDER", repr(str(made))))
    said = dpo("data", "check", chat, "--tokenizer", model, "--template", "chat")
    assert said.code == 2
    assert "The tokenizer's chat template refuses a conversation" in said.err
    assert not made.exists()


def test_a_chat_template_sees_no_attributes_and_prompts_are_no_templates(model, chat):
    template = "<{{ messages[0].__class__ }}{{ messages[0]['content'] }}>"
    edit(model / "tokenizer_config.json", chat_template=template)
    said = dpo("data", "check", chat, "--tokenizer", model, "--template", "chat")
    assert said.code == 0
    shown = "".join(said.out.split()).replace("|", "")
    assert shown.count("<{{7*7}}is?>") == 2  # before either response


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [
            "experiment",
            "run",
            "model.fresh={}",
            "grid.data.template=['../../{prompt}']",
            "seeds=[0]",
        ],
        ["experiment", "losses", "names=[../../dpo]"],
        ["evaluate", "models={../../a: runs/a}"],
        ["evaluate", "models={/a: runs/a}"],
    ],
    ids=["a grid's value", "a loss", "a model", "a model from the root"],
)
def test_no_name_of_a_configuration_leads_out_of_the_folder(tmp_path, words):
    said = dpo(*words, f"out={tmp_path / 'a' / 'b' / 'out'}")
    assert said.code == 2
    assert not [*tmp_path.iterdir()]


# -- what models say -------------------------------------------------------------------------------

EVIL = "\x1b]0;title\x07<script>alert(1)</script>\r# Heading\n```\n</pre>| a | b |\n![x](http://x)"


def test_a_models_text_is_only_text_on_the_page_of_a_study(tmp_path):
    texts = {"prompt": EVIL, "chosen": EVIL, "rejected": "b", "generated": EVIL}
    answer = Generation(
        model="m",
        temperature=1.0,
        prompt_index=0,
        sample=0,
        num_tokens=3,
        truncated=False,
        **texts,
    )
    scored = score_generations([answer], lambda texts: np.eye(len(texts), 3, dtype=np.float32))
    found = Evaluation(tmp_path, win_rate_table(scored), [], [], scored)
    text = page(Study(tmp_path, [], found), side_by_side(scored))
    assert not set(text) & {"\x1b", "\x07", "\r"}
    lines = text.split("\n")
    assert sum("<script>" in line for line in lines) == 3
    for mark in ("<script>", "# Heading", "```", "| a | b |", "![x]"):
        assert all(line.startswith("    ") for line in lines if mark in line)


# -- secrets ---------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_in_a_file_or_in_what_was_printed():
    """What is printed is looked at after every command of every test (`dpo` of small_runs)."""
    looked_at = 0
    for folder in (sft_run(), dpo_run(), evaluation(), Path(os.environ["DPO_CACHE"])):
        for file in folder.rglob("*"):
            if file.is_file():
                assert CANARY.encode() not in file.read_bytes(), file
                looked_at += 1
    assert looked_at > 60
