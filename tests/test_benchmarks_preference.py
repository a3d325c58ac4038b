"""The benchmark of a preference step runs, at its smallest, and its arms train alike; its timings are for the
README."""

import re

import pytest

from benchmarks import grid, preference_step, size

SMALLEST = ["--shape", "tiny", "--longest", "48", "--batch", "2", "--micro", "2", "--rounds", "1", "--threads", "1"]


@pytest.mark.parametrize(
    ("options", "arms"),
    [([], ["naive", "trl", "trl_completions"]), (["--nf4", "--lora", "4", "--arms", "naive", "ours"], ["naive"])],
)
def test_every_arm_takes_the_same_steps(capsys, options, arms):
    preference_step.main([*SMALLEST, *options])
    said = capsys.readouterr().out
    assert "matmul peak" in said
    for arm in [*arms, "ours"]:
        rows = [line for line in said.splitlines() if line.startswith(f"| {preference_step.NAMES[arm]} |")]
        assert len(rows) == 2, "one of speed and memory, one of parts"
        assert float(rows[0].split("|")[-2]) < (1e-2 if options else 1e-5), "the loss at the worst step"
        shares = [int(share) for share in re.findall(r"(-?\d+)%", rows[1])]
        assert sum(shares) == pytest.approx(100, abs=3)
        assert all(share >= -1 for share in shares), rows[1]


@pytest.mark.parametrize("options", [["--micro", "3"], ["--arms", "trl"], ["--rounds", "0"]])
def test_options_that_cannot_be_measured_are_refused(options, capsys):
    with pytest.raises(SystemExit) as refused:
        preference_step.main([*SMALLEST, *options])
    assert refused.value.code == 2
    assert "error" in capsys.readouterr().err


def test_useful_products_count_each_prompt_once_and_the_head_at_answers_only():
    shape = {"vocab_size": 10, "hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1}
    row = {"prompt_ids": [0] * 5, "chosen_ids": [0] * 2, "rejected_ids": [0]}
    tokens, answers, layer = 4 + 3, 3, 4 * 2 * 2 + 3 * 2 * 3
    assert preference_step.useful_flops(shape, [row], 0) == 6 * (tokens * layer + answers * 10 * 2)


def test_cost_against_size_is_a_table_and_a_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(size, "MIDDLE", {"batch": 1, "longest": 48, "vocabulary": 384, "layers": 1})
    monkeypatch.setattr(size, "AXES", {"layers": [1, 2]})
    size.main(["--rounds", "1", "--plot", str(tmp_path / "size.png")])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["1", "2", "slope"]
    assert all(float(cell) > 0 for row in rows[:2] for cell in row[2:4])
    assert (tmp_path / "size.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_grid_of_six_cells_is_run_both_ways(capsys):
    grid.main(["--smallest", "--jobs", "2", "--threads", "1"])
    said = capsys.readouterr().out
    assert "| 6 cells | seconds | per cell |" in said
    assert "(measured)" in said
    assert float(said.split("first recorded step: ")[1].split(" s.")[0]) > 0
