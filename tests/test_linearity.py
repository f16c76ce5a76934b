"""Functional linearity: of affine blocks, against blocks run eagerly, and the command that shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mctf_compile import ConfigError, MctfError, cli
from mctf_compile.cli.models import image_files, read_images
from mctf_compile.measuring import timm_models
from mctf_compile.measuring.linearity import linearity, proposal
from mctf_compile.measuring.timm_models import evaluation_transform
from mctf_compile.testing.models import TinyViT, VitSpec

# timm's smallest plain ViT: six blocks, 100 patches of a 160x160 image.
MODEL = "test_vit"


def curved(model: nn.Module, gain: float) -> nn.Module:
    """The model in eval mode, its weights times ``gain``: with random ones a block is all but linear."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(gain)
    return model.eval()


def tiny(**spec: object) -> TinyViT:
    torch.manual_seed(0)
    return curved(TinyViT(VitSpec(**spec)), 3.0)


@torch.no_grad()
def functional_linearity(f: Callable[[Tensor], Tensor], x: Tensor, steps: int, batch: int = 0) -> float:
    """The mean over the images of ``x``, numbered along ``batch``, each paired with its predecessor."""
    other = x.roll(1, batch)
    outputs = [f((1 - i / steps) * x + i / steps * other).double() for i in range(steps + 1)]
    first, *rest = (y.movedim(batch, 0).flatten(1) for y in outputs)
    path, at = 0.0, first
    for y in rest:
        path, at = path + (y - at).norm(dim=1), y
    return ((at - first).norm(dim=1) / path).mean().item()


def recorded(modules: nn.ModuleList, model: nn.Module, *inputs: Tensor) -> list[tuple]:
    """The arguments that each module is called with in one run of the model."""
    found: list[tuple] = []
    # Cloned, for blocks that write into their input.
    hooks = [m.register_forward_pre_hook(lambda _, a: found.append((a[0].clone(), *a[1:]))) for m in modules]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def values(model: nn.Module, *inputs: Tensor, **options: object) -> list[float | None]:
    return [block.value for block in linearity(model, *inputs, **options)]


@pytest.mark.parametrize("steps", [2, 10])
def test_blocks_of_a_timm_model_agree_with_eager_ones(steps: int) -> None:
    torch.manual_seed(0)
    model, images = curved(timm.create_model(MODEL), 8.0), torch.randn(3, 3, 160, 160)
    expected = [
        functional_linearity(block, x, steps)
        for block, (x,) in zip(model.blocks, recorded(model.blocks, model, images))
    ]
    assert values(model, images, steps=steps) == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 0.99


def test_mlps_of_a_timm_model_agree_with_eager_ones() -> None:
    torch.manual_seed(0)
    model, images = curved(timm.create_model(MODEL), 8.0), torch.randn(3, 3, 160, 160)
    middle = recorded(nn.ModuleList(block.norm2 for block in model.blocks), model, images)
    expected = [
        functional_linearity(lambda y, b=block: y + b.mlp(b.norm2(y)), x, 10)
        for block, (x,) in zip(model.blocks, middle)
    ]
    assert values(model, images, part="mlp") == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 0.99


@pytest.mark.parametrize(
    "spec",
    [
        {"layout": "nbc"},
        {"layout": "bhwc", "prefix": 0, "head": "mean"},
        {"layout": "bchw", "prefix": 0, "head": "mean"},
        {"inplace": True},
        {"side": "rope", "position": True},
        {"side": "padding"},
        {"spelling": "flat", "mlp": "swiglu"},
    ],
    ids=str,
)
def test_other_layouts_and_side_tensors_agree_with_eager_blocks(spec: dict) -> None:
    model = tiny(**spec)
    inputs = [torch.randn(3, 3, 16, 16)]
    if model.spec.side == "padding":
        inputs.append(torch.arange(16) < torch.tensor([13, 4, 16])[:, None])
    batch = 1 if model.spec.layout == "nbc" else 0
    expected = [
        functional_linearity(lambda y, b=block, r=rest: b(y.clone(), *r), x, 10, batch)
        for block, (x, *rest) in zip(model.blocks, recorded(model.blocks, model, *inputs))
    ]
    assert values(model, *inputs) == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 0.99


