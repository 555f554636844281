"""The same command under torchrun: on one host, and on two with addresses of their own."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dpo.train.run import read_manifest, read_metrics
from train.several_ranks import free_port, train
from train.small_runs import sft_config, words_of

CHANGES = {"max_steps": 4, "save_every": 2, "evaluation.every": 4, "evaluation.num_samples": 1}


def torchrun(config, *options, prefix=(), **environment):
    """Start it; what it says comes as one text."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    return subprocess.Popen(
        [*prefix, *launcher, "-m", "dpo.cli", "sft", *words_of(config)],
        env=os.environ | {"COLUMNS": "200", "GLOO_SOCKET_IFNAME": "lo"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def here(size=2):
    return (
        "--nproc-per-node",
        str(size),
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
    )


def wait_for_step(folder, step, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any("loss" in row and row["step"] >= step for row in read_metrics(folder)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


def workers_of(process):
    """The processes that torchrun has started, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in children.read_text().split()]


def test_under_torchrun_one_folder_and_one_table_come_out(tmp_path):
    process = torchrun(sft_config(tmp_path / "run", CHANGES), *here())
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("start (step 0)") == 1  # the table's head
    assert "2 processes train together (ddp)" in said
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["status"], manifest["num_ranks"]) == ("finished", 2)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "index.html").is_file()


@pytest.mark.slow
def test_torchrun_passes_signals_on_and_a_stopped_process_ends_all(tmp_path):
    changes = CHANGES | {"max_steps": 2000, "save_every": 2000, "evaluation.every": 2000}
    config = sft_config(tmp_path / "run", changes | {"distributed.timeout_seconds": 15})
    process = torchrun(config, *here())
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert said.count("the state is saved") >= 1, said
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    before = max(row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row)

    process = torchrun(config, *here())
    wait_for_step(tmp_path / "run", before + 3)
    os.kill(workers_of(process)[1], signal.SIGSTOP)
    begun = time.monotonic()
    said, _ = process.communicate(timeout=120)
    assert time.monotonic() - begun < 60
    assert process.returncode == 1
    assert "did not answer for 15 seconds" in said, said
    assert "exitcode  : 6" in said


def run(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces, joined by a cable: their names and addresses."""
    names = [f"dpo{os.getpid()}{side}" for side in "ab"]
    with ExitStack() as undo:
        try:
            for name in names:
                run("ip", "netns", "add", name)
                undo.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ends = [f"{name}e"[-15:] for name in names]
            run("ip", "link", "add", ends[0], "netns", names[0], "type", "veth",
                "peer", "name", ends[1], "netns", names[1])  # fmt: skip
            for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
                inside = ("ip", "-n", name)
                run(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", end)
                run(*inside, "link", "set", end, "up")
                run(*inside, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine allows no network namespaces: {error}")
        yield list(zip(names, ends, strict=True))


@pytest.mark.slow
def test_two_hosts_meet_at_an_address_and_train_what_one_process_does(two_hosts, tmp_path):
    config = sft_config(tmp_path / "two", CHANGES)
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    meeting += ("--rdzv-endpoint", "10.77.0.1:29511", "--rdzv-id", "1")
    processes = [
        torchrun(
            config,
            *meeting,
            *("--local-addr", f"10.77.0.{number}", "--rdzv-conf", f"is_host={number == 1}"),
            prefix=("ip", "netns", "exec", name),
            GLOO_SOCKET_IFNAME=end,
        )
        for number, (name, end) in enumerate(two_hosts, 1)
    ]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert read_manifest(tmp_path / "two")["num_ranks"] == 2
    train(sft_config(tmp_path / "one", CHANGES))
    one, two = (
        [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, abs=1e-6)
