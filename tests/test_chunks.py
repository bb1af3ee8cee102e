"""The chunk that "auto" chooses, and that it changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_tasks import example, regression

from metagen_jax import chunks
from metagen_jax.chunks import choose_chunk, even_chunk, largest_that_fits
from metagen_jax.errors import UserError
from metagen_jax.gradients import gradients, mean_over_tasks
from metagen_jax.meta.maml import maml_loss
from metagen_jax.parallel import data_parallel, map_over_tasks

KEY = jax.random.key(0)
MAML = gradients(maml_loss(regression, inner_optimizer=optax.sgd(0.1), num_steps=2))


@pytest.fixture
def accelerator(monkeypatch):
    """Makes believe that the device is an accelerator with so many bytes left."""

    def pretend(memory):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(chunks, "_memory_for_chunk", lambda: memory)

    return pretend


def sum_over(shared, tasks):
    """Every task makes 100 kB of its own."""
    return jax.vmap(lambda t: jnp.sort(jnp.sin(t * jnp.arange(25_000.0)))[::7] @ shared)(tasks)


SHARED, TASKS = jnp.ones(3572), jnp.arange(1.0, 41)


@pytest.mark.parametrize(
    ("num_params", "num_examples", "expected"),
    [
        (1024, 1024, 10),  # 4 KiB of parameters and as much of examples: 16 of 8 KiB in 128.
        (1024, 10, 25),  # 131072 // 4136 is 31.
        (40_000, 10, 1),  # More than the cache holds.
        (10, 10, 50),  # All there are.
    ],
)
def test_on_a_cpu_a_chunk_holds_128_kib_of_parameters_and_examples(
    num_params, num_examples, expected
):
    shared, tasks = jnp.zeros(num_params), (jnp.zeros((50, num_examples)),)
    assert choose_chunk(lambda *_: None, shared, tasks) == expected


@pytest.mark.parametrize(
    ("num_tasks", "most", "expected"),
    [(32, 20, 16), (32, 32, 32), (1000, 18, 10), (7, 5, 5), (31, 18, 18), (5, 1, 1), (9, 3, 3)],
)
def test_a_chunk_divides_the_tasks_if_one_of_about_its_size_can(num_tasks, most, expected):
    assert even_chunk(num_tasks, most) == expected


@pytest.mark.parametrize("budget", [1, 1000, 10**9])
def test_auto_gives_the_same_mean_and_results_as_all_at_once(monkeypatch, budget):
    monkeypatch.setattr(chunks, "CPU_BYTES", budget)
    with jax.enable_x64(True):
        params, tasks = example(7)
        expected = jax.jit(mean_over_tasks(MAML, chunk=None))(params, tasks, KEY)
        actual = jax.jit(mean_over_tasks(MAML))(params, tasks, KEY)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), actual, expected)

        def task_loss(params, task):
            return MAML(params, task, KEY)[1]["loss"]

        mapped = map_over_tasks(task_loss, devices=jax.devices()[:2], chunk="auto")
        alone = jax.jit(jax.vmap(task_loss, (None, 0)))(params, tasks)
        np.testing.assert_allclose(jax.jit(mapped)(params, tasks), alone, rtol=1e-12)


def test_the_derivative_through_auto_is_that_of_all_at_once(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_BYTES", 300)
    with jax.enable_x64(True):
        params, tasks = example(3)

        def loss(params, chunk):
            return mean_over_tasks(MAML, chunk=chunk)(params, tasks, KEY)[1]["loss"]

        actual, expected = (
            jax.jit(jax.grad(loss), static_argnums=1)(params, c) for c in ("auto", None)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), actual, expected)


@pytest.mark.parametrize("memory", [350_000, 1_000_000, 10**9])
def test_on_an_accelerator_it_is_the_largest_chunk_that_fits(accelerator, memory):
    accelerator(memory)
    chunk = choose_chunk(sum_over, SHARED, TASKS)

    def temporaries(size):
        compiled = jax.jit(sum_over).lower(SHARED, TASKS[:size]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunk) <= memory
    assert chunk == len(TASKS) or temporaries(chunk + 2) > memory


def test_the_memory_of_a_chunk_is_a_share_of_all_and_not_of_what_is_free(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 990}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert chunks._memory_for_chunk() == 600


def test_without_a_word_on_memory_an_accelerator_takes_all(accelerator):
    accelerator(None)
    assert choose_chunk(sum_over, SHARED, TASKS) == len(TASKS)


def test_on_an_accelerator_it_chooses_within_jit_and_over_devices(accelerator):
    params, tasks = example(8)
    expected = jax.jit(mean_over_tasks(MAML, chunk=None))(params, tasks, KEY)
    accelerator(2000)

    @jax.jit
    def step(scale):
        # Closes over a traced array, which the chunk that is tried must not see.
        def scaled(params, task, key):
            direction, metrics = MAML(params, task, key)
            return jax.tree.map(lambda x: x * scale, direction), metrics

        grad_fn = data_parallel(mean_over_tasks(scaled), devices=jax.devices()[:2])
        return grad_fn(params, tasks, KEY)

    actual = step(jnp.float32(1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
    )


@pytest.mark.parametrize(
    ("temporaries", "expected"),
    [
        (lambda n: 10 + 5 * n, 18),  # The largest n with 10 + 5 n <= 100.
        (lambda n: 0, 64),
        (lambda n: 5 * n * n, 3),  # Foretold as 7, which would take 245.
        (lambda n: 1000 * n, 1),
        (lambda n: 60 * n, 1),
    ],
)
def test_what_is_foretold_from_two_chunks_is_halved_until_it_fits(temporaries, expected):
    assert largest_that_fits(temporaries, most=64, memory=100) == expected


def test_tasks_that_speak_to_other_devices_need_a_number(accelerator):
    accelerator(1000)

    def grad_fn(params, task, key):
        return params, {"total": jax.lax.psum(task, "tasks")}

    step = data_parallel(mean_over_tasks(grad_fn), devices=jax.devices()[:2])
    with pytest.raises(UserError, match='"auto", but the tasks speak to other devices'):
        step(jnp.zeros(2), jnp.arange(8.0), KEY)


@pytest.mark.usefixtures("ill_typed")
@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (0, "chunk is 0; give a positive number of tasks"),
        ("most", "chunk is 'most'; give a number"),
    ],
)
def test_what_is_no_chunk_is_refused(chunk, says):
    with pytest.raises(UserError, match=says):
        mean_over_tasks(MAML, chunk=chunk)
    with pytest.raises(UserError, match=says):
        map_over_tasks(lambda shared, task: task, chunk=chunk)
