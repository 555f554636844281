"""The options of every loss are those of its function, with defaults that work."""

import inspect
import math
from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from dpo.config import DPOLossConfig, MixLossConfig, PreferenceConfig
from dpo.config_files import read_config, validate
from dpo.core import losses as core_losses
from dpo.core.family import LOSSES, Loss, needs_reference, options, tensors
from dpo.errors import InputError
from dpo.loss_config import (
    LOSS_CONFIGS,
    OPTION_KEYS,
    REFERENCE_FREE,
    BetaDPOLossConfig,
    FDPOLossConfig,
    IPOLossConfig,
    LossConfig,
    RunningConfig,
    takes_reference,
)

START = ("model=runs/sft", "out=runs/x")
MPO = "loss.mix=[{name: dpo, weight: 0.8}, {name: bco_pair, weight: 0.2}, {name: nll}]"
FILLED_BY_THE_TRAINER = {"mallows_po": {"vocab_size": 11}}
SCALARS = {"kl": 0.5, "reward_shift": 0.1, "running_margin": 0.2, "running_margin_std": 1.5}

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=lambda loss: loss.name)


def read(*words: str) -> PreferenceConfig:
    return read_config(PreferenceConfig, None, [*START, *words])


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        read(*words)
    return str(caught.value)


def batch(loss: Loss, rows: int = 4, width: int = 5) -> list[torch.Tensor]:
    """Moderate inputs in the order that the loss takes them."""
    draw = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    def of(name: str) -> torch.Tensor:
        shape = (rows, 3) if loss.kind == "list" else (rows,)
        if name in SCALARS:
            return torch.tensor(SCALARS[name], dtype=torch.float64)
        if name.endswith("lengths"):
            return torch.full(shape, width)
        if name == "mask":
            return torch.ones(shape, dtype=torch.bool)
        if name == "ranks":
            return torch.arange(3).expand(shape)
        if name == "desirable":
            return torch.arange(rows) % 2 == 0
        if "_token_" in name:
            return -2 * uniform(rows, width)
        if name.endswith("scores"):
            return 0.5 + 0.5 * uniform(*shape) if "chosen" in name else 0.5 * uniform(*shape)
        if name.endswith(("_entropy", "_forward_kl")):
            return 3 * uniform(*shape)
        return -1 - 5 * uniform(*shape)

    return [of(name) for name in tensors(loss)]


def test_every_loss_has_one_class_in_the_same_order() -> None:
    assert list(LOSS_CONFIGS) == list(LOSSES)
    union = get_args(get_args(LossConfig)[0])
    assert union == (*LOSS_CONFIGS.values(), MixLossConfig)


@every_loss
def test_fields_are_the_functions_options_and_nothing_else(loss: Loss) -> None:
    filled = FILLED_BY_THE_TRAINER.get(loss.name, {})
    arguments = LOSS_CONFIGS[loss.name]().arguments()
    assert [*arguments, *filled] == list(options(loss))
    assert LOSS_CONFIGS[loss.name].kind == loss.kind


@every_loss
def test_a_literal_option_takes_what_the_function_documents(loss: Loss) -> None:
    parameters = inspect.signature(loss.function, eval_str=True).parameters
    for name, field in LOSS_CONFIGS[loss.name].model_fields.items():
        if name in parameters and "Literal" in str(parameters[name].annotation):
            assert get_args(field.annotation) == get_args(parameters[name].annotation)


@every_loss
def test_defaults_give_finite_losses_and_gradients(loss: Loss) -> None:
    arguments = LOSS_CONFIGS[loss.name]().arguments() | FILLED_BY_THE_TRAINER.get(loss.name, {})
    given = batch(loss)
    for name, tensor in zip(tensors(loss), given, strict=True):
        if name.startswith("policy_"):
            tensor.requires_grad_()
    values = loss.function(*given, **arguments)
    values.sum().backward()
    gradients = [t.grad for t in given if t.requires_grad and t.grad is not None]
    assert values.isfinite().all()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@every_loss
def test_every_class_says_its_source_and_every_option_its_meaning(loss: Loss) -> None:
    config = LOSS_CONFIGS[loss.name]
    assert "\n" not in config.__doc__
    (cited,) = {word.strip("(),.") for word in config.__doc__.split() if "arXiv:" in word}
    assert cited in loss.source
    for name, field in config.model_fields.items():
        if name not in ("name", "running"):
            assert field.description.endswith("."), name


