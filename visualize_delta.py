"""visualize_delta.py: look at Δ, and at what an untrained Δ looks like.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        Δ_t → 0: token t leaves the state as it was

    python visualize_delta.py                  needle and digits: 12 minutes on one core
    python visualize_delta.py --task digits    Δ on a 7 (--digit, --index) and on 1,000 test digits
    python visualize_delta.py --task needle    a needle in a haystack of a million tokens
    python visualize_delta.py --task paper     the same by the paper's recipe: an hour on one core
    python visualize_delta.py --task copying   16 symbols, scattered among 256 tokens: 13 minutes
    python visualize_delta.py --task text      Δ on Shakespeare, character by character: 1 minute
The tasks that train are needle, paper and copying. --quick: fewer steps; --seeds 0 1 2: as in the
README; --resume: with the models that were trained already.

The claim: Δ is the gate by which a selective model decides what to write into its state. A picture
alone proves nothing, so each one has a control on the same scale: the model before its first
training step, or one whose selection is switched off.

Digits, with the classifiers of train_mnist.py. Do not expect a Δ that is large on the strokes. It
is large about two tokens behind them, in the direction of reading. It can be: the convolution shows
a scan the three tokens before as well, and two layers of them reach further back.

Needle and copying, the paper's two tasks of memory (section 4.1), with small models that are
trained here. Needle: expect the model whose loss has a penalty on Δ as well to find nearly all of
them, at all lengths up to a million tokens. Copying: expect it to need the selection.

Text, with the models of train_shakespeare.py. Expect no gate that opens at spaces: mostly they get
less than a letter inside a word. In the last layer it opens most at line breaks or in speakers'
names, to 1.3 … 1.7 times its resting value, and in a middle layer at the first letters of words.

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

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from PIL import Image

import train_mnist
import train_shakespeare
from block import MambaLM
from rnn import RNN
from s6 import S6
from train_mnist import choose_device, describe, first_line, seed_for, write, write_rows
from train_shakespeare import load_text, read_checkpoint

matplotlib.use("Agg")            # figures are files: no window is opened
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.titlesize": 10,
                     "axes.grid": True, "axes.titlesize": 10, "grid.alpha": 0.3,
                     "legend.frameon": False, "legend.fontsize": 8, "savefig.dpi": 110})
LOOKS = {"trained": "#d62728", "untrained": "#7f7f7f"}     # a model and its control: colours
LAYERS = ("#17becf", "#000000")          # colours of the first and second layer


# --------------------------------------------------------------------------------------------------
# Reading Δ: by hooks, which are removed afterwards.
#
# Every channel has a Δ of its own. What is shown is the mean over the channels, mostly divided by
# its resting value: 1 is the Δ that a token of zeros would get, 2 a gate twice as wide open. The
# resting value itself says little about selection, since it is the same at every token.

@contextlib.contextmanager
def watch(model):
    """In here, each forward pass of the model leaves what its scans computed: -> {name: scan}.

    scan.s6      the module
    scan.x       (b, l, d) what it was given
    scan.delta   (b, l, d) the Δ that it made of that, with its gradient
    The model computes what it computes without; afterwards no trace is left on it.
    """
    scans, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, S6):
            scan = scans[name] = SimpleNamespace(s6=module, x=None, delta=None)

            # scan=scan: otherwise all hooks would share the variable, and write to the last one.
            def note_x(_, inputs, scan=scan):
                scan.x = inputs[0]

            def note_delta(_, inputs, output, scan=scan):
                scan.delta = F.softplus(output)

            hooks.append(module.register_forward_pre_hook(note_x))
            hooks.append(module.dt_proj.register_forward_hook(note_delta))
    try:
        yield scans
    finally:
        for hook in hooks:
            hook.remove()


def gate(scan):
    """How wide the gate is open at each token: Δ > 0, mean over the channels, (b, l)."""
    return scan.delta.mean(-1)


def over_rest(scan):
    """The same over its resting value, what an input of zero would get: softplus(bias)."""
    return gate(scan) / F.softplus(scan.s6.dt_proj.bias).mean()


@torch.no_grad()
def changes(scan):
    """How far each token moves the state: ‖h_t - h_{t-1}‖ over all channels, (b, l)."""
    h, moves = None, []
    for token in scan.x.split(1, 1):     # a scan of length 1 is a step of the recurrence
        _, new = scan.s6(token, h)                                             # (b, d, n)
        moves.append((new if h is None else new - h).flatten(1).norm(dim=1))
        h = new
    return torch.stack(moves, 1)


# --------------------------------------------------------------------------------------------------
# Files: models in, rows and figures out.

def load(path, **modules):
    """Fill modules from a checkpoint, by their names in it: -> all of it; or end with one line."""
    try:
        state = read_checkpoint(path)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        return state
    except Exception as error:           # what zipfile and torch say of a damaged or other file
        sys.exit(f"visualize_delta.py: cannot use {path} ({first_line(error)}): name others by "
                 f"--checkpoint, or leave out --resume")


def trained_models(args, names, command):
    """What a training script saved: -> its dictionaries. Ends with one line if there are none.

    They are those of --checkpoint, or every seed of the first of the names that is in --out.
    """
    found = (sorted(glob.glob(f"{glob.escape(args.out)}/{name}-seed*.pt")) for name in names)
    paths = args.checkpoint or next(filter(None, found), [])
    if not paths:
        sys.exit(f"visualize_delta.py: no trained model in {args.out}: run {command} first, or "
                 f"name one by --checkpoint")
    states = []
    for path in paths:
        states.append(load(path))
        if len(states[-1].get("scores", [])) < states[-1].get("recipe", {}).get("epochs", 1):
            sys.exit(f"visualize_delta.py: {path} does not hold a finished training of {command}: "
                     f"go on with it by --resume, or name others by --checkpoint")
    return states


def make_pair(state, make):
    """A trained model and its control, {"trained": …, "untrained": …}; make() builds it.

    With the seed of the training, make() gives the weights from before the first step.
    """
    torch.manual_seed(seed_for(state["recipe"]["seed"], "weights"))
    untrained = make().eval()
    trained = copy.deepcopy(untrained)
    trained.load_state_dict(state["average"])
    return {"trained": trained, "untrained": untrained}


def keep(name, rows, **same):
    """Rows, with what is the same in all of them and the command that made them, as a CSV file.

    One that was there before is set aside.
    """
    command = "python " + shlex.join(sys.argv)
    write_rows(f"results/{name}.csv", [{**row, **same, "command": command} for row in rows])
    print(f"wrote results/{name}.csv", flush=True)


def kept(name):
    """The rows of a table that was written before; none if there is no such table."""
    path = f"results/{name}.csv"
    return list(csv.DictReader(open(path, encoding="utf-8"))) if os.path.exists(path) else []


def save(name, figure, title=None):
    """A figure as a PNG file."""
    figure.suptitle(title)
    write(f"figures/{name}.png", lambda part: figure.savefig(part, format="png"))
    plt.close(figure)
    print(f"wrote figures/{name}.png", flush=True)


# --------------------------------------------------------------------------------------------------
# Digits: is Δ large where the ink is?
#
# One picture of one digit persuades easily. So the same question is put to a thousand digits, as a
# rank correlation: it asks only whether more ink goes with more Δ, in a straight line or not. It is
# taken within each digit, since thick digits have more ink and may have more Δ.

BACK = range(6)      # Δ is compared with what its scan reads now, and up to five tokens earlier


@torch.no_grad()
def read_images(model, images):
    """Δ over its resting value, as each scan reads it: images (b, 1, h, w), normalised.

    -> {(name of the scan, whether it reads backward): (b, l)}
    """
    with watch(model) as scans:
        model(images)
    gates = {}
    for name, scan in scans.items():
        _, layer, branch, _ = name.split(".")              # body.0.second.s6
        both = model.body[int(layer)].direction == "bidirectional"
        way = {"first": "forward", "second": "backward"}[branch] if both else f"{branch} branch"
        gates[f"layer {int(layer) + 1}, {way}", way == "backward"] = over_rest(scan).cpu()
    return gates


def on_grid(tokens, backward):
    """(l,) as a scan reads -> (side, side) as the image lies, for a square image."""
    tokens = tokens.flip(0) if backward else tokens
    return tokens.view(math.isqrt(len(tokens)), -1)


def gate_scale(ratios):
    """One scale of colours for Δ over its resting value: blue is less, white is rest, red more."""
    return TwoSlopeNorm(1, 0, max(1.01, *(ratio.max().item() for ratio in ratios)))


def show_gate(ax, pixels, ratio, backward, norm):
    """Δ over its resting value (l,), where it lies on the image, under the digit's outline."""
    side = len(pixels)
    middle = torch.arange(side) + 0.5    # of each pixel
    ax.contour(middle, middle, pixels, levels=[127], colors="black", linewidths=1)
    return ax.imshow(on_grid(ratio, backward), cmap="RdBu_r", norm=norm, extent=(0, side, side, 0))


