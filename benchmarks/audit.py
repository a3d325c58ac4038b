"""How long reading and auditing preference pairs take, and how much memory: one process, one core.

    .venv/bin/python -m benchmarks.audit [--pairs 100000] [--read-only]

Pairs are of random words, as long as those of the step benchmark; the made model's tokenizer is trained on them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path

WORDS = {"prompt": 40, "chosen": 52, "rejected": 58}  # on average


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {name: " ".join(rng.choices(vocabulary, k=rng.randint(mean // 2, 2 * mean - mean // 2)))
                   for name, mean in WORDS.items()}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--read-only", action="store_true")
    options = parser.parse_args()
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from lib import config
    from lib.td_dpo import data

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.jsonl")
        write_pairs(path, options.pairs)
        yaml = config.ROOT / "params/td_dpo/laptop/td_dpo.yaml"
        run = config.load_run(yaml, scale="laptop", mode="full", overrides={"dataset.name": str(path)})
        run = config.members(run)[0].run
        before, cpu = time.perf_counter(), time.process_time()
        if options.read_only:
            rows = {name: len(pairs) for name, pairs in data.load_splits(run.dataset.model_dump())[0].items()}
        else:
            rows = data.audit(run)["rows"]
        seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
        megabytes = path.stat().st_size / 1e6
        print(
            f"{rows}, {megabytes:.0f} MB: {seconds:.1f} s by the clock, {cpu:.1f} s of the processor, {memory:.2f} GB"
        )


if __name__ == "__main__":
    main()
