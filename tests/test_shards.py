"""A state in shards: written in the background, whole or refused, and put together tensor by tensor."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from libra_ray import shards
from libra_ray.shards import Stored

STATE = {
    "step": 3,
    "none": {},
    "weights": {"a.b": torch.arange(6.0).view(2, 3), "c/d": torch.tensor(2.5), "half": torch.ones(3, dtype=torch.bfloat16)},
    "counts": {"deep": {"long": torch.arange(4), "flags": torch.tensor([True, False])}},
}


def same(read, state) -> bool:
    if isinstance(read, Stored):
        return torch.equal(read.whole(), state) and read.whole().dtype == state.dtype
    if isinstance(read, dict):
        return read.keys() == state.keys() and all(same(value, state[name]) for name, value in read.items())
    return bool(read == state)


@pytest.fixture
def folder(tmp_path) -> Path:
    shards.begin(tmp_path / "state", STATE).finish(first=True)
    return tmp_path / "state"


def test_what_is_read_is_what_was_written(folder):
    assert same(shards.read(folder), STATE)


def test_what_is_written_is_what_was_there_when_it_began(tmp_path):
    value = torch.zeros(1000)
    saving = shards.begin(tmp_path / "state", {"value": value})
    value += 1
    saving.finish(first=True)
    assert not shards.read(tmp_path / "state")["value"].whole().any()


def test_a_state_without_tensors_is_one_too(tmp_path):
    shards.begin(tmp_path / "state", {"step": 1}).finish(first=True)
    assert shards.read(tmp_path / "state") == {"step": 1}


@pytest.mark.parametrize("how", ["cut off", "missing"])
def test_a_folder_that_is_not_whole_is_refused(folder, how):
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    file.unlink()
    if how == "cut off":
        file.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=rf"state is not whole: {file.name} missing or cut off; restore it"):
        shards.read(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -30])
def test_a_cut_off_index_is_refused(folder, kept):
    path = folder / shards.STATE_NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"state\.pt was cut off or changed; restore it") as refused:
        shards.read(folder)
    assert "\n" not in str(refused.value)


def test_a_tensor_of_another_shape_is_refused(folder):
    with pytest.raises(ValueError, match="does not hold what was written there"):
        shards.fill([(torch.zeros(3, 3), shards.read(folder)["weights"]["a.b"])])


def test_large_states_are_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 24)
    shards.begin(tmp_path / "state", STATE).finish(first=True)
    assert len(list((tmp_path / "state").glob("*.safetensors"))) > 1
    assert same(shards.read(tmp_path / "state"), STATE)


def test_put_together_it_is_what_safetensors_writes(folder, tmp_path):
    state = shards.read(folder)
    shards.write_whole(tmp_path / "ours", shards.sources({**state["weights"], **state["counts"]["deep"]}))
    save_file({**STATE["weights"], **STATE["counts"]["deep"]}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_the_whole_is_never_in_memory(tmp_path, monkeypatch):
    size, tensors = 40 << 20, 12
    shards.begin(tmp_path / "state", {str(i): torch.full((size // 4,), float(i)) for i in range(tensors)}).finish(first=True)
    found, load = [], shards._load

    def measured(*args):
        load(*args)
        found.append(anonymous())

    monkeypatch.setattr(shards, "_load", measured)
    before = anonymous()
    shards.write_whole(tmp_path / "whole", shards.sources(shards.read(tmp_path / "state")))
    assert len(found) == tensors
    # Other threads of this process come and go with some memory of theirs.
    assert max(found) - before < tensors / 2 * size
