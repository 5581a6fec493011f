"""What the CPU kernels share: compilation, threads, views of tensors, bits of floats, hashes.

A kernel is a *span*: a compiled function of (part, start, stop, arrays) that works on a slice of its arrays. `spread`
runs it once for a small tensor, else once for each of torch.get_num_threads() threads of a pool, on equal
slices. Spans release the GIL and share nothing that they write, so several callers may run at the same time.

Not taken: numba's `prange`. Its OpenMP is a second one beside torch's, and the two keep spinning on the same cores
(on a busy machine a kernel took 8 ms instead of 0.1); its fallback layer must not be entered from two threads; it
aborts in a forked child. The pool costs 20 us a call, and a child makes its own.
Not taken: numba's cache on disk. It unpickles files beside the source, and does not see when a function
that was compiled into another one has changed. A kernel compiles in under a second at its first call.

Numbers: bfloat16 travels as uint16 and float16 as int16, so that the type says how to `widen` and `narrow` it. Scalars are
typed by hand, since numba widens mixed integers to 64 bits and mixed floats to double.
Not covered: float64, and tensors that are not on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic, overload
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

F = TypeVar("F", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]
ALONE = 1 << 15  # entries below which waking a thread takes longer than the work
AS_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
GOLDEN, MIX1, MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def compiled(**options: Any) -> Callable[[F], F]:
    """numba.njit without the GIL, and without checks for division by zero, which would keep loops from vectorizing."""
    return cast("Callable[[F], F]", numba.njit(nogil=True, error_model="numpy", **options))


# -- threads and tensors ---------------------------------------------------------------------------


def spread(span: Callable[..., Any], n: int, arrays: tuple[Any, ...], alone: int = ALONE, grain: int = 64) -> None:
    """Run span(part, start, stop, arrays) over 0 ... n, in as many parts as `parts` says, at multiples of `grain`."""
    count = parts(n, alone)
    if count == 1:
        span(0, 0, n, arrays)
        return
    edges = [*(n * part // count // grain * grain for part in range(count)), n]
    others = [
        _pool(os.getpid(), count - 1).submit(span, part, edges[part], edges[part + 1], arrays)
        for part in range(1, count)
    ]
    span(0, 0, edges[1], arrays)
    for other in others:
        other.result()


def parts(n: int, alone: int = ALONE) -> int:
    """How many parts `spread` makes of n items: one below `alone`, else torch's number of threads."""
    return 1 if n < alone else min(n, torch.get_num_threads())


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "finetooth")  # a forked child has another process id, and none of these threads


def known(*tensors: Tensor | None) -> bool:
    """Whether all are float32, bfloat16 or float16."""
    return all(t is None or t.dtype in AS_BITS for t in tensors)


def flat(t: Tensor) -> Array:
    """A tensor's memory as numpy sees it, for reading: a copy if it is not contiguous. RuntimeError for one without values."""
    if isinstance(t, FakeTensor):
        raise RuntimeError("a tensor without values has no memory to read.")  # from_dlpack would hand out other memory
    t = t.detach()
    if not t.is_contiguous():
        t = t.contiguous()
    bits = AS_BITS.get(t.dtype, t.dtype)
    # Not t.numpy(): that forbids the tensor's storage to be resized for ever after, and FSDP2 does so with what it gathers.
    array: Array = np.from_dlpack(t if bits == t.dtype else t.view(bits)).reshape(-1)
    return array


def flat_(t: Tensor) -> Array:
    """The same for writing."""
    if not t.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} and strides {t.stride()} is written in place: make it contiguous."
        )
    return flat(t)


def written(tensors: Iterable[Tensor]) -> None:
    """Tell autograd what it cannot see: that these were written in place."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


# -- bits ------------------------------------------------------------------------------------------


def _cast(source: Any, target: Any, kind: str) -> Any:
    """An intrinsic that reads the bits of one type as another."""

    def build(typing: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], ir.FloatType() if kind == "float" else ir.IntType(32))

        return (target(source), generate) if x == source else None

    return intrinsic(build)


to_bits = _cast(numba.float32, numba.uint32, "int")
from_bits = _cast(numba.uint32, numba.float32, "float")


@compiled()
def _widen_half(h: Any) -> Any:
    """Exact: the exponent is moved by a product with 2^112."""
    bits = np.uint32(np.uint16(h))
    x = from_bits(np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0**112)
    special = np.uint32(0x7F800000) if (bits & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
    return from_bits(np.uint32(to_bits(x) | special | ((bits & np.uint32(0x8000)) << np.uint32(16))))


@compiled()
def _narrow_half(x: Any) -> Any:
    bits = to_bits(x)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(size + odd - np.uint32(0x37FFF001)) >> np.uint32(13))  # (15 - 127) << 23, plus 0xFFF
    small = np.uint32(to_bits(np.float32(from_bits(size) + np.float32(0.5))) - np.uint32(0x3F000000))
    large = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else np.uint32(0x7C00)
    h = small if size < np.uint32(0x38800000) else (large if size >= np.uint32(0x47800000) else normal)
    return np.int16(np.uint16(h | np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))))


@compiled()
def _narrow_bfloat(x: Any) -> Any:
    bits = to_bits(x)
    up = np.uint32(np.uint32(0x7FFF) + np.uint32((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16(0x7FC0) if x != x else np.uint16(np.uint32(bits + up) >> np.uint32(16))


def widen(x: Any) -> Any:
    """The float32 of a float32, of bfloat16's bits or of float16's."""
    raise NotImplementedError("for compiled code")


def narrow(x: Any, like: Any) -> Any:
    """A float32 rounded to nearest even, as the type of an array's entries."""
    raise NotImplementedError("for compiled code")


