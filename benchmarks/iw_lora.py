"""What IW-LoRA costs at DeBERTaV3-base's true shape, with random weights: python -m benchmarks.iw_lora [--rounds 12]

Steps of LoRA, IW-LoRA and AdaLoRA interleaved on the same batches in one process, so that the ratios hold whatever else
the machine does; the penalty alone; and one pass of calibration. Prints a Markdown table with machine and versions.
Goals: the penalty below 3 % of a step, calibration below 2 % of a paper-scale run in forward and backward passes.
"""

import argparse
import os
import platform
import statistics
import time

import torch
import transformers
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from lib import config, models
from lib.iw_lora import penalty, trainer
from lib.iw_lora.study import Adapter, Training

BASE = {  # microsoft/deberta-v3-base's config.json
    "vocab_size": 128_100, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 512, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1,
    "position_biased_input": False, "layer_norm_eps": 1e-7, "pooler_hidden_size": 768, "pooler_dropout": 0.0,
}  # fmt: skip
SMALL = {
    **BASE,
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pooler_hidden_size": 32,
}
LORA = {"type": "lora", "rank": 8, "lora_alpha": 16}
ADALORA = {"type": "adalora", "lora_alpha": 24, "init_r": 12, "target_r": 8, "tinit": 0, "tfinal": 1}


def build(shape: dict, adapter: dict, steps: int, device) -> torch.nn.Module:
    torch.manual_seed(0)
    return trainer.add_adapters(
        DebertaV2ForSequenceClassification(DebertaV2Config(**shape, num_labels=3)).to(device), Adapter(**adapter), steps
    )


def timed(action) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def penalty_passes(model, coefficients):
    """Forward and backward of the penalty alone."""
    penalty.penalty(model, coefficients).backward()
    model.zero_grad(set_to_none=True)


def measure(shape: dict, rounds: int, batch: int, tokens: int, delta_t: int) -> dict:
    device, warm_up = models.current_device(), 2
    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "input_ids": torch.randint(10, shape["vocab_size"], (batch, tokens), generator=generator).to(device),
            "attention_mask": torch.ones(batch, tokens, dtype=torch.long, device=device),
            "labels": torch.randint(0, 3, (batch,), generator=generator).to(device),
        }
        for _ in range(3)
    ]
    training = Training(max_steps=1, batch_size=batch, learning_rate=2e-4)
    total = rounds + warm_up
    made = {
        "LoRA": build(shape, LORA, total, device),
        "IW-LoRA": build(shape, LORA, total, device),
        "AdaLoRA": build(shape, {**ADALORA, "delta_t": delta_t}, total, device),
    }
    norms, _ = penalty.gradient_norms(made["IW-LoRA"], batches[:1], trainer.task_loss)
    coefficients = penalty.importance(penalty.sensitivities(norms), 1.0)
    term = trainer.Term(1e-4, coefficients)
    steppers = {
        name: trainer.stepper(model, training, term if name == "IW-LoRA" else None) for name, model in made.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*made, "penalty alone", "calibration pass")}
    names = list(made)
    for number in range(total):
        order = names[number % 3 :] + names[: number % 3]
        for name in order:
            taken = steppers[name](batches[number % 3])
            if number >= warm_up:
                seconds[name].append(taken)
        alone = timed(lambda: penalty_passes(made["IW-LoRA"], coefficients))
        calibration = timed(
            lambda n=number: penalty.gradient_norms(made["IW-LoRA"], [batches[n % 3]], trainer.task_loss)
        )
        if number >= warm_up:
            seconds["penalty alone"].append(alone)
            seconds["calibration pass"].append(calibration)
    return seconds


def paired(seconds: dict, name: str) -> str:
    """Median of a name's time over LoRA's in the same round, with the range of the middle half."""
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds["LoRA"], strict=True))
    quarter = len(ratios) // 4
    return f"{statistics.median(ratios):.3f} ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--delta-t", type=int, default=100, help="steps between AdaLoRA's allocations (the paper's MNLI: 100)"
    )
    parser.add_argument("--small", action="store_true", help="a tiny shape: does it run?")
    options = parser.parse_args(argv)
    seconds = measure(SMALL if options.small else BASE, options.rounds, options.batch, options.tokens, options.delta_t)
    shape = "tiny shape" if options.small else "DeBERTaV3-base, random weights"
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(
        f"{shape}, batch {options.batch} x {options.tokens} tokens, {options.rounds} interleaved rounds; {machine}, "
        f"{models.current_device()}; torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    print("| | seconds (median) | over LoRA's step, same round (middle half) |\n|---|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {statistics.median(taken):.4f} | {paired(seconds, name)} |")
    print("\n| run | calibration passes | training passes | share |\n|---|---|---|---|")
    for path in sorted((config.ROOT / "params" / "iw_lora" / "paper").glob("*_iw_lora.yaml")):
        run = config.load_run(path, scale="paper", mode="full")
        passes = config.steps(run) * run.training.gradient_accumulation_steps
        count = run.loss.sensitivity_warmup_steps
        print(f"| {run.run_id} | {count} | {passes} | {count / passes:.2%} |")


if __name__ == "__main__":
    main()
