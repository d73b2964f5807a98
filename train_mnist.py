"""train_mnist.py: several models, one recipe, one table.

    python train_mnist.py                       the bidirectional Vision Mamba on MNIST, 5 epochs:
                                                99.5 %, in 12 to 15 minutes on one core
    python train_mnist.py --model causal        or s4, or rnn
    python train_mnist.py --lr 1e-3             any value of the recipe can be changed
    python train_mnist.py pixels                another recipe: each of the 784 pixels is a token
    python train_mnist.py next-pixel            guess each pixel from those before, and draw digits
    python train_mnist.py cifar10               coloured images
    python train_mnist.py poster --compare      published results, taken apart: see the README
    python train_mnist.py --dataset fashion     FashionMNIST
    python train_mnist.py --dataset FOLDER      own images: FOLDER/train/<class>/*, FOLDER/test/…
    python train_mnist.py --quick               a first look in about a minute
    python train_mnist.py --compare --seeds 0 1 2     every model with every seed: table and figures
    python train_mnist.py --resume              go on after Ctrl-C, on a CPU to the same weights
    torchrun --nproc_per_node=2 train_mnist.py  each of two processes takes half of every batch

Every model gets the same tokens (the stem), the same pooling, a linear head, the same number of
parameters to 1 %, the same augmented images, optimizer and schedule. What differs is the body that
reads the tokens. (In the recipe poster more differs, and that is its subject.)

How to read this file: the recipes, then `train`, which is the whole loop; the rest serves it.
To change a value, or to add one: RECIPES. Another data set of torchvision: TORCHVISION. Another
model: `build`. Another schedule: `learning_rate` and CHOICES. Another optimizer or loss: `train`.

Without a network and without files, digits drawn with matplotlib's fonts stand in for MNIST; that
is announced, and all results carry their name. Left out: worker processes. A data set fits in
memory as one tensor, and a batch is an index into it.
Read before: vision.py and rnn.py. Read next: train_shakespeare.py.
"""
import argparse
import copy
import csv
import hashlib
import itertools
import math
import os
import pickle
import platform
import shlex
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib import pyplot as plt
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from block import MambaBlock, parameter_groups
from rnn import RNN, S4Block, S4Stack
from vision import BEGIN, ImageClassifier, PixelLM, VisionMamba, complete

matplotlib.use("Agg")            # figures are files: no window is opened
# The models, and their colours in the figures.
MODELS = {"bidirectional": "#d62728", "causal": "#1f77b4", "s4": "#2ca02c", "rnn": "#7f7f7f",
          "forward": "#17becf"}


# --------------------------------------------------------------------------------------------------
# The recipes. Each value but the task is also a flag: a value that you add here is a flag, and in
# every checkpoint. (The recipe next-pixel is written out in full: add the value there too.)

RECIPES = {}
RECIPES["mnist"] = dict(                 # chosen on 5,000 training images held out: --holdout 5000
    dataset="mnist",                     # a name in TORCHVISION, or a folder of images
    task="classify",
    model="bidirectional",               # one of MODELS
    seed=0,                              # of weights, order of the images, and warps
    epochs=5,
    batch=64,
    lr=3e-3,                             # peak
    schedule="cosine",                   # or "constant": see learning_rate
    clip=1.0,                            # longer gradients are scaled down to this norm
    weight_decay=0.05,                   # for matrices alone: see block.parameter_groups
    average=0.998,                       # decay of the averaged weights, which are what is tested;
                                         # 0: no average, the weights themselves are tested
    smoothing=0.0,                       # label smoothing
    augment="warp",                      # or "shift-flip", for photographs, or "none"
    bf16=False,                          # train under autocast; weights, Δ and states stay float32
    patch=4,                             # pixels per side: 28/4 · 28/4 = 49 tokens
    stem="conv",                         # from pixels to tokens: "conv", "deep", "patch"
    position="patches",                  # one vector per token; "axes": per row and column; "none"
    pool="mean",                         # of the tokens; "max"; "last", as in the classic RNN
    fuse="average",                      # of both branches; or "concat"
    d_model=64,                          # width of the residual stream
    layers=2,                            # S4 gets twice as many: its blocks are half as large
    hidden=152,                          # width of the RNN: 92,000 parameters, as all have
    state=92,                            # numbers in a state of S4: the same
)
RECIPES["pixels"] = dict(
    RECIPES["mnist"],
    patch=1, stem="patch",               # a token is a pixel
    position="axes",                     # a vector per pixel would be a third of the model
    augment="none",                      # in one epoch no image is seen twice
    epochs=1, batch=32,                  # 784 tokens are sixteen times as many as 49
    hidden=153,                          # 86,000 parameters, as all have
)
RECIPES["next-pixel"] = dict(
    dataset="mnist", task="next-pixel",
    model="causal",                      # or s4: both are causal
    seed=0, epochs=1, batch=16,
    lr=6e-3, schedule="cosine", clip=1.0, weight_decay=0.05, average=0.998,
    smoothing=0.0, bf16=False,
    d_model=96,
    layers=2,
    state=80,                            # S4: two blocks have the parameters of one Mamba block
)
RECIPES["cifar10"] = dict(
    RECIPES["mnist"],
    dataset="cifar10",
    stem="deep",                         # photographs need more than "conv" sees: see vision.Stem
    augment="shift-flip",
    smoothing=0.1,
    d_model=128, layers=4,
    hidden=268, state=132,               # 940,000 params
)
RECIPES["poster"] = dict(                # settings of a published poster: see README.md, Results
    RECIPES["mnist"],
    lr=1e-3, schedule="constant",        # neither a warm-up nor a decay: see ROWS for the rates
    weight_decay=0.01,
    average=0.0,
    stem="patch",                        # a linear map of each patch: no token sees its neighbours
    position="none",                     # nothing but the order says where a patch lies
    augment="none",
    hidden=160,
)

