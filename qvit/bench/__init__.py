"""Speed and memory of an engine beside its peers, in one run: each in a process of its own, taking turns.

`peers` has a file for each peer (one for all on a GPU), `models` makes what is measured, `worker` is a measured process and
`child` its owner, `on_device` are its calls on a GPU, `turns` is the order and the statistics, `run` the whole. `ceilings` and
`kernels` say where the CUDA engine's time goes.
"""
