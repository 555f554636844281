"""What `dpo.models.vllm_backend` uses of vLLM, over a model of transformers, for tests.

It keeps to what was read in the source of vLLM 0.19.1 and 0.33.0 and takes no argument that these
do not have. Each request is decoded alone, token by token, from a generator seeded by the request:
slow, plain, and another program than our own sampler.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakSet

import numpy as np
import torch
from transformers import AutoModelForCausalLM

__version__ = "0.33.0+stand.in"

log = logging.getLogger("vllm")


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:
            log.warning("temperature %s is less than 0.01", self.temperature)
            self.temperature = 0.01
        if self.seed == -1:
            self.seed = None
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")


@dataclass
class CompletionOutput:
    token_ids: list[int]
    finish_reason: str


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class LLM:
    alive: ClassVar[WeakSet[LLM]] = WeakSet()
    """Engines that hold memory."""
    started = 0

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        load_format: str = "auto",
        generation_config: str = "auto",
    ) -> None:
        assert load_format == "safetensors"
        assert generation_config == "vllm", "else the model's own end tokens would take part"
        assert 0 < gpu_memory_utilization < 1
        self.model = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        ).eval()
        positions = self.model.config.max_position_embeddings
        self.max_model_len = positions if max_model_len is None else max_model_len
        if self.max_model_len > positions:
            raise ValueError(
                f"User-specified max_model_len ({max_model_len}) is greater than the derived "
                f"max_model_len ({positions})."
            )
        self.max_num_seqs = max_num_seqs
        self.detokenizes = not skip_tokenizer_init
        LLM.alive.add(self)
        LLM.started += 1

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert len(prompts) == len(sampling_params)
        pairs = zip(prompts, sampling_params, strict=True)
        return [RequestOutput([self._decode(p["prompt_token_ids"], s)]) for p, s in pairs]

    @torch.no_grad()
    def _decode(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        if not 0 < len(prompt) < self.max_model_len:
            raise ValueError(f"The decoder prompt has {len(prompt)} tokens.")
        assert params.ignore_eos, "else the model's end token would stop too"
        assert self.detokenizes or not params.detokenize, "there is no tokenizer"
        generator = torch.Generator()
        if params.seed is not None:
            generator.manual_seed(int(np.int64(params.seed)))  # OverflowError, as there
        new: list[int] = []
        while True:
            logits = self.model(input_ids=torch.tensor([prompt + new])).logits[0, -1].float()
            if params.temperature == 0:
                token = int(logits.argmax())
            else:
                probs = (logits / params.temperature).softmax(-1)
                token = int(torch.multinomial(probs, 1, generator=generator))
            new.append(token)
            if token in (params.stop_token_ids or ()):
                return CompletionOutput(new, "stop")
            if len(prompt) + len(new) >= self.max_model_len or len(new) == params.max_tokens:
                return CompletionOutput(new, "length")
