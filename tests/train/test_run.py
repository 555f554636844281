"""A run directory: one run, one process, every line of metrics whole."""

import json
import os

import numpy as np
import pytest

from dpo.errors import InputError, StorageError
from dpo.train import run as run_module
from dpo.train.run import (
    arithmetic,
    code_digest,
    load_train_prompts,
    open_run,
    read_manifest,
    read_metrics,
    save_train_prompts,
)
from train.small_runs import forked

IDENTITY = {"command": "train", "seed": 0, "loss": {"beta": 0.1}, "resolved": {"data_sha256": "a"}}


def opened(folder, **changes):
    run = open_run(folder, IDENTITY | changes)
    run.close()
    return run


def test_a_new_run_writes_down_what_was_asked_and_what_it_was_made_of(tmp_path):
    opened(tmp_path / "deep" / "run")
    folder = tmp_path / "deep" / "run"
    assert json.loads((folder / "config.json").read_text()) == IDENTITY
    manifest = read_manifest(folder)
    assert manifest["status"] == "started"
    assert manifest["versions"]["torch"].startswith("2.")
    assert {"python", "platform", "commit", "created", "code_sha256"} <= manifest.keys()
    assert arithmetic() == {name: manifest[name] for name in arithmetic()}
    assert {"device", "num_threads", "cpu_capability", "versions"} <= arithmetic().keys()


def test_the_same_run_is_opened_again(tmp_path):
    opened(tmp_path / "run")
    created = read_manifest(tmp_path / "run")["created"]
    opened(tmp_path / "run")
    assert read_manifest(tmp_path / "run")["created"] == created


def test_a_run_that_goes_on_elsewhere_is_told_and_the_manifest_says_it(
    tmp_path, monkeypatch, caplog
):
    opened(tmp_path / "run")
    opened(tmp_path / "run")
    assert not caplog.records
    assert "changes" not in read_manifest(tmp_path / "run")
    there = arithmetic()
    here = there | {"num_threads": 64, "versions": there["versions"] | {"torch": "9.9"}}
    monkeypatch.setattr(run_module, "arithmetic", lambda: here)
    for _ in range(2):
        opened(tmp_path / "run")
    torch_version = there["versions"]["torch"]
    changes = [
        f"num_threads: {there['num_threads']} there, 64 now",
        f'versions.torch: "{torch_version}" there, "9.9" now',
    ]
    assert read_manifest(tmp_path / "run")["changes"] == changes
    assert "; ".join(changes) in caplog.text
    assert "need not end bit for bit" in caplog.text


def test_a_finished_run_is_told_nothing_of_where_it_is_opened(tmp_path, monkeypatch, caplog):
    opened(tmp_path / "run").update_manifest(status="finished")
    monkeypatch.setattr(run_module, "arithmetic", lambda: arithmetic() | {"num_threads": 64})
    opened(tmp_path / "run")
    assert not caplog.records


def test_checkpoints_of_a_run_carry_the_digests_of_what_it_is_made_of(tmp_path):
    origin = opened(tmp_path / "run").origin
    assert origin.parts == {"data": "a"}
    assert origin.code == code_digest() == read_manifest(tmp_path / "run")["code_sha256"]
    assert opened(tmp_path / "moved").origin == origin  # the folder is no part of it
    others = [{"seed": 1}, {"loss": {"beta": 0.2}}, {"resolved": {"data_sha256": "b"}}]
    for number, changes in enumerate(others):
        assert opened(tmp_path / f"other {number}", **changes).origin.config != origin.config


def test_the_codes_digest_changes_with_any_source_file_and_any_library(tmp_path, monkeypatch):
    (tmp_path / "core").mkdir()
    source = tmp_path / "core" / "losses.py"
    source.write_text("beta = 0.1")

    def digest():
        code_digest.cache_clear()
        return code_digest()

    try:
        monkeypatch.setattr(run_module, "PACKAGE", tmp_path)
        found = {digest()}
        source.write_text("beta = 0.2")
        found.add(digest())
        (tmp_path / "notes.txt").write_text("not code")
        assert digest() in found
        source.rename(tmp_path / "losses.py")
        found.add(digest())
        monkeypatch.setattr(run_module, "LIBRARIES", ("torch",))
        found.add(digest())
        assert len(found) == 4
    finally:
        code_digest.cache_clear()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"loss": {"beta": 0.2}}, "loss.beta: 0.1 there, 0.2 now"),
        ({"resolved": {"data_sha256": "b"}}, 'resolved.data_sha256: "a" there, "b" now'),
        ({"loss": {"beta": 0.1, "new": True}}, "loss.new: null there, true now"),
    ],
)
def test_another_run_in_the_folder_is_refused_with_the_key_and_both_values(tmp_path, changes, line):
    opened(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "run", **changes)
    assert f"\n  {line}" in str(caught.value)
    assert "name a new folder, or set them back" in str(caught.value)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    opened(tmp_path / "run")  # the refusal let the lock go


