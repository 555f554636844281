"""`dpo evaluate` killed at any moment: the same command ends as if nothing had been."""

import multiprocessing
import os
import random
import signal
import time
import warnings
from collections import Counter

import numpy as np
import pytest

from dpo.evaluate import embeddings, generations, jobs
from dpo.evaluate.jobs import evaluate
from train.small_runs import dpo_run, evaluate_config, forked, kill_at, sft_run

FORK = multiprocessing.get_context("fork")
PATIENCE_SECONDS = 60.0
NUM_KILLS = 6
CHUNK = 4
RESPONSES = 2 * 2 * 12
"""Two models, two temperatures, twelve prompts."""


class Judge:
    """Embeds a text by its letters, slowly."""

    name = digest = "letters"

    def __call__(self, texts):
        time.sleep(0.02)
        return np.array([[text.count(c) for c in "aeiouthns "] for text in texts], np.float32)


@pytest.fixture(scope="module", autouse=True)
def in_small_pieces():
    """Four responses a write, eight texts a write: there is much to be in the middle of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "load_sentence_model", lambda name: Judge())
        patch.setattr(embeddings, "CHUNK_TEXTS", 8)
        patch.setattr(generations, "CHUNK_BATCHES", 1)
        yield


def run(folder):
    """Evaluate, noting process and number of responses of each call of `generate`; for a process of
    its own.
    """
    generate = generations.generate

    def noted(model, prompts, **options):
        with (folder.parent / "begun.txt").open("a") as log:
            log.write(f"{os.getpid()} {len(prompts)}\n")
        return generate(model, prompts, **options)

    generations.generate = noted
    evaluate(evaluate_config(folder, {"batch_size": CHUNK}))


def begun(folder):
    """Responses whose generation was begun, by each process that began any."""
    found = Counter()
    for line in (folder.parent / "begun.txt").read_text().splitlines():
        process, number = line.split()
        found[process] += int(number)
    return found


def assert_only_what_was_at_hand_was_repeated(folder):
    """One chunk for each process that generated anything before it was killed."""
    by_process = begun(folder)
    assert RESPONSES <= by_process.total() <= RESPONSES + CHUNK * len(by_process)


def files(folder):
    """Every file by its path, hidden ones too, with its bytes."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert found.pop(".lock") == b""
    return found


@pytest.fixture(scope="module")
def undisturbed(in_small_pieces, tmp_path_factory):
    """What an evaluation that nobody kills leaves, and how long it takes."""
    sft_run(), dpo_run()
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    start = time.monotonic()
    assert forked(lambda: run(folder)) == 0
    seconds = time.monotonic() - start
    assert begun(folder).total() == RESPONSES
    return files(folder), seconds


def killed_after(seconds, folder):
    """The exit code of a process that is killed where it has not ended by then."""
    process = FORK.Process(target=run, args=(folder,), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads exist
        process.start()
    process.join(seconds)
    process.kill()  # of no effect where it has ended
    process.join()
    return process.exitcode


def test_killed_at_random_times_it_ends_with_the_same_files(undisturbed, tmp_path):
    expected, seconds = undisturbed
    moments = random.Random(0)
    for halvings in range(6):  # where a machine is faster now than it was undisturbed
        folder = tmp_path / str(halvings) / "out"
        folder.parent.mkdir()
        until = [moments.uniform(0.1, 0.9) * seconds / 2**halvings for _ in range(NUM_KILLS)]
        codes = [killed_after(moment, folder) for moment in until]
        if -signal.SIGKILL in codes:
            break
    codes.append(killed_after(PATIENCE_SECONDS, folder))
    assert codes[-1] == 0
    assert files(folder) == expected
    assert codes.count(-signal.SIGKILL) > 0
    assert_only_what_was_at_hand_was_repeated(folder)


def test_killed_at_any_rename_it_ends_with_the_same_files_and_repeats_only_what_was_at_hand(
    undisturbed, tmp_path
):
    """Each process gets to write two or three files and dies at the next."""
    expected, _ = undisturbed
    moments, folder, codes = random.Random(1), tmp_path / "out", []
    while not codes or codes[-1] != 0:
        moment = {"occurrence": moments.randint(3, 9), "after": moments.random() < 0.5}

        def work(moment=moment):
            kill_at("", **moment)
            run(folder)

        codes.append(forked(work))
        assert codes[-1] in (0, -signal.SIGKILL)
        assert len(codes) < 60
    assert files(folder) == expected
    assert len(codes) > 4
    assert_only_what_was_at_hand_was_repeated(folder)
