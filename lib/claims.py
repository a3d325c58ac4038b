"""The verdict on each published claim of a study.

A claim is supported only if three things hold: the rule of its own test on the crossed seed x question bootstrap
interval (primary), the companion t test over seeds on the same side at 5 %, one-sided, and a Holm-adjusted p below .05
over the claims evaluated together. It is refuted if the rule and the companion say so. Where primary and companion
differ, or Holm does not hold, it is `inconclusive`. The p that enters Holm is the one-sided p of the claim's own
primary test.

A claim about scores is `vacuous` where no run that it compares is shown to be above chance (lib/verdict/chance.py),
where all of them diverged, or where scores vary less because they are worse (`guard`): its numbers are then told, and
decide nothing.

With three seeds the bootstrap alone rejects a true null in up to 12 % of experiments when seeds differ more than
questions do; the companion is what keeps that at 5 %, at the price of power (lib/verdict/power.py prints both).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd

from lib import statistics as st
from lib.verdict import chance
from lib.verdict.claim_types import BEST, Beside, Cell, Claim, Claims, load
from lib.verdict.comparison import Paired, choose, members_of, pair_up, select
from lib.verdict.measured import measure, measure_cost
from lib.verdict.verdicts import VERDICTS, Verdict, sentence, table, to_json

__all__ = ["VERDICTS", "Claim", "Claims", "Verdict", "coverage", "evaluate", "load", "sentence", "table", "to_json"]

DRAWS = 10_000
MIN_COST_PAIRS = 20
HOLM_LEVEL = 0.05
MISSING = "missing: "  # how the reason of a claim begins whose scores are not all there


class Data(NamedTuple):
    """The tables that every claim is evaluated on; see `evaluate`."""

    rows: pd.DataFrame
    accuracy: pd.DataFrame | None
    members: pd.DataFrame
    costs: pd.DataFrame
    seeds: tuple[int, ...]
    draws: int


def evaluate(
    study: Claims,
    rows: pd.DataFrame,
    *,
    scale: str,
    mode: str,
    members: pd.DataFrame | None = None,
    accuracy: pd.DataFrame | None = None,
    costs: pd.DataFrame | None = None,
    seeds: Iterable[int] = (),
    draws: int = DRAWS,
    scored_by: str = "",
    mend: str = "",
    absent: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """A verdict for every claim of `study`, in its order.

    rows: one row per method, cell key, seed and question with `score` and `status`; `accuracy` the same for the second
    metric. members: one row per run with `status` and validation metrics (read off `rows` where not given). costs:
    pairs
    `seconds`, `seconds_baseline` measured in turns. seeds: those that a claim's cells must have, beyond those they
    have. scored_by: what gave the scores, for the record. mend: said of a claim whose scores are missing (how to get
    them). absent: {metric: why it has no values}, the reason of the claims about it.
    """
    if members is None:
        members = members_of(rows, study.keys)
    data = Data(rows, accuracy, members, pd.DataFrame() if costs is None else costs, tuple(seeds), draws)
    verdicts = [_evaluate_one(study, claim, data, scale, mode, absent or {}) for claim in study.claims]
    for verdict in verdicts:
        if verdict.test != "cost_ratio":
            verdict.scored_by = scored_by
            verdict.reason += f". {mend}" if mend and verdict.reason.startswith(MISSING) else ""
    family = [v for v in verdicts if v.p is not None]
    for verdict, adjusted in zip(family, st.holm([v.p for v in family]) if family else (), strict=True):
        verdict.holm_p = float(adjusted)
        if verdict.verdict == "supported" and adjusted >= HOLM_LEVEL:
            verdict.verdict = "inconclusive"
            verdict.reason += f" It does not stand among {len(family)} claims tested together (Holm p {adjusted:.2g})."
    return verdicts


def coverage(study: Claims, members: pd.DataFrame) -> pd.DataFrame:
    """Which runs each claim's cells have: one row per claim and cell, with the seeds of every status."""
    out = []
    for claim in study.claims:
        for side in ("treatment", "baseline"):
            for cell in study.levels(claim, side) if getattr(claim, side) else ():
                found = select(
                    members, {key: value for key, value in cell.items() if value != BEST}
                )  # any of them may be it
                by_status = {status: sorted(group["seed"].astype(int)) for status, group in found.groupby("status")}
                done = len(by_status.get("completed", [])) + len(by_status.get("diverged", []))
                out.append(
                    {
                        "claim": claim.id,
                        "side": side,
                        "cell": study.label(cell),
                        "runs": len(found),
                        "finished": done,
                        **{
                            status: ", ".join(map(str, sorted(set(by_status.get(status, [])))))
                            for status in ("completed", "diverged", "failed", "out_of_memory", "lost", "missing")
                        },
                    }
                )
    return pd.DataFrame(out)


