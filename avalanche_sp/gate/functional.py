"""Mathematics of the coincidence gate: pure functions on tensors.

A layer computes z = W x + b. With delta = dL/dz (postsynaptic) and x (presynaptic), dW = delta x^T. The coincidence
gate closes the presynaptic side along the input directions of earlier experiences. So a synapse changes only if new
input and error coincide outside these directions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_FEW = 4  # subspace iteration, if all eigenpairs are more than this multiple of the wanted ones
_FEW_STARTED = 2  # the same from known vectors
_OVERSAMPLED = 10  # random vectors beyond the wanted ones
_ROUNDS = 2  # of the subspace iteration, without known vectors


def loss_surprise(loss: Tensor, mean: Tensor, variance: Tensor, full: float) -> Tensor:
    """Surprise of a loss in [0, 1]: its z-score against the running loss, in units of full surprise.

        s = clip((L - mean) / (full sqrt(variance)), 0, 1)

    Args:
        loss, mean, variance: scalars (0-dim tensors). Zero variance gives no surprise.
        full: deviations that are full surprise, greater than 0.
    """
    deviation = variance.sqrt()
    z = (loss - mean) / (full * deviation).clamp_min(torch.finfo(loss.dtype).tiny)
    return torch.where(deviation > 0, z.clamp(0, 1), torch.zeros_like(z))


def claim(eigenvalues: Tensor, mean_eigenvalue: Tensor, openness: float) -> Tensor:
    """How far the gate is closed along each eigenvector of consolidated activity.

        f_i = lambda_i / (lambda_i + alpha * mean(lambda))

    Directions with much consolidated activity are claimed (f near 1), unused ones stay free (f = 0). It is the
    soft form of the projections of OWM (Zeng et al., Nature Machine Intelligence 2019) and GPM (Saha et al.,
    ICLR 2021); compare SGP (Saha and Roy, AAAI 2023) and NCL (Kao et al., NeurIPS 2021).

    Args:
        eigenvalues: shape (r,), not negative.
        mean_eigenvalue: 0-dim; the mean over all d directions, kept ones and dropped ones.
        openness: alpha > 0, in units of the mean eigenvalue, hence free of the activity's scale. Infinite opens
            the gate for everything.

    Returns:
        Tensor of shape (r,) in [0, 1].
    """
    if openness == float("inf"):
        return torch.zeros_like(eigenvalues)
    floor = (openness * mean_eigenvalue).clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    return eigenvalues / (eigenvalues + floor)


def remainder(eigenvalues: Tensor, mean_eigenvalue: Tensor, inputs: int | Tensor) -> Tensor:
    """rho, the mean of the eigenvalues beyond the r kept ones of a second moment over d inputs: 0-dim, 0 if r = d."""
    beyond = inputs - len(eigenvalues)
    return (inputs * mean_eigenvalue - eigenvalues.sum()).clamp_min(0) / max(beyond, 1)


def transfer(before: Tensor, learned: Tensor, zero: Tensor) -> float:
    """Forward transfer of earlier experiences to a new one before its training: the share of their drop in loss.

        t = (L_0 - L) / (L_0 - L_old),   clipped to [0, 1]

    It is the forward transfer of D. Lopez-Paz and M. Ranzato (Gradient episodic memory for continual learning, NeurIPS
    2017), of a loss and as a share. 1 if the new loss is as low as the old one was. 0 if it is not below that of
    outputs of zero, or if a loss is not finite.

    Args:
        before: L, the loss of the new experience, 0-dim.
        learned: L_old, of earlier experiences when they had been learned, 0-dim.
        zero: L_0, of outputs of zero for the new experience, 0-dim.
    """
    share = (zero - before) / (zero - learned) if zero > learned else torch.zeros(())
    return float(share.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1))


def likeness(
    power: Tensor, energy: Tensor, eigenvalues: Tensor, mean_eigenvalue: Tensor, inputs: int | Tensor
) -> Tensor:
    """How alike new input and consolidated activity are, beyond chance.

        a = (<C - m I, C_new> / tr C_new) / (<C, C> / tr C),   clipped to [0, 1]

    with C = V diag(lambda) V^T + rho (I - V V^T) and m its mean eigenvalue. It is 0 for input that prefers no direction
    which C prefers, such as permuted pixels. For input with the same second moment it is 1 - d_C / d, where
    d_C = (tr C)^2 / <C, C> is the number of directions that C uses: a memory of many unlike experiences is like
    nothing. It is the alignment of two kernels (Cristianini et al., On kernel-target alignment, NeurIPS 2001) less what
    any two of their trace have.

    Args:
        power: new input's energy along each eigenvector, shape (r,).
        energy: and along all directions together, 0-dim; no input at all is like nothing.
        eigenvalues: lambda, shape (r,).
        mean_eigenvalue: m, 0-dim.
        inputs: d, the number of all directions.

    Returns:
        0-dim tensor; 0 where C prefers no direction.
    """
    rest = remainder(eigenvalues, mean_eigenvalue, inputs)
    above, beyond = eigenvalues - mean_eigenvalue, rest - mean_eigenvalue
    new = (above * power).sum() + beyond * (energy - power.sum())
    own = eigenvalues.square().sum() + rest.square() * (inputs - len(eigenvalues))
    alike = new / energy * (inputs * mean_eigenvalue) / own
    return torch.nan_to_num(alike, nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1)


def merge_eigenspace(
    eigenvalues: Tensor, vectors: Tensor, weight: float, activity: Tensor, rank: float, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of the mean of old and new second moments of presynaptic activity.

        C = weight * V diag(lambda) V^T + (1 - weight) * X^T X / n

    These are the right singular vectors of the stacked factor [sqrt(weight lambda) V^T; sqrt((1 - weight) / n) X]
    (:func:`leading_eigenpairs`). No sample is kept.

    Args:
        eigenvalues, vectors: the old eigenspace, shapes (r,) and (d, r); r may be 0.
        weight: the old one's share, 0 to 1.
        activity: new presynaptic activity X, shape (n, d).
        rank: number of eigenpairs to keep, an integer; or a float below 1: as many as have that share of C's trace, its
            energy (GPM, Saha et al., ICLR 2021, eq. 9).
        start: eigenvectors of nearly the same moment (d, m), if they are known.

    Returns:
        Eigenvalues (k,) in rising order and orthonormal vectors (d, k), k = min(rank, d, r + n).
    """
    old = (vectors * (weight * eigenvalues).sqrt()).T
    return leading_eigenpairs(torch.cat([old, activity * ((1 - weight) / len(activity)) ** 0.5]), rank, start)


