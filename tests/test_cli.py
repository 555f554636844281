"""The command line as its users meet it: sentences, exit codes, help, and nothing else."""

import json
import re
import shutil

import pytest

from dpo.config import PreferenceConfig, RewardConfig, SFTConfig
from dpo.config_files import known_keys
from dpo.evaluation_config import EvaluateConfig
from dpo.models import load
from train.small_runs import CANARY, dpo, dpo_config, evaluate_config, sft_config, sft_run, words_of

COMMANDS = (
    ("sft",),
    ("train",),
    ("evaluate",),
    ("diagnose",),
    ("arena",),
    ("report",),
    ("compare",),
    ("demo",),
    ("init",),
    ("config",),
    ("losses",),
    ("theory",),
    ("data", "check"),
    ("data", "synthetic"),
    ("experiment", "run"),
)


def rows(folder, *lines):
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


GOOD = json.dumps({"prompt": "What is two?", "chosen": "It is two.", "rejected": "Three."})


def refused(*words, code=2):
    """A user's mistake: its sentence, without a traceback."""
    said = dpo(*words)
    assert said.code == code, said.all
    assert "Traceback" not in said.all
    assert said.err
    return said.err


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_every_command_works(words):
    said = dpo(*words, "--help")
    assert said.code == 0
    assert "Usage: dpo" in said.out


@pytest.mark.parametrize(
    "words", [("sft",), ("train",), ("evaluate",), ("experiment", "run")], ids=" ".join
)
def test_help_of_a_configured_command_gives_an_example_and_the_way_to_all_keys(words):
    said = dpo(*words, "--help")
    assert f"Examples dpo {' '.join(words)} " in said.out
    assert "dpo config COMMAND" in said.out


def test_no_words_at_all_are_answered_with_help():
    assert "Usage: dpo" in dpo().all


def test_version():
    from dpo import __version__

    assert dpo("--version").out == __version__


def test_an_unknown_command_or_option_is_a_mistake_of_the_user():
    assert "No such command" in refused("trian")
    assert "No such option" in refused("sft", "--fast")


@pytest.mark.parametrize(
    ("command", "schema"),
    [
        ("sft", SFTConfig),
        ("train", PreferenceConfig),
        ("reward", RewardConfig),
        ("evaluate", EvaluateConfig),
    ],
)
def test_config_lists_every_key(command, schema):
    said = dpo("config", command)
    assert said.code == 0
    words = set(said.out.split())
    assert set(known_keys(schema)) <= words
    assert f"dpo {command}" in said.out


def test_config_of_no_command_names_those_there_are():
    err = refused("config", "trian")
    assert err == (
        "trian: expected one of sft, train, reward, online, ppo, evaluate, plan, experiment; "
        "did you mean train?"
    )


# -- losses -------------------------------------------------------------------------------------


def test_losses_lists_every_loss_with_its_formula_and_the_notation():
    from dpo.core.family import LOSSES, NOTATION

    said = dpo("losses")
    assert said.code == 0
    for name in [*LOSSES, "mix"]:
        assert f"│ {name} │" in said.out
    assert "(Δ − 1/(2β))²" in said.out
    assert " ".join(NOTATION.split()) in said.out


@pytest.mark.parametrize("name", ["dpo", "plackett_luce", "kto", "beta_dpo", "nll"])
def test_losses_explains_one(name):
    from dpo.core.family import LOSSES

    said = dpo("losses", name)
    assert said.code == 0
    assert LOSSES[name].source in said.out
    assert "Reference model" in said.out
    assert ("loss.beta" in said.out) == (name != "nll")
    assert ">>>" not in said.out


def test_losses_explains_mixtures():
    said = dpo("losses", "mix")
    assert "loss.mix='[{name: dpo, weight: 0.8}" in said.out


def test_an_unknown_loss_is_one_sentence_with_the_nearest_names():
    assert refused("losses", "simp") == (
        "simp: there is no such loss (got 'simp'); did you mean simpo or ipo or sppo? "
        "`dpo losses` lists them."
    )


def test_losses_writes_the_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.report.loss_figures.svg", lambda name: f"<svg>{name}</svg>")
    assert dpo("losses", "--write", tmp_path / "a" / "b").code == 0
    made = {file.name for file in (tmp_path / "a" / "b").iterdir()}
    assert {"README.md", "dpo.md", "mix.md", "figures"} <= made
    assert (tmp_path / "a" / "b" / "figures" / "ipo.svg").read_text() == "<svg>ipo</svg>"


