"""What the README, the recipes and the studies say is what the program takes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from dpo.config_files import read_config
from dpo.experiment import frontier_config, losses, sentiment_config
from dpo.experiment.exact_config import ExactStudyConfig
from dpo.experiment.frontier_config import FrontierConfig
from dpo.experiment.losses import LossStudyConfig
from dpo.experiment.sentiment_config import SentimentConfig
from dpo.experiment.study import StudyConfig, plan
from dpo.schemas import SCHEMAS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands():
    """Every line of the README's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_two_commands_come_first_and_make_has_them():
    assert readme_commands()[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in readme_commands():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda f: f.name)
def test_every_recipe_is_a_valid_configuration_and_says_its_command(file):
    text = file.read_text(encoding="utf-8")
    command = re.search(r"^# +dpo (\w+) recipes/(\S+)", text, flags=re.MULTILINE)
    assert command is not None
    assert command.group(2) == file.name
    assert read_config(SCHEMAS[command.group(1)], file).model.path is not None


STUDIES = {
    "exact": (ExactStudyConfig, None),
    "frontier": (FrontierConfig, frontier_config.plan),
    "hh": (StudyConfig, plan),
    "hh-small": (StudyConfig, plan),
    "instruction": (StudyConfig, plan),
    "instruction-small": (StudyConfig, plan),
    "losses": (LossStudyConfig, losses.plan),
    "sentiment": (SentimentConfig, sentiment_config.plan),
    "sentiment-small": (SentimentConfig, sentiment_config.plan),
}


def test_every_study_has_a_schema_that_takes_it_and_runs_to_make():
    files = {file.stem: file for file in (ROOT / "studies").glob("*.yaml")}
    assert files.keys() == STUDIES.keys()
    for name, (schema, runs_of) in STUDIES.items():
        config = read_config(schema, files[name])
        assert config.out == f"runs/{name}"
        assert runs_of is None or runs_of(config)


def test_studies_are_recorded_with_settings_that_their_schemas_take():
    recorded = runpy.run_path(str(ROOT / "studies" / "record.py"))["STUDIES"]
    for name, study in recorded.items():
        _, file, *words = study.words
        assert file == f"studies/{name}.yaml"
        options = {word for word in (*words, *study.quick) if word.startswith("--")}
        assert options == ({"--quick"} if name == "exact" else set())  # of its command alone
        for given in (words, [*words, *study.quick]):
            settings = [word for word in given if word not in options]
            assert read_config(STUDIES[name][0], ROOT / file, settings)


@pytest.mark.parametrize("name", ["instruction", "instruction-small"])
def test_a_study_of_instructions_plans_its_cells(name):
    file = ROOT / "studies" / f"{name}.yaml"
    config = read_config(StudyConfig, file)
    todo = plan(config)
    assert len(todo.sft) == len(config.seeds)
    assert {cell.label for cell in todo.dpo} >= {"DPO beta 0.3", "DPO beta 0.7", "DPO beta 1.0"}


def test_the_study_that_the_documentation_shows_plans_its_runs(tmp_path):
    page = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    file = tmp_path / "my-study.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0])
    runs = plan(read_config(StudyConfig, file))
    planned = [len(cells) for cells in (runs.sft, runs.dpo, runs.rivals, runs.reward_models)]
    assert planned == [3, 6, 9, 3]
    assert runs.labels["base"] == ("base", 0)


def test_the_readmes_exit_codes_are_the_errors():
    from dpo import errors

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.DPOError)
    } - {1}
    assert codes == {
        int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)
    } - {0}
