"""The ways of training DPO that preference_step.py compares, each a process that takes a step when it is reported to.

`naive`: a loop over two models with four forward passes and the whole vocabulary at every position. `trl`:
trl.DPOTrainer.train() with its reference log-probabilities precomputed; `trl_completions`: the same with its head made
to score completion tokens only, which TRL itself does on CUDA and not on the CPU. `ours`:
lib.td_dpo.trainer.PreferenceTrainer. All draw the same adapters and see the same pairs in the same optimizer steps. The gate
between two steps is the trainers' own log call, so a step is a whole turn of their loop: data, collation, forward,
backward, optimizer, metrics, record.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks import random_llama
from benchmarks.gate import End, Gate, Parts, now
from benchmarks.gpu_checks import tokenizer
from lib import models
from lib.td_dpo.engine import sequence_logprobs, trunk_depth
from lib.td_dpo.study import Loss, Training
from lib.td_dpo.trainer import PreferenceTrainer
from lib.training import SeededOrder

PAD, SEED, BETA, LEARNING_RATE = 2, 1, 0.05, 1e-5
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(spec: dict) -> nn.Module:
    options = {"quantization": spec["quantization"], "torch_dtype": spec["dtype"], "device": spec["device"]}
    if spec["model"]:
        model = models.load_causal_lm(spec["model"], **options)
        if spec["checkpointing"]:
            model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        checkpointing = spec["checkpointing"]
        model = random_llama.random_llama(spec["shape"], **options, gradient_checkpointing=checkpointing)
    models.keep_4bit_differentiable(
        model
    )  # for every arm: TRL's reference pass would else leave it without gradients on some CPUs
    return model


def _lora(spec: dict) -> dict:
    return {"lora_r": spec["lora"], "lora_alpha": 16, "target_modules": LINEAR, "last_layers": spec["last_layers"]}


def same_start(model: nn.Module) -> None:
    """The adapters' random half, drawn the same way in every arm (their other half is zero)."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if "lora_A" in name and ".ref." not in name:
            fan_in = parameter.shape[1]
            drawn = torch.empty(parameter.shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            parameter.data.copy_(drawn)


def policy(spec: dict) -> nn.Module:
    model = base(spec)
    if spec["lora"]:
        model = models.add_lora(model, _lora(spec), seed=SEED)
        same_start(model)
    return model


def _arguments(spec: dict) -> dict:
    return {"per_device_train_batch_size": spec["micro"], "learning_rate": LEARNING_RATE, "bf16": spec["dtype"] == "bfloat16",
            "gradient_checkpointing": spec["checkpointing"], "max_steps": spec["steps"], "max_grad_norm": 1.0,
            "lr_scheduler_type": "constant"}  # fmt: skip


def ours(spec: dict, gate: Gate, folder: str) -> None:
    model = policy(spec)
    gate.parts.watch_policy(model)
    started = now()
    depth = trunk_depth(model, spec["last_layers"], spec["rows"])
    with model.disable_adapter() if spec["lora"] else contextlib.nullcontext():
        reference = sequence_logprobs(model, spec["rows"], depth=depth)
    gate.ready(now() - started)

    class Passing(PreferenceTrainer):
        def write(self, row):
            super().write(row)
            if "loss" in row:
                gate.passed(row["loss"])

    section = Training(**_arguments(spec), global_batch_size=spec["batch"])
    run = SimpleNamespace(loss=Loss(name="dpo", beta=BETA), training=section)
    rows, tables = {"train": spec["rows"], "validation": []}, {"train": reference, "validation": torch.empty(0, 2)}
    Passing(run, SEED, Path(folder), SimpleNamespace(rows=rows, reference=tables), model).fit()


class Stock(DPOTrainer):
    """TRL's trainer; only its tokenization (rows are token ids) and its telemetry are left out, and its reference is
    timed."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _send_telemetry(self):
        pass

    def _precompute_ref_logps(self, *args):
        started = now()
        found = super()._precompute_ref_logps(*args)
        self.reference_seconds += now() - started  # once for each split
        return found


class _Passing(TrainerCallback):
    def __init__(self, gate: Gate):
        self.gate = gate

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.gate.passed(logs["loss"])


def trl(spec: dict, gate: Gate, folder: str, completions: bool = False) -> None:
    if completions:
        import trl.trainer.utils as utils

        utils._use_triton = lambda device: True  # in this module it decides one thing: which positions the head scores
    model, peft = base(spec), {}
    if spec["lora"]:
        peft["peft_config"] = models.lora_config(model, _lora(spec))
    args = DPOConfig(
        output_dir=folder,
        beta=BETA,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=spec["batch"],
        max_length=None,
        **_arguments(spec),
        gradient_accumulation_steps=spec["batch"] // spec["micro"],
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=spec["device"] == "cpu",
        seed=SEED,
    )
    # In the order in which the engine's sampler would draw them: the same pairs in every optimizer step.
    rows = [spec["rows"][index] for index in SeededOrder(len(spec["rows"]), SEED)]
    rows = Dataset.from_list([{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows])
    trainer = Stock(
        model, args=args, train_dataset=rows, processing_class=tokenizer(), callbacks=[_Passing(gate)], **peft
    )
    trainer.remove_callback(transformers.PrinterCallback)
    same_start(trainer.model)
    gate.parts.watch_policy(trainer.model)
    gate.ready(trainer.reference_seconds)
    trainer.train()


def trl_completions(spec: dict, gate: Gate, folder: str) -> None:
    trl(spec, gate, folder, completions=True)


def _answers(model: nn.Module, parts: Parts, rows: list[dict], side: str, head: str) -> Tensor:
    """(B,) summed log-probabilities of one side's answers, the textbook way: every logit, then the one that is asked
    for."""
    sequences = [torch.tensor(row["prompt_ids"] + row[side]) for row in rows]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
    place = torch.arange(ids.shape[1])
    starts = torch.tensor([len(row["prompt_ids"]) for row in rows])[:, None]
    ends = torch.tensor([len(sequence) for sequence in sequences])[:, None]
    device = model.device
    ids, scored, real = (
        ids.to(device),
        ((place >= starts) & (place < ends)).to(device),
        (place < ends).long().to(device),
    )
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    with parts.measured(head):
        found = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return torch.where(scored[:, 1:], found, 0).sum(dim=1)


def naive(spec: dict, gate: Gate, folder: str) -> None:
    model, reference, parts = policy(spec).train(), base(spec).requires_grad_(False), gate.parts
    parts.watch_policy(model)
    parts.watch(reference, "reference")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    order = list(SeededOrder(len(spec["rows"]), SEED))
    gate.ready(None)
    for step in range(spec["steps"]):
        total = 0.0
        for start in range(step * spec["batch"], (step + 1) * spec["batch"], spec["micro"]):
            rows = [spec["rows"][index] for index in order[start : start + spec["micro"]]]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
                chosen, rejected = (
                    _answers(model, parts, rows, side, "scoring") for side in ("chosen_ids", "rejected_ids")
                )
                with torch.no_grad():
                    old = [
                        _answers(reference, parts, rows, side, "reference") for side in ("chosen_ids", "rejected_ids")
                    ]
            loss = -logsigmoid(BETA * (chosen - old[0] - rejected + old[1])).sum() / spec["batch"]
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.passed(total)


def work(pipe, arm: str, spec: dict) -> None:
    """Body of an arm's process; what goes wrong is sent to the parent."""
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)  # transformers renames arguments that TRL still sets
    torch.set_num_threads(spec["threads"])
    disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            gate = Gate(pipe, torch.device(spec["device"]))
            gate.parts.watch_training()
            ARMS[arm](spec, gate, folder)
        except (End, EOFError):
            pass
        except torch.OutOfMemoryError:
            pipe.send({"out_of_memory": True})
        except BaseException:
            pipe.send({"error": traceback.format_exc()})


ARMS = {"naive": naive, "trl": trl, "trl_completions": trl_completions, "ours": ours}
