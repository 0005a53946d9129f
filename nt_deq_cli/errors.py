"""What ends a command with one line."""


class InputError(ValueError):
    """A flag or a file cannot be right. The message names it, its value, the bound, the remedy."""
