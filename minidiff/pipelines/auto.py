"""Which class does a task with a checkpoint, whatever class the checkpoint was saved by."""

from typing import ClassVar

import minidiff
from minidiff.checkpoints import CheckpointError, hub
from minidiff.pipelines.base import INDEX, DiffusionPipeline

TASKS = ("text to image", "image to image", "inpainting")
FAMILIES = (  # the class for each task; of XL's, minidiff has the first
    ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
)


class _AutoPipeline:
    task: ClassVar[str]

    def __init__(self):
        name = type(self).__name__
        raise OSError(f"{name} has no objects: call {name}.from_pretrained(…) or {name}.from_pipe(pipeline)")

    @classmethod
    def from_pretrained(
        cls, name_or_path, *, revision=None, cache_dir=None, local_files_only=False, token=None, **options
    ):
        """The pipeline for the task, of a built-in name, a folder or a repository's id.

        Arguments as for DiffusionPipeline.from_pretrained. CheckpointError where minidiff has no such
        pipeline for this kind of checkpoint.
        """
        source = {"revision": revision, "cache_dir": cache_dir, "token": token}
        source["local_files_only"] = local_files_only
        saved_by = hub.read_json(name_or_path, INDEX, **source).get("_class_name")
        try:
            pipeline_class = cls._class_for([saved_by])
        except ValueError as error:
            raise CheckpointError(f"{name_or_path}: {error}") from None
        return pipeline_class.from_pretrained(name_or_path, **source, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **parts):
        """The pipeline for the task that shares the parts of another; see DiffusionPipeline.from_pipe.

        ValueError where minidiff has no such pipeline for these parts.
        """
        names = [parent.__name__ for parent in type(pipeline).__mro__]
        return cls._class_for(names).from_pipe(pipeline, **parts)

    @classmethod
    def _class_for(cls, names):
        """The class that does the task with the parts of the first of these classes that is known."""
        family = next((family for name in names for family in FAMILIES if name in family), None)
        if family is None:
            raise ValueError(f"{cls.__name__} knows no {names[0]}; it knows {', '.join(sum(FAMILIES, ()))}")
        wanted = family[TASKS.index(cls.task)]
        if wanted not in minidiff.__all__:
            raise ValueError(f"minidiff has no {wanted}, which {cls.task} with a {names[0]} needs")
        return getattr(minidiff, wanted)


class AutoPipelineForText2Image(_AutoPipeline):
    """StableDiffusionPipeline or StableDiffusionXLPipeline, as the checkpoint needs."""

    task = TASKS[0]


class AutoPipelineForImage2Image(_AutoPipeline):
    """StableDiffusionImg2ImgPipeline, for a checkpoint of Stable Diffusion 1 or 2."""

    task = TASKS[1]


class AutoPipelineForInpainting(_AutoPipeline):
    """StableDiffusionInpaintPipeline, for a checkpoint of Stable Diffusion 1 or 2."""

    task = TASKS[2]
