"""train_shakespeare.py: the same block writes text, from a state of constant size.

    python train_shakespeare.py                        train, 10 epochs: 17 minutes on one core
    python train_shakespeare.py --quick                a first look in under a minute
    python train_shakespeare.py --generate "ROMEO:"    write from the checkpoint
    python train_shakespeare.py --text FILE            any UTF-8 text in place of Shakespeare
    python train_shakespeare.py --seeds 0 1 2          one model per seed: table and figure
    python train_shakespeare.py --resume               go on after Ctrl-C; on a CPU, to the same end
    torchrun --nproc_per_node=2 train_shakespeare.py   each of two processes takes half the batch

A token is a character. The loss is -ln p of the next character, in nats, or -log₂ p, in bits. The
first 90 % of the text are trained on, and the loss is measured on the whole last 10 %,
in two ways. In blocks, the model forgets everything after 128 characters; streaming, it reads from
one end to the other and carries its state, which costs no more: that is what a recurrence is for.
Expect 1.42 nats streaming.

It is trained as it is used. The rows of a batch are 32 places in the text, and the next batch goes
on where this one stopped, from the states that it left behind; the gradient stops there (truncated
backpropagation through time). An epoch reads the text once, and each epoch from other places. Now
and then a row forgets its state, so that the model also learns to begin. All of that is in `train`.

Without a network and without a file, the help texts of Python itself stand in for Shakespeare; that
is announced, and all results carry their name.
Read before: block.py, train_mnist.py. Read next: visualize_delta.py.
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
from typing import NamedTuple

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch.nn.parallel import DistributedDataParallel

from block import MambaLM, State, generate, parameter_groups

matplotlib.use("Agg")            # figures are files: no window is opened

# Each value, a number, is also a flag: one that you add here is a flag, and is in every checkpoint.
RECIPE = dict(
    seed=0,                      # of weights, places in the text, and what is forgotten
    epochs=10,                   # with more, the validation loss rises again
    batch=32,                    # rows: places in the text that are read side by side
    block=128,                   # characters of each row per step; the gradient reaches back so far
    lr=1.5e-2,                   # at its peak; on held-out training text 1e-2 ends 0.02 nats higher
    weight_decay=0.3,            # strong: or half a million parameters would learn the million
                                 # characters by heart. 0.15 ends 0.02 nats higher there
    average=0.998,               # decay of the averaged weights, used to evaluate and to generate
    forget=0.05,                 # chance that a row forgets its state before a step
    d_model=128,
    layers=4,
)

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# --------------------------------------------------------------------------------------------------
# Training: the loop, and what it needs.

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # torchrun
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


def learning_rate(step, steps, peak):
    """A line from 0 to peak over the first tenth of the steps, then a cosine to 0."""
    part = (step + 1) / steps
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (part - 0.1) / 0.9)))
    return peak * min(part / 0.1, fall)


def batch(recipe, text, step):
    """Characters (b, block) of a step, and those that come next: a function of (seed, step).

    Row r of an epoch starts at start + r · length, and wraps around at the end of the text; b times
    length is about the text. The rows of this step begin where those of the last one ended.
    """
    b, block, n = recipe["batch"], recipe["block"], len(text.train)
    steps_per_epoch = (n - 1) // (b * block)
    epoch, i = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed_for(recipe["seed"], "start", epoch))
    start, length = torch.randint(n, (1,), generator=generator), steps_per_epoch * block
    rows = start + length * torch.arange(b).unsqueeze(1)                       # (b, 1)
    index = (rows + i * block + torch.arange(block + 1)) % n                   # (b, block+1)
    characters = text.train[index.to(text.train.device)]
    return characters[:, :-1], characters[:, 1:]


class Run(NamedTuple):
    """A finished training."""
    average: torch.nn.Module     # the averaged weights
    log: list                    # of each step: loss, fraction right, seconds of training so far
    scores: list                 # of each epoch: validation losses, streaming and in blocks
    parameters: int


def train(recipe, text, device, path, resume):
    """Train one model, saving to path: -> Run.

    Every random draw is a function of (seed, step). So a checkpoint holds no random state, and a
    run that was stopped goes on to the weights that it would have had.
    """
    b, block = recipe["batch"], recipe["block"]
    steps_per_epoch = (len(text.train) - 1) // (b * block)
    steps = recipe["epochs"] * steps_per_epoch
    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    try:
        model = MambaLM(len(text.vocabulary), recipe["d_model"], recipe["layers"]).to(device)
    except (ValueError, RuntimeError) as error:    # RuntimeError: too large for the memory
        sys.exit(f"train_shakespeare.py: no such model: {first_line(error)}")
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe["weight_decay"]),
                                  lr=recipe["lr"], betas=(0.9, 0.95))
    modules = {"model": model, "average": average, "optimizer": optimizer}
    step, states, log, scores = 0, None, [], []    # see Run; states: what the rows remember
    if resume:
        step, states, log, scores = load(path, recipe, text, modules, device)
    else:
        set_aside(path)
    # Saved at once: a folder that cannot be written is noticed now, and not in an hour.
    save(path, recipe, text, modules, step, states, log, scores)
    net = DistributedDataParallel(model) if PROCESSES > 1 else model
    parameters, size = sum(p.numel() for p in model.parameters()), len(text.vocabulary)
    print(f"{summary(text)}\nparameters {parameters}  seed {recipe['seed']}  device "
          f"{describe(device)}  torch {torch.__version__}\nloss of a blind guess ln {size} = "
          f"{math.log(size):.4f}\ncheckpoint {path}, step {step} of {steps}", flush=True)

    for epoch in range(len(scores), recipe["epochs"]):
        while step < (epoch + 1) * steps_per_epoch:
            start = time.perf_counter()

            # This step's learning rate, and its seed: whatever is drawn from here on in this step
            # (what is forgotten; a dropout, if you add one) is a function of (seed, step). Under
            # torchrun all processes draw the same, for the whole batch.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, recipe["lr"])
            torch.manual_seed(seed_for(recipe["seed"], "forget", step))

            # Which rows forget: a few, by chance. (Where an epoch begins, at other places in the
            # text, there are no states yet, and all begin anew.)
            forget = torch.rand(b, 1, 1) < recipe["forget"]

            # The next characters of each row; under torchrun each process takes its share of rows.
            inputs, targets, forget = (t.chunk(PROCESSES)[RANK].to(device)
                                       for t in (*batch(recipe, text, step), forget))

            # Forward: from the states that the last step left, except where a row forgets.
            if states is not None:
                states = [State(*(t.masked_fill(forget, 0) for t in state)) for state in states]
            logits, states = net(inputs, states)
            logits, targets = logits.flatten(0, 1), targets.flatten()
            loss = F.cross_entropy(logits, targets)

            # Backward: through these characters only. The states go on to the next step as numbers,
            # cut from the graph, or the gradient would reach back to the beginning of the epoch.
            # Clipped, so that one bad batch cannot throw the weights far.
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            states = [State(*(t.detach() for t in state)) for state in states]

            # What to log, and whether anybody asked to stop. Under torchrun all of that is averaged
            # over the processes, so that they agree and stop after the same step.
            hits = (logits.detach().argmax(1) == targets).float().mean()
            seen = torch.stack([loss.detach(), hits, torch.full_like(hits, len(STOP))])
            if PROCESSES > 1:
                dist.all_reduce(seen.div_(PROCESSES))
            loss, hits, stopping = seen.tolist()
            if not math.isfinite(loss) or not math.isfinite(norm):
                sys.exit(f"train_shakespeare.py: loss {loss:.3g}, gradient {norm:.3g} at step "
                         f"{step + 1}: not finite. Start again with a smaller --lr")

            # The update; then the average of the weights. Its decay begins at about 1 - 9/step, so
            # it spans the last ninth of the steps; later it spans some 1 / (1 - average) of them.
            optimizer.step()
            decay = min(recipe["average"], (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), model.parameters()):
                    mean.lerp_(weight, 1 - decay)

            # Log, show, and stop if asked to. Several processes have the states of their own rows
            # only, so they save where an epoch ends, and there alone.
            before = log[-1][2] if log else 0.0
            log.append((loss, hits, before + time.perf_counter() - start))
            step += 1
            if step % 20 == 0 and sys.stdout.isatty():     # log files stay short
                print("\r" + progress(log, steps, 100), end="  ", flush=True)
            if stopping and PROCESSES == 1:
                save(path, recipe, text, modules, step, states, log, scores)
            if stopping:
                raise KeyboardInterrupt

        # The end of an epoch: save, evaluate the averaged weights, save, and let them write. The
        # states are not needed any more: where the next epoch begins, every row forgets.
        states = None
        save(path, recipe, text, modules, step, states, log, scores)
        stream = stream_loss(average, text)
        blocks = block_losses(average, text, block).mean().item()
        scores.append((stream, blocks))
        save(path, recipe, text, modules, step, states, log, scores)
        begin = encode("\n" if "\n" in text.vocabulary else text.vocabulary[0], text.vocabulary)
        sample = generate(average, begin.to(device), 200, temperature=0.8,
                          seed=seed_for(recipe["seed"], "sample", len(scores)))
        sample = "".join(text.vocabulary[token] for token in sample).strip()
        print(("\r" if sys.stdout.isatty() else "")
              + f"  epoch {epoch + 1}" + progress(log, steps, steps_per_epoch) + "\n    validation "
              f"{stream:.4f} nats = {stream / math.log(2):.4f} bits streaming, {blocks:.4f} nats = "
              f"{blocks / math.log(2):.4f} bits in blocks\n      | "
              + sample.replace("\n", "\n      | "), flush=True)
    return Run(average, log, scores, parameters)


@torch.no_grad()
def stream_loss(model, text, piece=4096):
    """The whole validation text, read once from end to end: -> nats per character.

    The state is carried from piece to piece, so their size changes nothing but the memory needed.
    """
    total, states, tokens = 0.0, None, text.valid
    for x, y in zip(tokens[:-1].split(piece), tokens[1:].split(piece)):
        if STOP and PROCESSES == 1:      # several processes stop together, at the next step
            raise KeyboardInterrupt
        logits, states = model(x.unsqueeze(0), states)
        total += F.cross_entropy(logits[0], y, reduction="sum").item()
    return total / (len(tokens) - 1)


@torch.no_grad()
def block_losses(model, text, block):
    """The same in blocks that are read on their own: -> the loss of each character, (N - 1,).

    What a Transformer with a context of so many characters would be asked.
    """
    x, y, losses = text.valid[:-1], text.valid[1:], []
    even = len(x) // block * block
    batches = list(zip(x[:even].view(-1, block).split(64), y[:even].view(-1, block).split(64)))
    if even < len(x):                    # the rest of the text, shorter than a block
        batches.append((x[None, even:], y[None, even:]))
    for inputs, targets in batches:
        if STOP and PROCESSES == 1:
            raise KeyboardInterrupt
        logits, _ = model(inputs)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))
    return torch.cat(losses)


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
        sys.exit(f"train_shakespeare.py: there is no device {name} here: use --device cpu")
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
        sys.exit(f"train_shakespeare.py: cannot write {path} ({first_line(error)}): is the disk "
                 f"full, or the folder read-only? What was there before is untouched")


def write_rows(path, rows):
    """A CSV file of dictionaries that have the same keys; an earlier one is set aside."""
    def make(part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    set_aside(path)
    write(path, make)


def set_aside(path):
    """Rename what is at path: whoever forgets --resume, or a --name, loses nothing."""
    if RANK == 0 and os.path.exists(path):
        old = next(old for i in itertools.count(1) if not os.path.exists(old := f"{path}.old{i}"))
        try:
            os.replace(path, old)
        except OSError as error:
            sys.exit(f"train_shakespeare.py: cannot rename {path} ({first_line(error)})")
        print(f"an earlier {path} was there, and is now {old}")


def save(path, recipe, text, modules, step, states, log, scores):
    """A checkpoint: all that `train` needs to go on, and that others need to rebuild the model."""
    state = {"recipe": recipe, "text": summary(text), "vocabulary": text.vocabulary, "step": step,
             "states": states and [list(state) for state in states], "log": log, "scores": scores,
             **{name: module.state_dict() for name, module in modules.items()}}
    if RANK == 0:
        write(path, lambda part: torch.save(state, part))


def read_checkpoint(path):
    """What `save` wrote. Raises whatever zipfile and torch make of a missing or damaged file."""
    with zipfile.ZipFile(path) as archive:         # torch.load does not look at the checksums
        if archive.testzip():
            raise ValueError("a checksum is wrong")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)     # runs no code
    except pickle.UnpicklingError:       # torch's own words tell how to run it all the same
        raise ValueError("it holds more than numbers, and might run code: delete it") from None


def load(path, recipe, text, modules, device):
    """Fill the modules from a checkpoint: -> step, states, log, scores; or end with one line."""
    try:
        state = read_checkpoint(path)
        # A setting that is newer than the checkpoint is not in it: it had its default then.
        theirs = RECIPE | state["recipe"] | {"text": state["text"]}
        ours = recipe | {"text": summary(text)}
        if other := [key for key in ours if theirs[key] != ours[key]]:
            raise ValueError(f"made with {other[0]} {theirs[other[0]]}, not {ours[other[0]]}")
        if PROCESSES > 1 and state["states"]:
            raise ValueError("saved within an epoch by one process, which must go on alone")
        for name, module in modules.items():
            module.load_state_dict(state[name])
        states = state["states"] and [State(*(t.to(device) for t in s)) for s in state["states"]]
        return state["step"], states, state["log"], state["scores"]
    except Exception as error:
        sys.exit(f"train_shakespeare.py: cannot go on from {path} ({first_line(error)}): start "
                 f"without --resume, or use the settings that made it")


def load_model(path, device):
    """The averaged MambaLM of a checkpoint, and its vocabulary, or one line and the end.

    The vocabulary belongs to the weights: token 5 is a letter only by its place in there.
    """
    try:
        state = read_checkpoint(path)
        model = MambaLM(len(state["vocabulary"]), state["recipe"]["d_model"],
                        state["recipe"]["layers"])
        model.load_state_dict(state["average"])
        return model.to(device).eval(), state["vocabulary"]
    except Exception as error:
        sys.exit(f"train_shakespeare.py: cannot read a model from {path} ({first_line(error)}): "
                 f"train one by python train_shakespeare.py, or name another with --checkpoint")


def first_line(error):
    """What went wrong, in one line; the type of the error if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------------
