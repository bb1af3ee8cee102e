"""Many devices give what one gives, and speak only of gradients and metrics."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.data.episodes import group_by_class, sample_episode
from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, mean_over_tasks, task_keys
from metagen_jax.meta.maml import maml_loss
from metagen_jax.nets.conv4 import Conv4
from metagen_jax.parallel import data_parallel, map_over_tasks, replicate
from metagen_jax.supervised import cross_entropy_loss, squared_error_loss
from metagen_jax.training import init_state, train_step
from metagen_jax.types import Episode

NUM_TASKS = 16


def cpus(num_devices):
    devices = jax.devices("cpu")
    assert len(devices) >= num_devices, "tests/conftest.py makes eight, before JAX starts"
    return devices[:num_devices]


def mlp(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def mlp_params(key, sizes=(1, 6, 1)):
    w_key, v_key = jax.random.split(key)
    return {
        "w": jax.random.normal(w_key, sizes[:2]),
        "b": jnp.zeros(sizes[1]),
        "v": jax.random.normal(v_key, sizes[1:]),
    }


def different_tasks(key):
    """Regression on lines whose slopes and inputs differ from task to task."""
    x_key, slope_key = jax.random.split(key)
    x = jax.random.normal(x_key, (NUM_TASKS, 8, 1))
    y = x * jax.random.normal(slope_key, (NUM_TASKS, 1, 1)) * 3
    return Episode((x[:, :3], y[:, :3]), (x[:, 3:], y[:, 3:]))


def regression(params, batch, key):
    x, y = batch
    loss, _ = squared_error_loss(mlp)(params, batch, key)
    return loss, {"root": jnp.sqrt(loss), "each": (mlp(params, x) - y).ravel()}


def noisy_regression(params, batch, key):
    """A loss whose value and gradient depend on its key."""
    x, y = batch
    return regression(params, (x + 0.1 * jax.random.normal(key, x.shape, x.dtype), y), key)


def second_order_maml(loss_fn=regression):
    return gradients(maml_loss(loss_fn, inner_optimizer=optax.sgd(0.05), num_steps=3))


def example(dtype=jnp.float32):
    params, tasks = mlp_params(jax.random.key(0)), different_tasks(jax.random.key(1))
    return jax.tree.map(lambda x: x.astype(dtype), (params, tasks))


def assert_trees_close(actual, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected)


@functools.cache
def on_one_device(loss_fn, dtype):
    """Gradients and metrics of all tasks at once, without `data_parallel`."""
    g = jax.jit(mean_over_tasks(second_order_maml(loss_fn)))
    return jax.device_get(g(*example(dtype), jax.random.key(2)))


@pytest.mark.parametrize(
    ("method", "num_devices"), [("shard_map", 8), ("pmap", 8), ("shard_map", 2), ("pmap", 4)]
)
def test_second_order_maml_equals_one_device_in_float64(method, num_devices):
    with jax.enable_x64(True):
        g = mean_over_tasks(second_order_maml(), chunk=1)
        g = data_parallel(g, devices=cpus(num_devices), method=method)
        actual = g(*example(jnp.float64), jax.random.key(2))
        assert actual[0]["w"].dtype == actual[1]["loss"].dtype == jnp.float64
        assert_trees_close(actual, on_one_device(regression, jnp.float64), atol=1e-12)


@pytest.mark.parametrize("method", ["shard_map", "pmap"])
@pytest.mark.slow
def test_under_jit_a_noisy_second_order_maml_equals_one_device_in_float32(method):
    g = mean_over_tasks(second_order_maml(noisy_regression), chunk=1)
    g = jax.jit(data_parallel(g, devices=cpus(8), method=method))
    expected = on_one_device(noisy_regression, jnp.float32)
    largest = max(abs(x).max() for x in jax.tree.leaves(expected))
    assert_trees_close(g(*example(), jax.random.key(2)), expected, atol=1e-6 * largest)


def test_devices_of_the_example_have_different_gradients():
    """So that a mix-up of devices, or a sum in place of a mean, can't pass the tests above."""
    params, tasks = example()
    keys = task_keys(jax.random.key(2), NUM_TASKS)
    per_task, _ = jax.jit(jax.vmap(second_order_maml(), (None, 0, 0)))(params, tasks, keys)
    per_device = per_task["w"].reshape(8, -1, 6).mean(1)
    gaps = abs(per_device[:, None] - per_device[None]).max(-1)
    assert gaps[~np.eye(8, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("method", ["shard_map", "pmap"])
@pytest.mark.parametrize("num_devices", [1, 8])
def test_randomness_of_a_task_depends_on_its_place_in_the_whole_batch_alone(method, num_devices):
    def draws(params, task, key):
        return params, {"draws": jax.nn.one_hot(task, NUM_TASKS) * jax.random.normal(key)}

    key, tasks = jax.random.key(3), jnp.arange(NUM_TASKS)
    expected = jax.vmap(jax.random.normal)(task_keys(key, NUM_TASKS)) / NUM_TASKS
    assert len(set(expected.tolist())) == NUM_TASKS
    g = data_parallel(mean_over_tasks(draws), devices=cpus(num_devices), method=method)
    for keys in (key, task_keys(key, NUM_TASKS)):
        _, metrics = g(jnp.zeros(2), tasks, keys)
        np.testing.assert_array_equal(metrics["draws"], expected)


@pytest.mark.parametrize("method", ["shard_map", "pmap"])
def test_a_batch_of_examples_is_split_for_a_loss_that_ignores_its_key(method):
    params, tasks = example()
    batch = jax.tree.map(lambda x: x.reshape(-1, 1), tasks.query)
    grad_fn = gradients(squared_error_loss(mlp))
    key = jax.random.key(0)
    one = grad_fn(params, batch, key)
    many = data_parallel(grad_fn, devices=cpus(8), method=method)(params, batch, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), many, one)


@pytest.mark.parametrize("method", ["shard_map", "pmap"])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_grad_fn_may_speak_over_the_axis_it_was_promised(method, num_devices):
    def share(params, tasks, keys):
        total = jax.lax.psum(tasks.sum(), "workers")
        return params, {
            "share": tasks.sum() / total,
            "devices": jax.lax.psum(jnp.ones(()), "workers"),
        }

    g = data_parallel(share, devices=cpus(num_devices), method=method, axis_name="workers")
    _, metrics = g(jnp.zeros(()), jnp.arange(1.0, 9.0), jax.random.key(0))
    assert metrics["devices"] == num_devices
    np.testing.assert_allclose(metrics["share"], 1 / num_devices, rtol=1e-6)


COLLECTIVES = (
    "all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter"
    "|collective-permute|collective-broadcast|send|recv"
)


def collectives(hlo):
    """`[(operation, number of floats it moves)]` of every collective in a compiled program."""
    found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", hlo)
    return [(name, sum(map(count_elements, shapes_in(types)))) for types, name in found]


def shapes_in(hlo):
    return [tuple(map(int, dims.split(","))) if dims else () for dims in SHAPE.findall(hlo)]


SHAPE = re.compile(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]*)\]")


