"""Files from strangers: mutated inputs for every parser, each in a process with limits. `python tests/fuzz/run.py --help`."""
