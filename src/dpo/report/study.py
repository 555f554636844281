"""What a study leaves: tables, figures, samples side by side, and a page that shows them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from dpo.atomic import write_text
from dpo.data.audit import visible
from dpo.evaluate.head_to_head import HeadToHead
from dpo.evaluate.paired import PairedTest, power_lines
from dpo.evaluate.records import ScoredGeneration
from dpo.report.evaluation_screen import evaluation_figures, evaluation_tables
from dpo.report.exact_study import DPO
from dpo.report.figures import TrainingCurve, training_curves_figure
from dpo.report.frontier_study import Cost
from dpo.report.study_claims import claims_table
from dpo.report.study_results import SFT, CellResult, Study
from dpo.report.tables import Cells, Tables, columns, markdown, on_screen, save_tables, spread

NUM_SAMPLES = 8
COST_ON_SCREEN = (
    "method",
    "seconds",
    "peak memory (MB)",
    "gradient steps",
    "responses drawn",
    "settings",
)


def write_study(study: Study) -> None:
    """Figures, tables, samples and README.md in the study's folder, and the tables on the
    screen.
    """
    figures = study.folder / "figures"
    training_curves_figure(curves(study), figures / "training")
    evaluation_figures(study.evaluation, figures)
    found = tables(study)
    save_tables(study.folder, found)
    stream = io.StringIO()
    lines = zip(found["methods"], found["cost"], strict=True)
    csv.writer(stream, lineterminator="\n").writerows([*own, *cost[1:]] for own, cost in lines)
    write_text(study.folder / "table.csv", stream.getvalue())
    samples = side_by_side(study.evaluation.scored)
    texts = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_text(study.folder / "samples.jsonl", "".join(texts))
    write_text(study.folder / "README.md", page(study, samples))
    console = Console()
    console.print(on_screen("Held-out metrics at the end of training", found["methods"]))
    console.print(on_screen("Cost of a run", columns(found["cost"], COST_ON_SCREEN)))
    for table in evaluation_tables(study.evaluation):
        console.print(table, "")
    for line in power_lines(study.evaluation.tests):
        console.print(Text(line))
    console.print(Text(f"Page: {study.folder / 'README.md'}   figures: {figures}"))


def curves(study: Study) -> list[TrainingCurve]:
    """Held-out DPO loss and KL over the epochs, one curve a run."""
    return [
        TrainingCurve(
            label=result.label.removeprefix(f"{DPO} "),
            seed=result.seed,
            x=result.epochs,
            loss=result.loss,
            kl=result.kl,
            kl_stderr=result.kl_stderr,
        )
        for result in study.results
        if result.label.startswith(DPO)
    ]


# -- tables: the first line is the head ----------------------------------------------------------


def tables(study: Study) -> Tables:
    """The page's tables by name, and single numbers of what was done."""
    found = {
        "facts": facts_table(study),
        "methods": method_table(study),
        "claims": claims_table(study),
        "cost": cost_table(study),
        "win rates": win_table(study),
        "against the strongest null": against_null_table(study),
        "dpo against the others": against_dpo_table(study),
    }
    if study.evaluation.duels is not None:
        found["head to head"] = head_to_head_lines(study.evaluation.duels.table)
    if study.reward_models:
        found["reward model"] = reward_model_table(study.reward_models)
    return found


def facts_table(study: Study) -> list[Cells]:
    """How responses were judged."""
    meta = study.judged.get("meta", {})
    known = {
        "held-out prompts": meta.get("num_prompts"),
        "judge": meta.get("sentence_model"),
        "samples a prompt, seed and temperature": meta.get("samples_per_prompt"),
        "longest response, tokens": meta.get("max_new_tokens"),
        "seeds": len({result.seed for result in study.results}),
    }
    return [["fact", "value"], *([name, str(v)] for name, v in known.items() if v is not None)]


def method_table(study: Study) -> list[Cells]:
    """A line a method: the end of training on held-out rows, mean over seeds."""
    lines = [
        [
            "method",
            "seeds",
            "held-out loss",
            "reward accuracy",
            "log pi(chosen), change",
            "KL(policy ‖ SFT)",
        ]
    ]
    for label in study.labels():
        runs = study.of(label)
        lines.append(
            [
                label,
                str(len(runs)),
                _last(run.loss for run in runs),
                _last(run.accuracy for run in runs),
                _last(run.chosen_change for run in runs),
                "0" if label == SFT else _last(run.kl for run in runs),
            ]
        )
    best = study.best_of
    if best is not None:
        bound = f"at most {best.kl_bound:.3f} (log n - (n - 1)/n)"
        lines.append([best.label, str(len(best.costs)), "", "", "", bound])
    return lines


