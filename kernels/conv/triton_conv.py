"""The convolution in Triton's language: implicit matrix products on tensor cores.

The rows of a product are pixels before pooling, the four of a pooling window side by side, so that
one product serves the whole window. A step multiplies by elements of one tap of the filter where
the channels allow it: then a pixel has one address a step, and a thread loads 16 bytes at a time.
Sums are float32; float32 operands are not rounded. Importing this needs the package triton.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
import triton
import triton.language as tl


@triton.jit
def forward(
    x_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    choice_ptr,
    windows: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    features: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    top: tl.constexpr,
    left: tl.constexpr,
    pool: tl.constexpr,
    relu: tl.constexpr,
    pixels: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
):
    """Compute a block of windows, and which pixel each came from; `choice_ptr` may be None."""
    start = tl.program_id(0) * pixels
    image, row, column, real = _places_of_pixels(
        start * pool * pool, pixels * pool * pool, windows, out_height, out_width, pool
    )
    feature = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((pixels * pool * pool, block), tl.float32)
    for step in range(0, tl.cdiv(rows * columns * channels, depth)):
        patch = _load_patch(
            x_ptr,
            image,
            row - top,
            column - left,
            real,
            step * depth,
            height,
            width,
            channels,
            rows,
            columns,
            depth,
        )
        element = step * depth + tl.arange(0, depth)
        inside = (element < rows * columns * channels)[:, None] & (feature < features)[None, :]
        place = element[:, None] * features + feature[None, :]
        weights = tl.load(w_ptr + place, mask=inside, other=0)
        total = tl.dot(patch, weights, total, input_precision="ieee")
    bias = tl.load(b_ptr + feature, mask=feature < features, other=0).to(tl.float32)
    best, choice = _choose_maximum(total, pool, pixels, block)
    best += bias[None, :]
    if relu:
        choice = tl.where(best > 0, choice, -1)
        best = tl.where(best <= 0, 0.0, best)
    window = start + tl.arange(0, pixels)
    inside = (window < windows)[:, None] & (feature < features)[None, :]
    place = window[:, None] * features + feature[None, :]
    tl.store(out_ptr + place, best.to(out_ptr.dtype.element_ty), mask=inside)
    if choice_ptr is not None:
        tl.store(choice_ptr + place, choice.to(tl.int8), mask=inside)


@triton.jit
def data_gradient(
    w_ptr,
    g_ptr,
    choice_ptr,
    dx_ptr,
    has_choice: tl.constexpr,
    windows: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    features: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    top: tl.constexpr,
    left: tl.constexpr,
    pool: tl.constexpr,
    pixels: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
):
    """Compute a block of the images' gradient: a convolution of the unpooled cotangent."""
    pixel = tl.program_id(0) * pixels + tl.arange(0, pixels)
    image, row, column = pixel // (height * width), pixel // width % height, pixel % width
    # The windows of all images, or those of one.
    real = image < windows // (out_height * out_width)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((pixels, block), tl.float32)
    for step in range(0, tl.cdiv(rows * columns * features, depth)):
        g = _load_unpooled_patch(
            g_ptr,
            choice_ptr,
            has_choice,
            image,
            row + top,
            column + left,
            real,
            step * depth,
            out_height,
            out_width,
            features,
            rows,
            columns,
            pool,
            depth,
        )
        element = step * depth + tl.arange(0, depth)
        tap, feature = element // features, element % features
        inside = (tap < rows * columns)[:, None] & (channel < channels)[None, :]
        place = (tap[:, None] * channels + channel[None, :]) * features + feature[:, None]
        weights = tl.load(w_ptr + place, mask=inside, other=0)
        total = tl.dot(g, weights, total, input_precision="ieee")
    inside = real[:, None] & (channel < channels)[None, :]
    place = pixel[:, None] * channels + channel[None, :]
    tl.store(dx_ptr + place, total.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def filter_gradient(
    x_ptr,
    g_ptr,
    choice_ptr,
    sums_ptr,
    has_choice: tl.constexpr,
    steps: tl.constexpr,
    windows: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    features: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    top: tl.constexpr,
    left: tl.constexpr,
    pool: tl.constexpr,
    pixels: tl.constexpr,
    block: tl.constexpr,
    depth: tl.constexpr,
):
    """Add up a block of the filter's gradient over `steps` blocks of pixels."""
    part, tile = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = (features + block - 1) // block
    first = tile // blocks * depth
    feature = tile % blocks * block + tl.arange(0, block)
    total = tl.zeros((depth, block), tl.float32)
    for step in range(0, steps):
        start = (part * steps + step) * pixels
        image, row, column, real = _places_of_pixels(
            start, pixels, windows, out_height, out_width, pool
        )
        patch = _load_patch(
            x_ptr,
            image,
            row - top,
            column - left,
            real,
            first,
            height,
            width,
            channels,
            rows,
            columns,
            depth,
        )
        pixel = start + tl.arange(0, pixels)
        window, corner = pixel // (pool * pool), pixel % (pool * pool)
        inside = real[:, None] & (feature < features)[None, :]
        place = window[:, None] * features + feature[None, :]
        if has_choice:
            choice = tl.load(choice_ptr + place, mask=inside, other=-1).to(tl.int32)
            inside = choice == corner[:, None]
        g = tl.load(g_ptr + place, mask=inside, other=0)
        total = tl.dot(tl.trans(patch), g, total, input_precision="ieee")
    element = first + tl.arange(0, depth)
    inside = (element < rows * columns * channels)[:, None] & (feature < features)[None, :]
    place = (part * rows * columns * channels + element)[:, None] * features + feature[None, :]
    tl.store(sums_ptr + place, total, mask=inside)


@triton.jit
def _places_of_pixels(
    start,
    count: tl.constexpr,
    windows: tl.constexpr,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    pool: tl.constexpr,
):
    """Return image, row and column of pixels in the order of windows, and which of them exist."""
    pixel = start + tl.arange(0, count)
    window, corner = pixel // (pool * pool), pixel % (pool * pool)
    row = window // out_width % out_height * pool + corner // pool
    column = window % out_width * pool + corner % pool
    return window // (out_height * out_width), row, column, window < windows


@triton.jit
def _load_patch(
    x_ptr,
    image,
    row,
    column,
    real,
    start,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
):
    """Load `depth` elements from `start` on of each pixel's patch; its corner is (row, column)."""
    if channels % depth == 0:  # of one tap
        row, column = row + start // channels // columns, column + start // channels % columns
        inside = real & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        place = ((image * height + row) * width + column) * channels + start % channels
        return tl.load(
            x_ptr + place[:, None] + tl.arange(0, depth)[None, :], mask=inside[:, None], other=0
        )
    else:
        element = (start + tl.arange(0, depth))[None, :]
        tap, channel = element // channels, element % channels
        row, column = row[:, None] + tap // columns, column[:, None] + tap % columns
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        inside = inside & real[:, None] & (tap < rows * columns)
        place = ((image[:, None] * height + row) * width + column) * channels + channel
        return tl.load(x_ptr + place, mask=inside, other=0)


@triton.jit
def _load_unpooled_patch(
    g_ptr,
    choice_ptr,
    has_choice: tl.constexpr,
    image,
    row,
    column,
    real,
    start,
    out_height: tl.constexpr,
    out_width: tl.constexpr,
    features: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    pool: tl.constexpr,
    depth: tl.constexpr,
):
    """Load what each pixel's taps read of the cotangent; zero where another pixel was chosen."""
    if features % depth == 0:  # of one tap
        tap = start // features + tl.zeros((1, depth), tl.int32)
        feature = (start % features + tl.arange(0, depth))[None, :]
        row = (row - start // features // columns)[:, None]
        column = (column - start // features % columns)[:, None]
    else:
        element = (start + tl.arange(0, depth))[None, :]
        tap, feature = element // features, element % features
        row, column = row[:, None] - tap // columns, column[:, None] - tap % columns
    inside = (row >= 0) & (row < out_height * pool) & (column >= 0) & (column < out_width * pool)
    inside = inside & real[:, None] & (tap < rows * columns)
    place = (image[:, None] * out_height + row // pool) * out_width + column // pool
    place = place * features + feature
    if has_choice:
        choice = tl.load(choice_ptr + place, mask=inside, other=-1).to(tl.int32)
        inside = inside & (choice == row % pool * pool + column % pool)
    return tl.load(g_ptr + place, mask=inside, other=0)


@triton.jit
def _choose_maximum(total, pool: tl.constexpr, pixels: tl.constexpr, block: tl.constexpr):
    """Return each window's maximum, and which pixel it is: the first of equal ones."""
    if pool == 1:
        return total, tl.zeros((pixels, block), tl.int32)
    else:
        corners = tl.permute(tl.reshape(total, (pixels, 2, 2, block)), (0, 3, 1, 2))
        left, right = tl.split(corners)
        best, third = tl.split(left)
        second, fourth = tl.split(right)
        choice = tl.zeros((pixels, block), tl.int32)
        best, choice = _take_larger(best, choice, second, 1)
        best, choice = _take_larger(best, choice, third, 2)
        return _take_larger(best, choice, fourth, 3)


@triton.jit
def _take_larger(best, choice, other, position: tl.constexpr):
    # Not by tl.maximum, whose maximum of a number and NaN is the number.
    choice = tl.where(other <= best, choice, position)
    return tl.where((other <= best) | (best != best), best, other), choice
