"""Which step comes next, where the timestep alone doesn't say: for schedulers that count."""

import numpy as np

from minidiff.boundary import to_numpy
from minidiff.schedulers.schedule import Scheduler


class CountingScheduler(Scheduler):
    """Base of the schedulers that find a step by counting, since timesteps may repeat or be fractions.

    The first step is looked up by its timestep, or is `begin_index`; the others follow. `step_index` is where
    the next one starts in timesteps and sigmas, None before the first; update rules get it in place of the
    timestep.
    """

    unknown_is_last = False  # whether a timestep that is not in the schedule counts as the last one
    step_index: int | None = None
    begin_index: int | None = None

    def _count_anew(self):
        self.step_index = self.begin_index = None

    def set_begin_index(self, begin_index: int = 0):
        """Starts at that step of the schedule, as image-to-image does; until the next set_timesteps."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep, schedule_timesteps=None) -> int:
        """Where timestep stands in the schedule: the second place of several, so that none is skipped."""
        timesteps = self.timesteps if schedule_timesteps is None else to_numpy(schedule_timesteps)
        t = timestep.item() if hasattr(timestep, "item") else timestep
        places = np.flatnonzero(timesteps == t)
        if not places.size and not self.unknown_is_last:
            raise ValueError(f"timestep {t} is not in the schedule; take it from .timesteps")
        return int(places[:2][-1]) if places.size else len(self.timesteps) - 1

    def _position(self, timestep):
        """The index of this step, which update rules get in place of the timestep."""
        if self.step_index is None:
            begin = self.begin_index
            self.step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self.step_index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are made; call set_timesteps to start again")
        return self.step_index

    def _advance(self):
        self.step_index += 1