def count_elements(shape):
    return int(np.prod(shape, dtype=int))


def compiled_train_step(num_tasks, num_devices, *, conv4=False):
    """Sampling, second-order MAML and Adam, as they are compiled; and the number of parameters."""
    shape = (30, 4, 4, 1) if conv4 else (30, 7)
    examples = jax.random.normal(jax.random.key(0), shape)
    data = group_by_class(examples, np.repeat(np.arange(6), 5))
    net = Conv4(3, num_filters=2)
    apply = net.apply if conv4 else mlp
    params_key = jax.random.key(1)
    params = net.init(params_key, examples) if conv4 else mlp_params(params_key, (7, 5, 3))

    def sample(key, data):
        draw = functools.partial(sample_episode, num_ways=3, num_shots=1, num_queries=2)
        return jax.vmap(draw, in_axes=(0, None))(task_keys(key, num_tasks), data)

    loss_fn = maml_loss(cross_entropy_loss(apply), inner_optimizer=optax.sgd(0.1), num_steps=2)
    devices = cpus(num_devices)
    grad_fn = data_parallel(mean_over_tasks(gradients(loss_fn), chunk=1), devices=devices)
    optimizer = optax.adam(1e-3)
    step = train_step(grad_fn, optimizer, sample)
    state = init_state(params, optimizer, jax.random.key(2))
    arguments = replicate((state, data), devices=devices)
    quick = {"xla_backend_optimization_level": 0}
    hlo = step.lower(*arguments).compile(compiler_options=quick).as_text()
    return hlo, sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("conv4", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_only_collective_of_a_train_step_averages_gradients_and_metrics(conv4):
    hlo, num_params = compiled_train_step(NUM_TASKS, num_devices=8, conv4=conv4)
    assert collectives(hlo) == [("all-reduce", num_params + len(["loss", "accuracy"]))]


def test_each_device_samples_its_own_tasks_alone():
    num_tasks = 8 * 11
    hlo, _ = compiled_train_step(num_tasks, num_devices=8)
    sizes = {size for shape in shapes_in(hlo) for size in shape}
    assert num_tasks // 8 in sizes
    assert not {size for size in sizes if size >= num_tasks and size % num_tasks == 0}


def test_one_device_has_no_collective():
    hlo, _ = compiled_train_step(2, num_devices=1)
    assert collectives(hlo) == []


def test_the_reader_of_compiled_programs_sees_collectives():
    hlo = """
      %a = (f32[2,3]{1,0}, f32[]) all-reduce(%x, %y), replica_groups={}
      %b = f32[8]{0} all-gather-start(%z), dimensions={0}
      ROOT %c = pred[4]{0} collective-permute(%w)
      %d = f32[2]{0} add(%u, %v), metadata={op_name="all-to-all("}
    """
    assert collectives(hlo) == [("all-reduce", 7), ("all-gather", 8), ("collective-permute", 4)]


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_step_leaves_replicated_state_where_it_was(num_devices):
    params, tasks = example()
    tasks = tasks.query
    state, key = replicate((params, jax.random.key(4)), devices=cpus(num_devices))
    g = data_parallel(mean_over_tasks(gradients(regression)), devices=cpus(num_devices))

    @jax.jit
    def step(params, key):
        grads, _ = g(params, tasks, key)
        return optax.apply_updates(params, grads), jax.random.fold_in(key, 1)

    after = step(state, key)
    for before, now in zip(jax.tree.leaves((state, key)), jax.tree.leaves(after), strict=True):
        assert before.committed
        assert now.committed
        assert len(now.devices()) == num_devices
        assert now.sharding.is_equivalent_to(before.sharding, now.ndim)
    np.testing.assert_array_equal(state["w"], params["w"])
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(4)))