# The text: Shakespeare where it can be had, Python's help texts where not.

class Text(NamedTuple):
    """A text as tokens. Its vocabulary goes into the checkpoint: to generate takes no text file."""
    name: str                    # what every result carries
    vocabulary: str              # its characters; a token is a place in here
    train: torch.Tensor          # (N,) int64
    valid: torch.Tensor


def summary(text):
    """Name, sizes, and a hash: a checkpoint goes on with the same text only."""
    digest = hashlib.sha256(torch.cat([text.train, text.valid]).cpu().numpy().tobytes()).hexdigest()
    return (f"{text.name}: {len(text.train):,} characters for training, {len(text.valid):,} for "
            f"validation, vocabulary {len(text.vocabulary)}, sha256 {digest[:16]}")


def encode(string, vocabulary):
    """-> (l,) int64. Ends with one line for a character that is not in the vocabulary."""
    unknown = "".join(sorted(set(string) - set(vocabulary)))
    if unknown or not string:
        sys.exit("train_shakespeare.py: the prompt " + (
            f"has {unknown!r}, which the model has never seen" if unknown else "is empty"))
    return torch.tensor([vocabulary.index(character) for character in string])


def as_text(name, string):
    """The first 90 % for training and the last 10 % for validation: -> Text.

    Not a random part: neighbouring lines know too much about each other.
    """
    vocabulary = "".join(sorted(set(string)))
    place = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([place[character] for character in string], dtype=torch.int64)
    cut = len(tokens) * 9 // 10
    return Text(name, vocabulary, tokens[:cut], tokens[cut:])


