"""What graphs do beside computing: writes, masks, checkpoints, symbolic sizes, and who calls them."""

import warnings

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import mctf_compile
from mctf_compile.testing import Recorder, TinyViT, VitSpec, assert_rewrite_sound, check_rewrite, repeated_patches
from mctf_compile.testing.soundness import ONLY_SIMILARITY, assert_fused_alike

IMAGES = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def tiny(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=96, depth=3, embed_dim=48, num_heads=3, num_classes=10, **kwargs
    ).eval()


def fast(model, **options):
    arguments = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    return torch.compile(model, backend="mctf", options={"r": 8, "inner": "eager", **options}, **arguments)


class Written(nn.Module):
    """Three blocks of attention whose branch writes into tensors, as ``write`` says."""

    def __init__(self, write) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.register_buffer("mean", torch.zeros(16))
        self.write = write

    def forward(self, x):
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.write(self, x, qkv).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + mlp(x).relu_()
        return x.mean(1)


def running_mean(self, x, qkv):
    self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
    return qkv(x - self.mean)


def through_a_view(self, x, qkv):
    y = qkv(x)
    y[:, :, :4].mul_(0.5)
    return y


def under_an_old_name(self, x, qkv):
    y = qkv(x)
    y.mul_(0.5)
    return y


def of_another_dtype(self, x, qkv):
    """Comparisons and wider operands leave a tensor that is written to in its own dtype."""
    positive = (x * 4).long().ne_(0)
    half = x.bfloat16().mul_(torch.tensor(0.5)).add_(x)
    return qkv(x * positive + half.float())


WRITES = {
    of_another_dtype: True,
    running_mean: True,
    under_an_old_name: True,
    lambda self, x, qkv: qkv(x).clamp_(-1, 1): True,
    lambda self, x, qkv: qkv(x).masked_fill_(x.sum() > 1e9, 0.0): True,
    lambda self, x, qkv: qkv(torch.empty_like(x).copy_(x)): True,
    through_a_view: True,
    lambda self, x, qkv: torch.mul(qkv(x), 2, out=torch.empty(2, 24, 48)): False,
}


@pytest.mark.parametrize(("write", "fuses"), WRITES.items(), ids=range(len(WRITES)))
@pytest.mark.parametrize("attention", ["approx", "exact", "current"])
def test_writes_happen_once_and_are_seen(write, fuses, attention):
    # Of these three kinds of token, each finds one of its own to be fused with, twice.
    kinds = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(3))
    x = kinds[:, torch.arange(24) % 3].contiguous()
    results, means = [], []
    for run in (lambda m: m(x), Recorder({"r": 2, "attention": attention, "min_tokens": 1, **ONLY_SIMILARITY}).run):
        model = Written(write)
        with torch.no_grad():
            results.append(run(model) if run.__name__ == "<lambda>" else run(model, x))
        means.append(model.mean)
        recorder = getattr(run, "__self__", None)
    assert recorder.largest_gap < 1e-5
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(means[1], means[0], atol=1e-6, rtol=1e-5)
    (report,) = recorder.reports
    assert report.fused is fuses
    assert fuses or "writes into a tensor" in report.reason


def twice(self, x):
    self.held[:, 1].mul_(0.5).add_(x.amax((0, 1)))


