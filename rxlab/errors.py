"""The errors rxlab raises: one clear line each.

Every message has the same order: *what failed, where, what was found, what was expected, what to do*. The command line
prints that one line and exits with the class's ``exit_code``; a traceback never reaches a user for a mistake of theirs.
"""

from __future__ import annotations


class RxlabError(Exception):
    """Base of all errors a user can cause or meet.

    Parameters
    ----------
    what : str
        What failed, in one clause.
    where : str, optional
        File and byte offset, event name or setting path.
    found, expected : str, optional
        What was there, and what would have been right.
    do : str, optional
        The next thing to do: a command, an option, a package.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: str | None = None,
        expected: str | None = None,
        do: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.expected, self.do = what, where, found, expected, do
        super().__init__(self.line())

    def line(self) -> str:
        """Return the error as one line, without newlines whatever the parts held."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        facts = [f"{word} {part}" for word, part in (("found", self.found), ("expected", self.expected)) if part]
        sentence = head + (": " + ", ".join(facts) if facts else "")
        if self.do:
            sentence += f". {self.do}"
        return " ".join(sentence.split())


class UsageError(RxlabError):
    """An argument that cannot be meant: exit status 2, as the shell expects of a usage error."""

    exit_code = 2


class FormatError(RxlabError):
    """A file is not what its name or magic says."""


class TruncatedFileError(FormatError):
    """A file stops before anything in it could be read. Files that stop later are salvaged, not refused."""


class MissingEventError(RxlabError):
    """A recording lacks an event, or a field of one, that a result needs."""


class MissingColumnError(MissingEventError, KeyError):
    """Columns lack one that is needed; a :class:`KeyError` as well, as of any mapping."""

    def __str__(self) -> str:
        return self.line()


class ClockError(RxlabError):
    """Two clocks cannot be put on one axis with a stated bound."""


class SchemaError(RxlabError):
    """A dataset or JSON file does not follow its schema, or follows a newer one."""


class HostSettingError(RxlabError):
    """A host setting could not be read, written, read back or restored."""


class WrongSettingError(UsageError, HostSettingError):
    """A key or value that no host could take: a mistake on the command line or in a spec, so exit status 2."""


class CaptureError(RxlabError):
    """A capture could not start, or did not record all it was asked for."""


class StoppedError(RxlabError):
    """Ctrl-C ended a recording: what is kept of it. Exit status 128 + SIGINT."""

    exit_code = 130


class RefusedError(RxlabError):
    """The result exists but is below its threshold, so no verdict is given: exit status 3."""

    exit_code = 3
