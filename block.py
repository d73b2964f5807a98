"""block.py: what Mamba wraps around the scan: gate, short convolution, norm, residual; and the LM.

         x  (b, l, d_model)
         ├───────────────┐
         │             norm
         │            in_proj          widen d_model to twice d = 2 d_model
         │           ┌───┴───┐
         │         a │       │ z       (b, l, d) each
         │         conv      │         each token meets the three before it
         │         SiLU      │
         │          S6      SiLU       the state; the gate: what does this token need of it?
         │           └── · ──┘
         │          out_proj
         └────── + ──────┘
                 x  (b, l, d_model)

One block does both jobs of a Transformer layer: S6 mixes along the sequence, as attention
does, and in_proj and out_proj mix along the channels, as the MLP does. (Two blocks have about as
many parameters as one layer of attention and MLP: section 3.4.) The convolution is causal and four
tokens long. It shows Δ, B and C the neighbourhood of a token, so that "write this down" can depend
on more than the token itself.

A block can stop and go on. `State` is all it remembers of a sequence, however long: a window of the
convolution's last three inputs, and the state h of the scan. As with PyTorch's LSTM, whatever has a
state returns two things: `y, state = layer(x, state)`; without a state it begins anew.

`MambaLM` stacks blocks between an embedding and a head that is the embedding again, and its states
are one State per block. `generate` writes text from them, at the same cost per token however long
the text has become. Weights come from, and go back to, the official models by their names.

Symbols: the glossary of s6.py; besides, d_model is the width of the residual stream, and d that
inside the block. Left out: dropout, and the fused kernel's trick of computing the gate in the scan.
Read before: s6.py. Read next: vision.py, the same block for images.
Source: Gu & Dao 2023, section 3.4 and figure 3; initialisation as in the authors' code.
"""
# No `from __future__ import annotations` here: TorchScript reads the annotations of this file.
import copy
import csv
import math
import os
import platform
import sys
import time
from typing import List, NamedTuple, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from s6 import S6, check_sequence, script


# --------------------------------------------------------------------------------------------------
# The parts: a norm, a short causal convolution, and the path from one to the scan.

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension (Zhang & Sennrich 2019).

    Not nn.RMSNorm: under autocast x may be bfloat16, and the weight is cast to that.
    """

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def causal_conv(x, weight, bias, window=None):
    """y_t = bias + Σ_i weight_i x_{t-w+1+i}, i = 0 … w-1, channel by channel: x, y (b, l, d).

    weight (d, 1, w), bias (d,); window (b, w-1, d): the inputs before the first token, None for 0.
    """
    (_, l, d), padding = x.shape, weight.shape[-1] - 1
    if window is not None:
        x, padding = torch.cat([window.to(x.dtype), x], 1), 0                  # (b, w-1+l, d)
    # (b, l, d) in memory is an image of 1×l pixels with its d channels last, the layout that suits
    # PyTorch's 2-d convolution. A conv1d would copy x to (b, d, l) and y back, half the cost again.
    image = x.transpose(1, 2).unsqueeze(2)                                     # (b, d, 1, l)
    y = F.conv2d(image, weight.view(d, 1, 1, -1), bias, padding=(0, padding), groups=d)
    return y.squeeze(2)[:, :, :l].transpose(1, 2)


class State(NamedTuple):
    """What a block remembers of the tokens it has read. Its size is the same after any number."""
    window: Tensor           # (b, w-1, d) the last inputs of the convolution
    h: Tensor                # (b, d, n)   the state of the scan


def _take(x, index):
    """Tokens by their places: x (b, l, d), index (b, k) -> (b, k, d)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class ConvS6(nn.Module):
    """a (b, l, d) -> y = S6(SiLU(conv(a))), (b, l, d), State: reads a sequence in one direction."""

    def __init__(self, d, n=16, dt_rank=None, d_conv=4):
        super().__init__()
        self.conv1d = nn.Conv1d(d, d, d_conv, groups=d)     # holds the weights: see causal_conv
        self.s6 = S6(d, n, dt_rank)

    def forward(self, a, state=None, mask=None, *, method="auto"):
        """a (b, l, d) -> y (b, l, d), and the State after the last token.

        state   the State to go on from, or None
        mask    (b, l) or None: 0 for padding, wherever it stands. The state passes over padding as
                if it were not there, and y is 0 there
        Raises ValueError for another width, another mask, and as `selective_scan` does.
        """
        check_sequence(self, a, self.conv1d.in_channels, mask)
        b, l, d = a.shape
        w, conv1d = self.conv1d.kernel_size[0], self.conv1d
        if mask is not None:
            # The convolution would see padding between two words. So padding moves behind the last
            # real token, where no real token sees it, and in the end y moves back.
            padding = (mask == 0).unsqueeze(-1)
            order = torch.argsort((mask == 0).int(), dim=1, stable=True)
            a, mask = _take(a.masked_fill(padding, 0), order), mask.gather(1, order)
        window, h0 = (None, None) if state is None else state
        x = F.silu(causal_conv(a, conv1d.weight, conv1d.bias, window))         # (b, l, d)
        y, h = self.s6(x, h0, mask, method=method)
        # The next window: the last w-1 real tokens of [before, a]. Padding is at the end of a, so
        # they stand at count … count + w-2.
        before = a.new_zeros(b, w - 1, d) if window is None else window.to(a.dtype)
        count = a.new_full((b, 1), l, dtype=torch.int64) if mask is None else (
            (mask != 0).sum(1, keepdim=True))                                  # (b, 1)
        last = count + torch.arange(w - 1, device=a.device)                    # (b, w-1)
        window = _take(torch.cat([before, a], 1), last)
        if mask is not None:
            y = _take(y, torch.argsort(order, dim=1)).masked_fill(padding, 0)
        return y, State(window, h)


