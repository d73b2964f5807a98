"""test_scan.py: why you may believe the rest.

    python test_scan.py                all tests, in about a minute on one core
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
import functools
import importlib.util
import io
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from types import SimpleNamespace
from unittest.mock import DEFAULT, patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

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
        for k in (1, 2, 3, 5, 18, 19, 37, s6._short_pieces(l)):
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
from block import (ConvS6, Mamba, MambaBlock, MambaLM, causal_conv, generate, generate_plainly,
                   load_official, official_state_dict, parameter_groups)


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


def two_blocks():
    """Two blocks and an input of 11 tokens for them, in float64."""
    torch.manual_seed(0)
    return [MambaBlock(16, n=4).double() for _ in range(2)], torch.randn(3, 11, 16).double()


def test_the_causal_convolution_is_its_equation():
    """Catches: a flipped kernel, a memory layout that mixes channels."""
    torch.manual_seed(0)
    shapes = (2, 9, 5), (5, 1, 4), (5,), (2, 3, 5)
    x, weight, bias, window = (torch.randn(shape).double() for shape in shapes)
    for given, before in ((None, torch.zeros_like(window)), (window, window)):
        padded = torch.cat([before, x], 1)
        exact = bias + sum(padded[:, i:i + 9] * weight[:, 0, i] for i in range(4))
        name = "from the beginning" if given is None else "from a window"
        allow(name, error(causal_conv(x, weight, bias, given), exact), 1e-14)


def test_the_block_is_its_figure():
    """Catches: the gate and the input exchanged, a SiLU too few, a norm behind the residual."""
    # Everything that block.py draws above its code, written out once more with plain matrices.
    (layer, _), x = two_blocks()
    torch.nn.init.normal_(layer.norm.weight)
    mixer, path = layer.mixer, layer.mixer.path
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    allow("RMSNorm", error(layer.norm(x), normed), 1e-14)
    a, z = (normed @ mixer.in_proj.weight.t()).split(32, -1)
    u = F.silu(causal_conv(a, path.conv1d.weight, path.conv1d.bias))
    y = (path.s6(u)[0] * F.silu(z)) @ mixer.out_proj.weight.t()
    allow("x + out_proj(S6(SiLU(conv(a))) · SiLU(z))", error(layer(x)[0], x + y), 1e-14)


def test_step_by_step_is_the_whole_through_two_layers():
    """Catches: a convolution window shifted by one, a window shared between layers."""
    blocks, x = two_blocks()
    with torch.no_grad():
        whole, last = through(blocks, x)
        states, steps = None, []
        for t in range(11):
            y, states = through(blocks, x[:, t:t + 1], states)
            steps.append(y)
    allow("11 tokens, one at a time", error(torch.cat(steps, 1), whole), 1e-14)
    allow("the state after them", states_error(states, last), 1e-14)


def test_padding_changes_nothing_wherever_it_stands():
    """Catches: padding seen by the convolution, written to the state, or kept in the window."""
    blocks, x = two_blocks()
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


def language_model():
    """A small language model in float64, not fresh: its biases and norms say something too."""
    torch.manual_seed(0)
    model = MambaLM(vocabulary=13, d_model=16, layers=4, n=4).double()
    with torch.no_grad():                # a norm of ones or a bias of zeros would hide its absence
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.randint(0, 13, (2, 12))


def test_a_prompt_of_any_length_and_then_step_by_step_is_the_whole_text():
    """Catches: a prompt shorter than the convolution's window, states given to the wrong layer."""
    model, tokens = language_model()
    with torch.no_grad():
        whole, last = model(tokens)
        for prompt in range(1, 10):
            logits, states = model(tokens[:, :prompt])
            parts = [logits]
            for t in range(prompt, 12):
                logits, states = model(tokens[:, t:t + 1], states)
                parts.append(logits)
            worst = max(error(torch.cat(parts, 1), whole), states_error(states, last))
            allow(f"four layers, prompt of {prompt}: logits and states", worst, 1e-13)


def test_the_language_model_begins_with_a_blind_guess():
    """Catches: a head not scaled as an embedding that is also a head must be; no small start."""
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
    torch.manual_seed(0)
    model = MambaLM(vocabulary=13, d_model=16, layers=1, n=4, d_conv=3)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    layer, mixer, path = model.layers[0], model.layers[0].mixer, model.layers[0].mixer.path
    for style, name in (("mamba_ssm", "embedding"), ("transformers", "embeddings")):
        theirs = "backbone.layers.0."
        expected = {
            f"backbone.{name}.weight": model.embedding.weight, theirs + "mixer.D": path.s6.D,
            theirs + "norm.weight": layer.norm.weight, theirs + "mixer.A_log": path.s6.A_log,
            theirs + "mixer.in_proj.weight": mixer.in_proj.weight,
            theirs + "mixer.conv1d.weight": path.conv1d.weight,
            theirs + "mixer.conv1d.bias": path.conv1d.bias,
            theirs + "mixer.x_proj.weight": path.s6.x_proj.weight,
            theirs + "mixer.dt_proj.weight": path.s6.dt_proj.weight,
            theirs + "mixer.dt_proj.bias": path.s6.dt_proj.bias,
            theirs + "mixer.out_proj.weight": mixer.out_proj.weight,
            "backbone.norm_f.weight": model.norm_f.weight, "lm_head.weight": model.embedding.weight}
        official = official_state_dict(model, style)
        assert set(official) == set(expected), set(official) ^ set(expected)
        assert all(torch.equal(official[key], weight) for key, weight in expected.items())
        # back, and it is the same model; transformers leaves out the head that is tied
        del official["lm_head.weight"]
        loaded = load_official(official).state_dict()
        assert list(loaded) == list(model.state_dict())
        equal(f"backbone.{name}.weight, … there and back",
              *(torch.cat([p.flatten() for p in w.values()]) for w in (loaded, model.state_dict())))
    raises(["style", "mamba_ssm", "jax"], lambda: official_state_dict(model, "jax"))
    official["lm_head.weight"] = 1 + model.embedding.weight
    raises(["lm_head.weight", "tied"], lambda: load_official(official))
    raises(["embedding.weight"], lambda: load_official({"fc.weight": torch.ones(2, 2)}))
    mamba2 = {**official, "backbone.layers.0.mixer.A_log": torch.ones(8)}
    raises(["Mamba-1", "(d, n)"], lambda: load_official(mamba2))
    del official["lm_head.weight"], official["backbone.norm_f.weight"]
    raises(["norm_f.weight"], lambda: load_official(official))


def test_the_step_that_generates_is_the_model_and_writes_the_same_text():
    """Catches: a term lost in the second writing of the equations, weights laid out wrongly."""
    # `generate` has the equations once more, for speed. So its step is compared with the model
    # after prompts of every length, and its text with that of `generate_plainly`, token by token.
    model, tokens = language_model()
    with torch.no_grad():
        whole = model(tokens[:1])[0][0]
        for prompt in range(1, 10):
            laid_out = block._lay_out(model, model(tokens[:1, :prompt])[1])
            logits = torch.cat([block._step(t, *laid_out) for t in tokens[0, prompt:].tolist()])
            allow(f"four layers, prompt of {prompt}", error(logits, whole[prompt:]), 1e-13)
    for how in ({"temperature": 0}, {"seed": 3}, {"seed": 3, "top_k": 2, "temperature": 2.0}):
        fast, plain = (list(way(model, tokens[0], 40, **how)) for way in (generate,
                                                                          generate_plainly))
        print(f"    {how}: {' '.join(map(str, fast[:12]))} … by both ways")
        assert fast == plain and len(fast) == 40


def test_generation_with_one_seed_repeats_and_draws_from_the_softmax():
    """Catches: a draw that nobody seeded, a temperature that is not one, a k off by one."""
    model, tokens = language_model()
    texts = [list(generate(model, tokens[0], 40, seed=seed)) for seed in (0, 0, 1)]
    print(f"    seeds 0, 0, 1: {' | '.join(str(text[:8])[1:-1] for text in texts)}")
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 40
    greedy = list(generate(model, tokens[0], 20, temperature=0))
    with torch.no_grad():
        read = torch.cat([tokens[:1], torch.tensor([greedy])], 1)
        assert model(read)[0][0, 11:-1].argmax(-1).tolist() == greedy
    assert list(generate(model, tokens[0], 20, top_k=1, seed=3)) == greedy
    # Without layers the logits depend on the last token alone: a Markov chain, to be counted.
    chain = MambaLM(4, 8, layers=0)
    with torch.no_grad():
        chain.embedding.weight.normal_(std=1.0)
        logits = chain(torch.arange(4).unsqueeze(0))[0][0] / 2
    for k in (4, 2):
        kept = logits.masked_fill(logits < logits.topk(k)[0][:, -1:], -math.inf).softmax(-1)
        text = [0, *generate(chain, torch.tensor([0]), 20000, temperature=2.0, top_k=k)]
        pairs = torch.tensor(text[:-1]) * 4 + torch.tensor(text[1:])
        counts = torch.bincount(pairs, minlength=16).view(4, 4)
        worst = (counts - counts.sum(1, keepdim=True) * kept).abs().max().item() / len(text)
        allow(f"temperature 2, top {k}: frequencies of the 16 pairs", worst, 0.01)
    raises(["prompt", "(0,)"], lambda: list(generate(model, tokens[0, :0], 1)))
    raises(["top_k"], lambda: list(generate(model, tokens[0], 1, top_k=0)))


# --------------------------------------------------------------------------------------------------
# vision.py: an image is read from both ends, and drawn from one.
#
# "Causal" and "bidirectional" are claims about what can influence what. So that is what is tested:
# change the end of the input, and see whether the beginning of the output moves.

