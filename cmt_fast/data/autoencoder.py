"""The autoencoder between images and latents, and the numbers that bring latents to unit scale.

diffusers is imported here alone, when a Codec is opened. Nothing is downloaded unless the caller says so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from cmt_fast.config.errors import ConfigError


class Normalisation(NamedTuple):
    """z = scale (x - mean) / std, channel by channel. mean, std: (C,)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 0.5

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], scale: float, channels: int) -> Normalisation:
        """As a recipe gives it: a single number stands for all channels."""
        return cls(*(x * channels if len(x) == 1 else x for x in (mean, std)), scale)

    def apply(self, x: Tensor) -> Tensor:
        """x: (B, C, ...) as the autoencoder gives it -> z, what networks see."""
        return (x - self._column(self.mean, x)) * (self.scale / self._column(self.std, x))

    def invert(self, z: Tensor) -> Tensor:
        """z: (B, C, ...) -> x, what the decoder takes."""
        return z * (self._column(self.std, z) / self.scale) + self._column(self.mean, z)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 2))


class Codec:
    """A frozen AutoencoderKL. `digest`: xxh3_128 of its weights in fp32; `factor`: pixels a latent pixel, along a side.

    spreads: whether its latents have a standard deviation of their own; representation: whether it is an AutoencoderRAE, whose
    latents are features of a frozen encoder (Zheng et al. 2025), normalised by its own statistics of every number.
    """

    def __init__(
        self, vae: Any, name: str, device: torch.device | str = "cpu",
        normalisation: Normalisation | None = None, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """normalisation: of the latents that `decode` is given; default: the one in the autoencoder's own settings."""
        self.digest = _digest(vae)  # before weights are rounded to dtype
        self.vae, self.name = vae.eval().requires_grad_(False), name
        nn.Module.to(vae, device, dtype)  # diffusers' own warns of layers to be kept in fp32, and has none here
        self.representation = hasattr(vae.config, "encoder_hidden_size")
        self.spreads = not self.representation
        if self.representation:
            self.channels, self.factor = int(vae.config.encoder_hidden_size), int(vae.config.patch_size)
        else:
            self.channels = int(vae.config.latent_channels)
            self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        own = (
            Normalisation.of((0.0,), (1.0,), 1.0, self.channels)
            if self.representation
            else _own(vae.config, self.channels)
        )
        self.normalisation = normalisation or own
        if len(self.normalisation.mean) != self.channels:
            raise ConfigError(
                f"vae: {name!r} has latents of {self.channels} channels, the data have {len(self.normalisation.mean)}"
            )

    @classmethod
    def open(
        cls, source: str, device: torch.device | str, normalisation: Normalisation | None = None,
        dtype: torch.dtype = torch.float32, download: bool = False,
    ) -> Codec:  # fmt: skip
        """source: a folder with config.json and safetensors, a pipeline's folder, or a hub id (its local copy).

        Raises ConfigError when diffusers is not installed or the autoencoder is not there.
        """
        try:
            import diffusers
        except ImportError:
            raise ConfigError("vae: is read by diffusers, which is not installed: pip install diffusers") from None
        folder = Path(source) / "vae" if (Path(source) / "vae" / "config.json").is_file() else Path(source)
        if not (folder / "config.json").is_file() and (folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
            raise ConfigError(f"vae: {source!r} is no autoencoder's folder, it has no config.json, and no hub id")
        local = folder.is_dir()
        try:
            place = str(folder) if local else source
            if local:
                said = json.loads((folder / "config.json").read_text("utf-8"))
            else:
                said = diffusers.AutoencoderKL.load_config(source, local_files_only=not download)
            kind = diffusers.AutoencoderKL
            if said.get("_class_name") == "AutoencoderRAE":
                kind = _representation(source)
            own = {"use_safetensors": True, "local_files_only": local or not download, "low_cpu_mem_usage": False}
            vae = kind.from_pretrained(place, **own)
        except ConfigError:
            raise
        except Exception as error:  # diffusers and the hub raise whatever their backends do
            if not local and not download:
                raise ConfigError(
                    f"vae: {source!r} has no copy on this machine (`cmt data encode --download` fetches it)"
                ) from None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"vae: {source!r} cannot be read: {lines[0][:160]}") from None
        return cls(vae, source, device, normalisation, dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) in [-1, 1] -> mean, std (B, C, h, w) fp32 of the latents, not normalised.

        Stores keep these: what normalises them is known when all of the data are encoded. An AutoencoderRAE's have no spread.
        """
        if self.representation:
            found = self.vae.encode((images / 2 + 0.5).to(self.vae.device, self.vae.dtype)).latent.float()
            return found, torch.zeros_like(found)
        found = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        return found.mean.float(), found.std.float()

    @torch.no_grad()
    def decode(self, z: Tensor, batch: int = 8) -> Tensor:
        """z: (B, C, h, w) normalised -> images (B, 3, H, W) fp32 in [-1, 1], on z's device."""
        parts = []
        for part in z.split(batch):
            x = self.normalisation.invert(part.to(self.vae.device).float()).to(self.vae.dtype)
            image = self.vae.decode(x).sample.float()
            parts.append((2 * image - 1 if self.representation else image).clamp(-1, 1).to(z.device))
        return torch.cat(parts)


def _representation(source: str) -> Any:
    """The class AutoencoderRAE. Raises ConfigError where diffusers does not have it, or transformers, whose encoders it takes."""
    import diffusers

    if not diffusers.utils.is_transformers_available():
        raise ConfigError(
            f"vae: {source!r} is an AutoencoderRAE, whose encoder needs transformers: pip install transformers"
        )
    if not hasattr(diffusers, "AutoencoderRAE"):
        raise ConfigError(
            f"vae: {source!r} is an AutoencoderRAE, which diffusers {diffusers.__version__} has not; 0.39 has"
        )
    return diffusers.AutoencoderRAE


def _digest(vae: Any) -> str:
    """The same for every layout of the weights' files."""
    state = xxhash.xxh3_128()
    for key, tensor in sorted(vae.state_dict().items()):
        state.update(key.encode())
        state.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def _own(config: Any, channels: int) -> Normalisation:
    """What an autoencoder's settings say: a mean and std per channel, or a shift and a factor for all."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    if mean and std:
        return Normalisation(tuple(map(float, mean)), tuple(map(float, std)), scale)
    shift = float(getattr(config, "shift_factor", None) or 0.0)
    return Normalisation((shift,) * channels, (1.0,) * channels, scale)
