"""block.py: what Mamba wraps around the scan: gate, short convolution, norm, residual; and the LM.

    a, z = in_proj(norm(x))              widen d_model to twice d: a goes in, z is the gate
    y    = S6(SiLU(conv(a)))             each token meets the three before it, then the state
    x    = x + out_proj(y · SiLU(z))     the gate lets through what this token needs

One block does the work of a Transformer's two: S6 mixes along the sequence, as attention does, and
in_proj and out_proj mix along the channels, as the MLP does. The convolution is causal and four
tokens long. It gives Δ, B and C a glimpse of the neighbourhood, so that "write this down" can
depend on more than one token.

A block can stop and go on. `State` is all it remembers of a sequence, however long: a window of the
convolution's last three inputs, and the state h of the scan. `MambaLM` stacks blocks between an
embedding and a head that is the embedding again, and its state is one State per block. `generate`
writes text from that state, at the same cost per token however long the text has become.

Symbols: the glossary of s6.py; besides, d_model is the width of the residual stream, and d that
inside the block, twice as wide. Left out: dropout, and the fused kernel's trick of computing the
gate within the scan.
Read before: s6.py. Read next: vision.py, the same block for images.
Source: Gu & Dao 2023, section 3.4 and figure 3; initialisation as in the authors' code.
"""
# No `from __future__ import annotations` here: TorchScript reads the annotations of this file.
from typing import List, NamedTuple, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from s6 import S6, check_sequence, script


# --------------------------------------------------------------------------------------------------
# The parts: a norm, a short causal convolution, and the path from one to the scan.

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def causal_conv(x, weight, bias, window=None):
    """y_t = bias + Σ_i weight_i x_{t-w+1+i}, i = 0 … w-1, channel by channel: (b, l, d) both.

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
    """a ↦ S6(SiLU(conv(a))), (b, l, d) both: one reading of a sequence, in one direction."""

    def __init__(self, d, n=16, dt_rank=None, d_conv=4):
        super().__init__()
        self.conv1d = nn.Conv1d(d, d, d_conv, groups=d)     # holds the weights: see causal_conv
        self.s6 = S6(d, n, dt_rank)

    def forward(self, a, state=None, mask=None, *, method="auto", return_state=False):
        """a (b, l, d) -> y (b, l, d), and with return_state the State after the last token.

        state   the State to go on from, or None
        mask    (b, l) or None: 0 for padding, wherever it stands. The state passes over padding as
                if it were not there, and y is 0 there
        Raises ValueError for another width, and as `selective_scan` does.
        """
        check_sequence(self, a, self.conv1d.in_channels)
        if mask is not None:
            # The convolution would see padding between two words. So padding moves behind the last
            # real token, where a causal model does not look, and in the end y moves back.
            padding = (mask == 0).unsqueeze(-1)
            order = torch.argsort((mask == 0).int(), dim=1, stable=True)
            a = _take(a.masked_fill(padding, 0), order)
        window, h0 = (None, None) if state is None else state
        out = F.silu(causal_conv(a, self.conv1d.weight, self.conv1d.bias, window))
        out = self.s6(out, h0, None if mask is None else mask.gather(1, order), method=method,
                      return_state=return_state)
        y, h = out if return_state else (out, None)
        if mask is not None:
            y = _take(y, torch.argsort(order, dim=1)).masked_fill(padding, 0)
        return (y, State(self._next_window(a, window, mask), h)) if return_state else y

    def _next_window(self, a, window, mask):
        """The last w-1 real tokens of window and a, (b, w-1, d)."""
        b, l, d = a.shape
        size = self.conv1d.kernel_size[0] - 1
        window = a.new_zeros(b, size, d) if window is None else window.to(a.dtype)
        tokens = torch.cat([window, a], 1)                                     # (b, w-1+l, d)
        if mask is None:
            return tokens[:, l:].clone()     # a view would keep all of them in memory
        # Behind the window, real token j stands at size + j: the last `size` of them at count + …
        last = (mask != 0).sum(1, keepdim=True) + torch.arange(size, device=a.device)  # (b, w-1)
        return _take(tokens, last)


# --------------------------------------------------------------------------------------------------
# The block.

class Mamba(nn.Module):
    """The mixer, without norm and residual: (b, l, d_model) both. Its forward is as ConvS6's."""

    def __init__(self, d_model, n=16, expand=2, dt_rank=None, d_conv=4):
        super().__init__()
        d = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.path = ConvS6(d, n, dt_rank, d_conv)
        self.out_proj = nn.Linear(d, d_model, bias=False)

    def forward(self, x, state=None, mask=None, *, method="auto", return_state=False):
        check_sequence(self, x, self.in_proj.in_features)
        a, z = self.in_proj(x).chunk(2, dim=-1)                                # (b, l, d) each
        out = self.path(a, state, mask, method=method, return_state=return_state)
        y, state = out if return_state else (out, None)
        y = self.out_proj(y * F.silu(z))                                       # (b, l, d_model)
        return (y, state) if return_state else y


