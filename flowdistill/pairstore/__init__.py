"""Pairs on disk: what a teacher made of which noise, exact, resumable and checked.

A store is a folder:

    store.json                  the `PairSpec`; written first, fixed for ever
    shards/00000.safetensors    x0 of `shard_size` pairs, their labels and distances, and eps if it is stored
    journal.jsonl               one line a shard: CRC-32, then its number and SHA-256 as JSON

A synced journal line is the point at which a shard counts; what a killed writer left behind it is made
again. The noise of pair i is a function of (seed, i), so it is regenerated, not stored. Any number of
processes may make a store together, and come and go: a finished store has the same bytes in whatever order,
by whomever, and with how many interruptions, it was made.
"""

from __future__ import annotations

from flowdistill.pairstore.journal import JOURNAL
from flowdistill.pairstore.spec import STORE, Block, PairSpec, rms, shard_path
from flowdistill.pairstore.store import PairStore
from flowdistill.pairstore.writer import PairWriter, mend, refuse_others

__all__ = [
    "JOURNAL",
    "STORE",
    "Block",
    "PairSpec",
    "PairStore",
    "PairWriter",
    "mend",
    "refuse_others",
    "rms",
    "shard_path",
]
