"""training.py: what both training scripts do alike, and no lesson is about.

A step of the weights, checkpoints, processes, progress, rows and tables, flags, files. It knows no
model, no image and no text: train_mnist.py and train_shakespeare.py bring those, and each has a
loop of its own. Skip this file on a first reading, but for `update`, which is the step.

Two dictionaries hold whatever lives from one training step to the next. A checkpoint is both of
them in one file, so a training that was killed goes on to the same weights.
    modules    the model, the average of its weights, the optimizer
    record     the recipe, facts about the data, the log of all steps, the scores of all epochs

To change something, edit
    learning_rate, SCHEDULES    for another schedule
    modules_for                 for another optimizer
    update                      for another way to clip, or to average the weights
"""
import argparse
import contextlib
import copy
import csv
import hashlib
import io
import math
import os
import platform
import shlex
import socket
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


# --------------------------------------------------------------------------------------------------
# A step of the weights.

def seed_for(seed, what, number=0):
    """A seed for one purpose: from 0 to 2³² - 1.

    A hash mixes all three into 32 bits, since PyTorch's CPU generator reads no more of a seed.
    `what` is only a name, but with another name come other results.
    """
    text = f"{seed} {what} {number}"
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big")


SCHEDULES = ("cosine", "constant")


def learning_rate(recipe, step, steps):
    """The rate for a step from 0 to steps - 1; recipe["lr"] is its peak.

    "cosine"      a line from 0 to lr over the first tenth of the steps, then a cosine to 0
    "constant"    lr
    """
    if recipe["schedule"] == "constant":
        return recipe["lr"]
    part = (step + 1) / steps
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (part - 0.1) / 0.9)))
    return recipe["lr"] * min(part / 0.1, fall)


def update(modules, loss, recipe, step, steps):
    """One step of the weights down the gradient of the loss (a scalar); their average follows.

    Of the recipe it takes lr, schedule, clip and average. `step` counts from 0.
    Raises ValueError if the loss or a gradient is not finite. The weights then stay as they were.
    """
    model = modules["model"]
    average = modules["average"]
    optimizer = modules["optimizer"]

    # Clipping keeps one bad batch from throwing the weights far.
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
    if not math.isfinite(loss.item() + norm.item()):
        raise ValueError(f"not finite at step {step + 1}: start again with a smaller --lr")

    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step, steps)
    optimizer.step()

    # The decay of the average, about 1 - 9/step, lets it span the last ninth of the steps so far.
    # It may rise to recipe["average"], where it spans the last 1 / (1 - average) steps: with 0.998
    # after 4,490 steps.
    decay = min(recipe["average"], (1 + step) / (10 + step))
    with torch.no_grad():
        for mean, weight in zip(average.parameters(), model.parameters()):
            mean.lerp_(weight, 1 - decay)


def modules_for(model, groups):
    """-> modules: the model, the average of its weights, and the optimizer.

    groups    of parameters, each with its weight decay: see block.parameter_groups
    """
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    return {"model": model, "average": average, "optimizer": optimizer}


def accelerated(model, device, *inputs):
    """The model as the loop calls it: under torchrun with shared gradients, on a GPU as a graph.

    inputs    what the model will be called with: tensors, or lists of them

    On a GPU the forward and the backward pass are recorded as CUDA graphs. A small model is
    hundreds of small kernels, and the GPU mostly waits until Python has launched the next one. A
    graph launches all of them in one call, and computes the same. Python code runs only while it
    is recorded: later calls need inputs of the same shapes, and repeat the same loops and
    branches. In mode eval() the model runs as before. Gradients must be reset before each backward
    pass, as `update` does.
    """
    if PROCESSES > 1:                    # averages the gradients over the processes
        return DistributedDataParallel(model)
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # two: of streams, and the first use of cuBLAS
            return torch.cuda.make_graphed_callables(model, inputs)
    return model


# --------------------------------------------------------------------------------------------------
# Checkpoints: the record and the modules, in one file.

