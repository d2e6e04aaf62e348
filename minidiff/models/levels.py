"""How a U-Net is put together from its config: once, at construction; no forward pass comes through here."""

from torch import nn

from minidiff.models.layers import DownBlock2D, Downsample2D, UpBlock2D, Upsample2D


def down_path(resnet, attentions, block_out_channels, layers_per_block, padding):
    """The levels on the way down, and the channels of every skip, conv_in's first.

    resnet(in_channels, out_channels) makes a resnet, attentions[level]() an attention (None: none at that
    level); block_out_channels and layers_per_block have one entry per level; padding is Downsample2D's.
    """
    blocks, before = nn.ModuleList(), block_out_channels[0]
    skip_channels = [before]
    lowest = len(block_out_channels) - 1
    for level, (channels, num_layers) in enumerate(zip(block_out_channels, layers_per_block, strict=True)):
        resnets = [resnet(before if i == 0 else channels, channels) for i in range(num_layers)]
        attend = attentions[level]
        downsampler = Downsample2D(channels, padding) if level < lowest else None
        blocks.append(DownBlock2D(resnets, [attend() for _ in resnets] if attend else [], downsampler))
        skip_channels += [channels] * (num_layers + (level < lowest))
        before = channels
    return blocks, skip_channels


def up_path(resnet, attentions, block_out_channels, layers_per_block, skip_channels):
    """The levels on the way up, each with one resnet more than on the way down. Arguments: see down_path."""
    blocks, before = nn.ModuleList(), block_out_channels[-1]
    skip_channels = list(skip_channels)
    for level, channels in reversed(list(enumerate(block_out_channels))):
        resnets = []
        for _ in range(layers_per_block[level] + 1):
            resnets.append(resnet(before + skip_channels.pop(), channels))
            before = channels
        attend = attentions[level]
        upsampler = Upsample2D(channels) if level > 0 else None
        blocks.append(UpBlock2D(resnets, [attend() for _ in resnets] if attend else [], upsampler))
    return blocks


def makers_at(kind, block_types, makers):
    """The makers of those levels whose block type is kind, None for others: the attentions of down_path."""
    return [maker if block == kind else None for block, maker in zip(block_types, makers, strict=True)]


def check_levels(owner, block_out_channels, **block_types):
    """Raises ValueError unless every list of block types has one known type per entry of block_out_channels.

    block_types: argument name -> (its value, the types that owner implements).
    """
    for name, (types, known) in block_types.items():
        if len(types) != len(block_out_channels):
            raise ValueError(f"{owner}: {name} has {len(types)} entries, block_out_channels has "
                             f"{len(block_out_channels)}; give one type per level")  # fmt: skip
        for kind in types:
            check_choice(owner, name, kind, *known)


def check_choice(owner, name, value, *known):
    """value; raises ValueError unless it is one of the known values of the option name."""
    if value not in known:
        choices = ", ".join(repr(choice) for choice in known)
        raise ValueError(f"{owner}: {name}={value!r} is not implemented; minidiff knows {choices}")
    return value


def check_given(because, **options):
    """Raises ValueError unless all options that another one needs have a value; because names that one."""
    missing = [name for name, value in options.items() if value is None]
    if missing:
        raise ValueError(f"{because} needs {' and '.join(missing)}")


def per_level(owner, levels, **options):
    """Each option's value as a list of one per level: itself, or repeated if it is no list."""
    lists = []
    for name, value in options.items():
        values = list(value) if isinstance(value, list | tuple) else [value] * levels
        if len(values) != levels or any(isinstance(entry, list | tuple) for entry in values):
            raise ValueError(f"{owner}: {name}={value!r} is not implemented; give one value, or one for each "
                             f"of the {levels} levels")  # fmt: skip
        lists.append(values)
    return lists
