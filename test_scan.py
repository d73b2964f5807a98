"""test_scan.py: why you may believe the rest.

    python test_scan.py                all tests, in a minute or two on one core
    python test_scan.py padding zoh    those whose name contains one of the words
    pytest test_scan.py                the same tests, for those who have pytest

Each test is a sentence that is true, and says which bug would make it false. It prints the error
that it found beside the error that it allows. Read them as a lesson: two steps by hand, then the
equation against every faster way to compute it, then what follows from the equation; the block, the
models of images, what came before; the training scripts on good days and on bad ones; and the look
at Δ.

Each part begins with the files that it imports, in the order in which one reads them. So after
s6.py, read as far as "block.py", and the rest when you have read what it tests.
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
import subprocess
import sys
import tempfile
import time
import traceback
from types import SimpleNamespace
from unittest.mock import Mock, patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import s6
from s6 import S6, definition, selective_scan

METHODS, DISCRETIZATIONS = ("sequential", "parallel"), ("euler", "zoh")
WAYS = list(itertools.product(METHODS, DISCRETIZATIONS))
LENGTHS = (1, 2, 3, 5, 7, 64, 100, 257)
# Work this small gains nothing from a second thread; and where other programs keep the cores busy,
# threads that wait for each other at every step make it a hundred times slower.
torch.set_num_threads(1)


def error(ours, exact):
    """The largest difference over the largest value."""
    ours, exact = ours.detach(), exact.detach()
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    difference = (ours - exact).abs().double().max()
    return (difference / exact.abs().double().max().clamp(min=1e-30)).item()


def allow(what, found, allowed):
    """Print the error that was found beside the one that is allowed, and compare."""
    print(f"    {what:68s} {found:.1e}  allowed {allowed:.0e}")
    assert found <= allowed, f"{what}: {found:.2e} > {allowed:.0e}"


def equal(what, ours, exact):
    """Equal to the last bit."""
    assert torch.equal(ours, exact), f"{what}: error {error(ours, exact):.2e}"
    print(f"    {what:68s} bit for bit")


def raises(words, function, kind=ValueError):
    """function() raises that kind of error, in one line that contains the words."""
    try:
        function()
    except kind as problem:
        message = str(problem)
        assert "\n" not in message and all(word in message for word in words), message
        print(f"    {kind.__name__}: {message[:120]}")
        return
    raise AssertionError(f"no {kind.__name__} that says {words}")


def inputs(b=2, l=7, d=3, n=4, dtype=torch.float64):
    """Random x, Δ, A, B, C, D, h0 in the ranges of the glossary, requiring gradients."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, delta, A = normal(b, l, d), F.softplus(normal(b, l, d) - 1), -0.1 - normal(d, n).abs()
    tensors = x, delta, A, normal(b, l, n), normal(b, l, n), normal(d), normal(b, d, n)
    return [t.to(dtype).requires_grad_() for t in tensors]


def constants(**sizes):
    """The same, without gradients."""
    return [t.detach() for t in inputs(**sizes)]


# --------------------------------------------------------------------------------------------------
# s6.py: the scan computes its equation.
#
# The chain of trust: two steps that a person can check with a pencil; then `definition`, which is
# the equation word for word and which autograd differentiates; then the loops and their gradients
# derived by hand, each held to it at every length where a chunk or a piece could end badly. In
# float64 what is right agrees to 1e-14, and a wrong term shows at 1e-2: nothing lies between. In
# float32 the same is allowed some roundings, 2e-6.

def test_two_steps_by_hand():
    """Catches: reading the state before it is updated, a decay applied to the new input."""
    def column(*values):
        return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)

    ln2 = math.log(2)
    x, delta, B, C = column(2, 3), column(0.5, 1), column(1, -1), column(10, 100)
    A, D = column(-ln2)[0], column(7)[0, 0]
    # h_1 = 0 + 0.5·1·2 = 1                                  y_1 = 10·1 + 7·2 = 24
    # h_2 = exp(-1·ln 2)·1 + 1·(-1)·3 = 0.5 - 3 = -2.5       y_2 = 100·(-2.5) + 7·3 = -229
    for method in METHODS:
        y, h = selective_scan(x, delta, A, B, C, D, method=method, return_state=True)
        allow(f"{method}: y = (24, -229)", error(y, column(24, -229)), 1e-15)
        allow(f"{method}: the last state is -2.5", error(h, column(-2.5)), 1e-15)
    # ZOH: B̄ = (exp(ΔA) - 1)/A, so h_1 = 2 (1 - 1/√2)/ln 2 and h_2 = h_1/2 - 3 (1 - 1/2)/ln 2
    h_1 = 2 * (1 - 0.5 ** 0.5) / ln2
    y = selective_scan(x, delta, A, B, C, discretization="zoh")
    allow("zoh: y_1 and y_2", error(y, column(10 * h_1, 50 * h_1 - 150 / ln2)), 1e-15)


def test_both_methods_equal_the_definition_at_every_length():
    """Catches: a chunk or a piece one token short, a prefix scan that composes backwards."""
    for (method, z), (dtype, allowed) in itertools.product(
            WAYS, ((torch.float64, 1e-14), (torch.float32, 2e-6))):
        worst = 0.0
        for l in LENGTHS:
            exact = definition(*inputs(l=l), z)
            ours = selective_scan(*inputs(l=l, dtype=dtype), method=method, discretization=z,
                                  return_state=True)
            worst = max(worst, *map(error, ours, exact))
        allow(f"{method}, {z}, {dtype}: worst of lengths 1 … 257", worst, allowed)


def gradients(scan, tensors):
    """The gradients of every argument, for a loss that reads both y and the last state.

    The loss weighs every output at random: with a plain sum, errors could cancel.
    """
    outputs = scan(*tensors)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in outputs]
    return torch.autograd.grad(sum((t * w).sum() for t, w in zip(outputs, weights)), tensors)


def scanner(method, z, module=s6):
    """selective_scan by one of the WAYS, as a function of its tensors: -> y, last state."""
    return lambda *t: module.selective_scan(*t, method=method, discretization=z, return_state=True)


def test_the_gradients_derived_by_hand_equal_those_of_autograd():
    """Catches: a lost term of the adjoint: the last state's, h0's, Δ's second way in through B̄."""
    for (method, z), l in itertools.product(WAYS, (1, 2, 64, 257)):
        exact = gradients(lambda *t: definition(*t, z), inputs(l=l))
        for dtype, allowed in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
            ours = gradients(scanner(method, z), inputs(l=l, dtype=dtype))
            errors = dict(zip(("x", "Δ", "A", "B", "C", "D", "h0"), map(error, ours, exact)))
            worst = max(errors, key=errors.get)
            allow(f"{method}, {z}, l = {l}, {dtype}: worst is ∂{worst}", errors[worst], allowed)


# The definition could have the same mistake as the loops, and autograd would then differentiate it
# faithfully. `gradcheck` knows no equation: it moves each number a little, and looks at the output.

def test_gradcheck_of_both_methods_and_both_discretizations():
    """Catches: a wrong equation and its gradient that agree: differences know no derivation."""
    for method, z in WAYS:
        assert torch.autograd.gradcheck(scanner(method, z), inputs(b=2, l=5, d=2, n=2))
        print(f"    {method}, {z}: all seven arguments, y and the last state")


def test_the_gradient_of_the_gradient_is_refused_and_not_wrong():
    """Catches: a second derivative, or a transform of torch.func, that is silently wrong."""
    # The gradient is computed by loops that autograd does not see. Differentiating it again would
    # take what they made for constants.
    tensors = inputs(l=3)
    y = selective_scan(*tensors)
    raises(["first derivative only"],
           lambda: torch.autograd.grad(y.sum(), tensors, create_graph=True), RuntimeError)
    with contextlib.suppress(RuntimeError):        # what it says is PyTorch's own message
        torch.func.vmap(selective_scan)(*(t[None] for t in tensors))
        raise AssertionError("torch.func.vmap was not refused")


def test_a_gradient_is_made_for_whoever_asks():
    """Catches: an argument that needs no gradient breaking those that do."""
    for asks in range(7):
        tensors = [t.requires_grad_(i == asks) for i, t in enumerate(constants(l=9))]
        exact, = torch.autograd.grad(definition(*tensors)[0].sum(), tensors[asks])
        ours, = torch.autograd.grad(selective_scan(*tensors).sum(), tensors[asks])
        assert error(ours, exact) < 1e-13
    print("    each of the seven arguments alone")


# --------------------------------------------------------------------------------------------------
# What follows from the equation.
#
# These do not compare two programs. They say what must be true of the equation itself, whoever
# computes it: that it can be cut and continued, that it is a convolution when it does not look at
# x, and a gated RNN when its state is one number; what Δ = 0 and Δ = ∞ mean, and zero-order hold.

def test_a_sequence_cut_anywhere_and_continued_is_the_whole():
    """Catches: a last state taken from padding, h0 ignored by a method."""
    x, delta, A, B, C, D, h0 = constants(l=37)
    for method, z in WAYS:
        scan = scanner(method, z)
        whole, last = scan(x, delta, A, B, C, D, h0)
        worst = 0.0
        for cut in range(38):            # the first and the last: a part without tokens
            y1, h = scan(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, h0)
            y2, h = scan(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, h)
            worst = max(worst, error(torch.cat([y1, y2], 1), whole), error(h, last))
        allow(f"{method}, {z}: worst of all 38 cuts of 37 tokens", worst, 1e-14)


def test_in_any_number_of_pieces_it_is_the_same_scan():
    """Catches: an empty piece, a last piece that is short; and pieces as a GPU gets them."""
    # How many pieces are best depends on the machine; what they compute must not. 37 tokens in 5
    # pieces are 5 times 8, the last three of them padding; in 18, the last five pieces are empty.
    for z, l in itertools.product(DISCRETIZATIONS, (1, 17, 37)):
        exact, worst = gradients(lambda *t: definition(*t, z), inputs(l=l)), 0.0
        for k in (1, 2, 3, 5, 18, 19, 37, s6._short_pieces(l, 1)):
            with patch.object(s6, "_pieces", lambda *_: min(k, l)):
                worst = max(worst, *map(error, gradients(scanner("auto", z), inputs(l=l)), exact))
        allow(f"{z}, {l} tokens in 1 … {min(l, 37)} pieces: gradients", worst, 1e-13)


def test_constant_delta_B_C_is_a_convolution():
    """Catches: a decay one step early or late. y = K * x, K_j = Σ_n C Ā^j B̄: that is S4."""
    x, delta, A, B, C, _, _ = constants(b=1, l=50)
    delta, B, C = (t[:, :1].expand_as(t) for t in (delta, B, C))
    step = delta[0, 0, :, None]                                                # (d, 1)
    j = torch.arange(50).view(-1, 1, 1)
    K = (C[0, 0] * torch.exp(step * A) ** j * step * B[0, 0]).sum(-1)          # (l, d)
    kernel = K.t().flip(-1).unsqueeze(1)                                       # (d, 1, l)
    y = F.conv1d(x.transpose(1, 2), kernel, padding=49, groups=3)[..., :50].transpose(1, 2)
    for method in METHODS:
        allow(f"{method}", error(selective_scan(x, delta, A, B, C, method=method), y), 1e-13)


def test_selection_makes_the_weight_of_an_input_depend_on_when_it_is_read():
    """Catches: a scan that is a convolution after all.

    Unrolled, y_t = Σ_s M_ts x_s with M_ts = C_t (Π_{r = s+1 … t} Ā_r) B̄_s, and the product is
    exp(A (Δ_{s+1} + … + Δ_t)). A convolution is an M that depends on t - s alone: every diagonal
    of it is constant. One that depends on t and s has no kernel, and no FFT.
    """
    # Δ_{s+1} + … + Δ_t is a difference of two running sums. For s > t it is negative, and the
    # "decay" no decay; those entries are the upper triangle, and are dropped.
    x, delta, A, B, C, _, _ = constants(l=12)
    for what, tensors in (("selective", (delta, B, C)),
                          ("constant", [t[:, :1].expand_as(t) for t in (delta, B, C)])):
        delta, B, C = tensors
        total = delta.cumsum(1)
        between = (total.unsqueeze(2) - total.unsqueeze(1)).unsqueeze(-1)      # (b, t, s, d, 1)
        B_bar = delta.unsqueeze(-1) * B.unsqueeze(2)                           # (b, s, d, n)
        M = torch.einsum("btn,btsdn,bsdn->bdts", C, torch.exp(between * A), B_bar).tril()
        y = torch.einsum("bdts,bsd->btd", M, x)
        allow(f"{what}: y is the sum", error(selective_scan(x, delta, A, B, C), y), 1e-13)
        along_diagonals = error(M[..., 1:, 1:], M[..., :-1, :-1])
        print(f"    {what} Δ, B, C: the diagonals of M vary by {along_diagonals:.1e}")
        assert (along_diagonals < 1e-14) == (what == "constant")


def test_theorem_1_with_one_number_per_state_S6_is_a_gated_RNN():
    """Catches: ZOH in name only; and says why Δ is called a gate.

    n = 1, A = -1, B = C = 1, Δ = softplus(z): under ZOH h_t = (1 - g_t) h_{t-1} + g_t x_t with
    g = σ(z). Under Euler x_t weighs softplus(z), which grows without bound where σ(z) ends at 1.
    """
    x, z, one = constants()[0], 3 * constants()[0].flip(1), torch.ones(2, 7, 1).double()
    A, h, hs, g = -torch.ones(3, 1).double(), 0, [], torch.sigmoid(z)
    for t in range(7):
        h = (1 - g[:, t]) * h + g[:, t] * x[:, t]
        hs.append(h)
    hs = torch.stack(hs, 1)
    y = selective_scan(x, F.softplus(z), A, one, one, discretization="zoh")
    allow("zoh: S6 is the gated RNN", error(y, hs), 1e-14)
    assert error(selective_scan(x, F.softplus(z), A, one, one), hs) > 0.1
    z = torch.tensor([-5.0, 0, 5, 50]).double().view(4, 1, 1).expand(4, 1, 3)      # one token each
    one = one[:1, :1].expand(4, 1, 1)
    for way, weight in (("zoh", torch.sigmoid(z)), ("euler", F.softplus(z))):
        y = selective_scan(torch.ones_like(z), F.softplus(z), A, one, one, discretization=way)
        allow(f"{way}: z = -5, 0, 5, 50 write {', '.join(f'{w:.3g}' for w in weight[:, 0, 0])}",
              error(y, weight), 1e-14)