class MambaBlock(nn.Module):
    """x ↦ x + Mamba(norm(x)): pre-norm and residual. Padding comes out as it went in."""

    def __init__(self, d_model, n=16, expand=2, dt_rank=None, d_conv=4):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = Mamba(d_model, n, expand, dt_rank, d_conv)

    def forward(self, x, state=None, mask=None, *, method="auto", return_state=False):
        """x (b, l, d_model) -> the same shape, and with return_state the State after x."""
        check_sequence(self, x, len(self.norm.weight))
        out = self.mixer(self.norm(x), state, mask, method=method, return_state=return_state)
        return (x + out[0], out[1]) if return_state else x + out


# --------------------------------------------------------------------------------------------------
# The language model.

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

    def forward(self, tokens, states=None, mask=None, *, method="auto", return_state=False):
        """tokens (b, l) -> logits (b, l, vocabulary), and with return_state a State per layer.

        states   what an earlier call returned, to go on from; None at the beginning of a text
        mask     (b, l) or None: 0 for padding, where the logits mean nothing
        """
        x, new = self.embedding(tokens), []                                    # (b, l, d_model)
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            out = layer(x, state, mask, method=method, return_state=return_state)
            x, state = out if return_state else (out, None)
            new.append(state)
        logits = F.linear(self.norm_f(x), self.embedding.weight)
        return (logits, new) if return_state else logits


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


# --------------------------------------------------------------------------------------------------
# Generation: the same equations for one token of one text, in the fewest calls.
#
# `MambaLM.forward` takes one token as it takes a batch of long texts, and most of its time goes
# into calls that have next to nothing to compute. So the step is written out once more: a hundred
# calls in one script, which makes 16 tokens before it returns to Python, on weights laid out
# beforehand as the products read them. For half a million parameters that is ten times as fast.

CHUNK = 16           # tokens that one call makes: few enough to seem to appear one by one


