"""train_mnist.py: several models, one recipe, one table.

    python train_mnist.py                    the bidirectional Vision Mamba, 5 epochs: 99.46 % after
                                             18 minutes on one core
    python train_mnist.py --model causal     or s4, or rnn
    python train_mnist.py --quick            a first look in under a minute
    python train_mnist.py --compare          every model, three seeds: the README's table, figures
    python train_mnist.py --resume           go on after Ctrl-C, on a CPU to the same weights
    torchrun --nproc_per_node=2 train_mnist.py           each of two processes takes half the batch

Every model gets the same tokens (the stem), the same pooling, a linear head, the same number of
parameters to 1 %, the same augmented images, optimizer and schedule. What differs is the body that
reads the 49 tokens.

The recipe: AdamW, its learning rate rising over the first tenth of the steps and then falling to
zero along a cosine; small random affine warps; and a moving average of the weights, which is what
is tested. It was chosen on 5,000 images held out of the training set (`--holdout 5000`). The test
set decided nothing: it is measured after each epoch for the figure, and the table takes the last.

No network and no files: digits drawn with matplotlib's fonts stand in for MNIST, and are announced
and labelled so.

`Trainer`, `fit` and `run` are for whatever is trained here; train_shakespeare.py imports them.

Left out: worker processes. The data set fits in memory as one tensor; a batch is an index into it.
Read before: vision.py and rnn.py. Read next: train_shakespeare.py.
"""
import argparse
import contextlib
import copy
import hashlib
import math
import os
import platform
import signal
import socket
import sys
import tempfile
import time
import zipfile
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from block import parameter_groups
from rnn import RNN, S4Stack
from s6 import write_rows
from vision import FUSIONS, POOLS, STEMS, ImageClassifier, VisionMamba

MODELS = {"bidirectional": "#d62728", "causal": "#1f77b4", "s4": "#2ca02c", "rnn": "#7f7f7f"}

# What decides the outcome of a run, besides the data: a checkpoint goes on under the same only.
SETTINGS = ("model", "seed", "epochs", "batch", "lr", "weight_decay", "average", "d_model",
            "layers", "hidden", "stem", "pool", "fuse")


class UserError(Exception):
    """Something that the person at the keyboard can mend; the message says what, and how."""


# --------------------------------------------------------------------------------------------------
# Files: they appear whole or not at all.

def first_line(error):
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_writable(folder):
    """Make the folder, and raise UserError if it cannot be written: better now than in an hour."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder} ({first_line(error)}): make it "
                        f"writable, or work in another folder") from None


def write_atomically(path, write):
    """Call write(a temporary path), then move the file to path. Raises UserError if that fails."""
    part = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:     # torch.save calls a full disk a RuntimeError
        raise UserError(f"cannot write {path} ({first_line(error)}): is the disk full, or the "
                        f"folder read-only? What was there before is untouched") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def read_checkpoint(path, instead="start without --resume"):
    """What `Trainer.save` wrote. Raises UserError if path is missing, damaged, or another thing."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()          # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"bad checksum in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)      # runs no code
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: {instead}") from None
    except Exception as error:                   # whatever zipfile and torch make of damaged bytes
        raise UserError(f"{path} is damaged or no checkpoint ({first_line(error)}): move it away, "
                        f"or {instead}") from None
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise UserError(f"{path} is not a checkpoint of these scripts: {instead}")
    return state


# --------------------------------------------------------------------------------------------------
# More than one process: torchrun starts them, each takes its rows of every batch, and
# DistributedDataParallel averages their gradients. The first one prints and writes files.

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device, batch):
    """Meet the other processes. Raises UserError if they cannot share a batch of this size."""
    if PROCESSES == 1:
        return
    if batch % PROCESSES:
        raise UserError(f"{PROCESSES} processes cannot share a batch of {batch}: use a --batch "
                        f"that {PROCESSES} divides")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def share(rows):
    """The rows of a batch that are this process's."""
    return rows.chunk(PROCESSES)[RANK]


def mean(tensor):
    """The mean over all processes."""
    if PROCESSES > 1:
        dist.all_reduce(tensor.div_(PROCESSES))
    return tensor


def gather(tensor):
    """The rows of all processes: the inverse of `share`."""
    if PROCESSES == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(PROCESSES)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def from_first(make):
    """make(), called by the first process alone: -> its result, to all."""
    result = [make() if RANK == 0 else None]
    if PROCESSES > 1:
        dist.broadcast_object_list(result)
    return result[0]


