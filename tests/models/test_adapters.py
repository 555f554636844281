"""A model with an adapter: what it computes, what of it is trained, its reference, its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dpo.core import losses
from dpo.errors import InputError
from dpo.models.adapters import (
    ADAPTER_WEIGHTS,
    BASE_FILE,
    AdapterSettings,
    PolicyAtStart,
    adapter_layers,
    has_adapter,
    linear_layers,
    merge,
    merged_copy,
    open_model,
    parameter_counts,
    save_adapter,
    train_adapters,
)
from dpo.models.load import ADAPTER_CONFIG, find_model, load_model, weights_digest
from dpo.models.plan import scoring_plan
from dpo.models.recompute import enable_recomputation, recompute_without_dropout
from dpo.models.scoring import response_logps
from models.test_packed import VOCAB, padded_logps, random_trees
from tiny_models import ARCHITECTURES, make

KINDS = ("lora", "dora", "rslora")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A folder with a model of each architecture."""
    root = tmp_path_factory.mktemp("bases")
    for name in ARCHITECTURES:
        make(name, VOCAB).save_pretrained(root / name)
    return {name: root / name for name in ARCHITECTURES}


def adapted(base: Path, **settings) -> nn.Module:
    return open_model(find_model(str(base)), adapter=AdapterSettings(**settings), seed=3)


@torch.no_grad()
def trained(model: nn.Module, *, scale: float = 0.1, seed: int = 0) -> nn.Module:
    """The model as if its adapter had been trained: A, B and the magnitudes moved at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def saved(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    save_adapter(model, folder)
    return folder


def trained_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, parameters)])


def refusal(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) > 40
    return message


# -- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_new_adapter_changes_no_bit_and_its_seed_decides_it(bases, name, kind) -> None:
    sequences = random_trees()
    plain, model = load_model(find_model(str(bases[name]))), adapted(bases[name], kind=kind)
    assert torch.equal(response_logps(model, sequences), response_logps(plain, sequences))
    assert scoring_plan(model) == scoring_plan(plain)
    assert scoring_plan(model).packed
    digest = weights_digest(model)
    assert weights_digest(adapted(bases[name], kind=kind)) == digest
    other = open_model(find_model(str(bases[name])), adapter=AdapterSettings(kind=kind), seed=4)
    assert weights_digest(other) != digest


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # in peft
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_pefts_own_model_one_sequence_at_a_time(bases, name, kind, tmp_path) -> None:
    """Values and gradients, against the adapter read by peft from the files that we wrote."""
    sequences = random_trees()
    model = trained(adapted(bases[name], kind=kind, rank=3, alpha=5.0))
    base = AutoModelForCausalLM.from_pretrained(bases[name])
    theirs = peft.PeftModel.from_pretrained(base, saved(model, tmp_path / "a"), is_trainable=True)
    found, expected = response_logps(model, sequences), padded_logps(theirs, sequences)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-5)
    base = load_model(find_model(str(bases[name])))
    assert (found - padded_logps(base, sequences)).abs().max() > 0.1
    a, b = (trained_gradient(x.sum(), m) for x, m in ((found, model), (expected, theirs)))
    assert (a - b).norm() <= 5e-6 * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_alpha_over_the_rank_or_its_root(bases, kind) -> None:
    """By hand: one layer's output against its weights."""
    model = trained(adapted(bases["llama"], kind=kind, rank=4, alpha=6.0))
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    moved = layer.base_layer.weight + (6 / 4 if kind != "rslora" else 6 / 2) * change
    if kind == "dora":
        size = layer.lora_magnitude_vector["default"].weight
        moved = size[:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), x @ moved.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_checkpointing_changes_no_value(bases, name) -> None:
    model, sequences = trained(adapted(bases[name], dropout=0.5)), random_trees()

    def gradient() -> Tensor:
        model.eval()
        train_adapters(model)
        recompute_without_dropout(model)
        torch.manual_seed(0)
        return trained_gradient(response_logps(model, sequences).sum(), model)

    expected = gradient()
    enable_recomputation(model)
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-6)


