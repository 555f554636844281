"""The options of every loss, one class a loss: `loss.name=` chooses the class.

The fields of a class are the keyword-only parameters of the loss function of that name
(`dpo.core.family`), so an option that a loss does not use is an error. Nothing here needs torch.

Where defaults come from. Read in the authors' published code: simpo, alpha_dpo, beta_dpo, cal_dpo,
the scale of mallows_po, alpha of odpo. Read in TRL: tau of discopop, label smoothing of exo. Ours,
for want of one: divergence js of f_dpo, no cut in chi_po, alpha of ld_dpo, beta of squared_po. The
rest is recalled from the papers and not compared with them again.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from dpo.sections import Count, NonNegative, Positive, Section, shorthand_for

Kind = Literal["pair", "list", "unpaired"]

Pull = Annotated[Positive, Field(description="Strength of the pull towards the reference.")]
RewardScale = Annotated[Positive, Field(description="Reward per nat of log-probability.")]
FlipRate = Annotated[float, Field(ge=0, lt=0.5, description="Probability that a label is flipped.")]
LikelihoodWeight = Annotated[
    NonNegative, Field(description="Weight of the chosen response's negative log-likelihood.")
]
Cap = Annotated[float, Field(gt=0)]
"""Unlike other numbers it may be infinite: no cap."""


class RunningConfig(Section):
    """Running means that a loss takes from batch to batch."""

    momentum: float = Field(
        0.9, ge=0, lt=1, description="Share of the old value that an update keeps."
    )


class LossSection(Section):
    """What the options of all losses have in common."""

    kind: ClassVar[Kind] = "pair"
    NOT_ARGUMENTS: ClassVar[frozenset[str]] = frozenset({"name", "running", "keep"})
    """Fields that are not options of the loss function itself."""

    def model_post_init(self, context: Any) -> None:
        # Without its name a dump of what was set would be read again as dpo.
        self.model_fields_set.add("name")

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the loss function, complete but for `mallows_po`'s vocab_size.

        >>> DPOLossConfig(beta=0.2).arguments()
        {'beta': 0.2, 'label_smoothing': 0.0}
        """
        return self.model_dump(exclude=set(self.NOT_ARGUMENTS))

    @classmethod
    def option_names(cls) -> list[str]:
        """What a user can set besides the name."""
        return [name for name in cls.model_fields if name != "name"]


class DPOLossConfig(LossSection):
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    name: Literal["dpo"] = "dpo"
    beta: Pull = 0.1
    label_smoothing: FlipRate = Field(
        0.0, description="Probability that a label is flipped (conservative DPO)."
    )


class RobustLossConfig(LossSection):
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409)."""

    name: Literal["robust"] = "robust"
    beta: Pull = 0.1
    label_smoothing: FlipRate = 0.1


class IPOLossConfig(LossSection):
    """IPO (Azar et al. 2023, arXiv:2310.12036)."""

    name: Literal["ipo"] = "ipo"
    beta: Positive = Field(0.1, description="The paper's tau; the margin stops at 1 / (2 beta).")


class HingeLossConfig(LossSection):
    """Hinge on DPO's margin, RSO's hinge-norm (T. Liu et al. 2023, arXiv:2309.06657)."""

    name: Literal["hinge"] = "hinge"
    beta: Positive = Field(0.05, description="The paper's gamma; the hinge is at 1 / beta nats.")


class EXOLossConfig(LossSection):
    """EXO on pairs (Ji et al. 2024, arXiv:2402.00856)."""

    name: Literal["exo"] = "exo"
    beta: Pull = 0.1
    label_smoothing: float = Field(
        1e-3, gt=0, lt=0.5, description="Probability that a label is flipped; not 0."
    )


class NCAPairLossConfig(LossSection):
    """NCA on pairs (H. Chen et al. 2024, arXiv:2402.05369)."""

    name: Literal["nca_pair"] = "nca_pair"
    beta: Pull = 0.01


class BCOPairLossConfig(LossSection):
    """BCO on pairs (Jung et al. 2024, arXiv:2404.04656)."""

    name: Literal["bco_pair"] = "bco_pair"
    beta: Pull = 0.1


class SPPOLossConfig(LossSection):
    """SPPO with hard labels (Y. Wu et al. 2024, arXiv:2405.00675)."""

    name: Literal["sppo"] = "sppo"
    beta: Positive = Field(1e-3, description="1 / eta; log-ratios aim at +-1 / (2 beta).")


class SPPOSoftLossConfig(LossSection):
    """SPPO with winning probabilities from the data (Y. Wu et al. 2024, arXiv:2405.00675)."""

    name: Literal["sppo_soft"] = "sppo_soft"
    beta: Positive = Field(1e-3, description="1 / eta; log-ratios aim at (score - 1/2) / beta.")


class AOTLossConfig(LossSection):
    """AOT on pairs (Melnyk et al. 2024, arXiv:2406.05882)."""

    name: Literal["aot"] = "aot"
    beta: Pull = 0.1


class APOZeroLossConfig(LossSection):
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266)."""

    name: Literal["apo_zero"] = "apo_zero"
    beta: Pull = 0.1