def load_text(data_dir, source="auto", path=None):
    """The file at path, or else TinyShakespeare from data_dir, downloaded if need be: -> Text.

    source    "auto": Python's help texts if it cannot be had; "real" and "synthetic" insist
    Ends with one line if a file is missing, damaged or no UTF-8, or if "real" cannot be had.
    """
    if path is not None:
        name, digest = text_name(path), None
    elif source == "synthetic":
        return help_texts()
    else:
        name, digest, path = "shakespeare", SHA256, os.path.join(data_dir, "tinyshakespeare.txt")
    try:
        if digest and not os.path.exists(path):
            socket.setdefaulttimeout(10)           # a download that stalls is given up
            os.makedirs(data_dir, exist_ok=True)
            torch.hub.download_url_to_file(URL, path, digest, progress=False)      # verifies it
        with open(path, encoding="utf-8") as file:
            string = file.read()
        if digest and hashlib.sha256(string.encode()).hexdigest() != digest:
            raise ValueError("this is not the published text: delete it")
        return as_text(name, string)
    except Exception as error:           # no network, a broken download, no file, no UTF-8
        problem = f"cannot read or download {path} ({first_line(error)})"
        if digest is None:
            sys.exit(f"train_shakespeare.py: {problem}: --text wants a file in UTF-8")
        # A file that is damaged is an accident that should be noticed: nothing stands in for it.
        if source == "real" or os.path.exists(path):
            sys.exit(f"train_shakespeare.py: {problem}: connect to the network, give a UTF-8 text "
                     f"by --text, or use --data synthetic")
        print(f"{'!' * 100}\n{problem}.\nTraining on SYNTHETIC data instead, the help texts of "
              f"Python: results say nothing about Shakespeare.\n{'!' * 100}", flush=True)
        return help_texts()


