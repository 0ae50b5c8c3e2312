"""States of which every rank holds its own pieces, through `torch.distributed.checkpoint` (DCP)."""