def cost_table(study: Study) -> list[Cells]:
    """What a run of each method takes; lines in the order of `method_table`."""
    lines = [
        [
            "method",
            "seconds",
            "of them reward model",
            "peak memory (MB)",
            "models in memory",
            "gradient steps",
            "responses drawn",
            "responses an answer",
            "settings",
        ]
    ]
    for label in study.labels():
        runs = study.of(label)
        costs = [run.cost for run in runs]
        lines.append([label, *_cost_cells(costs, runs[0].models, study.memory_is_known, answer=1)])
    best = study.best_of
    if best is not None:
        cells = _cost_cells(best.costs, best.models, study.memory_is_known, answer=best.n)
        lines.append([best.label, *cells])
    return lines


def _cost_cells(
    costs: Sequence[Cost], models: Sequence[str], memory: bool, *, answer: int
) -> Cells:
    of_model = [cost.reward_model_seconds for cost in costs]
    return [
        spread([cost.seconds + cost.reward_model_seconds for cost in costs], 0),
        spread(of_model, 0) if any(of_model) else "",
        spread([cost.peak_memory_bytes / 1e6 for cost in costs], 0) if memory else "",
        f"{len(models)}: {', '.join(models)}",
        f"{costs[0].steps:,}",
        f"{costs[0].responses:,}",
        str(answer),
        str(costs[0].keys),
    ]


def reward_model_table(models: Sequence[CellResult]) -> list[Cells]:
    """The reward models of PPO and best-of-n."""
    return [
        ["seeds", "held-out loss", "accuracy", "seconds", "gradient steps", "settings"],
        [
            str(len(models)),
            _last(model.loss for model in models),
            _last(model.accuracy for model in models),
            spread([model.cost.seconds for model in models], 0),
            f"{models[0].cost.steps:,}",
            str(models[0].cost.keys),
        ],
    ]


def _last(along: Iterable[Sequence[float]]) -> str:
    """Mean over seeds of what was measured last; empty where it does not apply."""
    ends = [values[-1] for values in along]
    return "" if any(math.isnan(value) for value in ends) else spread(ends, 3)


def win_table(study: Study) -> list[Cells]:
    """Win rates with their intervals, the responses that know nothing last."""
    head = ["response", "temperature", "n", "win rate", "95% interval", "ties"]
    return [
        head,
        *(
            [
                row.model,
                _number(row.temperature),
                str(row.n),
                "" if row.win_rate is None else f"{row.win_rate:.1%}",
                f"[{row.low:.1%}, {row.high:.1%}]",
                str(row.ties),
            ]
            for row in study.evaluation.table
        ),
    ]


def against_null_table(study: Study) -> list[Cells]:
    """Every method at every temperature against the strongest response that knows nothing."""
    return _test_table([test for test in study.evaluation.tests if test.family == "null"])


def against_dpo_table(study: Study) -> list[Cells]:
    """DPO at every setting of the grid against every other method."""
    tests = [test for test in study.evaluation.tests if test.family == "models"]
    return _test_table([t for t in tests if _is_dpo(t.model_a) != _is_dpo(t.model_b)])


def head_to_head_lines(rows: Sequence[HeadToHead]) -> list[Cells]:
    """Every judge's verdicts on the first against the second."""
    head = ["judge", "kind", "first", "second", "temperature", "n", "win rate of the first"]
    return [
        [*head, "95% interval", "ties", "sign test p"],
        *(
            [
                row.judge,
                row.family,
                row.a,
                row.b,
                _number(row.temperature),
                str(row.n),
                "" if row.win_rate is None else f"{row.win_rate:.1%}",
                f"[{row.low:.1%}, {row.high:.1%}]",
                str(row.ties),
                f"{row.sign_p_holm:.3f}",
            ]
            for row in rows
        ),
    ]


def _is_dpo(model: str) -> bool:
    return model.startswith(DPO)


