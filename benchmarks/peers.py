"""The outer step by torch.func, by a loop over tasks, by higher, TorchOpt and learn2learn.

Nets are modules with our parameters by other names. PyTorch pads a strided convolution on both
sides where JAX's "SAME" pads the far one: with images and kernels turned by 180 degrees the two are
the same sums, so that no peer pays for padding by hand.

Every step is `step() -> (loss, direction)` with the parameters and tasks bound before.
"""

# pyright: reportMissingImports=false

import functools
import importlib.machinery
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, vmap

from benchmarks.rows import Row
from metagen_jax.types import Episode, Params

Step = Callable[[], tuple[Any, dict[str, Any]]]


class Conv4(torch.nn.Module):
    """`metagen_jax.nets.conv4.Conv4`, for images `(n, c, h, w)`, turned if strided."""

    def __init__(self, num_outputs: int | None, num_filters: int, strided: bool):
        super().__init__()
        self.strided = strided
        for block in range(4):
            channels = num_filters if block else 1
            stride = 2 if strided else 1
            conv = torch.nn.Conv2d(channels, num_filters, 3, stride, padding=1)
            norm = torch.nn.BatchNorm2d(num_filters, eps=1e-3, track_running_stats=False)
            self.add_module(f"conv{block}", conv)
            self.add_module(f"norm{block}", norm)
        if num_outputs is not None:
            self.head = torch.nn.Linear(num_filters, num_outputs)

    def forward(self, x):
        for block in range(4):
            x = getattr(self, f"norm{block}")(getattr(self, f"conv{block}")(x))
            x = F.relu(x if self.strided else F.max_pool2d(x, 2))
        x = x.mean((2, 3)) if self.strided else x.permute(0, 2, 3, 1).flatten(1)
        return self.head(x) if hasattr(self, "head") else x


class MLP(torch.nn.Module):
    """`metagen_jax.nets.mlp.MLP` with ReLU and one input and output."""

    def __init__(self, hidden_sizes: tuple[int, ...]):
        super().__init__()
        for i, (before, size) in enumerate(itertools.pairwise((1, *hidden_sizes))):
            self.add_module(f"hidden{i}", torch.nn.Linear(before, size))
        self.num_hidden = len(hidden_sizes)
        self.head = torch.nn.Linear(hidden_sizes[-1], 1)

    def forward(self, x):
        for i in range(self.num_hidden):
            x = F.relu(getattr(self, f"hidden{i}")(x))
        return self.head(x)


def make_net(row: Row) -> torch.nn.Module:
    """The net of a row, with parameters of its own."""
    if row.net == "mlp":
        return MLP(row.hidden_sizes)
    outputs = None if row.learner == "prototypical" else row.ways
    return Conv4(outputs, row.num_filters, strided=row.net == "strided")


_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def params_to_torch(params: Params, turned: bool) -> dict[str, torch.Tensor]:
    """Our parameters by the names and in the layout of PyTorch's modules."""
    tensors = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params["params"]):
        module, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        x = np.asarray(x)
        if x.ndim == 4:
            x = (x[::-1, ::-1] if turned else x).transpose(3, 2, 0, 1)
        tensors[f"{module}.{_NAMES[name]}"] = torch.tensor(
            np.ascontiguousarray(x.T if x.ndim == 2 else x)
        )
    return tensors


def params_from_torch(tensors: Mapping[str, torch.Tensor], like: Params, turned: bool) -> Params:
    """The inverse of `params_to_torch`."""

    def leaf(path, _):
        module, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2:]
        x = tensors[f"{module}.{_NAMES[name]}"].detach().numpy()
        if x.ndim == 4:
            x = x.transpose(2, 3, 1, 0)
            return x[::-1, ::-1] if turned else x
        return x.T if x.ndim == 2 else x

    return jax.tree_util.tree_map_with_path(leaf, like)


def tasks_to_torch(tasks: Episode, turned: bool) -> Episode:
    """Images as `(tasks, n, c, h, w)`, integer labels; points as they are."""

    def part(inputs, targets):
        x, y = np.asarray(inputs), np.asarray(targets)
        if x.ndim == 5:
            x = (x[:, :, ::-1, ::-1] if turned else x).transpose(0, 1, 4, 2, 3)
            y = y.astype(np.int64)
        return torch.tensor(np.ascontiguousarray(x)), torch.tensor(y)

    return Episode(part(*tasks.support), part(*tasks.query))


def make_steps(row: Row, params: Params, tasks: Episode) -> dict[str, Step]:
    """Every PyTorch peer that is installed and has this learner, by name."""
    turned = row.net == "strided"
    weights = {k: v.requires_grad_() for k, v in params_to_torch(params, turned).items()}
    net = make_net(row).to(next(iter(weights.values())).dtype)
    net.load_state_dict(weights)
    batch = tasks_to_torch(tasks, turned)
    task_list = [
        Episode(*(tuple(x[t] for x in part) for part in batch)) for t in range(row.num_tasks)
    ]
    steps: dict[str, Step] = {}
    for chunk in dict.fromkeys((*row.torch_chunks, row.num_tasks)):
        name = f"torch.func, chunks of {chunk}" if chunk < row.num_tasks else "torch.func, vmap"
        steps[name] = functools.partial(_torch_func, row, net, weights, batch, chunk)
    steps["PyTorch loop"] = functools.partial(_loop, row, net, weights, task_list)
    for name, step in _LIBRARIES.items():
        if importlib.util.find_spec(name) and row.learner in step[1]:
            steps[name] = functools.partial(step[0], row, net, task_list)
    return steps


def _loss(row: Row, outputs, targets):
    return F.mse_loss(outputs, targets) if row.net == "mlp" else F.cross_entropy(outputs, targets)


