"""visualize_delta.py: look at Δ, and at what an untrained Δ looks like.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        Δ_t → 0: token t is passed over, h stays as it was

    python visualize_delta.py                     digits and needle: 9 minutes on two cores
    python visualize_delta.py --task digits       Δ on a test digit 7 (--digit, --index)
    python visualize_delta.py --task needle       a needle in a haystack of a million tokens
    python visualize_delta.py --task copying      16 symbols, scattered among 256 tokens: 15 minutes
    python visualize_delta.py --quick             a first look in under a minute
    python visualize_delta.py --seeds 0 1 2       the README's tables; they take the place of others
    python visualize_delta.py --resume            take the models that are trained already

The claim: Δ is the gate by which a selective model decides what to write into its state. A picture
alone proves nothing, so each claim has a control: the same model before its first training step,
or with its selection switched off, on the same scale.

Digits. Δ of every scan of the Vision Mamba of train_mnist.py, and its rank correlation with the ink
and the edges of 1,000 test digits. Expect no Δ that is large on a stroke, but one that is large two
tokens behind it: that far the convolution looks back.

Needle. The induction heads of the paper (section 4.1.2): among noise stands a marker, and after it
the symbol to remember, until the marker comes again. It is learned at lengths up to 256 and asked
up to a million, in constant memory. A model that solves 256 leaks a little at every noise token.
There its loss is zero, and nothing pushes the leak further down; but at length 4,096 it tells. So
one model, once it solves 256, also pays for what it writes: to its loss is added
0.01 · mean log(Δ + 1e-9). Expect it to find every needle at every length.

Left out: a text. What Δ does on characters is a question for train_shakespeare.py's model.
Read before: vision.py and train_mnist.py, whose model and helpers this file uses.
"""
import argparse
import contextlib
import copy
import glob
import itertools
import math
import os
import shlex
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import train_mnist
from block import MambaLM
from rnn import RNN
from s6 import S6, write_rows
from train_mnist import (UserError, add_places, check_writable, choose_device, describe,
                         first_line, guard, leave, load_data, mean_sd, normalize, number,
                         read_checkpoint, write_atomically)
from vision import DIRECTIONS

FLOOR = 1e-9         # a Δ under this counts as this: where A = -1, a million of them forget 0.1 %
LAYERS = ("#17becf", "#000000")          # colours of the first and second layer


# --------------------------------------------------------------------------------------------------
# Reading Δ: hooks that are there while one looks, and gone afterwards.

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
    """How wide the gate of each token stands: Δ, mean over the channels, (b, l)."""
    return scan.delta.mean(-1)


def resting(scan):
    """The same for an input of zero: softplus(bias), mean over the channels."""
    return F.softplus(scan.s6.dt_proj.bias).mean()


@torch.no_grad()
def changes(scan):
    """How far each token moves the state: ‖h_t - h_{t-1}‖ over all channels, (b, l)."""
    h, moves = None, []
    for token in scan.x.split(1, 1):
        _, new = scan.s6(token, h, return_state=True)                          # (b, d, n)
        moves.append((new if h is None else new - h).flatten(1).norm(dim=1))
        h = new
    return torch.stack(moves, 1)


def switch_off(model, what):
    """Take the selection out of a model for good: -> the model, of the same shape and cost.

    "delta"   dt_proj is shown zeros: Δ = softplus(bias) at every token, B and C still look. The
              weight of dt_proj is idle
    "all"     x_proj is shown ones: Δ, B and C are learned, and the same at every token. Of the
              weight of x_proj, only the sums of its rows count
    """
    def constant(_, inputs):
        return torch.zeros_like(inputs[0]) if what == "delta" else torch.ones_like(inputs[0])

    for module in model.modules():
        if isinstance(module, S6):
            maps = module.dt_proj if what == "delta" else module.x_proj
            maps.register_forward_pre_hook(constant)
    return model


# --------------------------------------------------------------------------------------------------
# Digits: is Δ large where the ink is?

def find_classifiers(args):
    """The checkpoints to look at: those named, or every seed of the best there is, or a new one."""
    if args.checkpoint:
        return args.checkpoint
    names = ["mnist"] * (args.data != "synthetic") + ["synthetic-digits"] * (args.data != "real")
    for name in [name + quick for quick in ("", "-quick") for name in names]:
        start = os.path.join(args.out, f"{name}-bidirectional-seed")
        paths = sorted(glob.glob(glob.escape(start) + "*.pt"))
        if paths:
            return paths
    print(f"no Vision Mamba in {args.out}: training a quick one first, in half a minute. For a "
          f"better one, run python train_mnist.py before", flush=True)
    flags = ["--quick", "--epochs", "1" if args.quick else "2", "--data", args.data, "--data-dir",
             args.data_dir, "--out", args.out, "--device", args.device]
    if not train_mnist.train(train_mnist.parse(flags)):
        raise KeyboardInterrupt
    return find_classifiers(args)