def test_an_option_that_the_loss_does_not_use_is_refused_before_anything_runs(tmp_path):
    err = refused("train", "model=x", "out=y", "loss.name=ipo", "loss.label_smoothing=0.1")
    assert err == (
        "loss.label_smoothing: has no effect with loss ipo, which takes beta; dpo, robust and exo "
        "take it"
    )


def test_config_says_where_the_options_of_other_losses_are():
    assert "`dpo losses NAME`" in dpo("config", "train").out


# -- debug --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_debug_shows_the_traceback_wherever_it_stands_and_keeps_the_exit_code(place):
    words = ["train", "model=./nowhere", "out=x"]
    words.insert(place, "--debug")
    said = dpo(*words)
    assert said.code == 2
    assert "Traceback" in said.err
    assert "InputError: model: there is no folder ./nowhere." in said.err
    assert CANARY not in said.all


def test_the_same_mistake_without_debug_is_one_line():
    assert refused("train", "model=./nowhere", "out=x").endswith(
        "model: there is no folder ./nowhere."
    )


# -- configuration ------------------------------------------------------------------------------


def test_all_problems_of_a_configuration_are_told_at_once():
    err = refused("train", "model=x", "loss.beta=0", "loss.label_smoothing=0.5", "lerning_rate=1")
    assert err.startswith("4 problems in the configuration:")
    for part in (
        "loss.beta: input should be greater than 0 (got 0)",
        "loss.label_smoothing: input should be less than 0.5 (got 0.5)",
        "lerning_rate: unknown key; did you mean optimizer.learning_rate?",
        "out: is required",
    ):
        assert part in err


def test_a_file_and_words_make_one_configuration(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: ./nowhere\nloss: {beta: 0.2}\n")
    assert "there is no folder ./elsewhere" in refused(
        "train", file, "model=./elsewhere", f"out={tmp_path / 'out'}"
    )
    assert refused("train", file, "loss.beta=-1", "out=x").startswith(f"{file}: loss.beta")
    assert not (tmp_path / "out").exists()


def test_a_missing_configuration_file_is_named():
    assert refused("train", "none.yaml", "out=x") == "There is no configuration file none.yaml."


# -- data ---------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """From here on, any attempt to read a model or a tokenizer fails the test."""
    sft_run()

    def forbidden(*arguments, **options):
        pytest.fail("weights were read")

    from dpo.train import session

    for module, name in (
        (session, "open_model"),
        (session, "load_tokenizer"),
        (session, "fresh_gpt2"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    for loader in (load.AutoModelForCausalLM, load.AutoTokenizer, load.AutoConfig):
        monkeypatch.setattr(loader, "from_pretrained", forbidden)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"prompt": "a", "chosen": "b"}', "'rejected' is missing"),
        ('{"prompt": "a", "chosen": "b", "rejected": null}', "'rejected'"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "'rejected'"),
        ('{"prompt": "a", "chosen": "b", "rej', "JSON"),
        ("not json", "JSON"),
    ],
)
@pytest.mark.parametrize("command", ["sft", "train", "evaluate", "data check"])
def test_a_bad_row_is_named_by_file_and_line_before_any_model_is_read(
    tmp_path, no_weights, bad, says, command
):
    file = rows(tmp_path, GOOD, "", bad)
    words = {
        "sft": ["model.fresh={}", f"data={file}", f"out={tmp_path / 'out'}"],
        "train": [f"model={sft_run()}", f"data={file}", f"out={tmp_path / 'out'}"],
        "evaluate": [f"models.a={sft_run()}", f"data={file}", f"out={tmp_path / 'out'}"],
        "data check": [file],
    }
    err = refused(*command.split(), *words[command])
    assert "rows.jsonl:3" in err
    assert says in err
    assert not (tmp_path / "out").exists()


def test_many_bad_rows_are_told_at_once_up_to_twenty(tmp_path, no_weights):
    file = rows(tmp_path, *[GOOD, '{"prompt": "a"}'] * 30)
    err = refused("train", f"model={sft_run()}", f"data={file}", f"out={tmp_path / 'out'}")
    assert "30 of 60 rows cannot be used" in err
    assert len(re.findall(r"rows\.jsonl:\d+", err)) >= 20
    assert "and 10 more" in err


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_rows_are_a_mistake_of_the_user(tmp_path, no_weights, content):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    assert "no rows" in refused("sft", "model.fresh={}", f"data={file}", f"out={tmp_path / 'out'}")


def test_data_that_is_nowhere_is_named(tmp_path, no_weights):
    err = refused("train", f"model={sft_run()}", "data=./none.jsonl", f"out={tmp_path / 'out'}")
    assert "./none.jsonl: there is no such file" in err


