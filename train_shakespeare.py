"""train_shakespeare.py: the same block writes text, from a state of constant size.

    python train_shakespeare.py                        train, 10 epochs: 20 minutes on one core
    python train_shakespeare.py --quick                a first look in under a minute
    python train_shakespeare.py --generate "ROMEO:"    write from the checkpoint
    python train_shakespeare.py --text FILE            any UTF-8 text in place of Shakespeare
    python train_shakespeare.py --model gru --lr 2e-2  a GRU of the same size, at its best rate
    python train_shakespeare.py --seeds 0 1 2          one model per seed: table and figure
    python train_shakespeare.py --resume               go on after Ctrl-C; on a CPU: same weights
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

Read from here to the line "You may stop here": recipe, model, the loop, a batch, and both losses.
After it come files, figures, writing and the command line. To change something, edit
    RECIPE          a setting; each is also a flag
    build           for another model
    train           for another loss
    training.py     for another optimizer or schedule

Without a network and without a file, the help texts of Python itself stand in for Shakespeare. The
script announces this, and all results carry their name.
Read before: block.py, train_mnist.py. Read next: visualize_delta.py.
"""
import hashlib
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from block import MambaLM, generate, parameter_groups
from rnn import RNN, PlainLM
from s6 import DISCRETIZATIONS
from training import (
    KINDS, PROCESSES, RANK, SAVE_EVERY, SCHEDULES,
    accelerated, check_folders, choose_device, count_parameters, fill_modules, first_line,
    first_process_first, given_settings, log_step, make_parser, mean_sd, modules_for,
    newest_checkpoint, patience, print_opening, print_table, progress, read_checkpoint, refuse,
    report, resume_from, run_script, save_checkpoint, save_figure, seed_for, start_processes,
    stop_processes, update, warn, write_rows)

# Each setting is also a flag, and is saved in every checkpoint. The same holds for one that you
# add: a number or a string.
RECIPE = dict(
    model="mamba",               # or "gru", the gated recurrence from before: see rnn.py
    seed=0,                      # of weights, places in the text, and what is forgotten
    epochs=10,                   # with more, the validation loss rises again
    batch=32,                    # rows: places in the text that are read side by side
    length=128,                  # characters of each row per step; the gradient reaches back so far
    lr=1.5e-2,                   # at its peak; on held-out training text 1e-2 ends 0.02 nats higher
    schedule="cosine",           # or "constant": see training.learning_rate
    clip=1.0,                    # longer gradients are scaled down to this norm
    weight_decay=0.3,            # strong: half a million parameters could learn the million
                                 # characters by heart. On held-out training text 0.15 ends
                                 # 0.02 nats higher
    average=0.998,               # highest decay of the averaged weights, used to evaluate and to
                                 # generate; in 2,450 steps it comes to 0.996
    forget=0.05,                 # chance that a row forgets its state before a step
    d_model=128,
    layers=4,                    # of Mamba
    discretization="euler",      # of Mamba, as its authors have it; or "zoh": see s6.py
    hidden=203,                  # width of the GRU, which has two layers: as many parameters
)
CHOICES = {"model": ("mamba", "gru"), "schedule": SCHEDULES, "discretization": DISCRETIZATIONS}

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# --------------------------------------------------------------------------------------------------
# The text as tokens, and the model.

class Text(NamedTuple):
    """A text as tokens. Its vocabulary goes into the checkpoint: to generate takes no text file."""
    name: str                    # what every result carries
    vocabulary: str              # its characters; a token is a place in here
    train: torch.Tensor          # (N,) int64
    valid: torch.Tensor


def build(recipe, vocabulary):
    """The model of a recipe: tokens (b, l), states -> logits (b, l, vocabulary), states.

    States are a list with an entry for each layer, which is a list of tensors, the batch first.
    """
    d_model = recipe["d_model"]
    if recipe["model"] == "gru":
        hidden = recipe["hidden"]
        body = [RNN(d_model, hidden, gated=True)]
        return PlainLM(len(vocabulary), d_model, body, hidden)
    settings = {key: recipe[key] for key in ("layers", "discretization")}
    return MambaLM(len(vocabulary), d_model, **settings)


@torch.no_grad()
def empty_states(model, tokens):
    """The states of a model that has read nothing: zeros, of the shapes after tokens (b, l)."""
    _, states = model(tokens[:, :1])
    return [[torch.zeros_like(t) for t in state] for state in states]