def load_classifier(path, device):
    """-> the averaged model of a checkpoint, the same before its first step, and its settings.

    Raises UserError if the file holds no Vision Mamba of train_mnist.py, trained to its end.
    """
    other = "name another one with --checkpoint, or train one by python train_mnist.py"
    state = read_checkpoint(path, other)
    settings = state["settings"]
    if settings.get("model") not in DIRECTIONS or not isinstance(settings.get("dataset"), str):
        raise UserError(f"{path} holds no Vision Mamba of train_mnist.py, but "
                        f"{settings.get('model', 'another model')}: {other}")
    if settings.get("tokens", "patches") != "patches" or settings["dataset"].startswith("cifar10"):
        raise UserError(f"{path} holds a model of {settings['dataset']} by "
                        f"{settings.get('tokens')}, and only one of digits by patches can be "
                        f"looked at: {other}")
    if settings.get("layers") == 0:
        raise UserError(f"{path} holds a model of 0 layers, and so no Δ: {other}")
    try:
        torch.manual_seed(train_mnist.seed_for(settings["seed"], "weights"))
        untrained = train_mnist.build(settings)
        trained = copy.deepcopy(untrained)
        trained.load_state_dict(state["average"])
        missing = settings["epochs"] - len(state["scores"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} was made by another version of the model ({first_line(error)}): "
                        f"{other}") from None
    if missing:
        raise UserError(f"the training in {path} is not at its end: go on with the command that "
                        f"began it and --resume, or delete it, or {other}")
    return trained.to(device).eval(), untrained.to(device).eval(), settings


def load_images(path, settings, args):
    """The images that the checkpoint's model was made for: -> Data. Raises UserError for others."""
    synthetic = settings["dataset"].startswith("synthetic")
    wanted = {"auto": synthetic, "real": False, "synthetic": True}[args.data]
    if wanted == synthetic:
        data = load_data(args.data_dir, "synthetic" if synthetic else "real")
        if settings["dataset"].startswith(data.name):
            return data
    raise UserError(f"{path} was trained on {settings['dataset']}, which is not what --data "
                    f"{args.data} asks for: name another one with --checkpoint")


def direction(name, model):
    """The name of a scan as people read it, and whether it runs backward."""
    _, layer, branch, _ = name.split(".")                  # body.0.second.s6
    if model.body[int(layer)].direction == "causal":
        return f"layer {int(layer) + 1}, {branch} branch", False
    backward = branch == "second"
    return f"layer {int(layer) + 1}, {'backward' if backward else 'forward'}", backward


@torch.no_grad()
def read_images(model, images):
    """Δ over its resting value, as each scan reads: images uint8 (b, 1, h, w) -> {scan: (b, l)}.

    A scan is its name, and whether it runs backward.
    """
    with watch(model) as scans:
        model(normalize(images))
    return {direction(name, model): (gate(scan) / resting(scan)).cpu()
            for name, scan in scans.items()}


def choose_digit(data, digit, index):
    """The index-th test image of a digit, (1, 1, h, w). Raises UserError past the last one."""
    places = (data.test_labels == digit).nonzero().flatten()
    if index >= len(places):
        raise UserError(f"{data.name} has {len(places)} test images of a {digit}: --index must be "
                        f"0 … {len(places) - 1}, got {index}")
    return data.test_images[places[index]:places[index] + 1]


def on_grid(tokens, backward):
    """(l,) as a scan reads -> (side, side) as the image lies, for a square image."""
    tokens = tokens.flip(0) if backward else tokens
    return tokens.view(math.isqrt(len(tokens)), -1)


def gate_scale(ratios):
    """One scale of colours for Δ over its resting value: blue is less, white is rest, red more."""
    from matplotlib.colors import TwoSlopeNorm
    return TwoSlopeNorm(1, 0, max(1.01, *(ratio.max().item() for ratio in ratios)))


def draw_digit(path, pixels, gates, title):
    """Δ of every scan over the digit's outline; trained above, untrained below, on one scale.

    pixels (h, w); gates {"trained": what read_images gave for this one image, "untrained": …}
    """
    from matplotlib.figure import Figure
    norm = gate_scale(t for scans in gates.values() for t in scans.values())
    figure = Figure(figsize=(2.2 * len(gates["trained"]) + 2.8, 4.6), layout="constrained")
    axes, side = figure.subplots(2, len(gates["trained"]) + 1), len(pixels)
    for row, (name, scans) in zip(axes, gates.items()):
        row[0].imshow(pixels.numpy(), cmap="gray_r", extent=(0, side, side, 0))
        row[0].set_ylabel(name, fontsize=12)
        for ax, ((label, backward), ratio) in zip(row[1:], scans.items()):
            shown = ax.imshow(on_grid(ratio[0], backward).numpy(), cmap="RdBu_r", norm=norm,
                              extent=(0, side, side, 0))
            middle = torch.arange(side) + 0.5
            ax.contour(middle, middle, pixels, levels=[127], colors="black", linewidths=1)
            if name == "trained":
                ax.set_title(label)
    axes[0, 0].set_title("the image")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes, shrink=0.8, label="Δ / its resting value softplus(bias)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def ink_and_edges(images, l):
    """Of each patch, (b, l): its mean brightness, and the mean slope of brightness per pixel."""
    pixels = images.float().cpu() / 255
    down, right = torch.gradient(pixels, dim=(2, 3))
    patch = images.shape[-1] // math.isqrt(l)
    return {"ink": F.avg_pool2d(pixels, patch).flatten(1),
            "edges": F.avg_pool2d(torch.hypot(down, right), patch).flatten(1)}


def rank_correlation(a, b):
    """Spearman's ρ along the last dimension, (b, l) both -> (b,). Equal values share a rank."""
    def ranks(t):
        above = t.unsqueeze(-1) > t.unsqueeze(-2)                              # (b, l, l)
        equal = t.unsqueeze(-1) == t.unsqueeze(-2)
        r = (above.float() + 0.5 * equal.float()).sum(-1)
        return r - r.mean(-1, keepdim=True)

    a, b = ranks(a), ranks(b)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)


