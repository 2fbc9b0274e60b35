"""The page: well-formed, self-contained, escaped, and there whatever is missing."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from mentorch.engine.config import CurriculumConfig
from mentorch.engine.data_driven import new_mentor
from mentorch.engine.report.command import report
from mentorch.engine.report.drawing import Picture, draw
from mentorch.engine.report.figures import heat_map
from mentorch.engine.report.page import confused_pairs
from mentorch.engine.report.run_folder import read_run
from mentorch.engine.report.scores import score_samples
from mentorch.engine.report.surfaces import curriculum_of, surfaces, weight_surface
from mentorch.kernels.mentor import ClosedForm

EMPTY = "data:image/svg+xml;base64,"
VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Balanced tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def drawings(self):
        """Text of the SVGs."""
        svg = [i["src"] for i in self.images if i["src"].startswith("data:image/svg+xml;base64,")]
        return [base64.b64decode(uri.partition(",")[2]).decode() for uri in svg]


def _report(folder, **options):
    report(folder, **options)
    return Page((folder / "report" / "report.html").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Drawings without a picture, for tests that are not about them: each takes half a second."""
    from mentorch.engine.report import figures, surfaces

    for module in (figures, surfaces):
        monkeypatch.setattr(module, "draw", lambda title, alt, *rest: Picture(title, alt, EMPTY))


def test_a_whole_page(make_run, capsys):
    page = _report(make_run(), samples=7)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        for name in {"src", "href"} & set(attributes):
            assert attributes[name].startswith(("data:image/", "#"))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 7
    assert {link.removeprefix("#") for link in links} <= ids
    assert not re.search(r"url\(|@import", page.text)
    assert all(image["alt"] for image in page.images)
    for svg in page.drawings():
        root = ElementTree.fromstring(svg)
        links = [v for node in root.iter() for k, v in node.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
        assert "prefers-color-scheme: dark" in svg
    assert sum(i["src"].startswith("data:image/jpeg;base64,") for i in page.images) == 7
    # 4 curves, 2 surfaces, 4 histograms, heat map, ROC
    assert len(page.drawings()) == 12
    for heading in ("Most suspicious", "confused with", "How well", "Curriculum", "Quarantined"):
        assert heading in page.text
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("sample_scores.parquet: 197 samples, 68 suspects")
    assert len(lines) == 4 + 10


@pytest.mark.usefixtures("undrawn")
def test_the_same_report_has_the_same_bytes(make_run, tmp_path):
    folder = make_run()
    for out in ("a", "b"):
        report(folder, out=tmp_path / out, samples=1)
    for name in ("report.html", "sample_scores.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_names_and_paths_are_escaped_and_unreadable_images_named(make_run, renamed):
    """The first two classes have hostile names, and every path a tag in it."""
    quarantine = [{"set": "train", "sample_id": 3, "path": "<b>", "reason": "<i>no image</i>"}]
    page = _report(make_run(index=renamed, quarantine=quarantine), samples=60)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "b", "i"}
    assert '<script>alert("a")</script>' in page.text
    assert '<img src="http://a.b/' in page.text
    assert "<i>no image</i>" in page.text
    assert page.text.count("no picture: No such file or directory") == 60
    assert not any(i["src"].startswith("data:image/jpeg") for i in page.images)


@pytest.mark.usefixtures("undrawn")
def test_the_cards_say_what_is_known(make_run, digits_index, losses):
    page = _report(make_run(), samples=197)
    assert page.text.count("known to be wrong") == 68
    assert page.text.count("known to be right") == 129
    worst = int(np.nanargmax(losses))
    assert f"mean loss {losses[worst]:.2f}" in page.text
    names, given = digits_index.class_names, digits_index.labels()[worst]
    assert f"1. {names[given]} → {names[digits_index.clean_labels()[worst]]}" in page.text


@pytest.mark.usefixtures("undrawn")
def test_damaged_and_missing_images_have_their_reason(make_run, digits_index, tmp_path):
    """What begins like a PNG passes for an image until it is decoded."""
    ids = digits_index.select("train", sources=["flickr"])
    copy = tmp_path / "root" / digits_index.path(int(ids[0]))
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"\x89PNG\r\n\x1a\n and nothing of one")
    page = _report(make_run(index=replace(digits_index, root=tmp_path / "root")), samples=197)
    assert page.text.count("no picture: cannot be decoded (") == 1
    assert page.text.count("no picture: No such file or directory") == 196


