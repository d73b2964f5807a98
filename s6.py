"""s6.py: one equation, and three ways to compute it.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        the state: what is remembered of x_1 … x_t
    y_t = C_t h_t + D x_t                         the output: what is read from it

A scan is a recurrence that runs over a whole sequence. This one is the selective scan (S6) of
Mamba: Δ, B and C are computed from x itself, so each token decides how much of the past to keep
(A < 0: Δ → 0 keeps everything, Δ → ∞ keeps nothing), where to write (B) and what to read (C).

    definition()                          the equation as it stands here: the reference for the rest
    class S6                              Algorithm 2 of the paper: makes Δ, B, C from x, and scans
    selective_scan(method="sequential")   a compiled loop over time, its gradient derived by hand
    selective_scan(method="parallel")     pieces of the sequence side by side, and a prefix scan

A CPU takes the sequential scan, unless a time step is narrow (b·d·n < 2^14) and the sequence has 64
tokens or more. A GPU takes the parallel one. It has its own section: skip it on a first reading.

Left out: the authors' fused CUDA kernel. In one launch it computes Δ = softplus(… + bias), this
recurrence, D x and the gate y · SiLU(z) of block.py. Its x and Δ lie as (b, d, l). Of the states
only every 2,048th leaves the GPU's fast on-chip memory; a second launch, for the gradients, starts
from these and computes the others again.

`python s6.py` measures time and memory over length, in half a minute: a table,
results/scan_scaling.csv and figures/scan_scaling.png.

Read next: test_scan.py, why you may believe this file; then block.py, what Mamba wraps around it.
Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
sections 2 and 3.

The glossary. The other files use the same names; the examples are those of train_mnist.py.

    symbol    shape       meaning                                                 example
    b         int         sequences in the batch                                  64
    l         int         length: tokens in a sequence                            49 patches
    d         int         channels; each has a state of its own                   128
    n         int         numbers in one channel's state                          16
    x         (b, l, d)   input                                                   a feature
    delta Δ   (b, l, d)   step size, ≥ 0: how long the state looks at a token     0.01
    A         (d, n)      < 0: how fast a number is forgotten, per unit of Δ      -1, -2, … -16
    B         (b, l, n)   where x_t is written in the state
    C         (b, l, n)   how the state is read
    D         (d,)        skip: what goes from x_t to y_t past the state          1
    h         (b, d, n)   state; h0 before the first token
    y         (b, l, d)   output
    A_bar Ā   (b, d, n)   exp(Δ_t A), in (0, 1]: the part of a state that stays   exp(-0.01) = 0.99
    B_bar B̄   (b, d, n)   how much of x_t is written to each number of the state  0.01 B
    u         (b, l, d)   what B_t spreads over the state: Δ_t x_t (in the loops of zoh: x_t)
    ∂v        as v        gradient of the loss with respect to v, in code grad_v; g is ∂h_t
"""
# No `from __future__ import annotations` here: TorchScript reads the annotations of this file.
import contextlib
import csv
import io
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
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
    factor of 2. Models that are trained either way end alike: see results/README.md.
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
# S6, the layer: Algorithm 2 of the paper. Selection is no more than this: B and C are linear in x,
# and Δ is the softplus of a linear map with a bottleneck.
#
# Why it is a scan and no convolution. Unrolled, without D, the recurrence reads
#     y_3 = C_3 (B̄_3 x_3 + Ā_3 B̄_2 x_2 + Ā_3 Ā_2 B̄_1 x_1)
#     y_t = Σ_{s ≤ t} C_t (Π_{r = s+1 … t} Ā_r) B̄_s x_s
# With Δ, B, C the same at every token, the factor before x_s is C Ā^(t-s) B̄. It depends on t - s
# alone, so y is a convolution: that is S4 (rnn.py). With selection all tokens from s to t count.
#
# The same sum is attention without a softmax: C_t is the query, B_s the key, x_s the value, and the
# product of decays a mask that fades with distance. test_scan.py builds that matrix, (l, l), and
# multiplies by it. The scan gives the same y and never builds it. (Mamba-2 starts from this view.)
#
# What such a state cannot do: a factor Ā in (0, 1] never changes a sign. So a layer of it cannot
# follow the parity of a long row of bits, which flips at every 1 (Grazzi et al. 2024, "Unlocking
# State-Tracking in Linear RNNs Through Negative Eigenvalues").
#
# Why Δ is called a gate (theorem 1). Let n = 1, A = -1, B = 1, Δ = softplus(z) = ln(1 + exp(z)).
# Under zero-order hold Ā = exp(-Δ) = 1 - σ(z) and B̄ = 1 - Ā = σ(z), where σ is the sigmoid:
#     h_t = (1 - σ(z_t)) h_{t-1} + σ(z_t) x_t
# a gated RNN, a relative of GRU and LSTM. Under Euler x_t has the weight softplus(z) instead, which
# grows without bound. A itself is not made from x: Δ multiplies it, and so Ā is selective already.

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
        with torch.no_grad():            # so that softplus(bias) = delta
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))
        # A = -exp(A_log) stays negative whatever the optimizer does. It starts at -1, -2, … -n, the
        # diagonal of the HiPPO matrix ("S4D-Real", section 3.6). S4 takes complex numbers instead.
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(d, 1))      # (d, n)
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x, h0=None, mask=None, *, method="auto"):
        """x (b, l, d), h0 (b, d, n) or None -> y (b, l, d) and the last state (b, d, n).

        With a state x may also be one token, (b, d): -> y (b, d) and the next state.

        mask    (b, l) or None: where it is 0 the token is padding, and leaves the state as it was
        Raises ValueError for another width, another mask, and as `selective_scan` does.
        """
        choose("method", method, METHODS)
        check_sequence(self, x, len(self.D), mask, h0)
        if x.ndim == 2:
            return self._one_token(x, h0)
        if mask is not None:
            padding = (mask == 0).unsqueeze(-1)
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
        # Under autocast the maps give bfloat16. Δ is made in float32 from there on: the decays
        # exp(ΔA) of many tokens multiply up, and so would their rounding.
        delta = F.softplus(full(self.dt_proj(dt)))
        return delta, -torch.exp(full(self.A_log)), B, C

    def _one_token(self, x, h):
        """The recurrence once: x (b, d), h (b, d, n) -> y (b, d), and the next h."""
        if h.shape != (*x.shape, self.n):
            raise ValueError(f"S6: the state must have shape {(*x.shape, self.n)}, got "
                             f"{tuple(h.shape)}")
        delta, A, B, C = self.select(x)                              # B, C: (b, n)
        delta_A = delta.unsqueeze(-1) * A                            # (b, d, n)
        if self.discretization == "zoh":
            hold = torch.expm1(delta_A) / A                          # (b, d, n)
        else:
            hold = delta.unsqueeze(-1)                               # (b, d, 1)
        held = hold * x.unsqueeze(-1)
        h = torch.exp(delta_A) * h + held * B.unsqueeze(1)           # (b, d, n)
        y = (h * C.unsqueeze(1)).sum(-1)                             # (b, d)
        return (y + full(self.D) * full(x)).to(x.dtype), h


