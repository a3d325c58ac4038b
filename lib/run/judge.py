"""The command `judge`: members' saved answers graded, the cost shown before anything is sent and recorded afterwards.

A study whose answers a judge grades has a module lib/<study>/judge.py (see lib/td_dpo/judge.py). Which judge, at which
price, is in params/judge.yaml or in the options.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from lib import config, record
from lib.errors import StudyError
from lib.run import members, model_card, pages, plan, progress, runner, runs, wandb

SETTINGS = config.ROOT / "params" / "judge.yaml"
LOG = "judging.jsonl"  # in a study's comparison/: what each call of this command took


class Settings(config.Section):
    model: str
    price_in: config.NonNegative | None = None  # per million prompt tokens
    price_out: config.NonNegative | None = None

    @property
    def prices(self) -> tuple[float | None, float | None]:
        return self.price_in, self.price_out

    @property
    def cache(self) -> Path:
        """Where every reply of this judge is kept for ever, whatever becomes of the runs."""
        return members.CACHE / "judgements" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', self.model)}.jsonl"


@dataclass
class Job:
    """What is to be graded in one study's folder of results."""

    results: Path
    study: ModuleType
    asked: dict[Path, list[dict]]  # requests of each member's folder
    unsaved: int  # members without answers
    before: dict  # calls, tokens and cost, as shown


def settings(options) -> Settings:
    """The options, else params/judge.yaml, whose prices are those of its own model only."""
    values = config.load_yaml(SETTINGS) if SETTINGS.exists() else {}
    if options.model and options.model != values.get("model"):
        values = {"model": options.model}
    for name in ("price_in", "price_out"):
        if price := getattr(options, name) or options.price:
            values[name] = price
    try:
        return Settings(**values)
    except ValidationError as error:
        config.raise_faults(error, str(SETTINGS), Settings)


def judge(options, roots: list[Path], wanted: set[tuple[str, str]] | None, outputs: Path) -> int:
    """Grade what is ungraded in these folders of results (outputs/<scale>-full…). `wanted`: (study, run_id), None for
    all. Exit code: 0 all are graded, 1 not all of them; MissingError without key, endpoint or questions, and nothing
    was sent."""
    given = settings(options)
    groups: dict[Path, list[Path]] = {}
    for root in roots:
        for folder in finished(root, options, wanted) if wandb.FROM not in root.name else ():
            groups.setdefault(folder.parents[2], []).append(folder)
    if not groups:
        print("nothing to grade: no finished member with evaluation.judge: mt_bench in", *(roots or ["outputs"]))
        return 0
    with contextlib.ExitStack() as locks:
        for root in () if options.dry_run else dict.fromkeys(results.parent for results in groups):
            locks.enter_context(progress.lock(root))
        jobs = [prepare(results, folders, given, options) for results, folders in groups.items()]
        code = int(any(job.unsaved for job in jobs))
        if options.dry_run:
            return code
        for job in jobs:  # nothing is sent before the cost of all has been shown
            if job.before["calls"]:
                job.study.probe()
        for job in jobs:
            code = max(code, grade(job, given, options))
    print(os.path.relpath(pages.index_html(outputs), os.getcwd()))
    return code


def grader(study: str) -> ModuleType | None:
    """lib/<study>/judge.py, None where there is no such study or it has none."""
    name = f"lib.{study}.judge"
    if study in config.studies() and importlib.util.find_spec(name):
        return importlib.import_module(name)
    return None


def finished(root: Path, options, wanted: set | None) -> list[Path]:
    """Folders of completed members whose answers a judge grades; a diverged one has no answers."""
    folders = []
    for done in sorted(root.glob("*/*/members/*/done.json")):
        study, run = done.parts[-5:-3]
        chosen = plan.matches(options, run) and (not options.study or study in options.study)
        if not chosen or wanted is not None and (study, run) not in wanted:
            continue
        spec, status = record.read_json(done.with_name("member.json")), (record.read_json(done) or {}).get("status")
        module = grader(study)
        if module and spec and status == "completed" and module.expects(spec):
            folders.append(done.parent)
    return folders