def _overload_widen(x: Any) -> Any:
    if x == numba.float32:
        return lambda x: x
    if x == numba.uint16:
        return lambda x: from_bits(np.uint32(np.uint32(x) << np.uint32(16)))
    return (lambda x: _widen_half(x)) if x == numba.int16 else None  # noqa: PLW0108  numba compiles a lambda only


def _overload_narrow(x: Any, like: Any) -> Any:
    if like.dtype == numba.float32:
        return lambda x, like: x
    if like.dtype == numba.uint16:
        return lambda x, like: _narrow_bfloat(x)
    return (lambda x, like: _narrow_half(x)) if like.dtype == numba.int16 else None


def exact(x: Any, master: Any, i: Any) -> Any:
    """`reference.exact` of one weight and of entry i of the masters."""
    raise NotImplementedError("for compiled code")


def remember(value: Any, x: Any, master: Any, i: Any) -> None:
    """What `reference.remembered` does to entry i of the masters, when a value has been rounded to x."""
    raise NotImplementedError("for compiled code")


@compiled()
def _joined(x: Any, low: Any) -> Any:
    return from_bits(np.uint32(np.uint32(np.uint32(x) << np.uint32(16)) + np.uint32(np.int32(low))))


@compiled()
def _missing(value: Any, x: Any) -> Any:
    low = np.int32(np.uint32(to_bits(value) - np.uint32(np.uint32(x) << np.uint32(16))))
    return np.int16(min(low, np.int32(32767)))


def _overload_exact(x: Any, master: Any, i: Any) -> Any:
    if isinstance(master, numba.types.NoneType):
        return lambda x, master, i: widen(x)
    if master.dtype == numba.float32:
        return lambda x, master, i: master[i] if _narrow_half(master[i]) == x else _widen_half(x)
    return lambda x, master, i: _joined(x, master[i])


def _overload_remember(value: Any, x: Any, master: Any, i: Any) -> Any:
    def keep(value: Any, x: Any, master: Any, i: Any) -> None:
        master[i] = value

    def part(value: Any, x: Any, master: Any, i: Any) -> None:
        master[i] = _missing(value, x)

    if isinstance(master, numba.types.NoneType):
        return lambda value, x, master, i: None
    return keep if master.dtype == numba.float32 else part


overload(widen, strict=False)(_overload_widen)
overload(narrow, strict=False)(_overload_narrow)
overload(exact, strict=False)(_overload_exact)
overload(remember, strict=False)(_overload_remember)


# -- hashes ----------------------------------------------------------------------------------------


@compiled()
def hash64(position: Any, key: Any) -> Any:
    """64 well mixed bits of a uint64 position: the reference's, whose signed products wrap to the same bits."""
    x = position * GOLDEN + key
    x = (x ^ (x >> S30)) * MIX1
    x = (x ^ (x >> S27)) * MIX2
    return x ^ (x >> S31)


@compiled()
def _rounded_by(x: Any, key: Any, position: Any, like: Any, low: Any) -> Any:
    noise = np.uint32(hash64(position, key) >> np.uint64(64 - low))
    mask = np.uint32(np.uint32(0xFFFFFFFF) << np.uint32(low))
    return narrow(from_bits(np.uint32(np.uint32(to_bits(x) + noise) & mask)), like)


def rounded(x: Any, key: Any, position: Any, like: Any) -> Any:
    """`narrow`, or with a key stochastic rounding by the position."""
    raise NotImplementedError("for compiled code")


def _overload_rounded(x: Any, key: Any, position: Any, like: Any) -> Any:
    if like.dtype == numba.float32 or isinstance(key, numba.types.NoneType):
        return lambda x, key, position, like: narrow(x, like)
    low = 16 if like.dtype == numba.uint16 else 13
    return lambda x, key, position, like: _rounded_by(x, key, position, like, low)


overload(rounded, strict=False)(_overload_rounded)


def unsigned(key: int | None) -> np.uint64 | None:
    """A signed 64-bit key as compiled code takes it."""
    return None if key is None else np.uint64(key & 0xFFFFFFFFFFFFFFFF)