def test_delta_zero_keeps_and_delta_infinite_forgets():
    """Catches: Δ in the wrong place: it decides between holding the state and replacing it."""
    # Δ = 0 is how padding is masked, so it must hold to the last bit. And at Δ = 10⁴ the decay
    # exp(ΔA) is zero in any dtype: two runs that began differently must end the same.
    x, delta, A, B, C, _, h0 = constants(l=20)
    jump = delta.clone()
    jump[:, 10] = 1e4
    for method, z in WAYS:
        scan = scanner(method, z)
        _, h = scan(x, torch.zeros_like(delta), A, B, C, None, h0)
        equal(f"{method}, {z}: 20 tokens with Δ = 0 leave the state", h, h0)
        ends = [scan(x, jump, A, B, C, None, start)[1] for start in (h0, 5 - h0)]
        allow(f"{method}, {z}: past Δ = 10⁴ the first state is forgotten", error(*ends), 1e-15)


def test_zoh_and_euler_agree_as_delta_vanishes():
    """Catches: a wrong B̄, exp(ΔA) - 1 in place of expm1, which rounds a small ΔA to 0.

    Euler's relative error is about |ΔA|/2: a tenth of Δ makes a tenth of it.
    """
    x, delta, A, B, C, _, _ = constants(l=1)
    errors = []
    for scale in (1e-2, 1e-3, 1e-4):
        zoh = selective_scan(x, scale * delta, A, B, C, discretization="zoh")
        errors.append(error(selective_scan(x, scale * delta, A, B, C), zoh))
        worst = (scale * delta.max() * -A.min()).item()
        allow(f"largest |ΔA| = {worst:.0e}", errors[-1], worst)
    allow("tenfold, off by", abs(errors[1] / errors[2] / 10 - 1), 0.01)
    few = [t.float() for t in (x, 1e-6 * delta, A, B, C)]
    _, exact = definition(*(t.double() for t in few), discretization="zoh")
    for way in (definition, functools.partial(selective_scan, return_state=True)):
        allow("float32, |ΔA| = 1e-6", error(way(*few, discretization="zoh")[1], exact), 1e-6)


def test_zoh_is_the_exact_solution_while_x_is_held():
    """Catches: zero-order hold in name only. Two half steps equal a whole one; Euler's do not."""
    x, delta, A, B, C, _, h0 = constants(l=1)
    for method, z in WAYS:
        _, whole = scanner(method, z)(x, delta, A, B, C, None, h0)
        twice = [t.repeat(1, 2, 1) for t in (x, delta / 2, B, C)]
        _, halves = scanner(method, z)(twice[0], twice[1], A, twice[2], twice[3], None, h0)
        difference = error(halves, whole)
        print(f"    {method}, {z}: two half steps and a whole one differ by {difference:.1e}")
        assert (difference < 1e-14) == (z == "zoh")


def test_a_million_tokens_end_where_the_closed_form_says():
    """Catches: rounding that adds up, a decay that underflows, an error that grows with length.

    With x = B = C = 1, all of ZOH's steps make a single one: h_t = (exp(A ΣΔ) - 1)/A. Euler's sum
    is a geometric series, Δ (1 - Ā^t)/(1 - Ā). "auto" takes the parallel scan here. (The sequential
    one rounds each exp(-1e-6) by up to 3 % of what it takes away, and a million of those add up.)
    """
    torch.manual_seed(0)
    l, A = 2 ** 20, torch.tensor([-1.0, -16.0])
    one, t = torch.ones(1, l, 4), torch.arange(1, l + 1).view(1, l, 1)
    for size in (1e-6, 1e-3, 1.0):
        delta = size * (0.5 + torch.rand(1, l, 1))
        for z, steps in (("zoh", delta), ("euler", delta[:, :1].expand(1, l, 1))):
            step, exact = steps.double(), 0
            for a in A.double():
                exact += torch.expm1(a * step.cumsum(1)) / a if z == "zoh" else (
                    step * torch.expm1(a * step * t) / torch.expm1(a * step))
            ours = selective_scan(one, steps.expand(1, l, 4), A.repeat(4, 1), one[..., :2],
                                  one[..., :2], discretization=z)
            allow(f"{z}, Δ about {size:.0e}", error(ours, exact.expand(1, l, 4)), 5e-4)


def test_compiled_and_eager_agree():
    """Catches: TorchScript reading the loops differently; a fallback that nobody has ever run."""
    # A second copy of the file, loaded while torch.jit.script fails as it may on a new Python.
    spec = importlib.util.spec_from_file_location("s6_eager", s6.__file__)
    eager = importlib.util.module_from_spec(spec)
    with patch.object(torch.jit, "script", None):      # calling it raises a TypeError
        spec.loader.exec_module(eager)
    compiled = isinstance(s6._forward, torch.jit.ScriptFunction)
    assert not isinstance(eager._forward, torch.jit.ScriptFunction)
    assert compiled or sys.version_info >= (3, 14) or os.environ.get("PYTORCH_JIT") == "0"
    print(f"    s6.py runs {'compiled' if compiled else 'eagerly'} here")
    for method, z in WAYS:
        ours, theirs = (gradients(scanner(method, z, m), inputs(l=33)) for m in (s6, eager))
        allow(f"{method}, {z}: gradients", max(map(error, ours, theirs)), 1e-14)


def test_extreme_inputs_stay_finite():
    """Catches: a division by a product of decays, which underflows; a cumulative sum of logs."""
    for method, z in WAYS:
        for step, size in ((1e-8, 1), (1e3, 1), (1, 0), (1, 1e15)):
            # at Δ = 1e3 the product of 1,000 decays is exp(-1e6): far below the smallest number
            x, _, A, B, C, D, h0 = constants(l=1000, dtype=torch.float32)
            tensors = [size * x, torch.full_like(x, step), A, B, C, D, h0]
            tensors = [t.requires_grad_() for t in tensors]
            outputs = scanner(method, z)(*tensors)
            grads = torch.autograd.grad(sum(t.mean() for t in outputs), tensors)
            assert all(t.isfinite().all() for t in (*outputs, *grads)), (method, z, step, size)
        print(f"    {method}, {z}: 1,000 tokens with Δ = 1e-8, Δ = 1e3, x = 0, x = 1e15; gradients")


def test_half_precision_inputs_are_accumulated_in_float32():
    """Catches: a state in bfloat16, which stops growing at 256 when ones are added."""
    def ones(*shape):
        return torch.ones(*shape, dtype=torch.bfloat16)

    def one(number):                     # one sequence, one token, one channel
        return torch.full((1, 1, 1), number, dtype=torch.float16)

    # y = C h + D x = 299 · -300 + 300 · 300: each product is more than float16 can hold.
    y = selective_scan(one(300), one(1), one(-1)[0], one(-1), one(299), one(300)[0, 0])
    allow("float16, large terms that cancel: y", abs(y.item() - 300), 0.2)

    x, A, B = ones(1, 1000, 2), -1e-6 * ones(2, 1), ones(1, 1000, 1)
    for method in METHODS:
        y, h = selective_scan(x, x, A, B, B, method=method, return_state=True)
        assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
        total = h[0, 0, 0].item()
        allow(f"{method}: 1,000 ones add up to {total:.1f}", abs(total / 1000 - 1), 1e-3)
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = selective_scan(*tensors)
    equal("autocast does not reach into the scan", inside, selective_scan(*tensors))


def test_memory_grows_with_the_root_of_the_length():
    """Catches: states kept for every token, or none. 16 times the length, 4 times the states."""
    def kept(l):
        # What autograd keeps for the backward pass goes through this hook, each storage once.
        sizes, tensors = {}, inputs(b=1, l=l, d=64, n=16, dtype=torch.float32)[:5]

        def note(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            selective_scan(*tensors, method="sequential")
        return sum(sizes.values()) - 4 * sum(t.numel() for t in tensors)

    short, long = kept(256), kept(4096)
    print(f"    kept beside the inputs: {short} bytes at 256 tokens, {long} at 4,096")
    assert 3.5 * short < long < 4.5 * short


# --------------------------------------------------------------------------------------------------
# Calls of all kinds: a right one is the definition, and a wrong one is told what is wrong.
#
# The tests above have the shapes that their author thought of. These have those that nobody thinks
# of: no sequence at all in the batch, one token, one channel, arguments of different dtypes,
# tensors that are transposed, strided or expanded in memory, gradients for some and not for others.

def random_call(draw):
    """Arguments of a valid call of selective_scan, most of them odd: -> tensors, settings."""
    b, l, d, n = (draw.choice(sizes) for sizes in ((0, 1, 2, 3), (1, 2, 3, 17, 64, 130), (1, 2, 5),
                                                   (1, 2, 16)))
    tensors = {"x": torch.randn(b, l, d), "delta": torch.rand(b, l, d), "A": -torch.rand(d, n),
               "B": torch.randn(b, l, n), "C": torch.randn(b, l, n)}
    optional = {"D": torch.randn(d), "h0": torch.randn(b, d, n)}
    # Mostly one dtype; but now and then an argument has another one.
    tensors.update({name: t for name, t in optional.items() if draw.random() < 0.5})
    kinds = [torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]
    common = draw.choice(kinds)
    layouts = (lambda t: t, lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
               lambda t: torch.stack([t, t + 1], -1)[..., 0],          # every second number
               lambda t: t[:1].expand_as(t) if t.ndim > 1 and len(t) else t)
    for name, t in tensors.items():
        dtype = common if draw.random() < 0.9 else draw.choice(kinds)
        t = draw.choice(layouts)(t.to(dtype)).detach()
        tensors[name] = t.requires_grad_(draw.random() < 0.4)
    return tensors, {"method": draw.choice(s6.METHODS), "discretization":
                     draw.choice(s6.DISCRETIZATIONS), "return_state": True}


def test_200_random_calls_are_the_definition():
    """Catches: what nobody thought of: an empty batch, a dtype, a layout in memory."""
    torch.manual_seed(0)
    draw, worst = random.Random(0), 0.0
    rough = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
    for _ in range(200):
        # The definition gets the same numbers in float64. What half precision may differ by is what
        # it rounds: 2^-8 for bfloat16, 2^-11 for float16, a few times.
        tensors, chosen = random_call(draw)
        exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()}
        ours = selective_scan(**tensors, **chosen)
        right = definition(**exact, discretization=chosen["discretization"])
        assert ours[0].dtype == tensors["x"].dtype
        asked = [k for k, t in tensors.items() if t.requires_grad]
        if asked:                        # both lists go on: y, h, and the gradients asked for
            ours += torch.autograd.grad(sum(t.double().sum() for t in ours),
                                        [tensors[k] for k in asked])
            right += torch.autograd.grad(sum(t.sum() for t in right), [exact[k] for k in asked])
        double = all(t.dtype == torch.float64 for t in tensors.values())
        y_allowed = rough.get(ours[0].dtype, 1e-12 if double else 2e-5)
        for name, a, b in zip(["y", "h", *asked], ours, right):
            allowed = rough.get(a.dtype, 1e-10 if double else 1e-4) if name != "h" else 2e-5
            allowed = max(allowed, y_allowed) if name in asked else allowed
            if a.numel():
                worst = max(worst, error(a, b) / allowed)
                assert error(a, b) <= allowed, (name, error(a, b), chosen)
    allow("the largest error, as a fraction of what its dtype is allowed", worst, 1.0)


def test_200_random_mistakes_and_every_documented_one_are_named_in_a_line():
    """Catches: a wrong shape that broadcasts, and trains."""
    x, delta, A, B, C, D, h0 = inputs()
    scan = selective_scan
    raises(["delta", "(2, 7, 3)", "(2, 6, 3)"], lambda: scan(x, delta[:, :6], A, B, C))
    raises(["x", "(b, l, d)", "(2, 7)"], lambda: scan(x[..., 0], delta, A, B, C))
    raises(["A", "(3, n)", "(4, 3)"], lambda: scan(x, delta, A.t(), B, C))
    raises(["B", "(2, 7, 4)", "(2, 7, 3)"], lambda: scan(x, delta, A, B[..., :3], C))
    raises(["C", "(2, 7, 4)", "(1, 7, 4)"], lambda: scan(x, delta, A, B, C[:1]))
    raises(["D", "(3,)", "(1,)"], lambda: scan(x, delta, A, B, C, D[:1]))
    raises(["h0", "(2, 3, 4)", "(2, 4, 3)"], lambda: scan(x, delta, A, B, C, D, h0.mT))
    raises(["B", "dtype", "int64"], lambda: scan(x, delta, A, B.long(), C))
    raises(["C", "cpu", "meta"], lambda: scan(x, delta, A, B, C.to("meta")))
    raises(["delta", "tensor", "float"], lambda: scan(x, 0.1, A, B, C))
    raises(["method", "parallel", "paralel"], lambda: scan(x, delta, A, B, C, method="paralel"))
    raises(["discretization", "zoh"], lambda: scan(x, delta, A, B, C, discretization="foh"))
    raises(["S6", "(b, l, 6)", "(2, 9, 5)"], lambda: S6(6, 4)(torch.randn(2, 9, 5)))
    draw = random.Random(0)
    for _ in range(200):                 # a valid call, with one thing wrong
        tensors, chosen = random_call(draw)
        name = draw.choice(list(tensors))
        t = tensors[name].detach()
        wrong = [t.long(), t.to(torch.complex64), t.unsqueeze(0), t.to("meta"), "text",
                 torch.cat([t, t[..., :1]], -1)]               # one more than the others have
        tensors[name] = draw.choice(wrong)
        with contextlib.redirect_stdout(io.StringIO()):
            raises(["selective_scan: "], lambda: selective_scan(**tensors, **chosen))
    print("    and 200 more")


# --------------------------------------------------------------------------------------------------
# S6, the layer: what makes Δ, B and C from x.

def test_S6_is_algorithm_2():
    """Catches: Δ without softplus, B and C exchanged, names that official weights do not fit."""
    torch.manual_seed(0)
    layer, x = S6(8, n=4, dt_rank=2).double(), torch.randn(2, 6, 8).double()
    names = {"x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"}
    assert {name for name, _ in layer.named_parameters()} == names
    dt, B, C = (x @ layer.x_proj.weight.t()).split([2, 4, 4], -1)
    delta = torch.log1p(torch.exp(dt @ layer.dt_proj.weight.t() + layer.dt_proj.bias))
    exact = definition(x, delta, -torch.exp(layer.A_log), B, C, layer.D)
    for what, ours, theirs in zip(("y", "h"), layer(x), exact):
        allow(f"{what} of S6(x), against Algorithm 2 of the paper", error(ours, theirs), 1e-14)
    # Mixed precision: the maps run in bfloat16, but Δ and A must not, since decays multiply up.
    with torch.autocast("cpu", torch.bfloat16), patch.object(s6, "selective_scan") as scan:
        S6(8, n=4)(torch.randn(2, 6, 8))
    _, delta, A, B, *_ = scan.call_args.args
    print(f"    under autocast Δ is {delta.dtype}, A {A.dtype}, B {B.dtype}")
    assert delta.dtype == A.dtype == torch.float32 and B.dtype == torch.bfloat16


