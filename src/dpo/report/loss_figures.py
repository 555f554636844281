"""A figure for each loss: its value, and how hard it pulls on log-probabilities.

Everything but one log-ratio or margin is held fixed, at the values of `Scene`, so that two figures
can be compared. The gradient comes from the loss functions themselves.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo.core.family import LOSSES, Loss, needs_reference, tensors
from dpo.loss_config import LOSS_CONFIGS
from dpo.report.style import DOUBLE_COLUMN, MUTED, look, new_figure, paper_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_POINTS = 81
REFERENCE = -40.0
"""Log-probability of every response under the reference, in nats."""

RANKED = ("the best", "the second", "the worst")


@dataclass(frozen=True)
class Scene:
    """What is held fixed: of the chosen and the rejected response, or of both alike.

    Attributes:
        lengths: tokens.
        scores: ratings.
        log_collision: log sum_v pi(v)^2 at every token.
        entropy: of the reference at every token, in nats.
        forward_kl: of a response, in nats.
    """

    lengths: tuple[int, int] = (20, 20)
    scores: tuple[float, float] = (1.0, 0.0)
    log_collision: float = -2.0
    entropy: float = 2.0
    forward_kl: float = 2.0


@dataclass(frozen=True)
class Variant:
    """One line of a figure: a label, options instead of the defaults, another scene."""

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scene: Scene = Scene()


@dataclass(frozen=True)
class Curve:
    """A loss along x, and minus its derivatives by log-probabilities there.

    Attributes:
        label: what the legend says.
        x: margin or log-ratio, in nats, (N,).
        loss: (N,).
        pulls: name of what is pulled, and the pull upwards on its log-probability, (N,).
    """

    label: str
    x: NDArray[np.float64]
    loss: NDArray[np.float64]
    pulls: Mapping[str, NDArray[np.float64]]


VARIANTS: dict[str, list[Variant]] = {
    "dpo": [Variant("ε = 0"), Variant("ε = 0.1", {"label_smoothing": 0.1})],
    "robust": [
        Variant("ε = 0.1"),
        Variant("ε = 0.3", {"label_smoothing": 0.3}),
    ],
    "f_dpo": [
        Variant("reverse KL", {"divergence": "reverse_kl"}),
        Variant("forward KL", {"divergence": "forward_kl"}),
        Variant("JS", {"divergence": "js"}),
        Variant("alpha = 0.5", {"divergence": "alpha", "alpha": 0.5}),
    ],
    "rpo": [
        Variant(name.replace("_kl", " KL"), {"divergence": name})
        for name in ("backward_kl", "forward_kl", "squared")
    ],
    "sppo_soft": [
        Variant("P = 1 and 0"),
        Variant("P = 0.6 and 0.4", scene=Scene(scores=(0.6, 0.4))),
    ],
    "odpo": [
        Variant("scores 1 apart"),
        Variant("scores 5 apart", scene=Scene(scores=(5.0, 0.0))),
    ],
    "r_dpo": [
        Variant("equal lengths"),
        Variant("chosen 100 tokens longer", scene=Scene(lengths=(120, 20))),
    ],
    "ld_dpo": [
        Variant("equal lengths"),
        Variant("chosen twice as long", scene=Scene(lengths=(40, 20))),
    ],
    "wpo": [
        Variant("weight 1"),
        Variant("weight 0.37", scene=Scene(log_collision=-1.5)),
    ],
    "mallows_po": [
        Variant("entropy 1 nat a token", scene=Scene(entropy=1.0)),
        Variant("entropy 4 nats a token", scene=Scene(entropy=4.0)),
    ],
}
"""Losses of which more than one line is worth seeing; of others the defaults are drawn."""

SPANS = {
    "f_dpo": 6.0,
    "chi_po": 6.0,
    "squared_po": 5.0,
    "discopop": 20.0,
    "dpop": 4.0,
    "slic": 4.0,
    "ipo": 25.0,
    "sppo": 2000.0,
    "sppo_soft": 2000.0,
    "cal_dpo": 1000.0,
    "beta_dpo": 20.0,
    "rpo": 40.0,
}
"""Half the width of the x axis, in nats, where 6 / beta shows less."""


def span(loss: Loss, options: Mapping[str, Any]) -> float:
    """Half the width of the x axis, in nats."""
    if loss.name in SPANS:
        return SPANS[loss.name]
    beta = options.get("beta", 0.1)
    per_token = "chosen_lengths" in tensors(loss) and beta >= 1
    wide = 6 / beta * (Scene().lengths[0] if per_token else 1)
    return float(min(wide, -1.9 * REFERENCE) if _sees_logps(loss) else wide)


def _sees_logps(loss: Loss) -> bool:
    """Whether a loss takes log-probabilities otherwise than in log-ratios of whole responses."""
    return not needs_reference(loss) or "chosen_lengths" in tensors(loss)


def default_options(loss: Loss) -> dict[str, Any]:
    """The keyword arguments with which a figure is drawn."""
    options = LOSS_CONFIGS[loss.name]().arguments()
    return options | ({"vocab_size": 50_257} if loss.name == "mallows_po" else {})


def curves(loss: Loss) -> list[Curve]:
    """The lines of the figure of a loss."""
    if loss.kind == "list":
        return [_list_curve(loss, place) for place in range(len(RANKED))]
    if loss.kind == "unpaired":
        return [_unpaired_curve(loss, desirable) for desirable in (True, False)]
    return [_pair_curve(loss, variant) for variant in VARIANTS.get(loss.name, [Variant("")])]


def _pair_curve(loss: Loss, variant: Variant) -> Curve:
    """Loss against the margin: chosen log-ratio +x/2, rejected -x/2, each pair alone."""
    options = default_options(loss) | dict(variant.options)
    x = np.linspace(-1, 1, NUM_POINTS) * span(loss, options)
    values, up, down = [], [], []
    for margin in x:
        chosen = torch.tensor([REFERENCE + margin / 2], dtype=torch.float64, requires_grad=True)
        rejected = torch.tensor([REFERENCE - margin / 2], dtype=torch.float64, requires_grad=True)
        arguments = [_of_pair(n, chosen, rejected, variant.scene) for n in tensors(loss)]
        value = loss.function(*arguments, **options).mean()
        chosen_slope, rejected_slope = torch.autograd.grad(
            value, [chosen, rejected], allow_unused=True, materialize_grads=True
        )
        values.append(value.item())
        up.append(-chosen_slope.item())
        down.append(-rejected_slope.item())
    pulls = {"chosen": np.array(up), "rejected": np.array(down)}
    return Curve(variant.label, x, np.array(values), pulls)


def _of_pair(name: str, chosen: Tensor, rejected: Tensor, scene: Scene) -> Tensor:
    """One of the tensors that a loss of a pair takes, for a single pair."""
    which = 1 if "rejected" in name else 0
    length = scene.lengths[which]

    def constant(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    policy = (chosen, rejected)[which]
    logps = policy if name.startswith("policy_") else constant(REFERENCE)
    if name in ("reward_shift", "running_margin"):
        return torch.tensor(0.0, dtype=torch.float64)
    if name == "running_margin_std":
        return torch.tensor(0.5, dtype=torch.float64)
    if name.endswith("_lengths"):
        return torch.tensor([length])
    if name.endswith("_scores"):
        return constant(scene.scores[which])
    if name.endswith("_token_logps"):
        return (logps / length).unsqueeze(-1).expand(1, length)
    if name.endswith("_token_log_collision"):
        return torch.full((1, length), scene.log_collision, dtype=torch.float64)
    if name.endswith("_entropy"):
        return constant(scene.entropy * length)
    if name.endswith("_forward_kl"):
        return constant(scene.forward_kl)
    assert name.endswith("_logps"), name
    return logps


def _list_curve(loss: Loss, place: int) -> Curve:
    """Loss of a list of three against the log-ratio of one of them, the other two at 0."""
    options = default_options(loss)
    x = np.linspace(-1, 1, NUM_POINTS) * span(loss, options)
    fixed = {
        "mask": torch.ones(1, 3, dtype=torch.bool),
        "ranks": torch.arange(3).unsqueeze(0),
        "scores": torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64),
        "reference_logps": torch.full((1, 3), REFERENCE, dtype=torch.float64),
    }
    values, pulls = [], []
    for log_ratio in x:
        policy = fixed["reference_logps"].clone()
        policy[0, place] += log_ratio
        policy.requires_grad_()
        given = {**fixed, "policy_logps": policy}
        value = loss.function(*(given[name] for name in tensors(loss)), **options).mean()
        (slope,) = torch.autograd.grad(value, policy)
        values.append(value.item())
        pulls.append(-slope[0, place].item())
    label = f"{RANKED[place]} moves"
    return Curve(label, x, np.array(values), {"": np.array(pulls)})


def _unpaired_curve(loss: Loss, desirable: bool) -> Curve:
    """Loss of one response against its log-ratio; where others matter, beside one of the other
    kind with log-ratio 0.
    """
    options = default_options(loss)
    x = np.linspace(-1, 1, NUM_POINTS) * span(loss, options)
    rows = 2 if loss.name == "aot_unpaired" else 1
    zero = torch.tensor(0.0, dtype=torch.float64)
    fixed = {
        "reference_logps": torch.full((rows,), REFERENCE, dtype=torch.float64),
        "desirable": torch.tensor([desirable, not desirable][:rows]),
        "kl": zero,
        "reward_shift": zero,
    }
    values, pulls = [], []
    for log_ratio in x:
        policy = fixed["reference_logps"].clone()
        policy[0] += log_ratio
        policy.requires_grad_()
        given = {**fixed, "policy_logps": policy}
        value = loss.function(*(given[name] for name in tensors(loss)), **options).mean()
        (slope,) = torch.autograd.grad(value, policy)
        values.append(value.item())
        pulls.append(-slope[0].item())
    label = "desirable" if desirable else "undesirable"
    return Curve(label, x, np.array(values), {"": np.array(pulls)})


def caption(loss: Loss) -> str:
    """What was held fixed in the figure of a loss, in one paragraph."""
    options = default_options(loss)
    defaults = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    at = f" Options: {defaults}." if defaults else ""
    if loss.name in VARIANTS:
        at += " The legend says what differs from that."
    pull = "The pull is minus the derivative of the loss by a response's log-probability: above 0 "
    pull += "it becomes likelier."
    if loss.kind == "list":
        moving = "One response of a list of three moves; the log-ratios of the other two are 0."
        if "scores" in tensors(loss):
            moving += " Scores are 1, 0.5 and 0."
    elif loss.kind == "unpaired":
        moving = "One response moves."
        if loss.name == "aot_unpaired":
            moving += " The batch has one response of the other kind, with log-ratio 0."
        if "kl" in tensors(loss):
            moving += " The reference point is 0."
        if "reward_shift" in tensors(loss):
            moving += " The shift is 0."
    else:
        moving = _moving_pair(loss) + _fixed(loss)
    return f"{moving} {pull}{at}"


def _moving_pair(loss: Loss) -> str:
    if needs_reference(loss):
        return "The chosen response's log-ratio is +Δ/2, the rejected one's −Δ/2."
    return "From Δ = 0 on the chosen response gains Δ/2 in log-probability, the rejected one −Δ/2."


def _fixed(loss: Loss) -> str:
    """What else a pair's figure holds fixed, as sentences."""
    names, scene = tensors(loss), Scene()
    said = []
    if _sees_logps(loss):
        start = "log π_ref" if needs_reference(loss) else "log π at Δ = 0"
        said += [f"{start} = {REFERENCE:g} nats for both", f"{scene.lengths[0]} tokens each"]
    if "chosen_scores" in names:
        said.append("scores {:g} and {:g}".format(*scene.scores))
    if "chosen_forward_kl" in names:
        said.append(f"D = {scene.forward_kl:g} for both")
    if "running_margin" in names or "reward_shift" in names:
        said.append("running means 0")
    if "running_margin_std" in names:
        said.append("running standard deviation 0.5")
    if "Depends on the batch" in (loss.function.__doc__ or ""):
        said.append("the pair is the whole batch")
    return f" Fixed: {', '.join(said)}." if said else ""


