"""visualize_delta.py: look at Δ, channel by channel; test what a gate and a large state are for.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        Δ_t → 0: token t leaves the state as it was

    python visualize_delta.py                  digits and needle: about 20 minutes on one core
    python visualize_delta.py --task digits    Δ on a 7 (--digit, --index) and on 1,000 test digits
    python visualize_delta.py --task text      Δ on Shakespeare, character by character
    python visualize_delta.py --task needle    a needle in a haystack of a million tokens
    python visualize_delta.py --task copying   4 to 64 symbols, scattered among 256 tokens
    python visualize_delta.py --task memory    the figure of both, from their rows in results/

The claim: Δ is the gate by which a selective model decides what to write into its state. A picture
alone proves nothing. So each one has a control on the same scale: the model before its first
training step, or one whose selection is switched off.

Every channel has a Δ of its own. Some open where others shut, and a mean over channels would hide
that. So all tasks share one figure (`draw_gates`) with a line for each channel. It shows Δ divided
by the channel's resting value, which is its Δ for an input of zeros. Beside it stand two numbers:
the share of the channels that open where the claim says, and the share that shut.

Up to the line "You may stop here" this file shows how Δ is read and drawn. Below it are the tasks.
Half of the file trains small models on the paper's two tasks of memory (section 4.1), needle and
copying: Mamba beside a GRU, S4, a vanilla RNN, and Mamba without its selection, or with less room.
The first figure of README.md comes from there. --quick takes fewer steps, --seeds 0 1 2 gives the
tables of results/README.md, --models, --steps and --lr ask for others, and --resume takes the
models that are trained already. The task digits looks at the classifiers of train_mnist.py, and
text at the models of train_shakespeare.py.

Read before: train_mnist.py and train_shakespeare.py, whose models are looked at here.
"""
import argparse
import contextlib
import copy
import csv
import glob
import itertools
import math
import os
import re
import shlex
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

import train_mnist
import train_shakespeare
from block import MambaLM
from rnn import RNN, PlainLM, S4Block
from s6 import S6
from training import (
    between, check_folders, choose_device, count_parameters, describe, fill_modules,
    newest_checkpoint, read_checkpoint, run_script, save_checkpoint, save_figure, seed_for, whole,
    write_rows)


# --------------------------------------------------------------------------------------------------
# Reading Δ: by hooks, which are removed afterwards.

FLOOR = 1e-9         # smallest Δ that counts: at A = -1 a million such steps forget 0.1 %


@contextlib.contextmanager
def watch(model):
    """In here, each forward pass of the model leaves what its scans computed: -> {name: scan}.

    scan.delta   (b, l, d) the Δ that it computed from its input
    scan.rest    (d,) the Δ that a token of zeros would get, softplus(bias)
    The output of the model does not change. The hooks are removed at the end.
    """
    scans = {}
    hooks = []
    for name, module in model.named_modules():
        if not isinstance(module, S6):
            continue
        scans[name] = SimpleNamespace(delta=None, rest=F.softplus(module.dt_proj.bias))

        # scan=…: otherwise all hooks would share the variable, and write to the last one.
        def note(_, inputs, output, scan=scans[name]):
            scan.delta = F.softplus(output)

        hooks.append(module.dt_proj.register_forward_hook(note))
    try:
        yield scans
    finally:
        for hook in hooks:
            hook.remove()


def opening(scan):
    """How wide each gate is open: log2(Δ / its resting value), (b, l, d). Without a gradient.

    1 is a gate twice as wide open as at rest, -1 half as wide. The resting value itself says
    nothing about selection: it is the same at every token.
    """
    return (scan.delta.clamp(min=FLOOR) / scan.rest.clamp(min=FLOOR)).log2().detach()


def opens_and_shuts(here, elsewhere):
    """Percent of channels whose Δ is over 1.1 times as large here as elsewhere, and the reverse.

    here, elsewhere (d,): means of `opening` over tokens of both kinds
    """
    change = here - elsewhere
    tenth = math.log2(1.1)
    opens = 100 * (change > tenth).float().mean().item()
    shuts = 100 * (change < -tenth).float().mean().item()
    return {"opens_percent": f"{opens:.1f}", "shuts_percent": f"{shuts:.1f}"}


# --------------------------------------------------------------------------------------------------
# The figure of gates.