def test_hyper_parameters_of_running_values_are_those_of_their_update() -> None:
    update = inspect.signature(core_losses.moving_average).parameters
    keyword_only = {n for n, p in update.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(RunningConfig.model_fields) == keyword_only
    selection = inspect.signature(core_losses.beta_dpo_selection).parameters
    assert "keep" in selection
    with_running = {n for n, c in LOSS_CONFIGS.items() if "running" in c.model_fields}
    assert with_running == {n for n, loss in LOSSES.items() if "running_margin" in tensors(loss)}


def test_reference_free_losses_are_those_without_a_reference_tensor() -> None:
    assert {n for n, loss in LOSSES.items() if not needs_reference(loss)} == REFERENCE_FREE
    for name in set(LOSSES) - {"mix"}:
        assert takes_reference(read(f"loss.name={name}").loss) == (name not in REFERENCE_FREE)


@pytest.mark.parametrize(
    ("names", "takes"), [("dpo nll", True), ("simpo nll", False), ("cpo slic orpo", False)]
)
def test_a_mixture_takes_a_reference_if_one_of_its_losses_does(names: str, takes: bool) -> None:
    entries = ", ".join(f"{{name: {name}}}" for name in names.split())
    assert takes_reference(read(f"loss.mix=[{entries}]").loss) == takes


# -- reading ------------------------------------------------------------------------------------


@every_loss
def test_a_loss_is_chosen_by_name_and_survives_its_own_json(loss: Loss) -> None:
    config = read(f"loss.name={loss.name}")
    assert type(config.loss) is LOSS_CONFIGS[loss.name]
    for unset in (True, False):
        dumped = config.model_dump(mode="json", exclude_unset=unset)
        assert validate(PreferenceConfig, dumped) == config


def test_without_a_name_it_is_dpo() -> None:
    assert read().loss == DPOLossConfig()
    assert read("loss.beta=0.2").loss == DPOLossConfig(beta=0.2)


def test_a_loss_made_in_python_keeps_its_name_in_what_was_set() -> None:
    """Else a run's own configuration, read again, would be another loss."""
    assert IPOLossConfig(beta=0.2).model_dump(exclude_unset=True) == {"name": "ipo", "beta": 0.2}


def test_a_mixture_is_read_from_one_setting_and_survives_its_own_json() -> None:
    config = read(MPO)
    assert isinstance(config.loss, MixLossConfig)
    assert [(entry.loss.name, entry.weight) for entry in config.loss.mix] == [
        ("dpo", 0.8),
        ("bco_pair", 0.2),
        ("nll", 1.0),
    ]
    for unset in (True, False):
        dumped = config.model_dump(mode="json", exclude_unset=unset)
        assert validate(PreferenceConfig, dumped) == config
    assert dumped["loss"]["mix"][1] == {"name": "bco_pair", "weight": 0.2, "beta": 0.1}


def test_options_of_running_values_are_kept_apart_from_arguments() -> None:
    config = read("loss.name=beta_dpo", "loss.keep=1", "loss.running.momentum=0.5").loss
    assert isinstance(config, BetaDPOLossConfig)
    assert (config.keep, config.running.momentum) == (1.0, 0.5)
    assert config.arguments() == {"beta": 0.1, "margin_scale": 0.6}


def test_a_cap_may_be_infinite_and_other_numbers_may_not() -> None:
    assert read("loss.name=wpo", "loss.max_weight=inf").loss.arguments()["max_weight"] == math.inf
    assert refusal("loss.name=wpo", "loss.beta=inf").startswith("loss.beta: ")
    assert refusal("loss.name=wpo", "loss.max_weight=.nan").startswith("loss.max_weight: ")


def test_a_loss_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read("loss.name=ipo").loss.beta = 3.0


# -- refusing -----------------------------------------------------------------------------------

DPO_TAKES = "loss dpo takes beta and label_smoothing"
LISTED = "`dpo losses` lists them"

REFUSED: Mapping[str, Any] = {
    "an option of other losses": (
        ["loss.name=ipo", "loss.label_smoothing=0.1"],
        "loss.label_smoothing: has no effect with loss ipo, which takes beta; dpo, robust and exo "
        "take it",
    ),
    "an option of one other loss": (
        ["loss.name=ipo", "loss.tau=0.1"],
        "loss.tau: has no effect with loss ipo, which takes beta; discopop takes it",
    ),
    "an option of a loss without any": (
        ["loss.name=nll", "loss.beta=1"],
        "loss.beta: has no effect with loss nll, which takes no options; dpo, robust, ipo and 37 "
        "others take it",
    ),
    "an option of no loss": (["loss.zzz=1"], f"loss.zzz: unknown key; {DPO_TAKES}"),
    "a misspelt option": (
        ["loss.betta=1"],
        f"loss.betta: unknown key; {DPO_TAKES}; did you mean beta?",
    ),
    "a key named as the section": (["loss.loss=1"], f"loss.loss: unknown key; {DPO_TAKES}"),
    "an option at the top": (["gamma=1"], "gamma: unknown key; did you mean loss.gamma?"),
    "a misspelt name": (
        ["loss.name=simp"],
        "loss.name: there is no such loss (got 'simp'); did you mean simpo or ipo or sppo? "
        + LISTED,
    ),
    "a name like no other": (
        ["loss.name=zzzz"],
        f"loss.name: there is no such loss (got 'zzzz'); {LISTED}",
    ),
    "a name that is a list": (
        ["loss.name=[1]"],
        f"loss.name: there is no such loss (got [1]); {LISTED}",
    ),
    "a loss that is no section": (
        ["loss=3"],
        "loss: expected options of a loss, e.g. loss.name=ipo (got 3)",
    ),
    "a text that is no loss": (
        ["loss=ippo"],
        "loss.name: there is no such loss (got 'ippo'); did you mean ipo or sppo or simpo? "
        f"{LISTED}",
    ),
    "an option beside the short name": (
        ["loss=ipo", "loss.label_smoothing=0.1"],
        "loss.label_smoothing: has no effect with loss ipo, which takes beta; dpo, robust and exo "
        "take it",
    ),
    "alpha without its divergence": (
        ["loss.name=f_dpo", "loss.divergence=forward_kl", "loss.alpha=0.3"],
        "loss.alpha: has no effect with divergence forward_kl, only with alpha",
    ),
    "divergence alpha without alpha": (
        ["loss.name=f_dpo", "loss.divergence=alpha"],
        "loss.alpha: is required with divergence alpha, e.g. 0.5",
    ),
    "AlphaPO without a bend": (
        ["loss.name=alpha_po", "loss.alpha=0"],
        "loss.alpha: expected a number that is not 0; with 0 it would be simpo (got 0)",
    ),
    "running values of a loss without any": (
        ["loss.name=bco", "loss.running.momentum=0.5"],
        "loss.running: has no effect with loss bco, which takes beta; beta_dpo and alpha_dpo take "
        "it",
    ),
    "a mixture beside a name": (
        ["loss.name=ipo", "loss.mix=[{name: dpo}, {name: nll}]"],
        "loss.mix: has no effect with loss ipo; leave loss.name out, or name mix",
    ),
    "an option beside a mixture": (
        [MPO, "loss.beta=1"],
        "loss.beta: has no effect with loss mix; it belongs to an entry of loss.mix: "
        "{name: dpo, weight: 0.8}",
    ),
    "an option in the wrong entry": (
        ["loss.mix=[{name: dpo}, {name: ipo, label_smoothing: 0.1}]"],
        "loss.mix.1.label_smoothing: has no effect with loss ipo, which takes beta; dpo, robust "
        "and exo take it",
    ),
    "a wrong value in an entry": (
        ["loss.mix=[{name: dpo, beta: -1}, {name: nll}]"],
        "loss.mix.0.beta: input should be greater than 0 (got -1)",
    ),
    "a weight of nothing": (
        ["loss.mix=[{name: dpo, weight: 0}, {name: nll}]"],
        "loss.mix.0.weight: input should be greater than 0 (got 0)",
    ),
    "an entry without a name": (
        ["loss.mix=[{weight: 1}, {name: nll}]"],
        "loss.mix.0: expected the name of a loss, e.g. {name: dpo, weight: 0.8} (got "
        "{'weight': 1})",
    ),
    "a mixture inside a mixture": (
        ["loss.mix=[{name: mix}, {name: nll}]"],
        "loss.mix.0.name: a mixture takes losses of pairs, and no other mixture (got 'mix')",
    ),
    "a loss of lists inside a mixture": (
        ["loss.mix=[{name: dpo}, {name: plackett_luce}]"],
        "loss.mix.1.name: a mixture takes losses of pairs, and no other mixture (got "
        "'plackett_luce')",
    ),
    "a mixture of one": (
        ["loss.mix=[{name: dpo}]"],
        "loss.mix: list should have at least 2 items after validation, not 1 (got [{'name': "
        "'dpo'}])",
    ),
    "a mixture of nothing": (["loss.name=mix"], "loss.mix: is required, e.g. loss.mix=..."),
    "a reference of a loss without one": (
        ["loss.name=simpo", "reference=runs/sft"],
        "reference: has no effect, simpo takes no reference",
    ),
    "a moving reference of a loss without one": (
        ["loss.name=simpo", "moving_reference.every=64"],
        "moving_reference: has no effect, simpo takes no reference",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_makes_no_sense_is_one_sentence_by_the_users_own_key(case: Any) -> None:
    words, sentence = case
    assert refusal(*words) == sentence


def test_all_problems_of_a_loss_are_told_at_once() -> None:
    message = refusal("loss.name=simpo", "loss.beta=0", "loss.gamma=-1", "loss.alpha=1")
    assert message.startswith("3 problems in the configuration:")
    for key in ("loss.beta: ", "loss.gamma: ", "loss.alpha: has no effect with loss simpo"):
        assert key in message


def test_moving_reference_is_off_and_has_the_defaults_of_tr_dpo() -> None:
    assert read().moving_reference is None
    moving = read("moving_reference={}").moving_reference
    assert (moving.mix, moving.every) == (0.6, 512)
    for wrong in ("mix=0", "mix=1.1", "mix=.nan", "every=0"):
        key = wrong.partition("=")[0]
        assert refusal(f"moving_reference.{wrong}").startswith(f"moving_reference.{key}: ")


def test_option_keys_are_those_of_all_losses() -> None:
    assert {"loss.beta", "loss.top", "loss.reward_scale", "loss.running"} <= set(OPTION_KEYS)
    assert "loss.name" not in OPTION_KEYS


def test_f_dpo_takes_alpha_with_its_divergence() -> None:
    config = read("loss.name=f_dpo", "loss.divergence=alpha", "loss.alpha=0.3").loss
    assert config == FDPOLossConfig(divergence="alpha", alpha=0.3)
