"""CLIP's text half: CLIPTextModel turns 77 ids into the vectors that the U-Net looks at (B, 77, C).

Read `CLIPTextTransformer` from the bottom up. CLIP: Radford et al. 2021, arXiv 2103.00020. Module attributes are named
like the tensors of the published files (`text_model.encoder.layers.0.self_attn.q_proj.weight`).
"""

import torch
from torch import nn

from minidiff import ops
from minidiff.checkpoints.load import PretrainedModel

# Keys of transformers' configs that change nothing in a text encoder's forward pass: provenance, how the weights were
# first drawn, and the options of text generation that old versions wrote into every config.
_WITHOUT_INFLUENCE = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss
    initializer_range initializer_factor dropout gradient_checkpointing pruned_heads tie_word_embeddings
    tie_encoder_decoder chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size tokenizer_class prefix finetuning_task task_specific_params problem_type id2label label2id
    sep_token_id decoder_start_token_id max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
    """.split()
)


class TextOutput(dict):
    """The named results of a text encoder: out.name, out["name"] and, in the order of computation, out[0], out[-1].

    A result that was not asked for is absent from the dict and None as an attribute.
    """

    def __getattr__(self, name):
        if name in ("text_embeds", "last_hidden_state", "pooler_output", "hidden_states"):
            return self.get(name)
        raise AttributeError(f"a text encoder's output has no {name!r}, only {', '.join(self)}")

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        """The results without their names."""
        return tuple(self.values())


class _CLIPText(PretrainedModel):
    """What both text encoders share: the options and the parts. hidden_act is "quick_gelu" (SD 1) or "gelu" (SD 2).

    eos_token_id says where the pooled output is taken: at its first occurrence, or, for the 2 that older configs hold by
    mistake, at the largest id. bos_token_id and pad_token_id are recorded only: the tokenizer knows them.
    ValueError for an option or a value that is not implemented.
    """

    weights_name = "model.safetensors"
    fixed_options = {
        "attention_dropout": 0.0,
        "output_attentions": False,
        "output_hidden_states": False,
        "return_dict": True,
    }
    _projects = False

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        *,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        projection_dim: int = 512,
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
        pad_token_id: int = 1,
    ):
        super().__init__()
        self.text_model = CLIPTextTransformer(self.config)
        if self._projects:
            self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)
            nn.init.normal_(self.text_projection.weight, std=hidden_size**-0.5)

    @classmethod
    def _check_foreign(cls, foreign):
        super()._check_foreign({k: v for k, v in foreign.items() if k not in _WITHOUT_INFLUENCE})


class CLIPTextModel(_CLIPText):
    """The text encoder of Stable Diffusion 1 and 2, and the first one of SDXL; projection_dim is not used here."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, output_hidden_states=None):
        """input_ids: int (B, T), T <= max_position_embeddings -> last_hidden_state (B, T, C), pooler_output (B, C).

        attention_mask: (B, T), 0 for ids that nobody may look at. position_ids: int (B, T) or (1, T), 0 to T - 1 if None.
        With output_hidden_states, hidden_states holds layers + 1 entries (B, T, C), the embeddings first, none of them
        final-normed. ValueError for too many ids or another rank.
        """
        return self.text_model(input_ids, attention_mask, position_ids, output_hidden_states)


class CLIPTextModelWithProjection(_CLIPText):
    """The second text encoder of SDXL: the pooled output goes through one more matrix, to projection_dim channels."""

    _projects = True

    def forward(self, input_ids, attention_mask=None, position_ids=None, output_hidden_states=None):
        """As CLIPTextModel -> text_embeds (B, projection_dim), last_hidden_state (B, T, C) and, if asked, hidden_states."""
        out = self.text_model(input_ids, attention_mask, position_ids, output_hidden_states)
        pooled = out.pop("pooler_output")  # (B, C)
        return TextOutput({"text_embeds": self.text_projection(pooled)} | out)


