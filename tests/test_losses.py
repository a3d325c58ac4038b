"""The preference losses against finite differences, their limiting cases, and TRL's own computation."""

import math
from types import SimpleNamespace

import pytest
import torch

from lib.td_dpo.losses import LOSSES, preference_loss
from lib.td_dpo.study import OWN_LOSSES, TRL_LOSSES

SETTINGS = [(b, t) for b in (0.01, 0.05, 0.5, 2.5) for t in (0.5, 1.0, 2.0)]


def four(scale=3.0, size=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator, dtype=torch.float64) * scale - 20).to(dtype) for _ in range(4)]


def gradients(name, tensors, **options):
    leaves = [t.clone().requires_grad_() for t in tensors[:2]]
    loss, *_ = preference_loss(name, *leaves, *tensors[2:], **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("name", OWN_LOSSES)
@pytest.mark.parametrize(("beta", "tau"), SETTINGS)
def test_gradients_match_finite_differences(name, beta, tau):
    tensors, step = four(scale=1.0), 1e-5
    _, (chosen, rejected) = gradients(name, tensors, beta=beta, tau=tau)
    for position, gradient in ((0, chosen), (1, rejected)):
        ends = []
        for sign in (1, -1):
            moved = list(tensors)
            moved[position] = tensors[position] + sign * step
            ends.append(preference_loss(name, *moved, beta=beta, tau=tau)[0])
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), gradient, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(("beta", "tau"), SETTINGS)
def test_derivatives_are_those_of_their_formulas(beta, tau):
    tensors = four()
    r_chosen, r_rejected = tensors[0] - tensors[2], tensors[1] - tensors[3]
    rho, delta = r_chosen - r_rejected, tensors[0] - tensors[1]
    z, sigma, sp = beta * rho, torch.sigmoid, torch.nn.functional.softplus
    m = sigma(z / 0.05)
    in_z = -(1 - m) * sigma(-z) - m * torch.exp(-z) + m * (1 - m) / 0.05 * (torch.exp(-z) - sp(-z))
    expected = {
        "dpo": (-beta * sigma(-z), beta * sigma(-z)),
        "discopop": (beta * in_z, -beta * in_z),
        "td_dpo": (-sigma(-delta / tau) / tau + beta * r_chosen, sigma(-delta / tau) / tau + beta * r_rejected),
        "td_dpo_anchored": (-sigma(-rho / tau) / tau + beta * r_chosen, sigma(-rho / tau) / tau + beta * r_rejected),
    }
    for name, sides in expected.items():
        for got, want in zip(gradients(name, tensors, beta=beta, tau=tau)[1], sides, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_parts_add_up_to_the_loss(name):
    loss, preference, anchor = preference_loss(name, *four(), beta=0.5, tau=2.0)
    torch.testing.assert_close(preference + anchor, loss)
    assert loss.shape == (12,)
    assert bool((anchor > 0).all()) == name.startswith("td_dpo")


@pytest.mark.parametrize("b", [0.05, 0.5, 2.0])
def test_anchored_without_anchor_is_dpo(b):
    anchored = gradients("td_dpo_anchored", four(), beta=0.0, tau=1 / b)
    plain = gradients("dpo", four(), beta=b)
    torch.testing.assert_close(anchored, plain, rtol=1e-12, atol=1e-14)


def test_td_dpo_at_the_reference_has_a_gradient_free_of_beta():
    p_chosen, p_rejected, *_ = four()
    at_reference = [p_chosen, p_rejected, p_chosen, p_rejected]
    small, large = (gradients("td_dpo", at_reference, beta=b, tau=0.5)[1] for b in (0.01, 2.5))
    torch.testing.assert_close(small, large, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_mean_over_equal_lengths_is_the_sum_with_tau_and_beta_rescaled(tokens):
    tensors, beta, tau = four(), 0.3, 0.7
    mean, *_ = preference_loss("td_dpo", *(t / tokens for t in tensors), beta=beta, tau=tau)
    summed, *_ = preference_loss("td_dpo", *tensors, beta=beta / tokens**2, tau=tau * tokens)
    torch.testing.assert_close(mean, summed, rtol=1e-12, atol=0)


def test_tau_times_loss_tends_to_the_hinge_plus_the_anchor():
    tensors, beta, tau = four(), 0.3, 1e-4
    loss, *_ = preference_loss("td_dpo", *tensors, beta=beta, tau=tau)
    delta = tensors[0] - tensors[1]
    anchor = 0.5 * ((tensors[0] - tensors[2]) ** 2 + (tensors[1] - tensors[3]) ** 2)
    torch.testing.assert_close(tau * loss, torch.relu(-delta) + beta * tau * anchor, rtol=0, atol=tau)


@pytest.mark.parametrize("name", [n for n in OWN_LOSSES if n != "discopop_card"])
@pytest.mark.parametrize(("beta", "tau"), SETTINGS)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_finite_at_extreme_margins(name, beta, tau, margin):
    zero = torch.zeros(1)
    loss, gradient = gradients(name, [torch.tensor([margin]), zero, zero, zero], beta=beta, tau=tau)
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(g).all() for g in gradient)


def test_discopop_card_grows_without_bound_above_beta_one():
    zero = torch.zeros(1, dtype=torch.float64)
    loss, *_ = preference_loss("discopop_card", zero - 100, zero, zero, zero, beta=2.5)
    assert math.log(float(loss)) == pytest.approx(150, abs=1e-6)
    zero = zero.float()
    assert torch.isinf(preference_loss("discopop_card", zero - 100, zero, zero, zero, beta=2.5)[0]).all()
    assert torch.isfinite(preference_loss("discopop", zero - 100, zero, zero, zero, beta=2.5)[0]).all()


def test_the_two_forms_of_discopop_agree_only_at_beta_005():
    at = {b: [preference_loss(n, *four(), beta=b)[0] for n in ("discopop", "discopop_card")] for b in (0.05, 0.5)}
    torch.testing.assert_close(*at[0.05])
    assert not torch.allclose(*at[0.5])


def trl_loss(loss_type, tensors, lengths, beta, label_smoothing=0.0):
    """TRL's own trainer code on per-token log-probabilities that add up to `tensors` (independent of lib's adapter)."""
    from trl import DPOTrainer

    width = int(lengths.max()) + 2
    mask = ((torch.arange(width) >= 2) & (torch.arange(width) < lengths[:, None] + 2)).long()
    sums = torch.cat(tensors[:2])
    log_probs = mask[:, 1:] * (sums / lengths)[:, None]
    blank = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    trainer = object.__new__(DPOTrainer)
    from collections import defaultdict

    trainer.__dict__.update(
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        label_smoothing=label_smoothing,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        args=SimpleNamespace(discopop_tau=0.05),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": tensors[2],
        "ref_rejected_logps": tensors[3],
    }
    return trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)


