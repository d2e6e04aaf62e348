"""The text half of CLIP (Radford et al. 2021, arXiv 2103.00020): from a prompt to what the U-Net looks at.

`CLIPTokenizer` turns the prompt into 77 ids, `CLIPTextModel` the ids into (B, 77, C). Read the model from
`CLIPTextTransformer` on. Attributes are named as the tensors in published checkpoints.
"""

import warnings
from typing import ClassVar

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

from minidiff import ops
from minidiff.backends import Portable
from minidiff.checkpoints import CheckpointError, keys, layout, vocabulary
from minidiff.checkpoints.load import PretrainedModel
from minidiff.models.layers import Output
from minidiff.models.options import check_options


class _CLIPText(Portable, PretrainedModel):
    """What both text encoders share: the options and the parts.

    hidden_act is "quick_gelu" (SD 1, SDXL's first) or "gelu" (SD 2, SDXL's second). The pooled output is
    taken at the first eos_token_id, or, for the 2 that older configs hold by mistake, at the largest id.
    bos_token_id and pad_token_id are recorded only: the tokenizer knows them. ValueError for what is not
    implemented.
    """

    weights_name = "model.safetensors"
    fixed_options: ClassVar = {
        "model_type": "clip_text_model",  # by which transformers knows a config
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
        check_options(self)
        self.text_model = CLIPTextTransformer(self.config)
        if self._projects:
            self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)
            nn.init.normal_(self.text_projection.weight, std=hidden_size**-0.5)

    @classmethod
    def from_config(cls, config, **overrides):
        """As for all models; of a whole CLIP's config the text half, and without the weights' type."""
        if not isinstance(config, dict):
            return super().from_config(config, **overrides)  # refused there
        config = dict(config.get("text_config", config))
        for key in ("torch_dtype", "dtype"):
            config.pop(key, None)
        return super().from_config(config, **overrides)

    @classmethod
    def _check_foreign(cls, foreign):
        super()._check_foreign({k: v for k, v in foreign.items() if k not in keys.WITHOUT_INFLUENCE})


class CLIPTextModel(_CLIPText):
    """The text encoder of Stable Diffusion 1 and 2, and SDXL's first one; projection_dim is not used."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, output_hidden_states=None):
        """Ids (B, T), T <= max_position_embeddings -> last_hidden_state (B, T, C), pooler_output (B, C).

        attention_mask: (B, T), 0 for ids that nobody may look at. position_ids: (B, T) or (1, T), counting up
        from 0 if None. With output_hidden_states, hidden_states holds layers + 1 entries (B, T, C), the
        embeddings first, none of them final-normed. ValueError for too many ids or another rank.
        """
        return self.text_model(input_ids, attention_mask, position_ids, output_hidden_states)


class CLIPTextModelWithProjection(_CLIPText):
    """SDXL's second text encoder: one more matrix takes the pooled output to projection_dim channels."""

    _projects = True

    def forward(self, input_ids, attention_mask=None, position_ids=None, output_hidden_states=None):
        """As CLIPTextModel, with text_embeds (B, projection_dim) first and without pooler_output."""
        out = self.text_model(input_ids, attention_mask, position_ids, output_hidden_states)
        pooled = out.pop("pooler_output")  # (B, C)
        return Output({"text_embeds": self.text_projection(pooled)} | out)


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
        out = Output(last_hidden_state=last, pooler_output=self.pool(last, input_ids))
        if output_hidden_states:
            out["hidden_states"] = tuple(every)
        return out

    def pool(self, last_hidden_state, input_ids):
        """The vector at the end token: (B, T, C), (B, T) -> (B, C)."""
        # OpenAI's code takes the largest id, which is the end token in CLIP's vocabulary. Configs with the
        # wrong end token 2 rely on that; an id that was added later (textual inversion) would be larger,
        # hence the other way.
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
            raise ValueError(f"CLIPTextModel: input_ids must be (batch, tokens), at most {longest} tokens, "
                             f"not {tuple(input_ids.shape)}; tokenize with truncation=True")  # fmt: skip
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
    """Multi-head self-attention: (B, T, C), mask (1 or B, 1, T, T), True where one may look -> (B, T, C)."""

    op = "attention"  # which kind of backend it has, see backends.py

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
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(
                f"CLIPTextModel: hidden_act={hidden_act!r} is not implemented; minidiff knows {known}"
            )
        self.activation = _ACTIVATIONS[hidden_act]
        self.fc1 = _linear(channels, inner_channels)
        self.fc2 = _linear(inner_channels, channels)
        nn.init.normal_(self.fc1.weight, std=(2 * channels) ** -0.5)
        nn.init.normal_(self.fc2.weight, std=(2 * depth * channels) ** -0.5)

    def forward(self, hidden_states):
        return self.fc2(self.activation(self.fc1(hidden_states)))


