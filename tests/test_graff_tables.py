"""GRAFF's order of rows, anytime points, GSM1k's gap, figures: on made records."""

import numpy as np
import pandas as pd
import pytest

from lib import config, tables
from lib.graff import data, report
from tests.conftest import ROOT


def test_every_epoch_is_a_permutation_with_rows_of_like_length_together():
    lengths = np.random.default_rng(0).integers(20, 200, 1003).tolist()
    sampler = data.BucketedOrder(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1003))
    assert first == list(data.BucketedOrder(lengths, 8, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first
    padded = lambda rows: sum(8 * max(lengths[i] for i in rows[s : s + 8]) for s in range(0, 1000, 8))  # noqa: E731
    assert padded(first) < 0.75 * padded(np.random.default_rng(0).permutation(1003).tolist())
    window = first[: 16 * 8]
    assert [np.mean([lengths[i] for i in window[s : s + 8]]) for s in range(0, 128, 8)] != sorted(
        np.mean([lengths[i] for i in window[s : s + 8]]) for s in range(0, 128, 8)
    ), "batches of a window are shuffled"


def test_a_shuffle_buffer_is_honoured_and_one_larger_than_the_data_is_a_full_shuffle():
    def rng():
        return np.random.default_rng(1)

    assert data.shuffle_buffered(50, 1, rng()) == list(range(50))
    some = data.shuffle_buffered(1000, 100, rng())
    assert sorted(some) == list(range(1000))
    assert max(row - place for place, row in enumerate(some)) <= 100  # no row comes earlier than the buffer reaches
    assert (
        data.shuffle_buffered(50, 10_000, rng())
        == data.shuffle_buffered(50, 50, rng())
        == rng().permutation(50).tolist()
    )


def evaluations(run_id: str, budget: float) -> list[dict]:
    return [
        {
            "run_id": run_id,
            "method": "graff",
            "cell": "c",
            "seed": seed,
            "used": share * budget,
            "joules": None,
            "exact_match_subset": share + seed / 100,
            "dev_loss": 1 - share,
        }
        for seed in (1, 2)
        for share in (0.0, 0.25, 0.49, 0.51, 1.0)
    ]


def test_the_point_at_half_a_long_budget_is_labelled_anytime_and_is_not_the_short_run():
    rows = pd.DataFrame(evaluations("graff_30", 1800) + evaluations("graff_60", 3600))
    found = report.anytime(rows, {"graff_30": 1800, "graff_60": 3600}).set_index("run_id")
    assert found.loc["graff_60", "label"] == "anytime: 30 of 60 minutes"
    assert found.loc["graff_30", "label"] == "anytime: 15 of 30 minutes"
    assert found.loc["graff_60", "exact_match_subset"] == pytest.approx(0.49 + 0.015)  # never what came later


def test_runs_of_sixty_minutes_are_neither_proposed_nor_a_baseline():
    found = sorted((ROOT / "params" / "graff" / "paper").glob("*_60.yaml"))
    assert found
    for path in found:
        run = config.load_run(path, study="graff", scale="paper", mode="full")
        assert (run.training.budget_minutes, run.role) == (60, "control"), path.name


def records(pairs: list[dict]) -> tables.Records:
    empty = pd.DataFrame()
    return tables.Records(empty, empty, empty, pd.DataFrame(pairs), empty)


def test_the_gap_to_gsm1k_has_an_interval_over_models_and_problems():
    rng = np.random.default_rng(0)
    pairs = [
        {
            "run_id": "graff",
            "cell": "c",
            "seed": seed,
            "kind": kind,
            "example": f"{kind}-{i}",
            "exact_match": float(rng.random() < chance),
        }
        for seed in (1, 2, 3)
        for kind, chance, n in (("example", 0.6, 400), ("gsm1k", 0.4, 300))
        for i in range(n)
    ]
    found = report.gsm1k(records(pairs)).iloc[0]
    assert found["low"] < 0.2 < found["high"]
    assert found["low"] > 0.05
    assert (found["models"], found["problems"]) == (3, 300)
    assert report.gsm1k(records([p for p in pairs if p["kind"] == "example"])).empty


def test_exact_match_has_a_panel_a_run_with_its_area():
    rows = pd.DataFrame(evaluations("graff", 60) + evaluations("fixed", 60))
    drawn = report.exact_match(rows, 60)
    assert [axes.get_title(loc="left") for axes in drawn.canvas.axes[:2]] == [
        "graff: 0.515",
        "fixed: 0.515",
    ]  # of x + 0.015
    assert [len(axes.lines) for axes in drawn.canvas.axes[:2]] == [2, 1]  # the fixed rate behind the others
    assert len(drawn.canvas.axes[0].collections) == 1


def test_loss_is_drawn_from_the_base_models_on_and_no_exact_match_lies_below_zero():
    rows = pd.DataFrame(evaluations("graff", 60) + evaluations("fixed", 60))
    drawn = report.loss(rows, 60)
    assert [line.get_ydata()[0] for line in drawn.canvas.axes[0].lines] == [1.0, 1.0]
    assert "graff from 1 to 0" in drawn.alt
    none = report.exact_match(rows.assign(exact_match_subset=0.0), 60)
    assert none.canvas.axes[0].get_ylim()[0] == 0


def test_energy_is_drawn_over_joules():
    rows = pd.DataFrame(evaluations("graff", 60)).assign(joules=lambda f: 2000 * f["used"] / 60)
    drawn = report.energy(rows, 0.9)
    assert drawn.canvas.axes[0].lines[0].get_xdata()[-1] == pytest.approx(2.0)
    assert "graff ends at" in drawn.alt


def test_where_nothing_has_finished_the_tables_are_empty_and_keep_their_columns():
    none = records([])
    steps, rows = report.steps(none), report.evaluations(none)
    assert steps.empty
    assert {"run_id", "cell", "eta", "log_m"} <= set(steps)
    assert {"run_id", "cell", "used", "exact_match_subset"} <= set(rows)
    assert list(report.gsm1k(none)) == ["run_id", "cell", "gap", "low", "high", "models", "problems"]
    assert report.anytime(rows, {}).empty
