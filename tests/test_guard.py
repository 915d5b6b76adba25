"""Guards against slow code: ratios of processor time within one process, whose bars are far from what is usual."""

import json
import os
import subprocess
import sys

import pytest

ALONE = """
import json, time
from dataclasses import replace
from statistics import median
import torch
torch.set_num_threads(1)
from potstill.data import load_data
from potstill.functional import Key
from potstill.networks import network
from potstill.recipe import change, find
from potstill.still import Settings, Still
from potstill.training import PROTOCOLS, Trainer
data = load_data("digits")

def ratio(one, other, warm, rounds):
    '''Median time of the other over that of the one, which take turns.'''
    took = {one: [], other: []}
    for i in range(warm + rounds):
        for run in took:
            begin = time.process_time()
            run()
            took[run].append(time.process_time() - begin)
    return median(took[other][warm:]) / median(took[one][warm:])
"""

COMPILED = (
    ALONE
    + """
recipe = change(find("dm", "small"), {"network": "convnet-w32", "objective.real": 32})

def step(compile):
    still = Still(data, Settings(recipe, [1] * 10, 0, 0.0, 100, "cpu", compile, "fp32", 1))
    now = still.fresh()
    return lambda: still.step(now, 0)

print(json.dumps(ratio(step(True), step(False), 2, 9)))
"""
)

TOGETHER = (
    ALONE
    + """
protocol = replace(PROTOCOLS["dc"], epochs=10)
pair = (data.prepare(data.train.inputs[:10]), data.train.labels[:10])
net = network("convnet-w32", data.shape, 10)

def fit(many):
    trainer = Trainer(net, protocol, data.task, False, "cpu", many)
    return lambda: trainer.fit([pair] * 5, [Key(i) for i in range(5)], lambda n: None)

print(json.dumps([ratio(fit(None), fit(1), 1, 5), Trainer(net, protocol, data.task, False, "cpu").together(10)]))
"""
)


def run(script, **env):
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.compiled
def test_a_compiled_step_is_no_slower_than_an_eager_one(tmp_path):
    """Distribution matching, the whole step of the loop."""
    assert run(COMPILED, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) > 1.0


def test_small_networks_side_by_side_are_quicker_than_one_by_one():
    """Five of them, as an evaluation trains them when it is left to choose."""
    found, together = run(TOGETHER)
    assert together >= 5 and found > 1.3
