"""Files are written whole or not at all, and a failing disk is one sentence."""

import errno
import json
import math
import os
import resource
import signal

import pytest
from safetensors.torch import save_file
from torch import ones

from dpo.atomic import (
    clean_up,
    jsonable,
    replace_file,
    replace_folder,
    storage_errors,
    write_json,
    write_text,
)
from dpo.errors import InputError, StorageError
from train.small_runs import forked


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_text_is_written_as_it_is_on_every_system(tmp_path):
    write_text(tmp_path / "a", "one\ntwo\r\n\u00e9\n")
    assert (tmp_path / "a").read_bytes() == "one\ntwo\r\n\u00e9\n".encode()
    assert names(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        write_text(tmp_path / "a", "new")
    assert str(caught.value) == f"{tmp_path / 'a'} cannot be written: the disk is full."
    assert caught.value.exit_code == 5
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_lone_surrogate_becomes_its_escape_where_that_is_asked_for(tmp_path):
    write_text(
        tmp_path / "a", json.dumps("\u00e9 \ud800", ensure_ascii=False), errors="backslashreplace"
    )
    assert (tmp_path / "a").read_bytes() == '"\u00e9 \\ud800"'.encode()
    assert json.loads((tmp_path / "a").read_text("utf-8")) == "\u00e9 \ud800"


def test_text_that_cannot_be_encoded_leaves_the_older_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_kill_in_the_middle_of_a_write_leaves_the_older_file(tmp_path):
    write_text(tmp_path / "a", "old")

    def killed():
        with replace_file(tmp_path / "a") as temporary:
            temporary.write_text("half of the ne")
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    clean_up(tmp_path)
    assert names(tmp_path) == ["a"]


def test_json_has_no_nan_and_keeps_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a", {"z": math.nan, "a": [math.inf, (-math.inf, 1.5)], "\u00e9": None})
    text = (tmp_path / "a").read_text(encoding="utf-8")
    assert list(json.loads(text, parse_constant=pytest.fail).items()) == [
        ("z", "nan"),
        ("a", ["inf", ["-inf", 1.5]]),
        ("\u00e9", None),
    ]


def test_finite_values_pass_unchanged():
    assert jsonable({"a": [1, 0.5, True, "x"]}) == {"a": [1, 0.5, True, "x"]}


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "writing there is not permitted"),
        (errno.ENOENT, "its folder does not exist"),
    ],
)
def test_a_failing_disk_is_named_in_words(tmp_path, number, reason):
    with (
        pytest.raises(StorageError, match=f"cannot be written: {reason}"),
        storage_errors(tmp_path),
    ):
        raise OSError(number, "")


def test_a_full_disk_inside_a_library_written_in_rust_is_the_same_sentence(tmp_path):
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(StorageError, match=r": the disk is full\.$"), storage_errors(tmp_path):
        raise RuntimeError(message)


def test_safetensors_on_a_full_disk_leaves_the_older_file(tmp_path):
    save_file({"a": ones(3)}, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with replace_file(tmp_path / "a") as temporary:
            save_file({"a": ones(10_000)}, temporary)

    assert forked(work) == 5
    assert (tmp_path / "a").read_bytes() == before
    assert names(tmp_path) == ["a"]


def test_errors_that_are_no_failure_of_the_disk_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError), storage_errors(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(InputError, match="mine"), storage_errors(tmp_path):
        raise InputError("mine")
    with pytest.raises(StorageError, match="inner"), storage_errors(tmp_path):
        raise StorageError("inner")


def fill(folder, text):
    with replace_folder(folder) as temporary:
        (temporary / "file").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path):
    fill(tmp_path / "f", "old")
    (tmp_path / "f" / "stale").write_text("")
    fill(tmp_path / "f", "new")
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["file"]
    assert (tmp_path / "f" / "file").read_text() == "new"


def test_a_folder_being_filled_has_not_its_name_yet(tmp_path):
    with replace_folder(tmp_path / "f"):
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f").exists()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_replacement_leaves_the_older_folder(tmp_path, monkeypatch, failing):
    fill(tmp_path / "f", "old")
    rename, calls = os.rename, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(StorageError, match="f cannot be written: the disk is full"):
        fill(tmp_path / "f", "new")
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f" / "file").read_text() == "old"


def test_an_error_while_filling_leaves_the_older_folder(tmp_path):
    fill(tmp_path / "f", "old")
    with pytest.raises(TypeError):
        fill(tmp_path / "f", text=3)
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f" / "file").read_text() == "old"


def test_cleaning_up_touches_no_file_of_another_kind(tmp_path):
    for name in ("a.tmp", ".hidden", "b.old", ".lock"):
        (tmp_path / name).write_text("")
    deep = tmp_path / "one" / "two"
    deep.mkdir(parents=True)
    (deep / ".x.tmp").write_text("")  # another run's, perhaps
    clean_up(tmp_path)
    assert names(tmp_path) == [".hidden", ".lock", "a.tmp", "b.old", "one"]
    assert (deep / ".x.tmp").exists()


def test_cleaning_up_restores_what_was_moved_aside_and_drops_what_was_replaced(tmp_path):
    for name in (".a.old", ".b.old", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    clean_up(tmp_path)
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a" / "from").read_text() == ".a.old"
    assert (tmp_path / "b" / "from").read_text() == "b"
