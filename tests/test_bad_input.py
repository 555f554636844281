"""What users get wrong, each with the one message that it must get: a table, run through the real
command line.

A message says what was expected, what came, where, and what to do. The exit code is 2 unless a
line of the table says otherwise, and a run that never began leaves nothing behind that would stand
in the way of the mended command.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.train.run import Run
from train.small_runs import dpo, dpo_config, dpo_run, evaluate_config, sft_run, words_of

GOOD = {"prompt": "What is two?", "chosen": "It is two.", "rejected": "Three."}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"
HERE = ["model=gpt2", "out=out"]
FULL = Path("/dev/full")


@dataclass(frozen=True)
class Mistake:
    """One line of the table."""

    name: str
    words: Callable[[], Sequence[object]]
    """Makes the files it needs in the working folder; the command's words."""
    says: tuple[str, ...]
    """The words that the message must hold."""
    code: int = 2


# -- one builder for each kind of mistake ----------------------------------------------------------


def command(name: str, *says: str, words: Sequence[object], code: int = 2) -> Mistake:
    """Wrong from the first word on: no file is needed."""
    return Mistake(name, lambda: words, says, code)


def row(name: str, line: str, *says: str) -> Mistake:
    """A bad second line after a good one; the message names file and line."""

    def words() -> Sequence[object]:
        Path("rows.jsonl").write_bytes(GOOD_LINE + line.encode() + b"\n")
        return ["data", "check", "rows.jsonl"]

    return Mistake(name, words, ("rows.jsonl:2: ", *says))


def file(name: str, file_name: str, content: bytes, *says: str) -> Mistake:
    """A data file that cannot be read; the message names it."""

    def words() -> Sequence[object]:
        Path(file_name).write_bytes(content)
        return ["data", "check", file_name]

    return Mistake(name, words, (f"{file_name}:", *says))


def yaml(name: str, content: bytes, *says: str) -> Mistake:
    """A configuration file; the message names it."""

    def words() -> Sequence[object]:
        Path("c.yaml").write_bytes(content)
        return ["train", "c.yaml"]

    return Mistake(name, words, ("c.yaml: ", *says))


def setting(name: str, word: str, *says: str) -> Mistake:
    """One word too many in an otherwise good `dpo train`."""
    return Mistake(name, lambda: ["train", *HERE, word], says)


def train(name: str, *says: str, code: int = 2, **changes: object) -> Mistake:
    """Settings that are well-formed but cannot be used with the model or the data."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return Mistake(name, lambda: ["train", *words_of(dpo_config(Path("out"), dotted))], says, code)


def model(name: str, damage: Callable[[Path], object], *says: str, code: int = 2) -> Mistake:
    """A good model folder, `m`, with something done to it."""

    def words() -> Sequence[object]:
        shutil.copytree(sft_run() / "model", "m")
        damage(Path("m"))
        return ["train", *words_of(dpo_config(Path("out"), {"model.path": "m"}))]

    return Mistake(name, words, says, code)


def data(name: str, values: object, *says: str, words: Sequence[object]) -> Mistake:
    """Forty rows that are sound but not what the command can use; `#` is the row's number."""

    def write_and_give() -> Sequence[object]:
        line = json.dumps(values)
        Path("rows.jsonl").write_text(
            "".join(line.replace("#", str(i)) + "\n" for i in range(40)), encoding="utf-8"
        )
        return [*words, f"model={sft_run()}", "data=rows.jsonl", "out=out"]

    return Mistake(name, write_and_give, says)


def folder(
    name: str, make: Callable[[], object], *says: str, code: int = 2, out: str = "out"
) -> Mistake:
    """A place for the run that cannot be one."""

    def words() -> Sequence[object]:
        make()
        return ["train", *words_of(dpo_config(Path(out)))]

    return Mistake(name, words, says, code)


def evaluation(name: str, *says: str, code: int = 2, **changes: object) -> Mistake:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return Mistake(
        name, lambda: ["evaluate", *words_of(evaluate_config(Path("out"), dotted))], says, code
    )


