"""A loss for `./run_all.sh try`: DPO with its sign flipped, which should be refuted."""

from torch.nn.functional import logsigmoid


def loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta):
    rho = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -logsigmoid(-beta * rho)
