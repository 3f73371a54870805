"""Read the tensors of a checkpoint as they are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open


def load(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, in float32."""
    return {name: x.float().numpy() for name, x in load_stored(folder).items()}


def load_stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, in the type it has there."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found