def test_overlapping_held_out_data_is_refused(tmp_path, no_weights):
    file = rows(tmp_path, GOOD)
    err = refused(
        *("train", f"model={sft_run()}", f"data={file}", f"data.test={file}"),
        f"out={tmp_path / 'out'}",
    )
    assert "1 of its prompts are in the training data too" in err


def with_identical(folder, share):
    """A hundred pairs, that share of them of two equal responses."""
    made = []
    for i in range(100):
        rejected = "Yes." if i < share else "No."
        made.append({"prompt": f"Is it {i}?", "chosen": "Yes.", "rejected": rejected})
    return rows(folder, *map(json.dumps, made))


def training_on(file, folder, *words):
    quick = {"data": {"path": str(file), "test_fraction": 0.1}, "max_steps": 1}
    config = dpo_config(folder / "out", quick | {"evaluation.num_samples": 0})
    return ["train", *words_of(config), *words]


def test_too_many_identical_pairs_stop_the_run(tmp_path):
    err = refused(*training_on(with_identical(tmp_path, 30), tmp_path))
    assert "would be dropped: training rows: chosen and rejected are the same tokens" in err
    assert "data.max_dropped=" in err


def test_few_identical_pairs_are_dropped_counted_and_said(tmp_path):
    words = training_on(with_identical(tmp_path, 30), tmp_path, "data.max_dropped=0.5")
    said = dpo(*words)
    assert said.code == 0
    assert re.search(r"\d+ of \d+ rows are dropped: training rows", said.err)


def test_responses_that_begin_with_their_prompt_are_said(tmp_path):
    made = [
        {"prompt": f"Is it {i}?", "chosen": f"Is it {i}? Yes.", "rejected": f"Is it {i}? No."}
        for i in range(20)
    ]
    said = dpo(*training_on(rows(tmp_path, *map(json.dumps, made)), tmp_path))
    assert said.code == 0, said.err
    assert re.search(r"(\d+) of \1 responses begin with their prompt, so the model reads", said.err)


def test_a_reference_that_will_not_move_is_said(tmp_path):
    changes = {"max_steps": 1, "moving_reference": {"every": 3}, "evaluation.num_samples": 0}
    said = dpo("train", *words_of(dpo_config(tmp_path / "out", changes)))
    assert said.code == 0, said.err
    assert "moving_reference.every: 3 steps are more than the run's 1" in said.err


def test_truncation_is_counted_and_said(tmp_path):
    quick = {"max_steps": 1, "data.max_length": 16, "evaluation.num_samples": 0}
    said = dpo("sft", *words_of(sft_config(tmp_path / "out", quick)))
    assert said.code == 0
    assert re.search(r"training rows: \d+ of \d+ prompts lost their beginning", said.err)
    assert re.search(r"held-out rows: \d+ of 16 prompts .* \d+ responses their end", said.err)


def test_data_check_counts_and_marks_what_is_scored(tmp_path):
    file = tmp_path / "prefs.jsonl"
    made = dpo("data", "synthetic", file, "--rows", 40, "--seed", 3)
    assert (made.code, made.out) == (0, f"40 rows in {file}")
    said = dpo("data", "check", file, "--tokenizer", sft_run(), "--rows", 2)
    assert said.code == 0
    assert "40 preference rows; shape prompt/chosen/rejected" in said.out
    assert "40 rows (40 preference)" in said.out
    assert "Template: plain" in said.out
    assert said.out.count("<|endoftext|>") == 4  # one end after each of two pairs' responses


def test_data_check_without_a_tokenizer_says_how_to_see_tokens(tmp_path):
    said = dpo("data", "check", rows(tmp_path, GOOD))
    assert said.code == 0
    assert "Name a --tokenizer" in said.out


def test_columns_of_other_names_can_be_told(tmp_path):
    file = rows(tmp_path, json.dumps({"q": "What?", "chosen": "a", "rejected": "b"}))
    assert dpo("data", "check", file, "--column", "prompt=q").code == 0
    assert "expected ours=yours" in refused("data", "check", file, "--column", "prompt")


def test_an_evaluation_never_takes_the_place_of_a_runs_page(tmp_path):
    shutil.copytree(sft_run(), tmp_path / "run")
    err = refused("evaluate", *words_of(evaluate_config(tmp_path / "run")))
    assert err.endswith(
        f"out: {tmp_path / 'run'} is a run, whose page would be lost; name another folder."
    )


