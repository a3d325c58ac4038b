"""Optimizer steps of DPO by a naive loop, by TRL and by this repository's engine, interleaved on the same pairs.

    python -m benchmarks.preference_step                   CPU, 32k vocabulary, generated pairs
    python -m benchmarks.preference_step --data PATH       the same on real chat pairs
    python -m benchmarks.preference_step --inputs .cache/td_dpo/FOLDER --lora 16 --last-layers 8
                                                           a small study's model and pairs, as its members find them
    python -m benchmarks.preference_step --device cuda --shape llama-2-7b --nf4 --longest 2048 --micro 1 2 4 --arms trl
    ours

Each arm is a process of its own that takes a step when it is its turn (preference_arms.py says what each does), and the
peak memory is the arm's own. Every arm is tried at each micro-batch of `--micro`
and its fastest counts; pairs per optimizer step are the same. Without --inputs weights are random: time and memory depend
on the shape alone. Generated lengths are those of gpu_checks.py (log-normal, assumed to be like chat data) times --scale.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

from lib.run import pool

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # vocabulary, hidden, intermediate, layers, heads
    "tiny": (384, 32, 64, 2, 4),
    "small": (32000, 256, 688, 4, 4),
    "medium": (32000, 512, 1376, 8, 8),
    "llama-2-7b": (32000, 4096, 11008, 32, 32),
}
WARM_UP, PROFILED = 2, 2
NAMES = {"naive": "naive: two models, four forwards", "trl": "TRL as shipped, reference precomputed",
         "trl_completions": "TRL, head made completion-only", "ours": "ours"}  # fmt: skip
PARTS = {"backbone": "backbone forward", "head": "head forward", "reference": "reference", "backward": "backward",
         "optimizer": "clip + optimizer", "rest": "the rest"}  # fmt: skip


def shape_of(name: str, vocabulary: int | None, layers: int | None) -> dict:
    size, hidden, intermediate, depth, heads = SHAPES[name]
    return {"vocab_size": vocabulary or size, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers or depth, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 4096}  # fmt: skip


def config_of(model: str) -> dict:
    """The same of a local or hub model."""
    from transformers import AutoConfig

    from lib import hub

    config = AutoConfig.from_pretrained(hub.local_path(model) or model)
    return {name: getattr(config, name) for name in shape_of("tiny", None, None)}


def real_rows(path: str, count: int, vocabulary: int, longest: int) -> list[dict]:
    """`count` tokenized pairs of a data set, by a tokenizer made from its own training answers."""
    from lib.made import train_bpe_tokenizer
    from lib.td_dpo.data import CHAT_TEMPLATE, SPECIAL, encode_pairs, load_splits

    pairs = load_splits({"name": path, "on_bad_row": "drop"})[0]["train"]
    texts = [pair[side][0]["content"] for pair in pairs for side in ("chosen", "rejected")]
    tokenizer = train_bpe_tokenizer(texts, vocabulary, CHAT_TEMPLATE, SPECIAL)
    rows = encode_pairs(tokenizer, pairs, max_length=longest)[0]
    if len(rows) < count:
        sys.exit(f"{path}: {len(rows)} usable pairs, {count} needed: lower --rounds or --batch")
    return rows[:count]


def matmul_peak(device: str, dtype: str, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest large square matrix product seen in about `seconds`."""
    import torch

    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def useful_flops(shape: dict, rows: list[dict], rank: int) -> float:
    """Matrix products that a pair's step cannot do without, on average: each prompt once, the head at answer tokens
    only, of the layers those behind a frozen trunk.

    Attention's own products and what checkpointing recomputes are left out, so the fraction of the peak is a lower
    bound.
    """
    hidden, wide, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    frozen = 4 if rank else 6  # forward 2, gradient of the input 2, gradient of the weight 2
    backbone = frozen * layers * (4 * hidden**2 + 3 * hidden * wide)
    adapters = 6 * rank * layers * (4 * 2 * hidden + 3 * (hidden + wide))
    head = frozen * shape["vocab_size"] * hidden
    answers = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    tokens = [len(row["prompt_ids"]) - 1 + answer for row, answer in zip(rows, answers, strict=True)]
    return statistics.mean(t * (backbone + adapters) + a * head for t, a in zip(tokens, answers, strict=True))


