"""Two processes with a device each, as two hosts have, take the steps that one process takes."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", {devices_each})
if {num_processes} > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("localhost:{port}", {num_processes}, int(sys.argv[1]))
import optax
from metagen_jax import (
    cross_entropy_loss, data_parallel, gradients, maml_loss, mean_over_tasks,
)
from metagen_jax.nets.mlp import MLP
from metagen_jax.parallel import replicate
from metagen_jax.training import init_state, train_step
from metagen_jax.types import Episode

def sample(key, data):
    inputs = jax.random.normal(key, (4, 6, 3))
    labels = (inputs @ data > 0).astype(int)
    return Episode((inputs[:, :3], labels[:, :3]), (inputs[:, 3:], labels[:, 3:]))

net = MLP((4,), 2, activation=jax.nn.tanh)
loss = maml_loss(cross_entropy_loss(net.apply), inner_optimizer=optax.sgd(0.1), num_steps=1)
optimizer = optax.adam(0.01)
step = train_step(data_parallel(mean_over_tasks(gradients(loss))), optimizer, sample)
data = jax.numpy.array([1.0, -2.0, 0.5])
state = init_state(net.init(jax.random.key(0), data[None]), optimizer, jax.random.key(1))
state, data = replicate((state, data))
assert len(jax.devices()) == 2
for _ in range(3):
    state, metrics = step(state, data)
leaves = [leaf.ravel().tolist() for leaf in jax.tree.leaves(state.params)]
print(json.dumps({{"params": sum(leaves, []), "loss": float(metrics["loss"])}}))
"""


def run(num_processes):
    """What each process prints at its end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = PROGRAM.format(
        num_processes=num_processes, devices_each=2 // num_processes, port=port
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(index)], stdout=subprocess.PIPE, text=True
        )
        for index in range(num_processes)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * num_processes
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="makes two CPU devices of one machine")
def test_two_processes_take_the_steps_of_one():
    (alone,) = run(1)
    first, second = run(2)
    assert first == second
    np.testing.assert_allclose(first["params"], alone["params"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(first["loss"], alone["loss"], rtol=1e-6)
