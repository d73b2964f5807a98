"""train_mnist.py: several models, one recipe, one table.

    python train_mnist.py                       the bidirectional Vision Mamba on MNIST, 5 epochs:
                                                99.5 %, in about 17 minutes on one core
    python train_mnist.py --model causal        or s4, rnn, gru
    python train_mnist.py --lr 1e-3             any value of the recipe can be changed
    python train_mnist.py pixels                another recipe: each of the 784 pixels is a token
    python train_mnist.py next-pixel            guess each pixel from those before, and draw digits
    python train_mnist.py cifar10               coloured images
    python train_mnist.py poster --compare      published results, taken apart: results/README.md
    python train_mnist.py --dataset fashion     FashionMNIST
    python train_mnist.py --dataset FOLDER      own images: FOLDER/train/<class>/*, FOLDER/test/…
    python train_mnist.py --quick               a first look in about a minute
    python train_mnist.py --predict FILE …      classify your own pictures with the trained model
    python train_mnist.py --compare --seeds 0 1 2     every model with every seed: table and figure
    python train_mnist.py --resume              go on after Ctrl-C, on a CPU to the same weights
    torchrun --nproc_per_node=2 train_mnist.py  each of two processes takes half of every batch

All models get the same tokens (from the stem), the same pooling, a linear head, the same number of
parameters to 1 %, the same augmented images, optimizer and schedule. They differ in the body, which
reads the tokens. (In the recipe poster more differs, on purpose.)

Read from here to the line "You may stop here": recipes, data, models, the loop, a batch, and the
test. After it come files, figures and the command line. To change something, edit
    RECIPES                       a setting; each is also a flag
    build                         for another model
    train                         for another loss
    training.py                   for another optimizer or schedule
    TORCHVISION                   for another data set of torchvision

Without a network and without files, digits drawn with matplotlib's fonts stand in for MNIST. The
script announces this, and all results carry their name. There are no worker processes: a data set
fits in memory as one tensor, and a batch is an index into it.
Read before: vision.py and rnn.py. Read next: train_shakespeare.py.
"""
import hashlib
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from block import MambaBlock, parameter_groups
from rnn import RNN, S4Block, Stack
from s6 import DISCRETIZATIONS, SELECTIONS
from training import (
    PROCESSES, RANK, SAVE_EVERY, SCHEDULES,
    accelerated, check_folders, choose_device, count_parameters, fill_modules, first_line,
    first_process_first, given_settings, log_step, make_parser, mean_sd, modules_for,
    newest_checkpoint, patience, print_opening, print_table, progress, read_checkpoint, refuse,
    report, resume_from, run_script, save_checkpoint, save_figure, seed_for, start_processes,
    stop_processes, update, warn, whole, write_rows)
from vision import (
    BEGIN, FUSIONS, GREYS, POOLS, POSITIONS, STEMS,
    ImageClassifier, PixelLM, VisionMamba, complete)

# The models, and their colours in the figures: told apart by those who cannot tell red from green.
COLORS = {"bidirectional": "#d55e00", "causal": "#0072b2", "s4": "#009e73"}
COLORS |= {"rnn": "#7f7f7f", "gru": "#e69f00", "forward": "#56b4e9"}
# To add a data set: its class must take train=True, and have .data, .targets and .classes, as
# CIFAR100 does.
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}


# --------------------------------------------------------------------------------------------------
# The recipes. Each setting but the task is also a flag, and is saved in every checkpoint. The same
# holds for a setting that you add: a number, a string, True or False. (The recipe next-pixel is
# written out in full, so add it there, too.)

