"""train_shakespeare.py: the same block writes text, from a state of constant size.

    python train_shakespeare.py                        train, 10 epochs: 20 minutes on one core
    python train_shakespeare.py --quick                a first look in under a minute
    python train_shakespeare.py --generate "ROMEO:"    write from the checkpoint
    python train_shakespeare.py --text FILE            any UTF-8 text in place of Shakespeare
    python train_shakespeare.py --seeds 0 1 2          one model per seed: table and figure
    python train_shakespeare.py --resume               go on after Ctrl-C, to the same weights
    torchrun --nproc_per_node=2 train_shakespeare.py   each of two processes takes half the batch

A token is a character. The loss is -ln p of the next character, in nats, or -log₂ p, in bits. The
model is trained on the first 90 % of the text. The validation loss is measured on the last 10 %, in
two ways. In blocks, the model forgets everything after 128 characters. Streaming, it reads from one
end to the other and carries its state; this costs no more, and is the point of a recurrence. Expect
1.42 nats streaming.

Training carries the state from batch to batch, as generation does. The rows of a batch are 32
places in the text. The next batch goes on where this one stopped, from the states that it left
behind; the gradient stops there (truncated backpropagation through time). Each epoch reads the text
once, from a new random offset. Now and then a row forgets its state, so that the model also learns
to begin. All of this is in `train`.

Without a network and without a file, the help texts of Python itself stand in for Shakespeare. The
script announces this, and all results carry their name.

Files, checkpoints, devices and the line of progress are as in train_mnist.py, and imported from it.
Read before: block.py, train_mnist.py. Read next: visualize_delta.py.
"""
import argparse
import copy
import hashlib
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel

from block import MambaLM, State, generate, graphed, parameter_groups
from s6 import check_folders, write, write_rows
from train_mnist import (KINDS, PROCESSES, RANK, SAVE_EVERY, choose_device, describe, finished,
                         first_line, learning_rate, mean_sd, progress, read_checkpoint, resume_from,
                         run_script, save_checkpoint, seed_for, whole)

# Each setting is also a flag, and is saved in every checkpoint. The same holds for one that you
# add: a number or a string.
RECIPE = dict(
    seed=0,                      # of weights, places in the text, and what is forgotten
    epochs=10,                   # with more, the validation loss rises again
    batch=32,                    # rows: places in the text that are read side by side
    block=128,                   # characters of each row per step; the gradient reaches back so far
    lr=1.5e-2,                   # at its peak; on held-out training text 1e-2 ends 0.02 nats higher
    weight_decay=0.3,            # strong: half a million parameters could learn the million
                                 # characters by heart. On held-out training text 0.15 ends
                                 # 0.02 nats higher
    average=0.998,               # highest decay of the averaged weights, used to evaluate and to
                                 # generate; in 2,450 steps it comes to 0.996
    forget=0.05,                 # chance that a row forgets its state before a step
    discretization="euler",      # as Mamba's authors have it; or "zoh", zero-order hold: see s6.py
    d_model=128,
    layers=4,
)

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# --------------------------------------------------------------------------------------------------
# Training: the loop, and what it needs.

class Run(NamedTuple):
    """A finished training."""
    average: torch.nn.Module     # the averaged weights
    log: list                    # of each step: loss, fraction right, seconds of training so far
    scores: list                 # of each epoch: validation losses, streaming and in blocks


