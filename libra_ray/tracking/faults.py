"""What goes wrong with a tracking store, in one line."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from alembic.util import CommandError
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from libra_ray.common.provenance import masked

LONGEST_CAUSE = 300
_FAULTS = (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError)


class TrackingError(RuntimeError):
    """The store cannot be used; the text is one line that names its address and the cause."""


@contextmanager
def in_one_line(uri: str, what: str = "") -> Iterator[None]:
    """Tell a fault of MLflow, its database, the network or the disk as one of the store.

    Args:
        uri: the store's address.
        what: in words, e.g. `does not answer`.

    Raises:
        TrackingError: the block failed so.
    """
    before = sys.exception()
    try:
        yield
    except _FAULTS as error:
        raise TrackingError(f"tracking.uri={masked(uri)} {what or 'cannot be used'}: {_cause(error, before)}") from error


def _cause(error: BaseException, before: BaseException | None) -> str:
    """What is at the bottom of an error, in one line; `before` was already being handled."""
    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper is not before:
        chain.append(deeper)
    deepest = next((link for link in reversed(chain) if isinstance(link, OSError | sqlite3.Error)), error)
    text = masked(" ".join(str(deepest).split())) or type(deepest).__name__
    return text if len(text) <= LONGEST_CAUSE else f"{text[:LONGEST_CAUSE]}…"
