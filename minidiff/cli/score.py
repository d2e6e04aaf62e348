"""`minidiff score`: the arguments and the work are in minidiff.train."""

from minidiff.train.cli import add_score_arguments as add_arguments
from minidiff.train.cli import run_score as run

__all__ = ["add_arguments", "run"]
