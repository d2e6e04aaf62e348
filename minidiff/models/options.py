"""Whether a model's options can be meant: checked before a layer is built from them.

Configs come from strangers, and a layer of -32 groups or with an eps of infinity is built without complaint.
"""

import math
from numbers import Integral, Real

MOST = 2**31 - 1  # of anything counted


def _whole(least):
    return lambda value: _is(value, Integral) and least <= value <= MOST


def _is(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)


def _or_none(test):
    return lambda value: value is None or test(value)


_COUNT = "a whole number from 1"
_RULES = (  # what an option, or every entry of its list, must be: (test, in words, options)
    (_whole(1), _COUNT, "in_channels out_channels latent_channels block_out_channels layers_per_block "
     "norm_num_groups cross_attention_dim vocab_size hidden_size intermediate_size num_hidden_layers "
     "num_attention_heads max_position_embeddings projection_dim"),
    (_or_none(_whole(1)), f"{_COUNT}, or None", "attention_head_dim num_class_embeds time_cond_proj_dim "
     "addition_time_embed_dim projection_class_embeddings_input_dim num_train_timesteps sample_size"),
    (_whole(0), "a whole number from 0", "transformer_layers_per_block downsample_padding eos_token_id"),
    (lambda value: value is None or (isinstance(value, bool | int) and value in (0, 1)), "True or False",
     "flip_sin_to_cos center_input_sample use_linear_projection upcast_attention only_cross_attention "
     "add_attention force_upcast use_quant_conv use_post_quant_conv mid_block_add_attention"),
    (lambda value: _is(value, Real) and 0 < value < math.inf, "a positive number",
     "norm_eps layer_norm_eps mid_block_scale_factor scaling_factor"),
    (_or_none(lambda value: _is(value, Real) and math.isfinite(value)), "a finite number",
     "freq_shift shift_factor"),
    (lambda value: isinstance(value, str), "a text", "act_fn hidden_act down_block_types up_block_types"),
)  # fmt: skip
_RULE_OF = {name: (test, words) for test, words, names in _RULES for name in names.split()}
_LISTS = ("block_out_channels", "down_block_types", "up_block_types")


def check_options(model):
    """Raises ValueError for a value in model.config that is of another kind or size than its option's."""
    for name, value in model.config.items():
        test, words = _RULE_OF.get(name, (None, None))
        if test is None or name in model.fixed_options:
            continue
        is_list = isinstance(value, list | tuple)
        if name in _LISTS and not (is_list and value):
            raise ValueError(
                f"{type(model).__name__}: {name}={value!r:.80} is no list with one entry per level"
            )
        if not all(map(test, value if is_list else [value])):
            raise ValueError(
                f"{type(model).__name__}: {name}={value!r:.80} is not implemented; it must be {words}"
            )
