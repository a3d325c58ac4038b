"""IW-LoRA's trainer where it could go wrong unseen: several processes, accumulation, saving, AdaLoRA through PEFT."""

import json
import os
import signal
import traceback

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import PeftModel

from lib import training as checkpoints
from lib.iw_lora import trainer
from tests.test_iw_lora import ADALORA, BATCH, deberta, fit, moved, trainables, trainer_of


def test_two_processes_count_the_penalty_once(tmp_path):
    """Each process adds the whole R to the loss of its half of the batch; the average of gradients must hold it
    once."""
    two, (one,) = one_step(tmp_path / "two", processes=2), one_step(tmp_path / "one", processes=1)
    assert one["penalty"] > 0.1
    assert [said["penalty"] for said in two] == pytest.approx([one["penalty"]] * 2, rel=1e-6)
    assert [said["grad_norm"] for said in two] == pytest.approx([one["grad_norm"]] * 2, rel=1e-4)


def one_step(folder, processes: int) -> list[dict]:
    """What each of `processes` records of one optimizer step over 32 rows. Forked, for they import nothing then."""
    children, folder = [], folder.absolute()
    folder.mkdir()
    for rank in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                AcceleratorState._reset_state(reset_partial_state=True)  # a test before this one may have made it alone
                if processes > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes)
                    )
                    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=processes)
                place = folder / str(rank)
                term, said = trainer.Term(0.5, torch.ones(4)), []
                mine = trainer_of(place, moved(deberta()), term, steps=1, batch_size=32 // processes)
                mine.write = said.append  # StudyTrainer writes on rank 0 alone
                mine.fit()
                (place / "said.json").write_text(json.dumps(said[0]))
                assert (dist.get_world_size() if dist.is_initialized() else 1) == processes
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
    return [json.loads((folder / str(rank) / "said.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_one_batch_of_32_equals_8_accumulated_4_times_in_every_element(tmp_path, monkeypatch, alpha):
    """The gradients themselves, as the optimizer is given them."""
    found = {}
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters, *arguments, **options):
        parameters = list(parameters)
        found[size] = [p.grad.detach().clone() for p in parameters if p.grad is not None]
        return clip(parameters, *arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    for size in (32, 8):
        fit(
            tmp_path / str(size),
            moved(deberta()),
            trainer.Term(alpha, torch.ones(4)),
            steps=1,
            batch_size=size,
            gradient_accumulation_steps=32 // size,
        )
    assert found[32]
    for one, four in zip(found[32], found[8], strict=True):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)


def test_an_adalora_adapter_reloads_through_peft_with_the_same_output(tmp_path):
    model = deberta(ADALORA, steps=12)
    fit(tmp_path / "run", model, steps=12)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    base = deberta({"type": "none"})
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = {k: v for k, v in BATCH.items() if k != "labels"}
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert sum(trainer.ranks_used(model).values()) == 8 * 4


@pytest.mark.parametrize("place", ["_save", "_save_optimizer_and_scheduler", "mark_complete"])
@pytest.mark.parametrize("adapter", [{}, ADALORA], ids=["lora", "adalora"])
def test_a_kill_inside_a_save_resumes_bit_identical(tmp_path, adapter, place):
    """A child is killed for real at the second checkpoint; what it half wrote does not count."""
    straight = deberta(adapter, 12)
    fit(tmp_path / "straight", straight, steps=12, every=4)
    child = os.fork()
    if child == 0:
        try:
            _die_inside(place, tmp_path / "killed", adapter)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    half = checkpoints.checkpoint_folders(tmp_path / "killed" / "checkpoints")
    assert [p.name for p in half if checkpoints.read_marker(p) is not None] == ["checkpoint-4"]
    again = deberta(adapter, 12)
    outcome, steps = fit(tmp_path / "killed", again, steps=12, every=4)
    assert outcome.step == 12
    assert [row["step"] for row in steps] == list(range(1, 13))
    mine, theirs = trainables(straight), trainables(again)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def _die_inside(place: str, folder, adapter) -> None:
    """Train as `fit` does; SIGKILL where the checkpoint of step 8 is being written."""
    torch.set_num_threads(1)
    owner = checkpoints if place == "mark_complete" else trainer.ImportanceTrainer
    real = getattr(owner, place)

    def dies(*arguments, **options):
        if any("checkpoint-8" in str(a) for a in (*arguments, *options.values())):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(owner, place, dies)
    trainer_of(folder, deberta(adapter, 12), steps=12, every=4).fit()