def test_a_fresh_layer_rests_where_the_authors_code_says():
    """Catches: a bias that is not the inverse of softplus, an A that is not -1 … -n."""
    torch.manual_seed(0)
    layer = S6(4096)
    resting = F.softplus(layer.dt_proj.bias)
    middle = resting.log().mean().exp().item()
    print(f"    Δ rests between {resting.min():.1e} and {resting.max():.1e}, in the mean of the "
          f"logarithm at {middle:.1e}")
    assert 0.999e-3 < resting.min() < 1.02e-3 and 0.099 < resting.max() < 0.101
    assert 0.9e-2 < middle < 1.1e-2
    A = -torch.arange(1.0, 17).expand(4096, 16)
    allow("A = -1 … -16", error(-layer.A_log.exp(), A), 1e-6)
    assert (layer.D == 1).all() and layer.dt_rank == 128 and S6(65).dt_rank == 3


# --------------------------------------------------------------------------------------------------
# block.py: the block, and the language model.
#
# The hard part of a block with a state is to stop and go on: a window of the convolution and the
# state of the scan, for each layer, after any number of tokens, with padding anywhere. So the test
# is always the same: the whole in one call, then in parts, and the two must agree.

import block
from block import (ConvS6, Mamba, MambaBlock, MambaLM, generate, load_official,
                   official_state_dict, parameter_groups, sample)


def through(blocks, x, states=None, **how):
    """Run x through blocks: -> output, states."""
    new = []
    for layer, state in zip(blocks, states or [None] * len(blocks)):
        x, state = layer(x, state, **how)
        new.append(state)
    return x, new


def states_error(ours, exact):
    """The worst error of all windows and states."""
    return max(error(a, b) for s, t in zip(ours, exact) for a, b in zip(s, t))


def test_the_block_is_its_figure():
    """Catches: the gate and the input exchanged, a SiLU too few, a norm behind the residual, a
    flipped kernel of the convolution, a memory layout that mixes channels; a way that the gradient
    does not take."""
    # Everything that block.py draws above its code, written out once more with plain matrices.
    torch.manual_seed(0)
    layer, x = MambaBlock(16, n=4).double(), torch.randn(3, 11, 16).double()
    torch.nn.init.normal_(layer.norm.weight)
    mixer, path = layer.mixer, layer.mixer.path
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    allow("RMSNorm", error(layer.norm(x), normed), 1e-14)
    a, z = (normed @ mixer.in_proj.weight.t()).split(32, -1)
    padded, kernel = F.pad(a, (0, 0, 3, 0)), path.conv1d.weight[:, 0]          # (b, 3+l, d), (d, 4)
    u = F.silu(path.conv1d.bias + sum(padded[:, i:i + 11] * kernel[:, i] for i in range(4)))
    y = (path.s6(u)[0] * F.silu(z)) @ mixer.out_proj.weight.t()
    allow("x + out_proj(S6(SiLU(conv(a))) · SiLU(z))", error(layer(x)[0], x + y), 1e-14)
    ours, exact = (torch.autograd.grad(out.square().sum(), layer.parameters())
                   for out in (layer(x)[0], x + y))
    allow("gradients of all parameters", max(map(error, ours, exact)), 1e-13)


def test_padding_changes_nothing_wherever_it_stands():
    """Catches: padding seen by the convolution, written to the state, or kept in the window."""
    torch.manual_seed(0)
    blocks, x = [MambaBlock(16, n=4).double() for _ in range(2)], torch.randn(3, 11, 16).double()
    mask = torch.zeros(3, 20, dtype=torch.bool)
    # What stands in the padding is large, or no number at all: whatever leaks will be seen.
    padded = 100 * torch.randn(3, 20, 16).double()
    padded[:, ::7] = math.nan
    for i in range(3):                   # 11 real tokens at random places among 20
        mask[i, torch.randperm(20)[:11]] = True
        padded[i, mask[i]] = x[i]
    with torch.no_grad():
        whole, last = through(blocks, x)
        y, states = through(blocks, padded, mask=mask)
        first, half = through(blocks, padded[:, :9], mask=mask[:, :9])
        second, half = through(blocks, padded[:, 9:], half, mask=mask[:, 9:])
    allow("the real tokens", error(y[mask].view_as(x), whole), 1e-14)
    allow("windows and states", states_error(states, last), 1e-14)
    equal("the padding comes out as it went in", y[~mask].nan_to_num(), padded[~mask].nan_to_num())
    allow("the same, cut in two", error(torch.cat([first, second], 1)[mask], y[mask]), 1e-14)
    allow("and its windows and states", states_error(half, last), 1e-14)
    raises(["mask", "(3, 20)", "(1, 20)"], lambda: through(blocks, padded, mask=mask[:1]))


def language_model(**settings):
    """A small language model in float64, whose parameters are moved off their starting values."""
    torch.manual_seed(0)
    model = MambaLM(vocabulary=13, d_model=16, layers=4, n=4, **settings).double()
    with torch.no_grad():                # a norm of ones or a bias of zeros would hide its absence
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.randint(0, 13, (2, 12))


def test_a_prompt_of_any_length_and_then_token_by_token_is_the_whole_text():
    """Catches: a prompt shorter than the convolution's window, states given to the wrong layer; a
    term lost where S6 has the equations once more, for a single token."""
    def short_sequences(model, token, states):
        return model(token.unsqueeze(1), states)

    def tokens_alone(model, token, states):
        logits, states = model(token, states)
        return logits.unsqueeze(1), states

    for how in ({}, {"discretization": "zoh"}, {"selection": "BC"}, {"selection": "none"}):
        model, tokens = language_model(**how)
        with torch.no_grad():
            whole, last = model(tokens)
            for prompt, way in itertools.product(range(1, 10), (short_sequences, tokens_alone)):
                logits, states = model(tokens[:, :prompt])
                parts = [logits]
                for t in range(prompt, 12):
                    logits, states = way(model, tokens[:, t], states)
                    parts.append(logits)
                worst = max(error(torch.cat(parts, 1), whole), states_error(states, last))
                what = f"{how}, prompt of {prompt}, {way.__name__}: logits and states"
                allow(what, worst, 1e-13)


def test_states_masks_and_names_that_do_not_fit_are_refused_or_harmless():
    """Catches: NaN in the padding that reaches a gradient; an empty piece of text that ends in an
    error; states of another batch that are broadcast; names of a wrapper in an official file."""
    model, tokens = language_model()
    _, states = model(tokens)
    logits, after = model(tokens[:, :0], states)
    assert logits.shape == (2, 0, 13)
    allow("states after an empty piece", states_error(after, states), 0.0)
    begin = model.empty_states(2)
    allow("empty states, and none", error(model(tokens, begin)[0], model(tokens)[0]), 0.0)

    layer, mask = model.layers[0], torch.tensor([[1, 1, 0], [1, 1, 1]])
    x = torch.randn(2, 3, 16).double().masked_fill(mask.unsqueeze(-1) == 0, math.nan)
    y, _ = layer(x, mask=mask)
    gradients = torch.autograd.grad(y[mask == 1].sum(), layer.parameters())
    assert all(gradient.isfinite().all() for gradient in gradients)

    raises(["tokens", "(b, l)", "(12,)"], lambda: model(tokens[0]))
    raises(["MambaBlock", "(b, l, 16)", "(3, 16)"], lambda: layer(x[0]))
    raises(["MambaBlock", "no mask"], lambda: layer(x[:, 0], states[0], mask[:, 0]))
    raises(["method", "typo"], lambda: layer.mixer.path.s6(
        torch.randn(2, 32).double(), states[0].h, method="typo"))
    token, lists = tokens[:, 0], [list(state) for state in states]
    equal("states as lists, which a file can hold", model(token, lists)[0], model(token, states)[0])
    raises(["S6", "(2, 32, 4)", "(1, 32, 4)"], lambda: layer.mixer.path.s6(
        torch.randn(2, 32).double(), states[0].h[:1]))
    raises(["4 layers", "3 states"], lambda: model(tokens, states[:3]))
    raises(["window", "(1, 3, 32)", "(2, 3, 32)"], lambda: model(tokens[:1], states))
    raises(["window", "(2, 2, 32)"], lambda: MambaLM(13, 16, 4, n=4, d_conv=3)(tokens, states))
    raises(["S4", "state", "(3, 8, 2)"], lambda: S4Block(8, n=4)(
        torch.randn(3, 5, 8), torch.zeros(1, 8, 2, dtype=torch.complex64)))

    wrapped = torch.nn.ModuleDict({"module": model})             # as DistributedDataParallel does
    official = official_state_dict(wrapped)
    assert list(official) == list(official_state_dict(model))
    own = {weight.data_ptr() for weight in model.state_dict().values()}
    assert not any(weight.data_ptr() in own for weight in official.values())
    model.layers[0].mixer.in_proj.adapter = torch.nn.Linear(2, 2)
    raises(["in_proj.adapter.weight"], lambda: official_state_dict(model))


def test_generation_obeys_adapters_hooks_and_other_norms():
    """Catches: one token that reads a module's weights in place of calling it. Whoever fine-tunes
    with a low-rank adapter would train one model and generate with another, in silence."""
    class Adapter(torch.nn.Module):      # LoRA: y = W x + V U x
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            self.down = torch.nn.Linear(linear.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, linear.out_features, bias=False)

        def forward(self, x):
            return self.linear(x) + self.up(self.down(x))

    model, tokens = language_model()
    changes = {"another norm": lambda layer: setattr(layer, "norm", torch.nn.LayerNorm(16))}
    for name in ("in_proj", "out_proj"):
        changes[f"an adapter of {name}"] = lambda layer, name=name: setattr(
            layer.mixer, name, Adapter(getattr(layer.mixer, name)))
    for name in ("x_proj", "dt_proj"):
        changes[f"a hook at {name}"] = lambda layer, name=name: getattr(
            layer.mixer.path.s6, name).register_forward_hook(lambda module, x, y: 1.5 * y)
    for name in ("", "mixer", "mixer.path", "mixer.path.s6"):
        changes[f"a hook at layer {name}"] = lambda layer, name=name: layer.get_submodule(
            name).register_forward_hook(lambda module, x, y: (1.5 * y[0], y[1]))
    for what, change in changes.items():
        with torch.no_grad():
            _, states = model(tokens[:, :11])
            before, _ = model(tokens[:, 11], states)
            change(model.layers[1])
            model.double()
            whole, _ = model(tokens)
            _, states = model(tokens[:, :11])
            logits, _ = model(tokens[:, 11], states)
        allow(f"with {what}: one token against the whole", error(logits, whole[:, 11]), 1e-13)
        assert error(logits, before) > 1e-4


def test_the_language_model_begins_with_a_blind_guess():
    """Catches: a tied embedding too large for a head; out_proj not divided by √layers."""
    torch.manual_seed(0)
    model, tokens = MambaLM(65), torch.randint(0, 65, (4, 65))
    loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).item()
    allow(f"first loss {loss:.3f}, ln 65 = {math.log(65):.3f}", abs(loss - math.log(65)), 0.1)
    ratio = Mamba(128).out_proj.weight.std() / model.layers[0].mixer.out_proj.weight.std()
    allow("each of four blocks starts half as large as one", abs(ratio.item() / 2 - 1), 0.02)


def test_official_weights_load_and_go_back_under_their_own_names():
    """Catches: a parameter that the official weights know by another name or in another shape."""
    # Two parameters of one shape could be exchanged on the way out and back on the way in. So each
    # official name stands here beside the parameter that it must mean.
    model = MambaLM(vocabulary=13, d_model=16, layers=1, n=4, d_conv=3)
    own = model.state_dict()
    expected = {"backbone.layers.0.norm.weight": "layers.0.norm.weight",
                "backbone.norm_f.weight": "norm_f.weight", "lm_head.weight": "embedding.weight"}
    for where, names in (("", "in_proj.weight out_proj.weight"),
                         ("path.", "conv1d.weight conv1d.bias"),
                         ("path.s6.", "x_proj.weight dt_proj.weight dt_proj.bias A_log D")):
        for name in names.split():
            expected[f"backbone.layers.0.mixer.{name}"] = f"layers.0.mixer.{where}{name}"
    for style, name in (("mamba_ssm", "embedding"), ("transformers", "embeddings")):
        official = official_state_dict(model, style)
        theirs = expected | {f"backbone.{name}.weight": "embedding.weight"}
        assert set(official) == set(theirs), set(official) ^ set(theirs)
        assert all(torch.equal(official[key], own[mine]) for key, mine in theirs.items())
        del official["lm_head.weight"]   # transformers leaves out the head that is tied
        loaded = load_official(official).state_dict()
        assert list(loaded) == list(own) and all(map(torch.equal, loaded.values(), own.values()))
        print(f"    {style}: {len(theirs)} names there and back")
    raises(["embedding.weight"], lambda: load_official({"fc.weight": torch.ones(2, 2)}))
    for name, weight, words in (("lm_head.weight", 1 + model.embedding.weight, ["tied"]),
                                ("backbone.layers.0.mixer.A_log", torch.ones(8), ["Mamba-1"])):
        raises(words, lambda: load_official({**official, name: weight}))
    for setting in ({"discretization": "zoh"}, {"selection": "BC"}):
        raises(setting, lambda: official_state_dict(MambaLM(13, 16, layers=1, **setting)))


