"""The Makefile: thin targets, and a setup that repairs a bare machine or says in one line what is missing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = dict(re.findall(r"^([a-z0-9-]+):.*?## (.+)$", MAKEFILE, re.MULTILINE))


class Machine:
    """A checkout on a machine where every tool that setup calls is a double that writes down how it was called."""

    def __init__(self, root: Path):
        self.checkout, self.bin, self.log = root / "checkout", root / "bin", root / "log"
        self.bin.mkdir(parents=True)
        self.log.touch()
        (self.checkout / "deploy").mkdir(parents=True)
        shutil.copy(ROOT / "Makefile", self.checkout)
        shutil.copy(ROOT / "deploy" / "setup.sh", self.checkout / "deploy")
        self.tool("uname", "echo Linux")
        self.tool("id", "echo 1000")
        self.tool("sudo", "exit 1")
        self.tool("uv", self.noting("uv"))
        self.tool("python3", "exit 1")
        self.tool("apt-get", self.noting("apt-get"))
        self.libraries("libOSMesa.so.8", "libEGL.so.1", "libGL.so.1")

    def noting(self, name: str) -> str:
        return f'echo "{name} $*" >> {self.log}'

    def tool(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def libraries(self, *names: str) -> None:
        self.tool("ldconfig", "\n".join(["true", *(f"echo '  {name} => /usr/lib/{name}'" for name in names)]))

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.checkout)}
        return subprocess.run(
            ["make", *arguments], cwd=self.checkout, env=environment, capture_output=True, text=True, check=False
        )

    @property
    def calls(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line != "uv cache dir"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


SYNC = "uv sync --quiet --locked --compile-bytecode"


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("quickstart", "uv run jobs/pipeline.py quickstart"),
        ("debug", "uv run jobs/pipeline.py debug"),
        ("test", "uv run pytest"),
    ],
)
def test_a_target_sets_up_and_runs_one_line(machine, target, line):
    done = machine.make(target)
    assert done.returncode == 0, done.stderr
    assert machine.calls == [SYNC, line]
    assert done.stdout.splitlines() == [line], "it shows the line a user could type"


def test_a_failing_line_fails_the_target(machine):
    machine.tool("uv", '[ "$1" != run ]')
    assert machine.make("test").returncode != 0


def test_help_lists_every_target(machine):
    phony = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert sorted(TARGETS) == sorted(phony)
    shown = machine.make("help").stdout
    assert [name for name, text in TARGETS.items() if not re.search(rf"^{name} +{re.escape(text)}$", shown, re.MULTILINE)] == []
    assert machine.make().stdout == shown


def test_every_target_is_one_line():
    recipes = re.findall(r"^[a-z0-9-]+:.*##.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    assert len(recipes) == len(TARGETS)
    assert {recipe.count("\n") for recipe in recipes} == {1}


def test_every_file_that_a_target_names_exists():
    named = re.findall(r"\b(?:jobs|tests|deploy)/[\w/]+\.(?:py|sh)", MAKEFILE)
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("broken", ["echo 'uv: command not found' >&2; exit 127", None])
def test_without_a_working_uv_one_is_installed_into_the_checkout(machine, broken):
    if broken:
        machine.tool("uv", broken)
    else:
        (machine.bin / "uv").unlink()
    pip = (
        'case "$*" in *--version) exit 0;; esac\n'
        f"{machine.noting('python3')}\n"
        f"mkdir -p .uv/bin && printf '#!/bin/sh\\necho \"uv $*\" >> {machine.log}\\n' > .uv/bin/uv && chmod +x .uv/bin/uv"
    )
    machine.tool("python3", pip)
    for _ in range(2):
        done = machine.make("test")
        assert done.returncode == 0, done.stderr
    installations = [call for call in machine.calls if call.startswith("python3 -m pip install")]
    assert len(installations) == 1, "the second time it is there"
    assert "--target .uv" in installations[0]
    assert machine.calls.count("uv run pytest") == 2


def test_without_pip_it_says_what_to_type(machine):
    (machine.bin / "uv").unlink()
    done = machine.make("test")
    assert done.returncode != 0
    assert "run: sudo apt-get install -y python3-pip" in done.stderr


def test_missing_libraries_are_installed_as_root(machine):
    machine.libraries()
    machine.tool("id", "echo 0")
    machine.tool(
        "apt-get", f'{machine.noting("apt-get")}; case "$*" in *libegl1*) cp {machine.bin}/full {machine.bin}/ldconfig;; esac'
    )
    machine.tool("full", "echo libEGL.so.1; echo libGL.so.1; echo libOSMesa.so.8")
    done = machine.make("setup")
    assert done.returncode == 0, done.stderr
    installed = " ".join(call for call in machine.calls if " install " in call)
    assert all(package in installed for package in ("libosmesa6", "libegl1", "libgl1"))


def test_missing_libraries_without_root_are_one_clear_error(machine):
    machine.libraries("libGL.so.1")
    done = machine.make("quickstart")
    assert done.returncode != 0
    assert "sudo apt-get install -y libosmesa6 libegl1" in done.stderr
    assert not any(call.startswith(("uv run", "apt-get")) for call in machine.calls)


def test_one_way_of_rendering_is_enough(machine):
    """Newer distributions no longer carry OSMesa."""
    machine.libraries("libEGL.so.1", "libGL.so.1")
    assert machine.make("setup").returncode == 0


def test_an_outdated_lock_stops_the_target(machine):
    machine.tool("uv", f'{machine.noting("uv")}; [ "$1" != sync ] || {{ echo "lockfile needs to be updated" >&2; exit 2; }}')
    done = machine.make("test")
    assert done.returncode != 0
    assert "lockfile" in done.stderr
    assert "uv run pytest" not in machine.calls


@pytest.mark.parametrize("path", [".ci/run", "deploy/setup.sh"])
def test_scripts_are_executable_and_parse(path):
    assert os.access(ROOT / path, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / path], check=True)


def test_ci_stops_at_the_first_failure(tmp_path):
    """Lint, types, tests in this order; what comes after a failed one is not run, and its status is CI's."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for tool in ("git", "python3", "chromium", "apt-get"):
        (tmp_path / "bin" / tool).symlink_to("/bin/true")
    make = tmp_path / "bin" / "make"
    for failing, ran in (
        ("none", ["lint", "types", "test"]),
        ("types", ["lint", "types"]),
        ("test", ["lint", "types", "test"]),
    ):
        make.write_text(f'#!/bin/sh\necho "$1"\n[ "$1" != {failing} ]\n')
        make.chmod(0o755)
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ran
        assert (done.returncode == 0) is (failing == "none")