class Reading(NamedTuple):
    """What one scan of one model made of many images, and what was there, in its order."""
    model: str               # trained or untrained
    checkpoint: str
    seed: int
    scan: str
    ratio: torch.Tensor      # (b, l) Δ over its resting value
    strengths: dict          # ink and edges, (b, l) each


BACK = range(6)      # a scan is compared with what it reads now, and up to five tokens earlier
LOOKS = {"trained": "#d62728", "untrained": "#7f7f7f"}


def read_all(models, images):
    """[(checkpoint, seed, trained, untrained)], images -> a Reading for each scan of each model."""
    for path, seed, *pair in models:
        for name, model in zip(LOOKS, pair):
            for (scan, backward), ratio in read_images(model, images).items():
                strengths = {what: t.flip(1) if backward else t
                             for what, t in ink_and_edges(images, ratio.shape[1]).items()}
                yield Reading(name, path, seed, scan, ratio, strengths)


def shifted(reading, what, back):
    """Δ of each token, and what was there `back` tokens earlier, (b, l - back) both."""
    strength = reading.strengths[what]
    return reading.ratio[:, back:], strength[:, :strength.shape[1] - back]


def correlate(readings):
    """Rank correlations of Δ with ink and edges, digit by digit: -> rows for results/delta.csv.

    tokens_back      0: of the patch itself. The convolution shows a scan the three tokens before as
                     well, so Δ may also answer to ink that was read a little earlier
    place_removed    ink is mostly in the middle, and Δ may depend on the place alone. Here Δ, ink
                     and edges are taken less their mean at this place over all digits
    low, high        the 95 % interval of the mean over the digits; seeds differ by much more
    largest          Δ over its resting value, its 99th percentile over patches and digits
    """
    rows = []
    for r, back, removed in itertools.product(readings, BACK, (False, True)):
        for what in r.strengths:
            a, b = shifted(r, what, back)
            if removed:
                a, b = a - a.mean(0), b - b.mean(0)
            rho = rank_correlation(a, b)
            mean, half = rho.mean().item(), 1.96 * rho.std().item() / len(rho) ** 0.5
            rows.append({"model": r.model, "checkpoint": r.checkpoint, "seed": r.seed,
                         "scan": r.scan, "with": what, "tokens_back": back,
                         "place_removed": removed, "rank_correlation": f"{mean:.3f}",
                         "low": f"{mean - half:.3f}", "high": f"{mean + half:.3f}",
                         "largest": f"{r.ratio.quantile(0.99):.3f}", "digits": len(rho)})
    return rows


def bins(x, y, count=8):
    """Means of x and y over bins of x: one for x = 0, and equally full ones for the rest."""
    order = x.argsort()
    empty = int((x == 0).sum())
    groups = [order[:empty]] * (empty > 0) + list(order[empty:].tensor_split(count))
    return torch.tensor([[x[g].mean(), y[g].mean()] for g in groups]).T