def _batch_of_step(row: Row, support, i: int):
    if not row.inner_batch:
        return support
    return tuple(x[i * row.inner_batch : (i + 1) * row.inner_batch] for x in support)


def _task_loss(row: Row, net, weights, task: Episode, inner_gradient):
    """The query loss of one task and the parameters that it is taken at."""
    if row.learner == "prototypical":
        (examples, labels), (queries, targets) = task
        embedded = functional_call(net, weights, (torch.cat([examples, queries]),))
        support, query = embedded[: len(labels)], embedded[len(labels) :]
        member = (labels[:, None] == torch.arange(row.ways)).to(support.dtype)
        centres = member.T @ support / member.sum(0)[:, None]
        logits = -(query[:, None] - centres).square().sum(-1)
        return F.cross_entropy(logits, targets), weights

    def loss(weights, batch):
        return _loss(row, functional_call(net, weights, (batch[0],)), batch[1])

    for i in range(row.num_steps):
        gradients = inner_gradient(loss, weights, _batch_of_step(row, task.support, i))
        weights = {k: w - row.rate * gradients[k] for k, w in weights.items()}
    return loss(weights, task.query), weights


def _torch_func(row: Row, net, weights, batch: Episode, chunk: int):
    """All tasks, or so many at once, by `vmap` over `grad`."""

    def inner_gradient(loss, weights, batch):
        return grad(loss)(weights, batch)

    def reptile(weights, task):
        loss, adapted = _task_loss(row, net, weights, task, inner_gradient)
        return {k: weights[k] - adapted[k] for k in weights}, loss

    def query_loss(weights, task):
        return _task_loss(row, net, weights, task, inner_gradient)[0]

    one = reptile if row.learner == "reptile" else grad_and_value(query_loss)
    plain = {k: w.detach() for k, w in weights.items()}
    directions, losses = vmap(one, (None, 0), chunk_size=chunk)(plain, batch)
    return losses.mean(), {k: g.mean(0) for k, g in directions.items()}


def _loop(row: Row, net, weights, tasks: list[Episode]):
    """One task after another, by `torch.autograd.grad`."""
    second_order = row.learner == "maml"

    def inner_gradient(loss, weights, batch):
        gradients = torch.autograd.grad(
            loss(weights, batch), list(weights.values()), create_graph=second_order
        )
        return dict(zip(weights, gradients, strict=True))

    total, directions = 0.0, {k: torch.zeros_like(w) for k, w in weights.items()}
    for task in tasks:
        loss, adapted = _task_loss(row, net, weights, task, inner_gradient)
        if row.learner == "reptile":
            each = [w - adapted[k] for k, w in weights.items()]
        else:
            each = torch.autograd.grad(loss, list(weights.values()))
        for k, g in zip(weights, each, strict=True):
            directions[k] += g.detach() / len(tasks)
        total += loss.detach() / len(tasks)
    return total, directions


def _collect(net, losses):
    """What `backward` has left in the parameters, which it clears."""
    direction = {k: p.grad for k, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = None
    return sum(losses), direction


def _higher(row: Row, net, tasks: list[Episode]):
    import higher

    optimizer, losses = torch.optim.SGD(net.parameters(), row.rate), []
    for support, query in tasks:
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
            for _ in range(row.num_steps):
                inner.step(_loss(row, fast(support[0]), support[1]))
            loss = _loss(row, fast(query[0]), query[1]) / len(tasks)
            loss.backward()
        losses.append(loss.detach())
    return _collect(net, losses)


def _torchopt(row: Row, net, tasks: list[Episode]):
    import torchopt

    inner, losses = torchopt.MetaSGD(net, lr=row.rate), []
    names = [k for k, _ in net.named_parameters()]
    leaves = list(net.parameters())
    start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
    inner_start = torchopt.extract_state_dict(inner, by="reference")
    for support, query in tasks:
        for _ in range(row.num_steps):
            inner.step(_loss(row, net(support[0]), support[1]))
        loss = _loss(row, net(query[0]), query[1]) / len(tasks)
        loss.backward()
        losses.append(loss.detach())
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(inner, inner_start)
    direction = {k: p.grad for k, p in zip(names, leaves, strict=True)}
    for p in leaves:
        p.grad = None
    return sum(losses), direction


def _learn2learn(row: Row, net, tasks: list[Episode]):
    maml = _import_learn2learn().MAML(net, lr=row.rate, first_order=row.learner == "reptile")
    moved = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    losses = []
    for support, query in tasks:
        fast = maml.clone()
        for i in range(row.num_steps):
            inputs, targets = _batch_of_step(row, support, i)
            fast.adapt(_loss(row, fast(inputs), targets))
        loss = _loss(row, fast(query[0]), query[1]) / len(tasks)
        losses.append(loss.detach())
        if row.learner == "maml":
            loss.backward()
            continue
        for (k, start), end in zip(net.named_parameters(), fast.parameters(), strict=True):
            moved[k] += (start - end).detach() / len(tasks)
    return _collect(net, losses) if row.learner == "maml" else (sum(losses), moved)


@functools.cache
def _import_learn2learn():
    """Its module of MAML without the package's own imports, of gym and torchvision."""
    spec = importlib.util.find_spec("learn2learn")
    assert spec is not None
    assert spec.submodule_search_locations
    root = spec.submodule_search_locations[0]
    for name, path in (("learn2learn", root), ("learn2learn.algorithms", f"{root}/algorithms")):
        package = types.ModuleType(name)
        package.__path__, package.__spec__ = [path], importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = package
    return importlib.import_module("learn2learn.algorithms.maml")


_LIBRARIES = {
    "higher": (_higher, ("maml",)),
    "torchopt": (_torchopt, ("maml",)),
    "learn2learn": (_learn2learn, ("maml", "reptile")),
}
