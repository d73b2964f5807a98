"""bench.py: how fast, and beside whom. It is no lesson, and not needed to read or use the models.

    python bench.py scan     one scan over its length, in three ways: a minute or two
    python bench.py peers    a training step and generation, beside other libraries: some minutes

Each runs on one thread, prints a table, and writes its rows to results/. The fastest of several
calls counts: the others were disturbed by other programs. For peers, `python -m pip install
transformers mambapy`, or one of them: what is not installed is left out.
"""
import contextlib
import copy
import platform
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from block import MambaLM, generate, official_state_dict
from s6 import definition, selective_scan
from training import check_folders, run_script, write_rows


@contextlib.contextmanager
def kept_for_backward():
    """Notes what the operations in here keep for the backward pass: -> {address: bytes}."""
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()    # an output that kept itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield kept


def fastest(call, patience=2):
    """-> seconds of the fastest call; at least one, and more until `patience` seconds are over."""
    times = []
    while sum(times) < patience:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def add_row(rows, **row):
    """Print a row, the first one with its columns, and append it. Numbers come as text."""
    if not rows:
        print("  ".join(f"{column:>14s}" for column in row))
    print("  ".join(f"{value:>14}" for value in row.values()), flush=True)
    rows.append(row | {
        "threads": torch.get_num_threads(),
        "device": f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "command": f"python bench.py {sys.argv[1]}",
    })


def largest_error(ours, exact):
    """The largest difference, over the largest value."""
    return ((ours - exact).abs().max() / exact.abs().max()).item()


# --------------------------------------------------------------------------------------------------
# One scan over its length.

WAYS = {
    "definition": lambda *inputs: definition(*inputs)[0],
    "sequential": lambda *inputs: selective_scan(*inputs, method="sequential"),
    "parallel": lambda *inputs: selective_scan(*inputs, method="parallel"),
}


def random_inputs(b, l, d, n):
    """Random x, Δ (mostly 0.02 … 0.13), A, B, C, D, requiring gradients."""
    delta = F.softplus(torch.randn(b, l, d) - 3)
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    B = torch.randn(b, l, n)
    C = torch.randn(b, l, n)
    x = torch.randn(b, l, d)
    return [t.requires_grad_() for t in (x, delta, A, B, C, torch.ones(d))]


def scan(lengths=(64, 256, 1024, 4096, 16384, 65536)):
    """Forward and backward, b = 1, d = 128, n = 16: time, memory kept between the two, and error.

    The error is the largest of y against the definition in float64, over the largest |y|.
    """
    rows = []
    torch.manual_seed(0)
    for l in lengths:
        inputs = random_inputs(1, l, 128, 16)
        with torch.no_grad():
            exact, _ = definition(*(t.double() for t in inputs))
        for name, way in WAYS.items():
            if name == "definition" and l > 4096:      # its gradient takes l² steps
                continue

            def step():
                torch.autograd.grad(way(*inputs).square().mean(), inputs)

            with kept_for_backward() as kept:
                y = way(*inputs)
            step()                       # to warm up
            add_row(rows, way=name, length=l, milliseconds=f"{1e3 * fastest(step, 1):.2f}",
                    megabytes_kept=f"{sum(kept.values()) / 1e6:.2f}",
                    error=f"{largest_error(y, exact):.1e}")
    write_rows("results/scan_scaling.csv", rows)


# --------------------------------------------------------------------------------------------------
# A training step and generation beside other libraries, each in the ways that it documents.
#
# All have the same weights, so their losses, gradients and texts must agree. Without CUDA,
# transformers runs a loop over time in PyTorch; `use_mambapy` gives it the parallel scan of
# mambapy, and `use_associative_scan` that of PyTorch, which works under torch.compile alone.

class Ours:
    """This project. The others have the same methods, and say how they name their weights."""
    name = "this project"
    style = "transformers"

    def __init__(self, model):
        self.module = model

    def logits(self, tokens):
        return self.module(tokens)[0]

    def write(self, count):
        """The likeliest continuation of token 1: -> [token]."""
        return list(generate(self.module, torch.tensor([1]), count, temperature=0))

    def gradients(self, style=style):
        """-> {official name: gradient}."""
        model = copy.deepcopy(self.module)
        for ours, weight in zip(model.parameters(), self.module.parameters()):
            ours.data = weight.grad
        return official_state_dict(model, style)


