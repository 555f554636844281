"""Loading policies, references and tokenizers: a run directory, a local folder or a hub id."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer
from transformers.activations import NewGELUActivation
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from dpo.data.files import existing
from dpo.errors import InputError, did_you_mean_path, reason_of
from dpo.models.parts import class_name, device_of, tensors_of, whole, without_weights

log = logging.getLogger("dpo")

PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt")
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from: `path` is a folder, or a hub id when `local` is False."""

    path: str
    local: bool
    revision: str | None = None
    trust_remote_code: bool = False

    def arguments(self) -> dict[str, Any]:
        """What the transformers loaders take; a local folder never asks a hub."""
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.local,
        }


def holds_adapter(source: ModelSource) -> bool:
    """Whether a folder holds an adapter of peft, which needs the model that it was trained on."""
    return source.local and _is_model(Path(source.path), ADAPTER_CONFIG)


def _is_model(folder: Path, *files: str) -> bool:
    return any((folder / name).is_file() for name in files)


def looks_like_a_path(name: str) -> bool:
    """Whether a name can only mean a place on this machine: `./x`, `~/x`, `a/b/c`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def find_model(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, key: str = "model"
) -> ModelSource:
    """Tell a run directory and a model folder from a hub id, before anything is loaded.

    Raises:
        InputError: an existing folder that holds no model, a path where nothing is, or a revision
            of what is no hub model.
    """
    folder = existing(name) if name else None
    if folder is None:
        if looks_like_a_path(name):
            hint = did_you_mean_path(name) or "."
            raise InputError(f"{key}: there is no folder {name}{hint}")
        return ModelSource(name, False, revision, trust_remote_code)
    if revision is not None:
        raise InputError(f"{key}.revision: only a hub model has one; {name} is a folder here.")
    if folder.is_dir():
        inner, files = folder / "model", ("config.json", ADAPTER_CONFIG)
        is_run = (folder / "manifest.json").is_file() or _is_model(inner, *files)
        if is_run or not _is_model(folder, *files):  # a run has a config.json of its own
            folder = inner
        if not _is_model(folder, *files):
            raise InputError(
                f"{key}: {name} holds no model (expected config.json, or model/config.json in the "
                "directory of a finished run)."
            )
        return ModelSource(str(folder), True, None, trust_remote_code)
    raise InputError(f"{key}: {name} is a file; expected a model folder or a hub id.")


def find_tokenizer(name: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Where a tokenizer is; unlike a model's, its folder needs no config.json.

    Raises:
        InputError: a path where nothing is.
    """
    folder = existing(name) if name else None
    if folder is None or not folder.is_dir():
        if looks_like_a_path(name):
            raise InputError(f"tokenizer: there is no folder {name}.")
        return ModelSource(name, False, None, trust_remote_code)
    inner = folder / "model"
    return ModelSource(str(inner if inner.is_dir() else folder), True, None, trust_remote_code)


