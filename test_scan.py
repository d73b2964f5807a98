"""test_scan.py: why you may believe the rest.

    python test_scan.py                all tests, in a minute or two on one core
    python test_scan.py padding zoh    those whose name has one of these words
    pytest test_scan.py                the same, for those who have pytest

The name of each test is a sentence, and its lines check whether the sentence is true. The
docstring says which bugs would make it false, and `close` prints the error that was found
beside the one that is allowed.

First the mathematics: two steps by hand, the equation against every faster way to compute
it, and what follows from the equation. Then the models, the training scripts, and what
happens on bad days. Each part imports what it tests, in the order in which one reads the
files. So after s6.py read as far as "block.py", and the rest when you have read what it
tests.
"""
import contextlib
import copy
import csv
import functools
import importlib.util
import io
import itertools
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import s6
from s6 import S6, definition, selective_scan

# Work this small gains nothing from a second thread. Where other programs keep the cores
# busy, threads that wait for each other make it a hundred times slower.
torch.set_num_threads(1)


# --------------------------------------------------------------------------------------------------
# How things are compared, and what they are tried on.

def error(ours, exact):
    """The largest difference over the largest value; of lists, the worst of their entries."""
    if isinstance(ours, (list, tuple)):
        errors = [error(*pair) for pair in zip(ours, exact, strict=True)]
        return torch.tensor([0.0, *errors]).max().item()   # Python's max may lose a NaN
    ours = torch.as_tensor(ours).detach()
    exact = torch.as_tensor(exact).detach()
    assert ours.shape == exact.shape, f"{tuple(ours.shape)} instead of {tuple(exact.shape)}"
    if ours.numel() == 0:
        return 0.0
    difference = (ours * 1.0 - exact).abs().double().max()
    largest = exact.abs().double().max()
    return (difference / largest.clamp(min=1e-30)).item()


def close(what, ours, exact, allowed=0.0):
    """Print the error, and compare it. Allowed 0: equal to the last bit."""
    found = error(ours, exact)
    print(f"    {what:60s} {found:.1e}  allowed {allowed:.0e}")
    assert found <= allowed, f"{what}: {found:.1e}"


def refuses(call, *words, kind=ValueError):
    """call() raises that kind of error, and its text has these words. A ValueError has one line."""
    try:
        call()
    except kind as problem:
        message = str(problem)
    else:
        raise AssertionError(f"no {kind.__name__} that says {words}")
    print(f"    {message[:90]}")
    for word in words:
        assert str(word) in message, (word, message)
    assert kind is not ValueError or "\n" not in message, message


def inputs(l=7, dtype=torch.float64, b=2, d=3, n=4):
    """x, Δ, A, B, C, D, h0 at random, as in the glossary, with gradients."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = [
        normal(b, l, d),                     # x
        F.softplus(normal(b, l, d) - 1),     # Δ
        -0.1 - normal(d, n).abs(),           # A
        normal(b, l, n),                     # B
        normal(b, l, n),                     # C
        normal(d),                           # D
        normal(b, d, n),                     # h0
    ]
    return [t.to(dtype).requires_grad_() for t in tensors]


EXACT = {}     # EXACT["zoh"](x, Δ, A, B, C, D, h0) -> y, last state, by the definition
SCANS = {}     # SCANS["parallel, zoh"](…): the same by selective_scan
for rule in s6.DISCRETIZATIONS:
    EXACT[rule] = functools.partial(definition, discretization=rule)
    for method in ("sequential", "parallel"):
        SCANS[f"{method}, {rule}"] = functools.partial(
            selective_scan, method=method, discretization=rule, return_state=True)


def everything(scan, tensors):
    """y, the last state, and the gradients of all tensors that ask for one.

    The loss weighs every output at random: in a plain sum, errors could cancel.
    """
    outputs = scan(*tensors)
    g = torch.Generator().manual_seed(1)
    loss = 0.0
    for t in outputs:
        weights = torch.randn(t.shape, generator=g, dtype=torch.float64)
        loss = loss + (t * weights.to(t.dtype)).sum()
    asked = [t for t in tensors if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(loss, asked) if asked else []
    return [*outputs, *gradients]


@functools.lru_cache
def by_definition(l, rule):
    """What `everything` gives for the definition, at length l; its gradients are autograd's."""
    return everything(EXACT[rule], inputs(l))


# --------------------------------------------------------------------------------------------------
# s6.py: the scan computes its equation.
#
# The chain of trust: two steps that a person can check with a pencil; then `definition`,
# which is the equation word for word; then the loops, with their gradients derived by hand,
# at lengths that end with a chunk or just after one. In float64 they must agree to 1e-13, far
# below what a wrong term would change. In float32 some rounding is allowed.

def test_two_steps_come_out_as_by_hand():
    """Catches: reading the state before it is updated, a decay applied to the new input."""
    def column(*values):
        return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)

    x = column(2, 3)                         # (1, 2, 1): a sequence, two tokens, one channel
    delta = column(0.5, 1)                   # (1, 2, 1)
    A = column(-math.log(2))[0]              # (1, 1): at Δ = 1 half of the state stays
    B = column(1, -1)                        # (1, 2, 1)
    C = column(10, 100)                      # (1, 2, 1)
    D = column(7)[0, 0]                      # (1,)
    # h_1 = 0 + 0.5·1·2 = 1                             y_1 = 10·1 + 7·2 = 24
    # h_2 = exp(-ln 2)·1 + 1·(-1)·3 = 0.5 - 3 = -2.5    y_2 = 100·(-2.5) + 7·3 = -229
    by_hand = column(24, -229), column(-2.5)
    for name, scan in (EXACT | SCANS).items():
        if "euler" in name:
            close(f"{name}: y and h", scan(x, delta, A, B, C, D), by_hand, 1e-15)


def test_every_scan_has_the_outputs_and_gradients_of_the_definition():
    """Catches: a chunk one token short, a lost term of the gradient."""
    lengths = 1, 2, 3, 5, 7, 64, 100, 257
    for name, scan in SCANS.items():
        exact = [by_definition(l, scan.keywords["discretization"]) for l in lengths]
        for dtype, allowed in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
            ours = [everything(scan, inputs(l, dtype)) for l in lengths]
            close(f"{name}, {dtype}: 1 … 257 tokens", ours, exact, allowed)


def test_in_any_number_of_pieces_it_is_the_same_scan():
    """Catches: an empty piece, a last piece that is short; long pieces on a GPU."""
    # The best number of pieces depends on the machine; the result must not. 37 tokens in 5
    # pieces are 5 times 8, the last three of them padding; of 18 pieces of 3, five are empty.
    for rule, l in itertools.product(s6.DISCRETIZATIONS, (2, 17, 37)):
        for k in {min(k, l) for k in (1, 2, 3, 5, 18, 37)}:
            with patch.object(s6, "_pieces", lambda *_: k):
                ours = everything(SCANS[f"parallel, {rule}"], inputs(l))
            close(f"{rule}: {l} tokens in {k} pieces", ours, by_definition(l, rule), 1e-13)
    # On a GPU each token of a piece costs 27 launches. So pieces are about log₂ l long.
    for l in (49, 784, 2048, 65536):
        k = s6._pieces(torch.empty(1, l, 8, device="meta"), 16, "auto")
        print(f"    on a GPU {l} tokens are cut into {k} pieces")
        assert l / k < 1.1 * math.log2(l) + 3


def test_gradcheck_knows_no_equation_and_agrees():
    """Catches: a gradient that does not belong to what the loops compute."""
    # Without the definition: gradcheck moves each number a little, and looks at y and h.
    for name, scan in SCANS.items():
        assert torch.autograd.gradcheck(scan, inputs(5, d=2, n=2))
        print(f"    {name}: all seven arguments")


def test_the_gradient_of_the_gradient_is_right_or_refused():
    """Catches: a second derivative that is silently wrong."""
    # Autograd does not see the loops that compute the gradient. It would take the gradient for
    # a constant. One token is the recurrence once, without a loop.
    tensors = inputs()
    loss = selective_scan(*tensors).sum()
    refuses(lambda: torch.autograd.grad(loss, tensors, create_graph=True),
            "first derivative only", kind=RuntimeError)
    for scan in SCANS.values():
        assert torch.autograd.gradgradcheck(scan, inputs(1, b=1, d=2, n=2))


# --------------------------------------------------------------------------------------------------
# What follows from the equation, whoever computes it.
#
# The scan can be cut and continued. Without selection it is a convolution. With n = 1, A = -1,
# B = C = 1 and zero-order hold it is a gated RNN. Δ = 0 keeps the state, a large Δ forgets it.

def test_a_sequence_cut_anywhere_and_continued_is_the_whole():
    """Catches: a last state taken from padding, h0 ignored by a method."""
    x, delta, A, B, C, D, h0 = inputs(37)
    for name, scan in SCANS.items():
        whole = scan(x, delta, A, B, C, D, h0)
        parts = []
        for cut in range(38):                # the first and the last: a part without tokens
            y1, h = scan(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, h0)
            y2, h = scan(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, h)
            parts.append((torch.cat([y1, y2], 1), h))
        close(f"{name}: all 38 cuts of 37 tokens", parts, 38 * [whole], 1e-14)


def test_without_selection_the_scan_is_a_convolution_and_with_it_it_is_not():
    """Catches: a scan that is a convolution after all.

    y_t = Σ_{s ≤ t} M_ts x_s with M_ts = C_t exp(A (Δ_{s+1} + … + Δ_t)) B̄_s. If Δ, B and C are
    constant, M depends on t - s alone: its diagonals are constant, and y is a convolution.
    """
    x, delta, A, B, C, _, _ = inputs(12)
    for selects in (True, False):
        if not selects:
            delta, B, C = [t[:, :1].expand_as(t) for t in (delta, B, C)]
        total = delta.cumsum(1)
        between = total.unsqueeze(2) - total.unsqueeze(1)      # (b, t, s, d)
        decay = torch.exp(between.unsqueeze(-1) * A)           # (b, t, s, d, n)
        B_bar = delta.unsqueeze(-1) * B.unsqueeze(2)           # (b, s, d, n)
        # Only s ≤ t is in the sum: tril drops the rest.
        M = torch.einsum("btn,btsdn,bsdn->bdts", C, decay, B_bar).tril()
        y = torch.einsum("bdts,bsd->btd", M, x)
        close(f"selection {selects}: y = M x", selective_scan(x, delta, A, B, C), y, 1e-13)
        varies = error(M[..., 1:, 1:], M[..., :-1, :-1])
        print(f"    the diagonals of M vary by {varies:.1e}")
        assert (varies > 1e-14) == selects


def test_theorem_1_with_one_number_per_state_S6_is_a_gated_RNN():
    """Catches: zero-order hold in name only; and says why Δ is called a gate.

    n = 1, A = -1, B = C = 1, Δ = softplus(p): h_t = (1 - g_t) h_{t-1} + g_t x_t, g = σ(p).
    That is zero-order hold. Under Euler x_t weighs softplus(p), without bound.
    """
    x, p, *_ = inputs()
    p = 9 * p - 4                            # gates from nearly shut to nearly open
    delta = F.softplus(p)
    gate = torch.sigmoid(p)
    A = -torch.ones(3, 1).double()
    one = torch.ones(2, 7, 1).double()
    h = torch.zeros(2, 3)
    states = []
    for t in range(7):
        h = (1 - gate[:, t]) * h + gate[:, t] * x[:, t]
        states.append(h)
    y = selective_scan(x, delta, A, one, one, discretization="zoh")
    close("zoh: S6 is the gated RNN", y, torch.stack(states, 1), 1e-14)
    y = selective_scan(x, delta, A, one, one)
    close("euler: the first token weighs Δ", y[:, 0], (delta * x)[:, 0], 1e-14)


def test_delta_zero_keeps_and_delta_infinite_forgets():
    """Catches: Δ in the wrong place; a division by a product of decays, which underflows."""
    # Δ = 0 is how padding is masked, so it must hold to the last bit. At Δ = 10⁴ the decay
    # is zero in any dtype. With x = 0 besides, as at a separator of documents, nothing of
    # the first document is left.
    x, delta, A, B, C, D, h0 = inputs(20, torch.float32)
    separator = torch.arange(20).view(20, 1) == 10
    x = x.masked_fill(separator, 0)
    jump = delta.masked_fill(separator, 1e4)
    for name, scan in SCANS.items():
        _, h = scan(x, 0 * delta, A, B, C, D, h0)
        close(f"{name}: h after 20 tokens with Δ = 0", h, h0)
        y, h = scan(x, jump, A, B, C, D, h0)
        alone = scan(x[:, 11:], jump[:, 11:], A, B[:, 11:], C[:, 11:], D)
        close(f"{name}: the second document", (y[:, 11:], h), alone, 1e-6)
        for size in (1e-8, 1e3):             # 1,000 decays of exp(-1000): far below any number
            tensors = inputs(1000, torch.float32)
            tensors[1] = torch.full_like(tensors[1], size).requires_grad_()
            assert all(t.isfinite().all() for t in everything(scan, tensors))


def test_zoh_is_exact_while_x_is_held_and_euler_tends_to_it():
    """Catches: a wrong B̄; exp(ΔA) - 1 in place of expm1: for a small ΔA it rounds badly.

    Two half steps are a whole one. Euler's relative error is about |ΔA|/2.
    """
    x, delta, A, B, C, _, h0 = inputs(1)

    def two(size):
        """The arguments for two equal steps."""
        x2, delta2, B2, C2 = [t.repeat(1, 2, 1) for t in (x, size * delta, B, C)]
        return x2, delta2, A, B2, C2, None, h0

    for name, scan in SCANS.items():
        _, whole = scan(x, delta, A, B, C, None, h0)
        _, halves = scan(*two(0.5))
        differs = error(halves, whole)
        print(f"    {name}: two half steps differ from a whole one by {differs:.1e}")
        assert (differs < 1e-14) == ("zoh" in name)
    for size in (1e-2, 1e-3, 1e-4):
        euler, _ = EXACT["euler"](*two(size)[:5])
        zoh, _ = EXACT["zoh"](*two(size)[:5])
        worst = (size * delta * -A.min()).max().item()
        close(f"largest |ΔA| {worst:.0e}: euler against zoh", euler, zoh, 2 * worst)
    tiny = [t.float() for t in two(1e-6)[:5]]
    _, exact = EXACT["zoh"](*[t.double() for t in tiny])
    for scan in (EXACT["zoh"], SCANS["sequential, zoh"], SCANS["parallel, zoh"]):
        close("float32, |ΔA| = 1e-6", scan(*tiny)[1], exact, 1e-6)


