"""Exported models: ATen alone, the compiled model's results for any batch, and the files that other runtimes read."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

import mctf_compile
from mctf_compile import cli
from mctf_compile.exporting.program import export_with, exporting_config
from mctf_compile.exporting.targets import TARGETS, Pt2
from mctf_compile.kernels.ordering import descending
from mctf_compile.report import Report
from mctf_compile.testing import TinyViT, VitSpec

BATCHES = (1, 3, 8)


def vit(head: str) -> nn.Module:
    return TinyViT(VitSpec(depth=2, head=head, prefix=int(head == "cls"), position=True))


def dinov2() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch14_reg4_dinov2", depth=2, embed_dim=32, num_heads=2, img_size=56)


def hugging_face() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
    )


# A model, the side of its images, and what is asked for. What reads a class token needs one.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cls": (lambda: vit("cls"), 16),
    "mean": (lambda: vit("mean"), 16),
    "dinov2": (dinov2, 56),
    "hugging_face": (hugging_face, 32),
}
EVERY_METHOD = {
    "mctf": {"r": 4, "min_tokens": 1},
    "tome": {"r": 3},
    "tofu": {"r": 3, "prune_layers": 1},
    "pitome": {"r": 3},
    "evit": {"layers": [0, 1]},
    "idlevit": {"keep_ratio": 0.7},
    "random": {"r": 3},
}
CASES = [
    *(("cls", method) for method in EVERY_METHOD),
    *((model, "mctf") for model in MODELS if model != "cls"),
]
cases = pytest.mark.parametrize(("name", "method"), CASES)


def options_of(method: str) -> dict[str, Any]:
    return {"method": method, **EVERY_METHOD[method]}


@cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def images(name: str, batch: int) -> Tensor:
    side = MODELS[name][1]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


@cache
def exported(name: str, method: str) -> tuple[ExportedProgram, Report]:
    """From one image, which is to stand for any number of them."""
    return export_with(model_of(name), (images(name, 1),), {}, exporting_config(options_of(method)))


def tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


@cache
def compiled(name: str, method: str, batch: int) -> list[Tensor]:
    """What the model returns that ``torch.compile`` makes, through Dynamo and for one batch size."""
    torch._dynamo.reset()
    options = {**options_of(method), "inner": "eager", "kernels": "aten"}
    run = torch.compile(model_of(name), backend="mctf", options=options, dynamic=False)
    with torch.no_grad():
        torch.manual_seed(5)
        return tensors(run(images(name, batch)))


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Within 1e-4; and tokens that were fused are the same ones, to be seen where they are given back."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
        if b.dim() == 3:
            assert torch.equal(groups(a), groups(b))


def groups(x: Tensor) -> Tensor:
    """Which tokens [B, N, C] are copies of one another: bool [B, N, N]."""
    return (x[:, :, None] - x[:, None]).abs().amax(-1) < 1e-5


@cases
def test_an_exported_graph_is_aten_and_fused(name: str, method: str) -> None:
    program, report = exported(name, method)
    assert report.removed > 0
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} == {"aten"}
    # What is no operator computes with sizes.
    assert {t.__module__ for t in targets if not isinstance(t, torch._ops.OpOverload)} <= {"_operator", "torch"}


@cases
def test_it_is_the_compiled_model_at_every_batch(name: str, method: str) -> None:
    run = exported(name, method)[0].module()
    for batch in BATCHES:
        torch.manual_seed(5)
        with torch.no_grad():
            found = tensors(run(images(name, batch)))
        close(found, compiled(name, method, batch))


def test_weights_keep_their_names_and_outputs_their_form() -> None:
    program, _ = exported("hugging_face", "mctf")
    model = model_of("hugging_face")
    assert set(program.state_dict) == {*model.state_dict()}
    output = program.module()(images("hugging_face", 2))
    assert output.last_hidden_state.shape == (2, 17, 32) and type(output) is type(model(images("hugging_face", 2)))
    assert model.layers[0].attention.q_proj.weight.requires_grad


@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_descending_is_a_stable_sort(n: int) -> None:
    score = torch.randint(0, 9, (5, n), generator=torch.Generator().manual_seed(n)).float()
    score[1, 1:4] = float("-inf")
    expected = score.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(descending(score), expected)
    assert torch.equal(descending(score.nan_to_num(neginf=-1).int()), expected)


class OneBatch(nn.Module):
    """A model whose author wrote its batch size down."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3, -1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (vit("cls"), {}, "call model.eval"),
        (vit("cls").eval(), {"dynamic_r": True}, "there is one r in it"),
        (vit("cls").eval(), {"inner": "inductor"}, "inner='inductor' is for backend"),
        (vit("cls").eval(), {"kernels": "cpp"}, "ATen operators alone"),
        (vit("cls").eval(), {"r": "auto", "target": "latency_ms=3"}, "milliseconds"),
        (vit("cls").eval(), {"rr": 3}, "did you mean 'r'"),
        (OneBatch().eval(), {}, "dynamic_batch=False"),
        (Branching().eval(), {}, "torch.export cannot capture the model: "),
    ],
)
def test_what_cannot_be_exported_is_one_line(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(mctf_compile.MctfError, match=message) as caught:
        mctf_compile.export(model, (torch.randn(2, 3, 16, 16),), **options)
    assert "\n" not in str(caught.value)


def test_a_batch_can_be_fixed_and_a_dense_model_says_so() -> None:
    with pytest.warns(UserWarning, match="the graph stays dense"):
        program = mctf_compile.export(OneBatch().eval(), (torch.randn(2, 3, 4, 4),), dynamic_batch=False)
    assert program.module()(torch.ones(2, 3, 4, 4)).shape == (2, 3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mctf_compile.export(OneBatch().eval(), (torch.randn(2, 3, 4, 4),), dynamic_batch=False, method="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@cache
def onnx_file(name: str, method: str, folder: Path) -> Path:
    pytest.importorskip("onnxruntime", reason="needs the extra mctf-compile[onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra mctf-compile[onnx]")
    path = folder / f"{name}-{method}.onnx"
    TARGETS["onnx"].save(exported(name, method)[0], path)
    return path


@cases
def test_onnx_has_standard_operators_and_the_same_results(name: str, method: str, folder: Path) -> None:
    path = onnx_file(name, method, folder)
    import onnx

    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [(o.domain, o.version >= 18) for o in model.opset_import] == [("", True)]
    run = TARGETS["onnx"].load(path)
    for batch in BATCHES:
        found = run(images(name, batch))
        if method == "random":
            # It draws other numbers in every runtime.
            assert [x.shape for x in found] == [x.shape for x in compiled(name, method, batch)]
        else:
            close(found, compiled(name, method, batch))


def test_every_weight_is_in_8_bits_where_that_is_asked_for(folder: Path) -> None:
    """Also those of which fused tokens need a part alone."""
    pytest.importorskip("onnxruntime", reason="needs the extra mctf-compile[onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra mctf-compile[onnx]")
    import onnx

    torch.manual_seed(0)
    model, x = TinyViT(VitSpec(depth=2, head_dim=64)).eval(), images("cls", 3)
    program, report = export_with(model, (images("cls", 1),), {}, exporting_config(options_of("mctf")))
    assert report.fused
    path = folder / "int8.onnx"
    TARGETS["onnx-int8"].save(program, path)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    floats = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 2}
    assert not [node.op_type for node in graph.node if floats.intersection(node.input)]
    layers = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) >= layers
    (found,), (expected,) = TARGETS["onnx-int8"].load(path)(x), tensors(program.module()(x))
    off = ((found - expected).abs().max() / expected.abs().max()).item()
    assert 1e-4 < off < 0.1


class Orders(nn.Module):
    """Which tokens stay, leave and receive, of tokens of which many are equal."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        score, size = x[..., 0], torch.ones_like(x[..., 0])
        keep, gone = torch.ops.mctf.select(score, 9, 1, 2)
        both_ways = torch.ops.mctf.match(x, size, size, 5, 1, 0, 1.0, 20.0, 40.0, True)
        one_way = torch.ops.mctf.match(x, None, size, 6, 0, 0, 1.0, 0.0, 0.0, False)
        return keep, gone, torch.ops.mctf.nearest(x, keep, gone, 1, 2), *both_ways, *one_way


@cache
def orders() -> ExportedProgram:
    return mctf_compile.export(Orders().eval(), (equal_tokens(2),), method="none")


def equal_tokens(batch: int) -> Tensor:
    """[B, 17, 3] of four kinds of tokens, whose cosines are -1, 0 or 1."""
    alphabet = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, 0, -0.5]])
    return alphabet[torch.randint(0, 4, (batch, 17), generator=torch.Generator().manual_seed(batch))]


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_ties_are_broken_as_everywhere(target: str, folder: Path) -> None:
    for package in TARGETS[target].packages:
        pytest.importorskip(package, reason=f"needs the extra mctf-compile[{target}]")
    path = folder / f"orders{TARGETS[target].ending}"
    TARGETS[target].save(orders(), path)
    run = TARGETS[target].load(path)
    for batch in BATCHES:
        x = equal_tokens(batch)
        for found, expected in zip(run(x), Orders()(x), strict=True):
            assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_openvino_gives_the_same_results(name: str, folder: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra mctf-compile[openvino]")
    # It reads what was written for onnxruntime as well as its own files.
    run = TARGETS["openvino"].load(onnx_file(name, "mctf", folder))
    for batch in BATCHES:
        close(run(images(name, batch)), compiled(name, "mctf", batch))


DROPPED_IN_THEIR_ORDER = """
import os, signal, sys
from pathlib import Path
from mctf_compile.exporting.targets import TARGETS
runs = [TARGETS["openvino"].load(Path(sys.argv[1])) for _ in range(2)]
while runs:
    del runs[0]
signal.signal(signal.SIGINT, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGINT)
"""


def test_signals_are_handled_after_openvino(folder: Path) -> None:
    """In a process of its own: what a core leaves behind may end it."""
    pytest.importorskip("openvino", reason="needs the extra mctf-compile[openvino]")
    arguments = [sys.executable, "-c", DROPPED_IN_THEIR_ORDER, str(onnx_file("cls", "mctf", folder))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


# What runs a file in a process that knows nothing of what wrote it.
FOREIGN = {
    "pt2": "import torch; run = torch.export.load({path!r}).module()",
    "aoti": "import torch; run = torch._inductor.aoti_load_package({path!r})",
    "onnx": "import onnxruntime; session = onnxruntime.InferenceSession({path!r}); run = None",
    "precompiled": """
import torch
from pathlib import Path
path = Path({path!r})
model, code = torch.export.load(path).module(), path.with_suffix(".py").read_text()
ready = torch.compiler.precompile.load(code, path.with_suffix(".cache").read_bytes())
run = lambda images: ready(model, images)
""",
}
PROGRAM = """
import sys, numpy
{load}
images = numpy.load({images!r})
if run is None:
    result = session.run(None, {{session.get_inputs()[0].name: images}})[0]
else:
    with torch.no_grad():
        result = run(torch.from_numpy(images)).numpy()
assert not {{{absent}}} & set(sys.modules)
numpy.save({out!r}, result)
"""


@pytest.fixture(scope="module")
def packaged(folder: Path) -> Path:
    """A package of AOTInductor's."""
    path = folder / "packaged.pt2"
    TARGETS["aoti"].check(path)
    TARGETS["aoti"].save(exported("cls", "mctf")[0], path)
    return path


def precompile(path: Path) -> None:
    """Beside a program the code that PyTorch makes of it, and what its cache knows."""
    with torch.no_grad():
        model = torch.export.load(path).module()
        made = torch.compiler.precompile(lambda model, x: model(x), model, images("cls", 3))
    path.with_suffix(".py").write_text(made[0])
    path.with_suffix(".cache").write_bytes(made[1])


@pytest.mark.parametrize("target", FOREIGN)
def test_a_process_without_this_package_runs_it(target: str, folder: Path, request: pytest.FixtureRequest) -> None:
    if target == "onnx":
        path = onnx_file("cls", "mctf", folder)
    elif target == "aoti":
        path = request.getfixturevalue("packaged")
    else:
        path = folder / "fused.pt2"
        TARGETS["pt2"].save(exported("cls", "mctf")[0], path)
    if target == "precompiled":
        if not hasattr(torch.compiler, "precompile"):
            pytest.skip("PyTorch has torch.compiler.precompile since 2.14")
        precompile(path)
    given, out = folder / "images.npy", folder / f"{target}.npy"
    numpy.save(given, images("cls", 3).numpy())
    absent = "'mctf_compile', 'torch'" if target == "onnx" else "'mctf_compile'"
    load = FOREIGN[target].format(path=str(path))
    text = PROGRAM.format(load=load, images=str(given), absent=absent, out=str(out))
    subprocess.run([sys.executable, "-c", text], check=True, cwd=folder)
    close([torch.from_numpy(numpy.load(out))], compiled("cls", "mctf", 3))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_program_in_cpp_runs_the_package(packaged: Path, folder: Path) -> None:
    from torch.utils import cpp_extension

    source = Path(__file__).parents[1] / "examples" / "aoti_runner" / "main.cpp"
    runner = folder / "runner"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    link = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-O0", "-std=c++20", *include, source, "-o", runner, *link, *libraries], check=True)
    for batch in BATCHES:
        x = images("cls", batch)
        answer = subprocess.run(
            [runner, packaged, *map(str, x.shape)], input=x.numpy().tobytes(), capture_output=True, check=True
        )
        (expected,) = compiled("cls", "mctf", batch)
        found = torch.frombuffer(bytearray(answer.stdout), dtype=torch.float32).reshape(expected.shape)
        close([found], [expected])


# timm's smallest plain ViT.
COMMAND = ["export", "test_vit", "--r", "8", "-o", "layers=[4]"]


def test_the_command_writes_a_file_and_checks_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "command"
    assert cli.main([*COMMAND, "--check", "-o", str(path)]) == 0
    output = capsys.readouterr().out
    assert "8 tokens removed" in output and "checked against the compiled model" in output
    assert f"{path}.pt2: {path.with_suffix('.pt2').stat().st_size / 1e6:.1f} MB" in output
    run = torch.export.load(path.with_suffix(".pt2")).module()
    assert run(torch.randn(5, 3, 160, 160)).shape == (5, 1000)


def test_the_command_does_not_compare_what_is_random(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--method", "random", "--check", "-o", str(folder / "random")]) == 0
    assert "not checked: the model draws random numbers" in capsys.readouterr().out


def test_the_command_sees_a_file_that_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Pt2.load
    monkeypatch.setattr("mctf_compile.cli.export.BATCHES", (1,))
    monkeypatch.setattr(Pt2, "load", lambda self, path: lambda x: [1.01 * y for y in load(self, path)(x)])
    assert cli.main([*COMMAND, "--check", "-o", str(folder / "wrong.pt2")]) == 1
    assert "wrong.pt2 differs from the compiled model by 1.0e-02" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], "needs onnxscript: pip install 'mctf-compile[onnx]'"),
        (["-o", "model.onnx"], "model.onnx does not end in .pt2"),
        (["-o", "dynamic_r=True"], "there is one r in it"),
        (["--to", "aoti"], "needs a C++ compiler"),
    ],
)
def test_what_the_command_cannot_do_is_said_before_the_model_is_made(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("it went on")

    def find(name: str) -> object:
        return None if name == "onnxscript" else object()

    monkeypatch.setattr("mctf_compile.measuring.timm_models.make_model", fail)
    monkeypatch.setattr("mctf_compile.exporting.targets.find_spec", find)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", fail)
    assert cli.main([*COMMAND, *arguments]) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mctf: ")]
    assert message in line
