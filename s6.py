"""s6.py: one equation, and three ways to compute it.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        the state: what is remembered of x_1 … x_t
    y_t = C_t h_t + D x_t                         the output: what is read from it

This is the selective state space model (S6), the core of Mamba. Δ, B and C are computed from x
itself. So each token decides how much of the past to keep (A < 0: Δ → 0 keeps everything, Δ → ∞
keeps nothing), where to write (B) and what to read (C).

The glossary. The other files use the same names; the examples are those of train_mnist.py.

    symbol    shape       meaning                                                 example
    b         int         sequences in the batch                                  64
    l         int         length: tokens in a sequence                            49 patches
    d         int         channels; each has a state of its own                   128
    n         int         numbers in one channel's state                          16
    x         (b, l, d)   input
    delta Δ   (b, l, d)   step size, ≥ 0: how long the state looks at a token     0.01
    A         (d, n)      < 0: how fast a number of h fades, per unit of Δ        -1, -2, … -16
    B         (b, l, n)   where x_t is written in the state
    C         (b, l, n)   how the state is read
    D         (d,)        skip: what goes from x_t to y_t past the state          1
    h         (b, d, n)   state; h0 before the first token
    y         (b, l, d)   output
    A_bar Ā   (b, d, n)   exp(Δ_t A), in (0, 1]: the part of a state that stays   exp(-0.01) = 0.99
    B_bar B̄   (b, d, n)   how much of x_t is written to each number of the state  0.01 B
    u         (b, l, d)   what B_t multiplies: Δ_t x_t (under zero-order hold: x_t)
    ∂v        as v        gradient of the loss with respect to v, in code grad_v; g is ∂h_t

What is in here. (A scan is a recurrence that runs over a whole sequence.)

    definition()                          the equation as it stands above: the reference
    class S6                              the layer: makes Δ, B, C from x, and scans
    selective_scan(method="sequential")   a compiled loop over time, its gradient derived by hand
    selective_scan(method="parallel")     the sequence in pieces, all of them at once

A CPU takes the sequential scan, unless there is little to compute in a time step and the sequence
is long. A GPU takes the parallel one. The section on it is for a second reading.

Left out: the authors' fused CUDA kernel, which does in one call what takes many here: Δ, this
recurrence, D x, and the gate of block.py. Of the states it writes only every 2,048th to memory, and
for the gradients it computes the others again, as is done here.

Read next: test_scan.py, why you may believe this file; then block.py, what Mamba wraps around it.
Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
sections 2 and 3.
"""
# No `from __future__ import annotations` here: TorchScript reads the annotations of this file.
import math
import warnings
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# --------------------------------------------------------------------------------------------------
# The definition: slow, obvious, and differentiable by autograd. First, where it comes from.
#
# A state space model is a differential equation. For one number h of a state, and an input x that
# both change with time:
#
#     h' = A h + B x                    A < 0: without an input, h fades
#
# Tokens come one after the other. So let token t last for a time Δ, and let x keep the value x_t
# all that time (zero-order hold). Then h tends to the value at which h' = 0, h* = -B x_t / A. With
# B x_t = -A h* the equation reads h' = A (h - h*): in the time Δ the distance h - h* fades by the
# factor exp(ΔA).
#
#     h_t - h* = exp(ΔA) (h_{t-1} - h*)
#     h_t      = exp(ΔA) h_{t-1} + (exp(ΔA) - 1)/A · B x_t         =: Ā h_{t-1} + B̄ x_t
#
# That is exact. For a small step exp(ΔA) - 1 is about ΔA, and so B̄ is about ΔB: Euler's rule, and
# what Mamba computes. Ā stays exact: Euler's 1 + ΔA is negative where ΔA < -1, and where ΔA < -2
# the state would grow without bound. Selection is one more step: each token has its own Δ, B and C.
#
# A channel has n such numbers, each with an A of its own. So it remembers on n time scales at once,
# and C says how they add up to y.