def draw_gates(name, panels, marks, title, labels=None, strip=None, size=(3.2, 1.6),
               xlabel="token"):
    """Channels over tokens: how wide each gate is open at each token. For all tasks.

    panels   {(row, column): what `opening` gave for one sequence, (l, d)}
    marks    (l,) bool: the tokens of which the claim speaks: drawn as triangles
    labels   {token: text} along the axis
    strip    an image (h, w) that shows the tokens, above each column
    xlabel   what lies along the axis
    What to see: white is the resting value, red a wider gate, blue a narrower one. In each panel
    the channels are sorted: at the top those that open most at the marked tokens. A gate that
    answers to these tokens is red there and nowhere else. Untrained panels should be white; their
    rows are drawn less high.
    """
    rows = list(dict.fromkeys(row for row, _ in panels))
    columns = list(dict.fromkeys(column for _, column in panels))
    heights = [0.35 if row.startswith("untrained") else 1 for row in rows]
    if strip is not None:
        heights = [0.2] + heights
    width = size[0] * len(columns) + 1
    height = size[1] * sum(heights) + 0.9
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(heights), len(columns), squeeze=False, sharex=True,
                           height_ratios=heights)
    if strip is not None:
        for ax in axes[0]:
            ax.imshow(strip.numpy(), cmap="gray_r", aspect="auto", extent=(0, len(marks), 0, 1))
            ax.set_yticks([])
        axes[0, 0].set_ylabel("image,\nrow by row", fontsize=8, rotation=0, ha="right", va="center")

    panel_axes = axes[-len(rows):]
    places = marks.nonzero().flatten() + 0.5
    for (row, column), values in panels.items():
        ax = panel_axes[rows.index(row), columns.index(column)]
        change = values[marks].mean(0) - values[~marks].mean(0)                # (d,)
        shown = values[:, change.argsort(descending=True)].t()                 # (d, l)
        picture = ax.imshow(shown.numpy(), cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto",
                            interpolation="nearest", extent=(0, len(marks), len(shown), 0))
        ax.plot(places, [0] * len(places), "v", color="black", markersize=3, clip_on=False)
        ax.set_yticks([])
        if column == columns[0]:
            ax.set_ylabel(row, fontsize=8, rotation=0, ha="right", va="center")

    for ax, column in zip(axes[0], columns):
        ax.set_title(column, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel(xlabel, fontsize=8)
        if labels:
            ax.set_xticks([place + 0.5 for place in labels], labels.values(), fontsize=8)
    for ax in axes.flat:
        ax.tick_params(length=0)
    figure.supylabel("channels, sorted", fontsize=9)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, label="Δ / its resting value")
    bar.set_ticks(range(-3, 4), labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(f"figures/{name}.png", figure)


@torch.no_grad()
def gate_panels(models, tokens):
    """For `draw_gates`: a column per model {name: model}, a row per layer; tokens (1, l)."""
    panels = {}
    for name, model in models.items():
        with watch(model) as scans:
            model(tokens)
        words = LEARNERS[name].words if name in LEARNERS else name
        for layer, scan in enumerate(scans.values(), 1):
            panels[f"layer {layer}", words] = opening(scan)[0].cpu()
    return panels


@torch.no_grad()
def gate_rows(model, name, seed, tokens, here, elsewhere):
    """Which gates open and shut here: -> a row per layer, none for a model without gates.

    tokens (b, l); here, elsewhere (b, l) bool: the tokens of which the claim speaks, and others
    """
    with watch(model) as scans:
        model(tokens)
    rows = []
    for layer, scan in enumerate(scans.values(), 1):
        values = opening(scan).cpu()     # (b, l, d)
        change = opens_and_shuts(values[here].mean(0), values[elsewhere].mean(0))
        rows.append({"model": name, "seed": seed, "layer": layer, **change})
    return rows


def save_rows(name, rows, **same):
    """Rows, with what is the same in all of them and the command that made them, as a CSV file."""
    same["command"] = "python " + shlex.join(sys.argv)
    write_rows(f"results/{name}.csv", [row | same for row in rows])


# ==================================================================================================
# You may stop here. The rest: the tasks, and the command line.
#
# First the two tasks of memory, and the models that are taught to remember. Two things help to
# remember: a gate that sees the input, and room.
#
#                                          small state         large state
#     no gate that sees the input          vanilla RNN         S4
#     a gate that sees the input           GRU                 Mamba
#
# "selective" is Mamba. With "fixed-delta", B and C still see the input, but Δ does not: the model
# chooses what to write, and forgets at the same rate at every token. "fixed" can choose nothing.
# Both are otherwise the same block. "selective-n1" has the same gate as Mamba, and less room: one
# number a channel. Trained on demand (--models): "selective-n2" and "selective-n4";
# "selective-zoh", which discretizes as the paper states it; "fixed-delta-small", whose Δ starts
# between 1e-7 and 0.1, and not 0.001 and 0.1. All have the same number of parameters, to 2 %.

SYMBOLS = 16         # the ordinary tokens, 0 … 15
MARKER = 16          # of the needle
BLANK = 16           # of copying
ASK = 17             # of copying: now repeat a symbol
VOCABULARY = 18
PER_STEP = 4096      # tokens of a training step


class Learner(NamedTuple):
    """Colour and name of a model in the figures, and its learning rates.

    A rate is the best that was tried with seed 3, which is in no table: results/needle_rates.csv
    and copying_rates.csv. Not tuned: those of "selective-n1" and of the models on demand; and for
    copying those of "fixed" and "fixed-delta".
    """
    color: str
    words: str
    needle_lr: float
    copying_lr: float
    on_demand: bool = False


LEARNERS = {
    "selective": Learner("#0072b2", "Mamba", 3e-2, 1e-2),
    "selective-n1": Learner("#56b4e9", "Mamba, n = 1", 3e-2, 1e-2),
    "gru": Learner("#e69f00", "GRU", 6e-2, 1e-2),
    "fixed-delta": Learner("#cc79a7", "Mamba, Δ fixed", 3e-3, 1e-2),
    "fixed": Learner("#9467bd", "Mamba, Δ, B, C fixed", 1e-2, 1e-2),
    "s4": Learner("#009e73", "S4", 1e-2, 3e-2),
    "rnn": Learner("#7f7f7f", "vanilla RNN", 1e-3, 3e-3),
    "selective-n4": Learner("#6baed6", "Mamba, n = 4", 3e-2, 1e-2, on_demand=True),
    "selective-n2": Learner("#9ecae1", "Mamba, n = 2", 3e-2, 1e-2, on_demand=True),
    "fixed-delta-small": Learner("#f7b6d2", "Mamba, Δ fixed, from 1e-7", 3e-3, 1e-2,
                                 on_demand=True),
    "selective-zoh": Learner("#17becf", "Mamba, zero-order hold", 1e-2, 1e-2, on_demand=True),
}


def build_learner(name, seed):
    """The model of that name, with its first weights: 66,500 to 67,700 parameters."""
    torch.manual_seed(seed)
    if name == "rnn":
        return PlainLM(VOCABULARY, 64, [RNN(64, 134)], 134)
    if name == "gru":
        return PlainLM(VOCABULARY, 64, [RNN(64, 116, layers=1, gated=True)], 116)
    if name == "s4":
        return PlainLM(VOCABULARY, 64, [S4Block(64, 60) for _ in range(4)], 64)
    settings = {
        "fixed-delta": {"selection": "BC"},
        "fixed-delta-small": {"selection": "BC"},
        "fixed": {"selection": "none"},
        "selective-zoh": {"discretization": "zoh"},
        "selective-n4": {"n": 4, "d_model": 69},
        "selective-n2": {"n": 2, "d_model": 70},
        "selective-n1": {"n": 1, "d_model": 71},
    }
    model = MambaLM(VOCABULARY, layers=2, **{"d_model": 64} | settings.get(name, {}))
    if name == "fixed-delta-small":
        for module in model.modules():
            if isinstance(module, S6):           # at these values softplus(bias) is exp(bias)
                nn.init.uniform_(module.dt_proj.bias, math.log(1e-7), math.log(1e-1))
    return model


def generator(seed, what, number=0):
    """Random numbers for one purpose, the same in every run."""
    return torch.Generator().manual_seed(seed_for(seed, what, number))


def new_optimizer(model, lr):
    """AdamW without decay, for both tasks."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)


def train_step(model, optimizer, tokens, answers):
    """One step on tokens (b, l), whose last answers.shape[1] places ask for answers: -> loss.

    Raises ValueError if it is not finite.
    """
    logits, _ = model(tokens)
    logits = logits[:, -answers.shape[1]:, :SYMBOLS]
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(loss.item() + norm.item()):
        raise ValueError("the training is not finite any more: start again with a smaller --lr")
    optimizer.step()
    return loss.item()


def show_step(name, seed, step, steps, length, loss):
    """Print the loss every 100 steps."""
    if step % 100 == 0:
        print(f"  {name} seed {seed}  step {step}/{steps}  length {length}  loss {loss:.4f}",
              flush=True)


def trained_learners(args, task, names, rates, train, device, **settings):
    """Every model with every seed, trained now, or before with --resume.

    task     how the files are called
    rates    {name: its learning rate}, one of the settings; --lr takes another one for all
    train    (model, name, seed, device, **settings) -> the greatest length that it came to
    Yields name, seed, model, facts; the facts stand in every row about this model.
    """
    for seed, name in itertools.product(args.seeds, names):
        settings["lr"] = args.lr or rates[name]
        path = os.path.join(args.out, f"{task}-{name}-seed{seed}.pt")
        start = time.perf_counter()
        model = build_learner(name, seed).to(device)
        if args.resume and os.path.exists(path):
            checkpoint = read_checkpoint(path, {"facts": dict, "model": dict})
            facts = checkpoint["facts"]
            if {key: facts.get(key) for key in settings} != settings:
                raise ValueError(f"{path} was trained with other settings than {settings}: "
                                 f"leave out --resume, or use another --name")
            fill_modules(path, checkpoint, {"model": model})
        else:
            reached = train(model, name, seed, device, **settings)
            seconds = time.perf_counter() - start
            facts = {
                "params": count_parameters(model),
                **settings,
                "trained_up_to": reached,
                "training_seconds": f"{seconds:.0f}",
                "device": describe(device),
                "torch": str(torch.__version__),
            }
            save_checkpoint(path, {"facts": facts}, {"model": model}, keep_old=True)
        yield name, seed, model, facts


def learners_for(args, few):
    """Which models: those of --models; with --quick a few; else all that are not on demand."""
    if args.models:
        return args.models
    if args.quick:
        return few
    return [name for name, learner in LEARNERS.items() if not learner.on_demand]


# --------------------------------------------------------------------------------------------------
# A needle in a haystack (the paper's induction heads, section 4.1.2). The tokens are noise, with a
# marker somewhere, and after it the symbol to remember. At the end the marker comes again, and the
# model must answer with that symbol.
#
# To find a needle a model must write at two tokens, and keep what it wrote until the end. A gate
# can do that. A state that fades a little at each token does no harm over 256 of them, but over a
# million it fades 4,096 times as long. So what is learned on short haystacks is tested on long
# ones.

TRAINED_ON = (8, 16, 32, 64, 128, 256)   # lengths
NEEDLE_STEPS = 600
NEEDLE_STEPS_QUICK = 300
SHORTEST = 6         # log₂ of the lengths that are tested
LONGEST = 20
LONGEST_QUICK = 12
PIECE = 2 ** 14      # tokens that are evaluated at a time
NEAR = 5             # the marker, its symbol, and the three tokens whose convolution reaches them


def haystacks(length, places, answers, random, piece=None):
    """Yields the tokens of many haystacks, piece by piece: (b, ≤ piece) of int64.

    places, answers (b,): the marker is at place ≤ length - 3, the answer behind it
    """
    piece = piece or length
    marker = torch.full_like(places, MARKER)
    end = torch.full_like(places, length - 1)
    for start in range(0, length, piece):
        size = (len(places), min(piece, length - start))
        tokens = torch.randint(SYMBOLS, size, generator=random)
        # Marker, answer and question, each in the rows where it falls into this piece.
        for at, symbol in ((places, marker), (places + 1, answers), (end, marker)):
            column = at - start                                                # (b,)
            rows = ((column >= 0) & (column < tokens.shape[1])).nonzero().flatten()
            tokens[rows, column[rows]] = symbol[rows]
        yield tokens


def random_needles(count, length, random):
    """-> tokens (count, length), places (count,), answers (count,)."""
    places = torch.randint(length - 2, (count,), generator=random)
    answers = torch.randint(SYMBOLS, (count,), generator=random)
    return next(haystacks(length, places, answers, random)), places, answers


def train_needle(model, name, seed, device, steps, lr):
    """The length doubles when the loss falls under 0.05: -> the greatest one that was solved.

    After 256, lengths are drawn at random, so that none is forgotten.
    """
    optimizer = new_optimizer(model, lr)
    random = generator(seed, "needle")
    level = 0
    for step in range(1, steps + 1):
        if level == len(TRAINED_ON):
            length = TRAINED_ON[int(torch.randint(level, (), generator=random))]
        else:
            length = TRAINED_ON[level]
        tokens, _, answers = random_needles(PER_STEP // length, length, random)
        answers = answers.unsqueeze(1)   # (count, 1)
        loss = train_step(model, optimizer, tokens.to(device), answers.to(device))
        if level < len(TRAINED_ON) and loss < 0.05:
            level += 1
        show_step(name, seed, step, steps, length, loss)
    return TRAINED_ON[level - 1] if level else 0


@torch.inference_mode()
def answer(model, pieces, device):
    """Read piece by piece, carrying the state: -> logits (b, SYMBOLS) after the last token.

    What is kept between two pieces does not grow with what has been read.
    """
    states = None
    for tokens in pieces:
        logits, states = model(tokens.to(device), states)
    return logits[:, -1, :SYMBOLS].cpu()


def find_needles(model, length, count, seed, device):
    """Whether needles at evenly spaced depths are found, the earliest first: -> bool (count,)."""
    places = ((torch.arange(count) + 0.5) / count * (length - 2)).long()
    random = generator(seed, "haystacks", length)
    answers = torch.randint(SYMBOLS, (count,), generator=random)
    pieces = haystacks(length, places, answers, random, max(1, PIECE // count))
    return answer(model, pieces, device).argmax(-1) == answers


def score_lengths(model, name, seed, device, facts, longest):
    """Rows for results/needle.csv. A model under 20 % is not tested at greater lengths."""
    rows = []
    for power in range(SHORTEST, longest + 1):
        length = 2 ** power
        count = 64 if length <= 2 ** 16 else 16            # a million tokens take minutes
        start = time.perf_counter()
        found = find_needles(model, length, count, seed, device)               # (count,)
        seconds = time.perf_counter() - start
        accuracy = 100 * found.float().mean().item()
        rows.append({
            "model": name,
            "seed": seed,
            "length": length,
            "haystacks": count,
            "accuracy": f"{accuracy:.1f}",
            "seconds": f"{seconds:.1f}",
            **facts,
        })
        print(f"RESULT model={name} seed={seed} steps={facts['steps']} lr={facts['lr']} "
              f"length={length} accuracy={accuracy:.1f}", flush=True)
        if accuracy < 20:
            break
    return rows


def needle(args, device):
    """Train every model, test it at every length, and look at its gates: rows and figures."""
    name = args.name or ("needle_quick" if args.quick else "needle")
    steps = args.steps or (NEEDLE_STEPS_QUICK if args.quick else NEEDLE_STEPS)
    names = learners_for(args, ["selective"])
    rates = {model: learner.needle_lr for model, learner in LEARNERS.items()}
    longest = LONGEST_QUICK if args.quick else LONGEST
    print(f"needle: {steps} steps, seeds {args.seeds}; loss of a blind guess ln {SYMBOLS} = "
          f"{math.log(SYMBOLS):.4f}", flush=True)
    rows = []
    models = {}
    for seed in args.seeds:              # the control
        models["untrained", seed] = build_learner("selective", seed).to(device)
    for model_name, seed, model, facts in trained_learners(
            args, name, names, rates, train_needle, device, steps=steps):
        rows += score_lengths(model, model_name, seed, device, facts, longest)
        models[model_name, seed] = model
    save_rows(name, rows)
    draw_memory(name, rows, [])
    needle_gates(name, models, device)


def needle_gates(name, models, device):
    """The gates of models {(name, seed): model}: results/needle_delta.csv and a figure."""
    # At the needle, and everywhere else but at the question.
    count = 100
    length = 1024
    rows = []
    for (model_name, seed), model in models.items():
        tokens, places, _ = random_needles(count, length, generator(seed, "gates"))
        distance = torch.arange(length) - places.unsqueeze(1)      # (count, length)
        near = (distance >= 0) & (distance < NEAR)
        near[:, -1] = False
        elsewhere = ~near
        elsewhere[:, -1] = False
        rows += gate_rows(model, model_name, seed, tokens.to(device), near, elsewhere)
    save_rows(f"{name}_delta", rows)

    # A short haystack for the figure, in which all tokens can be read.
    _, seed = next(iter(models))
    place = 21
    length = 64
    tokens = next(haystacks(length, torch.tensor([place]), torch.tensor([7]),
                            generator(seed, "one haystack"))).to(device)
    shown = {}
    for model_name in ("untrained", "selective", "selective-zoh"):
        if (model_name, seed) in models:
            shown[model_name] = models[model_name, seed]
    distance = torch.arange(length) - place
    marks = (distance >= 0) & (distance < NEAR)
    labels = {place: "marker", length - 1: "marker"}
    draw_gates(f"{name}_gates", gate_panels(shown, tokens), marks, labels=labels,
               title=f"one haystack of {length} tokens, seed {seed}; triangles: the needle, and "
                     f"the three tokens that see it")


# --------------------------------------------------------------------------------------------------
# Selective copying (section 4.1.1): symbols among blanks, to be repeated in order.
#
# A model that treats all tokens alike can repeat what came a fixed number of tokens ago. Here the
# distances are random: it must pass over the blanks, or they take up its state. A gate can do that.
# And the more symbols there are, the more room they need: so one model is trained on several
# numbers of symbols, and tested at each. (The paper: 16 symbols among 4,096 tokens, 400,000 steps.)

NUMBERS = (4, 8, 16, 32, 64)             # of symbols
COPYING_STEPS = 3000
COPYING_STEPS_QUICK = 60


def scattered(count, length, number, random):
    """-> tokens (count, length + number), and the symbols (count, number)."""
    # The first places of a random order of all places: distinct, and random.
    order = torch.rand(count, length, generator=random).argsort(1)
    places = order[:, :number].sort(1).values      # (count, number)
    symbols = torch.randint(SYMBOLS, (count, number), generator=random)
    tokens = torch.full((count, length + number), BLANK)
    tokens[:, length:] = ASK
    return tokens.scatter_(1, places, symbols), symbols


def train_copying(model, name, seed, device, steps, length, numbers, lr):
    """The length grows between 30 % and 70 % of the steps: -> the last length.

    It begins without blanks, as plain copying, which is easy; the distances then grow.
    The learning rate rises to lr in 50 steps, and falls to 0 along a cosine.
    """
    optimizer = new_optimizer(model, lr)
    random = generator(seed, "copying")
    number = numbers[0]
    for step in range(1, steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 50) * cosine
        if len(numbers) > 1:
            number = numbers[int(torch.randint(len(numbers), (), generator=random))]
        grown = min(1.0, max(0.0, (step / steps - 0.3) / 0.4))
        current = number + round((length - number) * grown)
        count = max(4, PER_STEP // (current + number))
        tokens, symbols = scattered(count, current, number, random)
        loss = train_step(model, optimizer, tokens.to(device), symbols.to(device))
        show_step(name, seed, step, steps, current, loss)
    return current


@torch.inference_mode()
def copied(model, length, number, seed, device, count=1024):
    """Which symbols are repeated rightly: bool (count, number)."""
    random = generator(seed, "copied", number)
    right = []
    for _ in range(0, count, 16):
        tokens, symbols = scattered(16, length, number, random)
        logits, _ = model(tokens.to(device))
        guesses = logits[:, -number:, :SYMBOLS].argmax(-1).cpu()
        right.append(guesses == symbols)
    return torch.cat(right)


def score_numbers(model, name, seed, device, facts):
    """Rows for results/copying.csv."""
    rows = []
    for number in facts["numbers"]:
        right = copied(model, facts["length"], number, seed, device).float()
        accuracy = 100 * right.mean().item()
        whole_sequences = 100 * right.amin(1).mean().item()
        rows.append({
            "model": name,
            "seed": seed,
            "symbols": number,
            "sequences": len(right),
            "accuracy": f"{accuracy:.2f}",
            "whole_sequences": f"{whole_sequences:.2f}",
            **facts,
        })
        print(f"RESULT model={name} seed={seed} lr={facts['lr']} symbols={number} "
              f"accuracy={accuracy:.2f} whole_sequences={whole_sequences:.2f}", flush=True)
    return rows


def copying(args, device):
    """Train every model, test it with every number of symbols: rows, and figures."""
    name = args.name or ("copying_quick" if args.quick else "copying")
    steps = args.steps or (COPYING_STEPS_QUICK if args.quick else COPYING_STEPS)
    numbers = args.symbols or ([4, 8] if args.quick else list(NUMBERS))
    length = args.length or (32 if args.quick else 256)
    if length < max(numbers):
        raise ValueError(f"{max(numbers)} symbols do not fit into {length} tokens: use a "
                         f"larger --length")
    names = learners_for(args, ["selective", "gru"])
    rates = {model: learner.copying_lr for model, learner in LEARNERS.items()}
    print(f"copying: {numbers} symbols among {length} tokens, {steps} steps, seeds {args.seeds}; "
          f"loss of a blind guess ln {SYMBOLS} = {math.log(SYMBOLS):.4f}", flush=True)

    rows = []
    models = {}
    for seed in args.seeds:              # the control
        models["untrained", seed] = build_learner("selective", seed).to(device)
    for model_name, seed, model, facts in trained_learners(
            args, name, names, rates, train_copying, device, steps=steps, length=length,
            numbers=numbers):
        rows += score_numbers(model, model_name, seed, device, facts)
        models[model_name, seed] = model
    save_rows(name, rows)
    draw_memory(name, [], rows)

    gates = []
    shown_number = min(16, max(numbers))
    for (model_name, seed), model in models.items():
        many, _ = scattered(100, length, shown_number, generator(seed, "gates"))
        gates += gate_rows(model, model_name, seed, many.to(device),
                           here=many < SYMBOLS, elsewhere=many == BLANK)
    save_rows(f"{name}_delta", gates)
    seed = args.seeds[0]
    tokens, _ = scattered(1, length, shown_number, generator(seed, "one sequence"))
    shown = {}
    for model_name in ("untrained", "selective"):
        if (model_name, seed) in models:
            shown[model_name] = models[model_name, seed]
    draw_gates(f"{name}_gates", gate_panels(shown, tokens.to(device)), tokens[0] < SYMBOLS,
               labels={length + shown_number // 2: "answer"}, size=(4.4, 1.6),
               title=f"one sequence, seed {args.seeds[0]}; triangles: the symbols to repeat")


# --------------------------------------------------------------------------------------------------
# The figure of both tasks.

def draw_panel(ax, rows, column):
    """Percent right over a column of the rows: a line per model, the mean over its seeds.

    Thin lines are single seeds. A mean is drawn where all seeds were tested.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model in models:
        color = LEARNERS[model].color
        # The first model on top, and the next two below it wider: lines that coincide can be seen.
        index = models.index(model)
        order = 10 - index
        width = (2, 3.5, 5)[index] if index < 3 else 2
        by_seed = {}                     # seed: {length, or number: percent}
        for row in rows:
            if row["model"] == model:
                points = by_seed.setdefault(row["seed"], {})
                points[int(row[column])] = float(row["accuracy"])
        for points in by_seed.values():
            ax.plot(*zip(*points.items()), color=color, linewidth=0.8, alpha=0.5, zorder=order)
        means = {}
        for place in next(iter(by_seed.values())):
            values = [points[place] for points in by_seed.values() if place in points]
            if len(values) == len(by_seed):
                means[place] = sum(values) / len(values)
        ax.plot(*zip(*means.items()), "o-", color=color, markersize=width + 1, linewidth=width,
                zorder=order, label=LEARNERS[model].words)
    ax.axhline(100 / SYMBOLS, color="black", linestyle=":", linewidth=1, label="guessing")
    ax.set_xscale("log", base=2)
    ax.set_ylim(-3, 103)
    ax.grid(alpha=0.3)


def draw_memory(name, needles, copies):
    """Needles found over the length of the haystack; symbols right over how many are to be copied.

    needles, copies    rows of results/needle.csv and results/copying.csv; one may be empty
    What to see: on the left, the models with a gate that sees the input stay at the top far beyond
    the lengths of their training (grey). On the right, the one with more room stays there longer.
    """
    panels = [rows for rows in (needles, copies) if rows]
    figure = Figure(figsize=(4.3 * len(panels) + 1.4, 4), layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    handles = {}
    if needles:
        ax = axes.pop(0)
        draw_panel(ax, needles, "length")
        ax.axvspan(2 ** SHORTEST, TRAINED_ON[-1], color="0.9", zorder=0)
        ax.text(2 ** SHORTEST * 2.2, 78, "lengths of training", color="0.4", fontsize=9,
                rotation=90, ha="center", va="center")
        ax.set_xticks([2 ** power for power in range(SHORTEST, LONGEST + 1, 2)])
        ax.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))           # 1M for 1,048,576
        ax.set(xlabel="length of the haystack (tokens)", ylabel="needles found (%)",
               title="A gate keeps one symbol")
        handles |= legend_of(ax)
    if copies:
        ax = axes.pop(0)
        draw_panel(ax, copies, "symbols")
        numbers = sorted({int(row["symbols"]) for row in copies})
        ax.set_xticks(numbers, [str(number) for number in numbers])
        ax.set(xlabel=f"symbols to copy, among {copies[0]['length']} tokens",
               ylabel="symbols right (%)", title="More symbols need room")
        handles |= legend_of(ax)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9,
                  frameon=False)
    save_figure(f"figures/{name}.png", figure)


