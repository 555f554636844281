"""What `import dpo` gives, what it costs, and what the project says about itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import dpo
from dpo.data import synthetic
from dpo.data.sources import write_jsonl
from dpo.models.fresh import fresh_gpt2

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def in_a_fresh_interpreter(code):
    """What the code prints, as JSON, where nothing of ours is loaded."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


def test_every_public_name_is_what_its_module_defines():
    for name in dpo.__all__:
        assert getattr(dpo, name) is not None
        if name != "__version__":
            module, _, inner = dpo._PLACES[name].partition(":")
            assert getattr(dpo, name) is getattr(import_module(module), inner)
    assert set(dpo.__all__) == {*dpo._PLACES, "__version__"}
    assert set(dpo.__all__) <= set(dir(dpo))


def test_type_checkers_are_told_the_same_places():
    source = (ROOT / "src" / "dpo" / "__init__.py").read_text(encoding="utf-8")
    told = {
        name: f"{module}:{inner}"
        for module, inner, name in re.findall(r"from (dpo\.[\w.]+) import (\w+) as (\w+)", source)
    }
    assert told == dpo._PLACES


def test_configurations_are_schemas_and_the_rest_can_be_called():
    for name in dpo._PLACES:
        value = getattr(dpo, name)
        assert issubclass(value, BaseModel) if name.endswith("Config") else callable(value)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'dpo' has no attribute 'train_everything'"):
        dpo.train_everything  # noqa: B018
    with pytest.raises(ImportError, match="train_everything"):
        from dpo import train_everything  # noqa: F401


def test_importing_is_fast_and_loads_neither_torch_nor_pydantic():
    code = (
        "import json, sys, time; start = time.process_time(); import dpo; "
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    runs = [in_a_fresh_interpreter(code) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.1
    for _, modules in runs:
        assert not {"torch", "transformers", "pydantic", "numpy"} & set(modules)


def test_asking_for_a_configuration_does_not_load_torch():
    code = "import json, sys, dpo; dpo.SFTConfig; print(json.dumps('torch' in sys.modules))"
    assert in_a_fresh_interpreter(code) is False
    assert in_a_fresh_interpreter(code.replace("SFTConfig", "dpo_loss")) is True


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"', PYPROJECT, flags=re.MULTILINE).group(1)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert dpo.__version__ == version == citation["version"]
    license_of = re.search(r'^license = "(.+)"', PYPROJECT, flags=re.MULTILINE).group(1)
    assert citation["license"] == license_of
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (ROOT / "src" / "dpo" / "py.typed").is_file()


def test_the_lowest_python_is_the_lowest_classified():
    classified = re.findall(r'Python :: 3\.(\d+)"', PYPROJECT)
    assert f'requires-python = ">=3.{min(map(int, classified))}"' in PYPROJECT


def test_the_readmes_python_runs_as_it_stands(tmp_path, monkeypatch, capsys, tokenizer):
    """In a folder with pairs and with a tiny model called gpt2-medium."""
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 11
    write_jsonl(synthetic.preferences(num_rows=40, seed=0), tmp_path / "prefs.jsonl")
    shape = {"width": 16, "layers": 1, "heads": 2, "positions": 512}
    fresh_gpt2(**shape, tokenizer=tokenizer, seed=0).save_pretrained(tmp_path / "gpt2-medium")
    tokenizer.save_pretrained(tmp_path / "gpt2-medium")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "('sft', 0.1, " in printed
    assert "('dpo', 1.0, " in printed
    assert (tmp_path / "runs" / "dpo" / "model" / "model.safetensors").is_file()