def draw_digit(name, pixels, gates, title):
    """Δ of every scan over the digit's outline; trained above, untrained below, on one scale.

    pixels (h, w), 0 … 255; gates {"trained": what read_images gave for it, "untrained": …}
    What to see: below, nearly white everywhere. Above, red behind the strokes, in the direction of
    reading: at the end of a row it goes on in the next one.
    """
    norm = gate_scale(ratio for scans in gates.values() for ratio in scans.values())
    columns = len(gates["trained"]) + 1
    figure, axes = plt.subplots(2, columns, figsize=(2.2 * columns + 0.6, 4.6),
                                subplot_kw={"xticks": [], "yticks": []})
    for row, (look, scans) in zip(axes, gates.items()):
        row[0].imshow(pixels, cmap="gray_r")
        row[0].set(ylabel=look, title="the image")
        for ax, ((label, backward), ratio) in zip(row[1:], scans.items()):
            shown = show_gate(ax, pixels, ratio[0], backward, norm)
            ax.set_title(label)
    figure.colorbar(shown, ax=axes, shrink=0.8, label="Δ / its resting value softplus(bias)")
    save(name, figure, title)


def animate(path, pixels, gates, moves):
    """The digit, read by both scans of a layer, as a GIF: what is known after each token.

    gates   {(label, backward): Δ over its resting value (1, l)} for two scans
    moves   change of h (1, l), for the same two
    What to see: the forward scan has seen only the rows above, the backward one only those below.
    """
    length, norm, frames = moves[0].shape[1], gate_scale(gates.values()), []
    figure = plt.figure(figsize=(6, 5), dpi=80)
    for step in range(1, length + 1):
        figure.clear()
        axes = figure.subplots(2, 2, sharey="row", height_ratios=(2, 1))
        for (above, below), ((label, backward), ratio), change in zip(axes.T, gates.items(), moves):
            known = ratio[0].where(torch.arange(length) < step, math.nan)      # the rest is grey
            shown = show_gate(above, pixels, known, backward, norm)
            above.set(title=label, xticks=[], yticks=[], facecolor="0.85")
            below.plot(range(1, step + 1), change[0, :step], "o-", color="black", markersize=2)
            below.set(xlim=(0, length + 1), ylim=(0, 1.05 * max(m.max() for m in moves)),
                      xlabel="tokens read")
        axes[1, 0].set_ylabel("change of h")
        figure.colorbar(shown, ax=axes[0], label="Δ / its resting value")
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
    frames += 9 * frames[-1:]            # the end stays for a while
    write(path, lambda part: frames[0].save(part, "GIF", save_all=True, append_images=frames[1:],
                                            duration=167, loop=0))
    print(f"wrote {path}", flush=True)


