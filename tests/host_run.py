"""One process of a run of one or two: `python host_run.py SETTINGS`, for test_parallel_hosts."""

import json
import os
import signal
import sys
import time

import jax
import numpy as np
import optax

from metagen_jax import cross_entropy_loss, data_parallel, gradients, maml_loss, mean_over_tasks
from metagen_jax.hosts import start_hosts
from metagen_jax.nets.mlp import MLP
from metagen_jax.parallel import replicate
from metagen_jax.training import fit, init_state, train_step
from metagen_jax.types import Episode

settings = json.loads(sys.argv[1])
jax.config.update("jax_num_cpu_devices", 2 // settings["num_processes"])
if settings["num_processes"] > 1:
    coordinator = f"localhost:{settings['port']}"
    index, seconds = settings["index"], settings["seconds_to_notice"]
    start_hosts(coordinator, settings["num_processes"], index, seconds_to_notice=seconds)


def sample(key, data):
    inputs = jax.random.normal(key, (4, 6, 3))
    labels = (inputs @ data > 0).astype(int)
    return Episode((inputs[:, :3], labels[:, :3]), (inputs[:, 3:], labels[:, 3:]))


net = MLP((4,), 2, activation=jax.nn.tanh)
loss = maml_loss(cross_entropy_loss(net.apply), inner_optimizer=optax.sgd(0.1), num_steps=1)
optimizer = optax.adam(0.01)
compiled = train_step(data_parallel(mean_over_tasks(gradients(loss))), optimizer, sample)
data = jax.numpy.array([1.0, -2.0, 0.5])
state = init_state(net.init(jax.random.key(0), data[None]), optimizer, jax.random.key(1))
assert len(jax.devices()) == 2


def step(state, data):
    if int(state.step) + 1 == settings.get("fails_at"):
        if settings["fails_by"] == "hanging":
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    return compiled(state, data)


result = fit(
    step,
    *replicate((state, data)),
    num_steps=settings["num_steps"],
    run_dir=settings["run_dir"],
    resume=settings.get("resume", False),
    log_every=1,
    save_every=2,
    step_deadline=settings.get("step_deadline"),
    progress=False,
)
leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(result.state.params))]
print(json.dumps({"params": np.concatenate(leaves).tolist()}))