class Transformers:
    """MambaForCausalLM, with one of its flags or none."""
    style = "transformers"

    def __init__(self, model, flag=""):
        from transformers import MambaConfig, MambaForCausalLM
        vocabulary, d_model = model.embedding.weight.shape
        flags = {flag: True} if flag else {}
        config = MambaConfig(vocab_size=vocabulary, hidden_size=d_model,
                             num_hidden_layers=len(model.layers), **flags)
        self.name = f"transformers {flag}".strip()
        self.module = MambaForCausalLM(config)
        self.module.load_state_dict(official_state_dict(model))
        self.module.generation_config.eos_token_id = None          # no token ends the text
        if flag == "use_associative_scan":
            torch.compiler.reset()       # how often one function is compiled has a limit
            for layer in self.module.backbone.layers:
                layer.compile()

    def logits(self, tokens):
        return self.module(tokens).logits

    def write(self, count):
        tokens = self.module.generate(torch.tensor([[1]]), max_new_tokens=count, do_sample=False)
        return tokens[0, 1:].tolist()

    def gradients(self):
        return {name: weight.grad for name, weight in self.module.named_parameters()}


class Mambapy:
    """mambapy's core, with our embedding and head: its language model imports CUDA packages."""
    name = "mambapy"
    style = "mamba_ssm"

    def __init__(self, model):
        from mambapy.mamba import Mamba, MambaConfig
        d_model = model.embedding.embedding_dim
        core = Mamba(MambaConfig(d_model=d_model, n_layers=len(model.layers)))
        weights = official_state_dict(model, self.style)
        core.load_state_dict({name.removeprefix("backbone."): weight
                              for name, weight in weights.items() if ".layers." in name})
        self.module = nn.ModuleDict({
            "core": core,
            "embedding": copy.deepcopy(model.embedding),
            "norm_f": copy.deepcopy(model.norm_f),
        })

    def head(self, x):
        return F.linear(self.module["norm_f"](x), self.module["embedding"].weight)

    def logits(self, tokens):
        return self.head(self.module["core"](self.module["embedding"](tokens)))

    @torch.no_grad()
    def write(self, count):
        core = self.module["core"]
        width = core.config.d_inner
        caches = [(None, torch.zeros(1, width, core.config.d_conv - 1)) for _ in core.layers]
        token = torch.tensor([1])
        text = []
        for _ in range(count):
            x, caches = core.step(self.module["embedding"](token), caches)
            token = self.head(x).argmax(-1)
            text.append(token.item())
        return text

    def gradients(self):
        return {"backbone." + name.removeprefix("core."): weight.grad
                for name, weight in self.module.named_parameters()}


LIBRARIES = [
    Ours,
    lambda model: Transformers(model, "use_associative_scan"),
    lambda model: Transformers(model, "use_mambapy"),
    Transformers,
    Mambapy,
]
SIZES = {  # vocabulary, d_model, layers; sequences and length of a batch
    "small": (65, 128, 4, 32, 128),
    "mamba-130m": (50280, 768, 24, 1, 256),
}


def peers(sizes=SIZES, count=50):
    """Forward, backward and AdamW on one thread; memory kept for the backward pass without the
    weights; tokens written per second; and whether loss, gradients and text are ours."""
    rows = []
    for size, (vocabulary, d_model, layers, b, l) in sizes.items():
        torch.manual_seed(0)
        model = MambaLM(vocabulary, d_model, layers)
        tokens = torch.randint(vocabulary, (b, l + 1))
        first = None
        for load in LIBRARIES:
            try:
                library = load(model)
            except ImportError as error:
                print(f"left out: {error}")
                continue
            first = first or library
            rows_of(library, first, tokens, count, rows, size)
    write_rows("results/peers.csv", rows)


def rows_of(library, first, tokens, count, rows, size):
    """Measure one library beside the first one, this project."""
    module = library.module
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)     # the weights stay
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:].flatten()

    def forward():
        return F.cross_entropy(library.logits(inputs).flatten(0, 1), targets)

    def step():
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    compiling = fastest(step, 0.001)
    seconds = fastest(step)
    ours = first.gradients(library.style)
    errors = []
    for name, gradient in library.gradients().items():
        errors.append(largest_error(gradient, ours[name]))
    with kept_for_backward() as kept:
        loss = forward()
    for weight in module.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    text = library.write(count)
    writing = fastest(lambda: library.write(count))
    add_row(rows, size=size, library=library.name, first_step_s=f"{compiling:.2f}",
            step_s=f"{seconds:.2f}", megabytes_kept=f"{sum(kept.values()) / 1e6:.0f}",
            tokens_per_s=f"{count / writing:.0f}", loss=f"{loss:.4f}",
            gradient_error=f"{max(errors):.0e}",
            same_text="yes" if text == first.write(count) else "no")


def main():
    tasks = {"scan": scan, "peers": peers}
    if len(sys.argv) != 2 or sys.argv[1] not in tasks:
        print(__doc__)
        return
    check_folders("results")
    torch.set_num_threads(1)
    tasks[sys.argv[1]]()


if __name__ == "__main__":
    run_script("bench.py", main, "nothing was written")