def rank_correlation(a, b):
    """Spearman's ρ along the last dimension, (b, l) both -> (b,). Equal values share a rank."""
    def ranks(t):
        above = t.unsqueeze(-1) > t.unsqueeze(-2)                              # (b, l, l)
        equal = t.unsqueeze(-1) == t.unsqueeze(-2)
        r = (above.float() + 0.5 * equal.float()).sum(-1)
        return r - r.mean(-1, keepdim=True)

    a, b = ranks(a), ranks(b)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)


def correlate(ratio, ink):
    """Columns of results/delta.csv: rank correlation within each digit, mean over the digits.

    ratio, ink    (b, l) Δ over its resting value, and brightness, in the order of the scan
    back_0 …      of Δ with the ink that the scan read so many tokens earlier
    back_2_place_removed    ink is mostly in the middle, and Δ may depend on the place alone. So
                  here both are taken less their mean at this place over all digits
    percentile_99   of Δ over its resting value, over patches and digits: how wide the gate opens
    """
    l = ratio.shape[1]
    row = {f"back_{back}": rank_correlation(ratio[:, back:], ink[:, :l - back]).mean()
           for back in BACK}
    a, b = ratio[:, 2:], ink[:, :l - 2]
    row["back_2_place_removed"] = rank_correlation(a - a.mean(0), b - b.mean(0)).mean()
    row["percentile_99"] = ratio.quantile(0.99)
    return {column: f"{value.item():.3f}" for column, value in row.items()}


def draw_ink(name, rows, title):
    """A column per scan: rank correlation of Δ with the ink, over tokens back.

    What to see: most trained lines are low at 0, the ink of the token itself, and high at 2 or 3.
    Untrained ones go up or down as chance will have it.
    """
    scans = list(dict.fromkeys(row["scan"] for row in rows))
    figure, axes = plt.subplots(1, len(scans), figsize=(2.9 * len(scans) + 0.6, 3.2), sharey=True)
    for row in rows:
        hidden = "" if row["seed"] == rows[0]["seed"] else "_"       # from the legend
        axes[scans.index(row["scan"])].plot(
            BACK, [float(row[f"back_{back}"]) for back in BACK], "o-", color=LOOKS[row["model"]],
            markersize=3, label=hidden + row["model"])
    for ax, scan in zip(axes, scans):
        ax.set(title=scan, xlabel="tokens back")
        ax.axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel("rank correlation of Δ with ink")
    axes[0].legend()
    save(name, figure, title)


def look_at_digits(args, device):
    """Figures of Δ on one digit and on a thousand, the animation, and results/delta.csv."""
    names = ("mnist", "synthetic_digits", "mnist_quick", "synthetic_digits_quick")
    states = trained_models(args, [f"{name}-bidirectional" for name in names],
                            "python train_mnist.py")
    recipe, name = states[0]["recipe"], states[0].get("data", {}).get("name", "")
    for other in (state["recipe"] for state in states):
        if (other.get("dataset") not in ("mnist", "fashion") or other["layers"] == 0
                or other["model"] in ("rnn", "s4") or not 1 < other.get("patch", 1) < 14
                or {**other, "seed": recipe["seed"]} != recipe):
            sys.exit("visualize_delta.py: only Vision Mambas that read MNIST by patches, and "
                     "differ in the seed alone, can be looked at: name others by --checkpoint")
    source = "synthetic" if name.startswith("synthetic") else "real"
    data = train_mnist.load_data(recipe["dataset"], source, args.data_dir, 0)
    places = (data.test_labels == args.digit).nonzero().flatten()
    if args.index >= len(places):
        sys.exit(f"visualize_delta.py: {name} has {len(places)} test images of a {args.digit}: use "
                 f"a smaller --index")
    defaults = train_mnist.RECIPES["mnist"]        # of settings newer than a checkpoint
    pairs = [make_pair(state, lambda: train_mnist.build(
        defaults | state["recipe"], data)[0].to(device)) for state in states]

    def read(model, images):
        inputs, _ = train_mnist.classification(data).prepare(images, None)
        return read_images(model, inputs.to(device))

    # A thousand digits: every scan of every model, with the ink that it read.
    images, rows = data.test_images[:1000], []
    ink = F.avg_pool2d(images.float() / 255, recipe["patch"]).flatten(1)       # (b, l)
    for state, pair in zip(states, pairs):
        for look, model in pair.items():
            rows += [{"model": look, "seed": state["recipe"]["seed"], "scan": scan,
                      **correlate(ratio, ink.flip(1) if backward else ink)}
                     for (scan, backward), ratio in read(model, images).items()]
    suffix = "" if name == "mnist" else "_" + name.replace("-", "_")
    suffix += "" if recipe["model"] == "bidirectional" else f"_{recipe['model']}"
    keep(f"delta{suffix}", rows, digits=len(images), dataset=name, device=describe(device),
         torch=torch.__version__)
    draw_ink(f"delta_ink{suffix}", rows,
             f"{name}: the patches of {len(images):,} test digits, a line per model")

    # One digit, by the models of the first seed.
    image = data.test_images[places[args.index]][None]                         # (1, 1, h, w)
    gates = {look: read(model, image) for look, model in pairs[0].items()}
    if (args.digit, args.index) != (7, 0):
        suffix += f"_{args.digit}_{args.index}"
    draw_digit(f"delta_digit{suffix}", image[0, 0], gates,
               f"{name}, test image {args.index} of digit {args.digit}, seed {rows[0]['seed']}")
    with watch(pairs[0]["trained"]) as scans:
        read(pairs[0]["trained"], image)
    last = slice(-2, None)               # the two scans of the last layer
    animate(f"figures/scan{suffix}.gif", image[0, 0], dict([*gates["trained"].items()][last]),
            [changes(scan).cpu() for scan in [*scans.values()][last]])


# --------------------------------------------------------------------------------------------------
# Text: at which characters does the gate open?
#
# One might guess: at the ends of words, at line breaks, at names. The passage lets one look, and
# the means over the whole validation text, by kind of character, say whether it was chance.