# --------------------------------------------------------------------------------------------------
# The public function: checks, dtypes, and the choice of a method.

METHODS = ("auto", "sequential", "parallel")
DISCRETIZATIONS = ("euler", "zoh")
SELECTIONS = ("all", "BC", "none")       # what depends on x: see S6


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
    any argument is. A scan of length 1 is the recurrent step. Differentiable once, in every tensor
    argument and through the state, by reverse mode: a second time raises a RuntimeError, and so do
    the transforms of torch.func.
    Raises ValueError for a wrong shape, dtype, device or name: what was expected and what came.
    """
    _check(x, delta, A, B, C, D, h0, method, discretization)
    b, _, d = x.shape
    n = A.shape[1]
    dtypes = [t.dtype for t in (x, delta, A, B, C, D, h0) if t is not None]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32

    # The loops have states (b, n, d), with the channels innermost.
    if h0 is None:
        h = x.new_zeros(b, n, d, dtype=dtype)
    else:
        h = h0.to(dtype).transpose(1, 2)
    inputs = [t.to(dtype) for t in (x, delta, A.t().contiguous(), B, C)]
    y, h = _scan(*inputs, h, _pieces(x, n, method), discretization == "zoh")

    if D is not None:
        y = y + D.to(dtype) * x.to(dtype)
    y = y.to(x.dtype)
    if return_state:
        return y, h.transpose(1, 2)
    return y


NARROW = 2 ** 14     # numbers per time step; with fewer, a CPU mostly waits for call overhead
WIDE = 2 ** 23       # numbers per launch; with more, a GPU hardly waits for launches any more


def _pieces(x, n, method):
    """How many pieces to cut the sequence into; 1 is the sequential scan."""
    b, l, d = x.shape
    width = max(1, b * d * n)            # numbers that one time step touches
    on_cpu = x.device.type == "cpu"
    if method == "auto":
        # l first: then what torch.export makes for short sequences works for any batch.
        method = "sequential" if on_cpu and (l < 64 or width >= NARROW) else "parallel"
    if method == "sequential":
        return 1
    if on_cpu:
        # Enough pieces that arithmetic outweighs call overhead, and few enough that their states
        # fit the L2 cache. (6 and not 8: with a power of two, pieces often lie a power of two apart
        # in memory, and compete for the same lines of the cache.)
        most = 6 * NARROW // width
        # Of fewer than 16 tokens each they cost more to join than they save.
        pieces = min(most, l // 16)
        return max(pieces, min(2, l))    # two at least, if there are two tokens
    return _short_pieces(l, width)


def _short_pieces(l, width):
    """For a GPU: pieces of about log₂ l tokens, 8 at least.

    There a call costs a launch, however narrow it is. So the time of a small scan is that of its
    launches: about 27 for each token of a piece, 8 for each of the log₂ k rounds that join the
    pieces, and 40 besides. Short pieces keep them few: forward and backward take 252 for 49 tokens,
    and 595 for 65,536. In a large scan the launches do not matter. There the pieces are longer, so
    that fewer states are kept: no more of them than make a launch work on 2^23 numbers. (Measured
    on an H200: results/scan_gpu.csv.)
    """
    shortest = max(8, l.bit_length())
    return min(-(-l // shortest), max(1, WIDE // width))


# --------------------------------------------------------------------------------------------------
# The sequential scan: a loop forward, a loop back. The gradient of a recurrence is a recurrence.
#
# Autograd could differentiate `definition`, but it would keep three tensors of the state's size for
# every token (Ā, B̄ and h), and the gradient of each `delta[:, t]` would be a tensor of zeros as
# long as the sequence: O(l²) work. So both loops are written out. A time step is a handful of
# passes over the state, and these are what make the passes few and fast:
#   - inside the loops a state is (b, n, d): with the channels innermost every pass runs along
#     memory, and the sums over n (for y) and over d (for ∂B and ∂C) are products of a row and a
#     matrix, which read the state once and write next to nothing;
#   - B̄ is never formed, and going forward Ā for one step only, in a buffer that is used again;
#     Euler computes exp(ΔA) as exp2(Δ A/ln 2), which takes half the time on many CPUs;
#   - only every `keep`-th state survives the forward loop. The backward loop computes those between
#     and their Ā again, a chunk at a time. With keep ≈ √l that is √l states to keep and 2√l to hold
#     for a while instead of l, for one more forward pass.
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
# Δ_t x_t, ∂x_t = ∂u_t Δ_t, and ∂Δ_t gets ∂u_t x_t besides. With many channels and numbers, ∂u_t and
# q_t A are summed over the n numbers that share them, ∂B_t and ∂C_t over the d channels, and ∂A
# over the sequences.

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
    h = h.clone(memory_format=torch.contiguous_format)
    A_bar, A_2 = torch.empty_like(h), A / math.log(2.0)
    kept = torch.empty([(l + keep - 1) // keep, b, n, d], dtype=h.dtype, device=h.device)
    # Time comes first in y, so that the matrix products below write to contiguous memory.
    y = torch.empty([l if C is not None else 0, b, 1, d], dtype=h.dtype, device=h.device)
    u_t, delta_t = u.split(1, 1), delta.split(1, 1)                            # (b, 1, d)
    B_t = B.unsqueeze(3).unbind(1)                                             # (b, n, 1)
    # Without C nothing reads C_t; TorchScript wants something of the same type.
    C_t = C.split(1, 1) if C is not None else u_t                              # (b, 1, n)
    y_t, kept_t = y.unbind(0), kept.unbind(0)                       # (b, 1, d), (b, n, d)
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


@script
def _hold_backward(A_bar: Tensor, h: Tensor, g: Tensor, x: Tensor, B: Tensor, A: Tensor,
                   grad_A: Tensor) -> Tensor:
    """What zero-order hold adds to a step of `_backward`: -> ∂(B_t x_t), (b, n, d).

    With w = B_t x_t / A the step is h_t = Ā (h_{t-1} + w) - w. So

        ∂(B_t x_t) = (Ā - 1) ∂h_t / A =: r          ∂A gets -r w, since w is divided by A

    `_backward` goes on as for Euler, with h_{t-1} + w in place of h_{t-1}: so that is what h holds
    in the end. A_bar, which came as Ā - 1, then holds Ā.
    """
    w = B * x / A
    r = A_bar * g / A
    grad_A.addcmul_(r, w, value=-1.0)
    h.add_(w)
    A_bar.add_(1.0)
    return r


@script
def _backward(grad_y: Tensor, g: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
              kept: Tensor, keep: int, zoh: bool
              ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of `_forward`: -> gradients of u, Δ (through Ā alone), A, B, C, and first state.

    grad_y (b, l, d) is ∂y; g (b, n, d) comes as the gradient of the last state, and becomes ∂h_t:
        ∂h_t = C_t ∂y_t + Ā_{t+1} ∂h_{t+1}        q_t = Ā_t ∂h_t h_{t-1}
    """
    b, l, d = u.shape
    n = A.shape[0]
    g = g.clone(memory_format=torch.contiguous_format)
    grad_A, A_2 = torch.zeros_like(g), A / math.log(2.0)
    grad_u = torch.empty([l, b, 1, d], dtype=g.dtype, device=g.device)
    grad_delta = torch.empty_like(grad_u)
    grad_B = torch.empty([l, b, 1, n], dtype=g.dtype, device=g.device)
    grad_C = torch.empty_like(grad_B)
    grad_u_t, grad_delta_t = grad_u.unbind(0), grad_delta.unbind(0)            # (b, 1, d)
    grad_B_t, grad_C_t = grad_B.unbind(0), grad_C.unbind(0)                    # (b, 1, n)
    u_t, delta_t, grad_y_t = u.split(1, 1), delta.split(1, 1), grad_y.split(1, 1)      # (b, 1, d)
    B_t, C_t = B.unsqueeze(3).unbind(1), C.unsqueeze(3).unbind(1)              # (b, n, 1)
    B_row = B.split(1, 1)                                                      # (b, 1, n)
    ones = torch.ones([1, 1, n], dtype=g.dtype, device=g.device).expand(b, 1, n)
    # One chunk, recomputed: h[i + 1] is the state after its token i.
    A_bars = torch.empty([keep, b, n, d], dtype=g.dtype, device=g.device).unbind(0)
    states = torch.empty([keep + 1, b, n, d], dtype=g.dtype, device=g.device)
    h = states.unbind(0)                                                       # (b, n, d)
    # Transposed views of the same memory: they show what the loops write to the states and to g.
    h_rows, g_rows = states.transpose(2, 3).unbind(0), g.transpose(1, 2)       # (b, d, n)
    kept_t = kept.unbind(0)
    for chunk in range(len(kept_t) - 1, -1, -1):
        start, stop = chunk * keep, min(chunk * keep + keep, l)
        h[0].copy_(kept_t[chunk])
        for t in range(start, stop):                                           # forward again
            i = t - start
            torch.mul(delta_t[t], A if zoh else A_2, out=A_bars[i])
            if zoh:
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
            q = h[i].mul_(g.mul_(A_bars[i]))             # q_t; and g becomes Ā_t ∂h_t
            grad_A.addcmul_(q, delta_t[t])
            torch.bmm(ones, q.mul_(A), out=grad_delta_t[t])                    # q_t A  (b, 1, d)
    return (grad_u.squeeze(2).transpose(0, 1), grad_delta.squeeze(2).transpose(0, 1),
            grad_A.sum(0), grad_B.squeeze(2).transpose(0, 1), grad_C.squeeze(2).transpose(0, 1), g)


