"""Pictures of tokens: their colours and borders pixel by pixel, and the command that draws them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mctf_compile
from mctf_compile import ConfigError, cli
from mctf_compile.pictures import drawing, painting
from mctf_compile.pictures.files import evenly_chosen, read
from mctf_compile.testing import TinyViT, VitSpec

MODEL = "test_vit"
RED, BLUE, WHITE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)


def tiles(rows: list[str], size: int) -> Tensor:
    """[3, H, W]: red and blue patches of ``size`` pixels, from rows of r and b."""
    colours = torch.tensor([[RED if letter == "r" else BLUE for letter in row] for row in rows])
    return colours.permute(2, 0, 1).repeat_interleave(size, 1).repeat_interleave(size, 2)


def colour(image: Tensor, y: int, x: int) -> tuple[float, ...]:
    return tuple(image[:, y, x].tolist())


def test_a_token_has_the_mean_colour_of_all_its_pixels() -> None:
    video = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([[[0, 0, 2], [2, 1, 0]]])
    painted = painting.token_colours(video, groups, torch.zeros_like(groups, dtype=torch.bool))
    for token in range(3):
        inside = [(y, x) for y in range(6) for x in range(9) if groups[0, y // 3, x // 3] == token]
        mean = torch.stack([video[0, :, y, x] for y, x in inside]).mean(0)
        for y, x in inside:
            torch.testing.assert_close(painted[0, :, y, x], mean)


def test_dropped_patches_are_dark_and_count_for_no_colour() -> None:
    video = tiles(["rb", "rb"], 2)[None]
    groups = torch.tensor([[[0, 0], [1, 2]]])
    dropped = torch.tensor([[[False, True], [False, False]]])
    painted = painting.token_colours(video, groups, dropped)[0]
    assert colour(painted, 0, 0) == RED and colour(painted, 3, 3) == BLUE
    assert colour(painted, 1, 3) == (0, 0, painting.DIMMED)


def test_borders_are_between_tokens_alone() -> None:
    groups = torch.tensor([[[0, 0, 1], [0, 2, 1]]])
    video = torch.zeros(1, 3, 8, 12)
    lined = painting.borders(video, groups)[0, 0]
    expected = torch.zeros(8, 12)
    expected[0:8, 8] = 1  # left of token 1
    expected[4:8, 4] = 1  # left of token 2
    expected[4, 4:8] = 1  # above token 2
    assert torch.equal(lined, expected)


def test_patches_that_do_not_divide_the_image_cover_it() -> None:
    values = painting.at_pixels(torch.arange(9).reshape(1, 3, 3), torch.zeros(1, 3, 10, 10))
    assert values.shape == (1, 10, 10) and sorted(set(values.flatten().tolist())) == list(range(9))
    assert values[0, 0, 0] == 0 and values[0, 9, 9] == 8


def test_heat_goes_from_black_to_yellow_and_a_single_outlier_hides_nothing() -> None:
    values = torch.arange(100.0).reshape(1, 10, 10)
    values[0, 9, 9] = 1e6
    colours = painting.heat(values, torch.zeros(1, 3, 10, 10))[0]
    torch.testing.assert_close(colours[:, 0, 0], torch.tensor(painting.HEAT[0]))
    torch.testing.assert_close(colours[:, 9, 9], torch.tensor(painting.HEAT[-1]))
    brightness = colours.sum(0).flatten()
    assert (brightness[1:95] > brightness[:94]).all()
    assert torch.equal(
        painting.heat(torch.ones(1, 2, 2), torch.zeros(1, 3, 2, 2))[0, :, 0, 0], torch.tensor(painting.HEAT[0])
    )


def two_colours() -> tuple[nn.Module, Tensor]:
    """A model that knows no positions, and an image of red and blue patches [1, 3, 16, 16]."""
    torch.manual_seed(0)
    return TinyViT(VitSpec(depth=3, grid=4)).eval(), tiles(["rrbb", "rrbb", "bbrr", "brbr"], 4)[None]


def test_what_is_drawn_is_what_was_fused(tmp_path: Path) -> None:
    """Equal patches alone fuse here, so every token keeps its patches' colour, and borders lie between tokens."""
    model, images = two_colours()
    options = {"r": 6, "min_tokens": 1, "tau_info": 0, "tau_size": 0}
    drawn = mctf_compile.visualize(model, images, picture=images, **options)
    traced = mctf_compile.trace(model, images, **options)
    assert [scene.panels[0].caption for scene in drawn.scenes] == [
        "block 1: 17 -> 11 tokens",
        "block 2: 11 -> 6 tokens",
    ]
    side = drawing.PANEL // 4
    for scene, block in zip(drawn.scenes, traced.blocks, strict=True):
        tokens, informativeness = (panel.image for panel in scene.panels)
        groups = block.source[0, 1:].reshape(4, 4)
        for y in range(4):
            for x in range(4):
                middle = (side * y + side // 2, side * x + side // 2)
                assert colour(tokens, *middle) == colour(scene.photo.image, *middle)
                if x:
                    line = colour(tokens, middle[0], side * x)
                    assert (line == WHITE) == (groups[y, x] != groups[y, x - 1]).item()
        assert informativeness.shape == tokens.shape == (3, drawing.PANEL, drawing.PANEL)
    still = drawn.sheet()
    assert still.getpixel((drawing.GAP + 10, still.height - 20)) in ((255, 0, 0), (0, 0, 255))
    drawn.save(tmp_path / "fusion.gif")
    with Image.open(tmp_path / "fusion.gif") as moving:
        assert moving.n_frames == 2 and moving.width == 3 * drawing.PANEL + 4 * drawing.GAP


def test_one_block_can_be_drawn_and_those_without_a_fusion_cannot() -> None:
    model, images = two_colours()
    drawn = mctf_compile.visualize(model, images, blocks=[2], r=2, min_tokens=1)
    assert [scene.panels[0].caption for scene in drawn.scenes] == ["block 2: 15 -> 13 tokens"]
    assert drawn._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"block 0 reduces no tokens \(not among the layers that fuse\).*are 1, 2"):
        mctf_compile.visualize(model, images, blocks=[0], r=2, min_tokens=1)
    with pytest.raises(ConfigError, match=r"nothing to draw.*r is 0"):
        mctf_compile.visualize(model, images, r=0)


