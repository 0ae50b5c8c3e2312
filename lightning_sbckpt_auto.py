"""What Lightning asks of every installed package when a Trainer is made: callbacks to add.

None, unless the variable LIGHTNING_SBCKPT_DIR is set. This is a module of its own, since nothing of
`lightning_sbckpt` is to be imported then.
"""

from __future__ import annotations

import os


def callbacks() -> list[object]:
    """Return a callback that saves and resumes where LIGHTNING_SBCKPT_DIR says, or none.

    Example:
        >>> callbacks()
        []
    """
    root = os.environ.get("LIGHTNING_SBCKPT_DIR")
    if not root:
        return []
    from lightning_sbckpt.plugin.automatic import automatic

    return [*automatic(root)]
