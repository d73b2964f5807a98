"""train_mnist.py: several models, one recipe, one table.

    python train_mnist.py                    the bidirectional Vision Mamba, 5 epochs: 99.46 % after
                                             18 minutes on one core
    python train_mnist.py --model causal     or s4, or rnn
    python train_mnist.py --tokens pixels    each of the 784 pixels is a token
    python train_mnist.py --task next-pixel  guess each pixel from those before, and draw digits
    python train_mnist.py --dataset cifar10  coloured images, with settings of their own
    python train_mnist.py --quick            a first look in about a minute
    python train_mnist.py --compare          every model, every seed: the README's tables, figures
    python train_mnist.py --resume           go on after Ctrl-C, on a CPU to the same weights
    torchrun --nproc_per_node=2 train_mnist.py           each of two processes takes half the batch

Every model gets the same tokens (the stem), the same pooling, a linear head, the same number of
parameters to 1 %, the same augmented images, optimizer and schedule. What differs is the body that
reads the tokens. (The budgets are made even for the default settings. For the next pixel, both
models share what is done pixel by pixel, and their blocks have the same number of parameters.)

The recipe: AdamW, its learning rate rising over the first tenth of the steps and then falling to
zero along a cosine; small random affine warps (photographs are shifted and mirrored, and their
labels smoothed; single pixels are read once and left alone); and a moving average of the weights,
which is what is tested. That of the digits was chosen on 5,000 images held out of the training set
(`--holdout 5000`). There the test set decided nothing: it is measured after each epoch for the
figure, and the table takes the last. (How the next pixel's settings were chosen: see the README.)

No network and no files: digits drawn with matplotlib's fonts stand in for MNIST, and are announced
and labelled so.

`Trainer`, `fit` and `run` are for whatever is trained here; train_shakespeare.py imports them.

Left out: worker processes. The data set fits in memory as one tensor; a batch is an index into it.
Read before: vision.py and rnn.py. Read next: train_shakespeare.py.
"""
import argparse
import contextlib
import copy
import glob
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

from block import MambaBlock, parameter_groups
from rnn import RNN, S4Block, S4Stack
from s6 import write_rows
from vision import BEGIN, FUSIONS, POOLS, STEMS, ImageClassifier, PixelLM, VisionMamba

MODELS = {"bidirectional": "#d62728", "causal": "#1f77b4", "s4": "#2ca02c", "rnn": "#7f7f7f"}

# What decides the outcome of a run, besides the data: a checkpoint goes on under the same only.
SETTINGS = ("task", "model", "tokens", "seed", "epochs", "batch", "lr", "weight_decay", "smoothing",
            "average", "augment", "bf16", "d_model", "layers", "hidden", "state", "stem", "pool",
            "fuse")

# What each job starts from; a value that a job does not name means nothing to it. Each is a flag.
# --hidden of the RNN and --state of S4 give them the parameters of Mamba, to 1 %.
DEFAULTS = {
    "mnist": {
        "seeds": [0, 1, 2], "epochs": 5, "batch": 64, "lr": 3e-3, "smoothing": 0.0,
        "augment": True, "d_model": 64, "layers": 2, "hidden": 152, "state": 92,
        "stem": "conv", "pool": "mean", "fuse": "average"},
    "pixels": {
        "seeds": [0], "epochs": 1, "batch": 32, "lr": 3e-3, "smoothing": 0.0,
        "augment": False, "d_model": 64, "layers": 2, "hidden": 153, "state": 92,
        "pool": "mean", "fuse": "average"},
    "next-pixel": {
        "seeds": [0], "epochs": 1, "batch": 16, "lr": 6e-3, "d_model": 64, "layers": 2,
        "state": 62},
    "cifar10": {
        "seeds": [0], "epochs": 5, "batch": 64, "lr": 3e-3, "smoothing": 0.1,
        "augment": True, "d_model": 128, "layers": 4, "hidden": 268, "state": 132,
        "stem": "deep", "pool": "mean", "fuse": "average"},
}


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
    """Images uint8 (N, c, h, w), labels int64 (N,), and the name that every result carries."""
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
    with tempfile.TemporaryDirectory(dir=data_dir) as folder:
        def fetch(mirror):               # torchvision itself gives up where a mirror stalls
            type("MNIST", (MNIST,), {"mirrors": [mirror]})(folder, download=True)

        try_each(MNIST.mirrors, fetch)
        os.makedirs(raw, exist_ok=True)
        for name in MNIST_MD5:
            os.replace(os.path.join(folder, "MNIST", "raw", name), os.path.join(raw, name))