SAVE_EVERY = 100     # steps; besides, at the end of each epoch
ENTRIES = {"recipe": dict, "data": dict, "log": list, "scores": list}
ENTRIES |= {"model": dict, "average": dict, "optimizer": dict}


def save_checkpoint(path, record, modules, keep_old=False):
    """Write record and modules to path: all that a training needs to go on. keep_old: see write."""
    if RANK > 0:
        return
    checkpoint = dict(record)
    for name, module in modules.items():
        checkpoint[name] = module.state_dict()
    # Through memory: torch.save would report a full disk, or Ctrl-C, as some RuntimeError.
    file = io.BytesIO()
    torch.save(checkpoint, file)
    write(path, file.getvalue(), keep_old)


def read_checkpoint(path, entries=ENTRIES):
    """-> the dictionary that was saved, its tensors on the CPU.

    entries    {name: type} of what must be in there
    The check sums are compared first, since torch.load ignores them: a flipped bit would become
    another weight. weights_only: nothing in the file is run as code.
    Raises OSError if there is no file, and ValueError if it is damaged or holds something else.
    """
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:       # there are many kinds for a damaged file
            raise ValueError(f"{path} is damaged, or no checkpoint, or might run code") from error
    if damaged:
        raise ValueError(f"{path} is damaged")
    for name, kind in entries.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), kind):
            raise ValueError(f"{path} is no checkpoint of this script: it has no {name}")
    return checkpoint


def fill_modules(path, checkpoint, modules):
    """Load {name: module} from the entries of those names. Raises ValueError if one won't fit."""
    try:
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
    except Exception as error:           # too few weights, too many, of other shapes, not tensors
        raise ValueError(f"{path} is of another model, or another version of the code") from error


def resume_from(path, record, modules):
    """Fill the modules from a checkpoint: -> its record.

    record    the one that a new training would begin with
    Raises ValueError if the checkpoint has other settings, data or modules.
    """
    checkpoint = read_checkpoint(path)
    # The data must be the same, wherever they are.
    ours = record["recipe"] | {"dataset": record["data"]["fingerprint"]}
    theirs = checkpoint["recipe"] | {"dataset": checkpoint["data"].get("fingerprint")}
    for setting, value in ours.items():
        if theirs.get(setting) != value:
            raise ValueError(f"{path} was made with {setting} {theirs.get(setting)}, not {value}. "
                             f"Use that, or start without --resume")
    fill_modules(path, checkpoint, modules)
    return {key: checkpoint.get(key) for key in record}


def newest_checkpoint(folder, patterns):
    """The path of the checkpoint in a folder that was saved last: -> Path; stderr says which one.

    patterns    of file names: a checkpoint must match one of them
    Raises ValueError if none does.
    """
    found = []
    for pattern in patterns:
        found += Path(folder).glob(pattern)
    if not found:
        raise ValueError(f"there is no {folder}/{patterns[0]}: train a model, or name one with "
                         f"--checkpoint")
    newest = max(found, key=os.path.getmtime)
    print(f"using {newest}", file=sys.stderr)
    return newest


# --------------------------------------------------------------------------------------------------
# Processes and devices. Under torchrun several processes share each batch.

TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
PROCESSES = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1


def choose_device(name):
    """-> torch.device: the one of that name; for "auto" the GPU if CUDA finds one, else the CPU.

    Raises ValueError if it is not there.
    """
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


def start_processes(device, batch):
    """Under torchrun, connect the processes. From here on only the first one prints.

    Raises ValueError for a batch that they cannot share equally.
    """
    if batch % PROCESSES:
        raise ValueError(f"use a --batch that {PROCESSES} processes can share")
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def first_process_first(load):
    """-> load(). Under torchrun the others wait until the first process has downloaded the data."""
    if RANK > 0:
        dist.barrier()
    data = load()
    if RANK == 0 and PROCESSES > 1:
        dist.barrier()
    return data


