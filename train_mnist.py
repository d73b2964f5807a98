"""train_mnist.py: several models, one recipe, one table.

    python train_mnist.py                       the bidirectional Vision Mamba on MNIST, 5 epochs:
                                                99.5 %, in about 17 minutes on one core
    python train_mnist.py --model causal        or s4, or rnn
    python train_mnist.py --lr 1e-3             any value of the recipe can be changed
    python train_mnist.py pixels                another recipe: each of the 784 pixels is a token
    python train_mnist.py next-pixel            guess each pixel from those before, and draw digits
    python train_mnist.py cifar10               coloured images
    python train_mnist.py poster --compare      published results, taken apart: results/README.md
    python train_mnist.py --dataset fashion     FashionMNIST
    python train_mnist.py --dataset FOLDER      own images: FOLDER/train/<class>/*, FOLDER/test/…
    python train_mnist.py --quick               a first look in about a minute
    python train_mnist.py --predict FILE …      what the trained model sees in your own pictures
    python train_mnist.py --compare --seeds 0 1 2     every model with every seed: table and figure
    python train_mnist.py --resume              go on after Ctrl-C, on a CPU to the same weights
    torchrun --nproc_per_node=2 train_mnist.py  each of two processes takes half of every batch

All models get the same tokens (from the stem), the same pooling, a linear head, the same number of
parameters to 1 %, the same augmented images, optimizer and schedule. They differ in the body, which
reads the tokens. (In the recipe poster more differs, on purpose.)

Read the recipes first, then `train`, which shows the whole loop; the rest serves these two. What to
edit:
    RECIPES                       to change or add a setting
    TORCHVISION                   for another data set of torchvision
    build                         for another model
    learning_rate and CHOICES     for another schedule
    train                         for another optimizer or loss

Without a network and without files, digits drawn with matplotlib's fonts stand in for MNIST. The
script announces this, and all results carry their name. There are no worker processes: a data set
fits in memory as one tensor, and a batch is an index into it.
Read before: vision.py and rnn.py. Read next: train_shakespeare.py.
"""
import argparse
import copy
import hashlib
import itertools
import math
import os
import platform
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from block import MambaBlock, graphed, parameter_groups
from rnn import RNN, S4Block, S4Stack
from s6 import check_folders, write, write_rows
from vision import BEGIN, GREYS, ImageClassifier, PixelLM, VisionMamba, complete

# The models, and their colours in the figures.
MODELS = {"bidirectional": "#d62728", "causal": "#1f77b4", "s4": "#2ca02c"}
MODELS |= {"rnn": "#7f7f7f", "forward": "#17becf"}
# To add one: its class must take train=True, and have .data, .targets and .classes. CIFAR100 does,
# SVHN does not.
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}


# --------------------------------------------------------------------------------------------------
# The recipes. Each setting but the task is also a flag, and is saved in every checkpoint. The same
# holds for a setting that you add: a number, a string, True or False. (The recipe next-pixel is
# written out in full, so add it there, too.)

RECIPES = {}
RECIPES["mnist"] = dict(                 # chosen on 5,000 training images held out: --holdout 5000
    dataset="mnist",                     # a name in TORCHVISION, or a folder of images
    task="classify",                     # or "next-pixel": see build
    model="bidirectional",               # one of MODELS
    seed=0,                              # of weights, order of the images, and warps
    epochs=5,
    batch=64,
    lr=3e-3,                             # peak
    schedule="cosine",                   # or "constant": see learning_rate
    clip=1.0,                            # longer gradients are scaled down to this norm
    weight_decay=0.05,                   # for matrices alone: see block.parameter_groups
    average=0.998,                       # highest decay of the averaged weights, which are tested;
                                         # 0: no average, the weights themselves are tested
    smoothing=0.0,                       # label smoothing
    augment="warp",                      # or "shift-flip", for photographs, or "none"
    bf16=False,                          # train under autocast; weights, Δ and states stay float32
    patch=4,                             # pixels per side: 28/4 · 28/4 = 49 tokens
    stem="conv",                         # from pixels to tokens: "conv", "deep", "patch"
    position="patches",                  # one vector per token; "axes": per row and column; "none"
    pool="mean",                         # of the tokens; "max"; "last", as in the classic RNN
    n=16,                                # numbers in a state of Mamba, per channel
    discretization="euler",              # of Mamba, as its authors have it; or "zoh": see s6.py
    selection="all",                     # of Mamba; or "BC", or "none": see S6 in s6.py
    fuse="average",                      # of both branches; or "concat"
    d_model=64,                          # width of the residual stream
    layers=2,                            # S4 gets twice as many: its blocks are half as large
    hidden=152,                          # width of the RNN: 96,000 parameters, as all have
    state=92,                            # numbers in a state of S4: the same parameters
)
RECIPES["pixels"] = dict(
    RECIPES["mnist"],
    patch=1, stem="patch",               # a token is a pixel
    position="axes",                     # a vector for each pixel would be 38 % of the model
    augment="none",                      # in one epoch no image is seen twice
    epochs=1, batch=32,                  # 784 tokens are sixteen times as many as 49
    hidden=153,                          # 86,000 parameters, as all have
)
RECIPES["next-pixel"] = dict(
    dataset="mnist", task="next-pixel",
    model="causal",                      # MambaBlocks, one path each; or s4, which is causal, too
    seed=0, epochs=1, batch=16,
    lr=2.4e-2,                           # the best of four with Mamba, on held-out images
    schedule="cosine", clip=1.0, weight_decay=0.05, average=0.998,
    smoothing=0.0, bf16=False,
    n=16, discretization="euler", selection="all",
    oscillate=True,                      # S4; False: its A is real, as Mamba's is
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
    hidden=268, state=132,               # 1,010,000 parameters
)
RECIPES["poster"] = dict(                # settings of a published poster: see results/README.md
    RECIPES["mnist"],
    lr=1e-3, schedule="constant",        # neither a warm-up nor a decay: see ROWS for the rates
    weight_decay=0.01,
    average=0.0,
    stem="patch",                        # a linear map of each patch: no token sees its neighbours
    position="none",                     # nothing but the order says where a patch lies
    augment="none",
    hidden=160,
)

