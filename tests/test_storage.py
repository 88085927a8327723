"""Files are whole or absent: full disks, cut files, foreign files; and Adam goes on where it was."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from diffusion_gym.agents.optimizer_state import optimizer_tensors, restore_optimizer
from diffusion_gym.storage import (
    joined,
    load_tensors,
    part_of,
    read_json,
    remove_unfinished,
    restore_parameters,
    save_tensors,
    tensors_metadata,
    write_atomically,
    write_folder,
    write_json,
)


def disk_full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes the first few bytes of a file and no more."""
    genuine = Path.write_bytes

    def write_some(self, data):
        genuine(self, data[:10])
        disk_full()

    monkeypatch.setattr(Path, "write_bytes", write_some)


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "value.json"
    for value in ({"a": [1, 2.5, None]}, {"b": "ü"}):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value == read_json(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["value.json"]


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], indirect=True, ids=oct)
def test_what_is_written_has_the_permissions_of_the_umask(tmp_path, umask):
    """Also where a library chose others: safetensors 0.8 writes 0600."""
    from safetensors.torch import save_file

    def write(place):
        (place / "unet").mkdir()
        save_file({"w": torch.zeros(2)}, place / "unet" / "w.safetensors")
        (place / "open").touch(0o777)

    write_json(tmp_path / "value.json", 1)
    write_folder(tmp_path / "new", write)
    write_folder(tmp_path, write)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "store" / "value.json")
    (tmp_path / "folder").symlink_to(tmp_path / "store")
    write_json(tmp_path / "link.json", 1)
    write_folder(tmp_path / "folder", lambda place: write_json(place / "other.json", 2))
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "folder").is_symlink()
    assert {path.name: read_json(path) for path in (tmp_path / "store").iterdir()} == {"value.json": 1, "other.json": 2}


def test_a_name_is_flushed_with_its_file(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_json(tmp_path / "value.json", 1)
    assert flushed[-1] == str(tmp_path) and len(flushed) == 2


def test_a_folder_that_is_replaced_leaves_whoever_has_it_mapped_alone(tmp_path):
    from safetensors import safe_open

    def save(value):
        return lambda place: save_tensors(place / "unet" / "model.safetensors", {"w": torch.full((4,), value)})

    write_folder(tmp_path / "model", save(1.0))
    with safe_open(tmp_path / "model" / "unet" / "model.safetensors", framework="pt") as file:
        mapped = file.get_tensor("w")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.fp16.safetensors", "notes"):
        (tmp_path / "model" / "unet" / name).write_text("old")
    write_folder(tmp_path / "model", save(2.0))
    assert mapped.tolist() == [1] * 4
    assert load_tensors(tmp_path / "model" / "unet" / "model.safetensors")["w"].tolist() == [2] * 4
    left = {path.name for path in (tmp_path / "model").rglob("*")}
    assert left == {"unet", "model.safetensors", "model.fp16.safetensors", "notes"}  # no shards that would win


def test_a_folder_whose_writing_raises_is_as_it_was(tmp_path):
    def half(place):
        write_json(place / "value.json", 2)
        disk_full()

    write_json(tmp_path / "old" / "value.json", 1)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            write_folder(tmp_path / name, half)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["value.json"]
    assert read_json(tmp_path / "old" / "value.json") == 1
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        write_folder(tmp_path / "file", lambda place: None)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [b"precious", None])
def test_a_write_that_raises_changes_nothing(tmp_path, error, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def half(temporary):
        temporary.write_bytes(b"half of it")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, half)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({"file": before} if before else {})


def test_a_full_disk_keeps_the_previous_tensors(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"w": torch.arange(5.0)}, {"step": "1"})
    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"w": torch.zeros(5)}, {"step": "2"})
    assert load_tensors(path)["w"].tolist() == [0, 1, 2, 3, 4]
    assert tensors_metadata(path) == {"step": "1"}
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_that_share_memory_are_stored(tmp_path):
    """Safetensors itself refuses them: a view of one, the same one twice, and one that is on its own."""
    whole = torch.arange(6.0)
    tensors = {
        "a": whole,
        "b": whole,
        "rows": whole.view(2, 3),
        "part": whole[2:4],
        "empty": whole[:0],
        "own": whole + 1,
    }
    save_tensors(tmp_path / "w.safetensors", tensors)
    found = load_tensors(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in found.items())


