"""A decoder's queries are no tokens of an image: they fuse where ``modules`` asks for it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from decoders import Attend, C, Layer
from torch import Tensor, nn

import mctf_compile
from mctf_compile.passes.planning.plan import QUERIES
from mctf_compile.testing import assert_rewrite_sound

OPTIONS = {"method": "tome", "r": 2, "min_tokens": 1, "layers": [0, 1]}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(1))
LONG = torch.randn(2, 40, C, generator=torch.Generator().manual_seed(2))


class Decoder(nn.Module):
    """What ``start`` makes of the decoder and its inputs goes through layers that read the last input."""

    def __init__(self, start: Callable[..., Tensor], plain: bool = False, cross_first: bool = False) -> None:
        super().__init__()
        self.start = start
        self.queries = nn.Parameter(torch.randn(1, 6, C))
        self.positions = nn.Parameter(torch.randn(1, 16, C))
        self.embedding = nn.Embedding(50, C)
        self.patches, self.condition = nn.Conv2d(3, C, 4, 4), nn.Linear(C, C)
        self.layers = nn.ModuleList(Layer(plain, cross_first) for _ in range(2))

    def forward(self, *inputs: Tensor) -> Tensor:
        x, memory = self.start(self, *inputs), inputs[-1]
        for layer in self.layers:
            x = layer(x, memory)
        return x


def decoder(start: Callable[..., Tensor], **spelling: bool) -> Decoder:
    torch.manual_seed(0)
    return Decoder(start, **spelling).eval()


def of_parameters(m: Decoder, *inputs: Tensor) -> Tensor:
    return m.queries.expand(len(inputs[-1]), -1, -1)


def of_zeros(m: Decoder, *inputs: Tensor) -> Tensor:
    """As in DETR."""
    queries = of_parameters(m, *inputs)
    return torch.zeros_like(queries) + queries


def with_a_condition(m: Decoder, label: Tensor, memory: Tensor) -> Tensor:
    """What says the same to all of them makes them no image's tokens."""
    return of_parameters(m, memory) + m.condition(label)[:, None]


def with_prompts(m: Decoder, prompts: Tensor, memory: Tensor) -> Tensor:
    """As in SAM, and in a Q-Former that reads an instruction: some of them are given."""
    return torch.cat([of_parameters(m, memory), prompts], 1)


def of_words(m: Decoder, words: Tensor, memory: Tensor) -> Tensor:
    return m.embedding(words)


def given(m: Decoder, queries: Tensor, memory: Tensor) -> Tensor:
    """A decoder that is compiled alone."""
    return queries


def of_an_image(m: Decoder, images: Tensor, memory: Tensor) -> Tensor:
    return m.patches(images).flatten(2).transpose(1, 2) + m.positions


