"""The data-parallel step that anyone would write in plain jax, with nothing of txcore."""

import jax
import jax.numpy as jnp
import numpy as np
import worker
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def compute_logits(params, images):
    x = images
    for name in ("conv0", "conv1"):
        x = lax.conv_general_dilated(
            x, params[f"{name}/w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[f"{name}/b"])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["dense2/w"] + params["dense2/b"])
    return x @ params["dense3/w"] + params["dense3/b"]


def loss_of(params, images, labels):
    log_probabilities = jax.nn.log_softmax(compute_logits(params, images))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def train_step(params, momentum, images, labels):
    loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
    grads = jax.tree.map(lambda g: g / lax.axis_size("data"), lax.psum(grads, "data"))
    momentum = jax.tree.map(lambda m, g: worker.MOMENTUM * m + g, momentum, grads)
    params = jax.tree.map(lambda p, m: p - worker.LEARNING_RATE * m, params, momentum)
    return params, momentum, lax.pmean(loss, "data")


def main() -> None:
    """Serve steps."""
    args = worker.parse_arguments()
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{args.ports[0]}", args.processes, args.rank)
    else:
        jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jax.jit(
        jax.shard_map(
            train_step,
            mesh=mesh,
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=False,  # else jax would sum the gradients once more by itself
        ),
        donate_argnums=(0, 1),
    )

    def place_batch(host, sharding):
        return jax.make_array_from_process_local_data(sharding, host)

    params = {k: place_batch(v, everywhere) for k, v in worker.load_weights(args.weights).items()}
    momentum = jax.tree.map(jnp.zeros_like, params)

    def run_steps(batch):
        nonlocal params, momentum
        params, momentum, loss = step(params, momentum, *batch)
        return loss

    batches = [tuple(place_batch(x, sharded) for x in pair) for pair in worker.load_batches(args)]
    # Two devices of one process share two threads: with fifty steps under way, jax 0.10 once had
    # both wait in collectives of different steps.
    worker.serve_requests(args, run_steps, batches, {"jax": jax.__version__}, ahead=1)


if __name__ == "__main__":
    main()