import vision
from vision import PixelLM, VisionBlock, VisionMamba


def test_the_future_cannot_change_the_past_when_causal_and_does_when_bidirectional():
    """Catches: a convolution or a norm that peeks ahead, a backward branch that is not reversed."""
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16).double()
    other = torch.cat([x[:, :7], x[:, 7:] + 1], 1)
    image = torch.rand(1, 1, 28, 28).double()
    darker = torch.cat([image[:, :, :20], image[:, :, 20:] / 2], 2)
    with torch.no_grad():
        layer = MambaBlock(16, n=4).double()
        equal("block.py: tokens 7 … 11 and those before", *(layer(i)[0][:, :7] for i in (x, other)))
        for direction in ("causal", "bidirectional"):
            layer = VisionBlock(16, n=4, direction=direction).double()
            change = (layer(x) - layer(other)).abs().amax(-1)[0]
            print(f"    {direction}: tokens 7 … 11 change those before by {change[:7].max():.1e}")
            assert (change[:7].max() == 0) == (direction == "causal") and change[7:].min() > 0
            model = VisionMamba(16, layers=2, direction=direction).double()
            read = [model.body(model.stem(i) + model.position) for i in (image, darker)]
            change = (read[0] - read[1]).abs().amax(-1).view(7, 7).amax(1)     # per row of tokens
            print(f"    {direction}: pixel rows 20 … 27 change token rows by "
                  f"{' '.join(f'{c:.0e}' for c in change)}")
            assert (change[:4].max() == 0) == (direction == "causal") and change[5:].min() > 0