# The rows of the table that --compare makes: a name, and what it changes in the recipe. To train
# one row alone: --compare --models ROW --name FILES. (Without --name its table replaces the whole
# one.) Each Mamba of the poster differs from the one above it in one respect: the learning rate
# (with its clipping), the branches, the direction, the rate again.
ROWS = {}
for name in ("mnist", "pixels", "cifar10"):
    ROWS[name] = {model: {"model": model} for model in ("bidirectional", "causal", "s4", "rnn")}
ROWS["next-pixel"] = {model: {"model": model} for model in ("causal", "s4")}
ROWS["poster"] = {
    "rnn": dict(model="rnn", pool="last"),
    "forward-3e-4": dict(model="forward", lr=3e-4, clip=0.5),      # "causal" on the poster
    "forward-1e-3": dict(model="forward"),                         # another rate
    "causal-1e-3": dict(model="causal"),                           # another number of branches
    "bidirectional-1e-3": dict(model="bidirectional"),             # another direction
    "bidirectional-3e-4": dict(model="bidirectional", lr=3e-4, clip=0.5),
}


# --------------------------------------------------------------------------------------------------
# The models, each with its task.

class Task(NamedTuple):
    """What a model is asked, and how its answers are counted."""
    prepare: Callable            # images (b, c, h, w) of 0 … 255, labels (b,) -> inputs, targets
    score: Callable              # nats, percent right -> {column: text}; the last one is the score
    classes: int                 # how many answers there are to choose from


def classification(data):
    """Tell the class of an image: -> Task."""
    def prepare(images, labels):
        return (images.float() / 255 - data.mean) / data.std, labels

    def score(nats, right):
        return {"test_accuracy": f"{right:.2f}"}

    return Task(prepare, score, len(data.classes))


def next_pixel():
    """Guess each pixel of a grey image from the pixels before it: -> Task."""
    def prepare(images, labels):
        pixels = images.flatten(1).long()                          # (b, h·w)
        before = F.pad(pixels[:, :-1], (1, 0), value=BEGIN)        # (b, h·w)
        return before, pixels

    def score(nats, right):
        bits = nats / math.log(2)
        return {"test_nats_per_pixel": f"{nats:.4f}", "test_bits_per_pixel": f"{bits:.4f}"}

    return Task(prepare, score, GREYS)


def build(recipe, data):
    """The model of a recipe, for images like those of the data, and its Task.

    Another model is another `elif`, a colour in MODELS, and a name in ROWS. Its body is a module
    that reads tokens, (b, l, d_model), and returns (b, l, width). Give it as many parameters as the
    others have, by a width of its own in each of RECIPES, or the comparison says little.
    Raises ValueError for settings or images that do not fit.
    """
    model, d_model, layers = recipe["model"], recipe["d_model"], recipe["layers"]
    channels, *size = data.train_images.shape[1:]
    if recipe["task"] == "next-pixel":
        if channels > 1 or model not in ("causal", "s4"):
            raise ValueError("next-pixel needs grey images, and --model causal or s4: the others "
                             "see the pixel that they must guess, or cannot go on from a state")
        if model == "causal":
            how = {key: recipe[key] for key in ("n", "discretization", "selection")}
            blocks = [MambaBlock(d_model, **how) for _ in range(layers)]
        else:
            blocks = [S4Block(d_model, recipe["state"]) for _ in range(2 * layers)]
            if not recipe["oscillate"]:
                for block in blocks:
                    block.s4.omega.requires_grad_(False).zero_()
        return PixelLM(blocks, d_model, size), next_pixel()

    frame = {key: recipe[key] for key in ("patch", "stem", "position", "pool")}
    frame.update(image_size=size, channels=channels, classes=len(data.classes))
    if model == "rnn":
        body = RNN(d_model, recipe["hidden"], layers)
        classifier = ImageClassifier(body, d_model, recipe["hidden"], **frame)
    elif model == "s4":
        body = S4Stack(d_model, 2 * layers, recipe["state"])
        classifier = ImageClassifier(body, d_model, d_model, **frame)
    else:
        how = {key: recipe[key] for key in ("n", "fuse", "discretization", "selection")}
        classifier = VisionMamba(d_model, layers, direction=model, **how, **frame)
    return classifier, classification(data)


# --------------------------------------------------------------------------------------------------
# Training: the loop, and what it needs.

TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
PROCESSES = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
SAVE_EVERY = 100     # steps; besides, at the end of each epoch


class Run(NamedTuple):
    """A finished training."""
    average: torch.nn.Module     # the averaged weights
    task: Task
    log: list                    # of each step: loss, fraction right, seconds of training so far
    scores: list                 # of each epoch: nats, percent right of the test images


