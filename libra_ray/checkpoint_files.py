"""What a checkpoint's folder says of itself, read without torch: enough to refuse one before anything starts."""

import json
from pathlib import Path

from libra_ray import config as configuration
from libra_ray.config import Config
from libra_ray.types import Json

FORMAT = 1
FILES = ("weights.safetensors", "config.json", "stats.json", "manifest.json")


def read_manifest_tree(folder: Path | str) -> Json:
    """The manifest as it is written.

    Raises:
        ValueError: the folder is not a checkpoint of this format.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is not a checkpoint: {', '.join(missing)} missing; give the folder that training wrote")
    try:
        tree: Json = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        written = tree["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error
    if written != FORMAT:
        raise ValueError(f"checkpoint {folder} has format {written}, this version reads format {FORMAT}")
    return tree


def damaged(folder: Path, error: Exception) -> ValueError:
    """The error of a manifest that is not as it was written."""
    return ValueError(f"checkpoint {folder} has a damaged manifest.json ({error}); train again or restore it")


def read_config(folder: Path | str) -> Config:
    """The configuration that a checkpoint was trained with, without loading weights.

    Raises:
        ValueError: the folder is not a checkpoint of this format.
    """
    read_manifest_tree(folder)
    return configuration.from_json((Path(folder) / "config.json").read_text(encoding="utf-8"))