def draw_ink(path, readings, rows, title):
    """A column per scan: Δ over ink and over edges, and their rank correlation over tokens back."""
    from matplotlib.figure import Figure
    scans = list(dict.fromkeys(r.scan for r in readings))
    figure = Figure(figsize=(2.9 * len(scans) + 0.6, 8), layout="constrained")
    axes = figure.subplots(3, len(scans), sharex="row", sharey="row", squeeze=False)
    for r in readings:
        column, color = axes[:, scans.index(r.scan)], LOOKS[r.model]
        named = r.checkpoint == readings[0].checkpoint
        for ax, what, style in zip(column, r.strengths, ("-", "--")):
            for back, dots in ((0, ":"), (2, "-")):
                ratio, strength = shifted(r, what, back)
                where = f"{back} tokens back" if back else "of its own patch"
                ax.plot(*bins(strength.flatten(), ratio.flatten()), dots, color=color,
                        label=f"{r.model}, {where}" if named else None)
            chosen = [row for row in rows if not row["place_removed"] and (row["model"], row[
                "checkpoint"], row["scan"], row["with"]) == (r.model, r.checkpoint, r.scan, what)]
            rho, low, high = ([float(row[key]) for row in chosen]
                              for key in ("rank_correlation", "low", "high"))
            column[2].plot(BACK, rho, style, color=color,
                           label=f"{r.model}, with {what}" if named else None)
            column[2].fill_between(BACK, low, high, color=color, alpha=0.3, linewidth=0)
        column[2].axhline(0, color="black", linewidth=0.8)
        column[0].set_title(r.scan)
    for row, label in zip(axes, ("ink: mean brightness, 0 … 1", "edges: mean slope per pixel",
                                 "tokens back")):
        row[0].set_ylabel("Δ / its resting value")
        for ax in row:
            ax.set_xlabel(label)
            ax.grid(alpha=0.3)
    axes[2, 0].set_ylabel("rank correlation with Δ")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[2, -1].legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def draw_frame(figure, pixels, seen, step):
    """What is known after so many tokens: where each scan reads, its Δ so far, its changes of h.

    seen holds, for two scans, label, backward, Δ over resting (l,), change of h (l,), as it reads.
    """
    from matplotlib.patches import Rectangle
    figure.clear()
    length, size = len(seen[0][2]), pixels.shape[0]
    side = math.isqrt(length)
    patch, highest = size // side, max(moves.max().item() for *_, moves in seen)
    norm = gate_scale(delta for _, _, delta, _ in seen)
    axes = [figure.add_axes((0.03 + 0.31 * i, 0.4, 0.27, 0.46)) for i in range(3)]
    below = figure.add_axes((0.1, 0.12, 0.81, 0.21))
    axes[0].imshow(pixels.numpy(), cmap="gray_r", extent=(0, size, size, 0))
    axes[0].set_title(f"after {step} of {length} tokens", fontsize=9)
    for ax, color, (label, backward, delta, moves) in zip(axes[1:], ("#17becf", "#ff7f0e"), seen):
        place = length - step if backward else step - 1
        axes[0].add_patch(Rectangle((place % side * patch, place // side * patch), patch, patch,
                                    fill=False, edgecolor=color, linewidth=2.5))
        known = torch.where(torch.arange(length) < step, delta, math.nan)
        shown = ax.imshow(on_grid(known, backward).numpy(), cmap="RdBu_r", norm=norm,
                          extent=(0, size, size, 0))
        ax.set_facecolor("0.85")
        ax.set_title(f"Δ / resting, {label}", fontsize=9, color=color)
        below.plot(range(1, step + 1), moves[:step], "o-", color=color, markersize=2.5)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    figure.colorbar(shown, figure.add_axes((0.925, 0.4, 0.015, 0.46)))
    below.set(xlim=(0, length + 1), ylim=(0, 1.05 * highest), xlabel="tokens read",
              ylabel="change of h")
    below.grid(alpha=0.3)


def animate(path, pixels, seen, title):
    """The digit, read by both scans of a layer: Δ and the change of h as they happen."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    length, figure, writer = len(seen[0][2]), Figure(figsize=(7, 4)), PillowWriter(fps=6)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".") as folder:
        whole = os.path.join(folder, "scan.gif")           # the writer wants a name that ends so
        with writer.saving(figure, whole, dpi=80):
            for step in [*range(1, length + 1)] + [length] * 9:
                draw_frame(figure, pixels, seen, step)
                figure.suptitle(title, fontsize=10)
                writer.grab_frame()
        os.replace(whole, path)


def load_classifiers(paths, device):
    """-> [(checkpoint, seed, trained, untrained)], and the settings, which differ in seed alone."""
    models, first = [], None
    for path in paths:
        trained, untrained, settings = load_classifier(path, device)
        first = first or settings
        other = [key for key in settings if settings[key] != first.get(key) and key != "seed"]
        if other:
            raise UserError(f"{path} and {paths[0]} differ in {', '.join(other)}, and those looked "
                            f"at together may differ in the seed alone: choose with --checkpoint")
        models.append((path, settings["seed"], trained, untrained))
    return models, first


def look_at_digits(args, device):
    """Figures of Δ on one digit and on a thousand, the animation, and results/delta.csv."""
    paths = find_classifiers(args)
    models, settings = load_classifiers(paths, device)
    data = load_images(paths[0], settings, args)
    image = choose_digit(data, args.digit, args.index).to(device)
    (_, _, trained, untrained), pixels = models[0], image[0, 0].cpu()
    with watch(trained) as scans, torch.no_grad():
        answer = trained(normalize(image)).argmax(1).item()
    seen = [(*direction(name, trained), (gate(scan) / resting(scan))[0].detach().cpu(),
             changes(scan)[0].cpu()) for name, scan in list(scans.items())[-2:]]
    gates = {"trained": read_images(trained, image), "untrained": read_images(untrained, image)}
    title = (f"{settings['dataset']}, test image {args.index} of digit {args.digit}; the model "
             f"says {answer}")
    print(f"digits: {title}\nfrom {', '.join(paths)}", flush=True)
    readings = list(read_all(models, data.test_images[:1000].to(device)))
    rows = correlate(readings)
    for row in rows:
        row.update(direction=settings["model"], dataset=settings["dataset"],
                   device=describe(device), torch=str(torch.__version__),
                   command="python visualize_delta.py --task digits --checkpoint "
                           + " ".join(map(shlex.quote, paths)))
    name = f"-{settings['dataset']}" * (settings["dataset"] != "mnist")
    name += "-causal" * (settings["model"] == "causal")
    which = name + f"-{args.digit}-{args.index}" * ((args.digit, args.index) != (7, 0))
    keep(f"results/delta{name}.csv", write_rows, rows)
    keep(f"figures/delta_ink{name}.png", draw_ink, readings, rows,
         f"{settings['dataset']}: the patches of {rows[0]['digits']:,} test digits; a line per "
         f"model, seeds {', '.join(str(seed) for _, seed, *_ in models)}")
    keep(f"figures/delta_digit{which}.png", draw_digit, pixels, gates, title)
    keep(f"figures/scan{which}.gif", animate, pixels, seen, title)
    print_correlations(rows)


def print_correlations(rows):
    """The README's table: with the ink, the mean over the models and the lowest and highest."""
    def cell(*key):
        rho = [float(row["rank_correlation"]) for row in rows if key == (
            row["scan"], row["model"], row["with"], row["tokens_back"], row["place_removed"])]
        spread = f" ({min(rho):.2f} … {max(rho):.2f})" * (len(rho) > 1)
        return f"{sum(rho) / len(rho):.2f}{spread}"

    print("\nrank correlation of Δ with the ink read so many tokens back: mean (lowest … highest)")
    print_table(["scan", "model", *map(str, BACK), "2, place removed"],
                [[scan, name, *(cell(scan, name, "ink", back, False) for back in BACK),
                  cell(scan, name, "ink", 2, True)]
                 for scan, name in dict.fromkeys((r["scan"], r["model"]) for r in rows)])


# --------------------------------------------------------------------------------------------------
# The models that are taught to remember: one block, its selection switched off, and an RNN.

SYMBOLS = 16                             # the ordinary tokens, 0 … 15
MARKER, BLANK, ASK = 16, 16, 17          # of the needle; of copying

MODELS = {  # name: colour, in words
    "unpriced": ("#1f77b4", "selection"),
    "priced": ("#d62728", "selection, and a price on writing"),
    "fixed-delta": ("#ff7f0e", "Δ fixed, B and C selective"),
    "fixed": ("#9467bd", "Δ, B, C fixed, as in S4"),
    "rnn": ("#7f7f7f", "vanilla RNN"),
}


class RNNLM(nn.Module):
    """What MambaLM is, with the RNN of rnn.py as its body, and as many parameters to 1 %."""

    def __init__(self, vocabulary, d_model=64, hidden=134, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.body = RNN(d_model, hidden, layers)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens, states=None, *, return_state=False):
        y, states = self.body.rnn(self.embedding(tokens), states)              # (b, l, hidden)
        return (self.head(y), states) if return_state else self.head(y)


def build(name, seed):
    """The model of that name, with its first weights: 66,000 parameters."""
    torch.manual_seed(seed)
    if name == "rnn":
        return RNNLM(ASK + 1)
    model = MambaLM(ASK + 1, d_model=64, layers=2)
    off = {"fixed-delta": "delta", "fixed": "all"}
    return switch_off(model, off[name]) if name in off else model


def generator(seed, what, number=0):
    """Random numbers for one purpose, the same in every run."""
    return torch.Generator().manual_seed(train_mnist.seed_for(seed, what, number))


def learn(model, optimizer, tokens, answers, price=0.0):
    """One step on tokens (b, l), whose last answers.shape[1] places ask for answers: -> the loss.

    Returned is the loss of the task; reduced is that of the task + price · mean log(Δ + FLOOR).
    Raises UserError if it is not finite.
    """
    with watch(model) as scans:
        logits = model(tokens)[:, -answers.shape[1]:, :SYMBOLS]
    loss = task = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    if price:
        loss = task + price * torch.stack([(scan.delta + FLOOR).log().mean()
                                           for scan in scans.values()]).mean()
    if not math.isfinite(loss.item()):
        raise UserError(f"the loss became {loss.item():.3g}: try other --seeds")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return task.item()


def obtain(args, task, name, seed, device, teach, **recipe):
    """The model of that name, taught now, or with --resume by an earlier run: -> model, facts.

    teach(model, name, seed, device, **recipe) -> the greatest length that it came to
    facts    what every row about this model says
    """
    path = os.path.join(args.out, f"{task}{'-quick' * args.quick}-{name}-seed{seed}.pt")
    settings, model = {"model": name, "seed": seed, **recipe}, build(name, seed).to(device)
    if args.resume and os.path.exists(path):
        state = read_checkpoint(path)
        other = [key for key in settings if state["settings"].get(key) != settings[key]]
        if other:
            raise UserError(f"{path} was made with another {', '.join(other)}: start without "
                            f"--resume")
        try:
            model.load_state_dict(state["weights"])
            return model, state["facts"]
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{path} was made by another version of the model "
                            f"({first_line(error)}): start without --resume") from None
    if not args.resume:
        train_mnist.set_aside(path)
    start = time.perf_counter()
    length = teach(model, name, seed, device, **recipe)
    facts = {"params": sum(p.numel() for p in model.parameters()), "steps": recipe["steps"],
             "taught_up_to": length, "training_seconds": f"{time.perf_counter() - start:.0f}",
             "device": describe(device), "torch": str(torch.__version__)}
    state = {"settings": settings, "weights": model.state_dict(), "facts": facts}
    write_atomically(path, lambda part: torch.save(state, part))
    return model, facts


