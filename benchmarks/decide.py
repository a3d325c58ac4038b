"""Minutes of one core until each claim is decided, against studies of a fixed size, on one record of many seeds.

    .venv/bin/python -m benchmarks.decide outputs/laptop-full [--minutes 60]

Nothing is trained: the record is replayed. A sequential study judges all claims at the first look, then buys next looks
round by round, as `./run_all.sh` does: of the open claim whose word is expected to cost least, and of those that fit into
the default budget with it; when that is spent, of all. Nothing is bought for a claim that is decided. A fixed study trains
all claims' arms with n seeds and judges once, by the t interval of that size. A member's cost is the seconds in its record;
what a seed's members share is charged once per seed, a pilot's too. Claims about times and energy are left out.
"""

import argparse
import math
from pathlib import Path

import pandas as pd

from lib import claims, config, tables
from lib.graff import report as graff
from lib.run import decide, plan, runs
from lib.td_dpo import report as td_dpo

FIXED = (3, 5, 10, 20)
BUDGET = 2 * decide.MINUTES["laptop"]  # core-minutes after the first looks, on two cores
ABSENT = {graff.METRIC: "left out"}  # of Holm's family too, as in an analysis where there is no counter


def judged_by(study: str, loaded: tables.Records, planned: list) -> dict:
    """The rows that the study's analysis gives to claims.evaluate."""
    if study == "td_dpo":
        return {"rows": td_dpo.question_scores(loaded, td_dpo.judged(planned, loaded)), "members": loaded.everyone}
    if study == "iw_lora":
        rows = loaded.pairs.rename(columns={"correct": "accuracy"}).astype({"accuracy": float})
        return {"rows": rows.assign(status="completed"), "members": loaded.everyone}
    members = graff.with_rate(loaded.everyone)
    return {"rows": graff.scores(loaded), "accuracy": graff.areas(loaded), "members": members}


class Study:
    """A study's record: its verdicts at any number of seeds, and what its arms cost."""

    def __init__(self, results: Path):
        planned = runs.planned(results)
        self.name, loaded = results.name, tables.load(results, [m for run in planned for m in config.members(run)])
        self.claims = claims.load(plan.claims_of(self.name))
        self.given = judged_by(self.name, loaded, planned)
        arms = decide.arms(self.claims, planned, "laptop")
        about = {claim.id: claim.test for claim in self.claims.claims}
        self.arms = {name: own for name, own in arms.items() if about[name] != "cost_ratio"}
        judged, pilots = claims.judged_rows(loaded.members), loaded.members[claims.is_pilot(loaded.members)]
        self.seeds = list(dict.fromkeys(judged["seed"]))
        self.chosen = judged.groupby("run_id")["cell"].agg(lambda cells: cells.mode().iat[0])
        self.seconds = judged.set_index(["run_id", "cell", "seed"])["seconds"]
        self.prepare = plan.prepare_seconds(planned[0])
        self.pilots = pilots["seconds"].sum() + self.prepare * pilots["seed"].nunique()

    def verdicts(self, n: int, looks: tuple[int, ...]) -> dict[str, claims.Verdict]:
        """{claim: its verdict} by the first n seeds."""
        kept = self.seeds[:n]
        given = {name: frame[frame["seed"].isin(kept) | claims.is_pilot(frame)] for name, frame in self.given.items()}
        study = self.claims.model_copy(update={"looks": looks})
        found = claims.evaluate(study, given.pop("rows"), scale="laptop", mode="full", absent=ABSENT, **given)
        return {v.id: v for v in found if v.id in self.arms and v.verdict != "not evaluated"}

    def needed(self, claim: str, n: int) -> set:
        """(study, run, cell, seed) of its arms' members, and (study, seed) of what a seed's members share."""
        cells = [(run, self.chosen[run] if cell == claims.BEST else cell) for run, cell in self.arms[claim]]
        seeds = self.seeds[:n]
        return {(self.name, *cell, seed) for cell in cells for seed in seeds} | {(self.name, seed) for seed in seeds}

    def cost(self, needed: set) -> float:
        return sum(self.prepare if len(one) == 2 else self.seconds.get(one[1:], 0.0) for one in needed)


