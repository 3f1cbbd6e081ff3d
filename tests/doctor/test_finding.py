"""How findings are gathered and shown: nothing that a check does is a traceback, every fault has its fix beside it."""

import os
import time

import pytest

from libra_ray.doctor import aside
from libra_ray.doctor.finding import MARKS, Check, Finding, chosen, examined, outcome, page, summary

OK = Finding.ok("/home/robot")
BAD = Finding.blocker("nothing answers at RAY_ADDRESS=127.0.0.1:1", "unset RAY_ADDRESS")
LITTLE = Finding.warning("0.1 GB free", "docker run --shm-size=8g")


def explode():
    raise KeyError("a fault of ours\nwith a second line")


def seen_late():
    yield OK
    raise RuntimeError("it is gone; look again")


def test_a_check_that_raises_is_a_blocker_and_the_others_go_on():
    looks = {"first": lambda: "/home/robot", "second": explode, "third": lambda: [LITTLE, BAD], "fourth": seen_late}
    found = list(examined({name: Check(look=look, fix="mend it") for name, look in looks.items()}))
    assert [name for name, _ in found] == ["first", "second", "third", "third", "fourth"]
    (_, first), (_, second), *_, (_, last) = found
    assert first == OK
    assert (second.level, second.fix) == ("blocker", "mend it")
    assert "KeyError" in second.found
    assert last == Finding.blocker("it is gone", "look again")
    assert "\n" not in page("second", second).replace("\n" + " " * 20, " ")


def test_an_error_of_ours_is_parted_into_what_is_wrong_and_what_to_do():
    def refused(text):
        def look():
            raise ValueError(text)

        return outcome(Check(look=look, fix="look at it"))

    assert refused("folder x has; three faults;\nname another") == [
        Finding.blocker("folder x has; three faults", "name another"),
    ]
    assert refused("it is odd") == [Finding.blocker("it is odd", "look at it")]


def test_lines_are_aligned_and_the_fix_is_below():
    assert page("home", OK) == "ok    home          /home/robot"
    assert page("ray address", BAD).splitlines() == [
        "FAIL  ray address   nothing answers at RAY_ADDRESS=127.0.0.1:1",
        "                    fix: unset RAY_ADDRESS",
    ]
    assert page("shared memory", LITTLE).startswith("warn  shared memory 0.1 GB free\n")


def test_colour_only_where_asked_and_lines_as_wide_as_the_terminal():
    assert "\x1b" not in page("x", BAD)
    assert page("x", OK, colour=True).startswith("\x1b[32mok")
    assert page("x", LITTLE, colour=True).startswith("\x1b[33mwarn")
    assert page("x", BAD, colour=True).startswith("\x1b[31mFAIL")
    assert max(map(len, page("x", BAD, width=60).splitlines())) <= 60
    assert page("x", BAD, width=60).split() == page("x", BAD).split()


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        ([OK], "1 ok, 0 warnings, 0 blockers: everything is well"),
        ([OK, LITTLE], "1 ok, 1 warning, 0 blockers: jobs run"),
        ([BAD, LITTLE, BAD], "0 ok, 1 warning, 2 blockers: jobs end over what FAIL says"),
    ],
)
def test_the_last_line_counts(findings, words):
    assert summary(findings) == words
    assert len(set(MARKS.values())) == 3


def test_checks_are_chosen_by_name():
    checks = {"home": lambda: OK, "ports": lambda: LITTLE}
    assert list(chosen(checks, "")) == ["home", "ports"]
    assert list(chosen(checks, "ports, home")) == ["ports", "home"]
    with pytest.raises(ValueError, match="--only hme: no such check here; there are home, ports"):
        chosen(checks, "hme")


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (os.abort, [], "ended by SIGABRT"),
        (os._exit, [3], "ended with status 3"),
        (os.listdir, ["/no/such/folder"], "FileNotFoundError: .*/no/such/folder"),
        (os.kill, ["text", 1], "TypeError"),
    ],
    ids=["crashes", "ends", "fails", "misused"],
)
def test_what_happens_aside_is_one_line(function, arguments, words):
    with pytest.raises(aside.AsideError, match=words) as caught:
        aside.call(function, *arguments, limit_s=60)
    assert "\n" not in str(caught.value)


def test_what_hangs_is_ended():
    with pytest.raises(aside.AsideError, match=r"^no answer within 0\.5 s$"):
        aside.call(time.sleep, 600, limit_s=0.5)


def test_what_is_answered_aside_comes_back():
    assert aside.call(os.path.join, "a", "b", limit_s=60) == "a/b"


def test_what_libraries_print_is_no_answer(tmp_path, monkeypatch):
    (tmp_path / "talkative.py").write_text("print('loading')\n\ndef double(n):\n    print('doubling')\n    return 2 * n\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    import talkative

    assert aside.call(talkative.double, 4, limit_s=60) == 8