def train(recipe, text, device, path, resume):
    """Train one model, saving to path: -> Run.

    Every random draw is a function of (seed, step). So a checkpoint needs no random state, and a
    training that was killed goes on from the last checkpoint to the weights it would have had.
    """
    b, block = recipe["batch"], recipe["block"]
    steps_per_epoch = (len(text.train) - 1) // (b * block)
    steps = recipe["epochs"] * steps_per_epoch
    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    model = build(recipe, text.vocabulary).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    groups = parameter_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    # The rule: whatever lives from one step to the next must be in the checkpoint, or a resumed
    # training ends in other weights. These are the modules, and of the past the log, which counts
    # the steps; the scores; and the states, which are what the rows remember.
    modules = {"model": model, "average": average, "optimizer": optimizer}
    facts = {"recipe": recipe, "data": facts_of(text)}
    past = {"log": [], "scores": [], "states": None}
    if resume:
        past = resume_from(path, facts, past, modules, RECIPE)
    log, scores, states = past["log"], past["scores"], past["states"]
    if states and PROCESSES > 1:
        raise ValueError(f"{path} was saved within an epoch: go on without torchrun")
    # The first save comes at once: so a folder that cannot be written is noticed now.
    save_checkpoint(path, facts, past, modules, keep_old=not resume)
    print_opening(recipe, text, model, device)
    print(f"checkpoint {path}, step {len(log)} of {steps}", flush=True)
    net = model
    if PROCESSES > 1:
        net = DistributedDataParallel(model)
    elif device.type == "cuda":          # or the GPU would mostly wait for Python
        inputs, _ = batch(recipe, text, 0)
        net = graphed(model, inputs, model.empty_states(b))

    on_screen = sys.stdout is not None and sys.stdout.isatty()     # log files stay short
    for step in range(len(log), steps):
        start = time.perf_counter()

        # This step's learning rate and seed. Whatever is drawn from here on in this step (what is
        # forgotten; a dropout, if you add one) depends on (seed, step) alone, and is the same in
        # all processes, for the whole batch.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        torch.manual_seed(seed_for(recipe["seed"], "forget", step))
        forget = torch.rand(b, 1, 1) < recipe["forget"]            # by chance, a few rows

        # The characters of each row, and those that come next; under torchrun each process takes
        # its share of rows.
        inputs, targets = batch(recipe, text, step)
        share = [t.chunk(PROCESSES)[RANK].to(device) for t in (inputs, targets, forget)]
        inputs, targets, forget = share

        # Forward: from the states that the last step left, except where a row forgets. Where an
        # epoch begins, at other places in the text, all rows begin anew. (The states of a
        # checkpoint come from the CPU.)
        if states is None:
            states = model.empty_states(len(inputs))
        states = [State(*(t.to(device).masked_fill(forget, 0) for t in state)) for state in states]
        logits, states = net(inputs, states)                       # (b, block, vocabulary)
        logits, targets = logits.flatten(0, 1), targets.flatten()
        loss = F.cross_entropy(logits, targets)

        # Backward: through these characters only. The states go on to the next step as numbers,
        # cut from the graph, or the gradient would reach back to the beginning of the epoch.
        # Clipping keeps one bad batch from throwing the weights far.
        optimizer.zero_grad()
        loss.backward()
        states = [State(*(t.detach() for t in state)) for state in states]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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

        # At the end of an epoch, validate the averaged weights and let them write a few lines. Save
        # then, and every SAVE_EVERY steps. Under torchrun, save only at the end of an epoch: each
        # process knows the states of its own rows alone, and there no states are needed.
        epoch_ends = (step + 1) % steps_per_epoch == 0
        if epoch_ends:
            states = None
            stream = stream_loss(average, text)
            scores.append((stream, block_losses(average, text, block).mean().item()))
            print(f"  epoch {len(scores)}{progress(log, steps, steps_per_epoch)}")
            print_epoch(average, text, recipe, scores)
        if epoch_ends or ((step + 1) % SAVE_EVERY == 0 and PROCESSES == 1):
            past["states"] = None
            if states:                   # as lists: a checkpoint holds no class of ours
                past["states"] = [list(state) for state in states]
            save_checkpoint(path, facts, past, modules)
    return Run(average, log, scores)


def build(recipe, vocabulary):
    """The model of a recipe: -> MambaLM. Raises ValueError for an unknown discretization."""
    settings = {key: recipe[key] for key in ("d_model", "layers", "discretization")}
    return MambaLM(len(vocabulary), **settings)


def batch(recipe, text, step):
    """Characters (b, block) of a step, and those that come next: a function of (seed, step).

    Row r of an epoch starts at start + r · length, and wraps around at the end of the text. With
    length = steps_per_epoch · block the b rows together cover almost the whole text. Each row of
    this step begins where the same row of the last step ended.
    """
    b, block, n = recipe["batch"], recipe["block"], len(text.train)
    steps_per_epoch = (n - 1) // (b * block)
    epoch, i = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed_for(recipe["seed"], "start", epoch))
    start = torch.randint(n, (1,), generator=generator)
    length = steps_per_epoch * block
    rows = start + length * torch.arange(b).unsqueeze(1)           # (b, 1)
    index = (rows + i * block + torch.arange(block + 1)) % n       # (b, block+1)
    characters = text.train[index.to(text.train.device)]
    return characters[:, :-1], characters[:, 1:]


