"""A finished run's model on the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from dpo.config import HubConfig
from dpo.errors import InputError, reason_of

log = logging.getLogger("dpo")


def check_login(hub: HubConfig) -> None:
    """Find out before hours of training that the hub would not take the model.

    Raises:
        InputError: the hub cannot be reached, or no one is logged in.
    """
    with _explained(f"{hub.repo} cannot be pushed to", "log in (hf auth login, or HF_TOKEN)"):
        HfApi().whoami()


def publish(hub: HubConfig, folder: Path) -> None:
    """Upload `model/` of a finished run, card and tokenizer with it, as one commit; the repository
    is made where there is none.

    Raises:
        InputError: the hub does not take it; the run is finished all the same.
    """
    instead = "give the same command again, which pushes and does not train"
    with _explained(f"{folder} is finished but could not be pushed to {hub.repo}", instead):
        api = HfApi()
        api.create_repo(hub.repo, private=hub.private, exist_ok=True)
        api.upload_folder(
            repo_id=hub.repo,
            folder_path=folder / "model",
            commit_message=f"The model of the run {folder.name}",
        )
    log.info("%s is on the hub as %s.", folder / "model", hub.repo)


@contextmanager
def _explained(what: str, instead: str) -> Iterator[None]:
    """One sentence for whatever the hub's client raises."""
    try:
        yield
    except Exception as error:  # it raises types of its own and of its transport
        raise InputError(f"push_to_hub: {what} ({reason_of(error)}); {instead}.") from error
