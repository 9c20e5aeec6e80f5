"""`joinwise chaos`: breaks a cluster of its own while requests run, and counts what their clients notice.

A room of its own and not a benchmark: benchmarks take times of a cluster that is well, this one looks for wrong, lost
and torn answers of one that is not. `schedule` draws what is broken when, `load` asks and judges, `site` knows the
processes, `nodes` are the machines, `kept` starts the launcher again, `faults` breaks them and proves that it has,
`run` puts them together. `soak` breaks nothing, and looks for what grows.
"""
