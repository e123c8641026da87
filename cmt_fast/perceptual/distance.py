"""Perceptual distances: LPIPS on pixels (Zhang et al. 2018) and its like on latents (Kang et al. 2024, E-LatentLPIPS).

    d(x, y) = sum over five slices of the mean over space of sum_c w_c (n(f_c(x)) - n(f_c(y)))^2

with n the normalisation over channels; w are LPIPS' linear heads on pixels and 1 on latents. Pixels are compared as they
are, neither resized nor clamped; latents under one random augmentation of both. The networks are fixed files whose
checksums stay with the stage: VGG16 and its heads are the user's, the classifier of latents is made by `cmt
train-features`. They run in fp32 outside the stage's autocast.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cmt_fast.config.errors import ConfigError, one_line
from cmt_fast.config.schema import Perceptual
from cmt_fast.diffusion.rng import Random
from cmt_fast.models.vgg import CONVOLUTIONS, LatentVgg, PixelVgg, Vgg
from cmt_fast.perceptual import augment
from cmt_fast.perceptual.augment import Augmentation
from cmt_fast.storage import files
from cmt_fast.storage.files import checksum, save_tensors, sync

KIND = "cmt_fast latent features 1"


class Distance:
    """distance(x, target, drawn) -> (B,), gradient to x only; drawn: `distance.draw(...)` of this step.

    The features of a target that comes again may be given. Where both are augmented they cannot: each row draws its own
    augmentation, so the same target is another image in every row.
    """

    def __init__(self, net: Vgg, weights: list[Tensor] | None, augmented: bool) -> None:
        """weights: of the channels of each slice (C_i,), None for 1."""
        self.net, self.weights, self.augmented = net.eval().requires_grad_(False), weights, augmented

    def features(self, x: Tensor) -> list[Tensor]:
        """Normalised features of each slice: what is kept of a target that comes again. (B, C_i, H_i, W_i)."""
        return [normalised(f) for f in self.net.slices(x.float())]

    def between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """The distance of two images' features. (B,)."""
        total = a[0].new_zeros(len(a[0]))
        for i, (f, g) in enumerate(zip(a, b, strict=True)):
            squared = (f - g).square()
            if self.weights is not None:
                squared = squared * self.weights[i].view(1, -1, 1, 1)
            total = total + squared.sum(1).mean((1, 2))
        return total

    def draw(self, random: Random, sample: Tensor | None, shape: tuple[int, ...]) -> Augmentation | None:
        """How each row sample (B,) of images (C, H, W) is changed at this step; None where nothing is augmented."""
        if not self.augmented:
            return None
        assert sample is not None, "the augmentation is drawn by row"
        return augment.draw(random, sample, shape)

    def __call__(
        self, x: Tensor, target: Tensor, drawn: Augmentation | None, known: list[Tensor] | None = None
    ) -> Tensor:
        """drawn: what `draw` gave; known: the target's features, where nothing is augmented."""
        if known is not None:
            assert not self.augmented, "an augmented target has features of its own in every row"
            return self.between(self.features(x), known)
        if self.augmented:
            assert drawn is not None, "the augmentation is drawn beforehand"
            x, target = augment.augment(torch.cat((x.float(), target.float())), 2, drawn).chunk(2)
        with torch.no_grad():
            wanted = self.features(target)
        return self.between(self.features(x), wanted)


def normalised(f: Tensor) -> Tensor:
    """f / |f| over channels; 0, with a finite gradient, where all of them are 0. (B, C, H, W)."""
    return f * torch.rsqrt(f.square().sum(1, keepdim=True) + 1e-20)


def load(config: Perceptual, kind: str, shape: tuple[int, ...], device: torch.device) -> Distance:
    """The distance "lpips" or "latent_lpips" for rows of `shape`. Raises ConfigError naming the file and what is wrong."""
    if kind == "lpips":
        pixel = pixel_network(config)
        return Distance(pixel.to(device), [head.data for head in pixel.heads], False)
    if config.heads:
        raise ConfigError("perceptual.heads: are for 'lpips' alone; 'latent_lpips' has no heads")
    latent = latent_network(Path(config.weights))
    channels = latent.stages[0][0].in_channels
    if channels != shape[0]:
        raise ConfigError(
            f"perceptual.weights: {config.weights} reads {channels} channels, the rows of this data have {shape[0]}"
        )
    return Distance(latent.to(device), None, config.augment)


