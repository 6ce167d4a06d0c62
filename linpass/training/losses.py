"""Cross-entropy of a linear head that never forms the logits [tokens, vocabulary], and models that compute it so.

Shapes: N tokens, D features of a hidden state, V ids of the vocabulary.
"""

import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

IMPLEMENTATIONS = ("auto", "torch", "liger", "checkpoint", "plain")
REDUCTIONS = ("mean", "sum", "none")
# Logits that exist at one time, 268 MB in float32: matrix products that fill a GPU, little beside 48 * 512 * 50257.
LOGITS_PER_CHUNK = 2**26
# Bytes of those by liger-kernel, or twice as many: every chunk reads and writes the gradient of the head, in float32.
LIGER_BYTES = 2**28
HALF = (torch.bfloat16, torch.float16)
# Logits whose rows are a multiple of this long are aligned; for GPT-2's 50,257 ids cuBLAS falls back to kernels for the
# GPUs of 2018, at a third of the speed on an H200.
ALIGNED_IDS, ALIGNED_FEATURES, NEVER = 64, 8, -1e30

Function = TypeVar("Function", bound=Callable[..., Any])


def _not_compiled(function: Function) -> Function:
    """``torch.compiler.disable``, whose own annotations lose the function's."""
    disabled: Any = torch.compiler.disable(function)
    return disabled


