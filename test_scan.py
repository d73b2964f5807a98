"""test_scan.py: why you may believe the rest.

    python test_scan.py                all tests, about a minute; the last line counts them (pytest test_scan.py also works)
    python test_scan.py padding zoh    those whose name contains one of the words

Each test is a sentence that is true, and says which bug would make it false. It prints the error that it found beside
the error that it allows. Read them as a lesson: first two steps by hand, then the equation against every faster way
to compute it, then what follows from the equation, then the models, then the training script and its bad days.

Read before: s6.py. Read next: block.py.
"""
import contextlib
import importlib.util
import io
import math
import os
import sys
import tempfile
import time
import traceback

import torch
import torch.nn.functional as F

import s6
import train_mnist
from block import ConvS6, MambaBlock, causal_conv, parameter_groups
from rnn import RNN
from s6 import S6, definition, selective_scan
from vision import ImageClassifier, VisionBlock, VisionMamba

METHODS = ("sequential", "parallel")
DISCRETIZATIONS = ("euler", "zoh")
LENGTHS = (1, 2, 3, 5, 7, 64, 100, 257)


def error(ours, exact):
    """The largest difference over the largest value."""
    ours, exact = ours.detach().double(), exact.detach().double()
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    return ((ours - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item() if ours.numel() else 0.0


def allow(what, found, allowed):
    """Print the error that was found beside the one that is allowed, and compare."""
    print(f"    {what:76s} {found:.1e}  allowed {allowed:.0e}")
    assert found <= allowed, f"{what}: {found:.2e} > {allowed:.0e}"


def equal(what, ours, exact):
    """Equal to the last bit."""
    assert torch.equal(ours, exact), f"{what}: the largest difference is {(ours - exact).abs().max().item():.2e}"
    print(f"    {what:76s} bit for bit")


def raises(words, function, kind=ValueError):
    """function() raises that kind of error, in one line that contains the words."""
    try:
        function()
    except kind as e:
        message = str(e)
        assert "\n" not in message and all(word in message for word in words), f"unclear message: {message!r}"
        print(f"    {kind.__name__}: {message[:120]}")
        return
    raise AssertionError(f"no {kind.__name__} that says {words}")


def inputs(b=2, l=7, d=3, n=4, dtype=torch.float64, seed=0):
    """Random x, Δ, A, B, C, D, h0 in the ranges of the glossary, requiring gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A = -(0.1 + 2 * torch.rand(d, n, generator=g, dtype=torch.float64))
    tensors = (normal(b, l, d), F.softplus(normal(b, l, d) - 1), A, normal(b, l, n), normal(b, l, n), normal(d),
               normal(b, d, n))
    return [t.to(dtype).requires_grad_() for t in tensors]


# ----------------------------------------------------------------------------------------------------------------
# The scan computes its equation.

def test_two_steps_by_hand():
    """Catches: reading the state before it is updated, a decay applied to the new input, D forgotten."""
    def column(*values):
        return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)

    x, delta, B, C = column(2, 3), column(0.5, 1), column(1, -1), column(10, 100)
    A, D = column(-math.log(2))[0], column(7)[0, 0]
    # h_1 = 0 + 0.5·1·2 = 1                                  y_1 = 10·1 + 7·2 = 24
    # h_2 = exp(-1·ln 2)·1 + 1·(-1)·3 = 0.5 - 3 = -2.5       y_2 = 100·(-2.5) + 7·3 = -229
    for method in METHODS:
        y, h = selective_scan(x, delta, A, B, C, D, method=method, return_state=True)
        allow(f"{method}: y = (24, -229)", error(y, column(24, -229)), 1e-15)
        allow(f"{method}: the last state is -2.5", error(h, column(-2.5)), 1e-15)
    # ZOH: B̄ = (exp(ΔA) - 1)/A, so h_1 = 2 (1 - 1/√2)/ln 2 and h_2 = h_1/2 - 3 (1 - 1/2)/ln 2
    h_1 = 2 * (1 - 0.5 ** 0.5) / math.log(2)
    y = selective_scan(x, delta, A, B, C, discretization="zoh")
    allow("zoh: y_1 and y_2", error(y, column(10 * h_1, 100 * (0.5 * h_1 - 1.5 / math.log(2)))), 1e-15)


def test_both_methods_equal_the_definition_at_every_length():
    """Catches: a chunk or a piece one token too short, padding that leaks, a prefix scan that composes backwards."""
    for method in METHODS:
        for discretization in DISCRETIZATIONS:
            for dtype, allowed in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
                worst = 0.0
                for l in LENGTHS:
                    exact = definition(*inputs(l=l), discretization)
                    ours = selective_scan(*inputs(l=l, dtype=dtype), method=method, discretization=discretization,
                                          return_state=True)
                    worst = max(worst, *(error(a, e) for a, e in zip(ours, exact)))
                allow(f"{method}, {discretization}, {dtype}: the worst of lengths {LENGTHS}", worst, allowed)


def _gradients(scan, tensors):
    """The gradients of every argument, for a loss that reads both y and the last state."""
    outputs = scan(*tensors)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in outputs]
    return torch.autograd.grad(sum((t * w).sum() for t, w in zip(outputs, weights)), tensors)


def test_the_gradients_derived_by_hand_equal_those_of_autograd():
    """Catches: a lost term of the adjoint (the last state's gradient, Δ's second way in through B̄, h0's)."""
    names = ("x", "Δ", "A", "B", "C", "D", "h0")
    for discretization in DISCRETIZATIONS:
        for l in (1, 2, 64, 257):
            exact = _gradients(lambda *t: definition(*t, discretization), inputs(l=l))
            for method in METHODS:
                for dtype, allowed in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
                    ours = _gradients(lambda *t: selective_scan(*t, method=method, discretization=discretization,
                                                                return_state=True), inputs(l=l, dtype=dtype))
                    errors = {name: error(a, e) for name, a, e in zip(names, ours, exact)}
                    worst = max(errors, key=errors.get)
                    allow(f"{discretization}, {method}, l = {l}, {dtype}: worst is ∂{worst}", errors[worst], allowed)


def test_gradcheck_of_both_methods_and_both_discretizations():
    """Catches: a wrong equation and a wrong gradient that agree: differences of the loss know no derivation."""
    for method in METHODS:
        for discretization in DISCRETIZATIONS:
            assert torch.autograd.gradcheck(
                lambda *t: selective_scan(*t, method=method, discretization=discretization, return_state=True),
                inputs(b=2, l=5, d=2, n=2))
            print(f"    {method}, {discretization}: all seven arguments, y and the last state")


def test_the_gradient_of_the_gradient_is_refused_and_not_wrong():
    """Catches: a second derivative that silently leaves out half of its terms."""
    tensors = inputs(l=3)
    raises(["first derivative only"],
           lambda: torch.autograd.grad(selective_scan(*tensors).sum(), tensors, create_graph=True), RuntimeError)


def test_a_gradient_is_only_made_for_who_asks():
    """Catches: an input that needs no gradient breaking those that do."""
    for asks in range(7):
        tensors = [t.detach().requires_grad_(i == asks) for i, t in enumerate(inputs(l=9))]
        exact = torch.autograd.grad(definition(*tensors)[0].sum(), tensors[asks])[0]
        ours = torch.autograd.grad(selective_scan(*tensors).sum(), tensors[asks])[0]
        assert error(ours, exact) < 1e-13
    print("    each of the seven arguments alone")


# ----------------------------------------------------------------------------------------------------------------
# What follows from the equation.

def test_a_sequence_cut_anywhere_and_continued_is_the_whole():
    """Catches: a last state taken from padding, h0 ignored by a method."""
    for method in METHODS:
        x, delta, A, B, C, D, h0 = (t.detach() for t in inputs(l=37))
        whole, last = selective_scan(x, delta, A, B, C, D, h0, method=method, return_state=True)
        worst = 0.0
        for cut in range(1, 37):
            y1, h = selective_scan(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, h0, method=method,
                                   return_state=True)
            y2, h = selective_scan(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, h, method=method,
                                   return_state=True)
            worst = max(worst, error(torch.cat([y1, y2], 1), whole), error(h, last))
        allow(f"{method}: the worst of all 36 cuts of 37 tokens", worst, 1e-14)


def _through(blocks, x, states=None, mask=None):
    """Run x through blocks: -> output, states."""
    states, new = states or [None] * len(blocks), []
    for block, state in zip(blocks, states):
        x, state = block(x, state, mask, return_state=True)
        new.append(state)
    return x, new


def _two_blocks():
    torch.manual_seed(0)
    return [MambaBlock(16, n=4).double() for _ in range(2)], torch.randn(3, 11, 16, dtype=torch.float64)


def test_step_by_step_is_the_whole_through_two_layers():
    """Catches: a convolution window shifted by one, a window shared between layers."""
    with torch.no_grad():
        blocks, x = _two_blocks()
        whole, last = _through(blocks, x)
        states, steps = None, []
        for t in range(x.shape[1]):
            y, states = _through(blocks, x[:, t:t + 1], states)
            steps.append(y)
    allow("11 tokens, one at a time", error(torch.cat(steps, 1), whole), 1e-14)
    allow("the state after them", max(error(a, b) for s, t in zip(states, last) for a, b in zip(s, t)), 1e-14)


def test_the_future_cannot_change_the_past_when_causal_and_does_when_bidirectional():
    """Catches: a convolution that peeks ahead, a backward branch that is not reversed or not reversed back."""
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 7:] += 1
    with torch.no_grad():
        for direction in ("causal", "bidirectional"):
            block = VisionBlock(16, n=4, direction=direction).double()
            change = (block(x) - block(other)).abs().amax(-1)[0]
            print(f"    {direction}: changing tokens 7 … 11 changes tokens 0 … 6 by at most {change[:7].max():.1e}")
            assert (change[:7].max() == 0) == (direction == "causal") and change[7:].min() > 0
        block = MambaBlock(16, n=4).double()
        equal("block.py: tokens 0 … 6", block(x)[:, :7], block(other)[:, :7])


def test_reversing_the_image_and_swapping_the_branches_mirrors_the_result():
    """Catches: branches that share what they should not, a fusion that favours one of them."""
    torch.manual_seed(0)
    block, x = VisionBlock(16, n=4).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        y = block(x)
        block.first, block.second = block.second, block.first
        mirrored = block(x.flip(1)).flip(1)
    allow("9 tokens", error(mirrored, y), 1e-15)


def test_constant_delta_B_C_is_a_convolution():
    """Catches: a decay one step early or late. Without selection, y = K * x with K_j = Σ_n C Ā^j B̄: that is S4."""
    x, delta, A, B, C, _, _ = (t.detach() for t in inputs(b=1, l=50))
    delta, B, C = (t[:, :1].expand_as(t) for t in (delta, B, C))
    j = torch.arange(50).view(-1, 1, 1)
    K = (C[0, 0] * torch.exp(delta[0, 0, :, None] * A) ** j * delta[0, 0, :, None] * B[0, 0]).sum(-1)      # (l, d)
    kernel = K.t().flip(-1).unsqueeze(1)                                                                   # (d, 1, l)
    convolved = F.conv1d(x.transpose(1, 2), kernel, padding=49, groups=3)[..., :50].transpose(1, 2)
    for method in METHODS:
        allow(f"{method}: scan against convolution", error(selective_scan(x, delta, A, B, C, method=method), convolved),
              1e-13)


def test_delta_zero_keeps_and_delta_infinite_forgets():
    """Catches: Δ in the wrong place. Δ decides between holding the state and replacing it."""
    x, delta, A, B, C, _, h0 = (t.detach() for t in inputs(l=20))
    for method in METHODS:
        _, h = selective_scan(x, torch.zeros_like(delta), A, B, C, None, h0, method=method, return_state=True)
        equal(f"{method}: 20 tokens with Δ = 0 leave the state", h, h0)
        delta_one = delta.clone()
        delta_one[:, 10] = 1e4
        _, h_a = selective_scan(x, delta_one, A, B, C, None, h0, method=method, return_state=True)
        _, h_b = selective_scan(x, delta_one, A, B, C, None, 5 - h0, method=method, return_state=True)
        equal(f"{method}: after one token with Δ = 10⁴ the first state does not matter", h_a, h_b)


def test_padding_changes_nothing_wherever_it_stands():
    """Catches: padding seen by the convolution or written to the state, a window of padding carried on."""
    with torch.no_grad():
        blocks, x = _two_blocks()
        whole, last = _through(blocks, x)
        mask, padded = torch.zeros(3, 20, dtype=torch.bool), 100 * torch.randn(3, 20, 16, dtype=torch.float64)
        for i in range(3):      # 11 real tokens at random places among 20
            mask[i, torch.randperm(20)[:11]] = True
            padded[i, mask[i]] = x[i]
        y, states = _through(blocks, padded, None, mask)
    allow("the real tokens", error(y[mask].view_as(x), whole), 1e-14)
    allow("window and state", max(error(a, b) for s, t in zip(states, last) for a, b in zip(s, t)), 1e-14)
    equal("the padding comes out as it went in", y[~mask], padded[~mask])


def test_zoh_and_euler_agree_as_delta_vanishes():
    """Catches: a wrong B̄. Euler's relative error is about |ΔA|/2, so ten times less Δ is ten times less error."""
    x, delta, A, B, C, _, _ = (t.detach() for t in inputs(l=1))
    errors = []
    for scale in (1e-2, 1e-3, 1e-4):
        zoh, euler = (selective_scan(x, scale * delta, A, B, C, discretization=z) for z in ("zoh", "euler"))
        errors.append(error(euler, zoh))
        allow(f"Δ up to {scale * delta.max():.0e}", errors[-1], (scale * delta.max() * -A.min()).item())
    allow("ten times less Δ, a tenth of the error: off by", abs(errors[1] / errors[2] / 10 - 1), 0.01)


def test_zoh_is_the_exact_solution_while_x_is_held():
    """Catches: zero-order hold in name only. Two half steps with one x must equal a whole one; Euler's do not."""
    x, delta, A, B, C, _, h0 = (t.detach() for t in inputs(l=1))
    twice = lambda t: t.repeat(1, 2, 1)
    for z, equals in (("zoh", True), ("euler", False)):
        _, whole = selective_scan(x, delta, A, B, C, None, h0, discretization=z, return_state=True)
        _, halves = selective_scan(twice(x), twice(delta) / 2, A, twice(B), twice(C), None, h0, discretization=z,
                                   return_state=True)
        print(f"    {z}: two half steps differ from one step by {error(halves, whole):.1e}")
        assert (error(halves, whole) < 1e-14) == equals


def test_compiled_and_eager_agree():
    """Catches: TorchScript reading the loop differently, or a fallback that nobody has ever run."""
    spec = importlib.util.spec_from_file_location("s6_eager", s6.__file__)
    eager, script = importlib.util.module_from_spec(spec), torch.jit.script
    torch.jit.script = _not_supported
    try:
        spec.loader.exec_module(eager)
    finally:
        torch.jit.script = script
    assert not isinstance(eager._forward, torch.jit.ScriptFunction)
    print(f"    s6.py runs {'compiled' if isinstance(s6._forward, torch.jit.ScriptFunction) else 'eagerly'} here")
    for method in METHODS:
        for z in DISCRETIZATIONS:
            ours, theirs = (_gradients(lambda *t: module.selective_scan(
                *t, method=method, discretization=z, return_state=True), inputs(l=33)) for module in (s6, eager))
            allow(f"{method}, {z}: gradients", max(error(a, b) for a, b in zip(ours, theirs)), 1e-14)


def _not_supported(*_, **__):
    raise RuntimeError("torch.jit.script is not supported here")


def test_extreme_inputs_stay_finite():
    """Catches: a division by a product of decays, which underflows; a cumulative sum in log space."""
    for method in METHODS:
        for z in DISCRETIZATIONS:
            for name, scale, size in (("Δ = 1e-8", 1e-8, 1), ("Δ = 1e3", 1e3, 1), ("x = 0", 1, 0), ("x = 1e15", 1, 1e15)):
                x, _, A, B, C, D, h0 = inputs(l=2000, dtype=torch.float32)
                delta = torch.full_like(x, scale).requires_grad_()
                tensors = [(size * x).detach().requires_grad_(), delta, A, B, C, D, h0]
                outputs = selective_scan(*tensors, method=method, discretization=z, return_state=True)
                grads = torch.autograd.grad(sum(t.mean() for t in outputs), tensors)
                assert all(t.isfinite().all() for t in (*outputs, *grads)), f"{method}, {z}, {name}"
        print(f"    {method}: 2,000 tokens with Δ = 1e-8, Δ = 1e3, x = 0, x = 1e15; both discretizations, all gradients")


def test_half_precision_inputs_are_accumulated_in_float32():
    """Catches: a state in bfloat16, which stops growing at 256 when ones are added."""
    b, l, one = 1, 1000, lambda *s: torch.ones(*s, dtype=torch.bfloat16)
    for method in METHODS:
        y, h = selective_scan(one(b, l, 2), one(b, l, 2), -1e-6 * one(2, 1), one(b, l, 1), one(b, l, 1), method=method,
                              return_state=True)
        assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
        allow(f"{method}: 1,000 ones add up to {h[0, 0, 0].item():.1f}", abs(h[0, 0, 0].item() / 1000 - 1), 1e-3)
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = selective_scan(*tensors)
    equal("autocast does not reach into the scan", inside, selective_scan(*tensors))


def test_memory_grows_with_the_root_of_the_length():
    """Catches: states kept for every token. Sixteen times the length may keep four times the states."""
    def kept(l):
        x, delta, A, B, C, D, h0 = inputs(b=1, l=l, d=64, n=16, dtype=torch.float32)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: (sizes.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()), t)[1],
                lambda t: t):
            selective_scan(x, delta, A, B, C, method="sequential")
        return sum(sizes.values()) - 4 * sum(t.numel() for t in (x, delta, A, B, C))
    ratio = kept(4096) / kept(256)
    print(f"    kept beside the inputs: {kept(256)} bytes at 256 tokens, {ratio:.2f} times that at 4,096")
    assert ratio < 4.5


