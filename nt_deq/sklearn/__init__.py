"""Gaussian processes of infinitely deep networks as estimators of scikit-learn.

    from nt_deq.sklearn import DEQRegressor

    model = DEQRegressor(activation="gelu").fit(X, y)
    mean, std = model.predict(X_test, return_std=True)

`pip install ".[sklearn]"` in a clone; `import nt_deq` does not import scikit-learn. All is
computed in float64, whatever JAX's x64 mode is.
"""

from __future__ import annotations

from nt_deq._extras import extra

with extra("sklearn"):
    from nt_deq.sklearn.classifier import DEQClassifier
    from nt_deq.sklearn.regressor import DEQRegressor

__all__ = ["DEQClassifier", "DEQRegressor"]
