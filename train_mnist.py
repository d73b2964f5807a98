"""train_mnist.py: several models, one recipe, one table.

    python train_mnist.py                            the bidirectional Vision Mamba, 5 epochs
    python train_mnist.py --model causal             or rnn
    python train_mnist.py --quick                    a first look in under a minute
    python train_mnist.py --compare                  every model, three seeds: the README's table and its figures
    python train_mnist.py --resume                   go on after Ctrl-C, to the same weights bit for bit (on a CPU)

Every model gets the same tokens (the stem), the same pooling and head, the same budget of parameters, epochs and
augmented images, the same optimizer and schedule. What differs is the body that reads the 49 tokens.

The recipe: AdamW, a peak learning rate reached after a tenth of the steps, then a cosine down to zero; small random
affine warps; and an exponential average of the weights, which is what is tested. It was chosen on 5,000 images held
out of the training set (`--holdout 5000`); the test set was used for the table alone, after the last epoch.

No network and no files: digits drawn with matplotlib's fonts stand in for MNIST, announced and labelled so.

Left out: worker processes. The data set fits in memory as one tensor; a batch is an index into it.
Read before: vision.py and rnn.py. Read next: train_shakespeare.py.
"""
import argparse
import csv
import hashlib
import math
import os
import platform
import signal
import socket
import sys
import tempfile
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from block import parameter_groups
from rnn import RNN
from vision import FUSIONS, POOLS, STEMS, ImageClassifier, VisionMamba

MODELS = {"bidirectional": "#d62728", "causal": "#1f77b4", "rnn": "#7f7f7f"}     # and the colour in every figure


# What decides the outcome of a run, besides the data. A checkpoint goes on only under the same settings.
SETTINGS = ("model", "seed", "epochs", "batch", "lr", "weight_decay", "average", "d_model", "layers", "hidden", "stem",
            "pool", "fuse")


class UserError(Exception):
    """Something that the person at the keyboard can mend: the message says what and how."""


# ----------------------------------------------------------------------------------------------------------------
# Files: they appear whole or not at all.

def write_atomically(path, write):
    """Call write(temporary path), then move what it wrote to path. Raises UserError if that cannot be done."""
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(handle)
        try:
            write(part)
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.remove(part)
    except (OSError, RuntimeError) as error:      # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {error}. Free some space, or choose another folder with --out") from None


# ----------------------------------------------------------------------------------------------------------------
# The images: MNIST where it can be had, digits drawn with fonts where not.

class Data(NamedTuple):
    """Images as uint8 (N, 1, 28, 28), labels as int64 (N,), and the name that every result carries."""
    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


# torchvision verifies the archives it downloads, but not the files that it finds unpacked; these sums do.
MNIST_FILES = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
               "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
               "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
               "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}


def load_data(data_dir, source="auto"):
    """MNIST from data_dir, downloaded if need be; or synthetic digits: source "auto", "real" or "synthetic".

    Raises UserError for a damaged file, and for source "real" if MNIST cannot be had.
    """
    if source == "synthetic":
        return synthetic_digits()
    raw = os.path.join(data_dir, "MNIST", "raw")
    if not all(os.path.exists(os.path.join(raw, name)) for name in MNIST_FILES):
        try:
            download_mnist(data_dir, raw)
        except Exception as error:      # no network, a stalled or broken download, an unwritable folder
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if source == "real":
                raise UserError(f"MNIST is not in {raw} and cannot be downloaded ({reason}). Connect to the network, "
                                f"or copy the four files there, or use --data synthetic") from None
            print(f"{'!' * 100}\nMNIST is not in {raw} and cannot be downloaded ({reason}).\n"
                  f"Training on SYNTHETIC digits instead. Their results say nothing about MNIST.\n{'!' * 100}")
            return synthetic_digits()
    for name, expected in MNIST_FILES.items():
        path = os.path.join(raw, name)
        try:
            with open(path, "rb") as file:
                found = hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if found != expected:
            raise UserError(f"{path} is truncated or damaged: delete it, and it is downloaded again")
    from torchvision.datasets import MNIST
    sets = [MNIST(data_dir, train=train) for train in (True, False)]
    return Data("mnist", *(t for s in sets for t in (s.data.unsqueeze(1), s.targets.long())))


