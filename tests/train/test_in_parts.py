"""A model in parts is what the ordinary loader gives, to the bit, and nobody holds it whole."""

import json
import os
from itertools import accumulate

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from dpo.config import DistributedConfig
from dpo.errors import InputError
from dpo.models import parts
from dpo.models.adapters import AdapterSettings, add_adapter, open_model, save_adapter
from dpo.models.load import find_model, load_blueprint, load_model, own_files, weights_digest
from dpo.models.plan import scoring_plan
from dpo.train import ranks
from dpo.train.in_parts import InParts
from tiny_models import make
from train.several_ranks import on_ranks

FSDP = DistributedConfig(kind="fsdp")
VOCAB = 301  # odd: the parts are not equal


def saved(name, folder, **options):
    make(name, VOCAB).save_pretrained(folder, **options)
    return folder


def bare_gpt2(folder):
    """As on the hub: without the prefix, with masks that are no weights."""
    saved("gpt2", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_bfloat16(folder):
    saved("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    rounded = {name: t.bfloat16() for name, t in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def merged_adapter(folder):
    base = find_model(str(saved("gpt2", folder / "base")))
    model = add_adapter(load_model(base), AdapterSettings(kind="dora"), source=base, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter")
    return folder / "adapter"


FOLDERS = {
    "gpt2": lambda folder: saved("gpt2", folder),
    "llama in several files": lambda folder: saved("llama", folder, max_shard_size="20KB"),
    "neox": lambda folder: saved("neox", folder),
    "gemma2": lambda folder: saved("gemma2", folder),
    "bfloat16": in_bfloat16,
    "gpt2 as on the hub": bare_gpt2,
    "an adapter": merged_adapter,
}
READ_BY_ROWS = {"gpt2", "llama in several files", "gemma2", "bfloat16"}
"""The others' files name the weights otherwise than the model does, or hold more than it takes."""


def check_same_tensors(found, expected):
    """Parameters and buffers of two whole models, in their order."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = list(getattr(found, kind)()), list(getattr(expected, kind)())
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        for (name, tensor), (_, other) in zip(ours, theirs, strict=True):
            assert tensor.dtype == other.dtype, name
            assert torch.equal(tensor, other), name


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_that_is_opened_in_parts_is_the_ordinary_one_to_the_bit(name, tmp_path):
    folder = FOLDERS[name](tmp_path / "model")
    source = find_model(str(folder))
    expected = open_model(source)
    if name != "an adapter":
        by_rows = own_files(source, load_blueprint(source)) is not None
        assert by_rows == (name in READ_BY_ROWS)

    def opened(rank):
        with ranks.joined(FSDP):
            model = InParts().load(source)
            assert parts.is_sharded(model)
            held = [parts.local(p).numel() for p in model.parameters()]
            assert sum(held) < 0.6 * sum(p.numel() for p in expected.parameters())
            assert weights_digest(model) == weights_digest(expected)
            assert scoring_plan(model) == scoring_plan(expected)
            assert model.config.to_json_string() == expected.config.to_json_string()
            copy = parts.whole_copy(model)
            if rank == 0:
                check_same_tensors(copy, expected)
                assert copy.get_output_embeddings().weight.data_ptr() in {
                    p.data_ptr() for p in copy.parameters()
                }

    assert on_ranks(2, opened) == [0, 0]


def test_a_hub_model_is_read_by_rows_as_well(tmp_path, monkeypatch):
    """From the hub's cache, as it lies on the disk after a download."""
    commit, kept = "0123456789" * 4, tmp_path / "models--own--model"
    saved("llama", kept / "snapshots" / commit, max_shard_size="20KB")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = find_model("own/model")
    expected = load_model(source)
    assert not source.local
    assert own_files(source, load_blueprint(source)).keys() == parts.tensors_of(expected).keys()

    def opened(rank):
        with ranks.joined(FSDP):
            assert weights_digest(InParts().load(source)) == weights_digest(expected)

    assert on_ranks(2, opened) == [0, 0]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("pure_bf16", [False, True])
def test_an_adapter_that_is_put_on_parts_is_the_ordinary_one_to_the_bit(kind, pure_bf16, tmp_path):
    source = find_model(str(saved("gpt2", tmp_path / "model")))
    options = {"adapter": AdapterSettings(kind=kind), "seed": 3, "pure_bf16": pure_bf16}
    expected = open_model(source, **options)
    again = merged_adapter(tmp_path / "run")
    continued = open_model(find_model(str(again)), adapter=AdapterSettings(kind="dora"))

    def opened(rank):
        with ranks.joined(FSDP):
            for ours, theirs in [
                (open_model(source, **options, held=InParts()), expected),
                (
                    open_model(
                        find_model(str(again)),
                        adapter=AdapterSettings(kind="dora"),
                        held=InParts(),
                    ),
                    continued,
                ),
            ]:
                copy = parts.whole_copy(ours)
                if rank == 0:
                    check_same_tensors(copy, theirs)
                trained = [n for n, p in ours.named_parameters() if p.requires_grad]
                assert trained == [n for n, p in theirs.named_parameters() if p.requires_grad]

    assert on_ranks(2, opened) == [0, 0]


def big_model(folder):
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=384,
        intermediate_size=1408,
        num_hidden_layers=24,
        num_attention_heads=6,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return folder, 4 * sum(p.numel() for p in model.parameters())


def lacking(tensors):
    del tensors["transformer.h.0.mlp.c_fc.weight"]


def misshapen(tensors):
    tensors["transformer.ln_f.bias"] = torch.zeros(5)


def damage(change, folder):
    tensors = load_file(saved("gpt2", folder) / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "a tensor is missing": lambda folder: damage(lacking, folder),
    "a tensor has another shape": lambda folder: damage(misshapen, folder),
    "the file is cut": lambda folder: os.truncate(saved("gpt2", folder) / "model.safetensors", 999),
    "it looks ahead": lambda folder: BertLMHeadModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(folder),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_the_ordinary_loader_refuses_all_ranks_refuse_with_the_same_words(name, tmp_path):
    DAMAGES[name](tmp_path / "model")
    source = find_model(str(tmp_path / "model"))
    with pytest.raises(InputError) as expected:
        load_model(source)

    def opened(rank):
        with ranks.joined(FSDP), pytest.raises(InputError) as found:
            InParts().load(source)
        assert str(found.value) == str(expected.value)

    assert on_ranks(2, opened) == [0, 0]


def most_held(work, largest):
    """The most bytes that tensors which the work makes hold at once, by torch's own account.

    Args:
        largest: bytes of a tensor; one that is larger is a file that is mapped, not memory.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    changes = [(time, change) for time, change in changes if abs(change) <= largest]
    return max(accumulate(change for _, change in changes))


@pytest.mark.parametrize("by_rows", [True, False])
def test_no_process_but_the_first_ever_holds_the_whole_model(by_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the account is that of one thread
    folder, size = big_model(tmp_path / "model")  # in float32; the file has half of it
    assert size > 200e6
    if not by_rows:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)  # as older ones do
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        del tensors
    source = find_model(str(folder))

    def opened(rank):
        with ranks.joined(FSDP):
            held = most_held(lambda: InParts().load(source), largest=size / 4)
        (tmp_path / f"{rank}.json").write_text(json.dumps(held / size))

    assert on_ranks(2, opened) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert 0.5 < second < 0.85  # a half, and some blocks while the model is tried out
    assert 0.5 < first < 0.85 if by_rows else 1.4 < first < 1.6
