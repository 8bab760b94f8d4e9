"""Copies that have to be equal bit for bit: compared on the devices of one process, and in fit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.launch import MismatchError, preflight
from txcore.train.replicas import agreement, digests

DTYPES = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.int4,
    np.int8,
    np.uint16,
    np.int32,
    np.complex64,
    np.bool_,
]


def mesh(shape=(4,), axes=("data",)):
    return tx.MeshSpec(devices=jax.devices()[: np.prod(shape)], axes=axes, shape=shape).mesh


def numbers(dtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return (3 * rng.normal(size=shape)).astype(dtype)


def flipped(host, bit):
    """Return a copy with one bit of its memory flipped."""
    host = np.array(host)
    host.reshape(-1).view(np.uint8)[bit // 8] ^= np.uint8(1 << bit % 8)
    return host


WHOLE = P()


def laid_out(host, on, spec=WHOLE, change=None, device=2):
    """Place an array on a mesh, one device's copy or part changed."""
    sharding = NamedSharding(on, spec)
    parts = []
    for where, index in sharding.addressable_devices_indices_map(host.shape).items():
        part = np.array(host[index])
        if change is not None and where.id == device:
            part = change(part)
        parts.append(jax.device_put(part, where))
    return jax.make_array_from_single_device_arrays(host.shape, sharding, parts)


