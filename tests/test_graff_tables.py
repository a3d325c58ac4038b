"""GRAFF's order of rows, anytime points, GSM1k's gap, figures: on made records."""

import numpy as np
import pandas as pd
import pytest

from lib import config, record
from lib.graff import data
from lib.training import seeded_batches
from tests.conftest import ROOT
from tests.notebook import analyze, write_member


def test_every_epoch_is_a_permutation_with_rows_of_like_length_together():
    lengths = np.random.default_rng(0).integers(20, 200, 1003).tolist()
    sampler = data.BucketedOrder(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1003))
    assert first == list(data.BucketedOrder(lengths, 8, seed=3))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    padded = lambda rows: sum(8 * max(lengths[i] for i in rows[s : s + 8]) for s in range(0, 1000, 8))  # noqa: E731
    assert padded(first) < 0.75 * padded(np.random.default_rng(0).permutation(1003).tolist())
    window = first[: 16 * 8]
    assert [np.mean([lengths[i] for i in window[s : s + 8]]) for s in range(0, 128, 8)] != sorted(
        np.mean([lengths[i] for i in window[s : s + 8]]) for s in range(0, 128, 8)
    ), "batches of a window are shuffled"
    batches = seeded_batches(range(1003), 8, 3, lengths)
    both = [[*first[s : s + 8]] for s in range(0, 1003, 8)] + [[*second[s : s + 8]] for s in range(0, 1003, 8)]
    assert [next(batches) for _ in both] == both


def test_a_shuffle_buffer_is_honoured_and_one_larger_than_the_data_is_a_full_shuffle():
    def shuffled(size, buffer):
        return data.BucketedOrder([1] * size, 1, 0, buffer).shuffle(np.random.default_rng(1))

    assert shuffled(50, 1) == list(range(50))
    some = shuffled(1000, 100)
    assert sorted(some) == list(range(1000))
    assert max(row - place for place, row in enumerate(some)) <= 100  # no row comes earlier than the buffer reaches
    assert shuffled(50, 10_000) == shuffled(50, 50) == np.random.default_rng(1).permutation(50).tolist()


def test_runs_of_sixty_minutes_are_neither_proposed_nor_a_baseline():
    found = sorted((ROOT / "params" / "graff" / "paper").glob("*_60.yaml"))
    assert found
    for path in found:
        run = config.load_run(path, study="graff", scale="paper", mode="full")
        assert (run.training.budget_minutes, run.role) == (60, "control"), path.name


# ---- the analysis on made records


def planned_runs(*names):
    """The runs with three seeds in every cell, without pilots."""
    folder = ROOT / "params" / "graff" / "laptop"
    found = [config.load_run(folder / f"{n}.yaml", study="graff", scale="laptop", mode="full") for n in names]
    without = [[{**block, "pilot": False} for block in config.dump(run)["grid"]] for run in found]
    return [config.apply(r, {"seed_list": [42, 43, 44], "grid": grid}) for r, grid in zip(found, without, strict=True)]


def write_run(results, run, ends, extra=(), loss=lambda member: 1.0):
    """Members whose exact match rises evenly to `ends`, of 20 dev and 40 test problems, at a joule a second."""
    budget = 60 * run.training.budget_minutes
    for member in config.members(run):
        history = []
        for step, share in enumerate((0.0, 0.25, 0.49, 0.51, 1.0), 1):
            match = {"exact_match_subset": ends * share, "dev_loss": 1 - share / 2}
            history.append({"step": 0, "used": share * budget, "joules": share * budget, **match})
            blocks = {"log_m": [-0.1, 0.1], "a": 0.5, "gain": 1.0, "lambda": 2.0}
            taken = {"step": step, "loss": 2 - share, "used": share * budget, "fraction": share, "eta": 0.001 + share}
            history.append(taken | blocks)
        rows = [
            {"kind": "example", "example": i, "exact_match": i < 40 * ends, "test_loss": 2 - ends} for i in range(40)
        ]
        metrics = {"exact_match": ends, "dev_loss": loss(member), "test_loss": 2 - ends, "energy": budget}
        write_member(results, member, metrics | {"energy_source": "nvml"}, rows=[*rows, *extra], history=history)


