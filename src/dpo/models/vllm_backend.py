"""Sampling by vLLM, behind the interface of `dpo.models.generate`: evaluation at scale, on a GPU.

vLLM is an extra and is imported by `need_vllm` alone. It was **not run by us**: no GPU was at hand,
and its releases pin a torch of their own. What is relied on was read in the source of the releases
0.19.1, the first that takes transformers 5, and 0.33.0, and the tests run a stand-in that keeps to
it (tests/models/vllm_stand_in.py):

- `LLM`: model, skip_tokenizer_init, trust_remote_code, dtype, gpu_memory_utilization, and of
  EngineArgs max_model_len, max_num_seqs, load_format, generation_config ("vllm": none).
- `SamplingParams`: `ignore_eos=True` leaves `stop_token_ids` alone to end a response. The engine
  checks them before the limit (v1/core/sched/utils.py) and gives the stop token among `token_ids`
  (v1/engine/detokenizer.py). top_p and top_k are off by default.
- A request's seed is kept as an int64, and -1 means none (v1/worker/gpu/sample/states.py).
- A prompt and its response together have at most max_model_len tokens.

Two things are other than in `generate`. Logits have the precision of the weights, so that in
bfloat16 the distribution is not exactly the one that is scored. And logits that are not finite are
not noticed.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo.data.split import digest64
from dpo.errors import InputError, reason_of
from dpo.models.generate import SampledResponse, check_sampling, until_stop
from dpo.models.load import ModelSource, explain, holds_adapter, max_positions

MEMORY_SHARE = 0.8
"""Of the GPU's memory, for weights and cache; the rest is for the judges beside it."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM raises a temperature between 0 and the first to it; above the second, 0.33 refuses."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MODEL_FILES = ["*.json", "*.safetensors"]


def need_vllm() -> ModuleType:
    """vLLM, told to report nothing to its makers unless VLLM_NO_USAGE_STATS says otherwise.

    Raises:
        InputError: it is not installed, or cannot be loaded.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        return importlib.import_module("vllm")
    except (ImportError, OSError) as error:  # OSError: a library of CUDA is not there
        raise InputError(
            f"backend: vllm cannot be imported ({reason_of(error)}); pip install "
            "'direct-preference-optimization[vllm]', or leave backend out."
        ) from error


def check_temperature(temperature: float) -> None:
    """Refuse what vLLM would change or refuse.

    Raises:
        InputError: the temperature is neither 0 nor between the limits.
    """
    if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise InputError(
            f"sampling: vLLM takes the temperature 0 and those from {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:g}, not {temperature:g}."
        )


def check_servable(source: ModelSource) -> Any:
    """The configuration of a model, if it is one that vLLM can be given.

    Raises:
        InputError: it is an adapter, no causal language model, or cannot be read.
    """
    if holds_adapter(source):
        raise InputError(
            f"{source.path}: it is an adapter, and vLLM is given whole models here; make one with "
            "dpo merge FOLDER --out FOLDER."
        )
    try:
        config = AutoConfig.from_pretrained(source.path, **source.arguments())
    except Exception as error:  # as varied as in `load_model`
        raise explain(error, "config.json", source) from error
    architectures = config.architectures or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) & set(architectures)
    if not known and not source.trust_remote_code:
        raise InputError(
            f"{source.path}: vLLM samples from causal language models; the architecture in its "
            f"config.json is {', '.join(architectures) or 'missing'}."
        )
    return config


def request_seed(seed: int, key: str) -> int:
    """The seed of one response, a function of the call's seed and the response's key alone.

    63 bits: it must fit an int64, and must not be -1.
    """
    return digest64(f"{seed}:{key}".encode()) >> 1


class VllmModel:
    """A causal language model that vLLM samples from; `close` frees its memory.

    The engine starts with the first response that is asked for: where all are there already, from
    an evaluation before, none is started.

    Args:
        batch_size: responses generated at once, at most.
        precision: "fp32" or "bf16", of weights, activations and logits.

    Raises:
        InputError: vLLM cannot be imported, or the model cannot be given to it or is not there.
    """

    def __init__(self, source: ModelSource, *, batch_size: int, precision: str) -> None:
        self._vllm = need_vllm()
        self.config = check_servable(source)
        self._source = source
        self._batch_size = batch_size
        self._dtype = DTYPES[precision]
        self._engine: Any = None

    @cached_property
    def folder(self) -> Path:
        """Where its files are: a model of the hub is downloaded."""
        source = self._source
        if source.local:
            return Path(source.path)
        files = [*MODEL_FILES, "*.py"] if source.trust_remote_code else MODEL_FILES
        try:
            return Path(
                snapshot_download(source.path, revision=source.revision, allow_patterns=files)
            )
        except Exception as error:  # the hub raises its own types
            raise explain(error, "model", source) from error

    def identity(self) -> str:
        """SHA-256 of the weights' files, and vLLM's release, whose draws may be its own."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
        return f"vllm {self._vllm.__version__} {digest.hexdigest()}"

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        keys: Sequence[str],
        temperature: float,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int,
        longest: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[SampledResponse]:
        """As `dpo.models.generate.generate`: a response depends on its prompt, key, seed and
        temperature, up to rounding, and not on what it is generated with.

        Args:
            longest: tokens of a prompt and its response, the most of this call and those after it;
                the engine is started with room for so many.

        Raises:
            InputError: an argument is out of range, a prompt is empty or leaves no room for
                `max_new_tokens`, or vLLM cannot serve the model.
        """
        check_temperature(temperature)
        positions = max_positions(self)
        check_sampling(
            prompts,
            keys,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            positions=positions,
            room=min(longest, positions) - max_new_tokens,
        )
        if self._engine is None:
            self._engine = self._start(longest)
        requests = [
            self._vllm.SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                stop_token_ids=list(stop_ids),
                ignore_eos=True,
                seed=request_seed(seed, key),
                detokenize=False,
            )
            for key in keys
        ]
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], requests, use_tqdm=False
        )
        progress(len(prompts))
        return [until_stop(output.outputs[0].token_ids, set(stop_ids)) for output in outputs]

    def _start(self, longest: int) -> Any:
        try:
            return self._vllm.LLM(
                str(self.folder),
                skip_tokenizer_init=True,  # ids in, ids out
                trust_remote_code=self._source.trust_remote_code,
                dtype=self._dtype,
                max_model_len=longest,
                max_num_seqs=self._batch_size,
                gpu_memory_utilization=MEMORY_SHARE,
                load_format="safetensors",
                generation_config="vllm",
            )
        except Exception as error:  # vLLM raises what its parts raise
            raise InputError(
                f"{self._source.path}: vLLM cannot serve it: {reason_of(error)}"
            ) from error

    def close(self) -> None:
        """End the engine, so that the GPU's memory is free for the next model."""
        self._engine = None
        gc.collect()
