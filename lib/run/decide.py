"""Where the minutes go: `Spending.rounds`, one list of notebooks after the other.

The arms of all claims come first, with the seeds of the first look, the cheapest study ahead; then seeds for the claims
that stay open, the cheapest expected decision first; then, alone, the times that claims compare; last what decides no
claim: ablations, controls, searches. Each round is made from the record when the one before it has ended, so that the
same command goes on after a kill, and `decide` on any other day.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lib import claims, config, power, record
from lib.errors import StudyError
from lib.run import check, members, plan, progress, runs as records

LIKELY = 0.5  # a decision is expected from this chance on
FUTILE = 0.1  # a claim with less chance of a word by its last look waits until the others are done
MINUTES = {"laptop": 15.0, "small": 60.0}  # of `full`, for all that comes after the first looks
TIMES = "times"  # in the place of a cell: what is measured in processes of its own


class Round(NamedTuple):
    what: str
    steps: list[plan.Step]
    until: float = math.inf  # by time.monotonic(): a step that is predicted to end later is postponed
    after: float = 0.0  # predicted seconds of what comes after it


class Open(NamedTuple):
    """A claim without a word, from its row of claims.json; `arms`: (run, cell) of all that it compares."""

    study: str
    id: str
    arms: list[tuple]
    look: int  # the next one; 0 after the last
    chance: float = 1.0
    enough: int | None = None  # seeds that decide it with a chance of 80 %; None where that is not known

    @property
    def name(self) -> str:
        return f"{self.study} {self.id}"

    @property
    def is_timed(self) -> bool:
        return self.arms[0][1] == TIMES


# ---- what claims compare


def arms(published: claims.Claims, runs: list, scale: str) -> dict[str, list[tuple[str, str]]]:
    """{claim: (run_id, cell) of all that it compares}, of the claims that `scale` evaluates, where all of it is among
    `runs`. A cell is BEST where the run's pilots choose it, TUNED where its search does, and TIMES of a claim about
    time."""
    once = [config.with_seeds(run, {cell: seeds[:1] for cell, seeds in seeds_of(run).items()}) for run in runs]
    rows, found = pd.DataFrame([row for run in once for row in check.member_rows(run)]), {}
    for claim in published.claims if len(rows) else ():
        timed, sides = claim.test == "cost_ratio", (published.levels(claim, side) for side in claims.SIDES)
        compared = [_arms_of(rows, claim, cell) for side in sides for cell in side]
        if scale in claim.scales and not claim.not_evaluated and all(compared):
            # the proposed method's run measures the times of its baseline too
            found[claim.id] = list(dict.fromkeys(arm for side in compared[: 1 if timed else None] for arm in side))
    return found


def select(asked: list[str], runs: list, scale: str) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """{study: `arms`} of the claims that are asked for: C1 of every study, td_dpo/C1 of one. Raises StudyError where one
    is unknown."""
    found, known = {}, []
    for study in dict.fromkeys(run.study for run in runs):
        own = arms(claims.load(plan.claims_of(study)), [run for run in runs if run.study == study], scale)
        known += [f"{study}/{claim}" for claim in own]
        if mine := {claim: own[claim] for claim in own if claim in asked or f"{study}/{claim}" in asked}:
            found[study] = mine
    if unknown := {*asked} - {*known} - {name.partition("/")[2] for name in known}:
        near = config.did_you_mean(min(unknown), [*known, *(name.partition("/")[2] for name in known)], "")
        raise StudyError("--claims", f"no claim {', '.join(sorted(unknown))} at {scale} scale", ", ".join(known), near)
    return found


def _arms_of(rows: pd.DataFrame, claim: claims.Claim, cell: claims.Cell) -> list[tuple[str, str]]:
    """One side's: with `best`, what pilots choose or, without pilots, every cell that it may be."""
    mine = claims.select_any(rows, claim, cell)
    if claim.test == "cost_ratio":
        return [(run_id, TIMES) for run_id in dict.fromkeys(mine["run_id"])]
    pilots = mine[mine["pilot"]]["run_id"] if claims.BEST in cell.values() else ()
    of_cells = mine[~mine["pilot"] & ~mine["run_id"].isin(pilots)]
    found = [(run_id, claims.BEST) for run_id in pilots] + [*zip(of_cells["run_id"], of_cells["cell"], strict=True)]
    return list(dict.fromkeys(found))


