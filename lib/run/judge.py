"""The command `judge`: members' saved answers graded, the cost told before anything is sent and recorded afterwards.

A study whose answers a judge grades has lib/<study>/grading.py (due, read, gather, finish; see lib/td_dpo/grading.py)
and lib/<study>/judging.py, which asks the endpoint. Which judge, at which price, is in params/judge.yaml or in the
options.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from lib import config, record
from lib.errors import MissingError, StudyError
from lib.run import member_page, members, model_card, pages, plan, runner, runs, show, tracking
from lib.run.options import wants

SETTINGS = config.ROOT / "params" / "judge.yaml"
SAID_EVERY = 20.0  # seconds between two lines while it grades
LOG = "judging.jsonl"  # in a study's comparison/: what each call of this command took


class Settings(NamedTuple):
    model: str
    price_in: float | None  # per million prompt tokens
    price_out: float | None

    @property
    def prices(self) -> tuple[float | None, float | None]:
        return self.price_in, self.price_out

    @property
    def cache(self) -> Path:
        """Where every reply of this judge is kept for ever, whatever becomes of the runs."""
        return members.CACHE / "judgements" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.model)}.jsonl"


def settings(options) -> Settings:
    """The options, else params/judge.yaml, whose prices are those of its own model only."""
    found = config.load_yaml(SETTINGS) if SETTINGS.exists() else {}
    for key, value in found.items():
        if key not in Settings._fields:
            raise StudyError(f"{SETTINGS}: {key}", "unknown key", "one of " + ", ".join(Settings._fields), "remove it")
        if key != "model" and not (value is None or isinstance(value, int | float) and value >= 0):
            raise StudyError(f"{SETTINGS}: {key}", repr(value), "a price per million tokens, or null")
    model = options.model or found.get("model")
    if not model:
        raise StudyError("the judge", "no model named", "the name of the judge at its endpoint", "--model gpt-4")
    listed = found if model == found.get("model") else {}
    price_in, price_out = (
        own or options.price or listed.get(name)
        for own, name in ((options.price_in, "price_in"), (options.price_out, "price_out"))
    )
    return Settings(str(model), price_in, price_out)


def part(study: str, name: str):
    """lib/<study>/<name>.py, None where the study has none."""
    return importlib.import_module(f"lib.{study}.{name}") if importlib.util.find_spec(f"lib.{study}.{name}") else None


def command(options, roots: list[Path], wanted: set[tuple[str, str]] | None, outputs: Path) -> int:
    """`judge`, with what is missing in one line and the index page brought up to date."""
    try:
        code = judge(roots, options, wanted)
    except MissingError as error:
        print(config.Finding("error", error.where, error.found, error.mend), file=sys.stderr)
        return error.exit_code
    if roots and not options.dry_run:
        print(os.path.relpath(pages.index_html(outputs), os.getcwd()))
    return code


def judge(roots: list[Path], options, wanted: set[tuple[str, str]] | None) -> int:
    """Grade what is ungraded in these folders of results (outputs/<scale>-full…). `wanted`: (study, run_id), None for
    all. Exit code: 0 all are graded, 1 not all of them, 3 no key, endpoint or questions (nothing was sent)."""
    given = settings(options)
    found = [folder for root in roots if tracking.FROM not in root.name for folder in finished(root, options, wanted)]
    if not found:
        print("nothing to grade: no finished member with evaluation.judge: mt_bench in", *(roots or ["outputs"]))
        return 0
    with contextlib.ExitStack() as locks:
        if not options.dry_run:
            for root in dict.fromkeys(folder.parents[3] for folder in found):
                locks.enter_context(runner.locked(root))
        jobs = [
            job
            for results in dict.fromkeys(folder.parents[2] for folder in found)
            if (job := _job(results, [f for f in found if f.parents[2] == results], given, options))
        ]
        code = max((1 for job in jobs if job.unsaved), default=0)
        if options.dry_run:
            return code
        for job in jobs:  # nothing is sent before all of it has been told
            if job.before["calls"]:
                job.judging.probe()
        for job in jobs:
            code = max(code, _grade(job, given, options))
    return code


def finished(root: Path, options, wanted: set | None) -> list[Path]:
    """Folders of completed members whose answers a judge grades."""
    found = []
    for done in sorted(root.glob("*/*/members/*/done.json")):
        folder, run, study = done.parent, done.parents[2].name, done.parents[3].name
        if (
            study not in config.studies()
            or not wants(options, run)
            or options.study
            and study not in options.study
            or wanted is not None
            and (study, run) not in wanted
        ):
            continue
        grading, spec = part(study, "grading"), record.read_json(folder / "member.json")
        completed = (record.read_json(done) or {}).get(
            "status"
        ) == "completed"  # a diverged one has no answers to grade
        if grading and spec and completed and grading.expects(spec):
            found.append(folder)
    return found


class Job(NamedTuple):
    """What is to be graded in one study's folder of results: `asked` {member's folder: requests}."""

    results: Path
    asked: dict[Path, list[dict]]
    unsaved: int  # members without answers
    before: dict  # calls, tokens and cost, as told
    grading: object
    judging: object


def _job(results: Path, folders: list[Path], given: Settings, options) -> Job:
    """Say what there is to grade and what it will take."""
    study = results.name
    grading, judging = part(study, "grading"), part(study, "judging")
    saved = [f for f in folders if (f / grading.ANSWERS).exists()]
    reasons = {folder: reason for folder in saved if (reason := grading.due(folder, given.model))}
    name = f"{results.parent.name}/{study}"
    why = ", ".join(sorted(set(reasons.values()) - {"not graded"}))
    print(
        f"{name}: {len(saved)} members with answers, {len(saved) - len(reasons)} graded by {given.model}, "
        f"{len(reasons)} to grade" + (f" ({why})" if why else "")
    )
    if unsaved := len(folders) - len(saved):
        print(
            f"{name}: {unsaved} members saved no answers (trained without evaluation.mt_bench): train them again with it"
        )
    if reasons and not options.dry_run:
        judging.endpoint()  # before the long work of looking at what is to be asked
    asked = grading.read(reasons, given.model, options.data)
    grading.gather(saved if reasons and not options.dry_run else (), given.cache)
    before = judging.cost(
        [row for rows in asked.values() for row in rows], judging.load_cache(given.cache), *given.prices
    )
    if reasons:
        print(f"{name}: {judging.told(before)}", flush=True)
    return Job(results, asked, unsaved, before, grading, judging)


def _grade(job: Job, given: Settings, options) -> int:
    """Ask, write what came back into the members' records, and record what it took."""
    if not job.asked:
        return 0
    at_first, started, failed = job.judging.load_cache(given.cache), time.time(), None
    try:
        job.judging.grade_requests(
            [row for rows in job.asked.values() for row in rows],
            given.model,
            given.cache,
            workers=options.workers,
            on_graded=told_now_and_then(),
        )
    except (StudyError, KeyboardInterrupt) as error:
        failed = error
    kept = job.judging.load_cache(given.cache)
    made = {
        folder: job.grading.finish(folder, rows, kept, given.cache, given.model, given.prices)
        for folder, rows in job.asked.items()
        if failed is None or all(job.judging.settled(kept, row["key"]) for row in rows)
    }
    _log(job, given, at_first, kept, started, failed)
    refused = sum(one["refused"] for one in made.values())
    print(
        f"{job.results.name}: {len(made)} of {len(job.asked)} members graded; "
        f"{sum(one['unparsed'] for one in made.values())} answers without a grade, {refused} of these refused"
    )
    if made:
        bring_up_to_date(job.results, list(made), options)
    if isinstance(failed, KeyboardInterrupt):
        raise failed
    if failed is not None:
        print(record.inert(record.redact(str(failed))), file=sys.stderr)
    return 1 if failed or refused else 0