# --------------------------------------------------------------------------------------------------
# The loop.

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
    steps_per_epoch = (len(text.train) - 1) // (recipe["batch"] * recipe["length"])
    steps = recipe["epochs"] * steps_per_epoch
    torch.manual_seed(seed_for(recipe["seed"], "weights"))
    model = build(recipe, text.vocabulary).to(device)
    modules = modules_for(model, parameter_groups(model, recipe["weight_decay"]))

    # The rule: whatever lives from one step to the next must be in the checkpoint, or a resumed
    # training ends in other weights. These are the modules and the record. record["states"] holds
    # what the rows remember; it is None where an epoch begins.
    record = {"recipe": recipe, "data": facts_of(text), "log": [], "scores": [], "states": None}
    if resume:
        record = resume_from(path, record, modules)
    log = record["log"]                  # the same lists: to append here is to append to the record
    scores = record["scores"]
    states = record["states"]            # a new list after each step, put back before each save
    if states and PROCESSES > 1:
        raise ValueError(f"{path} was saved within an epoch: go on without torchrun")
    # The first save comes at once: so a folder that cannot be written is noticed now.
    save_checkpoint(path, record, modules, keep_old=not resume)
    sizes = f"{len(text.train):,} characters for training, {len(text.valid):,} for validation"
    print_opening(sizes, record, model, device, len(text.vocabulary))
    print(f"checkpoint {path}, step {len(log)} of {steps}", flush=True)

    inputs, _ = batch(recipe, text, 0)
    empty = empty_states(model, inputs.chunk(PROCESSES)[RANK])
    net = accelerated(model, device, inputs, empty)

    for step in range(len(log), steps):
        start = time.perf_counter()

        # The seed of all random draws of this step (what is forgotten; a dropout, if you add one):
        # they depend on (seed, step) alone, and are the same in all processes.
        torch.manual_seed(seed_for(recipe["seed"], "forget", step))
        forget = torch.rand(recipe["batch"], 1, 1) < recipe["forget"]      # by chance, a few rows

        # The characters of each row, and those that come next; under torchrun each process takes
        # its share of rows.
        inputs, targets = batch(recipe, text, step)
        share = [t.chunk(PROCESSES)[RANK].to(device) for t in (inputs, targets, forget)]
        inputs, targets, forget = share

        # Forward: from the states that the last step left, except where a row forgets. Where an
        # epoch begins, at other places in the text, all rows begin anew. (The states of a
        # checkpoint come from the CPU.)
        if states is None:
            states = empty
        kept = [[t.to(device).masked_fill(forget, 0) for t in state] for state in states]
        logits, states = net(inputs, kept)                         # (b, length, vocabulary)
        logits = logits.flatten(0, 1)
        targets = targets.flatten()
        loss = F.cross_entropy(logits, targets)

        # Backward, through these characters only, and the step of the weights. The states go on to
        # the next step as numbers, cut from the graph, or the gradient would reach back to the
        # beginning of the epoch. The log is, under torchrun, of this process's share.
        update(modules, loss, recipe, step, steps)
        states = [[t.detach() for t in state] for state in states]
        right = (logits.argmax(1) == targets).float().mean()
        log_step(log, loss, right, start, steps)

        # At the end of an epoch, validate the averaged weights and let them write a few lines. Save
        # then, and every SAVE_EVERY steps. Under torchrun, save only at the end of an epoch: each
        # process knows the states of its own rows alone, and there no states are needed.
        epoch_ends = (step + 1) % steps_per_epoch == 0
        if epoch_ends:
            states = None
            average = modules["average"]
            stream = stream_loss(average, text)
            blocks = block_losses(average, text, recipe["length"]).mean().item()
            scores.append((stream, blocks))
            print(f"  epoch {len(scores)}{progress(log, steps, steps_per_epoch)}")
            print_epoch(average, text, recipe, scores)
        record["states"] = states
        if epoch_ends or ((step + 1) % SAVE_EVERY == 0 and PROCESSES == 1):
            save_checkpoint(path, record, modules)
    return Run(modules["average"], log, scores)


def batch(recipe, text, step):
    """Characters (b, length) of a step, and those that come next: a function of (seed, step).

    Row r of an epoch starts at start + r · reach, and wraps around at the end of the text. With
    reach = steps_per_epoch · length the b rows together cover almost the whole text. Each row of
    this step begins where the same row of the last step ended.
    """
    b = recipe["batch"]
    length = recipe["length"]
    n = len(text.train)
    steps_per_epoch = (n - 1) // (b * length)
    epoch, i = divmod(step, steps_per_epoch)
    seed = seed_for(recipe["seed"], "start", epoch)
    start = torch.randint(n, (1,), generator=torch.Generator().manual_seed(seed))
    reach = steps_per_epoch * length
    rows = start + reach * torch.arange(b).unsqueeze(1)            # (b, 1)
    index = (rows + i * length + torch.arange(length + 1)) % n     # (b, length+1)
    characters = text.train[index.to(text.train.device)]
    return characters[:, :-1], characters[:, 1:]


