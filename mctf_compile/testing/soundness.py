"""What must hold for every rewrite, measured and asserted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from mctf_compile.compiler import reparameterized, rewrite
from mctf_compile.config import FusionConfig, Lowering
from mctf_compile.errors import MctfError
from mctf_compile.kernels.pooling.aten import along
from mctf_compile.methods import get_method
from mctf_compile.passes.rewriting.rewriter import LOSES, UNPAID
from mctf_compile.report import Report

# Similarity alone decides, so that exact duplicates are fused first.
ONLY_SIMILARITY = {"tau_info": 0, "tau_size": 0}

# Tokens closer than this, relative to the largest entry, count as duplicates of each other.
DUPLICATE = 1e-5


@dataclass
class Recorder:
    """A backend that runs the rewritten graph eagerly and keeps what the fusions did.

    ``groups`` holds, per graph and fusion, the tensors (index [B, N], weight [B, N], size [B, M]) of the
    last run; ``reports`` one report per graph; ``largest_gap`` the largest difference between two values that
    the last run combined into one, relative to the largest entry: 0 where only exact duplicates were fused.
    ``masks``: the graphs make nothing without their inputs but masks, which tell no token from its copy.
    """

    options: dict[str, Any]
    masks: bool = False
    reports: list[Report] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    groups: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    largest_gap: float = 0.0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        # What happens to tokens is read off the operators, which other kernels stand in for.
        options = {"kernels": "aten", **self.options}
        fused, report = rewrite(gm, example_inputs, FusionConfig.from_options(options))
        self.reports.append(report)
        self.graphs.append(fused)
        return _Watch(fused, self).run

    def run(self, model: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
        """The model's output under this backend."""
        self.groups.clear()
        self.largest_gap = 0.0
        torch._dynamo.reset()
        return torch.compile(model, backend=self, dynamic=False)(*inputs, **kwargs)

    def miscounted(self) -> list[str]:
        """Where the last run fused other numbers of tokens than the reports say."""
        said = [(b.tokens_in, b.tokens_out) for report in self.reports for b in report.blocks if b.reason is None]
        done: list[tuple[int | None, int | None]] = [(index.shape[1], size.shape[1]) for index, _, size in self.groups]
        extra = Counter(done) - Counter(said)
        return [f"the report says that tokens go {said}, and they go {done}"] if extra else []

    def index(self) -> Tensor | None:
        """int64 [B, N]: the final position of every original token of one token axis; None if not fused."""
        result = None
        for index, _, _ in self.groups:
            result = index if result is None else index.gather(1, result)
        return result


