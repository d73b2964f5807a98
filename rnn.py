"""rnn.py: what came before: recurrences whose dynamics do not look at the input.

    h_t = tanh(W x_t + U h_{t-1} + b)                      the vanilla RNN (Elman 1990)
    h_t = Ā h_{t-1} + B̄ x_t,  y_t = 2 Re(C h_t) + D x_t    S4: linear, and the same at every token

Without tanh a recurrence can be unrolled. For the second line, y_t = D x_t + Σ_k K_k x_{t-k}, with
K_k = 2 Re(C Ā^k B̄). So it is a convolution with a kernel K as long as the sequence, and
the FFT computes it at all tokens at once. That is S4: trained as a convolution, and run as a
recurrence. What makes its memory long is A: HiPPO gives the one that keeps the past of a signal as
Legendre coefficients. ("S4" in these files is its diagonal form with zero-order hold, S4D-LegS:
complex numbers in place of S4's full matrix.)

S6 is the same recurrence again, with Δ, B and C made from x. So it can choose what to remember, and
is a convolution no longer: that is why s6.py needs a scan.

`python rnn.py` draws what HiPPO remembers (figures/hippo.png), and times the convolution beside the
recurrence (results/s4_modes.csv), in half a minute.

Left out: gates (LSTM, GRU), and the low-rank part of HiPPO's matrix (see `diagonal_hippo`). The
RNN's loop is PyTorch's own: test_scan.py compares it with the equation above.
Symbols: the glossary of s6.py. Read before: vision.py, whose ImageClassifier gives these bodies the
same stem, pooling and head. Read next: train_mnist.py.
Sources: Gu et al. 2020, "HiPPO"; Gu, Goel & Ré 2022, "Efficiently Modeling Long Sequences with
Structured State Spaces" (S4); Gupta et al. 2022, "Diagonal State Spaces are as Effective as
Structured State Spaces" (DSS); Gu et al. 2022, "On the Parameterization and Initialization of
Diagonal State Space Models" (S4D), sections 3 and 4.
"""
import math
import platform
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from block import RMSNorm
from s6 import check_folders, check_sequence, full, write, write_rows


# --------------------------------------------------------------------------------------------------
# The vanilla RNN.

class RNN(nn.Module):
    """x (b, l, d_model) -> states of the top layer (b, l, hidden), from a first state of zero.

    train_mnist.py chooses `hidden` so that there are as many parameters as in Mamba, to 1 %
    (except in the recipe poster, which follows what was published).
    """

    def __init__(self, d_model, hidden, layers=2):
        super().__init__()
        self.rnn = nn.RNN(d_model, hidden, layers, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(weight)      # preserves ‖h‖: early inputs fade more slowly

    def forward(self, x):
        """Raises ValueError for another width."""
        check_sequence(self, x, self.rnn.input_size)
        return self.rnn(x)[0]


# --------------------------------------------------------------------------------------------------
# HiPPO: the matrix that remembers.

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
    return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(1.0, n + 1)), root


def memorize(x, n):
    """HiPPO's state after each sample of x (l,): -> (l, n), by the bilinear rule.

    h_k - h_{k-1} = (A (h_k + h_{k-1}) / 2 + B x_k) / k: step k of a clock that runs from 1 to l.
    """
    A, B = hippo(n)
    I, h, states = np.eye(n), np.zeros(n), []
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

    Why a diagonal: n coupled equations become n separate ones, and the powers Ā^k that the kernel
    needs become powers of single numbers. HiPPO's A has no usable eigenbasis (its eigenvectors grow
    exponentially with n). But with P_k = √(k + 1/2), the matrix A + P Pᵀ is -1/2 times the identity
    plus S, and S is skew-symmetric (Sᵀ = -S), so it has orthonormal eigenvectors V and eigenvalues
    ± iω. In that basis h' = (A + P Pᵀ) h + B x is n oscillators that fade alike: Λ = -1/2 ± iω.
    They come in pairs that are complex conjugates of each other, so one of each pair is enough.

    That leaves P Pᵀ out. S4 keeps it, at the price of a Cauchy kernel and the Woodbury identity.
    DSS found that models without it are as good. S4D gave the reason: if B is halved, the response
    to a given input tends to that of HiPPO as n grows. (The kernels themselves do not: Yu et al.
    2023, arXiv 2310.01698.) Why halved: P = B/√2, so P Pᵀ h is B/2 times Bᵀ h, and Bᵀ h is what the
    state recalls of x at this moment (`recall` at point 1). So h' = (A + P Pᵀ) h - P Pᵀ h + B x is
    about (A + P Pᵀ) h - B x / 2 + B x.

    S4 also drops the 1/t, so its clock does not stretch: the past fades instead of counting all the
    same. At n = 64 the fastest ω is about 1,300: with Δ = 0.1 that is 130 rad a token, far more
    than the π that samples can resolve. Such modes do not act as oscillators.
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

MODES = ("convolution", "recurrence")