def download_mnist(data_dir, raw):
    """Let torchvision download into a folder of its own, then move whole files into place."""
    from torchvision.datasets import MNIST
    os.makedirs(raw, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)                                             # seconds until a stalled mirror is given up
    try:
        with tempfile.TemporaryDirectory(dir=data_dir) as folder:
            MNIST(folder, download=True)
            for name in MNIST_FILES:
                os.replace(os.path.join(folder, "MNIST", "raw", name), os.path.join(raw, name))
    finally:
        socket.setdefaulttimeout(before)


def synthetic_digits(train=20000, test=4000):
    """Digits in the fonts that come with matplotlib, under random warps and noise: -> Data named synthetic-digits."""
    glyphs = _draw_glyphs()                                                  # (fonts, 10, 28, 28) in [0, 1]
    generator = torch.Generator().manual_seed(0)
    sets = []
    for count in (train, test):
        font = torch.randint(len(glyphs), (count,), generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
        images = warp(glyphs[font, labels].unsqueeze(1), 15, 0.2, 10, 3, generator)
        images = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        sets += [(255 * images).to(torch.uint8), labels]
    return Data("synthetic-digits", *sets)


def _draw_glyphs():
    from pathlib import Path
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    paths = [path for family in ("DejaVu", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10")
             for path in sorted(folder.glob(family + "*.ttf")) if "Display" not in path.name]
    glyphs = torch.zeros(len(paths), 10, 28, 28)
    for i, path in enumerate(paths):
        for digit in range(10):
            figure = Figure(figsize=(0.28, 0.28), dpi=100)                   # 28×28 pixels
            canvas = FigureCanvasAgg(figure)
            figure.text(0.5, 0.5, str(digit), font=path, fontsize=19, ha="center", va="center_baseline")
            canvas.draw()
            pixels = torch.tensor(memoryview(canvas.buffer_rgba()).tolist())             # (28, 28, 4)
            glyphs[i, digit] = 1 - pixels[..., 0] / 255
    return glyphs


# ----------------------------------------------------------------------------------------------------------------
# The recipe.

def warp(images, degrees, scale, shear, shift, generator=None):
    """Rotate, scale, shear and shift each image by random amounts up to ±(degrees, fraction, degrees, pixels).

    images (b, c, h, w) float, background 0 -> the same shape.
    """
    b, height = images.shape[0], images.shape[2]

    def draw(limit):
        return limit * (2 * torch.rand(b, generator=generator, device=images.device) - 1)

    angle, skew = draw(math.radians(degrees)), draw(math.tan(math.radians(shear)))
    wide, high, right, down = 1 + draw(scale), 1 + draw(scale), draw(2 * shift / height), draw(2 * shift / height)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [torch.stack([cos * wide, (skew * cos - sin) * high, right], -1),
            torch.stack([sin * wide, (skew * sin + cos) * high, down], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)        # (b, h, w, 2)
    return F.grid_sample(images, grid, align_corners=False)


def learning_rate(step, steps, peak):
    """Linear from 0 to peak over the first tenth of the steps, then a cosine to 0."""
    progress = (step + 1) / steps
    return peak * min(progress / 0.1, 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.1) / 0.9))))


def build(settings):
    """The model that the settings name."""
    frame = {"stem": settings["stem"], "pool": settings["pool"]}
    d_model, layers = settings["d_model"], settings["layers"]
    if settings["model"] == "rnn":
        return ImageClassifier(RNN(d_model, settings["hidden"], layers), d_model, settings["hidden"], **frame)
    return VisionMamba(d_model, layers, direction=settings["model"], fuse=settings["fuse"], **frame)