@pytest.mark.usefixtures("undrawn")
def test_a_page_of_a_run_that_has_told_little(make_run, digits_index):
    """No metrics, no quarantine, no clean labels, no picture asked for."""
    at = digits_index.table.schema.get_field_index("clean_label")
    nulls = pa.nulls(len(digits_index), pa.int32())
    table = digits_index.table.set_column(at, "clean_label", nulls)
    page = _report(make_run(index=replace(digits_index, table=table), metrics=()), samples=0)
    assert "no metrics yet" in page.text
    assert "None. Files that the index calls missing" in page.text
    assert "How well wrong labels are found" not in page.text
    assert "There is no suspect" in page.text  # the fixture's student predicts −1 then: nothing
    assert len(page.drawings()) == 4  # 2 histograms, 2 surfaces


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("curriculum", "count"),
    [
        (CurriculumConfig(name="self_paced"), 2),
        (CurriculumConfig(name="pd_mixture", burn_in=0.0), 1),  # without burn-in only the end
        (CurriculumConfig(name="pd"), 2),
        (CurriculumConfig(name="dd", history_steps=3), 2),
        (CurriculumConfig(name="uniform"), 0),
        (CurriculumConfig(name="gce"), 0),
        (CurriculumConfig(name="linear", weight_lr=0.1), 0),
    ],
    ids=lambda value: value.name if isinstance(value, CurriculumConfig) else "",
)
def test_surfaces_of_every_kind_of_curriculum(make_run, curriculum, count):
    assert len(surfaces(read_run(make_run(curriculum)))) == count


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("total_steps", "said"),
    [
        (12, ["ℓ_pt = 1.80", "ℓ_pt = 1.20"]),  # it has ended: burn-in at 2.5 steps, the end at 12
        (13, ["ℓ_pt = 1.80", None]),  # a step is missing
        (57, ["ℓ_pt = 1.20", None]),  # 21% of 57 are 11.97
        (58, [None, None]),  # not even the burn-in is over
        (None, [None, None]),  # no status.json tells
    ],
)
def test_a_line_is_drawn_only_of_what_the_run_has_reached(total_steps, said, make_run):
    found = surfaces(read_run(make_run(total_steps=total_steps)))
    for picture, average in zip(found, said, strict=True):
        assert ("ℓ_pt = " in picture.alt) == (average is not None)
        assert (average or "") in picture.alt


def test_a_drawing_has_the_same_bytes_every_time():
    """matplotlib would number its parts by chance and note the date."""
    first, second = (draw("a", "b", lambda axes: axes.plot([1, 2], [3, 4])) for _ in range(2))
    assert first == second


def test_the_surface_is_the_curriculums():
    """Eq. 7 at λ1 = 0, λ2 = 1: half the weight at a difference of ½ nat, whatever the loss."""
    weight = weight_surface(ClosedForm("linear"), 99)
    difference = torch.linspace(-4, 4, 161)
    assert torch.allclose(weight, (1 - difference).clamp(0, 1)[:, None].expand(161, 161))
    by_loss = weight_surface(ClosedForm("self_paced", lambda1=2.0, on="loss"), 99)
    assert by_loss[0].tolist() == [float(loss <= 2) for loss in torch.linspace(0, 8, 161)]


def test_options_of_the_curriculum_reach_the_surface(make_run):
    found = curriculum_of(read_run(make_run(CurriculumConfig(name="linear", lambda2=3.0))))
    assert found == ClosedForm("linear", lambda2=3.0)


def test_what_was_learned_in_the_run_comes_from_its_checkpoint(make_run):
    folder = make_run(CurriculumConfig(name="dd", trusted=0.1))
    mentor = new_mentor(1, 0)
    tensors = {f"/spade/criterion/mentor.{k}": v for k, v in mentor.state_dict().items()}
    (checkpoint,) = (folder / "checkpoints").iterdir()
    save_file(tensors | {"/spade/scaler/x": torch.zeros(1)}, checkpoint / "state.safetensors")
    found = weight_surface(curriculum_of(read_run(folder)), 99)
    assert torch.equal(found, weight_surface(mentor.weights(), 99))


@pytest.mark.usefixtures("undrawn")
def test_too_many_classes_have_no_heat_map():
    assert heat_map([(0, 1, 3)], [str(k) for k in range(50)]) is not None
    assert heat_map([(0, 1, 3)], [str(k) for k in range(51)]) is None


def test_pairs_are_those_of_suspects(make_run, digits_index, losses):
    run = read_run(make_run())
    pairs = confused_pairs(score_samples(run.ledger, run.index))
    assert sum(count for _, _, count in pairs) == 68
    assert [n for _, _, n in pairs] == sorted((n for _, _, n in pairs), reverse=True)
    given, clean, count = pairs[0]
    rows = (digits_index.labels() == given) & (digits_index.clean_labels() == clean)
    assert count == int((rows & ~np.isnan(losses)).sum())