def checksums(config: Perceptual) -> dict[str, str]:
    """File -> xxh3_128, for the facts of a stage. Raises ConfigError for a file that is not there."""
    found = {}
    for key in ("weights", "heads"):
        path = getattr(config, key)
        if path and not Path(path).is_file():
            raise ConfigError(f"perceptual.{key}: {path!r} does not exist")
        if path:
            found[key] = checksum(Path(path))
    return found


def save_latent_network(net: LatentVgg, file: Path, about: dict) -> None:
    """Write what `latent_network` reads, whole or not at all."""
    first = net.stages[0][0]
    size = {"channels": first.in_channels, "width": first.out_channels, "classes": net.head.out_features}
    metadata = {KIND: json.dumps({**size, **about})}  # one key: several are written in no fixed order
    with files.by_rename(file) as temporary:
        save_tensors(temporary, net.state_dict(), metadata)
        sync(temporary)


def check_rows(config: Perceptual, normalisation: list | None) -> None:
    """Raises ConfigError when the classifier was trained on latents of another normalisation than these."""
    with safe_open(config.weights, "pt") as opened:
        theirs = json.loads((opened.metadata() or {})[KIND]).get("normalisation")
    if theirs != normalisation:
        raise ConfigError(
            f"perceptual.weights: {config.weights} was trained on rows of another normalisation, {theirs}, not {normalisation}"
        )


def latent_network(file: Path) -> LatentVgg:
    """The classifier of latents as `cmt train-features` wrote it. Raises ConfigError for any other file."""
    try:
        with safe_open(file, "pt") as opened:
            found = (opened.metadata() or {}).get(KIND)
        if found is None:
            raise ConfigError(f"perceptual.weights: {file} was not written by cmt train-features")
        about = json.loads(found)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is read over
            net = LatentVgg(*(int(about[key]) for key in ("channels", "classes", "width")))
        net.load_state_dict(load_file(file))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"perceptual.weights: {file} cannot be read ({_first_line(error)})") from None
    return net


def pixel_network(config: Perceptual) -> PixelVgg:
    """VGG16 and its heads from one file or two. Raises ConfigError naming the tensor that is missing or does not fit.

    Read are the names of a VGG16 by itself (`features.0.weight`), of the same inside LPIPS (`net.slice1.0.weight`), and
    `lin0.model.1.weight` for the heads; tensors of other names are passed over.
    """
    tensors = _tensors("weights", config.weights)
    if config.heads:
        tensors |= _tensors("heads", config.heads)
    net, position = PixelVgg(), 0
    with torch.no_grad():
        for i, (stage, depth) in enumerate(zip(net.stages, CONVOLUTIONS)):
            for j in range(depth):  # the numbers count convolutions, their ReLUs and the pool after each stage
                for part in ("weight", "bias"):
                    names = (f"features.{position}.{part}", f"net.slice{i + 1}.{position}.{part}")
                    _take("weights", config.weights, tensors, names, getattr(stage[2 * j], part))
                position += 2
            position += 1
            names = (f"lin{i}.model.1.weight", f"lins.{i}.model.1.weight")
            _take("heads" if config.heads else "weights", config.heads or config.weights, tensors, names, net.heads[i])
    if any((head < 0).any() for head in net.heads):
        raise ConfigError(f"perceptual.{'heads' if config.heads else 'weights'}: has negative weights, LPIPS has none")
    return net


def _take(key: str, file: str, tensors: dict[str, Tensor], names: tuple[str, ...], into: Tensor) -> None:
    found = next((name for name in names if name in tensors), None)
    if found is None:
        raise ConfigError(f"perceptual.{key}: {file} holds none of {' or '.join(names)}")
    if tensors[found].squeeze().shape != into.squeeze().shape:  # a head may be a 1 x 1 convolution
        raise ConfigError(
            f"perceptual.{key}: {found} of {file} is {tuple(tensors[found].shape)}, not {tuple(into.shape)}"
        )
    into.copy_(tensors[found].reshape(into.shape))


def _tensors(key: str, file: str) -> dict[str, Tensor]:
    """The named tensors of a .safetensors or .pt file; nothing in it is run."""
    try:
        if not Path(file).is_file():  # a pipe would be waited for without end
            raise ValueError("it is no file")
        if file.endswith(".safetensors"):
            return load_file(file)
        with warnings.catch_warnings():  # of what is refused in the next line anyway
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind for a damaged file
        raise ConfigError(f"perceptual.{key}: {file} cannot be read ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"perceptual.{key}: {file} holds no named tensors")
    return {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _first_line(error: Exception) -> str:
    return one_line(str(error).partition("\n")[0], 200) or type(error).__name__