# ----------------------------------------------------------------------------------------------------------------
# The layers and models.

def test_S6_is_algorithm_1():
    """Catches: Δ without softplus, B and C exchanged, names that official weights would not fit."""
    torch.manual_seed(0)
    layer, x = S6(8, n=4, dt_rank=2), torch.randn(2, 6, 8)
    assert set(dict(layer.named_parameters())) == {"x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"}
    dt, B, C = (x @ layer.x_proj.weight.t()).split([2, 4, 4], -1)
    delta = torch.log1p(torch.exp(dt @ layer.dt_proj.weight.t() + layer.dt_proj.bias))
    exact = definition(x, delta, -torch.exp(layer.A_log), B, C, layer.D)[0]
    allow("S6(x) against Algorithm 1", error(layer(x), exact), 1e-6)


def test_a_fresh_layer_rests_where_the_paper_says():
    """Catches: a bias that is not the inverse of softplus, an A that is not -1 … -n."""
    torch.manual_seed(0)
    layer = S6(4096)
    resting = F.softplus(layer.dt_proj.bias)
    log_mean, middle = resting.log().mean().item(), math.log(1e-2)
    print(f"    resting Δ from {resting.min():.1e} to {resting.max():.1e}, geometric mean {math.exp(log_mean):.1e}")
    assert 0.99e-3 <= resting.min() and resting.max() <= 1.01e-1 and abs(log_mean - middle) < 0.1
    allow("A = -1 … -16", error(-layer.A_log.exp(), -torch.arange(1.0, 17).expand(4096, 16)), 1e-6)