@pytest.mark.parametrize(("ours", "theirs"), [("dpo", "sigmoid"), ("discopop", "discopop")])
@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 2.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_dpo_and_discopop_equal_trl(ours, theirs, beta, dtype, tolerance):
    lengths = torch.tensor([1, 4, 9, 2, 3, 5] * 4)
    leaves = [t.requires_grad_() for t in four(dtype=dtype)]
    results = []
    for value in (preference_loss(ours, *leaves, beta=beta)[0].mean(), trl_loss(theirs, leaves, lengths, beta)):
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_every_trl_loss_type_is_trls_own(name):
    lengths = torch.tensor([1, 4, 9, 2, 3, 5] * 4)
    leaves, smoothing = [t.requires_grad_() for t in four(scale=1.0)], 0.1 if name in ("robust", "exo_pair") else 0.0
    loss, _, anchor = preference_loss(
        name, *leaves, beta=0.3, label_smoothing=smoothing, lengths=(lengths[:12], lengths[12:])
    )
    theirs = trl_loss(name, leaves, lengths, 0.3, smoothing)
    assert loss.shape == (12,)
    assert float(anchor.abs().max()) == 0
    torch.testing.assert_close(loss.mean(), theirs, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(loss.mean(), leaves[:2], allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(theirs, leaves[:2], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)


def test_trl_loss_list_is_trls():
    """A TRL upgrade that adds a loss shows here."""
    from trl import DPOConfig

    described = next(f for f in DPOConfig.__dataclass_fields__.values() if f.name == "loss_type").metadata["help"]
    named = {part.strip(" `'.") for part in described.split("Possible values are:")[1].split(". If")[0].split(",")}
    assert named == {*TRL_LOSSES, "sigmoid", "discopop"}


def test_every_own_loss_that_a_yaml_may_name_is_there():
    assert set(LOSSES) == set(OWN_LOSSES)


def hessian(name, tensors, **options):
    """(B, 2, 2) second derivatives of each pair's loss in (log p+, log p-)."""
    p = torch.stack(tensors[:2], dim=1).requires_grad_()
    loss, *_ = preference_loss(name, p[:, 0], p[:, 1], *tensors[2:], **options)
    gradient = torch.autograd.grad(loss.sum(), p, create_graph=True)[0]
    return torch.stack([torch.autograd.grad(gradient[:, i].sum(), p, retain_graph=True)[0] for i in range(2)], dim=1)


def slope(name, rho, beta):
    """d loss / d rho along log p+, the rest held at 0."""
    zero = torch.zeros_like(rho)
    return gradients(name, [rho, zero, zero, zero], beta=beta)[1][0]


@pytest.mark.parametrize(("beta", "tau"), [(0.01, 0.5), (2.5, 2.0)])
def test_hessian_of_td_dpo(beta, tau):
    tensors = four()
    got = hessian("td_dpo", tensors, beta=beta, tau=tau)
    delta = tensors[0] - tensors[1]
    margin = torch.sigmoid(delta / tau) * torch.sigmoid(-delta / tau) / tau**2
    pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(got, margin[:, None, None] * pattern + beta * torch.eye(2, dtype=torch.float64))
    common = torch.ones(2, dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(got @ common, (beta * common).expand(12, 2), rtol=1e-10, atol=1e-12)
    assert float((hessian("dpo", tensors, beta=beta) @ common).abs().max()) < 1e-12


def test_discopop_pushes_the_wrong_way_near_zero():
    """Slope +0.784 at z = 0, between a minimum at z = -0.119 and a barrier at +0.072: 7.2 nats of rho at beta .01."""
    at = torch.tensor([0.0, -0.119, 0.072], dtype=torch.float64)
    torch.testing.assert_close(slope("discopop", at, beta=1.0), 0.784 * (at == 0).double(), atol=5e-3, rtol=0)
    inside = torch.tensor([-0.11, 0.0, 0.07], dtype=torch.float64)
    outside = torch.tensor([-0.13, 0.08], dtype=torch.float64)
    assert (slope("discopop", inside, beta=1.0) > 0).all()
    assert (slope("discopop", outside, beta=1.0) < 0).all()
    assert (slope("dpo", inside, beta=1.0) < 0).all()


def test_softplus_is_exact_beyond_twenty():
    """torch's softplus is linear above 20; the losses must not inherit that."""
    zero = torch.zeros(1, dtype=torch.float64)
    loss, *_ = preference_loss("dpo", zero + 30, zero, zero, zero, beta=1.0)
    assert float(loss) == pytest.approx(math.log1p(math.exp(-30)), rel=1e-12)
