"""The errors that are written for the person who meets them."""


class MicrogptError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""
