"""The loss by liger-kernel beside PyTorch's, on a CPU; started by test_training_losses with Triton's interpreter on."""

import itertools

import torch
from torch.nn import functional as F

from linpass.training import losses

IDS, FEATURES = 101, 8  # ids that are filled up


def values(compute, tokens, reduction, smoothing, frozen):
    """The loss, and the gradients of what is not frozen."""
    torch.manual_seed(0)
    factors = {"hidden": torch.randn(tokens, FEATURES), "weight": torch.randn(IDS, FEATURES)}
    free = [factor.requires_grad_() for name, factor in factors.items() if name != frozen]
    target_N = torch.randint(0, IDS, (tokens,))
    target_N[3:5] = -100
    loss = compute(*factors.values(), target_N, reduction, smoothing, -100)
    upstream = torch.arange(1.0, tokens + 1) if reduction == "none" else torch.tensor(0.5)
    return loss.detach(), *torch.autograd.grad(loss, free, upstream)


def by_pytorch(hidden_ND, weight_VD, target_N, reduction, smoothing, ignore_index):
    logits_NV = F.linear(hidden_ND, weight_VD)
    how = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
    return F.cross_entropy(logits_NV, target_N, **how)


for case in itertools.product((20, 0), ("sum", "none"), (0.0, 0.1), ("nothing", "hidden", "weight")):
    found, wanted = (values(compute, *case) for compute in (losses._liger_loss, by_pytorch))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda text, case=case: f"{case}: {text}")
print("equal")