def train(recipe, data, device, path, resume):
    """Train one model, saving to path: -> Run.

    Every random draw is a function of (seed, step). So a checkpoint needs no random state, and a
    training that was killed goes on from the last checkpoint to the weights it would have had.
    """
    steps_per_epoch = len(data.train_images) // recipe["batch"]
    steps = recipe["epochs"] * steps_per_epoch
    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    model, task = build(recipe, data)
    average = copy.deepcopy(model.to(device)).eval().requires_grad_(False)
    groups = parameter_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    # The rule: whatever lives from one step to the next must be in the checkpoint, or a resumed
    # training ends in other weights. These are the modules, and of the past the log, which counts
    # the steps, and the scores.
    modules = {"model": model, "average": average, "optimizer": optimizer}
    facts = {"recipe": recipe, "data": facts_of(data)}
    past = {"log": [], "scores": []}
    if resume:
        past = resume_from(path, facts, past, modules, RECIPES[recipe["recipe"]])
    log, scores = past["log"], past["scores"]
    # The first save comes at once: so a folder that cannot be written is noticed now.
    save_checkpoint(path, facts, past, modules, keep_old=not resume)
    print_opening(recipe, data, model, task, device)
    print(f"checkpoint {path}, step {len(log)} of {steps}", flush=True)
    # cache_enabled=False: a recorded graph must not read casts of weights from an earlier step.
    autocast = torch.autocast(device.type, torch.bfloat16, recipe["bf16"], cache_enabled=False)
    net = model
    if PROCESSES > 1:
        net = DistributedDataParallel(model)
    elif device.type == "cuda":          # or the GPU would mostly wait for Python
        inputs, _ = task.prepare(*batch(recipe, data, 0))
        with autocast:
            net = graphed(model, inputs)

    on_screen = sys.stdout is not None and sys.stdout.isatty()     # log files stay short
    for step in range(len(log), steps):
        start = time.perf_counter()

        # This step's learning rate and seed. Whatever is drawn from here on in this step (warps; a
        # dropout, if you add one) depends on (seed, step) alone, and is the same in all processes.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        torch.manual_seed(seed_for(recipe["seed"], "warp", step))

        # The batch; under torchrun each process takes its share of it.
        share = [t.chunk(PROCESSES)[RANK] for t in batch(recipe, data, step)]
        inputs, targets = task.prepare(*share)

        # Forward: logits (b, classes). Those of next-pixel, (b, h·w, 256), hold a guess for each
        # pixel of each image: (b · h·w, 256).
        with autocast:
            logits = net(inputs)
        logits, targets = logits.float().flatten(0, -2), targets.flatten()
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe["smoothing"])

        # Backward. DistributedDataParallel averages the gradients over the processes. Clipping
        # keeps one bad batch from throwing the weights far.
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        if not math.isfinite(loss.item() + norm.item()):
            raise ValueError(f"not finite at step {step + 1}: start again with a smaller --lr")

        # The update; then the average of the weights. Its decay, about 1 - 9/step, lets it span the
        # last ninth of the steps so far. It may rise to recipe["average"], where it spans the last
        # 1 / (1 - average) steps: with 0.998 after 4,490 steps.
        optimizer.step()
        decay = min(recipe["average"], (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters()):
                mean.lerp_(weight, 1 - decay)

        # The log (under torchrun, of this process's share).
        right = (logits.argmax(1) == targets).float().mean()
        seconds = (log[-1][2] if log else 0.0) + time.perf_counter() - start
        log.append((loss.item(), right.item(), seconds))
        if (step + 1) % 20 == 0 and on_screen:
            print(progress(log, steps, 100), end="\r", flush=True)

        # At the end of an epoch, test the averaged weights. Save then, and every SAVE_EVERY steps.
        epoch_ends = (step + 1) % steps_per_epoch == 0
        if epoch_ends:
            nats, percent = evaluate(average, task, data)
            scores.append((nats, percent))
            print(f"  epoch {len(scores)}{progress(log, steps, steps_per_epoch)}  test "
                  f"{nats:.4f} nats, {percent:.2f} % right", flush=True)
        if epoch_ends or (step + 1) % SAVE_EVERY == 0:
            save_checkpoint(path, facts, past, modules)
    return Run(average, task, log, scores)


def batch(recipe, data, step):
    """Images (b, c, h, w) of 0 … 255, augmented, and labels (b,) of a step.

    Each image comes once per epoch, in a new order; a last part of them, too small for a batch, is
    left out. The choice depends on (seed, step), and the warps on PyTorch's seed, set by `train`.
    """
    size, count = recipe["batch"], len(data.train_images)
    epoch, i = divmod(step, count // size)
    generator = torch.Generator().manual_seed(seed_for(recipe["seed"], "order", epoch))
    order = torch.randperm(count, generator=generator)
    index = order[i * size:(i + 1) * size].to(data.train_images.device)
    images, labels = data.train_images[index].float(), data.train_labels[index]

    augment = recipe.get("augment", "none")
    if augment == "warp":
        images = warp(images, degrees=10, scale=0.1, shear=5, shift=2)
    elif augment == "shift-flip":        # mirroring keeps the label of a photo, but not of a digit
        images = shift_and_flip(images)
    return images, labels


def seed_for(seed, what, number=0):
    """A seed for one purpose. Hashed, since PyTorch's CPU generator reads 32 bits of a seed."""
    text = f"{seed} {what} {number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def learning_rate(recipe, step, steps):
    """"cosine": a line from 0 to lr over the first tenth of the steps, then a cosine to 0.

    A recipe without a schedule, as that of train_shakespeare.py, takes it, too.
    """
    if recipe.get("schedule") == "constant":
        return recipe["lr"]
    part = (step + 1) / steps
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (part - 0.1) / 0.9)))
    return recipe["lr"] * min(part / 0.1, fall)


@torch.no_grad()
def evaluate(model, task, data, size=125):
    """All test images, `size` at a time: -> nats (per image, or per pixel), percent right."""
    nats, right, count = 0.0, 0, 0
    for images, labels in zip(data.test_images.split(size), data.test_labels.split(size)):
        inputs, targets = task.prepare(images, labels)
        logits, targets = model(inputs).flatten(0, -2), targets.flatten()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        right += (logits.argmax(1) == targets).sum().item()
        count += len(targets)
    return nats / count, 100 * right / count


# --------------------------------------------------------------------------------------------------
# What is printed while a training runs.

def print_opening(recipe, data, model, task, device):
    """What is trained, on what, and the loss to begin with."""
    train, test = len(data.train_images), len(data.test_images)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model {recipe['model']} on {data.name}: {train} training, {test} test images")
    print(f"parameters {parameters}  seed {recipe['seed']}")
    print(f"device {describe(device)}, torch {torch.__version__}")
    print(f"loss of a blind guess ln {task.classes} = {math.log(task.classes):.4f}")


