"""Regions of autocast, no_grad and inference mode within a model, and around it: what is emitted anew is in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mctf_compile
from mctf_compile.testing import Recorder
from mctf_compile.testing.soundness import ONLY_SIMILARITY

aten, mctf = torch.ops.aten, torch.ops.mctf
BF16 = torch.bfloat16

# Every token eight times: fused by similarity alone, they leave the output what it is.
TOKENS = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0)).repeat_interleave(8, 1)
OPTIONS = {"r": 4, "min_tokens": 4, "tau_info": 0, "tau_size": 0, "strict": True}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def on() -> AbstractContextManager:
    return torch.autocast("cpu", BF16)


def off() -> AbstractContextManager:
    return torch.autocast("cpu", enabled=False)


class Regions(nn.Module):
    """Three blocks. ``attend`` computes attention of q, k and v; ``block`` and ``mlp`` say what surrounds each."""

    def __init__(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
        block: Callable[[int], AbstractContextManager] = lambda i: nullcontext(),
        mlp: Callable[[int], AbstractContextManager] = lambda i: nullcontext(),
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )
        self.attend, self.around_block, self.around_mlp = attend, block, mlp

    def forward(self, x: Tensor) -> Tensor:
        for i, (qkv, out, mlp) in enumerate(zip(self.qkv, self.out, self.mlp)):
            with self.around_block(i):
                q, k, v = qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
                x = x + out(self.attend(q, k, v).transpose(1, 2).flatten(2))
                with self.around_mlp(i):
                    x = x + mlp(x)
        return x.mean(1)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def float32_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with off():
        return softmax(q.float(), k.float(), v.float())


def float32_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the logits by hand, in a form that autocast does not know."""
    with off():
        logits = torch.einsum("bhnd,bhmd->bhnm", q.float(), k.float())
    return (logits * q.shape[-1] ** -0.5).softmax(-1) @ v