class Trainer:
    """One model being trained: its weights, their average, the optimizer, and how far it has come.

    Every random draw (weights, order of the images, warps) is a function of (seed, step). So the step is all that a
    checkpoint has to say about randomness, and a run that was cut anywhere goes on as if it had not been.
    """

    def __init__(self, settings, data, device):
        self.settings, self.data, self.device = settings, data, device
        torch.manual_seed(self._seed("weights"))
        self.model = build(settings).to(device)
        self.average = AveragedModel(self.model, multi_avg_fn=self._update_average)
        groups = parameter_groups(self.model, settings["weight_decay"])
        self.optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.95))
        self.per_epoch = len(data.train_images) // settings["batch"]
        self.steps = self.per_epoch * settings["epochs"]
        self.step, self.seconds = 0, 0.0
        self.losses, self.clock = torch.zeros(self.steps), torch.zeros(self.steps, dtype=torch.float64)
        self.hits = torch.zeros(self.steps)                                  # fraction of each batch that was right
        self.accuracies = []                                                 # on the test set, per epoch, in percent

    def _update_average(self, averaged, current, count):
        """An exponential average that, early on, spans the run so far: the first weights are soon forgotten."""
        decay = min(self.settings["average"], (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def _seed(self, what, number=0):
        """A seed for one purpose; hashed, since PyTorch's CPU generator looks at 32 bits of a seed and no more."""
        text = f"{self.settings['seed']} {what} {number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def _batch(self):
        """The images of this step, warped, and their labels: (b, 1, 28, 28) about zero mean, (b,)."""
        s, (epoch, i) = self.settings, divmod(self.step, self.per_epoch)
        if i == 0 or not hasattr(self, "order"):
            generator = torch.Generator().manual_seed(self._seed("order", epoch))
            self.order = torch.randperm(len(self.data.train_images), generator=generator)
        index = self.order[i * s["batch"]:(i + 1) * s["batch"]].to(self.device)
        torch.manual_seed(self._seed("warp", self.step))
        images = self.data.train_images[index].float() / 255
        return normalize(warp(images, 10, 0.1, 5, 2)), self.data.train_labels[index]

    def train_step(self):
        """One batch, one update. The loss is checked by `check_finite`, not here: reading it would stall a GPU."""
        start = time.perf_counter()
        images, labels = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.settings["lr"])
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.losses[self.step] = loss.detach()
        self.hits[self.step] = (logits.detach().argmax(1) == labels).float().mean()
        self.seconds += time.perf_counter() - start
        self.clock[self.step] = self.seconds
        self.step += 1

    def check_finite(self):
        bad = (~torch.isfinite(self.losses[:self.step])).nonzero()
        if len(bad):
            step = int(bad[0])
            raise UserError(f"the loss is {self.losses[step].item()} at step {step + 1} of {self.steps}, learning rate "
                            f"{learning_rate(step, self.steps, self.settings['lr']):.2g}: try a smaller --lr")

    @torch.no_grad()
    def evaluate(self, stop=lambda: False):
        """Accuracy of the averaged weights on the test images, in percent; None if stop() became true meanwhile."""
        self.average.eval()
        right = 0
        for images, labels in zip(self.data.test_images.split(250), self.data.test_labels.split(250)):
            if stop():
                return None
            right += (self.average(normalize(images.float() / 255)).argmax(1) == labels).sum().item()
        return 100 * right / len(self.data.test_labels)

    # -- checkpoints

    def save(self, path):
        state = {"settings": self.settings, "step": self.step, "seconds": self.seconds, "losses": self.losses,
                 "clock": self.clock, "hits": self.hits, "accuracies": self.accuracies,
                 "model": self.model.state_dict(), "average": self.average.state_dict(),
                 "optimizer": self.optimizer.state_dict()}
        write_atomically(path, lambda part: torch.save(state, part))

    def load(self, path):
        """Go on from path. Raises UserError if it cannot be read, or was made with other settings."""
        state = read_checkpoint(path, self.device)
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise UserError(f"{path} was made with {name}={state['settings'].get(name)}, not {value}: use the same "
                                f"settings, or another --out, or start anew without --resume")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.accuracies = state["step"], state["seconds"], state["accuracies"]
        self.losses, self.clock, self.hits = (state[name].cpu() for name in ("losses", "clock", "hits"))


def normalize(images):
    """Pixels in [0, 1] -> about zero mean and unit variance (the mean and deviation of MNIST's training pixels)."""
    return (images - 0.1307) / 0.3081


def read_checkpoint(path, device="cpu"):
    """The dictionary that `Trainer.save` wrote. Raises UserError if path is missing, damaged, or something else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)     # tensors and plain values: runs no code
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: leave out --resume to start one") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is no readable checkpoint ({reason}): delete it, or start anew without --resume") from None
    if not isinstance(state, dict) or "settings" not in state or "optimizer" not in state:
        raise UserError(f"{path} is not a checkpoint of train_mnist.py")
    return state


# ----------------------------------------------------------------------------------------------------------------
# One run: train, show how it goes, save, test.

class Interrupt:
    """Ctrl-C asks for a stop between two steps, where a checkpoint is whole; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self):
        return self.asked


