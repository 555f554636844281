"""Where metrics are reported beside the run directory: Weights & Biases, MLflow, Trackio.

Spoken to directly: accelerate's trackers need accelerate's state of the process, which sets the
number of threads and the launcher's variables.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo.config_files import flat
from dpo.errors import InputError, reason_of

PROJECT = "dpo"
"""Where runs are filed, unless the service's own variable says otherwise."""

log = logging.getLogger("dpo")


class Service(Protocol):
    """A run as a service has it."""

    id: str
    """By which the service finds it again when training goes on."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class WandbService:
    """A run at Weights & Biases. WANDB_PROJECT names the project, WANDB_MODE=offline keeps it here,
    in `wandb/` of the run directory.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> None:
        import wandb

        self.id = known or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=self.id,
            resume="allow",
            config=dict(settings),
            dir=str(folder),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


class MLflowService:
    """A run on an MLflow server or in a local store: MLFLOW_TRACKING_URI says which,
    MLFLOW_EXPERIMENT_NAME names the experiment.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        where = self._client.create_experiment(name) if found is None else found.experiment_id
        self.id = self._client.create_run(where, run_name=folder.name).info.run_id
        shown = [Param(key, str(value)[:500]) for key, value in flat(settings)]
        for start in range(0, len(shown), 100):  # the most that a server takes at once
            self._client.log_batch(self.id, params=shown[start : start + 100])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.id, metrics=rows)

    def finish(self) -> None:
        self._client.set_terminated(self.id)


class TrackioService:
    """A run of Trackio: TRACKIO_PROJECT names the project."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> None:
        import trackio

        self.id = known or f"{folder.name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.id,
            config=dict(settings),
            resume="allow",
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


SERVICES: dict[str, Callable[[Path, Mapping[str, Any], str | None], Service]] = {
    "wandb": WandbService,
    "mlflow": MLflowService,
    "trackio": TrackioService,
}
"""By the names that `report_to` takes, which are those of their packages."""


@dataclass
class Tracker:
    """A service that is told the metrics. Where it fails, one warning says so and it is told no
    more: no training is lost to a network.
    """

    name: str
    service: Service
    failed: bool = False

    def log(self, row: Mapping[str, Any]) -> None:
        """Report a line of metrics: its numbers, at its step."""
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        if numbers:
            self._told(lambda: self.service.log(numbers, int(row["step"])))

    def finish(self) -> None:
        """Tell the service that no more comes."""
        self._told(self.service.finish)

    def _told(self, tell: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            tell()
        except Exception as error:  # each service raises its own types
            self.failed = True
            log.warning(
                "%s failed and is told no more (%s); metrics.jsonl has everything.",
                self.name,
                reason_of(error),
            )


def open_trackers(
    names: Iterable[str], folder: Path, settings: Mapping[str, Any], known: Mapping[str, str]
) -> list[Tracker]:
    """The services, with a new run each, or with the one that they had before.

    Args:
        names: of `SERVICES`.
        folder: the run directory; its name is the run's.
        settings: the configuration, for the services to show.
        known: the runs' ids of an earlier process.

    Raises:
        InputError: one of them cannot be begun.
    """
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(Tracker(name, SERVICES[name](folder, settings, known.get(name))))
        except Exception as error:  # each service raises its own types
            for tracker in opened:
                tracker.finish()
            raise InputError(
                f"report_to: {name} cannot be begun ({reason_of(error)}); mend that, or leave "
                f"{name} out."
            ) from error
    return opened
