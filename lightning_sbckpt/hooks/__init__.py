"""How an object is saved and loaded: hooks, found by type.

A hook is a callable: `save(obj, path)`, `load(obj, path, end_of_epoch)` or `transfer(obj, path)`.
Which one serves an object is decided in this order, and stated only here:

1. a custom hook given for the object's name,
2. the first class along the object's MRO with a registered hook,
3. `state_dict` and `load_state_dict`, if the object has them.

`HookRegistry` holds the second step. `DEFAULT_SAVE_HOOKS`, `DEFAULT_LOAD_HOOKS` and
`DEFAULT_TRANSFER_HOOKS` are the dictionaries of the registry that is used when none is named.
The decorators are those of SpeechBrain's `speechbrain.utils.checkpoints`. Where the program has
loaded SpeechBrain, a class counts as registered if it is so there; what was registered here wins
over that, and what a user registered wins over the hooks that need no registration.

A marked method of a class that nobody decorated is no hook, as in SpeechBrain. But where a base class
gives the hook, that method saves and loads what it was written for in a second file, and nothing of
the object is lost.
"""

from __future__ import annotations

from lightning_sbckpt.hooks.registry import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_SAVE_HOOKS,
    DEFAULT_TRANSFER_HOOKS,
    HookRegistry,
    check_signature,
    default_registry,
    get_default_hook,
    mark_as_loader,
    mark_as_saver,
    mark_as_transfer,
    register_checkpoint_hooks,
)

__all__ = [
    "DEFAULT_LOAD_HOOKS",
    "DEFAULT_SAVE_HOOKS",
    "DEFAULT_TRANSFER_HOOKS",
    "HookRegistry",
    "check_signature",
    "default_registry",
    "get_default_hook",
    "mark_as_loader",
    "mark_as_saver",
    "mark_as_transfer",
    "register_checkpoint_hooks",
]