def progress(log, steps, window):
    """One line: how far the training is, and the means over the last `window` steps."""
    losses, hits, _ = zip(*log[-window:])
    loss, percent = sum(losses) / len(losses), 100 * sum(hits) / len(hits)
    seconds = log[-1][2]
    left = seconds / len(log) * (steps - len(log))
    return (f"  step {len(log)}/{steps}  loss {loss:.4f}  accuracy {percent:.2f}  "
            f"{seconds:.0f} s, {left:.0f} s left")


def choose_device(name):
    """-> torch.device: the one of that name; for "auto" the GPU if CUDA finds one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda":               # under torchrun, each process has a GPU of its own
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:        # it depends on how torch was built
        raise ValueError(f"there is no device {name} here: use --device cpu") from error
    return torch.device(name)


def describe(device):
    """The device, threads and processes, as text: timings and exact bits depend on them."""
    name = f"{device.type} {platform.machine()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, threads {torch.get_num_threads()}, processes {PROCESSES}"


# --------------------------------------------------------------------------------------------------
# Checkpoints.

def save_checkpoint(path, facts, past, modules, keep_old=False):
    """All that `train` needs to go on, and that others need to rebuild the model and use it.

    Raises ValueError if the file at path is by another training: two would overwrite each other.
    """
    if RANK > 0:
        return
    if not keep_old and os.path.exists(path):
        earlier = read_checkpoint(path)["log"]         # of this training: the beginning of its log
        if earlier != past["log"][:len(earlier)]:
            raise ValueError(f"{path} is by another training now: give each a --name of its own")
    checkpoint = facts | past
    for name, module in modules.items():
        checkpoint[name] = module.state_dict()
    write(path, lambda file: torch.save(checkpoint, file), keep_old)


def resume_from(path, facts, past, modules, defaults):
    """Fill the modules from a checkpoint: -> what it has of the entries of past.

    defaults    of the settings: a checkpoint from before a setting was added counts as made with
                its default
    Raises ValueError if the checkpoint has other settings, data or modules.
    """
    checkpoint = read_checkpoint(path)
    ours, theirs = dict(facts["recipe"]), defaults | checkpoint.get("recipe", {})
    # The data must be the same, wherever they are.
    ours["dataset"] = facts["data"]["fingerprint"]
    theirs["dataset"] = checkpoint.get("data", {}).get("fingerprint")
    for setting, value in ours.items():
        if theirs.get(setting) != value:
            raise ValueError(f"{path} was made with {setting} {theirs.get(setting)}, not {value}. "
                             f"Use that, or start without --resume")
    try:
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} has another model or optimizer: start without "
                         f"--resume") from error
    return {key: checkpoint[key] for key in past}


def read_checkpoint(path):
    """A checkpoint, on the CPU. weights_only: nothing that is in the file is run as code."""
    with open(path, "rb") as file:
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:       # torch has many kinds for a damaged file
            raise ValueError(f"{path} is damaged, or no checkpoint, or might run code") from error


def first_line(error):
    """What went wrong, in one line; the type of the error if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --------------------------------------------------------------------------------------------------
# The images: tensors in memory, and what a model must know of them.

class Data(NamedTuple):
    """A data set. `build` makes a model for it, which sees images normalised by mean and std."""
    name: str                    # what every result carries
    train_images: torch.Tensor   # (N, c, h, w) uint8
    train_labels: torch.Tensor   # (N,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list                # names: label i means classes[i]
    mean: torch.Tensor           # (c, 1, 1), of all training pixels, as fractions of 255
    std: torch.Tensor


def facts_of(data):
    """What a checkpoint says of its images, so that the model can be used without them.

    The fingerprint depends on pixels, labels and class names, not on where the files are.
    """
    digest = hashlib.sha256(repr(data.classes).encode())
    for tensor in (*data[1:5], data.mean, data.std):
        digest.update(tensor.cpu().contiguous().numpy())
    shape = list(data.train_images.shape[1:])
    return {"name": data.name, "classes": data.classes, "shape": shape, "mean": data.mean.cpu(),
            "std": data.std.cpu(), "fingerprint": f"{shape} {digest.hexdigest()[:16]}"}


def as_data(name, train_images, train_labels, test_images, test_labels, classes):
    """-> Data, with mean and standard deviation of each channel to four digits, as is the custom.

    Counted by grey value, which takes no float copy of the images. MNIST: 0.1307 and 0.3081.
    """
    counts = [channel.flatten().bincount(minlength=256) for channel in train_images.unbind(1)]
    share = torch.stack(counts).double()                           # (c, 256)
    share /= share.sum(1, keepdim=True)
    values = torch.arange(256).double() / 255
    mean = share @ values                                          # (c,)
    # At least 1/255: images of one grey have no deviation, and would be divided by 0.
    std = (share @ values ** 2 - mean ** 2).clamp(min=1 / 255 ** 2).sqrt()
    mean, std = (t.round(decimals=4).float().view(-1, 1, 1) for t in (mean, std))
    return Data(name, train_images, train_labels, test_images, test_labels, classes, mean, std)


def load_data(dataset, source, data_dir, size):
    """A name in TORCHVISION, or a folder -> Data. Raises ValueError if that cannot be had.

    source    "auto": MNIST is downloaded if need be, and replaced by synthetic digits if it cannot
              be; "real" and "synthetic" insist
    size      the images of a folder are resized to size × size; 0: as they are
    """
    if source == "synthetic" and dataset != "mnist":
        raise ValueError(f"--data synthetic stands in for mnist alone, not {dataset}")
    if source == "synthetic":
        return synthetic_digits()
    if dataset not in TORCHVISION:
        return load_folder(dataset, size)
    try:
        return load_torchvision(dataset, data_dir)
    except Exception as error:           # no network, a broken download, a damaged file
        *_, reason = str(error).strip().split("\n")                # torchvision says it last
        problem = f"cannot read {dataset} from {data_dir}, or download it ({reason})"
        # Damaged files are an accident that should be noticed: nothing stands in for them.
        there = Path(data_dir, "MNIST", "raw", "train-images-idx3-ubyte").exists()
        if dataset != "mnist" or source == "real" or there:
            raise ValueError(f"{problem}. Delete what is damaged and connect to the network, or "
                             f"use --dataset FOLDER or --data synthetic") from error
    print("!" * 100)
    print(f"{problem}.\nTraining on SYNTHETIC digits: results say nothing about MNIST.")
    print("!" * 100, flush=True)
    return synthetic_digits()


