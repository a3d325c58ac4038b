"""The smallest study there can be: does a momentum of .9 bring a line, fitted in a few steps, nearer to the truth?"""

from lib import config, record
from lib.config import Count, Fraction, Positive


class Dataset(config.Data):
    name: str = "generated"
    points: Count = 64


class Training(config.Section):
    learning_rate: Positive
    momentum: Fraction = 0.0
    max_steps: Count = 20


class Run(config.Run):
    model: config.Model = config.Model(name="made")
    dataset: Dataset = Dataset()
    training: Training


METRICS = {"error": "minimize"}
CLAIM_METRICS = ("score",)
SEED_KEYS = ("dataset.split_seed",)  # each seed draws points of its own
UNREAD = ("dataset.limit",)
ALIASES = {"learning_rate": "training.learning_rate", "momentum": "training.momentum"}


def steps(run):
    """Of one member: what `plan` and the progress go by."""
    return run.training.max_steps


def trial_changes(run):
    """At most two batches."""
    return config.at_most(run, {"training.max_steps": 2})


def prepare(run, folder):
    """Points around a line of slope 2, which a seed's members share."""
    import numpy as np

    rng = np.random.default_rng(run.dataset.split_seed)
    x = rng.normal(size=run.dataset.points)
    record.write_json(folder / "points.json", {"x": x.tolist(), "y": (2 * x + rng.normal(size=len(x))).tolist()})


def train(member, folder, shared):
    """How far from 2 the slope is after so many steps of gradient descent."""
    points, w, v, training = record.read_json(shared / "points.json"), 0.0, 0.0, member.run.training
    pairs = list(zip(points["x"], points["y"], strict=True))
    for step in record.batches("training", range(training.max_steps)):
        gradient = sum(2 * x * (w * x - y) for x, y in pairs) / len(pairs)
        v = training.momentum * v + gradient
        w -= training.learning_rate * v
        record.append_jsonl(folder / "history.jsonl", {"step": step + 1, "w": w})
    return {"status": "completed", "error": abs(w - 2.0)}
