"""Configs: what an object records about its arguments, what travels to other classes, what is written."""

import copy
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from minidiff.config import DEFAULTED, DIFFUSERS_VERSION, Config, Configured, write_json


class Cup(Configured):
    config_name = "cup.json"

    def __init__(self, size: int = 3, colours=("red",), handle=None):
        self.size = size


class Mug(Configured):
    def __init__(self, size: int = 5, weight: float = 0.5):
        pass


class Glass(Configured):
    fixed_options = {"handle": None, "bases": ("flat",)}  # noqa: RUF012

    def __init__(self, size: int = 3):
        pass

    @classmethod
    def _check_foreign(cls, foreign):
        if foreign:
            raise ValueError(f"a glass has no {', '.join(foreign)}")


class PaintedCup(Cup):
    def __init__(self, size: int = 4, paint: str = "blue"):
        super().__init__(size, colours=(paint,))


def test_a_config_holds_all_arguments_and_remembers_the_defaults():
    for cup in (Cup(7), Cup(size=7)):
        assert cup.config.size == cup.config["size"] == 7 == cup.size
        assert cup.config.colours == ("red",) and cup.config.handle is None
        assert cup.config[DEFAULTED] == ["colours", "handle"]
        assert "size" in cup.config and cup.config.get("lid", 1) == 1
        assert dict(cup.config)["size"] == 7


def test_an_unknown_key_is_named():
    with pytest.raises(AttributeError, match="no key 'lid'; its keys are size, colours, handle"):
        Cup().config.lid  # noqa: B018


def test_a_subclass_records_its_own_arguments():
    cup = PaintedCup(paint="green")
    assert cup.config.paint == "green" and cup.config.size == cup.size == 4
    assert "colours" not in cup.config and cup.config[DEFAULTED] == ["size"]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(size=1),
        lambda c: c.pop("size"),
        lambda c: c.__setitem__("size", 1),
        lambda c: c.__delitem__("size"),
        lambda c: setattr(c, "size", 1),
        lambda c: c.__ior__({"size": 1}),
        lambda c: c.clear(),
        lambda c: c.setdefault("lid", 1),
    ],
)
def test_a_config_can_not_be_changed(change):
    config = Cup().config
    with pytest.raises(TypeError, match=r"read-only: build another object with X\.from_config"):
        change(config)
    assert config.size == 3


def test_a_config_survives_copying_and_pickling():
    config = Cup(9).config
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and isinstance(again, Config) and again.size == 9


def test_only_explicit_values_travel_and_unknown_ones_come_back():
    mug = Mug.from_config(Cup(handle="left").config)
    assert mug.config.size == 5  # the cup's 3 was its default
    assert mug.config.handle == "left"
    cup = Cup.from_config(mug.config)
    assert cup.config.handle == "left" and cup.config.size == 3
    assert Mug.from_config(Cup(3).config).config.size == 3
    assert Mug.from_config({"size": 8, "_class_name": "Cup", "_diffusers_version": "0.1"}).config.size == 8
    assert "_class_name" not in Mug.from_config({"_class_name": "Cup"}).config


def test_overrides_count_as_explicit():
    mug = Mug.from_config(Cup().config, size=6)
    assert Cup.from_config(mug.config).config.size == 6


def test_a_config_must_be_a_dict():
    with pytest.raises(TypeError, match=r"Cup\.from_config needs a dict or a \.config, not str"):
        Cup.from_config("cup.json")


def test_a_fixed_option_is_accepted_with_its_one_value():
    assert Glass(handle=None).config.handle is None
    assert Glass.from_config({"handle": None, "bases": ["flat"], "size": 2}).config.size == 2
    with pytest.raises(
        ValueError, match="Glass: handle='left' is not implemented; minidiff knows only handle=None"
    ):
        Glass(handle="left")
    with pytest.raises(ValueError, match="bases"):
        Glass.from_config({"bases": ["round"]})
    with pytest.raises(ValueError, match="a glass has no lid"):
        Glass.from_config({"lid": 1})
    with pytest.raises(TypeError, match="lid"):
        Glass(lid=1)


def test_a_saved_config_has_the_class_and_all_values(tmp_path):
    Cup(np.int64(4), colours=np.array([0.5, 0.25]), handle=Path("left")).save_config(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "cup.json").read_text()) == {
        "_class_name": "Cup",
        "_diffusers_version": DIFFUSERS_VERSION,
        "size": 4,
        "colours": [0.5, 0.25],
        "handle": "left",
    }


def test_what_json_has_not_is_refused_and_leaves_the_old_file(tmp_path):
    Cup().save_config(tmp_path)
    before = (tmp_path / "cup.json").read_text()
    with pytest.raises(TypeError, match="a config with a Mug in it can't be saved as JSON"):
        Cup(handle=Mug()).save_config(tmp_path)
    assert (tmp_path / "cup.json").read_text() == before and os.listdir(tmp_path) == ["cup.json"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def fail(self, text, encoding):
        with open(self, "w") as file:
            file.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "cup.json", {"size": 1})
    assert os.listdir(tmp_path) == []
