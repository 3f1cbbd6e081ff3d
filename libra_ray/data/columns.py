"""Columns of a dataset's parquet files as arrays; what is missing, of another length or no number is named, not guessed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from libra_ray.data.checks import DatasetError, unfinished

Where = Callable[[int], str]
"""Row number -> where that is, in words."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of several parquet files, one file after the other.

    Attributes:
        rows: columns by name.
        files: the files; file `i` holds `counts[i]` rows.
    """

    rows: pa.Table
    files: tuple[Path, ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        """The number of rows."""
        return int(self.rows.num_rows)

    def __getitem__(self, column: str) -> pa.ChunkedArray:
        """A column."""
        return self.rows[column]

    def place(self, row: int) -> str:
        """File, and row in it, of a row."""
        ends = np.cumsum(self.counts)
        file = int(np.searchsorted(ends, row, side="right"))
        return f"in {self.files[file]}, row {row - int(ends[file]) + self.counts[file]}"

    @property
    def empty(self) -> list[Path]:
        """The files without a row."""
        return [path for path, count in zip(self.files, self.counts, strict=True) if count == 0]


def read_table(folder: Path, paths: Sequence[Path], columns: Sequence[str]) -> Table:
    """The given columns of the parquet files `paths`, which lie below `folder`.

    Raises:
        DatasetError: no file, a file without its footer (the writer was not finalised), or a missing column.
    """
    if not paths:
        raise unfinished(folder, "no parquet files that are named as its info.json says")
    tables = []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise unfinished(path, f"damaged parquet file ({error})") from error
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise DatasetError(f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
        try:
            tables.append(file.read(columns=list(columns)))
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(path, file, columns, error) from error
    try:
        rows = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DatasetError(
            f"the files in {folder} disagree about the type of a column ({error}); write the dataset again"
        ) from error
    return Table(rows=rows, files=tuple(paths), counts=tuple(len(table) for table in tables))


def read_batches(path: Path, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    """The given columns of a parquet file, at most `size` rows at a time; for what does not fit into memory.

    Raises:
        DatasetError: the file, or a row of it, cannot be read.
    """
    row = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=size, columns=list(columns)):
            yield batch
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, columns[-1], row, error) from error


def _damaged(path: Path, column: str, row: int, error: Exception) -> DatasetError:
    reason = " ".join(str(error).split())
    return DatasetError(f"{path}: {column} cannot be read from row {row} on ({reason}); copy or write the dataset again")


def _unreadable(path: Path, file: pq.ParquetFile, columns: Sequence[str], error: Exception) -> DatasetError:
    """Why a file with a good footer cannot be read. Arrow itself fails on a missing row among lists of fixed length."""
    column, row = next((name, at) for name in columns if (at := _first_unreadable(file, name)) is not None)
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    missing = sum(c.statistics.null_count or 0 for c in chunks if c.path_in_schema.startswith(f"{column}.") and c.statistics)
    if not missing:
        return _damaged(path, column, row, error)
    place = f"in {path}, row {row}"
    if {"episode_index", "frame_index"} <= set(file.schema_arrow.names):
        indices = file.read(columns=["episode_index", "frame_index"])
        place = f"in episode {indices['episode_index'][row]}, frame {indices['frame_index'][row]}"
    return _missing(column, place, missing)


def _first_unreadable(file: pq.ParquetFile, column: str) -> int | None:
    row = 0
    try:
        for _ in file.iter_batches(batch_size=1, columns=[column]):
            row += 1
    except (pa.ArrowInvalid, OSError):
        return row
    return None


def numbers(column: pa.ChunkedArray, name: str, where: Where) -> NDArray[np.float64]:
    """A column of numbers `(rows,)`.

    Raises:
        DatasetError: not numbers, or one of them is missing (null) or not finite.
    """
    values = _floats(column, name)
    _refuse(~np.isfinite(values), values, name, "a number", where)
    return values


def whole_numbers(column: pa.ChunkedArray, name: str, where: Where) -> NDArray[np.int64]:
    """A column of whole numbers `(rows,)`; they may be stored as floats.

    Raises:
        DatasetError: not numbers, or one of them is missing (null) or not whole.
    """
    if pa.types.is_integer(column.type) and not column.null_count:
        exact: NDArray[np.int64] = column.to_numpy().astype(np.int64)
        return exact
    values = _floats(column, name)
    with np.errstate(invalid="ignore"):
        _refuse(~(values % 1 == 0), values, name, "a whole number", where)
    return values.astype(np.int64)


def vectors(column: pa.ChunkedArray, name: str, dims: int, where: Where) -> NDArray[np.float32]:
    """A column of vectors as `(rows, dims)`: lists, lists of lists in row-major order, or, for one dimension, plain numbers.

    Raises:
        DatasetError: no numbers, a row or a value is missing (null), or a row does not have `dims` values.
    """
    array: Any = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.float32())
    rows, levels = len(array), list[NDArray[np.int64]]()
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if array.null_count:
            places = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
            bad = np.unique(_rows_of(places, levels))
            raise _missing(name, where(int(bad[0])), len(bad))
        if not pa.types.is_nested(array.type):
            break
        if not hasattr(array, "flatten") or pa.types.is_struct(array.type):
            raise _no_numbers(name, column.type)
        levels.append(pc.list_value_length(array).to_numpy().astype(np.int64))
        array = array.flatten()
    if not _is_number(array.type) and len(array):
        raise _no_numbers(name, column.type)
    counts = _counts(levels, rows)
    if (wrong := np.flatnonzero(counts != dims)).size:
        raise DatasetError(
            f"{name} has {counts[wrong[0]]} values {where(int(wrong[0]))} ({len(wrong)} frames in all), info.json announces "
            f"{dims}; remove or record these episodes again"
        )
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
        return np.asarray(array.to_numpy(zero_copy_only=False)).astype(np.float32).reshape(rows, dims)


def frame_order(root: Path, table: Table, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows in the order of their column `index`, which numbers the frames of all files from 0.

    Raises:
        DatasetError: a frame is missing or comes twice; names the first and where it lies.
    """
    order = np.argsort(index, kind="stable")
    wrong = np.flatnonzero(index[order] != np.arange(len(index)))
    if not len(wrong):
        return order
    at, number = int(wrong[0]), int(index[order[wrong[0]]])
    if at and number == index[order[at - 1]]:
        twice = f"{table.place(int(order[at - 1]))}, and {table.place(int(order[at]))}"
        raise DatasetError(
            f"dataset {root}: frame {number} (column index) comes twice, {twice}; remove the file that is not its own"
        )
    raise DatasetError(
        f"dataset {root}: frames are not numbered consecutively from 0 (column index): {number} stands where {at} should, "
        f"{table.place(int(order[at]))}; copy or write it again"
    )