def test_a_million_tokens_end_where_the_closed_form_says():
    """Catches: in the parallel scan, rounding that grows with the length.

    With x = B = C = 1 all steps of ZOH make a single one: h_t = (exp(A ΣΔ) - 1)/A. "auto" is
    the parallel scan here.
    """
    torch.manual_seed(0)
    l = 2 ** 20
    A = torch.tensor([[-1.0, -16.0]])
    one = torch.ones(1, l, 2)
    for size in (1e-6, 1e-3, 1.0):
        delta = size * (0.5 + torch.rand(1, l, 1))
        y = selective_scan(one[..., :1], delta, A, one, one, discretization="zoh")
        h = torch.expm1(A * delta.double().cumsum(1)) / A
        close(f"Δ about {size:.0e}", y, h.sum(-1, keepdim=True), 5e-4)


# --------------------------------------------------------------------------------------------------
# S6, the layer: what makes Δ, B and C from x.

def test_S6_is_algorithm_2():
    """Catches: Δ without softplus, B and C exchanged, a discretization not passed on."""
    torch.manual_seed(0)
    layer = S6(8, n=4, dt_rank=2).double()
    torch.nn.init.normal_(layer.D)
    x = torch.randn(2, 6, 8).double()
    dt, B, C = (x @ layer.x_proj.weight.t()).split([2, 4, 4], -1)
    z = dt @ layer.dt_proj.weight.t() + layer.dt_proj.bias
    delta = torch.log1p(z.exp())
    A = -layer.A_log.exp()
    for rule, exact in EXACT.items():
        layer.discretization = rule
        close(f"{rule}: y and h", layer(x), exact(x, delta, A, B, C, layer.D), 1e-14)
    refuses(lambda: layer(x, method="paralel"), "method", "paralel")
    # Mixed precision: the maps run in bfloat16, but Δ and A must not: decays multiply up.
    with torch.autocast("cpu", torch.bfloat16):
        delta, A, B, C = S6(8).select(x.float())
    assert delta.dtype == A.dtype == torch.float32
    assert B.dtype == C.dtype == torch.bfloat16


def test_a_fresh_layer_rests_where_the_authors_code_says():
    """Catches: a bias that is not the inverse of softplus, an A that is not -1 … -n."""
    torch.manual_seed(0)
    layer = S6(4096)
    rests = F.softplus(layer.dt_proj.bias).log10()
    evenly = torch.linspace(-3, -1, 4096)
    close("log₁₀ Δ at rest, sorted: from -3 to -1", rests.sort().values, evenly, 0.02)
    # A bias of ln Δ, without the inverse of softplus, would give 0.0953 here, and not 0.1.
    close("the largest", rests.max(), -1, 2e-3)
    close("A = -1 … -16", -layer.A_log[0].exp(), -torch.arange(1.0, 17), 1e-6)
    close("D = 1", layer.D, torch.ones(4096))
    assert (layer.dt_rank, S6(65).dt_rank) == (128, 3)


def test_without_selection_delta_is_constant_and_S6_is_linear():
    """Catches: an ablation that switches nothing off."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 8)
    for selection, constant, linear in (
            ("all", False, False), ("BC", True, False), ("none", True, True)):
        layer = S6(8, 4, selection=selection)
        delta, *_ = layer.select(x)
        y, _ = layer(x)
        twice, _ = layer(2 * x)
        varies = delta.std(1).max()
        bends = error(twice, 2 * y)
        print(f"    {selection}: Δ varies by {varies:.0e}, S6(2x) - 2 S6(x) is {bends:.0e}")
        assert (varies < 1e-6) == constant
        assert (bends < 1e-5) == linear
        assert error(y, layer.D * x) > 1e-3            # something is written and read


def test_a_masked_token_leaves_the_state_as_it_was():
    """Catches: padding that is written to the state, or a NaN in it that reaches the rest."""
    torch.manual_seed(0)
    layer = S6(8, 4).double()
    x = torch.randn(2, 9, 8).double()
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0]).expand(2, 9)
    real = mask == 1
    padded = x.masked_fill(~real.unsqueeze(-1), math.nan)
    y, h = layer(padded, mask=mask)
    exact = layer(x[real].view(2, 5, 8))
    close("y at real tokens, and h", (y[real].view(2, 5, 8), h), exact, 1e-14)
    gradients = torch.autograd.grad(y[real].sum(), layer.parameters())
    assert all(gradient.isfinite().all() for gradient in gradients)


# --------------------------------------------------------------------------------------------------
# How the scan is computed, and for which calls. Skip this on a first reading.

def test_half_precision_is_accumulated_in_float32():
    """Catches: a state in bfloat16, which stops growing at 256 when ones are added."""
    one = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    tensors = inputs(dtype=torch.float32)
    for name, scan in SCANS.items():
        y, h = scan(one, one, -1e-6 * one[0, :1], one, one)
        assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
        close(f"{name}: 1,000 ones", h, torch.tensor([[[1000.0]]]), 1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            inside = everything(scan, tensors)
        close("autocast does not reach into the scan", inside, everything(scan, tensors))
    # y = C h + D x = 299 · -300 + 300 · 300: each product is more than float16 can hold.
    x, delta, B, C = [torch.full((1, 2, 1), size).half() for size in (300.0, 1, -1, 299)]
    y = selective_scan(x, delta, -1e4 * delta[0, :1], B, C, x[0, 0])
    close("float16, large terms that cancel", y, x, 1e-3)


def test_memory_grows_with_the_root_of_the_length():
    """Catches: states that are kept for every token. 16 times the length, 4 times the states."""
    def kept(l):
        # What autograd keeps for the backward pass goes through this hook.
        def note(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        sizes = {}
        tensors = inputs(l, torch.float32, b=1, d=64, n=16)[:5]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            selective_scan(*tensors, method="sequential")
        return sum(sizes.values()) - 4 * sum(t.numel() for t in tensors)

    short = kept(256)
    long = kept(4096)
    print(f"    beside the inputs {short:,} bytes at 256 tokens, {long:,} at 4,096")
    assert 3.5 * short < long < 4.5 * short


def test_compiled_and_eager_agree():
    """Catches: TorchScript reading the loops differently; a fallback that nobody has run."""
    # A second copy of the file, loaded while torch.jit.script fails as on a new Python.
    spec = importlib.util.spec_from_file_location("s6_eager", s6.__file__)
    eager = importlib.util.module_from_spec(spec)
    with patch.object(torch.jit, "script", None):      # calling it raises a TypeError
        spec.loader.exec_module(eager)
    compiled = isinstance(s6._forward, torch.jit.ScriptFunction)
    assert not isinstance(eager._forward, torch.jit.ScriptFunction)
    print(f"    s6.py runs {'compiled' if compiled else 'eagerly'} here")
    assert compiled or sys.version_info >= (3, 14) or os.environ.get("PYTORCH_JIT") == "0"
    for name, scan in SCANS.items():
        again = functools.partial(eager.selective_scan, **scan.keywords)
        close(name, everything(again, inputs(33)), everything(scan, inputs(33)), 1e-14)


ROUNDING = {  # what may differ if the coarsest argument has this dtype
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def odd_call(draw):
    """Seven random arguments: odd sizes, mixed dtypes, transposed memory, None."""
    common = draw.choice(list(ROUNDING))
    sizes = [draw.choice(some) for some in ((1, 2, 17, 130), (0, 1, 3), (1, 5), (1, 16))]
    l, b, d, n = sizes
    tensors = []
    for t in inputs(l, b=b, d=d, n=n):
        dtype = common if draw.random() < 0.9 else draw.choice(list(ROUNDING))
        t = t.detach().to(dtype)
        if t.ndim > 1 and draw.random() < 0.3:
            t = t.mT.contiguous().mT
        tensors.append(t.requires_grad_(draw.random() < 0.4))
    for optional in (-1, -2):                # h0, D
        if draw.random() < 0.5:
            tensors[optional] = None
    return tensors


def test_200_random_calls_are_the_definition():
    """Catches: what nobody thought of: an empty batch, a dtype, a layout in memory."""
    draw = random.Random(0)
    worst = 0.0
    for _ in range(200):
        tensors = odd_call(draw)
        scan = draw.choice(list(SCANS.values()))
        doubles = []                         # the same numbers, for the definition
        for t in tensors:
            if t is not None:
                t = t.detach().double().requires_grad_(t.requires_grad)
            doubles.append(t)
        ours = everything(scan, tensors)
        exact = everything(EXACT[scan.keywords["discretization"]], doubles)
        allowed = max(ROUNDING[t.dtype] for t in tensors if t is not None)
        worst = max(worst, error(ours, exact) / allowed)
        assert error(ours, exact) <= allowed
        assert error(ours[1], exact[1]) <= 1e-4            # h is float32 at least
        assert ours[0].dtype == tensors[0].dtype
    print(f"    the largest error is {worst:.2f} of what its dtype is allowed")


def test_a_wrong_call_is_told_what_is_wrong():
    """Catches: a wrong shape that broadcasts, and trains."""
    names = "x", "delta", "A", "B", "C", "D", "h0"
    tensors = dict(zip(names, inputs()))
    x, delta, A, B, C, D, h0 = tensors.values()
    for wrong, *words in (
            ({"x": x[..., 0]}, "x", "(b, l, d)", "(2, 7)"),
            ({"delta": delta[:, :6]}, "delta", "(2, 7, 3)", "(2, 6, 3)"),
            ({"delta": 0.1}, "delta", "tensor", "float"),
            ({"A": A.t()}, "A", "(3, n)", "(4, 3)"),
            ({"B": B[:1]}, "B", "(2, 7, 4)", "(1, 7, 4)"),
            ({"B": B.long()}, "B", "dtype", "int64"),
            ({"C": C.to("meta")}, "C", "cpu", "meta"),
            ({"C": C.to(torch.complex64)}, "C", "dtype", "complex64"),
            ({"D": D[:1]}, "D", "(3,)", "(1,)"),
            ({"h0": h0.mT}, "h0", "(2, 3, 4)", "(2, 4, 3)"),
            ({"method": "paralel"}, "method", "paralel", "parallel"),
            ({"discretization": "foh"}, "discretization", "foh", "zoh")):
        refuses(lambda: selective_scan(**tensors | wrong), *words)


# --------------------------------------------------------------------------------------------------
# block.py: the block, and the language model.
#
# The hard part of a block with a state is to stop and go on, with padding anywhere. So the
# whole is read in one call, and then in parts, and the two must agree.

from block import (ConvS6, MambaBlock, MambaLM, generate, load_official,
                   official_state_dict, parameter_groups, sample)


def through(blocks, x, states=None, **how):
    """Run x through blocks: -> output, states."""
    new = []
    for layer, state in zip(blocks, states or [None] * len(blocks)):
        x, state = layer(x, state, **how)
        new.append(state)
    return x, new


def in_parts(read, tokens, sizes):
    """Read the tokens in parts: -> all outputs, the last states."""
    states = None
    outputs = []
    for part in tokens.split(sizes, 1):
        y, states = read(part, states)
        outputs.append(y)
    return torch.cat(outputs, 1), states


def shaken(model):
    """The model in float64, all parameters moved: a norm of ones would hide its absence."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double()


def language_model(**settings):
    """A small language model, and two texts of 12 tokens."""
    torch.manual_seed(0)
    model = MambaLM(vocabulary=13, d_model=16, layers=3, n=4, **settings)
    return shaken(model), torch.randint(13, (2, 12))


def test_the_block_is_its_figure():
    """Catches: gate and input exchanged, a SiLU too few, a flipped kernel."""
    # Everything that block.py draws above its code, written once more with plain matrices.
    torch.manual_seed(0)
    layer = shaken(MambaBlock(16, n=4))
    x = torch.randn(3, 11, 16).double()
    mixer = layer.mixer
    path = mixer.path
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    a, z = (normed @ mixer.in_proj.weight.t()).split(32, -1)
    padded = F.pad(a, (0, 0, 3, 0))                        # (b, 3+l, d)
    kernel = path.conv1d.weight[:, 0]                      # (d, 4)
    conv = sum(padded[:, i:i + 11] * kernel[:, i] for i in range(4))
    remembered, _ = path.s6(F.silu(conv + path.conv1d.bias))
    y = x + (remembered * F.silu(z)) @ mixer.out_proj.weight.t()
    ours, _ = layer(x)
    close("x + out_proj(S6(SiLU(conv(a))) · SiLU(z))", ours, y, 1e-14)
    weights = list(layer.parameters())
    ours = torch.autograd.grad(ours.square().sum(), weights)
    exact = torch.autograd.grad(y.square().sum(), weights)
    close("gradients of all parameters", ours, exact, 1e-13)


