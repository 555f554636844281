"""`dpo merge`: an adapter and its base as one model."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dpo.atomic import replace_folder
from dpo.config import ModelConfig
from dpo.data.prompts import TEMPLATE_FILE
from dpo.errors import InputError
from dpo.models.load import ADAPTER_CONFIG, find_model, holds_adapter
from dpo.train.run import load_train_prompts, save_train_prompts
from dpo.train.session import open_policy

KEPT = (TEMPLATE_FILE, "generation_config.json", "README.md")
"""Files that say the same of the whole model as they said of the adapter."""

log = logging.getLogger("dpo")


def merge_folder(name: str, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the model that an adapter and its base are together, in float32, and return its folder.

    It remembers which prompts the adapter was trained on, so that an evaluation on them is refused
    as before.

    Args:
        name: a run directory or a folder with an adapter.
        out: a folder that is not there yet.

    Raises:
        InputError: there is no adapter, its base is not there, or `out` is.
        StorageError: the disk is full, read-only or gone.
    """
    source = find_model(name, trust_remote_code=trust_remote_code, key="merge")
    if not holds_adapter(source):
        raise InputError(f"merge: {name} holds no adapter (expected {ADAPTER_CONFIG}).")
    if out.exists():
        raise InputError(f"--out: {out} is there already; name a new folder.")
    merged = open_policy(ModelConfig(path=name), [], 0, trust_remote_code, key="merge")
    folder = Path(source.path)
    with replace_folder(out) as temporary:
        merged.model.save_pretrained(temporary)  # type: ignore[operator]
        merged.tokenizer.save_pretrained(temporary)
        for file in (folder / kept for kept in KEPT):
            if file.is_file():
                shutil.copy(file, temporary)
        prompts = load_train_prompts(folder)
        if prompts is not None:
            save_train_prompts(temporary, prompts)
    log.info("%s is a whole model: %s with its adapter.", out, name)
    return out
