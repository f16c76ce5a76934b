"""``dynamic_r``: the reduction of a compiled model, changed between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizeContext

from mctf_compile.errors import ConfigError
from mctf_compile.methods import Merging
from mctf_compile.options.schedule import AUTO
from mctf_compile.passes import State
from mctf_compile.passes.planning.plan import tokens_remaining


class Adjustable:
    """A compiled graph that reads ``r`` from the options at every call.

    Args:
        options: the dict that the model was compiled with.
        state: what the passes found; its plan is made again for another ``r``.
        run: takes the graph's inputs, then the tokens that each fusing block leaves.
    """

    def __init__(self, options: Mapping[str, Any], state: State, run: Callable[..., Any]) -> None:
        self.options, self.state, self.run = options, state, run
        self._remaining: dict[str, list[int]] = {}

    def __call__(self, *inputs: Any) -> Any:
        return self.run(*inputs, *self.remaining(self.options.get("r", self.method.r)))

    @property
    def method(self) -> Merging:
        """The method at the ``r`` that the model was compiled with; no other takes ``dynamic_r``."""
        assert isinstance(self.state.config.method, Merging)
        return self.state.config.method

    def remaining(self, r: Any) -> list[int]:
        """The tokens that each fusing block leaves at ``r``."""
        key = repr(r)
        if key not in self._remaining:
            method, found = self.method, self.state.findings.r
            if r != method.r:
                method, found = replace(method, r=r, target=None), None
            self._remaining[key] = tokens_remaining(self.state, method, found)
        return self._remaining[key]


class set_r(AbstractContextManager["set_r"]):
    """Change the reduction of a model that was compiled with ``dynamic_r=True``; nothing is compiled again.

    As a function, ``mctf_compile.set_r(compiled, 8)`` holds until the next change; as a context manager
    (``with mctf_compile.set_r(compiled, 8): ...``) until its end. It writes ``r`` into the options dict that the
    model was compiled with: models compiled with the same dict have the same ``r``.

    ``r`` is the model's, not a thread's. Any thread may change it while others call the model: a call reads it once,
    as it begins, and computes throughout with what it has read, the ``r`` from before the change or that from after it.
    Only where graph breaks cut a model does each of its graphs read it anew. A ``with`` sets back what it found: of two
    that overlap in several threads, the one that ends last decides.

    Args:
        compiled: what ``torch.compile(model, backend="mctf", options={"dynamic_r": True, ...})`` returned.
        r: as the option ``r``; clamped like it.

    Raises:
        ConfigError: ``compiled`` is something else, or ``r`` is not valid.
    """

    def __init__(self, compiled: Any, r: int | float | list[Any] | tuple[Any, ...] | str) -> None:
        options = _options(compiled)
        if options is None:
            raise ConfigError(
                'set_r takes what torch.compile(model, backend="mctf", options={"dynamic_r": True, ...}) returned.'
            )
        self.options = options
        # Where the number of blocks is known, a list of another length is refused by the next call.
        Merging(r=r, target=self.options.get("target") if r == AUTO else None)
        self.before = self.options.get("r")
        # A list that the caller changes later changes no call.
        self.options["r"] = copy(r)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # In one step: other threads read it meanwhile.
        if self.before is None:
            self.options.pop("r", None)
        else:
            self.options["r"] = self.before


def _options(compiled: Any) -> MutableMapping[str, Any] | None:
    """The options that a module or function was compiled with, where they have ``dynamic_r``."""
    given = (getattr(backend, "kwargs", {}).get("options") for backend in backends(compiled))
    return next((o for o in given if isinstance(o, MutableMapping) and o.get("dynamic_r")), None)


def backends(compiled: Any) -> Iterator[Any]:
    """The backend that a module or function was compiled with, as ``torch.compile`` wraps it, from the outside in."""
    if isinstance(compiled, torch.nn.Module) and getattr(compiled, "_compiled_call_impl", None) is not None:
        compiled = compiled._compiled_call_impl
    held = [c.cell_contents for c in getattr(compiled, "__closure__", None) or ()]
    contexts = [x for x in (getattr(compiled, "dynamo_ctx", None), *held) if isinstance(x, OptimizeContext)]
    backend = contexts[0].callback if contexts else None
    while backend is not None:
        yield backend
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
