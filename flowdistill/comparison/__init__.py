"""Evaluations against each other: what has changed, how sure that is, and whether a gate lets it pass.

`joining` brings two evaluations together, `comparing` is the statistics, `verdicts` and `gating` say what may
be said, `rehearsing` how often they are wrong. Importing this package imports none of them.
"""