def text_name(path):
    """What results of the user's own text are called: text-war for books/war.txt."""
    return "text-" + os.path.splitext(os.path.basename(path))[0]


def file_name(name, quick=False):
    """What the files of a text are called."""
    return (name + ("-quick" if quick else "")).replace("-", "_")


def help_texts():
    """What `help()` says about Python's syntax; it comes with every CPython.

    465,000 characters of English: enough to see a model learn words, without a network.
    """
    from pydoc_data.topics import topics
    return as_text("synthetic-pydoc", "\n\n".join(topics[name] for name in sorted(topics)))


# --------------------------------------------------------------------------------------------------
# Results: a row per run, a table, a figure. A row says which command made it, and on what machine;
# a number in the README comes from such a row.

def changed(recipe):
    """What differs from RECIPE, as "lr=0.001,layers=2"; but for the seed, which has a column."""
    return ",".join(f"{key}={value}" for key, value in recipe.items()
                    if value != RECIPE[key] and key != "seed")


def result(recipe, text, device, run):
    """The row of a finished run; printed as a RESULT line, which is easy to find with grep.

    The losses are those of the last epoch, not of the best one.
    """
    (stream, blocks), bit = run.scores[-1], math.log(2)
    row = {"dataset": text.name, "seed": recipe["seed"], "params": run.parameters,
           "epochs": recipe["epochs"], "val_loss_stream": f"{stream:.4f}",
           "val_loss_block": f"{blocks:.4f}", "val_bits_stream": f"{stream / bit:.4f}",
           "val_bits_block": f"{blocks / bit:.4f}", "seconds": f"{run.log[-1][2]:.0f}",
           "recipe": f"shakespeare:{changed(recipe)}".strip(":")}
    print("RESULT " + " ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row | {"device": describe(device), "torch": torch.__version__,
                  "command": "python " + shlex.join(sys.argv)}


