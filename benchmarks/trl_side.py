"""TRL's side: its real trainers, fed with our token ids, run through their own `train()`."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from scenario import Scenario
from stepwise import Pause
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from workload import Workload

from dpo.config import OptimizerConfig
from dpo.data.tokenize import TokenSequence

VERSION = "1.16.0"
INSTALL = "pip install 'direct-preference-optimization[bench]'"

BEST: dict[str, Any] = {"gradient_checkpointing": False, "logging_strategy": "no"}
"""What makes TRL fastest here: no recomputation, no logging."""
BEST_DPO: dict[str, Any] = {**BEST, "precompute_ref_log_probs": True}
BEST_SFT: dict[str, Any] = {**BEST, "padding_free": True, "max_length": None}
"""TRL 1.16 ignores `padding_free` in DPO. In SFT it forbids `max_length` beside it; our rows are
cut already.
"""
SETTINGS = {
    ("dpo", False): "reference model run in every step, gradient checkpointing, "
    "logging every 10 steps",
    ("dpo", True): "precompute_ref_log_probs=True, gradient_checkpointing=False, no logging",
    ("sft", False): "gradient checkpointing, logging every 10 steps",
    ("sft", True): "padding_free=True, gradient_checkpointing=False, no logging",
}


def missing() -> str | None:
    """One sentence where TRL is not there in the version that is compared with, else None."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        return f"The benchmark compares with TRL {VERSION}, which is not installed: {INSTALL}."
    if found != VERSION:
        return f"The benchmark compares with TRL {VERSION}, but {found} is installed: {INSTALL}."
    return None


def training_loop(
    scenario: Scenario, workload: Workload, model: nn.Module, *, best: bool
) -> Callable[[Pause], None]:
    """TRL's `train()` over the workload's steps. What it does once, in its constructor, is done
    here.
    """
    os.environ["TQDM_DISABLE"] = "1"
    folder = tempfile.TemporaryDirectory()
    make = _sft_trainer if scenario.task == "sft" else _dpo_trainer
    trainer = make(scenario, workload, model, folder=folder.name, best=best)

    def loop(pause: Pause) -> None:
        trainer.remove_callback(PrinterCallback)  # it prints what is logged
        trainer.add_callback(_PauseAfterStep(trainer.losses, pause))
        with folder:
            trainer.train()

    return loop


class _PauseAfterStep(TrainerCallback):  # type: ignore[misc]
    """Hands over at the end of each optimizer step, with the loss of its batch."""

    def __init__(self, losses: list[float], pause: Pause) -> None:
        self.losses = losses
        self.pause = pause

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pause(self.losses[-1])


class _RecordsLosses:
    """Keeps the loss of each batch; what TRL logs is rounded or averaged over several."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """A benchmark reports to nobody."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.losses.append(loss.item())
        return loss


def _dpo_trainer(
    scenario: Scenario, workload: Workload, model: nn.Module, *, folder: str, best: bool
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnOurTokens(_RecordsLosses, DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            """TRL always tokenises; ours are token ids already, in the columns of its collator."""
            return dataset

    def columns(prompt: TokenSequence, rejected: TokenSequence) -> dict[str, list[int]]:
        cut = prompt.prompt_length
        return {
            "prompt_ids": list(prompt.ids[:cut]),
            "chosen_ids": list(prompt.ids[cut:]),
            "rejected_ids": list(rejected.ids[cut:]),
        }

    rows = [columns(p.chosen, p.rejected) for batch in workload.batches() for p in batch]
    settings = _common_settings(scenario, workload, folder) | (BEST_DPO if best else {})
    return OnOurTokens(
        model=model,
        ref_model=None if best else copy.deepcopy(model),
        args=DPOConfig(**settings, beta=scenario.beta),
        train_dataset=Dataset.from_list(rows),
        processing_class=_stand_in_tokenizer(),
    )


def _sft_trainer(
    scenario: Scenario, workload: Workload, model: nn.Module, *, folder: str, best: bool
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Recording(_RecordsLosses, SFTTrainer):  # type: ignore[misc]
        pass

    def columns(sequence: TokenSequence) -> dict[str, list[int]]:
        cut = sequence.prompt_length
        return {
            "input_ids": list(sequence.ids),
            "labels": [-100] * cut + list(sequence.ids[cut:]),  # the loss of the completion alone
        }

    rows = [columns(pair.chosen) for batch in workload.batches() for pair in batch]
    settings = _common_settings(scenario, workload, folder) | (BEST_SFT if best else {})
    return Recording(
        model=model,
        args=SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(rows),
        processing_class=_stand_in_tokenizer(),
    )


def _common_settings(scenario: Scenario, workload: Workload, folder: str) -> dict[str, Any]:
    """What makes both sides compute the same: batches, optimizer, precision, CPU. Saving and
    progress bars are off for all contestants.
    """
    optimizer = OptimizerConfig()  # ours runs with these too
    return {
        "output_dir": folder,
        "use_cpu": True,
        "seed": scenario.seed,
        "max_length": scenario.max_length,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": workload.batch_size,
        "max_steps": workload.num_steps,
        "learning_rate": scenario.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16": scenario.precision == "bf16",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants a tokenizer for its padding id alone; padding is masked, so any id serves."""
    end = "<|endoftext|>"
    vocabulary = Tokenizer(models.WordLevel({end: 0}, unk_token=end))
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, eos_token=end, pad_token=end, unk_token=end
    )