class _Watch(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(gm)
        self.recorder = recorder
        self._masks = _made_of_nothing(gm.graph) if recorder.masks else set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and not (n.args and n.args[0] in self._masks):
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._look(n.target, args, result)
        return result

    def _look(self, target: Any, args: tuple[Any, ...], result: Any) -> None:
        if target is torch.ops.mctf.group.default:
            self.recorder.groups.append(result)
        elif target is torch.ops.mctf.pool.default:
            x, _, keep, gone, into, dim = args
            self._note(x, keep, gone, into, dim)
        elif target is torch.ops.mctf.keep.default:
            # What was dropped is no part of the result, duplicate or not.
            self.recorder.largest_gap = float("inf")
        elif target is torch.ops.mctf.ahead.default:
            weights, norm, _, _, _, keep, gone, into = args[:8]
            self._note(weights * norm, keep, gone, into, 2)

    def _note(self, x: Tensor, keep: Tensor, gone: Tensor, into: Tensor, dim: int) -> None:
        """Compare each token that left with the carrier of its group."""
        x = x.detach().double()
        leaving = x.gather(dim, along(gone, x, dim))
        carrier = x.gather(dim, along(keep.gather(1, into), x, dim))
        if leaving.numel():
            # Two equal infinities (masks) are no difference.
            apart = torch.where(leaving == carrier, 0.0, (leaving - carrier).abs()).amax()
            scale = x[x.isfinite()].abs().amax() if x.isfinite().any() else x.new_ones(())
            self.recorder.largest_gap = max(self.recorder.largest_gap, (apart / scale.clamp(min=1e-12)).item())


def _made_of_nothing(graph: fx.Graph) -> set[fx.Node]:
    """What is the same whatever a graph is given."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


@dataclass(frozen=True)
class Soundness:
    """What a rewrite of a model was found to do.

    Attributes:
        reports: one per graph, the one with the most multiply-accumulates first.
        problems: what it does that no rewrite may; empty for a sound one.
        at_zero: largest difference from the dense graph with r=0.
        duplicates: largest relative error where tokens were fused by similarity alone, all of which were
            exact duplicates; None where others were fused too, or none.
    """

    reports: list[Report]
    problems: list[str]
    at_zero: float
    duplicates: float | None

    @property
    def report(self) -> Report:
        return self.reports[0]


class _Variants:
    """A backend that makes several versions of every graph, and runs the one that is chosen."""

    def __init__(self, recorders: dict[str, Recorder], config: FusionConfig) -> None:
        self.recorders, self.config, self.chosen = recorders, config, "dense"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        versions = {name: recorder(gm, example_inputs) for name, recorder in self.recorders.items()}
        versions["dense"] = fx.Interpreter(reparameterized(gm, example_inputs, self.config)).run
        return lambda *args: versions[self.chosen](*args)


def check_rewrite(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    duplicates: bool | None = None,
    tolerance: float = 1e-4,
    **options: Any,
) -> Soundness:
    """Measure whether fusing tokens in ``model`` keeps its contract; see ``assert_rewrite_sound``.

    The model is captured once; random operators draw the same numbers in every run, and buffers and inputs
    that a run changes are put back. Raises what the model, the capture or the rewrite raises.
    """
    method = get_method(options.get("method", "mctf"))
    # A method that does not count its tokens leaves none.
    counts = "r" in method.option_names()
    kept = {name: v for name, v in options.items() if counts or name in Lowering.option_names()}
    nothing = {**kept, **({"r": 0} if counts else {"method": "none"}), "strict": False}
    recorders = {"fused": Recorder(dict(options)), "zero": Recorder(nothing)}
    by_more = "tau_info" in method.option_names() and not ONLY_SIMILARITY.items() <= options.items()
    if by_more and duplicates is not False:
        recorders["alike"] = Recorder({**options, **ONLY_SIMILARITY})
    backend = _Variants(recorders, FusionConfig.from_options(options))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    state = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]

    def run(version: str) -> list[Tensor]:
        backend.chosen = version
        torch.manual_seed(0)
        given, named = tree_map_only(Tensor, _own, (inputs, dict(kwargs or {})))
        outputs = [leaf for leaf in tree_leaves(compiled(*given, **named)) if isinstance(leaf, Tensor)]
        for module, name, buffer, value in state:
            buffer.data.copy_(value)
            module._buffers[name] = buffer
        return outputs

    plain, fused = run("dense"), run("fused")
    recorder = recorders["fused"]
    if not recorder.reports:
        raise MctfError("Dynamo captured no graph of this model, so there is nothing to check.")
    problems = broken(plain, fused, recorder)
    if not any(report.fused for report in recorder.reports) and _apart(plain, fused):
        problems.append("nothing was fused, and yet the output is not the dense one")
    at_zero = _apart(plain, run("zero"))
    if at_zero:
        problems.append(f"r=0 changed the output by {at_zero:.2e}")
    same = run("alike") if "alike" in recorders else fused
    alike = recorders.get("alike", recorder)
    error = None
    if alike.groups and method.sized and (duplicates or (duplicates is None and alike.largest_gap <= DUPLICATE)):
        error = max(map(distance, plain, same), default=0.0) if len(plain) == len(same) else float("inf")
        if not error <= tolerance:
            problems.append(f"fusing duplicates changed the output by {error:.2e} of its largest entry")
    reports = recorder.reports
    reports = reports if len(reports) == 1 else sorted(reports, key=lambda r: -r.macs_before)
    return Soundness(reports, problems, at_zero, error)


def _own(x: Tensor) -> Tensor:
    """A tensor that a run may change; gradients belong to the user's."""
    return x if x.requires_grad else x.clone()


def assert_rewrite_sound(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    duplicates: bool | None = None,
    tolerance: float = 1e-4,
    **options: Any,
) -> Report:
    """Assert that fusing tokens in ``model`` keeps its contract.

    1. Outputs have the shapes, dtypes and devices of the dense model's, and are finite where those are.
    2. Every fusion conserves the total size and normalises its weights, and the report counts its tokens.
    3. With r=0, and wherever nothing fuses, the output is that of the dense graph, bit for bit.
    4. The duplicate-token theorem: where merging by similarity alone combines exact duplicates only, the
       output is the dense one to ``tolerance`` (relative to its largest value). Plant duplicates in
       ``inputs`` and take position information away for it to apply.

    Args:
        model: any module, in the mode to be tested.
        inputs: its inputs.
        kwargs: those that are given by name.
        duplicates: True to demand the theorem whatever is fused (the caller knows that duplicates alone
            are), False to leave it out, None to demand it where the values that were fused are equal.
        tolerance: the largest error that the theorem allows, relative to the largest value of an output.
        options: as for the backend.

    Returns:
        The report of the graph with the most multiply-accumulates.

    Raises:
        AssertionError: names every property that fails.
    """
    found = check_rewrite(model, *inputs, kwargs=kwargs, duplicates=duplicates, tolerance=tolerance, **options)
    assert not found.problems, "; ".join(found.problems)
    return found.report


# How far apart the same sums may be in two compilations, relative to the largest entry.
COMPILED = 1e-4


def check_sizes(model: nn.Module, given: Sequence[Tensor], **options: Any) -> Soundness:
    """Whether one compilation for all sizes does to inputs of several what one for each does.

    Args:
        model: takes one tensor, of any of these sizes.
        given: inputs, no two tokens of which are copies: of several that are, rounding decides which are fused.
        options: as for the backend.

    Returns:
        The reports are those of the sizes, one by one; ``problems`` names the sizes at which outputs differ. Where a
        fusion does not pay at one of them, nothing is compared: that is decided at the first.
    """
    recorder, problems = Recorder(dict(options)), []

    def drawing_alike(run: Callable[..., Any], *args: Any) -> Any:
        torch.manual_seed(0)
        return run(*args)

    apart = [drawing_alike(recorder.run, model, x) for x in given]
    unpaid = any((b.reason or "").startswith((LOSES, UNPAID)) for report in recorder.reports for b in report.blocks)
    torch._dynamo.reset()
    options = {**options, "inner": "eager", "kernels": "aten"}
    compiled = torch.compile(model, backend="mctf", options=options, dynamic=True)
    for x, want in zip([] if unpaid else given, apart):
        error = distance(want, drawing_alike(compiled, x))
        if not error <= COMPILED:
            size = list(x.shape)
            problems.append(f"compiled for all sizes, the output for {size} is {error:.2e} of its largest entry off")
    torch._dynamo.reset()
    return Soundness(recorder.reports, problems, 0.0, None)


def assert_fused_alike(one: nn.Module, other: nn.Module, *inputs: Any, tolerance: float = 1e-6, **options: Any) -> None:
    """Assert that two models which compute the same fuse the same tokens: their fused outputs are equal.

    Rounding decides between tokens that are nearly as alike as others; in float64 there are none.

    Raises:
        AssertionError: says how far apart the outputs are, relative to the largest entry.
    """
    recorders = [Recorder(dict(options)) for _ in range(2)]
    outputs = [tree_leaves(r.run(model, *inputs)) for r, model in zip(recorders, (one, other))]
    miscounted = [problem for r in recorders for problem in r.miscounted()]
    assert not miscounted, "; ".join(miscounted)
    assert len(outputs[0]) == len(outputs[1]), "they have other numbers of outputs"
    apart = max(map(distance, *outputs), default=0.0)
    assert apart <= tolerance, f"the outputs of the fused models are {apart:.2e} of their largest entry apart"


def assert_rounded_alike(model: nn.Module, exact: nn.Module, *inputs: Any, **options: Any) -> None:
    """Assert that a model with regions of autocast still rounds when it is fused.

    Args:
        model: with the regions.
        exact: the same without them.
        inputs: of either.
        options: as for ``torch.compile``.

    Raises:
        AssertionError: the fused model is as exact as one without its regions.
    """
    given = [[x.clone() if isinstance(x, Tensor) else x for x in inputs] for _ in range(3)]
    recorder = Recorder(dict(options))
    fused = tree_leaves(recorder.run(model, *given[0]))
    problems = recorder.miscounted()
    problems += too_exact(tree_leaves(model(*given[1])), fused, tree_leaves(exact(*given[2])))
    assert not problems, "; ".join(problems)


def compiled_otherwise(
    model: nn.Module, inputs: Sequence[Any], fused: Sequence[Tensor], plain: Sequence[Tensor], **options: Any
) -> list[str]:
    """Where the backend returns something else than the rewritten graph, or with r=0 than the model, bit for bit.

    Args:
        model: as it was before it ran.
        inputs: of the model, before it ran.
        fused: what the rewritten graph returns, and what became of the inputs.
        plain: the same of the model.
        options: as for the backend, with ``r``.
    """
    problems: list[str] = []
    for r, want in ((options["r"], fused), (0, plain)):
        own, given = deepcopy((model, list(inputs)))
        torch._dynamo.reset()
        torch.manual_seed(0)
        # With r=0 nothing fuses, which would be an error.
        strict = r > 0 and options.get("strict", False)
        given_options = {**options, "r": r, "inner": "eager", "kernels": "aten", "strict": strict}
        compiled = torch.compile(own, backend="mctf", options=given_options, dynamic=False)
        got = [*tree_leaves(compiled(*given)), *given]
        problems += unequal(want, got, f"compiled with r={r}, the output is another")
    torch._dynamo.reset()
    return problems


def assert_compiled_alike(model: nn.Module, *inputs: Any, **options: Any) -> None:
    """Assert that the backend returns what the rewritten graph does, and with r=0 what the model does, bit for bit.

    Raises:
        AssertionError: says with which r it returns something else.
    """
    recorder = Recorder(dict(options))

    def run(function: Callable[..., Any]) -> list[Tensor]:
        own, given = deepcopy((model, list(inputs)))
        torch.manual_seed(0)
        return [*tree_leaves(function(own, *given)), *given]

    fused, plain = run(recorder.run), run(lambda own, *given: own(*given))
    problems = compiled_otherwise(model, inputs, fused, plain, **options)
    assert not problems, "; ".join(problems)


# A region is missed where it rounds by more than this, and the result is that many times closer to the exact one.
ROUNDED, CLOSER = 2e-4, 50
# Of so many numbers some are rounded by much.
MANY = 64


def too_exact(plain: Sequence[Tensor], fused: Sequence[Tensor], exact: Sequence[Tensor]) -> list[str]:
    """Whether a region of autocast was forgotten: ``plain`` is rounded, and ``fused`` is not."""
    for a, b, x in zip(plain, fused, exact):
        if a.is_floating_point() and a.numel() >= MANY and a.isfinite().all():
            rounding = distance(x, a)
            if rounding > ROUNDED and distance(x, b) < rounding / CLOSER:
                return [f"a region of autocast rounds by {rounding:.2e}, and the fused model does not"]
    return []


def _apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference; two equal infinities or NaNs are none."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b)):
        return float("inf")
    gaps = [
        torch.where(_same(x, y), 0.0, (x.double() - y.double()).abs()).nan_to_num(float("inf"))
        for x, y in zip(a, b)
        if x.numel()
    ]
    return max((gap.max().item() for gap in gaps), default=0.0)


def _same(x: Tensor, y: Tensor) -> Tensor:
    return (x == y) | (x.isnan() & y.isnan())


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors relative to the largest finite entry of the first (at least 1).

    Infinite where their shapes differ, or whole numbers, or what is no number: those are equal or wrong.
    """
    if a.shape != b.shape:
        return float("inf")
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        return 0.0 if torch.equal(a, b) else float("inf")
    finite = a.isfinite()
    if not _same(a[~finite], b[~finite]).all() or not b[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    a, b = a[finite].to(wide), b[finite].to(wide)
    return ((a - b).abs().amax() / a.abs().amax().clamp(min=1.0)).item()


def unequal(right: Sequence[Tensor], got: Sequence[Tensor], problem: str) -> list[str]:
    """The problem, where results are not those that are right, bit for bit."""
    equal = len(right) == len(got) and all(a.dtype == b.dtype and distance(a, b) == 0.0 for a, b in zip(right, got))
    return [] if equal else [problem]


def broken(plain: list[Tensor], fused: list[Tensor], recorder: Recorder) -> list[str]:
    """What the last run under a recorder did that no rewrite may, whatever was fused."""
    problems = _contract(plain, fused)
    for group in recorder.groups:
        problems += _conservation(*group)
    return problems + recorder.miscounted()


def _contract(expected: list[Tensor], got: list[Tensor]) -> list[str]:
    if len(expected) != len(got):
        return [f"{len(got)} outputs instead of {len(expected)}"]
    problems = []
    for i, (a, b) in enumerate(zip(expected, got)):
        for what in ("shape", "dtype", "device"):
            if getattr(a, what) != getattr(b, what):
                problems.append(f"output {i} has {what} {getattr(b, what)} instead of {getattr(a, what)}")
        if a.isfinite().all() and not b.isfinite().all():
            problems.append(f"output {i} is not finite")
    return problems


def _conservation(index: Tensor, weight: Tensor, size: Tensor) -> list[str]:
    problems = []
    sums = torch.zeros_like(size).scatter_add(1, index, weight)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
        problems.append("pooling weights do not sum to 1 in a group")
    totals = size.sum(1)
    if not torch.allclose(totals, totals.round(), atol=1e-4):
        problems.append(f"sizes are no whole numbers: {totals.tolist()}")
    if (totals != totals[0]).any():
        problems.append(f"images have different total sizes: {totals.tolist()}")
    return problems
