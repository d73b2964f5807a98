"""visualize_delta.py: look at Δ, and at what an untrained Δ looks like.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        Δ_t → 0: token t is passed over, h stays as it was

    python visualize_delta.py                     digits and needle: 10 minutes on two cores
    python visualize_delta.py --task digits       Δ on a test digit 7 (--digit, --index)
    python visualize_delta.py --task needle       a needle in a haystack of a million tokens
    python visualize_delta.py --task copying      16 symbols, scattered among 256 tokens
    python visualize_delta.py --quick             a first look in under a minute
    python visualize_delta.py --seeds 0 1 2       the README's tables and figures
    python visualize_delta.py --resume            take what is trained already, and only draw

The claim: Δ is the gate by which a selective model decides what to write into its state. A picture
alone proves nothing, so each claim has a control: the same model before its first training step,
or with its selection switched off, on the same scale.

Digits. Δ of every scan of the Vision Mamba of train_mnist.py, and its rank correlation with the ink
and with the edges of 1,000 test digits.

Needle. The induction heads of the paper (section 4.1.2): among noise stands a marker, and after it
the symbol to remember, until the marker comes again. It is learned at lengths up to 256 and asked
up to a million, in constant memory. A model that solves 256 leaks a little at every noise token.
There its loss is zero, and nothing pushes the leak further down; but at length 4,096 it tells. So
one model also pays for what it writes: its loss is that of the task + 0.01 · mean log(Δ + 1e-9).

Left out: a text. What Δ does on characters is a question for train_shakespeare.py's model.
Read before: vision.py and train_mnist.py, whose model and helpers this file uses.
"""
import argparse
import contextlib
import glob
import hashlib
import itertools
import math
import os
import shlex
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import train_mnist
from block import MambaLM
from rnn import RNN
from s6 import S6, write_rows
from train_mnist import (UserError, check_writable, choose_device, describe, first_line, guard,
                         load_data, mean_sd, normalize, number, read_checkpoint, write_atomically)
from vision import DIRECTIONS

