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
state returns two things: `y, state = layer(x, state)`; without a state it begins anew. With a state
x may be a sequence, (b, l, …), or one token, (b, …), which takes the recurrence once.

`MambaLM` stacks blocks between an embedding and a head that is the embedding again, and its states
are one State per block. It has no positions: the recurrence itself knows the order of the tokens.
`generate` writes text, at the same cost per token however long the text has become. Weights come
from, and go back to, the official models by their names.

The price of a state of constant size. A block keeps h, d·n = 2·d_model·n numbers, of all that it
has read (and the window); a layer of attention keeps 2·d_model·l, the keys and values of l tokens.
The two are equal at l = n = 16 tokens. From there on a state must choose what to keep, and so exact
copying and recall over long texts are worse than attention's (Jelassi et al. 2024, "Repeat After
Me"; Arora et al. 2024, "Zoology"). Models that need both mix the two kinds of layers.

Symbols: the glossary of s6.py; besides, d_model is the width of the residual stream, and d that
inside the block.
Read before: s6.py. Read next: vision.py, the same block for images.
Source: Gu & Dao 2023, section 3.4 and figure 3; initialisation as in the authors' code.
"""
import copy
import math
import platform
import sys
import time
import warnings
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from s6 import S6, check_folders, check_sequence, full, kept_for_backward, write_rows


# --------------------------------------------------------------------------------------------------
# The parts: a norm, a short causal convolution, and the path from one to the scan.

class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension (Zhang & Sennrich 2019).

    Not nn.RMSNorm: under autocast x may be bfloat16, and nn.RMSNorm then gives a warning and takes
    a slower way. Here the weight is cast to x's dtype.
    """

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def causal_conv(x, weight, bias):
    """x (b, w-1+l, d) -> y (b, l, d): y_t = bias + Σ_i weight_i x_{t+i}, i = 0 … w-1.

    Channel by channel: weight (d, 1, w), bias (d,). The first w-1 inputs come before the first
    token. So y_t sees token t and the w-1 inputs before it.
    """
    if x.shape[1] < weight.shape[-1]:    # no token
        return x[:, :0]
    # (b, l, d) in memory is an image of 1×l pixels with its d channels last, the layout that suits
    # PyTorch's 2-d convolution. A conv1d would copy x to (b, d, l) and y back, half the cost again.
    image = x.transpose(1, 2).unsqueeze(2)                                     # (b, d, 1, w-1+l)
    y = F.conv2d(image, weight.unsqueeze(2), bias, groups=len(weight))
    return y.squeeze(2).transpose(1, 2)


class State(NamedTuple):
    """What a block remembers of the tokens it has read. Its size is the same after any number."""
    window: Tensor           # (b, w-1, d) the last inputs of the convolution
    h: Tensor                # (b, d, n)   the state of the scan


