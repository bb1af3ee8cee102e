"""Pure JAX functions for meta-learning, self-supervised learning and generative models.

`metagen_jax.types` holds the contract. Whatever needs more than JAX, flax, optax and NumPy is
imported only when it is used.
"""

from metagen_jax.gradients import gradients as gradients
from metagen_jax.gradients import mean_over_tasks as mean_over_tasks
from metagen_jax.gradients import task_keys as task_keys
from metagen_jax.meta.adapt import Adapted as Adapted
from metagen_jax.meta.adapt import adapt as adapt
from metagen_jax.meta.maml import maml_loss as maml_loss
from metagen_jax.meta.maml import maml_predict as maml_predict
from metagen_jax.parallel import data_parallel as data_parallel
from metagen_jax.supervised import cross_entropy_loss as cross_entropy_loss
from metagen_jax.supervised import squared_error_loss as squared_error_loss
from metagen_jax.types import Episode as Episode
from metagen_jax.types import GradFn as GradFn
from metagen_jax.types import LossFn as LossFn
from metagen_jax.types import MetaParams as MetaParams