def start(arms: list[str], micros: list[int], spec: dict) -> dict[tuple[str, int], dict]:
    """A process per arm and micro-batch, each with its model loaded and at its gate."""
    # A server that has imported everything forks them; on a GPU, where forking is not safe, each imports for itself.
    context = multiprocessing.get_context("spawn" if spec["device"] == "cuda" else "forkserver")
    if spec["device"] != "cuda":
        context.set_forkserver_preload(["benchmarks.preference_arms"])
    from benchmarks.preference_arms import work

    found = {}
    for arm in arms:
        for micro in micros:
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, arm, {**spec, "micro": micro}), daemon=True)
            process.start()
            there.close()
            found[arm, micro] = {"pipe": here, "process": process, "steps": [], **answer(here, arm)}
    return found


def answer(pipe, arm: str) -> dict:
    try:
        message = pipe.recv()
    except EOFError:
        message = {"error": "its process ended (the kernel may have killed it for memory)"}
    if "error" in message:
        raise RuntimeError(f"{arm}: {message['error']}")
    return message


def take_turns(running: dict, rounds: int) -> None:
    """`rounds` timed steps of each, one at a time, the order moved on by one every round; then PROFILED with parts
    timed."""
    names = [name for name in running if "out_of_memory" not in running[name]]
    for number in range(WARM_UP + rounds + PROFILED):
        word = "profile" if number >= WARM_UP + rounds else "go"
        for index in range(len(names)):
            name = names[(index + number) % len(names)]
            variant = running[name]
            if "out_of_memory" in variant:
                continue
            variant["pipe"].send(word)
            message = answer(variant["pipe"], name[0])
            if "out_of_memory" in message:
                variant["out_of_memory"] = True
            else:
                variant["steps"].append(message)


def run(arms: list[str], micros: list[int], spec: dict, rounds: int) -> dict[tuple[str, int], dict]:
    """The steps that every variant took, by (arm, micro-batch)."""
    running: dict = {}
    try:
        running = start(arms, micros, spec)
        take_turns(running, rounds)
    finally:
        stop(running)
    return running


def stop(running: dict) -> None:
    for variant in running.values():
        variant["pipe"].close()  # the arm reads the end of its pipe
    for variant in running.values():
        variant["process"].join(timeout=10)
        if variant["process"].is_alive():
            variant["process"].terminate()


def measured(variant: dict, rounds: int, batch: int) -> dict:
    """What a variant's steps came to."""
    timed, profiled = variant["steps"][WARM_UP : WARM_UP + rounds], variant["steps"][WARM_UP + rounds :]
    parts = {
        name: statistics.mean(step["parts"].get(name, 0.0) for step in profiled)
        # fmt: skip
        for name in ("model", "backbone", "scoring", "reference", "backward", "clipping", "optimizer")
    }
    whole = statistics.mean(step["seconds"] for step in profiled)
    shares = {"backbone": parts["backbone"], "head": parts["model"] - parts["backbone"] + parts["scoring"],
              "reference": parts["reference"], "backward": parts["backward"],
              "optimizer": parts["clipping"] + parts["optimizer"]}  # fmt: skip
    shares = {name: value / whole for name, value in shares.items()}
    seconds = [step["seconds"] for step in timed]
    return {
        "seconds": seconds,
        "cpu_seconds": [step["cpu_seconds"] for step in timed],
        "pairs": batch,
        "peak": max(step["peak"] for step in variant["steps"][1:]),
        "losses": [step["loss"] for step in variant["steps"]],
        "tokens": statistics.mean(step["tokens"] for step in profiled) / batch,
        "reference_seconds": variant["reference_seconds"],
        "shares": {**shares, "rest": 1 - sum(shares.values())},
    }


