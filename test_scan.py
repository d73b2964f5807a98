"""test_scan.py: why you may believe the rest.

    python test_scan.py                all tests, in a minute or two; the last line counts them
    python test_scan.py padding zoh    those whose name contains one of the words
    pytest test_scan.py                the same tests, for those who have pytest
    python test_scan.py --torture      kills, damage, full disks, no network, random arguments: a
                                       table of tried and held after ten minutes or so; or words

Each test is a sentence that is true, and says which bug would make it false. It prints the error
that it found beside the error that it allows. Read them as a lesson: two steps by hand, then the
equation against every faster way to compute it, then what follows from the equation, the models,
the training scripts, the look at Δ, what each of them says when something is wrong, and last the
torture.

Read before: s6.py. Read now as far as "The layers and models", then block.py, and the rest with the
files that it tests.
"""
import contextlib
import copy
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import math
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import torch
import torch.nn.functional as F

import block
import rnn
import s6
import train_mnist
import train_shakespeare
import vision
import visualize_delta
from block import MambaBlock, MambaLM, causal_conv, generate, load_official, parameter_groups
from rnn import RNN, S4, S4Block, S4Stack, diagonal_hippo, hippo, memorize, recall
from s6 import S6, definition, selective_scan
from train_mnist import ImageTrainer, PixelTrainer, UserError
from train_shakespeare import TextTrainer
from vision import PixelLM, VisionBlock, VisionMamba
from visualize_delta import changes, haystacks, rank_correlation, switch_off, watch

METHODS, DISCRETIZATIONS = ("sequential", "parallel"), ("euler", "zoh")
WAYS = list(itertools.product(METHODS, DISCRETIZATIONS))
LENGTHS = (1, 2, 3, 5, 7, 64, 100, 257)
CPU = torch.device("cpu")