def test_what_a_kill_leaves_is_removed_and_nothing_else(tmp_path):
    """The temporary file of `write_atomically`, at any depth."""

    folder = tmp_path / "run" / "checkpoints"
    names = []
    write_atomically(folder / "whole", lambda temporary: (names.append(temporary.name), temporary.write_bytes(b"1")))
    for place in (folder, tmp_path / "run"):
        (place / names[0]).write_bytes(b"half")
        write_json(place / f"again{names[0]}" / "value.json", 1)
        (place / f"again{names[0]}").rename(place / f".again{names[0]}")
        (place / ".hidden").write_bytes(b"mine")
    remove_unfinished(tmp_path / "run")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["run/.hidden", "run/checkpoints/.hidden", "run/checkpoints/whole"]
    remove_unfinished(tmp_path / "nowhere")


def test_a_disk_that_fills_up_midway_leaves_nothing(tmp_path, full_disk):
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "value.json", list(range(100)))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_found_full_when_flushing_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, 1)
    monkeypatch.setattr(os, "fsync", disk_full)  # where delayed allocation reports it
    with pytest.raises(OSError, match="No space left"):
        write_json(path, 2)
    assert read_json(path) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_survive_bit_for_bit(tmp_path, dtype):
    values = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    tensors = {"transposed": values.T, "view": values[1], "scalar": values[0, 0], "empty": values[:0]}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], value)
    assert tensors_metadata(tmp_path / "t.safetensors") == {}


@pytest.mark.parametrize("kept", [0, 4, 8, 40, 0.5, 0.999, -1])
def test_a_truncated_safetensors_file_is_named(tmp_path, kept):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"w": torch.arange(100.0), "b": torch.arange(3)}, {"format": "x"})
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"weights\.safetensors is truncated or not a safetensors file"):
        load_tensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"\x80\x04}\x94\x8c\x01w\x94K\x01s.",
        bytes(range(256)) * 8,
        b"\xff" * 100,
    ],
    ids=["json", "pickle", "0-255", "ff"],
)
def test_a_file_of_another_kind_is_named(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors is truncated or not a safetensors file"):
        load_tensors(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("content", [b'{"a": [1, 2', b"", b"\xff\xfe{}", b"a: 1"])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not a JSON file"):
        read_json(tmp_path / "config.json")


def network(seed=0):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(4, 4) for _ in range(6)]  # 12 parameters: index "10" sorts before "2" as a string
    return torch.nn.Sequential(*layers)


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()


def adam(model, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def test_adam_goes_on_bit_for_bit(tmp_path):
    model = network()
    optimizer = adam(model)
    train(model, optimizer, 3, seed=0)
    save_tensors(tmp_path / "adam.safetensors", optimizer_tensors(optimizer))
    copy, forgetful = network(1), network(1)
    for other in (copy, forgetful):
        other.load_state_dict(model.state_dict())
    restored = adam(copy)
    restore_optimizer(restored, load_tensors(tmp_path / "adam.safetensors"))
    train(model, optimizer, 2, seed=1)
    train(copy, restored, 2, seed=1)
    train(forgetful, adam(forgetful), 2, seed=1)
    pairs = list(zip(model.parameters(), copy.parameters(), forgetful.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)  # the state does matter


def test_a_restored_optimizer_keeps_its_own_learning_rate():
    model = network()
    optimizer = adam(model)
    train(model, optimizer, 1, seed=0)
    other = adam(network(1), lr=0.5)
    restore_optimizer(other, optimizer_tensors(optimizer))
    assert other.param_groups[0]["lr"] == 0.5
    assert len(other.state) == 12


def test_an_optimizer_that_never_stepped_has_nothing_to_store():
    optimizer = adam(network())
    assert optimizer_tensors(optimizer) == {}
    restore_optimizer(optimizer, {})
    assert len(optimizer.state) == 0


def test_parts_are_joined_and_read_back():
    parts = {"policy": {"a.b": torch.ones(2)}, "optimizer": {"0.step": torch.zeros(1)}}
    tensors = joined(parts)
    assert tensors.keys() == {"policy.a.b", "optimizer.0.step"}
    assert part_of(tensors, "policy").keys() == {"a.b"} and not part_of(tensors, "poli")


def test_weights_are_put_in_place_or_left_as_they_are():
    weights = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(1))}
    stored = {"a": torch.ones(2), "b": torch.ones(1)}
    for other in ({"a": torch.ones(2)}, {**stored, "c": torch.ones(1)}, {**stored, "b": torch.ones(2)}):
        with pytest.raises(
            ValueError, match="the file holds the weights of another policy; check the model, trainable"
        ):
            restore_parameters(weights, other, "the file")
        assert not any(weight.any() for weight in weights.values())
    restore_parameters(weights, stored, "the file")
    assert all(torch.equal(weights[name], value) for name, value in stored.items())