def test_all_differences_are_told_at_once(tmp_path):
    opened(tmp_path / "run")
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "run", seed=5, command="sft")
    assert 'command: "train" there, "sft" now' in str(caught.value)
    assert "seed: 0 there, 5 now" in str(caught.value)


def test_infinite_settings_are_equal_to_themselves(tmp_path):
    opened(tmp_path / "run", limit=float("inf"))
    opened(tmp_path / "run", limit=float("inf"))


def test_a_second_opening_while_the_first_is_open_is_refused(tmp_path):
    run = open_run(tmp_path / "run", IDENTITY)
    with pytest.raises(InputError, match="another process is working in"):
        open_run(tmp_path / "run", IDENTITY)
    assert forked(lambda: open_run(tmp_path / "run", IDENTITY)) == 2
    run.close()
    opened(tmp_path / "run")


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    def killed():
        open_run(tmp_path / "run", IDENTITY)
        os.kill(os.getpid(), 9)

    assert forked(killed) == -9
    opened(tmp_path / "run")


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".draft.tmp").write_text("more of it")
    with pytest.raises(InputError, match=r"is not empty and holds no run \(\.draft\.tmp, thesis"):
        opened(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / ".draft.tmp").exists()


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    opened(tmp_path)


def test_a_kill_before_the_configuration_was_written_does_not_block_the_next_start(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.json.4711.tmp").write_text('{"comm')
    opened(folder)
    assert sorted(f.name for f in folder.iterdir()) == [".lock", "config.json", "manifest.json"]


def test_what_killed_writers_left_is_removed_at_the_next_start(tmp_path):
    folder = tmp_path / "run"
    opened(folder)
    (folder / "checkpoints" / ".step-00000003.tmp").mkdir(parents=True)
    (folder / ".best.tmp").mkdir()
    (folder / ".best.old").mkdir()
    (folder / ".best.old" / "weights").write_text("the last best")
    (folder / ".metrics.jsonl.99.tmp").write_text("")
    opened(folder)
    assert not [*folder.rglob("*.tmp"), *folder.rglob("*.old")]
    assert (folder / "best" / "weights").read_text() == "the last best"


def test_out_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file of that name is in the way"):
        opened(tmp_path / "file")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        opened(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="writing there is not permitted"):
            opened(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


def test_a_damaged_configuration_is_named(tmp_path):
    opened(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"comm')
    with pytest.raises(InputError, match=r"config\.json: expected a JSON file written by dpo"):
        opened(tmp_path / "run")


def test_metrics_are_lines_and_numbers_that_json_lacks_are_text(tmp_path):
    run = open_run(tmp_path / "run", IDENTITY)
    run.log({"step": 1, "loss": float("nan"), "gradient_norm": float("inf")})
    run.log({"step": 2, "loss": 0.5})
    run.close()
    lines = run.metrics_file.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "loss": "nan", "gradient_norm": "inf"},
        {"step": 2, "loss": 0.5},
    ]


def test_a_torn_last_line_is_no_metric_and_is_gone_after_resuming(tmp_path):
    run = opened(tmp_path / "run")
    run.metrics_file.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(run.folder) == [{"step": 0}, {"step": 1}]
    run.forget_after(1)
    assert run.metrics_file.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_metrics_survive_a_kill_while_later_steps_are_forgotten(tmp_path, monkeypatch):
    run = opened(tmp_path / "run")
    text = '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    run.metrics_file.write_text(text)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.forget_after(1)
    assert run.metrics_file.read_text() == text


def test_a_full_disk_while_logging_is_one_sentence(tmp_path):
    run = opened(tmp_path / "run")
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: the disk is full\."):
        run.log({"step": 1})


def test_training_prompts_come_back_from_the_run_its_model_and_its_best(tmp_path):
    digests = {0, 1, 2**64 - 1, 2**63}
    save_train_prompts(tmp_path, digests)
    for place in (tmp_path, tmp_path / "model", tmp_path / "best"):
        assert load_train_prompts(place) == digests
    assert load_train_prompts(tmp_path / "a" / "b") is None


def test_damaged_training_prompts_are_named_and_not_taken_for_none(tmp_path):
    save_train_prompts(tmp_path, {1})
    file = tmp_path / "train_prompts.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match="it is damaged"):
        load_train_prompts(tmp_path)


def test_training_prompts_do_not_betray_their_order(tmp_path):
    from safetensors.numpy import load_file

    save_train_prompts(tmp_path, [5, 3, 5, 4])
    values = load_file(tmp_path / "train_prompts.safetensors")["digests"]
    assert values.dtype == np.uint64
    assert values.tolist() == [3, 4, 5]
