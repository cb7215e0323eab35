# SPDX-License-Identifier: Apache-2.0
"""
The random numbers of augmentation, drawn for a whole block of an epoch's items at once.

Each item of an epoch has a row of a table, which depends on the seed, the epoch, the item's index and the kind of
device that draws: not on workers, processes, batches or what was drawn before. What is drawn follows torchvision's
`RandomResizedCrop` and `ColorJitter` and timm's RandAugment, AutoAugment, `RandomErasing` and `Mixup`.

A row has the words (fp32) `BOX` (top, left, height and width of the crop), `FLIP`, `SEED` (of noise), `MIX` (share of
the image itself; top, bottom, left, right of what is its partner's; share of its own label), then for each layer a
code of `CODES` with six numbers, and for each part that is erased top, bottom, left, right and three colours. Of a
batch that is mixed as a whole, the first item's row says how.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from ..data.augmentation import auto_augment, mixes, random_erasing
from ..errors import InputError
from ..settings.arguments import DataArguments


BLOCK = 65_536  # Rows that one generator draws.
BOX, FLIP, SEED, MIX, LAYERS = 0, 4, 5, 6, 12  # Where they begin in a row.
WORDS = 7  # Of a layer, and of a part that is erased.
TRIES = 10  # To find a crop, or a part to erase, that lies within the image: torchvision's and timm's number.

# What the kernels call the operations; 0 is for none.
_OPERATIONS = "AutoContrast Equalize Invert Posterize Solarize SolarizeAdd Color Contrast Brightness Sharpness Affine"
CODES = {name: code for code, name in enumerate(_OPERATIONS.split(), 1)}


def _rotation(degrees: torch.Tensor, height: int, width: int) -> tuple:
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    # About the centre; Pillow turns counter-clockwise.
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# Affine operations: an output pixel with its centre at (x, y) is taken from (a x + b y + c, d x + e y + f).
MATRICES: dict[str, Callable[[torch.Tensor, int, int], tuple]] = {
    "ShearX": lambda factor, height, width: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, height, width: (1, 0, 0, factor, 1, 0),
    "TranslateX": lambda pixels, height, width: (1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda pixels, height, width: (1, 0, 0, 0, 1, pixels),
    "TranslateXRel": lambda share, height, width: (1, 0, share * width, 0, 1, 0),
    "TranslateYRel": lambda share, height, width: (1, 0, 0, 0, 1, share * height),
    "Rotate": _rotation,
}


_ENHANCED = ("Color", "Contrast", "Brightness", "Sharpness")
# timm's operations: from the magnitude over 10, a sign and timm's parameters to the operation's number.
LEVELS: dict[str, Callable[[torch.Tensor, torch.Tensor, dict], torch.Tensor]] = {
    **{name: lambda level, sign, hparams: level * 0 for name in ("AutoContrast", "Equalize", "Invert")},
    "Posterize": lambda level, sign, hparams: (level * 4).floor(),
    "PosterizeIncreasing": lambda level, sign, hparams: 4 - (level * 4).floor(),
    "PosterizeOriginal": lambda level, sign, hparams: (level * 4).floor() + 4,
    "Solarize": lambda level, sign, hparams: (level * 256).floor().clamp(max=256),
    "SolarizeIncreasing": lambda level, sign, hparams: 256 - (level * 256).floor().clamp(max=256),
    "SolarizeAdd": lambda level, sign, hparams: (level * 110).floor().clamp(max=128),
    **{name: lambda level, sign, hparams: level * 1.8 + 0.1 for name in _ENHANCED},
    **{f"{name}Increasing": lambda level, sign, hparams: (1 + sign * level * 0.9).clamp(min=0.1) for name in _ENHANCED},
    "Rotate": lambda level, sign, hparams: sign * level * 30,
    **{f"Shear{axis}": lambda level, sign, hparams: sign * level * 0.3 for axis in "XY"},
    **{f"Translate{axis}": lambda level, sign, hparams: sign * level * hparams["translate_const"] for axis in "XY"},
    **{
        f"Translate{axis}Rel": lambda level, sign, hparams: sign * level * hparams.get("translate_pct", 0.45)
        for axis in "XY"
    },
}


def code_of(name: str) -> int:
    """In `CODES`, of an operation as timm calls it."""
    if name in MATRICES:
        return CODES["Affine"]
    return CODES[name.removesuffix("Increasing").removesuffix("Original")]


class Generator:
    """Of the numbers of `rows` rows on `device`, in fp64, so that levels are rounded as timm's are."""

    def __init__(self, rows: int, device: torch.device, *key: int):
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
        self.rows, self.device = rows, device
        self.torch = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int, low=0.0, high=1.0) -> torch.Tensor:
        numbers = torch.rand(self.rows, *shape, generator=self.torch, dtype=torch.float64, device=self.device)
        return numbers * (high - low) + low

    def whole(self, *shape: int, end) -> torch.Tensor:
        """Whole numbers from 0 to below `end`, a number or a tensor."""
        return (self.uniform(*shape) * end).floor()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.rows, *shape, generator=self.torch, dtype=torch.float64, device=self.device)

    def beta(self, alpha: float) -> torch.Tensor:
        """Of the symmetric distribution."""
        both = torch.full((2, self.rows), alpha, dtype=torch.float64, device=self.device)
        first, second = torch._standard_gamma(both, generator=self.torch).clamp(min=1e-300)
        return first / (first + second)


