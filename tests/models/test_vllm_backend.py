"""vLLM behind our interface: what it is asked for, and what its answers become.

vLLM itself runs in the tests marked `gpu` alone, where it is installed; a stand-in that keeps to
its contract serves the others.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from scipy.stats import chi2

from dpo.errors import InputError
from dpo.models.generate import generate
from dpo.models.load import find_model
from dpo.models.vllm_backend import (
    VllmModel,
    check_servable,
    check_temperature,
    need_vllm,
    request_seed,
)
from models import vllm_stand_in
from tiny_models import make

VOCAB = 40
STOP = 3


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, in vLLM's place."""
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in)
    monkeypatch.setattr(vllm_stand_in.LLM, "started", 0)
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    return vllm_stand_in


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model whose next tokens are far from uniform."""
    make("gpt2", VOCAB, scale=12.0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def served(vllm, folder):
    with closing(open_folder(folder)) as model:
        yield model


def open_folder(folder: Path, *, batch_size: int = 8, precision: str = "fp32") -> VllmModel:
    return VllmModel(find_model(str(folder)), batch_size=batch_size, precision=precision)


def random_prompts(number: int = 8) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 20))] for _ in range(number)]


def sample(model: VllmModel, prompts: list[list[int]], **more: object):
    options = {
        "keys": [f"{i}/0" for i in range(len(prompts))],
        "temperature": 1.0,
        "max_new_tokens": 12,
        "stop_ids": [STOP],
        "seed": 0,
        "longest": 32,
        **more,
    }
    return model.generate(prompts, **options)


# -- the same answers ----------------------------------------------------------------------------


def test_greedy_responses_are_those_of_our_own_sampler(served, folder) -> None:
    prompts = random_prompts()
    found = sample(served, prompts, temperature=0.0)
    expected = generate(
        make("gpt2", VOCAB, scale=12.0),
        prompts,
        keys=[str(i) for i in range(len(prompts))],
        temperature=0.0,
        max_new_tokens=12,
        stop_ids=[STOP],
        seed=0,
    )
    assert found == expected
    assert len({response.ids for response in found}) > 3


def test_a_response_does_not_depend_on_what_it_is_generated_with(served) -> None:
    prompts = random_prompts()
    together = sample(served, prompts)
    order = [5, 0, 7, 2]
    some = sample(served, [prompts[i] for i in order], keys=[f"{i}/0" for i in order])
    assert some == [together[i] for i in order]
    again = [sample(served, [p], keys=[f"{i}/0"])[0] for i, p in enumerate(prompts)]
    assert again == together


def test_other_keys_and_other_seeds_are_other_responses(served) -> None:
    prompts = [random_prompts(1)[0]] * 6
    first = sample(served, prompts)
    assert len({response.drawn for response in first}) > 1
    assert sample(served, prompts, seed=1) != first
    assert sample(served, prompts, keys=[f"{i}/1" for i in range(6)]) != first


@torch.no_grad()
def test_tokens_have_the_probabilities_of_the_model(served) -> None:
    """Pearson's test of 2,000 first tokens, those of 5 or more expected apart."""
    prompt, number = [7, 1, 30], 2000
    keys = [f"0/{s}" for s in range(number)]
    found = sample(served, [prompt] * number, keys=keys, max_new_tokens=1, temperature=1.5)
    counts = Counter(response.drawn[0] for response in found)
    logits = make("gpt2", VOCAB, scale=12.0)(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = (logits.double() / 1.5).softmax(-1) * number
    often = [v for v in range(VOCAB) if expected[v] >= 5]
    rest = number - sum(counts[v] for v in often), number - float(expected[often].sum())
    cells = [(counts[v], float(expected[v])) for v in often] + ([rest] if rest[1] >= 5 else [])
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    assert len(cells) > 3
    assert statistic < chi2.ppf(1 - 1e-6, len(cells) - 1)


def test_only_the_stop_tokens_end_a_response_and_they_are_no_part_of_it(served) -> None:
    """Token 0 is the model's own end of sequence, and means nothing here."""
    prompts = [random_prompts(1)[0]] * 40
    found = sample(served, prompts, stop_ids=[STOP, 11])
    ended = [response for response in found if response.end is not None]
    assert {response.end for response in ended} <= {STOP, 11}
    assert ended
    assert len(ended) < len(found)
    for response in found:
        assert not {STOP, 11} & set(response.ids)
        assert response.truncated == (len(response.drawn) == 12 and response.end is None)
    endless = sample(served, prompts, stop_ids=[])
    assert all(response.truncated and len(response.ids) == 12 for response in endless)
    assert any(0 in response.ids[:-1] for response in endless)


def test_progress_counts_responses(served) -> None:
    counted: list[int] = []
    sample(served, random_prompts(), progress=counted.append)
    assert sum(counted) == 8


# -- seeds ---------------------------------------------------------------------------------------


def test_a_seed_is_one_of_vllms_and_of_its_key_and_seed_alone() -> None:
    seeds = {(s, k): request_seed(s, f"{k}/0") for s in range(20) for k in range(50)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert max(seeds.values()) > 2**62
    assert request_seed(3, "4/0") == seeds[3, 4]


# -- the engine ----------------------------------------------------------------------------------


def test_the_engine_starts_with_the_first_response_and_ends_with_the_model(vllm, folder) -> None:
    with closing(open_folder(folder, batch_size=5)) as model:
        model.identity()
        assert vllm.LLM.started == 0
        sample(model, random_prompts())
        sample(model, random_prompts(3), longest=40)
        assert vllm.LLM.started == 1
        (engine,) = vllm.LLM.alive
        assert (engine.max_model_len, engine.max_num_seqs) == (32, 5)
        assert engine.model.dtype == torch.float32
        del engine
    assert not vllm.LLM.alive


def test_bf16_is_the_precision_of_the_weights(vllm, folder) -> None:
    with closing(open_folder(folder, precision="bf16")) as model:
        sample(model, random_prompts(2))
        (engine,) = vllm.LLM.alive
        assert engine.model.dtype == torch.bfloat16
        del engine


def test_the_identity_is_of_weights_and_release(vllm, folder, monkeypatch) -> None:
    first = open_folder(folder).identity()
    assert open_folder(folder).identity() == first
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    assert open_folder(folder).identity() != first
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in)
    make("gpt2", VOCAB, seed=1).save_pretrained(folder)
    assert open_folder(folder).identity() != first


def test_vllm_reports_nothing_unless_the_user_wants_it(vllm, monkeypatch) -> None:
    need_vllm()
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    need_vllm()
    assert os.environ["VLLM_NO_USAGE_STATS"] == "0"


# -- what is refused -----------------------------------------------------------------------------


def test_without_vllm_the_sentence_says_what_to_install(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    says = r"backend: vllm cannot be imported .*install 'direct-preference-optimization\[vllm\]'"
    with pytest.raises(InputError, match=says):
        open_folder(folder)


@pytest.mark.parametrize("temperature", [0.001, 0.0099, 2.1, -0.5, float("inf"), float("nan")])
def test_temperatures_that_vllm_would_change_or_refuse_are_refused(served, temperature) -> None:
    with pytest.raises(InputError, match=r"vLLM takes the temperature 0 and those from 0.01 to 2"):
        sample(served, random_prompts(1), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 2.0])
def test_the_others_are_taken(temperature) -> None:
    check_temperature(temperature)


def test_an_adapter_is_not_served_and_the_sentence_says_what_to_do(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"it is an adapter.*dpo merge FOLDER --out FOLDER"):
        check_servable(find_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("architectures", "told"),
    [(["GPT2ForSequenceClassification"], "is GPT2ForSequenceClassification"), (None, "is missing")],
)
def test_what_is_no_language_model_is_not_served(folder, architectures, told) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    with pytest.raises(InputError, match=f"vLLM samples from causal language models; .* {told}"):
        check_servable(find_model(str(folder)))


def test_what_vllm_says_against_a_model_is_one_sentence(vllm, folder) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model: vLLM cannot serve it: .*model\.safetensors"):
        sample(open_folder(folder), random_prompts(2))


def test_a_model_of_the_hub_that_cannot_be_had_is_one_sentence(vllm) -> None:
    with pytest.raises(InputError, match="cannot be had from the hub"):
        open_folder(Path("nobody/nothing"))


@pytest.mark.parametrize(
    ("prompts", "more", "told"),
    [
        ([[1] * 21], {}, "prompt 0 has 21 tokens; 12 new tokens leave room for 20"),
        ([[1] * 53], {"longest": 65}, "prompt 0 has 53 tokens; .* room for 52 in the model's 64"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1]], {"keys": []}, "1 prompts need as many keys; got 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_arguments_are_checked_as_by_our_own_sampler(served, prompts, more, told) -> None:
    with pytest.raises(InputError, match=told):
        sample(served, prompts, **more)


def test_a_prompt_may_fill_all_the_room(served) -> None:
    (response,) = sample(served, [[1] * 20], stop_ids=[])
    assert len(response.ids) == 12


# -- where it is not asked for -------------------------------------------------------------------


def test_vllm_is_not_imported_by_anything_that_is_not_asked_for_it(tmp_path) -> None:
    """One that cannot be missed lies on the path."""
    (tmp_path / "vllm.py").write_text("raise SystemExit('vllm was imported')\n")
    code = (
        "import pkgutil, importlib, dpo\n"
        "for part in ('models', 'train', 'evaluate', 'experiment', 'report'):\n"
        "    package = importlib.import_module(f'dpo.{part}')\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "from dpo.models.vllm_backend import need_vllm\n"
        "print('all imported')\n"
        "need_vllm()\n"
    )
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(source)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.stdout, done.stderr.strip()) == ("all imported\n", "vllm was imported")


# -- vLLM itself ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore")
def test_vllm_itself_gives_greedy_responses_and_reproducible_samples(tmp_path) -> None:
    """Heads of 64 channels, which every kernel takes."""
    pytest.importorskip("vllm")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": 128, "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": VOCAB}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() >= 2 else 1
    model.save_pretrained(tmp_path)
    prompts = random_prompts()
    with closing(open_folder(tmp_path)) as served:
        greedy = sample(served, prompts, temperature=0.0)
        together = sample(served, prompts)
        apart = [sample(served, [p], keys=[f"{i}/0"])[0] for i, p in enumerate(prompts)]
    settings = {"max_new_tokens": 12, "stop_ids": [STOP], "seed": 0, "temperature": 0.0}
    keys = [str(i) for i in range(len(prompts))]
    expected = generate(model.cuda(), prompts, keys=keys, **settings)
    assert greedy == expected
    assert apart == together
    assert len({response.drawn for response in together}) > 3
