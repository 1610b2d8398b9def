"""The one kind of error that these commands explain instead of showing where it arose."""


class InputError(ValueError):
    """Something that the user can mend; the message says what and how."""
