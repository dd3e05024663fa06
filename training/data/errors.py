"""The error of everything that reads data."""


class DataError(ValueError):
    """Images that cannot be used; the message says which and why."""