def recorded(run) -> dict[str, list[int]]:
    """{cell: seeds} that the run's record was planned with, of cells whose record does not have to be made anew. Without
    seeds of which the run has nothing, as a look's that was broken off: claims that wait for their first go ahead."""
    folder = Path(run.results_dir) / run.run_id
    try:
        written = config.load_yaml(folder / "config.yaml")
        before = config.apply(run, {key: written.get(key) for key in ("grid", "seed_list", "pilot_seeds")})
        planned = config.members(records.settle(before))
    except StudyError:  # there is none, or it is another version's
        return {}
    known = config.cells(records.settle(run))
    fresh = [m for m in planned if m.cell_name in known and not members.stale(m, folder / "members" / m.id)]
    cells = {claims.BEST if member.pilot else member.cell_name for member in fresh}
    trained = {member.seed for member in fresh if not member.pilot}
    mine = {cell: seeds for cell, seeds in seeds_of(before).items() if cell in cells}
    # where pilots alone are trained, all that were planned
    return {cell: [seed for seed in seeds if seed in trained] or seeds for cell, seeds in mine.items()}


def seeds_of(run) -> dict[str, list[int]]:
    """{cell: its judged seeds}; of the cell that pilots choose, BEST's, and of what the search finds, TUNED's."""
    chosen = [block for block in run.grid or () if block.pilot or block.tuned]
    found = {claims.TUNED if block.tuned else claims.BEST: list(block.seeds or run.seed_list) for block in chosen}
    for cell, (_, seeds) in config.cells(run).items():
        if judged := [seed for seed in seeds if seed not in (run.pilot_seeds or ())]:
            found[cell] = judged
    return found


# ---- rounds


