"""The page of a training run."""

from __future__ import annotations

from dpo.report.page import samples
from dpo.report.page.blocks import Block, Code, Facts, Page, Prose, Table
from dpo.report.page.folders import RunFolder
from dpo.report.page.images import figures_of
from dpo.report.page.parts import (
    as_yaml,
    browser,
    data_name,
    diagnostics_blocks,
    metric,
    model_name,
    page_title,
    people_blocks,
    sections,
)
from dpo.report.page.reproduce import command_line
from dpo.report.page.verdict import run_verdict
from dpo.report.page.words import decimal, duration
from dpo.report.runs import SUMMARY

COMMANDS = {
    "sft": "Supervised fine-tuning",
    "train": "Preference optimisation",
    "reward": "Reward model",
    "online": "Online preference optimisation",
    "ppo": "PPO",
}
"""What a run is called by its command."""


def run_page(run: RunFolder) -> Page:
    """The page of a training run."""
    title = page_title(run.folder)
    return Page(
        title=title,
        about=f"{COMMANDS[run.command]}: dpo {run.command}",
        verdict=run_verdict(run),
        sections=sections(
            ("run", "What was run", [Facts(run_facts(run))]),
            ("results", "Held-out rows", [held_out_table(run)]),
            ("curves", "Curves", figures_of(run.folder)),
            ("samples", "Samples", [browser(samples.of_run(run.folder, title))]),
            ("people", "What people say", people_blocks(run.judgements)),
            ("diagnostics", "Diagnostics", diagnostics_blocks(run.folder, run.diagnostics)),
            ("data", "Data", data_blocks(run)),
            ("configuration", "Configuration", [as_yaml("config.json", run.config)]),
            ("environment", "Environment", [as_yaml("manifest.json", run.manifest)]),
            ("reproduce", "How to reproduce", reproduce_run(run)),
        ),
    )


def run_facts(run: RunFolder) -> list[tuple[str, str]]:
    """What was run, on what, when, and how it ended."""
    config, manifest = run.config, run.manifest
    steps = manifest.get("steps") or max((int(row["step"]) for row in run.metrics), default=0)
    loss = config.get("loss")
    facts = [
        ("Command", f"dpo {run.command}"),
        ("Starts from", model_name(config.get("model"))),
        ("Reference", model_name(config.get("reference")) if config.get("reference") else ""),
        ("Reward", model_name(config.get("reward")) if config.get("reward") else ""),
        ("Samples measured by", model_name((config.get("evaluation") or {}).get("reward"))),
        ("Data", data_name(config.get("data"))),
        ("Loss", loss_name(loss)),
        ("Template", str((config.get("resolved") or {}).get("template", {}).get("name", ""))),
        ("Seed", decimal(config.get("seed"))),
        ("Begun", str(manifest.get("created", ""))),
        ("Training", duration(manifest.get("seconds_training"))),
        ("Optimizer steps", f"{steps:,}"),
        ("Device", str(manifest.get("device", ""))),
        ("Status", str(manifest.get("status", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def loss_name(loss: object) -> str:
    """A loss with its options."""
    if not isinstance(loss, dict):
        return str(loss or "")
    options = ", ".join(f"{k} {decimal(v)}" for k, v in loss.items() if k not in ("name", "mix"))
    return f"{loss.get('name', 'mix')} ({options})" if options else str(loss.get("name", "mix"))


def held_out_table(run: RunFolder) -> Table | None:
    """Held-out metrics before training, at the best step and at the end."""
    held_out = run.held_out
    if not held_out:
        return None
    best_step = run.manifest.get("best_step", 0)
    stages = [("start", held_out[0]), ("end", held_out[-1])]
    best = next((row for row in held_out[1:-1] if row["step"] == best_step), None)
    if best is not None:
        stages.insert(1, ("best", best))
    head = ["metric", *(f"{name}, step {row['step']}" for name, row in stages)]
    rows = [
        [name, *(metric(row, key, run.margins if row is held_out[-1] else ()) for _, row in stages)]
        for key, name in SUMMARY
        if not key.endswith("_stderr") and any(key in row for _, row in stages)
    ]
    note = "Log-probabilities, rewards and KL are in nats a response, summed over its tokens."
    if any(f"{key}_stderr" in held_out[-1] for key, _ in SUMMARY):
        note += " ± is one standard error over prompts."
    return Table(head, rows, note=note)


def reproduce_run(run: RunFolder) -> list[Block]:
    """The command, and what must be the same beside it."""
    digest = str((run.config.get("resolved") or {}).get("data_sha256", ""))
    commit = str(run.manifest.get("commit") or "")
    needs = [f"the data have the SHA-256 {digest}"] if digest else []
    needs += [f"the code is at commit {commit}"] if commit else []
    needs += ["the versions and the processor are those above"]
    return [
        Code("Command", command_line(run.command, run.config, run.folder), is_open=True),
        Prose([f"It gives the same numbers where {'; '.join(needs)}."]),
    ]


def data_blocks(run: RunFolder) -> list[Block]:
    """What was in the training rows, as counted when the run began."""
    audit = run.audit
    if not audit:
        return []
    counts = [
        (AUDIT_NAMES.get(name, name.replace("_", " ")), _count(value))
        for name, value in audit.items()
        if name != "lengths" and value is not None
    ]
    blocks: list[Block] = [Facts(counts)]
    lengths = audit.get("lengths") or []
    if lengths:
        percentiles = [0, 5, 25, 50, 75, 95, 99, 100]
        blocks.append(
            Table(
                head=["part", "unit", "parts", *(f"{p}%" for p in percentiles)],
                rows=[
                    [part["part"], part["unit"], decimal(part["num_parts"])]
                    + [decimal(length) for length in part["at_percentiles"]]
                    for part in lengths
                ],
                caption="Lengths at percentiles: 0% is the shortest, 100% the longest.",
            )
        )
    return blocks


AUDIT_NAMES = {
    "num_rows": "Training rows",
    "num_test_rows": "Held-out rows",
    "num_rows_by_kind": "Kinds of rows",
    "num_unique_prompts": "Different prompts",
    "num_distinct_prompts": "Different prompts up to case and white space",
    "num_duplicate_rows": "Rows that equal an earlier one",
    "num_identical_pairs": "Pairs whose chosen equals their rejected",
    "num_responses": "Responses",
    "num_desirable": "Desirable responses",
    "num_empty_responses": "Empty responses",
    "num_repeated_prompts": "Responses that begin with their prompt",
    "num_overlapping_prompts": "Held-out prompts among the training prompts",
}


def _count(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{n:,} {kind}" for kind, n in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