KINDS = ("letter in a word", "first letter", "speaker's name", "space", "line break", "colon",
         "other")
PASSAGE = slice(1, 59)                   # of the validation text: its beginning, but for a "?"


def kinds_of(string):
    """The kind of each character: -> [one of KINDS].

    A speaker's name has a line of its own, after an empty one and up to a colon. An apostrophe
    counts as part of a word: the d of "call'd" is no first letter.
    """
    speakers, kinds = set(), []
    for match in re.finditer(r"(?m)(?<=\n\n)[^\n:]+:$", string):
        speakers.update(range(*match.span()))
    for place, (before, character) in enumerate(zip("\n" + string, string)):
        if not character.isalpha():
            kinds.append({" ": "space", "\n": "line break", ":": "colon"}.get(character, "other"))
        elif place in speakers:
            kinds.append("speaker's name")
        else:
            inside = before.isalpha() or before == "'"
            kinds.append("letter in a word" if inside else "first letter")
    return kinds


@torch.no_grad()
def read_text(model, tokens, piece=4096):
    """Δ of each layer over its resting value, (layers, l), for tokens (l,) read as one stream."""
    states, pieces = None, []
    with watch(model) as scans:
        for part in tokens.split(piece):           # the state goes on, the memory does not grow
            _, states = model(part[None], states)
            pieces.append(torch.stack([over_rest(scan)[0].cpu() for scan in scans.values()]))
    return torch.cat(pieces, 1)


def draw_text(name, string, curves, rows, title):
    """A row per layer: left Δ along a passage, right its mean by kind of character, all seeds.

    curves {"trained": Δ over its resting value (layers, l), "untrained": …}; rows as in the CSV
    What to see: grey stays at 1. Red has peaks, but not where words end: in the last layer they are
    at line breaks and in the speaker's name.
    """
    layers = len(curves["trained"])
    figure, axes = plt.subplots(layers, 2, figsize=(13, 1.9 * layers + 0.4), width_ratios=(4.6, 1),
                                sharex="col", sharey="col", squeeze=False)
    signs = [{"\n": "↵", " ": "·"}.get(character, character) for character in string]
    for layer, (left, right) in enumerate(axes):
        for look, color in LOOKS.items():
            left.plot(curves[look][layer], "o-", color=color, markersize=3, linewidth=1, label=look)
            for row in rows:
                if (row["model"], row["layer"]) == (look, layer + 1):
                    right.plot([float(row[kind]) for kind in KINDS], KINDS, "o", color=color,
                               markersize=5, alpha=0.6)
        left.set_xticks(range(len(signs)), signs, family="monospace", fontsize=12)
        left.tick_params(labelbottom=True, length=0)       # the characters under every layer
        left.set(title=f"layer {layer + 1}", ylabel="Δ / its resting value", xlim=(-1, len(signs)))
    axes[0, 0].legend(ncols=2)
    axes[0, 1].set_title("mean, a dot per seed")
    axes[0, 1].invert_yaxis()
    axes[-1, 1].set_xlabel("Δ / its resting value")
    save(name, figure, title)


def look_at_text(args, device):
    """Δ of every layer over the validation text: a figure, and results/delta_text.csv."""
    names = ("shakespeare", "synthetic_pydoc", "shakespeare_quick", "synthetic_pydoc_quick")
    states = trained_models(args, names, "python train_shakespeare.py")
    name, rows, passages = states[0].get("name", "?"), [], []
    if name.replace("-", "_") not in names or any(
            state.get("name", "?") != name for state in states):
        sys.exit("visualize_delta.py: only models of one text, Shakespeare or Python's help texts, "
                 "can be looked at: name others by --checkpoint")
    text = load_text(args.data_dir, "synthetic" if "pydoc" in name else "real", None)
    string = "".join(text.vocabulary[token] for token in text.valid)
    kinds = kinds_of(string)
    masks = {kind: torch.tensor([k == kind for k in kinds]) for kind in KINDS}     # (l,) each
    for state in states:
        pair = make_pair(state, lambda: train_shakespeare.build(
            train_shakespeare.RECIPE | state["recipe"], text.vocabulary).to(device))
        curves = {look: read_text(model, text.valid.to(device)) for look, model in pair.items()}
        passages.append({look: ratio[:, PASSAGE] for look, ratio in curves.items()})
        rows += [{"model": look, "seed": state["recipe"]["seed"], "layer": layer,
                  **{kind: f"{values[mask].mean().item():.3f}" for kind, mask in masks.items()}}
                 for look, ratio in curves.items() for layer, values in enumerate(ratio, 1)]
    suffix = "" if name == "shakespeare" else "_" + name.replace("-", "_")
    keep(f"delta_text{suffix}", rows, characters=len(string), text=name, device=describe(device),
         torch=torch.__version__)
    draw_text(f"delta_text{suffix}", string[PASSAGE], passages[0], rows,
              f"{name}: the beginning of the validation text, seed {rows[0]['seed']}")


# --------------------------------------------------------------------------------------------------
# The models that are taught to remember: one block, its selection switched off, and an RNN.
#
# They differ in one thing each. "penalised" has the first weights and the data of "selective"; only
# its loss is another. "fixed-delta" can choose what to write, but not how much; "fixed" can choose
# nothing. The RNN is what came before. All have the same number of parameters, to 1 %. "paper" is
# "selective" again, trained longer, with smaller steps, and without a curriculum.

SYMBOLS = 16         # the ordinary tokens, 0 … 15
MARKER = 16          # of the needle
BLANK, ASK = 16, 17  # of copying
FLOOR = 1e-9         # smallest Δ that counts: at A = -1 a million such steps forget 0.1 %

MODELS = {  # name: colour, in words
    "selective": ("#1f77b4", "selection"),
    "penalised": ("#d62728", "selection, and a penalty on Δ"),
    "fixed-delta": ("#ff7f0e", "Δ fixed, B and C selective"),
    "fixed": ("#9467bd", "Δ, B, C fixed"),
    "rnn": ("#7f7f7f", "vanilla RNN"),
    "paper": ("#17becf", "selection, the paper's recipe"),
}


