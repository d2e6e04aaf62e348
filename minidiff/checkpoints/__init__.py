"""Bytes and names of checkpoints: from a built-in name, a folder or a hub id to configs and tensors.

Reading order: `hub.py` (which files), `files.py` (what is in them), `keys.py` (what older files call it),
`load.py` (a model from it). Nothing here knows a model. Importing this package or `hub` doesn't import torch.
"""

from minidiff.checkpoints.errors import CheckpointError

__all__ = ["CheckpointError"]
