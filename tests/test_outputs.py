"""Outputs that keep their fused tokens: the same numbers as with all tokens, and what each token stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mctf_compile
from mctf_compile import ConfigError, MctfError
from mctf_compile.testing import TinyViT, VitSpec

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Encoder(nn.Module):
    """Returns what its blocks left and the patches alone, and a mean that has no tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = TinyViT(VitSpec(depth=3, head="dense", position=True))
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.body(images)
        return {"all": x, "mean": x.mean(1), "patches": x[:, 1:] * 2}


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> nn.Module:
    return torch.compile(model, backend="mctf", options={"r": 3, "min_tokens": 1, "inner": inner, **options})


def restored(output: Tensor, source: Tensor) -> Tensor:
    return output.gather(1, source[..., None].expand(-1, -1, output.shape[2]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inner": "inductor"},
        {"dynamic_r": True},
        {"method": "tome"},
        {"method": "random", "min_tokens": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_each_token_is_that_of_all_that_it_stands_for(options, batch):
    model, images = Encoder(), IMAGES[:batch]
    with torch.no_grad():
        torch.manual_seed(1)
        dense = compiled(model, **options)(images)
        torch._dynamo.reset()
        torch.manual_seed(1)
        fused = compiled(model, outputs="fused", **options)(images)
    assert fused.keys() == dense.keys()
    assert torch.equal(fused["mean"], dense["mean"])
    for name, total in (("all", 17), ("patches", 16)):
        size, source = mctf_compile.fused_tokens(fused[name])
        assert fused[name].shape[1] < dense[name].shape[1] == source.shape[1] == total
        assert torch.equal(restored(fused[name], source), dense[name])
        counts = torch.zeros_like(size).scatter_add(1, source, torch.ones_like(source, dtype=size.dtype))
        # Tokens that were dropped are part of no other, whichever is given back in their place.
        assert torch.equal(size, torch.ones_like(size) if options.get("method") == "random" else counts)


def test_gradients_flow_through_the_fused_tokens():
    model = Encoder()
    fused = compiled(model, "aot_eager", outputs="fused")(IMAGES)["all"]
    size, _ = mctf_compile.fused_tokens(fused)
    (fused * size[..., None]).sum().backward()
    learned = [p for p in model.parameters() if p.grad is not None]
    assert len(learned) > 20
    found = [p.grad.clone() for p in learned]
    model.zero_grad()
    torch._dynamo.reset()
    compiled(model, "aot_eager")(IMAGES)["all"].sum().backward()
    for a, p in zip(found, learned, strict=True):
        torch.testing.assert_close(a, p.grad)


def test_with_another_r_the_outputs_have_other_tokens_and_none_are_kept_for_later():
    run = compiled(Encoder(), dynamic_r=True, outputs="fused")
    with torch.no_grad():
        for r in (3, 0, 2):
            mctf_compile.set_r(run, r)
            x = run(IMAGES)["all"]
            size, source = mctf_compile.fused_tokens(x)
            assert x.shape[1] == size.shape[1] == 17 - 2 * r
            assert source.amax() == x.shape[1] - 1
    with pytest.raises(MctfError, match="not a view or a copy"):
        mctf_compile.fused_tokens(x.clone())
    with pytest.raises(MctfError, match="not a view or a copy"):
        mctf_compile.fused_tokens(x[:, 1:])


def test_where_a_call_leaves_all_tokens_each_stands_for_itself():
    """A method that drops tokens does not run where it would drop none: the dense graph does."""
    model = TinyViT(VitSpec(depth=3, head="dense")).eval()
    options = {"method": "evit", "layers": [1], "keep_rate": 0.8, "inner": "eager", "outputs": "fused"}
    run = torch.compile(model, backend="mctf", dynamic=True, options=options)
    with torch.no_grad():
        assert run(IMAGES).shape[1] < 17
        x = run(IMAGES[..., :8, :4])
    size, source = mctf_compile.fused_tokens(x)
    assert torch.equal(size, torch.ones(3, 3)) and torch.equal(source, torch.arange(3).expand(3, 3))


def test_what_is_not_laid_out_as_tokens_has_them_all():
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, images):
            return self.encoder(images)["patches"].transpose(1, 2).reshape(len(images), -1, 4, 4)

    with torch.no_grad():
        grid = compiled(Maps(), outputs="fused")(IMAGES)
    assert grid.shape[2:] == (4, 4)
    with pytest.raises(MctfError, match="has all its tokens"):
        mctf_compile.fused_tokens(grid)


def test_hugging_face_encoders_return_fewer_hidden_states():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = compiled(model)(pixel_values=images).last_hidden_state
        torch._dynamo.reset()
        fused = compiled(model, outputs="fused")(pixel_values=images).last_hidden_state
    assert fused.shape == (2, 11, 32)
    assert torch.equal(restored(fused, mctf_compile.fused_tokens(fused).source), dense)


def test_an_exported_program_returns_what_its_tokens_stand_for():
    model = Encoder()
    program = mctf_compile.export(model, (IMAGES,), r=3, min_tokens=1, outputs="fused").module()
    plain = mctf_compile.export(model, (IMAGES,), r=3, min_tokens=1).module()
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        outputs, known = program(images)
        dense = plain(images)
    assert outputs.keys() == dense.keys() and len(known) == 2
    for name, tokens in zip(("all", "patches"), known):
        assert torch.equal(restored(outputs[name], tokens["source"]), dense[name])
        assert tokens["size"].shape == outputs[name].shape[:2]


def test_the_report_says_which_outputs_keep_their_fused_tokens():
    report = mctf_compile.explain(Encoder(), IMAGES, r=3, min_tokens=1, outputs="fused")
    assert report.kept_fused == report.to_dict()["kept_fused"] == [0, 2]
    assert "returned with fused tokens: output 0, 2 of the graph" in str(report)
    assert mctf_compile.explain(Encoder(), IMAGES, r=3, min_tokens=1).kept_fused == []


def test_a_pass_over_a_graph_of_others_keeps_its_outputs_shapes():
    with pytest.raises(ConfigError, match="shapes of a graph that others call"):
        mctf_compile.MctfPass(r=3, outputs="fused")