def _first(fits: torch.Tensor, *tried: torch.Tensor) -> list[torch.Tensor]:
    """Whether any of the tries (rows, `TRIES`) fits, and of each number the first that does."""
    order = torch.arange(TRIES, device=fits.device)
    first = torch.where(fits, order, TRIES).amin(1, keepdim=True)
    return [first[:, 0] < TRIES, *(numbers.gather(1, first.clamp(max=TRIES - 1))[:, 0] for numbers in tried)]


class Draws:
    """
    Draws the rows of items, for the model's images of `size`, height and width, whose pixels from 0 to 1 have a `mean`.
    Raises `InputError` where timm is missing, or `args.auto_augment` has operations that exist on the CPU only.
    """

    def __init__(self, args: DataArguments, size: tuple[int, int], mean, seed: int):
        self.args, self.size, self.seed = args, size, seed
        policies = auto_augment(args, size, mean)
        self.policy = Policy(policies[0], str(args.auto_augment)) if policies else None
        self.jitter = args.color_jitter if self.policy is None else 0.0
        self.erasing = random_erasing(args)
        self.layers = self.policy.layers if self.policy is not None else 3 if self.jitter > 0 else 0
        self.parts = args.random_erasing_count if self.erasing else 0
        self.begin_of_parts = LAYERS + self.layers * WORDS
        self.words = self.begin_of_parts + self.parts * WORDS

    def draw(self, device: torch.device, epoch: int, block: int, rows: int, sides=None) -> torch.Tensor:
        """
        So many `rows` of a `block` of an epoch, fp32 (rows, words). Crops are drawn of images of `sides`, heights and
        widths (rows, 2); `None`: they are cropped already.
        """
        generator = Generator(rows, device, self.seed, epoch, block)
        table = torch.zeros(rows, self.words, device=device)
        table[:, FLIP] = generator.uniform() < self.args.horizontal_flip
        table[:, SEED] = generator.whole(end=2**24).float()  # As much as fp32 tells apart.
        if mixes(self.args):
            table[:, MIX:LAYERS] = self._mixing(generator)
        if self.layers:
            operations = self._jitter(generator) if self.policy is None else self.policy.draw(generator, self.size)
            table[:, LAYERS : self.begin_of_parts] = operations.flatten(1)
        if self.parts:
            table[:, self.begin_of_parts :] = self._parts(generator).flatten(1)
        if sides is not None:
            table[:, BOX:FLIP] = self._crops(generator, *sides.double().unbind(1))
        return table

    def _crops(self, generator: Generator, height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
        """`BOX`, as `RandomResizedCrop` draws it."""
        (low, high), (least, most) = self.args.train_crop_ratio, self.args.train_crop_scale
        area = (height * width)[:, None] * generator.uniform(TRIES, low=least, high=most)
        ratio = generator.uniform(TRIES, low=math.log(low), high=math.log(high)).exp()
        tall, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = (tall > 0) & (tall <= height[:, None]) & (wide > 0) & (wide <= width[:, None])
        found, tall, wide = _first(fits, tall, wide)
        # Else the largest part in the middle whose ratio is allowed.
        tall = torch.where(found, tall, torch.where(width / height < low, (width / low).round(), height))
        wide = torch.where(found, wide, torch.where(width / height > high, (height * high).round(), width))
        top = torch.where(found, generator.whole(end=height - tall + 1), ((height - tall) / 2).floor())
        left = torch.where(found, generator.whole(end=width - wide + 1), ((width - wide) / 2).floor())
        return torch.stack([top, left, tall, wide], 1)

    def _jitter(self, generator: Generator) -> torch.Tensor:
        """(rows, 3, `WORDS`): brightness, contrast and saturation in any order, as `ColorJitter` draws them."""
        codes = torch.tensor([CODES[name] for name in ("Brightness", "Contrast", "Color")], device=generator.device)
        words = torch.zeros(generator.rows, 3, WORDS, device=generator.device)
        words[:, :, 0] = codes[generator.uniform(3).argsort(1)]
        words[:, :, 1] = generator.uniform(3, low=max(0.0, 1 - self.jitter), high=1 + self.jitter)
        return words

    def _parts(self, generator: Generator) -> torch.Tensor:
        """(rows, parts, `WORDS`), as timm's `RandomErasing` draws them; bottom and right are 0 for none."""
        (timm,), (height, width) = self.erasing, self.size
        # Given to fewer parts, each is larger.
        count = 1 + generator.whole(end=self.parts)
        erased = generator.uniform() < timm.probability
        parts = torch.zeros(generator.rows, self.parts, WORDS, device=generator.device)
        for part in range(self.parts):
            area = generator.uniform(TRIES, low=timm.min_area, high=timm.max_area) * (height * width) / count[:, None]
            low, high = timm.log_aspect_ratio
            ratio = generator.uniform(TRIES, low=low, high=high).exp()
            tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
            found, tall, wide = _first((tall < height) & (wide < width), tall, wide)
            top, left = generator.whole(end=height - tall + 1), generator.whole(end=width - wide + 1)
            box = torch.stack([top, top + tall, left, left + wide], 1)
            parts[:, part, :4] = torch.where((erased & found & (part < count))[:, None], box, 0.0)
            if timm.rand_color:
                parts[:, part, 4:] = generator.normal(3)
        return parts

    def _mixing(self, generator: Generator) -> torch.Tensor:
        """`MIX`, as timm's `Mixup` draws it."""
        args, (height, width) = self.args, self.size
        minmax = args.cutmix_minmax
        cutmix = 1.0 if minmax is not None else args.cutmix  # As timm has it.
        pasted = torch.full((generator.rows,), cutmix > 0, device=generator.device)
        if args.mixup > 0 and cutmix > 0:
            pasted = generator.uniform() < args.mixup_switch_prob
        share = generator.beta(args.mixup) if args.mixup > 0 else 0.0
        share = torch.where(pasted, generator.beta(cutmix), share) if cutmix > 0 else share
        share = torch.where(generator.uniform() < args.mixup_prob, share, 1.0)
        if minmax is None:
            tall, wide = (height * (1 - share).sqrt()).floor(), (width * (1 - share).sqrt()).floor()
            y, x = generator.whole(end=height), generator.whole(end=width)
            top, bottom = y - (tall / 2).floor(), y + ((tall + 1) / 2).floor()
            left, right = x - (wide / 2).floor(), x + ((wide + 1) / 2).floor()
        else:
            low, high = ([int(side * share_of_side) for side in self.size] for share_of_side in minmax)
            tall, wide = (generator.whole(end=max(most - least, 1)) + least for least, most in zip(low, high))
            top, left = generator.whole(end=height - tall + 1), generator.whole(end=width - wide + 1)
            bottom, right = top + tall, left + wide
        # Not below 1: either nothing is mixed, or nothing can be told from it.
        box = torch.stack([top.clamp(0, height), bottom.clamp(0, height), left.clamp(0, width), right.clamp(0, width)])
        box = torch.where(pasted & (share < 1), box, 0.0)
        own = torch.where(pasted, 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width), share)
        return torch.stack([torch.where(pasted, 1.0, share), *box, own], 1)


