"""Part of normalize: run a graph with what is opaque in it opened, and with no region of its own left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap_with_autocast, wrap_with_set_grad_enabled
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from mctf_compile.compat import get_data
from mctf_compile.errors import UnsupportedGraph
from mctf_compile.passes.subclasses import call, is_wrapper


class Opener(fx.Interpreter):
    """Runs a graph, with opaque operators replaced by what they compute.

    Regions of ``no_grad`` and ``inference_mode`` are replaced by detaching what enters them. Those of autocast are
    entered, which puts them into a graph that is traced.

    ``checkpoint`` numbers the activation checkpoint that the graph is the body of, and ``numbers`` those within it.
    What it runs is marked for AOTAutograd, which recomputes it in the backward pass. ``gradients``: whether they are
    recorded around the model.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        checkpoint: int | None = None,
        gradients: bool | None = None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        super().__init__(gm)
        # Reasons go into reports as they are.
        self.extra_traceback = False
        self.checkpoint = checkpoint
        self.numbers = numbers or count(1)
        self.gradients = torch.is_grad_enabled() if gradients is None else gradients
        self._entered: list[torch.autocast] = []
        self._detached: dict[Tensor, Tensor] = {}

    def run(self, *inputs: Any) -> Any:  # type: ignore[override]  # of the inputs alone
        before = torch.is_grad_enabled()
        try:
            return super().run(*inputs)
        finally:
            _record_gradients(before)
            # Where something was raised on the way, nobody else leaves what was entered.
            while self._entered:
                self._end_autocast(self._entered[-1])

    def run_node(self, n: fx.Node) -> Any:
        if self.checkpoint is not None:
            n.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            n.meta["ac_graph_id"] = self.checkpoint
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        operands = super().fetch_args_kwargs_from_env(n)
        if torch.is_grad_enabled() == self.gradients:
            return operands
        return fx.node.map_aggregate(operands, self._with_gradients_as_here)

    def _with_gradients_as_here(self, value: Any) -> Any:
        """An operand in a region that records gradients where its surroundings do not, or the other way."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        if self.gradients:
            # Once each: a residual stream that parts into two is none.
            if value not in self._detached:
                self._detached[value] = value.detach()
            return self._detached[value]
        raise UnsupportedGraph("the model enables gradients where its caller has disabled them")

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self._REPLACED:
            return self._REPLACED[target](self, *args)
        if target is torch._transformer_encoder_layer_fwd:
            opened = _encoder_layer(*args, **kwargs)
            if opened is not None:
                return opened
        return call(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(map(is_wrapper, args)):
            return super().call_method(target, args, kwargs)
        return call(getattr(type(args[0]), target), args, kwargs)

    def _open(self, body: fx.GraphModule, operands: Sequence[Any], checkpoint: int | None = None) -> Any:
        inside = self.checkpoint if checkpoint is None else checkpoint
        return Opener(body, inside, self.gradients, self.numbers).run(*operands)

    def _open_checkpoint(self, body: fx.GraphModule, *operands: Any) -> Any:
        if "_checkpoint_context_fn" in body.meta:
            raise UnsupportedGraph("an activation checkpoint has a policy of its own (context_fn)")
        return self._open(body, operands, next(self.numbers))

    def _begin_autocast(self, *state: Any) -> torch.autocast:
        self._entered.append(torch.autocast(*state))
        entered: torch.autocast = self._entered[-1].__enter__()
        return entered

    def _end_autocast(self, mode: torch.autocast) -> None:
        self._entered.remove(mode)
        mode.__exit__(None, None, None)

    def _open_autocast(
        self,
        device: str,
        dtype: torch.dtype | None,
        enabled: bool,
        cached: bool | None,
        body: fx.GraphModule,
        *operands: Any,
    ) -> Any:
        mode = self._begin_autocast(device, dtype, enabled, cached)
        result = self._open(body, operands)
        self._end_autocast(mode)
        return result

    def _switch_gradients(self, enabled: bool) -> None:
        _record_gradients(enabled)

    def _open_gradients(self, enabled: bool, body: fx.GraphModule, *operands: Any) -> Any:
        before = torch.is_grad_enabled()
        _record_gradients(enabled)
        result = self._open(body, operands)
        _record_gradients(before)
        return result

    def _begin_inference_mode(self, enabled: bool) -> bool:
        """Inference mode as far as gradients go; returns whether they were recorded before."""
        if torch.is_inference_mode_enabled() and not enabled:
            raise UnsupportedGraph("the model leaves the inference mode that its caller has entered")
        before = torch.is_grad_enabled()
        _record_gradients(not enabled)
        return before

    _REPLACED: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {
        tag_activation_checkpoint: _open_checkpoint,
        wrap_with_autocast: _open_autocast,
        wrap_with_set_grad_enabled: _open_gradients,
        _enter_autocast: _begin_autocast,
        _exit_autocast: _end_autocast,
        torch._C._set_grad_enabled: _switch_gradients,
        _enter_inference_mode: _begin_inference_mode,
        _exit_inference_mode: _switch_gradients,
        # The memory of a tensor, which a tracer would take for a constant.
        get_data: lambda self, x: x.detach(),
    }


def _record_gradients(enabled: bool) -> None:
    """Switch the recording of gradients, which leaves no note in a graph that is traced."""
    with torch._C.DisableTorchFunction():
        torch._C._set_grad_enabled(enabled)


def _encoder_layer(
    x: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor | None:
    """``aten._transformer_encoder_layer_fwd`` on [B, N, C] as plain operators; None with a mask."""
    if mask is not None:
        return None

    def attend(y: Tensor) -> Tensor:
        qkv = F.linear(y, qkv_weight, qkv_bias).unflatten(-1, (3, heads, width // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(out, proj_weight, proj_bias)

    def mlp(y: Tensor) -> Tensor:
        hidden = F.linear(y, fc1_weight, fc1_bias)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), fc2_weight, fc2_bias)

    def norm1(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), norm1_weight, norm1_bias, eps)

    def norm2(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), norm2_weight, norm2_bias, eps)

    if norm_first:
        x = x + attend(norm1(x))
        return x + mlp(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + mlp(x))