def test_the_causal_convolution_is_its_equation():
    """Catches: a flipped kernel, an image layout that mixes channels."""
    torch.manual_seed(0)
    x, weight, bias, window = (torch.randn(*s, dtype=torch.float64) for s in ((2, 9, 5), (5, 1, 4), (5,), (2, 3, 5)))
    for before, name in ((torch.zeros_like(window), "no window"), (window, "window")):
        padded = torch.cat([before, x], 1)
        exact = bias + sum(padded[:, i:i + 9] * weight[:, 0, i] for i in range(4))
        allow(name, error(causal_conv(x, weight, bias, None if name == "no window" else window), exact), 1e-14)


def test_weight_decay_spares_what_has_no_business_at_zero():
    """Catches: decay on A_log, D, biases, norms, positions, or none at all."""
    model = VisionMamba(16, layers=1)
    decayed, spared = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    for p in decayed["params"]:
        assert names[id(p)].endswith("weight") and "norm" not in names[id(p)] and p.ndim > 1, names[id(p)]
    for wanted in ("A_log", "D", "bias", "norm.weight", "position"):
        assert any(names[id(p)].endswith(wanted) for p in spared["params"]), wanted
    print(f"    {len(decayed['params'])} tensors decay, {len(spared['params'])} do not")


def test_the_vanilla_rnn_is_its_equation():
    """Catches: a baseline that is not what it is called."""
    torch.manual_seed(0)
    model, x = RNN(4, 6, layers=1), torch.randn(2, 5, 4)
    W, U, b, c = (p for _, p in model.rnn.named_parameters())
    h, states = torch.zeros(2, 6), []
    for t in range(5):
        h = torch.tanh(x[:, t] @ W.t() + b + h @ U.t() + c)
        states.append(h)
    allow("h_t = tanh(W x_t + U h_{t-1} + b)", error(model(x), torch.stack(states, 1)), 1e-6)
    allow("U starts orthogonal", error(U @ U.t(), torch.eye(6)), 1e-6)


