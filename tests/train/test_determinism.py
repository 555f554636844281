"""One configuration, one seed, one machine: the same bits, also from another process in another
folder; and what would break that is written down.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from dpo.train.run import read_manifest
from train.small_runs import dpo_config, outcome, sft_config

TRAIN = """
import json
import sys

from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import validate
from dpo.train.jobs import train_preference, train_sft

sft, dpo = json.loads(sys.argv[1])
train_sft(validate(SFTConfig, sft))
train_preference(validate(PreferenceConfig, dpo))
"""


def trained(folder: Path, hash_seed: str) -> tuple[dict, dict]:
    """SFT with dropout and DPO in bf16, in a process of their own that starts in that folder; what
    both computed.
    """
    folder.mkdir()
    short = {"max_steps": 3, "evaluation.num_samples": 1}
    sft = sft_config(Path("sft"), short | {"dropout": True})
    dpo = dpo_config(Path("dpo"), short | {"model.path": "sft", "precision": "bf16"})
    configs = [config.model_dump(mode="json", exclude_unset=True) for config in (sft, dpo)]
    differing = {
        "PYTHONHASHSEED": hash_seed,
        "DPO_CACHE": str(folder / "cache"),
        "TZ": f"UTC+{hash_seed}",
    }
    subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(configs)],
        cwd=folder,
        env=os.environ | differing,
        check=True,
        capture_output=True,
    )
    return outcome(folder / "sft"), outcome(folder / "dpo")


def test_two_processes_train_the_same_weights_and_log_the_same_metrics_bit_for_bit(tmp_path):
    first = trained(tmp_path / "first", "1")
    assert trained(tmp_path / "second", "2") == first
    assert len(first[0]["metrics"]) >= 3
    assert first[0]["model/model.safetensors"] != first[1]["model/model.safetensors"]
    manifest = read_manifest(tmp_path / "first" / "dpo")
    for what_would_break_it in (
        *("device", "cuda", "cpu_capability", "versions", "num_threads", "matmul_precision"),
        *("deterministic_algorithms", "cudnn_benchmark", "code_sha256", "python", "platform"),
    ):
        assert what_would_break_it in manifest
    config = json.loads((tmp_path / "first" / "dpo" / "config.json").read_text())
    assert (config["precision"], config["seed"]) == ("bf16", 0)
