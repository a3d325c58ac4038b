"""Which runs the analysis sets beside each other, and paired differences with the claims' intervals that decide no
claim."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from lib import claims, config
from lib.claims import Cell, Paired, choose, measure, pair_up

COLUMNS = ["method", "less", "difference", "low", "high", "t low", "t high", "seeds", "problems", "per seed", "why not"]
WORST_FIT = -1e9  # of a diverged run, where base rates are chosen by loss


def headline(planned: Iterable, published: claims.Claims) -> list[str]:
    """Methods of the figures over all methods: those that some run proposes or compares with, and the controls that a
    claim compares with; ablations and reconstructions beside the claims stand in tables of their own."""
    runs, claimed = list(planned), set()
    for claim in published.claims:
        sides = [(claim.treatment, claim.baseline), *((beside.treatment, beside.baseline) for beside in claim.beside)]
        claimed |= {cell["method"] for pair in sides for cell in pair if cell and not claim.not_evaluated}
    ablations = {run.method for run in runs if run.role == "ablation"}
    chosen = [run.method for run in runs if run.role in ("proposed", "comparative") or run.method in claimed]
    return [method for method in dict.fromkeys(chosen) if method not in ablations]


def _alike(planned: Iterable) -> list[tuple[object, list]]:
    """(a proposed run, the other runs of its model and budget) for each proposed run."""
    runs = list(planned)
    return [
        (
            run,
            [
                other
                for other in runs
                if other is not run
                and other.model.name == run.model.name
                and other.training.budget_minutes == run.training.budget_minutes
            ],
        )
        for run in runs
        if run.role == "proposed"
    ]


def _cell(run, rate: float | str | None = "best") -> Cell:
    """The claims' name of a run, at `rate` where it has a grid of base rates (at its own, where it has one)."""
    gridded = any("training.optimizer.lr_init" in member.cell for member in config.members(run))
    return {
        "method": run.method,
        **({} if run.run_id == run.method else {"run_id": run.run_id}),
        **({"learning_rate": rate} if gridded and rate is not None else {}),
    }


def compared(planned: Iterable) -> list[str]:
    """The run_ids of the proposed runs and of those with their model and budget."""
    return [run.run_id for proposed, others in _alike(planned) for run in (proposed, *others)]


def with_methods(planned: Iterable, main: Iterable[str]) -> list[tuple[Cell, Cell]]:
    """Each proposed run against every other method of the figures, each at its best base rate."""
    names = set(main)
    return [(_cell(run), _cell(other)) for run, others in _alike(planned) for other in others if other.method in names]


def with_ablations(planned: Iterable, main: Iterable[str], rate: float | None) -> list[tuple[Cell, Cell]]:
    """Every ablation and reconstruction beside the claims, at the tuned rate, against the proposed run there."""
    names = set(main)
    return [
        (_cell(other, rate), _cell(run, rate))
        for run, others in _alike(planned)
        for other in others
        if other.method not in names
    ]


def base_rates(planned: Iterable) -> list[float]:
    """The base rates of the runs that have several, those that most of them share, in order; of the laptop scale 0.1x,
    1x and 10x of the tuned one. Ablations have the tuned one alone, and may be more."""
    rates = [
        sorted({rate for m in config.members(run) if (rate := m.cell.get("training.optimizer.lr_init")) is not None})
        for run in planned
    ]
    return max(rates, key=lambda found: (len(found) > 1, rates.count(found), len(found)), default=[])


