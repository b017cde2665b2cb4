"""The exception for mistakes that the user can correct, and helpers for its messages."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in a command, a config, a file or a data set that the user can correct.

    The message is one line. It names what is wrong (the flag, the key, the file or the image) and says what to do.
    Every tool prints it on stderr, without a traceback, and exits with code 1.
    """


def one_line(message: object) -> str:
    """Replace every run of white space in a message, including line breaks, by one space."""
    return " ".join(str(message).split())


def plural(count: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2 images"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def list_first(texts: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Join the first `most` texts, and say how many there are beyond them: "a, b, c and 2 more"."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out.

    For this torch raises a plain RuntimeError on a CPU ("DefaultCPUAllocator: can't allocate memory"), and so does
    cuBLAS ("CUBLAS_STATUS_ALLOC_FAILED").
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and ("allocate" in str(error) or "ALLOC_FAILED" in str(error))


def describe_os_error(error: OSError) -> str:
    """Return the operating system's text for an error ("No space left on device"), without path and number."""
    return error.strerror or one_line(error)