# A compiler that traced into this would be free to keep every chunk; a graph break is the price of small memory.
@_not_compiled
def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    implementation: str = "auto",
) -> Tensor:
    r"""Negative log-likelihood of the targets under :math:`\mathrm{softmax}(h W^\top)`, nats, in float32 or float64.

    The value and gradients of ``F.cross_entropy(F.linear(hidden, weight), target)``. Under autocast both factors are
    cast as ``F.linear`` would cast them.

    Args:
        target_N: ids; rows with ``ignore_index`` count nowhere. All rows ignored: "mean" is nan, "sum" is 0.
        reduction: "mean" over the rows that count, "sum", or "none" (0 in rows that do not count).
        label_smoothing: :math:`\epsilon` of torch and transformers: :math:`\epsilon / V` goes to every id.
        implementation:
            "torch": PyTorch's chunked operation (2.13). In half precision its scalar loss is rounded to that precision
            after every chunk, so there it is asked for one loss per token, which costs one more product with the head
            in the backward pass.
            "liger": the kernels of liger-kernel, CUDA only; they sum losses and gradients in float32. For the
            reduction "none" it is "checkpoint".
            "checkpoint": ``F.cross_entropy`` chunk by chunk, logits computed again in the backward pass; any torch.
            "plain": all logits at once, for comparison.
            "auto": liger in half precision on CUDA where it is installed, else torch, liger, checkpoint, the first
            that can be used.

    Raises:
        ValueError: an unknown reduction or implementation, or one that this machine cannot run.
    Cost: time O(N·D·V); memory O(N·D + V·D) and LOGITS_PER_CHUNK logits, with liger 2 · LIGER_BYTES at most. No second
        backward pass, no second derivative.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
    chosen = choose_implementation(implementation, hidden_ND)
    hidden_ND, weight_VD = _as_autocast(hidden_ND), _as_autocast(weight_VD)
    target_N = target_N.long()
    compute = {"torch": _torch_loss, "liger": _liger_loss, "checkpoint": _checkpoint_loss, "plain": _plain_loss}[chosen]
    inner = "none" if reduction == "none" else "sum"
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss = compute(hidden_ND, weight_VD, target_N, inner, label_smoothing, ignore_index)
    return loss / (target_N != ignore_index).sum() if reduction == "mean" else loss


def choose_implementation(requested: str, hidden_ND: Tensor) -> str:
    """The implementation that "auto" stands for here, or the requested one if it can run.

    Raises:
        ValueError: it cannot.
    """
    torch_has_it = hasattr(nn, "LinearCrossEntropyOptions")
    liger_runs = hidden_ND.is_cuda and hidden_ND.dtype != torch.float64 and find_spec("liger_kernel") is not None
    if requested not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={requested!r} must be one of {', '.join(IMPLEMENTATIONS)}")
    if requested == "torch" and not torch_has_it:
        raise ValueError(f"implementation='torch' needs torch 2.13 or later; this is {torch.__version__}")
    if requested == "liger" and not liger_runs:
        raise ValueError("implementation='liger' needs CUDA, not float64, and liger-kernel: pip install liger-kernel")
    if requested != "auto":
        return requested
    if liger_runs and _as_autocast(hidden_ND[:0]).dtype in HALF:
        return "liger"
    return "torch" if torch_has_it else "liger" if liger_runs else "checkpoint"


def _as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that ``F.linear`` would compute with."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _plain_loss(hidden_ND, weight_VD, target_N, reduction, smoothing, ignore_index) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(
        logits_NV, target_N, reduction=reduction, label_smoothing=smoothing, ignore_index=ignore_index
    )


def _checkpoint_loss(hidden_ND, weight_VD, target_N, reduction, smoothing, ignore_index) -> Tensor:
    # The chunks' gradients of the weight are added up in this dtype.
    wide_VD = weight_VD.to(torch.promote_types(weight_VD.dtype, torch.float32))

    def chunk_loss(chunk_ND, wide_VD, target_N):
        return _plain_loss(chunk_ND, wide_VD.to(weight_VD.dtype), target_N, reduction, smoothing, ignore_index)

    rows = _rows_per_chunk(weight_VD)
    losses = [
        checkpoint(chunk_loss, chunk_ND, wide_VD, chunk_N, use_reentrant=False, preserve_rng_state=False)
        for chunk_ND, chunk_N in zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
    ]
    return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()


def _torch_loss(hidden_ND, weight_VD, target_N, reduction, smoothing, ignore_index) -> Tensor:
    half = hidden_ND.dtype in HALF
    wide = _with_aligned_ids(hidden_ND, weight_VD) if half and weight_VD.is_cuda else (hidden_ND, weight_VD)
    options = nn.LinearCrossEntropyOptions(  # pyright: ignore[reportAttributeAccessIssue]
        batch_chunk_size=_rows_per_chunk(weight_VD),
        acc_policy="balanced" if hidden_ND.is_cuda else "accurate",
        acc_dtype=torch.float32 if half else None,
    )
    loss = F.linear_cross_entropy(  # pyright: ignore[reportAttributeAccessIssue]
        *wide,
        target_N,
        reduction="none" if half else reduction,
        ignore_index=ignore_index,
        options=options,
    )
    if half:
        loss = loss.float() if reduction == "none" else loss.float().sum()
    if smoothing:
        loss = loss + smoothing * _smoothing_term(hidden_ND, weight_VD, target_N, reduction, ignore_index)
    return loss


def _smoothing_term(hidden_ND, weight_VD, target_N, reduction, ignore_index) -> Tensor:
    r"""What smoothing adds per :math:`\epsilon`: the target's logit minus the mean logit, :math:`h (w_y - \bar w)`.

    PyTorch's chunked operation has no smoothing; this difference needs no logits.
    """
    keep_N = target_N != ignore_index
    direction_ND = F.embedding(target_N.where(keep_N, 0), weight_VD) - weight_VD.mean(0)
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    term_N = (hidden_ND.to(wide) * direction_ND.to(wide)).sum(-1) * keep_N
    return term_N if reduction == "none" else term_N.sum()


def _liger_loss(hidden_ND, weight_VD, target_N, reduction, smoothing, ignore_index) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if reduction == "none" or not len(hidden_ND):  # wrong gradients before 0.8; a division by no rows
        return _checkpoint_loss(hidden_ND, weight_VD, target_N, reduction, smoothing, ignore_index)
    if torch.is_grad_enabled() and weight_VD.requires_grad and not hidden_ND.requires_grad:
        hidden_ND = hidden_ND.detach().requires_grad_()  # without it the weight would get no gradient either
    wide_ND, wide_VD = _with_aligned_ids(hidden_ND, weight_VD)
    wanted = {"_input": wide_ND, "weight": wide_VD, "target": target_N}
    wanted |= {"ignore_index": ignore_index, "reduction": reduction, "accum_dtype": torch.float32}
    parameters = _parameters_of(LigerFusedLinearCrossEntropyFunction.forward)
    if missing := wanted.keys() - parameters.keys():
        raise ValueError(f"this liger-kernel takes no {', '.join(sorted(missing))}; linpass needs 0.6.2 or later")
    wanted["chunk_mem_const"] = max(1, LIGER_BYTES // hidden_ND.nbytes)  # where it has that
    arguments = [wanted.get(name, parameter.default) for name, parameter in parameters.items() if name != "ctx"]
    loss = LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]
    if smoothing:  # its own would spread over the filling too
        loss = loss + smoothing * _smoothing_term(hidden_ND, weight_VD, target_N, reduction, ignore_index)
    return loss


@functools.cache
def _parameters_of(function: Callable[..., Any]) -> Any:
    return inspect.signature(function).parameters


def _with_aligned_ids(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The head filled up to a multiple of ALIGNED_IDS, and one feature more, which gives the filling the probability 0.

    A bias would do that, too; but it is added to all logits, and its gradient is a sum over all of them.
    """
    missing, features = -len(weight_VD) % ALIGNED_IDS, weight_VD.shape[1]
    if not missing:
        return hidden_ND, weight_VD
    more = -features % ALIGNED_FEATURES or ALIGNED_FEATURES
    wide_VD = F.pad(weight_VD, (0, more, 0, missing))
    wide_VD[-missing:, features] = max(NEVER, torch.finfo(weight_VD.dtype).min)
    one = F.pad(hidden_ND.new_ones(len(hidden_ND), 1), (0, more - 1))
    return torch.cat((hidden_ND, one), 1), wide_VD


