"""What holds of the kernel for every input: of any norm, twice, opposite, zero."""

import attack
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_deq import deq_kernel
from nt_deq.activations import ACTIVATIONS

ROWS = 9
EXAMPLES = settings(deadline=None, max_examples=20, derandomize=True)
# For the references; the dtype of a kernel is that of its inputs.
pytestmark = pytest.mark.usefixtures("x64_module")


@st.composite
def problems(draw, names=("relu", "leaky_relu", "abs", "erf", "gelu", "sin"), largest=6):
    """Inputs `(ROWS, 60)` of rank 2 or full, and arguments of `deq_kernel` with an equilibrium."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(ROWS, 60))  # of one shape, since another would be compiled anew
    x[:, draw(st.sampled_from([2, 60])) :] = 0
    x *= 10 ** rng.uniform(-6, largest, (ROWS, 1)) / np.linalg.norm(x, axis=1, keepdims=True)
    x[5], x[6], x[7], x[8] = x[0], -x[1], 3 * x[2], 0
    activation = draw(st.sampled_from(names))
    bound = 0.5 / ACTIVATIONS[activation].lipschitz  # of the theorem: W_std Lip < 1/2
    if ACTIVATIONS[activation].homogeneous:
        bound = float(ACTIVATIONS[activation].dual_diagonal(jnp.ones(()))[1]) ** -0.5
    return x.astype(np.float32), dict(
        W_std=bound * draw(st.floats(0, 0.99)),
        U_std=draw(st.floats(0.1, 10)),
        b_std=draw(st.sampled_from([0.0, 0.5])),
        activation=activation,
    )


def scale_of(kernel):
    """`√(K(x, x) K(x', x'))`, which an entry is made of."""
    return np.sqrt(np.outer(np.diag(kernel), np.diag(kernel)))


@EXAMPLES
@given(problems())
def test_it_is_a_covariance(problem):
    x, arguments = problem
    ours = deq_kernel(x, **arguments)
    eps = np.finfo(np.float32).eps
    assert ours.converged.all()
    for kernel in ours[:2]:
        kernel = np.asarray(kernel, float)
        np.testing.assert_array_equal(kernel, kernel.T)
        size = scale_of(kernel)
        assert (np.abs(kernel) <= size * (1 + 8 * eps)).all()
        correlation = kernel / np.where(size == 0, 1, size)
        # Θ* has the condition number 1/(1 - J) besides.
        lowest = -8 * ROWS * eps / (1 - float(ours.rate))
        assert np.linalg.eigvalsh(correlation).min() > lowest
    assert (np.diag(ours.ntk) >= np.diag(ours.nngp)).all()


@EXAMPLES
@given(problems())
def test_the_error_bound_bounds_the_error(problem):
    x, arguments = problem
    kernels = (deq_kernel(x.astype(t), **arguments) for t in (np.float32, np.float64))
    single, double = (jax.tree.map(np.asarray, kernel) for kernel in kernels)
    error = np.abs(single.nngp - double.nngp)
    bound, of_reference = (np.asarray(each.nngp_error, float) for each in (single, double))
    assert (error <= bound + of_reference).all()
    # and is not a matter of course: within 1/(1 - J)² of the rounding of a few operations
    tight = 200 * np.finfo(np.float32).eps / (1 - float(double.rate)) ** 2 * scale_of(double.nngp)
    assert (bound <= tight).all()


@EXAMPLES
@given(problems(names=("relu", "erf"), largest=2))
def test_the_error_bound_holds_in_float64(problem):
    x, arguments = problem
    x = x.astype(float)
    ours = deq_kernel(x, **arguments)
    name, *stds = (arguments[key] for key in ("activation", "W_std", "U_std", "b_std"))
    problem = attack.Problem(x[None], *(np.array([std]) for std in stds))
    exact = attack.bisected(name, problem)[0][0]
    assert (np.abs(np.asarray(ours.nngp) - exact) <= np.asarray(ours.nngp_error)).all()


@EXAMPLES
@given(problems(), st.randoms(use_true_random=False))
def test_it_is_invariant_under_permutations_and_rotations(problem, random):
    x, arguments = problem
    order = list(range(ROWS))
    random.shuffle(order)
    whole = deq_kernel(x, **arguments)
    permuted = deq_kernel(x[order], **arguments)
    bound = np.asarray(whole.nngp_error)[np.ix_(order, order)]
    for a, b in ((whole.nngp, permuted.nngp), (whole.nngp_error, permuted.nngp_error)):
        assert (np.abs(np.asarray(a)[np.ix_(order, order)] - b) <= bound).all()
    rng = np.random.default_rng(random.getrandbits(32))
    rotation = np.linalg.qr(rng.normal(size=(x.shape[1],) * 2))[0]
    rotated = deq_kernel((x.astype(float) @ rotation).astype(np.float32), **arguments)
    # The inputs themselves are rounded once more.
    assert (np.abs(rotated.nngp - whole.nngp) <= 4 * whole.nngp_error).all()


@pytest.mark.slow
@EXAMPLES
@given(problems(), st.floats(1.01, 1.5))
def test_it_grows_with_what_should_make_it_grow(problem, factor):
    x, arguments = problem
    x = x.astype(float)
    less = deq_kernel(x, **{**arguments, "W_std": arguments["W_std"] / factor})
    more = deq_kernel(x, **arguments)
    slack = less.nngp_error + more.nngp_error
    assert (np.diag(more.nngp - less.nngp + slack) >= 0).all()
    if arguments["activation"] in ("relu", "abs"):  # E[φφ'] >= 0 for every pair
        assert more.rate >= less.rate
        assert (more.nngp - less.nngp + slack >= 0).all()
        biased = deq_kernel(x, **{**arguments, "b_std": arguments["b_std"] + 0.5})
        assert (biased.nngp - more.nngp + biased.nngp_error + more.nngp_error >= 0).all()
    # K*(x, x') grows with x·x' where the norms stay.
    t = np.linspace(0, np.pi, 40)
    circle = deq_kernel(np.eye(1, 2), np.stack([np.cos(t), np.sin(t)], 1), **arguments)
    assert (np.diff(circle.nngp[0]) <= circle.nngp_error[0, 1:]).all()
