"""Pairs in a store: the very rows and tokens that are made in memory, written once and whole."""

import gzip
import json
import os
import resource
import signal
from dataclasses import asdict, fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.data import store, stored_pairs, stored_rows, synthetic
from dpo.data.pairs import Losses, encode_each
from dpo.data.prompts import resolve_template
from dpo.data.sources import StreamedRows, as_pairs, load_rows, write_jsonl
from dpo.data.split import split_by_prompt
from dpo.data.stored_pairs import Joined
from dpo.data.stored_rows import stored_preferences
from dpo.data.tokenize import Encoder
from dpo.errors import InputError, StorageError
from train.small_runs import fork, forked

SPLIT = {"test_fraction": 0.25, "seed": 3}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """A store of a few rows has several batches, the last one short."""
    monkeypatch.setattr(store, "BATCH", 7)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    """100 pairs: some prompts repeat, three are rated, two are of a subset."""
    path = tmp_path / "prefs.jsonl"
    write_jsonl(synthetic.preferences(num_rows=100, seed=0), path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[5:8]:
        line |= {"chosen_score": 0.1, "rejected_score": -3}
    for line in lines[6:8]:
        line["subset"] = "maths"
    lines[9]["rejected"] = lines[9]["chosen"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def everything(rows):
    """All fields of rows, those too that equality passes over."""
    return [{field.name: getattr(row, field.name) for field in fields(row)} for row in rows]


def in_memory(path, **options):
    return split_by_prompt(
        as_pairs(load_rows(path, **options).rows),
        test_fraction=SPLIT["test_fraction"],
        seed=SPLIT["seed"],
    )


def files_of(cache):
    """What a cache holds, but for locks."""
    return sorted(f.name for f in cache.rglob("*") if f.is_file() and f.suffix != ".lock")


# -- rows ----------------------------------------------------------------------------------------


def test_stored_rows_are_those_of_memory_split_alike(cache, file):
    split, stored = in_memory(file), stored_preferences(cache, file, **SPLIT)
    assert everything(stored.train) == everything(split.train)
    assert everything(stored.test) == everything(split.test)
    assert stored.facts["sha256"] == load_rows(file).sha256
    assert stored.facts["sources"] == [str(load_rows(file))]


CONVERSATION = [{"role": "system", "content": "Be ☺."}, {"role": "user", "content": "\u2028\0?"}]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": CONVERSATION, "chosen": str(i), "rejected": ""} for i in range(2)]
        + [{"prompt": [{"role": "user", "content": "b"}], "chosen": "1", "rejected": "2"}],
        [{"prompt": f"{i}", "responses": ["a", "b", "c"], "scores": [3, 3, 1]} for i in range(9)],
        [{"prompt": f"{i}", "responses": ["a", "b", "c"]} for i in range(2)],
        [{side: f"\n\nHuman: {i}\n\nAssistant: {side}" for side in ("chosen", "rejected")}
         for i in range(5)],
        [{"instruction": f"{i}", "input": "x", "chosen": "c", "rejected": "d"} for i in range(9)],
    ],
    ids=["conversations", "scored rankings", "rankings", "dialogues", "instructions"],
)  # fmt: skip
def test_every_shape_that_has_pairs_can_be_stored(cache, tmp_path, rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    split, stored = in_memory(path), stored_preferences(cache, path, **SPLIT)
    assert everything(stored.train) == everything(split.train)
    assert everything(stored.test) == everything(split.test)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("seed", range(3))
def test_a_few_prompts_are_split_as_in_memory_at_any_fraction(cache, file, fraction, seed):
    rows = as_pairs(load_rows(file).rows)
    split = split_by_prompt(rows, test_fraction=fraction, seed=seed)
    stored = stored_preferences(cache, file, test_fraction=fraction, seed=seed)
    assert list(stored.train) == list(split.train)
    assert list(stored.test) == list(split.test)


def test_rows_are_found_by_place_from_both_ends_and_in_slices(cache, file):
    train, rows = stored_preferences(cache, file, **SPLIT).train, in_memory(file).train
    assert len(train) == len(rows) > 3 * store.BATCH
    assert train[0] == rows[0]
    assert train[-1] == rows[-1]
    assert list(train[3:30:4]) == list(rows[3:30:4])
    for beyond in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            train[beyond]


def test_held_out_rows_of_their_own_stay_apart(cache, file, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text('{"prompt": "new", "chosen": "a", "rejected": ""}\n')
    stored = stored_preferences(cache, file, test, **SPLIT)
    assert everything(stored.train) == everything(load_rows(file).rows)
    assert everything(stored.test) == everything(load_rows(test).rows)
    first = load_rows(file).rows[0].prompt
    for prompt in ("other", f"  {first.upper()} "):
        with test.open("a") as stream:
            stream.write(json.dumps({"prompt": prompt, "chosen": "a", "rejected": ""}) + "\n")
    with pytest.raises(InputError, match=r"data\.test: 1 of its prompts are in the training data"):
        stored_preferences(cache, file, test, **SPLIT)


# -- tokens --------------------------------------------------------------------------------------


def encoder_of(tokenizer, **changes):
    options = {"template": resolve_template("question"), "max_length": 24} | changes
    return Encoder(tokenizer, **options)


def test_stored_tokens_are_those_of_memory_with_every_cut_and_drop_counted(cache, file, tokenizer):
    encoder, losses = encoder_of(tokenizer), Losses()
    rows = in_memory(file).train
    pairs = list(encode_each(encoder, rows, losses))
    assert losses.num_rows == len(rows) == len(pairs) + losses.num_dropped
    assert min(asdict(losses).values()) > 0  # the example has all of them
    train = stored_preferences(cache, file, **SPLIT).train
    for was_there in (False, True):
        stored, counted, found = stored_pairs.stored_pairs(encoder, train, tokenizer_sha256="t")
        assert found is was_there
        assert everything(stored) == everything(pairs)
        assert counted == losses
    assert stored[11].chosen.ids == pairs[11].chosen.ids
    assert all(type(token) is int for token in stored[11].chosen.ids)
    sequences = [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]
    assert list(stored.sequences) == sequences
    joined = Joined(stored.sequences, sequences[:2])
    assert list(joined) == sequences + sequences[:2]
    assert joined[-1] == sequences[1]


def test_tokens_are_made_anew_for_whatever_changes_them(cache, file, tokenizer, monkeypatch):
    train = stored_preferences(cache, file, **SPLIT).train
    other_rows = stored_preferences(cache, file, test_fraction=0.5, seed=0).train
    encoder = encoder_of(tokenizer)
    asked = [
        (encoder, train, "t"),
        (encoder, other_rows, "t"),
        (encoder, train, "another tokenizer"),
        (encoder_of(tokenizer, max_length=23), train, "t"),
        (encoder_of(tokenizer, template=resolve_template("plain")), train, "t"),
    ]
    for encoder, rows, digest in asked:
        assert not stored_pairs.stored_pairs(encoder, rows, tokenizer_sha256=digest)[2]
    for encoder, rows, digest in asked:
        assert stored_pairs.stored_pairs(encoder, rows, tokenizer_sha256=digest)[2]


# -- written once, and whole ---------------------------------------------------------------------


def test_a_second_time_the_store_is_found_and_nothing_is_written(cache, file, monkeypatch):
    assert not stored_preferences(cache, file, **SPLIT).found
    monkeypatch.setattr(stored_rows, "writing", None)
    again = stored_preferences(cache, file, **SPLIT)
    assert again.found
    assert list(again.train) == list(in_memory(file).train)


def test_another_file_split_or_column_is_another_store(cache, file, tmp_path):
    stored_preferences(cache, file, **SPLIT)
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_bytes(file.read_bytes())  # rows say where they were read
    assert not stored_preferences(cache, renamed, **SPLIT).found
    assert not stored_preferences(cache, file, test_fraction=0.25, seed=4).found
    assert not stored_preferences(cache, file, test_fraction=0.26, seed=3).found
    assert not stored_preferences(cache, file, columns={"prompt": "prompt"}, **SPLIT).found
    with file.open("a") as stream:
        stream.write('{"prompt": "one more", "chosen": "a", "rejected": "b"}\n')
    assert not stored_preferences(cache, file, **SPLIT).found


def kill_in_the_middle(monkeypatch_target, name):
    """SIGKILL this process while the 30th row is being written."""
    columns, seen = getattr(monkeypatch_target, name), []

    def deadly(row):
        seen.append(row)
        if len(seen) == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return columns(row)

    setattr(monkeypatch_target, name, deadly)


def test_killed_while_it_is_made_a_store_is_not_there_and_is_made_by_the_next(
    cache, file, tokenizer
):
    def rows_killed():
        kill_in_the_middle(stored_rows, "_columns")
        stored_preferences(cache, file, **SPLIT)

    assert forked(rows_killed) == -signal.SIGKILL
    assert "facts.json" not in files_of(cache)
    assert "train.arrow" in files_of(cache)  # under a name that nobody takes for a store
    stored = stored_preferences(cache, file, **SPLIT)
    assert not stored.found
    assert everything(stored.train) == everything(in_memory(file).train)

    def tokens():
        return stored_pairs.stored_pairs(encoder_of(tokenizer), stored.train, tokenizer_sha256="t")

    def tokens_killed():
        kill_in_the_middle(stored_pairs, "_columns")
        tokens()

    assert forked(tokens_killed) == -signal.SIGKILL
    pairs, _, found = tokens()
    assert not found
    assert list(pairs) == list(encode_each(encoder_of(tokenizer), stored.train, Losses()))
    assert files_of(cache) == [
        "facts.json",
        "facts.json",
        "pairs.arrow",
        "test.arrow",
        "train.arrow",
    ]


def test_of_several_at_once_one_makes_the_store_and_the_others_find_it(cache, file, tmp_path):
    def make(number):
        found = stored_preferences(cache, file, **SPLIT).found
        (tmp_path / f"found-{number}").write_text(str(found))

    children = [fork(lambda i=i: make(i)) for i in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert sorted((tmp_path / f"found-{i}").read_text() for i in range(3)) == [
        *("False", "True", "True")
    ]


@pytest.mark.parametrize("torn", ["train.arrow", "facts.json"])
def test_a_store_that_is_not_whole_is_made_again(cache, file, torn):
    stored_preferences(cache, file, **SPLIT)
    (path,) = cache.rglob(torn)
    path.write_bytes(path.read_bytes()[:-100])
    stored = stored_preferences(cache, file, **SPLIT)
    assert not stored.found
    assert list(stored.train) == list(in_memory(file).train)


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(cache, file):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        stored_preferences(cache, file, **SPLIT)

    assert forked(limited) == StorageError.exit_code
    assert files_of(cache) == []


# -- what is wrong with a source -----------------------------------------------------------------

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHAT = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "b", "rejected": "c"}
WRONG = {
    "nothing": [],
    "no known shape": [{"a": 1}, {"b": 2}],
    "demonstrations": [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "b"}],
    "one wrong row": [GOOD, GOOD | {"chosen": 5}, GOOD],
    "many wrong rows": [GOOD, *[GOOD | {"chosen": i} for i in range(30)]],
    "two forms, text in front": [GOOD, CHAT, CHAT],
    "two forms, text more": [CHAT, GOOD, GOOD, GOOD | {"rejected": None}],
    "two shapes": [{"prompt": "a", "response": "b"}, GOOD, GOOD],
    "a missing column": [GOOD, {"prompt": "a", "chosen": "b"}],
    "one prompt": [GOOD, GOOD],
    "no strict order": [{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}] * 2,
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_is_wrong_is_said_as_in_memory_and_nothing_is_stored(problem, cache, tmp_path):
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in WRONG[problem]))
    with pytest.raises(InputError) as expected:
        in_memory(path)
    with pytest.raises(InputError) as caught:
        stored_preferences(cache, path, **SPLIT)
    assert str(caught.value) == str(expected.value)
    assert files_of(cache) == []


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a"',
        b"\xff\n{}\n",
        "{}".encode("utf-16"),
        b"[]",
        b'{"prompt": "\xc3\n',
        b"\n\n",
    ],
)
def test_lines_that_cannot_be_read_are_named_as_in_memory(content, cache, tmp_path):
    path = tmp_path / "wrong.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as expected:
        load_rows(path)
    with pytest.raises(InputError) as caught:
        stored_preferences(cache, path, **SPLIT)
    assert str(caught.value) == str(expected.value)


