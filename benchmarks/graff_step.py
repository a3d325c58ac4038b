"""What GRAFF's planner adds to a step, in turns with fixed on the same batches, at Qwen3-0.6B's true shape (random weights).

    python benchmarks/graff_step.py --layers 28 --length 256 --micros 8 --rounds 20      (a GPU: seconds; a CPU: hours)
    python benchmarks/graff_step.py --layers 4 --length 32 --micros 2 --rounds 10        (a CPU, minutes)

Prints the median ratio of step times, and where GRAFF's extra time goes. Steps are BudgetTrainer's own parts, called in the
order that it calls them; data loading, evaluation and checkpoints are left out on both sides.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lib import config, models
from lib.graff import methods, probes
from lib.graff import planner as pl
from lib.graff.block_adam import BlockAdam


def side(kind: str, arguments):
    torch.manual_seed(0)
    shape = Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=arguments.layers,
                        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
    base = Qwen3ForCausalLM(shape).to(models.device())
    model = models.add_lora(base, {"lora_r": 64, "lora_alpha": 16, "target_modules": "all-linear"}, 0).train()
    around = probes.Probes(model, torch.arange(4096), 1.0)
    optimizer = BlockAdam(around.parameters, 2e-4, (0.9, 0.98), 0.01, around.blocks, 2 * around.layers, 1.0)
    scheduler = {"type": kind, **({"cold": True} if kind == "graff" else {})}
    raw = {"run_id": "b", "model": {"name": "m/m"}, "dataset": {"name": "openai/gsm8k"}, "training": {
        "budget_minutes": 1, "global_batch_size": 8, "micro_batch_size": 8, "optimizer": {"lr_init": 2e-4},
        "scheduler": scheduler}}
    run = config.restore(raw, study="graff", scale="paper", mode="full")
    return model, around, optimizer, methods.make(run.training.scheduler, around.layers)


def stepper(kind: str, arguments):
    model, around, optimizer, method = side(kind, arguments)
    state, parts = {"step": 0, "credit": None}, {}

    def timed(name, function, *given):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        out = function(*given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        parts.setdefault(name, []).append(time.perf_counter() - started)
        return out

    def step(batches):
        state["step"] += 1
        due = state["step"] % methods.EVERY == 0
        plan, count = None, sum(int((b["labels"] != -100).sum()) for b in batches)
        for place, batch in enumerate(batches):
            if due and method.wants_secant and place == len(batches) - 1:
                around.before_last_micro(model)
            losses, z, entropy = around.token_losses(model, batch, method.wants_entropy)
            if plan is None:
                plan = timed("planner", method.decide, methods.Seen(0.5, entropy, torch.zeros(2 * around.layers)))
            w = pl.token_weights(float(plan.a), z)[0]
            ((w * losses).sum() / count).backward()
        cot = None
        if method.wants_gradient and optimizer.delta is not None:
            g = optimizer.gradients()
            c = timed("dot products", pl.block_sums, g, optimizer.delta, optimizer.blocks, optimizer.n)
            c_a = timed("token credit", around.token_credit, model, state["credit"], g) if state["credit"] else 0.0
            cot, state["credit"] = timed("dot products", pl.cotangents, c, c_a, g, optimizer.delta, "cos", 1.0), None
        timed("planner", method.learn, 1.0, cot, 0.0, 2e-4, 0.9)
        optimizer.step()
        if due and method.wants_secant:
            timed("secant", around.secant, model, (batch, w.detach(), z, count), optimizer, optimizer.m)
            state["credit"] = {"inputs": batch, "z": z, "a": 0.0, "eta": 2e-4, "jacobian": optimizer.jacobian()}
        optimizer.zero_grad()

    return step, parts


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 28), ("length", 256), ("micros", 8), ("micro", 8), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    (fixed, _), (graff, parts) = stepper("fixed", arguments), stepper("graff", arguments)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"fixed": [], "graff": []}
    for number in range(arguments.rounds + 2):
        batches = []
        for _ in range(arguments.micros):
            ids = torch.randint(0, 4096, (arguments.micro, arguments.length), generator=generator).to(models.device())
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        for name, step in (("fixed", fixed), ("graff", graff))[:: 1 if number % 2 else -1]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            step(batches)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    total = {name: sum(found) for name, found in seconds.items()}
    ordinary = statistics.median(g / f for f, g in zip(seconds["fixed"], seconds["graff"], strict=True))
    print(f"{arguments}: fixed {statistics.median(seconds['fixed']):.3f} s a step; GRAFF / fixed: {ordinary:.4f} in the median "
          f"step, {total['graff'] / total['fixed']:.4f} over all (every {methods.EVERY}th has the secant)")
    for name, found in sorted(parts.items(), key=lambda item: -sum(item[1])):
        print(f"  {name}: {sum(found) / (arguments.rounds + 2) / statistics.median(seconds['fixed']):.4f} of a fixed step")
    print("  the rest of the difference: entropies of the label tokens, and noise")


if __name__ == "__main__":
    main()
