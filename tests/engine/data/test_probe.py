"""What counts as an image, and how large it is: one crafted file for each kind seen in the wild."""

import os

import pytest
from PIL import Image

from mentorch.engine.data.probe import Probe, has_jpeg_end, probe_image, sniff_format


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),  # about 22 of ImageNet's are
        ("JPEG", "RGB", {"progressive": True}),  # several scans
        ("PNG", "RGB", {}),  # n02105855_2933.JPEG is a PNG
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("WEBP", "RGB", {}),
        ("PPM", "RGB", {}),
        ("PPM", "L", {}),
        ("JPEG2000", "RGB", {}),
    ],
)
def test_decodable_kinds_are_ok_under_any_name(put, encoded, kind, mode, options):
    data = encoded(kind, mode=mode, **options)
    assert sniff_format(data) == kind
    path = put("ünïcode 名前.JPEG", data)
    assert probe_image(path) == Probe("ok", len(data), 20, 10, "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8, 9])
def test_size_is_that_of_the_displayed_image(put, encoded, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = probe_image(put("a.jpg", encoded(kind, exif=exif)))
    assert (found.width, found.height) == ((10, 20) if orientation in (5, 6, 8) else (20, 10))


def test_a_large_jpeg_reports_its_full_size(put, encoded):
    found = probe_image(put("a.jpg", encoded(size=(333, 250))))  # decoded at a reduced scale
    assert (found.width, found.height) == (333, 250)


def test_bytes_after_the_end_marker_are_fine(put, encoded):
    assert probe_image(put("a.jpg", encoded() + b"trailing garbage")).status == "ok"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"\n <!DOCTYPE html><html>404</html>", "an HTML or XML page"),
        (b"GIF89a" + bytes(50), "a GIF"),
        (b"\0\0\0\x1cftypavif" + bytes(50), "an AVIF, HEIC or video file"),
        (b"%PDF-1.4", "a PDF"),
        (bytes(range(100, 164)), "not a known image format"),
        (b"\xff\xd8\xff", "without its end marker"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "PNG does not decode"),
    ],
)
def test_other_files_are_broken_with_a_reason(put, content, reason):
    found = probe_image(put("a.jpg", content))
    assert found.status == "broken"
    assert found[1:4] == (len(content), 0, 0)
    assert reason in found.reason


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, None])
def test_truncated_jpegs_are_broken(put, encoded, options, share):
    data = encoded(size=(200, 150), **options)
    cut = data[:-2] if share is None else data[: int(len(data) * share)]
    assert not has_jpeg_end(cut)
    assert probe_image(put("a.jpg", cut)).status == "broken"


def test_the_end_marker_of_a_thumbnail_does_not_count(put, encoded):
    thumbnail = b"Exif\0\0" + encoded(size=(8, 8))
    data = encoded(size=(200, 150), exif=thumbnail)
    assert has_jpeg_end(data)
    cut = data[: len(data) // 2]
    assert b"\xff\xd9" in cut
    assert not has_jpeg_end(cut)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_truncated_other_formats_are_broken(put, encoded, kind):
    data = encoded(kind, size=(64, 64))
    assert probe_image(put("a.jpg", data[: len(data) // 2])).status == "broken"


def test_a_decompression_bomb_is_broken(put, encoded, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the image has 200: Pillow only warns
    found = probe_image(put("a.png", encoded("PNG")))
    assert found.status == "broken"
    assert "DecompressionBomb" in found.reason


def test_what_is_not_a_file(tmp_path, put, encoded):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    put("file.jpg")
    found = {name: probe_image(tmp_path / name) for name in ("folder.jpg", "fifo.jpg", "loop.jpg")}
    assert {name: p.status for name, p in found.items()} == dict.fromkeys(found, "broken")
    assert found["folder.jpg"].reason == "a folder, not a file"
    assert probe_image(tmp_path / "dangling.jpg") == Probe("missing", 0, 0, 0, "dangling link")
    assert probe_image(tmp_path / "none.jpg").reason == "no such file"
    assert probe_image(tmp_path / "file.jpg" / "below.jpg").status == "missing"
    assert probe_image(tmp_path / ("x" * 300)).status == "broken"
    assert probe_image(tmp_path / "a\0b").status == "broken"


def test_an_unreadable_file_is_broken(put, monkeypatch):
    path = put("a.jpg")

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", denied)
    assert probe_image(path).reason == "cannot be read: Permission denied"


def test_a_known_file_is_read_again_only_when_its_size_changed(put, encoded):
    path = put("a.jpg", b"not an image")
    known = Probe("ok", 12, 7, 5, "")
    assert probe_image(path, known) == known
    put("a.jpg", b"another thing that is no image")
    assert probe_image(path, known).status == "broken"