def stop_processes():
    if PROCESSES > 1:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# What is printed while a training runs.

def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def print_opening(sizes, record, model, device, answers):
    """What is trained, on what, and the loss to begin with.

    sizes      of the data, as text
    answers    how many there are to choose from: classes, or characters
    """
    recipe = record["recipe"]
    print(f"model {recipe['model']} on {record['data']['name']}: {sizes}")
    print(f"parameters {count_parameters(model)}  seed {recipe['seed']}")
    print(f"device {describe(device)}, torch {torch.__version__}")
    print(f"loss of a blind guess ln {answers} = {math.log(answers):.4f}")


def log_step(log, loss, right, start, steps):
    """Append to the log: loss, fraction right (scalar tensors), seconds of training so far.

    start    when the step began, by time.perf_counter
    On a terminal, show every 20 steps how it goes; log files stay short.
    """
    seconds = log[-1][2] if log else 0.0
    seconds += time.perf_counter() - start
    log.append((loss.item(), right.item(), seconds))
    on_screen = sys.stdout is not None and sys.stdout.isatty()     # None: it was closed by >&-
    if len(log) % 20 == 0 and on_screen:
        print(progress(log, steps, 100), end="  \r", flush=True)   # blanks: a line may shrink


def progress(log, steps, window):
    """One line: how far the training is, and the means over the last `window` steps."""
    losses, hits, _ = zip(*log[-window:])
    loss = sum(losses) / len(losses)
    percent = 100 * sum(hits) / len(hits)
    seconds = log[-1][2]
    left = seconds / len(log) * (steps - len(log))
    return (f"  step {len(log)}/{steps}  loss {loss:.4f}  accuracy {percent:.2f}  "
            f"{seconds:.0f} s, {left:.0f} s left")


def warn(text):
    """Print it where nobody overlooks it."""
    print("!" * 100, text, "!" * 100, sep="\n", flush=True)


# --------------------------------------------------------------------------------------------------
# Results: a row per training, a table, a figure. A row says which command made it, and on what
# machine; a number in README.md or results/README.md comes from such a row.

def report(row, device):
    """Print a row as a RESULT line, easy to find with grep: -> the row, and how it was made."""
    columns = [f"{column}={value}" for column, value in row.items()]
    print("RESULT", *columns, flush=True)
    return row | {
        "device": describe(device),
        "torch": torch.__version__,
        "command": "python " + shlex.join(sys.argv),
    }


def mean_sd(values, digits):
    """Mean ± standard deviation (n - 1), as text; of a single value, the value."""
    values = torch.tensor(values, dtype=torch.float64)
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std():.{digits}f}"
    return text


def print_table(columns, lines):
    """A table as Markdown: names of columns, and lists of text."""
    print()
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    for line in lines:
        print("|", " | ".join(line), "|")


def save_figure(path, figure, dpi=120):
    """Write a figure of matplotlib as PNG; what was at path is replaced."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi, format="png")
    write(path, file.getvalue())
    print(f"wrote {path}", flush=True)


# --------------------------------------------------------------------------------------------------
# Flags: one for each setting of a recipe, and those that both scripts have.

def between(kind, low, high=math.inf):
    """A type for argparse: a number of that kind, from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:      # also if it is nan
            raise argparse.ArgumentTypeError(f"must be finite, from {low} to {high}, got {text}")
        return value

    return number


# The range of a flag goes by the type of its setting; some settings have one of their own.
whole = between(int, 0, 2 ** 63 - 1)     # PyTorch's largest integer
fraction = between(float, 0, 1)
KINDS = {int: between(int, 1), float: between(float, 0), str: str}
KINDS |= {"seed": whole, "layers": whole}
KINDS |= {"average": fraction, "smoothing": fraction, "forget": fraction}


