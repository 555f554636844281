"""The short form of `make chaos`: a few kills, the same comparisons."""

from chaos.harness import PHASES, Chaos
from chaos.variants import VARIANTS

SHORT = ["sft, dropout, accumulating", "dpo, moving reference"]


def test_runs_killed_at_random_times_and_renames_end_as_if_nothing_had_been(tmp_path):
    chaos = Chaos(tmp_path, seed=0)
    for variant in SHORT:
        for by_time, most in ((True, 3), (False, 2)):
            kills = 0
            while kills < most:
                trial = chaos.trial(variant, by_time=by_time, most_kills=most - kills)
                assert not trial.differences, trial
                assert all(kill.phase in PHASES for kill in trial.kills)
                kills += len(trial.kills)
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_otherwise_is_told_by_what_differs(tmp_path, monkeypatch):
    """With dropout the run computes something else, and the harness must see it."""
    chaos = Chaos(tmp_path, seed=0)
    expected = chaos.undisturbed("dpo").outcome
    assert any("optimizer" in name for name in expected)
    monkeypatch.setitem(VARIANTS, "dpo", VARIANTS["dpo, dropout"])
    trial = chaos.trial("dpo", by_time=True, most_kills=0)
    assert "metrics" in trial.differences
    assert "model/model.safetensors" in trial.differences