def test_generation_repeats_with_its_seed_and_draws_from_the_softmax():
    """Catches: a draw without the seed, a temperature that does not divide the logits, a k off by
    one; states of another token than the one that was drawn."""
    model, tokens = language_model()
    text = list(generate(model, tokens[0], 40, temperature=0))
    print(f"    the likeliest tokens: {' '.join(map(str, text[:12]))} …")
    whole = torch.cat([tokens[0], torch.tensor(text)])
    likeliest = model(whole.unsqueeze(0))[0][0].argmax(-1)
    assert likeliest[11:-1].tolist() == text
    texts = [list(generate(model, tokens[0], 40, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    # Without layers the logits depend on the last token alone: a Markov chain, to be counted.
    chain = MambaLM(4, 8, layers=0)
    with torch.no_grad():
        chain.embedding.weight.normal_(std=1.0)
        logits = chain(torch.arange(4).unsqueeze(0))[0][0] / 2
    even = torch.full((20000, 2), 20.0, dtype=torch.bfloat16)
    drawn = sample(even, 0.1, None, torch.Generator().manual_seed(0)).float().mean().item()
    allow("bfloat16: how often one of two equal tokens is drawn, less 1/2", abs(drawn - 0.5), 0.02)
    for k in (4, 2):
        kept = logits.masked_fill(logits < logits.topk(k)[0][:, -1:], -math.inf).softmax(-1)
        text = [0, *generate(chain, torch.tensor([0]), 20000, temperature=2.0, top_k=k)]
        pairs = torch.tensor(text[:-1]) * 4 + torch.tensor(text[1:])
        counts = torch.bincount(pairs, minlength=16).view(4, 4)
        worst = (counts - counts.sum(1, keepdim=True) * kept).abs().max().item() / len(text)
        allow(f"temperature 2, top {k}: frequencies of the 16 pairs", worst, 0.01)
    for prompt, count, how, words in (
            (tokens[0, :0], 1, {}, ["prompt", "(0,)"]), ([1, 2], 1, {}, ["prompt", "tensor"]),
            (tokens[0].float(), 1, {}, ["prompt", "int64"]), (tokens[0], 1.5, {}, ["count", "1.5"]),
            (tokens[0] + 13, 1, {}, ["prompt", "0 to 12"]), (tokens[0], -1, {}, ["count", "-1"]),
            (tokens[0], 1, {"temperature": -1.0}, ["temperature"]),
            (tokens[0], 1, {"temperature": math.nan}, ["temperature", "nan"]),
            (tokens[0], 1, {"top_k": 0}, ["top_k"])):
        raises(words, lambda: list(generate(model, prompt, count, **how)))


# --------------------------------------------------------------------------------------------------
# vision.py: an image is read from both ends, and drawn from one.
#
# "Causal" and "bidirectional" are claims about what can influence what. So that is what is tested:
# change the end of the input, and see whether the beginning of the output moves.

import vision
from vision import PixelLM, VisionBlock, VisionMamba


def test_the_future_changes_the_past_when_bidirectional_and_only_then():
    """Catches: a convolution or a norm that peeks ahead, a backward branch that is not reversed."""
    torch.manual_seed(0)
    image = torch.rand(1, 1, 28, 28).double()
    darker = torch.cat([image[:, :, :20], image[:, :, 20:] / 2], 2)
    for direction, looks_ahead in (("forward", False), ("causal", False), ("bidirectional", True)):
        model = VisionMamba(16, layers=2, direction=direction).double()
        with torch.no_grad():
            read = [model.body(model.stem(i) + model.position) for i in (image, darker)]
        change = (read[0] - read[1]).abs().amax(-1).view(7, 7).amax(1)         # per row of tokens
        print(f"    {direction}: pixel rows 20 … 27 change token rows by "
              f"{' '.join(f'{c:.0e}' for c in change)}")
        early, late = change[:4].max(), change[5:].min()
        assert late > 0 and (early > 0) == looks_ahead


def test_the_vision_block_is_one_path_or_two_and_their_fusion():
    """Catches: branches exchanged, half of the sum forgotten, a branch that is gated twice."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16).double()
    directions, fusions = ("forward", "causal", "bidirectional"), ("average", "concat")
    for direction, fuse in itertools.product(directions, fusions):
        layer = VisionBlock(16, n=4, direction=direction, fuse=fuse).double()
        a, z = layer.in_proj(layer.norm(x)).split(32, -1)
        y, _ = layer.first(a)
        if direction == "causal":
            second, _ = layer.second(a)
        elif direction == "bidirectional":
            second, _ = layer.second(a.flip(1))
            second = second.flip(1)
        if direction != "forward" and fuse == "average":
            y = (y + second) / 2
        elif direction != "forward":
            y = torch.cat([y, second], -1)
        y = layer.out_proj(y * F.silu(z).repeat(1, 1, y.shape[-1] // 32))
        allow(f"{direction}, {fuse}", error(layer(x), x + y), 1e-14)


def test_a_token_sees_the_same_margin_on_all_sides_of_its_patch():
    """Catches: a stem off its centre. A scan from the other end would then see other margins, and
    the ink that moves Δ would seem to lie earlier or later than it does."""
    for kind, patch, margin in (("conv", 4, 4), ("conv", 2, 4), ("deep", 2, 8), ("patch", 4, 0)):
        stem, seen = vision.Stem(1, 16, patch, kind).double(), 0
        for seed in range(20):           # a random window has no centre, but their mean has
            torch.manual_seed(seed)
            for weight in stem.parameters():
                torch.nn.init.normal_(weight)
            images = torch.randn(1, 1, 28, 28, dtype=torch.float64, requires_grad=True)
            tokens = stem(images)                                              # (1, l, 16)
            side = 28 // patch           # tokens in a row; the one looked at is on the diagonal
            token = side // 2 * (side + 1)
            seen = seen + torch.autograd.grad(tokens[0, token].sum(), images)[0][0, 0].abs()
        rows = (seen.sum(1) > 0).nonzero().flatten()                           # of 28
        start = side // 2 * patch
        print(f"    {kind}, patch of {patch}, rows {start} … {start + patch - 1}: sees "
              f"{rows[0]} … {rows[-1]}")
        assert rows[0] == start - margin and rows[-1] == start + patch - 1 + margin
        assert torch.equal(seen.sum(0) > 0, seen.sum(1) > 0)


def test_a_compiled_model_computes_the_same():
    """Catches: a scan that torch.compile cannot go around, or that loses its gradient there."""
    (model, tokens), grads = language_model(), []
    compiled = torch.compile(model, backend="eager")       # traced, and not made into C++
    for net in (model, compiled):
        logits = net(tokens)[0]
        grads.append(torch.autograd.grad(logits.square().mean(), list(model.parameters())))
        grads[-1] = [logits, *grads[-1]]
    assert all(map(torch.equal, *grads))


def test_an_exported_model_takes_any_batch():
    """Catches: a choice of method that asks for the size of the batch, and so fixes it."""
    model, batch = VisionMamba(16, layers=1).eval(), torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        images = (torch.randn(2, 1, 28, 28),)
        exported = torch.export.export(model, images, dynamic_shapes=({0: batch},)).module()
        for b in (1, 7, 64):
            images = torch.randn(b, 1, 28, 28)
            allow(f"a batch of {b}", error(exported(images), model(images)), 1e-5)


def test_any_image_that_the_patch_divides():
    """Catches: 28×28 or one channel written into the model, a wrong pool, a position lost or given
    to another token."""
    for channels, size, pool, stem, position in ((1, (28, 28), "mean", "conv", "patches"),
                                                 (3, (32, 32), "max", "patch", "none"),
                                                 (3, (16, 24), "last", "deep", "axes")):
        model = VisionMamba(16, layers=1, image_size=size, channels=channels, pool=pool, stem=stem,
                            position=position, classes=7).double()
        images, place = torch.randn(2, channels, *size).double(), model.position
        if position == "axes":           # 4 rows of tokens, then 6 columns
            place = torch.stack([row + column for row in place[:4] for column in place[4:]])
        tokens = model.stem(images) + (0 if position == "none" else place)
        tokens = model.norm(model.body(tokens))
        pooled = {"mean": tokens.mean(1), "max": tokens.max(1).values, "last": tokens[:, -1]}[pool]
        allow(f"{channels} channels, {size} pixels, stem {stem}, position {position}, pool {pool}",
              error(model(images), pooled @ model.head.weight.t() + model.head.bias), 1e-14)
        assert model(images).shape == (2, 7) and tokens.shape[1] == size[0] * size[1] // 16


# --------------------------------------------------------------------------------------------------
# rnn.py: what came before. A comparison is worth as much as its baselines, so each of them is held
# to its own equation, and S4 to S6.

import rnn
from rnn import RNN, S4, S4Block, S4Stack, diagonal_hippo, hippo, memorize, recall


def test_the_vanilla_rnn_and_S4_are_their_equations_and_that_of_S4_is_that_of_S6():
    """Catches: a baseline that is not what it is called, two files that teach two recurrences."""
    torch.manual_seed(0)
    model, x = RNN(4, 6, layers=1), torch.randn(2, 5, 4)
    W, U, b, c = model.rnn.parameters()
    h, states = torch.zeros(2, 6), []
    for t in range(5):
        h = torch.tanh(x[:, t] @ W.t() + b + h @ U.t() + c)
        states.append(h)
    allow("h_t = tanh(W x_t + U h_{t-1} + b)", error(model(x), torch.stack(states, 1)), 1e-6)
    allow("U starts orthogonal", error(U @ U.t(), torch.eye(6)), 1e-6)
    unit = S4Block(4, n=4)
    a, gate = unit.out_proj(F.gelu(unit.s4(unit.norm(x))[0])).chunk(2, -1)
    allow("x + GLU(W GELU(S4(norm(x))))", error(unit(x)[0], x + a * gate.sigmoid()), 1e-6)
    # S4 is the equation of S6 with a complex A, and Δ, B and C constant; C also over the channels.
    layer, x = S4(3, 8).double(), torch.randn(2, 50, 3).double()
    with torch.no_grad():
        layer.C.copy_(layer.C[0].clone())
        layer.A_log.uniform_()
    A, delta = torch.complex(-layer.A_log.exp(), layer.omega), layer.log_dt.exp()
    B, C = (torch.view_as_complex(t).expand(2, 50, 4) for t in (layer.B, layer.C[0]))
    y, _ = definition(x, delta.expand(2, 50, 3), A, B, C, discretization="zoh")
    allow("y = 2 Re(C h) + D x", error(layer(x)[0], 2 * y.real + layer.D * x), 1e-12)


def test_the_state_of_hippo_reconstructs_the_past():
    """Catches: a matrix with a sign or a root gone wrong, a polynomial on the wrong interval."""
    root = math.sqrt
    A = torch.tensor([[1, 0, 0], [root(3), 2, 0], [root(5), root(15), 3]], dtype=torch.float64)
    allow("A, for n = 3", error(torch.tensor(hippo(3)[0]), -A), 1e-15)
    x, now = rnn.signal(1000), (torch.arange(1000).double() + 0.5) / 1000
    for n, low, high in ((4, 0.9, 1.1), (16, 0.3, 0.7), (32, 0.0, 0.04)):
        past = recall(memorize(x, n)[-1], now.numpy())
        rms = ((past - x) ** 2).mean() ** 0.5 / (x ** 2).mean() ** 0.5
        print(f"    {n} numbers recall 1,000 samples of 8 waves with an error of {rms:.3f}")
        assert low <= rms <= high


def test_S4_as_a_convolution_is_S4_as_a_recurrence_wherever_it_is_cut():
    """Catches: a kernel that is a token late, an FFT that wraps around, a state left behind."""
    torch.manual_seed(0)
    stack, x = S4Stack(6, layers=2, n=64).double(), torch.randn(2, 784, 6).double()
    exact, last = through(stack.layers, x, mode="recurrence")
    allow("two layers, 784 tokens", error(stack(x), exact), 1e-12)
    for cut in (1, 500, 783):
        first, states = through(stack.layers, x[:, :cut])
        second, states = through(stack.layers, x[:, cut:], states)
        allow(f"cut at {cut}: y", error(torch.cat([first, second], 1), exact), 1e-12)
        allow(f"cut at {cut}: the last state", max(map(error, states, last)), 3e-12)
    layer, x = S4(64, 92), torch.randn(2, 784, 64)
    for l in (1, 2, 3, 10, 784):         # the angles ω Δ l are thousands of turns
        ours, exact = (layer(x[:, :l], mode=mode)[0] for mode in rnn.MODES)
        allow(f"one layer of 64 channels, n = 92, l = {l}, float32", error(ours, exact), 2e-5)
    assert layer(x, return_state=False)[1] is None


def test_S4_computes_in_float32_whatever_its_weights_are():
    """Catches: a model in half precision that ends in an error about complex numbers."""
    torch.manual_seed(0)
    layer, x = S4Block(16, n=8), torch.randn(2, 9, 16)
    whole, _ = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)
        for mode in rnn.MODES:
            y, h = half(x.to(dtype), mode=mode)
            assert y.dtype == dtype and h.dtype == torch.complex64
            allow(f"{dtype}, {mode}", error(y, whole), 0.02)


def test_S4_starts_from_the_normal_part_of_hippo():
    """Catches: eigenvectors of other eigenvalues, half of the pairs, Δ in another range."""
    n = 16
    (A, B), (modes, b) = map(torch.tensor, hippo(n)), map(torch.tensor, diagonal_hippo(n))
    P = (torch.arange(n).double() + 0.5).sqrt()
    for t in (0.1, 1.0, 3.0):            # Bᵀ exp(t (A + P Pᵀ)) B, in both bases; b is V* B/2
        whole = B @ torch.matrix_exp(t * (A + torch.outer(P, P))) @ B
        pairs = 2 * (4 * b.abs() ** 2 * torch.exp(t * modes)).sum().real
        allow(f"Bᵀ exp({t} N) B", error(pairs, whole), 1e-12)
    layer = S4(4096, n)
    assert torch.equal(layer.omega[0], modes.imag.float()) and (layer.A_log.exp() == 0.5).all()
    assert torch.equal(layer.B, torch.view_as_real(b.to(torch.complex64)))
    steps = layer.log_dt.exp()
    print(f"    Δ from {steps.min():.4f} to {steps.max():.4f}, median {steps.median():.4f}")
    assert 1e-3 <= steps.min() < 1.1e-3 and 0.009 < steps.median() < 0.011 and steps.max() > 0.09


def test_a_pixel_is_guessed_from_those_before_it_and_drawn_one_by_one():
    """Catches: a model that sees the pixel it guesses, a state that is not carried on, a pixel or
    a place that is taken for another."""
    torch.manual_seed(0)
    model = PixelLM([], 8, (4, 5)).double()
    tokens = torch.tensor([[vision.BEGIN, *range(19)]])    # pixel i of the image is i
    for i, logits in enumerate(model(tokens)[0]):  # without blocks: the last pixel and the place
        before = model.embedding.weight[i - 1 if i else 256]
        x = before + model.position[i // 5] + model.position[4 + i % 5]
        assert error(logits, model.head(model.norm(x))) < 1e-12, i
    for layers in ([MambaBlock(8), MambaBlock(8)], [S4Block(8, n=4), S4Block(8, n=4)]):
        model = PixelLM(layers, 8, (3, 4))
        torch.nn.init.normal_(model.head.weight)   # far from even chances
        for given in (0, 3):
            begun = torch.arange(48).view(16, 3)[:, :given]
            pixels = vision.complete(model, begun, 12, seed=3)
            # The whole image in one call gives the chances that every draw must have had.
            chances = model(F.pad(pixels[:, :-1], (1, 0), value=vision.BEGIN)).softmax(-1)
            generator = torch.Generator().manual_seed(3)
            drawn = [torch.multinomial(chances[:, i], 1, generator=generator)
                     for i in range(given, 12)]
            equal(f"{type(layers[0]).__name__}, {given} of 12 pixels given", pixels,
                  torch.cat([begun, *drawn], 1))


def test_models_run_on_the_device_of_their_weights():
    """Catches: a tensor that is made on the CPU in the middle of a model on a GPU.

    Fake tensors have a device and a shape, and no values: so no GPU is needed.
    """
    with FakeTensorMode(), torch.device("cuda"):
        tokens, mask = torch.zeros(2, 50, dtype=torch.long), torch.ones(2, 50, dtype=torch.bool)
        model, image = MambaLM(65), torch.zeros(2, 1, 28, 28)
        outputs = [model(tokens, model(tokens)[1], mask)[0], VisionMamba()(image),
                   S4Stack(64, 2)(torch.zeros(2, 100, 64))]
        for layer in (MambaBlock(16), S4Block(16, 8)):
            writer = PixelLM([layer], 16)
            outputs.append(writer.read(tokens[:, :1], writer.read(tokens)[1])[0])
        x, A, B = torch.rand(2, 49, 8), -torch.rand(16, 8), torch.rand(2, 49, 16)
        ctx = SimpleNamespace(save_for_backward=lambda *t: setattr(ctx, "saved_tensors", t))
        with torch.no_grad():            # the scan and its gradient, cut as on a GPU
            y, h = s6._Scan.forward(ctx, x, x, A, B, B, torch.zeros(2, 16, 8), 7, False)
            outputs += [t for t in s6._Scan.backward(ctx, y, h) if t is not None]
    print(f"    {len(outputs)} outputs and gradients, all on {outputs[0].device}")
    assert all(output.device.type == "cuda" for output in outputs)


class Calls(TorchDispatchMode):
    """Counts the operations that PyTorch runs in here, but for views and new empty tensors."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)     # an in-place operation writes
        self.count += not is_view and "empty" not in function.name()
        return function(*args, **(kwargs or {}))


def test_the_calls_of_a_scan_cut_as_on_a_GPU_hardly_grow_with_its_length():
    """Catches: pieces longer than about log₂ l tokens: each of these costs 27 launches."""
    for l, most in ((49, 260), (784, 450), (2048, 550), (16384, 650), (65536, 750)):
        x, delta, A, B, C, _ = s6._random_inputs(1, l, 8, 16)
        with Calls() as calls:
            k = s6._short_pieces(l, 8 * 16)
            y, _ = s6._Scan.apply(x, delta, A.t(), B, C, x.new_zeros(1, 16, 8), k, False)
            torch.autograd.grad(y, (x, delta, A, B, C), y)
        print(f"    {l} tokens: {calls.count} calls with the gradient, {most} allowed")
        assert calls.count <= most


def test_weight_decay_spares_what_has_no_business_at_zero():
    """Catches: decay on A_log, D, biases, norms, positions, frequencies; or no decay at all."""
    for model in (VisionMamba(16, layers=1), S4(4)):
        groups = decayed, spared = parameter_groups(model, 0.1)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
        for name, p in model.named_parameters():
            matrix = p.ndim > 1 and name.endswith(("weight", "C"))
            assert [any(p is q for q in group["params"]) for group in groups] == [
                matrix, not matrix], name
        print(f"    {len(decayed['params'])} tensors decay, {len(spared['params'])} do not")


def test_every_documented_error_of_the_models_is_raised():
    """Catches: an image cropped in silence, a misspelt option taken for the default."""
    raises(["patch", "30x28"], lambda: VisionMamba(16, image_size=(30, 28)))
    raises(["patch", "2 or 4", "7"], lambda: VisionMamba(16, patch=7))
    for option in ("direction", "fuse", "pool", "stem", "position"):
        raises([option, "one of", "typo"], lambda: VisionMamba(16, **{option: "typo"}))
    for option in ("discretization", "selection"):
        raises([option, "one of", "typo"], lambda: MambaLM(5, **{option: "typo"}))
    for layer in (ConvS6(6, 4), Mamba(6, 4), MambaBlock(6, 4), VisionBlock(6, 4), RNN(6, 5),
                  S4(6, 4), S4Block(6, 4)):
        raises([type(layer).__name__, "(b, l, 6)"], lambda: layer(torch.randn(2, 9, 5)))
    raises(["even", "7"], lambda: S4(4, 7))
    raises(["mask", "(2, 9)", "(1, 9)"], lambda: S6(6)(torch.randn(2, 9, 6), mask=torch.ones(1, 9)))
    writer = PixelLM([MambaBlock(8)], 8, (3, 4))
    raises(["13 tokens", "3x4"], lambda: writer(torch.zeros(1, 13, dtype=torch.int64)))
    raises(["28x28", "(1, 1, 32, 32)"], lambda: VisionMamba(16)(torch.randn(1, 1, 32, 32)))
    raises(["(b, 1, height, width)"], lambda: VisionMamba(16)(torch.randn(1, 3, 28, 28)))


# --------------------------------------------------------------------------------------------------
# train_mnist.py and train_shakespeare.py, on good days.
#
# A training script is right if every step is what the recipe says, if whatever is drawn is a
# function of seed and step, and if it measures what it says. All of this is seen from outside: the
# scripts are run, in this process, small enough to take a second.

from pathlib import Path

from PIL import Image, ImageChops

from torchvision.transforms.functional import to_pil_image

import train_mnist
import train_shakespeare
from train_mnist import (RECIPES, ROWS, build, load_folder, read_image, seed_for,
                         synthetic_digits, warp)
from train_shakespeare import as_text, stream_loss

CPU = torch.device("cpu")
SMALL = "--epochs 2 --batch 32 --d-model 16 --layers 1"
DIGITS = f"train_mnist.py --data synthetic {SMALL}"
OWN = f"train_mnist.py --dataset grey {SMALL} --patch 3 --stem patch --batch 12"
TEXT = ("train_shakespeare.py --text poem.txt --epochs 2 --batch 4 --block 16 --d-model 16 "
        "--layers 2")
HELP = "train_shakespeare.py --quick --batch 64 --block 256 --d-model 16 --layers 1"
PREDICT = "train_mnist.py --predict"
IMAGES = "checkpoints/grey-bidirectional-seed0.pt"         # what OWN saves
LANGUAGE = "checkpoints/text_poem-seed0.pt"                # what TEXT saves
POEM = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. "


@functools.lru_cache
def digits(train=256, test=200):
    """Synthetic digits, made once."""
    return synthetic_digits(train, test)


def module_of(line):
    """The module of a command."""
    return sys.modules[line.split(".py")[0]]


def recipe_of(line):
    """The recipe of a command."""
    _, *flags = line.split()
    _, recipe = module_of(line).parse(flags)
    return recipe


def trained(line, data, **changes):
    """Train a tiny model, 8 or 13 steps an epoch: -> its recipe, and what `train` returns."""
    recipe = recipe_of(line) | changes
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet:
        run = module_of(line).train(recipe, data, CPU, f"{folder}/a.pt", False)
    return recipe, run


def learned(path):
    """Weights, averages, losses and scores of a checkpoint in one vector, but not its seconds."""
    saved = torch.load(path)
    losses = [row[:2] for row in saved["log"]]
    tensors = [torch.tensor(losses), torch.tensor(saved["scores"])]
    tensors += [*saved["model"].values(), *saved["average"].values()]
    return torch.cat([t.double().flatten() for t in tensors])


def averaged(path, data):
    """A model of train_mnist.py with the averaged weights of its checkpoint, and its task."""
    saved = torch.load(path)
    model, task = build(saved["recipe"], data)
    model.load_state_dict(saved["average"])
    return model, task


def has_weights(model, weights):
    """The model has these weights, to the last bit."""
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def count(module):
    """How many parameters there are in a module."""
    return sum(p.numel() for p in module.parameters())


@contextlib.contextmanager
def folder_with_data():
    """In here, the working folder is a new one, and holds a text, and images of an odd size.

    poem.txt, and the folders grey and colour: 48 images of 9×15 to train with, 24 to test. The
    first pixel of image i is i, its class i % 3. -> {folder: images (72, c, 9, 15)}
    """
    here, folders = os.getcwd(), {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name, channels in (("grey", 1), ("colour", 3)):
                images = torch.randint(256, (72, channels, 9, 15), dtype=torch.uint8)
                images[:, :, 0, 0] = torch.arange(72).unsqueeze(1)
                folders[name] = images
                for i, image in enumerate(images):
                    part = "train" if i < 48 else "test"
                    place = Path(name, part, "abc"[i % 3])
                    place.mkdir(parents=True, exist_ok=True)
                    to_pil_image(image).save(place / f"{i:02d}.png")
            Path("poem.txt").write_text(20 * POEM, encoding="utf-8")
            yield folders
        finally:
            os.chdir(here)


def command(line):
    """`python SCRIPT --flags`, in this process: -> exit code or last message, what it printed.

    A mistake is a SystemExit whose code is the message. argparse ends with code 2, and has printed
    its message to stderr. All commands run on the CPU, where a run repeats bit for bit.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", line.split()),
        patch.object(os, "_exit", sys.exit),
        patch.object(torch.cuda, "is_available", lambda: False),
        patch.object(train_mnist, "synthetic_digits", digits),
    ):
        try:
            code = module_of(line).main() or 0
        except SystemExit as stop:
            code = stop.code
    if code == 2:
        code = err.getvalue().strip().splitlines()[-1]
    return code, out.getvalue()


def runs(line):
    """The command ends well: -> what it printed, a dictionary for each of its RESULT lines."""
    code, printed = command(line)
    assert code == 0, code
    rows = []
    for result in printed.splitlines():
        if result.startswith("RESULT"):
            pairs = result.split()[1:]
            rows.append(dict(pair.split("=", 1) for pair in pairs))
    return printed, rows


def answers(line, *words):
    """The command ends with one line, which names the script and has all of the words."""
    message, _ = command(line)
    print(f"    {message}")
    script = line.split()[0]
    assert str(message).startswith(f"{script}: "), (line, message)
    assert "\n" not in message
    for word in words:
        assert word in message, (message, word)


def table(name):
    """The rows of results/<name>.csv."""
    text = Path(f"results/{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def in_table(name, rows, line):
    """results/<name>.csv has these RESULT lines and no others, and the command of each."""
    for row, kept in zip(rows, table(name), strict=True):
        assert row.items() <= kept.items()
        assert kept["command"] == f"python {line}"


# Where files of a kind are written, and how many bytes they have at least if they are not empty.
KINDS = {"csv": ("results", 100), "png": ("figures", 10_000), "pt": ("checkpoints", 1000)}


def wrote(name, endings):
    """Tables, figures and checkpoints of that name and these endings are there, and not empty."""
    for ending in endings.split():
        _, kind = ending.split(".")
        folder, least = KINDS[kind]
        path = f"{folder}/{name}{ending}"
        assert os.path.getsize(path) > least, path


def test_all_models_of_a_table_have_one_budget_and_begin_with_a_blind_guess():
    """Catches: a comparison of a large model with a small one; an initialisation that is sure of
    itself before it has seen anything."""
    for name in ("mnist", "pixels", "next-pixel", "cifar10"):  # the poster's differ on purpose
        sizes = {}
        for row, changes in ROWS[name].items():
            recipe = RECIPES[name] | changes
            torch.manual_seed(0)
            model, task = build(recipe, digits())
            # a PixelLM's embedding and head are the same for both, and no part of the comparison
            compared = model.blocks if name == "next-pixel" else model
            sizes[row] = count(compared)
            if name == "mnist":
                loss, _ = train_mnist.evaluate(model, task, digits())
                allow(f"{row}: loss - ln 10", abs(loss - math.log(10)), 0.5)
        print(f"    {name}: {sizes}")
        assert max(sizes.values()) < 1.0101 * min(sizes.values())
        if "bidirectional" in sizes:
            assert sizes["bidirectional"] == sizes["causal"]


def test_images_of_any_size_come_from_a_folder_in_batches_each_once_an_epoch():
    """Catches: 28×28, 10 classes or MNIST's mean written into the script, colours and rows mixed
    up, labels of other images, an epoch without half of them, an order that repeats."""
    def places(x, labels):
        """Where these images stand among all, by their first pixel."""
        found = x[:, 0, 0, 0].long()
        assert torch.equal(x, images[found].to(x.dtype))
        assert torch.equal(labels, found % 3)
        return found.tolist()

    recipe = RECIPES["mnist"] | {"augment": "none", "batch": 12}
    with folder_with_data() as folders:
        for name, images in folders.items():
            data = load_folder(name, 0)
            tested = places(data.test_images, data.test_labels)
            assert sorted(tested) == list(range(48, 72))
            shown, _ = train_mnist.classification(data).prepare(data.test_images, None)
            mean = images[:48].double().mean((0, 2, 3), keepdim=True)
            std = images[:48].double().std((0, 2, 3), keepdim=True)
            exact = (images[tested] - mean) / std
            allow("images as a model sees them", error(shown, exact), 3e-4)

            orders = set()
            for seed, epoch in itertools.product(range(2), range(2)):
                order = []
                for step in range(4 * epoch, 4 * epoch + 4):
                    x, labels = train_mnist.batch(recipe | {"seed": seed}, data, step)
                    order += places(x, labels)
                assert sorted(order) == list(range(48))
                orders.add(tuple(order))
            assert len(orders) == 4      # two epochs of two seeds
            in_order, _ = data.train_labels.sort()
            assert not torch.equal(data.train_labels, in_order)    # mixed, for --limit

            _, (row,) = runs(f"{OWN} --dataset {name}")
            assert row["dataset"] == name
            weights = torch.load(f"checkpoints/{name}-bidirectional-seed0.pt")["model"]
            assert weights["head.weight"].shape == (3, 16)
            assert weights["stem.net.weight"].shape == (16, images.shape[1], 3, 3)
        assert load_folder("grey", 8).train_images.shape == (48, 1, 8, 8)


def test_an_image_is_read_as_a_person_sees_it_or_refused_by_name():
    """Catches: black ink on transparent paper that becomes all black, strokes of one-bit images
    that vanish in resizing, photographs that lie on their side, values that are cut off."""
    ink = Image.new("L", (20, 10), 255)                    # white paper; black ink on the left
    ink.paste(0, (0, 0, 10, 10))
    black = Image.new("L", (20, 10))
    clear = Image.merge("LA", (black, ImageChops.invert(ink)))     # black ink, transparent paper
    palette = ink.convert("P")
    clear_palette = palette.copy()
    clear_palette.putpalette(256 * [0, 0, 0])
    turned = ink.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x112] = 6                                        # shown turned by 90° to the right
    cases = [
        ("grey.png", ink, {}),
        ("la.png", clear, {}),
        ("rgba.png", clear.convert("RGBA"), {}),
        ("one_bit.png", ink.resize((200, 100)).convert("1"), {}),
        ("palette.png", palette, {}),
        ("palette_clear.png", clear_palette, {"transparency": 255}),
        ("exif.png", turned, {"exif": exif}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, image, how in cases:
            path = f"{folder}/{name}"
            image.save(path, **how)
            pixels = read_image(path, (10, 20))
            assert pixels.shape == (3, 10, 20)
            left = pixels[..., :10].float().mean()
            right = pixels[..., 10:].float().mean()
            print(f"    {name}: {left:.0f} on the left, {right:.0f} on the right")
            assert left < 30 and right > 225

        for name, mode in (("float.tiff", "F"), ("deep.png", "I;16")):
            path = f"{folder}/{name}"
            Image.new(mode, (4, 4)).save(path)
            raises([name, "8 bits"], lambda: read_image(path))


def test_hidden_files_are_no_images_and_hidden_folders_no_classes():
    """Catches: .ipynb_checkpoints as a class; a class that is missing in one part, unnamed; own
    images that pass for MNIST."""
    def fingerprint():
        data = load_folder("grey", 0)
        return train_mnist.facts_of(data)["fingerprint"]

    with folder_with_data():
        before = fingerprint()
        os.mkdir("grey/train/.ipynb_checkpoints")
        os.mkdir("grey/test/a/.thumbnails")
        for hidden in ("._0.png", ".thumbnails/0.png"):
            Path("grey/test/a", hidden).write_text("no image")
        assert fingerprint() == before
        os.rename("grey/test/b", "grey/test/new")
        raises(["same classes", "b, new"], lambda: load_folder("grey", 0))
        for own in ("mnist", "MNIST", "synthetic-digits-quick"):
            os.rename("colour", own)
            assert load_folder(f"./{own}", 0).name == f"own-{own}"
            os.rename(own, "colour")


def test_a_trained_model_tells_the_classes_of_pictures():
    """Catches: a prediction without the normalisation of the training, or by other class names."""
    with folder_with_data():
        runs(OWN)
        printed, _ = runs(f"{PREDICT} grey/test --checkpoint {IMAGES}")
        data = load_folder("grey", 0)
        model, task = averaged(IMAGES, data)
    inputs, _ = task.prepare(data.test_images, None)
    chances, guesses = model(inputs).softmax(-1).max(-1)
    lines = printed.splitlines()
    print(f"    {lines[0]}")
    for line, chance, guess in zip(lines, chances, guesses, strict=True):
        assert f": {'abc'[guess]} {100 * chance:.1f} %," in line, line


def test_each_image_is_warped_or_shifted_and_mirrored_by_an_amount_of_its_own():
    """Catches: channels that move apart, a crop from the wrong image, one warp for all of a batch,
    a warp that moves what it should not."""
    # No two pixels are equal, so there is one way at most to get from an image to what came out.
    images = torch.arange(1, 1 + 6 * 3 * 32 * 32).float().view(6, 3, 32, 32)
    torch.manual_seed(0)
    ways = []
    for image, out in zip(images, train_mnist.shift_and_flip(images)):
        padded = F.pad(image, (2,) * 4, mode="reflect")
        for top, left in itertools.product(range(5), range(5)):
            window = padded[:, top:top + 32, left:left + 32]
            if torch.equal(out, window):
                ways.append((top, left, "as it is"))
            if torch.equal(out, window.flip(2)):
                ways.append((top, left, "mirrored"))
    assert len(ways) == 6 and len(set(ways)) > 3
    assert len({how for _, _, how in ways}) == 2

    spots = torch.zeros(400, 1, 28, 28)
    spots[..., 12:16, 12:16] = 1                   # 4×4 pixels in the middle
    allow("no warp", error(warp(spots, 0, 0, 0, 0), spots), 1e-4)
    moved = warp(spots, 0, 0, 0, 2).squeeze(1)
    rows = torch.arange(28.0) - 13.5
    down = (moved.sum(2) * rows).sum(1) / moved.sum((1, 2))        # of the centre of each
    print(f"    moved down by {down.min():.2f} … {down.max():.2f} pixels")
    assert -2.01 < down.min() < -1.9
    assert 1.9 < down.max() < 2.01

    # A turn stays a turn if 56×28 pixels are turned, scaled, or sheared.
    tall = F.pad(spots, (0, 0, 14, 14))
    for amounts in ((45, 0, 0, 0), (0, 0.2, 0, 0), (0, 0, 20, 0)):
        square = warp(spots, *amounts, generator=torch.Generator())
        high = warp(tall, *amounts, generator=torch.Generator())
        first, second = square[:2]
        assert error(first, spots[0]) > 0.01
        assert error(first, second) > 0.01
        difference = error(square[:, :, 1:-1], high[:, :, 15:-15])
        allow(f"tall images, warped by {amounts}", difference, 1e-4)


# What `train` must do, without saving and stopping. For both kinds of data the loop is the same;
# they differ in the loss of a step, and in the scores.

def plain_rate(recipe, part):
    """Up in a line over the first tenth of the steps, then down in a cosine."""
    if recipe.get("schedule") == "constant":
        return recipe["lr"]
    if part < 0.1:
        return recipe["lr"] * part / 0.1
    return recipe["lr"] * (1 + math.cos(math.pi * (part - 0.1) / 0.9)) / 2


def plain_loop(recipe, steps, model, draws, loss_of):
    """Train the model on loss_of(step): -> averaged model, losses. draws: what chance decides."""
    average = copy.deepcopy(model).requires_grad_(False)
    groups = parameter_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        torch.manual_seed(seed_for(recipe["seed"], draws, step))
        loss = loss_of(step)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.get("clip", 1.0))
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(recipe, (step + 1) / steps)
        optimizer.step()
        decay = min(recipe["average"], (1 + step) / (10 + step))
        for mean, weight in zip(average.parameters(), model.parameters()):
            mean.data = decay * mean + (1 - decay) * weight.data
    return average, losses


def plain_images(recipe, data, steps):
    """Train to classify: -> averaged model, losses, last scores."""
    def normalised(images):
        return (images / 255 - data.mean) / data.std

    def loss_of(step):
        x, y = train_mnist.batch(recipe, data, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe["bf16"]):
            logits = model(normalised(x)).float()
        return F.cross_entropy(logits, y, label_smoothing=recipe["smoothing"])

    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    model, _ = build(recipe, data)
    average, losses = plain_loop(recipe, steps, model, "warp", loss_of)
    logits, labels = average(normalised(data.test_images)), data.test_labels
    nats = F.cross_entropy(logits, labels)
    right = (logits.argmax(1) == labels).double()
    return average, losses, [nats, 100 * right.mean()]


def plain_text(recipe, text, steps):
    """Train to write, 13 steps an epoch: -> averaged model, losses, last scores."""
    states = [None] * 4

    def loss_of(step):
        x, y = train_shakespeare.batch(recipe, text, step)
        forgets = torch.rand(4) < recipe["forget"]
        rows = []
        for i in range(4):               # row by row, each from its own state or from none
            begins = forgets[i] or step % 13 == 0
            logits, after = model(x[i:i + 1], None if begins else states[i])
            states[i] = [block.State(*(t.detach() for t in state)) for state in after]
            rows.append(logits[0])
        return F.cross_entropy(torch.cat(rows), y.flatten())

    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    model = MambaLM(len(text.vocabulary), recipe["d_model"], recipe["layers"])
    average, losses = plain_loop(recipe, steps, model, "forget", loss_of)
    x, y = text.valid[:-1], text.valid[1:]
    scores = []
    for size in (len(x), 16):            # streaming, and in blocks
        rows = []
        for part in x.split(size):
            logits, _ = average(part.unsqueeze(0))
            rows.append(logits[0])
        scores.append(F.cross_entropy(torch.cat(rows), y))
    return average, losses, scores


def test_a_training_is_this_plain_loop_and_its_score_that_of_all_test_data():
    """Catches: a schedule that is not followed, gradients that are not clipped, weight decay on all
    parameters, an average of other weights or with another decay, a batch or a seed of another
    step; a setting that is recorded and does nothing; states that are lost, or carried into the
    next epoch; rows that never forget, or all at once; a score that is a mean of unequal parts."""
    # The test images are 256: two parts of 125, and six.
    x, y = digits().train_images, digits().train_labels
    images = digits()._replace(
        train_images=x[:128], train_labels=y[:128], test_images=x, test_labels=y)
    poem = as_text("poem", 12 * POEM)
    settings = [
        {}, {"epochs": 5}, {"augment": "none"}, {"augment": "shift-flip"},
        {"pool": "last"}, {"fuse": "concat"}, {"position": "axes"}, {"stem": "patch"},
        {"smoothing": 0.1, "bf16": True},
        {"seed": 1, "average": 0.0, "schedule": "constant", "clip": 0.1},
    ]
    cases = [(DIGITS, images, {"epochs": 1} | changes) for changes in settings]
    cases.append((TEXT, poem, {"seed": 1, "forget": 0.3, "average": 0.65}))
    # The poem ends in 97 guesses: neither blocks of 16 nor these pieces of 32 divide them.
    pieces = functools.partial(stream_loss, piece=32)
    outcomes = set()
    for line, data, changes in cases:
        with patch.object(train_shakespeare, "stream_loss", pieces):
            recipe, run = trained(line, data, lr=0.02, weight_decay=0.3, **changes)
        plainly = plain_images if data is images else plain_text
        average, losses, scores = plainly(recipe, data, len(run.log))
        log, ends = torch.tensor(run.log), torch.tensor(run.scores[-1])
        worst = max(
            error(log[:, 0], torch.tensor(losses)),
            error(ends, torch.tensor(scores)),
            *map(error, run.average.parameters(), average.parameters()),
        )
        allowed = 1e-5 if data is images else 1e-4         # a text is read row by row
        allow(f"{changes}: losses, scores, weights", worst, allowed)
        outcomes.add(run.scores[-1])
    assert len(outcomes) == len(cases)   # every setting makes a difference
    draws = itertools.product(range(2), ("warp", "order"), range(2))
    assert len({seed_for(*draw) for draw in draws}) == 8


def test_an_epoch_reads_every_character_once_and_each_batch_goes_on_where_the_last_one_stopped():
    """Catches: rows at other places in the text, characters that nobody reads, targets off by one,
    epochs that all begin at the same place."""
    # Every character of this text is another one, so each says where it stands.
    letters = as_text("letters", "".join(map(chr, range(65, 1065))))
    recipe, firsts = recipe_of(TEXT), set()
    for epoch, seed in itertools.product(range(2), range(2)):
        seen = []
        for step in range(14 * epoch, 14 * epoch + 14):
            x, y = train_shakespeare.batch(recipe | {"seed": seed}, letters, step)
            assert x.shape == (4, 16)
            assert torch.equal(y, (x + 1) % 900)
            if seen:
                last = seen[-1][:, -1]
                assert torch.equal(x[:, 0], (last + 1) % 900)
            seen.append(x)
        assert torch.cat(seen).unique().numel() == 14 * 64
        firsts.add(seen[0][0, 0].item())
    assert len(firsts) == 4              # two epochs of two seeds


def test_digits_are_learned():
    """Catches: labels that are not the images', warps that destroy them, a gradient that misses a
    layer, a recipe that fails."""
    _, run = trained(DIGITS, digits(2400, 400), epochs=4, d_model=32, lr=6e-3)
    accuracies = [percent for _, percent in run.scores]
    print(f"    accuracy after each epoch: {accuracies}")
    assert accuracies[-1] > 60


def test_what_is_held_out_is_not_trained_on():
    """Catches: a choice of settings on images that were trained on, or on the test images."""
    x, test_x = digits().train_images, digits().test_images
    for flags, name, train, test in (
        ("--holdout 50", "-holdout", x[:206], x[206:]),
        ("--limit 64", "-limit-64", x[:64], test_x),
        ("--holdout 50 --limit 64", "-holdout-limit-64", x[:64], x[206:]),
    ):
        args, _ = train_mnist.parse(flags.split())
        data = train_mnist.shrink(digits(), args)
        assert data.name == f"synthetic-digits{name}"
        equal(f"{data.name}: training images", data.train_images, train)
        equal(f"{data.name}: test images", data.test_images, test)
        assert len(data.train_labels) == len(train)
        assert len(data.test_labels) == len(test)


def test_a_training_that_is_killed_anywhere_and_resumed_ends_in_the_same_weights():
    """Catches: a checkpoint without the optimizer, the average, the order of the images, or the
    states that a language model carries from batch to batch; half a checkpoint, written over the
    last good one; a forgotten --resume that costs a run."""
    def dies_saving(checkpoint, file):   # the process ends in the middle of a save
        file.write(b"half of it")
        raise KeyboardInterrupt

    for line, path in ((OWN, IMAGES), (TEXT, LANGUAGE)):   # of 8 and of 44 steps
        script = module_of(line)
        batch = script.batch

        def dies(recipe, data, step):    # the process ends at the beginning of a step
            if step == last:
                raise KeyboardInterrupt
            return batch(recipe, data, step)

        with folder_with_data(), patch.object(script, "SAVE_EVERY", 3):
            runs(line)
            whole = learned(path)
            for last in (0, 1, 4, 7):
                with patch.object(script, "batch", dies):
                    assert command(line)[0] == 130
                steps_lost = last - len(torch.load(path)["log"])
                assert 0 <= steps_lost < 3
                equal("the first run, set aside", learned(f"{path}.old"), whole)
                with patch.object(torch, "save", dies_saving):
                    assert command(f"{line} --resume")[0] == 130
                assert not list(Path("checkpoints").glob("*part*"))
                for what in ("resumed", "resumed where nothing is left"):
                    runs(f"{line} --resume")
                    equal(f"{path}, killed in step {last}, {what}",
                          learned(path), whole)


def test_a_training_goes_on_with_the_same_images_wherever_they_are():
    """Catches: a data set that is known by its path or its size, labels that mean other classes."""
    def rename_class(old, new):
        for part in ("train", "test"):
            os.rename(f"moved/{part}/{old}", f"moved/{part}/{new}")

    resume = f"{OWN} --name n --resume --dataset moved"
    refusal = "checkpoints/n-", "made with dataset"
    with folder_with_data():
        runs(f"{OWN} --name n")
        os.rename("grey", "moved")
        runs(resume)
        rename_class("c", "d")
        answers(resume, *refusal)
        rename_class("d", "c")
        other = Path("moved/train/a/03.png").read_bytes()
        Path("moved/train/a/00.png").write_bytes(other)
        answers(resume, *refusal)


def run_by_two(line):
    """The command under torchrun, by two processes."""
    here = os.path.dirname(os.path.abspath(__file__))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    script, *flags = line.split()
    arguments = [sys.executable, *torchrun, os.path.join(here, script), *flags]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        arguments, env=os.environ | settings, capture_output=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("RESULT") == 1, ended.stdout


def test_two_processes_equal_one():
    """Catches: a batch that is not shared out, gradients that are summed and not averaged."""
    def largest_difference(key):         # of the losses, which stand first in each row
        rows = zip(by_two[key], by_one[key], strict=True)
        return max(abs(ours[0] - others[0]) for ours, others in rows)

    with folder_with_data():
        for line, path in ((f"{OWN} --position none", IMAGES), (TEXT, LANGUAGE)):
            run_by_two(line)
            by_two = torch.load(path)
            runs(line)
            by_one = torch.load(path)
            # Halves of a batch have the same mean gradient as the whole, but for rounding.
            allow(f"{path}: losses after an epoch", largest_difference("scores"), 5e-5)
            # But each process has logged the loss of its own half.
            assert largest_difference("log") > 1e-3


# Each script from end to end, by the commands that people type.

def test_the_files_of_models_measure_and_write_their_tables_and_figures():
    """Catches: a column that is gone, after minutes of measuring."""
    def short(b, l, d, n):               # as s6.py does it, but with less to measure
        return random_inputs(b, min(l, 32), d, n)

    random_inputs = s6._random_inputs
    with (
        folder_with_data(),
        patch.object(rnn, "_measure", lambda *_: 0.01),
        patch.object(s6, "_random_inputs", short),
        patch.object(block, "SIZES", {"small": (65, 8, 1, (2, 16))}),
    ):
        tables = ("s6", "scan_scaling", 21), ("rnn", "s4_modes", 3), ("block", "peers", 1)
        for file, name, least in tables:
            runs(f"{file}.py")
            rows = table(name)
            print(f"    {name}: {len(rows)} rows")
            assert len(rows) >= least
        wrote("scan_scaling", ".png")
        wrote("hippo", ".png")


def test_every_row_and_seed_of_a_comparison_is_in_its_table():
    """Catches: a comparison that fails at its last line, after hours; a setting in no row; a row
    that is trained with the settings of another."""
    line = f"{DIGITS} --compare --seeds 0 1 --name t --fuse concat"
    with folder_with_data():
        printed, rows = runs(line)
        print("    " + "\n    ".join(printed.splitlines()[-6:]))
        in_table("t", rows, line)
        wrote("t", ".csv .png")
        assert "differ by more than 2 % in size" in printed
        assert [row["model"] for row in rows] == 2 * list(ROWS["mnist"])
        assert all("fuse=concat" in row["recipe"] for row in rows)
        accuracies = torch.tensor([float(row["test_accuracy"]) for row in rows])
        by_seed = accuracies.double().view(2, -1)
        for gained in by_seed.diff(dim=1).unbind(1):
            assert f"| {gained.mean():.2f} ± {gained.std():.2f} |" in printed
        last = rows[-1]
        saved = torch.load(f"checkpoints/t-{last['model']}-seed1.pt")
        assert last["seed"] == "1"
        assert last["model"] == saved["recipe"]["model"]
        assert last["test_accuracy"] == f"{saved['scores'][-1][1]:.2f}"
        runs(f"{line} --resume")
        assert not list(Path("checkpoints").glob("*old*"))         # none began anew

        poster = "poster --compare --models rnn forward-3e-4 --data synthetic --name p"
        runs(f"train_mnist.py {poster} {SMALL}")
        wrote("p", ".csv .png")
        recipe = torch.load("checkpoints/p-forward-3e-4-seed0.pt")["recipe"]
        assert recipe.items() >= ROWS["poster"]["forward-3e-4"].items()


def test_the_next_pixel_is_measured_in_bits_and_the_digits_are_completed():
    """Catches: bits that are nats, a mean over images in place of pixels."""
    name = "next_pixel_synthetic_digits_limit_32"
    line = "train_mnist.py next-pixel --data synthetic --limit 32 --d-model 8 --layers 1"
    with folder_with_data():
        _, (row,) = runs(line)
        wrote(name, "_completions.png")
        model, _ = averaged(f"checkpoints/{name}-causal-seed0.pt", digits())
    pixels = digits().test_images.flatten(1).long()
    tokens = F.pad(pixels[:, :-1], (1, 0), value=vision.BEGIN)
    with torch.no_grad():
        logits = model(tokens).flatten(0, 1)
    nats = F.cross_entropy(logits, pixels.flatten()).item()
    bits = nats / math.log(2)
    allow("bits", abs(float(row["test_bits_per_pixel"]) - bits), 1e-4)
    allow("nats", abs(float(row["test_nats_per_pixel"]) - nats), 1e-4)

    recipe = recipe_of(f"{line} --model s4 --no-oscillate")
    model, _ = build(recipe, digits())
    for layer in model.blocks:           # A is real, and stays so
        assert layer.s4.omega.abs().max() == 0
        assert not layer.s4.omega.requires_grad


def test_a_tiny_text_is_memorised_measured_and_written():
    """Catches: a recipe that fails, bits that are nats, losses of another epoch than the last; a
    text of other weights than the averaged ones, or of another vocabulary."""
    path = "checkpoints/p-seed0.pt"
    line = f"{TEXT} --name p --seeds 0 1 --epochs 12 --d-model 32"
    with folder_with_data():
        printed, rows = runs(line)
        assert "| stream |" in printed
        assert [row["seed"] for row in rows] == ["0", "1"]
        in_table("p", rows, line)
        wrote("p", "_loss.png")
        state = torch.load(path)
        stream, _ = scores = state["scores"][-1]
        assert stream < 0.1
        for way, nats in zip(("stream", "block"), scores):
            bits = nats / math.log(2)
            assert rows[0][f"val_loss_{way}"] == f"{nats:.4f}"
            assert rows[0][f"val_bits_{way}"] == f"{bits:.4f}"
        model, _ = train_shakespeare.load_model(path, CPU)
        has_weights(model, state["average"])

        # Two ways to take the likeliest, from the only model there is for this text.
        os.rename(path, "checkpoints/text_p_quick-seed0.pt")
        writes = "train_shakespeare.py --text p.txt --generate Shall --tokens 75"
        for likely in ("--temperature 0", "--top-k 1"):
            written, _ = runs(f"{writes} {likely}")
            print(f"    {written.strip()}")
            assert written.strip() == POEM.strip()


# --------------------------------------------------------------------------------------------------
# And on bad days: every mistake and every damage gets one clear line.
#
# One table of damages and one of mistakes. A row is a command that a user could type, and what its
# answer must name: the file, and what to do. A file that is damaged is never the reason for a
# traceback, for training on what is left of it, or for running what somebody put into it.

def half(path):
    """Only the first half of a file is left."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:len(content) // 2])


class Bomb:
    """To unpickle it would run code: it would make a file."""

    def __reduce__(self):
        return open, ("exploded", "w")


def code(path):
    """The file is a checkpoint that would run code."""
    torch.save(Bomb(), path)


def becomes(text):
    """The file has this text now, and é is a byte that is not UTF-8."""
    return lambda path: Path(path).write_bytes(text.encode("latin-1"))


MNIST = "data/MNIST/raw/train-images-idx3-ubyte"
SHAKESPEARE = "data/tinyshakespeare.txt"
AUTO = DIGITS.replace("synthetic", "auto")
WRITE = "train_shakespeare.py --text poem.txt --generate"
OFFLINE = OSError("Temporary failure in name resolution")
empty = becomes("")
DAMAGES = [  # what is done to a file, which one, the next command, words of the answer
    (half, IMAGES, f"{OWN} --resume", IMAGES, "damaged"),
    (code, IMAGES, f"{OWN} --resume", IMAGES, "might run code"),
    (empty, LANGUAGE, f"{TEXT} --resume", LANGUAGE, "damaged"),
    (code, LANGUAGE, f"{WRITE} S", LANGUAGE, "might run code"),
    (half, "grey/train/a/00.png", OWN, "00.png"),
    (empty, "grey/test/b/52.png", OWN, "grey", "52.png"),
    (becomes("P5 2 2 255 grey"), "grey/train/c/47.png", OWN,
     "47.png", "another size", "--size"),
    (becomes(20 * POEM.upper()), "poem.txt", f"{TEXT} --resume", LANGUAGE, "made with dataset"),
    (becomes("café " * 99), "poem.txt", TEXT, "poem.txt", "utf-8"),
    (becomes(POEM), "poem.txt", TEXT, "72 characters", "few"),
    (empty, MNIST, AUTO, "mnist", "data"),
    (empty, SHAKESPEARE, "train_shakespeare.py", SHAKESPEARE, "published"),
]
MISTAKES = [  # a command, words of the answer
    (f"{OWN} --resume --lr 1", IMAGES, "lr 0.003, not 1.0"),
    (f"{OWN} --resume --model s4", "grey-s4-seed0.pt", "No such file"),
    (f"{OWN} --patch 2 --stem conv", "patch 2 does not divide", "9x15"),
    (f"{OWN} --batch 49", "48 training", "batch takes 49"),
    (f"{OWN} --out poem.txt/in", "poem.txt"),
    (f"{OWN} --compare --name t --state 91", "even", "91"),
    (f"{OWN} --epochs 0", "epochs", "from 1"),
    (f"{OWN} --average nan", "average", "from 0 to 1"),
    (f"{OWN} --out broken --lr 1e9", "not finite", "smaller --lr"),
    (f"{TEXT} --out broken --lr 1e9", "not finite", "smaller --lr"),
    (f"{DIGITS} --data real", "name resolution", "--data synthetic"),
    (f"{HELP} --data real", "name resolution", "--data synthetic"),
    (f"{PREDICT} no.png --checkpoint {IMAGES}", "no.png"),
    (f"{PREDICT} no.png --dataset grey", "no.png"),
    (f"{PREDICT} no.png --model s4", "mnist-s4-seed0.pt", "--checkpoint"),
    (f"{PREDICT} no.png --checkpoint {LANGUAGE}", LANGUAGE, "classes"),
    (f"{PREDICT} poem.txt --checkpoint poem.txt", "poem.txt"),
    (f"{PREDICT} empty --checkpoint {IMAGES}", "no image in empty"),
    (f"{WRITE} S --checkpoint {IMAGES}", IMAGES, "no language model"),
    (f"{WRITE} S --checkpoint nowhere.pt", "nowhere.pt"),
    (f"{WRITE} Ω", "prompt", "Ω"),
    ("train_shakespeare.py --text nowhere.txt", "nowhere.txt"),
    ("train_mnist.py --dataset nowhere", "nowhere/train", "mnist"),
    ("train_mnist.py next-pixel --data synthetic --model rnn", "causal or s4"),
    ("train_mnist.py cifar10", "cifar10", "name resolution"),      # has no stand-in
    ("train_mnist.py --lr 1 pixels", "pixels"),
    ("train_mnist.py --compare --lr 1", "--name"),
]
WRITERS = [  # commands that write results
    f"{OWN} --compare --name t", f"{TEXT} --seeds 0 --name t",
    "s6.py", "block.py", "rnn.py", "visualize_delta.py",
]


def test_a_mistake_or_a_damage_is_answered_in_one_line():
    """Catches: a traceback, a pickle that runs code, a wrong bit, training on half a data set, a
    typing error found after an hour, a good checkpoint lost to NaN."""
    with folder_with_data(), patch("socket.getaddrinfo", side_effect=OFFLINE):
        runs(OWN)
        runs(TEXT)
        os.mkdir("empty")
        for line, *words in MISTAKES:
            answers(line, *words)
        for path in Path("broken").iterdir():
            assert learned(path).isfinite().all()
        for line, path in ((OWN, IMAGES), (TEXT, LANGUAGE)):
            script = module_of(line)
            batch, log = script.batch, [(1.0, 0.5, 0.1)]

            def overtaken(recipe, data, step):       # another training saves under the same name
                script.save_checkpoint(path, {}, {"log": log}, {}, keep_old=True)
                return batch(recipe, data, step)

            with patch.object(script, "batch", overtaken):
                answers(line, path, "by another training now")
            assert torch.load(path)["log"] == log
            runs(line)

        os.rmdir("results")              # now a file: noticed before anything is trained
        Path("results").touch()
        for line in WRITERS:
            answers(line, "cannot write to results")
        assert not os.path.exists("checkpoints/t-bidirectional-seed0.pt")

        for path in (MNIST, SHAKESPEARE):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).touch()
        for damage, path, line, *words in DAMAGES:
            whole = Path(path).read_bytes()
            damage(path)
            answers(line, *words)
            Path(path).write_bytes(whole)
        assert not os.path.exists("exploded")


def test_without_network_the_fallback_is_announced_and_labelled():
    """Catches: synthetic digits reported as MNIST, help texts as Shakespeare."""
    for line, name in ((AUTO, "synthetic-digits"), (HELP, "synthetic-pydoc-quick")):
        with folder_with_data(), patch("socket.getaddrinfo", side_effect=OFFLINE):
            printed, (row,) = runs(f"{line} --epochs 1")
        assert "SYNTHETIC" in printed
        assert row["dataset"] == name


# --------------------------------------------------------------------------------------------------
# visualize_delta.py: looking at Δ. A picture of what a model does must not change what it does, and
# every number below it must be the one that its name says.

import visualize_delta
from visualize_delta import (LEARNERS, TAUGHT, build_learner, changes, gate_rows,
                             haystacks, opening, rank_correlation, read_images, watch)


def check_scan(name, scan):
    """What `watch` has seen of a scan is what the scan computes."""
    layer, x = scan.s6, scan.x
    _, B, C = layer.x_proj(x).split([layer.dt_rank, layer.n, layer.n], -1)
    y = selective_scan(x, scan.delta, -layer.A_log.exp(), B, C, layer.D)
    equal(f"{name}: the Δ that was read makes the output", layer(x)[0], y)
    with watch(layer) as rest:
        layer(torch.zeros(1, 1, x.shape[-1]))
    ratio = scan.delta / rest[""].delta
    allow(f"{name}: Δ over its resting value", error(2 ** opening(scan), ratio), 1e-5)
    states = [layer(x[:, :t])[1] for t in range(1, x.shape[1] + 1)]
    states.insert(0, torch.zeros_like(states[0]))
    moves = torch.stack(states, 1).diff(dim=1).flatten(2).norm(dim=2)
    allow(f"{name}: changes of h", error(changes(scan), moves), 1e-5)


def test_looking_at_delta_changes_no_output_and_sees_what_the_scan_computes():
    """Catches: a hook that replaces what it reads or stays, a Δ that is not the one that scans; a
    state that is read before its token, or not carried on; another resting value."""
    torch.manual_seed(0)
    tokens, images = torch.randint(11, (2, 30)), torch.rand(2, 1, 28, 28)
    writer, classifier = MambaLM(11, 16, 2), VisionMamba(16, 2)
    looks = {writer: lambda: writer(tokens)[0], classifier: lambda: classifier(images)}
    for model, look in looks.items():
        kind, before = type(model).__name__, look()
        with contextlib.suppress(ZeroDivisionError), watch(model) as scans:
            equal(f"{kind} while one looks", look(), before)
            1 / 0
        equal(f"{kind} afterwards", look(), before)
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        for name, scan in scans.items():
            check_scan(name, scan)


def test_without_selection_delta_is_constant_and_S6_a_convolution():
    """Catches: an ablation that switches nothing off."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 8)
    cases = ("all", False, False), ("BC", True, False), ("none", True, True)
    for selection, delta_is_constant, is_linear in cases:
        layer = S6(8, 4, selection=selection)
        with watch(layer) as scans:
            y, _ = layer(x)
        twice, _ = layer(2 * x)
        spread = scans[""].delta.std(1).max().item()
        nonlinear = error(twice, 2 * y)
        print(f"    selection {selection}: Δ varies by {spread:.1e}; "
              f"S6(2x) - 2 S6(x) is {nonlinear:.1e}")
        assert (spread < 1e-6) == delta_is_constant
        assert (nonlinear < 1e-5) == is_linear
        assert error(y, layer.D * x) > 1e-3        # and not because nothing is written or read


def test_the_answer_to_a_haystack_is_right_by_construction_also_in_pieces():
    """Catches: an answer that is overwritten, a marker too many, a needle lost between pieces, a
    state that is dropped between pieces, by any model."""
    # If the data were wrong, no model could be right; or, worse, one could be right for no reason.
    for length, piece in ((3, None), (3, 1), (100, None), (100, 7), (100, 1)):
        places = torch.arange(length - 2)
        answers = torch.randint(16, places.shape)
        pieces = list(haystacks(length, places, answers, torch.Generator(), piece))
        assert max(part.shape[1] for part in pieces) <= (piece or length)
        tokens = torch.cat(pieces, 1)
        assert tokens.shape == (length - 2, length)
        assert set(tokens.flatten().tolist()) <= set(range(17))
        for row, place, answer in zip(tokens, places, answers):
            markers = (row == 16).nonzero().flatten()
            assert markers.tolist() == [place, length - 1]
            assert row[place + 1] == answer

    for name in LEARNERS:
        model = build_learner(name, 0)
        logits = visualize_delta.answer(model, tokens.split(7, 1), CPU)
        whole, _ = model(tokens)
        difference = error(logits, whole[:, -1, :16])
        allow(f"{name}: logits after 100 tokens, read in pieces of 7", difference, 1e-5)

    rows = visualize_delta.scattered(50, 40, torch.Generator())
    for row, places, symbols in zip(*rows):
        read, asked = row.split([40, 16])
        assert read[read != 16].tolist() == symbols.tolist()
        assert row[places].tolist() == symbols.tolist()
        assert asked.tolist() == 16 * [17]


def test_the_needle_is_taught_at_growing_lengths_by_models_of_one_size():
    """Catches: a curriculum that stays at 8, or forgets the short lengths in the end."""
    # In place of `learn` a note of what it was asked, and a loss that says: this length is solved.
    def note(model, optimizer, tokens, answers):
        asked.append(tokens.shape[1])
        return 0.04

    model, asked = build_learner("selective", 0), []
    with patch.multiple(visualize_delta, learn=note, PER_STEP=512):
        longest = visualize_delta.teach_needle(model, "selective", 0, CPU, 60, 3e-3)
    assert longest == TAUGHT[-1]
    assert asked[:len(TAUGHT)] == list(TAUGHT)
    assert set(asked[len(TAUGHT):]) == set(TAUGHT)
    torch.nn.init.constant_(model.embedding.weight, math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    raises(["not finite", "--lr"], lambda: visualize_delta.learn(
        model, optimizer, torch.randint(16, (8, 16)), torch.randint(16, (8, 1))))
    sizes = {name: count(build_learner(name, 0)) for name in LEARNERS}
    print(f"    {sizes}")
    assert max(sizes.values()) < min(75_000, 1.01 * min(sizes.values()))


def fake_scan(ratio):
    """A scan whose Δ is ratio (b, l, d) times its resting value, which is 2."""
    bias = torch.full(ratio.shape[-1:], math.log(math.exp(2) - 1))             # softplus: 2
    s6_with_bias = SimpleNamespace(dt_proj=SimpleNamespace(bias=bias))
    return SimpleNamespace(s6=s6_with_bias, delta=2 * ratio)


def test_the_numbers_below_a_picture_of_gates_are_those_worked_out_by_hand():
    """Catches: a token that counts for the wrong side, channels that open counted as shut, a mean
    in which one channel weighs more than another."""
    # Seven tokens. At the third and fourth, channel 0 opens to 4 and 16 times its resting value,
    # channel 1 shuts to a quarter, and channel 2 opens to twice. So the geometric means over the
    # channels are 2^(1/3) and (16 · 1/4 · 2)^(1/3) = 2.
    ratio = torch.ones(1, 7, 3)
    ratio[0, 2:4, 0] = torch.tensor([4.0, 16.0])
    ratio[0, 2:4, 1] = 0.25
    ratio[0, 2:4, 2] = 2.0
    here = torch.tensor([[0, 0, 1, 1, 0, 0, 0]]).bool()
    elsewhere = torch.tensor([[1, 1, 0, 0, 1, 1, 0]]).bool()       # the last counts nowhere
    moves = torch.tensor([[1.0, 1, 5, 5, 1, 1, 90]])
    scans = contextlib.nullcontext({"": fake_scan(ratio)})
    seen = {"watch": lambda _: scans, "changes": lambda _: moves}
    with patch.multiple(visualize_delta, **seen):
        (row,) = gate_rows(Mock(), "m", 0, torch.zeros(1, 7), here, elsewhere)
    print(f"    {row}")
    expected = {
        "delta_here": "4", "delta_elsewhere": "2", "ratio": "2",
        "opens_percent": "66.7", "shuts_percent": "33.3",
        "share_of_change_percent": "71.4",         # 10 of 14
    }
    assert row.items() >= expected.items()


def test_delta_lies_on_the_image_where_its_token_was_read():
    """Catches: a scan drawn upside down, ink compared with the token after, ties that favour one
    side."""
    torch.manual_seed(0)
    model = VisionMamba(16, 2, stem="patch").eval()
    black = torch.zeros(1, 1, 28, 28)
    spot = black.clone()
    spot[..., 8:12, 12:16] = 1                     # the patch in row 2, column 3
    before = read_images(model, black)
    after = read_images(model, spot)
    for scan in list(before)[:2]:                  # of the first layer
        _, backward = scan
        change = after[scan].delta[0] - before[scan].delta[0]
        grid = visualize_delta.on_grid(change.abs().sum(-1), backward)
        columns = range(4) if backward else range(3, 7)
        assert grid.nonzero().tolist() == [[2, column] for column in columns]

    # A Δ that is the ink two tokens back, in every channel.
    ink = torch.rand(30, 49)
    ratio = 0.5 + F.pad(ink, (2, 0))[:, :49]
    scan = fake_scan(ratio.unsqueeze(-1).expand(-1, -1, 4))
    rows = visualize_delta.compare_with_ink(scan, ink)
    for row in rows:
        for average in ("plain", "ratio", "geometric"):
            rho = float(row[f"rho_{average}"])
            if row["back"] == 2:
                assert rho > 0.95, row
            else:
                assert abs(rho) < 0.1, row
    print(f"    {rows[2]}")
    assert rows[2]["opens_percent"] == "100.0"
    assert rows[2]["shuts_percent"] == "0.0"

    a, b = torch.tensor([[1., 2, 2, 4]]), torch.tensor([[10., 30, 20, 40]])
    # ranks 1, 2½, 2½, 4 and 1, 3, 2, 4: ρ = 4.5 / √(4.5 · 5)
    allow("ρ with a tie", abs(rank_correlation(a, b).item() - 0.9 ** 0.5), 1e-6)
    allow("ρ of a falling pair", abs(rank_correlation(b, -b).item() + 1), 1e-6)


def test_the_kinds_of_characters_are_those_that_a_reader_sees():
    """Catches: a letter after an apostrophe taken for a first one, a line taken for a name."""
    text = "//ROMEO:/I'm no: one."       # a slash for each line break
    kind = "//NNNNN:/fow fw: fwwo"
    names = {"/": "line break", " ": "space", ":": "colon", "N": "speaker's name"}
    names |= {"f": "first letter", "w": "letter in a word", "o": "other"}
    expected = [names[letter] for letter in kind]
    assert visualize_delta.kinds_of(text.replace("/", "\n")) == expected
    # Read in pieces, the means by kind are those of the whole text.
    torch.manual_seed(0)
    model, tokens = MambaLM(11, 16, 2), torch.randint(11, (100,))
    masks = (torch.arange(100) % 3 == torch.arange(3).unsqueeze(1)).float()
    passage, sums = visualize_delta.openings_of_text(model, tokens, masks, piece=70)
    with watch(model) as scans:
        model(tokens.unsqueeze(0))
    for layer, scan in enumerate(scans.values(), 1):
        whole = opening(scan)[0]
        allow(f"layer {layer}: sums by kind", error(sums[layer], masks @ whole), 1e-4)
        allow(f"layer {layer}: the passage", error(passage[layer], whole[1:59]), 1e-5)


LOOK = "visualize_delta.py --task"
LOOKS = [  # a task with flags; the name of the files that it must write, and how they end
    ("digits", "delta_synthetic_digits", ".csv _digit.png _gates.png"),
    ("digits --digit 3 --index 1 --name d", "d", ".csv _gates_3_1.png"),
    ("text", "delta_text_synthetic_pydoc_quick", ".csv .png"),
    ("needle --quick", "needle_quick", ".csv _delta.csv _lengths.png _gates.png"),
    ("needle --quick --models selective rnn --steps 3 --name long", "long",
     ".csv _lengths.png -selective-seed0.pt"),
    ("copying --quick", "copying_quick", ".csv _delta.csv _gates.png"),
]


def test_the_commands_that_look_at_delta_write_what_they_promise():
    """Catches: a figure that is promised and not written, a control from another seed, the weights
    before averaging; a traceback for a model that cannot be looked at."""
    def make():
        model, _ = build(checkpoint["recipe"], digits())
        return model

    path = "checkpoints/synthetic_digits-bidirectional-seed3.pt"
    s4 = "checkpoints/s4-s4-seed0.pt"
    # Real files and figures, but little work: no learning, images of 4×4 tokens, two lengths.
    learn = Mock(return_value=0.04)
    less = {"QUICK_STEPS": 4, "PER_STEP": 256, "LONGEST_QUICK": 7, "LOOKED_AT": (2, 64)}
    with (
        folder_with_data(),
        patch.object(torch, "set_flush_denormal"),
        patch.multiple(visualize_delta, learn=learn, **less),
    ):
        answers(f"{LOOK} digits", "no trained model", "train_mnist.py")
        runs(f"{DIGITS} --seed 3 --patch 7 --stem patch")
        runs(f"{DIGITS} --model s4 --name s4 --patch 7 --stem patch")
        runs(f"{HELP} --data synthetic")
        checkpoint = torch.load(path)
        pair = visualize_delta.make_pair(checkpoint, make)
        torch.manual_seed(seed_for(3, "weights"))
        has_weights(pair["untrained"], make().state_dict())
        has_weights(pair["trained"], checkpoint["average"])

        for task, name, endings in LOOKS:
            runs(f"{LOOK} {task}")
            wrote(name, endings)
        steps = learn.call_count
        printed, _ = runs(f"{LOOK} needle copying --quick --resume")
        assert learn.call_count == steps
        assert "model=selective seed=0" in printed
        runs(f"{LOOK} needle --quick")
        assert os.path.exists("checkpoints/needle_quick-selective-seed0.pt.old")

        for line, *words in (
            ("needle --models rnn --steps 9 --name long --resume", "long-rnn", "9"),
            ("copying --quick --length 48 --name copying_quick --resume", "selective", "48"),
            (f"digits --checkpoint {s4}", "no Δ"),
            (f"digits --checkpoint {path} {s4}", "the seed"),
            ("digits --index 199", "27 test images of a 7", "--index"),
            ("digits --models s4", "--name"),
        ):
            answers(f"{LOOK} {line}", *words)
        checkpoint["scores"].pop()
        torch.save(checkpoint, path)
        answers(f"{LOOK} digits", path, "finished training")


# --------------------------------------------------------------------------------------------------
# The runner.

def main(words):
    if not __debug__:
        sys.exit("test_scan.py: python -O removes every check: run it without")
    if hasattr(sys.stdout, "reconfigure"):       # a Windows log may not know Δ
        sys.stdout.reconfigure(errors="replace")
    tests = {}
    for name, test in globals().items():
        chosen = not words or any(word in name for word in words)
        if name.startswith("test_") and chosen:
            tests[name] = test
    if not tests:
        sys.exit(f"test_scan.py: no test has {' or '.join(words)} in its name")
    failed, start = [], time.perf_counter()
    for name, test in tests.items():
        print(name[5:].replace("_", " "), flush=True)
        try:
            test()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
    for name in failed:
        print(f"failed: {name}")
    seconds, python = time.perf_counter() - start, sys.version.split()[0]
    print(f"{seconds:.0f} s, torch {torch.__version__}, Python {python}")
    print(f"{len(tests) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