# What --compare trains: a name for each row of the table, and what it changes in the recipe. Each
# Mamba of the poster differs from the one above it in one respect: the learning rate (and the
# clipping that goes with it), the number of branches, the direction, and the rate again. To train
# one row alone: --compare --models NAME.
ROWS = {name: {model: {"model": model} for model in ("bidirectional", "causal", "s4", "rnn")}
        for name in RECIPES}
ROWS["next-pixel"] = {model: {"model": model} for model in ("causal", "s4")}
ROWS["poster"] = {
    "rnn": dict(model="rnn", pool="last"),
    "forward-3e-4": dict(model="forward", lr=3e-4, clip=0.5),      # "causal" on the poster
    "forward-1e-3": dict(model="forward"),                         # another rate
    "causal-1e-3": dict(model="causal"),                           # another number of branches
    "bidirectional-1e-3": dict(model="bidirectional"),             # another direction
    "bidirectional-3e-4": dict(model="bidirectional", lr=3e-4, clip=0.5),
}
PUBLISHED = {"rnn": 94.40, "forward-3e-4": 97.00, "bidirectional-1e-3": 97.93}    # %, one run each

# The limits of values: words (those that describe a model, the model checks), and numbers, from
# lowest to highest. All other numbers must be 0 or more.
CHOICES = {"model": MODELS, "schedule": ("cosine", "constant"),
           "augment": ("warp", "shift-flip", "none")}
LIMITS = {"average": (0, 1), "smoothing": (0, 1), "clip": (1e-9, 1e9), **dict.fromkeys(
    ("epochs", "batch", "patch", "d_model", "hidden", "state"), (1, 10 ** 9))}
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}


def build(recipe, data):
    """The model of a recipe, for images like those of the data. Raises ValueError if that can't be.

    Another model is another `if`, a colour in MODELS, and a name in ROWS. Its body is a module that
    reads tokens, (b, l, d_model), and returns (b, l, width). See that it has as many parameters as
    the others, or the comparison says little.
    """
    model, d_model, layers = recipe["model"], recipe["d_model"], recipe["layers"]
    channels, *size = data.train_images.shape[1:]
    if recipe["task"] == "next-pixel":
        if channels > 1:
            raise ValueError("next-pixel needs grey images: it guesses one of 256 values")
        if model not in ("causal", "s4"):
            raise ValueError("next-pixel needs --model causal or s4: the others see the pixel that "
                             "they must guess, or cannot go on from a state")
        blocks = [MambaBlock(d_model) for _ in range(layers)] if model == "causal" else [
            S4Block(d_model, recipe["state"]) for _ in range(2 * layers)]
        return PixelLM(blocks, d_model, size)
    frame = dict(image_size=size, channels=channels, classes=data.classes,
                 **{key: recipe[key] for key in ("patch", "stem", "position", "pool")})
    if model == "rnn":
        return ImageClassifier(RNN(d_model, recipe["hidden"], layers), d_model, recipe["hidden"],
                               **frame)
    if model == "s4":
        return ImageClassifier(S4Stack(d_model, 2 * layers, recipe["state"]), d_model, d_model,
                               **frame)
    return VisionMamba(d_model, layers, direction=model, fuse=recipe["fuse"], **frame)


# --------------------------------------------------------------------------------------------------
# Training: the loop, and what it needs.

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # torchrun
SAVE_EVERY = 500     # steps; besides, at the end of each epoch
STOP = []            # Ctrl-C and SIGTERM append to this list; the loop looks at it after each step


def ask_to_stop(number, _):
    """What a signal calls: it may come in the middle of a step, so it only leaves a note."""
    if STOP:
        raise KeyboardInterrupt          # asked twice: at once
    STOP.append(number)


def seed_for(seed, what, number=0):
    """A seed for one purpose. Hashed, since PyTorch's CPU generator reads 32 bits of a seed."""
    text = f"{seed} {what} {number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def learning_rate(recipe, step, steps):
    """"cosine": a line from 0 to lr over the first tenth of the steps, then a cosine to 0."""
    if recipe["schedule"] == "constant":
        return recipe["lr"]
    assert recipe["schedule"] == "cosine"
    part = (step + 1) / steps
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (part - 0.1) / 0.9)))
    return recipe["lr"] * min(part / 0.1, fall)


def prepare(recipe, data, images, labels):
    """Images (b, c, h, w) of 0 … 255 and labels (b,) -> a model's inputs and targets."""
    if recipe["task"] == "next-pixel":   # tokens before each pixel, and the pixel: (b, h·w) int64
        pixels = images.flatten(1).long()
        return F.pad(pixels[:, :-1], (1, 0), value=BEGIN), pixels
    return (images.float() / 255 - data.mean) / data.std, labels