# --------------------------------------------------------------------------------------------------
# The block.

class Mamba(nn.Module):
    """The mixer, without norm and residual: x (b, l, d_model) -> y, the same shape, and a State."""

    def __init__(self, d_model, n=16, expand=2, dt_rank=None, d_conv=4):
        super().__init__()
        d = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.path = ConvS6(d, n, dt_rank, d_conv)
        self.out_proj = nn.Linear(d, d_model, bias=False)

    def forward(self, x, state=None, mask=None, *, method="auto"):
        """State, mask and errors as for ConvS6."""
        check_sequence(self, x, self.in_proj.in_features)
        a, z = self.in_proj(x).chunk(2, dim=-1)                                # (b, l, d) each
        y, state = self.path(a, state, mask, method=method)
        return self.out_proj(y * F.silu(z)), state                             # (b, l, d_model)


class MambaBlock(nn.Module):
    """x -> x + Mamba(norm(x)), State: pre-norm and residual. Padding comes out as it went in."""

    def __init__(self, d_model, n=16, expand=2, dt_rank=None, d_conv=4):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = Mamba(d_model, n, expand, dt_rank, d_conv)

    def forward(self, x, state=None, mask=None, *, method="auto"):
        """x (b, l, d_model) -> the same shape, and the State after x. Errors as for ConvS6."""
        check_sequence(self, x, len(self.norm.weight))
        y, state = self.mixer(self.norm(x), state, mask, method=method)
        return x + y, state


# --------------------------------------------------------------------------------------------------
# The language model, and the official weights.