# -- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_adapter_has_a_gradient_and_every_linear_layer_but_the_head_has_one(
    bases, name
) -> None:
    model = trained(adapted(bases[name], rank=2))
    response_logps(model, random_trees()).sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    of_adapter = {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert with_gradient == of_adapter
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in of_adapter)
    plain = load_model(find_model(str(bases[name])))
    head = plain.get_output_embeddings()
    matrices = [
        n
        for n, m in plain.named_modules()
        if hasattr(m, "weight") and "Norm" not in type(m).__name__
    ]
    targets = [n for n, _ in adapter_layers(model)]
    left = {n for n in matrices if n not in targets}
    embedding = {n for n, m in plain.named_modules() if isinstance(m, nn.Embedding)}
    assert left == embedding | {n for n, m in plain.named_modules() if m is head}
    counts = parameter_counts(model)
    assert counts["trained_parameters"] == sum(
        p.numel() for n, p in model.named_parameters() if n in of_adapter
    )
    assert (
        counts["parameters"] - counts["trained_parameters"] == parameter_counts(plain)["parameters"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_dpo_is_that_of_finite_differences_in_float64(bases, kind) -> None:
    """Of DoRA the magnitudes' alone: for A and B its gradient takes the rows' norms as constants
    (section 4.3 of the paper).
    """
    model = trained(adapted(bases["gpt2"], kind=kind, rank=2)).double()
    view = PolicyAtStart(model, continued=False)
    sequences = random_trees()[:8]

    def loss() -> Tensor:
        logps = response_logps(model, sequences)
        with torch.no_grad():
            reference = response_logps(view, sequences)
        pairs = (x[side::2] for x in (logps, reference) for side in (0, 1))
        return losses.dpo(*pairs, beta=0.3).sum()

    loss().backward()
    draw = torch.Generator().manual_seed(0)
    checked = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (kind == "dora" and "magnitude" not in name):
            continue
        at = int(torch.randint(parameter.numel(), (1,), generator=draw))
        flat = parameter.data.view(-1)
        start, step = flat[at].item(), 1e-5
        with torch.no_grad():
            flat[at] = start + step
            above = loss().item()
            flat[at] = start - step
            below = loss().item()
            flat[at] = start
        expected = (above - below) / (2 * step)
        assert parameter.grad.view(-1)[at].item() == pytest.approx(expected, rel=1e-5, abs=1e-8), (
            name
        )
        checked += 1
    assert checked == len(adapter_layers(model)) * (1 if kind == "dora" else 2)


@torch.no_grad()
def test_an_adapters_dropout_is_drawn_in_training_alone_and_the_models_own_is_not(bases) -> None:
    model, sequences = trained(adapted(bases["gpt2"], dropout=0.4)), random_trees()
    expected = response_logps(model, sequences)
    train_adapters(model)
    assert not torch.equal(response_logps(model, sequences), expected)
    own = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training]
    assert len(own) == len(adapter_layers(model))
    assert {m.p for m in own} == {0.4}
    model.eval()
    assert torch.equal(response_logps(model, sequences), expected)
    without = trained(adapted(bases["gpt2"]))
    train_adapters(without)
    assert torch.equal(response_logps(without, sequences), expected)


# -- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_with_a_new_adapter_the_reference_is_the_base_bit_for_bit(bases, name, kind) -> None:
    model, sequences = adapted(bases[name], kind=kind, dropout=0.5), random_trees()
    view = PolicyAtStart(model, continued=False)
    plain = load_model(find_model(str(bases[name])))
    trained(model)
    model.train()  # the model's own dropout and the adapter's
    with torch.no_grad():
        expected = response_logps(plain, sequences)
        assert torch.equal(response_logps(view, sequences), expected)
        assert torch.equal(response_logps(view, sequences), expected)
    assert all(module.training for module in model.modules())
    assert weights_digest(view) == weights_digest(plain)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_with_an_adapter_that_goes_on_the_reference_is_that_adapter_and_not_the_base(
    bases, kind, tmp_path
) -> None:
    sequences = random_trees()
    sft = saved(trained(adapted(bases["gpt2"], kind=kind)), tmp_path / "sft")
    model = adapted(sft, kind=kind, dropout=0.1)
    start = response_logps(model, sequences)
    view = PolicyAtStart(model, continued=True)
    digest = weights_digest(view)
    trained(model, seed=1)
    moved = response_logps(model, sequences)
    model.train()
    assert torch.equal(response_logps(view, sequences), start)
    model.eval()
    assert torch.equal(response_logps(model, sequences), moved)
    assert weights_digest(view) == digest
    base = response_logps(load_model(find_model(str(bases["gpt2"]))), sequences)
    assert (start - base).abs().max() > 0.1
    assert (start - moved).abs().max() > 0.1


@pytest.mark.parametrize("continued", [False, True])
def test_the_reference_may_be_asked_between_a_forward_and_its_backward_pass(
    bases, continued
) -> None:
    model, sequences = trained(adapted(bases["gpt2"])), random_trees()
    view = PolicyAtStart(model, continued=continued)
    trained(model, seed=1)
    expected = trained_gradient(response_logps(model, sequences).sum(), model)
    loss = response_logps(model, sequences).sum()
    asked = response_logps(view, sequences)
    assert not asked.requires_grad
    assert torch.equal(trained_gradient(loss, model), expected)
    assert parameter_counts(model)["trained_parameters"] == len(expected)


# -- tied embeddings -----------------------------------------------------------------------------


def test_tied_embeddings_stay_tied_with_an_adapter_saved_reloaded_and_merged(
    bases, tmp_path
) -> None:
    def tied(model: nn.Module) -> bool:
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    model = trained(adapted(bases["gpt2"]))
    folder = saved(model, tmp_path / "adapter")
    again, whole = adapted(folder), open_model(find_model(str(folder)))
    assert tied(model)
    assert tied(again)
    assert tied(whole)
    whole.save_pretrained(tmp_path / "whole")
    assert tied(load_model(find_model(str(tmp_path / "whole"))))
    names = load_file(folder / ADAPTER_WEIGHTS).keys()
    assert not [name for name in names if "wte" in name or "lm_head" in name]


@pytest.mark.parametrize("target", ["lm_head", "wte", "nowhere"])
def test_the_head_and_the_embedding_are_no_targets(bases, target) -> None:
    with pytest.raises(InputError) as error:
        adapted(bases["gpt2"], target_modules=("c_attn", target))
    assert refusal(error) == (
        f"adapter.target_modules: {target} is no linear layer between the embedding and the head "
        "of GPT2LMHeadModel, which stay as they are (there are: c_attn, c_fc, c_proj)."
    )


def test_targets_can_be_chosen(bases) -> None:
    model = adapted(bases["llama"], target_modules=("q_proj", "v_proj"))
    names = {name.rpartition(".")[2] for name, _ in adapter_layers(model)}
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("field", "value"), [("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1])]
)
def test_an_adapter_that_changes_more_than_linear_layers_is_refused(
    bases, tmp_path, field, value
) -> None:
    folder = saved(adapted(bases["gpt2"]), tmp_path / "a")
    change_config(folder, **{field: value})
    with pytest.raises(InputError, match=rf"changes more than linear layers \({field}\)") as error:
        open_model(find_model(str(folder)))
    refusal(error)


# -- files ---------------------------------------------------------------------------------------


def change_config(folder: Path, **fields) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields), encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_folder_loads_in_transformers_with_the_same_logits(bases, kind, tmp_path) -> None:
    model = trained(adapted(bases["gpt2"], kind=kind))
    folder = saved(model, tmp_path / "adapter")
    assert sorted(f.name for f in folder.iterdir()) == [BASE_FILE, ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(bases["gpt2"])
    assert (plain(ids).logits - model(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_comes_back_bitwise_and_its_files_are_the_same_every_time(
    bases, kind, tmp_path
) -> None:
    model, sequences = trained(adapted(bases["gpt2"], kind=kind)), random_trees()
    folder = saved(model, tmp_path / "a")
    again = adapted(folder, kind=kind)
    assert weights_digest(again) == weights_digest(model)
    assert torch.equal(response_logps(again, sequences), response_logps(model, sequences))
    other = saved(again, tmp_path / "b")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_merged_it_is_an_ordinary_model_with_the_same_log_probabilities(bases, name, kind) -> None:
    model, sequences = trained(adapted(bases[name], kind=kind)), random_trees()
    expected = response_logps(model, sequences)
    before = weights_digest(model)
    whole = merged_copy(model)
    assert weights_digest(model) == before  # the copy's work
    torch.testing.assert_close(response_logps(whole, sequences), expected, rtol=1e-5, atol=5e-5)
    assert not has_adapter(whole)
    assert all(p.requires_grad for p in whole.parameters())
    plain = load_model(find_model(str(bases[name])))
    assert [n for n, _ in whole.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert merge(model) is model
    assert weights_digest(model) == weights_digest(whole)


def test_an_adapter_on_another_base_than_its_own_is_refused(bases, tmp_path) -> None:
    folder = saved(adapted(bases["gpt2"]), tmp_path / "a")
    make("gpt2", VOCAB, seed=1).save_pretrained(tmp_path / "other")
    change_config(folder, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(InputError, match="its adapter was trained on other weights than") as error:
        open_model(find_model(str(folder)))
    refusal(error)
    (folder / BASE_FILE).unlink()  # an adapter from elsewhere does not say
    assert not has_adapter(open_model(find_model(str(folder))))
    change_config(folder, base_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="the base of its adapter: there is no folder") as error:
        open_model(find_model(str(folder)))
    refusal(error)


@pytest.mark.parametrize("damage", ["truncated", "missing", "another rank", "no config"])
def test_damaged_adapters_are_refused_by_folder(bases, tmp_path, damage) -> None:
    folder = saved(adapted(bases["gpt2"], rank=4), tmp_path / "a")
    file = folder / ADAPTER_WEIGHTS
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "missing":
        file.unlink()
    elif damage == "another rank":
        save_file({n: t[:3].clone() for n, t in load_file(file).items()}, file)
    else:
        (folder / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(InputError) as error:
        open_model(find_model(str(folder)))
    assert str(folder) in refusal(error)


@pytest.mark.parametrize(
    ("given", "found"),
    [({"rank": 8}, "4"), ({"alpha": 1.0}, "32"), ({"kind": "dora"}, "lora")],
)
def test_an_adapter_that_goes_on_keeps_its_form(bases, tmp_path, given, found) -> None:
    folder = saved(adapted(bases["gpt2"], rank=4), tmp_path / "a")
    with pytest.raises(InputError) as error:
        adapted(folder, **given)
    (name,) = given
    message = refusal(error)
    assert message.startswith(f"adapter.{name}: {folder} holds an adapter with {found}")
    assert "dpo merge" in message
    adapted(folder, rank=4, alpha=32.0, target_modules=("c_proj", "c_attn", "c_fc"))


def test_quantised_weights_without_a_gpu_and_adapters_without_peft_are_refused(
    bases, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as error:
        adapted(bases["gpt2"], quantize="4bit")
    assert str(error.value) == "adapter.quantize: 4bit needs a GPU; leave it out."
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError) as error:
        adapted(bases["gpt2"])
    assert refusal(error).startswith("adapter: needs peft; pip install ")


def test_a_model_without_an_adapter_has_none(bases) -> None:
    plain = load_model(find_model(str(bases["llama"])))
    assert not has_adapter(plain)
    assert linear_layers(plain).keys() == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    counts = parameter_counts(plain)
    assert counts["parameters"] == counts["trained_parameters"] > 0