def fit(trainer, path, stop=lambda: False):
    """Train to the end, with a checkpoint after each epoch: -> True, or False if stop() became true (saved then too)."""
    t = trainer
    for epoch in range(t.settings["epochs"]):
        while t.step < (epoch + 1) * t.per_epoch:
            if stop():
                t.check_finite()
                t.save(path)
                return False
            t.train_step()
            if t.step % 20 == 0:
                t.check_finite()
                show_progress(t)
        t.check_finite()
        if len(t.accuracies) == epoch:
            accuracy = t.evaluate(stop)
            if accuracy is not None:
                t.accuracies.append(accuracy)
                show_epoch(t, epoch)
            t.save(path)
            if accuracy is None:
                return False
    return True


def recent(trainer, count=100):
    """Mean loss, accuracy in percent, and images per second over the last steps."""
    start = max(0, trainer.step - count)
    seconds = (trainer.clock[trainer.step - 1] - (trainer.clock[start - 1] if start else 0)).item()
    window = slice(start, trainer.step)
    return (trainer.losses[window].mean().item(), 100 * trainer.hits[window].mean().item(),
            (trainer.step - start) * trainer.settings["batch"] / max(seconds, 1e-9))


def show_progress(trainer):
    """One line that updates in place; on a terminal only, since a log wants an end, not a film."""
    if not sys.stdout.isatty():
        return
    loss, accuracy, speed = recent(trainer)
    left = (trainer.steps - trainer.step) * trainer.settings["batch"] / speed
    epoch, i = divmod(trainer.step, trainer.per_epoch)
    print(f"\r  epoch {epoch + 1}/{trainer.settings['epochs']}  step {i:4d}/{trainer.per_epoch}  loss {loss:.4f}  "
          f"accuracy {accuracy:.2f}  {speed:.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left ", end="", flush=True)


def show_epoch(trainer, epoch):
    loss, accuracy, speed = recent(trainer, trainer.per_epoch)
    print(f"{chr(13) if sys.stdout.isatty() else ''}  epoch {epoch + 1}/{trainer.settings['epochs']}  "
          f"loss {loss:.4f}  accuracy {accuracy:.2f} (warped training images)  "
          f"test accuracy {trainer.accuracies[-1]:.2f}  {speed:.0f} images/s  {trainer.seconds:.0f} s", flush=True)


def run(settings, data, device, out, resume, stop):
    """Train one model, from its checkpoint if resume: -> the row for results/, or None if it was stopped."""
    trainer = Trainer(settings, data, device)
    path = os.path.join(out, f"{data.name}-{settings['model']}-seed{settings['seed']}.pt")
    params = sum(p.numel() for p in trainer.model.parameters())
    if resume:
        trainer.load(path)
    print(f"model {settings['model']}  parameters {params}  seed {settings['seed']}  data {data.name}: "
          f"{len(data.train_images)} training, {len(data.test_images)} test images\n"
          f"device {describe(device)}  torch {torch.__version__}  loss of a blind guess ln 10 = {math.log(10):.4f}\n"
          f"checkpoint {path}{f', from step {trainer.step}' if resume else ''}", flush=True)
    if not fit(trainer, path, stop):
        print(f"\nstopped at step {trainer.step} of {trainer.steps}, saved in {path}: the same command with --resume "
              f"goes on", flush=True)
        return None, trainer
    row = {"model": settings["model"], "dataset": data.name, "seed": settings["seed"], "params": params,
           "epochs": settings["epochs"], "test_accuracy": f"{trainer.accuracies[-1]:.2f}",
           "seconds": f"{trainer.seconds:.0f}", "device": describe(device), "torch": torch.__version__}
    print("RESULT " + " ".join(f"{k}={row[k]}" for k in ("model", "dataset", "seed", "params", "epochs",
                                                         "test_accuracy", "seconds")), flush=True)
    return row, trainer