@torch.no_grad()
def stream_loss(model, text, piece=4096):
    """The whole validation text, read once from end to end: -> nats per character.

    The state is carried from piece to piece, so their size changes nothing but the memory needed.
    Raises ValueError if the nats are not finite: the last steps have spoiled the weights.
    """
    total = 0.0
    states = None
    tokens = text.valid
    for x, y in zip(tokens[:-1].split(piece), tokens[1:].split(piece)):
        logits, states = model(x.unsqueeze(0), states)
        total += F.cross_entropy(logits[0], y, reduction="sum").item()
    if not math.isfinite(total):
        raise ValueError("the validation loss is not finite: start again with a smaller --lr")
    return total / (len(tokens) - 1)


@torch.no_grad()
def block_losses(model, text, length):
    """The validation text in blocks, each read from an empty state: -> nats (N - 1,).

    A Transformer whose context is one block long would be measured in this way.
    """
    x = text.valid[:-1]
    y = text.valid[1:]
    even = len(x) // length * length
    inputs = list(x[:even].view(-1, length).split(64))
    targets = list(y[:even].view(-1, length).split(64))
    if even < len(x):                    # the rest of the text, shorter than a block
        inputs.append(x[None, even:])
        targets.append(y[None, even:])
    losses = []
    for some, following in zip(inputs, targets):
        logits, _ = model(some)
        logits = logits.flatten(0, 1)
        losses.append(F.cross_entropy(logits, following.flatten(), reduction="none"))
    return torch.cat(losses)


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
# You may stop here. The rest: files, figures, writing, the command line. First the text:
# Shakespeare where it can be had, Python's help texts where not.

def facts_of(text):
    """What a checkpoint says of its text: the vocabulary, which belongs to the weights; a hash."""
    digest = hashlib.sha256(text.vocabulary.encode())
    for tokens in (text.train, text.valid):
        digest.update(tokens.cpu().numpy())
    sizes = f"{len(text.train):,} + {len(text.valid):,} characters"
    return {
        "name": text.name,
        "vocabulary": text.vocabulary,
        "fingerprint": f"{sizes}, sha256 {digest.hexdigest()[:16]}",
    }


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
    tokens = [place[character] for character in string]
    tokens = torch.tensor(tokens, dtype=torch.int64)
    cut = len(tokens) * 9 // 10
    return Text(name, vocabulary, tokens[:cut], tokens[cut:])


def load_text(data_dir, source="auto", path=None):
    """The file at path, or else TinyShakespeare from data_dir, downloaded if need be: -> Text.

    source    "auto": Python's help texts if it cannot be had; "real" and "synthetic" insist
    Raises OSError or ValueError if a file is missing, damaged or not UTF-8.
    """
    if path is not None:                 # text-war for books/war.txt
        return as_text(f"text-{Path(path).stem}", read_text(path))
    if source == "synthetic":
        return help_texts()
    path = os.path.join(data_dir, "tinyshakespeare.txt")
    try:
        return as_text("shakespeare", read_shakespeare(path))
    except MemoryError:
        raise
    except Exception as error:           # no network, a broken download, a damaged file
        problem = f"cannot read or download {path} ({first_line(error)})"
        # A file that is damaged is an accident that should be noticed: nothing stands in for it.
        if source == "real" or os.path.exists(path):
            raise ValueError(f"{problem}: connect to the network, or use --text FILE or "
                             f"--data synthetic") from error
    warn(f"{problem}.\nTraining on SYNTHETIC data instead, the help texts of Python: results say "
         f"nothing about Shakespeare.")
    return help_texts()


def read_text(path):
    """A UTF-8 file, with or without a byte order mark: -> str. Raises ValueError if it is empty."""
    try:
        string = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from error
    if not string:
        raise ValueError(f"{path} is empty")
    return string


def read_shakespeare(path):
    """TinyShakespeare from path, downloaded if need be. Raises ValueError for another text."""
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with patience(10):
            torch.hub.download_url_to_file(URL, path, SHA256, progress=False)
    string = read_text(path)
    if hashlib.sha256(string.encode()).hexdigest() != SHA256:
        raise ValueError("this is not the published text: delete it")
    return string


def help_texts():
    """What `help()` says about Python's syntax; it comes with every CPython.

    465,000 characters of English: enough to see a model learn words, without a network.
    """
    from pydoc_data.topics import topics
    return as_text("synthetic-pydoc", "\n\n".join(topics[name] for name in sorted(topics)))


