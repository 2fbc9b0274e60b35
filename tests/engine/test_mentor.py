"""The MentorNet module and its file format."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mentorch.engine.mentor import MentorNet

DIMS = [
    {},  # as released
    {"num_labels": 3, "label_dim": 5, "epoch_dim": 10, "fc_units": 17},  # the other released file
    {"lstm_units": 4, "lstm_output": "c", "use_label": True, "num_labels": 10},
    {"encoder": "none", "history_steps": 2, "use_label": True},
    {"encoder": "none", "history_steps": 2, "activation": "linear", "fc_units": 1},
    {"activation": "linear"},
]


def inputs(batch=6, steps=2):
    loss = torch.rand(batch, steps) * 5
    return loss, loss - 1, torch.arange(batch) % 2, torch.arange(batch) * 10


def test_parameters_may_be_plain_tensors_as_fsdp_leaves_them():
    mentor, data = MentorNet(), inputs()
    expected = mentor(*data)
    for module in mentor.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, parameter.detach().clone())
    assert not list(mentor.parameters())
    assert torch.equal(mentor(*data), expected)


@pytest.mark.parametrize("dims", DIMS)
def test_saved_and_loaded_it_is_the_same(tmp_path, dims):
    card = {"target": {"kind": "linear", "lambda2": 1.0}, "seed": 3, "note": "ℓ − ℓ_pt"}
    mentor = MentorNet(**dims, card=card)
    path = tmp_path / "mentor.safetensors"
    mentor.save(path)
    loaded = MentorNet.load(path)
    assert loaded.card == card
    for option in ("use_label", "lstm_output", "encoder", "activation"):
        assert getattr(loaded, option) == getattr(mentor, option)
    assert loaded.activation == dims.get("activation", "tanh")
    for name, parameter in mentor.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    data = inputs()
    assert torch.equal(mentor(*data), loaded(*data))


def test_the_file_is_plain_safetensors_with_a_json_card(tmp_path):
    mentor = MentorNet(card={"seed": 1})
    mentor.save(str(tmp_path / "mentor.safetensors"))
    tensors = load_file(tmp_path / "mentor.safetensors")
    assert set(tensors) == {name for name, _ in mentor.named_parameters()}
    assert json.dumps(mentor.card) == '{"seed": 1}'


def test_the_file_is_as_readable_as_any_other(tmp_path):
    MentorNet().save(tmp_path / "mentor.safetensors")
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_default_dims_are_the_released_ones():
    shapes = {name: list(p.shape) for name, p in MentorNet().named_parameters()}
    assert shapes["label_embedding"] == [2, 2]
    assert shapes["epoch_embedding"] == [100, 5]
    assert shapes["forward_lstm.weight_ih"] == [4, 2]
    assert shapes["fc1.weight"] == [20, 9]
    assert shapes["fc2.weight"] == [1, 20]


def test_every_parameter_learns_but_the_labels_it_does_not_read():
    mentor = MentorNet(use_label=True)
    mentor(*inputs()).sum().backward()
    for name, parameter in mentor.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    blind = MentorNet()
    blind(*inputs()).sum().backward()
    assert blind.label_embedding.grad[1].eq(0).all()


def test_its_weights_are_not_copies():
    mentor = MentorNet()
    weights = mentor.weights()
    with torch.no_grad():
        mentor.fc2.bias.add_(1.0)
    assert weights.fc2_bias is mentor.fc2.bias


def test_older_files_have_an_lstm_and_tanh(tmp_path):
    mentor, path = MentorNet(), tmp_path / "old.safetensors"
    mentor.save(path)
    options = {"format": "mentornet-1", "use_label": "false", "lstm_output": "h", "card": "{}"}
    save_file(load_file(path), path, options)
    loaded = MentorNet.load(path)
    assert (loaded.encoder, loaded.activation) == ("lstm", "tanh")
    data = inputs()
    assert torch.equal(loaded(*data), mentor(*data))


def test_a_perceptron_reads_as_many_visits_as_it_was_made_for(tmp_path):
    mentor = MentorNet(encoder="none", history_steps=3)
    assert mentor.fc1.weight.shape == (20, 2 + 5 + 6)
    assert not any("lstm" in name for name, _ in mentor.named_parameters())
    mentor.save(tmp_path / "mentor.safetensors")
    with pytest.raises(ValueError, match="T = 3 visits of a sample, got 2"):
        MentorNet.load(tmp_path / "mentor.safetensors")(*inputs(steps=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lstm_output": "o"}, "'o'"),
        ({"encoder": "gru"}, "'gru'"),
        ({"activation": "relu"}, "'relu'"),
        ({"encoder": "none", "history_steps": 0}, "history_steps.*0"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MentorNet(**options)


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        MentorNet.load("nowhere.safetensors")


def test_files_that_are_not_mentornets(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"PK\x03\x04 not a safetensors file")
    with pytest.raises(ValueError, match=r"file\.safetensors is not a safetensors file"):
        MentorNet.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="format 'none'"):
        MentorNet.load(path)
    save_file({"weight": torch.ones(2)}, path, {"format": "mentornet-9"})
    with pytest.raises(ValueError, match="'mentornet-9', not 'mentornet-1'"):
        MentorNet.load(path)


@pytest.mark.parametrize("change", ["missing", "shape", "option", "encoder", "truncated"])
def test_damaged_mentornets_are_refused(tmp_path, change):
    path = tmp_path / "mentor.safetensors"
    mentor = MentorNet()
    mentor.save(path)
    tensors = load_file(path)
    options = {"format": "mentornet-1", "use_label": "false", "lstm_output": "h", "card": "{}"}
    if change == "missing":
        del tensors["fc1.bias"]
    elif change == "shape":  # one epoch too few: the epoch percentage would run off its end
        tensors["epoch_embedding"] = tensors["epoch_embedding"][:99].clone()
    elif change == "option":
        del options["lstm_output"]
    elif change == "encoder":  # which the tensors are not of
        options["encoder"] = "none"
    save_file(tensors, path, options)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"mentor\.safetensors"):
        MentorNet.load(path)