class MambaLM(nn.Module):
    """Tokens (b, l) of int64 -> logits (b, l, vocabulary) for the token that comes next.

    A prompt goes through in one call, and then one token at a time, each at the same cost however
    long the text has become: give the states that one call returns to the next.
    """

    def __init__(self, vocabulary, d_model=128, layers=4, n=16, expand=2, dt_rank=None, d_conv=4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        # The head is the same matrix: 0.02 keeps the first logits near 0, so that the first loss
        # is near ln(vocabulary).
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(MambaBlock(d_model, n, expand, dt_rank, d_conv)
                                    for _ in range(layers))
        self.norm_f = RMSNorm(d_model)
        scale_residuals(self.layers)

    def forward(self, tokens, states=None, mask=None, *, method="auto"):
        """tokens (b, l) -> logits (b, l, vocabulary), and a list of one State per layer.

        states   what an earlier call returned, to go on from; None at the beginning of a text
        mask     (b, l) or None: 0 for padding, where the logits mean nothing
        """
        x, new = self.embedding(tokens), []                                    # (b, l, d_model)
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, state = layer(x, state, mask, method=method)
            new.append(state)
        return F.linear(self.norm_f(x), self.embedding.weight), new


def load_official(state_dict):
    """Weights by the names of state-spaces/mamba (1.x) or transformers -> a MambaLM with them.

    All sizes are read from the shapes; a padded vocabulary stays padded.
    Raises ValueError if this is no Mamba-1 language model with a tied head, saying what differs.
    """
    weights = {}
    for name, weight in state_dict.items():
        name = name.removeprefix("backbone.").replace("embeddings.", "embedding.")
        name = name.replace("mixer.conv1d.", "mixer.path.conv1d.")
        for own in ("x_proj.", "dt_proj.", "A_log", "D"):
            name = name.replace(f"mixer.{own}", f"mixer.path.s6.{own}")
        weights[name] = weight
    try:
        embedding, path = weights["embedding.weight"], "layers.0.mixer.path."
        d, n = weights[path + "s6.A_log"].shape
        dt_rank = weights[path + "s6.dt_proj.weight"].shape[-1]
        d_conv = weights[path + "conv1d.weight"].shape[-1]
    except KeyError as error:
        raise ValueError(f"no weights of a Mamba-1 language model: there is no {error}") from None
    except ValueError:
        raise ValueError("no weights of Mamba-1: A_log is not of shape (d, n)") from None
    if not torch.equal(weights.pop("lm_head.weight", embedding), embedding):
        raise ValueError("lm_head.weight differs from the embedding; here the head is tied to it")
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    vocabulary, d_model = embedding.shape
    model = MambaLM(vocabulary, d_model, layers, n, d // d_model, dt_rank, d_conv)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit: {' '.join(str(error).split())}") from None
    return model


def official_state_dict(model, style="transformers"):
    """The way back: the weights of a MambaLM by their official names, lm_head.weight included.

    style    "transformers": for MambaForCausalLM; "mamba_ssm": for state-spaces/mamba (1.x)
    Raises ValueError for another style.
    """
    if style not in ("transformers", "mamba_ssm"):
        raise ValueError(f"style must be \"transformers\" or \"mamba_ssm\", got {style!r}")
    embedding = "embeddings" if style == "transformers" else "embedding"
    weights = {"lm_head.weight": model.embedding.weight.detach().clone()}
    for name, weight in model.state_dict().items():
        name = name.replace("embedding", embedding).replace("path.", "").replace("s6.", "")
        weights["backbone." + name] = weight
    return weights


# --------------------------------------------------------------------------------------------------
# Generation: one token at a time, from the states.

@script
def draw(logits: Tensor, noise: Tensor, top_k: int) -> Tensor:
    """A token, (1,), from logits (1, vocabulary): the largest of logits + noise, of the top k.

    With noise from `gumbel` that is a draw from softmax(logits / temperature).
    """
    if top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], float("-inf"))
    return (logits + noise).argmax(1)


def gumbel(count, logits, temperature, generator):
    """temperature · Gumbel noise, (count, 1, vocabulary): minus the log of exponential noise."""
    noise = torch.empty(count, *logits.shape).exponential_(generator=generator)
    return (-temperature * noise.log()).to(logits)


@torch.inference_mode()
def generate_plainly(model, prompt, count, *, temperature=1.0, top_k=None, seed=0):
    """As `generate`, by `MambaLM.forward` alone: the same text but for rounding, not as fast."""
    generator, tokens, states = torch.Generator().manual_seed(seed), prompt.unsqueeze(0), None
    for _ in range(count):
        logits, states = model(tokens, states)                                 # (1, l, vocabulary)
        logits = logits[:, -1]
        tokens = draw(logits, gumbel(1, logits, temperature, generator)[0],
                      top_k or logits.shape[1]).unsqueeze(0)       # (1, 1): one by one from now on
        yield tokens.item()


# The fast way: skip this on a first reading. For a model this small `MambaLM.forward` spends most
# of a token's time on calls that have next to nothing to compute. So the equations are written out
# once more, for one token of one text, in TorchScript, CHUNK tokens per call.

CHUNK = 16           # few enough that the text still seems to appear token by token


@script
def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm and the linear map after it: the norm's weight is already in `weight`."""
    return torch.mm(x, weight).mul_(x.square().mean().add_(eps).rsqrt_())


@script
def _step(token: int, embedding: Tensor, head: Tensor, layers: List[List[Tensor]],
          states: List[List[Tensor]], eps: float) -> Tensor:
    """One token -> logits (1, vocabulary). Updates windows and h of the states in place."""
    stream = embedding[token:token + 1]                                        # (1, d_model)
    for weights, state in zip(layers, states):
        in_proj, kernel, bias, x_proj, dt_proj, dt_bias, A, D, out_proj = weights
        window, h = state                                                      # (w, d), (n, d)
        a, z = _normed(stream, in_proj, eps).chunk(2, 1)                       # (1, d) each
        window.copy_(torch.cat([window[1:], a]))
        x = F.silu((window * kernel).sum(0, keepdim=True).add_(bias))          # (1, d)
        dt, B, C = torch.mm(x, x_proj).split([dt_proj.shape[0], h.shape[0], h.shape[0]], 1)
        delta = F.softplus(torch.addmm(dt_bias, dt, dt_proj))                  # (1, d)
        # h_t = exp(Δ_t A) h_{t-1} + B_t (Δ_t x_t),  y_t = C_t h_t + D x_t
        h.mul_((delta * A).exp2_()).addcmul_(B.t(), delta * x)
        y = torch.mm(C, h).addcmul_(D, x).mul_(F.silu(z))                      # (1, d)
        stream = torch.addmm(stream, y, out_proj)                              # (1, d_model)
    return _normed(stream, head, eps)


