"""The command line that every job shares: a preset, dotted overrides, a run folder. Loads no engine, so `--help` is instant."""

import argparse
import difflib
import inspect
import io
import locale
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml

import libra_ray
from libra_ray.common.disk import explained
from libra_ray.config import PRESETS, Config, override, preset
from libra_ray.config.docstrings import docstrings
from libra_ray.config.overrides import flatten, flatten_mapping, leaf_types
from libra_ray.config.paths import PLACES, place
from libra_ray.model.registry import SYSTEMS, check_name

DEFAULT_PRESET = "quickstart"
_OWN_OPTIONS = ("--help", "--name", "--runs", "--fresh", "--config")
Options = Mapping[str, Mapping[str, Any]]
KINDS = {"model.system": "{" + ",".join([*SYSTEMS, "MODULE:CLASS"]) + "}"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What one job was asked to do.

    Attributes:
        config: the resolved configuration: preset, then `--config`, then the command line.
        run_dir: the folder everything of this run goes into, `<runs>/<name>`.
        fresh: whether earlier results of this run are moved aside first.
        stage: the job's name, e.g. `train`.
        more: the values of a job's own options.
    """

    run_dir: Path
    fresh: bool
    stage: str
    config: Config = field(default_factory=Config)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run_dir.name

    def prepare(self, *products: str, read: Mapping[str, Path] = MappingProxyType({})) -> Path:
        """Make the run folder, with `--fresh` after moving the earlier `products` in it (default: all of it) aside.

        What the job still has to read is not moved: where a setting names a place in there, the program ends.

        Args:
            products: names in the run folder.
            read: further places that the job reads, by what names them.

        Returns:
            The run folder.
        """
        if self.fresh:
            aside = [self.run_dir / product for product in products] or [self.run_dir]
            settings = flatten(self.config)
            named = {name: Path(settings[name]) for name in PLACES if settings[name]} | dict(read)
            for name, place in named.items():
                if any(place.resolve().is_relative_to(path.resolve()) for path in aside):
                    self.refuse(
                        f"{name}={place} lies in what --fresh puts aside; give another --name, or a copy of it elsewhere"
                    )
            for path in aside:
                if kept := set_aside(path):
                    print(f"{self.stage}: kept the earlier {path} as {kept}", flush=True)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        return self.run_dir

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """The border between a job and its user: what they did ends the program in one line, what we did with a traceback.

        What this package raised on purpose ends it as a mistake on the command line does, with status 2; so does a full disk,
        whoever noticed it. Ctrl-C ends it with status 130, after all that was opened has been closed; a second one at once.
        """
        before = signal.signal(signal.SIGINT, _interrupt)
        try:
            with explained(self.run_dir):
                yield
        except (ValueError, RuntimeError) as mistake:
            if not _on_purpose(mistake):
                raise
            self.refuse(mistake)
        except KeyboardInterrupt:
            again = "with --resume " if self.more.get("resume") is False else ""
            print(f"{self.stage}.py: interrupted; run the same command again {again}to continue", file=sys.stderr, flush=True)
            sys.exit(130)
        finally:
            signal.signal(signal.SIGINT, before)

    def refuse(self, message: object) -> NoReturn:
        """End the program as a mistake on the command line does: status 2 and one line on standard error."""
        JobParser(prog=f"{self.stage}.py").error(str(message))


def _on_purpose(mistake: Exception) -> bool:
    """Whether this package raised it as an answer to its user."""
    last = traceback.extract_tb(mistake.__traceback__)[-1]
    ours = Path(libra_ray.__file__).parent in Path(last.filename).parents
    # A library's error may seem raised here too, where its own code is no Python.
    return ours and (last.line or "").startswith("raise ")


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def set_aside(path: Path) -> Path | None:
    """Rename a file or folder to `<name>.old-1`, or the next free number, and return that; None where nothing was there."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return path.rename(target)


def parse(
    argv: Sequence[str] | None,
    description: str,
    *,
    stage: str,
    more: Options = MappingProxyType({}),
    default_name: Callable[[Config, Mapping[str, Any]], str] = lambda config, _: config.preset,
) -> Arguments:
    """Read a job's command line.

    A mistake ends the program with status 2 and one line on standard error that names what would have been valid.

    Args:
        argv: the arguments after the program's name; None takes those of this process.
        description: what the job does, shown by `--help`.
        stage: the job's name, e.g. `train` for `jobs/train.py`.
        more: options of this job alone, as `add_argument` takes them; a name without dashes is a position after PRESET.
        default_name: the run's name, from `config` and the values of `more`.
    """
    if argv is None:
        speak_utf8()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(description, stage, more)
    try:
        _refuse_unknown(argv, parser.prog, [*_OWN_OPTIONS, *(name for name in more if name.startswith("--"))])
        given = vars(parser.parse_intermixed_args(argv))
        config = _resolved(given)
    except ValueError as mistake:
        parser.error(str(mistake))
    if given["help"]:
        _parser(description, stage, more, shown=config).print_help()
        parser.exit()
    own = {option.lstrip("-").replace("-", "_"): given[option.lstrip("-").replace("-", "_")] for option in more}
    name = given["name"] or default_name(config, own)
    if not _NAME.fullmatch(name):
        parser.error(f"--name {name!r} is not a folder name; use letters, digits, dots, dashes and underscores")
    return Arguments(config=config, run_dir=given["runs"] / name, fresh=given["fresh"], stage=stage, more=own)


def speak_utf8() -> None:
    """Make this program read and write UTF-8 whatever the locale says, and never end because a terminal lacks a sign.

    Python decides on its start what files, names and libraries use, so a program under another locale is begun again, in
    Python's UTF-8 mode, which its workers inherit. The terminal keeps its own encoding; signs that it lacks become `?`.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:replace")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  (this very program)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class JobParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def _parser(description: str, stage: str, more: Options, shown: Config | None = None) -> JobParser:
    """The parser; `shown` is the configuration whose values `--help` gives as the present ones."""
    positions = "".join(f" {name.upper()}" for name in more if not name.startswith("--"))
    parser = JobParser(
        prog=f"{stage}.py",
        usage=f"%(prog)s [PRESET]{positions} [--name NAME] [--runs DIR] [--fresh] [--config FILE] [--SECTION.KEY VALUE ...]",
        description=description,
        epilog="Run again after an interruption, the same command continues where it stopped.",
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
    )
    presets = ", ".join(PRESETS)
    parser.add_argument("preset", nargs="?", metavar="PRESET", help=f"one of {presets} (default: {DEFAULT_PRESET})")
    for option, details in more.items():
        parser.add_argument(option, **details)
    parser.add_argument("-h", "--help", action="store_true", help="show this text, with the chosen preset's values, and exit")
    parser.add_argument("--name", help="name of the run (default: the preset's name)")
    parser.add_argument("--runs", metavar="DIR", type=place, default="runs", help="folder that holds the runs (default: runs)")
    parser.add_argument("--fresh", action="store_true", help="start over; earlier results are kept as NAME.old-1, .old-2, ...")
    parser.add_argument("--config", metavar="FILE", type=place, help="YAML of dotted or nested names, applied before options")
    _add_settings(parser, shown)
    return parser


def _add_settings(parser: argparse.ArgumentParser, shown: Config | None) -> None:
    values = flatten(shown) if shown else {}
    sections = typing.get_type_hints(Config)
    texts = docstrings(Config)
    groups: dict[str, Any] = {}
    for name, annotation in leaf_types(Config).items():
        section, dot, _ = name.partition(".")
        if not dot:
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(section, inspect.getdoc(sections[section]))
        text = " ".join([texts.get(name, ""), f"(default: {_shown(values.get(name))})"]).strip()
        groups[section].add_argument(
            f"--{name}", metavar=KINDS.get(name) or _kind(annotation), default=argparse.SUPPRESS, help=text.replace("%", "%%")
        )


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if get_origin(annotation) is tuple:
        return f"{_kind(get_args(annotation)[0])},..."
    return {bool: "{true,false}", int: "INT", float: "FLOAT"}.get(annotation, "TEXT")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value == "" else str(value)


def _refuse_unknown(argv: Sequence[str], prog: str, own: Sequence[str]) -> None:
    """Name the nearest valid names of an option that does not exist, before its value is mistaken for the preset.

    Raises:
        ValueError: an option is unknown.
    """
    settings = leaf_types(Config)
    for token, following in zip(argv, [*argv, ""][1:], strict=True):
        option, _, value = token.partition("=")
        name = option.removeprefix("--")
        if not name or name == option or option in own or ("." in name and name in settings):
            continue
        if name == "preset":
            raise ValueError(f"the preset is given without an option name, e.g. `{prog} {DEFAULT_PRESET}`")
        if "." not in name and (near := difflib.get_close_matches(option, own, n=1, cutoff=0.7)):
            raise ValueError(f"unknown option {option}; did you mean {near[0]}?")
        override(Config(), {name: value or following})


def _resolved(given: Mapping[str, Any]) -> Config:
    """Preset, then file, then command line."""
    changes = _file(given["config"]) if given["config"] else {}
    from_file = changes.pop("preset", None)
    config = preset(given["preset"] or str(from_file or DEFAULT_PRESET))
    config = override(override(config, changes), {name: value for name, value in given.items() if "." in name})
    check_name(config.model.system)
    return config


def _file(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as mistake:
        raise ValueError(f"--config {path}: {mistake.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as mistake:
        raise ValueError(f"--config {path} is not YAML in UTF-8: {mistake}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path} must hold names and values, such as `train.steps: 2000`")
    return flatten_mapping(tree)
