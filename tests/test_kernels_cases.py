"""The registry of kernel cases: every shape that the real models show a kernel is in it, and no other one."""

import pytest
import torch
from minidiff_kernels import benchmarks, shapes
from minidiff_kernels.case import TARGETS
from minidiff_kernels.cases import CASES

import minidiff
from minidiff import ops
from minidiff.models.layers import Upsample2D
from minidiff.models.unet import GEGLU

CROSS, DOWN, UP = "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D"
UNETS = {  # as in the published configs
    "SD 1.5": {"cross_attention_dim": 768},
    "SD 2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (DOWN, CROSS, CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", UP),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


class Seen:
    """The shapes that ops and layers meet while a model without data runs: sets, as in shapes.py."""

    def __init__(self, monkeypatch):
        self.attention, self.group_norm, self.geglu, self.upsample_conv = set(), set(), set(), set()
        monkeypatch.setattr(ops, "attention", self._attend)
        monkeypatch.setattr(ops, "group_norm", self._normalize)

    def _attend(self, q, k, v, mask=None, backend="torch"):
        self.attention.add((*q.shape[:3], *k.shape[2:]))
        return torch.empty_like(q)

    def _normalize(self, x, num_groups, weight, bias, eps, silu=False, *_):
        assert num_groups == 32
        self.group_norm.add((*x.shape, silu))
        return torch.empty_like(x)

    def watch(self, model):
        for layer in model.modules():
            if isinstance(layer, GEGLU):
                layer.register_forward_hook(self._gate)
            if isinstance(layer, Upsample2D):
                layer.register_forward_hook(self._enlarge)
        return model

    def _gate(self, layer, inputs, output):
        self.geglu.add((inputs[0].shape[:-1].numel(), inputs[0].shape[-1], output.shape[-1]))

    def _enlarge(self, layer, inputs, output):
        assert output.shape[2:] == (2 * inputs[0].shape[2], 2 * inputs[0].shape[3])
        self.upsample_conv.add(tuple(inputs[0].shape))

    def tables(self):
        return self.attention, self.group_norm, self.geglu, self.upsample_conv


def registered(model):
    """The entries of shapes.py that say that they occur in the model, as the four sets of Seen."""
    tables = shapes.ATTENTION, shapes.GROUP_NORM, shapes.GEGLU, shapes.UPSAMPLE_CONV
    return tuple({shape for shape, where in table.items() if f"{model} " in where} for table in tables)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("model", UNETS)
def test_the_registry_has_the_shapes_of_a_unet(model, monkeypatch):
    seen, config = Seen(monkeypatch), UNETS[model]
    with torch.device("meta"):
        unet = seen.watch(minidiff.UNet2DConditionModel(**config))
        for side in (picture // 8 for picture in shapes.SIDES[model]):
            for batch in shapes.BATCHES:
                added = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
                text = torch.empty(batch, shapes.TEXT, config["cross_attention_dim"])
                sample, t = torch.empty(batch, 4, side, side), torch.empty(batch)
                unet(sample, t, text, added_cond_kwargs=added if model == "SDXL" else None)
    assert seen.tables() == registered(f"{model} U-Net")


@torch.no_grad()
def test_the_registry_has_the_shapes_of_the_vae(monkeypatch):
    seen = Seen(monkeypatch)
    with torch.device("meta"):
        vae = seen.watch(minidiff.AutoencoderKL(**VAE))
        for side in shapes.SIDES["VAE"]:
            for batch in shapes.BATCHES:
                vae.encoder(torch.empty(batch, 3, side, side))
                vae.decoder(torch.empty(batch, 4, side // 8, side // 8))
    assert seen.tables() == registered("VAE")


def test_every_shape_of_the_models_has_a_case_in_float16():
    found = {}
    for case in (case for case in CASES if case.run is not None and case.dtype == "fp16"):
        silu = (not case.name.startswith("groupnorm/"),) if case.op == "group_norm" else ()
        found.setdefault(case.op, set()).add((*case.shape, *silu))
    assert set(shapes.ATTENTION) <= found["attention"]
    assert set(shapes.GROUP_NORM) <= found["group_norm"]
    assert set(shapes.GEGLU) <= {(m, k, n) for m, k, n in (s for s in found["geglu"] if len(s) == 3)}
    assert {(*shape, shape[1]) for shape in shapes.UPSAMPLE_CONV} <= found["upsample_conv"]


def test_cases_have_names_of_their_own_and_what_it_takes_to_compile_and_measure_them():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        given = set(case.signature) | set(case.constexprs)
        assert given <= set(case.kernel.arg_names) and set(case.aligned) <= set(case.signature), case.name
        assert all(case.configs_for(target) for target in case.targets), case.name
        if case.run is not None:
            assert case.make_inputs and case.tiny_inputs and case.reference, case.name
            assert case.flops > 0 and case.bytes > 0 and case.atol > 0, case.name


@pytest.mark.parametrize("start", ["attn/self/d40/", "attn/self/d80/", "attn/self/d160/", "attn/self/d512/",
                                   "attn/self/d64/", "attn/cross77/d40/", "groupnorm_silu/", "geglu/",
                                   "upsample_conv/"])  # fmt: skip
def test_the_cases_that_decide_are_there_for_every_target(start):
    found = [case for case in CASES if case.name.startswith(start)]
    assert found and all(set(case.targets) == set(TARGETS) for case in found)


@pytest.mark.slow
def test_every_way_through_the_kernels_is_right_beside_pytorch(capsys):
    assert benchmarks.main(["--dry-run"]) == 0, capsys.readouterr().out
    assert ", 0 of them wrong: -" in capsys.readouterr().out