def describe(device):
    """What it ran on, in a word or two."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} {platform.machine()} {threads} thread{'s' * (threads > 1)}"


# ----------------------------------------------------------------------------------------------------------------
# All models: a table and two figures.

def compare(settings, seeds, data, device, out, resume, stop, command):
    """Train every model with every seed; write results/<data>.csv after each run, then the figures and the table."""
    rows, trainers = [], {}
    for seed in seeds:
        for model in MODELS:
            wanted = dict(settings, model=model, seed=seed)
            started = os.path.exists(os.path.join(out, f"{data.name}-{model}-seed{seed}.pt"))
            row, trainer = run(wanted, data, device, out, resume and started, stop)
            if row is None:
                return False
            rows.append(dict(row, command=command))
            trainers.setdefault(model, []).append(trainer)
            write_atomically(f"results/{data.name}.csv", lambda part: write_rows(part, rows))
    draw_loss(trainers, data.name)
    draw_accuracy(trainers, data.name)
    print_table(rows)
    return True


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def mean_sd(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std().item() if len(values) > 1 else 0.0)


def print_table(rows):
    """The README's table: one line per model, mean ± standard deviation over seeds, then the difference by seed."""
    print("\n| model | parameters | test accuracy, % | seeds | seconds |\n|---|---|---|---|---|")
    scores = {}
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        scores[model] = [float(row["test_accuracy"]) for row in own]
        mean, sd = mean_sd(scores[model])
        seconds = sum(float(row["seconds"]) for row in own) / len(own)
        print(f"| {model} | {int(own[0]['params']):,} | {mean:.2f} ± {sd:.2f} | {len(own)} | {seconds:.0f} |")
    mean, sd = mean_sd([a - b for a, b in zip(scores["bidirectional"], scores["causal"])])
    print(f"\nbidirectional minus causal, seed by seed: {mean:+.2f} ± {sd:.2f}")


def save_figure(figure, path):
    write_atomically(path, lambda part: figure.savefig(part, dpi=120, format="png"))
    print(f"wrote {path}")


def draw_loss(trainers, name):
    """Training loss over steps and over seconds: the mean over seeds, and the band from the lowest to the highest."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for model, runs in trainers.items():
        width = max(1, min(100, runs[0].steps // 5))                         # steps that one point is the mean of
        smooth = torch.stack([t.losses.unfold(0, width, max(1, width // 2)).mean(1) for t in runs])
        steps = torch.arange(smooth.shape[1]) * max(1, width // 2) + width
        seconds = torch.stack([t.clock for t in runs]).mean(0)[steps - 1]
        for ax, x in zip(axes, (steps, seconds)):
            ax.plot(x, smooth.mean(0), color=MODELS[model], label=model)
            ax.fill_between(x, smooth.amin(0), smooth.amax(0), color=MODELS[model], alpha=0.2, linewidth=0)
    for ax, label in zip(axes, ("training step", f"seconds of training ({describe(runs[0].device)})")):
        ax.set(xlabel=label, yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"cross entropy on warped training images (nats), {name}")
    axes[0].legend(frameon=False)
    save_figure(figure, f"figures/{name}_loss.png")


def draw_accuracy(trainers, name):
    """Error on the test set after each epoch, a line per seed; the last epoch is what the table reports."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for model, runs in trainers.items():
        for i, t in enumerate(runs):
            ax.plot(range(1, len(t.accuracies) + 1), t.accuracies, "o-", color=MODELS[model], alpha=0.7,
                    label=model if i == 0 else None)
    ax.set(xlabel="epoch", ylabel=f"test accuracy (%), {name}")
    ax.set_xticks(range(1, runs[0].settings["epochs"] + 1))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    save_figure(figure, f"figures/{name}_accuracy.png")


# ----------------------------------------------------------------------------------------------------------------
# The command line.