def texts(tree, on):
    return [str(found) for found in digests.find_differences(tree, on)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("size", [1, 300, digests.SMALL + 1])
def test_a_bit_of_any_dtype(dtype, size):
    on, host = mesh(), numbers(dtype, (size,))
    other = laid_out(host, on)
    assert texts({"w": laid_out(host, on), "other": other}, on) == []
    bits = 8 * np.dtype(dtype).itemsize
    # Where an element has less bits than its memory, the lowest is one of them.
    tried = {0, bits * (size - 1), bits * (size // 2) + (bits - 1 if bits > 8 else 0)}
    for bit in tried:
        changed = laid_out(host, on, change=lambda part, bit=bit: flipped(part, bit))
        (text,) = texts({"w": changed, "other": other}, on)
        assert text == f"w {host.dtype.name}[{size}]: device 2 differs from devices 0, 1 and 3"


def test_each_bit_of_a_small_leaf():
    on, host = mesh((2,)), numbers(np.float32, (3,))
    for bit in range(8 * host.nbytes):
        changed = laid_out(host, on, change=lambda part, bit=bit: flipped(part, bit), device=1)
        assert texts({"w": changed}, on) == ["w float32[3]: device 1 differs from device 0"]


def test_200_random_bits_of_a_large_leaf():
    host = numbers(np.float32, (300, 301))
    fold = jax.jit(digests.fold_leaf)
    plain = np.asarray(fold(host))
    rng = np.random.default_rng(1)
    for bit in rng.integers(0, 8 * host.nbytes, 200):
        assert (np.asarray(fold(flipped(host, int(bit)))) != plain).any()


def test_elements_that_change_places_in_a_large_leaf():
    """A plain sum would miss these; floats of few digits have many zeros at their ends."""
    rng = np.random.default_rng(2)
    host = rng.integers(-2, 3, 100_000).astype(np.float32)
    fold = jax.jit(digests.fold_leaf)
    plain = np.asarray(fold(host))
    for _ in range(200):
        i, j = rng.integers(0, host.size, 2)
        swapped = host.copy()
        swapped[[i, j]] = swapped[[j, i]]
        same = (np.asarray(fold(swapped)) == plain).all()
        assert same == (host[i] == host[j])
    for other in (host[::-1], np.roll(host, 1), -host, np.roll(host, host.size // 32)):
        assert (np.asarray(fold(other)) != plain).any()


def test_what_is_equal_bit_for_bit_is_equal():
    on = mesh((2,))
    nan = np.array([0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    assert texts({"w": laid_out(nan, on)}, on) == []
    other = np.array([0x7FC00002, 0xFFC00000], np.uint32).view(np.float32)
    zero = np.zeros(2, np.float32)
    for host, change in ((nan, other), (zero, -zero)):
        changed = laid_out(host, on, change=lambda part, change=change: change, device=1)
        assert len(texts({"w": changed}, on)) == 1


def test_parts_of_a_leaf_are_compared_with_their_copies_alone():
    on = mesh((2, 2), ("data", "model"))
    host = numbers(np.float32, (8, 4))

    def one(spec):
        changed = laid_out(host, on, spec, lambda part: flipped(part, 5), device=3)
        assert texts({"w": laid_out(host, on, spec)}, on) == []
        return texts({"w": changed, "whole": laid_out(host, on)}, on)

    assert one(P("data")) == ["w float32[8,4]: device 3 differs from device 2"]
    assert one(P(None, "model")) == ["w float32[8,4]: device 3 differs from device 1"]
    assert one(P()) == ["w float32[8,4]: device 3 differs from devices 0, 1 and 2"]
    assert one(P("data", "model")) == []  # nobody has a copy


def test_keys_empty_leaves_and_leaves_of_the_host():
    on = mesh((2,))
    whole = NamedSharding(on, P())
    tree = {
        "key": jax.device_put(jax.random.key(3), whole),
        "empty": jax.device_put(np.zeros((0, 3), np.float32), whole),
        "numpy": np.arange(3),
        "elsewhere": jnp.arange(3),
        "number": 3,
    }
    assert texts(tree, on) == []
    assert texts({}, on) == []


def test_many_leaves_are_cut():
    on, host = mesh((2,)), numbers(np.float32, (3,))
    changed = laid_out(host, on, change=lambda part: flipped(part, 0), device=1)
    assert len(texts({f"w{i}": changed for i in range(20)}, on)) == digests.MOST_LEAVES


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


@pytest.mark.parametrize(
    "groups, text",
    [
        (([0, 1, 4, 5], [8, 9]), "rank 2 differs from ranks 0 and 1 (devices 8 and 9)"),
        (([0, 1, 4], [5]), "device 5 of rank 1 differs from devices 0, 1 and 4"),
        (([0], [4], [8]), "ranks 1 and 2 differ from rank 0 (devices 4 and 8)"),
    ],
)
def test_ranks_are_named_where_all_their_devices_agree(groups, text, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    devices = tuple(tuple(Device(i, i // 4) for i in group) for group in groups)
    assert str(digests.Difference("w float32[3]", devices)) == f"w float32[3]: {text}"


def broken_at(step, odd_device=1):
    """Return an evaluation that changes a bit of one device's copy after so many steps."""
    seen = []

    def evaluate(state):
        seen.append(None)
        if len(seen) == step:
            leaf = state.stored_params["w1"]
            state.stored_params["w1"] = laid_out(
                np.asarray(leaf), leaf.sharding.mesh, P(), lambda part: flipped(part, 3), odd_device
            )
        return {}

    return evaluate


@pytest.mark.parametrize("every, found", [(1, (4, 3)), (3, (6, 3)), (5, (5, 0))])
def test_fit_names_leaf_device_and_the_first_step_seen(every, found):
    engine = toys.engine(4)
    state = engine.create_state(toys.params(), extra={"nan": np.float32(np.nan)})
    with pytest.raises(MismatchError) as refused:
        engine.fit(
            toys.train_step,
            state,
            [toys.batch()],
            steps=8,
            evaluate=broken_at(4),
            eval_every=1,
            check_replicas_every=every,
        )
    assert str(refused.value) == (
        "copies of the state that have to be equal bit for bit differ after step "
        f"{found[0]}; after step {found[1]} they were equal:\n"
        "  stored_params['w1'] float32[4,8]: device 1 differs from devices 0, 2 and 3\n"
        "What writes into one copy alone, a step whose result depends on its device, or damaged "
        "memory does that. Go on from a checkpoint of the time before, and see engine.audit and "
        "tx.testing.assert_plans_agree"
    )


def test_a_state_whose_copies_differ_before_the_first_step():
    engine = toys.engine(2)
    state = engine.create_state(toys.params())
    broken_at(1)(state)
    with pytest.raises(MismatchError, match=r"^copies .* differ after step 0:\n"):
        engine.fit(toys.train_step, state, [toys.batch()], steps=1, check_replicas_every=1)
    with pytest.raises(MismatchError, match=r"^copies of the .* bit for bit differ:\n  stored_pa"):
        engine.check_replicas(state)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_comparison_changes_nothing(devices, precision):
    @tx.step_fn
    def step(state, batch):
        loss, grads = tx.value_and_grad(
            lambda params: toys.local_loss(state.precision.cast(params), batch),
            loss_scale=state.loss_scale,
        )(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    def run(**options):
        engine = toys.engine(devices, precision=precision, optimizer=tx.optim.adamw(0.01))
        state = engine.create_state(toys.params(), {"n": np.int32(1), "nan": np.float32(np.nan)})
        return engine.fit(step, state, [toys.batch()], steps=5, **options).arrays

    jax.tree.map(np.testing.assert_array_equal, run(), run(check_replicas_every=2))


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "2"])
def test_a_number_of_steps_that_is_none(given):
    engine = toys.engine(1)
    text = f"fit needs check_replicas_every= a count of steps from 1 on, got {given!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        engine.fit(
            toys.train_step,
            engine.create_state(toys.params()),
            [toys.batch()],
            steps=1,
            check_replicas_every=given,
        )


def test_one_process_has_nobody_to_send_to():
    engine = toys.engine(2)
    state = engine.create_state(toys.params(), broadcast_from=0)
    np.testing.assert_array_equal(state.stored_params["w1"], toys.params()["w1"])
    for rank in (1, -1, None.__class__, "0", 0.0, True):
        with pytest.raises(ValueError, match=r"^create_state needs broadcast_from= a rank from 0 "):
            engine.create_state(toys.params(), broadcast_from=rank)


def test_sending_is_declared_and_accounted_for():
    engine = toys.engine(4)
    state = engine.create_state(toys.params(), {"seen": np.zeros(3, bool)})
    report = engine.audit_broadcast(state)
    assert (report.ok, report.exact) == (True, True)
    assert {c.kind for c in report.collectives} == {"all-reduce"}
    assert {c.origin for c in report.collectives} == {"txcore"}
    # Each element is sent as words of 32 bits: w1, w2, seen, step, seed.
    assert report.payload_bytes == 4 * (32 + 8 + 3 + 1 + 1)
    with pytest.raises(ValueError, match=r"^this engine runs states that its create_state made"):
        engine.audit_broadcast(toys.engine(4).create_state(toys.params()))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_bit_of_the_root_is_sent(dtype):
    on = mesh()
    host = np.random.default_rng(0).integers(0, 256, 64, np.uint8)
    if dtype == np.bool_ or dtype == ml_dtypes.int4:
        host = host % 2
    host = host.view(dtype) if dtype != ml_dtypes.int4 else host.astype(dtype)
    rows = np.stack([np.zeros_like(host), host, *[numbers(dtype, host.shape, i) for i in (1, 2)]])
    given = jax.device_put(rows, NamedSharding(on, P("data")))
    sent = digests.sending_program(on, 1)({"w": given})["w"]
    assert sent.dtype == host.dtype
    for shard in sent.addressable_shards:
        assert np.asarray(shard.data).tobytes() == host.tobytes()


def test_typed_keys_are_sent_as_such():
    keys = jax.random.split(jax.random.key(3), 2)
    sent = digests.send_from({"keys": keys, "w": np.float32([-0.0])}, mesh((2,)), 0)
    assert sent["keys"].dtype == keys.dtype
    assert (jax.random.key_data(sent["keys"]) == jax.random.key_data(keys)).all()
    assert np.signbit(np.asarray(sent["w"]))


def test_a_state_is_known_by_its_fields():
    state = toys.engine(1).create_state(toys.params(), {"n": np.float32(0)})
    assert not agreement.is_equal(state)
    agreement.note_equal(state)
    assert agreement.is_equal(state)
    assert agreement.is_equal(state.replace(extra=state.extra).replace(step=state.step)) is False
    assert agreement.is_equal(state.replace()) is True
    assert not agreement.is_equal(state.replace(extra={"n": np.float32(1)}))
    assert not agreement.is_equal(jax.tree.map(jnp.copy, state))


def test_what_of_an_engine_is_compared():
    lines = agreement.describe_engine(toys.engine(2, precision="float16")._options)
    assert [line.partition("=")[0] for line in lines] == [
        "mesh",
        "plan",
        "optimizer",
        "precision",
        "on_nonfinite",
        "compiler_options",
    ]
    assert lines[2] == "optimizer=txcore.optim.sgd.sgd"
    assert lines == agreement.describe_engine(toys.engine(2, precision="float16")._options)
    assert not any("0x" in line for line in lines)


@pytest.mark.parametrize("sized", [True, False])
def test_what_of_a_loop_is_compared(sized, monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(preflight, "check", lambda name, facts, **_: told.update(facts))
    data = [1, 2, 3] if sized else iter([1])
    checkpoints = tx.Checkpoints(tmp_path, every=4, keep=2)
    agreement.check_fit(
        toys.engine(1)._options, data, evaluate=print, checkpoints=checkpoints, steps=7, epochs=None
    )
    assert told["arguments of fit"] == [
        "steps=7",
        "epochs=None",
        "evaluate=given",
        f"batches in data: {3 if sized else 'not known'}",
        "checkpoints.every=4",
        "checkpoints.keep=2",
        "checkpoints.keep_best=None",
        "checkpoints.resume=auto",
        f"checkpoints.directory={tmp_path.resolve()}",
    ]