RECIPES = {}
RECIPES["mnist"] = dict(                 # chosen on 5,000 training images held out: --holdout 5000
    dataset="mnist",                     # a name in TORCHVISION, or a folder of images
    task="classify",                     # or "next-pixel": see build
    model="bidirectional",               # one of COLORS
    seed=0,                              # of weights, order of the images, and warps
    epochs=5,
    batch=64,
    lr=3e-3,                             # peak
    schedule="cosine",                   # or "constant": see training.learning_rate
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
    hidden_gru=84,                       # width of the GRU: as many parameters
    state=92,                            # numbers in a state of S4: as many parameters
)
RECIPES["pixels"] = dict(
    RECIPES["mnist"],
    patch=1,                             # a token is a pixel
    stem="patch",
    position="axes",                     # a vector for each pixel would be 38 % of the model
    augment="none",                      # in one epoch no image is seen twice
    epochs=1,
    batch=32,                            # half as many: an image has sixteen times as many tokens
    hidden=153,                          # 86,000 parameters, as all have
)
RECIPES["next-pixel"] = dict(
    dataset="mnist", task="next-pixel",
    model="causal",                      # MambaBlocks, one path each; or s4, which is causal, too
    seed=0, epochs=1, batch=16,
    lr=2.4e-2,                           # the best of four with Mamba, on held-out images
    schedule="cosine", clip=1.0, weight_decay=0.05, average=0.998,
    smoothing=0.0, augment="none", bf16=False,
    n=16, discretization="euler", selection="all",
    real=False,                          # S4; True: its A is real, as Mamba's is
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
    d_model=128,
    layers=4,
    hidden=268,                          # 1,010,000 parameters, as all have
    hidden_gru=151,
    state=132,
)
RECIPES["poster"] = dict(                # settings of a published poster: see results/README.md
    RECIPES["mnist"],
    lr=1e-3,
    schedule="constant",                 # neither a warm-up nor a decay: see ROWS for the rates
    weight_decay=0.01,
    average=0.0,
    stem="patch",                        # a linear map of each patch: no token sees its neighbours
    position="none",                     # nothing but the order says where a patch lies
    augment="none",
    hidden=160,
)

# The values that some settings can take.
CHOICES = {"model": COLORS, "schedule": SCHEDULES, "augment": ("warp", "shift-flip", "none")}
CHOICES |= {"stem": STEMS, "position": POSITIONS, "pool": POOLS, "fuse": FUSIONS}
CHOICES |= {"discretization": DISCRETIZATIONS, "selection": SELECTIONS}

# The rows of the table that --compare makes: a name, and what it changes in the recipe. To train
# one row alone: --compare ROW --name FILES. (Without --name its table replaces the whole one.)
ROWS = {}
for name in ("mnist", "pixels", "cifar10"):
    models = ("bidirectional", "causal", "s4", "gru", "rnn")
    ROWS[name] = {model: {"model": model} for model in models}
ROWS["next-pixel"] = {model: {"model": model} for model in ("causal", "s4")}
ROWS["poster"] = {
    "rnn-64": dict(model="rnn", pool="last", hidden=64),   # in the poster's code of that day
    "rnn": dict(model="rnn", pool="last"),
    "forward-3e-4": dict(model="forward", lr=3e-4, clip=0.5),      # "causal" on the poster
    "forward-1e-3": dict(model="forward"),                         # another rate
    "causal-1e-3": dict(model="causal"),                           # another number of branches
    "bidirectional-1e-3": dict(model="bidirectional"),             # another direction
    "bidirectional-3e-4": dict(model="bidirectional", lr=3e-4, clip=0.5),
}


# --------------------------------------------------------------------------------------------------
# The data, and the models, each with its task.

class Data(NamedTuple):
    """A data set. With --predict there are no images: the last four fields are None."""
    name: str                    # what every result carries
    classes: list                # names: label i means classes[i]
    shape: list                  # [c, h, w]
    mean: torch.Tensor           # (c, 1, 1), of all training pixels, as fractions of 255
    std: torch.Tensor            # (c, 1, 1)
    train_images: torch.Tensor = None      # (N, c, h, w) uint8
    train_labels: torch.Tensor = None      # (N,) int64
    test_images: torch.Tensor = None
    test_labels: torch.Tensor = None


class Task(NamedTuple):
    """What a model is asked, and how its answers are counted."""
    prepare: Callable            # images (b, c, h, w) of 0 … 255, labels (b,) -> inputs, targets
    classes: int                 # how many answers there are to choose from
    score: Callable              # nats, percent right -> {column: text}; the last one is the score
    label: str                   # the score in words, with its unit
    decimals: int                # of the score when it is printed


def classification(data):
    """Tell the class of an image: -> Task."""
    def prepare(images, labels):
        return (images.float() / 255 - data.mean) / data.std, labels

    def score(nats, right):
        return {"test_accuracy": f"{right:.2f}"}

    return Task(prepare, len(data.classes), score, "test accuracy (%)", 2)


def next_pixel():
    """Guess each pixel of a grey image from the pixels before it: -> Task."""
    def prepare(images, labels):
        pixels = images.flatten(1).long()                          # (b, h·w)
        before = F.pad(pixels[:, :-1], (1, 0), value=BEGIN)        # (b, h·w)
        return before, pixels

    def score(nats, right):
        bits = nats / math.log(2)
        return {"test_nats_per_pixel": f"{nats:.4f}", "test_bits_per_pixel": f"{bits:.4f}"}

    return Task(prepare, GREYS, score, "test bits per pixel", 4)