def progress(text, last=False):
    """A line that updates in place, on a terminal only; the last one stays."""
    if sys.stdout.isatty():
        print(f"\r  {text}  ", end="\n" if last else "", flush=True)
    elif last:
        print(f"  {text}", flush=True)


@torch.no_grad()
def along(model, tokens):
    """Δ and change of h at each token of one sequence, tokens (1, l): -> two lists of (l,) a layer.

    What is under FLOOR is set to FLOOR, for the sake of a logarithmic axis.
    """
    with watch(model) as scans:
        model(tokens)
    return [[values(scan)[0].cpu().clamp(min=FLOOR) for scan in scans.values()]
            for values in (gate, changes)]


def draw_along(path, panels, marks, marked, title):
    """A column per model: above Δ, below the change of h; panels {name: what `along` gave}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3.1 * len(panels) + 0.6, 5), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False)
    for column, (name, curves) in zip(axes.T, panels.items()):
        for ax, layers in zip(column, curves):
            for layer, (values, color) in enumerate(zip(layers, LAYERS), 1):
                ax.plot(values, color=color, linewidth=1, alpha=0.8, label=f"layer {layer}")
            for i, place in enumerate(marks):
                ax.axvline(place, color="#ffd92f", linewidth=5, alpha=0.5, zorder=0,
                           label=None if i else marked)
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
        column[0].set_title(MODELS[name][1] if name in MODELS else name, fontsize=10)
        column[1].set_xlabel("token")
    axes[0, 0].set_ylabel("Δ, mean over channels")
    axes[1, 0].set_ylabel("change of h, ‖h_t - h_{t-1}‖")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}; what is under {FLOOR:.0e} is drawn there", fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def print_table(head, rows):
    """A table in Markdown, as it stands in the README."""
    print("\n" + "\n".join("| " + " | ".join(row) + " |"
                           for row in (head, ["---"] * len(head), *rows)), flush=True)


def print_result(row):
    print("RESULT " + " ".join(f"{key}={value}" for key, value in row.items()
                               if key not in ("device", "torch", "command")), flush=True)


# --------------------------------------------------------------------------------------------------
# A needle in a haystack: a marker, then the symbol to remember, and the marker again at the end.

TAUGHT = (8, 16, 32, 64, 128, 256)       # lengths in training
FULL, QUICK = (600, 4096, 20), (300, 2048, 12)     # steps, tokens a step, log₂ of greatest length
PIECE = 2 ** 14                          # tokens that are evaluated at a time
NEAR = 5             # the marker, its symbol, and three tokens: so far the convolution sees them


def haystacks(length, places, answers, random, piece=None):
    """Yields the tokens of many haystacks, piece by piece: (b, ≤ piece) of int64.

    places, answers (b,): the marker is at place ≤ length - 3, the answer behind it
    """
    piece = piece or length
    for start in range(0, length, piece):
        tokens = torch.randint(SYMBOLS, (len(places), min(piece, length - start)), generator=random)
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

    After 256, lengths are drawn at random, so that none is forgotten; and only then is there a
    price, for the model that pays one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
    random, level = generator(seed, "needle"), 0
    for step in range(1, steps + 1):
        last = level == len(TAUGHT)
        length = TAUGHT[int(torch.randint(level, (), generator=random)) if last else level]
        tokens, _, answers = random_needles(tokens_per_step // length, length, random)
        loss = learn(model, optimizer, tokens.to(device), answers[:, None].to(device),
                     0.01 if last and name == "priced" else 0.0)
        level += not last and loss < 0.05
        if step % 10 == 0 or step == steps:
            progress(f"{name} seed {seed}  step {step}/{steps}  length {length}  loss {loss:.4f}",
                     step == steps)
    return TAUGHT[level - 1] if level else 0


@torch.inference_mode()
def read(model, pieces, device):
    """Read piece by piece, carrying the state: -> logits (b, SYMBOLS) after the last token.

    What is kept between two pieces does not grow with what has been read.
    """
    states = None
    for tokens in pieces:
        logits, states = model(tokens.to(device), states, return_state=True)
    return logits[:, -1, :SYMBOLS].cpu()


def find_needles(model, length, count, seed, device):
    """Whether needles at evenly spaced depths are found, the earliest first: -> bool (count,)."""
    places = ((torch.arange(count) + 0.5) / count * (length - 2)).long()
    random = generator(seed, "haystacks", length)
    answers = torch.randint(SYMBOLS, (count,), generator=random)
    pieces = haystacks(length, places, answers, random, max(1, PIECE // count))
    return read(model, pieces, device).argmax(-1) == answers


def ask_at_all_lengths(model, name, seed, longest, device, facts):
    """Rows for results/needle.csv, and what was found: [(length, bool (haystacks,))].

    A model that finds less than 20 % is guessing, and is not asked at greater lengths.
    """
    rows, found = [], []
    for length in (2 ** i for i in range(6, longest + 1)):
        start, count = time.perf_counter(), 64 if length <= 2 ** 16 else 16
        right = find_needles(model, length, count, seed, device)
        seconds, accuracy = time.perf_counter() - start, 100 * right.float().mean().item()
        found.append((length, right))
        rows.append({"model": name, "seed": seed, "length": length, "haystacks": count,
                     "accuracy": f"{accuracy:.1f}", "seconds": f"{seconds:.1f}", **facts})
        progress(f"{name} seed {seed}  length {length:,}  {accuracy:.1f} % of {count} found  "
                 f"{seconds:.0f} s", length == 2 ** longest or accuracy < 20)
        if accuracy < 20:
            break
    print_result(rows[-1])
    return rows, found


@torch.no_grad()
def gates_at_needles(model, name, seed, device, count=100, length=1024):
    """How the gates stand at the needle and elsewhere: -> rows for results/needle_delta.csv.

    At the needle is the largest Δ of the NEAR tokens that see it, elsewhere the median of the
    others, and the ratio counts a Δ under FLOOR as FLOOR. The question at the end is left out.
    share_of_change_percent: how much of Σ ‖h_t - h_{t-1}‖ falls to those NEAR tokens.
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
        share = (moves * near).sum() / moves.sum()
        rows.append({"model": name, "seed": seed, "layer": layer, "haystacks": count,
                     "delta_at_needle": f"{there.median():.3g}",
                     "delta_elsewhere": f"{elsewhere.median():.3g}",
                     "needle_over_median": f"{ratio.median():.4g}",
                     "quantile_5": f"{low:.4g}", "quantile_95": f"{high:.4g}",
                     "share_of_change_percent": f"{100 * share:.1f}"
                     if moves.sum() / count > FLOOR else ""})          # the layer is shut
    return rows


