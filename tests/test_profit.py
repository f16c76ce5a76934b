"""What a fusion saves is weighed stretch by stretch, from one place where all tokens are there to the next."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mctf_compile import explain
from mctf_compile.testing import assert_rewrite_sound

LOSING = "giving the original tokens back for later operators costs more than the fusion saves"


class Block(nn.Module):
    """Attention and an MLP ``wide`` times as wide."""

    def __init__(self, channels, wide):
        super().__init__()
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, wide * channels), nn.Linear(wide * channels, channels)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Thin(nn.Module):
    """Blocks that don't pay on [B, C, H, W]: a convolution over the grid stands before each."""

    def __init__(self, channels, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, 1) for _ in range(depth))
        self.mix = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1, groups=channels) for _ in range(depth))

    def forward(self, x):
        for block, mix in zip(self.blocks, self.mix):
            x = block(mix(x).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        return x


class Wide(nn.Sequential):
    """Blocks that pay, on [B, C, H, W], up to [B, C]."""

    def __init__(self, channels, depth):
        super().__init__(*(Block(channels, 4) for _ in range(depth)))

    def forward(self, x):
        return super().forward(x.flatten(2).transpose(1, 2)).mean(1)


class ThinFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 128, 4, 4)
        self.thin, self.wide = Thin(16, 3), Wide(128, 2)

    def forward(self, images):
        return self.wide(self.down(self.thin(self.stem(images))))


class ThinLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 128, 16, 16), nn.Linear(128, 4 * 4 * 4)
        self.wide, self.thin = nn.ModuleList(Block(128, 4) for _ in range(3)), Thin(4, 2)
        self.last = nn.Conv2d(4, 1, 3)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.wide:
            x = block(x)
        # Each token becomes 4×4 pixels of four channels.
        x = F.pixel_shuffle(self.up(x).transpose(1, 2).unflatten(2, (6, 6)), 4)
        return self.last(self.thin(x))


class SideBySide(nn.Module):
    """Two towers, a block of one after a block of the other."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(3, 128, 16, 16)
        self.thin, self.last = nn.ModuleList(Thin(16, 1) for _ in range(3)), nn.Conv2d(16, 1, 3)
        self.wide = nn.ModuleList(Block(128, 4) for _ in range(3))

    def forward(self, images):
        x, y = self.small(images), self.large(images).flatten(2).transpose(1, 2)
        for thin, wide in zip(self.thin, self.wide):
            x, y = thin(x), wide(y)
        return self.last(x), y.mean(1)


@pytest.mark.parametrize("model", [ThinFirst, ThinLast, SideBySide])
def test_blocks_that_pay_fuse_beside_others_that_do_not(model):
    torch.manual_seed(0)
    model, images = model().eval(), torch.randn(2, 3, 96, 96)
    report = explain(model, images, r=4)
    by_kind = {kind: [b for b in report.blocks if kind in b.module and b.index] for kind in ("thin", "wide")}
    assert all(b.reason == LOSING for b in by_kind["thin"]) and by_kind["thin"]
    assert all(b.removed == 4 for b in by_kind["wide"]) and by_kind["wide"]
    assert report.macs_after < report.macs_before
    # The same as where the others are named.
    asked = explain(model, images, r=4, modules=["wide*"])
    assert (asked.macs_after, asked.removed) == (report.macs_after, report.removed)
    assert_rewrite_sound(model, images, r=4, min_tokens=1)
