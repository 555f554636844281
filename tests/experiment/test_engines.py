"""Runs of a study as tasks of Ray: the bytes of runs made here, whatever becomes of the workers.

Ray is started for real, on this machine, in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from dpo.atomic import lock_folder
from dpo.config_files import validate
from dpo.errors import InputError
from dpo.experiment import engines
from dpo.experiment.study import train_all
from dpo.experiment.study_config import StudyConfig, plan
from experiment.tiny_study import TINY as BASE

CONFIG = {
    **BASE,
    "processes": 2,
    "sft": {"max_steps": 2, "evaluation": {"num_samples": 0}},
    "dpo": {"max_steps": 60, "save_every": 2, "evaluation": {"num_samples": 0, "kl_prompts": 0}},
    "grid": {"loss.beta": [0.1]},
    "evaluation": {"max_new_tokens": 8},
}
TRAIN_ALL = """
import json, logging, sys
from dpo.config_files import validate
from dpo.experiment.study import train_all
from dpo.experiment.study_config import StudyConfig, plan

logging.basicConfig(level=logging.INFO)
config = validate(StudyConfig, json.loads(sys.argv[1]))
train_all(config, plan(config), False, use_ray=True)
"""


def settings(folder, **changes):
    return {**CONFIG, **changes, "out": str(folder)}


@pytest.fixture
def start():
    """Start a Python of its own, which no RAY_ADDRESS of ours reaches."""
    started = []

    def start(code, *arguments, **variables):
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | variables
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", code, *arguments]
        process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def worker_in(run, driver):
    """The process below `driver` that holds a run's lock, once it has saved; waits for it."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert driver.poll() is None, driver.communicate()
        if any(run.glob("checkpoints/step-*")):
            for process in psutil.Process(driver.pid).children(recursive=True):
                if any(file.path == str(run / ".lock") for file in process.open_files()):
                    return process
        time.sleep(0.005)
    raise AssertionError(f"nobody trains {run}")


def weights(study):
    files = sorted(study.glob("runs/*/model/model.safetensors"))
    return {file.parts[-3]: file.read_bytes() for file in files}


def changed_at(study, name):
    return [file.stat().st_mtime_ns for file in sorted(study.glob(f"runs/sft-*/{name}"))]


def test_lost_workers_are_replaced_and_every_run_ends_with_the_bytes_of_runs_made_here(
    tmp_path, start
):
    """One worker is killed and one told to stop, each in the midst of a run; what was finished by
    then is not touched.
    """
    pytest.importorskip("ray")
    here, there = tmp_path / "here", tmp_path / "there"
    config = validate(StudyConfig, settings(here))
    train_all(config, plan(config), False)

    driver = start(TRAIN_ALL, json.dumps(settings(there)))
    for seed, number in [(0, signal.SIGKILL), (1, signal.SIGTERM)]:
        run = there / "runs" / f"dpo-beta-0.1-seed{seed}"
        worker = worker_in(run, driver)
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["status"] != "finished"
        worker.send_signal(number)
    finished = changed_at(there, "metrics.jsonl"), changed_at(there, "model/model.safetensors")
    assert len(finished[0]) == len(finished[1]) == 2
    _, told = driver.communicate(timeout=240)
    assert driver.returncode == 0, told

    made = weights(there)
    assert made.keys() == {f"{name}-seed{s}" for name in ("sft", "dpo-beta-0.1") for s in (0, 1)}
    assert made == weights(here)
    assert finished == (
        changed_at(there, "metrics.jsonl"),
        changed_at(there, "model/model.safetensors"),
    )


def test_a_mistake_that_a_worker_finds_is_one_sentence_and_no_worker_is_left(tmp_path, start):
    pytest.importorskip("ray")
    missing = {"path": str(tmp_path / "nowhere.jsonl")}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path / "study", data=missing)))
    code = "import sys; sys.argv[0] = 'dpo'\nfrom dpo.cli import main\nmain()"
    done = start(code, "experiment", "run", str(file), "--engine", "ray")
    out, told = done.communicate(timeout=240)
    assert done.returncode == 2, told
    assert out == ""
    [line] = told.splitlines()
    assert "nowhere.jsonl" in line
    for run in (tmp_path / "study" / "runs").glob("*"):
        lock_folder(run).close()


def test_a_task_that_loses_every_worker_ends_with_one_sentence(start):
    pytest.importorskip("ray")
    code = (
        "import os\nfrom dpo.errors import RankLost\nfrom dpo.experiment import engines\n"
        "engines.RETRIES = 1\n"
        "try:\n    with engines.open_ray(1) as ray:\n"
        "        engines.on_ray(ray, os._exit, [(1,)], 'Tasks')\n"
        "except RankLost as error: print(error)"
    )
    out, told = start(code).communicate(timeout=240)
    last = out.splitlines()[-1]  # Ray says more above it
    assert last.startswith("A worker of the Ray cluster was lost 2 times in the same task;"), told


def test_no_cluster_at_the_address_is_one_sentence(tmp_path, start):
    pytest.importorskip("ray")
    code = (
        "from dpo.errors import InputError\nfrom dpo.experiment.engines import open_ray\n"
        "try:\n    with open_ray(2): pass\nexcept InputError as error: print(error)"
    )
    done = start(code, RAY_ADDRESS="auto", RAY_TMPDIR=str(tmp_path))
    out, told = done.communicate(timeout=120)
    assert out == "RAY_ADDRESS: no Ray cluster answers at auto.\n", told


def test_without_ray_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    says = r"Ray is not installed; pip install 'direct-preference-optimization\[ray\]'"
    with pytest.raises(InputError, match=says), engines.open_ray(2):
        pass


def test_a_folder_that_a_machine_does_not_have_is_said_with_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_begin_worker", lambda level: None)
    with pytest.raises(InputError, match=r"not there on .*that all machines of the Ray cluster"):
        engines._work(0, str(tmp_path / "elsewhere"), print, ())


def test_ray_is_not_loaded_by_a_study_that_does_not_ask_for_it(start):
    code = "import dpo.cli, dpo.experiment.study, sys; print('ray' in sys.modules)"
    out, told = start(code).communicate(timeout=120)
    assert out == "False\n", told