def _evaluate_one(study: Claims, claim: Claim, data: Data, scale: str, mode: str, absent: Mapping[str, str]) -> Verdict:
    verdict = Verdict(
        claim.id,
        claim.sentence,
        claim.test,
        claim.metric,
        scale,
        "not evaluated",
        "",
        claim.estimand,
        claim.margin,
        claim.claimed,
        note=claim.note,
    )
    if mode == "trial":
        verdict.reason = "a trial shows that the study runs, not what it finds"
    elif claim.not_evaluated:
        verdict.reason = claim.not_evaluated
    elif claim.test == "absolute" and scale == "laptop":
        verdict.reason = "a figure of a named model says nothing about the models made at laptop scale"
    elif scale not in claim.scales:
        verdict.reason = f"this claim is about {' and '.join(claim.scales)} scale"
    elif claim.metric in absent:
        verdict.reason = absent[claim.metric]
    elif claim.test == "cost_ratio":
        _judge_cost(study, claim, data, verdict)
    else:
        _judge_scores(study, claim, data, verdict)
    return verdict


# ---- claims about scores


def _rows(data: Data, metric: str) -> pd.DataFrame:
    return data.rows if metric in data.rows or data.accuracy is None else data.accuracy


def _pairs(study: Claims, claim: Claim, data: Data, cells: list[Cell], *, all_seeds: bool) -> Paired | list[str]:
    return pair_up(
        study,
        _rows(data, claim.metric),
        data.members,
        cells,
        claim.metric,
        seeds=data.seeds if all_seeds else (),
        all_seeds=all_seeds,
    )


def _judge_scores(study: Claims, claim: Claim, data: Data, verdict: Verdict) -> None:
    treatment = study.levels(claim, "treatment")
    baseline = study.levels(claim, "baseline") if claim.baseline else []
    chosen = [choose(study, cell, data.members) for cell in [*treatment, *baseline]]
    pairs = (
        ["a run with " + str(study.choose_on)] if None in chosen else _pairs(study, claim, data, chosen, all_seeds=True)
    )
    if not isinstance(pairs, Paired):
        verdict.reason = MISSING + "; ".join(pairs)
        return
    if len(pairs.seeds) < 2:
        verdict.reason = "one seed tells nothing about seeds: at least 2 are needed"
        return
    n = len(treatment)
    names = study.label(chosen[0] if n == 1 else claim.treatment), _baseline_name(study, claim, chosen[n:])
    _set(verdict, measure(claim, pairs, n, names, data.draws))
    verdict.n_seeds, verdict.n_questions, verdict.n_dropped = len(pairs.seeds), pairs.values.shape[2], pairs.dropped
    lost = sorted({seed for seeds in pairs.diverged[:n] for seed in seeds})
    lost_baseline = sorted({seed for seeds in pairs.diverged[n:] for seed in seeds})
    if claim.no_divergence and lost and verdict.verdict == "supported":
        verdict.verdict = "inconclusive"
        verdict.reason += f" But {names[0]} diverged (seed {', '.join(map(str, lost))})."
    elif lost:
        verdict.reason += f" {names[0]} diverged (seed {', '.join(map(str, lost))})."
    if verdict.verdict == "supported" and all(len(seeds) == len(pairs.seeds) for seeds in pairs.diverged[:n]):
        verdict.verdict = "inconclusive"  # what stands for its scores is ours, not measured
    if baseline and all(len(seeds) == len(pairs.seeds) for seeds in pairs.diverged):
        verdict.verdict, verdict.reason = "vacuous", f"every run of {names[0]} and of {names[1]} diverged"
    if (
        baseline and verdict.verdict != "vacuous"
    ):  # a figure of its own (absolute) is missed by a model that learnt nothing
        _ask_for_chance(study, data, chosen, n, names, verdict)
    if claim.premise:
        verdict.premise = _premise(names[1], len(lost_baseline), len(pairs.seeds), float(pairs.values[n:].mean()))
    if pairs.dropped:
        verdict.note = f"{verdict.note} {pairs.dropped} question(s) without a score in some run were left out.".strip()
    verdict.beside = [_beside(study, claim, other, data) for other in claim.beside]
    if lost or lost_baseline:
        verdict.sensitivity = _completed_only(claim, pairs, n, names, data.draws)


def _at_chance(study: Claims, data: Data, cells: list[Cell], n: int, names: tuple[str, str]) -> str:
    return (
        chance.at_chance(study, _rows(data, study.chance.metric), data.members, cells, n, names) if study.chance else ""
    )


def _ask_for_chance(
    study: Claims, data: Data, cells: list[Cell], n: int, names: tuple[str, str], verdict: Verdict
) -> None:
    """`vacuous` where every run of the claim is at chance, whatever its numbers say."""
    try:
        said = _at_chance(study, data, cells, n, names)
    except chance.Unknown as missing:
        verdict.note = f"{verdict.note} Whether its runs are above chance is not known ({missing}).".strip()
        return
    if said:
        verdict.verdict, verdict.reason = "vacuous", f"{said}. By its numbers alone: {verdict.reason}"