def definition(x, delta, A, B, C, D=None, h0=None, discretization="euler"):
    """The equation, one token after the other: -> y (b, l, d), last state (b, d, n).

    Shapes and ranges as in the glossary. Kept so simple that reading it is enough to check it.
    "zoh" (equation 4 of the paper) is exact while x is held: B̄ = ((exp(ΔA) - 1)/A) B. "euler" is
    what Mamba computes, in training and in use: B̄ = ΔB. (The paper states ZOH alone.) The relative
    error of this B̄ is about |ΔA|/2 while |ΔA| is small; at A = -16, Δ = 0.1 it is too large by a
    factor of 2. On MNIST and on text no difference was measured: see results/README.md.
    """
    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0                # (b, d, n)
    ys = []
    for t in range(x.shape[1]):
        delta_A = delta[:, t, :, None] * A                                     # (b, d, n)
        A_bar = torch.exp(delta_A)                                             # (b, d, n)
        if discretization == "zoh":
            hold = torch.expm1(delta_A) / A                                    # (b, d, n)
        else:
            hold = delta[:, t, :, None]                                        # (b, d, 1)
        B_bar = hold * B[:, t, None, :]                                        # (b, d, n)
        h = A_bar * h + B_bar * x[:, t, :, None]                               # (b, d, n)
        ys.append((h * C[:, t, None, :]).sum(-1))                              # (b, d)
    y = torch.stack(ys, 1)                                                     # (b, l, d)
    if D is not None:
        y = y + D * x
    return y, h


# --------------------------------------------------------------------------------------------------
# Small functions that all layers share.

METHODS = ("auto", "sequential", "parallel")
DISCRETIZATIONS = ("euler", "zoh")
SELECTIONS = ("all", "BC", "none")       # what depends on x: see S6


def full(x):
    """x in float32 at least: decays multiply up over many tokens, and so would their rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def choose(name, value, allowed):
    """-> value. Raises ValueError if it is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def check_sequence(layer, x, d):
    """Raises ValueError unless x is (b, l, d): other shapes might be broadcast in silence."""
    if x.ndim != 3 or x.shape[-1] != d:
        raise ValueError(f"{type(layer).__name__}: x must have shape (b, l, {d}), "
                         f"got {tuple(x.shape)}")


def find_padding(mask, x):
    """Where a mask (b, l) is 0: -> bool (b, l, 1). x is (b, l, …).

    Raises ValueError for another shape or dtype. Masks that are added to scores, 0 and -inf, are
    floats: they would be read the other way round.
    """
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask must have shape (b, l) = {tuple(x.shape[:2])}, "
                         f"got {tuple(mask.shape)}")
    if mask.is_floating_point():
        raise ValueError(f"mask must be of bool or int, True or 1 for a real token, "
                         f"got {mask.dtype}")
    return (mask == 0).unsqueeze(-1)


# --------------------------------------------------------------------------------------------------
# S6, the layer: Algorithm 2 of the paper. Selection is no more than this: B and C are linear in x,
# and Δ is the softplus of a linear map with a bottleneck.
#
# Why it is a scan and no convolution. Unrolled, without D, the recurrence reads
#     y_3 = C_3 (B̄_3 x_3 + Ā_3 B̄_2 x_2 + Ā_3 Ā_2 B̄_1 x_1)
#     y_t = Σ_{s ≤ t} C_t (Π_{r = s+1 … t} Ā_r) B̄_s x_s
# With Δ, B, C the same at every token, the factor before x_s is C Ā^(t-s) B̄. It depends on t - s
# alone, so y is a convolution: that is S4 (rnn.py). With selection all tokens from s to t count.
#
# The same sum is attention without a softmax (Ali, Zimerman & Wolf 2024): C_t is the query, B_s the
# key, x_s the value. In the product of query and key each of the n terms has a decay as a factor,
# which gets smaller with distance. test_scan.py builds the matrix of these products, (l, l), for
# each channel, and multiplies by it. The scan gives the same y and never builds it.
#
# What such a state cannot do: a factor Ā in (0, 1] never changes a sign. So no stack of such layers
# can, at finite precision, follow the parity of a long row of bits, which flips at every 1 (Sarrof,
# Veitsman & Hahn 2024; with Ā in [-1, 1] it can: Grazzi et al. 2024).
#
# Why Δ is called a gate (theorem 1). Let n = 1, A = -1, B = 1, Δ = softplus(p) = ln(1 + exp(p)).
# Under zero-order hold Ā = exp(-Δ) = 1 - σ(p) and B̄ = 1 - Ā = σ(p), where σ is the sigmoid:
#     h_t = (1 - σ(p_t)) h_{t-1} + σ(p_t) x_t
# a gated RNN, a relative of GRU and LSTM. (visualize_delta.py compares Mamba with a GRU.) Under
# Euler x_t has the weight softplus(p_t), which grows without bound. A itself is not made from x:
# Δ multiplies it, and so Ā is selective already.

