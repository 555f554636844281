"""What every pairwise loss promises, checked on all of them.

A loss enters by its line in `LOSSES` and a case here: options, and what is expected of it.
"""

from __future__ import annotations

import doctest
import inspect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from core import loss_transcriptions
from dpo.core.family import LOSSES, Loss, needs_reference, options, tensors

BATCH, WIDTH = 6, 6
LN2 = math.log(2)
STATE = {"reward_shift": 0.3, "running_margin": 0.4, "running_margin_std": 1.7}


@dataclass(frozen=True)
class Case:
    """A loss with options.

    Attributes:
        name: its name in the family.
        options: hyper-parameters.
        at_reference: the loss of every pair when policy and reference are equal; None where it
            depends on lengths, scores or tokens, or there is no reference.
        swap: what happens when chosen and rejected change places. "complement": the two losses are
            negative log-probabilities that add to 1. "invariant": nothing. "none": neither.
        stopped: policy tensors that get no gradient.
        coupled: whether a pair's loss depends on the other pairs.
    """

    name: str
    options: Mapping[str, Any]
    at_reference: float | None = None
    swap: Literal["complement", "invariant", "none"] = "none"
    stopped: tuple[str, ...] = ()
    coupled: bool = False

    @property
    def loss(self) -> Loss:
        return LOSSES[self.name]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        arguments = [inputs[name] for name in tensors(self.loss)]
        return self.loss.function(*arguments, **self.options)


def _f_dpo(divergence: str, alpha: float | None = None) -> dict[str, Any]:
    return {"beta": 0.7, "divergence": divergence, "alpha": alpha}


WPO_TOKENS = (
    "policy_chosen_token_logps",
    "policy_rejected_token_logps",
    "policy_chosen_token_log_collision",
    "policy_rejected_token_log_collision",
)

CASES = [
    Case("dpo", {"beta": 0.7, "label_smoothing": 0.0}, LN2, "complement"),
    Case("dpo", {"beta": 0.7, "label_smoothing": 0.2}, LN2),
    Case("robust", {"beta": 0.7, "label_smoothing": 0.2}, LN2),
    Case("ipo", {"beta": 0.4}, 1 / (4 * 0.4**2)),
    Case("hinge", {"beta": 0.7}, 1.0),
    Case("exo", {"beta": 0.7, "label_smoothing": 0.1}, -LN2 - math.log(0.9 * 0.1) / 2),
    Case("nca_pair", {"beta": 0.7}, 2 * LN2),
    Case("bco_pair", {"beta": 0.7}, math.log1p(math.exp(0.3)) + math.log1p(math.exp(-0.3))),
    Case("sppo", {"beta": 0.4}, 1 / (2 * 0.4**2)),
    Case("sppo_soft", {"beta": 0.4}, swap="invariant"),
    Case("aot", {"beta": 0.7}, LN2, "complement", coupled=True),
    Case("apo_zero", {"beta": 0.7}, 1.0),
    Case("apo_down", {"beta": 0.7}, 1.0),
    Case("discopop", {"beta": 0.7, "tau": 0.3}, (LN2 + 1) / 2),
    Case("f_dpo", _f_dpo("reverse_kl"), LN2, "complement"),
    Case("f_dpo", _f_dpo("forward_kl"), LN2, "complement"),
    Case("f_dpo", _f_dpo("js"), LN2, "complement"),
    Case("f_dpo", _f_dpo("alpha", 0.4), LN2, "complement"),
    Case("chi_po", {"beta": 0.3, "max_reward": 2.0}, LN2, "complement"),
    Case("squared_po", {"beta": 0.3}, LN2, "complement"),
    Case("r_dpo", {"beta": 0.7, "alpha": 0.2}, swap="complement"),
    Case("length_normalised_dpo", {"beta": 2.0}, LN2, "complement"),
    Case("dpop", {"beta": 0.7, "penalty": 2.0}, LN2),
    Case("beta_dpo", {"beta": 0.7, "margin_scale": 0.5}, LN2, coupled=True),
    Case("cal_dpo", {"beta": 0.4}, LN2 + 1 / (4 * 0.4**2)),
    Case("odpo", {"beta": 0.7, "alpha": 0.5}),
    Case(
        "rpo",
        {"beta": 0.7, "reward_scale": 1.3, "divergence": "backward_kl"},
        swap="invariant",
    ),
    Case("rpo", {"beta": 0.7, "reward_scale": 1.3, "divergence": "forward_kl"}, swap="invariant"),
    Case("rpo", {"beta": 0.7, "reward_scale": 1.3, "divergence": "squared"}, swap="invariant"),
    Case("alpha_dpo", {"beta": 2.0, "gamma": 0.6, "alpha": 0.2}),
    Case("nll", {}),
    Case("unlikelihood", {"alpha": 0.6}),
    Case("simpo", {"beta": 2.0, "gamma": 0.6}),
    Case("simpo", {"beta": 2.0, "gamma": 0.0}, swap="complement"),
    Case("cpo", {"beta": 0.3, "nll_weight": 0.5}),
    Case("cpo", {"beta": 0.3, "nll_weight": 0.0}, swap="complement"),
    Case("orpo", {"beta": 0.3, "nll_weight": 1.0}),
    Case("orpo", {"beta": 1.0, "nll_weight": 0.0}, swap="complement"),
    Case("alpha_po", {"beta": 1.5, "gamma": 0.6, "alpha": 0.25}),
    Case("alpha_po", {"beta": 1.5, "gamma": 0.0, "alpha": -0.25}, swap="complement"),
    Case("slic", {"delta": 1.0, "nll_weight": 0.5}),
    Case("tdpo1", {"beta": 0.7}, LN2, "complement"),
    Case("tdpo2", {"beta": 0.7, "alpha": 0.5}, LN2, "complement", stopped=("chosen_forward_kl",)),
    Case("ld_dpo", {"beta": 0.7, "alpha": 0.4}, LN2, "complement"),
    Case("wpo", {"beta": 0.7, "max_weight": 1.0}, stopped=WPO_TOKENS),
    Case("wpo", {"beta": 0.7, "max_weight": math.inf}, stopped=WPO_TOKENS),
    Case(
        "mallows_po",
        {"beta": 0.7, "dispersion_scale": 1.5, "vocab_size": 11},
        LN2,
        "complement",
    ),
]