def middle(values: list[float]) -> str:
    values = sorted(values)
    quarter = len(values) // 4
    return f"{values[quarter]:.2f} to {values[-1 - quarter]:.2f}"


def table(found: dict[tuple[str, int], dict], useful: float, peak: float, clock: str = "seconds") -> list[str]:
    """Markdown: every arm at its fastest micro-batch; then where its time goes. Rates and ratios are by `clock`:
    seconds, or a single thread's cpu_seconds, which what else the machine does stretches less."""
    best = {}
    for (arm, micro), result in found.items():
        if arm not in best or statistics.median(result[clock]) < statistics.median(best[arm][1][clock]):
            best[arm] = (micro, result)
    ours = best["ours"][1]
    second = "second" if clock == "seconds" else "second of one processor's time"
    lines = [
        f"| | micro-batch | pairs per {second} | ours is faster by (middle half of rounds) | peak memory, MB | tokens "
        "through the backbone per pair | useful products, of the matmul peak | loss against ours, worst step |",
        "|---" * 8 + "|",
    ]
    for arm, (micro, result) in best.items():
        ratio = sum(result[clock]) / sum(ours[clock])  # over the same pairs; by round, pairs and noise differ
        by_round = middle([a / b for a, b in zip(result[clock], ours[clock], strict=True)])
        gap = max(abs(a / b - 1) for a, b in zip(result["losses"], ours["losses"], strict=True))
        rate = result["pairs"] * len(result[clock]) / sum(result[clock])
        lines.append(
            f"| {NAMES[arm]} | {micro} | {rate:.2f} | {ratio:.2f} ({by_round}) | {result['peak']:.0f} | "
            f"{result['tokens']:.0f} | {rate * useful / peak:.1%} | {gap:.1e} |"
        )
    lines += [
        "",
        "| share of a step | " + " | ".join(PARTS.values()) + " | reference of all pairs, once |",
        "|---" * 8 + "|",
    ]
    for arm, (_, result) in best.items():
        once = "in every step" if result["reference_seconds"] is None else f"{result['reference_seconds']:.1f} s"
        lines.append(
            f"| {NAMES[arm]} | " + " | ".join(f"{result['shares'][part]:.0%}" for part in PARTS) + f" | {once} |"
        )
    return lines


def conditions(options: argparse.Namespace, spec: dict, peak: float) -> str:
    """The machine, the packages, the model and the pairs of a measurement, in one line."""
    import torch
    import transformers
    import trl

    cores = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    machine = torch.cuda.get_device_name() if options.device == "cuda" else cores
    lengths = zip(
        *((len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in spec["rows"]), strict=True
    )
    medians = ", ".join(
        f"{name} {statistics.median(column):.0f}"
        for name, column in zip(("prompt", "chosen", "rejected"), lengths, strict=True)
    )
    return "; ".join(
        [
            f"{machine}, {options.threads} threads, load {os.getloadavg()[0]:.1f}",
            f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}",
            f"{spec['model'] or options.shape + ' shape'}, "
            f"{spec['shape']['vocab_size']} vocabulary, {spec['dtype']}{', NF4' * options.nf4}, "
            + (f"LoRA r {spec['lora']}" if spec["lora"] else "all weights trained")
            + (f" on the last {spec['last_layers']} layers" if spec["last_layers"] else ""),
            f"{options.inputs or options.data or 'generated pairs'}, median tokens {medians}",
            f"{options.batch} pairs per step, {options.rounds} rounds",
            f"matmul peak {peak / 1e12:.3f} TFLOP/s",
        ]
    )


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--vocabulary", type=int, help="instead of the shape's own")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: float32 on the CPU, bfloat16 on a GPU or with --nf4"
    )
    parser.add_argument("--nf4", action="store_true", help="4-bit base with double quantization")
    parser.add_argument("--lora", type=int, help="rank; 0 trains all weights (default: 64 with --nf4, else 0)")
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="of gradients (default: on a GPU)"
    )
    parser.add_argument("--data", help="real pairs: a file, a folder or a hub id (default: generated)")
    parser.add_argument(
        "--inputs", type=Path, help="a folder that a TD-DPO study prepared: its model and training pairs"
    )
    parser.add_argument("--last-layers", type=int, help="adapters on so many of the last layers alone (default: all)")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a prompt with one answer")
    parser.add_argument("--scale", type=float, help="of generated lengths (default: longest / 2048)")
    parser.add_argument("--batch", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--micro", type=int, nargs="+", default=[2, 8], help="pairs per forward pass to try")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS") or pool.cores()))
    parser.add_argument("--arms", nargs="+", choices=list(NAMES), default=None)
    options = parser.parse_args(argv)
    if any(options.batch % micro for micro in options.micro):
        parser.error("--micro must divide --batch")
    if options.rounds < 1 or options.arms and "ours" not in options.arms:
        parser.error("at least one round, and 'ours' among the arms: the others are compared with it")
    return options


