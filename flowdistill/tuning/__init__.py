"""Ways to sample a model in few evaluations, found without training it.

`calibrating` follows the model once, `candidates` are solvers and times that follow from it or are known
without, `refining` makes them better by rollouts, `trials` are what they are chosen and judged by. Importing
this package imports none of them.
"""
