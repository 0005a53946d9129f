"""neural-tangents 0.6.5 on the JAX of today.

neural-tangents has had no release since 0.6.5, and JAX has moved names that it uses. Each bridge
below stands for one thing that moved and looks first whether it is needed. There are two kinds:

* A loan puts names into a JAX module while neural-tangents is being imported, which copies what
  it finds there, and takes them away again: JAX is left as it was found.
* A patch gives a module of neural-tangents' own the names that it looks up when it is called.

`install` waits: the bridges are built when somebody imports neural-tangents. Nothing else in the
package knows about versions of neural-tangents; `nt_deq._jax` knows about those of JAX.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

_JAX_FLOOR, _JAX_CEILING = (0, 5, 3), (0, 11, 0)
_NEURAL_TANGENTS = "0.6.5"

_applied: dict[str, bool] = {}


def install() -> None:
    """Makes `import neural_tangents` build the bridges that the installed JAX needs.

    That import raises an `ImportError` if JAX or neural-tangents is of an unsupported version.
    """
    if "neural_tangents" in sys.modules:  # it could be imported, so nothing had to be lent
        _build(lambda: None, lend=False)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def bridges() -> dict[str, bool]:
    """Says of each bridge whether the installed versions needed it, so that it is in place."""
    importlib.import_module("neural_tangents")
    return dict(_applied)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds neural-tangents where it is, and has it executed between the bridges."""

    def find_spec(self, fullname, path=None, target=None):
        """That of another finder, with a loader that builds the bridges; once."""
        if fullname != "neural_tangents":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            vars(spec.loader)["exec_module"] = lambda module: _build(lambda: execute(module))
        return spec


def _build(execute: Callable[[], None], lend: bool = True) -> None:
    """Executes neural-tangents with names lent to JAX, then patches it."""
    if _applied:
        return
    try:
        _check_versions()
        with contextlib.ExitStack() as loans, warnings.catch_warnings():
            # Deprecations on the way are neural-tangents' and ours to meet, not the caller's.
            warnings.simplefilter("ignore", DeprecationWarning)
            lent = {name: lend and loans.enter_context(loan()) for name, loan in _LOANS.items()}
            execute()
            patched = {name: patch() for name, patch in _PATCHES.items()}
    except BaseException:
        if lend:  # the next import is to fail with the same words, not those of a half-built one
            sys.meta_path.insert(0, _Finder())
        raise
    _applied.update(lent | patched)


def _check_versions() -> None:
    import importlib.metadata

    import jax

    if not _JAX_FLOOR <= jax.__version_info__ < _JAX_CEILING:
        raise ImportError(
            f"nt_deq supports JAX >=0.5.3,<0.11 and found {jax.__version__}: it makes "
            f"neural-tangents {_NEURAL_TANGENTS} work on those versions only. "
            "Remedy: python -m pip install 'jax>=0.5.3,<0.11'"
        )
    try:
        found = importlib.metadata.version("neural-tangents")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != _NEURAL_TANGENTS:
        raise ImportError(
            f"nt_deq supports neural-tangents {_NEURAL_TANGENTS} and found {found}. "
            f"Remedy: python -m pip install neural-tangents=={_NEURAL_TANGENTS}"
        )


# Loans: context managers around the import, which yield whether they are needed.


@contextlib.contextmanager
def _lend(module_name: str, **names: object) -> Iterator[bool]:
    """Gives a JAX module the names that it lacks, and itself if need be, for a while."""
    with contextlib.ExitStack() as undo:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            module = sys.modules[module_name] = types.ModuleType(module_name)
            undo.callback(sys.modules.pop, module_name)
        lacking = [name for name in names if not hasattr(module, name)]
        for name in lacking:
            setattr(module, name, names[name])
            undo.callback(delattr, module, name)
        yield bool(lacking)


def _jaxpr_types() -> AbstractContextManager[bool]:
    # Deprecated in JAX 0.4.36 and removed in 0.6.0 in favour of `jax.extend.core`.
    from jax.extend import core

    names = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")
    return _lend("jax.core", **{name: getattr(core, name) for name in names})


def _safe_map_and_zip() -> AbstractContextManager[bool]:
    # Deprecated in JAX 0.6.0 and removed in 0.7.0; the module `jax.util` went in 0.8.0.
    def safe_zip(*args):
        return list(zip(*args, strict=True))

    def safe_map(function, *args):
        return [function(*each) for each in zip(*args, strict=True)]

    return _lend("jax.util", safe_map=safe_map, safe_zip=safe_zip)


