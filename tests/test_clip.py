"""The CLIP text encoders against transformers, called live with tiny random weights."""

import json

import pytest
import torch
import transformers
from parity import assert_close
from safetensors.torch import load_file, save_file

import minidiff
from minidiff import CheckpointError, CLIPTextModel, CLIPTextModelWithProjection

# 10 x the worst seen: 3e-15 in float64, 1.5e-6 in float32
TOLERANCE = {torch.float64: {"rtol": 0, "atol": 3e-14}, torch.float32: {"rtol": 0, "atol": 1.5e-5}}
END = 98
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 20,
    "bos_token_id": 97,
    "eos_token_id": END,
}
CLASSES = ["CLIPTextModel", "CLIPTextModelWithProjection"]


def twins(name, dtype=torch.float64, **options):
    """(minidiff's, transformers') text encoder with the same random weights."""
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(transformers.CLIPTextConfig(**SIZES | options)).to(dtype).eval()
    with torch.no_grad():
        for weight in theirs.parameters():  # norms start as 1 and 0, where a mix-up would not show
            weight.add_(0.1 * torch.randn_like(weight))
    ours = getattr(minidiff, name)(**SIZES | options).to(dtype).eval()
    weights = theirs.state_dict()
    ours.load_state_dict({k if k.startswith("text_") else f"text_model.{k}": v for k, v in weights.items()})
    return ours, theirs


def prompt_ids(batch=3, length=11):
    """Ids as of prompts of different lengths: the end token is the largest id and fills up the rest."""
    ids = torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))
    for row in range(batch):
        ids[row, 4 + 2 * row :] = END
    return ids


def assert_same(ours, theirs, dtype):
    assert list(ours) == list(theirs)
    for key in ours.keys() - {"hidden_states"}:
        assert_close(ours[key], theirs[key], **TOLERANCE[dtype])
    for mine, other in zip(ours.get("hidden_states", ()), theirs.get("hidden_states", ()), strict=True):
        assert_close(mine, other, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eos_token_id", [2, END])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_text_encoder_equals_transformers(name, hidden_act, eos_token_id, dtype):
    ours, theirs = twins(name, dtype, hidden_act=hidden_act, eos_token_id=eos_token_id)
    ids = prompt_ids()
    assert_same(ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True), dtype)
    assert_same(ours(ids), theirs(ids), dtype)


MASKS = {
    "end padded": torch.arange(11) < torch.tensor([[5], [8], [11]]),
    "hole": torch.arange(11) != torch.tensor([[2], [5], [10]]),
    "start hidden": torch.arange(11) >= torch.tensor([[1], [2], [0]]),  # the first rows may look nowhere
}


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CLASSES)
def test_an_attention_mask_hides_the_same_ids_as_in_transformers(name, mask, kind):
    ours, theirs = twins(name)
    ids, mask = prompt_ids(), MASKS[mask].to(kind)
    assert_same(ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask), torch.float64)


@pytest.mark.parametrize("rows", [1, 3])
def test_given_positions_are_used_as_in_transformers(rows):
    ours, theirs = twins("CLIPTextModel")
    positions = torch.stack([torch.randperm(16)[:11] for _ in range(rows)])
    assert_same(ours(prompt_ids(), None, positions), theirs(prompt_ids(), None, positions), torch.float64)


def test_later_ids_change_nothing_before_them():
    ours, _ = twins("CLIPTextModel")
    ids = prompt_ids()
    changed = ids.clone()
    changed[:, 6] = 1
    before, after = ours(ids)[0], ours(changed)[0]
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_results_have_names_and_places():
    ours, _ = twins("CLIPTextModel")
    out = ours(prompt_ids(), output_hidden_states=True)
    assert out[0] is out.last_hidden_state is out["last_hidden_state"]
    assert out[1] is out.pooler_output
    assert out[-1] is out.hidden_states
    assert len(out.hidden_states) == 4
    assert_close(ours.text_model.final_layer_norm(out.hidden_states[-1]), out.last_hidden_state)  # only there


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_backend_gives_the_same(backend):
    ours, theirs = twins("CLIPTextModel")
    minidiff.ops.use_backend(ours, attention=backend)
    assert {layer.backend for layer in ours.modules() if hasattr(layer, "backend")} == {backend}
    assert_same(ours(prompt_ids()), theirs(prompt_ids()), torch.float64)


def test_gradients_equal_transformers():
    ours, theirs = twins("CLIPTextModelWithProjection")
    for model in (ours, theirs):
        out = model(prompt_ids())
        (out.text_embeds.square().sum() + out.last_hidden_state.square().sum()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name], atol=1e-11, rtol=1e-11)