def _powers(step, l):
    """exp(step k), the powers of exp(step), for k = 0 … l-1: step (d, n/2) complex -> (d, n/2, l).

    An exponential for each k would be most of the work of a layer. So k is written as a w + b with
    w ≈ √l, like a number with two digits: exp(step k) = exp(step w a) · exp(step b) takes 2√l
    exponentials and one product for each k. The angle ω Δ k can be thousands of turns, and float32
    would round it too coarsely: it is computed in double precision, and what is left after whole
    turns is cast back to step's precision.
    """
    def few(count, stride):              # exp(step · stride · k), k = 0 … count-1
        k = stride * torch.arange(count, device=step.device)
        angle = (step.imag.double().unsqueeze(-1) * k).remainder(2 * math.pi)
        return torch.polar((step.real.unsqueeze(-1) * k).exp(), angle.to(step.real.dtype))

    width = max(1, math.isqrt(l))
    coarse, fine = few(-(-l // width), width), few(width, 1)       # (d, n/2, √l) each
    return (coarse.unsqueeze(-1) * fine.unsqueeze(-2)).flatten(-2)[..., :l]


class S4(nn.Module):
    """x (b, l, d) -> y (b, l, d): each channel has a linear recurrence of its own, n numbers wide.

    n real numbers are n/2 complex ones and their conjugates: a pair adds twice the real part. Δ, A,
    C and the skip D are learned; B is HiPPO's, since y depends on the product of B and C alone.
    Raises ValueError for an odd n.
    """

    def __init__(self, d, n=64):
        super().__init__()
        A, B = diagonal_hippo(n)
        log_dt = torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1))
        self.log_dt = nn.Parameter(log_dt)                                     # Δ: 0.001 … 0.1
        # Λ = -exp(A_log) + i ω: the real part stays negative, whatever the optimizer does.
        self.A_log = nn.Parameter(torch.tensor(-A.real).float().log().repeat(d, 1))     # (d, n/2)
        self.omega = nn.Parameter(torch.tensor(A.imag).float().repeat(d, 1))
        self.register_buffer("B", torch.view_as_real(torch.tensor(B).to(torch.complex64)))
        self.C = nn.Parameter(torch.randn(d, n // 2, 2) * 0.5 ** 0.5)          # complex, variance 1
        self.D = nn.Parameter(torch.ones(d))

    def discretize(self):
        """-> ΔΛ and B̄, (d, n/2) complex both. B̄ = (exp(ΔΛ) - 1)/Λ B: exact while x is held."""
        A = torch.complex(-full(self.A_log).exp(), full(self.omega))
        delta_A = full(self.log_dt).exp().unsqueeze(1) * A
        return delta_A, torch.expm1(delta_A) / A * torch.view_as_complex(full(self.B))

    def forward(self, x, h=None, *, mode="auto", return_state=True):
        """x (b, l, d) -> y (b, l, d), and the state after x, (b, d, n/2) complex.

        h      the state to go on from, None for zero
        mode   "convolution": all tokens at once, by FFT. "recurrence": one after the other. They
               agree up to rounding. "auto": the recurrence for a single token, else the convolution
        return_state   False: None in place of the state. A convolution has to compute it apart,
               and a training that goes on from no state need not pay for that
        Raises ValueError for another mode, or shape of x or h.
        """
        if mode not in (*MODES, "auto"):
            raise ValueError(f"S4: mode must be \"auto\" or one of {MODES}, got {mode!r}")
        check_sequence(self, x, len(self.D))
        if h is not None and h.shape != (len(x), *self.A_log.shape):
            raise ValueError(f"S4: the state must have shape {(len(x), *self.A_log.shape)}, got "
                             f"{tuple(h.shape)}")
        if x.shape[1] == 0:              # no token: the state stays
            return x, h
        if mode == "auto":
            mode = "recurrence" if x.shape[1] == 1 else "convolution"
        if mode == "recurrence":
            y, h = self._recur(full(x), h)
        else:
            y, h = self._convolve(full(x), h, return_state)
        return (y + full(self.D) * full(x)).to(x.dtype), h

    def _recur(self, x, h):
        delta_A, B_bar = self.discretize()
        A_bar, C, ys = delta_A.exp(), torch.view_as_complex(full(self.C)), []
        h = 0 if h is None else h
        for x_t in x.unbind(1):
            h = A_bar * h + B_bar * x_t.unsqueeze(-1)                          # (b, d, n/2)
            ys.append(2 * (C * h).sum(-1).real)                                # (b, d)
        return torch.stack(ys, 1), h

    def _convolve(self, x, h0, return_state):
        """y = K * x with K_k = 2 Re(C Ā^k B̄): K costs d·n·l, and the FFT l log l instead of l²."""
        l, x = x.shape[1], x.transpose(1, 2).contiguous()                      # (b, d, l)
        delta_A, B_bar = self.discretize()
        C, powers = torch.view_as_complex(full(self.C)), _powers(delta_A, l)   # Ā^k, (d, n/2, l)
        K = 2 * torch.matmul((C * B_bar).unsqueeze(1), powers).squeeze(1).real         # (d, l)
        # As long again in zeros, or the end of the sequence would wrap around to its beginning.
        spectrum = torch.fft.rfft(x, 2 * l) * torch.fft.rfft(K, 2 * l)
        y = torch.fft.irfft(spectrum, 2 * l)[..., :l]
        if h0 is not None:               # h_0 adds 2 Re(C Ā^t h_0) to y_t, t = 1 … l
            y = y + 2 * torch.einsum("bdn,dnl->bdl", C * delta_A.exp() * h0, powers).real
        h = None
        if return_state:                 # h_l = Ā^l h_0 + Σ_k Ā^k B̄ x_{l-k}
            h = B_bar * torch.einsum("bdl,dnl->bdn", x.to(powers.dtype), powers.flip(-1))
            h = h if h0 is None else h + (delta_A * l).exp() * h0
        return y.transpose(1, 2), h


class S4Block(nn.Module):
    """x -> x + GLU(W GELU(S4(norm(x)))), (b, l, d_model): S4 mixes in time, W the channels."""

    def __init__(self, d_model, n=64):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.s4 = S4(d_model, n)
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def forward(self, x, h=None, *, mode="auto", return_state=True):
        """State, mode, return_state and errors as for S4."""
        check_sequence(self, x, len(self.norm.weight))
        y, h = self.s4(self.norm(x), h, mode=mode, return_state=return_state)
        return x + F.glu(self.out_proj(F.gelu(y))), h


class S4Stack(nn.Module):
    """x (b, l, d_model) -> (b, l, d_model): S4Blocks, one after the other.

    Not scaled by `scale_residuals`. In PixelLM the same blocks are.
    """

    def __init__(self, d_model, layers=4, n=64):
        super().__init__()
        self.layers = nn.ModuleList(S4Block(d_model, n) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x, return_state=False)
        return x


# --------------------------------------------------------------------------------------------------
# `python rnn.py`: what HiPPO remembers, and what the convolution is worth.

def _measure(layer, x, mode):
    """Seconds of a training step: the fastest of as many as fit in two seconds, three at least."""
    begin, times = time.perf_counter(), []
    while len(times) < 3 or time.perf_counter() - begin < 2:
        start = time.perf_counter()
        layer(x, mode=mode, return_state=False)[0].square().mean().backward()
        times.append(time.perf_counter() - start)
    return min(times)


def compare_modes():
    """A table of training steps in both modes: -> rows."""
    threads, rows = torch.get_num_threads(), []
    same = {"threads": threads, "torch": torch.__version__,
            "device": f"cpu {platform.machine()}", "command": "python rnn.py"}
    print(f"torch {torch.__version__}, {platform.machine()}, {threads} threads\n"
          f"S4, b = 64, d = 64, n = 64; forward and backward, ms\n")
    print(f"{'length':>8s}{'convolution':>16s}{'recurrence':>16s}{'ratio':>8s}")
    layer = S4(64)
    for l in (49, 196, 784):
        x = torch.randn(64, l, 64)
        convolution = 1e3 * _measure(layer, x, "convolution")
        recurrence = 1e3 * _measure(layer, x, "recurrence")
        ratio = recurrence / convolution
        print(f"{l:8d}{convolution:16.1f}{recurrence:16.1f}{ratio:8.1f}")
        row = {"length": l, "convolution_ms": f"{convolution:.2f}",
               "recurrence_ms": f"{recurrence:.2f}", "ratio": f"{ratio:.1f}"}
        rows.append(row | same)
    return rows


def signal(l):
    """Something to remember: a sum of eight waves, 1 to 8 over the length, (l,)."""
    random, place = np.random.default_rng(0), np.linspace(0, 1, l)
    return sum(random.normal() * np.cos(2 * np.pi * (wave * place + random.random()))
               for wave in range(1, 9))


def draw_hippo(path, l=1000):
    """Left: a signal, and what 8, 16 and 64 numbers recall of it. Right: the error over n."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(2, 1))
    x, now = signal(l), (np.arange(l) + 0.5) / l
    axes[0].plot(x, color="0.7", linewidth=4, label=f"the signal, {l:,} samples")
    for n, color in ((8, "#1f77b4"), (16, "#ff7f0e"), (64, "#2ca02c")):
        axes[0].plot(recall(memorize(x, n)[-1], now), color=color, linewidth=1.2,
                     label=f"recalled from n = {n} numbers")
    sizes = [2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64]
    for read, style in ((l, "o-"), (l // 2, "o--")):
        past, points, errors = x[:read], (np.arange(read) + 0.5) / read, []
        for n in sizes:
            missed = recall(memorize(past, n)[-1], points) - past
            errors.append(np.linalg.norm(missed) / np.linalg.norm(past))
        axes[1].semilogy(sizes, errors, style, color="black", label=f"after {read:,} samples")
    axes[0].set(xlabel="sample", ylabel="value")
    axes[1].set(xlabel="n: numbers in the state", ylabel="error of the recalled past, relative")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    write(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    print(f"wrote {path}")


def main():
    """figures/hippo.png, and the table of both modes in results/s4_modes.csv."""
    if sys.argv[1:]:         # --help, or anything else
        print(__doc__)
        return
    check_folders("results", "figures")
    draw_hippo("figures/hippo.png")
    write_rows("results/s4_modes.csv", compare_modes())


if __name__ == "__main__":
    main()
