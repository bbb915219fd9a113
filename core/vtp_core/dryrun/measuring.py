"""The same bytes as the plan estimates, measured on an engine that computes."""

from __future__ import annotations

from vtp_core.dryrun.memory import Memory, gradients_noted, weigh
from vtp_core.dryrun.rehearsal import full_step
from vtp_core.dryrun.saved import Saved, storages
from vtp_core.engine import Engine
from vtp_core.forwards import Inputs


def measure(engine: Engine, inputs: Inputs) -> Memory:
    """Bytes by kind of a full step, which is taken twice: the first time makes the optimizers' state.

    What autograd keeps is counted by its hooks on saved tensors, as most storages alive at one time;
    weights and whatever else was there before the step are not counted.

    Args:
        engine: with weights.
        inputs: a batch of this process.
    """
    engine.steps_done = full_step(engine.model, engine.train_keys.steps)
    engine.step(inputs)
    engine.steps_done -= 1
    memory = Memory()
    with gradients_noted(engine, memory), Saved(storages()) as saved:
        engine.step(inputs)
    memory.rest = saved.peak
    weigh(engine, memory)
    return memory
