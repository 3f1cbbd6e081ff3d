"""A state that all workers write together, each what it holds of its tensors, and that any number of workers reads again.

```
folder/
  shard-…safetensors   tensors or shards of them, by torch's distributed checkpoints; nothing is pickled
  state.pt             all that is no tensor, where the tensors belong, and the files' sizes: written last, by the first worker
```
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, distribute_tensor

STATE_NAME = "state.pt"
FILE_BYTES = 1 << 30
"""About what goes into one file: a worker holds its part of one twice while it writes."""
ALONE = "torch.distributed is disabled"
"""Begins what torch says wherever one process writes or reads for itself."""
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""By safetensors' names."""
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
ORDER = ("F64", "I64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


State = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor on disk, not read yet.

    Attributes:
        folder: that `begin` wrote.
        key: its name there.
    """

    folder: Path
    key: str

    def whole(self) -> Tensor:
        """All of it, on the CPU.

        Raises:
            ValueError: it is not there, or not as it was written.
        """
        return sources({"": self})[""].read()


def local(tensor: Tensor) -> Tensor:
    """This worker's shard; of a tensor that is not sharded all of it. The memory is shared."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A state that is being written."""

    folder: Path
    rest: State
    paths: Mapping[str, Sequence[str]]
    files: "Future[Any] | None"

    def finish(self, *, first: bool) -> None:
        """Wait until all workers have written their tensors; the first one then writes the rest.

        Raises:
            Exception: what a worker failed by.
        """
        if self.files is not None:
            try:
                self.files.result()
            except CheckpointException as error:
                raise _of_a_worker(error) from error
        if first:
            sizes = {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.safetensors"))}
            index = {"rest": self.rest, "tensors": {key: list(path) for key, path in self.paths.items()}, "files": sizes}
            torch.save(index, self.folder / STATE_NAME)


def begin(folder: Path, state: State, group: distributed.ProcessGroup | None = None) -> Saving:
    """Copy what this worker holds of a state, and write it in the background; every worker must ask.

    A tensor that is the same at every worker is written by one of them.

    Args:
        folder: where to, empty or not there yet; shared by all workers.
        state: nested, with tensors and what JSON can say; the same names at every worker, sharded tensors as DTensors. It may
            change as soon as this returns.
        group: of all workers, over CPUs, used for nothing else meanwhile; None for one process alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rest, tensors = _apart(state)
    named = {"/".join(path): tensor for path, tensor in tensors.items()}
    saving: Future[Any] | None = None
    if named:
        warnings.filterwarnings("ignore", message=ALONE)
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files_of(named), save_distributed=True)
        started = async_save(named, storage_writer=writer, process_group=group)
        assert isinstance(started, Future), "only a stager of its own makes it something else"
        saving = started
    return Saving(folder=folder, rest=rest, paths={"/".join(path): path for path in tensors}, files=saving)


def read(folder: Path) -> dict[str, Any]:
    """The state that was written to a folder, with `Stored` in the places of its tensors.

    Raises:
        ValueError: a file is missing or was cut off.
    """
    try:
        index: dict[str, Any] = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{folder / STATE_NAME} was cut off or changed; restore it") from error
    if "files" not in index:
        # Earlier versions wrote the tensors in here too.
        return index
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    if wrong := [name for name, size in index["files"].items() if sizes.get(name) != size]:
        raise ValueError(f"{folder} is not whole: {', '.join(wrong)} missing or cut off; restore it")
    state: dict[str, Any] = index["rest"]
    for key, (*above, name) in index["tensors"].items():
        place = state
        for step in above:
            place = place.setdefault(step, {})
        place[name] = Stored(folder=folder, key=key)
    return state


def fill(pairs: Iterable[tuple[Tensor, Tensor | Stored]]) -> None:
    """Give tensors, or this worker's shards of them, the values of others, however those were sharded.

    Args:
        pairs: a tensor, perhaps a DTensor, and its value: all of it; or a DTensor of the same layout; or what was written.

    Raises:
        ValueError: something is not there, or not as it was written, or has another shape.
    """
    stored: dict[Path, dict[str, Tensor]] = {}
    for target, value in pairs:
        if isinstance(value, Stored):
            stored.setdefault(value.folder, {})[value.key] = target
        elif isinstance(target, DTensor) and not isinstance(value, DTensor):
            whole = value.to(target.device)
            local(target).copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local())
        else:
            local(target).copy_(local(value))
    warnings.filterwarnings("ignore", message=ALONE)
    for folder, targets in stored.items():
        _load(targets, _reader(folder))


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor that is read when its turn comes.

    Attributes:
        dtype: by safetensors' name, e.g. `F32`.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * SIZES[self.dtype]


def sources(tensors: Mapping[str, Stored]) -> dict[str, TensorSource]:
    """Whole tensors, all of one folder, each put together of its shards when it is read.

    Raises:
        ValueError: something is not there.
    """
    warnings.filterwarnings("ignore", message=ALONE)
    (folder,) = {stored.folder for stored in tensors.values()}
    reader = _reader(folder)

    def source(key: str) -> TensorSource:
        found = _described(reader.read_metadata(), folder, key)

        def read() -> Tensor:
            value = torch.empty(found.size, dtype=found.properties.dtype)
            _load({key: value}, reader)
            return value

        return TensorSource(dtype=DTYPES[found.properties.dtype], shape=tuple(found.size), read=read)

    return {name: source(stored.key) for name, stored in tensors.items()}


def write_whole(target: Path, tensors: Mapping[str, TensorSource]) -> None:
    """Put tensors into one safetensors file, one after the other: none but the present one is in memory.

    The file is, byte for byte, what safetensors' own `save_file` writes.

    Raises:
        ValueError: something cannot be read.
    """
    order = sorted(tensors, key=lambda name: (ORDER.index(tensors[name].dtype), name))
    header, offset = dict[str, Any](), 0
    for name in order:
        found = tensors[name]
        header[name] = {"dtype": found.dtype, "shape": list(found.shape), "data_offsets": [offset, offset + found.bytes]}
        offset += found.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].read().contiguous().flatten().view(torch.uint8).numpy())


class _Reader(HuggingFaceStorageReader):
    """Reads the files' headers once."""

    @lru_cache(maxsize=1)  # noqa: B019  (as old as the reader)
    def read_metadata(self) -> Metadata:
        return super().read_metadata()


def _reader(folder: Path) -> _Reader:
    return _Reader(str(folder))


def _load(targets: dict[str, Tensor], reader: _Reader) -> None:
    """Every worker reads for itself, and waits for nobody."""
    try:
        load(targets, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"{reader.path} does not hold what was written there ({_of_a_worker(error)}); restore it") from error


def _described(metadata: Metadata, folder: Path, key: str) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata.get(key)
    if not isinstance(found, TensorStorageMetadata):
        raise ValueError(f"{folder} does not hold {key}; restore it")
    return found


def _apart(state: State, above: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[tuple[str, ...], Tensor]]:
    """A copy without its tensors, and these by their places."""
    rest, tensors = dict[str, Any](), dict[tuple[str, ...], Tensor]()
    for name, value in state.items():
        match value:
            case Tensor():
                tensors[*above, name] = value.detach()
            case Mapping():
                rest[name], more = _apart(value, (*above, name))
                tensors |= more
            case _:
                rest[name] = value
    return rest, tensors


def _of_a_worker(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor goes into, from 1."""
    found, size = dict[str, int](), 0
    for name, tensor in tensors.items():
        found[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    # Torch counts from 1 to the largest, and knows no gap.
    numbers = {number: place for place, number in enumerate(sorted(set(found.values())), start=1)}
    return {name: numbers[number] for name, number in found.items()}
