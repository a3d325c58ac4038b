"""Wall-clock of a whole grid: this repository's runner against trl.DPOTrainer run cell by cell.

    python -m benchmarks.grid                   48 cells each (12 cells of TD-DPO, 4 of DPO, three seeds), laptop scale
    python -m benchmarks.grid --trl-cells 6     the same with only 6 cells of TRL, whose mean stands for the others
    python -m benchmarks.grid --scale small     16 cells (one seed): a pretrained model, adapters on its last 8 layers
    python -m benchmarks.grid --data PATH       the laptop's on real chat pairs, with a made model of preference_step.py's
                                                vocabulary, width and depth

Both train the same model on the same pairs with the same trained layers, steps, batches, evaluations (validation
implicit accuracy every eval_steps) and kept checkpoints. Neither samples answers while it trains, and neither is charged
for making the model and the pairs; ours also scores the test pairs, analyses and writes its pages.

Ours is `python -m lib full`: notebooks, a pool of forked members, one thread and one core each. TRL is run in two ways,
with all cores and with its reference precomputed and cached on disk. At its best: one process that loops over the
cells, its head made to score completion tokens only, and charged neither for imports nor for tokenization (rows are
token ids). As shipped: a process per cell, as a shell loop over `trl dpo` starts them, and its head as it is on a CPU;
tokenization is not charged here either. Every cell has its sigmoid loss, since the objective's share of a step is
small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

import yaml

from benchmarks.preference_step import SHAPES
from lib import hub
from lib.run import pool

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("dpo", "td_dpo")
CHAT = {"train": 1600, "validation": 32, "test": 32}  # real pairs; fewer would not give a 32k vocabulary
ARMS = {"best": "TRL at its best, one process", "shipped": "TRL as shipped, a process per cell"}


def study(folder: Path, smallest: bool, data: str | None = None) -> None:
    """The YAMLs of both methods at the scale that `folder` is called, every cell with three seeds, with one at small
    scale; what TRL would not do as well is left out.

    With `data`, real pairs and the vocabulary, width and depth of preference_step.py's model: ten steps of 8 pairs a
    cell, so that it ends within the hour.
    """
    folder.mkdir(parents=True)
    if data:
        from lib.td_dpo.data import load_splits

        found = load_splits({"name": data, "on_bad_row": "drop"})[0]
        (folder / "pairs").mkdir()
        for split, count in CHAT.items():
            rows = found[split][: 64 if smallest else count]
            (folder / "pairs" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for method in METHODS:
        run = yaml.safe_load((ROOT / "params/td_dpo" / folder.name / f"{method}.yaml").read_text())
        grid = {"beta": [0.01, 0.05, 0.5, 2.5]} | ({"tau": [0.5, 1.0, 2.0]} if method == "td_dpo" else {})
        seeds = [42] if folder.name == "small" else [42, 43, 44]
        run |= {"grid": [{"product": grid}], "seed_list": seeds}
        run["evaluation"] |= {"judge": "none", "kl_prompts": 0}
        run["optuna"] |= {"n_trials": 0}
        if smallest:
            run |= {"grid": [{"product": {key: values[:2] for key, values in grid.items()}}], "seed_list": [42]}
            run["training"] |= {"max_steps": 4, "eval_steps": 2, "save_steps": 2}
            if recipe := run["model"].get("recipe"):
                recipe |= {"vocab_size": 384, "hidden_size": 32, "layers": 2, "sft_steps": 2}
            run["dataset"] |= {"train_pairs": 32, "validation_pairs": 8, "test_pairs": 8}
        if data:
            run["dataset"] |= {"name": str(folder / "pairs")}
        if data and not smallest:
            vocabulary, hidden, _, layers, heads = SHAPES["small"]
            run["model"]["recipe"] |= {
                "vocab_size": vocabulary,
                "hidden_size": hidden,
                "layers": layers,
                "heads": heads,
                "sft_steps": 10,
                "sft_batch_size": 8,
            }
            run["training"] |= {"max_steps": 10, "global_batch_size": 8, "per_device_train_batch_size": 8, "eval_steps": 5,
                                "save_steps": 5}  # fmt: skip
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(run, sort_keys=False))


def scale_of(home: Path) -> str:
    return next((home / "params/td_dpo").iterdir()).name


def records_of(home: Path) -> Path:
    return home / "outputs" / f"{scale_of(home)}-full,grid=all" / "td_dpo"


def command(home: Path, *arguments: str, jobs: int | None = None) -> tuple[list[str], dict]:
    environment = {
        **os.environ,
        "STUDY_OUTPUTS": str(home / "outputs"),
        "STUDY_CACHE": str(home / "cache"),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(home),
    }
    environment.pop("STUDY_POOL", None)
    slots = ["--jobs", str(jobs)] if jobs else []
    return [
        sys.executable,
        "-m",
        "lib",
        *arguments,
        "--scale",
        scale_of(home),
        "--params",
        str(home / "params"),
        *slots,
    ], environment


def prepare(home: Path, jobs: int | None) -> None:
    """One cell of ours: it makes the model and its reference, which both arms then find, and warms the disk's cache."""
    (fetched := hub.cache_folder() / "models").mkdir(parents=True, exist_ok=True)
    (home / "cache").mkdir()
    (home / "cache/models").symlink_to(fetched)  # that `./run_all.sh fetch` has got
    one = ("--set", "seed_list=[42]", "--set", "grid=[{cells: [{beta: 0.05}]}]")
    line, environment = command(home, "full", "--run", "dpo", *one, jobs=jobs)
    subprocess.run(line, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def ours(home: Path, jobs: int | None) -> dict:
    """One `full` of the grid in a fresh outputs folder: seconds, and where they went."""
    shutil.rmtree(home / "outputs", ignore_errors=True)
    # --claims: the proposed run would also time steps against DPO's, which TRL does not
    line, environment = command(home, "full", "--grid", "all", "--claims", "td_dpo/C1", jobs=jobs)
    first: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        """When each run's first optimizer step was recorded."""
        while not over.wait(0.02):
            for method in METHODS:
                recorded = (records_of(home) / method).glob("members/*/history.jsonl")
                if method not in first and any(path.stat().st_size for path in recorded):
                    first[method] = time.time()

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, worked = time.time(), processor_seconds()
    done = subprocess.run(line, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended, worked = time.time(), processor_seconds() - worked
    over.set()
    watcher.join()
    if done.returncode:
        sys.exit(f"the grid failed with {done.returncode}:\n{done.stdout[-3000:]}")
    records = records_of(home)
    members = [path.parent for path in records.glob("*/members/*/metrics.json")]
    whole = sum(json.loads((m / "metrics.json").read_text())["seconds"] for m in members)
    steps = sum(json.loads(row)["seconds"] for m in members for row in (m / "timing.jsonl").read_text().splitlines())
    runs = [json.loads((records / method / "status.json").read_text()) for method in METHODS]
    cells = {method: notebook_start(records / method / "run.ipynb") for method in METHODS}
    asked, came = notebook_start(records / "comparison" / "analysis.ipynb")
    leader = min(METHODS, key=first.__getitem__)  # the other's members wait for its slots
    kernel = came - asked  # of a notebook whose turn comes while the pool is there; the first ones wait for its imports
    return {
        "seconds": ended - began,
        "processor": worked,
        "members": len(members),
        "member_seconds": whole,
        "step_seconds": steps,
        "first_step": kernel + first[leader] - cells[leader][1],
        "before": min(start for _, start in cells.values()) - began,
        "after": ended - max(run["ended"] for run in runs),
    }


def processor_seconds() -> float:
    """Of all processes that this one, or one of them, has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def notebook_start(path: Path) -> tuple[float, float]:
    """When papermill asked for a kernel, and when the first cell ran."""
    notebook = json.loads(path.read_text())
    times = notebook["metadata"]["papermill"]["start_time"], notebook["cells"][0]["metadata"]["papermill"]["start_time"]
    return tuple(datetime.fromisoformat(text).timestamp() for text in times)


def trl(spec: dict) -> None:
    """Train the cells in this process, one after the other; prints each one's seconds and best accuracy as a JSON
    line."""
    import torch
    import transformers
    import trl.trainer.utils
    from datasets import Dataset, disable_progress_bars, load_from_disk
    from trl import DPOConfig

    from benchmarks.preference_arms import Stock
    from lib import models

    torch.set_num_threads(spec["threads"])
    disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if spec["arm"] == "best":
        trl.trainer.utils._use_triton = lambda device: True  # its head scores completion tokens only, on the CPU too
    given, training = models.load_inputs(Path(spec["shared"]), "rows"), spec["training"]
    needed = (
        training["max_steps"] * training["per_device_train_batch_size"]
    )  # a reference that is not used is not waited for
    rows = {}
    for split, table in given.rows.items():
        if split == "train" and needed < len(table):
            table = random.Random(0).sample(table, needed)
        table = Dataset.from_list([{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in table])
        place = Path(spec["shared"]).parent / f"trl-{split}"
        if not place.exists():
            table.save_to_disk(place)
        rows[split] = load_from_disk(place)  # rows in memory only would never find TRL's cache again

    for beta, seed in spec["cells"]:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            args = DPOConfig(
                output_dir=folder,
                beta=beta,
                seed=seed,
                max_steps=training["max_steps"],
                max_length=None,
                per_device_train_batch_size=training["per_device_train_batch_size"],
                per_device_eval_batch_size=64,
                learning_rate=training["learning_rate"],
                weight_decay=training["weight_decay"],
                optim="adamw_torch_fused",
                lr_scheduler_type=training["lr_scheduler_type"],
                max_grad_norm=training["max_grad_norm"],
                warmup_steps=round(training["warmup_ratio"] * training["max_steps"]),
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=64,
                eval_strategy="steps",
                eval_steps=training["eval_steps"],
                save_strategy="steps",
                save_steps=training["save_steps"],
                save_total_limit=2,
                load_best_model_at_end=True,
                metric_for_best_model="eval_rewards/accuracies",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=True,
                gradient_checkpointing=False,
                bf16=False,
            )
            model, peft = models.load_causal_lm(given.base, device="cpu"), spec["peft"]
            trainer = Stock(
                model,
                args=args,
                peft_config=peft and models.lora_config(model, peft),
                train_dataset=rows["train"],
                eval_dataset=rows["validation"],
                processing_class=given.tokenizer,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        seconds = time.perf_counter() - began - trainer.reference_seconds  # which ours is not charged for either
        print(
            json.dumps(
                {
                    "beta": beta,
                    "seed": seed,
                    "seconds": seconds,
                    "reference": trainer.reference_seconds,
                    "accuracy": trainer.state.best_metric,
                }
            ),
            flush=True,
        )


def cells(home: Path) -> list[tuple[float, int]]:
    """(beta, seed) of every member, spread so that the first few are of all kinds."""
    records = records_of(home)
    found = [json.loads(path.read_text()) for path in sorted(records.glob("*/members/*/member.json"))]
    found = [(m["cell"]["loss.beta"], m["seed"]) for m in found]
    return found[::7] + [cell for index, cell in enumerate(found) if index % 7]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, help="members at a time of ours (default: one per core)")
    parser.add_argument("--threads", type=int, default=pool.cores(), help="of TRL's process (default: all cores)")
    parser.add_argument(
        "--trl-cells", type=int, help="train only so many cells with TRL; the others are taken to be like them"
    )
    parser.add_argument(
        "--shipped-cells", type=int, default=3, help="cells of TRL as shipped, each a process (default: 3)"
    )
    parser.add_argument(
        "--data", help="real preference pairs, with a larger model (as wide and deep as preference_step.py's)"
    )
    parser.add_argument("--scale", choices=["laptop", "small"], default="laptop")
    parser.add_argument("--smallest", action="store_true", help="six cells of a few steps: does the benchmark run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        trl(json.loads(Path(options.worker).read_text()))
        return 0
    with tempfile.TemporaryDirectory(prefix="grid-") as place:
        home = Path(place)
        study(home / "params/td_dpo" / options.scale, options.smallest, options.data)
        prepare(home, options.jobs)
        found = ours(home, options.jobs)
        todo = cells(home)
        run = yaml.safe_load((home / "params/td_dpo" / options.scale / "dpo.yaml").read_text())
        training = run["training"]
        shared = next((home / "cache").glob("td_dpo/*/complete.json")).parent
        spec = {
            "threads": options.threads,
            "shared": str(shared),
            "peft": run["model"].get("peft"),
            "training": training | {"learning_rate": float(training["learning_rate"])},
        }
        theirs = {
            "best": run_trl(home, spec | {"arm": "best", "cells": todo[: options.trl_cells]}),
            "shipped": [
                row
                for cell in todo[: options.shipped_cells]
                for row in run_trl(home, spec | {"arm": "shipped", "cells": [cell]})
            ],
        }
    print(report(found, theirs, len(todo), options))
    return 0


def run_trl(home: Path, spec: dict) -> list[dict]:
    """The cells of `spec` in one process of TRL; as shipped, a cell's seconds are the process's, its imports
    included."""
    (home / "spec.json").write_text(json.dumps(spec))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(spec["threads"])}
    began = time.perf_counter()
    reported = subprocess.run(
        [sys.executable, "-m", "benchmarks.grid", "--worker", str(home / "spec.json")],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    whole = time.perf_counter() - began
    rows = [json.loads(row) for row in reported.splitlines() if row.startswith("{")]
    if spec["arm"] == "shipped":
        rows[0]["seconds"] = whole - rows[0]["reference"]
    return rows


def report(found: dict, theirs: dict[str, list[dict]], count: int, options: argparse.Namespace) -> str:
    share = 100 / (found["member_seconds"] or 1)
    jobs = options.jobs or pool.cores()
    table = []
    for arm, rows in theirs.items():
        if rows:
            each = statistics.mean(row["seconds"] for row in rows)
            measured = "measured" if len(rows) == count else f"mean of {len(rows)} cells x {count}"
            table.append(
                f"| {ARMS[arm]}, {options.threads} threads ({measured}) | {each * count:.0f} | {each:.1f} | "
                f"{each * count / found['seconds']:.1f} |"
            )
    return "\n".join(
        [
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            "",
            f"| {count} cells | seconds | per cell | times ours |",
            "|---|---|---|---|",
            f"| ours, {jobs} members at a time | {found['seconds']:.0f} | {found['seconds'] / count:.1f} | |",
            *table,
            "",
            f"Ours: {found['before']:.1f} s until the first notebook's first cell (plan, preflight, the pool's imports), "
            f"{found['after']:.1f} s after the last run (analysis, pages); members {found['member_seconds']:.0f} s on {jobs} "
            f"slots, of which optimizer steps {found['step_seconds'] * share:.0f} %, the rest loading, evaluating, scoring and "
            f"saving; {found['processor']:.0f} s of processor in all. From a run's turn, the pool being there, to its "
            f"first recorded step: {found['first_step']:.1f} s.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