# --------------------------------------------------------------------------------------------------
# The images: MNIST where it can be had, digits drawn with fonts where not.

class Data(NamedTuple):
    """Images uint8 (N, 1, 28, 28), labels int64 (N,), and the name that every result carries."""
    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


# torchvision verifies the archives that it downloads, but not the files that it finds unpacked.
MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}


def load_data(data_dir, source="auto"):
    """MNIST from data_dir, downloaded if need be, or synthetic digits.

    source: "auto" takes the digits if MNIST cannot be had, "real" and "synthetic" insist.
    Raises UserError for a damaged file, and if "real" cannot be had.
    """
    if source == "synthetic":
        return synthetic_digits()
    raw = os.path.join(data_dir, "MNIST", "raw")
    if not all(os.path.exists(os.path.join(raw, name)) for name in MNIST_MD5):
        try:
            download_mnist(data_dir, raw)
        except Exception as error:       # no network, a broken download, an unwritable folder
            reason = str(error).strip().splitlines() or [type(error).__name__]
            problem = f"MNIST is not in {raw} and cannot be downloaded ({reason[-1]})"
            if source == "real":
                raise UserError(f"{problem}: connect to the network, put the four files there, or "
                                f"use --data synthetic") from None
            print(f"{'!' * 100}\n{problem}.\nTraining on SYNTHETIC digits instead: results say "
                  f"nothing about MNIST.\n{'!' * 100}", flush=True)
            return synthetic_digits()
    for name, expected in MNIST_MD5.items():
        path = os.path.join(raw, name)
        try:
            with open(path, "rb") as file:
                found = hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if found != expected:
            raise UserError(f"{path} is truncated or damaged: delete it, and run again to "
                            f"download it")
    from torchvision.datasets import MNIST
    train, test = MNIST(data_dir, train=True), MNIST(data_dir, train=False)
    return Data("mnist", train.data.unsqueeze(1), train.targets, test.data.unsqueeze(1),
                test.targets)


def download_mnist(data_dir, raw):
    """Let torchvision download into a folder of its own, then move whole files into place."""
    from torchvision.datasets import MNIST
    os.makedirs(data_dir, exist_ok=True)
    with impatience(), tempfile.TemporaryDirectory(dir=data_dir) as folder:
        MNIST(folder, download=True)
        os.makedirs(raw, exist_ok=True)
        for name in MNIST_MD5:
            os.replace(os.path.join(folder, "MNIST", "raw", name), os.path.join(raw, name))


@contextlib.contextmanager
def impatience(seconds=10):
    """In here a stalled download is given up after so many seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def synthetic_digits(train=20000, test=4000):
    """Digits in the fonts that come with matplotlib, under random warps and noise: -> Data."""
    glyphs = draw_glyphs()                                                     # (fonts, 10, 28, 28)
    generator = torch.Generator().manual_seed(0)
    sets = []
    for count in (train, test):
        font = torch.randint(len(glyphs), (count,), generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
        images = glyphs[font, labels].unsqueeze(1)                             # (count, 1, 28, 28)
        images = warp(images, degrees=15, scale=0.2, shear=10, shift=3, generator=generator)
        images = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        sets += [(255 * images).to(torch.uint8), labels]
    return Data("synthetic-digits", *sets)


def draw_glyphs():
    """The ten digits in every font, white on black, values in [0, 1]: -> (fonts, 10, 28, 28)."""
    from pathlib import Path
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [path for family in ("DejaVu", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10")
             for path in sorted(folder.glob(family + "*.ttf")) if "Display" not in path.name]
    glyphs = torch.zeros(len(fonts), 10, 28, 28)
    for i, font in enumerate(fonts):
        for digit in range(10):
            canvas = FigureCanvasAgg(Figure(figsize=(0.28, 0.28), dpi=100))    # 28×28 pixels
            canvas.figure.text(0.5, 0.5, str(digit), font=font, fontsize=19, ha="center",
                               va="center_baseline")
            canvas.draw()
            pixels = torch.tensor(memoryview(canvas.buffer_rgba()).tolist())   # (28, 28, 4)
            glyphs[i, digit] = 1 - pixels[..., 0] / 255
    return glyphs


# --------------------------------------------------------------------------------------------------
# The recipe.

def warp(images, degrees, scale, shear, shift, generator=None):
    """Each image (b, 1, h, w) rotated, scaled, sheared and shifted by amounts of its own.

    The amounts are uniform up to ± degrees, a fraction, degrees, and pixels. The pixel at p comes
    from rotation · shear · scale · p + shift, in coordinates from -1 to 1.
    """
    b, height = images.shape[0], images.shape[2]

    def draw(limit):
        return limit * (2 * torch.rand(b, generator=generator, device=images.device) - 1)

    angle, skew = draw(math.radians(degrees)), draw(math.tan(math.radians(shear)))
    wide, high = 1 + draw(scale), 1 + draw(scale)
    right, down = draw(2 * shift / height), draw(2 * shift / height)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [torch.stack([cos * wide, (skew * cos - sin) * high, right], -1),
            torch.stack([sin * wide, (skew * sin + cos) * high, down], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def normalize(images):
    """uint8 pixels -> about zero mean and unit variance (those of MNIST's training pixels)."""
    return (images.float() / 255 - 0.1307) / 0.3081


def learning_rate(step, steps, peak):
    """A line from 0 to peak over the first tenth of the steps, then a cosine to 0."""
    progress = (step + 1) / steps
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.1) / 0.9)))
    return peak * min(progress / 0.1, fall)


