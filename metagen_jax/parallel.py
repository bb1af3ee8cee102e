"""Parallelism over tasks: the only file that knows devices.

    grad_fn = data_parallel(mean_over_tasks(gradients(maml_loss(...))))
    step = train_step(grad_fn, optimizer, sample)
    state, data = replicate((init_state(params, optimizer, key), data))

One program serves them all:

- one device: no collective, and the time of `grad_fn` alone;
- a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two devices of it, and one device
  a core is often faster than one device that uses all cores;
- the GPUs or TPUs of one host: nothing to do;
- several hosts: each runs the whole program, calls `metagen_jax.hosts.start_hosts` before anything
  else of JAX, starts from the same seeds and takes the same steps. Batches drawn from a key inside
  the compiled step need nothing more, for every host draws its own share. Batches that hosts read
  are made global by `jax.make_array_from_process_local_data`.

A batch sampled under the same `jit` as `data_parallel` is sampled in parallel too: the compiler
splits the sampler as the tasks are split, and gradients and metrics stay the only communication.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree

from metagen_jax.chunks import Chunk, check_chunk, choose_chunk
from metagen_jax.errors import UserError
from metagen_jax.gradients import count_tasks, task_keys
from metagen_jax.types import Batch, GradFn, Metrics, Params

Devices = Sequence[jax.Device]
"""The devices to split over, in the order of the blocks of tasks."""

Method = Literal["shard_map", "pmap"]
"""How a function is mapped over devices: on a named mesh, or the older way."""


def data_parallel(
    grad_fn: GradFn,
    *,
    devices: Devices | None = None,
    method: Method = "shard_map",
    axis_name: str = "tasks",
) -> GradFn:
    """The mean over devices of a `GradFn`, each device having its share of the tasks.

    `g(params, batch, key) = 1/D sum_d grad_fn(params, batch[d], keys[d])`, where `batch[d]` is
    device `d`'s block of `T / D` tasks and `keys[d]` the keys of these tasks, task `t` of the whole
    batch having `fold_in(key, t)`. If `grad_fn` is itself a mean over tasks, as
    `mean_over_tasks` gives, the result is that of one device up to the order of summation.

    Gradients and metrics are averaged together, the only communication.

    A batch of examples is a batch of tasks to a loss that ignores its key. A loss that does not
    gets the keys of its examples, `(T / D,)`; one that takes a single key is lifted by
    `mean_over_tasks` over a number of shards of the batch that the devices divide, so that its
    noise does not depend on the devices.

    Args:
      grad_fn: `(params, tasks, keys) -> (direction, metrics)`, given `T / D` tasks and their keys;
        most often `mean_over_tasks(..., chunk=...)`. It may use collectives over `axis_name`.
      devices: which devices; None takes all, those of other hosts included.
      method: "shard_map" works inside and outside `jax.jit`, on one host and on several; "pmap" on
        the devices of one host, best called from the host.
      axis_name: what the axis of devices is called.

    Returns:
      A `GradFn` over a batch of `T` tasks, any pytree of arrays with leading axis `T`. Its key may
      be one key, or `T` keys, one for each task.

    Raises:
      UserError: if the devices do not divide the tasks, there is not one key for each task, there
        are no devices, `method` is unknown, or "pmap" is given the devices of another host.
    """
    devices = _list_devices(devices)

    def on_each_device(
        params: Params, batch: Batch, keys: Key[Array, " tasks"]
    ) -> tuple[Params, Metrics]:
        averages = grad_fn(params, batch, keys)
        # XLA keeps an all-reduce even among one device.
        return jax.lax.pmean(averages, axis_name) if len(devices) > 1 else averages

    if method == "shard_map":
        return _by_shard_map(on_each_device, devices, axis_name)
    if method == "pmap":
        return _by_pmap(on_each_device, devices, axis_name)
    raise UserError(f'method is {method!r}; give "shard_map" or "pmap"')


def map_over_tasks(
    task_fn: Callable[[PyTree, PyTree], PyTree],
    *,
    devices: Devices | None = None,
    chunk: Chunk = 1,
    axis_name: str = "tasks",
) -> Callable[[PyTree, PyTree], PyTree]:
    """A function of one task, for many tasks spread over devices, without communication.

    `f(shared, tasks)[t] = task_fn(shared, tasks[t])`

    Args:
      task_fn: `(shared, task) -> result`, pytrees of arrays.
      devices: as in `data_parallel`, but only of this host.
      chunk: how many tasks a device works on at once; "auto" as in `mean_over_tasks`.
      axis_name: what the axis of devices is called.

    Returns:
      `(shared, tasks) -> results`, with a leading axis of the tasks, whose number the devices need
      not divide.

    Raises:
      UserError: if `chunk` is not positive or there are no devices.
    """
    check_chunk(chunk)
    devices = _list_devices(jax.local_devices() if devices is None else devices)

    def on_each_device(shared: PyTree, tasks: PyTree) -> PyTree:
        at_once = jax.vmap(task_fn, in_axes=(None, 0))
        size = choose_chunk(at_once, shared, tasks) if chunk == "auto" else chunk
        # A batch of one would still turn every product into a batched one.
        batch_size = size if size > 1 else None
        return jax.lax.map(functools.partial(task_fn, shared), tasks, batch_size=batch_size)

    mapped = jax.shard_map(
        on_each_device,
        mesh=_mesh(devices, axis_name),
        in_specs=(PartitionSpec(), PartitionSpec(axis_name)),
        out_specs=PartitionSpec(axis_name),
        # As in `data_parallel`, for the gradients that task_fn may take.
        check_vma=False,
    )

    def over_all(shared: PyTree, tasks: PyTree) -> PyTree:
        num_tasks = count_tasks(tasks)
        # The last device works on repeats of the first tasks if there is nothing else to do.
        filled = jnp.arange(-(-num_tasks // len(devices)) * len(devices)) % num_tasks
        results = mapped(shared, jax.tree.map(lambda x: x[filled], tasks))
        return jax.tree.map(lambda x: x[:num_tasks], results)

    return over_all


def replicate(tree: PyTree, *, devices: Devices | None = None, axis_name: str = "tasks") -> PyTree:
    """The same arrays on every device, where a step over `data_parallel` leaves its outputs.

    State so placed before the first step spares it a second compilation, and data that every step
    draws from are not copied to the devices at each step. The result may share memory with `tree`.

    Args:
      tree: any pytree of arrays, the same on every host.
      devices: as in `data_parallel`.
      axis_name: as in `data_parallel`.

    Raises:
      UserError: if there are no devices.
    """
    everywhere = NamedSharding(_mesh(_list_devices(devices), axis_name), PartitionSpec())

    def place(x):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(x, everywhere)
        # Across hosts device_put takes no typed keys.
        data = jax.device_put(jax.random.key_data(x), everywhere)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))

    return jax.tree.map(place, tree)


def _by_shard_map(on_each_device: Callable, devices: Devices, axis_name: str) -> GradFn:
    split = PartitionSpec(axis_name)
    # With check_vma=True the gradient of replicated parameters would be summed over devices inside
    # grad_fn, which is right for a plain loss and silently wrong for an inner loop.
    mapped = jax.shard_map(
        on_each_device,
        mesh=_mesh(devices, axis_name),
        in_specs=(PartitionSpec(), split, split),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    @jax.jit
    def parallel_grad_fn(
        params: Params, batch: Batch, key: Key[Array, "..."]
    ) -> tuple[Params, Metrics]:
        return mapped(params, batch, _split_keys(batch, key, len(devices)))

    return parallel_grad_fn


def _by_pmap(on_each_device: Callable, devices: Devices, axis_name: str) -> GradFn:
    elsewhere = [d for d in devices if d.process_index != jax.process_index()]
    if elsewhere:
        raise UserError(
            f"{len(elsewhere)} of {len(devices)} devices belong to other hosts, which method "
            '"pmap" does not reach; use method "shard_map", or devices=jax.local_devices()'
        )
    mapped = jax.pmap(
        on_each_device, axis_name, in_axes=(None, 0, 0), out_axes=None, devices=devices
    )

    def parallel_grad_fn(
        params: Params, batch: Batch, key: Key[Array, "..."]
    ) -> tuple[Params, Metrics]:
        def blocks(x):
            return x.reshape(len(devices), -1, *x.shape[1:])

        keys = _split_keys(batch, key, len(devices))
        return mapped(params, jax.tree.map(blocks, batch), blocks(keys))

    return parallel_grad_fn


def _list_devices(devices: Devices | None) -> Devices:
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise UserError("devices is empty; give at least one device, or None for all")
    return devices


def _mesh(devices: Devices, axis_name: str) -> Mesh:
    return Mesh(np.array(devices), (axis_name,), axis_types=(AxisType.Auto,))


def _split_keys(batch: Batch, key: Key[Array, "..."], num_devices: int) -> Key[Array, " tasks"]:
    """The keys of all tasks, once it is sure that the devices divide both."""
    num_tasks = count_tasks(batch)
    if num_tasks % num_devices:
        fewer = max(n for n in range(1, num_devices) if num_tasks % n == 0)
        raise UserError(
            f"a batch of {num_tasks} tasks cannot be split evenly over {num_devices} devices; "
            f"give a multiple of {num_devices} tasks, or fewer devices, such as {fewer}"
        )
    keys = task_keys(key, num_tasks) if key.ndim == 0 else key
    if keys.shape != (num_tasks,):
        raise UserError(
            f"key has shape {keys.shape} for a batch of {num_tasks} tasks; "
            f"give one key, or keys of shape ({num_tasks},)"
        )
    return keys