def legend_of(ax):
    """-> {words: what was drawn}."""
    handles, words = ax.get_legend_handles_labels()
    return dict(zip(words, handles))


def memory(args, device):
    """figures/memory.png, from results/needle.csv and results/copying.csv."""
    tables = []
    for name in ("needle", "copying"):
        with open(f"results/{name}.csv", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    draw_memory(args.name or "memory", *tables)


# --------------------------------------------------------------------------------------------------
# What the training scripts saved.

def trained_models(args, patterns):
    """-> checkpoints that differ in the seed alone.

    They are those of --checkpoint, or the newest one in --out that is named like one of the
    patterns, with its other seeds. Raises ValueError if there are none, or if one holds no finished
    training.
    """
    paths = args.checkpoint
    if not paths:
        newest = newest_checkpoint(args.out, patterns)
        name, _, _ = newest.name.rpartition("-seed")
        paths = sorted(newest.parent.glob(f"{glob.escape(name)}-seed*.pt"))
    checkpoints = []
    for path in paths:
        checkpoint = read_checkpoint(path)
        recipe = checkpoint["recipe"]
        if len(checkpoint["scores"]) < recipe["epochs"]:
            raise ValueError(f"{path} does not hold a finished training: use --resume there, or "
                             f"name others with --checkpoint")
        checkpoints.append(checkpoint)
        if recipe | {"seed": 0} != checkpoints[0]["recipe"] | {"seed": 0}:
            raise ValueError(f"{path} and {paths[0]} differ in more than the seed: name others "
                             f"with --checkpoint")
    return checkpoints


def make_pair(checkpoint, make):
    """A trained model and its control, {"trained": …, "untrained": …}; make() builds it.

    With the seed of the training, make() gives the weights from before the first step.
    Raises ValueError if the model has no scan to look at.
    """
    torch.manual_seed(seed_for(checkpoint["recipe"]["seed"], "weights"))
    untrained = make().eval()
    if not any(isinstance(module, S6) for module in untrained.modules()):
        raise ValueError("these models have no Δ to look at: name others with --checkpoint")
    trained = copy.deepcopy(untrained)
    fill_modules("the checkpoint", checkpoint, {"average": trained})
    return {"trained": trained, "untrained": untrained}


# --------------------------------------------------------------------------------------------------
# Digits: is Δ large where the ink is?
#
# One picture of one digit persuades easily. So the same question is put to a thousand digits, as a
# rank correlation: it asks only whether more ink goes with more Δ, in a straight line or not. It is
# taken within each digit, since thick digits have more ink and may have more Δ. Ink is mostly in
# the middle, and Δ may depend on the place alone: so both are taken less their mean at this place
# over all digits.

BACK = range(6)      # Δ is compared with what its scan reads now, and up to five tokens earlier
INKED = 0.2          # brightness from which on a patch counts as inked


@torch.no_grad()
def read_images(model, images):
    """What the scans of a model do with images (b, c, h, w), normalised.

    -> {(name of the scan, whether it reads backward): scan}, with Δ in the order of reading
    """
    with watch(model) as scans:
        model(images)
    named = {}
    for name, scan in scans.items():
        _, layer, branch, _ = name.split(".")              # body.0.second.s6
        layer = int(layer)
        way = "forward"
        if branch == "second":
            both_ways = model.body[layer].direction == "bidirectional"
            way = "backward" if both_ways else "forward again"
        named[f"layer {layer + 1}, {way}", way == "backward"] = scan
    return named


def rank_correlation(a, b):
    """Spearman's ρ along the last dimension, (b, l) both -> (b,). Equal values share a rank."""
    def ranks(t):
        above = t.unsqueeze(-1) > t.unsqueeze(-2)      # (b, l, l)
        equal = t.unsqueeze(-1) == t.unsqueeze(-2)
        r = (above.float() + 0.5 * equal.float()).sum(-1)
        return r - r.mean(-1, keepdim=True)

    a = ranks(a)
    b = ranks(b)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)


