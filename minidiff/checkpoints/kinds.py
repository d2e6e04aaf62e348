"""What models there are in single files: how to tell them apart, and the configs that the files do not hold.

`recognise` looks at names and shapes alone. The configs are those of the published folders of the same
weights, where the key is not left at the default of its class. Nothing here imports torch.
"""

import re
from dataclasses import dataclass, field

from minidiff.checkpoints import ldm
from minidiff.checkpoints.errors import CheckpointError
from minidiff.config import DIFFUSERS_VERSION

FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # (channels, in_channels, 3, 3)
CONTEXT = re.compile(
    r"model\.diffusion_model\..+\.attn2\.to_k\.weight", re.DOTALL
)  # (channels, text channels)

_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
_UNET = {  # the rest are the class's defaults, which were made for Stable Diffusion 1
    "_class_name": "UNet2DConditionModel",
    "cross_attention_dim": 768,
    "sample_size": 64,
}
_UNET_2 = _UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_UNET_XL = _UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,  # 1280 of the whole text, 256 for each of six numbers
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
# The wrong ids of start, end and padding are the published ones: the end token 2 asks for the largest id.
_TEXT = {"_class_name": "CLIPTextModel", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_TEXT_L = _TEXT | {  # OpenAI's CLIP ViT-L/14
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
_TEXT_H = _TEXT | {  # OpenCLIP ViT-H/14 without its last layer
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
_TEXT_G = _TEXT | {  # OpenCLIP ViT-bigG/14
    "_class_name": "CLIPTextModelWithProjection",
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_PNDM = {"_class_name": "PNDMScheduler"} | _NOISE
_DDIM = {"_class_name": "DDIMScheduler"} | _NOISE
_EULER = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear"} | _NOISE
_EULER |= {"prediction_type": "epsilon", "sample_max_value": 1.0, "timestep_spacing": "leading"}
_EULER |= {"use_karras_sigmas": False}

_END = {"_class_name": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
_BANG = {"_class_name": "CLIPTokenizer", "pad_token": "!"}  # as OpenCLIP pads: with the id 0


@dataclass(frozen=True)
class Kind:
    """A model in words, its pipeline, the config of each part, and the plain values of the index."""

    title: str
    pipeline: str
    configs: dict
    options: dict = field(default_factory=lambda: {"requires_safety_checker": False})

    def index(self) -> dict:
        """The model_index.json of a folder with these parts."""
        index = {"_class_name": self.pipeline, "_diffusers_version": DIFFUSERS_VERSION} | self.options
        if "requires_safety_checker" in self.options:
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        for part, config in self.configs.items():
            library = "transformers" if part.startswith(("text_encoder", "tokenizer")) else "diffusers"
            index[part] = [library, config["_class_name"]]
        return index

    def changed(self, part, **values):
        """The same with other values in the config of one part."""
        configs = self.configs | {part: self.configs[part] | values}
        return Kind(self.title, self.pipeline, configs, self.options)


def _kind(title, pipeline, unet, text_encoder, tokenizer, scheduler, vae_size=512):
    vae = _VAE | {"sample_size": vae_size}
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    return Kind(title, pipeline, parts | {"scheduler": scheduler})


def _kind_xl(title, pipeline, unet):
    parts = {"vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025}}
    parts |= {"text_encoder": _TEXT_L, "text_encoder_2": _TEXT_G, "tokenizer": _END, "tokenizer_2": _BANG}
    options = {"force_zeros_for_empty_prompt": True}
    return Kind(title, pipeline, parts | {"unet": unet, "scheduler": _EULER}, options)


_INPAINTING = {"in_channels": 9}  # the latents, a mask, and the latents of what the mask leaves
# 2.0 and 2.1 for 768 x 768 predict v, those for 512 x 512 ("base") the noise
_UNET_2_V = _UNET_2 | {"sample_size": 96, "upcast_attention": True}
_DDIM_V = _DDIM | {"prediction_type": "v_prediction"}
_PNDM_2 = _PNDM | {"prediction_type": "epsilon"}
_SD, _SD_INPAINT = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline"
_XL, _XL_INPAINT = "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"

SD1 = _kind("Stable Diffusion 1", _SD, _UNET, _TEXT_L, _END, _PNDM)
SD1_INPAINTING = _kind(
    "Stable Diffusion 1 for inpainting", _SD_INPAINT, _UNET | _INPAINTING, _TEXT_L, _END, _DDIM, vae_size=256
)
SD2_V = _kind("Stable Diffusion 2", _SD, _UNET_2_V, _TEXT_H, _BANG, _DDIM_V, vae_size=768)
SD2_BASE = _kind("Stable Diffusion 2 base", _SD, _UNET_2, _TEXT_H, _BANG, _PNDM_2, vae_size=768)
SD2_INPAINTING = _kind(
    "Stable Diffusion 2 for inpainting", _SD_INPAINT, _UNET_2 | _INPAINTING, _TEXT_H, _BANG, _PNDM_2
)
SDXL = _kind_xl("Stable Diffusion XL", _XL, _UNET_XL)
SDXL_INPAINTING = _kind_xl("Stable Diffusion XL for inpainting", _XL_INPAINT, _UNET_XL | _INPAINTING)

KINDS = {  # (text channels, in_channels) of the U-Net
    (768, 4): SD1,
    (768, 9): SD1_INPAINTING,
    (1024, 4): SD2_V,
    (1024, 9): SD2_INPAINTING,
    (2048, 4): SDXL,
    (2048, 9): SDXL_INPAINTING,
}
NOT_HERE = {  # the same, for models that minidiff does not have
    (768, 8): "InstructPix2Pix",
    (1024, 5): "Stable Diffusion 2 for depth maps",
    (1024, 7): "Stable Diffusion's upscaler",
    (1280, 4): "the refiner of Stable Diffusion XL",
}


def recognise(shapes: dict, where, prediction_type: str | None = None) -> Kind:
    """The kind of model, from {name: shape} of all tensors in a file that holds a U-Net.

    prediction_type: "epsilon", "v_prediction" or "sample", where the caller knows it. No tensor tells Stable
    Diffusion 2's models for 512 x 512 ("base", epsilon) and 768 x 768 (v_prediction) apart: the latter is
    meant if None, as in diffusers. CheckpointError, beginning with where, for an unknown model.
    """
    contexts = [shape for name, shape in shapes.items() if CONTEXT.fullmatch(name)]
    if FIRST not in shapes or len(shapes[FIRST]) != 4 or not contexts or len(contexts[0]) != 2:
        raise CheckpointError(f"{where} holds no U-Net of Stable Diffusion: {ldm.explain(shapes)}")
    sizes = contexts[0][1], shapes[FIRST][1]
    if sizes in NOT_HERE:
        raise CheckpointError(f"{where} is {NOT_HERE[sizes]}, which minidiff does not have")
    if sizes not in KINDS:
        raise CheckpointError(
            f"{where} holds a U-Net for texts of {sizes[0]} channels and latents of {sizes[1]}; "
            "no such model is known. With config= (convert: --config), a folder in diffusers' layout, it can "
            "be described"
        )
    kind = KINDS[sizes]
    if kind is SD2_V and prediction_type == "epsilon":
        return SD2_BASE
    if sizes[0] == 2048 and "v_pred" in shapes:  # a mark that finetunes of XL carry
        kind = kind.changed(
            "scheduler", prediction_type="v_prediction", rescale_betas_zero_snr="ztsnr" in shapes
        )
    return kind if prediction_type is None else kind.changed("scheduler", prediction_type=prediction_type)
