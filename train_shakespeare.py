"""train_shakespeare.py: the same block writes text, from a state of constant size.

    python train_shakespeare.py                        train, 10 epochs
    python train_shakespeare.py --quick                a first look in under a minute
    python train_shakespeare.py --generate "ROMEO:"    write from the checkpoint
    python train_shakespeare.py --text FILE            any UTF-8 text in place of Shakespeare
    python train_shakespeare.py --seeds 0 1 2          the README's table and figure
    python train_shakespeare.py --resume               go on after Ctrl-C, to the same weights
    torchrun --nproc_per_node=2 train_shakespeare.py   each of two processes takes half the batch

A token is a character, and the loss that of guessing the next one: -ln p in nats, or -log₂ p in
bits. The first 90 % of the text are trained on, and the loss is measured on the whole last 10 %,
in two ways. In blocks, the model forgets everything after 128 characters; streaming, it reads from
one end to the other and carries its state, which costs no more: that is what a recurrence is for.

It is trained as it is used. The rows of a batch are 32 places in the text, and the next batch goes
on where this one stopped, from the states that it left behind (the gradient stops there: truncated
backpropagation through time). An epoch reads the text once, and each epoch from other places.
Now and then a row forgets (`--forget`), so that the model also learns to begin. Steps are large and
weight decay is strong: with half a million parameters and ten readings of one million characters,
learning by heart is the danger. Expect 1.42 nats streaming, after 23 minutes on one core.

`Trainer` and what is around it come from train_mnist.py: also the average of the weights, which is
what is measured and what writes. No network and no file: the help texts of Python itself stand in
for Shakespeare, and are announced and labelled so.
Read before: block.py, train_mnist.py. Read next: visualize_delta.py.
"""
import argparse
import hashlib
import math
import os
import shlex
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from block import MambaLM, State, generate
from s6 import write_rows
from train_mnist import (RANK, Trainer, UserError, add_places, begun, check_writable,
                         choose_device, describe, first_line, flags, gather, guard, join, leave,
                         mean_sd, number, read_checkpoint, results_name, run, share, try_each,
                         write_atomically)

SETTINGS = ("seed", "epochs", "batch", "block", "lr", "weight_decay", "average", "forget",
            "d_model", "layers")

URLS = ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt"]
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# --------------------------------------------------------------------------------------------------
# The text: Shakespeare where it can be had, Python's help texts where not.

class Text(NamedTuple):
    """Characters as int64 (N,), by place in the vocabulary; the name that every result carries."""
    name: str
    vocabulary: str
    train: torch.Tensor
    valid: torch.Tensor
    chosen_by: str           # the flags that choose this text


def encode(string, vocabulary):
    """-> (l,) int64. Raises UserError for a character that is not in the vocabulary."""
    place = {character: i for i, character in enumerate(vocabulary)}
    try:
        return torch.tensor([place[character] for character in string], dtype=torch.int64)
    except KeyError as error:
        raise UserError(f"the model was not trained on the character {error} and cannot read it; "
                        f"it knows {vocabulary!r}") from None


def split(name, string, chosen_by=""):
    """The first 90 % for training and the last 10 % for validation: -> Text."""
    codes = bytearray(string, "utf-32-le" if sys.byteorder == "little" else "utf-32-be")
    known, tokens = torch.frombuffer(codes, dtype=torch.int32).unique(return_inverse=True)
    vocabulary, cut = "".join(map(chr, known.tolist())), len(tokens) * 9 // 10
    return Text(name, vocabulary, tokens[:cut], tokens[cut:], chosen_by)


def load_text(data_dir, source="auto", path=None):
    """The file at path, or else TinyShakespeare from data_dir, downloaded if need be: -> Text.

    source: "auto" takes Python's help texts if it cannot be had, "real" and "synthetic" insist.
    Raises UserError for a file that is missing, damaged or no UTF-8, and if "real" cannot be had.
    """
    if path is not None:
        return split(name_of(path), read_text(path), f" --text {shlex.quote(path)}")
    if source == "synthetic":
        return synthetic_text()
    path = os.path.join(data_dir, "tinyshakespeare.txt")
    if not os.path.exists(path):
        try:
            download(path)
        except Exception as error:       # no network, a broken download, an unwritable folder
            problem = f"{path} is not there and cannot be downloaded ({first_line(error)})"
            if source == "real":
                raise UserError(f"{problem}: connect to the network, put the file there, or use "
                                f"--data synthetic") from None
            print(f"{'!' * 100}\n{problem}.\nTraining on SYNTHETIC data instead, the help texts of "
                  f"Python: results say nothing about Shakespeare.\n{'!' * 100}", flush=True)
            return synthetic_text()
    string = read_text(path)
    if hashlib.sha256(string.encode()).hexdigest() != SHA256:
        raise UserError(f"{path} is truncated or damaged: delete it, and run again to download it")
    return split("shakespeare", string)