def _take(x, index):
    """Tokens by their places: x (b, l, d), index (b, k) -> (b, k, d)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class ConvS6(nn.Module):
    """a (b, l, d) -> y = S6(SiLU(conv(a))), (b, l, d), State: reads a sequence in one direction."""

    def __init__(self, d, n=16, d_conv=4, **s6):
        super().__init__()
        self.conv1d = nn.Conv1d(d, d, d_conv, groups=d)     # holds the weights: see causal_conv
        self.s6 = S6(d, n, **s6)

    def forward(self, a, state=None, mask=None):
        """a (b, l, d) -> y (b, l, d), and the State after the last token; or (b, d) -> (b, d).

        state   the State to go on from, or None
        mask    (b, l) or None: 0 for padding, wherever it stands. The state passes over padding as
                if it were not there, and y is 0 there
        Raises ValueError for another width, another mask, and as `selective_scan` does.
        """
        conv1d, w = self.conv1d, self.conv1d.kernel_size[0]
        check_sequence(self, a, conv1d.in_channels, mask, state)
        b, d = a.shape[0], a.shape[-1]
        if state is None:
            state = State(a.new_zeros(b, w - 1, d), None)
        window, h0 = state
        if window.shape != (b, w - 1, d):
            raise ValueError(f"ConvS6: the window of the state must have shape {(b, w - 1, d)}, "
                             f"got {tuple(window.shape)}")
        if a.ndim == 2:
            return self._one_token(a, window, h0)
        if mask is not None:
            # The convolution would see padding between two words. So padding moves behind the last
            # real token, where no real token sees it, and in the end y moves back.
            padding = (mask == 0).unsqueeze(-1)
            order = torch.argsort((mask == 0).int(), dim=1, stable=True)
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
        y = _take(y, torch.argsort(order, dim=1)).masked_fill(padding, 0)
        return y, State(window, h)

    def _one_token(self, a, window, h):
        """The convolution and the recurrence once: a (b, d), and a State -> y (b, d), State."""
        # (Calling conv2d, as `causal_conv` does, is seven times as slow for one token.)
        window = torch.cat([window, a.unsqueeze(1)], 1)                        # (b, w, d)
        kernel = self.conv1d.weight.squeeze(1).t()                             # (w, d)
        x = F.silu((window * kernel).sum(1) + self.conv1d.bias)                # (b, d)
        y, h = self.s6(x, h)
        return y, State(window[:, 1:], h)


# --------------------------------------------------------------------------------------------------
# The block.

class Mamba(nn.Module):
    """The mixer, without norm and residual: x (b, l, d_model) -> y, the same shape, and a State.

    expand      d = expand · d_model
    settings    of ConvS6 and of S6: d_conv, dt_rank, discretization, selection
    """

    def __init__(self, d_model, n=16, expand=2, **settings):
        super().__init__()
        d = expand * d_model
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.path = ConvS6(d, n, **settings)
        self.out_proj = nn.Linear(d, d_model, bias=False)

    def forward(self, x, state=None, mask=None):
        """State, mask and errors as for ConvS6; y is 0 at padding whose x is finite."""
        check_sequence(self, x, self.d_model, mask, state)
        a, z = self.in_proj(x).chunk(2, dim=-1)                                # (b, l, d) each
        y, state = self.path(a, state, mask)
        return self.out_proj(y * F.silu(z)), state                             # (b, l, d_model)


class MambaBlock(nn.Module):
    """x -> x + Mamba(norm(x)), State: pre-norm and residual. Padding comes out as it went in."""

    def __init__(self, d_model, n=16, **settings):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = Mamba(d_model, n, **settings)

    def forward(self, x, state=None, mask=None, *, return_state=True):
        """x (b, l, d_model) -> the same shape, and the State after x. Errors as for ConvS6.

        return_state    has no effect; the S4Block of rnn.py needs it, and PixelLM calls both alike
        """
        check_sequence(self, x, self.mixer.d_model, mask, state)
        real = x
        if mask is not None:             # a NaN in the padding would reach the gradients
            real = x.masked_fill((mask == 0).unsqueeze(-1), 0)
        y, state = self.mixer(self.norm(real), state, mask)
        return x + y, state


# --------------------------------------------------------------------------------------------------
# The language model, and the official weights.

class MambaLM(nn.Module):
    """Tokens (b, l) of int64 -> logits (b, l, vocabulary) for the token that comes next.

    A prompt goes through in one call of the model, which returns states. From these it goes on, one
    token at a time, each at the same cost however long the text has become.

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

        With states tokens may also be one of each text, (b,): -> logits (b, vocabulary), states.

        states   what an earlier call returned, to go on from; None at the beginning of a text
        mask     (b, l) or None: 0 for padding, where the logits mean nothing
        Raises ValueError for tokens of another shape, and states of another model or batch.
        """
        if tokens.ndim != 2 and not (tokens.ndim == 1 and states is not None):
            raise ValueError(f"MambaLM: tokens must have shape (b, l), got {tuple(tokens.shape)}")
        if states is not None and len(states) != len(self.layers):
            raise ValueError(f"MambaLM: there are {len(states)} states for {len(self.layers)} "
                             f"layers")
        x, new = self.embedding(tokens), []                                    # (b, l, d_model)
        for layer, state in zip(self.layers, states or [None] * len(self.layers)):
            x, state = layer(x, state, mask)
            new.append(state)
        return F.linear(self.norm_f(x), self.embedding.weight), new

    def empty_states(self, b):
        """The states of b texts before their first token: zeros, which is what None stands for."""
        states = []
        for layer in self.layers:
            conv1d, s6 = layer.mixer.path.conv1d, layer.mixer.path.s6
            window = s6.D.new_zeros(b, conv1d.kernel_size[0] - 1, conv1d.in_channels)
            h = s6.A_log.new_zeros(b, *s6.A_log.shape)
            states.append(State(window, h))
        return states


# The weights of an official model: in a layer (layers.0.norm.weight, …), and outside the layers.
OFFICIAL = {f"mixer.{name}" for name in (
    "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
    "dt_proj.bias", "A_log", "D", "out_proj.weight")}
OFFICIAL |= {"norm.weight", "norm_f.weight", "embedding.weight"}


def _unwrapped(name):
    """The name of a weight without what torch.compile and DistributedDataParallel put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def load_official(state_dict):
    """Weights by the names of state-spaces/mamba (1.x) or transformers -> a MambaLM with them.

    All sizes are read from the shapes; a padded vocabulary stays padded.
    Raises ValueError if this is no Mamba-1 language model with a tied head, saying what differs.
    """
    weights = {}
    for name, weight in state_dict.items():
        name = _unwrapped(name).removeprefix("backbone.").replace("embeddings.", "embedding.")
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
    numbers = [int(name.split(".")[1]) for name in weights if name.startswith("layers.")]
    vocabulary, d_model = embedding.shape
    sizes = dict(n=n, expand=d // d_model, dt_rank=dt_rank, d_conv=d_conv)
    model = MambaLM(vocabulary, d_model, 1 + max(numbers), **sizes)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit: {' '.join(str(error).split())}") from None
    return model


def official_state_dict(model, style="transformers"):
    """The way back: the weights of a MambaLM by their official names, lm_head.weight included.

    style    "transformers": for MambaForCausalLM; "mamba_ssm": for state-spaces/mamba (1.x)
    All weights are copies. Raises ValueError for another style, for a weight that no official model
    has, as that of an adapter, and for settings of S6 with which the weights mean something else.
    """
    if style not in ("transformers", "mamba_ssm"):
        raise ValueError(f"style must be \"transformers\" or \"mamba_ssm\", got {style!r}")
    for module in model.modules():
        if isinstance(module, S6) and (module.discretization != "euler"
                                       or module.selection != "all"):
            raise ValueError("official models have discretization \"euler\" and selection \"all\" "
                             "alone")
    embedding = "embeddings" if style == "transformers" else "embedding"
    weights = {}
    for name, weight in model.state_dict().items():
        name = _unwrapped(name).replace("path.", "").replace("s6.", "")
        if name.split(".", 2)[-1] not in OFFICIAL and name not in OFFICIAL:
            raise ValueError(f"no official model has a weight {name}: merge adapters first")
        name = name.replace("embedding", embedding)
        weights["backbone." + name] = weight.detach().clone()
    weights["lm_head.weight"] = weights[f"backbone.{embedding}.weight"].clone()
    return weights


# --------------------------------------------------------------------------------------------------
# Generation: one token at a time, from the states.

def sample(logits, temperature, top_k, generator):
    """Draw a token from each row of logits (b, vocabulary), of the top_k likeliest: -> (b,) int64.

    The Gumbel-max trick: add noise -log(e), with e from the exponential distribution, to logits /
    temperature. Then the largest sum is at token i with the probability that softmax(logits /
    temperature) gives it. Below, that sum is multiplied by the temperature, which leaves the
    largest where it is. So a temperature of 0 needs no case of its own, and takes the likeliest
    token.
    """
    logits = full(logits)                # in bfloat16 many sums would be equal
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
    Raises ValueError for a value outside these ranges, when the first token is asked for.
    """
    _check_generate(model, prompt, count, temperature, top_k)
    generator = torch.Generator().manual_seed(seed)
    logits, states = model(prompt.unsqueeze(0))                                # (1, l, vocabulary)
    logits = logits[:, -1]
    for i in range(count):
        token = sample(logits, temperature, top_k, generator)                  # (1,)
        yield token.item()
        if i + 1 < count:
            logits, states = model(token, states)                              # (1, vocabulary)


def _check_generate(model, prompt, count, temperature, top_k):
    if not isinstance(prompt, torch.Tensor) or prompt.dtype != torch.int64:
        raise ValueError("generate: prompt must be a tensor of int64")
    if prompt.ndim != 1 or len(prompt) == 0:
        raise ValueError(f"generate: prompt must have shape (l,), l ≥ 1, got {tuple(prompt.shape)}")
    vocabulary = model.embedding.num_embeddings
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(f"generate: the tokens of prompt must be from 0 to {vocabulary - 1}")
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"generate: count must be a whole number ≥ 0, got {count}")
    if not 0 <= temperature < math.inf:              # NaN fails this, too
        raise ValueError(f"generate: temperature must be ≥ 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be ≥ 1, got {top_k}")


# --------------------------------------------------------------------------------------------------
# Training: how a stack starts, and what weight decay must leave alone.

def scale_residuals(blocks):
    """Divide each out_proj by √N: the sum of N blocks starts as large as one block, as in GPT-2."""
    with torch.no_grad():
        for block in blocks:
            for name, weight in block.named_parameters():
                if name.endswith("out_proj.weight"):
                    weight.div_(len(blocks) ** 0.5)


def parameter_groups(model, weight_decay):
    """Groups for the optimizer: weight decay for matrices and kernels alone.

    A_log, D, biases, norms and tables of positions are scales and offsets, and zero is no natural
    value for them: decay on A_log would pull every A towards -1, and so the n time scales of a
    channel towards one. The same holds for omega, the frequencies of rnn.py's S4.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("A_log", "omega", "position"))
        if matrix:
            decayed.append(parameter)
        else:
            spared.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0}]


