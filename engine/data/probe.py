"""Is this file an image that the pipelines can decode? One file at a time; imports only Pillow.

What counts as decodable follows DALI: JPEG, PNG, BMP, TIFF, WebP, PNM and JPEG 2000, whatever the
file's name says. Width and height are those of the displayed image: DALI applies the EXIF rotation
of JPEG, PNG, TIFF and WebP, so an image with an orientation of 5 to 8 has its sides swapped.
"""

import io
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

MAX_BYTES = 1 << 29  # no photograph is half a gigabyte, and a worker holds the whole file

_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 0x0112, 256, 257
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
_NOT_IMAGES = (
    (b"GIF8", "a GIF"),
    (b"<", "an HTML or XML page"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
)


class Probe(NamedTuple):
    """What one file turned out to be.

    Attributes:
        status: "ok", "missing" or "broken".
        bytes: size of the file; 0 when missing.
        width: of the displayed image; 0 when not ok.
        height: of the displayed image; 0 when not ok.
        reason: why it is not ok, a short phrase; "" when ok.
    """

    status: str
    bytes: int
    width: int
    height: int
    reason: str


def sniff_format(data: bytes) -> str | None:
    """The image format by a file's first bytes, as Pillow names it; None if DALI has no decoder."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "PPM"
    return None


def has_jpeg_end(data: bytes) -> bool:
    """True when the end marker follows the image's scan; bytes after it are allowed.

    The headers are walked over first, because an EXIF thumbnail has an end marker of its own.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0xDA:  # start of scan: entropy-coded data never holds FF D9
            return data.rfind(b"\xff\xd9", at) >= 0  # it is nearly always at the very end
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def probe_image(path: Path, known: Probe | None = None) -> Probe:
    """Reads and decodes one file; never raises for what is wrong with the file.

    Args:
        path: the file.
        known: an earlier "ok" result; returned unread when the size on disk is still the same.
    """
    try:
        found = path.stat()
        if known is not None and stat.S_ISREG(found.st_mode) and found.st_size == known.bytes:
            return known
        return _probe_regular(path, found)
    except (FileNotFoundError, NotADirectoryError):
        reason = "dangling link" if path.is_symlink() else "no such file"
        return Probe("missing", 0, 0, 0, reason)
    except (OSError, ValueError, MemoryError) as error:
        return Probe("broken", 0, 0, 0, f"cannot be read: {getattr(error, 'strerror', error)}")


def probe_images(root: str, paths: list[str], known: list[Probe | None]) -> list[Probe]:
    """Checks some images under a folder; what a worker runs."""
    return [probe_image(Path(root, p), k) for p, k in zip(paths, known, strict=True)]


def _probe_regular(path: Path, found: os.stat_result) -> Probe:
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size  # a folder's depends on the disk
    reason = unfit(found)
    if reason:
        return Probe("broken", size, 0, 0, reason)
    data = path.read_bytes()
    name = sniff_format(data)
    if name is None:
        return Probe("broken", size, 0, 0, what_it_is(data))
    if name == "JPEG" and not has_jpeg_end(data):
        return Probe("broken", size, 0, 0, "truncated: a JPEG without its end marker")
    try:
        return Probe("ok", size, *_decode(data, name), "")
    except Exception as error:  # decoders raise every kind of error on damaged files
        reason = f"{name} does not decode: {type(error).__name__}: {error}"
        return Probe("broken", size, 0, 0, reason[:300])


def unfit(found: os.stat_result) -> str:
    """Why a file is not even read; "" when it may be an image."""
    if stat.S_ISDIR(found.st_mode):
        return "a folder, not a file"
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_size > MAX_BYTES:
        return f"larger than {MAX_BYTES:,} bytes"
    return "" if found.st_size else "empty file"


def what_it_is(data: bytes) -> str:
    """What a file without an image's magic bytes seems to be, a phrase."""
    start = data[:256].lstrip()
    for magic, name in _NOT_IMAGES:
        if start.startswith(magic):
            return f"{name}, not an image that can be decoded"
    if data[4:8] == b"ftyp":
        return "an AVIF, HEIC or video file, not an image that can be decoded"
    return f"not a known image format (starts with {data[:8]!r})"


def _decode(data: bytes, name: str) -> tuple[int, int]:
    """Decodes all of the image and returns its displayed (width, height)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=(name,)) as image:
            if name == "PNG":
                image.load()  # its EXIF block may follow the pixels
            width, height = _displayed_size(image, name)
            # A JPEG at an eighth of its size is cheap, and still every byte of its scan is read.
            image.draft(None, (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
    return width, height


def _displayed_size(image: Image.Image, name: str) -> tuple[int, int]:
    width, height = image.size
    if name == "TIFF":  # Pillow has swapped these already in some versions
        tags = getattr(image, "tag_v2", {})
        width, height = int(tags[_TIFF_WIDTH]), int(tags[_TIFF_HEIGHT])
    if name in ("JPEG", "PNG", "TIFF", "WEBP") and _orientation(image) in (5, 6, 7, 8):
        return height, width
    return width, height


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not make the image unusable: no decoder minds
        return 1