@torch.no_grad()
def stream_loss(model, text, piece=4096):
    """The whole validation text, read once from end to end: -> nats per character.

    The state is carried from piece to piece, so their size changes nothing but the memory needed.
    """
    total, states, tokens = 0.0, None, text.valid
    for x, y in zip(tokens[:-1].split(piece), tokens[1:].split(piece)):
        logits, states = model(x.unsqueeze(0), states)
        total += F.cross_entropy(logits[0], y, reduction="sum").item()
    return total / (len(tokens) - 1)


@torch.no_grad()
def block_losses(model, text, block):
    """The validation text in blocks, each read from an empty state: -> nats (N - 1,).

    A Transformer whose context is one block long would be measured in this way.
    """
    x, y = text.valid[:-1], text.valid[1:]
    even = len(x) // block * block
    inputs = list(x[:even].view(-1, block).split(64))
    targets = list(y[:even].view(-1, block).split(64))
    if even < len(x):                    # the rest of the text, shorter than a block
        inputs.append(x[None, even:])
        targets.append(y[None, even:])
    losses = []
    for some, following in zip(inputs, targets):
        logits = model(some)[0].flatten(0, 1)
        losses.append(F.cross_entropy(logits, following.flatten(), reduction="none"))
    return torch.cat(losses)


# --------------------------------------------------------------------------------------------------
# What is printed while a training runs.

def print_opening(recipe, text, model, device):
    """What is trained, on what, and the loss to begin with."""
    parameters = sum(p.numel() for p in model.parameters())
    train, valid, size = len(text.train), len(text.valid), len(text.vocabulary)
    print(f"{text.name}: {train:,} characters for training, {valid:,} for validation")
    print(f"parameters {parameters}  seed {recipe['seed']}")
    print(f"device {describe(device)}, torch {torch.__version__}")
    print(f"loss of a blind guess ln {size} = {math.log(size):.4f}")


def print_epoch(model, text, recipe, scores):
    """Both validation losses, and 200 characters that the model writes."""
    for way, nats in zip(("streaming", "in blocks"), scores[-1]):
        print(f"    validation {nats:.4f} nats = {nats / math.log(2):.4f} bits {way}")
    first = "\n" if "\n" in text.vocabulary else text.vocabulary[0]
    prompt = encode(first, text.vocabulary).to(text.train.device)
    seed = seed_for(recipe["seed"], "sample", len(scores))
    tokens = generate(model, prompt, 200, temperature=0.8, seed=seed)
    sample = "".join(text.vocabulary[token] for token in tokens).strip()
    print("      | " + sample.replace("\n", "\n      | "), flush=True)


# --------------------------------------------------------------------------------------------------
# Checkpoints: saved and resumed by train_mnist.py.

def load_model(path, device):
    """The averaged MambaLM of a checkpoint, and its vocabulary. Raises ValueError if it has none.

    The vocabulary belongs to the weights: token 5 is a letter only by its place in there.
    """
    checkpoint = read_checkpoint(path)
    vocabulary = checkpoint.get("data", {}).get("vocabulary")
    if vocabulary is None:
        raise ValueError(f"{path} holds no language model")
    model = build(RECIPE | checkpoint["recipe"], vocabulary)
    try:
        model.load_state_dict(checkpoint["average"])
    except RuntimeError as error:
        raise ValueError(f"{path} is by another version of this code") from error
    return model.to(device).eval(), vocabulary


# --------------------------------------------------------------------------------------------------
# The text: Shakespeare where it can be had, Python's help texts where not.

class Text(NamedTuple):
    """A text as tokens. Its vocabulary goes into the checkpoint: to generate takes no text file."""
    name: str                    # what every result carries
    vocabulary: str              # its characters; a token is a place in here
    train: torch.Tensor          # (N,) int64
    valid: torch.Tensor


