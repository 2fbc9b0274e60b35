"""Small pictures of samples, inside the page."""

import base64
import io
import warnings
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image, ImageOps

from mentorch.engine.data.readers import Bytes, Reader

_SIDE = 160  # pixels: sharp on small screens of high density, some 6 kB as JPEG


@dataclass(frozen=True)
class Card:
    """A sample on the contact sheet.

    Attributes:
        row: its columns of the scores.
        image: ``data:`` URI; empty when there is no picture.
        reason: why there is none; empty where none was to be expected, and otherwise.
    """

    row: dict[str, Any]
    image: str
    reason: str


def contact_sheet(scores: pa.Table, reader: Reader | None, count: int) -> list[Card]:
    """The most suspicious samples with their pictures.

    Args:
        scores: rows by rank.
        reader: gives their bytes; None: there are no pictures.
        count: how many.
    """
    rows = scores.slice(0, count).to_pylist()
    if reader is None:
        return [Card(row, "", "") for row in rows]
    return [Card(row, *thumbnail(reader.read(row["sample_id"]))) for row in rows]


def thumbnail(data: Bytes | str) -> tuple[str, str]:
    """A ``data:`` URI of a small JPEG and "", or "" and the reason why there is none."""
    if isinstance(data, str):
        return "", data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about harmless oddities of web images
            small = _shrink(data.tobytes())
    except Exception as error:  # a damaged file may raise anything in a decoder
        return "", f"cannot be decoded ({type(error).__name__})"
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), ""


def _shrink(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # a JPEG is decoded at reduced size
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.thumbnail((_SIDE, _SIDE))
    return upright
