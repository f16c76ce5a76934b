"""What this package needs of PyTorch's insides, which may be elsewhere in another release."""

from __future__ import annotations

import inspect
import linecache
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from traceback import FrameSummary
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mctf_compile.errors import MctfError
from mctf_compile.narrowing import present

_TORCH = os.path.dirname(torch.__file__)
# What stands between a program that asks for the value of a symbolic number and the answer.
_SYMBOLIC = (os.path.join(_TORCH, "__init__.py"), os.path.join(_TORCH, "fx", "experimental") + os.sep)
# What Dynamo calls where a model reads ``x.data``.
get_data: Callable[..., Any] = getattr(torch._C._autograd, "_get_data_attr", torch.Tensor.detach)


def register_log(name: str, logger: str) -> None:
    """Make ``name`` one that ``torch._logging.set_logs(modules={name: level})`` takes for a logger."""
    torch._logging._internal.register_log(name, logger)


def artifact_log(module: str, name: str, description: str) -> logging.Logger:
    """The logger of a module for something large, which ``torch._logging.set_logs(modules={name: True})`` asks for."""
    torch._logging._internal.register_artifact(name, description, off_by_default=True)
    return torch._logging._internal.getArtifactLogger(module, name)


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Put a text into the structured trace, where ``TORCH_TRACE`` asks for one; ``encoding`` as tlparse has it."""
    torch._logging._internal.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


@dataclass(frozen=True)
class GraphBreak:
    """A line of the user's program that Dynamo does not follow, and the first line of what it says to that.

    ``setting``: with what Dynamo says that it does follow it, as a line of Python, if anything.
    """

    place: str
    why: str
    setting: str | None = None

    @classmethod
    def of(cls, reason: str, stack: Sequence[FrameSummary]) -> GraphBreak:
        why = reason.strip().splitlines()[0].rstrip(".")
        setting = re.search(r"torch\._dynamo\.config\.\w+ = \w+", reason)
        # What Dynamo calls a branch among the reasons of graphs.
        why = "Data-dependent branching" if why.startswith("generic_jump") else why
        return cls(line_of_users(stack), why, setting and setting[0])

    def __str__(self) -> str:
        advice = f"; Dynamo advises {self.setting}" if self.setting else ""
        return f"{self.place} ({self.why}{advice})"


def line_of_users(stack: Iterable[FrameSummary]) -> str:
    """The innermost line of a stack that is no part of PyTorch."""
    frames = [frame for frame in stack if not frame.filename.startswith(_TORCH + os.sep)]
    return f"line {frames[-1].lineno} of {frames[-1].filename}" if frames else "the model"


def break_behind(gm: fx.GraphModule) -> GraphBreak | None:
    """The graph break that Dynamo's graph ends in; None where it ends with the function that is compiled."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return GraphBreak.of(reason.reason, reason.user_stack) if getattr(reason, "graph_break", False) else None


def resumed_at() -> str | None:
    """The line of the graph break behind which the function goes on that Dynamo compiles, if it is such a one."""
    from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX as RESUMED

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_locals.get("code") if frame.f_code.co_name == "_compile" else None
        if isinstance(code, CodeType):
            at = re.fullmatch(RESUMED + r"_.*_at_(\d+)", code.co_name)
            return f"line {at[1]} of {code.co_filename}" if at else None
        frame = frame.f_back
    return None


def reads_numbers(gm: fx.GraphModule) -> bool:
    """Whether a graph reads numbers off tensors, at which Dynamo cuts it unless one graph is demanded."""
    from torch._dynamo import config

    return not config.capture_scalar_outputs and bool(gm.graph.find_nodes(op="call_method", target="item"))


def break_in(error: BaseException) -> GraphBreak | None:
    """The graph break that made a capture without any fail; None for another failure."""
    from torch._dynamo.exc import Unsupported

    return GraphBreak.of(error.msg, error.real_stack) if isinstance(error, Unsupported) else None


def unwrapped(error: MctfError) -> MctfError:
    """The same error for a backend to raise, of a kind that Dynamo raises as it is; it wraps others."""
    return _unwrapped_kind(type(error))(  # type: ignore[arg-type]  # classes are hashable
        str(error), sys._getframe(1)
    )


@cache
def _unwrapped_kind(kind: type[MctfError]) -> type[MctfError]:
    from torch._dynamo.exc import ShortenTraceback

    class Unwrapped(kind, ShortenTraceback):  # type: ignore[misc,valid-type]  # one class for each kind
        def __init__(self, message: str, frame: FrameType) -> None:
            Exception.__init__(self, message)
            # Tracebacks are shown from there on; what Dynamo adds to the message is about faults of its own.
            self.message, self.first_useful_frame = message, frame

        def __str__(self) -> str:
            return self.message

        def __reduce__(self) -> tuple[type[MctfError], tuple[str]]:
            return kind, (self.message,)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Unwrapped, name, getattr(kind, name))
    return Unwrapped


