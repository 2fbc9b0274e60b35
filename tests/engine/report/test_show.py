"""`mentorch show curriculum`: what is drawn is what the curriculum does, and files stand alone."""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mentorch.engine import cli
from mentorch.engine.mentor import MentorNet
from mentorch.engine.report import curriculum_picture
from mentorch.engine.report.curriculum_picture import facts
from mentorch.engine.report.show import curriculum
from mentorch.engine.report.weight_map import LEVELS, surfaces_at
from mentorch.kernels.mentor import ClosedForm


@pytest.fixture
def mentor(tmp_path):
    """Of random Θ, that reads the label: every input changes its weights."""
    torch.manual_seed(0)
    found = MentorNet(
        num_labels=3, use_label=True, card={"source": "<b>$x$</b>", "fit": {"mse": 0.5}}
    )
    path = tmp_path / "mine.safetensors"
    found.save(path)
    return found, str(path)


@pytest.fixture
def drawn(monkeypatch):
    """Keeps the figures and makes no files of them, which takes most of the time."""
    figures = []

    def keep(paint, size, **options):
        figures.append(Figure(figsize=size))
        paint(figures[-1])
        return b""

    monkeypatch.setattr(curriculum_picture, "rendered", keep)
    return figures


def panels(figure):
    """Of each heat map: losses and differences of its pixels' centres, weights and title."""
    found = []
    for axes in figure.axes:
        for image in axes.images:
            weight = np.asarray(image.get_array())
            left, right, bottom, top = image.get_extent()
            across, up = ((np.arange(n) + 0.5) / n for n in weight.shape[::-1])
            centres = left + (right - left) * across, bottom + (top - bottom) * up
            found.append((*centres, weight, axes.get_title()))
    return found


def text_of(figure):
    return " ".join(text.get_text() for text in figure.texts)


def test_a_closed_form_with_its_parameters(drawn, tmp_path):
    """Eq. 7 by hand, at the pixels' centres; without an epoch to read it is drawn once."""
    curriculum(
        "linear", out=tmp_path / "a.png", lambda1=0.5, lambda2=2.0, loss_max=6.0, diff_range=(-1, 4)
    )
    ((losses, differences, weight, title),) = panels(drawn[0])
    assert losses[[0, -1]] == pytest.approx([0, 6], abs=1e-6)
    assert differences[[0, -1]] == pytest.approx([-1, 4], abs=1e-6)
    expected = np.clip(1 - (differences - 0.5) / 2, 0, 1)[:, None].repeat(len(losses), 1)
    np.testing.assert_allclose(weight, expected, atol=1e-5)
    assert title == "at 0, 50 and 99% of training"
    assert "λ1 = 0.5, λ2 = 2" in text_of(drawn[0])
    assert drawn[0].axes[0].get_xlim() == pytest.approx((0, 6))


def test_what_changes_in_training_is_drawn_side_by_side(drawn, tmp_path):
    """pd_mixture: all samples to 18%, easy ones to 89%, then Eq. 7."""
    curriculum("pd_mixture", out=tmp_path / "a.png", epoch=(0, 18, 19, 99))
    found = panels(drawn[0])
    assert [title.split("%")[0] for *_, title in found] == ["at 0 and 18", "at 19", "at 99"]
    differences = found[0][1]
    for (*_, weight, _), expected in zip(
        found,
        (np.ones(201), differences <= 1e-6, np.clip(1 - differences, 0, 1)),
        strict=True,
    ):
        np.testing.assert_allclose(weight[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 3], ids=["one visit", "three alike"])
def test_a_mentornet_from_a_file(mentor, drawn, tmp_path, steps):
    net, path = mentor
    curriculum(path, out=tmp_path / "a.png", epoch=(7, 80), given_label=2, history_steps=steps)
    found = panels(drawn[0])
    assert len(found) == 2
    for (losses, differences, weight, _), epoch in zip(found, (7, 80), strict=True):
        for row, column in ((0, 0), (200, 0), (31, 177)):
            point = (torch.tensor([float(at)]) for at in (losses[column], differences[row]))
            loss, diff = (p if steps is None else p[:, None].expand(1, 3) for p in point)
            expected = net(loss, diff, torch.tensor([2]), torch.tensor(epoch))
            assert weight[row, column] == pytest.approx(expected.item(), abs=1e-5)
    said = text_of(drawn[0])
    assert "Given label: 2" in said
    assert ("3 visits are taken to be alike" in said) == (steps == 3)


def test_one_without_an_lstm_gets_the_visits_it_was_made_for(drawn, tmp_path):
    path = tmp_path / "flat.safetensors"
    MentorNet(encoder="none", history_steps=4).save(path)
    curriculum(str(path), out=tmp_path / "a.png", epoch=(0,))
    assert "4 visits are taken to be alike" in text_of(drawn[0])
    with pytest.raises(ValueError, match="reads T = 4 visits"):
        curriculum(str(path), out=tmp_path / "a.png", history_steps=2)