class S6(nn.Module):
    """x (b, l, d) -> y (b, l, d), state: Δ, B, C from x, and the scan. Official parameter names.

    d         channels
    n         numbers in the state of a channel
    dt_rank   Δ is made through a bottleneck this narrow, since a full matrix would cost d²
              parameters; default ⌈d/32⌉, the authors' ⌈d_model/16⌉ for a block twice as wide inside
    discretization    "euler", as Mamba has it, or "zoh": see `selective_scan`
    selection         "all": Δ, B and C depend on x. For comparisons, "BC": Δ is learned, and the
                      same at every token; "none": so are B and C, as in S4. The shapes stay
    Raises ValueError for another discretization or selection.
    """

    no_decay = ("A_log",)    # weight decay would pull every A towards -1: see parameter_groups

    def __init__(self, d, n=16, dt_rank=None, discretization="euler", selection="all"):
        super().__init__()
        self.n = n
        self.dt_rank = dt_rank or math.ceil(d / 32)
        self.discretization = choose("discretization", discretization, DISCRETIZATIONS)
        self.selection = choose("selection", selection, SELECTIONS)
        self.x_proj = nn.Linear(d, self.dt_rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d)
        # For x = 0, Δ = softplus(bias): at first between 0.001 and 0.1, log-uniform over the
        # channels, as in the authors' code. Number i of a state, with A = -i, then remembers for
        # about 1/(iΔ) tokens: some look far back, some at what is near.
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank ** -0.5, self.dt_rank ** -0.5)
        delta = torch.exp(torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)))
        # softplus(bias) = delta is solved by bias = delta + ln(1 - exp(-delta)).
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))
        # A = -exp(A_log) stays negative whatever the optimizer does. It starts at -1, -2, … -n, the
        # diagonal of the HiPPO matrix ("S4D-Real", section 3.6). S4 takes complex numbers instead.
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(d, 1))      # (d, n)
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x, h0=None, mask=None, *, method="auto"):
        """x (b, l, d), h0 (b, d, n) or None -> y (b, l, d) and the last state (b, d, n).

        mask    (b, l) of bool or int, or None: 1 for a real token. Where it is 0 the token is
                padding, and leaves the state as it was. (PyTorch's key_padding_mask is the other
                way round.)
        Raises ValueError for another width, another mask, and as `selective_scan` does.
        """
        check_sequence(self, x, len(self.D))
        if mask is not None:
            padding = find_padding(mask, x)
            x = x.masked_fill(padding, 0)          # padding may hold anything, even NaN
        delta, A, B, C = self.select(x)
        if mask is not None:
            delta = delta.masked_fill(padding, 0)
        return selective_scan(x, delta, A, B, C, self.D, h0, method=method,
                              discretization=self.discretization, return_state=True)

    def select(self, x):
        """x (…, d) -> Δ (…, d), A (d, n), B and C (…, n): all that a scan of x needs."""
        if self.selection == "none":
            x = torch.ones_like(x)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.n, self.n], -1)
        if self.selection == "BC":
            dt = torch.zeros_like(dt)              # Δ = softplus(bias)
        # Under autocast the maps give bfloat16. From here on Δ is float32: see `full`.
        delta = F.softplus(full(self.dt_proj(dt)))
        return delta, -torch.exp(full(self.A_log)), B, C


# --------------------------------------------------------------------------------------------------
# The public function: checks, dtypes, and the choice of a method.

