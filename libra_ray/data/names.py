"""The dataset's features under the names that are used here, and the line to type where it calls them otherwise."""

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libra_ray.config.checks import renames_of
from libra_ray.data.checks import DatasetError
from libra_ray.types import ACTION_KEY, STATE_KEY

_BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
_LIKENESS = 0.5


@dataclass(frozen=True, kw_only=True)
class FeatureTable:
    """A dataset's feature table by the names used here.

    Attributes:
        table: feature name -> LeRobot's description of it.
        stored: of renamed features, the name in the dataset's files.
        notes: what a renaming hides, a line each.
    """

    table: dict[str, Any]
    stored: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def in_files(self, name: str) -> str:
        """A feature's name in the dataset's files."""
        return self.stored.get(name, name)


def renamed(root: Path, table: Mapping[str, Any], keys: Sequence[str]) -> FeatureTable:
    """The feature table after the renamings `NEW=OLD` of `data.keys`, with action and state in it.

    Raises:
        DatasetError: a feature to rename is not there, or there is no action or state; names the nearest and the line to type.
    """
    old_names = renames_of(keys)
    for old in old_names.values():
        if old not in table:
            near = difflib.get_close_matches(old, table, n=1, cutoff=_LIKENESS)
            raise DatasetError(
                f"data.keys={','.join(keys)}: dataset {root} has no feature {old!r}"
                f"{f', did you mean {near[0]}?' if near else ''}; it has {', '.join(table)}"
            )
    new_names = {old: new for new, old in old_names.items()}
    hidden = [name for name in old_names if name in table and name not in new_names]
    features = {new_names.get(name, name): feature for name, feature in table.items() if name not in hidden}
    if missing := [name for name in (ACTION_KEY, STATE_KEY) if name not in features]:
        raise _missing(root, features, missing, keys)
    notes = [f"the dataset's own feature {name} is left out: data.keys puts {old_names[name]} in its place" for name in hidden]
    return FeatureTable(table=features, stored=old_names, notes=notes)


def _missing(root: Path, features: Mapping[str, Any], missing: Sequence[str], keys: Sequence[str]) -> DatasetError:
    vectors = [name for name, feature in features.items() if _is_vector(name, feature)]
    pairs = [*keys, *(f"{name}={_nearest(name, vectors) or 'NAME'}" for name in missing)]
    return DatasetError(
        f"dataset {root} has no feature {' and no '.join(map(repr, missing))}; it has {', '.join(features)}; "
        f"if it has another name there, say which: --data.keys {shlex.quote(','.join(pairs))}"
    )


def _is_vector(name: str, feature: Mapping[str, Any]) -> bool:
    return name not in {*_BOOKKEEPING, ACTION_KEY, STATE_KEY} and re.match(r"float|u?int", str(feature["dtype"])) is not None


def _nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate whose last word is most like that of `name`."""
    wanted = _last_word(name)
    likeness = {c: difflib.SequenceMatcher(None, wanted, _last_word(c)).ratio() for c in candidates}
    best = max(likeness, key=likeness.__getitem__, default=None)
    return best if best is not None and likeness[best] >= _LIKENESS else None


def _last_word(name: str) -> str:
    return re.split(r"[./]", name)[-1]
