"""Objects of your own in a checkpoint: a tokenizer and a replay buffer, each with hooks.

    python examples/custom_objects.py

A hook is a function: the saver gets a path to write, the loader gets it back. Whatever file the
saver writes is a part of the checkpoint: checksummed, kept and removed with it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import deque
from pathlib import Path

import torch

from lightning_sbckpt import (
    Checkpointer,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)


@register_checkpoint_hooks
class Tokenizer:
    """Gives every new word the next number, and saves its vocabulary as JSON."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        """Return the number of each word."""
        words = text.split()
        return [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words]

    @mark_as_saver
    def save(self, path: Path) -> None:
        """Write a file that a person can read."""
        Path(path).write_text(json.dumps(self.vocabulary, indent=1), encoding="utf-8")

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        """Read it back; a vocabulary doesn't care where in an epoch it was saved."""
        del end_of_epoch
        self.vocabulary = json.loads(Path(path).read_text(encoding="utf-8"))


class ReplayBuffer:
    """The last transitions of a reinforcement learner: a class that knows nothing of checkpoints."""

    def __init__(self, capacity: int) -> None:
        self.transitions: deque[tuple[torch.Tensor, float]] = deque(maxlen=capacity)


def save_buffer(buffer: ReplayBuffer, path: Path) -> None:
    """Save all transitions as two tensors, which load without pickle."""
    states, rewards = zip(*buffer.transitions, strict=True)
    torch.save({"states": torch.stack(states), "rewards": torch.tensor(rewards)}, path)


def load_buffer(buffer: ReplayBuffer, path: Path, end_of_epoch: bool) -> None:
    """Fill the buffer from the two tensors."""
    del end_of_epoch
    saved = torch.load(path, weights_only=True)
    buffer.transitions.clear()
    buffer.transitions.extend(zip(saved["states"], saved["rewards"].tolist(), strict=True))


def process(directory: Path, text: str, rewards: list[float]) -> None:
    """Do what each run of a program would do: make the objects, recover, work, save."""
    tokenizer = Tokenizer()
    buffer = ReplayBuffer(capacity=4)

    checkpointer = Checkpointer(directory, recoverables={"tokenizer": tokenizer})
    # For a class that isn't yours: hooks for this one object, given with it.
    checkpointer.add_recoverable(
        "buffer", buffer, custom_save_hook=save_buffer, custom_load_hook=load_buffer
    )
    checkpointer.recover_if_possible()

    print(f"  recovered {len(tokenizer.vocabulary)} words, {len(buffer.transitions)} transitions")
    print(f"  {text!r} is {tokenizer(text)}")
    for reward in rewards:
        buffer.transitions.append((torch.randn(3), reward))
    print(f"  rewards in the buffer: {[reward for _, reward in buffer.transitions]}")

    checkpointer.save_and_keep_only(meta={"words": len(tokenizer.vocabulary)})


def main() -> None:
    """Run the same process twice on one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="default: a new temporary folder")
    args = parser.parse_args()
    directory = args.dir or Path(tempfile.mkdtemp(prefix="custom_objects-"))

    print("first run")
    process(directory, "the cat sat", [1.0, 2.0, 3.0])
    print("second run")
    process(directory, "the dog sat", [4.0, 5.0])

    newest = Checkpointer(directory).find_checkpoint()
    if newest is not None:
        print(f"{newest.path.name}: words = {newest.meta['words']}")
        for name, file in sorted(newest.paramfiles.items()):
            print(f"  {name:<10} {file.name}")


if __name__ == "__main__":
    main()