def _label(case: Case) -> str:
    words = [case.name, *(str(value) for value in case.options.values())]
    return "-".join(words)


def of_cases(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=_label)


every_case = of_cases(CASES)


def random_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """A batch of moderate inputs in float64; lengths are integers, padding is 0."""
    draw = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=draw, dtype=torch.float64)

    lengths = {
        which: torch.randint(1, WIDTH, (BATCH,), generator=draw) for which in ("chosen", "rejected")
    }
    inputs = {}
    for name in tensors(case.loss):
        which = "chosen" if "chosen" in name else "rejected"
        if name in STATE:
            value = torch.tensor(STATE[name], dtype=torch.float64)
        elif name.endswith("_lengths"):
            value = lengths[which]
        elif name.endswith("_scores"):
            value = between(0.5, 1.0, BATCH) if which == "chosen" else between(0.0, 0.5, BATCH)
        elif "_token_" in name:
            present = torch.arange(WIDTH) < lengths[which].unsqueeze(-1)
            value = between(-2.0, -0.1, BATCH, WIDTH) * present
        elif name.endswith(("_forward_kl", "_entropy")):
            value = between(0.1, 2.0, BATCH) * lengths[which]
        else:
            value = between(-6.0, -1.0, BATCH)
        inputs[name] = value
    return inputs