def switch_off(model, what):
    """Take the selection out of a model for good: -> the model, of the same shape and cost.

    "delta"   dt_proj is shown zeros: Δ = softplus(bias) at every token, while B and C still depend
              on it. The weight of dt_proj is then without effect
    "all"     x_proj is shown ones: Δ, B and C are learned, and the same at every token. S4 fixes
              them too, but this is not S4: A is real, and convolution and gate are Mamba's
    """
    def constant(_, inputs):
        return torch.zeros_like(inputs[0]) if what == "delta" else torch.ones_like(inputs[0])

    for module in model.modules():
        if isinstance(module, S6):
            maps = module.dt_proj if what == "delta" else module.x_proj
            maps.register_forward_pre_hook(constant)
    return model


class RNNLM(nn.Module):
    """The interface of MambaLM, with the RNN of rnn.py as body and as many parameters, to 1 %."""

    def __init__(self, vocabulary, d_model=64, hidden=134, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.body = RNN(d_model, hidden, layers)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens, states=None):
        y, states = self.body.rnn(self.embedding(tokens), states)              # (b, l, hidden)
        return self.head(y), states


def build(name, seed):
    """The model of that name, with its first weights: 66,600 parameters."""
    torch.manual_seed(seed)
    if name == "rnn":
        return RNNLM(ASK + 1)
    model = MambaLM(ASK + 1, d_model=64, layers=2)
    off = {"fixed-delta": "delta", "fixed": "all"}
    return switch_off(model, off[name]) if name in off else model


def generator(seed, what, number=0):
    """Random numbers for one purpose, the same in every run."""
    return torch.Generator().manual_seed(seed_for(seed, what, number))


def learn(model, optimizer, tokens, answers, penalty=0.0):
    """One step on tokens (b, l), whose last answers.shape[1] places ask for answers: -> the loss.

    It lowers the loss of the task plus penalty · mean log(Δ + FLOOR). The logarithm lowers a small
    Δ by the same factor as a large one: a gate that nothing needs closes altogether.
    """
    with watch(model) as scans:
        logits = model(tokens)[0][:, -answers.shape[1]:, :SYMBOLS]
    loss = task = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    if penalty:
        loss = task + penalty * torch.stack([(scan.delta + FLOOR).log().mean()
                                             for scan in scans.values()]).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return task.item()


def show_step(name, seed, step, steps, length, loss):
    """Print the loss every 100 steps."""
    if step % 100 == 0:
        print(f"  {name} seed {seed}  step {step}/{steps}  length {length}  loss {loss:.4f}",
              flush=True)


def facts_of(model, steps, length, seconds, device):
    """Columns about a model that was taught."""
    return {"params": sum(p.numel() for p in model.parameters()), "steps": steps,
            "taught_up_to": length, "training_seconds": f"{seconds:.0f}",
            "device": describe(device), "torch": str(torch.__version__)}


def taught(args, task, names, teach, device, **recipe):
    """Every model with every seed, taught now, or before with --resume.

    teach   (model, name, seed, device, **recipe) -> the greatest length that it came to
    Yields name, seed, model, facts; the facts stand in every row about this model.
    """
    for seed, name in itertools.product(args.seeds, names):
        path = os.path.join(args.out, f"{task}-{name}-seed{seed}.pt")
        model, start = build(name, seed).to(device), time.perf_counter()
        if args.resume and os.path.exists(path):
            state = load(path, weights=model)
        else:
            length = teach(model, name, seed, device, **recipe)
            state = {"weights": model.state_dict(), "facts": facts_of(
                model, recipe["steps"], length, time.perf_counter() - start, device)}
            write(path, lambda part: torch.save(state, part))
        yield name, seed, model, state["facts"]


@torch.no_grad()
def along(model, tokens):
    """Δ and change of h at each token of one sequence, tokens (1, l): -> two lists.

    Each has one tensor (l,) per layer. Less than FLOOR is set to FLOOR: the axis is logarithmic.
    """
    with watch(model) as scans:
        model(tokens)
    return [[values(scan)[0].cpu().clamp(min=FLOOR) for scan in scans.values()]
            for values in (gate, changes)]


def draw_along(name, panels, marks, marked, title):
    """A column per model: above Δ, below the change of h; panels {name: what `along` gave}.

    What to see: the axes are logarithmic. With the penalty, gate and state move at the needle
    alone. With copying, the gate of the first layer opens and shuts at each symbol.
    """
    figure, axes = plt.subplots(2, len(panels), figsize=(3.1 * len(panels) + 0.6, 5), sharex=True,
                                sharey="row", squeeze=False)
    for column, (model, curves) in zip(axes.T, panels.items()):
        for ax, layers in zip(column, curves):
            for layer, (values, color) in enumerate(zip(layers, LAYERS), 1):
                ax.plot(values, color=color, linewidth=1, alpha=0.8, label=f"layer {layer}")
            for i, place in enumerate(marks):
                ax.axvline(place, color="#ffd92f", linewidth=5, alpha=0.5, zorder=0,
                           label=None if i else marked)
            ax.set_yscale("log")
        column[0].set_title(MODELS[model][1] if model in MODELS else model)
        column[1].set_xlabel("token")
    axes[0, 0].set_ylabel("Δ, mean over channels")
    axes[1, 0].set_ylabel("change of h, ‖h_t - h_{t-1}‖")
    axes[0, 0].legend()
    save(name, figure, f"{title}; what is under {FLOOR:.0e} is drawn there")


# --------------------------------------------------------------------------------------------------
# A needle in a haystack (the paper's induction heads, section 4.1.2): in noise stands a marker,
# then the symbol to remember; when the marker comes again, at the end, that symbol is asked for.
#
# To find a needle a model must write at two tokens and then leave its state alone, for as long as
# it takes: what a gate is for. A leak that costs nothing at length 256 is multiplied by 4,096 at a
# million. So what is learned on short haystacks is tested on long ones.

