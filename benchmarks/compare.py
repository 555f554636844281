"""Time our DPO step, SFT step and generation beside TRL's and transformers'.

    python benchmarks/compare.py dpo --steps 3                      # random tokens, a first look
    python benchmarks/compare.py dpo --data hh --data-folder DATA   # real text, 20 steps
    python benchmarks/compare.py sft --precision bf16
    python benchmarks/compare.py generate --samples 8
    python benchmarks/compare.py all --data-folder DATA             # all that README.md shows

All contestants start from the same random weights (6 layers, 768 wide, GPT-2's vocabulary), see the
same token ids in the same batches, and take turns in one process: step 1 of each, step 2 of each.
In fp32 their losses must agree to 2e-5 at every step, or the exit code is 1. DATA is a folder with
hh-harmless-sample.jsonl, instruction-preferences.json and gpt2-tokenizer/ (vocab.json, merges.txt).
The README.md beside this file says where they come from and how to read the numbers.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from scenario import DATA, PRECISIONS, RESULTS, TASKS, Scenario

OPTIONS = {
    "batch": "pairs of a step; prompts of a round of generation",
    "steps": "timed steps (rounds of generation), after one that warms up",
    "threads": "threads of every contestant",
    "layers": "layers of the GPT-2",
    "width": "channels of the GPT-2; 64 make an attention head",
    "vocab": "entries of its vocabulary",
    "max_length": "longest prompt with its response, tokens",
    "seed": "decides weights, batches and samples",
    "data_folder": "where the data sets and the tokenizer are",
}
TRAINING_OPTIONS = {
    "learning_rate": "AdamW's, constant",
    "max_tokens": "our batch.max_tokens: tokens of one forward and backward pass",
}
TASK_OPTIONS = {
    "dpo": {**TRAINING_OPTIONS, "beta": "DPO's beta"},
    "sft": TRAINING_OPTIONS,
    "generate": {
        "samples": "responses to each prompt",
        "max_new_tokens": "longest response",
        "generation_batch": "sequences generated at once",
        "stop_share": "share of the vocabulary that ends a response",
    },
}
"""What each task takes. An option that would have no effect is an error."""

RECORDED = (("dpo", "hh", 4), ("dpo", "instruction", 8), ("sft", "hh", 8), ("generate", "hh", 4))
"""Task, data and batch of what `all` runs, each in fp32 and in bf16."""


def main() -> None:
    arguments = vars(_parser().parse_args())
    task = arguments.pop("task")
    import trl_side

    if sentence := trl_side.missing():
        raise SystemExit(sentence)
    if task == "all":
        _run_all(arguments)
    else:
        _run_one(task, arguments)


def _run_one(task: str, arguments: dict[str, Any]) -> None:
    """Run one scenario, show it, and write it where it is asked for."""
    from results import losses_agree, write
    from run import run
    from show import show

    out = arguments.pop("out", None)
    scenario = Scenario(task, **arguments)
    result = run(scenario, command=_command(task, arguments))
    show(result)
    if out is not None:
        print(f"Written to {write(result, out)}.")
    if not losses_agree(result):
        raise SystemExit("The losses do not agree: the two sides do not compute the same.")


def _run_all(arguments: dict[str, Any]) -> None:
    """Every recorded scenario, each in a process of its own so that none inherits memory."""
    out = arguments.pop("out", RESULTS)
    recorded = RECORDED
    if "data_folder" not in arguments:
        print("No --data-folder: random tokens instead of the data sets.", file=sys.stderr)
        recorded = tuple(dict.fromkeys((task, "random", 4) for task, _, _ in RECORDED))
    failed = []
    for task, data, batch in recorded:
        for precision in PRECISIONS:
            options = {"data": data, "precision": precision, "batch": batch, **arguments}
            words = [task, *_words(options), "--out", str(out)]
            print(shlex.join(words), flush=True)
            if subprocess.run([sys.executable, str(Path(__file__)), *words]).returncode:
                failed.append(f"{task}-{data}-{precision}")
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


def _words(options: dict[str, Any]) -> list[str]:
    """Options as they are typed."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
    return [word for pair in pairs for word in pair]


def _command(task: str, arguments: dict[str, Any]) -> str:
    """The command that gives this result, without places on this machine."""
    shown = {**arguments, "data_folder": "DATA"} if "data_folder" in arguments else arguments
    return shlex.join(["python", "benchmarks/compare.py", task, *_words(shown)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="task", required=True, metavar="{dpo,sft,generate,all}")
    titles = {
        "dpo": "our DPO step beside TRL's DPOTrainer at its defaults and at its best settings",
        "sft": "our SFT step beside TRL's SFTTrainer at its defaults and at its best settings",
        "generate": "our sampler beside model.generate of transformers",
    }
    for task in TASKS:
        command = commands.add_parser(task, help=titles[task], description=titles[task])
        command.add_argument(
            "--data", choices=DATA, default=argparse.SUPPRESS, help="what text (default: random)"
        )
        command.add_argument(
            "--precision",
            choices=PRECISIONS,
            default=argparse.SUPPRESS,
            help="bf16 is autocast, weights stay float32 (default: fp32)",
        )
        _add(command, OPTIONS | TASK_OPTIONS[task])
        command.add_argument(
            "--out",
            type=Path,
            default=argparse.SUPPRESS,
            help="folder to write the result to (default: it is only printed)",
        )
    title = "all recorded scenarios, fp32 and bf16, into benchmarks/results"
    every = commands.add_parser("all", help=title, description=title)
    _add(every, {name: text for name, text in OPTIONS.items() if name != "batch"})
    every.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="another folder")
    return parser


def _add(parser: argparse.ArgumentParser, options: dict[str, str]) -> None:
    """Options that set a field of the scenario and are absent where they are not given."""
    defaults = {field.name: field.default for field in fields(Scenario)}
    for name, text in options.items():
        default = defaults[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=str if default is None else type(default),
            default=argparse.SUPPRESS,
            help=text if default is None else f"{text} (default: {default})",
        )


if __name__ == "__main__":
    main()