def download(path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    # It verifies the file before it moves it to its place.
    try_each(URLS, lambda url: torch.hub.download_url_to_file(url, path, SHA256, progress=False))


def name_of(path):
    """What results of the user's own text are called: text-war for books/war.txt."""
    return "text-" + os.path.splitext(os.path.basename(path))[0]


def read_text(path):
    try:
        with open(path, encoding="utf-8") as file:
            string = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}): convert it first") from None
    if len(string) < 20:
        raise UserError(f"{path} has {len(string)} characters: too few to learn from")
    return string


def synthetic_text():
    """What `help()` says about Python's syntax; it comes with every CPython."""
    from pydoc_data.topics import topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return split("synthetic-pydoc", text, " --data synthetic")


# --------------------------------------------------------------------------------------------------
# Training with the state carried on, and the two ways to measure.

def build(settings):
    return MambaLM(settings["vocabulary"], settings["d_model"], settings["layers"])


class TextTrainer(Trainer):
    """A Trainer of the language model, on Text."""

    unit, piece = "characters", 4096     # characters that `evaluate` reads at a time
    LOG = (*Trainer.LOG, "states", "vocabulary")

    def __init__(self, settings, text, device):
        self.data, self.vocabulary, self.states = text, text.vocabulary, None
        self.classes, self.per_step = len(text.vocabulary), settings["batch"] * settings["block"]
        tokens = torch.cat([text.train, text.valid]).cpu().numpy().tobytes()
        settings = dict(settings, vocabulary=self.classes, training=len(text.train),
                        validation=len(text.valid), text=hashlib.sha256(tokens).hexdigest()[:16])
        super().__init__(settings, build, (len(text.train) - 1) // self.per_step, device)

    def batch(self):
        """Characters (b, block) and those that come next, and which rows forget, (b, 1, 1)."""
        b, block = self.settings["batch"], self.settings["block"]
        epoch, i = divmod(self.step, self.per_epoch)
        # Row r of an epoch reads `length` characters from start + r · length on, round and round.
        n, length = len(self.data.train), self.per_epoch * block
        start = torch.Generator().manual_seed(self.draw("start", epoch))
        start = torch.randint(n, (1,), generator=start)
        rows = start + length * torch.arange(b).unsqueeze(1)                   # (b, 1)
        index = (rows + i * block + torch.arange(block + 1)) % n               # (b, block+1)
        characters = self.data.train[index.to(self.device)]
        chance = torch.Generator().manual_seed(self.draw("forget", self.step))
        forget = torch.rand(b, 1, 1, generator=chance) < self.settings["forget"]
        return characters[:, :-1], characters[:, 1:], forget.to(self.device) | (i == 0)

    def loss(self):
        inputs, targets, forget = map(share, self.batch())
        states = self.states and [State(*(t.masked_fill(forget, 0) for t in state))
                                  for state in self.states]
        logits, states = self.net(inputs, states, return_state=True)
        self.states = [State(*(t.detach() for t in s)) for s in states]
        hits = (logits.detach().argmax(-1) == targets).float().mean()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), hits

    @torch.no_grad()
    def evaluate(self, stop=lambda: False):
        """Losses of the average on the validation text: -> streaming, in blocks; None if stopped.

        In nats per character, over the whole text but its first character.
        """
        text, total, states = self.data.valid, 0.0, None
        for x, y in zip(text[:-1].split(self.piece), text[1:].split(self.piece)):
            if stop():
                return None
            logits, states = self.average(x.unsqueeze(0), states, return_state=True)
            total += F.cross_entropy(logits[0], y, reduction="sum").item()
        losses = self.block_losses(stop)
        if losses is None:
            return None
        return total / (len(text) - 1), torch.cat([t.flatten() for t in losses]).mean().item()

    @torch.no_grad()
    def block_losses(self, stop=lambda: False):
        """The loss of each character, in blocks that are read on their own: None if stopped.

        -> tensors (blocks, block), and (1, rest) if a rest of the text is shorter than a block
        """
        (x, y), size = (self.data.valid[:-1], self.data.valid[1:]), self.settings["block"]
        even, losses = len(x) // size * size, []
        batches = list(zip(x[:even].view(-1, size).split(64), y[:even].view(-1, size).split(64)))
        if even < len(x):
            batches.append((x[None, even:], y[None, even:]))
        for inputs, targets in batches:
            if stop():
                return None
            logits = self.average(inputs).flatten(0, 1)
            losses.append(F.cross_entropy(logits, targets.flatten(), reduction="none")
                          .view_as(targets))
        return losses

    def save(self, path):
        mine = self.states
        self.states = mine and [[gather(t) for t in state] for state in mine]
        super().save(path)
        self.states = mine

    def load(self, path):
        super().load(path)
        self.states = self.states and [State(*(share(t).to(self.device) for t in state))
                                       for state in self.states]

    def path(self, folder):
        return os.path.join(folder, f"{self.data.name}-seed{self.settings['seed']}.pt")

    def title(self):
        return (f"text {self.data.name}: {len(self.data.train):,} characters for training, "
                f"{len(self.data.valid):,} for validation, vocabulary {self.classes}")

    def report(self):
        """The losses after the last epoch, and what the model writes now."""
        stream, block = self.scores[-1]
        start = encode("\n" if "\n" in self.vocabulary else self.vocabulary[0], self.vocabulary)
        seed = self.draw("sample", len(self.scores))
        tokens = generate(self.average, start.to(self.device), 200, temperature=0.8, seed=seed)
        sample = "".join(self.vocabulary[t] for some in tokens for t in some).strip()
        return (f"validation {stream:.4f} nats = {stream / math.log(2):.4f} bits streaming, "
                f"{block:.4f} nats = {block / math.log(2):.4f} bits in blocks\n      | "
                + sample.replace("\n", "\n      | "))

    def result(self):
        """The row of a finished run: what it was, what came out, and where it ran."""
        (stream, block), s = self.scores[-1], self.settings
        return {"dataset": self.data.name, "seed": s["seed"], "params": self.parameters(),
                "epochs": s["epochs"], "val_loss_stream": f"{stream:.4f}",
                "val_loss_block": f"{block:.4f}", "val_bits_stream": f"{stream / math.log(2):.4f}",
                "val_bits_block": f"{block / math.log(2):.4f}", "seconds": f"{self.seconds():.0f}",
                **self.machine, "command": f"python train_shakespeare.py --seed {s['seed']}"
                + flags(s, SETTINGS, parse([])) + self.data.chosen_by}


