"""Checkpoints are written beside training: never late, never two at once, never a lost failure."""

import threading
from pathlib import Path

import pytest

from dpo.errors import DivergedError, StorageError
from dpo.train import checkpoint
from dpo.train.background import CheckpointWriter
from dpo.train.checkpoint import Snapshot, Written
from dpo.train.run import open_run

FULL = "checkpoints cannot be written: the disk is full."


@pytest.fixture
def run(tmp_path):
    run = open_run(tmp_path / "run", {"command": "train"})
    run.log({"step": 1, "loss": 0.5})
    yield run
    run.close()


class Disk:
    """Stands for the disk: a write lasts until it is let go, and may fail."""

    def __init__(self, monkeypatch):
        self.ready, self.begun = threading.Event(), []
        self.failure = None
        monkeypatch.setattr(checkpoint, "write", self.write)

    def write(self, root, taken, origin):
        self.begun.append(taken.state["step"])
        assert self.ready.wait(timeout=30)
        if self.failure is not None:
            raise self.failure
        return Written(Path(root), 1000 + taken.state["step"], 0.25)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def state_at(step):
    return Snapshot({"step": step}, {})


def diverge_while_saving(run):
    with CheckpointWriter(run) as writer:
        writer.start(state_at(1), copy_seconds=0.0)
        raise DivergedError("Step 2: the loss is nan")


def saves(run):
    return [row for row in run.metrics() if "save/bytes" in row]


def test_training_goes_on_while_the_disk_works_and_the_save_is_logged_when_it_is_done(run, disk):
    with CheckpointWriter(run) as writer:
        writer.start(state_at(1), copy_seconds=0.5)
        writer.poll()  # returns though the disk is not ready
        assert saves(run) == []
        disk.ready.set()
        writer.finish()
        assert len(saves(run)) == 1
        writer.finish()
        writer.poll()
    (row,) = saves(run)
    assert (row["step"], row["save/bytes"], row["save/seconds"]) == (1, 1001, 0.25)
    assert 0.5 <= row["save/blocked_seconds"] < 30.5


def test_polling_logs_a_save_that_has_ended(run, disk):
    disk.ready.set()
    with CheckpointWriter(run) as writer:
        writer.start(state_at(1), copy_seconds=0.0)
        while not saves(run):  # a test that hangs is stopped from outside
            writer.poll()


def test_leaving_waits_for_the_disk_even_where_training_failed(run, disk):
    threading.Timer(0.2, disk.ready.set).start()
    with pytest.raises(DivergedError):
        diverge_while_saving(run)
    assert [row["step"] for row in saves(run)] == [1]


def test_a_full_disk_is_raised_where_training_asks_next_and_once(run, disk):
    disk.failure = StorageError(FULL)
    disk.ready.set()
    with CheckpointWriter(run) as writer:
        writer.start(state_at(1), copy_seconds=0.0)
        with pytest.raises(StorageError, match=FULL):
            writer.finish()
        writer.poll()
        writer.finish()
    assert saves(run) == []


def test_a_full_disk_is_raised_at_the_latest_when_leaving(run, disk):
    disk.failure = StorageError(FULL)
    disk.ready.set()
    with pytest.raises(StorageError, match=FULL), CheckpointWriter(run) as writer:
        writer.start(state_at(1), copy_seconds=0.0)


def test_of_two_failures_the_first_is_raised_and_the_other_said(run, disk, caplog):
    disk.failure = StorageError(FULL)
    disk.ready.set()
    with pytest.raises(DivergedError, match="Step 2"):
        diverge_while_saving(run)
    assert FULL in caplog.text


def test_no_thread_is_left_for_a_fork_to_miss(run, disk):
    before = threading.active_count()
    disk.ready.set()
    with CheckpointWriter(run) as writer:
        writer.start(state_at(1), copy_seconds=0.0)
        assert threading.active_count() == before + 1
    assert threading.active_count() <= before + 1  # TensorBoard's, from the line that was logged
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def test_the_metrics_are_on_the_disk_before_the_checkpoint_they_lead_to(run, disk, monkeypatch):
    order = []
    monkeypatch.setattr(type(run), "sync_metrics", lambda self: order.append("metrics"))
    monkeypatch.setattr(checkpoint, "write", lambda *_: order.append("checkpoint") or 1 / 0)
    with pytest.raises(ZeroDivisionError), CheckpointWriter(run) as writer:
        writer.start(state_at(1), copy_seconds=0.0)
    assert order == ["metrics", "checkpoint"]