def draw_lengths(path, found):
    """Needles found over length: a line per model and seed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax, named = figure.subplots(), set()
    for (name, _), pairs in found.items():
        color, words = MODELS[name]
        ax.plot(*zip(*[(length, 100 * right.float().mean()) for length, right in pairs]), "o-",
                color=color, alpha=0.7, markersize=4, label=None if name in named else words)
        named.add(name)
    ax.set_xscale("log", base=2)
    ax.axvspan(2 ** 6, TAUGHT[-1], color="0.9", zorder=0, label="lengths of the training")
    ax.axhline(100 / SYMBOLS, color="black", linestyle=":", linewidth=1, label="guessing")
    ax.set(xlabel="length of the haystack (tokens)", ylabel="needles found (%)", ylim=(-3, 103))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for _, seed in found))
    ax.set_title(f"a line per model and seed ({seeds})", fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def depth_grid(rights, depths=8):
    """[bool (haystacks,)] a seed -> percent found by depth, (depths,), the earliest first."""
    parts = torch.stack(rights).float().mean(0).tensor_split(depths)
    return 100 * torch.stack([part.mean() for part in parts])


def draw_grid(path, found, longest):
    """Needles found by depth and by length; white where not every seed was asked."""
    from matplotlib.figure import Figure
    names = list(dict.fromkeys(name for name, _ in found))
    figure = Figure(figsize=(2.9 * len(names) + 1, 3.2), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names):
        runs = [dict(pairs) for (model, _), pairs in found.items() if model == name]
        columns = [depth_grid([run[2 ** i] for run in runs]) if all(2 ** i in run for run in runs)
                   else torch.full((8,), math.nan) for i in range(6, longest + 1)]
        shown = ax.imshow(torch.stack(columns, 1).numpy(), cmap="RdYlBu", vmin=0, vmax=100,
                          aspect="auto", extent=(5.5, longest + 0.5, 100, 0))
        ax.set_title(MODELS[name][1], fontsize=9)
        ax.set_xlabel("length, tokens")
        ax.set_xticks(range(6, longest + 1, 4), [f"$2^{{{i}}}$" for i in range(6, longest + 1, 4)])
    axes[0].set_ylabel("depth of the needle (%)")
    figure.colorbar(shown, ax=axes, label="found (%)")
    figure.savefig(path, dpi=110, format="png")


def look_for_needles(args, device):
    """Teach every model, ask it at every length, and look at its gates: tables and figures."""
    names, quick = (["priced"], "-quick") if args.quick else (list(MODELS), "")
    steps, batch, longest = QUICK if args.quick else FULL
    print(f"needle: 2 layers, d_model 64, {steps} steps of {batch} tokens, lengths up to "
          f"{TAUGHT[-1]}; loss of a blind guess ln {SYMBOLS} = {math.log(SYMBOLS):.4f}; "
          f"seeds {args.seeds}; {describe(device)}, torch {torch.__version__}", flush=True)
    rows, gates, found, first = [], [], {}, {}
    for seed in dict.fromkeys(args.seeds):
        for name in ["untrained"] + names:
            if name == "untrained":
                model = build("unpriced", seed).to(device)
            else:
                model, facts = obtain(args, "needle", name, seed, device, teach_needle,
                                      steps=steps, tokens_per_step=batch)
                new, found[name, seed] = ask_at_all_lengths(model, name, seed, longest, device,
                                                            facts)
                rows += new
            if name != "rnn":
                gates += gates_at_needles(model, name, seed, device)
                first.setdefault(name, model)
        for row in (row for row in rows + gates if row["seed"] == seed):
            row["command"] = (f"python visualize_delta.py --task needle --seeds {seed}"
                              + " --quick" * args.quick)
    place, seed = 341, args.seeds[0]
    tokens = next(haystacks(1024, torch.tensor([place]), torch.tensor([7]),
                            generator(seed, "one haystack"))).to(device)
    panels = {name: along(model, tokens) for name, model in first.items()}
    keep(f"results/needle{quick}.csv", write_rows, rows)
    keep(f"results/needle_delta{quick}.csv", write_rows, gates)
    keep(f"figures/needle_delta{quick}.png", draw_along, panels, [place + 1], "needle",
         f"one haystack, seed {seed}")
    keep(f"figures/needle_lengths{quick}.png", draw_lengths, found)
    keep(f"figures/needle_grid{quick}.png", draw_grid, found, longest)
    print_needles(rows, gates, len(set(args.seeds)))


def print_needles(rows, gates, seeds):
    """The README's tables. A length that not every seed was asked at stays empty."""
    def cell(name, length):
        values = [float(row["accuracy"]) for row in rows
                  if (row["model"], row["length"]) == (name, length)]
        return mean_sd(values, digits=1) if len(values) == seeds else "–"

    lengths = list(dict.fromkeys(row["length"] for row in rows))[::2]
    print_table(["needles found, %", *(f"{length:,}" for length in lengths)],
                [[MODELS[name][1], *(cell(name, length) for length in lengths)]
                 for name in dict.fromkeys(row["model"] for row in rows)])
    print_table(["model", "seed", "layer", "Δ at the needle", "Δ elsewhere",
                 "ratio (5 … 95 % of the haystacks)", "share of the change of h, %"],
                [[row["model"], str(row["seed"]), str(row["layer"]), row["delta_at_needle"],
                  row["delta_elsewhere"], f"{row['needle_over_median']} ({row['quantile_5']} … "
                  f"{row['quantile_95']})", row["share_of_change_percent"] or "–"]
                 for row in gates])