VIEWS = {
    "copy_": lambda self, x: self.held[:, 0].copy_(x.mean((0, 1))),
    "assignment": lambda self, x: self.held.__setitem__((slice(None), 2), x.mean((0, 1))),
    "one after another": twice,
    "a transposed view": lambda self, x: self.held.t()[1].add_(x.mean((0, 1))),
    "another shape": lambda self, x: self.held.view(3, 16)[0].copy_(x.mean((0, 1))),
    "two views": lambda self, x: (self.held[:, :2].zero_(), self.held[:, 1].copy_(x.mean((0, 1)))),
    "tokens": lambda self, x: self.tokens[:, 3:5].copy_(x[:, 3:5]),
    "data": lambda self, x: self.held.data[:, 0].add_(x.mean((0, 1))),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_into_a_view_of_a_buffer_arrives(name):
    class Holding(Written):
        def __init__(self) -> None:
            super().__init__(lambda self, x, qkv: qkv(x))
            self.register_buffer("held", torch.ones(16, 3))
            self.register_buffer("tokens", torch.zeros(2, 24, 16))

        def forward(self, x):
            x = super().forward(x)[:, None] + x
            VIEWS[name](self, x)
            return x

    kinds = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(3))
    x = kinds[:, torch.arange(24) % 3].contiguous()
    dense, fused = Holding(), Holding()
    with torch.no_grad():
        dense(x)
        Recorder({"r": 6, "min_tokens": 1, **ONLY_SIMILARITY}).run(fused, x)
    torch.testing.assert_close(fused.held, dense.held, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.tokens, dense.tokens, atol=1e-5, rtol=1e-5)
    assert not torch.equal(dense.tokens if name == "tokens" else dense.held, Holding().held)


