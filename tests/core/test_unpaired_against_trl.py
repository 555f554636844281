"""KTO, BCO, NCA and AOT against the code of TRL's own trainers.

TRL's losses are a few lines inside `_compute_loss`, which also runs the model and logs. It is
called here unbound, on a stand-in that has just the attributes that it reads; its "model" returns
the log-probabilities that the test chose, one token a response.
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from dpo.core import unpaired

BETA = 0.3


@pytest.fixture(scope="module")
def trl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("trl", reason="needs trl, to compare with its trainers")


def draw(seed: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model:
    """Returns the given log-probabilities, (B,), as those of the one token that is scored."""

    def __init__(self, logps: torch.Tensor) -> None:
        self.logps = logps

    def __call__(self, **_: Any) -> SimpleNamespace:
        column = self.logps.unsqueeze(-1)
        zero = torch.zeros_like(column)
        return SimpleNamespace(
            log_probs=column, entropy=zero, mean_logits=zero, is_top1=zero.bool()
        )


def trainer(**attributes: Any) -> SimpleNamespace:
    """What both trainers read from `self`: one device, nothing to gather."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def two_tokens(rows: int) -> dict[str, torch.Tensor]:
    """A prompt of one token and a response of one, for each row."""
    return {
        "input_ids": torch.zeros(rows, 2, dtype=torch.long),
        "attention_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]]).expand(rows, 2),
    }


def trl_kto(
    trl: Any,
    logps: tuple[torch.Tensor, torch.Tensor],
    kl_logps: tuple[torch.Tensor, torch.Tensor],
    desirable: torch.Tensor,
    weights: dict[str, float],
) -> torch.Tensor:
    policy, reference = logps
    myself = trainer(
        calculate_KL=True,
        loss_type="kto",
        _compute_kl_logps=lambda model, batch: kl_logps[0],
        **weights,
    )
    batch = two_tokens(len(policy)) | {
        "label": desirable,
        "ref_logps": reference,
        "ref_KL_logps": kl_logps[1],
    }
    return trl.KTOTrainer._compute_loss(myself, Model(policy), batch, False)


def trl_pairs(
    trl: Any,
    loss_type: str,
    policy: torch.Tensor,
    reference: torch.Tensor,
) -> torch.Tensor:
    """The mean loss of TRL's DPOTrainer for [all chosen, all rejected]."""
    myself = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
    )
    ref_chosen, ref_rejected = reference.chunk(2)
    batch = two_tokens(len(policy)) | {
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trl.DPOTrainer._compute_loss(myself, Model(policy), batch, False)


@pytest.mark.parametrize("kl_shift", [2.0, -2.0])  # the estimate positive, and cut at 0
@pytest.mark.parametrize(
    "labels", [[True, False, True, False, False], [True] * 5, [False] * 5], ids=str
)
def test_kto_and_its_gradient_are_trls(trl: Any, labels: list[bool], kl_shift: float) -> None:
    desirable = torch.tensor(labels)
    reference, kl_reference = draw(1, 5), draw(2, 5)
    kl_policy = kl_reference + draw(3, 5) + kl_shift
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    theirs, ours = (5 * draw(0, 5)).requires_grad_(), (5 * draw(0, 5)).requires_grad_()
    expected = trl_kto(trl, (theirs, reference), (kl_policy, kl_reference), desirable, weights)
    z0 = unpaired.kto_reference_point(kl_policy, kl_reference)
    found = unpaired.kto(ours, reference, desirable, z0, beta=BETA, **weights).mean()
    assert (z0.item() > 0) == (kl_shift > 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.backward()
    found.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_trl_rounds_small_kto_losses_away(trl: Any) -> None:
    """In float32 TRL's `1 - sigmoid` is 0 where the loss is still e^-30; ours keeps it."""
    policy, zero, desirable = torch.tensor([100.0]), torch.zeros(1), torch.tensor([True])
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    expected = trl_kto(trl, (policy, zero), (zero, zero), desirable, weights)
    found = unpaired.kto(policy, zero, desirable, torch.tensor(0.0), beta=BETA, **weights)
    assert expected.item() == 0.0
    assert 0 < found.item() < 1e-12


HALVES = torch.tensor([True] * 4 + [False] * 4)


def test_bco_without_a_shift_is_trls_pair_loss_and_with_one_it_is_not(trl: Any) -> None:
    """`bco_pair` adds both responses of a pair, so it is twice a mean over responses."""
    policy, reference = 4 * draw(0, 8), draw(1, 8)
    expected = trl_pairs(trl, "bco_pair", policy, reference)
    none, shift = torch.tensor(0.0), torch.tensor(0.5)
    found = unpaired.bco(policy, reference, HALVES, none, beta=BETA).mean()
    torch.testing.assert_close(2 * found, expected, rtol=1e-12, atol=1e-12)
    shifted = unpaired.bco(policy, reference, HALVES, shift, beta=BETA).mean()
    assert abs(2 * shifted - expected) > 1e-2


def test_bco_has_no_trainer_in_trl_any_more(trl: Any) -> None:
    """Why the shift is not compared: see the next test for the lines that did it."""
    assert not hasattr(trl, "BCOTrainer")


def test_bco_and_its_shift_are_those_of_trls_former_trainer() -> None:
    """TRL 0.24's BCOTrainer, written out: update the running mean with the batch, then classify
    against it.
    """
    mean, count = 0.0, 1e-24
    shift, seen = torch.zeros((), dtype=torch.float64), torch.tensor(0)
    for step, size in enumerate([5, 2, 7]):
        policy, reference = 4 * draw(2 * step, size), draw(2 * step + 1, size)
        desirable = draw(90 + step, size) > 0
        rewards = BETA * (policy - reference)
        mean += (rewards.mean().item() - mean) * size / (count + size)
        count += size
        expected = torch.where(desirable, -logsigmoid(rewards - mean), -logsigmoid(mean - rewards))

        shift, seen = unpaired.update_reward_shift(shift, seen, policy, reference, beta=BETA)
        found = unpaired.bco(policy, reference, desirable, shift, beta=BETA)
        assert shift.item() == pytest.approx(mean, abs=1e-14)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_nca_at_half_is_trls_pair_loss(trl: Any) -> None:
    policy, reference = 4 * draw(0, 8), draw(1, 8)
    expected = trl_pairs(trl, "nca_pair", policy, reference)
    options = {"beta": BETA, "desirable_fraction": 0.5}
    found = unpaired.nca_unpaired(policy, reference, HALVES, **options).mean()
    torch.testing.assert_close(2 * found, expected, rtol=1e-12, atol=1e-12)


def test_aot_and_its_gradient_are_trls_for_equal_numbers(trl: Any) -> None:
    theirs, ours = (4 * draw(0, 8)).requires_grad_(), (4 * draw(0, 8)).requires_grad_()
    reference = draw(1, 8)
    expected = trl_pairs(trl, "aot_unpaired", theirs, reference)
    found = unpaired.aot_unpaired(ours, reference, HALVES, beta=BETA).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.backward()
    found.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
