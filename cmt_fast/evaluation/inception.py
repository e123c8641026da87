"""FID's feature space: the Inception network of 2015-12-05 as torch-fidelity ports it, with weights from a file of yours.

The one door to torch-fidelity. Its package imports torchvision, which its Inception does not need, so that file alone
is opened. Nothing is downloaded, and no pickle is run: the weights are read as tensors only, and handed on.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import weights as files

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"  # how the sha256 of that file begins; only with these weights is a distance called FID


class Inception:
    """Features (B, 2048) of images (B, 1 or 3, H, W) in [-1, 1]: rounded to uint8, resized to 299 as TensorFlow 1 did."""

    images, short, dim = True, "FID", 2048

    def __init__(self, path: Path, device: torch.device) -> None:
        """Raises ConfigError without torch-fidelity and for a file that does not hold these weights."""
        tensors, digest = files.read(path, "the Inception network", URL)
        again = io.BytesIO()
        torch.save(tensors, again)  # what the constructor loads without restriction is what was written here
        again.seek(0)
        try:
            self.net = _constructor()("inception-v3-compat", ["2048"], feature_extractor_weights_path=again).to(device)
        except (RuntimeError, AttributeError) as error:
            raise ConfigError(
                f"eval.weights: {str(path)!r} does not fit torch-fidelity's Inception ({error})"[:300]
            ) from None
        self.device, self.published = device, digest.startswith(PUBLISHED)
        self.name = f"inception-2015-12-05@{digest[:12]}, uint8, tf1-bilinear-299"

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2048) float32; convolutions without TF32, which moves a FID."""
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return self.net(files.to_uint8(x.to(self.device)))[0]

    def classes(self, x: Tensor) -> None:
        """None: its classes are not the data's."""
        return None


def _constructor() -> type:
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("eval.metric: fid needs torch-fidelity, which is not installed: pip install torch-fidelity")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torch_fidelity"}
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    try:
        for name in before:
            del sys.modules[name]
        sys.modules["torch_fidelity"] = package
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
            del sys.modules[name]
        sys.modules.update(before)
