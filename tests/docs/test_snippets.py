"""Python on pages that is to be copied: it is whole, and the longer pieces do what they say."""

import ast
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mentorch.engine.config import DataConfig, OptimConfig, RunConfig, StudentConfig
from mentorch.engine.config_files import save_config
from mentorch.engine.data.folder import index_folder
from mentorch.engine.data.index import Index

from .pages import DOCS, ROOT, code_blocks, markdown

_SIDE = 32  # pixels, after a border of 2 on each side is left out: two sizes that differ


def snippet(page: str, word: str) -> str:
    """The one Python block of a page that has a word in it."""
    (found,) = [code for code in code_blocks(DOCS / f"{page}.md", "python") if word in code]
    return found


@pytest.mark.parametrize("page", markdown(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_can_be_parsed(page):
    for code in code_blocks(page, "python"):
        ast.parse(code.replace("…", "..."))  # what a page leaves to the reader


@pytest.fixture
def mine(tmp_path) -> Path:
    """Class folders: a bright and a dark class, two images each."""
    for name, shade in (("cat", 200), ("dog", 50)):
        folder = tmp_path / "mine" / "train" / name
        folder.mkdir(parents=True)
        for number in (1, 7):
            pixels = np.full((40, 60, 3), shade + number, np.uint8)  # not square: it is cut
            Image.fromarray(pixels).save(folder / f"000{number}.jpg")
    index_folder(tmp_path / "mine", workers=0)
    return tmp_path / "mine"


def run_with(code: str, mine: Path) -> dict[str, object]:
    """Runs a page's code where /data/mine is ``mine``; returns its names."""
    names: dict[str, object] = {"__name__": "snippet"}
    exec(code.replace("/data/mine", str(mine)), names)
    return names


def test_checked_labels_go_into_an_index(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_with(snippet("curricula", "clean_label"), mine)
    before, after = Index.read(mine / "folder.index.parquet"), Index.read("checked.index.parquet")
    known = dict(zip(after.paths().to_pylist(), after.clean_labels().tolist(), strict=True))
    assert known == {
        "train/cat/0001.jpg": 0,
        "train/cat/0007.jpg": 1,  # the page's dict says that this cat is a dog
        "train/dog/0001.jpg": -1,
        "train/dog/0007.jpg": -1,
    }
    assert after.labels().tolist() == before.labels().tolist() == [0, 0, 1, 1]
    assert after.root == before.root


def test_a_runs_student_is_used(mine, tmp_path, monkeypatch):
    """It takes the averaged weights of the best checkpoint, and pixels as an evaluation has them.

    The student is timm's smallest; its classifier's biases alone say which of the weights it has.
    """
    config = RunConfig(
        student=StudentConfig(name="test_resnet"),
        data=DataConfig(image_size=_SIDE, resize=_SIDE + 4),
        optim=OptimConfig(average_decay=0.9),
    )
    run = tmp_path / "runs/mine-20260101-120000"
    best = run / "checkpoints/step-00000002"
    best.mkdir(parents=True)
    save_config(config, run / "config.json")
    (best.parent / "best").write_text("step-00000002\n")
    state = timm.create_model("test_resnet", num_classes=2).state_dict()
    for name, bias in (("average", [0.0, 9.0]), ("model", [9.0, 0.0])):
        weights = state | {"fc.weight": torch.zeros(2, len(state["fc.weight"][0]))}
        save_file(weights | {"fc.bias": torch.tensor(bias)}, best / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    names = run_with(snippet("recipes", "def classify"), mine)
    seen = []
    names["model"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert names["classify"](mine / "train/cat/0001.jpg") == "dog"
    (inputs,) = seen
    assert inputs.shape == (1, 3, _SIDE, _SIDE)
    assert float(inputs.mean()) == pytest.approx((201 / 255 - 0.5) / 0.5, abs=0.02)


def test_generalised_cross_entropy_is_a_loss():
    names = run_with(snippet("curricula", "GeneralisedCrossEntropy"), Path("nowhere"))
    logits = torch.zeros(4, 10, requires_grad=True)
    loss = names["criterion"](logits, torch.arange(4))
    loss.backward()
    # (1 − p^q) / q at p = 1/10, Eq. 6 of Zhang & Sabuncu.
    assert loss.item() == pytest.approx((1 - 0.1**0.7) / 0.7, rel=1e-5)
    assert logits.grad is not None
