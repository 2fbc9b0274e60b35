"""What ends a run, said in words that need no traceback."""


class RunFailed(RuntimeError):
    """A run cannot go on, and all ranks know it. The message says why, and the way out."""
