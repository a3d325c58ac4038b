"""What a study of a given size can decide: how often each claim ends with a word if it is true as claimed, and how often
with a wrong one at the boundary. Whole experiments are simulated and decided by the functions that decide the real one.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lib import stats as st
from lib.claims import RATIOS, Claim, Claims, test_of


def sds_of(study: Claims, claim: Claim, seed_sd: float, scale: str) -> tuple[dict[str, float], int]:
    """Assumed standard deviations of the claim's difference, and its number of questions."""
    noise, questions = study.noise, study.noise.questions
    questions = questions[scale] if isinstance(questions, dict) else questions
    if claim.test in RATIOS:
        sd = noise.time_sd if claim.test == "cost_ratio" else noise.variance_sd
        return {"seed": sd, "question": 0.0, "residual": 0.0}, 1
    return {"seed": seed_sd, "question": noise.question_sd, "residual": noise.residual_sd}, questions


def assumed_for(study: Claims, claim: Claim) -> bool:
    """Whether the noise assumed is that of the claim's difference, on a scale that is known before."""
    is_of_scores = claim.metric == study.noise.metric and claim.factor == 1 and claim.test != "absolute"
    return claim.test in RATIOS or is_of_scores


def sizes(claim: Claim) -> tuple[float, float]:
    """The true difference if it is as claimed, and at the boundary of what is tested."""
    test, margin = test_of(claim)
    if test == "superiority":
        return margin if claim.gain is None else margin * 1.5, margin
    return 0.0, -margin


def simulate(study: Claims, claim: Claim, looks, sds, questions, effect, rng) -> tuple[np.ndarray, np.ndarray]:
    """(words, seeds used), each (n_sim,), of studies that stop at a word or at the last look."""
    (test, margin), n = test_of(claim), study.noise.simulations
    d = effect + rng.normal(0, sds["seed"], (n, looks[-1], 1)) + rng.normal(0, sds["question"], (n, 1, questions))
    sequence = st.look_sequentially(d + rng.normal(0, sds["residual"], (n, looks[-1], questions)), looks)
    code = st.words(test, sequence.low, sequence.high, margin)  # (K, n)
    stop = np.where((code != st.INCONCLUSIVE).any(0), (code != st.INCONCLUSIVE).argmax(0), len(looks) - 1)
    return code[stop, np.arange(n)], np.array(looks)[stop]


def by_look(study: Claims, claim: Claim, looks: tuple[int, ...], scale: str) -> dict[int, float]:
    """{look: the chance that the claim is supported by then, if it is true as claimed, at the most noise assumed and
    without the correction for several claims}; NaN where no noise is assumed."""
    sds, questions = sds_of(study, claim, max(study.noise.seed_sds), scale)
    words, seeds = simulate(study, claim, looks, sds, questions, sizes(claim)[0], np.random.default_rng(0))
    by = {n: float(((words == st.SUPPORTED) & (seeds <= n)).mean()) for n in looks}
    return by if assumed_for(study, claim) else dict.fromkeys(looks, np.nan)


def table(study: Claims, *, scale: str, seen: Mapping[str, dict[str, float]] | None = None) -> pd.DataFrame:
    """One row per claim and seed standard deviation assumed: by the last look, without the correction for several claims.

    seen: {claim id: standard deviations in the record}; then only a row for each claim of which one exceeds what was
    assumed, with the record's.
    """
    rng, looks, rows = np.random.default_rng(0), study.looks_of(scale), []
    for claim in study.claims:
        if scale not in claim.scales or claim.not_evaluated or not assumed_for(study, claim):
            continue
        seed_sds = (0.0,) if claim.test in RATIOS else study.noise.seed_sds
        assumed = [sds_of(study, claim, sd, scale) for sd in seed_sds]
        (*_, (largest, questions)), mine = assumed, (seen or {}).get(claim.id)
        again = bool(mine) and any(mine[name] > 1.05 * largest[name] for name in ("seed", "question"))
        sources = [("this record", mine)] * again if seen is not None else [("assumed", sds) for sds, _ in assumed]
        for source, sds in sources:
            true, boundary = sizes(claim)
            words, seeds = simulate(study, claim, looks, sds, questions, true, rng)
            wrong, _ = simulate(study, claim, looks, sds, questions, boundary, rng)
            row = {"claim": claim.id, "tested": claim.threshold_text, "noise": source, **sds}
            row |= {"supported if true as claimed": (words == st.SUPPORTED).mean(), "seeds": seeds.mean()}
            rows.append(row | {"any word at the boundary": (wrong != st.INCONCLUSIVE).mean()})
    return pd.DataFrame(rows)


def undecidable(study: Claims, claim: Claim, scale: str) -> str:
    """Why no number of seeds up to the last look can decide the claim, at the smallest noise assumed and whether it is
    as claimed, nothing, or as much the other way round; the empty string where some can, no size is claimed, or the claim
    is about another scale."""
    sds, questions = sds_of(study, claim, min(study.noise.seed_sds), scale)
    (_, margin), looks = test_of(claim), study.looks_of(scale)
    distance = margin if claim.gain is None else margin * 2.5  # from two thirds of the gain to its opposite
    if scale not in claim.scales or not assumed_for(study, claim) or not margin:
        return ""
    bound, last, residual = st.bound_of(looks), looks[-1], sds["residual"] ** 2
    squares = questions * sds["seed"] ** 2 + residual, last * sds["question"] ** 2 + residual, residual
    look = st.Look(last, questions, np.zeros(()), *map(np.array, squares))
    if (half := look.half_width(bound)) < distance:
        return ""
    counts = np.unique(np.geomspace(last, 10_000, 300).astype(int)).tolist()
    enough = next((n for n in counts if look.half_width(bound, n) < distance), 0)
    more = f"{enough} seeds would" if enough else "no number of seeds would: more questions, or a wider margin"
    return f"{last} seeds cannot decide {claim.threshold_text} (interval ±{half:.2g}); {more}"
