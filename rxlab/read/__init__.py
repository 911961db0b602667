"""Files become columns."""
