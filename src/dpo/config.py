"""What a user can set of training: the sections, and the configuration of each command."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from dpo.loss_config import DPOLossConfig as DPOLossConfig  # "as": for others to import from here
from dpo.loss_config import LossConfig as LossConfig
from dpo.loss_config import MixLossConfig as MixLossConfig
from dpo.loss_config import (
    takes_reference,
    with_name,
)
from dpo.sections import Count, Folder, NonNegative, Positive, Seed, shorthand, shorthand_for
from dpo.sections import Section as Section


def _every(value: Any) -> Any:
    """One sentence instead of one for each member of the union."""
    if value == "epoch" or (type(value) is int and value >= 1):  # True is an int too
        return value
    raise ValueError(f"expected 'epoch' or a number of steps, at least 1 (got {value!r:.60})")


def _sources(value: Any) -> Any:
    several = isinstance(value, list) and value and all(isinstance(v, str) for v in value)
    if isinstance(value, str) or several:
        return value
    raise ValueError(f"expected a text or a list of texts (got {value!r:.60})")


Every = Annotated[Literal["epoch"] | int, BeforeValidator(_every)]
Sources = Annotated[str | list[str], BeforeValidator(_sources)]


class FreshModelConfig(Section):
    """A GPT-2 with random weights and a byte-level BPE tokenizer learnt from the training data."""

    width: Count = Field(96, description="Hidden size.")
    layers: Count = Field(2, description="Transformer blocks.")
    heads: Count = Field(2, description="Attention heads; width must be a multiple.")
    positions: Count = Field(256, description="Longest sequence, in tokens.")
    vocab_size: Count = Field(512, description="Entries of the tokenizer, at least 257.")


class ModelConfig(Section):
    """Where the weights come from."""

    path: str | None = Field(None, description="Hub id, model folder, or run directory.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    tokenizer: str | None = Field(None, description="Hub id or folder, if not the model's own.")
    fresh: FreshModelConfig | None = Field(None, description="Start from random weights instead.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.fresh is None):
            raise ValueError("give either a model (path) or model.fresh, and not both")
        if self.fresh is not None and (self.tokenizer or self.revision):
            raise ValueError("tokenizer and revision have no effect with model.fresh")
        return self


class SyntheticConfig(Section):
    """The embedded data: how much of it (`data=synthetic`)."""

    num_facts: Count = Field(80, le=80, description="Facts; each is asked in four phrasings.")
    num_rows: Count = Field(2000, description="Demonstrations or preference pairs to draw.")
    seed: Seed = Field(0, description="Decides which are drawn.")


class DataConfig(Section):
    """Which rows, and how they become text and tokens."""

    path: Sources = Field(
        "synthetic",
        description="File, folder, pattern (shards/*.parquet), list of them, hub id, or "
        "'synthetic' (the embedded data).",
    )
    test: str | None = Field(None, description="Held-out rows, if they are a source of their own.")
    split: str | None = Field(None, description="Split of a hub data set (default: train).")
    revision: str | None = Field(None, description="Revision of a hub data set.")
    columns: dict[str, str] = Field(default={}, description="Our column name: yours.")
    template: str | None = Field(
        None, description="plain, alpaca, hh, question, chat, or a text with {prompt} in it."
    )
    test_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the prompts held out.")
    split_seed: Seed = Field(0, description="Decides which prompts are held out.")
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="Prompt and response, tokens.")
    max_dropped: float = Field(
        0.01, ge=0, le=1, description="Share of rows that may be dropped before the run stops."
    )
    store: Literal["memory", "arrow"] = Field(
        "memory",
        description="arrow: pairs stay on disk, tokenised once and memory-mapped (docs/data.md).",
    )
    cache: Folder | None = Field(
        None, description="Folder for what store=arrow keeps; none: $DPO_CACHE or the user's cache."
    )
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _no_effectless_option(self) -> DataConfig:
        given = self.model_fields_set
        if self.path != "synthetic" and "synthetic" in given:
            raise ValueError("data.synthetic has no effect unless data is 'synthetic'")
        if self.path == "synthetic":
            for name in ("test", "split", "revision", "columns"):
                if getattr(self, name):
                    raise ValueError(f"data.{name} has no effect when data is 'synthetic'")
            if self.store != "memory":
                raise ValueError("data.store has no effect when data is 'synthetic'")
        if self.cache is not None and self.store == "memory":
            raise ValueError("data.cache has no effect unless data.store is arrow")
        if self.test is not None and given & {"test_fraction", "split_seed"}:
            raise ValueError("test_fraction and split_seed have no effect when data.test is given")
        return self

    @model_serializer(mode="wrap")
    def _without_default_store(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Where rows are kept changes no result: what is recorded names it only if it was asked."""
        values: dict[str, Any] = serialize(self)
        if self.store == "memory":
            values = {k: v for k, v in values.items() if k not in ("store", "cache")}
        return values