def as_pairs(inputs: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [
        {name: (value if value.dim() == 0 else value[i]).tolist() for name, value in inputs.items()}
        for i in range(BATCH)
    ]


def transcribed(case: Case, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> Tensor:
    values = loss_transcriptions.evaluate(
        case.name, as_pairs(inputs), case.options, as_pairs(fixed)
    )
    return torch.tensor(values, dtype=torch.float64)


def has_gradient(case: Case, name: str) -> bool:
    return name.startswith("policy_") or name.endswith("_forward_kl")


def swapped(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Chosen and rejected exchanged; what has no counterpart stays."""

    def counterpart(name: str) -> str:
        if "chosen" in name:
            return name.replace("chosen", "rejected")
        return name.replace("rejected", "chosen")

    return {name: inputs.get(counterpart(name), value) for name, value in inputs.items()}


def test_every_pairwise_loss_has_a_case_and_a_transcription() -> None:
    pairwise = {loss.name for loss in LOSSES.values() if loss.kind == "pair"}
    assert {case.name for case in CASES} == pairwise
    assert loss_transcriptions.OF_A_PAIR.keys() | loss_transcriptions.OF_A_BATCH == pairwise


@pytest.mark.parametrize("loss", LOSSES.values(), ids=lambda loss: loss.name)
def test_entries_are_complete_and_agree_with_their_functions(loss: Loss) -> None:
    assert loss.formula
    assert "\n" not in loss.formula
    documentation = inspect.getdoc(loss.function)
    for identifier in (word for word in loss.source.split() if word.startswith("arXiv:")):
        assert identifier.rstrip(",;") in documentation
    assert "arXiv:" in loss.source
    assert "TRL" in documentation
    assert doctest.DocTestFinder().find(loss.function)[0].examples


@every_case
def test_signature_follows_the_contract(case: Case) -> None:
    """Options of the case are all that the function takes; each tensor's name is a known one."""
    assert set(options(case.loss)) == set(case.options)
    known = {
        f"{owner}_{which}_{what}"
        for owner in ("policy", "reference")
        for which in ("chosen", "rejected")
        for what in ("logps", "token_logps", "token_log_collision", "entropy")
    }
    known |= {
        f"{which}_{what}"
        for which in ("chosen", "rejected")
        for what in ("lengths", "scores", "forward_kl")
    }
    assert set(tensors(case.loss)) <= known | STATE.keys()
    parameters = inspect.signature(case.loss.function).parameters.values()
    with_default = {p.name for p in parameters if p.default is not inspect.Parameter.empty}
    assert with_default <= {"label_smoothing"}


def test_reference_free_losses_are_those_without_a_reference_tensor() -> None:
    free = {
        loss.name for loss in LOSSES.values() if loss.kind == "pair" and not needs_reference(loss)
    }
    assert free == {"nll", "unlikelihood", "simpo", "cpo", "orpo", "alpha_po", "slic"}


@every_case
@pytest.mark.parametrize("seed", range(5))
def test_value_is_the_transcription_s(case: Case, seed: int) -> None:
    inputs = random_inputs(case, seed)
    torch.testing.assert_close(case(inputs), transcribed(case, inputs, inputs), rtol=1e-12, atol=0)


@every_case
def test_gradient_is_the_transcription_s_by_central_differences(case: Case) -> None:
    """With respect to every tensor that may have a gradient, each pair with a weight of its own."""
    inputs = random_inputs(case, seed=7)
    weights = torch.linspace(0.5, 1.5, BATCH, dtype=torch.float64)
    names = [name for name in inputs if has_gradient(case, name) and name not in case.stopped]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    (case(inputs | leaves) * weights).sum().backward()

    step = 1e-5
    for name in names:
        expected = torch.zeros_like(inputs[name])
        for index in itertools.product(*(range(size) for size in expected.shape)):
            totals = []
            for sign in (1, -1):
                moved = inputs[name].clone()
                moved[index] += sign * step
                losses = transcribed(case, inputs | {name: moved}, fixed=inputs)
                totals.append((losses * weights).sum().item())
            expected[index] = (totals[0] - totals[1]) / (2 * step)
        torch.testing.assert_close(leaves[name].grad, expected, rtol=1e-6, atol=1e-8)
        assert expected.abs().max() > 1e-3, name


@every_case
def test_gradient_reaches_the_policy_alone(case: Case) -> None:
    inputs = random_inputs(case)
    floating = {n: v.clone().requires_grad_() for n, v in inputs.items() if v.is_floating_point()}
    case(inputs | floating).sum().backward()
    reached = {name for name, leaf in floating.items() if leaf.grad is not None}
    allowed = {name for name in floating if has_gradient(case, name)}
    assert reached == allowed - set(case.stopped)


@of_cases([case for case in CASES if case.at_reference is not None])
def test_value_at_the_reference(case: Case) -> None:
    inputs = random_inputs(case)
    for name in inputs:
        if name.startswith("policy_"):
            inputs[name] = inputs[name.replace("policy_", "reference_")]
        elif name.endswith("_forward_kl"):
            inputs[name] = torch.zeros_like(inputs[name])
    expected = torch.full((BATCH,), case.at_reference, dtype=torch.float64)
    torch.testing.assert_close(case(inputs), expected, rtol=0, atol=1e-14)


@of_cases([case for case in CASES if case.name not in {"odpo", "nll"}])
def test_swapping_chosen_and_rejected(case: Case) -> None:
    """`nll` sees the chosen response alone; `odpo` refuses the pair with the lower score first."""
    inputs = random_inputs(case)
    straight, exchanged = case(inputs), case(swapped(inputs))
    complement = torch.exp(-straight) + torch.exp(-exchanged)
    complementary = bool(torch.allclose(complement, torch.ones_like(complement), atol=1e-12))
    invariant = bool(torch.allclose(straight, exchanged, atol=1e-12))
    assert complementary == (case.swap == "complement")
    assert invariant == (case.swap == "invariant")


@every_case
def test_pairs_do_not_see_each_other_unless_stated(case: Case) -> None:
    inputs = random_inputs(case)
    alone = [
        case({n: v if v.dim() == 0 else v[i : i + 1] for n, v in inputs.items()})
        for i in range(BATCH)
    ]
    separate = bool(torch.allclose(case(inputs), torch.cat(alone), rtol=1e-12, atol=0))
    assert separate == (not case.coupled)
    assert ("Depends on the batch" in inspect.getdoc(case.loss.function)) == case.coupled


@every_case
def test_order_of_pairs_does_not_matter(case: Case) -> None:
    inputs = random_inputs(case)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {n: v if v.dim() == 0 else v[order] for n, v in inputs.items()}
    torch.testing.assert_close(case(shuffled), case(inputs)[order], rtol=1e-12, atol=0)


def extreme_inputs(case: Case) -> dict[str, Tensor]:
    """Every combination of log-probabilities 0, -1 and -10,001: log-ratios up to 1e4; float32."""
    levels = torch.tensor([0.0, -1.0, -10_001.0])
    columns = torch.cartesian_prod(levels, levels, levels, levels).T
    roles = ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]
    logps = dict(zip(roles, columns, strict=True))
    size = columns.shape[1]
    alternating = torch.tensor([0.0, 1e4, 0.0]).repeat(size // 3)
    inputs = {}
    for name in tensors(case.loss):
        role = "_".join(name.split("_")[:2])
        if name in STATE:
            value = torch.tensor(STATE[name])
        elif name.endswith("_lengths"):
            value = torch.ones(size, dtype=torch.int64)
        elif name.endswith("_scores"):
            value = torch.full((size,), 0.9 if "chosen" in name else 0.1)
        elif name.endswith("_token_logps"):
            value = logps[role].unsqueeze(-1)
        elif name.endswith("_token_log_collision"):
            value = torch.full((size, 1), -11.0)
        elif name.endswith(("_forward_kl", "_entropy")):
            value = alternating if "chosen" in name else alternating.roll(1)
        else:
            value = logps[role]
        inputs[name] = value
    return inputs


@every_case
def test_huge_margins_stay_finite_in_float32(case: Case) -> None:
    whole = extreme_inputs(case)
    batches = [whole]
    if case.coupled:
        batches += [
            {n: v if v.dim() == 0 else v[i : i + 1] for n, v in whole.items()}
            for i in range(len(whole["policy_chosen_logps"]))
        ]
    for inputs in batches:
        leaves = {
            n: v.clone().requires_grad_()
            for n, v in inputs.items()
            if has_gradient(case, n) and n not in case.stopped
        }
        found = case(inputs | leaves)
        found.sum().backward()
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        for name, leaf in leaves.items():
            assert leaf.grad.isfinite().all(), name


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [torch.int64, torch.float64])
def test_dtype_and_shape_are_kept(case: Case, dtype: torch.dtype, lengths: torch.dtype) -> None:
    """Log-probabilities decide the dtype; lengths may be integers."""
    inputs = random_inputs(case)
    converted = {
        name: value.to(dtype if value.is_floating_point() else lengths)
        for name, value in inputs.items()
    }
    found = case(converted)
    assert found.shape == (BATCH,)
    if dtype == torch.float64 or lengths == torch.int64:
        assert found.dtype == dtype
    torch.testing.assert_close(found.double(), case(inputs), rtol=1e-4, atol=1e-5)