def test_padding_changes_nothing_wherever_it_stands():
    """Catches: padding in the convolution, the state or the window; NaN in gradients."""
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(MambaBlock(16, n=4).double() for _ in range(2))
    norm = torch.nn.LayerNorm(16).double()             # behind the blocks
    x = torch.randn(3, 11, 16).double()
    real = torch.rand(3, 20).argsort(1) < 11           # 11 real tokens among 20
    # What stands in the padding is large, or no number at all: whatever leaks will be seen.
    padded = 100 * torch.randn(3, 20, 16).double()
    padded[:, ::7] = math.nan
    padded[real] = x.flatten(0, 1)
    whole, last = through(blocks, x)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64):
        mask = real.to(dtype)
        y, states = through(blocks, padded, mask=mask)
        ours = y[real].view_as(x)
        close(f"{dtype}: real tokens and states", [ours, states], [whole, last], 1e-14)
        close("padding comes out as 0", y[~real], torch.zeros(27, 16))
        first, states = through(blocks, padded[:, :9], mask=mask[:, :9])
        second, states = through(blocks, padded[:, 9:], states, mask=mask[:, 9:])
        both = torch.cat([first, second], 1)
        close("the same, cut in two", [both, states], [y, last], 1e-14)
    path = ConvS6(32, n=4, selection="none").double()  # its C is not 0 at padding
    y_path, _ = path(padded.repeat(1, 1, 2), mask=mask)
    close("that of the path, too", y_path[~real], torch.zeros(27, 32))
    gradient, = torch.autograd.grad(y_path.sum(), path.conv1d.weight)
    assert gradient.isfinite().all()
    ours = torch.autograd.grad(norm(y)[real].square().sum(), blocks.parameters())
    exact = torch.autograd.grad(norm(whole).square().sum(), blocks.parameters())
    close("gradients, with a norm behind", ours, exact, 1e-12)


def test_a_mask_of_another_kind_is_refused_and_not_read_the_other_way_round():
    """Catches: a mask of floats, 0 and -inf, that masks all but the padding."""
    model = MambaLM(13, 16, layers=1)
    layer = model.layers[0]
    x = torch.randn(2, 9, 16)
    added = torch.zeros(2, 9).masked_fill(torch.eye(2, 9) == 1, -math.inf)
    for mask in (torch.ones(2, 9), added, added.bfloat16() * math.nan):
        refuses(lambda: layer(x, mask=mask), "mask", "bool or int", mask.dtype)
        refuses(lambda: layer.mixer(x, mask=mask), "mask", "bool or int")
        refuses(lambda: layer.mixer.path.s6(x.repeat(1, 1, 2), mask=mask), "mask", "bool or int")
    for shape in ((1, 9), (2, 8), (2, 9, 1)):
        mask = torch.ones(shape, dtype=torch.bool)
        refuses(lambda: layer(x, mask=mask), "mask", "(2, 9)", shape)
        refuses(lambda: model(torch.zeros(2, 9).long(), mask=mask), "mask", "(2, 9)", shape)


def test_one_token_goes_through_adapters_hooks_and_parametrizations():
    """Catches: a short way for one token that reads a weight past its module."""
    for name in ("norm", "mixer.in_proj", "mixer.out_proj", "mixer.path.s6.x_proj",
                 "mixer.path.s6.dt_proj", "mixer.path.conv1d"):
        model, tokens = language_model()
        before, _ = model(tokens)
        module = model.layers[1].get_submodule(name)
        if name.endswith("conv1d"):          # hooks do not run there, but this does
            torch.nn.utils.parametrizations.weight_norm(module, dim=None)
            module.parametrizations.weight.original0.data *= 1.5
        else:
            module.register_forward_hook(lambda module, x, y: 1.5 * y)
        whole = model(tokens)
        close(f"{name} half as loud again", in_parts(model, tokens, 1), whole, 1e-13)
        assert error(whole[0], before) > 1e-4


def test_official_weights_load_and_go_back_under_their_own_names():
    """Catches: a weight that the official models know by another name, or that is another."""
    # Two weights of one shape could be exchanged on the way out and back on the way in. So
    # here stands where in our mixer each of their names is found.
    torch.manual_seed(0)
    model = shaken(MambaLM(vocabulary=13, d_model=16, layers=1, n=4, d_conv=3)).float()
    own = dict(model.named_parameters())
    theirs = {"backbone.norm_f.weight": own["norm_f.weight"]}
    theirs["lm_head.weight"] = own["embedding.weight"]
    for where, names in (
            ("", "norm.weight mixer.in_proj.weight mixer.out_proj.weight"),
            ("path.", "mixer.conv1d.weight mixer.conv1d.bias"),
            ("path.s6.", "mixer.x_proj.weight mixer.dt_proj.weight mixer.dt_proj.bias"),
            ("path.s6.", "mixer.A_log mixer.D")):
        for name in names.split():
            weight = own["layers.0." + name.replace("mixer.", f"mixer.{where}")]
            theirs[f"backbone.layers.0.{name}"] = weight
    compiled = torch.compile(model)
    as_ddp = torch.nn.ModuleDict({"module": compiled})     # DistributedDataParallel's name
    for style, name in (("mamba_ssm", "embedding"), ("transformers", "embeddings")):
        named = theirs | {f"backbone.{name}.weight": own["embedding.weight"]}
        for source in (model, compiled, as_ddp):
            official = official_state_dict(source, style)
            assert official.keys() == named.keys()
            close(style, [official[name] for name in named], list(named.values()))
        del official["lm_head.weight"]       # some files leave out a head that is tied
        prefixed = {f"module._orig_mod.{name}": w for name, w in official.items()}
        for weights in (official, prefixed):
            loaded = load_official(weights)
            close("and back", list(loaded.parameters()), list(own.values()))
    official["backbone.norm_f.weight"].zero_()             # a copy: the model keeps its own
    assert model.norm_f.weight.any()

    wrong = {"backbone.layers.0.mixer.A_log": torch.ones(8)}
    refuses(lambda: load_official(official | wrong), "Mamba-1")
    refuses(lambda: load_official({"fc.weight": torch.ones(2, 2)}), "embedding.weight")
    untied = {"lm_head.weight": torch.ones(13, 16)}
    refuses(lambda: load_official(official | untied), "tied")
    model.layers[0].mixer.in_proj.adapter = torch.nn.Linear(2, 2)
    refuses(lambda: official_state_dict(model), "in_proj.adapter.weight", kind=RuntimeError)
    for setting in ({"discretization": "zoh"}, {"selection": "BC"}):
        other = MambaLM(13, 16, layers=1, **setting)       # the names mean something else
        refuses(lambda: official_state_dict(other), *setting)


def test_generation_repeats_with_its_seed_and_draws_from_the_softmax():
    """Catches: a seed or a temperature that does nothing, a k off by one."""
    model, tokens = language_model()
    prompt = tokens[0]
    text = list(generate(model, prompt, 40, temperature=0))
    logits, _ = model(torch.cat([prompt, torch.tensor(text)]).unsqueeze(0))
    assert logits[0].argmax(-1)[11:-1].tolist() == text
    a, again, other = [list(generate(model, prompt, 40, seed=seed)) for seed in (0, 0, 1)]
    assert a == again != other

    # Without layers the logits depend on the last token alone: a Markov chain, to be counted.
    chain = MambaLM(4, 8, layers=0)
    torch.nn.init.normal_(chain.embedding.weight)
    logits = chain(torch.arange(4).unsqueeze(0))[0][0]
    for k in (4, 2):
        too_low = logits < logits.topk(k).values[:, -1:]
        chances = (logits / 2).masked_fill(too_low, -math.inf).softmax(-1)
        text = [0, *generate(chain, torch.tensor([0]), 4000, temperature=2.0, top_k=k)]
        seen = F.one_hot(torch.tensor(text), 4).double()
        counts = seen[:-1].t() @ seen[1:]
        expected = counts.sum(1, keepdim=True) * chances
        close(f"temperature 2, top {k}: how often the 16 pairs", counts, expected, 0.08)
        assert not counts[expected == 0].any()
    # In bfloat16 many sums would be equal, and the first of two equal ones would win.
    even = torch.full((20000, 2), 20.0, dtype=torch.bfloat16)
    ones = sample(even, 0.1, None, torch.Generator().manual_seed(0)).float()
    close("bfloat16: one of two equal tokens", ones.mean(), 0.5, 0.03)


def test_what_would_be_computed_wrongly_in_silence_is_refused():
    """Catches: states of another batch that are broadcast, text written from NaN."""
    model, tokens = language_model()
    layer = model.layers[0]
    prompt = tokens[0]
    x = torch.randn(2, 9, 16).double()
    _, states = model(tokens)
    one_h = states[0].window, states[0].h[:1]
    refuses(lambda: model(prompt), "tokens", "(b, l)", "(12,)")
    refuses(lambda: model(tokens, states[:2]), "shorter")
    refuses(lambda: model(tokens[:1], states), "window", "(1, 3, 32)", "(2, 3, 32)")
    refuses(lambda: layer(x, one_h), "h0", "(2, 32, 4)", "(1, 32, 4)")
    refuses(lambda: layer(x[0]), "MambaBlock", "(b, l, 16)", "(9, 16)")
    for part in (layer, layer.mixer, layer.mixer.path, layer.mixer.path.s6):
        refuses(lambda: part(x[..., :7]), type(part).__name__, "(2, 9, 7)")
    for how in (-1.0, math.nan, math.inf):
        text = generate(model, prompt, 1, temperature=how)
        refuses(lambda: next(text), "temperature", how)
    for wrong in (prompt[:0], tokens):
        refuses(lambda: next(generate(model, wrong, 1)), "prompt", tuple(wrong.shape))
    for value in (math.nan, math.inf):
        torch.nn.init.constant_(model.norm_f.weight, value)
        refuses(lambda: next(generate(model, prompt, 1)), "not finite")


# --------------------------------------------------------------------------------------------------
# vision.py: an image is read from both ends, and drawn from one.
#
# "Causal" and "bidirectional" are claims about what can influence what. So that is what is
# tested: change the end of the input, and see whether the beginning of the output moves.

import vision
from vision import PixelLM, Stem, VisionBlock, VisionMamba


def test_the_future_changes_the_past_when_bidirectional_and_only_then():
    """Catches: a convolution or a norm that peeks ahead, a branch that is not reversed."""
    torch.manual_seed(0)
    image = torch.rand(1, 1, 28, 28).double()
    darker = image.clone()
    darker[:, :, 20:] /= 2
    for direction in vision.DIRECTIONS:
        model = VisionMamba(16, layers=2, direction=direction).double()
        moved = model.body(model.stem(image)) - model.body(model.stem(darker))
        change = moved.abs().amax(-1).view(7, 7).amax(1)   # per row of tokens
        print(f"    {direction}: rows change by {' '.join(f'{c:.0e}' for c in change)}")
        # A token of the stem sees 12×12 pixels: rows 5 and 6 the darker part, rows 0 to 3 none.
        assert change[5:].min() > 0
        assert (change[:4].max() > 0) == (direction == "bidirectional")


