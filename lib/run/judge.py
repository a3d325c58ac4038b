"""The command `judge`: members' saved MT-Bench answers graded, the cost shown before anything is sent and recorded
afterwards. How they are graded is in lib/td_dpo/judge.py."""

import os
import re
from collections import Counter
from pathlib import Path

from lib import config, record
from lib.run import members, model_card, pages, plan, progress, runner, runs
from lib.td_dpo import judge as mt_judge

SETTINGS = config.ROOT / "params" / "judge.yaml"


def settings(options) -> mt_judge.Judge:
    """params/judge.yaml, whose prices are those of its own model only, changed by the options."""
    given = config.validate(mt_judge.Judge, SETTINGS)
    if options.model and options.model != given.model:
        given = mt_judge.Judge(model=options.model)
    prices = {name: getattr(options, name) or options.price for name in ("price_in", "price_out")}
    return given.model_copy(update={name: price for name, price in prices.items() if price})


def judge(options, roots: list[Path], wanted: set[tuple[str, str]] | None, outputs: Path) -> int:
    """Grade what is ungraded in these folders of results (outputs/<scale>-full…). `wanted`: (study, run_id), None for
    all. Exit code: 0 all are graded, 1 not all of them; MissingError without key, endpoint or questions, and nothing
    was sent. Where the judge fails on the way, its replies are kept, and the same command grades the rest."""
    given, folders = settings(options), find_members(roots, options, wanted)
    cache = members.CACHE / "judgments" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', given.model)}.jsonl"
    places = () if options.dry_run else (cache.parent, *sorted({folder.parents[3] for folder in folders}))
    with progress.lock(*places):
        saved = [folder for folder in folders if (folder / mt_judge.ANSWERS).exists()]
        reasons = {folder: reason for folder in saved if (reason := mt_judge.reason_to_grade(folder, given.model))}
        states = Counter(reasons.values()) + Counter({"graded": len(saved) - len(reasons)})
        listed = ", ".join(f"{count} {state}" for state, count in states.items())
        print(f"members with MT-Bench answers: {listed or 'none'}; judge {given.model}")
        if unsaved := len(folders) - len(saved):
            print(f"members without saved answers: {unsaved}; train them again with evaluation.mt_bench")
        asked = {folder: mt_judge.requests(folder, given.model, options.data) for folder in reasons}
        kept = mt_judge.read_replies(cache, saved)
        waiting = mt_judge.list_unanswered(asked.values(), kept)
        expected = given.add_up(mt_judge.expected_reply(request) for request in waiting)
        print(f"to be sent: about {mt_judge.describe(expected)}", flush=True)
        if options.dry_run or not reasons:
            return int(unsaved > 0)
        spent = given.add_up(mt_judge.grade(waiting, kept, cache, options.workers))
        judged = [mt_judge.finish(folder, requests, kept, given) for folder, requests in asked.items()]
        print(f"spent: {mt_judge.describe(spent)}")
        refused, unparsed = (sum(one[name] for one in judged) for name in ("refused", "mt_bench_unparsed"))
        print(f"members graded: {len(judged)}; answers without a grade: {unparsed}, of them refused: {refused}")
        failed = [study for study in sorted({folder.parents[2] for folder in reasons}) if not refresh(study, options)]
    print(os.path.relpath(pages.index_html(outputs), os.getcwd()))
    return int(unsaved > 0 or refused > 0 or bool(failed))


def find_members(roots: list[Path], options, wanted: set | None) -> list[Path]:
    """Folders of completed members whose answers a judge grades; a diverged one has no answers."""
    folders = []
    for done in (path for root in roots for path in sorted(root.glob("*/*/members/*/done.json"))):
        study, run = done.parts[-5:-3]
        if not plan.matches(options, run, study) or (wanted is not None and (study, run) not in wanted):
            continue
        spec, status = record.read_json(done.with_name("member.json")), (record.read_json(done) or {}).get("status")
        if spec and status == "completed" and config.get(spec, "config.evaluation.judge") == "mt_bench":
            folders.append(done.parent)
    return folders


def refresh(results: Path, options) -> bool:
    """What was made of a study's members: their cards, their runs' metrics and pages, and the analysis, whose success is
    returned."""
    model_card.write_all(results)
    planned = runs.planned(results) if (results / "comparison" / "runs.json").exists() else []
    for run in planned:
        runs.refresh(run)
    for notebook in sorted(results.glob("*/run.ipynb")):
        pages.notebook_html(notebook)
    if planned:
        step = plan.analysis(results.name, results, planned[0].scale, "full", why="its answers were graded")
        return runner.Runner([step], 1).run()
    return True