class APODownLossConfig(LossSection):
    """APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266)."""

    name: Literal["apo_down"] = "apo_down"
    beta: Pull = 0.1


class DiscoPOPLossConfig(LossSection):
    """DiscoPOP (C. Lu et al. 2024, arXiv:2406.08414)."""

    name: Literal["discopop"] = "discopop"
    beta: Pull = 0.05
    tau: float = Field(
        0.05, gt=0, le=1, description="How sharply the loss changes from logistic to exponential."
    )


class FDPOLossConfig(LossSection):
    """f-DPO (C. Wang et al. 2023, arXiv:2309.16240)."""

    name: Literal["f_dpo"] = "f_dpo"
    beta: Pull = 0.1
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "js", description="What keeps the policy near the reference; with reverse_kl it is dpo."
    )
    alpha: float | None = Field(
        None,
        gt=0,
        lt=1,
        validate_default=True,
        description="From reverse (0) to forward KL (1); for divergence alpha alone.",
    )

    @field_validator("alpha")
    @classmethod
    def _belongs_to_its_divergence(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        divergence = info.data.get("divergence")  # absent if it was wrong itself
        if divergence == "alpha" and alpha is None:
            raise ValueError("is required with divergence alpha, e.g. 0.5")
        if divergence not in (None, "alpha") and alpha is not None:
            raise ValueError(f"has no effect with divergence {divergence}, only with alpha")
        return alpha


class ChiPOLossConfig(LossSection):
    """Chi-squared preference optimisation (A. Huang et al. 2024, arXiv:2407.13399)."""

    name: Literal["chi_po"] = "chi_po"
    beta: Pull = 0.05
    max_reward: Cap = Field(
        float("inf"), description="The largest reward R; margins are cut at +-2 R, and not at inf."
    )


class SquaredPOLossConfig(LossSection):
    """SquaredPO (Pipano et al. 2026, arXiv:2602.06788)."""

    name: Literal["squared_po"] = "squared_po"
    beta: Pull = 0.1


class RDPOLossConfig(LossSection):
    """Length-regularised DPO (Park et al. 2024, arXiv:2403.19159)."""

    name: Literal["r_dpo"] = "r_dpo"
    beta: Pull = 0.1
    alpha: NonNegative = Field(0.01, description="Reward taken off per token.")


class LengthNormalisedDPOLossConfig(LossSection):
    """Length-normalised DPO (Lambert et al. 2024, Tülu 3, arXiv:2411.15124)."""

    name: Literal["length_normalised_dpo"] = "length_normalised_dpo"
    beta: Positive = Field(5.0, description="Pull towards the reference, on log-ratios per token.")


class DPOPLossConfig(LossSection):
    """DPO-Positive (Pal et al. 2024, Smaug, arXiv:2402.13228)."""

    name: Literal["dpop"] = "dpop"
    beta: Pull = 0.3
    penalty: NonNegative = Field(
        50.0, description="Lambda: charge per nat that the chosen response falls by."
    )


class BetaDPOLossConfig(LossSection):
    """beta-DPO (J. Wu et al. 2024, arXiv:2407.08639)."""

    name: Literal["beta_dpo"] = "beta_dpo"
    beta: Pull = 0.1
    margin_scale: NonNegative = Field(
        0.6, description="How much beta follows the batch's margin; 0 is dpo."
    )
    keep: float = Field(
        0.8, gt=0, le=1, description="Share of a batch to train on, outliers dropped; 1: all."
    )
    running: RunningConfig = RunningConfig()


class CalDPOLossConfig(LossSection):
    """Cal-DPO (Xiao et al. 2024, arXiv:2412.14516)."""

    name: Literal["cal_dpo"] = "cal_dpo"
    beta: Positive = Field(2e-3, description="Log-ratios are held at +-1 / (2 beta).")


class ODPOLossConfig(LossSection):
    """DPO with an offset (Amini et al. 2024, arXiv:2402.10571)."""

    name: Literal["odpo"] = "odpo"
    beta: Pull = 0.1
    alpha: NonNegative = Field(1.0, description="Scale of the offset; 0 is dpo.")


class RPOLossConfig(LossSection):
    """Reward-aware preference optimisation (S. Sun et al. 2025, arXiv:2502.00203)."""

    name: Literal["rpo"] = "rpo"
    beta: Pull = 0.1
    reward_scale: Positive = Field(1.0, description="Eta: what a difference in score is worth.")
    divergence: Literal["backward_kl", "forward_kl", "squared"] = Field(
        "backward_kl", description="How the margin is compared with the scores' difference."
    )


class AlphaDPOLossConfig(LossSection):
    """AlphaDPO (J. Wu et al. 2024, arXiv:2410.10148)."""

    name: Literal["alpha_dpo"] = "alpha_dpo"
    beta: RewardScale = 2.5
    gamma: NonNegative = Field(1.5, description="Target margin of an average pair.")
    alpha: NonNegative = Field(
        0.2, description="How much the target follows the pair's own margin; 0 is simpo."
    )
    running: RunningConfig = RunningConfig()


class NLLLossConfig(LossSection):
    """Likelihood of the chosen responses (Pang et al. 2024, arXiv:2404.19733)."""

    name: Literal["nll"] = "nll"


class UnlikelihoodLossConfig(LossSection):
    """Unlikelihood (a baseline of Rafailov et al. 2023, arXiv:2305.18290)."""

    name: Literal["unlikelihood"] = "unlikelihood"
    alpha: float = Field(1.0, gt=0, le=1, description="Weight of the rejected response.")


class SimPOLossConfig(LossSection):
    """SimPO (Meng et al. 2024, arXiv:2405.14734)."""

    name: Literal["simpo"] = "simpo"
    beta: RewardScale = 2.0
    gamma: NonNegative = Field(1.0, description="Target margin.")


class CPOLossConfig(LossSection):
    """CPO (H. Xu et al. 2024, arXiv:2401.08417)."""

    name: Literal["cpo"] = "cpo"
    beta: RewardScale = 0.1
    nll_weight: LikelihoodWeight = 1.0


class ORPOLossConfig(LossSection):
    """ORPO (Hong et al. 2024, arXiv:2403.07691)."""

    name: Literal["orpo"] = "orpo"
    beta: Positive = Field(0.1, description="The paper's lambda: weight of the odds ratio.")
    nll_weight: LikelihoodWeight = 1.0


class AlphaPOLossConfig(LossSection):
    """AlphaPO (Gupta et al. 2025, arXiv:2501.03884)."""

    name: Literal["alpha_po"] = "alpha_po"
    beta: RewardScale = 2.5
    gamma: NonNegative = Field(2.5, description="Target margin.")
    alpha: float = Field(
        0.25, allow_inf_nan=False, description="Bend of the reward; not 0, towards 0 it is simpo."
    )

    @field_validator("alpha")
    @classmethod
    def _bent(cls, alpha: float) -> float:
        if alpha == 0:
            raise ValueError("expected a number that is not 0; with 0 it would be simpo (got 0)")
        return alpha


class SLiCLossConfig(LossSection):
    """SLiC (Y. Zhao et al. 2023, arXiv:2305.10425)."""

    name: Literal["slic"] = "slic"
    delta: NonNegative = Field(1.0, description="Margin of the hinge, in nats.")
    nll_weight: LikelihoodWeight = 0.5


class TDPO1LossConfig(LossSection):
    """TDPO1 (Zeng et al. 2024, arXiv:2404.11999)."""

    name: Literal["tdpo1"] = "tdpo1"
    beta: Pull = 0.1


class TDPO2LossConfig(LossSection):
    """TDPO2 (Zeng et al. 2024, arXiv:2404.11999)."""

    name: Literal["tdpo2"] = "tdpo2"
    beta: Pull = 0.1
    alpha: NonNegative = Field(0.5, description="Weight of the tokens' divergences.")


class LDDPOLossConfig(LossSection):
    """LD-DPO (W. Liu et al. 2024, arXiv:2409.06411)."""

    name: Literal["ld_dpo"] = "ld_dpo"
    beta: Pull = 0.1
    alpha: float = Field(
        0.5, ge=0, le=1, description="Weight of the tokens that only the longer response has."
    )


class WPOLossConfig(LossSection):
    """WPO (W. Zhou et al. 2024, arXiv:2406.11827)."""

    name: Literal["wpo"] = "wpo"
    beta: Pull = 0.01
    max_weight: Cap = Field(1.0, description="Largest weight of a pair; may be inf.")


class MallowsPOLossConfig(LossSection):
    """MallowsPO-theta (H. Chen et al. 2024, arXiv:2405.14953)."""

    name: Literal["mallows_po"] = "mallows_po"
    beta: Pull = 0.1
    dispersion_scale: Positive = Field(0.29, description="c: scale of the margin's weight phi.")


class PlackettLuceLossConfig(LossSection):
    """Plackett-Luce DPO on ranked lists (Rafailov et al. 2023, arXiv:2305.18290)."""

    kind: ClassVar[Kind] = "list"
    name: Literal["plackett_luce"] = "plackett_luce"
    beta: Pull = 0.1
    top: Count | None = Field(None, description="Places scored, from the best; none: all.")


class AllPairsLossConfig(LossSection):
    """DPO on every pair of a ranked list (Rafailov et al. 2023, arXiv:2305.18290)."""

    kind: ClassVar[Kind] = "list"
    name: Literal["all_pairs"] = "all_pairs"
    beta: Pull = 0.1


class LiPOLambdaLossConfig(LossSection):
    """LiPO-lambda on scored lists (T. Liu et al. 2024, arXiv:2402.01878)."""

    kind: ClassVar[Kind] = "list"
    name: Literal["lipo_lambda"] = "lipo_lambda"
    beta: Pull = 0.05


class KTOLossConfig(LossSection):
    """KTO on judged responses (Ethayarajh et al. 2024, arXiv:2402.01306)."""

    kind: ClassVar[Kind] = "unpaired"
    name: Literal["kto"] = "kto"
    beta: Positive = Field(0.1, description="How fast the value of a response saturates, per nat.")
    desirable_weight: Positive = Field(1.0, description="Lambda_D, of desirable responses.")
    undesirable_weight: Positive = Field(1.0, description="Lambda_U, of undesirable responses.")


class BCOLossConfig(LossSection):
    """BCO on judged responses (Jung et al. 2024, arXiv:2404.04656)."""

    kind: ClassVar[Kind] = "unpaired"
    name: Literal["bco"] = "bco"
    beta: Pull = 0.1


class NCAUnpairedLossConfig(LossSection):
    """NCA on judged responses (H. Chen et al. 2024, arXiv:2402.05369)."""

    kind: ClassVar[Kind] = "unpaired"
    name: Literal["nca_unpaired"] = "nca_unpaired"
    beta: Pull = 0.01
    desirable_fraction: float = Field(
        0.5, gt=0, lt=1, description="Share of desirable responses in the data."
    )


class AOTUnpairedLossConfig(LossSection):
    """AOT on judged responses (Melnyk et al. 2024, arXiv:2406.05882)."""

    kind: ClassVar[Kind] = "unpaired"
    name: Literal["aot_unpaired"] = "aot_unpaired"
    beta: Pull = 0.1


PairLossConfig = (
    DPOLossConfig
    | RobustLossConfig
    | IPOLossConfig
    | HingeLossConfig
    | EXOLossConfig
    | NCAPairLossConfig
    | BCOPairLossConfig
    | SPPOLossConfig
    | SPPOSoftLossConfig
    | AOTLossConfig
    | APOZeroLossConfig
    | APODownLossConfig
    | DiscoPOPLossConfig
    | FDPOLossConfig
    | ChiPOLossConfig
    | SquaredPOLossConfig
    | RDPOLossConfig
    | LengthNormalisedDPOLossConfig
    | DPOPLossConfig
    | BetaDPOLossConfig
    | CalDPOLossConfig
    | ODPOLossConfig
    | RPOLossConfig
    | AlphaDPOLossConfig
    | NLLLossConfig
    | UnlikelihoodLossConfig
    | SimPOLossConfig
    | CPOLossConfig
    | ORPOLossConfig
    | AlphaPOLossConfig
    | SLiCLossConfig
    | TDPO1LossConfig
    | TDPO2LossConfig
    | LDDPOLossConfig
    | WPOLossConfig
    | MallowsPOLossConfig
)
ListLossConfig = PlackettLuceLossConfig | AllPairsLossConfig | LiPOLambdaLossConfig
UnpairedLossConfig = KTOLossConfig | BCOLossConfig | NCAUnpairedLossConfig | AOTUnpairedLossConfig
SingleLossConfig = PairLossConfig | ListLossConfig | UnpairedLossConfig

LOSS_CONFIGS: dict[str, type[LossSection]] = {
    config.model_fields["name"].default: config for config in get_args(SingleLossConfig)
}
"""The class of every loss, by its name, in the order of `dpo.core.family.LOSSES`."""

OPTION_KEYS = sorted({f"loss.{o}" for c in LOSS_CONFIGS.values() for o in c.option_names()})
"""The options of all losses, as dotted keys."""

REFERENCE_FREE = frozenset({"nll", "unlikelihood", "simpo", "cpo", "orpo", "alpha_po", "slic"})
"""Losses that load no reference model."""


class WeightedLoss(Section):
    """A loss of a mixture, written as its own options with a weight beside them."""

    weight: Positive = Field(1.0, description="What its values are multiplied by.")
    loss: Annotated[PairLossConfig, Field(discriminator="name")]

    @model_validator(mode="before")
    @classmethod
    def _from_one_mapping(cls, value: Any) -> Any:
        """`{name: dpo, weight: 0.8, beta: 0.1}` as weight and loss."""
        if isinstance(value, Mapping) and "loss" not in value:
            if "name" not in value:
                raise ValueError(f"expected the name of a loss, e.g. {MIX_EXAMPLE} (got {value})")
            loss = {key: inner for key, inner in value.items() if key != "weight"}
            return {key: value[key] for key in value if key == "weight"} | {"loss": loss}
        return value

    @model_serializer
    def _as_one_mapping(self) -> dict[str, Any]:
        options = self.loss.model_dump()
        return {"name": options.pop("name"), "weight": self.weight, **options}


MIX_EXAMPLE = "{name: dpo, weight: 0.8}"


class MixLossConfig(Section):
    """Several losses of a pair, added with weights."""

    kind: ClassVar[Kind] = "pair"
    name: Literal["mix"] = "mix"
    mix: list[WeightedLoss] = Field(
        min_length=2, description=f"The losses, each with its weight: {MIX_EXAMPLE}."
    )

    def model_post_init(self, context: Any) -> None:
        # Without its name a dump of what was set would be read again as dpo.
        self.model_fields_set.add("name")


LossConfig = Annotated[SingleLossConfig | MixLossConfig, Field(discriminator="name")]


def takes_reference(loss: SingleLossConfig | MixLossConfig) -> bool:
    """Whether training with that loss loads a reference model."""
    if isinstance(loss, MixLossConfig):
        return any(takes_reference(entry.loss) for entry in loss.mix)
    return loss.name not in REFERENCE_FREE


# What a user wrote, and sentences about it.


def with_name(value: Any) -> Any:
    """Options without a name are those of dpo, or of mix where there is a mixture; a text is a
    name.

    >>> with_name({"beta": 0.2})
    {'name': 'dpo', 'beta': 0.2}
    >>> with_name("ipo")
    {'name': 'ipo'}
    """
    if isinstance(value, Section):
        return value
    value = shorthand_for("name")(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"expected options of a loss, e.g. loss.name=ipo (got {value!r:.60})")
    return {"name": "mix" if "mix" in value else "dpo", **value}


def without_tags(location: Sequence[str | int]) -> list[str]:
    """The place of a problem as the user wrote it: pydantic adds the name of the loss to it.

    >>> without_tags(["loss", "ipo", "label_smoothing"])
    ['loss', 'label_smoothing']
    >>> without_tags(["loss", "mix", "mix", 1, "loss", "ipo", "beta"])
    ['loss', 'mix', '1', 'beta']
    """
    parts = [str(part) for part in location]
    match parts:
        case ["loss", "mix", "mix", entry, "loss", _, *inner]:
            return ["loss", "mix", entry, *inner]
        case ["loss", "mix", "mix", entry, "loss"]:
            return ["loss", "mix", entry]
        case ["loss", _, *inner]:
            return ["loss", *inner]
    return parts


def describe_unknown_loss(name: Any) -> str:
    """Why a `loss.name` is not accepted, and which one may be meant."""
    if name in [*LOSS_CONFIGS, "mix"]:  # refused inside a mixture alone
        return f"a mixture takes losses of pairs, and no other mixture (got {name!r})"
    close = difflib.get_close_matches(str(name), [*LOSS_CONFIGS, "mix"], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"there is no such loss (got {name!r:.60}); {hint}`dpo losses` lists them"


def describe_effectless(location: Sequence[str | int]) -> str | None:
    """Why a loss does not take an option, if the place is an option of a known loss."""
    match [str(part) for part in location]:
        case ["loss", "mix", "mix", _, "loss", name, option] | ["loss", name, option]:
            return _effectless(name, option)
    return None


def _effectless(name: str, option: str) -> str:
    if name == "mix":
        return f"has no effect with loss mix; it belongs to an entry of loss.mix: {MIX_EXAMPLE}"
    if option == "mix":
        return f"has no effect with loss {name}; leave loss.name out, or name mix"
    own = LOSS_CONFIGS[name].option_names()
    takes = f"takes {_listed(own) if own else 'no options'}"
    others = [n for n, config in LOSS_CONFIGS.items() if option in config.option_names()]
    if others:
        take_it = f"{_listed(others, at_most=4)} {'takes' if len(others) == 1 else 'take'} it"
        return f"has no effect with loss {name}, which {takes}; {take_it}"
    close = difflib.get_close_matches(option, own, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown key; loss {name} {takes}{hint}"


def _listed(names: Sequence[str], at_most: int | None = None) -> str:
    """`a, b and c`, or `a, b and 7 others`.

    >>> _listed(["beta", "gamma", "alpha"])
    'beta, gamma and alpha'
    """
    shown = list(names)
    if at_most is not None and len(names) > at_most:
        shown = [*names[: at_most - 1], f"{len(names) - at_most + 1} others"]
    *first, last = shown
    return f"{', '.join(first)} and {last}" if first else last