def test_the_vision_block_is_two_paths_and_their_fusion():
    """Catches: branches exchanged, half of the sum forgotten, a branch that is gated twice."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16).double()
    for direction, fuse in itertools.product(vision.DIRECTIONS, vision.FUSIONS):
        layer = VisionBlock(16, n=4, direction=direction, fuse=fuse).double()
        a, z = layer.in_proj(layer.norm(x)).split(32, -1)
        first, second = layer.first(a)[0], layer.second(a)[0]
        if direction == "bidirectional":
            second = layer.second(a.flip(1))[0].flip(1)
        y = (first + second) / 2 if fuse == "average" else torch.cat([first, second], -1)
        y = layer.out_proj(y * F.silu(z).repeat(1, 1, y.shape[-1] // 32))
        allow(f"{direction}, {fuse}", error(layer(x), x + y), 1e-14)


def test_reversing_the_image_and_swapping_the_branches_mirrors_the_result():
    """Catches: branches that share what they should not, a fusion that favours one of them."""
    torch.manual_seed(0)
    layer, x = VisionBlock(16, n=4).double(), torch.randn(2, 9, 16).double()
    with torch.no_grad():
        y = layer(x)
        layer.first, layer.second = layer.second, layer.first
        allow("9 tokens", error(layer(x.flip(1)).flip(1), y), 1e-15)


def test_any_image_that_the_patch_divides():
    """Catches: 28×28 or one channel written into the model, tokens out of order, a wrong pool."""
    for channels, size, fuse, pool, stem in ((1, (28, 28), "average", "mean", "conv"),
                                             (3, (32, 32), "concat", "max", "patch"),
                                             (3, (16, 24), "average", "last", "conv"),
                                             (3, (16, 24), "average", "mean", "deep")):
        model = VisionMamba(16, layers=1, fuse=fuse, image_size=size, channels=channels, pool=pool,
                            stem=stem, classes=7).double()
        images = torch.randn(2, channels, *size).double()
        tokens = model.norm(model.body(model.stem(images) + model.position))
        pooled = {"mean": tokens.mean(1), "max": tokens.max(1).values, "last": tokens[:, -1]}[pool]
        allow(f"{channels} channels, {size} pixels, stem {stem}, fuse {fuse}, pool {pool}",
              error(model(images), pooled @ model.head.weight.t() + model.head.bias), 1e-14)
        assert model(images).shape == (2, 7) and tokens.shape[1] == size[0] * size[1] // 16
    # A patch of the image is one token, row by row: the number of the patch is what comes out.
    stem = vision.Stem(1, 1, patch=4, kind="patch")
    torch.nn.init.constant_(stem.net.weight, 1 / 16)
    torch.nn.init.zeros_(stem.net.bias)
    numbers = torch.arange(24.0).view(1, 1, 4, 6)
    allow("tokens come row by row", error(stem(F.interpolate(numbers, scale_factor=4)).flatten(),
                                          numbers.flatten()), 1e-6)


# --------------------------------------------------------------------------------------------------
# rnn.py: what came before. A comparison is worth as much as its baselines, so each of them is held
# to its own equation, and S4 to S6.

import rnn
from rnn import RNN, S4, S4Block, S4Stack, diagonal_hippo, hippo, memorize, recall


def test_the_vanilla_rnn_is_its_equation():
    """Catches: a baseline that is not what it is called."""
    torch.manual_seed(0)
    model, x = RNN(4, 6, layers=1), torch.randn(2, 5, 4)
    W, U, b, c = model.rnn.parameters()
    h, states = torch.zeros(2, 6), []
    for t in range(5):
        h = torch.tanh(x[:, t] @ W.t() + b + h @ U.t() + c)
        states.append(h)
    allow("h_t = tanh(W x_t + U h_{t-1} + b)", error(model(x), torch.stack(states, 1)), 1e-6)
    allow("U starts orthogonal", error(U @ U.t(), torch.eye(6)), 1e-6)


def test_the_state_of_hippo_reconstructs_the_past():
    """Catches: a matrix with a sign or a root gone wrong, a polynomial on the wrong interval."""
    root = math.sqrt
    A = torch.tensor([[1, 0, 0], [root(3), 2, 0], [root(5), root(15), 3]], dtype=torch.float64)
    allow("A, for n = 3", error(torch.tensor(hippo(3)[0]), -A), 1e-15)
    x, now = rnn.signal(1000), (torch.arange(1000).double() + 0.5) / 1000
    for n, low, high in ((4, 0.9, 1.1), (16, 0.3, 0.7), (32, 0.0, 0.04)):
        past = recall(memorize(x, n)[-1], now.numpy())
        rms = ((past - x) ** 2).mean() ** 0.5 / (x ** 2).mean() ** 0.5
        print(f"    {n:3d} numbers recall 1,000 samples of 8 waves with an error of {rms:.3f}")
        assert low <= rms <= high


def test_the_diagonal_of_hippo_is_its_normal_part():
    """Catches: eigenvectors that do not belong to their eigenvalues, half of the pairs too many."""
    n = 16
    (A, B), (modes, b) = map(torch.tensor, hippo(n)), map(torch.tensor, diagonal_hippo(n))
    P = (torch.arange(n).double() + 0.5).sqrt()
    normal = A + torch.outer(P, P)
    for t in (0.1, 1.0, 3.0):            # Bᵀ exp(t N) B, in both bases; b is V* B/2
        whole = B @ torch.matrix_exp(t * normal) @ B
        pairs = 2 * (4 * b.abs() ** 2 * torch.exp(t * modes)).sum().real
        allow(f"Bᵀ exp({t} N) B", error(pairs, whole), 1e-12)
    assert len(modes) == n // 2
    raises(["even", "7"], lambda: S4(4, 7))


def test_S4_as_a_convolution_is_S4_as_a_recurrence_wherever_it_is_cut():
    """Catches: a kernel that is a token late, an FFT that wraps around, a state left behind."""
    torch.manual_seed(0)
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        stack, x = S4Stack(6, layers=2, n=64).to(dtype), torch.randn(2, 784, 6, dtype=dtype)
        exact, last = through(stack.layers, x, mode="recurrence")
        allow(f"{dtype}, the stack", error(stack(x), exact), allowed)
        for cut in (0, 1, 500, 783):
            y, states = [], None
            for part in (x[:, :cut], x[:, cut:]) if cut else (x,):
                out, states = through(stack.layers, part, states)
                y.append(out)
            allow(f"{dtype}, cut at {cut}: y", error(torch.cat(y, 1), exact), allowed)
            worst = max(map(error, map(torch.view_as_real, states), map(torch.view_as_real, last)))
            allow(f"{dtype}, cut at {cut}: the last state", worst, 3 * allowed)
    layer, x = S4(64, 92), torch.randn(2, 784, 64)
    for l in (1, 2, 3, 10, 784):
        ours, exact = (layer(x[:, :l], mode=mode)[0] for mode in ("convolution", "recurrence"))
        allow(f"one layer of 64 channels, n = 92, l = {l}, float32", error(ours, exact), 2e-5)
    assert layer(x, return_state=False)[1] is None
    raises(["mode", "recurrence"], lambda: layer(x, mode="parallel"))


def test_S4_starts_from_the_normal_part_of_hippo():
    """Catches: oscillators that do not oscillate, another B, Δ outside 0.001 … 0.1, a wrong block.

    With C the conjugate of V* B, S4's kernel is (B/2)ᵀ exp(N Δ k) ∫ exp(N s) ds B/2, 0 ≤ s ≤ Δ,
    where N = HiPPO's A + P Pᵀ is a real matrix: eigenvectors and their signs play no part.
    """
    torch.manual_seed(0)
    n, x = 16, torch.randn(1, 60, 2, dtype=torch.float64)
    layer = S4(2, n).double()
    A, B = map(torch.tensor, hippo(n))
    P = (torch.arange(n).double() + 0.5).sqrt()
    N, B, I = A + torch.outer(P, P), B / 2, torch.eye(n).double()
    with torch.no_grad():
        layer.B.copy_(torch.view_as_real(torch.tensor(diagonal_hippo(n)[1])))      # in double
        layer.omega.copy_(torch.tensor(diagonal_hippo(n)[0].imag))
        layer.C.copy_(torch.view_as_real(torch.view_as_complex(layer.B).conj().resolve_conj()))
    ys = torch.zeros_like(x)
    for j, delta in enumerate(layer.log_dt.exp()):
        A_bar, h = torch.matrix_exp(delta * N), torch.zeros_like(B)
        for t in range(60):
            h = A_bar @ h + torch.linalg.solve(N, (A_bar - I) @ B) * x[0, t, j]
            ys[0, t, j] = B @ h + x[0, t, j]
    allow("against the dense recurrence", error(layer(x)[0], ys), 1e-9)
    assert torch.equal(S4(2, n).omega, layer.omega.float()) and (S4(2, n).A_log.exp() == 0.5).all()
    steps = S4(4096).log_dt.exp()
    print(f"    Δ from {steps.min():.4f} to {steps.max():.4f}, median {steps.median():.4f}")
    assert 1e-3 <= steps.min() < 1.1e-3 and 0.009 < steps.median() < 0.011 and steps.max() > 0.09
    unit, x = S4Block(8, n=4), torch.randn(2, 9, 8)
    a, gate = unit.out_proj(F.gelu(unit.s4(unit.norm(x))[0])).chunk(2, -1)
    allow("the block: x + GLU(W GELU(S4(norm(x))))", error(unit(x)[0], x + a * gate.sigmoid()),
          1e-6)


def test_S6_with_constant_delta_B_C_is_S4():
    """Catches: two files that teach two different recurrences."""
    torch.manual_seed(0)
    d, n, l = 3, 4, 50
    layer, x = S4(d, 2 * n).double(), torch.randn(2, l, d, dtype=torch.float64)
    C = torch.randn(n, dtype=torch.float64)
    with torch.no_grad():                # real Λ, one real C for all channels, and B made real
        layer.omega.zero_()
        layer.A_log.copy_(torch.rand(d, n))
        layer.C.copy_(torch.stack([C, torch.zeros(n)], -1))
        layer.B[:, 1] = 0
    delta = layer.log_dt.exp().expand(2, l, d)
    B, C = layer.B[:, 0].expand(2, l, n), (2 * C).expand(2, l, n)              # 2 Re(C h)
    y = selective_scan(x, delta, -layer.A_log.exp(), B, C, layer.D, discretization="zoh")
    allow("S6 with Δ, B, C that do not look at x", error(layer(x)[0], y), 1e-12)


def test_a_pixel_is_guessed_from_those_before_it_and_drawn_one_by_one():
    """Catches: a model that sees the pixel it guesses, a state that is not carried on, a pixel or
    a place that is taken for another."""
    torch.manual_seed(0)
    model = PixelLM([], 8, (4, 5)).double()
    pixels = torch.arange(20).view(1, 20)          # pixel i of the image is i
    tokens = F.pad(pixels[:, :-1], (1, 0), value=vision.BEGIN)
    for i, logits in enumerate(model(tokens)[0]):  # without blocks: the last pixel and the place
        before = model.embedding.weight[i - 1 if i else 256]
        x = before + model.position[i // 5] + model.position[4 + i % 5]
        assert error(logits, model.head(model.norm(x))) < 1e-12, i
    print("    without blocks: 20 pixels of 4×5, each from the one before and its row and column")
    pixels = torch.stack([torch.arange(12), 250 - torch.arange(12)])
    tokens = F.pad(pixels[:, :-1], (1, 0), value=vision.BEGIN)
    for layers in ([MambaBlock(8), MambaBlock(8)], [S4Block(8, n=4), S4Block(8, n=4)]):
        model, name = PixelLM(layers, 8, (3, 4)), type(layers[0]).__name__
        with torch.no_grad():
            model.head.weight.mul_(20)             # far from even chances
        logits, states, steps = model(tokens), None, []
        for token in tokens.split(1, 1):
            step, states = model.read(token, states)
            steps.append(step)
        allow(f"{name}: logits pixel by pixel", error(torch.cat(steps, 1), logits), 1e-5)
        ours = vision.complete(model.eval(), pixels[:, :5], 12, seed=3)
        generator, drawn = torch.Generator().manual_seed(3), tokens[:, :6]
        for _ in range(7):                         # without a state: from the beginning every time
            chances = model(drawn)[:, -1].softmax(-1).detach()
            drawn = torch.cat([drawn, torch.multinomial(chances, 1, generator=generator)], 1)
        print(f"    {name}: {ours.tolist()}")
        assert ours.tolist() == drawn[:, 1:].tolist() and ours[0, :5].tolist() == [0, 1, 2, 3, 4]


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


def test_the_calls_of_a_scan_cut_as_on_a_GPU_hardly_grow_with_its_length():
    """Catches: pieces that grow with the length: each of their tokens costs 27 launches."""
    for l, most in ((49, 260), (784, 450), (2048, 550), (16384, 650), (65536, 750)):
        forward, both = s6.count_calls(l, s6._short_pieces(l))
        print(f"    {l} tokens: {forward} calls forward, {both} with the gradient, {most} allowed")
        assert forward <= 250 and both <= most


def test_weight_decay_spares_what_has_no_business_at_zero():
    """Catches: decay on A_log, D, biases, norms, positions; or no decay at all."""
    model = VisionMamba(16, layers=1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    for p in decayed["params"]:
        assert names[id(p)].endswith("weight") and p.ndim > 1, names[id(p)]
    for end in ("A_log", "D", "bias", "norm.weight", "position"):
        assert any(names[id(p)].endswith(end) for p in spared["params"]), end
    s4 = S4(4)
    others = parameter_groups(s4, 0.1)[1]["params"]
    assert all(any(p is own for p in others) for own in (s4.A_log, s4.omega, s4.log_dt, s4.D))
    print(f"    {len(decayed['params'])} tensors decay, {len(spared['params'])} do not")


def test_every_documented_error_of_the_models_is_raised():
    """Catches: an image cropped in silence, a misspelt option taken for the default."""
    raises(["patch", "30x28"], lambda: VisionMamba(16, image_size=(30, 28)))
    raises(["patch", "2 or 4", "7"], lambda: VisionMamba(16, patch=7))
    for option in ("direction", "fuse", "pool", "stem", "position"):
        raises([option, "one of", "typo"], lambda: VisionMamba(16, **{option: "typo"}))
    for layer in (ConvS6(6, 4), Mamba(6, 4), MambaBlock(6, 4), VisionBlock(6, 4), RNN(6, 5),
                  S4(6, 4), S4Block(6, 4), S4Stack(6, 2, 4)):
        raises([type(layer).__name__.replace("Stack", "Block"), "(b, l, 6)", "(2, 9, 5)"],
               lambda: layer(torch.randn(2, 9, 5)))
    raises(["d_model", "3"], lambda: VisionMamba(3, stem="deep"))
    writer, tokens = PixelLM([MambaBlock(8)], 8, (3, 4)), torch.zeros(1, 13, dtype=torch.int64)
    raises(["13 tokens", "3x4"], lambda: writer(tokens))
    raises(["(b, l)", "(13,)"], lambda: writer(tokens[0]))
    model = VisionMamba(16)
    raises(["28x28", "(1, 1, 32, 32)"], lambda: model(torch.randn(1, 1, 32, 32)))
    raises(["(b, 1, height, width)", "(1, 3, 28, 28)"], lambda: model(torch.randn(1, 3, 28, 28)))


# --------------------------------------------------------------------------------------------------
# train_mnist.py and train_shakespeare.py, on good days.
#
# A training script is right if every step is what the recipe says, if whatever is drawn is a
# function of seed and step, and if it measures what it says. All of this is seen from outside: the
# scripts are run, in this process, small enough to take a second.

from torchvision.transforms.functional import to_pil_image

import train_mnist
import train_shakespeare
from train_mnist import synthetic_digits

HERE, CPU = os.path.dirname(os.path.abspath(__file__)), torch.device("cpu")
SMALL = "--epochs 2 --batch 32 --d-model 16 --layers 1"
DIGITS = f"train_mnist.py --data synthetic {SMALL}"
OWN = f"train_mnist.py --dataset grey {SMALL} --patch 3 --stem patch --batch 12"
TEXT = ("train_shakespeare.py --text poem.txt --epochs 2 --batch 4 --block 16 --d-model 16 "
        "--layers 2")
POEM = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. "


@functools.lru_cache
def digits(train=256, test=200):
    """Synthetic digits, made once."""
    return synthetic_digits(train, test)


@functools.lru_cache
def text(string=None):
    """1,000 characters of help texts, or of a string: 900 to train with."""
    topics = train_shakespeare.help_texts()
    return train_shakespeare.as_text("tiny", string or "".join(
        topics.vocabulary[token] for token in topics.train[:1000]))


def image_run(path, resume=False, data=None, **changes):
    """Train a tiny model, 8 steps an epoch: -> averaged weights, log, scores, parameters."""
    recipe = {**train_mnist.parse(SMALL.split())[1], **changes}
    with contextlib.redirect_stdout(io.StringIO()):
        return train_mnist.train(recipe, data or digits(), CPU, path, resume)


def text_run(path, resume=False, data=None, **changes):
    """The same for a tiny language model, 14 steps an epoch."""
    recipe = {**train_shakespeare.parse(TEXT.split()[1:])[1], "forget": 0.2, **changes}
    with contextlib.redirect_stdout(io.StringIO()):
        return train_shakespeare.train(recipe, data or text(), CPU, path, resume)


RUNS = {"bidirectional": image_run, "rnn": functools.partial(image_run, model="rnn"),
        "s4": functools.partial(image_run, model="s4"), "text": text_run}


def learned(path):
    """What training has made, from a checkpoint, in one vector: weights, averages and losses.

    The seconds in the log are left out: they are another time every time.
    """
    state = torch.load(path)
    tensors = [*state["model"].values(), *state["average"].values(),
               torch.tensor([row[:2] for row in state["log"]]), torch.tensor(state["scores"])]
    return torch.cat([t.double().flatten() for t in tensors])


@contextlib.contextmanager
def folder_with_data():
    """In here, the working folder is a new one, and holds a text, and images of an odd size.

    poem.txt, and the folders grey and colour: 48 images of 9×15 to train with, 24 to test, 3
    classes. -> {folder: images (72, c, 9, 15)}
    """
    here, images = os.getcwd(), {}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name, channels in (("grey", 1), ("colour", 3)):
                images[name] = torch.randint(256, (72, channels, 9, 15), dtype=torch.uint8)
                for i, image in enumerate(images[name]):
                    place = os.path.join(name, "train" if i < 48 else "test", "abc"[i % 3])
                    os.makedirs(place, exist_ok=True)
                    to_pil_image(image).save(os.path.join(place, f"{i:02d}.png"))
            with open("poem.txt", "w", encoding="utf-8") as file:
                file.write(20 * POEM)
            yield images
        finally:
            os.chdir(here)


def command(line):
    """`python SCRIPT --flags`, in this process: -> exit code or last message, what it printed.

    A mistake is a SystemExit whose code is the message. argparse ends with code 2, and has printed
    its message to stderr. Signals and threads are left as they were, since more tests follow.
    """
    script, *flags = line.split()
    out, err = io.StringIO(), io.StringIO()
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            patch.object(sys, "argv", [script, *flags]), patch.object(torch, "set_num_threads"), \
            patch.object(train_mnist, "synthetic_digits", digits):
        try:
            code = sys.modules[script.removesuffix(".py")].main() or 0
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:
            code = 130
        finally:
            for number, handler in signals.items():
                signal.signal(number, handler)
    return (err.getvalue().strip().splitlines()[-1] if code == 2 else code), out.getvalue()


def runs(line):
    """The command ends well: -> what it printed, a dictionary for each of its RESULT lines."""
    code, printed = command(line)
    assert code == 0, code
    return printed, [dict(pair.split("=", 1) for pair in line.split()[1:])
                     for line in printed.splitlines() if line.startswith("RESULT")]


def test_all_models_have_one_budget():
    """Catches: a comparison of a large model with a small one."""
    for name, recipe in train_mnist.RECIPES.items():
        size, most = {"cifar10": ((3, 32, 32), 1_200_000), "next-pixel": ((1, 28, 28), 150_000)
                      }.get(name, ((1, 28, 28), 100_000))
        data, counts = digits()._replace(train_images=torch.zeros(1, *size)), {}
        for model in train_mnist.MODELS if name != "next-pixel" else ("causal", "s4"):
            built = train_mnist.build(dict(recipe, model=model), data)
            # a PixelLM's embedding and head are the same for both, and no part of the comparison
            part = built.blocks if name == "next-pixel" else built
            counts[model] = sum(p.numel() for p in part.parameters())
        print(f"    {name}: {counts}")
        assert max(counts.values()) <= most and max(counts.values()) < 1.0101 * min(counts.values())
        assert counts.get("bidirectional", counts["causal"]) == counts["causal"]


def test_the_first_loss_is_that_of_a_blind_guess():
    """Catches: an initialisation that is sure of itself before it has seen anything."""
    for model in train_mnist.MODELS:
        recipe, blind = dict(train_mnist.RECIPES["mnist"], model=model), math.log(10)
        torch.manual_seed(0)
        loss, _ = train_mnist.evaluate(train_mnist.build(recipe, digits()), recipe, digits())
        allow(f"{model}: first loss {loss:.3f}, ln 10 = {blind:.3f}", abs(loss - blind), 0.3)


class StopAfter:
    """In place of a script's STOP: empty, until it has been looked at so many times.

    Ctrl-C comes at any moment; this one comes at a moment that the test can choose.
    """

    def __init__(self, looks):
        self.looks = looks

    def __len__(self):
        self.looks -= 1
        return 1 if self.looks < 0 else 0


def stop_and_resume(name, run, looks):
    """A run equals itself, stopped and resumed, in all that it has learned."""
    run("whole.pt")
    for patience in looks:
        stop = StopAfter(patience)
        try:
            with patch.object(train_mnist, "STOP", stop), \
                    patch.object(train_shakespeare, "STOP", stop):
                run("part.pt")
            raise AssertionError(f"{name} did not stop after {patience} looks")
        except KeyboardInterrupt:
            run("part.pt", resume=True)
        equal(f"{name}, stopped after {patience} looks", learned("part.pt"), learned("whole.pt"))


def test_a_run_stopped_anywhere_and_resumed_ends_in_the_same_weights():
    """Catches: a checkpoint without the optimizer, the average, the order of the images, or the
    states that a language model carries from batch to batch; a draw that is no function of seed
    and step, such as that of a dropout that a reader puts into the block.

    A script looks at STOP in every step, and in every batch of the test: 8 + 1 looks an epoch of
    the images, 14 + 3 of the text. So 8 and 14 stop it between training and test.
    """
    forward = ConvS6.forward

    def with_dropout(self, *args, **more):
        y, state = forward(self, *args, **more)
        return F.dropout(y, 0.2, self.training), state

    with folder_with_data():
        for name, run in RUNS.items():
            stop_and_resume(name, run, (0, 5, 13, 14, 16, 17, 25) if name == "text" else (3, 8, 12))
        for name in ("bidirectional", "text"):
            RUNS[name]("without.pt")
            with patch.object(ConvS6, "forward", with_dropout):
                stop_and_resume(f"{name}, with dropout", RUNS[name], (5,))
            assert not torch.equal(learned("whole.pt"), learned("without.pt"))


def test_a_batch_is_normalised_and_has_every_image_once_an_epoch():
    """Catches: labels of other images, an epoch without half of them, an order that repeats."""
    images = torch.arange(96, dtype=torch.uint8).view(96, 1, 1, 1).repeat(1, 3, 5, 7)
    images[:, 1] = 255 - images[:, 1]              # image i is i, 255 - i, i; its label is 7 i
    data = train_mnist.as_data("any", images, torch.arange(96) * 7, *digits()[3:5], 10)
    pixels, orders = images.double() / 255, set()
    allow("the mean", error(data.mean.flatten().double(), pixels.mean((0, 2, 3))), 1e-3)
    allow("the deviation", error(data.std.flatten().double(), pixels.std((0, 2, 3))), 1e-2)
    # An image that says which one it is makes it easy to see where it went.
    for seed, epoch in itertools.product(range(2), range(2)):
        recipe, order = dict(train_mnist.RECIPES["mnist"], augment="none", seed=seed, batch=32), []
        for step in range(3 * epoch, 3 * epoch + 3):
            x, labels = train_mnist.batch(recipe, data, step)
            exact = (pixels[labels // 7] - data.mean) / data.std
            assert x.shape == (32, 3, 5, 7) and error(x.double(), exact) < 1e-6
            order += (labels // 7).tolist()
        assert sorted(order) == list(range(96))
        orders.add(tuple(order))
    print(f"    {len(orders)} orders in two epochs of two seeds")
    x, y = train_mnist.prepare({"task": "next-pixel"}, data, torch.arange(6.0).view(1, 1, 2, 3), 0)
    assert len(orders) == 4 and x.tolist() == [[256, 0, 1, 2, 3, 4]] and y.tolist() == [[*range(6)]]


def test_each_image_is_warped_or_shifted_and_mirrored_by_an_amount_of_its_own():
    """Catches: channels that move apart, a crop from the wrong image, one warp for all of a batch,
    a warp that moves what it should not."""
    # No two pixels are equal, so there is one way at most to get from an image to what came out.
    images = torch.arange(1, 1 + 6 * 3 * 32 * 32).float().view(6, 3, 32, 32)
    torch.manual_seed(0)
    ways = []
    for image, out in zip(images, train_mnist.shift_and_flip(images)):
        padded = F.pad(image, (2,) * 4, mode="reflect")
        found = [way for way in itertools.product(range(5), range(5), (0, 1)) if torch.equal(
            padded[:, way[0]:way[0] + 32, way[1]:way[1] + 32], out.flip(2) if way[2] else out)]
        assert len(found) == 1
        ways += found
    print(f"    six images, shifted down and right, and mirrored: {ways}")
    assert len(set(ways)) > 3 and {flip for *_, flip in ways} == {0, 1}
    spots = torch.zeros(400, 1, 28, 28)
    spots[..., 12:16, 12:16] = 1                   # 4×4 pixels in the middle
    allow("no warp", error(train_mnist.warp(spots, 0, 0, 0, 0), spots), 1e-4)
    moved, rows = train_mnist.warp(spots, 0, 0, 0, 2).squeeze(1), torch.arange(28.0) - 13.5
    down = (moved.sum(2) * rows).sum(1) / moved.sum((1, 2))                    # of its centre
    print(f"    moved down by {down.min():.2f} … {down.max():.2f} pixels")
    assert -2.01 < down.min() < -1.9 and 1.9 < down.max() < 2.01
    for amounts in ((45, 0, 0, 0), (0, 0.2, 0, 0), (0, 0, 20, 0)):     # turned, scaled, sheared
        warped = train_mnist.warp(spots, *amounts)
        assert error(warped[0], spots[0]) > 0.01 and error(warped[0], warped[1]) > 0.01


def test_a_step_is_what_the_recipe_says():
    """Catches: a schedule that is not followed, gradients that are not clipped, weight decay on all
    parameters, an average of other weights or with another decay; warps that are the same in every
    step or for every seed."""
    rates = [train_mnist.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert max(rates) == rates[99] == 1 and rates[49] == 0.5 and rates[-1] == 0
    # A spy in place of the optimizer's step sees what the loop has made of gradients and rates, and
    # the weights before and after. From these the average can be computed again.
    vector, step_of = torch.nn.utils.parameters_to_vector, torch.optim.AdamW.step
    for (module, run), (seed, most) in itertools.product(
            ((train_mnist, image_run), (train_shakespeare, text_run)), ((0, 0.4), (1, 0.998))):
        seen, norms, weights, seeds = [], [], [], set() if seed == 0 else seeds

        def step(self):
            model = groups.call_args.args[0]       # what `train` gave to parameter_groups
            seeds.add(torch.initial_seed())        # what this step drew its warps from
            seen.append([(g["lr"], g["weight_decay"], g["betas"]) for g in self.param_groups])
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
            weights.append(vector(model.parameters()).detach())
            step_of(self)
            weights.append(vector(model.parameters()).detach())

        with folder_with_data(), patch.object(torch.optim.AdamW, "step", step), \
                patch.object(module, "parameter_groups", wraps=parameter_groups) as groups:
            average, *_ = run("a.pt", lr=0.02, weight_decay=0.3, average=most, seed=seed)
        mean = weights[0]
        for i, (row, after) in enumerate(zip(seen, weights[1::2])):
            rate, decay = module.learning_rate(i, len(seen), 0.02), min(most, (1 + i) / (10 + i))
            assert row == [(rate, 0.3, (0.9, 0.95)), (rate, 0.0, (0.9, 0.95))], row
            mean = decay * mean + (1 - decay) * after
        name, ours = module.__name__, vector(average.parameters())
        allow(f"{name}: the averaged weights after {len(seen)} steps", error(ours, mean), 1e-6)
        print(f"    {name}: lengths of the gradients {min(norms):.2f} … {max(norms):.2f}")
        assert 0.999 < max(norms) < 1.001          # some were longer, and none is now
        assert len(seeds) == (seed + 1) * len(seen)            # each step has a seed of its own
        assert seed == 0 or not torch.equal(weights[0], first)         # and so have the weights
        first = weights[0]


def test_an_epoch_reads_every_character_once_and_each_batch_goes_on_where_the_last_one_stopped():
    """Catches: rows at other places in the text, characters that nobody reads, targets off by one,
    epochs that all begin at the same place."""
    # Every character of this text is another one, so each says where it stands.
    letters = train_shakespeare.as_text("letters", "".join(chr(65 + i) for i in range(1000)))
    recipe, firsts = train_shakespeare.parse(TEXT.split()[1:])[1], set()
    for epoch, seed in itertools.product(range(2), range(2)):
        last, seen = None, []
        for step in range(14 * epoch, 14 * epoch + 14):
            x, y = train_shakespeare.batch({**recipe, "seed": seed}, letters, step)
            assert x.shape == y.shape == (4, 16) and torch.equal((x + 1) % 900, y)
            assert last is None or torch.equal(x[:, 0], last)
            last, seen = y[:, -1], seen + x.flatten().tolist()
        print(f"    epoch {epoch}, seed {seed}: from character {seen[0]}, {len(seen)} read of 900")
        assert len(set(seen)) == len(seen) == 14 * 64
        firsts.add(seen[0])
    assert len(firsts) == 4


def test_a_row_of_text_goes_on_from_its_state_except_where_it_forgets():
    """Catches: states that are not carried, or carried into the next epoch; rows that never forget,
    or all of them at once."""
    # The loss of every step is computed again, row by row: each goes on from its own state, or from
    # none where it forgot. A state that is lost, or not lost, is another loss.
    recipe = train_shakespeare.parse(TEXT.split()[1:])[1]
    for forget in (0.0, 0.3, 1.0):
        with folder_with_data():                   # with lr = 0 the weights stay as they are
            model, log, _, _ = text_run("a.pt", lr=0.0, forget=forget)
        states, forgotten, worst = [None] * 4, 0, 0.0
        for step, (loss, _, _) in enumerate(log):
            torch.manual_seed(train_shakespeare.seed_for(0, "forget", step))
            rows = (torch.rand(4) < forget) | (step % 14 == 0)
            forgotten += rows.sum().item()
            x, y = train_shakespeare.batch(recipe, text(), step)
            with torch.no_grad():                  # one row after the other, each with its states
                pairs = [model(x[i:i + 1], None if rows[i] else states[i]) for i in range(4)]
            logits, states = torch.cat([pair[0] for pair in pairs]), [pair[1] for pair in pairs]
            worst = max(worst, abs(F.cross_entropy(logits.flatten(0, 1), y.flatten()) - loss))
        allow(f"chance {forget}, {forgotten} of {4 * len(log)} rows forget: losses", worst, 1e-5)


def test_the_validation_losses_are_those_of_the_whole_text():
    """Catches: a state lost between two pieces, a remainder that is left out."""
    # 100 characters: 99 guesses, in pieces of 32 or blocks of 16, and neither divides 99.
    torch.manual_seed(0)
    model, tokens = MambaLM(len(text().vocabulary), 16, 2).double(), text().valid
    stream = train_shakespeare.stream_loss(model, text(), piece=32)            # 4 pieces of the 100
    blocks = train_shakespeare.block_losses(model, text(), 16)
    with torch.no_grad():
        whole = F.cross_entropy(model(tokens[None, :-1])[0][0], tokens[1:]).item()
        parts = torch.cat([F.cross_entropy(model(x[None])[0][0], y, reduction="none")
                           for x, y in zip(tokens[:-1].split(16), tokens[1:].split(16))])
    allow(f"streaming {stream:.4f}", abs(stream / whole - 1), 1e-12)
    allow(f"in blocks {blocks.mean():.4f}, character by character", error(blocks, parts), 1e-12)


def test_a_tiny_text_is_memorised():
    """Catches: targets that are off by one, a gradient that misses a layer, a recipe that fails."""
    with folder_with_data():
        model, _, scores, _ = text_run("a.pt", data=text(12 * POEM), d_model=32, epochs=30,
                                       forget=0.0)
    vocabulary = text(12 * POEM).vocabulary
    print(f"    {scores[-1][0]:.4f} nats per character; ln {len(vocabulary)} = "
          f"{math.log(len(vocabulary)):.2f}")
    prompt = train_shakespeare.encode("Shall I", vocabulary)
    written = generate(model, prompt, len(POEM) - 8, temperature=0)
    written = "".join(vocabulary[token] for token in written)
    print(f"    Shall I|{written}")
    assert scores[-1][0] < 0.1 and "Shall I" + written == POEM[:-1]


def test_the_synthetic_digits_are_learnable():
    """Catches: labels that are not the images', warps that destroy them, a recipe that fails."""
    with folder_with_data():
        _, _, scores, _ = image_run("a.pt", data=digits(2400, 400), epochs=4, d_model=32, lr=6e-3)
    print("    test accuracy after each epoch: " + ", ".join(f"{right:.1f}" for _, right in scores))
    assert scores[-1][1] > 60