class Flat(nn.Module):
    """Attention and MLP on a residual stream [B·N, C], between images [B, N, 3] and [B, 5]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 5)
        self.qkv, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def block(self, x: Tensor, images: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(0, (images, -1)).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v).flatten(0, 2)
        return x + F.gelu(self.mlp(x))

    def forward(self, images: Tensor) -> Tensor:
        x = self.block(self.embed(images).flatten(0, 1), len(images))
        return self.head(x.unflatten(0, (len(images), -1)).mean(1))


def test_images_and_tokens_in_one_dimension() -> None:
    torch.manual_seed(0)
    model, images = curved(Flat(), 3.0), torch.randn(3, 7, 3)
    with torch.no_grad():
        x = model.embed(images)
    expected = functional_linearity(lambda y: model.block(y.flatten(0, 1), 3).unflatten(0, (3, 7)), x, 10)
    assert values(model, images) == pytest.approx([expected], abs=1e-5)
    assert expected < 0.99


class Viewed(Flat):
    """The same on a residual stream [N, B, C] that is a view of [B, N, C], and of which views are taken."""

    def block(self, x: Tensor, images: int) -> Tensor:
        q, k, v = self.qkv(x.transpose(0, 1).view(-1, x.shape[2])).unflatten(0, (images, 1, -1)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(0, 1)
        return x + F.gelu(self.mlp(x))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.embed(images).transpose(0, 1), len(images)).mean(0))


def test_views_within_a_block() -> None:
    torch.manual_seed(0)
    model, images = curved(Viewed(), 3.0), torch.randn(3, 7, 3)
    with torch.no_grad():
        x = model.embed(images)
    expected = functional_linearity(lambda y: model.block(y.transpose(0, 1), 3).transpose(0, 1), x, 10)
    assert values(model, images) == pytest.approx([expected], abs=1e-5)


def test_an_affine_block_has_a_linearity_of_1() -> None:
    model = tiny(mlp="gelu")
    block = model.blocks[1]
    block.norm2, block.mlp = nn.Identity(), nn.Linear(model.spec.width, model.spec.width)
    images = model.example(kinds=16, seed=1)
    alone = values(model, *images, part="mlp")
    assert alone[1] == pytest.approx(1, abs=1e-6) and max(alone[0], alone[2]) < 0.99
    assert values(model, *images)[1] < 0.99
    nn.init.zeros_(block.attn.proj.weight)
    first, affine, last = values(model, *images)
    assert affine == pytest.approx(1, abs=1e-6) and max(first, last) < 0.99


def test_equal_images_tell_nothing() -> None:
    model = tiny()
    (images,) = model.example(kinds=16, seed=1)
    doubled = images[[0, 1, 1, 1]]
    assert values(model, doubled) == pytest.approx(values(model, images), abs=1e-6)
    assert {b.reason for b in linearity(model, images[[0, 0]])} == {"its output is the same for all images"}


def test_what_is_not_finite_has_no_linearity() -> None:
    model = tiny()
    (images,) = model.example(kinds=16, seed=1)
    nn.init.constant_(model.blocks[1].mlp.fc2.bias, float("nan"))
    first, *others = linearity(model, images)
    assert first.reason is None
    assert {b.reason for b in others} == {"its output is not finite"} and {b.value for b in others} == {None}


def test_blocks_that_cannot_be_measured_say_why() -> None:
    model = tiny(mlp="none")
    images = model.example(kinds=16, seed=1)
    assert {b.reason for b in linearity(model, *images, part="mlp")} == {"no MLP follows the attention"}
    assert None not in values(model, *images)

    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x).mean(1)

    (block,) = linearity(Bare().eval(), torch.randn(2, 8, 4))
    assert block.value is None and "no residual connection" in block.reason


def test_of_several_graphs_the_largest_is_measured() -> None:
    model = tiny()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            torch._dynamo.graph_break()
            return model(x)

    (images,) = model.example(kinds=16, seed=1)
    assert values(Broken().eval(), images) == pytest.approx(values(model, images * 2), abs=1e-6)


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        linearity(tiny(), torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize(("options", "message"), [({"steps": 1}, "steps=1"), ({"part": "mpl"}, "did you mean 'mlp'")])
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        linearity(tiny(), torch.randn(2, 3, 16, 16), **options)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval"):
        linearity(tiny().train(), torch.randn(2, 3, 16, 16))


class Transformed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda y: y * 2)(x)


@pytest.mark.parametrize(
    ("model", "message"), [(nn.Identity(), "captured no graph"), (Transformed(), "function transform")]
)
def test_a_model_that_cannot_be_captured_says_why(model: nn.Module, message: str) -> None:
    with pytest.raises(MctfError, match=message):
        linearity(model.eval(), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("linearities", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9, 1.0], 2),
        ([0.1, 0.5, 0.5, 0.5], 1),
        ([0.5, 0.5, 0.5, 0.9], 3),
        # One low value late does not make the blocks before it ones to prune in.
        ([0.2, 0.2, 0.9, 0.9, 0.7, 0.9], 2),
        # A large group that varies counts for more than a small one.
        ([0.1, 0.3, 0.1, 0.5, 0.9], 3),
        ([0.9, 0.8, 0.2], 0),
        ([0.3] * 5, 0),
        ([0.3], 0),
        ([], 0),
        # Blocks that were not measured count all the same.
        ([None, 0.2, None, 0.9, 0.9], 3),
        ([None, None], 0),
    ],
)
def test_proposal(linearities: list[float | None], expected: int) -> None:
    assert proposal(linearities) == expected


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error message: the one line on stderr that the command signs."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mctf: ")]
    return line


def rows(output: str) -> list[list[str]]:
    """The cells of the table in an output."""
    return [[cell.strip() for cell in line.strip("│\n ").split("│")] for line in output.splitlines() if "│" in line]


def test_the_command_shows_every_block_and_proposes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timm_models, "make_model", lambda *_: curved(timm.create_model(MODEL), 8.0))
    assert cli.main(["linearity", MODEL, "--batch", "2", "--steps", "3", "--part", "mlp"]) == 0
    output = capsys.readouterr().out
    torch.manual_seed(0)
    model = curved(timm.create_model(MODEL), 8.0)
    expected = values(model, torch.randn(2, 3, 160, 160), steps=3, part="mlp")
    assert [row[:2] for row in rows(output)] == [[str(i), f"{value:.4f}"] for i, value in enumerate(expected)]
    assert all("█" in row[2] for row in rows(output))
    assert output.splitlines()[0].endswith(f"{MODEL}, random weights, 2 images of noise")
    assert output.splitlines()[-1] == (f'proposed: options={{"method": "tofu", "prune_layers": {proposal(expected)}}}')


def test_the_command_proposes_nothing_without_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["linearity", "test_resnet", "--batch", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to propose: no block could be measured"


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Three images of several kinds and sizes, and a file that is none."""
    torch.manual_seed(0)
    for name, mode, side in (("a.png", "RGB", 200), ("b.JPG", "L", 170), ("c.webp", "RGB", 90)):
        pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
    (tmp_path / "aa.txt").write_text("no image")
    return tmp_path


