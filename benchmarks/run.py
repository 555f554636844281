"""One scenario, from nothing to the result that is shown and recorded."""

from __future__ import annotations

import copy
import logging
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from typing import Any

import datasets
import torch
import transformers
from contestants import make_loop, names, settings
from floor import PrefixTree, Products, Rates, measure_rates, trees_of
from generation import greedy_agreement
from memory import measure
from results import hardware, timings
from scenario import WARMUP_STEPS, Scenario
from stepwise import Step, Stepwise, interleave, use_one_arena
from torch import nn
from workload import Workload, make_model, make_workload

from dpo.progress import counting


def run(scenario: Scenario, *, command: str) -> dict[str, Any]:
    """Measure memory in processes of their own, then all contestants in turn in this one."""
    _be_quiet()
    use_one_arena()
    torch.set_num_threads(scenario.threads)
    workload = make_workload(scenario)
    # First, while this process holds no model, so that the machine's memory is free for them.
    memory = {name: measure(name, scenario) for name in names(scenario.task)}
    model = make_model(scenario)
    if scenario.task == "generate":
        steps = _take_turns(scenario, workload, model)
        checks = {"greedy_agreement": greedy_agreement(scenario, workload, model)}
    else:
        trees = [trees_of(step, scenario.task) for step in workload.batches()]
        rates = measure_rates(scenario, trees)
        steps = _take_turns(scenario, workload, model)
        again = measure_rates(scenario, trees)
        rates = {dtype: rate.best(again[dtype]) for dtype, rate in rates.items()}
        checks = {"floor": _floor(scenario, trees, rates)}
    return {
        "name": scenario.name,
        "command": command,
        "scenario": scenario.record(),
        "workload": _describe(scenario, workload),
        "contestants": {
            name: {
                "settings": settings(name, scenario),
                **timings(steps[name], scenario.task),
                "memory": memory[name],
            }
            for name in steps
        },
        **checks,
        "hardware": hardware(),
    }


def _take_turns(scenario: Scenario, workload: Workload, model: nn.Module) -> dict[str, list[Step]]:
    """All steps of all contestants, each with its own copy of the model."""
    loops = {
        name: make_loop(name, scenario, workload, copy.deepcopy(model))
        for name in names(scenario.task)
    }
    contestants = {name: Stepwise(loop, threads=scenario.threads) for name, loop in loops.items()}
    num_steps = scenario.steps + WARMUP_STEPS
    with counting("Steps", num_steps * len(contestants)) as advance:
        return interleave(contestants, num_steps, advance)


def _floor(
    scenario: Scenario, steps: Sequence[Sequence[PrefixTree]], rates: dict[str, Rates]
) -> dict[str, Any]:
    """Multiply-adds and the seconds they need, of each step, in whatever type is fastest."""
    fastest = reduce(Rates.best, rates.values())
    products = [
        Products.of(trees, layers=scenario.layers, width=scenario.width, vocab=scenario.vocab)
        for trees in steps
    ]
    return {
        "multiply_adds": [asdict(step) for step in products],
        "multiply_adds_per_second": {dtype: asdict(rate) for dtype, rate in rates.items()},
        "seconds": [fastest.seconds(step) for step in products],
    }


def _describe(scenario: Scenario, workload: Workload) -> dict[str, Any]:
    """What text it was, and how long."""
    batches = workload.batches()
    trees = [trees_of(step, scenario.task) for step in batches]
    responses = [n for step in trees for tree in step for n in tree.responses]
    padded = [
        sum(len(t.responses) for t in step) * max(t.prompt + max(t.responses) for t in step)
        for step in trees
    ]
    sources = {
        "hh": "hh-rlhf, harmless-base, prompts as they stand",
        "instruction": "1,100 instruction pairs, alpaca template",
        "random": "random tokens with lengths like those of hh-rlhf's harmless pairs",
    }
    return {
        "data": sources[scenario.data],
        "num_pairs": len(workload.pairs),
        "median_prompt_tokens": statistics.median(t.prompt for step in trees for t in step),
        "median_response_tokens": statistics.median(responses),
        "median_padded_tokens_per_step": statistics.median(padded),
        "median_unique_tokens_per_step": statistics.median(
            sum(tree.unique_tokens for tree in step) for step in trees
        ),
        "median_scored_tokens_per_step": statistics.median(
            sum(tree.scored_tokens for tree in step) for step in trees
        ),
    }


def _be_quiet() -> None:
    """Libraries say nothing but errors: the terminal is for the table."""
    warnings.simplefilter("ignore")
    logging.getLogger("trl").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
