"""The graphs that Dynamo captures of a model, which is not run; it and PyTorch stay as they were."""

from __future__ import annotations

import copy
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from mctf_compile.compat import (
    GraphBreak,
    break_behind,
    break_in,
    compiled_apart,
    counters_restored,
    forget_compilations,
    line_of_users,
    parameters_gathered,
    reads_numbers,
)
from mctf_compile.errors import MctfError

T = TypeVar("T")
# Makes something of a graph and its inputs.
Take = Callable[[fx.GraphModule, Sequence[Any]], T]


@dataclass(frozen=True)
class Captured(Generic[T]):
    """What was made of each graph.

    ``breaks``: where graphs end before the model does, in the order met. ``stopped``: why the capture ended before the
    model did, if so.
    """

    found: list[T]
    breaks: Sequence[GraphBreak] = ()
    stopped: str | None = None

    def largest(self, size: Callable[[T], Any]) -> T:
        """The one of the greatest size. Raises ``MctfError`` where no graph was captured."""
        if not self.found:
            raise MctfError(f"Dynamo captured no graph of this model: {self.stopped or NOTHING_TO_COMPILE}.")
        return max(self.found, key=size)


NOTHING_TO_COMPILE = "it runs no tensor operation that can be compiled"


class _Stop(Exception):
    """Raised in the place of running a graph."""


class _Asked(Exception):
    """Raised of a graph that Dynamo makes in one piece where that is demanded, and in several where it is not."""


def capture(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], take: Take[T]) -> Captured[T]:
    """What ``take`` makes of each graph that Dynamo captures of ``model(*args, **kwargs)`` with static shapes.

    A model that is one graph is not run at all. One with graph breaks is run on fake tensors, and what it sets of its
    modules meanwhile is set back. Where it asks for the values of its tensors, a copy of it is run on copies of the
    inputs; of what cannot be copied, and of a function, the capture ends there.

    Raises what ``take`` raises, and what ``torch.compile`` raises of the model.
    """
    with counters_restored(), parameters_gathered(model):
        found = _one_graph(model, args, kwargs, take)
        if isinstance(found, Captured):
            return found
        pieces = _pieces(model, args, kwargs, take, found, _NoData)
        if pieces.stopped is None or not isinstance(model, nn.Module):
            return pieces
        try:
            model, args, kwargs = copy.deepcopy((model, args, kwargs))
        except Exception:
            return pieces
        return _pieces(model, args, kwargs, take, found, nullcontext)


def _one_graph(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], take: Take[T]
) -> Captured[T] | list[GraphBreak]:
    """The graph of a model without graph breaks; of any other, the first of those where that is known."""
    backend = _Backend(take)
    try:
        torch.compile(_call(), backend=backend, fullgraph=True, dynamic=False)(model, args, kwargs)
    except _Stop:
        return Captured(backend.found)
    except _Asked:
        return []
    except Exception as error:
        backend.raise_failure()
        found = break_in(error)
        return [] if found is None else [found]
    return []


def _pieces(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    take: Take[T],
    breaks: Sequence[GraphBreak],
    values: Callable[[], AbstractContextManager[Any]],
) -> Captured[T]:
    """The graphs of a model that is run, with ``values`` (or none), as far as that goes.

    ``breaks``: graph breaks that are known.
    """
    backend = _Backend(take, run=True)
    compiled = torch.compile(_call(), backend=backend, dynamic=False, **compiled_apart())
    stopped = None
    with forget_compilations(backend), _random_state_restored(), _modules_restored(model), values():
        try:
            compiled(model, args, kwargs)
        except Exception as error:
            backend.raise_failure()
            if not _needs_data(error):
                raise
            stopped = f"{_place(error)} needs the values of tensors"
    places = {found.place: found for found in reversed([*breaks, *backend.breaks])}
    return Captured(backend.found, list(reversed(places.values())), stopped)


class _Backend(Generic[T]):
    """A backend that keeps what ``take`` makes of each graph, or the error that it raises."""

    def __init__(self, take: Take[T], run: bool = False) -> None:
        self.take, self.run = take, run
        self.found: list[T] = []
        self.breaks: list[GraphBreak] = []
        self.failure: Exception | None = None

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if not self.run and reads_numbers(gm):
            raise _Asked
        try:
            with _disable_current_modes():
                self.found.append(self.take(gm, inputs))
        except Exception as error:
            self.failure = error
            raise
        here = break_behind(gm)
        if here is not None:
            self.breaks.append(here)
        return gm.forward if self.run else _stop

    def raise_failure(self) -> None:
        """Raise the error of ``take`` as it was, which Dynamo wraps."""
        if self.failure is not None:
            raise self.failure from None


def _needs_data(error: Exception) -> bool:
    """Whether it is what ends a run on tensors without data, where one with data goes on."""
    kinds = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
    )
    return isinstance(error, kinds) or ".numpy() is not supported for tensor subclasses" in str(error)


def _place(error: Exception) -> str:
    """The line of the model's own code that an error comes from."""
    return line_of_users(f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__)


def _stop(*inputs: Any) -> Any:
    raise _Stop


def _call() -> Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]:
    """A function that calls a model, with code of its own: what Dynamo keeps of it goes with it."""

    def call(self: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self(*args, **kwargs)

    return FunctionType(call.__code__.replace(), globals(), call.__name__)


class _NoData(FakeTensorMode):
    """Computes shapes alone, of real tensors too: none of them is read or written."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        # A number that the program itself makes a tensor of is known.
        if func not in self.lift_fns:
            args, kwargs = tree_map_only(Tensor, self._without_data, (args, kwargs or {}))
        return super().dispatch(func, types, args, kwargs or {})

    def _without_data(self, x: Tensor) -> Tensor:
        return self.from_tensor(x) if type(x) in (Tensor, nn.Parameter) else x


@contextmanager
def _random_state_restored() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        stack.callback(random.setstate, random.getstate())
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        yield


@contextmanager
def _modules_restored(model: Callable[..., Any]) -> Iterator[None]:
    """What modules hold, and the lists, dicts and sets among it, are as before when it ends."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    held: dict[int, tuple[Any, Any]] = {}
    for module in modules:
        for value in (module.__dict__, *module.__dict__.values()):
            if isinstance(value, (dict, list, set)):
                held[id(value)] = value, copy.copy(value)
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    try:
        # A write counts as one, though nothing is written.
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(tensors)):
            yield
    finally:
        for value, before in held.values():
            _set_back(value, before)


def _set_back(value: dict[Any, Any] | list[Any] | set[Any], before: Any) -> None:
    """Make a container what it was. One that is as it was is not touched: other threads may read it."""
    if isinstance(value, dict):
        for key in [key for key in value if key not in before]:
            del value[key]
        for key, item in before.items():
            if key not in value or value[key] is not item:
                value[key] = item
    elif isinstance(value, set):
        if value != before:
            value.clear()
            value.update(before)
    elif len(value) != len(before) or any(a is not b for a, b in zip(value, before)):
        value[:] = before
