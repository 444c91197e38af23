"""Numbers that say in a batch that there is nothing."""

IGNORE = -100
"""Label of a position that is no token."""

UNSEEN_SESSION = -1
"""Index of a session that was not trained on."""