def test_the_settings_of_a_recipe_change_the_loss():
    """Catches: a setting that is read and recorded, and does nothing."""
    with folder_with_data():
        losses = [image_run("a.pt", lr=0.0, epochs=1, **changed)[1][0][0] for changed in (
            {}, {"bf16": True}, {"smoothing": 0.1}, {"augment": "none"},
            {"augment": "shift-flip"})]
    print(f"    the first loss, then by bf16, smoothing, augment: {losses}")
    assert len(set(losses)) == 5 and max(losses) < min(losses) + 0.2


def test_what_is_held_out_is_not_trained_on():
    """Catches: a choice of settings on images that were trained on, or on the test images."""
    x, test_x = digits().train_images, digits().test_images
    for flags, name, train, test in (("--holdout 50", "-holdout", x[:206], x[206:]),
                                     ("--limit 64", "-limit-64", x[:64], test_x),
                                     ("--holdout 50 --limit 64", "-holdout-limit-64", x[:64],
                                      x[206:])):
        data = train_mnist.shrink(digits(), train_mnist.parse(flags.split())[0])
        equal(f"{flags}: training images", data.train_images, train)
        equal(f"{flags}: test images", data.test_images, test)
        assert data.name == "synthetic-digits" + name
        assert len(data.train_labels) == len(train) and len(data.test_labels) == len(test)