def selective_scan(x, delta, A, B, C, D=None, h0=None, *, method="auto", discretization="euler",
                   return_state=False):
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t,  y_t = C_t h_t + D x_t  (paper, sections 2 and 3.3).

    x, delta         (b, l, d)   input; step size ≥ 0. Δ_t = 0 leaves the state exactly as it was,
                                 since exp(0 A) = 1 and 0 B_t x_t = 0: this is how padding is masked
    A                (d, n)      < 0
    B, C             (b, l, n)
    D                (d,)        optional, default zero
    h0               (b, d, n)   state before the first token; optional, default zero
    method           "sequential": one loop over l. "parallel": pieces side by side and a prefix
                     scan. "auto": parallel on an accelerator, and on a CPU if a time step is narrow
                     (b·d·n < 2^14) and the sequence has 64 tokens or more
    discretization   "euler": B̄ = ΔB, what Mamba computes. "zoh": B̄ = ((exp(ΔA) - 1)/A) B, which
                     is exact if x is constant during a step
    return_state     also return the state after the last token, (b, d, n): pass it as h0 to go on

    -> y (b, l, d) in x's dtype. The state is accumulated and returned in float32, or in float64 if
    any argument is. Differentiable once, in every tensor argument and through the state, by reverse
    mode: a second time raises a RuntimeError, and so do the transforms of torch.func. A sequence of
    length 1 is the recurrence once, and goes through `definition`, which has all derivatives.
    Raises ValueError for a wrong shape, dtype, device or name: what was expected and what came.
    """
    choose("method", method, METHODS)
    choose("discretization", discretization, DISCRETIZATIONS)
    _check(x, delta, A, B, C, D, h0)
    b, l, d = x.shape
    n = A.shape[1]
    dtypes = [t.dtype for t in (x, delta, A, B, C, D, h0) if t is not None]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    if h0 is None:
        h0 = x.new_zeros(b, d, n)
    inputs = [t.to(dtype) for t in (x, delta, A, B, C)]
    h = h0.to(dtype)

    if l == 1:                           # the recurrence once, as it stands
        y, h = definition(*inputs, h0=h, discretization=discretization)
    else:                                # in the loops the channels are innermost
        inputs[2] = inputs[2].t().contiguous()                                 # A (n, d)
        h = h.transpose(1, 2)                                                  # (b, n, d)
        y, h = _scan(*inputs, h, _pieces(x, n, method), discretization == "zoh")
        h = h.transpose(1, 2)                                                  # (b, d, n)

    if D is not None:
        y = y + D.to(dtype) * x.to(dtype)
    y = y.to(x.dtype)
    if return_state:
        return y, h
    return y


NARROW = 2 ** 14     # numbers per time step; with fewer, a CPU mostly waits for call overhead
WIDE = 2 ** 23       # numbers per launch; with more, a GPU hardly waits for launches any more


def _pieces(x, n, method):
    """How many pieces to cut the sequence into; 1 is the sequential scan."""
    b, l, d = x.shape
    width = max(1, b * d * n)            # numbers that one time step touches
    on_cpu = x.device.type == "cpu"
    # l is tested first: for short sequences torch.export then finds no condition on the batch.
    sequential = on_cpu and (l < 64 or width >= NARROW)
    if method == "sequential" or (method == "auto" and sequential):
        return 1
    if not on_cpu:
        # A GPU waits for kernel launches: about 27 for each token of a piece, and 8 for each of the
        # log₂ k rounds that join k pieces. So pieces are short, about log₂ l tokens. In a large
        # scan the arithmetic takes longer than the launches. There pieces are longer, so that
        # fewer states are kept. (Measured on an H200: results/scan_gpu.csv.)
        shortest = max(8, l.bit_length())
        return max(1, min(-(-l // shortest), WIDE // width))
    # Enough pieces that arithmetic outweighs call overhead, and few enough that their states fit
    # the L2 cache. (6 and not 8: pieces that lie a power of two apart compete for the same
    # cache lines.) Of fewer than 16 tokens each they cost more to join than they save. Two at
    # least, if there are two tokens.
    return max(1, min(2, l), min(6 * NARROW // width, l // 16))


# --------------------------------------------------------------------------------------------------
# The sequential scan: a loop forward, a loop back. The gradient of a recurrence is a recurrence.
#
# Autograd could differentiate `definition`, but it would keep three tensors of the state's size for
# every token (Ā, B̄ and h), and the gradient of each `delta[:, t]` would be a tensor of zeros as
# long as the sequence: O(l²) work. So both loops are written out. What makes a time step fast:
#   - inside the loops a state is (b, n, d): with the channels innermost every pass runs along
#     memory, and the sums over n (for y) and over d (for ∂B and ∂C) are products of a row and a
#     matrix, which read the state once and write next to nothing;
#   - B̄ is never formed, and going forward Ā for one step only, in a buffer that is used again;
#     Euler computes exp(ΔA) as exp2(Δ A/ln 2), which takes half the time on many CPUs;
#   - only every `keep`-th state survives the forward loop. The backward loop computes those between
#     and their Ā again, a chunk at a time. With keep ≈ √l memory holds about 3√l tensors of the
#     state's size instead of 3l, at the price of a second forward pass.
#
# The gradient, for one number of the state. Let ∂v be the derivative of the loss with respect to v,
# for any v. One step of the recurrence is
#
#     h_t = Ā_t h_{t-1} + B_t u_t        y_t = C_t h_t        Ā_t = exp(Δ_t A), u_t = Δ_t x_t
#
# h_t acts on the loss in two ways, through y_t and through h_{t+1}. The chain rule adds the two:
#
#     ∂h_t = C_t ∂y_t + Ā_{t+1} ∂h_{t+1}
#
# This is the recurrence again: it runs from the end, with C in the place of B. All else follows
# from ∂h_t. In a product, the derivative with respect to one factor is ∂h_t times the others:
#
#     ∂u_t = ∂h_t B_t        ∂B_t = ∂h_t u_t        ∂C_t = ∂y_t h_t        ∂Ā_t = ∂h_t h_{t-1}
#
# The derivative of exp(Δ_t A) with respect to Δ_t A is Ā_t, so ∂(Δ_t A) = Ā_t ∂h_t h_{t-1} =: q_t.
# Hence Ā gives Δ_t the gradient q_t A, and ∂A is the sum of q_t Δ_t over t. In the end, by u_t =
# Δ_t x_t, ∂x_t = ∂u_t Δ_t, and ∂Δ_t gets ∂u_t x_t besides. Where states share a value, it gets the
# sum of their gradients: Δ_t and u_t over the n numbers, B_t and C_t over the channels, A over the
# sequences.

def script(function):
    """Compile with TorchScript, or return the function as it is where TorchScript does not work.

    TorchScript is deprecated, and unsupported on Python ≥ 3.14. Only that warning is silenced.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
        try:
            return torch.jit.script(function)
        except Exception:        # which one depends on why: no source, no support, a new Python
            return function


