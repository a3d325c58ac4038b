"""The members of a run: its grid's cells times its seeds. And a run's trial form, which has one.

Part of lib/config.py's interface.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lib import witness
from lib.errors import StudyError
from lib.settings.run_values import TUNABLE, apply, default_results, markers, resolve, study_module
from lib.settings.schema import Distribution, Run, Wandb


@dataclass(frozen=True)
class Member:
    """One training: a cell of the run's grid with one seed. `run` has the cell's values in place."""

    run: Run
    cell: dict[str, Any]
    cell_name: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.cell_name}-s{self.seed}"

    @property
    def run_id(self) -> str:
        return self.run.run_id


def search_space(run: Run) -> dict[str, Distribution]:
    """The search space by dotted keys."""
    return {resolve(run.study, key, "optuna.search_space"): entry for key, entry in run.optuna.search_space.items()}


def _format(value: Any) -> str:
    """%g where that is the value exactly, so that two cells never share a name; safe in a file name."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return re.sub(r"[^A-Za-z0-9._+]+", "_", str(value)).strip("_.") or "none"


def cell_name(study: str, cell: Mapping[str, Any]) -> str:
    """The same whatever order the cell is written in: short names in the order of the study's ALIASES."""
    names = {dotted: alias for alias, dotted in reversed(study_module(study).ALIASES.items())}
    order = list(dict.fromkeys(study_module(study).ALIASES.values()))
    ranked = sorted(cell, key=lambda key: (order.index(key) if key in order else len(order), key))
    return "-".join(names.get(key, key.rpartition(".")[2]) + _format(cell[key]) for key in ranked) or "default"


def _blocks(run: Run) -> list[tuple[list[dict], list[int]]]:
    """(cells, seeds) of each block. Without a grid, the categorical choices of the marked keys are the grid."""
    if run.grid:
        return [
            (
                block.cells
                or [
                    dict(zip(block.product, values, strict=True))
                    for values in itertools.product(*block.product.values())
                ],
                block.seeds or run.seed_list,
            )
            for block in run.grid
        ]
    space, wanted = search_space(run), markers(run)
    missing = [key for key in wanted if key not in space or space[key].type != "categorical"]
    if missing:
        raise StudyError(
            f"{run.source or run.run_id}: {missing[0]}",
            f"${{opt.{wanted[missing[0]]}}}, which nothing supplies",
            "a value, a grid over it, or categorical choices in optuna.search_space",
            f"grid: [{{cells: [{{{missing[0]}: ...}}]}}], or run the sweep and train its best.yaml",
        )
    cells = [
        dict(zip(wanted, values, strict=True)) for values in itertools.product(*(space[key].choices for key in wanted))
    ]
    return [(cells, run.seed_list)]


def _resolved(run: Run, written: Mapping[str, Any]) -> dict[str, Any]:
    """A cell by its dotted keys; refused where it would set what all members of a run share."""
    cell = {resolve(run.study, key, f"{run.run_id}: grid:"): value for key, value in written.items()}
    outside = [key for key in cell if key.split(".")[0] not in TUNABLE]
    if outside:
        raise StudyError(
            f"{run.run_id}: grid: {outside[0]}",
            "not a key that differs between members",
            "keys of " + ", ".join(TUNABLE),
            "write another run YAML for it",
        )
    return cell


def member(run: Run, cell: Mapping[str, Any], seed: int) -> Member:
    """Any one member of a run, on its grid or not (a trial of the search)."""
    cell = _resolved(run, cell)
    name = cell_name(run.study, cell)
    trained = apply(run, cell, where=f"{run.source or run.run_id}: grid cell {name}") if cell else run
    left = markers(trained)
    if left:
        raise StudyError(
            f"{run.source or run.run_id}: {next(iter(left))}",
            f"not supplied by the cell {name}",
            "a value in every cell",
            "add it to the cell, or write a value instead of ${opt...}",
        )
    return Member(trained, cell, name, seed)


def members(run: Run, all_seeds: bool = False) -> list[Member]:
    """Union of the grid's blocks in the order written, each cell with its block's seeds (or with every seed)."""
    cells: dict[str, tuple[dict, list[int]]] = {}
    for block, seeds in _blocks(run):
        for written in block:
            cell = _resolved(run, written)
            name = cell_name(run.study, cell)
            known, have = cells.setdefault(name, (cell, []))
            if known != cell:
                raise StudyError(
                    f"{run.run_id}: grid",
                    f"two cells named {name}: {known} and {cell}",
                    "cells that differ in their names",
                    "drop one of them",
                )
            have += [
                seed for seed in dict.fromkeys([*seeds, *(run.seed_list if all_seeds else ())]) if seed not in have
            ]
    found = []
    for cell, seeds in cells.values():
        first = member(run, cell, seeds[0])
        found += [replace(first, seed=seed) for seed in (sorted(seeds) if all_seeds else seeds)]
    return found


def first_cell(run: Run) -> tuple[dict[str, Any], int]:
    """The values that the first member has (of a continuous search: the low end) and its seed."""
    space, first, seed = search_space(run), {}, run.seed_list[0]
    for key in markers(run):
        if key in space:
            first[key] = space[key].choices[0] if space[key].choices else space[key].low
    if run.grid:
        cells, seeds = _blocks(run)[0]
        first, seed = {**first, **_resolved(run, cells[0])}, seeds[0]
    return first, seed


def trial(run: Run) -> Run:
    """Does it run? The same run with 1 epoch, at most 2 batches in every phase, ONE cell, ONE seed, no search, no W&B.

    Applying it again changes nothing. A value that only a continuous search would supply takes its low end.
    """
    first, seed = first_cell(run)
    with witness.unseen():
        changes = study_module(run.study).trial_changes(apply(run, first))
    shrunk = apply(
        run,
        {
            **changes,
            "optuna.n_trials": 0,
            "seed_list": [seed],
            "grid": [{"cells": [first], "seeds": [seed]}] if first else None,
            "wandb": {**(run.wandb or Wandb()).model_dump(), "mode": "disabled"},
        },
    )
    full = default_results(run.study, run.scale, "full")
    results = default_results(run.study, run.scale, "trial") if run.results_dir == full else run.results_dir
    return shrunk.model_copy(update={"mode": "trial", "results_dir": results})
