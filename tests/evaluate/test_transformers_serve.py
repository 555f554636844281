"""The endpoint judge against a real OpenAI-compatible server: `transformers serve`."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from dpo.config_files import validate
from dpo.evaluate.chat import ChatEndpoint
from dpo.evaluate.endpoint import EndpointJudge
from dpo.evaluate.matchups import Matchup, Place
from dpo.evaluation_config import EndpointConfig
from dpo.models.fresh import fresh_gpt2

pytestmark = pytest.mark.slow
NEEDED = ("fastapi", "uvicorn", "openai")
START_SECONDS = 180


def save(folder, tokenizer, *, always=None):
    """A tiny GPT-2 with random weights; with `always`, one that says this token and no other.

    Its last layer norm gives the same direction whatever it reads, and one embedding lies there.
    """
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = fresh_gpt2(width=16, layers=1, heads=2, positions=2048, tokenizer=tokenizer, seed=0)
    if always is not None:
        direction = torch.eye(16)[0] * 10
        with torch.no_grad():
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.copy_(direction)
            model.transformer.wte.weight[tokenizer.convert_tokens_to_ids(always)] = direction
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, server, log):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            with direct.open(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no server after {START_SECONDS} seconds: {log.read_text()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`transformers serve` on a free port: its address."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"transformers serve needs {', '.join(missing)}: pip install transformers[serving]"
        )
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture
def own_tokenizer():
    from dpo.models.fresh import train_tokenizer

    return train_tokenizer(
        ["Which response is better? A or B, or equally good."] * 9, vocab_size=300
    )


def judge(base_url, folder, **settings):
    config = validate(
        EndpointConfig,
        {"model": str(folder), "base_url": base_url, "input_price": 1.0, "output_price": 4.0}
        | settings,
    )
    return EndpointJudge(ChatEndpoint(config))


def pairs():
    return [
        Matchup(
            place=Place(family="models", a="x", b="y", temperature=1.0, prompt_index=i, sample=0),
            prompt=f"What is {i}?",
            response_a=f"It is {i}.",
            response_b="No \u2603.",
            chosen="c",
            rejected="r",
        )
        for i in range(3)
    ]


def test_a_model_that_always_says_a_is_found_to_judge_by_place(server, tmp_path, own_tokenizer):
    own_tokenizer.add_tokens(["[[A]]"])
    folder = save(tmp_path, own_tokenizer, always="[[A]]")
    found = judge(server, folder, max_tokens=1)
    assert found.compare(pairs()) == ["tie"] * 3
    told = found.describe()
    assert (told["pairs"]["always_first"], told["pairs"]["position_bias"]) == (3, 1.0)
    answers = told["answers"]
    assert (answers["questions"], answers["failed"], answers["without_usage"]) == (6, 0, 0)
    assert answers["completion_tokens"] == 6
    assert answers["prompt_tokens"] > 600
    assert answers["cost"] == (answers["prompt_tokens"] + 4 * 6) / 1e6


def test_a_model_with_random_weights_says_nothing_readable(server, tmp_path, own_tokenizer):
    folder = save(tmp_path, own_tokenizer)
    found = judge(server, folder, max_tokens=5)
    assert found.compare(pairs()) == ["tie"] * 3
    told = found.describe()
    assert told["pairs"]["unparsable"] == 3
    assert told["answers"]["completion_tokens"] <= 6 * 5
    assert told["answers"]["failed"] == 0
    again = judge(server, folder, max_tokens=5)
    again.compare(pairs())
    assert again.describe()["answers"]["from_cache"] == 6


def test_a_model_that_the_server_does_not_have_fails_and_is_counted(server):
    found = judge(server, "no/such-model", max_attempts=1)
    assert found.compare(pairs()[:2]) == ["tie"] * 2
    assert found.describe()["answers"]["failed"] == 4