def causal_mask(input_ids, attention_mask=None):
    """True where a token may look: at itself and what is before it, unless attention_mask (B, T) is 0 there.

    -> bool (1, 1, T, T), or (B, 1, T, T) with an attention_mask
    """
    length = input_ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device).tril()
    return mask if attention_mask is None else mask & (attention_mask != 0)[:, None, None, :]  # (B, 1, T, T)


def quick_gelu(x):
    """GELU by a sigmoid, as OpenAI trained CLIP (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.functional.gelu}


def _linear(channels, out_channels):
    """A linear layer whose bias starts at zero, as CLIP's do."""
    linear = nn.Linear(channels, out_channels)
    nn.init.zeros_(linear.bias)
    return linear


class Encoded(Output):
    """What the tokenizer returns: input_ids and attention_mask, as keys and as attributes."""

    def to(self, device):
        """The same with its tensors on device."""
        return Encoded({name: tensor.to(device) for name, tensor in self.items()})


class CLIPTokenizer:
    """Text -> ids by byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909), in CLIP's manner.

    vocab {token: id} and merges ["a b", ...], best first, or the paths of a vocab.json and a merges.txt: the
    symbols of the 256 bytes, the same with "</w>" at the end of a word, what the merges make of them, and the
    special tokens. A special token is its text or, as in tokenizer_config.json, a dict {"content": text,
    "normalized": bool}: if True, prompts may spell it in any letter case. Of roles that share a text the last
    in bos, eos, unk, pad decides. added_tokens: further ones, with the ids after the vocabulary's.
    CheckpointError for an inconsistent vocabulary.
    """

    def __init__(
        self,
        vocab,
        merges,
        *,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length: int = 77,
        added_tokens=(),
    ):
        self._vocab = dict(vocab) if isinstance(vocab, dict) else layout.read_json(vocab)
        self._merges = list(merges) if isinstance(merges, list | tuple) else vocabulary.read_merges(merges)
        special = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token}
        self._special = special | {"pad_token": pad_token}
        self._added = list(added_tokens)
        self.model_max_length = model_max_length
        vocabulary.check(self._vocab, self._merges)
        self.bos_token, self.bos_token_id = self._known("bos_token")
        self.eos_token, self.eos_token_id = self._known("eos_token")
        self.unk_token, self.unk_token_id = self._known("unk_token")
        self.pad_token, self.pad_token_id = self._known("pad_token")
        self.vocab_size = len(self._vocab)
        self._tokenizer = self._build()

    def _known(self, role):
        """The text and the id of a special token."""
        text = vocabulary.content(self._special[role])
        if text not in self._vocab:
            raise CheckpointError(f"CLIPTokenizer: the vocabulary lacks the {role} {text!r}")
        return text, self._vocab[text]

    def _build(self):
        """The steps of tokenizing, as in transformers 5: neither ftfy nor HTML entities are touched."""
        merges = [tuple(merge.split(" ")) for merge in self._merges]
        model = models.BPE(self._vocab, merges, unk_token=self.unk_token, end_of_word_suffix="</w>")
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        # a word is a run of letters, one digit, a run of signs, or an English ending; the rest is dropped
        words = Regex(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
        )
        split = pre_tokenizers.Split(words, behavior="removed", invert=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)  # UTF-8, each byte as a printable symbol
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        for token in self._special.values():  # one by one: of equal texts the last one counts
            tokenizer.add_special_tokens([_added_token(token, special=True)])
        tokenizer.add_tokens([_added_token(token) for token in self._added])
        ends = ((self.eos_token, self.eos_token_id), (self.bos_token, self.bos_token_id))
        tokenizer.post_processor = processors.RobertaProcessing(
            *ends, trim_offsets=False, add_prefix_space=False
        )
        return tokenizer

    def __call__(
        self,
        text: str | list[str],
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> Encoded:
        """Ids and attention_mask (0 where padded): lists for a str, nested lists for a list of them.

        padding: True or "longest" fills up to the longest text, "max_length" up to max_length, which is
        model_max_length if None. truncation: True cuts to max_length and keeps the end token, with a warning
        that names the words lost; None means True where a max_length is given without padding.
        return_tensors: "pt" or "np" for int64 (B, T), also for a single str. TypeError for what is no text;
        ValueError for an empty list, an unknown option, and texts of different lengths that should make a
        tensor.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"CLIPTokenizer needs a str or a list of str, not {text!r:.100}")
        if not texts:
            raise ValueError("CLIPTokenizer needs at least one text; the list is empty")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r} is not implemented; use None, 'pt' or 'np'")
        if truncation is None:
            truncation = max_length is not None and padding is False
        length = self.model_max_length if max_length is None else max_length
        self._set_truncation(truncation, length, least=2 if add_special_tokens else 0)
        self._set_padding(padding, length)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        self._warn_of_lost_words(encodings, length)
        ids, masks = [e.ids for e in encodings], [e.attention_mask for e in encodings]
        rows = {"input_ids": ids, "attention_mask": masks}
        if return_tensors is None:
            one = isinstance(text, str)
            return Encoded({name: values[0] if one else values for name, values in rows.items()})
        lengths = sorted({len(row) for row in ids})
        if len(lengths) > 1:
            raise ValueError(f"texts of {lengths} tokens make no tensor; pass padding=True")
        tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in rows.items()}  # (B, T)
        if return_tensors == "np":
            tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
        return Encoded(tensors)

    def _set_truncation(self, truncation, length, least):
        if truncation in (False, "do_not_truncate"):
            return self._tokenizer.no_truncation()
        if truncation not in (True, "longest_first"):
            raise ValueError(f"truncation={truncation!r} is not implemented; it is True or False")
        if length < least:
            raise ValueError(f"max_length={length} leaves no room for start and end; it is at least {least}")
        return self._tokenizer.enable_truncation(length)

    def _set_padding(self, padding, length):
        if padding in (False, "do_not_pad"):
            return self._tokenizer.no_padding()
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding={padding!r} is not implemented; use False, True or 'max_length'")
        fixed = length if padding == "max_length" else None
        return self._tokenizer.enable_padding(
            length=fixed, pad_id=self.pad_token_id, pad_token=self.pad_token
        )

    def _warn_of_lost_words(self, encodings, length):
        for encoding in encodings:
            lost = [i for piece in encoding.overflowing for i in piece.ids]
            words = self.decode(lost, skip_special_tokens=True)
            if words:
                warnings.warn(f"a text has more than {length} tokens; what is cut off: {words}", stacklevel=3)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        """The text of one id, or of a list, array or tensor of them (T,); in lower case, as the ids are."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        text = self._tokenizer.decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens)
        return text.replace("</w>", " ").strip()

    def batch_decode(self, ids, skip_special_tokens: bool = False) -> list[str]:
        """decode for each row of (B, T)."""
        return [self.decode(row, skip_special_tokens) for row in ids]

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, with "</w>" at the end of a word; without start and end."""
        return self.convert_ids_to_tokens(self(text, add_special_tokens=False).input_ids)

    def convert_ids_to_tokens(self, ids) -> list[str]:
        """The vocabulary's spelling of each id; None for an id that it does not have."""
        return [self._tokenizer.id_to_token(int(i)) for i in ids]

    def get_vocab(self) -> dict[str, int]:
        """{token: id}, added tokens included."""
        return self._tokenizer.get_vocab()

    def __len__(self):
        return self._tokenizer.get_vocab_size()

    @classmethod
    def from_pretrained(
        cls, name_or_path, subfolder=None, revision=None, cache_dir=None, local_files_only=False, token=None
    ):
        """The tokenizer of a checkpoint; the arguments and errors are those of checkpoints.hub.resolve."""
        source = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        files = vocabulary.read(name_or_path, subfolder, **source)
        try:
            return cls(**files)
        except (ValueError, TypeError) as error:
            where = f"{name_or_path}/{subfolder}" if subfolder else name_or_path
            raise CheckpointError(f"the tokenizer in {where}: {error}") from error

    def save_pretrained(self, save_directory):
        """Writes vocab.json, merges.txt and the rest, as published checkpoints have them."""
        files = (self._vocab, self._merges, self._special, self._added, self.model_max_length)
        vocabulary.write(save_directory, *files)


def _added_token(token, **flags) -> AddedToken:
    """A token for the tokenizers library, from its text or from a dict as tokenizer_config.json has them."""
    if isinstance(token, dict):
        known = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {flag: bool(token[flag]) for flag in known if flag in token} | flags
    return AddedToken(vocabulary.content(token), **flags)
