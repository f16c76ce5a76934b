"""Every rule against the multiset: on fused duplicates an operator gives what it gives on all the copies."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mctf_compile.passes.rules import RULES, find_rule
from mctf_compile.testing import Recorder
from mctf_compile.testing.soundness import ONLY_SIMILARITY, assert_fused_alike

ops = torch.ops.mctf
B, N, C = 2, 16, 8
W = torch.randn(C, C, generator=torch.Generator().manual_seed(1))
# Of a depthwise kernel, the middle alone.
CENTER = F.pad(torch.rand(C, 1, 1, 1), (1, 1, 1, 1))
HALF = torch.randn(1, N, C // 2, generator=torch.Generator().manual_seed(1))


def heads(x: Tensor) -> Tensor:
    return x.reshape(B, -1, 2, C // 2).transpose(1, 2)


def attend(*lead: int):
    """Attention over the tokens with these dimensions before N and D."""

    def program(x: Tensor) -> Tensor:
        q = x.unflatten(2, (lead[-1], -1)).transpose(1, 2) if len(lead) > 1 else x
        q = q.unsqueeze(2) if len(lead) == 3 else q
        q = q.reshape(-1, *q.shape[-2:]) if lead == (B * 2,) else q
        return F.scaled_dot_product_attention(q, q, q).sum(-1)

    return program


def nans(x: Tensor) -> Tensor:
    return x.masked_fill(x > 1, float("nan"))


def grid(x: Tensor) -> Tensor:
    return x.reshape(B, 4, 4, C)


def image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(B, C, 4, 4)


def with_class_token(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(B, 1, C), x], 1)


def complex_turn(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.reshape(B, N, C // 2, 2).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones(C // 2), torch.arange(C // 2).float())).flatten(2)


# name: a program on tokens x [B, N, C]
FUSED = {
    "gelu": F.gelu,
    "arithmetic": lambda x: x * 2 + x.abs().clamp(max=1) - x / 3,
    "where": lambda x: torch.where(x > 0, x, -x).masked_fill(x > 1, 0.5),
    "casts": lambda x: x.double().float().contiguous().clone().type_as(x),
    "a written class token": lambda x: torch.select_scatter(with_class_token(x), torch.zeros(B, C), 1, 0),
    "all written but it": lambda x: torch.slice_scatter(with_class_token(x), 2 * x, 1, 1),
    "it as a slice": lambda x: torch.slice_scatter(with_class_token(x), torch.zeros(B, 1, C), 1, 0, 1),
    "written channels": lambda x: torch.slice_scatter(x, x[..., :3] * 2, -1, 2, 5).select_scatter(x[..., 0], -1, 1),
    "new tensors": lambda x: x + torch.zeros_like(x) + x.new_ones(1),
    "linear": lambda x: F.linear(x, W),
    "layer norm": lambda x: F.layer_norm(x, (C,)),
    "layer norm and its statistics": lambda x: torch.native_layer_norm(x, (C,), None, None, 1e-5)[0],
    "rms norm": lambda x: F.rms_norm(x, (C,)),
    "glu": lambda x: F.glu(x, -1),
    "batch norm": lambda x: F.batch_norm(x.transpose(1, 2), torch.ones(C), torch.ones(C)).transpose(1, 2),
    "batch norm of images times tokens": lambda x: F.batch_norm(x.flatten(0, 1), torch.ones(C), torch.ones(C)),
    "1x1 convolution": lambda x: F.conv2d(image(x), W[:, :, None, None]).flatten(2),
    "mean": lambda x: x.mean(1),
    "mean over everything": lambda x: x.mean((1, 2)),
    "mean over the grid": lambda x: grid(x).mean((1, 2)),
    "sum": lambda x: x.sum(1, keepdim=True) * x,
    "sum of true and false": lambda x: (x > 0).sum(1),
    "sum of true and false over everything": lambda x: (x > 0).sum(),
    "sum of whole numbers": lambda x: (x * 8).long().sum(1),
    "sum as another dtype": lambda x: (x > 0).sum(1, dtype=torch.float64) + (x * 8).sum(1, dtype=torch.int32),
    "count": lambda x: (x > 0).count_nonzero(1) + (x > 0).float().count_nonzero((0, 1)),
    "masked mean": lambda x: (x * (x > 0)).sum(1) / (x > 0).sum(1).clamp(min=1),
    "sum of numbers alone": lambda x: nans(x).nansum(1) + nans(x).nanmean(1),
    "variance": lambda x: x.var(1),
    "variance and mean": lambda x: sum(torch.var_mean(x, 1)) + sum(torch.std_mean(x, 1, correction=0)),
    "standard deviation": lambda x: x.std((1,), correction=0),
    "maximum": lambda x: x.amax(1) + x.amin((1,)),
    "maximum of everything": lambda x: x * x.max() + x.aminmax().min,
    "maximum without its position": lambda x: x.max(1).values - x.min(1, keepdim=True).values,
    "any": lambda x: (x > 1).any(1) & ~(x > -1).all(1) | (x > 0)[..., :1].any(1),
    "euclidean norm": lambda x: x.norm(dim=1),
    "norm of order 3": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
    "norm of order 0": lambda x: torch.linalg.vector_norm(x.relu(), 0, dim=1) + x.relu().norm(0, 1),
    "norm of order -1": lambda x: torch.linalg.norm(x.abs() + 1, -1, dim=1),
    "norm of order inf": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
    "normalize over tokens": lambda x: F.normalize(x, dim=1),
    "logsumexp": lambda x: x.logsumexp(1),
    "log softmax": lambda x: x.log_softmax(1),
    "softmax as weights": lambda x: (x[..., :1].softmax(1) * x).sum(1),
    "softmax contracted": lambda x: x.softmax(1).transpose(1, 2) @ x,
    "average pooling to one": lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1),
    "average pooling of the grid": lambda x: F.adaptive_avg_pool2d(image(x), 1),
    "matmul": lambda x: x.transpose(1, 2) @ x,
    "bmm": lambda x: torch.bmm(x.mT, x),
    "baddbmm": lambda x: torch.baddbmm(torch.ones(B, C, C), x.mT, x, beta=0.5, alpha=2),
    "einsum": lambda x: torch.einsum("bnc,bnd->bcd", x, x),
    "einsum with an ellipsis": lambda x: torch.einsum("...nc,...nd->...cd", x, x),
    "linear attention": lambda x: torch.einsum("bnc,bcd->bnd", x, torch.einsum("bnc,bnd->bcd", x.exp(), x)),
    "cross-covariance": lambda x: (F.normalize(x.mT, dim=-1) @ F.normalize(x, dim=1)).softmax(-1) @ x.mT,
    "attention, heads apart": attend(B, 2),
    "attention, one head": attend(B),
    "attention, heads joined": attend(B * 2),
    "attention, two dimensions of heads": attend(B, 1, 2),
    "attention with a key mask": lambda x: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x), (x[..., 0] > 0)[:, None, None]
    ),
    "attention with a bias": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), torch.ones(N, N)),
    "binary attention": lambda x: ops.binary_attention(heads(x), heads(x).roll(1, -1), heads(x)),
    "a convolution that sees no neighbour": lambda x: ops.neighbours(heads(x), CENTER, 0, 4, 4),
    "a layer with two weights": lambda x: ops.routed_linear(x, x[..., 0] > x[..., 1], W, None, W.flip(0), None),
    "attention of one head with one number": lambda x: F.scaled_dot_product_attention(x, x, x, W[0, 0]),
    "linalg matmul": lambda x: torch.linalg.matmul(x.mT, x),
    "maximum of the grid": lambda x: F.adaptive_max_pool2d(image(x), 1) + F.adaptive_max_pool1d(x.mT, 1)[..., None],
    "cat by name": lambda x: torch.hstack((torch.ones(B, 1, C), x)) + torch.column_stack((torch.ones(B, 1, C), x)),
    "reshape": lambda x: x.reshape(B * N, C).view(B, N, 2, 4).flatten(2).unflatten(2, (4, 2)),
    "transposes": lambda x: x.permute(1, 0, 2).swapaxes(0, 1).movedim(1, 2).mT.squeeze().unsqueeze(0)[0],
    "expand": lambda x: x[:, :, None].expand(-1, -1, 3, -1).sum(2) + x.mean(1, keepdim=True).expand_as(x),
    "repeat channels": lambda x: x.repeat(1, 1, 2) + x.tile(1, 1, 2),
    "repeat interleaved": lambda x: x.repeat_interleave(2, dim=2),
    "complex numbers": complex_turn,
    "pad channels": lambda x: F.pad(x, (1, 2)),
    "stack": lambda x: torch.stack([x, -x], 1),
    "cat of channels": lambda x: torch.cat([x, x], -1),
    "chunk of channels": lambda x: sum(x.chunk(2, -1)) + sum(x.split(4, 2)) + x.unflatten(2, (2, 4)).unbind(2)[0],
    "slice of channels": lambda x: x[..., 2:5] + x.narrow(2, 0, 3),
    "all tokens as a slice": lambda x: x[:, :N] + x[:, -N:] + x.narrow(1, 0, N),
    "selected channel": lambda x: x[..., 3],
    "channels sorted": lambda x: x.sort(-1).values + x.cumsum(2) + x.flip(2),
    "channels chosen": lambda x: x.topk(3).values + x.topk(3, 2, largest=False).values,
    "slopes of channels": lambda x: F.prelu(x.mT, torch.ones(C) / 3),
    "compared with the mean": lambda x: F.cosine_similarity(x, x.mean(1, keepdim=True), dim=-1),
    "two parts of a number": lambda x: torch.frexp(x)[0],
    "distances": lambda x: torch.cdist(x, W),
    "two vectors multiplied": lambda x: F.bilinear(x, x, W[None].expand(C, C, C)) + torch.tensordot(x, W, dims=1),
    "channels read": lambda x: x[..., [3, 1]] + x.index_select(2, torch.tensor([0, 2])),
    "a channel of each": lambda x: x.gather(2, x.argmax(2, keepdim=True)) + x.take_along_dim(x.argsort(2), 2),
    "codes": lambda x: F.one_hot(x.argmax(-1), C) + W[x.argmax(-1)],
    "median of channels": lambda x: x.quantile(0.5, -1) + x.nanquantile(0.3, 2),
    "special functions": lambda x: torch.special.erf(x) + torch.special.xlogy(x, x.abs() + 1),
    "stacked channels": lambda x: torch.dstack((x, -x)),
    "hermitian": lambda x: x.mH.mH,
    "a table of two": lambda x: x * torch.outer(torch.ones(N), W[0]) + x @ W.tril(),
    "channel maxima": lambda x: x.max(-1).values + x.prod(-1),
}

# name: (program, the reason for which the original tokens come back first)
UNMERGED = {
    "cumsum": (lambda x: x.cumsum(1), "cumsum mixes the original tokens"),
    "flip": (lambda x: x.flip(1), "flip mixes the original tokens"),
    "order among images": (lambda x: x.roll(1, 0), "roll mixes the images of a batch"),
    "softmax over images": (lambda x: x.softmax(0), "attention within windows|softmax mixes the images of a batch"),
    "images compared": (lambda x: torch.einsum("anc,bnd->abcd", x, x), "the images of a batch meet one another"),
    "numbers for each token": (lambda x: x + torch.rand_like(x) * 0, "rand_like draws a number for each"),
    "product": (lambda x: (x > 0).prod(1), "prod mixes the original tokens"),
    "a norm of matrices": (lambda x: torch.linalg.norm(x, 1, (1, 2)), "a norm of matrices over the tokens"),
    "token mixing": (lambda x: F.linear(x.mT, torch.ones(N, N)), "a linear layer over the tokens mixes"),
    "neighbours": (lambda x: F.avg_pool2d(image(x), 3, 1, 1) + F.max_pool2d(image(x), 3, 1, 1), "avg_pool2d mixes"),
    "a finer grid": (lambda x: F.interpolate(image(x), scale_factor=2), "upsample_nearest2d mixes"),
    "convolution": (lambda x: F.conv2d(image(x), torch.ones(4, C, 3, 3)), "a 3×3 convolution mixes"),
    "windows": (lambda x: x.reshape(B, 4, 4, C).mean(2), "a part of the token axis"),
    "a written token": (lambda x: x.select_scatter(x[:, 0], 1, 5), "position 5 of the token axis is written to"),
    "written by others": (lambda x: x.slice_scatter(x.flip(1), 1), "flip mixes the original tokens"),
    "every other written": (lambda x: x.slice_scatter(x[:, :1].expand(-1, N // 2, -1), 1, 0, N, 2), "with a stride"),
    "a token by number": (lambda x: x[:, 5], "position 5 of the token axis is read"),
    "stride": (lambda x: x[:, ::2], "mixes the original tokens|stride"),
    "group norm": (lambda x: F.group_norm(x.mT, 2), "group_norm mixes the original tokens"),
    "no rule": (lambda x: torch.fft.rfft(x).real, "fft_rfft has no rule for fused tokens"),
    "embedding of positions": (lambda x: F.embedding(x.argmax(1), torch.ones(N, C)), "argmax mixes"),
    "attention within rows": (lambda x: attend(x.reshape(B, 4, 4, C)), "rows and columns of the token grid"),
    "attention within columns": (
        lambda x: attend(x.reshape(B, 4, 4, C).transpose(1, 2)),
        "the tokens are reshaped",
    ),
    "beside a grid": (
        lambda x: torch.cat([x - x[:, :1], grid_of_ones()], 0),
        "together with positions that are numbered",
    ),
    "times a grid": (lambda x: (x - x[:, :1]).mT @ grid_of_ones(), "together with positions that are numbered"),
    "index of the maximum": (lambda x: x.max(1).indices, "position of the max among the original tokens is read"),
}


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.flip(-1), x)


def grid_of_ones() -> Tensor:
    """[B, N, C] made of a grid: of these positions the first cannot be told from the others, as that of tokens can."""
    return torch.ones(B, C, 4, 4).flatten(2).mT


class After(nn.Module):
    """One attention block, and a program on its tokens."""

    def __init__(self, program) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.program = nn.Linear(C, 3 * C), program

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        return self.program(x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def run(program):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(B, 3, C, generator=generator)
    which = torch.randint(0, 3, (B, N), generator=generator)
    x = torch.stack([kind[index] for kind, index in zip(kinds, which)])
    model = After(program)
    recorder = Recorder({"r": 4, "layers": [0], "min_tokens": 1, **ONLY_SIMILARITY})
    with torch.no_grad():
        dense, fused = model(x), recorder.run(model, x)
    assert recorder.largest_gap < 1e-5, "only exact duplicates are fused"
    torch.testing.assert_close(fused, dense, atol=1e-5, rtol=1e-5)
    return recorder.reports[0]


@pytest.mark.parametrize("name", FUSED)
def test_an_operator_runs_on_fused_tokens(name):
    report = run(FUSED[name])
    assert report.removed == 4 and report.unmerged == []


@pytest.mark.parametrize("name", UNMERGED)
def test_an_operator_gets_the_original_tokens(name):
    program, reason = UNMERGED[name]
    report = run(program)
    lines = report.unmerged + [b.reason or "" for b in report.blocks]
    assert any(re.search(reason, line) for line in lines), lines


def narrow_errors(program, dtype: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor]:
    """How far a program in a narrow dtype is from float64, fused and dense, at most."""
    with torch.no_grad():
        exact = After(program).to(dtype).double()(x.double())
        recorder = Recorder({"r": 4, "layers": [0], "min_tokens": 1, **ONLY_SIMILARITY})
        fused, dense = recorder.run(After(program).to(dtype), x), After(program).to(dtype)(x)
    assert recorder.reports[0].removed == 4 and recorder.reports[0].unmerged == []
    return tuple((result - exact).abs().amax() for result in (fused, dense))


def few_kinds(scale: float, dtype: torch.dtype) -> Tensor:
    kinds = torch.randn(B, 3, C, generator=torch.Generator().manual_seed(0)) * scale
    return kinds[:, torch.arange(N) % 3].to(dtype)


LARGE = 30000
PRODUCTS = {
    "matmul": lambda x: x.softmax(1).mT @ (x.clamp(-1, 1) * LARGE),
    "bmm": lambda x: torch.bmm(x.softmax(1).mT, x.clamp(-1, 1) * LARGE),
    "baddbmm": lambda x: torch.baddbmm(x.mean(1)[:, :, None], x.softmax(1).mT, x.clamp(-1, 1) * LARGE),
    "einsum": lambda x: torch.einsum("bnc,bnd->bcd", x.softmax(1), x.clamp(-1, 1) * LARGE),
    "small factor": lambda x: (x.clamp(-1, 1) * LARGE).mT @ (x * 1e-4),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_sizes_do_not_overflow_float16(name):
    fused, dense = narrow_errors(PRODUCTS[name], torch.float16, few_kinds(1, torch.float16))
    assert dense.isfinite() and fused <= 2 * dense


# Of each image and token, whatever the token is.
SIDE = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(2))
MET = {
    "matmul": lambda x: SIDE.mT @ x,
    "bmm": lambda x: torch.bmm(x.mT, SIDE),
    "einsum": lambda x: torch.einsum("bnk,bnc->bkc", SIDE, x),
}


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("name", MET)
def test_what_copies_are_multiplied_by_is_summed(name, pooling):
    """It is no token, so its largest number stands for none of them."""
    x = few_kinds(1, torch.float32)
    recorder = Recorder({"r": 4, "layers": [0], "min_tokens": 1, "pooling": pooling, **ONLY_SIMILARITY})
    with torch.no_grad():
        fused, dense = recorder.run(After(MET[name]), x), After(MET[name])(x)
    assert recorder.reports[0].removed == 4 and recorder.reports[0].unmerged == []
    torch.testing.assert_close(fused, dense, atol=1e-5, rtol=1e-5)


def test_every_family_of_rules_is_tested_here():
    seen = set()
    for program in [*FUSED.values(), *(p for p, _ in UNMERGED.values())]:
        graph = make_fx(program, pre_dispatch=True)(torch.randn(B, N, C)).graph
        seen |= {rule.axes for n in graph.nodes if n.op == "call_function" and (rule := find_rule(n.target))}
    missing = {rule.axes.__name__ for rule in RULES.values()} - {axes.__name__ for axes in seen}
    assert missing == set()


class Biased(nn.Module):
    """Two blocks of attention with a class token and a bias; ``heads``: [B, H, N, D] or, of one head, [B, N, D]."""

    def __init__(self, bias: Tensor, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(C, 3 * C, dtype=torch.float64) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(C, C, dtype=torch.float64) for _ in range(2))
        self.bias, self.heads = nn.Buffer(bias), heads

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.ones(B, 1, C, dtype=x.dtype), x], 1)
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = qkv(x).chunk(3, -1)
            if self.heads:
                q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, self.bias)
            x = x + (y.transpose(1, 2).flatten(2) if self.heads else y)
            x = x + mlp(x).relu()
        return x


@pytest.mark.parametrize(
    "options", [{"method": "evit", "keep_rate": 0.7}, {"r": 4}, {"method": "tome", "r": 4}], ids=str
)
@pytest.mark.parametrize(
    ("shape", "heads"),
    # With heads, PyTorch takes none of fewer than two dimensions.
    [((), 0), ((N + 1,), 0), *(((n, N + 1), heads) for n in (1, N + 1) for heads in (0, 2))],
    ids=str,
)
def test_a_bias_may_have_any_number_of_dimensions(shape: tuple[int, ...], heads: int, options: dict) -> None:
    """Fewer dimensions are what PyTorch makes of them: the same for all images and heads."""
    bias = 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = bias.expand(*[1] * (1 + bool(heads)), N + 1, N + 1).clone()
    x = torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options = {**options, "layers": [1], "strict": True}
    with torch.no_grad():
        assert_fused_alike(Biased(bias, heads), Biased(whole, heads), x, **options)
        recorder = Recorder({**options})
        recorder.run(Biased(bias, heads), x)
    assert recorder.reports[0].removed
