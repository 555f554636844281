"""Opening a model in parts (`distributed.kind=fsdp`): no rank but the first ever holds it whole,
and the first one only where the files cannot be read row by row.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from torch import nn

from dpo.errors import InputError
from dpo.models.adapters import WHOLE, model_below
from dpo.models.load import (
    ModelSource,
    check_causal,
    explain,
    holds_adapter,
    load_blueprint,
    own_files,
    pick_device,
)
from dpo.models.parts import (
    Make,
    Read,
    class_name,
    cut,
    emptied,
    fill,
    from_files,
    from_first,
    recut,
    settle,
    tensors_of,
)
from dpo.models.plan import scoring_plan, share_plan
from dpo.train import ranks


@dataclass(frozen=True, slots=True)
class InParts:
    """Each rank holds its rows of every parameter. All ranks call these together."""

    offload: bool = False
    """The parts are in main memory, not on the GPU."""

    def load(self, source: ModelSource, *, quantize: str | None = None) -> nn.Module:
        """A model of a folder or a hub id.

        Raises:
            InputError: as `load_model`; weights that are quantised, or a model that cannot be run
                the same number of times everywhere.
        """
        self._check()
        if quantize is not None:
            raise InputError("adapter.quantize: it is for distributed.kind=ddp, not fsdp.")
        with ranks.together():
            below = model_below(source)
            blueprint = load_blueprint(below)
            files = None if holds_adapter(source) else own_files(source, blueprint)
        all_read = ranks.of_first(files is not None)
        make = partial(load_blueprint, below)
        model = cut(blueprint, make, pick_device(), offload=self.offload)
        if all_read:
            with ranks.together():
                _read_rows(model, files, source)
        else:
            fill(model, _whole_on_first(source, model))
        check_causal(model, source)
        settle(model)
        _check_packed(model)
        return model

    def change(self, model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The model after a change of what it is made of. It is scored as it was."""
        changed = recut(model, change)
        share_plan(changed, model)
        gc.collect()  # of models before this one: FSDP holds them in circles
        return changed

    def make(self, make: Make) -> nn.Module:
        """The parts of a model that every rank makes whole, because it is small: a fresh one.

        Raises:
            InputError: as `load`.
        """
        self._check()

        def made() -> nn.Module:
            return emptied(make())

        model = cut(made(), made, pick_device(), offload=self.offload)
        fill(model, from_first(make() if ranks.is_first() else None))
        _check_packed(model)
        return model

    def _check(self) -> None:
        """Refuse to share a model out where nobody, or nothing, is there to share it.

        Raises:
            InputError: there is no launcher, or no GPU to spare.
        """
        if not dist.is_initialized():
            raise InputError(
                "distributed.kind: fsdp shares the model out among the processes of a launcher; "
                "start it with torchrun --nproc-per-node N -m dpo.cli ..."
            )
        if self.offload and pick_device().type == "cpu":
            raise InputError(
                "distributed.cpu_offload: there is no GPU here, and the parts are in main memory "
                "as it is; leave it out."
            )


def _check_packed(model: nn.Module) -> None:
    """Padded rows are run in as many pieces as they need, which is another number on each rank."""
    plan = scoring_plan(model)
    settle(model)
    if not plan.packed:
        raise InputError(f"distributed.kind: {class_name(model)} is run on padded rows; use ddp.")


def _read_rows(model: nn.Module, files: dict[str, str] | None, source: ModelSource) -> None:
    """Fill this rank's parts from the files.

    Raises:
        InputError: they cannot be read here.
    """
    if files is None:
        raise InputError(f"{source.path}: its weights are not those that process 0 has.")
    try:
        fill(model, from_files(files))
    except Exception as error:  # safetensors raises its own types
        raise explain(error, "model", source) from error


def _whole_on_first(source: ModelSource, model: nn.Module) -> Read:
    """Read the whole model on the first rank, by the loader of transformers.

    Raises:
        InputError: it cannot be read, or is not the model that its configuration says.
    """
    whole = None
    with ranks.together():
        if ranks.is_first():
            whole = WHOLE.load(source)
            ours, theirs = ({n: t.shape for n, t in tensors_of(m).items()} for m in (whole, model))
            if ours != theirs or not all(p.is_floating_point() for p in whole.parameters()):
                raise InputError(
                    f"{source.path}: its weights are held otherwise than its config.json says; "
                    "use distributed.kind=ddp."
                )
    return from_first(whole)
