"""What is loaded, what is refused and in which words; a model's identity."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Tokenizer

from dpo.errors import InputError
from dpo.models.load import (
    check_fit,
    find_model,
    find_tokenizer,
    fuse_activations,
    load_model,
    load_tokenizer,
    max_positions,
    weights_digest,
)
from tiny_models import ARCHITECTURES, make


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer) -> Path:
    folder = tmp_path / "saved"
    make("gpt2", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def refusal(error: pytest.ExceptionInfo[InputError]) -> str:
    """The message, which must be one line that says more than the exception's type."""
    message = str(error.value)
    assert "\n" not in message
    assert message[-1] in ".)" or len(message) > 40
    return message


def test_a_saved_model_comes_back_bitwise_in_float32_and_evaluation_mode(
    model_folder: Path, tokenizer
) -> None:
    loaded = load_model(find_model(str(model_folder)))
    original = make("gpt2", len(tokenizer))
    assert not loaded.training
    assert weights_digest(loaded) == weights_digest(original)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=0, atol=2e-5)
    assert torch.equal(loaded(ids).logits, fuse_activations(original)(ids).logits)


def test_weights_saved_in_bfloat16_are_loaded_as_float32(tmp_path: Path) -> None:
    make("llama", 40).bfloat16().save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path)))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_pickled_weights_are_refused_before_they_are_read(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(model_folder / "model.safetensors")
    torch.save(weights, model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    reads: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *args, **more: reads.append(args) or weights)
    with pytest.raises(InputError) as error:
        load_model(find_model(str(model_folder)))
    assert refusal(error) == (
        f"{model_folder}: its weights are pickled (pytorch_model.bin), which can run code when "
        "read; convert them to safetensors first."
    )
    assert reads == []


def test_pickled_weights_beside_safetensors_are_not_looked_at(
    model_folder: Path, tokenizer
) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    loaded = load_model(find_model(str(model_folder)))
    assert weights_digest(loaded) == weights_digest(make("gpt2", len(tokenizer)))


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbage"])
def test_damaged_weights_are_refused_by_folder(model_folder: Path, damage: str) -> None:
    file = model_folder / "model.safetensors"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": whole[:-100], "empty": b"", "garbage": b"x" * 100}[damage])
    with pytest.raises(InputError, match=r"its model cannot be loaded") as error:
        load_model(find_model(str(model_folder)))
    assert str(model_folder) in refusal(error)


def test_a_damaged_config_is_refused_by_folder(model_folder: Path) -> None:
    (model_folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"its model cannot be loaded") as error:
        load_model(find_model(str(model_folder)))
    assert str(model_folder) in refusal(error)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "~/no/such/folder", "/no/such/folder"])
def test_a_path_where_nothing_is_is_no_hub_id(name: str) -> None:
    with pytest.raises(InputError) as error:
        find_model(name, key="reference")
    assert refusal(error) == f"reference: there is no folder {name}."
    with pytest.raises(InputError, match=r"^tokenizer: there is no folder "):
        find_tokenizer(name)


def test_a_file_and_an_empty_folder_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; expected a model folder or a hub id"):
        find_model(str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"holds no model \(expected config.json, or model/"):
        find_model(str(tmp_path))


def test_a_run_directory_stands_for_its_model_and_an_unfinished_one_holds_none(
    model_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for file in ("manifest.json", "config.json"):  # the run's own, not a model's
        (run / file).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="holds no model"):
        find_model(str(run))
    shutil.copytree(model_folder, run / "model")
    assert find_model(str(run)) == find_model(str(run / "model"))
    assert find_tokenizer(str(run)) == find_tokenizer(str(run / "model"))
    assert find_model(str(run)).path == str(run / "model")


def test_anything_else_is_a_hub_id_with_its_revision() -> None:
    source = find_model("openai-community/gpt2", revision="abc", trust_remote_code=True)
    assert (source.local, source.revision, source.trust_remote_code) == (False, "abc", True)
    assert find_model("gpt2").arguments() == {
        "revision": None,
        "trust_remote_code": False,
        "local_files_only": False,
    }
    assert find_tokenizer("gpt2").local is False


def test_code_from_the_hub_is_never_trusted_by_default(model_folder: Path) -> None:
    assert find_model(str(model_folder)).arguments()["trust_remote_code"] is False
    assert find_model(str(model_folder)).arguments()["local_files_only"] is True


