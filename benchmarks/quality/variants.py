"""Changes of the model that an ablation asks about and that the package has no field for.

A variant is the value of ``variant`` of a side in a theme; it holds for the process that trains and measures one run.
One of ``WHOLE_ROWS`` changes attention over whole rows, not steps of one token: it writes no samples.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from linpass import LinformerConfig, layers_linformer
from linpass.attention_linformer import mix_and_attend
from linpass.kernels_linformer import attend_blocks, normalise_and_rotate


def use_variant(name: str | None) -> None:
    """Change the model of this process; None changes nothing."""
    if name is not None:
        VARIANTS[name]()


def normalise_both() -> None:
    """Keys and values of slots and of the window, each by the root of its mean square per head, before the softmax.

    Source: Zhu et al. 2021 (Transformer-LS), section 3.4, DualLN; here without weights, as QK-norm is.
    """

    def attend(query, key, value, slot_key, slot_value, layout, first_block_BC=None) -> Tensor:
        states = [_unit_mean_square(part) for part in (key, value, slot_key, slot_value)]
        return attend_blocks(query, *states, layout, first_block_BC)

    def mixed(*arguments: Any, **options: Any) -> Tensor:
        return mix_and_attend(*arguments, **options, attend=attend)

    layers_linformer.mix_and_attend = mixed


def _unit_mean_square(states: Tensor) -> Tensor:
    return F.rms_norm(states, states.shape[-1:]).to(states.dtype)


def zero_output() -> None:
    """Layers that add to the residual stream start at zero (Zhang et al. 2019, Fixup): a model starts without them."""
    layers_linformer._residual_std = lambda config: 0.0


def weighted_norms() -> None:
    """QK-norm with a weight for each feature, as in Qwen3: scores can be as large as the weights make them."""

    class WithNorms(layers_linformer.LinformerAttention):
        def __init__(self, config: LinformerConfig, layer_idx: int):
            super().__init__(config, layer_idx)
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)

        def _normalise_and_rotate(self, query, key, angles) -> tuple[Tensor, Tensor, Tensor]:
            query, key = _in_one_dtype(self.q_norm, query), _in_one_dtype(self.k_norm, key)
            return normalise_and_rotate(query, key, None, angles, rotates_key=self.is_causal or not self.k)

    layers_linformer.LinformerAttention = WithNorms


def _in_one_dtype(norm: nn.RMSNorm, states: Tensor) -> Tensor:
    """Under autocast too: else it is not PyTorch's fused norm."""
    return F.rms_norm(states, norm.weight.shape, norm.weight.to(states.dtype), norm.eps)


VARIANTS: dict[str, Callable[[], None]] = {
    "dual norm": normalise_both,
    "zero output": zero_output,
    "weighted QK-norm": weighted_norms,
}
WHOLE_ROWS = {"dual norm"}