def shrink(text, args, recipe):
    """The text that --quick leaves; its name says so.

    Raises ValueError if what is left is too short for two steps, or for a block to validate on.
    """
    if args.quick:
        text = text._replace(
            name=f"{text.name}-quick",
            train=text.train[:164000],
            valid=text.valid[:16000],
        )
    steps_per_epoch = (len(text.train) - 1) // (recipe["batch"] * recipe["length"])
    if recipe["epochs"] * steps_per_epoch < 2 or len(text.valid) <= recipe["length"]:
        raise ValueError(f"{len(text.train)} characters for training and {len(text.valid)} for "
                         f"validation are too few: use a smaller --batch or --length")
    return text


# --------------------------------------------------------------------------------------------------
# Results: a row per run, a table, a figure.

def result(recipe, text, device, run):
    """The row of a finished run. The losses are those of the last epoch, not of the best one."""
    stream, blocks = run.scores[-1]
    bit = math.log(2)
    return report({
        "model": recipe["model"],
        "dataset": text.name,
        "seed": recipe["seed"],
        "params": count_parameters(run.average),
        "epochs": recipe["epochs"],
        "val_loss_stream": f"{stream:.4f}",
        "val_loss_block": f"{blocks:.4f}",
        "val_bits_stream": f"{stream / bit:.4f}",
        "val_bits_block": f"{blocks / bit:.4f}",
        "seconds": f"{run.log[-1][2]:.0f}",
    }, device)


def print_losses(rows):
    """The table of results/README.md: mean ± standard deviation (n - 1) over the seeds."""
    lines = []
    for way in ("stream", "block"):
        cells = [way]
        for unit in ("loss", "bits"):
            column = f"val_{unit}_{way}"
            cells.append(mean_sd([float(row[column]) for row in rows], 4))
        lines.append(cells)
    print_table(["validation loss", "nats per character", "bits per character"], lines)