def load_torchvision(dataset, data_dir):
    """A data set of torchvision, downloaded if need be: -> Data."""
    socket.setdefaulttimeout(10)         # a download that stalls is given up
    kind = getattr(torchvision.datasets, TORCHVISION[dataset])
    tensors = []
    for part in (kind(data_dir, train=True, download=True), kind(data_dir, train=False)):
        images = torch.as_tensor(part.data)
        if images.ndim == 3:                                       # (N, h, w)
            images = images.unsqueeze(1)                           # (N, 1, h, w)
        else:                                                      # (N, h, w, c)
            images = images.permute(0, 3, 1, 2).contiguous()       # (N, c, h, w)
        tensors += [images, torch.as_tensor(part.targets)]
    return as_data(dataset, *tensors, list(part.classes))


def load_folder(folder, size):
    """FOLDER/train/<class>/* and FOLDER/test/<class>/*, grey or colour -> Data."""
    for part in ("train", "test"):
        if not os.path.isdir(f"{folder}/{part}"):
            raise ValueError(f"there is no folder {folder}/{part}, and {folder} is none of "
                             f"{', '.join(TORCHVISION)}")
    classes, train, y = list_images(f"{folder}/train")
    test_classes, test, test_y = list_images(f"{folder}/test")
    if classes != test_classes:
        only = ", ".join(sorted({*classes} ^ {*test_classes}))
        raise ValueError(f"{folder}: train and test need the same classes, but one has no {only}")
    if len(classes) < 2:
        raise ValueError(f"{folder}/train needs two folders of images, one for each class")

    images = []
    for path in train + test:
        images.append(read_image(path, size and (size, size)))
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{path} has another size than the first image: use --size")
    images = torch.stack(images)                                   # (N, 3, h, w)
    if (images == images[:, :1]).all():                            # grey, in three channels
        images = images[:, :1]
    x, test_x = images.split([len(train), len(test)])

    # The files come sorted by class. --limit and --holdout take a part, and all classes should be
    # in it.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return as_data(data_name(folder), x[order], y[order], test_x, test_y, classes)


def data_name(dataset):
    """What the results of a data set carry: a name in TORCHVISION, or that of a folder.

    A folder called mnist becomes own-mnist, so that its results do not pass for the published
    one's. CIFAR-10-images, as a copy of CIFAR-10 in JPEG files is usually called, is cifar10-jpeg:
    its results are not quite those of CIFAR-10.
    """
    if dataset in TORCHVISION:
        return dataset
    name = os.path.basename(os.path.abspath(dataset))
    if name == "CIFAR-10-images":
        return "cifar10-jpeg"
    if name.lower().startswith((*TORCHVISION, *RECIPES, "synthetic-digits")):
        return f"own-{name}"
    return name


def list_images(folder):
    """The images in folder/<class>/*: -> names of the classes, paths, labels (N,), sorted.

    Files without the suffix of an image are skipped; so are GIFs. Raises ValueError for a class
    without images.
    """
    classes = sorted(path.name for path in Path(folder).iterdir()
                     if path.is_dir() and not path.name.startswith("."))
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = images_in(f"{folder}/{name}")
        paths += found
        labels += [label] * len(found)
    return classes, paths, torch.tensor(labels)