def test_columns_are_checked_as_in_memory(cache, file):
    for columns in ({"promt": "prompt"}, {"prompt": "question"}, {"label": "prompt"}):
        with pytest.raises(InputError) as expected:
            load_rows(file, columns=columns)
        with pytest.raises(InputError) as caught:
            stored_preferences(cache, file, columns=columns, **SPLIT)
        assert str(caught.value) == str(expected.value)


# -- streaming -----------------------------------------------------------------------------------


def written_as(form, rows, folder):
    """The rows as a source of that form."""
    lines = [json.dumps(row) for row in rows]
    text = "".join(f"{line}\n" for line in lines)
    if form == "jsonl without a last line end, with blank lines and a byte order mark":
        (folder / "a.jsonl").write_text("\ufeff\n\n" + text[:-1])
    elif form == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    elif form == "json":
        (folder / "a.json").write_text(json.dumps({"rows": rows}, indent=1))
    elif form == "csv":
        columns = list(rows[0])
        quoted = [",".join(json.dumps(row[c]) for c in columns) for row in rows]
        (folder / "a.csv").write_text("\n".join([",".join(columns), *quoted]))
    else:
        for number in range(3):
            shard = pa.Table.from_pylist(rows[number::3])
            name = f"part-{number:05}-of-00003.parquet"
            pq.write_table(shard, folder / name, row_group_size=5)
    if form == "parquet pattern":
        (folder / "other.jsonl").write_text("not of the pattern")
        return str(folder / "part-*.parquet")
    return folder