def test_the_figures_and_tables_say_their_numbers(tmp_path):
    planned = planned_runs("graff", "fixed", "graff_cold")
    extra = [{"kind": "gsm1k", "example": i, "exact_match": i < 6} for i in range(30)]
    for run, ends in zip(planned, (0.8, 0.4, 0.6), strict=True):
        write_run(tmp_path, run, ends, extra, loss=lambda m: 0.5 if "0.0003" in m.cell_name else 1.0)
    alt, names = analyze(tmp_path, planned)
    own = {"primary_metric", "seeds", "learning_curves"}  # which every study has
    assert set(alt) == {"rates", "rates_low", "exact_match", "dev_loss", "multipliers", "energy"} | own
    assert "graff from 2 at step 1 to " in alt["learning_curves"]
    for name in ("primary_metric", "seeds"):
        assert "proposed at run graff: mean 0.8 (seeds 0.8, 0.8, 0.8)" in alt[name]
    assert names["total"]["metrics"]["energy"] == dict.fromkeys(("graff", "fixed", "graff_cold"), 180.0)
    assert "graff (learning_rate0.03) ends at 0.8 with area 0.4" in alt["exact_match"]
    assert "graff from 1 to 0.5" in alt["dev_loss"]
    assert "Level: 0.2." in alt["energy"]  # half of what the fixed rate ends at
    assert "graff_cold" not in "".join(alt.values())  # an ablation has a table, and no place in the figures
    half = names["anytime"].loc["graff"]
    assert half["label"] == "anytime: 1.5 of 3 minutes"
    assert half["exact_match_subset"] == pytest.approx(0.49 * 0.8)  # never what came later
    assert set(names["best"].loc[names["best"]["run_id"] != "graff_cold", "learning_rate"]) == {0.0003}
    gap = pd.DataFrame(names["gaps"]).set_index("run").loc["graff"]
    assert (gap["gap"], gap["problems"]) == (pytest.approx(0.8 - 0.2), 30)
    assert gap["low"] < 0.6 < gap["high"]
    table = names["differences"](names["pairs"], "test_loss").set_index("run")
    assert list(table.index) == ["graff_cold"]
    assert table.loc["graff_cold", ["difference", "seeds"]].tolist() == [pytest.approx(0.2), 3]


def test_a_diverged_run_counts_as_it_does_in_the_claims_and_has_no_loss(tmp_path):
    (run,) = planned_runs("fixed")
    write_run(tmp_path, run, 0.4)
    member = config.members(run)[0]
    record.write_json(
        tmp_path / run.run_id / "members" / member.id / "done.json", {"run_id": run.run_id, "status": "diverged"}
    )
    _, names = analyze(tmp_path, [run])
    row = names["grid"].set_index("cell").loc[member.cell_name]
    assert row["diverged"] == 1
    assert row["exact_match"] == pytest.approx(0.8 / 3)
    assert np.isnan(row["dev_loss"])
    assert member.cell_name not in set(names["best"]["cell"])


def test_a_method_of_ones_own_comes_into_the_figures_by_its_role_and_other_budgets_have_their_own(tmp_path):
    graff, fixed = planned_runs("graff", "fixed")
    own = fixed.model_copy(update={"run_id": "mine", "method": "fixed_mine"})
    longer = fixed.model_copy(update={"run_id": "control-fixed_60", "role": "control"})
    longer = longer.model_copy(update={"training": longer.training.model_copy(update={"budget_minutes": 60})})
    for run in (graff, fixed, own, longer):
        write_run(tmp_path, run, 0.4)
    alt, names = analyze(tmp_path, [graff, fixed, own, longer])
    assert set(names["main"]) == {"graff", "fixed", "mine", "control-fixed_60"}
    assert {f"{name}_made_{length}" for name in ("exact_match", "seeds") for length in (3, 60)} <= set(alt)
    assert "mine" in alt["exact_match_made_3"]
    assert "control-fixed_60" not in alt["exact_match_made_3"]
    assert set(names["compared"]) == {"graff", "fixed", "mine"}


def test_the_analysis_of_nothing_runs_to_its_end(tmp_path):
    assert analyze(tmp_path, planned_runs("graff"))[0] == {}
    assert (tmp_path / "comparison" / "done.json").exists()
