"""`dpo arena`: from folders to a page to judge on, and from judgements to their summary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.data.files import printable
from dpo.evaluate.arena.judgements import (
    JUDGEMENTS,
    JudgementFile,
    Summary,
    describe,
    read_judgements,
    summarise,
)
from dpo.evaluate.arena.pairs import Answer, Pair, choose_responders, deal, make_pairs, read_answers
from dpo.evaluate.arena.server import ArenaServer
from dpo.evaluate.arena.session import Session

log = logging.getLogger("dpo")


def hold_arena(
    folders: Sequence[Path],
    *,
    a: str | None = None,
    b: str | None = None,
    out: Path | None = None,
    annotator: str = "anonymous",
    temperature: float | None = None,
    max_prompts: int | None = None,
    seed: int = 0,
    port: int = 0,
) -> None:
    """Serve the page until Ctrl-C, then print what was found.

    Args:
        folders: of evaluations and runs.
        a, b: whose answers; by default the models, where no choice is left.
        out: the file of judgements; `judgements.jsonl` in the first folder by default.

    Raises:
        InputError: a folder, a name or the file of judgements cannot be used.
        StorageError: the file of judgements cannot be written.
    """
    answers = read_answers(folders)
    a, b = choose_responders(answers, a, b)
    met = make_pairs(answers, a, b, temperature=temperature)
    pairs = deal(met, seed=seed, max_prompts=max_prompts)
    alone = _alone(answers, a, b, met)
    if alone:
        log.warning("%d answers of the two have no counterpart and are left out.", alone)
    file = JudgementFile(out or folders[0] / JUDGEMENTS)
    try:
        session = Session(pairs, file, annotator=annotator, seed=seed)
        with ArenaServer(session, port=port) as server:
            try:
                _announce(session, file.path, server.url)
                server.serve_forever()
            except KeyboardInterrupt:
                log.info("Stopped; the same command goes on where you were.")
        print_summary(session.summary())
    finally:
        file.close()


def _alone(answers: Sequence[Answer], a: str, b: str, pairs: Sequence[Pair]) -> int:
    """How many sampled answers of the two meet nobody, at the temperatures of the pairs."""
    at = {pair.sampled.temperature for pair in pairs} - {None}
    met = {answer for pair in pairs for answer in (pair.a, pair.b)}
    of_both = {x for x in answers if x.responder in (a, b) and x.temperature in at}
    return len(of_both - met)


def summarise_files(files: Sequence[Path]) -> None:
    """Print the summary of files of judgements.

    Raises:
        InputError: a file cannot be read, or a line of it is no judgement.
    """
    for summary in summarise(read_judgements(files)):
        print_summary(summary)


def print_summary(summary: Summary) -> None:
    """The summary on the terminal."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in describe(summary):
        table.add_row(Text(label, style="bold"), Text(value))
    Console().print(table)


def _announce(session: Session, file: Path, url: str) -> None:
    progress = session.progress()
    lines = [
        f"{progress['total'] - progress['done']} pairs to judge, {progress['done']} judged before, "
        f"{progress['identical']} with identical answers, which count as ties.",
        f"Judgements go to {printable(str(file), limit=1000)}",
        f"Open {url}",
        "Ctrl-C ends it and prints the summary.",
    ]
    for line in lines:
        Console().print(Text(line), soft_wrap=True)
