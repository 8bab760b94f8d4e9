"""TensorFlow's MultiWorkerMirroredStrategy, or MirroredStrategy on devices of one process."""

import json
import os

import numpy as np
import tensorflow as tf
import worker


def strategy_of(args):
    """Return the strategy of this process."""
    tf.config.threading.set_intra_op_parallelism_threads(args.devices)
    tf.config.threading.set_inter_op_parallelism_threads(args.devices)
    if args.processes == 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * args.devices
        tf.config.set_logical_device_configuration(cpu, logical)
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(args.devices)])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in args.ports]}
    task = {"type": "worker", "index": args.rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    options = tf.distribute.experimental.CommunicationOptions(implementation=ring)
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def logits_of(params, images):
    """Return the logits of images [n, 28, 28, 1]."""
    x = images
    for name in ("conv0", "conv1"):
        x = tf.nn.conv2d(x, params[f"{name}/w"], 1, "SAME")
        x = tf.nn.relu(tf.nn.bias_add(x, params[f"{name}/b"]))
        x = tf.nn.max_pool2d(x, 2, 2, "VALID")
    x = tf.reshape(x, (-1, 3136))
    x = tf.nn.relu(tf.nn.bias_add(tf.matmul(x, params["dense2/w"]), params["dense2/b"]))
    return tf.nn.bias_add(tf.matmul(x, params["dense3/w"]), params["dense3/b"])


def make_step(strategy, weights, xla):
    """Return the compiled step: (images, labels) -> loss of this replica."""
    with strategy.scope():
        params = {k: tf.Variable(v) for k, v in weights.items()}
        momentum = {k: tf.Variable(np.zeros_like(v)) for k, v in weights.items()}

    def gradients(images, labels):
        with tf.GradientTape() as tape:
            logits = logits_of(params, images)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        return loss, tape.gradient(loss, list(params.values()))

    def update(variable, slot, grad):
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=slot.handle,
            lr=worker.LEARNING_RATE,
            grad=grad,
            momentum=worker.MOMENTUM,
        )

    def apply(strategy, grads):
        mean = tf.distribute.ReduceOp.MEAN
        pairs = list(zip(grads, params.values(), strict=True))
        reduced = strategy.extended.batch_reduce_to(mean, pairs)
        for key, grad in zip(params, reduced, strict=True):
            strategy.extended.update(params[key], update, args=(momentum[key], grad))

    compute = tf.function(gradients, jit_compile=True) if xla else gradients

    def replica_step(images, labels):
        loss, grads = compute(images, labels)
        tf.distribute.get_replica_context().merge_call(apply, args=(grads,))
        return loss

    @tf.function
    def step(images, labels):
        return strategy.run(replica_step, args=(images, labels))

    return step


def main() -> None:
    """Serve steps."""
    args = worker.parse_arguments()
    strategy = strategy_of(args)
    step = make_step(strategy, worker.load_weights(args.weights), xla=args.form == "xla")

    def place(array):
        """Split an array among the replicas of this process."""
        parts = np.split(array, args.devices)

        def part(context):
            return tf.constant(parts[context.replica_id_in_sync_group % args.devices])

        return strategy.experimental_distribute_values_from_function(part)

    def mean(loss):
        return float(np.mean([x.numpy() for x in strategy.experimental_local_results(loss)]))

    batches = [(place(images), place(labels)) for images, labels in worker.load_batches(args)]
    worker.serve_requests(
        args, lambda batch: step(*batch), batches, {"tensorflow": tf.__version__}, mean
    )


if __name__ == "__main__":
    main()