def build(recipe, data):
    """The model of a recipe, for images like those of the data, and its Task.

    Another model is another `elif`, a colour in COLORS, and a name in ROWS. Its body is a module
    that reads tokens, (b, l, d_model), and returns (b, l, width). Give it as many parameters as the
    others have, by a width of its own in each of RECIPES, or the comparison says little.
    Raises ValueError for settings or images that do not fit.
    """
    model = recipe["model"]
    d_model = recipe["d_model"]
    layers = recipe["layers"]
    channels, *size = data.shape

    if recipe["task"] == "next-pixel":
        if channels > 1 or model not in ("causal", "s4"):
            raise ValueError("next-pixel needs grey images, and --model causal or s4")
        if model == "causal":
            how = {key: recipe[key] for key in ("n", "discretization", "selection")}
            blocks = [MambaBlock(d_model, **how) for _ in range(layers)]
        else:
            how = {"n": recipe["state"], "real": recipe["real"]}
            blocks = [S4Block(d_model, **how) for _ in range(2 * layers)]
        return PixelLM(blocks, d_model, size), next_pixel()

    frame = {key: recipe[key] for key in ("patch", "stem", "position", "pool")}
    frame.update(image_size=size, channels=channels, classes=len(data.classes))
    if model == "rnn":
        width = recipe["hidden"]
        body = Stack([RNN(d_model, width, layers)])
    elif model == "gru":
        width = recipe["hidden_gru"]
        body = Stack([RNN(d_model, width, layers, gated=True)])
    elif model == "s4":
        width = d_model
        body = Stack([S4Block(d_model, recipe["state"]) for _ in range(2 * layers)])
    else:
        how = {key: recipe[key] for key in ("n", "fuse", "discretization", "selection")}
        mamba = VisionMamba(d_model, layers, direction=model, **how, **frame)
        return mamba, classification(data)
    return ImageClassifier(body, d_model, width, **frame), classification(data)


# --------------------------------------------------------------------------------------------------
# The loop.

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
    model = model.to(device)
    modules = modules_for(model, parameter_groups(model, recipe["weight_decay"]))

    # The rule: whatever lives from one step to the next must be in the checkpoint, or a resumed
    # training ends in other weights. These are the modules and the record.
    record = {"recipe": recipe, "data": facts_of(data), "log": [], "scores": []}
    if resume:
        record = resume_from(path, record, modules)
    log = record["log"]                  # the same lists: to append here is to append to the record
    scores = record["scores"]
    # The first save comes at once: so a folder that cannot be written is noticed now.
    save_checkpoint(path, record, modules, keep_old=not resume)
    sizes = f"{len(data.train_images)} training, {len(data.test_images)} test images"
    print_opening(sizes, record, model, device, task.classes)
    print(f"checkpoint {path}, step {len(log)} of {steps}", flush=True)

    # cache_enabled=False: a recorded graph must not read casts of weights from an earlier step.
    autocast = torch.autocast(device.type, torch.bfloat16, recipe["bf16"], cache_enabled=False)
    inputs, _ = task.prepare(*batch(recipe, data, 0))
    with autocast:
        net = accelerated(model, device, inputs)

    for step in range(len(log), steps):
        start = time.perf_counter()

        # The seed of all random draws of this step (warps; a dropout, if you add one): they depend
        # on (seed, step) alone, and are the same in all processes. "warp" is only its name.
        torch.manual_seed(seed_for(recipe["seed"], "warp", step))

        # The batch; under torchrun each process takes its share of it.
        share = [t.chunk(PROCESSES)[RANK] for t in batch(recipe, data, step)]
        inputs, targets = task.prepare(*share)

        # Forward: logits (b, classes). Those of next-pixel, (b, h·w, 256), hold a guess for each
        # pixel of each image: (b · h·w, 256).
        with autocast:
            logits = net(inputs)
        logits = logits.float().flatten(0, -2)
        targets = targets.flatten()
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe["smoothing"])

        # Backward, and the step of the weights. (Under torchrun the log is of this share.)
        update(modules, loss, recipe, step, steps)
        right = (logits.argmax(1) == targets).float().mean()
        log_step(log, loss, right, start, steps)

        # At the end of an epoch, test the averaged weights. Save then, and every SAVE_EVERY steps.
        epoch_ends = (step + 1) % steps_per_epoch == 0
        if epoch_ends:
            nats, percent = evaluate(modules["average"], task, data)
            scores.append((nats, percent))
            print(f"  epoch {len(scores)}{progress(log, steps, steps_per_epoch)}  test "
                  f"{nats:.4f} nats, {percent:.2f} % right", flush=True)
        if epoch_ends or (step + 1) % SAVE_EVERY == 0:
            save_checkpoint(path, record, modules)
    return Run(modules["average"], task, log, scores)