class CLIPTextTransformer(nn.Module):
    """Embeddings, the encoder's layers, one last norm, and the vector at the end token (pooled)."""

    def __init__(self, config):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(
            config.vocab_size, config.max_position_embeddings, config.hidden_size
        )
        self.encoder = nn.Module()  # no work of its own, but its name stands in the files
        self.encoder.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids, attention_mask=None, position_ids=None, output_hidden_states=None):
        hidden_states = self.embeddings(input_ids, position_ids)  # (B, T, C)
        mask = causal_mask(input_ids, attention_mask)  # (1 or B, 1, T, T)
        every = [hidden_states]
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states, mask)
            every.append(hidden_states)
        last = self.final_layer_norm(hidden_states)
        out = TextOutput(last_hidden_state=last, pooler_output=self.pool(last, input_ids))
        if output_hidden_states:
            out["hidden_states"] = tuple(every)
        return out

    def pool(self, last_hidden_state, input_ids):
        """The vector at the end token: (B, T, C), (B, T) -> (B, C)."""
        # OpenAI's code takes the largest id, which is the end token in CLIP's vocabulary. Configs with the wrong end
        # token 2 rely on that; an id that was added later (textual inversion) would be larger, hence the other way.
        by_id = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).int()
        at = by_id.argmax(dim=-1)  # (B,): the first one if there are several
        return last_hidden_state[torch.arange(len(at), device=at.device), at]


class CLIPTextEmbeddings(nn.Module):
    """A learned vector for each id plus a learned vector for each position."""

    def __init__(self, vocab_size, max_positions, channels):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, channels)
        self.position_embedding = nn.Embedding(max_positions, channels)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids, position_ids=None):
        longest = self.position_embedding.num_embeddings
        if input_ids.ndim != 2 or input_ids.shape[1] > longest:
            raise ValueError(f"CLIPTextModel: input_ids must have the shape (batch, tokens) with at most {longest} tokens, "
                             f"not {tuple(input_ids.shape)}; tokenize with truncation=True.")  # fmt: skip
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)  # (B, T, C)


class CLIPEncoderLayer(nn.Module):
    """One layer with the norms in front of its two halves: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        channels, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(channels, eps=eps)
        self.self_attn = CLIPAttention(channels, config.num_attention_heads, depth=config.num_hidden_layers)
        self.layer_norm2 = nn.LayerNorm(channels, eps=eps)
        self.mlp = CLIPMLP(
            channels, config.intermediate_size, config.hidden_act, depth=config.num_hidden_layers
        )

    def forward(self, hidden_states, mask):
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), mask)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class CLIPAttention(nn.Module):
    """Multi-head self-attention with a mask, True where a token may look: (B, T, C), (1 or B, 1, T, T) -> (B, T, C)."""

    def __init__(self, channels, num_heads, depth):
        super().__init__()
        if channels % num_heads:
            raise ValueError(
                f"CLIPTextModel: hidden_size {channels} can't be split into {num_heads} attention heads."
            )
        self.num_heads, self.backend = num_heads, "torch"
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_linear(channels, channels) for _ in range(4))
        # the layers' outputs add up, so that each one starts smaller the more of them there are
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=(2 * depth * channels) ** -0.5)
        nn.init.normal_(self.out_proj.weight, std=channels**-0.5)

    def forward(self, hidden_states, mask):
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = ops.attention(q, k, v, mask=mask, backend=self.backend)  # (B, heads, T, D)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, T, C)


class CLIPMLP(nn.Module):
    """Two linear layers with an activation between them, on each token alone: (B, T, C) -> (B, T, C)."""

    def __init__(self, channels, inner_channels, hidden_act, depth):
        super().__init__()
        if hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"CLIPTextModel: hidden_act={hidden_act!r} is not implemented; it is one of {', '.join(_ACTIVATIONS)}."
            )
        self.activation = _ACTIVATIONS[hidden_act]
        self.fc1 = _linear(channels, inner_channels)
        self.fc2 = _linear(inner_channels, channels)
        nn.init.normal_(self.fc1.weight, std=(2 * channels) ** -0.5)
        nn.init.normal_(self.fc2.weight, std=(2 * depth * channels) ** -0.5)

    def forward(self, hidden_states):
        return self.fc2(self.activation(self.fc1(hidden_states)))


def causal_mask(input_ids, attention_mask=None):
    """True where a token may look: at itself and its predecessors, as far as attention_mask (B, T) is not 0 there.

    -> bool (1, 1, T, T), or (B, 1, T, T) with an attention_mask
    """
    length = input_ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[
        None, None
    ]  # (1, 1, T, T)
    if attention_mask is None:
        return mask
    return mask & (attention_mask != 0)[:, None, None, :]  # (B, 1, T, T)


def quick_gelu(x):
    """GELU by a sigmoid, as OpenAI trained CLIP (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.functional.gelu}


def _linear(channels, out_channels):
    """A linear layer whose bias starts at zero, as CLIP's do."""
    linear = nn.Linear(channels, out_channels)
    nn.init.zeros_(linear.bias)
    return linear