def make_parser(usage, description, recipe, choices):
    """A parser with a flag for each setting of a recipe, and the flags that both scripts have.

    choices    {setting: its values}, where they are known; else a flag has the type of the setting
    A setting that is not given leaves nothing in the parsed arguments: see given_settings.
    """
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The recipe, at the top of the script, explains its settings.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    for setting, value in recipe.items():
        how = {"default": argparse.SUPPRESS, "help": f"default {value}"}
        if isinstance(value, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif setting in choices:
            how["choices"] = choices[setting]
        else:
            how["type"] = KINDS.get(setting, KINDS[type(value)])
            how["metavar"] = "VALUE"
        add("--" + setting.replace("_", "-"), **how)

    add("--seeds", nargs="+", type=whole,
        help="train with each of these: a table and a figure, which replace those of that name")
    add("--name", help="what files are called; default: after the recipe and the data")
    add("--quick", action="store_true", help="little data, few epochs: a first look")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--checkpoint", metavar="FILE",
        help="the model to predict or generate with; default: the newest in --out that fits")
    add("--data", choices=["auto", "real", "synthetic"], default="auto",
        help="default auto: others stand in, loudly, if the real ones cannot be had")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints; default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    return parser


def given_settings(args, recipe):
    """The settings that were given as flags: {setting: value}."""
    return {key: value for key, value in vars(args).items() if key in recipe}


def refuse(parser, args, flag, others):
    """End with an error if the flag was given, and one of the others as well."""
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for other in others:
        if flag in given and other in given:
            other = other.replace("_", "-")
            parser.error(f"--{other} means nothing beside --{flag}")


# --------------------------------------------------------------------------------------------------
# Files, for all scripts of this directory. A file is replaced once the new one is complete: so a
# training that is killed, or a disk that is full, destroys nothing.

def write(path, data, keep_old=False):
    """Write bytes to a temporary file, then move it to path.

    keep_old    what was at path becomes path.old (and replaces an older path.old)
    os.replace is atomic: nobody sees half a file. The process id in the temporary name keeps two
    trainings of one name from writing into each other's file.
    Raises OSError, naming the path.
    """
    part = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        Path(part).write_bytes(data)
        keep_old = keep_old and os.path.exists(path)
        if keep_old:
            os.replace(path, f"{path}.old")
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)
    if keep_old:
        print(f"the earlier {path} is now {path}.old")


def write_rows(path, rows):
    """A CSV file of dictionaries that have the same keys; an earlier one becomes path.old."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode(errors="backslashreplace")       # a file name may be no UTF-8
    write(path, data, keep_old=True)
    print(f"wrote {path}", flush=True)


def check_folders(*folders):
    """Create the folders. Raises OSError now, and not after hours, if one cannot be written to."""
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error.strerror}") from error


@contextlib.contextmanager
def patience(seconds):
    """A download in here is given up if it stalls for so long."""
    earlier = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(earlier)


# --------------------------------------------------------------------------------------------------
# The frame around a script.

def first_line(error):
    """What went wrong, in one line; the type of the error if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def run_script(script, run, after_stop):
    """Call run(). Ctrl-C, or an error of the user's, ends the script with one line.

    A bug, such as a RuntimeError about shapes, keeps its traceback.

    after_stop    what to tell who stopped it, such as "a training goes on with --resume"
    The exit status is 0; 1 after an error; 130 after Ctrl-C, or when nobody reads the output.
    """
    if hasattr(sys.stdout, "reconfigure"):       # a terminal or a log may not know all letters
        sys.stdout.reconfigure(errors="replace")
    try:
        run()
        print(end="", flush=True)        # here a closed pipe can still be noticed
    except KeyboardInterrupt:
        print(f"\n{script}: stopped; {after_stop}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:              # `| head` has seen enough: drop what is still to print
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130)
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"{script}: {first_line(error)}")
    except RuntimeError as error:
        if "allocate memory" not in str(error):      # PyTorch's words where a CPU has too little
            raise
        sys.exit(f"{script}: {first_line(error)}")
