"""What the processes of a job under test call (tests/test_distributed.py): a tiny NF4 Llama with adapters, trained."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import torch

from lib import models, training
from lib.run import sharding
from lib.td_dpo import engine
from lib.td_dpo.study import Loss, Training
from lib.td_dpo.trainer import PreferenceTrainer


def model_of(argument: dict, *, sharded: bool):
    storage = argument["dtype"] if sharded else None
    base = models.load_causal_lm(
        argument["model"],
        torch_dtype=argument["dtype"],
        quantization=argument["quantization"],
        quant_storage=storage,
        device="cpu",
    )
    return models.add_lora(base, {"lora_r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, seed=1)


def train(argument: dict) -> dict:
    """Train on the rows of a JSON file; the histories are in the folder. Also how much of the model this process
    held."""
    given = json.loads(Path(argument["rows"]).read_text())
    folder = Path(argument["folder"])
    folder.mkdir(exist_ok=True, parents=True)
    model = model_of(argument, sharded=training.world() > 1)
    whole = {name: p.numel() for name, p in model.named_parameters()}
    tables = {split: torch.tensor(given["reference"][split]) for split in ("train", "validation")}
    held = {}

    class Trainer(PreferenceTrainer):
        def write(self, row):
            super().write(row)
            if training.rank() == 0 and row["step"] == argument.get("fail_at") and not (folder / "failed").exists():
                (folder / "failed").touch()
                raise ValueError("seven is not a prime of two")
            if training.rank() == 0 and row["step"] == argument.get("die_at") and not (folder / "failed").exists():
                (folder / "failed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def sampled_kl(self):
            if training.world() > 1:
                sharding.backbone(self.model).reshard()
            for name, p in self.model.named_parameters():
                local = p.to_local() if hasattr(p, "to_local") else p
                held[name] = local.numel()
            return {}

    kind = sharding.sharded_class(Trainer) if training.world() > 1 else Trainer
    run = SimpleNamespace(loss=Loss(name="td_dpo", beta=0.05, tau=1.0), training=Training(**argument["training"]))
    outcome = kind(run, 3, folder, SimpleNamespace(rows=given, reference=tables), model).fit()
    return {"status": outcome.status, "step": outcome.step, "whole": whole, "held": training.all_gather(held)}


def scores(model, rows: list[dict]) -> list:
    return engine.sequence_logprobs(model, rows).tolist()
