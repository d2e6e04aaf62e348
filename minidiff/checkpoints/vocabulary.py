"""The files of a tokenizer, without torch: vocabulary, merges and special tokens, in old and new layouts.

Published folders hold vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json and perhaps
added_tokens.json; transformers 5 writes all but a few settings into tokenizer.json. A special token is its
text, or a dict {"content": text, "normalized": bool, ...}.
"""

import functools
import gzip
import json
from pathlib import Path

from minidiff.checkpoints import hub, layout
from minidiff.checkpoints.errors import CheckpointError
from minidiff.config import write_json

DEFAULT_TOKENS = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
    ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"
)
MAX_LENGTH = 77  # CLIP's
CLIP_MERGES = Path(__file__).with_name("clip_merges.txt.gz")  # OpenAI's, MIT licence
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")


def read(name_or_path, subfolder=None, **source) -> dict:
    """CLIPTokenizer's arguments; name_or_path, source and errors as for hub.resolve."""
    paths = {path.name: path for path in hub.resolve(name_or_path, _needed, subfolder, **source)}
    config, special, added, whole = (layout.read_json(paths[n]) if n in paths else {} for n in SETTINGS)
    try:
        if "vocab.json" in paths:
            vocab, merges = layout.read_json(paths["vocab.json"]), read_merges(paths["merges.txt"])
        else:
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
            merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
        return {"vocab": vocab, "merges": merges} | _tokens(len(vocab), config, special, added, whole)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the tokenizer of {name_or_path} is damaged: {error!r}") from error


def clip(pad_token: str) -> dict:
    """CLIPTokenizer's arguments for CLIP's own vocabulary, which ships, and published special tokens.

    pad_token: "<|endoftext|>" in Stable Diffusion 1, "!" in 2.
    """
    vocab, merges = _clip_vocabulary()
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {role: {"content": text} | flags for role, text in DEFAULT_TOKENS.items()}
    return {"vocab": vocab, "merges": merges} | tokens | {"pad_token": pad_token}


@functools.cache
def _clip_vocabulary():
    """(vocabulary, merges): the ids count the symbols of the bytes, those that end a word, and the merges."""
    text = gzip.decompress(CLIP_MERGES.read_bytes()).decode("utf-8")
    merges = [line for line in text.split("\n") if line and not line.startswith("#version")]
    # GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def write(folder, vocab, merges, special, added, model_max_length):
    """Writes the published files; special {role: token}, added [token, ...]."""
    folder = Path(folder)
    layout.write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    layout.write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": model_max_length, "errors": "replace"}
    config |= {"do_lower_case": True, "add_prefix_space": False}
    files = {"special_tokens_map.json": special, "tokenizer_config.json": config | special}
    if added:
        files["added_tokens.json"] = {content(token): len(vocab) + i for i, token in enumerate(added)}
    for name, values in files.items():
        with layout.writing(folder / name):
            write_json(folder / name, values)


def content(token) -> str:
    """The text of a token that may be a dict with flags."""
    return token if isinstance(token, str) else token["content"]


def read_merges(path) -> list[str]:
    """The lines of a merges.txt, without its version."""
    lines = layout.read_text(path).replace("\r\n", "\n").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]


def check(vocab, merges):
    """CheckpointError unless the ids count up from 0 and every merge has its halves and its result there."""
    if not all(type(i) is int for i in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        raise CheckpointError("CLIPTokenizer: a vocabulary's ids must be 0, 1, 2, ..., each of them once")
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"CLIPTokenizer: the vocabulary lacks a part or the result of the merge {merge!r}"
            )


def _needed(names, where):
    """The files that read takes, of those in a tokenizer's folder."""
    needed = []
    if "vocab.json" in names or "tokenizer.json" not in names:
        needed = [hub.one_of(names, where, "vocab.json"), hub.one_of(names, where, "merges.txt")]
    return needed + [name for name in SETTINGS if name in names]


def _tokens(size, config, special, added, whole):
    """The special and the added tokens for a vocabulary of that size, from the files of SETTINGS."""
    # Files since 2023 list every token with its flags in the config, and special_tokens_map.json is obsolete.
    # Before, it wins over the config: SD 2's two disagree on the pad token.
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    tokens = {role: config.get(role) or text for role, text in DEFAULT_TOKENS.items()}
    if not listed:
        tokens |= {role: special[role] for role in DEFAULT_TOKENS if special.get(role)}
        listed = {token["id"]: token for token in whole.get("added_tokens", [])}
        listed |= {i: text for text, i in added.items()}
    flags = {token["content"]: token for token in listed.values() if isinstance(token, dict)}
    tokens = {role: flags.get(content(token), token) for role, token in tokens.items()}
    extra = {i: token for i, token in sorted(listed.items()) if i >= size}
    if list(extra) != list(range(size, size + len(extra))):
        raise CheckpointError(f"CLIPTokenizer: added tokens must follow the {size} ids, not be {list(extra)}")
    longest = config.get("model_max_length", MAX_LENGTH)
    if longest > 10**9:  # transformers writes 1e30 where it does not know
        longest = MAX_LENGTH
    return tokens | {"added_tokens": list(extra.values()), "model_max_length": longest}
