"""The train state: everything that a run is a function of, as one pytree."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from txcore.collectives import vary
from txcore.layout import same_structure, split_axes
from txcore.parallel import local_sgd, zero
from txcore.parallel.gradients import sync_gradients
from txcore.printing import describe_scalar, describe_tree
from txcore.step_scope import StepScope, current_scope
from txcore.train.numerics import loss_scale, prng
from txcore.train.numerics.loss_scale import LossScaling
from txcore.train.numerics.precision import Precision
from txcore.train.state.changes import check_field
from txcore.train.state.claims import check_gradients
from txcore.train.state.owner import NOBODY, Owner, Runner


@dataclass(frozen=True)
class TrainState:
    """Hold parameters, optimizer state, step count and seed; immutable.

    `engine.create_state` makes it. A step receives it, and returns the one that
    `apply_gradients` made. The state that is passed to a step is donated: keep only the one
    that comes back.

    As a tree it holds its arrays alone: `jax.tree.map` takes states of two engines together, and
    returns one of the first's. What `jax.jit` or pickle returns is a state without an engine, which
    `engine.run` takes.
    """

    step: jax.Array  # int32 scalar: completed updates, skipped ones left out
    stored_params: Any  # as stored; `params` is the view for differentiation
    opt_state: Any
    seed: jax.Array  # uint32 scalar
    extra: Any  # model state that is not trained
    loss_scaling: LossScaling | None  # None but in float16 and where steps are skipped
    comm_state: Any = None  # what a plan's communication keeps from step to step; None if nothing
    owner: Owner = field(default=NOBODY, repr=False)
    # The fields that are known to be equal on all ranks (agreement.py).
    known_equal: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)
    # What `steps.py` calls its structure, shapes and dtypes; known of what it made itself.
    form: int | None = field(default=None, init=False, repr=False, compare=False)
    # What this process was given and holds a part of alone, to be compared on all ranks.
    given: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    # Of what a step returned: its fields with arrays, and those that its next one will have too.
    returned: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)
    lasting: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.owner) is not Owner:
            return
        if isinstance(self.step, jax.core.Tracer):
            # jax.jit outside of a step: it keeps what it traced for states of any engine.
            object.__setattr__(self, "owner", NOBODY)
        elif self.owner is not NOBODY:
            object.__setattr__(self, "_engine", self.owner.engine)  # the owner's is a weak one

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_ARRAYS, "owner")}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        vars(self).update(fields, form=None, given=())
        self.__post_init__()

    def made_of(self, given: Iterable[str]) -> "TrainState":
        """Return the state itself, which then knows what it was made of."""
        vars(self)["given"] = tuple(given)
        return self

    def with_arrays(self, arrays: dict[str, Any]) -> "TrainState":
        """Return the state with other arrays of the same shapes and dtypes; no tree is walked."""
        lasting = self.lasting
        if lasting is None:
            own = (*_ARRAYS, "known_equal", "returned")
            lasting = {name: value for name, value in vars(self).items() if name not in own}
        new = object.__new__(TrainState)
        fields = lasting | arrays
        fields["returned"], fields["lasting"] = arrays, lasting
        object.__setattr__(new, "__dict__", fields)  # the fields one by one take twice as long
        return new

    @property
    def engine(self) -> Runner:
        """The engine that made the state.

        Raises:
          RuntimeError: it has none, since `jax.jit` or pickle returned it, or the engine is gone.
        """
        engine = self.owner.engine
        if engine is None:
            raise RuntimeError(
                "this needs a state with an engine, got one that jax.jit or pickle returned, or "
                "whose engine is gone: run it by engine.run(step, state, batch), whose new state "
                "has one"
            )
        return engine

    def __repr__(self) -> str:
        shown = [f"step={describe_scalar(self.step)}"]
        for name, tree in self.arrays.items():
            if name not in ("step", "seed") and tree is not None:
                shown.append(f"{name}={describe_tree(tree)}")
        return f"TrainState({', '.join(shown)})"

    @property
    def arrays(self) -> dict[str, Any]:
        """The fields that hold arrays, by name: the state without its owner."""
        return {name: getattr(self, name) for name in _ARRAYS}

    @property
    def params(self) -> Any:
        """The parameters; inside a step, typed as varying where their gradients are reduced.

        That is along the data axes. So gradients with respect to them come out local, for the
        step to reduce once. Of a parameter that `Plan(params=)` splits it is this device's part.
        What `DP(shard="parameters")` splits is gathered here, wherever the step uses it; of what
        `tx.value_and_grad` is given, it gathers the parts itself, inside of what it differentiates.
        In a training step of local SGD (`DP(sync_every=)`) they are those that this device trains.
        """
        scope = current_scope()
        if scope is None:
            return self.stored_params
        params = self.stored_params
        if scope.rounds is not None:
            params = local_sgd.own_params(params, self.comm_state[local_sgd.KEY])
        if not same_structure(params, scope.layouts):
            return vary(params, scope.data_axes, name="params")
        return zero.as_views(params, scope)

    @property
    def shards(self) -> Any:
        """The parameters inside a step, as handles that `tx.zero` gathers a layer at a time.

        A tree like `params`, with a `tx.zero.Shard` for each parameter of which
        `DP(shard="parameters")` has this device keep its part; under other plans `params` itself.

        Raises:
          RuntimeError: called outside a step.
        """
        scope = _scope_of("shards")
        if scope.rounds is not None:
            return self.params
        return zero.as_shards(self.stored_params, scope.layouts)

    @property
    def precision(self) -> Precision:
        """The engine's precision policy."""
        return self.engine.precision

    @property
    def loss_scale(self) -> jax.Array | None:
        """What `tx.value_and_grad` needs as its loss_scale; a float32 scalar, None but in float16.

        `state.loss_scaling` has the counts of good and of skipped steps with it.
        """
        if self.loss_scaling is None or self.precision.scaling is None:
            return None
        return self.loss_scaling.scale

    @property
    def key(self) -> jax.Array:
        """The random key of this step, the same on every device.

        Use it for what is the same on every device: noise on the parameters, a choice that all
        examples share. A mask or noise of local examples that is drawn from it would be the
        same on every device too, the first example's that of the first one of each other device:
        draw those by `example_keys`, or else from `device_key()`. A step that does so gets a
        warning when it is compiled.

        Example:
          >>> @tx.step_fn
          ... def step(state, batch):
          ...     noisy = state.params + 0.1 * jax.random.normal(state.key)  # one noise for all
          ...     return state.replace(step=state.step + 1), {"w": tx.pmean(noisy, "data")}
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
          ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
          >>> _, metrics = step(engine.create_state(np.float32(1)), np.zeros(4))
        """
        return prng.step_key(self.seed, self.step)

    def device_key(self) -> jax.Array:
        """Return the random key of this step and this data shard, another one on each.

        What a model that takes one key for its whole batch needs, as flax's and equinox's dropout
        do. What is drawn from it depends on how the batch is sharded: it is as random on any
        number of devices, and the same on none. `example_keys` gives numbers that are the same
        under every plan.

        Returns:
          A scalar typed key that varies along the plan's data axes (its context axis too), and is
          the same along others: devices that share tokens share it.

        Raises:
          RuntimeError: called outside a step.

        Example:
          >>> @tx.step_fn
          ... def step(state, batch):
          ...     mask = jax.random.bernoulli(state.device_key(), 0.5, batch.shape)
          ...     kept = tx.psum(mask.sum(), "data")
          ...     return state.replace(step=state.step + 1), {"kept": kept}
          >>> engine = tx.Engine(mesh=tx.MeshSpec(jax.devices()[:2]), optimizer=tx.optim.sgd(0.1),
          ...                    plan=tx.Plan(data_parallel=tx.DP("data")))
          >>> _, metrics = step(engine.create_state(np.float32(1)), np.zeros(4))
        """
        return prng.device_key(self.key, _scope_of("device_key").data_axes)

    def replace(self, **changes: Any) -> "TrainState":
        """Return a copy with some fields changed (`extra=`, for example).

        Outside of a step, arrays and numbers of the host are copied to the mesh.

        Raises:
          TypeError: there is no such field, or a leaf is no array.
          ValueError: parameters, or what is kept for them (all fields but `extra`), of another
            structure or shape than those that are trained.
        """
        if unknown := sorted(set(changes) - set(_ARRAYS)):
            raise TypeError(
                f"state.replace knows the fields {', '.join(_ARRAYS)}, got {', '.join(unknown)}"
                + (": write stored_params=" if "params" in unknown else "")
            )
        if current_scope() is None:
            checked = {k: check_field(k, getattr(self, k), new) for k, new in changes.items()}
            engine = self.owner.engine  # without one it is placed when an engine takes the state
            changes |= checked if engine is None else engine.place(checked, self)
        new = replace(self, **changes)
        if self.known_equal:
            kept = {k: v for k, v in self.known_equal.items() if k not in changes}
            vars(new)["known_equal"] = kept
        return new

    def example_keys(self, batch: Any) -> jax.Array:
        """Return one random key for each example of `batch`, the same under every plan.

        Args:
          batch: the batch that the step was given, whole: to train in microbatches, make the
            keys first and split them like the batch.

        Returns:
          Typed keys of shape (batch,), a function of the run's seed, the step, and the
          example's place in the global batch. The devices that share an example's tokens
          (`Plan(context=)`) have the same ones: draw for tokens by `tx.context.token_keys`.

        Raises:
          ValueError: `batch` holds no leaf with one row for each example of this device.
          RuntimeError: called outside a step.
        """
        scope = _scope_of("example_keys")
        prng.check_whole_batch(batch, scope.examples)
        return prng.example_keys(self.key, scope.examples, scope.row_axes)

    def sync_gradients(self, grads: Any, *, name: str = "grads") -> tuple[Any, "TrainState"]:
        """Reduce local gradients as the plan says: their mean over its data axes.

        The gradient of a parameter that is stored in parts is that of this device's part, and is
        averaged with those of the devices that hold the same part. Local SGD (`DP(sync_every=)`)
        sends nothing: it averages parameters, in `apply_gradients`.

        Args:
          grads: pytree like `params`, local to each device; of another structure, all of it is
            averaged over the data axes.
          name: label of the operations' tags.

        Returns:
          The reduced gradients, and the state to go on with.

        Raises:
          ValueError: a leaf is reduced already.
          RuntimeError: called outside a step.
        """
        scope = _scope_of("sync_gradients")
        if scope.rounds is not None or (not scope.data_axes and self.comm_state is None):
            return grads, self
        # Over one device nothing is sent, but what was left over on more of them is added.
        grads = zero.parts_of(grads)
        layouts = None
        if same_structure(grads, scope.layouts):
            layouts = zero.yet_to_reduce(grads, scope)
        options = {"layouts": layouts, "comm_state": self.comm_state, **scope.sync_options}
        grads, comm_state = sync_gradients(grads, scope.data_axes, **options, name=name)
        return grads, self.replace(comm_state=comm_state)

    def apply_gradients(self, *, grads: Any) -> "TrainState":
        """Update the parameters with reduced gradients.

        In float16, and in an engine with on_nonfinite="skip", gradients that are not all finite
        update nothing: parameters, optimizer state and `step` (so the learning rate too) stay as
        they are, the loss scale of float16 shrinks, and
        `loss_scaling.skipped_steps` counts one more. The engine then undoes whatever else the
        step changed, `extra` for one. Gradients are reduced by now, so all devices agree
        without a collective; where the plan stores parameters in parts, or each device trains its
        own (`DP(sync_every=)`), by one of a scalar.

        Args:
          grads: pytree like `params`; each leaf laid out as the plan says (`Plan.layouts`): the
            same on every device, or of a parameter that is stored in parts this device's part.
            Under `DP(sync_every=)` they are local. Those of `tx.value_and_grad` are unscaled.

        Returns:
          The state after the update, one step further.

        Raises:
          ValueError: a leaf is missing or has another shape. When the step is compiled: a leaf
            differs along an axis along which its parameter does not (a forgotten reduction).
          RuntimeError: called outside a step.
        """
        scope = _scope_of("apply_gradients")
        optimizer = self.engine.optimizer
        per_example = optimizer.per_example
        grads = check_gradients(grads, self.stored_params, scope, per_example=per_example)
        if scope.rounds is None:
            params, opt_state = zero.update(
                *(optimizer, grads, self.opt_state, self.stored_params, scope.layouts),
                step=self.step,
            )
            changed = {"stored_params": params, "opt_state": opt_state}
        else:
            kept = self.comm_state[local_sgd.KEY]
            params, kept = local_sgd.update_local(
                scope.rounds, optimizer, grads, self.stored_params, kept, self.step
            )
            changed = {"stored_params": params, "comm_state": {local_sgd.KEY: kept}}
        new = self.replace(step=self.step + 1, **changed)
        if self.loss_scaling is None:
            return new
        differing = tuple(sorted({*split_axes(scope.layouts), *scope.own_axes}))
        policy, culprit = self.precision.scaling, loss_scale.first_nonfinite(grads, differing)
        scaling = loss_scale.advance(1.0 if policy is None else policy, self.loss_scaling, culprit)
        return loss_scale.select(culprit < 0, new, self).replace(loss_scaling=scaling)


_ARRAYS = ("step", "stored_params", "opt_state", "seed", "extra", "loss_scaling", "comm_state")
jax.tree_util.register_dataclass(TrainState, data_fields=_ARRAYS, meta_fields=("owner",))


def _scope_of(method: str) -> StepScope:
    scope = current_scope()
    if scope is None:
        raise RuntimeError(
            f"state.{method} needs to be called inside a step decorated with @tx.step_fn, which "
            "an engine runs"
        )
    return scope