def test_a_signal_ends_a_step_and_saves_and_the_command_goes_on_from_there():
    """Catches: a machine that shuts down and takes an hour with it; a checkpoint that is written
    under one name and looked for under another; a forgotten --resume that costs the last run."""
    # The signal comes while the third batch is made. The step is finished, the checkpoint written;
    # and then the same command with --resume must end where one ends that nobody stopped.
    for line, number, path in ((OWN, signal.SIGTERM, "grey-bidirectional-seed0.pt"),
                               (TEXT, signal.SIGINT, "text_poem-seed0.pt")):
        module, steps = sys.modules[line.split(".")[0]], iter(range(100))
        path = f"checkpoints/{path}"
        with folder_with_data():
            with patch.object(module, "STOP", []) as stop, \
                    patch.object(module, "batch", wraps=module.batch) as batch:
                batch.side_effect = lambda *_: (
                    signal.raise_signal(number) if next(steps) == 2 else None) or DEFAULT
                assert command(line)[0] == 130 and stop == [number]
                with contextlib.suppress(KeyboardInterrupt):
                    module.ask_to_stop(number, None)           # a second one
                    raise AssertionError("the second signal was ignored")
            assert torch.load(path)["step"] == 3           # it came in the third
            runs(f"{line} --resume")
            runs(line)
            equal("stopped and resumed, or at once", learned(path + ".old1"), learned(path))
            runs(f"{line} --resume")
            equal("and resumed where nothing is left", learned(path + ".old1"), learned(path))
    with folder_with_data(), patch.object(train_mnist, "SAVE_EVERY", 3), \
            patch.object(train_mnist, "save", wraps=train_mnist.save) as save:
        runs(f"{OWN} --epochs 1 --batch 6")
    saved = [call.args[4] for call in save.call_args_list]
    print(f"    an epoch of 8 steps is saved after {saved}")
    assert saved == [0, 3, 6, 8, 8]


