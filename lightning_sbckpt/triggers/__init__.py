"""When to save: pure answers to "is a checkpoint due at this moment?".

A trigger holds no state and reads no clock. Whoever saves describes the moment, including when
the last save was, and asks by `ask`. `a | b` is due when either is, `a & b` when both are at the
same moment: `EveryNSteps(100) & AfterStep(1000) | OnValidationEnd()`.

A trigger that is `ephemeral` asks for a checkpoint for recovery only, which retention treats by
rules of its own. Where a lasting one is due at the same moment, the checkpoint is a lasting one.
"""

from __future__ import annotations

from lightning_sbckpt.triggers.basic import (
    AtSteps,
    EveryInterval,
    EveryNEpochs,
    EveryNSteps,
    FirstStep,
    OnValidationEnd,
    WhenTrue,
)
from lightning_sbckpt.triggers.combined import AfterStep, AllOf, AnyOf, Ephemeral, ask
from lightning_sbckpt.triggers.moment import Due, Moment, Trigger, may_be_due, together
from lightning_sbckpt.triggers.text import parse_trigger

__all__ = [
    "AfterStep",
    "AllOf",
    "AnyOf",
    "AtSteps",
    "Due",
    "Ephemeral",
    "EveryInterval",
    "EveryNEpochs",
    "EveryNSteps",
    "FirstStep",
    "Moment",
    "OnValidationEnd",
    "Trigger",
    "WhenTrue",
    "ask",
    "may_be_due",
    "parse_trigger",
    "together",
]
