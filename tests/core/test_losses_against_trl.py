"""Our pairwise losses against TRL's own code: equal where the formulas are, and where not, how not.

TRL computes its losses inside its trainers. Here `DPOTrainer._compute_loss` and the loss functions
of the CPO and ORPO trainers run as they are, on a stand-in for the trainer that holds the options,
and a stand-in for the model that returns given log-probabilities.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.core import losses, reference_free, token_level, unpaired

trl = pytest.importorskip("trl", reason="needs TRL, to compare with (pip install trl)")

PROMPT = 2
DEFAULTS = {
    "beta": 0.7,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "aux_loss_enabled": False,
    "precompute_ref_logps": False,
    "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
}


@dataclass
class Pairs:
    """Token log-probabilities of the policy and the reference, (B, T) with zeros in the padding."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def four(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four summed log-probabilities, in the order of every function's arguments."""
        return (
            self.policy_chosen.sum(-1),
            self.policy_rejected.sum(-1),
            self.reference_chosen.sum(-1),
            self.reference_rejected.sum(-1),
        )

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.policy_chosen,
            self.policy_rejected,
            self.reference_chosen,
            self.reference_rejected,
        )

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        return self.chosen_lengths, self.rejected_lengths

    def __getitem__(self, rows: slice) -> Pairs:
        return Pairs(*(value[rows] for value in (*self.tokens, *self.lengths)))


@pytest.fixture
def pairs() -> Pairs:
    return make_pairs()


def make_pairs(dtype: torch.dtype = torch.float64) -> Pairs:
    draw = torch.Generator().manual_seed(3)
    lengths = [torch.tensor([3, 5, 1, 4]), torch.tensor([4, 2, 5, 4])]

    def tokens(of: Tensor) -> Tensor:
        present = torch.arange(5) < of.unsqueeze(-1)
        return -(2.5 * torch.rand(4, 5, generator=draw, dtype=torch.float64) * present).to(dtype)

    return Pairs(*(tokens(lengths[i]) for i in (0, 1, 0, 1)), *lengths)


class StandInModel(torch.nn.Module):
    """Returns what the fused head of a model in TRL would, for given token log-probabilities."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, log_sum_sq_probs: Tensor | None = None) -> None:
        super().__init__()
        unscored = torch.zeros(len(log_probs), PROMPT - 1, dtype=log_probs.dtype)
        self.log_probs = torch.cat([unscored, log_probs], dim=1)
        self.log_sum_sq_probs = log_sum_sq_probs
        if log_sum_sq_probs is not None:
            self.log_sum_sq_probs = torch.cat([unscored, log_sum_sq_probs], dim=1)

    def forward(self, **_: Any) -> SimpleNamespace:
        nothing = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs,
            log_sum_sq_probs=self.log_sum_sq_probs,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


def dpo_trainer_loss(pairs: Pairs, loss_type: str, collision: Tensor | None = None, **kw: Any):
    """TRL's loss of a batch, a mean over its pairs."""
    present = torch.arange(pairs.policy_chosen.shape[1]) < torch.cat(pairs.lengths).unsqueeze(-1)
    completion_mask = torch.cat([torch.zeros(len(present), PROMPT), present], dim=1).long()
    trainer = SimpleNamespace(
        **(DEFAULTS | kw),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        model=StandInModel(torch.cat([pairs.policy_chosen, pairs.policy_rejected]), collision),
        ref_model=StandInModel(torch.cat([pairs.reference_chosen, pairs.reference_rejected])),
        loss_types=[loss_type],
        loss_weights=[1.0],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    return trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)


def of_each_pair(pairs: Pairs, loss_type: str, **options: Any) -> Tensor:
    """TRL's losses one pair at a time: its code returns only means."""
    singles = [pairs[i : i + 1] for i in range(len(pairs.chosen_lengths))]
    return torch.stack([dpo_trainer_loss(single, loss_type, **options) for single in singles])


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)


