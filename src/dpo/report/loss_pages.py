"""`dpo losses`: the family as a table, a loss explained, and both as pages of the documentation.

Everything comes from the functions (`dpo.core.family`) and their options (`dpo.loss_config`), so
the pages say what the program does.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from dpo.atomic import storage_errors, write_text
from dpo.config_files import sections_of
from dpo.core.family import LOSSES, NOTATION, Loss, needs_reference, tensors
from dpo.loss_config import LOSS_CONFIGS

HEADINGS = {
    "pair": ("Pairs", "a chosen and a rejected response of one prompt"),
    "list": ("Ranked lists", "two or more responses of one prompt, ranked or scored"),
    "unpaired": ("Judged responses", "single responses, each desirable or not"),
}
"""Of each kind: the title of its table, and what a row of the data is."""

MIX_PAGE = """# mix

Several losses of a pair, added with weights.

    loss = Σ_k weight_k loss_k

Every entry has a loss's name, its options, and a weight (1 if it is not given):

    loss.mix='[{name: dpo, weight: 0.8}, {name: bco_pair, weight: 0.2}, {name: nll, weight: 1}]'

is MPO (W. Wang et al. 2024, arXiv:2411.10442), and

    loss.mix='[{name: dpo, beta: 0.1}, {name: nll, weight: 1}]'

is the "RPO" of Pang et al. 2024 (arXiv:2404.19733). A reference is loaded if one of the losses
needs it. `loss.name=mix` is understood where `loss.mix` is given.
"""


def print_losses() -> None:
    """Print the table of all losses."""
    table = Table("name", "of", "formula", "source", title="dpo losses")
    for loss in LOSSES.values():
        table.add_row(*map(Text, (loss.name, loss.kind, loss.formula, loss.source)))
    table.add_row("mix", "pair", "Σ_k weight_k loss_k", "any of the losses of a pair")
    console = Console()
    console.print(table)
    console.print(Text(NOTATION))
    console.print(Text("dpo losses NAME explains one; dpo train takes it as loss.name=NAME."))


def print_loss(name: str) -> None:
    """Print the page of one loss."""
    text = MIX_PAGE if name == "mix" else page(LOSSES[name], figure=False)
    Console().print(Markdown(text, code_theme="bw"))


def write_pages(folder: Path) -> None:
    """Write README.md, a page for each loss, and the figures.

    Raises:
        StorageError: a file cannot be written.
    """
    from dpo.report.loss_figures import svg

    with storage_errors(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        write_text(folder / name, text)
    for name in LOSSES:
        write_text(folder / "figures" / f"{name}.svg", svg(name))


def pages() -> dict[str, str]:
    """The Markdown of every page, by its file's name."""
    of_losses = {f"{loss.name}.md": page(loss) for loss in LOSSES.values()}
    return {"README.md": index(), **of_losses, "mix.md": MIX_PAGE}


def index() -> str:
    """The page that lists all losses."""
    parts = [
        "# Losses",
        "`dpo train ... loss.name=NAME` trains with any of them; its page has its options. "
        "Defaults are those of the papers where there is one; `src/dpo/loss_config.py` says which "
        "were checked. Several losses of a pair can be added with weights: [mix](mix.md). For "
        "TR-DPO (arXiv:2404.09656) let the reference move: `moving_reference.every=512`.",
        "These pages are generated from the functions in `src/dpo/core` and the options in "
        "`src/dpo/loss_config.py` by `dpo losses --write docs/losses`.",
        f"Notation. {NOTATION}",
    ]
    for kind, (title, row) in HEADINGS.items():
        rows = [
            (f"[{loss.name}]({loss.name}.md)", _code(loss.formula), loss.note, loss.source)
            for loss in LOSSES.values()
            if loss.kind == kind
        ]
        parts += [f"## {title}", f"A row is {row}.", _table(["name", "loss", "", "source"], rows)]
    return "\n\n".join(parts) + "\n"