def leading_eigenpairs(factor: Tensor, rank: float, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of F^T F, at a cost in proportion to F's size and to their number.

    Few of many by subspace iteration from random mixtures of F's rows, or from ``start`` with one pass less (N. Halko,
    P. G. Martinsson, J. A. Tropp: Finding structure with randomness, SIAM Review 2011, algorithm 4.4). On MNIST's
    pixels and a convolution's features they have all but a few thousandths of the energy of the exact ones. Otherwise
    by the eigendecomposition of F^T F or F F^T, whichever is smaller.

    Args:
        factor: F, shape (n, d).
        rank: number of eigenpairs to keep, an integer; or a float below 1: as many as have that share of the trace.
        start: eigenvectors of nearly the same F^T F (d, m), if they are known.

    Returns:
        Eigenvalues (k,) in rising order and orthonormal vectors (d, k), k = min(rank, d, n).
    """
    rows, d = factor.shape
    if rank >= 1 and min(rows, d) > (_FEW if start is None else _FEW_STARTED) * rank:
        if start is None:
            generator = torch.Generator().manual_seed(0)
            mixed = torch.randn(rows, int(rank) + _OVERSAMPLED, generator=generator, dtype=factor.dtype)
            mixed, rounds = mixed.to(factor.device), _ROUNDS
        else:
            mixed, rounds = factor @ start, 1
        for _ in range(rounds):
            basis = torch.linalg.qr(factor.T @ mixed).Q
            mixed = factor @ basis
        values, coordinates = _leading(mixed.T @ mixed, rank)
        basis = basis @ coordinates
    elif d <= rows:
        values, basis = _leading(factor.T @ factor, rank)
    else:
        values, left = _leading(factor @ factor.T, rank)
        # factor^T u / sqrt(lambda) is the eigenvector; QR, strongest first, keeps the weakest orthonormal too.
        basis = torch.linalg.qr(factor.T @ left.flip(1)).Q.flip(1)
    return values.clamp_min(0), basis.contiguous()


def _leading(gram: Tensor, rank: float) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs, in double precision: in single, many eigenvalues near 0 (dead units) can stop eigh."""
    values, vectors = torch.linalg.eigh(gram.double())
    if rank < 1:
        energy = values.flip(0).clamp_min(0).cumsum(0)
        kept = int((energy < rank * energy[-1]).sum()) + 1
    else:
        kept = int(rank)
    return values[-kept:].to(gram.dtype), vectors[:, -kept:].to(gram.dtype)


def held_back(delta: Tensor, projection: Tensor, closed: Tensor) -> Tensor:
    """What the coincidence gate holds back of dW = delta^T X, in the coordinates of the eigenvectors V.

        X_gated = X - X V diag(f) V^T      so      dW_gated = delta^T X - [(delta^T X V) diag(f)] V^T

    Args:
        delta: postsynaptic signal, shape (..., n, out).
        projection: X V, shape (..., n, r).
        closed: f, shape (r,).

    Returns:
        The bracket, shape (..., out, r).
    """
    return (delta.mT @ projection).mul_(closed)


