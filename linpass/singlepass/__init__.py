"""Heads in closed form: one pass of the data through a frozen encoder, then one solve.

>>> from linpass.singlepass import SinglePassArguments, SinglePassTrainer
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linpass.feature_maps_closed_form import KernelFeatures, RandomFeatures, make_kernel

    from .arguments import SinglePassArguments
    from .batch_aware import compute_batch_aware_solution
    from .classification import discriminant, expected_calibration_error, fit_temperature
    from .descent import SGDMap, gradient_descent
    from .kernel_ridge import kernel_ridge, nystrom_conjugate_gradient
    from .logistic import choose_logistic, logistic_regression
    from .solver import RidgeSolution, leave_one_out, solve_ridge
    from .statistics import GroupedStatistics, RidgeStatistics
    from .trainer import SinglePassTrainer

_HOME = {
    "GroupedStatistics": "linpass.singlepass.statistics",
    "KernelFeatures": "linpass.feature_maps_closed_form",
    "RandomFeatures": "linpass.feature_maps_closed_form",
    "RidgeSolution": "linpass.singlepass.solver",
    "RidgeStatistics": "linpass.singlepass.statistics",
    "SGDMap": "linpass.singlepass.descent",
    "SinglePassArguments": "linpass.singlepass.arguments",
    "SinglePassTrainer": "linpass.singlepass.trainer",
    "choose_logistic": "linpass.singlepass.logistic",
    "compute_batch_aware_solution": "linpass.singlepass.batch_aware",
    "discriminant": "linpass.singlepass.classification",
    "expected_calibration_error": "linpass.singlepass.classification",
    "fit_temperature": "linpass.singlepass.classification",
    "gradient_descent": "linpass.singlepass.descent",
    "kernel_ridge": "linpass.singlepass.kernel_ridge",
    "leave_one_out": "linpass.singlepass.solver",
    "logistic_regression": "linpass.singlepass.logistic",
    "make_kernel": "linpass.feature_maps_closed_form",
    "nystrom_conjugate_gradient": "linpass.singlepass.kernel_ridge",
    "solve_ridge": "linpass.singlepass.solver",
}

__all__ = [
    "GroupedStatistics",
    "KernelFeatures",
    "RandomFeatures",
    "RidgeSolution",
    "RidgeStatistics",
    "SGDMap",
    "SinglePassArguments",
    "SinglePassTrainer",
    "choose_logistic",
    "compute_batch_aware_solution",
    "discriminant",
    "expected_calibration_error",
    "fit_temperature",
    "gradient_descent",
    "kernel_ridge",
    "leave_one_out",
    "logistic_regression",
    "make_kernel",
    "nystrom_conjugate_gradient",
    "solve_ridge",
]


def __getattr__(name: str):
    # Only what is used is imported: the command line imports parts of this package before it needs torch.
    if name not in _HOME:
        raise AttributeError(f"module 'linpass.singlepass' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
