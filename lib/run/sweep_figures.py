"""Three views of a search: how the objective came along, which settings it depends on, where the trials lie."""

import optuna
import pandas as pd
from matplotlib.ticker import NullFormatter

from lib import plots
from lib.plots import canvas, housestyle, number
from lib.run import sweep

MAIN, SECOND = "#0072B2", "#D55E00"


def drawings(study: optuna.Study, run) -> dict[str, plots.Drawing]:
    """{topic: drawing}; importance needs two settings and a spread of values, and is left out without them."""
    table = sweep.table(study).sort_values("trial", ignore_index=True)
    made = {"history": history(table, run), "slices": slices(table, run)}
    names = list(sweep.distributions(run))
    if len(table) > 3 and len(names) > 1 and table["value"].nunique() > 1:
        made["importance"] = importance(
            optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=run.optuna.seed)
            ),
            run,
        )
    return made


@housestyle
def history(table: pd.DataFrame, run) -> plots.Drawing:
    """Every trial's value and the best so far."""
    minimise = run.optuna.direction == "minimize"
    best = table["value"].cummin() if minimise else table["value"].cummax()
    title = f"{run.run_id}: {run.optuna.objective_metric.replace('_', ' ')} by trial"
    drawn, axes = canvas(height=3.6, title=title)
    axes[0, 0].plot(table["trial"], table["value"], "o", color=MAIN, label="trial")
    axes[0, 0].step(table["trial"], best, where="post", color=SECOND, label="best so far")
    axes[0, 0].set(xlabel="trial", ylabel=run.optuna.objective_metric.replace("_", " "))
    axes[0, 0].legend(loc="lower right")
    alt = f"{len(table)} trials; the best value is {number(best.iloc[-1])}, the first {number(table['value'].iloc[0])}."
    return plots.Drawing(drawn, title, alt, table.assign(best=best))


@housestyle
def slices(table: pd.DataFrame, run) -> plots.Drawing:
    """The value over each setting by itself."""
    space = sweep.distributions(run)
    title = f"{run.run_id}: where the trials lie"
    drawn, axes = canvas(1, len(space), height=3.4, title=title, sharey=True)
    told, best = [], table["value"].idxmax() if run.optuna.direction == "maximize" else table["value"].idxmin()
    for place, (name, distribution) in zip(axes.flat, space.items(), strict=True):
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            choices = [c for c in distribution.choices if (table[name] == c).any()]
            place.plot(table[name].map(choices.index), table["value"], "o", color=MAIN)
            place.set_xticks(
                range(len(choices)), [number(c) if isinstance(c, float | int) else str(c) for c in choices]
            )
        else:
            place.plot(table[name], table["value"], "o", color=MAIN)
            if distribution.log:
                place.set(xscale="log", xlim=(distribution.low * 0.9, distribution.high * 1.1))
                place.xaxis.set_minor_formatter(NullFormatter())
        place.set_xlabel(name.replace("_", " "))
        told.append(f"best at {name} {number(table.loc[best, name])}")
    axes[0, 0].set_ylabel(run.optuna.objective_metric.replace("_", " "))
    return plots.Drawing(drawn, title, "; ".join(told) + ".", table)


@housestyle
def importance(shares: dict[str, float], run) -> plots.Drawing:
    """Share of the objective's variance that each setting explains (fANOVA)."""
    table = pd.DataFrame({"setting": list(shares), "importance": list(shares.values())})
    title = f"{run.run_id}: what the objective depends on"
    drawn, axes = canvas(height=1.2 + 0.5 * len(table), title=title)
    axes[0, 0].barh(table["setting"].str.replace("_", " "), table["importance"], color=MAIN)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel="share of the variance (fANOVA)", xlim=(0, 1))
    alt = "; ".join(f"{s}: {number(v)}" for s, v in shares.items()) + " of the objective's variance."
    return plots.Drawing(drawn, title, alt, table)
