"""The method's trainable parameters, all by PEFT: LoRA with its variants, AdaLoRA, or the whole model."""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, TaskType, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn
from transformers import TrainerCallback

from lib.errors import StudyError

HEAD = ["pooler"]  # the task type adds the classifier; without the pooler it would stay random


def wrap(model: nn.Module, adapter, total_steps: int) -> nn.Module:
    """`model` with the configured adapters. Raises StudyError for an AdaLoRA schedule that never prunes."""
    if adapter.type == "none":
        return model
    targets = adapter.target_modules
    common = {
        "task_type": TaskType.SEQ_CLS,
        "modules_to_save": HEAD,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "target_modules": targets,
    }
    if adapter.type == "adalora":
        if adapter.tinit + adapter.tfinal >= total_steps:
            raise StudyError(
                "model.adapter.tfinal",
                f"tinit {adapter.tinit} + tfinal {adapter.tfinal} in a run of {total_steps} steps",
                "a schedule that leaves steps to prune in",
                "lower both",
            )
        config = AdaLoraConfig(
            init_r=adapter.init_r,
            target_r=adapter.target_r,
            tinit=adapter.tinit,
            tfinal=adapter.tfinal,
            deltaT=adapter.delta_t,
            total_step=max(total_steps, 3),  # a trial has 2: one to weigh in
            **common,
        )
    else:
        eva = (
            {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=adapter.eva_rho)} if adapter.init == "eva" else {}
        )
        config = LoraConfig(r=adapter.rank, use_rslora=adapter.use_rslora, use_dora=adapter.use_dora, **eva, **common)
    return get_peft_model(model, config)


def initialise_eva(model: nn.Module, batches: list[dict]) -> None:
    """EVA's data-driven A (PEFT's own): principal directions of what each adapted matrix is given by `batches`."""

    def given(inputs: Tensor | tuple, mask: Tensor, _) -> Tensor:
        """The rows of real tokens; of DeBERTa's shared projections also the table of relative positions, whole."""
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        return inputs[mask] if inputs.shape[:2] == mask.shape else inputs.flatten(0, -2)

    model.eval()
    with torch.random.fork_rng():
        initialize_lora_eva_weights(
            model,
            [{k: v for k, v in b.items() if k != "labels"} for b in batches],
            prepare_layer_inputs_fn=given,
            prepare_model_inputs_fn=lambda batch, _: batch["attention_mask"].bool(),
            show_progress_bar=False,
        )
    model.train()


class Allocate(TrainerCallback):
    """AdaLoRA's budget after each optimiser step, before gradients are cleared; not where the step was skipped."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **_):
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.model.base_model.update_and_allocate(state.global_step + 1)


def allocator_state(model: nn.Module) -> dict | None:
    """What AdaLoRA remembers beside its weights; None for other methods."""
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is None:
        return None
    return {
        "ipt": allocator.ipt,
        "exp_avg_ipt": allocator.exp_avg_ipt,
        "exp_avg_unc": allocator.exp_avg_unc,
        "rank_pattern": model.peft_config["default"].rank_pattern,
    }


def restore_allocator(model: nn.Module, state: dict | None) -> None:
    if state is None:
        return
    allocator = model.base_model.rankallocator
    allocator.ipt, allocator.exp_avg_ipt = state["ipt"], state["exp_avg_ipt"]
    allocator.exp_avg_unc = state["exp_avg_unc"]
    model.peft_config["default"].rank_pattern = state["rank_pattern"]


def ranks_used(model: nn.Module) -> dict[str, int]:
    """{matrix: triplets that are not pruned} of AdaLoRA."""
    return {
        name: int((layer.lora_E["default"] != 0).sum())
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "lora_E", None), nn.ParameterDict) and "default" in layer.lora_E
    }


def trainables(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