class OptimizerConfig(Section):
    """AdamW, or the DPO paper's RMSprop, and the learning rate over the run."""

    name: Literal["adamw", "rmsprop", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="All but adamw and rmsprop need a GPU and bitsandbytes."
    )
    learning_rate: Positive = Field(5e-6, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the rate falls to 0 after the warm-up; constant: it does not."
    )
    warmup: NonNegative = Field(
        0.1, description="Share of the steps spent warming up; from 1 on, their number."
    )
    weight_decay: NonNegative = Field(0.0, description="Decoupled; matrices only.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Of the mean gradient (AdamW).")
    beta2: float = Field(0.95, ge=0, lt=1, description="Of the mean square of the gradient.")
    epsilon: Positive = Field(1e-8, description="Beside the root of the mean square.")
    max_grad_norm: Positive | None = Field(
        1.0, description="Gradients are clipped to this norm; null: they are not."
    )
    in_backward: bool = Field(
        False,
        description="Update each weight as soon as its gradient is known: less memory, the same "
        "result; needs max_grad_norm=null and batches that go through the model in one pass.",
    )

    @field_validator("warmup")
    @classmethod
    def _share_or_steps(cls, warmup: float) -> float:
        if warmup >= 1 and not warmup.is_integer():
            raise ValueError(f"expected a share below 1 or a whole number of steps (got {warmup})")
        return warmup

    @model_validator(mode="after")
    def _exact_in_backward(self) -> OptimizerConfig:
        if self.in_backward and self.max_grad_norm is not None:
            raise ValueError(
                "in_backward: clipping needs all gradients at once; set max_grad_norm=null"
            )
        if self.in_backward and self.name != "adamw":
            raise ValueError(f"in_backward: goes with name=adamw, not with {self.name}")
        return self

    @model_validator(mode="after")
    def _rmsprop_has_no_momentum(self) -> OptimizerConfig:
        if self.name == "rmsprop" and "beta1" in self.model_fields_set:
            raise ValueError("beta1: has no effect, rmsprop averages squares only (beta2)")
        if self.name == "rmsprop" and self.weight_decay > 0:
            raise ValueError("weight_decay: is for AdamW; rmsprop would scale it with the gradient")
        return self


class BatchConfig(Section):
    """How many rows make a step, and how many tokens go through the model at once."""

    size: Count = Field(32, description="Rows (pairs) per optimizer step.")
    max_tokens: Count = Field(
        4096, description="Tokens per forward and backward pass; gradients accumulate over them."
    )
    max_logit_mib: Count = Field(
        512, description="Memory for logits, in MiB; above it they are computed twice, in parts."
    )


class EvaluationDuringTraining(Section):
    """What is measured on held-out rows while training."""

    every: Every = Field("epoch", description="'epoch', or a number of steps.")
    max_rows: Count = Field(1000, description="Held-out rows used, at most (seeded choice).")
    num_samples: int = Field(8, ge=0, description="Generations shown at the end of the run.")
    sample_temperature: NonNegative = Field(0.7, description="Of those generations.")
    max_new_tokens: Count = Field(128, description="Longest generation, in tokens.")

    @model_validator(mode="after")
    def _generations_at_a_temperature(self) -> EvaluationDuringTraining:
        if self.num_samples == 0 and self.sample_temperature != 0.7:
            raise ValueError("sample_temperature has no effect when num_samples is 0")
        return self