def load_cifar(data_dir):
    """CIFAR-10: torchvision's own files, downloaded if need be, or a folder of JPEG images.

    The folder is data_dir/CIFAR-10-images, with train/<class>/*.jpg and test/<class>/*.jpg; what is
    lost by JPEG is in the name "cifar10-jpeg". Raises UserError if neither can be read.
    """
    from torchvision.datasets import CIFAR10, ImageFolder
    files = os.path.join(data_dir, CIFAR10.base_folder)
    folders = [os.path.join(data_dir, "CIFAR-10-images", part) for part in ("train", "test")]
    try:
        if not os.path.exists(files) and all(map(os.path.exists, folders)):
            sets = []
            for folder in map(ImageFolder, folders):
                images = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                          for image, _ in folder]
                sets += [torch.stack(images).view(-1, 32, 32, 3), torch.tensor(folder.targets)]
            name = "cifar10-jpeg"
        else:
            if not os.path.exists(files):
                download_cifar(data_dir, files)
            both = CIFAR10(data_dir, train=True), CIFAR10(data_dir, train=False)
            sets = [t for part in both for t in (torch.tensor(part.data),
                                                 torch.tensor(part.targets))]
            name = "cifar10"
    except Exception as error:           # no network, a broken download, what PIL and pickle raise
        raise UserError(f"CIFAR-10 is not in {files}, or damaged, and cannot be downloaded "
                        f"({first_line(error)}): connect to the network and delete what is there, "
                        f"or put JPEG images into {folders[0]} and {folders[1]}, a folder per "
                        f"class") from None
    (x, y), (test_x, test_y) = sets[:2], sets[2:]
    # The files are sorted by class or in batches: --limit and --holdout want any first part mixed.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return Data(name, x[order].permute(0, 3, 1, 2).contiguous(), y[order],
                test_x.permute(0, 3, 1, 2).contiguous(), test_y)


def download_cifar(data_dir, files):
    """Let torchvision download and verify in a folder of its own, then move all into place."""
    from torchvision.datasets import CIFAR10
    os.makedirs(data_dir, exist_ok=True)
    with impatience(), tempfile.TemporaryDirectory(dir=data_dir) as folder:
        CIFAR10(folder, download=True)
        os.replace(os.path.join(folder, CIFAR10.base_folder), files)


PATIENCE = 10        # seconds without a byte, after which a download is given up