def test_the_vision_block_is_one_path_or_two_and_their_fusion():
    """Catches: branches exchanged, a sum in place of the average, a branch that is gated twice."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16).double()
    for direction, fuse in itertools.product(vision.DIRECTIONS, vision.FUSIONS):
        layer = shaken(VisionBlock(16, n=4, direction=direction, fuse=fuse))
        a, z = layer.in_proj(layer.norm(x)).split(32, -1)
        paths = [layer.first(a)[0]]
        if direction == "causal":
            paths.append(layer.second(a)[0])
        elif direction == "bidirectional":
            paths.append(layer.second(a.flip(1))[0].flip(1))
        if fuse == "average":
            y = sum(paths) / len(paths) * F.silu(z)
        else:
            y = torch.cat([path * F.silu(z) for path in paths], -1)
        close(f"{direction}, {fuse}", layer(x), x + layer.out_proj(y), 1e-14)


def test_a_token_sees_the_same_margin_on_all_sides_of_its_patch():
    """Catches: a stem off its centre: a scan from the other end would see other margins."""
    for kind, size, margin in (
            ("conv", 4, 4), ("conv", 2, 4), ("deep", 2, 8), ("patch", 4, 0)):
        torch.manual_seed(0)
        stem = shaken(Stem(1, 16, size, kind))
        images = torch.randn(20, 1, 28, 28).double().requires_grad_()
        side = 28 // size                    # tokens in a row; this one is on the diagonal
        token = stem(images)[:, side // 2 * (side + 1)]
        gradient, = torch.autograd.grad(token.sum(), images)
        seen = gradient.abs().sum((0, 1))
        start = side // 2 * size
        expected = torch.zeros(28).bool()
        expected[start - margin:start + size + margin] = True
        print(f"    {kind}: a patch of {size} and {margin} pixels on each side")
        assert torch.equal(seen.sum(0) > 0, expected)
        assert torch.equal(seen.sum(1) > 0, expected)


def test_any_image_that_the_patch_divides_can_be_classified():
    """Catches: 28×28 or one channel in the model, a wrong pool, a lost position."""
    for channels, size, pool, stem, position in (
            (1, (28, 28), "mean", "conv", "patches"),
            (3, (32, 32), "max", "patch", "none"),
            (3, (16, 24), "last", "deep", "axes")):
        frame = dict(image_size=size, channels=channels, pool=pool, stem=stem,
                     position=position, classes=7)
        model = shaken(VisionMamba(16, layers=1, **frame))
        images = torch.randn(2, channels, *size).double()
        place = model.position
        if position == "none":
            place = 0
        elif position == "axes":             # 4 rows of tokens, then 6 columns
            place = torch.stack([row + col for row in place[:4] for col in place[4:]])
        x = model.norm(model.body(model.stem(images) + place))
        assert x.shape[1] == size[0] * size[1] // 16
        pooled = {"mean": x.mean(1), "max": x.amax(1), "last": x[:, -1]}[pool]
        logits = pooled @ model.head.weight.t() + model.head.bias
        close(f"{size}, {stem}, {position}, {pool}", model(images), logits, 1e-14)
    refuses(lambda: model(images[..., :20]), "(3, 16, 24)", "(2, 3, 16, 20)")
    refuses(lambda: model(images[:, :1]), "(3, 16, 24)", "(2, 1, 16, 24)")
    refuses(lambda: VisionMamba(16, image_size=(30, 28)), "patch", "30x28")
    refuses(lambda: VisionMamba(16, patch=7), "patch", "2 or 4", "7")
    for option in ("direction", "fuse", "pool", "stem", "position", "discretization",
                   "selection"):
        refuses(lambda: VisionMamba(16, **{option: "typo"}), option, "one of", "typo")


def test_a_pixel_is_guessed_from_those_before_it_and_drawn_one_by_one():
    """Catches: a model that sees the pixel it guesses, a state that is lost."""
    torch.manual_seed(0)
    model = PixelLM([], 8, (4, 5)).double()
    tokens = torch.tensor([[vision.BEGIN, *range(19)]])        # pixel i of the image is i
    place = [model.position[i // 5] + model.position[4 + i % 5] for i in range(20)]
    logits = model.head(model.norm(model.embedding(tokens) + torch.stack(place)))
    close("without blocks: the last pixel, the place", model(tokens), logits, 1e-12)
    refuses(lambda: model(torch.zeros(1, 21).long()), "21 tokens", "20 pixels")
    for layer in (MambaBlock, S4Block):
        model = PixelLM([layer(8, n=4), layer(8, n=4)], 8, (3, 4))
        torch.nn.init.normal_(model.head.weight)           # far from even chances
        for given in (0, 3):
            begun = torch.arange(48).view(16, 3)[:, :given]
            pixels = vision.complete(model, begun, 12, seed=3)
            # The whole image in one call gives the chances that every draw must have had.
            before = F.pad(pixels[:, :-1], (1, 0), value=vision.BEGIN)
            chances = model(before).softmax(-1)
            g = torch.Generator().manual_seed(3)
            drawn = [begun]
            for i in range(given, 12):
                drawn.append(torch.multinomial(chances[:, i], 1, generator=g))
            close(f"{layer.__name__}, {given} of 12 given", pixels, torch.cat(drawn, 1))


# --------------------------------------------------------------------------------------------------
# rnn.py: what came before. A comparison is only as good as its baselines. So each is compared
# with its own equation, and S4 with S6.

import rnn
from rnn import RNN, PlainLM, S4, S4Block, Stack, diagonal_hippo, hippo, memorize, recall


def test_the_vanilla_RNN_and_the_GRU_are_their_equations():
    """Catches: a baseline that is not what it is called, a state that is not the last one."""
    torch.manual_seed(0)
    for gated in (False, True):
        model = shaken(RNN(4, 6, layers=2, gated=gated))
        x = y = torch.randn(2, 9, 4).double()
        last = []
        for W, U, b, c in model.rnn.all_weights:
            h = torch.zeros(2, 6).double()
            states = []
            for x_t in y.unbind(1):
                new = x_t @ W.t() + b
                old = h @ U.t() + c
                if gated:                    # r: the reset gate; z: the update gate
                    r, z, _ = torch.sigmoid(new + old).chunk(3, -1)
                    new = torch.tanh(new[:, 12:] + r * old[:, 12:])
                    h = z * h + (1 - z) * new
                else:
                    h = torch.tanh(new + old)
                states.append(h)
            y = torch.stack(states, 1)
            last.append(h)
        name = "GRU" if gated else "vanilla RNN"
        close(f"{name}: y and h", model(x), [y, [torch.stack(last, 1)]], 1e-14)
        U = RNN(4, 6, gated=gated).rnn.weight_hh_l0
        close("U starts orthogonal", U.t() @ U, torch.eye(6), 1e-6)


def test_S4_is_S6_with_constant_delta_B_C_and_a_complex_or_real_A():
    """Catches: a baseline that is not what it is called, two files with two recurrences."""
    torch.manual_seed(0)
    x = torch.randn(2, 50, 3).double()
    for real in (False, True):
        layer = shaken(S4(3, 8, real=real))
        with torch.no_grad():                # S6 has one C for all channels
            layer.C.copy_(layer.C[0].clone())
        A = -layer.A_log.exp()
        B = torch.view_as_complex(layer.B)
        if real:
            C = layer.C[0].squeeze(-1)
            B = B.real
        else:
            C = torch.view_as_complex(layer.C[0])
            A = torch.complex(A, layer.omega)
        delta = layer.log_dt.exp().expand(2, 50, 3)
        B, C = [t.expand(2, 50, -1) for t in (B, C)]
        y, h = EXACT["zoh"](x, delta, A, B, C)
        exact = 2 * y.real + layer.D * x, h + 0j
        close(f"real {real}: y = 2 Re(C h) + D x, and h", layer(x), exact, 1e-12)
        close("the recurrence", layer.recur(x), (2 * y.real, h + 0j), 1e-12)
    layer = S4(3, 8, real=True)
    close("S4D-Real starts at A = -1 … -n", layer.A_log[0].exp(), torch.arange(1.0, 9), 1e-6)
    close("B is 1/2: y takes it twice", layer.B, torch.tensor([0.5, 0]).expand(8, 2))
    assert not layer.omega.any() and not layer.omega.requires_grad
    block = shaken(S4Block(4, n=4))
    x = torch.randn(2, 5, 4).double()
    a, gate = block.out_proj(F.gelu(block.s4(block.norm(x))[0])).chunk(2, -1)
    close("x + GLU(W GELU(S4(norm(x))))", block(x)[0], x + a * gate.sigmoid(), 1e-14)


def test_S4_as_a_convolution_is_S4_as_a_recurrence():
    """Catches: a kernel that is a token late, an FFT that wraps around."""
    torch.manual_seed(0)
    x = torch.randn(2, 784, 64)
    for name, layer in (("S4", S4(64, 92)), ("S4D-Real", S4(64, 16, real=True))):
        for l in (1, 2, 3, 10, 784):         # the angles ω Δ l are thousands of turns
            recurred = layer.recur(x[:, :l])
            close(f"{name}, {l} tokens", layer.convolve(x[:, :l]), recurred, 3e-5)
    _, h = layer(x)
    refuses(lambda: layer(x[:1], h), "state", "(1, 64, 16)", "(2, 64, 16)")
    refuses(lambda: layer(x[..., :9]), "S4", "(b, l, 64)", "(2, 784, 9)")
    for dtype in (torch.bfloat16, torch.float16):
        block = S4Block(64, n=8)
        whole, _ = block(x[:, :9])
        block.to(dtype)
        for sizes in (9, 1):                 # as a convolution, and as a recurrence
            y, h = in_parts(block, x[:, :9].to(dtype), sizes)
            assert (y.dtype, h.dtype) == (dtype, torch.complex64)
            close(f"{dtype}, in parts of {sizes}", y.float(), whole, 0.03)


def test_S4_starts_from_the_normal_part_of_hippo():
    """Catches: eigenvectors of other eigenvalues, half of the pairs, Δ in another range."""
    n = 16
    A, B = map(torch.tensor, hippo(n))
    modes, b = map(torch.tensor, diagonal_hippo(n))
    P = (torch.arange(n).double() + 0.5).sqrt()
    # Bᵀ exp(tN) B with N = A + P Pᵀ, by the matrix and by its eigenvalues. b is V* B/2, hence 4.
    for t in (0.1, 1.0, 3.0):
        whole = B @ torch.matrix_exp(t * (A + torch.outer(P, P))) @ B
        pairs = 2 * (4 * b.abs() ** 2 * torch.exp(t * modes)).sum().real
        close(f"Bᵀ exp({t} N) B", pairs, whole, 1e-12)
    torch.manual_seed(0)
    layer = S4(4096, n)
    ours = [layer.A_log[0].exp(), layer.omega[0], torch.view_as_complex(layer.B)]
    close("Λ and B", ours, [-modes.real, modes.imag, b], 1e-6)
    evenly = torch.linspace(-3, -1, 4096)
    steps = layer.log_dt.sort().values / math.log(10)
    close("log₁₀ Δ, sorted: even from -3 to -1", steps, evenly, 0.02)
    refuses(lambda: S4(4, 7), "even", "7")


def test_the_state_of_hippo_reconstructs_the_past():
    """Catches: a matrix with a sign or a root gone wrong, a polynomial on another interval."""
    A, B = hippo(3)
    three = torch.tensor([[1, 0, 0], [3 ** 0.5, 2, 0], [5 ** 0.5, 15 ** 0.5, 3]])
    close("A and B, for n = 3", [-A, B], [three, torch.tensor([1, 3, 5]) ** 0.5], 1e-7)
    refuses(lambda: hippo(0), "n must be 1 or more")
    x = rnn.signal(1000)
    now = (torch.arange(1000).double() + 0.5) / 1000
    for n, low, high in ((4, 0.9, 1.1), (16, 0.3, 0.7), (32, 0.0, 0.04)):
        missed = recall(memorize(x, n)[-1], now.numpy()) - x
        rms = ((missed ** 2).mean() / (x ** 2).mean()) ** 0.5
        print(f"    {n} numbers recall 1,000 samples of 8 waves with an error of {rms:.3f}")
        assert low <= rms <= high


# --------------------------------------------------------------------------------------------------
# All models: their first weights, in parts, compiled, exported, on another device.

def test_a_language_model_begins_with_a_blind_guess_and_out_proj_divided_by_root_layers():
    """Catches: a tied embedding too large for a head; out_proj not divided by √layers."""
    def size(blocks):
        weights = blocks.named_parameters()
        drawn = [w.flatten() for name, w in weights if name.endswith("out_proj.weight")]
        return torch.cat(drawn).std()

    torch.manual_seed(0)
    model = MambaLM(65)
    tokens = torch.randint(65, (4, 65))
    logits, _ = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.mT, tokens[:, 1:])
    close("the first loss is ln 65", loss, math.log(65), 0.02)
    for name, stack in (
            ("MambaLM", lambda n: MambaLM(9, 64, layers=n).layers),
            ("VisionMamba", lambda n: VisionMamba(64, layers=n).body),
            ("PixelLM", lambda n: PixelLM([MambaBlock(64) for _ in range(n)], 64).blocks)):
        close(f"{name}: each of four is half as large", 2 * size(stack(4)), size(stack(1)), 0.05)


def test_whatever_has_a_state_reads_the_same_in_parts_of_any_size():
    """Catches: a window that is not moved on, a state that is lost or exchanged."""
    torch.manual_seed(0)
    tokens = torch.randint(13, (2, 30))
    models = {}
    for how in ({}, {"discretization": "zoh"}, {"selection": "BC"}, {"selection": "none"}):
        models[f"Mamba {how}"] = MambaLM(13, 16, layers=3, n=4, **how)
    models["RNN"] = PlainLM(13, 8, [RNN(8, 6)], 6)
    models["GRU"] = PlainLM(13, 8, [RNN(8, 6, gated=True)], 6)
    models["S4"] = PlainLM(13, 8, [S4Block(8, n=4), S4Block(8, n=4)], 8)
    models["S4, real"] = PlainLM(13, 8, [S4Block(8, n=4, real=True)], 8)
    models["pixels"] = PixelLM([MambaBlock(8), S4Block(8, n=4)], 8)
    for name, model in models.items():
        read = shaken(model).read if name == "pixels" else shaken(model)
        whole = read(tokens, None)
        for sizes in (1, [2, 28], [3, 1, 1, 25], [4, 26], [29, 1]):
            close(f"{name}: parts of {sizes}", in_parts(read, tokens, sizes), whole, 1e-12)
        if name not in ("RNN", "GRU"):       # PyTorch's own want a token
            close(f"{name}: empty parts", in_parts(read, tokens, [9, 0, 21, 0]), whole, 1e-12)
        if name == "pixels":
            continue
        x = model.embedding(tokens)
        y, states = through(model.layers, x)
        close(f"{name}: a Stack", Stack(model.layers)(x), y)
        if isinstance(model, MambaLM):
            logits = model.norm_f(y) @ model.embedding.weight.t()
        else:
            logits = model.head(model.norm(y))
        close(f"{name}: embedding, layers, norm, head", whole, (logits, states), 1e-12)
        refuses(lambda: model(tokens, states * 2), "longer")


def test_a_compiled_or_exported_model_computes_the_same():
    """Catches: a scan that is traced step by step; a batch whose size is fixed."""
    def keep(graph, inputs):                 # traced, and not made into C++
        graphs.append(graph)
        return graph

    graphs = []
    results = []
    model, tokens = language_model()
    for each in (model, torch.compile(model, backend=keep)):
        logits, _ = each(tokens)
        loss = logits.square().mean()
        results.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    close("logits and gradients", *results)
    assert len(graphs) > 3                   # between them, the scans of three layers
    model = VisionMamba(16, layers=1).eval()
    dimension = {0: torch.export.Dim("batch", min=1, max=1024)}
    with torch.no_grad():
        images = torch.randn(2, 1, 28, 28)
        exported = torch.export.export(model, (images,), dynamic_shapes=(dimension,)).module()
        for b in (1, 7, 64):
            images = torch.randn(b, 1, 28, 28)
            close(f"a batch of {b}", exported(images), model(images), 1e-5)


def test_models_run_on_the_device_of_their_weights():
    """Catches: a tensor that is made on the CPU in the middle of a model on a GPU."""
    # Fake tensors have a device and a shape, and no values: so no GPU is needed.
    with FakeTensorMode(), torch.device("cuda"):
        tokens = torch.zeros(2, 50, dtype=torch.long)
        model = MambaLM(65)
        _, states = model(tokens)
        outputs = [model(tokens, states, tokens == 0)[0]]
        outputs.append(VisionMamba()(torch.zeros(2, 1, 28, 28)))
        for layer in (MambaBlock(16), S4Block(16, 8), S4Block(16, 8, real=True)):
            writer = PixelLM([layer], 16)
            _, past = writer.read(tokens)
            outputs.append(writer.read(tokens[:, :1], past)[0])
        # The scan and its gradient, cut as on a GPU.
        x, _, A, B, *_ = inputs(49, torch.float32, d=8, n=16)
        x, A, B = [t.detach().cuda() for t in (x, A.t(), B)]
        ctx = SimpleNamespace(save_for_backward=lambda *t: setattr(ctx, "saved_tensors", t))
        with torch.no_grad():
            y, h = s6._Scan.forward(ctx, x, x, A, B, B, x.new_zeros(2, 16, 8), 7, False)
            outputs += s6._Scan.backward(ctx, y, h)[:6]
    print(f"    {len(outputs)} outputs and gradients, all on {outputs[0].device}")
    assert all(output.device.type == "cuda" for output in outputs)


def test_weight_decay_is_for_matrices_and_kernels_alone():
    """Catches: decay on A_log, D, biases, norms, positions, frequencies; or none at all."""
    pixels = PixelLM([MambaBlock(8, n=4), S4Block(8, n=4)], 8)
    for model in (MambaLM(65, layers=1), VisionMamba(16, layers=1), pixels, S4(4)):
        decayed, spared = parameter_groups(model, 0.1)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
        for name, p in model.named_parameters():
            matrix = p.ndim > 1 and name.endswith(("weight", "C"))
            assert any(p is q for q in decayed["params"]) == matrix, name
            assert any(p is q for q in spared["params"]) != matrix, name
        print(f"    {len(decayed['params'])} tensors decay, {len(spared['params'])} do not")


# --------------------------------------------------------------------------------------------------
# training.py, train_mnist.py and train_shakespeare.py, on good days.
#
# A training script is right if every step is what the recipe says, if whatever is drawn is
# a function of seed and step, and if it measures what it says. All of this is seen from
# outside: the scripts are run, in this process, small enough to take a second.

from PIL import Image, ImageChops
from torchvision.transforms.functional import to_pil_image

import train_mnist
import train_shakespeare
import training
from train_mnist import (RECIPES, ROWS, build, load_folder, read_image, synthetic_digits,
                         warp)
from train_shakespeare import as_text
from training import seed_for

SMALL = "--epochs 2 --d-model 16 --layers 1"
DIGITS = f"train_mnist.py --data synthetic {SMALL} --batch 16 --patch 7 --stem patch"
OWN = f"train_mnist.py --dataset shapes {SMALL} --batch 12 --patch 3 --stem patch"
TEXT = f"train_shakespeare.py --text poem.txt {SMALL} --batch 4 --length 16"
GRU = f"{TEXT} --model gru --hidden 8"
PYDOC = "train_shakespeare.py --quick --batch 64 --length 256 --d-model 16 --layers 1"
OWN_CHECKPOINT = "checkpoints/mnist-own-shapes-bidirectional-seed0.pt"     # what OWN saves
TEXT_CHECKPOINT = "checkpoints/text-poem-mamba-seed0.pt"                  # what TEXT saves
POEM = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. "


@functools.lru_cache
def digits(train=128, test=130):
    """Synthetic digits, made once. evaluate reads 125 test images at a time: five are left over."""
    return synthetic_digits(train, test)


@contextlib.contextmanager
def workplace(channels=1):
    """In here, the working folder is new; it holds poem.txt and shapes: -> the images.

    48 to train with and 24 to test, of 9×15. Image i has i as first pixel, and class i % 3.
    """
    torch.manual_seed(0)
    images = torch.randint(256, (72, channels, 9, 15), dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(72).unsqueeze(1)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for i, image in enumerate(images):
                place = Path("shapes", "train" if i < 48 else "test", "abc"[i % 3])
                place.mkdir(parents=True, exist_ok=True)
                to_pil_image(image).save(place / f"{i:02d}.png")
            Path("poem.txt").write_text(12 * POEM)
            yield images
        finally:
            os.chdir(here)


def command(line):
    """`python SCRIPT --flags`, in this process: -> exit status or message, stdout, stderr."""
    script, *_ = line.split()
    out = io.StringIO()
    err = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", line.split()),
        patch.object(torch.cuda, "is_available", lambda: False),
        patch.object(train_mnist, "synthetic_digits", digits),
    ):
        try:
            status = sys.modules[script.removesuffix(".py")].main() or 0
        except SystemExit as stop:
            status = stop.code
    if status == 2:                          # argparse has printed its message
        status = err.getvalue().strip().splitlines()[-1]
    return status, out.getvalue(), err.getvalue()


def runs(line):
    """The command ends well: -> what it printed, its RESULT lines as dictionaries."""
    status, printed, complaints = command(line)
    assert status == 0, (status, complaints)
    rows = []
    for result in printed.splitlines():
        if result.startswith("RESULT"):
            rows.append(dict(pair.split("=", 1) for pair in result.split()[1:]))
    return printed, rows


def in_table(name, rows, line):
    """results/<name>.csv has these RESULT lines and no others, and the command of each."""
    with open(f"results/{name}.csv", encoding="utf-8") as file:
        for row, kept in zip(rows, csv.DictReader(file), strict=True):
            assert row.items() <= kept.items()
            assert kept["command"] == f"python {line}"


def wrote(*paths):
    """These files are there, and not empty."""
    for path in paths:
        assert os.path.getsize(path) > 100, path


def losses(saved):
    """The loss of every step, from a checkpoint."""
    return [loss for loss, _, _ in saved["log"]]


def learned(path):
    """From a checkpoint: losses, scores, weights and averaged weights."""
    saved = torch.load(path)
    weights = [*saved["model"].values(), *saved["average"].values()]
    return [losses(saved), saved["scores"], weights]


def averaged(path, data):
    """A model of train_mnist.py with the averaged weights of its checkpoint, and its task."""
    saved = torch.load(path)
    model, task = build(saved["recipe"], data)
    model.load_state_dict(saved["average"])
    return model, task


def same_size(name, models, share=0.01):
    """The models {name: module} have the same number of parameters, up to this share."""
    sizes = {model: training.count_parameters(module) for model, module in models.items()}
    print(f"    {name}: {sizes}")
    assert max(sizes.values()) < (1 + share) * min(sizes.values())


def test_all_models_of_a_table_have_one_budget_and_begin_with_a_blind_guess():
    """Catches: a large model beside a small one, one that does not start at ln(classes)."""
    for name in ("mnist", "pixels", "next-pixel", "cifar10"):      # the poster's differ
        models = {}
        for row, changes in ROWS[name].items():
            torch.manual_seed(0)
            model, task = build(RECIPES[name] | changes, digits())
            if name == "mnist":
                loss, _ = train_mnist.evaluate(model, task, digits())
                close(f"{row}: the loss is ln 10", loss, math.log(10), 0.2)
            # The embedding and the head of a PixelLM are the same for all.
            models[row] = model.blocks if name == "next-pixel" else model
        same_size(name, models)
    recipe = train_shakespeare.RECIPE
    models = {name: train_shakespeare.build(recipe | {"model": name}, "c" * 65)
              for name in ("mamba", "gru")}
    same_size("text", models)


def test_images_come_from_a_folder_in_batches_each_once_an_epoch():
    """Catches: 28×28 or ten classes in the script, labels of others, half an epoch."""
    def places(x, labels):
        """Where these images stand among all, by their first pixel."""
        found = x[:, 0, 0, 0].long()
        assert torch.equal(x, images[found].to(x.dtype))
        assert torch.equal(labels, found % 3)
        return found.tolist()

    recipe = RECIPES["mnist"] | {"augment": "none", "batch": 12}
    for channels in (1, 3):
        with workplace(channels) as images:
            data = load_folder("shapes", 0)
        tested = places(data.test_images, data.test_labels)
        assert sorted(tested) == list(range(48, 72))
        std, mean = torch.std_mean(images[:48].double(), (0, 2, 3), keepdim=True)
        shown, _ = train_mnist.classification(data).prepare(data.test_images, None)
        close("as a model sees them", shown, (images[tested] - mean) / std, 1e-3)
        orders = set()
        for seed, epoch in itertools.product(range(2), range(2)):
            order = []
            for step in range(4 * epoch, 4 * epoch + 4):
                order += places(*train_mnist.batch(recipe | {"seed": seed}, data, step))
            assert sorted(order) == list(range(48))
            orders.add(tuple(order))
        assert len(orders) == 4              # two epochs of two seeds


def test_images_are_known_by_their_pixels_and_classes_wherever_they_are():
    """Catches: data known by their path; links or deeper folders skipped in silence."""
    def mark(data):
        return train_mnist.facts_of(data)["fingerprint"]

    with workplace():
        data = load_folder("shapes", 0)
        os.mkdir("shapes/train/.ipynb_checkpoints")            # hidden: no class
        Path("shapes/test/a/._0.png").write_text("no image")   # hidden: no image
        os.rename("shapes/train/b", "elsewhere")
        link = os.symlink if os.name == "posix" else os.rename
        link(os.path.abspath("elsewhere"), "shapes/train/b")
        os.rename("shapes", "moved")
        assert mark(load_folder("moved", 0)) == mark(data)
        assert mark(data._replace(classes=["a", "b", "d"])) != mark(data)
        assert mark(data._replace(test_images=data.test_images.flip(0))) != mark(data)
        assert load_folder("moved", 8).train_images.shape == (48, 1, 8, 8)
        os.rename("moved/test/b", "moved/test/d")
        refuses(lambda: load_folder("moved", 0), "same in train and test", "b, c", "c, d")
        os.mkdir("moved/test/b")
        os.rename("moved/test/d", "moved/test/b/deeper")
        refuses(lambda: load_folder("moved", 0), "no image in moved/test/b")


def test_an_image_is_read_as_a_person_sees_it_or_refused_by_name():
    """Catches: ink on transparent paper that turns black, photographs on their side."""
    ink = Image.new("L", (20, 10), 255)      # white paper; black ink on the left
    ink.paste(0, (0, 0, 10, 10))
    clear = Image.merge("LA", (Image.new("L", (20, 10)), ImageChops.invert(ink)))
    palette = ink.convert("P")
    palette.putpalette(256 * [0, 0, 0])
    exif = Image.Exif()
    exif[0x112] = 6                          # shown turned by 90° to the right
    turned = ink.transpose(Image.Transpose.ROTATE_90)
    with workplace():
        for name, image, how in (
                ("grey", ink, {}),
                ("on transparent paper", clear, {}),
                ("of a palette with a transparent colour", palette, {"transparency": 255}),
                ("of one bit", ink.resize((200, 100)).convert("1"), {}),
                ("on its side", turned, {"exif": exif})):
            image.save("image.png", **how)
            left, right = read_image("image.png", (10, 20)).float().split(10, -1)
            print(f"    {name}: {left.mean():.0f} on the left, {right.mean():.0f} right")
            assert left.mean() < 30
            assert right.mean() > 225
        Image.new("I;16", (4, 4)).save("image.png")
        refuses(lambda: read_image("image.png"), "image.png", "8 bits")


def test_each_image_is_warped_or_shifted_and_mirrored_by_an_amount_of_its_own():
    """Catches: one warp for all of a batch, a crop from another image."""
    # No two pixels are equal, so there is at most one way from an image to what came out.
    torch.manual_seed(0)
    images = torch.arange(6.0 * 3 * 32 * 32).view(6, 3, 32, 32)
    ways = []
    for image, out in zip(images, train_mnist.shift_and_flip(images)):
        padded = F.pad(image, (2,) * 4, mode="reflect")
        for top, left, mirrored in itertools.product(range(5), range(5), (False, True)):
            window = padded[:, top:top + 32, left:left + 32]
            if torch.equal(out, window.flip(2) if mirrored else window):
                ways.append((top, left, mirrored))
    print(f"    {ways}")
    assert len(ways) == 6
    assert len(set(ways)) > 3

    spots = torch.zeros(400, 1, 28, 28)
    spots[..., 12:16, 12:16] = 1             # 4×4 pixels in the middle
    close("no warp", warp(spots, 0, 0, 0, 0), spots, 1e-4)
    moved = warp(spots, 0, 0, 0, 2).squeeze(1).sum(2)          # by up to 2 pixels: (400, 28)
    down = (moved * (torch.arange(28) - 13.5)).sum(1) / moved.sum(1)
    evenly = torch.linspace(-2, 2, 400)
    close("moved down by -2 … 2 pixels, sorted", down.sort().values, evenly, 0.1)
    tall = F.pad(spots, (0, 0, 14, 14))      # a turn of 56×28 pixels is still a turn
    for amounts in ((45, 0, 0, 0), (0, 0.2, 0, 0), (0, 0, 20, 0)):
        square = warp(spots, *amounts, generator=torch.Generator())
        high = warp(tall, *amounts, generator=torch.Generator())
        assert error(square[0], spots[0]) > 0.01
        assert error(square[0], square[1]) > 0.01
        close(f"tall images by {amounts}", square[:, :, 1:-1], high[:, :, 15:-15], 1e-4)


# What `train` must do, without saving and stopping. For both kinds of data the loop is the
# same; they differ in the loss of a step, and in the scores.

def plain_loop(recipe, steps, model, draws, loss_of):
    """Train on loss_of(step): -> averaged model, losses. draws: what `train` seeds a step for."""
    average = copy.deepcopy(model).requires_grad_(False)
    groups = parameter_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    seen = []
    for step in range(steps):
        torch.manual_seed(seed_for(recipe["seed"], draws, step))
        loss = loss_of(step)
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        part = (step + 1) / steps
        rate = 1.0
        if recipe["schedule"] == "cosine":   # up in a line, and down in a cosine
            rate = part / 0.1
            if part > 0.1:
                rate = 0.5 + 0.5 * math.cos(math.pi * (part - 0.1) / 0.9)
        for group in optimizer.param_groups:
            group["lr"] = rate * recipe["lr"]
        optimizer.step()
        decay = min(recipe["average"], (1 + step) / (10 + step))
        for mean, weight in zip(average.parameters(), model.parameters()):
            mean.data = decay * mean + (1 - decay) * weight.data
    return average, seen


def plain_images(recipe, steps):
    """Train to classify digits: -> averaged model, losses, last scores."""
    data = digits()

    def normalised(images):
        return (images / 255 - data.mean) / data.std

    def loss_of(step):
        x, y = train_mnist.batch(recipe, data, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe["bf16"]):
            logits = model(normalised(x)).float()
        return F.cross_entropy(logits, y, label_smoothing=recipe["smoothing"])

    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    model, _ = build(recipe, data)
    average, seen = plain_loop(recipe, steps, model, "warp", loss_of)
    logits = average(normalised(data.test_images))
    right = (logits.argmax(1) == data.test_labels).double().mean()
    return average, seen, [F.cross_entropy(logits, data.test_labels), 100 * right]


def plain_text(recipe, steps):
    """Train to write the poem, in two epochs: -> averaged model, losses, last scores."""
    text = as_text("poem", 12 * POEM)
    states = [None] * 4

    def loss_of(step):
        x, y = train_shakespeare.batch(recipe, text, step)
        forgets = torch.rand(4) < recipe["forget"]
        rows = []
        for i in range(4):                   # row by row, each from its own state or from none
            begins = forgets[i] or step % (steps // 2) == 0
            logits, after = model(x[i:i + 1], None if begins else states[i])
            states[i] = [[t.detach() for t in state] for state in after]
            rows.append(logits[0])
        return F.cross_entropy(torch.cat(rows), y.flatten())

    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    letters = len(text.vocabulary)
    if recipe["model"] == "gru":
        model = PlainLM(letters, 16, [RNN(16, 8, gated=True)], 8)
    else:
        rule = recipe["discretization"]
        model = MambaLM(letters, 16, recipe["layers"], discretization=rule)
    average, seen = plain_loop(recipe, steps, model, "forget", loss_of)
    x = text.valid[:-1]
    y = text.valid[1:]
    scores = []
    for size in (len(x), 16):                # streaming, and in blocks
        rows = [average(part.unsqueeze(0))[0][0] for part in x.split(size)]
        scores.append(F.cross_entropy(torch.cat(rows), y))
    return average, seen, scores


def test_a_training_is_this_plain_loop_and_its_score_that_of_all_test_data():
    """Catches: a setting that does nothing, gradients that are not clipped, an average of
    other weights, a seed of another step, states that are lost, a score of unequal parts."""
    # The poem ends in 97 guesses: neither blocks of 16 nor pieces of 32 divide them. (A training
    # that is killed and resumed ends in the same weights: see below.)
    pieces = functools.partial(train_shakespeare.stream_loss, piece=32)
    cases = [
        (plain_text, TEXT, "--seed 1 --forget 0.3 --average 0.65 --discretization zoh"),
        (plain_text, TEXT, "--layers 2"),
        (plain_text, GRU, "--forget 0.3 --clip 0.1 --schedule constant"),
    ]
    for flags in (
            "", "--epochs 2", "--augment none", "--augment shift-flip", "--pool last",
            "--fuse concat", "--position axes", "--patch 4 --stem conv", "--selection BC",
            "--smoothing 0.1 --bf16", "--seed 1 --average 0 --schedule constant --clip 0.1"):
        cases.append((plain_images, f"{DIGITS} --epochs 1", flags))
    outcomes = set()
    for plainly, line, flags in cases:
        with workplace(), patch.object(train_shakespeare, "stream_loss", pieces):
            runs(f"{line} --lr 0.02 --weight-decay 0.3 {flags}")
            path, = Path("checkpoints").iterdir()
            saved = torch.load(path)
        average, seen, scores = plainly(saved["recipe"], len(saved["log"]))
        weights = list(average.state_dict().values())
        ours = [losses(saved), saved["scores"][-1], list(saved["average"].values())]
        close(f"{flags}: losses, scores, weights", ours, [seen, scores, weights], 1e-4)
        outcomes.add(saved["scores"][-1])
    assert len(outcomes) == len(cases)       # every setting makes a difference
    draws = itertools.product(range(2), ("warp", "order"), range(2))
    assert len({seed_for(*draw) for draw in draws}) == 8


def test_an_epoch_of_text_reads_every_character_once_and_batches_go_on():
    """Catches: rows at other places in the text, targets off by one."""
    # Every character of this text is another one, so each says where it stands.
    letters = as_text("letters", "".join(map(chr, range(65, 1065))))
    assert letters.train.tolist() == list(range(900))
    assert letters.valid.tolist() == list(range(900, 1000))
    firsts = set()
    for epoch, seed in itertools.product(range(2), range(2)):
        recipe = {"batch": 4, "length": 16, "seed": seed}
        seen = []
        for step in range(14 * epoch, 14 * epoch + 14):
            x, y = train_shakespeare.batch(recipe, letters, step)
            assert torch.equal(y, (x + 1) % 900)
            if seen:
                assert torch.equal(x[:, 0], (seen[-1][:, -1] + 1) % 900)
            seen.append(x)
        assert torch.cat(seen).unique().numel() == 14 * 4 * 16
        firsts.add(seen[0][0, 0].item())
    assert len(firsts) == 4                  # two epochs of two seeds


def test_what_is_held_out_is_not_trained_on():
    """Catches: settings that are chosen on images that were trained on, or on test images."""
    data = digits()
    x = data.train_images
    for flags, train, test in (
            ("--holdout 50", x[:78], x[78:]),
            ("--limit 64", x[:64], data.test_images),
            ("--holdout 50 --limit 64", x[:64], x[78:])):
        shrunk = train_mnist.shrink(data, *train_mnist.parse(flags.split()))
        close(shrunk.name, [shrunk.train_images, shrunk.test_images], [train, test])
        close("labels", shrunk.train_labels, data.train_labels[:len(train)])
        assert len(shrunk.test_labels) == len(test)


def test_no_two_trainings_share_a_file():
    """Catches: a checkpoint or a table displaced by that of other settings or data."""
    several = "mnist", "fashion", "cifar10", "synthetic-digits", "own-mnist", "own-pets"
    flags = ("", "--quick", "--limit 64", "--limit 96", "--holdout 50", "--holdout 60",
             "--holdout 60 --limit 64 --quick")
    names = []
    for recipe, dataset, flag in itertools.product(RECIPES, several, flags):
        args, settings = train_mnist.parse([recipe, "--batch", "16", *flag.split()])
        data = train_mnist.shrink(digits()._replace(name=dataset), args, settings)
        names.append(train_mnist.training_name(recipe, data.name))
    print(f"    {names[0]}, {names[1]}, {names[8]}, … {names[-1]}: {len(names)} names")
    assert len(set(names)) == len(names)
    with workplace():
        for line in (TEXT, f"{TEXT} --seed 1", GRU):
            runs(f"{line} --epochs 1")
        assert len(os.listdir("checkpoints")) == 3


def test_a_training_that_is_killed_anywhere_and_resumed_ends_in_the_same_weights():
    """Catches: a checkpoint without the optimizer, the average, or a text's states."""
    gru = TEXT_CHECKPOINT.replace("mamba", "gru")
    for line, path in ((OWN, OWN_CHECKPOINT), (TEXT, TEXT_CHECKPOINT), (GRU, gru)):
        script = sys.modules[line.split(".py")[0]]
        batch = script.batch

        def dies(recipe, data, step):        # at the beginning of a step
            if step == last:
                raise KeyboardInterrupt
            return batch(recipe, data, step)

        with workplace(), patch.object(script, "SAVE_EVERY", 3):
            runs(line)
            whole = learned(path)
            for last in (1, 4, 7):
                with patch.object(script, "batch", dies):
                    status, _, complaints = command(line)
                assert status == 130
                assert "--resume" in complaints
                assert 0 <= last - len(torch.load(path)["log"]) < 3
                close("the first run, set aside", learned(f"{path}.old"), whole)
                runs(f"{line} --resume")
                close(f"killed in step {last}, resumed", learned(path), whole)
                seconds = [second for _, _, second in torch.load(path)["log"]]
                assert seconds == sorted(seconds)
            runs(f"{line} --resume")
            close("and again, with nothing left to do", learned(path), whole)


