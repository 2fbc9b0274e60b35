"""The commands, driven by tyro as the command line drives them."""

import pytest
import tyro

from mentorch.engine.data import commands
from mentorch.engine.data.index import Index


def _run(*words):
    app = tyro.extras.SubcommandApp()
    for function in (commands.webvision, commands.imagenet, commands.folder, commands.noise):
        app.command(function)
    return app.cli(args=[str(word) for word in words])


def test_index_then_noise(webvision, tmp_path):
    _run("webvision", webvision, "--workers", 0)
    index = _run("noise", webvision / "webvision.index.parquet", "--rate", 0.5, "--seed", 3)
    out = webvision / "webvision.index.symmetric-0.5-seed3.parquet"
    assert Index.read(out).table.equals(index.table)
    assert Index.read(out).noise["seed"] == 3


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("pair", "--rate", 0.4), "pair-0.4"),
        (("asymmetric", "--rate", 0.4, "--mapping", "0:1,1:0"), "asymmetric-0.4"),
        (("instance", "--rate", 0.4), "instance-0.4"),
        (("matrix", "--matrix", "T.csv"), "matrix-T"),
    ],
)
def test_kinds_of_noise(webvision, put, monkeypatch, capsys, options, name):
    monkeypatch.chdir(webvision)
    put("T.csv", "0,1,0,0\n" * 4)
    _run("webvision", webvision, "--workers", 0)
    noisy = _run("noise", "webvision.index.parquet", "--kind", *options)
    read = Index.read(webvision / f"webvision.index.{name}-seed0.parquet")
    assert read.noise == noisy.noise
    assert read.noise["kind"] == options[0]
    assert "expected)" in capsys.readouterr().out


def test_noise_without_a_rate(webvision):
    _run("webvision", webvision, "--workers", 0)
    with pytest.raises(ValueError, match="noise rate is None"):
        commands.noise(webvision / "webvision.index.parquet")


def test_imagenet_options(put, tmp_path):
    put("val/x.JPEG")
    words = put("labels", "x.JPEG 1\n"), put("classes", "n00000000 a\nn00000001 b\n")
    index = _run("imagenet", tmp_path, "--val-list", words[0], "--synsets", words[1])
    assert index.labels().tolist() == [1]


def test_folder_out(put, tmp_path):
    put("a/x.jpg")
    _run("folder", tmp_path, "--out", tmp_path / "x.parquet", "--reverify")
    assert len(Index.read(tmp_path / "x.parquet")) == 1


def test_the_clean_index_is_not_overwritten(webvision):
    _run("webvision", webvision)
    path = webvision / "webvision.index.parquet"
    with pytest.raises(ValueError, match="is the index without noise itself"):
        commands.noise(path, rate=0.4, out=path)
    noisy = webvision / "noisy.parquet"
    commands.noise(path, rate=0.4, out=noisy)
    with pytest.raises(ValueError, match="has injected label noise and would be lost"):
        commands.webvision(webvision, out=noisy)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        _run("imagenet", "--help")
    printed = capsys.readouterr().out
    for option in ("ROOT", "--out", "--workers", "--reverify", "--val-list", "--synsets"):
        assert option in printed