def of_patches(m: Decoder, images: Tensor, memory: Tensor) -> Tensor:
    """Patches that a reshape cuts out."""
    x = images[:, 0].reshape(-1, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(-1, 16, 16)
    return m.condition(x)


WORDS = torch.arange(18).reshape(2, 9)
PROMPTS = torch.randn(2, 9, C, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("spelling", [{}, {"plain": True}, {"cross_first": True}], ids=["one", "three", "first"])
@pytest.mark.parametrize(
    ("start", "inputs"),
    [
        (of_parameters, (LONG,)),
        # However few there are to read.
        (of_parameters, (TEXT[:, :3],)),
        (of_zeros, (LONG,)),
        (with_a_condition, (TEXT[:, 0], LONG)),
        (with_prompts, (PROMPTS[:, :2], LONG)),
        (with_prompts, (PROMPTS, LONG)),
        (of_words, (WORDS, LONG)),
        (given, (PROMPTS, LONG)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_queries_stay_as_they_are_unless_they_are_asked_for(start, inputs, spelling):
    model = decoder(start, **spelling)
    report = assert_rewrite_sound(model, *inputs, **OPTIONS)
    assert [b.reason for b in report.blocks] == [QUERIES] * 2
    assert "queries, which read another sequence by cross-attention" in report.reason
    asked = assert_rewrite_sound(model, *inputs, **OPTIONS, modules="layers.*")
    assert [b.removed for b in asked.blocks] == [2, 2]
    assert not asked.unmerged


@pytest.mark.parametrize("spelling", [{}, {"plain": True}], ids=["one", "three"])
@pytest.mark.parametrize(
    ("start", "inputs"),
    [
        (of_an_image, (IMAGES, TEXT)),
        # A text may be longer than a small image.
        (of_an_image, (IMAGES, LONG)),
        (of_patches, (IMAGES, LONG)),
        (given, (LONG, TEXT)),
        # Two images that read each other.
        (given, (LONG, LONG.flip(1))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tokens_of_an_image_that_read_a_text_fuse(start, inputs, spelling):
    report = assert_rewrite_sound(decoder(start, **spelling), *inputs, **OPTIONS)
    assert [b.removed for b in report.blocks] == [2, 2]


def test_a_table_of_codes_is_no_sequence():
    """Tokens that read parameters alone read nothing of the model's inputs."""

    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = decoder(given).layers
            self.codes = nn.Parameter(torch.randn(1, 40, C))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, self.codes.expand(len(x), -1, -1))
            return x

    report = assert_rewrite_sound(Codes().eval(), PROMPTS, **OPTIONS)
    assert [b.removed for b in report.blocks] == [2, 2]


def test_a_class_token_that_reads_another_image_leaves_patches_to_fuse():
    """As in CrossViT: what cross-attends is a prefix token."""

    class Class(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = decoder(given)
            self.token = nn.Parameter(torch.randn(1, 1, C))
            self.read = Attend()

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            for layer in self.inner.layers:
                y = layer.norms[0](x)
                x = x + layer.self_attn(y, y)
                token = x[:, :1] + self.read(x[:, :1], other)
                x = torch.cat([token, x[:, 1:]], 1)
                x = x + layer.mlp(layer.norms[2](x))
            return x[:, 0]

    report = assert_rewrite_sound(Class().eval(), PROMPTS, LONG, **OPTIONS)
    assert [b.removed for b in report.blocks] == [2, 2]


def test_an_encoder_beside_its_decoder_has_the_schedule_to_itself():
    """A list for r has an entry for each block of the encoder, whatever depth the decoder has."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = decoder(of_an_image)
            self.encoder.layers.append(Layer())
            self.decoder = decoder(of_parameters)

        def forward(self, images: Tensor, text: Tensor) -> Tensor:
            return self.decoder(self.encoder(images, text))

    report = assert_rewrite_sound(Both().eval(), IMAGES, TEXT, **{**OPTIONS, "r": [1, 2, 3], "layers": None})
    assert report.towers == ["tower 0: encoder.layers", "tower 1: decoder.layers"]
    assert [b.removed for b in report.blocks] == [1, 2, 3, 0, 0]
    assert {b.reason for b in report.blocks[3:]} == {QUERIES}


def qformer() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.Blip2QFormerConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        encoder_hidden_size=C,
        cross_attention_frequency=2,
    )
    return transformers.Blip2QFormerModel(config), {
        "query_embeds": torch.randn(2, 8, 32),
        "encoder_hidden_states": LONG,
    }


def detr() -> tuple[nn.Module, dict[str, Tensor]]:
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=12,
    )
    given = {"pixel_values": torch.randn(2, 3, 64, 64), "pixel_mask": torch.ones(2, 64, 64, dtype=torch.long)}
    return transformers.DetrModel(config), given


@pytest.mark.parametrize(("make", "encoder", "modules"), [(qformer, 0, "encoder"), (detr, 3, "decoder")])
def test_transformers_decoders(make, encoder, modules):
    torch.manual_seed(0)
    model, given = make()
    with torch.no_grad():
        report = mctf_compile.explain(model.eval(), kwargs=given, r=4, min_tokens=1)
        asked = mctf_compile.explain(model, kwargs=given, r=4, min_tokens=1, modules=modules)
    assert [b.removed for b in report.blocks] == [*[0, 4, 4][:encoder], 0, 0, 0]
    assert {b.reason for b in report.blocks[encoder:]} == {QUERIES}
    assert [b.removed > 0 for b in asked.blocks] == [*[False] * encoder, False, True, True]
