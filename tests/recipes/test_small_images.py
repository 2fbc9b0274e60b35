"""The recipes on small image sets, as a user starts them, at a size that takes seconds."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mentorch.engine.mentor import MentorNet

RECIPES = Path(__file__).parents[2] / "recipes"


def _run(recipe, *options):
    command = [sys.executable, RECIPES / f"{recipe}.py", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def refused(monkeypatch, capsys):
    """What a recipe says that ends with status 2, in this process: a new Python takes seconds."""

    def run(recipe, *options):
        path = str(RECIPES / f"{recipe}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        assert ended.value.code == 2
        said = capsys.readouterr()
        return said.out + said.err

    return run


@pytest.mark.slow
def test_digits(tmp_path, refused):
    """Two methods, two seeds, a sixth of the epochs: the table, the picture, and going on."""
    options = [
        "--out",
        tmp_path,
        "--epochs",
        10,
        "--seeds",
        0,
        1,
        "--methods",
        "full",
        "self_paced",
    ]
    status, said = _run("digits", *options)
    assert status == 0, said
    assert "| self_paced |" in said
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert (tmp_path / "symmetric-0.4.curves.png").is_file()
    said = refused("digits", *options, "--methods", "nonesuch")
    assert "unknown method 'nonesuch'" in said


@pytest.mark.slow
def test_learning_a_mentornet_for_other_sets(tmp_path, refused):
    out = tmp_path / "dd.safetensors"
    options = ["--dataset", "digits", "--classes", 0, 1, 2, "--skip", 0, "--train-samples", 256]
    options += ["--noises", "symmetric:0.4", "--student", "small_mlp", "--lr", 0.02]
    status, said = _run("learn_dd", *options, "--epochs", 20, "--steps", 200, "--out", out)
    assert status == 0, said
    card = MentorNet.load(out).card
    assert card["held_out"]["auc"] > 0.8
    assert "(0, 1, 2)" in card["source"]
    assert "safetensors" in refused("learn_dd", "--out", tmp_path / "dd.pt")


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-10's binary files, 320 training and 40 test images, and CIFAR-N's file for them."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (folder / "batches.meta.txt").write_text("\n".join(names.split()) + "\n")
    generator = np.random.default_rng(0)
    labels = []
    for name, count in [(f"data_batch_{k}", 64) for k in range(1, 6)] + [("test_batch", 40)]:
        records = generator.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] = generator.integers(0, 10, count)
        records.tofile(folder / f"{name}.bin")
        labels.append(records[:, 0].astype(np.int64))
    clean = np.concatenate(labels[:-1])
    worse = np.where(np.arange(320) % 4 == 0, (clean + 1) % 10, clean)
    torch.save({"clean_label": clean, "worse_label": worse}, tmp_path / "human.pt")
    return tmp_path


@pytest.mark.slow
def test_cifar_with_the_released_presets(cifar):
    options = [
        "--root",
        cifar,
        "--student",
        "cifar_resnet20",
        "--epochs",
        1,
        "--out",
        cifar / "out",
    ]
    status, said = _run("cifar", *options, "--method", "pd", "--preset", "released-code")
    assert status == 0, said
    (path,) = (cifar / "out").glob("*.json")
    record = json.loads(path.read_text())
    curriculum = record["experiment"]["method"]["curriculum"]
    assert (curriculum["name"], curriculum["decay"]) == ("pd_released", 0.5)
    assert record["experiment"]["config"]["optim"]["scale_weight_decay"]
    assert 0.25 < record["wrong_share"] < 0.47


@pytest.mark.slow
def test_cifar_with_human_labels(cifar, refused):
    options = [
        "--root",
        cifar,
        "--student",
        "cifar_resnet20",
        "--epochs",
        1,
        "--out",
        cifar / "out",
    ]
    status, said = _run("cifar", *options, "--human-labels", f"{cifar}/human.pt:worse_label")
    assert status == 0, said
    (path,) = (cifar / "out").glob("*human-worse_label*.json")
    assert json.loads(path.read_text())["wrong_share"] == 0.25
    assert "worse_label" in refused("cifar", *options, "--human-labels", f"{cifar}/human.pt:worst")
