"""A model with its tokens fused, as a ``torch.export.ExportedProgram``."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure, tree_unflatten

from mctf_compile.compiler import rewrite
from mctf_compile.config import FusionConfig
from mctf_compile.errors import ConfigError, MctfError
from mctf_compile.report import Report


def export(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    **options: Any,
) -> ExportedProgram:
    """The model with its tokens fused, for every tool that takes what ``torch.export`` gives.

    Its graph has ATen operators alone (and those of the user's own): this package is not needed to load or to run it.
    Inputs, outputs and the names of weights are those of the model; outputs have the shapes that the model's have. With
    ``outputs="fused"`` some have fewer tokens, and the program returns two things: what the model returns, and a list
    of ``{"size": [B, M], "source": [B, N]}``, one for each fusion of tokens that an output is left in (see
    ``FusedTokens``), most often one.

    Args:
        model: a module in eval mode, which stays as it is.
        example_inputs: its positional inputs; images [B, C, H, W], say.
        kwargs: inputs that are given by name.
        dynamic_batch: leave open the first dimension, B, of every tensor input that has that of the first one. An
            example of one image is taken twice.
        dynamic_shapes: what ``torch.export.export`` takes, in the place of ``dynamic_batch``.
        options: as for the backend, but for those that say what compiles the graph.

    Returns:
        The program. One in which nothing can be fused is the model's own, with a warning that gives the reason.

    Raises:
        ConfigError: an option is wrong, or means nothing to a file; the model is in training mode.
        NothingFusedError: with ``strict=True``.
        MctfError: ``torch.export`` cannot capture the model.
    """
    config = exporting_config(options)
    if model.training:
        raise ConfigError("the model is in training mode, which a file would keep: call model.eval() before.")
    program, report = export_with(model, example_inputs, kwargs or {}, config, dynamic_batch, dynamic_shapes)
    for remark in report.remarks:
        warnings.warn(f"mctf: {remark}", stacklevel=2)
    if config.method.active and report.reason is not None:
        warnings.warn(f"mctf: the graph stays dense: {report.reason}", stacklevel=2)
    return program


# What only a model has that torch.compile makes by the backend, and why no other has it.
REFUSED = {
    "inner": "what compiles the graph is decided elsewhere",
    "inductor": "what compiles the graph is decided elsewhere",
    "dynamic_r": "there is one r in it; make one for each",
}


def config_of_graph(options: Mapping[str, Any]) -> FusionConfig:
    """The config of a graph that goes elsewhere; raises ``ConfigError`` for what only the backend can do."""
    for name, reason in REFUSED.items():
        if options.get(name):
            raise ConfigError(f"{name}={options[name]!r} is for backend='mctf', and not for a graph alone: {reason}.")
    config = FusionConfig.from_options(options)
    if config.by_running:
        raise ConfigError(
            "a target in milliseconds and profit='measure' are for backend='mctf', which compiles and times the graph; "
            "give target='gmacs=...' or 'speedup=...', or r itself."
        )
    return config


def exporting_config(options: Mapping[str, Any]) -> FusionConfig:
    """The config of an exported model; raises ``ConfigError`` for options that only a compiled one has."""
    if options.get("kernels", "auto") not in ("auto", "aten"):
        raise ConfigError(f"kernels={options['kernels']!r}: an exported graph has ATen operators alone; leave it out.")
    return config_of_graph({**options, "kernels": "aten"})


def export_with(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: FusionConfig,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
) -> tuple[ExportedProgram, Report]:
    """``export``, with the report of what was fused."""
    given = tuple(args), dict(kwargs)
    if dynamic_shapes is None and dynamic_batch:
        given, dynamic_shapes = _any_batch(*given)
    with torch.no_grad():
        program = _captured(model, *given, dynamic_shapes)
        module = program.module()
        fused, report = rewrite(flat(module), tree_leaves(given), config)
        if report.fused or config.lowering.reparameterize is not None:
            program = _captured(_as_called(fused, module), *given, dynamic_shapes)
        return _opened(program), report


def _any_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, Any], ShapesCollection]:
    """Examples of two images or more, and which of their dimensions is the batch."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    if not tensors:
        raise ConfigError("no input is a tensor that has a batch dimension; export with dynamic_batch=False.")
    size = tensors[0].shape[0]

    def example(x: Tensor) -> Tensor:
        # torch.export takes a size of 1 for one that is always 1.
        alone = size == 1 and x.dim() and x.shape[0] == 1
        return torch.cat([x, x]) if alone else x

    args, kwargs = tree_map_only(Tensor, example, (args, kwargs))
    shapes, batch = ShapesCollection(), Dim("batch", min=1)
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == max(size, 2):
            shapes[x] = {0: batch}
    return (args, kwargs), shapes


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fixed = " (if it is the batch that the model fixes: dynamic_batch=False)" if "batch" in str(error) else ""
        raise MctfError(f"torch.export cannot capture the model: {first}{fixed}") from error


def flat(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that takes and returns lists of tensors, whatever the model's inputs and outputs are."""
    graph = copy.deepcopy(module.graph)
    graph.set_codegen(CodeGen())
    return fx.GraphModule(module, graph)


def _as_called(fused: fx.GraphModule, module: fx.GraphModule) -> fx.GraphModule:
    """The fused graph with the inputs, outputs and names of weights that ``module`` has; see ``export``."""
    names = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
    root = nn.Module()
    graph = copy.deepcopy(fused.graph)
    for node in graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(fused)
        node.target = names.get(id(value), str(node.target))
        put(root, node.target, value)
    codegen: Any = copy.copy(module.graph._codegen)
    extra = len(cast("list[Any]", graph.output_node().args[0])) - codegen.pytree_info.out_spec.num_leaves
    if extra:
        returned = tree_unflatten(range(codegen.pytree_info.out_spec.num_leaves), codegen.pytree_info.out_spec)
        known = [{"size": 0, "source": 0}] * (extra // 2)
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=tree_structure((returned, known)))
    graph.set_codegen(codegen)
    return fx.GraphModule(root, graph).eval()


def put(root: nn.Module, name: str, value: Any) -> None:
    """``value`` at a path of a module."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(last, value)
    else:
        setattr(root, last, value)


def _opened(program: ExportedProgram) -> ExportedProgram:
    """A program whose operators of this package have opened up into ATen."""
    ours = {op: how for op, how in torch.export.default_decompositions().items() if _is_ours(op)}
    program = program.run_decompositions(ours)
    left = {str(n.target) for n in program.graph.nodes if _is_ours(n.target)}
    assert not left, left
    return program


def _is_ours(target: object) -> bool:
    return isinstance(target, OpOverload) and target.namespace == "mctf"
