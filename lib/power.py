"""How often a study of a given size would support each of its claims: if it is true as claimed, and if it is not.

Whole experiments are simulated and decided by the functions that decide the real one, without Holm ("alone") and with
it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lib import stats as st
from lib.claims import HOLM_LEVEL, Claim, Claims, Noise, Verdict, decide_mean

SIMULATED_DRAWS = 400  # bootstrap draws inside a simulated experiment, where no closed form gives the standard error
HARDLY = "hardly ever"
_CHUNK = 200
_PROFILE = np.array([-1.0, -0.2, 0.5, 0.7])  # how a simulated method's score runs over the levels: worst at one end


def null_effect(claim: Claim) -> float:
    """The true size at which supporting the claim is just wrong: the boundary of its test's hypothesis."""
    if claim.test in ("non_inferiority", "absolute"):
        return -claim.margin
    return 1.0 if claim.test == "variance_ratio" else claim.margin


def power(
    claim: Claim,
    *,
    seeds: int,
    seed_sd: float,
    question_sd: float,
    questions: int,
    effect: float,
    n_sim: int,
    rng: np.random.Generator,
    answer_sd: float | None = None,
    noise: Noise | None = None,
) -> float:
    """Share of `n_sim` simulated studies that support `claim` by its own rule when its true size is `effect`."""
    given = {"question_sd": question_sd} if answer_sd is None else {"question_sd": question_sd, "answer_sd": answer_sd}
    noise = (noise or Noise()).model_copy(update=given)
    code, _ = simulate(
        claim, noise, seed_sd=seed_sd, seeds=seeds, questions=questions, effect=effect, n_sim=n_sim, rng=rng
    )
    return float((code == st.SUPPORTED).mean())


