"""from_pretrained and save_pretrained for a model class."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minidiff.checkpoints.errors import CheckpointError
from minidiff.config import Configured


class PretrainedModel(Configured, nn.Module):
    """Base of every model: a config, weights in safetensors, from_pretrained and save_pretrained."""

    config_name = "config.json"
    weights_name = "diffusion_pytorch_model.safetensors"

    @classmethod
    def _check_foreign(cls, foreign):
        unknown = sorted(key for key in foreign if not key.startswith("_"))
        if unknown:
            raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}")

    @classmethod
    def from_pretrained(cls, name_or_path, subfolder=None, *, torch_dtype=None):
        folder = Path(name_or_path, subfolder or "")
        if not (folder / cls.config_name).is_file():
            raise CheckpointError(f"{folder} has no {cls.config_name}")
        model = cls.from_config(json.loads((folder / cls.config_name).read_text()))
        model.load_state_dict(load_file(folder / cls.weights_name), strict=True)
        return model.to(torch_dtype).eval()

    def save_pretrained(self, save_directory):
        self.save_config(save_directory)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, Path(save_directory) / self.weights_name, metadata={"format": "pt"})

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