SAME = {
    "sigmoid": (losses.dpo, {"beta": 0.7}, {}),
    "hinge": (losses.hinge, {"beta": 0.7}, {}),
    "exo_pair": (losses.exo, {"beta": 0.7, "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "nca_pair": (losses.nca_pair, {"beta": 0.7}, {}),
    "robust": (losses.robust, {"beta": 0.7, "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "sppo_hard": (losses.sppo, {"beta": 0.7}, {}),
    "apo_zero": (losses.apo_zero, {"beta": 0.7}, {}),
    "apo_down": (losses.apo_down, {"beta": 0.7}, {}),
    "discopop": (losses.discopop, {"beta": 0.7, "tau": 0.05}, {}),
}


@pytest.mark.parametrize("loss_type", SAME)
def test_losses_of_the_four_log_probabilities_are_the_same(pairs: Pairs, loss_type: str) -> None:
    function, ours, theirs = SAME[loss_type]
    assert_equal(function(*pairs.four, **ours), of_each_pair(pairs, loss_type, **theirs))


@pytest.mark.parametrize(
    ("divergence", "theirs"),
    [("reverse_kl", "reverse_kl"), ("forward_kl", "forward_kl"), ("js", "js_divergence")],
)
def test_f_divergences_are_the_same(pairs: Pairs, divergence: Any, theirs: str) -> None:
    ours = losses.f_dpo(*pairs.four, beta=0.7, divergence=divergence, alpha=None)
    assert_equal(ours, of_each_pair(pairs, "sigmoid", f_divergence_type=theirs))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_trl_s_alpha_of_the_alpha_divergence_is_one_minus_ours(alpha: float) -> None:
    pairs = make_pairs(torch.float32)  # the only precisions TRL's code accepts there are 32 and 16
    ours = losses.f_dpo(*pairs.four, beta=0.7, divergence="alpha", alpha=alpha)
    theirs = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha}
    assert_equal(ours, of_each_pair(pairs, "sigmoid", **theirs))
    if alpha != 0.5:
        theirs["f_alpha_divergence_coef"] = alpha
        assert (ours - of_each_pair(pairs, "sigmoid", **theirs)).abs().max() > 1e-2


def test_length_normalised_dpo_is_sigmoid_norm(pairs: Pairs) -> None:
    ours = losses.length_normalised_dpo(*pairs.four, *pairs.lengths, beta=0.7)
    assert_equal(ours, of_each_pair(pairs, "sigmoid_norm"))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo_is_the_same(pairs: Pairs, alpha: float) -> None:
    ours = token_level.ld_dpo(*pairs.tokens, *pairs.lengths, beta=0.7, alpha=alpha)
    assert_equal(ours, of_each_pair(pairs, "sigmoid", ld_alpha=alpha))


def test_aot_has_the_same_mean(pairs: Pairs) -> None:
    ours = losses.aot(*pairs.four, beta=0.7)
    assert_equal(ours.mean(), dpo_trainer_loss(pairs, "aot"))
    assert (ours.mean() - losses.dpo(*pairs.four, beta=0.7).mean()).abs() > 1e-3


def test_wpo_without_its_cut_is_the_same(pairs: Pairs) -> None:
    draw = torch.Generator().manual_seed(4)
    collisions = [
        -3 * torch.rand(value.shape, generator=draw, dtype=torch.float64) * (value != 0)
        for value in (pairs.policy_chosen, pairs.policy_rejected)
    ]
    tensors = *pairs.four, pairs.policy_chosen, pairs.policy_rejected, *collisions, *pairs.lengths
    theirs = torch.stack(
        [
            dpo_trainer_loss(
                pairs[i : i + 1],
                "sigmoid",
                collision=torch.cat([value[i : i + 1] for value in collisions]),
                use_weighting=True,
            )
            for i in range(4)
        ]
    )
    assert_equal(token_level.wpo(*tensors, beta=0.7, max_weight=math.inf), theirs)
    cut = token_level.wpo(*tensors, beta=0.7, max_weight=1.0)
    assert (cut < theirs - 1e-3).any()  # the authors' code cuts at 1, TRL does not


# Where TRL differs.


def test_trl_s_sigmoid_ignores_label_smoothing(pairs: Pairs) -> None:
    theirs = of_each_pair(pairs, "sigmoid", label_smoothing=0.2)
    assert_equal(losses.dpo(*pairs.four, beta=0.7), theirs)
    smoothed = losses.dpo(*pairs.four, beta=0.7, label_smoothing=0.2)
    assert_equal(smoothed, theirs + 0.2 * 0.7 * losses.margin(*pairs.four))


def test_trl_s_ipo_is_on_log_ratios_per_token(pairs: Pairs) -> None:
    theirs = of_each_pair(pairs, "ipo")
    per_token = [
        value / length for value, length in zip(pairs.four, 2 * pairs.lengths, strict=True)
    ]
    assert_equal(losses.ipo(*per_token, beta=0.7), theirs)
    assert (losses.ipo(*pairs.four, beta=0.7) - theirs).abs().min() > 1e-2


def test_trl_s_bco_pair_has_no_reward_shift(pairs: Pairs) -> None:
    theirs = of_each_pair(pairs, "bco_pair")
    zero = torch.zeros(())
    assert_equal(losses.bco_pair(*pairs.four, zero, beta=0.7), theirs)
    policy, reference = torch.cat(pairs.four[:2]), torch.cat(pairs.four[2:])
    shift, _ = unpaired.update_reward_shift(zero, zero, policy, reference, beta=0.7)
    ours = losses.bco_pair(*pairs.four, shift, beta=0.7)
    assert (ours - theirs).abs().max() > 1e-2


def test_trl_s_sft_averages_over_the_tokens_of_a_batch(pairs: Pairs) -> None:
    ours = reference_free.nll(pairs.four[0], pairs.chosen_lengths)
    assert_equal(ours, of_each_pair(pairs, "sft"))
    together = dpo_trainer_loss(pairs, "sft")
    by_token = (ours * pairs.chosen_lengths).sum() / pairs.chosen_lengths.sum()
    assert_equal(by_token, together)
    assert (ours.mean() - together).abs() > 1e-2


def test_trl_s_discopop_is_not_finite_where_ours_is() -> None:
    chosen, rejected = torch.tensor([[-500.0]]), torch.tensor([[-1.0]])
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, 1)
    pair = Pairs(chosen, rejected, zero, zero, one, one)
    assert not of_each_pair(pair, "discopop").isfinite().any()
    ours = losses.discopop(*pair.four, beta=0.7, tau=0.05)
    torch.testing.assert_close(ours, torch.tensor([0.7 * 499]))


def test_trl_s_alpha_divergence_has_no_gradient_where_ours_has() -> None:
    def gradient(loss: Callable[[Pairs], Tensor]) -> float:
        chosen = torch.tensor([[-300.0]], requires_grad=True)
        one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, 1)
        loss(Pairs(chosen, torch.tensor([[-1.0]]), zero, zero, one, one)).sum().backward()
        return chosen.grad.item()

    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}
    assert gradient(lambda pair: of_each_pair(pair, "sigmoid", **options)) == 0
    ours = gradient(lambda pair: losses.f_dpo(*pair.four, beta=0.7, divergence="alpha", alpha=0.5))
    assert ours < 0


