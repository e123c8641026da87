"""TensorBoard events in RUN/tensorboard/STAGE: `tensorboard --logdir RUN/tensorboard`.

A stage that goes on from a checkpoint says so in the events (`purge_step`), and TensorBoard drops what came after it.
Pictures are written as the PNGs that they are, with their caption as the tag's description.
"""

from __future__ import annotations

import struct
from pathlib import Path

from cmt_fast.storage.loggers import Opening

FOLDER = "tensorboard"


def open_logger(about: Opening) -> Board:
    """Raises ImportError without the package, OSError where the folder cannot be written."""
    return Board(about)


class Board:
    """A writer of one stage's events."""

    def __init__(self, about: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = about.folder.parent / FOLDER / about.stage
        self.fresh = not any(folder.glob("events.*"))
        at = None if self.fresh else about.before_nimg + about.nimg + 1
        self.writer = SummaryWriter(str(folder), purge_step=at)

    def scalars(self, at: int, values: dict[str, float], when: float) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, at, when)
        self.writer.flush()

    def picture(self, at: int, name: str, path: Path, caption: str, when: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of a PNG's first chunk
        image = Summary.Image(encoded_image_string=data, width=width, height=height, colorspace=3)
        plugin = SummaryMetadata.PluginData(plugin_name="images")
        about = SummaryMetadata(display_name=name, summary_description=caption, plugin_data=plugin)
        value = Summary.Value(tag=name, image=image, metadata=about)
        assert self.writer.file_writer is not None  # it is until the writer is closed
        self.writer.file_writer.add_summary(Summary(value=[value]), at, when)
        self.writer.flush()

    def close(self, whole: bool) -> None:
        self.writer.close()