def print_table(rows):
    """The README's table: mean ± standard deviation (n - 1) over the seeds."""
    print("\n| validation loss | nats per character | bits per character |\n|---|---|---|")
    for way in ("stream", "block"):
        cells = []
        for unit in ("loss", "bits"):
            values = torch.tensor([float(row[f"val_{unit}_{way}"]) for row in rows]).double()
            spread = f" ± {values.std():.4f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.4f}{spread}")
        print(f"| {way} | {cells[0]} | {cells[1]} |")


def draw_loss(path, runs, recipe, text, title):
    """Left: losses over characters read. Right: losses over the place in a block.

    At the first character of a block the model knows nothing but that character; further on it
    knows the block so far. Where the right curve meets the line of the streaming loss, more memory
    does not help any more.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    gray, red, blue, block = "#7f7f7f", "#d62728", "#1f77b4", recipe["block"]
    per_step, seen = recipe["batch"] * block / 1e6, []
    for i, (average, log, scores, _) in enumerate(runs):
        hidden = "_" if i else ""        # a label that begins so stays out of the legend
        losses = torch.tensor(log)[:, 0]
        width = max(1, len(losses) // 100)                 # steps that a point is the mean of
        losses = losses.unfold(0, width, width).mean(1)
        axes[0].plot(per_step * width * torch.arange(1, len(losses) + 1), losses, color=gray,
                     linewidth=1, label=hidden + "training")
        ends = per_step * len(log) / len(scores) * torch.arange(1, len(scores) + 1)
        for way, color, name in ((1, blue, "in blocks"), (0, red, "streaming")):
            axes[0].plot(ends, [score[way] for score in scores], "o-", color=color, markersize=3,
                         label=f"{hidden}validation, {name}")
        losses = block_losses(average, text, block).cpu()
        seen.append(losses[:len(losses) // block * block].view(-1, block).mean(0))     # (block,)
    # The first losses are far above the rest, and would squeeze it into a flat line: cut them off.
    low, high = axes[0].get_ylim()
    axes[0].set(xlabel="characters read (millions)", ylabel="loss (nats per character)",
                ylim=(low, min(high, low + 1)))
    seen, ends = torch.stack(seen).mean(0), [2 ** i for i in range(30) if 2 ** i < block] + [block]
    bins = [(start + 1, end) for start, end in zip([0] + ends, ends)]      # 1, 2, 3–4, 5–8, …
    axes[1].plot([f"{start}–{end}" if start < end else f"{end}" for start, end in bins],
                 [seen[start - 1:end].mean() for start, end in bins], "o-", color=blue,
                 label="in blocks")
    axes[1].axhline(sum(run.scores[-1][0] for run in runs) / len(runs), color=red,
                    label="streaming: mean over the text")
    axes[1].set(xlabel="place in the block (characters)", ylabel="validation loss (nats)")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
        ax.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    write(path, lambda part: figure.savefig(part, dpi=120, format="png"))


# --------------------------------------------------------------------------------------------------
# Writing.

def write_text(args, model, vocabulary, device):
    """Continue a prompt on stdout, as it comes; at the end, say on stderr how fast it came.

    The speed does not depend on how much is written: try --tokens 100000.
    """
    prompt = encode(args.generate, vocabulary).to(device)
    print(args.generate, end="", flush=True)
    start = time.perf_counter()
    for token in generate(model, prompt, args.tokens, temperature=args.temperature,
                          top_k=args.top_k, seed=args.seed):
        print(vocabulary[token], end="", flush=True)
    speed = args.tokens / (time.perf_counter() - start)
    print(f"\n\n{args.tokens:,} characters, {speed:,.0f} per second", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The command line.

def parse(arguments):
    """-> all flags, and the recipe: the settings, with what the flags change.

    Each setting of RECIPE becomes a flag of the same type, with its value as the default.
    """
    p = argparse.ArgumentParser(
        allow_abbrev=False, usage="train_shakespeare.py [--flag value ...]    (--help lists them)",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The first {len(RECIPE)} flags are the settings of the training: the comments in "
               f"RECIPE, at the top of this file, explain them.")
    add = p.add_argument
    for setting, value in RECIPE.items():
        add("--" + setting.replace("_", "-"), type=type(value), default=value,
            metavar=type(value).__name__, help=f"default {value}")
    add("--seeds", type=int, nargs="+", help="train once with each, then write table and figure")
    add("--name", help="what the files of a run or table are called; default: the text")
    add("--quick", action="store_true", help="one epoch of 164,000 characters")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--text", metavar="FILE", help="train on this text, UTF-8")
    add("--generate", metavar="PROMPT", help="write instead of training; --seed: another text")
    add("--tokens", type=int, default=1000, help="characters to write, default %(default)s")
    add("--temperature", type=float, default=0.8,
        help="1: as the model has it; 0: always the most likely; default %(default)s")
    add("--top-k", type=int, help="draw among so many characters only, default all")
    add("--checkpoint", help="to write from; default: that of the text and seed 0")
    add("--data", choices=["auto", "real", "synthetic"], default="auto",
        help="auto: Python's help texts if TinyShakespeare cannot be had; default %(default)s")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints, default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    # --quick changes a default, and no more: an --epochs that is given still counts.
    if "--quick" in arguments:
        p.set_defaults(epochs=1)
    args = p.parse_args(arguments)
    recipe = {setting: getattr(args, setting) for setting in RECIPE}
    for setting, value in [*vars(args).items(), *(("seeds", seed) for seed in args.seeds or [])]:
        low = 1 if setting in ("epochs", "batch", "block", "d_model", "tokens", "top_k") else 0
        high = 1 if setting in ("average", "forget") else 10 ** 9
        if isinstance(value, (int, float)) and not low <= value <= high:
            p.error(f"--{setting.replace('_', '-')} must be from {low} to {high}, got {value}")
    if args.seeds and {"--seed"} & {argument.split("=")[0] for argument in arguments}:
        p.error("--seed is for one run, and --seeds for several")
    if args.checkpoint and args.generate is None:
        p.error("--checkpoint is for --generate; --resume takes the file of --out and --name")
    if args.seeds and not args.name and not args.quick and changed(recipe):
        p.error("a table with other settings than those of RECIPE needs a --name for its files")
    return args, recipe


def main():
    """Write a text; or train one model; or, with --seeds, several: then a table and a figure."""
    args, recipe = parse(sys.argv[1:])
    device = choose_device(args.device)
    if args.generate is not None:
        torch.set_num_threads(1)         # products this small gain nothing from a second thread
        texts = [text_name(args.text)] if args.text else ["shakespeare", "synthetic-pydoc"]
        names = [args.name or file_name(text, args.quick) for text in texts]
        paths = [os.path.join(args.out, f"{name}-seed0.pt") for name in names]
        path = args.checkpoint or next(filter(os.path.exists, paths), paths[0])
        write_text(args, *load_model(path, device), device)
        return

    if recipe["batch"] % PROCESSES:
        sys.exit(f"train_shakespeare.py: {PROCESSES} processes cannot share {recipe['batch']} rows")
    if PROCESSES > 1:                    # the first one prints, downloads and writes files
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            dist.barrier()
    text = load_text(args.data_dir, args.data, args.text)
    if PROCESSES > 1 and RANK == 0:
        dist.barrier()
    if args.quick:
        text = Text(text.name + "-quick", text.vocabulary, text.train[:164000], text.valid[:16000])
    if len(text.train) <= args.batch * args.block or len(text.valid) <= args.block:
        sys.exit(f"train_shakespeare.py: {text.name} has {len(text.train)} characters for training "
                 f"and {len(text.valid)} for validation, too few for a step of {args.batch} rows "
                 f"of {args.block}: use a smaller --batch and --block")
    text = text._replace(train=text.train.to(device), valid=text.valid.to(device))

    # Ctrl-C must not hit between the gradient and the update: the step is done, then all is saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    name, rows, runs = args.name or file_name(text.name), [], []
    seeds = list(dict.fromkeys(args.seeds or [args.seed]))
    for seed in seeds:
        settings, path = recipe | {"seed": seed}, os.path.join(args.out, f"{name}-seed{seed}.pt")
        resume = args.resume and (os.path.exists(path) or not args.seeds)
        runs.append(train(settings, text, device, path, resume))
        rows.append(result(settings, text, device, runs[-1]))
    if RANK == 0 and args.seeds:
        write_rows(f"results/{name}.csv", rows)
        draw_loss(f"figures/{name}_loss.png", runs, recipe, text,
                  f"{text.name}, seeds {', '.join(map(str, seeds))}")
        print_table(rows)
    if PROCESSES > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):   # the latter: `| head` has seen enough
        print("\ntrain_shakespeare.py: stopped; a training goes on with --resume", file=sys.stderr)
        os._exit(130)                    # at once: PyTorch's clean-up takes most of a second
