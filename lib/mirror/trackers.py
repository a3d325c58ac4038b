"""Other trackers than W&B: those of transformers, named in a run YAML's `wandb.report_to`.

They run inside the training process, as transformers' own callbacks, and are the user's choice: unlike the W&B mirror
(lib/mirror/tracking.py) one of them that fails takes its member along. None is part of the record.
"""

import importlib.util
import os
from pathlib import Path

from lib.settings.faults import did_you_mean
from lib.settings.schema import Finding

# transformers' integrations and a module that each needs, all of whose alternatives are named
PACKAGES = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
}


def findings(run) -> list[Finding]:
    """What keeps this run's trackers from working here."""
    found, key = [], "wandb.report_to"
    for name in (run.wandb.report_to if run.wandb else None) or []:
        if name == "wandb":
            found.append(
                Finding(
                    "error",
                    key,
                    "W&B is mirrored from the record, not from inside the training",
                    "remove it here, and set wandb.mode: online",
                )
            )
        elif name not in PACKAGES:
            near = did_you_mean(name, list(PACKAGES))
            found.append(Finding("error", key, f"{name} is no tracker of transformers ({', '.join(PACKAGES)})", near))
        elif not any(importlib.util.find_spec(module) for module in PACKAGES[name]):
            found.append(
                Finding(
                    "error",
                    key,
                    f"{name} needs the package {PACKAGES[name][0]}, which is not installed",
                    f".venv/bin/pip install {PACKAGES[name][0]}, or remove {name} from {key}",
                )
            )
    return found


def names(run, folder: Path) -> list[str]:
    """For TrainingArguments(report_to=...) of the member in `folder`; none in a trial. TensorBoard's files go there
    too."""
    wanted = list((run.wandb.report_to if run.wandb and run.mode != "trial" else None) or [])
    if "tensorboard" in wanted:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(folder) / "tensorboard")
    return wanted


def attach(trainer) -> None:
    """Let every row that this transformers.Trainer gives to its `on_record` go to its trackers too."""
    record_row = trainer.on_record

    def both(row: dict) -> None:
        record_row(row)
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, numbers)

    if trainer.args.report_to:
        trainer.on_record = both