def test_a_model_folder_that_needs_its_own_code_is_refused(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text("utf-8"))
    config["model_type"] = "homemade"
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    marker = model_folder / "executed"
    (model_folder / "code.py").write_text(f"open({str(marker)!r}, 'w')", encoding="utf-8")
    with pytest.raises(InputError, match="its model cannot be loaded"):
        load_model(find_model(str(model_folder)))
    assert not marker.exists()


def test_a_missing_tokenizer_is_refused_and_none_invented(tmp_path: Path) -> None:
    make("gpt2", 40).save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        load_tokenizer(find_model(str(tmp_path)))
    assert refusal(error) == (
        f"{tmp_path}: no tokenizer there (expected tokenizer.json, or vocab.json and merges.txt); "
        "copy the model's own into the folder or set model.tokenizer."
    )


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused_by_folder(model_folder: Path, file: str) -> None:
    (model_folder / file).write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"its tokenizer cannot be loaded") as error:
        load_tokenizer(find_model(str(model_folder)))
    assert str(model_folder) in refusal(error)


def test_a_tokenizer_config_without_its_vocabulary_is_refused(model_folder: Path) -> None:
    """None is invented from the class's name."""
    (model_folder / "tokenizer.json").unlink()
    with pytest.raises(InputError):
        load_tokenizer(find_model(str(model_folder)))


def test_bare_gpt2_files_load_as_gpt2s_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(shared_data / "gpt2-tokenizer", folder)
    assert {f.name for f in folder.iterdir()} == {"vocab.json", "merges.txt"}
    loaded = load_tokenizer(find_tokenizer(str(folder)))
    assert isinstance(loaded, GPT2Tokenizer)
    assert loaded.eos_token_id == 50256
    assert loaded("Hello world").input_ids == [15496, 995]
    (folder / "merges.txt").unlink()
    with pytest.raises(InputError):
        load_tokenizer(find_tokenizer(str(folder)))


def test_a_tokenizer_that_gives_ids_beyond_the_embeddings_is_refused(tokenizer) -> None:
    assert len(tokenizer) == 300
    check_fit(make("gpt2", 300), tokenizer, name="here")
    check_fit(make("gpt2", 320), tokenizer, name="here")  # padded embeddings are common
    with pytest.raises(InputError) as error:
        check_fit(make("gpt2", 299), tokenizer, name="here")
    assert refusal(error) == (
        "here: the tokenizer gives ids up to 299 but the model has 299 embeddings; "
        "they do not belong together."
    )


def test_hub_failures_are_one_sentence_with_the_name() -> None:
    with pytest.raises(InputError, match="is no local folder, and its model cannot be had") as e:
        load_model(find_model("nobody/has-this-model"))
    assert "'nobody/has-this-model'" in refusal(e)
    with pytest.raises(InputError, match="its tokenizer cannot be had from the hub") as e:
        load_tokenizer(find_model("nobody/has-this-model"))
    assert re.search("nobody/has-this-model", refusal(e))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_longest_sequence_is_read_from_the_config(name: str) -> None:
    assert max_positions(make(name, 40)) == 64


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_bit_of_one_parameter_changes_the_digest(name: str) -> None:
    model = make(name, 40)
    digest = weights_digest(model)
    assert weights_digest(make(name, 40)) == digest
    assert weights_digest(make(name, 40, seed=1)) != digest
    for parameter in model.parameters():
        bits = parameter.data.view(-1).view(torch.int32)
        for position in (0, len(bits) - 1):
            bits[position] ^= 1
            assert weights_digest(model) != digest
            bits[position] ^= 1
    assert weights_digest(model) == digest


def test_the_digest_knows_weights_and_nothing_else() -> None:
    model = make("gpt2", 40)
    digest = weights_digest(model)
    model.train()
    model.config.name_or_path = "elsewhere"
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert weights_digest(model) == digest
    assert weights_digest(model.double()) != digest


def test_the_digest_takes_scalars_views_and_half_precision() -> None:
    class Odd(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))
            self.view = nn.Parameter(torch.arange(6.0).view(2, 3).t())
            self.narrow = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    assert weights_digest(Odd(1.0)) == weights_digest(Odd(1.0))
    assert weights_digest(Odd(1.0)) != weights_digest(Odd(1.0000001))


def test_a_run_that_has_not_finished_is_no_model(tmp_path: Path) -> None:
    for name in ("config.json", "manifest.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds no model \(expected config\.json, or model/"):
        find_model(str(tmp_path))