def batch(recipe, data, step):
    """Images (b, c, h, w) of 0 … 255, augmented, and labels (b,) of a step.

    Each image comes once per epoch, in a new order; a last part of them, too small for a batch, is
    left out. The choice depends on (seed, step), and the warps on PyTorch's seed, set by `train`.
    """
    size = recipe["batch"]
    count = len(data.train_images)
    epoch, i = divmod(step, count // size)
    seed = seed_for(recipe["seed"], "order", epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    index = order[i * size:(i + 1) * size].to(data.train_images.device)
    images = data.train_images[index].float()
    labels = data.train_labels[index]

    if recipe["augment"] == "warp":
        images = warp(images, degrees=10, scale=0.1, shear=5, shift=2)
    elif recipe["augment"] == "shift-flip":
        images = shift_and_flip(images)  # mirroring keeps the label of a photo, but not of a digit
    return images, labels


@torch.no_grad()
def evaluate(model, task, data, size=125):
    """All test images, `size` at a time: -> nats (per image, or per pixel), percent right.

    Raises ValueError if the nats are not finite: the last steps have spoiled the weights.
    """
    nats = 0.0
    right = 0
    count = 0
    for images, labels in zip(data.test_images.split(size), data.test_labels.split(size)):
        inputs, targets = task.prepare(images, labels)
        logits = model(inputs).flatten(0, -2)
        targets = targets.flatten()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        right += (logits.argmax(1) == targets).sum().item()
        count += len(targets)
    if not math.isfinite(nats):
        raise ValueError("the test loss is not finite: start again with a smaller --lr")
    return nats / count, 100 * right / count


# --------------------------------------------------------------------------------------------------
# You may stop here. The rest: images, figures, predictions, the command line. First the images:
# warps, files, stand-ins.
#
# torchvision's transforms draw their parameters once per call: all images of a batch would share
# one warp. The first two functions draw for each image.

def warp(images, degrees, scale, shear, shift, generator=None):
    """Each image (b, c, h, w) rotated, scaled, sheared and shifted, by random amounts of its own.

    Each amount is uniform between minus and plus its limit: degrees and shear are in degrees, scale
    is a fraction, shift is in pixels. The pixel at p comes from rotation · shear · scale · p +
    shift, in coordinates from -1 to 1.
    """
    b, _, height, width = images.shape

    def uniform(limit):
        return limit * (2 * torch.rand(b, generator=generator, device=images.device) - 1)

    angle = uniform(math.radians(degrees))
    skew = uniform(math.tan(math.radians(shear)))
    wide = 1 + uniform(scale)
    high = 1 + uniform(scale)
    right = uniform(2 * shift / width)
    down = uniform(2 * shift / height)
    cos = torch.cos(angle)
    sin = torch.sin(angle)
    ratio = height / width               # a step of 1 is half the width, or half the height
    x_row = [cos * wide, ratio * (skew * cos - sin) * high, right]
    y_row = [sin * wide / ratio, (skew * sin + cos) * high, down]
    matrix = torch.stack([torch.stack(x_row, -1), torch.stack(y_row, -1)], 1)  # (b, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def shift_and_flip(images, padding=2):
    """Each image (b, c, h, w) shifted by up to `padding` pixels, and mirrored or not, by chance.

    Each image is padded, and a random window of the original size is cut out. `unfold` shows all
    windows as a view, without a copy. Nothing is interpolated.
    """
    b, _, h, w = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4, mode="reflect")
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)               # (b, c, places, places, h, w)
    top, left = torch.randint(2 * padding + 1, (2, b), device=device)
    images = windows[torch.arange(b, device=device), :, top, left]             # (b, c, h, w)
    mirrored = torch.rand(b, 1, 1, 1, device=device) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    return images.contiguous(memory_format=torch.channels_last)    # a convolution reads it faster


def facts_of(data):
    """What a checkpoint says of its images, so that the model can be used without them.

    The fingerprint depends on pixels, labels and class names, not on where the files are.
    """
    digest = hashlib.sha256(repr(data.classes).encode())
    for tensor in data[3:]:
        digest.update(tensor.cpu().contiguous().numpy())
    return {
        "name": data.name,
        "classes": data.classes,
        "shape": data.shape,
        "mean": data.mean.cpu(),
        "std": data.std.cpu(),
        "fingerprint": f"{data.shape} {digest.hexdigest()[:16]}",
    }


