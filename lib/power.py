"""How often a study of a given size would support each of its claims: if it is true as claimed, and if it is not.

Whole experiments are simulated and decided by the functions that decide the real one, without Holm ("alone") and with
it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lib import stats as st
from lib.claims import HOLM_LEVEL, Claim, Claims, Noise, Verdict

SIMULATED_DRAWS = 400  # bootstrap draws inside a simulated experiment, where no closed form gives the standard error
HARDLY = "hardly ever"
_CHUNK = 200
_PROFILE = np.array([-1.0, -0.2, 0.5, 0.7])  # how a simulated method's score runs over the levels: worst at one end


def null_effect(claim: Claim) -> float:
    """The true size at which supporting the claim is just wrong: the boundary of its test's hypothesis."""
    if claim.test in ("non_inferiority", "absolute"):
        return -claim.margin
    return 1.0 if claim.test == "variance_ratio" else claim.margin


def simulate(claim: Claim, noise: Noise, *, seed_sd, seeds, questions, effect, n_sim, rng) -> st.Decision:
    """Decisions (code, p, ...) of `n_sim` studies whose true size is `effect`; no run diverges in them."""
    sizes = [min(_CHUNK, n_sim - start) for start in range(0, n_sim, _CHUNK)]
    parts = [_simulate(claim, noise, seed_sd, seeds, questions, effect, size, rng) for size in sizes]
    return st.Decision(*map(np.concatenate, zip(*parts, strict=True)))


def _simulate(claim, noise, seed_sd, seeds, questions, effect, n, rng) -> st.Decision:
    if claim.test == "cost_ratio":
        log = np.log(effect) + rng.normal(0, noise.time_sd, (n, noise.time_pairs))
        result = st.time_ratio(np.exp(log), np.ones_like(log), draws=SIMULATED_DRAWS, rng=rng)
        return st.decide_cost(result, claim.margin)
    levels = max([1, *map(len, claim.across.values())])
    # of two methods, (2, n, levels, S, Q): seeds, questions, questions of one method and level, answers
    x = rng.normal(0, seed_sd, (2, n, levels, seeds, 1)) + rng.normal(0, noise.question_sd, (1, n, 1, 1, questions))
    x = x + rng.normal(0, noise.interaction_sd, (2, n, levels, 1, questions))
    answers = rng.standard_normal((2, n, levels, seeds, questions), dtype=np.float32)
    treatment, baseline = x + noise.answer_sd * answers
    if claim.test == "variance_ratio":
        profile = np.interp(np.linspace(0, 1, levels), np.linspace(0, 1, len(_PROFILE)), _PROFILE)
        profile = ((profile - profile.mean()) / profile.std(ddof=1) * noise.spread)[:, None, None]
        treatment, baseline = treatment + profile * effect**0.5, baseline + profile
        return st.decide_variance(st.variance_ratio(treatment, baseline, draws=SIMULATED_DRAWS, rng=rng), claim.margin)
    difference = (treatment - (0 if claim.test == "absolute" else baseline))[:, 0] + effect
    return st.decide_mean(claim.test, st.crossed_mean(difference), st.seed_mean(difference.mean(-1)), claim.margin)


def table(study: Claims, *, scale=None, seeds: int | None = None, n_sim: int | None = None) -> pd.DataFrame:
    """For each claim and stated seed standard deviation, the share of simulated studies that support it: `power` if it
    is true as claimed (alone, and by Holm with the study's other claims true as claimed), `false supported` on the
    boundary. Holm's family is the claims that `scale` evaluates."""
    claims = [c for c in study.claims if not scale or (scale in c.scales and not c.not_evaluated)]
    noise, rng = study.noise, np.random.default_rng(0)
    size = {"seeds": seeds or noise.seeds, "questions": noise.questions, "n_sim": n_sim or noise.simulations}
    rows = []
    for seed_sd in noise.seed_sds:
        runs = [simulate(claim, noise, seed_sd=seed_sd, effect=claim.claimed, rng=rng, **size) for claim in claims]
        adjusted = st.holm(np.stack([run.p for run in runs], axis=-1)).T
        for claim, run, holm in zip(claims, runs, adjusted, strict=True):
            null = simulate(claim, noise, seed_sd=seed_sd, effect=null_effect(claim), rng=rng, **size)
            supported = run.code == st.SUPPORTED
            with_holm = float((supported & (holm < HOLM_LEVEL)).mean())
            row = {"claim": claim.id, "seed sd": seed_sd, "claimed size": claim.claimed}
            row |= {"power alone": float(supported.mean()), "power with Holm": with_holm}
            row |= {"boundary": null_effect(claim), "false supported": float((null.code == st.SUPPORTED).mean())}
            rows.append(row | {"if true, it is shown": word_for(with_holm)})
    return pd.DataFrame(rows)


def word_for(share: float) -> str:
    """How often a study would support a claim that is true: `share` of them."""
    words = ((0.8, "nearly always"), (0.5, "more often than not"), (0.2, "seldom"))
    return next((word for least, word in words if share >= least), HARDLY)


def weak_claims(table: pd.DataFrame) -> dict[str, str]:
    """{claim: its power in percent} of those that a study of this size would hardly ever show, whichever seed standard
    deviation of `table` is true."""
    weak = {}
    for claim, powers in table.groupby("claim", sort=False)["power with Holm"]:
        if word_for(powers.max()) == HARDLY:
            low, high = round(100 * powers.min()), round(100 * powers.max())
            weak[claim] = f"{low} %" if low == high else f"{low} to {high} %"
    return weak


def summary(table: pd.DataFrame) -> str:
    """What the table comes to, in a sentence."""
    if weak := ", ".join(f"{claim} ({power})" for claim, power in weak_claims(table).items()):
        text = f"Even if they are true, a study of this size would hardly ever show: {weak} (power with Holm)."
        return f"{text} That such a claim stays open says nothing about it."
    return "Each claim would be shown in a fifth of such studies or more, if it is true, at one of these standard deviations."


def explain_open(verdicts: list[Verdict], table: pd.DataFrame | None) -> None:
    """Add to the reason of each claim that stays open, and that would have stayed open if it were true, that it is so."""
    powers = {} if table is None else weak_claims(table)
    for verdict in verdicts:
        if verdict.verdict == "inconclusive" and verdict.id in powers:
            power = powers[verdict.id]
            verdict.reason += f" Even if it is true, a study of this size would hardly ever show it (power {power})."