def prepare(results: Path, folders: list[Path], given: Settings, options) -> Job:
    """Say what there is to grade and what it will take."""
    study = importlib.import_module(f"lib.{results.name}.judge")
    saved = [folder for folder in folders if (folder / study.ANSWERS).exists()]
    reasons = {folder: reason for folder in saved if (reason := study.due(folder, given.model))}
    name = f"{results.parent.name}/{results.name}"
    why = ", ".join(sorted(set(reasons.values()) - {"not graded"}))
    graded = f"{len(saved) - len(reasons)} graded by {given.model}"
    print(f"{name}: {len(saved)} members with answers, {graded}, {len(reasons)} to grade" + f" ({why})" * bool(why))
    unsaved = len(folders) - len(saved)
    if unsaved:
        print(f"{name}: {unsaved} members saved no answers: train them again with evaluation.mt_bench")
    asked = study.read(reasons, given.model, options.data)
    if reasons and not options.dry_run:
        study.gather(saved, given.cache)
    before = study.cost(sum(asked.values(), []), study.load_cache(given.cache), given.prices)
    if reasons:
        print(f"{name}: {study.describe(before)}", flush=True)
    return Job(results, study, asked, unsaved, before)


def grade(job: Job, given: Settings, options) -> int:
    """Ask, write what came back into the members' records, and record what it took."""
    if not job.asked:
        return 0
    study, requests = job.study, sum(job.asked.values(), [])
    at_first, started, failed = study.load_cache(given.cache), time.time(), None
    try:
        study.grade_requests(requests, given.model, given.cache, workers=options.workers, on_graded=print_progress)
    except (StudyError, KeyboardInterrupt) as error:
        failed = error
    kept = study.load_cache(given.cache)
    judged = {
        folder: study.finish(folder, rows, kept, given.cache, given.model, given.prices)
        for folder, rows in job.asked.items()
        if failed is None or all(study.settled(kept, row["key"]) for row in rows)
    }
    graded_keys = {row["key"] for row in requests} & set(kept)
    spent = {
        name: sum(kept[key][name] - at_first.get(key, {}).get(name, 0) for key in graded_keys) for name in study.COUNTED
    }
    cost = study.price(spent["prompt_tokens"], spent["completion_tokens"], given.prices)
    (job.results / "comparison").mkdir(exist_ok=True)
    entry = {
        "model": given.model,
        "endpoint": study.host(study.endpoint()[0]),
        "started": started,
        "seconds": round(time.time() - started, 1),
        "members": len(job.asked),
        "told_before": job.before,
        "spent": spent,
        "cost": cost,
        "prices_per_million": given.prices,
        "ended": "completed" if failed is None else type(failed).__name__,
    }
    record.append_jsonl(job.results / "comparison" / LOG, entry)
    name, price = job.results.name, "cost unknown" if cost is None else f"{cost:.2f} in all"
    refused, unparsed = (sum(one[count] for one in judged.values()) for count in ("refused", "unparsed"))
    tokens = f"{spent['prompt_tokens']} prompt and {spent['completion_tokens']} reply tokens"
    print(f"{name}: {spent['calls']} calls, {tokens}, {price}")
    answers = f"{unparsed} answers without a grade, {refused} of these refused"
    print(f"{name}: {len(judged)} of {len(job.asked)} members graded; {answers}", flush=True)
    if judged:
        bring_up_to_date(job.results, list(judged), options)
    if isinstance(failed, KeyboardInterrupt):
        raise failed
    if failed is not None:
        print(record.escape_controls(record.redact(str(failed))), file=sys.stderr)
    return 1 if failed or refused else 0


def print_progress(done: int, of: int) -> None:
    if done % 50 == 0 or done == of:
        print(f"  {done} of {of} answers graded", flush=True)


def bring_up_to_date(results: Path, folders: list[Path], options) -> None:
    """What was made of the members: their pages, their runs' metrics, and the study's analysis."""
    for folder in folders:
        model_card.write(folder)
    listed = (results / "comparison" / "runs.json").exists()
    planned = runs.planned(results) if listed else []
    changed = {folder.parents[1] for folder in folders}
    for run in planned:
        if results / run.run_id in changed:
            runs.refresh(run)
    for folder in changed:
        if (folder / "run.ipynb").exists():
            pages.notebook_html(folder / "run.ipynb", folder / "run.html")
    if listed and not options.no_analysis:
        step = plan.analysis(results.name, results, planned[0].scale, "full", why="its answers were graded")
        runner.Runner([step], 1).run()
        progress.print_verdicts([step])