class _Scan(torch.autograd.Function):
    """The scan in k pieces, with its gradient. k = 1 is the sequential scan: skip any `if k > 1`.

    It keeps its inputs, and every `keep`-th state. Inside, A is (n, d) and states are (b, n, d).
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h0, k, zoh):
        ctx.k, ctx.zoh = k, zoh
        inputs = (x, delta, A, B, C)
        u = x if zoh else delta * x
        with torch.autocast(x.device.type, enabled=False):   # the state stays in float32
            if k > 1:
                u, delta, B, C = (_fold(t, k) for t in (u, delta, B, C))
                h0 = _start_states(u, delta, A, B, h0, k, zoh)
            # Keep every √T-th of the T states. Of pieces no more than every 12th: they are short
            # and many, and √T states of each would add up.
            ctx.keep = max(1, round(math.sqrt(u.shape[1])))
            if k > 1:
                ctx.keep = max(ctx.keep, min(12, u.shape[1]))
            y, kept, h = _forward(u, delta, A, B, C, h0, ctx.keep, zoh)
            if k > 1:                    # the last state is that of the last piece
                y, h = _unfold(y, k, x.shape[1]), h[k - 1::k].contiguous()
        ctx.save_for_backward(*inputs, kept)
        return y, h

    @staticmethod
    def backward(ctx, grad_y, grad_h):
        if torch.is_grad_enabled():      # the loops below would be taken for constants
            raise RuntimeError("selective_scan has a first derivative only: create_graph=True "
                               "cannot differentiate its gradient")
        x, delta, A, B, C, kept = ctx.saved_tensors
        l, k, zoh = x.shape[1], ctx.k, ctx.zoh
        u, step, g = x if zoh else delta * x, delta, grad_h
        with torch.autocast(x.device.type, enabled=False):
            if k > 1:
                u, step, B, C, grad_y = (_fold(t, k) for t in (u, delta, B, C, grad_y))
                g = _end_gradients(grad_y, step, A, C, grad_h, k)
            *grads, g = _backward(grad_y, g, u, step, A, B, C, kept, ctx.keep, zoh)
        grad_u, grad_delta, grad_A, grad_B, grad_C = grads
        if k > 1:                        # h0 is the start of the first piece
            grad_u, grad_delta, grad_B, grad_C = (
                _unfold(t, k, l) for t in (grad_u, grad_delta, grad_B, grad_C))
            g = g[::k]
        if not zoh:                      # u = Δ x: the gradient of Δ has a second term
            grad_u, grad_delta = grad_u * delta, torch.addcmul(grad_delta, grad_u, x)
        return grad_u, grad_delta, grad_A, grad_B, grad_C, g, None, None


# torch.compile would trace the loops step by step, for minutes. It goes around them instead.
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
# so a prefix scan over the k pairs finds all the starts in log₂ k steps. Then the pieces are
# scanned again, from there. That is twice the work in far fewer steps, and up to √(k l) states to
# keep instead of √l. Nothing is ever divided by a decay, so nothing overflows.

def _fold(tensor, pieces):
    """(b, l, …) -> (b·k, T, …), T = ⌈l/k⌉, zeros at the end: Δ = 0 leaves a state alone."""
    length = -(-tensor.shape[1] // pieces) * pieces
    if length != tensor.shape[1]:
        tensor = F.pad(tensor, (0, 0, 0, length - tensor.shape[1]))
    return tensor.unflatten(1, (pieces, -1)).flatten(0, 1)


def _unfold(tensor, pieces, l):
    """(b·k, T, …) -> (b, l, …): the inverse of `_fold`."""
    return tensor.unflatten(0, (-1, pieces)).flatten(1, 2)[:, :l]


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
        # four pieces, j - 1 and j after the first round, all four after the second. (Hillis &
        # Steele 1986; it does more work than Blelloch's scan, in fewer steps.)
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
    zero = u.new_zeros(u.shape[0], *A.shape)
    _, _, s = _forward(u, delta, A, B, None, zero, u.shape[1], zoh)
    return _chain(_decays(delta, A, k), s.unflatten(0, (-1, k)), h0).flatten(0, 1)


@script
def _send_back(grad_y: Tensor, delta: Tensor, A: Tensor, C: Tensor) -> Tensor:
    """The gradient of the state before a piece, from this piece's outputs alone: (b·k, n, d)."""
    b, l, d = grad_y.shape
    g = torch.zeros([b, A.shape[0], d], dtype=A.dtype, device=A.device)
    C_t, grad_y_t, delta_t = C.unsqueeze(3).unbind(1), grad_y.split(1, 1), delta.split(1, 1)
    A_2 = A / math.log(2.0)
    for t in range(l - 1, -1, -1):       # g = Ā_t (g + C_t ∂y_t)
        g.addcmul_(C_t[t], grad_y_t[t]).mul_((delta_t[t] * A_2).exp2_())
    return g


