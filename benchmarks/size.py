"""Time and peak memory of a preference step as one size at a time grows: pairs, tokens, vocabulary, layers.

    python -m benchmarks.size [--plot size.png]

Around one middle setting each axis is varied alone. At every size the engine and trl.DPOTrainer (reference precomputed,
head made completion-only) take turns on the same pairs. On a CPU the seconds are those of one thread's own work, which
a busy machine stretches little. Slopes are of log(seconds) against log(size): 1 is proportional. Memory is resident,
beyond what the process held before its model.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys

from benchmarks import preference_step

MIDDLE = {"batch": 4, "longest": 256, "vocabulary": 8192, "layers": 4}
AXES = {"batch": [1, 2, 4, 8, 16], "longest": [64, 128, 256, 512, 1024], "vocabulary": [2048, 8192, 32768, 131072],
        "layers": [1, 2, 4, 8, 16]}  # fmt: skip
TITLES = {"batch": "pairs in a pass", "longest": "longest pair, tokens (lengths grow with it)", "vocabulary": "vocabulary",
          "layers": "layers"}  # fmt: skip
ARMS = ["trl_completions", "ours"]


def measure(sizes: dict[str, int], options: argparse.Namespace) -> dict[str, dict]:
    """{arm: {"seconds", "peak"}}, medians over the rounds; None for an arm without the memory."""
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    reported = preference_step.parsed(
        [
            *flags,
            "--micro",
            str(sizes["batch"]),
            "--rounds",
            str(options.rounds),
            "--threads",
            "1",
            "--device",
            options.device,
        ]
    )
    arms = ["trl", "ours"] if options.device == "cuda" else ARMS
    running = preference_step.run(arms, reported.micro, preference_step.spec_of(reported), reported.rounds)
    found = {}
    for (arm, _), variant in running.items():
        made = (
            None if "out_of_memory" in variant else preference_step.measured(variant, reported.rounds, reported.batch)
        )
        found["ours" if arm == "ours" else "trl"] = made and {
            "seconds": statistics.median(made["seconds" if reported.device == "cuda" else "cpu_seconds"]),
            "peak": made["peak"],
        }
    return found


def slope(points: list[tuple[int, float]]) -> float:
    """Least squares of log y on log x."""
    return statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


def table(found: dict[str, dict[int, dict]]) -> list[str]:
    lines = ["| | | ours, s | TRL, s | TRL / ours | ours, MB | TRL, MB |", "|---|---|---|---|---|---|---|"]
    for axis, sizes in found.items():
        for size, arms in sizes.items():
            cells = [arms[arm] for arm in ("ours", "trl")]
            times = [f"{cell['seconds']:.2f}" if cell else "out of memory" for cell in cells]
            ratio = f"{cells[1]['seconds'] / cells[0]['seconds']:.1f}" if all(cells) else ""
            peaks = [f"{cell['peak']:.0f}" if cell else "" for cell in cells]
            lines.append("| " + " | ".join([TITLES[axis], str(size), *times, ratio, *peaks]) + " |")
        grown = [[(size, arms[arm]["seconds"]) for size, arms in sizes.items() if arms[arm]] for arm in ("ours", "trl")]
        slopes = [f"{slope(points):.2f}" if len(points) > 1 else "" for points in grown]
        lines.append(f"| {TITLES[axis]} | slope | {slopes[0]} | {slopes[1]} | | | |")
    return lines


def plot(found: dict[str, dict[int, dict]], path: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    figure = Figure(figsize=(3.2 * len(found), 5.6), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False, sharey="row")
    for column, (axis, sizes) in enumerate(found.items()):
        for row, (key, label) in enumerate((("seconds", "seconds per step"), ("peak", "peak memory, MB"))):
            panel = panels[row, column]
            for arm, title, marker in (("trl", "TRL, completion-only head", "s"), ("ours", "ours", "o")):
                points = [(size, arms[arm][key]) for size, arms in sizes.items() if arms[arm]]
                panel.plot(*zip(*points, strict=True), marker=marker, label=title)
            panel.set(xscale="log", yscale="log", xlabel=TITLES[axis], ylabel=label if column == 0 else "")
            panel.set_xticks(list(sizes), labels=[f"{size:g}" for size in sizes])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.minorticks_off()
    panels[0, 0].legend()
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--axis", choices=list(AXES), action="append", help="only this one (may be repeated)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sizes", type=int, help="only the first so many sizes of an axis")
    parser.add_argument("--plot", help="a PNG of it")
    options = parser.parse_args(argv)
    known: dict[tuple, dict] = {}
    found: dict[str, dict[int, dict]] = {}
    for axis in options.axis or AXES:
        for size in AXES[axis][: options.sizes]:
            sizes = {**MIDDLE, axis: size}
            key = tuple(sizes.values())
            known[key] = known[key] if key in known else measure(sizes, options)
            found.setdefault(axis, {})[size] = known[key]
            print(f"{axis} {size}: {known[key]}", file=sys.stderr, flush=True)
    print("\n".join(table(found)))
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
