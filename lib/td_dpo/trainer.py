"""Preference training on tokenized pairs.

transformers and accelerate keep the loop, the optimizer and mixed precision. What is ours: rows come tokenized with
their reference log-probabilities (no second tokenization, no reference model), the objective is a function of four (B,)
tensors (losses.py), and the run is recorded and resumed as every study's is (lib/training.py). This is no subclass of
trl.DPOTrainer: its data, reference, head, loss, log and saving would all be replaced, its second adapter removed and
its cast of adapters to bfloat16 undone. That losses, gradients and a whole run equal TRL's is tested instead.
"""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import Trainer

from lib import models, record, training as shared
from lib.errors import OutOfMemory, StudyError
from lib.td_dpo import engine
from lib.td_dpo.losses import objective, summary

SAMPLE_BATCH, SAMPLE_TOKENS = 80, 16_384  # at a time at most: cached keys and values of long answers fill the memory
ALIKE = ("learning_rate", "weight_decay", "lr_scheduler_type", "max_grad_norm", "bf16", "gradient_checkpointing")
ALIKE += ("eval_steps", "save_steps")  # of the run's training section: the trainer's own names
VALIDATED = ("implicit_accuracy", "raw_accuracy", "loss", "margin", "chosen_log_ratio", "rejected_log_ratio")