def compiled_apart() -> dict[str, Any]:
    """Arguments for ``torch.compile`` that keep a compilation apart from others of the same code, where it has them."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def buffers_left_alone() -> dict[str, Any]:
    """Arguments for ``DistributedDataParallel`` by which a call leaves buffers alone, which an earlier one may need."""
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


@contextmanager
def counters_restored() -> Iterator[None]:
    """Dynamo counts what happens within, but not for those who look afterwards."""
    from torch._dynamo.utils import counters

    before = {name: Counter(counter) for name, counter in counters.items()}
    try:
        yield
    finally:
        for name in list(counters):
            if name not in before:
                del counters[name]
        for name, counter in before.items():
            counters[name].clear()
            counters[name].update(counter)


@contextmanager
def parameters_gathered(model: object) -> Iterator[None]:
    """Within, the modules that FSDP2 shards have whole parameters, without values, and gather none.

    Dynamo runs their hooks, at which it cuts the graph, and those change more than the modules.
    """
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is None or not isinstance(model, torch.nn.Module):
        yield
        return
    replaced: list[tuple[dict[Any, Any], Any, Any]] = []

    def put(holder: dict[Any, Any], key: Any, value: Any) -> None:
        replaced.append((holder, key, holder[key]))
        holder[key] = value

    def cut(*_: Any) -> None:
        """Stand where a hook of FSDP2 cuts the graph."""

    cutting = torch._dynamo.disable(cut)
    for module in (m for m in model.modules() if isinstance(m, sharded)):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if hook.__module__.startswith("torch.distributed.fsdp")]:
                put(hooks, key, cutting)
        state = module._get_fsdp_state()
        # Before 2.14 a module has one group at most.
        for group in filter(None, getattr(state, "_fsdp_param_groups", [state._fsdp_param_group])):
            for parameter in group.fsdp_params:
                held, info = parameter.sharded_param, parameter._module_info
                whole = torch.empty(1, dtype=held.dtype, device=held.device).expand(held.shape)
                whole = torch.nn.Parameter(whole, requires_grad=held.requires_grad)
                names = (info.param_name, *info.shared_param_names)
                for owner, name in zip((info.module, *info.shared_modules), names, strict=True):
                    put(owner._parameters, name, whole)
    try:
        yield
    finally:
        for holder, key, value in replaced:
            holder[key] = value


@contextmanager
def forget_compilations(backend: Callable[..., Any]) -> Iterator[None]:
    """What Dynamo compiles with ``backend`` within is forgotten afterwards; what it compiled for others stays."""
    from torch._dynamo.convert_frame import input_codes

    before = set(input_codes.seen_ids)
    try:
        yield
    finally:
        for code in [reference() for reference in input_codes.seen]:
            if code is not None:
                _forget(code, backend, id(code) not in before)


def _forget(code: CodeType, backend: Callable[..., Any], new: bool) -> None:
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    entries = _debug_get_cache_entry_list(code)
    own = [entry for entry in entries if getattr(entry.backend, "compiler_fn", None) is backend]
    if len(own) == len(entries):
        if new or own:
            reset_code(code)
        return
    for entry in own:
        manager = entry.guard_manager
        present(manager.extra_state).invalidate(entry, DeletedGuardManagerWrapper("only looked at"))


class WatchedShapeEnv(ShapeEnv):
    """A shape environment that notes where code turns its symbolic numbers into plain ones, or branches on them.

    Attributes:
        decisions: the file, line and text of each such place within ``watched``, without those in PyTorch or in this
            package.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.decisions: list[str] = []
        self._watching = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what is decided within."""
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def evaluate_sym_node(self, *args: Any, **kwargs: Any) -> Any:
        """As PyTorch has it: every ``int(n)``, ``range(n)`` and ``if n > 1`` comes through here."""
        if self._watching:
            self._note(sys._getframe(1))
        return super().evaluate_sym_node(*args, **kwargs)

    def _note(self, frame: FrameType) -> None:
        """Note the place where the innermost function that is not part of the answer asks.

        It asks by a method of the number, as ``__bool__``; operators that compare sizes have no such frame.
        """
        by_number = False
        while frame.f_back is not None and frame.f_code.co_filename.startswith((__file__, *_SYMBOLIC)):
            by_number |= frame.f_code.co_filename == _SYMBOLIC[0]
            frame = frame.f_back
        file = frame.f_code.co_filename
        if by_number and not file.startswith((_TORCH + os.sep, os.path.dirname(__file__) + os.sep)):
            text = linecache.getline(file, frame.f_lineno).strip()
            place = f"line {frame.f_lineno} of {file}" + (f": {text}" if text else "")
            if place not in self.decisions:
                self.decisions.append(place)


def compilation() -> tuple[int, int, int | None]:
    """Of the compilation that is going on: its number among those of its frame, how many there may be, and the frame.

    The frame is None where Dynamo is compiling none.
    """
    from torch._dynamo import config
    from torch._guards import CompileContext

    now = CompileContext.current_compile_id()
    if now is None or now.frame_id is None or now.frame_compile_id is None:
        return 0, config.recompile_limit, None
    return now.frame_compile_id, config.recompile_limit, now.frame_id


def fixed_size(gm: fx.GraphModule, number: int, dim: int) -> str | None:
    """The line of the model that fixes a size which Dynamo had left open: a dimension of one of a graph's tensors."""
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("example_value"), torch.Tensor)]
    source = getattr(inputs[number].meta.get("grapharg"), "source", None)
    env = getattr(getattr(inputs[number].meta["example_value"], "fake_mode", None), "shape_env", None)
    if source is None or env is None:
        return None
    name = f"{source.name}.size()[{dim}]"
    symbol = next((s for s, sources in env.var_to_sources.items() if name in [found.name for found in sources]), None)
    guards = [g for g in env.guards if symbol is not None and symbol in g.expr.free_symbols and g.expr.is_Equality]
    return next((g.sloc.maybe_user_loc for g in guards if env.replace(symbol).is_number), None)
