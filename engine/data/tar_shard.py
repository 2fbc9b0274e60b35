"""One shard: a tar file in the webdataset convention, and NVIDIA's list of its members.

    000000123.jpg    the image as it was; the name is the sample id, the ending says what it is
    000000123.cls    the label it was given, as text

The list (`.idx`, "v1.2" of `wds2idx`) has a line a sample with ending, offset, size and name of
both members, so that DALI's own reader of such files takes the shard too. With both, everything in
it follows from id, ending, label and size: the same samples always give the same bytes.
"""

import io
import tarfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mentorch.engine.data.probe import sniff_format
from mentorch.engine.data.readers import TAR_BLOCK, Bytes, member_stem

ENDINGS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tiff",
    "JPEG2000": "jp2",
    "PPM": "ppm",
}

_IDX_VERSION = "v1.2"


class Member(NamedTuple):
    """A sample in a shard."""

    sample_id: int
    ending: str  # one of ENDINGS
    offset: int  # of the image, bytes
    size: int  # of the image, bytes
    label_size: int  # of the label as text, bytes

    @property
    def label_offset(self) -> int:
        """Where the label begins, bytes."""
        return self.offset + padded(self.size) + TAR_BLOCK

    @property
    def end(self) -> int:
        """Where the next sample's header begins, bytes."""
        return self.label_offset + padded(self.label_size)


def padded(size: int) -> int:
    """Bytes that so many take in a tar."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


class TarShard:
    """A shard being written.

    Args:
        path: the new file.

    Attributes:
        members: what it holds so far.
    """

    def __init__(self, path: Path) -> None:
        self.members: list[Member] = []
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> "TarShard":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tar.close()

    def add(self, sample_id: int, image: Bytes, label: int) -> None:
        """Appends a sample: an encoded image and its label."""
        data, text = image.tobytes(), str(label).encode()
        kind = sniff_format(data[:32])
        assert kind is not None, "the reader lets nothing through that is no image"
        offset = self.members[-1].end + TAR_BLOCK if self.members else TAR_BLOCK
        member = Member(sample_id, ENDINGS[kind], offset, len(data), len(text))
        stem = member_stem(sample_id)
        self._append(f"{stem}.{member.ending}", data)
        self._append(f"{stem}.cls", text)
        assert self._tar.offset == member.end, "the tar is not laid out as its list says"
        self.members.append(member)

    def _append(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # time 0, no owner: nothing that differs between two runs
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def tar_size(members: list[Member]) -> int:
    """The size of the tar with these samples, bytes: two empty blocks, then up to a full record."""
    return -(-(members[-1].end + 2 * TAR_BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def idx_text(members: list[Member]) -> str:
    """The list of a shard's members, as `wds2idx` makes it."""
    return f"{_IDX_VERSION} {len(members)}\n" + "".join(map(_idx_line, members))


def _idx_line(member: Member) -> str:
    stem, ending = member_stem(member.sample_id), member.ending
    image = f"{ending} {member.offset} {member.size} {stem}.{ending}"
    return f"{image} cls {member.label_offset} {member.label_size} {stem}.cls\n"


def read_idx(text: str) -> list[Member] | None:
    """The members that `idx_text` listed; None if it was not that which wrote the list."""
    members = []
    try:
        for line in text.splitlines()[1:]:
            ending, offset, size, name, _, _, label_size, _ = line.split(" ")
            sample_id = int(name.partition(".")[0])
            members.append(Member(sample_id, ending, int(offset), int(size), int(label_size)))
    except ValueError:
        return None
    return members if members and idx_text(members) == text else None