def test_the_command_takes_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["linearity", MODEL, "--images", str(folder), "--batch", "2"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].endswith("random weights, 2 images")
    assert [row[0] for row in rows(output)] == list("012345")
    files = image_files(folder, 8)
    assert [file.name for file in files] == ["a.png", "b.JPG", "c.webp"]
    images = read_images(files, evaluation_transform(timm.create_model(MODEL), None))
    assert images.shape == (3, 3, 160, 160) and images.min() >= -1 and images.max() <= 1
    # The grey one has three equal channels.
    assert images[1, 0].equal(images[1, 2]) and not images[0, 0].equal(images[0, 2])


def test_the_command_names_the_image_that_it_cannot_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.JPG").write_bytes(b"no image")
    assert cli.main(["linearity", MODEL, "--images", str(folder)]) == 2
    assert "b.JPG cannot be read" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "no/such/folder"], "--images no/such/folder: no such folder"),
        (["--images", "EMPTY"], "has no images"),
        (["--batch", "1"], "give a batch of at least 2"),
        (["--steps", "1"], "steps=1 must be a whole number >= 2"),
    ],
)
def test_errors_of_the_command(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    assert cli.main(["linearity", MODEL, *arguments]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("arguments", [["--part", "attention"], ["--batch", "0"]])
def test_a_bad_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["linearity", MODEL, *arguments])
    assert exit_info.value.code == 2 and "error:" in capsys.readouterr().err
