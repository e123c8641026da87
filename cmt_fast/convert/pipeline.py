"""A stage as a diffusers pipeline: beside data/autoencoder.py the one module that imports diffusers, imported by name alone.

`CmtPipeline.from_pretrained(FOLDER)` reads what `cmt ckpt export --format diffusers` wrote, and so does
`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`, whose remote code is an import of this page. The network and
the samplers are the trainer's own, so an image is the one that `cmt sample` draws, bit for bit; cmt-fast must be
installed where the folder is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from pydantic import TypeAdapter
from torch import Tensor

from cmt_fast import models
from cmt_fast.config.schema import Model, SamplerConfig
from cmt_fast.diffusion.labels import Law
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.sampling import Sampler


class CmtNetwork(ModelMixin, ConfigMixin):
    """The network of a stage: D(x, t) on path "ve", u(x, r, t) on path "linear". model: as in a recipe; shape: of a sample."""

    @register_to_config
    def __init__(self, model: dict[str, Any], path: str, sigma_data: float, shape: list[int], classes: int) -> None:
        super().__init__()
        built = TypeAdapter(Model).validate_python(model)
        self.net = models.build(built, path, sigma_data, tuple(shape), classes)

    @classmethod
    def from_pretrained(cls, *arguments, **named):
        """As of every ModelMixin; never by way of empty weights, for networks compute their constants when they are built."""
        named["low_cpu_mem_usage"] = False
        return super().from_pretrained(*arguments, **named).requires_grad_(False).eval()

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """x: (B, ...), t, r: (B,), labels, drop: (B,) -> (B, ...)."""
        return self.net(x, t, r, labels, drop)


class _Chosen(Sampler):
    """A Sampler whose noise and labels may be given; those that are not are the trainer's own for (seed, index)."""

    def __init__(self, *arguments, noise: Tensor | None, labels: Tensor | None) -> None:
        super().__init__(*arguments)
        self._noise, self._labels = noise, labels

    def noise(self, seed: int, index: Tensor) -> Tensor:
        return super().noise(seed, index) if self._noise is None else self._noise

    def labels(self, index: Tensor) -> Tensor | None:
        return super().labels(index) if self._labels is None else self._labels


class CmtPipeline(DiffusionPipeline):
    """Few-step generation: `pipe(class_labels=[207], num_inference_steps=1, seed=0).images[0]`.

    sampler: times and solver as in a recipe; latents: None for pixels in [-1, 1], else mean, std, scale and the name of the
    autoencoder; many_steps: the network is a diffusion model, sampled by its ODE solver; labels: counts of the classes, in
    whose proportions they are drawn where none are given, None for all alike.
    """

    _optional_components = ["vae"]
    model_cpu_offload_seq = "network->vae"

    def __init__(
        self,
        network: CmtNetwork,
        vae: Any = None,
        sampler: dict[str, Any] | None = None,
        latents: dict[str, Any] | None = None,
        many_steps: bool = False,
        labels: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(network=network, vae=vae)
        self.register_to_config(sampler=sampler, latents=latents, many_steps=many_steps, labels=labels)

    @classmethod
    def from_pretrained(cls, folder: str, vae: Any = None, torch_dtype: torch.dtype = torch.float32, **named):
        """Of a local folder: reads its JSON and safetensors and runs no code of it. Anything else: as every pipeline does."""
        if not Path(folder).is_dir():
            more = {} if vae is None else {"vae": vae}
            return super().from_pretrained(folder, torch_dtype=torch_dtype, **more, **named)
        index = cls.load_config(folder)
        if vae is None and index["vae"][0] is not None:
            from diffusers import AutoencoderKL

            vae = AutoencoderKL.from_pretrained(
                folder, subfolder="vae", torch_dtype=torch_dtype, use_safetensors=True, low_cpu_mem_usage=False
            )
        network = CmtNetwork.from_pretrained(folder, subfolder="network", torch_dtype=torch_dtype)
        return cls(network, vae, index["sampler"], index["latents"], index["many_steps"], index.get("labels"))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Images of the given classes, or `batch_size` ones of the classes that `cmt sample` draws, in its order.

        latents: (B, *shape) unit normal noise in the place of the seed's. output_type: "pil", "np" (B, H, W, C) in [0, 1],
        "pt" (B, C, H, W) in [0, 1], "latent" (B, *shape) as the network gives it. Raises ValueError for steps or
        classes that the network does not serve.
        """
        known = self.network.config
        shape, classes = tuple(known["shape"]), known["classes"]
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: {output_type!r} is not valid; valid are pil, np, pt, latent")
        labels = self._labels(class_labels, classes)
        n = len(labels) if labels is not None else len(latents) if latents is not None else batch_size or 1
        if latents is not None and tuple(latents.shape) != (n, *shape):
            raise ValueError(f"latents: has the shape {tuple(latents.shape)}, not {(n, *shape)}")
        device = self.network.device
        sampler = TypeAdapter(SamplerConfig).validate_python(self.config.sampler or {})
        path = ProbabilityPath(known["path"], known["sigma_data"])
        law = Law(self.config.labels, "data") if self.config.labels else Law.uniform(classes)
        setting = _Chosen(path, sampler, shape, law, device, noise=_on(latents, device), labels=_on(labels, device))
        steps = num_inference_steps or (sampler.teacher_steps if self.config.many_steps else 1)
        # the network itself, not its holder: solvers ask it for its preconditioning
        x = setting.draw(self.network.net, steps, seed, torch.arange(n, device=device), self.config.many_steps)
        images = x if output_type == "latent" else self._finish(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def _labels(class_labels: int | list[int] | None, classes: int) -> Tensor | None:
        if class_labels is None:
            return None
        labels = torch.tensor([class_labels] if isinstance(class_labels, int) else list(class_labels))
        if not len(labels) or labels.ndim != 1 or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels: {class_labels!r} are not among the classes 0 to {classes - 1}")
        return labels

    def _finish(self, x: Tensor, output_type: str) -> Any:
        """Samples in data units -> images."""
        about = self.config.latents
        if about is not None:
            if self.vae is None:
                raise ValueError(
                    f"vae: is missing, these are latents of {about['vae']!r}; give from_pretrained(..., vae=AutoencoderKL) "
                    "or ask for output_type='latent'"
                )
            from cmt_fast.data.autoencoder import Codec, Normalisation

            constants = Normalisation(tuple(about["mean"]), tuple(about["std"]), about["scale"])
            codec = getattr(self, "_codec", None)
            if codec is None or codec.vae is not self.vae:  # it takes the weights' checksum, once
                self._codec = codec = Codec(self.vae, about["vae"], self.vae.device, constants, self.vae.dtype)
            x = codec.decode(x)
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"output_type: samples of shape {tuple(x.shape[1:])} are no images; ask for 'latent'")
        x = (x / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return x
        array = x.permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)


def _on(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)