class Spending:
    """What a command executes: `rounds`. `left`, afterwards: what there was no time for, with the command that does it."""

    def __init__(self, options, runs: list, whole: list, slots: int):
        """`whole`: all runs of the studies that `runs` are of."""
        self.options, self.runs, self.whole, self.slots = options, runs, whole, slots
        places = {run.study: run.results_dir for run in runs}
        self.published = {study: claims.load(plan.claims_of(study, place)) for study, place in places.items()}
        self.arms = options.claims or {s: arms(own, self.of(s), options.scale) for s, own in self.published.items()}
        self.is_staged = options.mode == "full" and not options.grid
        self.seeds = {_title(run): {} if options.force or not self.is_staged else recorded(run) for run in whole}
        forced = runs if options.force else ()
        self.forced = {f"{_title(run)}{more}" for run in forced for more in ("", " sweep", " times")}
        self.planned: list[plan.Step] = []
        self.asked: set[tuple[str, int]] = set()  # claims, with the seeds of a look that was asked for
        self.left: list[str] = []
        self.until = math.inf
        is_open = options.command == "decide" or options.max_hours
        self.minutes = options.max_minutes or (math.inf if is_open else MINUTES.get(options.scale, math.inf))

    def of(self, study: str) -> list:
        return [run for run in self.runs if run.study == study]

    def folder(self, study: str) -> Path:
        return self.of(study)[0].results_dir / "comparison"

    def looks_of(self, study: str) -> tuple[int, ...]:
        return self.published[study].looks_of(self.options.scale)

    def rounds(self) -> Iterator[Round]:
        is_try = self.options.command == "try"  # whose minutes cover the first look
        self.until = time.monotonic() + 60 * self.minutes if is_try else math.inf
        if self.is_staged and not any(self.seeds.values()) and (found := self.first_verdict()):
            yield found
        yield self.first_looks()
        if not self.is_staged:
            return
        self.until = self.until if is_try else time.monotonic() + 60 * self.minutes
        for timed in (False, True):
            while found := self.next_look(timed):
                yield found._replace(after=self.later(found.steps))
        if self.options.command not in ("decide", "try") and not self.options.claims:
            yield self.rest()
        if self.options.command != "plan":
            self.list_left()

    def preview(self) -> list[Round]:
        """The rounds as far as the record foresees them, and in each what those before it leave."""
        found, planned = list(self.rounds()), Counter()
        for step in (step for each in found for step in each.steps if step.kind in ("train", "sweep")):
            if planned[step.title]:
                step.members, step.prepare = step.members - planned[step.title], 0.0
                step.reason = step.reason if step.members else ""
                step.predict()
            planned[step.title] += step.members
        return [found[0], *(Round(each.what, [step for step in each.steps if step.reason]) for each in found[1:])]

    def first_verdict(self) -> Round | None:
        """What the cheapest claim compares: whoever waits for a first word has it in minutes."""
        scored = ((study, mine) for study in self.arms for mine in self.compared(study).values() if mine[0][1] != TIMES)
        found = [Open(study, "", mine, self.looks_of(study)[0]) for study, mine in scored]
        if self.options.run or self.options.command in ("decide", "try") or not found:
            return None
        first = min(found, key=lambda claim: self.cost([claim]))
        steps = self.steps_of([first])  # what it trains is no part of what comes after
        return Round("first verdict", steps, after=self.cost(found) + self.later([]))

    def first_looks(self) -> Round:
        """The arms of all claims. All of a run that --run names, and of a study none of whose claims can be judged."""
        if not self.is_staged:
            times = {TIMES: list(range(1 if self.options.mode == "trial" else members.PROCESSES))}
            for run in self.runs:
                self.want(run, times if TIMES in self.cells(run) else {})
            return Round("", self.steps(self.runs, searches=not self.options.claims))
        by_study = []
        for study, own in self.arms.items():
            look = self.looks_of(study)[0]
            for run in self.of(study):
                whole = self.options.run or all(arm[1] == TIMES for each in own.values() for arm in each)
                mine = dict.fromkeys(self.cells(run) - {TIMES}, run.seed_list[:look])
                every = self.first_seeds(run) if whole else mine
                self.want(run, mine or _least(run) if self.options.claims else every)
            by_study.append(self.steps([run for run in self.of(study) if self.seeds[_title(run)]]))
        by_study.sort(key=lambda steps: plan.forecast(steps, self.slots).wall_seconds)
        steps = [step for steps in by_study for step in steps]
        if self.options.command == "decide" and (old := next(filter(self.lacks_first_look, steps), None)):
            expected = "a record of the first look, up to date"
            raise StudyError(f"decide: {old.title}", old.reason, expected, old.command)
        return Round("first looks", steps, after=self.later(steps if self.options.command == "try" else []))

    def lacks_first_look(self, step: plan.Step) -> bool:
        """Whether something of a first look is to be done, and not of a later one alone, which was broken off."""
        if step.kind != "train" or not step.members:
            return step.members > 0
        first = step.run.seed_list[: self.looks_of(step.study)[0]]
        mine = (m for m in config.members(records.settle(step.run)) if m.pilot or m.seed in first)
        return any(members.stale(member, step.folder / "members" / member.id) for member in mine)

    def later(self, steps: list[plan.Step]) -> float:
        """Seconds of the budget that are left after these steps; 0 where there is none."""
        left = min(self.until - time.monotonic(), 60 * self.minutes)
        return max(0.0, left - plan.forecast(steps, self.slots).wall_seconds) if math.isfinite(left) else 0.0

    def next_look(self, timed: bool) -> Round | None:
        """Of the cheapest open claim, and of those whose decision is expected to fit in with it."""
        found, lost = [each for each in self.open_claims(timed) if self.has_more(each)], self.lost()
        found = [each for each in found if not lost & {_title(run) for run, _ in each.arms}]
        likely, taken, left = [each for each in found if each.chance >= FUTILE], [], self.until - time.monotonic()
        if not timed:  # times come last, alone: their first look's minutes are kept for them, up to a third of all
            first = self.cost([each for each in self.open_claims(True) if each.look == members.PROCESSES])
            left -= min(first, 60 * self.minutes / 3) if math.isfinite(left) else 0
        for claim in sorted(likely or found, key=lambda each: self.cost([self.word_of(each)]) / max(each.chance, 1e-9)):
            more = [*taken, claim]
            if self.cost(more) <= left and (not taken or self.cost(list(map(self.word_of, more))) <= left):
                taken = more
        named = ", ".join(f"{claim.name} to {claim.look}" for claim in taken)
        self.asked |= {(claim.name, claim.look) for claim in taken}
        return Round(f"{TIMES if timed else 'seeds'} for {named}", self.steps_of(taken)) if taken else None

    def rest(self) -> Round:
        """Ablations, controls, what else the grids have, and the searches, in what is left of the budget."""
        lost = self.lost()
        runs = [run for run in self.runs if _title(run) not in lost]
        for run in runs:
            self.want(run, self.first_seeds(run))
        return Round("ablations, controls and searches", self.steps(runs, searches=True), self.until)

    # ---- their parts

    def compared(self, study: str) -> dict[str, list[tuple]]:
        """{claim: (run, cell) of all that it compares}."""
        runs = {run.run_id: run for run in self.of(study)}
        return {name: [(runs[run_id], cell) for run_id, cell in mine] for name, mine in self.arms[study].items()}

    def cells(self, run) -> set[str]:
        """Those of a run that claims compare."""
        every = (arm for own in self.arms[run.study].values() for arm in own)
        return {cell for run_id, cell in every if run_id == run.run_id}

    def has_more(self, claim: Open) -> bool:
        """Whether a look is left that this command has not asked for."""
        return bool(claim.look) and (claim.name, claim.look) not in self.asked

    def lost(self) -> set[str]:
        """Runs that failed, or had no time, in this command: they are not tried again and again."""
        return {step.title for step in self.planned if step.state not in ("", "cached", "succeeded")}

    def first_seeds(self, run) -> dict[str, list[int]]:
        """Every cell of a run's grid, with the first look's seeds at most."""
        return {cell: seeds[: self.looks_of(run.study)[0]] for cell, seeds in seeds_of(run).items()}

    def want(self, run, seeds: dict[str, list[int]]) -> None:
        mine = self.seeds[_title(run)]
        for cell, more in seeds.items():
            mine[cell] = list(dict.fromkeys([*mine.get(cell, ()), *more]))

    def wanted(self, run):
        """The run with the seeds wanted so far; None where there are none."""
        cells = {cell: seeds for cell, seeds in self.seeds[_title(run)].items() if cell != TIMES}
        return (config.with_seeds(run, cells) if cells else None) if self.is_staged else run

    def steps_of(self, asked: list[Open]) -> list[plan.Step]:
        """What brings these claims to their next look."""
        wanted = [(run, cell, each.look) for each in asked for run, cell in each.arms]
        for run, cell, look in wanted:
            self.want(run, {cell: (list(range(look)) if cell == TIMES else run.seed_list)[:look]})
        return self.steps(list({_title(run): run for run, _, _ in wanted}.values()), timed=asked[0].is_timed)

    def steps(self, runs: list, *, searches: bool = False, timed: bool = False) -> list[plan.Step]:
        """The notebooks of these runs with the seeds wanted so far, and of their studies' analyses."""
        options, wanted = self.options, {_title(run): self.wanted(run) for run in self.whole}
        for study in {run.study for run in runs} if options.command != "plan" else ():
            where = {"study": study, "scale": options.scale, "mode": options.mode}
            listed = [{**config.dump(run), **where} for run in wanted.values() if run and run.study == study]
            record.write_json(self.folder(study) / "runs.json", listed)
        asked = {_title(run): self.seeds[_title(run)] if self.is_staged else self.cells(run) for run in runs}
        searched = [run for run in runs if searches or claims.TUNED in asked[_title(run)]]
        searched = [config.with_seeds(r, self.first_seeds(r)) if self.is_staged else r for r in searched]
        of_times = {_title(run): len(self.seeds[_title(run)].get(TIMES, ())) for run in runs}
        measured = of_times if timed or not self.is_staged else {}
        more = {"forced": self.forced, "searched": searched, "measured": measured}
        found = plan.steps([wanted[_title(run)] for run in runs], **more)
        self.forced -= {step.title for step in found}
        self.planned += found
        return found

    def judged(self, study: str) -> list[dict]:
        """The rows of claims.json; none unless the last analysis succeeded: others leave those of the one before."""
        folder = self.folder(study)
        succeeded = record.read_json(folder / "status.json", {}).get("status") == "succeeded"
        return record.read_json(folder / "claims.json", []) if succeeded else []

    def open_claims(self, timed: bool) -> list[Open]:
        """Claims without a word that more seeds (`timed`: more processes) may give one, by each study's last analysis."""
        found = []
        for study in self.arms:
            own = self.compared(study)
            for row in self.judged(study):
                # no seeds decide what trained members gave no number of, as energy without a counter
                compared = own.get(row["id"]) if timed or row["n_seeds"] or not row.get("minutes") else None
                if not compared or row["decided"] or (compared[0][1] == TIMES) != timed:
                    continue
                look = row["next_look"] or (members.PROCESSES if timed and not row["n_seeds"] else 0)
                look = look if timed or look <= min(len(run.seed_list) for run, _ in compared) else 0
                chance = 1.0 if row["chance"] is None else row["chance"]
                if enough := row["seeds_to_decide"]:  # it is judged at looks alone
                    enough = next((n for n in self.looks_of(study) if n >= enough), enough)
                found.append(Open(study, row["id"], compared, look, chance, enough))
        return found

    def word_of(self, claim: Open) -> Open:
        """It at the seeds at which its word is expected, its last look's at most."""
        last = self.looks_of(claim.study)[-1]
        return claim._replace(look=min(claim.enough or last, last))

    def cost(self, asked: list[Open], slots: int = 0) -> float:
        """Predicted seconds to bring what these claims compare to their looks."""
        runs, most, seconds, slots = {}, {}, 0.0, slots or self.slots
        for claim in asked:
            for run, cell in claim.arms:
                runs[_title(run)] = run
                most[_title(run), cell] = max(claim.look, most.get((_title(run), cell), 0))
        for (title, cell), seeds in most.items():
            have, run = self.seeds[title].get(cell, ()), runs[title]
            new = max(0, seeds - len(have))
            if cell == claims.BEST and not have:
                new += sum(seed in run.pilot_seeds for _, of_cell in config.cells(run).values() for seed in of_cell)
            new += plan.trials_left(run) if cell == claims.TUNED else 0
            each = plan.process_seconds(run) * slots if cell == TIMES else plan.member_seconds(run) or 0.0
            seconds += new * each + (plan.NOTEBOOK_SECONDS if new else 0)
        for study in {run.study for run in runs.values()}:
            mine = [run for run in runs.values() if run.study == study]
            have = [len(seeds) for run in mine for cell, seeds in self.seeds[_title(run)].items() if cell != TIMES]
            every = [claim.look for claim in asked if claim.study == study and not claim.is_timed]
            new = max(0, max(every, default=0) - max(have, default=0))
            seconds += new * plan.prepare_seconds(mine[0]) + plan.NOTEBOOK_SECONDS * 2 * slots
        return seconds / slots

    # ---- what claims cost before anything runs

    def hours(self, asked: list[Open]) -> float:
        """Device-hours of what these lack until their looks; what they share counts once."""
        own = [arm for claim in asked for arm in claim.arms]
        has = {_title(run) for run, cell in own if cell != TIMES or self.seeds[_title(run)]}
        more = [Open(r.study, "", [(r, cell)], 1) for r, _ in own if _title(r) not in has for cell in _least(r)]
        gpus = max([1, *(run.compute.gpus for run, _ in own)])
        return self.cost([*asked, *more], slots=1) * gpus / 3600

    def priced(self) -> list[list[Open]]:
        """Each claim that has no word yet at each of its looks, with its chance of support by then."""
        found = []
        for study, known in self.published.items():
            own, looks = self.compared(study), self.looks_of(study)
            decided = {row["id"] for row in self.judged(study) if row["decided"]}
            for claim in (each for each in known.claims if each.id in own.keys() - decided):
                chances = power.by_look(known, claim, looks, self.options.scale)
                mine = [Open(study, claim.id, own[claim.id], look, chance) for look, chance in chances.items()]
                found.append([each for each in mine if not each.is_timed or each.look >= claims.MIN_PROCESSES])
        return list(filter(None, found))

    def choose(self, priced: list[list[Open]], limit: float) -> tuple[list[Open], list[Open]]:
        """(of each study the look that is likely to decide a claim for least; of all these looks, one of each study ahead,
        those that fit into so many hours)."""
        likely = sorted((e for looks in priced for e in looks if e.chance >= LIKELY), key=lambda e: self.hours([e]))
        best, found = list({each.study: each for each in reversed(likely)}.values())[::-1], {}
        for each in (*best, *likely):
            if each.name not in found and self.hours([*found.values(), each]) <= limit:
                found[each.name] = each
        return best, list(found.values())

    def prices(self) -> Iterator[str]:
        """For `plan`: a line per claim, what all take, the cheapest that decides one of each study, what a day decides."""
        priced = self.priced()
        yield f"\n{'claim':14} device-hours to a look (chance of support by then, true as claimed, at the most noise assumed)"
        for looks in priced:
            said = (f"{each.look:4}: {self.hours([each]):5.1f} ({each.chance:4.0%})" for each in looks)
            yield f"{looks[0].name:13}{''.join(said)}{' processes' * looks[0].is_timed}".replace("nan%", "   ?")
        first, last = (self.hours([looks[end] for looks in priced]) for end in (0, -1))
        yield f"{'together':14}{first:.1f} to the first looks, {last:.1f} to the last; what claims share counts once"
        what = f"cheapest decision of each study (chance at least {LIKELY:.0%})", "expected of one A100-day (24 hours)"
        for title, chosen in zip(what, self.choose(priced, 24.0), strict=True):
            named = ",".join(f"{each.study}/{each.id}" for each in chosen)
            none = "".join(f"; none of {study}" for study in self.arms if f"{study}/" not in named)
            yield f"{title}: {f'--claims {named}, ' * bool(named)}{self.hours(chosen):.1f} device-hours{none}"

    def list_left(self) -> None:
        """What open claims would take, for the pages too, and what there was no time for."""
        prices, commands = {study: {} for study in self.published}, {}
        for claim in (each for timed in (False, True) for each in self.open_claims(timed)):
            last, unit = self.looks_of(claim.study)[-1], "processes" if claim.is_timed else "seeds"
            seeds = claim.enough or last
            chance = " would decide it with 80 % chance" if claim.enough else " are its last look"
            chance += f" (its last look is at {last})" if seeds > last else ""
            took = progress.rough(self.cost([claim._replace(look=seeds)]))
            price = f"about {seeds} {unit} and {took} more on this machine{chance}"
            if not (claim.look or claim.enough):
                price = "no more seeds are foreseen to decide it: its last look is taken, or no number changes its word"
            if seeds > claims.FAR:
                price = f"{claims.roughly(seeds)} {unit} would decide it, far out of reach (its last look is at {last})"
            prices[claim.study][claim.id] = price
            if self.has_more(claim):
                command = f"./run_all.sh decide --scale {self.options.scale} --study {claim.study}"
                if self.options.command == "try":
                    minutes = self.cost([claim._replace(look=max(seeds, claim.look))]) // 60 + 2
                    again = re.sub(r" --max-minutes[ =]\S+", "", self.planned[-1].command)
                    command = f"{again} --max-minutes {minutes:.0f}"
                commands.setdefault(command + plan.sets_of(claim.arms[0][0]), []).append(claim.name)
        self.left += [f"{', '.join(names)}: {command}" for command, names in commands.items()]
        for study, own in prices.items():
            record.write_json(self.folder(study) / "prices.json", own)
        if late := [step for step in self.planned if step.state == "postponed" and step.kind != "analysis"]:
            names = progress.some([step.title for step in late])
            took = sum(step.seconds for step in late)
            minutes = math.ceil(took / 60)  # enough on one slot
            more = f"./run_all.sh full --scale {self.options.scale} --max-minutes {minutes}{plan.sets_of(late[0].run)}"
            self.left.append(f"what was not begun ({names}), about {progress.rough(took)} of one core:\n    {more}")


def _title(run) -> str:
    return f"{run.study}/{run.run_id}"


def _least(run) -> dict[str, list[int]]:
    """What is trained of a run of which times alone are asked: one seed of a cell, where it can be of one without pilots."""
    return {[*seeds_of(run)][-1]: run.seed_list[:1]}
