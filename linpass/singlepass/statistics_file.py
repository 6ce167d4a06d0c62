"""Statistics on disk: one safetensors file, with what it is of in its header."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linpass.errors import InputError

VERSION = 1


def write_statistics(
    path: str | os.PathLike,
    kind: str,
    sizes: dict[str, Any],
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None,
) -> None:
    """Write to a sibling, flush it to the disk, then rename: no half file ever stands at ``path``."""
    about = {"kind": kind, "version": VERSION, **sizes}
    header = {"linpass": json.dumps(about), "metadata": json.dumps(metadata or {})}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, sibling, header)
        with open(sibling, "rb") as file:
            os.fsync(file.fileno())
        sibling.replace(path)
    finally:
        sibling.unlink(missing_ok=True)


def load_statistics(
    kind: type, path: str | os.PathLike, device: torch.device | str | None
) -> tuple[Any, dict[str, str]]:
    """An object of the class ``kind``, and the metadata, of a file that :func:`write_statistics` wrote.

    Raises:
        InputError: no file, no safetensors file, one of something else, of a later version, or one whose tensors do not
            fit each other. The message begins with the path.
    """
    try:
        sizes, state, metadata = _read(Path(path), kind.__name__)
        result = kind(**sizes, device=device)
        result.load_state_dict(state)
    except (InputError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {error}") from None
    return result, metadata


def _read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise InputError("no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise InputError(f"not a safetensors file, or cut short ({error})") from None
    if "linpass" not in header:
        raise InputError("holds no statistics of linpass")
    sizes = json.loads(header["linpass"])
    found, version = sizes.pop("kind", None), sizes.pop("version", None)
    if found != kind:
        raise InputError(f"holds {found}, not {kind}")
    if version != VERSION:
        raise InputError(f"version {version} of the file format; this linpass reads {VERSION}")
    return sizes, tensors, json.loads(header["metadata"])
