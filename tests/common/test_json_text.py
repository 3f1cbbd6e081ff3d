"""Records survive their files, and a file that holds something else is told by its place and field."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from libra_ray.common.files import read_jsonl, repair_jsonl
from libra_ray.common.json_text import ABSENT, Flat, dump, parse, plain, read
from libra_ray.runs.results import TrainingLog


@dataclass(frozen=True, kw_only=True)
class Point(Flat):
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Curve:
    points: Sequence[Point]
    bounds: tuple[float, float] | None = None
    by_n: Mapping[int, float] = field(default_factory=dict)
    note: str | None = field(default=None, metadata=ABSENT)


CURVE = Curve(points=[Point(step=1, metrics={"loss": 0.5, "lr": 0.1})], bounds=(0.0, 1.0), by_n={10: 0.25})
TEXT = {"points": [{"step": 1, "loss": 0.5, "lr": 0.1}], "bounds": [0.0, 1.0], "by_n": {"10": 0.25}}


def test_a_record_is_its_fields_and_comes_back_as_it_was():
    assert json.loads(dump(CURVE)) == TEXT
    assert parse(Curve, dump(CURVE), "here") == CURVE
    noted = Curve(points=[], note="seen")
    assert plain(noted) == {"points": [], "bounds": None, "by_n": {}, "note": "seen"}
    assert parse(Curve, dump(noted), "here") == noted


def test_a_file_of_another_version_is_read():
    """Fields that it lacks have their defaults; what it has beside is passed over."""
    assert parse(Curve, json.dumps({"points": [], "colour": "red"}), "here") == Curve(points=[])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"points": [{"loss": 1}]}, "points.0.step: Field required"),
        ({"points": [{"step": 1.5}]}, "points.0.step: Input should be a valid integer"),
        ({"points": [{"step": 1, "loss": "low"}]}, "points.0.metrics.loss: Input should be a valid number"),
        ({"points": "many"}, "points: Input should be a valid array"),
        ({"bounds": [0]}, "bounds.1: Field required"),
        ({"by_n": {"ten": 1}}, "by_n.ten"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_field(change, said, tmp_path):
    (tmp_path / "curve.json").write_text(json.dumps(TEXT | change))
    with pytest.raises(ValueError, match=r"curve\.json") as error:
        read(Curve, tmp_path / "curve.json")
    assert str(error.value).startswith(f"{tmp_path / 'curve.json'}: {said}")
    assert "\n" not in str(error.value)


def test_a_row_is_named_by_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n{"step": "two"}\n{"step": 3}\n{"st')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: step: Input should be a valid integer"):
        read_jsonl(tmp_path / "rows.jsonl", Point)
    with pytest.raises(ValueError, match=r"here: Invalid JSON"):
        parse(Point, '{"st', "here")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'{"step": "\xff"}\n', b"[" * 100_000 + b"\n"])
def test_a_file_that_is_no_text_is_named_too(content, tmp_path):
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.json: ") as error:
        read(Curve, path)
    assert "\n" not in str(error.value)
    if content.endswith(b"\n"):
        for rows in (partial(read_jsonl, path, Point), partial(TrainingLog.read, path)):
            path.write_bytes(content + b'{"step": 1}\n')
            with pytest.raises(ValueError, match=r"damaged\.json, line 1: "):
                rows()
        path.write_bytes(content + b"\xff")
        repair_jsonl(path)
        assert path.read_bytes() == content


def test_what_is_not_finite_becomes_null():
    assert plain({"a": (np.float32(1.5), math.nan, -math.inf), "b": np.arange(2)}) == {"a": [1.5, None, None], "b": [0, 1]}
    with pytest.raises(TypeError):
        plain({"a": object()})