def test_several_images_are_drawn_at_the_last_block() -> None:
    model, images = two_colours()
    drawn = mctf_compile.visualize(model, images.expand(3, -1, -1, -1), method="tome", r=2)
    assert [scene.photo.caption for scene in drawn.scenes] == ["image 0", "image 1", "image 2"]
    assert [[panel.caption for panel in scene.panels] for scene in drawn.scenes] == [["block 2: 13 -> 11 tokens"]] * 3


def test_the_frames_of_a_video_share_tokens() -> None:
    """A model with a time axis: patches of two frames each, in two rows of frames."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.VideoMAEModel(config).eval()
    video = torch.rand(1, 4, 3, 32, 32)
    drawn = mctf_compile.visualize(model, video, picture=video, r=3, min_tokens=1)
    (block,) = mctf_compile.trace(model, video, r=3, min_tokens=1).blocks
    assert (block.first, block.grid) == (0, (2, 2, 2))
    assert [scene.photo.caption for scene in drawn.scenes] == [f"frame {f}" for f in range(4)]
    groups = block.source[0].reshape(2, 2, 2)
    times = drawing.PANEL // 32
    for token in range(5):
        inside = [(f, y, x) for f in range(4) for y in range(2) for x in range(2) if groups[f // 2, y, x] == token]
        mean = torch.stack([video[0, f, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] for f, y, x in inside])
        for f, y, x in inside:
            middle = drawn.scenes[f].panels[0].image[:, (16 * y + 8) * times, (16 * x + 8) * times]
            torch.testing.assert_close(middle, mean.mean((0, 2, 3)))


def test_inputs_become_pictures_again() -> None:
    images = torch.rand(2, 3, 4, 4)
    model = nn.Identity()
    stretched = drawing.as_videos([images * 5 - 3], model)
    assert stretched.shape == (2, 1, 3, 4, 4) and (stretched.min(), stretched.max()) == (0, 1)
    model.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)}
    mean, deviation = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(drawing.as_videos([(images - mean) / deviation], model)[:, 0], images)
    assert drawing.as_videos([torch.rand(2, 3, 7, 4, 4)], nn.Identity()).shape == (2, 7, 3, 4, 4)
    with pytest.raises(ConfigError, match="no input is an image"):
        drawing.as_videos([torch.rand(2, 3)], model)
    with pytest.raises(ConfigError, match="no colours"):
        drawing.as_videos([torch.rand(2, 5, 4, 4)], model)


# Files and the command.


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images: red, blue and one with both; beside it an animation and a text."""
    folder = tmp_path_factory.mktemp("photos")
    frames = []
    for i, rows in enumerate((["rr", "rr"], ["bb", "bb"], ["rb", "br"])):
        pixels = (tiles(rows, 90) * 255).byte().permute(1, 2, 0).contiguous()
        frames.append(Image.frombytes("RGB", (180, 180), pixels.numpy().tobytes()))
        (folder / "frames").mkdir(exist_ok=True)
        frames[-1].save(folder / "frames" / f"{i}.png")
    (folder / "frames" / "notes.txt").write_text("no image")
    frames[0].save(folder / "video.gif", save_all=True, append_images=frames[1:])
    (folder / "text.png").write_text("no image")
    (folder / "empty").mkdir()
    return folder