def test_the_files_of_models_write_their_own_tables_and_figures():
    """Catches: a column that is gone, after half a minute of measuring."""
    some = s6._random_inputs
    with folder_with_data(), patch.object(rnn, "_measure", lambda *_: 0.01), patch.object(
            s6, "_random_inputs", lambda b, l, d, n: some(b, min(l, 32), d, n)):
        for line in ("s6.py", "rnn.py"):
            print(f"    {command(line)[1].splitlines()[-1]}")
        for name, rows in (("results/scan_scaling.csv", 21), ("results/s4_modes.csv", 3)):
            with open(name, encoding="utf-8") as file:
                assert len(file.read().splitlines()) == rows + 1
        assert all(os.path.getsize(f"figures/{name}.png") > 10_000
                   for name in ("scan_scaling", "hippo"))


def test_every_model_and_seed_of_a_comparison_has_its_row():
    """Catches: a comparison that fails at its last line, after hours; a setting in no row."""
    # Two seeds of four models. `--fuse concat` is no setting of the recipe "mnist", so without a
    # name of its own the table would be refused: it would replace that of the README.
    with folder_with_data():
        printed, rows = runs(f"{DIGITS} --compare --seeds 0 1 --name t --fuse concat --epochs 1")
        print("    " + "\n    ".join(printed.splitlines()[-9:]))
        assert len(rows) == 8 and "bidirectional minus causal" in printed
        with open("results/t.csv", encoding="utf-8") as file:
            head, *lines = file.read().splitlines()
        assert set(head.split(",")) >= {"model", "dataset", "seed", "params", "epochs", "seconds",
                                        "test_accuracy", "device", "torch", "command"}
        assert len(lines) == 8
        assert all("fuse=concat" in line and "d_model=16" in line for line in lines)
        state = torch.load("checkpoints/t-rnn-seed1.pt")
        assert state["recipe"]["model"] == rows[-1]["model"] == "rnn" and rows[-1]["seed"] == "1"
        assert float(rows[-1]["test_accuracy"]) == round(state["scores"][-1][1], 2)
        assert os.path.getsize("figures/t.png") > 10_000
        runs(f"{DIGITS} --compare --seeds 0 1 --name t --fuse concat --epochs 1 --resume")
        assert not any("old" in name for name in os.listdir("checkpoints"))    # none began anew


def test_the_next_pixel_is_measured_in_bits_and_the_digits_are_completed():
    """Catches: bits that are nats, a mean over images in place of pixels."""
    with folder_with_data():
        _, (row,) = runs("train_mnist.py next-pixel --data synthetic --d-model 8 --layers 1 "
                         "--limit 32")
        name = "next_pixel_synthetic_digits_limit_32"
        state = torch.load(f"checkpoints/{name}-causal-seed0.pt")
        model = train_mnist.build(state["recipe"], digits())
        model.load_state_dict(state["average"])
        tokens, pixels = train_mnist.prepare(state["recipe"], digits(), digits().test_images, None)
        with torch.no_grad():            # the chance that the model gave to what each pixel is
            chances = model(tokens).softmax(-1).gather(-1, pixels.unsqueeze(-1))
        bits = -chances.double().log2().mean().item()
        allow("bits", abs(float(row["test_bits_per_pixel"]) - bits), 1e-4)
        allow("nats", abs(float(row["test_nats_per_pixel"]) - bits * math.log(2)), 1e-4)
        assert os.path.getsize(f"figures/{name}_completions.png") > 10_000


def test_the_commands_of_the_language_model_find_what_they_need():
    """Catches: a checkpoint that is written under one name and looked for under another."""
    with folder_with_data():
        printed, rows = runs(f"{TEXT} --name p --seeds 0 1")
        assert "| stream |" in printed and len(rows) == 2
        scores = torch.load("checkpoints/p-seed1.pt")["scores"][-1]
        assert [float(rows[1][f"val_loss_{way}"]) for way in ("stream", "block")] == [
            round(score, 4) for score in scores]
        model, vocabulary = train_shakespeare.load_model("checkpoints/p-seed1.pt", CPU)
        own = train_shakespeare.load_text("data", path="poem.txt")
        equal("the averaged weights", *torch.tensor([[train_shakespeare.stream_loss(model, own)],
                                                     [scores[0]]]))
        model, vocabulary = train_shakespeare.load_model("checkpoints/p-seed0.pt", CPU)
        prompt = train_shakespeare.encode("Shall", vocabulary)
        written = generate(model, prompt, 20, temperature=0)
        printed, _ = runs("train_shakespeare.py --name p --generate Shall --tokens 20 "
                          "--temperature 0")
        print(f"    {printed.strip()}")
        assert printed.strip() == ("Shall" + "".join(vocabulary[i] for i in written)).strip()
        found = {name for _, _, files in os.walk(".") for name in files if name[2:] != ".png"}
        with open("results/p.csv", encoding="utf-8") as file:
            head = file.readline().strip().split(",")
    assert {"seed", "params", "epochs", "val_loss_stream", "val_loss_block", "command"} <= set(head)
    assert found == {"poem.txt", "p-seed0.pt", "p-seed1.pt", "p.csv", "p_loss.png"}, found


def test_a_folder_of_images_of_any_size_is_a_data_set():
    """Catches: 28×28, 10 classes or MNIST's mean written into the script, colours and rows mixed
    up, images that lose their labels."""
    with folder_with_data() as folders:
        for name, images in folders.items():
            data = train_mnist.load_folder(name, 0)
            _, (row,) = runs(f"{OWN} --dataset {name}")
            weights = torch.load(f"checkpoints/{name}-bidirectional-seed0.pt")["model"]
            print(f"    {row}")
            assert row["dataset"] == name and weights["head.weight"].shape == (3, 16)
            assert weights["stem.net.weight"].shape == (16, images.shape[1], 3, 3)
            # Which file did each image come from? Then its class is known: they took turns.
            places = [next(i for i in range(72) if torch.equal(image, images[i]))
                      for image in (*data.train_images, *data.test_images)]
            labels = torch.cat([data.train_labels, data.test_labels]).tolist()
            assert [place % 3 for place in places] == labels
            assert sorted(places[:48]) == list(range(48)) != places[:48]       # mixed
            assert sorted(places[48:]) == list(range(48, 72))
        assert train_mnist.load_folder("grey", 8).train_images.shape == (48, 1, 8, 8)


def child(line, *start):
    """A command in a process of its own, with as many threads as this one has."""
    script, *flags = line.split()
    return subprocess.Popen(
        [sys.executable, *start, os.path.join(HERE, script), *flags], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, encoding="utf-8", env={
            **os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": HERE,
            "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1"})