def build(settings):
    """The model that the settings name."""
    frame = {"stem": settings["stem"], "pool": settings["pool"]}
    d_model, layers, hidden = settings["d_model"], settings["layers"], settings["hidden"]
    if settings["model"] == "rnn":
        return ImageClassifier(RNN(d_model, hidden, layers), d_model, hidden, **frame)
    if settings["model"] == "s4":        # two of its blocks cost what one of Mamba's does
        return ImageClassifier(S4Stack(d_model, 2 * layers, n=92), d_model, d_model, **frame)
    return VisionMamba(d_model, layers, direction=settings["model"], fuse=settings["fuse"], **frame)


def seed_for(seed, what, number=0):
    """A seed for one purpose. Hashed, since PyTorch reads no more than 32 bits of a seed."""
    text = f"{seed} {what} {number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class Trainer:
    """One model in training: its weights, their average, the optimizer, and how far it has come.

    Every random draw (weights, order of the data, warps) is a function of (seed, step), so the step
    is all that a checkpoint must say about randomness. A subclass knows the data: it has
        unit, per_step, classes     what it reads, how many of them per step, how many kinds
        loss()                      -> the mean loss of the next batch, the fraction that was right
        evaluate(stop)              -> the score after an epoch, None if stop() became true
        path(folder)                -> where its checkpoint is
        title(), report()           -> what to print before the first step, and after an epoch
        result()                    -> the row of a finished run
    """

    # The log: per step, loss, fraction of the batch that was right, and seconds of training so far;
    # per epoch, the score.
    LOG = ("step", "losses", "hits", "clock", "scores", "machine", "settings")
    MODULES = ("model", "average", "optimizer")

    def __init__(self, settings, build, per_epoch, device):
        self.settings, self.device, self.per_epoch = settings, device, per_epoch
        torch.manual_seed(self.draw("weights"))
        self.model = build(settings).to(device)
        self.net = self.model if PROCESSES == 1 else DistributedDataParallel(self.model)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        groups = parameter_groups(self.model, settings["weight_decay"])
        self.optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.95))
        self.steps = self.per_epoch * settings["epochs"]
        self.step, self.scores = 0, []
        self.losses, self.hits = torch.zeros(self.steps), torch.zeros(self.steps)
        self.clock = torch.zeros(self.steps, dtype=torch.float64)
        self.machine = {"device": describe(device), "torch": str(torch.__version__)}

    def draw(self, what, number=0):
        """The seed of this run for one purpose."""
        return seed_for(self.settings["seed"], what, number)

    def parameters(self):
        return sum(p.numel() for p in self.model.parameters())

    def train_step(self):
        """One batch, one update. Raises UserError for a loss or gradient that is not finite."""
        start, rate = time.perf_counter(), learning_rate(self.step, self.steps, self.settings["lr"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, hits = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        loss, hits = mean(torch.stack([loss.detach(), hits])).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(f"loss {loss:.3g}, gradient {norm.item():.3g} at step {self.step + 1} "
                            f"of {self.steps} with learning rate {rate:.2g}: not finite. Start "
                            f"again with a smaller --lr")
        self.optimizer.step()
        # The average spans the last ninth of the steps so far, at most 1 / (1 - decay) of them.
        decay = min(self.settings["average"], (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, weight in zip(self.average.parameters(), self.model.parameters()):
                average.lerp_(weight, 1 - decay)
        self.losses[self.step], self.hits[self.step] = loss, hits
        self.clock[self.step] = self.seconds() + time.perf_counter() - start
        self.step += 1

    def seconds(self):
        """Seconds of training so far, tests and checkpoints not counted."""
        return self.clock[self.step - 1].item() if self.step else 0.0

    def save(self, path):
        """Write a checkpoint. Raises UserError if that fails; the one before is then untouched."""
        state = {name: getattr(self, name) for name in self.LOG}
        state.update({name: getattr(self, name).state_dict() for name in self.MODULES})
        if RANK == 0:
            write_atomically(path, lambda part: torch.save(state, part))

    def load(self, path):
        """Go on from path. Raises UserError if it is damaged, or was made with other settings."""
        state = read_checkpoint(path)
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise UserError(f"{path} was made with {name}={state['settings'].get(name)}, not "
                                f"{value}: use the same settings, or start without --resume")
        try:
            for name in self.MODULES:
                getattr(self, name).load_state_dict(state[name])
            for name in self.LOG:
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} was made by another version of the model "
                            f"({first_line(error)}): start without --resume") from None


class ImageTrainer(Trainer):
    """A Trainer of the model that the settings name, on Data."""

    unit, classes = "images", 10

    def __init__(self, settings, data, device):
        self.data, self.order = data, (-1, None)
        self.per_step = settings["batch"]
        settings = dict(settings, dataset=data.name, train_images=len(data.train_images),
                        test_images=len(data.test_images))
        super().__init__(settings, build, len(data.train_images) // self.per_step, device)

    def batch(self):
        """The warped images (b, 1, 28, 28) and the labels (b,) of this step."""
        (epoch, i), size = divmod(self.step, self.per_epoch), self.per_step
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.draw("order", epoch))
            self.order = epoch, torch.randperm(len(self.data.train_images), generator=generator)
        index = self.order[1][i * size:(i + 1) * size].to(self.device)
        torch.manual_seed(self.draw("warp", self.step))
        images = self.data.train_images[index].float()
        images = warp(images, degrees=10, scale=0.1, shear=5, shift=2)
        return normalize(images), self.data.train_labels[index]

    def loss(self):
        images, labels = map(share, self.batch())
        logits = self.net(images)
        hits = (logits.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), hits

    @torch.no_grad()
    def evaluate(self, stop=lambda: False):
        """Accuracy of the average on the test images, in percent; None if stop() became true."""
        right = 0
        for images, labels in zip(self.data.test_images.split(250),
                                  self.data.test_labels.split(250)):
            if stop():
                return None
            right += (self.average(normalize(images)).argmax(1) == labels).sum().item()
        return 100 * right / len(self.data.test_labels)

    def path(self, folder):
        s = self.settings
        return os.path.join(folder, f"{self.data.name}-{s['model']}-seed{s['seed']}.pt")

    def title(self):
        d = self.data
        return (f"model {self.settings['model']}  data {d.name}: {len(d.train_images)} training, "
                f"{len(d.test_images)} test")

    def report(self):
        return f"test accuracy {self.scores[-1]:.2f} (not warped)"

    def result(self):
        """The row of a finished run: what it was, what came out, and where it ran."""
        s = self.settings
        return {"model": s["model"], "dataset": self.data.name, "seed": s["seed"],
                "params": self.parameters(), "epochs": s["epochs"],
                "test_accuracy": f"{self.scores[-1]:.2f}", "seconds": f"{self.seconds():.0f}",
                **self.machine, "command": command(self)}


# --------------------------------------------------------------------------------------------------
# One run: train, show how it goes, save, test.

class Interrupt:
    """Ctrl-C asks for a stop between two steps, where a checkpoint is whole; twice stops now."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._ask)
        return lambda: self.asked

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def fit(trainer, path, stop=lambda: False):
    """Train to the end, saving after each epoch: -> True, or False if stop() became true."""
    t, begin = trainer, trainer.step

    def anyone_stops():                  # all processes must leave after the same step
        if PROCESSES == 1:
            return stop()
        return mean(torch.tensor(float(stop()), device=t.device)).item() > 0

    for epoch in range(t.settings["epochs"]):
        while t.step < (epoch + 1) * t.per_epoch:
            if anyone_stops():
                if t.step > begin:
                    t.save(path)
                return False
            t.train_step()
            if t.step % 20 == 0:
                show_progress(t)
        if len(t.scores) == epoch:
            score = from_first(lambda: t.evaluate(stop))
            if score is not None:
                t.scores.append(score)
            t.save(path)
            if score is None:
                return False
            if RANK == 0:
                show_epoch(t)
    return True


def recent(trainer, count):
    """Mean loss, accuracy in percent, and units read per second over the last steps."""
    t, start = trainer, max(0, trainer.step - count)
    seconds = t.seconds() - (t.clock[start - 1].item() if start else 0.0)
    speed = (t.step - start) * t.per_step / max(seconds, 1e-9)
    window = slice(start, t.step)
    return t.losses[window].mean().item(), 100 * t.hits[window].mean().item(), speed


def show_progress(trainer):
    """One line that updates in place; on a terminal only: a log wants the end, not the film."""
    if not sys.stdout.isatty():
        return
    t, (loss, accuracy, speed) = trainer, recent(trainer, 100)
    left = round((t.steps - t.step) * t.per_step / speed)
    epoch, i = divmod(t.step - 1, t.per_epoch)
    print(f"\r  epoch {epoch + 1}/{t.settings['epochs']}  step {i + 1:4d}/{t.per_epoch}  "
          f"loss {loss:.4f}  accuracy {accuracy:.2f}  {speed:.0f} {t.unit}/s  "
          f"{left // 60}:{left % 60:02d} left  ", end="", flush=True)


def show_epoch(trainer):
    t, (loss, accuracy, speed) = trainer, recent(trainer, trainer.per_epoch)
    back = "\r" if sys.stdout.isatty() else ""
    print(f"{back}  epoch {len(t.scores)}/{t.settings['epochs']}  loss {loss:.4f}  "
          f"accuracy {accuracy:.2f}  {speed:.0f} {t.unit}/s  {t.seconds():.0f} s  {t.report()}",
          flush=True)


def run(trainer, out, resume):
    """Train, from the checkpoint in the folder out if resume: -> whether it came to the end."""
    t, path = trainer, trainer.path(out)
    if resume:
        t.load(path)
    elif RANK == 0:
        set_aside(path)
    if from_first(lambda: (t.settings, t.step)) != (t.settings, t.step):
        raise UserError(f"process {RANK} has other data or another checkpoint than the first one: "
                        f"all of them must see the same files in --data-dir and --out")
    print(f"{t.title()}\nparameters {t.parameters()}  seed {t.settings['seed']}  device "
          f"{t.machine['device']}  torch {t.machine['torch']}\nloss of a blind guess "
          f"ln {t.classes} = {math.log(t.classes):.4f}\n"
          f"checkpoint {path}, step {t.step} of {t.steps}", flush=True)
    with Interrupt() as stop:
        finished = fit(t, path, stop)
    if not finished:
        print(f"\nstopped at step {t.step} of {t.steps}" + (
            f", saved in {path}: --resume goes on from there" * os.path.exists(path)), flush=True)
    else:
        print("RESULT " + " ".join(f"{name}={value}" for name, value in t.result().items()
                                   if name not in (*t.machine, "command")), flush=True)
        if stop():                       # asked for after the last look at it
            raise KeyboardInterrupt
    return finished


def begun(trainer, out):
    """Whether there is a checkpoint to go on from."""
    return from_first(lambda: os.path.exists(trainer.path(out)))


def set_aside(path):
    """Rename an earlier checkpoint: whoever forgets --resume loses nothing."""
    number = 1
    while os.path.exists(f"{path}.old{number}"):
        number += 1
    try:
        os.replace(path, f"{path}.old{number}")
        print(f"an earlier checkpoint was there, and is now {path}.old{number}")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot rename {path} ({first_line(error)}): move it away") from None


def command(trainer):
    """The command that trains this model."""
    s, data = trainer.settings, trainer.data.name
    chosen = flags(s, SETTINGS, parse([])) + " --data synthetic" * data.startswith("synthetic")
    chosen += " --quick" * ("-quick" in data)
    chosen += f" --holdout {s['test_images']}" * ("-holdout" in data)
    return f"python train_mnist.py --model {s['model']} --seed {s['seed']}{chosen}"


def flags(settings, names, defaults):
    """The flags for those of the settings, but for model and seed, that are not the defaults."""
    return "".join(f" --{name.replace('_', '-')} {settings[name]}" for name in names
                   if name not in ("model", "seed") and settings[name] != getattr(defaults, name))


def results_name(data, chosen, seeds):
    """What a table and its figures are called: the data, and the flags that are not the default."""
    name = data + chosen.replace(" --", "-").replace(" ", "-")
    return name + ("" if seeds == [0, 1, 2] else "-seeds-" + "-".join(map(str, seeds)))


def describe(device):
    """What it runs on, in a few words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} {platform.machine()} {threads} thread{'s' * (threads > 1)}" + (
        f", {PROCESSES} processes" * (PROCESSES > 1))