def test_files_of_several_frames_and_folders_are_videos(photos: Path) -> None:
    for path in (photos / "video.gif", photos / "frames"):
        frames = read(path, 8)
        assert [frame.getpixel((20, 20))[0] > 200 for frame in frames] == [True, False, True]
        assert [frame.getpixel((20, 20))[0] > 200 for frame in read(path, 2)] == [True, True]
    assert len(read(photos / "frames" / "1.png", 8)) == 1
    assert evenly_chosen(range(100), 3) == [0, 50, 99] and evenly_chosen(range(5), 1) == [0]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The exit status, the output and the error message, which is one line at most."""
    try:
        status = cli.main(["visualize", *arguments])
    except SystemExit as exit_status:
        status = exit_status.code
    output = capsys.readouterr()
    signed = [line for line in output.err.splitlines() if line.startswith("mctf")]
    assert len(signed) == (status != 0)
    return status, output.out, "".join(signed)


def test_the_command_draws_an_image(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a=b" / "out.png"
    path.parent.mkdir()
    status, output, _ = run(
        [MODEL, str(photos / "frames" / "2.png"), "--r", "8", "-o", "tau_info=0", "-o", str(path), "--blocks", "3,5"],
        capsys,
    )
    assert status == 0 and output.startswith(f"{path}: mctf: 5 of 6 blocks fuse, 40 tokens removed")
    with Image.open(path) as still:
        # The image, its patches and two blocks, each with its informativeness: two panels wide at 224 pixels or more.
        assert still.width > 400 and still.height > 400


def test_the_command_draws_a_video(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.gif"
    status, output, _ = run([MODEL, str(photos / "video.gif"), "--method", "tome", "-o", str(path)], capsys)
    assert status == 0 and "3 frames, each by itself" in output
    with Image.open(path) as moving:
        assert moving.n_frames == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_vitt", "{photos}/video.gif"], "timm has no model 'test_vitt'; the nearest are test_vit"),
        ([MODEL, "{photos}/nothing.png"], "there is no image"),
        ([MODEL, "{photos}/text.png"], "text.png cannot be read as an image: it is of no kind that Pillow knows"),
        ([MODEL, "{photos}/empty"], "empty has no images"),
        ([MODEL, "{photos}/video.gif", "-o", "out.bmp"], "cannot draw 'out.bmp': its ending must be one of .png"),
        ([MODEL, "{photos}/video.gif", "-o", "no/such/folder.png"], "cannot write 'no/such/folder.png'"),
        ([MODEL, "{photos}/video.gif", "--blocks", "1;2"], "'1;2' is not of the form N,N"),
        ([MODEL, "{photos}/frames/0.png", "--blocks", "0", "-o", "{photos}/x.png"], "block 0 reduces no tokens"),
        ([MODEL, "{photos}/video.gif", "-o", "tau_simm=1"], "did you mean 'tau_sim'"),
        ([MODEL, "{photos}/video.gif", "--weights", "{photos}/text.png"], "cannot be read as a state dict"),
        ([MODEL, "{photos}/video.gif", "--weights", "{photos}/none.pth"], "none.pth' is not there"),
        ([MODEL, "{photos}/video.gif", "--weights", "{photos}/text.png", "--pretrained"], "not allowed with"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[1:]).replace("{photos}/", ""),
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run([argument.format(photos=photos) for argument in arguments], capsys)
    assert status == 2 and message in error


def test_weights_are_those_of_the_file(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    model = timm.create_model(MODEL).eval()
    mctf_compile.attach(model, method="dynamicvit")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    image = torch.zeros(1, 3, 160, 160)
    expected = mctf_compile.trace(model, image, method="dynamicvit")
    from mctf_compile.cli import models, parser

    for name in ("weights.safetensors", "weights.pth"):
        args = parser().parse_args(
            ["visualize", MODEL, "x.png", "--weights", str(tmp_path / name), "--method", "dynamicvit"]
        )
        loaded = models.load(args, lambda *_: None)
        models.attach_learned(loaded, image, {"method": "dynamicvit"}, args)
        found = mctf_compile.trace(loaded, image, method="dynamicvit")
        assert torch.equal(found.output, expected.output) and not found.report.remarks
    other = timm.create_model(MODEL, num_classes=3)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    status, _, error = run([MODEL, str(photos / "video.gif"), "--weights", str(tmp_path / "other.pth")], capsys)
    assert status == 2 and "other.pth is of another model: size mismatch for head.weight" in error


def test_a_missing_package_is_named_before_anything_is_loaded(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    status, _, error = run(["no_model", str(photos / "video.gif")], capsys)
    assert status == 2 and "the package pillow; pip install 'mctf-compile[pictures]'" in error


def test_ctrl_c_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mctf_compile.provenance.trace", interrupt)
    status, _, error = run([MODEL, str(photos / "video.gif")], capsys)
    assert (status, error) == (130, "mctf: interrupted")
