"""The names of parameters and submodules, without what wrappers have put into them."""

from __future__ import annotations

# Without these they are those of the plain module.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """Return a parameter's name without what wrappers have put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def plain_module_name(name: str) -> str:
    """Return a submodule's name without what wrappers have put into it."""
    return plain_name(f"{name}.")[:-1]