@script
def _write(logits: Tensor, noise: Tensor, top_k: int, embedding: Tensor, head: Tensor,
           layers: List[List[Tensor]], states: List[List[Tensor]], eps: float
           ) -> Tuple[List[int], Tensor]:
    """A token for each row of noise, (count, 1, vocabulary): -> tokens, and the next logits."""
    tokens: List[int] = []
    for row in noise.unbind(0):
        token = int(draw(logits, row, top_k))
        logits = _step(token, embedding, head, layers, states, eps)
        tokens.append(token)
    return tokens, logits


def _lay_out(model, states):
    """Weights and states of one text as `_step` takes them: transposed, in float32 at least."""
    def cast(tensor):
        return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))

    def columns(tensor):
        return cast(tensor).t().contiguous()

    layers = []
    for layer in model.layers:
        mixer, conv1d, s6 = layer.mixer, layer.mixer.path.conv1d, layer.mixer.path.s6
        A = -torch.exp(cast(s6.A_log)) / math.log(2)               # exp(A) is exp2 of this, faster
        layers.append([columns(mixer.in_proj.weight * layer.norm.weight),
                       columns(conv1d.weight[:, 0]), cast(conv1d.bias), columns(s6.x_proj.weight),
                       columns(s6.dt_proj.weight), cast(s6.dt_proj.bias), columns(A), cast(s6.D),
                       columns(mixer.out_proj.weight)])
    # A window of w tokens: the oldest is pushed out as a new one comes in.
    states = [[F.pad(cast(state.window[0]), (0, 0, 1, 0)), columns(state.h[0]).clone()]
              for state in states]
    embedding = cast(model.embedding.weight)
    return embedding, columns(embedding * model.norm_f.weight), layers, states, model.norm_f.eps


@torch.inference_mode()
def generate(model, prompt, count, *, temperature=1.0, top_k=None, seed=0):
    """Continue a text: yields count tokens, one int after the other.

    model          a MambaLM
    prompt         (l,) int64, l ≥ 1
    temperature    ≥ 0: logits are divided by it; 0 always takes the most likely token
    top_k          draw among so many of the most likely tokens only, ≥ 1; None: among all
    seed           the same seed writes the same text
    Raises ValueError for a value outside these ranges, when the first token is asked for.
    """
    if prompt.ndim != 1 or len(prompt) == 0:
        raise ValueError(f"generate: prompt must have shape (l,), l ≥ 1, got {tuple(prompt.shape)}")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"generate: temperature must be ≥ 0 and top_k ≥ 1, got {temperature} and "
                         f"{top_k}")
    generator = torch.Generator().manual_seed(seed)
    logits, states = model(prompt.unsqueeze(0))
    laid_out = _lay_out(model, states)
    logits = logits[:, -1].to(laid_out[0].dtype)
    for start in range(0, count, CHUNK):
        noise = gumbel(min(CHUNK, count - start), logits, temperature, generator)
        tokens, logits = _write(logits, noise, top_k or logits.shape[1], *laid_out)
        yield from tokens


# --------------------------------------------------------------------------------------------------
# Training: how a stack starts, and what weight decay must leave alone.

def scale_residuals(blocks):
    """Divide each out_proj by √N, for N blocks: their sum starts as large as one (as in GPT-2)."""
    with torch.no_grad():
        for block in blocks:
            for name, weight in block.named_parameters():
                if name.endswith("out_proj.weight"):
                    weight.div_(len(blocks) ** 0.5)


