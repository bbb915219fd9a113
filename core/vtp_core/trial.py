"""Before training: whether what the stack samples with at the end will work."""

from __future__ import annotations

from vtp_core.build import Model
from vtp_core.errors import StackFault
from vtp_core.generation import Generator
from vtp_core.tokenizer import Tokenizer


def check_sampler(model: Model) -> None:
    """See before training that what the stack samples with will work.

    Raises:
        StackFault: guidance or reuse that this generator cannot have.
    """
    if model.generator is None:
        return
    keys, weak = model.stack.sampler, None
    if keys.weak is not None:
        weak = Generator.from_pretrained(keys.weak, registry=model.stack.registry).network
    generator = Generator(Tokenizer(model), weak=weak)
    if generator.sampler.kind != "path":
        return
    guidance = generator.field().guidance
    if guidance is not None and guidance.use == "cfg" and not model.drop_condition:
        raise StackFault(
            "sampler.guidance: the null condition would never be trained; set generator.drop_condition=0.1"
        )
    if keys.reuse is not None:
        generator.latents(1, standardized=True)  # whether there is a state, and steps enough