def loss_by_place(runs, text, length):
    """Places in a block 1, 2, 3–4, 5–8, …: -> their names, and the mean loss at each."""
    losses = torch.stack([block_losses(run.average, text, length).cpu() for run in runs])
    even = losses[:, :losses.shape[1] // length * length]
    places = even.reshape(-1, length).mean(0)              # (length,)
    start = 0
    names = []
    means = []
    while start < length:
        end = min(max(1, 2 * start), length)
        names.append(f"{start + 1}–{end}" if end > start + 1 else f"{end}")
        means.append(places[start:end].mean())
        start = end
    return names, means


def draw_loss(path, runs, recipe, text, title):
    """Left: losses over characters read. Right: losses over the place in a block.

    At the first character of a block the model knows nothing but that character; further on it
    knows the block so far. Where the right curve meets the line of the streaming loss, more memory
    does not help any more.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    red = "#d55e00"
    blue = "#0072b2"
    length = recipe["length"]
    millions = recipe["batch"] * length / 1e6              # characters per step
    for i, run in enumerate(runs):
        prefix = "_" if i else ""        # a label that begins with _ stays out of the legend
        losses = torch.tensor(run.log)[:, 0]
        width = max(1, len(losses) // 100)                 # steps that a point is the mean of
        losses = losses.unfold(0, width, width).mean(1)
        read = millions * width * torch.arange(1, len(losses) + 1)
        left.plot(read, losses, color="#7f7f7f", linewidth=1, label=prefix + "training")

        stream, blocks = zip(*run.scores)
        read = millions * len(run.log) / len(stream) * torch.arange(1, len(stream) + 1)
        style = dict(marker="o", markersize=3)
        left.plot(read, blocks, color=blue, label=prefix + "validation, in blocks", **style)
        left.plot(read, stream, color=red, label=prefix + "validation, streaming", **style)
    # The first losses are far above the rest, and would squeeze it into a flat line: cut them off.
    low, high = left.get_ylim()
    left.set_ylim(low, min(high, low + 1))
    left.set(xlabel="characters read (millions)", ylabel="loss (nats per character)")

    right.plot(*loss_by_place(runs, text, length), "o-", color=blue, label="in blocks")
    mean = sum(run.scores[-1][0] for run in runs) / len(runs)
    right.axhline(mean, color=red, label="streaming: mean over the text")
    right.set(xlabel="place in the block (characters)", ylabel="validation loss (nats)")
    for ax in (left, right):
        ax.grid(alpha=0.3, which="both")
        ax.legend(frameon=False)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a name of the user's may have a $
    save_figure(path, figure)


# --------------------------------------------------------------------------------------------------
# A trained model writes.

def load_model(path, device):
    """The averaged model of a checkpoint, and its vocabulary. Raises ValueError if it has none.

    The vocabulary belongs to the weights: token 5 is a letter only by its place in there.
    """
    checkpoint = read_checkpoint(path)
    if not checkpoint["scores"]:
        print(f"{path}: no epoch of this training is finished", file=sys.stderr)
    recipe = checkpoint["recipe"]
    vocabulary = checkpoint["data"].get("vocabulary")
    if vocabulary is None or RECIPE.keys() - recipe.keys():
        raise ValueError(f"{path} holds no language model, or one of another version of the code")
    model = build(recipe, vocabulary)
    fill_modules(path, checkpoint, {"average": model})
    return model.to(device).eval(), vocabulary


def write_text(args, recipe, device):
    """Continue a prompt on stdout, as it comes; at the end, say on stderr how fast it came.

    The speed does not depend on how much is written: try --tokens 100000.
    """
    torch.set_num_threads(1)             # products this small gain nothing from a second thread
    names = ["shakespeare", "synthetic-pydoc", "text-"]
    if args.text:
        names = [f"text-{Path(args.text).stem}"]
    if args.name:
        names = [args.name]
    patterns = [f"{name}*-seed*.pt" for name in names]
    path = args.checkpoint or newest_checkpoint(args.out, patterns)
    model, vocabulary = load_model(path, device)

    prompt = encode(args.generate, vocabulary).to(device)
    print(args.generate, end="", flush=True)
    start = time.perf_counter()
    how = dict(temperature=args.temperature, top_k=args.top_k, seed=recipe["seed"])
    for token in generate(model, prompt, args.tokens, **how):
        print(vocabulary[token], end="", flush=True)
    speed = args.tokens / (time.perf_counter() - start)
    print(f"\n\n{args.tokens:,} characters, {speed:,.0f} per second", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The command line.

def parse(arguments):
    """-> all flags, and the recipe: the settings, with what the flags change."""
    usage = "train_shakespeare.py [--flag value ...]    (--help lists them)"
    parser = make_parser(usage, __doc__, RECIPE, CHOICES)
    add = parser.add_argument
    add("--text", metavar="FILE", help="train on this text, UTF-8")
    add("--generate", metavar="PROMPT", help="write instead of training; --seed: another text")
    add("--tokens", type=KINDS[int], default=1000,
        help="with --generate: how many to write, default %(default)s")
    add("--temperature", type=KINDS[float], default=0.8,
        help="1: as the model has it; 0: always the most likely; default %(default)s")
    add("--top-k", type=KINDS[int], help="draw among so many characters only, default all")

    args = parser.parse_args(arguments)
    given = given_settings(args, RECIPE)
    recipe = RECIPE | given
    if args.quick and "epochs" not in given:
        recipe["epochs"] = 1
    refuse(parser, args, "seeds", ["seed"])
    training = [setting for setting in RECIPE if setting != "seed"]
    refuse(parser, args, "generate", training + ["seeds", "quick", "resume", "data", "data_dir"])
    if args.checkpoint and args.generate is None:
        parser.error("--checkpoint is for --generate; --resume takes the file of --out and --name")
    return args, recipe


def run(args, recipe):
    """Write a text; or train one model; or, with --seeds, several: then a table and a figure."""
    device = choose_device(args.device)
    if args.generate is not None:
        write_text(args, recipe, device)
        return
    if args.seeds:
        check_folders("results", "figures")
    start_processes(device, recipe["batch"])
    text = first_process_first(lambda: load_text(args.data_dir, args.data, args.text))
    text = shrink(text, args, recipe)
    text = text._replace(train=text.train.to(device), valid=text.valid.to(device))
    name = f"{args.name or text.name}-{recipe['model']}"

    rows = []
    runs = []
    seeds = list(dict.fromkeys(args.seeds or [recipe["seed"]]))
    for seed in seeds:
        settings = recipe | {"seed": seed}
        path = os.path.join(args.out, f"{name}-seed{seed}.pt")
        resume = args.resume and (os.path.exists(path) or not args.seeds)
        trained = train(settings, text, device, path, resume)
        runs.append(trained)
        rows.append(result(settings, text, device, trained))

    if RANK == 0 and args.seeds:
        write_rows(f"results/{name}.csv", rows)
        title = f"{recipe['model']} on {text.name}, seeds {', '.join(map(str, seeds))}"
        draw_loss(f"figures/{name}.png", runs, recipe, text, title)
        print_losses(rows)
    stop_processes()


def main():
    run_script("train_shakespeare.py", lambda: run(*parse(sys.argv[1:])),
               "a training goes on with --resume")


if __name__ == "__main__":
    main()
