"""The one error for everything that can be wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A fault of a checkpoint's folder, file or repository: names the file, what is wrong and what to do."""
