"""The one exception for wrong input, as opposed to an error in the code."""


class InputError(ValueError):
    """An error in the user's input: a path, a file, a flag or a prompt.

    The message is one line that says what is wrong, where, and what would be right. Commands print it after
    `error: ` on stderr and exit with status 2; in the Python API it is an ordinary ValueError. Text quoted from a
    file cannot break it: the message is always one line of printable characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, most: int = 1000) -> str:
    """Return text from outside as one printable line.

    White space is collapsed, control characters become escapes, and the middle of more than `most` characters is cut.
    """
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in " ".join(text.split())
    )
