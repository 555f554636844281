"""A finished model is uploaded once it is finished, and nothing is lost where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo.config import HubConfig, SFTConfig
from dpo.config_files import read_config, validate
from dpo.errors import InputError
from dpo.train import publish
from dpo.train.jobs import train_sft
from dpo.train.run import read_manifest
from train.small_runs import dpo, sft_config, words_of


class Hub:
    """A stand-in for HfApi that keeps what it is given."""

    def __init__(self):
        self.repos, self.commits = {}, []
        self.known, self.reachable = True, True

    def whoami(self):
        if not self.known:
            raise OSError("Token is required,\nbut no token found")
        return {"name": "me"}

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.repos.setdefault(repo_id, private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if not self.reachable:
            raise ConnectionError("503 Service Unavailable")
        files = {file.name for file in Path(folder_path).iterdir()}
        self.commits.append((repo_id, files, commit_message))


@pytest.fixture
def hub(monkeypatch):
    stand_in = Hub()
    monkeypatch.setattr(publish, "HfApi", lambda: stand_in)
    return stand_in


def test_a_finished_model_is_pushed_with_card_and_tokenizer_to_a_private_repository(hub, tmp_path):
    train_sft(sft_config(tmp_path / "run", {"push_to_hub": "me/kind-gpt2"}))
    assert hub.repos == {"me/kind-gpt2": True}
    ((repo, files, message),) = hub.commits
    assert (repo, message) == ("me/kind-gpt2", "The model of the run run")
    assert files >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert files == {file.name for file in (tmp_path / "run" / "model").iterdir()}


def test_a_public_repository_is_asked_for(hub, tmp_path):
    config = sft_config(tmp_path / "run", {"push_to_hub": {"repo": "me/m", "private": False}})
    train_sft(config)
    assert hub.repos == {"me/m": False}


def test_without_a_login_nothing_is_trained(hub, tmp_path):
    hub.known = False
    with pytest.raises(InputError) as error:
        train_sft(sft_config(tmp_path / "run", {"push_to_hub": "me/m"}))
    assert str(error.value) == (
        "push_to_hub: me/m cannot be pushed to (Token is required, but no token found); log in "
        "(hf auth login, or HF_TOKEN)."
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    hub.known = True
    train_sft(sft_config(tmp_path / "run"))  # the folder is free for the mended command
    assert hub.commits == []


def test_a_push_that_fails_leaves_a_finished_run_and_the_same_command_pushes(hub, tmp_path):
    words = words_of(sft_config(tmp_path / "run", {"push_to_hub": {"repo": "me/m"}}))
    hub.reachable = False
    said = dpo("sft", *words)
    assert said.code == 2
    assert "is finished but could not be pushed to me/m (503 Service Unavailable)" in said.err
    assert read_manifest(tmp_path / "run")["status"] == "finished"
    before = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    hub.reachable = True
    assert dpo("sft", *words).code == 0
    assert len(hub.commits) == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_that_is_finished_can_be_pushed_afterwards(hub, tmp_path):
    """`push_to_hub` is no part of what a run is."""
    train_sft(sft_config(tmp_path / "run"))
    train_sft(sft_config(tmp_path / "run", {"push_to_hub": "me/m"}))
    assert len(hub.commits) == 1


def test_the_name_has_an_owner_and_is_short_for_its_section():
    start = ["model.fresh.width=16", "out=runs/x"]
    given = ["push_to_hub=me/m", "push_to_hub.private=false"]
    config = read_config(SFTConfig, overrides=[*start, *given])
    assert config.push_to_hub == HubConfig(repo="me/m", private=False)
    with pytest.raises(InputError, match=r"push_to_hub.repo: expected owner/name \(got 'mine'\)"):
        validate(SFTConfig, {"model": {"fresh": {}}, "out": "x", "push_to_hub": "mine"})