def svg(name: str) -> str:
    """The figure of a loss as SVG text; the same versions of the libraries give the same text."""
    import matplotlib

    text = io.StringIO()
    with paper_style(), matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        draw(LOSSES[name]).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is enough, and halves the file.
    rounded = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", text.getvalue())
    return "\n".join(line.rstrip() for line in rounded.splitlines()) + "\n"


def draw(loss: Loss) -> Figure:
    """The figure of a loss: its value on the left, the pulls on log-probabilities on the right."""
    figure = new_figure(DOUBLE_COLUMN, 2.5)
    loss_axes, pull_axes = figure.subplots(1, 2)
    drawn = curves(loss)
    for index, curve in enumerate(drawn):
        colour = look(index)["color"]
        loss_axes.plot(curve.x, curve.loss, color=colour, label=curve.label or None)
        for style, (which, pull) in zip(("-", "--"), curve.pulls.items(), strict=False):
            label = f"on the {which} response" if which and index == 0 else None
            pull_axes.plot(curve.x, pull, color=colour, ls=style, label=label)
    for axes in (loss_axes, pull_axes):
        axes.axvline(0, color=MUTED, lw=0.6, zorder=1)
        axes.set_xlabel("margin Δ (nats)" if loss.kind == "pair" else "log-ratio h (nats)")
    pull_axes.axhline(0, color=MUTED, lw=0.6, zorder=1)
    loss_axes.set_title("Loss")
    pull_axes.set_title("Pull on the log-probability")
    if len(drawn) > 1:
        loss_axes.legend()
    if loss.kind == "pair":
        pull_axes.legend()
    return figure
