"""vision.py: an image has no first pixel: read it from both ends.

    tokens = stem(image) + position               28×28 pixels -> 7×7 = 49 tokens, row by row
    y      = fuse(S6→(tokens), S6←(tokens))       one scan from the first patch, one from the last
    logits = head(pool(norm(blocks(tokens))))

A scan carries information one way only: to a causal model, the upper left corner of a digit never
knows what the lower right looks like. The bidirectional block scans the same tokens twice, each
time with a convolution and an S6 of its own, the second time in reverse, and fuses the two outputs
by average or concatenation. (Vision Mamba adds them; half the sum starts as large as one scan.)

direction="causal" is the control: the same two branches, parameters and cost, and the second branch
is merely not reversed. What differs between the two models is the direction, and nothing else.

Symbols: the glossary of s6.py. Left out: a class token (`pool` reads all tokens), and pre-training.
Read before: block.py. Read next: rnn.py, what came before; then train_mnist.py.
Source: Zhu et al. 2024, "Vision Mamba", sections 3.2 and 3.3. The convolutional stem: Xiao et al.
2021, "Early Convolutions Help Transformers See Better".
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from block import ConvS6, RMSNorm, scale_residuals

DIRECTIONS, FUSIONS = ("bidirectional", "causal"), ("average", "concat")
STEMS, POOLS = ("conv", "patch"), ("mean", "max", "last")


def _choose(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


# --------------------------------------------------------------------------------------------------
# From pixels to tokens.

class PixelNorm(RMSNorm):
    """RMSNorm over the channels of each pixel, (b, c, h, w) both.

    Not BatchNorm or GroupNorm: statistics of the whole image, or of the batch, would tell the first
    token about the last, and the causal model would not be causal.
    """

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Stem(nn.Module):
    """Images (b, channels, height, width) -> tokens (b, l, d_model), row by row.

    There are l = height/patch · width/patch tokens.
    "patch"  each patch of pixels is flattened and mapped linearly, as in ViT: no overlap
    "conv"   for a patch of 2 or 4: three 3×3 convolutions that shrink the image by 1, 2 and
             patch/2, the last one channel by channel, and a linear map to d_model. The same tokens
             in the same order, but each sees more than its patch: 9×9 pixels for a patch of 4. A
             stroke becomes an edge before it becomes a token
    """

    def __init__(self, channels, d_model, patch=4, kind="conv"):
        super().__init__()
        self.channels = channels
        if _choose("stem", kind, STEMS) == "patch":
            self.net = nn.Conv2d(channels, d_model, patch, stride=patch)
            return
        if patch not in (2, 4):      # three small kernels see no more than 9×9 pixels
            raise ValueError(f"the conv stem is made for a patch of 2 or 4, got {patch}")
        thin, wide = 16, 32
        self.net = nn.Sequential(
            nn.Conv2d(channels, thin, 3, padding=1, bias=False), PixelNorm(thin), nn.SiLU(),
            nn.Conv2d(thin, wide, 3, stride=2, padding=1, bias=False), PixelNorm(wide), nn.SiLU(),
            nn.Conv2d(wide, wide, 3, stride=patch // 2, padding=1, groups=wide),
            nn.Conv2d(wide, d_model, 1))

    def forward(self, images):
        """Raises ValueError for another number of channels."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must have shape (b, {self.channels}, height, width), "
                             f"got {tuple(images.shape)}")
        return self.net(images).flatten(2).transpose(1, 2)                     # (b, l, d_model)


def _check_divisible(size, patch):
    if any(side % patch for side in size):
        raise ValueError(f"patch {patch} does not divide an image of {size[0]}x{size[1]} pixels")


# --------------------------------------------------------------------------------------------------
# The block: two scans over the same tokens.

class VisionBlock(nn.Module):
    """x ↦ x + out_proj(fuse(S6→, S6←) · SiLU(z)), (b, l, d_model) both: two paths of block.py."""

    def __init__(self, d_model, n=16, expand=2, direction="bidirectional", fuse="average"):
        super().__init__()
        self.direction = _choose("direction", direction, DIRECTIONS)
        self.fuse = _choose("fuse", fuse, FUSIONS)
        d = expand * d_model
        self.norm = RMSNorm(d_model)
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.first, self.second = ConvS6(d, n), ConvS6(d, n)
        self.out_proj = nn.Linear(d if fuse == "average" else 2 * d, d_model, bias=False)

    def forward(self, x):
        a, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)                     # (b, l, d) each
        first, gate = self.first(a), F.silu(z)
        if self.direction == "bidirectional":
            second = self.second(a.flip(1)).flip(1)
        else:
            second = self.second(a)
        if self.fuse == "average":
            y = (first + second) * (0.5 * gate)                                # (b, l, d)
        else:
            y = torch.cat([first * gate, second * gate], dim=-1)               # (b, l, 2d)
        return x + self.out_proj(y)


# --------------------------------------------------------------------------------------------------
# The classifier: one frame, whatever reads the tokens.

class ImageClassifier(nn.Module):
    """Images (b, channels, height, width) -> logits (b, classes), by any body that reads tokens.

    body        module, (b, l, d_model) -> (b, l, width). Mamba here, and in train_mnist.py also the
                RNN and S4 of rnn.py: models then differ in their body alone
    image_size  (height, width) in pixels, both divisible by patch
    position    add a learned vector for each place. A recurrence can also count by itself, and
                where every pixel is a token, the table would cost 50,000 parameters
    pool        "mean" or "max" over the tokens, or "last": the one at the end of the scan
    Raises ValueError for a size that patch does not divide, and for an unknown stem or pool.
    """

    def __init__(self, body, d_model, width, *, image_size=(28, 28), channels=1, patch=4,
                 classes=10, stem="conv", position=True, pool="mean"):
        super().__init__()
        _check_divisible(image_size, patch)
        self.image_size, self.pool = tuple(image_size), _choose("pool", pool, POOLS)
        self.stem = Stem(channels, d_model, patch, stem)
        tokens = (image_size[0] // patch) * (image_size[1] // patch)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, d_model)) if position else 0.0
        self.body = body
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        """Raises ValueError for images of another shape than the model was made for."""
        if images.ndim == 4 and tuple(images.shape[2:]) != self.image_size:
            raise ValueError(f"images must have {self.image_size[0]}x{self.image_size[1]} pixels, "
                             f"got shape {tuple(images.shape)}")
        x = self.norm(self.body(self.stem(images) + self.position))            # (b, l, width)
        if self.pool == "mean":
            x = x.mean(1)
        elif self.pool == "max":
            x = x.amax(1)
        else:
            x = x[:, -1]
        return self.head(x)                                                    # (b, classes)


class VisionMamba(ImageClassifier):
    """An ImageClassifier whose body is a stack of VisionBlocks; `frame` goes to ImageClassifier."""

    def __init__(self, d_model=64, layers=2, n=16, direction="bidirectional", fuse="average",
                 **frame):
        blocks = [VisionBlock(d_model, n, direction=direction, fuse=fuse) for _ in range(layers)]
        scale_residuals(blocks)
        super().__init__(nn.Sequential(*blocks), d_model, d_model, **frame)
