"""Stand-ins for the services that runs are reported to: modules of the same calls that write down
what they are told.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from types import SimpleNamespace


def _module(name, **attributes):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(attributes)
    return module


class Book:
    """What the services were told, by run id."""

    def __init__(self):
        self.begun = []
        self.told = {}
        self.ended = []
        self.fail = False

    def begin(self, run, **how):
        self.begun.append((run, how))
        self.told.setdefault(run, [])

    def tell(self, run, metrics, step):
        if self.fail:
            raise ConnectionError("no route\nto the service")
        self.told[run].append({"step": step, **metrics})


class _Client:
    """MLflow's."""

    def __init__(self, book):
        self.book = book

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"experiment {name}"

    def create_run(self, experiment, run_name):
        run = f"run {len(self.book.told)}"
        self.book.begin(run, experiment=experiment, name=run_name, config={})
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def update_run(self, run, status):
        assert status == "RUNNING"
        assert run in self.book.told
        self.book.begin(run)

    def log_batch(self, run, metrics=(), params=()):
        for name, value in params:
            self.book.begun[-1][1]["config"][name] = value
        for name, value, _, step in metrics:
            self.book.tell(run, {name: value}, step)

    def set_terminated(self, run):
        self.book.ended.append(run)


def install(monkeypatch, name):
    """Make `import NAME` give a stand-in; returns its book."""
    book = Book()
    if name == "mlflow":
        entities = _module("mlflow.entities", Metric=lambda *a: a, Param=lambda *a: a)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
        module = _module("mlflow", MlflowClient=lambda: _Client(book), entities=entities)
    else:

        def init(*, project, name, config, resume, id=None, dir=None):
            assert resume == "allow"
            run = id or name
            book.begin(run, project=project, name=name, config=config, dir=dir)
            return SimpleNamespace(
                log=lambda metrics, step: book.tell(run, metrics, step),
                finish=lambda: book.ended.append(run),
            )

        module = _module(name, init=init)
    monkeypatch.setitem(sys.modules, name, module)
    return book