# --------------------------------------------------------------------------------------------------
# Several seeds: a table and a figure.

def train_seeds(settings, seeds, text, device, out, resume):
    """One model per seed; then the rows, the figure and the table: -> whether all finished."""
    trainers = []
    for seed in dict.fromkeys(seeds):
        trainer = TextTrainer(dict(settings, seed=seed), text, device)
        if not run(trainer, out, resume and begun(trainer, out)):
            return False
        trainers.append(trainer)
    if RANK > 0:
        return True
    rows = [t.result() for t in trainers]
    name = results_name(text.name, flags(settings, SETTINGS, parse([])), seeds)
    write_atomically(f"results/{name}.csv", lambda part: write_rows(part, rows))
    write_atomically(f"figures/{name}_loss.png", lambda part: draw_loss(part, trainers))
    print(f"\nwrote results/{name}.csv and figures/{name}_loss.png\n\n"
          f"| validation loss | nats per character | bits per character |\n|---|---|---|")
    for way in ("stream", "block"):
        nats, bits = ([float(row[f"val_{unit}_{way}"]) for row in rows]
                      for unit in ("loss", "bits"))
        print(f"| {way} | {mean_sd(nats, digits=4)} | {mean_sd(bits, digits=4)} |")
    return True


def draw_loss(path, trainers):
    """Losses over characters read; and on one block, over the characters that it has seen of it."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    first, gray, red, blue = trainers[0], "#7f7f7f", "#d62728", "#1f77b4"
    width = max(1, first.steps // 100)                     # steps that a point is the mean of
    for t in trainers:
        label = {} if t is not first else {"label": "training"}
        losses = t.losses.unfold(0, width, width).mean(1)
        read = width * t.per_step * torch.arange(1, len(losses) + 1) / 1e6
        axes[0].plot(read, losses, color=gray, linewidth=1, **label)
        ends = t.per_epoch * t.per_step * torch.arange(1, len(t.scores) + 1) / 1e6
        for way, color, scores in zip(("validation, in blocks", "validation, streaming"),
                                      (blue, red), reversed(list(zip(*t.scores)))):
            axes[0].plot(ends, scores, "o-", color=color, markersize=3,
                         label=way if t is first else None)
    low, high = axes[0].get_ylim()
    axes[0].set(xlabel="characters read (millions)", ylabel="loss (nats per character)",
                ylim=(low, min(high, low + 1)))
    blocks, block = [b for t in trainers for b in t.block_losses()], first.settings["block"]
    losses = torch.cat([b for b in blocks if b.shape[1] == block]).mean(0).cpu()       # (block,)
    ends = [2 ** i for i in range(block.bit_length()) if 2 ** i < block] + [block]
    bins = [(start + 1, end) for start, end in zip([0] + ends, ends)]      # 1, 2, 3–4, 5–8, …
    axes[1].plot([f"{start}–{end}" if start < end else f"{end}" for start, end in bins],
                 [losses[start - 1:end].mean() for start, end in bins], "o-", color=blue,
                 label="in blocks")
    axes[1].axhline(sum(t.scores[-1][0] for t in trainers) / len(trainers), color=red,
                    label="streaming: mean over the text")
    axes[1].set(xlabel="place in the block (characters)", ylabel="validation loss (nats)")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
        ax.legend(frameon=False)
    seeds = ", ".join(str(t.settings["seed"]) for t in trainers)
    figure.suptitle(f"{first.data.name}, seeds {seeds}", fontsize=10)
    figure.savefig(path, dpi=120, format="png")


# --------------------------------------------------------------------------------------------------
# Writing.

def checkpoint(args):
    """The checkpoint to write from: the one that was named, or that of this text and seed 0."""
    names = ["shakespeare"] * (args.data != "synthetic") + ["synthetic-pydoc"] * (
        args.data != "real")
    paths = [os.path.join(args.out, f"{name}{'-quick' * args.quick}-seed0.pt")
             for name in ([name_of(args.text)] if args.text else names)]
    return args.checkpoint or next(filter(os.path.exists, paths), paths[0])


def load_model(path, device):
    """-> the MambaLM of a checkpoint, and its vocabulary. Raises UserError if path has none."""
    state = read_checkpoint(path, "train first, by python train_shakespeare.py, or name another "
                                  "one with --checkpoint")
    try:
        model = build(state["settings"])
        model.load_state_dict(state["average"])
        return model.to(device).eval(), state["vocabulary"]
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} holds no model of train_shakespeare.py ({first_line(error)}): "
                        f"name another with --checkpoint") from None


def write_text(args):
    """Continue a prompt on stdout, as it comes; at the end, say on stderr how fast it came."""
    device = choose_device(args.device)
    torch.set_num_threads(1)             # products this small gain nothing from a second thread
    model, vocabulary = load_model(checkpoint(args), device)
    if not args.generate:
        raise UserError("the prompt is empty: give at least one character after --generate")
    prompt = encode(args.generate, vocabulary).to(device)
    print(args.generate, end="", flush=True)
    start = time.perf_counter()
    for tokens in generate(model, prompt, args.tokens, temperature=args.temperature,
                           top_k=args.top_k, seed=args.seed):
        print("".join(vocabulary[t] for t in tokens), end="", flush=True)
    speed = args.tokens / (time.perf_counter() - start)
    print(f"\n\n{args.tokens:,} characters, {speed:,.0f} per second", file=sys.stderr)
    return True


def rate(clock, begin=0, end=math.inf):
    """Characters per second between two counts; clock is a list of (count, seconds)."""
    inside = [point for point in clock if begin <= point[0] <= end]
    (first, start), (last, stop) = inside[0], inside[-1]
    return (last - first) / max(stop - start, 1e-9)


def benchmark(args):
    """How fast `generate` is, at the beginning and the end of a long text; and without it."""
    device = choose_device(args.device)
    torch.set_num_threads(1)
    model, vocabulary = load_model(checkpoint(args), device)
    check_writable("results")
    prompt, rows = encode(args.generate or vocabulary[0], vocabulary).to(device), []
    for way, writer, count in (("generate", generate, args.tokens),
                               ("MambaLM.forward", forward_only, min(2000, args.tokens))):
        clock = [(0, time.perf_counter())]
        for tokens in writer(model, prompt, count):
            clock.append((clock[-1][0] + len(tokens), time.perf_counter()))
        row = {"way": way, "params": sum(p.numel() for p in model.parameters()),
               "characters": count, "per_second": f"{rate(clock):.0f}",
               "first_1000_per_second": f"{rate(clock, 0, 1000):.0f}",
               "last_1000_per_second": f"{rate(clock, count - 1000, count):.0f}"}
        print("RESULT " + " ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        rows.append({**row, "device": describe(device), "torch": str(torch.__version__),
                     "command": f"python train_shakespeare.py --benchmark --tokens {args.tokens}"
                                + f" --checkpoint {shlex.quote(checkpoint(args))}"})
    write_atomically("results/generation.csv", lambda part: write_rows(part, rows))
    return True


@torch.inference_mode()
def forward_only(model, prompt, count):
    """What `generate` does, by MambaLM.forward alone: yields lists of one token."""
    tokens, states = prompt.unsqueeze(0), None
    for _ in range(count):
        logits, states = model(tokens, states, return_state=True)
        tokens = torch.multinomial(logits[:, -1].softmax(-1), 1)
        yield [tokens.item()]


# --------------------------------------------------------------------------------------------------
# The command line.

def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count, seed = p.add_argument, number(int, 1), number(int, 0, 10 ** 6)
    add("--seed", type=seed, default=0, help="of the training, or of the text that is written")
    add("--seeds", type=seed, nargs="+", help="train once with each, then write table and figure")
    add("--quick", action="store_true", help="one epoch of 164,000 characters")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--epochs", type=count, help="default 10")
    add("--batch", type=count, default=32, help="places in the text, default %(default)s")
    add("--block", type=count, default=128, help="characters per step, default %(default)s")
    add("--lr", type=number(float, 0), default=1.5e-2, help="its peak, default %(default)s")
    add("--weight-decay", type=number(float, 0), default=0.3, help="default %(default)s")
    add("--average", type=number(float, 0, 1), default=0.998,
        help="decay per step of the averaged weights, default %(default)s")
    add("--forget", type=number(float, 0, 1), default=0.05,
        help="chance that a row drops its state before a step, default %(default)s")
    add("--d-model", type=count, default=128, help="width of the model, default %(default)s")
    add("--layers", type=count, default=4, help="default %(default)s")
    add("--generate", metavar="PROMPT", help="write instead of training")
    add("--tokens", type=count, default=1000, help="characters to write, default %(default)s")
    add("--temperature", type=number(float, 0, 100), default=0.8,
        help="1: as the model has it; 0: always the most likely; default %(default)s")
    add("--top-k", type=count, help="draw among so many characters only")
    add("--checkpoint", help="to write from, default that of this text and seed 0")
    add("--benchmark", action="store_true", help="measure the speed of writing --tokens characters")
    add("--text", metavar="FILE", help="train on this text, UTF-8")
    add_places(add, "auto: TinyShakespeare, or Python's help texts if it cannot be had")
    args = p.parse_args(arguments)
    args.epochs = args.epochs or (1 if args.quick else 10)
    return args


def train(args):
    device = choose_device(args.device)
    join(device, args.batch)
    for folder in [args.out] + ["results", "figures"] * bool(args.seeds):
        check_writable(folder)
    text = load_text(args.data_dir, args.data, args.text)
    if args.quick:
        text = Text(text.name + "-quick", text.vocabulary, text.train[:164000], text.valid[:16000],
                    text.chosen_by + " --quick")
    if len(text.train) <= args.batch * args.block or len(text.valid) <= args.block:
        raise UserError(f"{text.name} has {len(text.train)} characters for training and "
                        f"{len(text.valid)} for validation: too few for one step of {args.batch} "
                        f"rows of {args.block}. Use a smaller --batch and --block")
    text = text._replace(train=text.train.to(device), valid=text.valid.to(device))
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.seeds:
        return train_seeds(settings, args.seeds, text, device, args.out, args.resume)
    return run(TextTrainer(settings, text, device), args.out, args.resume)


def main(arguments=None):
    def job():
        args = parse(arguments)
        chosen = benchmark if args.benchmark else train if args.generate is None else write_text
        return chosen(args)

    return guard("train_shakespeare.py", job)


if __name__ == "__main__":
    leave(main())
