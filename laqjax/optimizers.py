"""Server optimizers of the papers, where they differ from the defaults of optax."""

from typing import Any

import optax

__all__ = ["amsgrad", "nesterov"]


def amsgrad(lr: Any) -> optax.GradientTransformation:
    """Build AMSGrad as published, without bias correction: the server optimizer of CADA.

    Reference: Reddi, Kale, Kumar 2018.

    Args:
        lr: Learning rate, a number or an optax schedule.

    Returns:
        An optax transformation.
    """
    return optax.amsgrad(lr, bias_correction_mu=False, bias_correction_nu=False)


def nesterov(lr: Any) -> optax.GradientTransformation:
    """Build SGD with Nesterov momentum 0.9: the outer optimizer of DiLoCo.

    Reference: Douillard et al., "DiLoCo: Distributed low-communication training of language models", 2023.

    Args:
        lr: Learning rate, a number or an optax schedule.

    Returns:
        An optax transformation.
    """
    return optax.sgd(lr, momentum=0.9, nesterov=True)
