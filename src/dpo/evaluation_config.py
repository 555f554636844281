"""Options of `dpo evaluate`: which models, which judges, how many responses."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dpo.config import DataConfig, RewardSource
from dpo.sections import Count, Folder, NonNegative, Positive, Section, Seed, shorthand

PLAIN_NAME = re.compile(r"[\w+-][\w.+ -]*")
"""Names that become parts of file names; none can leave its folder."""


class SentenceConfig(Section):
    """The Sentence-BERT model that judges."""

    path: str | None = Field(
        None,
        description="Any sentence-transformers model, by id or path; 'offline' is the packaged "
        "all-MiniLM-L6-v2. Default: all-mpnet-base-v2 where a hub answers, else the packaged one.",
    )


JudgeName = Literal["sentence_bert", "true_reward", "reward", "endpoint"]
Comparison = Literal["chosen", "models", "nulls", "labels"]


def is_loopback(url: str) -> bool:
    """Whether a URL is one of this machine's own, so that nothing sent there leaves it."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


class EndpointConfig(Section):
    """An OpenAI-compatible chat endpoint that compares two responses."""

    model: str = Field(description="What the server calls the model.")
    base_url: str = Field(
        "http://localhost:8000/v1",
        description="Address up to /chat/completions, as a server on this machine has it.",
    )
    key_variable: str | None = Field(
        None, description="Environment variable that holds the API key; without one none is sent."
    )
    template: str | None = Field(
        None,
        description="Another question than ours (docs/judges.md): a text with {prompt}, {first} "
        "and {second}, that asks for [[A]], [[B]] or, for a tie, [[C]].",
    )
    max_tokens: Count = Field(512, description="Longest answer, in tokens.")
    timeout_seconds: Positive = Field(120.0, description="Longest silence of the server.")
    max_attempts: Count = Field(6, description="Tries of one question, the first included.")
    parallel: Count = Field(4, description="Questions asked at the same time.")
    input_price: NonNegative | None = Field(
        None, description="Price of a million tokens of questions, in any currency."
    )
    output_price: NonNegative | None = Field(
        None, description="Price of a million tokens of answers, in the same currency."
    )

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        reason = "expected http(s)://host/path, without a name, password, ? or #"
        try:
            parts = urlsplit(url)
            _ = parts.port  # raises where it is no number
        except ValueError as error:
            raise ValueError(reason) from error
        plain = url.isascii() and url.isprintable() and not set(url) & set(" ?#@")
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ValueError(reason)  # without the value, which may hold a password
        return url

    @field_validator("key_variable")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # without the value: it may be the key itself
            raise ValueError("expected the name of an environment variable, never a key")
        return name

    @field_validator("template")
    @classmethod
    def _three_places(cls, template: str | None) -> str | None:
        missing = [p for p in ("{prompt}", "{first}", "{second}") if p not in (template or p)]
        if missing:
            raise ValueError(f"expected a text with {' and '.join(missing)} in it")
        return template

    @model_validator(mode="after")
    def _meaningful(self) -> EndpointConfig:
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("give both input_price and output_price, or neither")
        plain = self.base_url.startswith("http:") and not is_loopback(self.base_url)
        if self.key_variable is not None and plain:
            raise ValueError("a key is sent over https only, or to this machine")
        return self


class EvaluateConfig(Section):
    """Generate on held-out prompts and compare with the chosen and the rejected response."""

    models: dict[str, str] = Field(description="Name: run directory, model folder or hub id.")
    data: Annotated[DataConfig, BeforeValidator(shorthand)] = DataConfig()
    out: Folder = Field(description="Where the tables, figures and generations go.")
    temperatures: list[NonNegative] = Field(
        [0.1, 0.25, 0.5, 0.75, 1.0], min_length=1, description="Of the responses, each a table row."
    )
    max_prompts: int = Field(
        500, ge=2, description="Held-out prompts used, at most (seeded choice)."
    )
    samples_per_prompt: Count = Field(1, description="Responses of a model at each temperature.")
    max_new_tokens: Count = Field(256, description="Longest response, in tokens.")
    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="What generates; vllm needs its extra (docs/evaluation.md)."
    )
    batch_size: Count = Field(32, description="Prompts generated at once.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of the models' numbers.")
    seed: Seed = Field(0, description="Choice of prompts, samples, bootstrap.")
    sentence_model: Annotated[SentenceConfig, BeforeValidator(shorthand)] = SentenceConfig()
    allow_overlap: bool = Field(
        False, description="Evaluate even where a model was trained on some of the prompts."
    )
    judges: list[JudgeName] = Field(
        ["sentence_bert"],
        min_length=1,
        description="Who compares responses head to head: sentence_bert, true_reward (data="
        "synthetic), reward (the reward section), endpoint (the endpoint section).",
    )
    comparisons: list[Comparison] | None = Field(
        None,
        description="What they compare: chosen (models against the chosen response), models "
        "(against each other), nulls (null responses against the chosen), labels (chosen against "
        "rejected). Default: all, or none where sentence_bert is the only judge.",
    )
    reward: RewardSource | None = Field(None, description="What the judge 'reward' scores with.")
    endpoint: EndpointConfig | None = Field(None, description="Whom the judge 'endpoint' asks.")

    @model_validator(mode="after")
    def _meaningful(self) -> EvaluateConfig:
        if not self.models:
            raise ValueError("models: name at least one, e.g. models.sft=runs/sft")
        for name in self.models:
            if not PLAIN_NAME.fullmatch(name):
                raise ValueError(
                    f"models: {name!r} names files, so it may hold letters, digits, '.', '_', '+', "
                    "'-' and spaces only, and must not begin with '.'"
                )
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures: expected different ones, got {self.temperatures}")
        effectless = self.data.model_fields_set & {"max_length", "max_dropped"}
        if effectless:
            raise ValueError(f"data.{min(effectless)} has no effect in an evaluation")
        return self

    @model_validator(mode="after")
    def _judges_with_their_sections(self) -> EvaluateConfig:
        for key in ("judges", "comparisons"):
            given = getattr(self, key) or []
            if len(set(given)) < len(given):
                raise ValueError(f"{key}: expected different ones, got {', '.join(given)}")
        for name in ("reward", "endpoint"):
            section = getattr(self, name)
            if name in self.judges and section is None:
                raise ValueError(f"judges: {name} needs its section, e.g. {name}.model=...")
            if name not in self.judges and section is not None:
                raise ValueError(f"{name} has no effect unless judges holds {name}")
        if "true_reward" in self.judges and self.data.path != "synthetic":
            raise ValueError("judges: true_reward is known where data is 'synthetic' only")
        if self.comparisons == [] and self.judges != ["sentence_bert"]:
            raise ValueError("judges: has no effect without comparisons")
        if self.compared == ["models"] and len(self.models) < 2:
            raise ValueError("comparisons: models needs two models to compare")
        return self

    @property
    def compared(self) -> list[Comparison]:
        """The comparisons to make."""
        if self.comparisons is not None:
            return self.comparisons
        return [] if self.judges == ["sentence_bert"] else list(get_args(Comparison))
