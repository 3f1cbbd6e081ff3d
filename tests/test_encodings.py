"""Every text file is read and written as UTF-8, whatever the locale; what a terminal lacks ends no job."""

import ast
import os
import subprocess
import sys

import pytest

from tests.test_architecture import FILES, ROOT

LATIN_1 = "é in Latin-1, 抽屉 not"


def left_to_the_locale(source: str) -> list[str]:
    """Calls that open text, or a program's output as text, and do not say in which encoding."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        name = ast.unparse(call.func)
        last = name.split(".")[-1]
        words = [value.value for value in [*call.args, given.get("mode")] if isinstance(value, ast.Constant)]
        modes = [word for word in words if isinstance(word, str) and word and set(word) <= set("rwaxbt+")]
        is_text = (
            (last in ("read_text", "write_text") and "." in name)
            or (name == "open" and not any("b" in mode for mode in modes))
            or (
                last in ("open", "fdopen", "NamedTemporaryFile")
                and name != "av.open"
                and any("b" not in mode for mode in modes)
            )
            or any(isinstance(of := given.get(way), ast.Constant) and of.value for way in ("text", "universal_newlines"))
        )
        if is_text and "encoding" not in given:
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("module", FILES)
def test_every_text_file_has_an_encoding(module):
    assert left_to_the_locale(FILES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text()", "path.write_text(text)", "path.open('w')", "open(path)", "open(path, mode='a')",
        "tempfile.NamedTemporaryFile('w')", "subprocess.run(command, text=True)",
    ],
)  # fmt: skip
def test_the_checker_sees_a_planted_one(call):
    assert left_to_the_locale(call) == [ast.unparse(ast.parse(call))]


def test_the_checker_lets_the_others_pass():
    source = "path.read_text(encoding='utf-8')\npath.open('rb')\nopen(path, 'wb')\nRunFolder.open(root, config)\nport.open()"
    assert left_to_the_locale(source) == []


@pytest.mark.parametrize(
    ("ways", "encoding"),
    [
        ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, "ascii"),
        ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "PYTHONIOENCODING": "latin-1"}, "latin-1"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
        ({"PYTHONIOENCODING": "ascii"}, "ascii"),
        ({"LC_ALL": "C.UTF-8"}, "utf-8"),
    ],
)
def test_a_job_reads_writes_and_prints_under_any_locale(tmp_path, ways, encoding):
    """The job's own border, and in it what other libraries do: files without an encoding, names from the command line."""
    program = tmp_path / "job.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'jobs')!r})\n"
        "import arguments\n"
        "arguments.speak_utf8()\n"
        "from pathlib import Path\n"
        "name, text = sys.argv[1:]\n"
        "Path(name).write_text(text)\n"
        "print(Path(name).read_text())\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, program, tmp_path / "夹爪.txt", LATIN_1], env=kept | ways, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "夹爪.txt").read_bytes().decode("utf-8") == LATIN_1
    assert done.stdout.decode(encoding).strip() == LATIN_1.encode(encoding, "replace").decode(encoding)


def test_signs_that_a_terminal_lacks_do_not_end_a_job():
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "train.py", "debug", "--help"], env=env, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"usage: train.py" in done.stdout