def _test_table(tests: Sequence[PairedTest]) -> list[Cells]:
    head = ["first", "second", "temperature", "first minus second", "95% interval", "McNemar p"]
    return [
        head,
        *(
            [
                test.model_a,
                test.model_b,
                _number(test.temperature),
                "" if test.difference is None else f"{test.difference:+.1%}",
                f"[{test.low:+.1%}, {test.high:+.1%}]",
                f"{test.mcnemar_p_holm:.3f}",
            ]
            for test in tests
        ),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


# -- the page ------------------------------------------------------------------------------------


def side_by_side(scored: Sequence[ScoredGeneration]) -> list[dict[str, str]]:
    """For some prompts, every method's first response at the middle temperature."""
    models = [record for record in scored if record.kind == "model"]
    temperatures = sorted({r.temperature for r in models if r.temperature is not None})
    middle = temperatures[len(temperatures) // 2]
    found: dict[int, dict[str, str]] = {}
    for record in models:
        if record.temperature != middle or record.prompt_index >= NUM_SAMPLES:
            continue
        sample = found.setdefault(
            record.prompt_index,
            {
                "prompt": record.prompt,
                "chosen": record.chosen,
                "rejected": record.rejected,
                "temperature": f"{middle:g}",
            },
        )
        sample.setdefault(record.model, record.generated)
    return [found[index] for index in sorted(found)]


def page(study: Study, samples: Sequence[dict[str, str]]) -> str:
    """The study as Markdown: tables, figures, samples. Texts of models are code, never markup."""
    found = tables(study)
    parts = [
        f"# Study {study.folder.name}",
        "Held-out prompts only. Means over seeds with Student's 95% interval.",
        markdown(found["facts"]),
        markdown(found["methods"]),
        METHODS_NOTE,
        "![Held-out DPO loss and KL](figures/training.png)",
        "## Win rates",
        "A win: the response is nearer to the chosen than to the rejected response by "
        "Sentence-BERT cosine. The last rows are responses that know nothing: a win rate says "
        "something only where its interval is above theirs.",
        markdown(found["win rates"]),
        "![Win rate against temperature](figures/win_rate.png)",
        "Against the response that knows nothing and wins most, on the same prompts:",
        markdown(found["against the strongest null"]),
        "DPO against the others, on the same prompts:",
        markdown(found["dpo against the others"]),
        TESTS_NOTE,
        *power_lines(study.evaluation.tests),
        *_claims(found),
        *_head_to_head(found),
        "## Cost",
        markdown(found["cost"]),
        COST_NOTE,
        *_reward_model(found),
        "## Samples",
        *(_sample(sample) for sample in samples),
    ]
    return "\n\n".join(parts) + "\n"


METHODS_NOTE = """\
All start from the SFT model of their seed. A loss is each method's own (SFT's a token); PPO's is of
another kind and left out. Reward accuracy: how often DPO's implicit reward prefers the chosen
response; imitation, unlikelihood and PPO have no such reward. KL: nats a response at temperature 1,
the exact divergence of next-token distributions along the policy's own samples; of best-of-n only a
bound is known."""

TESTS_NOTE = """\
Differences of win rates, the prompt being the unit; p values of McNemar's exact test after Holm's
correction for all tests of their kind."""

CLAIMS_NOTE = """\
DPO against reward model and PPO together. A difference of win rates is called one when its interval
leaves out 0 and McNemar's p value is below 0.05 after Holm's correction for all comparisons of
methods. Strengths of two methods cannot be paired: every one of DPO's is compared."""

COST_NOTE = """\
Seconds in training, drawing of samples included and measuring left out, with the reward model's
where a method needs one. Responses drawn: in training; the pairs are given. Responses an answer:
in use. Settings: keys that the configurations name, apart from model, data, folder, seed and
measuring. Memory is told where every run has a process of its own (`processes`)."""


def _claims(found: Tables) -> list[str]:
    if len(found["claims"]) == 1:
        return []
    return ["## Simpler, faster, better?", markdown(found["claims"]), CLAIMS_NOTE]


def _head_to_head(found: Tables) -> list[str]:
    if "head to head" not in found:
        return []
    return [
        "## Head to head",
        "Which of two responses to the same prompt each judge prefers; `nulls` and `labels` are "
        "controls, which say something of the judge alone.",
        markdown(found["head to head"]),
        "![Win rates head to head](figures/head_to_head.png)",
    ]


def _reward_model(found: Tables) -> list[str]:
    if "reward model" not in found:
        return []
    return ["## The reward model", markdown(found["reward model"])]


def _sample(sample: dict[str, str]) -> str:
    """One prompt with its responses, indented as code so that nothing in them is markup, and with
    control characters written out: pages are read in terminals too.
    """
    lines: list[str] = []
    for name, text in sample.items():
        indented = "\n".join(f"    {visible(line)}" for line in text.splitlines() or [""])
        lines += [f"**{name}**", "", indented, ""]
    return "\n".join(lines)