def _end_gradients(grad_y, delta, A, C, grad_h, k):
    """The gradient of the state after each piece, (b·k, n, d); grad_h (b, n, d): after the last.

    Backwards, a piece maps the gradient of the state after it, g, to that of the state before it,
    a g + s, with the same a as forwards. So the pieces are chained the same way, from the last one.
    """
    s = _send_back(grad_y, delta, A, C).unflatten(0, (-1, k))
    return _chain(_decays(delta, A, k).flip(1), s.flip(1), grad_h).flip(1).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# Checks: a wrong shape must raise an error, and not be broadcast in silence.

def full(x):
    """x in float32 at least: decays multiply up over many tokens, and so would their rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def choose(name, value, allowed):
    """-> value. Raises ValueError if it is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def check_sequence(layer, x, d, mask=None, state=None):
    """Raise a ValueError unless x is (b, l, d), and mask, if there is one, (b, l).

    With a state x may also be one token, (b, d), without a mask.
    """
    fits = x.ndim == 3 or (x.ndim == 2 and state is not None)
    if not fits or x.shape[-1] != d:
        raise ValueError(f"{type(layer).__name__}: x must have shape (b, l, {d}), "
                         f"got {tuple(x.shape)}")
    if mask is not None and x.ndim == 2:
        raise ValueError(f"{type(layer).__name__}: a single token takes no mask")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"{type(layer).__name__}: mask must have shape (b, l) = "
                         f"{tuple(x.shape[:2])}, got {tuple(mask.shape)}")