def batch(recipe, data, step):
    """Inputs and targets of a step. Each image comes once per epoch, in a new order; a last part of
    the images, too small for a batch, is left out.

    The images depend on (seed, step); the warps on PyTorch's seed, which `train` sets per step.
    """
    size, count = recipe["batch"], len(data.train_images)
    epoch, i = divmod(step, count // size)
    generator = torch.Generator().manual_seed(seed_for(recipe["seed"], "order", epoch))
    index = torch.randperm(count, generator=generator)[i * size:(i + 1) * size]
    index = index.to(data.train_images.device)
    images, augment = data.train_images[index].float(), recipe.get("augment", "none")
    if augment == "warp":
        images = warp(images, degrees=10, scale=0.1, shear=5, shift=2)
    elif augment == "shift-flip":        # mirroring keeps the label of a photo, but not of a digit
        images = shift_and_flip(images)
    return prepare(recipe, data, images, data.train_labels[index])


class Run(NamedTuple):
    """A finished training."""
    average: torch.nn.Module     # the averaged weights
    log: list                    # of each step: loss, fraction right, seconds of training so far
    scores: list                 # of each epoch: nats, percent right of the test images
    parameters: int


def train(recipe, data, device, path, resume):
    """Train one model, saving to path: -> Run.

    Every random draw is a function of (seed, step). So a checkpoint holds no random state, and a
    run that was stopped goes on to the weights that it would have had.
    """
    steps_per_epoch = len(data.train_images) // recipe["batch"]
    steps = recipe["epochs"] * steps_per_epoch
    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    try:
        model = build(recipe, data).to(device)
    except (ValueError, RuntimeError) as error:    # RuntimeError: too large for the memory
        sys.exit(f"train_mnist.py: no such model: {first_line(error)}")
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe["weight_decay"]),
                                  lr=recipe["lr"], betas=(0.9, 0.95))
    modules = {"model": model, "average": average, "optimizer": optimizer}
    step, log, scores = 0, [], []        # see Run
    if resume:
        step, log, scores = load(path, recipe, data, modules)
    else:
        set_aside(path)
    # Saved at once: a folder that cannot be written is noticed now, and not in an hour.
    save(path, recipe, data, modules, step, log, scores)
    net = DistributedDataParallel(model) if PROCESSES > 1 else model
    parameters = sum(p.numel() for p in model.parameters())
    classes = 256 if recipe["task"] == "next-pixel" else data.classes
    print(f"model {recipe['model']} on {summary(data)}\nparameters {parameters}  "
          f"seed {recipe['seed']}  device {describe(device)}  torch {torch.__version__}\n"
          f"loss of a blind guess ln {classes} = {math.log(classes):.4f}\n"
          f"checkpoint {path}, step {step} of {steps}", flush=True)

    for epoch in range(len(scores), recipe["epochs"]):
        while step < (epoch + 1) * steps_per_epoch:
            start = time.perf_counter()

            # This step's learning rate, and its seed: whatever is drawn from here on in this step
            # (warps; a dropout, if you add one) is a function of (seed, step). Under torchrun all
            # processes draw the same, for the whole batch.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, steps)
            torch.manual_seed(seed_for(recipe["seed"], "warp", step))

            # The batch; under torchrun each process takes its share of it.
            inputs, targets = (t.chunk(PROCESSES)[RANK] for t in batch(recipe, data, step))

            # Forward: logits (b, classes); or (b, h·w, 256) of next-pixel, where each pixel of each
            # image is a guess like any other: (b · h·w, 256).
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe["bf16"]):
                logits = net(inputs)
            logits, targets = logits.float().flatten(0, -2), targets.flatten()
            loss = F.cross_entropy(logits, targets, label_smoothing=recipe["smoothing"])

            # Backward. DistributedDataParallel averages the gradients over processes. They are
            # clipped, so that one bad batch cannot throw the weights far.
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])

            # What to log, and whether anybody asked to stop. Under torchrun all of that is averaged
            # over the processes, so that they agree and stop after the same step.
            hits = (logits.detach().argmax(1) == targets).float().mean()
            seen = torch.stack([loss.detach(), hits, torch.full_like(hits, len(STOP))])
            if PROCESSES > 1:
                dist.all_reduce(seen.div_(PROCESSES))
            loss, hits, stopping = seen.tolist()
            if not math.isfinite(loss) or not math.isfinite(norm):
                sys.exit(f"train_mnist.py: loss {loss:.3g}, gradient {norm:.3g} at step {step + 1}"
                         f": not finite. Start again with a smaller --lr")

            # The update; then the average of the weights. Its decay begins at about 1 - 9/step, so
            # it spans the last ninth of the steps; later it spans some 1 / (1 - average) of them.
            optimizer.step()
            decay = min(recipe["average"], (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), model.parameters()):
                    mean.lerp_(weight, 1 - decay)

            # Log, show, save now and then, and stop if asked to.
            before = log[-1][2] if log else 0.0
            log.append((loss, hits, before + time.perf_counter() - start))
            step += 1
            if step % 20 == 0 and sys.stdout.isatty():     # log files stay short
                print("\r" + progress(log, steps, 100), end="  ", flush=True)
            if stopping or step % SAVE_EVERY == 0:
                save(path, recipe, data, modules, step, log, scores)
            if stopping:
                raise KeyboardInterrupt

        # The end of an epoch. The test can take minutes, and be stopped: save before and after.
        save(path, recipe, data, modules, step, log, scores)
        nats, accuracy = evaluate(average, recipe, data)
        scores.append((nats, accuracy))
        save(path, recipe, data, modules, step, log, scores)
        test = f"test {nats:.4f} nats, accuracy {accuracy:.2f} (not augmented)"
        if recipe["task"] == "next-pixel":
            test = f"test {nats:.4f} nats = {nats / math.log(2):.4f} bits per pixel"
        print("\r" if sys.stdout.isatty() else "", f"epoch {epoch + 1}",
              progress(log, steps, steps_per_epoch), test, flush=True)
    return Run(average, log, scores, parameters)


