"""From training to a verdict on the scores of MT-Bench: the real questions, and a judge on the loopback interface."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lib import record
from lib.td_dpo import judge as judging
from tests.conftest import PATIENCE, ROOT, TINY
from tests.judge_endpoint import Endpoint, completion, grade_of

BENCH = ROOT.parent / "shared" / "data" / "mt_bench"
BENCH = BENCH if BENCH.exists() else Path("/work/shared/data/mt_bench")
SEEDS = 5  # the first look's
# the command line, whatever room a disk has: stand-ins need none
LIB = """import sys
from lib.run import cli, preflight
preflight.NEEDED_GB = dict.fromkeys(preflight.NEEDED_GB, 0)
raise SystemExit(cli.main(sys.argv[1:]))"""


def run(place: Path, *arguments: str, **environ: str) -> str:
    reported = {k: v for k, v in os.environ.items() if k not in ("STUDY_POOL", "OPENAI_API_KEY", "OPENAI_BASE_URL")}
    done = subprocess.run(
        [sys.executable, "-c", LIB, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **reported,
            **environ,
            "STUDY_OUTPUTS": str(place / "outputs"),
            "STUDY_CACHE": str(place / "cache"),
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
@pytest.mark.skipif(not BENCH.is_dir(), reason=f"MT-Bench's files are not at {BENCH}")
def test_from_training_to_a_verdict_on_the_judges_scores(tmp_path):
    for name, loss in (
        ("dpo", {"name": "dpo", "beta": 0.05}),
        ("td_dpo", {"name": "td_dpo", "beta": 0.05, "tau": 1.0}),
    ):
        evaluation = TINY["evaluation"] | {"questions": 80}
        made = {
            **TINY,
            "run_id": name,
            "method": name,
            "role": "proposed" if name == "td_dpo" else "comparative",
            "loss": loss,
            "evaluation": evaluation,
            "seed_list": list(range(1, SEEDS + 1)),
        }
        path = tmp_path / "params" / "td_dpo" / "laptop" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(made))
    chosen = (
        "full",
        "--scale",
        "laptop",
        "--params",
        str(tmp_path / "params"),
        "--jobs",
        "2",
        "--set",
        "evaluation.judge=mt_bench",
        "--set",
        f"evaluation.mt_bench={BENCH}",
    )
    run(tmp_path, *chosen)
    (results,) = (tmp_path / "outputs").glob("laptop-full*/td_dpo")

    def claims() -> dict:
        return {claim["id"]: claim for claim in record.read_json(results / "comparison" / "claims.json")}

    assert claims()["C3"]["verdict"] == "not evaluated"
    assert "./run_all.sh judge --study td_dpo" in claims()["C3"]["reason"]

    def script(number, request):
        if number % 40 == 0:
            return 429, "{}", {"Retry-After": "0"}
        if number % 50 == 0:
            return 500, "oops"
        return 200, completion("no grade" if number % 60 == 0 else f"So so. [[{grade_of(request):g}]]")

    judge = Endpoint()
    judge.script = script
    try:
        reported = run(tmp_path, "judge", OPENAI_BASE_URL=judge.url, NO_PROXY="127.0.0.1")
    finally:
        judge.close()
    assert reported.index("to be sent") < reported.index("members graded:")
    means = {}
    for folder in sorted(results.glob("*/members/*/")):
        asked = judging.requests(folder, "gpt-4")
        assert len(asked) == 160
        given = {(row["question"], row["turn"]): grade_of(row) for row in asked}
        kept = {
            (row["question"], row["turn"]): row["score"]
            for row in record.read_jsonl(folder / "predictions.jsonl")
            if row["kind"] == "answer"
        }
        assert kept == given
        means.setdefault(folder.parents[1].name, []).append(sum(given.values()) / 160)
    verdict = claims()["C3"]
    assert verdict["verdict"] in ("supported", "refuted", "inconclusive")
    assert verdict["estimate"] == pytest.approx((sum(means["td_dpo"]) - sum(means["dpo"])) / SEEDS, abs=1e-9)
    assert (verdict["scored_by"], verdict["n_questions"]) == ("MT-Bench score, judge gpt-4", 80)
    assert [other["n_questions"] for other in verdict["beside"] if "wrong" in other["name"]] == [67]
    assert claims()["C4"]["verdict"] == "not evaluated", "the cells of another beta were not trained"
    plan = run(tmp_path, *("plan" if word == "full" else word for word in chosen))
    assert sum("cached: up to date" in line for line in plan.splitlines()) == 3, "the command has judged them already"