def sampling(run) -> dict:
    """How a run's answers are sampled."""
    most = max(1, min(SAMPLE_BATCH, SAMPLE_TOKENS // run.evaluation.max_new_tokens))
    keys = ("max_new_tokens", "temperature")
    return {key: getattr(run.evaluation, key) for key in keys} | {"batch_size": most}


class PreferenceTrainer(shared.StudyTrainer):
    """Trains `model` in place on tokenized rows and their reference log-probabilities, which `given` has by split
    (member.load). `frozen` is the reference itself, of which the sampled KL is taken; None: the model without adapters.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the optimizer step's pairs: uneven micro-batches are exact
    best_metric = "validation_implicit_accuracy"

    def __init__(self, run, seed: int, folder: Path, given: SimpleNamespace, model, frozen=None):
        self.run, self.given, self.frozen, training = run, given, frozen, run.training
        splits = ("train", "validation")
        pairs, self.validation = (engine.with_reference(given.rows[split], given.reference[split]) for split in splits)
        steps, world = training.steps(len(pairs)), shared.world()
        # with a token budget a process is handed its whole share of the global batch and cuts it by itself
        cut = training.token_budget is not None
        device_batch = training.global_batch_size // world if cut else training.per_device_train_batch_size
        self.loss_section = run.loss.model_dump()
        self.token_budget, self.device_batch = training.token_budget, training.per_device_train_batch_size
        tokens = [[row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in pairs]
        models.keep_4bit_differentiable(model)
        models.float32_trainables(model)
        if not hasattr(model, "peft_config"):  # as in TRL; adapters have a dropout of their own, which is configured
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        self.layout = engine.layout(model)
        super().__init__(
            model,
            pairs,
            self.collate,
            folder=folder,
            fingerprint=record.digest([self.loss_section, training.numbers(), seed, steps, tokens]),
            max_steps=steps,
            seed=seed,
            log_every=training.logging_steps,
            optim="adamw_torch_fused",
            per_device_train_batch_size=device_batch * world,  # each process takes its share of every batch
            gradient_accumulation_steps=training.global_batch_size // (device_batch * world),
            warmup_steps=training.warmup(steps),
            **{name: getattr(training, name) for name in ALIKE},
        )

    def collate(self, rows: list[dict]) -> dict:
        """A micro-batch; with a token budget in passes of at most so many tokens (rows x longest row, the prompt counted
        for both answers) and `device_batch` pairs per process."""
        parts, world = [rows], shared.world()
        if self.token_budget:
            parts = engine.cut_into_passes(rows, self.token_budget * world, self.device_batch * world)
        passes = [self._pass(part) for part in parts]
        return {"passes": passes, "pairs": sum(part["pairs"] for part in passes)}

    def _pass(self, rows: list[dict]) -> dict:
        mine = rows[shared.rank() :: shared.world()]
        rows = mine or rows[:1]  # a process without a row still takes part, with nothing
        tokens = sum(map(engine.row_tokens, rows))
        return {**self.layout(rows), **engine.reference_columns(rows), "pairs": len(mine), "tokens": tokens}

    def fit(self) -> shared.Outcome:
        with engine.completion_head(self.model):
            outcome = super().fit()
        self.model.zero_grad(set_to_none=True)
        return outcome

    def begin(self) -> None:
        """Before the first step the policy is the reference: the log-ratio is 0 up to rounding."""
        rows = self.train_dataset[: self.args.per_device_train_batch_size]
        table = engine.sequence_logprobs(self.model, rows)
        reference = table.new_tensor([[row[name] for name in engine.REFERENCE] for row in rows])
        slack, share = (0.5, 5e-3) if self.model.dtype == torch.bfloat16 else (1e-3, 1e-5)
        if not torch.allclose(table, reference, share, slack):
            found = f"a log-ratio of {(table - reference).abs().max():.3g} nats before the first step"
            expected = "0: the reference of this very model, quantization and tokenized data"
            fix = "remove the cached reference log-probabilities (.cache) and run again"
            raise StudyError("reference log-probabilities", found, expected, fix)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.columns, self.tokens = [], 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Pairs of this optimizer step, over all processes."""
        return sum(shared.all_gather(sum(batch["pairs"] for batch in batch_samples)))

    def deferred_reduction(self) -> contextlib.AbstractContextManager:
        """Around every pass of a batch but the last one, for a model whose gradients are reduced over processes."""
        return contextlib.nullcontext()

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a batch, in one pass or, with a token budget, in several."""
        *first, last = inputs["passes"]
        with self.deferred_reduction():
            losses = [self._one_pass(model, part, num_items_in_batch) for part in first]
        return sum(losses, self._one_pass(model, last, num_items_in_batch))

    def _one_pass(self, model, inputs, num_items_in_batch):
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            found = f"no memory for a batch of {inputs['pairs']} pairs with {inputs['tokens']} tokens"
            limit = "token_budget" if self.token_budget else "per_device_train_batch_size"
            limit = f"training.{limit} ({self.token_budget or self.device_batch})"
            step, fix = f"step {self.state.global_step + 1}", f"lower {limit} or dataset.preprocessing.max_length"
            raise OutOfMemory(step, found, "a batch that fits the device", fix) from error

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = engine.batch_logprobs(model, inputs)
        values, columns = objective(self.loss_section, chosen, rejected, inputs)
        self.columns.append(columns[: inputs["pairs"]])
        self.tokens += inputs["tokens"]
        return shared.world() * values[: inputs["pairs"]].sum() / (num_items_in_batch or len(values))

    def measure(self) -> dict:
        columns = torch.cat(shared.all_gather(torch.cat(self.columns).cpu()))
        self.pairs = len(columns)
        return summary(columns)

    def throughput(self, seconds: float) -> dict:
        tokens = sum(shared.all_gather(self.tokens))
        return {"pairs_per_second": self.pairs / seconds, "tokens_per_second": tokens / seconds}

    def validate(self) -> dict:
        if not self.validation:  # a benchmark has none
            return {}
        table = engine.sequence_logprobs(self.model, self.validation)
        columns = objective(self.loss_section, *table.unbind(dim=1), engine.reference_columns(self.validation))[1]  # pyright: ignore[reportCallIssue]
        means = summary(columns)
        return {f"validation_{name}": means[name] for name in VALIDATED} | self.sampled_kl()

    def sampled_kl(self) -> dict:
        """A few sampled answers: how far the policy has moved where it speaks itself. Drawn at temperature 1, as the mean
        of log pi - log pi_0 is the KL where they are pi's own."""
        pairs, kept = self.given.pairs["validation"], self.validation[: self.run.evaluation.kl_prompts]
        prompts = [pairs[row["pair"]]["prompt"] for row in kept]  # of pairs that fit into the length limit
        if not prompts:
            return {}
        options = sampling(self.run) | {"temperature": 1.0}
        answers = engine.sample(self.model, self.given.tokenizer, prompts, seed=self.args.seed, **options)
        answers = shared.all_gather(answers)[0]  # what all processes score must be the same to the last token
        ratios = engine.log_ratio_of_samples(self.model, self.frozen, answers).tolist()
        return {"sampled_kl": record.mean(ratios), "sample_length": record.mean([len(a["ids"]) for a in answers])}

    # The model or its adapter in transformers' and PEFT's own form, which other tools load.
    def _save(self, output_dir=None, state_dict=None):
        Trainer._save(self, output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        shared.load_checkpoint(self.model, resume_from_checkpoint)