@script
def _project(x: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
    """A norm and the projection that follows it: x (1, d_model) -> (1, columns of weight).

    RMSNorm is x / √(mean(x²) + eps) = √d_model x / √(‖x‖² + d_model eps), times its own weight. The
    last and √d_model are in `weight` already, and floor is √(d_model eps).
    """
    return torch.mm(x, weight).div_(torch.hypot(torch.linalg.vector_norm(x), floor))


@script
def _step(token: int, place: int, embedding: Tensor, first: Tensor, head: Tensor, floor: Tensor,
          layers: List[List[Tensor]], states: List[List[Tensor]]) -> Tensor:
    """Token number `place` since `_lay_out` -> logits (1, vocabulary). Updates states in place.

    The other arguments are what `_lay_out` makes.
    """
    x = embedding[token:token + 1]                                             # (1, d_model)
    for i, (weights, state) in enumerate(zip(layers, states)):
        w_in, kernels, x_proj, dt_proj, dt_bias, A, D, w_out = weights
        ring, h = state                                                        # (w+1, d), (n, d)
        if i == 0 and first.shape[0] > 0:
            wide = first[token:token + 1]
        else:
            wide = _project(x, w_in, floor)
        a, z = wide.chunk(2, 1)                                                # (1, d) each
        # The newest input takes the place of the oldest; the kernel is rolled to match.
        at = (place + kernels.shape[0] - 1) % kernels.shape[0]
        ring[at] = a[0]
        u = F.silu((ring * kernels[at]).sum(0, keepdim=True), inplace=True)    # (1, d)
        dt, B, C = torch.mm(u, x_proj).split([dt_proj.shape[0], h.shape[0], h.shape[0]], 1)
        delta = F.softplus(torch.addmm(dt_bias, dt, dt_proj))                  # (1, d)
        # h_t = exp(Δ_t A) h_{t-1} + B_t (Δ_t x_t),  y_t = C_t h_t + D x_t
        h.mul_((A * delta).exp_()).addcmul_(B.t(), delta * u)
        y = torch.mm(C, h).addcmul_(u, D).mul_(F.silu(z))                      # (1, d)
        x = torch.addmm(x, y, w_out)                                           # (1, d_model)
    return _project(x, head, floor)


@script
def _write(logits: Tensor, noise: Tensor, temperature: float, top_k: int, place: int,
           embedding: Tensor, first: Tensor, head: Tensor, floor: Tensor,
           layers: List[List[Tensor]], states: List[List[Tensor]]) -> Tuple[List[int], Tensor]:
    """Draw a token for each row of noise, (count, 1, vocabulary): -> tokens, the next logits."""
    tokens: List[int] = []
    for row in noise.unbind(0):
        if top_k < logits.shape[1]:
            least = logits.topk(top_k)[0][:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        # The largest of logit / temperature + Gumbel noise is a draw from their softmax.
        token = int(torch.add(logits, row, alpha=temperature).argmax())
        logits = _step(token, place + len(tokens), embedding, first, head, floor, layers, states)
        tokens.append(token)
    return tokens, logits


def _lay_out(model, states):
    """A MambaLM and the states of one text -> what `_step` takes after token and place.

    Of a state, the window becomes a ring of w inputs, with a row of ones below for the bias. What
    the first layer projects depends on the token alone: for a small vocabulary, it is a table.
    """
    dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)
    root = model.embedding.embedding_dim ** 0.5

    def cast(tensor):
        return tensor.to(dtype)

    def columns(weight, norm=None):
        scaled = cast(weight) if norm is None else root * cast(norm.weight) * cast(weight)
        return scaled.t().contiguous()

    layers = []
    for layer in model.layers:
        mixer, conv1d, s6 = layer.mixer, layer.mixer.path.conv1d, layer.mixer.path.s6
        taps, bias = columns(conv1d.weight[:, 0]), cast(conv1d.bias).unsqueeze(0)      # (w, d)
        kernels = [torch.cat([taps.roll(at + 1, 0), bias]) for at in range(len(taps))]
        layers.append([columns(mixer.in_proj.weight, layer.norm), torch.stack(kernels),
                       columns(s6.x_proj.weight), columns(s6.dt_proj.weight),
                       cast(s6.dt_proj.bias), columns(-torch.exp(cast(s6.A_log))), cast(s6.D),
                       columns(mixer.out_proj.weight)])
    embedding = cast(model.embedding.weight)
    floor = embedding.new_tensor(root * model.norm_f.eps ** 0.5)
    first = embedding[:0]
    if layers and len(embedding) <= 1024:
        first = torch.cat([_project(x, layers[0][0], floor) for x in embedding.split(1)])
    copies = [[F.pad(F.pad(cast(state.window[0]), (0, 0, 0, 1)), (0, 0, 0, 1), value=1.0),
               columns(state.h[0]).clone()] for state in states]
    return embedding, first, columns(embedding, model.norm_f), floor, layers, copies


@torch.inference_mode()
def generate(model, prompt, count, *, temperature=1.0, top_k=None, seed=0):
    """Continue a text: yields count tokens, as lists of at most CHUNK ints.

    model          a MambaLM
    prompt         (l,) int64, l ≥ 1
    temperature    ≥ 0: logits are divided by it; 0 always takes the most likely token
    top_k          draw among so many of the most likely tokens only, ≥ 1; None: among all
    seed           the same seed writes the same text
    Raises ValueError for a value outside these ranges, when the first tokens are asked for.
    """
    if prompt.ndim != 1 or len(prompt) == 0:
        raise ValueError(f"generate: prompt must have shape (l,), l ≥ 1, got {tuple(prompt.shape)}")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"generate: temperature must be ≥ 0 and top_k ≥ 1, got {temperature} and "
                         f"{top_k}")
    logits, states = model(prompt.unsqueeze(0), return_state=True)
    laid_out = _lay_out(model, states)
    logits = logits[:, -1].to(laid_out[0].dtype)
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k or logits.shape[1], logits.shape[1])
    for start in range(0, count, CHUNK):
        # Gumbel noise: minus the logarithm of an exponential variable
        noise = -torch.empty(CHUNK, *logits.shape).exponential_(generator=generator).log()
        noise = noise[:count - start].to(logits)
        tokens, logits = _write(logits, noise, float(temperature), top_k, start, *laid_out)
        yield tokens


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
    channels towards one length. Nor is it for omega, the frequencies of rnn.py's S4.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("A_log", "omega", "position"))
        (decayed if matrix else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0}]