# --------------------------------------------------------------------------------------------------
# All models: a table and two figures.

def compare(settings, seeds, data, device, out, resume):
    """Train every model with every seed; then the table: -> whether all came to the end."""
    trainers = {model: [] for model in MODELS}
    for seed in dict.fromkeys(seeds):
        for model in MODELS:
            trainer = ImageTrainer(dict(settings, model=model, seed=seed), data, device)
            if not run(trainer, out, resume and begun(trainer, out)):
                return False
            trainers[model].append(trainer)
    if RANK > 0:
        return True
    rows = [t.result() for runs in trainers.values() for t in runs]
    name = results_name(data.name, flags(settings, SETTINGS, parse([])), seeds)
    write_atomically(f"results/{name}.csv", lambda part: write_rows(part, rows))
    write_atomically(f"figures/{name}_loss.png", lambda part: draw_loss(part, trainers))
    write_atomically(f"figures/{name}_accuracy.png", lambda part: draw_accuracy(part, trainers))
    print(f"\nwrote results/{name}.csv, figures/{name}_loss.png, figures/{name}_accuracy.png\n")
    print_table(rows)
    return True


def mean_sd(values, sign="", digits=2):
    """Mean ± standard deviation, as text; of a single value, the value."""
    values = torch.tensor(values, dtype=torch.float64)
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{spread}"