def as_data(name, classes, *tensors):
    """Training images and labels, test images and labels -> Data, with mean and deviation.

    To four digits, as is the custom: for MNIST 0.1307 and 0.3081. Counted by grey value, which
    takes no float copy of the images.
    """
    images = tensors[0]
    counts = [channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]
    share = torch.stack(counts).double()                           # (c, 256)
    share /= share.sum(1, keepdim=True)
    values = torch.arange(256).double() / 255
    mean = share @ values                                          # (c,)
    variance = share @ values ** 2 - mean ** 2
    variance = variance.clamp(min=1 / 255 ** 2)    # images of one grey would be divided by 0
    mean, std = [t.round(decimals=4).float().view(-1, 1, 1) for t in (mean, variance.sqrt())]
    return Data(name, classes, list(images.shape[1:]), mean, std, *tensors)


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
    except MemoryError:
        raise
    except Exception as error:           # no network, a broken download, a damaged file
        *_, reason = str(error).strip().split("\n")                # torchvision says it last
        problem = f"cannot read {dataset} from {data_dir}, or download it ({reason})"
        # Damaged files are an accident that should be noticed: nothing stands in for them.
        there = Path(data_dir, "MNIST", "raw", "train-images-idx3-ubyte").exists()
        if dataset != "mnist" or source == "real" or there:
            raise ValueError(f"{problem}. Connect to the network (delete damaged files first), or "
                             f"use --dataset FOLDER, or for mnist --data synthetic") from error
    warn(f"{problem}.\nTraining on SYNTHETIC digits: results say nothing about MNIST.")
    return synthetic_digits()


def load_torchvision(dataset, data_dir):
    """A data set of torchvision, downloaded if need be: -> Data."""
    kind = getattr(torchvision.datasets, TORCHVISION[dataset])
    with patience(10):
        parts = [kind(data_dir, train=True, download=True), kind(data_dir, train=False)]
    tensors = []
    for part in parts:
        images = torch.as_tensor(part.data)
        if images.ndim == 3:                                       # (N, h, w)
            images = images.unsqueeze(1)                           # (N, 1, h, w)
        else:                                                      # (N, h, w, c)
            images = images.permute(0, 3, 1, 2).contiguous()       # (N, c, h, w)
        tensors += [images, torch.as_tensor(part.targets)]
    return as_data(dataset, list(part.classes), *tensors)


def load_folder(folder, size):
    """FOLDER/train/<class>/* and FOLDER/test/<class>/*, grey or colour -> Data."""
    train = images_by_class(f"{folder}/train")
    test = images_by_class(f"{folder}/test")
    classes = sorted({name for _, name in train})
    tested = sorted({name for _, name in test})
    if len(classes) < 2 or classes != tested:
        raise ValueError(f"{folder} needs two classes or more, the same in train and test, but "
                         f"has {', '.join(classes)} and {', '.join(tested)}")

    # The files come sorted by class. --limit and --holdout take a part, and all classes should be
    # in it.
    count = len(train)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    found = [train[i] for i in order] + test
    labels = torch.tensor([classes.index(name) for _, name in found])
    images = [read_image(path, size and (size, size)) for path, _ in found]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"the images in {folder} differ in size: use --size")
    images = torch.stack(images)                                   # (N, 3, h, w)
    if (images == images[:, :1]).all():                            # grey, in three channels
        images = images[:, :1].contiguous()
    parts = (images[:count], labels[:count], images[count:], labels[count:])
    return as_data(f"own-{os.path.basename(os.path.abspath(folder))}", classes, *parts)


