"""What an exported program can be written as: how it is written, loaded and run, and what that needs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from mctf_compile.errors import ConfigError, MctfError

# Takes the program's inputs, and gives the tensors among its outputs, in their order.
Run = Callable[..., list[Tensor]]


class Target:
    """A kind of file.

    Attributes:
        name: as ``--to`` takes it.
        ending: of a file's name.
        packages: what it needs, which the extra ``extra`` installs.
        rounding: how far outputs may be from the compiled model's in float32, as a share of the largest number.
    """

    name: ClassVar[str]
    ending: ClassVar[str]
    packages: ClassVar[Sequence[str]] = ()
    extra: ClassVar[str] = ""
    rounding: ClassVar[float] = 1e-4

    def check(self, path: Path) -> None:
        """Raise ``ConfigError`` for another ending, and ``MctfError`` where something is missing that it needs."""
        if path.suffix != self.ending:
            raise ConfigError(f"{path} does not end in {self.ending}, as a file for {self.name!r} does.")
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise MctfError(
                f"a file for {self.name!r} needs {' and '.join(missing)}: pip install 'mctf-compile[{self.extra}]'"
            )

    def save(self, program: ExportedProgram, path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path, threads: int | None = None) -> Run:
        """What runs the file; ``threads``: of a runtime that has its own, as many as it likes where None."""
        raise NotImplementedError

    def files(self, path: Path) -> list[Path]:
        """All that ``save`` writes there."""
        return [path]


@dataclass(frozen=True)
class Pt2(Target):
    """``torch.export.save``: ATen, for PyTorch's own tools."""

    name: ClassVar[str] = "pt2"
    ending: ClassVar[str] = ".pt2"

    def save(self, program: ExportedProgram, path: Path) -> None:
        torch.export.save(program, path)

    def load(self, path: Path, threads: int | None = None) -> Run:
        return _run(torch.export.load(path).module())


@dataclass(frozen=True)
class Aoti(Target):
    """AOTInductor: compiled for this kind of machine; run by PyTorch in Python, or by its C++ library alone."""

    name: ClassVar[str] = "aoti"
    ending: ClassVar[str] = ".pt2"

    def check(self, path: Path) -> None:
        super().check(path)
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise MctfError("a file for 'aoti' needs a C++ compiler, and none was found.") from error

    def save(self, program: ExportedProgram, path: Path) -> None:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))

    def load(self, path: Path, threads: int | None = None) -> Run:
        return _run(torch._inductor.aoti_load_package(str(path)))


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX of its standard operators alone; run by onnxruntime."""

    name: ClassVar[str] = "onnx"
    ending: ClassVar[str] = ".onnx"
    packages: ClassVar[Sequence[str]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"

    def save(self, program: ExportedProgram, path: Path) -> None:
        _as_onnx(program).save(str(path))

    def load(self, path: Path, threads: int | None = None) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            given = {name: x.numpy() for name, x in zip(names, inputs)}
            return [torch.from_numpy(y) for y in session.run(None, given)]

        return run


@dataclass(frozen=True)
class OnnxInt8(Onnx):
    """ONNX whose products with weights are of 8-bit integers; run by onnxruntime.

    Weights are scaled by output channel, once; activations by their range, at every call: nothing is calibrated. What
    chooses tokens and attends is in float, and so is the patch embedding.
    """

    name: ClassVar[str] = "onnx-int8"
    # A ViT of random weights is off by a quarter of this, and by half where choices between tokens tip.
    rounding: ClassVar[float] = 0.2

    def save(self, program: ExportedProgram, path: Path) -> None:
        from onnxruntime.quantization import QuantType, quant_utils, quantize_dynamic
        from onnxscript import optimizer

        written = _as_onnx(program)
        # A part of a weight is a weight, whatever its size, only once it is computed.
        optimizer.optimize(written.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
        model = written.model_proto
        quant_utils.add_pre_process_metadata(model)
        products = ["MatMul", "Gemm"]
        quantize_dynamic(model, path, products, per_channel=True, weight_type=QuantType.QInt8)


@dataclass(frozen=True)
class OpenVino(Target):
    """OpenVINO, which reads the ONNX file; the weights are in a second file, ending in ``.bin``."""

    name: ClassVar[str] = "openvino"
    ending: ClassVar[str] = ".xml"
    packages: ClassVar[Sequence[str]] = ("onnx", "onnxscript", "openvino")
    extra: ClassVar[str] = "openvino"

    def save(self, program: ExportedProgram, path: Path) -> None:
        import openvino

        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder, "model.onnx")
            Onnx().save(program, onnx)
            openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)

    def load(self, path: Path, threads: int | None = None) -> Run:
        # By itself it computes in bfloat16 where the CPU does that.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        model = _openvino_core().compile_model(path, "CPU", settings)

        def run(*inputs: Tensor) -> list[Tensor]:
            return [torch.from_numpy(y.copy()) for y in model([x.numpy() for x in inputs]).values()]

        return run

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]


def _as_onnx(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    written = torch.onnx.export(program, dynamo=True, verbose=False)
    assert written is not None  # as it is with dynamo
    return written


@cache
def _openvino_core() -> Any:
    """The one core of this process.

    A core gives the thread a stack for signal handlers, and restores the one before when it is destroyed. Of two that
    are destroyed in their order, the second restores the stack of the first, which is gone: the next signal that
    Python handles would end the process.
    """
    import openvino

    return openvino.Core()


TARGETS: dict[str, Target] = {target.name: target for target in (Pt2(), Onnx(), OnnxInt8(), Aoti(), OpenVino())}


def tensors(output: Any) -> list[Tensor]:
    """The tensors among a model's outputs, in their order."""
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def _run(function: Callable[..., Any]) -> Run:
    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tensors(function(*inputs))

    return run
