"""rnn.py: what came before: an RNN, a gated RNN, and S4.

    h_t = tanh(W x_t + U h_{t-1} + b)                      the vanilla RNN (Elman 1990)
    h_t = z_t h_{t-1} + (1 - z_t) h̃_t                      the GRU (Cho et al. 2014)
    h_t = Ā h_{t-1} + B̄ x_t,  y_t = 2 Re(C h_t) + D x_t    S4: linear, and the same at every token

The GRU has a gate: z_t is a sigmoid of x_t and h_{t-1}, and where it is 1 a token leaves the state
as it was. (h̃_t is the vanilla RNN's new state, with a second gate on U h_{t-1}.) So a GRU can
choose what to remember, as Mamba can. But its state is small: m numbers need about 3 m² weights.
And each step needs the state before it, so the tokens cannot be computed all at once.

Without tanh a recurrence can be unrolled. For the third line, y_t = D x_t + Σ_k K_k x_{t-k}, with
K_k = 2 Re(C Ā^k B̄). So it is a convolution with a kernel K as long as the sequence, and the FFT
computes it at all tokens at once. That is S4: trained as a convolution, and run as a recurrence.
What makes its memory long is A: HiPPO gives the one that keeps the past of a signal as Legendre
coefficients. ("S4" in these files is its diagonal form with zero-order hold, S4D-LegS: complex
numbers in place of S4's full matrix.) Its state is large, but Δ, B, C are the same for all inputs.

S6 is the recurrence of S4 with Δ, B and C made from x. So it has a large state and can choose what
to remember. But it is no longer a convolution: that is why s6.py needs a scan.

`python rnn.py` draws what HiPPO remembers (figures/hippo.png), in a few seconds.

Left out: the LSTM, and the low-rank part of HiPPO's matrix (see `diagonal_hippo`). The loops of RNN
and GRU are PyTorch's own: test_scan.py compares them with the equations.
Symbols: the glossary of s6.py. Read before: vision.py, whose ImageClassifier gives these bodies the
same stem, pooling and head. Read next: train_mnist.py.
Sources: Gu et al. 2020, "HiPPO"; Gu, Goel & Ré 2022, "Efficiently Modeling Long Sequences with
Structured State Spaces" (S4); Gupta et al. 2022, "Diagonal State Spaces are as Effective as
Structured State Spaces" (DSS); Gu et al. 2022, "On the Parameterization and Initialization of
Diagonal State Space Models" (S4D), sections 3 and 4.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from block import RMSNorm
from s6 import check_sequence, full


# --------------------------------------------------------------------------------------------------
# The vanilla RNN and the GRU, and a language model around such layers.

class RNN(nn.Module):
    """x (b, l, d_model) -> states of the top layer (b, l, hidden), and [h], h (b, layers, hidden).

    gated    False: the vanilla RNN. True: the GRU, three times as many weights for the same hidden
    `hidden` is chosen in the scripts so that there are as many parameters as in Mamba, to 2 %.
    """

    def __init__(self, d_model, hidden, layers=2, gated=False):
        super().__init__()
        kind = nn.GRU if gated else nn.RNN
        self.rnn = kind(d_model, hidden, layers, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(weight)      # in the vanilla RNN early inputs fade more slowly

    def forward(self, x, state=None):
        """state    what an earlier call returned, to go on from; None: from a state of zero."""
        h = None
        if state is not None:
            h = state[0].transpose(0, 1).contiguous()              # (layers, b, hidden)
        y, h = self.rnn(x, h)
        return y, [h.transpose(0, 1)]


class PlainLM(nn.Module):
    """Tokens (b, l) -> logits (b, l, vocabulary), states: as MambaLM, around other layers.

    layers    modules, layer(x, state) -> y, state: RNNs, or S4Blocks
    width     of the last layer's y, (b, l, width)
    """

    def __init__(self, vocabulary, d_model, layers, width):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens, states=None):
        """states    one for each layer, as an earlier call returned them; None at the beginning."""
        states = states or [None] * len(self.layers)
        new = []
        x = self.embedding(tokens)                                             # (b, l, d_model)
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            new.append(state)
        return self.head(self.norm(x)), new


class Stack(nn.Module):
    """x (b, l, d_model) -> (b, l, width): layers as above, each from its empty state.

    The body of an ImageClassifier: an image is read whole, so the last states are not needed.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return x


