"""Run by torchrun in tests/test_iw_lora_engine.py: one optimiser step of IW-LoRA, each process on its share of the batch."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lib.iw_lora import trainer
from lib.iw_lora.sections import Training
from tests.test_iw_lora import deberta, moved, rows


def main(folder: str, batch: int) -> None:
    rank, record = os.environ.get("RANK", "0"), []
    model, place = moved(deberta()), Path(folder) / f"rank{rank}"
    place.mkdir(parents=True)
    trainer.train_rows(
        model, rows(), Training(max_steps=1, batch_size=batch, learning_rate=1e-3), steps=1, warmup=0, every=None, pad=0,
        term=trainer.Term(0.5, torch.ones(4)), seed=3, folder=place, identity="t", on_record=record.append,
        on_timing=lambda _: None, on_evaluate=lambda _: {})
    (place / "said.json").write_text(json.dumps(record[0]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    if dist.is_initialized():  # gloo's threads would else be alive when the interpreter ends, which aborts it now and then
        dist.destroy_process_group()
