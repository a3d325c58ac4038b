"""Figures: what they write, that their words say their numbers, and that no member is hidden."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lib import plots as figures, tables
from lib.claims import Verdict, load
from lib.plots import PALETTE, Drawing, Look, looks, number, outcomes
from lib.td_dpo import report as study
from tests.conftest import ROOT

FIXED = {0.01: 0.5, 0.05: 1.0, 0.5: 1.0, 2.5: 2.0}
LEVEL = {"dpo": {0.01: 2.5, 0.05: 6.1, 0.5: 7.9, 2.5: 7.6}, "discopop": {0.01: 1.9, 0.05: 3.5, 0.5: 7.6, 2.5: 7.0}}
TD = {0.5: (5.7, 6.6, 6.8, 6.6), 1.0: (6.6, 6.8, 6.8, 6.6), 2.0: (7.1, 7.0, 6.7, 6.5)}


def make_members() -> pd.DataFrame:
    """The laptop study's members: 12 claim cells with 3 seeds, the others with one. dpo at .01 has a diverged seed, one
    td_dpo cell is missing."""
    draw, rows = np.random.default_rng(0), []

    def add(method, beta, tau, seed, level, status="completed"):
        cell = f"beta{beta:g}" + (f"-tau{tau:g}" if tau is not None else "")
        done = status == "completed"
        rows.append(
            {
                "run_id": method,
                "method": method,
                "role": "proposed" if method == "td_dpo" else "comparative",
                "cell": cell,
                "beta": beta,
                "tau": tau,
                "seed": seed,
                "status": status,
                "oracle_score": level + draw.normal(0, 0.25) if done else None,
                "validation_implicit_accuracy": float(np.clip(0.5 + level / 25 + draw.normal(0, 0.01), 0, 1))
                if done
                else None,
                "implicit_accuracy": float(np.clip(0.5 + level / 25 + draw.normal(0, 0.01), 0, 1)) if done else None,
                "sampled_kl": float(np.exp(draw.normal(0, 0.15)) * 4 / (0.05 + beta)) if done else None,
                "answer_length": 24 + 6 / (0.2 + beta) + draw.normal(0, 1.5) if done else None,
            }
        )

    for j, beta in enumerate(FIXED):
        for seed in (42, 43, 44):
            for method in LEVEL:
                status = "diverged" if (method, beta, seed) == ("dpo", 0.01, 44) else "completed"
                add(method, beta, None, seed, LEVEL[method][beta], status)
            add("td_dpo", beta, FIXED[beta], seed, TD[FIXED[beta]][j])
        for tau in TD:
            if tau != FIXED[beta] and (beta, tau) != (2.5, 0.5):
                add("td_dpo", beta, tau, 42, TD[tau][j])
    add("td_dpo_anchored", 0.01, 0.5, 42, 6.2)
    add("discopop_card", 2.5, None, 42, 1.0, "diverged")
    return pd.DataFrame(rows)


def make_history(members: pd.DataFrame, steps: int = 120) -> pd.DataFrame:
    """Step rows and evaluation rows of every member, as the record keeps them; a diverged member stops at step 40."""
    draw, parts = np.random.default_rng(1), []
    for member in members.to_dict("records"):
        last = 40 if member["status"] == "diverged" else steps
        step = np.arange(1, last + 1)
        reach = (1 - np.exp(-step / 30)) * min(60, 1.5 / member["beta"])
        own = {k: member[k] for k in ("run_id", "method", "cell", "beta", "tau", "seed")}
        parts.append(
            pd.DataFrame(
                {
                    **own,
                    "step": step,
                    "loss": 0.7 - 0.3 * (1 - np.exp(-step / 25)) + draw.normal(0, 0.04, last),
                    "chosen_log_ratio": -0.4 * reach + draw.normal(0, 0.3, last),
                    "rejected_log_ratio": -1.1 * reach + draw.normal(0, 0.3, last),
                }
            )
        )
        at = np.array([s for s in (40, 80, 120) if s <= last])
        accuracy = 0.5 + 0.25 * (1 - np.exp(-at / 40)) + draw.normal(0, 0.01, len(at))
        parts.append(pd.DataFrame({**own, "step": at, "validation_implicit_accuracy": accuracy}))
    return pd.concat(parts, ignore_index=True)


MEMBERS = make_members()
HISTORY = make_history(MEMBERS)
ARMS = study.claim_arms(MEMBERS, FIXED)
CLAIMS = [
    {
        "id": "C1",
        "verdict": "refuted",
        "test": "non_inferiority",
        "tested": 0.3,
        "estimate": -1.93,
        "interval95": [-2.41, -1.42],
        "looks": [
            {"seeds": 5, "estimate": -2.0, "low": -2.9, "high": -1.1},
            {"seeds": 8, "estimate": -1.93, "low": -2.41, "high": -1.42},
        ],
    },
    {
        "id": "C3",
        "verdict": "inconclusive",
        "test": "equivalence",
        "tested": 0.1,
        "estimate": 0.05,
        "interval95": [-0.4, 0.5],
        "looks": [{"seeds": 5, "estimate": 0.05, "low": -0.4, "high": 0.5}],
    },
    {
        "id": "C5",
        "verdict": "not evaluated",
        "test": "cost_ratio",
        "tested": 0.02,
        "estimate": None,
        "interval95": None,
        "looks": [],
    },
]


def seed_marks(drawing) -> list:
    """The drawn marks of single members: lines of one point with a marker."""
    lines = drawing.canvas.axes[0].lines
    return [line for line in lines if line.get_marker() not in ("None", "", None) and len(line.get_xdata()) == 1]


LOOKS = {"dpo": Look("DPO", PALETTE[0], "o"), "td_dpo": Look("TD-DPO", PALETTE[2], "D")}
OVER_BETA = {"x": "beta", "by": "method", "known": LOOKS}


def drawings() -> dict:
    curves = study.claim_arms(HISTORY, FIXED)
    over, reference = {**OVER_BETA, "diverged_value": 1.0}, (6.55, "reference")
    return {
        "accuracy": figures.learning_curves(
            curves, "validation_implicit_accuracy", title="Accuracy", by="method", panel="beta", known=LOOKS
        ),
        "box": figures.bars(ARMS, "oracle_score", boxes=True, title="Box", **over),
        "bars": figures.bars(ARMS, "oracle_score", title="Bars", limits=(1, 10), reference=reference, **over),
        "claims": figures.claims(CLAIMS),
    }


@pytest.fixture(scope="module")
def drawn() -> dict:
    return drawings()


def test_every_figure_leaves_pdf_png_csv_and_words(drawn, tmp_path):
    for name, drawing in drawn.items():
        figure = figures.save(drawing, tmp_path, f"comparison_{name}")
        assert sorted(p.name for p in tmp_path.glob(f"comparison_{name}.*")) == [
            f"comparison_{name}.{kind}" for kind in ("alt.txt", "csv", "links.json", "pdf", "png")
        ]
        assert (tmp_path / f"comparison_{name}.pdf").read_bytes().startswith(b"%PDF")
        assert Image.open(tmp_path / f"comparison_{name}.png").width == 1280
        assert (tmp_path / f"comparison_{name}.alt.txt").read_text().strip() == figure.alt == drawing.alt
        assert len(pd.read_csv(tmp_path / f"comparison_{name}.csv")) == len(drawing.data) > 0
    assert not list(tmp_path.glob(".*"))


def test_what_is_alone_in_its_category_stands_over_its_name():
    rows = [{"run_id": run, "role": role, "cell": "c", "seed": seed, "status": "completed", "score": seed + 0.5}
            for run, role in (("a", "control"), ("b", "proposed"), ("c", "control")) for seed in (1, 2, 3)]  # fmt: skip
    axes = figures.bars(pd.DataFrame(rows), "score", boxes=True, title="t", x="run_id", by="role").canvas.axes[0]
    level = [line for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) > 1]
    middles = sorted({round(float(np.mean(line.get_xdata())), 6) for line in level})  # of medians and caps
    assert middles == sorted(axes.get_xticks()) == [0, 1, 2]


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in "ab":
        figures.save(figures.claims(CLAIMS), tmp_path / name, "comparison_claims")
        figures.save(figures.bars(ARMS, "oracle_score", title="Bars", **OVER_BETA), tmp_path / name, "comparison_bars")
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(written) == 10
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_figure_shows_itself_with_its_words_escaped():
    words = 'a <b>"bold"</b> & <script>alert(1)</script> claim'
    page = Drawing(Figure(), "t", words, pd.DataFrame({"a": [1]}))._repr_html_()
    assert 'alt="a &lt;b&gt;&quot;bold&quot;&lt;/b&gt; &amp; &lt;script&gt;' in page
    assert 'src="data:image/png;base64,' in page


def test_points_lead_to_their_members_on_the_pages_of_their_runs(tmp_path):
    members = ARMS.assign(folder=[str(tmp_path / r / "members" / f"{c}-s{s}") for r, c, s in
                                  zip(ARMS["run_id"], ARMS["cell"], ARMS["seed"], strict=True)])  # fmt: skip
    drawing = figures.bars(members, "oracle_score", boxes=True, title="Box", diverged_value=1.0, **OVER_BETA)
    links = figures.save(drawing, tmp_path / "comparison" / "figures", "comparison_box").links
    assert len(links) == 36
    assert links[0]["href"] == "../dpo/run.html#beta0.01-s42"
    assert 'href="../td_dpo/run.html#beta2.5-tau2-s44"' in drawing._repr_html_()
    assert sum(link["words"].endswith("diverged") for link in links) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    figures.save(figures.claims(CLAIMS), tmp_path, "comparison_claims")
    before = (tmp_path / "comparison_claims.pdf").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        figures.save(figures.claims(CLAIMS[:1]), tmp_path, "comparison_claims")
    assert (tmp_path / "comparison_claims.pdf").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_every_seed_is_a_point_and_a_diverged_one_a_cross(drawn):
    for name in ("box", "bars"):
        marks = seed_marks(drawn[name])
        assert len(marks) == len(ARMS) == 36
        assert sum(mark.get_marker() == "x" for mark in marks) == 1
    dpo = ARMS[(ARMS["method"] == "dpo") & (ARMS["beta"] == 0.01) & (ARMS["status"] == "completed")]["oracle_score"]
    assert {float(m.get_ydata()[0]) for m in seed_marks(drawn["bars"])} >= set(dpo)


def test_words_hold_the_numbers(drawn):
    cell = ARMS[(ARMS["method"] == "discopop") & (ARMS["beta"] == 0.5)]["oracle_score"].astype(float)
    for name in ("box", "bars"):
        assert f"mean {number(cell.mean())} (seeds {', '.join(number(v) for v in cell)})" in drawn[name].alt
        assert "1 of 3 diverged" in drawn[name].alt
    dpo = ARMS[(ARMS["method"] == "dpo") & (ARMS["beta"] == 0.01)]
    assert f"beta 0.01: mean {number(outcomes(dpo, 'oracle_score', 1.0)['value'].mean())}" in drawn["bars"].alt
    assert "reference: 6.55." in drawn["bars"].alt
    assert "1 of 3 seeds end early, the first at 40" in drawn["accuracy"].alt
    assert "C1: refuted, estimate −1.93, 95 % interval −2.41 to −1.42, tested −0.3." in drawn["claims"].alt
    assert "tested −0.1, 0.1" in drawn["claims"].alt
    assert "C5: not evaluated, no estimate" in drawn["claims"].alt
    axes = drawn["claims"].canvas.axes
    assert [[text.get_text() for text in place.texts] for place in axes] == [["5 seeds", "8 seeds"], ["5 seeds"], []]


def test_the_mean_of_a_curve_ends_where_the_first_seed_ends(drawn):
    own = HISTORY[(HISTORY["method"] == "dpo") & (HISTORY["beta"] == 0.01)]
    drawing = figures.learning_curves(own, "loss", title="Loss", by="method", known=LOOKS)
    mean = next(line for line in drawing.canvas.axes[0].lines if line.get_label() == "DPO")
    at_40 = own[own["step"] == 40]["loss"].mean()
    assert mean.get_xdata()[-1] == 40
    assert mean.get_ydata()[-1] == pytest.approx(at_40)
    assert f"to {number(at_40)} at 40" in drawing.alt


def test_no_mean_over_cells_by_accident():
    with pytest.raises(ValueError, match="choose one cell"):
        figures.learning_curves(HISTORY[HISTORY["beta"] == 0.01], "loss", title="Loss", by="method")


def test_empty_tables_draw_without_error(tmp_path):
    empty = figures.learning_curves(HISTORY, "sampled_kl", title="KL", by="method", panel="beta")
    assert len(figures.save(empty, tmp_path, "comparison_kl").data) == 0
    lost = ARMS.assign(oracle_score=None)
    assert "no value" in figures.bars(lost, "oracle_score", title="Bars", limits=(1, 10), **OVER_BETA).alt
    nothing = pd.DataFrame()  # what lib.record gives where no member has finished
    for drawing in (
        figures.bars(nothing, "oracle_score", title="t", **OVER_BETA),
        figures.bars(nothing, "oracle_score", boxes=True, title="t", **OVER_BETA),
        figures.learning_curves(nothing, "loss", title="t", by="method"),
        figures.learning_curves(nothing, "loss", title="t", by="method", panel="beta"),
        figures.claims([]),
    ):
        figures.save(drawing, tmp_path, "comparison_nothing")


def test_claim_cells_take_the_tau_fixed_in_advance():
    taus = ARMS[ARMS["method"] == "td_dpo"].groupby("beta")["tau"].unique()
    assert {beta: list(tau) for beta, tau in taus.items()} == {beta: [tau] for beta, tau in FIXED.items()}


def test_looks_are_the_studys_own_and_never_shared():
    look = looks(["dpo", "new", "td_dpo", "other"], LOOKS)
    assert look["dpo"] == LOOKS["dpo"]
    assert len({own.color for own in look.values()}) == 4


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_text_in_every_series_color_is_readable_on_white():
    assert all(1.05 / (luminance(color) + 0.05) >= 4.5 for color in PALETTE)


def test_discopop_slopes_up_between_its_minimum_and_its_barrier():
    pytest.importorskip("torch")
    x = np.linspace(-0.6, 0.6, 1201)
    rising = x[study.loss_curve("discopop", x, beta=1.0)[1] > 0]
    assert rising[[0, -1]] == pytest.approx([-0.119, 0.072], abs=2e-3)
    loss, slope = study.loss_curve("dpo", x, beta=0.5)
    assert loss[600] == pytest.approx(np.log(2))
    assert slope[600] == pytest.approx(-0.25)
    assert study.loss_curve("td_dpo", x, beta=9.0, tau=2.0)[0] == pytest.approx(loss), "without the anchor"


def _chosen() -> dict:
    means = MEMBERS.groupby(["run_id", "cell"])["validation_implicit_accuracy"].mean().fillna(0.5)
    return {run_id: group.idxmax()[1] for run_id, group in means.groupby(level=0)}


def metrics_table(group: str) -> tables.Table:
    chosen = _chosen()
    roles = MEMBERS.drop_duplicates("run_id")
    planned = [
        SimpleNamespace(run_id=run_id, role=role, study="td_dpo")
        for run_id, role in zip(roles.run_id, roles.role, strict=True)
    ]
    total = {"groups": {group: {"runs": list(chosen)}}, "metrics": {"oracle_score": {}, "sampled_kl": {}}}
    return tables.metrics_table(
        MEMBERS, planned, total | {"members": {i: {"cell": cell} for i, cell in chosen.items()}}, group
    )


def test_metrics_table_takes_the_chosen_cells():
    table, chosen = metrics_table("llama").frame.set_index("run"), _chosen()
    means = {
        run: MEMBERS[(MEMBERS["run_id"] == run) & (MEMBERS["cell"] == chosen[run])]["sampled_kl"].mean()
        for run in ("dpo", "td_dpo")
    }
    assert table.loc["td_dpo", "sampled kl"].startswith(number(means["td_dpo"], 4))
    gain = 100 * (means["dpo"] - means["td_dpo"]) / means["dpo"]
    assert table.loc["td_dpo", "sampled kl vs dpo"] == f"{gain:+.1f} %".replace("-", "−"), "less is better"
    assert table.loc["dpo", "sampled kl vs dpo"] == "–"
    assert not [name for name in table if "accuracy" in name or name.endswith("vs td_dpo")], "in no record; no baseline"


def test_tables_have_a_caption_and_escaped_text():
    page = metrics_table("models <by> data")._repr_html_()
    assert "<caption>models &lt;by&gt; data, every run at its chosen cell" in page
    assert "1 diverged" in page
    html = tables.Table(pd.DataFrame({"text": ["<script>alert(1)</script>"], "value": [np.nan]}), "c")._repr_html_()
    assert "<script" not in html
    assert "<td>–</td>" in html


def test_no_heavy_import():
    import subprocess
    import sys

    code = (
        "import sys, lib.plots, lib.run.pages, lib.td_dpo.report\n"
        "print({'torch', 'transformers', 'trl', 'nbconvert'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_figures_are_named_after_their_run_or_the_comparison():
    for path in [*(ROOT / "notebooks").glob("*/*.ipynb"), ROOT / "notebooks" / "sweep.ipynb"]:
        source = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        start = '"comparison_' if path.name == "analysis.ipynb" else '"{run.run_id}_'
        for call in source.split("plots.save(")[1:]:
            folder, _, name = call.partition('folder / "figures",')
            assert len(folder) < 700, f"{path}: a figure somewhere else"
            assert name.lstrip().removeprefix("f").startswith(start), f"{path}: {name[:60]}"


def test_no_interval_is_drawn_or_said_beyond_what_the_metric_can_be():
    """Two seeds near the top: Student's interval reaches far beyond 10."""
    two = pd.DataFrame({"method": "dpo", "beta": 0.1, "seed": [1, 2], "status": "completed", "score": [9.0, 9.9]})
    assert figures.t_interval(two["score"])[1] > 15
    drawing = figures.bars(two, "score", title="Bars", limits=(1, 10), **OVER_BETA)
    place = drawing.canvas.axes[0]
    assert max(line.get_ydata().max() for line in place.lines) <= 10
    assert drawing.alt.endswith("95 % interval 3.73 to 10.")
    assert place.get_ylim()[0] == 1
    assert place.get_ylim()[1] > 9.9, "every point lies on the axes"


@pytest.mark.parametrize("study", ["td_dpo", "iw_lora", "graff"])
def test_what_a_claim_estimates_is_written_within_the_figure(study):
    drawn = figures.claims(
        [vars(Verdict(claim, "laptop")) for claim in load(ROOT / f"params/{study}/claims.yaml").claims]
    )
    drawn.canvas.canvas.draw()
    for axes in drawn.canvas.axes:
        words = axes.xaxis.label.get_window_extent()
        assert words.x0 >= 0
        assert words.x1 <= drawn.canvas.bbox.width