def error(ours, exact):
    """The largest difference over the largest value."""
    ours, exact = ours.detach().double(), exact.detach().double()
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    return ((ours - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


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
# The scan computes its equation.

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
    """The gradients of every argument, for a loss that reads both y and the last state."""
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


def test_gradcheck_of_both_methods_and_both_discretizations():
    """Catches: a wrong equation and its gradient that agree: differences know no derivation."""
    for method, z in WAYS:
        assert torch.autograd.gradcheck(scanner(method, z), inputs(b=2, l=5, d=2, n=2))
        print(f"    {method}, {z}: all seven arguments, y and the last state")


def test_the_gradient_of_the_gradient_is_refused_and_not_wrong():
    """Catches: a second derivative that silently leaves out half of its terms."""
    tensors = inputs(l=3)
    y = selective_scan(*tensors)
    raises(["first derivative only"],
           lambda: torch.autograd.grad(y.sum(), tensors, create_graph=True), RuntimeError)
    raises(["torch.func", "batch"],
           lambda: torch.func.vmap(selective_scan)(*(t[None] for t in tensors)), RuntimeError)


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

def test_a_sequence_cut_anywhere_and_continued_is_the_whole():
    """Catches: a last state taken from padding, h0 ignored by a method."""
    x, delta, A, B, C, D, h0 = constants(l=37)
    for method, z in WAYS:
        scan = scanner(method, z)
        whole, last = scan(x, delta, A, B, C, D, h0)
        worst = 0.0
        for cut in range(1, 37):
            y1, h = scan(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, h0)
            y2, h = scan(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, h)
            worst = max(worst, error(torch.cat([y1, y2], 1), whole), error(h, last))
        allow(f"{method}, {z}: worst of all 36 cuts of 37 tokens", worst, 1e-14)


def through(blocks, x, states=None, mask=None):
    """Run x through blocks: -> output, states."""
    states, new = states or [None] * len(blocks), []
    for layer, state in zip(blocks, states):
        x, state = layer(x, state, mask, return_state=True)
        new.append(state)
    return x, new


def states_error(ours, exact):
    """The worst error of all windows and states."""
    return max(error(a, b) for s, t in zip(ours, exact) for a, b in zip(s, t))


def two_blocks():
    """Two blocks and an input of 11 tokens for them, in float64."""
    torch.manual_seed(0)
    return [MambaBlock(16, n=4).double() for _ in range(2)], torch.randn(3, 11, 16).double()


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


def test_the_future_cannot_change_the_past_when_causal_and_does_when_bidirectional():
    """Catches: a convolution or a norm that peeks ahead, a backward branch that is not reversed."""
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16).double()
    other = torch.cat([x[:, :7], x[:, 7:] + 1], 1)
    image = torch.rand(1, 1, 28, 28).double()
    darker = torch.cat([image[:, :, :20], image[:, :, 20:] / 2], 2)
    with torch.no_grad():
        layer = MambaBlock(16, n=4).double()
        equal("block.py: tokens 7 … 11 and the tokens before", layer(x)[:, :7], layer(other)[:, :7])
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


def test_reversing_the_image_and_swapping_the_branches_mirrors_the_result():
    """Catches: branches that share what they should not, a fusion that favours one of them."""
    torch.manual_seed(0)
    layer, x = VisionBlock(16, n=4).double(), torch.randn(2, 9, 16).double()
    with torch.no_grad():
        y = layer(x)
        layer.first, layer.second = layer.second, layer.first
        allow("9 tokens", error(layer(x.flip(1)).flip(1), y), 1e-15)


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


def test_delta_zero_keeps_and_delta_infinite_forgets():
    """Catches: Δ in the wrong place: it decides between holding the state and replacing it."""
    x, delta, A, B, C, _, h0 = constants(l=20)
    jump = delta.clone()
    jump[:, 10] = 1e4
    for method, z in WAYS:
        scan = scanner(method, z)
        _, h = scan(x, torch.zeros_like(delta), A, B, C, None, h0)
        equal(f"{method}, {z}: 20 tokens with Δ = 0 leave the state", h, h0)
        ends = [scan(x, jump, A, B, C, None, start)[1] for start in (h0, 5 - h0)]
        allow(f"{method}, {z}: past Δ = 10⁴ the first state is forgotten", error(*ends), 1e-15)


def test_padding_changes_nothing_wherever_it_stands():
    """Catches: padding seen by the convolution, written to the state, or kept in the window."""
    blocks, x = two_blocks()
    mask = torch.zeros(3, 20, dtype=torch.bool)
    padded = 100 * torch.randn(3, 20, 16).double()
    padded[:, ::7] = math.nan
    for i in range(3):                   # 11 real tokens at random places among 20
        mask[i, torch.randperm(20)[:11]] = True
        padded[i, mask[i]] = x[i]
    with torch.no_grad():
        whole, last = through(blocks, x)
        y, states = through(blocks, padded, None, mask)
    allow("the real tokens", error(y[mask].view_as(x), whole), 1e-14)
    allow("windows and states", states_error(states, last), 1e-14)
    equal("the padding comes out as it went in", y[~mask].nan_to_num(), padded[~mask].nan_to_num())


def test_zoh_and_euler_agree_as_delta_vanishes():
    """Catches: a wrong B̄. Euler's error is about |ΔA|/2: a tenth of Δ makes a tenth of it."""
    x, delta, A, B, C, _, _ = constants(l=1)
    errors = []
    for scale in (1e-2, 1e-3, 1e-4):
        zoh = selective_scan(x, scale * delta, A, B, C, discretization="zoh")
        errors.append(error(selective_scan(x, scale * delta, A, B, C), zoh))
        worst = (scale * delta.max() * -A.min()).item()
        allow(f"largest |ΔA| = {worst:.0e}", errors[-1], worst)
    allow("tenfold, off by", abs(errors[1] / errors[2] / 10 - 1), 0.01)


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


def test_compiled_and_eager_agree():
    """Catches: TorchScript reading the loops differently; a fallback that nobody has ever run."""
    spec = importlib.util.spec_from_file_location("s6_eager", s6.__file__)
    eager = importlib.util.module_from_spec(spec)
    with replaced(torch.jit, "script", None):    # calling it raises a TypeError
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
            x, _, A, B, C, D, h0 = constants(l=2000, dtype=torch.float32)
            tensors = [size * x, torch.full_like(x, step), A, B, C, D, h0]
            tensors = [t.requires_grad_() for t in tensors]
            outputs = scanner(method, z)(*tensors)
            grads = torch.autograd.grad(sum(t.mean() for t in outputs), tensors)
            assert all(t.isfinite().all() for t in (*outputs, *grads)), (method, z, step, size)
        print(f"    {method}, {z}: 2,000 tokens with Δ = 1e-8, Δ = 1e3, x = 0, x = 1e15; gradients")


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
    """Catches: states kept for every token. 16 times the length keeps 4 times the states."""
    def kept(l):
        sizes, tensors = {}, inputs(b=1, l=l, d=64, n=16, dtype=torch.float32)[:5]

        def note(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            selective_scan(*tensors, method="sequential")
        return sum(sizes.values()) - 4 * sum(t.numel() for t in tensors)

    short, long = kept(256), kept(4096)
    print(f"    kept beside the inputs: {short} bytes at 256 tokens, {long} at 4,096")
    assert long < 4.5 * short


# --------------------------------------------------------------------------------------------------
# The layers and models.

def test_S6_is_algorithm_1():
    """Catches: Δ without softplus, B and C exchanged, names that official weights do not fit."""
    torch.manual_seed(0)
    layer, x = S6(8, n=4, dt_rank=2).double(), torch.randn(2, 6, 8).double()
    names = {"x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"}
    assert {name for name, _ in layer.named_parameters()} == names
    dt, B, C = (x @ layer.x_proj.weight.t()).split([2, 4, 4], -1)
    delta = torch.log1p(torch.exp(dt @ layer.dt_proj.weight.t() + layer.dt_proj.bias))
    exact, _ = definition(x, delta, -torch.exp(layer.A_log), B, C, layer.D)
    allow("S6(x) against Algorithm 1", error(layer(x), exact), 1e-14)


def test_a_fresh_layer_rests_where_the_paper_says():
    """Catches: a bias that is not the inverse of softplus, an A that is not -1 … -n."""
    torch.manual_seed(0)
    layer = S6(4096)
    resting = F.softplus(layer.dt_proj.bias)
    middle = resting.log().mean().exp().item()
    print(f"    Δ rests between {resting.min():.1e} and {resting.max():.1e}, in the mean of the "
          f"logarithm at {middle:.1e}")
    assert 0.99e-3 <= resting.min() and resting.max() <= 1.01e-1 and 0.9e-2 < middle < 1.1e-2
    A = -torch.arange(1.0, 17).expand(4096, 16)
    allow("A = -1 … -16", error(-layer.A_log.exp(), A), 1e-6)


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
        model, x = S4Stack(6, layers=2, n=64).to(dtype), torch.randn(2, 784, 6, dtype=dtype)
        exact, last = model(x, mode="recurrence", return_state=True)
        for cut in (0, 1, 500, 783):
            y, states, first = [], None, x[:, :cut]
            for part in (first, x[:, cut:]) if cut else (x,):
                out, states = model(part, states, return_state=True)
                y.append(out)
            allow(f"{dtype}, cut at {cut}: y", error(torch.cat(y, 1), exact), allowed)
            worst = max(error(torch.view_as_real(a), torch.view_as_real(b))
                        for a, b in zip(states, last))
            allow(f"{dtype}, cut at {cut}: the last state", worst, 3 * allowed)
    layer, x = S4(64, 92), torch.randn(2, 784, 64)
    allow("one layer of 64 channels, n = 92, l = 784, float32",
          error(layer(x), layer(x, mode="recurrence")), 1e-5)
    for l in (1, 2, 3, 10):
        allow(f"l = {l}", error(layer(x[:, :l]), layer(x[:, :l], mode="recurrence")), 1e-5)
    x = x[..., :6]
    raises(["mode", "recurrence"], lambda: model(x, mode="parallel"))
    raises(["(b, l, 6)"], lambda: model.layers[0].s4(x[..., :5]))


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
    allow("against the dense recurrence", error(layer(x), ys), 1e-9)
    assert torch.equal(S4(2, n).omega, layer.omega.float()) and (S4(2, n).A_log.exp() == 0.5).all()
    steps = S4(4096).log_dt.exp()
    print(f"    Δ from {steps.min():.4f} to {steps.max():.4f}, median {steps.median():.4f}")
    assert 1e-3 <= steps.min() < 1.1e-3 and 0.009 < steps.median() < 0.011 and steps.max() > 0.09
    block, x = S4Block(8, n=4), torch.randn(2, 9, 8)
    a, gate = block.out_proj(F.gelu(block.s4(block.norm(x)))).chunk(2, -1)
    allow("the block: x + GLU(W GELU(S4(norm(x))))", error(block(x), x + a * gate.sigmoid()), 1e-6)


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
    allow("S6 with Δ, B, C that do not look at x", error(layer(x), y), 1e-12)


def test_all_models_have_one_budget():
    """Catches: a comparison of a large model with a small one."""
    counts = {model: sum(p.numel() for p in train_mnist.build(settings(model=model)).parameters())
              for model in train_mnist.MODELS}
    print(f"    parameters: {counts}")
    assert counts["bidirectional"] == counts["causal"] <= 100_000
    assert all(abs(count / counts["causal"] - 1) < 0.0101 for count in counts.values())
    for flags, most in ((["--tokens", "pixels"], 100_000), (["--dataset", "cifar10"], 1_200_000),
                        (["--task", "next-pixel"], 100_000)):
        args = vars(train_mnist.parse(flags))
        writing = args["task"] == "next-pixel"   # most of a PixelLM are tables, the same for both
        kind, counts = PixelTrainer if writing else ImageTrainer, {}
        for name in kind.models:
            model = kind.build(dict(args, model=name))
            part = model.blocks if writing else model
            counts[name] = sum(p.numel() for p in part.parameters())
        print(f"    {' '.join(flags)}{', the blocks' * writing}: {counts}")
        assert max(counts.values()) <= most
        assert max(counts.values()) < 1.0101 * min(counts.values())
    counts = {name: sum(p.numel() for p in visualize_delta.build(name, 0).parameters())
              for name in visualize_delta.MODELS}
    print(f"    of the needle: {counts}")
    assert max(counts.values()) <= 75_000 and max(counts.values()) < 1.01 * min(counts.values())


def language_model():
    """A small language model in float64, not fresh: its biases and norms say something too."""
    torch.manual_seed(0)
    model = MambaLM(vocabulary=13, d_model=16, layers=4, n=4).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, torch.randint(0, 13, (2, 12))


def test_a_prompt_of_any_length_and_then_step_by_step_is_the_whole_text():
    """Catches: a prompt shorter than the convolution's window, states given to the wrong layer."""
    model, tokens = language_model()
    with torch.no_grad():
        whole, last = model(tokens, return_state=True)
        for prompt in range(1, 10):
            logits, states = model(tokens[:, :prompt], return_state=True)
            parts = [logits]
            for t in range(prompt, 12):
                logits, states = model(tokens[:, t:t + 1], states, return_state=True)
                parts.append(logits)
            worst = max(error(torch.cat(parts, 1), whole), states_error(states, last))
            allow(f"four layers, prompt of {prompt}: logits and states", worst, 1e-13)


def test_the_language_model_begins_with_a_blind_guess():
    """Catches: a head that is not scaled as an embedding that is also a head must be."""
    torch.manual_seed(0)
    model, tokens = MambaLM(65), torch.randint(0, 65, (4, 65))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
    allow(f"first loss {loss:.3f}, ln 65 = {math.log(65):.3f}", abs(loss - math.log(65)), 0.1)


def test_official_weights_load_by_either_set_of_names():
    """Catches: a parameter that the official weights know by another name or in another shape."""
    model, tokens = language_model()
    for name, tied in (("embedding", True), ("embeddings", False)):     # mamba_ssm, transformers
        official = {}
        for key, weight in model.state_dict().items():
            key = key.replace("path.s6.", "").replace("path.", "").replace("embedding", name)
            official["backbone." + key] = weight
        if tied:
            official["lm_head.weight"] = model.embedding.weight
        loaded = load_official(official).double()
        # load_official makes a float32 model, which rounds the float64 weights of this test
        allow(f"backbone.{name}.weight, …", error(loaded(tokens), model(tokens)), 1e-5)
    official["lm_head.weight"] = 1 + model.embedding.weight
    raises(["lm_head.weight", "tied"], lambda: load_official(official))
    raises(["embedding.weight"], lambda: load_official({"fc.weight": torch.ones(2, 2)}))
    mamba2 = {**official, "backbone.layers.0.mixer.A_log": torch.ones(8)}
    raises(["Mamba-1", "(d, n)"], lambda: load_official(mamba2))
    del official["lm_head.weight"], official["backbone.norm_f.weight"]
    raises(["norm_f.weight"], lambda: load_official(official))


def test_the_step_that_generates_is_the_model():
    """Catches: a term lost in the second writing of the equations, weights laid out wrongly."""
    model, tokens = language_model()
    with torch.no_grad():
        whole = model(tokens[:1])[0]
        for prompt, table in itertools.product(range(1, 10), (True, False)):
            _, states = model(tokens[:1, :prompt], return_state=True)
            embedding, first, *laid_out = block._lay_out(model, states)
            assert len(first) == len(embedding)
            logits = torch.cat([
                block._step(t, place, embedding, first if table else first[:0], *laid_out)
                for place, t in enumerate(tokens[0, prompt:].tolist())])
            name = f"four layers, prompt of {prompt}, {'with' if table else 'without'} a table"
            allow(name, error(logits, whole[prompt:]), 1e-13)


def test_generation_with_one_seed_repeats_and_draws_from_the_softmax():
    """Catches: a draw that nobody seeded, a temperature that is not one, a k off by one."""
    model, tokens = language_model()
    texts = [sum(generate(model, tokens[0], 40, seed=seed), []) for seed in (0, 0, 1)]
    print(f"    seeds 0, 0, 1: {' | '.join(str(text[:8])[1:-1] for text in texts)}")
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 40
    greedy = sum(generate(model, tokens[0], 20, temperature=0), [])
    with torch.no_grad():
        read = torch.cat([tokens[:1], torch.tensor([greedy])], 1)
        assert model(read)[0, 11:-1].argmax(-1).tolist() == greedy
    assert sum(generate(model, tokens[0], 20, top_k=1, seed=3), []) == greedy
    # Without layers the logits depend on the last token alone: a Markov chain, to be counted.
    chain = MambaLM(4, 8, layers=0)
    with torch.no_grad():
        chain.embedding.weight.normal_(std=1.0)
        logits = chain(torch.arange(4).unsqueeze(0))[0] / 2
    for k in (4, 2):
        kept = logits.masked_fill(logits < logits.topk(k)[0][:, -1:], -math.inf).softmax(-1)
        text = sum(generate(chain, torch.tensor([0]), 20000, temperature=2.0, top_k=k), [0])
        pairs = torch.tensor(text[:-1]) * 4 + torch.tensor(text[1:])
        counts = torch.bincount(pairs, minlength=16).view(4, 4)
        worst = (counts - counts.sum(1, keepdim=True) * kept).abs().max().item() / len(text)
        allow(f"temperature 2, top {k}: frequencies of the 16 pairs", worst, 0.01)
    raises(["prompt", "(0,)"], lambda: list(generate(model, tokens[0, :0], 1)))
    raises(["top_k"], lambda: list(generate(model, tokens[0], 1, top_k=0)))


def test_any_image_that_the_patch_divides():
    """Catches: 28×28 or one channel written into the model."""
    for channels, size, fuse, pool, stem in ((1, (28, 28), "average", "mean", "conv"),
                                             (3, (32, 32), "concat", "max", "patch"),
                                             (3, (16, 24), "average", "last", "conv"),
                                             (3, (16, 24), "average", "mean", "deep")):
        model = VisionMamba(16, layers=1, fuse=fuse, image_size=size, channels=channels, pool=pool,
                            stem=stem, classes=7)
        assert model(torch.randn(2, channels, *size)).shape == (2, 7)
        print(f"    {channels} channels, {size} pixels, stem {stem}, fuse {fuse}, pool {pool}")


def test_the_first_loss_is_that_of_a_blind_guess():
    """Catches: an initialisation that is sure of itself before it has seen anything."""
    data, blind = digits(), math.log(10)
    for model in train_mnist.MODELS:
        trainer = ImageTrainer(settings(model=model), data, CPU)
        logits = trainer.model(train_mnist.normalize(data.test_images))
        loss = F.cross_entropy(logits, data.test_labels).item()
        allow(f"{model}: first loss {loss:.3f}, ln 10 = {blind:.3f}", abs(loss - blind), 0.3)


# --------------------------------------------------------------------------------------------------
# The training script, on good days.

def settings(*flags, **changes):
    """The defaults of train_mnist.py."""
    args = train_mnist.parse(flags)
    return dict({name: getattr(args, name) for name in train_mnist.SETTINGS}, **changes)


def small(**changes):
    """Settings that train in seconds."""
    tiny = {"d_model": 16, "layers": 1, "batch": 32, "epochs": 2, "hidden": 24}
    return settings(**{**tiny, **changes})


_made = {}


def digits(train=256, test=200):
    """Synthetic digits, made once."""
    if (train, test) not in _made:
        _made[train, test] = train_mnist.synthetic_digits(train, test)
    return _made[train, test]


def weights(trainer):
    """All weights and their averages in one vector."""
    parameters = (*trainer.model.parameters(), *trainer.average.parameters())
    return torch.cat([p.detach().flatten() for p in parameters])


@contextlib.contextmanager
def replaced(module, name, value):
    """In here, module.name is value."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def inside_temporary_folder():
    """In here, the working folder is a new one: -> its path."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(here)


def quietly(function, *args):
    """Call without its printing: -> result, what it said on stderr."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        return function(*args), err.getvalue()


def text_trainer(string=None, **changes):
    """A language model that trains in seconds, by default on 1,000 characters of help texts."""
    args = train_shakespeare.parse([])
    defaults = {name: getattr(args, name) for name in train_shakespeare.SETTINGS}
    tiny = {"d_model": 16, "layers": 2, "batch": 4, "block": 16, "epochs": 2, "forget": 0.2}
    topics = train_shakespeare.synthetic_text()
    string = string or "".join(topics.vocabulary[t] for t in topics.train[:1000])
    text = train_shakespeare.split("tiny", string)
    return TextTrainer({**defaults, **tiny, **changes}, text, CPU)


def test_two_runs_with_one_seed_are_bitwise_equal_and_with_two_are_not():
    """Catches: a draw that nobody seeded, a seed that nobody reads."""
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("images", lambda seed: ImageTrainer(small(seed=seed), digits(), CPU)),
                           ("text", lambda seed: text_trainer(seed=seed))):
            runs = []
            for seed in (0, 0, 1):
                trainer = make(seed)
                quietly(train_mnist.fit, trainer, os.path.join(folder, "a.pt"))
                runs.append(weights(trainer))
            equal(f"{name}, seed 0 and seed 0", runs[0], runs[1])
            assert not torch.equal(runs[0], runs[2])


def test_a_run_stopped_anywhere_and_resumed_ends_in_the_same_weights():
    """Catches: a checkpoint without the optimizer, the average, the order of the images, or the
    states that a language model carries from batch to batch."""
    def image_model(name):
        return lambda: ImageTrainer(small(model=name), digits(), CPU)

    makers = {**{name: image_model(name) for name in train_mnist.MODELS}, "text": text_trainer}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.pt")
        for name, make in makers.items():
            whole = make()
            quietly(train_mnist.fit, whole, path)
            # fit asks before each step and each batch of the test: text has 14 steps, 3 batches
            for patience in (1, 5, 8, 11) + (14, 15, 16, 17, 20, 33) * (name == "text"):
                looks = iter(range(patience))
                part = make()
                finished, _ = quietly(train_mnist.fit, part, path,
                                      lambda: next(looks, None) is None)
                assert not finished and len(part.scores) < len(whole.scores)
                part = make()
                part.load(path)
                quietly(train_mnist.fit, part, path)
                assert part.scores == whole.scores
                equal(f"{name}: stopped after {patience} looks", weights(part), weights(whole))


def test_the_synthetic_digits_are_learnable():
    """Catches: labels that are not the images', warps that destroy them, a recipe that fails."""
    trainer = ImageTrainer(small(d_model=32, epochs=4), digits(3200, 400), CPU)
    with tempfile.TemporaryDirectory() as folder:
        quietly(train_mnist.fit, trainer, os.path.join(folder, "a.pt"))
    print(f"    test accuracy after each epoch: {trainer.scores}; a blind guess: 10")
    assert trainer.scores[-1] > 70


def test_an_epoch_reads_every_character_once_and_each_batch_goes_on_where_the_last_one_stopped():
    """Catches: a state carried on to another place in the text, characters that nobody reads."""
    trainer = text_trainer("".join(chr(65 + i) for i in range(1000)), forget=0.0)
    last, seen = None, []
    for step in range(trainer.per_epoch):
        trainer.step = step
        inputs, targets, forget = trainer.batch()
        equal(f"step {step}: the next characters", inputs[:, 1:], targets[:, :-1])
        assert forget.all() if step == 0 else not forget.any()
        assert last is None or torch.equal(inputs[:, 0], last)
        last, seen = targets[:, -1], seen + inputs.flatten().tolist()
    print(f"    {len(set(seen))} of {len(trainer.data.train)} characters, {len(seen)} read")
    assert len(set(seen)) == len(seen) > 900 - 4 * 16 - 1


def test_the_validation_losses_are_those_of_the_whole_text():
    """Catches: a state lost between two pieces, a remainder that is left out."""
    trainer = text_trainer()
    trainer.piece = 32                   # characters: 4 pieces of the 100
    text, model = trainer.data.valid, trainer.average.double()
    stream, blocks = trainer.evaluate()
    with torch.no_grad():
        whole = F.cross_entropy(model(text[None, :-1])[0], text[1:]).item()
        parts = sum(F.cross_entropy(model(x[None])[0], y, reduction="sum").item()
                    for x, y in zip(text[:-1].split(16), text[1:].split(16)))
    allow(f"streaming {stream:.4f}", abs(stream / whole - 1), 1e-12)
    allow(f"in blocks {blocks:.4f}", abs(blocks / (parts / (len(text) - 1)) - 1), 1e-12)


def test_a_tiny_text_is_memorised():
    """Catches: targets that are off by one, a gradient that misses a layer, a recipe that fails."""
    poem = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. "
    trainer = text_trainer(12 * poem, d_model=32, epochs=40, forget=0.0)
    with tempfile.TemporaryDirectory() as folder:
        quietly(train_mnist.fit, trainer, os.path.join(folder, "a.pt"))
    print(f"    streaming {trainer.scores[-1][0]:.4f} nats per character, ln {trainer.classes} = "
          f"{math.log(trainer.classes):.4f}")
    prompt = train_shakespeare.encode("Shall I", trainer.vocabulary)
    text = "".join(trainer.vocabulary[t] for t in
                   sum(generate(trainer.average, prompt, len(poem) - 8, temperature=0), []))
    print(f"    Shall I|{text}")
    assert trainer.scores[-1][0] < 0.1 and "Shall I" + text == poem[:-1]


def test_the_commands_of_the_language_model_run_from_end_to_end():
    """Catches: a checkpoint that is written under one name and looked for under another."""
    threads = torch.get_num_threads()
    name = "text-poem-epochs-2-batch-4-block-16-d-model-16-layers-1-seeds-0-1"
    tiny = ["--text", "poem.txt", "--d-model", "16", "--layers", "1", "--batch", "4", "--block",
            "16", "--epochs", "2"]
    with inside_temporary_folder():
        try:
            with open("poem.txt", "w", encoding="utf-8") as file:
                file.write("Rough winds do shake the darling buds of May,\n" * 20)
            for flags in (tiny + ["--seeds", "0", "1"], tiny + ["--seeds", "0", "1", "--resume"],
                          ["--text", "poem.txt", "--generate", "Rough", "--tokens", "20"],
                          ["--text", "poem.txt", "--benchmark", "--tokens", "40"]):
                code, message = quietly(train_shakespeare.main, flags)
                assert code == 0, message
            found = sorted(name for _, _, files in os.walk(".") for name in files)
            print(f"    {found}")
            with open(f"results/{name}.csv", encoding="utf-8") as file:
                command = file.read().splitlines()[1].split(",")[-1]
        finally:
            torch.set_num_threads(threads)
    print(f"    {command}")
    assert command == ("python train_shakespeare.py --seed 0 --epochs 2 --batch 4 --block 16 "
                       "--d-model 16 --layers 1 --text poem.txt")
    assert found == ["generation.csv", "poem.txt", f"{name}.csv", f"{name}_loss.png",
                     "text-poem-seed0.pt", "text-poem-seed1.pt"]


def test_two_processes_equal_one():
    """Catches: a batch that is not shared out, gradients that are summed and not averaged."""
    folder = os.path.dirname(os.path.abspath(__file__))
    small_text = ["train_shakespeare.py", "--data", "synthetic", "--quick", "--block", "256",
                  "--batch", "64", "--d-model", "16", "--layers", "2"]
    small_mnist = ["train_mnist.py", "--data", "synthetic", "--quick", "--epochs", "1",
                   "--batch", "256", "--d-model", "16", "--layers", "1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as out:
        for flags in (small_text, small_mnist):
            results = []
            for start in ([], torchrun):
                run = subprocess.run([sys.executable, *start, os.path.join(folder, flags[0]),
                                      *flags[1:], "--out", out], env=environment, cwd=out,
                                     capture_output=True, text=True, timeout=300)
                lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
                assert len(lines) == 1, run.stdout + run.stderr
                fields = dict(field.split("=") for field in lines[0].split()[1:])
                results.append({name: float(fields[name]) for name in fields if name in
                                ("val_loss_stream", "val_loss_block", "test_accuracy")})
            print(f"    {flags[0]}: {results}")
            for name, value in results[0].items():
                allow(name, abs(results[1][name] - value), 3e-4)


def test_a_pixel_is_guessed_from_those_before_it_and_drawn_one_by_one():
    """Catches: a model that sees the pixel it guesses, a state that is not carried on, a pixel or
    a place that is taken for another."""
    table = torch.arange(9.0).unsqueeze(1) ** 2
    places = vision.along_axes(table, 4, 5).view(4, 5)
    for i, j in itertools.product(range(4), range(5)):
        assert places[i, j] == table[i, 0] + table[4 + j, 0]
    torch.manual_seed(0)
    model = PixelLM([], 8, (4, 5), wide=6).double()
    logits = model(F.pad(torch.arange(19), (1, 0), value=vision.BEGIN).unsqueeze(0))[0]
    for i in range(20):                            # pixel i of the image is i
        seen = [i - 5 * up + right for up, right in vision.NEIGHBOURS]
        seen = [pixel if pixel >= 0 else vision.BEGIN for pixel in seen]
        x = model.position[i // 5] + model.position[4 + i % 5] + sum(
            model.tables.weight[257 * kind + pixel] for kind, pixel in enumerate(seen))
        x = x + model.widen(model.narrow(x))
        for norm, _, linear in model.mlp:
            x = x + linear(F.silu(norm(x)))
        assert error(logits[i], model.head(model.norm(x))) < 1e-12, i
        if i == 12:
            print(f"    pixel 12 of 4×5 is guessed from {seen}")
    inputs, pixels = train_mnist.as_tokens(torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4))
    assert inputs.tolist() == [[256, *range(11)]] and pixels.tolist() == [list(range(12))]
    for layer in (MambaBlock(8), S4Block(8, n=4)):
        model = PixelLM([layer, copy.deepcopy(layer)], 8, (3, 4))
        with torch.no_grad():
            model.head.weight.mul_(20)             # far from even chances
            model.widen.weight.mul_(20)            # what the blocks remember weighs as much
        logits, states, steps = model(inputs), None, []
        for token in inputs.split(1, 1):
            step, states = model(token, states, return_state=True)
            steps.append(step)
        allow(f"{type(layer).__name__}: logits pixel by pixel", error(torch.cat(steps, 1), logits),
              1e-5)
        ours = train_mnist.complete(model.eval(), pixels[:, :5], 12, seed=3)
        generator, tokens = torch.Generator().manual_seed(3), inputs[:, :6]
        for _ in range(7):                         # without a state: from the beginning every time
            chances = model(tokens)[:, -1, :256].softmax(-1).detach()
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
        print(f"    {type(layer).__name__}: {ours[0].tolist()}")
        assert ours.tolist() == tokens[:, 1:].tolist() and ours[0, :5].tolist() == [0, 1, 2, 3, 4]


def test_the_tables_of_pixels_are_written_from_end_to_end():
    """Catches: a comparison that fails at its last line, after hours; bits that are nats."""
    name = "synthetic-digits-next-pixel"
    tiny = {"d_model": 8, "layers": 1, "batch": 16}
    jobs = {PixelTrainer: ("--task", "next-pixel"), ImageTrainer: ("--tokens", "pixels")}
    with inside_temporary_folder():
        for kind, flags in jobs.items():
            models = kind.models if kind is PixelTrainer else ("s4", "rnn")
            assert quietly(train_mnist.compare, kind, settings(*flags, **tiny), models, [0],
                           digits(32, 10), CPU, "out", False)[0]
        found = sorted(name for _, _, files in os.walk(".") for name in files)
        table = [path for path in found if path.startswith(name) and path.endswith("csv")][0]
        with open(os.path.join("results", table), encoding="utf-8") as file:
            keys, values = (line.strip().split(",") for line in list(file)[:2])
        trainer = PixelTrainer(settings(*jobs[PixelTrainer], **tiny), digits(32, 10), CPU)
        trainer.load(trainer.path("out"))
    row = dict(zip(keys, values))
    with torch.no_grad():
        inputs, pixels = train_mnist.as_tokens(digits(32, 10).test_images)
        chances = trainer.average(inputs).softmax(-1).gather(-1, pixels.unsqueeze(-1))
    bits = -chances.double().log2().mean().item()
    print(f"    {found}")
    allow("bits per pixel, from the chances", abs(float(row["test_bits_per_pixel"]) - bits), 1e-3)
    assert len(found) == 2 + 2 + 3 + 3
    assert sum("-models-s4-rnn" in path for path in found) == 3


def test_coloured_images_are_shifted_and_mirrored_and_nothing_else():
    """Catches: channels that move apart, a crop from the wrong image."""
    images = torch.arange(1, 1 + 6 * 3 * 32 * 32).float().view(6, 3, 32, 32)
    torch.manual_seed(0)
    for image, out in zip(images, train_mnist.crop_and_flip(images)):
        def shifts(padded):
            return {(i, j): padded[:, i:i + 32, j:j + 32] for i in range(5) for j in range(5)}
        padded = F.pad(image, (2,) * 4, mode="reflect")
        plain = [at for at, crop in shifts(padded).items() if torch.equal(crop, out)]
        mirrored = [at for at, crop in shifts(padded).items() if torch.equal(crop.flip(2), out)]
        print(f"    shifted to {plain}, or shifted to {mirrored} and mirrored")
        assert len(plain) + len(mirrored) == 1
    for shape in ((64, 3, 32, 32), (64, 1, 28, 28)):
        data = train_mnist.Data("any", torch.randint(256, shape, dtype=torch.uint8),
                                torch.arange(64) % 10, *digits()[3:])
        for augment in (True, False):
            trainer = ImageTrainer(small(augment=augment, batch=64), digits(), CPU)
            trainer.data = data
            images, labels = trainer.batch()
            plain = train_mnist.normalize(data.train_images[trainer.index()])
            assert torch.equal(labels, data.train_labels[trainer.index()])
            assert torch.equal(images, plain) != augment
        print(f"    {shape[1]} channels: normalized to {plain.mean():.2f} ± {plain.std():.2f}")
        exact = data.train_images[trainer.index()].float() / 255
        mean, spread = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)) if shape[1] == 3 else (
            (0.1307,), (0.3081,))
        for channel, (m, s) in enumerate(zip(mean, spread)):
            allow(f"channel {channel}", error(plain[:, channel], (exact[:, channel] - m) / s), 1e-6)


