"""The one training loop, on accelerate.

Everything random in a step is a pure function of (seed, purpose, step), and the position in the data is the
step itself. So the state of a run is: weights, their averages, the optimizer, the step. A run that is killed
and run again ends in the same bytes as one that was not.
"""

from flowdistill.training.batches import Batch
from flowdistill.training.loop import CHECKPOINT, LOG, MODEL, fit, rehearse
from flowdistill.training.state import State

__all__ = ["CHECKPOINT", "LOG", "MODEL", "Batch", "State", "fit", "rehearse"]