def fixed(studies: list[Study], n: int) -> tuple[float, int, int]:
    """(core-minutes, claims decided, claims)."""
    minutes = decided = total = 0
    for study in studies:
        found = study.verdicts(n, (n,))
        needed = set().union(*(study.needed(claim, n) for claim in found))
        minutes += (study.cost(needed) + study.pilots) / 60
        decided, total = decided + sum(v.decided for v in found.values()), total + len(found)
    return minutes, decided, total


def sequential(studies: list[Study]) -> pd.DataFrame:
    """A row per claim: at how many seeds it was decided, and after how many core-minutes of the whole."""
    spent, have, rows, open_claims = 0.0, set(), [], []
    looks = {study.name: study.claims.looks_of("laptop") for study in studies}
    words = {(s.name, n): s.verdicts(n, looks[s.name]) for s in studies for n in looks[s.name]}
    for study in sorted(studies, key=lambda s: s.cost(set().union(*(s.needed(c, looks[s.name][0]) for c in s.arms)))):
        first = looks[study.name][0]
        found = words[study.name, first]
        new = set().union(*(study.needed(claim, first) for claim in found)) - have
        spent, have = spent + study.cost(new) + study.pilots, have | new
        for claim, verdict in found.items():
            if verdict.decided:
                rows.append({"study": study.name, "claim": claim, "seeds": first, "minutes": spent / 60})
            else:
                open_claims.append((study, claim, 1))

    def word(each: tuple) -> tuple[float, int]:
        """(its chance of a word by the last look, the seeds at which one is expected), as lib/run/decide.py has it."""
        study, claim, k = each
        verdict, last = words[study.name, looks[study.name][k - 1]].get(claim), looks[study.name][-1]
        if verdict is None:  # a look that the record does not have
            return 0.0, last
        return 1.0 if verdict.chance is None else verdict.chance, min(verdict.seeds_to_decide or last, last)

    def lacking(asked: list[tuple], whole: bool = False) -> dict[Study, set]:
        """What these lack of their next looks; of all until their words are expected, where `whole`."""
        found = {study: set() for study in studies}
        for study, claim, k in asked:
            n = word((study, claim, k))[1] if whole else looks[study.name][k]
            found[study] |= study.needed(claim, n) - have
        return found

    def cost(asked: list[tuple], whole: bool = False) -> float:
        return sum(study.cost(needed) for study, needed in lacking(asked, whole).items())

    left = 60 * BUDGET
    while open_claims:
        likely, taken = [each for each in open_claims if word(each)[0] >= decide.FUTILE], []
        for each in sorted(likely or open_claims, key=lambda each: cost([each], whole=True) / (word(each)[0] or 1)):
            more = [*taken, each]
            if cost(more) <= left and (not taken or cost(more, whole=True) <= left):
                taken = more
        if not taken:  # the default budget is spent: `./run_all.sh decide` goes on
            left = math.inf
            continue
        new = cost(taken)
        spent, left, have = spent + new, left - new, have.union(*lacking(taken).values())
        for study, claim, k in taken:
            open_claims.remove((study, claim, k))
            n = looks[study.name][k]
            decided = (verdict := words[study.name, n].get(claim)) is not None and verdict.decided
            if decided or k + 1 == len(looks[study.name]):
                minutes = spent / 60 if decided else None
                rows.append({"study": study.name, "claim": claim, "seeds": n, "minutes": minutes})
            else:
                open_claims.append((study, claim, k + 1))
    return pd.DataFrame(rows).assign(spent=spent / 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="of one core, by which claims are to be decided")
    options = parser.parse_args()
    studies = [Study(path.parent.parent) for path in sorted(options.outputs.glob("*/comparison/runs.json"))]
    table = sequential(studies)
    print(table.drop(columns="spent").round(1).to_string(index=False))
    within = (table["minutes"] <= options.minutes).sum()
    print(
        f"\nsequential: {table['minutes'].notna().sum()} of {len(table)} claims decided in {table['spent'].max():.0f}",
        end=" ",
    )
    print(f"core-minutes, {within} of them within {options.minutes:g}")
    for n in FIXED:
        minutes, decided, total = fixed(studies, n)
        print(f"fixed at {n} seeds: {decided} of {total} claims decided in {minutes:.0f} core-minutes")


if __name__ == "__main__":
    main()