class RewardSourceConfig(Section):
    """What scores responses: a model or a function."""

    model: str | None = Field(
        None, description="Reward model or other sequence classifier: run, folder or hub id."
    )
    label: str | None = Field(
        None, description="Of a classifier with several labels, the one whose log-odds are meant."
    )
    function: str | None = Field(
        None,
        description="'synthetic' (the true reward of the embedded data), or file.py:name, a Python "
        "function of a list of prompts and a list of responses that returns a list of numbers.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> RewardSourceConfig:
        if (self.model is None) == (self.function is None):
            raise ValueError("give either a reward model (model) or a function, and not both")
        if self.label is not None and self.model is None:
            raise ValueError("label has no effect without a model")
        if self.function is not None and self.function != "synthetic":
            file, separator, name = self.function.rpartition(":")
            if not (separator and file.endswith(".py") and name.isidentifier()):
                raise ValueError(
                    f"function: expected 'synthetic' or file.py:name (got {self.function!r:.60})"
                )
        return self


RewardSource = Annotated[RewardSourceConfig, BeforeValidator(shorthand_for("model"))]


class PreferenceEvaluation(EvaluationDuringTraining):
    """What is measured on held-out rows while training, and how far the policy has moved."""

    kl_prompts: int = Field(
        64,
        ge=0,
        description="Held-out prompts sampled for KL(policy || reference); 0: none. A loss without "
        "a reference is compared with the model it starts from, if this is given.",
    )
    kl_samples: Count = Field(1, description="Samples per prompt for the KL.")
    reward: RewardSource | None = Field(
        None, description="Mean reward of those samples as well: a reward model or a function."
    )

    @model_validator(mode="after")
    def _samples_to_reward(self) -> PreferenceEvaluation:
        if self.reward is not None and self.kl_prompts == 0:
            raise ValueError("reward has no effect when kl_prompts is 0")
        if self.kl_samples != 1 and self.kl_prompts == 0:
            raise ValueError("kl_samples has no effect when kl_prompts is 0")
        return self


class AdapterConfig(Section):
    """A few trained matrices beside frozen weights (docs/adapters.md)."""

    kind: Literal["lora", "dora", "rslora"] = Field("lora", description="lora, dora or rslora.")
    rank: Count | None = Field(None, description="Of each matrix; none: 16.")
    alpha: Positive | None = Field(
        None, description="Scale: alpha/rank (rslora: alpha/sqrt(rank)); none: 32."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Of an adapter's input while training.")
    target_modules: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="Last parts of the names of linear layers; none: all but the head."
    )
    quantize: Literal["4bit", "8bit"] | None = Field(
        None, description="How the frozen weights are held (QLoRA); needs a GPU and bitsandbytes."
    )


TrackerName = Literal["wandb", "mlflow", "trackio"]


def _tracker_names(value: Any) -> Any:
    """`report_to=wandb` means `report_to=[wandb]`."""
    return [value] if isinstance(value, str) else value


class HubConfig(Section):
    """Where a finished run's model is uploaded."""

    repo: str = Field(description="Repository of the hub, owner/name; made where there is none.")
    private: bool = Field(True, description="Of a repository that is made: seen by its owner only.")

    @field_validator("repo")
    @classmethod
    def _owner_and_name(cls, repo: str) -> str:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
            raise ValueError(f"expected owner/name (got {repo!r:.60})")
        return repo


class DistributedConfig(Section):
    """How the processes that torchrun or accelerate starts share the work; one alone has all."""

    kind: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: each has the whole model; fsdp: each a part (FSDP2)."
    )
    cpu_offload: bool = Field(
        False,
        description="With fsdp: parts, gradients and optimizer state stay in main memory, and the "
        "optimizer runs there; the GPU holds what is gathered.",
    )
    timeout_seconds: Positive = Field(
        600.0, description="A process that is silent for longer is lost, and all end."
    )

    @model_validator(mode="after")
    def _parts_to_offload(self) -> DistributedConfig:
        if self.cpu_offload and self.kind != "fsdp":
            raise ValueError("cpu_offload: only a model in parts is offloaded; set kind=fsdp too")
        return self


