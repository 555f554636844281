"""The table of docs/scaling.md: `python -m dpo.report.scaling` prints it, with a page's name it is
put there.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from transformers import LlamaConfig

from dpo import atomic
from dpo.core.cost import ModelSize, PassSize
from dpo.core.machines import GIB, GPUS
from dpo.core.scaling import POLICIES, Cluster, Llama, Pairs, Projection, project
from dpo.data.pack import pack
from dpo.data.tokenize import TokenSequence
from dpo.models.counts import Architecture, measure_model, measure_pass
from dpo.models.load import ModelSource
from dpo.report.tables import markdown

CLUSTER = Cluster(GPUS["H100"], 8, node_gb_per_second=450, network_gb_per_second=50)
"""NVLink 4: 900 GB/s, half of it each way; InfiniBand NDR: 400 Gb/s for each GPU. Data sheets, from
memory.
"""
BATCH = Pairs(1024, prompt=512, response=512)
GPU_COUNTS = (8, 64, 256, 1024)
MAX_TOKENS = 4096
MAX_LOGIT_BYTES = 512 << 20
BEGIN, END = "<!-- the table: python -m dpo.report.scaling docs/scaling.md -->", "<!-- its end -->"

HEAD = [
    *("policy", "GPUs", "passes", "parts", "gathered", "within a pass", "together", "fits"),
    *("sent", "computing", "sending", "seconds a step"),
]


def architecture_of(shape: Llama) -> Architecture:
    """The model as transformers builds it."""
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    return Architecture(config, ModelSource("", local=True))


def counted(shape: Llama) -> ModelSize:
    """The counts of that model."""
    return measure_model(architecture_of(shape).build())


@cache
def pass_of(shape: Llama) -> PassSize:
    """What a pass of as many whole pairs as `MAX_TOKENS` hold keeps."""
    pairs = max(1, MAX_TOKENS // BATCH.tokens)
    sequences = [
        TokenSequence((*(pair,) * BATCH.prompt, *(3 + side,) * BATCH.response), BATCH.prompt)
        for pair in range(pairs)
        for side in range(2)
    ]
    return measure_pass(architecture_of(shape), [pack(sequences)], precision="bf16")


def table() -> str:
    """The table in Markdown."""
    lines = [HEAD]
    for name, shape in POLICIES.items():
        for ranks in GPU_COUNTS:
            found = project(
                shape.size,
                pass_of(shape),
                BATCH,
                CLUSTER,
                ranks=ranks,
                max_logit_bytes=MAX_LOGIT_BYTES,
            )
            lines.append([name, *_cells(found)])
    return markdown(lines)


def _cells(found: Projection) -> list[str]:
    within = found.peak.total - found.peak.optimizer
    hidden, open_ = found.seconds
    return [
        f"{found.ranks:,}",
        str(found.passes),
        *(_gib(size) for size in (found.parts, found.gathered, within, found.memory)),
        "yes" if found.memory <= 0.85 * CLUSTER.gpu.memory_gib * GIB else "no",
        _gib(found.sent),
        *(f"{_seconds(value)} s" for value in (found.computing, found.sending)),
        f"{_seconds(hidden)} to {_seconds(open_)}",
    ]


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def with_table(page: str) -> str:
    """The page with the table as it is now between its marks."""
    block = f"{BEGIN}\n\n{table()}\n\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, page, flags=re.DOTALL)


def main() -> None:
    """Print the table, or put it into the page that is named."""
    if len(sys.argv) == 1:
        print(table())
        return
    file = Path(sys.argv[1])
    atomic.write_text(file, with_table(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
