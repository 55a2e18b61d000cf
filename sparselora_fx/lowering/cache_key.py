"""What compiled code depends on besides its graph, as a key for Inductor's cache."""

import hashlib
from pathlib import Path

from sparselora_fx.environment import check_bounds, disabled_layers
from sparselora_fx.lowering import measured

_PACKAGE = Path(__file__).parents[1]
# What ops become is decided in these folders, and by what those read outside them.
_FOLDERS = ("ir", "lowering")
_FILES = (
    "_torch.py",
    "environment.py",
    "compiler/checkpointing.py",
)


def key() -> str:
    """A hash of all that decides what our ops become: bodies, lowerings, templates, settings.

    Raises `CompileError` for a setting that cannot be read.
    """
    files = [_PACKAGE / name for name in _FILES]
    for folder in _FOLDERS:
        found = (_PACKAGE / folder).rglob("*.*")
        files += sorted(file for file in found if file.suffix in (".py", ".jinja"))
    settings = f"check_bounds={check_bounds()},{measured.key()},off={sorted(disabled_layers())}"
    digest = hashlib.sha256(settings.encode())
    for file in files:
        digest.update(
            file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0"
        )
    return f"sparselora_fx-{digest.hexdigest()}"