@contextlib.contextmanager
def impatience():
    """In here a stalled download is given up."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def try_each(addresses, fetch):
    """fetch(address) for one after the other until it succeeds; raises what the last one raised."""
    with impatience():
        for address in addresses:
            try:
                return fetch(address)
            except Exception as error:   # no network, or what a broken download raises
                problem = error
    raise problem


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


def crop_and_flip(images, padding=2):
    """Each image (b, c, h, w) shifted by up to `padding` pixels, and mirrored or not, by chance."""
    b, _, h, w = images.shape
    images = F.pad(images, (padding,) * 4, mode="reflect")
    top, left = torch.randint(2 * padding + 1, (2, b, 1), device=images.device)
    rows = top + torch.arange(h, device=images.device)                         # (b, h)
    columns = left + torch.arange(w, device=images.device)                     # (b, w)
    mirrored = torch.rand(b, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(b, device=images.device).view(b, 1, 1)
    images = images.movedim(1, -1)[each, rows.unsqueeze(2), columns.unsqueeze(1)]
    return images.movedim(-1, 1)                                               # (b, c, h, w)


def normalize(images):
    """uint8 pixels -> about zero mean and unit variance.

    images (b, 1, h, w), by the training pixels of MNIST, or (b, 3, h, w), by those of CIFAR-10
    """
    if images.shape[1] == 1:
        return (images.float() / 255 - 0.1307) / 0.3081
    mean = images.new_tensor([0.4914, 0.4822, 0.4465], dtype=torch.float32).view(3, 1, 1)
    spread = images.new_tensor([0.2470, 0.2435, 0.2616], dtype=torch.float32).view(3, 1, 1)
    return (images.float() / 255 - mean) / spread


def learning_rate(step, steps, peak):
    """A line from 0 to peak over the first tenth of the steps, then a cosine to 0."""
    progress = (step + 1) / steps
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.1) / 0.9)))
    return peak * min(progress / 0.1, fall)


def build(settings):
    """The model that the settings name."""
    frame = {"stem": settings["stem"], "pool": settings["pool"]}
    if settings.get("dataset", "").startswith("cifar10"):
        frame.update(channels=3, image_size=(32, 32))
    if settings["tokens"] == "pixels":
        frame.update(stem="patch", patch=1, position="axes")
    d_model, layers, hidden = settings["d_model"], settings["layers"], settings["hidden"]
    if settings["model"] == "rnn":
        return ImageClassifier(RNN(d_model, hidden, layers), d_model, hidden, **frame)
    if settings["model"] == "s4":        # two of its blocks cost what one of Mamba's does
        body = S4Stack(d_model, 2 * layers, settings["state"])
        return ImageClassifier(body, d_model, d_model, **frame)
    return VisionMamba(d_model, layers, direction=settings["model"], fuse=settings["fuse"], **frame)


def build_writer(settings):
    """The model of --task next-pixel: logits for 256 grey values from the pixels before."""
    d_model, layers = settings["d_model"], settings["layers"]
    if settings["model"] == "s4":
        blocks = [S4Block(d_model, settings["state"]) for _ in range(2 * layers)]
    else:
        blocks = [MambaBlock(d_model) for _ in range(layers)]
    return PixelLM(blocks, d_model)


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
        if not self.settings.keys() <= state["settings"].keys():
            raise UserError(f"{path} was made by another version of this script: start without "
                            f"--resume")
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

    unit, classes, models, build = "images", 10, tuple(MODELS), staticmethod(build)

    def __init__(self, settings, data, device):
        self.data, self.order = data, (-1, None)
        self.per_step = settings["batch"]
        settings = dict(settings, dataset=data.name, train_images=len(data.train_images),
                        test_images=len(data.test_images))
        super().__init__(settings, self.build, len(data.train_images) // self.per_step, device)

    def index(self):
        """Which images are in the batch of this step, (b,): each once in an epoch."""
        (epoch, i), size = divmod(self.step, self.per_epoch), self.per_step
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.draw("order", epoch))
            self.order = epoch, torch.randperm(len(self.data.train_images), generator=generator)
        return self.order[1][i * size:(i + 1) * size].to(self.device)

    def batch(self):
        """The augmented images (b, c, h, w) and the labels (b,) of this step."""
        index = self.index()
        torch.manual_seed(self.draw("warp", self.step))
        images = self.data.train_images[index].float()
        if self.settings["augment"] and images.shape[1] == 1:
            images = warp(images, degrees=10, scale=0.1, shear=5, shift=2)
        elif self.settings["augment"]:   # a cat is a cat in the mirror; a 2 is no 2
            images = crop_and_flip(images)
        return normalize(images), self.data.train_labels[index]

    def autocast(self):
        """With --bf16, what autocast computes in bfloat16; weights, Δ and states stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["bf16"])

    def loss(self):
        images, labels = map(share, self.batch())
        with self.autocast():
            logits = self.net(images).float()
        hits = (logits.detach().argmax(1) == labels).float().mean()
        smoothing = self.settings["smoothing"]
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), hits

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
        name = f"{job_name(self.data, s)}-{s['model']}-seed{s['seed']}.pt"
        return os.path.join(folder, name)

    def title(self):
        d = self.data
        return (f"model {self.settings['model']} on {self.settings['tokens']}  data {d.name}: "
                f"{len(d.train_images)} training, {len(d.test_images)} test")

    def report(self):
        return f"test accuracy {self.scores[-1]:.2f} (not augmented)"

    def result(self):
        """The row of a finished run: what it was, what came out, and where it ran."""
        s = self.settings
        return {"model": s["model"], "dataset": self.data.name, "seed": s["seed"],
                "params": self.parameters(), "epochs": s["epochs"],
                "test_accuracy": f"{self.scores[-1]:.2f}", "seconds": f"{self.seconds():.0f}",
                **self.machine, "command": command(self)}


def job_name(data, settings):
    """What files are called: the data, and whether its pixels are read one by one, or written."""
    pixels = "-pixels" * (settings["tokens"] == "pixels")
    return data.name + ("-next-pixel" if settings["task"] == "next-pixel" else pixels)


