"""The one exception that means "the user can correct this"."""


class UserError(Exception):
    """A mistake in a command, a config, a file or a data set that the user can correct.

    The message is one line. It names what is wrong (the flag, the key, the file or the image) and says what to do.
    Every tool prints it on stderr, without a traceback, and exits with code 1.
    """


def one_line(message: object) -> str:
    """The message with every run of white space, line breaks among them, made one space."""
    return " ".join(str(message).split())


def plural(count: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def describe_os_error(error: OSError) -> str:
    """The operating system's own words for an error ("No space left on device"), without the path and the number."""
    return error.strerror or one_line(error)
