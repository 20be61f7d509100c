"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""


class InputError(ValueError):
    """Something the user gave is wrong: a path, a file, a flag, a prompt.

    The message is one line that says what is wrong, where, and what would be right. Commands print it after
    `error: ` on stderr and exit with status 2; in the Python API it is an ordinary ValueError. What a message quotes
    may come from a file: whatever it is, the message stays one line of printable characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, most: int = 1000) -> str:
    """Text from outside as one line that a terminal only shows: white space run together, control characters written
    as escapes, and the middle left out where it is longer than `most` characters."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in " ".join(text.split())
    )
