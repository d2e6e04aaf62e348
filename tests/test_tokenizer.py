"""CLIPTokenizer: the golden ids of OpenAI's vocabulary, and every option against transformers, called live.

data/clip_bpe.json.xz holds CLIP's 48,894 merges (MIT licence, OpenAI) and 390 prompts with the ids that
transformers 5.23 gives them: 360 with SD 1's special tokens, 30 with SD 2's, whose pad token is "!".
"""

import json
import lzma
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from minidiff import CheckpointError, CLIPTokenizer

DATA = Path(__file__).with_name("data")
START, END = "<|startoftext|>", "<|endoftext|>"


def flagged(text, normalized=True):
    return {"content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


# special tokens as in published folders: (tokenizer_config.json, special_tokens_map.json)
SD1 = {"bos_token": flagged(START), "eos_token": flagged(END), "unk_token": flagged(END), "pad_token": END}
SD2 = SD1 | {"pad_token": "!"}
FOLDERS = {
    "sd1": (SD1, SD1),
    "sd2": (SD1, SD2),
    "texts": ({}, dict.fromkeys(SD1, END) | {"bos_token": START}),
    "nothing": ({}, None),
    "listed": (
        {"pad_token": "!", "eos_token": END}
        | {"added_tokens_decoder": {"0": flagged("!"), "start": flagged(START, False), "end": flagged(END)}},
        SD1,
    ),
}
TINY = ["a c", "ac a", "aca t</w>", "d o", "do g</w>"]


def byte_symbols():
    """The 256 characters that stand for bytes: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def vocabulary(merges):
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def clip():
    return json.loads(lzma.decompress((DATA / "clip_bpe.json.xz").read_bytes()))


def write_folder(folder, name, merges):
    """A tokenizer's folder with the special tokens of FOLDERS[name]."""
    config, special = FOLDERS[name]
    vocab = vocabulary(merges)
    files = {"vocab.json": json.dumps(vocab), "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"} | config
    ids = {'"start"': f'"{vocab[START]}"', '"end"': f'"{vocab[END]}"'}
    files["tokenizer_config.json"] = re.sub(r'"start"|"end"', lambda m: ids[m[0]], json.dumps(config))
    if special is not None:
        files["special_tokens_map.json"] = json.dumps(special)
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        (folder / file).write_text(content, encoding="utf-8")


@pytest.fixture(scope="module")
def pair(clip, tmp_path_factory):
    """pair(name): (ours, transformers') with CLIP's vocabulary and the special tokens of FOLDERS[name]."""
    root, loaded = tmp_path_factory.mktemp("tokenizers"), {}

    def load(name):
        if name not in loaded:
            write_folder(root / name, name, clip["merges"].split("\n"))
            theirs = transformers.CLIPTokenizer.from_pretrained(root / name)
            loaded[name] = CLIPTokenizer.from_pretrained(root, name), theirs
        return loaded[name]

    return load


@pytest.fixture
def tiny():
    return CLIPTokenizer(vocabulary(TINY), TINY)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_every_golden_prompt_has_the_original_ids(clip, pair, name):
    ours, _ = pair(name)
    assert dict(zip(clip[name], ours(list(clip[name])).input_ids, strict=True)) == clip[name]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_cut_and_padded_golden_prompts_have_77_ids_with_the_end_token_last(clip, pair, name):
    ours, theirs = pair(name)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        cut = ours(list(clip[name]), padding="max_length", truncation=True)
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert dict(cut) == dict(theirs(list(clip[name]), **options))
    assert {len(ids) for ids in cut.input_ids} == {77}


SPELLINGS = [
    "a <|startoftext|> b", "a <|STARTOFTEXT|> b", "a<|endoftext|>b", "a <|EndOfText|> b",
    "wow! <|endoftext|>!!!", "", "   ", "İstanbul ǅ ﬁ ½ ² Σίσυφος ΣΑΣ", "e\u0301 e\u0301\u0302 \u1e9b\u0323",
    "日本語 中文 한국어 👩‍👩‍👧 🇩🇪", "it's I'LL don't we'Re",
    "x\u200by \ufeffz\u00a0w\u3000v \u0085u\u001ct", "1234 3.14 ٣٤ Ⅷ", "\x00\x07", "a" * 400, "&amp; <b>",
    "\ud7ff\U0010ffff",
]  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_and_odd_characters_become_what_transformers_makes_of_them(pair, name):
    ours, theirs = pair(name)
    assert ours(SPELLINGS).input_ids == theirs(SPELLINGS).input_ids
    for role in ("bos_token", "eos_token", "pad_token"):
        assert getattr(ours, role) == getattr(theirs, role)
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_id")


@pytest.mark.parametrize("name", FOLDERS)
def test_random_text_becomes_what_transformers_makes_of_it(pair, name):
    ours, theirs = pair(name)
    rng = np.random.default_rng(0)
    pools = [
        range(32, 127),
        range(0xA0, 0x250),
        range(0x300, 0x400),
        range(0x2000, 0x2100),
        range(0x1F300, 0x1F650),
    ]
    texts = [
        "".join(chr(rng.choice(pools[rng.integers(5)])) for _ in range(rng.integers(1, 60)))
        for _ in range(200)
    ]
    assert ours(texts).input_ids == theirs(texts).input_ids


@pytest.mark.parametrize("text", ["a cat", ["a cat"], ["a", "two small cats on a mat", ""]])
@pytest.mark.parametrize("padding", [False, True, "longest", "max_length", "do_not_pad"])
@pytest.mark.parametrize("truncation", [None, False, True, "longest_first"])
@pytest.mark.parametrize("max_length", [None, 4, 9])
@pytest.mark.filterwarnings("ignore:a text has more")
def test_padding_and_truncation_mean_what_they_mean_in_transformers(
    pair, text, padding, truncation, max_length
):
    options = {"padding": padding, "truncation": truncation, "max_length": max_length}
    for ours, theirs in (pair("sd1"), pair("sd2")):
        assert dict(ours(text, **options)) == dict(theirs(text, **options))


@pytest.mark.parametrize(("kind", "type_"), [("pt", torch.Tensor), ("np", np.ndarray)])
@pytest.mark.parametrize("text", ["a cat", ["a cat", "one more cat"]])
def test_tensors_are_int64_with_a_batch_axis(pair, text, kind, type_):
    ours, theirs = pair("sd1")
    got, expected = (t(text, padding=True, return_tensors=kind) for t in (ours, theirs))
    for key in ("input_ids", "attention_mask"):
        assert isinstance(got[key], type_)
        assert str(got[key].dtype).endswith("int64")
        assert got[key].tolist() == expected[key].tolist()


def test_the_result_has_attributes_and_moves_to_a_device(tiny):
    out = tiny("cat", return_tensors="pt").to("meta")
    assert out.input_ids is out["input_ids"]
    assert out.input_ids.is_meta
    with pytest.raises(AttributeError, match="no 'pixels'; it has input_ids, attention_mask"):
        out.pixels  # noqa: B018


def test_words_that_are_cut_off_are_named(tiny):
    with pytest.warns(UserWarning, match="more than 4 tokens; what is cut off: dog dog acat$"):
        ids = tiny("acat dog dog dog acat", max_length=4, truncation=True).input_ids
    assert ids == tiny("acat dog").input_ids


def test_nothing_is_said_where_nothing_is_cut(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny("acat dog", max_length=4, truncation=True, padding="max_length")


@pytest.mark.parametrize("skip", [False, True])
def test_decoding_equals_transformers(pair, skip):
    ours, theirs = pair("sd2")
    ids = ours(["A photo, of  cats!", "naïve 日本 👩‍👩‍👧 it's"], padding=True, return_tensors="pt").input_ids
    expected = theirs.batch_decode(ids, skip_special_tokens=skip)
    assert ours.batch_decode(ids, skip_special_tokens=skip) == expected
    assert ours.batch_decode(ids.numpy(), skip_special_tokens=skip) == expected
    assert [ours.decode(row, skip) for row in ids.tolist()] == expected
    assert ours.decode(320) == theirs.decode(320) == "a"


def test_tokens_show_where_words_end(tiny):
    assert tiny.tokenize("acat dogs") == ["acat</w>", "do", "g", "s</w>"]
    assert tiny.convert_ids_to_tokens(tiny("dog").input_ids) == [START, "dog</w>", END]
    assert len(tiny) == tiny.vocab_size == len(tiny.get_vocab()) == 2 * 256 + len(TINY) + 2


def test_a_vocabulary_of_our_own_splits_any_text_into_bytes_at_worst(tiny):
    ids = tiny("Zürich 日 \U0001f600").input_ids
    assert tiny.decode(ids, skip_special_tokens=True) == "zürich 日 \U0001f600"
    assert tiny("acat").input_ids == [tiny.bos_token_id, tiny.get_vocab()["acat</w>"], tiny.eos_token_id]


@pytest.fixture(params=FOLDERS)
def tiny_pair(request, tmp_path):
    """(ours, transformers') with a small vocabulary, for each entry of FOLDERS."""
    write_folder(tmp_path / "published", request.param, TINY)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "published")
    return CLIPTokenizer.from_pretrained(tmp_path / "published"), theirs


def test_what_is_saved_means_the_same_to_transformers_and_to_us(tiny_pair, tmp_path):
    ours, theirs = tiny_pair
    ours.save_pretrained(tmp_path)
    for again in (
        CLIPTokenizer.from_pretrained(tmp_path),
        transformers.CLIPTokenizer.from_pretrained(tmp_path),
    ):
        assert again(SPELLINGS).input_ids == theirs(SPELLINGS).input_ids
        assert again.model_max_length == 77
        assert again.pad_token_id == theirs.pad_token_id
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_transformers_saved_has_only_tokenizer_json_and_loads(tiny_pair, tmp_path):
    _, theirs = tiny_pair
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    expected = transformers.CLIPTokenizer.from_pretrained(tmp_path)(SPELLINGS).input_ids
    assert CLIPTokenizer.from_pretrained(tmp_path)(SPELLINGS).input_ids == expected


def test_added_tokens_get_the_ids_behind_the_vocabulary(tiny, tmp_path):
    more = CLIPTokenizer(vocabulary(TINY), TINY, added_tokens=["<dog-toy>", "acat"])
    size = more.vocab_size
    assert more("a <Dog-Toy> acat").input_ids[2:-1] == [size, size + 1]
    more.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<dog-toy>": size, "acat": size + 1}
    texts = ["a <dog-toy> <DOG-TOY>dog acat"]
    expected = more(texts).input_ids
    assert CLIPTokenizer.from_pretrained(tmp_path)(texts).input_ids == expected
    assert transformers.CLIPTokenizer.from_pretrained(tmp_path)(texts).input_ids == expected
    (tmp_path / "added_tokens.json").write_text('{"<dog-toy>": 9999}')
    with pytest.raises(CheckpointError, match="must follow the 519 ids"):
        CLIPTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t(None), TypeError, "needs a str or a list of str, not None"),
        (lambda t: t(["a", 3]), TypeError, "needs a str or a list of str"),
        (lambda t: t([]), ValueError, "at least one text"),
        (lambda t: t("a", return_tensors="tf"), ValueError, "return_tensors='tf' is not implemented"),
        (lambda t: t("a", padding="left"), ValueError, "padding='left' is not implemented"),
        (lambda t: t("a", truncation="only_first"), ValueError, "truncation='only_first' is not implemented"),
        (lambda t: t("a", truncation=True, max_length=1), ValueError, "max_length=1 leaves no room"),
        (
            lambda t: t(["a", "acat acat"], return_tensors="pt"),
            ValueError,
            r"texts of \[3, 4\] tokens make no tensor; pass padding",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(tiny, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny)


@pytest.mark.parametrize(
    ("vocab", "merges", "options", "message"),
    [
        ({"a": 0, "b": 2, END: 3, START: 1}, ["a b"], {}, "the merge 'a b'"),
        ({"a": 0, "b": 2}, [], {}, "must be 0, 1, 2"),
        ({"a": 0, "b": True}, [], {}, "must be 0, 1, 2"),
        ({"a": 0, "b": "1"}, [], {}, "must be 0, 1, 2"),
        ({"a": 0, END: 1}, [], {}, "lacks the bos_token '<|startoftext|>'"),
        ({"a": 0, END: 1, START: 2}, ["a"], {}, "the merge 'a'"),
        ({"a": 0, END: 1, START: 2}, [], {"pad_token": "!"}, "lacks the pad_token '!'"),
    ],
)
def test_an_inconsistent_vocabulary_is_refused(vocab, merges, options, message):
    with pytest.raises(CheckpointError, match=message.replace("|", r"\|")):
        CLIPTokenizer(vocab, merges, **options)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("merges.txt", None, "has no merges.txt"),
        ("vocab.json", None, "has no vocab.json"),
        ("vocab.json", "[1]", "must hold a JSON object"),
        ("vocab.json", '{"a": 0', "no valid JSON"),
        ("vocab.json", '{"a": {}}', "is damaged|must be 0, 1, 2"),
        ("merges.txt", "version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        ("merges.txt", "x y z\n", "the merge 'x y z'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "is damaged"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "is damaged"),
        ("special_tokens_map.json", '{"bos_token": 3}', "is damaged"),
        ("special_tokens_map.json", '{"pad_token": "nowhere"}', "lacks the pad_token 'nowhere'"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_file_or_what_it_says(tiny, tmp_path, file, content, message):
    tiny.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        CLIPTokenizer.from_pretrained(tmp_path)