def test_all_models_have_one_budget():
    """Catches: a comparison of a large model with a small one."""
    count = lambda m: sum(p.numel() for p in m.parameters())
    counts = {model: count(train_mnist.build(_settings(model=model))) for model in train_mnist.MODELS}
    print(f"    parameters: {counts}")
    assert counts["bidirectional"] == counts["causal"] <= 100_000
    assert abs(counts["rnn"] / counts["causal"] - 1) < 0.05


def test_any_image_that_the_patch_divides():
    """Catches: 28×28 or one channel written into the model."""
    for channels, size, fuse, pool, stem in ((1, (28, 28), "average", "mean", "conv"), (3, (32, 32), "concat", "max", "patch"),
                                             (3, (16, 24), "average", "last", "conv")):
        model = VisionMamba(16, layers=1, fuse=fuse, image_size=size, channels=channels, pool=pool, stem=stem, classes=7)
        assert model(torch.randn(2, channels, *size)).shape == (2, 7)
        print(f"    {channels} channels, {size[0]}×{size[1]} pixels, stem {stem}, fuse {fuse}, pool {pool}")


def test_the_first_loss_is_that_of_a_blind_guess():
    """Catches: an initialisation that is sure of itself before it has seen anything."""
    data = _digits()
    for model in train_mnist.MODELS:
        trainer = train_mnist.Trainer(_settings(model=model), data, torch.device("cpu"))
        images = train_mnist.normalize(data.test_images.float() / 255)
        loss = F.cross_entropy(trainer.model(images), data.test_labels).item()
        allow(f"{model}: first loss {loss:.3f}, ln 10 = {math.log(10):.3f}; difference", abs(loss - math.log(10)), 0.3)


