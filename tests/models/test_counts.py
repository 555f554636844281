"""Counts of models without memory are those of models with it."""

import pytest
import torch
from transformers import AutoConfig, BloomConfig, BloomForCausalLM

from dpo.data.pack import pack, pad
from dpo.data.tokenize import TokenSequence
from dpo.errors import InputError
from dpo.models.adapters import AdapterSettings
from dpo.models.counts import (
    Architecture,
    fresh_architecture,
    measure_model,
    measure_pass,
    read_architecture,
)
from dpo.models.forward import head_inputs
from dpo.models.load import ModelSource, find_model, fuse_activations
from tiny_models import make

NOWHERE = ModelSource("", local=True)


def pairs():
    """Two prompts with two responses each."""
    ids = list(range(3, 60))
    return [
        TokenSequence((*ids[start : start + 12], *ids[30 : 30 + length]), 12)
        for start in (0, 12)
        for length in (9, 14)
    ]


def really_kept(model, batch):
    """Bytes of storages that autograd keeps of a forward pass with real tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = head_inputs(model, batch)
    assert outputs.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def bloom():
    """A model that takes no registered attention and is run on padded rows."""
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "bloom"])
def test_what_a_forward_pass_keeps_is_what_real_tensors_show(name):
    model = bloom() if name == "bloom" else fuse_activations(make(name, 300))
    batch = (pad if name == "bloom" else pack)(pairs())
    size = measure_pass(Architecture(model.config, NOWHERE), [batch], precision="fp32")
    assert size.outside_kept + 2 * size.layer_kept == really_kept(model, batch)
    assert size.tokens == batch.ids.size
    assert size.predicted == len(batch.column)
    assert 0 < size.layer_passing < 2 * size.layer_kept


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_counts_are_those_of_the_model(name):
    model = make(name, 300)
    size = measure_model(Architecture(model.config, NOWHERE).build())
    assert size.parameters == size.trained == sum(p.numel() for p in model.parameters())
    assert (size.layers, size.width, size.vocab) == (2, 32, 300)
    assert size.tied == (name == "gpt2")
    outside = size.parameters - 2 * size.layer_parameters
    assert outside == sum(
        p.numel() for n, p in model.named_parameters() if ".h." not in n and ".layers." not in n
    )


def test_gpt2_medium_has_the_parameters_it_has():
    architecture = fresh_architecture(
        width=1024, layers=24, heads=16, positions=1024, vocab_size=50257, pure_bf16=False
    )
    size = measure_model(architecture.build())
    assert size.parameters == 354_823_168
    assert size.layer_products == 12 * 1024**2


def test_an_adapter_trains_its_own_numbers_and_keeps_fewer():
    config = make("llama", 300).config
    whole = Architecture(config, NOWHERE)
    adapted = Architecture(config, NOWHERE, AdapterSettings("lora", rank=4))
    size = measure_model(adapted.build())
    widths = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)}
    widths |= {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
    assert size.trained == 2 * 4 * sum(a + b for a, b in widths.values())
    assert not size.head_trained
    assert measure_pass(adapted, [pack(pairs())], precision="fp32").layer_kept > 0
    assert measure_model(whole.build()).trained > size.trained


def test_bfloat16_weights_keep_half_and_autocast_keeps_copies_of_weights():
    config = make("llama", 300).config
    sizes = {
        "fp32": measure_pass(Architecture(config, NOWHERE), [pack(pairs())], precision="fp32"),
        "bf16": measure_pass(Architecture(config, NOWHERE), [pack(pairs())], precision="bf16"),
    }
    model = measure_model(Architecture(config, NOWHERE).build())
    assert sizes["bf16"].layer_copies == 2 * model.layer_products
    assert sizes["fp32"].layer_copies == 0
    rounded = Architecture(config, NOWHERE, pure_bf16=True)
    assert {p.dtype for p in rounded.build().parameters()} == {torch.bfloat16}


def test_a_folder_tells_its_architecture_without_weights(tmp_path):
    make("llama", 300).config.save_pretrained(tmp_path)
    found = read_architecture(find_model(str(tmp_path)), adapter=None, pure_bf16=False)
    assert measure_model(found.build()).vocab == 300
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


def test_a_model_that_is_not_there_is_said_in_a_sentence():
    source = ModelSource("no-one/nothing", local=False)
    with pytest.raises(InputError, match="no local folder"):
        read_architecture(source, adapter=None, pure_bf16=False)
