"""What is not installed, and which extra of the package brings it, in one line."""

from importlib.util import find_spec


def needs(module: str, *, extra: str) -> None:
    """Refuse to go on without a module.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to type.
    """
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"{module} is not installed; pip install 'libra-ray[{extra}]'", name=module)
