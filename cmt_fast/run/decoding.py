"""How samples of a run become pictures: latents through their autoencoder, where that is at hand."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.data.autoencoder import Codec, Normalisation
from cmt_fast.data.latents import Index
from cmt_fast.data.rows import Rows


class Encoded(NamedTuple):
    """What latents are: the autoencoder that made them, its weights' checksum, mean and std (C,) before normalisation."""

    vae: str
    vae_xxh3_128: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Decoding:
    """Of rows on one device. vae: the autoencoder that is asked for; by default the one that the store names."""

    def __init__(self, data: Rows, device: torch.device, vae: str | None = None) -> None:
        self.data, self.device, self.vae = data, device, vae

    @property
    def latents(self) -> Encoded | None:
        """What the store says of its latents, or a run remembers of them; None where rows are no latents."""
        index = getattr(self.data, "index", None)  # of a store that is open
        if isinstance(index, Index) and index.kind != "pixels":
            return Encoded(index.vae, index.vae_xxh3_128, index.mean, index.std)
        return getattr(self.data, "encoded", None)

    @property
    def _normalisation(self) -> Normalisation:
        """Of the store that latents come from."""
        found = getattr(self.data, "normalisation", None)
        assert found is not None
        return found

    def codec(self, source: str | None = None) -> Codec:
        """The autoencoder of this run's latents, from `source` or from where the store says that it was.

        Raises ConfigError when the data are no latents, or it is not there or not the one that made them.
        """
        index = self.latents
        if index is None:
            raise ConfigError("--decode: these data are no latents")
        if not (source or index.vae):
            raise ConfigError("--vae or eval.vae: is missing, and the store does not say which autoencoder made it")
        found = Codec.open(source or index.vae, self.device, self._normalisation)
        if index.vae_xxh3_128 and found.digest != index.vae_xxh3_128:
            raise ConfigError(
                f"--vae or eval.vae: {found.name!r} is not the autoencoder that made the latents, its weights differ"
            )
        return found

    @functools.cached_property
    def _decoder(self) -> Codec | str:
        """The autoencoder, or why it is not at hand."""
        try:
            return self.codec(self.vae)
        except ConfigError as error:
            return str(error)

    @property
    def why(self) -> str:
        """Why latents are not decoded, "" where they are or rows are no latents."""
        return self._decoder if self.latents and isinstance(self._decoder, str) else ""

    def visible(self, x: Tensor) -> tuple[Tensor, str]:
        """Samples (n, ...) as they can be shown, and a note: latents are decoded where their autoencoder is at hand.

        Of images that are neither grey nor coloured the first channels are shown, 3 or 1.
        """
        index, channels = self.latents, 3 if x.shape[1] >= 3 else 1
        if index is None:
            whole = x.ndim == 2 or x.shape[1] == channels
            return (x, "") if whole else (x[:, :channels], f"{channels} of {x.shape[1]}")
        if isinstance(self._decoder, Codec):
            return self._decoder.decode(x), ""
        n = self._normalisation
        std = torch.tensor([n.scale * a / b for a, b in zip(index.std, n.std)])[:channels].view(-1, 1, 1)
        return x[:, :channels] / (3 * std), f"latents, {channels} of {x.shape[1]}"
