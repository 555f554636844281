"""The pairwise losses once more, in plain Python on numbers, as their papers write them.

Nothing is shared with the package and no care is taken of overflow: a second opinion on moderate
inputs. Each function takes a pair `x` (a mapping from tensor names to numbers, or to lists of them
for tokens), the options `o`, and `fixed`: the same pair, read where the equation stops the
gradient. Where the loss depends on the batch it takes lists of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Pair = Mapping[str, Any]


def sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u))


def minus_log_sigmoid(u: float) -> float:
    return math.log1p(math.exp(-u))


def h(x: Pair, which: str) -> float:
    return x[f"policy_{which}_logps"] - x[f"reference_{which}_logps"]


def ratio(x: Pair, which: str) -> float:
    return math.exp(x[f"policy_{which}_logps"]) / math.exp(x[f"reference_{which}_logps"])


def delta(x: Pair) -> float:
    return (x["policy_chosen_logps"] - x["policy_rejected_logps"]) - (
        x["reference_chosen_logps"] - x["reference_rejected_logps"]
    )


def per_token(x: Pair, model: str, which: str) -> float:
    return x[f"{model}_{which}_logps"] / x[f"{which}_lengths"]


def dpo(x: Pair, o: Pair, fixed: Pair) -> float:
    u, eps = o["beta"] * delta(x), o["label_smoothing"]
    return (1 - eps) * minus_log_sigmoid(u) + eps * minus_log_sigmoid(-u)


def robust(x: Pair, o: Pair, fixed: Pair) -> float:
    u, eps = o["beta"] * delta(x), o["label_smoothing"]
    return ((1 - eps) * minus_log_sigmoid(u) - eps * minus_log_sigmoid(-u)) / (1 - 2 * eps)


def ipo(x: Pair, o: Pair, fixed: Pair) -> float:
    return (delta(x) - 1 / (2 * o["beta"])) ** 2


def hinge(x: Pair, o: Pair, fixed: Pair) -> float:
    return max(0.0, 1 - o["beta"] * delta(x))


def exo(x: Pair, o: Pair, fixed: Pair) -> float:
    eps = o["label_smoothing"]
    chosen, rejected = ratio(x, "chosen") ** o["beta"], ratio(x, "rejected") ** o["beta"]
    p = chosen / (chosen + rejected)
    return p * math.log(p / (1 - eps)) + (1 - p) * math.log((1 - p) / eps)


def nca_pair(x: Pair, o: Pair, fixed: Pair) -> float:
    a, b = o["beta"] * h(x, "chosen"), o["beta"] * h(x, "rejected")
    return -math.log(sigmoid(a)) - 0.5 * math.log(sigmoid(-a)) - 0.5 * math.log(sigmoid(-b))


def bco_pair(x: Pair, o: Pair, fixed: Pair) -> float:
    a, b = o["beta"] * h(x, "chosen"), o["beta"] * h(x, "rejected")
    return -math.log(sigmoid(a - fixed["reward_shift"])) - math.log(
        sigmoid(-(b - fixed["reward_shift"]))
    )


def sppo(x: Pair, o: Pair, fixed: Pair) -> float:
    eta = 1 / o["beta"]
    return (h(x, "chosen") - eta * (1 - 0.5)) ** 2 + (h(x, "rejected") - eta * (0 - 0.5)) ** 2


def sppo_soft(x: Pair, o: Pair, fixed: Pair) -> float:
    eta = 1 / o["beta"]
    return sum(
        (h(x, which) - eta * (x[f"{which}_scores"] - 0.5)) ** 2 for which in ("chosen", "rejected")
    )


def apo_zero(x: Pair, o: Pair, fixed: Pair) -> float:
    return 1 - sigmoid(o["beta"] * h(x, "chosen")) + sigmoid(o["beta"] * h(x, "rejected"))


def apo_down(x: Pair, o: Pair, fixed: Pair) -> float:
    return sigmoid(o["beta"] * h(x, "chosen")) + 1 - sigmoid(o["beta"] * delta(x))


def discopop(x: Pair, o: Pair, fixed: Pair) -> float:
    u = o["beta"] * delta(x)
    g = sigmoid(u / o["tau"])
    return (1 - g) * minus_log_sigmoid(u) + g * math.exp(-u)


def f_dpo(x: Pair, o: Pair, fixed: Pair) -> float:
    alpha = o["alpha"]
    slope = {
        "reverse_kl": lambda rho: math.log(rho) + 1,
        "forward_kl": lambda rho: -1 / rho,
        "js": lambda rho: math.log(2 * rho / (1 + rho)),
        "alpha": lambda rho: (1 - rho**-alpha) / alpha,
    }[o["divergence"]]
    return minus_log_sigmoid(o["beta"] * (slope(ratio(x, "chosen")) - slope(ratio(x, "rejected"))))


def chi_po(x: Pair, o: Pair, fixed: Pair) -> float:
    def link(rho: float) -> float:
        return rho + math.log(rho)

    u = o["beta"] * link(ratio(x, "chosen")) - o["beta"] * link(ratio(x, "rejected"))
    return minus_log_sigmoid(max(-2 * o["max_reward"], min(2 * o["max_reward"], u)))


def squared_po(x: Pair, o: Pair, fixed: Pair) -> float:
    def slope(rho: float) -> float:
        return math.log(rho) / rho

    return minus_log_sigmoid(o["beta"] * (slope(ratio(x, "chosen")) - slope(ratio(x, "rejected"))))


def r_dpo(x: Pair, o: Pair, fixed: Pair) -> float:
    surplus = x["chosen_lengths"] - x["rejected_lengths"]
    return minus_log_sigmoid(o["beta"] * delta(x) + o["alpha"] * surplus)


def length_normalised_dpo(x: Pair, o: Pair, fixed: Pair) -> float:
    chosen = o["beta"] / x["chosen_lengths"] * h(x, "chosen")
    return minus_log_sigmoid(chosen - o["beta"] / x["rejected_lengths"] * h(x, "rejected"))


def dpop(x: Pair, o: Pair, fixed: Pair) -> float:
    penalty = max(0.0, math.log(1 / ratio(x, "chosen")))
    return minus_log_sigmoid(o["beta"] * (delta(x) - o["penalty"] * penalty))


def cal_dpo(x: Pair, o: Pair, fixed: Pair) -> float:
    calibration = (h(x, "chosen") - 1 / (2 * o["beta"])) ** 2
    calibration += (h(x, "rejected") + 1 / (2 * o["beta"])) ** 2
    return minus_log_sigmoid(delta(x)) + 0.5 * calibration


def odpo(x: Pair, o: Pair, fixed: Pair) -> float:
    offset = o["alpha"] * math.log(x["chosen_scores"] - x["rejected_scores"])
    return minus_log_sigmoid(o["beta"] * delta(x) - offset)


def rpo(x: Pair, o: Pair, fixed: Pair) -> float:
    u = o["beta"] * delta(x)
    v = o["reward_scale"] * (x["chosen_scores"] - x["rejected_scores"])
    p, q = sigmoid(u), sigmoid(v)
    return {
        "backward_kl": q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
        "forward_kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
        "squared": (u - v) ** 2,
    }[o["divergence"]]


def alpha_dpo(x: Pair, o: Pair, fixed: Pair) -> float:
    def gap(y: Pair, model: str) -> float:
        return per_token(y, model, "chosen") - per_token(y, model, "rejected")

    z = gap(fixed, "policy") - gap(fixed, "reference") - fixed["running_margin"]
    z /= fixed["running_margin_std"]
    return minus_log_sigmoid(
        o["beta"] * (gap(x, "policy") - o["gamma"] / o["beta"] - o["alpha"] * z)
    )


def nll(x: Pair, o: Pair, fixed: Pair) -> float:
    return -per_token(x, "policy", "chosen")


def unlikelihood(x: Pair, o: Pair, fixed: Pair) -> float:
    return -x["policy_chosen_logps"] + o["alpha"] * x["policy_rejected_logps"]


def simpo(x: Pair, o: Pair, fixed: Pair) -> float:
    gap = per_token(x, "policy", "chosen") - per_token(x, "policy", "rejected")
    return minus_log_sigmoid(o["beta"] * gap - o["gamma"])


def cpo(x: Pair, o: Pair, fixed: Pair) -> float:
    gap = x["policy_chosen_logps"] - x["policy_rejected_logps"]
    return minus_log_sigmoid(o["beta"] * gap) + o["nll_weight"] * nll(x, o, fixed)


def orpo(x: Pair, o: Pair, fixed: Pair) -> float:
    chosen, rejected = (math.exp(per_token(x, "policy", w)) for w in ("chosen", "rejected"))
    odds_ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    return o["nll_weight"] * nll(x, o, fixed) + o["beta"] * minus_log_sigmoid(math.log(odds_ratio))


def alpha_po(x: Pair, o: Pair, fixed: Pair) -> float:
    def reward(which: str) -> float:
        probability = math.exp(per_token(x, "policy", which))
        return o["beta"] * (1 - probability ** -o["alpha"]) / o["alpha"]

    return minus_log_sigmoid(reward("chosen") - reward("rejected") - o["gamma"])


def slic(x: Pair, o: Pair, fixed: Pair) -> float:
    hinge = max(0.0, o["delta"] - x["policy_chosen_logps"] + x["policy_rejected_logps"])
    return hinge - o["nll_weight"] * x["policy_chosen_logps"]


def tdpo1(x: Pair, o: Pair, fixed: Pair) -> float:
    shift = o["beta"] * x["rejected_forward_kl"] - o["beta"] * x["chosen_forward_kl"]
    return minus_log_sigmoid(o["beta"] * delta(x) - shift)


def tdpo2(x: Pair, o: Pair, fixed: Pair) -> float:
    shift = o["beta"] * x["rejected_forward_kl"] - o["beta"] * fixed["chosen_forward_kl"]
    return minus_log_sigmoid(o["beta"] * delta(x) - o["alpha"] * shift)


def ld_dpo(x: Pair, o: Pair, fixed: Pair) -> float:
    shared = int(min(x["chosen_lengths"], x["rejected_lengths"]))

    def weighted(model: str, which: str) -> float:
        tokens = x[f"{model}_{which}_token_logps"]
        return sum(tokens[:shared]) + o["alpha"] * sum(tokens[shared:])

    chosen = weighted("policy", "chosen") - weighted("reference", "chosen")
    rejected = weighted("policy", "rejected") - weighted("reference", "rejected")
    return minus_log_sigmoid(o["beta"] * (chosen - rejected))


def wpo(x: Pair, o: Pair, fixed: Pair) -> float:
    weight = 1.0
    for which in ("chosen", "rejected"):
        length = int(fixed[f"{which}_lengths"])
        tokens = fixed[f"policy_{which}_token_logps"][:length]
        collisions = fixed[f"policy_{which}_token_log_collision"][:length]
        logs = [t - c for t, c in zip(tokens, collisions, strict=True)]
        weight *= math.exp(sum(logs) / length)
    return min(weight, o["max_weight"]) * minus_log_sigmoid(o["beta"] * delta(x))


def mallows_po(x: Pair, o: Pair, fixed: Pair) -> float:
    shares = [
        x[f"reference_{which}_entropy"] / (x[f"{which}_lengths"] * math.log(o["vocab_size"]))
        for which in ("chosen", "rejected")
    ]
    dispersion = -o["dispersion_scale"] * math.log((shares[0] + shares[1]) / 2)
    return minus_log_sigmoid(dispersion * o["beta"] * delta(x))


def aot(batch: Sequence[Pair], o: Pair, fixed: Sequence[Pair]) -> list[float]:
    policy = [x["policy_chosen_logps"] - x["policy_rejected_logps"] for x in batch]
    reference = [x["reference_chosen_logps"] - x["reference_rejected_logps"] for x in batch]
    losses = {
        a: minus_log_sigmoid(o["beta"] * (a - b))
        for a, b in zip(sorted(policy), sorted(reference), strict=True)
    }
    return [losses[a] for a in policy]


def beta_dpo(batch: Sequence[Pair], o: Pair, fixed: Sequence[Pair]) -> list[float]:
    surplus = sum(map(delta, fixed)) / len(fixed) - fixed[0]["running_margin"]
    beta = max(o["beta"] * (1 + o["margin_scale"] * surplus), 1e-3)
    return [minus_log_sigmoid(beta * delta(x)) for x in batch]


OF_A_PAIR: dict[str, Callable[[Pair, Pair, Pair], float]] = {
    function.__name__: function
    for function in [
        dpo,
        robust,
        ipo,
        hinge,
        exo,
        nca_pair,
        bco_pair,
        sppo,
        sppo_soft,
        apo_zero,
        apo_down,
        discopop,
        f_dpo,
        chi_po,
        squared_po,
        r_dpo,
        length_normalised_dpo,
        dpop,
        cal_dpo,
        odpo,
        rpo,
        alpha_dpo,
        nll,
        unlikelihood,
        simpo,
        cpo,
        orpo,
        alpha_po,
        slic,
        tdpo1,
        tdpo2,
        ld_dpo,
        wpo,
        mallows_po,
    ]
}

OF_A_BATCH: dict[str, Callable[[Sequence[Pair], Pair, Sequence[Pair]], list[float]]] = {
    "aot": aot,
    "beta_dpo": beta_dpo,
}


def evaluate(name: str, batch: Sequence[Pair], options: Pair, fixed: Sequence[Pair]) -> list[float]:
    """The losses of a batch, with the gradient stopped at `fixed`."""
    if name in OF_A_BATCH:
        return OF_A_BATCH[name](batch, options, fixed)
    function = OF_A_PAIR[name]
    return [function(x, options, at) for x, at in zip(batch, fixed, strict=True)]