def test_synthetic_data_is_a_function_of_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        dpo("data", "synthetic", tmp_path / f"{name}.jsonl", "--rows", 20, "--seed", seed)
    texts = [(tmp_path / f"{name}.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_synthetic_data_never_takes_the_place_of_a_file(tmp_path):
    file = rows(tmp_path, GOOD)
    err = refused("data", "synthetic", file, "--rows", 4)
    assert err == f"{file} exists; name another file, or remove it first."
    assert file.read_text() == GOOD + "\n"


def test_synthetic_data_to_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    err = refused("data", "synthetic", tmp_path / "none" / "a.jsonl", code=5)
    assert err.endswith("cannot be written: its folder does not exist.")


# -- models -------------------------------------------------------------------------------------


def broken(folder, *, without=(), pickled=False):
    """A copy of a good model folder with something missing."""
    shutil.copytree(sft_run() / "model", folder)
    for name in without:
        (folder / name).unlink()
    if pickled:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


@pytest.mark.parametrize(
    ("without", "pickled", "says"),
    [
        (["model.safetensors"], False, "its model cannot be loaded"),
        (["model.safetensors"], True, "its weights are pickled (pytorch_model.bin)"),
        (["tokenizer.json", "tokenizer_config.json"], False, "no tokenizer there"),
        (["config.json"], False, "holds no model"),
    ],
)
def test_a_model_folder_that_lacks_something_is_one_sentence(tmp_path, without, pickled, says):
    model = broken(tmp_path / "model", without=without, pickled=pickled)
    words = words_of(dpo_config(tmp_path / "out", {"model.path": str(model)}))
    assert says in refused("train", *words)
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_one_sentence(tmp_path):
    model = broken(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    words = words_of(dpo_config(tmp_path / "out", {"model.path": str(model)}))
    assert "its model cannot be loaded" in refused("train", *words)


def test_a_hub_model_without_a_hub_is_one_sentence(tmp_path):
    err = refused("train", "model=nobody/nothing", f"out={tmp_path / 'out'}")
    assert "'nobody/nothing' is no local folder" in err


def test_a_reference_with_another_tokenizer_is_refused(tmp_path):
    other = broken(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    swapped = vocabulary["model"]["vocab"]
    swapped["A"], swapped["B"] = swapped["B"], swapped["A"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    words = words_of(dpo_config(tmp_path / "out", {"reference": str(other)}))
    assert "has another tokenizer than" in refused("train", *words)


def test_a_fresh_model_of_an_impossible_shape_is_refused(tmp_path):
    start = ["data.synthetic.num_rows=40", f"out={tmp_path / 'out'}"]
    wide = refused("sft", "model.fresh={width: 10, heads: 3}", *start)
    assert "model.fresh.width: 10 is not a multiple of heads (3)" in wide
    small = refused("sft", "model.fresh={vocab_size: 100}", *start)
    assert "model.fresh.vocab_size: expected at least 257" in small


def test_more_new_tokens_than_the_model_has_positions_is_refused(tmp_path):
    changes = {"evaluation.max_new_tokens": 128}
    err = refused("train", *words_of(dpo_config(tmp_path / "out", changes)))
    assert "max_new_tokens: 128 leaves no room for a prompt" in err


# -- folders ------------------------------------------------------------------------------------


def test_an_output_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("")
    err = refused("sft", *words_of(sft_config(tmp_path)))
    assert "is not empty and holds no run (precious.txt)" in err
    assert [f.name for f in tmp_path.iterdir() if f.name != ".lock"] == ["precious.txt"]


def test_an_output_that_cannot_be_a_folder_has_exit_code_five(tmp_path):
    (tmp_path / "file").write_text("")
    err = refused("sft", *words_of(sft_config(tmp_path / "file" / "run")), code=5)
    assert "a part of the path is a file" in err


def test_a_models_name_cannot_leave_the_output_folder(tmp_path):
    words = words_of(evaluate_config(tmp_path / "out", {"models": {"a": str(sft_run())}}))
    words = [word for word in words if not word.startswith("models")]
    err = refused("evaluate", *words, f"models={json.dumps({'../../x': str(sft_run())})}")
    assert "names files" in err


def test_quiet_keeps_warnings_and_drops_the_rest(tmp_path):
    quick = {"max_steps": 1, "data.max_length": 16, "evaluation.num_samples": 0}
    said = dpo("--quiet", "sft", *words_of(sft_config(tmp_path / "out", quick)))
    assert said.code == 0
    assert "lost their beginning" in said.err
    assert "split by prompt" not in said.err


def test_theory_checks_run_by_name_and_an_unknown_one_is_refused():
    assert "nonsense" in refused("theory", "nonsense")
