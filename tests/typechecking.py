"""The run-time type checker that the tests hang on the functions whose signatures carry shapes."""

import random

# beartype picks which item of a list to look at by `random.getrandbits`; given a generator of its own, it leaves the
# global one alone, which tests watch
_global, random.getrandbits = random.getrandbits, random.Random(0).getrandbits
from beartype import BeartypeConf, beartype
from beartype._check.code import codemain  # noqa: F401  (binds the generator)

random.getrandbits = _global

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for
