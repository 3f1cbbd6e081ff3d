"""Which files of a dataset's folder are the dataset's own: those that are named as `meta/info.json` says."""

import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from libra_ray.data.checks import DatasetError

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files of the dataset in `root`, each kind sorted.

    Attributes:
        data: the frames' numbers, and pictures where they are no videos; `episodes`: where the episodes lie; `videos`.
        video_path: how a video is named, from `video_key`, `chunk_index` and `file_index`.
        foreign: whatever else lies in the dataset's folders.
    """

    root: Path
    data: tuple[Path, ...] = ()
    episodes: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    video_path: str = VIDEO_PATH
    foreign: tuple[Path, ...] = ()

    @classmethod
    def of(cls, root: Path, info: dict[str, Any]) -> "Layout":
        """The files in the folders `data`, `meta/episodes` and `videos`.

        Raises:
            DatasetError: `info.json` names the files in a way that is none, or by what format 3 does not number.
        """
        data_path, video_path = _template(root, info, "data_path", DATA_PATH), _template(root, info, "video_path", VIDEO_PATH)
        patterns = {"data": data_path, "episodes": EPISODES_PATH, "videos": video_path}
        own: dict[str, list[Path]] = {kind: [] for kind in patterns}
        foreign: list[Path] = []
        compiled = {kind: _pattern(template) for kind, template in patterns.items()}
        for path in sorted(p for top in ("data", "meta/episodes", "videos") for p in (root / top).rglob("*") if p.is_file()):
            name = path.relative_to(root).as_posix()
            kind = next((kind for kind, pattern in compiled.items() if pattern.fullmatch(name)), None)
            (foreign if kind is None else own[kind]).append(path)
        return cls(
            root=root,
            data=tuple(own["data"]),
            episodes=tuple(own["episodes"]),
            videos=tuple(own["videos"]),
            video_path=video_path,
            foreign=tuple(foreign),
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """All of the dataset's own."""
        return self.data + self.episodes + self.videos

    def video(self, key: str, chunk: int, file: int) -> Path:
        """The video of camera `key` (its name in the dataset)."""
        return self.root / self.video_path.format(video_key=key, chunk_index=chunk, file_index=file)

    def notes(self) -> list[str]:
        """What lies in the folders and is not read, in one line."""
        if not self.foreign:
            return []
        names = [path.relative_to(self.root).as_posix() for path in self.foreign]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return [f"not read, for they are not named as the dataset's files are: {', '.join(names[:_NAMED])}{more}"]


def _template(root: Path, info: dict[str, Any], name: str, usual: str) -> str:
    """How `info.json` names files, by its entry `name`; as is usual where it does not say.

    Raises:
        DatasetError: it makes no names, or makes them of something else than `usual` does.
    """
    template = str(info.get(name) or usual)
    place = f"{root / 'meta' / 'info.json'}: {name} {template!r}"
    try:
        unknown = sorted(_fields(template) - _fields(usual))
        template.format_map(dict.fromkeys(unknown, 0) | {"video_key": "", "chunk_index": 0, "file_index": 0})
    except (ValueError, LookupError, AttributeError) as error:
        raise DatasetError(f"{place} is no pattern of file names, e.g. {usual}") from error
    if unknown:
        older = ", as format 2.1 does" if unknown[0].startswith("episode_") else ""
        raise DatasetError(f"{place} names files by {{{unknown[0]}}}{older}; format 3 does it as in {usual}: write it again")
    return template


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(template) if field is not None}


def _pattern(template: str) -> re.Pattern[str]:
    """What the names look like that `template` makes."""
    return re.compile("".join(re.escape(literal) + _field(field) for literal, field, _, _ in Formatter().parse(template)))


def _field(name: str | None) -> str:
    if name is None:
        return ""
    return r"\d+" if name.endswith("_index") else "[^/]+"