def as_tokens(images):
    """uint8 (b, 1, h, w) -> tokens before each pixel, and the pixel, (b, h·w) int64 both."""
    pixels = images.flatten(1).long()
    return F.pad(pixels[:, :-1], (1, 0), value=BEGIN), pixels


class PixelTrainer(ImageTrainer):
    """A Trainer that guesses each pixel from those before it: a language model of images."""

    classes, models, build = 256, ("causal", "s4"), staticmethod(build_writer)

    def loss(self):
        inputs, pixels = map(share, as_tokens(self.data.train_images[self.index()]))
        with self.autocast():
            logits = self.net(inputs).float()
        hits = (logits.detach().argmax(-1) == pixels).float().mean()
        return F.cross_entropy(logits.flatten(0, 1), pixels.flatten()), hits

    @torch.no_grad()
    def evaluate(self, stop=lambda: False):
        """Mean loss of the average on the test images, nats per pixel; None if stopped."""
        total = 0.0
        for images in self.data.test_images.split(50):
            if stop():
                return None
            inputs, pixels = as_tokens(images)
            logits = self.average(inputs).flatten(0, 1)
            total += F.cross_entropy(logits, pixels.flatten(), reduction="sum").item()
        return total / self.data.test_images.numel()

    def report(self):
        nats = self.scores[-1]
        return f"test {nats:.4f} nats = {nats / math.log(2):.4f} bits per pixel"

    def result(self):
        nats, row = self.scores[-1], super().result()
        row = {key: value for key, value in row.items() if key != "test_accuracy"}
        return {**row, "test_nats_per_pixel": f"{nats:.4f}",
                "test_bits_per_pixel": f"{nats / math.log(2):.4f}"}


@torch.inference_mode()
def complete(model, given, length, seed):
    """Go on from the first pixels of images: given (b, g) int64 -> (b, length), drawn one by one.

    The pixels given are read in one call; then every pixel is a step of the recurrence.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, states, pixels = F.pad(given, (1, 0), value=BEGIN), None, [given]
    for _ in range(length - given.shape[1]):
        logits, states = model(tokens, states, return_state=True)
        chances = logits[:, -1].softmax(-1).cpu()
        tokens = torch.multinomial(chances, 1, generator=generator).to(given)
        pixels.append(tokens)
    return torch.cat(pixels, 1)


# --------------------------------------------------------------------------------------------------
# One run: train, show how it goes, save, test.

class Interrupt:
    """Ctrl-C asks for a stop between two steps, and so does SIGTERM; the same again stops now."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self._ask)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return lambda: self.asked

    def _ask(self, number, _):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


SAVE_EVERY = 600     # seconds between two checkpoints, where an epoch takes longer


def fit(trainer, path, stop=lambda: False):
    """Train to the end, saving after each epoch at least: -> False if stop() became true."""
    t, begin, saved = trainer, trainer.step, time.monotonic()

    def due():
        """Whether to stop, and whether to save: all processes do it after the same step."""
        wishes = [stop(), RANK == 0 and time.monotonic() - saved > SAVE_EVERY]
        if PROCESSES > 1:
            wishes = (mean(torch.tensor(wishes, device=t.device).float()) > 0).tolist()
        return wishes

    for epoch in range(t.settings["epochs"]):
        while t.step < (epoch + 1) * t.per_epoch:
            stopping, saving = due()
            if saving or stopping and t.step > begin:
                t.save(path)
                saved = time.monotonic()
            if stopping:
                return False
            t.train_step()
            if t.step % 20 == 0:
                show_progress(t)
        if len(t.scores) == epoch:
            t.save(path)                 # a test can take minutes, and fail
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
    if RANK == 0:
        remove_parts(path)
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


def remove_parts(path):
    """Delete what a training that was killed while it wrote path has left behind."""
    for part in glob.glob(glob.escape(path) + ".*.part"):
        with contextlib.suppress(OSError):
            os.remove(part)


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
    chosen = default_flags(s, data)
    chosen = "".join(f" {flag}" for flag in chosen) + flags(s, SETTINGS, parse(chosen)) + \
        " --data synthetic" * data.startswith("synthetic")
    chosen += " --quick" * ("-quick" in data)
    chosen += f" --holdout {s['test_images']}" * ("-holdout" in data)
    chosen += f" --limit {data.split('-limit-')[1].split('-')[0]}" if "-limit-" in data else ""
    return f"python train_mnist.py --model {s['model']} --seed {s['seed']}{chosen}"


