"""The format: what comes through it, and what is refused."""

import hashlib
import json
import pickle
import random
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import save_file

from mentorch.engine.checkpoint import (
    DamagedCheckpoint,
    checkpoints,
    load_checkpoint,
    pack,
    restore_random,
    take_snapshot,
    unpack,
    verify,
)
from mentorch.engine.checkpoint_writer import CheckpointWriter
from mentorch.engine.distributed import World

CPU = torch.device("cpu")


def _state():
    return {
        "step": 12,
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(2, 3)}, 1: {}}, "lr": [0.1]},
        "scaler": {},
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(5),
        "best": None,
        "flag": True,
    }


def _odd_tensors():
    base = torch.arange(24.0)
    return {
        "transposed": torch.randn(4, 5).T,
        "view": base[3:7],
        "same memory": base[3:7],
        "every other": base[::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "0-d": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "nan": torch.tensor([float("nan"), float("-inf")]),
        "bfloat16": torch.randn(3).bfloat16(),
        "float16": torch.randn(3).half(),
        "float64": torch.randn(3).double(),
        "int64": torch.tensor([-1, 2**62]),
        "uint8": torch.tensor([255, 0], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
    }


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and torch.equal(one.nan_to_num(9), other.nan_to_num(9))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other and type(one) is type(other)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with all the files that there can be."""
    models = {name: {"w": torch.randn(40)} for name in ("model", "average", "ledger")}
    own = {"loss_moving_avg": torch.tensor(1.5)}
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(take_snapshot(12, models, _state(), own, World()))
    writer.close()
    assert writer.problem() is None
    return tmp_path / "step-00000012"


def _rehash(path):
    """What someone does who wants a changed checkpoint to be taken for a good one."""
    files = sorted(file for file in path.iterdir() if file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (path / "SHA256SUMS").write_text("".join(lines))


# Round trips


def test_packing_is_undone_through_json():
    state, tensors = _state(), {}
    skeleton = json.loads(json.dumps(pack(state, tensors)))
    assert _equal(unpack(skeleton, tensors), state)
    assert len(tensors) == 3


def test_packed_tensors_whose_names_are_alike_stay_apart():
    """A parameter may be called "a/b", an integer key looks like a text one."""
    state = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3)}
    state["1"] = torch.tensor(4)
    tensors = {}
    skeleton = json.loads(json.dumps(pack(state, tensors)))
    assert _equal(unpack(skeleton, tensors), state)


def test_every_kind_of_tensor_comes_through(tmp_path):
    odd = _odd_tensors()
    writer = CheckpointWriter(tmp_path, keep=1)
    snapshot = take_snapshot(3, {"model": odd}, {"nested": [odd, 1.5]}, odd, World())
    writer.save(snapshot)
    writer.close()
    assert writer.problem() is None
    loaded = load_checkpoint(tmp_path / "step-00000003")
    assert _equal(loaded.models, {"model": odd})
    assert _equal(loaded.state, {"nested": [odd, 1.5]})
    assert _equal(loaded.own, odd)


def test_random_numbers_go_on(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(take_snapshot(3, {"model": {}}, {}, {}, World()))
    writer.close()
    expected = torch.randn(3)
    torch.randn(100)
    restore_random(load_checkpoint(tmp_path / "step-00000003").random, CPU)
    assert torch.equal(torch.randn(3), expected)


def test_a_snapshot_is_a_copy(saved):
    """Training changes weights, and dicts of scores, while the thread writes."""
    weight, momentum, own, scores = torch.ones(3), torch.ones(3), torch.ones(3), {"last": 1}
    state = {"momentum": momentum, "scores": scores}
    snapshot = take_snapshot(1, {"model": {"w": weight}}, state, {"own": own}, World())
    for tensor in (weight, momentum, own):
        tensor.fill_(2.0)
    scores["last"] = 2
    old = torch.ones(3)
    assert _equal(snapshot.models, {"model": {"w": old}})
    assert _equal(snapshot.state, {"momentum": old, "scores": {"last": 1}})
    assert _equal(snapshot.ranks[0]["own/own"], old)


def test_what_json_cannot_hold_is_refused_where_it_is_put_in():
    with pytest.raises(AssertionError, match="not for JSON"):
        take_snapshot(1, {"model": {}}, {"device": CPU}, {}, World())


# Ranks


@dataclass(frozen=True)
class Ranks(World):
    """A rank among others that have sent ``others`` already."""

    others: list = field(default_factory=list)

    def gather(self, value):
        values = list(self.others)
        values.insert(self.rank, value)
        return values


def test_each_rank_gets_back_what_is_its_own(tmp_path):
    sent = []

    class Sending(World):
        def gather(self, value):
            sent.append(value)
            return [value]

    torch.manual_seed(1)
    of_rank_1 = torch.get_rng_state()
    worker = take_snapshot(
        5, {"model": {"w": torch.ones(1)}}, {"x": 1}, {"avg": torch.tensor(2.0)}, Sending(1, 2)
    )
    assert worker.models == worker.state == {}, "a worker has copied what it does not write"
    torch.manual_seed(0)
    of_rank_0 = torch.get_rng_state()
    world = Ranks(0, 2, others=sent)
    snapshot = take_snapshot(5, {"model": {}}, {}, {"avg": torch.tensor(1.0)}, world)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(snapshot)
    writer.close()
    path = tmp_path / "step-00000005"
    for rank, state in ((0, of_rank_0), (1, of_rank_1)):
        loaded = load_checkpoint(path, rank)
        assert _equal(loaded.own, {"avg": torch.tensor(1.0 + rank)})
        assert _equal(loaded.random, {"cpu": state})
    # "1" must not take what belongs to "10" or the other way round, and nobody has rank 2
    absent = load_checkpoint(path, 2)
    assert absent.own == absent.random == {}
    before = torch.get_rng_state()
    restore_random(absent.random, CPU)
    assert torch.equal(torch.get_rng_state(), before)


# Names


def test_what_is_not_complete_is_no_checkpoint(tmp_path):
    for name in ("step-99999999", "step-00000030", "step-100000000", ".step-00000300.tmp"):
        (tmp_path / name).mkdir()
    for name in ("step-00000400.set-aside", "step-0000040x", ".step-00000300.old", "step-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000500").write_text("")
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-00000030", "step-99999999", "step-100000000"]
    assert checkpoints(tmp_path / "absent") == []


# Damage


def test_the_hashes_are_those_of_sha256sum(saved):
    verify(saved)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    result = subprocess.run(command, cwd=saved, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    listed = {line.split(":")[0] for line in result.stdout.splitlines()}
    assert listed == {path.name for path in saved.iterdir()} - {"SHA256SUMS"}
    again = ["sha256sum", *sorted(listed)]
    printed = subprocess.run(again, cwd=saved, capture_output=True, text=True, check=True).stdout
    assert (saved / "SHA256SUMS").read_text() == printed


def _truncate(path, _):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _append(path, _):
    path.write_bytes(path.read_bytes() + b"\n")


def _remove(path, _):
    path.unlink()


def _empty(path, _):
    path.write_bytes(b"")


def _link(path, _):
    moved = path.parent.parent / "moved"
    path.rename(moved)
    path.symlink_to(moved)


DAMAGES = (_truncate, _flip, _append, _remove, _empty, _link)
FILES = (
    *("model.safetensors", "average.safetensors", "ledger.safetensors"),
    *("state.safetensors", "state.json", "ranks.safetensors", "SHA256SUMS"),
)


def test_the_files_that_are_damaged_below_are_all_there_are(saved):
    assert {path.name for path in saved.iterdir()} == set(FILES)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_seen_and_the_file_named(saved, name, damage):
    for seed in range(8 if damage is _flip else 1):  # bits in headers, data, hashes and names
        whole = (saved / name).read_bytes()
        damage(saved / name, random.Random(seed))
        with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
            verify(saved)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(saved)
        if damage is _flip:
            (saved / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "\n" + text, "does not belong"),  # an empty line
        (lambda text: text + text.splitlines()[0] + "\n", "does not belong"),  # a name twice
        (lambda text: text.replace("  model", " *model"), "does not belong"),  # of "binary" mode
        (lambda text: text + "0" * 64 + "  ../model.safetensors\n", "does not belong"),
        (lambda text: text + "0" * 64 + "  /etc/passwd\n", "does not belong"),
        (lambda text: text.upper(), "does not belong"),
        (lambda text: text.replace("\n", "\r\n"), "does not belong"),
        (lambda text: text + "# " * 4000, "no end"),
        (lambda text: "".join(text.splitlines(True)[1:]), "is not listed"),
        (lambda text: text.replace("model", "mödel"), "does not belong"),
    ],
)
def test_odd_lists_of_hashes_are_refused(saved, change, said):
    sums = saved / "SHA256SUMS"
    sums.write_text(change(sums.read_text()))
    with pytest.raises(DamagedCheckpoint, match=said):
        verify(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "ranks.safetensors", "state.json"])
def test_what_every_checkpoint_has_must_be_listed(saved, name):
    (saved / name).unlink()
    _rehash(saved)
    with pytest.raises(DamagedCheckpoint, match=f"does not list {name}"):
        verify(saved)


def test_a_folder_in_a_checkpoint_or_a_link_to_one_is_refused(saved):
    (saved / "extra").mkdir()
    with pytest.raises(DamagedCheckpoint, match="extra"):
        verify(saved)
    (saved / "extra").rmdir()
    verify(saved)
    (saved.parent / "link").symlink_to(saved)
    with pytest.raises(DamagedCheckpoint, match="link: is no folder"):
        verify(saved.parent / "link")


# Made to harm: the hashes are right


class Marker:
    """Pickled, it makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["model.pt", ".metadata", "__0_0.distcp", "model.pkl"])
def test_pickles_are_refused_and_not_opened(saved, tmp_path, name, listed):
    """torch.save's, and the .metadata of torch.distributed.checkpoint, which that unpickles."""
    (saved / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    if listed:
        _rehash(saved)
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [name for name in FILES if name != "SHA256SUMS"])
def test_a_pickle_in_a_files_place_is_refused(saved, tmp_path, name):
    torch.save(Marker(tmp_path / "ran"), saved / name)
    _rehash(saved)
    with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
        load_checkpoint(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"list": [' * 100_000 + "]}" * 100_000,  # deeper than any stack
        '{"list": [' * 2_000 + "]}" * 2_000,  # deep enough for unpack, not for every JSON parser
        "",
        "null",
        "[]",
        "{}",
        '{"list": []}',  # a state that is no dict
        '{"value": 1}',
        '{"value": {"__class__": "os.system"}}',
        '{"tensor": "absent"}',
        '{"tensor": ["a"]}',
        '{"items": 7}',
        '{"items": [[1, 2, 3]]}',
        '{"items": [[{}, {"value": 1}]]}',  # a key that no dict can have
        '{"items": [], "list": []}',
        '{"object": "os.system"}',
        '{"items": [["x", {"value": ' + "9" * 10_000 + "}]]}",
        '{"items": [["x", {"value": 1}]]',
        "\ud800",
    ],
    ids=lambda text: text[:20],
)
def test_a_crafted_state_is_refused(saved, text):
    (saved / "state.json").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    _rehash(saved)
    if "9" * 10_000 in text and not _limits_digits():
        pytest.skip("this Python reads numbers of any length")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        load_checkpoint(saved)


def _limits_digits():
    try:
        int("9" * 10_000)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("skeleton", [7, None, "text", [], {}, {"value": 1, "list": []}])
def test_what_pack_does_not_make_is_a_value_error(skeleton):
    with pytest.raises(ValueError, match="expected one of"):
        unpack(skeleton, {})


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}},
        {"w": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}},
        {"w": 7},
        None,  # a header that is said to have 2**60 bytes
    ],
    ids=str,
)
def test_crafted_tensors_are_refused(saved, header):
    content = json.dumps(header).encode()
    length = len(content) if header else 2**60
    (saved / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content)
    _rehash(saved)
    try:
        loaded = load_checkpoint(saved).models["model"]["w"]
    except DamagedCheckpoint as error:
        assert "model.safetensors" in str(error)  # noqa: PT017 – the empty one may be accepted
    else:
        assert loaded.numel() == 0


