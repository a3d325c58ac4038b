"""The commands `sync` and `pull`: W&B brought up to date with the records, and the studies judged from what W&B
holds."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

from lib import config
from lib.run import plan, progress, runner, wandb


def sync(roots: list[Path], options) -> int:
    """Send what W&B lacks of the records in these folders (outputs/<scale>-full…). Exit code: 0 W&B is up to date, 1 it
    is not yet, 3 it cannot be reached or there is no key."""
    done = [path for root in roots if wandb.FROM not in root.name for path in root.glob("*/*/members/*/done.json")]
    folders = sorted({path.parents[2] for path in done})
    folders = [folder for folder in folders if plan.matches(options, folder.name, folder.parent.name)]
    settings = {folder: config.load_yaml(folder / "config.yaml").get("wandb") or {} for folder in folders}
    folders = [folder for folder in folders if settings[folder].get("mode") != "disabled"]
    if not folders:
        where = ", ".join(map(str, roots)) or "outputs/"
        print(f"nothing to send: no finished member in {where}, or wandb.mode: disabled in its YAML")
        return 0
    address = [options.entity or "", options.project or ""]
    with contextlib.ExitStack() as locks:
        for root in dict.fromkeys(folder.parents[1] for folder in folders):
            locks.enter_context(progress.lock(root))  # a runner at work sends by itself
        # A process of its own: the client's core can crash, and some of its calls never return.
        code = subprocess.call([sys.executable, "-P", "-m", "lib.run.wandb", "sync", *address, *map(str, folders)])
    if code == -signal.SIGALRM:
        print(f"W&B kept one call waiting for {wandb.STALL_SECONDS} s; fix: try again later", file=sys.stderr)
    return code if code in (0, 3) else 1


def pull(runs: list, outputs: Path, made_in: str, options) -> int:
    """Fetch the records of these runs from W&B, and judge them by the same analysis in a folder of their own.
    `made_in`: the name of the folder in outputs/ that they were made in."""
    root, steps = outputs / f"{made_in},{wandb.FROM}", []
    for study in dict.fromkeys(run.study for run in runs):
        mine = [run for run in runs if run.study == study]
        address = {"entity": options.entity or mine[0].wandb.entity}
        address["project"] = options.project or mine[0].wandb.project or wandb.PROJECT
        results = wandb.fetch(root, f"{made_in}/{study}", run_ids=[run.run_id for run in mine], **address)
        steps.append(plan.analysis(study, results, options.scale, "full"))
    with progress.lock(root):
        ok = runner.Runner(steps, 1).run()
    return 0 if ok else 1
