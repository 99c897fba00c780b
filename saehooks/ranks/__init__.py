"""Several processes, started by ``torchrun``, that share one SAE: its rows, its latents, or both.

They form a grid of data x latents. Ranks that share latents split the rows of each batch and average their gradients.
Ranks that share rows split the dictionary: each scores, selects and decodes its own latents. Both are what one process
does with all rows and all latents, up to the order of float sums: thresholds of a batch, counts of dead latents and
ratios of sums are those of the whole batch.
"""

from saehooks.ranks.exchange import all_codes
from saehooks.ranks.files import read_part, write_together
from saehooks.ranks.grid import Alone, Ranks
from saehooks.ranks.joined import JoinedSAE, load, split
from saehooks.ranks.products import mean_of_all
from saehooks.ranks.splitting import axes_of, part, shard, whole

__all__ = [
    "Alone",
    "JoinedSAE",
    "Ranks",
    "all_codes",
    "axes_of",
    "load",
    "mean_of_all",
    "part",
    "read_part",
    "shard",
    "split",
    "whole",
    "write_together",
]