def test_the_command_in_a_row_repeats_its_run():
    """Catches: a flag that is missing in the row that a README's number comes from."""
    for flags in (["--model", "s4"], ["--tokens", "pixels", "--model", "causal", "--epochs", "1"],
                  ["--task", "next-pixel"], ["--task", "next-pixel", "--model", "s4", "--lr", "1"],
                  ["--dataset", "cifar10", "--lr", "2e-3", "--no-augment"], ["--bf16"],
                  ["--limit", "64", "--holdout", "100"], ["--layers", "0"]):
        args = train_mnist.parse(flags + ["--seed", "5"])
        data = digits()._replace(name="cifar10" if "cifar10" in flags else "mnist")
        data = train_mnist.shrink(data, args)
        chosen = {name: getattr(args, name) for name in train_mnist.SETTINGS}
        trainer = object.__new__(ImageTrainer)
        trainer.data, trainer.settings = data, dict(chosen, train_images=len(data.train_images),
                                                    test_images=len(data.test_images))
        command = train_mnist.command(trainer)
        print(f"    {command}")
        again = train_mnist.parse(command.split()[2:])
        assert {name: getattr(again, name) for name in train_mnist.SETTINGS} == chosen
        for name in ("limit", "holdout", "dataset"):
            assert getattr(again, name) == getattr(args, name)


