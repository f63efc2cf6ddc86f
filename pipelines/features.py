"""Chain: pictures -> features, spread over the cluster in chunks."""

import numpy as np
import torch

from pipelines.schedule import run_tasks
from udiff.evaluation.features import load_features


def extract_features(pictures: np.ndarray, *, name: str, size: int) -> torch.Tensor:
    """Extract one feature vector per picture: uint8 (n, height, width, 3) -> float32 (n, dim)."""
    chunks = np.array_split(pictures, max(1, len(pictures) // 500))
    parts = run_tasks(_extract, [(chunk, name, size) for chunk in chunks])
    return torch.from_numpy(np.concatenate(parts))


def _extract(pictures: np.ndarray, name: str, size: int) -> np.ndarray:
    extractor = load_features(name, size=size)
    # A copy: what comes out of Ray's object store is read-only.
    batches = torch.from_numpy(pictures.copy()).split(64)
    return torch.cat([extractor(batch).cpu() for batch in batches]).numpy()