def default_flags(settings, data):
    """The flags that choose the task and the data set, and so the defaults of the others."""
    if settings["task"] == "next-pixel":
        return ["--task", "next-pixel"]
    return (["--dataset", "cifar10"] * data.startswith("cifar10")
            + ["--tokens", "pixels"] * (settings["tokens"] == "pixels"))


def flags(settings, names, defaults):
    """The flags for those of the settings, but for model and seed, that are not the defaults."""
    text = ""
    for name in names:
        value, flag = settings[name], name.replace("_", "-")
        if name not in ("model", "seed") and value != getattr(defaults, name):
            text += f" --no-{flag}" if value is False else f" --{flag}" if value is True else \
                f" --{flag} {value}"
    return text


def results_name(data, chosen, seeds, usual=(0, 1, 2)):
    """What a table and its figures are called: the data, and the flags that are not the default."""
    name = data + chosen.replace(" --", "-").replace(" ", "-")
    return name + ("" if seeds == list(usual) else "-seeds-" + "-".join(map(str, seeds)))


def describe(device):
    """What it runs on, in a few words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} {platform.machine()} {threads} thread{'s' * (threads > 1)}" + (
        f", {PROCESSES} processes" * (PROCESSES > 1))


# --------------------------------------------------------------------------------------------------
# All models: a table and two figures.

def compare(kind, settings, models, seeds, data, device, out, resume):
    """Train the models with every seed; then the table: -> whether all came to the end."""
    trainers = {model: [] for model in models}
    for seed in dict.fromkeys(seeds):
        for model in trainers:
            trainer = kind(dict(settings, model=model, seed=seed), data, device)
            if not run(trainer, out, resume and begun(trainer, out)):
                return False
            trainers[model].append(trainer)
    if RANK > 0:
        return True
    rows = [t.result() for runs in trainers.values() for t in runs]
    writing = kind is PixelTrainer
    defaults = parse(default_flags(settings, data.name))
    chosen = flags(settings, SETTINGS, defaults)
    if set(models) != set(kind.models):
        chosen += " --models " + " ".join(models)
    name = results_name(job_name(data, settings), chosen, seeds, defaults.seeds)
    figures = {f"figures/{name}_loss.png": draw_loss}
    if not writing:
        figures[f"figures/{name}_accuracy.png"] = draw_accuracy
    else:
        prefix = "" if name == "mnist-next-pixel" else name + "_"
        figures[f"figures/{prefix}completions.png"] = draw_completions
    write_atomically(f"results/{name}.csv", lambda part: write_rows(part, rows))
    for path, draw in figures.items():
        write_atomically(path, lambda part: draw(part, trainers))
    print(f"\nwrote results/{name}.csv, {', '.join(figures)}\n")
    (print_bits if writing else print_table)(rows)
    return True


def mean_sd(values, sign="", digits=2):
    """Mean ± standard deviation, as text; of a single value, the value."""
    values = torch.tensor(values, dtype=torch.float64)
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.{digits}f}{spread}"


def by_model(rows):
    """Rows -> {model: its rows}."""
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: [row for row in rows if row["model"] == model] for model in models}


def print_table(rows):
    """The README's table: per model mean ± standard deviation; then the difference by seed."""
    print("| model | parameters | test accuracy, % | seconds |\n|---|---|---|---|")
    scores = {}
    for model, runs in by_model(rows).items():
        scores[model] = [float(row["test_accuracy"]) for row in runs]
        seconds = sum(float(row["seconds"]) for row in runs) / len(runs)
        print(f"| {model} | {runs[0]['params']:,} | {mean_sd(scores[model])} | {seconds:.0f} |")
    if {"bidirectional", "causal"} <= set(scores):
        differences = [a - b for a, b in zip(scores["bidirectional"], scores["causal"])]
        print(f"\nbidirectional minus causal, seed by seed: {mean_sd(differences, '+')}")


def print_bits(rows):
    """The README's table of --task next-pixel."""
    print("| model | parameters | nats per pixel | bits per pixel | seconds |\n" + "|---" * 5 + "|")
    for model, runs in by_model(rows).items():
        nats, bits, seconds = ([float(row[key]) for row in runs] for key in (
            "test_nats_per_pixel", "test_bits_per_pixel", "seconds"))
        print(f"| {model} | {runs[0]['params']:,} | {mean_sd(nats, digits=4)} | "
              f"{mean_sd(bits, digits=4)} | {sum(seconds) / len(seconds):.0f} |")