# ----------------------------------------------------------------------------------------------------------------
# The training script, on good days.

def _settings(**changes):
    """The defaults of train_mnist.py."""
    args = train_mnist.parse([])
    return dict({name: getattr(args, name) for name in train_mnist.SETTINGS}, **changes)


def _small(**changes):
    """A model that trains in seconds."""
    return _settings(**{"d_model": 16, "layers": 1, "batch": 32, "epochs": 2, "hidden": 24, **changes})


_cache = {}


def _digits(train=256, test=200):
    if (train, test) not in _cache:
        _cache[train, test] = train_mnist.synthetic_digits(train, test)
    return _cache[train, test]


def _weights(trainer):
    return torch.cat([p.detach().flatten() for p in (*trainer.model.parameters(), *trainer.average.parameters())])


def _quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        result = function(*args)
    return result, err.getvalue()


def test_two_runs_with_one_seed_are_bitwise_equal_and_with_two_are_not():
    """Catches: a draw that nobody seeded."""
    cpu, runs = torch.device("cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 0, 1):
            trainer = train_mnist.Trainer(_small(seed=seed), _digits(), cpu)
            _quietly(train_mnist.fit, trainer, os.path.join(folder, "a.pt"))
            runs.append(_weights(trainer))
    equal("seed 0 and seed 0", runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_run_that_is_stopped_anywhere_and_resumed_ends_in_the_same_weights():
    """Catches: a checkpoint that forgets the optimizer, the average, the order of the images or the warps."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.pt")
        for model in train_mnist.MODELS:
            whole = train_mnist.Trainer(_small(model=model), _digits(), cpu)
            _quietly(train_mnist.fit, whole, path)
            for asked in (1, 5, 9, 12):      # calls of stop(): one per step and per batch of test images
                calls = iter(range(asked))
                part = train_mnist.Trainer(_small(model=model), _digits(), cpu)
                finished, _ = _quietly(train_mnist.fit, part, path, lambda: next(calls, None) is None)
                assert not finished and part.step < whole.steps
                part = train_mnist.Trainer(_small(model=model), _digits(), cpu)
                part.load(path)
                _quietly(train_mnist.fit, part, path)
                assert part.accuracies == whole.accuracies
                equal(f"{model}: stopped after {asked} looks at the clock, of 18", _weights(part), _weights(whole))


def test_the_synthetic_digits_are_learnable():
    """Catches: labels that do not belong to the images, warps that destroy them, a recipe that does not train."""
    trainer = train_mnist.Trainer(_small(d_model=32, epochs=4), _digits(3200, 400), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        _quietly(train_mnist.fit, trainer, os.path.join(folder, "a.pt"))
    print(f"    test accuracy after each of four epochs of 3,200 digits: {trainer.accuracies}; blind guess: 10")
    assert trainer.accuracies[-1] > 70


def test_the_recipe_is_what_it_says():
    """Catches: a schedule that never reaches its peak or never ends, a warp that moves images when told not to."""
    rates = [train_mnist.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert max(rates) == rates[99] == 1.0 and rates[-1] == 0 and rates[49] == 0.5
    images = torch.rand(4, 1, 28, 28)
    allow("no warp", error(train_mnist.warp(images, 0, 0, 0, 0), images), 1e-4)
    down = train_mnist.warp(images, 0, 0, 0, 2)
    assert down.shape == images.shape and error(down, images) > 0.1


# ----------------------------------------------------------------------------------------------------------------
# And on bad ones: every mistake gets one clear line.

def test_every_documented_error_of_the_scan_is_raised():
    """Catches: a wrong shape that broadcasts, and trains."""
    x, delta, A, B, C, D, h0 = inputs()
    raises(["delta", "(2, 7, 3)", "(2, 6, 3)"], lambda: selective_scan(x, delta[:, :6], A, B, C))
    raises(["x", "(b, l, d)", "(2, 7)"], lambda: selective_scan(x[..., 0], delta, A, B, C))
    raises(["A", "(3, n)", "(4, 3)"], lambda: selective_scan(x, delta, A.t(), B, C))
    raises(["B", "(2, 7, 4)", "(2, 7, 3)"], lambda: selective_scan(x, delta, A, B[..., :3], C))
    raises(["C", "(2, 7, 4)", "(1, 7, 4)"], lambda: selective_scan(x, delta, A, B, C[:1]))
    raises(["D", "(3,)", "(1,)"], lambda: selective_scan(x, delta, A, B, C, D[:1]))
    raises(["h0", "(2, 3, 4)", "(2, 4, 3)"], lambda: selective_scan(x, delta, A, B, C, D, h0.transpose(1, 2)))
    raises(["B", "dtype", "int64"], lambda: selective_scan(x, delta, A, B.long(), C))
    raises(["C", "cpu", "meta"], lambda: selective_scan(x, delta, A, B, C.to("meta")))
    raises(["delta", "tensor", "float"], lambda: selective_scan(x, 0.1, A, B, C))
    raises(["method", "parallel", "paralel"], lambda: selective_scan(x, delta, A, B, C, method="paralel"))
    raises(["discretization", "zoh", "foh"], lambda: selective_scan(x, delta, A, B, C, discretization="foh"))


def test_every_documented_error_of_the_models_is_raised():
    """Catches: an image cropped in silence, a misspelt option taken for the default."""
    raises(["patch", "30x28"], lambda: VisionMamba(16, image_size=(30, 28)))
    raises(["patch", "even"], lambda: VisionMamba(16, patch=7))
    raises(["direction", "causal", "backward"], lambda: VisionMamba(16, direction="backward"))
    raises(["fuse", "concat", "sum"], lambda: VisionMamba(16, fuse="sum"))
    raises(["pool", "mean", "avg"], lambda: VisionMamba(16, pool="avg"))
    raises(["stem", "conv", "vit"], lambda: VisionMamba(16, stem="vit"))
    raises(["28x28", "(1, 1, 32, 32)"], lambda: VisionMamba(16)(torch.randn(1, 1, 32, 32)))
    raises(["(b, 1, height, width)", "(1, 3, 28, 28)"], lambda: VisionMamba(16)(torch.randn(1, 3, 28, 28)))


def test_a_bad_checkpoint_is_named_and_left_alone():
    """Catches: a traceback, a pickle that runs code, another model's weights loaded in part."""
    cpu, error_kind = torch.device("cpu"), train_mnist.UserError
    trainer = train_mnist.Trainer(_small(), _digits(), cpu)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.pt")
        raises(["no checkpoint", path], lambda: trainer.load(path), error_kind)
        trainer.save(path)
        assert os.listdir(folder) == ["a.pt"]
        other = train_mnist.Trainer(_small(model="rnn"), _digits(), cpu)
        raises([path, "bidirectional", "rnn"], lambda: other.load(path), error_kind)
        with open(path, "rb") as file:
            whole = file.read()
        for damage in (whole[:1000], whole[:-7], b"", b"cos\nsystem\n(S'touch ran'\ntR."):
            with open(path, "wb") as file:
                file.write(damage)
            raises([path, "no readable checkpoint"], lambda: trainer.load(path), error_kind)
            with open(path, "rb") as file:
                assert file.read() == damage and not os.path.exists("ran")
        torch.save({"weights": torch.ones(3)}, path)
        raises([path, "not a checkpoint of train_mnist.py"], lambda: trainer.load(path), error_kind)


def test_damaged_images_and_folders_that_cannot_be_written_are_named():
    """Catches: training on half a data set, an hour of training that cannot be saved."""
    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "MNIST", "raw")
        os.makedirs(raw)
        for name in train_mnist.MNIST_FILES:
            with open(os.path.join(raw, name), "wb") as file:
                file.write(b"\0\0\10\3 cut off")
        raises(["train-images-idx3-ubyte", "truncated"], lambda: train_mnist.load_data(folder), train_mnist.UserError)
        blocked = os.path.join(folder, "file")
        open(blocked, "w").close()
        code, message = _quietly(train_mnist.main, ["--data", "synthetic", "--out", os.path.join(blocked, "out")])
        print(f"    exit code {code}: {message.strip()[:110]}")
        assert code == 2 and "cannot write" in message and "Traceback" not in message


def test_without_network_the_fallback_is_announced_and_labelled():
    """Catches: synthetic digits reported as MNIST."""
    download, train_mnist.download_mnist = train_mnist.download_mnist, _no_network
    try:
        with tempfile.TemporaryDirectory() as folder:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                data = train_mnist.load_data(folder)
            assert data.name == "synthetic-digits" and "SYNTHETIC" in printed.getvalue()
            raises(["cannot be downloaded", "--data synthetic"], lambda: train_mnist.load_data(folder, "real"),
                   train_mnist.UserError)
            assert os.listdir(folder) == []
    finally:
        train_mnist.download_mnist = download


def _no_network(*_):
    raise OSError("[Errno -3] Temporary failure in name resolution")


def test_a_loss_that_is_not_finite_stops_the_run():
    """Catches: epochs of training on NaN, and a good checkpoint overwritten by them."""
    trainer = train_mnist.Trainer(_small(lr=float("inf")), _digits(), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.pt")
        raises(["loss", "step", "learning rate"], lambda: _quietly(train_mnist.fit, trainer, path), train_mnist.UserError)
        assert os.listdir(folder) == []


def test_a_wrong_flag_is_answered_with_what_is_right():
    """Catches: a typing error found after an hour."""
    for flags, words in ((["--model", "lstm"], "bidirectional"), (["--epochs", "0"], "1 or more"), (["--lr", "fast"], "lr"),
                         (["--nonsense"], "nonsense"), (["--seed", "-1"], "between 0")):
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err):
                train_mnist.parse(flags)
            raise AssertionError(f"{flags} was taken")
        except SystemExit as stop:
            last = err.getvalue().strip().splitlines()[-1]
            print(f"    exit code {stop.code}: {last[:110]}")
            assert stop.code == 2 and words in last


# ----------------------------------------------------------------------------------------------------------------
# The runner.

def main(words):
    torch.set_num_threads(min(2, torch.get_num_threads()))
    tests = [(name, f) for name, f in globals().items() if name.startswith("test_")]
    tests = [(name, f) for name, f in tests if not words or any(word in name for word in words)]
    failed, start = [], time.perf_counter()
    for name, function in tests:
        print(name[5:].replace("_", " "), flush=True)
        try:
            function()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            print("    FAILED")
            failed.append(name)
    for name in failed:
        print(f"failed: {name}")
    print(f"{time.perf_counter() - start:.0f} s, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"{len(tests) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
