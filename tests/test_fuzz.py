"""Whatever bytes a data file or a configuration holds, there are two outcomes: it is read, or one
message says what is wrong with it (exit code 2).

The examples are the same on every run. `DPO_FUZZ=50` tries fifty times as many, other ones each
time.
"""

import csv
import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo.config import DataConfig, PreferenceConfig, RewardConfig, SFTConfig
from dpo.config_files import known_keys, read_config, validate
from dpo.data.sources import load_rows
from dpo.errors import InputError
from dpo.evaluation_config import EvaluateConfig
from dpo.experiment.exact_config import ExactStudyConfig
from dpo.experiment.frontier_config import FrontierConfig
from dpo.experiment.losses import LossStudyConfig
from dpo.experiment.study import StudyConfig
from dpo.online_config import OnlineConfig, PPOConfig
from dpo.train.prepare import load_preferences
from train.small_runs import dpo

MORE = int(os.environ.get("DPO_FUZZ", "0"))


def examples(number: int) -> settings:
    return settings(
        max_examples=number * max(1, MORE),
        derandomize=MORE == 0,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextmanager
def written(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        yield file


def check_message(error: InputError, *, names: str = "") -> None:
    """What the user reads: not empty, not endless, and it names the file."""
    assert error.exit_code == 2
    assert names in str(error)
    lines = str(error).split("\n")
    assert 1 <= len(lines) <= 100
    assert all(line.strip() for line in lines)
    assert max(map(len, lines)) < 5000


# -- data files ------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SHAPES = (
    {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "chosen_score": 2, "rejected_score": 1},
    {"prompt": [USER], "chosen": "So.", "rejected": [ANSWER]},
    {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"},
    {"prompt": "Why?", "responses": ["a", "b", "c"], "scores": [3, 1, 2]},
    {"prompt": "Why?", "completion": "So.", "label": True},
    {"messages": [USER, ANSWER]},
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_list(rows: list[dict]) -> bytes:
    return json.dumps({"about": 1, "rows": rows}, indent=1).encode()


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


FORMATS = {".jsonl": as_lines, ".json": as_list, ".csv": as_csv}


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good file of some shape and format in which fields, lines, bytes and bits went wrong."""
    rows = [dict(draw(st.sampled_from(SHAPES)))] * draw(st.integers(1, 4))
    for _ in range(draw(st.integers(0, 2))):  # a field of another type, or gone, or another's
        row = draw(st.integers(0, len(rows) - 1))
        key = draw(st.sampled_from([*rows[row], "prompt", "label"]))
        rows[row] = rows[row] | {key: draw(JSON)}
        if draw(st.booleans()):
            del rows[row][key]
    suffix = draw(st.sampled_from(list(FORMATS)))
    content = bytearray(FORMATS[suffix](rows))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        lines = content.split(b"\n")
        line = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["flip", "cut", "insert", "drop", "repeat"])):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(max_size=4))
            case "drop":
                content = bytearray(b"\n".join(lines[:line] + lines[line + 1 :]))
            case "repeat":
                content = bytearray(
                    b"\n".join(lines[:line] + lines[line : line + 1] + lines[line:])
                )
    packed = draw(st.booleans())
    return (f"a{suffix}.gz", gzip.compress(content)) if packed else (f"a{suffix}", bytes(content))


RANDOM_FILES = st.tuples(
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"]),
    st.binary(max_size=300)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")),
)


@examples(700)
@given(damaged_files() | RANDOM_FILES)
def test_a_data_file_is_read_or_refused_by_name(file):
    with written(*file) as path:
        try:
            loaded = load_rows(path)
        except InputError as error:
            check_message(error, names=path.name)
        else:
            assert len(loaded.rows) >= 1
            assert all(row.source.startswith(str(path)) for row in loaded.rows)


@examples(150)
@given(damaged_files())
def test_training_gets_pairs_or_the_reason_why_not(file):
    with written(*file) as path:
        try:
            data = load_preferences(DataConfig(path=str(path)))
        except InputError as error:
            check_message(error)
        else:
            assert len(data.train) >= 1
            assert len(data.test) >= 1


@examples(60)
@given(damaged_files() | RANDOM_FILES)
def test_data_check_of_anything_ends_with_counts_or_one_message(file):
    with written(*file) as path:
        said = dpo("data", "check", path)
    assert said.code in (0, 2)
    assert bool(said.err) is (said.code == 2)
    assert "Traceback" not in said.all
    assert "\x1b" not in said.raw


# -- configurations --------------------------------------------------------------------------------

SCHEMAS = (
    SFTConfig,
    PreferenceConfig,
    RewardConfig,
    OnlineConfig,
    PPOConfig,
    EvaluateConfig,
    StudyConfig,
    LossStudyConfig,
    ExactStudyConfig,
    FrontierConfig,
)
ODD = (
    *("", "0", "-1", "1", "0.5", "1e-6", "1e999", ".nan", ".inf", "0x_", "0b", "1_000", "9" * 5000),
    *("null", "~", "yes", "on", "true", "2026-01-01", "2026-13-45", "1:60:60", "=", "<<", "%", "@"),
    *("[]", "{}", "[[]]", "{a: b}", "{1: 2}", "{a: 1, a: 2}", "[null]", "[" * 300, "{<<: {a: 1}}"),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*a",
        "!!python/name:os.system",
        "!!bool x",
        "!!binary x",
        "!!set {a}",
    ),
    *(
        "!!timestamp x",
        "!!omap [a: 1]",
        "synthetic",
        "dpo",
        "{name: mix}",
        "[{name: dpo}]",
        "{fresh: {}}",
    ),
    *("a\0b", "\x1b[31m", "\u202e", "'", '"', "../..", "{prompt}", "x" * 5000),
)
VALUES = st.sampled_from(ODD) | JSON.map(json.dumps) | st.text(max_size=12)


def words_for(schema: type) -> st.SearchStrategy[list[str]]:
    """key=value words, most of them with keys that there are."""
    keys = st.sampled_from(known_keys(schema)) | st.text(max_size=8)
    word = st.builds(lambda key, value: f"{key}={value}", keys, VALUES)
    enough = ["model=gpt2", "models.a=runs/a", "reward=synthetic", "out=runs/b"]
    return st.tuples(
        st.lists(st.sampled_from(enough), unique=True), st.lists(word, max_size=4)
    ).map(lambda parts: [*parts[0], *parts[1]])


PIECES = st.sampled_from(
    [
        *(
            "model",
            "loss",
            "beta",
            "grid",
            "out",
            "data",
            ": ",
            ":\n  ",
            "\n",
            "- ",
            "[",
            "]",
            "{",
            "}",
        ),
        *(
            ", ",
            "&x ",
            "*x",
            "!!",
            "!!python/object/apply:os.mkdir ",
            "'",
            '"',
            "#",
            "|\n",
            "? ",
            "<<: ",
        ),
        *("1", "0.5", ".nan", "null", "\t", "\x00", "---\n", "...\n", "%YAML 9.9\n", "\ufeff", "é"),
    ]
)
TEXTS = (
    st.lists(PIECES, max_size=30).map(lambda pieces: "".join(pieces).encode())
    | st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.sampled_from(ODD).map(lambda value: f"model: gpt2\nout: x\nloss: {value}\n".encode())
)


def check_reading(schema: type, file: Path | None, words: list[str]) -> None:
    try:
        config = read_config(schema, file, words)
    except InputError as error:
        check_message(error)
    else:  # what was accepted can be written down, and read again as the same
        given = json.loads(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
        again = validate(schema, given)
        assert json.dumps(again.model_dump(mode="json")) == json.dumps(
            config.model_dump(mode="json")
        )


@examples(700)
@given(st.data())
def test_words_are_settings_or_refused(data):
    schema = data.draw(st.sampled_from(SCHEMAS))
    check_reading(schema, None, data.draw(words_for(schema)))


@examples(500)
@given(st.sampled_from(SCHEMAS), TEXTS)
def test_a_configuration_file_is_read_or_refused(schema, content):
    with written("c.yaml", content) as file:
        check_reading(schema, file, ["model=gpt2", "out=x"])


@examples(20)
@given(TEXTS)
def test_a_command_refuses_a_bad_file_with_one_message(content):
    with written("c.yaml", content) as file:
        said = dpo("train", file, "model=./there-is-no-such-model", "out=x")
    assert said.code == 2
    assert said.err
    assert "Traceback" not in said.all