def _rows_per_chunk(weight_VD: Tensor) -> int:
    return max(1, LOGITS_PER_CHUNK // len(weight_VD))


def use_linear_cross_entropy(
    model: PreTrainedModel, label_smoothing: float = 0.0, implementation: str = "auto"
) -> None:
    """Make ``model(input_ids, labels=...)`` return the loss without logits, in training and evaluation.

    The loss is transformers': labels are shifted inside (not for a masked LM), ``shift_labels`` and
    ``num_items_in_batch`` mean what they do there. ``logits`` of the output is None. Calls without labels, such as
    those of ``generate``, go the old way. Nothing changes in the weights or in what is saved; hooks and wrappers (DDP,
    FSDP, activation checkpointing) stay in force. Not for ``nn.DataParallel``, whose copies would call this model.

    Args:
        model: a causal or masked language model whose logits are the last hidden state times the weight of a linear
            head, before it is wrapped.
        label_smoothing, implementation: see :func:`linear_cross_entropy`. With smoothing here the Trainer must have
            none (``label_smoothing_factor=0``): it would take the labels away and wait for logits.

    Raises:
        ValueError: the model's own loss is another: its head has a bias, scales or caps the logits, or has a layer
            before it; found out by running the model on two tokens.
    """
    choose_implementation(implementation, torch.empty(0, 1, device=model.device, dtype=model.dtype))
    restore_forward(model)
    check_head(model)
    model.forward = LogitsFreeForward(model, label_smoothing, implementation)


def restore_forward(model: nn.Module) -> None:
    """Undo :func:`use_linear_cross_entropy`; a model on which it was not used stays as it is."""
    forward: Any = model.forward
    while forward is not None and not isinstance(forward, LogitsFreeForward):
        forward = getattr(forward, "__wrapped__", None)  # mixed precision wraps what it finds
    if forward is not None:
        forward.active = False
    if forward is not None and model.__dict__.get("forward") is forward:
        del model.forward


class LogitsFreeForward:
    """The forward pass that :func:`use_linear_cross_entropy` puts in the place of a model's own.

    An object, not a function inside a function, so that the model can still be pickled and copied.
    """

    def __init__(self, model: PreTrainedModel, label_smoothing: float, implementation: str) -> None:
        functools.update_wrapper(self, model.forward)  # readers of the signature find the model's
        self.original = model.forward
        self.model = model
        self.argument_names = tuple(inspect.signature(model.forward).parameters)
        self.masked = model.loss_type == "ForMaskedLM"
        self.label_smoothing = label_smoothing
        self.implementation = implementation
        self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; with labels, a loss and no logits."""
        inputs = dict(zip(self.argument_names, args, strict=False)) | kwargs
        labels = inputs.pop("labels", None)
        if labels is None or not self.active:
            return self.original(*args, **kwargs)
        loss_inputs = [inputs.pop(name, None) for name in ("shift_labels", "num_items_in_batch", "return_dict")]
        inputs.pop("logits_to_keep", None)  # there are none to keep
        return self._output(self.model.base_model(**inputs, return_dict=True), labels, *loss_inputs)

    @_not_compiled  # the layers are compiled; here the loss breaks the graph anyhow
    def _output(self, outputs, labels, shift_labels, items, return_dict) -> Any:
        if self.masked:
            target = labels
        else:
            target = F.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels
        hidden = outputs.last_hidden_state
        head: Any = self.model.get_output_embeddings()
        if issubclass(type(head), FSDPModule) and not torch.is_grad_enabled():
            # FSDP gathers the head with the last norm, and before torch 2.13 gathers neither again until both have run;
            # a backward pass sets that right, an evaluation has none.
            head(hidden[..., :0, :])
        loss: Any = linear_cross_entropy(
            hidden.flatten(0, -2),
            head.weight,
            target.flatten().to(hidden.device),
            reduction="mean" if items is None else "sum",
            label_smoothing=self.label_smoothing,
            implementation=self.implementation,
        )
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        kept = {name: outputs.get(name) or None for name in ("hidden_states", "attentions")}
        if self.masked:
            output = MaskedLMOutput(loss=loss, **kept)
        else:
            output = CausalLMOutputWithPast(loss=loss, past_key_values=outputs.get("past_key_values"), **kept)
        plain_tuple = return_dict is False or (return_dict is None and not self.model.config.return_dict)
        return output.to_tuple() if plain_tuple else output


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model's loss is the cross-entropy of head weight times last hidden state.

    The model runs on two tokens while its head puts out known large numbers: what changes them shows in the loss.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"{name}: the head must be a linear layer without bias to do without logits; it is {head}")
    seen: dict[str, Tensor] = {}

    def replace_logits(_head, inputs, output):
        seen["hidden"] = inputs[0]
        numbers = torch.arange(output.numel(), device=output.device) * 37 % 41 - 20
        seen["logits"] = numbers.view_as(output).to(output.dtype)
        return seen["logits"]

    ids = torch.arange(2, device=model.device).unsqueeze(0) % len(head.weight)
    training = [module for module in model.modules() if module.training]
    hook = head.register_forward_hook(replace_logits)
    model.eval()
    try:
        loss = model(input_ids=ids, labels=ids).loss
        hidden = model.base_model(input_ids=ids).last_hidden_state
    finally:
        hook.remove()
        for module in training:
            module.training = True
    logits = seen["logits"][0].float()
    masked = model.loss_type == "ForMaskedLM"
    expected = F.cross_entropy(logits, ids[0]) if masked else F.cross_entropy(logits[:1], ids[0, 1:])
    same_input = hidden.shape == seen["hidden"].shape and torch.allclose(hidden, seen["hidden"])
    if not same_input or not torch.allclose(loss.float(), expected, rtol=1e-3):
        raise ValueError(
            f"{name}: its loss is not the cross-entropy of head weight times last hidden state (a layer before "
            "the head, scaled or capped logits, or a loss of its own), so it needs its logits"
        )
