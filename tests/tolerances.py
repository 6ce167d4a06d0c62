"""How far two ways to compute the same thing may be apart, and why. Absolute, on values of order one."""

import torch

# float64 rounds at 1.1e-16; sums of some hundred terms through two layers stay near 1e-14.
ORACLE = 1e-12
# The same, over thousands of tokens and through a cache that sums a block in another order.
CACHE = 1e-10

# Error of one attention call against float64 on the same (rounded) inputs, relative in the Frobenius norm.
# float32: sums of up to a few hundred products. bfloat16 rounds at 4e-3, float16 at 5e-4: scores, probabilities and
# outputs are rounded once each. Gradients go through one product more.
VALUE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
GRADIENT = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# Decoding against prefill, both in bfloat16: each is within VALUE of the truth at every layer, of two layers; largest
# difference of any logit over their standard deviation, and the mean difference over it.
BF16_DECODE_MAX, BF16_DECODE_MEAN = 0.15, 0.02


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()
