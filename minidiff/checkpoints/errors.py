"""The one error for everything that can be wrong with a checkpoint."""

MOST_CHARACTERS = 2000  # of a message: names and values in a stranger's file may have any length


class CheckpointError(ValueError):
    """A fault of a checkpoint's folder, file or repository: names the file, what is wrong and what to do.

    What is quoted from a file can't command a terminal: characters that do not print are spelled out.
    """

    def __init__(self, message: str):
        shown = message if len(message) <= MOST_CHARACTERS else f"{message[:MOST_CHARACTERS]}…"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in shown))