def test_the_recipe_is_what_it_says():
    """Catches: a schedule that never peaks or never ends, a warp that moves what it should not."""
    rates = [train_mnist.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert max(rates) == rates[99] == 1 and rates[49] == 0.5 and rates[-1] == 0
    images = torch.rand(4, 1, 28, 28)
    allow("no warp", error(train_mnist.warp(images, 0, 0, 0, 0), images), 1e-4)
    assert error(train_mnist.warp(images, 0, 0, 0, 2), images) > 0.1


# --------------------------------------------------------------------------------------------------
# Looking at Δ.

def test_looking_at_delta_changes_no_output_and_leaves_no_trace():
    """Catches: a hook that replaces what it reads or stays, a Δ that is not the one that scans."""
    torch.manual_seed(0)
    tokens, images = torch.randint(11, (2, 30)), torch.randint(256, (2, 1, 28, 28)).float()
    for model, data in ((MambaLM(11, 16, 2), tokens), (VisionMamba(16, 2), images)):
        before = model(data)
        with watch(model) as scans:
            equal(f"{type(model).__name__} while one looks", model(data), before)
        equal(f"{type(model).__name__} afterwards", model(data), before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for scan in scans.values():
            layer, x = scan.s6, scan.x
            _, B, C = layer.x_proj(x).split([layer.dt_rank, layer.n, layer.n], -1)
            y = selective_scan(x, scan.delta, -layer.A_log.exp(), B, C, layer.D)
            equal("the Δ that was read makes the output", layer(x), y)


def test_the_change_of_h_is_the_difference_of_two_states():
    """Catches: a state that is read before its token, or not carried on."""
    torch.manual_seed(0)
    layer = S6(8, 4)
    x = torch.randn(2, 9, 8)
    with watch(layer) as scans:
        layer(x)
    with contextlib.suppress(ZeroDivisionError), watch(layer):
        1 / 0
    assert not layer._forward_pre_hooks and not layer.dt_proj._forward_hooks
    states = [layer(x[:, :t], return_state=True)[1] for t in range(1, 10)]
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
            y = layer(x)
        spread, twice = scans[""].delta.std(1).max(), error(layer(2 * x), 2 * y)
        print(f"    {what} off: Δ varies by {spread:.1e}; S6(2x) is 2 S6(x) but for {twice:.1e}")
        assert (spread < 1e-6) == constant and (twice < 1e-5) == convolution


def test_the_answer_to_a_haystack_is_right_by_construction():
    """Catches: an answer that is overwritten, a marker too many, a needle lost between pieces."""
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
    answers = torch.arange(4)
    for name in ("priced", "rnn"):
        model = visualize_delta.build(name, 0)
        whole, pieces = (haystacks(300, 60 * answers, answers, torch.Generator(), piece)
                         for piece in (None, 64))
        whole = torch.cat(list(pieces), 1), *whole
        logits = visualize_delta.read(model, whole[0].split(64, 1), CPU)
        allow(f"{name}: logits after 300 tokens, in pieces of 64",
              error(logits, model(whole[0])[:, -1, :16]), 1e-5)


def test_a_classifier_is_read_with_its_averaged_weights_and_its_own_control():
    """Catches: the weights before averaging, a control from another seed."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.pt")
        trainer, fresh = (ImageTrainer(small(epochs=1), digits(), CPU) for _ in range(2))
        quietly(train_mnist.fit, trainer, path)
        trained, untrained, _ = visualize_delta.load_classifier(path, CPU)
        for what, ours, exact in (("trained", trained, trainer.average),
                                  ("untrained", untrained, fresh.model)):
            equal(what, *(torch.cat([p.detach().flatten() for p in model.parameters()])
                          for model in (ours, exact)))


def test_delta_lies_on_the_image_where_its_token_was_read():
    """Catches: a scan drawn upside down, ink compared with the token after instead of before."""
    torch.manual_seed(0)
    model = VisionMamba(16, 2, stem="patch").eval()
    black, spot = torch.zeros(2, 1, 1, 28, 28, dtype=torch.uint8).unbind(0)
    spot[..., 8:12, 12:16] = 255                   # the patch in row 2, column 3
    before, after = (visualize_delta.read_images(model, image) for image in (black, spot))
    for scan, backward in list(before)[:2]:
        grids = [visualize_delta.on_grid(r[scan, backward][0], backward) for r in (before, after)]
        changed = (grids[0] != grids[1]).nonzero().tolist()
        print(f"    {scan}: one patch of ink changes Δ at {changed}")
        assert changed == [[2, column] for column in (range(4) if backward else range(3, 7))]
    ink = torch.rand(3, 49)
    late = visualize_delta.Reading("trained", "", 0, "", F.pad(ink, (2, 0))[:, :49], {"ink": ink})
    rows = [row for row in visualize_delta.correlate([late]) if not row["place_removed"]]
    print(f"    Δ that is the ink two tokens back: {[row['rank_correlation'] for row in rows]}")
    assert rows[2]["rank_correlation"] == "1.000" and float(rows[0]["rank_correlation"]) < 0.5


def test_the_needle_is_taught_at_growing_lengths_and_the_price_comes_last():
    """Catches: a curriculum that stays at 8, a price from the first step, or on every model."""
    for name in ("priced", "unpriced"):
        calls = []

        def learn(model, optimizer, tokens, answers, price):
            calls.append((tokens.shape[1], price))
            return 0.04

        with replaced(visualize_delta, "learn", learn):
            model = visualize_delta.build(name, 0)
            (longest, _) = quietly(visualize_delta.teach_needle, model, name, 0, CPU, 60, 512)
        lengths, prices = zip(*calls)
        assert lengths[:6] == (8, 16, 32, 64, 128, 256) and longest == 256
        assert set(lengths[6:]) == {8, 16, 32, 64, 128, 256} and not any(prices[:6])
        assert set(prices[6:]) == {0.01 if name == "priced" else 0.0}
    model = visualize_delta.build("priced", 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens, _, answers = visualize_delta.random_needles(8, 16, torch.Generator())
    means = []
    for _ in range(3):
        with watch(model) as scans:
            visualize_delta.learn(model, optimizer, tokens, answers[:, None], price=10.0)
        means.append(sum(scan.delta.log().mean().item() for scan in scans.values()))
    print(f"    mean log Δ under a price: {means}")
    assert means[0] > means[1] > means[2]


def test_the_numbers_at_the_needle_are_those_worked_out_by_hand():
    """Catches: a window that is off, the question counted in, depths upside down."""
    tokens = torch.tensor([[1, 2, 16, 5, 3, 3, 3, 4, 4, 4, 16]])
    delta = torch.tensor([[2., 2, 4, 6, 2, 2, 2, 2, 2, 2, 90]])
    moves = torch.tensor([[1., 1, 5, 5, 5, 5, 5, 1, 1, 1, 90]])
    module = visualize_delta
    with replaced(module, "random_needles", lambda *_: (tokens, torch.tensor([2]), None)), \
            replaced(module, "gate", lambda _: delta), replaced(module, "changes", lambda _: moves):
        rows = module.gates_at_needles(module.build("unpriced", 0), "unpriced", 0, CPU, 1, 11)
    row = rows[0]
    print(f"    {row}")
    assert row["delta_at_needle"] == "6" and row["needle_over_median"] == "3"
    assert row["share_of_change_percent"] == f"{100 * 25 / 30:.1f}"
    grid = module.depth_grid([torch.arange(64) < 8, torch.arange(64) < 16])
    assert grid.tolist() == [100, 50, 0, 0, 0, 0, 0, 0]


def test_a_model_that_was_taught_is_taken_as_it_is():
    """Catches: --resume that trains again, or forgets the weights."""
    with tempfile.TemporaryDirectory() as folder:
        def nudge(model, *_, steps):
            with torch.no_grad():
                model.head.bias.add_(1.0)
            return 8

        def never(*_, steps):
            raise AssertionError("taught again")

        first, resume = (visualize_delta.parse(["--out", folder] + flags)
                         for flags in ([], ["--resume"]))
        taught, facts = visualize_delta.obtain(first, "needle", "rnn", 0, CPU, nudge, steps=1)
        model, again = visualize_delta.obtain(resume, "needle", "rnn", 0, CPU, never, steps=1)
        equal("the weights", model.head.bias, taught.head.bias)
        assert facts == again and facts["taught_up_to"] == 8


def test_a_rank_correlation_shares_ranks_and_a_scan_lies_on_the_image_as_it_reads():
    """Catches: ties that favour one side, a backward scan that is drawn upside down."""
    a, b = torch.tensor([[1., 2, 2, 4]]), torch.tensor([[10., 30, 20, 40]])
    # ranks 1, 2½, 2½, 4 and 1, 3, 2, 4: ρ = 4.5 / √(4.5 · 5)
    allow("ρ with a tie", abs(rank_correlation(a, b).item() - 0.9 ** 0.5), 1e-6)
    allow("ρ of a rising pair", abs(rank_correlation(b, b.exp2()).item() - 1), 1e-6)
    allow("ρ of a falling pair", abs(rank_correlation(b, -b).item() + 1), 1e-6)
    assert visualize_delta.on_grid(torch.arange(4), True).tolist() == [[3, 2], [1, 0]]
    assert visualize_delta.on_grid(torch.arange(4), False).tolist() == [[0, 1], [2, 3]]


def test_the_pictures_of_delta_are_drawn_from_end_to_end():
    """Catches: a figure that is promised and not written, a control that is missing."""
    here, tiny = os.getcwd(), ["--quick", "--checkpoint", "a.pt", "--task", "needle", "copying"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            quietly(train_mnist.fit, ImageTrainer(small(epochs=1), digits(), CPU), "a.pt")
            with replaced(visualize_delta, "load_data", lambda *_: digits()), \
                    replaced(visualize_delta, "QUICK", (4, 256, 7)):
                for flags in (tiny + ["digits"], tiny + ["--resume"]):
                    code, message = quietly(visualize_delta.main, flags)
                    assert code == 0, message
            found = sorted(name for _, _, files in os.walk(".") for name in files)
            with open("results/needle_delta-quick.csv", encoding="utf-8") as file:
                models = [line.split(",")[0] for line in file]
        finally:
            os.chdir(here)
            torch.set_flush_denormal(False)
    print(f"    {found}")
    assert models == ["model", "untrained", "untrained", "priced", "priced"]
    assert found == ["a.pt", "copying-32-quick-fixed-seed0.pt",
                     "copying-32-quick-unpriced-seed0.pt", "copying-length-32-quick.csv",
                     "copying-length-32-quick.png", "delta-synthetic-digits.csv",
                     "delta_digit-synthetic-digits.png", "delta_ink-synthetic-digits.png",
                     "needle-quick-priced-seed0.pt", "needle-quick.csv", "needle_delta-quick.csv",
                     "needle_delta-quick.png", "needle_grid-quick.png", "needle_lengths-quick.png",
                     "scan-synthetic-digits.gif"]


# --------------------------------------------------------------------------------------------------
# And on bad ones: every mistake gets one clear line.

def test_every_documented_error_of_the_scan_is_raised():
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


LAYERS = {          # layers that take (b, l, 6)
    "S6": lambda: S6(6, 4), "ConvS6": lambda: block.ConvS6(6, 4),
    "Mamba": lambda: block.Mamba(6, 4), "MambaBlock": lambda: MambaBlock(6, 4),
    "VisionBlock": lambda: VisionBlock(6, 4), "RNN": lambda: RNN(6, 5), "S4": lambda: S4(6, 4),
    "S4Block": lambda: S4Block(6, 4), "S4Stack": lambda: S4Stack(6, 2, 4),
}


def test_every_documented_error_of_the_models_is_raised():
    """Catches: an image cropped in silence, a misspelt option taken for the default."""
    raises(["patch", "30x28"], lambda: VisionMamba(16, image_size=(30, 28)))
    raises(["patch", "2 or 4", "7"], lambda: VisionMamba(16, patch=7))
    raises(["direction", "causal", "back"], lambda: VisionMamba(16, direction="back"))
    raises(["fuse", "concat", "sum"], lambda: VisionMamba(16, fuse="sum"))
    raises(["pool", "mean", "avg"], lambda: VisionMamba(16, pool="avg"))
    raises(["stem", "conv", "vit"], lambda: VisionMamba(16, stem="vit"))
    raises(["position", "axes", "row"], lambda: VisionMamba(16, position="row"))
    for name, layer in LAYERS.items():
        raises([name.replace("Stack", "Block"), "(b, l, 6)", "(2, 9, 5)"],
               lambda: layer()(torch.randn(2, 9, 5)))
    raises(["d_model", "3"], lambda: VisionMamba(3, stem="deep"))
    raises(["4 or more wide"], lambda: PixelLM([], 8, (3, 3)))
    writer, tokens = PixelLM([MambaBlock(8)], 8, (3, 4)), torch.zeros(1, 13, dtype=torch.int64)
    raises(["13 tokens", "3x4"], lambda: writer(tokens))
    raises(["0 to 256"], lambda: writer(tokens[:, :5] + 257))
    raises(["(b, l)", "(13,)"], lambda: writer(tokens[0]))
    model = VisionMamba(16)
    raises(["28x28", "(1, 1, 32, 32)"], lambda: model(torch.randn(1, 1, 32, 32)))
    raises(["(b, 1, height, width)", "(1, 3, 28, 28)"], lambda: model(torch.randn(1, 3, 28, 28)))


def test_a_bad_checkpoint_is_named_and_left_alone():
    """Catches: a traceback, a pickle that runs code, one flipped bit, another model's weights."""
    trainer = ImageTrainer(small(), digits(), CPU)
    with tempfile.TemporaryDirectory() as folder:
        path, mark = os.path.join(folder, "a.pt"), os.path.join(folder, "ran")
        raises(["no checkpoint", path], lambda: trainer.load(path), UserError)
        trainer.save(path)
        assert os.listdir(folder) == ["a.pt"]
        for change in ({"model": "rnn"}, {"lr": 0.1}):
            other = ImageTrainer(small(**change), digits(), CPU)
            raises([path, *change], lambda: other.load(path), UserError)
        other = ImageTrainer(small(), digits(320), CPU)
        raises([path, "train_images=256"], lambda: other.load(path), UserError)
        with open(path, "rb") as file:
            whole = file.read()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
        pickle = b"cposix\nsystem\n(S'touch " + mark.encode() + b"'\ntR."
        for damage in (flipped, whole[:1000], whole[:-7], b"", pickle):
            with open(path, "wb") as file:
                file.write(damage)
            raises([path, "damaged"], lambda: trainer.load(path), UserError)
            with open(path, "rb") as file:
                assert file.read() == damage and not os.path.exists(mark)
        torch.save({"weights": torch.ones(3)}, path)
        raises([path, "not a checkpoint"], lambda: trainer.load(path), UserError)


def test_damaged_images_and_folders_that_cannot_be_written_are_named():
    """Catches: training on half a data set, an hour of training that cannot be saved."""
    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "MNIST", "raw")
        os.makedirs(raw)
        for name in train_mnist.MNIST_MD5:
            with open(os.path.join(raw, name), "wb") as file:
                file.write(b"\0\0\10\3 cut off")
        raises(["train-images", "truncated"], lambda: train_mnist.load_data(folder), UserError)
        blocked = os.path.join(folder, "file")
        open(blocked, "w").close()
        flags = ["--data", "synthetic", "--out", os.path.join(blocked, "out")]
        code, message = quietly(train_mnist.main, flags)
        print(f"    exit code {code}: {message.strip()[:110]}")
        assert code == 2 and "cannot write" in message and "Traceback" not in message


def test_cifar_is_read_from_a_folder_of_images_or_its_absence_is_named():
    """Catches: colours and rows mixed up, JPEG images reported as the original ones."""
    from torchvision.transforms.functional import to_pil_image

    def no_network(*_):
        raise OSError("Temporary failure in name resolution")

    with tempfile.TemporaryDirectory() as folder:
        with replaced(train_mnist, "download_cifar", no_network):
            raises(["cannot be downloaded", "CIFAR-10-images"],
                   lambda: train_mnist.load_cifar(folder), UserError)
        torch.manual_seed(0)
        images = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8)
        for i, image in enumerate(images):         # eight to train with, one of a class each
            part, name = ("train", "abcdefgh"[i]) if i < 8 else ("test", "ab"[i - 8])
            place = os.path.join(folder, "CIFAR-10-images", part, name)
            os.makedirs(place)
            to_pil_image(image).save(os.path.join(place, "a.png"))
        data = train_mnist.load_cifar(folder)
        assert data.name == "cifar10-jpeg" and data.test_labels.tolist() == [0, 1]
        equal("the images, in their places", data.test_images, images[8:])
        equal("and their labels", data.train_images, images[data.train_labels])
        print(f"    labels in training: {data.train_labels.tolist()}")
        assert data.train_labels.tolist() != sorted(data.train_labels.tolist())
        os.makedirs(os.path.join(folder, "cifar-10-batches-py"))
        raises(["damaged"], lambda: train_mnist.load_cifar(folder), UserError)


