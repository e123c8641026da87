"""TensorBoard events in RUN/tensorboard/STAGE: `tensorboard --logdir RUN/tensorboard`.

A stage that goes on from a checkpoint says so in the events (`purge_step`), and TensorBoard drops what came after it.
Pictures are written as the PNGs that they are. TensorBoard keeps one text for all pictures of a tag, and shows the step of each.
"""

from __future__ import annotations

import struct
from pathlib import Path

from cmt_fast.storage.loggers import Opening

FOLDER = "tensorboard"
TEXT = "Each column is one noise and one class, each row a number of steps. The step is images seen along the path."


def open_logger(about: Opening) -> Board:
    """Raises ImportError without the package, OSError where the folder cannot be written."""
    return Board(about)


class Board:
    """A writer of one stage's events."""

    def __init__(self, about: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = about.folder.parent / FOLDER / about.stage
        self.fresh = not any(folder.glob("events.*"))
        # a START is written by the first process too: only those after it are read as restarts
        at = about.before_nimg + (0 if self.fresh else about.nimg + 1)
        self.writer = SummaryWriter(str(folder), purge_step=at)

    def scalars(self, at: int, values: dict[str, float], when: float) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, at, when)
        self.writer.flush()

    def picture(self, at: int, name: str, path: Path, caption: str, when: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.image import metadata

        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of a PNG's first chunk
        parts = [str(width).encode(), str(height).encode(), data]  # as the plugin wants an image
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(parts))])
        tensor = TensorProto(dtype=DT_STRING, string_val=parts, tensor_shape=shape)
        about = metadata.create_summary_metadata(display_name=None, description=TEXT)
        events = self.writer.file_writer
        assert events  # open until close()
        events.add_summary(Summary(value=[Summary.Value(tag=name, tensor=tensor, metadata=about)]), at, when)
        self.writer.flush()

    def close(self, whole: bool) -> None:
        self.writer.close()