class Policy:
    """timm's RandAugment or AutoAugment, and what `auto_augment` calls it."""

    def __init__(self, transform, name: str):
        choices = getattr(transform, "policy", None) or [[op] for op in getattr(transform, "ops", ())]
        self.operations = [op for choice in choices for op in choice]
        missing = sorted({op.name for op in self.operations if op.name not in LEVELS})
        if missing or type(transform).__name__ == "AugMixAugment":
            which = f"uses {', '.join(missing)}" if missing else "mixes chains of operations"
            raise InputError(
                f"`auto_augment` {name!r} {which}, which only CPU workers do. Give --augment_on workers, or a policy "
                "such as 'rand-m15-n2-mstd1.0-inc1'."
            )
        # RandAugment takes so many operations one by one, AutoAugment one choice of several.
        self.each = len(choices[0])
        self.layers = getattr(transform, "num_layers", self.each)
        weights = getattr(transform, "choice_weights", None)
        self.again = weights is None
        self.weights = torch.ones(len(choices)) if weights is None else torch.as_tensor(weights)

    def draw(self, generator: Generator, size: tuple[int, int]) -> torch.Tensor:
        """(rows, layers, `WORDS`)."""
        device, shape, timm = generator.device, (self.layers,), self.operations[0]
        count = self.layers // self.each
        weights = self.weights.to(device).expand(generator.rows, -1)
        chosen = torch.multinomial(weights, count, self.again, generator=generator.torch)[:, :, None]
        chosen = (chosen * self.each + torch.arange(self.each, device=device)).flatten(1)
        known = [(op.prob, op.magnitude, list(LEVELS).index(op.name)) for op in self.operations]
        probability, level, names = torch.tensor(known, dtype=torch.float64, device=device)[chosen].unbind(-1)
        if timm.magnitude_std == math.inf:
            level = level * generator.uniform(*shape)
        elif timm.magnitude_std > 0:
            level = level + generator.normal(*shape) * timm.magnitude_std
        level = level.clamp(min=0, max=timm.magnitude_max or 10) / 10
        sign = 1 - 2 * generator.whole(*shape, end=2)
        words = torch.zeros(generator.rows, self.layers, WORDS, dtype=torch.float64, device=device)
        for name in dict.fromkeys(op.name for op in self.operations):
            number = LEVELS[name](level, sign, timm.hparams)
            numbers = MATRICES[name](number, *size) if name in MATRICES else (number,)
            is_this = names == list(LEVELS).index(name)
            for word, value in enumerate((code_of(name), *numbers)):
                value = torch.as_tensor(value, dtype=torch.float64, device=device)
                words[:, :, word] = torch.where(is_this, value, words[:, :, word])
        return torch.where((generator.uniform(*shape) < probability)[..., None], words, 0.0).float()
