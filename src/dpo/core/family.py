"""The table of all losses: what each is called, its formula in one line, and where it comes from.

What a loss needs is said by its function and nowhere else: the names of its positional parameters
are the tensors it takes, its keyword-only parameters are its hyper-parameters. A loss that takes no
tensor whose name begins with `reference_` never makes anybody load a reference model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dpo.core import listwise, losses, reference_free, token_level, unpaired


@dataclass(frozen=True)
class Loss:
    """One member of the family.

    Attributes:
        name: what `loss.name=` takes.
        function: tensors positional, hyper-parameters keyword-only; the loss unreduced, (B,).
        kind: what one loss is of: a pair, a list of ranked responses, or one judged response.
        formula: one line, in the notation of NOTATION.
        source: first author, year, arXiv id.
        note: what a user should know before choosing it, in a sentence; may be empty.
    """

    name: str
    function: Callable[..., Tensor]
    kind: Literal["pair", "list", "unpaired"]
    formula: str
    source: str
    note: str = ""


NOTATION = (
    "w: chosen, l: rejected; ℓ = log π(y|x), summed over the response; h = ℓ − log π_ref(y|x); "
    "Δ = h_w − h_l; u = βΔ; |y| = scored tokens; ℓ̄ = ℓ/|y|; h̄ = h/|y|; ρ = e^h = π/π_ref; r: given "
    "score; σ = sigmoid; sp(u) = log(1 + e^u), so that sp(−u) = −log σ(u); sg: no gradient. "
    "h_1 … h_K: a list, best first. D: desirable, U: undesirable."
)
"""The symbols of the formulas."""

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in [
        Loss(
            "dpo",
            losses.dpo,
            "pair",
            "(1−ε) sp(−u) + ε sp(u)",
            "Rafailov et al. 2023, arXiv:2305.18290; ε: Mitchell 2023 (cDPO)",
            "The likelihood of the preference; ε is the share of flipped labels.",
        ),
        Loss(
            "robust",
            losses.robust,
            "pair",
            "[(1−ε) sp(−u) − ε sp(u)] / (1−2ε)",
            "Chowdhury et al. 2024, arXiv:2403.00409",
            "Unbiased when labels are flipped at rate ε; has no lower bound.",
        ),
        Loss(
            "ipo",
            losses.ipo,
            "pair",
            "(Δ − 1/(2β))²",
            "Azar et al. 2023, arXiv:2310.12036",
            "The margin stops at 1/(2β); β is the paper's τ.",
        ),
        Loss(
            "hinge",
            losses.hinge,
            "pair",
            "max(0, 1 − u)",
            "T. Liu et al. 2023 (RSO), arXiv:2309.06657",
            "Nothing to gain beyond a margin of 1.",
        ),
        Loss(
            "exo",
            losses.exo,
            "pair",
            "σ(u) log[σ(u)/(1−ε)] + σ(−u) log[σ(−u)/ε]",
            "Ji et al. 2024, arXiv:2402.00856",
            "The reverse divergence of smoothed DPO; almost flat where the model is surely wrong.",
        ),
        Loss(
            "nca_pair",
            losses.nca_pair,
            "pair",
            "sp(−βh_w) + ½ sp(βh_w) + ½ sp(βh_l)",
            "H. Chen et al. 2024, arXiv:2402.05369",
            "Each response against noise: holds up the likelihood of the chosen one.",
        ),
        Loss(
            "bco_pair",
            losses.bco_pair,
            "pair",
            "sp(−(βh_w − δ)) + sp(βh_l − δ),  δ: running mean of βh",
            "Jung et al. 2024, arXiv:2404.04656",
            "Classifies rewards at a running threshold.",
        ),
        Loss(
            "sppo",
            losses.sppo,
            "pair",
            "(h_w − 1/(2β))² + (h_l + 1/(2β))²",
            "Y. Wu et al. 2024, arXiv:2405.00675",
            "Regression of each log-ratio on a target, with hard labels.",
        ),
        Loss(
            "sppo_soft",
            losses.sppo_soft,
            "pair",
            "(h_w − (r_w − ½)/β)² + (h_l − (r_l − ½)/β)²",
            "Y. Wu et al. 2024, arXiv:2405.00675",
            "Scores are probabilities of beating the current policy.",
        ),
        Loss(
            "aot",
            losses.aot,
            "pair",
            "sp(−β(m₍ᵢ₎ − n₍ᵢ₎)),  m = ℓ_w − ℓ_l sorted, n: the same of the reference",
            "Melnyk et al. 2024, arXiv:2406.05882",
            "Compares sorted margins: depends on the whole batch.",
        ),
        Loss(
            "apo_zero",
            losses.apo_zero,
            "pair",
            "1 − σ(βh_w) + σ(βh_l)",
            "D'Oosterlinck et al. 2024, arXiv:2408.06266",
            "For chosen responses better than the model's own.",
        ),
        Loss(
            "apo_down",
            losses.apo_down,
            "pair",
            "σ(βh_w) + 1 − σ(u)",
            "D'Oosterlinck et al. 2024, arXiv:2408.06266",
            "For chosen responses worse than the model's own.",
        ),
        Loss(
            "discopop",
            losses.discopop,
            "pair",
            "(1−g) sp(−u) + g e^{−u},  g = σ(u/τ)",
            "C. Lu et al. 2024, arXiv:2406.08414",
            "Found by a language model; not convex.",
        ),
        Loss(
            "f_dpo",
            losses.f_dpo,
            "pair",
            "sp(−β[f′(ρ_w) − f′(ρ_l)])",
            "C. Wang et al. 2023, arXiv:2309.16240",
            "f′: reverse KL log ρ; forward KL −1/ρ; JS log(2ρ/(1+ρ)); alpha −ρ^{−α}/α.",
        ),
        Loss(
            "chi_po",
            losses.chi_po,
            "pair",
            "sp(−clip_{2R} β[(ρ_w + h_w) − (ρ_l + h_l)])",
            "A. Huang et al. 2024, arXiv:2407.13399",
            "Chi-squared and KL: π/π_ref grows with the reward, not with its exponential.",
        ),
        Loss(
            "squared_po",
            losses.squared_po,
            "pair",
            "sp(−β[h_w/ρ_w − h_l/ρ_l])",
            "Pipano et al. 2026, arXiv:2602.06788",
            "Against falling likelihoods; nothing to gain beyond ρ_w = e.",
        ),
        Loss(
            "r_dpo",
            losses.r_dpo,
            "pair",
            "sp(−[u + α(|w| − |l|)])",
            "Park et al. 2024, arXiv:2403.19159",
            "Takes α per token off the reward.",
        ),
        Loss(
            "length_normalised_dpo",
            losses.length_normalised_dpo,
            "pair",
            "sp(−β(h̄_w − h̄_l))",
            "Lambert et al. 2024 (Tülu 3), arXiv:2411.15124",
            "Log-ratios per token.",
        ),
        Loss(
            "dpop",
            losses.dpop,
            "pair",
            "sp(−β[Δ − λ max(0, −h_w)])",
            "Pal et al. 2024 (Smaug), arXiv:2402.13228",
            "Charges for a chosen response that becomes less likely.",
        ),
        Loss(
            "beta_dpo",
            losses.beta_dpo,
            "pair",
            "sp(−sg[β′]Δ),  β′ = max(β(1 + a(mean Δ − M₀)), 0.001)",
            "J. Wu et al. 2024, arXiv:2407.08639",
            "β follows the batch's mean margin: depends on the whole batch and on a running mean.",
        ),
        Loss(
            "cal_dpo",
            losses.cal_dpo,
            "pair",
            "sp(−Δ) + ½[(h_w − 1/(2β))² + (h_l + 1/(2β))²]",
            "Xiao et al. 2024, arXiv:2412.14516",
            "DPO with β = 1, and log-ratios held at ±1/(2β).",
        ),
        Loss(
            "odpo",
            losses.odpo,
            "pair",
            "sp(−[u − α log(r_w − r_l)])",
            "Amini et al. 2024, arXiv:2402.10571",
            "Needs scores; the chosen one must be the higher.",
        ),
        Loss(
            "rpo",
            losses.rpo,
            "pair",
            "KL(q‖σ(u)), KL(σ(u)‖q) or (u − v)²,  v = η(r_w − r_l), q = σ(v)",
            "S. Sun et al. 2025, arXiv:2502.00203",
            "Needs scores; the margin is to equal the scores' difference.",
        ),
        Loss(
            "alpha_dpo",
            losses.alpha_dpo,
            "pair",
            "sp(−[β(ℓ̄_w − ℓ̄_l) − γ − βα sg z]),  z = (h̄_w − h̄_l − mean)/std",
            "J. Wu et al. 2024, arXiv:2410.10148",
            "SimPO with a target margin of the pair's own; mean and std are running.",
        ),
        Loss(
            "nll",
            reference_free.nll,
            "pair",
            "−ℓ̄_w",
            "Pang et al. 2024, arXiv:2404.19733",
            "Imitates the chosen responses; a term for mixtures (DPO + NLL).",
        ),
        Loss(
            "unlikelihood",
            reference_free.unlikelihood,
            "pair",
            "−ℓ_w + αℓ_l",
            "Rafailov et al. 2023, Section 6, arXiv:2305.18290",
            "DPO's directions without its weight: unbounded, degenerates; a baseline.",
        ),
        Loss(
            "simpo",
            reference_free.simpo,
            "pair",
            "sp(−[β(ℓ̄_w − ℓ̄_l) − γ])",
            "Meng et al. 2024, arXiv:2405.14734",
            "Log-probabilities per token, no reference.",
        ),
        Loss(
            "cpo",
            reference_free.cpo,
            "pair",
            "sp(−β(ℓ_w − ℓ_l)) − λℓ̄_w",
            "H. Xu et al. 2024, arXiv:2401.08417",
            "DPO with a uniform reference, and likelihood.",
        ),
        Loss(
            "orpo",
            reference_free.orpo,
            "pair",
            "−λℓ̄_w + β sp(−[o_w − o_l]),  o = ℓ̄ − log(1 − e^ℓ̄)",
            "Hong et al. 2024, arXiv:2403.07691",
            "Fine-tuning and preference in one; for a base model.",
        ),
        Loss(
            "alpha_po",
            reference_free.alpha_po,
            "pair",
            "sp(−[β(s_w − s_l) − γ]),  s = (1 − e^{−αℓ̄})/α",
            "Gupta et al. 2025, arXiv:2501.03884",
            "SimPO with a bent reward; α → 0 is SimPO.",
        ),
        Loss(
            "slic",
            reference_free.slic,
            "pair",
            "max(0, δ − ℓ_w + ℓ_l) − λℓ_w",
            "Y. Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425",
            "Hinge on log-probabilities, and likelihood.",
        ),
        Loss(
            "tdpo1",
            token_level.tdpo1,
            "pair",
            "sp(−β[Δ − (D_l − D_w)]),  D = Σ_t KL(π_ref‖π)",
            "Zeng et al. 2024, arXiv:2404.11999",
            "Needs both models' distributions at every token.",
        ),
        Loss(
            "tdpo2",
            token_level.tdpo2,
            "pair",
            "sp(−β[Δ − α(D_l − sg D_w)]),  D = Σ_t KL(π_ref‖π)",
            "Zeng et al. 2024, arXiv:2404.11999",
            "Needs both models' distributions at every token.",
        ),
        Loss(
            "ld_dpo",
            token_level.ld_dpo,
            "pair",
            "sp(−u) with tokens after min(|w|, |l|) weighted α",
            "W. Liu et al. 2024, arXiv:2409.06411",
            "A longer response's surplus counts less; α = 1 is DPO.",
        ),
        Loss(
            "wpo",
            token_level.wpo,
            "pair",
            "sg[min(W_w W_l, W_max)] sp(−u),  W = exp mean_t(log π_t − log Σ_v π_v²)",
            "W. Zhou et al. 2024, arXiv:2406.11827",
            "Pairs that the policy would not write itself weigh less.",
        ),
        Loss(
            "mallows_po",
            token_level.mallows_po,
            "pair",
            "sp(−φu),  φ = −c log(entropy of the reference, as a share of log V)",
            "H. Chen et al. 2024, arXiv:2405.14953",
            "The margin counts less where the reference is undecided.",
        ),
        Loss(
            "plackett_luce",
            listwise.plackett_luce,
            "list",
            "Σ_k [log Σ_{j≥k} e^{βh_j} − βh_k],  k < K or k ≤ top;  ties: all their orders summed",
            "Rafailov et al. 2023, arXiv:2305.18290",
            "The likelihood of the ranking: DPO for a list of two. Also known as ListMLE.",
        ),
        Loss(
            "all_pairs",
            listwise.all_pairs,
            "list",
            "mean_{i better than j} sp(−β(h_i − h_j))",
            "Rafailov et al. 2023, arXiv:2305.18290, on every pair of a list",
            "Skips tied pairs; more variance than plackett_luce.",
        ),
        Loss(
            "lipo_lambda",
            listwise.lipo_lambda,
            "list",
            "Σ_{r_i > r_j} sg[Λ_ij] sp(−β(h_i − h_j)),  Λ = |2^{r_i} − 2^{r_j}| |1/log(1+τ_i) − "
            "1/log(1+τ_j)|,  τ: place by h",
            "T. Liu et al. 2024, arXiv:2402.01878",
            "Needs scores, best within [0, 1]; weighs a pair by what its swap costs the DCG.",
        ),
        Loss(
            "kto",
            unpaired.kto,
            "unpaired",
            "D: λ_D (1 − σ(β(h − z₀)));  U: λ_U (1 − σ(β(z₀ − h))),  z₀ = max(0, mean h of "
            "mismatched pairs)",
            "Ethayarajh et al. 2024, arXiv:2402.01306",
            "Saturates far from z₀, on both sides; z₀ needs mismatched prompts and responses.",
        ),
        Loss(
            "bco",
            unpaired.bco,
            "unpaired",
            "D: sp(−(βh − δ));  U: sp(βh − δ),  δ: running mean of βh",
            "Jung et al. 2024, arXiv:2404.04656",
            "A classifier of desirable responses at a running threshold.",
        ),
        Loss(
            "nca_unpaired",
            unpaired.nca_unpaired,
            "unpaired",
            "D: sp(−βh) + s·sp(βh);  U: s·sp(βh),  s: share of desirable responses",
            "H. Chen et al. 2024, arXiv:2402.05369",
            "Each response against noise: the target is absolute.",
        ),
        Loss(
            "aot_unpaired",
            unpaired.aot_unpaired,
            "unpaired",
            "∫₀¹ sp(−β(Q_D(t) − Q_U(t))) dt,  Q: quantiles of h in the batch",
            "Melnyk et al. 2024, arXiv:2406.05882",
            "Compares sorted log-ratios: depends on the whole batch.",
        ),
    ]
}


def _names(loss: Loss, kind: inspect._ParameterKind) -> tuple[str, ...]:
    parameters = inspect.signature(loss.function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is kind)


def tensors(loss: Loss) -> tuple[str, ...]:
    """The tensors that a loss takes, in order: its positional parameters.

    >>> tensors(LOSSES["dpo"])[:2]
    ('policy_chosen_logps', 'policy_rejected_logps')
    """
    return _names(loss, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def options(loss: Loss) -> tuple[str, ...]:
    """The hyper-parameters that a loss takes, in order: its keyword-only parameters.

    >>> options(LOSSES["dpo"])
    ('beta', 'label_smoothing')
    """
    return _names(loss, inspect.Parameter.KEYWORD_ONLY)


def needs_reference(loss: Loss) -> bool:
    """Whether a loss compares with a reference model at all.

    >>> needs_reference(LOSSES["dpo"])
    True
    """
    return any("reference_" in name for name in tensors(loss))