def _check(x, delta, A, B, C, D, h0, method, discretization):
    """Raise a ValueError that names the argument, what was expected and what came."""
    def fail(name, expected, got):
        raise ValueError(f"selective_scan: {name} must {expected}, got {got}")

    choose("selective_scan: method", method, METHODS)
    choose("selective_scan: discretization", discretization, DISCRETIZATIONS)
    named = {"x": x, "delta": delta, "A": A, "B": B, "C": C}
    if D is not None:
        named["D"] = D
    if h0 is not None:
        named["h0"] = h0
    for name, t in named.items():
        if not isinstance(t, Tensor):
            fail(name, "be a tensor", type(t).__name__)
        if not t.dtype.is_floating_point:
            fail(name, "be of a real floating dtype", t.dtype)
        if t.device != x.device:
            fail(name, f"be on {x.device} like x", t.device)
    if x.ndim != 3:
        fail("x", "have shape (b, l, d)", tuple(x.shape))
    if A.ndim != 2 or A.shape[0] != x.shape[2]:
        fail("A", f"have shape (d, n) = ({x.shape[2]}, n)", tuple(A.shape))
    size = dict(zip("bld", x.shape), n=A.shape[1])
    for name, letters in (("delta", "bld"), ("B", "bln"), ("C", "bln"), ("D", "d"), ("h0", "bdn")):
        shape = tuple(size[letter] for letter in letters)
        if name in named and named[name].shape != shape:
            letters = str(tuple(letters)).replace("'", "")                     # (b, l, d)
            fail(name, f"have shape {letters} = {shape}", tuple(named[name].shape))


