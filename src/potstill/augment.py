"""Differentiable Siamese augmentation: random transforms made of drawn numbers and a pure function.

The draws are tensors of uniform numbers, made before the step; applying them is a fixed, differentiable graph.
So one set of draws serves the real and the synthetic batch alike, and can be stored and replayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from potstill.errors import PotstillError, unknown
from potstill.functional import Key

_PARAMETERS = {  # every operation and the uniform numbers it consumes
    "color": ("brightness", "saturation", "contrast"),
    "crop": ("crop_x", "crop_y"),
    "cutout": ("cutout_x", "cutout_y"),
    "flip": ("flip",),
    "scale": ("scale_x", "scale_y"),
    "rotate": ("rotate",),
}
OPS = tuple(_PARAMETERS)
MODES = ("one", "all")
LATER = {"jitter": 0.0, "fill": "zero"}  # fields that there were not at first, and what they did not say
FILLS = {"zero": "zeros", "edge": "border"}  # what a warp brings in from outside, and PyTorch's name for it
_WARPS = {"crop", "flip", "scale", "rotate"}
_LIMITS = {  # smallest and largest value of each number
    **dict.fromkeys(("strength", "brightness", "saturation", "contrast", "jitter", "rotate"), (0.0, math.inf)),
    **dict.fromkeys(("crop", "cutout", "flip"), (0.0, 1.0)),
    "scale": (1.0, math.inf),
}


@dataclass(frozen=True)
class Augment:
    r"""Random image transforms, differentiable in the image and shared by all samples of a group on request.

    With s the strength, each u uniform in [0, 1), m(x) the mean over channels and M(x) that over the whole image:

    - color: x + s b (u - 1/2), then m + (x - m)(1 + s (u a - 1)), then M + (x - M)(1 + s (u + c - 1)) for
      brightness b, saturation a, contrast c; with jitter j above 0, both factors are exp(s j (2 u - 1)) instead;
    - crop: a shift by whole pixels, uniform in ±round(s crop H) and ±round(s crop W);
    - flip: left to right with probability min(s, 1) flip;
    - scale: source coordinates times factors uniform in [scale^-s, scale^s], one for x and one for y: above 1 shrinks;
    - rotate: by an angle uniform in ±s rotate, in pixel units, hence without shear on rectangles;
    - cutout: zeros in a patch of round(s cutout H) x round(s cutout W) pixels around a random place, cut at the border.

    What comes from outside the image is zero, or with fill "edge" the nearest pixel of the border. Mode "one" applies
    one operation, drawn per group; mode "all" applies color, then the composition of crop, flip, scale and rotate in
    this order, then cutout. The composition is resampled once, bilinearly: less blur than one transform after the
    other, and nothing that one of them moves out of the image and the next one back in is lost. The order of `ops`
    does not matter to either mode's distribution.

    Args:
        ops: Names from `OPS`; none is the identity.
        mode: "one" or "all".
        strength: Factor of every range; 0 is the identity, 1 are the paper's ranges.
        brightness: Width of the range of the added constant, in units of x.
        saturation: Largest factor of the distance to the channel mean; one channel is left as it is.
        contrast: Smallest factor of the distance to the image mean; the largest is one more.
        jitter: Logarithm of the largest factor of both distances, in place of saturation and contrast; 0 for those.
        crop: Largest shift, as a part of height and width.
        cutout: Side of the patch, as a part of height and width.
        flip: Probability.
        scale: Largest factor.
        rotate: Largest angle in degrees, counterclockwise positive.
        fill: "zero" or "edge". Zero is the mean where inputs are standardised: a grey frame around a black background.
        align_corners: Convention of the sampling grid. All transforms are about the image's centre and in pixels, so
            both give the same image up to rounding.

    Raises:
        PotstillError: An unknown name, an operation named twice or a number out of range.

    Example:
        >>> augment = Augment.parse("crop_flip")
        >>> draws = augment.draws(Key(0), groups=10)
        >>> real, synthetic = torch.rand(10, 64, 3, 8, 8), torch.rand(10, 1, 3, 8, 8)
        >>> augment(real, draws).shape, augment(synthetic, draws).shape
        (torch.Size([10, 64, 3, 8, 8]), torch.Size([10, 1, 3, 8, 8]))

    Reference:
        Zhao and Bilen 2021, "Dataset Condensation with Differentiable Siamese Augmentation", ICML. Not from the
        paper: `strength`, mode "all" with one resampling, rotation without shear; `jitter` and fill "edge", which are
        those of FRePo's evaluation.
    """

    ops: tuple[str, ...] = ()
    mode: str = "one"
    strength: float = 1.0
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    jitter: float = 0.0
    crop: float = 0.125
    cutout: float = 0.5
    flip: float = 0.5
    scale: float = 1.2
    rotate: float = 15.0
    fill: str = "zero"
    align_corners: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.ops, str):
            raise PotstillError(f"ops must be a tuple of names, got '{self.ops}'; Augment.parse reads such a string")
        object.__setattr__(self, "ops", tuple(self.ops))  # a list, as files hold it, could not be hashed
        for op in self.ops:
            if op not in OPS:
                raise unknown("augmentation in ops", str(op), OPS)
        if len(set(self.ops)) < len(self.ops):
            raise PotstillError(f"ops must name each augmentation once, got {self.name}")
        if self.mode not in MODES:
            raise unknown("augmentation mode", str(self.mode), MODES)
        if self.fill not in FILLS:
            raise unknown("augmentation fill", str(self.fill), FILLS)
        for field, (low, high) in _LIMITS.items():
            value = getattr(self, field)
            if not (isinstance(value, int | float) and low <= value <= high and math.isfinite(value)):
                allowed = f"in [{low:g}, {high:g}]" if high < math.inf else f"finite and at least {low:g}"
                raise PotstillError(f"{field} must be a number {allowed}, got {value!r}")

    @classmethod
    def parse(cls, text: str, mode: str = "one", strength: float = 1.0) -> Augment:
        """Read the usual short form, `"color_crop_flip"`; `""` and `"none"` are the identity."""
        return cls(() if text in ("", "none") else tuple(text.split("_")), mode, strength)

    @property
    def name(self) -> str:
        """The operations in the form that `parse` reads."""
        return "_".join(self.ops) or "none"

    def __str__(self) -> str:
        return self.name

    def plain(self) -> dict[str, Any]:
        """Its fields by name; those of `LATER` only where they say something, so that older files and hashes agree."""
        return {k: v for k, v in asdict(self).items() if k not in LATER or v != LATER[k]}

    @property
    def is_identity(self) -> bool:
        """Whether nothing is ever changed."""
        return not self.ops or self.strength == 0

    @property
    def _names(self) -> list[str]:
        return [name for op in self.ops for name in _PARAMETERS[op]] + ["op"] * (self.mode == "one")

    def draws(self, key: Key, groups: int, per_group: int | None = None) -> dict[str, Tensor]:
        """Everything random of one call: independent numbers u ~ U[0, 1) and, in mode "one", the chosen operation.

        Args:
            key: Where the numbers come from.
            groups: G, the number of groups.
            per_group: `None` for one transform per group (Siamese), n for one per sample.

        Returns:
            Float tensors (G, 1) or (G, n) by parameter, and "op", the place in `ops` (G, 1): one operation per group
            either way. They do not depend on the image's size. Empty for the identity.
        """
        if self.is_identity:
            return {}
        shape = (groups, 1 if per_group is None else per_group)
        return {
            name: key.fold(name).integers(len(self.ops), groups, 1) if name == "op" else key.fold(name).uniform(*shape)
            for name in self._names
        }

    def __call__(self, x: Float[Tensor, "g n *shape"], draws: Mapping[str, Tensor]) -> Float[Tensor, "g n *shape"]:
        """Apply drawn transforms: pure, differentiable in x, the same graph whatever was drawn.

        Args:
            x: Images (G, n, C, H, W) of any floating type, at any scale; what `fill` and cutout call zero is 0 there.
            draws: What `draws` returned for the same G and, unless Siamese, the same n.

        Returns:
            Images of the shape and type of x, computed in float32 or, for float64, in float64. x itself for the
            identity.

        Raises:
            PotstillError: x is not a batch of images, or the draws are of another shape or augmentation.
        """
        if self.is_identity:
            return x
        if x.ndim != 5 or not x.is_floating_point():
            raise PotstillError(
                f"augmentation '{self.name}' takes floating-point images (groups, samples, channels, height, width), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        shapes = (x.shape[0], 1), tuple(x.shape[:2])
        for name in self._names:
            if name not in draws or tuple(draws[name].shape) not in shapes:
                got = tuple(draws[name].shape) if name in draws else "none"
                raise PotstillError(f"draws of '{name}' must have shape {shapes[0]} or {shapes[1]}, got {got}")
        u = {name: draws[name].to(x.device, dtype)[..., None, None] for name in self._names}
        out = x.to(dtype)
        if "color" in self.ops:
            out = self._color(out, u)
        if _WARPS & set(self.ops):
            out = self._warp(out, u)
        if "cutout" in self.ops:
            out = self._cutout(out, u)
        return out.to(x.dtype)

    def _pick(self, op: str, u: dict[str, Tensor], drawn: Tensor, neutral: float) -> Tensor:
        """The drawn parameter where the operation acts, the neutral one elsewhere: the graph itself cannot change."""
        return torch.where(u["op"] == self.ops.index(op), drawn, neutral) if self.mode == "one" else drawn

    def _color(self, x: Tensor, u: dict[str, Tensor]) -> Tensor:
        s, u = self.strength, {name: number[..., None] for name, number in u.items()}  # (G, n or 1, C, H, W)
        b = self._pick("color", u, s * self.brightness * (u["brightness"] - 0.5), 0)
        if self.jitter:
            factors = [(s * self.jitter * (2 * u[name] - 1)).exp() for name in ("saturation", "contrast")]
        else:
            factors = [1 + s * (u["saturation"] * self.saturation - 1), 1 + s * (u["contrast"] + self.contrast - 1)]
        a, c = (self._pick("color", u, factor, 1) for factor in factors)
        # saturation keeps the channel mean, so the three steps in turn are one sum over the same two means
        grey = x.mean(2, keepdim=True)
        return c * a * x + (c * (1 - a) * grey + (1 - c) * grey.mean((3, 4), keepdim=True) + b)

    def _warp(self, x: Tensor, u: dict[str, Tensor]) -> Tensor:
        groups, n, channels, h, w = x.shape
        # from output to source, in pixels from the centre; so the last operation comes first
        across, down = _range(w, x) - (w - 1) / 2, _range(h, x)[:, None] - (h - 1) / 2
        if "rotate" in self.ops:
            angle = self._pick("rotate", u, math.radians(self.rotate) * self.strength * (2 * u["rotate"] - 1), 0)
            cos, sin = angle.cos(), angle.sin()
            across, down = cos * across - sin * down, sin * across + cos * down
        if "scale" in self.ops:
            high = self.scale**self.strength
            low = 1 / high
            across = across * self._pick("scale", u, low + (high - low) * u["scale_x"], 1)
            down = down * self._pick("scale", u, low + (high - low) * u["scale_y"], 1)
        if "flip" in self.ops:
            flipped = u["flip"] < self.flip * min(self.strength, 1)
            across = across * self._pick("flip", u, 1 - 2 * flipped.to(x.dtype), 1)
        if "crop" in self.ops:
            far_x, far_y = _pixels(self.strength * self.crop, w), _pixels(self.strength * self.crop, h)
            across = across + self._pick("crop", u, _whole(u["crop_x"], 2 * far_x + 1) - far_x, 0)
            down = down + self._pick("crop", u, _whole(u["crop_y"], 2 * far_y + 1) - far_y, 0)
        edge = int(self.align_corners)  # ±1 is the centre of the outermost pixels, or else their outer side
        across, down = torch.broadcast_tensors(across * (2 / max(w - edge, 1)), down * (2 / max(h - edge, 1)))
        grid = torch.stack([across, down], -1).flatten(0, 1)
        # samples that share a transform are channels of one image: G grids, not G n
        images = x.reshape(len(grid), groups * n // len(grid) * channels, h, w)
        warped = F.grid_sample(images, grid, "bilinear", FILLS[self.fill], self.align_corners).reshape(x.shape)
        if self.mode == "all" or set(self.ops) <= _WARPS:
            return warped
        # resampling by the identity errs by about 1e-4 at 224 pixels: groups with another operation keep theirs
        acts = torch.stack([u["op"] == i for i, op in enumerate(self.ops) if op in _WARPS]).any(0)
        return torch.where(acts[..., None], warped, x)

    def _cutout(self, x: Tensor, u: dict[str, Tensor]) -> Tensor:
        def inside(place: Tensor, index: Tensor) -> Tensor:
            side = _pixels(self.strength * self.cutout, index.numel())
            # an even patch is centred between two pixels: one place more, so that both borders are alike
            first = _whole(place, index.numel() + 1 - side % 2) - side // 2
            return (index >= first) & (index < first + self._pick("cutout", u, torch.full_like(first, side), 0))

        h, w = x.shape[3:]
        patch = inside(u["cutout_y"], _range(h, x)[:, None]) & inside(u["cutout_x"], _range(w, x))
        return x.masked_fill(patch[:, :, None], 0)


def _pixels(part: float, size: int) -> int:
    """A part of a length in whole pixels, halves upwards (Python's `round` would take them to the even side)."""
    return math.floor(part * size + 0.5)


def _whole(u: Tensor, n: int) -> Tensor:
    """Uniform numbers in [0, 1) as whole ones in 0 ... n-1."""
    return (u * n).floor()


def _range(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device, dtype=like.dtype)