def compare_with_ink(scan, ink):
    """Rows for results/delta.csv, one for each number of tokens back.

    ink (b, l)        brightness of each patch, 0 … 1, in the order of the scan
    rho               rank correlation, within each digit, of Δ (its mean over the channels) with
                      the ink that the scan read so many tokens earlier; place removed, mean over
                      the digits
    opens, shuts      percent of the channels whose Δ is larger, or smaller, where that patch was
                      inked, place removed
    """
    l = ink.shape[1]
    mean = scan.delta.mean(-1)           # (b, l)
    mean = mean - mean.mean(0)
    by_channel = opening(scan)           # (b, l, d)
    by_channel = by_channel - by_channel.mean(0)
    rows = []
    for back in BACK:
        earlier = ink[:, :l - back]
        rho = rank_correlation(mean[:, back:], earlier - earlier.mean(0)).mean().item()
        values = by_channel[:, back:]
        inked = earlier > INKED
        change = opens_and_shuts(values[inked].mean(0), values[~inked].mean(0))
        rows.append({"back": back, "rho": f"{rho:.3f}", **change})
    return rows


def load_digits(args, device):
    """The models to look at, and the images that they were trained on.

    -> recipe, data, {seed: {"trained": model, "untrained": model}}
    Raises ValueError for models that do not read MNIST or FashionMNIST by patches.
    """
    checkpoints = trained_models(args, ["mnist*-bidirectional-seed*.pt"])
    recipe = checkpoints[0]["recipe"]
    reads_patches = recipe.get("task") == "classify" and 1 < recipe["patch"] < 14
    if not reads_patches or recipe["dataset"] not in ("mnist", "fashion"):
        raise ValueError("only classifiers that read MNIST or FashionMNIST by patches can be "
                         "looked at: name others with --checkpoint")
    name = checkpoints[0]["data"]["name"]
    source = "synthetic" if name.startswith("synthetic") else "real"
    data = train_mnist.load_data(recipe["dataset"], source, args.data_dir, 0)
    pairs = {}
    for checkpoint in checkpoints:
        pairs[checkpoint["recipe"]["seed"]] = make_pair(
            checkpoint, lambda: train_mnist.build(recipe, data)[0].to(device))
    return recipe, data._replace(name=name), pairs