# --------------------------------------------------------------------------------------------------
# Selective copying: symbols among blanks, to be repeated in order (section 4.1.1 of the paper).

COPIED = 16          # symbols to repeat


def scattered(count, length, random):
    """-> tokens (count, length + COPIED), places of the symbols and the symbols (count, COPIED)."""
    places = torch.rand(count, length, generator=random).argsort(1)[:, :COPIED].sort(1).values
    symbols = torch.randint(SYMBOLS, (count, COPIED), generator=random)
    tokens = torch.full((count, length + COPIED), BLANK)
    tokens[:, length:] = ASK
    return tokens.scatter_(1, places, symbols), places, symbols


def teach_copying(model, name, seed, device, steps, length):
    """From 30 % to 70 % of the steps the length grows from 16 (no blanks): -> the last length.

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
        if step % 10 == 0 or step == steps:
            progress(f"{name} seed {seed}  step {step}/{steps}  length {now}  loss {loss:.4f}",
                     step == steps)
    return now


@torch.inference_mode()
def copied(model, length, seed, device, count=1024):
    """Which symbols are repeated rightly: bool (count, COPIED)."""
    random, right = generator(seed, "copied", length), []
    for _ in range(0, count, 16):
        tokens, _, symbols = scattered(16, length, random)
        logits = model(tokens.to(device))[:, -COPIED:, :SYMBOLS]
        right.append(logits.argmax(-1).cpu() == symbols)
    return torch.cat(right)


def look_at_copying(args, device):
    """Selection on and off side by side: results/copying.csv and a figure."""
    steps, length = (60 if args.quick else 3000), args.length or (32 if args.quick else 256)
    suffix = f"-length-{length}" * (length != 256) + "-quick" * args.quick
    print(f"copying: {COPIED} symbols among {length} tokens, {steps} steps; seeds {args.seeds}; "
          f"{describe(device)}, torch {torch.__version__}", flush=True)
    rows, first = [], {"untrained": build("unpriced", args.seeds[0]).to(device)}
    for seed in dict.fromkeys(args.seeds):
        for name in ("unpriced", "fixed"):
            model, facts = obtain(args, f"copying-{length}", name, seed, device, teach_copying,
                                  steps=steps, length=length)
            first.setdefault(name, model)
            right = copied(model, length, seed, device).float()
            rows.append({"model": name, "seed": seed, "length": length, "sequences": len(right),
                         "accuracy": f"{100 * right.mean().item():.2f}",
                         "whole_sequences": f"{100 * right.amin(1).mean().item():.2f}", **facts,
                         "command": f"python visualize_delta.py --task copying --length {length} "
                                    f"--seeds {seed}" + " --quick" * args.quick})
            print_result(rows[-1])
    tokens, places, _ = scattered(1, length, generator(args.seeds[0], "one sequence"))
    panels = {name: along(model, tokens.to(device)) for name, model in first.items()}
    keep(f"results/copying{suffix}.csv", write_rows, rows)
    keep(f"figures/copying{suffix}.png", draw_along, panels, places[0].tolist(), "symbol to repeat",
         f"one sequence, seed {args.seeds[0]}, its answer from token {length} on")
    print_table(["", "symbols right, %", "whole sequences right, %"],
                [[MODELS[name][1], *(mean_sd([float(row[what]) for row in rows
                                              if row["model"] == name])
                                     for what in ("accuracy", "whole_sequences"))]
                 for name in ("unpriced", "fixed")])


# --------------------------------------------------------------------------------------------------
# The command line.

TASKS = {"digits": look_at_digits, "needle": look_for_needles, "copying": look_at_copying}


def keep(path, write, *arguments):
    """Call write(a temporary path, *arguments), then move what it wrote to path, and say so."""
    write_atomically(path, lambda part: write(part, *arguments))
    print(f"wrote {path}", flush=True)


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--task", choices=list(TASKS), nargs="+", default=["digits", "needle"],
        help="default digits needle")
    add("--digit", type=number(int, 0, 9), default=7, help="default %(default)s")
    add("--index", type=number(int, 0), default=0,
        help="which of the test images of that digit, default %(default)s")
    add("--checkpoint", nargs="+", metavar="FILE",
        help="of train_mnist.py; default: every seed of the bidirectional model in --out")
    add("--seeds", type=number(int, 0, 10 ** 6), nargs="+", default=[0],
        help="of needle and copying, default 0")
    add("--length", type=number(int, COPIED),
        help="of copying, default 256; the paper's: 4096")
    add("--quick", action="store_true", help="fewer steps, models and lengths")
    add("--resume", action="store_true",
        help="take the models of needle and copying that are in --out, and train the others")
    add_places(add, "auto: that of the checkpoint, or what train_mnist.py finds")
    return p.parse_args(arguments)


def look(args):
    # Under the price Δ sinks until numbers become denormal, and a CPU takes several times as long.
    # Threads inherit this when they start, so it comes before all work.
    torch.set_flush_denormal(True)
    device = choose_device(args.device)
    for folder in (args.out, "results", "figures"):
        check_writable(folder)
    for task in dict.fromkeys(args.task):
        try:
            TASKS[task](args, device)
        except KeyboardInterrupt:
            if task != "digits":
                print(f"\nwhat was trained to the end is in {args.out}: --resume takes it",
                      file=sys.stderr)
            raise
    return True


def main(arguments=None):
    return guard("visualize_delta.py", lambda: look(parse(arguments)))


if __name__ == "__main__":
    leave(main())