def draw_completions(path, trainers, count=10):
    """Test digits, their upper halves, and how each model goes on from there, three times."""
    from matplotlib.figure import Figure
    data = next(iter(trainers.values()))[0].data
    images = data.test_images[:count].flatten(1).long()                        # (count, h·w)
    half, (count, length) = images.shape[1] // 2, images.shape
    rows = {"the digit": images, "what is given": images[:, :half]}
    for model, runs in trainers.items():
        for seed in range(3):
            rows[f"{model} {seed + 1}"] = complete(runs[0].average, images[:, :half], length, seed)
    figure = Figure(figsize=(count, 0.95 * len(rows) + 0.4), layout="constrained")
    for row, (name, pixels) in zip(figure.subplots(len(rows), count), rows.items()):
        shown = F.pad(pixels.float(), (0, length - pixels.shape[1]), value=math.nan).cpu()
        for ax, image in zip(row, shown.view(count, *data.test_images.shape[2:]).numpy()):
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=255)
            ax.axhline(data.test_images.shape[2] / 2 - 0.5, color="#d62728", linewidth=0.8)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle(f"{data.name}: above the line given, below it drawn pixel by pixel",
                    fontsize=10)
    figure.savefig(path, dpi=100, format="png")


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
    axes[0].set(xlabel="training step", ylabel="training loss (nats)", yscale="log")
    axes[1].set(xlabel=f"seconds of training ({runs[0].machine['device']})", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    seeds = f"mean of {len(runs)} seeds, band from lowest to highest" if len(runs) > 1 else (
        f"seed {runs[0].settings['seed']}")
    figure.suptitle(f"{runs[0].data.name}: {seeds}", fontsize=10)
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


def add_places(add, auto):
    """The flags that every script has: where data, checkpoints and arithmetic are to be."""
    add("--data", choices=["auto", "real", "synthetic"], default="auto", help=auto)
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints, default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto: cuda if there is one, else cpu")


def by_job(name, text=""):
    """A flag's help: what it is by default."""
    values = {}
    for job, defaults in DEFAULTS.items():
        if name in defaults:
            value = defaults[name]
            value = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            values.setdefault(value, []).append(job)
    return text + "default " + ", ".join(f"{value} of {', '.join(jobs)}" if len(values) > 1 else
                                         value for value, jobs in values.items())


def add_flags(add):
    count, seed = number(int, 1), number(int, 0, 10 ** 6)
    add("--dataset", choices=["mnist", "cifar10"], default="mnist", help="default %(default)s")
    add("--model", choices=list(MODELS), help="default bidirectional, of next-pixel causal")
    add("--task", choices=["classify", "next-pixel"], default="classify",
        help="next-pixel guesses each pixel from those before, default %(default)s")
    add("--tokens", choices=["patches", "pixels"], default="patches",
        help="49 patches, or 784 single pixels; default %(default)s")
    add("--seed", type=seed, help="default 0")
    add("--compare", action="store_true", help="each of --models with each of --seeds")
    add("--models", choices=list(MODELS), nargs="+", help="default all that can do it")
    add("--seeds", type=seed, nargs="+", help=by_job("seeds"))
    add("--quick", action="store_true",
        help="2 epochs of 6,400 images, tested on 1,000; of pixels 1 epoch of 640, tested on 100")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--epochs", type=count, help=by_job("epochs"))
    add("--batch", type=count, help=by_job("batch", "images per step, "))
    add("--lr", type=number(float, 0), help=by_job("lr", "its peak, "))
    add("--weight-decay", type=number(float, 0), default=0.05, help="default %(default)s")
    add("--average", type=number(float, 0, 1), default=0.998,
        help="decay per step of the averaged weights, default %(default)s")
    add("--smoothing", type=number(float, 0, 1), help=by_job("smoothing", "of the labels, "))
    add("--augment", action=argparse.BooleanOptionalAction,
        help=by_job("augment", "warp digits; shift and mirror photographs, "))
    add("--bf16", action="store_true",
        help="train under autocast to bfloat16; weights and test stay in float32")
    add("--d-model", type=count, help=by_job("d_model", "width of the residual stream, "))
    add("--layers", type=number(int, 0),
        help=by_job("layers", "S4 gets twice as many; 0: nothing reads the tokens, "))
    add("--hidden", type=count, help=by_job("hidden", "width of the RNN, "))
    add("--state", type=count, help=by_job("state", "numbers in the state of S4, even, "))
    add("--stem", choices=STEMS, help=by_job("stem", "from pixels to tokens, "))
    add("--pool", choices=POOLS, help=by_job("pool", "of the tokens; classic RNN: last; "))
    add("--fuse", choices=FUSIONS, help=by_job("fuse", "both directions, "))
    add("--limit", type=count, help="train on so many images only")
    add("--holdout", type=number(int, 0), default=0,
        help="test on this many training images, held out: for choosing settings")
    add_places(add, "auto: MNIST, or synthetic digits if it cannot be had")


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p.add_argument)
    args = p.parse_args(arguments)
    writing, cifar = args.task == "next-pixel", args.dataset == "cifar10"
    if writing:
        args.tokens = "pixels"
    job = "next-pixel" if writing else "pixels" if args.tokens == "pixels" else args.dataset
    defaults = DEFAULTS[job]
    if not args.compare and (args.models or args.seeds):
        p.error("--models and --seeds go with --compare; one run has a --model and a --seed")
    if args.compare and (args.model or args.seed is not None):
        p.error("--model and --seed are those of one run; --compare has --models and --seeds")
    if args.quick and not args.epochs:
        args.epochs = min(2, defaults["epochs"])
    for name in {name for defaults in DEFAULTS.values() for name in defaults}:
        if getattr(args, name) is None:
            setattr(args, name, defaults.get(name))
        elif name not in defaults:
            p.error(f"--{name.replace('_', '-')} means nothing to {job}: leave it out")
    if args.state % 2:
        p.error(f"--state must be even, got {args.state}")
    if cifar and (writing or args.data == "synthetic"):
        p.error("--dataset cifar10 has no synthetic images, and no --task next-pixel")
    able = (PixelTrainer if writing else ImageTrainer).models
    args.seed = args.seed or 0
    args.model = args.model or ("causal" if writing else "bidirectional")
    args.models = args.models or able
    if not {args.model, *args.models} <= set(able):
        p.error(f"--task next-pixel: --model must be one of {able}, which do not see the pixel "
                f"that they guess, and can be run from a state")
    if not args.layers and "rnn" in (args.models if args.compare else [args.model]):
        p.error("--layers 0: an RNN has 1 or more; take another --model, or other --models")
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
    """The data set that --holdout, --limit and --quick leave; its name says so."""
    name, x, y, test_x, test_y = data
    if args.holdout:
        keep = len(x) - args.holdout
        name, x, y, test_x, test_y = name + "-holdout", x[:max(keep, 0)], y[:max(keep, 0)], \
            x[keep:], y[keep:]
    if args.limit:
        name, x, y = f"{name}-limit-{args.limit}", x[:args.limit], y[:args.limit]
    if args.quick:
        count = 640 if args.tokens == "pixels" else 6400
        name, x, y, test_x, test_y = name + "-quick", x[:count], y[:count], \
            test_x[:1000 * count // 6400], test_y[:1000 * count // 6400]
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


def leave(code):
    """End the process; after Ctrl-C without PyTorch's clean-up, which takes most of a second."""
    if code == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def train(args):
    device = choose_device(args.device)
    join(device, args.batch)
    pictures = args.compare or args.task == "next-pixel"
    for folder in [args.out] + ["results", "figures"] * pictures:
        check_writable(folder)
    cifar = args.dataset == "cifar10"
    data = load_cifar(args.data_dir) if cifar else load_data(args.data_dir, args.data)
    data = shrink(data, args)
    data = Data(data.name, *(t.to(device) for t in data[1:]))
    settings = {name: getattr(args, name) for name in SETTINGS}
    kind = PixelTrainer if args.task == "next-pixel" else ImageTrainer
    if args.compare:
        return compare(kind, settings, args.models, args.seeds, data, device, args.out,
                       args.resume)
    trainer = kind(settings, data, device)
    finished = run(trainer, args.out, args.resume)
    if finished and kind is PixelTrainer and RANK == 0:
        path = trainer.path("figures").replace(".pt", "_completions.png")
        write_atomically(path, lambda part: draw_completions(part, {args.model: [trainer]}))
        print(f"wrote {path}")
    return finished


def main(arguments=None):
    return guard("train_mnist.py", lambda: train(parse(arguments)))


if __name__ == "__main__":
    leave(main())