def adapt_once(params, task):
    """A gradient, which must be that of this task alone."""
    direction, metrics = gradients(regression)(params, task, jax.random.key(0))
    return {"loss": metrics["loss"], "norm": optax.tree.norm(direction)}


@pytest.fixture(scope="module")
def adapted_alone():
    params, tasks = example()
    examples = zip(*tasks.query, strict=True)
    each = [jax.jit(adapt_once)(params, task) for task in examples]
    return {name: np.array([results[name] for results in each]) for name in each[0]}


@pytest.mark.parametrize("num_devices", [1, 3, 8])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_mapping_over_tasks_is_a_loop_whatever_the_devices_and_chunks(
    num_devices, chunk, adapted_alone
):
    params, tasks = example()
    mapped = map_over_tasks(adapt_once, devices=cpus(num_devices), chunk=chunk)
    results = jax.jit(mapped)(params, tasks.query)
    assert results.keys() == adapted_alone.keys()
    for name, alone in adapted_alone.items():
        np.testing.assert_allclose(results[name], alone, rtol=1e-5)
        assert results[name].shape == (NUM_TASKS,)


def test_mapping_over_tasks_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="chunk is 0; give a positive number"):
        map_over_tasks(lambda shared, task: task, chunk=0)
    with pytest.raises(UserError, match="devices is empty"):
        map_over_tasks(lambda shared, task: task, devices=[])


@pytest.mark.parametrize("method", ["shard_map", "pmap"])
def test_tasks_that_devices_do_not_divide_name_both_numbers_and_a_way_out(method):
    g = data_parallel(mean_over_tasks(second_order_maml()), devices=cpus(8), method=method)
    params, tasks = example()
    twelve = jax.tree.map(lambda x: x[:12], tasks)
    with pytest.raises(ValueError, match=r"12 tasks .* 8 devices; give a multiple of 8 .* as 6"):
        g(params, twelve, jax.random.key(0))


@pytest.mark.parametrize("method", ["shard_map", "pmap"])
def test_one_key_for_each_task_or_one_for_all(method):
    g = data_parallel(mean_over_tasks(second_order_maml()), devices=cpus(8), method=method)
    params, tasks = example()
    with pytest.raises(ValueError, match=r"key has shape \(8,\) for a batch of 16 tasks"):
        g(params, tasks, task_keys(jax.random.key(0), 8))


@pytest.mark.usefixtures("ill_typed")
def test_no_devices_and_unknown_methods_are_refused():
    grad_fn = mean_over_tasks(second_order_maml())
    with pytest.raises(ValueError, match="devices is empty"):
        data_parallel(grad_fn, devices=[])
    with pytest.raises(ValueError, match="devices is empty"):
        replicate(jnp.zeros(3), devices=[])
    with pytest.raises(ValueError, match='\'xmap\'; give "shard_map" or "pmap"'):
        data_parallel(grad_fn, method="xmap")


def test_pmap_refuses_the_devices_of_another_host(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match="4 of 4 devices belong to other hosts"):
        data_parallel(second_order_maml(), devices=cpus(4), method="pmap")