def test_level_lines_carry_their_weights(drawn, tmp_path):
    """Each number stands where the weight is that: at 1 − w nats for Eq. 7; none above another."""
    curriculum("linear", out=tmp_path / "a.png", labels=True)
    texts = drawn[0].axes[0].texts
    numbers = {text.get_text(): text.get_position()[1] for text in texts}
    assert numbers == {f"{level:g}": pytest.approx(1 - level, abs=1e-3) for level in LEVELS}
    assert np.diff(sorted(text.get_position()[0] for text in texts)).min() > 1


def test_a_png_by_the_command_line(tmp_path, monkeypatch, capsys):
    """In the current folder, under the curriculum's name; with what it shows in words."""
    monkeypatch.chdir(tmp_path)
    arguments = "mentorch show curriculum focal --gamma 1 --diff-range -2 3 --epoch 0 99"
    monkeypatch.setattr(sys, "argv", arguments.split())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == "curriculum-focal.png\n"
    data = (tmp_path / "curriculum-focal.png").read_bytes()
    assert b"http" not in data
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.size == (880, 640)
        assert "loss difference (-2 to 3 nats): from 0.00 to 1.00" in image.text["Description"]


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


def test_a_page_needs_nothing_besides_itself(mentor, tmp_path):
    """And escapes the card, which comes from a file."""
    path = tmp_path / "page.html"
    curriculum(mentor[1], out=path, epoch=(0, 99), labels=True)
    html = path.read_text()
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", html)
    assert "prefers-color-scheme: dark" in html
    page = _Page(html)
    assert not page.tags & {"script", "link", "iframe", "object", "b"}
    assert "<b>$x$</b>" in page.text
    assert "fit: mse" in page.text
    assert len(page.images) == 2
    for image, epoch in zip(page.images, (0, 99), strict=True):
        assert f"at {epoch}% of training over loss (0 to 10 nats)" in image["alt"]
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        for node in ElementTree.fromstring(base64.b64decode(data)).iter():
            links = [value for name, value in node.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:")) for link in links)


def test_facts_of_every_kind(mentor):
    assert facts(ClosedForm("focal", gamma=3.0)) == {"kind": "closed form focal", "gamma": "3"}
    assert facts(ClosedForm("uniform")) == {"kind": "closed form uniform"}
    known = facts(mentor[0])
    assert known["architecture"] == "bi-LSTM of 1 a direction, 20 tanh units"
    assert (known["reads the label"], known["fit: mse"]) == ("yes", "0.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "liner"}, "unknown curriculum 'liner'.*linear.*self_paced_mentor"),
        ({"out": "a.jpg"}, "ends in .png, a page's in .html: not .*a.jpg"),
        ({"epoch": (0, 100)}, "epoch is a percentage of training, 0 to 99, got 100"),
        ({"epoch": ()}, "at least one percentage"),
        ({"loss_max": 0.0}, "loss_max must be above 0 nats and finite, got 0.0"),
        ({"loss_max": float("inf")}, "loss_max .* got inf"),
        ({"diff_range": (5.0, -5.0)}, "diff_range must be from < to, both finite, got 5.0 -5.0"),
        ({"diff_range": (float("nan"), 5.0)}, "diff_range .* got nan 5.0"),
        ({"gamma": 2.0}, "linear has lambda1, lambda2: leave out gamma=2"),
        ({"lambda1": float("nan")}, "lambda1 must be a finite number, got nan"),
        ({"lambda2": -1.0}, "must be ≥ 0, got lambda2=-1.0"),
        ({"name": "pd", "lambda1": 1.0}, "a MentorNet has no parameters: leave out lambda1=1"),
        ({"history_steps": 0}, "history_steps must be at least 1, got 0"),
        ({"history_steps": 2}, "linear looks at one visit: leave out history_steps=2"),
        ({"given_label": 1}, "reads no label: leave out given_label=1"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, options, message):
    options = {"name": "linear", "out": "a.png"} | options
    out = tmp_path / options.pop("out")
    with pytest.raises(ValueError, match=message):
        curriculum(options.pop("name"), out=out, **options)
    assert not list(tmp_path.iterdir())


def test_a_label_that_was_not_learned(mentor, tmp_path):
    with pytest.raises(ValueError, match="given_label must be in 0 to 2, got 3"):
        curriculum(mentor[1], out=tmp_path / "a.png", given_label=3)


def test_no_folder_to_write_into(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write a\.png into"):
        curriculum("linear", out=tmp_path / "nowhere" / "a.png")


def test_equal_neighbours_only_are_one():
    """The first and the last differ from what lies between, and are not drawn as one."""
    form = ClosedForm("pd_mixture", lambda2=0.0)  # in the end as in the middle
    assert [s.epochs for s in surfaces_at(form, (0, 50, 99))] == [(0,), (50, 99)]
    assert [s.epochs for s in surfaces_at(form, (0, 50, 1))] == [(0,), (50,), (1,)]