def tuned_rate(planned: Iterable) -> float | None:
    """The middle one of the shared base rates; None where there is no grid of them."""
    rates = base_rates(list(planned))
    return rates[len(rates) // 2] if rates else None


def groups(planned: Iterable) -> list[tuple[str, str, list[str]]]:
    """(name of the base model and budget, suffix of a file's name, its run_ids): runs of different budgets or models
    are never in one figure."""
    found: dict[tuple[str, float], list[str]] = {}
    for run in planned:
        found.setdefault((run.model.name, run.training.budget_minutes), []).append(run.run_id)
    several = len({model for model, _ in found}) > 1
    return [
        (
            f"{model.rpartition('/')[2]}, {minutes:g} minutes" if several else f"{minutes:g} minutes",
            ("_" + model.rpartition("/")[2] if several else "") + (f"_{minutes:g}" if len(found) > 1 else ""),
            ids,
        )
        for (model, minutes), ids in sorted(found.items(), key=lambda item: item[0])
    ]


def differences(
    study: claims.Claims,
    rows: pd.DataFrame,
    members: pd.DataFrame,
    pairs: Iterable[tuple[Cell, Cell]],
    metric: str,
) -> pd.DataFrame:
    """A row per (cell, other cell): mean difference of `metric` over problems and seeds with the crossed bootstrap's
    interval and the t interval over seeds. It decides nothing. Where a run diverged, what it has none of (loss) has no
    figure."""
    found = []
    for cell, other in pairs:
        chosen = [choose(study, each, members) for each in (cell, other)]
        names = [
            study.label(asked if made is None else made) for asked, made in zip((cell, other), chosen, strict=True)
        ]
        row = {"method": names[0], "less": names[1]}
        made = (
            ["a run with " + str(study.choose_on)] if None in chosen else pair_up(study, rows, members, chosen, metric)
        )
        if not isinstance(made, Paired):
            found.append({**row, "why not": "missing: " + "; ".join(made)})
        elif len(made.seeds) < 2:
            found.append({**row, "seeds": len(made.seeds), "why not": "one seed tells nothing about seeds"})
        elif any(made.diverged) and metric not in study.diverged:
            found.append({**row, "seeds": len(made.seeds), "why not": "diverged"})
        else:
            claim = claims.Claim(
                id=f"{metric} {names}",
                sentence="",
                estimand="",
                test="superiority",
                treatment=cell,
                baseline=other,
                metric=metric,
                margin=0,
            )
            got = measure(claim, made, 1, tuple(names))
            spans = (*got["interval95"], *got["companion_interval95"])
            found.append(
                {
                    **row,
                    "difference": got["estimate"],
                    **dict(zip(COLUMNS[3:7], spans, strict=True)),
                    "seeds": len(made.seeds),
                    "problems": made.values.shape[2],
                    "per seed": ", ".join(f"{value:+.3f}" for value in got["per_seed"].values()),
                }
            )
    return pd.DataFrame(found, columns=COLUMNS)


def by_loss(study: claims.Claims, members: pd.DataFrame) -> tuple[claims.Claims, pd.DataFrame]:
    """(claims, members) that choose base rates by the lowest dev loss, for comparisons of loss; a diverged run is the
    worst."""
    loss = pd.to_numeric(members["dev_loss"], errors="coerce") if "dev_loss" in members else float("nan")
    return study.model_copy(update={"choose_on": "dev_fit", "diverged": {"accuracy": WORST_FIT}}), members.assign(
        dev_fit=-loss
    )


def words(table: pd.DataFrame, digits: int = 3) -> list[str]:
    """One sentence a row: what the difference is, and which side of 0 its intervals leave open."""
    said = []
    for row in table.to_dict("records"):
        if isinstance(row["why not"], str):
            said.append(f"{row['method']} against {row['less']}: {row['why not']}.")
            continue
        sure = [low > 0 or high < 0 for low, high in ((row["low"], row["high"]), (row["t low"], row["t high"]))]
        told = (
            "both intervals lie on one side of 0"
            if all(sure)
            else "only one of the intervals lies on one side of 0"
            if any(sure)
            else "both intervals hold 0, which leaves open which is better"
        )
        said.append(
            f"{row['method']} less {row['less']}: {row['difference']:+.{digits}f} [{row['low']:+.{digits}f}, "
            f"{row['high']:+.{digits}f}], t over {row['seeds']:.0f} seeds [{row['t low']:+.{digits}f}, "
            f"{row['t high']:+.{digits}f}]; {told}."
        )
    return said