# --------------------------------------------------------------------------------------------------
# HiPPO: a matrix A with which the state summarizes all of the past.

def hippo(n):
    """HiPPO-LegS: -> A (n, n), B (n,), float64. Raises ValueError for n < 1.

    While x is read, h' = (A h + B x) / t keeps in h the coefficients of all of x so far in Legendre
    polynomials, stretched over [0, t]. Of all polynomials of degree < n that is the one closest to
    x in the mean square, if all of the past counts the same (HiPPO, theorem 2; the sign is that of
    S4). For n = 3:

        A = -[[1, 0, 0], [√3, 2, 0], [√5, √15, 3]],  B = [1, √3, √5]
    """
    if n < 1:
        raise ValueError(f"hippo: n must be 1 or more, got {n}")
    root = np.sqrt(2 * np.arange(n) + 1.0)
    A = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(1.0, n + 1))
    return A, root


def memorize(x, n):
    """HiPPO's state after each sample of x (l,): -> (l, n), by the bilinear rule.

    h_k - h_{k-1} = (A (h_k + h_{k-1}) / 2 + B x_k) / k: step k of a clock that runs from 1 to l.
    """
    A, B = hippo(n)
    I = np.eye(n)
    h = np.zeros(n)
    states = []
    for k, sample in enumerate(x, 1):
        h = (I + A / (2 * k)) @ h + B * sample / k
        h = np.linalg.solve(I - A / (2 * k), h)
        states.append(h)
    return np.array(states)


def recall(h, points):
    """The past that a state h (n,) of `memorize` holds, at points from 0 (first) to 1 (now)."""
    scale = np.sqrt(2 * np.arange(len(h)) + 1)
    return np.polynomial.legendre.legval(2 * points - 1, h * scale)


def diagonal_hippo(n):
    """The normal part of HiPPO's matrix, in its eigenbasis: -> Λ, B, complex (n/2,), n even.

    Why a diagonal. n coupled equations become n separate ones, and the powers Ā^k that the kernel
    needs become powers of single numbers.

    How. HiPPO's A has no usable eigenbasis: its eigenvectors grow exponentially with n. But with
    P_k = √(k + 1/2), the matrix A + P Pᵀ is -1/2 times the identity plus S, and S is skew-symmetric
    (Sᵀ = -S). So it has orthonormal eigenvectors V and eigenvalues ± iω. In that basis h' =
    (A + P Pᵀ) h + B x is n oscillators that fade alike: Λ = -1/2 ± iω. They come in pairs that are
    complex conjugates of each other, so one of each pair is enough.

    What is lost. HiPPO's A is (A + P Pᵀ) - P Pᵀ, and the second term is left out. S4 keeps it and
    pays with a more complicated kernel. DSS found that models without it are as good, and S4D gave
    the reason: if B is halved, the response to a smooth input tends to that of HiPPO as n grows.
    Why halved: P = B/√2, so P Pᵀ h is B/2 times Bᵀ h, and Bᵀ h is what the state recalls of x now
    (`recall` at point 1). So h' = (A + P Pᵀ) h - P Pᵀ h + B x is about (A + P Pᵀ) h - B x/2 + B x.
    S4 also drops the 1/t, so its clock does not stretch: the past fades instead of counting all the
    same.
    Raises ValueError for an odd n.
    """
    if n % 2:
        raise ValueError(f"diagonal_hippo: n must be even, got {n}")
    A, B = hippo(n)
    P = np.sqrt(np.arange(n) + 0.5)
    S = A + np.outer(P, P) + 0.5 * np.eye(n)
    omega, V = np.linalg.eigh(-1j * S)   # -iS is Hermitian: real eigenvalues, orthonormal V
    pairs = omega > 0
    return -0.5 + 1j * omega[pairs], (V.conj().T @ B / 2)[pairs]


# --------------------------------------------------------------------------------------------------
# S4: one recurrence, computed in two ways.