def images_in(folder):
    """The paths of all images in a folder and in its folders, sorted.

    Raises ValueError if there are none. What begins with a dot is skipped.
    """
    paths = []
    for path in sorted(Path(folder).rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMG_EXTENSIONS and not hidden:
            paths.append(path)
    if not paths:
        raise ValueError(f"there is no image in {folder}")
    return paths


def read_image(path, size=None, mode="RGB"):
    """The image at path: upright, 8 bits, white where it is transparent: -> (c, h, w) uint8.

    size    (height, width) to bring it to, or None
    mode    "RGB", or "L" for grey
    Raises ValueError, naming the file, for a damaged one and for more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits per pixel: convert it to 8")
            image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = image.convert(mode)  # first: a one-bit image is resized without smoothing
            if size:
                image = image.resize(size[::-1])
            return pil_to_tensor(image)
    except Exception as error:           # PIL has many kinds for a damaged file
        raise ValueError(f"cannot read {path} ({first_line(error)})") from error


def synthetic_digits(train=20000, test=4000):
    """Digits in the fonts that come with matplotlib, under random warps and noise: -> Data.

    Twenty fonts are too few to learn from. Warps and noise make each example another one, so
    that a model has to find what is common to all sevens, as with handwriting.
    """
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = []
    for family in ("DejaVu", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10"):
        for path in sorted(folder.glob(family + "*.ttf")):
            if "Display" not in path.name:
                fonts.append(ImageFont.truetype(str(path), size=26))

    glyphs = torch.zeros(len(fonts), 10, 28, 28)                   # white on black, 0 … 1
    for i, font in enumerate(fonts):
        for digit in range(10):
            image = Image.new("L", (28, 28))
            pen = ImageDraw.Draw(image)
            pen.text((14, 14), str(digit), fill=255, font=font, anchor="mm")
            glyphs[i, digit] = pil_to_tensor(image) / 255

    generator, tensors = torch.Generator().manual_seed(0), []
    for count in (train, test):
        font = torch.randint(len(glyphs), (count,), generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
        images = glyphs[font, labels].unsqueeze(1)                 # (count, 1, 28, 28)
        images = warp(images, degrees=15, scale=0.2, shear=10, shift=3, generator=generator)
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        images = (255 * images.clamp(0, 1)).to(torch.uint8)
        tensors += [images, labels]
    return as_data("synthetic-digits", *tensors, list("0123456789"))


def shrink(data, args):
    """The data set that --holdout, --limit and --quick leave; its name says so.

    With --holdout N the last N training images take the place of the test images: settings that
    were chosen on test images would make the test a part of the training.
    """
    name, x, y, test_x, test_y, *rest = data
    if args.holdout:
        name += "-holdout"
        keep = max(len(x) - args.holdout, 0)
        x, test_x = x[:keep], x[keep:]
        y, test_y = y[:keep], y[keep:]
    if args.limit:
        name += f"-limit-{args.limit}"
        x, y = x[:args.limit], y[:args.limit]
    if args.quick:                       # a pixel per token takes ten times as long
        name += "-quick"
        by_pixels = vars(args).get("patch", 1) == 1
        count, test_count = (640, 100) if by_pixels else (6400, 1000)
        x, y = x[:count], y[:count]
        test_x, test_y = test_x[:test_count], test_y[:test_count]
    if len(x) < args.batch or len(test_x) == 0:
        raise ValueError(f"{len(x)} training and {len(test_x)} test images are left, and a batch "
                         f"takes {args.batch}")
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

    Each image is padded, and a random window of the original size is cut out. `unfold` shows all
    windows as a view, without a copy. Nothing is interpolated.
    """
    b, _, h, w = images.shape
    windows = F.pad(images, (padding,) * 4, mode="reflect").unfold(2, h, 1).unfold(3, w, 1)
    top, left = torch.randint(2 * padding + 1, (2, b), device=images.device)
    images = windows[torch.arange(b, device=images.device), :, top, left]      # (b, c, h, w)
    mirrored = torch.rand(b, 1, 1, 1, device=images.device) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    return images.contiguous(memory_format=torch.channels_last)    # a convolution reads it faster


# --------------------------------------------------------------------------------------------------
# Results: a row per run, a table, a figure. A row says which command made it, and on what machine;
# a number in README.md or results/README.md comes from such a row.

def changed(recipe):
    """What differs from the recipe of that name: "lr=0.001,epochs=3". Not model, dataset, seed."""
    columns, same = ("recipe", "model", "dataset", "seed"), RECIPES[recipe["recipe"]]
    return ",".join(f"{key}={value}" for key, value in recipe.items()
                    if key not in columns and value != same[key])


def result(name, recipe, data, device, trained):
    """The row of a finished run, called name.

    The score is that of the last epoch: to choose the best one would be to choose on test images.
    """
    return finished({
        "model": name,
        "dataset": data.name,
        "seed": recipe["seed"],
        "params": sum(p.numel() for p in trained.average.parameters()),
        "epochs": recipe["epochs"],
        **trained.task.score(*trained.scores[-1]),
        "seconds": f"{trained.log[-1][2]:.0f}",
        "recipe": f"{recipe['recipe']}:{changed(recipe)}".strip(":"),
    }, device)


def finished(row, device):
    """Print a row as a RESULT line, which is easy to find with grep: -> it, and how it was made."""
    print("RESULT", *(f"{column}={value}" for column, value in row.items()), flush=True)
    command = "python " + shlex.join(sys.argv)
    return row | {"device": describe(device), "torch": torch.__version__, "command": command}


def mean_sd(values, digits):
    """Mean ± standard deviation (n - 1), as text; of a single value, the value."""
    values = torch.tensor(values, dtype=torch.float64)
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std():.{digits}f}"
    return text


def print_table(rows):
    """The table of results/README.md: a line per row of the comparison, over its seeds.

    Runs with the same seed see the same images in the same order. So the difference to the line
    above is taken seed by seed: variation that they share cancels.
    """
    column = [column for column in rows[0] if column.startswith("test_")][-1]
    digits = 2 if column == "test_accuracy" else 4
    print(f"\n| model | parameters | {column.replace('_', ' ')} | change from the line above "
          f"| seconds |\n|---|---|---|---|---|")
    above = None
    for model in dict.fromkeys(row["model"] for row in rows):
        runs = [row for row in rows if row["model"] == model]
        scores = [float(row[column]) for row in runs]
        seconds = mean_sd([float(row["seconds"]) for row in runs], 0)
        gained = ""
        if above is not None:
            gained = mean_sd([a - b for a, b in zip(scores, above)], digits)
        score, parameters = mean_sd(scores, digits), runs[0]["params"]
        print(f"| {model} | {parameters:,} | {score} | {gained} | {seconds} |")
        above = scores
    sizes = [row["params"] for row in rows]
    if max(sizes) > 1.02 * min(sizes):
        print("These models differ by more than 2 % in size, and so the comparison says less.")