def test_two_processes_equal_one():
    """Catches: a batch that is not shared out, gradients that are summed and not averaged."""
    here = os.path.dirname(os.path.abspath(train_mnist.__file__))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    settings = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""}
    for line, path in ((f"{OWN} --position none", OWN_CHECKPOINT), (TEXT, TEXT_CHECKPOINT)):
        with workplace():
            ended = subprocess.run(
                [sys.executable, *torchrun, *f"{here}/{line}".split()],
                env=os.environ | settings, capture_output=True, encoding="utf-8")
            assert ended.returncode == 0, ended.stderr
            assert ended.stdout.count("RESULT") == 1           # the second one is silent
            two = torch.load(path)
            runs(line)
            one = torch.load(path)
        # Halves of a batch have the same mean gradient as the whole, but for rounding; and
        # each process has logged the loss of its own half.
        close(f"{path}: scores", two["scores"], one["scores"], 1e-4)
        assert error(losses(two), losses(one)) > 1e-3


# Each script from end to end, by the commands that people type.

def test_every_row_and_seed_of_a_comparison_is_in_its_table():
    """Catches: a comparison that fails at its end, a row with another's settings."""
    line = f"{DIGITS} --compare --seeds 0 1 --fuse concat"
    name = "mnist-synthetic-digits"
    with workplace():
        printed, rows = runs(line)
        print("    " + "\n    ".join(printed.splitlines()[-6:]))
        in_table(name, rows, line)
        wrote(f"figures/{name}.png")
        assert "differ by more than 2 % in size" in printed
        assert [row["model"] for row in rows] == 2 * list(ROWS["mnist"])
        scores = []
        for row in rows:
            saved = torch.load(f"checkpoints/{name}-{row['model']}-seed{row['seed']}.pt")
            assert saved["recipe"]["model"] == row["model"]
            assert row["test_accuracy"] == f"{saved['scores'][-1][1]:.2f}"
            scores.append(float(row["test_accuracy"]))
        by_seed = torch.tensor(scores, dtype=torch.float64).view(2, -1)
        for gained in by_seed.diff(dim=1).unbind(1):
            assert f"| {gained.mean():.2f} ± {gained.std():.2f} |" in printed
        runs(f"{line} --resume")
        assert not list(Path("checkpoints").glob("*old"))      # none began anew
        # A row may change more than the model, and one can ask for some of them.
        runs(f"train_mnist.py poster --data synthetic {SMALL} --batch 16 "
             "--compare forward-3e-4 rnn")
        saved = torch.load("checkpoints/poster-synthetic-digits-forward-3e-4-seed0.pt")
        assert saved["recipe"].items() >= ROWS["poster"]["forward-3e-4"].items()


