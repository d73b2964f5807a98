"""block.py: what Mamba wraps around the scan: gate, short convolution, norm, residual; and the LM.

         x  (b, l, d_model)
         ├───────────────┐
         │             norm
         │            in_proj          widen d_model to twice d = 2 d_model
         │           ┌───┴───┐
         │         a │       │ z       (b, l, d) each
         │         conv      │         each token meets the three before it
         │         SiLU      │
         │          S6      SiLU       S6 remembers; SiLU(z), the gate, scales what it gives
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
state returns two things: `y, state = layer(x, state)`; without a state it begins anew. A single
token is a sequence of length 1: then the layer is one step of the recurrence.

`MambaLM` stacks blocks between an embedding and a head with the same weights. Its states are one
State per block. It has no position vectors: the recurrence itself knows the order of the tokens.
`generate` writes text, at the same cost per token however long the text has become. `load_official`
and `official_state_dict` convert weights from and to the official models.

A state of constant size has its price. A block keeps 2·d_model·n numbers, h, of all that it has
read; a layer of attention keeps 2·d_model·l, the keys and values of l tokens. The two are equal at
l = n = 16. In longer texts a state must choose what to keep, and so exact copying and recall are
worse than attention's (Jelassi et al. 2024, "Repeat After Me"; Arora et al. 2024, "Zoology").

Symbols: the glossary of s6.py; besides, d_model is the width of the residual stream, and d that
inside the block.
Read before: s6.py. Read next: vision.py, the same block for images.
Source: Gu & Dao 2023, section 3.4 and figure 3; initialisation as in the authors' code.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from s6 import S6, check_sequence, choose, find_padding, full


# --------------------------------------------------------------------------------------------------
# The parts: a norm, a short causal convolution, and ConvS6: that convolution and then S6.

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension (Zhang & Sennrich 2019).

    Not nn.RMSNorm: under autocast it warns and is slower unless its weight has x's dtype.
    """

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def causal_conv(x, weight, bias):
    """x (b, w-1+l, d) -> y (b, l, d): y_t = bias + Σ_i weight_i x_{t+i}, i = 0 … w-1.

    Channel by channel: weight (d, 1, w), bias (d,). x begins with the w-1 inputs before the first
    token. So x_{t+w-1} is token t, and y_t sees it and the w-1 inputs before it.
    """
    w = weight.shape[-1]
    if x.shape[1] < w:                   # no token
        return x[:, :0]
    if x.shape[1] == w:                  # one token: seven times as fast as calling conv2d
        return (x * weight.squeeze(1).t()).sum(1, keepdim=True) + bias
    # (b, l, d) in memory is an image of 1×l pixels with its d channels last, the layout that suits
    # PyTorch's 2-d convolution. A conv1d would copy x to (b, d, l) and y back: 1.5 times the time.
    image = x.transpose(1, 2).unsqueeze(2)                                     # (b, d, 1, w-1+l)
    y = F.conv2d(image, weight.unsqueeze(2), bias, groups=len(weight))
    return y.squeeze(2).transpose(1, 2)


class State(NamedTuple):
    """What a block remembers of the tokens it has read. Its size is the same after any number."""
    window: Tensor           # (b, w-1, d) the last inputs of the convolution
    h: Tensor                # (b, d, n)   the state of the scan


