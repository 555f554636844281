"""The notebook runs from its first cell to its last, and shows what its text says."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "from-equation-to-model.ipynb"


def children_seconds():
    """Processor time of the processes that this one started and that have ended: of kernels."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def printed(cell):
    texts = [o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "\n".join(texts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's client
def test_the_notebook_goes_from_the_equation_to_a_better_model(tmp_path):
    source = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        source, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    start = children_seconds()
    client.execute()
    assert children_seconds() - start < 60
    cells = [cell for cell in source.cells if cell.cell_type == "code"]
    assert "0.3133, by hand 0.3133" in printed(cells[0])
    assert "0.6931 = log 2 = 0.6931" in printed(cells[1])
    lines = printed(cells[3]).splitlines()
    policy, optimum = (list(map(float, re.findall(r"\d\.\d+", line))) for line in lines[1:])
    assert policy == pytest.approx(optimum, abs=2e-3)
    rows = [line.split() for line in printed(cells[5]).splitlines()[1:]]
    step, loss, accuracy, reward, kl = (
        list(map(float, c)) for c in list(zip(*rows, strict=True))[1:]
    )
    assert step[0] == 0
    assert loss[0] == pytest.approx(0.693)
    assert loss[-1] < 0.6
    assert accuracy[-1] > 0.6
    assert reward[-1] > reward[0]
    assert kl[0] == 0 < kl[-1]
    assert "->" in printed(cells[6])


def test_the_notebook_is_kept_without_outputs_and_paths():
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    assert {len(cell["outputs"]) for cell in cells if cell["cell_type"] == "code"} == {0}
    assert {cell["execution_count"] for cell in cells if cell["cell_type"] == "code"} == {None}
    assert not re.search(r"/(home|tmp|root|Users)/", text)