TAUGHT = (8, 16, 32, 64, 128, 256)       # lengths in training
FULL, QUICK = dict(steps=600, tokens_per_step=4096), dict(steps=300, tokens_per_step=2048)
STAGES = (2048, 4096, 8192, 16384, 32768)          # steps: see teach_as_the_paper
SHORTEST, LONGEST, LONGEST_QUICK = 6, 20, 12       # log₂ of the lengths that are tested
DEPTHS = 8           # into which a haystack is divided in figures/needle_grid.png
PIECE = 2 ** 14      # tokens that are evaluated at a time
NEAR = 5             # the marker, its symbol, and the three tokens whose convolution reaches them


def haystacks(length, places, answers, random, piece=None):
    """Yields the tokens of many haystacks, piece by piece: (b, ≤ piece) of int64.

    places, answers (b,): the marker is at place ≤ length - 3, the answer behind it
    """
    piece = piece or length
    for start in range(0, length, piece):
        tokens = torch.randint(SYMBOLS, (len(places), min(piece, length - start)), generator=random)
        # Marker, answer and question, each in the rows where it falls into this piece.
        for at, symbol in ((places, MARKER), (places + 1, answers), (length - 1, MARKER)):
            column = torch.as_tensor(at - start).expand(len(places))
            rows = ((column >= 0) & (column < tokens.shape[1])).nonzero().flatten()
            tokens[rows, column[rows]] = torch.as_tensor(symbol).expand(len(places))[rows]
        yield tokens


def random_needles(count, length, random):
    """-> tokens (count, length), places (count,), answers (count,)."""
    places = torch.randint(length - 2, (count,), generator=random)
    answers = torch.randint(SYMBOLS, (count,), generator=random)
    return next(haystacks(length, places, answers, random)), places, answers


