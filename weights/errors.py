"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""


class InputError(ValueError):
    """Something the user gave is wrong: a path, a file, a flag, a prompt.

    The message is one line that says what is wrong, where, and what would be right. Commands print it after
    `error: ` on stderr and exit with status 2; in the Python API it is an ordinary ValueError.
    """