# The worst moment to be killed: the new checkpoint is written, but not yet where the old one is.
DIES = """import os, runpy, signal, sys
replace, moves = os.replace, []

def killed_in_the_third_save(part, path):
    moves.append(path)
    if len(moves) == 3:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    replace(part, path)

os.replace, sys.argv = killed_in_the_third_save, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PATHS = {OWN: "grey-bidirectional-seed0.pt", TEXT: "text_poem-seed0.pt"}


def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_same_weights():
    """Catches: a checkpoint that is written over the last good one: half of it, when all ends."""
    # Both at once, in processes of their own; then here, to the end and from the beginning.
    with folder_with_data():
        children = [child(f"{line} --out killed", "-c", DIES) for line in PATHS]
        for (line, path), process in zip(PATHS.items(), children):
            _, err = process.communicate()
            assert process.returncode == -9 or os.name == "nt" and process.returncode, err
            step = torch.load(f"killed/{path}")["step"]
            runs(f"{line} --out killed --resume")
            runs(f"{line} --out whole")
            equal(f"{path}, killed after step {step}", *(learned(f"{out}/{path}")
                                                         for out in ("killed", "whole")))


def test_two_processes_equal_one():
    """Catches: a batch that is not shared out, gradients that are summed and not averaged."""
    # Halves of a batch have the same mean gradient as the whole, but for rounding.
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    with folder_with_data():
        for line, path in PATHS.items():
            process = child(f"{line} --out two", *torchrun)
            out, err = process.communicate()
            assert process.returncode == 0 and out.count("RESULT") == 1, out + err
            runs(f"{line} --out one")
            two, one = (torch.load(f"{folder}/{path}")["log"] for folder in ("two", "one"))
            worst = max(abs(a[0] - b[0]) for a, b in zip(two, one, strict=True))
            allow(f"{line.split()[0]}: losses of {len(one)} steps", worst, 1e-3)


# --------------------------------------------------------------------------------------------------
# And on bad days: every mistake and every damage gets one clear line.
#
# One table of damages and one of mistakes. A row is a command that a user could type, and what its
# answer must name: the file, and what to do. A file that is damaged is never the reason for a
# traceback, for training on what is left of it, or for running what somebody put into it.

def flipped(data):
    """One bit of one weight of a checkpoint is wrong."""
    weight = list(torch.load(io.BytesIO(data))["average"].values())[-1]
    place = data.index(weight.numpy().tobytes())
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


def smaller(_):
    """An image of another size than the others."""
    file = io.BytesIO()
    to_pil_image(torch.zeros(1, 8, 8)).save(file, "PNG")
    return file.getvalue()


def half(data):
    return data[:len(data) // 2]


class Bomb:
    """To unpickle it would run code: it would make a file."""

    def __reduce__(self):
        return open, ("exploded", "w")


def code(_):
    file = io.BytesIO()
    torch.save(Bomb(), file)
    return file.getvalue()


IMAGES, LANGUAGE = "checkpoints/grey-bidirectional-seed0.pt", "checkpoints/text_poem-seed0.pt"
MNIST, SHAKESPEARE = "data/MNIST/raw/train-images-idx3-ubyte", "data/tinyshakespeare.txt"
WRITE = "train_shakespeare.py --text poem.txt --generate"
DAMAGES = [  # what a file becomes, which one, the next command, words that its answer must have
    (flipped, IMAGES, f"{OWN} --resume", [IMAGES, "cannot go on", "checksum"]),
    (code, IMAGES, f"{OWN} --resume", [IMAGES, "cannot go on"]),
    (flipped, LANGUAGE, f"{TEXT} --resume", [LANGUAGE, "cannot go on", "checksum"]),
    (b"", LANGUAGE, f"{TEXT} --resume", [LANGUAGE, "cannot go on"]),
    (half, "poem.txt", f"{TEXT} --resume", [LANGUAGE, "made with text"]),
    (flipped, LANGUAGE, f"{WRITE} S", [LANGUAGE, "checksum"]),
    (code, LANGUAGE, f"{WRITE} S", [LANGUAGE, "cannot read", "train one"]),
    (half, "grey/train/a/00.png", OWN, ["grey", "train/<class>"]),
    (b"", "grey/test/b/52.png", OWN, ["grey", "52.png"]),
    (smaller, "grey/train/c/47.png", OWN, ["47.png", "another size", "--size"]),
    (half, MNIST, DIGITS.replace("synthetic", "auto"), ["mnist", "data"]),
    (b"", SHAKESPEARE, "train_shakespeare.py", [SHAKESPEARE, "published"]),
    (b"caf\xe9 " * 99, "poem.txt", TEXT, ["poem.txt", "utf-8"]),
    (POEM.encode(), "poem.txt", TEXT, ["72 characters", "few"]),
]
MISTAKES = [  # a command, words that its answer must have
    (f"{OWN} --resume --lr 1", [IMAGES, "lr 0.003, not 1.0"]),
    (f"{WRITE} S --checkpoint {IMAGES}", [IMAGES, "cannot read"]),
    (f"{OWN} --resume --model s4", ["grey-s4-seed0.pt", "No such file"]),
    (f"{OWN} --patch 2 --stem conv", ["patch 2 does not divide", "9x15"]),
    (f"{OWN} --batch 49", ["48 training", "batch takes 49"]),
    (f"{OWN} --out poem.txt/in", ["cannot write", "poem.txt"]),
    (f"{OWN} --out broken --lr 1e9", ["not finite", "smaller --lr"]),
    (f"{OWN} --out broken --model s4 --state 3", ["even"]),
    (f"{OWN} --out broken --fuse sum", ["fuse", "concat"]),
    (f"{DIGITS} --d-model 2", ["d_model must be 4 or more, got 2"]),
    (f"{DIGITS} --patch 7", ["2 or 4, got 7", "\"patch\" takes any"]),
    ("train_mnist.py next-pixel --data synthetic --model rnn", ["causal or s4"]),
    ("train_mnist.py --epochs 0", ["--epochs must be from 1"]),
    ("train_mnist.py --lr fast", ["--lr", "fast"]),
    ("train_mnist.py --lr 1 pixels", ["pixels"]),
    ("train_mnist.py --compare --lr 1", ["--name"]),
    (f"{TEXT} --out broken --lr 1e9", ["not finite", "smaller --lr"]),
    (f"{TEXT} --text absent.txt", ["absent.txt", "No such file"]),
    (f"{WRITE} Ω", ["prompt", "Ω"]),
    (f"{WRITE} S --tokens 0", ["--tokens must be from 1"]),
]


def answers(line, words):
    """The command ends with one line, which names the script and has all of the words."""
    message, _ = command(line)
    print(f"    {message}")
    assert isinstance(message, str) and "\n" not in message, line
    assert message.startswith(line.split()[0] + ": ") and all(word in message for word in words), (
        message, words)


def test_a_mistake_or_a_damage_is_answered_in_one_line():
    """Catches: a traceback, a pickle that runs code, a wrong bit, training on half a data set, a
    typing error found after an hour, a good checkpoint lost to NaN."""
    with folder_with_data(), patch("urllib.request.urlopen", side_effect=OSError("no network")):
        os.makedirs(os.path.dirname(MNIST))
        for path in (MNIST, SHAKESPEARE):          # there, but not what was published
            with open(path, "wb") as file:
                file.write(b"\0\0\10\3 and so on")
        runs(OWN)
        runs(TEXT)
        for damage, path, line, words in DAMAGES:  # and afterwards the file is whole again
            with open(path, "rb") as file:
                whole = file.read()
            damaged = damage(whole) if callable(damage) else damage
            for content in (damaged, whole):
                with open(path, "wb") as file:
                    file.write(content)
                if content == damaged:
                    answers(line, words)
            assert not os.path.exists("exploded")
        for line, words in MISTAKES:
            answers(line, words)
        for name in os.listdir("broken"):
            assert learned(f"broken/{name}").isfinite().all()


def test_without_network_the_fallback_is_announced_and_labelled():
    """Catches: synthetic digits reported as MNIST, help texts as Shakespeare."""
    no_network, real = OSError("Temporary failure in name resolution"), ["name resolution"]
    with folder_with_data(), patch("torchvision.datasets.MNIST", side_effect=no_network) as mnist, \
            patch("torchvision.datasets.CIFAR10", side_effect=no_network), \
            patch("torch.hub.download_url_to_file", side_effect=no_network):
        for line, name in ((DIGITS.replace("synthetic", "auto"), "synthetic-digits"),
                           ("train_shakespeare.py --quick --batch 64 --block 256 --d-model 16",
                            "synthetic-pydoc-quick")):
            printed, (row,) = runs(f"{line} --epochs 1")
            print(f"    {row['dataset']}: {printed.splitlines()[2]}")
            assert "SYNTHETIC" in printed and row["dataset"] == name
            answers(f"{line} --data real", [*real, "--data synthetic"])
            assert not any(files for _, _, files in os.walk("data"))
        answers("train_mnist.py cifar10", ["cifar10", *real])  # nothing stands in for these
        # torchvision does not look at unpacked files that are there; the script must.
        mnist.side_effect, mnist.return_value.data = None, digits().test_images[:, 0]
        mnist.return_value.targets = digits().test_labels      # files that are there, and others'
        answers(f"{DIGITS} --data real", ["not the published images"])


# --------------------------------------------------------------------------------------------------
# visualize_delta.py: looking at Δ. A picture of what a model does must not change what it does, and
# every number below it must be the one that its name says.

import visualize_delta
from visualize_delta import changes, haystacks, rank_correlation, switch_off, watch


def test_looking_at_delta_changes_no_output_and_leaves_no_trace():
    """Catches: a hook that replaces what it reads or stays, a Δ that is not the one that scans."""
    torch.manual_seed(0)
    tokens, images = torch.randint(11, (2, 30)), torch.rand(2, 1, 28, 28)
    language, vision_model = MambaLM(11, 16, 2), VisionMamba(16, 2)
    for model, look in ((language, lambda: language(tokens)[0]),
                        (vision_model, lambda: vision_model(images))):
        before = look()
        with contextlib.suppress(ZeroDivisionError), watch(model) as scans:
            equal(f"{type(model).__name__} while one looks", look(), before)
            1 / 0
        equal(f"{type(model).__name__} afterwards", look(), before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for scan in scans.values():
            layer, x = scan.s6, scan.x
            _, B, C = layer.x_proj(x).split([layer.dt_rank, layer.n, layer.n], -1)
            y = selective_scan(x, scan.delta, -layer.A_log.exp(), B, C, layer.D)
            equal("the Δ that was read makes the output", layer(x)[0], y)


def test_the_change_of_h_is_the_difference_of_two_states():
    """Catches: a state that is read before its token, or not carried on."""
    torch.manual_seed(0)
    layer, x = S6(8, 4), torch.randn(2, 9, 8)
    with watch(layer) as scans:
        layer(x)
    states = [layer(x[:, :t])[1] for t in range(1, 10)]
    states = torch.stack([torch.zeros_like(states[0]), *states], 1)            # (b, l+1, d, n)
    exact = states.diff(dim=1).flatten(2).norm(dim=2)
    allow("changes(scan)", error(changes(scans[""]), exact), 1e-5)


def test_without_selection_delta_is_constant_and_S6_a_convolution():
    """Catches: an ablation that switches nothing off."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 8)
    for what, constant, convolution in (("nothing", False, False), ("delta", True, False),
                                        ("all", True, True)):
        layer = S6(8, 4)
        if what != "nothing":
            switch_off(layer, what)
        with watch(layer) as scans:
            y, _ = layer(x)
        spread, twice = scans[""].delta.std(1).max(), error(layer(2 * x)[0], 2 * y)
        print(f"    {what} off: Δ varies by {spread:.1e}; S6(2x) is 2 S6(x) but for {twice:.1e}")
        assert (spread < 1e-6) == constant and (twice < 1e-5) == convolution
        assert error(y, layer.D * x) > 1e-3        # and not because nothing is written or read


