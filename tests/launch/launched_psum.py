"""Sum over all devices by plain jax, told by the environment alone, and print what came out."""

import os

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    os.environ["JAX_COORDINATOR_ADDRESS"],
    int(os.environ["JAX_NUM_PROCESSES"]),
    int(os.environ["JAX_PROCESS_ID"]),
    initialization_timeout=60,
)
mesh = Mesh(np.array(jax.devices()), ("data",))
own = np.float32([10.0 ** jax.process_index()] * jax.local_device_count())
sharding = jax.sharding.NamedSharding(mesh, P("data"))
x = jax.make_array_from_process_local_data(sharding, own, (mesh.size,))
total = jax.shard_map(
    lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
)
print(jax.process_index(), jax.local_device_count(), np.asarray(jax.jit(total)(x)).tolist())