def test_what_is_no_text_and_no_language_model_is_named():
    """Catches: a traceback for a file, a prompt or a checkpoint that does not fit."""
    script = train_shakespeare
    with tempfile.TemporaryDirectory() as folder:
        def file(name, content):
            path = os.path.join(folder, name)
            with open(path, "wb") as f:
                f.write(content)
            return path

        missing, latin = os.path.join(folder, "none.txt"), file("latin.txt", b"caf\xe9 " * 9)
        raises([missing], lambda: script.load_text(folder, path=missing), UserError)
        raises([latin, "UTF-8"], lambda: script.load_text(folder, path=latin), UserError)
        short = file("short.txt", b"To be")
        raises([short, "5"], lambda: script.load_text(folder, path=short), UserError)
        half = file("tinyshakespeare.txt", b"First Citizen:\nBefore we proceed any further")
        raises([half, "damaged"], lambda: script.load_text(folder), UserError)
        raises(["'\u00e9'", "abc"], lambda: script.encode("caf\u00e9", "abcf"), UserError)
        path = os.path.join(folder, "a.pt")
        raises(["no checkpoint", path, "train first"], lambda: script.load_model(path, CPU),
               UserError)
        ImageTrainer(small(), digits(), CPU).save(path)
        raises([path, "no model of"], lambda: script.load_model(path, CPU), UserError)
        raises([short, "no checkpoint"], lambda: script.load_model(short, CPU), UserError)
        trainer = text_trainer()
        trainer.save(path)
        model, vocabulary = script.load_model(path, CPU)
        assert vocabulary == trainer.vocabulary
        equal("a model read from its checkpoint", model.embedding.weight,
              trainer.average.embedding.weight)


def test_what_delta_cannot_be_read_from_is_named():
    """Catches: a traceback, or a picture of the wrong model, of other images, of another digit."""
    def look(*flags):
        with replaced(visualize_delta, "load_data", lambda *_: digits()):
            visualize_delta.look_at_digits(visualize_delta.parse(list(flags)), CPU)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.pt")
        raises(["no checkpoint", "--checkpoint"], lambda: look("--checkpoint", path), UserError)
        trainer = ImageTrainer(small(), digits(), CPU)
        trainer.save(path)
        raises([path, "not at its end"], lambda: look("--checkpoint", path), UserError)
        trainer.scores = [0.0, 0.0]
        trainer.save(path)
        raises([path, "synthetic-digits", "--data real"],
               lambda: look("--checkpoint", path, "--data", "real"), UserError)
        other = os.path.join(folder, "b.pt")
        trainer = ImageTrainer(small(model="causal"), digits(), CPU)
        trainer.scores = [0.0, 0.0]
        trainer.save(other)
        raises([path, other, "model", "seed alone"],
               lambda: look("--checkpoint", path, other), UserError)
        count = (digits().test_labels == 7).sum().item()
        raises(["--index", f"0 … {count - 1}"],
               lambda: look("--checkpoint", path, "--index", str(count)), UserError)
        for trainer in (ImageTrainer(small(model="rnn"), digits(), CPU), text_trainer()):
            trainer.save(path)
            raises([path, "no Vision Mamba"], lambda: look("--checkpoint", path), UserError)
        ImageTrainer(small(layers=0), digits(), CPU).save(path)
        raises([path, "0 layers"], lambda: look("--checkpoint", path), UserError)
        whole = train_mnist.read_checkpoint(other)
        for change in ({"average": []}, {"average": {}}, {"scores": None},
                       {"settings": {**whole["settings"], "d_model": "wide"}}):
            torch.save({**whole, **change}, path)
            raises([path, "another version"], lambda: look("--checkpoint", path), UserError)
        args = visualize_delta.parse(["--resume", "--out", folder])
        for steps, words in ((3, None), (4, ["another steps", "--resume"])):
            def obtain():
                return visualize_delta.obtain(args, "needle", "rnn", 0, CPU, lambda *_, steps: 8,
                                              steps=steps)
            raises(words, obtain, UserError) if words else obtain()


