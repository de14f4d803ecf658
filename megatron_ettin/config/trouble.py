"""The section `trouble` of a run: what it does by itself about a step that goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from megatron_ettin.config.checks import require_positive

#: Fewest losses whose median and spread say anything.
MIN_WINDOW_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class TroubleConfig:
    """Steps that go wrong: stop, leave out their rows, or go back to the last checkpoint.

    Anything but the defaults reads loss and gradient norm back from the device in every step.
    """

    on_nan: Literal["stop", "skip", "rewind"] = "stop"
    """Answer to a loss or a gradient norm that is not finite. stop: end with an error at the next
    report. skip: leave out the rows of the step, before the weights change. rewind: go back to the
    last checkpoint, and leave out the last rewind_steps steps up to this one."""
    on_spike: Literal["off", "stop", "skip", "rewind"] = "off"
    """Answer to a loss that lies spike_z above those of the last window_steps steps: as with
    on_nan, but stop ends the run in the step itself."""
    spike_z: float = 10.0
    """Distance from the window's median, in robust standard deviations (1.4826 times the median
    absolute deviation), from which on a loss is a spike."""
    window_steps: int = 128
    """Steps of the window. Nothing is a spike before a phase has taken so many."""
    rewind_steps: int = 100
    """Steps whose rows a rewind leaves out: the one that went wrong and those before it, at most
    back to the checkpoint."""
    max_interventions: int = 10
    """Skips and rewinds, counted over the whole run with all resumes, after which the next one ends
    the run instead."""

    hang_seconds: float | None = None
    """Longest time from one step to the next, in seconds; a rank that takes longer writes the
    stacks of its threads into run_dir/hangs and ends with code 1, so that torchrun restarts the
    run. Give several times what a step takes. The first step of a phase, validation and saving may
    take 30 minutes. Without it a rank waits that long for another."""

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to compare, to leave out or to wait for."""
        if self.hang_seconds is not None:
            require_positive("trouble", "hang_seconds", self.hang_seconds)
        require_positive("trouble", "spike_z", self.spike_z)
        for name, least in (("window_steps", MIN_WINDOW_STEPS), ("rewind_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"trouble.{name}: {getattr(self, name)} is less than {least}")
        if self.max_interventions < 0:
            raise ValueError(f"trouble.max_interventions: {self.max_interventions} is negative")

    @property
    def seeks_spikes(self) -> bool:
        """Tell whether losses are compared with those of the steps before."""
        match self.on_spike:
            case "off":
                return False
            case "stop" | "skip" | "rewind":
                return True
            case _:
                assert_never(self.on_spike)

    @property
    def is_on(self) -> bool:
        """Tell whether every step is examined before the weights change."""
        match self.on_nan:
            case "stop":
                return self.seeks_spikes
            case "skip" | "rewind":
                return True
            case _:
                assert_never(self.on_nan)