FLOOR = 1e-9         # a Δ below this counts as this: over a million tokens, it forgets a thousandth


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
    """Take the selection out of a model for good: -> the model, of the same size and cost.

    "delta"   dt_proj is shown zeros: Δ = softplus(bias) at every token. B and C still look
    "all"     x_proj is shown ones: Δ, B and C are learned, and the same at every token
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
    for name in [name + quick for quick in ("", "-quick")[args.quick:] for name in names]:
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
    return find_classifiers(argparse.Namespace(**{**vars(args), "quick": True}))


def load_classifier(path, device):
    """-> the averaged model of a checkpoint, the same one before training, and its settings.

    Raises UserError if the file holds no Vision Mamba of train_mnist.py.
    """
    other = "name another one with --checkpoint, or train one by python train_mnist.py"
    state = read_checkpoint(path, other)
    settings = state["settings"]
    if settings.get("model") not in DIRECTIONS or "dataset" not in settings:
        raise UserError(f"{path} holds no Vision Mamba of train_mnist.py, but "
                        f"{settings.get('model', 'another model')}: {other}")
    torch.manual_seed(settings["seed"])
    try:
        trained, untrained = train_mnist.build(settings), train_mnist.build(settings)
        trained.load_state_dict(state["average"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} was made by another version of the model ({first_line(error)}): "
                        f"{other}") from None
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
    """Δ over its resting value, as each scan reads: images uint8 (b, 1, h, w) -> {scan: (b, l)}."""
    with watch(model) as scans:
        model(normalize(images))
    return {direction(name, model): gate(scan) / resting(scan) for name, scan in scans.items()}


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
    return tokens.view(math.isqrt(len(tokens)), -1).cpu()


def gate_scale(ratios):
    """One scale of colours for Δ over its resting value: blue is less, white is rest, red more."""
    from matplotlib.colors import TwoSlopeNorm
    return TwoSlopeNorm(1, 0, max(1.01, *(ratio.max().item() for ratio in ratios)))


def draw_digit(path, image, models, title):
    """Δ of every scan over the digit's outline; trained above, untrained below, on one scale."""
    from matplotlib.figure import Figure
    gates = {name: read_images(model, image) for name, model in models.items()}
    norm = gate_scale(t for scans in gates.values() for t in scans.values())
    figure = Figure(figsize=(2.2 * len(gates["trained"]) + 2.8, 4.6), layout="constrained")
    axes = figure.subplots(2, len(gates["trained"]) + 1)
    pixels, side = image[0, 0].cpu(), image.shape[-1]
    for row, (name, scans) in zip(axes, gates.items()):
        row[0].imshow(pixels, cmap="gray_r", extent=(0, side, side, 0))
        row[0].set_ylabel(name, fontsize=12)
        for ax, ((label, backward), ratio) in zip(row[1:], scans.items()):
            shown = ax.imshow(on_grid(ratio[0], backward), cmap="RdBu_r", norm=norm,
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
    pixels = images.float() / 255
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


def correlate(models, images):
    """Rank correlations of Δ with ink and edges, digit by digit: -> rows for results/delta.csv.

    tokens_back      0: of the patch itself. The convolution shows a scan the three tokens before as
                     well, so Δ may also answer to ink that was read a little earlier
    place_removed    ink is mostly in the middle, and Δ may depend on the place alone. Here Δ, ink
                     and edges are taken less their mean at this place over all digits
    low, high        the 95 % interval of the mean over the digits
    """
    rows = []
    for (name, path, seed), model in models.items():
        for (scan, backward), ratio in read_images(model, images).items():
            for what, strength in ink_and_edges(images, ratio.shape[1]).items():
                strength = strength.flip(1) if backward else strength
                for back, removed in itertools.product(BACK, (False, True)):
                    a, b = ratio[:, back:], strength[:, :strength.shape[1] - back]
                    if removed:
                        a, b = a - a.mean(0), b - b.mean(0)
                    rho = rank_correlation(a, b)
                    mean, half = rho.mean().item(), 1.96 * rho.std().item() / len(rho) ** 0.5
                    rows.append({"model": name, "checkpoint": path, "seed": seed, "scan": scan,
                                 "with": what, "tokens_back": back, "place_removed": removed,
                                 "rank_correlation": f"{mean:.3f}", "low": f"{mean - half:.3f}",
                                 "high": f"{mean + half:.3f}", "digits": len(images)})
    return rows


BACK = range(6)      # a scan is compared with what it reads now, and up to five tokens earlier
LOOKS = {"trained": "#d62728", "untrained": "#7f7f7f"}


def bins(x, y, count=8):
    """Means of x and y over bins of x: one for x = 0, and equally full ones for the rest."""
    order = x.argsort()
    empty = int((x == 0).sum())
    groups = [order[:empty]] * (empty > 0) + list(order[empty:].tensor_split(count))
    return torch.tensor([[x[g].mean(), y[g].mean()] for g in groups]).T


def draw_ink(file, models, images, rows, title):
    """A column per scan: Δ over ink and over edges, and their rank correlation over tokens back."""
    from matplotlib.figure import Figure
    scans = list(dict.fromkeys(row["scan"] for row in rows))
    figure = Figure(figsize=(2.9 * len(scans) + 0.6, 8), layout="constrained")
    axes = figure.subplots(3, len(scans), sharex="row", sharey="row", squeeze=False)
    for (name, path, _), model in models.items():
        for i, ((scan, backward), ratio) in enumerate(read_images(model, images).items()):
            for ax, strength in zip(axes[:, i], ink_and_edges(images, ratio.shape[1]).values()):
                strength = strength.flip(1) if backward else strength
                for back, style in ((0, ":"), (2, "-")):
                    b = strength[:, :strength.shape[1] - back].flatten()
                    ax.plot(*bins(b, ratio[:, back:].flatten()), style, color=LOOKS[name],
                            label=f"{name}, {f'ink {back} tokens back' if back else 'its own ink'}"
                            if path == rows[0]["checkpoint"] else None)
            chosen = [row for row in rows if not row["place_removed"] and (row["model"], row[
                "checkpoint"], row["scan"], row["with"]) == (name, path, scan, "ink")]
            rho, low, high = ([float(row[key]) for row in chosen]
                              for key in ("rank_correlation", "low", "high"))
            axes[2, i].plot(BACK, rho, color=LOOKS[name])
            axes[2, i].fill_between(BACK, low, high, color=LOOKS[name], alpha=0.3, linewidth=0)
            axes[2, i].axhline(0, color="black", linewidth=0.8)
            axes[0, i].set_title(scan)
    for row, label in zip(axes, ("ink: mean brightness, 0 … 1", "edges: mean slope per pixel",
                                 "tokens back")):
        for ax in row:
            ax.set_xlabel(label)
            ax.grid(alpha=0.3)
        row[0].set_ylabel("Δ / its resting value")
    axes[2, 0].set_ylabel("rank correlation of Δ and ink")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=110, format="png")


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
    axes[0].imshow(pixels, cmap="gray_r", extent=(0, size, size, 0))
    axes[0].set_title(f"after {step} of {length} tokens", fontsize=9)
    for ax, color, (label, backward, delta, moves) in zip(axes[1:], ("#1f77b4", "#d62728"), seen):
        place = length - step if backward else step - 1
        axes[0].add_patch(Rectangle((place % side * patch, place // side * patch), patch, patch,
                                    fill=False, edgecolor=color, linewidth=2.5))
        known = torch.where(torch.arange(length) < step, delta, math.nan)
        shown = ax.imshow(on_grid(known, backward), cmap="RdBu_r", norm=norm,
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


def animate(path, image, model, title):
    """The digit, read by both scans of the last layer: Δ and the change of h as they happen."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    with watch(model) as scans, torch.no_grad():
        model(normalize(image))
    seen = [(*direction(name, model), (gate(scan) / resting(scan))[0].detach().cpu(),
             changes(scan)[0].cpu()) for name, scan in list(scans.items())[-2:]]
    length, figure, writer = len(seen[0][2]), Figure(figsize=(7, 4)), PillowWriter(fps=6)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".") as folder:
        whole = os.path.join(folder, "scan.gif")           # the writer wants a name that ends so
        with writer.saving(figure, whole, dpi=80):
            for step in [*range(1, length + 1)] + [length] * 9:
                draw_frame(figure, image[0, 0].cpu(), seen, step)
                figure.suptitle(title, fontsize=10)
                writer.grab_frame()
        os.replace(whole, path)


def keep(path, write, *arguments):
    """Call write(a temporary path, *arguments), then move what it wrote to path, and say so."""
    write_atomically(path, lambda part: write(part, *arguments))
    print(f"wrote {path}", flush=True)


def look_at_digits(args, device):
    """Figures of Δ on one digit and on a thousand, the animation, and results/delta.csv."""
    models, paths, same = {}, find_classifiers(args), None
    for path in paths:
        trained, untrained, settings = load_classifier(path, device)
        models["trained", path, settings["seed"]] = trained
        models["untrained", path, settings["seed"]] = untrained
        if (same or dict(settings, seed=0)) != dict(settings, seed=0):
            raise UserError(f"{path} and {paths[0]} were trained with different settings: those "
                            f"looked at together may differ in the seed alone")
        same = dict(settings, seed=0)
    data = load_images(path, settings, args)
    image, images = choose_digit(data, args.digit, args.index), data.test_images[:1000]
    image, images = image.to(device), images.to(device)
    trained, untrained = list(models.values())[:2]
    answer = trained(normalize(image)).argmax(1).item()
    title = (f"{settings['dataset']}, test image {args.index} of digit {args.digit}; the model "
             f"says {answer}")
    print(f"{title}\nfrom {', '.join(paths)}", flush=True)
    data = "" if settings["dataset"] == "mnist" else "-" + settings["dataset"]
    which = data + f"-{args.digit}-{args.index}" * ((args.digit, args.index) != (7, 0))
    rows = correlate(models, images)
    for row in rows:
        row.update(dataset=settings["dataset"], device=describe(device), torch=torch.__version__,
                   command="python visualize_delta.py --task digits --checkpoint "
                           + " ".join(map(shlex.quote, paths)))
    keep(f"results/delta{data}.csv", write_rows, rows)
    keep(f"figures/delta_ink{data}.png", draw_ink, models, images, rows,
         f"{settings['dataset']}: the patches of {len(images):,} test digits; a line per model, "
         f"seeds {', '.join(str(seed) for *_, seed in list(models)[::2])}")
    keep(f"figures/delta_digit{which}.png", draw_digit, image,
         {"trained": trained, "untrained": untrained}, title)
    keep(f"figures/scan{which}.gif", animate, image, trained, title)
    print_correlations(rows)


def print_correlations(rows):
    """The README's table: with ink, as seen, the mean over the seeds and the lowest and highest."""
    print("\nrank correlation of Δ with the ink read some tokens back: mean (lowest … highest)\n\n"
          "| scan | model | " + " | ".join(map(str, BACK)) + " |")
    print("|---" * (2 + len(BACK)) + "|")
    for scan, name in itertools.product(dict.fromkeys(row["scan"] for row in rows), LOOKS):
        cells = []
        for back in BACK:
            rho = [float(row["rank_correlation"]) for row in rows if not row["place_removed"] and (
                row["scan"], row["model"], row["with"], row["tokens_back"]) == (
                scan, name, "ink", back)]
            cells.append(f"{sum(rho) / len(rho):.2f} ({min(rho):.2f} … {max(rho):.2f})")
        print(f"| {scan} | {name} | " + " | ".join(cells) + " |")


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


def build(name, vocabulary):
    """The model of that name, with its first weights: 66,000 parameters."""
    if name == "rnn":
        return RNNLM(vocabulary)
    model = MambaLM(vocabulary, d_model=64, layers=2)
    off = {"fixed-delta": "delta", "fixed": "all"}
    return switch_off(model, off[name]) if name in off else model


def generator(*what):
    """Random numbers for one purpose, the same in every run."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def learn(model, optimizer, tokens, answers, price=0.0):
    """One step on tokens (b, l), whose last answers.shape[1] places ask for answers: -> the loss.

    The loss of the task is returned, and that of the task + price · mean log(Δ + FLOOR) reduced.
    """
    with watch(model) as scans:
        logits = model(tokens)[:, -answers.shape[1]:, :SYMBOLS]
    loss = task = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    if price:
        loss = task + price * torch.stack([(scan.delta + FLOOR).log().mean()
                                           for scan in scans.values()]).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return task.item()


def obtain(args, task, name, seed, device, teach, *recipe):
    """The model of that name, taught now, or with --resume by an earlier run: -> model, seconds.

    teach is called with model, name, seed, device, *recipe
    """
    path = os.path.join(args.out, f"{task}{'-quick' * args.quick}-{name}-seed{seed}.pt")
    settings = {"task": task, "name": name, "seed": seed, "recipe": list(recipe)}
    torch.manual_seed(seed)
    model = build(name, ASK + 1).to(device)
    if args.resume and os.path.exists(path):
        state = read_checkpoint(path)
        if state["settings"] != settings:
            raise UserError(f"{path} was made with another recipe (steps and lengths "
                            f"{state['settings'].get('recipe')}, now {list(recipe)}): start "
                            f"without --resume")
        try:
            model.load_state_dict(state["weights"])
            return model, state["seconds"]
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path} was made by another version of the model "
                            f"({first_line(error)}): start without --resume") from None
    start = time.perf_counter()
    teach(model, name, seed, device, *recipe)
    seconds = time.perf_counter() - start
    state = {"settings": settings, "weights": model.state_dict(), "seconds": seconds}
    write_atomically(path, lambda part: torch.save(state, part))
    return model, seconds


def progress(text, last=False):
    """A line that updates in place, on a terminal only; the last one stays."""
    if sys.stdout.isatty():
        print(f"\r  {text}  ", end="\n" if last else "", flush=True)
    elif last:
        print(f"  {text}", flush=True)


# --------------------------------------------------------------------------------------------------
# A needle in a haystack: a marker, then the symbol to remember, and the marker again at the end.

TRAINED = (8, 16, 32, 64, 128, 256)      # lengths in training
FULL, QUICK = (600, 4096, 20), (300, 2048, 12)     # steps, tokens a step, log₂ of greatest length
PIECE = 2 ** 14                          # tokens that are evaluated at a time


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


def teach_needle(model, name, seed, device, steps, batch):
    """The length doubles when the loss falls under 0.05; after 256, lengths are drawn at random."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
    random, level = generator("needle", seed), 0
    for step in range(1, steps + 1):
        last = level == len(TRAINED)
        length = TRAINED[int(torch.randint(level, (), generator=random)) if last else level]
        tokens, _, answers = random_needles(batch // length, length, random)
        loss = learn(model, optimizer, tokens.to(device), answers[:, None].to(device),
                     0.01 if last and name == "priced" else 0.0)
        level += not last and loss < 0.05
        if step % 10 == 0:
            progress(f"{name} seed {seed}  step {step}/{steps}  length {length}  loss {loss:.4f}",
                     step == steps)


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
    random = generator("haystacks", length, seed)
    answers = torch.randint(SYMBOLS, (count,), generator=random)
    pieces = haystacks(length, places, answers, random, max(1, PIECE // count))
    return read(model, pieces, device).argmax(-1) == answers


def ask_at_all_lengths(model, name, seed, longest, device, row):
    """Rows for results/needle.csv, and what was found: [(length, bool (haystacks,))].

    A model that has fallen to guessing, under 20 %, is not asked at greater lengths.
    """
    rows, found = [], []
    for length in (2 ** i for i in range(6, longest + 1)):
        start, count = time.perf_counter(), 64 if length <= 2 ** 16 else 16
        right = find_needles(model, length, count, seed, device)
        seconds, accuracy = time.perf_counter() - start, 100 * right.float().mean().item()
        found.append((length, right))
        rows.append({"model": name, "seed": seed, "length": length, "haystacks": count,
                     "accuracy": f"{accuracy:.1f}", "seconds": f"{seconds:.1f}", **row})
        progress(f"{name} seed {seed}  length {length:,}  {accuracy:.1f} % of {count}  "
                 f"{seconds:.0f} s", length == 2 ** longest or accuracy < 20)
        if accuracy < 20:
            break
    return rows, found


@torch.no_grad()
def gates_at_needles(model, seed, device, count=100, length=1024):
    """Δ at the needle over its median elsewhere, and the needle's share of all change of h.

    -> {layer: (ratios (count,), shares (count,))}. At the needle is the largest of marker, symbol
    and the three tokens after, in which the convolution still sees them. A Δ under FLOOR counts as
    FLOOR. The question at the end is left out.
    """
    tokens, places, _ = random_needles(count, length, generator("gates", seed))
    with watch(model) as scans:
        model(tokens.to(device))
    distance = torch.arange(length - 1) - places[:, None]                      # (count, l-1)
    near, result = (distance >= 0) & (distance < 5), {}
    for layer, scan in enumerate(scans.values(), 1):
        delta, moves = gate(scan)[:, :-1].cpu().clamp(min=FLOOR), changes(scan)[:, :-1].cpu()
        elsewhere = delta.masked_fill(near, math.nan).nanmedian(1).values
        result[layer] = (delta.masked_fill(~near, 0).amax(1) / elsewhere,
                         100 * (moves * near).sum(1) / moves.sum(1))
    return result


def gate_rows(name, model, seed, device, row):
    """Rows for results/needle_delta.csv."""
    rows = []
    for layer, (ratios, shares) in gates_at_needles(model, seed, device).items():
        low, middle, high = ratios.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        rows.append({"model": name, "seed": seed, "layer": layer, "haystacks": len(ratios),
                     "needle_over_median": f"{middle:.4g}", "lowest_5_percent": f"{low:.4g}",
                     "highest_5_percent": f"{high:.4g}",
                     "share_of_change_percent": f"{shares.mean().item():.1f}", **row})
    return rows


def draw_haystack(path, models, seed, device, length=1024):
    """Δ of each layer, and change of h, along one haystack: a column per model."""
    from matplotlib.figure import Figure
    place = torch.tensor([length // 3])
    random = generator("one haystack", seed)
    tokens = next(haystacks(length, place, torch.tensor([7]), random)).to(device)
    figure = Figure(figsize=(3.1 * len(models) + 0.6, 5), layout="constrained")
    axes = figure.subplots(2, len(models), sharex=True, sharey="row", squeeze=False)
    for column, (name, model) in zip(axes.T, models.items()):
        with watch(model) as scans, torch.no_grad():
            model(tokens)
        for layer, (scan, color) in enumerate(zip(scans.values(), ("#1f77b4", "#d62728")), 1):
            for ax, values in zip(column, (gate(scan)[0], changes(scan)[0])):
                ax.plot(values.cpu().clamp(min=FLOOR), color=color, linewidth=1, alpha=0.8,
                        label=f"layer {layer}")
        for ax in column:
            ax.axvspan(place.item() - 8, place.item() + 8, color="#ffd92f", alpha=0.5, linewidth=0,
                       zorder=0, label="needle")
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
        column[0].set_title(MODELS[name][1] if name in MODELS else name, fontsize=10)
        column[1].set_xlabel("token")
    axes[0, 0].set_ylabel("Δ, mean over channels")
    axes[1, 0].set_ylabel("change of h, ‖h_t - h_{t-1}‖")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"one haystack; what is under {FLOOR:.0e} is drawn there", fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def draw_lengths(path, found):
    """Accuracy over length: a line per model, mean of its seeds, band from lowest to highest."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, (color, words) in MODELS.items():
        by_length = {}
        for (model, _), pairs in found.items():
            for length, right in pairs if model == name else ():
                by_length.setdefault(length, []).append(100 * right.float().mean().item())
        if by_length:
            ax.plot(list(by_length), [sum(v) / len(v) for v in by_length.values()], "o-",
                    color=color, label=words, markersize=4)
            ax.fill_between(list(by_length), [min(v) for v in by_length.values()],
                            [max(v) for v in by_length.values()], color=color, alpha=0.2,
                            linewidth=0)
    ax.set_xscale("log", base=2)
    ax.axvspan(2 ** 6, TRAINED[-1], color="0.9", zorder=0, label="lengths of the training")
    ax.axhline(100 / SYMBOLS, color="black", linestyle=":", linewidth=1, label="guessing")
    ax.set(xlabel="length of the haystack (tokens)", ylabel="needles found (%)", ylim=(-3, 103))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for _, seed in found))
    ax.set_title(f"seeds {seeds}: mean, lowest and highest", fontsize=10)
    figure.savefig(path, dpi=110, format="png")


def draw_grid(path, found, longest, depths=8):
    """The share of needles found, by depth of the needle and length of the haystack."""
    from matplotlib.figure import Figure
    names = list(dict.fromkeys(name for name, _ in found))
    figure = Figure(figsize=(2.9 * len(names) + 1, 3.2), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, names):
        grid = torch.full((depths, longest - 5), math.nan)
        for length in (2 ** i for i in range(6, longest + 1)):
            rights = [right for (model, _), pairs in found.items() for asked, right in pairs
                      if (model, asked) == (name, length)]
            if rights:
                parts = torch.stack(rights).float().mean(0).tensor_split(depths)
                grid[:, int(math.log2(length)) - 6] = torch.stack([p.mean() for p in parts])
        shown = ax.imshow(100 * grid, cmap="RdYlBu", vmin=0, vmax=100, aspect="auto",
                          extent=(5.5, longest + 0.5, 100, 0))
        ax.set_facecolor("0.85")
        ax.set_title(MODELS[name][1], fontsize=9)
        ax.set_xlabel("length, tokens")
        ax.set_xticks(range(6, longest + 1, 4), [f"$2^{{{i}}}$" for i in range(6, longest + 1, 4)])
    axes[0].set_ylabel("depth of the needle (%)")
    figure.colorbar(shown, ax=axes, label="found (%); gray: not asked")
    figure.savefig(path, dpi=110, format="png")


def look_for_needles(args, device):
    """Teach every model, ask it at every length, and look at its gates: tables and figures."""
    names, quick = (["priced"], "-quick") if args.quick else (list(MODELS), "")
    steps, batch, longest = QUICK if args.quick else FULL
    print(f"needle: 2 layers, d_model 64, {steps} steps of {batch} tokens, lengths up to "
          f"{TRAINED[-1]}; loss of a blind guess ln {SYMBOLS} = {math.log(SYMBOLS):.4f}; "
          f"{describe(device)}, torch {torch.__version__}", flush=True)
    rows, gates, found, shown = [], [], {}, {}
    for seed in dict.fromkeys(args.seeds):
        torch.manual_seed(seed)
        untrained = build("unpriced", ASK + 1).to(device)
        common = {"device": describe(device), "torch": torch.__version__,
                  "command": f"python visualize_delta.py --task needle --seeds {seed}"
                             + " --quick" * args.quick}
        gates += gate_rows("untrained", untrained, seed, device, common)
        shown.setdefault("untrained", untrained)
        for name in names:
            model, seconds = obtain(args, "needle", name, seed, device, teach_needle, steps, batch)
            size = {"params": sum(p.numel() for p in model.parameters()), "steps": steps,
                    "training_seconds": f"{seconds:.0f}", **common}
            new, found[name, seed] = ask_at_all_lengths(model, name, seed, longest, device, size)
            rows += new
            if name != "rnn":
                gates += gate_rows(name, model, seed, device, common)
                shown.setdefault(name, model)
    keep(f"results/needle{quick}.csv", write_rows, rows)
    keep(f"results/needle_delta{quick}.csv", write_rows, gates)
    keep(f"figures/needle_delta{quick}.png", draw_haystack, shown, args.seeds[0], device)
    keep(f"figures/needle_lengths{quick}.png", draw_lengths, found)
    keep(f"figures/needle_grid{quick}.png", draw_grid, found, longest)
    print_needles(rows, gates)


def print_needles(rows, gates):
    """The README's tables."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))[::2]
    print("\n| needles found, % | " + " | ".join(f"{length:,}" for length in lengths) + " |\n"
          + "|---" * (1 + len(lengths)) + "|")
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = [[float(row["accuracy"]) for row in rows
                  if (row["model"], row["length"]) == (name, length)] for length in lengths]
        print(f"| {MODELS[name][1]} | "
              + " | ".join(mean_sd(cell, digits=1) if cell else "–" for cell in cells) + " |")
    print("\n| model | seed | layer | Δ at the needle / median (5 … 95 %) | share of change, % |\n"
          "|---|---|---|---|---|")
    for row in gates:
        print(f"| {row['model']} | {row['seed']} | {row['layer']} | {row['needle_over_median']} "
              f"({row['lowest_5_percent']} … {row['highest_5_percent']}) | "
              f"{row['share_of_change_percent']} |")


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
    """The length grows from 16 (no blanks) in the middle of the training; cosine learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    random = generator("copying", seed)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = train_mnist.learning_rate(step, steps, 1e-2)
        grown = min(1.0, max(0.0, (step / steps - 0.3) / 0.4))
        now = COPIED + round((length - COPIED) * grown)
        tokens, _, symbols = scattered(max(4, 4096 // (now + COPIED)), now, random)
        loss = learn(model, optimizer, tokens.to(device), symbols.to(device))
        if step % 10 == 0:
            progress(f"{name} seed {seed}  step {step}/{steps}  length {now}  loss {loss:.4f}",
                     step == steps)


@torch.inference_mode()
def copied(model, length, seed, device, count=1024):
    """Which symbols are repeated rightly: bool (count, COPIED)."""
    random, right = generator("copied", length, seed), []
    for _ in range(0, count, 16):
        tokens, _, symbols = scattered(16, length, random)
        logits = model(tokens.to(device))[:, -COPIED:, :SYMBOLS]
        right.append(logits.argmax(-1).cpu() == symbols)
    return torch.cat(right)


def look_at_copying(args, device):
    """Selection on and off side by side: results/copying.csv and a figure."""
    steps, length = (60, 32) if args.quick else (2500, args.length)
    suffix = "-quick" if args.quick else "" if length == 256 else f"-length-{length}"
    print(f"copying: {COPIED} symbols among {length} tokens, {steps} steps", flush=True)
    rows, shown = [], {}
    for seed in dict.fromkeys(args.seeds):
        torch.manual_seed(seed)
        shown.setdefault("untrained", build("unpriced", ASK + 1).to(device))
        for name in ("unpriced", "fixed"):
            model, seconds = obtain(args, f"copying-{length}", name, seed, device, teach_copying,
                                    steps, length)
            right = copied(model, length, seed, device).float()
            shown.setdefault(name, model)
            rows.append({"model": name, "seed": seed, "length": length, "sequences": len(right),
                         "accuracy": f"{100 * right.mean().item():.2f}",
                         "whole_sequences": f"{100 * right.amin(1).mean().item():.2f}",
                         "params": sum(p.numel() for p in model.parameters()), "steps": steps,
                         "training_seconds": f"{seconds:.0f}", "device": describe(device),
                         "torch": torch.__version__,
                         "command": f"python visualize_delta.py --task copying --length {length} "
                                    f"--seeds {seed}" + " --quick" * args.quick})
            print("RESULT " + " ".join(f"{key}={value}" for key, value in rows[-1].items()
                                       if key != "command"), flush=True)
    keep(f"results/copying{suffix}.csv", write_rows, rows)
    keep(f"figures/copying{suffix}.png", draw_copying, shown, length, args.seeds[0], device)
    print("\n| | symbols right, % | whole sequences right, % |\n|---|---|---|")
    for name in ("unpriced", "fixed"):
        cells = [[float(row[column]) for row in rows if row["model"] == name]
                 for column in ("accuracy", "whole_sequences")]
        print(f"| {MODELS[name][1]} | " + " | ".join(map(mean_sd, cells)) + " |")


def draw_copying(path, models, length, seed, device):
    """Δ along one sequence, its symbols marked."""
    from matplotlib.figure import Figure
    tokens, places, _ = scattered(1, length, generator("one sequence", seed))
    figure = Figure(figsize=(4 * len(models) + 0.6, 3.2), layout="constrained")
    for ax, (name, model) in zip(figure.subplots(1, len(models), sharey=True), models.items()):
        with watch(model) as scans, torch.no_grad():
            model(tokens.to(device))
        for layer, (scan, color) in enumerate(zip(scans.values(), ("#1f77b4", "#d62728")), 1):
            ax.plot(gate(scan)[0].cpu(), color=color, linewidth=1, label=f"layer {layer}")
        for i, place in enumerate(places[0].tolist()):
            ax.axvline(place, color="#ffd92f", linewidth=2.5, zorder=0,
                       label=None if i else "symbol to repeat")
        ax.axvspan(length, length + COPIED, color="0.85", zorder=0, label="answer")
        ax.set_title(MODELS[name][1] if name in MODELS else name, fontsize=10)
        ax.set(xlabel="token", yscale="log")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Δ, mean over channels")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, format="png")


# --------------------------------------------------------------------------------------------------
# The command line.

TASKS = {"digits": look_at_digits, "needle": look_for_needles, "copying": look_at_copying}


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
    add("--length", type=number(int, COPIED), default=256,
        help="of copying, default %(default)s; the paper's: 4096")
    add("--quick", action="store_true", help="fewer steps, models and lengths")
    add("--resume", action="store_true", help="take the models of needle and copying from --out")
    add("--data", choices=["auto", "real", "synthetic"], default="auto",
        help="auto: MNIST, or synthetic digits if it cannot be had")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints, default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto: cuda if there is one, else cpu")
    return p.parse_args(arguments)


def look(args):
    device = choose_device(args.device)
    for folder in (args.out, "results", "figures"):
        check_writable(folder)
    # Under the price Δ sinks until numbers become denormal, and a CPU ten times as slow on them.
    torch.set_flush_denormal(True)
    try:
        for task in dict.fromkeys(args.task):
            TASKS[task](args, device)
    except KeyboardInterrupt:
        print(f"\nthe models that were finished are in {args.out}: --resume takes them",
              file=sys.stderr)
        raise
    return True


def main(arguments=None):
    args = parse(arguments)
    return guard("visualize_delta.py", lambda: look(args))


if __name__ == "__main__":
    sys.exit(main())
