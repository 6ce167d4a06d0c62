"""The folder that a command writes its measurements to."""

import os
from collections.abc import Sequence
from pathlib import Path

from linpass.errors import InputError


def check_result_folder(folder: Path, names: Sequence[str]) -> None:
    """Raise InputError when files of these names could not be written to ``folder``."""
    taken = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    blocked = [folder / name for name in names if (folder / name).is_dir()]
    if not taken.is_dir() or blocked:
        raise InputError(f"output_dir={str(folder)!r} must be a folder; {str([taken, *blocked][-1])!r} is in the way")
    if not os.access(taken, os.W_OK | os.X_OK):
        raise InputError(f"output_dir={str(folder)!r} must be writable")