def _take(x, index):
    """The tokens at the places in index: x (b, l, d), index (b, k) -> (b, k, d)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class ConvS6(nn.Module):
    """Convolution, SiLU, S6, in one direction: a (b, l, d) -> y (b, l, d) and a State.

    conv1d only holds the weights of `causal_conv`. It is never called, so hooks on it never run,
    and torch.nn.utils.prune, which needs them, does not work; torch.nn.utils.parametrizations does.
    """

    def __init__(self, d, n=16, d_conv=4, **s6):
        super().__init__()
        self.conv1d = nn.Conv1d(d, d, d_conv, groups=d)
        self.s6 = S6(d, n, **s6)

    def forward(self, a, state=None, mask=None):
        """a (b, l, d) -> y (b, l, d), and the State after the last token.

        state   the State to go on from, or None
        mask    (b, l) of bool or int, or None: 1 for a real token, 0 for padding, wherever it
                stands. The state passes over padding as if it were not there, and y is 0 there
        Raises ValueError for another width, another mask, and as `selective_scan` does.
        """
        conv1d = self.conv1d
        w = conv1d.kernel_size[0]
        check_sequence(self, a, conv1d.in_channels)
        b, _, d = a.shape
        if state is None:
            state = State(a.new_zeros(b, w - 1, d), None)
        window, h0 = state
        if window.shape != (b, w - 1, d):
            raise ValueError(f"ConvS6: the window of the state must have shape {(b, w - 1, d)}, "
                             f"got {tuple(window.shape)}")
        if mask is not None:
            # The convolution would see padding between two words. So padding moves behind the last
            # real token, where no real token sees it, and in the end y moves back.
            padding = find_padding(mask, a)                                    # (b, l, 1)
            order = padding.squeeze(-1).int().argsort(dim=1, stable=True)      # (b, l)
            a = _take(a.masked_fill(padding, 0), order)
            mask = mask.gather(1, order)

        seen = torch.cat([window.to(a.dtype), a], 1)                           # (b, w-1+l, d)
        x = F.silu(causal_conv(seen, conv1d.weight, conv1d.bias))              # (b, l, d)
        y, h = self.s6(x, h0, mask)

        # The next window: the last w-1 real tokens.
        if mask is None:                 # a copy: the state would keep all of `seen` otherwise
            return y, State(seen[:, a.shape[1]:].clone(), h)
        # In `seen` the `count` real tokens of a follow w-1 older ones, and padding is behind them:
        # so the window begins at `count`.
        count = (mask != 0).sum(1, keepdim=True)                               # (b, 1)
        window = _take(seen, count + torch.arange(w - 1, device=a.device))     # (b, w-1, d)
        y = _take(y, order.argsort(dim=1)).masked_fill(padding, 0)
        return y, State(window, h)


# --------------------------------------------------------------------------------------------------
# The block.

class Mamba(nn.Module):
    """Mamba without norm and residual: x (b, l, d_model) -> y, the same shape, and a State.

    expand      d = expand · d_model
    settings    of ConvS6 and of S6: d_conv, dt_rank, discretization, selection
    """

    def __init__(self, d_model, n=16, expand=2, **settings):
        super().__init__()
        d = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.path = ConvS6(d, n, **settings)
        self.out_proj = nn.Linear(d, d_model, bias=False)

    def forward(self, x, state=None, mask=None):
        """State, mask and errors as for ConvS6; y is 0 at padding whose x is finite."""
        check_sequence(self, x, self.in_proj.in_features)
        a, z = self.in_proj(x).chunk(2, dim=-1)                                # (b, l, d) each
        y, state = self.path(a, state, mask)
        return self.out_proj(y * F.silu(z)), state                             # (b, l, d_model)


class MambaBlock(nn.Module):
    """x -> x + Mamba(norm(x)), State: pre-norm and residual. Padding comes out as 0."""

    def __init__(self, d_model, n=16, **settings):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = Mamba(d_model, n, **settings)

    def forward(self, x, state=None, mask=None):
        """x (b, l, d_model) -> the same shape, and the State after x. Errors as for ConvS6."""
        check_sequence(self, x, len(self.norm.weight))
        if mask is not None:             # a NaN in the padding would reach the gradients
            x = x.masked_fill(find_padding(mask, x), 0)
        y, state = self.mixer(self.norm(x), state, mask)
        return x + y, state


def scale_residuals(blocks):
    """Divide each out_proj by √N: the sum of N blocks starts as large as one block, as in GPT-2."""
    with torch.no_grad():
        for block in blocks:
            for name, weight in block.named_parameters():
                if name.endswith("out_proj.weight"):
                    weight.div_(len(blocks) ** 0.5)


# --------------------------------------------------------------------------------------------------
# The language model.

class MambaLM(nn.Module):
    """Tokens (b, l) of int64 -> logits (b, l, vocabulary) for the token that comes next.

    settings    of the blocks: n, expand, d_conv, dt_rank, discretization, selection
    """

    def __init__(self, vocabulary, d_model=128, layers=4, **settings):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        # The head is the same matrix: 0.02 keeps the first logits near 0, so that the first loss
        # is near ln(vocabulary).
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(MambaBlock(d_model, **settings) for _ in range(layers))
        self.norm_f = RMSNorm(d_model)
        scale_residuals(self.layers)

    def forward(self, tokens, states=None, mask=None):
        """tokens (b, l) -> logits (b, l, vocabulary), and a list of one State per layer.

        states   what an earlier call returned, to go on from; None at the beginning of a text
        mask     (b, l) or None: 0 for padding, where the logits mean nothing
        Raises ValueError for tokens of another shape, and states of another model or batch.
        """
        if tokens.ndim != 2:
            raise ValueError(f"MambaLM: tokens must have shape (b, l), got {tuple(tokens.shape)}")
        states = states or [None] * len(self.layers)
        new = []
        x = self.embedding(tokens)                                             # (b, l, d_model)
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state, mask)
            new.append(state)
        return F.linear(self.norm_f(x), self.embedding.weight), new


# --------------------------------------------------------------------------------------------------
# The official weights: the same tensors, by other names.

NAMES = {  # in an official mixer: here
    "conv1d.": "path.conv1d.",
    "x_proj.": "path.s6.x_proj.",
    "dt_proj.": "path.s6.dt_proj.",
    "A_log": "path.s6.A_log",
    "D": "path.s6.D",
}


def _unwrapped(name):
    """The name of a weight without what torch.compile and DistributedDataParallel put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def load_official(state_dict):
    """Weights by the names of state-spaces/mamba (1.x) or transformers -> a MambaLM with them.

    All sizes are read from the shapes; a padded vocabulary stays padded. The epsilon of the norms
    is not among the weights: a model with another one than 1e-5 loads, and gives other logits.
    Raises ValueError if this is no Mamba-1 language model with a tied head, and RuntimeError for
    weights that are missing, or that such a model does not have.
    """
    weights = {}
    for name, weight in state_dict.items():
        name = _unwrapped(name).removeprefix("backbone.").replace("embeddings.", "embedding.")
        for official, own in NAMES.items():
            name = name.replace(f"mixer.{official}", f"mixer.{own}")
        weights[name] = weight
    prefix = "layers.0.mixer.path."
    try:
        embedding = weights["embedding.weight"]
        d, n = weights[prefix + "s6.A_log"].shape
        dt_rank = weights[prefix + "s6.dt_proj.weight"].shape[-1]
        d_conv = weights[prefix + "conv1d.weight"].shape[-1]
    except (KeyError, ValueError) as error:
        raise ValueError(f"no weights of a Mamba-1 language model: {error}") from None
    if not torch.equal(weights.pop("lm_head.weight", embedding), embedding):
        raise ValueError("lm_head.weight differs from the embedding; here the head is tied to it")
    vocabulary, d_model = embedding.shape
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    model = MambaLM(vocabulary, d_model, len(layers), n=n, expand=d // d_model, dt_rank=dt_rank,
                    d_conv=d_conv)
    model.load_state_dict(weights)
    return model