def explain(error: Exception, what: str, source: ModelSource) -> InputError:
    """One sentence for whatever a loader raised."""
    reason = reason_of(error)
    if source.local:
        pickled = [name for name in PICKLED_WEIGHTS if (Path(source.path) / name).exists()]
        if pickled and not any(Path(source.path).glob("*.safetensors")):
            return InputError(
                f"{source.path}: its weights are pickled ({pickled[0]}), which can run code when "
                "read; convert them to safetensors first."
            )
        return InputError(f"{source.path}: its {what} cannot be loaded: {reason}")
    return InputError(
        f"{source.path!r:.200} is no local folder, and its {what} cannot be had from the hub: "
        f"{reason}{did_you_mean_path(source.path)}"
    )


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer; a folder with only GPT-2's `vocab.json` and `merges.txt` works too.

    Raises:
        InputError: there is none, or it cannot be read. None is ever invented.
    """
    bare_gpt2 = source.local and not (Path(source.path) / "tokenizer_config.json").exists()
    bare_gpt2 = bare_gpt2 and not (Path(source.path) / "tokenizer.json").exists()
    if bare_gpt2 and not (Path(source.path) / "vocab.json").exists():
        raise InputError(
            f"{source.path}: no tokenizer there (expected tokenizer.json, or vocab.json and "
            "merges.txt); copy the model's own into the folder or set model.tokenizer."
        )
    loader = GPT2Tokenizer if bare_gpt2 else AutoTokenizer
    try:
        return loader.from_pretrained(source.path, **source.arguments())
    except Exception as error:  # each loader raises its own types
        raise explain(error, "tokenizer", source) from error


def load_model(source: ModelSource, *, quantize: str | None = None) -> nn.Module:
    """A causal language model in float32, from safetensors, in evaluation mode.

    Args:
        quantize: "4bit" or "8bit" holds its linear layers so (bitsandbytes), on a GPU.

    Raises:
        InputError: no such model, weights that are unreadable, incomplete or not safetensors, or a
            model of another kind: transformers would give a reward model a random head, and let an
            encoder see the tokens that it is to predict.
    """
    held_quantized = {} if quantize is None else quantization(quantize)
    try:
        config = AutoConfig.from_pretrained(source.path, **source.arguments())
        made_as = config.architectures or []
        loader: Any = AutoModelForCausalLM
        model, report = loader.from_pretrained(
            source.path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
            **source.arguments(),
            **held_quantized,
        )
    except Exception as error:
        raise explain(error, "model", source) from error
    if any(name.endswith("ForSequenceClassification") for name in made_as):
        raise InputError(
            f"{source.path}: it is a reward model or classifier ({made_as[0]}); expected a causal "
            "language model."
        )
    _check_complete(report, source)
    loaded: nn.Module = model.eval()
    check_causal(loaded, source)
    return fuse_activations(loaded)


def load_blueprint(source: ModelSource) -> nn.Module:
    """What `load_model` gives, in all but its weights: its parameters are on the meta device, its
    buffers are real.

    Raises:
        InputError: no such model.
    """
    arguments = source.arguments()
    try:
        config = AutoConfig.from_pretrained(source.path, **arguments)
        with without_weights():
            made: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
            )
    except Exception as error:
        raise explain(error, "model", source) from error
    made.tie_weights()
    return fuse_activations(made.eval())


def own_files(source: ModelSource, blueprint: nn.Module) -> dict[str, str] | None:
    """The safetensors file of each of a model's tensors, where the files hold these under the
    model's own names, all of them and nothing else; None where reading them takes the loader of
    transformers.

    A hub model's files are downloaded.
    """
    registered = get_model_conversion_mapping(blueprint, add_legacy=False)  # type: ignore[arg-type]
    if registered or getattr(blueprint.config, "quantization_config", None) is not None:
        return None
    expected = {name: list(t.shape) for name, t in tensors_of(blueprint).items()}
    found: dict[str, str] = {}
    try:
        for file in _weight_files(source):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 -- it is no dictionary
                    if opened.get_slice(name).get_shape() != expected.get(name):
                        return None
                    found[name] = file
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None  # the loader says what is wrong
    return found if found.keys() == expected.keys() else None


def _weight_files(source: ModelSource) -> list[str]:
    """Where a model's safetensors are: one file, or those that an index lists."""
    options: dict[str, Any] = {"revision": source.revision, "local_files_only": source.local}
    options["_raise_exceptions_for_missing_entries"] = False
    single = cached_file(source.path, SAFE_WEIGHTS_NAME, **options)
    if single is not None:
        return [single]
    index = cached_file(source.path, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        return []
    files: list[str]
    files, _ = get_checkpoint_shard_files(
        source.path, index, revision=source.revision, local_files_only=source.local
    )
    return files


def check_causal(model: nn.Module, source: ModelSource) -> None:
    """Refuse a model that sees the tokens that it is to predict.

    Raises:
        InputError: it does.
    """
    if _looks_ahead(model):
        raise InputError(
            f"{source.path}: {class_name(model)} predicts a token from those after it; "
            "expected a causal language model."
        )


def need_bitsandbytes(key: str, value: str) -> None:
    """Refuse a setting that bitsandbytes serves where it cannot.

    Raises:
        InputError: there is no GPU, or the package is not installed.
    """
    gpu = torch.cuda.is_available()
    if not gpu or find_spec("bitsandbytes") is None:
        missing = "bitsandbytes (pip install bitsandbytes)" if gpu else "a GPU"
        raise InputError(f"{key}: {value} needs {missing}; leave it out.")


def quantization(bits: str) -> dict[str, Any]:
    """What the loader takes for quantised weights: NF4 with double quantisation, as QLoRA
    (Dettmers et al. 2023, arXiv:2305.14314), or LLM.int8 (arXiv:2208.07339).

    Raises:
        InputError: there is no GPU, or bitsandbytes is not installed.
    """
    need_bitsandbytes("adapter.quantize", bits)
    from transformers import BitsAndBytesConfig

    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if bits == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": settings, "device_map": {"": 0}}


def _check_complete(report: Mapping[str, Any], source: ModelSource) -> None:
    """Every weight must come from the file: transformers fills gaps with random numbers."""
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise InputError(
            f"{source.path}: it lacks {len(names)} of the model's weights "
            f"({', '.join(names[:3])}); copy or download it again."
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{source.path}: its weights do not fit its config.json: {name} is {list(found)}, "
            f"expected {list(expected)}."
        )
    if report["unexpected_keys"]:
        names = sorted(report["unexpected_keys"])
        log.warning(
            "%s: %d of its weights are no part of the model and are left out (%s).",
            source.path,
            len(names),
            ", ".join(names[:3]),
        )


def _looks_ahead(model: nn.Module) -> bool:
    """Whether a token changes the prediction made before it."""
    last = int(model.get_input_embeddings().weight.shape[0]) - 1  # type: ignore[operator]
    device = device_of(model)
    ids = torch.tensor([[0, 0], [0, last]], device=device)
    with torch.no_grad():
        first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
    return bool((first - second).abs().max() > 1e-4 * first.abs().max())


def fuse_activations(model: nn.Module) -> nn.Module:
    """GPT-2's GELU, written in transformers as eight operations, as the one that torch has.

    The same function up to rounding; a fifth of the forward pass of a small GPT-2 on a CPU.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def check_fit(model: nn.Module, tokenizer: Any, *, name: str) -> None:
    """Every id the tokenizer can give must have an embedding.

    Raises:
        InputError: the tokenizer does not belong to the model.
    """
    check_vocabulary(
        int(model.get_input_embeddings().weight.shape[0]),  # type: ignore[operator]
        tokenizer,
        name=name,
    )


def check_vocabulary(rows: int, tokenizer: Any, *, name: str) -> None:
    """The same of a model that has so many embeddings.

    Raises:
        InputError: the tokenizer does not belong to the model.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"{name}: the tokenizer gives ids up to {largest} but the model has {rows} embeddings; "
            "they do not belong together."
        )


def max_positions(model: Any) -> int:
    """The longest sequence that the model's position embeddings allow, in tokens.

    Args:
        model: whatever has the configuration of a transformers model.
    """
    return _positions(model.config)


def positions_of(source: ModelSource) -> int:
    """The same, without reading weights.

    Raises:
        InputError: there is no such model, or its configuration cannot be read.
    """
    try:
        return _positions(AutoConfig.from_pretrained(source.path, **source.arguments()))
    except Exception as error:
        raise explain(error, "configuration", source) from error


def _positions(config: Any, *, default: int = 1_000_000) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of the parameters: the model's identity."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        data = whole(parameter.detach()).cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what makes ids of text: vocabulary, merges, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    for passing in ("padding", "truncation"):  # what the last call asked for
        rules.pop(passing, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([rules, special], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def pick_device() -> torch.device:
    """The first GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
