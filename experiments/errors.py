"""What a launcher tells its user in one line instead of a traceback."""


class InputError(ValueError):
    """A flag or a file cannot be right. The message names it, its value, the bound, the remedy."""


class TrainingError(RuntimeError):
    """A computation left the range where it means something; the message names the remedy."""