def test_training_works_under_bfloat16_autocast():
    ours, _ = twins("CLIPTextModel", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours.train()(prompt_ids(), MASKS["end padded"]).last_hidden_state
    assert out.dtype == torch.float32  # the last norm's
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_a_new_encoder_starts_with_the_spread_of_transformers(name):
    options = SIZES | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    ours = getattr(minidiff, name)(**options)
    theirs = getattr(transformers, name)(transformers.CLIPTextConfig(**options)).state_dict()
    expected = {k if k.startswith("text_") else f"text_model.{k}": v.std().item() for k, v in theirs.items()}
    found = {k: v.std().item() for k, v in ours.state_dict().items()}
    assert found == pytest.approx(expected, rel=0.2, abs=1e-7)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_weights_of_transformers_load_with_and_without_prefix(name, prefix, tmp_path):
    _, theirs = twins(name, torch.float32)
    theirs.save_pretrained(tmp_path)
    if prefix:  # as published, and as transformers wrote until version 5, with the constant positions
        weights = load_file(tmp_path / "model.safetensors")
        weights = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in weights.items()}
        weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        save_file(weights, tmp_path / "model.safetensors")
    ours = getattr(minidiff, name).from_pretrained(tmp_path)
    assert not ours.training
    assert_same(ours(prompt_ids()), theirs(prompt_ids()), torch.float32)


@pytest.mark.parametrize("name", CLASSES)
def test_what_we_save_loads_in_transformers(name, tmp_path):
    ours, _ = twins(name, torch.float32)
    ours.save_pretrained(tmp_path)
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours(prompt_ids()), theirs.eval()(prompt_ids()), torch.float32)
    assert theirs.config.eos_token_id == END


@pytest.mark.parametrize("name", CLASSES)
def test_a_whole_clip_gives_its_text_half(name, tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=SIZES, vision_config=vision, projection_dim=20)
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    ours = getattr(minidiff, name).from_pretrained(tmp_path)
    expected = whole.text_model(prompt_ids())
    assert_close(ours(prompt_ids()).last_hidden_state, expected.last_hidden_state, atol=1.5e-5)
    if name == "CLIPTextModelWithProjection":
        assert_close(
            ours(prompt_ids()).text_embeds, whole.text_projection(expected.pooler_output), atol=1.5e-5
        )


# a text encoder of the kind that transformers 4.2 wrote, with the options of text generation
PUBLISHED = json.loads("""{"_name_or_path": "openai/clip-vit-large-patch14", "architectures":
["CLIPTextModel"],
"add_cross_attention": false, "attention_dropout": 0.0, "bad_words_ids": null, "bos_token_id": 0,
"chunk_size_feed_forward": 0, "cross_attention_hidden_size": null, "decoder_start_token_id": null,
"diversity_penalty": 0.0, "do_sample": false, "dropout": 0.0, "early_stopping": false,
"encoder_no_repeat_ngram_size": 0, "eos_token_id": 2, "exponential_decay_length_penalty": null,
"finetuning_task": null, "forced_bos_token_id": null, "forced_eos_token_id": null, "hidden_act": "quick_gelu",
"hidden_size": 16, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0,
"initializer_range": 0.02, "intermediate_size": 24, "is_decoder": false, "is_encoder_decoder": false,
"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_eps": 1e-05, "length_penalty": 1.0, "max_length": 20,
"max_position_embeddings": 77, "min_length": 0, "model_type": "clip_text_model", "no_repeat_ngram_size": 0,
"num_attention_heads": 2, "num_beam_groups": 1, "num_beams": 1, "num_hidden_layers": 1,
"num_return_sequences": 1, "output_attentions": false, "output_hidden_states": false, "output_scores": false,
"pad_token_id": 1, "prefix": null, "problem_type": null, "projection_dim": 768, "pruned_heads": {},
"remove_invalid_values": false, "repetition_penalty": 1.0, "return_dict": true,
"return_dict_in_generate": false, "sep_token_id": null, "task_specific_params": null, "temperature": 1.0,
"tf_legacy_loss": false, "tie_encoder_decoder": false, "tie_word_embeddings": true, "tokenizer_class": null,
"top_k": 50, "top_p": 1.0, "torch_dtype": "float32", "torchscript": false,
"transformers_version": "4.22.0.dev0", "typical_p": 1.0, "use_bfloat16": false, "vocab_size": 50}""")


def test_a_config_with_the_options_of_text_generation_is_accepted():
    model = CLIPTextModel.from_config(PUBLISHED)
    assert model.config.eos_token_id == 2
    assert model.config.top_k == 50
    assert "torch_dtype" not in model.config
    assert CLIPTextModelWithProjection.from_config(model.config).config.hidden_size == 16


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not implemented"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not implemented"),
        ({"model_type": "bert"}, "model_type='bert' is not implemented"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not implemented; minidiff knows quick_gelu, gelu"),
        ({"num_attention_heads": 3}, "hidden_size 16 can't be split into 3 attention heads"),
        ({"rope_theta": 1}, "CLIPTextModel has no option rope_theta"),
    ],
)
def test_an_option_that_is_not_implemented_is_refused_by_name(option, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextModel.from_config(PUBLISHED | option)


@pytest.mark.parametrize("shape", [(1, 17), (5,), (1, 2, 3)])
def test_ids_of_a_wrong_shape_are_refused(shape):
    ours, _ = twins("CLIPTextModel")
    with pytest.raises(ValueError, match=r"at most 16 tokens, not .*truncation=True"):
        ours(torch.zeros(shape, dtype=torch.int64))


def test_an_encoder_without_projection_in_its_file_is_refused_where_one_is_needed(tmp_path):
    ours, _ = twins("CLIPTextModel", torch.float32)
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "_class_name": "CLIPTextModelWithProjection"
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"1 missing: text_projection\.weight$"):
        CLIPTextModelWithProjection.from_pretrained(tmp_path)