def _powers(step, l):
    """exp(step k), the powers of exp(step), for k = 0 … l-1: step (d, n/2) complex -> (d, n/2, l).

    An exponential for each k would be most of the work of a layer. So k is split like a number with
    two digits, k = i · width + j with width ≈ √l: exp(step k) = exp(step i width) · exp(step j).
    That takes 2√l exponentials and one product for each k. The angle ω Δ k can be thousands of
    turns, and float32 would round it too coarsely: it is computed in double precision, and what is
    left after whole turns is cast back to step's precision.
    """
    def few(count, stride):              # exp(step · stride · k), k = 0 … count-1
        k = stride * torch.arange(count, device=step.device)
        angle = (step.imag.double().unsqueeze(-1) * k).remainder(2 * math.pi)
        return torch.polar((step.real.unsqueeze(-1) * k).exp(), angle.to(step.real.dtype))

    width = max(1, math.isqrt(l))
    coarse = few(-(-l // width), width)                            # (d, n/2, √l)
    fine = few(width, 1)                                           # (d, n/2, √l)
    return (coarse.unsqueeze(-1) * fine.unsqueeze(-2)).flatten(-2)[..., :l]


class S4(nn.Module):
    """x (b, l, d) -> y (b, l, d): each channel has a linear recurrence of its own, n numbers wide.

    n counts real numbers: n/2 complex ones are kept without their conjugates, and y takes twice the
    real part instead. Δ, A, C and the skip D are learned; B is HiPPO's, since y depends on the
    product of B and C alone.

    real    True: S4D-Real, the control without oscillations. A starts at -1, -2, … -n, as Mamba's
            does, and all n numbers are real: read n for n/2 below
    Raises ValueError for an odd n.
    """

    no_decay = ("A_log", "omega")        # see block.parameter_groups

    def __init__(self, d, n=64, real=False):
        super().__init__()
        A, B = diagonal_hippo(n)
        if real:
            A = -np.arange(1.0, n + 1)
            B = np.full(n, 0.5)          # half, since y takes everything twice
        log_dt = torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1))
        self.log_dt = nn.Parameter(log_dt)                                     # Δ: 0.001 … 0.1
        # Λ = -exp(A_log) + i ω: the real part stays negative, whatever the optimizer does.
        self.A_log = nn.Parameter(torch.tensor(-A.real).float().log().repeat(d, 1))     # (d, n/2)
        omega = torch.tensor(A.imag).float().repeat(d, 1)                      # (d, n/2)
        self.register_buffer("B", torch.view_as_real(torch.tensor(B).to(torch.complex64)))
        if real:
            self.register_buffer("omega", omega)                               # 0, and stays 0
            self.C = nn.Parameter(torch.randn(d, n, 1))
        else:
            self.omega = nn.Parameter(omega)
            self.C = nn.Parameter(torch.randn(d, n // 2, 2) * 0.5 ** 0.5)      # variance 1
        self.D = nn.Parameter(torch.ones(d))

    def discretize(self):
        """-> ΔΛ, B̄ and C, (d, n/2) complex. B̄ = (exp(ΔΛ) - 1)/Λ B: exact while x is held."""
        A = torch.complex(-full(self.A_log).exp(), full(self.omega))
        delta_A = full(self.log_dt).exp().unsqueeze(1) * A
        B_bar = torch.expm1(delta_A) / A * torch.view_as_complex(full(self.B))
        C = full(self.C)
        if C.shape[-1] == 1:             # real: the imaginary part is 0
            C = F.pad(C, (0, 1))
        return delta_A, B_bar, torch.view_as_complex(C)

    def forward(self, x, h=None):
        """x (b, l, d) -> y (b, l, d), and the state after x, (b, d, n/2) complex.

        h      the state to go on from, None for zero
        Many tokens are convolved, all at once; for one the recurrence is cheaper. Both give the
        same, up to rounding. Raises ValueError for another shape of x or h.
        """
        check_sequence(self, x, len(self.D))
        if h is not None and h.shape != (len(x), *self.A_log.shape):
            raise ValueError(f"S4: the state must have shape {(len(x), *self.A_log.shape)}, got "
                             f"{tuple(h.shape)}")
        if x.shape[1] == 0:              # no token: the state stays
            return x, h
        if x.shape[1] == 1:
            y, h = self.recur(full(x), h)
        else:
            y, h = self.convolve(full(x), h)
        return (y + full(self.D) * full(x)).to(x.dtype), h

    def recur(self, x, h=None):
        """One token after the other: x (b, l, d) -> y without D x, and the state after x."""
        delta_A, B_bar, C = self.discretize()
        A_bar = delta_A.exp()
        if h is None:
            h = torch.zeros_like(B_bar)
        ys = []
        for x_t in x.unbind(1):
            h = A_bar * h + B_bar * x_t.unsqueeze(-1)                          # (b, d, n/2)
            ys.append(2 * (C * h).sum(-1).real)                                # (b, d)
        return torch.stack(ys, 1), h

    def convolve(self, x, h0=None):
        """The same for all tokens at once: y is x convolved with K, K_k = 2 Re(C Ā^k B̄), (d, l).

        K costs d·n·l, and the convolution by FFT b·d·l·log l in place of b·d·l².
        """
        l = x.shape[1]
        x = x.transpose(1, 2).contiguous()                                     # (b, d, l)
        delta_A, B_bar, C = self.discretize()
        powers = _powers(delta_A, l)                                           # Ā^k, (d, n/2, l)
        K = 2 * torch.matmul((C * B_bar).unsqueeze(1), powers).squeeze(1).real         # (d, l)
        # Pad with l zeros. Otherwise the end of the sequence would wrap around to its beginning.
        spectrum = torch.fft.rfft(x, 2 * l) * torch.fft.rfft(K, 2 * l)
        y = torch.fft.irfft(spectrum, 2 * l)[..., :l]
        # h_l = Ā^l h_0 + Σ_k Ā^k B̄ x_{l-k}
        h = B_bar * torch.einsum("bdl,dnl->bdn", x.to(powers.dtype), powers.flip(-1))
        if h0 is not None:               # h_0 adds 2 Re(C Ā^t h_0) to y_t, t = 1 … l
            y = y + 2 * torch.einsum("bdn,dnl->bdl", C * delta_A.exp() * h0, powers).real
            h = h + (delta_A * l).exp() * h0
        return y.transpose(1, 2), h


class S4Block(nn.Module):
    """x -> x + GLU(W GELU(S4(norm(x)))), (b, l, d_model): S4 mixes in time, W the channels."""

    def __init__(self, d_model, n=64, real=False):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.s4 = S4(d_model, n, real)
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def forward(self, x, h=None):
        """State and errors as for S4."""
        y, h = self.s4(self.norm(x), h)
        return x + F.glu(self.out_proj(F.gelu(y))), h


# --------------------------------------------------------------------------------------------------
# `python rnn.py`: what HiPPO remembers.

def signal(l):
    """Something to remember: a sum of eight waves, 1 to 8 over the length, (l,)."""
    random = np.random.default_rng(0)
    place = np.linspace(0, 1, l)
    return sum(random.normal() * np.cos(2 * np.pi * (wave * place + random.random()))
               for wave in range(1, 9))


def draw_hippo(path, l=1000):
    """Left: a signal, and what 8, 16 and 64 numbers recall of it. Right: the error over n.

    Up to n = 32 each number helps. Beyond that the error is that of the time step: with half the
    samples it is larger.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    x = signal(l)
    left.plot(x, color="0.7", linewidth=4, label=f"the signal, {l:,} samples")
    for n, color in ((8, "#1f77b4"), (16, "#ff7f0e"), (64, "#2ca02c")):
        recalled = recall(memorize(x, n)[-1], (np.arange(l) + 0.5) / l)
        left.plot(recalled, color=color, linewidth=1.2, label=f"recalled from n = {n} numbers")
    sizes = [2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64]
    for samples, style in ((l, "o-"), (l // 2, "o--")):
        past = signal(samples)
        points = (np.arange(samples) + 0.5) / samples
        errors = []
        for n in sizes:
            missed = recall(memorize(past, n)[-1], points) - past
            errors.append(np.linalg.norm(missed) / np.linalg.norm(past))
        right.semilogy(sizes, errors, style, color="black", label=f"{samples:,} samples")
    left.set(xlabel="sample", ylabel="value")
    right.set(xlabel="n: numbers in the state", ylabel="error of the recalled past, relative")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=9)
    save_figure(path, figure)


if __name__ == "__main__":
    from matplotlib.figure import Figure
    from training import save_figure

    draw_hippo("figures/hippo.png")
