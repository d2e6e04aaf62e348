"""Bytes and names of checkpoints: from a built-in name, a folder or a hub id to configs and tensors.

Reading order: `hub.py` (from a name to files), `layout.py` (which of them, and what is believed), `files.py`
(the tensors), `keys.py` (older names), `load.py` (a model from all that), `vocabulary.py` (a tokenizer's
files). For single files in the original layout: `ldm.py` (its names), `kinds.py` (which model, with which
configs), `single_file.py`. Only `files.py`, `load.py` and `single_file.py` import torch.
"""

from minidiff.checkpoints.errors import CheckpointError

__all__ = ["CheckpointError"]