# -- what is done to files and folders -------------------------------------------------------------


def edited(file_name: str, **values: object) -> Callable[[Path], None]:
    """Set values of a JSON file of a folder."""

    def edit(place: Path) -> None:
        path = place / file_name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def overwritten(file_name: str, content: str) -> Callable[[Path], object]:
    return lambda place: (place / file_name).write_text(content)


def without(*file_names: str) -> Callable[[Path], object]:
    return lambda place: [(place / name).unlink() for name in file_names]


def reweighted(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        weights = load_file(place / "model.safetensors")
        change(weights)
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})

    return apply


def pickled(place: Path) -> None:
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def encoder_only(place: Path) -> None:
    """BERT, which transformers loads as a causal model without making it one."""
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=300, intermediate_size=16, **shape))
    bert.save_pretrained(place)


def encoder_decoder(place: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=300, **shape)).save_pretrained(place)


def file_in_the_way() -> None:
    Path("out").write_text("mine")


def foreign_folder() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("mine")


def damaged_run(file_name: str, content: str) -> Callable[[], None]:
    def make() -> None:
        shutil.copytree(dpo_run(), "out")
        (Path("out") / file_name).write_text(content)

    return make


def run_of_another_seed() -> None:
    shutil.copytree(dpo_run(), "out")
    edited("config.json", seed=7)(Path("out"))