def simulate(
    claim: Claim,
    noise: Noise,
    *,
    seed_sd: float,
    seeds: int,
    questions: int,
    effect: float,
    n_sim: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Decisions and p of `n_sim` studies whose true size is `effect`; no run diverges in them."""
    parts = [
        _simulate(claim, noise, seed_sd, seeds, questions, effect, min(_CHUNK, n_sim - start), rng)
        for start in range(0, n_sim, _CHUNK)
    ]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _simulate(claim, noise, seed_sd, seeds, questions, effect, n, rng) -> tuple[np.ndarray, np.ndarray]:
    if claim.test == "cost_ratio":
        log = np.log(effect) + rng.normal(0, noise.time_sd, (n, noise.time_pairs))
        result = st.time_ratio(np.exp(log), np.ones_like(log), draws=SIMULATED_DRAWS, rng=rng)
        decision = st.cost_at_most(result, claim.margin)
        return decision.code, decision.p
    if claim.test == "variance_ratio":
        levels = len(next(iter(claim.across.values())))
        profile = np.interp(np.linspace(0, 1, levels), np.linspace(0, 1, len(_PROFILE)), _PROFILE)
        profile = (profile - profile.mean()) / profile.std(ddof=1) * noise.spread
        treatment, baseline = _scores(noise, seed_sd, (n, 2, levels, seeds, questions), rng)
        result = st.variance_ratio(
            treatment + (profile * effect**0.5)[:, None, None],
            baseline + profile[:, None, None],
            draws=SIMULATED_DRAWS,
            rng=rng,
        )
        decision = st.lower_variance(result, claim.margin)
        return decision.code, decision.p
    treatment, baseline = _scores(noise, seed_sd, (n, 2, 1, seeds, questions), rng)
    difference = (treatment - (0 if claim.test == "absolute" else baseline))[:, 0] + effect
    decision = decide_mean(claim, st.crossed(difference), st.over_seeds(difference.mean(-1)))
    return decision.code, decision.p


def _scores(noise: Noise, seed_sd: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Centred scores of two methods, (2, n, levels, S, Q): seeds, questions, questions of one method and level,
    answers."""
    n, two, levels, s, q = shape
    x = rng.normal(0, seed_sd, (two, n, levels, s, 1)) + rng.normal(0, noise.question_sd, (1, n, 1, 1, q))
    x = x + rng.normal(0, noise.interaction_sd, (two, n, levels, 1, q))
    return x + noise.answer_sd * rng.standard_normal((two, n, levels, s, q), dtype=np.float32)


def table(
    study: Claims,
    *,
    seeds: int | None = None,
    questions: int | None = None,
    n_sim: int | None = None,
    seed: int = 0,
    scale: str | None = None,
) -> pd.DataFrame:
    """For each claim and stated seed standard deviation, the share of simulated studies that support it: `power` if it
    is true as claimed (alone, and by Holm with the study's other claims true as claimed), `false supported` on the
    boundary."""
    if scale:  # Holm's family is the claims that this scale evaluates
        study = study.model_copy(
            update={"claims": tuple(c for c in study.claims if scale in c.scales and not c.not_evaluated)}
        )
    noise, rng = study.noise, np.random.default_rng(seed)
    size = {
        "seeds": seeds or noise.seeds,
        "questions": questions or noise.questions,
        "n_sim": n_sim or noise.simulations,
    }
    out = []
    for seed_sd in noise.seed_sds:
        runs = [
            simulate(claim, noise, seed_sd=seed_sd, effect=claim.claimed, rng=rng, **size) for claim in study.claims
        ]
        holm = st.holm(np.stack([p for _, p in runs], axis=-1))
        for i, (claim, (code, _)) in enumerate(zip(study.claims, runs, strict=True)):
            null, _ = simulate(claim, noise, seed_sd=seed_sd, effect=null_effect(claim), rng=rng, **size)
            out.append(
                {
                    "claim": claim.id,
                    "seed sd": seed_sd,
                    "claimed size": claim.claimed,
                    "power alone": float((code == st.SUPPORTED).mean()),
                    "power with Holm": float(((code == st.SUPPORTED) & (holm[:, i] < HOLM_LEVEL)).mean()),
                    "boundary": null_effect(claim),
                    "false supported": float((null == st.SUPPORTED).mean()),
                }
            )
            out[-1]["if true, it is shown"] = in_words(out[-1]["power with Holm"])
    return pd.DataFrame(out)


def in_words(share: float) -> str:
    """How often a study would support a claim that is true: `share` of them."""
    words = ((0.8, "nearly always"), (0.5, "more often than not"), (0.2, "seldom"))
    return next((word for least, word in words if share >= least), HARDLY)


def weak(table: pd.DataFrame) -> dict[str, str]:
    """{claim: its power in percent} of those that a study of this size would hardly ever show, whichever seed standard
    deviation of `table` is true."""
    found = {}
    for claim, powers in table.groupby("claim", sort=False)["power with Holm"]:
        if in_words(powers.max()) == HARDLY:
            low, high = round(100 * powers.min()), round(100 * powers.max())
            found[claim] = f"{low} %" if low == high else f"{low} to {high} %"
    return found


def told(table: pd.DataFrame) -> str:
    """What the table comes to, for people."""
    found = ", ".join(f"{claim} ({power})" for claim, power in weak(table).items())
    return (
        f"Even if they are true, a study of this size would hardly ever show: {found} (power with Holm). That such a claim "
        "stays open says nothing about it."
        if found
        else "Each claim would be shown in a fifth of such studies or more, if it is true, at one of these standard deviations."
    )


def beside(verdicts: list[Verdict], table: pd.DataFrame | None) -> None:
    """Say of each claim that stays open, and that would have stayed open if it were true, that it is so."""
    powers = {} if table is None else weak(table)
    for verdict in verdicts:
        if verdict.verdict == "inconclusive" and verdict.id in powers:
            verdict.reason += (
                f" Even if it is true, a study of this size would hardly ever show it (power {powers[verdict.id]})."
            )