def test_the_answer_to_a_haystack_is_right_by_construction():
    """Catches: an answer that is overwritten, a marker too many, a needle lost between pieces."""
    # If the data were wrong, no model could be right; or, worse, one could be right for no reason.
    for length, piece in ((3, None), (3, 1), (100, None), (100, 7), (100, 1)):
        places = torch.arange(length - 2)
        answers = torch.randint(16, places.shape)
        pieces = list(haystacks(length, places, answers, torch.Generator(), piece))
        assert max(p.shape[1] for p in pieces) <= (piece or length)
        tokens = torch.cat(pieces, 1)
        assert tokens.shape == (length - 2, length) and tokens.min() >= 0 and tokens.max() == 16
        for row, place, answer in zip(tokens, places, answers):
            assert (row == 16).nonzero().flatten().tolist() == [place, length - 1]
            assert row[place + 1] == answer
    tokens, places, symbols = visualize_delta.scattered(50, 40, torch.Generator())
    for row, place, symbol in zip(tokens, places, symbols):
        assert row[:40][row[:40] != 16].tolist() == symbol.tolist() == row[place].tolist()
        assert (row[40:] == 17).all() and len(row) == 56
    print("    every needle in haystacks of 3 and 100, in pieces of 1, 7 and all; copying in order")


def test_a_haystack_read_in_pieces_is_the_whole():
    """Catches: a state that is dropped between pieces, by Mamba or by the RNN."""
    torch.manual_seed(0)
    answers, length = torch.arange(4), 300
    for name in ("priced", "rnn"):
        model = visualize_delta.build(name, 0)
        whole, pieces = (list(haystacks(length, 60 * answers, answers, torch.Generator(), piece))
                         for piece in (None, 64))
        tokens = torch.cat(pieces, 1)
        logits = visualize_delta.read(model, tokens.split(64, 1), CPU)
        allow(f"{name}: logits after {length} tokens, in pieces of 64",
              error(logits, model(tokens)[0][:, -1, :16]), 1e-5)
        assert whole[0].shape == tokens.shape


def test_the_needle_is_taught_at_growing_lengths_and_the_price_comes_last():
    """Catches: a curriculum that stays at 8, a price from the first step, or on every model."""
    # In place of `learn` a note of what it was asked, and a loss that says: this length is solved.
    for name in ("priced", "unpriced"):
        calls = []

        def learn(model, optimizer, tokens, answers, price=0.0):
            calls.append((tokens.shape[1], price))
            return 0.04

        with patch.object(visualize_delta, "learn", learn), \
                contextlib.redirect_stdout(io.StringIO()):
            model = visualize_delta.build(name, 0)
            longest = visualize_delta.teach_needle(model, name, 0, CPU, 60, 512)
        lengths, prices = zip(*calls)
        assert lengths[:6] == (8, 16, 32, 64, 128, 256) and longest == 256
        assert set(lengths[6:]) == {8, 16, 32, 64, 128, 256} and not any(prices[:6])
        assert set(prices[6:]) == {0.01 if name == "priced" else 0.0}
    model, means = visualize_delta.build("priced", 0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens, answers = torch.randint(16, (8, 16)), torch.randint(16, (8, 1))
    for _ in range(3):
        with watch(model) as scans:
            visualize_delta.learn(model, optimizer, tokens, answers, price=10.0)
        means.append(sum(scan.delta.log().mean().item() for scan in scans.values()))
    print(f"    mean log Δ under a price: {means}")
    assert means[0] > means[1] > means[2]
    counts = {name: sum(p.numel() for p in visualize_delta.build(name, 0).parameters())
              for name in visualize_delta.MODELS}
    print(f"    parameters: {counts}")
    assert max(counts.values()) <= 75_000 and max(counts.values()) < 1.01 * min(counts.values())


def test_the_numbers_at_the_needle_are_those_worked_out_by_hand():
    """Catches: a window that is off, the question counted in, a scan that is read upside down."""
    # The needle is 16, 5 at places 2 and 3; the five tokens from there on move the state by 25 of
    # 30. Δ at the needle is 6, the median elsewhere 2. The question at the end counts nowhere.
    tokens = torch.tensor([[1, 2, 16, 5, 3, 3, 3, 4, 4, 4, 16]])
    delta = torch.tensor([[2., 2, 4, 6, 2, 2, 2, 2, 2, 2, 90]])
    moves = torch.tensor([[1., 1, 5, 5, 5, 5, 5, 1, 1, 1, 90]])
    needles = tokens, torch.tensor([2]), None
    with patch.object(visualize_delta, "random_needles", lambda *_: needles), \
            patch.object(visualize_delta, "gate", lambda _: delta), \
            patch.object(visualize_delta, "changes", lambda _: moves):
        row = visualize_delta.gates_at_needles(visualize_delta.build("priced", 0), "priced", 0, CPU,
                                               1, 11)[0]
    print(f"    {row}")
    assert row["delta_at_needle"] == "6" and row["needle_over_median"] == "3"
    assert row["share_of_change_percent"] == f"{100 * 25 / 30:.1f}"


def test_delta_lies_on_the_image_where_its_token_was_read():
    """Catches: a scan drawn upside down, ink compared with the token after, ties that favour one
    side."""
    torch.manual_seed(0)
    model = VisionMamba(16, 2, stem="patch").eval()
    black, spot = torch.zeros(2, 1, 1, 28, 28).unbind(0)
    spot[..., 8:12, 12:16] = 1                     # the patch in row 2, column 3
    before, after = (visualize_delta.read_images(model, image) for image in (black, spot))
    for scan, backward in list(before)[:2]:
        grids = [visualize_delta.on_grid(r[scan, backward][0], backward) for r in (before, after)]
        changed = (grids[0] != grids[1]).nonzero().tolist()
        print(f"    {scan}: one patch of ink changes Δ at {changed}")
        assert changed == [[2, column] for column in (range(4) if backward else range(3, 7))]
    ink = torch.rand(3, 49)
    row = visualize_delta.correlate(F.pad(ink, (2, 0))[:, :49], ink)
    print(f"    Δ that is the ink two tokens back: {row}")
    assert row["back_2"] == "1.000" and abs(float(row["back_0"])) < 0.5
    a, b = torch.tensor([[1., 2, 2, 4]]), torch.tensor([[10., 30, 20, 40]])
    # ranks 1, 2½, 2½, 4 and 1, 3, 2, 4: ρ = 4.5 / √(4.5 · 5)
    allow("ρ with a tie", abs(rank_correlation(a, b).item() - 0.9 ** 0.5), 1e-6)
    allow("ρ of a falling pair", abs(rank_correlation(b, -b).item() + 1), 1e-6)
    kinds = visualize_delta.kinds_of("\n\nROMEO:\nI'm no: one.")
    assert [kind[:2] for kind in kinds] == ["li", "li", *5 * ["sp"], "co", "li", "fi", "ot", "le",
                                            "sp", "fi", "le", "co", "sp", "fi", "le", "le", "ot"]


def test_the_commands_that_look_at_delta_write_what_they_promise():
    """Catches: a figure that is promised and not written, a control from another seed, the weights
    before averaging; a traceback for a model that cannot be looked at."""
    look, module = "visualize_delta.py --task", visualize_delta
    # Real files and figures, but little work: no learning, two haystacks, images of 2×2 tokens.
    few = functools.partial(module.gates_at_needles, count=2, length=64)
    with folder_with_data(), patch.object(module, "learn", lambda *_, **__: 0.04), \
            patch.object(module, "gates_at_needles", few), patch.object(
                module, "QUICK", (4, 256, 7)), patch.object(module, "BACK", range(2)):
        answers(f"{look} digits", ["no trained model", "train_mnist.py"])
        runs(f"{DIGITS} --seed 3 --patch 14 --stem patch")
        runs("train_shakespeare.py --data synthetic --quick --batch 64 --block 256 --d-model 16 "
             "--layers 1")
        runs(f"{OWN} --model rnn")
        path = "checkpoints/synthetic_digits-bidirectional-seed3.pt"
        answers(f"{look} digits --checkpoint checkpoints/grey-rnn-seed0.pt", ["reads MNIST"])
        answers(f"{look} digits --index 199", ["--index must be 0"])
        state = torch.load(path)
        pair = module.make_pair(state, lambda: train_mnist.build(state["recipe"], digits()))
        torch.manual_seed(train_mnist.seed_for(3, "weights"))
        first = train_mnist.build(state["recipe"], digits()).state_dict()
        for name, weights in (("trained", state["average"]), ("untrained", first)):
            assert all(map(torch.equal, pair[name].state_dict().values(), weights.values()))
        try:
            runs("visualize_delta.py --quick --task digits needle copying text")
        finally:
            torch.set_flush_denormal(False)
        state["scores"].pop()
        torch.save(state, path)
        answers(f"{look} digits", [path, "not finished"])
        found = {name for folder in ("results", "figures") for name in os.listdir(folder)}
    print(f"    {sorted(found)}")
    digit, text = "synthetic_digits", "synthetic_pydoc_quick"
    assert found == {
        f"delta_{digit}.csv", f"delta_digit_{digit}.png", f"delta_ink_{digit}.png",
        f"scan_{digit}.gif", "needle_quick.csv", "needle_delta_quick.csv",
        "needle_delta_quick.png", "needle_lengths_quick.png", "needle_grid_quick.png",
        "copying_length_32_quick.csv", "copying_length_32_quick.png", f"delta_text_{text}.csv",
        f"delta_text_{text}.png"}, found


# --------------------------------------------------------------------------------------------------
# The runner.

def main(words):
    if hasattr(sys.stdout, "reconfigure"):       # a Windows log may not know Δ
        sys.stdout.reconfigure(errors="replace")
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")
             and (not words or any(word in name for word in words))]
    failed, start = [], time.perf_counter()
    for name, test in tests:
        print(name[5:].replace("_", " "), flush=True)
        try:
            test()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
    for name in failed:
        print(f"failed: {name}")
    print(f"{time.perf_counter() - start:.0f} s, torch {torch.__version__}, "
          f"Python {sys.version.split()[0]}")
    print(f"{len(tests) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