def parameter_groups(model, weight_decay):
    """Groups for the optimizer: weight decay for matrices and kernels alone.

    A_log, D, biases, norms and tables of positions are scales and offsets, and zero is no natural
    value for them: decay on A_log would pull every A towards -1, and so the memories of all
    channels towards one length. The same holds for omega, the frequencies of rnn.py's S4.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("A_log", "omega", "position"))
        (decayed if matrix else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0}]


# --------------------------------------------------------------------------------------------------
# `python block.py`: one training step, and generation, beside other libraries: five minutes.
#
# `pip install transformers mambapy`, or one of them: what is not installed is left out. All have
# the same weights, so their losses must agree, and so must what they write. Without CUDA,
# transformers runs a loop over time in PyTorch, and mambapy a parallel scan.

def peers(model):
    """-> {library: (the model in it, tokens -> logits, (prompt, count) -> tokens it writes)}."""
    vocabulary, d_model = model.embedding.weight.shape
    def greedy(way):                     # temperature 0: always the most likely token
        return lambda prompt, count: list(way(model, prompt, count, temperature=0))

    ways = {"this project": (model, lambda tokens: model(tokens)[0], greedy(generate)),
            "its plain loop": (model, lambda tokens: model(tokens)[0], greedy(generate_plainly))}
    try:
        from transformers import MambaConfig, MambaForCausalLM
        hf = MambaForCausalLM(MambaConfig(vocab_size=vocabulary, hidden_size=d_model,
                                          num_hidden_layers=len(model.layers)))
        hf.load_state_dict(official_state_dict(model))
        ways["transformers"] = hf, lambda tokens: hf(tokens).logits, lambda prompt, count: (
            hf.generate(prompt[None], do_sample=False, min_new_tokens=count, max_new_tokens=count)
            [0, len(prompt):].tolist())
    except ImportError as error:
        print(f"without transformers: {error}")
    try:       # its language model imports CUDA packages: so its core, with our embedding and head
        from mambapy.mamba import Mamba as Core, MambaConfig
        core = Core(MambaConfig(d_model=d_model, n_layers=len(model.layers)))
        weights = official_state_dict(model, "mamba_ssm").items()
        core.load_state_dict({name.removeprefix("backbone."): weight for name, weight in weights
                              if ".layers." in name})
        ends = copy.deepcopy(nn.ModuleDict({"embedding": model.embedding, "norm": model.norm_f}))

        def head(x):
            return F.linear(ends["norm"](x), ends["embedding"].weight)

        @torch.no_grad()
        def write(prompt, count):        # the most likely token each time, by mambapy's own step
            caches = [(None, torch.zeros(1, 2 * d_model, 3)) for _ in model.layers]
            text = prompt.tolist()
            for i in range(len(prompt) + count - 1):
                x, caches = core.step(ends["embedding"](torch.tensor(text[i:i + 1])), caches)
                if i + 1 >= len(prompt):
                    text.append(head(x).argmax().item())
            return text[len(prompt):]

        ways["mambapy"] = (nn.ModuleList([core, ends]),
                           lambda tokens: head(core(ends["embedding"](tokens))), write)
    except ImportError as error:
        print(f"without mambapy: {error}")
    return ways


def main():
    """One thread, two sizes, one run: a table, and results/peers.csv.

    step_seconds          a training step: forward, backward and AdamW; the fastest of up to three
    tokens_per_second     of one text, 1,000 tokens (of the large model 64) after a prompt of 16,
                          always the most likely one
    """
    torch.set_num_threads(1)
    rows = []
    print(f"{'size':12s}{'library':16s}{'step, s':>10s}{'loss':>10s}{'tokens/s':>10s}  same text")
    for size, vocabulary, d_model, layers, shape, count in (
            ("small", 65, 128, 4, (32, 128), 1000), ("mamba-130m", 50280, 768, 24, (1, 256), 64)):
        torch.manual_seed(0)
        model = MambaLM(vocabulary, d_model, layers)
        tokens, text = torch.randint(vocabulary, (shape[0], shape[1] + 1)), None
        for name, (module, logits, write) in peers(model).items():
            write(tokens[0, :16], 64)    # scripts compile
            start = time.perf_counter()
            written = write(tokens[0, :16], count)
            speed, text = count / (time.perf_counter() - start), text or written
            optimizer, seconds = torch.optim.AdamW(module.parameters(), lr=0.0), []
            while len(seconds) < 3 and sum(seconds) < 10:          # the fastest, if there is time
                start = time.perf_counter()
                guess = logits(tokens[:, :-1]).flatten(0, 1)
                loss = F.cross_entropy(guess, tokens[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seconds.append(time.perf_counter() - start)
            rows.append({"size": size, "library": name, "batch": shape[0], "length": shape[1],
                         "step_seconds": f"{min(seconds):.2f}", "loss": f"{loss.item():.4f}",
                         "tokens_per_second": f"{speed:.0f}", "same_text": written == text,
                         "threads": 1, "device": f"cpu {platform.machine()}",
                         "torch": torch.__version__, "command": "python block.py"})
            print(f"{size:12s}{name:16s}{min(seconds):10.2f}{loss.item():10.4f}{speed:10.0f}  "
                  f"{written == text}", flush=True)
    try:
        os.makedirs("results", exist_ok=True)
        with open("results/peers.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        sys.exit(f"block.py: cannot write results/ here: {error}")
    print("wrote results/peers.csv")


if __name__ == "__main__":
    main()