@torch.no_grad()
def evaluate(model, recipe, data):
    """The test images: -> nats (per image, or per pixel), percent right."""
    nats, right, count, size = 0.0, 0, 0, 50 if recipe["task"] == "next-pixel" else 250
    for images, labels in zip(data.test_images.split(size), data.test_labels.split(size)):
        if STOP and PROCESSES == 1:      # several processes stop together, at the next step
            raise KeyboardInterrupt
        inputs, targets = prepare(recipe, data, images, labels)
        logits, targets = model(inputs).flatten(0, -2), targets.flatten()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        right += (logits.argmax(1) == targets).sum().item()
        count += len(targets)
    return nats / count, 100 * right / count


def progress(log, steps, window):
    """One line: how far the training is, and the means over the last `window` steps."""
    part, seconds = log[-window:], log[-1][2]
    loss, right = (sum(row[i] for row in part) / len(part) for i in (0, 1))
    left = seconds / len(log) * (steps - len(log))
    return (f"  step {len(log)}/{steps}  loss {loss:.4f}  accuracy {100 * right:.2f}  "
            f"{seconds:.0f} s, {left:.0f} s left")


def choose_device(name):
    """-> torch.device: the one of that name; for "auto" the GPU if CUDA finds one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda":               # torchrun counts the processes of one machine
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=name)
    except Exception:                    # its kind depends on how torch was built
        sys.exit(f"{Path(sys.argv[0]).name}: there is no device {name} here: use --device cpu")
    return torch.device(name)


def describe(device):
    """What it runs on, in a few words. Seconds mean nothing without it, nor does "bit for bit"."""
    count = torch.get_num_threads()
    name = f"{device.type} {platform.machine()} {count} thread{'s' if count > 1 else ''}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return name + (f", {PROCESSES} processes" if PROCESSES > 1 else "")


# --------------------------------------------------------------------------------------------------
# Files appear whole or not at all: a run that is killed, or a disk that is full, costs no file that
# was there before.

def write(path, make):
    """Call make(a temporary path), then move what it wrote to path. Ends with one line if it can't.

    os.replace is atomic: whoever looks at path sees the old file or the new one.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        make(path + ".part")
        os.replace(path + ".part", path)
    except (OSError, RuntimeError) as error:       # torch.save calls a full disk a RuntimeError
        sys.exit(f"{Path(sys.argv[0]).name}: cannot write {path} ({first_line(error)}): is the "
                 f"disk full, or the folder read-only? What was there before is untouched")


def set_aside(path):
    """Rename what is at path: whoever forgets --resume, or a --name, loses nothing."""
    if RANK == 0 and os.path.exists(path):
        old = next(old for i in itertools.count(1) if not os.path.exists(old := f"{path}.old{i}"))
        try:
            os.replace(path, old)
        except OSError as error:
            sys.exit(f"train_mnist.py: cannot rename {path} ({first_line(error)})")
        print(f"an earlier {path} was there, and is now {old}")


def save(path, recipe, data, modules, step, log, scores):
    """A checkpoint: all that `train` needs to go on, and that others need to rebuild the model."""
    state = {"recipe": recipe, "data": summary(data), "step": step, "log": log, "scores": scores,
             **{name: module.state_dict() for name, module in modules.items()}}
    if RANK == 0:
        write(path, lambda part: torch.save(state, part))


def load(path, recipe, data, modules):
    """Fill the modules from a checkpoint: -> step, log, scores. Ends with one line if it can't."""
    try:
        with zipfile.ZipFile(path) as archive:     # torch.load does not look at the checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)    # runs no code
        # A setting that is newer than the checkpoint is not in it: it had its default then.
        theirs = RECIPES[recipe["recipe"]] | state["recipe"] | {"data": state["data"]}
        ours = recipe | {"data": summary(data)}
        if other := [key for key in ours if theirs.get(key) != ours[key]]:
            raise ValueError(f"made with {other[0]} {theirs.get(other[0])}, not {ours[other[0]]}")
        for name, module in modules.items():
            module.load_state_dict(state[name])
        return state["step"], state["log"], state["scores"]
    except pickle.UnpicklingError:       # torch's own words tell how to run it all the same
        sys.exit(f"train_mnist.py: {path} holds more than numbers, and might run code: delete it")
    except Exception as error:           # no such file, or what zipfile and torch make of damage
        sys.exit(f"train_mnist.py: cannot go on from {path} ({first_line(error)}): start without "
                 f"--resume, or use the settings that made it")