def facts_of(text):
    """What a checkpoint says of its text: the vocabulary, which belongs to the weights; a hash."""
    digest = hashlib.sha256(text.vocabulary.encode())
    for tokens in (text.train, text.valid):
        digest.update(tokens.cpu().numpy())
    sizes = f"{len(text.train):,} + {len(text.valid):,} characters"
    fingerprint = f"{sizes}, sha256 {digest.hexdigest()[:16]}"
    return {"name": text.name, "vocabulary": text.vocabulary, "fingerprint": fingerprint}


def encode(string, vocabulary):
    """-> (l,) int64. Raises ValueError for a character that is not in the vocabulary."""
    unknown = "".join(sorted(set(string) - set(vocabulary)))
    if unknown:
        raise ValueError(f"the prompt has {unknown!r}, which the model has never seen")
    if not string:
        raise ValueError("the prompt is empty")
    return torch.tensor([vocabulary.index(character) for character in string])


def as_text(name, string):
    """The first 90 % for training and the last 10 % for validation: -> Text.

    Not random lines: a line says much about its neighbours, and the model would have seen them.
    """
    vocabulary = "".join(sorted(set(string)))
    place = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([place[character] for character in string], dtype=torch.int64)
    cut = len(tokens) * 9 // 10
    return Text(name, vocabulary, tokens[:cut], tokens[cut:])


def load_text(data_dir, source="auto", path=None):
    """The file at path, or else TinyShakespeare from data_dir, downloaded if need be: -> Text.

    source    "auto": Python's help texts if it cannot be had; "real" and "synthetic" insist
    Raises OSError or ValueError if a file is missing, damaged or not UTF-8.
    """
    if path is not None:
        return as_text(text_name(path), read_text(path))
    if source == "synthetic":
        return help_texts()
    path = os.path.join(data_dir, "tinyshakespeare.txt")
    try:
        return as_text("shakespeare", read_shakespeare(path))
    except Exception as error:           # no network, a broken download, a damaged file
        problem = f"cannot read or download {path} ({first_line(error)})"
        # A file that is damaged is an accident that should be noticed: nothing stands in for it.
        if source == "real" or os.path.exists(path):
            raise ValueError(f"{problem}: connect to the network, or use --text FILE or "
                             f"--data synthetic") from error
    print("!" * 100)
    print(f"{problem}.\nTraining on SYNTHETIC data instead, the help texts of Python: results say "
          f"nothing about Shakespeare.")
    print("!" * 100, flush=True)
    return help_texts()