def spec_of(options: argparse.Namespace) -> dict:
    """What every arm is reported: the model's shape, the tokenized pairs, the device and the batch."""
    from benchmarks.gpu_checks import pairs

    model, cuda, shape = None, options.device == "cuda", shape_of(options.shape, options.vocabulary, options.layers)
    dtype = options.dtype or ("bfloat16" if cuda or options.nf4 else "float32")
    steps = WARM_UP + options.rounds + PROFILED
    if options.inputs:
        report, rows = (json.loads((options.inputs / f"{name}.json").read_text()) for name in ("report", "rows"))
        rows, model = rows["train"][: steps * options.batch], report["base"]
        shape = config_of(model)
        if len(rows) < steps * options.batch:
            sys.exit(
                f"{options.inputs}: {len(rows)} training pairs, {steps * options.batch} needed: lower --rounds or --batch"
            )
    elif options.data:
        rows = real_rows(options.data, steps * options.batch, shape["vocab_size"], options.longest)
    else:
        rows = pairs(
            steps * options.batch, shape["vocab_size"], options.longest, options.scale or options.longest / 2048
        )
    return {"shape": shape, "rows": rows, "model": model, "last_layers": options.last_layers,
            "device": options.device, "dtype": dtype, "batch": options.batch,
            "lora": options.lora if options.lora is not None else 64 * options.nf4, "steps": steps,
            "quantization": "nf4" if options.nf4 else "none", "threads": options.threads,
            "checkpointing": cuda if options.checkpointing is None else options.checkpointing}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: leave --device out to measure the CPU", file=sys.stderr)
        return 3
    torch.set_num_threads(options.threads)
    spec = spec_of(options)
    cuda, rows = options.device == "cuda", spec["rows"]
    # On CUDA TRL's head scores completions only by itself, so the second TRL arm would be the first.
    arms = options.arms or [arm for arm in NAMES if not (cuda and arm == "trl_completions")]
    peak = matmul_peak(options.device, spec["dtype"])
    running = run(arms, options.micro, spec, options.rounds)
    peak = max(peak, matmul_peak(options.device, spec["dtype"]))
    found = {name: measured(variant, options.rounds, options.batch) for name, variant in running.items()
             if "out_of_memory" not in variant}  # fmt: skip
    print(f"`python -m benchmarks.preference_step {shlex.join(sys.argv[1:] if argv is None else argv)}`\n")
    print(conditions(options, spec, peak) + "\n")
    clock = "cpu_seconds" if options.device == "cpu" and options.threads == 1 else "seconds"
    if any(arm == "ours" for arm, _ in found):
        shape = spec["shape"] | ({"num_hidden_layers": options.last_layers} if options.last_layers else {})
        print("\n".join(table(found, useful_flops(shape, rows, spec["lora"]), peak, clock)))
    for arm, micro in (name for name, variant in running.items() if "out_of_memory" in variant):
        print(f"\n{NAMES[arm]}, micro-batch {micro}: out of memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