def graphed(model, *inputs):
    """For a GPU: the model, with its forward and its backward pass recorded as CUDA graphs.

    A small model is hundreds of small kernels, and the GPU mostly waits until Python has launched
    the next one. A CUDA graph launches all of them in one call: a scan of train_mnist.py takes
    0.9 ms in place of 4.1 (H200: results/scan_gpu.csv), and computes the same.

    inputs   what the model will be called with: tensors, or lists and tuples of them. The shapes
             of every later call must be the same, and so must everything that depends on Python: a
             loop over time is recorded with its length. In mode eval() the model runs as before.
    Gradients must be reset before each backward pass: to accumulate them, train the model itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # two: of streams, and of the first use of cuBLAS
        return torch.cuda.make_graphed_callables(model, inputs)


# --------------------------------------------------------------------------------------------------
# `python block.py`: a training step beside other libraries, each in the ways that it documents.
#
# `pip install transformers mambapy`, or one of them: what is not installed is left out. All have
# the same weights, so their losses must agree. Without CUDA, transformers runs a loop over time in
# PyTorch; `use_mambapy` gives it the parallel scan of mambapy, and `use_associative_scan` that of
# PyTorch, which works under torch.compile alone.

def peers(model):
    """Yields (library, its module, tokens -> logits), each with the weights of a MambaLM."""
    vocabulary, d_model = model.embedding.weight.shape
    sizes = dict(vocab_size=vocabulary, hidden_size=d_model, num_hidden_layers=len(model.layers))
    yield "this project", model, lambda tokens: model(tokens)[0]
    try:
        from transformers import MambaConfig, MambaForCausalLM
        for flags in ({}, {"use_mambapy": True}, {"use_associative_scan": True}):
            theirs = MambaForCausalLM(MambaConfig(**sizes, **flags))
            theirs.load_state_dict(official_state_dict(model))
            name = " ".join(["transformers", *flags])
            if "use_associative_scan" in flags:
                name += ", compiled"
                for layer in theirs.backbone.layers:
                    layer.compile()
            yield name, theirs, lambda tokens: theirs(tokens).logits
    except ImportError as error:
        print(f"without transformers: {error}")
    try:       # its language model imports CUDA packages: so its core, with our embedding and head
        from mambapy.mamba import Mamba as Core, MambaConfig as CoreConfig
        core = Core(CoreConfig(d_model=d_model, n_layers=len(model.layers)))
        weights = official_state_dict(model, "mamba_ssm")
        core.load_state_dict({name.removeprefix("backbone."): weight
                              for name, weight in weights.items() if ".layers." in name})
        embedding, norm = copy.deepcopy(model.embedding), copy.deepcopy(model.norm_f)
        yield "mambapy", nn.ModuleList([core, embedding, norm]), lambda tokens: F.linear(
            norm(core(embedding(tokens))), embedding.weight)
    except ImportError as error:
        print(f"without mambapy: {error}")


def time_steps(module, logits, tokens, count=3):
    """Training steps (forward, backward, AdamW), one to warm up and then count of them.

    -> seconds of the first, seconds of the fastest of the others, loss. After a minute one other
    is enough. The rate is 0, so that the loss stays that of the weights given.
    """
    optimizer, seconds = torch.optim.AdamW(module.parameters(), lr=0.0), []
    for _ in range(1 + count):
        start = time.perf_counter()
        guess = logits(tokens[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(guess, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 1 and sum(seconds) > 60:
            break
    return seconds[0], min(seconds[1:]), loss.item()


def memory(module, logits, tokens):
    """The bytes that a forward pass keeps for its backward pass, without the weights."""
    with kept_for_backward() as kept:
        guess = logits(tokens[:, :-1])       # the name keeps it alive, and with it all that it kept
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    return sum(size for address, size in kept.items() if address not in weights)


def writing_speed(model, count=50):
    """Tokens a second that `generate` writes: the fastest of three texts."""
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        list(generate(model, torch.tensor([1]), count))
        best = min(best, time.perf_counter() - start)
    return count / best


SIZES = {  # vocabulary, d_model, layers; sequences and length of a batch
    "small": (65, 128, 4, (32, 128)),
    "mamba-130m": (50280, 768, 24, (1, 256)),
}


def main():
    """One thread, two sizes, one run: a table, and results/peers.csv."""
    if sys.argv[1:]:         # --help, or anything else
        print(__doc__)
        return
    torch.set_num_threads(1)
    check_folders("results")
    rows = []
    print(f"{'size':12s}{'library':44s}{'first step, s':>14s}{'step, s':>9s}{'loss':>9s}"
          f"{'MB kept':>9s}")
    for size, (vocabulary, d_model, layers, (b, l)) in SIZES.items():
        torch.manual_seed(0)
        model = MambaLM(vocabulary, d_model, layers)
        tokens = torch.randint(vocabulary, (b, l + 1))
        speed = f"{writing_speed(model):.0f}"
        print(f"{size:12s}this project writes {speed} tokens a second")
        for name, module, logits in peers(model):
            first, step, loss = time_steps(module, logits, tokens)
            megabytes = memory(module, logits, tokens) / 1e6
            print(f"{size:12s}{name:44s}{first:14.2f}{step:9.2f}{loss:9.4f}{megabytes:9.0f}",
                  flush=True)
            rows.append({
                "size": size,
                "library": name,
                "batch": b,
                "length": l,
                "first_step_seconds": f"{first:.2f}",
                "step_seconds": f"{step:.2f}",
                "loss": f"{loss:.4f}",
                "megabytes_kept": f"{megabytes:.0f}",
                "tokens_per_second": speed if module is model else "",
                "threads": 1,
                "device": f"cpu {platform.machine()}",
                "torch": torch.__version__,
                "command": "python block.py",
            })
    write_rows("results/peers.csv", rows)


if __name__ == "__main__":
    main()