def first_line(error):
    """What went wrong, in one line; the type of the error if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------------
# The images: tensors in memory, and what a model must know of them.

class Data(NamedTuple):
    """A data set. `build` makes a model for it, `prepare` normalises its images by mean and std."""
    name: str                    # what every result carries
    train_images: torch.Tensor   # (N, c, h, w) uint8
    train_labels: torch.Tensor   # (N,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: int
    mean: torch.Tensor           # (c, 1, 1), of all training pixels, as fractions of 255
    std: torch.Tensor


def summary(data):
    """Name and sizes: a checkpoint goes on with data of the same name and sizes only."""
    return f"{data.name}: {len(data.train_images)} training, {len(data.test_images)} test images"


def as_data(name, train_images, train_labels, test_images, test_labels, classes):
    """-> Data, with mean and standard deviation of each channel to four digits, as is the custom.

    Counted by grey value, which takes no float copy of the images. MNIST: 0.1307 and 0.3081.
    """
    values, mean, std = torch.arange(256).double() / 255, [], []
    for channel in train_images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean.append((share * values).sum())
        std.append((share * (values - mean[-1]) ** 2).sum().sqrt().clamp(min=1 / 255))
    mean, std = (torch.stack(t).view(-1, 1, 1).round(decimals=4).float() for t in (mean, std))
    return Data(name, train_images, train_labels, test_images, test_labels, classes, mean, std)


# torchvision verifies what it downloads, but not the files of MNIST that it finds unpacked.
MNIST_MD5 = "3a8942afaa4d4472e73e631e8d5025b7"


def load_data(dataset, source, data_dir, size):
    """A name in TORCHVISION, or a folder -> Data. Ends with one line if that cannot be had.

    source    "auto": MNIST is downloaded if need be, and replaced by synthetic digits if it cannot
              be; "real" and "synthetic" insist
    size      the images of a folder are resized to size × size; 0: as they are
    """
    if source == "synthetic":
        if dataset != "mnist":
            sys.exit(f"train_mnist.py: --data synthetic stands in for mnist alone, not {dataset}")
        return synthetic_digits()
    if dataset not in TORCHVISION:
        return load_folder(dataset, size)
    socket.setdefaulttimeout(10)         # a download that stalls is given up
    try:
        kind, tensors = getattr(torchvision.datasets, TORCHVISION[dataset]), []
        for part in (kind(data_dir, train=True, download=True), kind(data_dir, train=False)):
            images = torch.as_tensor(part.data)    # (N, h, w), or (N, h, w, c)
            images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
            tensors += [images.contiguous(), torch.as_tensor(part.targets)]
            classes = len(part.classes)
        digest = hashlib.md5(b"".join(t.numpy().tobytes() for t in tensors), usedforsecurity=False)
        if dataset == "mnist" and digest.hexdigest() != MNIST_MD5:
            raise ValueError("these are not the published images")
    except Exception as error:           # no network, a broken download, a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        problem = f"cannot read {dataset} from {data_dir}, or download it ({reason})"
        # Damaged files are an accident that should be noticed: nothing stands in for them.
        there = os.path.exists(os.path.join(data_dir, "MNIST", "raw", "train-images-idx3-ubyte"))
        if dataset != "mnist" or source == "real" or there:
            sys.exit(f"train_mnist.py: {problem}: delete what is damaged, and connect to the "
                     f"network, or use --dataset FOLDER (own images), or mnist --data synthetic")
        print(f"{'!' * 100}\n{problem}.\nTraining on SYNTHETIC digits instead: results say nothing "
              f"about MNIST.\n{'!' * 100}", flush=True)
        return synthetic_digits()
    return as_data(dataset, *tensors, classes)


def load_folder(folder, size):
    """FOLDER/train/<class>/* and FOLDER/test/<class>/*, grey or colour -> Data.

    The data set is named after its folder; own-mnist if that is mnist, so that its results do not
    pass for the published one's. CIFAR-10-images, as a copy of CIFAR-10 in JPEG files is usually
    called, is cifar10-jpeg: its results are not quite those of CIFAR-10.
    """
    def read(path):                      # -> (3, h, w) uint8
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                raise ValueError(f"{path} has 16 bits per pixel: convert it to 8")
            image = image.resize((size, size)) if size else image
            tensor = torchvision.transforms.functional.pil_to_tensor(image.convert("RGB"))
        if shapes.setdefault("first", tensor.shape) != tensor.shape:
            raise ValueError(f"{path} has another size than the first image")
        return tensor

    shapes = {}
    try:
        parts = [torchvision.datasets.ImageFolder(os.path.join(folder, part), loader=read)
                 for part in ("train", "test")]
        if parts[0].classes != parts[1].classes or len(parts[0].classes) < 2:
            raise ValueError("train and test need the same classes, two or more")
        x, test_x = (torch.stack([image for image, _ in part]) for part in parts)
    except Exception as error:           # no folder, no image, damaged: what PIL and torch say
        sys.exit(f"train_mnist.py: cannot read images from {folder} ({first_line(error)}). A data "
                 f"set is one of {', '.join(TORCHVISION)}, or a folder that holds train/<class>/* "
                 f"and test/<class>/*, all of one size unless a --size is given")
    if all((images == images[:, :1]).all() for images in (x, test_x)):     # grey, in three channels
        x, test_x = x[:, :1], test_x[:, :1]
    y, test_y = (torch.tensor(part.targets) for part in parts)
    # The files come sorted by class. --limit and --holdout want any part of them mixed.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    name = os.path.basename(os.path.abspath(folder))
    name = "cifar10-jpeg" if name == "CIFAR-10-images" else name
    name = f"own-{name}" if name in (*TORCHVISION, *RECIPES) else name
    return as_data(name, x[order], y[order], test_x, test_y, len(parts[0].classes))


def synthetic_digits(train=20000, test=4000):
    """Digits in the fonts that come with matplotlib, under random warps and noise: -> Data.

    Twenty fonts are too few to learn from. Warps and noise make each example another one, so
    that a model has to find what is common to all sevens, as with handwriting.
    """
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [path for family in ("DejaVu", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10")
             for path in sorted(folder.glob(family + "*.ttf")) if "Display" not in path.name]
    glyphs = torch.zeros(len(fonts), 10, 28, 28)           # white on black, 0 … 1
    for (i, font), digit in itertools.product(enumerate(fonts), range(10)):
        figure = plt.figure(figsize=(0.28, 0.28), dpi=100)                     # 28×28 pixels
        figure.text(0.5, 0.5, str(digit), font=font, fontsize=19, ha="center",
                    va="center_baseline")
        figure.canvas.draw()
        pixels = torch.tensor(memoryview(figure.canvas.buffer_rgba()).tolist())    # (28, 28, 4)
        glyphs[i, digit] = 1 - pixels[..., 0] / 255
        plt.close(figure)
    generator, sets = torch.Generator().manual_seed(0), []
    for count in (train, test):
        font = torch.randint(len(glyphs), (count,), generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
        images = glyphs[font, labels].unsqueeze(1)                             # (count, 1, 28, 28)
        images = warp(images, degrees=15, scale=0.2, shear=10, shift=3, generator=generator)
        images = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        sets += [(255 * images).to(torch.uint8), labels]
    return as_data("synthetic-digits", *sets, 10)


def shrink(data, args):
    """The data set that --holdout, --limit and --quick leave; its name says so.

    With --holdout N the last N training images take the place of the test images: settings that
    were chosen on test images would make the test a part of the training.
    """
    name, x, y, test_x, test_y, *rest = data
    if args.holdout:
        keep = max(len(x) - args.holdout, 0)
        name, test_x, test_y, x, y = f"{name}-holdout", x[keep:], y[keep:], x[:keep], y[:keep]
    if args.limit:
        name, x, y = f"{name}-limit-{args.limit}", x[:args.limit], y[:args.limit]
    if args.quick:                       # a pixel per token takes over ten times as long
        count = 6400 if vars(args).get("patch", 1) > 1 else 640
        name, x, y = f"{name}-quick", x[:count], y[:count]
        test_x, test_y = test_x[:1000 * count // 6400], test_y[:1000 * count // 6400]
    if len(x) < args.batch or len(test_x) == 0:
        sys.exit(f"train_mnist.py: {len(x)} training and {len(test_x)} test images are left, and "
                 f"a batch takes {args.batch}: use a smaller --batch, --limit or --holdout")
    return Data(name, x, y, test_x, test_y, *rest)


# torchvision's transforms draw their parameters once per call: all images of a batch would share
# one warp. These two draw for each image.

def warp(images, degrees, scale, shear, shift, generator=None):
    """Each image (b, c, h, w) rotated, scaled, sheared and shifted by amounts of its own.

    The amounts are uniform up to ± degrees, a fraction, degrees, and pixels. The pixel at p comes
    from rotation · shear · scale · p + shift, in coordinates from -1 to 1.
    """
    b, _, height, width = images.shape

    def draw(limit):
        return limit * (2 * torch.rand(b, generator=generator, device=images.device) - 1)

    angle, skew = draw(math.radians(degrees)), draw(math.tan(math.radians(shear)))
    wide, high = 1 + draw(scale), 1 + draw(scale)
    right, down = draw(2 * shift / width), draw(2 * shift / height)
    cos, sin = torch.cos(angle), torch.sin(angle)
    ratio = height / width               # a step of 1 is half the width, or half the height
    rows = [torch.stack([cos * wide, ratio * (skew * cos - sin) * high, right], -1),
            torch.stack([sin * wide / ratio, (skew * sin + cos) * high, down], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def shift_and_flip(images, padding=2):
    """Each image (b, c, h, w) shifted by up to `padding` pixels, and mirrored or not, by chance.

    Of all windows of the padded image that have its size (a view: nothing is copied), each image
    takes one. Nothing is interpolated.
    """
    b, _, h, w = images.shape
    windows = F.pad(images, (padding,) * 4, mode="reflect").unfold(2, h, 1).unfold(3, w, 1)
    top, left = torch.randint(2 * padding + 1, (2, b), device=images.device)
    images = windows[torch.arange(b, device=images.device), :, top, left]      # (b, c, h, w)
    mirrored = torch.rand(b, 1, 1, 1, device=images.device) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    return images.contiguous(memory_format=torch.channels_last)    # a convolution reads it faster


# --------------------------------------------------------------------------------------------------
# Results: a row per run, a table, figures. A row says which command made it, and on what machine; a
# number in the README comes from such a row.

def changed(recipe):
    """What differs from the recipe of that name, and has no column in a row: "lr=0.001"."""
    defaults, said = RECIPES[recipe["recipe"]], ("recipe", "model", "dataset", "seed")
    return ",".join(f"{key}={value}" for key, value in recipe.items()
                    if key not in said and value != defaults[key])


def result(name, recipe, data, device, run):
    """A finished run's row of that name; printed as a RESULT line, which is easy to find with grep.

    The score is that of the last epoch: to choose the best one would be to choose on test images.
    """
    nats, accuracy = run.scores[-1]
    score = {"test_accuracy": f"{accuracy:.2f}"}
    if recipe["task"] == "next-pixel":
        score = {"test_nats_per_pixel": f"{nats:.4f}",
                 "test_bits_per_pixel": f"{nats / math.log(2):.4f}"}
    row = {"model": name, "dataset": data.name, "seed": recipe["seed"],
           "params": run.parameters, "epochs": recipe["epochs"], **score,
           "seconds": f"{run.log[-1][2]:.0f}",
           "recipe": f"{recipe['recipe']}:{changed(recipe)}".strip(":")}
    print("RESULT " + " ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row | {"device": describe(device), "torch": torch.__version__,
                  "command": "python " + shlex.join(sys.argv)}


def write_rows(path, rows):
    """A CSV file of dictionaries that have the same keys; an earlier one is set aside."""
    def make(part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    set_aside(path)
    write(path, make)


def mean_sd(values, digits):
    """Mean ± standard deviation (n - 1), as text; of a single value, the value."""
    values = torch.tensor(values, dtype=torch.float64)
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def print_table(rows):
    """The README's table: a line per row of the comparison, over its seeds.

    Runs with the same seed see the same images in the same order. So the difference to the line
    above is taken seed by seed: variation that they share cancels.
    """
    score, digits = ("test_bits_per_pixel", 4) if "test_bits_per_pixel" in rows[0] else (
        "test_accuracy", 2)
    print(f"\n| model | parameters | {score.replace('_', ' ')} | change from the line above "
          f"| seconds |\n|---|---|---|---|---|")
    above = []
    for model in dict.fromkeys(row["model"] for row in rows):
        runs = [row for row in rows if row["model"] == model]
        scores = [float(row[score]) for row in runs]
        gained = mean_sd([a - b for a, b in zip(scores, above)], digits) if above else ""
        print(f"| {model} | {runs[0]['params']:,} | {mean_sd(scores, digits)} | {gained} | "
              f"{mean_sd([float(row['seconds']) for row in runs], 0)} |")
        above = scores


def draw_runs(path, runs, recipe, title):
    """Training loss over steps and over seconds, and the test score over epochs.

    runs    {row of ROWS: what `train` returned for each seed}. A line is the mean over seeds, the
            band goes from the lowest to the highest; on the right there is a line per seed
    What to see: over steps all but the RNN lie close together. Over seconds they part, since a step
    of the cheaper ones takes less time.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    axes[1].sharey(axes[0])
    for model in runs:
        color = MODELS[ROWS[recipe["recipe"]][model]["model"]]
        log = torch.stack([torch.tensor(run.log) for run in runs[model]])      # (seeds, steps, 3)
        width = max(1, min(100, log.shape[1] // 10))       # steps that a point is the mean of
        losses = log[..., 0].unfold(1, width, width).mean(-1)                  # (seeds, points)
        steps = width * torch.arange(1, losses.shape[1] + 1)
        for ax, x in zip(axes, (steps, log[:, steps - 1, 2].mean(0))):
            ax.plot(x, losses.mean(0), color=color, label=model)
            ax.fill_between(x, losses.amin(0), losses.amax(0), color=color, alpha=0.2, linewidth=0)
        for run in runs[model]:
            scores = [nats / math.log(2) if recipe["task"] == "next-pixel" else accuracy
                      for nats, accuracy in run.scores]
            axes[2].plot(range(1, len(scores) + 1), scores, "o-", color=color, alpha=0.7)
    # Both axes are logarithmic in the loss, since late in a training the differences are small.
    axes[0].set(xlabel="training step", ylabel="training loss (nats)", yscale="log")
    axes[1].set(xlabel="seconds of training", yscale="log")
    axes[2].set(xlabel="epoch", xticks=range(1, recipe["epochs"] + 1), ylabel="test: " + (
        "bits per pixel" if recipe["task"] == "next-pixel" else "accuracy (%)"))
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{title}: mean, and band from lowest to highest; right, a line per seed",
                    fontsize=10)
    write(path, lambda part: figure.savefig(part, dpi=120, format="png"))


def draw_rows(path, rows, data, title):
    """Test accuracy of each row of the poster, a dot per seed; what was published as a cross.

    What to see: the rate moves the dots of a row by about a point. The number of branches and the
    direction move them no further than the seed does.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, ax = plt.subplots(figsize=(7, 0.5 * len(names) + 1.2), layout="constrained")
    for name in names:
        ours = [float(row["test_accuracy"]) for row in rows if row["model"] == name]
        color = MODELS[ROWS["poster"][name]["model"]]
        ax.plot(ours, [name] * len(ours), "o", color=color, alpha=0.7)
        if name in PUBLISHED and data.name == "mnist":
            ax.plot(PUBLISHED[name], name, "x", color="black", markersize=8)
    ax.plot([], [], "o", color="black", label="ours, a dot per seed")
    ax.plot([], [], "x", color="black", markersize=8, label="published, one run")
    ax.set(xlabel="test accuracy (%)", title=title)
    ax.invert_yaxis()
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    write(path, lambda part: figure.savefig(part, dpi=120, format="png"))


def draw_completions(path, runs, data):
    """Ten test digits, their upper halves, and how each model goes on from there, three times.

    A model that has learned strokes, and not only greys, goes on with the digit that was begun.
    """
    images, (height, width) = data.test_images[:10].flatten(1).long(), data.test_images.shape[2:]
    half = width * (height // 2)
    rows = {"the digit": images, "what is given": images[:, :half]}
    for model, (run, *_) in runs.items():
        for i in range(3):
            drawn = complete(run.average, images[:, :half], height * width, seed=i)
            rows[f"{model} {i + 1}"] = drawn
    figure, axes = plt.subplots(len(rows), len(images), figsize=(10, 0.95 * len(rows) + 0.4),
                                layout="constrained", squeeze=False)
    for row, (name, pixels) in zip(axes, rows.items()):
        shown = F.pad(pixels.float(), (0, height * width - pixels.shape[1]), value=math.nan).cpu()
        for ax, image in zip(row, shown.view(-1, height, width)):
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=255)
            ax.axhline(half // width - 0.5, color="#d62728", linewidth=0.8)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle(f"{data.name}: above the line given, below it drawn pixel by pixel",
                    fontsize=10)
    write(path, lambda part: figure.savefig(part, dpi=100, format="png"))


# --------------------------------------------------------------------------------------------------
# The command line.

def parse(arguments):
    """-> all flags, and the recipe: the one that was named, with what the flags change.

    Each setting of the recipe becomes a flag of the same type, with its value as the default. So
    the flags of one recipe are not those of another: next-pixel has no --stem.
    """
    name = next(iter(RECIPES))
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in RECIPES:
        sys.exit(f"train_mnist.py: there is no recipe {name}, but {', '.join(RECIPES)}")
    p = argparse.ArgumentParser(
        allow_abbrev=False, usage="train_mnist.py [recipe] [--flag value ...]  (--help lists them)",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The flags down to --state are the settings of the recipe {name}. What they mean "
               f"is said beside them, in RECIPES at the top of this file.")
    add = p.add_argument
    settings = {key: value for key, value in RECIPES[name].items() if key != "task"}
    for setting, value in settings.items():
        kind = {"type": type(value), "metavar": type(value).__name__}
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif setting in CHOICES:
            kind = {"choices": CHOICES[setting]}
        add("--" + setting.replace("_", "-"), default=value, help=f"default {value}", **kind)
    add("--compare", action="store_true", help="train each of --models with each of --seeds")
    add("--models", nargs="+", choices=ROWS[name], metavar="MODEL",
        help=f"of --compare; default {' '.join(ROWS[name])}")
    add("--seeds", nargs="+", type=int, help="default 0")
    add("--name", help="what the files of a run or table are called; default: the recipe")
    add("--quick", action="store_true", help="2 epochs of 6,400 images, or 1 of 640 by pixels")
    add("--limit", type=int, default=0, help="train on so many images only; default 0: all")
    add("--holdout", type=int, default=0, help="test on so many training images, held out for "
                                               "choosing settings; default 0: on the test images")
    add("--size", type=int, default=0, help="resize a folder's images to SIZE x SIZE; default 0: "
                                            "as they are")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--data", choices=["auto", "real", "synthetic"], default="auto",
        help="auto: synthetic digits if MNIST cannot be had; default %(default)s")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints; default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    # --quick changes a default, and no more: an --epochs that is given still counts.
    if "--quick" in arguments:
        p.set_defaults(epochs=min(2, RECIPES[name]["epochs"]))
    args = p.parse_args(arguments)
    recipe = {"recipe": name} | RECIPES[name] | {key: getattr(args, key) for key in settings}
    for setting, value in [*vars(args).items(), *(("seeds", seed) for seed in args.seeds or [])]:
        low, high = LIMITS.get(setting, (0, 10 ** 9))
        if isinstance(value, (int, float)) and not low <= value <= high:
            p.error(f"--{setting.replace('_', '-')} must be from {low} to {high}, got {value}")
    single, several = {"--seed", "--model"}, {"--seeds", "--models"}
    if wrong := {a.split("=")[0] for a in arguments} & (single if args.compare else several):
        p.error(f"{' and '.join(sorted(wrong))}: one run takes --seed and --model, and --compare "
                f"takes --seeds and --models")
    if args.compare and not args.name and not args.quick and changed(recipe):
        p.error(f"a table with other settings than those of {name} needs a --name for its files")
    return args, recipe


def main():
    """One run; or, with --compare, one for each model and seed, then their table and figures."""
    args, recipe = parse(sys.argv[1:])
    device = choose_device(args.device)
    if recipe["batch"] % PROCESSES:
        sys.exit(f"train_mnist.py: {PROCESSES} processes cannot share a batch of "
                 f"{recipe['batch']}: use a --batch that {PROCESSES} divides")
    if PROCESSES > 1:                    # the first one prints, downloads and writes files
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            dist.barrier()
    data = load_data(recipe["dataset"], args.data, args.data_dir, args.size)
    if PROCESSES > 1 and RANK == 0:
        dist.barrier()
    data = shrink(data, args)
    data = Data(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in data))

    # Ctrl-C must not hit between the gradient and the update: the step is done, then all is saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)

    # Files are called after the recipe; what was trained on other data is called after those.
    name, own = recipe["recipe"], RECIPES[recipe["recipe"]]["dataset"]
    if data.name != own:
        name = data.name if name == own else f"{name}-{data.name}"
    name = args.name or name.replace("-", "_")
    seeds, models = [args.seed], {args.model: {}}
    if args.compare:
        every = ROWS[recipe["recipe"]]
        seeds = dict.fromkeys(args.seeds or [0])
        models = {model: every[model] for model in args.models or every}
    rows, runs = [], {}
    for seed, (model, changes) in itertools.product(seeds, models.items()):
        settings = recipe | changes | {"seed": seed}
        path = os.path.join(args.out, f"{name}-{model}-seed{seed}.pt")
        resume = args.resume and (os.path.exists(path) or not args.compare)
        run = train(settings, data, device, path, resume)
        runs.setdefault(model, []).append(run)
        rows.append(result(model, settings, data, device, run))
    if RANK == 0 and args.compare:
        write_rows(f"results/{name}.csv", rows)
        title = f"{data.name}, seeds {', '.join(map(str, seeds))}"
        if recipe["recipe"] == "poster":
            draw_rows(f"figures/{name}.png", rows, data, title)
        else:
            draw_runs(f"figures/{name}.png", runs, recipe, title)
        print_table(rows)
    if RANK == 0 and recipe["task"] == "next-pixel":
        draw_completions(f"figures/{name}_completions.png", runs, data)
    if PROCESSES > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):   # the latter: `| head` has seen enough
        print("\ntrain_mnist.py: stopped; a training goes on with --resume", file=sys.stderr)
        os._exit(130)                    # at once: PyTorch's clean-up takes most of a second
