"""`dpo data check`: what is in the data, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dpo.data.audit import audit, preview, render
from dpo.data.prompts import default_template, load_template, resolve_template
from dpo.data.sources import LoadedRows, load_rows
from dpo.data.tokenize import Encoder

WHOLE = 2**30
"""A length at which nothing is cut."""


def check_data(
    files: Sequence[str],
    *,
    tokenizer: str | None,
    template: str | None,
    max_length: int,
    test: str | None,
    split: str | None,
    num_shown: int,
    columns: Mapping[str, str],
) -> None:
    """Validate the rows and print counts, lengths and a few rows as they will be tokenised.

    Raises:
        InputError: the data cannot be used, with the first problems; or there is no such tokenizer.
    """
    console = Console()
    loaded = load_rows(list(files), columns=columns, split=split)
    test_rows = None if test is None else load_rows(test, columns=columns).rows
    console.print(Text(str(loaded)))
    if tokenizer is None:
        console.print(render(audit(loaded.rows, test_rows=test_rows)))
        console.print("Name a --tokenizer to count tokens and to see rows as they are tokenised.")
        return
    encoder = _encoder(tokenizer, template, loaded, max_length)
    found = audit(
        loaded.rows,
        encode=replace(encoder, max_length=WHOLE).encode,
        merges=encoder.merges_across_boundary,
        test_rows=test_rows,
        max_length=max_length,
    )
    console.print(Text(f"Template: {encoder.template}"))
    console.print(render(found))
    if num_shown:
        shown = preview(
            loaded.rows,
            num_shown,
            encode=encoder.encode,
            token_text=lambda token: str(encoder.tokenizer.decode([token])),
        )
        console.print(shown)


def _encoder(name: str, template: str | None, loaded: LoadedRows, max_length: int) -> Encoder:
    from dpo.models.load import find_tokenizer, load_tokenizer

    source = find_tokenizer(name)
    own = load_template(Path(source.path)) if source.local else None
    if template is not None:
        chosen = resolve_template(template)
    else:
        conversational = not isinstance(loaded.rows[0].prompt, str)
        chosen = own or default_template(loaded.shape, conversational=conversational)
    return Encoder(load_tokenizer(source), chosen, max_length)