def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def number(kind, low, high=math.inf):
        def convert(text):
            value = kind(text)
            if not low <= value <= high:
                limits = f"{low} or more" if high == math.inf else f"between {low} and {high}"
                raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
            return value
        convert.__name__ = kind.__name__
        return convert

    count = number(int, 1)
    p.add_argument("--model", choices=list(MODELS), default="bidirectional", help="default %(default)s")
    p.add_argument("--compare", action="store_true", help="every model with every seed of --seeds")
    p.add_argument("--seeds", type=number(int, 0, 10 ** 6), nargs="+", default=[0, 1, 2], help="default 0 1 2")
    p.add_argument("--seed", type=number(int, 0, 10 ** 6), default=0, help="default %(default)s")
    p.add_argument("--epochs", type=count, default=5, help="default %(default)s")
    p.add_argument("--batch", type=count, default=64, help="images per step, default %(default)s")
    p.add_argument("--lr", type=number(float, 0), default=3e-3, help="peak learning rate, default %(default)s")
    p.add_argument("--weight-decay", type=number(float, 0), default=0.05, help="default %(default)s")
    p.add_argument("--average", type=number(float, 0, 1), default=0.998,
                   help="decay per step of the averaged weights, default %(default)s")
    p.add_argument("--d-model", type=count, default=64, help="width of the residual stream, default %(default)s")
    p.add_argument("--layers", type=count, default=2, help="default %(default)s")
    p.add_argument("--hidden", type=count, default=152,
                   help="width of the RNN, default %(default)s: as many parameters as Mamba has; classic: 64")
    p.add_argument("--stem", choices=STEMS, default="conv", help="how pixels become tokens, default %(default)s")
    p.add_argument("--pool", choices=POOLS, default="mean", help="default %(default)s; the classic RNN: last")
    p.add_argument("--fuse", choices=FUSIONS, default="average", help="of the two branches, default %(default)s")
    p.add_argument("--holdout", type=number(int, 0, 50000), default=0,
                   help="test on this many training images, held out: for choosing settings")
    p.add_argument("--quick", action="store_true", help="200 steps on 6,400 images, tested on 1,000")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    p.add_argument("--data", choices=["auto", "real", "synthetic"], default="auto",
                   help="auto: MNIST, or synthetic digits if it cannot be had")
    p.add_argument("--data-dir", default="data", help="default %(default)s")
    p.add_argument("--out", default="checkpoints", help="folder for checkpoints, default %(default)s")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; default: the best there is")
    return p.parse_args(arguments)


def choose_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except Exception:      # which error depends on how torch was built
        raise UserError(f"device {name!r} is not available here: use --device cpu") from None


def shrink(data, args):
    """The data set that --holdout and --quick leave; its name says so."""
    name, x, y, test_x, test_y = data
    if args.holdout:
        keep = len(x) - args.holdout
        name, x, y, test_x, test_y = name + "-holdout", x[:keep], y[:keep], x[keep:], y[keep:]
    if args.quick:
        name, x, y, test_x, test_y = name + "-quick", x[:6400], y[:6400], test_x[:1000], test_y[:1000]
    if len(x) < args.batch:
        raise UserError(f"a batch of {args.batch} needs as many training images, and there are {len(x)}")
    return Data(name, x, y, test_x, test_y)


def main(arguments=None):
    args = parse(arguments)
    try:
        device = choose_device(args.device)
        write_atomically(os.path.join(args.out, ".writable"), lambda part: None)         # before hours of training
        os.remove(os.path.join(args.out, ".writable"))
        data = shrink(load_data(args.data_dir, args.data), args)
        data = Data(data.name, *(t.to(device) for t in data[1:]))
        settings = {name: getattr(args, name) for name in SETTINGS}
        if args.quick:
            settings["epochs"] = 2
        stop = Interrupt()
        command = "python train_mnist.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
        if args.compare:
            finished = compare(settings, args.seeds, data, device, args.out, args.resume, stop, command)
        else:
            finished = run(settings, data, device, args.out, args.resume, stop)[0] is not None
        return 0 if finished else 130
    except UserError as error:
        print(f"\ntrain_mnist.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
