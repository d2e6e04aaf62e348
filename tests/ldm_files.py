"""Tiny random models in the original layout of single files, beside the same as folders for diffusers.

data/ldm.json.xz holds what is known of the published files: {"mapping": {"sd1", "sd2", "sdxl": [[name there,
part, name here, what happens], ...]}, "files": {file: {"mapping": …, "tensors": {name: [type, shape]}}},
"configs": {repository: {file: …}}}. The tiny models have as many levels and layers as the published ones, and
so the same names; here the mapping is read backwards.
"""

import json
import lzma
import struct
from pathlib import Path

import diffusers
import safetensors.torch
import torch
import transformers
from tiny_pipelines import BETAS, edit_json, shake, tiny_text_config, tiny_tokenizer, tiny_vae

DATA = json.loads(lzma.decompress(Path(__file__).with_name("data").joinpath("ldm.json.xz").read_bytes()))
MAPPING = {"sd1": "sd1", "sd1-inpainting": "sd1", "sd2": "sd2", "sdxl": "sdxl"}  # kind -> its mapping
PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sd1-inpainting": diffusers.StableDiffusionInpaintPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2}
LEVELS = {"block_out_channels": (4, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2}
ATTENTION = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]


def write_folder(folder, kind):
    """A tiny checkpoint of a kind in diffusers' layout, written by diffusers."""
    torch.manual_seed(0)
    parts = {"vae": _vae(kind), "unet": _unet(kind), "scheduler": _scheduler(kind)}
    (tokenizer, count), (padding, _) = tiny_tokenizer(), tiny_tokenizer(pad="!")
    layers = {"num_hidden_layers": 23 if kind == "sd2" else 12, "hidden_size": 16, "intermediate_size": 24}
    activation = {"hidden_act": "gelu" if kind == "sd2" else "quick_gelu"}
    parts["text_encoder"] = transformers.CLIPTextModel(tiny_text_config(count, **layers, **activation))
    tokenizers = {"tokenizer": padding if kind == "sd2" else tokenizer}
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if kind == "sdxl":
        second = {"num_hidden_layers": 32, "hidden_size": 24, "projection_dim": 16, "hidden_act": "gelu"}
        config = tiny_text_config(count, **layers | second)
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(config)
        tokenizers["tokenizer_2"], nothing = padding, {"add_watermarker": False}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            shake(part)
    PIPELINES[kind](**parts, **dict.fromkeys(tokenizers), **nothing).save_pretrained(folder)
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
        edit_json(folder / "model_index.json", **{name: ["transformers", "CLIPTokenizer"]})
    return folder


def _vae(kind):
    sizes = {"block_out_channels": (2, 4, 8, 8), "norm_num_groups": 2, "layers_per_block": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return tiny_vae(**sizes, **blocks, scaling_factor=0.13 if kind == "sdxl" else 0.18215)


def _unet(kind):
    options = LEVELS | {"sample_size": 8, "cross_attention_dim": 16, "attention_head_dim": 2}
    if kind == "sd1-inpainting":
        options |= {"in_channels": 9}
    if kind == "sd2":
        options |= {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
    if kind == "sdxl":
        options |= {
            "block_out_channels": (4, 8, 16), "cross_attention_dim": 40, "attention_head_dim": (1, 2, 4),
            "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }  # fmt: skip
    return diffusers.UNet2DConditionModel(**options)


def _scheduler(kind):
    noise = BETAS | {"steps_offset": 1}
    if kind == "sdxl":
        return diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **noise)
    if kind == "sd2":
        noise |= {"clip_sample": False, "set_alpha_to_one": False}
        return diffusers.DDIMScheduler(prediction_type="v_prediction", **noise)
    return diffusers.PNDMScheduler(skip_prk_steps=True, **noise)


def original_tensors(folder, kind, ema=False):
    """write_folder's tensors in the original layout; ema: and other weights as the U-Net's averages."""
    read = {}
    for path in folder.glob("*/*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        if path.parent.name == "text_encoder":  # transformers 5 leaves the prefix out
            tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
        read[path.parent.name] = tensors
    width = read["text_encoder"]["text_model.final_layer_norm.weight"].shape[0]
    made, thirds = {}, {}
    for there, part, here, what in DATA["mapping"][MAPPING[kind]]:
        if part is None:
            made[there] = torch.ones((width, width) if there.endswith("text_projection") else 3)
        elif here.endswith("position_ids"):
            made[there] = torch.arange(77)[None]
        elif what.startswith("rows"):
            thirds.setdefault(there, {})[int(what[5])] = read[part][here]
        elif what == "squeeze":
            made[there] = read[part][here][:, :, None, None]
        else:
            made[there] = read[part][here].T if what == "transpose" else read[part][here]
    made |= {there: torch.cat([rows[i] for i in range(3)]) for there, rows in thirds.items()}
    if ema:
        torch.manual_seed(1)
        for name in [name for name in made if name.startswith("model.diffusion_model.")]:
            average = "model_ema." + name.removeprefix("model.").replace(".", "")
            made[average] = torch.randn_like(made[name])
    return {name: made[name].contiguous() for name in made}


def write_single_file(path, tensors):
    """Writes tensors as .safetensors, or as training wrote them: a .ckpt with more beside the state_dict."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save({"epoch": 6, "global_step": 840_000, "state_dict": tensors}, path)
    return path


def write_sparse(path, manifest):
    """A safetensors file of {name: [type, shape]} in full size, whose zeros take no room on the disk."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in sorted(manifest.items(), key=lambda item: (-SIZES[item[1][0]], item[0])):
        start, end = end, end + SIZES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
