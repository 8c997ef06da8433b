"""The one error that means: what the user gave cannot be used. Commands print it as one line and exit with code 2."""


class InputError(ValueError):
    """A file, setting or argument that cannot be used; the message names it and says what to do."""


def unreadable(path: object, what: str, error: OSError) -> InputError:
    """What to raise where a file (`what`: "scan", "poses", ...) is not there or cannot be read."""
    missing = isinstance(error, FileNotFoundError)
    reason = "does not exist" if missing else f"cannot be read ({error.strerror})"
    return InputError(f"{path}: the {what} file {reason}; check the path and the sequence folder")