def _baseline_name(study: Claims, claim: Claim, cells: list[Cell]) -> str:
    if claim.baseline is None:
        return "the reported figure"
    if claim.baseline_name:
        return claim.baseline_name
    return study.label(cells[0] if len(cells) == 1 else claim.baseline)


def _premise(name: str, diverged: int, runs: int, mean: float) -> dict:
    if diverged:
        return {"holds": True, "text": f"{name} diverged in {diverged} of {runs} runs."}
    return {
        "holds": False,
        "text": f"{name} did not diverge in any of {runs} runs (mean score {mean:.2f}): there was no "
        "divergence to avoid.",
    }


def _beside(study: Claims, claim: Claim, other: Beside, data: Data) -> dict:
    """A comparison on the seeds that both sides have; with one seed, an estimate without an interval."""
    asked = claim.model_copy(
        update={
            "treatment": other.treatment or claim.treatment,
            "baseline": other.baseline or claim.baseline,
            "baseline_name": "" if other.baseline else claim.baseline_name,
        }
    )
    out = {"name": other.name, "decides": False}
    try:
        treatment, baseline = study.levels(asked, "treatment"), study.levels(asked, "baseline")
    except ValueError as error:
        return {**out, "reason": str(error)}
    cells = [choose(study, cell, data.members) for cell in [*treatment, *baseline]]
    if None in cells:
        return {**out, "reason": f"missing: runs with {study.choose_on}"}
    pairs = _pairs(study, claim, data, cells, all_seeds=False)
    if not isinstance(pairs, Paired):
        return {**out, "reason": "missing: " + "; ".join(pairs)}
    n = len(treatment)
    names = study.label(cells[0] if n == 1 else asked.treatment), _baseline_name(study, asked, cells[n:])
    out |= {"treatment": names[0], "baseline": names[1], "n_seeds": len(pairs.seeds)}
    if len(pairs.seeds) < 2:
        if claim.test == "variance_ratio":
            return {**out, "reason": "one seed tells nothing about noise"}
        difference = float((pairs.values[0] - pairs.values[1]).mean())
        return {
            **out,
            "estimate": difference,
            "reason": f"{difference:+.2f} in the one seed that both have; no interval",
        }
    measured = measure(claim, pairs, n, names, data.draws, other.name)
    try:
        if said := _at_chance(study, data, cells, n, names):
            measured |= {"verdict": "vacuous", "reason": f"{said}. By its numbers alone: {measured['reason']}"}
    except chance.Unknown:
        pass  # the claim's own note says so
    # a word of verdict here would be taken for one
    measured["by_the_same_rule"] = measured.pop("verdict")
    return {**out, **measured}


def _completed_only(claim: Claim, pairs: Paired, n: int, names: tuple[str, str], draws: int) -> dict:
    """The same comparison on the seeds in which no run diverged."""
    lost = {seed for seeds in pairs.diverged for seed in seeds}
    keep = [i for i, seed in enumerate(pairs.seeds) if seed not in lost]
    out = {"on": "completed runs only", "n_seeds": len(keep)}
    if len(keep) < 2:
        return {**out, "reason": f"{len(keep)} seed(s) without a diverged run: nothing to compare"}
    rest = Paired(pairs.values[:, keep], [pairs.seeds[i] for i in keep], [[] for _ in pairs.diverged], pairs.dropped)
    measured = measure(claim, rest, n, names, draws, "completed")
    measured["by_the_same_rule"] = measured.pop("verdict")
    return {**out, **measured}


# ---- claims about cost


def _judge_cost(study: Claims, claim: Claim, data: Data, verdict: Verdict) -> None:
    names = study.label(claim.treatment), study.label(claim.baseline)
    columns = [claim.metric, f"{claim.metric}_baseline"]
    pairs = data.costs if set(columns) <= set(data.costs) else pd.DataFrame(columns=columns)
    if "method" in pairs:
        pairs = select(pairs, claim.treatment)
    pairs = pairs[(pairs[columns] > 0).all(axis=1)]
    if len(pairs) < MIN_COST_PAIRS:
        verdict.reason = (
            f"missing: {claim.metric} of {names[0]} and {names[1]} measured in turns ({len(pairs)} pairs, at "
            f"least {MIN_COST_PAIRS} are needed)"
        )
        return
    _set(verdict, measure_cost(claim, pairs, names, max(200, data.draws // 5)))  # each draw sorts all pairs


def _set(verdict: Verdict, fields: dict) -> None:
    for name, value in fields.items():
        setattr(verdict, name, value)