def print_table(rows):
    """The README's table: per model mean ± standard deviation; then the difference by seed."""
    print("| model | parameters | test accuracy, % | seconds |\n|---|---|---|---|")
    scores = {}
    for model in MODELS:
        runs = [row for row in rows if row["model"] == model]
        scores[model] = [float(row["test_accuracy"]) for row in runs]
        seconds = sum(float(row["seconds"]) for row in runs) / len(runs)
        print(f"| {model} | {runs[0]['params']:,} | {mean_sd(scores[model])} | {seconds:.0f} |")
    differences = [a - b for a, b in zip(scores["bidirectional"], scores["causal"])]
    print(f"\nbidirectional minus causal, seed by seed: {mean_sd(differences, '+')}")


def draw_loss(path, trainers):
    """Training loss over steps and over seconds: mean over seeds, band from lowest to highest."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for model, runs in trainers.items():
        width = max(1, min(100, runs[0].steps // 10))      # steps that a point is the mean of
        losses = torch.stack([t.losses.unfold(0, width, width).mean(1) for t in runs])
        steps = width * torch.arange(1, losses.shape[1] + 1)
        seconds = torch.stack([t.clock for t in runs]).mean(0)[steps - 1]
        for ax, x in zip(axes, (steps, seconds)):
            ax.plot(x, losses.mean(0), color=MODELS[model], label=model)
            ax.fill_between(x, losses.amin(0), losses.amax(0), color=MODELS[model], alpha=0.2,
                            linewidth=0)
    axes[0].set(xlabel="training step", ylabel="training loss (nats, warped images)", yscale="log")
    axes[1].set(xlabel=f"seconds of training ({runs[0].machine['device']})", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{runs[0].data.name}: mean of {len(runs)} seeds, band from lowest to highest",
                    fontsize=10)
    figure.savefig(path, dpi=120, format="png")


def draw_accuracy(path, trainers):
    """Test accuracy after each epoch, a line per seed; the last epoch is the table's."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for model, runs in trainers.items():
        for i, t in enumerate(runs):
            ax.plot(range(1, len(t.scores) + 1), t.scores, "o-", color=MODELS[model],
                    alpha=0.7, label=model if i == 0 else None)
    ax.set(xlabel="epoch", ylabel="test accuracy (%)")
    ax.set_xticks(range(1, runs[0].settings["epochs"] + 1))
    ax.set_title(f"{runs[0].data.name}: a line per seed", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")


# --------------------------------------------------------------------------------------------------
# The command line.

def number(kind, low, high=math.inf):
    """A converter for argparse that names the limits."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            limits = f"{low} or more" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value
    convert.__name__ = kind.__name__
    return convert


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count, seed = p.add_argument, number(int, 1), number(int, 0, 10 ** 6)
    add("--model", choices=list(MODELS), default="bidirectional", help="default %(default)s")
    add("--seed", type=seed, default=0, help="default %(default)s")
    add("--compare", action="store_true", help="every model with every seed of --seeds")
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    add("--quick", action="store_true", help="2 epochs of 6,400 images, tested on 1,000")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--epochs", type=count, help="default 5")
    add("--batch", type=count, default=64, help="images per step, default %(default)s")
    add("--lr", type=number(float, 0), default=3e-3, help="its peak, default %(default)s")
    add("--weight-decay", type=number(float, 0), default=0.05, help="default %(default)s")
    add("--average", type=number(float, 0, 1), default=0.998,
        help="decay per step of the averaged weights, default %(default)s")
    add("--d-model", type=count, default=64, help="width of the tokens, default %(default)s")
    add("--layers", type=count, default=2, help="default %(default)s")
    add("--hidden", type=count, default=152,
        help="width of the RNN, default %(default)s: as many parameters as the default Mamba has")
    add("--stem", choices=STEMS, default="conv", help="from pixels to tokens, default %(default)s")
    add("--pool", choices=POOLS, default="mean", help="default %(default)s; classic RNN: last")
    add("--fuse", choices=FUSIONS, default="average", help="both directions, default %(default)s")
    add("--holdout", type=number(int, 0), default=0,
        help="test on this many training images, held out: for choosing settings")
    add("--data", choices=["auto", "real", "synthetic"], default="auto",
        help="auto: MNIST, or synthetic digits if it cannot be had")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints, default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto: cuda if there is one, else cpu")
    args = p.parse_args(arguments)
    args.epochs = args.epochs or (2 if args.quick else 5)
    return args


def choose_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda":               # torchrun counts the processes of one machine
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.zeros(1, device=name).device
    except Exception:                    # its kind depends on how torch was built
        raise UserError(f"there is no device {name} here: use --device cpu") from None


def shrink(data, args):
    """The data set that --holdout and --quick leave; its name says so."""
    name, x, y, test_x, test_y = data
    if args.holdout:
        keep = len(x) - args.holdout
        name, x, y, test_x, test_y = name + "-holdout", x[:max(keep, 0)], y[:max(keep, 0)], \
            x[keep:], y[keep:]
    if args.quick:
        name, x, y, test_x, test_y = name + "-quick", x[:6400], y[:6400], test_x[:1000], \
            test_y[:1000]
    if len(x) < args.batch:
        raise UserError(f"{len(x)} training images are left, and a batch takes {args.batch}")
    return Data(name, x, y, test_x, test_y)


def guard(script, job):
    """job() -> whether it came to the end; here: the exit code. Mistakes get one line on stderr."""
    for stream in (sys.stdout, sys.stderr):      # a Windows log may know neither ± nor ×
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:                                         # a wrong flag or --help ends the program in there
        return 0 if job() else 130
    except UserError as error:
        print(f"\n{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{script}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:              # whoever read stdout has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141                       # what a shell reports of a program that ends so
    finally:
        if PROCESSES > 1 and dist.is_initialized():
            dist.destroy_process_group()


def train(args):
    device = choose_device(args.device)
    join(device, args.batch)
    for folder in [args.out] + ["results", "figures"] * args.compare:
        check_writable(folder)
    data = shrink(load_data(args.data_dir, args.data), args)
    data = Data(data.name, *(t.to(device) for t in data[1:]))
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.compare:
        return compare(settings, args.seeds, data, device, args.out, args.resume)
    return run(ImageTrainer(settings, data, device), args.out, args.resume)


def main(arguments=None):
    return guard("train_mnist.py", lambda: train(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