def _zeros_like_p() -> AbstractContextManager[bool]:
    # Deprecated in JAX 0.7.1 and removed in 0.9.0, long unused: a mere key in tables of rules.
    from jax.extend.core import Primitive

    return _lend("jax.interpreters.ad", zeros_like_p=Primitive("zeros_like"))


@contextlib.contextmanager
def _experimental() -> Iterator[bool]:
    # Not a matter of JAX: `neural_tangents.experimental` imports TensorFlow, which takes seconds
    # and gigabytes and serves nothing else. Here it is imported when it is first used.
    name = "neural_tangents.experimental"
    package = importlib.util.find_spec("neural_tangents")
    assert package is not None
    spec = importlib.machinery.PathFinder.find_spec(name, package.submodule_search_locations)
    if name in sys.modules or spec is None:
        yield False
        return
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    module.__class__ = _LazyModule
    try:
        yield True
    except BaseException:
        del sys.modules[name]
        raise


class _LazyModule(types.ModuleType):
    """A module that is executed when one of its public names is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # whoever walks through `sys.modules` looks for these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module: Any = self
        try:
            module.__spec__.loader.exec_module(module)
        except ImportError as error:
            raise ImportError(
                f"{self.__name__}.{name} is not available: {error}. It needs TensorFlow and "
                "tf2jax, as nothing else here does. "
                "Remedy: python -m pip install tensorflow tf2jax"
            ) from error
        module.__class__ = types.ModuleType
        return getattr(module, name)


_LOANS: dict[str, Callable[[], AbstractContextManager[bool]]] = {
    "jax.core.Jaxpr": _jaxpr_types,
    "jax.util.safe_map": _safe_map_and_zip,
    "jax.interpreters.ad.zeros_like_p": _zeros_like_p,
    "neural_tangents.experimental": _experimental,
}


# Patches: functions called after the import, which return whether they were needed.


class _Overlay(types.ModuleType):
    """A module seen through, with a few names put over it."""

    def __init__(self, base: types.ModuleType, names: Mapping[str, object]):
        super().__init__(base.__name__)
        vars(self).update(names, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_base"], name)


def _overlay(owner: types.ModuleType, module: str, **names: object) -> None:
    """Puts names over `owner.module` as `owner`, a module of neural-tangents, sees it."""
    setattr(owner, module, _Overlay(getattr(owner, module), names))


def _dshaped_array() -> bool:
    # `jax.core.DShapedArray` was removed in JAX 0.8.2 with dynamic shapes: now nothing is one.
    from neural_tangents._src import empirical

    if hasattr(empirical.core, "DShapedArray"):
        return False
    _overlay(empirical, "core", DShapedArray=type("DShapedArray", (), {}))
    return True


def _ad_imports() -> bool:
    # `ad.config` and `ad.source_info_util` were removed in JAX 0.4.26. `jax_enable_checks` is
    # not read from JAX: the checks that it asks for use `core.lattice_join`, gone in 0.6.0.
    from jax.extend import source_info_util
    from neural_tangents._src import empirical

    if hasattr(empirical.ad, "source_info_util"):
        return False
    config = types.SimpleNamespace(jax_enable_checks=False)
    _overlay(empirical, "ad", source_info_util=source_info_util, config=config)
    return True


def _linearize() -> bool:
    # `ad.linearize` returns booleans in place of partial values since JAX 0.10.1, which does not
    # show before it is called, and takes a pytree of primals since 0.10.2.
    import jax

    if jax.__version_info__ < (0, 10, 1):
        return False
    from neural_tangents._src import empirical

    unknown = types.SimpleNamespace(is_known=lambda: False)

    def linearize(function, *primals, has_aux):
        del has_aux  # neural-tangents has none
        out, jvp = jax.linearize(function.call_wrapped, *primals)
        closed = jax.make_jaxpr(jvp)(*primals)
        return out, [unknown] * len(out), closed.jaxpr, closed.consts

    _overlay(empirical, "ad", linearize=linearize)
    return True


def _transpose_rules() -> bool:
    # Since JAX 0.9.1 the transposes of `slice`, `dynamic_slice` and others are in a private
    # table; `Primitive.map_primitive` and `ad.reducing_transposes` were removed in 0.10.0.
    import jax
    from neural_tangents._src import empirical

    ad = empirical.ad
    if jax.lax.slice_p in ad.primitive_transposes and hasattr(ad, "reducing_transposes"):
        return False

    def eqn_vjp(eqn, cotangent, *operands):
        if eqn is None:  # the identity
            return (cotangent,)
        rule = ad.primitive_transposes.get(eqn.primitive, functools.partial(transpose, eqn))
        return rule(cotangent, *operands, **eqn.params)

    def transpose(eqn, cotangent, *operands, **params):
        linear = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
        avals = [operands[i].aval for i in linear]

        def bind(*args):
            values = dict(enumerate(operands)) | dict(zip(linear, args, strict=True))
            return eqn.primitive.bind(*values.values(), **params)

        if type(cotangent) is ad.Zero:
            cotangents = [ad.Zero(aval) for aval in avals]
        else:
            shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
            cotangents = jax.linear_transpose(bind, *shapes)(cotangent)
        found = dict(zip(linear, cotangents, strict=True))
        return [found.get(i) for i in range(len(operands))]

    empirical._eqn_vjp_fn = eqn_vjp
    return True


def _structured_derivatives() -> bool:
    # Not a matter of versions: they take equations with one result, and for others ask to report a
    # bug in JAX or fail an assertion. The implicit derivative of an equilibrium is such a one.
    from neural_tangents._src import empirical

    eqn_vjp = empirical._eqn_vjp_fn

    @functools.wraps(eqn_vjp)
    def with_message(eqn, cotangent, *operands):
        primitive = None if eqn is None else eqn.primitive
        if primitive is None or not primitive.multiple_results or primitive.call_primitive:
            return eqn_vjp(eqn, cotangent, *operands)
        raise NotImplementedError(
            "implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES, and AUTO, which tries it, "
            f"cannot take the primitive {primitive.name!r}, which every deep equilibrium model "
            "has. Use nt.NtkImplementation.JACOBIAN_CONTRACTION or NTK_VECTOR_PRODUCTS."
        )

    empirical._eqn_vjp_fn = with_message
    return True


def _cost_analysis() -> bool:
    # `Compiled.cost_analysis()` is a dict since JAX 0.4.38, not a list of one dict.
    import jax
    from neural_tangents._src import empirical

    def get_flops(function, optimize, *args, **kwargs):
        lowered = jax.jit(function).lower(*args, **kwargs)
        analysis: Any = (lowered.compile() if optimize else lowered).cost_analysis()
        return analysis["flops"]

    empirical._get_flops = get_flops
    return True


def _eval_context() -> bool:
    # neural-tangents factorises a kernel under `jax.core.eval_context`, to keep the result from
    # one call to the next. Since JAX 0.4.36 a tracer may not be used there, not even an outer
    # one: a kernel that is traced is factorised in its own trace.
    import jax.core
    from jax.extend import core as extend_core
    from neural_tangents._src import predict

    # Itself moved, in JAX 0.10.0.
    core: Any = extend_core if hasattr(extend_core, "set_current_trace") else jax.core
    set_current_trace = core.set_current_trace

    def in_trace_of_kernel(function):
        @functools.wraps(function)
        def wrapped(kernel, *args, **kwargs):
            traced = isinstance(kernel, jax.core.Tracer)
            with set_current_trace(kernel._trace) if traced else contextlib.nullcontext():
                return function(kernel, *args, **kwargs)

        return wrapped

    for name in ("_get_cho_solve", "_get_fns_in_eigenbasis"):
        setattr(predict, name, in_trace_of_kernel(getattr(predict, name)))
    return True


def _eigvalsh() -> bool:
    # Not JAX: `scipy.linalg.eigvalsh(eigvals=...)` is `subset_by_index` since SciPy 1.5, alone
    # since 1.14. `scipy.linalg` is not imported before it is needed: that takes 0.2 s.
    from neural_tangents._src import predict

    def eigvalsh(a, eigvals):
        import scipy.linalg

        return scipy.linalg.eigvalsh(a, subset_by_index=eigvals)

    predict.sp = types.SimpleNamespace(linalg=types.SimpleNamespace(eigvalsh=eigvalsh))
    return True


_PATCHES: dict[str, Callable[[], bool]] = {
    "jax.core.DShapedArray": _dshaped_array,
    "jax.interpreters.ad.source_info_util": _ad_imports,
    "jax.interpreters.ad.linearize": _linearize,
    "jax.interpreters.ad.primitive_transposes": _transpose_rules,
    "nt.NtkImplementation.STRUCTURED_DERIVATIVES": _structured_derivatives,
    "jax.stages.Compiled.cost_analysis": _cost_analysis,
    "jax.core.eval_context": _eval_context,
    "scipy.linalg.eigvalsh": _eigvalsh,
}