def told_now_and_then():
    """A plain line now and then, for a log and for a person."""
    last = [time.monotonic()]

    def told(done: int, of: int) -> None:
        if done == of or time.monotonic() - last[0] > SAID_EVERY:
            last[0] = time.monotonic()
            print(f"  {done} of {of} answers graded", flush=True)

    return told


def _log(job: Job, given: Settings, at_first: dict, kept: dict, started: float, failed: BaseException | None) -> None:
    """What this call took, on paper and on the screen: counted by the endpoint, or estimated where it counts
    nothing."""
    mine = {row["key"] for rows in job.asked.values() for row in rows}
    spent = {
        name: sum(kept[key][name] - at_first.get(key, {}).get(name, 0) for key in mine if key in kept)
        for name in job.judging.COUNTED
    }
    cost = job.judging.price(spent["prompt_tokens"], spent["completion_tokens"], *given.prices)
    (job.results / "comparison").mkdir(exist_ok=True)
    record.append_jsonl(
        job.results / "comparison" / LOG,
        {
            "model": given.model,
            "endpoint": job.judging.host(job.judging.endpoint()[0]),
            "started": started,
            "seconds": round(time.time() - started, 1),
            "members": len(job.asked),
            "told_before": job.before,
            "spent": spent,
            "cost": cost,
            "prices_per_million": given.prices,
            "ended": "completed" if failed is None else type(failed).__name__,
        },
    )
    print(
        f"{job.results.name}: {spent['calls']} calls, {spent['prompt_tokens']} prompt and {spent['completion_tokens']} reply "
        f"tokens, {'cost unknown' if cost is None else f'{cost:.2f} in all'}",
        flush=True,
    )


def bring_up_to_date(results: Path, folders: list[Path], options) -> None:
    """What was made of the members: their pages, their runs' metrics, and the study's analysis."""
    for folder in folders:
        model_card.write(folder)
    listed = (results / "comparison" / "runs.json").exists()
    planned = runs.planned(results) if listed else []
    for run in (run for run in planned if any(folder.parents[1].name == run.run_id for folder in folders)):
        runs.refresh(run)
    for folder in dict.fromkeys(folder.parents[1] for folder in folders):
        member_page.write_pages(folder, (record.read_json(folder / "status.json") or {}).get("command", ""))
    if listed and not options.no_analysis:
        step = plan.analysis(results.name, results, planned[0].scale, "full", why="its answers were graded")
        runner.Runner([step], 1).run()
        show.verdicts([step])
