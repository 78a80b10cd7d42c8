"""Speed and memory of an engine beside its peers, in one run: each in a process of its own, taking turns.

`peers` has a file for each peer, `models` makes what is measured, `worker` is a measured process and `child` its owner, `turns`
is the order and the statistics, `run` the whole.
"""
