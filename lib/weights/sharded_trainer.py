"""What transformers.Trainer has to do otherwise where its model is sharded (distributed.py); nothing of it in one
process.

Checkpoints are those of one process, so that any number of processes resumes them: the full adapter (or weights) and
the full optimiser state, written by rank 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from peft import load_peft_weights
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer

from lib.weights import distributed


class ShardedTrainer(Trainer):
    """Trainer whose model may be sharded over the processes of a job. Data are the same batches on every process, of
    which the collator takes `distributed.share`; losses are scaled by `distributed.world()`, because FSDP averages
    gradients."""

    def shard(self) -> None:
        """Shard the model; before train(), after whatever adds, removes or casts parameters."""
        if distributed.world() > 1:
            distributed.shard(self.model)
            self.is_distributed_loading_by_transformers = True
            self.place_model_on_device = False

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if distributed.world() == 1:
            return loader
        # accelerate would deal out whole batches, repeat rows to fill up the last round, and lose the epoch on a resume
        plain = DataLoader(
            loader.dataset, batch_sampler=loader.batch_sampler.batch_sampler, collate_fn=loader.collate_fn
        )
        return prepare_data_loader(plain, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True)

    def _defer_fsdp_gradient_reduction(self):
        return distributed.deferred(self.model)

    def _get_grad_norm(self, model, grad_norm=None):
        return distributed.full(super()._get_grad_norm(model, grad_norm))

    def _save(self, output_dir=None, state_dict=None):
        if distributed.world() == 1:
            return super()._save(output_dir, state_dict)
        state = distributed.trained_state(self.model)
        if self.args.should_save:
            super()._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir):
        if distributed.world() == 1:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = distributed.full(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if distributed.world() == 1:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_sharded(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if distributed.world() == 1 or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(distributed.optimizer_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def load_sharded(model: torch.nn.Module, checkpoint: Path) -> None:
    """A checkpoint's adapters (or weights) into a sharded model, in place."""
    if not hasattr(model, "peft_config"):
        return distributed.load_trained_state(model, load_file(checkpoint / "model.safetensors"))
    saved = load_peft_weights(str(checkpoint), device="cpu")
    adapter = f".{model.active_adapter}."
    names = {name.replace(adapter, "."): name for name, p in model.named_parameters() if p.requires_grad}
    distributed.load_trained_state(model, {names[name]: value for name, value in saved.items()})