def test_an_earlier_checkpoint_is_kept_when_training_starts_anew():
    """Catches: a forgotten --resume that costs the run it was meant to continue."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            quietly(train_mnist.run, ImageTrainer(small(), digits(), CPU), folder, False)
        print(f"    {sorted(os.listdir(folder))}")
        assert len(os.listdir(folder)) == 2
        trainer = ImageTrainer(small(), digits(), CPU)
        part = trainer.path(folder) + ".1.part"
        open(part, "w", encoding="utf-8").close()
        os.mkdir(trainer.path(folder) + ".2.part")         # not ours: it stays
        quietly(train_mnist.run, trainer, folder, False)
        assert not os.path.exists(part) and len(os.listdir(folder)) == 4


def test_a_signal_asks_for_a_stop_and_long_epochs_are_saved_on_the_way():
    """Catches: a machine that shuts down and takes an hour of training with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        with train_mnist.Interrupt() as stop:
            assert not stop()
            signal.raise_signal(number)
            assert stop()
        assert signal.getsignal(number) is before
    trainer, steps = ImageTrainer(small(epochs=1), digits(), CPU), []
    trainer.save = lambda path: steps.append(trainer.step)
    with replaced(train_mnist, "SAVE_EVERY", 0.0):
        quietly(train_mnist.fit, trainer, "nowhere")
    print(f"    an epoch of {trainer.per_epoch} steps, saved at {steps}")
    assert set(steps) >= set(range(trainer.per_epoch + 1))


def test_the_flags_of_the_recipe_change_the_loss():
    """Catches: a flag that is read and recorded, and does nothing."""
    data, losses = digits(), {}
    for name in ({}, {"bf16": True}, {"smoothing": 0.1}, {"augment": False}):
        losses[str(name)] = ImageTrainer(small(**name), data, CPU).loss()[0].item()
    print(f"    {losses}")
    assert len(set(losses.values())) == 4 and max(losses.values()) < min(losses.values()) + 0.1
    for model in ("causal", "s4"):                 # the next pixel, at the residual stream's dtype
        chosen, pair = settings("--task", "next-pixel", model=model, batch=4, layers=1), []
        for bf16 in (False, True):
            trainer, dtypes = PixelTrainer(dict(chosen, bf16=bf16), data, CPU), set()
            for layer in trainer.model.blocks:
                layer.register_forward_pre_hook(lambda _, inputs: dtypes.add(inputs[0].dtype))
            pair.append(trainer.loss()[0].item())
            assert dtypes == {torch.float32}
        print(f"    next pixel, {model}, float32 and bfloat16: {pair}")
        assert pair[0] != pair[1] and abs(pair[0] - pair[1]) < 0.1


def test_a_download_goes_on_to_the_next_address():
    """Catches: a mirror that is down, and a second one that nobody asks."""
    asked = []

    def fetch(address):
        asked.append((address, socket.getdefaulttimeout()))
        if address != "good":
            raise OSError(f"{address} does not answer")

    train_mnist.try_each(["bad", "worse", "good", "unused"], fetch)
    raises(["worse"], lambda: train_mnist.try_each(["bad", "worse"], fetch), OSError)
    print(f"    asked, with a timeout of so many seconds: {asked}")
    assert [name for name, _ in asked] == ["bad", "worse", "good", "bad", "worse"]
    assert asked[0][1] == train_mnist.PATIENCE and socket.getdefaulttimeout() is None


def test_without_network_the_fallback_is_announced_and_labelled():
    """Catches: synthetic digits reported as MNIST, help texts as Shakespeare."""
    def no_network(*_):
        raise OSError("Temporary failure in name resolution")

    for module, download, load, name in (
            (train_mnist, "download_mnist", train_mnist.load_data, "synthetic-digits"),
            (train_shakespeare, "download", train_shakespeare.load_text, "synthetic-pydoc")):
        with tempfile.TemporaryDirectory() as folder, replaced(module, download, no_network):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                data = load(folder)
            assert data.name == name and "SYNTHETIC" in printed.getvalue()
            raises(["cannot be downloaded", "--data synthetic"], lambda: load(folder, "real"),
                   UserError)
            assert os.listdir(folder) == []


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_hurt():
    """Catches: epochs of training on NaN, and a good checkpoint overwritten by them."""
    trainer = ImageTrainer(small(lr=1e30), digits(), CPU)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.pt")
        raises(["loss", "step", "learning rate"],
               lambda: quietly(train_mnist.fit, trainer, path), UserError)
        assert os.listdir(folder) == [] and weights(trainer).isfinite().all()


def test_a_wrong_flag_is_answered_with_what_is_right():
    """Catches: a typing error found after an hour."""
    for flags, words in ((["--model", "lstm"], "bidirectional"), (["--epochs", "0"], "1 or more"),
                         (["--lr", "fast"], "--lr"), (["--nonsense"], "nonsense"),
                         (["--seed", "-1"], "between 0"), (["--device", "abacus"], "cuda"),
                         (["--task", "next-pixel", "--model", "rnn"], "causal"),
                         (["--task", "next-pixel", "--stem", "conv"], "--stem"),
                         (["--tokens", "pixels", "--stem", "conv"], "--stem"),
                         (["--models", "rnn"], "--compare"), (["--state", "3"], "even"),
                         (["--seeds", "1"], "--compare"), (["--compare", "--seed", "1"], "--seeds"),
                         (["--compare", "--model", "s4"], "--models"),
                         (["--layers", "0", "--compare"], "RNN"),
                         (["--digit", "10"], "between 0 and 9"), (["--task", "sums"], "needle")):
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                (visualize_delta if "sums" in flags or "10" in flags else train_mnist).parse(flags)
            raise AssertionError(f"{flags} was taken")
        except SystemExit as stop:
            last = err.getvalue().strip().splitlines()[-1]
            print(f"    exit code {stop.code}: {last[:110]}")
            assert stop.code == 2 and words in last


# --------------------------------------------------------------------------------------------------
# `python test_scan.py --torture`: what a machine, a disk and a network do to a training. Minutes.
#
# Each of these functions gets `held`, and calls held(what, truth, why) once per trial.

HERE = os.path.dirname(os.path.abspath(__file__))
SHORT = {          # trainings of seconds, with a checkpoint after each of many epochs
    "train_mnist.py": ["--data", "synthetic", "--limit", "1600", "--holdout", "100", "--epochs",
                       "8", "--batch", "32", "--d-model", "16", "--layers", "1"],
    "train_shakespeare.py": ["--data", "synthetic", "--quick", "--epochs", "8", "--batch", "64",
                             "--d-model", "16", "--layers", "1"],
}
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1"}


def start_script(script, folder, flags):
    """A script in a process of its own, working in folder: -> Popen."""
    return subprocess.Popen([sys.executable, os.path.join(HERE, script), *flags], cwd=folder,
                            env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            encoding="utf-8")


def only_checkpoint(folder):
    """The one .pt file in a folder, and None as long as there is none."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return next((os.path.join(folder, name) for name in names if name.endswith(".pt")), None)


def learned(path):
    """All tensors of a checkpoint that training has changed, in one vector."""
    state, found = train_mnist.read_checkpoint(path), []

    def collect(value):
        if torch.is_tensor(value):
            found.append(value.double().flatten())
        elif isinstance(value, (dict, list, tuple)):
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)

    collect([state[name] for name in ("model", "average", "optimizer", "losses", "scores")])
    return torch.cat(found)


def torture_killed_and_resumed(held, kills=20):
    """SIGKILL, half of the times while a checkpoint is being written: the same weights at the end.

    Each time within a quarter of the training. One that has come to its end is compared, and begun
    anew.
    """
    for script, flags in SHORT.items():
        draw, killed = random.Random(0), 0
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "out")
            _, err = start_script(script, folder, flags + ["--out", "whole"]).communicate()
            whole = only_checkpoint(os.path.join(folder, "whole"))
            assert whole, err
            clock = train_mnist.read_checkpoint(whole)["clock"].tolist()
            for trial in range(4 * kills):
                path = only_checkpoint(out)
                step = train_mnist.read_checkpoint(path)["step"] if path else 0
                process = start_script(script, folder,
                                       flags + ["--out", "out"] + ["--resume"] * bool(path))
                saving = False
                if killed < kills and step < len(clock):   # else it may go on to its end
                    seconds = draw.random() * clock[-1] / 4
                    saving = wait_and_kill(process, out, seconds, trial % 2 == 1)
                _, err = process.communicate()
                ended = process.returncode == 0
                killed += not ended
                print(f"    {script} from step {step} of {len(clock)}: " + (
                    "ended" if ended else f"kill {killed}{', while saving' * saving}"), flush=True)
                if not ended:
                    held(f"{script} killed{' while saving' * saving}, checkpoint readable",
                         process.returncode in KILLED and readable(only_checkpoint(out)), err)
                else:
                    held(f"{script} killed, resumed, ended: the same weights bit for bit",
                         torch.equal(learned(only_checkpoint(out)), learned(whole)), err)
                    os.remove(only_checkpoint(out))
                    if killed == kills:
                        break


KILLED = (-9,) if os.name == "posix" else (1,)       # the exit code of a process that was killed


def readable(path):
    """Whether the checkpoint is whole; none at all will do, too."""
    return path is None or bool(train_mnist.read_checkpoint(path))


def wait_and_kill(process, out, seconds, while_saving):
    """So many seconds into the training, or when it then writes a checkpoint: -> whether it did."""
    def parts():
        return os.path.isdir(out) and any(name.endswith(".part") for name in os.listdir(out))

    for line in process.stdout:
        if line.startswith("checkpoint"):          # the first step comes next
            break
    time.sleep(seconds)
    while while_saving and process.poll() is None and not parts():
        pass
    process.kill()
    return while_saving and parts()


def torture_interrupted(held, times=5):
    """Ctrl-C: it ends within a second, saves, and says how to go on."""
    if os.name == "nt":
        return print("    not tried: Windows sends no SIGINT to one process")
    for script, flags in SHORT.items():
        for i in range(times):
            with tempfile.TemporaryDirectory() as folder:
                process = start_script(script, folder, flags + ["--out", "out"])
                while process.poll() is None and not only_checkpoint(os.path.join(folder, "out")):
                    time.sleep(0.01)
                time.sleep(0.1 * i)
                start = time.perf_counter()
                process.send_signal(signal.SIGINT)
                out, err = process.communicate()
                seconds = time.perf_counter() - start
                said = "--resume goes on" in out and process.returncode == 130
                print(f"    {script}: {seconds:.2f} s, {out.strip().splitlines()[-1]}", flush=True)
                held(f"{script}, Ctrl-C: saved, and told how to go on", said, out + err)
                held(f"{script}, Ctrl-C: ended within a second", seconds < 1, f"{seconds:.2f} s")


# --- bad files

def truncated(data, random):
    return data[:random.randrange(len(data))]


def flipped(data, random):
    data = bytearray(data)
    for _ in range(random.randint(1, 8)):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def noise(data, random):
    return random.randbytes(len(data))


def empty(data, random):
    return b""


class Bomb:
    """A pickle that would run code: loading it makes a file."""

    def __reduce__(self):
        return open, ("exploded", "w")


@contextlib.contextmanager
def as_nobody():
    """Permissions mean nothing to root: in here it is another user."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def spoil(path, kind, random, other):
    """Damage the file in one way; other is the checkpoint of another model."""
    with open(path, "rb") as file:
        data = file.read()
    if callable(kind):
        with open(path, "wb") as file:
            file.write(kind(data, random))
    elif kind == "directory":
        os.remove(path)
        os.mkdir(path)
    elif kind == "forbidden":
        os.chmod(path, 0)
    elif kind == "another model's":
        shutil.copy(other, path)
    elif kind == "code, zipped":
        torch.save({"settings": {}, "model": Bomb()}, path)
    else:
        with open(path, "wb") as file:
            pickle.dump(Bomb(), file)