def official_state_dict(model, style="transformers"):
    """The way back: the weights of a MambaLM by their official names, lm_head.weight included.

    style    "transformers": for MambaForCausalLM; "mamba_ssm": for state-spaces/mamba (1.x)
    All weights are copies. Raises ValueError for another style, and for settings of S6 with which
    the weights mean something else; RuntimeError for weights that no official model has, as those
    of an adapter: merge it first.
    """
    choose("style", style, ("transformers", "mamba_ssm"))
    for module in model.modules():
        if isinstance(module, S6) and (module.discretization, module.selection) != ("euler", "all"):
            raise ValueError('official models have discretization "euler" and selection "all"')
    weights = {}
    for name, weight in model.state_dict().items():
        name = _unwrapped(name)
        for official, own in NAMES.items():
            name = name.replace(own, official)
        if style == "transformers":
            name = name.replace("embedding.", "embeddings.")
        weights[f"backbone.{name}"] = weight.detach().clone()
        if name.startswith("embedding"):
            weights["lm_head.weight"] = weight.detach().clone()
    load_official(weights)               # raises an error if they would not load
    return weights


# --------------------------------------------------------------------------------------------------
# Generation: one token at a time, from the states.

def sample(logits, temperature, top_k, generator):
    """Sample a token for each row of logits (b, vocabulary), of the top_k likeliest: (b,) int64.

    The Gumbel-max trick: add noise -log(e), with e from the exponential distribution, to logits /
    temperature. Then the largest sum is at token i with the probability that softmax(logits /
    temperature) gives it. Below, that sum is multiplied by the temperature, which leaves the
    largest where it is. So a temperature of 0 needs no case of its own, and takes the likeliest
    token. Raises ValueError for logits that are not finite.
    """
    logits = full(logits)                # in bfloat16 many sums would be equal
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite: these weights cannot be used")
    if top_k is not None and top_k < logits.shape[1]:
        lowest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
    return (logits + temperature * noise.to(logits)).argmax(1)


@torch.inference_mode()
def generate(model, prompt, count, *, temperature=1.0, top_k=None, seed=0):
    """Continue a text: yields count tokens, one int after the other.

    model          a MambaLM
    prompt         (l,) int64, l ≥ 1
    count          ≥ 0
    temperature    ≥ 0: logits are divided by it; 0 always takes the most likely token
    top_k          draw among so many of the most likely tokens only, ≥ 1; None: among all
    seed           the same seed writes the same text
    Raises ValueError, when the first token is asked for, for another temperature or prompt.
    """
    if prompt.ndim != 1 or len(prompt) == 0:
        raise ValueError(f"generate: prompt must have shape (l,), l ≥ 1, got {tuple(prompt.shape)}")
    if not 0 <= temperature < math.inf:              # NaN fails this, too
        raise ValueError(f"generate: temperature must be ≥ 0 and finite, got {temperature}")
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt.unsqueeze(0)                                               # (1, l)
    states = None
    for _ in range(count):
        logits, states = model(tokens, states)                                 # (1, l, vocabulary)
        token = sample(logits[:, -1], temperature, top_k, generator)           # (1,)
        yield token.item()
        tokens = token.unsqueeze(1)                                            # (1, 1)


# --------------------------------------------------------------------------------------------------
# For the optimizer.

def parameter_groups(model, weight_decay):
    """Groups for the optimizer: weight decay for matrices and kernels alone.

    Spared are vectors (biases, norms, D) and the matrices that a module names in `no_decay`: A_log,
    tables of positions. Decay on A_log would pull every A towards -1, and so the n time scales of a
    channel towards one.
    """
    decayed = []
    spared = []
    for name, parameter in model.named_parameters():
        owner, _, own_name = name.rpartition(".")
        no_decay = getattr(model.get_submodule(owner), "no_decay", ())
        if parameter.ndim >= 2 and own_name not in no_decay:
            decayed.append(parameter)
        else:
            spared.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0}]