def digits(args, device):
    """Figures of Δ on one digit and on a thousand, and results/delta.csv."""
    recipe, data, pairs = load_digits(args, device)
    patch = recipe["patch"]
    name = args.name or "delta"
    if not args.name and data.name != "mnist":
        name += f"_{data.name}"
    places = (data.test_labels == args.digit).nonzero().flatten()
    if args.index >= len(places):
        raise ValueError(f"{data.name} has {len(places)} test images of a {args.digit}: use a "
                         f"smaller --index")

    def read(model, images):
        inputs, _ = train_mnist.classification(data).prepare(images, None)
        return read_images(model, inputs.to(device))

    # A thousand digits: every scan of every model, with the ink that it read; and, as a control,
    # with that of the digit before it, which the model did not see.
    images = data.test_images[:1000]
    ink = F.avg_pool2d(images.float() / 255, patch).flatten(1).to(device)      # (b, l)
    rows = []
    for seed, pair in pairs.items():
        for look, model in pair.items():
            for (scan_name, backward), scan in read(model, images).items():
                for whose, shown in (("own", ink), ("another's", ink.roll(1, 0))):
                    about = {"model": look, "seed": seed, "scan": scan_name, "ink": whose}
                    for row in compare_with_ink(scan, shown.flip(1) if backward else shown):
                        rows.append(about | row)
    save_rows(name, rows, stem=recipe["stem"], digits=len(images), dataset=data.name,
              device=describe(device), torch=torch.__version__)

    # One digit, by the models of the first seed. Backward scans are turned round: all panels lie
    # in the order of the image.
    seed, pair = next(iter(pairs.items()))
    image = data.test_images[places[args.index]]   # (1, h, w)
    panels = {}
    for look, model in pair.items():
        for (scan_name, backward), scan in read(model, image.unsqueeze(0)).items():
            values = opening(scan)[0].cpu()                                    # (l, d)
            layer, way = scan_name.split(", ")
            panels[f"{look}\n{layer}", way] = values.flip(0) if backward else values
    brightness = F.avg_pool2d(image.float(), patch).flatten()                  # (l,)
    side = image.shape[-1] // patch
    # The rows of patches, one behind the other: (patch, side · width).
    strip = image[0].view(side, patch, -1).transpose(0, 1).reshape(patch, -1)
    labels = {row * side + side // 2: f"{row + 1}" for row in range(side)}
    one = "" if (args.digit, args.index) == (7, 0) else f"_{args.digit}_{args.index}"
    draw_gates(f"{name}_gates{one}", panels, brightness > 255 * INKED, labels=labels, strip=strip,
               size=(4, 1.6), xlabel="row of patches",
               title=f"{data.name}, stem {recipe['stem']}, test image {args.index} of digit "
                     f"{args.digit}, seed {seed}; triangles: patches with ink")


# --------------------------------------------------------------------------------------------------
# Text: at which characters does the gate open?
#
# One might guess: at the ends of words, at line breaks, at names. The figure shows a passage; the
# means by kind of character show whether it holds for the whole validation text.

SIGNS = {" ": "space", "\n": "line break", ":": "colon"}
CHARACTERS = ["letter in a word", "first letter", "speaker's name", *SIGNS.values(), "other"]
PASSAGE = slice(1, 59)                   # of the validation text; Shakespeare's starts with a "?"


def kinds_of(string):
    """The kind of each character: -> [one of CHARACTERS].

    A speaker's name has a line of its own, after an empty one and up to a colon. An apostrophe
    counts as part of a word: the d of "call'd" is no first letter.
    """
    speakers = set()
    for match in re.finditer(r"(?m)(?<=\n\n)[^\n:]+:$", string):
        speakers.update(range(*match.span()))
    kinds = []
    for place, (before, character) in enumerate(zip("\n" + string, string)):
        if not character.isalpha():
            kinds.append(SIGNS.get(character, "other"))
        elif place in speakers:
            kinds.append("speaker's name")
        elif before.isalpha() or before == "'":
            kinds.append("letter in a word")
        else:
            kinds.append("first letter")
    return kinds


@torch.no_grad()
def openings_of_text(model, tokens, masks, piece=4096):
    """Tokens (l,) read as one stream: -> the openings of a passage, and their means by kind.

    masks (kinds, l)    1 where a character is of that kind
    -> {layer: (passage, d)}, {layer: sums (kinds, d)}; layers count from 1
    """
    states = None
    passage = {}
    sums = {}
    with watch(model) as scans:
        # The state goes on from piece to piece, and the memory does not grow.
        for part, mask in zip(tokens.split(piece), masks.split(piece, 1)):
            _, states = model(part.unsqueeze(0), states)
            for layer, scan in enumerate(scans.values(), 1):
                values = opening(scan)[0]          # (≤ piece, d)
                if layer not in sums:
                    passage[layer] = values[PASSAGE].cpu()
                    sums[layer] = 0.0
                sums[layer] = sums[layer] + mask @ values          # (kinds, d)
    return passage, sums


def load_shakespeare(args):
    """The language models to look at, and their text: -> checkpoints, Text.

    Raises ValueError for models of another text.
    """
    checkpoints = trained_models(args, ["shakespeare*-mamba-seed*.pt",
                                        "synthetic-pydoc*-mamba-seed*.pt"])
    data = checkpoints[0]["data"]
    name = data["name"]
    if not name.startswith(("shakespeare", "synthetic-pydoc")):
        raise ValueError("only models of Shakespeare or of Python's help texts can be looked at: "
                         "name others with --checkpoint")
    source = "synthetic" if "pydoc" in name else "real"
    text = train_shakespeare.load_text(args.data_dir, source, None)
    if data["vocabulary"] != text.vocabulary:
        raise ValueError(f"these models were trained on another version of {text.name}: train "
                         f"again, or name others with --checkpoint")
    return checkpoints, text._replace(name=name)


def text(args, device):
    """Δ of every layer over the validation text: a figure, and results/delta_text.csv."""
    checkpoints, data = load_shakespeare(args)
    string = "".join(data.vocabulary[token] for token in data.valid)
    kinds = kinds_of(string)
    numbers = torch.tensor([CHARACTERS.index(kind) for kind in kinds])         # (l,)
    masks = F.one_hot(numbers, len(CHARACTERS)).t().float().to(device)     # (kinds, l)
    counts = masks.sum(1)

    rows = []
    panels = {}
    for checkpoint in checkpoints:
        recipe = checkpoint["recipe"]
        pair = make_pair(checkpoint, lambda: train_shakespeare.build(
            recipe, data.vocabulary).to(device))
        for look, model in pair.items():
            passage, sums = openings_of_text(model, data.valid.to(device), masks)
            for layer, of_kinds in sums.items():
                if checkpoint is checkpoints[0]:
                    panels[f"{look}\nlayer {layer}", ""] = passage[layer]
                for kind, count, total in zip(CHARACTERS, counts, of_kinds):
                    if count == 0:
                        continue
                    here = total / count                                       # (d,)
                    elsewhere = (of_kinds.sum(0) - total) / (counts.sum() - count)
                    rows.append({
                        "model": look,
                        "seed": recipe["seed"],
                        "layer": layer,
                        "kind": kind,
                        "characters": int(count),
                        "delta_over_rest": f"{2 ** here.mean().item():.3f}",
                        **opens_and_shuts(here, elsewhere),
                    })
    name = args.name or "delta_text"
    if not args.name and data.name != "shakespeare":
        name += f"_{data.name}"
    save_rows(name, rows, text=data.name, device=describe(device), torch=torch.__version__)
    passage = string[PASSAGE].replace("\n", "↵").replace(" ", "·")
    marks = torch.tensor([kind == "first letter" for kind in kinds[PASSAGE]])
    draw_gates(name, panels, marks, labels=dict(enumerate(passage)), size=(9, 1.1),
               title=f"{data.name}: the validation text begins, seed {rows[0]['seed']}; "
                     f"triangles: first letters")


# --------------------------------------------------------------------------------------------------
# The command line.

TASKS = {
    "digits": digits,
    "needle": needle,
    "copying": copying,
    "memory": memory,
    "text": text,
}


def parse(arguments):
    """-> the flags."""
    p = argparse.ArgumentParser(
        allow_abbrev=False, usage="visualize_delta.py [--flag value ...]    (--help lists them)",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--task", choices=TASKS, nargs="+", default=["digits", "needle"], metavar="TASK",
        help=f"{', '.join(TASKS)}; default digits needle")
    add("--name", help="what the files of one task are called")
    add("--digit", type=between(int, 0, 9), default=7, help="the one to draw; default 7")
    add("--index", type=whole, default=0, help="which of its test images; default 0")
    add("--checkpoint", nargs="+", metavar="FILE",
        help="digits and text: by which models; default: the newest in --out, with all its seeds")
    add("--models", nargs="+", choices=LEARNERS, metavar="MODEL",
        help=f"needle and copying: {', '.join(LEARNERS)}")
    add("--seeds", type=whole, nargs="+", default=[0], help="needle and copying; default 0")
    add("--steps", type=between(int, 1),
        help=f"needle, default {NEEDLE_STEPS}; copying, default {COPYING_STEPS}")
    add("--lr", type=between(float, 1e-6),
        help="needle and copying: one learning rate for all; default: see LEARNERS")
    add("--length", type=between(int, 5), help="copying: tokens; default 256 (the paper has 4096)")
    add("--symbols", type=between(int, 1), nargs="+",
        help=f"copying: how many; default {' '.join(map(str, NUMBERS))}")
    add("--quick", action="store_true", help="needle and copying: fewer steps and lengths")
    add("--resume", action="store_true",
        help="take the models of needle and copying that are in --out, and train the others")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints; default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    args = p.parse_args(arguments)
    args.seeds = list(dict.fromkeys(args.seeds))
    args.task = list(dict.fromkeys(args.task))
    if args.name and len(args.task) > 1:
        p.error("--name names the files of one task: use --task, too")
    others = args.models or args.steps or args.lr or args.length or args.symbols
    if others and not args.name:
        p.error("other --models, --steps, --lr, --length or --symbols need a --name for their "
                "files")
    return args


def run(args):
    """The tasks, one after the other."""
    # Where gates shut, numbers may become denormal, and a CPU several times slower. Threads inherit
    # this when they start, so it comes before all work.
    torch.set_flush_denormal(True)
    check_folders("results", "figures", args.out)
    device = choose_device(args.device)
    for task in args.task:
        TASKS[task](args, device)


def main():
    run_script("visualize_delta.py", lambda: run(parse(sys.argv[1:])),
               "--resume takes the models that are finished")


if __name__ == "__main__":
    main()