@pytest.mark.parametrize(
    "form",
    [
        "jsonl without a last line end, with blank lines and a byte order mark",
        "jsonl.gz",
        "json",
        "csv",
        "parquet folder",
        "parquet pattern",
    ],
)
def test_streamed_rows_are_those_of_memory_as_often_as_they_are_read(form, tmp_path):
    rows = [
        {"prompt": f"Q{i}", "chosen": f"ä{i}", "rejected": "", "subset": f"s{i % 2}", "extra": "x"}
        for i in range(40)
    ]
    source = written_as(form, rows, tmp_path)
    streamed, loaded = StreamedRows(source), load_rows(source)
    for _ in range(2):
        assert everything(streamed) == everything(loaded.rows)
    assert (streamed.sha256, str(streamed)) == (loaded.sha256, str(loaded))
    assert "ignored columns: extra" in str(streamed)


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    rows = [{"prompt": f"Q{i}", "chosen": "c", "rejected": "r"} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    asked = []
    to_pylist = pa.RecordBatch.to_pylist

    def counted(batch):
        asked.append(batch.num_rows)
        return to_pylist(batch)

    class Batch:
        def __init__(self, batch):
            self.to_pylist = lambda: counted(batch)

    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *a, **k: map(Batch, iter_batches(*a, **k))
    )
    assert next(iter(load_rows(tmp_path / "a.parquet").rows)).prompt == "Q0"
    assert max(asked) <= 256
    assert sum(asked) == 1000


def test_a_pattern_that_matches_nothing_or_no_data_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"b\*: no file or folder has such a name"):
        load_rows(str(tmp_path / "b*"))
    with pytest.raises(InputError, match=r"a\.txt: not a data file"):
        load_rows(str(tmp_path / "a*"))


def test_a_folder_of_that_very_name_comes_before_the_pattern(tmp_path):
    folder = tmp_path / "v[1]"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(GOOD))
    assert len(load_rows(folder).rows) == len(load_rows(str(tmp_path / "v*")).rows) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(file):
    rows = StreamedRows(file)
    walk = iter(rows)
    next(walk)
    with file.open("a") as stream:
        stream.write(json.dumps(GOOD) + "\n")
    with pytest.raises(InputError, match=r"prefs\.jsonl: changed while it was read; start again"):
        list(walk)


def test_a_gzip_file_that_is_cut_off_is_refused_while_it_is_streamed(cache, file, tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(file.read_bytes())[:-20])
    with pytest.raises(InputError, match="not a whole gzip file"):
        stored_preferences(cache, path, **SPLIT)
