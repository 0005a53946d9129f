"""The bridges are put in place where they are needed, and JAX does not notice them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import textwrap

import jax
import pytest

import nt_deq
from nt_deq import _bridges

pytestmark = pytest.mark.smoke


def in_a_new_process(*code: str) -> dict:
    """Runs a program, given in parts, that ends by printing JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "".join(map(textwrap.dedent, code))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imported() -> dict:
    """What importing both has changed in a process that had imported JAX."""
    return in_a_new_process("""
        import importlib, json, sys
        import jax, jax.core, jax.extend.core, jax.interpreters.ad, scipy, scipy.linalg

        def contents():
            found = {}
            for name in "jax jax.core jax.extend.core jax.interpreters.ad jax.util scipy".split():
                try:
                    found[name] = {k: id(v) for k, v in vars(importlib.import_module(name)).items()}
                except ImportError:
                    found[name] = {}
            return found

        before = contents()
        import nt_deq, neural_tangents
        loaded = sorted(sys.modules)
        changed = {
            f"{module}.{key}"
            for module, now in contents().items()
            for key in before[module].keys() | now.keys()
            if before[module].get(key) != now.get(key)
        }
        print(json.dumps({"loaded": loaded, "changed": sorted(changed - set(loaded))}))
    """)


def test_jax_is_left_as_it_was_found(imported):
    assert imported["changed"] == []


def test_nothing_that_may_be_absent_is_imported(imported):
    assert "neural_tangents" in imported["loaded"]
    assert {"tensorflow", "tf2jax", "sklearn", "matplotlib", "flax"}.isdisjoint(imported["loaded"])


def test_importing_the_package_imports_next_to_nothing():
    loaded = in_a_new_process("import json, sys, nt_deq; print(json.dumps(sorted(sys.modules)))")
    assert {"jax", "numpy", "neural_tangents"}.isdisjoint(loaded)


def test_every_public_name_is_found():
    for name in nt_deq.__all__:
        assert getattr(nt_deq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'deq_kernels'"):
        nt_deq.deq_kernels  # noqa: B018


def test_each_bridge_is_applied_where_it_is_needed():
    jax_version = jax.__version_info__
    assert _bridges.bridges() == {
        "jax.core.Jaxpr": jax_version >= (0, 6),
        "jax.util.safe_map": jax_version >= (0, 7),
        "jax.interpreters.ad.zeros_like_p": jax_version >= (0, 9),
        "neural_tangents.experimental": True,
        "jax.core.DShapedArray": jax_version >= (0, 8, 2),
        "jax.interpreters.ad.source_info_util": True,
        "jax.interpreters.ad.linearize": jax_version >= (0, 10, 1),
        "jax.interpreters.ad.primitive_transposes": jax_version >= (0, 9, 1),
        "nt.NtkImplementation.STRUCTURED_DERIVATIVES": True,
        "jax.stages.Compiled.cost_analysis": True,
        "jax.core.eval_context": True,
        "scipy.linalg.eigvalsh": True,
    }


def test_installing_twice_changes_nothing():
    from neural_tangents._src import empirical, predict

    before = _bridges.bridges(), dict(vars(empirical)), dict(vars(predict))
    _bridges.install()
    assert (_bridges.bridges(), vars(empirical), vars(predict)) == before


@pytest.mark.parametrize("version", ["0.4.38", "0.5.2", "0.11.0", "1.0.0"])
def test_unsupported_jax_is_refused(monkeypatch, version):
    _bridges.bridges()  # imports neural-tangents
    monkeypatch.setattr(_bridges, "_applied", {})
    monkeypatch.setattr(jax, "__version__", version)
    monkeypatch.setattr(jax, "__version_info__", tuple(map(int, version.split("."))))
    with pytest.raises(ImportError, match=rf">=0\.5\.3,<0\.11 and found {version}.*pip install"):
        _bridges.install()
    assert not _bridges.bridges()


@pytest.mark.parametrize("version", ["0.6.4", None])
def test_unsupported_neural_tangents_is_refused(monkeypatch, version):
    def find(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    _bridges.bridges()  # imports neural-tangents
    monkeypatch.setattr(_bridges, "_applied", {})
    monkeypatch.setattr(importlib.metadata, "version", find)
    match = rf"0\.6\.5 and found {'none' if version is None else version}.*pip install"
    with pytest.raises(ImportError, match=match):
        _bridges.install()


USE = """
    import jax, jax.numpy as jnp, neural_tangents as nt
    k, y = jnp.diag(jnp.arange(1., 4.)), jnp.ones((3, 1))
    at = jax.jit(lambda k: nt.predict.gradient_descent_mse(k, y)(1., 0., None, None))(k)
    ntk = nt.empirical_ntk_fn(lambda w, x: x * w, implementation=3, trace_axes=())(y, None, y[0])
    right = bool(jnp.allclose(at[2, 0], 1 - jnp.exp(-1.)) and (ntk == 1).all())
    print(json.dumps({"applied": sorted(k for k, v in bridges.items() if v), "right": right}))
"""


def test_neural_tangents_may_be_imported_first():
    # On JAX 0.5.3 that succeeds, later it fails half-way; `tensorflow` is pretended away.
    found = in_a_new_process(
        """
        import json, sys, types
        stub = sys.modules["neural_tangents.experimental"] = types.ModuleType("experimental")
        try:
            import neural_tangents
        except ImportError:
            pass
        import nt_deq
        bridges = nt_deq._bridges.bridges()
        assert sys.modules["neural_tangents.experimental"] is stub
        """,
        USE,
    )
    assert found["right"]
    assert "neural_tangents.experimental" not in found["applied"]


@pytest.mark.slow
def test_the_package_may_be_imported_again():
    found = in_a_new_process(
        """
        import json, sys
        import nt_deq
        first = nt_deq._bridges.bridges()
        for name in [name for name in sys.modules if name.split(".")[0] == "nt_deq"]:
            del sys.modules[name]
        import nt_deq
        bridges = nt_deq._bridges.bridges()
        assert bridges.keys() == first.keys()
        """,
        USE,
    )
    assert found["right"]


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="has TensorFlow")
def test_experimental_says_what_it_needs():
    import neural_tangents as nt
    import neural_tangents.experimental as experimental

    assert nt.experimental is experimental
    assert not hasattr(experimental, "__wrapped__")
    with pytest.raises(ImportError, match=r"tensorflow.*pip install tensorflow tf2jax"):
        _ = experimental.empirical_ntk_fn_tf
    with pytest.raises(ImportError, match="pip install tensorflow tf2jax"):
        from neural_tangents.experimental import get_apply_fn_and_params  # noqa: F401


def test_experimental_is_imported_when_it_is_used(tmp_path):
    source = tmp_path / "lazy.py"
    source.write_text("import not_installed\n")
    spec = importlib.util.spec_from_file_location("lazy", source)
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _bridges._LazyModule
    assert "answer" not in vars(module)
    with pytest.raises(ImportError, match="not_installed"):
        _ = module.answer
    source.write_text("answer = 6 * 7\n")
    assert module.answer == 42
    with pytest.raises(AttributeError):
        _ = module.question