def teach_needle(model, name, seed, device, steps, tokens_per_step):
    """The length doubles when the loss falls under 0.05: -> the greatest one that was solved.

    After 256, lengths are drawn at random, so that none is forgotten; and only then is "penalised"
    penalised. Earlier, the penalty could shut the gates before the task is learned.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
    random, level = generator(seed, "needle"), 0
    for step in range(1, steps + 1):
        last = level == len(TAUGHT)
        length = TAUGHT[int(torch.randint(level, (), generator=random)) if last else level]
        tokens, _, answers = random_needles(tokens_per_step // length, length, random)
        loss = learn(model, optimizer, tokens.to(device), answers[:, None].to(device),
                     0.01 if last and name == "penalised" else 0.0)
        level += not last and loss < 0.05
        show_step(name, seed, step, steps, length, loss)
    return TAUGHT[level - 1] if level else 0


def teach_as_the_paper(args, seed, device):
    """8 x 256 tokens per step, a learning rate of 1e-3, no penalty: yields model, facts by stage.

    The paper goes on for 204,800 steps, this for about an hour. Each stage is saved together with
    the optimizer, and --resume goes on from the last one.
    """
    model, step, seconds = build("paper", seed).to(device), 0, 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for stage in STAGES[:1] if args.quick else STAGES:
        path = os.path.join(args.out, f"needle_paper-{stage}-seed{seed}.pt")
        if args.resume and os.path.exists(path):
            state = load(path, weights=model, optimizer=optimizer)
            step, seconds = stage, state["seconds"]
        start = time.perf_counter() - seconds
        while step < stage:
            tokens, _, answers = random_needles(8, TAUGHT[-1], generator(seed, "paper", step))
            loss = learn(model, optimizer, tokens.to(device), answers[:, None].to(device))
            step += 1
            show_step("paper", seed, step, STAGES[-1], TAUGHT[-1], loss)
        seconds = time.perf_counter() - start
        state = {"weights": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "seconds": seconds}
        write(path, lambda part: torch.save(state, part))
        yield model, facts_of(model, stage, TAUGHT[-1], seconds, device)


@torch.inference_mode()
def read(model, pieces, device):
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
    return read(model, pieces, device).argmax(-1) == answers


def ask_at_all_lengths(args, model, name, seed, device, facts):
    """Rows for results/needle.csv; and percent found by length and depth, (lengths, DEPTHS).

    A model under 20 % is not tested at greater lengths: there found is NaN.
    """
    rows, longest = [], LONGEST_QUICK if args.quick else LONGEST
    found = torch.full((longest - SHORTEST + 1, DEPTHS), math.nan)
    for i in range(len(found)):
        length, start = 2 ** (SHORTEST + i), time.perf_counter()
        count = 64 if length <= 2 ** 16 else 16            # a million tokens take minutes
        right = find_needles(model, length, count, seed, device)
        found[i] = 100 * right.view(DEPTHS, -1).float().mean(1)
        accuracy, seconds = found[i].mean().item(), time.perf_counter() - start
        rows.append({"model": name, "seed": seed, "length": length, "haystacks": count,
                     "accuracy": f"{accuracy:.1f}", "seconds": f"{seconds:.1f}", **facts})
        print(f"RESULT model={name} seed={seed} steps={facts['steps']} length={length} "
              f"accuracy={accuracy:.1f}", flush=True)
        if accuracy < 20:
            break
    return rows, found


@torch.no_grad()
def gates_at_needles(model, name, seed, device, count=100, length=1024):
    """How the gates stand at the needle and elsewhere: -> rows for results/needle_delta.csv.

    At the needle is the largest Δ of the NEAR tokens that see it, elsewhere the median of the
    others, and the ratio counts a Δ under FLOOR as FLOOR. The question at the end is left out.
    share_of_change_percent: how much of Σ ‖h_t - h_{t-1}‖ falls to those NEAR tokens; empty where
    the state never changes, because the layer's gate is shut.
    """
    tokens, places, _ = random_needles(count, length, generator(seed, "gates"))
    with watch(model) as scans:
        model(tokens.to(device))
    distance = torch.arange(length - 1) - places[:, None]                      # (count, l-1)
    near, rows = (distance >= 0) & (distance < NEAR), []
    for layer, scan in enumerate(scans.values(), 1):
        delta, moves = gate(scan)[:, :-1].cpu(), changes(scan)[:, :-1].cpu()
        there = delta.masked_fill(~near, 0).amax(1)                            # (count,)
        elsewhere = delta.masked_fill(near, math.nan).nanmedian(1).values
        ratio = there.clamp(min=FLOOR) / elsewhere.clamp(min=FLOOR)
        low, high = ratio.quantile(torch.tensor([0.05, 0.95])).tolist()
        share = f"{100 * (moves * near).sum() / moves.sum():.1f}"
        rows.append({"model": name, "seed": seed, "layer": layer, "haystacks": count,
                     "delta_at_needle": f"{there.median():.3g}",
                     "delta_elsewhere": f"{elsewhere.median():.3g}",
                     "needle_over_median": f"{ratio.median():.4g}",
                     "quantile_5": f"{low:.4g}", "quantile_95": f"{high:.4g}",
                     "share_of_change_percent": share if moves.sum() / count > FLOOR else ""})
    return rows


def draw_lengths(quick):
    """Needles found over length, a line per model, seed and number of training steps, from the rows
    that there are of both tasks.

    What to see: in the grey part, nearly all that was taught is learned. Beyond it, how far a line
    stays at the top says how well the model leaves its state alone.
    """
    lines = {}
    for row in kept(f"needle{quick}") + kept(f"needle_paper{quick}"):
        line = lines.setdefault((row["model"], row["seed"], int(row["steps"])), [])
        line.append((int(row["length"]), float(row["accuracy"])))
    figure, ax = plt.subplots(figsize=(9.5, 4.4))
    for (model, _, steps), points in lines.items():
        color, words = MODELS[model]
        label = f"{words}, {steps:,} steps"
        # The stages of the paper's recipe have one colour, which grows stronger.
        look = ("o--", 0.2 + 0.8 * steps / max(STAGES)) if model == "paper" else ("o-", 0.7)
        ax.plot(*zip(*points), look[0], color=color, alpha=look[1], markersize=4, label=label)
    ax.set_xscale("log", base=2)
    ax.axvspan(2 ** SHORTEST, TAUGHT[-1], color="0.9", zorder=0, label="lengths of the training")
    ax.axhline(100 / SYMBOLS, color="black", linestyle=":", linewidth=1, label="guessing")
    ax.set(xlabel="length of the haystack (tokens)", ylabel="needles found (%)", ylim=(-3, 103))
    once = {label: line for line, label in zip(*ax.get_legend_handles_labels())}
    ax.legend(once.values(), once, loc="center left", bbox_to_anchor=(1, 0.5))
    save(f"needle_lengths{quick}", figure, "a line per model and seed")


def draw_grid(name, found):
    """Needles found by depth and by length, mean over seeds; white where one was not tested.

    What to see: red comes from above, where needles stand early and have long to wait.
    """
    models = list(dict.fromkeys(model for model, _ in found))
    figure, axes = plt.subplots(1, len(models), figsize=(2.9 * len(models) + 1, 3.2), sharey=True,
                                squeeze=False)
    for ax, model in zip(axes[0], models):
        mean = torch.stack([grid for (other, _), grid in found.items() if other == model]).mean(0)
        powers = range(SHORTEST, SHORTEST + len(mean))
        shown = ax.imshow(mean.T, cmap="RdYlBu", vmin=0, vmax=100, aspect="auto",
                          extent=(powers[0] - 0.5, powers[-1] + 0.5, 100, 0))
        ax.set(title=MODELS[model][1], xlabel="length, tokens")
        ax.grid(False)
        ax.set_xticks(powers[::4], [f"$2^{{{power}}}$" for power in powers[::4]])
    axes[0, 0].set_ylabel("depth of the needle (%)")
    figure.colorbar(shown, ax=axes, label="found (%)")
    save(name, figure)


def look_for_needles(args, device):
    """Teach every model, ask it at every length, and look at its gates: rows and figures."""
    recipe, quick = (QUICK, "_quick") if args.quick else (FULL, "")
    names = ["penalised"] if args.quick else [name for name in MODELS if name != "paper"]
    print(f"needle: {recipe}, seeds {args.seeds}; loss of a blind guess ln {SYMBOLS} = "
          f"{math.log(SYMBOLS):.4f}", flush=True)
    rows, gates, found = [], [], {}
    models = {("untrained", seed): build("selective", seed).to(device) for seed in args.seeds}
    for name, seed, model, facts in taught(args, f"needle{quick}", names, teach_needle, device,
                                           **recipe):
        new, found[name, seed] = ask_at_all_lengths(args, model, name, seed, device, facts)
        rows += new
        if name != "rnn":                # it has no Δ
            models[name, seed] = model
    for (name, seed), model in models.items():             # the untrained ones are the control
        gates += gates_at_needles(model, name, seed, device)
    place, seed = 341, args.seeds[0]     # a third of the way in, for the figure
    tokens = next(haystacks(1024, torch.tensor([place]), torch.tensor([7]),
                            generator(seed, "one haystack"))).to(device)
    keep(f"needle{quick}", rows)
    keep(f"needle_delta{quick}", gates)
    draw_along(f"needle_delta{quick}",
               {name: along(model, tokens) for (name, s), model in models.items() if s == seed},
               [place + 1], "needle", f"one haystack, seed {seed}")
    draw_lengths(quick)
    draw_grid(f"needle_grid{quick}", found)


def look_as_the_paper(args, device):
    """Ask a model that has no penalty, after each doubling of its steps."""
    quick, rows = "_quick" if args.quick else "", []
    for seed in args.seeds:
        for model, facts in teach_as_the_paper(args, seed, device):
            rows += ask_at_all_lengths(args, model, "paper", seed, device, facts)[0]
    keep(f"needle_paper{quick}", rows)
    draw_lengths(quick)


# --------------------------------------------------------------------------------------------------
# Selective copying (section 4.1.1): symbols among blanks, to be repeated in order.
#
# A model that treats all tokens alike can repeat what came a fixed number of tokens ago. Here the
# distances are random: it must pass over the blanks, or they take up its state. (The paper's task
# is longer: 4,096 tokens, of 16 kinds with the noise, and 400,000 steps.)

COPIED = 16          # symbols to repeat


def scattered(count, length, random):
    """-> tokens (count, length + COPIED), places of the symbols and the symbols (count, COPIED)."""
    # The first 16 of a random order of all places are 16 different places at random.
    places = torch.rand(count, length, generator=random).argsort(1)[:, :COPIED].sort(1).values
    symbols = torch.randint(SYMBOLS, (count, COPIED), generator=random)
    tokens = torch.full((count, length + COPIED), BLANK)
    tokens[:, length:] = ASK
    return tokens.scatter_(1, places, symbols), places, symbols


def teach_copying(model, name, seed, device, steps, length):
    """From 30 % to 70 % of the steps the length grows from 16 (no blanks): -> the last length.

    Without blanks the task is plain copying, and easy; the distances then grow little by little.
    The learning rate rises to 1e-2 in 50 steps, and falls to 0 along a cosine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    random = generator(seed, "copying")
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, step / 50) * (1 + math.cos(math.pi * step / steps))
        grown = min(1.0, max(0.0, (step / steps - 0.3) / 0.4))
        now = COPIED + round((length - COPIED) * grown)
        tokens, _, symbols = scattered(max(4, 4096 // (now + COPIED)), now, random)
        loss = learn(model, optimizer, tokens.to(device), symbols.to(device))
        show_step(name, seed, step, steps, now, loss)
    return now


@torch.inference_mode()
def copied(model, length, seed, device, count=1024):
    """Which symbols are repeated rightly: bool (count, COPIED)."""
    random, right = generator(seed, "copied", length), []
    for _ in range(0, count, 16):
        tokens, _, symbols = scattered(16, length, random)
        logits = model(tokens.to(device))[0][:, -COPIED:, :SYMBOLS]
        right.append(logits.argmax(-1).cpu() == symbols)
    return torch.cat(right)


def look_at_copying(args, device):
    """Selection on and off side by side: results/copying.csv and a figure."""
    steps, length = (60 if args.quick else 3000), args.length or (32 if args.quick else 256)
    suffix = ("" if length == 256 else f"_length_{length}") + ("_quick" if args.quick else "")
    print(f"copying: {COPIED} symbols among {length} tokens, {steps} steps, seeds {args.seeds}; "
          f"loss of a blind guess ln {SYMBOLS} = {math.log(SYMBOLS):.4f}", flush=True)
    rows, first = [], {"untrained": build("selective", args.seeds[0]).to(device)}
    for name, seed, model, facts in taught(args, f"copying{suffix}", ("selective", "fixed"),
                                           teach_copying, device, steps=steps, length=length):
        first.setdefault(name, model)    # the figure shows those of the first seed
        right = copied(model, length, seed, device).float()
        accuracy, whole = 100 * right.mean().item(), 100 * right.amin(1).mean().item()
        rows.append({"model": name, "seed": seed, "length": length, "sequences": len(right),
                     "accuracy": f"{accuracy:.2f}", "whole_sequences": f"{whole:.2f}", **facts})
        print(f"RESULT model={name} seed={seed} length={length} accuracy={accuracy:.2f}",
              flush=True)
    tokens, places, _ = scattered(1, length, generator(args.seeds[0], "one sequence"))
    keep(f"copying{suffix}", rows)
    draw_along(f"copying{suffix}",
               {name: along(model, tokens.to(device)) for name, model in first.items()},
               places[0].tolist(), "symbol to repeat",
               f"one sequence, seed {args.seeds[0]}, its answer from token {length} on")


# --------------------------------------------------------------------------------------------------
# The command line.

TASKS = {"digits": look_at_digits, "needle": look_for_needles, "paper": look_as_the_paper,
         "copying": look_at_copying, "text": look_at_text}


def parse(arguments):
    p = argparse.ArgumentParser(
        allow_abbrev=False, usage="visualize_delta.py [--flag value ...]    (--help lists them)",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--task", choices=TASKS, nargs="+", default=["needle", "digits"], metavar="TASK",
        help=f"of {', '.join(TASKS)}; default needle digits")
    add("--digit", type=int, choices=range(10), default=7, metavar="0 … 9",
        help="the one to draw, default %(default)s")
    add("--index", type=int, default=0, help="which of its test images, default %(default)s")
    add("--checkpoint", nargs="+", metavar="FILE",
        help="of digits or text; default: every seed in --out, of a full training if there is one")
    add("--seeds", type=int, nargs="+", default=[0], help="of needle, paper, copying; default 0")
    add("--length", type=int, help="of copying, default 256; the paper's: 4096")
    add("--quick", action="store_true", help="needle, paper and copying: fewer steps and lengths")
    add("--resume", action="store_true",
        help="take the models of needle, paper and copying in --out, and train the others")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints, default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    args = p.parse_args(arguments)
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.index < 0 or args.length is not None and args.length < COPIED:
        p.error(f"--index must be 0 or more, and --length {COPIED} or more")
    return args


def main():
    args = parse(sys.argv[1:])
    # The penalty makes Δ so small that numbers become denormal, and a CPU several times slower.
    # Threads inherit this when they start, so it comes before all work.
    torch.set_flush_denormal(True)
    try:
        device = choose_device(args.device)
        for task in dict.fromkeys(args.task):
            TASKS[task](args, device)
    except KeyboardInterrupt:
        sys.exit("\nstopped: --resume takes what was trained to the end")
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"visualize_delta.py: {first_line(error)}")


if __name__ == "__main__":
    main()