def untrustworthy_checkpoints() -> None:
    """A run that was stopped, and every checkpoint of which lost a byte since."""
    shutil.copytree(dpo_run(), "out")
    edited("manifest.json", status="started")(Path("out"))
    for weights in Path("out/checkpoints").glob("*/*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])


def folder_of_notes() -> Sequence[object]:
    Path("d").mkdir()
    Path("d/notes.txt").touch()
    return ["data", "check", "d"]


def check(*words: object) -> Callable[[], Sequence[object]]:
    """`dpo data check` of a good file with other words."""

    def make() -> Sequence[object]:
        Path("rows.jsonl").write_bytes(GOOD_LINE)
        return ["data", "check", "rows.jsonl", *words]

    return make


def study(name: str, word: str, *says: str) -> Mistake:
    words = ["experiment", "run", "model.fresh={}", "out=out", word]
    return Mistake(name, lambda: words, says)


def online_with(source: str) -> Callable[[], Sequence[object]]:
    """`dpo online` with a user's function of that source."""

    def make() -> Sequence[object]:
        Path("r.py").write_text(source)
        return ["online", f"model={sft_run()}", "reward.function=r.py:f", "out=out"]

    return make


def writes_to_a_full_disk(file_name: str) -> None:
    """Whatever takes that file's place is written to a device that is always full."""
    Path(file_name).parent.mkdir(parents=True, exist_ok=True)
    Path(file_name).with_name(f".{Path(file_name).name}.{os.getpid()}.tmp").symlink_to(FULL)


def synthetic_on_a_full_disk() -> Sequence[object]:
    writes_to_a_full_disk("a.jsonl")
    return ["data", "synthetic", "a.jsonl"]


def evaluation_on_a_full_disk() -> Sequence[object]:
    writes_to_a_full_disk("out/win_rates.json")
    return ["evaluate", *words_of(evaluate_config(Path("out")))]


UTF16 = "\ufeff" + json.dumps(GOOD)
CHAT = {"prompt": [{"role": "user", "content": "Why #?"}], "chosen": "a", "rejected": "b"}

ROWS = [
    row("a field is missing", '{"prompt": "a", "chosen": "b"}', "'rejected' is missing", "found"),
    row("null", '{"prompt": "a", "chosen": null, "rejected": "c"}', "'chosen' is null"),
    row("a number", '{"prompt": "a", "chosen": 3, "rejected": "c"}', "is a number, expected text"),
    row("true", '{"prompt": "a", "chosen": true, "rejected": "c"}', "is true, expected text"),
    row("nested", '{"prompt": {"text": "a"}, "chosen": "b", "rejected": "c"}', "is an object"),
    row("blank", '{"prompt": " ", "chosen": "b", "rejected": "c"}', "'prompt' is empty"),
    row(
        "lists of texts",
        '{"prompt": "a", "chosen": ["b"], "rejected": ["c"]}',
        "'chosen[0]' needs role and content (found: text)",
    ),
    row("another shape", '{"prompt": "a", "response": "b"}', "(found: prompt, response)"),
    row(
        "a conversation among texts",
        json.dumps(CHAT),
        "'prompt' is a conversation, in the other rows text",
    ),
    row(
        "one score of two",
        '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 2}',
        "'rejected_score' is missing although the other response has a score",
    ),
    row(
        "a score that is no number",
        '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": NaN}',
        "'chosen_score' is nan, expected a finite number",
    ),
    row(
        "a key twice",
        '{"prompt": "a", "prompt": "b", "chosen": "b", "rejected": "c"}',
        "repeated key: prompt",
    ),
    row(
        "a list for a row", '["a", "b", "c"]', "expected an object with named fields, found a list"
    ),
    row("null for a row", "null", "expected an object with named fields, found null"),
    row("Python", "{'prompt': 'a'}", "not valid JSON", "double quotes (column 2)"),
    row("two rows in a line", '{"prompt": "a"}{"prompt": "b"}', "more text after the object"),
    row("half a character", '{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}', "surrogate"),
    row("null bytes", "\0" * 40, "not valid JSON: Expecting value (column 1)"),
]

FILES = [
    file("UTF-16", "a.jsonl", UTF16.encode("utf-16-le"), "is UTF-16 text; save it as UTF-8"),
    file("UTF-16 in gzip", "b.json.gz", gzip.compress(UTF16.encode("utf-16-be")), "is UTF-16"),
    file("Latin-1", "a.jsonl", GOOD_LINE + '{"prompt": "é"}\n'.encode("latin-1"), "byte 0xe9"),
    file("half of UTF-8", "a.jsonl", GOOD_LINE + "é".encode()[:1], "may have been cut off here"),
    file("half a last line", "a.jsonl", GOOD_LINE + GOOD_LINE[:30], "a.jsonl:2", "Unterminated"),
    file("empty", "a.jsonl", b"", "there are no rows; expected at least one"),
    file("a header alone", "a.csv", b"prompt,chosen,rejected\n", "a.csv: there are no rows"),
    file("another ending", "a.txt", b"x", "not a data file; expected one of .jsonl"),
    file("half a list", "a.json", b"[\n" + GOOD_LINE + b",", "a.json:3: not valid JSON"),
    file(
        "a bad element", "a.json", b"[\n" + GOOD_LINE + b",\n[1]]", "a.json:4: expected an object"
    ),
    file("no list", "a.json", b'{"prompt": "a"}', "expected a list of objects"),
    file("no gzip", "a.jsonl.gz", GOOD_LINE, "not a whole gzip file", "download it again"),
    file("half of gzip", "a.jsonl.gz", gzip.compress(GOOD_LINE * 9)[:-9], "ended before the end"),
    file("Parquet", "a.parquet", b"PAR1" + b"x" * 50 + b"PAR1", "not a readable Parquet file"),
    file(
        "semicolons",
        "a.csv",
        b"prompt;chosen;rejected\na;b;c\n",
        "no row has a shape",
        "A CSV file has commas between its columns",
    ),
    file(
        "a cell too few", "a.csv", b"prompt,chosen,rejected\na,b\n", "expected 3 cells", "found 2"
    ),
    file("an open quote", "a.csv", b'prompt,chosen,rejected\n"a,b,c\n', "not valid CSV"),
    file("a column twice", "a.csv", b"prompt,prompt\na,b\n", "repeated column: prompt"),
    command(
        "a file that is nowhere",
        "no.jsonl: there is no such file",
        words=["data", "check", "no.jsonl"],
    ),
    command("no name at all", "No data source is named", words=["data", "check", ""]),
    command(
        "a hub without a hub",
        "nobody/nothing: neither a file",
        words=["data", "check", "nobody/nothing"],
    ),
    Mistake("a folder of other things", folder_of_notes, ("d: no data file in this folder",)),
    Mistake("--column", check("--column", "prompt"), ("expected ours=yours",)),
    Mistake("another --column", check("--column", "prompt=q"), ("there is no column 'q'",)),
    Mistake(
        "--template alone", check("--template", "hh"), ("has no effect without a --tokenizer",)
    ),
    Mistake("--tokenizer", check("--tokenizer", "./no"), ("tokenizer: there is no folder ./no",)),
    Mistake("--test", check("--test", "./no.csv"), ("./no.csv: there is no such file",)),
    Mistake("--rows", check("--rows", "-1"), ("'--rows'", "greater than or equal to 0")),
]

SETTINGS = [
    command("no file", "There is no configuration file no.yaml", words=["train", "no.yaml"]),
    command("a model for a file", "settings are key=value, e.g. model=gpt2", words=["sft", "gpt2"]),
    command("a pair for a file", "e.g. data=prefs.jsonl", words=["train", "prefs.jsonl"]),
    yaml("a list", b"- a\n", "expected keys and values (`model: gpt2`), got ['a']"),
    yaml("no YAML", b"a: [1\n", "not valid YAML: line 2, column 1: expected ',' or ']'"),
    yaml("a tab", b"loss:\n\tbeta: 1\n", "line 2, column 1", "cannot start any token"),
    yaml("Latin-1 settings", b"out: \xe9\n", "cannot be read as a UTF-8 text file"),
    yaml("a tag", b"out: !!python/object/apply:os.mkdir [made]\n", "could not determine a constr"),
    yaml("twice", b"seed: 1\nseed: 2\n", "line 2, column 1: the key seed stands twice"),
    yaml("an alias", b"a: &a [1]\nb: *a\n", "line 2, column 4: the alias *a is not supported"),
    yaml("no value", b"seed: 0x_\n", "not valid YAML: a value cannot be read"),
    yaml("too deep", b"seed: " + b"[" * 3000, "nested too deeply"),
    yaml("two documents", b"a: 1\n---\nb: 2\n", "but found another document"),
    yaml("a number for a key", b"1: 2\n", "got {1: 2}"),
    yaml(
        "dots in a file", b"model: x\nout: y\nloss.beta: 1\n", "in a file, write loss: {beta: ...}"
    ),
    command("nothing asked for", "model: is required, e.g. model=gpt2", words=["train", "out=x"]),
    command(
        "four at once",
        "4 problems in the configuration:",
        "loss.beta: input should be greater than 0 (got -1)",
        "loss.label_smoothing: input should be less than 0.5 (got 0.5)",
        "optimizer.learning_rate: input should be greater than 0 (got -1)",
        "out: is required",
        words=[
            *("train", "model=x", "loss.beta=-1", "loss.label_smoothing=0.5"),
            "optimizer.learning_rate=-1",
        ],
    ),
    setting("a key like another", "lerning_rate=1", "did you mean optimizer.learning_rate?"),
    setting("no key", "=3", "'=3': expected key=value"),
    setting("half a key", "loss.=3", "'loss.=3': expected key=value"),
    setting("not a number", "loss.beta=nan", "loss.beta: input should be a finite number"),
    setting("infinity", "optimizer.max_grad_norm=.inf", "should be a finite number (got inf)"),
    setting("text for a number", "batch.size=many", "batch.size: input should be a valid integer"),
    setting("a number for text", "data.template=5", "expected text, in quotes where it would"),
    setting("a value for a section", "batch=3", "expected keys and values, e.g. batch.size="),
    setting("a text for a list", "loss.mix=dpo", "expected a list, e.g. loss.mix=[dpo]"),
    setting("a mixture of one", "loss.mix=[{name: dpo}]", "loss.mix: list should have at least 2"),
    setting("another loss's option", "loss.gamma=1", "has no effect with loss dpo", "take it"),
    setting("no such loss", "loss.name=ippo", "there is no such loss (got 'ippo')", "ipo"),
    setting("seed", f"seed={2**32}", "seed: input should be less than 4294967296"),
    setting(
        "a test set and a share", "data={test: a.csv, test_fraction: 0.1, path: b.csv}", "when"
    ),
    setting("empty out", "out=''", "out: expected the name of a folder (got '')"),
    setting("remote code by key", "trust_remote_code=true", "trust_remote_code: unknown key"),
    command(
        "steps and epochs",
        "give either epochs or max_steps, not both",
        words=["sft", *HERE, "epochs=1", "max_steps=2"],
    ),
    command("fresh DPO", "model.fresh is for dpo sft", words=["train", "model.fresh={}", "out=x"]),
    command("no command", "No such command 'trian'", words=["trian"]),
    command("no option", "No such option: --fast", words=["sft", "--fast"]),
    command("config of what", "dpoo: expected one of sft, train", words=["config", "dpoo"]),
    command("loss pages", "nope: there is no such loss", words=["losses", "nope"]),
    command("no such check", "no theory check is called 'X1'", words=["theory", "X1"]),
    command("a name", "expected a name that ends in .jsonl", words=["data", "synthetic", "a.txt"]),
    command(
        "no rows asked for",
        "Invalid value for '--rows'",
        words=["data", "synthetic", "a.jsonl", "--rows", 0],
    ),
]

DATA = [
    train("no room", "max_new_tokens: 128 leaves no room", evaluation__max_new_tokens=128),
    train("one prompt", "at least 2 different prompts", data__synthetic__num_rows=1),
    train("scores", "odpo takes scores; every row needs chosen_score", loss__name="odpo"),
    train("the template", "trained with the template plain, not hh", data__template="hh"),
    train("a bad template", "data.template: 'hhh' is neither one of", data__template="hhh"),
    train("a data file", "gone.jsonl: there is no such file", data={"path": "gone.jsonl"}),
    train("cut to nothing", "rows (", "allow it with data.max_dropped=", data__max_length=2),
    data(
        "the same twice",
        {**GOOD, "prompt": "#", "rejected": GOOD["chosen"]},
        "rows would be dropped: training rows: chosen and rejected are the same tokens. Mend them",
        words=["train"],
    ),
    data(
        "nothing preferred",
        {"prompt": "#", "response": "x"},
        "rows.jsonl:1: expected preference or ranked rows, got demonstration rows",
        words=["train"],
    ),
    data(
        "one label",
        {"prompt": "#", "completion": "x", "label": True},
        "all have one label",
        words=["train", "loss.name=kto"],
    ),
    data(
        "the worse demonstration",
        {"prompt": "#", "response": "x"},
        "a demonstration has no rejected response",
        words=["sft", "response=rejected"],
    ),
    data(
        "conversations for a model of texts",
        CHAT,
        "the prompts are conversations, which the template plain of the model cannot write",
        words=["train"],
    ),
]

MODELS = [
    train("no folder", "model: there is no folder ./no", model__path="./no"),
    train("a hub", "'nobody/no' is no local folder", "hub", model__path="nobody/no"),
    train("a folder without", "model: . holds no model (expected config.json", model__path="."),
    train("a file", "is a file; expected a model folder", model__path=__file__),
    train("nobody's home", "there is no folder ~nobody-at-all/x", model__path="~nobody-at-all/x"),
    train("a revision", "model.revision: only a hub model has one", model__revision="v1"),
    train(
        "no tokenizer there", "no tokenizer there (expected tokenizer.json", model__tokenizer="."
    ),
    model(
        "no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "copy the model's own"
    ),
    model(
        "half a tokenizer",
        overwritten("tokenizer.json", "{"),
        "its tokenizer cannot be loaded: Exp",
    ),
    model("no end", edited("tokenizer_config.json", eos_token=None), "no end-of-sequence token"),
    model(
        "a token more",
        edited("tokenizer_config.json", eos_token="<new>"),
        "m: the tokenizer gives ids up to 300 but the model has 300 embeddings",
    ),
    model("a prompt template", overwritten("prompt_template.json", "[]"), "it is damaged"),
    model("pickles", pickled, "its weights are pickled (pytorch_model.bin)", "convert them"),
    model(
        "no weights", without("model.safetensors"), "m: its model cannot be loaded", "no file named"
    ),
    model(
        "torn weights",
        overwritten("model.safetensors", "x" * 99),
        "m: its model cannot be loaded:",
        "header",
    ),
    model(
        "weights that lack one",
        reweighted(lambda w: w.pop("transformer.h.0.attn.c_attn.weight")),
        "it lacks 1 of the model's weights (transformer.h.0.attn.c_attn.weight)",
    ),
    model(
        "weights of another shape",
        reweighted(lambda w: w.update({"transformer.wpe.weight": torch.ones(3, 16)})),
        "transformer.wpe.weight is [3, 16], expected [128, 16]",
    ),
    model(
        "layers that are not there", edited("config.json", n_layer=2), "it lacks 12 of the model's"
    ),
    model("half a config", overwritten("config.json", "{"), "not a valid JSON file"),
    model(
        "an unheard-of kind", edited("config.json", model_type="homemade"), "model type `homemade`"
    ),
    model("an encoder", encoder_only, "BertLMHeadModel predicts a token from those after it"),
    model("an encoder and a decoder", encoder_decoder, "T5Config", "AutoModelForCausalLM"),
    model(
        "weights that are no numbers",
        reweighted(lambda w: w["transformer.wpe.weight"].fill_(float("nan"))),
        "the held-out loss is nan",
        code=3,
    ),
    train("too fast", "Try a smaller learning rate", code=3, optimizer__learning_rate=1e30),
]

FOLDERS = [
    folder(
        "a file for a folder", file_in_the_way, "out cannot be written: a file of that name", code=5
    ),
    folder(
        "a file on the way", file_in_the_way, "a part of the path is a file", out="out/x", code=5
    ),
    folder(
        "no place for files", lambda: None, "/sys/out cannot be written", out="/sys/out", code=5
    ),
    folder("a name too long", lambda: None, "the name is too long", out="x" * 300, code=5),
    folder("someone's folder", foreign_folder, "is not empty and holds no run (thesis.tex)"),
    folder("a run's config", damaged_run("config.json", "{"), "out/config.json: expected a JSON"),
    folder("a manifest", damaged_run("manifest.json", "{"), "out/manifest.json: expected a JSON"),
    folder(
        "a run's metrics", damaged_run("metrics.jsonl", "x"), "out/metrics.jsonl: expected a run's"
    ),
    folder("another run", run_of_another_seed, "a run with other settings", "seed: 7 there, 0 now"),
    folder("no whole checkpoint", untrustworthy_checkpoints, "checkpoint", code=4),
]

EVALUATIONS = [
    command("no models", "models: is required", words=["evaluate", "out=out"]),
    command(
        "models of no name",
        "models: expected keys and values, e.g. models.dpo=runs/dpo (got 'x')",
        words=["evaluate", "out=out", "models=x"],
    ),
    evaluation("no such run", "models.a: there is no folder ./no", models={"a": "./no"}),
    evaluation(
        "seen prompts", "models.sft:", "was trained on", "allow_overlap=true", data__split_seed=7
    ),
    evaluation("the judge", "no sentence model at './no'", sentence_model="./no"),
    evaluation("few prompts", "expected at least 2, since the null", data__synthetic__num_rows=2),
    study("a grid's key", "grid.loss.betta=[1]", "dpo, betta 1: loss.betta: unknown key"),
    study("a grid's value", "grid.loss.beta=[0.1, -1]", "dpo, beta -1: loss.beta: input should be"),
    study("a grid's list", "grid.loss.beta=1", "expected a list, e.g. grid.loss.beta=[1]"),
    study(
        "nothing to try", "grid.loss.beta=[]", "grid.loss.beta: list should have at least 1 item"
    ),
    study("a seed twice", "seeds=[0, 0]", "seeds: expected different ones, got [0, 0]"),
    study("what a study sets", "sft.model=x", "sft.model: the study sets this itself"),
    study("a step of a study", "sft.epoch=3", "sft: epoch: unknown key; did you mean epochs?"),
    study("a study's room", "evaluation.max_new_tokens=256", "model.fresh.positions is 256"),
    command("a reward", "reward: is required, e.g. reward=runs/reward", words=["online", *HERE]),
    Mistake("a function's file", online_with("def f(:"), ("r.py cannot be run: SyntaxError",)),
    Mistake(
        "no function", online_with("def g(p, r): ..."), ("r.py has no function f (it has: g)",)
    ),
]

DISKS = [
    Mistake(
        "a full disk", synthetic_on_a_full_disk, ("a.jsonl cannot be written: the disk is full",), 5
    ),
    Mistake(
        "a full disk later",
        evaluation_on_a_full_disk,
        ("out/win_rates.json cannot be written: the disk is full.",),
        5,
    ),
]

MISTAKES = [*ROWS, *FILES, *SETTINGS, *DATA, *MODELS, *FOLDERS, *EVALUATIONS, *DISKS]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_gets_its_message_and_code_and_no_traceback(mistake, tmp_path, monkeypatch):
    if mistake in DISKS and not FULL.exists():
        pytest.skip("no device here is always full")
    monkeypatch.chdir(tmp_path)
    words = mistake.words()
    began = Path("out/config.json").exists()
    said = dpo("--quiet", *words)
    for part in mistake.says:
        assert part in said.err
    assert said.code == mistake.code
    assert "Traceback" not in said.all
    if mistake.code == 2:
        assert Path("out/config.json").exists() is began, "the folder is taken"
    assert not [*tmp_path.rglob(".*.tmp"), *tmp_path.rglob("made")]


def test_the_table_is_long_and_no_line_of_it_repeats_another():
    assert len(MISTAKES) >= 60
    assert len({mistake.says for mistake in MISTAKES}) == len(MISTAKES)
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
    assert {mistake.code for mistake in MISTAKES} == {2, 3, 4, 5}


def test_the_mended_command_takes_the_folder_that_the_mistake_had(tmp_path):
    wrong = {"evaluation.max_new_tokens": 128, "max_steps": 1}
    assert dpo("train", *words_of(dpo_config(tmp_path / "out", wrong))).code == 2
    assert dpo("train", *words_of(dpo_config(tmp_path / "out", {"max_steps": 1}))).code == 0


def test_what_a_file_holds_cannot_drive_the_terminal_through_a_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text('"ev\\e[31mil\\u202e": 1\n')
    Path("rows.jsonl").write_text('{"q": "a", "ev\\u001b[31mil": 1}\n')
    for words in (["train", "c.yaml"], ["data", "check", "rows.jsonl"], ["losses", "a\x1b[2J"]):
        said = dpo(*words)
        assert said.code == 2
        assert "\\x1b[" in said.err
        assert not {"\x1b", "\u202e"} & set(said.raw)


def vanish(out: Path) -> None:
    shutil.rmtree(out)


def fill_the_disk(out: Path) -> None:
    (out / "metrics.jsonl").unlink(missing_ok=True)
    (out / "metrics.jsonl").symlink_to(FULL)


def lose_tensorboards_folder(out: Path) -> None:
    (out / "tensorboard").touch()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (vanish, "metrics.jsonl cannot be written: its folder does not exist."),
        (fill_the_disk, "metrics.jsonl cannot be written: the disk is full."),
        (lose_tensorboards_folder, "tensorboard: File exists."),
    ],
)
def test_a_disk_that_fails_while_training_is_one_sentence(tmp_path, monkeypatch, fault, says):
    if not FULL.exists():
        pytest.skip("no device here is always full")
    words = words_of(dpo_config(tmp_path / "out", {"max_steps": 1}))
    log = Run.log

    def fail_first(run: Run, row: dict) -> None:
        fault(run.folder)
        log(run, row)

    monkeypatch.setattr(Run, "log", fail_first)
    said = dpo("--quiet", "train", *words)
    assert said.code == 5
    assert said.err.endswith(says)
    assert "Traceback" not in said.all
    assert not [*tmp_path.rglob(".*.tmp")]
