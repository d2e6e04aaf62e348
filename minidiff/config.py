"""config.json <-> constructor arguments, without torch.

An object's config holds every constructor argument, defaults included, and remembers which of them were left
at their default: only explicitly set values travel to another class (`from_config`). Models accept the keys
that we do not implement only with the one value that means "off"; any other value is refused by name.
"""

import contextlib
import functools
import inspect
import json
import os
import sys
from pathlib import Path
from typing import ClassVar

DEFAULTED = "_use_default_values"  # diffusers' key for the names of arguments left at their default
DIFFUSERS_VERSION = "0.42.0"  # the format that save_config writes


class Config(dict):
    """A read-only dict of constructor arguments whose keys are attributes too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__.update(self)  # so that a look-up runs no code of ours

    def __getattr__(self, name):  # only called for what is not there
        raise AttributeError(f"this config has no key {name!r}; its keys are {', '.join(self)}")

    def _refuse(self, *args, **kwargs):
        raise TypeError("a config is read-only: build another object with X.from_config(config, key=value)")

    __setattr__ = __setitem__ = __ior__ = __delitem__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self):  # the default way to copy and unpickle a dict sets items one by one
        return Config, (dict(self),)


class Configured:
    """Base of everything with a config: records the constructor's arguments, writes them as JSON."""

    config_name = "config.json"
    _compatibles: tuple[str, ...] = ()
    fixed_options: ClassVar[
        dict
    ] = {}  # keys of published configs that have one value only: {key: that value}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)

    @classmethod
    def from_config(cls, config, **overrides):
        """An object from a dict or another object's .config; overrides count as explicitly set.

        Keys left at their default in the source take this class's own default. Keys that this class does not
        know are carried along in .config, so that A -> B -> A gives A's values back; models refuse them.
        """
        if not isinstance(config, dict):
            raise TypeError(
                f"{cls.__name__}.from_config needs a dict or a .config, not {type(config).__name__}"
            )
        defaulted = config.get(DEFAULTED, ())
        explicit = {k: v for k, v in config.items() if k not in defaulted and k != DEFAULTED} | overrides
        known = set(inspect.signature(cls.__init__).parameters) | set(cls.fixed_options)
        foreign = {k: v for k, v in explicit.items() if k not in known}
        cls._check_foreign(foreign)
        made = cls(**{k: v for k, v in explicit.items() if k in known})
        carried = {k: v for k, v in foreign.items() if k not in ("_class_name", "_diffusers_version")}
        made._change_config(**carried)
        return made

    @property
    def compatibles(self) -> list[type]:
        """The classes that `from_config` may switch to."""
        package = sys.modules[type(self).__module__.rpartition(".")[0]]
        others = [getattr(package, name) for name in self._compatibles]
        return others if type(self) in others else [type(self), *others]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, *, variant=None, torch_dtype=None,
                        use_safetensors=None, revision=None, cache_dir=None, local_files_only=False,
                        token=None, **overrides):  # fmt: skip
        """The object of a built-in checkpoint, a folder or a hub id; the file may be of a compatible class.

        overrides replace values of the file. variant, torch_dtype and use_safetensors are for what has
        weights. Raises CheckpointError for a missing or broken file, naming it.
        """
        from minidiff.checkpoints import CheckpointError, hub  # inside: most users load nothing

        config = hub.read_json(
            pretrained_model_name_or_path, cls.config_name, subfolder,
            revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token,
        )  # fmt: skip
        try:
            return cls.from_config(config, **overrides)
        except (TypeError, ValueError, NotImplementedError) as error:
            file = Path(str(pretrained_model_name_or_path), subfolder or "", cls.config_name)
            raise CheckpointError(f"{file}: {error}") from error

    def save_pretrained(self, save_directory):
        """`save_config`: all that there is to save where nothing has weights."""
        self.save_config(save_directory)

    @classmethod
    def _check_foreign(cls, foreign):
        """Raises for keys that the class can't carry along; schedulers carry all of them."""

    def _set_config(self, config):
        object.__setattr__(self, "config", config)  # before nn.Module.__init__ ran, too

    def _change_config(self, **values):
        """Corrects what the config says, where one value stands for another."""
        self._set_config(Config(self.config | values))

    def save_config(self, save_directory):
        """Writes save_directory/config_name, which diffusers reads too; the file is complete or absent."""
        values = {k: v for k, v in self.config.items() if k not in (DEFAULTED, "_diffusers_version")}
        head = {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
        write_json(Path(save_directory) / self.config_name, head | values)


@contextlib.contextmanager
def replacing(path):
    """The name of a temporary file beside path, which takes path's place if the block ends without an error.

    So an interruption or a full disk leaves the old file, or none. The folder is made where there is none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if str(error.filename) == str(temporary):  # nobody knows that name
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # an error of the block is the one to report
            temporary.unlink()


def write_json(path, values):
    """Writes values to path, complete or not at all."""
    text = json.dumps(values, indent=2, sort_keys=True, default=_jsonable) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _jsonable(value):
    """NumPy arrays, tensors and scalars as lists and numbers, paths as text; anything else can't be saved."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a config with a {type(value).__name__} in it can't be saved as JSON: {value!r}")


def _recording(init):
    """init that first stores its arguments, defaults included, as self.config."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        if type(self).__init__ is not wrapped:  # called by a subclass, whose arguments are recorded already
            return init(self, *args, **kwargs)
        fixed = self.fixed_options
        given_fixed = {k: kwargs.pop(k) for k in list(kwargs) if k in fixed and k not in signature.parameters}
        for key, value in given_fixed.items():
            if _plain(value) != _plain(fixed[key]):
                raise ValueError(
                    f"{type(self).__name__}: {key}={value!r} is not implemented; minidiff knows only "
                    f"{key}={fixed[key]!r}"
                )
        bound = signature.bind(self, *args, **kwargs)
        explicit = set(bound.arguments) | set(given_fixed)
        bound.apply_defaults()
        values = fixed | {k: v for k, v in bound.arguments.items() if k != "self"}
        self._set_config(Config(values | {DEFAULTED: sorted(set(values) - explicit)}))
        init(self, *args, **kwargs)

    return wrapped


def _plain(value):
    """value with lists in place of tuples, as JSON gives them back."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
