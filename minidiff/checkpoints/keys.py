"""What older files call their tensors and what those are called here, and keys of configs that mean nothing.

A name is translated only where the model has a tensor of the new name and none of the old one, key by key:
one repository may hold both spellings (SD 1.5's VAE: old ones in float32, new ones in float16), and
`k_proj.key` elsewhere means itself.
"""

import re

OLD_ATTENTION = (  # of the VAE and of UNet2DModel until early 2023; the weights are (C, C) in both spellings
    (r"(.+)\.query\.(weight|bias)", r"\1.to_q.\2"),
    (r"(.+)\.key\.(weight|bias)", r"\1.to_k.\2"),
    (r"(.+)\.value\.(weight|bias)", r"\1.to_v.\2"),
    (r"(.+)\.proj_attn\.(weight|bias)", r"\1.to_out.0.\2"),
)
RENAMED = (
    *OLD_ATTENTION,
    # transformers 5 leaves the prefix out in CLIPTextModel; published files and its other classes have it.
    (r"(embeddings|encoder|final_layer_norm)\.(.+)", r"text_model.\1.\2"),
)

DROPPED = (
    r"(text_model\.)?embeddings\.position_ids",  # 0, 1, 2, ...: a constant that transformers saved until 4.31
)

# The other half of a whole CLIP (openai/clip-vit-large-patch14), of which a text encoder takes only its own.
WHOLE_CLIP = r"vision_model\..+|visual_projection\.weight|logit_scale"


# Keys of transformers' configs that change nothing in a text encoder's forward pass: provenance, how the
# weights were first drawn, and the options of text generation that old versions wrote into every config.
WITHOUT_INFLUENCE = frozenset(
    """
    architectures transformers_version use_bfloat16 torchscript tf_legacy_loss
    initializer_range initializer_factor dropout gradient_checkpointing pruned_heads tie_word_embeddings
    tie_encoder_decoder chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size tokenizer_class prefix finetuning_task task_specific_params problem_type
    id2label label2id sep_token_id decoder_start_token_id max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()  # noqa: SIM905
)


def translate(names, wanted) -> dict[str, str]:
    """{our name: the file's name} for all names of a file that are not dropped; wanted: the model's names.

    A name that no row fits keeps itself, so that the loader reports it.
    """
    names, wanted = set(names), set(wanted)
    dropped = [*DROPPED]
    if any(name.startswith("vision_model.") for name in names):
        dropped += [WHOLE_CLIP, r"text_projection\.weight"]
    kept = [n for n in names if n in wanted or not any(re.fullmatch(pattern, n) for pattern in dropped)]
    return {_ours(name, names, wanted): name for name in sorted(kept)}


def _ours(name, names, wanted):
    if name in wanted:
        return name
    for pattern, replacement in RENAMED:
        ours, count = re.subn(f"^{pattern}$", replacement, name)
        if count and ours in wanted and ours not in names:
            return ours
    return name
