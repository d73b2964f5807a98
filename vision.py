"""vision.py: images as sequences of patches, scanned one way or both.

Vision Mamba scans an image forward and backward, and fuses what the two scans say:

    tokens = stem(image) + position               28×28 pixels -> 7×7 = 49 tokens, row by row
    y      = fuse(S6→(tokens), S6←(tokens))       one scan from the first patch, one from the last
    logits = head(pool(norm(blocks(tokens))))

A scan carries information one way only: in a causal model the tokens of the upper left corner never
see the lower right. The bidirectional block scans the same tokens twice, each time with a
convolution and an S6 of its own, the second time in reverse. Then it fuses the two outputs by
average or concatenation. (Vision Mamba's paper adds them; the released models also divide by 2.)

Where the tokens are single pixels, an image can also be generated: `PixelLM` guesses each pixel
from those before it.

direction="causal" is the control: the same two branches, parameters and cost, and the second branch
is merely not reversed. What differs between the two models is the direction, and nothing else.
direction="forward" has one branch alone. It is what most people mean by a causal Mamba, but with
half the scans it is no fair control: `python train_mnist.py poster --compare` shows both.

Symbols: the glossary of s6.py. Left out: a class token, and pre-training.
Read before: block.py. Read next: rnn.py, what came before; then train_mnist.py.
Source: Zhu et al. 2024, "Vision Mamba", sections 3.2 and 3.3. The convolutional stem: Xiao et al.
2021, "Early Convolutions Help Transformers See Better".
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from block import ConvS6, RMSNorm, scale_residuals
from s6 import choose

DIRECTIONS = ("bidirectional", "causal", "forward")
FUSIONS = ("average", "concat")
STEMS = ("conv", "deep", "patch")
POSITIONS = ("patches", "axes", "none")
POOLS = {  # tokens (b, l, width) -> (b, width)
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "last": lambda x: x[:, -1],
}


# --------------------------------------------------------------------------------------------------
# From pixels to tokens.

class PixelNorm(RMSNorm):
    """RMSNorm over the channels of each pixel: (b, channels, height, width), in and out.

    Not BatchNorm or GroupNorm: they would tell each token about the whole image, or the batch. With
    this norm a token sees its neighbourhood alone, which reaches into the row below.
    """

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _conv(inputs, outputs, stride, **options):
    """A convolution that shrinks the image by stride, 1 or 2, and is centred either way.

    The window is 3×3 where the size stays and 4×4 where it halves: an output then sees one pixel
    beyond its own on every side. A 3×3 window of stride 2 would see a pixel above and to the left
    of its own four, and none below and to the right. A backward scan would then not be the mirror
    image of a forward scan.
    """
    return nn.Conv2d(inputs, outputs, 2 + stride, stride=stride, padding=1, **options)


def _conv_norm(inputs, outputs, stride):
    """A convolution that shrinks the image by stride, a norm, and a nonlinearity (SiLU)."""
    return _conv(inputs, outputs, stride, bias=False), PixelNorm(outputs), nn.SiLU()


class Stem(nn.Module):
    """Images (b, channels, height, width) -> tokens (b, l, d_model), row by row.

    There are l = height/patch · width/patch tokens.
    "patch"  each patch of pixels is flattened and mapped linearly, as in ViT: no overlap
    "conv"   for a patch of 2 or 4: three convolutions that shrink the image by 1, 2 and patch/2,
             the last one depthwise, and a linear map to d_model. The same tokens in the same
             order, but each sees more than its patch, by the same margin on every side: 12×12
             pixels for a patch of 4
    "deep"   for photographs: five full convolutions. The first has d_model/4 channels, the second
             d_model/2, the others d_model. The first three shrink the image as above; the last two,
             on the small image, are most of the work. Each token sees 28×28 pixels for a patch of 4
    Raises ValueError for another kind, and for a patch that the convolutions cannot have.
    """

    def __init__(self, channels, d_model, patch=4, kind="conv"):
        super().__init__()
        choose("stem", kind, STEMS)
        if kind == "patch":
            self.net = nn.Conv2d(channels, d_model, patch, stride=patch)
            return
        if patch not in (2, 4):          # see _conv: a stride is 1 or 2
            raise ValueError(f"the {kind} stem is made for a patch of 2 or 4, got {patch}: the "
                             f"stem \"patch\" takes any")
        if kind == "conv":
            self.net = nn.Sequential(
                *_conv_norm(channels, 16, 1), *_conv_norm(16, 32, 2),
                _conv(32, 32, patch // 2, groups=32),
                nn.Conv2d(32, d_model, 1))
        else:
            self.net = nn.Sequential(
                *_conv_norm(channels, d_model // 4, 1), *_conv_norm(d_model // 4, d_model // 2, 2),
                *_conv_norm(d_model // 2, d_model, patch // 2), *_conv_norm(d_model, d_model, 1),
                _conv(d_model, d_model, 1))

    def forward(self, images):
        return self.net(images).flatten(2).transpose(1, 2)                     # (b, l, d_model)


def along_axes(table, rows, columns):
    """A vector per row, then one per column, (rows + columns, d) -> one per token, (l, d).

    Each token gets the vector of its row plus that of its column; l = rows · columns.
    """
    row, column = table.split([rows, columns])
    return (row.unsqueeze(1) + column).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# The block: two scans over the same tokens, or one.

class VisionBlock(nn.Module):
    """x -> x + out_proj(fuse(S6→, S6←) · SiLU(z)), (b, l, d_model), with two ConvS6, or one.

    direction   "bidirectional", "causal" (both paths forward), "forward" (one path: a MambaBlock)
    fuse        the two paths by "average" or "concat"
    settings    of ConvS6 and of S6: d_conv, dt_rank, discretization, selection
    """

    def __init__(self, d_model, n=16, expand=2, direction="bidirectional", fuse="average",
                 **settings):
        super().__init__()
        self.direction = choose("direction", direction, DIRECTIONS)
        self.fuse = choose("fuse", fuse, FUSIONS)
        d = expand * d_model
        self.norm = RMSNorm(d_model)
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.first = ConvS6(d, n, **settings)
        self.second = None if direction == "forward" else ConvS6(d, n, **settings)
        width = 2 * d if self.second and fuse == "concat" else d
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x):
        a, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)                     # (b, l, d) each
        gate = F.silu(z)
        first, _ = self.first(a)         # an image is read whole: its last state is not needed
        if self.direction == "forward":
            return x + self.out_proj(first * gate)
        if self.direction == "bidirectional":
            second, _ = self.second(a.flip(1))         # from the last token to the first
            second = second.flip(1)
        else:                            # "causal": forward again
            second, _ = self.second(a)
        if self.fuse == "average":
            y = (first + second) * (0.5 * gate)                                # (b, l, d)
        else:                            # "concat"
            y = torch.cat([first * gate, second * gate], dim=-1)               # (b, l, 2d)
        return x + self.out_proj(y)


# --------------------------------------------------------------------------------------------------
# The classifier: the same stem, pooling and head around any model that reads tokens.

class ImageClassifier(nn.Module):
    """Images (b, channels, height, width) -> logits (b, classes), by any body that reads tokens.

    body        module, (b, l, d_model) -> (b, l, width). Mamba here, and in train_mnist.py also the
                RNN and S4 of rnn.py: the models then differ in their body alone
    image_size  (height, width) in pixels, both divisible by patch
    position    the learned vectors that are added: "patches" one for each token, "axes" one for
                its row and one for its column, since a table of every pixel would be large, "none"
    pool        "mean" or "max" over the tokens, or "last": the one at the end of the scan
    Raises ValueError for a size that patch does not divide, and for an unknown stem, position or
    pool.
    """

    no_decay = ("position",)

    def __init__(self, body, d_model, width, *, image_size=(28, 28), channels=1, patch=4,
                 classes=10, stem="conv", position="patches", pool="mean"):
        super().__init__()
        if any(side % patch for side in image_size):
            raise ValueError(f"patch {patch} does not divide an image of {image_size[0]}x"
                             f"{image_size[1]} pixels")
        choose("position", position, POSITIONS)
        choose("pool", pool, tuple(POOLS))
        self.pool = POOLS[pool]
        self.shape = (channels, *image_size)
        self.stem = Stem(channels, d_model, patch, stem)
        rows = image_size[0] // patch
        columns = image_size[1] // patch
        self.grid = (rows, columns)
        self.axes = position == "axes"
        vectors = rows + columns if self.axes else rows * columns
        self.position = None
        if position != "none":
            self.position = nn.Parameter(0.02 * torch.randn(vectors, d_model))
        self.body = body
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        """Raises ValueError for images of another shape than the model was made for."""
        if images.ndim != 4 or images.shape[1:] != self.shape:
            raise ValueError(f"images must have shape (b, *{self.shape}), got "
                             f"{tuple(images.shape)}")
        x = self.stem(images)                                                  # (b, l, d_model)
        if self.axes:
            x = x + along_axes(self.position, *self.grid)
        elif self.position is not None:
            x = x + self.position
        x = self.norm(self.body(x))                                            # (b, l, width)
        return self.head(self.pool(x))                                         # (b, classes)


class VisionMamba(ImageClassifier):
    """An ImageClassifier whose body is a stack of VisionBlocks; `frame` goes to ImageClassifier."""

    def __init__(self, d_model=64, layers=2, n=16, direction="bidirectional", fuse="average",
                 discretization="euler", selection="all", d_conv=4, **frame):
        how = dict(direction=direction, fuse=fuse, discretization=discretization,
                   selection=selection, d_conv=d_conv)
        blocks = [VisionBlock(d_model, n, **how) for _ in range(layers)]
        scale_residuals(blocks)
        super().__init__(nn.Sequential(*blocks), d_model, d_model, **frame)


# --------------------------------------------------------------------------------------------------
# An image as a text: the next pixel from those before.

GREYS = 256
BEGIN = GREYS        # the token before the first pixel


class PixelLM(nn.Module):
    """Tokens (b, l) int64, BEGIN and then pixels -> logits (b, l, 256) for the pixel after each.

    blocks      MambaBlocks, or the S4Blocks of rnn.py: block(x, state) -> y, state
    d_model     their width
    image_size  (height, width)

    A language model whose words are grey values, read row by row. It is shown the last pixel, and
    the row and the column of the pixel that it must guess. All else, the row above included, must
    come from the state.
    """

    no_decay = ("position",)

    def __init__(self, blocks, d_model, image_size=(28, 28)):
        super().__init__()
        self.image_size = tuple(image_size)
        self.embedding = nn.Embedding(GREYS + 1, d_model)
        self.position = nn.Parameter(0.1 * torch.randn(sum(image_size), d_model))
        self.blocks = nn.ModuleList(blocks)
        scale_residuals(self.blocks)
        self.norm = RMSNorm(d_model)
        self.head = nn.Linear(d_model, GREYS)

    def forward(self, tokens):
        return self.read(tokens)[0]

    def read(self, tokens, past=None):
        """The same, and what to go on from: how many tokens were read, and the blocks' states.

        past    what an earlier call returned beside the logits; None at the beginning
        Raises ValueError for more tokens than the image has pixels.
        """
        place, states = past or (0, [None] * len(self.blocks))
        end = place + tokens.shape[1]
        position = along_axes(self.position, *self.image_size)                 # (pixels, d_model)
        if end > len(position):
            raise ValueError(f"PixelLM: {end} tokens, and the image has {len(position)} pixels")
        new = []
        x = self.embedding(tokens) + position[place:end]                       # (b, l, d_model)
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state)
            new.append(state)
        return self.head(self.norm(x)), (end, new)


@torch.inference_mode()
def complete(model, given, length, seed):
    """Continue images: model a PixelLM, given (b, g) int64, g < length -> (b, length).

    The pixels that are given are read in one call; then every pixel is a step of the recurrence,
    sampled from softmax(logits). The same seed gives the same pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = F.pad(given, (1, 0), value=BEGIN)                                 # (b, 1+g)
    states = None
    pixels = [given]
    for _ in range(length - given.shape[1]):
        logits, states = model.read(tokens, states)
        chances = logits[:, -1].softmax(-1).cpu()                              # (b, 256)
        tokens = torch.multinomial(chances, 1, generator=generator).to(given)  # (b, 1)
        pixels.append(tokens)
    return torch.cat(pixels, 1)