# The losses without a reference live in TRL's experimental trainers.


def cpo_trainer_loss(chosen: Tensor, rejected: Tensor, **options: Any) -> Tensor:
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    trainer = SimpleNamespace(
        **({"alpha": 0.0, "label_smoothing": 0.0} | options),
        accelerator=SimpleNamespace(device="cpu"),
    )
    return module.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


@pytest.fixture
def experimental(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.usefixtures("experimental")
def test_cpo_without_likelihood_is_the_same(pairs: Pairs) -> None:
    chosen, rejected = pairs.four[:2]
    ours = reference_free.cpo(chosen, rejected, pairs.chosen_lengths, beta=0.7, nll_weight=0.0)
    assert_equal(ours, cpo_trainer_loss(chosen, rejected, loss_type="sigmoid", beta=0.7))


@pytest.mark.usefixtures("experimental")
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
def test_simpo_and_alpha_po_are_the_same(pairs: Pairs, alpha: float) -> None:
    """TRL hands mean log-probabilities to the function for this type."""
    chosen, rejected = (value / n for value, n in zip(pairs.four, pairs.lengths, strict=False))
    tensors = *pairs.four[:2], *pairs.lengths
    if alpha == 0:
        ours = reference_free.simpo(*tensors, beta=2.0, gamma=0.6)
    else:
        ours = reference_free.alpha_po(*tensors, beta=2.0, gamma=0.6, alpha=alpha)
    theirs = cpo_trainer_loss(
        chosen, rejected, loss_type="simpo", beta=2.0, simpo_gamma=0.6, alpha=alpha
    )
    assert_equal(ours, theirs)


@pytest.mark.usefixtures("experimental")
def test_the_odds_term_of_orpo_is_the_same(pairs: Pairs) -> None:
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    trainer = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (value / n for value, n in zip(pairs.four, pairs.lengths, strict=False))
    theirs = -module.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    tensors = *pairs.four[:2], *pairs.lengths
    assert_equal(reference_free.orpo(*tensors, beta=0.7, nll_weight=0.0), theirs)


@pytest.mark.usefixtures("experimental")
@pytest.mark.parametrize("trainer", ["cpo", "orpo"])
def test_likelihood_terms_of_trl_average_over_tokens_of_the_batch(trainer: str) -> None:
    """CPO's over the chosen responses, ORPO's over prompts as well: neither is ours, which is a
    mean over pairs of means over the response."""
    name = trainer.upper()
    module = pytest.importorskip(f"trl.experimental.{trainer}.{trainer}_trainer")
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 7, 11, generator=draw, dtype=torch.float64)
    ids = torch.randint(0, 11, (4, 7), generator=draw)
    present = torch.arange(7) < torch.tensor([5, 7, 6, 4]).unsqueeze(-1)
    labels = ids.masked_fill(~present, -100)
    labels[:, :PROMPT] = -100

    cls = getattr(module, f"{name}Trainer")
    stand_in = SimpleNamespace(
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        aux_loss_enabled=False,
        cpo_alpha=1.0,
        loss_type="sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
        get_batch_logps=cls.get_batch_logps,
        concatenated_inputs=lambda *_, **__: {
            "concatenated_input_ids": ids,
            "concatenated_attention_mask": present.long(),
            "concatenated_labels": labels,
        },
    )
    forward = cls.concatenated_forward(
        stand_in, lambda *_, **__: SimpleNamespace(logits=logits), {"chosen_labels": labels[:2]}
    )
    token_logps = logits[:2, :-1].log_softmax(-1).gather(-1, ids[:2, 1:, None]).squeeze(-1)
    scored = labels[:2, 1:] != -100
    counted = scored if trainer == "cpo" else present[:2, 1:]
    assert_equal(-token_logps[counted].mean(), forward[4])

    ours = reference_free.nll((token_logps * scored).sum(-1), scored.sum(-1))
    assert (ours.mean() - forward[4]).abs() > 1e-3