def unanswered(gradient: Tensor, held: Tensor, closed: Tensor) -> Tensor:
    """The share h to hold back of the part H of the stream's gradient S that a gate f closes off, with stored samples.

        H = S diag(f),   M = G - S,      h = 1 + <M, H> / <H, H>, clipped to [0, 1]

    M, the gradient of the stored samples, passes. As far as it is opposed to H, both cancel without a gate. If H alone
    were held back, M would move the weights with nothing to answer it, and raise the loss of the stream.

    Args:
        gradient: G, of a mini-batch, in the coordinates of the gated vectors: (out, r).
        held: H, (out, r).
        closed: f, (r,).

    Returns:
        h, 0-dim; 1 for gradients that are not finite, as those of a step that a ``GradScaler`` skips.
    """
    stored = gradient - held / closed.clamp_min(torch.finfo(closed.dtype).eps)
    square = held.square().sum().clamp_min(torch.finfo(held.dtype).tiny)
    return (1 + (stored * held).sum() / square).nan_to_num(1.0).clamp(0, 1)


def penalty_gradient(drift: Tensor, eigenvalues: Tensor, closed: Tensor, weight: float | Tensor) -> Tensor:
    """Gradient of the old loss's quadratic surrogate, itself gated, in the coordinates of the eigenvectors V.

        S = (w / 2) tr(D C D^T)      so      dS/dW gated = [w D V diag(lambda (1 - f))] V^T

    D = W - W* is the drift since consolidation, C = V diag(lambda) V^T consolidated activity. For squared error on
    fixed inputs S is the old loss itself, up to a linear term (compare the quadratic penalties of EWC, Kirkpatrick
    et al., PNAS 2017, and of online structured Laplace, Ritter et al., NeurIPS 2018).

    Args:
        drift: D V, shape (out, r).
        eigenvalues, closed: lambda and f, shape (r,).
        weight: w, the loss's curvature times the number of old samples for each new one.

    Returns:
        The bracket, shape (..., out, r).
    """
    return drift * (weight * eigenvalues * (1 - closed))


def newton_step(gradient: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """A damped step of Newton's method on a quadratic in the rows of W, which share one Hessian.

        D = -G (H + eps mean(diag H) I)^-1

    With squared error and no damping it ends at the least-squares solution, as recursive least squares does. The
    damping: K. Levenberg, A method for the solution of certain non-linear problems in least squares, Quarterly of
    Applied Mathematics 1944.

    Args:
        gradient: G, shape (out, d).
        hessian: H, shape (d, d), symmetric, not negative.
        damping: eps > 0, free of the loss's scale.

    Returns:
        Shape (out, d), in double precision; zeros where H is zero.
    """
    hessian, gradient = hessian.double(), gradient.double()
    ridge = (damping * hessian.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    damped = hessian + ridge * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    return -torch.linalg.solve(damped, gradient.T).T * hessian.any()


def loss_derivatives(outputs: Tensor, loss: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Gradient of a loss in the outputs, and its mean curvature in one output of one sample, 0-dim.

        kappa = tr(d2 L / dz dz) / C = E_v [v^T H v] / C,   v of random signs (one Hutchinson probe)

    The curvature is 2 for :class:`~avalanche_sp.OneHotMSELoss`, the mean of p (1 - p) for softmax cross-entropy; 0
    where the loss is piecewise linear.

    Args:
        outputs: z, requiring grad.
        loss: 0-dim, the mean over samples.
        units: C, the number of output units.
    """
    (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)
    if not gradient.requires_grad:
        return gradient, outputs.new_zeros(())
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
    try:
        (product,) = torch.autograd.grad((gradient * signs).sum(), outputs)
    except RuntimeError as error:  # some of torch's losses have no second derivative, such as MultiMarginLoss
        if "is not implemented" not in str(error):
            raise
        return gradient.detach(), outputs.new_zeros(())
    known = (product * signs).nan_to_num(0.0, 0.0, 0.0)  # infinite where a root's argument is 0, for instance
    return gradient.detach(), (known.sum() / units).clamp_min(0)


def leading_eigenvalue(activity: Tensor, through: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The largest eigenvalue of the second moment X^T X / n, or of X^T X P / n with a gate P, by power iteration.

    Args:
        activity: X, shape (n, d).
        through: multiplies rows (1, d) by P, which is symmetric and not negative; None for the identity.

    Returns:
        0-dim.
    """
    vector = (activity.mean(0) + activity.square().mean(0).sqrt()).unsqueeze(0)
    value = torch.zeros_like(vector[0, 0])
    for _ in range(20):
        vector = vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)
        gated = vector if through is None else through(vector)
        vector = (activity @ gated.T).T @ activity / len(activity)
        value = torch.linalg.vector_norm(vector)
    return value