def test_a_trained_model_tells_the_classes_of_pictures():
    """Catches: other weights, no normalisation; an end at the first damaged picture."""
    with workplace():
        runs(f"{OWN} --lr 0.1")              # the last weights are not the averaged ones
        data = load_folder("shapes", 0)
        model, task = averaged(OWN_CHECKPOINT, data)
        Path("shapes/test/a/54.png").write_text("damaged")
        for flag, images in (("", data.test_images), ("--invert", 255 - data.test_images)):
            status, printed, complaints = command(
                f"train_mnist.py --predict shapes/test/a shapes/test/b/49.png {flag}")
            assert status == 1
            assert "train_mnist.py: cannot read shapes/test/a/54.png" in complaints
            # test/a is images 0 to 7, of which 54.png is number 2; image 8 is 49.png.
            shown, _ = task.prepare(images[[0, 1, 3, 4, 5, 6, 7, 8]], None)
            chances, guesses = model(shown).softmax(-1).max(-1)
            lines = printed.splitlines()
            print(f"    {lines[0]}")
            for line, chance, guess in zip(lines, chances, guesses, strict=True):
                assert f": {'abc'[guess]} {100 * chance:.1f} %," in line, line


def test_the_next_pixel_is_measured_in_bits_and_the_digits_are_completed():
    """Catches: bits that are nats, a mean over images in place of pixels."""
    name = "next-pixel-synthetic-digits-limit-32"
    with workplace():
        _, (row,) = runs("train_mnist.py next-pixel --data synthetic --limit 32 "
                         "--d-model 8 --layers 1")
        wrote(f"figures/{name}-completions.png")
        model, _ = averaged(f"checkpoints/{name}-causal-seed0.pt", digits())
    pixels = digits().test_images.flatten(1).long()
    with torch.no_grad():
        logits = model(F.pad(pixels[:, :-1], (1, 0), value=vision.BEGIN))
    nats = F.cross_entropy(logits.mT, pixels).item()
    close("nats", float(row["test_nats_per_pixel"]), nats, 1e-4)
    close("bits", float(row["test_bits_per_pixel"]), nats / math.log(2), 1e-4)
    _, recipe = train_mnist.parse("next-pixel --model s4 --real".split())
    model, _ = build(recipe, digits())
    assert not any(layer.s4.omega.any() for layer in model.blocks)


def test_a_tiny_text_is_memorised_measured_and_written():
    """Catches: bits that are nats, text of other weights than the averaged ones."""
    line = f"{TEXT} --seeds 0 1 --epochs 5 --lr 0.02 --batch 1 --d-model 32"
    with workplace():
        printed, rows = runs(line)
        assert "| stream |" in printed
        in_table("text-poem-mamba", rows, line)
        wrote("figures/text-poem-mamba.png")
        saved = torch.load(TEXT_CHECKPOINT)
        for way, nats in zip(("stream", "block"), saved["scores"][-1]):
            assert rows[0][f"val_loss_{way}"] == f"{nats:.4f}"
            assert rows[0][f"val_bits_{way}"] == f"{nats / math.log(2):.4f}"
        model, _ = train_shakespeare.load_model(TEXT_CHECKPOINT, torch.device("cpu"))
        weights = list(model.state_dict().values())
        close("the averaged weights", weights, list(saved["average"].values()))
        os.remove(TEXT_CHECKPOINT)                  # the newest that fits is now that of seed 1
        for likeliest in ("--temperature 0", "--top-k 1 --temperature 9"):
            written, _ = runs(f"train_shakespeare.py --generate Shall --tokens 75 {likeliest}")
            print(f"    {written.strip()}")
            assert written.strip() == POEM.strip()
        hot = "train_shakespeare.py --generate S --tokens 81 --temperature 9 --seed"
        first, _ = runs(f"{hot} 0")
        second, _ = runs(f"{hot} 1")
        assert first != second
        assert "summer" not in first + second