@script
def _forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Optional[Tensor], h: Tensor,
             keep: int, zoh: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """Scan from state h: -> y (b, l, d), every keep-th state (l/keep, b, n, d), last state.

    u (b, l, d) is Δx, or x itself if zoh; delta (b, l, d); A (n, d); B, C (b, l, n); h (b, n, d).
    Without C no output is computed, and y is empty.
    """
    b, l, d = u.shape
    n = A.shape[0]
    h = h.clone(memory_format=torch.contiguous_format)     # the loop overwrites it
    A_2 = A / math.log(2.0)
    A_bar = torch.empty_like(h)
    kept = torch.empty([(l + keep - 1) // keep, b, n, d], dtype=h.dtype, device=h.device)
    # Time comes first in y, so that the matrix products below write to contiguous memory.
    y = torch.empty([l if C is not None else 0, b, 1, d], dtype=h.dtype, device=h.device)

    # One view for each token: to take them all at once is quicker than to index in the loop.
    u_t = u.split(1, 1)                                                        # (b, 1, d)
    delta_t = delta.split(1, 1)                                                # (b, 1, d)
    B_t = B.unsqueeze(3).unbind(1)                                             # (b, n, 1)
    # Without C nothing reads C_t; TorchScript wants something of the same type.
    C_t = C.split(1, 1) if C is not None else u_t                              # (b, 1, n)
    y_t = y.unbind(0)                                                          # (b, 1, d)
    kept_t = kept.unbind(0)                                                    # (b, n, d)

    for t in range(l):
        if t % keep == 0:
            kept_t[t // keep].copy_(h)
        torch.mul(delta_t[t], A if zoh else A_2, out=A_bar)                    # (b, n, d)
        if zoh:
            # h_t = h_{t-1} + (exp(ΔA) - 1)(h_{t-1} + B x / A): the state relaxes towards -B x / A
            h.addcmul_(A_bar.expm1_(), torch.addcdiv(h, B_t[t] * u_t[t], A))
        else:
            # h_t = exp(Δ_t A) h_{t-1} + B_t (Δ_t x_t)
            h.mul_(A_bar.exp2_()).addcmul_(B_t[t], u_t[t])
        if C is not None:
            torch.bmm(C_t[t], h, out=y_t[t])                                   # y_t = Σ_n C_t h_t
    return y.squeeze(2).transpose(0, 1), kept, h


def _backward(grad_y: Tensor, g: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
              kept: Tensor, keep: int, zoh: bool
              ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of `_forward`: -> ∂ of u, Δ (through Ā alone), A, B, C, and the first state.

        ∂h_t = C_t ∂y_t + Ā_{t+1} ∂h_{t+1}        q_t = Ā_t ∂h_t h_{t-1}

    grad_y (b, l, d) is ∂y. g (b, n, d) comes as the gradient of the last state. In each step it is
    overwritten twice: with C_t ∂y_t added it is ∂h_t, and times Ā_t it is what the step before
    needs. The recomputed states are overwritten, too: h[i] ends as q_t.
    """
    b, l, d = u.shape
    n = A.shape[0]
    g = g.clone(memory_format=torch.contiguous_format)
    A_2 = A / math.log(2.0)
    grad_A = torch.zeros_like(g)
    grad_u = torch.empty([l, b, 1, d], dtype=g.dtype, device=g.device)
    grad_delta = torch.empty_like(grad_u)
    grad_B = torch.empty([l, b, 1, n], dtype=g.dtype, device=g.device)
    grad_C = torch.empty_like(grad_B)
    ones = torch.ones([1, 1, n], dtype=g.dtype, device=g.device).expand(b, 1, n)
    # One chunk, recomputed: h[i] is the state before its token i, h[i + 1] the one after it.
    A_bars = torch.empty([keep, b, n, d], dtype=g.dtype, device=g.device).unbind(0)
    states = torch.empty([keep + 1, b, n, d], dtype=g.dtype, device=g.device)
    h = states.unbind(0)                                                       # (b, n, d)
    # Transposed views of the same memory: they show what the loops write to the states and to g.
    h_rows = states.transpose(2, 3).unbind(0)                                  # (b, d, n)
    g_rows = g.transpose(1, 2)                                                 # (b, d, n)

    u_t = u.split(1, 1)                                                        # (b, 1, d)
    delta_t = delta.split(1, 1)                                                # (b, 1, d)
    grad_y_t = grad_y.split(1, 1)                                              # (b, 1, d)
    B_t = B.unsqueeze(3).unbind(1)                                             # (b, n, 1)
    C_t = C.unsqueeze(3).unbind(1)                                             # (b, n, 1)
    B_row = B.split(1, 1)                                                      # (b, 1, n)
    grad_u_t = grad_u.unbind(0)                                                # (b, 1, d)
    grad_delta_t = grad_delta.unbind(0)                                        # (b, 1, d)
    grad_B_t = grad_B.unbind(0)                                                # (b, 1, n)
    grad_C_t = grad_C.unbind(0)                                                # (b, 1, n)
    kept_t = kept.unbind(0)                                                    # (b, n, d)

    for chunk in range(len(kept_t) - 1, -1, -1):
        start = chunk * keep
        stop = min(start + keep, l)
        h[0].copy_(kept_t[chunk])
        for t in range(start, stop):                                           # forward again
            i = t - start
            torch.mul(delta_t[t], A if zoh else A_2, out=A_bars[i])
            if zoh:                      # A_bars[i] is Ā - 1 here
                torch.addcdiv(h[i], B_t[t] * u_t[t], A, out=h[i + 1])
                h[i + 1].mul_(A_bars[i].expm1_()).add_(h[i])
            else:
                torch.mul(h[i], A_bars[i].exp2_(), out=h[i + 1])
                h[i + 1].addcmul_(B_t[t], u_t[t])
            torch.bmm(grad_y_t[t], h_rows[i + 1], out=grad_C_t[t])             # ∂C_t   (b, 1, n)
        for t in range(stop - 1, start - 1, -1):                               # and back
            i = t - start
            g.addcmul_(C_t[t], grad_y_t[t])                                    # ∂h_t   (b, n, d)
            if zoh:
                r = _hold_backward(A_bars[i], h[i], g, u_t[t], B_t[t], A, grad_A)
                torch.bmm(u_t[t], r.transpose(1, 2), out=grad_B_t[t])
                torch.bmm(B_row[t], r, out=grad_u_t[t])
            else:
                torch.bmm(u_t[t], g_rows, out=grad_B_t[t])                     # ∂B_t   (b, 1, n)
                torch.bmm(B_row[t], g, out=grad_u_t[t])                        # ∂u_t   (b, 1, d)
            g.mul_(A_bars[i])                                                  # Ā_t ∂h_t
            q = h[i].mul_(g)                                                   # q_t    (b, n, d)
            grad_A.addcmul_(q, delta_t[t])
            torch.bmm(ones, q.mul_(A), out=grad_delta_t[t])                    # q_t A  (b, 1, d)
    return (grad_u.squeeze(2).transpose(0, 1), grad_delta.squeeze(2).transpose(0, 1),
            grad_A.sum(0), grad_B.squeeze(2).transpose(0, 1), grad_C.squeeze(2).transpose(0, 1), g)


@script
def _hold_backward(A_bar: Tensor, h: Tensor, g: Tensor, x: Tensor, B: Tensor, A: Tensor,
                   grad_A: Tensor) -> Tensor:
    """What zero-order hold adds to a step of `_backward`: -> ∂(B_t x_t), (b, n, d).

    With w = B_t x_t / A the step is h_t = Ā (h_{t-1} + w) - w. So

        ∂(B_t x_t) = (Ā - 1) ∂h_t / A =: r          ∂A gets -r w, since w is divided by A

    Three arguments are overwritten: -r w is added to grad_A; A_bar comes as Ā - 1 and becomes Ā; h
    comes as h_{t-1} and becomes h_{t-1} + w. With these `_backward` goes on as for Euler.
    """
    w = B * x / A
    r = A_bar * g / A
    grad_A.addcmul_(r, w, value=-1.0)
    h.add_(w)
    A_bar.add_(1.0)
    return r


_backward = script(_backward)            # down here: it calls _hold_backward, compiled first


class _Scan(torch.autograd.Function):
    """The scan in k pieces, with its gradient. Inside, A is (n, d) and states are (b, n, d).

    k = 1 is the sequential scan: then `_fold` and `_unfold` give back what they get, as
    `_start_states` does with h0 and `_end_gradients` with grad_h. The inputs are kept for the
    gradient, and every `keep`-th state.
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h0, k, zoh):
        ctx.k = k
        ctx.zoh = zoh
        inputs = (x, delta, A, B, C)
        u = x if zoh else delta * x
        with torch.autocast(x.device.type, enabled=False):   # the state stays in float32
            u, delta, B, C = _fold([u, delta, B, C], k)
            h0 = _start_states(u, delta, A, B, h0, k, zoh)
            # Of T states keep every √T-th. With several pieces, at most every 12th: they are short
            # and many, and √T states of each would add up.
            length = u.shape[1]
            ctx.keep = max(1, round(math.sqrt(length)))
            if k > 1:
                ctx.keep = max(ctx.keep, min(12, length))
            y, kept, h = _forward(u, delta, A, B, C, h0, ctx.keep, zoh)
        ctx.save_for_backward(*inputs, kept)
        y, = _unfold([y], k, x.shape[1])
        return y, h[k - 1::k].contiguous()       # the last state is that of the last piece

    @staticmethod
    def backward(ctx, grad_y, grad_h):
        if torch.is_grad_enabled():      # the loops below would be taken for constants
            raise RuntimeError("selective_scan has a first derivative only: create_graph=True "
                               "cannot differentiate its gradient")
        x, delta, A, B, C, kept = ctx.saved_tensors
        u = x if ctx.zoh else delta * x
        with torch.autocast(x.device.type, enabled=False):
            u, folded_delta, B, C, grad_y = _fold([u, delta, B, C, grad_y], ctx.k)
            g = _end_gradients(grad_y, folded_delta, A, C, grad_h, ctx.k)
            grad_u, grad_delta, grad_A, grad_B, grad_C, g = _backward(
                grad_y, g, u, folded_delta, A, B, C, kept, ctx.keep, ctx.zoh)
        grad_u, grad_delta, grad_B, grad_C = _unfold(
            [grad_u, grad_delta, grad_B, grad_C], ctx.k, x.shape[1])
        grad_x = grad_u
        if not ctx.zoh:                  # u = Δ x, so Δ has a second gradient
            grad_x = grad_u * delta
            grad_delta = torch.addcmul(grad_delta, grad_u, x)
        # h0 is the start of the first piece.
        return grad_x, grad_delta, grad_A, grad_B, grad_C, g[::ctx.k], None, None


# torch.compile would trace the loops step by step, for minutes. It skips them instead.
_scan = torch.compiler.disable(_Scan.apply)


# --------------------------------------------------------------------------------------------------
# The parallel scan: the same loops, over all pieces of the sequence at once. Skip this on a first
# reading: it gives the same numbers, on a GPU in far fewer steps.
#
# l tokens are cut into k pieces of T = l/k, which stand side by side in the batch: T steps instead
# of l, each k times as wide. Only the state at which a piece starts is missing. A piece maps it to
# the state at its end by h ↦ a h + s, with a = exp(A ΣΔ), and s the state that the piece reaches
# from zero; and such maps compose associatively:
#
#     (a₂, s₂) ∘ (a₁, s₁) = (a₂ a₁, a₂ s₁ + s₂)
#
# so log₂ k rounds over the pairs give all the starts: a prefix scan, see `_chain`. Then the pieces
# are scanned again, from there. That is twice the work in far fewer steps, and up to √(k l) states
# to keep instead of √l.

def _fold(tensors, k):
    """(b, l, …) -> (b·k, T, …) each, T = ⌈l/k⌉, zeros at the end: Δ = 0 leaves a state alone."""
    if k == 1:
        return tensors
    folded = []
    for t in tensors:
        length = -(-t.shape[1] // k) * k
        if length != t.shape[1]:
            t = F.pad(t, (0, 0, 0, length - t.shape[1]))
        folded.append(t.unflatten(1, (k, -1)).flatten(0, 1))
    return folded


def _unfold(tensors, k, l):
    """(b·k, T, …) -> (b, l, …) each: the inverse of `_fold`."""
    if k == 1:
        return tensors
    return [t.unflatten(0, (-1, k)).flatten(1, 2)[:, :l] for t in tensors]


def _chain(a, s, first):
    """What each of k pieces starts from, (b, k, n, d), if the first one starts from `first`.

    Piece j maps what it starts from, h, to a[:, j] h + s[:, j], where the next one starts; a and s
    are (b, k, n, d), first (b, n, d). The last piece has no successor, so its pair is not needed.
    """
    # Put the constant map h ↦ 0 h + first in front. The start of piece j is then the composition of
    # the first j + 1 maps, applied to anything, say to zero: so only its s is needed.
    s = torch.cat([first[:, None], s[:, :-1]], 1)
    a = torch.cat([torch.zeros_like(a[:, :1]), a[:, :-1]], 1)
    hop = 1
    while hop < s.shape[1]:
        # Entry j composes the `hop` maps that end at j, and after each round twice as many: with
        # four pieces, j - 1 and j after the first round, all four after the second (Hillis &
        # Steele 1986).
        s = torch.cat([s[:, :hop], torch.addcmul(s[:, hop:], a[:, hop:], s[:, :-hop])], 1)
        a = torch.cat([a[:, :hop], a[:, hop:] * a[:, :-hop]], 1)
        hop *= 2
    return s


def _decays(delta, A, k):
    """a = exp(A ΣΔ) of each piece: delta (b·k, T, d) -> (b, k, n, d)."""
    return torch.exp(delta.sum(1, keepdim=True) * A).unflatten(0, (-1, k))


def _start_states(u, delta, A, B, h0, k, zoh):
    """The state before each piece, (b·k, n, d); h0 (b, n, d) is that before the first.

    u, delta (b·k, T, d), A (n, d), B (b·k, T, n)
    """
    if k == 1:
        return h0
    zero = u.new_zeros(u.shape[0], *A.shape)
    _, _, s = _forward(u, delta, A, B, None, zero, u.shape[1], zoh)
    return _chain(_decays(delta, A, k), s.unflatten(0, (-1, k)), h0).flatten(0, 1)


@script
def _send_back(grad_y: Tensor, delta: Tensor, A: Tensor, C: Tensor) -> Tensor:
    """The gradient of the state before a piece, from this piece's outputs alone: (b·k, n, d)."""
    b, l, d = grad_y.shape
    g = torch.zeros([b, A.shape[0], d], dtype=A.dtype, device=A.device)
    C_t = C.unsqueeze(3).unbind(1)                                             # (b, n, 1)
    grad_y_t = grad_y.split(1, 1)                                              # (b, 1, d)
    delta_t = delta.split(1, 1)                                                # (b, 1, d)
    A_2 = A / math.log(2.0)
    for t in range(l - 1, -1, -1):       # g = Ā_t (g + C_t ∂y_t)
        g.addcmul_(C_t[t], grad_y_t[t]).mul_((delta_t[t] * A_2).exp2_())
    return g


def _end_gradients(grad_y, delta, A, C, grad_h, k):
    """The gradient of the state after each piece, (b·k, n, d); grad_h (b, n, d): after the last.

    Backwards, a piece maps the gradient of the state after it, g, to that of the state before it,
    a g + s, with the same a as forwards. So the pieces are chained the same way, from the last one.
    """
    if k == 1:
        return grad_h
    s = _send_back(grad_y, delta, A, C).unflatten(0, (-1, k))
    return _chain(_decays(delta, A, k).flip(1), s.flip(1), grad_h).flip(1).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# Checks: a wrong shape must raise an error, and not be broadcast in silence.

def _check(x, delta, A, B, C, D, h0):
    """Raise a ValueError that names the argument, what was expected and what came."""
    named = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "h0": h0}
    for name, t in named.items():
        if t is None and name in ("D", "h0"):
            continue
        if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
            kind = getattr(t, "dtype", type(t).__name__)
            raise ValueError(f"selective_scan: {name} must be a tensor of a real floating dtype, "
                             f"got {kind}")
        if t.device != x.device:
            raise ValueError(f"selective_scan: {name} must be on {x.device} like x, got {t.device}")
    if x.ndim != 3:
        raise ValueError(f"selective_scan: x must have shape (b, l, d), got {tuple(x.shape)}")
    b, l, d = x.shape
    if A.ndim != 2 or A.shape[0] != d:
        raise ValueError(f"selective_scan: A must have shape (d, n) = ({d}, n), "
                         f"got {tuple(A.shape)}")
    n = A.shape[1]
    for name, letters, shape in (("delta", "(b, l, d)", (b, l, d)), ("B", "(b, l, n)", (b, l, n)),
                                 ("C", "(b, l, n)", (b, l, n)), ("D", "(d,)", (d,)),
                                 ("h0", "(b, d, n)", (b, d, n))):
        t = named[name]
        if t is not None and t.shape != shape:
            raise ValueError(f"selective_scan: {name} must have shape {letters} = {shape}, "
                             f"got {tuple(t.shape)}")
