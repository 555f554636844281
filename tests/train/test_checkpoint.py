"""Checkpoints: exact, verified, never torn, never pickled."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dpo.errors import CheckpointError, StorageError
from dpo.train import checkpoint
from dpo.train.checkpoint import Origin
from dpo.train.schedule import adamw
from train.small_runs import forked

ORIGIN = Origin("a config", {"data": "some rows", "tokenizer": "some words"}, "some code")
FILES = ("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json")


class Tied(nn.Module):
    """Two layers that share a matrix, as a tied language model does."""

    def __init__(self, width=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.inner.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.scale * self.head(self.inner(x))


def trained(steps=2, **options):
    model = Tied(**options)
    optimizer = adamw(model, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
    step(model, optimizer, times=steps)
    return model, optimizer


def step(model, optimizer, times=1):
    width = model.inner.in_features
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.arange(2.0 * width).reshape(2, width)).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()


def save(root, step_number, model_and_optimizer=None, origin=ORIGIN):
    model, optimizer = model_and_optimizer or trained()
    taken = checkpoint.snapshot(model, optimizer, {"step": step_number, "note": 1.5})
    return checkpoint.write(root, taken, origin).folder


def newest(root, origin=ORIGIN):
    return checkpoint.newest(root, origin)


def verify(folder, origin=ORIGIN):
    return checkpoint.verify(folder, origin)


def states(model, optimizer):
    return checkpoint.weights(model) | checkpoint._optimizer_tensors(model, optimizer)


def test_no_checkpoint_is_none_and_no_error(tmp_path):
    assert newest(tmp_path) is None


def test_restore_gives_every_tensor_back_bit_for_bit_and_training_goes_on_equally(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 2, (model, optimizer))
    found = newest(tmp_path)
    assert (found.step, found.state) == (2, {"step": 2, "note": 1.5})

    other, other_optimizer = trained(steps=0, seed=9)
    checkpoint.restore(found, other, other_optimizer)
    assert states(model, optimizer).keys() == states(other, other_optimizer).keys()
    assert len(states(model, optimizer)) > 3  # weights, buffer and both moments

    step(model, optimizer, times=3)
    step(other, other_optimizer, times=3)
    for name, tensor in states(model, optimizer).items():
        assert torch.equal(tensor, states(other, other_optimizer)[name]), name
    assert other.head.weight is other.inner.weight


def test_tied_weights_are_saved_once(tmp_path):
    folder = save(tmp_path, 1)
    assert sorted(load_file(folder / "model.safetensors")) == [
        "inner.bias",
        "inner.weight",
        "scale",
    ]


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    for number in (1, 2, 9, 10, 11):
        save(tmp_path, number)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_any_flipped_byte_is_detected_named_and_the_one_before_is_used(
    tmp_path, caplog, name, place
):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[round(place * (len(data) - 1))] ^= 0x10
    file.write_bytes(data)
    damaged = verify(file.parent)
    if damaged is None:  # the manifest's own layout: the digests in it are still right
        assert name == "MANIFEST.json"
        return
    assert name in damaged or name == "MANIFEST.json"
    assert newest(tmp_path).step == 1
    assert "step-00000002" in caplog.text
    assert "trying the one before" in caplog.text


def test_every_flipped_bit_of_the_state_is_detected(tmp_path):
    folder = save(tmp_path, 1)
    good = (folder / "state.json").read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            data = bytearray(good)
            data[place] ^= 1 << bit
            (folder / "state.json").write_bytes(data)
            assert "state.json" in verify(folder)
    (folder / "state.json").write_bytes(good)
    assert verify(folder) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_detected_and_named(tmp_path, name):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (folder / name).unlink()
    assert f"{name} is missing" in verify(folder)
    assert newest(tmp_path).step == 1


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_detected_and_named(tmp_path, name):
    folder = save(tmp_path, 1)
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    assert name in verify(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"a": null}}', "\x00"])
def test_a_manifest_that_is_no_manifest_is_detected(tmp_path, text):
    folder = save(tmp_path, 1)
    (folder / "MANIFEST.json").write_text(text)
    assert "MANIFEST.json" in verify(folder)


def test_a_manifest_that_forgets_the_optimizer_is_no_checkpoint(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "optimizer.safetensors").unlink()
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "optimizer.safetensors" in verify(folder)


def test_no_checkpoint_to_trust_is_an_error_with_every_reason(tmp_path):
    for number in (1, 2):
        (save(tmp_path, number) / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path)
    assert caught.value.exit_code == 4
    for part in ("step-00000001: state.json is missing", "step-00000002", "no checkpoint can be"):
        assert part in str(caught.value)


def test_after_a_damaged_checkpoint_two_good_ones_are_kept_again(tmp_path):
    for number in (10, 20):
        save(tmp_path, number)
    (tmp_path / "step-00000020" / "state.json").unlink()
    assert newest(tmp_path).step == 10
    for number in (12, 13):
        save(tmp_path, number)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000012", "step-00000013"]


@pytest.mark.parametrize("options", [{"width": 7}, {"width": 5}])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_changed(tmp_path, options):
    save(tmp_path, 1)
    other, optimizer = trained(steps=0, **options)
    before = {name: tensor.clone() for name, tensor in states(other, optimizer).items()}
    with pytest.raises(CheckpointError, match="those of another model"):
        checkpoint.restore(newest(tmp_path), other, optimizer)
    assert all(torch.equal(before[name], t) for name, t in states(other, optimizer).items())


def test_a_model_with_other_names_is_refused(tmp_path):
    save(tmp_path, 1)
    other = nn.Linear(6, 6)
    optimizer = adamw(other, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.restore(newest(tmp_path), other, optimizer)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_torn_folder(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot be written: the disk is full"):
        save(tmp_path, 2)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path).step == 1


def test_a_disk_that_fills_inside_the_weights_is_one_sentence_too(tmp_path):
    """safetensors raises a type of its own, not an OSError."""
    save(tmp_path, 1)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # as a disk with room for 64 bytes
        save(tmp_path, 2)

    assert forked(work) == StorageError.exit_code == 5
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path).step == 1


def test_a_full_disk_while_saving_a_step_again_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)
    rename, calls = os.rename, []

    def fail_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(StorageError):
        save(tmp_path, 1)
    assert verify(folder) is None
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000001"]


def test_a_half_copied_checkpoint_is_not_used(tmp_path):
    folder = save(tmp_path, 3)
    torn = tmp_path / "step-00000009"
    torn.mkdir()
    shutil.copy(folder / "model.safetensors", torn)
    assert newest(tmp_path).step == 3


def test_what_is_saved_is_what_was_there_when_it_was_copied(tmp_path):
    """Training goes on while a checkpoint is written."""
    model, optimizer = trained()
    before = {name: tensor.clone() for name, tensor in states(model, optimizer).items()}
    state, carried = {"step": 2, "method": {"means": [1.0]}}, {"ids": torch.arange(3)}
    taken = checkpoint.snapshot(model, optimizer, state, companion=model, tensors=carried)
    step(model, optimizer)
    state["method"]["means"].append(2.0)
    carried["ids"] += 1
    folder = checkpoint.write(tmp_path, taken, ORIGIN).folder

    weights = load_file(folder / "model.safetensors")
    saved = weights | load_file(folder / "optimizer.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    companion = load_file(folder / "companion.safetensors")
    assert all(torch.equal(weights[name], companion[f"companion:{name}"]) for name in weights)
    found = newest(tmp_path)
    assert found.state["method"] == {"means": [1.0]}
    assert checkpoint.method_tensors(found)["ids"].tolist() == [0, 1, 2]


def test_tensors_laid_out_in_another_order_are_saved_as_they_read(tmp_path):
    model, optimizer = trained()
    rows = torch.arange(6).reshape(2, 3)
    taken = checkpoint.snapshot(model, optimizer, {"step": 1}, tensors={"turned": rows.T})
    checkpoint.write(tmp_path, taken, ORIGIN)
    assert torch.equal(checkpoint.method_tensors(newest(tmp_path))["turned"], rows.T)


def test_what_is_written_is_counted_to_the_byte(tmp_path):
    taken = checkpoint.snapshot(*trained(), {"step": 1})
    written = checkpoint.write(tmp_path, taken, ORIGIN)
    assert written.num_bytes == sum(file.stat().st_size for file in written.folder.iterdir())
    assert 0 < written.seconds < 60


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (Origin("another", ORIGIN.parts, ORIGIN.code), "config"),
        (Origin("another", {"data": "others", "tokenizer": "some words"}), "config and data"),
        (Origin("a config", {"data": "some rows", "tokenizer": "other words"}), "tokenizer"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_though_it_is_intact(tmp_path, other, differing):
    save(tmp_path / "own", 1)
    shutil.copytree(save(tmp_path / "other", 2, origin=other), tmp_path / "own" / "step-00000002")
    folder = tmp_path / "own" / "step-00000002"
    assert verify(folder, other) is None
    problem = f"by its MANIFEST.json it is of a run with another {differing}"
    assert verify(folder) == problem
    assert newest(tmp_path / "own").step == 1
    with pytest.raises(CheckpointError) as caught:
        newest(tmp_path / "other")
    assert f"step-00000002: {problem}" in str(caught.value)


def test_a_checkpoint_of_other_code_is_used_and_says_so(tmp_path):
    save(tmp_path, 1)
    later = Origin(ORIGIN.config, ORIGIN.parts, "later code")
    assert newest(tmp_path, later).code == "some code"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks up open files by number")
def test_every_file_and_folder_is_on_the_disk_before_a_checkpoint_has_its_name(
    tmp_path, monkeypatch
):
    fsync, rename, synced = os.fsync, os.rename, []

    def noted(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target):
        synced.append(f"named {os.path.basename(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    save(tmp_path / "checkpoints", 1)
    place = synced.index("named step-00000001")
    assert {*FILES, ".step-00000001.tmp", tmp_path.name} <= {*synced[:place]}
    assert synced[place + 1 :] == ["checkpoints"]
