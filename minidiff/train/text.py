"""Makes the miniature's tokenizer, and trains its CLIPTextModel to know what a caption says.

The encoder is trained first and then frozen, as Stable Diffusion's was: from the end token, and from every
padding token behind it, it must name all that the caption says. Trained together with the U-Net it was the
bottleneck.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from minidiff.config import write_json
from minidiff.models import CLIPTextModel
from minidiff.scenes import random_scene, tell, vocabulary_corpus, words
from minidiff.train.facts import FACTS, facts_of

LENGTH = 77  # ids of a prompt: CLIP's habit, so that everything that holds for Stable Diffusion holds here
WIDTH = 128
BATCH = 64
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder) -> dict[str, int]:
    """Learns merges from captions and writes vocab.json, merges.txt and the two configs in CLIP's format; ->
    vocabulary.

    256 byte symbols, the same with </w>, one entry per merge, start and end: any text can be written.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(
        vocabulary_corpus(),
        trainers.BpeTrainer(
            vocab_size=2000, initial_alphabet=symbols, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    folder = Path(folder)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )
    special = {"content": END, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {
        "bos_token": special | {"content": START},
        "eos_token": special,
        "unk_token": special,
        "pad_token": END,
    }
    write_json(folder / "special_tokens_map.json", names)
    typed = {k: v | {"__type": "AddedToken"} if isinstance(v, dict) else v for k, v in names.items()}
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings | typed)
    return vocabulary


def caption_ids(captions: list[str], vocabulary) -> torch.Tensor:
    """int64 (B, 77) ids of captions, padded with the end token. Each word of the little world is one token;
    the tokenizer that ships gives the same ids, and a test compares them.
    """
    ids = torch.full((len(captions), LENGTH), vocabulary[END])
    for row, text in zip(ids, captions, strict=True):
        numbers = [vocabulary[START], *(vocabulary[word + "</w>"] for word in text.split())]
        row[: len(numbers)] = torch.tensor(numbers)
    return ids


def new_text_encoder(vocabulary) -> CLIPTextModel:
    """The untrained encoder for this vocabulary."""
    model = CLIPTextModel(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=WIDTH,
        bos_token_id=vocabulary[START], eos_token_id=vocabulary[END], pad_token_id=vocabulary[END],
    )  # fmt: skip
    for name, weight in model.named_parameters():  # CLIP's own start (Radford et al. 2021, its released code)
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.02 if "embedding" in name else weight.shape[1] ** -0.5)
            if name.endswith(("out_proj.weight", "fc2.weight")):
                weight.data *= 0.5
    return model


class FactHeads(nn.ModuleDict):
    """Names every fact from a vector (B, C): (B, classes) scores each."""

    def __init__(self, channels):
        super().__init__({name: nn.Linear(channels, len(classes)) for name, classes in FACTS.items()})

    def loss(self, vectors, facts) -> torch.Tensor:
        """Mean cross-entropy; facts (B, len(FACTS)) class numbers."""
        scores = (
            nn.functional.cross_entropy(head(vectors).float(), facts[:, i])
            for i, head in enumerate(self.values())
        )
        return sum(scores) / len(self)

    def best(self, vectors) -> torch.Tensor:
        """(B, len(FACTS)): the most likely class number of each fact."""
        return torch.stack([head(vectors).argmax(-1) for head in self.values()], dim=1)


def naming_loss(vocabulary):
    """The loss of one step as Trainer wants it, for nn.ModuleDict(encoder=, heads=)."""

    def loss_of(model, generator, step):
        texts, facts = told_batch(BATCH, np.random.default_rng([11, step]))
        ids = caption_ids(texts, vocabulary).to(model.encoder.device)
        hidden = model.encoder(ids).last_hidden_state  # (B, 77, C)
        ends = torch.tensor([len(t.split()) + 1 for t in texts])
        behind = (
            ends + (torch.rand(BATCH, generator=generator) * (LENGTH - ends)).long()
        )  # some padding token
        rows = torch.arange(BATCH)
        facts = facts.to(hidden.device)
        return model.heads.loss(hidden[rows, ends], facts) + model.heads.loss(hidden[rows, behind], facts)

    return loss_of


def told_batch(count, rng):
    """count loose captions and what they say: (list of str, int64 (count, len(FACTS)))."""
    tellings = [tell(random_scene(rng), rng) for _ in range(count)]
    return [words(t, rng) for t in tellings], torch.from_numpy(np.stack([facts_of(t) for t in tellings]))