@pytest.mark.parametrize(
    "tensors",
    [
        {"0/cpu": torch.zeros(16)},
        {"0/cpu": torch.zeros(16, dtype=torch.uint8)},
        {"0/cpu": torch.full((5056,), 255, dtype=torch.uint8)},
        {"0/cuda": torch.zeros(2, 2, dtype=torch.uint8)},
        {"0/other": torch.zeros(1)},
    ],
    ids=["float", "short", "garbage", "square", "unknown"],
)
def test_crafted_random_states_are_refused(saved, tensors):
    save_file(tensors, saved / "ranks.safetensors")
    _rehash(saved)
    with pytest.raises(DamagedCheckpoint, match=r"ranks\.safetensors"):
        load_checkpoint(saved)


def test_a_random_state_of_another_release_is_no_crash():
    with pytest.raises(DamagedCheckpoint, match="no random state"):
        restore_random({"cpu": torch.zeros(3, dtype=torch.uint8)}, CPU)


def test_what_cannot_be_read_is_damaged(saved, monkeypatch):
    def failing(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("mentorch.engine.checkpoint_files.file_sha256", failing)
    with pytest.raises(DamagedCheckpoint, match=r"safetensors: cannot be read: .*Input/output"):
        verify(saved)


def test_a_checkpoint_that_was_moved_is_as_good(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "elsewhere")
    assert _equal(load_checkpoint(tmp_path / "elsewhere"), load_checkpoint(saved))