def snapshot(path):
    """What is at path, to compare with later."""
    if os.path.isdir(path):
        return "a directory"
    with open(path, "rb") as file:
        return file.read()


def small_mnist(folder):
    """Random images in MNIST's format: -> the checksums of the four files."""
    os.makedirs(folder)
    checksums = {}
    for name, count in zip(train_mnist.MNIST_MD5, (64, 64, 32, 32)):
        shape = (count, 28, 28) if "images" in name else (count,)
        data = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        data += random.Random(count).randbytes(math.prod(shape)) if "images" in name else bytes(
            i % 10 for i in range(count))
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
        checksums[name] = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return checksums


def torture_bad_files(held, trials=200):
    """Damage of every kind: one line that names the file, exit code 2, and the file is left alone.

    A flipped bit may hit what nobody reads. Then the checkpoint must be the same as before.
    """
    draw, bytewise = random.Random(0), [truncated, flipped, flipped, noise, empty]
    things = bytewise + ["directory", "forbidden"]
    if os.name == "nt":                  # where permissions are something else
        things.remove("forbidden")
    models = things + ["another model's", "code", "code, zipped"]
    tiny = ["--d-model", "16", "--layers", "1"]
    mnist, text = ["--batch", "32", "--epochs", "1", *tiny], ["--text", "poem.txt", "--batch", "4",
                                                              "--block", "16", "--epochs", "1"]
    with inside_temporary_folder() as folder:
        checksums = small_mnist("data/MNIST/raw")
        with open("poem.txt", "w", encoding="utf-8") as file:
            file.write("Rough winds do shake the darling buds of May, é\n" * 20)
        shutil.copy("poem.txt", "data/tinyshakespeare.txt")
        poem = hashlib.sha256(snapshot("poem.txt")).hexdigest()
        with replaced(train_mnist, "MNIST_MD5", checksums), \
                replaced(train_shakespeare, "SHA256", poem):
            for script, flags in ((train_mnist, mnist), (train_shakespeare, text + tiny)):
                code, err = quietly(script.main, flags)
                assert code == 0, err
            for where, _, names in os.walk(folder):        # a nobody will work here
                for path in [where] + [os.path.join(where, name) for name in names]:
                    os.chmod(path, 0o777)
            images = "checkpoints/mnist-bidirectional-seed0.pt"
            words = "checkpoints/text-poem-seed0.pt"
            targets = [(images, train_mnist, mnist + ["--resume"], models, words),
                       (words, train_shakespeare, text + tiny + ["--resume"], models, images),
                       (words, train_shakespeare, ["--text", "poem.txt", "--generate", "Rough"],
                        models, images)]
            targets = [*targets, *targets,
                       *((f"data/MNIST/raw/{name}", train_mnist, mnist, things, None)
                         for name in checksums),
                       ("data/tinyshakespeare.txt", train_shakespeare, text[2:] + tiny, things,
                        None)]
            for trial in range(trials):
                path, script, flags, kinds, other = targets[trial % len(targets)]
                bad_file(held, path, script, flags, draw.choice(kinds), draw, other)


def bad_file(held, path, script, flags, kind, draw, other):
    """One trial: spoil a copy, run the script, see what it says, and put the original back."""
    shutil.copy(path, "original")
    before = learned(path) if path.endswith(".pt") else None
    spoil(path, kind, draw, other)
    spoiled = None if kind == "forbidden" else snapshot(path)
    name, code = getattr(kind, "__name__", kind), None
    try:
        with as_nobody():
            code, err = quietly(script.main, flags)
        said = code == 2 and len(err.strip().splitlines()) == 1 and os.path.basename(path) in err
        why = f"exit code {code}: {err}"
    except BaseException as problem:
        said, why = False, f"{type(problem).__name__}: {problem}"
    if not said and kind is flipped and before is not None:
        said = code == 0 and torch.equal(before, learned(path))
    untouched = kind == "forbidden" or snapshot(path) == spoiled or (said and code == 0)
    what = "checkpoint" if path.endswith(".pt") else "text" if path.endswith(".txt") else \
        "file of MNIST"
    held(f"a damaged {what}: one line that names it, exit code 2", said, f"{path}, {name}: {why}")
    held("the damaged file is left in place", untouched, f"{path}: {name}")
    held("nothing in it is executed", not os.path.exists("exploded"), f"{path}: {name}")
    if os.path.isdir(path):
        os.rmdir(path)
    elif os.path.exists(path):
        os.remove(path)
    shutil.move("original", path)


def torture_bad_results(held):
    """Something in the way of the table or a figure: one line that names it; and it stays there."""
    flags = ["--data", "synthetic", "--compare", "--models", "rnn", "--seeds", "0", "--epochs", "1",
             "--hidden", "8", "--layers", "1"]
    data = digits()
    for folder, kind in itertools.product(("results", "figures"),
                                          ("a file", "a directory", "forbidden")):
        with inside_temporary_folder() as here, \
                replaced(train_mnist, "synthetic_digits", lambda: data):
            if kind == "a directory":    # where the table or figure is to be
                code, err = quietly(train_mnist.main, flags)
                assert code == 0, err
                path = os.path.join(folder, sorted(os.listdir(folder))[-1])
                os.remove(path)
                os.mkdir(path)
            elif kind == "a file":
                path = folder
                with open(path, "w", encoding="utf-8") as file:
                    file.write("mine")
            else:
                path = folder
                os.mkdir(path, 0o555)
            os.chmod(here, 0o777)
            before = snapshot(path)
            with as_nobody() if kind == "forbidden" else contextlib.nullcontext():
                code, err = quietly(train_mnist.main, flags)
            print(f"    {path}, {kind}: {err.strip()}")
            held("something in the way of results: one line that names it, exit code 2",
                 code == 2 and len(err.strip().splitlines()) == 1 and folder in err, err)
            held("what was in the way stays", snapshot(path) == before, path)


# --- full disks, no permission, no network

def unshared(flags, shell):
    """A shell command in namespaces of its own (Linux): -> what ran, or None if not allowed to."""
    if not shutil.which("unshare") or subprocess.run(["unshare", flags, "true"],
                                                     capture_output=True).returncode:
        print(f"    not tried: `unshare {flags}` is not to be had here")
        return None
    return subprocess.run(["unshare", flags, "sh", "-c", shell], capture_output=True, text=True,
                          encoding="utf-8", errors="replace", env=ALONE)


def torture_full_disk(held):
    """A disk that is full before, during or after the first checkpoint; and one that is read-only.

    In the end there is one line, exit code 2, and the last checkpoint that was written can be read.
    """
    for script, flags in SHORT.items():
        with tempfile.TemporaryDirectory() as folder:
            train = f"'{sys.executable}' '{os.path.join(HERE, script)}' " + " ".join(flags)
            _, err = start_script(script, folder, flags + ["--epochs", "1"]).communicate()
            size = os.path.getsize(only_checkpoint(os.path.join(folder, "checkpoints"))) // 1024
            for part in (0.1, 0.5, 0.9, 1.1, 1.5, 1.9):
                disk = tempfile.mkdtemp(dir=folder)
                run = unshared("-rm", f"mount -t tmpfs -o size={int(part * size)}k none {disk} && "
                               f"cd {disk} && {train}; code=$?; cp -r checkpoints {disk}-kept; "
                               f"exit $code")
                if run is None:
                    return
                kept = only_checkpoint(f"{disk}-kept")
                lines = run.stderr.strip().splitlines()
                held(f"{script} on a full disk", run.returncode == 2 and len(lines) == 1 and
                     readable(kept) and (kept is not None) == (part > 1), run.stdout + run.stderr)
                print(f"    {script}, room for {part} checkpoints: {lines[-1:]}", flush=True)
            run = unshared("-rm", f"mount -t tmpfs -o ro none {disk} && cd {disk} && {train}")
            lines = run.stderr.strip().splitlines()
            held(f"{script} on a read-only disk", run.returncode == 2 and len(lines) == 1
                 and "cannot write" in lines[0], run.stderr)
            print(f"    {script}, read-only: {lines[-1:]}", flush=True)


