"""Where the tools are: on PATH, or where Debian keeps those of the administrator, which is not on a user's PATH."""

from __future__ import annotations

import os
import shutil

ADMIN_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def tool_path() -> str:
    """Return PATH with the administrator's folders at its end."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*folders, *(folder for folder in ADMIN_FOLDERS if folder not in folders)])


def find_tool(name: str) -> str | None:
    """Return the path of a tool, None where it is not installed."""
    return shutil.which(name, path=tool_path())


def tool_environment(**variables: str) -> dict[str, str]:
    """Return the environment to start a tool with, so that :func:`find_tool` and the start agree."""
    return {**os.environ, "PATH": tool_path(), **variables}