def test_a_tensor_that_is_read_by_its_data_may_change():
    """``x.data`` is the memory of x, which other calls find changed, and has no gradient."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images):
            return self.inner(images * self.scale.data)

    model = Scaled()
    fused = fast(model, strict=True)
    with torch.no_grad():
        before = fused(IMAGES)
        model.scale.fill_(2)
        torch.testing.assert_close(fused(IMAGES), fast(model.inner)(2 * IMAGES))
        assert not torch.allclose(fused(IMAGES), before)
    fused(IMAGES).sum().backward()
    assert model.scale.grad is None and model.inner.head.weight.grad is not None


def test_an_input_is_written_to_once():
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, images, calls):
            calls.add_(1)
            return self.inner(images) * calls

    calls = torch.zeros(())
    with torch.no_grad():
        got = fast(Counted())(IMAGES, calls)
        assert calls.item() == 1
        torch.testing.assert_close(got, fast(tiny())(IMAGES), atol=1e-6, rtol=1e-6)


def padded_model(spelling: str, head: str = "cls") -> TinyViT:
    torch.manual_seed(0)
    return TinyViT(VitSpec(spelling=spelling, side="padding", head=head, grid=5, prefix=1)).eval()


@pytest.mark.parametrize("spelling", ["sdpa", "softmax", "einsum", "talking"])
@pytest.mark.parametrize("attention", ["approx", "exact", "current"])
def test_padding_never_fuses_with_real_tokens(spelling, attention):
    model = padded_model(spelling)
    images = torch.randn(2, 3, 20, 20)
    valid = torch.rand(2, 25) > 0.5
    recorder = Recorder({"r": 9, "min_tokens": 1, "attention": attention})
    with torch.no_grad():
        recorder.run(model, images, valid)
        changed = images.clone()
        assert_rewrite_sound(model, images, valid, r=9, min_tokens=1, attention=attention)
    assert recorder.reports[0].removed > 12
    index = recorder.index()[:, 1:]
    for row, real in zip(index, valid):
        assert not set(row[real].tolist()) & set(row[~real].tolist())
    assert torch.equal(changed, images)


def test_what_padding_holds_does_not_matter():
    """A masked token has no influence on the real ones, fused or not."""
    model = padded_model("sdpa", "mean")
    images = torch.randn(2, 3, 20, 20)
    valid = torch.arange(25).expand(2, -1) < torch.tensor([20, 12])[:, None]
    pixels = F.interpolate(valid.float().view(2, 1, 5, 5), scale_factor=4)
    outputs = []
    with torch.no_grad():
        for noise in (0.0, 3.0):
            recorder = Recorder({"r": 2, "min_tokens": 1, "layers": [2], **ONLY_SIMILARITY})
            outputs.append(recorder.run(model, images * pixels + noise * (1 - pixels), valid))
            assert recorder.reports[0].removed == 2
    assert torch.isfinite(outputs[1]).all()


LOWEST = torch.finfo(torch.float32).min


def scaled(valid):
    """As Hugging Face writes a mask: made of numbers, here anew in every block."""
    return (1 - valid[:, None, None].float()) * LOWEST


def low(valid):
    return torch.zeros(valid.shape[0], 1, 1, valid.shape[1]).masked_fill(~valid[:, None, None], float("-inf"))


# How padding is written, each a mask that is added or, boolean, says what takes part.
PADDINGS = {
    "boolean": lambda valid: valid[:, None, None],
    "expanded": lambda valid: valid[:, None, None].expand(-1, 1, valid.shape[1], -1),
    "of queries and keys": lambda valid: valid[:, None, None] & torch.ones_like(valid)[:, None, :, None],
    "filled": low,
    "filled where it is masked already": lambda valid: scaled(valid).masked_fill(scaled(valid).to(torch.bool), LOWEST),
    "chosen": lambda valid: torch.where(valid[:, None, None], 0.0, -1e9),
    "scaled": scaled,
    "small": lambda valid: (1 - valid[:, None, None].float()) * -1e4,
}


class Padded(nn.Module):
    """A block for each entry of ``masked``, which says whether it sees the padding; twice in its logits in the last."""

    def __init__(self, padding, spelling, masked) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in masked)
        self.padding, self.spelling, self.masked = padding, spelling, masked

    def forward(self, x, valid):
        for qkv, masked in zip(self.qkv, self.masked):
            q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            mask = self.padding(valid) if masked else None
            if self.spelling == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, mask)
            else:
                logits = q @ k.mT
                if masked:
                    boolean = mask.dtype is torch.bool
                    logits = logits.masked_fill(~mask, float("-inf")) if boolean else logits + mask
                y = logits.softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("spelling", ["sdpa", "softmax"])
@pytest.mark.parametrize("name", PADDINGS)
def test_a_mask_that_a_fusion_did_not_keep_apart_is_never_averaged(name, spelling):
    """Padding that only a later block masks may hold the same as tokens; a mean of both would be masked."""
    x, valid = torch.randn(2, 1, 16).repeat(1, 24, 1), torch.rand(2, 24) > 0.5
    with torch.no_grad():
        for masked in ((False, True), (True, True, True)):
            model = Padded(PADDINGS[name], spelling, masked)
            recorder = Recorder({"r": 8, "min_tokens": 1, "layers": [0, 1][: len(masked) - 1], **ONLY_SIMILARITY})
            got = recorder.run(model, x, valid)
            # Tokens that are masked alike are copies of one another.
            torch.testing.assert_close(got, model(x, valid), atol=1e-5, rtol=1e-5)
            (report,) = recorder.reports
            assert report.removed
            assert all(masked) or any("may differ in a" in line for line in report.unmerged)


def test_a_mask_of_queries_that_are_no_tokens_is_never_averaged():
    class Pooled(Padded):
        def forward(self, x, valid):
            x = super().forward(x, valid)
            return F.scaled_dot_product_attention(torch.ones(2, 1, 16), x, x, low(valid)[:, 0]).squeeze(1)

    x, valid = torch.randn(2, 1, 16).repeat(1, 24, 1) + torch.randn(2, 24, 16) / 1e4, torch.rand(2, 24) > 0.5
    with torch.no_grad():
        for masked, fuses in ((False, False), (True, True)):
            model = Pooled(low, "sdpa", (masked,))
            recorder = Recorder({"r": 8, "min_tokens": 1, "layers": [0], **ONLY_SIMILARITY})
            torch.testing.assert_close(recorder.run(model, x, valid), model(x, valid), atol=1e-3, rtol=1e-3)
            (report,) = recorder.reports
            assert fuses == (not any("may differ in a mask" in line for line in report.unmerged))


class Masked(nn.Module):
    """Two attention layers under a mask [N, N], boolean or added."""

    def __init__(self, mask) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.register_buffer("mask", mask)

    def forward(self, x):
        for qkv in self.qkv:
            q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("mask", "fuses"),
    [
        (torch.ones(24, 24).tril().bool(), False),
        (torch.full((24, 24), float("-inf")).triu(1), False),
        (torch.block_diag(torch.ones(12, 12), torch.ones(12, 12)).bool(), False),
        (torch.zeros(24, 24), True),
    ],
)
def test_a_mask_over_pairs_of_tokens_is_declined_and_a_bias_is_not(mask, fuses, frozen):
    """``frozen``: the mask is an attribute of the graph, not an input."""
    with torch.no_grad(), torch._dynamo.config.patch(prepare_freezing=frozen):
        report = assert_rewrite_sound(Masked(mask), torch.randn(2, 24, 16), r=4, min_tokens=1)
    assert report.fused is fuses
    assert fuses or all("masked by pairs of tokens (causal or block by block)" in b.reason for b in report.blocks)


def test_a_causal_mask_made_in_the_graph_is_declined():
    class Causal(Masked):
        def forward(self, x):
            self.mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return super().forward(x)

    with torch.no_grad():
        report = assert_rewrite_sound(Causal(torch.zeros(1)), torch.randn(2, 24, 16), r=4, min_tokens=1)
    assert not report.fused and "causal" in report.blocks[0].reason


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_activation_checkpoints_fuse_with_the_same_gradients(inner):
    gradients = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        model = tiny().train()
        model.set_grad_checkpointing(checkpointed)
        output = fast(model, inner=inner, strict=True)(IMAGES)
        output.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)


def test_dynamic_compilation_is_one_fused_graph():
    model = tiny()
    with torch.no_grad():
        compiled = fast(model, dynamic=True, fullgraph=True, strict=True)
        got = {batch: compiled(IMAGES[:batch].clone()) for batch in (4, 2, 3)}
        assert counters["stats"]["unique_graphs"] == 1
        for batch, result in got.items():
            torch._dynamo.reset()
            torch.testing.assert_close(fast(model)(IMAGES[:batch]), result, atol=1e-5, rtol=1e-5)


def test_a_batch_without_a_hint_fuses():
    model, images = tiny(), IMAGES.clone()
    torch._dynamo.decorators.mark_unbacked(images, 0)
    with torch.no_grad():
        compiled = fast(model, strict=True)(images)
        torch._dynamo.reset()
        torch.testing.assert_close(fast(model)(IMAGES), compiled, atol=1e-5, rtol=1e-5)


def test_each_image_size_of_a_resampling_model_fuses():
    model = tiny(dynamic_img_size=True)
    recorder = Recorder({"r": 8})
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    with torch.no_grad():
        for size in (128, 160):
            assert compiled(torch.randn(1, 3, size, size)).shape == (1, 10)
    assert [[b.tokens_out for b in report.blocks] for report in recorder.reports] == [[65, 57, 49], [101, 93, 85]]


def test_a_model_on_the_meta_device_is_explained():
    model = tiny().to("meta")
    assert mctf_compile.explain(model, torch.empty(2, 3, 96, 96, device="meta"), r=8).removed == 16


def test_a_function_transform_stays_dense():
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, x):
            return torch.func.vmap(lambda image: self.inner(image[None])[0])(x)

    model = Slope()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        torch.testing.assert_close(fast(model)(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)
    assert any("function transform" in str(w.message) for w in caught)


def test_outputs_of_every_kind_keep_their_contract():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, images, scale):
            tokens = self.inner.forward_features(images)
            maps, last = tokens[:, 1:].transpose(1, 2).unflatten(2, (6, 6)), [tokens, {"scaled": tokens * scale}]
            return {"maps": maps, "last": last, "logits": self.inner.forward_head(tokens), "scale": scale}

    with torch.no_grad():
        found = check_rewrite(Many(), IMAGES, torch.tensor(2.0), r=8)
    assert found.problems == [] and found.report.removed == 16


def test_shared_blocks_fuse_at_every_use():
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, images):
            x = self.inner.patch_embed(images)
            for _ in range(3):
                x = self.inner.blocks[0](x)
            return x.mean(1)

    with torch.no_grad():
        report = assert_rewrite_sound(Looped().eval(), repeated_patches(2, 6, 2, 0, 16), r=6)
    assert report.removed == 12


def test_ddp_is_named_with_its_remedy(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wide = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=3, num_classes=10)
        model = nn.parallel.DistributedDataParallel(wide, bucket_cap_mb=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert fast(model)(IMAGES).shape == (4, 10)
        assert any("torch._dynamo.config.optimize_ddp = False" in str(w.message) for w in caught)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp=False):
            assert fast(model, strict=True)(IMAGES).shape == (4, 10)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("attention", ["approx", "exact", "current"])
def test_returned_attention_maps_have_their_original_size(attention):
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))

        def forward(self, x):
            maps = []
            for qkv in self.qkv:
                q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
                maps.append((q @ k.mT / 8**0.5).softmax(-1))
                x = x + (maps[-1] @ v).transpose(1, 2).flatten(2)
                x = x + x.tanh()
            return x, maps

    recorder = Recorder({"r": 6, "min_tokens": 1, "attention": attention, "layers": [0, 1]})
    with torch.no_grad():
        _, maps = recorder.run(Maps(), torch.randn(2, 24, 16))
    assert recorder.reports[0].removed == 12
    for weights in maps:
        assert weights.shape == (2, 2, 24, 24)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 24))


class Marked(nn.Module):
    """Three blocks, after each of which ``use`` changes the tokens by a value of the original ones."""

    def __init__(self, use, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.masked = use, masked
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))

    def forward(self, x, valid):
        side = x
        for qkv in self.qkv:
            q, k, v = qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            mask = valid[:, None, None] if self.masked else None
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            x = self.use(x, valid, side)
        return x


# name: (what is done to the tokens, whether it fuses with valid as the padding mask, whether it fuses without a mask)
MARKS = {
    "the padding": (lambda x, valid, side: x * valid[..., None], True, False),
    "no padding": (lambda x, valid, side: x.masked_fill(~valid[..., None], 0), True, False),
    "a comparison of the original tokens": (lambda x, valid, side: torch.where(side > 0, x, -x), False, False),
    "whole numbers of the original tokens": (lambda x, valid, side: x + (side * 4).long(), False, False),
    "the same for all": (lambda x, valid, side: x * x.new_ones(x.shape[:2], dtype=torch.bool)[..., None], True, True),
    "a comparison of the tokens as they are": (lambda x, valid, side: x * (x > 0), True, True),
}


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize("masked", [True, False])
def test_values_without_a_mean_meet_fused_tokens_only_where_their_members_agree(name, masked):
    use, with_mask, without = MARKS[name]
    generator = torch.Generator().manual_seed(1)
    x, valid = torch.randn(2, 16, 8, generator=generator), torch.rand(2, 16, generator=generator) > 0.4
    recorder = Recorder({"r": 3, "min_tokens": 1})
    with torch.no_grad():
        recorder.run(Marked(use, masked), x, valid)
    report = recorder.reports[0]
    assert (report.removed > 0) == (with_mask if masked else without)
    if not report.removed:
        assert any("may differ in a value of" in line for line in report.unmerged)


class Returning(nn.Module):
    """Three blocks whose attention comes back to the residual stream as ``back`` says."""

    def __init__(self, back) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.back = back

    def forward(self, x):
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            x = self.back(x, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + mlp(x).relu()
        return x.mean(1)


COPIES = {
    "clone": lambda x, y: x.clone().add_(y),
    "contiguous": lambda x, y: y + x.contiguous(),
    "view": lambda x, y: x.view_as(x) + y,
    "copy_": lambda x, y: torch.empty_like(x).copy_(x).add_(y),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("options", [{}, {"method": "tome"}, {"span": "branch"}], ids=str)
def test_a_residual_stream_may_be_copied_before_it_is_added_to(name, options):
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    copying, plain = (Returning(back).double().eval() for back in (COPIES[name], lambda x, y: x + y))
    options = {"r": 4, "min_tokens": 4, "strict": True, **options}
    with torch.no_grad():
        assert_fused_alike(copying, plain, x, **options)
        recorder = Recorder(options)
        recorder.run(copying, x)
    assert recorder.reports[0].removed