# --------------------------------------------------------------------------------------------------
# visualize_delta.py: looking at Δ. A picture of what a model does must not change what it
# does, and every number below it must be the one that its name says.

import visualize_delta
from visualize_delta import (LEARNERS, TRAINED_ON, build_learner, gate_rows, haystacks,
                             opening, rank_correlation, read_images, watch)

CPU = torch.device("cpu")


def test_looking_at_delta_changes_no_output_and_sees_what_the_scan_computes():
    """Catches: a hook that changes what it reads, or stays; another resting value."""
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 30))
    images = torch.rand(2, 1, 28, 28)
    for model, seen in ((MambaLM(11, 16, 2), tokens), (VisionMamba(16, 2), images)):
        before = model(seen)[0]
        with patch.object(s6, "selective_scan", side_effect=selective_scan) as scanned:
            with contextlib.suppress(ZeroDivisionError), watch(model) as scans:
                close(f"{type(model).__name__} while one looks", model(seen)[0], before)
                1 / 0                        # an error on the way
        deltas = [call.args[1] for call in scanned.call_args_list]
        for (name, scan), delta in zip(scans.items(), deltas, strict=True):
            layer = model.get_submodule(name)
            assert not layer.dt_proj._forward_hooks
            rest, *_ = layer.select(torch.zeros_like(delta))
            close(f"{name}: Δ", scan.delta, delta)
            close("over its resting value", 2 ** opening(scan), delta / rest, 1e-5)


def test_the_answer_to_a_haystack_is_right_by_construction_also_in_pieces():
    """Catches: an answer that is overwritten, a state dropped between pieces."""
    # With wrong data every model would fail, or one would succeed without remembering.
    places = torch.arange(98)
    answers = torch.randint(16, (98,))
    for piece in (1, 7, None):
        pieces = list(haystacks(100, places, answers, torch.Generator(), piece))
        assert max(part.shape[1] for part in pieces) == (piece or 100)
        tokens = torch.cat(pieces, 1)
        assert tokens.shape == (98, 100)
        for row, place, symbol in zip(tokens, places, answers):
            assert (row == 16).nonzero().flatten().tolist() == [place, 99]
            assert row[place + 1] == symbol
    for row, symbols in zip(*visualize_delta.scattered(50, 40, 5, torch.Generator())):
        read, asked = row.split([40, 5])
        assert read[read != 16].tolist() == symbols.tolist()
        assert asked.tolist() == 5 * [17]
    models = {name: build_learner(name, 0) for name in LEARNERS}
    for name in ("selective", "gru", "s4", "rnn"):
        logits = visualize_delta.answer(models[name], tokens.split(7, 1), CPU)
        whole, _ = models[name](tokens)
        close(f"{name}: 100 tokens in pieces of 7", logits, whole[:, -1, :16], 1e-5)
    for name, n in (("selective-n4", 4), ("selective-n2", 2), ("selective-n1", 1)):
        assert models[name].layers[0].mixer.path.s6.n == n
    same_size("learners", models, 0.02)
    for name, selection, rule in (
            ("selective", "all", "euler"), ("fixed-delta", "BC", "euler"),
            ("fixed", "none", "euler"), ("selective-zoh", "all", "zoh")):
        layer = models[name].layers[1].mixer.path.s6
        assert (layer.selection, layer.discretization) == (selection, rule)


def test_an_answer_counts_as_right_if_it_is():
    """Catches: answers compared with those of others, or read at other places."""
    def finds(tokens, states):               # every second needle
        places = (tokens == 16).int().argmax(1)
        symbols = tokens[torch.arange(len(tokens)), places + 1]
        symbols[::2] += 1
        return F.one_hot(symbols, 18).unsqueeze(1), states         # (b, 1, 18): the last place

    def copies(tokens):                      # all but the last symbol
        read = tokens[:, :32]
        symbols = read[read < 16].view(-1, 4)
        symbols[:, -1] += 1
        logits = torch.zeros(*tokens.shape, 18)
        logits[:, 32:] = F.one_hot(symbols, 18)
        return logits, None

    found = visualize_delta.find_needles(finds, 64, 8, 0, CPU)
    assert found.tolist() == 4 * [False, True]
    right = visualize_delta.copied(copies, 32, 4, 0, CPU, count=32)
    assert right.tolist() == 32 * [[True, True, True, False]]


def test_the_needle_is_taught_at_growing_lengths_and_copying_among_growing_blanks():
    """Catches: a curriculum that stays at 8, or forgets the short lengths; training on NaN."""
    # In place of a step, a note of what it was asked; and a loss of which 0.04 is solved.
    def lengths(train, loss, steps, *settings):
        asked = []

        def note(model, optimizer, tokens, answers):
            asked.append((tokens.shape[1], answers.shape[1]))
            return loss

        with patch.multiple(visualize_delta, train_step=note, PER_STEP=512):
            reached = train(model, "selective", 0, CPU, steps, *settings, 3e-3)
        return asked, reached

    model = build_learner("selective", 0)
    asked, reached = lengths(visualize_delta.train_needle, 0.04, 60)
    asked = [length for length, _ in asked]
    assert asked[:len(TRAINED_ON)] == list(TRAINED_ON)
    assert set(asked[len(TRAINED_ON):]) == set(TRAINED_ON)
    assert reached == TRAINED_ON[-1]
    assert lengths(visualize_delta.train_needle, 0.06, 9) == (9 * [(8, 1)], 0)
    asked, reached = lengths(visualize_delta.train_copying, 1.0, 100, 64, [4, 8])
    blanks = [length - 2 * number for length, number in asked]
    print(f"    blanks: {' '.join(map(str, blanks[::10]))}")
    assert {number for _, number in asked} == {4, 8}
    assert blanks[:29] == 29 * [0]
    assert {length - number for length, number in asked[70:]} == {64}

    torch.nn.init.constant_(model.embedding.weight, math.inf)
    optimizer = visualize_delta.new_optimizer(model, 0.1)
    tokens = torch.randint(16, (8, 16))
    refuses(lambda: visualize_delta.train_step(model, optimizer, tokens, tokens[:, :1]),
            "not finite", "--lr")


def test_opens_and_shuts_are_those_worked_out_by_hand():
    """Catches: a token that counts for the wrong side, channels that open counted as shut."""
    # At the third and fourth of seven tokens, channel 0 opens to 4 and 16 times its resting
    # value, channel 1 to 1/4, channels 2 and 3 to twice, and channel 4 by less than a tenth.
    ratio = torch.ones(1, 7, 5)
    ratio[0, 2] = torch.tensor([4, 0.25, 2, 2, 1.05])
    ratio[0, 3] = torch.tensor([16, 0.25, 2, 2, 1.05])
    ratio[0, 6] = 1000                       # the last one counts nowhere
    here = torch.tensor([[0, 0, 1, 1, 0, 0, 0]]).bool()
    elsewhere = torch.tensor([[1, 1, 0, 0, 1, 1, 0]]).bool()
    scan = SimpleNamespace(delta=2 * ratio, rest=torch.full((5,), 2.0))
    scans = contextlib.nullcontext({"": scan})
    with patch.object(visualize_delta, "watch", lambda _: scans):
        row, = gate_rows(Mock(), "m", 0, torch.zeros(1, 7), here, elsewhere)
    print(f"    {row}")
    assert row.items() >= {"opens_percent": "60.0", "shuts_percent": "20.0"}.items()


def test_delta_lies_on_the_image_where_its_token_was_read():
    """Catches: a scan turned the wrong way, ink of the token after."""
    torch.manual_seed(0)
    model = VisionMamba(16, 1, stem="patch")
    images = torch.zeros(2, 1, 28, 28)
    images[1, :, 8:12, 12:16] = 1            # the patch in row 2, column 3
    for (name, backward), scan in read_images(model, images).items():
        changed = (scan.delta[1] - scan.delta[0]).abs().sum(-1)        # (l,)
        grid = (changed.flip(0) if backward else changed).view(7, 7)
        places = grid.nonzero().tolist()
        print(f"    {name}: {places}")       # and where the convolution carries it
        columns = range(4) if backward else range(3, 7)
        assert places == [[2, column] for column in columns]

    # Here Δ is the ink of two tokens earlier. Both also grow from token to token. This trend must
    # not count, or they would agree at every distance.
    later = torch.linspace(0, 1, 49)
    ink = torch.rand(30, 49) * later
    delta = 0.5 + F.pad(ink, (2, 0))[:, :49] + later
    scan = SimpleNamespace(delta=delta.unsqueeze(-1).expand(30, 49, 4), rest=torch.ones(4))
    for row in visualize_delta.compare_with_ink(scan, ink):
        print(f"    {row}")
        rho = float(row["rho"])
        assert rho > 0.95 if row["back"] == 2 else abs(rho) < 0.1
        assert row["opens_percent"] == ("100.0" if row["back"] == 2 else "0.0")
        assert row["shuts_percent"] == "0.0"
    a = torch.tensor([[1.0, 2, 2, 4]])
    b = torch.tensor([[10.0, 30, 20, 40]])
    # ranks 1, 2½, 2½, 4 and 1, 3, 2, 4: ρ = 4.5 / √(4.5 · 5)
    close("ρ with a tie", rank_correlation(a, b), torch.tensor([0.9]) ** 0.5, 1e-6)


def test_the_kinds_of_characters_are_those_that_a_reader_sees():
    """Catches: a letter after an apostrophe taken for a first one, lost states."""
    text = "//ROMEO:/I'm no: one."           # a slash for each line break
    kind = "//NNNNN:/fow fw: fwwo"
    names = {
        "/": "line break", " ": "space", ":": "colon", "N": "speaker's name",
        "f": "first letter", "w": "letter in a word", "o": "other"}
    kinds = visualize_delta.kinds_of(text.replace("/", "\n"))
    assert kinds == [names[letter] for letter in kind]
    # Read in pieces, the sums by kind are those of the whole text.
    torch.manual_seed(0)
    model = MambaLM(11, 16, 2)
    tokens = torch.randint(11, (100,))
    masks = F.one_hot(torch.arange(100) % 3).t().float()
    passage, sums = visualize_delta.openings_of_text(model, tokens, masks, piece=70)
    with watch(model) as scans:
        model(tokens.unsqueeze(0))
    for layer, scan in enumerate(scans.values(), 1):
        whole = opening(scan)[0]
        close(f"layer {layer}: sums by kind", sums[layer], masks @ whole, 1e-4)
        close("the passage", passage[layer], whole[1:59], 1e-5)


LOOK = "visualize_delta.py --task"


