"""The one error that means: what the user gave cannot be used. Commands print it as one line and exit with code 2."""


class InputError(ValueError):
    """A file, setting or argument that cannot be used; the message names it and says what to do."""