def torture_no_network(held):
    """Without any network interface: the fallback is announced at once, and trained on."""
    if unshared("-rn", "true") is None:
        return
    for script, flags in SHORT.items():
        with tempfile.TemporaryDirectory() as folder:
            start, banner, lines = time.perf_counter(), None, []
            process = subprocess.Popen(
                ["unshare", "-rn", sys.executable, "-u", os.path.join(HERE, script), *flags[2:]],
                cwd=folder, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                env=ALONE)
            for line in process.stdout:
                lines.append(line)
                if "SYNTHETIC" in line:
                    banner = time.perf_counter() - start
            left = [name for _, _, names in os.walk(folder) for name in names]
            told = any(line.startswith("RESULT") and "synthetic" in line for line in lines)
            print(f"    {script}: announced after {banner} s, imports included; left {left}")
            held(f"{script} without a network: trained on the fallback",
                 told and process.wait() == 0 and len(left) == 1, "".join(lines))
            held(f"{script} without a network: announced within five seconds",
                 banner is not None and banner < 5, f"{banner} s")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves what is in `files`, with the fault that the first part of the path names."""
    files, stall = {}, 0.0

    def do_GET(self):
        fault, name = self.path.strip("/").split("/", 1)
        data = self.files[name]
        if fault == "missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "damaged":
            data = b"?" * len(data)
        self.wfile.write(data if fault in ("good", "damaged") else data[:len(data) // 2])
        self.wfile.flush()
        if fault == "stalled":
            time.sleep(self.stall)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(files, stall):
    """A web server with these files: -> its address."""
    Server.files, Server.stall = files, stall
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def torture_bad_downloads(held):
    """A mirror that stalls, breaks off, lies or lacks the file: the next one; else the fallback."""
    from torchvision.datasets import MNIST
    with inside_temporary_folder():
        checksums = small_mnist("site")
        files = {f"{name}.gz": gzip.compress(snapshot(os.path.join("site", name)))
                 for name in checksums}
        text = "Rough winds do shake the darling buds of May,\n" * 20
        files["input.txt"] = text.encode()
        resources = [(name, hashlib.md5(data, usedforsecurity=False).hexdigest())
                     for name, data in files.items() if name.endswith("gz")]
        poem = hashlib.sha256(text.encode()).hexdigest()
        with serving(files, 30) as address, replaced(train_mnist, "MNIST_MD5", checksums), \
                replaced(MNIST, "resources", resources), replaced(train_mnist, "PATIENCE", 1), \
                replaced(train_shakespeare, "SHA256", poem):
            for fault, second in itertools.product(("stalled", "broken", "damaged", "missing"),
                                                   ("good", "same")):
                sites = [f"{address}/{kind}/" for kind in (fault, fault if second == "same"
                                                           else second)]
                folder = f"{fault}-{second}"
                with replaced(MNIST, "mirrors", sites), \
                        replaced(train_shakespeare, "URLS", [f"{s}input.txt" for s in sites]):
                    for load in (train_mnist.load_data, train_shakespeare.load_text):
                        data, _ = quietly(load, folder)
                        left = sorted(name for _, _, names in os.walk(folder) for name in names)
                        what = f"a {fault} file at the first mirror, " + (
                            "whole at the second" if second == "good" else "and at the second")
                        good = data.name in ("mnist", "shakespeare")
                        whole = left == (sorted(checksums) if data.name == "mnist" else
                                         ["tinyshakespeare.txt"] if good else [])
                        print(f"    {what}: {data.name}, {left}", flush=True)
                        held(what, good == (second == "good") and whole, f"{data.name} {left}")
                        shutil.rmtree(folder, ignore_errors=True)


# --- fuzzed arguments

def layout(tensor, draw):
    """The same values in another layout: as it is, transposed, every second one, or expanded."""
    way = draw.randrange(4)
    if way == 1 and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if way == 2:
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    if way == 3 and tensor.ndim > 1 and len(tensor) > 0:
        return tensor[:1].expand_as(tensor)
    return tensor


def random_scan(draw):
    """Arguments of a valid call of selective_scan, most of them odd: -> tensors, settings."""
    b, l, d, n = (draw.choice(sizes) for sizes in ((0, 1, 2, 3), (0, 1, 2, 3, 17, 64, 130),
                                                   (1, 2, 5), (1, 2, 16)))
    tensors = {"x": torch.randn(b, l, d), "delta": torch.rand(b, l, d), "A": -torch.rand(d, n),
               "B": torch.randn(b, l, n), "C": torch.randn(b, l, n)}
    if draw.random() < 0.5:
        tensors["D"] = torch.randn(d)
    if draw.random() < 0.5:
        tensors["h0"] = torch.randn(b, d, n)
    kinds = [torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]
    common = draw.choice(kinds)
    for name, tensor in tensors.items():
        dtype = common if draw.random() < 0.9 else draw.choice(kinds)
        tensor = layout(tensor.to(dtype), draw).detach()
        tensors[name] = tensor.requires_grad_(draw.random() < 0.4)
    return tensors, {"method": draw.choice(("auto",) + METHODS),
                     "discretization": draw.choice(DISCRETIZATIONS), "return_state": True}


def fuzz_valid(draw):
    """One valid call, in some mode of autograd: None, or what differs from the definition."""
    tensors, chosen = random_scan(draw)
    mode = draw.choice([contextlib.nullcontext, contextlib.nullcontext, torch.no_grad,
                        torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
    with mode():
        y, h = selective_scan(**tensors, **chosen)
    exact = {name: t.detach().double().requires_grad_(t.requires_grad)
             for name, t in tensors.items()}
    if tensors["x"].shape[1] == 0:       # `definition` has nothing to stack
        y_exact, h_exact = exact["x"], exact.get("h0", torch.zeros_like(h).double())
    else:
        y_exact, h_exact = definition(**exact, discretization=chosen["discretization"])
    rough = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
    double = all(t.dtype == torch.float64 for t in tensors.values())
    y_allowed = rough.get(y.dtype, 1e-12 if double else 2e-5)
    h_allowed = 1e-12 if h.dtype == torch.float64 else 2e-5
    differences = {"y": (y, y_exact, y_allowed), "h": (h, h_exact, h_allowed)}
    asked = {name: t for name, t in tensors.items() if t.requires_grad}
    if y.requires_grad and tensors["x"].shape[1]:
        gradients = torch.autograd.grad(y.double().sum() + h.double().sum(), asked.values())
        right = torch.autograd.grad(y_exact.sum() + h_exact.sum(), [exact[n] for n in asked])
        for name, ours, true in zip(asked, gradients, right):
            allowed = rough.get(ours.dtype, 1e-10 if double else 1e-4)
            differences[f"gradient of {name}"] = ours, true, max(allowed, y_allowed)
    for name, (ours, true, allowed) in differences.items():
        if ours.shape != true.shape:
            return f"{name} has shape {tuple(ours.shape)} instead of {tuple(true.shape)}"
        if ours.numel() and not error(ours, true) <= allowed:      # NaN is not, either
            return f"{name} is wrong by {error(ours, true):.1e}, {chosen}"


def fuzz_invalid(draw):
    """One call with one thing wrong: None, or what it did instead of a ValueError in one line."""
    tensors, chosen = random_scan(draw)
    name = draw.choice(list(tensors))
    t = tensors[name].detach()
    wrong = draw.choice([t.long(), t.to(torch.complex64), t.unsqueeze(0), t.to("meta"), "text",
                         torch.cat([t, t[..., :1]], -1), torch.cat([t, t[:1], t[:1] + 1])[..., :-1]
                         if t.ndim > 1 else t[None, None], None])
    if wrong is None and name in ("D", "h0"):
        chosen["method"] = "fast"
    else:
        tensors[name] = wrong
    try:
        selective_scan(**tensors, **chosen)
    except ValueError as problem:
        return None if "\n" not in str(problem) else f"many lines: {problem}"
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return f"{name} = {wrong if wrong is None else getattr(wrong, 'shape', wrong)} was accepted"


def fuzz_layer(name, draw):
    """A layer and a random shape, half of the time a wrong one: None, or what it did wrong."""
    layer, dtype = LAYERS[name](), draw.choice([torch.float32, torch.float64])
    layer, x = layer.to(dtype), torch.randn(draw.choice((1, 2, 3)), draw.choice((1, 2, 17, 70)), 6,
                                            dtype=dtype)
    if draw.random() < 0.5:
        x = draw.choice([x[0], x[..., :-1], x.unsqueeze(0), x.transpose(1, 2)[..., :5]])
        try:
            layer(x)
        except ValueError as problem:
            return None if "\n" not in str(problem) else f"{name}, many lines: {problem}"
        except Exception as problem:
            return f"{name}: {type(problem).__name__}: {problem}"
        return f"{name} took {tuple(x.shape)}"

    def by_definition(x, delta, A, B, C, D, h0, method, return_state):
        y, h = definition(x, delta, A, B, C, D, h0)
        return (y, h) if return_state else y

    x, exact = layout(x, draw), copy.deepcopy(layer).double()
    with replaced(s6, "selective_scan", by_definition):
        y = exact(x.double(), **({"mode": "recurrence"} if name.startswith("S4") else {}))
    worst = error(layer(x), y)
    return None if worst <= 2e-5 else f"{name}: wrong by {worst:.1e}"


def torture_fuzzed_arguments(held, calls=2000):
    """Random calls, right and wrong ones, of the scan and of every layer; and not finite."""
    torch.manual_seed(0)
    draw = random.Random(0)
    for _ in range(calls):
        problem = fuzz_valid(draw)
        held("selective_scan, valid: the definition in float64", problem is None, problem)
        problem = fuzz_invalid(draw)
        held("selective_scan, invalid: a ValueError in one line", problem is None, problem)
        tensors, chosen = random_scan(draw)
        bad = {name: torch.where(torch.rand(t.shape) < 0.2, draw.choice((math.nan, math.inf,
               -math.inf, 3e38, -1.0, 0.0)), t.detach()) for name, t in tensors.items()}
        try:
            shape, problem = selective_scan(**bad, **chosen)[0].shape, ""
        except Exception as failure:
            shape, problem = None, str(failure)
        held("selective_scan, not finite: comes back", shape == bad["x"].shape, problem)
    for _ in range(calls // len(LAYERS) + 1):
        for name in LAYERS:
            problem = fuzz_layer(name, draw)
            held("layers: the definition in float64, or a ValueError in one line",
                 problem is None, problem)
    x, delta, A, B, C, _, _ = constants(b=2, l=20)
    for what, function in {
            "vmap": lambda: torch.func.vmap(lambda x: selective_scan(x, delta, A, B, C))(x[None]),
            "func.grad": lambda: torch.func.grad(
                lambda x: selective_scan(x, delta, A, B, C).sum())(x),
            "jvp": lambda: torch.func.jvp(lambda x: selective_scan(x, delta, A, B, C), (x,), (x,)),
            "a second derivative": lambda: torch.autograd.grad(torch.autograd.grad(
                selective_scan(x.requires_grad_(), delta, A, B, C).square().sum(), x,
                create_graph=True)[0].sum(), x)}.items():
        try:
            function()
            held("torch.func and second derivatives are refused in one sentence", False, what)
        except RuntimeError as problem:
            print(f"    {what}: {problem}")
            held("torch.func and second derivatives are refused in one sentence",
                 "\n" not in str(problem) and "selective_scan" in str(problem), str(problem))


# --- numbers

def torture_long_scans(held, l=2 ** 20):
    """A million tokens with Δ from 1e-6 to 1e3: relative error of y and h at most 1e-4.

    "sequential" is asked from 1e-3 on. One step's exp(-1e-6) is rounded by up to 3 % of what it
    takes away, and if Δ is the same at every token that adds up; "parallel" takes exp of their sum.
    """
    torch.manual_seed(0)
    names = ("1e-6", "1e-3", "1", "1e3", "1e-6 … 1e3, mixed")
    delta = torch.stack([torch.full((l, 1), 10.0 ** power) for power in (-6, -3, 0, 3)] +
                        [10 ** torch.empty(l, 1).uniform_(-6, 3)])             # (5, l, 1)
    x, B, C = torch.randn(5, l, 1), torch.randn(5, l, 2), torch.randn(5, l, 2)
    inputs = x, delta, -torch.tensor([[1.0, 16.0]]), B, C
    for z in DISCRETIZATIONS:
        exact = selective_scan(*(t.double() for t in inputs), method="sequential",
                               discretization=z, return_state=True)
        for method in ("auto", *METHODS):
            ours = selective_scan(*inputs, method=method, discretization=z, return_state=True)
            for i, name in list(enumerate(names))[method == "sequential":]:
                errors = [error(a[i], b[i]) for a, b in zip(ours, exact)]
                text = f"Δ = {name}, {method}, {z}: y {errors[0]:.1e}, h {errors[1]:.1e}"
                print(f"    {text}", flush=True)
                held("a scan of 2^20 tokens, relative error at most 1e-4",
                     all(e <= 1e-4 for e in errors), text)


class Tally(dict):
    """Counts of trials and of those that held, by what was promised."""

    def __call__(self, what, truth, why=""):
        tried, held = self.get(what, (0, 0))
        self[what] = tried + 1, held + bool(truth)
        if not truth:
            print(f"    NOT HELD: {what}: {str(why).strip()}", flush=True)


def torture(words):
    """Run the torture_* functions (those that contain one of the words): a table of tried, held.

    All of them together also write it to results/torture.csv.
    """
    held, start = Tally(), time.perf_counter()
    for name, function in list(globals().items()):
        if name.startswith("torture_") and (not words or any(word in name for word in words)):
            print(name[8:].replace("_", " "), flush=True)
            try:
                function(held)
            except Exception:
                held(f"{name[8:].replace('_', ' ')}: ran to its end", False, traceback.format_exc())
    print("\n| what | tried | held |\n|---|---|---|")
    for what, (tried, good) in held.items():
        print(f"| {what} | {tried:,} | {good:,} |")
    print(f"\n{time.perf_counter() - start:.0f} s, torch {torch.__version__}, "
          f"Python {sys.version.split()[0]}, {sys.platform}")
    if not words:
        machine = {"torch": torch.__version__, "python": sys.version.split()[0],
                   "platform": sys.platform, "command": "python test_scan.py --torture"}
        train_mnist.write_atomically("results/torture.csv", lambda part: s6.write_rows(part, [
            {"what": what, "tried": tried, "held": good, **machine}
            for what, (tried, good) in held.items()]))
    return 0 if held and all(tried == good for tried, good in held.values()) else 1


# --------------------------------------------------------------------------------------------------
# The runner.

def main(words):
    if hasattr(sys.stdout, "reconfigure"):       # a Windows log may not know Δ
        sys.stdout.reconfigure(errors="replace")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if "--torture" in words:
        return torture([word for word in words if word != "--torture"])
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
