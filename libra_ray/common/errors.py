"""What to say of an error."""


def first_reason(error: BaseException) -> str:
    """What went wrong first, in one line: what broke off because of it says something else."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)
