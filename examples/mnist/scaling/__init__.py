"""How training scales: what experiments.py runs, one file an idea.

`cases` says what is run, `run` starts it, `worker` is what is started; `metrics` compares, `model`
says what was to be expected, `carry` takes that to machines that are not here, `advice` sums up,
`plots` draws.
"""