def _counts(levels: Sequence[NDArray[np.int64]], rows: int) -> NDArray[np.int64]:
    """Values of each row, from the lengths of the lists of each level, the outer one first."""
    if not levels:
        return np.ones(rows, np.int64)
    counts = levels[-1]
    for lengths in reversed(levels[:-1]):
        before = np.concatenate(([0], np.cumsum(counts)))
        ends = np.cumsum(lengths)
        counts = before[ends] - before[ends - lengths]
    return counts


def _rows_of(places: NDArray[np.int64], levels: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Rows of the values at `places` of a column's flattened values."""
    for lengths in reversed(levels):
        places = np.searchsorted(np.cumsum(lengths), places, side="right")
    return places


def _floats(column: pa.ChunkedArray, name: str) -> NDArray[np.float64]:
    """Numbers, those that are missing as NaN."""
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if not _is_number(column.type):
        raise _no_numbers(name, column.type)
    return np.asarray(column.to_numpy(), np.float64)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _refuse(bad: NDArray[np.bool_], values: NDArray[np.float64], name: str, expected: str, where: Where) -> None:
    if not bad.any():
        return
    row, count = int(np.argmax(bad)), int(bad.sum())
    if np.isnan(values[row]):
        raise _missing(name, where(row), count)
    raise DatasetError(f"{name} is {values[row]:g} {where(row)} ({count} in all are like this), not {expected}; write it again")


def _missing(name: str, place: str, count: int) -> DatasetError:
    return DatasetError(
        f"{name} is missing (null or NaN) {place} ({count} in all are like this); remove or record these episodes again"
    )


def _no_numbers(name: str, kind: pa.DataType) -> DatasetError:
    return DatasetError(f"{name} holds {kind}, not numbers; write it as numbers, or name another feature with data.keys")
