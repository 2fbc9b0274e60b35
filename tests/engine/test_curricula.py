"""Curricula by name."""

from typing import get_args

import pytest
import torch

from mentorch.engine import curricula
from mentorch.engine.curricula import resolve_curriculum, shipped_mentornets
from mentorch.engine.mentor import MentorNet
from mentorch.kernels.mentor import ClosedForm, ClosedFormKind


@pytest.mark.parametrize("name", get_args(ClosedFormKind))
def test_closed_forms_by_name(name):
    assert resolve_curriculum(name) == ClosedForm(name)


def test_what_is_resolved_already_is_returned():
    form, mentor = ClosedForm("linear", lambda2=3.0), MentorNet()
    assert resolve_curriculum(form) is form
    assert resolve_curriculum(mentor) is mentor


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_file(tmp_path, kind):
    path = tmp_path / "mine.safetensors"
    mentor = MentorNet(card={"of": "mine"})
    mentor.save(path)
    found = resolve_curriculum(kind(path))
    assert found.card == {"of": "mine"}
    assert torch.equal(found.fc1.weight, mentor.fc1.weight)


def test_shipped_mentornets_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(curricula, "SHIPPED", tmp_path)
    assert shipped_mentornets() == []
    for name in ("b", "a"):
        MentorNet(card={"name": name}).save(tmp_path / f"{name}.safetensors")
    assert shipped_mentornets() == ["a", "b"]
    assert resolve_curriculum("a").card == {"name": "a"}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'ease'.*uniform, self_paced, linear.*\.safetensors"):
        resolve_curriculum("ease")


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        resolve_curriculum("nowhere.safetensors")