def page(loss: Loss, *, figure: bool = True) -> str:
    """One loss explained, in Markdown."""
    parts = [f"# {loss.name}", _code(loss.formula), f"Source: {loss.source}."]
    if loss.note:
        parts.append(loss.note)
    parts += [explanation(loss), "## Options", _options(loss), "## What it needs"]
    parts.append("\n".join(f"- {need}" for need in needs(loss)))
    if figure:
        from dpo.report.loss_figures import caption

        parts += ["## Shape", f"![Loss and pull](figures/{loss.name}.svg)", caption(loss)]
    parts.append(f"Notation. {NOTATION}")
    return "\n\n".join(parts) + "\n"


def explanation(loss: Loss) -> str:
    """The docstring without its arguments, exceptions and examples; a paragraph is one line."""
    blocks = (inspect.getdoc(loss.function) or "").split("\n\n")
    kept = [b for b in blocks if not re.match(r"Args:|Raises:|>>>", b)]
    return "\n\n".join(_equation(b) if b[:1].isspace() else " ".join(b.split()) for b in kept)


def _equation(block: str) -> str:
    """An indented block of a docstring, fenced: its lines may be indented differently."""
    return f"```text\n{textwrap.dedent(block)}\n```"


def _options(loss: Loss) -> str:
    rows = [
        (_code(f"loss.{key}"), _code(default), values, meaning)
        for key, default, values, meaning in option_rows(LOSS_CONFIGS[loss.name])
    ]
    if not rows:
        return "None."
    return _table(["option", "default", "values", "meaning"], rows)


def option_rows(config: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Key, default, allowed values and meaning of every option of a loss."""
    rows = []
    for name, option in config.model_fields.items():
        sections = sections_of(option.annotation)
        if sections:
            rows += option_rows(sections[0], f"{prefix}{name}.")
        elif name != "name":
            default = "none" if option.default is None else str(option.default)
            rows.append((prefix + name, default, allowed(option), option.description or ""))
    return rows


def allowed(option: FieldInfo) -> str:
    """The values that an option takes, e.g. `> 0, < 1` or `js, alpha`.

    >>> from dpo.loss_config import DPOLossConfig
    >>> allowed(DPOLossConfig.model_fields["label_smoothing"])
    '≥ 0, < 0.5'
    """
    if get_origin(option.annotation) is Literal:
        return ", ".join(map(str, get_args(option.annotation)))
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    inside = [m for kind in get_args(option.annotation) for m in getattr(kind, "__metadata__", ())]
    limits = [limit for m in inside for limit in getattr(m, "metadata", [m])]
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in [*option.metadata, *limits]
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    return ", ".join(bounds)


def needs(loss: Loss) -> list[str]:
    """What a loss takes of the data, of the models and of the batch, a sentence each."""
    names = set(tensors(loss))
    _, row = HEADINGS[loss.kind]
    data = f"Data: {row}"
    if names & {"chosen_scores", "scores"}:
        data += "; every response has a score"
    elif loss.kind == "list":
        data += "; ties are allowed"
    found = [f"{data}."]
    found.append(f"Reference model: {'yes' if needs_reference(loss) else 'none is loaded'}.")
    if any(n.endswith(("_token_log_collision", "_entropy", "_forward_kl")) for n in names):
        found.append("Next-token distributions at every token, so it is slower than the others.")
    if "Depends on the batch" in (loss.function.__doc__ or ""):
        found.append("Batch: the loss of a row depends on the whole batch of its step.")
    elif "kl" in names:
        found.append("Batch: rows matter to each other through the reference point alone.")
    elif names & {"reward_shift", "running_margin"}:
        found.append("Batch: rows matter to each other through running means alone.")
    else:
        found.append("Batch: the loss of a row depends on that row alone.")
    return found


def _code(text: str) -> str:
    return f"`{text}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