class RunConfig(Section):
    """What every training command takes."""

    PLACES: ClassVar[frozenset[str]] = frozenset(("out", "distributed", "report_to", "push_to_hub"))
    """Keys that say where a run takes place and who hears of it, not what it computes."""

    model: Annotated[ModelConfig, BeforeValidator(shorthand)]
    data: Annotated[DataConfig, BeforeValidator(shorthand)] = DataConfig()
    out: Folder = Field(description="The run directory.")
    seed: Seed = Field(0, description="Order of the rows, dropout, samples.")
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    precision: Literal["fp32", "bf16", "pure_bf16"] = Field(
        "fp32",
        description="bf16: matrix products only; pure_bf16: the weights too, with their float32 "
        "masters in the optimizer (dpo sft, dpo train).",
    )
    dropout: bool = Field(False, description="Use the model's own dropout while training.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, slower."
    )
    adapter: Annotated[AdapterConfig | None, BeforeValidator(shorthand_for("kind"))] = Field(
        None, description="Train an adapter and leave the weights; none: train all of them."
    )
    evaluation: EvaluationDuringTraining = EvaluationDuringTraining()
    save_every: Every = Field("epoch", description="'epoch', or steps.")
    report_to: Annotated[list[TrackerName], BeforeValidator(_tracker_names)] = Field(
        default=[],
        description="Who is told the metrics, beside TensorBoard: wandb, mlflow, trackio.",
    )
    push_to_hub: Annotated[HubConfig | None, BeforeValidator(shorthand_for("repo"))] = Field(
        None, description="Upload the finished run's model to the hub; none: it stays here."
    )
    distributed: DistributedConfig = DistributedConfig()

    @property
    def identity(self) -> dict[str, Any]:
        """All settings that decide the result, as JSON."""
        places: dict[str, Any] = dict.fromkeys(self.PLACES, True)
        return self.model_dump(mode="json", exclude=places | {"data": {"store", "cache"}})

    @field_validator("report_to")
    @classmethod
    def _trackers_that_are_here(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError(f"expected different ones, got {', '.join(names)}")
        for name in names:
            if find_spec(name) is None:
                raise ValueError(
                    f"{name} is not installed; pip install "
                    f"'direct-preference-optimization[{name}]', or leave it out"
                )
        return names

    @model_validator(mode="after")
    def _adapter_on_a_trained_model(self) -> RunConfig:
        if self.adapter is not None and self.model.fresh is not None:
            raise ValueError(
                "adapter: random weights (model.fresh) are trained whole; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _masters_of_pure_bf16(self) -> RunConfig:
        name = self.optimizer.name
        if self.precision == "pure_bf16" and name != "adamw":
            raise ValueError(
                f"precision: pure_bf16 needs optimizer.name=adamw; {name} has no masters"
            )
        quantized = self.adapter is not None and self.adapter.quantize is not None
        if self.precision == "pure_bf16" and quantized:
            raise ValueError("precision: pure_bf16 has no effect on quantised weights; take bf16")
        return self

    @property
    def draws_dropout(self) -> bool:
        """Whether a training step depends on random numbers."""
        return self.dropout or (self.adapter is not None and self.adapter.dropout > 0)


class TrainingConfig(RunConfig):
    """Training on given rows, several times over if asked."""

    epochs: Positive = Field(1.0, description="Passes over the training rows.")
    max_steps: Count | None = Field(None, description="Optimizer steps instead of epochs.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.max_steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("give either epochs or max_steps, not both")
        return self


class SFTOptimizerConfig(OptimizerConfig):
    """AdamW and its learning rate over the run."""

    learning_rate: Positive = Field(2e-5, description="Peak learning rate.")


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning: next-token loss on response tokens."""

    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    response: Literal["chosen", "rejected"] = Field(
        "chosen", description="Which response of a preference pair to imitate."
    )
    train_on_prompt: bool = Field(False, description="Score the prompt's tokens as well.")


class MovingReferenceConfig(Section):
    """A reference that follows the policy (TR-DPO: Gorbatovski et al. 2024, arXiv:2404.09656)."""

    mix: float = Field(0.6, gt=0, le=1, description="Share of the policy in an update; 1: a copy.")
    every: Count = Field(512, description="Optimizer steps between two updates.")


def check_float32_weights(config: RunConfig) -> None:
    """Refuse what is for language models that nothing but a loss looks at."""
    if config.precision == "pure_bf16":
        raise ValueError("precision: pure_bf16 is for dpo sft and dpo train; take bf16")


def check_frozen_reference(config: RunConfig, *keys: str) -> None:
    """With an adapter the reference is the policy's own model at its start, which stays."""
    for key in keys:
        if config.adapter is not None and getattr(config, key):
            raise ValueError(
                f"{key}: with an adapter the reference stays as it was; leave one of them out"
            )


class PreferenceConfig(TrainingConfig):
    """DPO or another preference loss, from an SFT model."""

    loss: Annotated[LossConfig, BeforeValidator(with_name)] = Field(
        DPOLossConfig(),
        description="The loss. These are the options of dpo; "
        "`dpo losses` lists all losses, `dpo losses NAME` the options of one.",
    )
    evaluation: PreferenceEvaluation = PreferenceEvaluation()
    reference: Annotated[ModelConfig | None, BeforeValidator(shorthand)] = Field(
        None, description="The reference, if not the model that training starts from."
    )
    moving_reference: MovingReferenceConfig | None = Field(
        None, description="Mix the policy into the reference at intervals; frozen by default."
    )

    @model_validator(mode="after")
    def _trained_models(self) -> PreferenceConfig:
        fresh = [c for c in (self.model, self.reference) if c is not None and c.fresh is not None]
        if fresh:
            raise ValueError("DPO starts from a trained model; model.fresh is for dpo sft")
        return self

    @model_validator(mode="after")
    def _no_reference_without_use(self) -> PreferenceConfig:
        unused = {"moving_reference": takes_reference(self.loss), "reference": self.opens_reference}
        for name, used in unused.items():
            if getattr(self, name) is not None and not used:
                raise ValueError(f"{name}: has no effect, {self.loss.name} takes no reference")
        return self

    @model_validator(mode="after")
    def _no_mixture_of_adapters(self) -> PreferenceConfig:
        check_frozen_reference(self, "moving_reference")
        if self.precision == "pure_bf16" and self.moving_reference is not None:
            raise ValueError(
                "moving_reference: precision=pure_bf16 would round small mixtures away; take bf16"
            )
        return self

    @property
    def opens_reference(self) -> bool:
        """Whether a reference is read: the loss takes one, or the KL to it is asked for."""
        asked = "kl_prompts" in self.evaluation.model_fields_set and self.evaluation.kl_prompts > 0
        return takes_reference(self.loss) or asked


class RewardOptimizerConfig(OptimizerConfig):
    """AdamW and its learning rate over the run."""

    learning_rate: Positive = Field(1e-5, description="Peak learning rate.")


class RewardConfig(TrainingConfig):
    """A reward model: a linear head on a language model's trunk, from pairs or rankings."""

    loss: Literal["bradley_terry", "plackett_luce"] = Field(
        "bradley_terry",
        description="bradley_terry: pairs (all pairs of a ranking); plackett_luce: whole rankings.",
    )
    margin: Literal["scores"] | None = Field(
        None, description="scores: chosen_score - rejected_score is the margin asked for (Llama 2)."
    )
    centre: NonNegative = Field(
        0.0, description="Coefficient of (r_w + r_l)^2: rewards around 0 (Eisenstein et al.: 0.01)."
    )
    optimizer: RewardOptimizerConfig = RewardOptimizerConfig()

    @model_validator(mode="after")
    def _float32_weights(self) -> RewardConfig:
        check_float32_weights(self)
        return self

    @model_validator(mode="after")
    def _margins_of_pairs(self) -> RewardConfig:
        if self.margin is not None and self.loss != "bradley_terry":
            raise ValueError(f"margin: has no effect, {self.loss} has none; bradley_terry has")
        return self

    @model_validator(mode="after")
    def _nothing_is_generated(self) -> RewardConfig:
        sampling = {"num_samples", "sample_temperature", "max_new_tokens"}
        for name in sorted(self.evaluation.model_fields_set & sampling):
            raise ValueError(f"evaluation.{name}: has no effect, a reward model generates nothing")
        if "max_logit_mib" in self.batch.model_fields_set:
            raise ValueError("batch.max_logit_mib: has no effect, a reward is one number")
        return self
