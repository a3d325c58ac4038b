"""What a GPU has to show at the paper's scale, in one command; without one, `--small` shows that the command works.

    .venv/bin/python benchmarks/gpu_checks.py            about 15 minutes on one H100; nothing is downloaded
    .venv/bin/python benchmarks/gpu_checks.py --small    a tiny shape on the CPU

TD-DPO steps of a Llama of the 7B shape with random weights (LoRA r 64, gradient checkpointing, bf16 compute), with an
NF4 and a bf16 base: pairs a second, peak memory. With two GPUs or more the same sharded over two (FSDP2), with its
losses beside the unsharded ones. `--grid` adds the laptop study on the GPU.
Pairs are random tokens; lengths are log-normal (medians 250 for prompts and 300 for answers, sigma 0.8, cut at 2,048 a
pair's side): assumed to be like chat data, not measured. Throughput against TRL is benchmarks/preference_step.py's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks import random_llama
from lib import models, record, training
from lib.errors import OutOfMemory
from lib.run import sharding
from lib.td_dpo.engine import row_tokens, sequence_logprobs
from lib.td_dpo.study import Loss, Training
from lib.td_dpo.trainer import PreferenceTrainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip
WARM_UP = 2  # steps before the clock counts


def pairs(count: int, vocabulary: int, longest: int, scale: float, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)

    def tokens(median: float, most: int) -> list[int]:
        length = int(np.clip(draw.lognormal(np.log(median * scale), 0.8), 2, most))
        return draw.integers(3, vocabulary, length).tolist()

    made = []
    for index in range(count):
        prompt = tokens(250, longest // 2)
        sides = {side: tokens(300, longest - len(prompt)) for side in ("chosen_ids", "rejected_ids")}
        made.append({"pair": index, "prompt_ids": prompt, **sides})
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def measure(argument: dict) -> dict:
    """Train and measure, in this process or as one of a sharded job: {losses, pairs_per_second, ...}."""
    shape, cuda = argument["shape"], torch.cuda.is_available()
    storage = "bfloat16" if training.world() > 1 and argument["quantization"] == "nf4" else None
    base = random_llama.random_llama(shape, quantization=argument["quantization"], quant_storage=storage)
    model = models.add_lora(base, {"lora_r": argument["rank"], "target_modules": "all-linear"}, seed=1)
    section = argument["training"]
    rows = pairs(
        section["max_steps"] * section["global_batch_size"],
        shape["vocab_size"],
        argument["longest"],
        argument["scale"],
    )
    with model.disable_adapter():
        reference = {"train": sequence_logprobs(model, rows)}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    kind = sharding.sharded_class(PreferenceTrainer) if training.world() > 1 else PreferenceTrainer
    with tempfile.TemporaryDirectory() as folder:
        run = SimpleNamespace(loss=Loss(name="td_dpo", beta=0.05, tau=1.0), training=Training(**section))
        tables = reference | {"validation": torch.empty(0, 2)}
        given = SimpleNamespace(rows={"train": rows, "validation": []}, reference=tables)
        kind(run, 1, Path(folder), given, model).fit()
        history, timing = (record.read_jsonl(Path(folder) / f"{name}.jsonl") for name in ("history", "timing"))
    timed = timing[WARM_UP:] or timing
    return {
        "losses": [row["loss"] for row in history if "loss" in row],
        "pairs_per_second": statistics.median(t["pairs_per_second"] for t in timed) if timed else None,
        "tokens_per_second": statistics.median(t["tokens_per_second"] for t in timed) if timed else None,
        "tokens_per_pair": statistics.mean(map(row_tokens, rows)),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def checks(small: bool, steps: int) -> list[dict]:
    """One row per check; a row that could not be had says why."""
    batch = 2 if small else 4
    argument = {"shape": SMALL if small else random_llama.LLAMA2_7B, "rank": 4 if small else 64,
                "longest": 128 if small else 2048, "scale": 0.05 if small else 1.0,
                "training": {"max_steps": steps, "global_batch_size": 4 * batch, "per_device_train_batch_size": batch,
                             "learning_rate": 1e-5, "bf16": True, "gradient_checkpointing": True}}  # fmt: skip
    rows = []
    for quantization, processes in (("nf4", 1), ("none", 1), ("nf4", 2)):
        name = f"{'NF4' if quantization == 'nf4' else 'bf16'} base, {processes} process{'es' * (processes > 1)}"
        if processes > 1 and not small and torch.cuda.device_count() < processes:
            rows.append({"check": name, "left_out": f"{torch.cuda.device_count()} GPU here"})
            continue
        now, started = {**argument, "quantization": quantization}, time.monotonic()
        try:
            found = measure(now) if processes == 1 else sharding.launch("benchmarks.gpu_checks:measure", now, processes)
        except (torch.OutOfMemoryError, OutOfMemory) as error:
            found = {"left_out": str(error).splitlines()[0]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows.append({"check": name, **found, "seconds": time.monotonic() - started})
    one, two = rows[0], rows[2]
    if "losses" in one and "losses" in two:
        two["largest_difference_of_loss"] = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
    return rows


def laptop_grid() -> dict:
    """The laptop study of TD-DPO with its members on the GPU, timed as a whole."""
    started = time.monotonic()
    command = [str(ROOT / "run_all.sh"), "full", "--scale", "laptop", "--study", "td_dpo", "--set", "compute.gpus=1"]
    code = subprocess.call(command)
    return {"check": "laptop study on the GPU", "seconds": time.monotonic() - started, "exit_code": code}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny shape: does this command work?")
    parser.add_argument("--grid", action="store_true", help="the laptop study on the GPU as well")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks" / "gpu_checks.json")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        print("no CUDA device: run this on a machine with a GPU; --small shows that it works", file=sys.stderr)
        return 3
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = checks(options.small, options.steps) + ([laptop_grid()] if options.grid else [])
    record.write_json(options.out, {"device": device, "small": options.small, "torch": torch.__version__, "rows": rows})
    print(f"{device}{', a tiny shape' if options.small else ', Llama of the 7B shape, random weights'}")
    for row in rows:
        print(
            json.dumps(
                {
                    key: round(value, 4) if isinstance(value, float) else value
                    for key, value in row.items()
                    if key != "losses"
                }
            )
        )
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