# --------------------------------------------------------------------------------------------------
# Files, for all scripts of this directory. A file is replaced once the new one is complete: so a
# run that is killed, or a disk that is full, destroys nothing.

def write(path, make, keep_old=False):
    """Call make(an open temporary file), then move the file to path.

    keep_old    what was at path becomes path.old, so that a command given twice costs nothing
    os.replace is atomic: whoever looks at path sees the old file or the new one. The process id in
    the temporary name keeps two runs of one name from writing into each other's file.
    """
    part = f"{path}.{os.getpid()}.part"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(part, "wb") as file:
            make(file)
        keep_old = keep_old and os.path.exists(path)
        if keep_old:
            os.replace(path, f"{path}.old")
        os.replace(part, path)
        if keep_old:                     # only now: printing may fail
            print(f"the earlier {path} is now {path}.old")
    except RuntimeError as error:        # torch.save does not say what kept it from writing
        raise OSError(f"cannot write {path}: the disk may be full") from error
    finally:
        Path(part).unlink(missing_ok=True)


def write_rows(path, rows):
    """A CSV file of dictionaries that have the same keys; an earlier one becomes path.old."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode(errors="backslashreplace")       # a file name may be no UTF-8
    write(path, lambda file: file.write(data), keep_old=True)
    print(f"wrote {path}", flush=True)


def check_folders(*folders):
    """Create the folders. If one cannot be written to, exit now and not after hours of work."""
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: cannot write to {folder} ({error.strerror})")


# --------------------------------------------------------------------------------------------------
# `python s6.py`: the ways side by side, and softmax attention for scale.

def _attention(x, delta, A, B, C, D):
    """Causal softmax attention of the same width: two heads; x is query, key and value."""
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)                           # (b, 2, l, d/2)
    y = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return y.transpose(1, 2).flatten(2)                                        # (b, l, d)


WAYS = {  # way, the longest sequence it is given, colour
    "definition, autograd": (lambda *a: definition(*a)[0], 4096, "#7f7f7f"),
    "sequential": (lambda *a: selective_scan(*a, method="sequential"), 65536, "#1f77b4"),
    "parallel": (lambda *a: selective_scan(*a, method="parallel"), 65536, "#d62728"),
    "softmax attention": (_attention, 16384, "#9467bd"),
}


def _random_inputs(b, l, d, n):
    """Random x, Δ (mostly 0.02 … 0.13), A, B, C, D, requiring gradients."""
    delta = F.softplus(torch.randn(b, l, d) - 3)
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    B, C, x = torch.randn(b, l, n), torch.randn(b, l, n), torch.randn(b, l, d)
    return [t.requires_grad_() for t in (x, delta, A, B, C, torch.ones(d))]


@contextlib.contextmanager
def kept_for_backward():
    """Notes what the operations in here keep for the backward pass: -> {address: bytes}."""
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()    # an output that kept itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield kept


def _measure(way, inputs):
    """Forward and backward: -> seconds, bytes kept between the two, output.

    The fastest of five runs, or of as many as fit in three seconds (the first two also compile).
    """
    begin, best = time.perf_counter(), math.inf
    for _ in range(5):
        start = time.perf_counter()
        with kept_for_backward() as kept:
            y = way(*inputs)
        torch.autograd.grad(y.square().mean(), inputs, allow_unused=True)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > 3:
            break
    return best, sum(kept.values()), y.detach()


def main():
    """Time, memory and error over length: a table, results/scan_scaling.csv, and the figure."""
    if sys.argv[1:]:         # --help, or anything else
        print(__doc__)
        return
    check_folders("results", "figures")
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {platform.machine()}, {threads} threads; "
          f"b = 1, d = 128, n = 16; forward and backward\n")
    print(f"{'way':22s}{'length':>8s}{'ms':>10s}{'us/token':>10s}{'MB kept':>10s}{'error':>10s}")
    torch.manual_seed(0)
    rows = []
    for l in (64, 256, 1024, 4096, 16384, 65536):
        inputs = _random_inputs(1, l, 128, 16)
        with torch.no_grad():
            exact, _ = definition(*(t.double() for t in inputs))
        for name, (way, longest, _) in WAYS.items():
            if l > longest:
                continue
            seconds, kept, y = _measure(way, inputs)
            worst = ((y - exact).abs().max() / exact.abs().max()).item()
            error = "" if way is _attention else f"{worst:.1e}"
            ms, megabytes = f"{1e3 * seconds:.2f}", f"{kept / 1e6:.2f}"
            print(f"{name:22s}{l:8d}{ms:>10s}{1e6 * seconds / l:10.2f}{megabytes:>10s}{error:>10s}")
            rows.append({"way": name, "length": l, "milliseconds": ms, "megabytes_kept": megabytes,
                         "error": error, "threads": threads, "device": f"cpu {platform.machine()}",
                         "torch": torch.__version__, "command": "python s6.py"})
    print("\nerror: the largest of y, over the largest |y|, against the definition in float64")
    write_rows("results/scan_scaling.csv", rows)
    _draw("figures/scan_scaling.png", rows)


def _draw(path, rows):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, (_, _, color) in WAYS.items():
        for ax, column in zip(axes, ("milliseconds", "megabytes_kept")):
            points = [(row["length"], float(row[column])) for row in rows if row["way"] == name]
            ax.loglog(*zip(*points), "o-", color=color, label=name)
    axes[0].set(xlabel="length (tokens)", ylabel="time, forward + backward (ms)")
    axes[1].set(xlabel="length (tokens)", ylabel="kept for the backward pass (MB)")
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    write(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
