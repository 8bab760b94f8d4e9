"""The updates in Triton's language, in float32. Importing this needs the package triton.

A program updates one run of elements. Only the last run, if it is odd, is masked: with a mask a
thread cannot load 16 bytes at a time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl


@triton.jit
def sgd_momentum(
    p_ptr,
    g_ptr,
    v_ptr,
    rate_ptr,
    scale_ptr,
    new_p_ptr,
    new_v_ptr,
    copy_ptr,
    size: tl.constexpr,
    elements: tl.constexpr,
    momentum: tl.constexpr,
    nesterov: tl.constexpr,
    weight_decay: tl.constexpr,
):
    """Update a run by momentum; `copy_ptr` is where a cast copy of the parameter goes, or None."""
    start = tl.program_id(0) * elements
    place = start + tl.arange(0, elements)
    rate, scale = tl.load(rate_ptr), tl.load(scale_ptr)
    if start + elements <= size:
        p, g = _load(p_ptr + place), _load(g_ptr + place)
        p, v = _momentum(p, g * scale, _load(v_ptr + place), rate, momentum, nesterov, weight_decay)
        _store(new_p_ptr + place, p)
        _store(new_v_ptr + place, v)
        if copy_ptr is not None:
            _store(copy_ptr + place, p)
    else:
        inside = place < size
        p, g = _load_some(p_ptr + place, inside), _load_some(g_ptr + place, inside)
        v = _load_some(v_ptr + place, inside)
        p, v = _momentum(p, g * scale, v, rate, momentum, nesterov, weight_decay)
        _store_some(new_p_ptr + place, p, inside)
        _store_some(new_v_ptr + place, v, inside)
        if copy_ptr is not None:
            _store_some(copy_ptr + place, p, inside)


@triton.jit
def adamw(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    rate_ptr,
    scale_ptr,
    m_correction_ptr,
    v_correction_ptr,
    new_p_ptr,
    new_m_ptr,
    new_v_ptr,
    copy_ptr,
    size: tl.constexpr,
    elements: tl.constexpr,
    b1: tl.constexpr,
    b2: tl.constexpr,
    eps: tl.constexpr,
    weight_decay: tl.constexpr,
):
    """Update a run by Adam; `copy_ptr` is where a cast copy of the parameter goes, or None."""
    start = tl.program_id(0) * elements
    place = start + tl.arange(0, elements)
    rate, scale = tl.load(rate_ptr), tl.load(scale_ptr)
    m_correction, v_correction = tl.load(m_correction_ptr), tl.load(v_correction_ptr)
    if start + elements <= size:
        p, g = _load(p_ptr + place), _load(g_ptr + place) * scale
        m, v = _moments(g, _load(m_ptr + place), _load(v_ptr + place), b1, b2)
        p = _step(p, m / m_correction, v / v_correction, rate, eps, weight_decay)
        _store(new_p_ptr + place, p)
        _store(new_m_ptr + place, m)
        _store(new_v_ptr + place, v)
        if copy_ptr is not None:
            _store(copy_ptr + place, p)
    else:
        inside = place < size
        p, g = _load_some(p_ptr + place, inside), _load_some(g_ptr + place, inside) * scale
        m, v = _load_some(m_ptr + place, inside), _load_some(v_ptr + place, inside)
        m, v = _moments(g, m, v, b1, b2)
        p = _step(p, m / m_correction, v / v_correction, rate, eps, weight_decay)
        _store_some(new_p_ptr + place, p, inside)
        _store_some(new_m_ptr + place, m, inside)
        _store_some(new_v_ptr + place, v, inside)
        if copy_ptr is not None:
            _store_some(copy_ptr + place, p, inside)


@triton.jit
def _momentum(
    p, d, v, rate, momentum: tl.constexpr, nesterov: tl.constexpr, weight_decay: tl.constexpr
):
    if weight_decay != 0:  # a compiler cannot drop 0 * p, since p may be infinite
        d += weight_decay * p
    v = momentum * v + d
    if nesterov:
        return p - rate * (d + momentum * v), v
    else:
        return p - rate * v, v


@triton.jit
def _moments(g, m, v, b1: tl.constexpr, b2: tl.constexpr):
    return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g


@triton.jit
def _step(p, m, v, rate, eps: tl.constexpr, weight_decay: tl.constexpr):
    return p - rate * (m / (tl.sqrt_rn(v) + eps) + weight_decay * p)


@triton.jit
def _load(ptr):
    return tl.load(ptr).to(tl.float32)


@triton.jit
def _load_some(ptr, inside):
    return tl.load(ptr, mask=inside, other=0).to(tl.float32)


@triton.jit
def _store(ptr, x):
    tl.store(ptr, x.to(ptr.dtype.element_ty))


@triton.jit
def _store_some(ptr, x, inside):
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=inside)