def read_text(path):
    """A UTF-8 file, with or without a byte order mark: -> str."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from error


def read_shakespeare(path):
    """TinyShakespeare from path, downloaded if need be. Raises ValueError for another text."""
    if not os.path.exists(path):
        socket.setdefaulttimeout(10)     # a download that stalls is given up
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        torch.hub.download_url_to_file(URL, path, SHA256, progress=False)
    string = read_text(path)
    if hashlib.sha256(string.encode()).hexdigest() != SHA256:
        raise ValueError("this is not the published text: delete it")
    return string


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
                    if key != "seed" and value != RECIPE[key])


def result(recipe, text, device, trained):
    """The row of a finished run. The losses are those of the last epoch, not of the best one."""
    stream, blocks = trained.scores[-1]
    bit = math.log(2)
    return finished({
        "dataset": text.name,
        "seed": recipe["seed"],
        "params": sum(p.numel() for p in trained.average.parameters()),
        "epochs": recipe["epochs"],
        "val_loss_stream": f"{stream:.4f}",
        "val_loss_block": f"{blocks:.4f}",
        "val_bits_stream": f"{stream / bit:.4f}",
        "val_bits_block": f"{blocks / bit:.4f}",
        "seconds": f"{trained.log[-1][2]:.0f}",
        "recipe": f"shakespeare:{changed(recipe)}".strip(":"),
    }, device)


def print_table(rows):
    """The table of results/README.md: mean ± standard deviation (n - 1) over the seeds."""
    print("\n| validation loss | nats per character | bits per character |\n|---|---|---|")
    for way in ("stream", "block"):
        cells = [way]
        for unit in ("loss", "bits"):
            cells.append(mean_sd([float(row[f"val_{unit}_{way}"]) for row in rows], 4))
        print(f"| {' | '.join(cells)} |")


def draw_loss(path, runs, recipe, text, title):
    """Left: losses over characters read. Right: losses over the place in a block.

    At the first character of a block the model knows nothing but that character; further on it
    knows the block so far. Where the right curve meets the line of the streaming loss, more memory
    does not help any more.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    red, blue, block = "#d62728", "#1f77b4", recipe["block"]
    millions = recipe["batch"] * block / 1e6               # characters per step
    places = []
    for i, run in enumerate(runs):
        hidden = "_" if i else ""        # a label that begins so stays out of the legend
        losses = torch.tensor(run.log)[:, 0]
        width = max(1, len(losses) // 100)                 # steps that a point is the mean of
        losses = losses.unfold(0, width, width).mean(1)
        read = millions * width * torch.arange(1, len(losses) + 1)
        left.plot(read, losses, color="#7f7f7f", linewidth=1, label=hidden + "training")

        stream, blocks = zip(*run.scores)
        read = millions * len(run.log) / len(stream) * torch.arange(1, len(stream) + 1)
        style = dict(marker="o", markersize=3)
        left.plot(read, blocks, color=blue, label=hidden + "validation, in blocks", **style)
        left.plot(read, stream, color=red, label=hidden + "validation, streaming", **style)

        losses = block_losses(run.average, text, block).cpu()
        even = losses[:len(losses) // block * block]
        places.append(even.view(-1, block).mean(0))        # (block,)
    # The first losses are far above the rest, and would squeeze it into a flat line: cut them off.
    low, high = left.get_ylim()
    left.set_ylim(low, min(high, low + 1))
    left.set(xlabel="characters read (millions)", ylabel="loss (nats per character)")

    places = torch.stack(places).mean(0)
    start, names, means = 0, [], []
    while start < block:                                   # places 1, 2, 3–4, 5–8, …
        end = min(max(1, 2 * start), block)
        names.append(f"{start + 1}–{end}" if end > start + 1 else f"{end}")
        means.append(places[start:end].mean())
        start = end
    right.plot(names, means, "o-", color=blue, label="in blocks")
    mean = sum(run.scores[-1][0] for run in runs) / len(runs)
    right.axhline(mean, color=red, label="streaming: mean over the text")
    right.set(xlabel="place in the block (characters)", ylabel="validation loss (nats)")
    for ax in (left, right):
        ax.grid(alpha=0.3, which="both")
        ax.legend(frameon=False)
    figure.suptitle(title, fontsize=10, parse_math=False)      # a name of the user's may have a $
    write(path, lambda file: figure.savefig(file, dpi=120, format="png"))


# --------------------------------------------------------------------------------------------------
# Writing.

def find_checkpoint(args):
    """The checkpoint that --generate uses: of a full training if there is one."""
    texts = [text_name(args.text)] if args.text else ["shakespeare", "synthetic-pydoc"]
    names = [args.name or file_name(text, quick) for quick in (False, True) for text in texts]
    paths = [os.path.join(args.out, f"{name}-seed0.pt") for name in names]
    for path in paths:
        if os.path.exists(path):
            return path
    raise ValueError(f"there is no {paths[0]}: train a model, or name one by --checkpoint")


def write_text(args, device):
    """Continue a prompt on stdout, as it comes; at the end, say on stderr how fast it came.

    The speed does not depend on how much is written: try --tokens 100000.
    """
    torch.set_num_threads(1)             # products this small gain nothing from a second thread
    path = args.checkpoint or find_checkpoint(args)
    print(f"by {path}", file=sys.stderr)
    model, vocabulary = load_model(path, device)

    prompt = encode(args.generate, vocabulary).to(device)
    print(args.generate, end="", flush=True)
    start = time.perf_counter()
    how = dict(temperature=args.temperature, top_k=args.top_k, seed=args.seed)
    for token in generate(model, prompt, args.tokens, **how):
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
        usage="train_shakespeare.py [--flag value ...]    (--help lists them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="RECIPE, at the top of this file, explains the settings.",
        allow_abbrev=False,
    )
    add = p.add_argument
    for setting, value in RECIPE.items():
        kind = KINDS.get(setting, KINDS[type(value)])
        add("--" + setting.replace("_", "-"), type=kind, default=value, metavar="VALUE",
            help=f"default {value}")
    add("--seeds", type=whole, nargs="+", help="train once with each: table and figure")
    add("--name", help="what files are called; default: the text")
    add("--quick", action="store_true", help="one epoch of 164,000 characters")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--text", metavar="FILE", help="train on this text, UTF-8")
    add("--generate", metavar="PROMPT", help="write instead of training; --seed: another text")
    add("--tokens", type=KINDS[int], default=1000, help="to write, default %(default)s")
    add("--temperature", type=KINDS[float], default=0.8,
        help="1: as the model has it; 0: always the most likely; default %(default)s")
    add("--top-k", type=KINDS[int], help="draw among so many characters only, default all")
    add("--checkpoint", help="to write from; default: that of the text and seed 0")
    add("--data", choices=["auto", "real", "synthetic"], default="auto",
        help="auto: Python's help texts if TinyShakespeare cannot be had; default %(default)s")
    add("--data-dir", default="data", help="default %(default)s")
    add("--out", default="checkpoints", help="folder for checkpoints, default %(default)s")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    if "--quick" in arguments:           # another default: an --epochs that is given still counts
        p.set_defaults(epochs=1)
    args = p.parse_args(arguments)

    recipe = {setting: getattr(args, setting) for setting in RECIPE}
    given = {argument.split("=")[0] for argument in arguments}
    if args.seeds and "--seed" in given:
        p.error("--seed is for one run, and --seeds for several")
    if args.checkpoint and args.generate is None:
        p.error("--checkpoint is for --generate; --resume takes the file of --out and --name")
    if args.seeds and not args.name and not args.quick and changed(recipe):
        p.error("a table with other settings than those of RECIPE needs a --name for its files")
    return args, recipe


def prepare_text(args, device):
    """The text, on the device. Under torchrun the first process prints and writes files."""
    if args.batch % PROCESSES:
        raise ValueError(f"{PROCESSES} processes cannot share {args.batch} rows")
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:                         # wait until the first process has downloaded the text
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        dist.barrier()
    text = load_text(args.data_dir, args.data, args.text)
    if PROCESSES > 1 and RANK == 0:
        dist.barrier()

    train, valid = text.train, text.valid
    if args.quick:
        text = text._replace(name=text.name + "-quick")
        train, valid = train[:164000], valid[:16000]
    if len(train) <= args.batch * args.block or len(valid) <= args.block:
        raise ValueError(f"{len(train)} characters for training and {len(valid)} for validation "
                         f"are too few: use a smaller --batch and --block")
    return text._replace(train=train.to(device), valid=valid.to(device))


def run(args, recipe):
    """Write a text; or train one model; or, with --seeds, several: then a table and a figure."""
    device = choose_device(args.device)
    if args.generate is not None:
        write_text(args, device)
        return
    if args.seeds:
        check_folders("results", "figures")
    text = prepare_text(args, device)
    name = args.name or file_name(text.name)

    rows, runs = [], []
    seeds = list(dict.fromkeys(args.seeds or [args.seed]))
    for seed in seeds:
        settings = recipe | {"seed": seed}
        path = os.path.join(args.out, f"{name}-seed{seed}.pt")
        resume = args.resume and (os.path.exists(path) or not args.seeds)
        runs.append(train(settings, text, device, path, resume))
        rows.append(result(settings, text, device, runs[-1]))

    if RANK == 0 and args.seeds:
        write_rows(f"results/{name}.csv", rows)
        title = f"{text.name}, seeds {', '.join(map(str, seeds))}"
        draw_loss(f"figures/{name}_loss.png", runs, recipe, text, title)
        print_table(rows)
    if PROCESSES > 1:
        dist.destroy_process_group()


def main():
    run_script("train_shakespeare.py", lambda: run(*parse(sys.argv[1:])))


if __name__ == "__main__":
    main()