def draw_runs(path, runs, title):
    """Training loss over steps and over seconds, and the test score over epochs.

    runs    {row of the table: what `train` returned for each seed}. A line is the mean over seeds,
            the band goes from the lowest to the highest; on the right there is a line per seed
    What to see: over steps all but the RNN lie close together. Over seconds they part, since a step
    of the cheaper ones takes less time.
    """
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    for i, (row, its_runs) in enumerate(runs.items()):
        color = MODELS.get(row, f"C{i}")
        log = torch.stack([torch.tensor(run.log) for run in its_runs])         # (seeds, steps, 3)
        width = max(1, min(100, log.shape[1] // 10))       # steps that a point is the mean of
        losses = log[..., 0].unfold(1, width, width).mean(-1)                  # (seeds, points)
        steps = width * torch.arange(1, losses.shape[1] + 1)
        seconds = log[:, steps - 1, 2].mean(0)
        for ax, x in zip(axes, (steps, seconds)):
            ax.plot(x, losses.mean(0), color=color, label=row)
            ax.fill_between(x, losses.amin(0), losses.amax(0), color=color, alpha=0.2, linewidth=0)
        for run in its_runs:
            columns = [run.task.score(*score) for score in run.scores]
            *_, unit = columns[0]
            scores = [float(column[unit]) for column in columns]
            epochs = range(1, len(scores) + 1)
            axes[2].plot(epochs, scores, "o-", color=color, alpha=0.7)

    # Both axes are logarithmic in the loss, since late in a training the differences are small.
    axes[0].set(xlabel="training step", ylabel="training loss (nats)", yscale="log")
    axes[1].set(xlabel="seconds of training", yscale="log")
    ticks = range(1, len(epochs) + 1, 1 + len(epochs) // 11)
    axes[2].set(xlabel="epoch", xticks=ticks, ylabel=unit.replace("_", " "))
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{title}: mean, and band from lowest to highest; right, a line per seed",
                    fontsize=10, parse_math=False)     # a name of the user's may have a $
    write(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def draw_completions(path, runs, data):
    """Ten test digits, their upper halves, and how each model goes on from there, three times.

    A model that has learned strokes, and not only greys, goes on with the digit that was begun.
    """
    height, width = data.test_images.shape[2:]
    half = width * (height // 2)
    images = data.test_images[:10].flatten(1).long()
    rows = {"the digit": images, "what is given": images[:, :half]}
    for model, (run, *_) in runs.items():
        for seed in range(3):
            drawn = complete(run.average, images[:, :half], height * width, seed)
            rows[f"{model} {seed + 1}"] = drawn

    figure = Figure(figsize=(10, 0.95 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (name, pixels) in zip(axes, rows.items()):
        missing = height * width - pixels.shape[1]
        shown = F.pad(pixels.float(), (0, missing), value=math.nan).cpu()
        for ax, image in zip(row, shown.view(-1, height, width)):
            ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
            ax.axhline(half // width - 0.5, color="#d62728", linewidth=0.8)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle(f"{data.name}: above the line given, below it drawn pixel by pixel",
                    fontsize=10, parse_math=False)
    write(path, lambda file: figure.savefig(file, dpi=100, format="png"))


# --------------------------------------------------------------------------------------------------
# The command line.

def between(kind, low, high=math.inf):
    """A type for argparse: a number of that kind, from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:     # also if it is nan
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    return number


# The type of a setting says what it may be; for some, more is known.
KINDS = {int: between(int, 1), float: between(float, 0), str: str}
whole, fraction = between(int, 0, 2 ** 63 - 1), between(float, 0, 1)   # PyTorch's largest integer
KINDS |= {"seed": whole, "layers": whole}
KINDS |= {"average": fraction, "smoothing": fraction, "forget": fraction}
CHOICES = {"model": MODELS, "schedule": ["cosine", "constant"],
           "augment": ["warp", "shift-flip", "none"]}


def parse(arguments):
    """-> all flags, and the recipe: the one that was named, with what the flags change.

    Each setting of the recipe becomes a flag of the same type, with its value as the default. So
    the flags of one recipe are not those of another: next-pixel has no --stem.
    """
    name = "mnist"
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in RECIPES:
        sys.exit(f"train_mnist.py: there is no recipe {name}, but {', '.join(RECIPES)}")
    p = argparse.ArgumentParser(
        usage="train_mnist.py [recipe] [--flag value ...]  (--help lists them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"RECIPES, at the top of this file, explains the settings of {name}.",
        allow_abbrev=False,
    )
    add = p.add_argument
    settings = {key: value for key, value in RECIPES[name].items() if key != "task"}
    for setting, value in settings.items():
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif setting in CHOICES:
            kind = {"choices": CHOICES[setting]}
        else:
            kind = {"type": KINDS.get(setting, KINDS[type(value)]), "metavar": "VALUE"}
        add("--" + setting.replace("_", "-"), default=value, help=f"default {value}", **kind)
    add("--compare", action="store_true", help="train each of --models with each of --seeds")
    add("--models", nargs="+", choices=ROWS[name], metavar="MODEL",
        help=f"with --compare: which rows; default {' '.join(ROWS[name])}")
    add("--seeds", nargs="+", type=whole, help="with --compare: which seeds; default 0")
    add("--name", help="what files are called; default: the recipe")
    add("--quick", action="store_true", help="2 epochs of 6,400 images; 1 of 640 by pixels")
    add("--limit", type=whole, default=0, help="train on so many images only; 0: all")
    add("--holdout", type=whole, default=0,
        help="test on so many training images; 0: on the test images")
    add("--size", type=whole, default=0, help="resize a folder's images to SIZE x SIZE")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--predict", nargs="+", metavar="FILE", help="tell the classes of pictures, or of a "
        "folder of pictures, by the trained model; they are stretched to its size")
    add("--checkpoint", help="with --predict: by which model; default: that of --name, "
        "--model and --seed")
    add("--invert", action="store_true", help="with --predict: exchange dark and light. MNIST is "
        "light ink on black: dark ink on light paper needs this")
    add("--data", choices=["auto", "real", "synthetic"], default="auto",
        help="default auto: synthetic digits if MNIST cannot be had")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints; default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    if "--quick" in arguments:           # another default: an --epochs that is given still counts
        p.set_defaults(epochs=min(2, settings["epochs"]))
    args = p.parse_args(arguments)

    recipe = {"recipe": name} | RECIPES[name] | {key: getattr(args, key) for key in settings}
    given = {argument.split("=")[0] for argument in arguments}
    if args.compare and given & {"--seed", "--model"}:
        p.error("--compare takes --seeds and --models, not --seed and --model")
    if not args.compare and given & {"--seeds", "--models"}:
        p.error("--seeds and --models are for --compare: one run takes --seed and --model")
    if (args.checkpoint or args.invert) and not args.predict:
        p.error("--checkpoint and --invert are for --predict; --resume takes the file of --out and "
                "--name")
    if args.compare and not args.name and not args.quick and changed(recipe):
        p.error(f"a table with other settings than those of {name} needs a --name for its files")
    return args, recipe


def file_name(recipe, data):
    """What files are called: after the recipe, and after the data if they are not its own."""
    own = RECIPES[recipe]["dataset"]
    if data == own:
        name = recipe
    elif recipe == own:
        name = data
    else:
        name = f"{recipe}-{data}"
    return name.replace("-", "_")


def find_checkpoint(args, recipe):
    """The checkpoint that --predict uses: of a full training if there is one."""
    data = data_name(recipe["dataset"])
    names = [args.name or file_name(recipe["recipe"], name)
             for name in (data, "synthetic-digits", f"{data}-quick", "synthetic-digits-quick")]
    paths = [f"{args.out}/{name}-{recipe['model']}-seed{recipe['seed']}.pt" for name in names]
    for path in paths:
        if os.path.exists(path):
            return path
    raise ValueError(f"there is no {paths[0]}: train a model, or name one by --checkpoint")


@torch.no_grad()
def predict(paths, checkpoint_path, invert):
    """Print what a trained model sees in pictures: a line for each, the likeliest classes first.

    A checkpoint holds all that the model needs: recipe, class names, shape, mean and deviation.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    if "data" not in checkpoint or checkpoint["recipe"].get("task") != "classify":
        raise ValueError(f"{checkpoint_path} holds no model that tells classes apart")
    recipe = RECIPES.get(checkpoint["recipe"]["recipe"], {}) | checkpoint["recipe"]
    facts = checkpoint["data"]
    none = torch.empty(0, *facts["shape"])
    data = Data(facts["name"], none, none, none, none, facts["classes"], facts["mean"],
                facts["std"])
    model, task = build(recipe, data)
    try:
        model.eval().load_state_dict(checkpoint["average"])
    except RuntimeError as error:
        raise ValueError(f"{checkpoint_path} is by another version of this code") from error

    files = []
    for path in paths:
        files += images_in(path) if os.path.isdir(path) else [path]
    channels, *size = facts["shape"]
    for file in files:
        image = read_image(file, size, "L" if channels == 1 else "RGB")        # (c, h, w)
        if invert:
            image = 255 - image
        inputs, _ = task.prepare(image.unsqueeze(0), None)
        chances = model(inputs).softmax(-1)[0]                                 # (classes,)
        guesses = []
        for i in chances.argsort(descending=True)[:3].tolist():
            guesses.append(f"{data.classes[i]} {100 * chances[i]:.1f} %")
        print(f"{file}: {', '.join(guesses)}")


def prepare_data(args, recipe, device):
    """The data set, on the device. Under torchrun the first process prints and writes files."""
    if recipe["batch"] % PROCESSES:
        raise ValueError(f"use a --batch that {PROCESSES} processes can share")
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:                         # wait until the first process has downloaded the data
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        dist.barrier()
    data = load_data(recipe["dataset"], args.data, args.data_dir, args.size)
    if PROCESSES > 1 and RANK == 0:
        dist.barrier()
    data = shrink(data, args)
    moved = {}
    for field, value in data._asdict().items():
        if isinstance(value, torch.Tensor):
            moved[field] = value.to(device)
    return data._replace(**moved)


def run(args, recipe):
    """One training; or, with --compare, one for each row and seed, then their table and figure."""
    if args.predict:
        path = args.checkpoint or find_checkpoint(args, recipe)
        print(f"by {path}", file=sys.stderr)
        predict(args.predict, path, args.invert)
        return
    if args.compare or recipe["task"] == "next-pixel":
        check_folders("results", "figures")
    device = choose_device(args.device)
    data = prepare_data(args, recipe, device)
    name = args.name or file_name(recipe["recipe"], data.name)

    seeds, models = [recipe["seed"]], {recipe["model"]: {}}
    if args.compare:
        every = ROWS[recipe["recipe"]]
        seeds = list(dict.fromkeys(args.seeds or [0]))
        models = {model: every[model] for model in args.models or every}

    # A model that cannot be built is noticed now, and not after the trainings of others.
    for changes in models.values():
        build(recipe | changes, data)

    rows, runs = [], {model: [] for model in models}
    for seed, model in itertools.product(seeds, models):
        settings = recipe | models[model] | {"seed": seed}
        path = os.path.join(args.out, f"{name}-{model}-seed{seed}.pt")
        resume = args.resume and (os.path.exists(path) or not args.compare)
        trained = train(settings, data, device, path, resume)
        runs[model].append(trained)
        rows.append(result(model, settings, data, device, trained))

    if RANK == 0 and args.compare:
        write_rows(f"results/{name}.csv", rows)
        title = f"{data.name}, seeds {', '.join(map(str, seeds))}"
        draw_runs(f"figures/{name}.png", runs, title)
        print_table(rows)
    if RANK == 0 and recipe["task"] == "next-pixel":
        draw_completions(f"figures/{name}_completions.png", runs, data)
    if PROCESSES > 1:
        dist.destroy_process_group()


def run_script(script, run):
    """Call run(). An error or Ctrl-C ends the script with one line in place of a traceback.

    The other scripts use it, too.
    """
    if hasattr(sys.stdout, "reconfigure"):       # a terminal or a log may not know all letters
        sys.stdout.reconfigure(errors="replace")
    try:
        run()
    except (KeyboardInterrupt, BrokenPipeError):       # the latter: `| head` has seen enough
        print(f"\n{script}: stopped; a training goes on with --resume", file=sys.stderr)
        os._exit(130)                    # at once: PyTorch's clean-up takes most of a second
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        sys.exit(f"{script}: {first_line(error)}")


def main():
    run_script("train_mnist.py", lambda: run(*parse(sys.argv[1:])))


if __name__ == "__main__":
    main()