def bfloat16_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An inner region that is on, within one that is off."""
    with off():
        weights = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1)
        with on():
            return weights @ v


def float32_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with off():
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


# Models, with what surrounds them.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], AbstractContextManager]]] = {
    "inside": (partial(Regions, block=lambda i: on()), nullcontext),
    "around": (Regions, on),
    "float32 softmax": (partial(Regions, float32_softmax), on),
    "float32 sdpa": (partial(Regions, float32_sdpa), on),
    "float32 logits": (partial(Regions, float32_logits), on),
    "nested": (partial(Regions, bfloat16_product), on),
    "some blocks": (partial(Regions, block=lambda i: on() if i % 2 else nullcontext()), nullcontext),
    "not in some blocks": (partial(Regions, softmax, block=lambda i: off() if i % 2 else nullcontext()), on),
    "float32 mlp": (partial(Regions, mlp=lambda i: off()), on),
    "mlp alone": (partial(Regions, softmax, mlp=lambda i: on()), nullcontext),
    "inside, off in the mlp": (partial(Regions, block=lambda i: on(), mlp=lambda i: off()), nullcontext),
}


def compiled(model: nn.Module, inner: str = "eager", **options: object) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, backend="mctf", options={**OPTIONS, "inner": inner, **options}, fullgraph=True)


@pytest.mark.parametrize(("inner", "kernels"), [("eager", "aten"), ("aot_eager", "auto")])
@pytest.mark.parametrize("name", MODELS)
def test_fusing_duplicates_changes_nothing_but_the_rounding(name: str, inner: str, kernels: str) -> None:
    make, around = MODELS[name]
    model = make().eval()
    with torch.no_grad(), around():
        dense, got = model(TOKENS), compiled(model, inner, kernels=kernels)(TOKENS)
    assert got.dtype is dense.dtype
    torch.testing.assert_close(got, dense, rtol=0, atol=2**-7)


@pytest.mark.parametrize(
    ("inner", "name"), [*(("eager", name) for name in MODELS), ("aot_eager", "inside"), ("aot_eager", "nested")]
)
def test_gradients_are_those_of_the_dense_model(inner: str, name: str) -> None:
    make, around = MODELS[name]
    grads = []
    for run in (lambda model: model, lambda model: compiled(model, inner)):
        model = make().train()
        with around():
            y = run(model)(TOKENS)
        y.float().square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, dense in grads[0].items():
        torch.testing.assert_close(grads[1][name], dense, rtol=0, atol=2**-6 * dense.abs().max().item(), msg=name)


def constant_map(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v


def detached_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(q, k.detach(), v)


def enabled_within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        logits = q @ k.mT * q.shape[-1] ** -0.5
        with torch.enable_grad():
            return logits.softmax(-1) @ v


CONSTANTS: dict[str, Callable[[], nn.Module]] = {
    "map": partial(Regions, constant_map),
    "keys": partial(Regions, detached_keys),
    "enabled within": partial(Regions, enabled_within),
    "block": partial(Regions, block=lambda i: torch.no_grad() if i == 1 else nullcontext()),
    "mlp": partial(Regions, softmax, mlp=lambda i: torch.no_grad() if i == 1 else nullcontext()),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_has_no_gradient_in_the_model_has_none_where_it_is_computed_anew(name: str) -> None:
    grads = []
    for run in (lambda model: model, compiled):
        model = CONSTANTS[name]().train()
        run(model)(TOKENS).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, dense in grads[0].items():
        got = grads[1][parameter]
        assert (got is None) == (dense is None), parameter
        if dense is not None:
            torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-5 * dense.abs().max().item(), msg=parameter)


class Tabled(nn.Module):
    """Three blocks on tokens with a table of positions, the second attention without gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(1, 3, 16).repeat(1, 8, 1) / 2)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table
        for i, qkv in enumerate(self.qkv):
            with torch.no_grad() if i == 1 else nullcontext():
                q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
                y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + y
            x = x + F.gelu(x)
        return x.tanh().mean(1)


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_a_table_of_positions_are_those_of_all_copies(seed: int) -> None:
    """Of copies together: how a token hands its gradient on to its members is up to the pooling weights."""
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed)).repeat(1, 8, 1)

    def gradient(run: Callable, dtype: torch.dtype) -> Tensor:
        model = Tabled().to(dtype)
        run(model, x.to(dtype)).square().sum().backward()
        return model.table.grad.double().unflatten(1, (8, 3)).sum(1)

    recorder = Recorder({"r": 6, "min_tokens": 1, **ONLY_SIMILARITY})
    exact = gradient(lambda model, x: model(x), torch.float64)
    assert (gradient(recorder.run, torch.float32) - exact).norm() < 1e-4 * exact.norm()
    assert recorder.reports[0].removed == 12 and recorder.largest_gap < 1e-5


class Dropped(Regions):
    """Behind the blocks an operator that makes a number of its own, which no fake mode sees made."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        with on():
            return x + aten.feature_alpha_dropout(x, 1.0, True)


class Bilinear(nn.Module):
    """Its kernel calls for products, which autocast casts where no tracer sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Regions()
        self.form = nn.Bilinear(32, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        with on():
            y = self.form(x, x)
        return self.model(x) + y.mean(1)


def test_what_a_kernel_casts_within_is_left_to_it() -> None:
    model = Bilinear().eval()
    options = {**OPTIONS, "strict": False, "inner": "eager"}
    report = mctf_compile.explain(model, TOKENS, **options)
    assert not report.fused and "bilinear.default runs under autocast in a way that" in str(report.reason)
    with torch.no_grad():
        compiled = torch.compile(model, backend="mctf", options=options, dynamic=False)
        assert torch.equal(compiled(TOKENS), model(TOKENS))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose queries and keys were normed in float32; it makes numbers of its own of a boolean mask."""
    return F.scaled_dot_product_attention(
        q.float(), k.float(), v, attn_mask=torch.ones_like(k[..., 0]).bool()[:, :, None]
    )


@pytest.mark.parametrize("model", [Dropped(), Regions(masked, block=lambda i: on())], ids=["dropped", "masked"])
def test_an_operator_that_makes_a_number_of_its_own_is_followed(model: nn.Module) -> None:
    with torch.no_grad():
        got = torch.compile(model.eval(), backend="mctf", options={**OPTIONS, "inner": "eager"}, dynamic=False)(TOKENS)
        expected = model(TOKENS)
    assert (got - expected).norm() <= 2e-2 * expected.norm()