def images_by_class(folder):
    """The images in folder/<class>/*, sorted: -> [(path, class)].

    Raises ValueError if there is no folder, and for a class without images.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder}: --dataset takes a folder with train and "
                         f"test in it, or one of {', '.join(TORCHVISION)}")
    found = []
    for path in sorted(Path(folder).glob("[!.]*")):
        if path.is_dir():
            found += [(image, path.name) for image in images_in(path)]
    return found


def images_in(folder):
    """The paths of the images in a folder, sorted, those behind links too; not in deeper folders.

    Skips what has not the suffix of an image. Raises ValueError if there are none.
    """
    paths = sorted(Path(folder).glob("[!.]*"))
    paths = [path for path in paths if path.suffix.lower() in IMG_EXTENSIONS]
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
            image = image.convert(mode)  # before resize: PIL does not smooth one-bit images
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

    glyphs = torch.zeros(len(fonts), 10, 1, 28, 28)                # white on black, 0 … 1
    for i, font in enumerate(fonts):
        for digit in range(10):
            image = Image.new("L", (28, 28))
            pen = ImageDraw.Draw(image)
            pen.text((14, 14), str(digit), fill=255, font=font, anchor="mm")
            glyphs[i, digit] = pil_to_tensor(image) / 255

    generator = torch.Generator().manual_seed(0)
    tensors = []
    for count in (train, test):
        font = torch.randint(len(glyphs), (count,), generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
        images = glyphs[font, labels]                              # (count, 1, 28, 28)
        images = warp(images, degrees=15, scale=0.2, shear=10, shift=3, generator=generator)
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        images = (255 * images.clamp(0, 1)).to(torch.uint8)
        tensors += [images, labels]
    return as_data("synthetic-digits", list("0123456789"), *tensors)


def shrink(data, args, recipe):
    """The data set that --holdout, --limit and --quick leave; its name says so.

    With --holdout N the last N training images take the place of the test images: settings that
    were chosen on test images would make the test a part of the training.
    Raises ValueError if fewer than two steps of training are left.
    """
    name = data.name
    train = data[5:7]                    # images and labels
    test = data[7:]
    if args.holdout:
        name += f"-holdout-{args.holdout}"
        keep = max(len(train[0]) - args.holdout, 0)
        test = [t[keep:] for t in train]
        train = [t[:keep] for t in train]
    if args.limit:
        name += f"-limit-{args.limit}"
        train = [t[:args.limit] for t in train]
    if args.quick:
        name += "-quick"
        by_pixels = recipe.get("patch", 1) == 1    # a pixel per token takes ten times as long
        count = 640 if by_pixels else 6400
        test_count = 100 if by_pixels else 1000
        train = [t[:count] for t in train]
        test = [t[:test_count] for t in test]
    count = len(train[0])
    if recipe["epochs"] * (count // recipe["batch"]) < 2:
        raise ValueError(f"{count} training images are too few for two steps: use a --batch "
                         f"smaller than {recipe['batch']}")
    return Data(name, *data[1:5], *train, *test)


# --------------------------------------------------------------------------------------------------
# Results: a row per run, a table, figures.

def result(name, recipe, data, device, run):
    """The row of a finished run, called name.

    The score is that of the last epoch: to choose the best one would be to choose on test images.
    """
    return report({
        "model": name,
        "dataset": data.name,
        "seed": recipe["seed"],
        "params": count_parameters(run.average),
        "epochs": recipe["epochs"],
        **run.task.score(*run.scores[-1]),
        "seconds": f"{run.log[-1][2]:.0f}",
    }, device)


def score_of(run, epoch):
    """The score of an epoch, as it stands in the rows."""
    *_, score = run.task.score(*run.scores[epoch]).values()
    return float(score)


def print_comparison(runs):
    """The table of results/README.md, for {row: its runs, one for each seed}.

    Runs with the same seed see the same images in the same order. So the difference to the line
    above is taken seed by seed: variation that they share cancels.
    """
    lines = []
    sizes = []
    above = None
    for row, its_runs in runs.items():
        task = its_runs[0].task
        scores = [score_of(run, -1) for run in its_runs]
        seconds = [round(run.log[-1][2]) for run in its_runs]
        gained = ""
        if above:
            gained = [ours - theirs for ours, theirs in zip(scores, above)]
            gained = mean_sd(gained, task.decimals)
        sizes.append(count_parameters(its_runs[0].average))
        score = mean_sd(scores, task.decimals)
        lines.append([row, f"{sizes[-1]:,}", score, gained, mean_sd(seconds, 0)])
        above = scores
    print_table(["model", "parameters", task.label, "change from the line above", "seconds"], lines)
    if max(sizes) > 1.02 * min(sizes):
        print("These models differ by more than 2 % in size, and so the comparison says less.")


def draw_runs(path, runs, title):
    """Training loss over steps and over seconds, and the test score over epochs.

    runs    {row of the table: its runs, one for each seed}. A line is the mean over seeds, the band
            goes from the lowest to the highest; on the right there is a line per seed
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    for i, (row, its_runs) in enumerate(runs.items()):
        color = COLORS.get(row, f"C{i}")
        log = torch.stack([torch.tensor(run.log) for run in its_runs])         # (seeds, steps, 3)
        width = max(1, min(100, log.shape[1] // 10))       # steps that a point is the mean of
        losses = log[..., 0].unfold(1, width, width).mean(-1)                  # (seeds, points)
        steps = width * torch.arange(1, losses.shape[1] + 1)
        seconds = log[:, steps - 1, 2].mean(0)
        for ax, x in zip(axes, (steps, seconds)):
            ax.plot(x, losses.mean(0), color=color, label=row)
            ax.fill_between(x, losses.amin(0), losses.amax(0), color=color, alpha=0.2, linewidth=0)
        for run in its_runs:
            epochs = range(len(run.scores))
            scores = [score_of(run, epoch) for epoch in epochs]
            axes[2].plot([epoch + 1 for epoch in epochs], scores, "o-", color=color, alpha=0.7)

    # Both axes are logarithmic in the loss, since late in a training the differences are small.
    axes[0].set(xlabel="training step", ylabel="training loss (nats)", yscale="log")
    axes[1].set(xlabel="seconds of training", yscale="log")
    axes[2].set(xlabel="epoch", ylabel=its_runs[0].task.label)
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{title}: mean, and band from lowest to highest; right, a line per seed",
                    fontsize=10, parse_math=False)     # a name of the user's may have a $
    save_figure(path, figure)


def draw_completions(path, runs, data):
    """Ten test digits, their upper halves, and how each model goes on from there, three times.

    A model that has learned strokes, and not only greys, goes on with the digit that was begun.
    """
    height, width = data.shape[1:]
    half = width * (height // 2)
    images = data.test_images[:10].flatten(1).long()
    rows = {"the digit": images, "what is given": images[:, :half]}
    for row, its_runs in runs.items():
        name = {"causal": "Mamba", "s4": "S4"}[row]
        for seed in range(3):
            drawn = complete(its_runs[0].average, images[:, :half], height * width, seed)
            rows[f"{name} {seed + 1}"] = drawn

    figure = Figure(figsize=(10, 0.95 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (name, pixels) in zip(axes, rows.items()):
        missing = height * width - pixels.shape[1]
        shown = F.pad(pixels.float(), (0, missing), value=math.nan).cpu()
        for ax, image in zip(row, shown.view(-1, height, width)):
            ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
            ax.axhline(half // width - 0.5, color="#d55e00", linewidth=0.8)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle(f"{data.name}: above the line given, below it drawn pixel by pixel",
                    fontsize=10, parse_math=False)
    save_figure(path, figure, dpi=100)


# --------------------------------------------------------------------------------------------------
# A trained model classifies your own pictures.

@torch.no_grad()
def predict(args, recipe):
    """Print a line for each picture, its likeliest classes first: -> exit status, 0 or 1.

    A checkpoint holds all that the model needs: recipe, class names, shape, mean and deviation.
    A picture that cannot be read is a line on stderr, and makes the status 1; the others follow.
    """
    pattern = f"{args.name or recipe['recipe']}*-{recipe['model']}-seed*.pt"
    path = args.checkpoint or newest_checkpoint(args.out, [pattern])
    checkpoint = read_checkpoint(path)
    if not checkpoint["scores"]:
        print(f"{path}: no epoch of this training is finished", file=sys.stderr)
    recipe = checkpoint["recipe"]
    if recipe.get("task") != "classify" or RECIPES["mnist"].keys() - recipe.keys():
        raise ValueError(f"{path} holds no model that tells classes apart, or one of another "
                         f"version of the code")
    facts = checkpoint["data"]
    facts.pop("fingerprint")
    data = Data(**facts)
    model, task = build(recipe, data)
    fill_modules(path, checkpoint, {"average": model.eval()})

    files = []
    for name in args.predict:
        files += images_in(name) if os.path.isdir(name) else [name]
    channels, *size = data.shape
    status = 0
    for file in files:
        try:
            image = read_image(file, size, "L" if channels == 1 else "RGB")    # (c, h, w)
        except ValueError as error:
            print(f"train_mnist.py: {error}", file=sys.stderr)
            status = 1
            continue
        if args.invert:
            image = 255 - image
        inputs, _ = task.prepare(image.unsqueeze(0), None)
        chances = model(inputs).softmax(-1)[0]                                 # (classes,)
        guesses = []
        for i in chances.argsort(descending=True)[:3].tolist():
            guesses.append(f"{data.classes[i]} {100 * chances[i]:.1f} %")
        print(f"{file}: {', '.join(guesses)}", flush=True)
    return status


# --------------------------------------------------------------------------------------------------
# The command line.

def parse(arguments):
    """-> all flags, and the recipe: the one that was named, with what the flags change.

    The flags of one recipe are not those of another: next-pixel has no --stem.
    """
    name = "mnist"
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in RECIPES:
        sys.exit(f"train_mnist.py: there is no recipe {name}, but {', '.join(RECIPES)}")
    settings = {key: value for key, value in RECIPES[name].items() if key != "task"}
    usage = "train_mnist.py [recipe] [--flag value ...]  (--help lists them)"
    parser = make_parser(usage, __doc__, settings, CHOICES)
    add = parser.add_argument
    add("--compare", nargs="*", choices=ROWS[name], metavar="ROW",
        help=f"train several models: all, or some of {' '.join(ROWS[name])}")
    add("--limit", type=whole, default=0, help="train on so many images only; 0: all")
    add("--holdout", type=whole, default=0,
        help="test on so many training images; 0: on the test images")
    add("--size", type=whole, default=0,
        help="resize a folder's images to SIZE x SIZE; needed if they differ in size")
    add("--predict", nargs="+", metavar="FILE",
        help="classify pictures, or those in a folder; they are stretched to the model's size")
    add("--invert", action="store_true", help="with --predict: exchange dark and light. MNIST is "
        "light ink on black: dark ink on light paper needs this")

    args = parser.parse_args(arguments)
    given = given_settings(args, settings)
    recipe = {"recipe": name} | RECIPES[name] | given
    if args.quick and "epochs" not in given:
        recipe["epochs"] = min(2, recipe["epochs"])
    refuse(parser, args, "compare", ["model"])
    refuse(parser, args, "seeds", ["seed"])
    training = [setting for setting in settings if setting != "model"]
    training += ["compare", "seeds", "quick", "limit", "holdout", "size", "resume"]
    training += ["data", "data_dir", "device"]       # it predicts on the CPU
    refuse(parser, args, "predict", training)
    if args.size and recipe["dataset"] in TORCHVISION:
        parser.error("--size is for the images of a folder")
    if (args.checkpoint or args.invert) and not args.predict:
        parser.error("--checkpoint and --invert are for --predict; --resume takes the file of "
                     "--out and --name")
    return args, recipe


def training_name(recipe, data_name):
    """What files are called: the recipe, then the data's name, less the recipe's usual data set.

    Examples: "poster" on mnist, "poster-quick", "poster-fashion", "cifar10-own-pets-limit-640".
    """
    own = RECIPES[recipe]["dataset"]
    rest = f"{data_name}-".removeprefix(f"{own}-")
    return f"{recipe}-{rest}".removesuffix("-")


def run(args, recipe):
    """One training; or one for each row and seed, then their table and figure; or a prediction."""
    if args.predict:
        sys.exit(predict(args, recipe))
    table = args.compare is not None or args.seeds
    if table or recipe["task"] == "next-pixel":
        check_folders("results", "figures")
    device = choose_device(args.device)
    start_processes(device, recipe["batch"])
    data = first_process_first(
        lambda: load_data(recipe["dataset"], args.data, args.data_dir, args.size))
    data = shrink(data, args, recipe)
    data = Data(*data[:3], *[tensor.to(device) for tensor in data[3:]])
    name = args.name or training_name(recipe["recipe"], data.name)

    rows = {recipe["model"]: {}}
    if args.compare is not None:
        every = ROWS[recipe["recipe"]]
        rows = {row: every[row] for row in args.compare or every}
    # A model that cannot be built is noticed now, and not after the trainings of others.
    for changes in rows.values():
        build(recipe | changes, data)

    results = []
    runs = {row: [] for row in rows}
    seeds = list(dict.fromkeys(args.seeds or [recipe["seed"]]))
    for seed, row in itertools.product(seeds, rows):
        settings = recipe | rows[row] | {"seed": seed}
        path = os.path.join(args.out, f"{name}-{row}-seed{seed}.pt")
        resume = args.resume and (os.path.exists(path) or not table)
        trained = train(settings, data, device, path, resume)
        runs[row].append(trained)
        results.append(result(row, settings, data, device, trained))

    if RANK == 0 and table:
        write_rows(f"results/{name}.csv", results)
        title = f"{data.name}, seeds {', '.join(map(str, seeds))}"
        draw_runs(f"figures/{name}.png", runs, title)
        print_comparison(runs)
    if RANK == 0 and recipe["task"] == "next-pixel":
        draw_completions(f"figures/{name}-completions.png", runs, data)
    stop_processes()


def main():
    run_script("train_mnist.py", lambda: run(*parse(sys.argv[1:])),
               "a training goes on with --resume")


if __name__ == "__main__":
    main()