def test_the_commands_that_look_at_delta_write_what_they_promise():
    """Catches: a figure that is not written, a control from another seed."""
    # Real files and figures, but little work: no learning, few tokens.
    def few(*how):
        return [t[:4] for t in needles(*how)]

    def read_ink(model, images):
        delta = 1 + F.avg_pool2d(images, 7).flatten(1).unsqueeze(-1)           # (b, l, 1)
        forward = SimpleNamespace(delta=delta, rest=torch.ones(1))
        backward = SimpleNamespace(delta=delta.flip(1), rest=torch.ones(1))
        return {("layer 1, forward", False): forward, ("layer 1, backward", True): backward}

    needles = visualize_delta.random_needles
    step = Mock(return_value=0.04)
    copied = functools.partial(visualize_delta.copied, count=32)
    less = dict(NEEDLE_STEPS_QUICK=7, COPYING_STEPS_QUICK=4, LONGEST_QUICK=7, copied=copied)
    path = "checkpoints/mnist-synthetic-digits-bidirectional-seed3.pt"
    s4 = "checkpoints/mnist-synthetic-digits-s4-seed0.pt"
    with (
        workplace(),
        patch.object(torch, "set_flush_denormal"),
        patch.multiple(visualize_delta, train_step=step, random_needles=few, **less),
    ):
        ends_in_one_line(f"{LOOK} digits", "checkpoints/mnist*-bidirectional-seed*.pt")
        runs(f"{DIGITS} --seed 3")
        runs(f"{DIGITS} --model s4")
        runs(f"{PYDOC} --data synthetic")
        saved = torch.load(path)
        pair = visualize_delta.make_pair(saved, lambda: build(saved["recipe"], digits())[0])
        torch.manual_seed(seed_for(3, "weights"))
        first, _ = build(saved["recipe"], digits())
        close("untrained", list(pair["untrained"].parameters()), list(first.parameters()))
        weights = list(pair["trained"].state_dict().values())
        close("trained", weights, list(saved["average"].values()))

        # A Δ that is the ink, in the order in which each scan reads.
        drawn = Mock()
        with patch.multiple(visualize_delta, read_images=read_ink, draw_gates=drawn):
            runs(f"{LOOK} digits --name ink")
        with open("results/ink.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["back"] == "0"]
        rho = {"own": [], "another's": []}
        for row in rows:
            rho[row["ink"]].append(row["rho"])
        assert rho["own"] == 4 * ["1.000"]
        assert max(map(float, rho["another's"])) < 0.9       # the control: other digits
        panels = drawn.call_args.args[1]
        forward = panels["trained\nlayer 1", "forward"]
        close("panels", panels["trained\nlayer 1", "backward"], forward)

        runs(f"{LOOK} digits text")
        runs(f"{LOOK} digits --digit 3 --index 1")
        runs(f"{LOOK} needle copying --quick")
        steps = step.call_count
        printed, _ = runs(f"{LOOK} needle --quick --resume")
        assert step.call_count == steps
        assert "model=selective seed=0" in printed
        runs(f"{LOOK} needle --quick")
        wrote("checkpoints/needle_quick-selective-seed0.pt.old")
        text = "delta_text_synthetic-pydoc-quick"
        for name in ("delta_synthetic-digits", text, "needle_quick", "needle_quick_delta",
                     "copying_quick", "copying_quick_delta"):
            wrote(f"results/{name}.csv")
        for name in ("delta_synthetic-digits_gates", "delta_synthetic-digits_gates_3_1", text,
                     "needle_quick", "needle_quick_gates", "copying_quick",
                     "copying_quick_gates"):
            wrote(f"figures/{name}.png")
        for table in ("needle", "copying"):
            os.rename(f"results/{table}_quick.csv", f"results/{table}.csv")
        runs(f"{LOOK} memory")
        wrote("figures/memory.png")

        args = visualize_delta.parse([])
        rates = {"selective": 0.1, "rnn": 0.2}
        learners = visualize_delta.trained_learners(args, "t", rates, rates, step, CPU, steps=1)
        assert [facts["lr"] for *_, facts in learners] == [0.1, 0.2]
        ends_in_one_line(f"{LOOK} copying --quick --length 48 --name copying_quick --resume", "48")
        ends_in_one_line(f"{LOOK} digits --checkpoint {s4}", "no Δ")
        ends_in_one_line(f"{LOOK} digits --checkpoint {path} {s4}", "the seed")
        ends_in_one_line(f"{LOOK} digits --index 99", "test images of a 7", "--index")
        ends_in_one_line(f"{LOOK} needle --models s4", "--name")
        saved["scores"].pop()
        torch.save(saved, path)
        ends_in_one_line(f"{LOOK} digits", path, "finished training")
        step.side_effect = KeyboardInterrupt
        status, _, complaints = command(f"{LOOK} needle --quick")
        assert status == 130
        assert "models that are finished" in complaints


# --------------------------------------------------------------------------------------------------
# When something goes wrong: a mistake or a damaged file is answered in one line.
#
# A row is a command that a user could type, and what its answer must name: the file, and
# what to do. A file that is damaged is never the reason for a traceback, for training on
# what is left of it, or for running what somebody put into it.

def ends_in_one_line(line, *words):
    """The command ends with one line, which names the script and has all of the words."""
    message, _, _ = command(line)
    print(f"    {message}")
    script, *_ = line.split()
    assert str(message).startswith(f"{script}: "), (line, message)
    assert "\n" not in message
    for word in words:
        assert word in message, (word, message)


def offline():
    """In here, no name can be resolved."""
    problem = OSError("Temporary failure in name resolution")
    return patch("socket.getaddrinfo", side_effect=problem)


PREDICT = "train_mnist.py --predict"
WRITE = "train_shakespeare.py --generate"
MISTAKES = [  # a command, words of the answer
    (f"{OWN} --resume --lr 1", OWN_CHECKPOINT, "lr 0.003, not 1.0"),
    (f"{OWN} --resume --model s4", "-s4-seed0.pt", "No such file"),
    (f"{OWN} --patch 2 --stem conv", "patch 2 does not divide", "9x15"),
    (f"{OWN} --compare --state 91 --out new", "even", "91"),
    (f"{OWN} --epochs 0", "epochs", "from 1"),
    (f"{OWN} --average nan", "average", "from 0 to 1"),
    (f"{OWN} --discretization foh --model rnn", "discretization", "foh", "zoh"),
    (f"{OWN} --compare --model rnn", "--model", "--compare"),
    (f"{OWN} --checkpoint {OWN_CHECKPOINT}", "--checkpoint", "--predict"),
    (f"{OWN} --batch 49", "48 training images", "--batch"),
    (f"{OWN} --epochs 1 --batch 48", "48 training images", "two steps", "--batch"),
    (f"{OWN} --out new --lr 1e9", "not finite", "smaller --lr"),
    (f"{OWN} --out other --lr inf", "--lr", "must be finite"),
    (f"{OWN} --out poem.txt/in", "poem.txt"),
    (f"{TEXT} --out new --lr 1e9", "not finite", "smaller --lr"),
    (f"{TEXT} --epochs 1 --batch 54", "874 characters", "--batch"),
    (f"{TEXT} --length 98", "98 for validation", "--length"),
    (f"{TEXT} --seeds 1 --seed 0", "--seed", "--seeds"),
    (f"{DIGITS} --data real", "name resolution", "--data synthetic"),
    (f"{PYDOC} --data real", "name resolution", "--data synthetic"),
    (f"{DIGITS} --size 32", "--size", "folder"),
    (f"{PREDICT} a.png --device cpu", "--device", "--predict"),
    (f"{PREDICT} a.png --model s4", "mnist*-s4-seed*.pt", "--checkpoint"),
    (f"{PREDICT} a.png --checkpoint {TEXT_CHECKPOINT}", TEXT_CHECKPOINT, "classes"),
    (f"{PREDICT} a.png --quick", "--quick", "--predict"),
    (f"{PREDICT} empty", "no image in empty"),
    (f"{WRITE} Ω", "prompt", "Ω"),
    (f"{WRITE} S --checkpoint {OWN_CHECKPOINT}", OWN_CHECKPOINT, "no language model"),
    (f"{WRITE} S --checkpoint nowhere.pt", "nowhere.pt"),
    (f"{WRITE} S --lr 1", "--lr", "--generate"),
    (f"{WRITE} S --resume", "--resume", "--generate"),
    ("train_shakespeare.py --text nowhere.txt", "nowhere.txt"),
    ("train_shakespeare.py --text empty.txt", "empty.txt", "is empty"),
    ("train_mnist.py --dataset nowhere", "nowhere/train", "mnist"),
    ("train_mnist.py next-pixel --data synthetic --model rnn", "causal or s4"),
    ("train_mnist.py cifar10", "cifar10", "name resolution"),  # has no stand-in
    ("train_mnist.py typo", "typo", "next-pixel"),
]


class Bomb:
    """To unpickle it would run code: it would make a file."""

    def __reduce__(self):
        return open, ("exploded", "w")


def half(path):
    """Only the first half of a file is left."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:len(content) // 2])


def becomes(text):
    """The file has this text now, and é is a byte that is not UTF-8."""
    return lambda path: Path(path).write_bytes(text.encode("latin-1"))


def holds(thing):
    """The file is one of torch's, and holds this."""
    return lambda path: torch.save(thing, path)


def has(entry, value):
    """The file is a checkpoint, but one entry is another."""
    return lambda path: torch.save(torch.load(path) | {entry: value}, path)


GO_ON = f"{OWN} --resume"
MNIST = "data/MNIST/raw/train-images-idx3-ubyte"
SHAKESPEARE = "data/tinyshakespeare.txt"
AUTO = DIGITS.replace("synthetic", "auto")
DAMAGES = [  # what is done to a file, which one, the next command, words of the answer
    (half, OWN_CHECKPOINT, GO_ON, OWN_CHECKPOINT, "damaged"),
    (becomes(""), OWN_CHECKPOINT, GO_ON, OWN_CHECKPOINT, "damaged"),
    (holds(Bomb()), OWN_CHECKPOINT, GO_ON, OWN_CHECKPOINT, "might run code"),
    (holds([1, 2]), OWN_CHECKPOINT, GO_ON, OWN_CHECKPOINT, "no checkpoint"),
    (has("log", {}), OWN_CHECKPOINT, GO_ON, OWN_CHECKPOINT, "no log"),
    (has("model", {}), OWN_CHECKPOINT, GO_ON, OWN_CHECKPOINT, "another model"),
    (has("optimizer", {}), OWN_CHECKPOINT, GO_ON, OWN_CHECKPOINT, "another model"),
    (has("average", {"x": 1}), OWN_CHECKPOINT, f"{PREDICT} a.png", OWN_CHECKPOINT, "another model"),
    (has("recipe", {}), TEXT_CHECKPOINT, f"{WRITE} S", TEXT_CHECKPOINT, "no language model"),
    (holds(Bomb()), TEXT_CHECKPOINT, f"{WRITE} S", TEXT_CHECKPOINT, "might run code"),
    (half, TEXT_CHECKPOINT, f"{TEXT} --resume", TEXT_CHECKPOINT, "damaged"),
    (half, "shapes/train/a/00.png", OWN, "00.png"),
    (becomes("P5 2 2 255 grey"), "shapes/train/c/47.png", OWN, "differ in size", "--size"),
    (becomes("P5 15 9 255 " + 135 * "g"), "shapes/train/a/00.png", GO_ON, "with dataset"),
    (becomes(12 * POEM.upper()), "poem.txt", f"{TEXT} --resume", TEXT_CHECKPOINT, "with dataset"),
    (becomes("café " * 99), "poem.txt", TEXT, "poem.txt", "UTF-8"),
    (becomes(POEM), "poem.txt", TEXT, "72 characters", "few"),
    (half, MNIST, AUTO, "mnist", "data", "delete"),
    (half, SHAKESPEARE, "train_shakespeare.py", SHAKESPEARE, "published"),
]


def test_a_mistake_or_a_damage_is_answered_in_one_line():
    """Catches: a traceback, a pickle that runs code, a value ignored in silence."""
    with (
        workplace(),
        offline(),
        patch.object(train_mnist, "SAVE_EVERY", 1),
        patch.object(train_shakespeare, "SAVE_EVERY", 1),
    ):
        runs(OWN)
        runs(TEXT)
        os.mkdir("empty")
        Path("empty.txt").touch()
        for line, *words in MISTAKES:
            ends_in_one_line(line, *words)
        for path in Path("new").iterdir():
            _, _, weights = learned(path)
            assert all(weight.isfinite().all() for weight in weights)
        for path in (MNIST, SHAKESPEARE):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_text(POEM)
        for damage, path, line, *words in DAMAGES:
            whole = Path(path).read_bytes()
            damage(path)
            ends_in_one_line(line, *words)
            Path(path).write_bytes(whole)
        assert not os.path.exists("exploded")
        with patch.object(train_mnist, "load_torchvision", side_effect=MemoryError):
            ends_in_one_line(AUTO, "train_mnist.py: MemoryError")
        assert socket.getdefaulttimeout() is None


def test_weights_that_are_not_finite_are_no_result():
    """Catches: an accuracy, or a loss, that is reported of a model of NaN."""
    model, task = build(RECIPES["mnist"], digits())
    text = as_text("poem", 12 * POEM)
    writer = train_shakespeare.build(train_shakespeare.RECIPE, text.vocabulary)
    for each in (model, writer):
        torch.nn.init.constant_(next(each.parameters()), math.nan)
    refuses(lambda: train_mnist.evaluate(model, task, digits()), "not finite", "--lr")
    refuses(lambda: train_shakespeare.stream_loss(writer, text), "not finite", "--lr")


def test_a_flipped_bit_in_a_checkpoint_is_never_a_weight():
    """Catches: torch.load, which compares no check sums."""
    draw = random.Random(0)
    with workplace():
        for line, path in ((OWN, OWN_CHECKPOINT), (TEXT, TEXT_CHECKPOINT)):
            runs(line)
            exact = learned(path)
            content = bytearray(Path(path).read_bytes())
            refused = 0
            for _ in range(50):
                place = draw.randrange(len(content))
                bit = 1 << draw.randrange(8)
                content[place] ^= bit
                Path(path).write_bytes(content)
                content[place] ^= bit
                try:
                    training.read_checkpoint(path)
                    assert error(learned(path), exact) == 0    # nothing reads that bit
                except ValueError as problem:
                    assert path in str(problem)
                    refused += 1
            print(f"    {path}: {refused} of 50 flips refused, the others changed nothing")
            assert refused > 25


def test_a_save_that_fails_leaves_the_old_file_whole_and_is_noticed_at_once():
    """Catches: half a checkpoint over the last good one, Ctrl-C taken for a full disk."""
    def fails(*args, **kwargs):
        if where is Path:                    # in the middle of the file
            part, data = args
            part.touch()
        raise problem

    disk = OSError(28, "No space left on device")
    stop = KeyboardInterrupt()
    with workplace():
        runs(OWN)
        exact = learned(OWN_CHECKPOINT)
        for where, name, problem, answer in (
                (torch, "save", stop, 130),
                (Path, "write_bytes", stop, 130),
                (os, "replace", stop, 130),
                (Path, "write_bytes", disk, f"cannot write {OWN_CHECKPOINT}: No space left")):
            with patch.object(where, name, fails):
                status, _, _ = command(f"{OWN} --resume")
            print(f"    {problem!r} in {name}: {status}")
            assert str(answer) in str(status)
            close("the old file", learned(OWN_CHECKPOINT), exact)
            assert os.listdir("checkpoints") == [os.path.basename(OWN_CHECKPOINT)]
        os.rename("checkpoints", "before")
        Path("results").touch()              # a file where a folder should be
        with patch.object(visualize_delta, "train_step", None):    # nothing is trained
            for line in (f"{OWN} --compare", f"{TEXT} --seeds 0", f"{LOOK} needle"):
                ends_in_one_line(line, "cannot write to results")
            os.remove("results")
            ends_in_one_line(f"{LOOK} needle --out poem.txt", "cannot write to poem.txt")
        assert not os.path.exists("checkpoints")


def test_without_network_the_fallback_is_announced_and_labelled():
    """Catches: synthetic digits reported as MNIST, help texts as Shakespeare."""
    for line, name in ((AUTO, "synthetic-digits"), (PYDOC, "synthetic-pydoc-quick")):
        with workplace(), offline():
            printed, (row,) = runs(line)
        assert "SYNTHETIC" in printed
        assert row["dataset"] == name


# --------------------------------------------------------------------------------------------------
# The runner.

def main(words):
    if not __debug__:
        sys.exit("test_scan.py: python -O removes every check: run it without")
    if hasattr(sys.stdout, "reconfigure"):         # a Windows log may not know Δ
        sys.stdout.reconfigure(errors="replace")
    tests = {}
    for name, test in globals().items():
        chosen = not words or any(word in name for word in words)
        if name.startswith("test_") and chosen:
            tests[name] = test
    if not tests:
        sys.exit(f"test_scan.py: no test has {' or '.join(words)} in its name")
    start = time.perf_counter()
    failed = []
    for name, test in tests.items():
        print(name[5:].replace("_", " "), flush=True)
        try:
            test()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
    for name in failed:
        print(f"failed: {name}")
    seconds = time.perf_counter() - start
    python = sys.version.split()[0]
    print(f"{seconds:.0f} s, torch {torch.__version__}, Python {python}")
    print(f"{len(tests) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
