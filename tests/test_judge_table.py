"""`./run_all.sh judge-table`: the studies' rule on a table of other people's scores, and one clear line for a bad one."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib.run import cli

SIMPLE = "claims: [{id: C1, treatment: A, baseline: B, gain: 1.0}]\n"


def scores(difference=1.5, seeds=6, questions=20, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for s in range(seeds):
        for q in range(questions):
            rows += [
                {"method": m, "seed": s, "question": q, "score": 5 + d + rng.normal(0, 0.3)}
                for m, d in (("A", difference), ("B", 0))
            ]
    return pd.DataFrame(rows)


@pytest.fixture
def judge(tmp_path, capsys):
    def run(table, claims=SIMPLE, *more):
        (tmp_path / "claims.yaml").write_text(claims)
        if isinstance(table, str):
            (tmp_path / "scores.csv").write_text(table)
        else:
            table.to_csv(tmp_path / "scores.csv", index=False)
        files = ["--json", str(tmp_path / "out.json"), *more]
        code = cli.main(
            ["judge-table", str(tmp_path / "scores.csv"), "--claims", str(tmp_path / "claims.yaml"), *files]
        )
        said = capsys.readouterr()
        found = json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None
        return code, said.out, said.err, found

    return run


def test_a_gain_is_tested_at_two_thirds(judge, tmp_path):
    code, out, _, (verdict,) = judge(scores(), SIMPLE, "--figure", str(tmp_path / "claims.png"))
    assert code == 0
    assert out.startswith("C1 supported at table scale: A scored 1.4")
    assert "tested was at least 0.667, two thirds of the claimed 1" in out
    assert verdict["verdict"] == "supported"
    assert verdict["n_seeds"] == 6
    assert (tmp_path / "claims.png").read_bytes().startswith(b"\x89PNG")


def test_one_number_per_seed_is_a_paired_t_test(judge):
    table = scores(questions=1, seeds=7).drop(columns="question")
    _, _, _, (verdict,) = judge(table)
    a, b = (table[table["method"] == m]["score"].to_numpy() for m in "AB")
    assert verdict["interval95"] == pytest.approx(list(stats.ttest_1samp(a - b, 0).confidence_interval(0.95)))


def test_parity_non_inferiority_factors_and_looks(judge):
    table = pd.concat([scores(0.0, 9).assign(beta=0.1), scores(-3.0, 9, seed=1).assign(beta=0.5)])
    claims = """
looks: [5, 8]
claims:
  - {id: P, test: equivalence, margin: 0.5, treatment: {method: A, beta: 0.1}, baseline: {method: B, beta: 0.1}}
  - {id: N, test: non_inferiority, margin: 0.5, treatment: {method: A, beta: 0.5}, baseline: {method: B, beta: 0.5}}
"""
    code, _, _, (parity, inferior) = judge(table, claims)
    assert code == 0
    assert (parity["verdict"], inferior["verdict"]) == ("supported", "refuted")
    assert [look["seeds"] for look in parity["looks"]] == [5, 8]


def test_a_look_takes_the_first_seeds_whatever_the_order_of_the_rows(judge):
    table = scores(seeds=7)
    found = [judge(rows, f"looks: [5, 8]\n{SIMPLE}")[3] for rows in (table, table.sort_values("score"))]
    assert found[0] == found[1]
    assert [*found[0][0]["per_seed"]] == [str(seed) for seed in sorted(table["seed"].unique())[:5]]


BAD = {
    "a column of the rule's own": ("method,seed,status,score\nA,1,failed,3\n", SIMPLE, "a column status"),
    "no such column": ("method,seed\nA,1\n", SIMPLE, "no column score"),
    "text": ("method,seed,score\nA,1,3\nA,2,high\n", SIMPLE, "line 3: score 'high'"),
    "infinite": ("method,seed,score\nA,1,inf\n", SIMPLE, "line 2: score 'inf'"),
    "empty cell": ("method,seed,score\nA,1,\n", SIMPLE, "line 2: score ''"),
    "half a seed": ("method,seed,score\nA,1.5,2\n", SIMPLE, "line 2: seed '1.5'"),
    "two copies": ("method,seed,score\nA,1,3\nA,1,4\n", SIMPLE, "line 3: a second score of method A, seed 1"),
    "a seed less": ("method,seed,score\nA,1,3\nA,2,4\nB,1,4\n", SIMPLE, "B lacks seed 2"),
    "a question less": (
        "method,seed,question,score\nA,1,x,3\nA,1,y,3\nA,2,x,3\nA,2,y,3\nB,1,x,1\nB,1,y,1\nB,2,y,1\n",
        SIMPLE,
        "B, seed 2: fewer questions than other seeds",
    ),
    "one seed": ("method,seed,score\nA,1,3\nB,1,4\n", SIMPLE, "1 seeds"),
    "another method": ("method,seed,score\nA,1,3\nBB,1,4\n", SIMPLE, "C1: no rows of B"),
    "several betas": ("method,seed,beta,score\nA,1,1,3\nA,1,2,3\nB,1,1,4\n", SIMPLE, "C1: A has several beta"),
    "an empty file": ("", SIMPLE, "No columns"),
    "a wrong key": ("method,seed,score\nA,1,3\n", "claims: [{id: C1, treatment: A, baseline: B, gian: 1}]", "gain"),
    "no threshold": ("method,seed,score\nA,1,3\n", "claims: [{id: C1, treatment: A, baseline: B}]", "one of `gain`"),
}


@pytest.mark.parametrize(("table", "claims", "said"), BAD.values(), ids=BAD)
def test_a_bad_table_gets_one_clear_line_and_no_verdict(judge, table, claims, said):
    code, out, err, found = judge(table, claims)
    assert (code, out, found) == (2, "", None)
    assert said in err
    assert "expected:" in err


def test_a_table_that_is_not_there(judge, tmp_path, capsys):
    (tmp_path / "claims.yaml").write_text(SIMPLE)
    assert cli.main(["judge-table", str(tmp_path / "no.csv"), "--claims", str(tmp_path / "claims.yaml")]) == 2
    assert "no.csv" in capsys.readouterr().err
