"""`minidiff convert`: from one file in the original layout to a folder in diffusers' layout."""

from minidiff.checkpoints import layout
from minidiff.config import write_json

DTYPES = ("float32", "float16", "bfloat16")
TEXT = (
    "Writes the parts of a single file (Stable Diffusion 1, 2 or XL, or for inpainting; .safetensors or "
    ".ckpt) as a folder that minidiff and diffusers load. The folder is complete or not there."
)
EXAMPLES = """examples:
  minidiff convert v1-5-pruned-emaonly.safetensors sd15/
  minidiff convert v1-5-pruned.ckpt sd15/ --ema --dtype float16
  minidiff convert v2-1_512-ema-pruned.safetensors sd21-base/ --prediction-type epsilon"""


def add_arguments(parser):
    """The arguments of `minidiff convert`."""
    parser.description, parser.epilog = TEXT, EXAMPLES
    parser.add_argument("file", metavar="IN", help="a path, or OWNER/REPOSITORY/FILE on the hub")
    parser.add_argument("folder", metavar="OUT", help="the folder to write; it must not exist, or be empty")
    averages = "take the running averages of the U-Net's weights, where the file has them beside the weights"
    parser.add_argument("--ema", action="store_true", help=averages)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as they are in the file)")
    predicts = "what the U-Net predicts; only Stable Diffusion 2 base needs it: epsilon"
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction", "sample"), help=predicts)
    config = "a folder with the configs of the parts (recognised from the tensors)"
    parser.add_argument("--config", metavar="FOLDER", help=config)


def run(args):
    """Converts the file, and prints what it was."""
    with layout.new_folder(args.folder) as temporary:
        # after the folder, whose faults are known without torch
        import torch

        from minidiff.checkpoints import single_file

        file = single_file.open_file(
            args.file, config=args.config, extract_ema=args.ema, prediction_type=args.prediction_type
        )
        write(file, temporary, getattr(torch, args.dtype) if args.dtype else "auto")
    print(f"{args.folder}: {file.title}, {', '.join(file.parts)}")


def write(file, folder, dtype):
    """Writes all parts of a SingleFile and the index; one part at a time is in memory."""
    import minidiff

    for part, entry in file.index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        if part == "scheduler":  # not built, since it may be one that minidiff does not have
            write_json(folder / part / "scheduler_config.json", file.scheduler_config())
        else:
            part_class = getattr(minidiff, entry[1].removesuffix("Fast"))
            file.build(part, part_class, dtype).save_pretrained(folder / part)
    write_json(folder / "model_index.json", file.index)
