"""`minidiff train`: the arguments and the work are in minidiff.train."""

from minidiff.train.cli import add_train_arguments as add_arguments
from minidiff.train.cli import run_train as run

__all__ = ["add_arguments", "run"]
